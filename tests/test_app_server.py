"""The command that serves the page: where it is, how it ends, and what is left then."""

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from conftest import noise


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
pytest.importorskip("gradio", reason="needs the extra app")
from page_client import get, messages_of_example  # noqa: E402
from test_app import RATE, save_classifier, save_detector  # noqa: E402

from transformers_sslam.app.server import check_address, describe_address, serve  # noqa: E402
from transformers_sslam.app.sessions import Sessions  # noqa: E402
from transformers_sslam.app.settings import AppSettings  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.publishing.space import APP, LONGEST  # noqa: E402


CLOSED = "the page is closed, and what it kept is deleted\n"


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    return save_detector(tmp_path_factory.mktemp("models") / "detector")


@contextmanager
def served(model: Path, folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command in a process of its own with `folder` for temporary files, and what it says first. Then it reports no errors."""
    command = [sys.executable, "-m", "transformers_sslam", "app", "--model", str(model), "--port", "0", "--open_browser", "false"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [*command, "--device", "cpu", *words], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            said = process.stdout.readline()
            before = os.fstat(errors.fileno()).st_size  # what packages say when they are loaded
            yield process, said
        finally:
            process.kill()
            process.wait()
            errors.seek(0)
            print(errors.read().decode(errors="replace"))  # which pytest shows of a test that fails
        errors.seek(before)
        assert errors.read() == b""


def test_the_address_opens_here_until_the_command_is_stopped_which_leaves_nothing(detector, tmp_path):
    with served(detector, tmp_path, "--host", "0.0.0.0") as (process, said):
        sentence = r"the page is at (http://localhost:\d+)/, and open to the network at the addresses of this machine; Ctrl-C ends it\n"
        assert b"Listen with detector" in get(re.fullmatch(sentence, said)[1])
        assert list(tmp_path.glob("sslam-app-*"))
        process.terminate()
        assert process.stdout.read() == CLOSED
        assert process.wait(60) == 143
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith("sslam")]


def largest(folder: Path) -> int:
    """Bytes of the largest upload."""
    return max((path.stat().st_size for path in folder.glob("sslam-app-*/uploads/*")), default=0)


def test_ctrl_c_aborts_what_is_computed_and_deletes_what_is_being_sent(tmp_path):
    model = save_classifier(tmp_path / "classifier")
    folder = tmp_path / "temporary"
    folder.mkdir()
    soundfile.write(tmp_path / "long.wav", noise(1200.0), RATE)
    words = ["--examples", str(tmp_path / "long.wav"), "--hop", "0.01"]  # 120,000 windows
    with served(model, folder, *words) as (process, said):
        address = re.fullmatch(r"the page is at (http://127\.0\.0\.1:\d+)/; Ctrl-C ends it\n", said)[1]
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as sender:
            part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n' + bytes(2**20)
            header = "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            sender.sendall(f"{header}Content-Length: {2**22}\r\n\r\n".encode() + part)
            messages = messages_of_example(address, "long.wav")
            done = next(message for message in messages if message["msg"] == "progress" and message["progress_data"][-1]["progress"] > 0)
            assert done["progress_data"][-1]["progress"] < 0.5
            deadline = time.monotonic() + 60
            while (arrived := largest(folder)) < 2**20 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert arrived == 2**20
            start = time.monotonic()
            for _ in range(2):  # also when somebody is impatient
                process.send_signal(signal.SIGINT)
                time.sleep(0.1)
            assert process.stdout.read() == CLOSED
            assert process.wait(60) == 0
            assert time.monotonic() - start < 30  # all windows, or the rest of the upload, would take minutes
    assert not [path for path in folder.rglob("*") if path.is_file() or path.name.startswith("sslam")]


def test_a_port_in_use_and_an_address_of_another_machine_are_named_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for host, cause in (("127.0.0.1", "Address already in use"), ("192.0.2.1", "Cannot assign requested address")):
            with pytest.raises(UserError, match=rf"served at host {host}, port {port} \({cause}.*: give a port that no other program uses"):
                serve(AppSettings(model="nothing", host=host, port=port))
    for host in ("127.0.0.1", "localhost"):
        check_address(host, 0)
    with pytest.raises(UserError, match=r"no page can be served at host a{64}\.example, port 0 \(.*label"):
        check_address("a" * 64 + ".example", 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_an_address_that_no_browser_opens_is_not_printed(host):
    address = "http://localhost:7860/" if host == "0.0.0.0" else "http://[::]:7860/"  # what Gradio gives
    expected = "the page is at http://localhost:7860/, and open to the network at the addresses of this machine; Ctrl-C ends it"
    assert describe_address(address, host) == expected
    assert describe_address("http://127.0.0.1:7860/", "127.0.0.1") == "the page is at http://127.0.0.1:7860/; Ctrl-C ends it"


def test_everything_is_deleted_while_files_are_still_written():
    def write(folder: Path) -> None:
        with suppress(OSError):
            for i in range(100_000):
                (folder / str(i)).write_bytes(bytes(1000))

    with Sessions(1800) as pages:
        root = pages.kept.parent
        writers = [threading.Thread(target=write, args=[folder], daemon=True) for folder in (pages.kept, pages.uploads)]
        for writer in writers:
            writer.start()
        time.sleep(0.5)
    assert not list(root.parent.glob(f"{root.name}*"))
    for writer in writers:
        writer.join(10)
        assert not writer.is_alive()  # there is no folder to write to


def test_every_setting_is_in_the_table_of_the_docs_with_its_default_and_that_of_a_space():
    text = (Path(__file__).parents[1] / "docs/app.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `--")]
    stated = {name.strip("`-"): default for name, default, _, _ in rows}
    defaults = {field.name: field.default_factory() for field in fields(AppSettings) if field.default_factory is not MISSING}
    written = {name: "none" if value is None else str(value).lower().removesuffix(".0") for name, value in defaults.items()}
    assert stated == {"model": "required", **written}
    given = next(
        node
        for node in ast.walk(ast.parse(APP.format(model="m", examples="None", longest=LONGEST)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "AppSettings"
    ).keywords
    assert {name.strip("`-") for name, _, _, space in rows if space} == {keyword.arg for keyword in given} | {"index"}
    limits = {keyword.arg: keyword.value.value for keyword in given if isinstance(keyword.value, ast.Constant)} | {"max_seconds": LONGEST}
    limits.pop("examples")
    for name, _, _, space in rows:
        if (limit := limits.get(name.strip("`-"))) is not None:
            assert space == str(limit).lower().removesuffix(".0"), name
