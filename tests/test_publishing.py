"""Publishing: what goes up and what does not, with the real client against a Hub on this machine, and loaded back from there."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from conftest import noise, tiny_config
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForPreTraining, SSLAMModel
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.publishing import hub
from transformers_sslam.publishing.cards import write_model_card
from transformers_sslam.publishing.hub import PublishError, prepare_publication, upload


PACKAGE = Path(hub.__file__).parents[1]
REPOSITORY = "tests/small-sounds"
SOURCE = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "results.json"]
CODE = sorted(path.name for path in hub._remote_code())
PUBLISHED = sorted([*SOURCE, *CODE])
LOAD = """
import json, sys
if sys.argv[3] == "without the package":
    sys.modules["transformers_sslam"] = None  # whoever imports it gets an ImportError
    how = {"trust_remote_code": True}
else:
    sys.modules.update({"scipy": None, "sklearn": None, "evaluate": None})  # not installed with the package alone
    import transformers_sslam.publishing.conversion
    how = {}
import numpy as np, torch
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification
name = sys.argv[1]
inputs = AutoFeatureExtractor.from_pretrained(name, **how)(np.load(sys.argv[2]), sampling_rate=16_000, return_tensors="pt")
with torch.inference_mode():
    classifier = AutoModelForAudioClassification.from_pretrained(name, **how).eval()
    encoder = AutoModel.from_pretrained(name, **how).eval()
    result = {"logits": classifier(**inputs).logits.tolist(), "pooled": encoder(**inputs).pooler_output.tolist()}
result["classes"] = [type(model).__name__ + " of " + type(model).__module__.split(".")[0] for model in (classifier, encoder)]
print("RESULT" + json.dumps(result))
"""


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def api(server, monkeypatch) -> HfApi:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=server.url, token=TOKEN)


@pytest.fixture
def model() -> SSLAMForAudioClassification:
    return SSLAMForAudioClassification(tiny_config(id2label={0: "dog", 1: "rain"}, label2id={"dog": 0, "rain": 1})).eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """What a training leaves: the model, and files that are private."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=128).save_pretrained(folder)
    write_model_card(folder, "Trained on two sounds.")
    (folder / "results.json").write_text(json.dumps({"metrics": {"accuracy": 0.5}}))
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"another")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def environment(server: HubServer, tmp_path: Path) -> dict[str, str]:
    hub_settings = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **hub_settings, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def command(server, api, monkeypatch, capsys):
    """Runs `sslam publish` and gives what it printed."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(*arguments) -> str:
        code = main(["publish", *map(str, arguments)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


def load_back(server: HubServer, tmp_path: Path, how: str) -> dict:
    command = [sys.executable, "-c", LOAD, REPOSITORY, "clip.npy", how]
    settings = environment(server, tmp_path / how)  # a cache of its own
    run = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.partition("RESULT")[2])


def test_what_is_published_loads_from_there_with_the_package_and_without(server, command, folder, model, tmp_path):
    before = contents(folder)
    out = command("--model", folder, "--repo_id", REPOSITORY)
    assert f"published: {server.url}/{REPOSITORY}" in out
    assert "stays here: checkpoint-3/, training_args.bin" in out
    assert contents(folder) == before

    remote = server.repositories[REPOSITORY].branches["main"]
    assert sorted(remote.keys() - {".gitattributes"}) == PUBLISHED
    assert {"configuration_sslam.py", "feature_extraction_sslam.py", "modeling_sslam.py", "modeling_sslam_pretraining.py"} <= set(CODE)
    assert all(remote[name] == (PACKAGE / name).read_bytes() for name in CODE)
    assert all(remote[name] == before[name] for name in ("model.safetensors", "results.json"))
    models = ("AudioClassification", "AudioFrameClassification", "PreTraining")
    auto_classes = ["AutoConfig", "AutoModel", *(f"AutoModelFor{task}" for task in models)]
    assert sorted(json.loads(remote["config.json"])["auto_map"]) == auto_classes
    assert json.loads(remote["preprocessor_config.json"])["auto_map"].keys() == {"AutoFeatureExtractor"}
    card = ModelCard(remote["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "audio-classification")
    assert f'model="{REPOSITORY}"' in card.text

    with torch.inference_mode():
        inputs = SSLAMFeatureExtractor(max_length=128)(noise(1.0), sampling_rate=16_000, return_tensors="pt")
        logits, pooled = model(**inputs).logits, model.sslam(**inputs).pooler_output
    homes = {"without the package": "transformers_modules", "with the package": "transformers_sslam"}
    np.save(tmp_path / "clip.npy", noise(1.0))
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda how: load_back(server, tmp_path, how), homes))
    for home, result in zip(homes.values(), results):
        assert result["classes"] == [f"SSLAMForAudioClassification of {home}", f"SSLAMModel of {home}"]
        torch.testing.assert_close(torch.tensor(result["logits"]), logits, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(torch.tensor(result["pooled"]), pooled, atol=1e-6, rtol=1e-6)


def test_a_dry_run_lists_sizes_and_sends_nothing(server, command, folder):
    out = command("--model", folder, "--repo_id", REPOSITORY, "--dry_run")
    listed = {name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+) bytes  (\S+\.\S+)$", out, flags=re.MULTILINE)}
    assert sorted(listed) == PUBLISHED
    assert listed["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert f"nothing was sent to {REPOSITORY}" in out
    assert "note: the card names no licence" in out
    assert server.writes == []
    assert server.repositories == {}


def test_publishing_again_sends_only_what_changed(server, api, folder, model):
    for change in (None, "card", "weights"):
        if change == "card":
            write_model_card(folder, "Trained on two sounds, and tried by a friend.")
        elif change == "weights":
            torch.nn.init.ones_(model.classifier.bias)
            model.save_pretrained(folder)
        server.writes.clear()
        with prepare_publication(folder, REPOSITORY) as publication:
            upload(publication, api=api)
        stored = [write for write in server.writes if write.startswith("PUT")]
        assert len(stored) == (change != "card")  # objects; only the weights are one
    first, *others = server.repositories[REPOSITORY].commits
    assert sorted(first) == PUBLISHED
    assert others == [["README.md"], ["model.safetensors"]]
    with prepare_publication(folder, REPOSITORY) as publication:
        upload(publication, api=api)
    assert len(server.repositories[REPOSITORY].commits) == 3


def test_other_files_of_the_repository_and_other_branches_are_left_alone(server, api, folder):
    api.create_repo(REPOSITORY)
    server.repositories[REPOSITORY].branches["main"]["notes.md"] = b"mine"
    with prepare_publication(folder, REPOSITORY) as publication:
        assert upload(publication, revision="second", api=api) == f"{server.url}/{REPOSITORY}/tree/second"
        upload(publication, revision="second", api=api)  # the branch is there now
    branches = server.repositories[REPOSITORY].branches
    assert branches["main"].keys() == {".gitattributes", "notes.md"}
    assert sorted(branches["second"].keys() - branches["main"].keys()) == PUBLISHED
    assert branches["second"]["notes.md"] == b"mine"


def test_private_means_private(server, api, folder):
    with prepare_publication(folder, REPOSITORY) as publication:
        upload(publication, private=True, api=api)
        assert server.repositories[REPOSITORY].private
        server.repositories[REPOSITORY].private = False
        with pytest.raises(PublishError, match=f"{REPOSITORY} exists already and is public"):
            upload(publication, private=True, api=api)


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "model.safetensors", "README.md"])
def test_a_folder_that_is_not_whole_is_rejected_by_name(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(PublishError, match=f"lacks {re.escape(missing)}"), prepare_publication(folder, REPOSITORY):
        pass


def test_weights_in_a_pickle_do_not_count(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PublishError, match=r"lacks model\.safetensors.*as safetensors"), prepare_publication(folder, REPOSITORY):
        pass


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def take_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def take_weights_of_another_model(folder: Path) -> None:
    SSLAMModel(tiny_config()).save_pretrained(folder / "other")
    (folder / "other" / "model.safetensors").rename(folder / "model.safetensors")


def take_another_extractor(folder: Path) -> None:
    SSLAMFeatureExtractor(num_mel_bins=64).save_pretrained(folder)


def write_no_front_matter(folder: Path) -> None:
    (folder / "README.md").write_text("# A model\n")


def damage_front_matter(folder: Path) -> None:
    (folder / "README.md").write_text("---\ntags: [\n---\n# A model\n")


def write_a_list_as_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def leave_older_weights(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def damage_model_index(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlibrary_name: transformers\nmodel-index:\n- name: x\n---\n# A model\n")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_config, "config.json cannot be read .*property name.*: repair it, or remove it"),
        (write_a_list_as_config, "config.json cannot be read .*it holds a list, but an object is expected"),
        (leave_older_weights, "holds model.safetensors and model.safetensors.index.json, of which only one is this model's"),
        (damage_weights, "holds a model that does not load"),
        (take_a_weight, r"1 weights do not fit its config.json, such as classifier.bias, which is missing and should be \(2,\)"),
        (take_weights_of_another_model, "which is missing and should be"),
        (take_another_extractor, "gives 64 mel bins, the model takes 128"),
        (write_no_front_matter, "README.md lacks library_name, pipeline_tag"),
        (damage_front_matter, "README.md has a front matter that cannot be read"),
        (damage_model_index, "README.md has a front matter that cannot be read.*model_index"),
    ],
)
def test_what_would_not_load_is_rejected(folder, damage, sentence):
    damage(folder)
    with pytest.raises(UserError, match=sentence), prepare_publication(folder, REPOSITORY):
        pass


def test_a_file_that_is_too_large_is_rejected(folder, monkeypatch):
    monkeypatch.setattr(hub, "LARGEST_FILE", 50_000)
    with pytest.raises(PublishError, match=r"model\.safetensors is larger than 5e-05 GB"), prepare_publication(folder, REPOSITORY):
        pass


def test_a_pretraining_model_in_shards_is_whole(tmp_path):
    SSLAMForPreTraining(tiny_config()).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    SSLAMFeatureExtractor(max_length=128).save_pretrained(tmp_path / "model")
    write_model_card(tmp_path / "model", "Untrained.")
    with prepare_publication(tmp_path / "model", REPOSITORY) as publication:
        shards = [name for name in publication.files if name.startswith("model-")]
        assert len(shards) > 1
        assert publication.files[shards[0]] == (tmp_path / "model" / shards[0]).stat().st_size
    (tmp_path / "model" / shards[0]).unlink()
    with pytest.raises(PublishError, match="weights do not fit"), prepare_publication(tmp_path / "model", REPOSITORY):
        pass


def test_a_description_becomes_the_card(folder, tmp_path):
    result = {"task_type": "audio-classification", "dataset_type": "two", "dataset_name": "Two sounds", "metric_type": "accuracy"}
    description = {"name": "small", "title": "Small", "summary": "Recognises two sounds.", "license": "mit", "how_to_get": "Ask me."}
    (tmp_path / "described.json").write_text(json.dumps({**description, "results": [{**result, "metric_value": 50}]}))
    with prepare_publication(folder, REPOSITORY, results=tmp_path / "described.json") as publication:
        card = ModelCard((publication.folder / "README.md").read_text())
        assert (card.data.license, card.data.eval_results[0].metric_value) == ("mit", 50)
        assert "Recognises two sounds." in card.text
        assert f'"{REPOSITORY}"' in card.text
        assert "Ask me." not in card.text  # it is there
        assert publication.notes == []
        assert (publication.folder / "results.json").read_bytes() == (tmp_path / "described.json").read_bytes()
    (folder / "README.md").unlink()
    (tmp_path / "described.json").rename(folder / "results.json")  # now the folder's own
    with prepare_publication(folder, REPOSITORY) as publication:
        assert "Recognises two sounds." in (publication.folder / "README.md").read_text()


def test_what_a_run_says_of_itself_goes_up_without_the_folders_of_this_machine(folder):
    settings = {"data_dir": "/home/me/sounds", "model": "me/encoder", "sources": [{"path": "C:\\clips\\mine", "weight": 2}], "epochs": 3}
    settings |= {"init_from": "../alice/run", "extractor": "~/models/mine", "validation": "file:///home/alice/x.wav"}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    left_out = {"training": {"unreadable": ["/home/me/sounds/a b.wav", "c.wav"]}}
    run = {"settings": {"data_dir": "/mnt/alice/clips", "label_separator": "/"}, "classes": ["/m/09x0r"], "unreadable": left_out}
    (folder / "results.json").write_text(json.dumps(run))
    with prepare_publication(folder, REPOSITORY) as publication:
        published = yaml.safe_load((publication.folder / "settings.yaml").read_text())
        results = json.loads((publication.folder / "results.json").read_text())
    expected = {"data_dir": "sounds", "model": "me/encoder", "sources": [{"path": "mine", "weight": 2}], "epochs": 3}
    assert published == expected | {"init_from": "run", "extractor": "mine", "validation": "x.wav"}
    left_out = {"training": {"unreadable": ["a b.wav", "c.wav"]}}
    assert results == {"settings": {"data_dir": "clips", "label_separator": "/"}, "classes": ["/m/09x0r"], "unreadable": left_out}


def test_folders_and_credentials_in_a_configuration_stay_here(folder):
    for name in ("config.json", "preprocessor_config.json"):
        values = json.loads((folder / name).read_text())
        values |= {"_name_or_path": "/home/me/x", "hub_token": "hf_" + "a" * 34, "origin": "https://me:word@example.org/x?token=abc"}
        (folder / name).write_text(json.dumps(values))
    settings = {
        "data_dir": "s3://KEY:SEC/RET@bucket/clips",
        "hub_token": "abc",
        "storage_options": {"key": "a", "secret": "b", "region": "c"},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "/m/09x0r", "1": "~/rain"}}))
    with prepare_publication(folder, REPOSITORY) as publication:
        for name in ("config.json", "preprocessor_config.json"):
            values = json.loads((publication.folder / name).read_text())
            assert (values["_name_or_path"], values["hub_token"], values["origin"]) == ("x", None, "https://example.org/x")
        assert json.loads((publication.folder / "config.json").read_text())["id2label"] == {"0": "/m/09x0r", "1": "~/rain"}
        published = yaml.safe_load((publication.folder / "settings.yaml").read_text())
    private = {"key": None, "secret": None, "region": "c"}
    assert published == {"data_dir": "s3://bucket/clips", "hub_token": None, "storage_options": private}


def test_whatever_stands_under_the_name_of_a_secret_stays_here(folder):
    settings = {"password": 12345, "api_key": {"id": "a", "value": ["b"]}, "secrets": ["c", "d"], "save_token": True, "seed": 3}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    with prepare_publication(folder, REPOSITORY) as publication:
        published = yaml.safe_load((publication.folder / "settings.yaml").read_text())
    assert published == {"password": None, "api_key": None, "secrets": None, "save_token": True, "seed": 3}


def test_a_folder_of_a_person_within_a_text_is_cut_to_its_name(folder):
    command = {"command": "sslam finetune --data_dir /home/me/clips --output_dir runs/a", "data_dir": "/home/me/clips"}
    (folder / "settings.yaml").write_text(yaml.safe_dump(command))
    (folder / "results.json").write_text(json.dumps({**command, "classes": ["/m/09x0r"]}))
    expected = {"command": "sslam finetune --data_dir clips --output_dir runs/a", "data_dir": "clips"}
    with prepare_publication(folder, REPOSITORY) as publication:
        assert yaml.safe_load((publication.folder / "settings.yaml").read_text()) == expected
        assert json.loads((publication.folder / "results.json").read_text()) == expected | {"classes": ["/m/09x0r"]}


def test_names_of_classes_are_published_as_they_are(folder):
    """Changed in one of the two dictionaries they would no longer name the same class."""
    names = {"0": "http://example.org/x?y=1", "1": "/home/me/rain"}
    labels = {"id2label": names, "label2id": {**{name: int(i) for i, name in names.items()}}}
    labels["event_detection"] = {"threshold": {"/home/me/rain": 0.5, "Secretary bird": 0.25}}
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **labels}))
    results = {"by_class": {"password": {"ap": 0.5}, "key": 0.25}}  # of a class, not of a credential
    (folder / "results.json").write_text(json.dumps(results))
    with prepare_publication(folder, REPOSITORY) as publication:
        published = json.loads((publication.folder / "config.json").read_text())
        assert {name: published[name] for name in labels} == labels
        assert json.loads((publication.folder / "results.json").read_text()) == results


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "settings.yaml", "results.json"])
@pytest.mark.parametrize(
    "secret",
    [
        *("hf_" + "b" * 34, "AKIA" + "A1" * 8, "-----BEGIN OPENSSH PRIVATE KEY-----", "see https://me:word@example.org", "ghp_" + "c" * 36),
        *("glpat-" + "d" * 20, "xoxb-" + "1" * 12, "AIza" + "e" * 35, "aws_secret_access_key = " + "f/" * 20),
        *("https://example.org/x?a=b&X-Amz-Signature=" + "0" * 64, "https://example.org/x?token=" + "g" * 12),
        "https://example.org/x?sv=2022-11-02&sig=" + "h" * 12 + "%3D",  # of a storage account at Azure
    ],
)
def test_a_file_with_a_credential_is_not_published(folder, name, secret):
    """Where it stands within a text, and so cannot be left out."""
    text = {"settings.yaml": f"note: seen in {secret}\n", "results.json": json.dumps({"note": f"seen in {secret}"})}.get(name)
    (folder / name).write_text(text or (folder / "README.md").read_text() + f"\n{secret}\n")
    expected = pytest.raises(PublishError, match=f"{name} holds what looks like a credential in line")
    with expected as raised, prepare_publication(folder, REPOSITORY):
        pass
    assert secret not in str(raised.value)


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "config.json", "model.safetensors", "results.json"])
def test_a_link_to_outside_the_folder_is_not_followed(folder, tmp_path, name):
    (tmp_path / "private").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"a private key")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private")
    message = rf"{re.escape(name)} is a link to .*private, outside the folder: copy that file"
    with pytest.raises(PublishError, match=message), prepare_publication(folder, REPOSITORY):
        pass
    (tmp_path / "private").rename(folder / "inside")
    (folder / name).unlink()
    (folder / name).symlink_to("inside")
    with prepare_publication(folder, REPOSITORY) as publication:
        assert name in publication.files


def test_names_that_only_resemble_those_of_a_model_stay_here(folder):
    names = ["LICENSE_KEY.txt", "LICENSE.key", "config.json.bak", "README.md~", "settings.yml", "model.pt"]
    for name in names:
        (folder / name).write_text("private")
    (folder / "LICENSE.txt").write_text("MIT")
    with prepare_publication(folder, REPOSITORY) as publication:
        assert set(names) <= set(publication.left_out)
        assert sorted(publication.files) == sorted([*PUBLISHED, "LICENSE.txt"])


def test_pictures_that_the_card_shows_are_published(folder, tmp_path):
    for name in ("reliability.png", "private.png"):
        (folder / name).write_bytes(b"picture")
    write_model_card(folder, "![How sure it is](reliability.png) Not shown: private.png")
    with prepare_publication(folder, REPOSITORY) as publication:
        assert "reliability.png" in publication.files
        assert "private.png" in publication.left_out
    description = {"name": "x", "title": "x", "summary": "![Both](private.png)"}
    (tmp_path / "other.json").write_text(json.dumps(description))
    with prepare_publication(folder, REPOSITORY, tmp_path / "other.json") as publication:
        assert "private.png" in publication.files
        assert "reliability.png" in publication.left_out


def test_a_card_that_names_a_folder_of_a_person_gets_a_note(folder):
    write_model_card(folder, "Trained on `/home/me/private sounds`.")
    with prepare_publication(folder, REPOSITORY) as publication:
        assert any("the card names a folder of a machine, /home/me/private" in note for note in publication.notes)


@pytest.mark.parametrize("name", ["no spaces please", "a/b/c", "--x", "nameless"])
def test_a_name_that_the_hub_would_reject_is_rejected_here(folder, name):
    with pytest.raises(PublishError, match="give owner/name"), prepare_publication(folder, name):
        pass


@pytest.mark.parametrize(
    ("part", "status", "sentence"),
    [
        ("/api/repos/create", 403, "403 .*: log in with a token that may write there"),
        ("/api/repos/create", 500, "500 .*: try again; what the Hub holds already is not sent twice"),
        ("/commit/", 400, "Bad request.*told to fail.*: try again"),
        ("/objects/", 404, "404 .*/objects/"),
    ],
)
def test_a_hub_that_fails_gets_a_sentence(server, api, folder, part, status, sentence):
    server.failures[part] = status
    with prepare_publication(folder, REPOSITORY) as publication, pytest.raises(PublishError, match=sentence) as raised:
        upload(publication, api=api)
    assert "\n" not in str(raised.value)


def test_a_wrong_token_or_no_hub_gets_a_sentence(server, api, folder):
    with prepare_publication(folder, REPOSITORY) as publication:
        with pytest.raises(PublishError, match="401 .*: log in with a token"):
            upload(publication, api=HfApi(endpoint=server.url, token="hf_stolen"))
        with pytest.raises(PublishError, match="could not be published.*: try again"):
            upload(publication, api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))
    assert server.writes == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_bytes_that_arrive_otherwise_are_noticed(server, api, folder, name):
    server.damage.add(name)
    with (
        prepare_publication(folder, REPOSITORY) as publication,
        pytest.raises(PublishError, match=f"does not hold what was sent \\({name} "),
    ):
        upload(publication, api=api)


def test_the_command_reports_a_mistake_in_one_line(tmp_path, capsys):
    assert main(["publish", "--model", str(tmp_path / "nowhere"), "--repo_id", REPOSITORY]) == 1
    assert re.fullmatch("sslam publish: error: .*nowhere is not a folder.*\n", capsys.readouterr().err)
    assert main(["publish", "--model", str(tmp_path), "--repo_id", REPOSITORY, "--results", "nofile.json"]) == 1
    expected = "results is 'nofile.json', but a JSON file that describes the model is expected: check the path, or leave it out\n"
    assert capsys.readouterr().err == f"sslam publish: error: {expected}"
