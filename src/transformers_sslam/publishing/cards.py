"""Model cards: `README.md` from a model's configuration and its description `results.json` ([`ModelDescription`]), with a `model-index`.

`model_cards/` in this package's repository has examples.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.dataclasses import strict
from huggingface_hub.repocard_data import CardData, eval_results_to_model_index

from ..errors import UserError, as_user_error, missing_model
from ..files import DamagedFileError, read_json, write_text
from ..reports import markdown_table, one_line
from ..settings import setting
from .card_texts import CITATIONS, DETECTOR, ENCODER_USAGE, REMOTE_CODE, USAGE


WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
USER_IN_URL = re.compile(r"(?<=://)(?:[^/\s@]+|[^/\s:@]+:(?!\d{1,5}[/?#])[^\s@]+)@")  # not a port and what follows it


@dataclass(kw_only=True)
class CardSettings:
    """Model cards"""

    model: list[str] = setting("folders that each hold config.json, preprocessor_config.json and results.json, which describes the model")

    def __post_init__(self):
        if not self.model:
            raise UserError("model is empty, but at least one folder is needed: give the model's")


def run(settings: CardSettings) -> None:
    """Write the cards, and print their paths."""
    for folder in settings.model:
        if not Path(folder).is_dir():
            raise missing_model(folder)
        print(generate_model_card(folder))


@strict
@dataclass
class ReportedResult(EvalResult):
    """One number of a card: the fields of `huggingface_hub.EvalResult`, its interval and its origin.

    Required: `task_type`, `dataset_type`, `dataset_name`, `metric_type` and `metric_value`. Recommended: `task_name` ("fine-tuning",
    "linear evaluation"), `dataset_config`, `dataset_split`, `metric_name`, and `source_name` with `source_url`.

    Args:
        metric_value: a number, in the unit that `metric_name` names (the cards here: per cent).
        interval: low and high end of the 95 % interval, in the unit of the value.
        note: origin of the number: "published; a single run", "mean of 5 folds", "independent re-run".
    """

    metric_value: float | int
    interval: list[float | int] | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = [self.metric_value] * 2 if self.interval is None else self.interval
        if len(ends) != 2 or not ends[0] <= self.metric_value <= ends[1] or not all(math.isfinite(end) for end in ends):
            raise ValueError(
                f"metric_value is {self.metric_value} and interval {self.interval}: give finite numbers, low and high end around the value"
            )

    def for_model_index(self) -> EvalResult:
        """The Hub's fields. It has none for interval and note, which become part of the metric's name."""
        name = self.metric_name or self.metric_type
        if self.interval is not None:
            name += f", 95 % interval{self._interval_text()}"
        if self.note is not None:
            name += f" ({self.note})"
        return EvalResult(**{f.name: getattr(self, f.name) for f in fields(EvalResult)} | {"metric_name": name})

    def _interval_text(self) -> str:
        return f" [{self.interval[0]:g}, {self.interval[1]:g}]" if self.interval else ""


@strict
@dataclass
class ModelDescription:
    """A model beside its configuration. Texts are Markdown; a section without text is left out.

    Args:
        name: in the `model-index`, and by default in the examples: a folder or Hub id.
        summary: kind of model, and origin of the weights.
        how_to_get: how to obtain the weights; left out of a card that names the place where they lie.
        license: identifier on the Hub; `"other"` needs `license_name` and `license_link`.
        license_text: on the licences of weights and data.
        base_model: Hub ids of the models that this one derives from.
        datasets: Hub ids of the training data.
        training: data, settings and commands.
        limits: what it is not good for, or was not tested on; one item each.
        citation: keys of `CITATIONS`.
    """

    name: str
    title: str
    summary: str
    how_to_get: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_text: str | None = None
    base_model: list[str] | None = None
    datasets: list[str] | None = None
    training: str | None = None
    results: list[ReportedResult] = field(default_factory=list)
    results_text: str | None = None
    intended_use: str | None = None
    limits: list[str] = field(default_factory=list)
    citation: list[str] = field(default_factory=lambda: ["sslam", "eat"])

    def __post_init__(self) -> None:
        if unknown := [key for key in self.citation if key not in CITATIONS]:
            raise ValueError(f"there is no citation {unknown[0]!r}: choose from {', '.join(CITATIONS)}")
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ValueError('license is "other", so the Hub needs license_name and license_link as well')


def read_description(path: str | Path) -> ModelDescription:
    """The description in a JSON file.

    Raises:
        UserError: if the file cannot be read, or a field is unknown, missing or of the wrong kind.
    """
    with as_user_error(f"{path} does not describe a model (see transformers_sslam.publishing.cards)"):
        values = read_json(path)
        if isinstance(values, dict) and "metrics" in values:
            raise ValueError("it holds the results of a run; a training run has written its card, README.md beside it, by itself")
        _check_fields(ModelDescription, values, "the file")
        results = values.get("results", [])
        for i, result in enumerate(results):
            _check_fields(ReportedResult, result, f"results[{i}]")
        return ModelDescription(**{**values, "results": [ReportedResult(**result) for result in results]})


def is_description(path: str | Path) -> bool:
    """Whether a `results.json` describes a model, and is not that of a run."""
    try:
        return {"name", "title", "summary"} <= read_json(path).keys()
    except (OSError, DamagedFileError):
        return False


def _check_fields(cls: type, values: Any, what: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{what} is a {type(values).__name__}, but must be an object")
    names = [f.name for f in fields(cls)]
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"{what} has the unknown field {unknown[0]!r}; there are {', '.join(names)}")


# --- the card


def _write(folder: Path, description: ModelDescription, model_id: str | None) -> Path:
    """Write front matter and Markdown; with `model_id` the weights lie there already."""
    config, extractor = (_read_configuration(folder / name) for name in ("config.json", "preprocessor_config.json"))
    kind = _class_name(config)
    how_to_get = description.how_to_get if model_id is None else None
    code = REMOTE_CODE if "auto_map" in config or how_to_get else None  # which conversion copies
    try:
        usage = USAGE.get(kind, ENCODER_USAGE).format(model_id=model_id or description.name, sampling_rate=extractor["sampling_rate"])
        size = _size(kind, config, extractor)
    except KeyError as error:
        raise UserError(
            f"{folder}: config.json or preprocessor_config.json lacks {error}: save model and feature extractor there"
        ) from error
    sections: dict[str, list[str | None]] = {
        "Use": [how_to_get, f"```python\n{usage}\n```", code],
        "Results": [_results_table(description.results) if description.results else None, description.results_text],
        "Training": [description.training],
        "Intended use": [description.intended_use],
        "Limits": ["\n".join(f"- {limit}" for limit in description.limits)],
        "Licence": [description.license_text],
        "Citation": [f"```bibtex\n{CITATIONS[key]}\n```" for key in description.citation],
    }
    body = [f"# {description.title}", description.summary, size]
    for title, parts in sections.items():
        if given := [part for part in parts if part]:
            body += [f"## {title}", *given]
    path = folder / "README.md"
    write_text(path, f"---\n{_metadata(kind, description).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")
    return path


def _size(kind: str, config: dict, extractor: dict) -> str:
    size = f"{kind}: {config['num_hidden_layers']} blocks, width {config['hidden_size']}, {config['num_attention_heads']} heads"
    if kind in USAGE:
        size += f", {len(config.get('id2label') or 'ab')} classes"  # without names Transformers takes two
    if kind == DETECTOR:
        size += f", {config['steps_per_second']:g} time steps per second"
    return (
        f"{size}. Input: mono audio at {extractor['sampling_rate']} Hz, which the feature extractor turns into log-mels of "
        f"{extractor['max_length']} frames (10 ms each) by default."
    )


def _metadata(kind: str, description: ModelDescription) -> CardData:
    # An entry for each result, because `ModelCardData` merges those on one data set under the source of the first.
    index = [eval_results_to_model_index(description.name, [result.for_model_index()])[0] for result in description.results]
    merged: Any = [{"name": description.name, "results": [entry for model in index for entry in model["results"]]}] if index else None
    return CardData(
        library_name="transformers",
        # The Hub has no task for event detection: a detector's is the nearest one.
        pipeline_tag="audio-classification" if kind in USAGE else "feature-extraction",
        tags=["audio", "sslam", "sound-event-detection"] if kind == DETECTOR else ["audio", "sslam"],
        license=description.license,
        license_name=description.license_name,
        license_link=description.license_link,
        base_model=description.base_model,
        datasets=description.datasets,
        **{"model-index": merged},
    )


def _results_table(results: Sequence[ReportedResult]) -> str:
    rows = []
    for result in results:
        data = ", ".join(filter(None, [result.dataset_name, result.dataset_config, result.dataset_split]))
        names = [as_text(name) for name in (data, result.task_name or result.task_type, result.metric_name or result.metric_type)]
        value = f"{result.metric_value:g}{result._interval_text()}"
        source = f"[{as_text(result.source_name or result.source_url)}]({result.source_url})" if result.source_url else ""
        rows.append([*names, value, ", ".join(filter(None, [source, as_text(result.note or "")]))])
    return markdown_table(["data", "task", "metric", "value", "origin"], rows)


# --- cards beside models


def generate_model_card(folder: str | Path, model_id: str | None = None) -> Path:
    """Write, and return, `README.md` of a folder from its `config.json`, `preprocessor_config.json` and `results.json`.

    Args:
        model_id: folder or Hub id in the examples; by default the folder where it holds the weights, and else the description's name.

    Raises:
        UserError: if one of the three files is missing or damaged, or lacks a field.
    """
    folder = Path(folder)
    if model_id is None and any((folder / name).is_file() for name in WEIGHTS):
        model_id = _place(folder)
    return _write(folder, read_description(folder / "results.json"), model_id)


def write_model_card(
    folder: str | Path,
    text: str,
    title: str | None = None,
    results: Sequence[ReportedResult] = (),
    origin: dict[str, Any] | None = None,
    place: str | Path | None = None,
) -> None:
    """Write `README.md` beside a model that was just saved.

    Args:
        folder: holds `config.json` and `preprocessor_config.json`.
        text: Markdown: origin of the weights, training data, result. Names from data go through [`as_text`].
        title: heading and name; by default the model's class.
        results: numbers for the `model-index` and a table.
        origin: licence, base model and data sets: see [`describe_origin`].
        place: folder in the examples, where the model will lie; by default `folder`.
    """
    title = title or _class_name(_read_configuration(Path(folder) / "config.json"))
    _write(
        Path(folder),
        ModelDescription(name=title, title=title, summary=text, results=list(results), **origin or {}),
        _place(place or folder),
    )


def name_model(card: str, model_id: str) -> str:
    """The text of a card, with this model in its example."""

    def renamed(example: re.Match[str]) -> str:
        return re.sub(r'((?:from_pretrained\(|model=)")[^"\n]*(?=")', lambda found: found[1] + model_id, example[0])

    return re.sub(r"(?ms)^## Use$.*?^```python$.*?^```$", renamed, card, count=1)


def _place(folder: str | Path) -> str:
    """A folder as examples name it: as seen from where this runs, if it is below; otherwise its name, because a card that is published
    must not tell the paths of a machine."""
    path, here = Path(folder).absolute(), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name


NO_LICENCE = (
    "No licence was chosen for these weights. Choose one before you publish them, as `license:` at the top of this file; the licences of "
    "the training data, and of a model that training started from, may limit the choice."
)


def describe_origin(model: str | None, datasets: Sequence[str]) -> dict[str, Any]:
    """Licence, base model and data sets of a trained model, as fields of [`ModelDescription`].

    Args:
        model: what training started from: a Hub id, a folder or a file, of which the card names the last part of the path; or `None`.
            The licence is that of its card, which is read from the folder or the Hub, if there is one.
        datasets: Hub ids or paths of the training data, named likewise.
    """
    origin: dict[str, Any] = {
        "base_model": _identifiers([model] if model else []),
        "datasets": _identifiers(datasets),
        "license_text": NO_LICENCE,
    }
    base = _card_of(model) if model else None
    if base is None or not base.get("license"):
        return origin
    names = ("license", "license_name", "license_link")
    inherited = {name: str(base.get(name)) for name in names if base.get(name)}
    if inherited["license"] == "other" and len(inherited) < len(names):
        return origin
    of = as_text(inherited.get("license_name", inherited["license"]))
    text = f"{of}, as the card of `{public_name(str(model))}` says, from which training started. The training data keep their own licences."
    return {**origin, **inherited, "license_text": text}


def _card_of(model: str) -> CardData | None:
    """The front matter of a model's card; `None` if there is no card, or it cannot be read: a card is no reason to end a training run."""
    path = Path(model) / "README.md" if Path(model).is_dir() else model
    try:
        return ModelCard.load(path).data if Path(path).suffix == ".md" or not Path(model).exists() else None
    except Exception:  # of the network, the YAML parser, or the front matter's checks
        return None


def _identifiers(models_or_data: Sequence[str]) -> list[str] | None:
    """Names in the form of a Hub id, the only one that the front matter may hold; a folder by its name alone."""
    found = []
    for name in models_or_data:
        parts = [re.sub(r"([^\w.]|\.{2})+", "-", part, flags=re.ASCII).strip("-.") for part in public_name(name).split("/")]
        found.append("/".join([part for part in parts if part][-2:]))
    return list(dict.fromkeys(filter(None, found))) or None


def _class_name(config: dict[str, Any]) -> str:
    match config.get("architectures"):
        case [str(kind), *_]:
            return kind
        case other:
            raise UserError(f"config.json has architectures={other!r}, but a list with the model's class is expected: save the model again")


def _read_configuration(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, DamagedFileError) as error:
        raise UserError(f"{path} cannot be read ({error}): save model and feature extractor there first") from error


# --- names in cards


def as_text(name: str) -> str:
    """A name from data, such as that of a class, as one line of Markdown in which its markup has no effect."""
    escaped = re.sub(r"([\\`*\[\]!#~$])|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(name))
    return html.escape(escaped, quote=False)


def public_name(model: str) -> str:
    """A model's name for a card, within backticks: a Hub id as it is, a folder without its place on this machine, a URL without user and
    query."""
    shown = without_user(model) if "://" in model else model
    name = Path(model).resolve().name if Path(model).exists() else without_folders(shown)
    return " ".join(name.split()).replace("`", "'")


def without_user(url: str) -> str:
    """A URL without user, password, query and fragment. The user goes first: a password may hold the signs of the others."""
    return re.sub(r"[?#].*", "", USER_IN_URL.sub("", url), flags=re.DOTALL)


def without_folders(path: str) -> str:
    """The last part of a path that is absolute or begins with `~` or `..`; anything else as it is."""
    for pure in (PurePosixPath(path.removeprefix("file://")), PureWindowsPath(path)):
        if pure.is_absolute() or pure.parts[:1] == ("..",) or re.match(r"~\w*[/\\]", path):
            return pure.name or path
    return path
