"""Unmixed spans and partial mixtures: the published bounds, any other length, and what is refused."""

import math

import pytest
import torch

from transformers_sslam import mixing
from transformers_sslam.fbank import log_mel
from transformers_sslam.mixing import (
    DrawnSources,
    LogMelScale,
    check_unmixed_spans,
    draw_sources,
    draw_unmixed_spans,
    gather_sources,
    mixed_time_patches,
    partial_mixture,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def published_mixture(x: torch.Tensor, mixed_time: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The maximum of each clip and the one before it."""
    return partial_mixture(gather_sources(x, draw_sources(len(x)), attention_mask), mixed_time, 16)


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
    mixed = published_mixture(x, mixed_time_patches(starts, 128, 32, 16))
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
    published = published_mixture(x, mixed_time)
    assert (published[:, 16:] == padding).all()
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[0, 16:], mask[1, 48:] = 0, 0
    mixed = published_mixture(x, mixed_time, mask)
    assert (mixed[:, 16:48] == -0.2).all(), "padding was mixed in, or did not yield to sound"
    assert (mixed[:, 48:] == padding).all(), "where neither sounds there is padding"
    assert torch.equal(mixed[:, :16], x[:, :16]), "the span is unmixed"


def test_a_batch_of_one_mixes_with_itself_and_says_so(monkeypatch):
    warnings = []
    monkeypatch.setattr(mixing.logger, "warning_once", warnings.append)
    x = torch.randn(1, 64, 8)
    assert torch.equal(published_mixture(x, torch.ones(1, 4, dtype=torch.bool)), x)
    assert len(warnings) == 1
    assert "batch of one clip" in warnings[0]
    published_mixture(torch.randn(2, 64, 8), torch.ones(1, 4, dtype=torch.bool))
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
        published_mixture(torch.randn(2, 64, 8), torch.ones(1, 4, dtype=torch.bool), torch.ones(2, 33))


# --- more sources, gains, domains


def test_neighbours_are_the_clips_before_each_one():
    drawn = draw_sources(4, 3)
    assert drawn.partners.tolist() == [[3, 0, 1, 2], [2, 3, 0, 1]]
    assert (drawn.gain_db, drawn.present, drawn.counts()) == (None, None, 3)


def test_partners_of_the_batch_are_others_without_replacement_each_equally_often():
    draws = [draw_sources(5, 3, "batch", generator=seeded(seed)).partners for seed in range(2000)]
    counts = torch.zeros(5, 5)
    for partners in draws:
        for clip, (first, second) in enumerate(partners.T.tolist()):
            assert len({clip, first, second}) == 3
            counts[clip, first] += 1
            counts[clip, second] += 1
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert (others - 1000).abs().max() < 4 * 500**0.5
    assert torch.equal(draws[0], draw_sources(5, 3, "batch", generator=seeded(0)).partners)
    assert len({str(partners.tolist()) for partners in draws[:100]}) > 95


def test_numbers_of_sources_and_gains_are_uniform_and_follow_from_the_seed():
    drawn, again = (draw_sources(6000, [2, 4], gain_db=[-10, 5], generator=seeded(3)) for _ in range(2))
    numbers, times = drawn.counts().unique(return_counts=True)
    assert numbers.tolist() == [2, 3, 4]
    assert (times - 2000).abs().max() < 4 * 2000**0.5
    assert drawn.present[0].all()
    assert torch.equal(drawn.present.sum(0) + 1, drawn.counts())
    assert -10 <= drawn.gain_db.min() < -9.9
    assert 4.9 < drawn.gain_db.max() < 5
    assert drawn.gain_db.mean() == pytest.approx(-2.5, abs=0.2)
    assert torch.equal(drawn.gain_db, again.gain_db)
    assert torch.equal(drawn.present, again.present)


SCALE = LogMelScale(mean=-4.0, std=2.5, sampling_rate=16_000)  # a scaled log-mel x is the energy exp(5 x - 4)


def log_mels_of(energies: list[float]) -> torch.Tensor:
    """Scaled log-mels of clips that have one energy everywhere: (clips, 16 frames, 4 bins)."""
    return torch.tensor([(math.log(energy) + 4) / 5 for energy in energies])[:, None, None].expand(-1, 16, 4)


@pytest.mark.parametrize(("domain", "combine"), [("log_mel", max), ("mel", lambda *energies: sum(energies))])
def test_three_sources_with_gains_by_hand(domain, combine):
    """Clip 0 gets clip 1 at +10 dB and clip 2 at -10 dB: energies 2, 3 * 10 and 50 / 10; and so on. Clip 2 has one other source."""
    partners, gains = [[1, 2, 0], [2, 0, 1]], [[10.0, 0.0, -10.0], [-10.0, 20.0, 0.0]]
    present = [[True, True, True], [True, True, False]]
    drawn = DrawnSources(torch.tensor(partners), torch.tensor(gains), torch.tensor(present))
    sources = gather_sources(log_mels_of([2.0, 3.0, 50.0]), drawn, domain=domain, scale=SCALE)
    expected = [combine(2.0, 30.0, 5.0), combine(3.0, 50.0, 200.0), combine(50.0, 0.2)]
    torch.testing.assert_close(sources.mix(), log_mels_of(expected), rtol=1e-5, atol=1e-6)
    assert drawn.counts().tolist() == [3, 3, 2]
    mixed = partial_mixture(sources, torch.tensor([[True]]), 16)
    assert torch.equal(mixed, sources.mix())
    assert torch.equal(partial_mixture(sources, torch.tensor([[False]]), 16), log_mels_of([2.0, 3.0, 50.0]))


def test_silence_adds_nothing_and_no_gain_makes_it_sound():
    silence = 2.0**-23
    drawn = DrawnSources(torch.tensor([[1, 2, 0]]), torch.tensor([[30.0, 30.0, 0.0]]))
    sources = gather_sources(log_mels_of([silence, silence, 4.0]), drawn, domain="mel", scale=SCALE)
    torch.testing.assert_close(sources.mix(), log_mels_of([silence, 4000.0, 4.0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sources.log_mels[1, 0], log_mels_of([silence])[0], rtol=1e-5, atol=1e-6)


def test_padding_is_no_sound_for_energies_either_where_the_mask_says_so():
    x, mask = log_mels_of([2.0, 3.0]).clone(), torch.ones(2, 16)
    x[0, 8:], mask[0, 8:] = 0.467, 0
    x[1, 12:], mask[1, 12:] = 0.467, 0
    drawn = DrawnSources(torch.tensor([[1, 0]]), torch.tensor([[10.0, 10.0]]))
    sources = gather_sources(x, drawn, mask, domain="mel", scale=SCALE)
    mixed = sources.mix()
    torch.testing.assert_close(mixed[0, :8], log_mels_of([32.0])[0, :8], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[0, 8:12], log_mels_of([30.0])[0, 8:12], rtol=1e-5, atol=1e-6)
    assert (mixed[:, 12:] == x[0, 12]).all()
    assert (sources.log_mels[1, 1, 8:] == x[0, 8]).all(), "padding was amplified"


def waveform_sources(drawn: DrawnSources, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Waveforms of noise, padded to those of 16 frames, their scaled log-mels and mask."""
    waveforms = torch.zeros(len(lengths), 15 * 160 + 400)
    for i, length in enumerate(lengths):
        waveforms[i, :length] = 0.1 * torch.randn(length, generator=seeded(i))
    frames = [1 + (length - 400) // 160 for length in lengths]
    x = torch.stack([SCALE.scaled(log_mel(waveform)) for waveform in waveforms])
    mask = torch.arange(16) < torch.tensor(frames).unsqueeze(1)
    return waveforms, x.masked_fill(~mask.unsqueeze(-1), 0.8), mask


def test_waveforms_are_summed_before_the_log_mel():
    drawn = DrawnSources(torch.tensor([[1, 2, 0], [2, 0, 1]]), torch.tensor([[6.0, 0.0, -20.0], [-6.0, 3.0, 0.0]]))
    waveforms, x, mask = waveform_sources(drawn, (2800, 2000, 1200))
    mixed = gather_sources(x, drawn, mask, waveforms, "waveform", SCALE).mix()
    for clip, terms in enumerate([{0: 0, 1: 6, 2: -6}, {1: 0, 2: 0, 0: 3}, {2: 0, 0: -20, 1: 0}]):
        total = sum(10 ** (gain / 20) * waveforms[other] for other, gain in terms.items())
        torch.testing.assert_close(mixed[clip], SCALE.scaled(log_mel(total)), rtol=1e-5, atol=1e-5)


def test_a_mixture_of_waveforms_ends_with_its_longest_source_and_leaves_absent_ones_out():
    present = torch.tensor([[True, True, True], [False, False, True]])
    drawn = DrawnSources(torch.tensor([[1, 2, 0], [2, 0, 1]]), None, present)
    waveforms, x, mask = waveform_sources(drawn, (1360, 2000, 1200))  # 7, 11 and 6 frames
    mixed = gather_sources(x, drawn, mask, waveforms, "waveform", SCALE).mix()
    for clip, (others, frames) in enumerate([((0, 1), 11), ((1, 2), 11), ((2, 0, 1), 11)]):
        total = waveforms[list(others)].sum(0)
        torch.testing.assert_close(mixed[clip, :frames], SCALE.scaled(log_mel(total))[:frames], rtol=1e-5, atol=1e-5)
        assert (mixed[clip, frames:] == 0.8).all()


def test_a_mixture_takes_no_clip_twice():
    with pytest.raises(ValueError, match="num_sources is 4, but the batch has 3 clips"):
        draw_sources(3, 4)
    with pytest.raises(ValueError, match=r"num_sources is \[2, 3\], but the batch has 1 clips"):
        draw_sources(1, [2, 3], "batch")


@pytest.mark.parametrize(
    ("waveforms", "mask", "message"),
    [
        (None, torch.ones(2, 16), "mixing_domain is 'waveform', but waveforms is None"),
        (torch.zeros(2, 2800), None, "mixing_domain is 'waveform', but attention_mask is None"),
        (torch.zeros(2, 2960), torch.ones(2, 16), r"shape \(2, 2960\), but for 2 clips of 16 frames at 16000 Hz \(2, 2800\)"),
        (torch.zeros(3, 2800), torch.ones(2, 16), r"shape \(3, 2800\)"),
    ],
)
def test_waveforms_that_do_not_fit_are_refused(waveforms, mask, message):
    with pytest.raises(ValueError, match=message):
        gather_sources(torch.randn(2, 16, 4), draw_sources(2), mask, waveforms, "waveform")
