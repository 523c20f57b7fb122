"""What stands on the page about the model, its data and the limits, from its card and configuration."""

import re
from html import escape
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..errors import UserError
from ..names import listed
from ..settings import load_yaml
from .index import SoundIndex
from .listening import Listener
from .settings import EXAMPLES_RIGHTS, LimitSettings
from .wording import clock, plain


CARD = "README.md"
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n(.*)\Z", re.DOTALL)
NO_LICENCE = "The model's card names none: ask its authors before you use it."
MOST_CLASSES = 60  # that are listed


def draw_about(listener: Listener, index: SoundIndex | None = None) -> str:
    """Model, data and limits, as HTML."""
    front, text = read_card(listener.settings.model)
    parameters = sum(parameter.numel() for parameter in listener.model.parameters())
    named = "license_name" if front.get("license_name") else "license", "license_link"
    facts = {
        "Model": escape(model_name(listener.settings.model)),
        "Kind": escape(
            f"{listener.job} ({type(listener.model).__name__}), {parameters / 1e6:.1f} million parameters, sound at {listener.rate:,} Hz"
        ),
        f"{len(listener.classes)} {listener.kinds}": escape(listed(map(plain, listener.classes), MOST_CLASSES)),
        "Trained from": _listed(front.get("base_model")),
        "Data": _listed(front.get("datasets")),
        "Licence": " ".join(filter(None, (_listed(front.get(name)) for name in named))) or NO_LICENCE,
        "Examples": EXAMPLES_RIGHTS if listener.settings.examples else "",
        "From its card": escape(text),
        "Searched": escape(index.about) if index else "",
        "This page": escape(limits(listener.settings)),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items() if value)
    return f'<dl class="sslam-about">{rows}</dl>'


def limits(settings: LimitSettings) -> str:
    """What the page accepts, and what becomes of it, in sentences."""
    most = f"{settings.live_at_once} microphone{'s' if settings.live_at_once > 1 else ''}"
    live = f"The live mode listens to {most} at a time and keeps no sound. " if settings.live_at_once else ""
    return (
        f"Recordings of up to {clock(settings.max_seconds)} and {settings.max_megabytes} MB, {settings.at_once} at a time, each for up to "
        f"{clock(settings.max_compute_seconds)} of computing. A file is deleted within two minutes after the model has received it. What "
        "is kept to play it is deleted when you choose another one or close the page, or after "
        f"{clock(60 * settings.keep_minutes)}. No recording is logged. {live}A model knows its own kinds only, and makes mistakes: "
        "listen before you rely on it."
    )


def model_name(model: str) -> str:
    """Of a folder its name, of a model on the Hub its id."""
    return Path(model).resolve().name if Path(model).exists() else model


def read_card(model: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its first paragraph of prose; empty without one."""
    file = None if Path(model).is_file() else cached_file(model, CARD, _raise_exceptions_for_missing_entries=False)
    found = FRONT_MATTER.match(Path(file).read_text(encoding="utf-8", errors="replace")) if file else None
    if found is None:
        return {}, ""
    try:
        front = load_yaml(found[1])
    except UserError:  # a card that is not ours may hold anything
        front = {}
    paragraphs = (" ".join(part.split()) for part in found[2].split("\n\n"))
    text = next((part for part in paragraphs if part and not part.startswith(("#", "|", "-", "```", "<", "!", "["))), "")
    return front if isinstance(front, dict) else {}, text.replace("`", "").replace("**", "")


def _listed(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return ", ".join(escape(str(item)) for item in values if item is not None)
