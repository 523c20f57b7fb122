"""Mean and standard deviation of one's own recordings, as pre-training takes them."""

import json

import numpy as np
import pytest
from test_pretraining_loop import sounds, trainer  # noqa: F401  # a fixture

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.audio import load_waveform
from transformers_sslam.errors import UserError


@pytest.mark.parametrize("num_workers", [0, 2])
def test_computed_from_all_recordings_of_a_run(sounds, tmp_path, num_workers):  # noqa: F811
    clips = [load_waveform(file) for file in sorted(sounds.iterdir())]
    mean, std = SSLAMFeatureExtractor().compute_normalization(clips)
    run = trainer(sounds, tmp_path, normalization="computed", dataloader_num_workers=num_workers, max_steps=3)
    assert (run.extractor.mean, run.extractor.std) == (pytest.approx(mean, abs=1e-6), pytest.approx(std, abs=1e-6))
    assert run.model.config.padding_value == pytest.approx(run.extractor.scaled_padding_value)
    values = np.concatenate([batch["input_values"].numpy().ravel() for batch, _ in zip(run.clips, range(3))])
    assert abs(values.mean()) < 0.5  # with AudioSet's, these sounds are scaled to something else
    run.run()
    saved = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert (saved["mean"], saved["std"]) == (run.extractor.mean, run.extractor.std)


def test_a_resumed_run_keeps_those_that_it_began_with(sounds, tmp_path, monkeypatch):  # noqa: F811
    first = trainer(sounds, tmp_path, normalization="computed", max_steps=3)
    first.run()
    monkeypatch.setattr(SSLAMFeatureExtractor, "compute_normalization", lambda *_: pytest.fail("computed again"))
    second = trainer(sounds, tmp_path, normalization="computed", max_steps=6)
    assert (second.extractor.mean, second.extractor.std) == (first.extractor.mean, first.extractor.std)


def test_given_or_by_name(sounds, tmp_path):  # noqa: F811
    assert trainer(sounds, tmp_path, normalization=[-5.0, 3.0]).extractor.mean == -5.0
    with pytest.raises(UserError, match="normalization is 'computed', but feature_extractor has mean, std too: leave one of them out"):
        trainer(sounds, tmp_path, normalization="computed", feature_extractor={"mean": 0.0, "std": 1.0})
    with pytest.raises(UserError, match=r"normalization is 'own', but one of model, computed, .* or \[mean, std\] is expected"):
        trainer(sounds, tmp_path, normalization="own")
