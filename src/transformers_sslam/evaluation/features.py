"""Features of clips from a frozen encoder: computed once, and kept on disk as memory maps."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .. import __version__
from ..errors import UserError
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import lock, verify, write_folder_atomically
from ..modeling_sslam import SSLAMModel
from .loading import Clips, hash_model, input_batches


logger = logging.getLogger(__name__)

LAYOUT = 3  # of the files in a cache folder, a part of its key
PatchDtype = Literal["float16", "float32"]
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]
PER_CLIP = ("cls", "mean", "std", "statistics", "lengths", "rows")


@dataclass(frozen=True)
class Features:
    """Frozen features of some clips, float32 except `lengths`, `patches` and `rows`.

    Attributes:
        cls: `(clips, hidden_size)`, the CLS token of the last block.
        mean, std: `(clips, hidden_size)`, mean and standard deviation of the patch tokens, without padding.
        statistics: `(clips, 2 * mel bins)`, the same of the log-mel's bins over frames: the baseline without a network.
        lengths: `(clips,)`, how many patches, the first ones, are not padding.
        patches: `(stored clips, patches, hidden_size)`, on disk; or `None`.
        rows: `(clips,)`, each clip's row of `patches`.
    """

    cls: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    statistics: np.ndarray
    lengths: np.ndarray
    patches: np.ndarray | None
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mean_and_std(self) -> np.ndarray:
        """`(clips, 2 * hidden_size)`."""
        return np.concatenate((self.mean, self.std), axis=1)

    def select(self, clips: np.ndarray) -> "Features":
        """Those of the clips with these indices."""
        return replace(self, **{name: getattr(self, name)[clips] for name in PER_CLIP})

    def patch_tokens(self, clips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch tokens of the clips with these indices, `(n, patches, hidden_size)`, float32, and a mask `(n, patches)`, false for padding.

        Raises:
            UserError: if patch tokens were not kept.
        """
        if self.patches is None:
            raise UserError("the patch tokens of these clips were not kept: encode them with keep_patches=True")
        tokens = torch.from_numpy(self.patches[self.rows[clips]]).float()
        return tokens, torch.arange(tokens.shape[1]) < torch.from_numpy(self.lengths[clips])[:, None]


def encode_clips(
    model: SSLAMModel,
    extractor: SSLAMFeatureExtractor,
    waveforms: Clips,
    cache: str | Path | None = None,
    *,
    data_key: str | None = None,
    keep_patches: bool = True,
    patch_dtype: PatchDtype = "float16",
    batch_size: int = 16,
    description: str = "encoding clips",
) -> Features:
    """Features of all clips, from the cache where it has them, with one batch in memory.

    Its folders are named by a hash of model, feature extractor, data, what is stored and this package's version, written atomically, and
    verified before they are read. Processes that want the same one wait for each other.

    Args:
        model: the encoder, which is put into eval mode.
        extractor: pads or cuts each clip to its `max_length` frames; the padding among them is masked.
        waveforms: `(samples,)` each, at the extractor's rate.
        cache: folder for the features; `None`: they stay in memory.
        data_key: identifies these waveforms; by default their `hash_waveforms`.
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
    shapes = _shapes(model, extractor, len(waveforms), keep_patches, patch_dtype)
    fill = partial(_fill, model, extractor, waveforms, batch_size, description)
    if cache is None:
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        fill(arrays)
        return _features(arrays)
    data = data_key or hash_waveforms(waveforms)
    folder = Path(cache) / hash_model(model, extractor, data=data, shapes=shapes, version=[__version__, LAYOUT])
    with lock(folder, wait=True):
        if not _is_whole(folder):
            _write(folder, shapes, fill)
        return _features({name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes})


def hash_waveforms(waveforms: Clips) -> str:
    """SHA-256 of all samples in their order."""
    digest = hashlib.sha256()
    for i in range(len(waveforms)):
        samples = np.ascontiguousarray(waveforms[i], dtype=np.float32)
        digest.update(len(samples).to_bytes(8, "little"))
        digest.update(samples.data)
    return digest.hexdigest()


@torch.inference_mode()
def _encode_batch(model: SSLAMModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = model(**inputs).last_hidden_state.float()
    cls, patches = tokens[:, 0], tokens[:, 1:]
    mask = inputs["attention_mask"].bool()
    lengths = -(-mask.sum(1) // model.config.patch_size) * model.config.num_frequency_patches
    mean, std = _masked_moments(patches, torch.arange(patches.shape[1], device=lengths.device) < lengths[:, None])
    # On the CPU in float64, so that a mel bin that never changes has a standard deviation of exactly 0.
    statistics = torch.cat(_masked_moments(inputs["input_values"].cpu().double(), mask.cpu()), dim=1).float()
    return {"cls": cls, "mean": mean, "std": std, "statistics": statistics, "lengths": lengths, "patches": patches}


def _masked_moments(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation over positions: (n, positions, width) and (n, positions) -> twice (n, width)."""

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask[..., None], values, 0).sum(1) / mask.sum(1)[:, None]  # `where`: masked values may be NaN

    center = mean(values)
    return center, mean((values - center[:, None]) ** 2).sqrt()


def _fill(
    model: SSLAMModel,
    extractor: SSLAMFeatureExtractor,
    waveforms: Clips,
    batch_size: int,
    description: str,
    arrays: Mapping[str, np.ndarray],
) -> None:
    model.eval()
    for clips, inputs in input_batches(model, extractor, waveforms, batch_size, description, return_attention_mask=True):
        encoded = _encode_batch(model, inputs)
        for name, array in arrays.items():
            values = encoded[name].cpu().numpy()
            if not np.isfinite(values).all():
                raise UserError(
                    f"features ({name}) of the clips {clips.start} to {clips.stop - 1} are NaN or infinite: check the model's weights"
                )
            if array.dtype == np.float16 and (largest := np.abs(values).max()) > np.finfo(np.float16).max:
                raise UserError(f"patch tokens reach {largest:g}, beyond the range of float16: encode with float32 (patch_dtype)")
            array[clips.start : clips.stop] = values


def _shapes(model: SSLAMModel, extractor: SSLAMFeatureExtractor, clips: int, keep_patches: bool, patch_dtype: PatchDtype) -> Shapes:
    config = model.config
    patches = extractor.max_length // config.patch_size * config.num_frequency_patches
    float32 = np.dtype("float32")
    shapes: Shapes = dict.fromkeys(("cls", "mean", "std"), ((clips, config.hidden_size), float32))
    shapes |= {"statistics": ((clips, 2 * config.num_mel_bins), float32), "lengths": ((clips,), np.dtype("int64"))}
    return shapes | ({"patches": ((clips, patches, config.hidden_size), np.dtype(patch_dtype))} if keep_patches else {})


def _write(folder: Path, shapes: Shapes, fill: Callable[[Mapping[str, np.ndarray]], None]) -> None:
    size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
    if size > (free := shutil.disk_usage(folder.parent).free):  # a memory map would find out with a crash
        raise UserError(
            f"the features take {size / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free: choose another cache_dir, or "
            "probes without patch tokens"
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


def _features(arrays: dict[str, np.ndarray]) -> Features:
    values: dict[str, Any] = {"patches": None, **arrays}
    return Features(**values, rows=np.arange(len(arrays["cls"])))
