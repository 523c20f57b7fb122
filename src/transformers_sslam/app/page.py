"""The page: what a visitor may do on it, and what follows. What it looks like is in `drawing`, `live_page`, `page.css` and `page.js`."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..audio.decode import AUDIO_SUFFIXES
from . import drawing
from .about import draw_about, model_name
from .index import SoundIndex
from .listening import Listener, StoppedError
from .live_page import draw_live, live_functions
from .recording import SOUND, Recording, Slider
from .sessions import Sessions
from .wording import clock, plain


HERE = Path(__file__).parent
GONE = "It is no longer kept: choose it again."
BUSY = "The server has too much to do, or failed: try again in a while."
NOT_FOUND = "Nothing can be compared."
NOT_PLAYED = "This span cannot be played."
DRAWN = "() => { document.dispatchEvent(new Event('sslam-drawn')); }"
CLEAR = "() => ['', { __type__: 'update', visible: false }]"
MANY = 8  # classes, of which a visitor may want to see some only
SHOWN = 10  # components that a recording fills
PLAYED_AT_ONCE = 4  # spans of indexed recordings, which are decoded up to there
# A button of the list of matches, which Gradio draws anew, was pressed.
PLAY = """element.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-row]");
  if (button) trigger("click", { row: Number(button.dataset.row) });
});"""
ZOOM = Slider("zoom", "Zoom", "Widens the picture, which then scrolls.", 1, 50, 1, 1)
PROGRESS = gr.Progress()  # Gradio finds it among the defaults
SLIDER_WIDTH = 260  # pixels, at least: on a phone they are below each other


class Page:
    """Components and handlers.

    Args:
        listener: the model.
        sessions: where uploads are, and what is kept of them.
        examples: paths of recordings by their names.
        index: what is searched for spans that sound alike.

    Attributes:
        blocks: the page, for Gradio.
    """

    def __init__(self, listener: Listener, sessions: Sessions, examples: dict[str, str], index: SoundIndex | None = None):
        self._listener, self._sessions, self._examples, self._index = listener, sessions, examples, index
        os.environ["GRADIO_TEMP_DIR"] = str(sessions.uploads)  # which components read when they are made
        with gr.Blocks(title=f"Listen with {model_name(listener.settings.model)}", analytics_enabled=False) as self.blocks:
            self._build()

    def _build(self) -> None:
        _html(f'<h1 class="sslam-title">{escape(self.blocks.title)}</h1>{drawing.draw_intro(self._listener)}')
        limits = f"{clock(self._listener.settings.max_seconds)}, {self._listener.settings.max_megabytes} MB"
        with gr.Row():
            file = gr.File(
                label=f"Drop a recording, or choose one (up to {limits})", file_types=[*AUDIO_SUFFIXES], height=170, elem_id="file"
            )
            with gr.Column():
                microphone = gr.Audio(
                    label="Or record; Stop begins the analysis",
                    sources=["microphone"],
                    type="filepath",
                    elem_id="microphone",
                )
                _html('<p class="sslam-refused" aria-live="assertive"></p>', elem_id="refused")
                names = list(self._examples)
                example = gr.Dropdown(
                    names,
                    value=None,
                    label="Or choose an example",
                    visible=bool(names),
                    filterable=False,
                    interactive=True,
                    elem_id="example",
                )
        if self._listener.settings.live_at_once:
            with gr.Accordion("Listen live with the microphone", open=False, elem_id="live"):
                script = (HERE / "live.js").read_text(encoding="utf-8")
                _html(draw_live(self._listener), server_functions=live_functions(self._listener), js_on_load=script)
        player = _html(elem_id="player")
        stop = gr.Button("Stop", visible=False, size="sm", elem_id="stop")
        with gr.Column(visible=False) as results:
            lanes = _html(elem_id="lanes")
            sliders = (*self._listener.sliders, ZOOM)
            with gr.Row(elem_id="sliders"):
                positions = [_slider(slider) for slider in sliders]
            reset = gr.Button("Back to the model's own settings", size="sm", elem_id="reset")
            kinds = [(plain(label), label) for label in self._listener.classes]
            only = gr.Dropdown(
                kinds,
                value=[],
                multiselect=True,
                label=f"Show only these {self._listener.kinds}",
                info="Type or choose some, for downloads too; with none chosen, all are shown.",
                visible=len(kinds) >= MANY,
                elem_id="only",
            )
            with gr.Column(visible=self._index is not None, elem_id="search"):
                _html(drawing.draw_search(self._index.about) if self._index else "")
                with gr.Row():
                    start, end = (_seconds(name) for name in ("From", "To"))
                    find = gr.Button("Find similar", elem_id="find", min_width=160)
                match, matches = _html(elem_id="match"), _html(elem_id="matches", js_on_load=PLAY)
            table = _html(elem_id="table")
            embed = gr.Button("Make embeddings: vectors that describe the sound, for other programs (Parquet)", size="sm", elem_id="embed")
            link = _html(elem_id="embeddings")
        with gr.Accordion("Model, data and limits", open=False):
            _html(draw_about(self._listener, self._index))
        clear = gr.Button(visible="hidden", elem_id="clear")

        # Handlers that answer at once take no turn. The others wait for the model, and Gradio shows how many are before them.
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        in_turn: dict[str, Any] = {
            "concurrency_id": "model",
            "concurrency_limit": self._listener.settings.at_once,
            "api_visibility": "private",
        }
        wanted: list[Any] = [only, *positions]
        shown = [player, stop, results, lanes, table, link, start, end, match, matches]
        # Nothing is said of a former file any more, whether the next one is taken or not. `page.js` presses the button.
        gr.on([clear.click, microphone.start_recording], None, None, [player, results], js=CLEAR)
        # What is given while another recording is computed replaces it, so that both are submitted.
        replaces: dict[str, Any] = {"trigger_mode": "multiple"}
        given = [
            file.upload(self._claim, [file, example], [*shown[:3], file, example], **at_once, **replaces),
            microphone.stop_recording(self._claim, [microphone, example], [*shown[:3], microphone, example], **at_once, **replaces),
            # Not `select`, which the keyboard does not cause, nor `input`, which a mouse causes twice.
            example.change(self._choose, example, shown[:3], **at_once, **replaces),
        ]
        analysed = [event.then(self._analyse, wanted, shown, show_progress_on=player, **in_turn, **replaces) for event in given]
        for event in analysed:
            event.then(None, js=DRAWN)
            # Too many wait, or the model failed: without this the page would say that it computes.
            event.failure(self._fail, None, shown, **at_once)
        stop.click(self._stop, example, [*shown[:3], example], cancels=analysed, **at_once)
        moved = gr.on([part.change for part in wanted], self._show, wanted, [lanes, table], trigger_mode="always_last", **at_once)
        moved.then(None, js=DRAWN)
        reset.click(None, None, positions, js=f"() => {[slider.value for slider in sliders]}")
        embed.click(self._embed, None, link, **in_turn)
        find.click(self._find, [start, end], [match, matches], show_progress_on=matches, **in_turn)
        apart: dict[str, Any] = {"concurrency_id": "play", "concurrency_limit": PLAYED_AT_ONCE, "show_progress": "minimal"}
        matches.click(self._play, None, match, api_visibility="private", **apart)
        self.blocks.unload(self._leave)

    def _claim(self, file: str | None, example: str | None, request: gr.Request) -> list[Any]:
        """Take an upload; its component is then free for the next one, and no example is chosen any more."""
        if file is None:
            return [gr.skip()] * 5
        self._sessions.claim(str(request.session_hash), str(file))
        return [*_computing(Path(file).name), None, _emptied(example)]

    def _choose(self, name: str | None, request: gr.Request) -> list[Any]:
        """Take an example."""
        if name is None:
            return [gr.skip()] * 3
        self._sessions.choose(str(request.session_hash), Path(self._examples[name]), name)
        return _computing(name)

    def _analyse(self, request: gr.Request, progress: gr.Progress = PROGRESS, only: Sequence[str] = (), *positions: float) -> list[Any]:
        """What the components show of the recording that was given last; nothing new if it was stopped or replaced."""
        session = str(request.session_hash)
        turn = self._sessions.take(session)
        if turn is None:
            return [gr.skip()] * SHOWN if session in self._sessions else _failed(GONE)
        try:
            recording = self._listener.listen(turn.file, turn.name, turn.folder, lambda done, what: progress(done, desc=what), turn.ended)
            self._sessions.keep(session, recording)
            drawn = self._draw(recording, only, positions)
        except (StoppedError, ValueError, OSError, FloatingPointError) as error:
            if turn.ended.is_set():
                return [gr.skip()] * SHOWN
            self._sessions.begin(session)  # of the next one
            return _failed(str(error))
        finally:
            if turn.file.parent == turn.folder:  # not an example
                turn.file.unlink(missing_ok=True)
        window = recording.duration if self._index is None else self._index.window
        span = 0.0, min(window, recording.duration)
        return [
            drawing.draw_player(recording),
            gr.update(visible=False),
            gr.update(visible=True),
            *drawn,
            "",
            *span,
            "",
            "",
        ]

    def _fail(self, request: gr.Request) -> list[Any]:
        """Gradio takes what was stopped for a failure, too."""
        session = str(request.session_hash)
        if not self._sessions.is_pending(session):
            return [gr.skip()] * SHOWN
        self._sessions.begin(session)  # of the next one
        return _failed(BUSY)

    def _stop(self, example: str | None, request: gr.Request) -> list[Any]:
        """Let nothing more be computed: what waits for its turn finds a page without a recording."""
        self._sessions.begin(str(request.session_hash))
        return [drawing.draw_stopped(), *_hidden(), _emptied(example)]

    def _show(self, request: gr.Request, only: Sequence[str], *positions: float) -> list[Any]:
        """What follows from kept scores."""
        recording = self._sessions.recording(request.session_hash)
        return [drawing.draw_error(GONE), ""] if recording is None else self._draw(recording, only, positions)

    def _draw(self, recording: Recording, only: Sequence[str], positions: Sequence[float]) -> list[str]:
        *settings, zoom = positions
        found = self._listener.find(recording, settings)
        self._listener.write(recording, [event for event in found.events if not only or event.label in only])
        return [
            drawing.draw_lanes(self._listener, recording, found, zoom, only),
            drawing.draw_table(self._listener, recording, found, only),
        ]

    def _embed(self, request: gr.Request) -> str:
        recording = self._sessions.recording(request.session_hash)
        return drawing.draw_error(GONE) if recording is None else drawing.draw_link(self._listener.embed(recording), "Embeddings (Parquet)")

    def _find(self, start: float | None, end: float | None, request: gr.Request) -> list[str]:
        recording = self._sessions.recording(request.session_hash)
        if recording is None or self._index is None:
            return ["", drawing.draw_error(GONE, NOT_FOUND)]
        if start is None or end is None:
            return ["", drawing.draw_error("Choose a span: drag over the picture, click an event, or type its seconds.", NOT_FOUND)]
        try:
            return ["", drawing.draw_matches(self._index.find(recording.folder / SOUND, start, end), start, end)]
        except (ValueError, OSError, FloatingPointError) as error:
            return ["", drawing.draw_error(str(error), NOT_FOUND)]

    def _play(self, event: gr.EventData, request: gr.Request) -> str:
        recording = self._sessions.recording(request.session_hash)
        if recording is None or self._index is None:
            return drawing.draw_error(GONE, NOT_PLAYED)
        try:
            return drawing.draw_match(*self._index.cut(event.row, recording.folder))
        except (ValueError, OSError) as error:
            return drawing.draw_error(str(error), NOT_PLAYED)

    def _leave(self, request: gr.Request) -> None:
        self._sessions.end(request.session_hash)


def _computing(name: str) -> list[Any]:
    """Player, button to stop, and results, until the recording is there."""
    return [drawing.draw_computing(name), gr.update(visible=True), gr.update(visible=False)]


def _hidden() -> list[Any]:
    """Neither a button to stop nor results."""
    return [gr.update(visible=False), gr.update(visible=False)]


def _emptied(example: str | None) -> Any:
    """For the list of examples, which takes any update for a change."""
    return gr.skip() if example is None else None


def _failed(message: str) -> list[Any]:
    """Of all that is shown, the message alone."""
    return [drawing.draw_error(message), *_hidden(), "", "", "", None, None, "", ""]


def _slider(slider: Slider) -> gr.Slider:
    about: dict[str, Any] = {"label": slider.label, "info": slider.info, "min_width": SLIDER_WIDTH}
    part = gr.Slider(slider.least, slider.largest, slider.value, step=slider.step, elem_id=slider.name, **about)
    # What is typed may be out of range, or nothing at all, of which Gradio's slider says nothing and fails. (Of a subclass Gradio would
    # write a `.pyi` file beside this one.)
    part.preprocess = lambda payload: slider.value if payload is None else min(max(payload, slider.least), slider.largest)  # type: ignore[method-assign]
    return part


def _seconds(name: str) -> gr.Number:
    return gr.Number(label=f"{name} (seconds)", precision=2, min_width=120, elem_id=name.lower())


def _html(text: str = "", **options: Any) -> gr.HTML:
    """Without Gradio's style of prose, which would draw its own tables."""
    return gr.HTML(text, apply_default_css=False, **options)


def theme() -> gr.themes.Base:
    """Fonts of the reader's system, so that nothing is fetched; texts with a contrast of at least 4.5 on their grounds (WCAG AA)."""
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="blue", secondary_hue="blue", neutral_hue="slate", **fonts).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
    )
