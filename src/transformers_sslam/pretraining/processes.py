"""The processes of a run: how they are started, and how a signal stops them after the same step."""

import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from ..errors import UserError, as_user_error
from .settings import PreTrainingSettings


T = TypeVar("T")


def build_accelerator(settings: PreTrainingSettings) -> Accelerator:
    """The Accelerator of a run.

    Raises:
        UserError: if it does not know the precision or a tracker, or its processes cannot train together.
    """
    with as_user_error("report_to, bf16 or fp16"):
        accelerator = Accelerator(
            mixed_precision="bf16" if settings.bf16 else "fp16" if settings.fp16 else None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop accumulates, whatever a launcher sets
            log_with=settings.report_to or None,
            project_dir=settings.output_dir,
            # The only buffers are position embeddings, which never change: nothing to broadcast before each forward pass.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 is set, which needs a GPU: on a CPU use bf16, or neither")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"Accelerate was set to {accelerator.distributed_type.value}, but each process here holds the whole model (6 GB of weights, "
            "gradients and moments for the large one): choose data-parallel training, as in scripts/launch"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:  # they would not know of each other, and overwrite each other's files
        raise UserError(
            f"{started} processes were started, but Accelerate sees {accelerator.num_processes}: on CPUs set ACCELERATE_USE_CPU=true"
        )
    return accelerator


class _Interrupted(BaseException):
    """A signal arrived during a wait. Not an `Exception`: no handler on the way may take it for a damaged file."""


class StopSignals:
    """Receives SIGTERM and SIGINT while entered.

    A second Ctrl-C interrupts as usual. SIGTERM may arrive twice: a launcher forwards what a scheduler has sent to every process.

    Attributes:
        received: number of the last signal that this process received, or `None`.
    """

    def __init__(self, num_processes: int):
        self.received: int | None = None
        self._waiting = False
        # Over CPU tensors: an answer of NCCL would have to be read from the device.
        self._group: Any = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None

    def __enter__(self) -> "StopSignals":
        self._former: dict[int, Any] = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._former[number])
        self.received = number
        if self._waiting:
            raise _Interrupted

    def wait_for(self, function: Callable[[], T]) -> T | None:
        """What `function` returns; `None` once a signal has arrived, which ends a wait for data that may never come."""
        self._waiting = True
        try:
            return function() if self.received is None else None
        except _Interrupted:
            return None
        finally:
            self._waiting = False

    def agreed(self) -> bool:
        """Whether any process received a signal. All processes call this, and get the same answer."""
        if self._group is None:
            return self.received is not None
        stop = torch.tensor(int(self.received is not None))
        torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(stop)
