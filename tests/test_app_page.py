"""The page to listen with, in a real browser without a screen: Chromium, driven by Playwright.

Skipped without Gradio, Playwright for Python or Chromium, which is taken from PATH (Debian's package `chromium`).
"""

import re
import shutil
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import SHARED, noise, speech_like


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
pytest.importorskip("gradio", reason="needs the extra app")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
from test_app import RATE, save_classifier, save_detector, table  # noqa: E402
from test_app_index import embed  # noqa: E402
from test_app_live import save_noise_detector  # noqa: E402

from transformers_sslam.app.index import SoundIndex  # noqa: E402
from transformers_sslam.app.listening import open_listener  # noqa: E402
from transformers_sslam.app.live import BLOCK, MOST  # noqa: E402
from transformers_sslam.app.page import Page  # noqa: E402
from transformers_sslam.app.server import find_examples, launch  # noqa: E402
from transformers_sslam.app.sessions import Sessions  # noqa: E402
from transformers_sslam.app.settings import AppSettings  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.recordings.detect import DetectSettings, detect_files  # noqa: E402


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
TEMPORARY = "GRADIO_TEMP_DIR"
PATIENCE = 120_000  # milliseconds: a machine may be busy
STILL = "*, ::before, ::after { transition: none !important; animation: none !important; }"  # as nobody knows how long they take then
FILE, LANES, ERROR = "#file input[type=file]", "#lanes .sslam-lane", ".sslam-error"
USABLE = {  # of ../shared/cases/audio, with their seconds; the others are damaged
    "aac.m4a": 10.0,
    "cbr_without_xing_id3.mp3": 20.0,
    "chained_opus.opus": 16.0,
    "chained_vorbis.ogg": 16.0,
    "joined.mp3": 16.1,
    "tone.mp3": 35.0,
    "vbr_without_xing.mp3": 20.0,
    "webm.webm": 10.0,
    "wma.wma": 10.0,
}
DAMAGED = ("cut.m4a", "damaged_page.ogg", "forged_length.flac", "header_says_2.5_GB.wav")


class Served:
    """A page that is served: its address, listener, and sessions."""

    def __init__(self, model: Path, sessions: Sessions, **settings):
        options = AppSettings(model=str(model), device="cpu", port=0, open_browser=False, **settings)
        self.listener, self.sessions = open_listener(options), sessions
        index = None if options.index is None else SoundIndex(options.index, self.listener)
        self.page = Page(self.listener, sessions, find_examples(options.examples), index)
        self.address = launch(self.page.blocks, options, sessions)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    soundfile.write(folder / "street.wav", noise(6.0) + speech_like(6.0), RATE)
    soundfile.write(folder / "park.flac", np.stack([speech_like(4.0, 44_100)] * 2, axis=1), 44_100)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory, recordings) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch, Sessions(3600) as sessions:
        patch.setenv(TEMPORARY, "")  # which a page sets, for its process
        model = save_detector(tmp_path_factory.mktemp("models") / "detector")
        server = Served(model, sessions, examples=str(recordings), max_seconds=60)
        yield server
        server.page.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def index(tmp_path_factory, recordings, served) -> Path:
    """Of the recordings, and of one that then moved."""
    folder = tmp_path_factory.mktemp("index") / "archive"
    shutil.copytree(recordings, folder)
    soundfile.write(folder / "gone.wav", noise(2.0, seed=7), RATE)
    output = embed(Path(served.listener.settings.model), folder)
    (folder / "gone.wav").unlink()
    return output


@pytest.fixture(scope="module")
def searched(served, index) -> Iterator[Served]:
    """A page of the same model, with an index."""
    with Sessions(3600) as sessions:
        with pytest.MonkeyPatch.context() as patch:  # undone after this page, because `served` stays for other tests
            patch.setenv(TEMPORARY, "")
            server = Served(Path(served.listener.settings.model), sessions, index=str(index))
        yield server
        server.page.blocks.close(verbose=False)


@pytest.fixture
def indexed(searched, monkeypatch) -> Served:
    """The page with an index, for a test: Gradio reads from the environment where uploads are, when it answers too."""
    monkeypatch.setenv(TEMPORARY, str(searched.sessions.uploads))
    return searched


@pytest.fixture(scope="module")
def driver():
    with playwright.sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def browser(driver):
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture
def visit(browser, served):
    """Opens pages, each as a visitor of its own."""
    contexts = []

    def opened(address: str = served.address, **options):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector(FILE, state="attached")
        page.add_style_tag(content=STILL)
        return page

    yield opened
    for context in contexts:
        context.close()


def give(page, file: Path, until: str = LANES) -> None:
    """Upload a file, and wait until it is shown."""
    page.set_input_files(FILE, str(file))
    page.wait_for_selector(f'#player h2:has-text("{file.name}")' if until == LANES else until)
    page.wait_for_selector(until)


DROP = """([selector, name, bytes]) => {
  const dataTransfer = new DataTransfer(), options = { dataTransfer, bubbles: true, cancelable: true };
  dataTransfer.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name));
  for (const type of ["dragenter", "dragover", "drop"]) document.querySelector(selector).dispatchEvent(new DragEvent(type, options));
}"""


def drop(page, file: Path, selector: str) -> None:
    page.evaluate(DROP, [selector, file.name, b64encode(file.read_bytes()).decode()])


def move(page, slider: str, value: float) -> None:
    """Type a slider's value, and wait until what is below follows; a mark of what sounds is not counted."""
    lanes = "document.querySelector('#lanes').innerHTML.replaceAll(' sslam-now', '')"
    before = page.evaluate(lanes)
    page.evaluate("window.drawn = false; document.addEventListener('sslam-drawn', () => { window.drawn = true; }, { once: true })")
    box = page.locator(f"#{slider} input[type=number]")
    box.fill(str(value))
    box.press("Enter")
    page.wait_for_function(f"before => window.drawn && {lanes} !== before", arg=before)


def settled(page, script: str, milliseconds: int) -> Any:
    """What a script gives, as soon as it gives the same again after some time: what is on its way to the page may arrive at any moment."""
    before, deadline = None, time.monotonic() + PATIENCE / 1000
    while (now := page.evaluate(script)) != before:
        assert time.monotonic() < deadline, now
        before = now
        page.wait_for_timeout(milliseconds)
    return now


def shown_events(page) -> list[tuple[str, float, float]]:
    """Labels, starts and ends in the table."""
    cells = "rows => rows.map(row => [row.querySelector('th').innerText, row.dataset.span, row.cells[1].innerText])"
    rows = page.locator("#table tbody tr[data-span]").evaluate_all(cells)  # all at once: they may be drawn anew
    return [(label, float(span.split()[0]), float(end)) for label, span, end in rows]


def wait_until_time(page, least: float) -> float:
    page.wait_for_function("least => document.querySelector('#sslam-sound').currentTime >= least", arg=least)
    return page.evaluate("document.querySelector('#sslam-sound').currentTime")


def test_events_are_shown_in_lanes_and_downloads_equal_the_commands(served, visit, recordings, tmp_path):
    page = visit()
    give(page, recordings / "street.wav")
    detect_files(
        DetectSettings(
            model=served.listener.settings.model,
            inputs=str(recordings / "street.wav"),
            output=str(tmp_path / "events.csv"),
            device="cpu",
            label_files="audacity",
        )
    )
    expected = table(tmp_path / "events.csv")
    assert shown_events(page) == [(row["label"], float(row["start"]), float(row["end"])) for row in expected]
    assert page.locator(".sslam-bar").count() == len(expected)
    for name, file in (("table (CSV)", None), ("Audacity labels", tmp_path / "events.audacity" / "street.wav.txt")):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        got = tmp_path / download.value.suggested_filename
        download.value.save_as(got)
        if file is None:
            assert got.name == "street.csv"
            assert table(got) == expected
        else:
            assert got.name == "street.labels.txt"
            assert got.read_bytes() == file.read_bytes()
    with page.expect_download() as download:
        page.get_by_role("button", name="Make embeddings").click()
        page.get_by_role("link", name="Embeddings (Parquet)").click()
    assert download.value.suggested_filename == "street.parquet"


def test_sliders_act_without_the_model_and_playing_goes_on(served, visit, recordings, monkeypatch):
    page = visit()
    give(page, recordings / "street.wav")
    before = shown_events(page)
    page.evaluate("() => { const sound = document.querySelector('#sslam-sound'); sound.loop = true; sound.play(); }")  # it is short
    monkeypatch.setattr(type(served.listener), "_score", None)
    move(page, "threshold", 0.9)
    fewer = shown_events(page)
    move(page, "median_filter", 0.96)
    smoother = shown_events(page)
    move(page, "median_filter", 0)
    move(page, "max_gap", 0.96)
    joined = shown_events(page)
    assert len(before) > len(fewer) > max(len(smoother), len(joined))
    assert not page.evaluate("document.querySelector('#sslam-sound').paused")
    move(page, "zoom", 2)
    page.get_by_role("button", name="Back to the model's own settings").click()
    page.wait_for_function("count => document.querySelectorAll('#table tbody tr[data-span]').length === count", arg=len(before))
    assert shown_events(page) == before
    shown = [page.input_value(f"#{name} input[type=number]") for name in ("threshold", "median_filter", "change_filter", "max_gap", "zoom")]
    assert shown == ["0.5", "0", "0", "0", "1"]
    move(page, "threshold", 1.5)  # more than there is: as 1
    assert (page.inner_text("#table h2"), page.locator(".toast-body").count()) == ("No events found", 0)


def test_a_click_on_an_event_plays_from_there_and_moves_the_cursor(visit, recordings):
    page = visit()
    give(page, recordings / "street.wav")
    start = shown_events(page)[-1][1]
    assert start > 1
    page.locator("#table button[data-start]").last.click()
    assert start <= wait_until_time(page, start) < start + 5
    place = page.locator(".sslam-cursor").first.bounding_box()["x"]
    strip = page.locator(".sslam-mel").bounding_box()
    assert place - strip["x"] >= strip["width"] * start / 6 - 3
    page.evaluate("document.querySelector('#sslam-sound').pause()")
    page.locator(".sslam-mel").click(position={"x": strip["width"] / 4, "y": 20})  # 6 s wide
    assert page.evaluate("document.querySelector('#sslam-sound').currentTime") == pytest.approx(1.5, abs=0.02)
    bar = page.locator(".sslam-bar").first
    bar.click()
    wait_until_time(page, float(bar.get_attribute("data-start")))
    assert page.evaluate("document.querySelector('#sslam-sound').paused") is False
    bar.click()  # while it sounds
    assert page.evaluate("document.querySelector('#sslam-sound').paused")


def test_the_player_stays_in_sight_and_its_keys_work_in_the_picture(visit, recordings):
    page = visit()
    page.set_viewport_size({"width": 1280, "height": 500})
    give(page, recordings / "street.wav")
    page.locator("#table button[data-start]").first.focus()
    page.mouse.wheel(0, 3000)
    page.wait_for_function("window.scrollY > 500")
    box = page.locator("#sslam-sound").bounding_box()
    assert 0 <= box["y"] < 100
    assert page.evaluate("([x, y]) => document.elementFromPoint(x, y).id", [box["x"] + 200, box["y"] + 20]) == "sslam-sound"
    page.locator(".sslam-scroll").focus()
    page.keyboard.press("ArrowRight")  # so that the keyboard is in use
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.evaluate("document.querySelector('#sslam-sound').currentTime") == 1
    for key, place in (("ArrowRight", 2), ("ArrowLeft", 1), ("End", 6), ("ArrowRight", 6), ("Home", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert page.evaluate("document.querySelector('#sslam-sound').currentTime") == pytest.approx(place, abs=0.01)
    scrolled = page.evaluate("window.scrollY")
    page.keyboard.press(" ")
    wait_until_time(page, 0.05)
    page.keyboard.press(" ")
    assert page.evaluate("document.querySelector('#sslam-sound').paused")
    assert page.evaluate("window.scrollY") == scrolled  # a space is not for scrolling here
    page.locator("#sslam-sound").focus()
    page.keyboard.press(" ")
    page.wait_for_function("!document.querySelector('#sslam-sound').paused")


def test_kinds_are_chosen_by_name(served, visit, recordings, tmp_path, monkeypatch):
    monkeypatch.setenv(TEMPORARY, "")
    monkeypatch.setattr("transformers_sslam.app.page.MANY", 3)
    with Sessions(3600) as sessions:
        server = Served(Path(served.listener.settings.model), sessions)
        page = visit(server.address)
        give(page, recordings / "street.wav")
        total = len(shown_events(page))
        page.locator("#only input").fill("se")
        page.get_by_role("option", name="sea").click()
        page.wait_for_selector("#table h2:has-text(' of ')")
        assert {label for label, _, _ in shown_events(page)} == {"sea"}
        assert page.inner_text("#table h2") == f"{len(shown_events(page))} of {total} events"
        assert [lane.get_attribute("data-label") for lane in page.locator(LANES).all()] == ["sea"]
        with page.expect_download() as download:
            page.get_by_role("link", name="Audacity labels").click()
        assert {line.split("\t")[2] for line in download.value.path().read_text().splitlines()} == {"sea"}
        server.page.blocks.close(verbose=False)


def test_zoom_widens_and_keeps_the_cursor_in_sight(visit, recordings):
    page = visit()
    give(page, recordings / "street.wav")
    move(page, "zoom", 10)
    view, strip = (page.locator(name).bounding_box()["width"] for name in (".sslam-scroll", ".sslam-strip"))
    assert strip == pytest.approx(10 * view, rel=1e-3)
    page.locator("#table button[data-start]").last.click()
    page.wait_for_function(
        "() => { const c = document.querySelector('.sslam-cursor').getBoundingClientRect().x, v = "
        "document.querySelector('.sslam-scroll').getBoundingClientRect(); "
        "return document.querySelector('#sslam-sound').currentTime > 1 && c >= v.left - 2 && c <= v.right + 2; }"
    )
    left = page.evaluate("document.querySelector('.sslam-scroll').scrollLeft")
    assert left > view
    page.evaluate("document.querySelector('#sslam-sound').pause()")
    left = page.evaluate("document.querySelector('.sslam-scroll').scrollLeft")
    move(page, "threshold", 0.4)
    page.wait_for_timeout(500)
    assert page.evaluate("document.querySelector('.sslam-scroll').scrollLeft") == pytest.approx(left, abs=2)


def test_everything_is_reached_by_keyboard(visit, recordings):
    page = visit()
    give(page, recordings / "street.wav")
    reached = []
    page.locator("#threshold input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#threshold input[type=number]').value === '0.51'")
    page.locator("#sslam-sound").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.className + ' ' + (document.activeElement.dataset.start ?? '')").strip())
        if page.evaluate("document.activeElement.dataset.start !== undefined"):
            break
    assert "sslam-scroll" in reached
    start = page.evaluate("Number(document.activeElement.dataset.start)")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # where one is can be seen
    page.keyboard.press("Enter")
    wait_until_time(page, start + 0.01)


def test_examples_are_named_below_their_folder(recordings, tmp_path):
    (tmp_path / "deep").mkdir()
    shutil.copy(recordings / "park.flac", tmp_path / "deep")
    assert find_examples(str(tmp_path)) == {"deep/park.flac": str(tmp_path / "deep" / "park.flac")}
    assert find_examples(str(recordings / "park.flac")) == {"park.flac": str(recordings / "park.flac")}
    assert find_examples(None) == {}
    (tmp_path / "empty").mkdir()
    for source in ("empty", "nowhere"):
        with pytest.raises(UserError, match=f"{source}', but a recording, or a folder with some, is expected$"):
            find_examples(str(tmp_path / source))


def test_the_keyboard_does_not_stop_in_a_list_of_examples_and_closes_it(visit):
    page = visit()
    page.add_style_tag(content="ul[role=listbox] { max-height: 20px !important; }")  # so that it scrolls, as that of many examples
    page.locator("#example input").focus()
    page.wait_for_selector("[role=option]")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") != "UL"
    page.wait_for_selector("[role=option]", state="detached")


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_an_example_is_shown_and_computed_once(served, visit, recordings, monkeypatch, by):
    listen, names = served.listener.listen, []
    monkeypatch.setattr(served.listener, "listen", lambda file, name, *others: names.append(name) or listen(file, name, *others))
    page = visit()
    if by == "mouse":
        page.locator("#example input").click()
        page.get_by_role("option", name="park.flac").click()
    else:
        page.locator("#example input").focus()
        page.wait_for_selector("[role=option]")
        page.keyboard.press("ArrowDown")  # the first one
        page.keyboard.press("Enter")
    page.wait_for_selector('#player h2:has-text("park.flac")')
    assert "0:04" in page.inner_text("#player h2")
    page.keyboard.press("Tab")
    page.locator("h1").click()
    page.wait_for_timeout(1000)
    assert names == ["park.flac"]
    give(page, recordings / "street.wav")
    assert page.input_value("#example input") == ""  # another recording is shown
    page.wait_for_timeout(1000)
    assert names == ["park.flac", "street.wav"]


@pytest.fixture
def slow(served) -> Iterator[list]:
    """Lets each layer of the model take some time; holds an item for each that has begun."""
    begun = []
    handles = [layer.register_forward_hook(lambda *_: begun.append(time.sleep(0.5))) for layer in served.listener.model.base_model.layers]
    yield begun
    for handle in handles:
        handle.remove()


LAYERS = 24  # that `long.wav` takes: two for each of 12 batches of windows


def test_a_computation_is_stopped(visit, recordings, tmp_path, slow):
    soundfile.write(tmp_path / "long.wav", noise(59.0), RATE)
    page = visit()
    page.set_input_files(FILE, str(tmp_path / "long.wav"))
    page.wait_for_selector("text=Computing long.wav")
    deadline = time.monotonic() + 60
    while not slow and time.monotonic() < deadline:
        time.sleep(0.05)
    page.get_by_role("button", name="Stop", exact=True).click()
    page.wait_for_selector("text=Stopped: nothing more is computed.")
    computed = len(slow)
    page.wait_for_timeout(2000)  # of four layers, of which the one that is computed ends
    assert 0 < len(slow) <= computed + 1 < LAYERS
    assert not page.get_by_role("button", name="Stop", exact=True).is_visible()
    assert "Stopped" in page.inner_text("#player")
    slow.clear()
    give(page, recordings / "street.wav")  # and the page is ready for the next one


def test_a_file_dropped_while_another_one_is_computed_replaces_it(served, visit, recordings, tmp_path, slow):
    soundfile.write(tmp_path / "long.wav", noise(59.0), RATE)
    page = visit()
    drop(page, tmp_path / "long.wav", "#file button")
    page.wait_for_selector("text=Computing long.wav")
    page.wait_for_timeout(500)
    drop(page, recordings / "park.flac", "h1")  # anywhere on the page
    page.wait_for_selector('#player h2:has-text("park.flac")')
    drop(page, recordings / "street.wav", "#file button")
    page.wait_for_selector('#player h2:has-text("street.wav")')
    assert page.inner_text("#player h2") == "street.wav 0:06"
    page.wait_for_timeout(1000)
    assert page.inner_text("#player h2") == "street.wav 0:06"
    assert page.locator(ERROR).count() == 0


def test_what_the_microphone_records_is_shown(visit):
    page = visit()
    page.locator("#microphone").get_by_role("button", name="Record").click()
    page.wait_for_timeout(2500)
    page.locator("#microphone").get_by_role("button", name="Stop").first.click()
    page.wait_for_selector(LANES)
    assert page.evaluate("Number(document.querySelector('#sslam-sound').dataset.duration)") > 1
    # Chromium's fake microphone beeps once a second.
    assert page.locator("#player h2").inner_text().startswith("audio")


def test_every_format_is_shown_and_plays(visit):
    files = [file for name in USABLE if (file := SHARED / "cases" / "audio" / name).is_file()]
    if not files:
        pytest.skip("needs ../shared, which is not part of the repository")
    page, folders = visit(), set()
    for file in files:
        give(page, file)
        page.wait_for_function(
            """() => {
              const sound = document.querySelector("#sslam-sound"), picture = document.querySelector(".sslam-mel img");
              const folder = (part) => part?.src && new URL(".", part.src).href; // that of the recording
              return sound && folder(sound) === folder(picture) && sound.readyState >= 1 && picture.complete;
            }"""
        )
        seconds = page.evaluate("document.querySelector('#sslam-sound').duration")
        assert (file.name, seconds) == (file.name, pytest.approx(USABLE[file.name], abs=0.1))
        assert (file.name, page.evaluate("document.querySelector('.sslam-mel img').naturalHeight")) == (file.name, 128)
        folders.add(page.evaluate("document.querySelector('#sslam-sound').src").rpartition("/")[0])
    assert len(folders) == len(files)  # each was that of its own file


def test_damaged_files_are_named(visit, tmp_path):
    (tmp_path / "notes.wav").write_text("no audio")
    files = [tmp_path / "notes.wav"]
    files += [file for name in DAMAGED if (file := SHARED / "cases" / "audio" / name).is_file()]
    page = visit()
    for file in files:
        give(page, file, until=f'{ERROR}:has-text("{file.name}")')
        assert page.locator(LANES).count() == 0
        assert page.locator("[role=alert]").count() == 1
        assert str(tmp_path) not in page.content()


def test_a_recording_above_the_limit_is_rejected(visit, tmp_path):
    soundfile.write(tmp_path / "long.wav", noise(61.0), RATE)
    page = visit()
    give(page, tmp_path / "long.wav", until=ERROR)
    assert "long.wav is longer than 1 min, the limit of this page: give a part of it" in page.inner_text(ERROR)


def test_nothing_is_said_of_a_former_file_when_the_next_one_is_not_taken(visit, recordings, tmp_path):
    """Gradio itself rejects files of other kinds, and says so."""
    (tmp_path / "notes.txt").write_text("no audio")
    (tmp_path / "notes.wav").write_text("no audio")
    page = visit()
    for former, until in ((tmp_path / "notes.wav", ERROR), (recordings / "park.flac", LANES), (tmp_path / "notes.wav", ERROR)):
        give(page, former, until)
        assert "Error)" not in page.inner_text("#player")  # the name of an exception
        page.set_input_files(FILE, str(tmp_path / "notes.txt"))
        page.wait_for_selector("text=Invalid file type: notes.txt")
        page.wait_for_selector(until, state="hidden")
        assert page.inner_text("#player").strip() == ""
    give(page, recordings / "park.flac")


def test_a_page_tells_that_the_model_failed_and_recovers(served, visit, recordings, monkeypatch):
    page = visit()
    with monkeypatch.context() as patch:
        patch.setattr(served.listener, "_score", None)
        give(page, recordings / "street.wav", until=f'{ERROR}:has-text("The server has too much to do, or failed: try again")')
        assert not page.locator("#stop").is_visible()
    give(page, recordings / "street.wav")


def test_a_page_recovers_from_an_error(visit, recordings, tmp_path):
    (tmp_path / "notes.wav").write_text("no audio")
    page = visit()
    give(page, tmp_path / "notes.wav", until=ERROR)
    give(page, recordings / "park.flac")
    assert page.locator(ERROR).count() == 0


def test_visitors_see_their_own_recordings_which_are_deleted_when_they_leave(served, visit, recordings):
    pages = [visit(), visit()]
    for page, name in zip(pages, ("street.wav", "park.flac")):
        page.set_input_files(FILE, str(recordings / name))
    for page, name in zip(pages, ("street.wav", "park.flac")):
        page.wait_for_selector(f'#player h2:has-text("{name}")')
    addresses = [page.evaluate("document.querySelector('#sslam-sound').src") for page in pages]
    folders = [served.sessions.kept / Path(address).parent.name for address in addresses]
    assert folders[0] != folders[1]
    for folder, seconds in zip(folders, (6, 4)):
        assert soundfile.info(folder / "sound.flac").frames == seconds * RATE
        assert not list(folder.glob("upload*"))  # used, and deleted
    move(pages[0], "threshold", 0.8)
    assert "street.wav" in pages[0].inner_text("#player h2")
    assert "park.flac" in pages[1].inner_text("#player h2")
    pages[0].context.close()
    deadline = time.monotonic() + 60
    while folders[0].exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not folders[0].exists()
    assert folders[1].exists()


def test_nothing_is_fetched_from_elsewhere_and_nothing_is_logged(served, visit, recordings, capfd):
    hosts, failed = set(), []
    page = visit()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.reload()
    page.wait_for_selector(FILE, state="attached")
    give(page, recordings / "street.wav")
    assert hosts <= {urlsplit(served.address).netloc, ""}  # "" for data in the page itself
    assert failed == []
    out, err = capfd.readouterr()
    assert "street" not in out + err


CONTRASTS = """() => {
  const numbers = (colour) => { const n = colour.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const over = (top, ground) => [0, 1, 2].map((i) => top[i] * top[3] + ground[i] * (1 - top[3]));
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
    const hidden = ["SCRIPT", "STYLE"].includes(element.tagName) || !element.getClientRects().length;
    if (!text || hidden || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.unshift(numbers(getComputedStyle(e).backgroundColor));
      if (layers[0][3] === 1) break;
    }
    const ground = layers.reduce((below, layer) => over(layer, below), [255, 255, 255]);
    const [a, b] = [light(over(numbers(getComputedStyle(element).color), ground)), light(ground)];
    found.push([text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""


def check_readable(page) -> set[str]:
    """The texts of a page, all of which can be read, on a telephone and on a wide screen."""
    shown = []
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        contrasts = settled(page, CONTRASTS, 200)
        assert len(contrasts) > 20
        assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []  # WCAG AA
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown.append({text for text, _ in contrasts})
    page.set_viewport_size({"width": 390, "height": 844})  # for what the test does next
    return shown[0] & shown[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_on_every_screen_in_light_and_dark(visit, recordings, scheme, tmp_path):
    page = visit(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_text("Model, data and limits").click()
    (tmp_path / "notes.wav").write_text("no audio")
    for file, until in ((tmp_path / "notes.wav", ERROR), (recordings / "street.wav", LANES)):
        give(page, file, until)
        check_readable(page)
    assert page.evaluate("document.querySelector('.dark') !== null") == (scheme == "dark")


def test_a_classifier_shows_segments(visit, recordings, tmp_path, monkeypatch):
    monkeypatch.setenv(TEMPORARY, "")
    with Sessions(3600) as sessions:
        server = Served(save_classifier(tmp_path / "classifier"), sessions, max_megabytes=1)
        page = visit(server.address)
        give(page, recordings / "street.wav")
        assert "Labels of a piece, at most" in page.inner_text("body")
        assert re.fullmatch(r"\d+ labels", page.inner_text("#table h2"))
        for word in ("event", "segment"):
            assert word not in page.inner_text("body")
        soundfile.write(tmp_path / "big.wav", noise(40.0), RATE)  # 1.28 MB
        page.set_input_files(FILE, str(tmp_path / "big.wav"))
        page.wait_for_selector("text=/maximum|too large|exceeds/i")
        drop(page, recordings / "park.flac", "#file")  # where Gradio says that there was an error
        page.wait_for_selector('#player h2:has-text("park.flac")')
        assert page.inner_text("#file").count("Error") == 0
        server.page.blocks.close(verbose=False)


# --- sounds like this


def choice(page) -> tuple[float, float]:
    """The numbers, and the same as marked in the picture."""
    numbers = tuple(float(page.input_value(f"#{name} input")) for name in ("from", "to"))
    strip, marked = (page.locator(name).bounding_box() for name in (".sslam-strip", ".sslam-choice"))
    scale = page.evaluate("Number(document.querySelector('#sslam-sound').dataset.duration)") / strip["width"]
    assert (marked["x"] - strip["x"]) * scale == pytest.approx(numbers[0], abs=3 * scale)
    assert (marked["x"] + marked["width"] - strip["x"]) * scale == pytest.approx(numbers[1], abs=5 * scale)  # with its borders
    return numbers


def find(page) -> list[tuple[str, str, str, float]]:
    """Start, end, recording and similarity of what was found."""
    before = page.inner_html("#matches")
    page.get_by_role("button", name="Find similar").click()
    page.wait_for_function("before => document.querySelector('#matches').innerHTML !== before", arg=before)
    page.wait_for_selector("#matches tbody tr")
    rows = [row.locator("td, th").all_inner_texts() for row in page.locator("#matches tbody tr").all()]
    return [(start.strip("\u25b6 "), end, name, float(similarity)) for start, end, name, similarity in rows]


def test_a_dragged_span_is_found_where_it_is_and_plays(indexed, visit, recordings):
    page = visit(indexed.address)
    give(page, recordings / "street.wav")
    page.wait_for_function("document.querySelector('#to input').value === '0.64'")  # a window
    assert choice(page) == (0, 0.64)
    strip = page.locator(".sslam-mel").bounding_box()
    places = [strip["x"] + strip["width"] * seconds / 6 for seconds in (1.92, 2.2, 2.575)]
    page.mouse.move(places[0], strip["y"] + 20)
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(place, strip["y"] + 40, steps=3)
    page.mouse.up()
    assert choice(page) == (pytest.approx(1.92, abs=0.01), pytest.approx(2.575, abs=0.01))
    assert page.evaluate("document.querySelector('#sslam-sound').currentTime") == 0  # a drag is not a click
    start, end, name, similarity = find(page)[0]
    assert (start, end, name) == ("1.92", "2.58", "street.wav")
    assert similarity > 0.99
    page.locator("#matches button").first.click()
    page.wait_for_function("document.querySelector('#sslam-match')?.currentTime > 0")
    assert page.evaluate("document.querySelector('#sslam-match').duration") == pytest.approx(0.655, abs=0.01)
    assert page.inner_text("#match h2") == "street.wav, 1.92 to 2.58 s"


def test_a_clicked_event_and_typed_seconds_are_chosen(indexed, visit, recordings):
    page = visit(indexed.address)
    give(page, recordings / "street.wav")
    _, start, end = shown_events(page)[-1]
    page.locator("#table button[data-start]").last.click()
    assert choice(page) == (start, end)
    page.fill("#from input", "0.32")
    page.fill("#to input", "0.97")
    assert choice(page) == (0.32, 0.97)
    assert find(page)[0][:3] == ("0.32", "0.97", "street.wav")
    page.fill("#to input", "0.1")
    page.get_by_role("button", name="Find similar").click()
    page.wait_for_selector("#matches .sslam-error")
    assert "from 0.32 to 0.1 s is not a span of this recording of 6.00 s" in page.inner_text("#matches")
    page.fill("#to input", "")
    page.get_by_role("button", name="Find similar").click()
    page.wait_for_selector("#matches .sslam-error:has-text('Choose a span')")


def test_a_recording_that_moved_is_told_and_nothing_else_is_served(indexed, visit, tmp_path):
    soundfile.write(tmp_path / "gone.wav", noise(2.0, seed=7), RATE)
    page = visit(indexed.address)
    give(page, tmp_path / "gone.wav")
    page.fill("#from input", "0")
    page.fill("#to input", "0.65")
    assert find(page)[0][:3] == ("0.00\nmoved or changed", "0.66", "gone.wav")
    page.locator("#matches button").first.click()
    page.wait_for_selector("#sslam-match")
    address = page.evaluate("document.querySelector('#sslam-match').src")
    assert page.request.get(address).ok
    file = Path(indexed.listener.settings.index).parent / "archive" / "street.wav"
    assert file.is_file()
    folder = address.rsplit("/", 1)[0]
    for other in (f"{indexed.address}gradio_api/file={file}", f"{folder}/../../../..{file}", f"{folder}/..%2f..%2f..%2f..{file}"):
        assert page.request.get(other).status in (403, 404)


def test_a_page_without_an_index_does_not_offer_to_search(visit, recordings):
    page = visit()
    give(page, recordings / "street.wav")
    page.locator("#table button[data-start]").last.click()
    assert page.get_by_role("button", name="Find similar").count() == 0
    assert not page.locator(".sslam-choice").is_visible()


# --- live


@pytest.fixture
def microphone(driver, tmp_path) -> Iterator:
    """Opens a page whose microphone plays a second of noise in 5 s of silence, again and again."""
    burst = np.concatenate((np.zeros(96_000), noise(1.0, 1, 48_000), np.zeros(144_000)))
    soundfile.write(tmp_path / "burst.wav", burst, 48_000)
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={tmp_path / 'burst.wav'}"]
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)

    def opened(address: str):
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.get_by_text("Listen live with the microphone").click()
        return page

    yield opened
    browser.close()


LISTENED = "['.sslam-live-time', '.sslam-live-events'].map((name) => document.querySelector(name).innerText)"


def test_events_of_a_microphone_appear_while_it_listens_with_their_delay(microphone, tmp_path, monkeypatch):
    monkeypatch.setenv(TEMPORARY, "")
    with Sessions(3600) as sessions:
        server = Served(save_noise_detector(tmp_path / "model"), sessions, live_window=0.64, live_hop=0.16)
        page = microphone(server.address)
        page.get_by_role("button", name="Start listening").click()
        # One second long, to two steps. On a busy machine Chromium's device stretches some of them.
        found = page.wait_for_function(
            """() => [...document.querySelectorAll(".sslam-live-events tbody tr")]
              .map((row) => [...row.querySelectorAll("td, th")].map((cell) => cell.innerText))
              .find(([start, end]) => Math.abs(end - start - 1) < 0.33)"""
        )
        assert page.get_by_role("button", name="Stop", exact=True).is_visible()  # while it listens
        label, score, delay = found.json_value()[2:]
        assert label == "dog"
        assert float(score) > 0.5
        assert page.inner_text(".sslam-live-latest").startswith("Latest: dog, from ")
        stated, windows, block, measured = map(float, re.findall(r"(\d+\.\d+) s", page.inner_text(".sslam-live-delay")))
        assert windows == pytest.approx(server.listener.live_delay(), abs=0.0051)
        assert block == 0.16
        assert stated == pytest.approx(windows + block + measured, abs=0.06)
        assert 0 < float(delay) < server.listener.live_delay() + BLOCK + MOST  # a browser that lags behind by more ends
        assert page.locator('.sslam-live .sslam-lane[data-label="dog"] .sslam-bar').count() >= 1
        other = microphone(server.address)
        other.get_by_role("button", name="Start listening").click()
        other.wait_for_selector("text=1 at a time can listen live, the limit of this page: try again in a while")
        page.get_by_role("button", name="Stop", exact=True).click()
        page.wait_for_selector(".sslam-live-state:has-text('Stopped.')")
        last = settled(page, LISTENED, 1000)  # while it listens, a second is counted
        page.wait_for_timeout(1500)
        assert page.evaluate(LISTENED) == last
        other.get_by_role("button", name="Start listening").click()  # there is room again
        other.wait_for_selector(".sslam-live-state:has-text('Listening.')")
        assert not list(sessions.uploads.rglob("*"))  # no sound is kept
        server.page.blocks.close(verbose=False)


def test_a_microphone_without_sound_is_told_and_when_sound_comes_again(microphone, tmp_path, monkeypatch):
    """It plays noise for 1 s in every 6; then its blocks stop, as of one that is unplugged."""
    monkeypatch.setenv(TEMPORARY, "")
    with Sessions(3600) as sessions:
        server = Served(save_noise_detector(tmp_path / "model"), sessions, live_window=0.64, live_hop=0.16)
        page = microphone(server.address)
        page.evaluate(
            "() => { const get = AudioContext.prototype.createMediaStreamSource; AudioContext.prototype.createMediaStreamSource ="
            " function (...given) { window.context = this; return get.apply(this, given); }; }"
        )
        page.get_by_role("button", name="Start listening").click()
        for _ in range(2):
            page.wait_for_selector(".sslam-live-state:has-text('The microphone sends silence only: it may be muted')")
            page.wait_for_selector(".sslam-live-state:has-text('Sound arrives again. Listening.')")
        assert page.locator(".sslam-live-events tbody tr").count() >= 1
        page.evaluate("() => window.context.suspend()")
        page.wait_for_selector(".sslam-live-state:has-text('The microphone sends nothing: check that it is connected')")
        page.evaluate("() => window.context.resume()")
        page.wait_for_selector(".sslam-live-state:has-text('Sound arrives again. Listening.')")
        page.get_by_role("button", name="Stop", exact=True).click()
        page.wait_for_selector(".sslam-live-state:has-text('Stopped.')")
        page.wait_for_timeout(4000)
        assert page.inner_text(".sslam-live-state") == "Stopped."  # nothing is watched any more
        server.page.blocks.close(verbose=False)


def test_why_there_is_no_microphone_is_told(visit):
    page = visit()
    page.evaluate("() => { navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotAllowedError'); }; }")
    page.locator("#microphone").get_by_role("button", name="Record").click()
    page.wait_for_selector("text=The browser does not give the microphone: allow it for this page, and press Record again.")
    page.get_by_text("Listen live with the microphone").click()
    page.get_by_role("button", name="Start listening").click()
    page.wait_for_selector("text=The browser does not give the microphone: allow it for this page.")
    assert page.get_by_role("button", name="Start listening").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_search_and_live_mode_are_readable_on_every_screen(indexed, visit, recordings, scheme):
    page = visit(indexed.address, color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    give(page, recordings / "street.wav")
    find(page)
    page.locator("#matches button").first.click()
    page.wait_for_selector("#sslam-match")
    page.get_by_text("Listen live with the microphone").click()
    page.get_by_role("button", name="Start listening").click()
    page.wait_for_selector(".sslam-live-events tbody tr")
    # The last answer: it has come when there is room for the next one who listens, too.
    with page.expect_response(lambda response: '"live_stop"' in (response.request.post_data or "")):
        page.get_by_role("button", name="Stop", exact=True).click()
    assert {"Most like 0.00 to 0.64 s", "Stopped.", "not known yet"} <= check_readable(page)


@pytest.mark.slow
def test_twenty_uploads_at_once_are_all_answered_and_none_is_mixed_up(visit, tmp_path):
    pages = [visit() for _ in range(20)]
    for i in range(20):
        soundfile.write(tmp_path / f"{i}.wav", noise(2 + 0.25 * i, seed=i), RATE)
    for i, page in enumerate(pages):
        page.set_input_files(FILE, str(tmp_path / f"{i}.wav"))
    for i, page in enumerate(pages):
        page.wait_for_selector(f'#player h2:has-text("{i}.wav")')
        assert page.evaluate("Number(document.querySelector('#sslam-sound').dataset.duration)") == 2 + 0.25 * i
        assert page.locator(LANES).count() > 0
