"""Classifiers trained by gradient descent: those that choose among patch tokens, and those that combine the blocks.

A mean over all patches dilutes what a few of them hold, and the last block lacks what earlier ones may hold.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from ..losses_sslam import known_binary_cross_entropy
from ..pooling_sslam import SSLAMLayerPooling
from ..settings import setting
from .features import Features


# What a head takes of some clips, by their indices: values `(clips, ..., width)` to be standardised, and what is given beside them.
Read = Callable[[Features, np.ndarray], tuple[torch.Tensor, ...]]


@dataclass(kw_only=True)
class HeadSettings:
    """Attentive and prototype probes, weighted sums and gates: AdamW, a cosine to zero, no warm-up"""

    queries: int = setting("learned queries of the attentive probe, each of which pools the patches once", 8)
    prototypes: int = setting("learned prototypes for each class, of the prototype probe", 8)
    num_train_epochs: int = setting("passes over the training clips", 60)
    per_device_train_batch_size: int = setting("clips in a training step", 32)
    learning_rate: float = setting("peak learning rate", 1e-2)
    weight_decay: float = setting("weight decay of AdamW, on all weights", 0.05)

    def __post_init__(self):
        for name in ("queries", "prototypes", "num_train_epochs", "per_device_train_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"heads.{name} is {getattr(self, name)}, but must be at least 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise UserError(
                f"heads.learning_rate is {self.learning_rate:g} and must be positive, heads.weight_decay is {self.weight_decay:g} and must "
                "not be negative"
            )


class AttentivePooling(nn.Module):
    """Each learned query attends over the patches; a linear layer reads the concatenated results.

    The attentive probe of AIM (El-Nouby et al., 2024) without projections, which query and linear layer subsume.
    """

    def __init__(self, width: int, classes: int, settings: HeadSettings):
        super().__init__()
        self.queries = nn.Linear(width, settings.queries, bias=False)
        self.classifier = nn.Linear(settings.queries * width, classes)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(clips, patches, width) and (clips, patches), boolean, false for padding -> logits (clips, classes)."""
        weights = self.queries(tokens).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        return self.classifier((weights.transpose(1, 2) @ tokens).flatten(1))


class PrototypePooling(nn.Module):
    """The cosine between each learned prototype and the patch most similar to it; a linear layer weighs these similarities.

    As in ProtoPNet (Chen et al., 2019), which Bird-MAE (Rauch et al., 2025) uses to probe frozen audio encoders. At first the linear layer
    connects each prototype only to its class.
    """

    SCALE = 10.0  # of the logits at first: cosines alone are small

    def __init__(self, width: int, classes: int, settings: HeadSettings):
        super().__init__()
        prototypes = settings.prototypes
        self.prototypes = nn.Parameter(torch.randn(classes * prototypes, width))
        self.classifier = nn.Linear(classes * prototypes, classes)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.eye(classes).repeat_interleave(prototypes, dim=1) * self.SCALE / prototypes)
            self.classifier.bias.zero_()

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(clips, patches, width) and (clips, patches), boolean, false for padding -> logits (clips, classes)."""
        cosines = nn.functional.normalize(tokens, dim=-1) @ nn.functional.normalize(self.prototypes, dim=-1).T
        return self.classifier(cosines.masked_fill(~mask[..., None], -1.0).amax(1))


class LayerCombination(nn.Module):
    """A linear layer on the sum of all blocks' outputs, weighted by a learned softmax, which depends on the clip if `gated`."""

    def __init__(self, blocks: int, width: int, classes: int, settings: HeadSettings, gated: bool):
        super().__init__()
        self.layer_pooling = SSLAMLayerPooling(blocks, width, gated)
        self.classifier = nn.Linear(width, classes)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """(clips, blocks, width) -> logits (clips, classes)."""
        return self.classifier(self.layer_pooling(vectors))


class TrainedHead:
    """A head on standardised values, trained on all clips of `features`.

    Args:
        build: makes the head from the shape of a clip's values (without that of patches), number of classes and settings.
        read: what the head takes.
        targets: `(clips,)`, class indices; or `(clips, classes)`, 0, 1, or -100 where unknown.
        seed: random seed for the head's weights and the order of clips.
    """

    def __init__(
        self,
        build: Callable[..., nn.Module],
        read: Read,
        features: Features,
        targets: np.ndarray,
        classes: int,
        settings: HeadSettings,
        seed: int,
        device: torch.device | str,
    ):
        self.read, self.batch_size, self.device = read, settings.per_device_train_batch_size, device
        mean, std = _moments(read, features, self.batch_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = build(*mean.shape, classes, settings).to(device)
        self.mean, self.std = mean.to(device), std.to(device)
        labels = torch.from_numpy(targets if targets.ndim == 1 else targets.astype(np.float32)).to(device)
        loss_function = nn.functional.cross_entropy if targets.ndim == 1 else known_binary_cross_entropy
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        steps = settings.num_train_epochs * -(-len(features) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = np.random.default_rng(seed)
        for _ in range(settings.num_train_epochs):
            order = generator.permutation(len(features))
            for batch in _batches(len(features), self.batch_size):
                clips = np.sort(order[batch])  # sorted, the disk reads forwards
                loss = loss_function(self._logits(features, clips), labels[clips])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.head.eval()

    def _logits(self, features: Features, clips: np.ndarray) -> torch.Tensor:
        values, *others = (part.to(self.device) for part in self.read(features, clips))
        return self.head((values - self.mean) / self.std, *others)

    @torch.inference_mode()
    def scores(self, features: Features) -> np.ndarray:
        """Logits of all clips, `(clips, classes)`, float32."""
        return np.concatenate([self._logits(features, clips).cpu().numpy() for clips in _batches(len(features), self.batch_size)])


def _moments(read: Read, features: Features, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (1 if constant) of each channel: over all patches but padding, `(width,)`; of each block over clips,
    `(blocks, width)`."""
    count, total, squares, shift = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for clips in _batches(len(features), batch_size):
        values, *mask = read(features, clips)
        values = (values[mask[0]] if mask else values).double()
        if count == 0:
            shift = values[0]  # nearer to the mean than 0 is, so that squares of differences keep their digits
        values = values - shift
        count, total, squares = count + len(values), total + values.sum(0), squares + (values**2).sum(0)
    mean = total / count
    std = (squares / count - mean**2).clamp_min(0).sqrt()
    return (mean + shift).float(), torch.where(std > 0, std, 1).float()


def _batches(clips: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, clips)) for start in range(0, clips, size)]
