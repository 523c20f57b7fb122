"""Inverse block masks: the published statistics, exact counts, and seeds."""

import pytest
import torch

from transformers_sslam.masking import draw_blocks, inverse_block_masks, num_visible_patches


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def visible_grids(num_views: int) -> torch.Tensor:
    """(views, 64, 8), 1.0 where visible."""
    return (~inverse_block_masks(num_views, 64, 8, generator=seeded())).view(-1, 64, 8).float()


def assert_as_published(samples: torch.Tensor, published: list[float], rounding: float) -> None:
    """Means of (masks, n) within 3.5 standard errors of the means, rounded, over 1,000 masks of the authors' code."""
    error = samples.std(0) * (1 / len(samples) + 1 / 1000) ** 0.5
    difference = (samples.mean(0) - torch.tensor(published)).abs()
    assert (difference < 3.5 * error + rounding).all(), (difference, error)


def test_each_frequency_row_is_as_visible_as_published():
    assert_as_published(visible_grids(10_000).mean(1), [0.155, 0.192, 0.230, 0.226, 0.226, 0.226, 0.190, 0.150], 5e-4)


def test_visible_patches_have_as_many_visible_neighbours_as_published():
    grid = visible_grids(10_000)
    neighbours = torch.zeros_like(grid)
    neighbours[:, 1:] += grid[:, :-1]
    neighbours[:, :-1] += grid[:, 1:]
    neighbours[..., 1:] += grid[..., :-1]
    neighbours[..., :-1] += grid[..., 1:]
    assert_as_published((neighbours * grid).sum((1, 2), keepdim=True).flatten(1) / 102, [2.89], 5e-3)


def test_five_blocks_cover_as_much_as_published():
    covered = draw_blocks(10_000, 64, 8, 5, 5, generator=seeded()).sum(1, keepdim=True).float()
    assert_as_published(covered, [95.8], 0.05)
    assert covered.std().item() == pytest.approx(11.6, abs=0.6)


def test_exactly_102_of_512_patches_are_visible_in_every_row():
    assert (visible_grids(10_000).sum((1, 2)) == 102).all()


@pytest.mark.parametrize(("patches", "ratio", "visible"), [(512, 0.8, 102), (10, 0.8, 1), (1000, 0.7, 300), (64, 0.4, 38), (256, 0.75, 64)])
def test_visible_patches_are_counted_in_floating_point_as_published(patches, ratio, visible):
    """10 * (1 - 0.8) is 1.9999999999999996, and so on."""
    assert num_visible_patches(patches, ratio) == visible


@pytest.mark.parametrize("grid", [(1, 8), (8, 8), (32, 8), (128, 8), (16, 4), (7, 5)])
@pytest.mark.parametrize("block_size", [1, 2, 5, 9])
@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_counts_are_exact_on_any_grid(grid, block_size, ratio):
    masks = inverse_block_masks(50, *grid, mask_ratio=ratio, block_size=block_size, generator=seeded())
    assert masks.shape == (50, grid[0] * grid[1])
    assert masks.dtype == torch.bool
    assert ((~masks).sum(1) == int(grid[0] * grid[1] * (1 - ratio))).all()


def test_a_block_lies_around_its_centre_and_ends_at_the_edges():
    grid = draw_blocks(500, 12, 8, 1, 5, generator=seeded()).view(-1, 12, 8)
    sides = torch.stack((grid.any(2).sum(1), grid.any(1).sum(1)), dim=1)
    assert (grid.sum((1, 2)) == sides.prod(1)).all(), "no rectangle"
    assert sides.min() == 3, "a centre at the edge keeps three rows"
    assert sides.max() == 5
    assert grid.any(0).all(), "some patches are never kept"


def test_blocks_are_only_adjusted_never_redrawn():
    blocks, masks = draw_blocks(1000, 64, 8, 5, 5, generator=seeded(3)), inverse_block_masks(1000, 64, 8, generator=seeded(3))
    lost, added = (blocks & masks).sum(1), (~blocks & ~masks).sum(1)
    assert (torch.minimum(lost, added) == 0).all(), "a patch of a block was dropped while another was added"
    assert lost.max() > 0
    assert added.max() > 0


def test_patches_are_dropped_and_added_uniformly():
    """Without blocks all is added, with blocks everywhere all is dropped: each patch is visible as often as any other."""
    for block_size, ratio in ((30, 0.8), (16, 0.1)):
        masks = inverse_block_masks(20_000, 8, 8, mask_ratio=ratio, mask_ratio_adjust=0.0, block_size=block_size, generator=seeded())
        share = (~masks).float().mean(0)
        expected = int(64 * (1 - ratio)) / 64
        assert (share - expected).abs().max() < 4.5 * (expected * (1 - expected) / 20_000) ** 0.5


def test_views_are_independent_and_a_seed_repeats_them():
    masks = inverse_block_masks(200, 64, 8, generator=seeded(1))
    assert len(masks.unique(dim=0)) == 200
    state = torch.random.get_rng_state()
    assert torch.equal(masks, inverse_block_masks(200, 64, 8, generator=seeded(1)))
    assert torch.equal(state, torch.random.get_rng_state()), "a generator was given, yet torch's own was used"
    assert not torch.equal(masks, inverse_block_masks(200, 64, 8, generator=seeded(2)))


@pytest.mark.parametrize(("grid", "ratio", "visible"), [((1, 4), 0.8, 0), ((2, 2), 0.0, 4), ((8, 8), 1.0, 0)])
def test_masks_that_leave_nothing_to_see_or_to_predict_are_refused(grid, ratio, visible):
    with pytest.raises(ValueError, match=f"leaves {visible} of {grid[0] * grid[1]} patches visible"):
        inverse_block_masks(2, *grid, mask_ratio=ratio)
