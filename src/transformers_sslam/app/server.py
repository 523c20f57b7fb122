"""Serving the page: its model, its address, and what is deleted when it ends."""

import signal
import sys
from pathlib import Path

import gradio as gr

from ..audio.decode import AUDIO_SUFFIXES
from ..audio.paths import find_files, printable_path
from ..errors import UserError
from .index import SoundIndex
from .listening import open_listener
from .page import HERE, Page, theme
from .sessions import Sessions
from .settings import AppSettings


def serve(settings: AppSettings) -> None:
    """Load the model, and answer until Ctrl-C."""
    examples = find_examples(settings.examples)
    listener = open_listener(settings)
    index = None if settings.index is None else SoundIndex(settings.index, listener)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that recordings are deleted
    with Sessions(60 * settings.keep_minutes) as sessions:
        page = Page(listener, sessions, examples, index).blocks
        print(f"the page is at {launch(page, settings, sessions)}; Ctrl-C ends it", flush=True)
        page.block_thread()


def launch(page: gr.Blocks, settings: AppSettings, sessions: Sessions) -> str:
    """Serve a page in the background; its address."""
    _, address, _ = page.queue(max_size=settings.max_waiting).launch(
        quiet=True,
        server_name=settings.host,
        server_port=settings.port or None,
        inbrowser=settings.open_browser,
        prevent_thread_lock=True,
        allowed_paths=[str(sessions.kept)],
        max_file_size=settings.max_megabytes * 10**6,
        theme=theme(),
        css_paths=HERE / "page.css",
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        footer_links=[],
        run_history=False,  # nothing of a visitor's recordings is stored, in a browser either
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
    )
    return address


def find_examples(source: str | None) -> dict[str, str]:
    """Recordings that a visitor may choose, by their names below the folder."""
    if source is None:
        return {}
    if Path(source).is_file():
        return {printable_path(Path(source).name): source}
    names, _ = find_files(Path(source), AUDIO_SUFFIXES) if Path(source).is_dir() else ([], {})
    if not names:
        raise UserError(f"examples is {source!r}, but a recording, or a folder with some, is expected")
    return {printable_path(name): str(Path(source) / name) for name in names}


__all__ = ["find_examples", "launch", "serve"]
