"""A recording as HTML: the player, the log-mel with a lane for each class below it, and the table of events.

Every text that comes from a file or a model is escaped. Positions are fractions of the recording, so that one layout fits every screen.
`page.js` moves the cursor and lets the player jump to what has `data-start`.
"""

import math
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ..events_sslam import Event
from ..fbank import LOWEST_FREQUENCY
from ..names import listed
from ..recordings.plot import MEL_TICKS, mel
from .index import Match
from .listening import Listener
from .recording import LABELS, PICTURE, SOUND, TABLE, Found, Recording
from .wording import minutes, plain


MOST_LANES, FEWEST_LANES, MOST_ROWS, MOST_BARS = 24, 3, 500, 4000
POINTS, MOST_POINTS = 1000, 5000  # of a curve as wide as the page, and of the widest
TICKS = 7  # as wide as the page, at most
ROUND = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400)  # seconds
IN_MINUTES = 60  # seconds: the times of longer recordings are written as the player does
MOST_KINDS = 20  # that are named at the top of the page
THIN = 0.006  # of the width of the page: about 6 pixels
WIDTH, HEIGHT = 1000, 100  # of a lane, in the units of its curve


def address(file: Path) -> str:
    """Of a kept file, relative to the page."""
    return f"gradio_api/file={quote(file.as_posix())}"


def draw_intro(listener: Listener) -> str:
    """What the page does."""
    count, kinds = len(listener.classes), escape(listed(map(plain, listener.classes), MOST_KINDS))
    return (
        f"<p>Give the model a recording: play it, and see which of {count} {listener.kinds} it finds, from when to when. "
        f"It knows these and nothing else: {kinds}.</p>"
    )


def draw_player(recording: Recording) -> str:
    """The sound, and what it is."""
    name, sound = escape(recording.name), escape(address(recording.folder / SOUND))
    return (
        f'<section class="sslam-player" aria-label="Player"><h2>{name} <small>{minutes(recording.duration)}</small></h2>'
        f'<audio id="sslam-sound" controls preload="auto" src="{sound}" data-duration="{recording.duration:.6f}"></audio></section>'
    )


def draw_computing(name: str) -> str:
    """That a recording was taken."""
    return f'<p class="sslam-computing" role="status">Computing <strong>{escape(name)}</strong></p>'


def draw_stopped() -> str:
    """That nothing more is computed."""
    said = "Stopped: nothing more is computed. Give the recording again, or another one."
    return f'<p class="sslam-computing sslam-stopped" role="status">{said}</p>'


def draw_error(message: str, what: str = "This recording cannot be used.") -> str:
    """What cannot be done, and why."""
    return f'<div class="sslam-error" role="alert"><strong>{what}</strong> {escape(message)}</div>'


def draw_lanes(listener: Listener, recording: Recording, found: Found, zoom: float = 1.0, only: Collection[str] = ()) -> str:
    """The log-mel, and below it a lane for each class: its scores as a curve, the threshold as a line, and its events as bars. With
    hysteresis the onset threshold is a second line.

    It is `zoom` times as wide as the page, and scrolls. If classes are given that are wanted, `only` these have lanes.
    """
    shown, hidden = _classes_to_show(listener.classes, found, only)
    names = {listener.classes[i] for i in shown}
    bars = sorted((event for event in found.events if event.label in names), key=lambda event: event.start - event.end)
    lanes = "".join(
        _lane(listener.classes[i], recording, found, [bar for bar in bars[:MOST_BARS] if bar.label == listener.classes[i]], i, zoom)
        for i in shown
    )
    notes = [f"{hidden} more kinds have {listener.finds}: they are in the table."] if hidden else []
    notes += [f"The {len(bars) - MOST_BARS} shortest {listener.finds} are not drawn."] if len(bars) > MOST_BARS else []
    picture = escape(address(recording.folder / PICTURE))
    hysteresis = bool((found.onsets > found.thresholds)[shown].any())
    onset = '<span><i class="sslam-key-onset"></i>an event needs a score above this line (onset threshold)</span>' if hysteresis else ""
    return (
        f'<section aria-label="Picture of the sound, and {listener.finds}">'
        '<div class="sslam-scroll" tabindex="0" role="group" aria-label="Over time. Space plays and pauses, arrow keys move by a second.">'
        f'<div class="sslam-strip" style="width:{100 * zoom:g}%"><div class="sslam-mel sslam-track">{_frequencies(listener.rate)}'
        f'<img src="{picture}" alt="Log-mel of {escape(recording.name)}"><div class="sslam-cursor" aria-hidden="true"></div></div>'
        f"{lanes}{_axis(recording.duration, zoom)}"
        f"<div class='sslam-choice' aria-hidden='true'></div></div></div>{''.join(f'<p>{note}</p>' for note in notes)}"
        f'<p class="sslam-legend"><span><i class="sslam-key-bar"></i>{listener.finds}</span><span><i class="sslam-key-curve"></i>how sure '
        'the model is (score): 0 at the foot of a row, 1 at its top</span><span><i class="sslam-key-limit"></i>threshold</span>'
        f"{onset}</p>"
        '<p class="sslam-note">At the top is the sound as the model receives it: low tones below, high tones above, and the louder the '
        "brighter (log-mel spectrogram). A click moves the player there. The page plays and analyses a mono mix of all channels at "
        f"{listener.rate / 1000:g} kHz, whatever the file has.</p></section>"
    )


def draw_table(listener: Listener, recording: Recording, found: Found, only: Collection[str] = ()) -> str:
    """All events, or those of wanted classes; the buttons play them. And files to download."""
    events = [event for event in found.events if not only or event.label in only]
    rows = "".join(
        f'<tr data-span="{event.start} {event.end}"><td><button type="button" data-start="{event.start}" '
        f'aria-label="Play {escape(plain(event.label))} from {event.start:.2f} seconds"><span aria-hidden="true">&#9654;</span> '
        f"{_time(event.start, recording)}</button></td><td>{_time(event.end, recording)}</td>"
        f'<th scope="row">{escape(plain(event.label))}</th><td>{event.score:.2f}</td></tr>'
        for event in events[:MOST_ROWS]
    )
    unit = "min:s" if recording.duration > IN_MINUTES else "s"
    header = "".join(f'<th scope="col">{name}</th>' for name in (f"start ({unit})", f"end ({unit})", "label", "score"))
    table = f'<div class="sslam-table"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'
    total = f"{len(found.events)} {listener.finds if len(found.events) != 1 else listener.finds.removesuffix('s')}"
    title = f"{len(events)} of {total}" if only else total
    if not events:
        title = f"No {listener.finds} found" if not found.events else title
        table = f"<p>{_why_nothing(listener, recording, found, only)}</p>"
    more = f"<p>{len(events) - MOST_ROWS} more are in the table to download.</p>" if len(events) > MOST_ROWS else ""
    scores = '<p class="sslam-note">A score is the mean of the model\'s scores from start to end.</p>' if events else ""
    links = "".join(_link(recording.file(ending), text) for ending, text in ((TABLE, "table (CSV)"), (LABELS, "Audacity labels")))
    return (
        f'<section aria-label="Table of {listener.finds}"><h2>{title}</h2>{table}{scores}{more}'
        f'<p class="sslam-links">Download: {links}</p></section>'
    )


def _why_nothing(listener: Listener, recording: Recording, found: Found, only: Collection[str]) -> str:
    """Why the model finds nothing of what is wanted, and what it comes closest to."""
    wanted = [i for i, label in enumerate(listener.classes) if not only or label in only]
    kinds, scores = " of the kinds that you chose" if only else "", found.scores[:, wanted]
    if (scores > found.onsets[wanted]).any():
        events = listener.finds == "events"
        left_out = "not for long enough: this model leaves out short events (min_duration)" if events else "others are higher (top k)"
        return f"Some scores{kinds} are high enough, but {left_out}."
    missed = "above the onset threshold" if (scores > found.thresholds[wanted]).any() else "high enough"
    row, i = np.unravel_index(scores.argmax(), scores.shape)
    number = wanted[i]
    score, time = float(scores[row, i]), _time(recording.starts[row], recording)
    value = f"{score:.2f}" if score >= 0.01 else "below 0.01"
    place = f"{time}{'' if recording.duration > IN_MINUTES else ' s'}"
    return (
        f"No score{kinds} is {missed}. The highest is that of {escape(plain(listener.classes[number]))}: {value}, at {place}. "
        "A lower threshold shows more."
    )


def _time(seconds: float, recording: Recording) -> str:
    """In a recording: of a longer one with minutes."""
    return minutes(seconds, 2) if recording.duration > IN_MINUTES else f"{seconds:.2f}"


def draw_search(about: str) -> str:
    """What the search compares, and how a span is chosen."""
    return (
        '<section class="sslam-player" aria-label="Sounds like this"><h2>Sounds like this</h2><p>Choose a span: drag over the picture '
        "with a mouse, click an event, or type its seconds. Then see where it sounds most like that in other recordings. Searched are "
        f"{escape(about)}. Spans of about the same length are compared best.</p></section>"
    )


def draw_matches(matches: Sequence[Match], start: float, end: float) -> str:
    """Spans that sound like a chosen one; the buttons play them."""
    rows = "".join(
        f"<tr><td>{_play_match(match)}</td><td>{match.end:.2f}</td>"
        f'<th scope="row">{escape(match.recording)}</th><td>{match.similarity:.3f}</td></tr>'
        for match in matches
    )
    return (
        f'<section aria-label="Similar spans"><h2>Most like {start:.2f} to {end:.2f} s</h2><div class="sslam-table"><table>'
        '<thead><tr><th scope="col">start (s)</th><th scope="col">end (s)</th><th scope="col">recording</th>'
        f'<th scope="col">similarity</th></tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="sslam-note">The similarity of the same sound is 1.</p></section>'
    )


def _play_match(match: Match) -> str:
    if not match.is_there:
        return f"{match.start:.2f}<br><strong>moved or changed</strong>"
    return (
        f'<button type="button" data-row="{match.row}" aria-label="Play {escape(match.recording)} from {match.start:.2f} seconds">'
        f'<span aria-hidden="true">&#9654;</span> {match.start:.2f}</button>'
    )


def draw_match(file: Path, caption: str) -> str:
    """A span that was found: its sound, which starts by itself."""
    return (
        f'<section class="sslam-player" aria-label="Similar span"><h2>{escape(caption)}</h2>'
        f'<audio id="sslam-match" controls autoplay src="{escape(address(file))}"></audio></section>'
    )


def draw_link(file: Path, text: str) -> str:
    """To a file that was made."""
    return f'<p class="sslam-links">{_link(file, text)}</p>'


def _link(file: Path, text: str) -> str:
    return f'<a href="{escape(address(file))}" download>{text}</a>'


def _classes_to_show(classes: Sequence[str], found: Found, only: Collection[str]) -> tuple[list[int], int]:
    """Numbers of the classes that are wanted or, if none are named, of those with events and, of few, of those with the highest scores;
    and how many with events are left out."""
    labels, highest = {event.label for event in found.events if not only or event.label in only}, found.scores.max(0)
    ranked = sorted(
        (i for i in range(len(classes)) if not only or classes[i] in only), key=lambda i: (classes[i] not in labels, -highest[i])
    )
    most = MOST_LANES if only else max(min(len(labels), MOST_LANES), FEWEST_LANES)
    return sorted(ranked[:most]), max(0, len(labels) - MOST_LANES)


def _lane(label: str, recording: Recording, found: Found, events: Sequence[Event], number: int, zoom: float) -> str:
    name = escape(plain(label))

    def thin(event: Event) -> str:
        """Borders of a bar that is narrower than they are would show longer events than there are."""
        return " sslam-thin" if zoom * (event.end - event.start) < THIN * recording.duration else ""

    bars = "".join(
        f'<button type="button" class="sslam-bar{thin(event)}" tabindex="-1" '
        f'data-start="{event.start}" data-span="{event.start} {event.end}" '
        f'style="left:{_percent(event.start, recording)};width:{_percent(event.end - event.start, recording)}" '
        f'title="{name}: {_time(event.start, recording)} to {_time(event.end, recording)}, score {event.score:.2f}" '
        f'aria-label="Play {name}, {event.start:.2f} to {event.end:.2f} seconds"></button>'
        for event in events
    )
    threshold, onset = (float(limits[number]) for limits in (found.thresholds, found.onsets))
    curve = _curve(recording.edges[: len(found.scores) + 1], found.scores[:, number], zoom)
    lines = _line("sslam-limit", threshold) + (_line("sslam-onset", onset) if onset > threshold else "")
    return (
        f'<div class="sslam-lane" data-label="{escape(label)}"><span class="sslam-name">{name}</span><div class="sslam-track">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="sslam-curve" d="{curve}"/>{lines}</svg>{bars}'
        '<div class="sslam-cursor" aria-hidden="true"></div></div></div>'
    )


def _line(kind: str, score: float) -> str:
    return f'<path class="{kind}" d="M0 {HEIGHT * (1 - score):.1f}H{WIDTH}"/>'


def _curve(edges: np.ndarray, scores: np.ndarray, zoom: float) -> str:
    """Steps of a curve; of a long recording the highest of several."""
    group = math.ceil(len(scores) / min(POINTS * zoom, MOST_POINTS))
    starts = np.arange(0, len(scores), group)
    levels = HEIGHT * (1 - np.maximum.reduceat(scores, starts))
    places = WIDTH * edges[np.append(starts[1:], len(scores))] / edges[-1]
    return f"M0 {levels[0]:.1f}" + "".join(f"V{level:.1f}H{place:.1f}" for level, place in zip(levels, places))


def _frequencies(rate: int) -> str:
    """Names of frequencies beside the log-mel. The filters' peaks are evenly spaced in mel."""
    low, high = mel(LOWEST_FREQUENCY), mel(rate / 2)
    places = {frequency: (mel(frequency) - low) / (high - low) for frequency in MEL_TICKS if frequency < rate / 2}
    labels = "".join(
        f'<span style="bottom:clamp(7px,{100 * place:.2f}%,100% - 7px)">{frequency:,} Hz</span>' for frequency, place in places.items()
    )
    return f'<div class="sslam-frequencies" aria-hidden="true">{labels}</div>'


def _axis(duration: float, zoom: float) -> str:
    """Times below the lanes, of round numbers."""
    least = duration / (TICKS * zoom)
    step = next((number for number in ROUND if number >= least), least)
    times = [i * step for i in range(int(duration / step + 1e-9) + 1)]
    in_minutes = duration > IN_MINUTES

    def written(time: float) -> str:
        seconds = f"{time % 60:02.0f}" if step >= 1 else f"{time % 60:04.1f}"
        return f"{int(time // 60)}:{seconds}" if in_minutes else f"{time:g}"

    marks = "".join(
        f'<span style="left:{100 * time / duration:.3f}%">{written(time)}</span>' for time in times if time < (1 - 0.06 / zoom) * duration
    )
    return f'<div class="sslam-axis" aria-hidden="true">{marks}<span class="sslam-unit">{"min:s" if in_minutes else "s"}</span></div>'


def _percent(seconds: float, recording: Recording) -> str:
    return f"{100 * seconds / recording.duration:.4f}%"
