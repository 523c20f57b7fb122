"""An encoder for X-ARES (eXtensive Audio Representation and Evaluation Suite, Zhang et al., 2025).

Its runner imports a file and builds the one class in it whose name ends in "Encoder". This module serves the official SSLAM encoder. For
another checkpoint, write a file of your own:

```python
from transformers_sslam.evaluation.adaptors import xares


class RainEncoder(xares.SSLAMEncoder):
    model = "runs/rain"
```

X-ARES keeps embeddings by the name of the class: give each checkpoint, and each choice of layers, a name of its own. It pads the clips of
a batch with zeros to the longest and does not pass their lengths on, so the zeros are embedded as silence.

Its shards are decoded by torchaudio, which needs FFmpeg's libraries. Where there are none, every clip is left out without a word, and
the run ends with "Empty dataloader". One line in the file of the encoder lets this package decode instead:

```python
webdataset.torch_audio = xares.decode_audio
```
"""

import logging
from collections.abc import Sequence

import torch

from ...audio.decode import AUDIO_SUFFIXES, load_waveform
from ...errors import AudioDecodingError
from . import embedder


logger = logging.getLogger(__name__)

DECODED_RATE = 16_000  # Hz; X-ARES resamples for an encoder of another rate


def decode_audio(key: str, data: bytes) -> tuple[torch.Tensor, int] | None:
    """A file of a shard, in the form of `webdataset.torch_audio`.

    Args:
        key: its name behind the first dot.
        data: its bytes.

    Returns:
        The waveform, mixed down, `(1, samples)`, and its rate in Hz; `None` if the file is not audio.

    Raises:
        AudioDecodingError: if it cannot be decoded. It is logged, because X-ARES leaves such a clip out without a word.
    """
    if f".{key.rpartition('.')[2].lower()}" not in AUDIO_SUFFIXES:
        return None
    try:
        return torch.from_numpy(load_waveform(data, DECODED_RATE)).unsqueeze(0), DECODED_RATE
    except AudioDecodingError as error:
        logger.warning(f"X-ARES leaves a clip out, because it cannot be decoded: {error}")
        raise


class SSLAMEncoder(embedder.Embedder):
    """A vector for each time step of 160 ms.

    Attributes:
        model: folder, Hub id, or an official checkpoint.
        layers: whose outputs are taken, and concatenated: -1 for the last one, 0 for the input of the first.
        step_pooling: of the 8 patches of a step: their `"mean"`, or all `"patches"`, concatenated.
    """

    model: str = embedder.DEFAULT_MODEL
    layers: Sequence[int] = (-1,)
    step_pooling: embedder.StepPooling = "mean"

    def __init__(self) -> None:
        super().__init__(self.model, layers=self.layers)
        config = self.encoder.config
        patches = config.num_frequency_patches if self.step_pooling == "patches" else 1
        self.output_dim = len(self.layers) * patches * config.hidden_size
        self.hop_size_in_ms = self.step_ms

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Audio `(clips, samples)` at `sampling_rate` -> `(clips, steps, output_dim)`, float32, on the CPU.

        Raises:
            ValueError: if the audio has another shape, or is not finite.
        """
        return self.embed_steps(audio, self.step_pooling)
