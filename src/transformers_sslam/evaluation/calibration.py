"""Calibration of scores: a temperature that fits them to frequencies, and what tells how well they do.

```python
temperature = fit_temperature(logits, targets, exclusive=True)  # logits / temperature have the lowest log loss on these clips
measure_calibration(logits / temperature, targets, exclusive=True)["expected_calibration_error"]
```

A calibrated model has its head's weights and bias divided by the temperature. So every program that takes its logits has calibrated scores:
pipelines of Transformers, ONNX, `sslam tag`. A temperature in the configuration would be known to this package alone.
"""

import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, logit, softmax
from torch import nn

from ..audio.events import UNKNOWN
from ..configuration_sslam import SSLAMConfig
from ..errors import UserError, as_user_error
from ..events_sslam import EventSettings
from ..files import read_json, write_atomically, write_json, write_text
from ..publishing.cards import public_name
from ..reports import markdown_table, new_figure, replace_picture
from .settings import EvaluationSettings


if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

BINS = 15  # of equal width, as in Guo et al. (2017)
DIAGRAM = "reliability.png"
WEIGHTS, SECTION = "model.safetensors", "## Calibration"
MEASURES = {"log_loss": "log loss", "expected_calibration_error": "expected calibration error", "brier_score": "Brier score"}


class Calibrator:
    """What an evaluation does about calibration: measure it, draw it and, with `settings.calibrate`, calibrate the evaluated model.

    Args:
        settings: of the evaluation.
        head: the linear layer whose weights and bias a temperature divides.

    Raises:
        UserError: if `calibrate` is set, and the model is not one that could be changed.
    """

    def __init__(self, settings: EvaluationSettings, head: str):
        self.settings, self.head = settings, head
        self.fitted: dict[str, Any] = {}
        if settings.calibrate:
            check_can_be_calibrated(settings.model, head)

    def fit(self, logits: np.ndarray, targets: np.ndarray, exclusive: bool) -> float:
        """The temperature that the logits are to be divided by before [`measure`]. Arguments and errors as of [`fit_temperature`]."""
        temperature = fit_temperature(logits, targets, exclusive)
        self.fitted = {"temperature": temperature, "before": measure_calibration(logits, targets, exclusive)}
        return temperature

    def measure(self, logits: np.ndarray, targets: np.ndarray, exclusive: bool) -> dict[str, Any]:
        """What [`measure_calibration`] returns, drawn as `reliability.png` too; after [`fit`] with `temperature`, and the same `before`."""
        calibration = measure_calibration(logits, targets, exclusive) | self.fitted
        replace_diagram(Path(self.settings.output_dir), calibration)
        return calibration

    def write(self, calibration: Mapping[str, Any], clips: int) -> None:
        """Calibrate the model in its folder, if that was asked for: what [`measure`] returned, of so many clips."""
        if self.settings.calibrate:
            description = describe_calibration(calibration, clips, public_name(self.settings.data_dir))
            write_calibration(Path(self.settings.model), self.head, calibration["temperature"], description)


def report_calibration(calibration: Mapping[str, Any], settings: EvaluationSettings) -> None:
    """Print the table of what [`Calibrator.measure`] returned, where the diagram is, and what was changed."""
    print("\n" + calibration_table(calibration))
    if (diagram := Path(settings.output_dir) / DIAGRAM).exists():
        print(f"\nreliability diagram: {diagram}")
    if settings.calibrate:
        where = f"{Path(settings.model) / WEIGHTS}, and config.json there"
        print(f"\nwritten into {where}. These clips fitted it, so they are no longer a test: evaluate on others")


def fit_temperature(logits: np.ndarray, targets: np.ndarray, exclusive: bool) -> float:
    """The temperature of the lowest log loss (temperature scaling, Guo et al., ICML 2017, arXiv 1706.04599).

    The log loss is a convex function of the inverse temperature, so the root of its derivative, found to rounding, is the only minimum.

    Args:
        logits: `(n, classes)`, of clips or of time steps.
        targets: `(n, classes)`, in [0, 1]; of exclusive classes one is 1, of others those that are unknown, and left out, are -100.
        exclusive: whether scores are a softmax over classes; otherwise each is a sigmoid.

    Raises:
        UserError: if there is no minimum: scores are no better than chance, separate the clips without an error, or are a softmax of one
            class.
    """
    z, y = _known(logits, targets, exclusive)
    if exclusive and z.shape[1] == 1:
        raise UserError("calibrate is set, but a softmax of one class is always 1, so no temperature changes it: leave calibrate out")

    def slope(inverse: float) -> float:
        found = softmax(inverse * z, axis=1) if exclusive else expit(inverse * z)
        return float(((found - y) * z).sum() / len(logits))

    if slope(0.0) >= 0:
        raise UserError("calibrate is set, but on these clips the scores are no better than chance, so no temperature helps: train longer")
    limit = z.max(1) - (y * z).sum(1) if exclusive else np.maximum(z, 0) - y * z  # of the slope, for a temperature that goes to 0
    if not limit.any():
        raise UserError(
            "calibrate is set, but the scores separate these clips without an error, so that a lower temperature is always better: "
            "calibrate on more clips, none of which the model was trained on"
        )
    upper = 1.0
    while slope(upper) <= 0:
        upper *= 2
    return 1 / brentq(slope, 0.0, upper, xtol=1e-15, rtol=1e-14)


def measure_calibration(logits: np.ndarray, targets: np.ndarray, exclusive: bool) -> dict[str, Any]:
    """How well scores agree with frequencies.

    Of exclusive classes the confidence of a clip is the score of its highest class, and the outcome whether that is right. Otherwise each
    score of each clip, or time step, is one, and the outcome its target.

    Args:
        logits, targets, exclusive: as of [`fit_temperature`].

    Returns:
        `log_loss`, the mean over rows, or else over scores. `brier_score`, the mean squared difference of scores and targets, of exclusive
        classes summed over these (0 to 2). `expected_calibration_error`, the mean difference of confidence and frequency over 15 bins of
        equal width, weighted by what is in them. `reliability`, of each bin mean `confidence` and `frequency` (`None` if empty), and
        `count`.
    """
    z, y = _known(logits, targets, exclusive)
    if exclusive:
        found = softmax(z, axis=1)
        log_loss = -(y * log_softmax(z, axis=1)).sum(1).mean()
        brier = ((found - y) ** 2).sum(1).mean()
        confidence, outcome = found.max(1), y[np.arange(len(y)), found.argmax(1)]
    else:
        found = expit(z)
        log_loss = (np.logaddexp(0, z) - y * z).mean()
        brier = ((found - y) ** 2).mean()
        confidence, outcome = found, y
    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # bins are open below, closed above
    count, confidences, outcomes = (np.bincount(index, weights, BINS) for weights in (None, confidence, outcome))
    means = [(values / np.maximum(count, 1)).tolist() for values in (confidences, outcomes)]
    return {
        "log_loss": float(log_loss),
        "brier_score": float(brier),
        "expected_calibration_error": float(np.abs(confidences - outcomes).sum() / len(confidence)),
        "reliability": [
            {"confidence": c if n else None, "frequency": f if n else None, "count": int(n)} for c, f, n in zip(*means, count.tolist())
        ],
    }


def _known(logits: np.ndarray, targets: np.ndarray, exclusive: bool) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, `(n, classes)`; unless classes are exclusive, where the target is known, `(scores,)`."""
    z, y = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    return (z, y) if exclusive else (z[y != UNKNOWN], y[y != UNKNOWN])


def as_logits(scores: np.ndarray) -> np.ndarray:
    """The logits of float32 scores in [0, 1], whose digits end at 2^-24 from 1."""
    return logit(np.clip(np.asarray(scores, np.float64), 2.0**-24, 1 - 2.0**-24))


def calibrated_thresholds(event_detection: Mapping[str, Any] | None, temperature: float) -> dict[str, Any] | None:
    """`config.event_detection` whose thresholds find the same steps in calibrated scores as they did before: a score that was above `t` is
    now above `sigmoid(logit(t) / temperature)`."""

    def mapped(threshold: Any) -> Any:
        if isinstance(threshold, Mapping):
            return {label: mapped(one) for label, one in threshold.items()}
        return None if threshold is None else float(expit(logit(threshold) / temperature))

    if event_detection is None:
        return None
    return {name: mapped(value) if name.endswith("threshold") else value for name, value in event_detection.items()}


def scale_head(model: nn.Module, head: str, temperature: float) -> None:
    """Divide the weights and the bias of the linear layer `head`, and thresholds of events, in a model that is loaded."""
    with torch.no_grad():
        for weights in model.get_submodule(head).parameters():
            weights.div_(temperature)
    config: Any = model.config
    config.event_detection = calibrated_thresholds(config.event_detection, temperature)


def check_can_be_calibrated(folder: str | Path, head: str) -> None:
    """Raise a `UserError` unless a model in one file lies in this folder, where it can be changed."""
    missing = [name for name in ("config.json", WEIGHTS) if not (Path(folder) / name).is_file()]
    if missing:
        raise UserError(f"calibrate is set, but model {folder} is not a folder whose {missing[0]} could be changed: save it in one first")
    with safetensors.safe_open(Path(folder) / WEIGHTS, "pt") as file:
        if f"{head}.weight" not in file.keys():  # noqa: SIM118  # not a dictionary
            raise UserError(f"calibrate is set, but {Path(folder) / WEIGHTS} has no {head}.weight: save the model itself there")


def write_calibration(folder: Path, head: str, temperature: float, description: str) -> None:
    """Divide the head's weights and bias in `model.safetensors`; write the temperature, times that of an earlier calibration, and the
    thresholds of events into `config.json`, and a section into the card, if there is one.

    The weights come first: an interruption leaves a model that is calibrated but does not say so, and a calibration of it changes nothing.
    """
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    for name in (f"{head}.weight", f"{head}.bias"):
        tensors[name] = (tensors[name].float() / temperature).to(tensors[name].dtype)
    config = read_json(folder / "config.json")
    former = config.get("calibration") or {}
    config["calibration"] = {"temperature": former.get("temperature", 1.0) * temperature}
    if config.get("event_detection"):
        config["event_detection"] = calibrated_thresholds(config["event_detection"], temperature)
    with as_user_error(f"{folder / 'config.json'} cannot hold the calibration"):
        EventSettings.of(SSLAMConfig.from_dict(config))
    with write_atomically(folder / WEIGHTS, "wb") as opened:
        opened.write(save(tensors, metadata))
    write_json(folder / "config.json", config, sort_keys=True)  # as Transformers writes it
    if (folder / "README.md").is_file():
        card = (folder / "README.md").read_text(encoding="utf-8")
        card = re.sub(rf"^{SECTION}\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL).rstrip()
        write_text(folder / "README.md", f"{card}\n\n{SECTION}\n\n{description}\n")


def describe_calibration(calibration: Mapping[str, Any], clips: int, data: str) -> str:
    """A paragraph for the card."""
    before, changes = calibration["before"], []
    for name in ("expected_calibration_error", "brier_score"):
        changes.append(f"{MEASURES[name]} {before[name]:.4f} before, {calibration[name]:.4f} after")
    return (
        f"The weights and the bias of the last layer are divided by a temperature of {calibration['temperature']:.4g}, so that scores fit "
        f"frequencies on {clips} clips of `{data}`: {'; '.join(changes)}."
    )


def calibration_table(calibration: Mapping[str, Any]) -> str:
    """A Markdown table of what [`measure_calibration`] returned, with `before`, that of the scores before the calibration, if there is."""
    before = calibration.get("before")
    rows = [[title, *([f"{before[name]:.4f}"] if before else []), f"{calibration[name]:.4f}"] for name, title in MEASURES.items()]
    return markdown_table(["calibration", *(["before", "after"] if before else ["value"])], rows)


def replace_diagram(folder: Path, calibration: Mapping[str, Any]) -> None:
    """Put `reliability.png` in place of that of an earlier evaluation, if there is a calibration."""
    replace_picture(folder / DIAGRAM, "reliability diagram", partial(plot_reliability, calibration) if calibration else None)


def plot_reliability(calibration: Mapping[str, Any]) -> "Figure":
    """Draw the frequency in each bin over its mean confidence, and below how many scores there are; also of `before`, if there is.

    Raises:
        ImportError: as [`new_figure`].
    """
    figure = new_figure(figsize=(5, 6.6))
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfectly calibrated")
    before = calibration.get("before")
    curves = [(before, "before", "tab:orange", "s")] if before else []
    edges = np.linspace(0, 1, BINS + 1)
    for measured, name, colour, marker in [*curves, (calibration, "after" if before else "scores", "tab:blue", "o")]:
        bins = [one for one in measured["reliability"] if one["count"]]
        label = f"{name}, expected calibration error {measured['expected_calibration_error']:.3f}"
        points = [[one[key] for one in bins] for key in ("confidence", "frequency")]
        upper.plot(*points, color=colour, marker=marker, markersize=5, label=label)
        lower.stairs([one["count"] for one in measured["reliability"]], edges, color=colour)
    upper.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="frequency")
    upper.grid(color="0.9")
    lower.set(xlabel="confidence", ylabel="number of scores", yscale="log", ylim=(0.7, None))
    lower.yaxis.set_major_formatter("{x:g}")
    lower.yaxis.set_minor_formatter("")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", fontsize=8)
    return figure
