"""Tensors that worker processes send in shared memory, which is used again when they are freed.

PyTorch sends each tensor in new shared memory: its file descriptor costs the receiver half a millisecond, its pages the sender as much.
"""

import itertools
import os
import weakref
from typing import Any

import numpy as np
import torch


MOST = 64  # pieces of memory of a worker: further tensors are sent in PyTorch's way

_numbers = itertools.count()
_channels: weakref.WeakValueDictionary[int, "SharedTensors"] = weakref.WeakValueDictionary()


class SharedTensors:
    """The shared memory of the workers of one iteration; the receiver makes it before it starts them."""

    def __init__(self, workers: int):
        self.channel = next(_numbers)
        self.in_use = torch.zeros(workers, MOST, dtype=torch.uint8).share_memory_()
        self.made: dict[tuple[int, int], torch.Tensor] = {}  # pieces by worker and number
        self.received: dict[tuple[int, int], np.ndarray] = {}
        _channels[self.channel] = self

    def pack(self, batch: Any, worker: int) -> Any:
        """A batch as this worker sends it: of a dictionary, the tensors are copied to memory that is free."""
        if not isinstance(batch, dict):
            return batch
        return {name: self._pack(value, worker) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def _pack(self, tensor: torch.Tensor, worker: int) -> Any:
        size = tensor.nbytes
        for number in range(MOST):
            key = worker, number
            is_new = key not in self.made
            if is_new:
                self.made[key] = torch.empty(size, dtype=torch.uint8).share_memory_()
            if not self.in_use[key] and size <= self.made[key].nbytes <= 2 * size:
                self.made[key][:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
                self.in_use[key] = 1
                return _Packed(self.channel, key, tensor.dtype, tensor.shape, size, self.made[key] if is_new else None)
        return tensor


class _Packed:
    """Unpickled as the tensor."""

    def __init__(self, *values: Any):
        self.values = values

    def __reduce__(self):
        return _unpack, self.values


def _unpack(
    channel: int, key: tuple[int, int], dtype: torch.dtype, shape: torch.Size, size: int, piece: torch.Tensor | None
) -> torch.Tensor:
    shared = _channels[channel]
    if piece is not None:
        shared.received[key] = piece.numpy()
    memory = shared.received[key][:size]
    # Held by the tensor and its views.
    weakref.finalize(memory, _release, shared.in_use.numpy(), key, os.getpid()).atexit = False
    return torch.from_numpy(memory).view(dtype).view(shape)


def _release(in_use: np.ndarray, key: tuple[int, int], receiver: int) -> None:
    if os.getpid() == receiver:  # and not a process that was forked from it
        in_use[key] = 0
