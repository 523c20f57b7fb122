"""Events of recordings: what is written of each, in every format, what needs no model, and what is rejected."""

import csv
import importlib.util
import json
import pickle
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, speech_like, tiny_config
from processes import Fork

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioFrameClassification
from transformers_sslam.detection_sslam import StepScores
from transformers_sslam.events_sslam import Event, EventSettings, find_events


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
import pyarrow.parquet as pq  # noqa: E402

from transformers_sslam.audio.decode import load_waveform  # noqa: E402
from transformers_sslam.audio.labels import Event as KnownEvent  # noqa: E402
from transformers_sslam.batching_sslam import compute_batches  # noqa: E402
from transformers_sslam.cli import main  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.evaluation.loading import load_model  # noqa: E402
from transformers_sslam.recordings import detect, inputs, parts, plot  # noqa: E402
from transformers_sslam.recordings.detect import DetectSettings, cut_at, detect_files  # noqa: E402
from transformers_sslam.recordings.inputs import current_state, find_recordings  # noqa: E402
from transformers_sslam.recordings.processing import compute_here  # noqa: E402
from transformers_sslam.recordings.ray_engine import _Compute, _Prepare  # noqa: E402
from transformers_sslam.tasks_sslam import Detection  # noqa: E402


RATE, STEP = 16_000, 0.08
CLASSES = ["dog, big", "rain", "sea"]
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


@pytest.fixture
def model(tmp_path) -> Path:
    """Untrained, with logits of mean 0 and standard deviation 2 over the first recording: so there are events at 0.5."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    detector = SSLAMForAudioFrameClassification(tiny_config(**names, initializer_range=0.3, steps_per_second=12.5))
    extractor, head = SSLAMFeatureExtractor(max_length=64), detector.frame_classifier
    scores = detector.score_steps(noise(2.0) + speech_like(2.0), extractor, hop=0.16).scores.astype(np.float64)
    logits = torch.from_numpy(np.log(scores) - np.log1p(-scores)).float()
    scale = 2 / logits.std(0)
    head.weight.data *= scale[:, None]
    head.bias.data = (head.bias.data - logits.mean(0)) * scale
    detector.save_pretrained(tmp_path / "model")
    extractor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def recordings(tmp_path) -> Path:
    folder = tmp_path / "recordings"
    (folder / "deep").mkdir(parents=True)
    soundfile.write(folder / "a.wav", noise(2.0) + speech_like(2.0), RATE)
    soundfile.write(folder / "b.flac", np.stack([speech_like(1.5, 44_100)] * 2, axis=1), 44_100)
    (folder / "broken.wav").write_text("no audio")
    soundfile.write(folder / "deep" / "a.wav", speech_like(0.7), RATE)
    soundfile.write(folder / "short.wav", noise(0.02), RATE)
    return folder


@pytest.fixture
def usable(recordings) -> Path:
    for name in ("broken.wav", "short.wav"):
        (recordings / name).unlink()
    return recordings


@pytest.fixture
def without_model(monkeypatch):
    """From when it is called on, the model must not run and nothing is decoded."""

    def compute(self, model, inputs):
        raise AssertionError("the model runs")

    def forbid() -> None:
        monkeypatch.setattr(Detection, "compute", compute)
        monkeypatch.setattr(inputs, "read_blocks", None)

    return forbid


def settings(model, recordings, output, **changes) -> DetectSettings:
    options = {"hop": 0.16, "device": "cpu", **changes}
    return DetectSettings(**{"model": str(model), "inputs": str(recordings), "output": str(output), **options})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(path: Path) -> list[dict]:
    """Of a table, as text, as a .csv has it."""
    if path.suffix != ".parquet":
        with path.open(newline="") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    table = pq.read_table(path).to_pylist()
    return [
        {name: "" if value is None else str(round(value, 4) if isinstance(value, float) else value) for name, value in row.items()}
        for row in table
    ]


def loaded(model: Path) -> tuple[SSLAMForAudioFrameClassification, SSLAMFeatureExtractor]:
    return SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)


def scored(model: Path, path: Path) -> StepScores:
    detector, extractor = loaded(model)
    return detector.score_steps(load_waveform(path), extractor, hop=0.16)


def detected(model: Path, path: Path, **options) -> list[Event]:
    detector, extractor = loaded(model)
    return detector.detect(load_waveform(path), extractor, hop=0.16, **options)


def assert_same(found: list[dict], expected: list[Event]) -> None:
    assert [(one["start"], one["end"], one["label"]) for one in found] == [
        (pytest.approx(one.start, abs=6e-4), pytest.approx(one.end, abs=6e-4), one.label) for one in expected
    ]
    assert [one["score"] for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is written


def test_each_recording_has_a_line_with_the_events_that_the_model_detects_or_its_error(model, recordings, tmp_path):
    output = tmp_path / "new" / "events.jsonl"
    summary = detect_files(settings(model, recordings, output))
    a, b, broken, deep, short = lines(output)
    names = ("a.wav", "b.flac", "broken.wav", "deep/a.wav", "short.wav")
    assert [record["path"] for record in (a, b, broken, deep, short)] == [str(recordings / name) for name in names]
    for record in (a, b, deep):
        expected = detected(model, record["path"])
        assert_same(record["events"], expected)
        assert record["events"] == sorted(record["events"], key=lambda one: (one["start"], CLASSES.index(one["label"])))
    assert len(a["events"]) > 3
    assert len({event["label"] for event in a["events"]}) > 1
    assert (a["duration"], b["duration"], deep["duration"]) == (2, 1.5, 0.7)
    assert (broken["cause"], short["cause"]) == ("unreadable", "too short")
    assert "events" not in broken
    assert (summary.finished, summary.unusable, summary.is_complete) == (3, {"unreadable": 1, "too short": 1}, True)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_has_a_row_for_each_event_and_for_a_recording_without_one(model, recordings, tmp_path, suffix):
    output = tmp_path / f"events{suffix}"
    detect_files(settings(model, recordings, output))
    table = rows(output)
    for name in ("a.wav", "b.flac", "deep/a.wav"):
        found = [row for row in table if row["path"] == str(recordings / name)]
        numbers = [{**row, **{key: float(row[key]) for key in ("start", "end", "score")}} for row in found]
        assert_same(numbers, detected(model, recordings / name))
        assert {row["error"] for row in found} == {""}
    [broken] = [row for row in table if row["path"].endswith("broken.wav")]
    assert "cannot be read as audio" in broken["error"]
    assert (broken["start"], broken["end"], broken["label"], broken["score"]) == ("", "", "", "")
    detect_files(settings(model, recordings, output, threshold=1.0))
    assert {(row["start"], row["end"], row["label"]) for row in rows(output) if not row["error"]} == {
        ("0.0", str(duration), "") for duration in (2.0, 1.5, 0.7)
    }


def test_the_table_of_dcase_names_recordings_within_their_folder_and_lists_the_unusable(model, recordings, tmp_path):
    output, unusable = tmp_path / "events.tsv", tmp_path / "events.unusable.csv"
    detect_files(settings(model, recordings, output))
    table = rows(output)
    assert list(table[0]) == ["filename", "onset", "offset", "event_label"]
    for name in ("a.wav", "b.flac", "deep/a.wav"):
        assert [(row["onset"], row["offset"], row["event_label"]) for row in table if row["filename"] == name] == [
            (f"{one.start:.3f}", f"{one.end:.3f}", one.label) for one in detected(model, recordings / name)
        ]
    assert {row["filename"] for row in table} == {"a.wav", "b.flac", "deep/a.wav"}
    assert [(Path(row["path"]).name, row["cause"]) for row in rows(unusable)] == [("broken.wav", "unreadable"), ("short.wav", "too short")]
    for name in ("broken.wav", "short.wav"):
        (recordings / name).unlink()
    detect_files(settings(model, recordings, output))
    assert not unusable.exists()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_scores_of_time_steps_have_a_row_each_and_a_column_for_each_class(model, recordings, tmp_path, suffix):
    output = tmp_path / f"scores{suffix}"
    detect_files(settings(model, recordings, output, per="step"))
    table = rows(output)
    assert list(table[0]) == ["path", "start", "end", *CLASSES]
    assert len(rows(tmp_path / "scores.unusable.csv")) == 2
    for name in ("a.wav", "b.flac", "deep/a.wav"):
        found, expected = [row for row in table if row["path"] == str(recordings / name)], scored(model, recordings / name)
        assert [float(row["start"]) for row in found] == pytest.approx((STEP * np.arange(len(expected.scores))).tolist())
        assert float(found[-1]["end"]) == expected.duration
        scores = np.array([[float(row[label]) for label in CLASSES] for row in found])
        assert np.abs(scores - expected.scores).max() < 1e-4
    assert len(table) == 25 + 19 + 9
    if suffix == ".parquet":  # from which other events follow without the model
        raw = pq.read_table(output, filters=[("path", "=", str(recordings / "a.wav"))]).select(CLASSES)
        events = find_events(np.stack([raw[label].to_numpy() for label in CLASSES], 1), STEP, CLASSES, EventSettings(threshold=0.7), 2.0)
        assert [event[:3] for event in events] == [event[:3] for event in detected(model, recordings / "a.wav", threshold=0.7)]


def test_a_class_that_is_called_as_a_column_is_named(model, usable, tmp_path):
    detector, _ = loaded(model)
    detector.config.id2label = {0: "path", 1: "rain", 2: "sea"}
    detector.save_pretrained(model)
    with pytest.raises(UserError, match="a class is called 'path', as a column of the output: rename it in id2label"):
        detect_files(settings(model, usable, tmp_path / "scores.parquet", per="step"))
    assert detect_files(settings(model, usable, tmp_path / "events.parquet")).finished == 3


def test_a_csv_has_no_cell_that_a_spreadsheet_would_compute(model, usable, tmp_path):
    detector, _ = loaded(model)
    detector.config.id2label = {0: "=1+1", 1: "@SUM(1)", 2: "-1+2"}
    detector.save_pretrained(model)
    for per in ("event", "step"):
        output = tmp_path / f"{per}.csv"
        detect_files(settings(model, usable, output, per=per))
        with output.open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert {cell for cell in cells if cell.startswith("'")} == {"'=1+1", "'@SUM(1)", "'-1+2"}
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]


def test_events_do_not_depend_on_the_tables_that_scores_are_kept_in(model, usable, tmp_path, monkeypatch):
    """A recording's scores lie in many row groups, which begin anywhere."""
    options = {"median_filter": 0.4, "max_gap": 0.16, "min_duration": 0.16}
    detect_files(settings(model, usable, tmp_path / "whole.jsonl", **options))
    monkeypatch.setattr(parts, "MOST_ROWS", 3)
    detect_files(settings(model, usable, tmp_path / "pieces.jsonl", **options))
    [part] = (tmp_path / "pieces.parts").glob("*.parquet")
    assert pq.ParquetFile(part).num_row_groups == 18  # of 53 steps
    assert lines(tmp_path / "pieces.jsonl") == lines(tmp_path / "whole.jsonl")
    for path, suffix in ((tmp_path / "whole.csv", "whole"), (tmp_path / "pieces.csv", "pieces")):
        detect_files(settings(model, usable, path, per="step"))
        assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes(), suffix


# --- how scores become events


CHANGES = [
    {},
    {"threshold": 0.7},
    {"threshold": {"rain": 0.9, "dog, big": 0.2}},
    {"onset_threshold": 0.8},
    {"median_filter": 0.4},
    {"max_gap": 1.0},
    {"min_duration": 0.3},
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_thresholds_and_formats_need_no_model(model, usable, tmp_path, without_model, suffix):
    """And what is written is what a run of its own writes."""
    fresh = []
    for number, changes in enumerate(CHANGES):
        output = tmp_path / str(number) / f"events{suffix}"
        detect_files(settings(model, usable, output, **changes))
        fresh.append(output.read_bytes())
    assert len(set(fresh)) == len(CHANGES)
    detect_files(settings(model, usable, tmp_path / "events.parquet", per="step"))
    without_model()
    for changes, content in zip(CHANGES, fresh):
        output = tmp_path / f"events{suffix}"
        assert detect_files(settings(model, usable, output, per_device_eval_batch_size=1, **changes)).skipped == 3
        assert output.read_bytes() == content


def test_settings_that_are_left_out_are_those_of_the_model_which_may_change(model, usable, tmp_path, without_model):
    """Tuning writes them into the model's config: scores stay what they were."""
    path, output = usable / "a.wav", tmp_path / "events.jsonl"
    before = detected(model, path)
    detect_files(settings(model, path, output))
    assert_same(lines(output)[0]["events"], before)
    tuned = {"threshold": {"rain": 0.8, "sea": 0.6}, "median_filter": {"dog, big": 0.4}}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "event_detection": tuned}))
    after = detected(model, path)
    overridden = detected(model, path, threshold={"rain": 0.5})
    assert len({tuple(before), tuple(after), tuple(overridden)}) == 3
    without_model()
    assert detect_files(settings(model, path, output)).skipped == 1
    assert_same(lines(output)[0]["events"], after)
    detect_files(settings(model, path, output, threshold={"rain": 0.5, "sea": 0.5}, median_filter=0))
    assert_same(lines(output)[0]["events"], before)
    detect_files(settings(model, path, output, threshold={"rain": 0.5}))
    assert_same(lines(output)[0]["events"], overridden)


def test_a_class_that_is_renamed_needs_no_model(model, usable, tmp_path, without_model):
    detect_files(settings(model, usable, tmp_path / "events.jsonl"))
    config = json.loads((model / "config.json").read_text())
    config.update(id2label={0: "cat", 1: "rain", 2: "sea"}, label2id={"cat": 0, "rain": 1, "sea": 2})
    (model / "config.json").write_text(json.dumps(config))
    without_model()
    detect_files(settings(model, usable, tmp_path / "events.csv"))
    assert {row["label"] for row in rows(tmp_path / "events.csv")} == {"cat", "rain", "sea"}


# --- a file for each recording


@pytest.mark.parametrize(("kind", "suffix"), [("audacity", ".txt"), ("raven", ".selections.txt")])
def test_each_recording_has_a_label_file_of_its_own(model, recordings, tmp_path, kind, suffix):
    output, folder = tmp_path / "events.csv", tmp_path / f"events.{kind}"
    detect_files(settings(model, recordings, output, label_files=kind))
    assert set(contents(folder)) == {f"a.wav{suffix}", f"b.flac{suffix}", f"deep/a.wav{suffix}"}
    for name in ("a.wav", "b.flac", "deep/a.wav"):
        table = (folder / f"{name}{suffix}").read_text().splitlines()
        events = detected(model, recordings / name)
        if kind == "audacity":
            assert table == [f"{round(one.start, 3):.6f}\t{round(one.end, 3):.6f}\t{one.label}" for one in events]
        else:
            cells = [line.split("\t") for line in table[1:]]
            assert [(row[3], row[4], row[6], row[7]) for row in cells] == [
                (f"{one.start:.3f}", f"{one.end:.3f}", "8000.0", one.label) for one in events
            ]


def test_label_files_that_somebody_has_corrected_are_kept_and_found_before_any_work(model, usable, tmp_path, without_model):
    options = {"output": str(tmp_path / "events.csv"), "label_files": "audacity"}
    detect_files(settings(model, usable, **options))
    track = tmp_path / "events.audacity" / "deep" / "a.wav.txt"
    track.write_text("0.0\t0.5\tfox\n")
    before = contents(tmp_path)
    without_model()
    soundfile.write(usable / "new.wav", noise(1.0), RATE)
    with pytest.raises(UserError, match=r"events\.audacity was changed since it was written"):
        detect_files(settings(model, usable, **options))
    (usable / "new.wav").unlink()
    assert contents(tmp_path) == before
    (tmp_path / "events.audacity").rename(tmp_path / "corrected")
    detect_files(settings(model, usable, **options))
    assert track.read_text() != "0.0\t0.5\tfox\n"


# --- pictures


def test_each_recording_has_a_picture(model, recordings, tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    detect_files(settings(model, recordings, tmp_path / "events.jsonl", plot=str(tmp_path / "pictures")))
    pictures = sorted(str(path.relative_to(tmp_path / "pictures")) for path in (tmp_path / "pictures").rglob("*.*"))
    assert pictures == ["a.wav.png", "b.flac.png", "deep/a.wav.png"]
    assert matplotlib_image.imread(tmp_path / "pictures" / "deep" / "a.wav.png").shape[1] == 1500


def test_a_long_recording_has_several_pictures_which_show_all_of_it(model, usable, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(7.0) + speech_like(7.0), RATE)
    drawn = []

    def record(scores, events, waveform, file, title, *, start, sampling_rate):
        drawn.append((file.name, scores, waveform, start))
        file.write_bytes(b"")

    monkeypatch.setattr(detect, "plot_events", record)
    monkeypatch.setattr(parts, "MOST_ROWS", 10)
    options = {"plot": str(tmp_path / "pictures"), "plot_seconds": 2, "per_device_eval_batch_size": 8}
    detect_files(settings(model, path, tmp_path / "events.jsonl", **options))
    assert [name for name, *_ in drawn] == [f"long.wav.{i}-of-4.png" for i in (1, 2, 3, 4)]
    assert np.array_equal(np.concatenate([scores.scores for _, scores, _, _ in drawn]), scored(model, path).scores)
    assert np.array_equal(np.concatenate([waveform for _, _, waveform, _ in drawn]), load_waveform(path))
    assert [start for *_, start in drawn] == pytest.approx([0, 22 * STEP, 44 * STEP, 66 * STEP])
    for _, scores, waveform, start in drawn:
        assert scores.duration == len(waveform) / RATE
        assert start + scores.duration <= start + STEP * len(scores.scores) + 1e-9


def test_pictures_without_matplotlib_are_rejected_with_the_extra_to_install(model, usable, tmp_path, monkeypatch):
    monkeypatch.setattr(detect, "find_spec", lambda name: None if name == "matplotlib" else importlib.util.find_spec(name))
    with pytest.raises(UserError, match=r"plot needs matplotlib, which is not installed: pip install .*\[train\]"):
        settings(model, usable, tmp_path / "events.jsonl", plot="pictures")


@pytest.mark.parametrize("bounds", [[], [1], [2, 3, 7], [0, 4, 10], [5, 5]])
def test_arrays_are_cut_anywhere(bounds):
    whole = np.arange(10)
    pieces = list(cut_at([whole[:2], whole[2:3], whole[3:]], bounds))
    assert [piece.tolist() for piece in pieces] == [piece.tolist() for piece in np.split(whole, bounds)]


def colour(image: np.ndarray, code: str) -> int:
    """How many pixels have it."""
    rgb = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(image[..., :3] - rgb).max(-1) < 0.02).sum())


def test_the_picture_shows_events_over_scores_and_outlines_what_is_known(tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    waveform = speech_like(4.0)
    scores = StepScores(np.full((50, 3), 0.3, dtype=np.float32), STEP, 4.0, CLASSES)
    events = {"none": [], "one": [Event(1.0, 2.0, "rain", 0.9)], "twice": [Event(1.0, 3.0, "rain", 0.9)]}
    found = {}
    for name, drawn in events.items():
        plot.plot_events(scores, drawn, waveform, tmp_path / f"{name}.png", "$ is no formula")
        found[name] = matplotlib_image.imread(tmp_path / f"{name}.png")
    plot.plot_events(scores, events["one"], waveform, tmp_path / "known.png", truth=[KnownEvent("rain", 1.5, 2.5)])
    known = matplotlib_image.imread(tmp_path / "known.png")
    assert found["none"].shape == (round(150 * (3.6 + 3 * plot.STEP_LANE)), 1500, 4)
    bars = {name: colour(image, "#8dbfdd") for name, image in found.items()}  # 45 % of the blue over white
    legend = bars["none"]
    assert legend > 100
    assert bars["twice"] - legend == pytest.approx(2 * (bars["one"] - legend), rel=0.1)
    assert colour(found["one"], plot.OUTLINE) < 50 < colour(known, plot.OUTLINE) - 500


def test_a_picture_of_a_part_shows_the_times_and_events_of_that_part(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    scores = StepScores(np.linspace(0, 1, 150, dtype=np.float32).reshape(50, 3), STEP, 4.0, CLASSES)
    events = [Event(1.0, 2.0, "sea", 0.9), Event(59.0, 61.0, "rain", 0.9), Event(63.0, 70.0, "sea", 0.9), Event(64.0, 65.0, "rain", 0.9)]
    drawn = []

    def record(axes, result, events, shown, truth, start):
        drawn.append(([event.start for event in events], [event.onset for event in truth], start))

    monkeypatch.setattr(plot, "_draw_events", record)
    truth = [KnownEvent("sea", 10.0, 20.0), KnownEvent("sea", 60.0, 64.0)]
    plot.plot_events(scores, events, speech_like(4.0), tmp_path / "part.png", truth=truth, start=60.0)
    assert drawn == [([59.0, 63.0], [60.0], 60.0)]


def test_of_many_classes_those_known_then_detected_then_likely_are_shown(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    scores = np.tile(np.linspace(0.1, 0.9, 30, dtype=np.float32), (50, 1))
    result, drawn = StepScores(scores, STEP, 4.0, [f"class {i}" for i in range(30)]), []
    monkeypatch.setattr(plot, "_draw_events", lambda axes, result, events, shown, truth, start: drawn.append(shown))
    events, truth = [Event(0.0, 1.0, "class 3", 0.5)], [KnownEvent("class 1", 0.0, 1.0)]
    for most in (1, 2, 4):
        plot.plot_events(result, events, speech_like(4.0), tmp_path / "many.png", truth=truth, most_classes=most)
    assert drawn == [[1], [1, 3], [1, 3, 28, 29]]


# --- runs: stopped, of several processes, on Ray


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_run_that_is_stopped_is_resumed_and_writes_what_one_run_writes(model, recordings, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(inputs, "PORTION_FILES", 1)
    whole, stopped = tmp_path / f"whole{suffix}", tmp_path / f"stopped{suffix}"
    detect_files(settings(model, recordings, whole, label_files="audacity"))
    computed, compute = [], Detection.compute

    def interrupted(self, model, inputs):
        computed.append(len(inputs["input_values"]))
        if len(computed) == 3:
            raise KeyboardInterrupt
        return compute(self, model, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Detection, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            detect_files(settings(model, recordings, stopped, label_files="audacity"))
    assert not stopped.exists()
    summary = detect_files(settings(model, recordings, stopped, label_files="audacity"))
    assert (summary.skipped, summary.finished) == (2, 1)
    assert stopped.read_bytes() == whole.read_bytes()
    assert contents(tmp_path / "stopped.audacity") == contents(tmp_path / "whole.audacity")
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize("order", [(0, 1), (2, 0, 1)])
def test_processes_write_together_what_one_writes(model, recordings, tmp_path, monkeypatch, order):
    """The last one to finish writes the output, and the label files."""
    monkeypatch.setattr(inputs, "PORTION_FILES", 1)
    output, alone = tmp_path / "together" / "events.csv", tmp_path / "events.csv"
    detect_files(settings(model, recordings, alone, label_files="raven"))
    for rank in order:
        assert not output.exists()
        for name, value in (("RANK", rank), ("WORLD_SIZE", len(order)), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        detect_files(settings(model, recordings, output, label_files="raven"))
    assert output.read_bytes() == alone.read_bytes()
    assert contents(tmp_path / "together" / "events.raven") == contents(tmp_path / "events.raven")


def test_the_stages_of_ray_compute_what_this_process_computes(model, recordings, tmp_path):
    options = settings(model, recordings, tmp_path / "events.jsonl", per_device_eval_batch_size=2)
    network, extractor = load_model(options.model_class, options.model, device="cpu")
    task = options.task(network.config, extractor)
    found = current_state(find_recordings(str(recordings)))
    portions = [found[:3], found[3:]]
    prepare, compute = pickle.loads(pickle.dumps(_Prepare(task, 2))), _Compute(options, task, "cpu")
    batches = (compute(row) for portion in portions for row in prepare({"portion": pickle.dumps(portion)}))
    results = list(compute_batches((pickle.loads(row["batch"]) for row in batches), itemgetter("results")))
    expected = list(compute_here(options, task, network, portions))
    assert [span for span, _ in results] == [span for span, _ in expected]
    for (_, result), (_, other) in zip(results, expected):
        assert torch.equal(result, other) if isinstance(result, torch.Tensor) else str(result) == str(other)


@pytest.mark.slow
def test_ray_writes_what_one_process_writes(model, recordings, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    monkeypatch.setattr(inputs, "PORTION_FILES", 2)
    alone, output = tmp_path / "events.csv", tmp_path / "ray" / "events.csv"
    detect_files(settings(model, recordings, alone, label_files="audacity"))
    try:
        summary = detect_files(settings(model, recordings, output, label_files="audacity", engine="ray", ray_workers=2))
    finally:
        ray.shutdown()
    assert (summary.finished, summary.unusable) == (3, {"unreadable": 1, "too short": 1})
    assert output.read_bytes() == alone.read_bytes()
    assert contents(tmp_path / "ray" / "events.audacity") == contents(tmp_path / "events.audacity")


# --- what is rejected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "events.txt"}, "ends in .jsonl or .csv or .tsv or .parquet"),
        ({"per": "step"}, r"per is 'step' and output .*, but scores of time steps are written as \.csv or \.parquet"),
        ({"threshold": 1.5}, "these settings do not fit the model: threshold is 1.5"),
        ({"threshold": {"cat": 0.5}}, "these settings do not fit the model: threshold has a value for 'cat'"),
        ({"onset_threshold": 0.2}, "these settings do not fit the model: onset_threshold is 0.2"),
        ({"median_filter": -1.0}, "these settings do not fit the model: median_filter is -1.0"),
        ({"hop": 0.1}, "these settings do not fit the model: hop is 0.1 s, but for time steps it must be a multiple of 0.16 s"),
        ({"plot": "pictures", "plot_seconds": 0.5}, "plot_seconds is 0.5"),
        ({"plot": "FOLDER/events.raven", "label_files": "raven"}, "events.raven is written there too: give a folder of its own"),
        ({"plot": "FOLDER/x/../events.raven/pictures", "label_files": "raven"}, "events.raven is written there too"),
        ({"plot": "FOLDER"}, "events.jsonl is written there too"),
        ({"plot": "FOLDER/events.jsonl"}, "events.jsonl is written there too"),
        ({"plot": "FOLDER/events.unusable.csv"}, "events.unusable.csv is written there too"),
        ({"plot": "FOLDER/events.parts/pictures"}, "events.parts is written there too"),
        ({"plot": "FOLDER/recordings"}, "recordings exists, and was not written from"),
        ({"model": "FOLDER/nowhere"}, "there is no folder or file .*nowhere here"),
    ],
)
def test_settings_that_do_not_fit_are_rejected_before_anything_is_computed(model, recordings, tmp_path, without_model, changes, message):
    pytest.importorskip("matplotlib")
    changes = {name: value.replace("FOLDER", str(tmp_path)) if isinstance(value, str) else value for name, value in changes.items()}
    before = contents(recordings)
    without_model()
    with pytest.raises(UserError, match=message):
        detect_files(settings(**{"model": model, "recordings": recordings, "output": tmp_path / "events.jsonl", **changes}))
    assert contents(recordings) == before
    assert not (tmp_path / "events.jsonl").exists()


# --- the command


def test_the_command_detects_and_survives_a_kill(model, recordings, tmp_path, capsys):
    words = ["detect", "--model", str(model), "--inputs", str(recordings), "--output", str(tmp_path / "events.jsonl"), "--device", "cpu"]
    words += ["--hop", "0.16", "--threshold", "{'dog, big': 0.6}", "--median_filter.rain", "0.24", "--label_files", "audacity"]
    dies_at_the_second_part = f"""
import os
from transformers_sslam import cli
from transformers_sslam.recordings import inputs, parts
inputs.PORTION_FILES, flush, calls = 1, parts.flush, []
def dying(path):
    calls.append(path)
    if len(calls) == 3:
        os._exit(9)
    flush(path)
parts.flush = dying
cli.main({words})
"""
    (tmp_path / "dies.py").write_text(dies_at_the_second_part)
    assert Fork([tmp_path / "dies.py"], tmp_path / "log").wait() == 9, (tmp_path / "log").read_text()
    assert not (tmp_path / "events.jsonl").exists()
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 recordings processed (0.00 h, ")
    assert printed.endswith(" x real time), 1 finished before, 2 not usable (1 too short, 1 unreadable)\n")
    a, *_ = lines(tmp_path / "events.jsonl")
    assert_same(a["events"], detected(model, recordings / "a.wav", threshold={"dog, big": 0.6}, median_filter={"rain": 0.24}))
    assert (tmp_path / "events.audacity" / "deep" / "a.wav.txt").is_file()
    assert main([*words, "--window", "0.32"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sslam detect: error: ")
    assert "events.parts was made with other settings: window was 0.64 and is 0.32 now" in said
