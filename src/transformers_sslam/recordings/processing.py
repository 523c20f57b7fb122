"""All recordings of a folder or list through a model, by one or many processes, and the output that follows of the results.

Processes do not wait for each other: each takes every n-th portion of the recordings and writes parts of its own. Whichever finishes last
finds the results of all recordings, and writes the output.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tqdm.auto import tqdm

from ..audio.ahead import in_background
from ..audio.paths import printable_path
from ..batching_sslam import Span, compute_batches, prepare_batches
from ..configuration_sslam import SSLAMConfig
from ..errors import UserError, as_user_error
from ..evaluation.loading import best_device, hash_model, load_model, prepare_command
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import lock
from ..settings import setting
from ..tasks_sslam import Row, Task
from .inputs import Recording, absolute_path, current_state, cut_into_portions, find_recordings, lists_among, read_windows
from .parts import MODEL_NAME, OUTPUTS, Parts, cause_of


Result = tuple[Span, torch.Tensor | ValueError]  # of a window, or of a recording that cannot be used
# Of a process among those that torchrun, `accelerate launch` or MPI has started.
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")


@dataclass(kw_only=True)
class RecordingsSettings:
    """Recordings"""

    model: str = setting("a folder, a Hub id, or an official checkpoint")
    inputs: str | list[str] = setting(
        "folder (every audio file below it), audio file, or text file with one path on each line (relative to its folder); or several"
    )
    output: str = setting("file to write; the results that it is written from are kept beside it, in a folder that ends in .parts")
    window: float | None = setting("length of a window in seconds, a multiple of 0.16; null: the feature extractor's", None)
    hop: float | None = setting("seconds from one window's start to the next one's; null: half a window", None)
    per_device_eval_batch_size: int = setting("windows in a forward pass, of any recordings", 16)
    device: str | None = setting("cpu, cuda, cuda:1 ...; null: an accelerator if there is one, one for each process", None)
    dtype: Literal["float32", "float16", "bfloat16"] = setting("precision of the model", "float32")
    engine: Literal["local", "ray"] = setting("local: this process, or those of accelerate launch; ray: a Ray cluster", "local")
    ray_workers: int = setting("with engine ray: processes that hold the model", 1)

    model_class: ClassVar[type]
    suffixes: ClassVar[tuple[str, ...]]

    def __post_init__(self):
        if Path(self.output).suffix not in self.suffixes:
            raise UserError(f"output is {self.output!r}, but a file that ends in {' or '.join(self.suffixes)} is expected")
        if (printable := printable_path(self.output)) != self.output:  # PyArrow does not open others
            raise UserError(f"output is {printable}, but a name in UTF-8 is expected: give another place")
        for name in ("per_device_eval_batch_size", "ray_workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be positive")

    @property
    def outputs(self) -> list[Path]:
        """Files and folders that are written."""
        return [Path(self.output)]

    def task(self, config: SSLAMConfig, extractor: SSLAMFeatureExtractor) -> Task:
        """What is computed of each recording."""
        raise TypeError(f"{type(self).__name__} does not say what is computed")


@dataclass
class Summary:
    """Of a run of one process: recordings processed, finished before, and unusable by cause; seconds of audio and of the run; and, over all
    processes, whether all recordings are processed, whether any could be used, and how many of earlier runs are not among the inputs."""

    finished: int = 0
    skipped: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    audio_seconds: float = 0.0
    run_seconds: float = 0.0
    is_complete: bool = False
    any_usable: bool = True
    left_out: int = 0

    @property
    def speed(self) -> float:
        """Seconds of audio in a second."""
        return self.audio_seconds / max(self.run_seconds, 1e-9)

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.unusable.items()))
        speed = f" ({self.audio_seconds / 3600:.2f} h, {self.speed:.0f} x real time)" if self.finished else ""
        return f"{self.finished} recordings processed{speed}, {self.skipped} finished before, {sum(self.unusable.values())} not usable" + (
            f" ({causes})" if causes else ""
        )


def report(work: Callable[[Any], Summary], settings: RecordingsSettings) -> None:
    """Do the work of a command, and print the counts.

    Raises:
        SystemExit: after Ctrl-C, with status 130, as a shell expects.
        UserError: if no recording can be used; the output is written nevertheless.
    """
    prepare_command(settings.device)
    for name in map(printable_path, lists_among(settings.inputs)):
        print(f"{name} is read as a list: each line is the path of a recording")
    try:
        summary = work(settings)
    except KeyboardInterrupt:
        print("stopped: the same command resumes, without what is finished", file=sys.stderr)
        raise SystemExit(130) from None
    print(summary)
    if not summary.is_complete:
        print(f"{settings.output} is written by the process that ends last")
    if summary.left_out:
        print(
            f"{summary.left_out} recordings of earlier runs are not among these inputs, so {settings.output} is without them now: give "
            "all as inputs to have them in it again, without computing"
        )
    if summary.is_complete and not summary.any_usable:
        raise UserError("no recording can be used: the output has the cause of each, or the .unusable.csv beside it")
    if summary.is_complete and not summary.finished:
        print(f"{settings.output} is written from the results in {Path(settings.output).with_suffix('.parts')}; nothing was computed")


def process_numbers() -> tuple[int, int, int]:
    """Number of this process, of all processes, and of this one on its machine.

    Raises:
        UserError: if the environment does not have numbers that fit together: recordings would be left out silently.
    """
    groups = ((RANK_VARIABLES, "0"), (SIZE_VARIABLES, "1"), (LOCAL_RANK_VARIABLES, "0"))
    found = [next(((name, os.environ[name]) for name in names if name in os.environ), (names[0], default)) for names, default in groups]
    if not all(value.isdecimal() for _, value in found) or not int(found[0][1]) < int(found[1][1]):
        values = ", ".join(f"{name} is {value!r}" for name, value in found)
        raise UserError(
            f"of the environment variables of processes {values}, but a number of this process below that of all processes is expected: "
            "unset them to start one process, or start several with accelerate launch"
        )
    rank, size, local = (int(value) for _, value in found)
    return rank, size, local


def process(settings: RecordingsSettings, write_output: Callable[[Parts, list[str], Path, Any], None]) -> Summary:
    """Process all recordings that the parts do not hold yet; then, if all are finished, write the output.

    Args:
        settings: of the command.
        write_output: `write_output(parts, paths, file, task)`.

    Raises:
        UserError: if an input or the model is missing or unusable, the parts are of another model or other settings, or the output was
            changed by others.
        FloatingPointError: if what the model gives is not finite.
    """
    output, (rank, processes, local) = Path(settings.output), process_numbers()
    if settings.engine == "ray" and processes > 1:
        raise UserError(f"engine is ray, but {processes} processes were started: start one, and set ray_workers")
    paths = find_recordings(settings.inputs, warn=rank == 0)
    device = settings.device
    if device is None and (device := best_device().type) != "cpu":
        device = f"{device}:{local}"
    model: Any
    model, extractor = load_model(settings.model_class, settings.model, settings.dtype, device)
    with as_user_error("these settings do not fit the model"):
        task = settings.task(model.config, extractor)
    with ExitStack() as stack:
        with as_user_error(f"{output} cannot be written"):
            if rank == 0:  # the other processes were started with it
                stack.enter_context(lock(output.with_suffix(".parts")))
            parts = Parts(output.with_suffix(".parts"), _identity(settings, task, model), task.width)
            for written in settings.outputs:
                parts.check_output(written)
        recordings, former = current_state(paths), parts.names
        portions = cut_into_portions(recordings)[rank::processes]
        left = [unfinished for portion in portions if (unfinished := [r for r in portion if not parts.holds(r)])]
        summary = Summary(skipped=sum(map(len, portions)) - sum(map(len, left)))
        _process(settings, parts, task, model, left, summary)
    with as_user_error(f"{output} cannot be written"), lock(parts.folder / OUTPUTS, wait=True):  # names all outputs
        parts.refresh()
        summary.is_complete = all(parts.answers(recording, former) for recording in recordings)
        if summary.is_complete:
            write_output(parts, paths, output, task)
            summary.left_out = len(parts.entries.keys() - set(map(absolute_path, paths)))
            summary.any_usable = any(map(parts.holds, recordings))
    return summary


def _identity(settings: RecordingsSettings, task: Task, model: Any) -> dict[str, Any]:
    """All that decides the values of a recording; the model by its contents. First comes what others follow from: it is named in errors."""
    digest = hash_model(model, task.extractor, problem_type=model.config.problem_type)
    windowing, kept = task.windowing, ("per", "layers", "pooling")
    seconds = {"window": windowing.frames / 100, "hop": windowing.hop / windowing.sampling_rate}
    options = {name: getattr(task, name) for name in kept if hasattr(task, name)}
    names = {"model": f"sha256:{digest}", MODEL_NAME: settings.model}
    return {"task": type(task).__name__, "dtype": settings.dtype, **names, **options, **seconds}


def _process(settings: RecordingsSettings, parts: Parts, task: Task, model: Any, portions: list[list[Recording]], summary: Summary) -> None:
    """Write the parts of all portions, and count what is in them."""
    started, numbers = time.monotonic(), {recording.path: i for i, portion in enumerate(portions) for recording in portion}
    if settings.engine == "ray":
        from .ray_engine import compute_with_ray

        results = compute_with_ray(settings, task, portions)
    else:
        results = compute_here(settings, task, model, portions)
    with tqdm(total=len(numbers), desc="recordings", unit="file", disable=process_numbers()[0] > 0) as progress:

        def counted(found: Iterable[Result]) -> Iterator[tuple[Recording, Iterator[Row | ValueError]]]:
            for recording, windows in groupby(found, key=lambda result: result[0].recording):
                yield recording, _rows(task, windows, summary)
                summary.run_seconds = time.monotonic() - started
                progress.set_postfix_str(f"{summary.speed:.0f} x real time", refresh=False)  # as often as the bar, not for each file
                progress.update()

        for _, found in groupby(results, key=lambda result: numbers[result[0].recording.path]):
            parts.write(counted(found))


def compute_here(settings: RecordingsSettings, task: Task, model: Any, portions: list[list[Recording]]) -> Iterator[Result]:
    """The results of all windows in this process: files are decoded in threads, log-mels are made in another, ahead of the model."""
    windows, features = read_windows(task, portions), partial(task.features, device=model.device)
    batches = prepare_batches(windows, features, settings.per_device_eval_batch_size, task.sorted_batches)
    return compute_batches(in_background(batches), partial(task.compute, model))


def _rows(task: Task, windows: Iterable[Result], summary: Summary) -> Iterator[Row | ValueError]:
    """A recording's rows, and last why it cannot be used, if so: then they do not count."""
    errors: list[ValueError] = []

    def usable() -> Iterator[tuple[Span, torch.Tensor]]:
        for span, result in windows:
            if isinstance(result, ValueError):
                errors.append(result)
            else:
                yield span, result

    end = 0.0
    for row in task.rows(usable()):
        end = row.end
        yield row
    if errors:
        summary.unusable[cause_of(errors[0])] += 1
        yield errors[0]
    else:
        summary.finished += 1
        summary.audio_seconds += end
