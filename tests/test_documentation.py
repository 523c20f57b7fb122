"""What README and the pages of docs tell a reader to type works: every block of Python runs, every command is accepted.

A comment before a block says what differs: `<!-- not run: REASON -->` leaves Python out, `<!-- run by the tests -->` runs commands too.
"""

import ast
import importlib
import re
import shlex
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import noise, speech_like

from transformers_sslam import cli
from transformers_sslam.cli import COMMANDS
from transformers_sslam.settings import find_recipe, load_yaml, parse_settings, recipe_names


ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, ROOT / "CHANGELOG.md"]
LANGUAGES = {"python", "bash", "yaml", "text", "bibtex", ""}  # without a language: a tree of files
RUN, NOT_RUN = "run by the tests", "not run: "
COMMAND = re.compile(rf"^[# ]*(?:.* -m transformers_sslam|sslam) ((?:{'|'.join(COMMANDS)}) --.*)$", re.MULTILINE)
BLOCK = re.compile(r"^(?:<!-- (?P<marker>.*) -->\n)?```(?P<language>.*)\n(?P<code>(?:(?!```).*\n)*)```$", re.MULTILINE)
SHAPE = re.compile(r"^(\S.*\.shape)  # (\(.*\))$", re.MULTILINE)  # as in `vectors.shape  # (2, 128)`


class Block(NamedTuple):
    """A fenced block: the number of its first line, and the comment before it, if there is one."""

    line: int
    language: str
    marker: str
    code: str


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    text = text_of(page)
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["language"], found["marker"] or "", found["code"])
        for found in BLOCK.finditer(text)
    ]


def commands(text: str) -> list[str]:
    """Every call of the command, lines that end in a backslash joined."""
    return COMMAND.findall(re.sub(r"\\\n(#| )*", "", text))


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


DOCUMENTED = sorted({(page.name, command) for page in PAGES for command in commands(text_of(page))})
DOCUMENTED += sorted({(name, command) for name in recipe_names() for command in commands(find_recipe(name).read_text(encoding="utf-8"))})


def test_commands_are_found():
    assert {command.split()[0] for _, command in DOCUMENTED} >= COMMANDS.keys() - {"card"}
    assert len(DOCUMENTED) > 30


@pytest.mark.parametrize(("page", "command"), DOCUMENTED)
def test_a_documented_command_has_valid_settings(page, command):
    name, *words = shlex.split(command, comments=True)
    assert parse_settings(settings_class(name), words)


def settings_class(command: str) -> type:
    pytest.importorskip("onnx" if command == "export" else "datasets")
    return getattr(importlib.import_module(f"transformers_sslam.{COMMANDS[command].module}"), COMMANDS[command].settings)


@cache
def flags() -> set[str]:
    """Names of the settings of all commands, as `--help` lists them."""
    with redirect_stdout(StringIO()) as text:
        for command in COMMANDS:
            settings_class(command)
            assert cli.main([command, "--help"]) == 0
    return set(re.findall(r"--([\w.]+)", text.getvalue()))


@pytest.mark.parametrize("page", [page for page in DOCS if page.name not in ("results.md", "speed.md")], ids=page_name)
def test_flags_in_running_text_are_settings(page):  # the two pages left out have flags of scripts
    of_others = {"bf16", "no_bf16", "setting", "logdir"}
    for name in re.findall(r"(?<![\w-])--(\w[\w.]*)", BLOCK.sub("", text_of(page))):
        entry_of = name.partition(".")[0]  # of a dictionary, such as model_config
        assert {name, entry_of} & (flags() | of_others), f"--{name} is not a setting of any command"


@pytest.mark.parametrize("page", DOCS, ids=page_name)
def test_yaml_holds_settings(page):
    for block in (block for block in blocks(page) if block.language == "yaml"):
        groups = {name.partition(".")[0] for name in flags()}
        assert load_yaml(block.code).keys() <= groups


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", text_of(page)):
        path = page.parent / target if target else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_every_page_is_two_clicks_away_at_most():
    links = set(re.findall(r"\]\(docs/(\w+\.md)", text_of(ROOT / "README.md")))
    index = set(re.findall(r"\]\((\w+\.md)", text_of(ROOT / "docs" / "README.md")))
    assert links == index == {page.name for page in DOCS[1:]} - {"README.md"}
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


def test_quoted_messages_are_those_of_the_code():
    """`...` stands for what an f-string fills in."""
    pieces = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.add(node.value)
    code = "\0".join(pieces)
    quoted = re.findall(r"^\| `([^`]+)` \|", text_of(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    assert len(quoted) > 35
    for message in quoted:
        for piece in message.split("..."):
            assert piece.strip() in code, f"no message of the code holds {piece.strip()!r} of {message!r}"


@pytest.mark.parametrize("page", DOCS, ids=page_name)
def test_every_block_is_recognised(page):
    assert text_of(page).count("```") == 2 * len(blocks(page))  # none is indented, or has a fence of another kind
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        allowed = {"python": block.marker.startswith(NOT_RUN), "bash": block.marker == RUN}
        assert not block.marker or allowed.get(block.language, False), block


def test_only_marked_blocks_of_python_are_left_out():
    python = [(page, block) for page in DOCS for block in blocks(page) if block.language == "python"]
    left_out = [(page.name, block.marker.removeprefix(NOT_RUN)) for page, block in python if block.marker]
    assert left_out == [("checkpoints.md", "needs the Hub")]
    assert len(python) - len(left_out) >= 15


@pytest.fixture
def reader_folder(tmp_path, monkeypatch) -> Path:
    """The working directory of a reader after `make demo`, with a small folder of labelled clips."""
    soundfile = pytest.importorskip("soundfile")
    datasets = pytest.importorskip("datasets")
    accelerate = pytest.importorskip("accelerate")

    def write(name: str, waveform: np.ndarray) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, waveform, 16_000)

    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    for folder in ("sounds", "training_sounds"):
        write(f"runs/demo/{folder}/rain.wav", noise(5))
        write(f"runs/demo/{folder}/rooster.wav", speech_like(5))
    write("runs/demo/scene.wav", speech_like(12))
    for part, clips in (("train", 4), ("test", 3)):
        for i in range(clips):
            write(f"my_sounds/{part}/rain/{i}.wav", noise(2, seed=10 * clips + i))
            write(f"my_sounds/{part}/rooster/{i}.wav", speech_like(2 + 0.1 * (clips + i)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "131072")  # commands would keep memory for the process of the tests
    accelerate.state.AcceleratorState._reset_state(True)
    yield tmp_path
    accelerate.state.AcceleratorState._reset_state(True)


def run_python(page: Path, block: Block, namespace: dict) -> None:
    """Run a block; shapes in its comments must be the true ones."""
    exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)
    for expression, shape in SHAPE.findall(block.code):
        assert tuple(eval(expression, namespace)) == ast.literal_eval(shape), f"{page.name}: {expression}"


def has_code(page: Path) -> bool:
    return any(block.language == "python" and not block.marker for block in blocks(page)) or RUN in text_of(page)


@pytest.mark.parametrize("page", filter(has_code, DOCS), ids=page_name)
def test_blocks_run_in_their_order(page, reader_folder):
    if any("sslam export" in block.code and block.marker for block in blocks(page)):
        pytest.importorskip("onnxscript")
    if any("from peft" in block.code for block in blocks(page)):
        pytest.importorskip("peft")
    if any("import mteb" in block.code for block in blocks(page)):
        pytest.importorskip("mteb")
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and not block.marker:
            run_python(page, block, namespace)
        for command in commands(block.code) if block.marker == RUN else []:
            assert cli.main(shlex.split(command, comments=True)) == 0, command


def test_a_block_that_fails_and_a_wrong_shape_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1 / 0\n```\n\n```python\nimport numpy as np\n\nx = np.zeros(3)\nx.shape  # (2,)\n```\n")
    failing, wrong = blocks(page)
    with pytest.raises(ZeroDivisionError) as error:
        run_python(page, failing, {})
    assert error.traceback[-1].lineno + 1 == 4  # of the page
    with pytest.raises(AssertionError, match=re.escape("page.md: x.shape")):
        run_python(page, wrong, {})
