"""What a frozen encoder says of each clip: encoded once, kept on disk as memory maps, and read from there a batch at a time."""

import hashlib
import inspect
import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import __version__
from ..allocator import keep_freed_memory
from ..configuration_sslam import SSLAMConfig
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import lock, verify, write_folder_atomically
from ..modeling_sslam import SSLAMModel, SSLAMPreTrainedModel


logger = logging.getLogger(__name__)

LAYOUT = 2  # of the files in a cache folder, a part of its key
Precision = Literal["float16", "float32"]
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


class Clips(Protocol):
    """Waveforms `(samples,)` by their number: a list, or an object that decodes them when asked, such as `audio.cache.Waveforms`."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> np.ndarray: ...


class ProbeError(ValueError):
    """Features, labels or settings that no probe can work with. One sentence says it, so programs print it without a traceback."""


@dataclass(frozen=True)
class Features:
    """Frozen features of some clips. Everything is float32 but `patches`.

    Attributes:
        cls: `(clips, hidden_size)`, the CLS token of the last block.
        mean: `(clips, hidden_size)`, the mean of the patch tokens that are heard.
        deviation: `(clips, hidden_size)`, their standard deviation.
        statistics: `(clips, 2 * mel bins)`, each mel bin's mean and deviation over the frames that are heard: what any representation must
            beat, for no network is in it.
        heard: `(clips,)`, how many patches hold sound. They are the first ones, because clips are padded at their end.
        patches: `(stored clips, patches, hidden_size)`, all patch tokens that are stored, on disk; or `None`.
        rows: `(clips,)`, each clip's row of `patches`.
    """

    cls: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    statistics: np.ndarray
    heard: np.ndarray
    patches: np.ndarray | None
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mean_and_deviation(self) -> np.ndarray:
        """`(clips, 2 * hidden_size)`: of the patch tokens what `statistics` are of the log-mel."""
        return np.concatenate((self.mean, self.deviation), axis=1)

    def select(self, clips: np.ndarray) -> "Features":
        """Those of the clips of these indices. Patch tokens stay where they are."""
        chosen = {name: getattr(self, name)[clips] for name in ("cls", "mean", "deviation", "statistics", "heard", "rows")}
        return replace(self, **chosen)

    def patch_tokens(self, clips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the patch tokens of the clips of these indices, `(n, patches, hidden_size)`, float32, and whether each is heard,
        `(n, patches)`.

        Raises:
            ProbeError: if patch tokens were not kept.
        """
        if self.patches is None:
            raise ProbeError("the patch tokens of these clips were not kept: encode them with keep_patches=True")
        tokens = torch.from_numpy(self.patches[self.rows[clips]]).float()
        return tokens, torch.arange(tokens.shape[1]) < torch.from_numpy(self.heard[clips])[:, None]


def encode_clips(
    model: SSLAMModel,
    extractor: SSLAMFeatureExtractor,
    waveforms: Clips,
    cache: str | Path | None = None,
    *,
    data_key: str | None = None,
    keep_patches: bool = True,
    precision: Precision = "float16",
    batch_size: int = 16,
) -> Features:
    """Features of all clips, from the cache where it has them. Memory holds one batch, however many clips there are.

    A folder of the cache is named by a hash of the weights, the configuration, the feature extractor, the data in their order, what is
    stored, and the version of this package; labels are no part of it. It is written under another name and renamed when it is whole, so
    a run that is killed leaves no half of it, and processes that want the same one wait for each other.

    Args:
        model: the encoder, which is put into eval mode.
        extractor: pads or cuts each clip to its `max_length` frames; the padding among them is masked.
        waveforms: `(samples,)` each, at the extractor's rate.
        cache: folder for the features; `None`: they stay in memory.
        data_key: what tells these waveforms from any others; by default `hash_waveforms` of them, which reads each once.
        keep_patches: whether to store patch tokens, which take `patches` times the space of all the rest.
        precision: of the stored patch tokens.
        batch_size: clips at a time.

    Raises:
        ProbeError: if there is no clip, features are not finite or beyond the precision, or the disk has no room for them.
    """
    if len(waveforms) == 0:
        raise ProbeError("there is no clip to encode: give at least one waveform")
    if extractor.max_length < 1 or extractor.max_length % model.config.patch_size or extractor.max_length > model.config.max_length:
        raise ProbeError(
            f"the feature extractor gives {extractor.max_length} frames, but a positive multiple of {model.config.patch_size} up to "
            f"{model.config.max_length} is expected by this model: set its max_length"
        )
    shapes = _shapes(model, extractor, len(waveforms), keep_patches, precision)
    if cache is None:
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        _fill(arrays, model, extractor, waveforms, batch_size)
        return _features(arrays)
    data = data_key or hash_waveforms(waveforms)
    key = hash_model(model, extractor, data=data, shapes=shapes, version=[__version__, LAYOUT])
    folder = Path(cache) / key
    with lock(folder, wait=True):
        if (stored := _read(folder, shapes)) is None:
            _write(folder, shapes, model, extractor, waveforms, batch_size)
            stored = _read(folder, shapes)
    if stored is None:
        raise ProbeError(f"the features just written to {folder} cannot be read back: is the disk whole?")
    return _features(stored)


def hash_waveforms(waveforms: Clips) -> str:
    """SHA-256 of all samples in their order: file names, formats and labels do not matter. Reads one waveform at a time."""
    digest = hashlib.sha256()
    for i in range(len(waveforms)):
        samples = np.ascontiguousarray(waveforms[i], dtype=np.float32)
        digest.update(len(samples).to_bytes(8, "little"))
        digest.update(samples.data)
    return digest.hexdigest()


@torch.inference_mode()
def _encode_batch(model: SSLAMModel, extractor: SSLAMFeatureExtractor, waveforms: list[np.ndarray]) -> dict[str, np.ndarray]:
    inputs = extractor(
        waveforms, sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="pt", device=model.device
    )
    tokens = model(**inputs).last_hidden_state.float()
    cls, patches = tokens[:, 0], tokens[:, 1:]
    frames = inputs["attention_mask"].sum(1)
    heard = (frames + model.config.patch_size - 1) // model.config.patch_size * model.config.num_frequency_patches
    in_patch = (torch.arange(patches.shape[1], device=heard.device) < heard[:, None])[..., None]
    in_frame = inputs["attention_mask"].bool()[..., None]
    mean, deviation = _masked_moments(patches, in_patch)
    # On the CPU in float64, where a mel bin that never changes has exactly no deviation, and not one of rounding errors.
    statistics = torch.cat(_masked_moments(inputs["input_values"].cpu().double(), in_frame.cpu()), dim=1)
    encoded = {
        "cls": cls,
        "mean": mean,
        "deviation": deviation,
        "statistics": statistics.float(),
        "heard": heard,
        "patches": patches,
    }
    return {name: values.cpu().numpy() for name, values in encoded.items()}


def _masked_moments(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation: (n, positions, width) and (n, positions, 1) -> twice (n, width)."""
    mean = _masked_mean(values, mask)
    return mean, _masked_mean((values - mean[:, None]) ** 2, mask).sqrt()


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(n, positions, width) and (n, positions, 1) -> (n, width). `where`, for what is masked may be anything, NaN too."""
    return torch.where(mask, values, 0).sum(1) / mask.sum(1)


def _fill(arrays: dict[str, np.ndarray], model: SSLAMModel, extractor: SSLAMFeatureExtractor, waveforms: Clips, batch_size: int) -> None:
    model.eval()
    if model.device.type == "cpu":
        keep_freed_memory()
    for start in tqdm(range(0, len(waveforms), batch_size), desc="encoding clips", unit="batch"):
        clips = range(start, min(start + batch_size, len(waveforms)))
        encoded = _encode_batch(model, extractor, [waveforms[i] for i in clips])
        for name, array in arrays.items():
            values = encoded[name]
            if not np.isfinite(values).all():
                raise ProbeError(
                    f"features ({name}) of the clips {clips.start} to {clips.stop - 1} are NaN or infinite: is the model whole?"
                )
            if array.dtype == np.float16 and (largest := np.abs(values).max()) > np.finfo(np.float16).max:
                raise ProbeError(f"patch tokens reach {largest:g}, which float16 cannot hold: encode with precision float32")
            array[clips.start : clips.stop] = values


def _shapes(model: SSLAMModel, extractor: SSLAMFeatureExtractor, clips: int, keep_patches: bool, precision: Precision) -> Shapes:
    config = model.config
    patches = extractor.max_length // config.patch_size * config.num_frequency_patches
    shapes: Shapes = {
        "cls": ((clips, config.hidden_size), np.dtype("float32")),
        "mean": ((clips, config.hidden_size), np.dtype("float32")),
        "deviation": ((clips, config.hidden_size), np.dtype("float32")),
        "statistics": ((clips, 2 * config.num_mel_bins), np.dtype("float32")),
        "heard": ((clips,), np.dtype("int64")),
    }
    return shapes | ({"patches": ((clips, patches, config.hidden_size), np.dtype(precision))} if keep_patches else {})


def hash_model(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, **more: Any) -> str:
    """Of all that decides what a model says of a clip, wherever it lies: configuration, extractor and weights; and of whatever is added."""
    config = {name: getattr(model.config, name) for name in inspect.get_annotations(SSLAMConfig)}  # not what every model has, as labels
    about = {"config": config, "extractor": extractor.to_dict(), **more}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _write(folder: Path, shapes: Shapes, model: SSLAMModel, extractor: SSLAMFeatureExtractor, waveforms: Clips, batch_size: int) -> None:
    size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
    if size > (free := shutil.disk_usage(folder.parent).free):  # a memory map would find out with a crash
        raise ProbeError(
            f"the features take {size / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free: choose another folder for the "
            "cache, a lower precision, or probes that need no patch tokens"
        )
    with write_folder_atomically(folder, manifest=True) as partial:
        arrays: dict[str, np.ndarray] = {
            name: np.lib.format.open_memmap(partial / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
            for name, (shape, dtype) in shapes.items()
        }
        _fill(arrays, model, extractor, waveforms, batch_size)
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]  # memory maps have it
    _verified[folder.resolve()] = _states(folder)


def _read(folder: Path, shapes: Shapes) -> dict[str, np.ndarray] | None:
    """What is stored in a folder of the cache; `None` if there is nothing, or if it is damaged, in which case it is taken away."""
    if not folder.exists():
        return None
    try:
        if _verified.get(folder.resolve()) != (states := _states(folder)):
            if problem := verify(folder):
                raise ValueError(problem)
            _verified[folder.resolve()] = states
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
        for name, (shape, dtype) in shapes.items():
            if (arrays[name].shape, arrays[name].dtype) != (shape, dtype):
                raise ValueError(f"{name}.npy holds {arrays[name].shape}, {arrays[name].dtype}, and not {shape}, {dtype}")
    except (OSError, ValueError, EOFError) as error:
        logger.warning(f"The cached features in {folder} are damaged ({error}): the clips are encoded again.")
        shutil.rmtree(folder)
        return None
    return arrays


# Folders whose hashes this process has compared, with the states of their files then: hashing large ones takes minutes.
_verified: dict[Path, dict[str, tuple[int, int, int]]] = {}


def _states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of each file of a folder."""
    found = ((path.name, path.stat()) for path in folder.iterdir())
    return {name: (state.st_ino, state.st_size, state.st_mtime_ns) for name, state in found}


def _features(arrays: dict[str, np.ndarray]) -> Features:
    values: dict[str, Any] = {"patches": None, **arrays}
    return Features(**values, rows=np.arange(len(arrays["cls"])))


__all__ = ["Clips", "Features", "Precision", "ProbeError", "encode_clips", "hash_model", "hash_waveforms"]
