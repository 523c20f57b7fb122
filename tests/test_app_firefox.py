"""The page in a real Firefox without a screen, driven by its own protocol, Marionette: length-prefixed JSON over TCP.

Skipped without Gradio or Firefox, which is taken from PATH (Debian's package `firefox-esr`).
"""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import noise, speech_like


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
pytest.importorskip("gradio", reason="needs the extra app")
from test_app import RATE, save_detector  # noqa: E402

from transformers_sslam.app.listening import open_listener  # noqa: E402
from transformers_sslam.app.page import Page  # noqa: E402
from transformers_sslam.app.server import launch  # noqa: E402
from transformers_sslam.app.sessions import Sessions  # noqa: E402
from transformers_sslam.app.settings import AppSettings  # noqa: E402
from transformers_sslam.audio.decode import read_blocks  # noqa: E402


FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
pytestmark = pytest.mark.skipif(FIREFOX is None, reason="needs Firefox: apt-get install firefox-esr")

PATIENCE = 60.0  # seconds: a machine may be busy
PREFERENCES = {  # nothing of other addresses, and errors of scripts on the standard output
    "browser.aboutwelcome.enabled": False,
    "browser.dom.window.dump.enabled": True,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "toolkit.telemetry.reportingpolicy.firstRun": False,
}
SAID = "firefox.log"
EVENTS = "return [...document.querySelectorAll('#lanes .sslam-bar')].map(bar => bar.getAttribute('style'))"
# What scripts report as errors. Those that they do not catch are on the standard output, from the start on.
WATCH = "window.errors = []; console.error = (...words) => errors.push(words.map(String).join(' '));"
MOVE = """const range = document.querySelector('#sliders input[type=range]'); range.value = arguments[0];
range.dispatchEvent(new Event('input', { bubbles: true })); range.dispatchEvent(new Event('change', { bubbles: true }));"""


class Marionette:
    """A session with a Firefox that was started with `--marionette`."""

    def __init__(self, port: int):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._stream = socket.create_connection(("127.0.0.1", port), PATIENCE).makefile("rwb")
                break
            except OSError:
                assert time.monotonic() < deadline, "Firefox does not answer"
                time.sleep(0.1)
        self._count = 0
        self._read()  # which protocol it speaks
        self("WebDriver:NewSession")

    def __call__(self, command: str, **values: Any) -> Any:
        """Run a command; its result."""
        self._count += 1
        message = json.dumps([0, self._count, command, values]).encode()
        self._stream.write(b"%d:%s" % (len(message), message))
        self._stream.flush()
        _, _, error, result = self._read()
        assert error is None, error
        return result["value"] if isinstance(result, dict) and result.keys() == {"value"} else result

    def run(self, script: str, *arguments: Any) -> Any:
        """The result of a script in the page."""
        return self("WebDriver:ExecuteScript", script=script, args=arguments, sandbox=None)

    def wait(self, script: str, until: Any = bool) -> Any:
        """The result as soon as `until` is true of it."""
        deadline = time.monotonic() + PATIENCE
        while not until(result := self.run(script)):
            assert time.monotonic() < deadline, (script, result)
            time.sleep(0.05)
        return result

    def give(self, selector: str, text: str) -> None:
        """Type into a field, or name a file to it."""
        element = self("WebDriver:FindElement", using="css selector", value=selector)
        self("WebDriver:ElementSendKeys", id=next(iter(element.values())), text=text)

    def _read(self) -> Any:
        length = b""
        while (byte := self._stream.read(1)) != b":":
            assert byte, "Firefox has ended"
            length += byte
        return json.loads(self._stream.read(int(length)))


@pytest.fixture
def firefox(tmp_path) -> Iterator[Marionette]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    profile = tmp_path / "profile"
    profile.mkdir()
    lines = (f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in (PREFERENCES | {"marionette.port": port}).items())
    (profile / "user.js").write_text("\n".join(lines))
    command = [str(FIREFOX), "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
    with (tmp_path / SAID).open("w") as said, subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT) as process:
        try:
            yield Marionette(port)
        finally:
            process.terminate()


def test_a_file_is_shown_and_its_events_follow_the_threshold(firefox, tmp_path, monkeypatch):
    def uncaught() -> list[str]:
        return [line for line in (tmp_path / SAID).read_text().splitlines() if line.startswith("JavaScript error: http")]

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which a page sets, for its process
    settings = AppSettings(model=str(save_detector(tmp_path / "model")), device="cpu", port=0, open_browser=False)
    file: Path = tmp_path / "street.wav"
    soundfile.write(file, noise(6.0) + speech_like(6.0), RATE)
    with Sessions(3600) as sessions:
        listener = open_listener(settings)
        page = Page(listener, sessions, {}).blocks
        firefox("WebDriver:Navigate", url=launch(page, settings, sessions))
        firefox.wait("return document.querySelector('#file input[type=file]') !== null")
        firefox.run(WATCH)
        firefox.give("#file input[type=file]", str(file))
        bars = firefox.wait(EVENTS)
        expected = listener.model.detect(read_blocks(file), listener.extractor)
        assert len(bars) == len(expected) > 3
        assert firefox.run("return document.querySelectorAll('#table tbody tr').length") == len(expected)
        assert "street.wav" in firefox.run("return document.querySelector('#player').innerText")
        firefox.wait("return document.querySelector('#player audio').duration", lambda seconds: seconds is not None)
        assert firefox.run("return document.querySelector('#player audio').duration") == pytest.approx(6.0, abs=0.01)
        level = listener.sliders[0].value
        firefox.run(MOVE, str(level + 0.1))
        fewer = firefox.wait(EVENTS, lambda found: found != bars)
        firefox.run(MOVE, str(level))
        assert firefox.wait(EVENTS, lambda found: found != fewer) == bars
        assert firefox.run("return errors") == []
        assert uncaught() == []
        firefox.run("console.error('told'); setTimeout(() => undefined_name())")
        assert firefox.run("return errors") == ["told"]  # so errors are seen
        while "undefined_name is not defined" not in "".join(uncaught()):
            time.sleep(0.05)
        page.close(verbose=False)
