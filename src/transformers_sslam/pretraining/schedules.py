"""What changes from step to step, as pure functions of the step: nothing to save, nothing to resume.

Steps count from 1, skipped ones included. (The teacher's decay, also such a function, is `ema_decay` beside the model.)
"""

import math


def learning_rate(step: int, peak: float, warmup_steps: int, max_steps: int, final: float = 0.0) -> float:
    """Linear warm-up from 0, then a half cosine to `final`.

    As in the published runs the first step of a warm-up has a rate of exactly 0, step `warmup_steps + 1` the peak.
    """
    done = step - 1
    if done < warmup_steps:
        return peak * done / warmup_steps
    progress = min(1.0, (done - warmup_steps) / max(1, max_steps - warmup_steps))
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def adam_epsilon(step: int, epsilon: float, beta2: float) -> float:
    """The epsilon with which torch's AdamW takes the published step.

    The published optimiser adds epsilon to `sqrt(v)`, torch to `sqrt(v / (1 - beta2 ** step))`, after the bias correction. At the first
    step torch's own epsilon would thus be 4.5 times too small (7 % of the step of the worst tensor). Torch does not count steps that were
    skipped: after one of the first few, this epsilon is too small until `beta2 ** step` has vanished.
    """
    return epsilon / math.sqrt(1 - beta2**step)
