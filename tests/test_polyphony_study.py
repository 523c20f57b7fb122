"""The study of overlapping sounds: variants at equal cost, sets of speakers and instruments, probes of clips and of time steps, tables."""

import json
import sys
from collections import Counter
from pathlib import Path

import av
import datasets
import numpy as np
import polyphony
import pytest
import sets
import soundfile
from conftest import noise, tiny_config
from scipy.stats import ttest_1samp
from sklearn.metrics import average_precision_score

from transformers_sslam import PRETRAINING_STAGES, SSLAMConfig, SSLAMFeatureExtractor, SSLAMForPreTraining, SSLAMModel
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import fold_values
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.features import Features
from transformers_sslam.polyphony.benchmark import BenchmarkSettings, make_benchmark
from transformers_sslam.polyphony.render import MixtureSettings
from transformers_sslam.pretraining.monitoring import training_flops_per_clip


NETWORK = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_length": 64},
    **{"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_groups": 8, "num_views": 2},
}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def write_gsm(path: Path, seconds: float, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds, seed=seed, sampling_rate=8000), 8000, format="RAW", subtype="GSM610")


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Three prompts of each voice, and what is left out: a beep, silence, one too short, one too long, one of two names."""
    folders = [folder for names in sets.VOICES.values() for folder in names]
    for number, folder in enumerate(folders):
        root = tmp_path / "sounds" / folder
        for i, name in enumerate(("digits/1", "letters/a", "goodbye")):
            write_gsm(root / f"{name}.gsm", 0.5 + 0.1 * i, seed=10 * number + i)
        for name, seconds in (("beep", 0.5), ("silence/1", 0.5), ("digits/short", 0.2), ("long", 5.5)):
            write_gsm(root / f"{name}.gsm", seconds, seed=10 * number + 5)
        (root / "again.gsm").write_bytes((root / "goodbye.gsm").read_bytes())
    return tmp_path / "sounds"


def test_the_set_of_speakers_has_each_prompt_in_one_fold_and_only_speech(prompts, tmp_path):
    clips = list(sets.speakers(prompts))
    assert Counter(clip.label for clip in clips) == {voice: 3 * len(folders) for voice, folders in sets.VOICES.items()}
    assert {clip.recording for clip in clips} == {"digits/1", "letters/a", "again"}
    assert all(len({clip.fold for clip in clips if clip.recording == prompt}) == 1 for prompt in ("digits/1", "letters/a", "again"))
    assert sets.write_set(iter(clips), tmp_path / "set") == len(clips) == 24
    splits = open_splits(str(tmp_path / "set"))
    assert set(fold_values(splits, "fold")) == {clip.fold for clip in clips} <= {1, 2, 3, 4, 5}
    waveform, rate = soundfile.read(tmp_path / "set" / f"{clips[0].name}.flac", dtype="float32")
    assert rate == 8000
    np.testing.assert_allclose(waveform, clips[0].waveform, atol=2**-15)
    with pytest.raises(UserError, match="not empty|exists"):
        sets.write_set(iter(clips), tmp_path / "set")


def test_a_voice_whose_package_is_not_installed_is_named(prompts):
    for file in (prompts / "fr").rglob("*.gsm"):
        file.unlink()
    with pytest.raises(UserError, match="no prompts of armelle in fr: install the packages"):
        list(sets.speakers(prompts))


class Synthesizer:
    """Of FluidSynth what the script uses: a sine of the note, twice as loud on the left, that sounds on until `system_reset`."""

    def __init__(self, missing: int | str | None = None, silent: int | None = None):
        self.sounding, self.program, self.missing, self.silent = [], None, missing, silent
        self.programs: list[int] = []  # all that were chosen

    def sfload(self, path: str) -> int:
        return -1 if "absent" in path else 7

    def program_select(self, channel: int, soundfont: int, bank: int, program: int) -> int:
        assert soundfont == 7
        if channel == sets.DRUM_CHANNEL:
            assert bank == 128
            return -1 if self.missing == "drums" else 0
        assert bank == 0
        self.program = program
        self.programs.append(program)
        return -1 if program == self.missing else 0

    def noteon(self, channel: int, pitch: int, velocity: int) -> None:
        if (self.program, pitch) != (40, 36) and self.program != self.silent:  # a violin has no such note
            self.sounding.append(pitch)

    def noteoff(self, channel: int, pitch: int) -> None: ...

    def system_reset(self) -> None:
        self.sounding, self.program = [], None

    def get_samples(self, count: int) -> np.ndarray:
        times = np.arange(count) / sets.NOTE_RATE
        mono = sum((np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * times) for pitch in self.sounding), np.zeros(count))
        return np.round(6000 * np.stack((1.5 * mono, 0.5 * mono), axis=1)).astype(np.int16).ravel()


def test_the_set_of_instruments_has_single_notes_and_every_instrument_in_every_fold():
    clips = list(sets.instruments(Synthesizer(), "any.sf2"))
    assert len(clips) == len(sets.INSTRUMENTS) * len(sets.PITCHES) - 1
    assert {(clip.label, clip.fold) for clip in clips} == {(name, fold) for name in sets.INSTRUMENTS.values() for fold in range(1, 6)}
    assert all(len({clip.fold for clip in clips if clip.name.endswith(f"-{pitch:03d}")}) == 1 for pitch in sets.PITCHES)
    for clip in clips[:: len(sets.PITCHES) + 1]:
        assert clip.waveform.shape == (64_000,)
        spectrum = np.abs(np.fft.rfft(clip.waveform[:16_000]))  # a bin is 1 Hz
        assert spectrum.argmax() == pytest.approx(440 * 2 ** ((int(clip.name[-3:]) - 69) / 12), abs=1)
        assert np.abs(clip.waveform).max() == pytest.approx(6000 / 2**15, rel=0.01)
    for fold in range(1, 6):
        pitches = {int(clip.name[-3:]) % 12 for clip in clips if clip.fold == fold}
        assert len(pitches) == 4  # not octaves of one note, whose partials coincide
    for synthesizer, file, message in (
        (Synthesizer(), "absent.sf2", "absent.sf2 is not a readable soundfont"),
        (Synthesizer(missing=42), "any.sf2", r"any.sf2 has no program 42 \(cello\)"),
        (Synthesizer(silent=46), "any.sf2", "any.sf2 has no note of harp that sounds"),
    ):
        with pytest.raises(UserError, match=message):
            list(sets.instruments(synthesizer, file))


def write_g722(path: Path, seconds: float, pitch: float) -> None:
    """A sine, coded as the wideband prompts are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("adpcm_g722", rate=16_000, layout="mono")
        samples = (8000 * np.sin(2 * np.pi * pitch * np.arange(round(16_000 * seconds)) / 16_000)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


def test_speech_has_each_synthetic_voice_in_one_fold_and_each_prompt_of_the_person_once(tmp_path, monkeypatch):
    commands = []

    def speak(command):
        commands.append(command)
        return np.full(8 * 22_050, 0.5, np.float32), 22_050

    monkeypatch.setattr(sets, "speak", speak)
    monkeypatch.setattr(sets, "installed_voices", lambda: {"rms", *sets.FLITE_VOICES})
    pitches = {300 + 320 * number for number in range(20)}
    for pitch in pitches:
        write_g722(tmp_path / sets.PERSON / "digits" / f"{pitch}.g722", 1.0, pitch)
    clips = list(sets.speech(tmp_path))
    synthetic, person = [clip for clip in clips if clip.sampling_rate == 22_050], [clip for clip in clips if clip.sampling_rate == 16_000]
    assert {clip.label for clip in clips} == {"speech"}
    assert Counter(clip.recording for clip in synthetic) == {**dict.fromkeys(sets.LANGUAGES, 3), **dict.fromkeys(sets.FLITE_VOICES, 6)}
    assert all(len({clip.fold for clip in synthetic if clip.recording == voice}) == 1 for voice in (*sets.LANGUAGES, *sets.FLITE_VOICES))
    assert {clip.waveform.shape for clip in synthetic} == {(5 * 22_050,)}
    assert {clip.fold for clip in clips if clip.recording in sets.FLITE_VOICES} == {1, 2, 3, 4}
    assert len({command[command.index("-t") + 1] for command in commands if command[0] == "flite"}) == 24  # never the same numbers twice
    # 1 s of a prompt and a pause of .1 to .5 s: four fit, the fourth or fifth is cut; of 20 prompts that is four or five clips.
    assert len(person) in (4, 5)
    assert [clip.fold for clip in person] == [1, 2, 3, 4, 1][: len(person)]
    assert {clip.waveform.shape for clip in person} == {(80_000,)}
    spectra = [np.abs(np.fft.rfft(clip.waveform[:16_000])) for clip in person]  # a bin is 1 Hz
    first = {int(spectrum.argmax()) for spectrum in spectra}
    assert len(first) == len(person)  # no prompt in two clips
    assert first <= pitches  # decoded as G.722 at 16 kHz
    assert all(clip.waveform[2000:12_000].std() == pytest.approx(8000 / 2**15 / np.sqrt(2), rel=0.1) for clip in person)
    write_g722(tmp_path / "beeps" / sets.PERSON / "beep.g722", 1.0, 1000)
    with pytest.raises(UserError, match="has no prompts: install asterisk-core-sounds-ru-g722"):
        list(sets.speech(tmp_path / "beeps"))
    monkeypatch.setattr(sets, "installed_voices", lambda: {"awb", "rms", "kal16"})
    with pytest.raises(UserError, match="flite has no voice slt: install"):
        list(sets.speech(tmp_path))


def test_a_program_that_speaks_writes_a_file_and_one_that_cannot_is_named():
    writes = "import sys, numpy, soundfile; soundfile.write(sys.argv[-1], numpy.full(100, 0.25), 8000)"
    waveform, rate = sets.speak([sys.executable, "-c", writes])
    assert (rate, waveform.tolist()) == (8000, [0.25] * 100)
    with pytest.raises(UserError, match="no-such-program cannot speak .*: install the packages"):
        sets.speak(["no-such-program"])
    with pytest.raises(UserError, match="cannot speak .*exit status 3"):
        sets.speak([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="cannot speak .*: install the packages"):
        sets.speak([sys.executable, "-c", ""])  # writes nothing


def test_voices_of_flite_are_those_that_it_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="flite does not start .*: install the packages"):
        sets.installed_voices()
    (tmp_path / "flite").write_text("#!/bin/sh\necho 'Voices available: kal awb_time kal16 awb rms slt '\n")
    (tmp_path / "flite").chmod(0o755)
    assert sets.installed_voices() == {"kal", "awb_time", "kal16", "awb", "rms", "slt"}


def test_tunes_have_instruments_of_one_fold_each_and_no_bells():
    synthesizer = Synthesizer()
    clips = list(sets.tunes(synthesizer, "any.sf2"))
    assert len(clips) == sets.TUNES
    assert Counter(clip.fold for clip in clips) == dict.fromkeys((1, 2, 3, 4), sets.TUNES // 4)
    assert {clip.waveform.shape for clip in clips} == {(80_000,)}
    assert all(np.abs(clip.waveform).max() > 0.1 for clip in clips)
    assert len({clip.waveform.tobytes() for clip in clips}) == len(clips)
    programs = np.array(synthesizer.programs).reshape(-1, 2)
    by_fold = [set(programs[fold::4].ravel()) for fold in range(4)]
    assert all(not by_fold[i] & by_fold[j] for i in range(4) for j in range(i))
    assert 14 not in sets.TUNE_PROGRAMS  # tubular bells, like church bells
    for file, missing, message in (
        ("absent.sf2", None, "absent.sf2 is not a readable"),
        ("any.sf2", programs[0, 1], "has no program"),
        ("any.sf2", "drums", "any.sf2 has no drums"),
    ):
        with pytest.raises(UserError, match=message):
            list(sets.tunes(Synthesizer(missing=missing), file))


def test_a_tune_is_in_a_scale_and_each_of_its_notes_ends():
    for seed in range(8):
        played = sets.compose(np.random.default_rng(seed), 0.25)
        assert {channel for _, channel, _, _ in played} in ({0, 1}, {0, 1, sets.DRUM_CHANNEL})
        for channel, pitch in {(channel, pitch) for _, channel, pitch, _ in played}:
            notes = sorted((instant, velocity > 0) for instant, *which, velocity in played if which == [channel, pitch])
            assert [begins for _, begins in notes] == [True, False] * (len(notes) // 2)
        assert all(0 <= instant <= sets.OTHER_SECONDS for instant, *_ in played)
        melody = {pitch % 12 for _, channel, pitch, _ in played if channel < 2}
        assert any(melody <= {(root + step) % 12 for step in scale} for root in range(12) for scale in sets.SCALES)


def test_variants_differ_in_what_they_see_and_cost_the_same(tmp_path):
    SSLAMForPreTraining(tiny_config(**{**PRETRAINING_STAGES[1], **NETWORK})).save_pretrained(tmp_path / "stage1")
    SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / "stage1")
    stage2 = {
        **{"output_dir": "x", "stage": 2, "data": {"sources": [{"kind": "folder", "path": "x"}]}, "feature_extractor": {"max_length": 64}},
        **{"model_config": {"num_views": 4, "unmixed_span_length": 16}, "max_steps": 1000, "warmup_steps": 10},
    }
    (tmp_path / "stage2.json").write_text(json.dumps(stage2))
    cost, fields = {}, {}
    for variant in polyphony.VARIANTS:
        changes = polyphony.variant_settings(str(tmp_path / "stage2.json"), {}, variant, tmp_path / "stage1")
        steps = changes.pop("max_steps")
        fields[variant] = {name.removeprefix("model_config."): value for name, value in changes.items()}
        config = SSLAMConfig.from_pretrained(tmp_path / "stage1", **{**PRETRAINING_STAGES[2], **stage2["model_config"], **fields[variant]})
        cost[variant] = steps * training_flops_per_clip(config, 64)
    assert fields == {
        "unmixed": {"use_mixtures": False, "num_views": 8},
        "mixed": {"use_unmixed": False, "source_retention_loss_weight": 0, "num_views": 8},
        "both": {"source_retention_loss_weight": 0, "num_views": 4},
        "retention": {"num_views": 4},
        "three_sources": {"num_sources": 3, "gain_db": [-10, 10], "mixing_partners": "batch", "num_views": 4},
        "mixture_invariant": {"objective": "mixture_invariant", "num_views": 4},
    }
    np.testing.assert_allclose(list(cost.values()), cost["retention"], rtol=5e-4)  # to half an update of a thousand


def test_precision_by_number_of_events_is_that_of_the_clips_that_have_so_many():
    generator = np.random.default_rng(0)
    scores, targets = generator.standard_normal((60, 4)), (generator.random((60, 4)) < 0.4).astype(np.int64)
    num_events = np.repeat([1, 3, 14], 20)
    targets[num_events == 1, 2] = 0  # a class without positives among these
    found = polyphony.by_events(scores, targets, num_events)
    assert list(found) == ["1", "3", "14", "all"]
    expected = [average_precision_score(targets[num_events == 1, i], scores[num_events == 1, i]) for i in (0, 1, 3)]
    assert found["1"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert found["all"] == pytest.approx(average_precision_score(targets, scores, average="macro"), abs=1e-12)


def test_patches_of_a_step_stand_together():
    patches = np.arange(2 * 12 * 3, dtype=np.float32).reshape(2, 12, 3)  # 12 patches: 3 steps of 4
    features = Features({"patches": patches, "lengths": np.array([12, 8])}, np.arange(2), (1,))
    vectors = polyphony.step_vectors(features, 2, 4)
    assert vectors.shape == (2 * 2, 12)
    np.testing.assert_array_equal(vectors[3], np.arange(36 + 12, 36 + 24))


def test_a_class_sounds_in_a_step_whose_middle_lies_in_an_event():
    class Task:
        classes = ["a", "b"]

    mixtures = polyphony.Mixtures(Task(), np.array([1, 2]), [[(0, 0.25, 0.6)], [(1, 0.0, 0.05), (1, 0.7, 9.0), (0, 0.55, 0.75)]], "")
    targets = mixtures.step_targets(np.array([1, 0]), 4, 0.2)  # middles .1, .3, .5, .7
    np.testing.assert_array_equal(targets.reshape(2, 4, 2)[0], [[0, 0], [0, 0], [0, 0], [1, 1]])
    np.testing.assert_array_equal(targets.reshape(2, 4, 2)[1], [[0, 0], [1, 0], [1, 0], [0, 0]])


def test_a_detectable_difference_is_found_four_times_in_five():
    generator = np.random.default_rng(0)
    for count in (3, 8):
        difference = polyphony.detectable_difference(2.0, count)
        pairs = difference + 2.0 * generator.standard_normal((20_000, count))
        assert (ttest_1samp(pairs, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """The study on clips of half a second, of two seeds and two variants."""
    lines = ["file_name,label,fold"]
    (tmp_path / "clips").mkdir()
    for fold in (1, 2):
        for i, label in enumerate(("hum", "hiss") * 3):
            tone = np.sin(np.arange(8000) * (0.1 + 0.001 * (10 * fold + i))) if label == "hum" else noise(0.5, seed=10 * fold + i)
            soundfile.write(tmp_path / "clips" / f"{fold}-{i}.wav", 0.3 * tone, 16_000)
            lines.append(f"{fold}-{i}.wav,{label},{fold}")
    (tmp_path / "clips" / "metadata.csv").write_text("\n".join(lines))
    make_benchmark(
        BenchmarkSettings(
            data_dir=str(tmp_path / "clips"),
            output_dir=str(tmp_path / "mixtures"),
            **{"fold_column": "fold", "train_folds": [1], "test_folds": [2], "num_events": [1, 2], "train_clips": 8, "test_clips": 6},
            mixing=MixtureSettings(clip_seconds=0.6, event_seconds=0.3, repeat_classes=False),
        )
    )
    run = {"max_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 2, "dataloader_num_workers": 0, "report_to": "none"}
    elsewhere = {"data": {"sources": [{"kind": "folder", "path": "replaced"}]}, "feature_extractor": {"max_length": 64}}
    for stage, fields in ((1, NETWORK), (2, {"num_views": 2, "unmixed_span_length": 16})):
        (tmp_path / f"stage{stage}.json").write_text(json.dumps({"stage": stage, "model_config": fields, **run, **elsewhere}))
    source = {"kind": "audiofolder", "path": str(tmp_path / "clips"), "keep": {"fold": [1]}}
    return [
        f"--sources={json.dumps([source])}",
        f"--tasks={json.dumps({'hums': str(tmp_path / 'mixtures')})}",
        f"--output_dir={tmp_path / 'out'}",
        f"--stage1={tmp_path / 'stage1.json'}",
        f"--stage2={tmp_path / 'stage2.json'}",
        *("--seeds", "0", "1", "--variants", "unmixed", "retention"),
    ]


def test_the_study_in_miniature(arguments, tmp_path, capsys, monkeypatch):
    polyphony.main(arguments)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["0", "1"]
    for record in results.values():
        assert set(record["steps"]) == {"stage1", "unmixed", "retention"}
        assert list(record["precision"]) == ["untrained", "stage1", "unmixed", "retention"]
        for found in record["precision"].values():
            assert set(found["hums"]) == set(polyphony.METHODS)
            assert all(set(values) == {"1", "2", "all"} and 0 < min(values.values()) <= 1 for values in found["hums"].values())
            assert found["hums"]["maximum"]["all"] > 0.8  # a hum and a hiss are told apart by any network
            assert found["hums"]["steps"]["all"] > 0.5
    first, second = (results[seed]["precision"]["untrained"] for seed in "01")
    assert first != second  # of other random weights
    assert "| both + retention (SSLAM) |" in printed
    assert "| gain that 2 seeds find with probability 0.8 |" in printed
    assert (tmp_path / "out" / "gains.png").is_file()

    def again(*_):
        raise AssertionError("a finished step was done again")

    monkeypatch.setattr(polyphony, "probe", again)
    monkeypatch.setattr("steps.PreTrainer", again)
    polyphony.main(arguments)
    assert capsys.readouterr().out == printed


def test_tables_give_means_and_paired_gains_by_task_method_and_number_of_events():
    settings = polyphony.StudySettings(sources=[], tasks={"sounds": "a", "speakers": "b"}, variants=["unmixed", "both"])
    records = {}
    for seed, gain in enumerate((0.01, 0.02, 0.03)):  # 2 points, standard deviation 1; by k 0, but 4 points of one speaker
        base = {"1": 0.5, "all": 0.4 + 0.1 * seed}

        def methods(more: dict[str, float], base: dict[str, float] = base) -> dict[str, dict[str, float]]:
            return {method: {k: value + more.get(k, 0) for k, value in base.items()} for method in polyphony.METHODS}

        plain, better = methods({}), methods({"all": gain})
        precision = {name: {"sounds": plain, "speakers": plain} for name in ("untrained", "stage1", "unmixed")}
        precision["both"] = {"sounds": better, "speakers": methods({"all": gain, "1": 0.04})}
        records[seed] = {"precision": precision}
    text = polyphony.report(settings, records)
    gain = "2.00 ± 1.00 [-0.48, 4.48]"  # t of two degrees of freedom, 4.303, over the root of 3
    assert f"| both (MB-UA-PMA) | 52.0 | {gain} | 52.0 | {gain} | 52.0 | {gain} |" in text
    assert "| unmixed only (MB-UA) | 50.0 | - | 50.0 | - | 50.0 | - |" in text
    assert text.count("| sounds | both (MB-UA-PMA) | 0.0 ± 0.0 [0.0, 0.0] |") == 3
    assert text.count("| speakers | both (MB-UA-PMA) | 4.0 ± 0.0 [4.0, 4.0] |") == 3
    smallest = f"{100 * polyphony.detectable_difference(0.01, 3):.2f}"
    assert text.count(f"| gain that 3 seeds find with probability 0.8 |  | {smallest} |  | {smallest} |  | {smallest} |") == 2
    single = polyphony.report(settings, {0: records[0]})
    assert "| both (MB-UA-PMA) | 41.0 | 1.00 | 41.0 | 1.00 | 41.0 | 1.00 |" in single
    assert "nan" not in single
    assert "find with probability" not in single


def test_settings_that_cannot_be_compared_are_refused():
    for wrong, message in (
        ({"variants": ["both"]}, "variants are both, but must be different ones with unmixed"),
        ({"variants": ["unmixed", "both", "both"]}, "must be different ones"),
        ({"variants": ["mixit"]}, "names mixit"),
        ({"tasks": {}}, "tasks or seeds are empty"),
    ):
        with pytest.raises(UserError, match=message):
            polyphony.StudySettings(**{"sources": [], "tasks": {"a": "b"}, **wrong})


def test_events_are_those_of_the_clips_with_the_labels(arguments, tmp_path):
    mixtures = polyphony.read_mixtures(str(tmp_path / "mixtures"), 16_000)
    assert len(mixtures.spans) == len(mixtures.task.targets) == len(mixtures.num_events) == 28
    for spans, targets, number in zip(mixtures.spans, mixtures.task.targets, mixtures.num_events):
        assert {label for label, *_ in spans} == set(np.flatnonzero(targets))
        assert len(spans) == number
        assert all(0 <= onset < offset <= 0.6 for _, onset, offset in spans)


def test_mixtures_that_are_none_or_longer_than_the_model_takes_are_refused(arguments, tmp_path):
    mixtures = polyphony.read_mixtures(str(tmp_path / "mixtures"), 16_000)
    model = SSLAMModel(tiny_config(max_length=48))
    with pytest.raises(UserError, match=r"a mixture has 58 frames \(10 ms\), but the model takes 48: mix shorter clips"):
        polyphony.probe(model, SSLAMFeatureExtractor(max_length=48), mixtures)
    rows = open_splits(str(tmp_path / "mixtures"), "parquet")
    for name, split in rows.items():
        split.remove_columns("events").to_parquet(tmp_path / "others" / f"{name}-0.parquet")
    with pytest.raises(UserError, match="others has no column events: give a folder that `sslam mix` wrote"):
        polyphony.read_mixtures(str(tmp_path / "others"), 16_000)


def test_a_damaged_result_is_computed_again(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(polyphony, "probe", lambda *_: {"mean": {"all": 0.5}})
    model, extractor = SSLAMModel(tiny_config()), SSLAMFeatureExtractor(max_length=64)
    file = tmp_path / "probes" / "a.json"
    task = str(tmp_path / "mixtures")
    assert polyphony.probe_once(model, extractor, task, file) == {"mean": {"all": 0.5}}
    monkeypatch.setattr(polyphony, "probe", lambda *_: {"mean": {"all": 0.7}})
    assert polyphony.probe_once(model, extractor, task, file) == {"mean": {"all": 0.5}}
    file.write_text(file.read_text()[:20])
    assert polyphony.probe_once(model, extractor, task, file) == {"mean": {"all": 0.7}}
    monkeypatch.setattr(polyphony, "PENALTY", 1.0)
    monkeypatch.setattr(polyphony, "probe", lambda *_: {"mean": {"all": 0.9}})
    assert polyphony.probe_once(model, extractor, task, file) == {"mean": {"all": 0.9}}
