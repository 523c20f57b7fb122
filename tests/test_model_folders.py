"""A folder that is not a whole model: which file is missing or wrong, and what to do, before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_config

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, cli
from transformers_sslam.errors import UserError
from transformers_sslam.publishing.folders import INDEX, check_model_folder


ADVICE = "give a folder that save_pretrained of a SSLAM model and of its feature extractor wrote to"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A whole model, named `model` below the current folder."""
    monkeypatch.chdir(tmp_path)
    model = SSLAMForAudioClassification(tiny_config(id2label={0: "dog", 1: "rain"}))
    model.save_pretrained("model")
    SSLAMFeatureExtractor(max_length=64).save_pretrained("model")
    check_model_folder("model")
    return Path("model")


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (["preprocessor_config.json"], "preprocessor_config.json"),
        (["model.safetensors"], "model.safetensors"),
        (["config.json"], "config.json"),
        (["config.json", "preprocessor_config.json", "model.safetensors"], "config.json, preprocessor_config.json, model.safetensors"),
    ],
)
def test_what_is_missing_is_named(folder, missing, named):
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(UserError, match=f"^model lacks {named}: {ADVICE}$"):
        check_model_folder("model")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"model_type": "bert"}, "model/config.json is of a model of type 'bert', but 'sslam' is expected: "),
        ("config.json", {}, "model/config.json is of a model of type None, but 'sslam' is expected: "),
        (
            "preprocessor_config.json",
            {"feature_extractor_type": "ASTFeatureExtractor"},
            "model/preprocessor_config.json is of a ASTFeatureExtractor, but SSLAMFeatureExtractor is expected: ",
        ),
    ],
)
def test_files_of_another_model_are_named(folder, file, values, message):
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"^{message}{ADVICE}$"):
        check_model_folder("model")


def test_a_damaged_file_is_named(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"^model/model.safetensors is damaged or was cut off \(.*\): copy it again, or save the model again$"
    ):
        check_model_folder("model")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="^model/config.json is damaged"):
        check_model_folder("model")


def test_a_missing_shard_is_named(folder):
    SSLAMForAudioClassification.from_pretrained(folder).save_pretrained("parts", max_shard_size="20KB")
    shutil.copy(folder / "preprocessor_config.json", "parts")
    check_model_folder("parts")
    shards = sorted(Path("parts").glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(UserError, match=f"^parts lacks {shards[1].name}, which {INDEX} names: copy all files of the model there$"):
        check_model_folder("parts")


def test_models_of_the_hub_and_official_ones_are_left_to_their_loaders(folder):
    check_model_folder("someone/model")
    (folder / "config.json").write_text('{"model_type": "eat"}')
    (folder / "preprocessor_config.json").unlink()
    check_model_folder("model")


@pytest.mark.parametrize("command", [["app", "--open_browser", "false"], ["publish", "--space", "--output_dir", "page"]])
def test_commands_say_so_in_one_sentence(folder, command, capsys):
    pytest.importorskip("gradio", reason="needs the extra app")
    (folder / "preprocessor_config.json").unlink()
    assert cli.main([*command, "--model", "model"]) == 1
    assert capsys.readouterr().err == f"sslam {command[0]}: error: model lacks preprocessor_config.json: {ADVICE}\n"
    assert cli.main([*command, "--model", "./no where"]) == 1
    assert capsys.readouterr().err.startswith(f"sslam {command[0]}: error: there is no folder or file ./no where here, and no model of ")
