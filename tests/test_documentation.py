"""What the README, the pages of docs and the headers of recipes tell a reader to type is accepted."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from transformers_sslam.cli import COMMANDS
from transformers_sslam.settings import find_recipe, parse_settings, recipe_names


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(rf"^[# ]*(?:.* -m transformers_sslam|sslam) ((?:{'|'.join(COMMANDS)}) --.*)$", re.MULTILINE)


def commands(text: str) -> list[str]:
    """Every call of the command, lines that end in a backslash joined."""
    return COMMAND.findall(re.sub(r"\\\n(#| )*", "", text))


DOCUMENTED = sorted({(page.name, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))})
DOCUMENTED += sorted({(name, command) for name in recipe_names() for command in commands(find_recipe(name).read_text(encoding="utf-8"))})


def test_commands_are_found():
    assert {command.split()[0] for _, command in DOCUMENTED} >= {"tag", "finetune", "pretrain", "convert", "publish"}
    assert len(DOCUMENTED) > 20


@pytest.mark.parametrize(("page", "command"), DOCUMENTED)
def test_a_documented_command_has_valid_settings(page, command):
    name, *words = shlex.split(command, comments=True)
    pytest.importorskip("onnx" if name == "export" else "datasets")
    module = importlib.import_module(f"transformers_sslam.{COMMANDS[name].module}")
    assert parse_settings(getattr(module, COMMANDS[name].settings), words)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
