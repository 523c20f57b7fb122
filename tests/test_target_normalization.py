"""Targets of pre-training that are normalised by running statistics, in place of over each clip."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from processes import run_on_two
from test_pretraining_model import assert_same, build, log_mels, seeded, snapshot

from transformers_sslam import PRETRAINING_STAGES, AutoModel, SSLAMForAudioClassification, SSLAMForPreTraining
from transformers_sslam.objective_sslam import RunningNorm


def running(**settings) -> SSLAMForPreTraining:
    return build(target_normalization="running", **settings)


def mlp_outputs(model: SSLAMForPreTraining, clips: torch.Tensor) -> torch.Tensor:
    """What the teacher's blocks make of clips' patches: (blocks, clips, patches, width)."""
    with torch.no_grad():
        return torch.stack(model.teacher(clips, output_mlp_outputs=True).mlp_outputs)[:, :, 1:]


def norm() -> RunningNorm:
    module = RunningNorm(num_layers=2, num_patches=9, width=4)
    for buffer in module.buffers():
        buffer.zero_()
    return module


def test_values_are_centred_at_each_position_and_scaled_by_the_statistics_of_all_batches_so_far():
    module, batches = norm(), torch.randn(3, 5, 7, 4, generator=seeded()) * 3 + 2 + torch.arange(7.0)[:, None]
    for batch in batches:
        actual = module(batch, 1, update=True)
    centred = batches - batches.mean((0, 1))
    deviation = (centred.square().mean((0, 1, 2)) + 1e-5).sqrt()
    torch.testing.assert_close(actual, centred[2] / deviation, rtol=1e-4, atol=1e-4)
    assert module.num_batches.tolist() == [[0] * 9, [3] * 7 + [0] * 2]
    assert not module.means[0].any()  # of the other block
    positions = torch.tensor([[6, 0], [1, 3], [2, 2], [5, 4], [0, 1]])
    some = batches[2].gather(1, positions[..., None].expand(-1, -1, 4))
    expected = actual.gather(1, positions[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(module(some, 1, positions), expected)


def test_from_the_two_hundredth_batch_on_a_new_one_counts_a_two_hundredth():
    module = norm()
    for _ in range(250):
        module(torch.zeros(2, 3, 4), 0, update=True)
    module(torch.full((2, 3, 4), 5.0), 0, update=True)
    torch.testing.assert_close(module.means[0, :3], torch.full((3, 4), 5 / 200))
    torch.testing.assert_close(module.mean_squares[0], torch.full((4,), 25 / 200))
    module(torch.full((2, 4, 4), 5.0), 0, update=True)  # a position that was not there before begins with its own mean
    torch.testing.assert_close(module.means[0, 3], torch.full((4,), 5.0))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_batch_that_overflowed_changes_no_statistics(value):
    module, batch = norm(), torch.randn(2, 3, 4, generator=seeded())
    overflowed = batch.clone()
    overflowed[1, 2, 3] = value
    module(overflowed, 0, update=True)  # the very first one
    module(batch, 0, update=True)
    before = snapshot(module)
    assert torch.allclose(before["means"][0, :3], batch.mean(0))
    module(overflowed, 0, update=True)
    assert_same(snapshot(module), before)


def test_targets_are_those_of_the_objective_written_out():
    """In training a batch is taken into the statistics before it is normalised; in evaluation it is not."""
    model = running(num_hidden_layers=3, local_target_layers=2, global_target_layers=1, use_mixtures=False)
    first, second = log_mels(4), log_mels(4).roll(64, dims=1)
    for clips in (first, second):
        model(clips)
    model.eval()
    before = snapshot(model.teacher)
    masks = torch.zeros(8, 64, dtype=torch.bool)
    masks[:, 5:] = True
    output = model(first, masks, output_targets=True)
    assert_same(snapshot(model.teacher), before)

    seen = torch.stack((mlp_outputs(model, first), mlp_outputs(model, second)))  # (batches, blocks, clips, patches, width)
    centred = seen - seen.mean((0, 2), keepdim=True)
    normalised = centred[0] / (centred.square().mean((0, 2, 3)) + 1e-5).sqrt()[:, None, None]
    local, overall = (torch.nn.functional.layer_norm(normalised[-n:].mean(0), (32,)) for n in (2, 1))
    torch.testing.assert_close(output.local_targets, local[:, 5:].repeat_interleave(2, 0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.global_targets, overall.mean(1), rtol=1e-4, atol=1e-4)


def test_a_source_of_a_mixture_is_normalised_by_the_same_statistics_and_adds_nothing_to_them():
    """The statistics are those of unmixed clips and mixtures, once each."""
    model = running()
    output = model(log_mels(3), unmixed_span_starts=torch.tensor([16, 80]), output_targets=True)
    clips = torch.cat((log_mels(3), output.mixed_input_values))
    seen = mlp_outputs(model, clips)
    norm = model.teacher.target_norm
    torch.testing.assert_close(norm.means[:, : seen.shape[2]], seen.mean(1), rtol=1e-4, atol=1e-5)
    assert norm.num_batches.max() == 1

    # Of the first clip's mixture: its partner, of which the teacher receives the mixed patches alone, normalised at their positions.
    kept = [patch for patch in range(64) if patch // 8 * 16 not in (16, 32, 80, 96)]
    partner = model.teacher.embeddings(log_mels(3)[2:])[:, [0] + [1 + patch for patch in kept]]
    with torch.no_grad():
        outputs = []
        for layer in model.teacher.layers:
            partner, mlp_output = layer(partner, return_mlp_output=True)
            outputs.append(norm(mlp_output[:, 1:], len(outputs), torch.tensor([kept])))
    foreign = torch.nn.functional.layer_norm(torch.stack(outputs).mean(0)[0], (32,))
    (own,) = model.eval().teacher.targets(model.teacher.embeddings(log_mels(3)[:1]), len(outputs))
    retained = own[0].clone()
    retained[kept] = (own[0][kept] + foreign) / 2
    masked = output.bool_masked_pos[0].nonzero()[:, 0]
    torch.testing.assert_close(output.source_retention_targets[0], retained[masked], rtol=1e-4, atol=1e-4)


def test_the_global_target_tells_clips_apart():
    """Over a clip the mean of instance-normalised channels is 0, which leaves only what the last layer norm makes of it."""
    spread = {}
    for kind in ("instance", "running"):
        model = build(target_normalization=kind, use_mixtures=False)
        clips = log_mels(8) + torch.linspace(-2, 2, 8)[:, None, None]  # as of eight levels
        spread[kind] = model(clips, output_targets=True).global_targets.var(0).mean().item()
    assert spread["running"] > 20 * spread["instance"]


def test_a_checkpoint_keeps_the_statistics_and_an_encoder_needs_none(tmp_path):
    model = running()
    model(log_mels())
    model.save_pretrained(tmp_path)
    loaded = SSLAMForPreTraining.from_pretrained(tmp_path).train()
    assert (loaded.teacher.target_norm.num_batches[:, :64] == 1).all()
    assert_same(snapshot(loaded), snapshot(model))
    assert torch.equal(loaded(log_mels(), generator=seeded()).loss, model(log_mels(), generator=seeded()).loss)
    for part in (AutoModel, SSLAMForAudioClassification):
        _, info = part.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not [name for name in info["missing_keys"] if "norm" in name and not name.startswith("layernorm")]


def test_a_run_may_change_to_running_statistics_which_then_begin_anew(tmp_path):
    build(**PRETRAINING_STAGES[1]).save_pretrained(tmp_path)
    model = SSLAMForPreTraining.from_pretrained(tmp_path, target_normalization="running").train()
    assert not model.teacher.target_norm.means.any()
    assert not model.teacher.target_norm.num_batches.any()
    assert model(log_mels()).loss.isfinite()


def test_half_precision_leaves_the_statistics_in_float32():
    model = running().to(torch.bfloat16)
    assert model.teacher.target_norm.means.dtype == torch.float32
    assert model(log_mels().bfloat16()).loss.isfinite()
    assert running().double()(log_mels().double()).loss.isfinite()


def test_compiles_as_one_graph_and_still_counts():
    model, expected = running(num_hidden_layers=1), running(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(0)
        loss = compiled(log_mels()).loss
        torch.manual_seed(0)
        torch.testing.assert_close(loss, expected(log_mels()).loss)
    torch.testing.assert_close(snapshot(model.teacher), snapshot(expected.teacher))


def test_another_word_is_rejected():
    with pytest.raises(Exception, match="target_normalization"):
        tiny_config(target_normalization="batch")


TWO = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from test_target_normalization import running, log_mels
torch.distributed.init_process_group("gloo")
rank, model = torch.distributed.get_rank(), running(use_mixtures=False)
for step in (1, 2):
    model(log_mels(4).roll(step, dims=1)[2 * rank : 2 * rank + 2])
    model.update_teacher(step)
norm = model.teacher.target_norm
json.dump([norm.means.tolist(), norm.mean_squares.tolist()], open(f"{{sys.argv[1]}}/{{rank}}.json", "w"))
torch.distributed.destroy_process_group()
"""


def test_two_processes_have_the_statistics_of_all_clips(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=str(Path(__file__).parent)))
    run_on_two([script, tmp_path], tmp_path / "log", {**os.environ, "OMP_NUM_THREADS": "1"})
    model = running(use_mixtures=False)
    for step in (1, 2):
        model(log_mels(4).roll(step, dims=1))
        model.update_teacher(step)
    for rank in (0, 1):
        for name, found in zip(("means", "mean_squares"), json.loads((tmp_path / f"{rank}.json").read_text())):
            torch.testing.assert_close(torch.tensor(found), getattr(model.teacher.target_norm, name), rtol=1e-4, atol=1e-5)
