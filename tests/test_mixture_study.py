"""The study of mixtures: errors of pairs by hand, tables."""

import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from test_studies import load_script

from transformers_sslam.fbank import log_mel


@pytest.fixture(scope="module")
def study():
    return load_script("mixtures")


def test_a_sound_over_itself_is_6_db_in_waveforms_3_db_in_energies_and_0_db_in_the_maximum(study):
    sound = torch.from_numpy(noise(1.0))
    for snr, expected in ((0, {"log_mel": 20 * np.log10(2), "mel": 10 * np.log10(2)}), (20, {"log_mel": 20 * np.log10(1.1)})):
        errors = study.errors_db(sound, sound, snr)
        for name, error in expected.items():
            assert -errors[name].median().item() == pytest.approx(error if name == "log_mel" else expected["log_mel"] - error, abs=1e-3)


def test_errors_are_those_of_cells_in_which_both_clips_sound(study):
    first, second = torch.from_numpy(noise(1.0)), torch.from_numpy(noise(1.0, seed=1))
    second[8000:] = 0
    gain = 10 * np.log10(first.square().mean() / second.square().mean()) - 10.0
    errors = study.errors_db(first, second, 10.0)
    exact = log_mel(first - first.mean() + 10 ** (gain / 20) * (second - second.mean()))
    assert errors["mel"].shape == errors["log_mel"].shape
    assert len(errors["mel"]) < 0.6 * exact.numel()
    assert abs(errors["mel"].mean().item()) < 1.0
    assert errors["log_mel"].mean() < errors["mel"].mean(), "the maximum is the lower of the two"


@pytest.mark.timeout(300)
def test_the_command_writes_both_tables(study, tmp_path, monkeypatch, capsys):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", noise(0.6, seed=i), 16_000)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "max_length": 256}
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_groups": 8, "unmixed_span_length": 32}
    monkeypatch.setattr(study, "SMALL", {**small, **decoder})
    monkeypatch.setattr(study, "SMALL_FRAMES", 128)
    words = ["mixtures.py", "--data_dir", str(tmp_path), "--clips", "3", "--seconds", "0.5", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--output_file", str(tmp_path / "figures.json")])
    study.main()
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["distances"]) == ["0", "5", "10", "20", "30"]
    assert all(0 < values["rms"] < 10 for by_name in figures["distances"].values() for values in by_name.values())
    assert figures["costs"].keys() == study.VARIANTS.keys()
    assert printed.count("\n| ") == 2 + 5 + len(study.VARIANTS) - 1
    monkeypatch.setattr(sys, "argv", [*words[:4], "9", *words[5:]])
    with pytest.raises(SystemExit, match="has 3 pairs of clips of 0.5 s that sound, fewer than 9"):
        study.main()
