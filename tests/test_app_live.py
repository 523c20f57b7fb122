"""The page's live mode, without a browser: what is known of a source, when, and its limits. With a microphone: `test_app_page`."""

import re
import threading
import time
from base64 import b64encode

import numpy as np
import pytest
import torch
from conftest import noise


pytest.importorskip("torchaudio")
pytest.importorskip("PIL.Image", reason="needs Pillow, which comes with the extra app")
from test_app import CLASSES, RATE, save_classifier, save_detector, sound

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioFrameClassification
from transformers_sslam.app import live, live_page
from transformers_sslam.app.listening import RECENT, open_listener
from transformers_sslam.app.live import BLOCK, LiveSession, LiveSessions, LiveState
from transformers_sslam.app.settings import AppSettings
from transformers_sslam.errors import UserError
from transformers_sslam.events_sslam import Event
from transformers_sslam.recordings.formats import rounded


SAMPLES = round(BLOCK * RATE)


def save_noise_detector(folder):
    """Its first class is noise in silence, known by the mean of the steps of each; the others never are."""
    detector, extractor = SSLAMForAudioFrameClassification.from_pretrained(save_detector(folder)), SSLAMFeatureExtractor(max_length=64)
    head, burst = detector.frame_classifier, np.concatenate((np.zeros(RATE, np.float32), noise(1.0), np.zeros(RATE, np.float32)))
    (steps,) = detector.base_model.encode([burst], extractor, per="step")
    loud, silent = steps.vectors[7:12].mean(0), torch.cat((steps.vectors[:5], steps.vectors[14:])).mean(0)
    towards = 8 * (loud - silent) / (loud - silent).square().sum()
    head.weight.data, head.bias.data = torch.zeros_like(head.weight), torch.full_like(head.bias, -20.0)
    head.weight.data[0], head.bias.data[0] = towards, -towards @ (loud + silent) / 2
    detector.save_pretrained(folder)
    return folder


@pytest.fixture
def detector(tmp_path):
    return open_listener(AppSettings(model=str(save_detector(tmp_path / "detector")), device="cpu"))


def encoded(samples: np.ndarray) -> str:
    return b64encode((samples * 2**15).clip(-(2**15), 2**15 - 1).astype("<i2").tobytes()).decode()


def blocks(waveform: np.ndarray, length: int = SAMPLES) -> list[np.ndarray]:
    return [waveform[start : start + length] for start in range(0, len(waveform), length)]


def receive_all(session: LiveSession, waveform: np.ndarray) -> list[LiveState]:
    return [*(session.receive(block) for block in blocks(waveform)), session.stop()]


@pytest.mark.parametrize("own", [None, {"median_filter": 0.48, "max_gap": 0.32}, {"change_filter": 2.0}])
def test_events_are_those_of_a_recording_and_as_late_as_is_stated(tmp_path, own):
    model = save_detector(tmp_path / "model", event_detection=own)
    listener = open_listener(AppSettings(model=str(model), device="cpu", live_window=0.64, live_hop=0.16))
    live = {"window": 0.64, "hop": 0.16, "change_filter": 0.0}  # which would wait for minutes
    assert listener.live_delay() == listener.model.detection_delay(listener.extractor, **live)
    states = receive_all(LiveSession(listener), sound())
    found = sorted({event for state in states for event, _ in state.events})
    expected = listener.model.detect(sound(), listener.extractor, **live)
    assert len(found) > 5
    assert found == sorted(map(rounded, expected))
    late = {event: delay for state in states[:-1] for event, delay in state.events}
    slowest = max(state.computing for state in states)
    assert len(late) > 3
    assert all(0 < delay <= listener.live_delay() + BLOCK + slowest + 1e-3 for delay in late.values())  # times are in milliseconds
    for before in states[:-1]:  # and not known before it was received
        assert all(event.end <= before.seconds for event, _ in before.events)


def test_a_classifier_has_segments_of_its_windows(tmp_path):
    model = save_classifier(tmp_path / "model")
    listener = open_listener(AppSettings(model=str(model), device="cpu", live_window=0.64, live_hop=0.32))
    assert listener.live_delay() == pytest.approx(0.32, abs=1e-4)
    states = receive_all(LiveSession(listener), sound())
    whole = listener.model.score_over_time(sound(), listener.extractor, window=0.64, hop=0.32)
    (tmp_path / "kept").mkdir()
    recording = type("Scored", (), {"starts": whole.starts, "ends": whole.starts + whole.window, "scores": whole.scores})
    assert sorted(event for event, _ in states[-1].events) == sorted(listener.find(recording, [s.value for s in listener.sliders]).events)
    assert states[3].events == []  # less than a window
    assert states[4].events != []


def test_what_was_heard_long_ago_is_forgotten(detector, monkeypatch):
    monkeypatch.setattr("transformers_sslam.app.listening.RECENT", 2.0)
    monkeypatch.setattr(live, "RECENT", 2.0)
    session = LiveSession(detector)
    for block in blocks(np.tile(sound(), 5)):
        state = session.receive(block)
        assert all(event.end > state.seconds - 2.0 for event, _ in state.events)
        assert len(session._found) < 60  # of 30 s there are more
    session.stop()


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_detector, save_classifier])
def test_memory_does_not_grow_with_time(tmp_path, save):
    psutil = pytest.importorskip("psutil")
    listener = open_listener(AppSettings(model=str(save(tmp_path / "model")), device="cpu"))
    session, second = LiveSession(listener), noise(1.0)

    def resident_after(minutes: int) -> int:
        for _ in range(60 * minutes):
            session.receive(second)
        return psutil.Process().memory_info().rss

    before = resident_after(2)
    assert resident_after(30) - before < 20 * 2**20  # the samples would take 115 MB
    session.stop()


def test_the_machine_that_computes_is_given_what_was_recorded_meanwhile(detector):
    """Blocks of any lengths give the same."""
    expected = receive_all(LiveSession(detector), sound())[-1].events
    session = LiveSession(detector)
    for block in blocks(sound(), 5 * SAMPLES):
        session.receive(block)
    assert [event for event, _ in session.stop().events] == [event for event, _ in expected]


# --- limits


def test_more_microphones_than_allowed_are_rejected_until_one_stops(detector):
    sessions = LiveSessions(detector)
    name = sessions.start()
    with pytest.raises(UserError, match=r"^1 at a time can listen live, the limit of this page: try again in a while$"):
        sessions.start()
    sessions.stop(name)
    other = sessions.start()
    assert other != name
    assert len(other) > 30  # cannot be guessed
    with pytest.raises(UserError, match="^listening has ended: start it again$"):
        sessions.receive(name, encoded(noise(0.16)))
    assert sessions.receive(other, encoded(noise(0.16))).seconds == 0.16
    assert sessions.stop(name) is None


def test_a_microphone_that_falls_silent_leaves_its_place(detector, monkeypatch):
    sessions = LiveSessions(detector)
    name = sessions.start()
    sessions.receive(name, encoded(noise(1.0)))
    monkeypatch.setattr(live, "SILENT", 0.2)  # not before the first block, which a busy machine may need longer for
    sessions.receive(name, "")  # from here on it waits that long
    threads = threading.active_count()
    deadline = time.monotonic() + 30
    while sessions._sessions[name].is_on and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(UserError, match="^nothing was received for a while, so listening has ended: start it again$"):
        sessions.receive(name, encoded(noise(0.16)))
    sessions.start()
    assert threading.active_count() <= threads + 1


def test_listening_ends_at_the_limit_of_the_page(tmp_path):
    settings = {"model": str(save_detector(tmp_path / "model")), "device": "cpu", "max_seconds": 30.0}
    sessions = LiveSessions(open_listener(AppSettings(**settings)))
    name = sessions.start()
    for seconds in (9.5, 19.0, 28.5, 29.9):  # in less time than that by the clock, on a busy machine too
        block = noise(9.5 if seconds < 29 else 1.4)
        assert sessions.receive(name, encoded(block)).seconds == seconds
    with pytest.raises(UserError, match=r"^30.0 s are over, the limit of this page: start again$"):
        sessions.receive(name, encoded(noise(0.2)))
    name = sessions.start()  # there is room again; and nobody stays by sending little
    sessions._sessions[name].started -= 30.0
    with pytest.raises(UserError, match="are over"):
        sessions.receive(name, "")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("not base 64!", "a block of sound arrived damaged: start again"),
        ("QQ==", "a block of sound arrived damaged: start again"),  # half a sample
        (encoded(np.zeros(11 * RATE)), "more than 10 s of sound arrived at once: start again"),
    ],
)
def test_blocks_that_are_none_are_rejected(detector, block, message):
    sessions = LiveSessions(detector)
    name = sessions.start()
    with pytest.raises(UserError, match=f"^{message}$"):
        sessions.receive(name, block)
    assert sessions.receive(name, encoded(noise(0.16))).seconds == 0.16  # it is still on


def test_a_model_that_fails_is_told_and_ends_the_session(detector, monkeypatch):
    def broken(*arguments, **options):
        raise FloatingPointError("what the model gives is not finite")

    session = LiveSession(detector)
    monkeypatch.setattr(detector.model, "forward", broken)
    for _ in range(2):  # also the next time
        with pytest.raises(UserError, match="^what the model gives is not finite$"):
            session.receive(noise(2.0))
    assert not session.is_on
    session.stop()


def test_stopping_at_once_is_no_error(detector):
    state = LiveSession(detector).stop()
    assert (state.seconds, state.events) == (0.0, [])


@pytest.mark.parametrize(
    ("settings", "named"), [({"live_hop": 0.1}, "hop is 0.1 s"), ({"live_window": 99.2}, "a window of 99.2 s gives 9920")]
)
def test_windows_that_do_not_fit_the_model_are_rejected_at_the_start(tmp_path, settings, named):
    model = str(save_detector(tmp_path / "model"))
    with pytest.raises(UserError, match=rf"^the live mode \(live_window, live_hop; live_at_once 0 for none\): {named}"):
        open_listener(AppSettings(model=model, device="cpu", **settings))
    open_listener(AppSettings(model=model, device="cpu", live_at_once=0, **settings))


@pytest.mark.parametrize(("settings", "named"), [({"hop": 0.1}, "hop is 0.1 s"), ({"window": 99.2}, "a window of 99.2 s gives 9920")])
def test_windows_of_recordings_that_do_not_fit_the_model_are_rejected_at_the_start(tmp_path, settings, named):
    with pytest.raises(UserError, match=f"^window or hop: {named}"):
        open_listener(AppSettings(model=str(save_detector(tmp_path / "model")), device="cpu", live_at_once=0, **settings))


def test_a_negative_number_of_microphones_is_rejected():
    with pytest.raises(UserError, match="^live_at_once is -1, but must not be negative$"):
        AppSettings(model="m", live_at_once=-1)


# --- what is drawn


def test_events_move_away_from_now_and_delays_are_written(detector):
    events = [(Event(30.0, 33.0, "dog", 0.8), 1.5), (Event(36.0, 39.0, CLASSES[1], 0.7), 2.25)]
    drawn = live_page.draw_state(detector, LiveState(45.0, 0.5, events, 0.01))
    assert re.findall(r'sslam-bar" style="left:([\d.]+)%;width:([\d.]+)%', drawn) == [("70.00", "10.00"), ("50.00", "10.00")]
    assert re.findall(r'data-label="([^"]+)"', drawn) == ["&lt;b&gt;rain&lt;/b&gt;", "dog"]
    assert re.findall(r"<tr><td>([\d.]+)</td><td>([\d.]+)</td>.*?([\d.]+)</td></tr>", drawn) == [
        ("36.00", "39.00", "2.25"),
        ("30.00", "33.00", "1.50"),
    ]
    (unknown,) = set(re.findall(r'sslam-unknown" style="width:([\d.]+)%', drawn))
    assert float(unknown) == pytest.approx(100 * (detector.live_delay() + BLOCK) / RECENT, abs=0.01)
    assert "<b>" not in drawn
    assert live_page.name_latest(LiveState(45.0, 0.5, events, 0.01)) == "Latest: <b>rain</b>, from 36.0 s"  # shown as text
    assert live_page.draw_state(detector, LiveState(45.0, 0.5, [], 0.01)) == "<p>No events in the last 30 s.</p>"


def test_what_browsers_call_answers_with_words(detector):
    start, receive, stop = live_page.live_functions(detector)
    name = start(None)["name"]
    assert start(None) == {"error": "1 at a time can listen live, the limit of this page: try again in a while"}
    state = receive([name, encoded(noise(0.16))])
    assert (state["seconds"], state["latest"], state["html"]) == (0.16, "", "<p>No events in the last 30 s.</p>")
    assert state["level"] == pytest.approx(np.abs(noise(0.16)).max(), abs=1e-3)
    assert receive([name, "!"]) == {"error": "a block of sound arrived damaged: start again"}
    assert stop(name)["seconds"] == 0.16
    assert stop(name) == {}
    assert receive([name, ""]) == {"error": "listening has ended: start it again"}


def test_a_known_sound_is_found_where_it_is(tmp_path):
    listener = open_listener(AppSettings(model=str(save_noise_detector(tmp_path / "model")), device="cpu"))
    silence = np.zeros(2 * RATE, np.float32)
    (event,) = receive_all(LiveSession(listener), np.concatenate((silence, noise(1.0, seed=5), silence)))[-1].events
    assert event[0].label == "dog"
    assert (event[0].start, event[0].end) == (pytest.approx(2, abs=0.17), pytest.approx(3, abs=0.17))
