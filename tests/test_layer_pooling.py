"""A classifier that reads all blocks: its weights, saved and loaded, compiled, exported, and trained on a frozen encoder."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from test_fine_tuning import TINY, _own_cache, folder, settings  # noqa: F401  # fixtures
from test_modeling import log_mels
from torch import nn

from transformers_sslam import (
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForAudioFrameClassification,
    SSLAMForPreTraining,
    SSLAMModel,
)
from transformers_sslam.finetuning.training import fine_tune


pytestmark = pytest.mark.usefixtures("without_drawing")
KINDS = ["weighted_sum", "gated"]
NAMES = {"id2label": {0: "dog", 1: "rain", 2: "siren"}, "label2id": {"dog": 0, "rain": 1, "siren": 2}}


def classifier(kind: str | None, **config) -> SSLAMForAudioClassification:
    """Three blocks; with weights so large that a wrong block, mask or pooling shows."""
    torch.manual_seed(0)
    model = SSLAMForAudioClassification(tiny_config(**NAMES, num_hidden_layers=3, layer_pooling=kind, initializer_range=0.3, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def block_weights(model: SSLAMForAudioClassification, normalised: torch.Tensor) -> torch.Tensor:
    """By the definition, a clip and a block at a time."""
    scores, gates = model.layer_pooling.scores, model.layer_pooling.gates
    rows = []
    for clip in normalised:
        added = [0 if gates is None else vector @ gate / 32**0.5 for vector, gate in zip(clip, clip if gates is None else gates)]
        row = torch.stack([score + more for score, more in zip(scores, added)]).exp()
        rows.append(row / row.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("classifier_pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_are_of_the_weighted_sum_of_each_blocks_normalised_output(kind, classifier_pooling):
    model = classifier(kind, classifier_pooling=classifier_pooling)
    mask = torch.arange(128) < torch.tensor([[48], [128]])
    outputs = model(log_mels(), attention_mask=mask, output_hidden_states=True)
    blocks = outputs.hidden_states[1:]
    assert len(blocks) == 3
    if classifier_pooling == "cls":
        pooled = torch.stack([tokens[:, 0] for tokens in blocks], dim=1)
    else:
        sounding = (3 * 8, 8 * 8)
        pooled = torch.stack([torch.stack([clip[1 : 1 + n].mean(0) for clip, n in zip(tokens, sounding)]) for tokens in blocks], dim=1)
    normalised = nn.functional.layer_norm(pooled, (32,), model.layernorm.weight, model.layernorm.bias, eps=1e-6)
    weights = block_weights(model, normalised)
    torch.testing.assert_close(model.layer_pooling.weights(normalised), weights)
    expected = (weights[..., None] * normalised).sum(1) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)
    assert weights.max() < 0.99  # no block decides alone
    assert ((weights[0] - weights[1]).abs().max() > 0.01) == (kind == "gated")


def test_without_it_the_last_block_is_read_and_a_checkpoint_has_no_other_weights():
    model = classifier(None)
    assert not [name for name in model.state_dict() if "layer_pooling" in name]
    with torch.inference_mode():
        outputs = model.sslam(log_mels())
        assert outputs.layer_pooler_outputs is None
        expected = model.classifier(model.layernorm(outputs.last_hidden_state[:, 0]))
        torch.testing.assert_close(model(log_mels()).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_pretrained_encoder_all_blocks_weigh_the_same_at_first(kind, tmp_path):
    SSLAMForPreTraining(tiny_config()).save_pretrained(tmp_path)
    model, report = SSLAMForAudioClassification.from_pretrained(tmp_path, layer_pooling=kind, num_labels=3, output_loading_info=True)
    new = {"layernorm.weight", "layernorm.bias", "classifier.weight", "classifier.bias", "layer_pooling.scores"}
    assert set(report["missing_keys"]) == new | ({"layer_pooling.gates"} if kind == "gated" else set())
    weights = model.layer_pooling.weights(torch.randn(4, 2, 32))
    assert torch.equal(weights, torch.full((4, 2), 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_trained(kind):
    model = classifier(kind).train()
    model(log_mels(), labels=torch.tensor([0, 2])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == [
        f"sslam.layers.{i}.attention.k_proj.bias" for i in range(3) if not model.sslam.layers[i].attention.k_proj.bias.grad.any()
    ]  # softmax does not see the keys' bias, whose gradient may be exactly 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_loaded_with_the_model(kind, tmp_path):
    model = classifier(kind)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_pooling"] == kind
    loaded = SSLAMForAudioClassification.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    encoder, report = SSLAMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in model.sslam.state_dict().items())


def test_a_checkpoint_from_before_there_was_a_choice_loads(tmp_path):
    model = classifier(None)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layer_pooling"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, report = SSLAMForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(log_mels()).logits, model(log_mels()).logits)


def test_another_name_is_rejected():
    with pytest.raises(Exception, match="layer_pooling"):
        tiny_config(layer_pooling="gates")


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_traces_into_one_graph(kind):
    model = classifier(kind)
    traced = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.arange(128) < torch.tensor([[48], [128]])
    for kwargs in ({}, {"attention_mask": mask}):
        torch.testing.assert_close(traced(log_mels(), **kwargs).logits, model(log_mels(), **kwargs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_onnx_graph_gives_the_same_logits(kind, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers_sslam.publishing.onnx_export import export_onnx

    model = classifier(kind, classifier_pooling="mean")
    model.save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(max_length=128).save_pretrained(tmp_path / "model")
    assert max(export_onnx(tmp_path / "model", tmp_path / "onnx", with_mask=True).values()) < 1e-4
    mask = (torch.arange(96) < torch.tensor([[40], [96], [7]])).int()
    inputs = {"input_values": log_mels(3, 96), "attention_mask": mask}
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_weights_stay_in_float32_under_autocast(kind):
    model, seen = classifier(kind), []
    model.layer_pooling.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(log_mels()).logits
    assert (seen, logits.dtype) == ([torch.float32], torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_trains_it_on_a_frozen_encoder(kind, settings, tmp_path):  # noqa: F811
    checkpoint = tmp_path / "encoder"
    SSLAMModel(tiny_config(**TINY)).save_pretrained(checkpoint)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(checkpoint)
    asked = {"layer_pooling": kind, "classifier_pooling": "mean"}
    fine_tune(replace(settings, model=str(checkpoint), model_config=asked, freeze_encoder=True, learning_rate=1e-2))
    before, after = SSLAMModel.from_pretrained(checkpoint), SSLAMForAudioClassification.from_pretrained(settings.output_dir)
    assert after.config.layer_pooling == kind
    assert all(torch.equal(tensor, after.sslam.state_dict()[name]) for name, tensor in before.state_dict().items())
    trained = [name for name, parameter in after.layer_pooling.named_parameters() if parameter.any()]
    assert trained == (["scores", "gates"] if kind == "gated" else ["scores"])


def test_a_detector_rejects_it():
    with pytest.raises(ValueError, match="layer_pooling is 'gated', but a detector of events reads the last block"):
        SSLAMForAudioFrameClassification(tiny_config(layer_pooling="gated"))
