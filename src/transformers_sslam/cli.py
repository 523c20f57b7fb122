"""The command `sslam`: one table of jobs, each a settings class and a function.

`sslam` lists the commands, `sslam COMMAND --help` the settings of one. `python -m transformers_sslam` is the same, which
`accelerate launch -m transformers_sslam pretrain ...` needs.
"""

import importlib
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from .errors import AudioDecodingError, UserError
from .names import did_you_mean, similar


class Command(NamedTuple):
    """A job of the command line.

    Attributes:
        module: of this package, with the function `run(settings) -> None`, which does the job and prints its results.
        settings: name of the settings class in that module.
        help: what it does, in a few words.
        extra: the optional dependencies that it needs, if any.
    """

    module: str
    settings: str
    help: str
    extra: str = "train"


COMMANDS = {
    "tag": Command("recordings.tag", "TagSettings", "label recordings of any length, with a classifier or a detector", "audio"),
    "detect": Command("recordings.detect", "DetectSettings", "detect sound events in recordings: which sounds, from when to when", "audio"),
    "embed": Command("recordings.embed", "EmbedSettings", "embed recordings of any length with an encoder", "audio"),
    "app": Command("app.settings", "AppSettings", "open a page to listen with: log-mel, events and sound of a recording", "app"),
    "finetune": Command("finetuning.run", "FineTuningSettings", "train a classifier, or a detector of events"),
    "evaluate": Command("evaluation.classifier", "EvaluationSettings", "evaluate a classifier or a detector, with intervals"),
    "probe": Command("finetuning.linear_protocol", "LinearProtocolSettings", "evaluate the frozen features of an encoder"),
    "benchmark": Command("evaluation.adaptors.benchmark", "SuiteSettings", "evaluate an encoder by a public benchmark suite", "mteb"),
    "pretrain": Command("pretraining.loop", "PreTrainingSettings", "pre-train an encoder on unlabelled audio"),
    "prepare": Command("audio.shards", "ShardSettings", "write audio as shuffled Parquet shards, which are read fast"),
    "mix": Command("polyphony.benchmark", "BenchmarkSettings", "make a benchmark of overlapping sounds from single ones"),
    "convert": Command("publishing.conversion", "ConversionSettings", "convert an official SSLAM or EAT checkpoint", ""),
    "export": Command("publishing.onnx_export", "ExportSettings", "export a model to ONNX and compare it with PyTorch", "onnx"),
    "card": Command("publishing.cards", "CardSettings", "write the model card of a saved model", ""),
    "publish": Command("publishing.publish", "PublicationSettings", "push a saved model, or a page that runs it, to the Hub", ""),
}

OTHER_NAMES = {  # that are not similar enough to be found by spelling
    **{"train": ("finetune", "pretrain"), "test": ("evaluate",), "eval": ("evaluate",), "classify": ("tag",), "predict": ("tag", "detect")},
    **{"push": ("publish",), "upload": ("publish",), "demo": ("app",), "serve": ("app",), "encode": ("embed",), "mixtures": ("mix",)},
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: its name and flags; by default those of this process.

    Returns:
        The exit status: 0 if it succeeded, 1 if the job failed, 2 if the command or its settings are wrong, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(importlib.import_module(__package__).__version__)
        return 0
    name, *words = arguments
    try:
        return _run_command(name, words)
    except KeyboardInterrupt:  # jobs that can be resumed say so themselves; this is for the imports, which take seconds
        print(f"sslam {name}: stopped", file=sys.stderr)
        return 130


def _run_command(name: str, words: list[str]) -> int:
    if name not in COMMANDS:
        alike = did_you_mean(OTHER_NAMES.get(name) or similar(name, COMMANDS, 2))
        return _fail("sslam", f"there is no command {name}: {alike}choose one of {', '.join(COMMANDS)}", 2)
    command, prog = COMMANDS[name], f"sslam {name}"
    try:
        module = importlib.import_module(f".{command.module}", __package__)
        settings_module = importlib.import_module(".settings", __package__)
    except ModuleNotFoundError as error:
        package = f"'transformers-sslam[{command.extra}]'" if command.extra else "transformers-sslam"
        return _fail(prog, f"{error.name} is not installed, which {name} needs: pip install {package}", 2)
    words = ["--help" if word == "-h" else word for word in words]
    try:
        settings = settings_module.parse_settings(getattr(module, command.settings), words, prog=prog, description=command.help)
    except UserError as error:
        return _fail(prog, str(error), 2)
    except SystemExit as end:  # after --help or --print_config
        return int(end.code or 0)
    try:
        module.run(settings)
    except (UserError, AudioDecodingError, FloatingPointError, OSError) as error:
        return _fail(prog, str(error), 1)
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    recipes = textwrap.wrap(", ".join(sorted(file.stem for file in (Path(__file__).parent / "recipes").glob("*.yaml"))), 100)
    return "\n".join(
        [
            "usage: sslam COMMAND [--config RECIPE_OR_FILE] [--setting value ...]",
            *("", *lines, "", "sslam COMMAND --help lists the settings of a command. Recipes for --config, beside YAML files of your own:"),
            *(f"  {line}" for line in recipes),
        ]
    )


def _fail(prog: str, message: str, status: int) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return status
