"""Labels as a table: what columns of every kind give, what is wrong with a label, and that a table and a stream say the same."""

import math
import re
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from conftest import named_labels
from datasets import ClassLabel, Dataset, Features, List, Value

from transformers_sslam.audio.labels import Event, LabelReader
from transformers_sslam.audio.rows import check_has_labels, choose_classes, fold_names, read_rows
from transformers_sslam.errors import UserError


def table(cells: list, feature=None, column: str = "label") -> Dataset:
    """Clips `0.wav`, `1.wav` and so on, whose column holds these cells."""
    columns = {"audio": [{"path": f"{i}.wav", "bytes": None} for i in range(len(cells))], column: cells}
    if feature is None:
        return Dataset.from_dict(columns)
    audio = {"path": Value("string"), "bytes": Value("binary")}
    return Dataset.from_dict(columns, features=Features({"audio": audio, column: feature}))


NAMES = ClassLabel(names=["hum", "hiss", "click"])
KINDS = {
    "classes": (table([2, 0, 2], NAMES), None, [["click"], ["hum"], ["click"]], False),
    "text": (table(["b", " a", "b "]), None, [["b"], ["a"], ["b"]], False),
    "integers": (table([7, 10, 7]), None, [["7"], ["10"], ["7"]], False),
    "floats": (table([1.0, 2.5, 1.0]), None, [["1"], ["2.5"], ["1"]], False),
    "booleans": (table([True, False]), None, [["True"], ["False"]], False),
    "lists of classes": (table([[2, 0], [], [1]], List(NAMES)), None, [["click", "hum"], [], ["hiss"]], True),
    "lists of text": (table([["b", "a"], None, ["c", "b", "c"]], List(Value("string"))), None, [["b", "a"], [], ["c", "b"]], True),
    "joined text": (table(["b; a", "", None, ";c ;", "b"]), ";", [["b", "a"], [], [], ["c"], ["b"]], True),
    "two joined": (table(["b::a", "c"]), "::", [["b", "a"], ["c"]], True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_any_kind_gives_labels(kind):
    rows, separator, expected, multi_label = KINDS[kind]
    labels = read_rows(rows, "label", separator).labels
    assert (list(labels), labels.multi_label, labels.declared) == (expected, multi_label, "classes" in kind)
    assert (labels.codes.dtype, labels.offsets.dtype) == (np.int32, np.int64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_reads_the_same(kind):
    rows, separator, expected, _ = KINDS[kind]
    stream = rows.to_iterable_dataset()
    reader = LabelReader.of(stream, "label", separator)
    assert [reader.read_row(row)[0] for row in stream] == expected


EVENT = {"label": Value("string"), "onset": Value("float64"), "offset": Value("float64")}


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_a_column_of_events_is_suggested_where_the_asked_one_is_missing(kind):
    rows = table([[{"label": "hum", "onset": 0.0, "offset": 1.0}]], List(EVENT), "events")
    with pytest.raises(UserError, match="there is no column 'label', only audio, events: set label_column to events, which holds events"):
        LabelReader.of(rows if kind == "table" else rows.to_iterable_dataset(), "label")
    with pytest.raises(UserError, match="there is no column 'label', only audio, name: name another"):
        LabelReader.of(table(["hum"], column="name"), "label")


def test_chosen_rows_of_a_table_give_their_own_labels():
    rows, _, expected, _ = KINDS["lists of classes"]
    assert list(read_rows(rows.select([2, 0]), "label").labels) == [expected[2], expected[0]]


@pytest.mark.parametrize(
    ("cells", "feature", "message"),
    [
        (["a", None], None, r"1.wav has no label in the column 'label'"),
        (["a", "  "], None, r"1.wav has no label in the column 'label'"),
        ([0, -1], NAMES, r"1.wav has -1 in the column 'label', but the numbers of its classes are 0 to 2"),
        ([[0], [1, -1]], List(NAMES), r"1.wav has -1 in the column 'label'"),
        ([["a"], ["b", ""]], None, r"1.wav has an empty label in the column 'label'"),
        (["a", "b\nc"], None, r"has the label 'b\\nc', but a label is one line without control characters"),
        (["a", "b\x00c"], None, r"has the label 'b\\x00c'"),
        (["a", "b\u2028c"], None, r"has the label 'b\\u2028c'"),
        ([0, 1], ClassLabel(names=["a", "b\nc"]), r"has the label 'b\\nc'"),
        ([3.0, math.nan], None, r"1.wav has no label in the column 'label'"),
        ([[1.0], [2.0, math.nan]], None, r"1.wav has an empty label in the column 'label'"),
        ([1.0, -math.inf], None, r"the column 'label' has the label -inf, which does not name a class: correct it"),
        ([b"x", b"y"], None, r"the column 'label' holds binary, but a label is text, a number or a class"),
        ([[b"x"], []], None, r"the column 'label' holds list<item: binary>, but a label is text"),
        ([{"a": 1}, {"a": 2}], None, r"the column 'label' holds struct<a: int64>, but a label is text"),
        ([[{"label": b"x", "onset": 0.0, "offset": 1.0}], []], None, r"the column 'label' holds .*label: binary.*, but a label is text"),
    ],
)
def test_a_label_that_cannot_be_is_named_in_a_table_and_in_a_stream(cells, feature, message):
    rows = table(cells, feature)
    with pytest.raises(UserError, match=message):
        read_rows(rows, "label")
    stream = rows.to_iterable_dataset()
    with pytest.raises(UserError, match=message):
        [LabelReader.of(rows, "label").read_row(row) for row in stream]


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["e\u0301", "\xe9"],  # as macOS and other systems write the names of folders
        ["car horn", "car\xa0horn"],  # as web pages and spreadsheets have blanks
        ["car horn", "car  horn"],
        ["dog", "\u200bdog"],
        ["dog", "dog\ufeff"],
    ],
)
def test_names_that_look_the_same_are_not_two_classes(names, declared):
    message = f"the column 'label' has the labels {names[0]!a} and {names[1]!a}, which look the same: write both the same way"
    with pytest.raises(UserError, match=re.escape(message)):
        read_rows(table(names, ClassLabel(names=names) if declared else None), "label")


# --- events

EVENTS = List({"label": Value("string"), "onset": Value("float64"), "offset": Value("float64")})


def event(label: str, onset: float | None, offset: float | None) -> dict:
    return {"label": label, "onset": onset, "offset": offset}


def test_events_give_tags_and_times():
    cells = [[event("dog", 0.5, 2.0), event("cat", 1.0, 1.5), event("dog", 3.0, 4.0)], [], [event("cat", 0.0, 10.0)]]
    labels = read_rows(table(cells, EVENTS), "label").labels
    assert list(labels) == [["dog", "cat"], [], ["cat"]]
    assert labels.events(0) == [Event("dog", 0.5, 2.0), Event("cat", 1.0, 1.5), Event("dog", 3.0, 4.0)]
    chosen = labels.select([2, 1, 0]).encode(["cat", "dog"])
    assert (chosen.events(0), chosen.events(1)) == ([Event("cat", 0.0, 10.0)], [])
    assert chosen.events(2) == labels.events(0)
    np.testing.assert_array_equal(chosen.one_hot(range(3)), [[1, 0], [0, 0], [1, 1]])
    with pytest.raises(ValueError, match="have no times"):
        read_rows(table(["a"]), "label").labels.events(0)


@pytest.mark.parametrize(
    ("onset", "offset"),
    [(-1.0, 2.0), (2.0, 2.0), (3.0, 2.0), (None, 2.0), (0.0, float("inf")), (float("nan"), 1.0), (1.0, 1.0000001)],
)
def test_events_with_impossible_times_are_named(onset, offset):
    rows = table([[event("dog", 0.0, 1.0)], [event("dog", onset, offset)]], EVENTS)
    with pytest.raises(UserError, match=r"1.wav has an event from .* s in the column 'label', but an event has an onset"):
        read_rows(rows, "label")


def test_events_of_one_class_that_overlap_or_touch_are_joined_and_counted(caplog):
    cells = [
        [event("dog", 3.0, 4.0), event("cat", 0.0, 9.0), event("dog", 0.0, 2.0), event("dog", 4.0, 5.0), event("dog", 0.5, 1.0)],
        [event("dog", 5.0, 6.0), event("dog", 1.0, 5.0), event("dog", 2.0, 3.0), event("cat", 2.0, 2.5)],
        [event("dog", 5.0, 6.0), event("dog", 6.1, 7.0)],
    ]
    labels = read_rows(table(cells, EVENTS), "label").labels
    assert labels.events(0) == [Event("dog", 3.0, 5.0), Event("cat", 0.0, 9.0), Event("dog", 0.0, 2.0)]
    assert labels.events(1) == [Event("dog", 1.0, 6.0), Event("cat", 2.0, 2.5)]
    assert labels.events(2) == [Event("dog", 5.0, 6.0), Event("dog", 6.1, 7.0)]
    assert list(labels) == [["dog", "cat"], ["dog", "cat"], ["dog"]]
    assert labels.num_events == 7
    assert "4 events of the column 'label' overlap or touch one of their class and are joined with it: 7 are left" in caplog.text


def test_joined_events_cover_what_the_given_ones_cover():
    generator = np.random.default_rng(0)
    cells = []
    for _ in range(200):
        onsets, lengths = generator.integers(0, 40, 12) / 4, generator.integers(1, 12, 12) / 4
        cells.append([event("abc"[k % 3], onset, onset + length) for k, (onset, length) in enumerate(zip(onsets, lengths))])
    labels = read_rows(table(cells, EVENTS), "label").labels
    for i, given in enumerate(cells):
        for label in "abc":
            covered = np.zeros(60, bool)
            for one in given:
                if one["label"] == label:
                    covered[int(4 * one["onset"]) : int(4 * one["offset"])] = True
            edges = np.flatnonzero(np.diff(np.concatenate([[0], covered, [0]]).astype(int)))
            found = sorted((4 * onset, 4 * offset) for name, onset, offset in labels.events(i) if name == label)
            assert [edge for times in found for edge in times] == edges.tolist()


def test_an_event_without_times_is_a_weak_label():
    cells = [[event("dog", None, None), event("cat", 1.0, 2.0)], [event("cat", None, None)], [], [event("dog", 0.0, 1.0)]]
    labels = read_rows(table(cells, EVENTS), "label").labels
    assert list(labels) == [["dog", "cat"], ["cat"], [], ["dog"]]
    assert [labels.has_times(i) for i in range(4)] == [False, False, True, True]
    assert labels.select([3, 1]).has_times(0)
    assert not labels.select([3, 1]).has_times(1)
    with pytest.raises(ValueError, match="the labels of clip 1 have no times"):
        labels.events(1)
    assert not read_rows(table(["a"]), "label").labels.has_times(0)
    np.testing.assert_array_equal(labels.step_targets(0, 0.5, 3), np.full((3, 2), -100))
    np.testing.assert_array_equal(labels.step_targets(2, 0.5, 3), np.zeros((3, 2)))
    np.testing.assert_array_equal(read_rows(table(["a", "b"]), "label").labels.step_targets(0, 0.5, 3), np.full((3, 2), -100))
    stream = table(cells, EVENTS).to_iterable_dataset()
    reader = LabelReader.of(stream, "label")
    assert [reader.read_row(row)[0] for row in stream] == list(labels)
    last = [reader.read_row(row) for row in stream][3]
    assert (last.events(0), last.has_times(0)) == (labels.events(3), True)


SOFT = List({"label": Value("string"), "onset": Value("float64"), "offset": Value("float64"), "value": Value("float32")})


def soft_event(label: str, onset: float, offset: float, value: float | None) -> dict:
    return event(label, onset, offset) | {"value": value}


def test_soft_labels_are_targets_and_above_one_half_events():
    cells = [
        [soft_event("car", 0, 1, 0.25), soft_event("car", 1, 2, 0.75), soft_event("car", 2, 3, 1.0), soft_event("bird", 0, 2, 0.5)],
        [soft_event("car", 0, 2, None)],
    ]
    labels = read_rows(table(cells, SOFT), "label").labels
    assert list(labels) == [["car"], ["car"]]
    assert [labels.events(i) for i in range(2)] == [[Event("car", 1.0, 3.0)], [Event("car", 0.0, 2.0)]]
    np.testing.assert_allclose(labels.step_targets(0, 1.0, 4), [[0.25, 0.5], [0.75, 0.5], [1, 0], [0, 0]])
    np.testing.assert_allclose(labels.step_targets(0, 2.0, 1), [[0.5, 0.5]])
    np.testing.assert_allclose(labels.encode(["car"]).step_targets(0, 1.0, 3), [[0.25], [0.75], [1]])
    assert labels.encode(["car"]).events(0) == labels.events(0)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="0.wav has an event of value .*, but a value is from 0 to 1"):
            read_rows(table([[soft_event("car", 0, 1, wrong)]], SOFT), "label")
    with pytest.raises(UserError, match="1.wav has events of one class .* that overlap, with different values, at 0.5 s"):
        read_rows(table([cells[1], [soft_event("car", 0, 1, 0.5), soft_event("car", 0.5, 2, 1)]], SOFT), "label")


def brute_force(given: list[Event], classes: list[str], step: float, steps: int, start: float, shift: float, duration: float | None):
    """Targets by counting moments, 10,000 a second: each is rolled, and then looked up in the events."""
    rate = 10_000
    targets = np.zeros((steps, len(classes)))
    moments = (np.arange(round(steps * step * rate)) + 0.5) / rate
    times = moments - shift if duration is None else np.where(moments < duration, (moments - shift) % duration, -1e9)
    times = times + start
    for code, label in enumerate(classes):
        heard = np.zeros(len(times), bool)
        for name, onset, offset in given:
            heard |= (name == label) & (times >= onset) & (times < offset)
        targets[:, code] = heard.reshape(steps, -1).mean(1)
    return targets


@pytest.mark.parametrize("duration", [None, 10.0, 7.3])
@pytest.mark.parametrize(("start", "shift"), [(0.0, 0.0), (2.5, 0.0), (0.0, 3.3), (0.0, -3.3), (1.7, 6.1), (0.0, 23.45)])
@pytest.mark.parametrize("step", [0.16, 0.04, 1.0])
def test_step_targets_are_the_covered_fractions(step, start, shift, duration):
    generator = np.random.default_rng(1)
    onsets, lengths = generator.integers(0, 9_000, 9) / 1000, generator.integers(1, 4_000, 9) / 1000
    cells = [event("abc"[k % 3], onset, onset + length) for k, (onset, length) in enumerate(zip(onsets, lengths))]
    labels = read_rows(table([[event("a", 0, 1)], cells], EVENTS), "label").labels.encode(["a", "b", "c"])
    steps = int(10 / step)
    targets = labels.step_targets(1, step, steps, shift, duration, start)
    assert (targets.dtype, targets.shape) == (np.float32, (steps, 3))
    assert targets.any() == (duration is not None or shift < 20)
    given = [Event(**one) for one in cells]
    np.testing.assert_allclose(targets, brute_force(given, ["a", "b", "c"], step, steps, start, shift, duration), atol=1e-6)


def test_a_step_that_is_wholly_covered_has_target_one():
    labels = read_rows(table([[event("a", 0.0, 0.1), event("a", 0.1, 0.3), event("a", 0.3, 10.0)]], EVENTS), "label").labels
    np.testing.assert_array_equal(labels.step_targets(0, 0.04, 251)[:, 0], [*[1.0] * 250, 0.0])


def test_lists_of_something_else_are_no_events():
    with pytest.raises(UserError, match="but an event needs label, onset and offset"):
        read_rows(table([[{"label": "a", "start": 1.0}]]), "label")


# --- what a table tells


MANY = named_labels([["b"], ["a", "b"], [], ["b", "c"], ["c"]], multi_label=True)


def test_counts_classes_and_targets():
    assert (MANY.names, MANY.counts().tolist(), MANY.occurring()) == (["b", "a", "c"], [3, 1, 2], ["a", "b", "c"])
    encoded = MANY.encode(["a", "b", "c", "d"])
    np.testing.assert_array_equal(encoded.one_hot([1, 2, 4]), [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    np.testing.assert_array_equal(encoded.one_hot(3), [0, 1, 1, 0])
    assert encoded.one_hot(3).dtype == np.float32
    assert encoded.counts().tolist() == [1, 3, 2, 0]
    with pytest.raises(ValueError, match="take one_hot"):
        encoded.indices()
    single = named_labels([["b"], ["a"]], multi_label=False).encode(["a", "b"])
    assert (single.indices().tolist(), single.indices().dtype) == ([1, 0], np.int64)


def test_a_label_that_is_none_of_the_classes_is_named_with_its_clip():
    with pytest.raises(UserError, match="3.wav is labelled 'c', which is none of the 2 classes: a, b"):
        read_rows(table([["b"], ["a", "b"], [], ["b", "c"]]), "label").encode(["a", "b"])
    with pytest.raises(UserError, match=r"0.wav is labelled 'e\\u0301', and a class is '\\xe9': they look the same, write both"):
        read_rows(table([["e\u0301"]]), "label").encode(["a", "\xe9"])


def test_weights_are_those_of_the_targets():
    targets = MANY.one_hot(range(5)).astype(np.float64)
    weights = targets @ (1 / targets.sum(0))
    np.testing.assert_allclose(MANY.balanced_weights(), weights / weights.sum(), rtol=1e-12)
    np.testing.assert_allclose(MANY.balanced_weights(), np.array([2, 8, 0, 5, 3]) / 18, rtol=1e-12)


def test_the_hash_is_of_everything_that_labels_say():
    others = [
        MANY.select([0, 1, 2, 4, 3]),
        MANY.select([0, 1, 2, 3]),
        named_labels([["b"], ["a", "b"], [], ["b", "c"], ["d"]], multi_label=True),
        named_labels([["b"], ["a", "b"], [], ["b", "c"], ["c"]], multi_label=False),
    ]
    assert MANY.digest() == MANY.select(range(5)).digest()
    assert len({labels.digest() for labels in (MANY, *others)}) == 5
    times = [read_rows(table([[event("a", 0, end)]], EVENTS), "label").labels.digest() for end in (1.0, 2.0)]
    assert times[0] != times[1]


def test_classes_that_training_clips_define():
    assert choose_classes(MANY) == ["a", "b", "c"]
    assert choose_classes(read_rows(table([2, 0, 1], NAMES), "label").labels) == ["hum", "hiss", "click"]
    with pytest.raises(UserError, match="no training clip has the class hiss"):
        choose_classes(read_rows(table([2, 0], NAMES), "label").labels)
    with pytest.raises(UserError, match=r"the training clips have 1 class \(a\)"):
        choose_classes(read_rows(table(["a", "a"]), "label").labels)
    with pytest.raises(UserError, match="no clip of the evaluation has a label"):
        check_has_labels(MANY.select([2]))


def test_names_of_folds():
    assert fold_names([1, 1.0, "1", "01", "1.0", 2.5, "a", " b ", "", None, float("nan"), "1e3"]) == [
        *("1", "1", "1", "1", "1", "2.5", "a", "b", None, None, None, "1e3"),
    ]


@pytest.mark.parametrize("kind", ["joined", "lists"])
def test_200_000_rows_are_read_at_once(kind):
    """Labels as AudioSet's, 527 classes and about two a clip; two million take ten times as long."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 4, 200_000)
    codes = generator.integers(0, 527, lengths.sum())
    lists = pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]), pa.array(codes))
    if kind == "joined":
        words = pa.array([f"class {i}" for i in range(527)]).take(pa.array(codes))
        texts = [",".join(words) for words in pa.ListArray.from_arrays(lists.offsets, words).to_pylist()]
        reader = LabelReader("label", ",", None, pa.string())
        cells = pa.array(texts)
    else:
        reader = LabelReader("label", None, [f"class {i}" for i in range(527)], lists.type)
        cells = lists
    tracemalloc.start()
    start = time.process_time()  # other programs take time by the clock
    labels = reader.read(cells, str)
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert len(labels) == 200_000
    for i in (0, 77_777, 199_999):
        assert labels[i] == list(dict.fromkeys(f"class {code}" for code in codes[lists.offsets[i].as_py() : lists.offsets[i + 1].as_py()]))
    assert labels.encode([f"class {i}" for i in range(527)]).counts().sum() == len(labels.codes)
