"""Fine-tuning that is interrupted resumes as the same run, bit for bit; what is not the same run is never taken for it."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from processes import Fork, kill_with_all_it_started, run_on_two
from safetensors.torch import load_file

from transformers_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification
from transformers_sslam.checkpoints import checkpoints
from transformers_sslam.errors import UserError
from transformers_sslam.files import lock, verify
from transformers_sslam.finetuning import trainer as stream_trainer
from transformers_sslam.finetuning import training as fine_tuning
from transformers_sslam.finetuning.data import open_training_data
from transformers_sslam.finetuning.repeats import fine_tune_once
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.finetuning.stream import LabelledStream
from transformers_sslam.finetuning.training import fine_tune
from transformers_sslam.settings import write_settings


pytestmark = pytest.mark.usefixtures("without_drawing")
SCRIPT = Path(__file__).parents[1] / "scripts" / "finetune.py"
TINY = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_length": 32},
    **{"drop_path_rate": 0.2, "hidden_dropout_prob": 0.1},  # so that torch's own random state counts too
}
ON_CPU = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """33 clips to train on and 7 to evaluate on, of two classes of unequal size. No test changes them."""
    folder = tmp_path_factory.mktemp("clips")
    for split, count in (("train", 33), ("test", 7)):
        for i in range(count):
            path = folder / split / ("rare" if i % 4 == 0 else "common") / f"{i:02}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, noise(0.3, seed=1000 * count + i), 16_000)
    return folder


@pytest.fixture
def own_clips(clips, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(clips, tmp_path / "clips"))


@pytest.fixture
def settings(clips, tmp_path) -> FineTuningSettings:
    return settings_for(clips, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run with `settings` that nothing interrupted, and what it returned. No test changes the folder."""
    settings = settings_for(clips, tmp_path_factory.mktemp("whole"))
    return Path(settings.output_dir), fine_tune(settings)


def settings_for(clips: Path, folder: Path) -> FineTuningSettings:
    return FineTuningSettings(
        data_dir=str(clips),
        output_dir=str(folder),
        max_length=32,
        model_config=TINY,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=1e-3,
        max_steps=12,
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="steps",
        logging_steps=1,
        save_steps=3,
    )


def changed(settings: FineTuningSettings, folder: Path, **changes) -> FineTuningSettings:
    return replace(settings, output_dir=str(folder), **changes)


def outcome(folder: str | Path) -> tuple[list[float], dict, dict[str, bytes]]:
    """Training losses, metrics, and the bytes of the weights."""
    results = json.loads((Path(folder) / "results.json").read_text())
    return results["training_loss"], results["metrics"], {name: w.numpy().tobytes() for name, w in weights_of(folder).items()}


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


class Killed(BaseException):
    """Stands for the end of a process: nothing in the program handles it."""


def interrupt(settings: FineTuningSettings, monkeypatch, update: int, while_saving: str | None = None) -> None:
    """Run, and end behind an update or, of its checkpoint, before a function of the trainer's module writes."""
    with monkeypatch.context() as patch:
        if while_saving is None:
            original = stream_trainer._RunState.on_step_end

            def on_step_end(self, args, state, control, **kwargs):
                original(self, args, state, control, **kwargs)
                if state.global_step == update:
                    raise Killed

            patch.setattr(stream_trainer._RunState, "on_step_end", on_step_end)
        else:
            write = getattr(stream_trainer, while_saving)

            def write_or_end(path, *args, **kwargs):
                if f"checkpoint-{update}" in str(path):
                    raise Killed
                write(path, *args, **kwargs)

            patch.setattr(stream_trainer, while_saving, write_or_end)
        with pytest.raises(Killed):
            fine_tune(settings)


# --- kill -9


def launch(folder: Path, settings: FineTuningSettings, forked: bool = False, other_hashes: bool = False) -> subprocess.Popen | Fork:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder.parent / f"{folder.name}.yaml"
    write_settings(settings, recipe)
    words, path = [SCRIPT, "--config", recipe], folder.parent / f"{folder.name}.log"
    environment = {**ON_CPU, "HF_DATASETS_CACHE": str(folder.parent / "cache")}
    if forked:
        return Fork(words, path, environment, other_hashes=other_hashes)
    log = open(path, "a")  # noqa: SIM115  # the process keeps it
    return subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=environment)


def finish(folder: Path, settings: FineTuningSettings, forked: bool = False, other_hashes: bool = False) -> None:
    code = launch(folder, settings, forked, other_hashes).wait(timeout=500)
    assert code == 0, (folder.parent / f"{folder.name}.log").read_text()[-3000:]


def kill_at_random_moments(
    settings: FineTuningSettings, tmp_path: Path, workers: int, kills: int, updates: int, forked: bool = False
) -> None:
    changes = {"save_steps": 2, "dataloader_num_workers": workers, "eval_strategy": "steps", "eval_steps": 7, "max_steps": updates}
    whole, killed = (changed(settings, tmp_path / name, **changes) for name in ("whole", "killed"))
    finish(tmp_path / "whole", whole, forked, other_hashes=True)
    chance, deaths, folder = random.Random(workers), 0, tmp_path / "killed"
    while deaths < kills:
        process = launch(folder, killed, forked)
        before = [path.name for path in checkpoints(folder)]
        while process.poll() is None and [path.name for path in checkpoints(folder)][-1:] in ([], before[-1:]):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.4))  # somewhere in the updates, evaluations and checkpoints that follow
        if process.poll() is not None:
            break
        kill_with_all_it_started(process)
        deaths += 1
        assert not (folder / "results.json").exists()
    assert deaths == kills, (tmp_path / "killed.log").read_text()[-3000:]
    finish(folder, killed, forked)
    assert len(outcome(folder)[0]) == updates
    assert outcome(folder) == outcome(tmp_path / "whole")
    assert json.loads((folder / "results.json").read_text())["resumed"]
    assert not checkpoints(folder)  # those of a finished run are of no more use


def test_a_run_that_is_killed_ends_as_one_that_is_not(settings, tmp_path):
    kill_at_random_moments(settings, tmp_path, workers=2, kills=2, updates=60, forked=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_killed_ten_times_ends_as_one_that_is_not(settings, tmp_path, workers):
    kill_at_random_moments(settings, tmp_path, workers, kills=10, updates=300)


@pytest.mark.parametrize(("accumulation", "workers", "features"), [(1, 0, "worker"), (2, 0, "device"), (1, 2, "worker")])
def test_a_run_resumes_bit_for_bit_wherever_it_stopped(settings, tmp_path, monkeypatch, accumulation, workers, features):
    """In the midst of an epoch of four batches, a checkpoint behind it, and the log lines of three updates each."""
    changes = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers, "logging_steps": 3, "save_steps": 2}
    whole, stopped = (changed(settings, tmp_path / name, **changes, features=features) for name in ("whole", "stopped"))
    fine_tune(whole)
    for update in (3, 8, 11):
        interrupt(stopped, monkeypatch, update)
    results = fine_tune(stopped)
    assert results["resumed"]
    assert results["steps"] == 12
    assert len(results["training_loss"]) == 4
    assert outcome(stopped.output_dir) == outcome(whole.output_dir)


@pytest.mark.parametrize("while_saving", ["write_json", "write_manifest"])
def test_a_checkpoint_that_was_not_finished_is_passed_over(settings, whole, tmp_path, monkeypatch, while_saving):
    interrupt(settings, monkeypatch, 6, while_saving)
    assert (tmp_path / "run" / "checkpoint-6" / "model.safetensors").is_file()
    fine_tune(settings)
    assert outcome(settings.output_dir) == outcome(whole[0])


def test_what_a_run_that_was_killed_while_it_deleted_has_left_is_deleted(settings, tmp_path, monkeypatch):
    one, remove = replace(settings, save_total_limit=1), shutil.rmtree

    def remove_or_end(path, *args, **kwargs):
        if Path(path).name == "checkpoint-3.discarded" and Path(path).exists():
            raise Killed
        remove(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_or_end)
        with pytest.raises(Killed):
            fine_tune(one)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3.discarded", "checkpoint-6"]
    assert fine_tune(one)["resumed"]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_damaged_checkpoint_is_passed_over(settings, whole, tmp_path, monkeypatch, caplog):
    interrupt(settings, monkeypatch, 7)
    damaged = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    fine_tune(settings)
    assert "checkpoint-6 is damaged and is passed over: optimizer.pt has changed" in caplog.text
    assert "resuming from" not in caplog.text or "checkpoint-3" in caplog.text
    assert outcome(settings.output_dir) == outcome(whole[0])


def test_without_a_whole_checkpoint_nothing_is_trained(settings, tmp_path, monkeypatch):
    interrupt(settings, monkeypatch, 4)
    (tmp_path / "run" / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="all 1 checkpoints in .* are damaged"):
        fine_tune(settings)


def test_checkpoints_of_other_settings_or_data_are_named(settings, own_clips, monkeypatch):
    settings = replace(settings, data_dir=str(own_clips))
    interrupt(settings, monkeypatch, 4)
    with pytest.raises(
        UserError,
        match="of a run with other learning_rate, per_device_train_batch_size: choose another .*--model .*checkpoint-3 and another",
    ):
        fine_tune(replace(settings, learning_rate=2e-3, per_device_train_batch_size=4))
    path = own_clips / "train" / "rare" / "04.wav"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    with pytest.raises(UserError, match="a checkpoint of a run with other data: choose another output_dir"):
        fine_tune(settings)


def test_a_run_from_weights_that_were_replaced_is_another_run(settings, tmp_path, monkeypatch):
    model = str(tmp_path / "model")

    def save(seed: int) -> None:
        torch.manual_seed(seed)
        SSLAMForAudioClassification(SSLAMConfig(**TINY)).save_pretrained(model)
        SSLAMFeatureExtractor(max_length=32).save_pretrained(model)

    save(0)
    settings = replace(settings, model=model, model_config={})
    interrupt(settings, monkeypatch, 4)
    save(1)
    with pytest.raises(UserError, match="checkpoint-3 is a checkpoint of a run with other weights in .*model: choose another output_dir"):
        fine_tune_once(settings)
    save(0)  # the same weights in a file of another time
    (Path(model) / "training_args.bin").write_bytes(b"no weights")
    loss = fine_tune_once(settings)["metrics"]["loss"]
    save(1)
    with pytest.raises(UserError, match="holds a model already, of a run with other weights in .*model"):
        fine_tune_once(settings)
    shutil.rmtree(model)
    assert fine_tune_once(settings)["metrics"]["loss"] == loss  # finished, whatever came of the weights


def test_a_run_that_too_many_unreadable_files_stopped_resumes_with_a_larger_limit(settings, monkeypatch, caplog):
    interrupt(replace(settings, save_steps=0.25), monkeypatch, 4)
    caplog.set_level("INFO")
    logging.getLogger("transformers").addHandler(caplog.handler)  # it does not propagate
    try:
        assert fine_tune(replace(settings, save_steps=0.25, max_unreadable=0.5))["resumed"]
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "do not match" not in caplog.text  # a fraction of the steps is no other number than that of the checkpoint


def test_one_checkpoint_is_kept_only_behind_a_whole_one(settings, tmp_path, monkeypatch):
    """The Trainer itself would delete the last one before the next is known to be whole."""
    one = changed(settings, tmp_path / "run", save_total_limit=1)
    interrupt(one, monkeypatch, 7)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    interrupt(one, monkeypatch, 9, while_saving="write_manifest")
    assert [path.name for path in checkpoints(tmp_path / "run") if verify(path) is None] == ["checkpoint-6"]
    assert fine_tune(one)["resumed"]


# --- finished runs


def test_an_overwriting_run_that_is_killed_leaves_no_old_results_beside_new_weights(settings, whole, monkeypatch):
    folder, old = whole
    shutil.copytree(folder, settings.output_dir)
    again = replace(settings, seed=1, overwrite_output_dir=True)

    def end(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "_evaluate", end)
        with pytest.raises(Killed):
            fine_tune(again)
    output = Path(settings.output_dir)
    assert (output / "model.safetensors").is_file()
    assert not (output / "results.json").exists()
    new = fine_tune_once(replace(again, overwrite_output_dir=False))
    assert new["training_loss"] != old["training_loss"]
    assert new["resumed"]


@pytest.mark.parametrize("name", ["model", "resume_from_checkpoint"])
def test_an_overwriting_run_does_not_delete_what_it_starts_from(settings, whole, tmp_path, name):
    shutil.copytree(whole[0], settings.output_dir)
    (tmp_path / "link").symlink_to(settings.output_dir)
    before = outcome(settings.output_dir)
    with pytest.raises(UserError, match=f"{name} is .*link', which overwrite_output_dir would delete first"):
        fine_tune(replace(settings, seed=1, overwrite_output_dir=True, **{name: str(tmp_path / "link")}))
    assert outcome(settings.output_dir) == before


@pytest.mark.parametrize("damage", ["missing", "changed", "results"])
def test_a_finished_run_that_is_damaged_is_not_taken_for_finished(settings, whole, damage):
    folder, first = whole
    shutil.copytree(folder, settings.output_dir)
    assert fine_tune_once(settings) == first
    file = Path(settings.output_dir) / ("results.json" if damage == "results" else "model.safetensors")
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        file.write_bytes(content[: len(content) // 2] if damage == "results" else content[:-1] + bytes([content[-1] ^ 1]))
    again = fine_tune_once(replace(settings, overwrite_output_dir=damage != "results"))
    assert again["training_loss"] == first["training_loss"]
    assert outcome(settings.output_dir) == outcome(folder)


def test_a_second_run_in_the_same_folder_is_rejected(settings):
    with lock(settings.output_dir), pytest.raises(UserError, match="another process writes to"):
        error_of_another_process(settings)


def error_of_another_process(settings: FineTuningSettings) -> None:
    """Raise what another process says of these settings."""
    folder = Path(settings.output_dir)
    assert launch(folder, settings, forked=True).wait(timeout=200) == 1
    raise UserError((folder.parent / f"{folder.name}.log").read_text())


# --- what is trained and evaluated on


def test_evaluating_each_epoch_changes_no_training_loss(settings, whole):
    folder, once = whole
    each = replace(settings, eval_strategy="epoch")
    assert fine_tune(each)["training_loss"] == once["training_loss"]
    assert outcome(each.output_dir) == outcome(folder)


def batches(settings: FineTuningSettings, count: int, **kwargs) -> list[dict]:
    stream = LabelledStream(open_training_data(settings).parts["training"], SSLAMFeatureExtractor(max_length=32), batch_size=8, **kwargs)
    iterator = iter(stream)
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_batch_is_smaller_than_was_asked_for(settings, workers):
    """33 clips by 8: the last clip of an epoch begins the next batch, and none is lost."""
    found = batches(settings, 33, num_workers=workers)
    assert {len(batch["labels"]) for batch in found} == {8}
    counts = Counter(row for batch in found for row in batch["rows"])
    assert len(counts) == 33
    assert max(counts.values()) - min(counts.values()) <= (0 if workers == 0 else 2)  # either worker may be in the midst of an epoch


def test_balanced_draws_follow_from_the_seed(settings):
    def rows(seed: int) -> list[int]:
        return [row for batch in batches(settings, 100, balanced=True, clips_per_epoch=50, seed=seed) for row in batch["rows"]]

    labels = open_training_data(settings).parts["training"].labels
    drawn = rows(3)
    assert drawn == rows(3)
    assert drawn != rows(4)
    assert drawn[:50] != drawn[50:100]
    rare = labels.names.index("rare")
    assert np.mean(labels.indices()[drawn] == rare) == pytest.approx(0.5, abs=0.06)  # of 800 draws; 9 of 33 clips are
    assert len(set(drawn[:400])) > 25


def test_an_epoch_of_so_many_clips_takes_others_each_time_until_all_had_their_turn(settings):
    rows = [row for batch in batches(settings, 33, clips_per_epoch=8, seed=1) for row in batch["rows"]]
    assert len(set(rows[:32])) == 32  # four epochs; the fifth ends the first pass and begins the second
    assert set(Counter(rows).values()) == {8}


def test_resuming_with_other_workers_keeps_each_clip_once(settings):
    part, extractor = open_training_data(settings).parts["training"], SSLAMFeatureExtractor(max_length=32)
    first = LabelledStream(part, extractor, batch_size=8, num_workers=0)
    iterator = iter(first)
    rows = [row for _ in range(2) for row in next(iterator)["rows"]]
    second = LabelledStream(part, extractor, batch_size=8, num_workers=2, last_batch="keep", epochs=1)
    second.load_state_dict([json.loads(json.dumps(first.state_dict()))])
    rows += [row for batch in second for row in batch["rows"]]
    assert sorted(rows) == list(range(33))


def test_decoded_clips_are_kept_within_the_limit(settings):
    """Of 33 clips of 4,800 samples, ten fit."""
    part = open_training_data(settings).parts["training"]
    for memory, kept in ((10 * 4800 * 4 / 1e9, 10), (1.0, 33)):
        cache = fine_tuning.WaveformCache(33, memory)
        list(LabelledStream(part, SSLAMFeatureExtractor(max_length=32), batch_size=8, epochs=1, last_batch="keep", cache=cache))
        assert sum(cache.get(row) is not None for row in range(33)) == kept


def test_log_mels_of_the_device_are_those_of_the_workers(settings):
    augmentation = settings.augmentation
    worker, device = (
        batches(settings, 9, augmentation=augmentation, features=features, device=torch.device("cpu"), num_workers=workers)
        for features, workers in (("worker", 1), ("device", 1))
    )
    for one, other in zip(worker, device):
        assert one["rows"] == other["rows"]
        torch.testing.assert_close(one["input_values"], other["input_values"], rtol=0, atol=1e-5)
        torch.testing.assert_close(one["labels"], other["labels"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_readable_clip_is_evaluated_once_in_the_order_of_rows(settings, own_clips, workers):
    (own_clips / "test" / "common" / "05.wav").write_bytes(b"no audio")
    changes = {"dataloader_num_workers": workers, "max_steps": 1, "max_unreadable": 0.3, "per_device_eval_batch_size": 4}
    fine_tune(replace(settings, data_dir=str(own_clips), **changes))
    scores = np.load(Path(settings.output_dir) / "scores.npz")
    names = [f"common/{i:02}" for i in (1, 2, 3, 6)] + [f"rare/{i:02}" for i in (0, 4)]
    assert ["/".join(Path(name).with_suffix("").parts[-2:]) for name in scores["names"]] == names
    assert scores["targets"].tolist() == [[1, 0]] * 4 + [[0, 1]] * 2
    assert len(scores["logits"]) == 6


def test_two_processes_have_the_metrics_of_one_over_the_same_clips(settings, tmp_path):
    """Each of two processes trains with half of the batch, and evaluates half of the clips; both keep the same model."""
    program = tmp_path / "two.py"
    program.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from accelerate import PartialState\n"
        "from transformers_sslam.distributed import leave_process_group\n"
        "from transformers_sslam.finetuning.training import fine_tune\n"
        "from transformers_sslam.finetuning.settings import FineTuningSettings\n"
        "from transformers_sslam.settings import read_settings\n"
        "results = fine_tune(read_settings(FineTuningSettings, sys.argv[1]))\n"
        "open(f'{sys.argv[2]}/{PartialState().process_index}.json', 'w').write(json.dumps(results['metrics']))\n"
        "leave_process_group()\n"  # as the command does
        "names = [Path(f'/proc/self/task/{thread}/comm').read_text() for thread in os.listdir('/proc/self/task')]\n"
        "assert not any('gloo' in name for name in names), names\n"
    )
    two = changed(settings, tmp_path / "two", ddp_backend="gloo", per_device_train_batch_size=4, max_steps=4)
    write_settings(two, tmp_path / "two.yaml")
    environment = {**ON_CPU, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run_on_two([program, tmp_path / "two.yaml", tmp_path], tmp_path / "log", environment)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    scores = np.load(tmp_path / "two" / "scores.npz")
    assert len(set(scores["names"])) == len(scores["names"]) == 7
    assert first["accuracy"] == np.mean(scores["logits"].argmax(1) == scores["targets"].argmax(1))
    # Evaluated once more, by one process, the model has the same scores.
    part, extractor = open_training_data(settings).parts["test"], SSLAMFeatureExtractor.from_pretrained(tmp_path / "two")
    model = SSLAMForAudioClassification.from_pretrained(tmp_path / "two").eval()
    (batch,) = LabelledStream(part, extractor, batch_size=8, epochs=1, last_batch="keep")
    order = np.argsort(batch["rows"])
    with torch.no_grad():
        expected = model(input_values=batch["input_values"]).logits.numpy()[order]
    np.testing.assert_allclose(scores["logits"], expected, atol=1e-5)
