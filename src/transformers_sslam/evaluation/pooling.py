"""Classifiers that choose among patch tokens, and their training on tokens read from disk.

A mean over patches dilutes what a few of them hold: of sounds at once, each has patches of its own. Here a small head learns where to
look.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..settings import setting
from .features import Features, ProbeError


@dataclass
class HeadSettings:
    """How heads on patch tokens are built and trained: AdamW, a cosine to zero, no warm-up."""

    queries: int = setting("learnt queries of the attentive probe, each of which pools the patches once", 8)
    prototypes: int = setting(
        "learnt prototypes a class, of the prototype probe; few find little, for each learns only where it is nearest", 8
    )
    epochs: int = setting("passes over the training clips", 60)
    batch_size: int = setting("clips a step", 32)
    learning_rate: float = setting("at the beginning", 1e-2)
    weight_decay: float = setting("of AdamW, on all weights", 0.05)

    def __post_init__(self):
        for name in ("queries", "prototypes", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ProbeError(f"heads.{name} is {getattr(self, name)}, but must be at least 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ProbeError(
                f"heads.learning_rate is {self.learning_rate:g} and heads.weight_decay {self.weight_decay:g}, but must be positive, and "
                "not negative"
            )


class AttentivePooling(nn.Module):
    """Each learnt query attends over the patches that are heard; a linear layer reads what all of them found.

    As the attentive probe of AIM (El-Nouby et al., 2024), without its projections: before a learnt query and a linear layer they could
    say nothing that these do not.
    """

    def __init__(self, width: int, classes: int, queries: int):
        super().__init__()
        self.queries = nn.Linear(width, queries, bias=False)
        self.classifier = nn.Linear(queries * width, classes)

    def forward(self, tokens: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        """(clips, patches, width) and (clips, patches), boolean -> logits (clips, classes)."""
        weights = self.queries(tokens).masked_fill(~heard[..., None], -torch.inf).softmax(1)
        return self.classifier((weights.transpose(1, 2) @ tokens).flatten(1))


class PrototypePooling(nn.Module):
    """The cosine between each learnt prototype and the patch most like it; a linear layer weighs these similarities.

    Prototypes as in ProtoPNet (Chen et al., 2019, "This looks like that"), which Bird-MAE (Rauch et al., 2025) uses to probe frozen audio
    encoders. Each belongs to a class, to which alone the linear layer connects it at first.
    """

    SCALE = 10.0  # of the logits at first: cosines alone could not tell classes apart with confidence

    def __init__(self, width: int, classes: int, prototypes: int):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(classes * prototypes, width))
        self.classifier = nn.Linear(classes * prototypes, classes)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.eye(classes).repeat_interleave(prototypes, dim=1) * self.SCALE / prototypes)
            self.classifier.bias.zero_()

    def forward(self, tokens: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        """(clips, patches, width) and (clips, patches), boolean -> logits (clips, classes)."""
        cosines = nn.functional.normalize(tokens, dim=-1) @ nn.functional.normalize(self.prototypes, dim=-1).T
        return self.classifier(cosines.masked_fill(~heard[..., None], -1.0).amax(1))


class TrainedHead:
    """A head and the scale of the tokens it was trained on, on one device."""

    def __init__(self, head: nn.Module, mean: torch.Tensor, deviation: torch.Tensor, batch_size: int):
        self.head, self.mean, self.deviation, self.batch_size = head, mean, deviation, batch_size

    def logits(self, features: Features, clips: np.ndarray) -> torch.Tensor:
        """(n, classes) of the clips of these indices, which are read from disk."""
        tokens, heard = (part.to(self.mean.device) for part in features.patch_tokens(clips))
        return self.head((tokens - self.mean) / self.deviation, heard)

    @torch.inference_mode()
    def scores(self, features: Features) -> np.ndarray:
        """Logits of all clips, `(clips, classes)`, float32."""
        self.head.eval()
        return np.concatenate([self.logits(features, clips).cpu().numpy() for clips in _batches(len(features), self.batch_size)])


def train_head(
    build: Callable[[], nn.Module], features: Features, targets: np.ndarray, settings: HeadSettings, seed: int, device: torch.device
) -> TrainedHead:
    """Train a head on all clips of `features`.

    Args:
        build: makes the head, from torch's global random state, which the seed sets for it alone.
        features: with patch tokens.
        targets: `(clips,)`, class indices; or `(clips, classes)`, 0 or 1.
        settings: of the training.
        seed: of the head's weights and the order of clips.
        device: to train on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build().to(device)
    trained = TrainedHead(head.train(), *_token_moments(features, settings.batch_size, device), settings.batch_size)
    labels = torch.from_numpy(targets if targets.ndim == 1 else targets.astype(np.float32)).to(device)
    loss_function = nn.functional.cross_entropy if targets.ndim == 1 else nn.functional.binary_cross_entropy_with_logits
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(features) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = np.random.default_rng(seed)
    for _ in range(settings.epochs):
        order = generator.permutation(len(features))
        for batch in _batches(len(features), settings.batch_size):
            clips = np.sort(order[batch])  # sorted, the disk reads forwards
            loss = loss_function(trained.logits(features, clips), labels[clips])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return trained


def best_device() -> torch.device:
    """The accelerator of this machine, or else its CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _token_moments(features: Features, batch_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel over the patches that are heard, `(width,)` each; a constant channel's deviation is 1."""
    count, total = 0, torch.zeros(features.mean.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    shift = torch.from_numpy(features.mean[0]).double()  # near the mean: squares of differences from it keep their digits
    for clips in _batches(len(features), batch_size):
        tokens, heard = features.patch_tokens(clips)
        values = tokens[heard].double() - shift
        count, total, squares = count + len(values), total + values.sum(0), squares + (values**2).sum(0)
    mean = total / count
    deviation = (squares / count - mean**2).clamp_min(0).sqrt()
    deviation = torch.where(deviation > 0, deviation, 1)
    return (mean + shift).float().to(device), deviation.float().to(device)


def _batches(clips: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, clips)) for start in range(0, clips, size)]


__all__ = ["AttentivePooling", "HeadSettings", "PrototypePooling", "TrainedHead", "best_device", "train_head"]
