"""Unmixed spans and partial mixtures: the published bounds, any other length, and what is refused."""

import pytest
import torch

from transformers_sslam import mixing
from transformers_sslam.mixing import check_unmixed_spans, draw_unmixed_spans, mixed_time_patches, partial_mixture


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_published_spans_have_the_published_bounds_and_are_uniform():
    first, second = draw_unmixed_spans(1024, num_clips=64_000, generator=seeded()).unbind(1)
    starts, counts = first.unique(return_counts=True)
    assert starts.tolist() == list(range(0, 512, 16))
    assert (counts - 2000).abs().max() < 4 * 2000**0.5
    for start in (0, 256, 496):
        following, counts = second[first == start].unique(return_counts=True)
        assert following.tolist() == list(range(start + 240, 783, 16))
        assert (counts - counts.float().mean()).abs().max() < 4 * counts.float().mean() ** 0.5


@pytest.mark.parametrize(
    ("frames", "spans", "length", "patch"),
    [(1024, 2, 240, 16), (496, 2, 240, 16), (256, 1, 16, 16), (256, 1, 240, 16), (512, 3, 112, 16), (2048, 5, 240, 16), (96, 2, 24, 8)],
)
def test_spans_fit_any_length_and_leave_something_to_mix(frames, spans, length, patch):
    starts = draw_unmixed_spans(frames, spans, length, patch, num_clips=2000, generator=seeded())
    assert starts.shape == (2000, spans)
    check_unmixed_spans(starts, 2000, frames, length, patch)
    mixed = mixed_time_patches(starts, frames, length, patch)
    assert (mixed.sum(1) == (frames - spans * length) // patch).all()
    assert mixed[:, -1].all(), "the last patch is always mixed"


def test_uniform_spans_take_every_placement_equally_often():
    """Two spans of two patches in seven: with three mixed patches there are 5 * 4 / 2 ways."""
    starts = draw_unmixed_spans(7 * 16, 2, 32, num_clips=20_000, placement="uniform", generator=seeded())
    check_unmixed_spans(starts, 20_000, 7 * 16, 32, 16)
    placements, counts = starts.unique(dim=0, return_counts=True)
    expected = [[16 * a, 16 * b] for a in range(6) for b in range(a + 2, 6)]
    assert placements.tolist() == expected
    assert len(expected) == 10
    assert (counts - 2000).abs().max() < 4 * 2000**0.5


def test_one_draw_serves_the_batch_unless_clips_are_counted():
    assert draw_unmixed_spans(1024).shape == (2,)
    per_clip = draw_unmixed_spans(1024, num_clips=50, generator=seeded())
    assert len(per_clip.unique(dim=0)) > 40
    assert torch.equal(per_clip, draw_unmixed_spans(1024, num_clips=50, generator=seeded()))


@pytest.mark.parametrize("starts", [torch.tensor([16, 80]), torch.tensor([[16, 80], [0, 64], [96, 32]])], ids=["shared", "per clip"])
def test_a_mixture_is_the_maximum_outside_the_spans_and_the_clip_inside(starts):
    x = torch.randn(3, 128, 8, generator=seeded())
    mixed = partial_mixture(x, mixed_time_patches(starts, 128, 32, 16), 16)
    for clip in range(3):
        spans = starts if starts.dim() == 1 else starts[clip]
        for frame in range(128):
            inside = any(start <= frame < start + 32 for start in spans.tolist())
            expected = x[clip, frame] if inside else torch.maximum(x[clip, frame], x[clip - 1, frame])
            assert torch.equal(mixed[clip, frame], expected), (clip, frame)


def test_padding_wins_the_maximum_as_published_but_not_with_a_mask():
    padding = 0.467
    x = torch.full((2, 64, 8), -0.5)
    x[1] = -0.2
    x[0, 16:], x[1, 48:] = padding, padding
    mixed_time = mixed_time_patches(torch.tensor([0]), 64, 16, 16)
    published = partial_mixture(x, mixed_time, 16)
    assert (published[:, 16:] == padding).all()
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[0, 16:], mask[1, 48:] = 0, 0
    mixed = partial_mixture(x, mixed_time, 16, mask)
    assert (mixed[:, 16:48] == -0.2).all(), "padding was mixed in, or did not yield to sound"
    assert (mixed[:, 48:] == padding).all(), "where neither sounds there is padding"
    assert torch.equal(mixed[:, :16], x[:, :16]), "the span is unmixed"


def test_a_batch_of_one_mixes_with_itself_and_says_so(monkeypatch):
    warnings = []
    monkeypatch.setattr(mixing.logger, "warning_once", warnings.append)
    x = torch.randn(1, 64, 8)
    assert torch.equal(partial_mixture(x, torch.ones(1, 4, dtype=torch.bool), 16), x)
    assert len(warnings) == 1
    assert "batch of one clip" in warnings[0]
    partial_mixture(torch.randn(2, 64, 8), torch.ones(1, 4, dtype=torch.bool), 16)
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("frames", "spans", "length", "message"),
    [
        (480, 2, 240, "2 unmixed spans of 240 frames leave nothing to mix of 480 frames"),
        (256, 2, 240, "leave nothing to mix of 256 frames"),
        (1000, 2, 240, "in 1000"),
        (1024, 2, 100, "spans of 100 frames"),
        (1024, 0, 240, "0 unmixed spans"),
    ],
)
def test_spans_that_do_not_fit_are_refused(frames, spans, length, message):
    with pytest.raises(ValueError, match=message):
        draw_unmixed_spans(frames, spans, length)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([[0, 64]], r"shape \(1, 2\).*\(3, spans\)"),
        ([0.0, 64.0], "torch.float32"),
        ([], r"shape \(0,\)"),
        ([8, 64], "multiples of 16"),
        ([-16, 64], "from 0 to 96"),
        ([0, 112], "from 0 to 96"),
        ([0, 16], "must not overlap"),
        ([64, 48], "must not overlap"),
        ([0, 32, 64, 96], "leave nothing to mix"),
    ],
)
def test_spans_from_outside_are_checked(starts, message):
    with pytest.raises(ValueError, match=message):
        check_unmixed_spans(torch.tensor(starts), num_clips=3, num_frames=128, span_length=32, patch_size=16)


def test_a_mask_over_something_else_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 33\).*\(2, 64\)"):
        partial_mixture(torch.randn(2, 64, 8), torch.ones(1, 4, dtype=torch.bool), 16, torch.ones(2, 33))
