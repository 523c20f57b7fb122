"""Model cards: `README.md` from a model's configuration and a JSON of what is known about it, with `model-index` metadata for the Hub.

`results.json`, the second of the two, holds one object with the fields of [`ModelDescription`]; its `results` are objects with the fields
of [`ReportedResult`]. `model_cards/` in this package's repository has examples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.repocard_data import CardData, eval_results_to_model_index

from .files import DamagedFileError, read_json, write_text
from .reports import markdown_table


PLACEHOLDER = "PATH_OR_ID"  # in the examples of a card whose model has no place of its own yet


class CardError(ValueError):
    """A model card cannot be made, or is none; the message says of which file, and what was expected."""


@strict
@dataclass
class ReportedResult(EvalResult):
    """One number of a card: the fields of `huggingface_hub.EvalResult`, and what makes it honest.

    Required: `task_type` ("audio-classification"), `dataset_type` (identifier), `dataset_name`, `metric_type` ("accuracy") and
    `metric_value`. Worth giving: `task_name` ("fine-tuning", "linear evaluation"), `dataset_config`, `dataset_split`, `metric_name`, and
    `source_name` with `source_url`.

    Args:
        metric_value: a number, in the unit that `metric_name` names (the cards here: per cent).
        interval: low and high end of the 95 % interval, in the unit of the value.
        note: how the number came about: "published; a single run, best on the evaluation set", "mean of 5 folds", "independent re-run".
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
        """As the Hub knows it. Interval and note, which it does not know, go into the metric's name, so that no number stands alone."""
        name = self.metric_name or self.metric_type
        if self.interval is not None:
            name += f", 95 % interval [{self.interval[0]:g}, {self.interval[1]:g}]"
        if self.note is not None:
            name += f" ({self.note})"
        known = {f.name: getattr(self, f.name) for f in fields(EvalResult)}
        return EvalResult(**{**known, "metric_name": name})


@strict
@dataclass
class ModelDescription:
    """What is known about a model beside its configuration. Texts are Markdown; a section without text is left out.

    Args:
        name: in the `model-index`, and what the examples load unless told otherwise: a folder or Hub id.
        title: heading.
        summary: what it is and where the weights come from.
        how_to_get: how to come by the weights; left out of a card that names the place where they lie.
        license: identifier on the Hub, such as `"apache-2.0"`; `"other"` goes with `license_name` and `license_link`.
        license_text: what else is to say of it, of the weights and of the data.
        base_model: Hub ids of the models that this one derives from.
        datasets: Hub ids of the data it was trained on.
        training: data, settings and commands.
        results: numbers, each with where it comes from.
        results_text: what is to say of them.
        intended_use: what it is good for.
        limits: what it is not good for, or nobody has tried; one item each.
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
        CardError: if the file cannot be read, or a field is unknown, missing or of the wrong kind.
    """
    try:
        values = read_json(path)
        _check_fields(ModelDescription, values, "the file")
        results = values.get("results", [])
        for i, result in enumerate(results):
            _check_fields(ReportedResult, result, f"results[{i}]")
        return ModelDescription(**{**values, "results": [ReportedResult(**result) for result in results]})
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise CardError(f"{path} does not describe a model ({' '.join(str(error).split())}): see transformers_sslam.model_cards") from error


def is_description(path: str | Path) -> bool:
    """Whether a `results.json` is meant to describe a model, or is one of those that training writes, which hold the numbers of a run."""
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

TASKS = {"SSLAMForAudioClassification": "audio-classification"}
USAGE = {
    "audio-classification": """import transformers_sslam
from transformers import pipeline
from transformers_sslam.audio import load_waveform

classify = pipeline("audio-classification", model="{model_id}")
waveform = load_waveform("clip.wav", {sampling_rate})  # any format, rate and number of channels
print(classify({{"array": waveform, "sampling_rate": {sampling_rate}}}))""",
    "feature-extraction": """import torch
import transformers_sslam
from transformers import AutoFeatureExtractor, AutoModel
from transformers_sslam.audio import load_waveform

extractor = AutoFeatureExtractor.from_pretrained("{model_id}")
model = AutoModel.from_pretrained("{model_id}").eval()
waveform = load_waveform("clip.wav", {sampling_rate})  # any format, rate and number of channels
with torch.inference_mode():
    outputs = model(**extractor(waveform, sampling_rate={sampling_rate}, return_tensors="pt"))
outputs.pooler_output  # (batch, width): the clip
model.frame_embeddings(outputs.last_hidden_state)  # (batch, time, frequency, width): each 160 ms""",
}
CITATIONS = {
    "sslam": """@inproceedings{alex2025sslam,
  title     = {{SSLAM}: Enhancing Self-Supervised Models with Audio Mixtures for Polyphonic Soundscapes},
  author    = {Alex, Tony and Atito, Sara and Mustafa, Armin and Awais, Muhammad and Jackson, Philip J. B.},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2506.12222}
}""",
    "eat": """@inproceedings{chen2024eat,
  title     = {{EAT}: Self-Supervised Pre-Training with Efficient Audio Transformer},
  author    = {Chen, Wenxi and Liang, Yuzhe and Ma, Ziyang and Zheng, Zhisheng and Chen, Xie},
  booktitle = {International Joint Conference on Artificial Intelligence (IJCAI)},
  year      = {2024},
  url       = {https://arxiv.org/abs/2401.03497}
}""",
}


def build_model_card(config: dict, extractor: dict, description: ModelDescription, model_id: str | None = None) -> str:
    """The card of a model, front matter and Markdown.

    Args:
        config: content of its `config.json`.
        extractor: content of its `preprocessor_config.json`.
        description: everything else.
        model_id: folder or Hub id in the examples, where the weights lie; by default the description's name.
    """
    kind = _class_name(config)
    task = TASKS.get(kind, "feature-extraction")
    usage = USAGE[task].format(model_id=model_id or description.name, sampling_rate=extractor["sampling_rate"])
    how_to_get = description.how_to_get if model_id is None else None
    code = REMOTE_CODE if "auto_map" in config or how_to_get else None  # conversion brings it along
    sections = {
        "Use": "\n\n".join(filter(None, [how_to_get, f"```python\n{usage}\n```", code])),
        "Results": "\n\n".join(
            filter(None, [_results_table(description.results) if description.results else None, description.results_text])
        ),
        "Training": description.training,
        "Intended use": description.intended_use,
        "Limits": "\n".join(f"- {limit}" for limit in description.limits),
        "Licence": description.license_text,
        "Citation": "\n\n".join(f"```bibtex\n{CITATIONS[key]}\n```" for key in description.citation),
    }
    body = [f"# {description.title}", description.summary, _size(kind, config, extractor)]
    body += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return f"---\n{_metadata(task, description).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"


REMOTE_CODE = (
    "The code that the model runs on lies beside the weights: without `import transformers_sslam`, load with `trust_remote_code=True`."
)


def _size(kind: str, config: dict, extractor: dict) -> str:
    size = f"{kind}: {config['num_hidden_layers']} blocks, width {config['hidden_size']}, {config['num_attention_heads']} heads"
    if kind in TASKS:
        size += f", {len(config.get('id2label') or 'ab')} classes"  # two is what Transformers takes where nothing is said
    return (
        f"{size}. Input: mono audio at {extractor['sampling_rate']} Hz, which the feature extractor turns into log-mels of "
        f"{extractor['max_length']} frames (10 ms each) by default."
    )


def _metadata(task: str, description: ModelDescription) -> CardData:
    # `ModelCardData` would merge results on the same data set under the source of the first: a re-run under that of the paper. Each result
    # is an entry of its own instead.
    index = [eval_results_to_model_index(description.name, [result.for_model_index()])[0] for result in description.results]
    merged: Any = [{"name": description.name, "results": [entry for model in index for entry in model["results"]]}] if index else None
    return CardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["audio", "sslam"],
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
        value = f"{result.metric_value:g}"
        if result.interval is not None:
            value += f" [{result.interval[0]:g}, {result.interval[1]:g}]"
        source = f"[{result.source_name or result.source_url}]({result.source_url})" if result.source_url else ""
        metric = result.metric_name or result.metric_type
        rows.append([data, result.task_name or result.task_type, metric, value, ", ".join(filter(None, [source, result.note]))])
    return markdown_table(["data", "task", "metric", "value", "where from"], rows)


# --- cards beside models


def generate_model_card(folder: str | Path, model_id: str | None = None) -> Path:
    """Write `README.md` of a folder from its `config.json`, `preprocessor_config.json` and `results.json`.

    Args:
        folder: holds them.
        model_id: folder or Hub id in the examples; by default the description's name.

    Returns:
        The file that was written.

    Raises:
        CardError: (a `ValueError`) if one of the three files is missing or not as it should be.
    """
    folder = Path(folder)
    return _write(folder, read_description(folder / "results.json"), model_id)


def write_model_card(folder: str | Path, text: str, title: str | None = None, results: Sequence[ReportedResult] = ()) -> None:
    """Write `README.md` beside a model that was just saved, about which no more is known than this.

    Args:
        folder: holds `config.json` and `preprocessor_config.json`.
        text: Markdown: where the weights come from, what they were trained on and with what result.
        title: heading and name; by default the folder's class of model.
        results: numbers for the `model-index`, shown as a table too.
    """
    title = title or _class_name(_read_json(Path(folder) / "config.json"))
    _write(Path(folder), ModelDescription(name=title, title=title, summary=text, results=list(results)), PLACEHOLDER)


def _write(folder: Path, description: ModelDescription, model_id: str | None) -> Path:
    config, extractor = (_read_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
    try:
        card = build_model_card(config, extractor, description, model_id)
    except CardError as error:
        raise CardError(f"{folder}: {error}") from error
    except KeyError as error:
        raise CardError(
            f"{folder}: config.json or preprocessor_config.json lacks {error}: save model and feature extractor there"
        ) from error
    path = folder / "README.md"
    write_text(path, card)
    return path


def public_name(model: str) -> str:
    """What a card calls a model: a Hub id as it is, a folder without where on this machine it lies."""
    return Path(model).resolve().name if Path(model).exists() else model


def _class_name(config: dict[str, Any]) -> str:
    match config.get("architectures"):
        case [str(kind), *_]:
            return kind
        case other:
            raise CardError(f"config.json has architectures={other!r}, but a list with the model's class is expected: save the model again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, DamagedFileError) as error:
        raise CardError(f"{path} cannot be read ({error}): save model and feature extractor there first") from error


__all__ = [
    "CardError",
    "ModelDescription",
    "ReportedResult",
    "build_model_card",
    "generate_model_card",
    "is_description",
    "public_name",
    "read_description",
    "write_model_card",
]
