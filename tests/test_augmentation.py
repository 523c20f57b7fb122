"""What augmentation does to clips and batches, in numbers: mixup, noise, SpecAugment, smoothed targets, and what it leaves alone."""

import numpy as np
import pytest
import torch
from conftest import noise

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.audio.clips import Clip
from transformers_sslam.errors import UserError
from transformers_sslam.finetuning.augmentation import (
    NO_AUGMENTATION,
    AugmentationSettings,
    augment_batch,
    augment_waveform,
    mixup,
    smooth_targets,
    spec_augment,
)
from transformers_sslam.finetuning.stream import Collate


def settings(**changes) -> AugmentationSettings:
    """Nothing but what is asked for."""
    return AugmentationSettings(**{**vars(NO_AUGMENTATION), **changes})


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def augmented(values: torch.Tensor, labels: torch.Tensor, changes: AugmentationSettings, draws: np.random.Generator):
    batch = augment_batch({"input_values": values, "labels": labels}, changes, draws)
    return batch["input_values"], batch["labels"]


# --- waveforms


def test_roll_keeps_every_sample_and_gain_stays_near_one():
    clip = noise(0.1)
    rolled, shift = augment_waveform(clip, settings(roll=True), generator(3))
    assert shift > 0
    np.testing.assert_array_equal(np.roll(clip, shift), rolled)
    draws = generator()
    gains = [augment_waveform(clip, settings(gain=10.0), draws)[0][5] / clip[5] for _ in range(2000)]
    assert np.mean(gains) == pytest.approx(1, abs=0.01)
    assert np.std(gains) == pytest.approx((1 / 84) ** 0.5, abs=0.005)  # Beta(10, 10) has variance 1 / (4 * 21)


def test_rolls_reach_every_place():
    clip = np.arange(8, dtype=np.float32)
    draws = generator()
    assert {int(augment_waveform(clip, settings(roll=True), draws)[0][0]) for _ in range(200)} == set(range(8))


def test_without_augmentation_nothing_changes():
    clip, values, targets = noise(0.1), torch.randn(3, 16, 8), torch.eye(3)
    unchanged, shift = augment_waveform(clip, NO_AUGMENTATION, generator())
    np.testing.assert_array_equal(unchanged, clip)
    assert shift == 0
    same_values, same_targets = augmented(values, targets, NO_AUGMENTATION, generator())
    assert torch.equal(same_values, values)
    assert torch.equal(same_targets, targets)


# --- mixup


def test_mixup_shares_log_mels_and_targets_alike():
    values = torch.tensor([[[4.0, 8.0]], [[0.0, 2.0]], [[10.0, -2.0]]])  # three clips of one frame and two bins
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    mixed = mixup({"input_values": values, "labels": targets}, torch.tensor([0.25, 1.0, 0.5]), torch.tensor([1, 2, 0]))
    assert mixed["input_values"].tolist() == [[[1.0, 3.5]], [[0.0, 2.0]], [[7.0, 3.0]]]
    assert mixed["labels"].tolist() == [[0.25, 0.75], [0.0, 1.0], [1.0, 0.5]]


def test_mixup_takes_so_many_clips_and_shares_of_the_beta_distribution():
    clips = 1500
    values, targets = torch.arange(clips).float().view(-1, 1, 1), torch.eye(clips)
    mixed, mixed_targets = augmented(values, targets, settings(mixup_alpha=0.8, mixup_probability=0.6), generator())
    shares = mixed_targets.diagonal().double()
    assert (shares < 1).double().mean() == pytest.approx(0.6, abs=0.04)
    shares = shares[shares < 1]
    assert shares.mean() == pytest.approx(0.5, abs=0.04)
    assert shares.var() == pytest.approx(1 / (4 * 2.6), abs=0.01)  # of Beta(a, a): 1 / (4 (2 a + 1))
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(clips))
    assert (mixed_targets > 0).sum(1).max() == 2
    torch.testing.assert_close(mixed.flatten(), mixed_targets @ values.flatten())
    partners = mixed_targets.sub(torch.diag(mixed_targets.diagonal())).argmax(1)[mixed_targets.diagonal() < 1]
    assert len(partners.unique()) == len(partners)  # nobody is everybody's partner


def test_both_clips_of_a_mixture_are_hidden():
    values = torch.rand(64, 40, 20) + 1
    changes = settings(mixup_alpha=0.8, mixup_probability=1.0, time_mask=0.5, frequency_mask=0.5)
    mixed = augmented(values, torch.eye(64), changes, generator())[0]
    hidden = mixed == 0
    assert 0.1 < hidden.float().mean() < 0.9
    assert mixed[~hidden].min() >= 1  # were clips hidden before they are mixed, some cells would be shares of one alone


def test_inputs_are_not_changed():
    values, targets = torch.randn(4, 32, 16), torch.eye(4)
    before = values.clone(), targets.clone()
    augmented(values, targets, AugmentationSettings(noise=0.1), generator())
    assert torch.equal(values, before[0])
    assert torch.equal(targets, before[1])


# --- noise


def test_noise_is_uniform_up_to_a_bound_that_each_clip_draws():
    noisy = augmented(torch.zeros(2000, 16, 16), torch.ones(2000, 1), settings(noise=0.1), generator())[0].flatten(1)
    bounds = noisy.max(1).values
    assert 0 <= noisy.min() < noisy.max() < 0.1
    assert bounds.mean() == pytest.approx(0.05, abs=0.003)
    assert bounds.std() == pytest.approx(0.1 / 12**0.5, abs=0.002)
    torch.testing.assert_close(noisy.mean(1) / bounds, torch.full((2000,), 0.5), rtol=0, atol=0.1)


# --- SpecAugment


def hidden_stretches(values: torch.Tensor, axis: int) -> torch.Tensor:
    """`(clips, length)`: which frames (axis 1) or bins (axis 2) are 0 throughout."""
    return (values == 0).all(dim=3 - axis)


@pytest.mark.parametrize(("axis", "shares"), [(1, (0.25, 0.0)), (2, (0.0, 0.25))])
def test_masks_are_one_stretch_of_uniform_width(axis, shares):
    """A quarter of 40 is a bound of 10: widths 0 to 9 are equally likely (torchaudio's masks end one short of the bound)."""
    clips, shape = 20_000, [20_000, 3, 3]
    shape[axis] = 40
    values = spec_augment(torch.ones(shape), *shares, seed=5)
    hidden = hidden_stretches(values, axis)
    assert values.unique().tolist() == [0, 1]
    assert (values == 0).sum() == 3 * hidden.sum()  # nothing but whole frames, or whole bins
    widths = hidden.sum(1)
    frequencies = torch.bincount(widths, minlength=11) / clips
    torch.testing.assert_close(frequencies, torch.tensor([0.1] * 10 + [0.0]), rtol=0, atol=0.01)
    edges = torch.nn.functional.pad(hidden.int(), (1, 1)).diff(dim=1).abs().sum(1)
    assert set(edges[widths > 0].tolist()) == {2}
    assert (hidden.sum(0) > 0)[:-1].all()  # anywhere, but for the very last, which torchaudio never reaches


def test_masks_of_both_axes_differ_from_clip_to_clip_and_seed_to_seed():
    values = spec_augment(torch.ones(50, 40, 40), 0.5, 0.5, seed=5)
    assert len({clip.numpy().tobytes() for clip in values}) > 45
    assert torch.equal(values, spec_augment(torch.ones(50, 40, 40), 0.5, 0.5, seed=5))
    assert not torch.equal(values, spec_augment(torch.ones(50, 40, 40), 0.5, 0.5, seed=6))
    for axis in (1, 2):
        assert 0 < hidden_stretches(values, axis).sum(1).float().mean() < 20


def test_masks_leave_torchs_own_generator_where_it_was():
    before = torch.get_rng_state()
    spec_augment(torch.ones(2, 40, 40), 0.5, 0.5, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


# --- targets and batches


def test_smoothed_targets_by_hand():
    smoothed = smooth_targets(torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]]), 0.2)
    torch.testing.assert_close(smoothed, torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.45, 0.45, 0.05]]))


EXTRACTOR = SSLAMFeatureExtractor(max_length=32)


def clips(*keys: tuple[int, ...]) -> list[Clip]:
    return [Clip(noise(0.3, seed=i), f"{i}.wav", "clips", i, 0.0, {}, key) for i, key in enumerate(keys)]


def one_of_four(chosen: list[Clip]) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[[clip.row for clip in chosen]]


def test_label_smoothing_is_torchs():
    logits, smoothing = torch.randn(3, 4), 0.1
    batch = Collate(one_of_four, EXTRACTOR, NO_AUGMENTATION, smoothing)(clips((0, 0, 0), (0, 0, 1), (0, 0, 2)))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch["labels"]))
    torch.testing.assert_close(loss, torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, torch.arange(3)))


def test_a_batch_follows_from_the_keys_of_its_clips():
    collate = Collate(one_of_four, EXTRACTOR, AugmentationSettings(noise=0.1))
    first, again = (collate(clips((0, 0, 0), (0, 0, 1))) for _ in range(2))
    other = collate(clips((0, 1, 0), (0, 1, 1)))
    assert torch.equal(first["input_values"], again["input_values"])
    np.testing.assert_array_equal(first["labels"], again["labels"])
    assert not torch.equal(first["input_values"], other["input_values"])


def test_batches_to_evaluate_are_left_alone():
    found = clips((0, 0, 0), (0, 0, 1))
    batch = Collate(one_of_four, EXTRACTOR, label_smoothing=0.1)(found)
    expected = EXTRACTOR([clip.waveform for clip in found], sampling_rate=16_000, return_tensors="pt").input_values
    assert torch.equal(batch["input_values"], expected)
    np.testing.assert_array_equal(batch["labels"], np.eye(4)[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gain": -1.0}, "augmentation.gain is -1, but must be positive, or 0 for none"),
        ({"noise": -0.1}, "augmentation.noise is -0.1"),
        ({"mixup_alpha": -0.8}, "augmentation.mixup_alpha is -0.8"),
        ({"mixup_probability": 1.1}, r"augmentation.mixup_probability is 1.1, but a fraction in \[0, 1\] is expected"),
        ({"time_mask": -0.1}, "augmentation.time_mask is -0.1"),
        ({"frequency_mask": 2}, "augmentation.frequency_mask is 2"),
    ],
)
def test_settings_out_of_range_are_an_error(changes, message):
    with pytest.raises(UserError, match=message):
        AugmentationSettings(**changes)
