"""The settings of commands that say how scores become events."""

from dataclasses import dataclass, fields
from typing import Any

from ..events_sslam import EventOptions
from ..settings import setting


ByClass = float | dict[str, float] | None


@dataclass(kw_only=True)
class EventFlags:
    """From scores to events"""

    threshold: ByClass = setting(
        "time steps with a higher score belong to an event; one number, or {label: number}; null: the model's, or 0.5", None
    )
    onset_threshold: ByClass = setting("hysteresis: an event needs a step with a score above this; null: the model's, or threshold", None)
    median_filter: ByClass = setting("seconds of scores that a median filter spans; null: the model's, or 0, no filter", None)
    change_filter: ByClass = setting(
        "seconds, half of them on each side, over which scores are compared to find where events begin and end; null: the model's, or 0, "
        "thresholds alone",
        None,
    )
    max_gap: ByClass = setting("events of a class at most so many seconds apart are one; null: the model's, or 0", None)
    min_duration: ByClass = setting("events shorter than so many seconds are left out; null: the model's, or 0", None)

    @property
    def event_options(self) -> EventOptions:
        """For `EventSettings.of`; `None` for what the model says."""
        options: Any = {option.name: getattr(self, option.name) for option in fields(EventFlags)}
        return options
