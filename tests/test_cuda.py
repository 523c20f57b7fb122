"""Pre-training on a GPU. Every test also runs on the CPU, so that it is known to be right before a GPU is there."""

import contextlib
from itertools import pairwise

import pytest
import torch
from accelerate.state import AcceleratorState


pytest.importorskip("soundfile")
from conftest import noise, tiny_config
from test_host_synchronisation import HostSynchronisations, a_trainer, batches

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForPreTraining
from transformers_sslam.fbank import log_mel


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request, monkeypatch):
    """The device of the runs of a test. Accelerate keeps to the first one that a process asks for."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(request.param == "cpu"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # numbers are compared with the CPU's
    AcceleratorState._reset_state(True)
    yield torch.device(request.param)
    AcceleratorState._reset_state(True)


@contextlib.contextmanager
def no_synchronisation(device: torch.device):
    """Fail where the host waits: of a GPU, torch itself says so; on the CPU, operations are counted that would."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with HostSynchronisations() as synchronisations:
            yield
        assert synchronisations.found == []


def on_the_way_to(device: torch.device, run, value: float = 1.0) -> list[dict[str, torch.Tensor]]:
    """An update's batches, as the loop has them: in memory that a GPU copies from by itself."""
    return [
        {name: values.contiguous().pin_memory() if device.type == "cuda" else values for name, values in batch.items()}
        for batch in batches(run, value)
    ]


def state(run) -> list[torch.Tensor]:
    """Weights, teacher and moments, as they are now."""
    moments = [value for values in run.optimizer.state.values() for value in values.values()]
    return [tensor.detach().clone() for tensor in (*run.model.state_dict().values(), *moments)]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_updates_do_not_wait_and_one_that_is_not_finite_changes_nothing(tmp_path, device, stage, precision):
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("float16 is trained on GPUs alone")
    run = a_trainer(tmp_path, stage=stage, bf16=precision == "bf16", fp16=precision == "fp16", mask_padding=True, warmup_steps=0)
    assert run.accelerator.device.type == device.type
    if run.accelerator.scaler is not None:
        run.accelerator.scaler = torch.amp.GradScaler(device.type, init_scale=1.0)  # one at which nothing overflows
    sent = [on_the_way_to(device, run, value) for value in (1.0, 1.0, torch.inf, 1.0)]
    run._train(sent[0])  # the first also allocates, and loads kernels
    states = [state(run)]
    for batch in sent[1:]:
        with no_synchronisation(device):
            run._train(batch)
        states.append(state(run))
    changes = [[not torch.equal(a, b) for a, b in zip(before, after)] for before, after in pairwise(states)]
    assert any(changes[0])
    assert not any(changes[1])
    assert any(changes[2])
    assert all(tensor.device.type == device.type and tensor.isfinite().all() for tensor in states[3])
    if run.accelerator.scaler is not None:
        assert run.accelerator.scaler.get_scale() == 0.5
    run._log()
    assert (run.step, run.skipped, run.skipped_in_a_row) == (4, 1, 0)


@pytest.mark.timeout(600)  # a GPU's code is generated
def test_a_compiled_update_is_the_same_and_does_not_wait(tmp_path, device, request):
    if device.type == "cpu":
        request.getfixturevalue("without_code_generation")
    torch._dynamo.reset()  # what other tests compiled, of other sizes
    losses = []
    for compile in (False, True):
        (tmp_path / str(compile)).mkdir()
        run = a_trainer(tmp_path / str(compile), torch_compile=compile, warmup_steps=0)
        torch.manual_seed(0)
        sent = [on_the_way_to(device, run) for _ in range(3)]
        run._train(sent[0])
        run._train(sent[1])
        with no_synchronisation(device) if device.type == "cuda" else contextlib.nullcontext():  # a dispatch mode is not compiled
            run._train(sent[2])
        losses.append(torch.stack(run.log.pending)[:, 0, 0].tolist())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_losses_and_gradients_are_those_of_the_cpu(device):
    config = tiny_config(use_mixtures=True, num_views=2, unmixed_span_length=16, hidden_dropout_prob=0.0)
    torch.manual_seed(0)
    models = [SSLAMForPreTraining(config).train()]
    models.append(SSLAMForPreTraining(config).train().to(device))
    models[1].load_state_dict(models[0].state_dict())
    values, results = torch.randn(3, 128, 128), []
    for model in models:  # one generator, on the CPU: the same masks, spans and noise on any device
        generator = torch.Generator().manual_seed(1)
        loss = model(values.to(next(model.parameters()).device), generator=generator).loss
        loss.backward()
        numbers = [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
        results.append(torch.cat([number.flatten().cpu() for number in numbers]))
    assert (results[0] - results[1]).norm() < 1e-4 * results[0].norm()


def test_log_mels_are_those_of_the_cpu(device):
    waveforms = torch.from_numpy(noise(12.0)).unflatten(0, (3, -1))
    log_mel(waveforms.to(device))  # window and filters are copied once
    sent = waveforms.to(device)
    with no_synchronisation(device):
        computed = log_mel(sent)
    assert computed.device.type == device.type
    torch.testing.assert_close(computed.cpu(), log_mel(waveforms), atol=1e-3, rtol=0)


def test_a_feature_extractor_computes_on_the_device(device):
    clips = [noise(1.0), noise(2.5, seed=1)]
    extractor = SSLAMFeatureExtractor(max_length=256)
    here = extractor(clips, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    there = extractor(clips, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True, device=device)
    assert {values.device.type for values in there.values()} == {device.type}
    torch.testing.assert_close(there["input_values"].cpu(), here["input_values"], atol=1e-3, rtol=0)
    assert torch.equal(there["attention_mask"].cpu(), here["attention_mask"])
