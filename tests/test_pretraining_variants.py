"""The paper's ablations of pre-training: mixtures alone, and mixtures without source retention."""

import pytest
import torch
from conftest import tiny_config
from test_pretraining_model import build, log_mels, seeded

from transformers_sslam.masking import inverse_block_masks
from transformers_sslam.modeling_sslam_pretraining import SSLAMForPreTrainingOutput, content_share
from transformers_sslam.pretraining.monitoring import training_flops_per_clip


def score(teacher_passes: list | None = None, batch: int = 3, **settings) -> SSLAMForPreTrainingOutput:
    """The same weights, clips, masks and spans each time, without noise."""
    model = build(mask_noise_std=0.0, **settings)
    if teacher_passes is not None:
        model.teacher.layers[0].register_forward_hook(lambda module, inputs, output: teacher_passes.append(inputs[0].shape))
    masks = inverse_block_masks(batch * 2, 8, 8, mask_ratio=0.7, generator=seeded())
    return model(log_mels(batch), masks, torch.tensor([16, 80]), output_targets=True)


def test_mixtures_alone_are_the_mixed_half_of_both():
    both = score(source_retention_loss_weight=0.0)
    alone = score(source_retention_loss_weight=0.0, use_unmixed=False)
    assert both.sample_size == 2 * alone.sample_size
    for name in ("predictions", "cls_predictions", "local_targets", "global_targets"):
        whole = getattr(both, name)
        torch.testing.assert_close(getattr(alone, name), whole[len(whole) // 2 :], rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(alone.mixed_input_values, both.mixed_input_values)
    assert not torch.equal(alone.mixed_input_values, log_mels(3))


def test_losses_of_mixtures_alone_by_hand():
    both = score(source_retention_loss_weight=0.0)
    alone = score(source_retention_loss_weight=0.0, use_unmixed=False)
    views = 6  # two of each of three clips
    local = (both.predictions[views:] - both.local_targets[views:]).square().sum() / 32**0.5 / alone.sample_size
    overall = (both.cls_predictions[views:] - both.global_targets[3:].repeat_interleave(2, 0)).square().sum() / 32**0.5
    torch.testing.assert_close(alone.local_loss, local, rtol=1e-5, atol=0)
    torch.testing.assert_close(alone.global_loss, overall, rtol=1e-5, atol=0)
    torch.testing.assert_close(alone.loss, local + overall, rtol=1e-5, atol=0)
    assert alone.source_retention_loss is None
    assert 0 < alone.content_share < 1


def test_the_content_share_is_that_of_unmixed_clips_where_there_are_any(monkeypatch):
    scored = []
    monkeypatch.setattr(
        "transformers_sslam.modeling_sslam_pretraining.content_share", lambda targets: scored.append(targets) or content_share(targets)
    )
    for settings in ({}, {"source_retention_loss_weight": 0.0}, {"source_retention_loss_weight": 0.0, "use_unmixed": False}):
        score(**settings)
    full, without_retention, alone = scored
    assert [len(targets) for targets in scored] == [3, 3, 3]
    assert torch.equal(full, without_retention)
    assert not torch.allclose(full, alone)


def test_a_weight_of_nothing_leaves_retention_and_its_pass_of_the_teacher_out():
    """The pass over foreign sources receives CLS and the 32 patches outside two spans of two time steps."""
    with_passes, without_passes = [], []
    with_retention = score(with_passes)
    without = score(without_passes, source_retention_loss_weight=0.0)
    assert with_passes == [(6, 65, 32), (3, 33, 32)]
    assert without_passes == [(6, 65, 32)]
    assert without.source_retention_loss is None
    assert without.source_retention_targets is None
    torch.testing.assert_close(without.loss, without.local_loss + without.global_loss)
    torch.testing.assert_close(without.loss, with_retention.loss - with_retention.source_retention_loss)


@pytest.mark.parametrize("settings", [{}, {"use_mixtures": False}, {"use_mixtures": False, "source_retention_loss_weight": 0.0}])
def test_without_unmixed_clips_there_must_be_mixtures_and_no_retention(settings):
    with pytest.raises(
        ValueError, match="use_unmixed is False, use_mixtures .* but mixtures alone need use_mixtures=True and a weight of 0"
    ):
        tiny_config(use_unmixed=False, **settings)


HALF = 12_629_760


@pytest.mark.parametrize(
    ("settings", "operations"),
    [
        ({"use_mixtures": False}, HALF),
        ({"use_unmixed": False, "source_retention_loss_weight": 0.0}, HALF),
        ({"source_retention_loss_weight": 0.0}, 2 * HALF),
        ({}, 2 * HALF + 1_360_128),
    ],
)
def test_operations_of_every_variant_by_hand(settings, operations):
    """Width 32, two blocks, hidden 64: 32,768 t + 256 t^2 for t tokens. 64 patches, of which 12 are visible.

    Embedding of a clip: 64 * 2 * 256 * 32 = 1,048,576. Decoder of a view: twice 2 * 64 * 32 * 32 * 9 / 8, and 2 * 52 * 32 * 32 at the end,
    401,408. Student of a half: two views of 13 tokens (469,248) with decoder, and one embedding: 2,789,888, times three for the backward.
    Teacher of a half: 65 tokens (3,211,520) and one embedding: 4,260,096. Retention: 33 tokens.
    """
    config = tiny_config(num_views=2, num_unmixed_spans=2, unmixed_span_length=32, **settings)
    assert training_flops_per_clip(config, 128) == operations
