"""No step waits for the device: the host reads nothing that a step computes, and copies nothing to the device that blocks."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode


soundfile = pytest.importorskip("soundfile")
from test_pretraining_loop import trainer  # noqa: E402

from transformers_sslam.pretraining.loop import PreTrainer  # noqa: E402


# Operations whose outcome, or the shape of it, follows from values: `item`, `bool`, `equal`, `nonzero`, `unique`, `masked_select` ...
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostSynchronisations(TorchDispatchMode):
    """Notes in `found` the operations at which the host would wait, if the tensors were an accelerator's."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.found += [str(function)] * self._waits(function, args, kwargs)
        return function(*args, **kwargs)

    def _waits(self, function, args, kwargs) -> bool:
        name = function.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_"):  # these have the tag, but only masks have as many indices as there are `True`s
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if name == "_to_copy":
            source, target, non_blocking = args[0].device, kwargs.get("device"), kwargs.get("non_blocking", False)
        elif name == "copy_":
            source, target, non_blocking = args[1].device, args[0].device, len(args) > 2 and args[2]
        else:
            return bool(READS & set(function.tags))
        crosses = target is not None and torch.device(target).type != source.type
        return crosses and (torch.device(target).type == "cpu" or not non_blocking)


def a_trainer(folder: Path, **changes) -> PreTrainer:
    sounds = folder / "sounds"
    sounds.mkdir()
    soundfile.write(sounds / "a.wav", np.sin(np.arange(16_000) / 10), 16_000)  # a run wants a source; batches come from below
    return trainer(sounds, folder / "run", **changes)


def batches(run: PreTrainer, value: float = 1.0) -> list[dict[str, torch.Tensor]]:
    """The batches of one step."""
    full = {"input_values": value * torch.randn(4, 64, 128), "attention_mask": (torch.arange(64) < 48).int().expand(4, -1)}
    return [{name: full[name] for name in run.inputs} for _ in range(run.settings.gradient_accumulation_steps)]


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor[0].item(),
        lambda tensor: float(tensor[0]),
        lambda tensor: bool(tensor[0] > 0),
        lambda tensor: range(tensor.long()[0]),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.masked_select(tensor > 0),
        lambda tensor: tensor.unique(),
        lambda tensor: torch.equal(tensor, tensor + 1),
        lambda tensor: torch.zeros(3, device="meta").cpu(),
        lambda tensor: torch.zeros(3, device="meta").tolist(),
        lambda tensor: tensor.to("meta"),  # from memory that is not pinned
        lambda tensor: torch.zeros(3, device="meta").copy_(tensor),
    ],
)
def test_the_count_sees_what_waits(read):
    with HostSynchronisations() as synchronisations, contextlib.suppress(NotImplementedError):  # of tensors without values
        read(torch.ones(3))
    assert len(synchronisations.found) == 1


def test_the_count_passes_over_what_does_not_wait():
    with HostSynchronisations() as synchronisations:
        tensor = torch.ones(3, 3)
        tensor = tensor[torch.tensor([0, 2])].to(torch.float64).masked_fill(tensor[:2] > 0, 1).topk(2).values
        tensor.float().to("meta", non_blocking=True)
    assert synchronisations.found == []


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_has_no_synchronisation(tmp_path, stage, accumulation, scaled):
    """Forward, backward, clipping, step and teacher: of the first step, of one that is skipped, of the one after it."""
    run = a_trainer(tmp_path, stage=stage, gradient_accumulation_steps=accumulation, mask_padding=True)
    if scaled:
        run.accelerator.scaler = torch.amp.GradScaler("cpu")
    with HostSynchronisations() as synchronisations:
        for value in (1.0, torch.inf, 1.0):
            run._train(batches(run, value))
    assert synchronisations.found == []
    run._log()
    assert run.skipped == 1


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_runs_on_tensors_that_have_no_values(tmp_path, monkeypatch, stage):
    """On the meta device nothing can be read, also by operations that the count above does not know."""
    run = a_trainer(tmp_path, stage=stage, gradient_accumulation_steps=2, mask_padding=True)
    run.model.to("meta")
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    with HostSynchronisations() as synchronisations:
        for _ in range(2):
            run._train(batches(run))
    assert synchronisations.found == []
    assert (run.step, run.clips_seen, len(run.log.pending)) == (2, 16, 2)
    assert {tensor.device.type for tensor in (*run.model.parameters(), *run.log.pending)} == {"meta"}
