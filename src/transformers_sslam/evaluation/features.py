"""Features of clips from a frozen encoder: computed once, and kept on disk as memory maps."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from .. import __version__
from ..errors import UserError
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import lock, verify, write_folder_atomically
from ..modeling_sslam import SSLAMModel
from .loading import Clips, hash_model, input_batches


logger = logging.getLogger(__name__)

LAYOUT = 4  # of the files in a cache folder, a part of its key
PatchDtype = Literal["float16", "float32"]
Pooling = Literal["cls", "mean", "mean_and_std", "max_by_frequency", "mean_and_max_by_frequency"]
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]

# By name: the title in a table, and the arrays whose vectors are concatenated.
POOLINGS: dict[Pooling, tuple[str, tuple[str, ...]]] = {
    "cls": ("CLS token", ("cls",)),
    "mean": ("mean of patches", ("mean",)),
    "mean_and_std": ("mean and standard deviation of patches", ("mean", "std")),
    "max_by_frequency": ("maximum over time by frequency", ("max_by_frequency",)),
    "mean_and_max_by_frequency": ("mean and maximum over time by frequency", ("mean_by_frequency", "max_by_frequency")),
}
LOG_MEL = "log_mel_"  # before the names of the log-mel's arrays


@dataclass(frozen=True)
class Features:
    """Frozen features of some clips: pooled outputs of some blocks, and the log-mel pooled in the same ways.

    Attributes:
        arrays: of all clips that were encoded, in memory or on disk: the poolings' parts, `(clips, blocks, width)`, float32; `lengths`,
            `(clips,)`, how many patches, the first ones, are not padding; `patches`, `(clips, patches, hidden_size)`, if they were kept.
        rows: `(clips,)`, where in the arrays these clips are.
        blocks: numbers of the blocks: 1 for the first; 0 is its input.
    """

    arrays: Mapping[str, np.ndarray]
    rows: np.ndarray
    blocks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def log_mel(self) -> "Features":
        """The log-mel in place of a network, as its block 0: the baseline. Each mel bin is a frequency, and there is no CLS token."""
        arrays = {name.removeprefix(LOG_MEL): array for name, array in self.arrays.items() if name.startswith(LOG_MEL)}
        return Features(arrays | {"mean_by_frequency": arrays["mean"]}, self.rows, (0,))

    def select(self, clips: np.ndarray) -> "Features":
        """Those of the clips with these indices. Nothing is read."""
        return replace(self, rows=self.rows[clips])

    def pooled(self, pooling: Pooling, block: int | None = None) -> np.ndarray:
        """Vectors of a block, by default the last of `blocks`: `(clips, width)`.

        Raises:
            UserError: if that block was not encoded.
        """
        column = -1 if block is None else self._column(block)
        return np.concatenate([self.arrays[part][self.rows, column] for part in POOLINGS[pooling][1]], axis=1)

    def pooled_blocks(self, pooling: Pooling, clips: np.ndarray) -> np.ndarray:
        """Vectors of all blocks but 0, of the clips with these indices: `(n, blocks, width)`."""
        columns = [self._column(block) for block in self.blocks if block > 0]
        return np.concatenate([self.arrays[part][self.rows[clips]][:, columns] for part in POOLINGS[pooling][1]], axis=2)

    def _column(self, block: int) -> int:
        if block not in self.blocks:
            raise UserError(f"block {block} was not encoded, only {', '.join(map(str, self.blocks))}: name it in layers")
        return self.blocks.index(block)

    def patch_tokens(self, clips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch tokens of the clips with these indices, `(n, patches, hidden_size)`, float32, and a mask `(n, patches)`, false for padding.

        Raises:
            UserError: if patch tokens were not kept.
        """
        if "patches" not in self.arrays:
            raise UserError("the patch tokens of these clips were not kept: encode them with keep_patches=True")
        rows = self.rows[clips]
        tokens = torch.from_numpy(self.arrays["patches"][rows]).float()
        return tokens, torch.arange(tokens.shape[1]) < torch.from_numpy(self.arrays["lengths"][rows])[:, None]


def block_numbers(layers: Sequence[int | str], depth: int) -> tuple[int, ...]:
    """Numbers of the blocks that a setting names: in their order, without repetition.

    Args:
        layers: numbers, -1 for the last block, 0 for the input of the first; or `["all"]`, every block from 1 on.
        depth: number of the encoder's blocks.

    Raises:
        UserError: if there are none, or the encoder has no such block.
    """
    if list(layers) == ["all"]:
        return tuple(range(1, depth + 1))
    numbers = [layer for layer in layers if isinstance(layer, int) and not isinstance(layer, bool) and -depth <= layer <= depth]
    if not layers or len(numbers) < len(layers):
        raise UserError(
            f"layers is {list(layers)}, but all, or numbers from {-depth} to {depth} are expected: 0 for the first block's input"
        )
    return tuple(sorted({layer if layer >= 0 else depth + 1 + layer for layer in numbers}))


def encode_clips(
    model: SSLAMModel,
    extractor: SSLAMFeatureExtractor,
    waveforms: Clips,
    cache: str | Path | None = None,
    *,
    data_key: str | None = None,
    layers: Sequence[int | str] = (-1,),
    patch_layer: int = -1,
    keep_patches: bool = True,
    patch_dtype: PatchDtype = "float16",
    batch_size: int = 16,
    description: str = "encoding clips",
) -> Features:
    """Features of all clips, from the cache where it has them, with one batch in memory: tokens are pooled while the clips are encoded.

    Its folders are named by a hash of model, feature extractor, data, what is stored and this package's version, written atomically, and
    verified before they are read. Processes that want the same one wait for each other.

    Args:
        model: the encoder, which is put into eval mode.
        extractor: pads or cuts each clip to its `max_length` frames; the padding among them is masked.
        waveforms: `(samples,)` each, at the extractor's rate.
        cache: folder for the features; `None`: they stay in memory.
        data_key: identifies these waveforms; by default their `hash_waveforms`.
        layers: blocks whose pooled outputs are kept, as of [`block_numbers`].
        patch_layer: block whose patch tokens are kept.
        keep_patches: whether to store patch tokens, which take the most space.
        patch_dtype: of the stored patch tokens.
        batch_size: clips in a forward pass.
        description: of the progress bar.

    Raises:
        UserError: if there is no clip, features are not finite or exceed `patch_dtype`, or the disk has no room for them.
    """
    if len(waveforms) == 0:
        raise UserError("there is no clip to encode: give at least one waveform")
    if extractor.max_length < 1 or extractor.max_length % model.config.patch_size or extractor.max_length > model.config.max_length:
        raise UserError(
            f"the feature extractor gives {extractor.max_length} frames, but this model takes a positive multiple of "
            f"{model.config.patch_size} up to {model.config.max_length}: set max_length"
        )
    depth = model.config.num_hidden_layers
    blocks, patch_block = block_numbers(layers, depth), block_numbers([patch_layer], depth)[0] if keep_patches else None
    shapes = _shapes(model, extractor, len(waveforms), len(blocks), patch_dtype if keep_patches else None)
    fill = partial(_fill, model, extractor, waveforms, blocks, patch_block, batch_size, description)
    rows = np.arange(len(waveforms))
    if cache is None:
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        fill(arrays)
        return Features(arrays, rows, blocks)
    about = {"shapes": shapes, "blocks": [blocks, patch_block], "version": [__version__, LAYOUT]}
    folder = Path(cache) / hash_model(model, extractor, data=data_key or hash_waveforms(waveforms), **about)
    with lock(folder, wait=True):
        if not _is_whole(folder):
            _write(folder, shapes, fill)
        return Features({name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}, rows, blocks)


def hash_waveforms(waveforms: Clips) -> str:
    """SHA-256 of all samples in their order."""
    digest = hashlib.sha256()
    for i in range(len(waveforms)):
        samples = np.ascontiguousarray(waveforms[i], dtype=np.float32)
        digest.update(len(samples).to_bytes(8, "little"))
        digest.update(samples.data)
    return digest.hexdigest()


@torch.inference_mode()
def _encode_batch(
    model: SSLAMModel, inputs: dict[str, torch.Tensor], blocks: Sequence[int], patch_block: int | None
) -> dict[str, torch.Tensor]:
    depth, mask = model.config.num_hidden_layers, inputs["attention_mask"].bool()
    inner = any(block != depth for block in (*blocks, depth if patch_block is None else patch_block))
    outputs = model(**inputs, output_hidden_states=inner)

    def tokens(block: int) -> torch.Tensor:
        return (outputs.last_hidden_state if block == depth else outputs.hidden_states[block]).float()

    steps = mask.unflatten(1, (-1, model.config.patch_size)).any(-1)  # (batch, time), where there is sound
    by_block = [_pool_block(model.frame_embeddings(tokens(block)), steps) | {"cls": tokens(block)[:, 0]} for block in blocks]
    pooled = {name: torch.stack([block[name] for block in by_block], dim=1) for name in by_block[0]}
    # On the CPU in float64, so that a mel bin that never changes has a standard deviation of exactly 0.
    log_mel, frames = inputs["input_values"].cpu().double(), mask.cpu()
    mean, std = _masked_moments(log_mel, frames)
    for name, vectors in (("mean", mean), ("std", std), ("max_by_frequency", _masked_max(log_mel, frames))):
        pooled[LOG_MEL + name] = vectors[:, None].float()
    pooled["lengths"] = steps.sum(1) * model.config.num_frequency_patches
    return pooled if patch_block is None else pooled | {"patches": tokens(patch_block)[:, 1:]}


def _pool_block(grid: torch.Tensor, steps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parts of `POOLINGS`, from patch tokens on their grid, `(batch, time, frequency, width)`, and a mask over time, `(batch, time)`."""
    by_frequency = grid.flatten(2)
    mean, std = _masked_moments(grid.flatten(1, 2), steps.repeat_interleave(grid.shape[2], dim=1))
    moments = {"mean": mean, "std": std, "mean_by_frequency": _masked_mean(by_frequency, steps)}
    return moments | {"max_by_frequency": _masked_max(by_frequency, steps)}


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over positions that are not masked: (n, positions, width) and (n, positions) -> (n, width)."""
    return torch.where(mask[..., None], values, 0).sum(1) / mask.sum(1)[:, None]  # `where`: masked values may be NaN


def _masked_moments(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation over positions, as [`_masked_mean`]."""
    center = _masked_mean(values, mask)
    return center, _masked_mean((values - center[:, None]) ** 2, mask).sqrt()


def _masked_max(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Maximum over positions, as [`_masked_mean`]."""
    return torch.where(mask[..., None], values, -torch.inf).amax(1)


def _fill(
    model: SSLAMModel,
    extractor: SSLAMFeatureExtractor,
    waveforms: Clips,
    blocks: Sequence[int],
    patch_block: int | None,
    batch_size: int,
    description: str,
    arrays: Mapping[str, np.ndarray],
) -> None:
    model.eval()
    for clips, inputs in input_batches(model, extractor, waveforms, batch_size, description, return_attention_mask=True):
        encoded = _encode_batch(model, inputs, blocks, patch_block)
        for name, array in arrays.items():
            values = encoded[name].cpu().numpy()
            if not np.isfinite(values).all():
                raise UserError(
                    f"features ({name}) of the clips {clips.start} to {clips.stop - 1} are NaN or infinite: check the model's weights"
                )
            if array.dtype == np.float16 and (largest := np.abs(values).max()) > np.finfo(np.float16).max:
                raise UserError(f"patch tokens reach {largest:g}, beyond the range of float16: encode with float32 (patch_dtype)")
            array[clips.start : clips.stop] = values


def _shapes(model: SSLAMModel, extractor: SSLAMFeatureExtractor, clips: int, blocks: int, patch_dtype: PatchDtype | None) -> Shapes:
    """Of all arrays, in the order of a clip's; without patch tokens if they have no type."""
    config, float32 = model.config, np.dtype("float32")
    width, frequencies = config.hidden_size, config.num_frequency_patches
    widths = {"cls": width, "mean": width, "std": width}
    widths |= dict.fromkeys(("mean_by_frequency", "max_by_frequency"), frequencies * width)
    shapes: Shapes = {name: ((clips, blocks, size), float32) for name, size in widths.items()}
    shapes |= {LOG_MEL + name: ((clips, 1, config.num_mel_bins), float32) for name in ("mean", "std", "max_by_frequency")}
    shapes["lengths"] = ((clips,), np.dtype("int64"))
    patches = extractor.max_length // config.patch_size * frequencies
    return shapes if patch_dtype is None else shapes | {"patches": ((clips, patches, width), np.dtype(patch_dtype))}


def _write(folder: Path, shapes: Shapes, fill: Callable[[Mapping[str, np.ndarray]], None]) -> None:
    size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
    if size > (free := shutil.disk_usage(folder.parent).free):  # a memory map would find out with a crash
        raise UserError(
            f"the features take {size / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free: choose another cache_dir, fewer "
            "layers, or probes without patch tokens"
        )
    with write_folder_atomically(folder, manifest=True) as partial:
        arrays = {
            name: np.lib.format.open_memmap(partial / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
            for name, (shape, dtype) in shapes.items()
        }
        fill(arrays)
        for array in arrays.values():
            array.flush()


def _is_whole(folder: Path) -> bool:
    """Whether the cache has this folder; a damaged one is deleted."""
    if not folder.exists():
        return False
    if problem := verify(folder):
        logger.warning(f"The cached features in {folder} are damaged ({problem}): the clips are encoded again.")
        shutil.rmtree(folder)
    return not problem
