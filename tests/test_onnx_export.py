"""ONNX export: ONNX Runtime gives torch's numbers on shapes that the exporter did not see, and a bad export leaves nothing."""

import contextlib
import io
import json
import logging
import re
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, noise, tiny_config
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification, SSLAMPreTrainedModel
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from transformers_sslam.publishing import onnx_export  # noqa: E402
from transformers_sslam.publishing.onnx_export import ExportError, export_onnx  # noqa: E402


ROOT = Path(__file__).parents[1]
SHAPES = [(1, 16), (1, 256), (7, 48), (4, 208)]  # the exporter traces 2 x 64 frames
CLASSES = ['a "dog"', "Käuzchen", "rain, heavy"]


@dataclass
class Exported:
    model: SSLAMPreTrainedModel
    source: Path
    folder: Path
    differences: dict = field(default_factory=dict)
    printed: str = ""
    remarks: list[str] = field(default_factory=list)

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        return onnxruntime.InferenceSession(self.folder / "model.onnx").run(None, inputs)


def save_classifier(folder: Path, pooling: str, **config) -> SSLAMForAudioClassification:
    return save(SSLAMForAudioClassification, folder, classifier_pooling=pooling, problem_type="multi_label_classification", **config)


def save(model_class: type[SSLAMPreTrainedModel], folder: Path, **config) -> SSLAMPreTrainedModel:
    """Random, and with weights so large that a wrong position, mask or pooling shows in the logits."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    sizes = {"num_hidden_layers": 1, "initializer_range": 0.3}
    model = model_class(tiny_config(**{**sizes, **labels, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    SSLAMFeatureExtractor.from_preset("esc50", max_length=128).save_pretrained(folder)
    return model.eval()


@contextlib.contextmanager
def noted(remarks: list[str]):
    """Collect what torch's exporter logs and what it warns of."""
    handler, logger = logging.Handler(), logging.getLogger("torch.onnx")
    handler.emit = lambda record: remarks.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        logger.removeHandler(handler)
    remarks += [str(warning.message) for warning in caught if not issubclass(warning.category, DeprecationWarning | FutureWarning)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Exported:
    """Mean pooling, a mask."""
    folder = tmp_path_factory.mktemp("classifier")
    exported = Exported(save_classifier(folder / "source", "mean", padding_value=0.618), folder / "source", folder / "new" / "onnx")
    with noted(exported.remarks):
        exported.differences = export_onnx(exported.source, exported.folder, with_mask=True)
    return exported


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Exported:
    """CLS pooling, no mask, the encoder of a classifier, by the command."""
    folder = tmp_path_factory.mktemp("encoder")
    exported = Exported(save_classifier(folder / "source", "cls"), folder / "source", folder / "onnx")
    words = ["export", "--model", str(exported.source), "--output_dir", str(exported.folder), "--encoder_only"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, noted(exported.remarks):
        assert main(words) == 0
    exported.printed = printed.getvalue()
    return exported


@pytest.fixture(scope="module", params=[6.25, 25], ids=["160 ms", "40 ms"])
def detector(request, tmp_path_factory) -> Exported:
    """Event detection, a mask, attention over frequency, steps weighted by their clip."""
    folder = tmp_path_factory.mktemp("detector")
    heads = {"steps_per_second": request.param, "frame_pooling": "attention", "clip_weighting": True}
    options = {**heads, "event_detection": {"threshold": {CLASSES[1]: 0.25}}}
    model = save(SSLAMForAudioFrameClassification, folder / "source", **options)
    exported = Exported(model, folder / "source", folder / "onnx")
    with noted(exported.remarks):
        exported.differences = export_onnx(exported.source, exported.folder, with_mask=True)
    return exported


def log_mels(batch: int, frames: int) -> torch.Tensor:
    return torch.randn(batch, frames, 128, generator=torch.Generator().manual_seed(7))


def mask_of(lengths: list[int], frames: int) -> torch.Tensor:
    return (torch.arange(frames) < torch.tensor(lengths)[:, None]).to(torch.int32)


def difference(actual: np.ndarray, expected: torch.Tensor) -> float:
    assert actual.shape == tuple(expected.shape)
    return float(np.abs(actual - expected.numpy()).max())


# --- torch's numbers; seen: differences of at most 8e-6, where logits and hidden states reach 4


@pytest.mark.parametrize(("batch", "frames"), SHAPES)
def test_the_classifier_gives_torchs_logits_for_padded_clips(classifier, batch, frames):
    inputs = {"input_values": log_mels(batch, frames), "attention_mask": mask_of([frames - 5 * i for i in range(batch)], frames)}
    (logits,) = classifier.run(**{name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.inference_mode():
        assert difference(logits, classifier.model(**inputs).logits) < 1e-4


@pytest.mark.parametrize(("batch", "frames"), SHAPES)
def test_the_detector_gives_torchs_logits_of_steps_and_clips(detector, batch, frames):
    inputs = {"input_values": log_mels(batch, frames), "attention_mask": mask_of([frames - 5 * i for i in range(batch)], frames)}
    logits, clip_logits = detector.run(**{name: tensor.numpy() for name, tensor in inputs.items()})
    assert logits.shape == (batch, frames // detector.model.config.frames_per_step, 3)
    with torch.inference_mode():
        expected = detector.model(**inputs)
    assert difference(logits, expected.logits) < 1e-4
    assert difference(clip_logits, expected.clip_logits) < 1e-4


def test_what_lies_in_the_padding_changes_nothing(classifier):
    """And the mask matters: another one gives other logits."""
    quiet, loud = log_mels(2, 96).numpy(), log_mels(2, 96).numpy()
    quiet[:, 40:], loud[:, 40:] = 0, 1e4
    (a,), (b,), (c,) = (
        classifier.run(input_values=values, attention_mask=mask_of([length] * 2, 96).numpy())
        for values, length in ((quiet, 40), (loud, 40), (quiet, 41))
    )
    assert np.abs(a - b).max() < 1e-5
    assert np.abs(a - c).max() > 1e-3


@pytest.mark.parametrize(("batch", "frames"), SHAPES)
def test_the_encoder_gives_torchs_tokens_and_their_pool(encoder, batch, frames):
    values = log_mels(batch, frames)
    hidden, pooled = encoder.run(input_values=values.numpy())
    with torch.inference_mode():
        expected = encoder.model.sslam(values)
    assert difference(hidden, expected.last_hidden_state) < 1e-4
    assert difference(pooled, expected.pooler_output) < 1e-4
    assert np.array_equal(pooled, hidden[:, 0])


def test_what_the_saved_feature_extractor_returns_can_be_fed_as_it_is(classifier):
    extractor = AutoFeatureExtractor.from_pretrained(classifier.folder)
    inputs = extractor([noise(0.7), noise(1.1, seed=1)], sampling_rate=16_000, return_attention_mask=True, return_tensors="np")
    assert inputs["input_values"].shape == (2, 128, 128)
    (logits,) = classifier.run(**inputs)
    with torch.inference_mode():
        expected = classifier.model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits
    assert difference(logits, expected) < 1e-4


@pytest.mark.parametrize("shape", [(2, 100, 128), (2, 272, 128), (2, 8, 128), (2, 64, 64)])
def test_lengths_and_bins_outside_the_models_range_are_rejected(encoder, shape):
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        encoder.run(input_values=np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize("shape", [(2, 48), (1, 64)])
def test_a_mask_of_another_shape_is_rejected(classifier, shape):
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        classifier.run(input_values=np.zeros((2, 64, 128), dtype=np.float32), attention_mask=np.ones(shape, dtype=np.int32))


def test_a_model_that_takes_one_length_alone_can_be_exported(tmp_path):
    save_classifier(tmp_path / "source", "cls", max_length=16)
    SSLAMFeatureExtractor(max_length=16).save_pretrained(tmp_path / "source")
    differences = export_onnx(tmp_path / "source", tmp_path / "onnx", with_mask=True)
    assert list(differences) == [(1, 16), (3, 16), (5, 16), (2, 16)]
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert [taken.shape for taken in session.get_inputs()] == [["batch", 16, 128], ["batch", 16]]


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("options", [{}, {"with_mask": True}, {"encoder_only": True}])
def test_the_model_that_comes_with_the_package_can_be_exported(tmp_path, options, opset):
    differences = export_onnx(ROOT / "model_cards" / "sslam-tiny-esc10", tmp_path / "onnx", opset=opset, **options)
    assert list(differences) == [(1, 16), (3, 80), (5, 144), (2, 512)]
    assert max(differences.values()) < 1e-5


# --- what is written


def test_the_file_says_what_to_feed_and_what_the_classes_are(classifier):
    model = onnx.load(classifier.folder / "model.onnx")
    onnx.checker.check_model(model)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata.pop("id2label")) == {"0": CLASSES[0], "1": CLASSES[1], "2": CLASSES[2]}
    assert metadata == {
        **{"model_class": "SSLAMForAudioClassification", "problem_type": "multi_label_classification"},
        **{"sampling_rate": "16000", "num_mel_bins": "128", "do_normalize": "true", "mean": "-6.627", "std": "5.359"},
        **{"padding_value": "0.0", "max_length": "128", "longest_input": "256", "patch_size": "16"},
    }
    assert "(x - mean) / (2 * std)" in model.doc_string
    assert "attention_mask" in model.doc_string
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    assert [node.name for node in model.graph.input] == ["input_values", "attention_mask"]
    assert [node.name for node in model.graph.output] == ["logits"]


def test_the_file_of_a_detector_says_when_steps_begin_and_how_they_become_events(detector):
    model = onnx.load(detector.folder / "model.onnx")
    onnx.checker.check_model(model)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["model_class"] == "SSLAMForAudioFrameClassification"
    assert float(metadata["steps_per_second"]) == detector.model.config.steps_per_second
    assert json.loads(metadata["event_detection"]) == {"threshold": {CLASSES[1]: 0.25}}
    assert list(json.loads(metadata["id2label"]).values()) == CLASSES
    assert "problem_type" not in metadata
    assert [node.name for node in model.graph.output] == ["logits", "clip_logits"]
    assert json.loads((detector.folder / "config.json").read_text())["architectures"] == ["SSLAMForAudioFrameClassification"]
    assert list(detector.differences) == [(1, 16), (3, 80), (5, 144), (2, 128)]
    assert 0 < max(detector.differences.values()) < 1e-5
    assert detector.remarks == []


def test_the_encoder_of_a_detector_can_be_exported(detector, tmp_path):
    export_onnx(detector.source, tmp_path / "onnx", encoder_only=True)
    values = log_mels(2, 48)
    (hidden, _) = Exported(detector.model, detector.source, tmp_path / "onnx").run(input_values=values.numpy())
    with torch.inference_mode():
        assert difference(hidden, detector.model.sslam(values).last_hidden_state) < 1e-4


def test_an_encoder_has_no_classes(encoder):
    model = onnx.load(encoder.folder / "model.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["model_class"] == "SSLAMModel"
    assert not {"id2label", "problem_type"} & metadata.keys()
    assert [node.name for node in model.graph.input] == ["input_values"]
    assert [node.name for node in model.graph.output] == ["last_hidden_state", "pooler_output"]
    assert json.loads((encoder.folder / "config.json").read_text())["architectures"] == ["SSLAMModel"]


def test_one_file_with_all_weights_and_two_that_describe_it(classifier):
    assert sorted(path.name for path in classifier.folder.iterdir()) == ["config.json", "model.onnx", "preprocessor_config.json"]
    assert [path.name for path in classifier.folder.parent.iterdir()] == ["onnx"]
    assert (classifier.folder / "model.onnx").stat().st_size > 4 * classifier.model.num_parameters()


def test_the_differences_are_those_of_several_shapes(classifier):
    assert list(classifier.differences) == [(1, 16), (3, 80), (5, 144), (2, 128)]
    assert 0 < max(classifier.differences.values()) < 1e-5


def test_nothing_is_logged_or_warned_of(classifier, encoder):
    assert classifier.remarks == []
    assert encoder.remarks == []


def test_the_command_prints_differences_and_sizes(encoder):
    *differences, config, graph, extractor = encoder.printed.splitlines()
    assert [line.split(" frames")[0] for line in differences] == ["1 x   16", "3 x   80", "5 x  144", "2 x  128"]
    assert graph.split() == [f"{(encoder.folder / 'model.onnx').stat().st_size:,}", "bytes", str(encoder.folder / "model.onnx")]
    assert config.endswith("/config.json")
    assert extractor.endswith("/preprocessor_config.json")


# --- what is rejected


@pytest.mark.parametrize(("factor", "said"), [(1.001, r"\d\.\de-03"), (float("nan"), "nan")])
def test_a_file_that_differs_from_the_model_leaves_nothing(classifier, tmp_path, monkeypatch, factor, said):
    """The file of one model, compared with a model that has one weight matrix a little larger."""
    shutil.copytree(classifier.source, tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    weights["classifier.weight"] *= factor
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(onnx_export, "_write_graph", lambda file, *_: shutil.copyfile(classifier.folder / "model.onnx", file))
    with pytest.raises(ExportError, match=f"differ by {said} of the largest value on 1 x 16 frames, but by less than 0.0001"):
        export_onnx(tmp_path / "source", tmp_path / "onnx", with_mask=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def not_sslam(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')


def without_extractor(folder):
    (folder / "preprocessor_config.json").unlink()


def without_head(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_another_width(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] = torch.zeros(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_another_extractor(folder):
    SSLAMFeatureExtractor(max_length=512).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_sslam, "is not a SSLAM model.*'bert'"),
        (shutil.rmtree, "there is no SSLAM model"),
        (without_extractor, "there is no SSLAM model with its feature extractor"),
        (without_head, "lacks weights, such as classifier.weight"),
        (with_another_width, "classifier.bias, or has them in other shapes"),
        (with_another_extractor, "gives 512 frames of 128 mel bins.*up to 256"),
    ],
)
def test_a_folder_without_a_whole_model_is_rejected(classifier, tmp_path, spoil, message):
    shutil.copytree(classifier.source, tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(UserError, match=message) as caught:
        export_onnx(tmp_path / "source", tmp_path / "onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("output", "opset", "message"), [("taken", 20, "not an empty folder"), ("onnx", 17, "opset is 17, but must be 18 to 23")]
)
def test_a_place_that_is_taken_and_an_unknown_opset_are_rejected(classifier, tmp_path, output, opset, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=message):
        export_onnx(classifier.source, tmp_path / output, opset=opset)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["taken", "taken/mine.txt"]


def test_the_command_reports_a_mistake_in_one_line(tmp_path, capsys):
    assert main(["export", "--model", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "onnx")]) == 1
    assert re.fullmatch("sslam export: error: there is no folder or file .*nowhere here, .*\n", capsys.readouterr().err)


def test_an_official_checkpoint_is_exported_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    assert main(["export", "--model", str(FIXTURES / "small_hub_model"), "--output_dir", str(tmp_path / "onnx"), "--with-mask"]) == 0
    assert (tmp_path / "onnx" / "model.onnx").is_file()


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, capsys, package):
    monkeypatch.delitem(sys.modules, "transformers_sslam.publishing.onnx_export")
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", "--help"]) == 2
    assert "which export needs: pip install 'transformers-sslam[onnx]'" in capsys.readouterr().err
