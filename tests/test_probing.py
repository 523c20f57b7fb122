"""Frozen features and the linear classifier on them."""

import numpy as np
import pytest
import torch
from conftest import noise, tiny_config

from transformers_sslam import SSLAMFeatureExtractor, SSLAMModel
from transformers_sslam.evaluation.probing import linear_probe, mean_patch_embeddings


def test_features_are_the_mean_of_the_patches_that_are_heard():
    """Clips of unequal length in one batch, each as if alone and without its padding."""
    model, extractor = SSLAMModel(tiny_config()).eval(), SSLAMFeatureExtractor(max_length=256)
    clips = [noise(0.5), noise(2.0, seed=1), noise(1.3, seed=2)]
    features = mean_patch_embeddings(model, extractor, clips, batch_size=2)
    assert features.shape == (3, 32)
    for row, clip in zip(features, clips):
        inputs = extractor(clip, sampling_rate=16_000, padding="longest", return_tensors="pt")
        with torch.inference_mode():
            alone = model(**inputs).last_hidden_state[0, 1:].mean(0)
        np.testing.assert_allclose(row, alone, atol=1e-5)


def test_a_linear_probe_finds_what_is_linear_and_only_that():
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = generator.standard_normal((90, 8))
    assert linear_probe(features[:60], labels[:60], features[60:], labels[60:]) < 0.7
    features[:, 0] += 1e3 * labels  # on its own scale, which standardising takes away
    assert linear_probe(features[:60], labels[:60], features[60:], labels[60:]) > 0.95


def test_features_that_are_not_finite_are_refused():
    features = np.full((4, 2), np.nan)
    with pytest.raises(ValueError, match="NaN"):
        linear_probe(features, np.arange(4), features, np.arange(4))
