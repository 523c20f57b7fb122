"""Encoder or classifier as an ONNX file, for ONNX Runtime in any language: any batch, any length, compared with torch before it is kept.

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig

from .configuration_sslam import SSLAMConfig
from .feature_extraction_sslam import SSLAMFeatureExtractor
from .files import write_folder_atomically
from .modeling_sslam import SSLAMForAudioClassification, SSLAMModel, SSLAMPreTrainedModel


try:
    import onnxruntime
    import onnxscript  # noqa: F401  (torch.onnx.export needs it, and would say so only after the model was loaded)
except ImportError as error:
    raise ImportError('ONNX export needs onnx, onnxscript and onnxruntime: pip install "transformers-sslam[onnx]"') from error

OPSETS = range(18, 24)  # what torch's exporter writes; from 23 on attention is one operator
TOLERANCE = 1e-4  # largest difference from torch, relative to the largest value of the output
OUTPUTS: dict[type[SSLAMPreTrainedModel], list[str]] = {
    SSLAMModel: ["last_hidden_state", "pooler_output"],
    SSLAMForAudioClassification: ["logits"],
}


class ExportError(ValueError):
    """A model cannot be exported; the message says which, why, and what to do. Nothing is written then."""


class ModelToExport(nn.Module):
    """Log-mels, and perhaps a mask over frames, to the named outputs, in their order.

    Frames that are no whole number of patches ONNX Runtime refuses by itself, where the graph cuts them into patches.
    """

    def __init__(self, model: SSLAMPreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        outputs = self.model(input_values=input_values, attention_mask=attention_mask)
        return tuple(outputs[name] for name in OUTPUTS[type(self.model)])


def export_onnx(
    model: str | Path, output_dir: str | Path, *, with_mask: bool = False, encoder_only: bool = False, opset: int = 20
) -> dict[tuple[int, int], float]:
    """Export a saved model to `output_dir/model.onnx`, in float32, and compare it with torch.

    The graph takes `input_values`, `(batch, frames, num_mel_bins)`, float32, as the feature extractor makes them, and with `with_mask`
    also `attention_mask`, `(batch, frames)`, int32, 1 for sound and 0 for padding. `batch` is free, `frames` any multiple of the patch
    size up to the model's `max_length`; ONNX Runtime refuses others. A classifier gives `logits`, `(batch, num_labels)`, an encoder
    `last_hidden_state` and `pooler_output`, see [`SSLAMModelOutput`]. What to feed stands in the file's metadata too.

    Files are written to a temporary folder beside `output_dir`, run there by ONNX Runtime on inputs of several batch sizes and lengths, and
    only then moved into place. Weights of more than 1.5 GiB lie in a second file, `model.onnx.data`, as Protobuf ends at 2 GB.

    Args:
        model: folder or Hub id of a SSLAM model and its feature extractor. Of a pre-training checkpoint the encoder is exported.
        output_dir: a folder that does not exist yet or is empty.
        with_mask: whether the graph takes a mask over frames. The published models were trained without one.
        encoder_only: whether to export a classifier's encoder and leave the head out.
        opset: version of the ONNX operators, 18 to 23.

    Returns:
        `{(batch, frames): difference}`: the largest difference between ONNX Runtime on the CPU and torch over all outputs, each relative to
        the output's largest absolute value, for each input that was tried.

    Raises:
        ExportError: (a `ValueError`) if there is no such model, `output_dir` is taken or cannot be written, or a difference reaches 1e-4.
    """
    output_dir = Path(output_dir).resolve()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ExportError(f"{output_dir} exists and is not an empty folder: choose another place, nothing is overwritten")
    if opset not in OPSETS:
        raise ExportError(f"opset is {opset}, but {OPSETS[0]} to {OPSETS[-1]} can be written: leave it out for 20")
    loaded, extractor = _load(str(model), encoder_only)
    try:
        with write_folder_atomically(output_dir) as folder:
            loaded.config.save_pretrained(folder)
            extractor.save_pretrained(folder)
            _write_graph(folder / "model.onnx", loaded, extractor, with_mask, opset)
            differences = _compare(folder / "model.onnx", loaded, with_mask, extractor.max_length)
    except OSError as error:
        raise ExportError(f"{output_dir} cannot be written ({error}): choose another place") from error
    return differences


def _load(name: str, encoder_only: bool) -> tuple[SSLAMPreTrainedModel, SSLAMFeatureExtractor]:
    """The model in float32, ready for inference, and its feature extractor, which must fit each other."""
    try:
        settings, _ = PreTrainedConfig.get_config_dict(name)
        if settings.get("model_type") != SSLAMConfig.model_type:
            raise ExportError(
                f"{name} is no SSLAM model (its model_type is {settings.get('model_type')!r}): give what this package saved or converted"
            )
        is_classifier = "SSLAMForAudioClassification" in (settings.get("architectures") or [])
        model_class = SSLAMForAudioClassification if is_classifier and not encoder_only else SSLAMModel
        extractor = SSLAMFeatureExtractor.from_pretrained(name)
        model, report = model_class.from_pretrained(  # type: ignore[misc]  # a pair, with output_loading_info
            name, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except ExportError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ExportError(f"there is no SSLAM model with its feature extractor in {name} ({' '.join(str(error).split())})") from error
    if report["missing_keys"]:
        raise ExportError(f"{name} lacks weights, such as {sorted(report['missing_keys'])[0]}: save the whole model again")
    bins, patch, longest = model.config.num_mel_bins, model.config.patch_size, model.config.max_length
    if extractor.num_mel_bins != bins or extractor.max_length % patch or extractor.max_length > longest:
        raise ExportError(
            f"{name}: the feature extractor gives {extractor.max_length} frames of {extractor.num_mel_bins} mel bins, but the model hears "
            f"{bins} bins and a multiple of {patch} frames up to {longest}: save the extractor that belongs to the model"
        )
    model.config.architectures = [model_class.__name__]
    return model.eval(), extractor


# --- the graph


def _write_graph(file: Path, model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, with_mask: bool, opset: int) -> None:
    config = model.config
    inputs = _example(config, batch=2, frames=min(4 * config.patch_size, config.max_length), with_mask=with_mask)
    batch, steps = torch.export.Dim("batch", min=1), torch.export.Dim("steps", min=1, max=config.max_length // config.patch_size)
    with _quiet():
        program = torch.onnx.export(
            ModelToExport(model).eval(),
            kwargs=inputs,
            dynamic_shapes={name: {0: batch, 1: config.patch_size * steps} for name in inputs},
            output_names=OUTPUTS[type(model)],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only other exporters return nothing
    program.model.doc_string = _description(config, extractor, with_mask)
    program.model.metadata_props.update(_metadata(model, extractor))
    program.save(file, external_data=False)


def _metadata(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor) -> dict[str, str]:
    """What a program needs to know that has nothing but the file. Numbers as Python prints them, names of classes as JSON."""
    config = model.config
    metadata = {
        "model_class": type(model).__name__,
        "sampling_rate": extractor.sampling_rate,
        "num_mel_bins": extractor.num_mel_bins,
        "do_normalize": json.dumps(extractor.do_normalize),
        "mean": extractor.mean,
        "std": extractor.std,
        "padding_value": extractor.padding_value,
        "max_length": extractor.max_length,
        "longest_input": config.max_length,
        "patch_size": config.patch_size,
    }
    if isinstance(model, SSLAMForAudioClassification):
        metadata["problem_type"] = config.problem_type or "unknown"
        metadata["id2label"] = json.dumps(config.id2label, ensure_ascii=False)
    return {name: str(value) for name, value in metadata.items()}


def _description(config: SSLAMConfig, extractor: SSLAMFeatureExtractor, with_mask: bool) -> str:
    scaled = ", then scaled to (x - mean) / (2 * std)" if extractor.do_normalize else ""
    mask = " attention_mask: 1 where a frame is sound, 0 where it is padding." if with_mask else ""
    return (
        f"input_values: Kaldi log-mels of mono audio at {extractor.sampling_rate} Hz in [-1, 1], its mean subtracted (Hann windows of 25 "
        f"ms every 10 ms, {extractor.num_mel_bins} bins), padded with padding_value or cut to max_length frames{scaled}. Any multiple of "
        f"{config.patch_size} frames up to {config.max_length} will do.{mask} logits, where there are any: before softmax "
        "(single_label_classification) or sigmoid (multi_label_classification)."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks that torchvision is absent and that input and mask share their axes: neither is the user's affair."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)


# --- checking


def _example(config: SSLAMConfig, batch: int, frames: int, with_mask: bool) -> dict[str, torch.Tensor]:
    """Random log-mels, always the same; with a mask, the first clip is whole, and each other one ends earlier, within a patch too."""
    generator = torch.Generator().manual_seed(batch * frames)
    inputs = {"input_values": torch.randn(batch, frames, config.num_mel_bins, generator=generator)}
    if with_mask:
        lengths = frames - torch.arange(batch)[:, None] * (frames // (batch + 1) + 1)
        inputs["attention_mask"] = (torch.arange(frames) < lengths).to(torch.int32)
    return inputs


def _compare(file: Path, model: SSLAMPreTrainedModel, with_mask: bool, usual_length: int) -> dict[tuple[int, int], float]:
    """Run the file on batches and lengths that the exporter did not see, the shortest and the usual one among them, and compare with torch.

    Not on the longest: attention's memory grows with its square, and for a position table of two minutes would take 20 GB.
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
                f"{TOLERANCE:g} is expected: try another opset, or other versions of onnxscript and onnxruntime"
            )
        differences[batch, frames] = difference
    return differences


def _difference(actual: np.ndarray, expected: np.ndarray) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0))


__all__ = ["ExportError", "export_onnx"]
