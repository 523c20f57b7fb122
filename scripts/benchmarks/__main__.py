"""How fast it is on this machine, as medians of interleaved runs with the fastest and the slowest.

    python scripts/benchmarks step --baseline                    # an update of stage 2, beside the same written plainly
    python scripts/benchmarks step --baseline --device cuda --precision bfloat16 --plain-precision bfloat16 --batch-size 12
    python scripts/benchmarks encode --batch-sizes 1 8           # the encoder, against Transformers' AST
    python scripts/benchmarks features --device cuda             # log-mels, against torchaudio
    python scripts/benchmarks recording --minutes 60             # an hour of audio tagged, and the memory that takes
    python scripts/benchmarks data --source "{kind: folder, path: /data/fsd50k}"

Other work on the machine changes times by factors, and ratios little: quote ratios, and times of a quiet machine. `--json` keeps the
figures, with what they were measured on.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from data import measure_data
from datasets import disable_progress_bars
from encode import measure_encoder
from features import measure_features
from recording import measure_recording
from step import SIZES, StepSettings, measure_step, summary
from timing import Spread, machine

from transformers_sslam.audio.sources import SourceSettings
from transformers_sslam.files import write_json
from transformers_sslam.reports import markdown_table
from transformers_sslam.settings import load_yaml


def step(args: argparse.Namespace) -> tuple[Any, str]:
    """An update of pre-training."""
    settings = StepSettings(**{field.name: getattr(args, field.name) for field in fields(StepSettings)})
    results = measure_step(settings, args.baseline)
    header = [f"update of stage {args.stage}, {args.size}, {args.batch_size} clips", f"{args.precision}", "plain", "plain over fast"]
    return {"settings": asdict(settings), **results}, markdown_table(header, summary(results))


def encode(args: argparse.Namespace) -> tuple[Any, str]:
    """The encoder, against AST."""
    options = ("frames", "precision", "compile", "device", "repeats", "warmup")
    rows = measure_encoder(args.size, args.batch_sizes, **{name: getattr(args, name) for name in options})
    header = [f"{args.size}, {args.precision}: clips a second", "SSLAM", "AST", "SSLAM over AST"]
    return rows, markdown_table(
        header, [[f"batch of {r['batch_size']}", *map(str, r["clips_per_second"].values()), str(r["speedup"])] for r in rows]
    )


def features(args: argparse.Namespace) -> tuple[Any, str]:
    """Log-mels, against torchaudio."""
    rows = measure_features(args.clips, args.seconds, device=args.device, repeats=args.repeats, warmup=args.warmup)
    header = ["log-mel", "ms a clip", "times as fast as torchaudio"]
    return rows, markdown_table(header, [[row["way"], str(row["milliseconds"]), str(row["speedup"])] for row in rows])


def recording(args: argparse.Namespace) -> tuple[Any, str]:
    """A long recording, tagged."""
    results = measure_recording(
        args.size, args.minutes, hop=args.hop, batch_size=args.batch_size, precision=args.precision, device=args.device
    )
    return results, markdown_table(["a recording, tagged", ""], [[name, str(value)] for name, value in results.items()])


def data(args: argparse.Namespace) -> tuple[Any, str]:
    """The input path."""
    names = ("max_length", "batch_size", "batches", "recordings", "resume_after", "repeats")
    sources = [asdict(SourceSettings.of(source)) for source in args.source or []]
    rows = measure_data(sources, **{name: getattr(args, name) for name in names})
    cells = [[row["what"], "; ".join(f"{name} {value}" for name, value in row.items() if name != "what")] for row in rows]
    return rows, markdown_table(["input path, one core", "median (smallest - largest)"], cells)


def at_least(least: float, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not (value := kind(text)) >= least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least:g}")
        return value

    return number


positive = at_least(1)


def device(text: str) -> str:
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or torch was built without it
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return text


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(required=True, dest="what")
    precisions = ("float32", "bfloat16", "float16")

    def command(run, *, sized: bool = False, on_device: bool = True, repeated: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        sub.add_argument("--json", type=Path, help="also write the figures here")
        if repeated:
            sub.add_argument("--repeats", type=positive, default=5, help="runs that are timed")
        if repeated and on_device:
            sub.add_argument("--warmup", type=positive, default=2, help="runs before those")
        if on_device:
            sub.add_argument("--device", type=device, default="cpu")
        if sized:
            sub.add_argument("--size", choices=list(SIZES), default="base")
            sub.add_argument("--precision", choices=precisions, default="float32")
        return sub

    sub = command(step, sized=True)
    sub.set_defaults(warmup=StepSettings.warmup)
    sub.add_argument("--baseline", action="store_true", help="measure the plainly written update beside it")
    sub.add_argument("--plain-precision", choices=precisions, default="float32", help="of that one")
    sub.add_argument("--stage", type=int, choices=(1, 2), default=2)
    sub.add_argument("--batch-size", type=positive, default=2, help="clips")
    sub.add_argument("--views", type=positive, help="masks a clip; by default the stage's")
    sub.add_argument("--frames", type=positive, default=1024, help="of a clip, 10 ms each")
    sub.add_argument("--compile", action="store_true")
    sub = command(encode, sized=True)
    sub.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 4, 16])
    sub.add_argument("--frames", type=positive, default=1024, help="of a clip, 10 ms each")
    sub.add_argument("--compile", action="store_true")
    sub = command(features)
    sub.add_argument("--clips", type=positive, default=64)
    sub.add_argument("--seconds", type=at_least(0.025, float), default=10.0, help="of a clip")
    sub = command(recording, sized=True, repeated=False)
    sub.add_argument("--minutes", type=at_least(0.01, float), default=60.0)
    sub.add_argument("--hop", type=at_least(0.01, float), default=10.24, help="seconds from window to window")
    sub.add_argument("--batch-size", type=positive, default=8, help="windows")
    sub = command(data, on_device=False)
    sub.add_argument("--source", action="append", type=load_yaml, help="in YAML, as under data.sources of a recipe; default: made-up ones")
    sub.add_argument("--max-length", type=positive, default=1024, help="frames of the model's input")
    sub.add_argument("--batch-size", type=positive, default=12)
    sub.add_argument("--batches", type=positive, default=10, help="in each run")
    sub.add_argument("--recordings", type=positive, default=48, help="made-up ones of each format")
    sub.add_argument("--resume-after", type=at_least(0), nargs="*", default=[10, 10_000, 1_000_000], help="clips")
    return whole


def plain(values: Any) -> Any:
    """What JSON can hold."""
    if isinstance(values, Spread):
        return values.to_dict()
    if isinstance(values, dict):
        return {name: plain(value) for name, value in values.items()}
    return [plain(value) for value in values] if isinstance(values, list) else values


def main() -> None:
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    args = parser().parse_args()
    if args.run is data:
        torch.set_num_threads(1)  # as one of the worker processes
    on = machine(torch.device(getattr(args, "device", "cpu")))
    print(", ".join(f"{name} {value}" for name, value in on.items()), flush=True)
    try:
        results, table = args.run(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(table)
    if args.json:
        write_json(args.json, {"machine": on, "results": plain(results)})


if __name__ == "__main__":
    main()
