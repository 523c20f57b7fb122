"""Studies: steps that are done once, and comparisons at equal cost."""

import csv
import importlib.util
import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import soundfile
import steps
import torch
from conftest import noise, tiny_config
from safetensors.torch import load_file
from steps import copy_clips, epochs_of_equal_cost, pretrain_on_folds, read_records

from transformers_sslam import (
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioFrameClassification,
    SSLAMForPreTraining,
    SSLAMModel,
    files,
)
from transformers_sslam.audio.decode import load_waveform
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import read_rows
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.intervals import summarize
from transformers_sslam.evaluation.scored_events import ScoredEvents
from transformers_sslam.events_sslam import EventSettings
from transformers_sslam.finetuning import repeats
from transformers_sslam.finetuning.repeats import fine_tune_once
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.settings import load_yaml


pytestmark = pytest.mark.usefixtures("without_drawing")
SCRIPTS = Path(__file__).parents[1] / "scripts" / "studies"
FOLDS = (1, 2, 3)
SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_length": 256},
    **{"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_groups": 8, "num_views": 2, "unmixed_span_length": 16},
}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clips(tmp_path) -> Path:
    """Four clips of 0.7 s, 22.05 kHz, of two classes in each of three folds."""
    folder = tmp_path / "clips"
    folder.mkdir()
    lines = ["file_name,label,fold,source"]
    for fold in FOLDS:
        for i, label in enumerate(("hum", "hiss") * 2):
            name, time = f"{fold}-{i}.wav", np.arange(15435) / 22050
            tone = 0.3 * np.sin(2 * np.pi * (200 + 20 * i) * time) if label == "hum" else 0
            soundfile.write(folder / name, noise(0.7, seed=10 * fold + i, sampling_rate=22050) + tone, 22050)
            lines.append(f"{name},{label},{fold},{fold}-{i}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def recipe(tmp_path) -> Path:
    """Two updates of a network of two blocks."""
    path = tmp_path / "stage1.json"  # which is YAML too
    settings = {
        "stage": 1,
        "data": {"sources": [{"kind": "folder", "path": "replaced"}]},
        "feature_extractor": {"max_length": 64},
        "model_config": {name: value for name, value in SIZES.items() if name != "unmixed_span_length"},
        **{"max_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 2, "dataloader_num_workers": 0, "report_to": "none"},
    }
    path.write_text(json.dumps(settings))
    return path


def test_a_copy_of_clips_is_what_a_model_would_decode_and_is_made_once(clips, tmp_path):
    copy = copy_clips(clips, tmp_path / "copy")
    rows = {row["file_name"]: row for row in datasets.load_dataset("csv", data_files=str(copy / "metadata.csv"), split="train")}
    assert len(rows) == 12
    assert rows["00005-2-1.wav"] == {"file_name": "00005-2-1.wav", "label": "hiss", "fold": 2, "source": "2-1"}
    np.testing.assert_array_equal(soundfile.read(copy / "00005-2-1.wav", dtype="float32")[0], load_waveform(clips / "2-1.wav"))
    assert {len(split) for split in open_splits(copy).values()} == {12}  # what else lies there is no clip
    (copy / "00005-2-1.wav").unlink()
    assert copy_clips(clips, tmp_path / "copy") == copy
    assert not (copy / "00005-2-1.wav").exists()


def test_clips_of_one_name_in_two_folders_are_two(tmp_path):
    for label, level in (("hum", 0.1), ("hiss", 0.2)):
        (tmp_path / "clips" / label).mkdir(parents=True)
        soundfile.write(tmp_path / "clips" / label / "1.wav", np.full(16_000, level), 16_000, subtype="FLOAT")
    copy = copy_clips(tmp_path / "clips", tmp_path / "copy")
    (rows,) = open_splits(copy).values()
    labels = (tmp_path / "copy" / "metadata.csv").read_text()
    assert sorted(round(float(load_waveform(row["audio"])[0]), 3) for row in rows) == [0.1, 0.2]
    assert labels.count("-1.wav") == 2


def test_a_copy_of_another_folder_is_refused(clips, tmp_path):
    copy_clips(clips, tmp_path / "copy")
    with pytest.raises(UserError, match=f"copy was copied from {clips} .*, not from {tmp_path / 'copy'} .*: delete it"):
        copy_clips(tmp_path / "copy", tmp_path / "copy")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine was copied from something else"):
        copy_clips(clips, tmp_path / "mine")


def test_a_copy_of_clips_that_changed_since_is_refused(clips, tmp_path):
    copy_clips(clips, tmp_path / "copy")
    table = (clips / "metadata.csv").read_text()
    (clips / "metadata.csv").write_text(table.replace("hiss", "hum", 1))
    with pytest.raises(UserError, match=r"copy was copied from .* \(folder and state of its clips\): delete it"):
        copy_clips(clips, tmp_path / "copy")


def test_splits_become_one_copy(tmp_path):
    for name in ("train/hum/1.wav", "train/hiss/2.wav", "test/hum/3.wav"):
        (tmp_path / "clips" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "clips" / name, np.zeros(1600), 16_000)
    copy = copy_clips(tmp_path / "clips", tmp_path / "copy")
    assert (copy / "metadata.csv").read_text().count(".wav") == 3


def test_of_two_processes_that_want_a_copy_one_makes_it(clips, tmp_path, monkeypatch):
    """Two processes of one study start at the same time; locks of two threads are as those of two processes."""
    write, written, both = soundfile.write, [], threading.Barrier(2)
    monkeypatch.setattr(soundfile, "write", lambda path, *args, **options: [written.append(path), write(path, *args, **options)])
    monkeypatch.setattr(steps, "lock", lambda *args, **options: [both.wait(60), files.lock(*args, **options)][1])
    with ThreadPoolExecutor(2) as pool:
        copies = [pool.submit(copy_clips, clips, tmp_path / "copy") for _ in range(2)]
    assert [copy.result() for copy in copies] == [tmp_path / "copy"] * 2
    assert len(written) == len(list((tmp_path / "copy").glob("*.wav"))) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == [".copy.lock", "clips", "copy"]  # nothing unfinished is left


def test_records_of_other_settings_are_left_out(tmp_path):
    for name, settings in (("a", {"epochs": 1, "changes": ["x"]}), ("b", {"epochs": 2, "changes": ["x"]}), ("c", None)):
        (tmp_path / name).mkdir()
        record = {"accuracy": 1} if settings is None else {"accuracy": 1, "settings": settings}
        (tmp_path / name / "results.json").write_text(json.dumps(record))
    records, others = read_records(tmp_path.glob("*/results.json"), {"epochs": 1, "changes": ["x"]})
    assert list(records) == ["a"]
    assert others == ["b", "c"]


def test_pre_training_after_fine_tuning_has_its_own_precision(clips, recipe, tmp_path):
    """As in the second fold of a study: what Accelerate keeps of the first `Trainer` must not decide."""
    model, _ = pretrain_on_folds(recipe, clips, [1, 3], tmp_path / "first", {"bf16": True})
    tuning = {"fold_column": "fold", "train_folds": [1, 3], "test_folds": [2], "model": str(model), "max_length": 64, "max_steps": 1}
    fine_tune_once(FineTuningSettings(data_dir=str(clips), output_dir=str(tmp_path / "tuned"), **tuning, disable_tqdm=True))
    again, _ = pretrain_on_folds(recipe, clips, [1, 3], tmp_path / "second", {"bf16": True})
    assert (again / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_copy_with_a_broken_clip_is_refused(clips, tmp_path):
    (clips / "3-0.wav").write_bytes(b"no audio")
    with pytest.raises(UserError, match=r"1 of 12 study clips cannot be used \(1 unreadable\)"):
        copy_clips(clips, tmp_path / "copy")
    assert not (tmp_path / "copy" / "metadata.csv").exists()


def test_a_finished_pre_training_is_found_again_and_its_cost_with_it(clips, recipe, tmp_path, monkeypatch):
    model, cost = pretrain_on_folds(recipe, clips, [1, 3], tmp_path / "run", {"seed": 4})
    assert (model / "model.safetensors").is_file()
    assert cost > 0
    settings = json.loads((tmp_path / "run" / "step.json").read_text())["settings"]
    assert settings["data"]["sources"][0]["keep"] == {"fold": [1, 3]}
    monkeypatch.setattr(steps, "PreTrainer", lambda settings: pytest.fail("it was run again"))
    assert pretrain_on_folds(recipe, clips, [1, 3], tmp_path / "run", {"seed": 4}) == (model, cost)
    with pytest.raises(pytest.fail.Exception):
        pretrain_on_folds(recipe, clips, [1, 3], tmp_path / "run", {"seed": 5})


def test_a_damaged_step_or_record_counts_as_not_done(tmp_path, caplog):
    settings = FineTuningSettings(data_dir="clips", model="m", output_dir="out")
    steps._write_step(tmp_path / "step.json", settings, {"cpu_seconds": 12.5})
    assert steps._read_step(tmp_path / "step.json", settings) == {"cpu_seconds": 12.5}
    whole = (tmp_path / "step.json").read_bytes()
    values = json.loads(whole)
    contents = [whole[:length] for length in range(0, len(whole) - 2, 3)] + [b"[]", b"null", b"7", b"\xff", b"[" * 100_000]
    contents += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 3) if whole[i : i + 1].isalnum()]
    contents += [json.dumps({**values, name: wrong}).encode() for name in ("settings", "results") for wrong in (None, 1, [], "x", {})]
    for content in contents:
        (tmp_path / "step.json").write_bytes(content)
        assert steps._read_step(tmp_path / "step.json", settings) is None
        assert read_records([tmp_path / "step.json"], {"a": 1}) == ({}, [tmp_path.name])
    assert "is damaged" in caplog.text


def test_of_a_pre_training_that_was_interrupted_the_cost_is_not_known(clips, recipe, tmp_path):
    pretrain_on_folds(recipe, clips, [1, 3], tmp_path / "run", {})
    (tmp_path / "run" / "step.json").unlink()  # as if it had been killed before the end
    for _ in range(2):
        model, cost = pretrain_on_folds(recipe, clips, [1, 3], tmp_path / "run", {})
        assert (model / "model.safetensors").is_file()
        assert np.isnan(cost)
    study = load_script("small_model")
    settings = study.StudySettings(data_dir=str(clips), output_dir=str(tmp_path / "study"), stage1=str(recipe), stage2=str(recipe))
    study.pretrain = lambda *_: (model, np.nan)
    with pytest.raises(UserError, match="was interrupted, so nobody knows its CPU seconds: set scratch_epochs"):
        study.run(settings, clips, FOLDS, 2, seed=0)


def test_a_pre_training_that_a_signal_stopped_does_not_count_as_finished(clips, recipe, tmp_path, monkeypatch):
    class Stopped:
        step = 1

        def __init__(self, settings): ...

        def run(self): ...

    monkeypatch.setattr(steps, "PreTrainer", Stopped)
    with pytest.raises(KeyboardInterrupt):
        pretrain_on_folds(recipe, clips, [1], tmp_path / "run", {})
    assert not (tmp_path / "run" / "step.json").exists()


def test_a_finished_fine_tuning_is_found_again(clips, tmp_path, monkeypatch):
    settings = FineTuningSettings(
        data_dir=str(clips),
        output_dir=str(tmp_path / "model"),
        fold_column="fold",
        train_folds=[1],
        test_folds=[2],
        max_length=64,
        model_config={name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
        max_steps=1,
        disable_tqdm=True,
    )
    first = fine_tune_once(settings)
    monkeypatch.setattr(repeats, "fine_tune", lambda settings: "run again")
    assert fine_tune_once(settings)["metrics"]["accuracy"] == first["metrics"]["accuracy"]
    assert fine_tune_once(replace(settings, seed=1)) == "run again"


def test_epochs_of_equal_cost_are_rounded_up():
    assert epochs_of_equal_cost(40, cost=100, total=100) == 40
    assert epochs_of_equal_cost(40, cost=100, total=250) == 100
    assert epochs_of_equal_cost(40, cost=100, total=251) == 101


@pytest.mark.slow
def test_a_study_in_miniature(shared, tmp_path):
    """The real program on a few updates: what it prints and writes."""
    small = {"max_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 2}
    arguments = [f"--pretraining={json.dumps(small)}", "--finetuning.num_train_epochs=1", "--finetuning.disable_tqdm=true"]
    arguments += ["--folds=2", "--repetitions=1", "--short_epochs=1", "--clips_per_class=2"]
    command = [
        sys.executable,
        str(SCRIPTS / "small_model.py"),
        f"--data_dir={shared / 'data' / 'esc10'}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    process = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    accuracy = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]["fold-2-seed-1"]["accuracy"]
    assert set(accuracy) == {
        *("full", "scratch", "short", "scratch_short", "few", "scratch_few"),
        *("probe", "probe_mean_and_deviation", "statistics"),
    }
    assert f"| pre-trained, all clips | {100 * accuracy['full']:.1f} |" in process.stdout
    assert accuracy["statistics"] > 0.7


def test_the_study_of_events_compares_all_methods_on_the_same_mixtures(tmp_path):
    study = load_script("events")
    lines = ["file_name,label,fold"]
    (tmp_path / "sounds").mkdir()
    for fold in FOLDS:
        for i, label in enumerate(("hum", "hiss") * 3):
            tone = np.sin(np.arange(12_000) * (0.1 + 0.001 * (10 * fold + i))) if label == "hum" else noise(0.75, seed=10 * fold + i)
            soundfile.write(tmp_path / "sounds" / f"{fold}-{i}.wav", 0.3 * tone, 16_000)
            lines.append(f"{fold}-{i}.wav,{label},{fold}")
    (tmp_path / "sounds" / "metadata.csv").write_text("\n".join(lines))
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "below.wav", 0.01 * noise(4.0, seed=name == "test"), 16_000)
    encoder = SSLAMForPreTraining(SSLAMConfig(**SIZES))
    encoder.save_pretrained(tmp_path / "encoder")
    SSLAMFeatureExtractor(max_length=256).save_pretrained(tmp_path / "encoder")
    settings = study.StudySettings(
        data_dir=str(tmp_path / "sounds"),
        model=str(tmp_path / "encoder"),
        output_dir=str(tmp_path / "study"),
        fold_column="fold",
        train_folds=[1, 2],
        test_folds=[3],
        train_backgrounds=[{"kind": "folder", "path": str(tmp_path / "train")}],
        test_backgrounds=[{"kind": "folder", "path": str(tmp_path / "test")}],
        finetuning={"num_train_epochs": 1, "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True},
        steps_per_second=[12.5],
        num_events=[1, 2],
        train_clips=6,
        test_clips=4,
        tuning_clips=8,
        clip_seconds=2.575,
    )
    table = study.run(settings)
    results = json.loads((tmp_path / "study" / "results.json").read_text())["methods"]
    methods = [
        "detector, pre-trained, 80 ms",
        "detector, from scratch, 80 ms",
        *(f"tagging, pre-trained, windows of {window:g} s" for window in study.TAGGING_WINDOWS),
        "log-mel statistics, linear",
    ]
    filters = ("median filters", "median or change filters")
    assert list(results) == [f"{method}, {kind}" for method in methods for kind in filters]
    for found in results.values():
        low, high = found["metrics"]["segment_f1_interval"]
        assert 0 <= low <= found["metrics"]["segment_f1"] <= high <= 1
        assert set(found["by_overlap"]) <= {"1", "2"}
        assert f"{found['metrics']['psds2']:.3f}" in table
    assert results["log-mel statistics, linear, median filters"]["metrics"]["segment_f1"] > 0.9  # a hum and a hiss are told apart by them
    model = tmp_path / "study" / "detector-pre-trained-12.5" / "model.safetensors"
    before = model.stat().st_mtime_ns
    assert study.run(settings) == table
    assert model.stat().st_mtime_ns == before


def test_the_model_to_ship_learns_from_clips_that_may_be_used_and_each_test_from_none_of_its_fold(tmp_path, monkeypatch):
    study = load_script("everyday")
    monkeypatch.setattr(study, "fit_temperature", lambda *scores, exclusive: 2.0)  # after two steps scores may be no better than chance
    choosing, choose = [], study.choose
    monkeypatch.setattr(study, "choose", lambda settings, folds: choosing.append(sorted(folds)) or choose(settings, folds))
    sounds, free = tmp_path / "esc", tmp_path / "free"
    sounds.mkdir()
    free.mkdir()
    lines = ["file_name,label,fold,recording,license,esc10"]
    for fold in FOLDS:
        for i, label in enumerate(("hum", "hiss", "hum", "hiss", "click")):
            waveform = np.zeros(32_000)
            tone = np.sin(np.arange(12_000) * (0.1 + 0.001 * (10 * fold + i))) if label == "hum" else noise(0.75, seed=10 * fold + i)
            waveform[8000:20_000] = 0.3 * tone
            soundfile.write(sounds / f"{fold}-{i}.wav", waveform, 16_000)
            lines.append(f"{fold}-{i}.wav,{label},{fold},{fold}-{i},{'CC-BY-NC' if i == 3 else 'CC0'},{label == 'hum'}")
    (sounds / "metadata.csv").write_text("\n".join(lines))
    soundfile.write(free / "rain.wav", 0.1 * noise(4.0, seed=99), 16_000)
    (free / "metadata.csv").write_text("file_name,license\nrain.wav,CC0\n")
    voices = tmp_path / "voices"
    voices.mkdir()
    for fold in (*FOLDS, 9):  # 9: no fold of the clips
        soundfile.write(voices / f"{fold}.wav", 0.2 * noise(1.0, seed=50 + fold), 16_000)
    (voices / "metadata.csv").write_text("file_name,label,fold,recording\n" + "".join(f"{i}.wav,voice,{i},v{i}\n" for i in (*FOLDS, 9)))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "metadata.csv").write_text("file_name,label,fold,recording\na.wav,voice,fold1,a\n")
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "below.wav", 0.01 * noise(4.0, seed=name == "test"), 16_000)
    small = {"feature_extractor": {"max_length": 128}, "max_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 2}
    settings = study.StudySettings(
        data_dir=str(sounds),
        free_dir=str(free),
        output_dir=str(tmp_path / "study"),
        folds=[2, 3],
        max_false_alarms=[100.0],
        clips_of_a_class=6,
        backgrounds=[{"kind": "folder", "path": str(tmp_path / "train")}],
        test_backgrounds=[{"kind": "folder", "path": str(tmp_path / "test")}],
        others=[str(voices)],
        test_others=[{"kind": "folder", "path": str(free)}],
        pretraining={**small, "model_config": {**SIZES, "max_length": 128}},
        finetuning={"num_train_epochs": 1, "clips_per_epoch": 4, "per_device_train_batch_size": 2, "disable_tqdm": True, "use_cpu": True},
        clip_seconds=1.2,
        num_events=[1, 2],
        mixtures=2,
        windows=[0.64],
    )
    table = study.copy_sounds(settings)
    table = {row["file_name"]: row for row in csv.DictReader((table / "metadata.csv").open())}
    own = {f"{fold}-{i}.wav" for fold in FOLDS for i in (0, 1, 2, 4)}  # those under other licences are left out
    assert set(table) == own | {f"voices/{fold}.wav" for fold in FOLDS}
    assert [table["voices/2.wav"][name] for name in ("label", "fold", "recording", "license", "events")] == ["voice", "2", "v2", "", "[]"]
    assert (tmp_path / "study" / "sounds" / "voices" / "2.wav").read_bytes() == (voices / "2.wav").read_bytes()
    assert json.loads(table["1-0.wav"]["events"]) == [{"onset": 0.5, "offset": 1.25, "label": "hum"}]
    assert (table["1-4.wav"]["events"], table["1-4.wav"]["sound"][:6]) == ("[]", "other ")  # another sound: learnt to be none of them
    results = study.run(settings)
    for name, folds in (("2", ["1", "3"]), ("3", ["1", "2"]), ("none", ["1", "2", "3"])):
        output = tmp_path / "study" / f"without-{name}-seed-0"
        model, run = output / "model", load_yaml((output / "model" / "settings.yaml").read_text())
        assert [str(fold) for fold in run["train_folds"]] == folds
        for step, sources in (("stage1", None), ("stage2", None), ("model", run["mixing"]["sounds"])):
            if sources is None:
                sources = json.loads((output / step / "step.json").read_text())["settings"]["data"]["sources"]
            assert list(map(str, sources[0]["keep"]["fold"])) == folds
    assert choosing == [["3"], ["2"], ["2", "3"]]  # never by scores of the fold that is tested
    trained = model
    model = tmp_path / "study" / "model-seed-0"
    config = SSLAMConfig.from_pretrained(model)
    assert (config.class_names, config.calibration) == (["hiss", "hum"], {"temperature": 2.0})
    assert set(config.event_detection["threshold"]) == {"hiss", "hum"}
    assert "divided by a temperature of 2" in (model / "README.md").read_text()
    assert (model / "reliability.png").exists()
    assert not (model / "results.json").exists()  # of the weights before that
    found = results["3"]
    assert found["tags"]["clips"] == 4  # of the held-out fold, under any licence
    assert found["tags"]["esc10"]["clips"] == 2
    assert np.sum(found["tags"]["confusion"]) == 4
    network, extractor = study.load(tmp_path / "study" / "without-3-seed-0" / "model")
    study.scale_head(network, study.HEAD, 2.0)  # of what is tested too
    calibrated = study.tag_scores(network, extractor, sounds, ["3-4.wav"])
    assert found["tags"]["highest_scores_of_others"] == pytest.approx([calibrated.max()])
    assert list(found["events"]) == ["none", "100"]
    for events in found["events"].values():
        assert 0 <= events["metrics"]["segment_f1"] <= 1
        assert {name: one["hours"] for name, one in events["false_alarms_of_others"].items()} == pytest.approx(
            {"clips of other classes": 3 / 3600, "free": 4 / 3600}
        )
    table = study.tables(results)
    assert "| accuracy, esc10, % |" in table
    assert "| limit 100: false alarms an hour, free |" in table
    del results["2"]["events"]["100"]["false_alarms_of_others"]["clips of other classes"]  # a fold without such clips
    results["3"]["events"]["100"]["false_alarms_of_others"]["clips of other classes"]["per_hour"] = 7.0
    assert "| limit 100: false alarms an hour, clips of other classes | - | 7 | 7 " in study.tables(results)
    for one in results.values():
        one["tags"]["accuracy"] = 0.5  # where folds agree, the interval is that over their clips (Wilson, of 4: 0.35 each side)
    assert "| accuracy, % | 50.0 | 50.0 | 50.0 ± 0.0 [25.3, 74.7] |" in study.tables(results)
    for fold, seed in ((2, 1), (3, 2)):  # other excerpts of the backgrounds for each fold
        assert re.search(rf"(?m)^seed: {seed}$", (tmp_path / "study" / f"mixtures-{fold}" / "README.md").read_text())
    mixtures = study.calibrated(study.score_held_out(settings, 3).mixtures, 2.0)
    for events in found["events"].values():
        expected = study.evaluate_events(*mixtures, EventSettings(**events["event_detection"]), confidence=None)
        assert (events["metrics"], events["false_alarms"]) == (expected["metrics"], expected["false_alarms"])
    heads = [load_file(folder / "model.safetensors")["frame_classifier.weight"] for folder in (trained, model)]
    assert torch.equal(heads[0] / 2, heads[1])
    before = (trained / "model.safetensors").stat().st_mtime_ns
    again = study.run(replace(settings, max_false_alarms=[]))  # nothing is trained twice, and no threshold limited
    assert (trained / "model.safetensors").stat().st_mtime_ns == before
    assert torch.equal(load_file(trained / "model.safetensors")["frame_classifier.weight"], heads[0])
    assert again["3"]["events"] == {"none": found["events"]["none"]}
    for changes, message in (
        ({"licenses": ["CC0", "CC-BY-NC"]}, r"was made with licenses \['CC0', 'CC-BY'\], not \['CC0', 'CC-BY-NC'\]: delete it"),
        ({"folds": [2, 9]}, "has no fold 9, only 1, 2, 3"),
        ({"data_dir": str(tmp_path)}, "has no metadata.csv: give an audio folder"),
        ({"subsets": ["esc50"]}, "has no column esc50, only file_name, label"),
        ({"others": [str(free)]}, "free has no column label, only file_name, license"),
        ({"others": [str(tmp_path / "train")]}, "train has no metadata.csv: give an audio folder"),
        ({"others": [str(elsewhere)]}, "elsewhere has no clip in the folds of .*esc, 1, 2, 3$"),
        ({"others": [str(sounds)]}, "others have click too .*, which .* has: give sounds of other labels"),
    ):
        with pytest.raises(UserError, match=message):
            study.run(replace(settings, **changes))


# Frozen encoders by fold


def test_block_and_pooling_are_chosen_on_other_folds_than_the_one_that_is_reported():
    """Block 1 tells all classes but on fold 2, where block 2 alone does: it is not chosen for that."""
    study = load_script("frozen_folds")
    folds, targets = np.repeat(["0", "1", "2", "3"], 20), np.tile([0, 1], 40)
    random, held_out = np.random.default_rng(0), folds == "2"

    class FakeFeatures:
        def pooled(self, pooling, block):
            told = held_out if block == 2 else ~held_out
            clear = pooling == "mean"
            return np.where(told, 2.0 * targets - 1, random.normal(size=80))[:, None] * clear + random.normal(0, 0.1, (80, 3))

    candidates = [(block, pooling, 1.0) for pooling in ("cls", "mean") for block in (1, 2)]
    found = study.probe(FakeFeatures(), targets, list(folds), "2", candidates)
    assert (found["block"], found["pooling"]) == (1, "mean")
    assert found["accuracy"] == found["first_block"] == found["all"]["mean, block 1, ridge 1"] < 0.9
    assert study.probe(FakeFeatures(), targets, list(folds), "0", candidates)["accuracy"] == 1.0
    alone = study.probe(FakeFeatures(), targets, list(folds), "0", [(1, "mean", 1.0)])
    assert (alone["accuracy"], alone["block"]) == (1.0, 1)


def test_frozen_networks_are_compared_by_fold(clips, tmp_path):
    study = load_script("frozen_folds")
    for fold in FOLDS:
        SSLAMModel(tiny_config(num_hidden_layers=2)).save_pretrained(tmp_path / f"without-{fold}")
        SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / f"without-{fold}")
    paths = {"output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "features")}
    settings = study.StudySettings(
        data_dir=str(clips), model=str(tmp_path / "without-{fold}"), clips_of_a_class=6, ridge=[1.0, 10.0], **paths
    )
    results = study.run(settings)
    assert results["clips"] == {"1": 4, "2": 4, "3": 4}
    for name, chosen in results["folds"].items():
        assert set(chosen) == {"1", "2", "3"}
        assert chosen["1"]["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
        assert len(chosen["1"]["all"]) == (2 if name == "log_mel" else 12)  # two blocks, three poolings, two penalties
    assert [found["accuracy"] for found in results["folds"]["log_mel"].values()] == [1.0] * 3  # a tone, or none
    assert "| frozen encoder over untrained network, another seed for each fold |" in study.table(results)
    with pytest.raises(UserError, match=r"no class has 5 clips, only \[6\]"):
        study.run(replace(settings, clips_of_a_class=5))
    with pytest.raises(UserError, match="neither model nor architecture"):
        replace(settings, model=None)
    untrained = study.run(replace(settings, model=None, architecture=str(tmp_path / "without-1"), poolings=["mean"]))
    assert set(untrained["folds"]) == {"untrained", "log_mel"}


def test_encoders_of_fewer_hours_have_recordings_of_those_of_more(clips, recipe, tmp_path, monkeypatch):
    study = load_script("hours")
    for folder, number in (("sea", 6), ("town", 4)):
        (tmp_path / folder / "further").mkdir(parents=True)
        for i in range(number):
            path = tmp_path / folder / ("further" if i % 2 else ".") / f"{i}.flac"
            soundfile.write(path, noise(0.9, seed=i), 16_000)
    stage2 = {**json.loads(recipe.read_text()), "stage": 2}
    stage2["model_config"] = {**stage2["model_config"], "unmixed_span_length": 16}
    (tmp_path / "stage2.json").write_text(json.dumps(stage2))
    sources = [str(tmp_path / "sea"), str(tmp_path / "town")]
    settings = study.StudySettings(str(clips), sources, hours=[0.0005, 0.0015], output_dir=str(tmp_path / "out"), stage1=str(recipe),
                                   stage2=str(tmp_path / "stage2.json"))  # fmt: skip
    results = study.run(settings)
    assert list(results["hours"]) == ["0.0005", "0.0015"]
    chosen = {}
    for hours in results["hours"]:
        manifests = sorted((tmp_path / "out" / f"{hours}-hours-seed-0").glob("*.tsv"))
        lines = {file.read_text().splitlines()[0]: file.read_text().splitlines()[1:] for file in manifests}
        assert set(lines) <= set(sources)
        assert {line.split("\t")[1] for own in lines.values() for line in own} == {"14400"}
        chosen[hours] = {(root, line) for root, own in lines.items() for line in own}
        assert 0 <= len(chosen[hours]) * 0.9 / 3600 - float(hours) < 0.9 / 3600
        assert set(results["hours"][hours]["folds"]["trained"]) == {"1", "2", "3"}
    assert chosen["0.0005"] < chosen["0.0015"]
    assert results["hours"]["0.0005"]["folds"]["untrained"] == results["hours"]["0.0015"]["folds"]["untrained"]
    assert len(study.table(results).splitlines()) == 4
    monkeypatch.setattr(steps, "PreTrainer", None)  # what is finished is found again
    assert study.run(settings)["hours"] == results["hours"]
    root, line = next(iter(chosen["0.0005"]))
    soundfile.write(Path(root) / line.split("\t")[0], noise(1.8), 16_000)
    with pytest.raises(TypeError):  # other recordings: the step is not taken for finished
        study.run(settings)
    with pytest.raises(UserError, match=r"hours has 1, but all recordings together last 0\.00 hours"):
        study.run(replace(settings, hours=[1.0]))
    with pytest.raises(UserError, match="numbers above 0"):
        replace(settings, hours=[0.0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no recording that ends in .flac, .ogg, .wav"):
        study.run(replace(settings, sources=[str(tmp_path / "empty")]))
    (tmp_path / "town" / "0.flac").write_bytes(b"no sound")
    with pytest.raises(UserError, match=r"town/0\.flac cannot be read"):
        study.run(settings)


# The model of everyday sounds


def everyday_settings(study, tmp_path, **changes):
    return study.StudySettings(**{"data_dir": "clips", "free_dir": "free", "output_dir": str(tmp_path), **changes})


def one_class(values, events=()) -> ScoredEvents:
    """A recording `a` of a dog's scores, in steps of 1 s."""
    return ScoredEvents({"a": np.array([values]).T}, 1.0, ["dog"], {"a": list(events)}, {"a": float(len(values))})


def test_thresholds_of_a_fold_are_chosen_by_models_that_have_not_learnt_theirs(tmp_path, monkeypatch):
    """Of two folds the second has higher scores; and there are clips without sounds, in one of which a model has a false alarm."""
    study = load_script("everyday")
    dogs = [(0.0, 1.0, "dog"), (2.0, 3.0, "dog")]
    first = study.HeldOut(tmp_path, one_class([0.9, 0.2, 0.5, 0.2], dogs), one_class([0.1, 0.6]), {})
    second = study.HeldOut(tmp_path, one_class([0.9, 0.2, 0.7, 0.2], dogs), one_class([0.1, 0.1]), {})
    monkeypatch.setattr(study, "fit_temperature", lambda *scores, exclusive: 1.0)
    settings = everyday_settings(study, tmp_path, max_false_alarms=[100.0])
    temperature, chosen = study.choose(settings, {"1": first, "2": second})
    assert temperature == 1
    assert chosen["none"].threshold == {"dog": 0.35}  # all 4 dogs, and a false alarm
    assert chosen["100"].threshold == {"dog": 0.65}  # 3 of 4 dogs, and none in 12 s
    assert study.choose(settings, {"2": second})[1]["100"].threshold == {"dog": 0.45}
    monkeypatch.setattr(study, "fit_temperature", lambda *scores, exclusive: 2.0)
    assert study.choose(settings, {"1": first, "2": second})[1]["none"].threshold == {"dog": 0.42}  # between 1/3 and 0.5, calibrated
    monkeypatch.setattr(study, "tune_events", lambda *scores, change_lengths, max_false_alarms: change_lengths)
    assert study.choose(settings, {"2": second})[1]["none"] == study.CHANGE_LENGTHS
    with pytest.raises(UserError, match=r"folds are \[1, '1'\], but thresholds for one are chosen on the others"):
        everyday_settings(study, tmp_path, folds=[1, "1"])
    clips = {"kind": "folder", "path": "a/clips"}
    for changes, message in (
        ({"free_dir": None}, "encoder is None and free_dir None: give one"),
        ({"max_false_alarms": [-1.0]}, "max_false_alarms: max_false_alarms is -1.0, but a number an hour that is not negative"),
        ({"backgrounds": [clips]}, "backgrounds or test_backgrounds is empty, but not both"),
        ({"test_others": [clips, {**clips, "path": "b/clips"}]}, "test_others has two folders of the name clips: give each a name"),
        ({"windows": [0.64, 0.0]}, "windows has 0, but numbers of seconds of at least 0.16 are expected"),
        ({"others": ["a/clips", "b/clips/../clips"]}, "^others has two folders of the name clips: give each a name"),
    ):
        with pytest.raises(UserError, match=message):
            everyday_settings(study, tmp_path, **changes)
    with pytest.raises(UserError, match="c have other classes or time steps than b: give folds with the same classes"):
        study.join_scores({"b": first.mixtures, "c": first.mixtures._replace(classes=["cat"])})


def test_further_sounds_do_not_replace_clips_of_the_same_path(tmp_path):
    study = load_script("everyday")
    for folder in (tmp_path / "esc" / "voices", tmp_path / "voices"):
        folder.mkdir(parents=True)
        soundfile.write(folder / "1.wav", 0.1 * noise(1.0), 16_000)
    (tmp_path / "esc" / "metadata.csv").write_text("file_name,label,fold,recording,license\nvoices/1.wav,dog,1,a,CC0\n")
    (tmp_path / "voices" / "metadata.csv").write_text("file_name,label,fold,recording\n1.wav,voice,1,b\n")
    paths = {"data_dir": str(tmp_path / "esc"), "output_dir": str(tmp_path / "study"), "subsets": []}
    with pytest.raises(UserError, match="data_dir and others have two files voices/1.wav: rename a folder of others"):
        study.copy_sounds(study.StudySettings(**paths, free_dir="free", others=[str(tmp_path / "voices" / ".." / "voices")]))


def test_a_detector_and_sliding_windows_have_thresholds_of_the_other_folds(tmp_path):
    study, dogs = load_script("everyday"), [(0.0, 1.0, "dog"), (2.0, 3.0, "dog")]
    early, late, others = one_class([0.9, 0.2, 0.5, 0.2], dogs), one_class([0.2, 0.9, 0.2, 0.9], dogs), one_class([0.1])
    found = study.evaluate_windows(
        study.HeldOut(tmp_path, early, others, {"1": late}),
        {"2": study.HeldOut(tmp_path, one_class([0.9, 0.2, 0.7, 0.2], dogs), others, {"1": early})},
    )
    for name, threshold, f1 in (("detector", 0.45, 1.0), ("windows of 1 s", 0.35, 0.0)):
        assert found[name]["event_detection"]["segment"]["threshold"] == {"dog": threshold}  # halfway between the scores of fold 2
        assert found[name]["metrics"]["segment_f1"] == f1
    worse = study.evaluate_windows(
        study.HeldOut(tmp_path, late, others, {"1": late}), {"2": study.HeldOut(tmp_path, early, others, {"1": early})}
    )
    lines = study.table_of_windows({"1": {"windows": found}, "2": {"windows": worse}}).splitlines()
    assert lines[0] == "|  | all |"  # each recording has the same number of sounds at once
    for name, both in (("detector", [1, 0]), ("windows of 1 s", [0, 0]), ("gain over windows of 1 s", [1, 0])):
        expected = summarize(both)
        cell = f"{expected.mean:.3f} ± {expected.std:.3f} [{expected.low:.3f}, {expected.high:.3f}]"
        assert f"| segment_f1, {name} | {cell} |" in lines


def test_scores_are_calibrated_as_by_a_temperature_of_the_head(tmp_path):
    """Logits of 2 and -2 of steps that are true, or not, in three of four cases: their temperature is 2 / ln 3."""
    study = load_script("everyday")
    sure = 1 / (1 + np.exp(-2))
    scored = one_class([sure] * 4 + [1 - sure] * 4, [(0.0, 3.0, "dog"), (7.0, 8.0, "dog")])
    found = study.HeldOut(tmp_path, scored, one_class([0.1]), {})
    temperature, _ = study.choose(everyday_settings(study, tmp_path), {"1": found, "2": found})
    assert temperature == pytest.approx(2 / np.log(3), rel=1e-6)
    np.testing.assert_allclose(study.calibrated(scored, temperature).scores["a"][:, 0], [0.75] * 4 + [0.25] * 4, rtol=1e-6)
    measured = study.measure(scored, temperature)
    assert measured["expected_calibration_error"] == pytest.approx(0, abs=1e-6)
    assert measured["before"]["expected_calibration_error"] == pytest.approx(sure - 0.75, rel=1e-6)


def test_scores_of_recordings_without_events_are_those_of_the_model(clips):
    study, extractor = load_script("everyday"), SSLAMFeatureExtractor(max_length=64)
    network = SSLAMForAudioFrameClassification(tiny_config(num_labels=1, id2label={0: "dog"})).eval()
    audio = study.audio_column(clips, ["1-0.wav", "1-1.wav"])
    found = study.score_without_events(network, extractor, audio)
    assert (len(found.scores), found.step, found.classes) == (2, 0.16, ["dog"])
    assert set(found.durations.values()) == {0.7}
    assert all(events == [] for events in found.ground_truth.values())
    alone = network.score_steps(load_waveform(clips / "1-0.wav"), extractor)
    np.testing.assert_allclose(found.scores["0"], alone.scores, atol=1e-6)
    threshold = float(min(values.min() for values in found.scores.values())) - 1e-3
    assert study.false_alarms(found, EventSettings(threshold=threshold))["by_class"] == {"dog": 2}
    assert study.false_alarms(found, EventSettings(threshold=1.0)) == {"per_hour": 0.0, "hours": pytest.approx(1.4 / 3600), "by_class": {}}
    assert study.score_without_events(network, extractor, study.audio_column(clips, [])).scores == {}


def test_a_step_has_the_clip_scores_of_the_window_around_it(tmp_path):
    study, extractor = load_script("everyday"), SSLAMFeatureExtractor(max_length=64)
    network = SSLAMForAudioFrameClassification(tiny_config(num_labels=1, id2label={0: "dog"})).eval()
    waveform = 0.1 * noise(1.0, seed=3, sampling_rate=16_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", waveform, 16_000, subtype="FLOAT")
    event = json.dumps([{"onset": 0.25, "offset": 0.5, "label": "dog"}]).replace('"', '""')
    (tmp_path / "metadata.csv").write_text(f'file_name,events\na.wav,"{event}"\n')
    rows = read_rows(open_splits(str(tmp_path))["train"], "events")
    found = study.window_scores(network, extractor, rows, window=0.4, hop=0.3)
    assert (found.step, found.classes) == (0.3, ["dog"])
    name = rows.name(0)
    assert (found.ground_truth, found.durations) == ({name: [(0.25, 0.5, "dog")]}, {name: 1.0})
    for step, (start, end) in enumerate(((0, 5600), (4000, 10_400), (8800, 15_200))):  # middles at .15, .45 and .75 s
        inputs = extractor(waveform[start:end], sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
        with torch.inference_mode():
            alone = network(**inputs).clip_logits.sigmoid().numpy()
        np.testing.assert_allclose(found.scores[name][step : step + 1], alone, atol=1e-5)
