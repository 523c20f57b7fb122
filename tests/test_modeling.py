"""The encoder and the classifier: the authors' numbers, and what a Transformers user relies on."""

import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES, relative_error, tiny_config
from torch import nn
from transformers import Trainer, TrainingArguments

from transformers_sslam import SSLAMForAudioClassification, SSLAMForPreTraining, SSLAMModel, attention_sslam
from transformers_sslam.attention_sslam import CPU_HALF_PRECISION_ATTENTION, MAX_TOKENS_WRITTEN_OUT
from transformers_sslam.modeling_sslam import SSLAMDropPath, sincos_position_table
from transformers_sslam.pooling_sslam import POOLINGS
from transformers_sslam.publishing.conversion import convert_checkpoint


ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def log_mels(batch: int = 2, frames: int = 128, bins: int = 128) -> torch.Tensor:
    return torch.randn(batch, frames, bins, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> SSLAMModel:
    return perturbed(SSLAMModel(tiny_config()))


def perturbed(model: nn.Module) -> nn.Module:
    """Every weight moved, so that norms and biases that are swapped or left out show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model.eval()


# --- the authors' numbers


@ATTENTION
def test_authors_numbers_always_at_hand(attention, tmp_path):
    """A model of tiny activations, where an epsilon of 1e-5 for 1e-6 shows, in the Hub's layout; every block's MLP output too."""
    convert_checkpoint(FIXTURES / "small_hub_model", tmp_path / "model")
    model = SSLAMModel.from_pretrained(tmp_path / "model", attn_implementation=attention).eval()
    numbers = np.load(FIXTURES / "small_hub_model" / "numbers.npz")
    check_encoder(model, numbers["input_values"], numbers["last_hidden_state"], numbers["mlp_outputs"], tolerance=1e-4)


@ATTENTION
@pytest.mark.parametrize("checkpoint", ["pretrained_fairseq.pt", "hub_pretrain"])
def test_authors_features_at_every_length(reference, tmp_path, checkpoint, attention):
    convert_checkpoint(reference / checkpoint, tmp_path / "model")
    model = SSLAMModel.from_pretrained(tmp_path / "model", attn_implementation=attention).eval()
    numbers = np.load(reference / "encoder.npz")
    for frames in (128, 512, 1024, 2048):
        mlp_outputs = numbers["mlp_outputs_512"] if frames == 512 else None
        check_encoder(model, numbers[f"input_values_{frames}"], numbers[f"last_hidden_state_{frames}"], mlp_outputs, tolerance=2e-6)


@ATTENTION
def test_authors_features_with_small_variance(reference, tmp_path, attention):
    convert_checkpoint(reference / "small_variance_fairseq.pt", tmp_path / "model")
    model = SSLAMModel.from_pretrained(tmp_path / "model", attn_implementation=attention).eval()
    numbers = np.load(reference / "small_variance.npz")
    check_encoder(model, numbers["input_values"], numbers["last_hidden_state"], numbers["mlp_outputs"], tolerance=1e-4)


@ATTENTION
@pytest.mark.parametrize("checkpoint", ["finetuned_fairseq.pt", "hub_finetune"])
def test_authors_logits(reference, tmp_path, checkpoint, attention):
    convert_checkpoint(reference / checkpoint, tmp_path / "model")
    model = SSLAMForAudioClassification.from_pretrained(tmp_path / "model", attn_implementation=attention).eval()
    numbers = np.load(reference / "classifier.npz")
    with torch.inference_mode():
        logits = model(torch.from_numpy(numbers["input_values_1024"]).float()).logits
    assert relative_error(logits, numbers["logits"]) < 2e-6


def check_encoder(model, input_values, last_hidden_state, mlp_outputs, tolerance):
    with torch.inference_mode():
        outputs = model(torch.from_numpy(input_values).float(), output_mlp_outputs=True)
    assert relative_error(outputs.last_hidden_state, last_hidden_state) < tolerance
    if mlp_outputs is not None:
        assert len(outputs.mlp_outputs) == len(mlp_outputs)
        for actual, expected in zip(outputs.mlp_outputs, mlp_outputs):
            assert relative_error(actual, expected) < tolerance


# --- positions, tokens, grid


def test_positions_are_the_published_table():
    table = sincos_position_table(tiny_config(hidden_size=16, num_attention_heads=4, max_length=64))[0]
    assert table.shape == (4 * 8, 16)
    t, f, omega = 3, 5, 10_000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.sin(f * omega), np.cos(f * omega), np.sin(t * omega), np.cos(t * omega)])
    np.testing.assert_allclose(table[8 * t + f], expected, atol=1e-7)


def test_a_longer_table_changes_nothing():
    short, long = SSLAMModel(tiny_config(max_length=128)), SSLAMModel(tiny_config(max_length=256))
    weights = {name: tensor for name, tensor in short.state_dict().items() if "position" not in name}
    assert long.load_state_dict(weights, strict=False).missing_keys == ["embeddings.position_embeddings"]
    with torch.inference_mode():
        assert torch.equal(short.eval()(log_mels()).last_hidden_state, long.eval()(log_mels()).last_hidden_state)


def test_frame_embeddings_are_a_view_by_time_and_frequency(model):
    with torch.inference_mode():
        outputs = model(log_mels(frames=96))
        grid = model.frame_embeddings(outputs.last_hidden_state)
    assert grid.shape == (2, 6, 8, 32)
    assert torch.equal(grid[:, 4, 3], outputs.last_hidden_state[:, 1 + 4 * 8 + 3])
    assert grid.data_ptr() == outputs.last_hidden_state[:, 1:].data_ptr()
    # and that patch is indeed the one of frames 64-79, mel bins 48-63
    changed = log_mels(frames=96)
    changed[:, 64:80, 48:64] += 1
    with torch.inference_mode():
        patches = (model.embeddings(changed) - model.embeddings(log_mels(frames=96)))[:, 1:]
    assert patches.abs().sum((0, 2)).nonzero().flatten().tolist() == [4 * 8 + 3]


def test_other_grids_work():
    config = tiny_config(num_mel_bins=64, patch_size=8, max_length=64)
    model = SSLAMModel(config).eval()
    with torch.inference_mode():
        outputs = model(log_mels(frames=24, bins=64))
    assert outputs.last_hidden_state.shape == (2, 1 + 3 * 8, 32)


def test_poolings(model):
    with torch.inference_mode():
        outputs = model(log_mels())
        assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])
        model.config.classifier_pooling = "mean"
        outputs = model(log_mels())
        torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 1:].mean(1))


def test_outputs_on_request(model):
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        outputs = model(log_mels(), output_hidden_states=True, output_attentions=True, output_mlp_outputs=True)
        assert model(log_mels()).mlp_outputs is None
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 65, 32)] * 3
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 4, 65, 65)] * 2
    assert [tuple(m.shape) for m in outputs.mlp_outputs] == [(2, 65, 32)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 4, 65))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


# --- masks


@ATTENTION
@pytest.mark.parametrize("pooling", list(POOLINGS))
@pytest.mark.parametrize("sounding", [1, 16, 40, 75, 128])
def test_what_lies_in_the_padding_changes_nothing(model, attention, pooling, sounding):
    model.set_attn_implementation(attention)
    model.config.classifier_pooling = pooling
    mask = (torch.arange(128) < sounding).long().expand(2, -1)
    quiet, loud = log_mels(), log_mels()
    quiet[:, sounding:], loud[:, sounding:] = 0.0, 1e4
    valid = 1 + -(-sounding // 16) * 8
    with torch.inference_mode():
        a, b = model(quiet, attention_mask=mask), model(loud, attention_mask=mask)
        assert (a.last_hidden_state[:, :valid] - b.last_hidden_state[:, :valid]).abs().max() < 1e-5
        assert (a.pooler_output - b.pooler_output).abs().max() < 1e-5
        # and it is what the same sound gives without the padded patches, the rest of its last patch filled as the extractor does
        alone = log_mels()[:, : -(-sounding // 16) * 16]
        alone[:, sounding:] = model.config.padding_value
        c = model(alone)
    assert (a.last_hidden_state[:, :valid] - c.last_hidden_state).abs().max() < 1e-5
    assert (a.pooler_output - c.pooler_output).abs().max() < 1e-5


def test_each_clip_has_its_own_mask(model):
    mask = torch.arange(128) < torch.tensor([[48], [112]])
    with torch.inference_mode():
        both = model(log_mels(), attention_mask=mask).last_hidden_state
        first = model(log_mels()[:1, :48]).last_hidden_state
        second = model(log_mels()[1:, :112]).last_hidden_state
    torch.testing.assert_close(both[:1, : 1 + 24], first, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1:, : 1 + 56], second, atol=1e-5, rtol=0)


def test_a_mask_over_tokens_is_taken_too(model):
    frames = torch.arange(128) < torch.tensor([[48], [128]])
    tokens = torch.arange(65) < torch.tensor([[1 + 24], [65]])
    with torch.inference_mode():
        a = model(log_mels(), attention_mask=frames).last_hidden_state
        b = model(log_mels(), attention_mask=tokens.float()).last_hidden_state
    assert torch.equal(a[0, :25], b[0, :25])
    assert torch.equal(a[1], b[1])


def test_a_mask_of_ones_is_no_mask(model):
    with torch.inference_mode():
        assert torch.equal(model(log_mels(), attention_mask=torch.ones(2, 128)).last_hidden_state, model(log_mels()).last_hidden_state)


def test_new_names_bring_their_numbers(tmp_path):
    SSLAMForAudioClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    named = {"id2label": {"0": "rain", "1": "dog"}, "ignore_mismatched_sizes": True}
    assert SSLAMForAudioClassification.from_pretrained(tmp_path, **named).config.label2id == {"rain": 0, "dog": 1}


# --- what is refused


@pytest.mark.parametrize("id2label", [{0: "rain", 2: "dog"}, {1: "rain", 2: "dog"}, {"rain": "0", "dog": "1"}])
def test_names_without_their_numbers_are_refused(id2label):
    config = tiny_config()
    config.id2label = id2label  # as `from_pretrained(..., id2label=...)` does
    with pytest.raises(ValueError, match="id2label has the keys .*0 to 1"):
        SSLAMForAudioClassification(config)


@pytest.mark.parametrize(
    ("input_values", "attention_mask", "message"),
    [
        (None, None, "input_values is None"),
        (np.zeros((2, 128, 128), np.float32), None, "input_values is of type ndarray: give .* with return_tensors"),
        (torch.zeros(2, 128, 64), None, r"\(2, 128, 64\).*128 mel bins"),
        (torch.zeros(128, 128), None, r"\(128, 128\)"),
        (torch.zeros(2, 100, 128), None, "100 frames.*multiple of 16"),
        (torch.zeros(2, 0, 128), None, "0 frames"),
        (torch.zeros(2, 272, 128), None, r"272 frames.*256 \(2.56 s\)"),
        (torch.zeros(2, 128, 128), torch.ones(2, 100), r"\(2, 100\).*\(2, 128\).*\(2, 65\)"),
        (torch.zeros(2, 128, 128), torch.ones(1, 128), r"\(1, 128\).*\(2, 128\)"),
        (torch.zeros(2, 100, 128), torch.ones(2, 100), "100 frames.*multiple of 16"),
        (torch.zeros(2, 128, 128), torch.arange(128).lt(64).float().expand(2, -1) - 1, "negative values"),
        (torch.zeros(2, 128, 128), np.ones((2, 128)), "attention_mask is of type ndarray, but a tensor is expected"),
        (torch.zeros(2, 128, 128), torch.full((2, 128), torch.nan), "negative values, NaN or complex"),
        (torch.zeros(2, 128, 128), torch.ones(2, 128, dtype=torch.complex64), "negative values, NaN or complex"),
        (torch.zeros(2, 128, 128, dtype=torch.complex64), None, "type torch.complex64, but floats"),
        (torch.zeros(2, 128, 128, dtype=torch.long), None, "type torch.int64, but floats"),
        (torch.zeros(0, 128, 128), None, "holds no clip"),
    ],
)
def test_unusable_inputs_are_refused(model, input_values, attention_mask, message):
    with pytest.raises(ValueError, match=message):
        model(input_values, attention_mask=attention_mask)


def test_a_classifier_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="input_values holds no clip"):
        SSLAMForAudioClassification(tiny_config())(torch.zeros(0, 128, 128), labels=torch.zeros(0, dtype=torch.long))


# --- attention for half precision on a CPU


@pytest.mark.parametrize(
    ("tokens", "needs_gradient", "masked", "written_out"),
    [
        (MAX_TOKENS_WRITTEN_OUT, True, False, True),
        (MAX_TOKENS_WRITTEN_OUT + 1, True, False, False),
        (103, False, False, False),
        (103, True, True, False),
    ],
)
def test_attention_is_written_out_for_few_tokens_in_training_alone(monkeypatch, tokens, needs_gradient, masked, written_out):
    used = []
    for name in ("eager_attention_forward", "sdpa_attention_forward"):
        monkeypatch.setattr(attention_sslam, name, lambda *_, name=name, **__: used.append(name) or (None, None))
    query = torch.zeros(1, 4, tokens, 8, requires_grad=needs_gradient)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool) if masked else None
    attention_sslam.cpu_half_precision_attention_forward(nn.Module(), query, query, query, mask, scaling=1.0)
    assert used == ["eager_attention_forward" if written_out else "sdpa_attention_forward"]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_for_half_precision_has_the_outputs_and_gradients_of_the_fused_one(masked):
    mask = torch.arange(128) < torch.tensor([[48], [128]]) if masked else None
    results = []
    for attention in ("sdpa", CPU_HALF_PRECISION_ATTENTION):
        torch.manual_seed(0)
        model = perturbed(SSLAMModel(tiny_config(attn_implementation=attention))).to(torch.bfloat16)
        assert model.config._attn_implementation == attention
        output = model(log_mels(), attention_mask=mask).pooler_output
        output.square().sum().backward()
        results.append((output.detach(), model.layers[0].attention.q_proj.weight.grad, model.embeddings.cls_token.grad))
    for fused, actual in zip(*results):
        torch.testing.assert_close(actual, fused, rtol=0.05, atol=0.05 * fused.abs().max().item())
    assert not masked or all(torch.equal(*pair) for pair in zip(*results)), "with a mask both are the fused one"


def test_only_the_student_of_a_pre_training_model_has_its_attention_written_out(monkeypatch):
    calls, eager = [], attention_sslam.eager_attention_forward
    monkeypatch.setattr(attention_sslam, "eager_attention_forward", lambda *args: calls.append(args[1].shape[2]) or eager(*args))
    config = tiny_config(num_views=2, unmixed_span_length=32, attn_implementation=CPU_HALF_PRECISION_ATTENTION)
    model = SSLAMForPreTraining(config).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(log_mels()).loss.backward()
    assert calls == [1 + 12] * 2  # of 64 patches, in each layer; the teacher's 65 tokens need no gradient


# --- tools that replace layers by their type


class Rounded(nn.Module):
    """A layer in place of another, with its weights in 8 bits, as quantisers have them."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.scale = layer.weight.detach().abs().max() / 127
        self.integers = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.bias, self.layer = layer.bias, [layer]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self.integers * self.scale
        if isinstance(self.layer[0], nn.Linear):
            return nn.functional.linear(inputs, weight, self.bias)
        assert inputs.dim() == 4
        assert inputs.shape[1] == self.layer[0].in_channels
        return self.layer[0]._conv_forward(inputs, weight, self.bias)


def rounded(model: nn.Module) -> nn.Module:
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for name, layer in found:
        model.set_submodule(name, Rounded(layer))
    return model


def test_the_patch_projection_is_a_plain_linear_layer(model):
    assert type(model.embeddings.patch_embeddings.projection) is nn.Linear
    assert model.embeddings.patch_embeddings.projection.weight.shape == (32, 256)
    assert not any(isinstance(module, nn.Conv2d) for module in model.modules())


def test_layers_may_be_replaced_by_their_type():
    torch.manual_seed(0)
    model = perturbed(SSLAMForAudioClassification(tiny_config(num_labels=3)))
    with torch.inference_mode():
        expected = model(log_mels()).logits
        assert relative_error(rounded(model)(log_mels()).logits, expected) < 0.1
    trained = SSLAMForPreTraining(tiny_config(num_views=2, unmixed_span_length=32, mask_noise_std=0.0))
    losses = [m(log_mels(), generator=torch.Generator().manual_seed(0)).loss.item() for m in (trained, rounded(trained))]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_dynamically_quantised_model_runs():
    model = perturbed(SSLAMForAudioClassification(tiny_config(num_labels=3)))
    quantization = pytest.importorskip("torch.ao.quantization")  # which PyTorch is going to remove
    quantised = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "DynamicQuantizedLinear" in repr(quantised.sslam.embeddings.patch_embeddings.projection)
    with torch.inference_mode():
        assert relative_error(quantised(log_mels()).logits, model(log_mels()).logits) < 0.1


# --- training


def test_initialisation_is_the_published_one():
    model = SSLAMModel(tiny_config(hidden_size=256, intermediate_size=1024))
    projection = model.embeddings.patch_embeddings.projection.weight
    assert projection.abs().max() <= (6 / (256 + 256)) ** 0.5  # Xavier-uniform on (D, 256)
    assert projection.std().item() == pytest.approx((6 / 512) ** 0.5 / 3**0.5, rel=0.02)
    assert model.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.embeddings.cls_token.std().item() == pytest.approx(1.0, rel=0.2)
    assert model.layers[1].layernorm_after_mlp.weight.unique().tolist() == [1.0]
    assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))
    assert "embeddings.position_embeddings" not in dict(model.named_parameters())


def test_a_stronger_patch_embedding_can_be_asked_for():
    torch.manual_seed(0)
    plain = SSLAMModel(tiny_config()).embeddings
    torch.manual_seed(0)
    stronger = SSLAMModel(tiny_config(patch_embedding_gain=2.0, position_embedding_scale=0.5)).embeddings
    torch.testing.assert_close(stronger.patch_embeddings.projection.weight, 2 * plain.patch_embeddings.projection.weight)
    torch.testing.assert_close(stronger.position_embeddings, 0.5 * plain.position_embeddings)


def test_drop_path_grows_with_depth_and_keeps_the_mean():
    model = SSLAMModel(tiny_config(num_hidden_layers=5, drop_path_rate=0.2))
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    drop_path = SSLAMDropPath(0.25)
    dropped = drop_path(torch.ones(4000, 3, 2))
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert (dropped.flatten(1).std(1) == 0).all()  # a clip is dropped whole
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop_path.eval()(torch.ones(8, 3, 2)), torch.ones(8, 3, 2))


# --- patches that training leaves out


def test_training_leaves_out_a_share_of_each_clips_patches_and_evaluation_none():
    """Of 64 patches 0.3, rounded down, are 19."""
    model = perturbed(SSLAMModel(tiny_config(patch_drop_rate=0.3)))
    whole = model(log_mels()).last_hidden_state
    assert whole.shape == (2, 65, 32)
    assert torch.equal(whole, model(log_mels()).last_hidden_state)
    assert model.train()(log_mels()).last_hidden_state.shape == (2, 1 + 45, 32)


def test_patches_that_are_left_keep_their_order_behind_cls():
    """And so do their positions: the first block hears a subset of what it hears in evaluation, another one of each clip."""
    model, heard = perturbed(SSLAMModel(tiny_config(patch_drop_rate=0.5))).train(), []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    model(log_mels())
    whole, chosen = model.embeddings(log_mels()), []
    for tokens, all_tokens in zip(heard[0], whole):
        matches = (tokens.unsqueeze(1) == all_tokens).all(-1)
        assert (matches.sum(1) == 1).all()
        chosen.append(matches.int().argmax(1).tolist())
    assert all(numbers[0] == 0 and numbers == sorted(set(numbers)) and len(numbers) == 33 for numbers in chosen)
    assert chosen[0] != chosen[1]


def test_every_patch_is_as_likely_to_be_left_and_the_mask_follows():
    """Tokens that are their own number, and a mask over the even ones."""
    model = SSLAMModel(tiny_config(patch_drop_rate=0.25))
    numbers = torch.arange(17.0).expand(8000, 17)
    tokens, mask = model._drop_patches(numbers.unsqueeze(-1), numbers % 2 == 0)
    assert tokens.shape == (8000, 13, 1)
    assert torch.equal(mask, tokens[..., 0] % 2 == 0)
    kept = torch.bincount(tokens.int().flatten(), minlength=17) / 8000
    assert kept[0] == 1
    torch.testing.assert_close(kept[1:], torch.full((16,), 0.75), rtol=0, atol=0.025)


@pytest.mark.parametrize("sounding", [None, 64])
def test_mean_pooling_is_over_the_patches_that_are_left(sounding):
    model = perturbed(SSLAMModel(tiny_config(patch_drop_rate=0.5, classifier_pooling="mean"))).train()
    masks, drop = [], model._drop_patches

    def record(hidden_states, token_mask):
        tokens, token_mask = drop(hidden_states, token_mask)
        masks.append(torch.ones(tokens.shape[:2], dtype=torch.bool) if token_mask is None else token_mask)
        return tokens, token_mask

    model._drop_patches = record
    attention_mask = None if sounding is None else torch.arange(128).expand(2, 128) < sounding
    outputs = model(log_mels(), attention_mask=attention_mask)
    for pooled, tokens, mask in zip(outputs.pooler_output, outputs.last_hidden_state, masks[0]):
        assert 0 < mask[1:].sum() <= 32
        torch.testing.assert_close(pooled, tokens[1:][mask[1:]].mean(0))


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SSLAMForAudioClassification(tiny_config(num_labels=3)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(log_mels(), labels=torch.tensor([0, 2])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize(
    ("problem_type", "labels", "expected"),
    [
        (None, torch.tensor([0, 2]), nn.functional.cross_entropy),
        (None, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), nn.functional.binary_cross_entropy_with_logits),
        ("multi_label_classification", torch.tensor([[1.0, 0.0, 0.3], [0.0, 1.0, 0.0]]), nn.functional.binary_cross_entropy_with_logits),
    ],
)
def test_losses(problem_type, labels, expected):
    model = SSLAMForAudioClassification(tiny_config(num_labels=3, problem_type=problem_type)).eval()
    outputs = model(log_mels(), labels=labels)
    torch.testing.assert_close(outputs.loss, expected(outputs.logits, labels))
    outputs.loss.backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []


def test_the_classifier_normalises_the_pooled_token():
    model = perturbed(SSLAMForAudioClassification(tiny_config(num_labels=3)))
    with torch.inference_mode():
        pooled = model.sslam(log_mels()).pooler_output
        normalised = nn.functional.layer_norm(pooled, (32,), model.layernorm.weight, model.layernorm.bias, eps=1e-6)
        torch.testing.assert_close(model(log_mels()).logits, normalised @ model.classifier.weight.T + model.classifier.bias)


def test_labels_as_whole_numbers_and_unknown_ones():
    model, inputs = SSLAMForAudioClassification(tiny_config(num_labels=3)).eval(), torch.randn(2, 64, 128)
    logits = model(inputs).logits
    tags = torch.tensor([[1, 0, 1], [0, 1, 0]])
    expected = nn.functional.binary_cross_entropy_with_logits(logits, tags.float(), reduction="none")
    assert model(inputs, labels=tags).loss.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    assert model.config.problem_type == "multi_label_classification"
    tags[0, 2] = -100  # as in a detector's labels, and in those of `sslam finetune`
    assert model(inputs, labels=tags).loss.item() == pytest.approx((expected.sum() - expected[0, 2]).item() / 5, rel=1e-6)
    with pytest.raises(ValueError, match="labels has -1, but numbers from 0"):
        model(inputs, labels=-torch.ones(2, 3))
    shares = torch.tensor([0.5430, 0.4316, 0.0281]).bfloat16().sum()  # above 1, by rounding
    assert model(inputs, labels=shares.expand(2, 3)).loss.isfinite()

    def loss(parameters: dict, log_mel: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (log_mel[None],), {"labels": labels[None]}).loss

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, inputs, tags.float())
    assert each["classifier.bias"].shape == (2, 3)  # gradients of each clip
    model.loss_function = lambda labels, logits, config: 42 + 0 * logits.sum()
    assert model(inputs, labels=tags).loss == 42
    del model._loss_function
    model.config.problem_type = None
    classes = torch.tensor([2, 0], dtype=torch.int32)
    assert model(inputs, labels=classes).loss.item() == pytest.approx(nn.functional.cross_entropy(logits, classes.long()).item(), rel=1e-6)
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, problem_type):
    """In a plain `Trainer`: it has to divide the loss by the number of steps, which a model may take upon itself."""
    config = tiny_config(num_labels=3, problem_type=problem_type, hidden_dropout_prob=0.0)
    labels = torch.randint(3, (4,)) if problem_type.startswith("single") else torch.rand(4, 3)
    clips = [{"input_values": values, "labels": label} for values, label in zip(log_mels(4), labels)]
    norms = []
    for steps in (1, 4):
        torch.manual_seed(0)
        sizes = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps, "max_steps": 1, "logging_steps": 1}
        arguments = TrainingArguments(tmp_path, **sizes, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
        trainer = Trainer(SSLAMForAudioClassification(config), arguments, train_dataset=clips)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


# --- compiled, exported, in half precision


@pytest.mark.slow
def test_compiles_into_one_graph(model):
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    mask = torch.arange(128) < torch.tensor([[48], [128]])
    with torch.inference_mode():
        torch.testing.assert_close(compiled(log_mels()).last_hidden_state, model(log_mels()).last_hidden_state, atol=1e-5, rtol=1e-5)
        masked = compiled(log_mels(), attention_mask=mask).last_hidden_state
        torch.testing.assert_close(masked[1], model(log_mels(), attention_mask=mask).last_hidden_state[1], atol=1e-5, rtol=1e-5)


def test_traces_into_one_graph(model):
    """As above without the compiler's back end: no graph break anywhere, masks and outputs on request included."""
    traced = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.arange(128) < torch.tensor([[48], [128]])
    with torch.inference_mode():
        for kwargs in ({}, {"attention_mask": mask}, {"output_hidden_states": True}):
            expected = model(log_mels(), **kwargs).last_hidden_state
            torch.testing.assert_close(traced(log_mels(), **kwargs).last_hidden_state, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_exports_for_any_batch_and_length(masked):
    model = perturbed(SSLAMForAudioClassification(tiny_config(num_labels=3)))
    batch, steps = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("steps", min=2, max=16)
    kwargs = {"input_values": log_mels(3, 64)}
    shapes = {"input_values": {0: batch, 1: 16 * steps}}
    if masked:
        kwargs["attention_mask"] = torch.ones(3, 64, dtype=torch.long)
        shapes["attention_mask"] = {0: batch, 1: 16 * steps}
    program = torch.export.export(model, (), kwargs, dynamic_shapes=shapes).module()
    inputs = {"input_values": log_mels(5, 144)}
    if masked:
        inputs["attention_mask"] = (torch.arange(144) < torch.arange(40, 140, 20)[:, None]).long()
    with torch.inference_mode():
        torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision(model, dtype, tolerance):
    mask = torch.arange(128) < torch.tensor([[48], [128]])
    with torch.inference_mode():
        expected = model(log_mels(), attention_mask=mask).pooler_output
        actual = model.to(dtype)(log_mels(), attention_mask=mask).pooler_output
    assert actual.dtype == dtype
    assert relative_error(actual.float(), expected) < tolerance


# --- saving


def test_save_and_load_keep_every_bit(tmp_path):
    model = perturbed(SSLAMForAudioClassification(tiny_config(num_labels=3)))
    model.sslam.embeddings.position_embeddings += 1e-4  # as a table that was rounded: loaded, never computed again
    model.save_pretrained(tmp_path)
    loaded = SSLAMForAudioClassification.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["SSLAMForAudioClassification"]


def test_another_number_of_labels_keeps_the_encoder(tmp_path):
    model = perturbed(SSLAMForAudioClassification(tiny_config(num_labels=3)))
    model.save_pretrained(tmp_path)
    loaded = SSLAMForAudioClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape == (7, 32)
    assert torch.equal(loaded.layernorm.weight, model.layernorm.weight)
    assert all(torch.equal(tensor, loaded.sslam.state_dict()[name]) for name, tensor in model.sslam.state_dict().items())
