"""Checkpoints written when the patch projection was a convolution, and the authors' weights: loaded by every way there is."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForPreTraining,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from transformers_sslam import (
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForAudioFrameClassification,
    SSLAMForPreTraining,
    SSLAMModel,
)
from transformers_sslam.evaluation.loading import load_model
from transformers_sslam.finetuning.model import build_model
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.loading_sslam import flatten_patch_projection_moments
from transformers_sslam.pretraining import model as pretraining
from transformers_sslam.pretraining.settings import PreTrainingSettings
from transformers_sslam.publishing.onnx_export import export_onnx


CARD = Path(__file__).parents[1] / "model_cards" / "sslam-tiny-esc10"
CLASSES = [SSLAMModel, SSLAMForAudioClassification, SSLAMForAudioFrameClassification, SSLAMForPreTraining]
AUTO_CLASSES = [AutoModel, AutoModelForAudioClassification, AutoModelForAudioFrameClassification, AutoModelForPreTraining]


def log_mels(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 128, 128, generator=torch.Generator().manual_seed(1))


def with_convolutions(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As former checkpoints held them."""
    name = "patch_embeddings.projection.weight"
    return {key: tensor.unflatten(1, (1, 16, 16)) if key.endswith(name) else tensor for key, tensor in tensors.items()}


def make_former(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = with_convolutions(load_file(file))
    assert any(tensor.dim() == 4 and tensor.shape[1] == 1 for tensor in tensors.values())
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(params=CLASSES)
def former(request, tmp_path) -> tuple[PreTrainedModel, Path]:
    """A model, and the folder in which a former version saved it."""
    model = request.param(tiny_config(num_labels=3, num_views=2, unmixed_span_length=32)).eval()
    model.save_pretrained(tmp_path / "former")
    make_former(tmp_path / "former")
    return model, tmp_path / "former"


def encoder(model: PreTrainedModel) -> SSLAMModel:
    return model if isinstance(model, SSLAMModel) else model.sslam


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("loader", CLASSES + AUTO_CLASSES)
def test_a_former_checkpoint_loads_in_every_class(former, loader):
    model, folder = former
    loaded, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not info["mismatched_keys"]
    parts = ("sslam.", "embeddings.", "layers.")
    assert not [name for name in {*info["missing_keys"], *info["unexpected_keys"]} if name.startswith(parts)]
    assert_same(encoder(loaded).state_dict(), encoder(model).state_dict())
    with torch.inference_mode():
        assert torch.equal(encoder(loaded)(log_mels()).last_hidden_state, encoder(model)(log_mels()).last_hidden_state)


def test_a_former_checkpoint_is_saved_as_it_is_now(former, tmp_path):
    model, folder = former
    type(model).from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), model.state_dict())
    loaded = type(model).from_pretrained(tmp_path / "again")
    assert_same(loaded.state_dict(), model.state_dict())
    loaded.save_pretrained(tmp_path / "once more")
    assert_same(load_file(tmp_path / "once more" / "model.safetensors"), model.state_dict())


def test_a_former_checkpoint_may_be_offloaded_renamed_and_rounded(former, tmp_path):
    model, folder = former
    prefix = "" if isinstance(model, SSLAMModel) else "sslam."
    other = {name.replace("patch_embeddings", "patches"): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    places = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    places |= {"embeddings": "disk"} if not prefix else {"sslam": "disk"}
    loaded = type(model).from_pretrained(
        folder,
        key_mapping={r"\.patches\.": ".patch_embeddings."},
        dtype=torch.bfloat16,
        device_map=places,
        offload_folder=tmp_path / "weights",
    )
    assert next(encoder(loaded).embeddings.parameters()).device.type == "meta"
    expected = encoder(model).to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(encoder(loaded)(log_mels()).last_hidden_state, expected(log_mels()).last_hidden_state)


def test_a_former_state_is_loaded_and_left_as_it_is(former):
    model, _ = former
    state = with_convolutions(model.state_dict())
    shapes = {name: tensor.shape for name, tensor in state.items()}
    other = type(model)(model.config)
    other.load_state_dict(state)
    assert_same(other.state_dict(), model.state_dict())
    assert {name: tensor.shape for name, tensor in state.items()} == shapes


def test_commands_take_a_model_that_was_saved_for_tuples(tmp_path):
    SSLAMForAudioClassification(tiny_config(num_labels=2, return_dict=False)).save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / "model")
    origin, settings = str(tmp_path / "model"), FineTuningSettings(data_dir="sounds", output_dir=str(tmp_path / "run"))
    evaluated, extractor = load_model(SSLAMForAudioClassification, origin, device="cpu")
    for model in (evaluated, build_model(settings, extractor, ["a", "b"], multi_label=False, origin=origin)):
        assert model(log_mels()).logits.shape == (2, 2)
    assert export_onnx(origin, tmp_path / "exported")
    again = PreTrainingSettings(output_dir=str(tmp_path / "run"), data_dir="sounds", model_config={"unmixed_span_length": 16})
    assert pretraining.build_model(again, extractor, origin=origin).config.return_dict


def test_the_published_weights_of_the_repository_load():
    tensors = load_file(CARD / "model.safetensors")
    weight = tensors["sslam.embeddings.patch_embeddings.projection.weight"]
    assert weight.dim() == 4, "the card now has new weights: keep a former file for this test"
    embeddings = SSLAMForAudioClassification.from_pretrained(CARD).sslam.embeddings.patch_embeddings
    bias = tensors["sslam.embeddings.patch_embeddings.projection.bias"]
    expected = nn.functional.conv2d(log_mels().unsqueeze(1), weight, bias, stride=16).flatten(2).transpose(1, 2)
    with torch.inference_mode():
        torch.testing.assert_close(embeddings(log_mels()), expected, rtol=1e-5, atol=1e-5)


def test_a_trainer_resumes_from_a_former_checkpoint(tmp_path):
    """Weights and moments: the run ends as one that was never interrupted."""
    clips = [{"input_values": values, "labels": label} for values, label in zip(log_mels(8), torch.arange(8) % 3)]

    def train(folder: str, **options) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = SSLAMForAudioClassification(tiny_config(num_labels=3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer.register_load_state_dict_post_hook(flatten_patch_projection_moments)
        arguments = TrainingArguments(
            tmp_path / folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        trainer = Trainer(model, arguments, train_dataset=clips, optimizers=(optimizer, None))
        trainer.train(**options)
        return model.state_dict()

    expected = train("run")
    former = tmp_path / "run" / "checkpoint-2"
    make_former(former)
    state = torch.load(former / "optimizer.pt")
    moments = [values for values in state["state"].values() if values["exp_avg"].shape == (32, 256)]
    assert len(moments) == 1
    moments[0].update({name: moments[0][name].unflatten(1, (1, 16, 16)) for name in ("exp_avg", "exp_avg_sq")})
    torch.save(state, former / "optimizer.pt")
    assert_same(train("resumed", resume_from_checkpoint=str(former)), expected)


# --- the authors' weights


@pytest.mark.parametrize("model_class", CLASSES)
def test_official_weights_are_converted_into_the_cache_and_loaded(model_class, tmp_path, monkeypatch):
    expected, asked = SSLAMModel(tiny_config()), []
    expected.save_pretrained(tmp_path)

    def convert_to_cache(checkpoint):
        asked.append(checkpoint)
        return tmp_path

    monkeypatch.setattr("transformers_sslam.publishing.conversion.convert_to_cache", convert_to_cache, raising=False)
    model = model_class.from_official("ta012/SSLAM_pretrain", drop_path_rate=0.1)
    assert asked == ["ta012/SSLAM_pretrain"]
    assert type(model) is model_class
    assert model.config.drop_path_rate == 0.1
    assert_same(encoder(model).state_dict(), expected.state_dict())


def test_official_weights_need_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers_sslam", None)
    with pytest.raises(ImportError, match="pip install transformers-sslam"):
        SSLAMModel.from_official("ta012/SSLAM_pretrain")
