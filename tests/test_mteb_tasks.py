"""The tasks of mteb on sets of speakers and instruments: scripts/studies/speech_and_music.py."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import noise


pytest.importorskip("mteb", reason="needs the extra mteb")

from transformers_sslam.cli import main
from transformers_sslam.polyphony.benchmark import BenchmarkSettings, make_benchmark
from transformers_sslam.polyphony.render import MixtureSettings


TASKS = Path(__file__).parents[1] / "scripts" / "studies" / "speech_and_music.py"


def test_every_kind_of_task_runs_on_the_sets_and_their_mixtures(tmp_path, monkeypatch, capsys):
    """Three tones in noise stand for voices and instruments: a log-mel tells them apart."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for kind in ("speakers", "instruments"):
        folder = tmp_path / "runs" / kind
        folder.mkdir(parents=True)
        lines = ["file_name,label,recording,fold"]
        for fold in (3, 4):
            for i in range(12):
                label, name = "abc"[i % 3], f"{fold}-{i}"
                tone = np.sin(2 * np.pi * 300 * 3 ** (i % 3) * np.arange(8000) / 16_000)
                soundfile.write(folder / f"{name}.flac", 0.2 * tone + 0.02 * noise(0.5, seed=100 * fold + i), 16_000)
                lines.append(f"{name}.flac,{label},{name},{fold}")
        (folder / "metadata.csv").write_text("\n".join(lines))
        make_benchmark(
            BenchmarkSettings(
                data_dir=str(folder),
                output_dir=f"runs/polyphonic_{kind}",
                **{"fold_column": "fold", "train_folds": [3], "test_folds": [4], "num_events": [1, 2], "train_clips": 12, "test_clips": 6},
                mixing=MixtureSettings(clip_seconds=0.6, event_seconds=0.3, repeat_classes=False),
            )
        )
    assert main(["benchmark", "--tasks", str(TASKS), "--model", "log_mel", "--output_dir", "runs/benchmark"]) == 0
    found = {name: float(value) for name, value in re.findall(r"\| (\w+) \| test \| \w+ \| ([\d.]+)", capsys.readouterr().out)}
    kinds = ("", "Clustering", "Reranking", "AtOnce")
    assert found.keys() == {f"{name}{kind}" for name in ("Speakers", "Instruments") for kind in kinds}
    for name in ("Speakers", "Instruments"):
        assert found[name] == 1
        assert found[f"{name}Clustering"] > 0.9
        assert found[f"{name}Reranking"] > 0.9
        assert found[f"{name}AtOnce"] > 0.99  # 0.96 of classifiers that give 0 or 1
