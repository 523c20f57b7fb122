"""What is said of files below a folder that are not read."""

import logging
import os
from collections import Counter
from collections.abc import Iterable

from .decode import AUDIO_SUFFIXES
from .paths import printable_path


logger = logging.getLogger(__name__)

# fmt: off
_BESIDE_AUDIO = (  # files that lie beside audio and are not taken for it: tables, texts, labels, pictures, programs, models
    ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xls", ".xlsx", ".ods", ".db",
    ".txt", ".md", ".rst", ".html", ".pdf", ".doc", ".docx", ".bib", ".cff", ".log", ".yaml", ".yml", ".toml", ".xml", ".ini", ".cfg",
    ".lab", ".textgrid", ".eaf", ".rttm", ".jams", ".srt", ".vtt", ".lrc", ".cue", ".m3u", ".m3u8", ".mid", ".midi", ".md5", ".sha256",
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".bmp", ".py", ".sh", ".ipynb",
    ".npy", ".npz", ".pt", ".pth", ".bin", ".safetensors", ".onnx",
)
# fmt: on
_TEXTS = ("license", "licence", "copying", "readme", "notice", "authors", "changelog", "makefile")  # often without a suffix


def count_suffixes(names: Iterable[str]) -> str:
    """Number of files by suffix, the most frequent ones first."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in names)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5)) + (", ..." if len(counts) > 5 else "")


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder in its relative path, begins with a dot."""
    return any(part.startswith(".") for part in name.split(os.sep))


def warn_of_unread(root: str | os.PathLike, names: Iterable[str]) -> None:
    """Count the files, of these names relative to `root`, that have no suffix of audio but could be meant as audio."""
    known = (*AUDIO_SUFFIXES, *_BESIDE_AUDIO)
    others = [name for name in names if not name.lower().endswith(known)]
    if unread := [name for name in others if not is_hidden(name) and os.path.basename(name).lower() not in _TEXTS]:
        logger.warning(
            f"{len(unread)} files below {printable_path(str(root))} are not read, as their suffix is not one of audio "
            f"({count_suffixes(unread)}), such as {printable_path(min(unread))}: rename or convert those that are audio"
        )


def warn_of_repeats(where: str, repeats: dict[str, str]) -> None:
    """Count further names of files, given with the first name of each."""
    if repeats:
        shown = [f"{printable_path(other)} is {printable_path(first)}" for other, first in list(repeats.items())[:3]]
        logger.warning(f"{len(repeats)} files {where} are other names (links) and left out: {', '.join(shown)}")
