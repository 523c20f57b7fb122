"""The command `sslam benchmark`: an encoder on tasks of a public suite, or on your own tasks in the same form."""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...configuration_sslam import ClipPooling
from ...errors import UserError
from ...names import did_you_mean, similar
from ...reports import markdown_table
from ...settings import setting


if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


logger = logging.getLogger(__name__)

LOG_MEL = "log_mel"  # in place of a model's name
OF_SSLAM = ("pooling", "layers", "dtype", "untrained")  # settings of this package's encoders alone


@dataclass(kw_only=True)
class SuiteSettings:
    """Evaluation of an encoder by a benchmark suite"""

    model: str = setting(
        "encoder: a folder, a Hub id, or an official checkpoint; a model of audio of the suite's own list; or log_mel, mean and standard "
        "deviation of each log-mel bin, without a network"
    )
    suite: Literal["mteb"] = setting("benchmark suite; the programs of X-ARES and HEAR take this package's adaptors themselves", "mteb")
    tasks: list[str] = setting("names of tasks or benchmarks of the suite, and Python files with task classes of your own")
    pooling: ClipPooling = setting("how the CLS token or the patches become the embedding of a clip", "mean")
    layers: list[int] = setting("whose outputs are concatenated; -1: the last one, 0: the input of the first", [-1])
    untrained: bool = setting("random weights in place of the model's: its configuration before any training", False)
    seed: int = setting("random seed for the weights of an untrained network", 0)
    output_dir: str = setting("folder for the results, as the suite writes them", "runs/benchmark")
    per_device_eval_batch_size: int = setting("clips in a forward pass", 16)
    device: str | None = setting("cpu, cuda, cuda:1 ...; null: an accelerator if there is one", None)
    dtype: Literal["float32", "float16", "bfloat16"] = setting("precision of the encoder", "float32")

    def __post_init__(self):
        if not self.tasks:
            raise UserError("tasks is empty, but at least one task is needed: give its name, or a Python file")
        if self.per_device_eval_batch_size < 1:
            raise UserError(f"per_device_eval_batch_size is {self.per_device_eval_batch_size}, but must be positive")
        if self.seed and not self.untrained:
            raise UserError(f"seed is {self.seed}, but has no effect without untrained: add --untrained true, or leave it out")


def run(settings: SuiteSettings) -> None:
    """Run the command: print a table of the main scores."""
    print(markdown_table(["task", "split", "metric", "value"], run_benchmark(settings)))


def run_benchmark(settings: SuiteSettings) -> list[list[str]]:
    """Evaluate the encoder on all tasks, in their order.

    A task of the suite that `output_dir` has results of, for the same weights and settings, is not run again. Your own tasks always
    are, because the suite would not notice that a file has changed.

    Returns:
        Task, split, main metric and value of each result. All other scores are in `output_dir`.

    Raises:
        UserError: if mteb is not installed, the model cannot be loaded, or a task is not found, or not of audio alone.
    """
    try:
        import mteb
    except ImportError as error:
        raise UserError(f"sslam benchmark needs mteb ({error}): pip install 'transformers-sslam[mteb]'") from error
    tasks = [task for name in settings.tasks for task in find_tasks(name)]
    for task, _ in tasks:
        if set(task.modalities) != {"audio"}:
            modalities = ", ".join(task.modalities)
            raise UserError(f"{task.metadata.name} is a task of {modalities}, but the model encodes audio alone: leave it out")
    encoder = find_encoder(settings)
    rows = []
    for task, is_own in tasks:
        found = mteb.evaluate(
            encoder,
            task,
            encode_kwargs={"batch_size": settings.per_device_eval_batch_size},
            cache=mteb.ResultCache(settings.output_dir),
            overwrite_strategy="always" if is_own else "only-missing",
        )
        for failure in found.exceptions or ():  # data sets that are not public
            logger.warning(f"{failure.task_name} was not evaluated: {failure.exception}")
        for result in found.task_results:
            for split, scores in result.scores.items():
                mean = sum(score["main_score"] for score in scores) / len(scores)  # over languages
                interval = " [{low:.4f}, {high:.4f}]".format(**scores[0]) if "low" in scores[0] else ""
                rows.append([result.task_name, split, task.metadata.main_score, f"{mean:.4f}{interval}"])
    return rows


def find_encoder(settings: SuiteSettings) -> Any:
    """The encoder that `model` names.

    Raises:
        UserError: if there is none, it cannot be loaded or takes no audio, or a setting has no effect on it.
    """
    import mteb

    from .mteb import LogMelEncoder, SSLAMEncoder

    name, is_here = settings.model, Path(settings.model).exists()
    listed = {meta.name: meta for meta in mteb.get_model_metas()}
    if name == LOG_MEL or (name in listed and not is_here):
        what = "the baseline without a network" if name == LOG_MEL else "a model of mteb's list, which embeds as its authors chose"
        for option in OF_SSLAM:
            if (value := getattr(settings, option)) != getattr(SuiteSettings(model=name, tasks=settings.tasks), option):
                raise UserError(f"{option} is {value!r}, but {name} is {what}, where it has no effect: leave it out")
        if name == LOG_MEL:
            return LogMelEncoder()
        if "audio" not in (modalities := listed[name].modalities):
            raise UserError(f"{name} of mteb's list is a model of {', '.join(modalities)}, but audio is needed: choose another model")
        try:
            return mteb.get_model(name, device=settings.device)
        except Exception as error:  # each model of the list has a loader of its own, and packages that it needs
            raise UserError(f"{name} of mteb's list cannot be loaded: {' '.join(str(error).split())}") from error
    options: dict[str, Any] = {option: getattr(settings, option) for option in ("device", "pooling", "layers", "dtype")}
    try:
        return SSLAMEncoder(name, **options, untrained=settings.seed if settings.untrained else None)
    except UserError as error:
        near = similar(name, [other for other, meta in listed.items() if other and "audio" in meta.modalities])
        if is_here or not near:
            raise
        raise UserError(f"{error}; of mteb's list, {did_you_mean(near).strip()}") from error


def find_tasks(name: str) -> "list[tuple[AbsTask, bool]]":
    """The tasks of a name: of a benchmark, one of mteb, or those that a Python file defines; and whether they are the user's own.

    Raises:
        UserError: if there are none.
    """
    import mteb

    if Path(name).suffix == ".py":
        return [(task, True) for task in _read_tasks(Path(name))]
    for benchmark in mteb.get_benchmarks():
        if benchmark.name == name:
            return [(task, False) for task in benchmark.tasks]
    try:
        return [(mteb.get_task(name), False)]
    except KeyError as error:
        raise UserError(f"there is no task or benchmark {name!r} in mteb, nor is it a Python file: {error.args[0]}") from error


def _read_tasks(file: Path) -> "list[AbsTask]":
    from mteb.abstasks import AbsTask

    if not file.is_file():
        raise UserError(f"there is no file {file}: give a Python file that defines tasks")
    spec: Any = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{file} is not Python that can be run here ({error}): correct it, or install what it imports") from error
    defined = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    tasks = [value() for value in defined if issubclass(value, AbsTask) and hasattr(value, "metadata")]
    if not tasks:
        raise UserError(f"{file} defines no task: write a class that inherits from one of mteb.abstasks and has metadata")
    return tasks
