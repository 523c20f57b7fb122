"""Encoder, classifier or event detector as an ONNX file for any batch and length, compared with torch before it is kept.

```python
export_onnx("sslam-base-as2m", "sslam-base-as2m-onnx")  # model.onnx, config.json, preprocessor_config.json

session = onnxruntime.InferenceSession("sslam-base-as2m-onnx/model.onnx")
inputs = AutoFeatureExtractor.from_pretrained("sslam-base-as2m-onnx")(waveform, sampling_rate=16_000, return_tensors="np")
(logits,) = session.run(None, dict(inputs))
```
"""

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxscript  # noqa: F401  (torch.onnx.export would miss it only after the model was loaded)
import torch
from torch import nn
from transformers import PreTrainedConfig

from ..configuration_sslam import SSLAMConfig
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import check_free, read_json, write_folder_atomically
from ..modeling_sslam import SSLAMForAudioClassification, SSLAMModel, SSLAMPreTrainedModel
from ..modeling_sslam_frames import SSLAMForAudioFrameClassification
from ..settings import setting
from .conversion import resolve_model
from .quantization import COMPARISON, QuantizationSettings, comparison_table, write_int8


OPSETS = range(18, 24)  # what torch's exporter writes; from 23 on attention is one operator
TOLERANCE = 1e-4  # largest difference from torch, relative to the largest value of the output
OUTPUTS: dict[type[SSLAMPreTrainedModel], list[str]] = {
    SSLAMModel: ["last_hidden_state", "pooler_output"],
    SSLAMForAudioClassification: ["logits"],
    SSLAMForAudioFrameClassification: ["logits", "clip_logits"],
}


class ExportError(UserError):
    """A model cannot be exported. Nothing is written then."""


@dataclass(kw_only=True)
class ExportSettings(QuantizationSettings):
    """Export to ONNX"""

    model: str = setting("SSLAM model with its feature extractor: a folder, a Hub id, or an official checkpoint")
    output_dir: str = setting("folder for model.onnx and the configuration of its input, new or empty")
    with_mask: bool = setting("give the graph a second input, a mask over frames, for padded clips", False)
    encoder_only: bool = setting("leave out the head of a classifier or event detector: embeddings instead of logits", False)
    opset: int = setting("version of the ONNX operators, 18 to 23", 20)

    def __post_init__(self):
        super().__post_init__()
        if self.encoder_only and self.evaluate_data is not None:
            raise UserError("encoder_only is true, but evaluate_data needs the head of a classifier: leave one out")


def run(settings: ExportSettings) -> None:
    """Export, and print differences from torch and sizes of files; with `int8` also what that costs and gains."""
    options: dict[str, Any] = {"with_mask": settings.with_mask, "encoder_only": settings.encoder_only, "opset": settings.opset}
    folder = Path(settings.output_dir)
    differences = export_onnx(resolve_model(settings.model), folder, quantization=settings, **options)
    for (batch, frames), difference in differences.items():
        print(f"{batch} x {frames:>4} frames: ONNX Runtime differs from torch by {difference:.1e} of the largest value")
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size:>13,} bytes  {file}")
    if settings.evaluate_data is not None:
        print("\n" + comparison_table(read_json(folder / COMPARISON)))


class ModelToExport(nn.Module):
    """Log-mels, and optionally a mask over frames, to the named outputs, in their order."""

    def __init__(self, model: SSLAMPreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        outputs = self.model(input_values=input_values, attention_mask=attention_mask)
        return tuple(outputs[name] for name in OUTPUTS[type(self.model)])


def export_onnx(
    model: str | Path,
    output_dir: str | Path,
    *,
    with_mask: bool = False,
    encoder_only: bool = False,
    opset: int = 20,
    quantization: QuantizationSettings | None = None,
) -> dict[tuple[int, int], float]:
    """Export a saved model to `output_dir/model.onnx`, in float32, and compare it with torch.

    The graph takes `input_values`, `(batch, frames, num_mel_bins)`, float32, as the feature extractor makes them, and with `with_mask`
    also `attention_mask`, `(batch, frames)`, int32, 1 for sound and 0 for padding. `batch` is free, `frames` any multiple of the patch
    size up to the model's `max_length`; ONNX Runtime rejects others. A classifier gives `logits`, `(batch, num_labels)`, an
    event detector `logits`, `(batch, steps, num_labels)`, and `clip_logits`, `(batch, num_labels)`, an encoder `last_hidden_state` and
    `pooler_output`, see [`SSLAMModelOutput`]. Metadata describe the input.

    Weights of more than 1.5 GiB lie in a second file, `model.onnx.data`, as Protobuf ends at 2 GB.

    Args:
        model: folder or Hub id of a SSLAM model (of a pre-training checkpoint the encoder) and its feature extractor.
        output_dir: new or empty.
        with_mask: take a mask over frames too. The published models were trained without one.
        encoder_only: leave out a classifier's or detector's head.
        opset: of ONNX, 18 to 23.
        quantization: whether to write a graph in int8 as well, see [`write_int8`].

    Returns:
        `{(batch, frames): difference}` for each input that was tried: the largest difference between ONNX Runtime on the CPU and torch,
        relative to the output's largest absolute value.

    Raises:
        UserError: if `output_dir` is not free, or int8 cannot be calibrated or evaluated.
        ExportError: if there is no such model, `output_dir` cannot be written, or a difference reaches 1e-4.
    """
    output_dir = check_free(output_dir)
    if opset not in OPSETS:
        raise ExportError(f"opset is {opset}, but must be {OPSETS[0]} to {OPSETS[-1]}")
    loaded, extractor = _load(str(model), encoder_only)
    try:
        with write_folder_atomically(output_dir) as folder:
            loaded.config.save_pretrained(folder)
            extractor.save_pretrained(folder)
            _write_graph(folder / "model.onnx", loaded, extractor, with_mask, opset)
            differences = _compare(folder / "model.onnx", loaded, with_mask, extractor.max_length)
            if quantization is not None and quantization.int8 is not None:
                write_int8(folder, loaded, extractor, quantization, with_mask)
    except OSError as error:
        raise ExportError(f"{output_dir} cannot be written ({error}): choose another place") from error
    return differences


def _load(name: str, encoder_only: bool) -> tuple[SSLAMPreTrainedModel, SSLAMFeatureExtractor]:
    """The model in float32 and eval mode, and the feature extractor that fits it."""
    with as_user_error(f"there is no SSLAM model with its feature extractor in {name}"):
        settings, _ = PreTrainedConfig.get_config_dict(name)
        if settings.get("model_type") != SSLAMConfig.model_type:
            raise ExportError(f"{name} is not a SSLAM model (model_type is {settings.get('model_type')!r}): give a saved or converted one")
        names = [] if encoder_only else settings.get("architectures") or []
        model_class: Any = next((cls for cls in OUTPUTS if cls.__name__ in names), SSLAMModel)
        extractor = SSLAMFeatureExtractor.from_pretrained(name)
        model, report = model_class.from_pretrained(
            name, dtype=torch.float32, attn_implementation="sdpa", return_dict=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    if wrong := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        raise ExportError(f"{name} lacks weights, such as {wrong[0]}, or has them in other shapes: save the whole model again")
    bins, patch, longest = model.config.num_mel_bins, model.config.patch_size, model.config.max_length
    if extractor.num_mel_bins != bins or extractor.max_length % patch or extractor.max_length > longest:
        raise ExportError(
            f"{name}: the feature extractor gives {extractor.max_length} frames of {extractor.num_mel_bins} mel bins, but the model takes "
            f"{bins} bins and a multiple of {patch} frames up to {longest}: save the model's extractor"
        )
    model.config.architectures = [model_class.__name__]
    return model.eval(), extractor


# --- the graph


def _write_graph(file: Path, model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, with_mask: bool, opset: int) -> None:
    config = model.config
    inputs = _example(config, batch=2, frames=min(4 * config.patch_size, config.max_length), with_mask=with_mask)
    axes, longest = {0: torch.export.Dim("batch", min=1)}, config.max_length // config.patch_size
    if longest > 1:  # otherwise there is only one length
        axes[1] = config.patch_size * torch.export.Dim("steps", min=1, max=longest)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports that torchvision is not installed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)  # input and mask share their axes
            program = torch.onnx.export(
                ModelToExport(model).eval(),
                kwargs=inputs,
                dynamic_shapes=dict.fromkeys(inputs, axes),
                output_names=OUTPUTS[type(model)],
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None  # only other exporters return nothing
    program.model.doc_string = _description(config, extractor, with_mask)
    program.model.metadata_props.update(_metadata(model, extractor))
    program.save(file, external_data=False)


def _metadata(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor) -> dict[str, str]:
    """For programs that have only the file: numbers as Python prints them, names of classes as JSON."""
    config = model.config
    metadata = {
        "model_class": type(model).__name__,
        **{name: getattr(extractor, name) for name in ("sampling_rate", "num_mel_bins", "mean", "std", "padding_value", "max_length")},
        "do_normalize": json.dumps(extractor.do_normalize),
        "longest_input": config.max_length,
        "patch_size": config.patch_size,
    }
    if isinstance(model, SSLAMForAudioClassification):
        metadata["problem_type"] = config.problem_type or "unknown"
    if isinstance(model, SSLAMForAudioFrameClassification):
        metadata["steps_per_second"] = config.steps_per_second
        metadata["event_detection"] = json.dumps(config.event_detection or {}, ensure_ascii=False)
    if not isinstance(model, SSLAMModel):
        metadata["id2label"] = json.dumps(config.id2label, ensure_ascii=False)
    return {name: str(value) for name, value in metadata.items()}


def _description(config: SSLAMConfig, extractor: SSLAMFeatureExtractor, with_mask: bool) -> str:
    scaled = ", then scaled to (x - mean) / (2 * std)" if extractor.do_normalize else ""
    mask = " attention_mask: 1 where a frame is sound, 0 where it is padding." if with_mask else ""
    return (
        f"input_values: Kaldi log-mels of mono audio at {extractor.sampling_rate} Hz in [-1, 1], its mean subtracted (Hann windows of 25 "
        f"ms every 10 ms, {extractor.num_mel_bins} bins), padded with padding_value or cut to max_length frames{scaled}. Any multiple of "
        f"{config.patch_size} frames up to {config.max_length}.{mask} logits of a classifier: before softmax "
        "(single_label_classification) or sigmoid (multi_label_classification). logits of an event detector, one for each step and class, "
        "and its clip_logits: before sigmoid; step j begins at j / steps_per_second."
    )


# --- checking


def _example(config: SSLAMConfig, batch: int, frames: int, with_mask: bool) -> dict[str, torch.Tensor]:
    """Random log-mels, always the same; with a mask, each clip after the first ends earlier, also within a patch."""
    generator = torch.Generator().manual_seed(batch * frames)
    inputs = {"input_values": torch.randn(batch, frames, config.num_mel_bins, generator=generator)}
    if with_mask:
        lengths = frames - torch.arange(batch)[:, None] * (frames // (batch + 1) + 1)
        inputs["attention_mask"] = (torch.arange(frames) < lengths).to(torch.int32)
    return inputs


def _compare(file: Path, model: SSLAMPreTrainedModel, with_mask: bool, usual_length: int) -> dict[tuple[int, int], float]:
    """Differences from torch on batches and lengths that the exporter did not see, the shortest and the usual one among them.

    Not on the longest, where attention may take 20 GB (a position table of two minutes).
    """
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names, patch = OUTPUTS[type(model)], model.config.patch_size
    differences = {}
    for batch, frames in ((1, patch), (3, 5 * patch), (5, 9 * patch), (2, usual_length)):
        frames = min(frames, model.config.max_length)
        inputs = _example(model.config, batch, frames, with_mask)
        actual = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        with torch.inference_mode():
            outputs = model(**inputs)
        difference = float(np.max([_difference(values, outputs[name].numpy()) for name, values in zip(names, actual)]))  # NaN, if one is
        if not difference < TOLERANCE:
            raise ExportError(
                f"ONNX Runtime and torch differ by {difference:.1e} of the largest value on {batch} x {frames} frames, but by less than "
                f"{TOLERANCE:g} is expected: try another opset or onnxruntime"
            )
        differences[batch, frames] = difference
    return differences


def _difference(actual: np.ndarray, expected: np.ndarray) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0))
