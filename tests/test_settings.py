"""Settings: typed values from YAML and flags, and errors that help."""

import contextlib
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest

from transformers_sslam.errors import UserError
from transformers_sslam.pretraining.settings import PreTrainingSettings
from transformers_sslam.settings import check_names, find_recipe, parse_settings, read_settings, recipe_names, setting, write_settings


@dataclass(kw_only=True)
class Group:
    roll: bool = setting("rotate", True)
    gain: float = setting("amplify", 10.0)

    def __post_init__(self):
        if self.gain < 0:
            raise UserError(f"gain is {self.gain}, but must be at least 0")


@dataclass(kw_only=True)
class Schedule:
    """How long it takes.

    And more that no heading needs.
    """

    learning_rate: float = setting("how fast, of 100 %", 5e-5)


@dataclass(kw_only=True)
class Example(Schedule):
    """An example."""

    data_dir: str = setting("where the clips are")
    steps: int = setting("how many", 100)
    separator: str | None = setting("between labels", None)
    text: str = setting("anything", "")
    mode: Literal["fast", "exact"] = setting("how", "fast")
    folds: list[int | str] = setting("which", [])
    inputs: str | list[str] = setting("files", [])
    statistics: str | list[float] = setting("mean and standard deviation", "model")
    model: dict[str, Any] = setting("arguments", {})
    kind: Literal["red", "blue"] | None = setting("which one", None)
    limit: float | dict[str, float] | None = setting("how much", None)
    bf16: bool = setting("in half precision", False)
    group: Group = setting("more", Group())
    other: Group | None = setting("one more", None)
    groups: list[Group] = setting("many more", [])


def read(*words: str) -> Example:
    return parse_settings(Example, [*words, "--data_dir=clips"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--steps 7", 7),
        ("--steps=7", 7),
        ("--learning_rate 1e-3", 1e-3),  # text in YAML 1.1
        ("--learning-rate 1e-3", 1e-3),
        ("--learning_rate 3", 3.0),
        ("--text 1e3run", "1e3run"),  # which begins like a number
        ("--text 7", "7"),  # text stays text whatever it looks like
        ("--text 1e3", "1e3"),
        ("--text 007", "007"),
        ("--text true", "true"),
        ("--text 2020-01-01", "2020-01-01"),
        ("--text runs/a=b", "runs/a=b"),
        ("--text ~/clips", str(Path.home() / "clips")),
        ("--text [draft]", "[draft]"),
        ("--separator null", None),
        ("--separator ;", ";"),
        ("--separator #", "#"),  # a comment in YAML
        ("--separator ~", "~"),  # null in YAML
        ("--separator !", "!"),  # a tag of nothing in YAML
        ("--separator ,", ","),
        ("--separator |", "|"),
        ("--separator=- ", "- "),
        ("--mode exact", "exact"),
        ("--folds [1,b,3]", [1, "b", 3]),
        ("--folds 1 b 3", [1, "b", 3]),
        ("--folds 3", [3]),
        ("--folds 010", [10]),  # octal in YAML 1.1
        ("--folds 1e3 yes", ["1e3", "yes"]),
        ("--inputs a.wav", "a.wav"),
        ("--inputs a.wav b.wav", ["a.wav", "b.wav"]),
        ("--inputs a,b.wav c:d.wav", ["a,b.wav", "c:d.wav"]),
        ("--statistics computed", "computed"),
        ("--statistics [-6.6,5]", [-6.6, 5.0]),
        ("--statistics -6.6 5", [-6.6, 5.0]),
        ("--bf16", True),
        ("--bf16 true", True),
        ("--bf16 false", False),
        ("--no_bf16", False),
        ("--group.roll false", False),
        ("--group.no_roll", False),
        ("--group.gain 0", 0.0),
        ("--other.gain 0", 0.0),
    ],
)
def test_a_flag_takes_the_type_of_its_setting(words, expected):
    given = [words] if words.startswith("--separator=") else words.split(" ")
    value = read(*given)
    for name in words[2:].split("=")[0].split(" ")[0].replace("-", "_").replace("no_", "").split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_the_home_folder_stands_in_files_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text('text: ~/clips\ninputs: [~/a.wav, ~b.wav]\nseparator: "~"\n')
    settings = read("--config=~/mine.yaml")
    assert (settings.text, settings.separator) == (str(tmp_path / "clips"), "~")
    assert settings.inputs == [str(tmp_path / "a.wav"), "~b.wav"]


def test_groups_in_lists_and_dictionaries_are_built():
    settings = read("--groups", "[{gain: 3}, {roll: false}]", "--model.width", "128", "--model.eps", "1e-6", "--model.name", "x")
    assert settings.groups == [Group(gain=3.0), Group(roll=False)]
    assert settings.model == {"width": 128, "eps": 1e-6, "name": "x"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rat 1", "there is no setting learning_rat: did you mean learning_rate?"),
        ("--lr 1", "there is no setting lr: did you mean learning_rate?"),
        ("--group.gian 1", "there is no setting group.gian: did you mean group.gain"),
        ("--gain 1", "there is no setting gain: did you mean group.gain"),
        ("--other.gian 1", "there is no setting other.gian: did you mean other.gain"),
        ("--groups [{gian:1}]".replace(":", ": "), "there is no setting groups.gian: did you mean groups.gain"),
        ("--zzzz 1", "there is no setting zzzz: there are bf16, data_dir, folds"),
        ("--step 1", "there is no setting step: did you mean steps"),  # no abbreviation is taken for a name
        ("--steps many", "steps is many, but int is expected"),
        ("--steps 1.5", "steps is 1.5, but int is expected"),
        ("--steps 1 2", "steps has the values 1 2, but takes one"),
        ("--steps", "steps has no value: write --steps VALUE"),
        ("--steps true", "steps is True, but int is expected"),
        ("--learning_rate 1e-3x", "learning_rate is 1e-3x, but float is expected"),
        ("--group.roll 1", "group.roll is 1, but bool is expected"),
        ("--mode slow", "mode is slow, but one of 'fast', 'exact' is expected"),
        ("--mode exakt", "mode is exakt, but one of 'fast', 'exact' is expected: did you mean exact?"),
        ("--kind blu", "kind is blu, but one of 'red', 'blue' or null is expected: did you mean blue?"),
        ("--kind green", "kind is green, but one of 'red', 'blue' or null is expected"),
        ("--other.gain x", "other.gain is x, but float is expected"),
        ("--other 5", "other is 5, but Group or null is expected"),
        ("--limit many", "limit is many, but float or dict[str, float] or null is expected"),
        ("--group.gain -1", "gain is -1.0, but must be at least 0"),
        ("--other.gain -1", "gain is -1.0, but must be at least 0"),
        ("--learning_rate .nan", "learning_rate is nan, but numbers must be finite: give another, or leave it out"),
        ("--learning_rate .inf", "learning_rate is inf, but numbers must be finite"),
        ("--group.gain .nan", "group.gain is nan, but numbers must be finite"),
        ("--statistics [0.5, .nan]", "statistics is [0.5, nan], but numbers must be finite"),
        ("--limit {a: .nan}", "limit is {'a': nan}, but numbers must be finite"),
        ("--model.scale .nan", "model is {'scale': nan}, but numbers must be finite"),
        ("--group {gain: x}", "group.gain is x, but float is expected"),
        ("--group 3", "group is 3, but its settings are expected: write --group.NAME VALUE"),
        ("--groups x", "groups is x, but list[test_settings.Group] is expected"),
        ("--config", "config has no value: write --config RECIPE_OR_FILE"),
        ("--model null", "model is None, but dict is expected"),
        ("--steps.a 3", "there is no setting steps.a"),
        ("steps", "'steps' stands without a name: write --NAME steps (required: --data_dir); a recipe is given as --config RECIPE"),
        ("steps=3", "'steps=3' stands without a name: write --steps 3"),
        ("--config nope", "config is 'nope', but there is no such file or recipe: recipes are demo_pretrain, "),
    ],
)
def test_a_wrong_flag_is_named_with_what_was_expected(words, message):
    name, _, value = words.partition(" ")
    given = [value] if value[:1] in ("[", "{") else value.split()
    with pytest.raises(UserError) as error:
        read(name, *given)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["data_dir", "model"])
def test_a_path_without_a_name_is_not_the_current_folder(name):
    """As of an unset variable of the shell."""

    @dataclass(kw_only=True)
    class Paths:
        data_dir: str = setting("folder", "clips")
        model: str | None = setting("model", None)

    with pytest.raises(UserError, match=f"{name} is empty, but a path is expected: write . for the current folder"):
        parse_settings(Paths, [f"--{name}", ""])


def test_a_required_setting_must_be_given():
    with pytest.raises(UserError, match="data_dir is required: write --data_dir VALUE, or give it in the recipe"):
        parse_settings(Example, [])


def test_flags_override_recipes_and_the_later_recipe_the_earlier(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 5\nlearning_rate: 1e-4\nmodel: {width: 64, eps: 1e-6}\ngroup: {gain: 3}\n")
    (tmp_path / "b.yaml").write_text("learning_rate: 1e-2\n")
    settings = read("--steps", "6", "--model.width", "128", "--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"))
    assert (settings.steps, settings.learning_rate, settings.group) == (6, 1e-2, Group(roll=True, gain=3.0))
    assert settings.model == {"width": 128, "eps": 1e-6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 5\nsteps: 6", "steps stands twice"),
        ("- 1", "holds .* but lines of the form"),
        ("group:\nsteps: 5", "group is empty in .*recipe.yaml"),
        ("group: 3", "group is 3 in .*recipe.yaml: write its settings below it"),
        ("group: []", r"group is \[\] in .*recipe.yaml"),
        ("group: {roll: null}", "group.roll is null, but bool is expected: give one, or leave it out"),
        ("steps: null", "steps is null, but int is expected"),
        ("text: null", "text is null, but str is expected"),
        ("steps: [", "not YAML: "),
        ("steps: 5\nlearning_rate: fast", "learning_rate is fast, but float is expected"),
        ("stepps: 5", "there is no setting stepps: did you mean steps"),
        ("group: {gian: 5}", "there is no setting group.gian: did you mean group.gain"),
    ],
)
def test_a_wrong_recipe_is_rejected(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read("--config", str(file))


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz"))


@pytest.mark.parametrize(
    "text",
    [
        "model: &m\n  itself: *m\n",
        "model: &m [*m]",
        BOMB,
        "model: " + "[" * 10_000 + "]" * 10_000,
        "model: " + "[" * 10_000,
        "model: " + "{a: " * 10_000,
        "steps: " + "9" * 10_000,
        "model: {? [1, 2] : 3}",
        "model: {? {a: 1} : 3}",
        "model: {" + "".join(f"k{i}: 1, " for i in range(5_000)) + "k7: 1}",
        "model: !!python/object/apply:os.getcwd []",
        "steps: \0",
        "\x85\udcff",
    ],
    ids=range(13),
)
def test_a_hostile_file_is_one_clear_error_at_once(tmp_path, text):
    file, start = tmp_path / "recipe.yaml", time.process_time()
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError):
        read("--config", str(file))
    with pytest.raises(UserError):
        read("--group", text)
    assert time.process_time() - start < 5


def test_a_settings_file_cut_at_any_length_or_of_another_kind_ends_in_a_clear_error_or_settings(tmp_path):
    file = tmp_path / "settings.yaml"
    write_settings(read("--model.depth", "2", "--folds", "1", "2"), file)
    whole = file.read_bytes()
    contents = [whole[:length] for length in range(0, len(whole), 3)] + [b"", b"7", b"- 1", b"a", b"\xff", b"\0", b"[[[["]
    contents += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 2)]
    for content in contents:
        file.write_bytes(content)
        with contextlib.suppress(UserError):
            assert isinstance(read("--config", str(file)), Example)


def test_a_date_is_text(tmp_path):
    """So it can be compared with a data set's column, and written to a checkpoint."""
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: 5\nmodel: {day: 2020-01-01}\n")
    assert read("--config", str(file)).model == {"day": "2020-01-01"}
    assert read("--model.day", "2020-01-01").model == {"day": "2020-01-01"}


def test_written_settings_are_complete_and_read_back(tmp_path):
    settings = read("--learning_rate", "1e-7", "--separator", "|", "--model.depth", "2", "--folds", "1", "b", "--other.gain", "2")
    write_settings(settings, tmp_path / "settings.yaml")
    assert "steps: 100" in (tmp_path / "settings.yaml").read_text()
    assert read_settings(Example, tmp_path / "settings.yaml") == settings


def test_a_recipe_is_read_with_changes_in_the_types_of_python(tmp_path):
    (tmp_path / "a.yaml").write_text("data_dir: clips\nmodel: {width: 64, eps: 1e-6}\nsteps: 3\n")
    changes = {
        "model.width": 128,
        "folds": [1, "b"],
        "separator": None,
        "bf16": True,
        "learning_rate": 1e-7,
        "text": "007",
        "group.gain": 3,
    }
    settings = read_settings(Example, tmp_path / "a.yaml", changes)
    assert settings.model == {"width": 128, "eps": 1e-6}
    assert (settings.folds, settings.separator, settings.bf16, settings.learning_rate) == ([1, "b"], None, True, 1e-7)
    assert (settings.text, settings.group.gain, settings.steps) == ("007", 3.0, 3)
    assert read_settings(Example, changes={"data_dir": "clips", "model": {"width": 3}}).model == {"width": 3}


def test_defaults_are_not_shared_between_instances():
    first = read()
    first.folds.append(1)
    first.group.gain = 0.0
    assert (read().folds, read().group.gain) == ([], 10.0)


def test_help_has_a_group_for_each_class_with_defaults_and_explanations(capsys):
    with pytest.raises(SystemExit) as end:
        parse_settings(Example, ["--help"], prog="sslam example", description="What it does.")
    assert end.value.code == 0
    listing = " ".join(capsys.readouterr().out.split())
    assert "usage: sslam example [--config RECIPE_OR_FILE] [--setting value ...] What it does." in listing
    assert "An example: --data_dir DATA_DIR where the clips are (required, type: str)" in listing
    assert "How long it takes: --learning_rate LEARNING_RATE how fast, of 100 % (type: float, default: 5e-05)" in listing
    assert "amplify (type: float, default: 10.0)" in listing


def test_the_configuration_is_printed_as_a_recipe(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        read("--steps", "3", "--group.gain", "2", "--print_config")
    assert end.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert read("--config", str(tmp_path / "printed.yaml")) == read("--steps", "3", "--group.gain", "2")


def test_unknown_names_are_compared_with_known_ones():
    check_names(["a"], ["a", "b"])
    with pytest.raises(UserError, match="no setting model.hiden_size: did you mean model.hidden_size"):
        check_names(["hiden_size"], ["hidden_size", "depth"], "model.")


def test_every_setting_of_a_part_of_the_library_is_explained(capsys):
    with pytest.raises(SystemExit):
        parse_settings(PreTrainingSettings, ["--help"])
    lines = " ".join(capsys.readouterr().out.split()).split(" --")
    assert [line for line in lines if line.startswith("data.") and "(type: " in line and "] (type" in line] == []


def test_recipes_are_found_by_name_with_and_without_suffix_and_by_path(tmp_path, monkeypatch):
    assert find_recipe("pretrain_tiny_stage1") == find_recipe("pretrain_tiny_stage1.yaml")
    assert find_recipe("pretrain_tiny_stage1").is_file()
    assert "pretrain_tiny_stage1" in recipe_names()
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("steps: 7\n")
    assert read("--config", "mine.yaml").steps == 7
    with pytest.raises(UserError, match="no such file or recipe"):
        find_recipe("recipes/pretrain_tiny_stage1")
