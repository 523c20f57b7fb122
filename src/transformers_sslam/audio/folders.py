"""Audio as files: folders, class folders, metadata files and manifests, each read into a table of paths and columns.

The rules are those of the audio folder of `datasets`, whose own reader takes text for numbers (the classes `001`, `1.0` and `1` become
one), knows few formats, and caches by time stamps.
"""

import hashlib
import logging
import lzma
import os
import shutil
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from ..errors import UserError
from ..files import discard, hash_file
from .decode import AUDIO_SUFFIXES
from .left_out import count_suffixes, is_hidden, warn_of_repeats, warn_of_unread
from .metadata import METADATA_FILES, Metadata, read_metadata
from .paths import encode_path, files_below, find_files, printable_path, stat_files


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PIECE = 1_000_000  # paths in a chunk of an Arrow column, whose text is limited to 2 GiB


def import_datasets() -> Any:
    """The package `datasets`, or an `ImportError` that names the extra."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('opening a data set needs datasets: pip install "transformers-sslam[train]"') from error
    return datasets


def table_of_files(paths: Sequence[str | Path], columns: dict[str, Any] | None = None, features: dict[str, Any] | None = None) -> "Dataset":
    """A data set in memory: `audio` (`{"path", "bytes"}`, undecoded) and other columns.

    Args:
        paths: of the files, which [`encode_path`] encodes.
        columns: lists or Arrow arrays with a value for each file. Classes may be given by name.
        features: of these columns.
    """
    datasets = import_datasets()
    schema = datasets.Features({"audio": datasets.Audio(decode=False), **(features or {})})
    arrays = [_audio_array(paths)]
    for name, values in (columns or {}).items():
        kind = schema.arrow_schema.field(name).type
        arrays.append(values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(_encode_classes(values, schema[name]), kind))
    table = pa.table(arrays, names=list(schema)).cast(schema.arrow_schema)
    fingerprint = os.urandom(8).hex()  # by default a hash of the whole table
    return datasets.Dataset(datasets.table.InMemoryTable(table), datasets.DatasetInfo(features=schema), fingerprint=fingerprint)


def _audio_array(paths: Sequence[str | Path]) -> pa.ChunkedArray:
    pieces = []
    for start in range(0, len(paths), PIECE):
        text = pa.array([encode_path(str(path)) for path in paths[start : start + PIECE]], pa.string())
        pieces.append(pa.StructArray.from_arrays([pa.nulls(len(text), pa.binary()), text], ["bytes", "path"]))
    return pa.chunked_array(pieces, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def _encode_classes(values: Sequence[Any], feature: Any) -> Sequence[Any]:
    """Class names as numbers, in a column of `ClassLabel` or of lists of them."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if names is None:
        return values
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[value] if isinstance(value, str) else [numbers[name] for name in value] for value in values]


def open_folder(root: Path) -> "DatasetDict":
    """One split, `train`, of all files below a folder with an audio suffix; a file with several names (links) is one clip."""
    names, repeats = find_files(root, ("",))
    if not (audio := [name for name in names if name.lower().endswith(AUDIO_SUFFIXES)]):
        raise UserError(f"the folder {root} is empty: no file below it ends in {', '.join(AUDIO_SUFFIXES)}")
    warn_of_unread(root, names)
    warn_of_repeats(f"below {root}", _of_audio(repeats))
    return import_datasets().DatasetDict(train=table_of_files([os.path.join(root, name) for name in audio if name not in repeats]))


def _of_audio(repeats: dict[str, str]) -> dict[str, str]:
    return {other: first for other, first in repeats.items() if other.lower().endswith(AUDIO_SUFFIXES)}


def open_manifest(manifest: Path) -> "DatasetDict":
    """One split, `train`, of a fairseq TSV: the root folder (relative to the manifest's), then `relative path<TAB>samples` a line."""
    try:
        lines = manifest.read_text(encoding="utf-8-sig", errors="surrogateescape").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"the manifest {manifest} cannot be read ({error.strerror})") from error
    if len(lines) < 2:
        raise UserError(f"the manifest {manifest} is empty: expected is the root folder, then `relative path<TAB>samples` a line")
    names = []
    for number, line in enumerate(lines[1:], start=2):
        name, tab, samples = line.partition("\t")
        if not (name and tab and samples.strip().isdigit()):
            raise UserError(f"line {number} of the manifest {manifest} is {line!r}, but must be `relative path<TAB>samples`")
        names.append(name)
    root = manifest.parent / lines[0].strip()
    return import_datasets().DatasetDict(train=table_of_files([os.path.join(root, name) for name in names]))


def open_audio_folder(root: Path) -> "DatasetDict":
    """The splits of an audio folder, see [`audio_folder_splits`], with labels of class folders or the columns of its metadata.

    Metadata files, of which a split may have several, are those of [`read_metadata`]. Without them the label of a clip (`label`, a
    `ClassLabel`, sorted by name) is the name of its folder, where all clips lie equally deep. A `.zip` is read as the folder that it holds.

    Raises:
        UserError: if there is no audio, a row of metadata names a file outside the folder, or one file lies in two class folders.
    """
    datasets = import_datasets()
    places_of = audio_folder_splits(root)
    splits = {name: list(_list_files(places)) for name, places in places_of.items()}
    listings = [listing for split in splits.values() for listing in split]
    if not any(listing.audio or listing.metadata for listing in listings):
        raise UserError(
            f"{root} cannot be read as an audio folder: no file in it ends in {', '.join(AUDIO_SUFFIXES)}; it must hold class folders of "
            "audio, or audio and a metadata.csv"
        )
    places = [place for places in places_of.values() for place in places]
    if places != [root]:
        warn_of_unread(root, (os.path.relpath(path, root) for top in root.iterdir() if top not in places for path in _files_of(top)))
    if any(listing.metadata for listing in listings):
        if without := [listing.folder for listing in listings if listing.audio and not listing.metadata]:
            raise UserError(f"{root} has a file of metadata, but {without[0]} has none: list its clips too")
        return datasets.DatasetDict({name: _open_listed(split, root) for name, split in splits.items()})
    depths = {name.count(os.sep) for listing in listings for name in listing.audio}
    if len(depths) > 1:
        logger.warning(f"audio files below {root} lie at different depths, so their folders are not taken for classes")
    paths = {name: [os.path.join(listing.folder, file) for listing in split for file in listing.audio] for name, split in splits.items()}
    if len(depths) > 1 or depths == {0}:
        return datasets.DatasetDict({name: table_of_files(files) for name, files in paths.items()})
    labels = {name: [encode_path(Path(file).parent.name) for file in files] for name, files in paths.items()}
    feature = datasets.ClassLabel(names=sorted(set().union(*labels.values())))
    return datasets.DatasetDict({name: table_of_files(paths[name], {"label": labels[name]}, {"label": feature}) for name in splits})


def audio_folder_splits(root: Path) -> dict[str, list[Path]]:
    """The folders or archives of each split of an audio folder.

    Those at the top that are named as in `SPLIT_FOLDERS` are splits, where there are several or nothing else; otherwise all is the split
    "train". (`datasets` searches all names for such words, and leaves out what has none.)

    Raises:
        UserError: if beside several such folders there is other audio, or metadata for all.
    """
    suffixes = (*AUDIO_SUFFIXES, ".zip")
    tops = sorted(path.name for path in root.iterdir() if _holds(path, suffixes))
    split_of = {top: split for top in tops for split, names in SPLIT_FOLDERS.items() if top.lower().removesuffix(".zip") in names}
    others = [top for top in tops if top not in split_of]
    others += sorted(path.name for path in root.iterdir() if path.name.lower().startswith("metadata."))
    if not split_of or (others and len(set(split_of.values())) == 1):
        return {"train": [root]}
    if others:
        raise UserError(
            f"{root} holds {', '.join(split_of)}, which are splits, and beside them {', '.join(map(printable_path, others[:3]))}: move "
            "everything into the splits, or rename the folders"
        )
    return {split: [root / top for top, its in split_of.items() if its == split] for split in SPLIT_FOLDERS if split in split_of.values()}


def _files_of(path: Path) -> Iterator[str]:
    """A file, or those below a folder."""
    return (os.path.join(path, name) for name in files_below(path, ("",))) if path.is_dir() else iter([str(path)])


def _holds(path: Path, suffixes: tuple[str, ...]) -> bool:
    if path.is_dir():
        return any(True for _ in files_below(path, suffixes))
    return path.name.lower().endswith(suffixes) and not path.name.startswith("._")


class _Listing(NamedTuple):
    """Names relative to `folder`, sorted: of audio, without further names (links); of metadata; of what is neither, nor an archive; further
    names, with the first of each."""

    folder: Path
    audio: list[str]
    metadata: list[str]
    others: list[str]
    repeats: dict[str, str]


def _list_files(places: Sequence[Path]) -> Iterator[_Listing]:
    """List folders or archives, and the archives below them."""
    for place in places:
        folder = _extract(place) if place.is_file() else place
        names, repeats = find_files(folder, ("",))
        audio = [name for name in names if name.lower().endswith(AUDIO_SUFFIXES)]
        metadata = [name for name in names if os.path.basename(name).lower() in METADATA_FILES]
        others = [name for name in names if not name.lower().endswith((*AUDIO_SUFFIXES, ".zip"))]
        if not metadata:
            _check_folders(folder, audio, others, repeats)
        yield _Listing(folder, [name for name in audio if name not in repeats], metadata, others, repeats)
        yield from _list_files([folder / name for name in names if name.lower().endswith(".zip")])


def _check_folders(root: Path, audio: Sequence[str], others: Sequence[str], repeats: dict[str, str]) -> None:
    """Warn of class folders without audio, and of files that are not read in the others. Reject a file that lies in two folders."""
    with_audio = {str(folder) for name in {os.path.dirname(name) for name in audio} for folder in (Path(name), *Path(name).parents)}
    without: dict[str, list[str]] = defaultdict(list)
    for name in others:
        if not is_hidden(name) and (folder := os.path.dirname(name)) and folder not in with_audio:
            without[folder].append(name)
    if without:
        found = [f"{printable_path(folder)} ({count_suffixes(names)})" for folder, names in sorted(without.items())]
        logger.warning(f"folders below {root} without any audio file, which are not classes: {', '.join(found)}")
    warn_of_unread(root, [name for name in others if os.path.dirname(name) not in without])
    repeats = _of_audio(repeats)
    for other, first in repeats.items():
        if os.path.dirname(first) != os.path.dirname(other):
            raise UserError(f"{printable_path(other)} and {printable_path(first)} below {root} are one file in two folders: keep one")
    warn_of_repeats(f"below {root}", repeats)


def _extract(archive: Path) -> Path:
    """Extract a `.zip` into the cache of `datasets`, by the hash of its content."""
    cache = Path(import_datasets().config.HF_DATASETS_CACHE) / "extracted"
    folder = cache / hash_files([archive])
    if folder.is_dir() and not _holds_all(folder, archive):
        discard(folder)
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(unfinished)
            unfinished.rename(folder)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError) as error:
            if not folder.is_dir():  # otherwise another process was faster
                raise UserError(f"{archive} cannot be extracted ({error}): restore it") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _holds_all(folder: Path, archive: Path) -> bool:
    """Whether what was extracted is still there: programs that clear caches delete single files."""
    with zipfile.ZipFile(archive) as file:
        members = [(member.filename.split("/"), member.file_size) for member in file.infolist() if not member.is_dir()]
    sizes = {os.path.join(folder, *(part for part in parts if part not in ("", ".", ".."))): size for parts, size in members}
    return all(state is not None and state.st_size == size for state, size in zip(stat_files(list(sizes)), sizes.values()))


def hash_files(files: Iterable[str | Path]) -> str:
    """A hash of the names and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{os.path.basename(path)!r}".encode() + bytes.fromhex(hash_file(path)))
    return digest.hexdigest()[:32]


def _open_listed(listings: Sequence[_Listing], root: Path) -> "Dataset":
    """A table of the clips that metadata files list."""
    paths: list[str] = []
    tables: list[pa.Table] = []
    for listing in listings:
        boundary = root if listing.folder.is_relative_to(root) else listing.folder  # an extracted archive
        files = [read_metadata(listing.folder / name, boundary) for name in listing.metadata]
        _check_listed(listing, files)
        paths += [path for metadata in files for path in metadata.paths]
        tables += [metadata.columns for metadata in files]
    Features = import_datasets().Features
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
        return table_of_files(paths, dict(zip(table.column_names, table.columns)), Features.from_arrow_schema(table.schema))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"the metadata of {root} are not one table ({error}): give all files the same columns") from error


def _check_listed(listing: _Listing, files: Sequence[Metadata]) -> None:
    """Warn of clips that are listed twice, not listed, not read or missing. `UserError` if all are missing."""
    listed = [(metadata, row) for metadata in files for row in range(len(metadata.paths))]
    first_names = {os.path.join(listing.folder, other): os.path.join(listing.folder, name) for other, name in listing.repeats.items()}
    present = {os.path.join(listing.folder, name) for name in listing.audio}
    first: dict[str, int] = {}
    again, absent = [], []
    for number, (metadata, row) in enumerate(listed):
        name = first_names.get(metadata.paths[row], metadata.paths[row])
        if (earlier := first.setdefault(name, number)) != number:
            again.append((number, earlier))
        if name not in present and not os.path.exists(name):
            absent.append(number)
    if again:
        (metadata, row), (earlier_file, earlier_row) = (listed[number] for number in again[0])
        logger.warning(
            f"{len(again)} rows list a clip again, such as {metadata.place(row)} that of {earlier_file.place(earlier_row)}: it comes as "
            "often as it is listed"
        )
    if left_out := present.difference(first):
        logger.warning(
            f"{len(left_out)} of {len(present)} audio files below {listing.folder} are not in its metadata and left out, such as "
            f"{printable_path(min(left_out))}"
        )
    warn_of_unread(listing.folder, [name for name in listing.others if os.path.join(listing.folder, name) not in first])
    if absent:  # counted again, as missing, where clips are decoded
        metadata, row = listed[absent[0]]
        message = (
            f"{len(absent)} of {len(listed)} clips that are listed are not there, such as {metadata.paths[row]} ({metadata.place(row)})"
        )
        if len(absent) == len(listed):
            raise UserError(f"{message}: names are relative to the file of metadata")
        logger.warning(message)
