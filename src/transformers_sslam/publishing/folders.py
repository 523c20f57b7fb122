"""What a folder must hold to be a model's, checked before it is loaded: errors of the libraries name neither the file nor what to do."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..configuration_sslam import SSLAMConfig
from ..errors import UserError
from ..files import read_json


CONFIG, EXTRACTOR = "config.json", "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")  # one of them
OFFICIAL = "eat"  # model_type of official checkpoints, which are converted first
EXTRACTOR_TYPE = "SSLAMFeatureExtractor"


def check_model_folder(model: str) -> None:
    """Name what a folder lacks to be that of an SSLAM model with its feature extractor. Models on the Hub and files pass.

    Raises:
        UserError: if a file is missing or damaged, or belongs to a model of another kind.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    advice = "give a folder that save_pretrained of a SSLAM model and of its feature extractor wrote to"
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    kind = config.get("model_type")
    if (folder / CONFIG).is_file() and kind not in (SSLAMConfig.model_type, OFFICIAL):
        raise UserError(f"{folder / CONFIG} is of a model of type {kind!r}, but {SSLAMConfig.model_type!r} is expected: {advice}")
    if kind == OFFICIAL:
        return
    needed = {CONFIG: (CONFIG,), EXTRACTOR: (EXTRACTOR,), WEIGHTS[0]: WEIGHTS}
    if missing := [name for name, names in needed.items() if not any((folder / file).is_file() for file in names)]:
        raise UserError(f"{folder} lacks {', '.join(missing)}: {advice}")
    extractor = read_json(folder / EXTRACTOR).get("feature_extractor_type", EXTRACTOR_TYPE)
    if extractor != EXTRACTOR_TYPE:
        raise UserError(f"{folder / EXTRACTOR} is of a {extractor}, but {EXTRACTOR_TYPE} is expected: {advice}")
    shards = set(read_json(folder / INDEX).get("weight_map", {}).values()) if (folder / INDEX).is_file() else set()
    if missing := sorted(name for name in shards if not (folder / name).is_file()):
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names: copy all files of the model there")
    for file in (folder / name for name in sorted(shards | {WEIGHTS[0]})):
        try:
            if file.is_file():
                safe_open(file, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or was cut off ({error}): copy it again, or save the model again") from error
