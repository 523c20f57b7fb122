"""The pre-training objective against the numbers of the authors' code: both stages, the gradients, one whole update."""

import numpy as np
import pytest
import torch
from conftest import relative_error

from transformers_sslam import PRETRAINING_STAGES, SSLAMForPreTraining
from transformers_sslam.publishing.conversion import RENAMED, convert_checkpoint


class Numbers(dict):
    """An `.npz` file, as tensors."""

    def __init__(self, path):
        with np.load(path) as file:
            super().__init__({name: torch.from_numpy(np.asarray(file[name])) for name in file.files})


@pytest.fixture
def pretrained(reference, tmp_path):
    convert_checkpoint(reference / "pretrained_fairseq.pt", tmp_path / "model")

    def load(stage: int) -> SSLAMForPreTraining:
        return SSLAMForPreTraining.from_pretrained(tmp_path / "model", mask_noise_std=0.0, **PRETRAINING_STAGES[stage]).train()

    return load


def run(model: SSLAMForPreTraining, numbers: Numbers):
    inputs = numbers["input_values"].float(), numbers["bool_masked_pos"], numbers.get("unmixed_span_starts")
    return model(*inputs, output_targets=True)


def official_tensor(ours: dict[str, torch.Tensor], name: str, prefix: str = "sslam.") -> torch.Tensor:
    """Our tensor for an official name; q, k and v are one tensor there."""
    if "decoder." in name:
        name = name.replace("modality_encoders.IMAGE.decoder.blocks.", "decoder.layers.").replace(".0.weight", ".weight")
        return ours[name.replace(".0.bias", ".bias").replace("modality_encoders.IMAGE.decoder.proj.", "decoder.projection.")]
    for theirs, renamed in RENAMED:
        name = name.replace(theirs, renamed)
    if ".attn.qkv." in name:
        return torch.cat([ours[prefix + name.replace(".attn.qkv.", f".attention.{part}_proj.")] for part in "qkv"])
    tensor = ours[prefix + name]
    return tensor.unflatten(1, (1, 16, 16)) if name == "embeddings.patch_embeddings.projection.weight" else tensor  # a convolution there


@pytest.mark.parametrize("stage", [1, 2])
def test_student_and_targets_are_the_authors(reference, pretrained, stage):
    numbers = Numbers(reference / f"stage{stage}.npz")
    output = run(pretrained(stage), numbers)
    width = numbers["student_masked"].shape[1]
    views = len(output.cls_predictions) // len(output.global_targets)
    compared = {
        "student_masked": (output.predictions.detach().reshape(-1, width), 3e-6),
        "student_cls": (output.cls_predictions.detach().reshape(numbers["student_cls"].shape), 3e-6),
        "teacher_local_target_masked": (output.local_targets.reshape(-1, width), 3e-6),
        "teacher_global_target": (output.global_targets.repeat_interleave(views, dim=0), 2e-5),
    }
    if stage == 2:
        mixed = output.predictions.detach()[len(output.predictions) // 2 :]
        compared["student_masked_mixed"] = mixed.reshape(-1, width), 3e-6
        compared["source_retention_target_masked"] = output.source_retention_targets.reshape(-1, width), 3e-6
        assert torch.equal(output.mixed_input_values, numbers["mixed_input_values"])
    for name, (actual, tolerance) in compared.items():
        assert relative_error(actual, numbers[name]) < tolerance, name


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_and_collapse_statistics_are_the_authors(reference, pretrained, stage):
    numbers = Numbers(reference / f"stage{stage}.npz")
    output = run(pretrained(stage), numbers)
    size = output.sample_size
    assert size == numbers["sample_size"]
    compared = {
        "loss": output.loss,
        "loss_summed": output.loss_sum,
        "local_loss_sum": output.local_loss * size,
        "global_loss_sum_before_scale": output.global_loss,
        "target_var": output.target_std,
        "pred_var": output.prediction_std,
    }
    if stage == 2:
        compared["source_retention_loss_sum_before_x2"] = output.source_retention_loss * size / 2
        assert output.bool_masked_pos.float().mean() == numbers["masked_pct"]
    for name, actual in compared.items():
        assert relative_error(actual.detach(), numbers[name]) < 2e-6, name


def test_every_gradient_is_the_authors(reference, pretrained):
    model, expected = pretrained(2), Numbers(reference / "stage2_grads.npz")
    run(model, Numbers(reference / "stage2.npz")).loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, gradient in expected.items():
        assert relative_error(official_tensor(ours, name), gradient) < 1e-5, name
    assert sum(gradient.numel() for gradient in ours.values()) == sum(gradient.numel() for gradient in expected.values())


def test_student_and_teacher_after_an_update_are_the_authors(reference, pretrained):
    model, expected = pretrained(2), Numbers(reference / "stage2_after_step.npz")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    beta1, beta2 = expected["betas"].tolist()
    # The authors add eps before the bias correction, torch after it; this is the first step.
    eps = expected["eps"].item() / (1 - beta2) ** 0.5
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=expected["lr"].item(), betas=(beta1, beta2), eps=eps, weight_decay=expected["weight_decay"].item()
    )
    run(model, Numbers(reference / "stage2.npz")).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 4.0)
    optimizer.step()
    model.update_teacher(1)
    assert relative_error(norm, expected["grad_norm"]) < 1e-5
    after = model.state_dict()
    for name, tensor in expected.items():
        if name.startswith("student."):
            name = name.removeprefix("student.")
            old = official_tensor(before, name)
            if name.endswith("positions"):
                assert torch.equal(official_tensor(after, name), tensor)
            else:
                assert relative_error(official_tensor(after, name) - old, tensor - old) < 0.01, name
        elif name.startswith("teacher."):
            name = name.removeprefix("teacher.")
            difference = official_tensor(after, name, "teacher.") - tensor
            assert difference.abs().max() < 3e-7, name
    assert sum(name.startswith("teacher.") for name in expected) > 100
