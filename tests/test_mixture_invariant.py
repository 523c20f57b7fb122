"""The mixture-invariant baseline: its loss against every assignment, its targets, its gradients, a run."""

import itertools

import pytest
import torch
from conftest import tiny_config

from transformers_sslam import PRETRAINING_STAGES, SSLAMForPreTraining
from transformers_sslam.mixing import draw_sources
from transformers_sslam.objective_sslam import mixture_invariant_loss


pytest.importorskip("soundfile")
from test_host_synchronisation import HostSynchronisations, a_trainer, batches
from test_pretraining_loop import MODEL, interrupted_after, metrics, same_weights, sounds, trainer  # noqa: F401  # a fixture
from test_pretraining_mixtures import CONTENT, MASKS, check_resumed_run
from test_pretraining_model import build, log_mels, seeded, target

from transformers_sslam.pretraining.monitoring import training_flops_per_clip


BASELINE = {"objective": "mixture_invariant", "num_latent_sources": 3}


def example(sources: int, views: int = 6, patches: int = 7, width: int = 16) -> list[torch.Tensor]:
    """Latent sources, targets of two mixtures, and where the second is."""
    latent = torch.randn(views, patches, sources, width, generator=seeded(0))
    first, second = torch.randn(2, views, patches, width, generator=seeded(1))
    return [latent, first, second, torch.rand(views, patches, generator=seeded(9)) < 0.7]


def brute_force(latent: torch.Tensor, first: torch.Tensor, second: torch.Tensor, mixed_in: torch.Tensor) -> tuple[torch.Tensor, list]:
    """Each view and each assignment in turn, sums written out."""
    total, chosen = torch.zeros(()), []
    for view in range(len(latent)):
        errors = {}
        for assignment in itertools.product((False, True), repeat=latent.shape[2]):
            sums = [torch.zeros_like(first[view]), torch.zeros_like(first[view])]
            for source, to_first in enumerate(assignment):
                sums[0 if to_first else 1] = sums[0 if to_first else 1] + latent[view, :, source]
            error = ((sums[0] - first[view]) ** 2).sum() + ((sums[1] - second[view])[mixed_in[view]] ** 2).sum()
            errors[assignment] = error / latent.shape[3] ** 0.5 / 2
        best = min(errors, key=errors.get)
        total = total + errors[best]
        chosen.append(list(best))
    return total, chosen


@pytest.mark.parametrize("sources", [2, 3, 4, 6])
def test_the_loss_and_its_gradient_are_those_of_the_best_of_all_assignments(sources):
    latent, *rest = example(sources)
    latent.requires_grad_()
    loss, assignments = mixture_invariant_loss(latent, *rest)
    expected, chosen = brute_force(latent, *rest)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert assignments.tolist() == chosen
    assert len({tuple(row) for row in chosen}) > 1
    (gradient,), (wanted,) = (torch.autograd.grad(value, latent) for value in (loss, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_sources_that_add_up_to_the_mixtures_are_found():
    """Two mixtures, of the sources 0 and 3, and 1 and 2."""
    latent, *_, there = example(4)
    loss, assignments = mixture_invariant_loss(latent, latent[:, :, 0] + latent[:, :, 3], latent[:, :, 1] + latent[:, :, 2], there)
    assert loss.item() == pytest.approx(0, abs=1e-8)
    assert (assignments == torch.tensor([True, False, False, True])).all()


def test_neither_the_order_of_the_sources_nor_that_of_the_mixtures_matters():
    latent, first, second, _ = example(5)
    everywhere = torch.ones(latent.shape[:2], dtype=torch.bool)
    loss, assignments = mixture_invariant_loss(latent, first, second, everywhere)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted, reassigned = mixture_invariant_loss(latent[:, :, order], first, second, everywhere)
    torch.testing.assert_close(permuted, loss, rtol=1e-6, atol=0)
    assert torch.equal(reassigned, assignments[:, order])
    swapped, opposite = mixture_invariant_loss(latent, second, first, everywhere)
    torch.testing.assert_close(swapped, loss, rtol=1e-6, atol=0)
    assert torch.equal(opposite, ~assignments)


def test_half_precision_chooses_in_float32():
    latent, *rest = example(4)
    expected = mixture_invariant_loss(latent, *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, assignments = mixture_invariant_loss(latent, *rest)
    assert torch.equal(loss, expected[0])
    assert torch.equal(assignments, expected[1])


# --- in the model


@pytest.mark.parametrize("starts", [[16, 80], [[16, 80], [0, 64], [96, 32], [0, 32]]], ids=["shared", "per clip"])
@pytest.mark.parametrize("free", [{}, {"gain_db": [-5, 5]}, {"num_sources": 3}, {"num_sources": [2, 4], "gain_db": [-5, 5]}], ids=str)
def test_the_loss_is_that_of_the_two_mixtures_of_each_mixture(starts, free):
    """Written out: the clip, the third and the fifth source are the first mixture, the others the second, which spans leave out."""
    model, x, starts = build(mask_noise_std=0.0, **CONTENT, **BASELINE, **free), 0.2 * log_mels(4), torch.tensor(starts)
    # Sources of which each mixture has some: those of a new decoder are alike in all views.
    model.decoder.source_projection.register_forward_hook(lambda *call: 0.03 * torch.randn(call[2].shape, generator=seeded(7)))
    output = model(x, MASKS, starts, generator=seeded(5), output_targets=True)
    assert 0 < output.assignments.float().mean() < 1
    drawn = draw_sources(4, free.get("num_sources", 2), gain_db=free.get("gain_db"), generator=seeded(5))
    total = torch.zeros(())
    for clip in range(4):
        spans = starts if starts.dim() == 1 else starts[clip]
        inside = torch.zeros(128, dtype=torch.bool)
        for start in spans.tolist():
            inside[start : start + 32] = True
        mixtures = [[x[clip]], []]
        for i, other in enumerate(drawn.partners[:, clip].tolist()):
            if drawn.present is None or drawn.present[i, clip]:
                gain = 0.0 if drawn.gain_db is None else drawn.gain_db[i, clip].item()
                mixtures[1 - i % 2].append(x[other] + gain * torch.log(torch.tensor(10.0)) / 91.38)
        first, second = (torch.stack(sources).amax(0) for sources in mixtures)
        kept = [patch for patch in range(64) if not inside[patch // 8 * 16]]
        wanted = target(model, torch.where(inside[:, None], x[clip], first), None), torch.zeros(64, 32)
        wanted[1][kept] = target(model, second, None, kept)
        there = ~inside[::16].repeat_interleave(8)
        for view in (2 * clip, 2 * clip + 1):
            mask = MASKS[view]
            error, chosen = brute_force(
                output.latent_predictions[view, None].detach(), *(values[mask][None] for values in (*wanted, there))
            )
            assert output.assignments[view].tolist() == chosen[0]
            total += error
    torch.testing.assert_close(output.source_retention_loss.detach(), 2 * total / output.sample_size, rtol=2e-4, atol=0)
    torch.testing.assert_close(output.loss, output.local_loss + output.global_loss + output.source_retention_loss)


def test_all_but_the_loss_of_the_sources_is_as_in_sslam():
    """The same encoder, masks, spans and mixtures; one more projection."""
    sslam, baseline = build(mask_noise_std=0.0), build(mask_noise_std=0.0, **BASELINE)
    missing, unexpected = baseline.load_state_dict(sslam.state_dict(), strict=False)
    assert (missing, unexpected) == (["decoder.source_projection.weight", "decoder.source_projection.bias"], [])
    one, other = (model(log_mels(), generator=seeded(), output_targets=True) for model in (sslam, baseline))
    for name in ("local_loss", "global_loss", "mixed_input_values", "predictions", "bool_masked_pos", "target_std"):
        assert torch.equal(one[name], other[name]), name
    assert other.source_retention_targets is None
    assert not torch.equal(one.source_retention_loss, other.source_retention_loss)


def test_gradients_reach_every_source_that_is_ever_chosen_and_never_the_teacher():
    model = build(**BASELINE)
    model(log_mels()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("teacher."), name
    assert (model.decoder.source_projection.weight.grad.abs().sum(1) > 0).all()


def test_it_starts_from_the_checkpoint_of_stage_1_and_comes_back(tmp_path):
    first = build(**PRETRAINING_STAGES[1])
    first.save_pretrained(tmp_path / "1")
    second, info = SSLAMForPreTraining.from_pretrained(tmp_path / "1", **PRETRAINING_STAGES[2], **BASELINE, output_loading_info=True)
    assert {name.rpartition(".")[0] for name in info["missing_keys"]} == {"decoder.source_projection"}
    bound = 0.01 * 32**-0.5  # all sources alike at first
    assert 0.9 * bound < second.decoder.source_projection.weight.abs().max() <= bound
    second.save_pretrained(tmp_path / "2")
    again = SSLAMForPreTraining.from_pretrained(tmp_path / "2").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in second.state_dict().items())


def test_it_compiles_as_one_graph():
    model = build(num_hidden_layers=1, **BASELINE)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    losses = []
    for function in (model, compiled):
        torch.manual_seed(0)
        losses.append(function(log_mels()).loss)
    torch.testing.assert_close(*losses)


def test_a_step_has_no_synchronisation(tmp_path):
    run = a_trainer(tmp_path, model_config={**MODEL, **BASELINE, "num_sources": [2, 4]})
    with HostSynchronisations() as synchronisations:
        run._train(batches(run))
    assert synchronisations.found == []


@pytest.mark.parametrize(
    ("settings", "teacher"),
    [({}, 0), ({"gain_db": [0, 0]}, 1_048_576), ({"num_sources": 4}, 2 * 1_048_576 + 3_211_520)],
    ids=str,
)
def test_operations_by_hand(settings, teacher):
    """As in test_pretraining_variants.py; a projection of 52 masked patches to three times 32 for each of two views, with its backward."""
    config = tiny_config(num_views=2, unmixed_span_length=32)
    baseline = tiny_config(num_views=2, unmixed_span_length=32, **BASELINE, **settings)
    projection = 3 * 2 * 2 * 52 * 32 * 3 * 32
    assert training_flops_per_clip(baseline, 128) == training_flops_per_clip(config, 128) + projection + teacher


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_latent_sources": 1}, "num_latent_sources is 1, but must be 2 to 10, because all 2"),
        ({"num_latent_sources": 11}, "num_latent_sources is 11"),
        (
            {"use_mixtures": False},
            "objective is 'mixture_invariant', use_mixtures False and source_retention_loss_weight 2",
        ),
        ({"source_retention_loss_weight": 0}, "use_mixtures True and source_retention_loss_weight 0, but its loss needs mixtures"),
        ({"use_unmixed": False}, "mixtures alone need use_mixtures=True and a weight of 0"),
    ],
    ids=str,
)
def test_settings_that_contradict_it_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{**BASELINE, **settings})


# --- a run


def test_a_stopped_run_resumes_bit_for_bit(sounds, tmp_path):  # noqa: F811
    changes = {"model_config": {**MODEL, **BASELINE, "num_sources": [2, 4], "gain_db": [-5, 5]}}
    check_resumed_run(sounds, tmp_path, **changes)


def test_a_run_learns_and_does_not_collapse(sounds, tmp_path):  # noqa: F811
    changes = {"max_steps": 60, "warmup_steps": 5, "learning_rate": 5e-3, "save_steps": 100, "logging_steps": 20}
    trainer(sounds, tmp_path, **changes, model_config={**MODEL, **BASELINE}).run()
    lines = metrics(tmp_path)
    losses = [sum(line["source_retention_loss"] for line in part) / 10 for part in (lines[:10], lines[-10:])]
    assert losses[1] < losses[0]
    assert min(line["target_std"] for line in lines) > 0.5
    assert min(line["prediction_std"] for line in lines[30:]) > 0.02
