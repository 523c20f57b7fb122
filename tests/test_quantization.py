"""Int8 graphs: what is quantized, what calibration changes, and that the comparison's figures are those of the graphs."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification
from transformers_sslam.audio import load_waveform
from transformers_sslam.audio.labelled_data import LabelledDataSettings
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.settings import parse_settings


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from onnx import numpy_helper  # noqa: E402

from transformers_sslam.publishing.onnx_export import ExportSettings, export_onnx  # noqa: E402
from transformers_sslam.publishing.quantization import (  # noqa: E402
    QuantizationSettings,
    calibration_inputs,
    compare,
    comparison_table,
    quantize,
)


CLASSES = ["bell", "dog", "rain"]


def save(folder: Path, cls=SSLAMForAudioClassification, **config) -> Path:
    """Two blocks, random, with weights so large that logits differ between clips."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    cls(tiny_config(initializer_range=0.3, **labels, **config)).save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A classifier, and twelve clips of tones over noise, with random labels."""
    root = tmp_path_factory.mktemp("int8")
    save(root / "model")
    draws = np.random.default_rng(0)
    for i in range(12):
        path = root / "clips" / "test" / CLASSES[i % 3] / f"{i:02}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = np.sin(2 * np.pi * draws.uniform(100, 4000) * np.arange(9600) / 16_000)
        soundfile.write(path, draws.uniform(0.01, 0.3) * tone + 0.02 * draws.standard_normal(9600), 16_000)
    model, inputs = SSLAMForAudioClassification.from_pretrained(root / "model").eval(), log_mels(root)
    with torch.no_grad():  # so that clips get different classes
        model.classifier.bias -= model(torch.from_numpy(np.concatenate(inputs))).logits.mean(0)
    model.save_pretrained(root / "model")
    return root


def log_mels(root: Path) -> list[np.ndarray]:
    """Of each clip, in the order of their paths."""
    extractor = SSLAMFeatureExtractor.from_pretrained(root / "model")
    files = sorted((root / "clips").rglob("*.wav"))
    return [extractor(load_waveform(file), sampling_rate=16_000, return_tensors="np")["input_values"] for file in files]


@pytest.fixture(scope="module")
def exported(root, tmp_path_factory) -> Path:
    """By the command, and compared on the clips with PyTorch as well."""
    folder = tmp_path_factory.mktemp("dynamic") / "onnx"
    words = ["export", "--model", root / "model", "--output_dir", folder, "--int8", "dynamic", "--evaluate_data.data_dir", root / "clips"]
    assert main([*map(str, words), "--evaluate_torch", "float32", "bfloat16", "--num_threads", "1"]) == 0
    return folder


def weights_of(graph: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(graph).graph.initializer}


def logits_of(graph: Path, *clips: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph)
    return np.concatenate([session.run(["logits"], {"input_values": clip, **inputs})[0] for clip in clips])


# --- what is quantized


def test_every_linear_layer_has_int8_weights_with_a_scale_for_each_output(root, exported):
    """And nothing else is in int8."""
    model = SSLAMForAudioClassification.from_pretrained(root / "model")
    linear = [module.weight.detach().numpy().T for module in model.modules() if isinstance(module, torch.nn.Linear)]
    found = weights_of(exported / "model_int8.onnx")
    matrices = {name: weights for name, weights in found.items() if weights.dtype == np.int8 and weights.ndim == 2}
    assert sorted(weights.shape for weights in matrices.values()) == sorted(weights.shape for weights in linear)
    for name, weights in matrices.items():
        scale = found[name.removesuffix("_quantized") + "_scale"]
        assert scale.shape == (weights.shape[1],)
        errors = [np.abs(weights * scale - original).max(0) for original in linear if original.shape == weights.shape]
        assert any((error <= 0.51 * scale).all() for error in errors), name
    saved = (exported / "model.onnx").stat().st_size - (exported / "model_int8.onnx").stat().st_size
    assert saved > 2.5 * sum(weights.size for weights in matrices.values())


def test_products_of_activations_stay_in_float32(exported):
    graph = onnx.load(exported / "model_int8.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") == 1 + 2 * 6 + 1
    assert kinds.count("MatMul") == 2 * 2  # queries with keys, and weights with values, of two blocks


def test_metadata_are_those_of_the_float32_graph(exported):
    one, other = ({entry.key: entry.value for entry in onnx.load(exported / f"model{kind}.onnx").metadata_props} for kind in ("", "_int8"))
    assert json.loads(other["id2label"]) == dict(zip("012", CLASSES))
    assert one.items() <= other.items()


@pytest.mark.parametrize("cls", [SSLAMForAudioClassification, SSLAMForAudioFrameClassification])
def test_padded_clips_and_detectors_can_be_quantized(tmp_path, cls):
    export_onnx(save(tmp_path / "model", cls), tmp_path / "onnx", with_mask=True, quantization=QuantizationSettings(int8="dynamic"))
    values, mask = np.random.default_rng(0).standard_normal((2, 64, 128), dtype=np.float32), np.ones((2, 64), np.int32)
    mask[1, 32:] = 0
    exact, rounded = (logits_of(tmp_path / "onnx" / f"model{kind}.onnx", values, attention_mask=mask) for kind in ("", "_int8"))
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


# --- calibration


def test_static_scales_are_those_of_the_calibration_clips(root, exported, tmp_path):
    """The input of the first product, the patches themselves, has the scale of the largest range of the clips."""
    extractor = SSLAMFeatureExtractor.from_pretrained(root / "model")
    inputs = list(calibration_inputs([str(root / "clips")], 4, extractor, with_mask=False))
    assert [values["input_values"].shape for values in inputs] == [(1, 64, 128)] * 4
    for values, expected in zip(inputs, [log_mels(root)[i] for i in (0, 4, 7, 11)]):
        np.testing.assert_array_equal(values["input_values"], expected)
    graph = tmp_path / "model.onnx"
    graph.write_bytes((exported / "model.onnx").read_bytes())
    for factor in (1, 3):
        found = weights_of(quantize(graph, "static", [{"input_values": factor * values["input_values"]} for values in inputs]))
        every = factor * np.stack([values["input_values"] for values in inputs])
        wanted = (max(every.max(), 0) - min(every.min(), 0)) / 255
        scales = [float(values) for values in found.values() if values.dtype == np.float32 and values.ndim == 0]
        assert any(np.isclose(scales, wanted, rtol=1e-5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model_int8.onnx"]


def test_static_int8_by_the_command(root, tmp_path):
    words = ["export", "--model", root / "model", "--output_dir", tmp_path / "onnx", "--with_mask"]
    assert main([*map(str, words), "--int8", "static", "--calibration_data", str(root / "clips")]) == 0
    assert sorted(file.name for file in (tmp_path / "onnx").glob("*.onnx")) == ["model.onnx", "model_int8.onnx"]
    kinds = {node.op_type for node in onnx.load(tmp_path / "onnx" / "model_int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert "DynamicQuantizeLinear" not in kinds


def test_a_recording_that_cannot_be_read_leaves_nothing(root, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    settings = QuantizationSettings(int8="static", calibration_data=[str(tmp_path / "broken.wav")])
    with pytest.raises(UserError, match=r"calibration_data cannot be used: .*broken\.wav"):
        export_onnx(root / "model", tmp_path / "onnx", quantization=settings)
    assert not (tmp_path / "onnx").exists()


# --- the comparison


def test_models_take_turns_on_each_clip():
    order = []

    def runner(name: str, value: float):
        def run(inputs: dict) -> np.ndarray:
            order.append(name)
            return np.full((1, 2), value * inputs["x"], dtype=np.float32)

        return run

    logits, seconds = compare({"a": runner("a", 1), "b": runner("b", 2)}, ({"x": x} for x in (1, 2, 3)))
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]  # the first two are not measured
    assert logits["a"].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert logits["b"].tolist() == [[2, 2], [4, 4], [6, 6]]
    assert seconds.shape == (3, 2)
    assert (seconds > 0).all()


def test_figures_are_those_of_the_graphs(root, exported):
    comparison = json.loads((exported / "comparison.json").read_text())
    labels = np.repeat([0, 1, 2], 4)
    exact, rounded = (logits_of(exported / f"model{kind}.onnx", *log_mels(root)).argmax(1) for kind in ("", "_int8"))
    found = comparison["models"]
    assert list(found) == ["ONNX Runtime, float32", "ONNX Runtime, int8", "PyTorch, float32", "PyTorch, bfloat16"]
    assert comparison["clips"] == 12
    assert found["ONNX Runtime, float32"]["metrics"]["accuracy"] == pytest.approx((exact == labels).mean())
    assert found["ONNX Runtime, int8"]["metrics"]["accuracy"] == pytest.approx((rounded == labels).mean())
    assert found["ONNX Runtime, int8"]["agreement"] == pytest.approx((exact == rounded).mean())
    assert found["ONNX Runtime, float32"]["agreement"] == found["PyTorch, float32"]["agreement"] == 1.0
    assert found["ONNX Runtime, float32"]["speedup"] == [1.0, 1.0, 1.0]
    assert all(0 < low <= middle <= high for low, middle, high in (model["seconds"] for model in found.values()))
    assert len(set(exact)) > 1  # a constant answer would agree with anything


def test_the_table_has_a_row_for_each_model():
    found = {"metrics": {"accuracy": 0.9, "accuracy_interval": [0.8, 0.95]}, "agreement": 0.99, "agreement_interval": [0.98, 1.0]}
    found |= {"seconds": [0.1, 0.2, 0.3], "speedup": [1.5, 2.0, 2.5]}
    table = comparison_table({"clips": 500, "num_threads": 1, "models": {"ONNX Runtime, int8": found}})
    assert table.splitlines()[0] == "| 500 clips | accuracy | top-1 agreement | seconds a clip [5 %, 95 %] | speed-up |"
    assert table.splitlines()[2] == (
        "| ONNX Runtime, int8 | 0.900 [0.800, 0.950] | 0.990 [0.980, 1.000] | 0.200 [0.100, 0.300] | 2.000 [1.500, 2.500] |"
    )


# --- what is rejected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"int8": "static"}, "int8 is 'static', and calibration_data is"),
        ({"int8": "dynamic", "calibration_data": ["x"]}, r"int8 is 'dynamic', and calibration_data is \['x'\]"),
        ({"evaluate_data": LabelledDataSettings(data_dir="x")}, "evaluate_data is set, but int8 is null"),
        ({"int8": "dynamic", "num_threads": 1}, "num_threads is set, but evaluate_data"),
        ({"int8": "dynamic", "calibration_clips": 0}, "calibration_clips is 0, but must be positive"),
        ({"int8": "dynamic", "encoder_only": True, "evaluate_data": LabelledDataSettings(data_dir="x")}, "encoder_only is true"),
    ],
)
def test_settings_without_effect_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        ExportSettings(model="m", output_dir="o", **changes)


def test_folds_of_the_clips_are_flags_of_the_command():
    words = ["--model", "m", "--output_dir", "o", "--int8", "dynamic", "--evaluate_data.data_dir", "x"]
    settings = parse_settings(ExportSettings, [*words, "--evaluate_data.fold_column", "fold", "--evaluate_data.test_folds", "1", "2"])
    assert settings.evaluate_data == LabelledDataSettings(data_dir="x", fold_column="fold", test_folds=[1, 2])


def test_a_detector_cannot_be_compared_on_labels_of_clips(root, tmp_path):
    settings = QuantizationSettings(int8="dynamic", evaluate_data=LabelledDataSettings(data_dir=str(root / "clips")))
    with pytest.raises(UserError, match="the model is a SSLAMForAudioFrameClassification, not a classifier"):
        export_onnx(save(tmp_path / "model", SSLAMForAudioFrameClassification), tmp_path / "onnx", quantization=settings)
    assert not (tmp_path / "onnx").exists()
