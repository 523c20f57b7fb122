"""The command `sslam`: what it lists, what it answers to a mistake, and that nothing is loaded that a command does not need."""

import importlib
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import soundfile
from conftest import noise

from transformers_sslam import __version__, cli
from transformers_sslam.errors import missing_model


SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_without_a_command_all_are_listed_with_what_they_do(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        listing = capsys.readouterr().out
        for name, command in cli.COMMANDS.items():
            assert f"  {name} " in listing
            assert command.help in listing


def test_the_version_is_told(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_unknown_command_is_named_with_the_known_ones(capsys):
    for name, question in (("train", "did you mean finetune or pretrain? "), ("detekt", "did you mean detect? "), ("xyz", "")):
        assert cli.main([name]) == 2
        assert f"there is no command {name}: {question}choose one of tag, detect, embed" in capsys.readouterr().err
    assert {other for names in cli.OTHER_NAMES.values() for other in names} <= set(cli.COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("detect --modle x", "there is no setting modle: did you mean model"),
        ("tag --input a.wav b.wav", "there is no setting input: did you mean inputs?"),
        ("detect --treshold.rain 0.3", "there is no setting treshold.rain: did you mean threshold"),
        ("finetune --augmentation.mixup_alhpa 0.5", "there is no setting augmentation.mixup_alhpa: did you mean augmentation.mixup_alpha"),
        (
            "finetune --config finetune_tinny",
            "config is 'finetune_tinny', but there is no such file or recipe: did you mean finetune_tiny or",
        ),
        ("pretrain --config recipes/pretrain_tiny_stag1.yaml", "did you mean pretrain_tiny_stage1 or pretrain_tiny_stage2 or "),
        (
            "tag --model m --inputs i --output o.csv --per segmnt",
            "per is segmnt, but one of 'segment', 'window' is expected: did you mean segment?",
        ),
    ],
)
def test_of_a_misspelt_name_the_nearest_valid_ones_are_named(words, message, capsys):
    assert cli.main(words.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_rejects_unknown_settings_in_one_line(name, capsys):
    pytest.importorskip("onnx" if name == "export" else "datasets")
    assert cli.main([name, "--help"]) == 0
    assert f"usage: sslam {name} [--config RECIPE_OR_FILE] [--setting value ...]" in capsys.readouterr().out
    assert cli.main([name, "--nonsense", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sslam {name}: error: there is no setting nonsense: ")
    assert error.count("\n") == 1


def test_a_missing_package_is_named_with_the_extra_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers_sslam.polyphony.benchmark", None)
    assert cli.main(["mix", "--data_dir", "x"]) == 2
    assert "pip install 'transformers-sslam[train]'" in capsys.readouterr().err


def test_a_mistake_of_the_user_ends_in_one_line_and_status_1(tmp_path, capsys):
    pytest.importorskip("soundfile")
    words = ["--model", str(tmp_path / "none"), "--inputs", str(tmp_path), "--output", str(tmp_path / "tags.jsonl")]
    assert cli.main(["tag", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sslam tag: error: ")
    assert "Traceback" not in error


def test_ctrl_c_while_a_command_is_imported_ends_in_one_line(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["tag", "--model", "x"]) == 130
    assert capsys.readouterr().err == "sslam tag: stopped\n"


def test_the_module_and_the_installed_command_are_the_same(monkeypatch, capsys):
    (command,) = metadata.distribution("transformers-sslam").entry_points.select(group="console_scripts", name="sslam")
    assert command.load() is cli.main
    assert Path(sys.executable).with_name("sslam").is_file()
    monkeypatch.setattr(sys, "argv", ["sslam"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module("transformers_sslam", run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: sslam COMMAND")


def test_importing_the_package_and_listing_the_commands_is_cheap():
    """Nothing of training or conversion is imported, nor any of its dependencies that Transformers does not import by itself."""
    program = (
        "import sys\n"
        "from transformers_sslam import cli\n"
        "cli.main([])\n"
        "folders = ('audio', 'evaluation', 'finetuning', 'polyphony', 'pretraining', 'publishing', 'recordings')\n"
        "print([name for name in sys.modules if name in {'datasets', 'evaluate', 'jsonargparse', 'tensorboard'}\n"
        "       or name.startswith('transformers_sslam.') and (name.count('.') > 1 or name.split('.')[1] in folders)])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_launcher(name):
    file = SCRIPTS / f"{'evaluate_classifier' if name == 'evaluate' else name}.py"  # another name would hide the library `evaluate`
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith('"""')]
    assert lines == [
        "import sys",
        "from transformers_sslam.cli import main",
        'if __name__ == "__main__":',  # for worker processes that import it again
        f'    sys.exit(main(["{name}", *sys.argv[1:]]))',
    ]


MISSING = {  # what each command needs beside --model; {clips} is a folder of labelled clips, {new} one that is not there yet
    "tag": "--inputs {clips} --output {new}.jsonl",
    "detect": "--inputs {clips} --output {new}.csv",
    "embed": "--inputs {clips} --output {new}.parquet",
    "app": "",
    "finetune": "--data_dir {clips} --output_dir {new} --do_eval false",
    "evaluate": "--data_dir {clips} --output_dir {new}",
    "evaluate --task events": "--data_dir {clips} --output_dir {new}",
    "probe": "--data_dir {clips} --output_dir {new}",
    "benchmark": "--tasks ESC50 --output_dir {new}",
    "pretrain": "--config pretrain_tiny_stage2 --output_dir {new}",
    "export": "--output_dir {new}",
    "card": "",
    "publish --space": "--output_dir {new}",
    "convert": "--output_dir {new}",
}


@pytest.mark.parametrize("name", ["nothing", "./nothing", "runs/without/model", "someone/nothing"])
@pytest.mark.parametrize("command", MISSING)
def test_every_command_says_the_same_of_a_model_that_is_not_there(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, label in enumerate(("cat", "dog") * 2):
        (tmp_path / "clips" / label).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "clips" / label / f"{i}.wav", noise(1.0, seed=i), 16_000)
    words = MISSING[command].format(clips=tmp_path / "clips", new=tmp_path / "new").split()
    assert cli.main([*command.split(), "--model", name, *words]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"sslam {command.split()[0]}: error: {missing_model(name)}"
    assert not (tmp_path / "new").exists() or not any(file.is_file() and file.suffix for file in (tmp_path / "new").rglob("*"))


def test_every_command_with_a_model_is_among_them():
    modules = {name: importlib.import_module(f"transformers_sslam.{command.module}") for name, command in cli.COMMANDS.items()}
    with_model = {name for name, module in modules.items() if "model" in getattr(module, cli.COMMANDS[name].settings).__dataclass_fields__}
    assert with_model == {command.split()[0] for command in MISSING}


@pytest.mark.parametrize(
    ("model", "command", "found", "needed"),
    [
        ("sslam-tiny-esc10", "detect", "a classifier of clips", "a detector of events"),
        ("sslam-tiny-esc10", "evaluate --task events", "a classifier of clips", "a detector of events"),
        ("sslam-small-everyday", "evaluate", "a detector of events", "a classifier of clips"),
    ],
)
def test_a_model_of_another_task_is_rejected_in_one_sentence(model, command, found, needed, tmp_path, capsys):
    folder = SCRIPTS.parent / "model_cards" / model
    soundfile.write(tmp_path / "a.wav", noise(1.0, seed=0), 16_000)
    words = MISSING[command].format(clips=tmp_path, new=tmp_path / "new").split()
    assert cli.main([*command.split(), "--model", str(folder), *words]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    task = "events" if "detector" in needed else "classification"
    assert f"error: model {folder} is {found}, but {needed} is needed: give one that was fine-tuned with --task {task}, or use " in last
    assert ("sslam tag" if "detector" in needed else "sslam detect") in last


def test_no_message_has_the_name_of_an_exception():
    """Names of classes are for programmers: messages say what was found."""
    named = re.compile(r"__class__\.__name__|type\(error\)|error!r|repr\(error\)")
    found = [f"{path.name}: {match[0]}" for path in SCRIPTS.parent.rglob("src/**/*.py") for match in named.finditer(path.read_text())]
    assert not found
