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
from ..configuration_sslam import ClipPooling
from ..errors import UserError
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import lock, verify, write_folder_atomically
from ..modeling_sslam import SSLAMModel
from ..pooling_sslam import POOLINGS, masked_max, masked_mean, masked_std, part_width, pool_part, sounding_tokens
from .loading import Clips, hash_model, input_batches


logger = logging.getLogger(__name__)

LAYOUT = 4  # of the files in a cache folder, a part of its key
PatchDtype = Literal["float16", "float32"]
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]

PARTS = tuple(dict.fromkeys(part for parts in POOLINGS.values() for part in parts))  # of all poolings, each kept once
# Of poolings, in tables and pictures.
TITLES: dict[ClipPooling, str] = {
    "cls": "CLS token",
    "mean": "mean of patches",
    "mean_and_std": "mean and standard deviation of patches",
    "max_by_frequency": "maximum over time by frequency",
    "mean_and_max_by_frequency": "mean and maximum over time by frequency",
}
LOG_MEL = "log_mel_"  # before the names of the log-mel's arrays
LOG_MEL_PARTS: dict[str, Callable[..., torch.Tensor]] = {"mean": masked_mean, "std": masked_std, "max_by_frequency": masked_max}


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

    def pooled(self, pooling: ClipPooling, block: int | None = None) -> np.ndarray:
        """Vectors of a block, by default the last of `blocks`: `(clips, width)`.

        Raises:
            UserError: if that block was not encoded.
        """
        column = -1 if block is None else self._column(block)
        return np.concatenate([self.arrays[part][self.rows, column] for part in POOLINGS[pooling]], axis=1)

    def pooled_blocks(self, pooling: ClipPooling, clips: np.ndarray) -> np.ndarray:
        """Vectors of all blocks but 0, of the clips with these indices: `(n, blocks, width)`."""
        columns = [self._column(block) for block in self.blocks if block > 0]
        return np.concatenate([self.arrays[part][self.rows[clips]][:, columns] for part in POOLINGS[pooling]], axis=2)

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


def pool_log_mel(log_mel: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of `LOG_MEL_PARTS`: `(batch, frames, mel bins)` -> `(batch, mel bins)` each, float32, on the CPU. `mask: (batch, frames)` is boolean,
    false for padding."""
    # In float64, so that a mel bin that never changes has a standard deviation of exactly 0.
    values, frames = log_mel.cpu().double(), mask.cpu()[..., None]
    return {part: pool(values, frames).float() for part, pool in LOG_MEL_PARTS.items()}


@torch.inference_mode()
def _encode_batch(
    model: SSLAMModel, inputs: dict[str, torch.Tensor], blocks: Sequence[int], patch_block: int | None
) -> dict[str, torch.Tensor]:
    depth, mask = model.config.num_hidden_layers, inputs["attention_mask"].bool()
    inner = any(block != depth for block in (*blocks, depth if patch_block is None else patch_block))
    outputs = model(**inputs, output_hidden_states=inner)

    def tokens(block: int) -> torch.Tensor:
        return (outputs.last_hidden_state if block == depth else outputs.hidden_states[block]).float()

    frequencies = model.config.num_frequency_patches
    token_mask = sounding_tokens(mask, model.config.patch_size, frequencies)
    pooled = {part: torch.stack([pool_part(tokens(block), token_mask, part, frequencies) for block in blocks], dim=1) for part in PARTS}
    for part, values in pool_log_mel(inputs["input_values"], mask).items():
        pooled[LOG_MEL + part] = values[:, None]
    pooled["lengths"] = token_mask[:, 1:].sum(1)
    return pooled if patch_block is None else pooled | {"patches": tokens(patch_block)[:, 1:]}


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
    shapes: Shapes = {part: ((clips, blocks, part_width(part, config)), float32) for part in PARTS}
    shapes |= {LOG_MEL + part: ((clips, 1, config.num_mel_bins), float32) for part in LOG_MEL_PARTS}
    shapes["lengths"] = ((clips,), np.dtype("int64"))
    patches = extractor.max_length // config.patch_size * config.num_frequency_patches
    return shapes if patch_dtype is None else shapes | {"patches": ((clips, patches, config.hidden_size), np.dtype(patch_dtype))}


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
