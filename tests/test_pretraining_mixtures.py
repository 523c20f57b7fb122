"""Pre-training on mixtures of more sources, with gains, mixed in other ways: their targets, and the loop."""

import os
import signal
from itertools import islice

import pytest
import torch
import yaml
from conftest import tiny_config

from transformers_sslam import SSLAMForPreTraining
from transformers_sslam.mixing import LogMelScale, draw_sources


pytest.importorskip("soundfile")
from processes import run_on_two
from test_host_synchronisation import HostSynchronisations, a_trainer, batches
from test_pretraining_loop import (
    MODEL,
    ON_CPU,
    SCRIPT,
    interrupted_after,
    kill_at_random_moments,
    metrics,
    recipe,
    same_weights,
    sounds,  # noqa: F401  # a fixture
    trainer,
)
from test_pretraining_model import build, log_mels, seeded, target

from transformers_sslam.audio.batches import ClipStream, DataSettings
from transformers_sslam.errors import UserError
from transformers_sslam.fbank import log_mel
from transformers_sslam.feature_extraction_sslam import SSLAMFeatureExtractor
from transformers_sslam.masking import inverse_block_masks
from transformers_sslam.pretraining.monitoring import training_flops_per_clip
from transformers_sslam.pretraining.settings import PreTrainingSettings
from transformers_sslam.settings import parse_settings


MASKS = inverse_block_masks(8, 8, 8, mask_ratio=0.7, generator=seeded())  # two views of each of four clips of 128 frames
CONTENT = {"patch_embedding_gain": 20, "position_embedding_scale": 0.1}  # so that targets differ between mixtures
FREE = {"num_sources": [2, 3], "gain_db": [-10, 5], "mixing_partners": "batch"}


# --- targets


@pytest.mark.parametrize("domain", ["log_mel", "mel", "waveform"])
@pytest.mark.parametrize("starts", [[16, 80], [[16, 80], [0, 64], [96, 32], [0, 32]]], ids=["shared", "per clip"])
@pytest.mark.parametrize("free", [{"num_sources": 3}, {"num_sources": 3, "gain_db": [-10, 5]}, FREE], ids=["three", "gains", "drawn"])
def test_retention_targets_are_the_mean_over_sources_as_the_mixture_has_them(domain, starts, free):
    """Written out a source at a time: the teacher receives each with its gain and without the spans, where the clip's own target stands."""
    model, x, starts = build(mask_noise_std=0.0, mixing_domain=domain, **CONTENT, **free), 0.2 * log_mels(4), torch.tensor(starts)
    extra = {}
    if domain == "waveform":
        waveforms = torch.randn(4, 127 * 160 + 400, generator=seeded(2))
        x = LogMelScale().scaled(log_mel(waveforms))
        extra = {"waveforms": waveforms, "attention_mask": torch.ones(4, 128)}
    output = model(x, MASKS, starts, generator=seeded(5), output_targets=True, **extra)
    drawn = draw_sources(4, free["num_sources"], free.get("mixing_partners", "neighbour"), free.get("gain_db"), generator=seeded(5))
    assert torch.equal(output.partners, drawn.partners)
    for clip in range(4):
        spans = starts if starts.dim() == 1 else starts[clip]
        inside = torch.zeros(128, dtype=torch.bool)
        for start in spans.tolist():
            inside[start : start + 32] = True
        kept = [patch for patch in range(64) if not inside[patch // 8 * 16]]
        own = target(model, x[clip], None)
        targets, energies, samples = [own], [(x[clip] * 9.138).exp()], [extra["waveforms"][clip] if extra else 0]
        for i, other in enumerate(drawn.partners[:, clip].tolist()):
            if drawn.present is not None and not drawn.present[i, clip]:
                continue
            gain = 0.0 if drawn.gain_db is None else drawn.gain_db[i, clip].item()
            source = x[other] + gain / 10 * torch.log(torch.tensor(10.0)) / 9.138  # twice the standard deviation of AudioSet
            if domain == "waveform":  # exactly: its log-mel has an empty filter, which no gain raises
                samples.append(10 ** (gain / 20) * waveforms[other])
                source = LogMelScale().scaled(log_mel(samples[-1]))
            foreign = own.clone()
            foreign[kept] = target(model, source, None, kept)
            targets.append(foreign)
            energies.append((source * 9.138).exp())
        mean = torch.stack(targets).mean(0)
        for view in (2 * clip, 2 * clip + 1):
            torch.testing.assert_close(output.source_retention_targets[view], mean[MASKS[view]], rtol=1e-3, atol=1e-4)
        mixed = {
            "log_mel": lambda energies=energies: torch.stack(energies).amax(0).log() / 9.138,
            "mel": lambda energies=energies: torch.stack(energies).sum(0).log() / 9.138,
            "waveform": lambda samples=samples: (log_mel(sum(samples)) + 4.268) / 9.138,
        }[domain]()
        expected = torch.where(inside[:, None], x[clip], mixed)
        torch.testing.assert_close(output.mixed_input_values[clip], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 3),
        ({"num_sources": 3}, 3),  # with spans of the whole batch and no gains a clip is the same source everywhere
        ({"num_sources": 3, "gain_db": [0, 0]}, 6),
        ({"num_sources": 3, "unmixed_spans_per_clip": True}, 6),
        ({"num_sources": [2, 3], "gain_db": [0, 0]}, 6),
    ],
    ids=str,
)
def test_the_teacher_receives_no_more_than_it_must_and_the_operations_are_counted(settings, rows):
    """Operations of a pass, see test_pretraining_variants.py: 33 tokens of width 32, and with gains an embedding of a clip too."""
    model, passes = build(unmixed_span_length=32, **settings), []
    model.teacher.layers[0].register_forward_hook(lambda module, inputs, output: passes.append(inputs[0].shape))
    model(log_mels(3), generator=seeded())
    assert passes == [(6, 65, 32), (rows, 33, 32)]
    published = training_flops_per_clip(build(unmixed_span_length=32).config, 128)
    extra = (rows // 3 - 1) * 1_360_128 + (rows // 3 * 1_048_576 if "gain_db" in settings else 0)
    assert training_flops_per_clip(model.config, 128) == published + extra


def test_gains_of_0_db_change_nothing_but_rounding():
    one, other = (build(**settings)(0.2 * log_mels(3), MASKS[:6], torch.tensor([0, 64])) for settings in ({}, {"gain_db": [0, 0]}))
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-4, atol=0)


def test_one_seed_one_step_with_all_freedom():
    model = build(**FREE, mixing_domain="mel")
    first, again, other = (model(log_mels(4), generator=seeded(seed), output_targets=True) for seed in (3, 3, 4))
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.gain_db, again.gain_db)
    assert not torch.equal(first.gain_db, other.gain_db)


def test_gradients_are_finite_and_half_precision_agrees():
    model = build(**FREE, mixing_domain="mel")
    exact = model(log_mels(4), generator=seeded()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(log_mels(4), generator=seeded()).loss
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
    rounded.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("domain", ["log_mel", "mel", "waveform"])
def test_free_mixtures_compile_as_one_graph(domain):
    model = build(num_hidden_layers=1, mixing_domain=domain, **FREE)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    given = {"attention_mask": torch.ones(4, 128), "waveforms": 0.1 * torch.randn(4, 20_720)} if domain == "waveform" else {}
    losses = []
    for function in (model, compiled):
        torch.manual_seed(0)
        losses.append(function(log_mels(4), **given).loss)
    torch.testing.assert_close(*losses)


def test_a_step_of_free_mixtures_has_no_synchronisation(tmp_path):
    run = a_trainer(tmp_path, model_config={**MODEL, **FREE, "mixing_domain": "mel"})
    with HostSynchronisations() as synchronisations:
        run._train(batches(run))
    assert synchronisations.found == []


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_sources": 1}, r"num_sources is 1, but must be a whole number of at least 2, or two such, \[least, most\]"),
        ({"num_sources": [3, 2]}, r"num_sources is \[3, 2\]"),
        ({"num_sources": [2]}, r"num_sources is \[2\]"),
        ({"num_sources": []}, r"num_sources is \[\]"),
        ({"gain_db": [5, -5]}, r"gain_db is \[5, -5\], but must be \[lowest, highest\] in dB, or None for no gains"),
        ({"gain_db": [3]}, r"gain_db is \[3\]"),
        ({"gain_db": [float("-inf"), 0]}, r"gain_db is \[-inf, 0\]"),
        ({"log_mel_std": 0}, "log_mel_std is 0"),
        ({"sampling_rate": 16}, "sampling_rate is 16, but must be at least 1000 Hz"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


@pytest.mark.parametrize("settings", [{"mixing_domain": "phase"}, {"mixing_partners": "all"}, {"num_sources": 2.5}], ids=str)
def test_settings_of_another_kind_are_refused(settings):
    with pytest.raises(Exception, match=next(iter(settings))):
        tiny_config(**settings)


def test_more_sources_than_clips_are_refused_before_the_first_step(sounds, tmp_path):  # noqa: F811
    with pytest.raises(
        UserError, match="model_config.num_sources is 5, but per_device_train_batch_size 4, and no mixture takes a clip twice"
    ):
        trainer(sounds, tmp_path, model_config={**MODEL, "num_sources": 5})
    validation = {"validation": recipe(sounds, tmp_path)["data"], "validation_clips": 6}
    with pytest.raises(UserError, match="a validation batch has 2 clips of 3 that num_sources needs: set validation_clips to a multiple"):
        trainer(sounds, tmp_path, model_config={**MODEL, "num_sources": 3}, **validation)
    trainer(sounds, tmp_path, model_config={**MODEL, "num_sources": 3}, **{**validation, "validation_clips": 8})


# --- the loop


@pytest.mark.parametrize("features", ["worker", "device"])
def test_batches_have_waveforms_where_they_are_asked_for(sounds, features):  # noqa: F811
    """Those that the log-mels were made of: minus their mean, zeros behind."""
    extractor = SSLAMFeatureExtractor(max_length=64, mean=-5.0, std=3.0)
    settings = DataSettings([{"kind": "folder", "path": str(sounds)}], features=features)
    plain, with_waveforms = (ClipStream(settings, extractor, batch_size=4, epochs=1) for _ in range(2))
    with_waveforms.waveforms = True
    for expected, batch in islice(zip(plain, with_waveforms), 3):
        assert batch.keys() - expected.keys() == {"waveforms"}
        assert torch.equal(batch["input_values"], expected["input_values"])
        assert batch["waveforms"].shape == (4, 63 * 160 + 400)
        scaled = LogMelScale(-5.0, 3.0).scaled(log_mel(batch["waveforms"]))
        sound = batch["attention_mask"].bool()
        torch.testing.assert_close(scaled[sound], batch["input_values"][sound], rtol=1e-5, atol=1e-5)


def check_resumed_run(sounds, tmp_path, **changes) -> None:  # noqa: F811
    """A run that is stopped after four steps, and resumed, is the same as one that is not."""
    trainer(sounds, tmp_path / "whole", **changes).run()
    run = trainer(sounds, tmp_path / "stopped", **changes)
    interrupted_after(run, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run.run()
    trainer(sounds, tmp_path / "stopped", **changes).run()
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert same_weights(tmp_path / "stopped" / "model", tmp_path / "whole" / "model")


@pytest.mark.parametrize("domain", ["mel", "waveform"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stopped_run_of_free_mixtures_resumes_bit_for_bit(sounds, tmp_path, domain, workers):  # noqa: F811
    changes = {"model_config": {**MODEL, **FREE, "mixing_domain": domain}, "dataloader_num_workers": workers}
    check_resumed_run(sounds, tmp_path, **changes)
    config = SSLAMForPreTraining.from_pretrained(tmp_path / "whole" / "model").config
    assert (config.num_sources, config.gain_db, config.mixing_domain) == ([2, 3], [-10, 5], domain)


def test_a_killed_run_of_waveform_mixtures_resumes_bit_for_bit(sounds, tmp_path):  # noqa: F811
    model = {**MODEL, **FREE, "mixing_domain": "waveform"}
    kill_at_random_moments(sounds, tmp_path, processes=1, workers=0, kills=1, steps=30, forked=True, model_config=model)


def test_mixtures_are_of_the_scale_of_the_extractor(sounds, tmp_path):  # noqa: F811
    features = {"max_length": 64, "mean": -6.0, "std": 5.0}
    config = trainer(sounds, tmp_path, feature_extractor=features).model.config
    assert (config.log_mel_mean, config.log_mel_std, config.sampling_rate) == (-6.0, 5.0, 16_000)
    plain = trainer(sounds, tmp_path, feature_extractor={"max_length": 64, "do_normalize": False}).model.config
    assert LogMelScale(plain.log_mel_mean, plain.log_mel_std).scaled(torch.tensor(-3.0)) == -3.0


def test_flags_and_recipes_have_the_settings(sounds, tmp_path):  # noqa: F811
    words = ["--data_dir", str(sounds), "--output_dir", str(tmp_path), "--model_config.num_sources", "[2, 4]"]
    words += ["--model_config.gain_db", "[-10, 10]", "--model_config.mixing_domain", "waveform"]
    settings = parse_settings(PreTrainingSettings, words)
    assert settings.model_config == {"num_sources": [2, 4], "gain_db": [-10, 10], "mixing_domain": "waveform"}


def test_two_processes_train_on_waveform_mixtures(sounds, tmp_path):  # noqa: F811
    """With validation, and other sources in either process."""
    data = recipe(sounds, tmp_path)["data"]
    changes = {"per_device_train_batch_size": 3, "validation": data, "validation_clips": 6, "eval_steps": 4}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe(sounds, tmp_path / "run", **changes, model_config={**MODEL, **FREE, "mixing_domain": "waveform"}))
    )
    run_on_two([SCRIPT, "--config", tmp_path / "recipe.yaml"], tmp_path / "log", ON_CPU)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert all(line["source_retention_loss"] > 0 for line in lines if "loss" in line)
    assert sum("validation_loss" in line for line in lines) == 2


def test_a_run_of_free_mixtures_learns_and_does_not_collapse(sounds, tmp_path):  # noqa: F811
    changes = {"max_steps": 60, "warmup_steps": 5, "learning_rate": 5e-3, "save_steps": 100, "logging_steps": 20}
    trainer(sounds, tmp_path, **changes, model_config={**MODEL, **FREE, "mixing_domain": "waveform"}).run()
    lines = metrics(tmp_path)
    losses = [sum(line["source_retention_loss"] for line in part) / 10 for part in (lines[:10], lines[-10:])]
    assert losses[1] < losses[0]
    assert min(line["target_std"] for line in lines) > 0.5
