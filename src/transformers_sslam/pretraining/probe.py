"""Linear probes while pre-training runs: what the student's frozen features say of labelled clips, which the loss does not tell.

Nothing of the training changes: no gradient, no random number, and the student is in training mode again at the next step.
"""

from collections.abc import Iterator

import numpy as np
import torch

from ..configuration_sslam import ClipPooling
from ..errors import UserError
from ..evaluation.features import pool_log_mel
from ..evaluation.frozen import read_task
from ..evaluation.probing import LogisticRegressions, score
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMModel
from ..pooling_sslam import pool_tokens, sounding_tokens
from .settings import StudentProbeSettings


POOLING: ClipPooling = "max_by_frequency"  # under which an untrained network is not at a disadvantage, as it is under the mean


class StudentProbe:
    """Logistic regressions on the first and the last block of an encoder, tried on clips that were held out.

    Clips are decoded here, once, and kept as far as `memory_gb` allows; they are encoded in batches, of which the pooled features are kept.

    Args:
        settings: labelled clips, and how they are held out.
        extractor: of the run; it pads or cuts each clip to its `max_length`.

    Attributes:
        metric: `"accuracy"`, or `"mean average precision"` where a clip may have several labels: the mean over what is held out in turn.
        log_mel: the metric with statistics of the log-mels in place of features: the baseline without a network.

    Raises:
        UserError: if the data lack what the settings ask for, or a class cannot be learned.
    """

    def __init__(self, settings: StudentProbeSettings, extractor: SSLAMFeatureExtractor):
        self.settings, self.extractor = settings, extractor
        try:
            self.task = read_task(settings, extractor.sampling_rate)  # type: ignore[arg-type]  # all that it takes of FrozenSettings
        except UserError as error:  # which does not say whose clips they are
            raise UserError(f"probe: {error}") from error
        self.metric = "accuracy" if self.task.targets.ndim == 1 else "mean average precision"
        self.log_mel = self._evaluate(np.concatenate([log_mel_statistics(**inputs) for inputs in self._batches()]))

    @torch.no_grad()
    def __call__(self, encoder: SSLAMModel) -> dict[str, float]:
        """`probe_last_block`, `probe_first_block` and `probe_log_mel`: the metric with features of this encoder's blocks, and without it.
        Leaves the encoder in evaluation mode."""
        encoder.eval()
        first, last = list[np.ndarray](), list[np.ndarray]()
        for inputs in self._batches():
            inputs = {name: values.to(encoder.device) for name, values in inputs.items()}
            hidden_states = encoder(**inputs, output_hidden_states=True).hidden_states  # the first block's input, and each block's output
            frequencies = encoder.config.num_frequency_patches
            mask = sounding_tokens(inputs["attention_mask"].bool(), encoder.config.patch_size, frequencies)
            for found, tokens in ((first, hidden_states[1]), (last, hidden_states[-1])):
                found.append(pool_tokens(tokens.float(), mask, POOLING, frequencies).cpu().numpy())
        values = {name: self._evaluate(np.concatenate(found)) for name, found in (("last_block", last), ("first_block", first))}
        return {f"probe_{name}": value for name, value in (*values.items(), ("log_mel", self.log_mel))}

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        size, waveforms = self.settings.per_device_eval_batch_size, self.task.waveforms
        for start in range(0, len(waveforms), size):
            clips = [waveforms[i] for i in range(start, min(start + size, len(waveforms)))]
            rate = self.extractor.sampling_rate
            yield dict(self.extractor(clips, sampling_rate=rate, return_attention_mask=True, return_tensors="pt"))

    def _evaluate(self, features: np.ndarray) -> float:
        if not np.isfinite(features).all():
            raise UserError("features of the probe are NaN or infinite: the training has diverged, start again with a lower learning_rate")
        values, targets = [], self.task.targets
        for part in self.task.partitions:
            regressions = LogisticRegressions(features[part.train], targets[part.train], self.settings.inverse_regularization)
            values.append(score(regressions.scores(features[part.evaluation]), targets[part.evaluation]))
        return float(np.mean(values))


def log_mel_statistics(input_values: torch.Tensor, attention_mask: torch.Tensor) -> np.ndarray:
    """`(batch, 2 * mel bins)`: mean and standard deviation over the frames `(batch, frames, mel bins)` that are not padding."""
    pooled = pool_log_mel(input_values, attention_mask.bool())
    return torch.cat((pooled["mean"], pooled["std"]), dim=1).numpy()
