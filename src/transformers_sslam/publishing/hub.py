"""The code that a saved model needs to load anywhere, and the way of a model, or a Space, to the Hugging Face Hub."""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_MAPPING,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_sslam import SSLAMConfig
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import read_json, write_json, write_text
from ..loading_sslam import PATCH_PROJECTION
from ..settings import load_yaml
from .cards import generate_model_card, is_description, name_model, without_folders, without_user


# Every class, not only the one that was saved: whoever has a classifier may want its encoder.
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_sslam.SSLAMConfig",
    "AutoModel": "modeling_sslam.SSLAMModel",
    "AutoModelForAudioClassification": "modeling_sslam.SSLAMForAudioClassification",
    "AutoModelForAudioFrameClassification": "modeling_sslam_frames.SSLAMForAudioFrameClassification",
    "AutoModelForPreTraining": "modeling_sslam_pretraining.SSLAMForPreTraining",
}
FEATURE_EXTRACTOR_AUTO_MAP = {"AutoFeatureExtractor": "feature_extraction_sslam.SSLAMFeatureExtractor"}
# As registered with Transformers: an import would be circular, as the models' `from_official` calls the conversion.
MAPPINGS: Any = (
    MODEL_MAPPING,
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
)
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {mapping[SSLAMConfig].__name__: mapping[SSLAMConfig] for mapping in MAPPINGS}

WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]  # either the first or the others
CONFIGURATION = ["config.json", "preprocessor_config.json"]
RECORDS = ["results.json", "settings.yaml"]  # what a run writes about itself
# Nothing else but pictures that the card shows: no pickle, optimizer state, log or recording.
PUBLISHED = [*CONFIGURATION, *RECORDS, *WEIGHTS, "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"]
SHOWN_PICTURE = re.compile(r"!\[[^\]]*\]\(([\w-]+\.png)\)")
LARGEST_FILE = 50 * 10**9  # bytes; `save_pretrained` makes shards of this size

SECRET_NAME = re.compile(r"token$|secret|passw|credential|api_?key|access_?key|^key$", re.IGNORECASE)
FOLDER_OF_A_PERSON = re.compile(r"(?<![\w./])(?:/home/|/Users/|/root/|[A-Z]:\\Users\\)[^\s`'\"),;]+")
# Access tokens of the Hub, AWS, GitHub and others, private keys, and passwords and tokens in addresses.
SECRET = re.compile(
    r"\bhf_\w{20,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[a-z]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}|\bsk-[\w-]{20,}"
    r"|\bxox[a-z]-[\w-]{10,}|\bAIza[\w-]{35}|(?i:secret_?access_?key)\W+[\w/+]{40}|PRIVATE KEY-----|://[^/\s:@]+:[^\s@]+@"
    r"|[?&](?i:[\w-]*(?:token|sig(?:nature)?|secret|password|api_?key))=[^&\s]{8,}"
)


class PublishError(UserError):
    """A model cannot be published: why, and what to do."""


# --- code beside a saved model


def add_remote_code(folder: str | Path) -> None:
    """Make a saved model load without this package, through `trust_remote_code=True`. Where it is installed its classes are used.

    Args:
        folder: with `config.json`, and perhaps `preprocessor_config.json`, which get an `auto_map`, and the code beside them.

    Raises:
        UserError: if the folder holds no SSLAM `config.json`.
    """
    folder = Path(folder)
    config_file, extractor_file = (folder / name for name in CONFIGURATION)
    config = read_json(config_file) if config_file.is_file() else {}
    if (kind := config.get("model_type")) != SSLAMConfig.model_type:
        raise UserError(f"{folder} holds no config.json of a SSLAM model (model_type is {kind!r}): save a model there first")
    write_json(config_file, {**config, "auto_map": MODEL_AUTO_MAP}, sort_keys=True)
    if extractor_file.is_file():
        write_json(extractor_file, {**read_json(extractor_file), "auto_map": FEATURE_EXTRACTOR_AUTO_MAP}, sort_keys=True)
    for source in _remote_code():
        shutil.copyfile(source, folder / source.name)


def _remote_code() -> list[Path]:
    """Files of this package that a saved model runs on, as Transformers' loader finds them."""
    modules = {value.split(".")[0] for value in (MODEL_AUTO_MAP | FEATURE_EXTRACTOR_AUTO_MAP).values()}
    named = {Path(__file__).parents[1] / f"{module}.py" for module in modules}
    return sorted(named | {Path(file) for source in named for file in get_relative_import_files(source)})


# --- publishing


@dataclass(frozen=True)
class Publication:
    """A model, or a Space, that is ready for upload.

    Attributes:
        folder: exactly what is published.
        repo_id: `owner/name` on the Hub.
        left_out: what stays in the source of the model; folders end in "/".
        notes: sentences about gaps that do not prevent publication.
        kind: of the repository.
        replaced: folders of which nothing else remains in the repository; its other files are left alone.
    """

    folder: Path
    repo_id: str
    left_out: list[str]
    notes: list[str]
    kind: Literal["model", "space"] = "model"
    replaced: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, int]:
        """Size in bytes by name."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}


@contextmanager
def prepare_publication(folder: str | Path, repo_id: str, results: str | Path | None = None) -> Iterator[Publication]:
    """A checked copy of a saved model with code and card. Neither the folder itself nor the network is touched.

    Settings and results are published without the folders of this machine, and without credentials.

    Args:
        folder: where `save_pretrained` of a model and of a feature extractor wrote to.
        repo_id: `owner/name` on the Hub, which the card's examples load.
        results: description (see [`cards.ModelDescription`]) for the card and `results.json`; by default the folder's `results.json` if it
            is one, else the folder's `README.md` is the card.

    Raises:
        PublishError: if the folder is not whole, there is no such description, or a file is a link to outside or holds a credential.
    """
    source = Path(folder)
    check_repo_id(repo_id)
    if results is not None and not Path(results).is_file():
        raise PublishError(
            f"results is {str(results)!r}, but a JSON file that describes the model is expected: check the path, or leave it out"
        )
    if results is None and is_description(source / "results.json"):
        results = source / "results.json"
    _check_presence(source, has_description=results is not None)
    with tempfile.TemporaryDirectory(prefix="publish-") as temporary:
        staged = Path(temporary)
        try:
            card = Path(results or source / "README.md").read_text(encoding="utf-8")
            left_out = _copy(source, staged, SHOWN_PICTURE.findall(card))
            if results is not None:
                write_text(staged / "results.json", _publishable(Path(results)))
                generate_model_card(staged, model_id=repo_id)
            else:
                write_text(staged / "README.md", name_model(card, repo_id))
            add_remote_code(staged)
        except PublishError:
            raise
        except (OSError, TypeError, ValueError) as error:
            raise PublishError(f"{source} cannot be published: {str(error).replace(str(staged), str(source))}") from error
        _check_model(source, staged)
        _check_secrets(source, staged)
        publication = Publication(staged, repo_id, left_out, _check_card(source, staged))
        if large := [name for name, size in publication.files.items() if size > LARGEST_FILE]:
            raise PublishError(f"{source / large[0]} is larger than {LARGEST_FILE / 1e9:g} GB: save the model in smaller shards")
        yield publication


def check_repo_id(repo_id: str) -> None:
    """`PublishError` if it is not `owner/name`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is not a name for a repository ({error}): give owner/name") from error
    if "/" not in repo_id:  # the card's examples load what it says
        raise PublishError(f"{repo_id!r} is a name without its owner: give owner/name")


def upload(publication: Publication, private: bool = False, revision: str | None = None, api: HfApi | None = None) -> str:
    """Send what the repository does not hold yet, compare what it then holds, and return its address. Its other files are left alone, but
    for those in folders that are replaced.

    Args:
        publication: from [`prepare_publication`], or a Space.
        private: make a new repository private; one that exists and is public is an error then.
        revision: a branch, created if need be; by default "main".
        api: the client; by default of the Hub that `HF_ENDPOINT` names, with the token of `hf auth login` or `HF_TOKEN`.

    Raises:
        PublishError: if the Hub cannot be reached, rejects the upload, or does not hold the same bytes afterwards.
    """
    api, kind = api or HfApi(), publication.kind
    with _hub_failures(publication.repo_id):
        sdk = "gradio" if kind == "space" else None
        url = api.create_repo(publication.repo_id, repo_type=kind, space_sdk=sdk, private=True if private else None, exist_ok=True)
        repository: Any = {"repo_id": url.repo_id, "repo_type": kind}
        if private and not api.repo_info(**repository).private:
            raise PublishError(f"{url.repo_id} exists already and is public: make it private on the Hub first, or leave --private out")
        if revision is not None:
            api.create_branch(**repository, branch=revision, exist_ok=True)
        api.upload_folder(
            **repository,
            folder_path=publication.folder,
            delete_patterns=[f"{folder}/*" for folder in publication.replaced] or None,
            revision=revision,
            commit_message="Upload model, code, card and results" if kind == "model" else "Upload the page, its code and its model",
        )
        found = api.verify_repo_checksums(**repository, revision=revision, local_dir=publication.folder)
    if different := sorted([*found.extra_paths, *(mismatch["path"] for mismatch in found.mismatches)]):
        raise PublishError(f"{url.repo_id} does not hold what was sent ({', '.join(different)} missing or different): publish again")
    return str(url) if revision is None else f"{url}/tree/{revision}"


def _check_presence(source: Path, has_description: bool) -> None:
    if not source.is_dir():
        raise PublishError(f"{source} is not a folder: give the one that save_pretrained wrote to")
    needed = {name: [name] for name in CONFIGURATION} | {"model.safetensors": WEIGHTS[:2]}
    if not has_description:
        needed["README.md (or a results.json that describes the model)"] = ["README.md"]
    if missing := [what for what, names in needed.items() if not any((source / name).is_file() for name in names)]:
        raise PublishError(f"{source} lacks {', '.join(missing)}: save the model and its feature extractor there, as safetensors")
    if all((source / name).is_file() for name in WEIGHTS[:2]):
        raise PublishError(f"{source} holds {WEIGHTS[0]} and {WEIGHTS[1]}, of which only one is this model's: remove the older one")


def _copy(source: Path, staged: Path, pictures: list[str]) -> list[str]:
    """Copy the files to publish, also these pictures, link the weights, and return the names of all others."""
    left_out, code = [], {path.name for path in _remote_code()}
    for path in sorted(source.iterdir()):
        if not path.is_file() or not any(fnmatch(path.name, pattern) for pattern in (*PUBLISHED, *pictures)):
            if path.name not in code:
                left_out.append(path.name + ("/" if path.is_dir() else ""))
            continue
        if not path.resolve().is_relative_to(source.resolve()):
            raise PublishError(f"{path} is a link to {path.resolve()}, outside the folder: copy that file there, or remove the link")
        if path.name in (*CONFIGURATION, *RECORDS):
            write_text(staged / path.name, _publishable(path))
        elif any(fnmatch(path.name, pattern) for pattern in WEIGHTS):
            (staged / path.name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, staged / path.name)
    return left_out


def _publishable(path: Path) -> str:
    """A configuration or record of a run without credentials, and of paths only the last part."""
    text, is_yaml = path.read_text(encoding="utf-8"), path.suffix == ".yaml"
    try:
        values = load_yaml(text) if is_yaml else read_json(path)
    except ValueError as error:
        raise PublishError(f"{path} cannot be read ({' '.join(str(error).split())}): repair it, or remove it") from error
    if path.name in (*CONFIGURATION, "settings.yaml"):
        cleaned = _without_private(values, paths=True)
    else:  # classes may begin with a slash, as AudioSet's do, so of results only these hold paths
        cleaned = {name: _without_private(value, paths=name in ("settings", "unreadable"), name=name) for name, value in values.items()}
    if cleaned == values:
        return text
    return yaml.safe_dump(cleaned, sort_keys=False, allow_unicode=True) if is_yaml else json.dumps(cleaned, indent=2) + "\n"


def _without_private(value: Any, paths: bool, name: str = "") -> Any:
    """Drop values that are secret by their name or form, users and queries of URLs, folders of persons and, with `paths`, all folders.

    Names of classes stay; as results have them as keys, there a name makes only a text secret.
    """
    if SECRET_NAME.search(name) and not isinstance(value, bool) and (paths or isinstance(value, str)):
        return None
    if isinstance(value, dict):
        labels = ("id2label", "label2id", "event_detection")
        return {key: item if key in labels else _without_private(item, paths, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_private(item, paths, name) for item in value]
    if not isinstance(value, str):
        return value
    if SECRET.fullmatch(value):
        return None
    if re.match(r"[\w+.-]+://\S+$", value):
        value = without_user(value)
    return FOLDER_OF_A_PERSON.sub(lambda folder: without_folders(folder[0]), without_folders(value) if paths else value)


def _check_secrets(source: Path, staged: Path) -> None:
    code = {path.name for path in _remote_code()}
    for path in sorted(path for path in staged.iterdir() if path.suffix != ".safetensors" and path.name not in code):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if SECRET.search(line):
                raise PublishError(f"{source / path.name} holds what looks like a credential in line {number}: remove it")


def _check_model(source: Path, staged: Path) -> None:
    """Configuration, feature extractor and weights' headers (names and shapes) must fit each other."""
    with as_user_error(f"{source} holds a model that does not load, so save it again"):
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
        for name, shape in found.items():
            if name.endswith(PATCH_PROJECTION) and len(shape) == 4:
                found[name] = (shape[0], math.prod(shape[1:]))
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise PublishError(
            f"{source}: {len(wrong)} weights do not fit its config.json, such as {name}, which is {found.get(name, 'missing')} and "
            f"should be {expected.get(name, 'absent')}: save config and weights of one model"
        )
    given, taken = extractor.num_mel_bins, config.num_mel_bins
    if given != taken:
        raise PublishError(f"{source}: the feature extractor gives {given} mel bins, the model takes {taken}: save those of one model")


def _check_card(source: Path, staged: Path) -> list[str]:
    """Require of the front matter what the Hub needs to serve the model, and note what else it lacks."""
    text = (staged / "README.md").read_text(encoding="utf-8")
    try:
        data = ModelCard(text).data
    except Exception as error:  # of the YAML parser, or of the model index
        raise PublishError(f"{source / 'README.md'} has a front matter that cannot be read: {' '.join(str(error).split())}") from error
    if missing := [key for key in ("library_name", "pipeline_tag") if not data.get(key)]:
        raise PublishError(f"the front matter of {source / 'README.md'} lacks {', '.join(missing)}: `sslam card` writes one")
    notes = []
    if not data.get("license"):
        notes.append("the card names no licence, so nobody knows whether the model may be used: add `license: ...`")
    if not data.get("eval_results"):
        notes.append("the card has no results in its model-index: give --results")
    if folder := FOLDER_OF_A_PERSON.search(text):
        notes.append(f"the card names a folder of a machine, {folder[0]}: take it out if it is private")
    return notes


@contextmanager
def _hub_failures(repo_id: str) -> Iterator[None]:
    """Raise the client's failures as [`PublishError`]."""
    try:
        yield
    except PublishError:
        raise
    except (HTTPError, OfflineModeIsEnabled, OSError, RuntimeError, ValueError) as error:
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error  # failures of one file come wrapped
        advice = "try again; what the Hub holds already is not sent twice"
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            advice = "log in with a token that may write there (hf auth login, or HF_TOKEN)"
        said = " ".join(str(cause).split()).rstrip(".")
        raise PublishError(f"{repo_id} could not be published ({said}): {advice}") from error
