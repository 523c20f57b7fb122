"""An exported graph with 8-bit weights and activations, and what it costs in accuracy and gains in speed on labelled clips.

Only products with weights are computed in int8; attention, softmax, norms and GELU stay in float32. A weight matrix has a scale for each
of its columns. Activations are scaled anew for each input (`dynamic`), or by the largest values that calibration clips had (`static`).
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from tqdm.auto import tqdm

from ..audio.labelled_data import LabelledDataSettings
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import write_json
from ..modeling_sslam import SSLAMForAudioClassification, SSLAMPreTrainedModel
from ..reports import markdown_table
from ..settings import setting


INT8_FILE, COMPARISON = "model_int8.onnx", "comparison.json"
PRODUCTS = ["MatMul", "Gemm"]
QUANTILES = (0.05, 0.5, 0.95)
Inputs = dict[str, np.ndarray]
Int8 = Literal["dynamic", "static"]
TorchDtype = Literal["float32", "bfloat16"]


@dataclass(kw_only=True)
class QuantizationSettings:
    """Int8

    Raises:
        UserError: if a value is out of range, or has no effect.
    """

    int8: Int8 | None = setting(
        "also write model_int8.onnx; dynamic: activations are scaled anew for each input; static: as in calibration_data", None
    )
    calibration_data: list[str] = setting("recordings like those of later use, for static: files, folders, or lists of paths", [])
    calibration_clips: int = setting("number of these recordings that are used, from the beginning of each", 100)
    evaluate_data: LabelledDataSettings | None = setting("labelled clips to compare int8 with float32 on, for example its data_dir", None)
    evaluate_torch: list[TorchDtype] = setting("precisions of PyTorch to compare on these clips as well", [])
    num_threads: int | None = setting("cores that each model has in the comparison; null: all", None)

    def __post_init__(self):
        if (self.int8 == "static") != bool(self.calibration_data):
            raise UserError(
                f"int8 is {self.int8!r}, and calibration_data is {self.calibration_data}, but static needs recordings, and nothing else "
                "does: set both or neither"
            )
        if self.evaluate_data is not None and self.int8 is None:
            raise UserError(
                "evaluate_data is set, but int8 is null, so that there is nothing to compare: set int8, or use `sslam evaluate`"
            )
        if self.evaluate_data is None and (self.evaluate_torch or self.num_threads is not None):
            raise UserError("evaluate_torch or num_threads is set, but evaluate_data, which they need, is not: give labelled clips")
        for name in ("calibration_clips", "num_threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}, but must be positive")


def write_int8(
    folder: Path, model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, settings: QuantizationSettings, with_mask: bool
) -> None:
    """Write `model_int8.onnx` beside `model.onnx` and, with `evaluate_data`, what [`compare_on_clips`] returns as `comparison.json`.

    Args:
        folder: of the exported graph.
        model: the model that was exported, in float32.
        extractor: its feature extractor.
        settings: `int8` is not `None`.
        with_mask: whether the graph takes a mask.

    Raises:
        UserError: if calibration or evaluation data cannot be used.
    """
    if settings.evaluate_data is not None and not isinstance(model, SSLAMForAudioClassification):
        raise UserError(f"evaluate_data is set, but the model is a {type(model).__name__}, not a classifier of clips: leave it out")
    calibration: Iterable[Inputs] = ()
    if settings.int8 == "static":
        calibration = calibration_inputs(settings.calibration_data, settings.calibration_clips, extractor, with_mask)
    quantize(folder / "model.onnx", settings.int8, calibration)  # type: ignore[arg-type]  # not None here
    if settings.evaluate_data is not None and isinstance(model, SSLAMForAudioClassification):
        options: dict[str, Any] = {"num_threads": settings.num_threads, "torch_dtypes": settings.evaluate_torch}
        with as_user_error("evaluate_data cannot be used"):
            found = compare_on_clips(folder, model, extractor, settings.evaluate_data, with_mask=with_mask, **options)
        write_json(folder / COMPARISON, found)


def quantize(graph: Path, kind: Int8, calibration: Iterable[Inputs] = ()) -> Path:
    """Write `model_int8.onnx` beside a float32 graph.

    Args:
        graph: the file.
        kind: of the scales of activations.
        calibration: inputs of the graph, one clip each, which static scales are taken from.

    Returns:
        The path of the new file.
    """
    target = graph.with_name(INT8_FILE)
    options: dict[str, Any] = {"op_types_to_quantize": PRODUCTS, "per_channel": True, "weight_type": QuantType.QInt8}
    with _without_advice():
        if kind == "dynamic":
            quantize_dynamic(graph, target, **options)
        else:
            options["extra_options"] = {"MatMulConstBOnly": True}  # not the products of two activations in attention
            quantize_static(graph, target, _Reader(calibration), activation_type=QuantType.QUInt8, **options)
    return target


class _Reader(CalibrationDataReader):
    def __init__(self, inputs: Iterable[Inputs]):
        self._inputs = iter(inputs)

    def get_next(self) -> Inputs | None:
        return next(self._inputs, None)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without ONNX Runtime's warnings, on the root logger, that graphs should be simplified first: torch's exporter has done it."""

    def passes(record: logging.LogRecord) -> bool:
        return record.module != "quantize"

    logger = logging.getLogger()
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def calibration_inputs(recordings: list[str], number: int, extractor: SSLAMFeatureExtractor, with_mask: bool) -> Iterator[Inputs]:
    """Inputs of the graph from the beginnings of recordings, evenly spaced among them.

    Args:
        recordings: files, folders, or lists of paths.
        number: of recordings, at most.
        extractor: the model's.
        with_mask: whether the graph takes a mask.

    Raises:
        UserError: if there is no recording, or one of those chosen cannot be read.
    """
    from ..audio.cache import decode_clip
    from ..recordings.inputs import find_recordings

    paths = find_recordings(recordings)
    for i in np.linspace(0, len(paths) - 1, min(number, len(paths))).round().astype(int):
        with as_user_error("calibration_data cannot be used"):
            waveform = decode_clip({"path": paths[i], "bytes": None}, extractor.sampling_rate)
        yield _inputs(extractor, waveform, with_mask)


def _inputs(extractor: SSLAMFeatureExtractor, waveform: np.ndarray, with_mask: bool) -> Inputs:
    options: dict[str, Any] = {"sampling_rate": extractor.sampling_rate, "return_attention_mask": with_mask, "return_tensors": "np"}
    return dict(extractor(waveform, **options))


# --- what it costs and gains


@torch.inference_mode()
def compare(runners: dict[str, Callable[[Inputs], np.ndarray]], clips: Iterable[Inputs]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Logits and seconds of several runners on each clip, one directly after the other and in turns in both orders, so that what else the
    machine does slows all of them.

    Returns:
        Logits by name, `(clips, classes)`, and seconds, `(clips, runners)`.
    """
    logits: dict[str, list[np.ndarray]] = {name: [] for name in runners}
    seconds: list[list[float]] = []
    for i, inputs in enumerate(clips):
        if i == 0:  # the first run of each allocates memory
            for run in runners.values():
                run(inputs)
        took = {}
        for name in list(runners)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            logits[name].append(runners[name](inputs))
            took[name] = time.perf_counter() - start
        seconds.append([took[name] for name in runners])
    return {name: np.concatenate(values) for name, values in logits.items()}, np.array(seconds)


def compare_on_clips(
    folder: Path,
    model: SSLAMForAudioClassification,
    extractor: SSLAMFeatureExtractor,
    data: LabelledDataSettings,
    *,
    with_mask: bool,
    num_threads: int | None = None,
    torch_dtypes: Sequence[TorchDtype] = (),
) -> dict[str, Any]:
    """Accuracy, or mean average precision where clips have several labels, and speed of the graphs in a folder on labelled clips.

    Args:
        folder: with `model.onnx` and `model_int8.onnx`.
        model: the classifier that was exported, in float32.
        extractor: its feature extractor.
        data: the clips.
        with_mask: whether the graphs take a mask.
        num_threads: of each of them; by default as many as there are cores.
        torch_dtypes: precisions of PyTorch to compare as well, the encoder under autocast.

    Returns:
        Number of `clips`, `num_threads`, and for each of `models` its metrics with intervals over clips, and, against float32 in ONNX
        Runtime, the `agreement` of the classes with the highest logits and, as medians with 5 % and 95 % quantiles over clips, `seconds` a
        clip and `speedup`.

    Raises:
        UserError: if the clips cannot be read, have no labels, or have other labels than the model's classes.
    """
    from ..evaluation.intervals import proportion_interval
    from ..evaluation.scores import evaluate_predictions
    from ..evaluation.settings import class_names, open_labelled, select_rows

    classes = class_names(model, "the model")
    rows, waveforms, targets = open_labelled(select_rows(data), data, classes, extractor.sampling_rate)

    def in_torch(dtype: TorchDtype) -> Callable[[Inputs], np.ndarray]:
        def run(inputs: Inputs) -> np.ndarray:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                return model(**{name: torch.from_numpy(values) for name, values in inputs.items()}).logits.float().numpy()

        return run

    def in_onnx_runtime(file: str) -> Callable[[Inputs], np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0  # all cores
        session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(["logits"], inputs)[0]

    runners = {"ONNX Runtime, float32": in_onnx_runtime("model.onnx"), "ONNX Runtime, int8": in_onnx_runtime(INT8_FILE)}
    runners |= {f"PyTorch, {dtype}": in_torch(dtype) for dtype in torch_dtypes}
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads or threads)
    try:
        clips = (_inputs(extractor, waveform, with_mask) for waveform in tqdm(waveforms, total=len(rows), desc="comparing", unit="clip"))
        logits, seconds = compare(runners, clips)
    finally:
        torch.set_num_threads(threads)
    models = {}
    for i, (name, found) in enumerate(logits.items()):
        same = int((found.argmax(1) == logits["ONNX Runtime, float32"].argmax(1)).sum())
        models[name] = {
            "metrics": evaluate_predictions(found, targets, classes, rows.labels.multi_label),
            "agreement": same / len(rows),
            "agreement_interval": proportion_interval(same, len(rows)),
            "seconds": np.quantile(seconds[:, i], QUANTILES).tolist(),
            "speedup": np.quantile(seconds[:, 0] / seconds[:, i], QUANTILES).tolist(),
        }
    return {"clips": len(rows), "num_threads": num_threads, "models": models}


def comparison_table(comparison: dict[str, Any]) -> str:
    """What [`compare_on_clips`] returned, as a Markdown table."""

    def cell(value: float, interval: Sequence[float]) -> str:
        return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"

    rows = []
    for name, found in comparison["models"].items():
        metric = next(iter(found["metrics"]))
        quality = cell(found["metrics"][metric], found["metrics"][f"{metric}_interval"])
        agreement = cell(found["agreement"], found["agreement_interval"])
        spread = [cell(middle, (low, high)) for low, middle, high in (found["seconds"], found["speedup"])]
        rows.append([name, quality, agreement, *spread])
    title = metric.replace("_", " ")
    return markdown_table([f"{comparison['clips']} clips", title, "top-1 agreement", "seconds a clip [5 %, 95 %]", "speed-up"], rows)
