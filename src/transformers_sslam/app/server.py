"""Serving the page: its model, its address, and what is deleted when it ends."""

import os
import signal
import socket
import time
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


# Ctrl-C, the end of the process as others ask for it, and of its terminal, which Windows has not.
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ALL_NETWORKS = ("0.0.0.0", "::", "[::]")


def serve(settings: AppSettings) -> None:
    """Load the model, and answer until Ctrl-C, or until the process is asked to end, with status 0 or 128 and the signal's number.

    What visitors have sent is then deleted. What is computed, and open connections, end with the process: Python's own end would wait
    for some threads, and crash others within PyTorch.
    """
    check_address(settings.host, settings.port)
    examples = find_examples(settings.examples)
    listener = open_listener(settings)
    index = None if settings.index is None else SoundIndex(settings.index, listener)
    received: list[int] = []
    for number in ENDS:
        signal.signal(number, lambda number, _: received.append(number))
    with Sessions(60 * settings.keep_minutes) as sessions:
        page = Page(listener, sessions, examples, index).blocks
        print(describe_address(launch(page, settings, sessions), settings.host), flush=True)
        while not received:
            time.sleep(0.1)
    print("the page is closed, and what it kept is deleted", flush=True)
    os._exit(0 if received[0] == signal.SIGINT else 128 + received[0])


def check_address(host: str, port: int) -> None:
    """`UserError` if nothing can be served there: Gradio would tell it late, and in terms of its own."""
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"no page can be served at host {host}, port {port} ({getattr(error, 'strerror', error)}): give a port that no other program "
            "uses (0: any), and as host an address of this machine"
        ) from error


def describe_address(address: str, host: str) -> str:
    """Where the page is, for people: an address that a browser on this machine opens, and whether other machines reach it."""
    if host not in ALL_NETWORKS:
        return f"the page is at {address}; Ctrl-C ends it"
    here = address.replace("[::]", "localhost")
    return f"the page is at {here}, and open to the network at the addresses of this machine; Ctrl-C ends it"


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
