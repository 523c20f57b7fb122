"""A Hugging Face Space that runs the page of `sslam app`: a folder that holds all that it needs but the packages of its requirements.

The code of this package lies beside `app.py`, as Spaces run a folder and no package index has to have this version.
"""

import http.client
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

from huggingface_hub import ModelCard, SpaceCardData, snapshot_download
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .. import __version__
from ..app.settings import EXAMPLES_RIGHTS
from ..errors import as_user_error
from ..files import write_text
from ..reports import markdown_table
from .conversion import resolve_model
from .folders import check_model_folder
from .hub import PUBLISHED, Publication, PublishError, prepare_publication


PACKAGE = Path(__file__).parents[1]
DISTRIBUTION, EXTRA = "transformers-sslam", "app"
MODELS, EXAMPLES = "models", "examples"
LONGEST_NAME = 80  # letters; the Hub takes 96
LONGEST = 120.0  # seconds of a recording, examples included
SAMPLING_RATE = 16_000  # that lengths are measured at
START_TIMEOUT = 600.0  # seconds: a busy machine may take minutes

EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception): ")  # as a traceback's last line begins

APP = '''"""The page of `sslam app`, as a Space runs it. `python app.py` starts it on any machine, at port 7860 of all its networks."""

import os
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the code beside this file, wherever it is started
os.environ.setdefault("PATH", os.defpath)  # which a package of Gradio reads, even where the environment is empty

from transformers_sslam.app.settings import AppSettings, run  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402


SETTINGS = AppSettings(
    model=str(HERE / "{model}"),
    examples={examples},
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    open_browser=False,
    # Limits for visitors: change them here, and restart the page, which a Space does by itself after a change. `python -m
    # transformers_sslam app --help` lists these and other settings.
    max_seconds={longest},  # length of a recording
    max_megabytes=20,  # size of a file
    max_waiting=16,  # recordings that wait for their turn; more are rejected
    at_once=1,  # recordings that are computed at the same time
    max_compute_seconds=60.0,  # time that one recording may take
    keep_minutes=30.0,  # after which a recording is deleted that nobody looks at, although its page is open
)

if __name__ == "__main__":
    try:
        run(SETTINGS)
    except UserError as error:
        sys.exit(str(error))
'''
TEXT = """# {title}

Give a recording: hear it, and see what the model finds in it, from when to when. Model, data and limits stand on the page, and in
[the model's card]({model}/README.md).

{files}

{rights}

`pip install -r requirements.txt` and `python app.py` start the page on any machine. Limits for visitors, such as recordings of at most
{longest:g} seconds, are set in `app.py`.
"""


def build_space(
    folder: Path, model: str, repo_id: str | None = None, examples: str | None = None, results: str | Path | None = None
) -> Publication:
    """Fill an empty folder with a Space, and start it once to see that it works.

    Args:
        folder: empty.
        model: a detector or a classifier: a folder, a Hub id, or an official fine-tuned checkpoint.
        repo_id: of the Space on the Hub, if it is sent there.
        examples: recording, or folder of recordings, that visitors may choose.
        results: as of [`prepare_publication`].

    Raises:
        PublishError: if a part is missing or cannot be used, or the page does not start.
    """
    try:
        package = importlib.metadata.distribution(DISTRIBUTION)
        requirements, gradio = _requirements(package), importlib.metadata.version("gradio")
        license_text = package.read_text("licenses/LICENSE")
    except importlib.metadata.PackageNotFoundError as error:
        raise PublishError(f"{error.name} is not installed, which a Space needs: pip install '{DISTRIBUTION}[{EXTRA}]'") from error
    if license_text is None:
        raise PublishError(f"{DISTRIBUTION} was installed without its licence, which goes with its code: install it again")
    check_model_folder(model)
    is_local = Path(model).exists()
    name = _simple_name((Path(model).resolve() if is_local else Path(model)).name.removesuffix(".pt"))
    place = f"{MODELS}/{name}"  # by its name, which is the page's title
    with (
        tempfile.TemporaryDirectory(prefix="model-") as scratch,
        prepare_publication(_saved_model(model, Path(scratch) / name), place, results) as published,
    ):
        shutil.copytree(published.folder, folder / place)  # the weights too, which are links there
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    write_text(folder / PACKAGE.name / "LICENSE", license_text)
    write_text(folder / "requirements.txt", "".join(f"{requirement}\n" for requirement in requirements))
    chosen, notes = "None", published.notes
    if examples is not None:
        notes = [*notes, "the examples become public with the Space: publish none whose rights others hold, or in which somebody is known"]
        _copy_examples(Path(examples), folder / EXAMPLES)
        chosen = f'str(HERE / "{EXAMPLES}")'
    write_text(folder / "app.py", APP.format(model=place, examples=chosen, longest=LONGEST))
    write_text(folder / "README.md", _readme(folder, place, gradio, None if is_local else model))
    check_space(folder)
    return Publication(folder, repo_id or "", published.left_out, notes, "space", (PACKAGE.name, MODELS, EXAMPLES))


def _simple_name(name: str) -> str:
    """Of a model, as repositories may be called: without accents, spaces and signs."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"\w+(?:\.\w+)*", plain))[:LONGEST_NAME].rstrip("-.") or "model"


def _readme(folder: Path, place: str, gradio: str, hub_id: str | None) -> str:
    """The Space's card: front matter that tells the Hub how to run it, and what its files are."""
    title = f"Listen with {Path(place).name}"
    card = ModelCard.load(folder / place / "README.md").data.to_dict()
    licence = {name: card[name] for name in ("license", "license_name", "license_link") if card.get(name)}
    front = SpaceCardData(
        title=title,
        emoji="👂",
        colorFrom="blue",
        colorTo="indigo",
        sdk="gradio",
        sdk_version=gradio,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        **licence,
        models=None if hub_id is None else [hub_id],
        short_description="Hear a recording, and see the sounds that are in it",
    )
    files = [
        ["`app.py`", "starts the page, with its limits"],
        ["`requirements.txt`", "the packages that it needs, at the versions that it was tried with"],
        [f"`{PACKAGE.name}/`", f"the code, version {__version__}, with its licence"],
        [f"`{place}/`", "the model"],
    ]
    if (folder / EXAMPLES).exists():
        files.append([f"`{EXAMPLES}/`", "recordings to choose from"])
    name = licence.get("license_name") or licence.get("license")
    rights = f"The model's licence is {name}" if name else "The model's card names no licence: ask its authors before you use it"
    rights += f"; the code has its own, `{PACKAGE.name}/LICENSE`."
    if (folder / EXAMPLES).exists():
        rights += " " + EXAMPLES_RIGHTS
    table = markdown_table(["file", "what it is"], files)
    text = TEXT.format(title=title, model=place, files=table, rights=rights, longest=LONGEST)
    return f"---\n{front.to_yaml()}\n---\n\n{text}"


def check_space(folder: Path) -> None:
    """Start the page of a Space in a process of its own, on the CPU of this machine, without the Hub and its cache.

    Raises:
        PublishError: if it ends, or gives no page.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # -E and -s: the folder, which comes first by itself, and installed packages; -B: and nothing is written beside the code.
    command = [sys.executable, "-B", "-E", "-s", "app.py"]
    address = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    with tempfile.TemporaryDirectory(prefix="space-home-") as home, tempfile.TemporaryFile() as log:
        environment = {**os.environ, **address, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while not _answers(port):
                ended = process.poll() is not None
                if ended or time.monotonic() > deadline:
                    log.seek(0)
                    said = log.read().decode(errors="replace").split("\n")
                    last = next((EXCEPTION.sub("", line.strip()) for line in reversed(said) if line.strip()), "nothing was printed")
                    what = "ended" if ended else f"gave no page within {START_TIMEOUT:g} s"
                    raise PublishError(f"the Space does not work: its app.py {what} ({last})")
                time.sleep(0.2)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _requirements(package: importlib.metadata.Distribution) -> list[str]:
    """What the page needs besides this package's own code, at the versions that are installed here."""
    pinned = set()
    for requirement in map(Requirement, package.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": EXTRA}):
            version = Version(importlib.metadata.version(requirement.name)).public  # an index has no 2.14.1+cu130
            requirement.specifier, requirement.marker = SpecifierSet(f"=={version}"), None
            pinned.add(str(requirement))
    return sorted(pinned)


def _saved_model(model: str, place: Path) -> Path:
    """The folder of a model, copied to `place` if it comes from the Hub."""
    resolved = resolve_model(model)
    if Path(resolved).is_dir():
        return Path(resolved)
    with as_user_error(f"model {model} cannot be fetched"):
        snapshot = snapshot_download(model, allow_patterns=[*PUBLISHED, "*.png"])
    return Path(shutil.copytree(snapshot, place))  # which has links to outside, as only the cache may have


def _copy_examples(source: Path, folder: Path) -> None:
    """Copy recordings, after a look whether the page can use them."""
    from ..audio.decode import AUDIO_SUFFIXES, read_blocks
    from ..audio.paths import find_files

    if source.is_file():
        files = {source.name: source}
    else:
        files = {name: source / name for name in find_files(source, AUDIO_SUFFIXES)[0]} if source.is_dir() else {}
    if not files:
        raise PublishError(f"examples is {str(source)!r}, but a recording, or a folder with some, is expected")
    for name, file in files.items():
        seconds = sum(map(len, read_blocks(file, SAMPLING_RATE))) / SAMPLING_RATE
        if seconds > LONGEST:
            raise PublishError(f"{file} lasts {seconds:.1f} s, but visitors may choose recordings of at most {LONGEST:g} s: cut it")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
