"""The command `sslam`: what it lists, what it answers to a mistake, and that nothing is loaded that a command does not need."""

import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from transformers_sslam import __version__, cli


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
    assert cli.main(["train"]) == 2
    assert "there is no command train: choose one of tag, detect, embed" in capsys.readouterr().err


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
