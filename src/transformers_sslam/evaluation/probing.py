"""What a frozen encoder knows: a linear classifier on its mean patch tokens."""

from collections.abc import Iterable

import numpy as np
import torch

from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMModel


@torch.inference_mode()
def mean_patch_embeddings(
    model: SSLAMModel, extractor: SSLAMFeatureExtractor, waveforms: Iterable[np.ndarray], batch_size: int = 16
) -> np.ndarray:
    """Mean over the patch tokens of each clip, `(clips, hidden_size)`, float32.

    Args:
        model: the encoder, which is put into eval mode.
        extractor: gives each clip its `max_length` frames; the padding among them is masked.
        waveforms: `(samples,)` each, at the extractor's rate.
        batch_size: clips at a time.
    """
    model.eval()
    rows, waveforms = [], list(waveforms)
    for start in range(0, len(waveforms), batch_size):
        inputs = extractor(
            waveforms[start : start + batch_size],
            sampling_rate=extractor.sampling_rate,
            return_attention_mask=True,
            return_tensors="pt",
            device=model.device,
        )
        tokens = model(**inputs).last_hidden_state[:, 1:].float()
        size, repeats = model.config.patch_size, model.config.num_frequency_patches
        heard = inputs["attention_mask"].bool().unflatten(1, (-1, size)).any(-1).repeat_interleave(repeats, dim=1).unsqueeze(-1)
        rows.append(((tokens * heard).sum(1) / heard.sum(1)).cpu().numpy())
    return np.concatenate(rows)


def linear_probe(
    train_features: np.ndarray, train_labels: np.ndarray, eval_features: np.ndarray, eval_labels: np.ndarray, strength: float = 1.0
) -> float:
    """Accuracy of a logistic regression on standardised features.

    Args:
        train_features, eval_features: `(clips, width)`.
        train_labels, eval_labels: `(clips,)`, class indices.
        strength: inverse of the L2 regularisation (scikit-learn's `C`).

    Raises:
        ValueError: if features are not finite.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not np.isfinite(train_features).all() or not np.isfinite(eval_features).all():
        raise ValueError("features are NaN or infinite: is the model whole?")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))
    return float(classifier.fit(train_features, train_labels).score(eval_features, eval_labels))
