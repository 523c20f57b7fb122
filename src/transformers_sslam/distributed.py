"""The processes of a run that was started by `accelerate launch` or torchrun."""

import gc

from accelerate import PartialState


def leave_process_group() -> None:
    """Join the threads of the process group. Call this last, when no local name holds a trainer or a wrapped model.

    One of these threads may still release a tensor when the interpreter ends, which aborts the process: "terminate called without an
    active exception". The group lives as long as anything refers to it, and wrapped models are in reference cycles.
    """
    gc.collect()
    PartialState().destroy_process_group()
