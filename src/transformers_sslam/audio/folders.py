"""Audio as files: folders, class folders, tables of metadata and manifests, each read into a table of paths and columns.

`datasets` has an audio folder of its own, whose rules are kept here. Its reader is not used, for it takes text for numbers (the classes
`001`, `1.0` and `1` become one), knows few formats, and keeps what it has read by time stamps.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from .decode import AUDIO_SUFFIXES
from .metadata import METADATA_FILES, read_metadata, resolve, warn_of_repeats
from .paths import encode_path, files_below, find_files, printable_path


if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

# How folders are called that are splits.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PIECE = 1_000_000  # paths in a piece of an Arrow column, whose text ends at 2 GiB


def import_datasets() -> Any:
    """The package `datasets`, or an `ImportError` that names the extra which brings it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('opening a data set needs datasets: pip install "transformers-sslam[train]"') from error
    return datasets


def table_of_files(paths: Sequence[str | Path], columns: dict[str, Any] | None = None, features: dict[str, Any] | None = None) -> "Dataset":
    """A data set in memory: `audio` (`{"path", "bytes"}`, undecoded) and other columns.

    Args:
        paths: of the files; the column holds them as [`encode_path`] writes them.
        columns: lists or Arrow arrays, as long as `paths`. Classes may be given by name.
        features: of `datasets`, for each of these columns.
    """
    import pyarrow as pa

    datasets = import_datasets()
    schema = datasets.Features({"audio": datasets.Audio(decode=False), **(features or {})})
    arrays = [_audio_array(paths)]
    for name, values in (columns or {}).items():
        kind = schema.arrow_schema.field(name).type
        arrays.append(values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(_encode_classes(values, schema[name]), kind))
    table = pa.table(arrays, names=list(schema)).cast(schema.arrow_schema)
    # Its own fingerprint is a hash of all that the table holds.
    fingerprint = os.urandom(8).hex()
    return datasets.Dataset(datasets.table.InMemoryTable(table), datasets.DatasetInfo(features=schema), fingerprint=fingerprint)


def _audio_array(paths: Sequence[str | Path]) -> "pa.ChunkedArray":
    import pyarrow as pa

    pieces = []
    for start in range(0, len(paths), PIECE):
        text = pa.array([encode_path(str(path)) for path in paths[start : start + PIECE]], pa.string())
        pieces.append(pa.StructArray.from_arrays([pa.nulls(len(text), pa.binary()), text], ["bytes", "path"]))
    return pa.chunked_array(pieces, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def _encode_classes(values: Sequence[Any], feature: Any) -> Sequence[Any]:
    """Names of a `ClassLabel` column, or of one of lists of them, as their numbers."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if names is None:
        return values
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[value] if isinstance(value, str) else [numbers[name] for name in value] for value in values]


def open_folder(root: Path) -> "DatasetDict":
    """One split, `train`, of every file below a folder that has an audio suffix; a file with several names (links) is one clip."""
    names, repeats = find_files(root, AUDIO_SUFFIXES)
    if not names:
        raise UserError(f"the folder {root} is empty: no file below it ends in {', '.join(AUDIO_SUFFIXES)}")
    _warn_of_repeats(root, repeats)
    return import_datasets().DatasetDict(train=table_of_files([os.path.join(root, name) for name in names if name not in repeats]))


def open_manifest(manifest: Path) -> "DatasetDict":
    """One split, `train`, of a fairseq TSV: the root folder (a relative one starts at the manifest's own), then `relative path<TAB>samples`
    a line; the number of samples is not used."""
    try:
        lines = manifest.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"the manifest {manifest} cannot be read ({error.strerror})") from error
    if len(lines) < 2:
        raise UserError(f"the manifest {manifest} is empty: its first line is the root folder, then `relative path<TAB>samples` a clip")
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

    Metadata are `metadata.csv`, `.jsonl` or `.parquet` with a column `file_name`, relative to the file of metadata; a split may have
    several, in folders of its own. The cells of a CSV file stay text (an empty one is missing), those of the others keep their types.
    Without metadata the label of a clip (`label`, a `ClassLabel`, sorted by name) is the name of its folder, where all clips lie equally
    deep. A `.zip` is read as the folder that it holds.

    Raises:
        UserError: if there is no audio, a row of metadata names a file outside the folder, or one lies in two
            class folders.
    """
    datasets = import_datasets()
    splits = {name: list(_list_files(places)) for name, places in audio_folder_splits(root).items()}
    listings = [listing for split in splits.values() for listing in split]
    if not any(listing.audio or listing.metadata for listing in listings):
        raise UserError(
            f"{root} cannot be read as an audio folder: no file in it ends in {', '.join(AUDIO_SUFFIXES)}; it must hold audio files, in "
            "folders named after their classes or with a metadata.csv"
        )
    if any(listing.metadata for listing in listings):
        if without := [listing.folder for listing in listings if listing.audio and not listing.metadata]:
            raise UserError(f"{root} has a file of metadata, but {without[0]} has none: list its clips too, or take the metadata away")
        return datasets.DatasetDict({name: _open_listed(split, root) for name, split in splits.items()})
    depths = {name.count(os.sep) for listing in listings for name in listing.audio}
    if len(depths) > 1:
        logger.warning(f"audio files below {root} lie at different depths, so the names of their folders are not taken for classes")
    paths = {name: [os.path.join(listing.folder, file) for listing in split for file in listing.audio] for name, split in splits.items()}
    if len(depths) > 1 or depths == {0}:
        return datasets.DatasetDict({name: table_of_files(files) for name, files in paths.items()})
    labels = {name: [encode_path(Path(file).parent.name) for file in files] for name, files in paths.items()}
    feature = datasets.ClassLabel(names=sorted(set().union(*labels.values())))
    return datasets.DatasetDict({name: table_of_files(paths[name], {"label": labels[name]}, {"label": feature}) for name in splits})


def audio_folder_splits(root: Path) -> dict[str, list[Path]]:
    """The folders or archives of each split of an audio folder. `datasets` by itself would look for "train", "test" and the like in all
    names of files and folders, leave out what has none, and count what has two in both.

    Here folders (or `.zip` archives) of these names at the top are splits, where there is more than one or nothing else; otherwise all is
    the split "train".

    Raises:
        UserError: if beside several such folders there is other audio, or a table of metadata for all.
    """
    suffixes = (*AUDIO_SUFFIXES, ".zip")
    tops = sorted(path.name for path in root.iterdir() if _holds(path, suffixes))
    split_of = {top: split for top in tops for split, names in SPLIT_FOLDERS.items() if top.lower().removesuffix(".zip") in names}
    others = [top for top in tops if top not in split_of] + [file.name for file in sorted(root.glob("metadata.*"))]
    if not split_of or (others and len(set(split_of.values())) == 1):
        return {"train": [root]}
    if others:
        raise UserError(
            f"{root} holds {', '.join(split_of)}, which are splits, and beside them {', '.join(map(printable_path, others[:3]))}: move all "
            "audio into the splits, each with a metadata.csv of its own, or rename the folders"
        )
    return {split: [root / top for top, its in split_of.items() if its == split] for split in SPLIT_FOLDERS if split in split_of.values()}


def _holds(path: Path, suffixes: tuple[str, ...]) -> bool:
    if path.is_dir():
        return any(True for _ in files_below(path, suffixes))
    return path.name.lower().endswith(suffixes) and not path.name.startswith("._")


class _Listing(NamedTuple):
    """What lies below a folder; names are relative to it and sorted.

    Attributes:
        audio: files with an audio suffix, each by its first name only.
        metadata: files of metadata.
        repeats: other names of files, links, with the first name of each.
    """

    folder: Path
    audio: list[str]
    metadata: list[str]
    repeats: dict[str, str]


def _list_files(places: Sequence[Path]) -> Iterator[_Listing]:
    """Of each folder or archive of a split, and of the archives below them."""
    for place in places:
        folder = _extract(place) if place.is_file() else place
        names, repeats = find_files(folder, ("",))
        audio = [name for name in names if name.lower().endswith(AUDIO_SUFFIXES)]
        metadata = [name for name in names if os.path.basename(name) in METADATA_FILES]
        if not metadata:
            _check_folders(folder, names, audio, repeats)
        yield _Listing(folder, [name for name in audio if name not in repeats], metadata, repeats)
        yield from _list_files([folder / name for name in names if name.lower().endswith(".zip")])


def _check_folders(root: Path, names: Sequence[str], audio: Sequence[str], repeats: dict[str, str]) -> None:
    """That no class vanishes silently: neither one whose files all have other suffixes, nor one of a file that lies in two folders."""
    suffixes: dict[str, Counter] = defaultdict(Counter)
    for name in names:
        if not os.path.basename(name).startswith("."):
            suffixes[os.path.dirname(name)][os.path.splitext(name)[1] or "no suffix"] += 1
    within = {os.path.dirname(name) for name in audio}
    above = {str(folder) for name in within for folder in Path(name).parents}
    if without := sorted(suffixes.keys() - within - above - {""}):
        found = [
            f"{printable_path(folder)} ({', '.join(f'{count} {suffix}' for suffix, count in suffixes[folder].most_common(3))})"
            for folder in without
        ]
        logger.warning(f"folders below {root} without any audio file, which are no classes: {', '.join(found)}")
    repeats = {other: first for other, first in repeats.items() if other.lower().endswith(AUDIO_SUFFIXES)}
    for other, first in repeats.items():
        if os.path.dirname(first) != os.path.dirname(other):
            raise UserError(
                f"{printable_path(other)} and {printable_path(first)} below {root} are one file in two folders: keep one of them"
            )
    _warn_of_repeats(root, repeats)


def _warn_of_repeats(root: Path, repeats: dict[str, str]) -> None:
    """Say which names are left out because they lead to a file that another name stands for."""
    if repeats:
        shown = [f"{printable_path(other)} is {printable_path(first)}" for other, first in list(repeats.items())[:3]]
        logger.warning(f"{len(repeats)} files below {root} are other names of files and left out: {', '.join(shown)}")


def _extract(archive: Path) -> Path:
    """The folder of what a `.zip` holds, in the cache of `datasets`, under the hash of its content."""
    cache = Path(import_datasets().config.HF_DATASETS_CACHE) / "extracted"
    folder = cache / hash_files([archive])
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(unfinished)
            unfinished.rename(folder)
        except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
            if not folder.is_dir():  # or else another process was faster
                raise UserError(f"{archive} cannot be extracted ({error}): make it again, or extract it yourself") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def hash_files(files: Iterable[str | Path]) -> str:
    """Of the names and whole contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{os.path.basename(path)!r}".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _open_listed(listings: Sequence[_Listing], root: Path) -> "Dataset":
    """The clips that files of metadata list, with its columns."""
    import pyarrow as pa

    paths: list[str] = []
    tables: list[pa.Table] = []
    for listing in listings:
        files = [read_metadata(listing.folder / name) for name in listing.metadata]
        boundary = root if listing.folder.is_relative_to(root) else listing.folder  # of an archive: what it was extracted to
        listed = [path for metadata in files for path in resolve(metadata, boundary)]
        other_names = {os.path.join(listing.folder, other): os.path.join(listing.folder, name) for other, name in listing.repeats.items()}
        named = [other_names.get(path, path) for path in listed] if other_names else listed
        warn_of_repeats(named, files)
        present = {os.path.join(listing.folder, name) for name in listing.audio}
        if left_out := present.difference(named):
            logger.warning(
                f"{len(left_out)} of {len(present)} audio files below {listing.folder} are not listed in its metadata, and are left out, "
                f"such as {printable_path(min(left_out))}"
            )
        absent = [i for i, path in enumerate(named) if path not in present and not os.path.exists(path)]
        if absent:  # counted again, as missing, where clips are decoded
            places = [metadata.place(number) for metadata in files for number in range(len(metadata.names))]
            message = (
                f"{len(absent)} of {len(named)} clips that are listed are not there, such as {listed[absent[0]]} ({places[absent[0]]})"
            )
            if len(absent) == len(named):
                raise UserError(f"{message}: names are relative to the file of metadata")
            logger.warning(message)
        paths += listed
        tables += [metadata.columns for metadata in files]
    features = import_datasets().Features
    try:
        table = pa.concat_tables(tables, promote_options="default")
        columns = features.from_arrow_schema(table.schema)
        return table_of_files(paths, dict(zip(table.column_names, table.columns)), columns)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"the metadata of {root} cannot be read as one table ({error}): give all files the same columns") from error
