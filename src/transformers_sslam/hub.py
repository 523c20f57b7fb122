"""What a saved model needs to stand on its own, the code it runs on and a card, and how it goes to the Hub."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled, StrictDataclassError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_sslam import SSLAMConfig
from .feature_extraction_sslam import SSLAMFeatureExtractor
from .files import read_json, write_json
from .model_cards import PLACEHOLDER, CardError, generate_model_card, is_description
from .modeling_sslam import SSLAMForAudioClassification, SSLAMModel
from .modeling_sslam_pretraining import SSLAMForPreTraining
from .settings import load_yaml


# `AutoClass: module.Class` for each file that a saved folder may hold. `auto_map` must name every class, not only the one that was saved:
# whoever has a classifier may want its encoder.
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_sslam.SSLAMConfig",
    "AutoModel": "modeling_sslam.SSLAMModel",
    "AutoModelForAudioClassification": "modeling_sslam.SSLAMForAudioClassification",
    "AutoModelForPreTraining": "modeling_sslam_pretraining.SSLAMForPreTraining",
}
FEATURE_EXTRACTOR_AUTO_MAP = {"AutoFeatureExtractor": "feature_extraction_sslam.SSLAMFeatureExtractor"}


def add_remote_code(folder: str | Path) -> None:
    """Make a saved model load without this package, through `trust_remote_code=True`.

    Copies the inference and pre-training code next to `config.json` and names every class in the `auto_map` of `config.json` and
    `preprocessor_config.json`. Where this package is installed its own classes are used all the same.

    Args:
        folder: where `save_pretrained` of a model, and perhaps of a feature extractor, wrote to.

    Raises:
        ValueError: if the folder holds no SSLAM `config.json`.
    """
    folder = Path(folder)
    config_file, extractor_file = folder / "config.json", folder / "preprocessor_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    kind = config.get("model_type")
    if kind != "sslam":
        raise ValueError(f"{folder} holds no config.json of a SSLAM model (model_type is {kind!r}): save a model there first")
    write_json(config_file, {**config, "auto_map": MODEL_AUTO_MAP}, sort_keys=True)
    if extractor_file.is_file():
        write_json(extractor_file, {**read_json(extractor_file), "auto_map": FEATURE_EXTRACTOR_AUTO_MAP}, sort_keys=True)
    for source in _remote_code():
        shutil.copyfile(source, folder / source.name)


def _remote_code() -> list[Path]:
    """The files of this package that a saved model runs on, as Transformers' own loader finds them."""
    modules = {value.split(".")[0] for value in (MODEL_AUTO_MAP | FEATURE_EXTRACTOR_AUTO_MAP).values()}
    named = {Path(__file__).with_name(f"{module}.py") for module in modules}
    return sorted(named | {Path(file) for source in named for file in get_relative_import_files(source)})


# --- publishing

MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    cls.__name__: cls for cls in (SSLAMModel, SSLAMForAudioClassification, SSLAMForPreTraining)
}
WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]  # either the first or the others
# All that goes up; so no pickle, optimiser state, log or recording ever does, whatever else lies in the folder.
UPLOADED_FILES = ["config.json", "preprocessor_config.json", *WEIGHTS, "README.md", "LICENSE*", "results.json", "settings.yaml"]
LARGEST_FILE = 50 * 10**9  # bytes; `save_pretrained` cuts larger models into shards of this size


class PublishError(ValueError):
    """A model cannot be published; the message says why and what to do. Where the Hub was not reached, nothing was sent."""


@dataclass(frozen=True)
class Publication:
    """A model that is ready to go up.

    Attributes:
        folder: a temporary copy, which holds exactly what goes up; its weights are links to the source's.
        repo_id: where to.
        left_out: what lies in the source and stays there: folders end in "/".
        notes: sentences about what is allowed and yet regrettable.
    """

    folder: Path
    repo_id: str
    left_out: list[str]
    notes: list[str]

    @property
    def files(self) -> dict[str, int]:
        """Size in bytes by name."""
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}


@contextmanager
def prepare_publication(folder: str | Path, repo_id: str, results: str | Path | None = None) -> Iterator[Publication]:
    """A copy of a saved model with code, `auto_map` for every class and card, checked. The folder itself is not touched, nor the network.

    The card is generated from `results` (see `model_cards.ModelDescription`), else from the folder's own `results.json` if that describes a
    model, else the folder's `README.md` is taken. Its examples load `repo_id`.

    Args:
        folder: where `save_pretrained` of a model and of a feature extractor wrote to.
        repo_id: `owner/name` on the Hub.
        results: description that goes up as `results.json`, in place of the folder's own.

    Raises:
        PublishError: (a `ValueError`) if the folder is not whole; the message names what is missing or wrong.
    """
    source = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is no name for a repository ({error}): give owner/name") from error
    if "/" not in repo_id:  # the card's examples load what it says
        raise PublishError(f"{repo_id!r} is a name without its owner: give owner/name")
    if results is None and is_description(source / "results.json"):
        results = source / "results.json"
    _check_presence(source, has_description=results is not None)
    with tempfile.TemporaryDirectory(prefix="publish-") as temporary:
        staged = Path(temporary)
        try:
            left_out = _copy(source, staged)
            if results is not None:
                shutil.copyfile(results, staged / "results.json")
                generate_model_card(staged, model_id=repo_id)
            else:
                card = (staged / "README.md").read_text(encoding="utf-8")
                (staged / "README.md").write_text(card.replace(PLACEHOLDER, repo_id), encoding="utf-8")
            add_remote_code(staged)
        except (CardError, OSError, TypeError, ValueError) as error:
            raise PublishError(f"{source} cannot be published: {str(error).replace(str(staged), str(source))}") from error
        _check_model(source, staged)
        notes = _check_card(source, staged)
        publication = Publication(staged, repo_id, left_out, notes)
        if large := [name for name, size in publication.files.items() if size > LARGEST_FILE]:
            raise PublishError(f"{source / large[0]} is larger than {LARGEST_FILE / 1e9:g} GB: save the model in smaller shards")
        yield publication


def upload(publication: Publication, private: bool = False, revision: str | None = None, api: HfApi | None = None) -> str:
    """Create the repository if need be, send what it does not hold yet, and compare what it then holds with what was sent.

    Other files of the repository are left alone. The token is the one that `hf auth login` stored, or `HF_TOKEN`.

    Args:
        private: of a new repository; one that exists and is public is refused.
        revision: a branch, made if need be; by default "main".
        api: the client; by default of the Hub that `HF_ENDPOINT` names.

    Returns:
        The address of the model.

    Raises:
        PublishError: (a `ValueError`) if the Hub cannot be reached, refuses, or does not hold the same bytes afterwards.
    """
    api = api or HfApi()
    with _failures_as_sentences(publication.repo_id):
        url = api.create_repo(publication.repo_id, private=True if private else None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise PublishError(f"{url.repo_id} exists already and is public: make it private on the Hub first, or leave --private out")
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=publication.folder,
            allow_patterns=list(publication.files),
            revision=revision,
            commit_message="Upload model, code, card and results",
        )
        remote = {entry.path: entry for entry in api.list_repo_tree(url.repo_id, revision=revision) if isinstance(entry, RepoFile)}
    if different := [name for name in publication.files if not _same_bytes(publication.folder / name, remote.get(name))]:
        raise PublishError(f"{url.repo_id} does not hold what was sent ({', '.join(different)} missing or different): publish again")
    return str(url) if revision is None else f"{url}/tree/{revision}"


def _check_presence(source: Path, has_description: bool) -> None:
    if not source.is_dir():
        raise PublishError(f"{source} is no folder: give the one that save_pretrained wrote to")
    needed = {"config.json": ["config.json"], "preprocessor_config.json": ["preprocessor_config.json"], "model.safetensors": WEIGHTS[:2]}
    if not has_description:
        needed["README.md (or a results.json that describes the model)"] = ["README.md"]
    if missing := [what for what, names in needed.items() if not any((source / name).is_file() for name in names)]:
        raise PublishError(f"{source} lacks {', '.join(missing)}: save the model and its feature extractor there, as safetensors")
    if all((source / name).is_file() for name in WEIGHTS[:2]):
        raise PublishError(f"{source} holds {WEIGHTS[0]} and {WEIGHTS[1]}, of which only one is this model's: take the older one away")


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _copy(source: Path, staged: Path) -> list[str]:
    """Copy what is to go up, link weights, which may be large and are not changed, and return what was left."""
    left_out, code = [], {path.name for path in _remote_code()}
    for path in sorted(source.iterdir()):
        if path.is_file() and _matches(path.name, WEIGHTS):
            (staged / path.name).symlink_to(path.resolve())
        elif path.is_file() and path.name in ("results.json", "settings.yaml"):
            (staged / path.name).write_text(_without_folders(path))
        elif path.is_file() and _matches(path.name, UPLOADED_FILES):
            shutil.copyfile(path, staged / path.name)
        elif path.name not in code:  # code is written anew
            left_out.append(path.name + ("/" if path.is_dir() else ""))
    return left_out


def _without_folders(path: Path) -> str:
    """What a run wrote about itself, with the names of its folders and files, but not where on this machine they lie."""
    text = path.read_text()
    try:
        values = load_yaml(text) if path.suffix == ".yaml" else read_json(path, object)
    except ValueError as error:
        raise PublishError(f"{path} cannot be read ({' '.join(str(error).split())}): repair it or take it away") from error
    if path.suffix == ".yaml":
        named = _names_of_paths(values)
    else:  # of results the unreadable files alone: classes may begin with a slash, as AudioSet's do
        parts = values if isinstance(values, dict) else {}
        named = values if "unreadable" not in parts else {**parts, "unreadable": _names_of_paths(parts["unreadable"])}
    if named == values:
        return text
    return yaml.safe_dump(named, sort_keys=False, allow_unicode=True) if path.suffix == ".yaml" else json.dumps(named, indent=2) + "\n"


def _names_of_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _names_of_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_names_of_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    paths = (PurePosixPath(value.removeprefix("file://")), PureWindowsPath(value))
    return next((path.name for path in paths if path.is_absolute() or path.parts[:1] == ("..",) or value.startswith("~")), value)


def _check_model(source: Path, staged: Path) -> None:
    """Configuration, feature extractor and names and shapes of the weights must fit each other. Only the weights' headers are read."""
    try:
        config, extractor = SSLAMConfig.from_pretrained(staged), SSLAMFeatureExtractor.from_pretrained(staged)
        kind = (config.architectures or ["none"])[0]
        if kind not in MODEL_CLASSES:
            raise PublishError(f"{source / 'config.json'} names the architecture {kind}, but must name one of {', '.join(MODEL_CLASSES)}")
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in MODEL_CLASSES[kind](config).state_dict().items()}
        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(staged.glob("*.safetensors")):
            with safe_open(path, framework="pt") as weights:
                found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 (no mapping)
    except PublishError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise PublishError(f"{source} holds a model that does not load ({' '.join(str(error).split())}): save it again") from error
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise PublishError(
            f"{source}: {len(wrong)} weights do not fit its config.json, such as {name}, which is {found.get(name, 'missing')} and "
            f"should be {expected.get(name, 'absent')}: save config and weights of one model"
        )
    if extractor.num_mel_bins != config.num_mel_bins:
        raise PublishError(
            f"{source}: the feature extractor gives {extractor.num_mel_bins} mel bins, the model hears {config.num_mel_bins}"
        )


def _check_card(source: Path, staged: Path) -> list[str]:
    """The front matter must say what the Hub needs to serve the model; what it should say beside that is noted."""
    try:
        data = ModelCard((staged / "README.md").read_text(encoding="utf-8")).data
    except Exception as error:  # of the YAML parser, or of the model index
        raise PublishError(f"{source / 'README.md'} has a front matter that cannot be read: {' '.join(str(error).split())}") from error
    if missing := [key for key in ("library_name", "pipeline_tag") if not data.get(key)]:
        raise PublishError(f"the front matter of {source / 'README.md'} lacks {', '.join(missing)}: write_model_card writes one")
    notes = []
    if not data.get("license"):
        notes.append("the card names no licence, so nobody knows whether the model may be used: add `license: ...` to its front matter")
    if not data.get("eval_results"):
        notes.append("the card has no results in its model-index: `write_model_card` with results, or `--results`, puts them there")
    return notes


def _same_bytes(path: Path, remote: RepoFile | None) -> bool:
    """Whether the Hub's hash of a file, SHA-256 of a large one and git's of any other, is that of the file here."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    if remote.lfs is None:
        return hashlib.sha1(b"blob %d\0" % remote.size + path.read_bytes()).hexdigest() == remote.blob_id
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == remote.lfs.sha256


@contextmanager
def _failures_as_sentences(repo_id: str) -> Iterator[None]:
    try:
        yield
    except PublishError:
        raise
    except (HTTPError, OfflineModeIsEnabled, OSError, RuntimeError, ValueError) as error:
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error  # failures of one file come wrapped
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status in (401, 403):
            advice = "log in with a token that may write there (hf auth login, or HF_TOKEN)"
        else:
            advice = "try again; what the Hub holds already is not sent twice"
        said = " ".join(str(cause).split()).rstrip(".")
        raise PublishError(f"{repo_id} could not be published ({said}): {advice}") from error


__all__ = ["Publication", "PublishError", "add_remote_code", "prepare_publication", "upload"]
