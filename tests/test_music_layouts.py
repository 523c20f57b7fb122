"""Spoken digits and instruments as their authors distribute them, each built in miniature: labels, splits, and what is rejected."""

import json
from pathlib import Path

import pytest
import soundfile
from conftest import noise
from test_layouts import edit, table, write_clip, write_speech_commands, write_text

from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.published import DIGITS, WORDS_V1, WORDS_V2
from transformers_sslam.audio.published_music import OPENMIC_LABELS
from transformers_sslam.errors import UserError


def columns(rows, *names: str) -> dict[str, tuple]:
    """By name of the clip the values of some columns."""
    return {Path(row["audio"]["path"]).name: tuple(row[name] for name in names) for row in rows}


# Free Spoken Digit Dataset


@pytest.fixture
def fsdd(tmp_path) -> Path:
    for name in ("0_theo_0", "0_theo_4", "0_theo_5", "7_theo_49", "0_george_0", "7_george_10"):
        write_clip(tmp_path / "recordings" / f"{name}.wav")
    write_text(tmp_path / "metadata.py", "metadata = {}")
    return tmp_path


def test_recordings_0_to_4_of_the_spoken_digits_are_the_test(fsdd):
    splits = open_splits(fsdd, "fsdd")
    assert {name: table(rows) for name, rows in splits.items()} == {
        "train": {"0_theo_5.wav": "0", "7_george_10.wav": "7", "7_theo_49.wav": "7"},
        "test": {"0_george_0.wav": "0", "0_theo_0.wav": "0", "0_theo_4.wav": "0"},
    }
    assert table(splits["test"], "speaker") == {"0_george_0.wav": "george", "0_theo_0.wav": "theo", "0_theo_4.wav": "theo"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "recordings").rename(root / "clips"), "holds clips/, metadata.py, but expected is the Free Spoken Digit"),
        (lambda root: [clip.unlink() for clip in (root / "recordings").iterdir()], "recordings is empty, but expected is"),
        (lambda root: write_clip(root / "recordings" / "10_theo_1.wav"), r"not named DIGIT_SPEAKER_INDEX.wav: 1 \(10_theo_1.wav\)"),
        (lambda root: write_clip(root / "recordings" / "more" / "1_theo_1.wav"), r"INDEX.wav: 1 \(more/1_theo_1.wav\)"),
        (lambda root: write_clip(root / "recordings" / "1_theo_x.flac"), r"INDEX.wav: 1 \(1_theo_x.flac\)"),
    ],
)
def test_what_is_not_the_spoken_digits_is_rejected(fsdd, damage, message):
    damage(fsdd)
    with pytest.raises(UserError, match=message):
        open_splits(fsdd, "fsdd")


# Speech Commands, digits alone


@pytest.mark.parametrize(("subset", "words"), [("v1_digits", WORDS_V1), ("v2_digits", WORDS_V2)])
def test_digits_of_speech_commands_keep_the_official_lists_and_have_speakers(tmp_path, subset, words):
    splits = open_splits(write_speech_commands(tmp_path, words), "speech_commands", subset=subset)
    for name, speaker in (("train", "a"), ("validation", "b"), ("test", "c")):
        rows = splits[name]
        assert rows.features["label"].names == sorted(DIGITS)
        assert {Path(row["audio"]["path"]).parent.name for row in rows} == {*DIGITS}
        assert {row["speaker"] for row in rows} == {speaker}
        assert [rows.features["label"].names[row["label"]] for row in rows] == [Path(row["audio"]["path"]).parent.name for row in rows]


def test_digits_are_read_from_the_archive_of_their_version(tmp_path):
    write_speech_commands(tmp_path, WORDS_V1)
    with pytest.raises(UserError, match="are not the 35 expected: 5 differ, backward"):
        open_splits(tmp_path, "speech_commands", subset="v2_digits")
    write_clip(tmp_path / "one" / "d_0.wav")
    with pytest.raises(UserError, match="one/d_0.wav does not tell its speaker, as SPEAKER_nohash_0.wav does"):
        open_splits(tmp_path, "speech_commands", subset="v1_digits")


# NSynth


NOTES = {
    "nsynth-train": [
        ("guitar_acoustic_010", "guitar", "acoustic", 60, 100),
        ("synth_lead_synthetic_000", "synth_lead", "synthetic", 21, 25),
    ],
    "nsynth-test": [("organ_electronic_007", "organ", "electronic", 108, 127), ("guitar_acoustic_014", "guitar", "acoustic", 60, 50)],
}


@pytest.fixture
def nsynth(tmp_path) -> Path:
    for folder, notes in NOTES.items():
        examples = {}
        for instrument, family, source, pitch, velocity in notes:
            name = f"{instrument}-{pitch:03d}-{velocity:03d}"
            examples[name] = {
                **{"note_str": name, "instrument_str": instrument, "instrument_family_str": family, "instrument_source_str": source},
                **{"pitch": pitch, "velocity": velocity, "sample_rate": 16_000, "qualities_str": ["dark"]},
            }
            write_clip(tmp_path / folder / "audio" / f"{name}.wav")
        write_text(tmp_path / folder / "examples.json", json.dumps(examples))
    return tmp_path


def test_notes_have_family_instrument_source_pitch_and_velocity(nsynth):
    splits = open_splits(nsynth, "nsynth")
    assert list(splits) == ["train", "test"]  # as many as were downloaded
    assert splits["train"].features["label"].names[3] == "guitar"
    assert table(splits["train"]) == {"guitar_acoustic_010-060-100.wav": "guitar", "synth_lead_synthetic_000-021-025.wav": "synth_lead"}
    assert columns(splits["test"], "label", "instrument", "source", "pitch", "velocity") == {
        "guitar_acoustic_014-060-050.wav": (3, "guitar_acoustic_014", "acoustic", 60, 50),
        "organ_electronic_007-108-127.wav": (6, "organ_electronic_007", "electronic", 108, 127),
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: [(root / name).rename(root / name[7:]) for name in NOTES],
            "holds test/, train/, but expected are some of nsynth-train/",
        ),
        (lambda root: (root / "nsynth-test" / "examples.json").unlink(), "there is no .*nsynth-test/examples.json"),
        (lambda root: write_text(root / "nsynth-test" / "examples.json", "["), "examples.json is damaged: it is not JSON"),
        (lambda root: write_clip(root / "nsynth-test" / "audio" / "x.wav"), r"that examples.json does not list: 1 \(x\)"),
        (
            lambda root: (root / "nsynth-train" / "audio" / "guitar_acoustic_010-060-100.wav").unlink(),
            r"that are not in .*nsynth-train/audio: 1 \(guitar_acoustic_010-060-100\)",
        ),
        (
            lambda root: edit(
                root / "nsynth-test" / "examples.json", '"instrument_family_str": "organ"', '"instrument_family_str": "harp"'
            ),
            "says that organ_electronic_007-108-127 is of the family 'harp', which is none of NSynth's",
        ),
        (
            lambda root: edit(root / "nsynth-test" / "examples.json", '"pitch": 108, ', ""),
            "lacks 'pitch' of the note organ_electronic_007-108-127",
        ),
    ],
)
def test_what_is_not_nsynth_is_rejected(nsynth, damage, message):
    damage(nsynth)
    with pytest.raises(UserError, match=message):
        open_splits(nsynth, "nsynth")


# IRMAS


IRMAS_CODES = ("cel", "cla", "flu", "gac", "gel", "org", "pia", "sax", "tru", "vio", "voi")


@pytest.fixture
def irmas(tmp_path) -> Path:
    for code in IRMAS_CODES:
        write_clip(tmp_path / "IRMAS-TrainingData" / code / f"[{code}][dru][pop_roc]0001__1.wav")
    write_clip(tmp_path / "IRMAS-TrainingData" / "cla" / "008__[cla][nod][cla]0058__2.wav")
    write_clip(tmp_path / "IRMAS-TrainingData" / "cla" / "[cla][cla]0059__1.wav")
    write_clip(tmp_path / "IRMAS-TestingData-Part1" / "Part1" / "01 - Song-1.wav")
    write_text(tmp_path / "IRMAS-TestingData-Part1" / "Part1" / "01 - Song-1.txt", "voi\t", "gel\t")
    return tmp_path


def test_excerpts_have_their_instruments_and_what_their_names_say(irmas):
    splits = open_splits(irmas, "irmas")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 13, "test": 1}
    train = table(splits["train"], "labels")
    assert (train["[gac][dru][pop_roc]0001__1.wav"], train["[cla][cla]0059__1.wav"]) == (["acoustic guitar"], ["clarinet"])
    assert table(splits["test"], "labels") == {"01 - Song-1.wav": ["voice", "electric guitar"]}
    found = columns(splits["train"], "genre", "drums", "recording")
    assert found["[gac][dru][pop_roc]0001__1.wav"] == ("pop_roc", True, "gac/[gac][dru][pop_roc]0001")
    assert found["008__[cla][nod][cla]0058__2.wav"] == ("cla", False, "cla/008__[cla][nod][cla]0058")
    assert found["[cla][cla]0059__1.wav"] == ("cla", None, "cla/[cla][cla]0059")
    assert list(open_splits(irmas / "IRMAS-TestingData-Part1", "irmas")) == ["test"]
    assert list(open_splits(irmas / "IRMAS-TrainingData", "irmas")) == ["train"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: [path.unlink() for path in root.rglob("*.*") if path.is_file()],
            "IRMAS-TrainingData/cel has no excerpt: extract the archive again",
        ),
        (lambda root: (root / "IRMAS-TrainingData" / "voi").rename(root / "IRMAS-TrainingData" / "voice"), r"2 \(voi, voice\) differ"),
        (
            lambda root: (root / "IRMAS-TrainingData").rename(root / "training"),
            r"0001__1.wav has no \[cel\].* beside it with its instruments",
        ),
        (
            lambda root: write_text(root / "IRMAS-TestingData-Part1" / "Part1" / "01 - Song-1.txt", "voi", "dru"),
            "Song-1.txt holds 'voi dru', but a line for each instrument",
        ),
        (
            lambda root: (root / "IRMAS-TestingData-Part1" / "Part1" / "01 - Song-1.txt").write_bytes(b"\xe9"),
            "Song-1.txt cannot be read .* it must be text in UTF-8",
        ),
        (lambda root: write_text(root / "IRMAS-TestingData-Part1" / "Part1" / "01 - Song-1.txt"), "Song-1.txt holds '', but a line"),
    ],
)
def test_what_is_not_irmas_is_rejected(irmas, damage, message):
    damage(irmas)
    with pytest.raises(UserError, match=message):
        open_splits(irmas, "irmas")


def test_a_folder_without_excerpts_is_not_irmas(tmp_path):
    write_text(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="holds notes.txt, but expected is IRMAS-TrainingData/"):
        open_splits(tmp_path, "irmas")


# OpenMIC-2018


@pytest.fixture
def openmic(tmp_path) -> Path:
    """Six training and four test clips of three instruments; of each clip, one or two are known."""
    root = tmp_path / "openmic-2018"
    lines, names = ["sample_key,instrument,relevance,num_responses"], ["banjo", "flute", "voice"]
    keys = [f"{i:06}_{100 * i}" for i in range(10)]
    for i, key in enumerate(keys):
        (root / "audio" / key[:3]).mkdir(parents=True, exist_ok=True)
        soundfile.write(root / "audio" / key[:3] / f"{key}.ogg", noise(0.6, seed=i), 16_000)
        lines.append(f"{key},{names[i % 3]},{0.9 if i % 2 else 0.1},3")
        lines.append(f"{key},{names[(i + 1) % 3]},{0.5 if i % 4 else 0.49},3")
    (root / "openmic-2018-aggregated-labels.csv").write_text("\n".join(lines) + "\n")
    (root / "class-map.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (root / "partitions").mkdir()
    for split, listed in (("train", keys[:6]), ("test", keys[6:])):
        (root / "partitions" / f"split01_{split}.csv").write_text("\n".join(listed) + "\n")
    return root


def test_excerpts_of_openmic_are_present_absent_or_unknown(openmic):
    splits = open_splits(openmic, "openmic")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "test": 4}
    assert columns(splits["test"], "labels", "unknown_labels", "recording") == {
        "000006_600.ogg": ([1], [2], "000006"),
        "000007_700.ogg": ([1, 2], [0], "000007"),
        "000008_800.ogg": ([], [1], "000008"),
        "000009_900.ogg": ([0, 1], [2], "000009"),
    }
    assert splits["train"].features["unknown_labels"] == splits["train"].features["labels"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "class-map.json").unlink(), "there is no .*class-map.json: extract the archive again"),
        (lambda root: write_text(root / "class-map.json", "[1]"), "class-map.json is damaged"),
        *(
            (
                lambda root, voice=voice: edit(root / "class-map.json", '"voice": 2', f'"voice": {voice}'),
                "class-map.json must give each instr",
            )
            for voice in ('"2"', "1", "null")
        ),
        (lambda root: (root / OPENMIC_LABELS).unlink(), "there is no .*aggregated-labels.csv"),
        (
            lambda root: edit(root / OPENMIC_LABELS, "000003_300,banjo", "000003_300,tuba"),
            "line 8 .* has the instrument 'tuba', which is none",
        ),
        (
            lambda root: edit(root / OPENMIC_LABELS, "000002_200,voice,0.1", "000002_200,voice,1.1"),
            "line 6 .* relevance '1.1', but a number",
        ),
        (
            lambda root: edit(root / OPENMIC_LABELS, "000002_200,voice,0.1", "000002_200,banjo,0.1"),
            "'banjo' of 000002_200 again, with another",
        ),
        (lambda root: (root / "audio" / "000" / "000007_700.ogg").unlink(), r"that are not in .*audio: 1 \(000007_700\)"),
        (lambda root: write_clip(root / "audio" / "000" / "x.wav"), r"csv does not list: 1 \(x\)"),
        (lambda root: (root / "partitions" / "split01_test.csv").write_bytes(b"\xe9"), "split01_test.csv cannot be read .* text in UTF-8"),
        (lambda root: (root / "partitions" / "split01_test.csv").unlink(), "there is no .*split01_test.csv"),
        (lambda root: write_text(root / "partitions" / "split01_test.csv", "000001_100"), r"list clips twice: 1 \(000001_100\)"),
        (lambda root: write_text(root / "partitions" / "split01_test.csv", "000006_600"), r"or in its labels: 3 \(000007_700, "),
    ],
)
def test_what_is_not_openmic_is_rejected(openmic, damage, message):
    damage(openmic)
    with pytest.raises(UserError, match=message):
        open_splits(openmic, "openmic")
