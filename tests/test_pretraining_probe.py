"""The probe in pre-training: its figures are those of the saved weights, and the run is bit for bit the one without it."""

import json
import os
import random
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from processes import run_on_two
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler
from test_pretraining_loop import (  # noqa: F401  # the last is a fixture
    ON_CPU,
    interrupted_after,
    metrics,
    recipe,
    same_weights,
    sounds,
)
from test_pretraining_loop import trainer as plain_trainer

from transformers_sslam import SSLAMFeatureExtractor, SSLAMModel
from transformers_sslam.audio import load_waveform
from transformers_sslam.checkpoints import checkpoints
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.features import encode_clips
from transformers_sslam.evaluation.probing import LogisticRegressions, Partition, run_probe, score
from transformers_sslam.pretraining.loop import PreTrainer
from transformers_sslam.pretraining.probe import StudentProbe
from transformers_sslam.pretraining.settings import PreTrainingSettings, StudentProbeSettings
from transformers_sslam.settings import parse_settings


CLIPS, CLASSES, FOLDS = 24, 3, 2
FIGURES = ("probe_last_block", "probe_first_block", "probe_log_mel")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Noise with a tone, faint enough that no probe is always right, and of 0.2 to 0.66 s: most have padding, and one is cut."""
    folder, rows = tmp_path_factory.mktemp("labelled"), []
    for i in range(CLIPS):
        t = np.arange(3_200 + 320 * i) / 16_000
        tone = 0.01 * np.sin(2 * np.pi * (500 + 400 * (i % CLASSES) + 150 * (i % 5)) * t)
        soundfile.write(folder / f"{i:02}.wav", noise(1, seed=i)[: len(t)] + tone, 16_000)
        tags = ";".join(f"tag {k}" for k in range(2) if (i >> k) & 1)
        rows.append(f"{i:02}.wav,class {i % CLASSES},{i // CLASSES % FOLDS},{tags}")
    (folder / "metadata.csv").write_text("file_name,label,fold,tags\n" + "\n".join(rows) + "\n")
    return folder


def trainer(sounds: Path, labelled: Path, output_dir: Path, **changes) -> PreTrainer:  # noqa: F811
    probe = StudentProbeSettings(data_dir=str(labelled), per_device_eval_batch_size=5)
    return plain_trainer(sounds, output_dir, **{"probe": probe, "probe_every": 3, **changes})


def probes(output_dir: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: {name: line[name] for name in FIGURES} for line in metrics(output_dir) if FIGURES[0] in line}


def test_the_run_is_the_one_without_a_probe_bit_for_bit_also_resumed(sounds, labelled, tmp_path):  # noqa: F811
    plain_trainer(sounds, tmp_path / "plain").run()
    trainer(sounds, labelled, tmp_path / "probed").run()
    stopped = trainer(sounds, labelled, tmp_path / "stopped")
    interrupted_after(stopped, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped.run()
    assert stopped.step == 4
    trainer(sounds, labelled, tmp_path / "stopped").run()
    plain, probed = metrics(tmp_path / "plain"), metrics(tmp_path / "probed")
    assert [line for line in probed if FIGURES[0] not in line] == plain
    assert list(probes(tmp_path / "probed")) == [0, 3, 6, 8]
    assert metrics(tmp_path / "stopped") == probed
    for name in ("probed", "stopped"):
        assert same_weights(tmp_path / name / "model", tmp_path / "plain" / "model")


def test_random_states_and_modes_of_the_training_are_not_touched(sounds, labelled, tmp_path):  # noqa: F811
    plain, probed = plain_trainer(sounds, tmp_path / "plain"), trainer(sounds, labelled, tmp_path / "probed")
    found = probed.model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.model.state_dict().items())  # with the same first weights

    def states() -> list[str]:
        return [str(state) for state in (torch.get_rng_state().tolist(), np.random.get_state(), random.getstate())]  # noqa: NPY002

    before, weights = states(), {name: tensor.clone() for name, tensor in found.items()}
    values = probed._probed()
    assert states() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in probed.model.state_dict().items())
    assert probed._probed() == values  # dropout would change them
    assert not any(parameter.grad is not None for parameter in probed.model.parameters())
    assert torch.is_grad_enabled()


def test_figures_are_those_of_the_saved_weights(sounds, labelled, tmp_path, caplog):  # noqa: F811
    caplog.set_level("INFO")
    run = trainer(sounds, labelled, tmp_path)
    encoded = []
    run.model.sslam.register_forward_pre_hook(lambda module, _, given: encoded.append(given), with_kwargs=True)
    run.run()
    sizes = [len(given["input_values"]) for given in encoded if given.get("output_hidden_states")]
    assert sizes == [5, 5, 5, 5, 4] * 4  # a batch at a time
    checkpoint = tmp_path / "checkpoint-00000008"
    model, extractor = SSLAMModel.from_pretrained(checkpoint).eval(), SSLAMFeatureExtractor.from_pretrained(checkpoint)
    waveforms = [load_waveform(labelled / f"{i:02}.wav") for i in range(CLIPS)]
    features = {name: [] for name in FIGURES[:2]}
    for waveform in waveforms:  # clip by clip and patch by patch
        inputs = extractor(waveform, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        sounding = -(-int(inputs["attention_mask"].sum()) // 16)
        for name, tokens in zip(features, (states[2], states[1])):
            patches = tokens[0, 1:].numpy()
            features[name].append(np.concatenate([patches[frequency::8][:sounding].max(0) for frequency in range(8)]))
    targets, folds = np.arange(CLIPS) % CLASSES, np.arange(CLIPS) // CLASSES % FOLDS
    found = probes(tmp_path)
    for name, rows in features.items():
        values, accuracies = np.stack(rows), []
        for fold in range(FOLDS):
            scaler = StandardScaler().fit(values[folds != fold])
            regression = LogisticRegression(max_iter=5000).fit(scaler.transform(values[folds != fold]), targets[folds != fold])
            accuracies.append(regression.score(scaler.transform(values[folds == fold]), targets[folds == fold]))
        assert found[8][name] == pytest.approx(np.mean(accuracies), abs=1e-9)
    partitions = [Partition(str(f), np.flatnonzero(folds != f), np.flatnonzero(folds == f)) for f in range(FOLDS)]
    expected = run_probe("log_mel_statistics", encode_clips(model, extractor, waveforms, keep_patches=False), targets, partitions).mean()
    assert all(values["probe_log_mel"] == pytest.approx(expected, abs=1e-9) for values in found.values())
    assert 0.4 < expected < 1
    assert found[0]["probe_last_block"] != found[8]["probe_last_block"]  # the untrained network's, and a changed one's
    assert (
        f"step 8  probe: accuracy {found[8]['probe_last_block']:.1%} of the last block (at the start {found[0]['probe_last_block']:.1%}), "
        f"{found[8]['probe_first_block']:.1%} of the first (at the start {found[0]['probe_first_block']:.1%}), {expected:.1%} of log-mel"
    ) in caplog.text


def test_curves_are_drawn_in_a_group_of_their_own(sounds, labelled, tmp_path):  # noqa: F811
    run, drawn = trainer(sounds, labelled, tmp_path, max_steps=2, warmup_steps=0), []
    run.accelerator.log = lambda values, step: drawn.append((step, sorted(values)))
    run.run()
    groups = sorted(f"probe/{name}" for name in FIGURES)
    assert [step for step, names in drawn if names == groups] == [0, 2]


@pytest.mark.parametrize("classes", [2, 3])
def test_tags_have_their_mean_average_precision(classes):
    random_numbers = np.random.default_rng(0)
    features = random_numbers.normal(size=(60, 5))
    targets = (features[:, :classes] + random_numbers.normal(size=(60, classes)) > 0).astype(np.float32)
    scaler = StandardScaler().fit(features[:40])
    scores = [
        LogisticRegression(C=0.5, max_iter=5000)
        .fit(scaler.transform(features[:40]), targets[:40, k])
        .decision_function(scaler.transform(features[40:]))
        for k in range(classes)
    ]
    expected = average_precision_score(targets[40:], np.stack(scores, axis=1), average="macro")

    def measured(targets: np.ndarray, inverse_regularization: float) -> float:
        scores = LogisticRegressions(features[:40], targets[:40], inverse_regularization).scores(features[40:])
        return score(scores, targets[40:])

    assert measured(targets, 0.5) == pytest.approx(expected, abs=1e-9)
    one, exclusive = measured(targets[:, :1], 1.0), measured(targets[:, 0].astype(int), 1.0)
    assert 0.6 < one <= 1
    assert exclusive == pytest.approx(
        LogisticRegression(max_iter=5000)
        .fit(scaler.transform(features[:40]), targets[:40, 0])
        .score(scaler.transform(features[40:]), targets[40:, 0])
    )


def test_clips_of_several_labels_and_of_splits(labelled, tmp_path):
    extractor = SSLAMFeatureExtractor(max_length=64)
    tags = StudentProbe(StudentProbeSettings(data_dir=str(labelled), label_column="tags", label_separator=";"), extractor)
    assert tags.metric == "mean average precision"
    assert 0 < tags.log_mel < 1
    for split, fold in (("train", "0"), ("test", "1")):
        for i in range(CLIPS):
            if str(i // CLASSES % FOLDS) == fold:
                path = tmp_path / split / f"class {i % CLASSES}" / f"{i:02}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((labelled / f"{i:02}.wav").read_bytes())
    splits = StudentProbe(StudentProbeSettings(data_dir=str(tmp_path), fold_column=None), extractor)
    folds = StudentProbe(StudentProbeSettings(data_dir=str(labelled), test_folds=[1]), extractor)
    assert splits.log_mel == folds.log_mel


def test_a_signal_ends_a_probe_and_the_run_resumes(sounds, labelled, tmp_path):  # noqa: F811
    trainer(sounds, labelled, tmp_path / "whole").run()
    run = trainer(sounds, labelled, tmp_path / "stopped")
    encode, calls = run.probe.task.waveforms.__class__.__getitem__, []

    class Stopping(type(run.probe.task.waveforms)):
        def __getitem__(self, i):
            calls.append(i)
            if len(calls) == CLIPS + 7:  # in the second batch of the probe after step 3
                os.kill(os.getpid(), signal.SIGTERM)
            return encode(self, i)

    run.probe.task.waveforms.__class__ = Stopping
    assert run.run().name == "checkpoint-00000003"
    assert list(probes(tmp_path / "stopped")) == [0]
    trainer(sounds, labelled, tmp_path / "stopped").run()
    assert [line for line in metrics(tmp_path / "stopped") if FIGURES[0] not in line] == [
        line for line in metrics(tmp_path / "whole") if FIGURES[0] not in line
    ]
    assert same_weights(tmp_path / "stopped" / "model", tmp_path / "whole" / "model")


def test_one_of_two_processes_probes_and_the_other_waits(sounds, labelled, tmp_path):  # noqa: F811
    program = tmp_path / "two.py"
    program.write_text(
        "import json, sys\n"
        "from transformers_sslam.audio.batches import DataSettings\n"
        "from transformers_sslam.pretraining.loop import PreTrainer\n"
        "from transformers_sslam.pretraining.settings import PreTrainingSettings, StudentProbeSettings\n"
        "settings = json.loads(sys.argv[1]); settings['data'] = DataSettings(**settings['data'])\n"
        "settings['probe'] = StudentProbeSettings(**settings['probe'])\n"
        "run = PreTrainer(PreTrainingSettings(**settings))\n"
        "run.run()\n"
        "open(f'{sys.argv[2]}/{run.accelerator.process_index}.json', 'w').write(json.dumps([run.step, run.probe is not None]))\n"
    )
    environment = {**ON_CPU, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for name, every in (("probed", 3), ("plain", None)):
        settings = recipe(sounds, tmp_path / name, per_device_train_batch_size=3, probe={"data_dir": str(labelled)}, probe_every=every)
        run_on_two([program, json.dumps(settings), tmp_path], tmp_path / "log", environment)
        assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[8, every is not None], [8, False]]
    assert list(probes(tmp_path / "probed")) == [0, 3, 6, 8]
    assert same_weights(tmp_path / "probed" / "model", tmp_path / "plain" / "model")


def test_the_command(sounds, labelled, tmp_path, capsys):  # noqa: F811
    words = ["--output_dir", str(tmp_path), "--data_dir", str(sounds), "--probe.data_dir", str(labelled), "--probe_every", "500"]
    settings = parse_settings(PreTrainingSettings, [*words, "--probe.test_folds", "0"])
    assert (settings.probe_every, settings.probe.data_dir, settings.probe.fold_column) == (500, str(labelled), "fold")
    assert settings.probe.test_folds == [0]
    assert main(["pretrain", *words, "--probe.label_column", "species", "--report_to", "none"]) == 1
    assert "sslam pretrain: error: probe: there is no column 'species'" in capsys.readouterr().err
    assert not checkpoints(tmp_path)


def test_settings_that_contradict_each_other_are_rejected(sounds, labelled, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"probe_every is 500, but there are no labelled clips to probe on: set probe\.data_dir"):
        plain_trainer(sounds, tmp_path, probe_every=500)
    with pytest.raises(UserError, match="probe_every is 0, but must be at least 1"):
        trainer(sounds, labelled, tmp_path, probe_every=0)
    with pytest.raises(UserError, match="per_device_eval_batch_size is 0 and probe.inverse_regularization 1, but both must be positive"):
        StudentProbeSettings(data_dir="clips", per_device_eval_batch_size=0)
    assert trainer(sounds, labelled, tmp_path, probe_every=None).probe is None  # clips of a recipe, of which nothing is read
