"""What changes from update to update, as pure functions of the update: nothing to save, nothing to resume.

Updates count from 1, skipped ones included. (The teacher's decay, also such a function, is `ema_decay` beside the model.)
"""

import math


def learning_rate(update: int, peak: float, warmup_updates: int, total_updates: int, final: float = 0.0) -> float:
    """Linear warm-up from 0, then a half cosine to `final`.

    As in the published runs the first update of a warm-up has a rate of exactly 0, update `warmup_updates + 1` the peak.
    """
    done = update - 1
    if done < warmup_updates:
        return peak * done / warmup_updates
    progress = min(1.0, (done - warmup_updates) / max(1, total_updates - warmup_updates))
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def adam_epsilon(update: int, epsilon: float, beta2: float) -> float:
    """The epsilon with which torch's AdamW takes the published step.

    The published optimiser adds epsilon to `sqrt(v)`, torch to `sqrt(v / (1 - beta2 ** update))`, after the bias correction. At the first
    update torch's own epsilon would thus be 4.5 times too small (7 % of the step of the worst tensor). Torch does not count updates that
    were skipped: after one of the first few, this epsilon is too small until `beta2 ** update` has vanished.
    """
    return epsilon / math.sqrt(1 - beta2**update)
