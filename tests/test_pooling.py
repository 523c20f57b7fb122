"""How a clip's tokens become one vector: each pooling by its definition, and classifiers that read it."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from test_fine_tuning import TINY, _own_cache, folder, settings  # noqa: F401  # fixtures
from test_modeling import log_mels
from torch import nn

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification, SSLAMModel
from transformers_sslam.errors import UserError
from transformers_sslam.finetuning.training import fine_tune
from transformers_sslam.pooling_sslam import POOLINGS, masked_std, merge_pooled, pool_tokens, pooled_width, sounding_tokens


pytestmark = pytest.mark.usefixtures("without_drawing")
ALL = pytest.mark.parametrize("pooling", list(POOLINGS))
WIDTHS = {"cls": 1, "mean": 1, "mean_and_std": 2, "max_by_frequency": 8, "mean_and_max_by_frequency": 16}  # times hidden_size
NAMES = {"id2label": {0: "dog", 1: "rain", 2: "siren"}, "label2id": {"dog": 0, "rain": 1, "siren": 2}}
MASK = torch.arange(128) < torch.tensor([[40], [128]])  # over frames: a clip of 2.5 time steps beside one of 8


def by_definition(pooling: str, cls: torch.Tensor, grid: list[list[torch.Tensor]]) -> torch.Tensor:
    """Of one clip: its CLS token, and for each of the frequencies a list of the patches `(width,)` that count."""
    patches = torch.stack([patch for row in grid for patch in row])
    mean = patches.sum(0) / len(patches)
    by_frequency = [torch.stack(row) for row in grid]
    largest = torch.cat([row.max(0).values for row in by_frequency])
    return {
        "cls": cls,
        "mean": mean,
        "mean_and_std": torch.cat((mean, (((patches - mean) ** 2).sum(0) / len(patches)) ** 0.5)),
        "max_by_frequency": largest,
        "mean_and_max_by_frequency": torch.cat((*(row.sum(0) / len(row) for row in by_frequency), largest)),
    }[pooling]


def classifier(pooling: str, **config) -> SSLAMForAudioClassification:
    """With weights so large that a wrong pooling or mask shows."""
    torch.manual_seed(0)
    model = SSLAMForAudioClassification(tiny_config(**NAMES, classifier_pooling=pooling, initializer_range=0.3, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


# --- the poolings


@ALL
@pytest.mark.parametrize("masked", [False, True])
def test_each_pooling_is_as_it_is_defined_and_what_is_masked_may_be_nan(pooling, masked):
    """Masked are single patches, not only whole time steps: a mask over tokens may be any."""
    tokens, mask = torch.randn(2, 1 + 5 * 8, 4), torch.ones(2, 1 + 5 * 8, dtype=torch.bool)
    if masked:
        mask[0, 1 + 3 * 8 :] = False
        mask[1, [2, 7, 20]] = False
        tokens = tokens.masked_fill(~mask[..., None], torch.nan)
    found = pool_tokens(tokens, mask if masked else None, pooling, 8)
    for clip, counts, vector in zip(tokens, mask, found):
        grid = [[clip[1 + 8 * t + f] for t in range(5) if counts[1 + 8 * t + f]] for f in range(8)]
        torch.testing.assert_close(vector, by_definition(pooling, clip[0], grid))


@ALL
def test_the_width_is_that_of_what_is_returned(pooling):
    config = tiny_config()
    assert pool_tokens(torch.randn(1, 17, 32), None, pooling, 8).shape == (1, pooled_width(pooling, config))
    assert pooled_width(pooling, config) == 32 * WIDTHS[pooling]


def test_a_patch_counts_if_any_of_its_frames_does():
    mask = sounding_tokens(torch.tensor([[True] * 17 + [False] * 31]), 16, 2)
    assert mask.tolist() == [[True, True, True, True, True, False, False]]


@ALL
def test_without_anything_that_counts_the_patches_give_zeros(pooling):
    tokens = torch.randn(1, 17, 4).requires_grad_()
    mask = torch.arange(17)[None] < 1
    found = pool_tokens(tokens, mask, pooling, 8)
    assert torch.equal(found, tokens[:, 0]) if pooling == "cls" else not found.any()
    found.sum().backward()
    assert tokens.grad.isfinite().all()


def test_where_values_do_not_vary_the_gradient_of_the_standard_deviation_is_zero_and_elsewhere_as_computed():
    values = torch.randn(2, 5, 3, dtype=torch.float64)
    values[0] = 1.0
    mask = (torch.arange(5) < torch.tensor([[5], [4]]))[..., None]
    values.requires_grad_()
    masked_std(values, mask).sum().backward()
    assert not values.grad[0].any()
    assert not values.grad[1, 4:].any()
    assert torch.autograd.gradcheck(lambda one: masked_std(one, mask[1:]), values[1:].detach().requires_grad_())


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_and_does_not_overflow(pooling, dtype):
    """The sum of these patches is beyond float16, their squares too."""
    tokens = (500 + 100 * torch.randn(2, 1 + 64 * 8, 4)).to(dtype)
    mask = torch.arange(513) < torch.tensor([[201], [513]])
    for token_mask in (None, mask):
        found = pool_tokens(tokens, token_mask, pooling, 8)
        assert found.dtype == dtype
        assert torch.equal(found, pool_tokens(tokens.float(), token_mask, pooling, 8).to(dtype))
        assert found.isfinite().all()


@ALL
def test_parts_of_a_clip_are_merged_into_what_all_of_it_gives(pooling):
    config = tiny_config(hidden_size=4, num_attention_heads=1)
    tokens = torch.randn(3, 1 + 6 * 8, 4, dtype=torch.float64)
    parts = [torch.cat((tokens[:, :1], tokens[:, 1 + 8 * a : 1 + 8 * b]), dim=1) for a, b in ((0, 3), (3, 5), (5, 6))]
    merged = pool_tokens(parts[0], None, pooling, 8)
    for part, fraction in ((parts[1], 2 / 5), (parts[2], 1 / 6)):
        merged = merge_pooled(merged, pool_tokens(part, None, pooling, 8), fraction, pooling, config)
    torch.testing.assert_close(merged, pool_tokens(tokens, None, pooling, 8))


# --- classifiers that read them


@ALL
@torch.inference_mode()
def test_logits_are_of_the_normalised_vector_without_its_padding(pooling):
    model = classifier(pooling)
    outputs = model.sslam(log_mels(), attention_mask=MASK)
    expected = []
    for clip, steps in zip(outputs.last_hidden_state, (3, 8)):
        expected.append(by_definition(pooling, clip[0], [[clip[1 + 8 * t + f] for t in range(steps)] for f in range(8)]))
    pooled = torch.stack(expected)
    torch.testing.assert_close(outputs.pooler_output, pooled)
    normalised = nn.functional.layer_norm(pooled, pooled.shape[1:], model.layernorm.weight, model.layernorm.bias, eps=1e-6)
    logits = model(log_mels(), attention_mask=MASK).logits
    torch.testing.assert_close(logits, normalised @ model.classifier.weight.T + model.classifier.bias, atol=1e-5, rtol=1e-5)
    # and what the first clip gives alone
    alone = log_mels()[:1, :48]
    torch.testing.assert_close(model(alone, attention_mask=MASK[:1, :48]).logits, logits[:1], atol=1e-4, rtol=1e-4)


@ALL
@pytest.mark.parametrize("layer_pooling", [None, "gated"])
def test_it_is_saved_and_loaded_with_the_model_and_every_weight_of_the_head_is_trained(pooling, layer_pooling, tmp_path):
    model = classifier(pooling, layer_pooling=layer_pooling)
    assert model.classifier.weight.shape == (3, 32 * WIDTHS[pooling])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["classifier_pooling"] == pooling
    loaded, report = SSLAMForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(log_mels(), attention_mask=MASK).logits, model(log_mels(), attention_mask=MASK).logits)
        encoder = SSLAMModel.from_pretrained(tmp_path)
        torch.testing.assert_close(encoder(log_mels()).pooler_output, model.sslam(log_mels()).pooler_output)
    loaded.train()(log_mels(), labels=torch.tensor([0, 2]), attention_mask=MASK).loss.backward()
    head = [(name, p) for name, p in loaded.named_parameters() if not name.startswith("sslam.")]
    assert len(head) == (4 if layer_pooling is None else 6)
    assert [name for name, parameter in head if parameter.grad is None or not parameter.grad.any()] == []
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in loaded.parameters())


@ALL
@torch.inference_mode()
def test_traces_into_one_graph(pooling):
    torch._dynamo.reset()  # the models of the other poolings would count as recompilations
    model = classifier(pooling, layer_pooling="gated")
    traced = torch.compile(model, fullgraph=True, backend="eager")
    for kwargs in ({}, {"attention_mask": MASK}):
        torch.testing.assert_close(traced(log_mels(), **kwargs).logits, model(log_mels(), **kwargs).logits, atol=1e-5, rtol=1e-5)


@ALL
@torch.inference_mode()
def test_a_classifier_in_half_precision_gives_nearly_the_same_scores(pooling):
    model = classifier(pooling)
    expected = model(log_mels(), attention_mask=MASK).logits.softmax(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(log_mels(), attention_mask=MASK).logits
    assert mixed.dtype == torch.float32  # the head stays out of autocast
    half = model.to(torch.bfloat16)(log_mels(), attention_mask=MASK).logits
    assert half.dtype == torch.bfloat16
    for logits in (mixed, half):
        assert (logits.float().softmax(1) - expected).abs().max() < 0.15


@pytest.mark.parametrize("pooling", ["mean_and_std", "mean_and_max_by_frequency"])
def test_the_onnx_graph_gives_the_same_logits(pooling, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers_sslam.publishing.onnx_export import export_onnx

    model = classifier(pooling)
    model.save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(max_length=128).save_pretrained(tmp_path / "model")
    assert max(export_onnx(tmp_path / "model", tmp_path / "onnx", with_mask=True).values()) < 1e-4
    inputs = {"input_values": log_mels(3, 96), "attention_mask": (torch.arange(96) < torch.tensor([[40], [96], [7]])).int()}
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_fine_tuning_gives_an_encoder_a_head_of_another_width(settings, tmp_path):  # noqa: F811
    checkpoint = tmp_path / "classifier"
    SSLAMForAudioClassification(tiny_config(**TINY, num_labels=3)).save_pretrained(checkpoint)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(checkpoint)
    fine_tune(replace(settings, model=str(checkpoint), model_config={"classifier_pooling": "max_by_frequency"}))
    tuned = SSLAMForAudioClassification.from_pretrained(settings.output_dir)
    assert tuned.classifier.weight.shape[1] == tuned.layernorm.weight.shape[0] == 8 * tuned.config.hidden_size


@pytest.mark.parametrize("pooling", ["max_by_frequency", "mean_and_max_by_frequency"])
def test_dropping_patches_and_pooling_by_frequency_exclude_each_other(pooling):
    message = f"classifier_pooling is '{pooling}' and patch_drop_rate 0.5, but this pooling needs all patches of each frequency"
    with pytest.raises(ValueError, match=message):
        tiny_config(classifier_pooling=pooling, patch_drop_rate=0.5)


def test_the_standard_deviation_in_training_is_of_the_patches_that_are_left():
    model = SSLAMModel(tiny_config(classifier_pooling="mean_and_std", patch_drop_rate=0.5)).train()
    outputs = model(log_mels())
    patches = outputs.last_hidden_state[:, 1:]
    assert patches.shape[1] == 32
    torch.testing.assert_close(outputs.pooler_output, torch.cat((patches.mean(1), patches.std(1, correction=0)), dim=1))


@torch.inference_mode()
def test_a_detector_does_not_read_it():
    found = []
    for pooling in ("cls", "max_by_frequency"):
        torch.manual_seed(0)
        model = SSLAMForAudioFrameClassification(tiny_config(num_labels=3, classifier_pooling=pooling)).eval()
        found.append(model(log_mels(), attention_mask=MASK))
    assert torch.equal(found[0].logits, found[1].logits)
    assert torch.equal(found[0].clip_logits, found[1].clip_logits)


def test_fine_tuning_a_detector_rejects_it(settings):  # noqa: F811
    message = "model_config.classifier_pooling is 'mean_and_std', but task is 'events', whose scores of a clip are those of its steps"
    with pytest.raises(UserError, match=message):
        replace(settings, task="events", model_config={"classifier_pooling": "mean_and_std"})
