"""Inverse block masks: a few blocks of patches stay visible, all others are masked (EAT, arXiv 2401.03497; data2vec 2.0, 2212.07525)."""

import torch


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Patches that every mask leaves visible, `int(num_patches * (1 - mask_ratio))` in floating point, as published: 102 of 512.

    Raises:
        ValueError: if the ratio leaves no patch visible, or none masked.
    """
    visible = int(num_patches * (1 - mask_ratio))
    if not 0 < visible < num_patches:
        raise ValueError(
            f"mask_ratio {mask_ratio:g} leaves {visible} of {num_patches} patches visible, but at least one must be visible and one "
            "masked: change the ratio or take longer inputs"
        )
    return visible


def draw_blocks(
    num_views: int,
    time_patches: int,
    frequency_patches: int,
    num_blocks: int,
    block_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Union of square blocks around centres drawn uniformly with replacement, cut at the edges: `(num_views, patches)`, boolean."""
    num_patches = time_patches * frequency_patches
    centres = torch.randint(num_patches, (num_views, num_blocks, 1), generator=generator, device=device)
    reach = torch.arange(block_size, device=device) - block_size // 2
    # Indices beyond an edge become the edge's, which the block covers anyway.
    in_time = (centres // frequency_patches + reach).clamp(0, time_patches - 1)
    in_frequency = (centres % frequency_patches + reach).clamp(0, frequency_patches - 1)
    covered = in_time.unsqueeze(3) * frequency_patches + in_frequency.unsqueeze(2)
    return torch.zeros(num_views, num_patches, dtype=torch.bool, device=device).scatter_(1, covered.flatten(1), True)


def inverse_block_masks(
    num_views: int,
    time_patches: int,
    frequency_patches: int,
    *,
    mask_ratio: float = 0.8,
    mask_ratio_adjust: float = 0.07,
    block_size: int = 5,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw one mask a view, independently: `(num_views, patches)`, boolean, True = masked, patch `frequency_patches * t + f`.

    `int(patches * (1 - mask_ratio + mask_ratio_adjust) / block_size ** 2)` blocks are kept. Then surplus patches are dropped uniformly from
    the kept ones, or missing ones added uniformly from the rest, until exactly [`num_visible_patches`] are visible. A grid too small for
    one block (under 93 patches with the default settings) thus has uniform masks.

    Args:
        mask_ratio: fraction of the patches to mask.
        mask_ratio_adjust: added to the visible fraction when counting blocks, because they overlap and are cut at the edges.
        block_size: side of a block, in patches. An even block reaches one patch further back than forward.
        generator: source of the random numbers, which are then drawn on its device.
        device: of the result.

    Raises:
        ValueError: see [`num_visible_patches`].
    """
    num_patches = time_patches * frequency_patches
    num_visible = num_visible_patches(num_patches, mask_ratio)
    num_blocks = int(num_patches * (1 - mask_ratio + mask_ratio_adjust) / block_size**2)
    source = device if generator is None else generator.device
    kept = draw_blocks(num_views, time_patches, frequency_patches, num_blocks, block_size, generator=generator, device=source)
    # Kept patches rank before all others, and each group in random order.
    rank = kept + torch.rand(num_views, num_patches, generator=generator, device=source)
    visible = rank.topk(num_visible, dim=1).indices
    return torch.ones_like(kept).scatter_(1, visible, False).to(device)


def count_visible(bool_masked_pos: torch.Tensor, num_clips: int, num_patches: int) -> int:
    """Visible patches a view of masks `(num_clips * views, num_patches)` that a caller gives.

    Raises:
        ValueError: if the masks have another shape or type, or views do not all leave the same number of patches visible.
    """
    shape, dtype = tuple(bool_masked_pos.shape), bool_masked_pos.dtype
    if dtype != torch.bool or len(shape) != 2 or shape[1] != num_patches or shape[0] == 0 or shape[0] % num_clips:
        raise ValueError(
            f"bool_masked_pos has shape {shape} and type {dtype}, but for {num_clips} clips of {num_patches} patches "
            f"({num_clips} * views, {num_patches}) and torch.bool are expected, one row a view, the views of a clip one after the other"
        )
    counts = (~bool_masked_pos).sum(1).unique().tolist()
    if len(counts) > 1 or not 0 < counts[0] < num_patches:
        raise ValueError(
            f"bool_masked_pos leaves {', '.join(map(str, counts))} of {num_patches} patches visible, but the same number is expected in "
            "every row, and at least one visible and one masked patch"
        )
    return counts[0]
