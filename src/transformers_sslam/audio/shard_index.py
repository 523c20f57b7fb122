"""The index of prepared shards, and the check of the shards against it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import DamagedFileError, hash_file, read_json


SHARD_INDEX = "index.json"  # beside the shards
FIELDS = {"settings": dict, "shards": list, "complete": bool}
OPTIONAL = {"position", "place", "clips", "hours", "report", "sources"}  # `place`: of earlier versions
SHARD_FIELDS = {"file": str, "clips": int, "clipped": int, "bytes": int, "sha256": str}  # the last two not in earlier versions


def read_index(path: Path) -> dict[str, Any]:
    """The content of an index. `DamagedFileError` if it is not JSON, was changed, or lacks a field."""
    index = read_json(path)
    wrong = [name for name, kind in FIELDS.items() if not isinstance(index.get(name), kind)]
    wrong += sorted(index.keys() - FIELDS.keys() - OPTIONAL)
    wrong += [name for name in ("position", "place") if not isinstance(index.get(name), dict | None)]
    for shard in index["shards"] if "shards" not in wrong else []:
        if (
            not isinstance(shard, dict)
            or any(type(shard.get(name, kind())) is not kind for name, kind in SHARD_FIELDS.items())
            or "clips" not in shard
            or not shard.get("file")
            or Path(shard["file"]).name != shard["file"]
        ):
            wrong.append(f"shard {shard!r}")
    if wrong:
        raise DamagedFileError(f"{path} is damaged: {', '.join(wrong)} is missing, unknown or of another type. Restore it, or start again")
    return index


def check_shards(folder: Path, index: dict[str, Any], hashes: bool = False) -> None:
    """Compare the sizes and numbers of rows of a folder's shards with its index, and with `hashes` every byte, by SHA-256.

    Raises:
        DamagedFileError: if a shard is missing, truncated, changed or another one, naming it.
    """
    for shard in index["shards"]:
        if problem := _damage(folder / shard["file"], shard, hashes):
            raise DamagedFileError(f"{folder} {problem}, which its {SHARD_INDEX} names: put it back, or start again in an empty folder")


def _damage(path: Path, shard: dict[str, Any], hashes: bool) -> str | None:
    if not path.is_file():
        return f"lacks {path.name}"
    if (size := path.stat().st_size) != shard.get("bytes", size):
        return f"has {path.name} with {size} bytes instead of {shard['bytes']}"
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        return f"has {path.name}, not a whole parquet file ({error})"
    if rows != shard["clips"]:
        return f"has {path.name} with {rows} rows instead of {shard['clips']}"
    if hashes and "sha256" in shard and hash_file(path) != shard["sha256"]:
        return f"has {path.name}, changed since it was written,"
    return None
