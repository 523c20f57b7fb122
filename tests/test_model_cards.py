"""Model cards: those of the repository are what their JSON says, can be read by the Hub, and their code runs."""

import json
import re
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import noise, tiny_config
from huggingface_hub import ModelCard

from transformers_sslam import (
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForAudioFrameClassification,
    SSLAMForPreTraining,
    SSLAMModel,
)
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.publishing.cards import (
    ReportedResult,
    as_text,
    describe_origin,
    generate_model_card,
    is_description,
    name_model,
    public_name,
    read_description,
    write_model_card,
)
from transformers_sslam.publishing.conversion import _config, _extractor
from transformers_sslam.publishing.official import OfficialCheckpoint


CARDS = {path.parent.name: path for path in sorted((Path(__file__).parents[1] / "model_cards").glob("*/README.md"))}
OFFICIAL = {
    "sslam-base": (768, 12, 12, 0),
    "sslam-base-as2m": (768, 12, 12, 527),
    "eat-base": (768, 12, 12, 0),
    "eat-large": (1024, 24, 16, 0),
}
CLASSES = {cls.__name__: cls for cls in (SSLAMModel, SSLAMForAudioClassification, SSLAMForAudioFrameClassification, SSLAMForPreTraining)}
MINIMAL = {"name": "small", "title": "Small", "summary": "Recognises little."}
RESULT = {"task_type": "audio-classification", "dataset_type": "esc50", "dataset_name": "ESC-50", "metric_type": "accuracy"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's configurations, as saved, with nothing yet that describes it."""
    SSLAMConfig(architectures=["SSLAMForAudioClassification"], id2label={i: f"class {i}" for i in range(7)}).save_pretrained(tmp_path)
    SSLAMFeatureExtractor(max_length=512).save_pretrained(tmp_path)
    return tmp_path


def describe(folder: Path, **fields) -> Path:
    (folder / "results.json").write_text(json.dumps({**MINIMAL, **fields}))
    return folder / "results.json"


def front_matter(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


# --- the cards of this repository


def test_the_official_models_have_cards():
    assert OFFICIAL.keys() <= CARDS.keys()


@pytest.mark.parametrize("name", CARDS)
def test_no_card_is_stale(name, tmp_path, monkeypatch):
    source, folder = CARDS[name].parent, Path("model_cards") / name
    monkeypatch.chdir(tmp_path)
    folder.mkdir(parents=True)
    for file in ("config.json", "preprocessor_config.json", "results.json", "model.safetensors"):
        if (source / file).is_file():
            (folder / file).write_bytes((source / file).read_bytes())
    assert generate_model_card(folder).read_text() == CARDS[name].read_text(), "run `sslam card --model model_cards/*/`"


@pytest.mark.parametrize("name", CARDS)
def test_the_hub_can_read_the_front_matter(name):
    card, described = ModelCard.load(CARDS[name]), json.loads((CARDS[name].parent / "results.json").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag in ("audio-classification", "feature-extraction")
    assert card.data.license
    read = [(r.dataset_name, r.dataset_config, r.metric_value, r.source_url) for r in card.data.eval_results or []]
    keys = ("dataset_name", "dataset_config", "metric_value", "source_url")
    assert read == [tuple(result.get(key) for key in keys) for result in described.get("results", [])]


@pytest.mark.parametrize("name", CARDS)
def test_the_code_of_a_card_runs(name, tmp_path, monkeypatch):
    """With a small model of the same class in place of the one that the card is about."""
    kind = json.loads((CARDS[name].parent / "config.json").read_text())["architectures"][0]
    CLASSES[kind](tiny_config()).save_pretrained(tmp_path / "stand-in")
    SSLAMFeatureExtractor(max_length=128).save_pretrained(tmp_path / "stand-in")
    soundfile.write(tmp_path / "clip.wav", noise(1.0), 16_000)
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", CARDS[name].read_text(), flags=re.DOTALL)
    place = f"model_cards/{name}" if (CARDS[name].parent / "model.safetensors").exists() else name
    assert f'"{place}"' in program
    names: dict = {}
    exec(program.replace(f'"{place}"', '"stand-in"'), names)
    if kind == "SSLAMForAudioClassification":
        assert len(names["classify"](names["waveform"])) == 2
    elif kind == "SSLAMForAudioFrameClassification":
        assert names["model"].score_steps(names["waveform"], names["extractor"]).scores.shape == (7, 2)  # of a second, 160 ms each
    else:
        assert names["outputs"].pooler_output.shape == (1, 32)
        assert names["model"].frame_embeddings(names["outputs"].last_hidden_state).shape == (1, 8, 8, 32)


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_configuration_beside_a_card_is_what_the_converter_makes_of_that_model(name):
    """Of its shapes, that is: the tensors are on no device."""
    width, depth, heads, classes = OFFICIAL[name]
    shapes = {
        "extra_tokens": (1, 1, width),
        "local_encoder.proj.weight": (width, 1, 16, 16),
        "fixed_positional_encoder.positions": (1, 768 * 8, width),
        **{f"blocks.{i}.mlp.fc1.weight": (4 * width, width) for i in range(depth)},
        "blocks.0.attn.qkv.bias": (3 * width,),
    }
    official = OfficialCheckpoint(
        name,
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        head={"head.weight": torch.empty(classes, width, device="meta")} if classes else {},
        settings={"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": 4.0, "norm_eps": 1e-6},
        time_patches=768,
    )
    config, folder = _config(official, None, None), CARDS[name].parent
    extractor = _extractor(official, config, None)
    config.padding_value = (extractor.padding_value - extractor.mean) / (2 * extractor.std)
    saved = SSLAMConfig.from_pretrained(folder)
    assert saved.architectures == ["SSLAMForAudioClassification" if classes else "SSLAMModel"]
    config.architectures, config.dtype = saved.architectures, saved.dtype
    unlike = ("transformers_version", "_name_or_path")
    assert {k: v for k, v in saved.to_dict().items() if k not in unlike} == {k: v for k, v in config.to_dict().items() if k not in unlike}
    assert SSLAMFeatureExtractor.from_pretrained(folder).to_dict() == extractor.to_dict()
    assert len(saved.id2label) == (classes or 2)


def test_published_numbers_stand_beside_what_others_found():
    card = ModelCard.load(CARDS["sslam-base"])
    tuned = [r for r in card.data.eval_results if r.task_name == "fine-tuning"]
    assert [r.metric_value for r in tuned] == [50.2, 47.8, 40.9, 40.3, 96.2, 98.1, 98.8]
    assert [r.metric_value for r in card.data.eval_results[len(tuned) :]] == [64.2, 64.2, 59.5, 67.4, 68.5, 77.8, 71.4, 16.9]
    repeated = [r for r in tuned if "re-run" in r.metric_name]
    assert [(r.metric_value, r.source_url) for r in repeated] == [(47.8, None), (40.3, None)]  # not under the paper's name
    assert all("a single run, best on the evaluation set" in r.metric_name for r in tuned if r not in repeated)
    assert [r.metric_value for r in ModelCard.load(CARDS["sslam-base-as2m"]).data.eval_results] == [50.2, 47.8]
    assert [r.metric_value for r in ModelCard.load(CARDS["eat-base"]).data.eval_results] == [48.6, 40.2, 95.9, 98.3]
    assert ModelCard.load(CARDS["eat-large"]).data.eval_results is None


# --- any card


def test_a_result_says_how_sure_it_is_and_where_it_comes_from(folder):
    source = {"source_name": "the paper", "source_url": "https://arxiv.org/abs/2506.12222"}
    ours = {**RESULT, "metric_name": "accuracy (%)", "metric_value": 84.25, "interval": [82.9, 85.5], "note": "mean of 5 folds"}
    describe(folder, results=[{**RESULT, "metric_value": 96.2, **source}, ours])
    generate_model_card(folder)
    theirs, ours = front_matter(folder).data.eval_results
    assert (theirs.metric_value, theirs.metric_name, theirs.source_url) == (96.2, "accuracy", source["source_url"])
    assert (ours.metric_value, ours.source_url) == (84.25, None)
    assert ours.metric_name == "accuracy (%), 95 % interval [82.9, 85.5] (mean of 5 folds)"
    text = front_matter(folder).text
    assert "| ESC-50 | audio-classification | accuracy | 96.2 | [the paper](https://arxiv.org/abs/2506.12222) |" in text
    assert "| ESC-50 | audio-classification | accuracy (%) | 84.25 [82.9, 85.5] | mean of 5 folds |" in text


def test_a_card_has_the_sections_that_are_filled_and_no_other(folder):
    describe(folder)
    generate_model_card(folder)
    headings = re.findall(r"^#+ .*", (folder / "README.md").read_text(), flags=re.MULTILINE)
    assert headings == ["# Small", "## Use", "## Citation"]
    full = {
        "training": "On clips.",
        "intended_use": "Play.",
        "limits": ["Deaf to bats.", "Slow."],
        "license": "mit",
        "license_text": "Free.",
    }
    describe(folder, **full, how_to_get="Ask.", results=[{**RESULT, "metric_value": 1}], results_text="Few.", datasets=["me/clips"])
    generate_model_card(folder)
    text = (folder / "README.md").read_text()
    headings = re.findall(r"^#+ .*", text, flags=re.MULTILINE)
    assert headings[1:] == [f"## {title}" for title in ("Use", "Results", "Training", "Intended use", "Limits", "Licence", "Citation")]
    assert "- Deaf to bats.\n- Slow.\n" in text
    assert "7 classes. Input: mono audio at 16000 Hz" in text
    assert "log-mels of 512 frames" in text
    assert (front_matter(folder).data.license, front_matter(folder).data.datasets) == ("mit", ["me/clips"])


def test_the_card_of_a_detector_shows_how_to_find_events(tmp_path, monkeypatch, capsys):
    """The Hub has no task for event detection: the card names the nearest one, and what the model is for in its tags."""
    names = ["bird", "rain", "siren"]
    config = tiny_config(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, steps_per_second=12.5)
    SSLAMForAudioFrameClassification(config).save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(max_length=128).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    write_model_card(tmp_path / "model", "Trained on mixtures.", title="Mine")
    card = front_matter(tmp_path / "model")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "audio-classification")
    assert card.data.tags == ["audio", "sslam", "sound-event-detection"]
    assert "SSLAMForAudioFrameClassification: 2 blocks, width 32, 4 heads, 3 classes, 12.5 time steps per second. Input" in card.text
    soundfile.write(tmp_path / "clip.wav", noise(1.0), 16_000)
    (program,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    found: dict = {}
    exec(program, found)
    assert type(found["model"]) is SSLAMForAudioFrameClassification
    assert capsys.readouterr().out.splitlines()[-1] == str(found["model"].detect(found["waveform"], found["extractor"]))


def test_examples_name_the_place_where_the_card_lies(folder, tmp_path, monkeypatch):
    describe(folder, how_to_get="Ask.")
    assert 'model="small"' in generate_model_card(folder).read_text()  # the weights are elsewhere
    (folder / "model.safetensors").touch()
    card = generate_model_card(folder).read_text()
    assert f'model="{folder.name}"' in card  # not the path, which is nobody else's
    assert str(folder.parent) not in card
    assert "Ask." not in card
    monkeypatch.chdir(folder.parent)
    card = generate_model_card(folder).read_text()
    assert f'model="{folder.name}"' in card
    assert 'model="me/small"' in generate_model_card(folder, model_id="me/small").read_text()
    write_model_card(folder, "Trained.", place=tmp_path / "runs" / "later")
    assert re.search('model="[^"]*runs/later"', (folder / "README.md").read_text())
    own = 'See `from_pretrained("other")`.\n\n' + card + '\n```python\nAutoModel.from_pretrained("other")\n```\n'
    assert name_model(own, "me/small") == own.replace(f'model="{folder.name}"', 'model="me/small"')


def test_the_card_of_a_training_run_can_hold_numbers(folder):
    write_model_card(folder, "Trained on clips.", results=[ReportedResult(**RESULT, metric_value=84.0, note="one run")])
    card = front_matter(folder)
    assert [(r.metric_value, r.metric_name) for r in card.data.eval_results] == [(84.0, "accuracy (one run)")]
    assert "Trained on clips." in card.text
    assert f'model="{folder.name}"' in card.text
    write_model_card(folder, "Trained on clips.", title="Mine")
    assert front_matter(folder).text.lstrip().startswith("# Mine\n")
    assert front_matter(folder).data.eval_results is None


def test_a_trained_model_inherits_the_licence_of_its_base_and_names_it(folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("models") / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    write_model_card(folder, "Trained.", origin=describe_origin(str(base), ["someone/clips", "/home/me/my sounds"]))
    card = front_matter(folder)
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("cc-by-4.0", ["base"], ["someone/clips", "my-sounds"])
    assert "cc-by-4.0, as the card of `base` says, from which training started." in card.text
    assert "/home/me" not in card.content
    other = "license: other\nlicense_name: mine\nlicense_link: https://example.org\n"
    (base / "README.md").write_text(f"---\n{other}---\n")
    assert describe_origin(str(base), [])["license_name"] == "mine"
    write_model_card(folder, "Trained.", origin=describe_origin(str(base), []))
    assert other in front_matter(folder).content


@pytest.mark.parametrize("card", [None, "# No front matter", "---\nlicense: [\n---\n", "---\nlicense: other\n---\n", "---\n- a\n---\n"])
def test_without_a_licence_of_the_base_the_card_says_so(card, folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("models") / "base"
    base.mkdir()
    if card is not None:
        (base / "README.md").write_text(card)
    for model in (str(base), None, str(folder / "config.json"), "someone/unknown"):
        origin = describe_origin(model, ["clips"])
        assert "license" not in origin
        assert origin["license_text"].startswith("No licence was chosen")
        write_model_card(folder, "Trained.", origin=origin)
        assert front_matter(folder).data.base_model == {str(base): ["base"], None: None}.get(
            model, [model and model.removeprefix(f"{folder}/")]
        )


def test_names_of_data_cannot_break_the_front_matter(folder):
    write_model_card(folder, "Trained.", origin=describe_origin("a\n---\n<script>", ["x: y\n- z", "![x](http://y)", "a..b//c--d", "  "]))
    data = front_matter(folder).data
    assert (data.base_model, data.datasets) == (["a-script"], ["x-y-z", "x-http/y", "a-b/c-d"])


def test_names_in_the_table_of_results_are_one_line_without_markup(folder):
    describe(folder, results=[{**RESULT, "metric_value": 1, "dataset_name": "a\n| b <i>", "note": "![x](y)"}])
    generate_model_card(folder)
    row = r"| a \| b &lt;i&gt; | audio-classification | accuracy | 1 | \!\[x\](y) |"
    assert row in (folder / "README.md").read_text().splitlines()


def test_a_results_file_of_a_training_run_describes_no_model(folder):
    (folder / "results.json").write_text(json.dumps({"metrics": {"accuracy": 0.9}, "classes": ["a"]}))
    assert not is_description(folder / "results.json")
    assert not is_description(folder / "nothing.json")
    assert is_description(describe(folder))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"licence": "mit"}, "the file has the unknown field 'licence'; there are name, title"),
        ({"metrics": {}}, "it holds the results of a run; a training run has written its card"),
        ({"title": 3}, "'title' expected str"),
        ({"limits": "none"}, "'limits' expected a list"),
        ({"citation": ["beats"]}, "no citation 'beats': choose from sslam, eat"),
        ({"license": "other"}, "needs license_name and license_link"),
        ({"results": [RESULT]}, "metric_value"),
        ({"results": [{**RESULT, "metric_value": 1, "score": 2}]}, r"results\[0\] has the unknown field 'score'"),
        ({"results": [{**RESULT, "metric_value": "high"}]}, "metric_value.*'high'"),
        ({"results": [{**RESULT, "metric_value": 5, "dataset_name": 7}]}, "'dataset_name' expected str"),
        ({"results": [{**RESULT, "metric_value": float("nan")}]}, "metric_value is nan"),
        ({"results": [{**RESULT, "metric_value": 5, "interval": [6, 7]}]}, r"metric_value is 5 and interval \[6, 7\]"),
        ({"results": [{**RESULT, "metric_value": 5, "interval": [5]}]}, "low and high end around the value"),
        ({"results": [{**RESULT, "metric_value": 5, "source_name": "me"}]}, "source_url"),
        ({"results": [3]}, r"results\[0\] is a int, but must be an object"),
    ],
)
def test_a_description_with_a_mistake_is_rejected(folder, fields, sentence):
    with pytest.raises(UserError, match=f"results.json does not describe a model.*{sentence}"):
        read_description(describe(folder, **fields))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "results.json"])
def test_a_missing_file_is_named(folder, name):
    describe(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=re.escape(name)):
        generate_model_card(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "architectures=None, but a list"),
        ('{"architectures": []}', r"architectures=\[\], but a list"),
        ("[1]", "config.json cannot be read .*a list, but"),
    ],
)
def test_a_configuration_of_nothing_is_rejected(folder, content, message):
    describe(folder)
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        generate_model_card(folder)


def test_the_command_writes_the_cards_of_several_folders(folder, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other")
    for name in ("config.json", "preprocessor_config.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    describe(folder)
    describe(other, title="Other")
    assert main(["card", "--model", str(folder), str(other)]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "README.md"), str(other / "README.md")]
    assert "# Other\n" in (other / "README.md").read_text()
    (other / "results.json").write_text("[]")
    assert main(["card", "--model", str(other)]) == 1
    assert re.fullmatch("sslam card: error: .*results.json is damaged: it holds a list.*\n", capsys.readouterr().err)
    assert main(["card", "--model", "[]"]) in (1, 2)
    assert "model is empty, but at least one folder is needed" in capsys.readouterr().err


# --- names that come from data or from this machine


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("![x](http://example.org/x.png)", r"\!\[x\](http://example.org/x.png)"),
        ("two\nlines\r\n# three", r"two lines \# three"),
        ("\u202eright to left\u2028line\x00", "right to left line"),
        ("_a_ *b* `c` ~d~ &copy;", r"\_a\_ \*b\* \`c\` \~d\~ &amp;copy;"),
        ("dog_bark, Male speech", "dog_bark, Male speech"),
    ],
)
def test_a_name_is_one_line_without_markup(name, expected):
    assert as_text(name) == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("ta012/SSLAM_pretrain", "ta012/SSLAM_pretrain"),
        ("/home/me/gone", "gone"),
        ("~/models/mine", "mine"),
        ("../mine", "mine"),
        ("C:\\models\\mine", "mine"),
        ("file:///home/me/x", "x"),
        ("/home/me/a`b\nc", "a'b c"),
        ("s3://KEY:SEC/R?ET@bucket/clips", "s3://bucket/clips"),
        ("https://me@example.org/my clips?token=abc\n#x", "https://example.org/my clips"),
        ("https://example.org:8080/clips?mail=a@b.org", "https://example.org:8080/clips"),
        ("https://me:8080abc/d@example.org/clips", "https://example.org/clips"),
    ],
)
def test_a_model_is_named_without_the_folders_and_credentials_of_this_machine(model, expected, tmp_path):
    assert public_name(model) == expected
    assert public_name(str(tmp_path)) == tmp_path.name
    assert describe_origin(None, ["s3://KEY:SECRET@bucket/clips?a=b"])["datasets"] == ["bucket/clips"]
