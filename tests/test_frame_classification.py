"""Event detection's model: scores of steps and of clips, their loss, masks, and what a Transformers user relies on."""

import inspect
import json

import pytest
import torch
from conftest import noise, relative_error, tiny_config
from huggingface_hub.errors import StrictDataclassError
from test_conversion import save_fine_tuned_fairseq, save_hub_folder, save_pretrained_fairseq
from test_modeling import log_mels, perturbed
from torch import nn
from transformers import AutoModelForAudioFrameClassification, Trainer, TrainingArguments

from transformers_sslam import (
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForAudioFrameClassification,
    SSLAMForPreTraining,
    SSLAMModel,
)
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.loading import load_model
from transformers_sslam.publishing.conversion import convert_checkpoint


RATES = pytest.mark.parametrize(("rate", "per_patch"), [(6.25, 1), (12.5, 2), (25, 4), (100, 16)])
POOLINGS = pytest.mark.parametrize("pooling", ["mean", "attention", "patches"])


def detector(**kwargs) -> SSLAMForAudioFrameClassification:
    """Three classes; every weight moved, so that the scores of steps differ visibly."""
    return perturbed(SSLAMForAudioFrameClassification(tiny_config(**{"num_labels": 3, "initializer_range": 0.2, **kwargs})))


def sounding(*frames: int, of: int = 128) -> torch.Tensor:
    """A mask over frames."""
    return (torch.arange(of) < torch.tensor(frames)[:, None]).long()


def by_hand(model: SSLAMForAudioFrameClassification, log_mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the steps and of the clip, of one clip without padding, one step at a time in float64."""
    with torch.inference_mode():
        grid = model.sslam.frame_embeddings(model.sslam(log_mel[None]).last_hidden_state)[0].double()
    head = {name: tensor.double() for name, tensor in model.state_dict().items() if not name.startswith("sslam.")}
    vectors = []
    for patches in grid:
        weights = torch.full((len(patches),), 1 / len(patches), dtype=torch.float64)
        if model.config.frame_pooling == "attention":
            weights = (patches @ head["frequency_attention.weight"][0] + head["frequency_attention.bias"]).exp()
        pooled = (weights[:, None] * patches).sum(0) / weights.sum()
        if model.config.frame_pooling == "patches":
            pooled = patches.flatten()
        vectors.append(nn.functional.layer_norm(pooled, pooled.shape, head["layernorm.weight"], head["layernorm.bias"], eps=1e-6))
    per_patch = model.config.patch_size // model.config.frames_per_step
    scores, attention = [], []
    for step in range(len(vectors) * per_patch):
        position = min(max((step + 0.5) / per_patch - 0.5, 0), len(vectors) - 1)  # in patches, between whose centres it interpolates
        before = int(position)
        after = min(before + 1, len(vectors) - 1)
        features = vectors[before] + (position - before) * (vectors[after] - vectors[before])
        scores.append((head["frame_classifier.weight"] @ features + head["frame_classifier.bias"]).sigmoid())
        attention.append((head["time_attention.weight"] @ features + head["time_attention.bias"]).exp())
    scores, attention = torch.stack(scores), torch.stack(attention)
    return scores, (attention * scores).sum(0) / attention.sum(0)


# --- scores


@POOLINGS
@RATES
def test_scores_of_steps_and_clips_are_those_computed_by_hand(rate, per_patch, pooling):
    model, values = detector(steps_per_second=rate, frame_pooling=pooling), log_mels(2, 96)
    with torch.inference_mode():
        outputs = model(values)
    assert outputs.loss is None
    assert outputs.logits.shape == (2, 6 * per_patch, 3)
    assert outputs.clip_logits.shape == (2, 3)
    for i in range(2):
        steps, clip = by_hand(model, values[i])
        torch.testing.assert_close(outputs.logits[i].sigmoid().double(), steps, atol=2e-6, rtol=0)
        torch.testing.assert_close(outputs.clip_logits[i].sigmoid().double(), clip, atol=2e-6, rtol=0)
    assert outputs.logits.std(1).min() > 0.05, "steps differ"


def test_a_step_has_the_scores_of_its_own_time():
    """Of two sounds in silence each moves the scores of its own steps most."""
    model, quiet = detector(num_hidden_layers=1), torch.zeros(1, 128, 128)
    loud = quiet.clone()
    loud[:, 32:48], loud[:, 96:112] = 3.0, -3.0
    with torch.inference_mode():
        change = (model(loud).logits - model(quiet).logits).abs().sum((0, 2))
    assert sorted(change.topk(2).indices.tolist()) == [2, 6]


def test_a_clip_of_one_patch_in_time_has_its_steps():
    model = detector(steps_per_second=25)
    with torch.inference_mode():
        logits = model(log_mels(1, 16)).logits
    assert logits.shape == (1, 4, 3)
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))


def test_other_grids_work():
    model = detector(num_mel_bins=64, patch_size=8, max_length=64, steps_per_second=25, frame_pooling="attention")
    values, mask = log_mels(2, 48, 64), sounding(20, 48, of=48)
    values[0, 20:24] = model.config.padding_value
    with torch.inference_mode():
        outputs = model(values, attention_mask=mask)
        assert outputs.logits.shape == (2, 12, 3)
        torch.testing.assert_close(outputs.logits[:1, :5], model(values[:1, :24]).logits[:, :5], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_scores_of_clips_saturate_without_overflow(shift):
    """Where the probability itself is 0 or 1 in float32, its logit and the gradient are finite."""
    model = detector()
    with torch.no_grad():
        model.frame_classifier.bias.fill_(shift)
    outputs = model(log_mels(), clip_labels=torch.full((2, 3), float(shift < 0)))
    assert outputs.clip_logits.sigmoid().unique().tolist() == [float(shift > 0)]
    torch.testing.assert_close(outputs.clip_logits, torch.full((2, 3), shift), atol=20, rtol=0)
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@RATES
def test_steps_are_weighted_by_their_clip(rate, per_patch):
    """The geometric mean of both scores, which changes neither those of the clip nor the loss, nor what padding does."""
    model, values, mask = detector(steps_per_second=rate, frame_pooling="patches"), log_mels(2, 96), sounding(70, 96, of=96)
    labels = torch.rand(2, 6 * per_patch, 3)
    plain = model(values, labels=labels, attention_mask=mask)
    model.config.clip_weighting = True
    found = model(values, labels=labels, attention_mask=mask)
    assert torch.equal(found.clip_logits, plain.clip_logits)
    assert torch.equal(found.loss, plain.loss)
    expected = (plain.logits.double().sigmoid() * plain.clip_logits.double().sigmoid().unsqueeze(1)).sqrt()
    torch.testing.assert_close(found.logits.double().sigmoid(), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(found.logits, plain.logits, atol=0.1)


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_weighted_steps_saturate_without_overflow(shift):
    model = detector(clip_weighting=True)
    with torch.no_grad():
        model.frame_classifier.bias.fill_(shift)
    outputs = model(log_mels())
    assert outputs.logits.isfinite().all()
    torch.testing.assert_close(outputs.logits.sigmoid(), torch.full((2, 8, 3), float(shift > 0)), atol=2e-7, rtol=0)
    outputs.logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for name, parameter in model.named_parameters() if parameter.grad is not None)


def test_outputs_on_request_and_as_a_tuple():
    model = detector(attn_implementation="eager")
    with torch.inference_mode():
        outputs = model(log_mels(), output_hidden_states=True, output_attentions=True)
        logits, clip_logits = model(log_mels(), return_dict=False)
    assert torch.equal(logits, outputs.logits)
    assert torch.equal(clip_logits, outputs.clip_logits)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 65, 32)] * 3
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 4, 65, 65)] * 2


# --- masks


@POOLINGS
@RATES
@pytest.mark.parametrize("frames", [1, 16, 40, 75])
def test_what_lies_in_the_padding_changes_no_score(frames, rate, per_patch, pooling):
    model = detector(steps_per_second=rate, frame_pooling=pooling)
    quiet, loud = log_mels(), log_mels()
    quiet[:, frames:], loud[:, frames:] = 0.0, 1e4
    steps = -(-frames * per_patch // 16)
    with torch.inference_mode():
        a, b = (model(values, attention_mask=sounding(frames, frames)) for values in (quiet, loud))
        # and they are what the same sound gives without the padded patches
        alone = log_mels()[:, : -(-frames // 16) * 16]
        alone[:, frames:] = model.config.padding_value
        c = model(alone)
    assert (a.logits[:, :steps] - b.logits[:, :steps]).abs().max() < 1e-5
    assert (a.clip_logits - b.clip_logits).abs().max() < 1e-5
    assert (a.logits[:, :steps] - c.logits[:, :steps]).abs().max() < 1e-5
    if alone.shape[1] == frames:  # else its last patch has steps without sound, which a clip without a mask counts
        assert (a.clip_logits - c.clip_logits).abs().max() < 1e-5


@RATES
def test_steps_without_sound_have_no_part_in_the_score_of_a_clip(rate, per_patch):
    model, values = detector(steps_per_second=rate), log_mels(1)
    values[:, 75:] = model.config.padding_value
    steps = -(-75 * per_patch // 16)
    with torch.inference_mode():
        outputs = model(values, attention_mask=sounding(75))
        features = []
        model.time_attention.register_forward_hook(lambda module, inputs, output: features.append(output))
        model(values, attention_mask=sounding(75))
    weights = features[0][0, :steps].softmax(0)
    expected = (weights * outputs.logits[0, :steps].sigmoid()).sum(0)
    torch.testing.assert_close(outputs.clip_logits[0].sigmoid(), expected, atol=1e-6, rtol=0)


@RATES
def test_a_mask_over_tokens_is_taken_too(rate, per_patch):
    model = detector(steps_per_second=rate)
    tokens = torch.arange(65) < torch.tensor([[1 + 24], [65]])
    labels = torch.rand(2, 8 * per_patch, 3)
    with torch.inference_mode():
        a, b = (model(log_mels(), labels=labels, attention_mask=mask) for mask in (sounding(48, 128), tokens.float()))
    torch.testing.assert_close(a.logits[0, : 3 * per_patch], b.logits[0, : 3 * per_patch])
    torch.testing.assert_close(a.logits[1], b.logits[1])
    torch.testing.assert_close(a.clip_logits, b.clip_logits)
    torch.testing.assert_close(a.loss, b.loss)


@POOLINGS
def test_a_mask_over_tokens_may_leave_out_frequencies(pooling):
    """What is pooled is what is left: the patches above change nothing."""
    model = detector(frame_pooling=pooling)
    mask = torch.ones(1, 65)
    mask[:, 1:].unflatten(1, (8, 8))[..., 5:] = 0
    low, high = log_mels(1), log_mels(1)
    high[..., 80:] += 5.0
    with torch.inference_mode():
        a, b = (model(values, attention_mask=mask) for values in (low, high))
        c = model(high)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=0)
    assert (a.logits - c.logits).abs().max() > 1e-2


@RATES
def test_a_mask_of_ones_is_no_mask(rate, per_patch):
    model, labels = detector(steps_per_second=rate), torch.rand(2, 8 * per_patch, 3)
    with torch.inference_mode():
        masked = model(log_mels(), labels=labels, attention_mask=torch.ones(2, 128))
        plain = model(log_mels(), labels=labels)
    for name in ("logits", "clip_logits", "loss"):
        torch.testing.assert_close(masked[name], plain[name], atol=1e-6, rtol=1e-6)


def test_a_clip_that_is_all_padding_harms_no_other():
    model, labels = detector(steps_per_second=12.5), torch.rand(2, 16, 3)
    outputs = model(log_mels(), labels=labels, attention_mask=sounding(0, 128))
    outputs.loss.backward()
    assert outputs.clip_logits.isfinite().all()
    torch.testing.assert_close(outputs.loss, model(log_mels()[1:], labels=labels[1:]).loss)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --- loss


def cross_entropy(logit: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    score = logit.double().sigmoid()
    return -(label.double() * score.log() + (1 - label.double()) * (1 - score).log())


@RATES
def test_the_loss_is_the_mean_over_known_labels_of_steps_with_sound(rate, per_patch):
    model = detector(steps_per_second=rate)
    labels = torch.rand(2, 8 * per_patch, 3)
    labels[0, 1], labels[1, :, 2], labels[1, -1] = -100, -100, -100
    outputs = model(log_mels(), labels=labels, attention_mask=sounding(75, 128))
    last = -(-75 * per_patch // 16)
    known = [(0, t, c) for t in range(last) for c in range(3) if t != 1] + [(1, t, c) for t in range(8 * per_patch - 1) for c in range(2)]
    expected = torch.stack([cross_entropy(outputs.logits[i], labels[i]) for i in known]).mean()
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_weak_labels_add_to_strong_ones_with_their_weight(weight):
    model = detector(clip_loss_weight=weight)
    labels, clip_labels = torch.rand(2, 8, 3), torch.tensor([[1.0, 0.0, -100.0], [0.25, -100.0, -100.0]])
    strong = model(log_mels(), labels=labels).loss
    weak = model(log_mels(), clip_labels=clip_labels)
    both = model(log_mels(), labels=labels, clip_labels=clip_labels).loss
    known = [(0, 0), (0, 1), (1, 0)]
    expected = weight * torch.stack([cross_entropy(weak.clip_logits[i], clip_labels[i]) for i in known]).mean()
    assert weak.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert both.item() == pytest.approx((strong + expected).item(), rel=1e-5)


@POOLINGS
@pytest.mark.parametrize("given", [("labels",), ("clip_labels",), ("labels", "clip_labels")])
def test_every_parameter_has_a_gradient_whatever_labels_there_are(given, pooling):
    """As `DistributedDataParallel` needs it. Of labels that are absent, and of unknown ones, there is nothing to learn."""
    model = detector(frame_pooling=pooling)
    labels = {"labels": torch.rand(2, 8, 3), "clip_labels": torch.rand(2, 3)}
    model(log_mels(), **{name: labels[name] for name in given}).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert bool(gradients["time_attention.weight"].any()) == ("clip_labels" in given)
    assert gradients["frame_classifier.weight"].any()


def test_the_loss_of_nothing_known_is_nothing():
    model = detector()
    loss = model(log_mels(), labels=torch.full((2, 8, 3), -100), clip_labels=torch.full((2, 3), -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("value", [torch.nan, -1.0, 1.5])
def test_labels_that_are_not_fractions_are_not_taken_for_unknown(value):
    labels = torch.rand(2, 8, 3)
    labels[0, 0, 0] = value
    with pytest.raises(ValueError, match=rf"labels has {value:g}, but numbers from 0 \(absent\) to 1 \(present\) are expected, and -100"):
        detector()(log_mels(), labels=labels)
    with pytest.raises(ValueError, match=f"clip_labels has {value:g}"):
        detector()(log_mels(), clip_labels=labels[:, 0])


def test_other_classes_have_neither_thresholds_nor_a_calibration(tmp_path):
    given = {"event_detection": {"threshold": {"cat": 0.9}}, "calibration": {"temperature": 2.0}}
    detector(id2label={0: "cat", 1: "dog"}, num_labels=2, **given).save_pretrained(tmp_path)
    same = SSLAMForAudioFrameClassification.from_pretrained(tmp_path, id2label={0: "cat", 1: "dog"}).config
    assert (same.event_detection, same.calibration) == tuple(given.values())
    more = {0: "cat", 1: "dog", 2: "cow"}
    for changes in ({"id2label": more}, {"num_labels": 3}, {"label2id": {name: i for i, name in more.items()}}):
        config = SSLAMForAudioFrameClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **changes).config
        assert config.num_labels == 3
        assert (config.event_detection, config.calibration) == (None, None)
    own = {"event_detection": {"threshold": {"cow": 0.1}}, "id2label": more}
    config = SSLAMForAudioFrameClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **own).config
    assert (config.event_detection, config.calibration) == (own["event_detection"], None)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"labels": torch.zeros(2, 7, 3)}, r"labels has shape \(2, 7, 3\), but \(2, 8, 3\) is expected"),
        ({"labels": torch.zeros(2, 8, dtype=torch.long)}, r"labels has shape \(2, 8\), but \(2, 8, 3\)"),
        ({"clip_labels": torch.zeros(2)}, r"clip_labels has shape \(2,\), but \(2, 3\)"),
    ],
)
def test_labels_of_other_shapes_are_rejected(labels, message):
    with pytest.raises(ValueError, match=message):
        detector()(log_mels(), **labels)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    labels = torch.rand(4, 8, 3)
    clips = [{"input_values": values, "labels": strong, "clip_labels": strong.amax(0)} for values, strong in zip(log_mels(4), labels)]
    norms = []
    for steps in (1, 4):
        torch.manual_seed(0)
        sizes = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps, "max_steps": 1, "logging_steps": 1}
        arguments = TrainingArguments(tmp_path, **sizes, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
        trainer = Trainer(SSLAMForAudioFrameClassification(tiny_config(num_labels=3)), arguments, train_dataset=clips)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_it_learns_when_sounds_are():
    """Two sounds, which overlap in some clips: on clips that it has not seen the steps of both are found."""
    generator = torch.Generator().manual_seed(0)

    def clips(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, labels = torch.randn(n, 64, 128, generator=generator) * 0.3, torch.zeros(n, 4, 2)
        active = torch.rand(n, 4, 2, generator=generator) < 0.4
        for sound, bins in enumerate((slice(16, 48), slice(80, 112))):
            values[:, :, bins] += 2 * active[..., sound].repeat_interleave(16, 1)[..., None]
            labels[..., sound] = active[..., sound]
        return values, labels

    model = SSLAMForAudioFrameClassification(tiny_config(num_labels=2)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        values, labels = clips(32)
        optimizer.zero_grad()
        model(values, labels=labels).loss.backward()
        optimizer.step()
    values, labels = clips(48)
    with torch.inference_mode():
        right = (model.eval()(values).logits > 0) == labels.bool()
    assert right.float().mean() > 0.97


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = detector(steps_per_second=12.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(log_mels(), labels=torch.full((2, 16, 3), 0.5), clip_labels=torch.ones(2, 3)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# --- half precision, compiled, exported


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@RATES
def test_half_precision(rate, per_patch, dtype, tolerance):
    model, labels = detector(steps_per_second=rate), torch.rand(2, 8 * per_patch, 3)
    inputs = {"input_values": log_mels(), "attention_mask": sounding(75, 128), "labels": labels, "clip_labels": labels.amax(1)}
    with torch.inference_mode():
        expected = model(**inputs)
        actual = model.to(dtype)(**inputs)
    assert (actual.logits.dtype, actual.clip_logits.dtype, actual.loss.dtype) == (dtype, dtype, torch.float32)
    valid = -(-75 * per_patch // 16)
    assert relative_error(actual.logits[1].float(), expected.logits[1]) < tolerance
    assert relative_error(actual.logits[0, :valid].float(), expected.logits[0, :valid]) < tolerance
    assert relative_error(actual.clip_logits.float(), expected.clip_logits) < tolerance
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)


def test_the_loss_of_a_large_batch_does_not_overflow_in_half_precision():
    """Its sum over 8 x 256 steps and 400 classes is above the largest float16, 65504."""
    model = detector(num_labels=400, steps_per_second=100).half()
    loss = model(log_mels(8, 256), labels=torch.zeros(8, 256, 400)).loss
    assert loss > 65_504 / (8 * 256 * 400)
    assert loss.isfinite()


@POOLINGS
def test_heads_run_outside_autocast(pooling):
    model = detector(steps_per_second=25, frame_pooling=pooling)
    inputs = {"input_values": log_mels(), "attention_mask": sounding(75, 128)}
    labels = torch.rand(2, 32, 3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs, labels=labels)
        patches = model.sslam.frame_embeddings(model.sslam(**inputs).last_hidden_state)
    outputs.loss.backward()
    sounds, steps = model._sounding(sounding(75, 128).bool(), 8)
    with torch.inference_mode():
        expected, expected_clip = model._classify(patches.float(), sounds, steps)
    assert outputs.logits.dtype == torch.float32
    assert torch.equal(outputs.logits, expected)
    assert torch.equal(outputs.clip_logits, expected_clip)


@pytest.mark.parametrize(("rate", "per_patch", "pooling"), [(6.25, 1, "mean"), (25, 4, "attention")])
def test_traces_into_one_graph(rate, per_patch, pooling):
    torch.compiler.reset()  # what other models were compiled to counts towards the limit
    model = detector(steps_per_second=rate, frame_pooling=pooling)
    traced = torch.compile(model, fullgraph=True, backend="eager")
    labels = {"labels": torch.rand(2, 8 * per_patch, 3), "clip_labels": torch.rand(2, 3)}
    for inputs in ({}, {"attention_mask": sounding(75, 128)}, labels, labels | {"attention_mask": sounding(75, 128)}):
        expected, actual = model(log_mels(), **inputs), traced(log_mels(), **inputs)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [6.25, 25])
def test_compiles_into_one_graph_and_trains(rate):
    model = detector(steps_per_second=rate, frame_pooling="attention")
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    inputs = {"labels": torch.rand(2, int(rate * 1.28), 3), "clip_labels": torch.rand(2, 3), "attention_mask": sounding(75, 128)}
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        outputs = network(log_mels(), **inputs)
        outputs.loss.backward()
        gradients.append((outputs.logits[1].detach(), outputs.clip_logits.detach(), *(parameter.grad for parameter in model.parameters())))
    for expected, actual in zip(*gradients):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("rate", "per_patch", "masked"), [(6.25, 1, False), (6.25, 1, True), (25, 4, True)])
def test_exports_for_any_batch_and_length(rate, per_patch, masked):
    model = detector(steps_per_second=rate, frame_pooling="attention", clip_weighting=masked)
    batch, patches = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("patches", min=2, max=16)
    kwargs, inputs = {"input_values": log_mels(3, 64)}, {"input_values": log_mels(5, 144)}
    if masked:
        kwargs["attention_mask"] = torch.ones(3, 64, dtype=torch.long)
        inputs["attention_mask"] = sounding(*range(40, 140, 20), of=144)
    program = torch.export.export(model, (), kwargs, dynamic_shapes={name: {0: batch, 1: 16 * patches} for name in kwargs}).module()
    with torch.inference_mode():
        actual, expected = program(**inputs), model(**inputs)
    assert actual.logits.shape == (5, 9 * per_patch, 3)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.clip_logits, expected.clip_logits, atol=1e-5, rtol=1e-5)


# --- configuration


@pytest.mark.parametrize("rate", [0, -6.25, 7, 30, 18.75, 200, torch.inf, torch.nan])
def test_steps_that_are_not_whole_frames_are_rejected(rate):
    with pytest.raises(ValueError, match=f"steps_per_second is {rate}, but must give steps of whole frames: 6.25, 12.5 or 25"):
        tiny_config(steps_per_second=rate)


@pytest.mark.parametrize(("rate", "patch", "multiple"), [(10, 16, "6.25"), (20, 16, "6.25"), (6.25, 8, "12.5")])
def test_patches_that_are_not_whole_steps_are_rejected(rate, patch, multiple):
    """By the model, as other models do without."""
    config = tiny_config(steps_per_second=rate, patch_size=patch)
    with pytest.raises(ValueError, match=f"steps_per_second is {rate} and patch_size {patch}, .* a multiple of {multiple}"):
        SSLAMForAudioFrameClassification(config)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"frame_pooling": "max"}, StrictDataclassError),
        ({"steps_per_second": "25"}, StrictDataclassError),
        ({"event_detection": 0.5}, StrictDataclassError),
        ({"clip_loss_weight": -1.0}, ValueError),
    ],
)
def test_unusable_settings_are_rejected(kwargs, error):
    with pytest.raises(error, match=next(iter(kwargs))):
        tiny_config(**kwargs)


def test_patches_that_training_would_drop_are_rejected():
    model = detector(patch_drop_rate=0.5)
    assert model(log_mels()).logits.shape == (2, 8, 3)
    with pytest.raises(ValueError, match="patch_drop_rate is 0.5, but every time step needs its patches: set it to 0"):
        model.train()(log_mels())


def test_settings_of_events_are_saved_with_the_model(tmp_path):
    settings = {"threshold": {"LABEL_0": 0.25}, "median_filter": 0.48}
    detector(event_detection=settings, steps_per_second=25, frame_pooling="attention").save_pretrained(tmp_path)
    config = SSLAMForAudioFrameClassification.from_pretrained(tmp_path).config
    assert (config.event_detection, config.steps_per_second, config.frame_pooling) == (settings, 25, "attention")
    assert config.frames_per_step == 4


# --- checkpoints


@POOLINGS
def test_save_and_load_keep_every_bit(tmp_path, pooling):
    model = detector(frame_pooling=pooling)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForAudioFrameClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is SSLAMForAudioFrameClassification
    assert not any(report.values())
    assert_same(loaded.state_dict(), model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["SSLAMForAudioFrameClassification"]


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []


def missing_keys(folder, **kwargs) -> tuple[SSLAMForAudioFrameClassification, list[str]]:
    """The model and what is new in it. A whole encoder is a promise."""
    model, report = SSLAMForAudioFrameClassification.from_pretrained(folder, output_loading_info=True, **kwargs)
    new = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    assert not report["unexpected_keys"]
    assert not [name for name in new if name.startswith("sslam.")]
    return model, new


HEAD = [f"{layer}.{part}" for layer in ("frame_classifier", "layernorm", "time_attention") for part in ("bias", "weight")]


@pytest.mark.parametrize("origin", [SSLAMModel, SSLAMForPreTraining])
def test_an_encoder_or_pre_training_checkpoint_gets_a_new_head(origin, tmp_path):
    saved = origin(tiny_config(num_views=2, unmixed_span_length=32))
    saved.save_pretrained(tmp_path)
    model, new = missing_keys(tmp_path, num_labels=3, steps_per_second=12.5)
    assert new == HEAD
    encoder = saved if origin is SSLAMModel else saved.sslam
    assert_same(model.sslam.state_dict(), encoder.state_dict())
    assert model(log_mels()).logits.shape == (2, 16, 3)


def test_a_classifier_gives_its_encoder_and_its_norm(tmp_path):
    classifier = SSLAMForAudioClassification(tiny_config(num_labels=3))
    torch.nn.init.normal_(classifier.layernorm.weight)
    classifier.save_pretrained(tmp_path)
    model, new = missing_keys(tmp_path)
    assert new == [name for name in HEAD if not name.startswith("layernorm")]
    assert torch.equal(model.layernorm.weight, classifier.layernorm.weight)
    assert_same(model.sslam.state_dict(), classifier.sslam.state_dict())


def test_a_detector_is_not_taken_for_a_classifier(tmp_path, caplog):
    """Its head scores time steps: on the pooled output it would give numbers that mean nothing."""
    detector().save_pretrained(tmp_path)
    SSLAMFeatureExtractor().save_pretrained(tmp_path)
    _, report = SSLAMForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {"classifier.weight", "classifier.bias"} <= set(report["missing_keys"])
    assert "this model detects events: as a classifier it has a new head, whose scores mean nothing" in caplog.text
    with pytest.raises(UserError, match="is a detector of events, but a classifier of clips is needed"):
        load_model(SSLAMForAudioClassification, str(tmp_path))


@POOLINGS
def test_the_encoder_of_a_detector_is_its_own(pooling, tmp_path):
    model = detector(frame_pooling=pooling)
    model.save_pretrained(tmp_path)
    encoder, report = SSLAMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same(encoder.state_dict(), model.sslam.state_dict())


def official(kind: str, folder):
    if kind == "pre-trained .pt":
        return save_pretrained_fairseq(folder / "model.pt")
    if kind == "fine-tuned .pt":
        return save_fine_tuned_fairseq(folder / "model.pt", classes=7)
    return save_hub_folder(folder / "hub", classes=7 if kind == "fine-tuned Hub" else 0)


@pytest.mark.parametrize("kind", ["pre-trained .pt", "fine-tuned .pt", "pre-trained Hub", "fine-tuned Hub"])
def test_an_official_checkpoint_is_a_start(kind, tmp_path, monkeypatch):
    source = official(kind, tmp_path)
    encoder = convert_checkpoint(source, tmp_path / "converted")
    monkeypatch.setattr("transformers_sslam.publishing.conversion.convert_to_cache", lambda checkpoint: tmp_path / "converted")
    model = SSLAMForAudioFrameClassification.from_official(source, num_labels=3, ignore_mismatched_sizes=True)
    assert_same(model.sslam.state_dict(), getattr(encoder, "sslam", encoder).state_dict())
    assert model(log_mels()).logits.shape == (2, 8, 3)


# --- with the feature extractor


def test_steps_of_clips_of_any_length_are_those_of_the_clip_alone():
    """The mask is the extractor's: a second has 98 frames, which begin 6 whole steps and part of another."""
    model, extractor = detector(), SSLAMFeatureExtractor(max_length=256)
    clips = [noise(1.0), noise(2.2, seed=1)]
    padding = {"padding": "longest", "sampling_rate": 16_000, "return_tensors": "pt", "return_attention_mask": True}
    model.config.padding_value = extractor.scaled_padding_value
    with torch.inference_mode():
        both = model(**extractor(clips, **padding))
        alone = [model(**extractor(clip, **padding)) for clip in clips]
    for i, steps in enumerate((7, 14)):
        torch.testing.assert_close(both.logits[i, :steps], alone[i].logits[0, :steps], atol=1e-5, rtol=0)
        torch.testing.assert_close(both.clip_logits[i], alone[i].clip_logits[0], atol=1e-5, rtol=0)


def test_the_signature_is_that_of_audio_models():
    assert list(inspect.signature(SSLAMForAudioFrameClassification.forward).parameters)[1:3] == ["input_values", "labels"]
