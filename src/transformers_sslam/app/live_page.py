"""The live mode on the page: what stays while it listens, what is drawn anew with each block of sound, and what `live.js` calls."""

from collections.abc import Callable
from html import escape
from typing import Any

from ..errors import UserError
from .drawing import MOST_LANES, MOST_ROWS
from .listening import RECENT, Listener
from .live import BLOCK, MOST, LiveSessions, LiveState
from .wording import plain


TICKS = 3  # of the time before now


def draw_live(listener: Listener) -> str:
    """The button and the empty places that `live.js` fills."""
    window, hop = (f"{listener.live_options[name]:g}" for name in ("window", "hop"))
    return (
        f'<div class="sslam-live" data-rate="{listener.rate}" data-block="{BLOCK}" data-most="{MOST}" data-delay="{listener.live_delay()}">'
        f"<p>The model receives the last {window} s of sound (a window), again every {hop} s. No sound is kept; {listener.finds} are shown "
        f"for {RECENT:g} s.</p>"
        '<button type="button">Start listening</button> <span class="sslam-live-time"></span><p class="sslam-live-state" role="status"></p>'
        '<div class="sslam-level" aria-hidden="true"><i></i></div><p class="sslam-live-delay"></p>'
        '<p class="sslam-live-latest" aria-live="polite"></p><div class="sslam-live-events"></div></div>'
    )


def draw_state(listener: Listener, state: LiveState) -> str:
    """Lanes of the last seconds, now at their right, and the table of the same events, the latest first. Of many classes those with the
    latest events have lanes."""
    latest = sorted(state.events, key=lambda item: (-item[0].end, item[0].label))
    labels = sorted(list(dict.fromkeys(event.label for event, _ in latest))[:MOST_LANES])
    unknown = f"{100 * min(1.0, (listener.live_delay() + BLOCK) / RECENT):.2f}%"
    lanes = "".join(
        f'<div class="sslam-lane" data-label="{escape(label)}"><span class="sslam-name">{escape(plain(label))}</span>'
        '<div class="sslam-track">'
        + "".join(_bar(event.start, event.end, state.seconds) for event, _ in state.events if event.label == label)
        + f'<div class="sslam-unknown" style="width:{unknown}"></div></div></div>'
        for label in labels
    )
    ago = [RECENT * (TICKS - i) / TICKS for i in range(TICKS)]
    axis = "".join(f'<span style="left:{100 * (1 - seconds / RECENT):.2f}%">&minus;{seconds:g} s</span>' for seconds in ago)
    rows = "".join(
        f"<tr><td>{event.start:.2f}</td><td>{event.end:.2f}</td>"
        f'<th scope="row">{escape(plain(event.label))}</th><td>{event.score:.2f}</td><td>{delay:.2f}</td></tr>'
        for event, delay in latest[:MOST_ROWS]
    )
    if not rows:
        return f"<p>No {listener.finds} in the last {RECENT:g} s.</p>"
    return (
        f'<div aria-hidden="true">{lanes}<div class="sslam-axis">{axis}<span class="sslam-unit">now</span></div>'
        f'<p class="sslam-legend"><span><i class="sslam-key-bar"></i>{listener.finds}</span>'
        '<span><i class="sslam-key-unknown"></i>not known yet</span></p></div>'
        '<div class="sslam-table"><table><thead><tr><th scope="col">start (s)</th><th scope="col">end (s)</th><th scope="col">label</th>'
        f'<th scope="col">score</th><th scope="col">delay (s)</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def name_latest(state: LiveState) -> str:
    """The latest event in words, plain text. They are read aloud when they change, which they do not while a segment grows."""
    if not state.events:
        return ""
    event, _ = max(state.events, key=lambda item: (item[0].end, item[0].score))
    return f"Latest: {plain(event.label)}, from {event.start:.1f} s"


def live_functions(listener: Listener) -> list[Callable[[Any], dict[str, Any]]]:
    """What browsers call. What they send may be anything; an answer has an `error`, in words for the visitor, if there is one."""
    sessions = LiveSessions(listener)

    def drawn(state: LiveState | None) -> dict[str, Any]:
        if state is None:
            return {}
        about = {"seconds": state.seconds, "level": state.level, "latest": name_latest(state)}
        return {"html": draw_state(listener, state), **about}

    def live_start(_: Any) -> dict[str, Any]:
        try:
            return {"name": sessions.start()}
        except UserError as error:
            return {"error": str(error)}

    def live_receive(data: Any) -> dict[str, Any]:
        try:
            name, block = map(str, data)
            return drawn(sessions.receive(name, block))
        except (TypeError, ValueError) as error:
            return {"error": str(error)}

    def live_stop(name: Any) -> dict[str, Any]:
        return drawn(sessions.stop(str(name)))

    return [live_start, live_receive, live_stop]


def _bar(start: float, end: float, now: float) -> str:
    """From the right edge, which is now."""
    first, last = (100 * max(0.0, 1 - (now - seconds) / RECENT) for seconds in (start, end))
    return f'<span class="sslam-bar" style="left:{first:.2f}%;width:{last - first:.2f}%"></span>'
