"""A Space that runs the page: what is in its folder, that it works by itself, and its way to a Hub on this machine."""

import ast
import html
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import pytest
from conftest import noise, tiny_config
from huggingface_hub import SpaceCard, SpaceCardData


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
pytest.importorskip("gradio", reason="needs the extra app")
from hub_server import TOKEN, HubServer  # noqa: E402
from page_client import choose_example, get  # noqa: E402
from test_app import RATE, save_classifier, save_detector, sound, table  # noqa: E402

from transformers_sslam import SSLAMFeatureExtractor, SSLAMModel, cli  # noqa: E402
from transformers_sslam.publishing import space  # noqa: E402
from transformers_sslam.publishing.cards import write_model_card  # noqa: E402
from transformers_sslam.publishing.hub import PublishError  # noqa: E402
from transformers_sslam.publishing.space import PACKAGE, build_space, check_space  # noqa: E402
from transformers_sslam.recordings.detect import DetectSettings, detect_files  # noqa: E402


REPOSITORY = "tests/page"
CODE = sorted(f"transformers_sslam/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*") if path.is_file())
CODE = [name for name in CODE if "__pycache__" not in name]
# Runs app.py where no checkout of this package can be imported, as on a machine that has the requirements alone. app.py itself adds its
# folder to those of packages.
ALONE = """
import os, pathlib, runpy, sys
os._exit = sys.exit
folder = sys.argv[1]
others = [path for path in map(pathlib.Path, sys.path) if (path / "torch").is_dir() or not (path / "transformers_sslam").is_dir()]
sys.path[:] = map(str, others)
sys.argv = ["app.py"]
try:
    runpy.run_path("app.py", run_name="__main__")
finally:
    files = [module.__file__ for name, module in sys.modules.items() if name.startswith("transformers_sslam") and module.__file__]
    assert files and all(file.startswith(folder) for file in files), files
    print(f"{len(files)} modules, all from the folder", flush=True)
"""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "a b").mkdir()
    soundfile.write(folder / "a b" / "street.wav", sound(), RATE)
    (folder / "notes.txt").write_text("not a recording")
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    folder = save_detector(tmp_path_factory.mktemp("models") / "my detector")
    write_model_card(folder, "Hears a dog, rain and the sea.", origin={"license": "mit"})
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory, detector, recordings) -> Path:
    """A Space that the command has written."""
    folder = tmp_path_factory.mktemp("spaces") / "page"
    assert run("--model", detector, "--output_dir", folder, "--examples", recordings) == 0
    return folder


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """The page is not started, as other tests do that."""
    monkeypatch.setattr(space, "check_space", lambda folder: None)


def run(*arguments) -> int:
    return cli.main(["publish", "--space", *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextmanager
def started(folder: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The page of a Space that is started with its own folder alone, and an environment like that of Spaces: its address and log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"SYSTEM": "spaces", "SPACE_ID": REPOSITORY, "GRADIO_NUM_PORTS": "1"}
    environment |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    command = [sys.executable, "-B", "-I", "-c", ALONE, str(folder)]
    with log.open("w") as output, subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output) as process:
        try:
            while "the page is at" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", log
        finally:
            process.terminate()


# --- the folder


def test_it_holds_the_page_the_code_the_model_and_the_examples(built, detector):
    found = names(built)
    model = [name for name in found if name.startswith("models/")]
    assert [name for name in found if name not in model] == sorted(
        ["README.md", "app.py", "requirements.txt", "examples/a b/street.wav", "transformers_sslam/LICENSE", *CODE]
    )
    assert {Path(name).parent.as_posix() for name in model} == {"models/my-detector"}
    assert "models/my-detector/training_args.bin" not in model
    for name in ("model.safetensors", "preprocessor_config.json"):
        assert not (built / "models/my-detector" / name).is_symlink()
    assert (built / "models/my-detector/model.safetensors").read_bytes() == (detector / "model.safetensors").read_bytes()
    assert (built / "transformers_sslam/LICENSE").read_text() == (PACKAGE.parents[1] / "LICENSE").read_text()
    assert [path.name for path in built.parent.iterdir()] == ["page"]  # nothing unfinished beside it


def test_its_card_says_how_the_hub_runs_it(built):
    data = SpaceCard.load(built / "README.md").data
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert isinstance(data, SpaceCardData)
    assert (data.sdk, data.app_file, data.python_version, data.license) == ("gradio", "app.py", python, "mit")
    assert f"gradio=={data.sdk_version}" in (built / "requirements.txt").read_text().split()
    assert data.title == "Listen with my-detector"
    assert len(data.short_description) <= 60  # the Hub rejects longer ones
    links = re.findall(r"\]\(([^)]+)\)", (built / "README.md").read_text())
    assert links
    assert all((built / link).is_file() for link in links)


@pytest.mark.usefixtures("unchecked")
def test_licences_are_stated_and_that_examples_become_public(detector, recordings, tmp_path, capsys, built):
    text = (built / "README.md").read_text()
    assert "The model's licence is mit; the code has its own, `transformers_sslam/LICENSE`. The licence of the model does not cover" in text
    model = tmp_path / "model"
    shutil.copytree(detector, model)
    own = {"license": "other", "license_name": "mine", "license_link": "https://example.org/licence"}
    for card, sentence in ((own, "The model's licence is mine;"), ({}, "The model's card names no licence: ask its authors")):
        lines = "".join(f"{name}: {value}\n" for name, value in card.items())
        text = (detector / "README.md").read_text()
        assert "license: mit\n" in text
        (model / "README.md").write_text(text.replace("license: mit\n", lines))
        capsys.readouterr()
        page = tmp_path / f"page-{len(card)}"
        assert run("--model", model, "--output_dir", page, "--examples", recordings) == 0
        assert "note: the examples become public with the Space: " in capsys.readouterr().out
        data = SpaceCard.load(page / "README.md").data.to_dict()
        assert {name: value for name, value in data.items() if name.startswith("license")} == card
        assert sentence in (page / "README.md").read_text()


def test_its_requirements_are_those_of_the_extra_at_the_versions_of_this_machine(built):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["app"], *extras["audio"]]
    expected = {re.match(r"[\w-]+", text)[0].replace("_", "-") for text in needed} - {"transformers-sslam"}
    lines = (built / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in lines} == expected
    assert lines == sorted(f"{name}=={version(name).partition('+')[0]}" for name in expected)


def test_it_has_limits_for_a_public_page(built):
    call = next(node for node in ast.walk(ast.parse((built / "app.py").read_text())) if isinstance(node, ast.Call) and node.keywords)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    limits = {"max_seconds": "120.0", "max_megabytes": "20", "max_waiting": "16", "at_once": "1", "max_compute_seconds": "60.0"}
    assert given.items() >= limits.items()
    assert given["host"] == "os.environ.get('GRADIO_SERVER_NAME', '0.0.0.0')"
    assert given["port"] == "int(os.environ.get('GRADIO_SERVER_PORT', '7860'))"


def test_it_works_with_its_own_folder_alone(built, detector, recordings, tmp_path):
    before = names(built)
    output = tmp_path / "events.csv"
    detect_files(DetectSettings(model=str(detector), inputs=str(recordings), output=str(output), device="cpu"))
    expected = [(f"{float(row['start']):.2f}", f"{float(row['end']):.2f}", row["label"]) for row in table(output)]
    with started(built, tmp_path) as (address, log):
        assert b"Listen with my-detector" in get(address)
        player, _, _, lanes, rows, *_ = choose_example(address, "a b/street.wav")
        assert "street.wav" in player
    found = re.findall(r"</span> ([\d.]+)</button></td><td>([\d.]+)</td><th scope=\"row\">(.*?)</th>", rows)
    assert [(start, end, html.unescape(label)) for start, end, label in found] == expected
    assert len(expected) > 3
    assert lanes.count('class="sslam-bar') == len(expected)
    assert re.search(r"^\d+ modules, all from the folder$", log.read_text(), re.MULTILINE), log.read_text()
    assert names(built) == before


def test_it_starts_from_a_folder_of_any_name_in_an_empty_environment(built, tmp_path):
    """Also of names of packages that it imports, one of them below the current folder. `-I` leaves the folder of the script out of those
    of packages; `check_space` starts it with that folder, and by a plain name."""
    folder = tmp_path / "gradio" / "a page, d\u00e9j\u00e0 vu \u97f3" / "torch"
    shutil.copytree(built, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-B", "-I", os.path.relpath(folder / "app.py", tmp_path)]
    with subprocess.Popen(command, cwd=tmp_path, env=address, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = next((line for line in process.stdout if line.startswith("the page is at")), "it ended")
            assert said == f"the page is at http://127.0.0.1:{port}/; Ctrl-C ends it\n"
            assert b"Listen with my-detector" in get(f"http://127.0.0.1:{port}")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()  # a test that fails would wait for it for ever
    assert names(folder) == names(built)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "plain"), [("d\u00e9tecteur \u00e9 2.0", "detecteur-e-2.0"), ("\u97f3", "model"), ("--", "model"), ("a" * 200, "a" * 80)]
)
def test_a_model_of_any_name_gets_one_that_the_hub_takes(detector, tmp_path, name, plain):
    shutil.copytree(detector, tmp_path / name)
    assert run("--model", tmp_path / name, "--output_dir", tmp_path / "page") == 0
    assert [path.name for path in (tmp_path / "page/models").iterdir()] == [plain]


def test_what_does_not_start_is_not_written(detector, tmp_path, capsys, monkeypatch):
    """Here the copied code lacks a file that the package itself has."""

    def check_without_one_file(folder: Path) -> None:
        (folder / "transformers_sslam" / "app" / "picture.py").unlink()
        check_space(folder)

    monkeypatch.setattr(space, "check_space", check_without_one_file)
    assert run("--model", detector, "--output_dir", tmp_path / "page") == 1
    message = r"the Space does not work: its app.py ended \(No module named 'transformers_sslam.app.picture'\)"
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_a_page_cannot_use_is_rejected(tmp_path, capsys):
    SSLAMModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / "encoder")
    write_model_card(tmp_path / "encoder", "Untrained.")
    assert run("--model", tmp_path / "encoder", "--output_dir", tmp_path / "page") == 1
    assert "encoder is an encoder without a trained head, but a classifier of clips is needed" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_a_page_that_does_not_come_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "START_TIMEOUT", 0.5)
    (tmp_path / "app.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    start = time.monotonic()
    with pytest.raises(PublishError, match=r"its app.py gave no page within 0.5 s \((loading|nothing was printed)\)"):
        check_space(tmp_path)
    assert time.monotonic() - start < 30


# --- what is rejected


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--examples", "empty"], "examples is 'empty', but a recording, or a folder with some, is expected"),
        (["--examples", "nowhere"], "examples is 'nowhere', but a recording, or a folder with some, is expected"),
        (["--examples", "long.wav"], "long.wav lasts 121.0 s, but visitors may choose recordings of at most 120 s: cut it"),
        (["--examples", "broken.wav"], "broken.wav "),
        (["--output_dir", "taken"], "taken exists and is not an empty folder: choose another place"),
        (["--repo_id", "page"], "'page' is a name without its owner: give owner/name"),
    ],
)
def test_what_cannot_be_used_is_named(detector, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    Path("broken.wav").write_text("no audio")
    soundfile.write("long.wav", noise(121.0), RATE)
    before = names(tmp_path)
    assert run("--model", detector, *([] if "--output_dir" in arguments else ["--output_dir", "page"]), *arguments) == 1
    assert sentence in capsys.readouterr().err
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--space"], "repo_id is required: write --repo_id OWNER/NAME, or --output_dir FOLDER for a Space that stays here"),
        ([], "repo_id is required: write --repo_id OWNER/NAME"),
        (["--repo_id", "me/x", "--output_dir", "page"], "output_dir is 'page', but only a Space has it: add --space, or leave it out"),
        (["--repo_id", "me/x", "--examples", "a.wav"], "examples is 'a.wav', but only a Space has it: add --space, or leave it out"),
        (["--space", "--output_dir", "page", "--private"], "private or revision is set, but nothing is sent: add --repo_id OWNER/NAME"),
        (
            ["--space", "--output_dir", "page", "--revision", "b"],
            "private or revision is set, but nothing is sent: add --repo_id OWNER/NAME",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_rejected(arguments, sentence, capsys):
    assert cli.main(["publish", "--model", "model", *arguments]) == 2
    assert capsys.readouterr().err.rstrip().endswith(sentence)


def test_without_the_packages_of_the_page_it_says_what_to_install(detector, tmp_path, monkeypatch):
    def version(name: str) -> str:
        if name == "gradio":
            raise space.importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(space.importlib.metadata, "version", version)
    with pytest.raises(PublishError, match=r"gradio is not installed, which a Space needs: pip install 'transformers-sslam\[app\]'"):
        build_space(tmp_path, str(detector))


# --- to the Hub


@pytest.fixture
def server(monkeypatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.mark.usefixtures("unchecked")
def test_it_is_sent_whole_and_a_former_one_is_replaced(server, detector, recordings, tmp_path, capsys):
    assert run("--model", detector, "--repo_id", REPOSITORY, "--examples", recordings, "--private") == 0
    assert f"published: {server.url}/spaces/{REPOSITORY}" in capsys.readouterr().out
    assert server.repositories.keys() == {f"spaces/{REPOSITORY}"}
    repository = server.repositories[f"spaces/{REPOSITORY}"]
    remote = repository.branches["main"]
    assert repository.private
    assert {"app.py", "requirements.txt", "examples/a b/street.wav", *CODE} <= remote.keys()

    remote.update({"transformers_sslam/old.py": b"", "transformers_sslam/app/old.py": b"", "models/other/config.json": b"{}"})
    remote["mine/logo.svg"] = b"mine"
    classifier = save_classifier(tmp_path / "classifier")
    write_model_card(classifier, "Untrained.")
    assert run("--model", classifier, "--repo_id", REPOSITORY, "--output_dir", tmp_path / "page") == 0
    page = names(tmp_path / "page")
    assert remote.keys() == {*page, ".gitattributes", "mine/logo.svg"}
    assert all(remote[name] == (tmp_path / "page" / name).read_bytes() for name in page)


@pytest.mark.usefixtures("unchecked")
def test_a_dry_run_lists_what_a_space_would_hold_and_leaves_nothing(server, detector, tmp_path, capsys):
    assert run("--model", detector, "--repo_id", REPOSITORY, "--output_dir", tmp_path / "page", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ +[\d,]+ bytes  models/my-detector/model.safetensors$", printed, re.MULTILINE)
    size = sum((PACKAGE.parent / name).stat().st_size for name in CODE) + (PACKAGE.parents[1] / "LICENSE").stat().st_size
    assert f"{size:,} bytes  transformers_sslam/, {len(CODE) + 1} files\n" in printed
    assert "stays here: training_args.bin\n" in printed
    assert printed.endswith(f"dry run: nothing was sent to {REPOSITORY}\n")
    assert (server.writes, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.usefixtures("unchecked")
def test_a_model_of_the_hub_is_carried_and_named(server, detector, tmp_path, monkeypatch):
    saved = shutil.copytree(detector, tmp_path / "saved")
    write_model_card(saved, "![How sure it is](reliability.png)", origin={"license": "mit"})
    (saved / "reliability.png").write_bytes(b"picture")
    assert cli.main(["publish", "--model", str(saved), "--repo_id", "tests/sounds"]) == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run("--model", "tests/sounds", "--output_dir", tmp_path / "page") == 0
    assert SpaceCard.load(tmp_path / "page" / "README.md").data.models == ["tests/sounds"]
    assert (tmp_path / "page/models/sounds/reliability.png").read_bytes() == b"picture"
    weights = tmp_path / "page/models/sounds/model.safetensors"
    assert not weights.is_symlink()
    assert weights.read_bytes() == (detector / "model.safetensors").read_bytes()
