"""Settings: typed values from YAML and the command line, and errors that help."""

import contextlib
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest

from transformers_sslam.errors import UserError
from transformers_sslam.settings import check_names, list_settings, parse_settings, read_settings, setting, write_settings
from transformers_sslam.training.pretraining_settings import PreTrainingSettings


@dataclass
class Group:
    roll: bool = setting("rotate", True)
    gain: float = setting("amplify", 10.0)


@dataclass
class Example:
    data_dir: str = setting("where the clips are")
    steps: int = setting("how many", 100)
    learning_rate: float = setting("how fast", 5e-5)
    separator: str | None = setting("between labels", None)
    mode: Literal["fast", "exact"] = setting("how", "fast")
    folds: list[int | str] = setting("which", [])
    statistics: str | list[float] = setting("mean and deviation", "model")
    model: dict[str, Any] = setting("arguments", {})
    group: Group = setting("more", Group())


def read(*overrides: str, file=None) -> Example:
    return read_settings(Example, file, ["data_dir=clips", *overrides])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=7", 7),
        ("learning_rate=1e-3", 1e-3),  # text in YAML 1.1
        ("learning_rate=3", 3.0),
        ("data_dir=1e3run", "1e3run"),  # which begins like a number
        ("data_dir=7", "7"),  # text stays text whatever it looks like
        ("data_dir=runs/a=b", "runs/a=b"),
        ("separator=null", None),
        ("separator=;", ";"),
        ("separator=#", "#"),  # a comment in YAML
        ("data_dir=~/clips", str(Path.home() / "clips")),
        ("separator=,", ","),
        ("separator=|", "|"),
        ("separator= ", " "),
        ("mode=exact", "exact"),
        ("folds=[1, b, 3]", [1, "b", 3]),
        ("statistics=computed", "computed"),
        ("statistics=[-6.6, 5]", [-6.6, 5.0]),
        ("group.roll=false", False),
        ("group.gain=0", 0.0),
    ],
)
def test_an_override_takes_the_type_of_its_setting(override, expected):
    value = read(override)
    for name in override.split("=")[0].split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", "there is no setting learning_rat: did you mean learning_rate?"),
        ("group.gian=1", "there is no setting group.gian: did you mean group.gain?"),
        ("zzzz=1", "there is no setting zzzz: there are data_dir, steps"),
        ("steps=many", "steps is 'many', but a whole number is expected"),
        ("steps=1.5", "steps is 1.5, but a whole number is expected"),
        ("steps=true", "steps is True, but a whole number is expected"),
        ("group.roll=1", "group.roll is 1, but true or false is expected"),
        ("mode=slow", "mode is 'slow', but one of fast, exact is expected"),
        ("folds=3", "folds is 3, but a list .each item a whole number or text. is expected"),
        ("group=3", "group is 3, but a group of settings is expected"),
        ("steps.a=3", "steps is {'a': '3'}, but a whole number is expected"),
        ("steps", "'steps' is not a setting: write key=value"),
    ],
)
def test_a_wrong_override_is_named_with_what_was_expected(override, message):
    with pytest.raises(UserError, match=message):
        read(override)


def test_a_file_is_read_and_overrides_win(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: 5\nlearning_rate: 1e-4\nmodel: {width: 64, eps: 1e-6}\ngroup: {gain: 3}\n")
    settings = read("steps=6", "model.width=128", "model.name=x", file=file)
    assert (settings.steps, settings.learning_rate, settings.group) == (6, 1e-4, Group(roll=True, gain=3.0))
    assert settings.model == {"width": 128, "eps": 1e-6, "name": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 5\nsteps: 6", "steps stands twice"),
        ("- 1", "holds a list, but lines of the form"),
        ("steps: [", "recipe.yaml cannot be read: not YAML: "),
        ("steps: 5\nlearning_rate: fast", "learning_rate is 'fast', but a number is expected"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read(file=file)


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: &m\n  itself: *m\n", "it has the alias .m: write the value out"),
        ("model: &m [*m]", "it has the alias"),
        (BOMB, "it has the alias"),
        ("model: " + "[" * 10_000 + "]" * 10_000, "nested more than 32 deep"),
        ("model: " + "[" * 10_000, "nested more than 32 deep"),
        ("model: " + "{a: " * 10_000, "nested more than 32 deep"),
        ("\n".join("  " * depth + "a:" for depth in range(100)), "nested more than 32 deep"),
        ("steps: " + "9" * 10_000, "recipe.yaml"),
        ("model: {? [1, 2] : 3}", "recipe.yaml"),
        ("model: {? {a: 1} : 3}", "recipe.yaml"),
        ("model: {" + "".join(f"k{i}: 1, " for i in range(5_000)) + "k7: 1}", "k7 stands twice"),
        ("model: !!python/object/apply:os.getcwd []", "recipe.yaml cannot be read: not YAML"),
        ("steps: \0", "recipe.yaml cannot be read: not YAML"),
        ("\x85\udcff", "recipe.yaml cannot be read"),
    ],
    ids=range(14),
)
def test_a_hostile_file_is_one_clear_error_at_once(tmp_path, text, message):
    file, start = tmp_path / "recipe.yaml", time.process_time()
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        read(file=file)
    with pytest.raises(UserError):
        read(f"group={text}")
    assert time.process_time() - start < 5


def test_a_settings_file_cut_at_any_length_or_of_another_kind_ends_in_a_clear_error_or_settings(tmp_path):
    write_settings(read("model.depth=2", "folds=[1, '2']"), tmp_path / "settings.yaml")
    whole = (tmp_path / "settings.yaml").read_bytes()
    contents = [whole[:length] for length in range(len(whole))] + [b"", b"7", b"- 1", b"a", b"\xff", b"\0", b"[[[["]
    contents += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    for content in contents:
        (tmp_path / "settings.yaml").write_bytes(content)
        with contextlib.suppress(UserError):
            assert isinstance(read(file=tmp_path / "settings.yaml"), Example)


def test_a_date_is_text(tmp_path):
    """So it can be compared with a data set's column, and written to a checkpoint."""
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: 5\nmodel: {day: 2020-01-01}\n")
    assert read(file=file).model == {"day": "2020-01-01"}
    assert read("steps=5", "model.day=2020-01-01").model == {"day": "2020-01-01"}


def test_a_setting_without_default_must_be_given():
    with pytest.raises(UserError, match=r"data_dir is required \(where the clips are\)"):
        read_settings(Example)


def test_written_settings_are_complete_and_read_back(tmp_path):
    settings = read("learning_rate=1e-7", "separator=|", "model.depth=2", "folds=[1, '2']")
    write_settings(settings, tmp_path / "settings.yaml")
    assert "steps: 100" in (tmp_path / "settings.yaml").read_text()
    assert read_settings(Example, tmp_path / "settings.yaml") == settings


def test_defaults_are_not_shared_between_instances():
    first = read()
    first.folds.append(1)
    first.group.gain = 0.0
    assert (read().folds, read().group.gain) == ([], 10.0)


def test_every_setting_is_listed_with_default_and_explanation():
    listing = list_settings(Example)
    assert "data_dir (required)\n      where the clips are" in listing
    assert "group.gain = 10.0\n      amplify" in listing


def test_the_command_line_reports_a_mistake_in_one_line(capsys, tmp_path):
    assert parse_settings(Example, "An example.", ["data_dir=x", "steps=3"]).steps == 3
    with pytest.raises(SystemExit) as exit:
        parse_settings(Example, "An example.", [str(tmp_path / "no.yaml")])
    assert exit.value.code == 2
    assert "no.yaml is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        parse_settings(Example, "An example.", ["--help"])
    assert exit.value.code == 0
    assert "learning_rate = 5.0e-05" in capsys.readouterr().out


def test_unknown_names_are_compared_with_known_ones():
    check_names(["a"], ["a", "b"])
    with pytest.raises(UserError, match="no setting model.hiden_size: did you mean model.hidden_size"):
        check_names(["hiden_size"], ["hidden_size", "depth"], "model.")


def test_a_number_with_a_letter_too_many_is_no_number():
    with pytest.raises(UserError, match="learning_rate is '1e-3x', but a number is expected"):
        read("learning_rate=1e-3x")


def test_settings_that_a_part_of_the_library_declares_are_explained_by_its_docstring():
    listed = list_settings(PreTrainingSettings)
    assert "data.sources = []\n      the mixture, such as `[{kind: folder, path: recordings}]`" in listed
    lines = listed.splitlines()
    assert [line for line, behind in zip(lines, [*lines[1:], ""]) if line.startswith("  data.") and not behind.startswith("      ")] == []
