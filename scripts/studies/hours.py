"""Accuracy of frozen encoders by the hours of audio that they were pre-trained on, at the same number of updates.

python scripts/studies/hours.py --data_dir PATH/TO/esc --clips_of_a_class 32 --sources PATH/TO/free PATH/TO/us8k --hours 0.33 1 2.5

Recordings are drawn from all sources together, each one time, until they last so long; those of fewer hours are among those of more. Each
encoder is pre-trained in both stages and probed by scripts/studies/frozen_folds.py on clips that are in none of the sources. Finished steps
are found again.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import frozen_folds
import numpy as np
import soundfile
import transformers
from steps import pretrain_both_stages

from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.intervals import format_summary, summarize, summarize_difference
from transformers_sslam.files import write_json, write_text
from transformers_sslam.reports import markdown_table
from transformers_sslam.settings import parse_settings, setting, settings_dict


AUDIO = {".flac", ".ogg", ".wav"}  # whose length a header tells


@dataclass
class StudySettings:
    """Frozen encoders by hours of audio"""

    data_dir: str = setting("audio folder of labelled clips that are probed, with a column `fold`")
    sources: list[str] = setting("folders of recordings for pre-training, FLAC, Ogg Vorbis or WAV")
    hours: list[float] = setting("hours of them", [0.33, 1.0, 2.5])
    clips_of_a_class: int | None = setting("only classes of so many labelled clips; null: all", None)
    seed: int = setting("random seed of recordings and training", 0)
    output_dir: str = setting("folder for models and results", "runs/hours")
    stage1: str = setting("recipe of the first stage", "pretrain_tiny_stage1")
    stage2: str = setting("recipe of the second stage", "pretrain_tiny_stage2")
    pretraining: dict[str, Any] = setting("changes to both recipes, by name", {})
    pretraining_stage2: dict[str, Any] = setting("further changes to that of the second stage", {})

    def __post_init__(self):
        if short := [hours for hours in self.hours if not hours > 0]:
            raise UserError(f"hours has {short[0]:g}, but numbers above 0 are expected")


def read_lengths(sources: list[str]) -> list[tuple[Path, Path, int, float]]:
    """Of each recording its source, path in it, samples and seconds, ordered by path."""
    found = []
    for folder in map(Path, sources):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in AUDIO)
        if not files:
            raise UserError(f"{folder} has no recording that ends in {', '.join(sorted(AUDIO))}: give a folder of recordings")
        for file in files:
            try:
                about = soundfile.info(file)
            except soundfile.LibsndfileError as error:
                raise UserError(f"{file} cannot be read ({error}): remove or replace it") from error
            found.append((folder.resolve(), file.relative_to(folder), about.frames, about.duration))
    return found


def choose_recordings(settings: StudySettings, output: Path, hours: float) -> list[dict[str, Any]]:
    """Recordings that last `hours` or a little more, as a manifest for each source.

    Raises:
        UserError: if all of them together are shorter.
    """
    recordings = read_lengths(settings.sources)
    order = np.random.default_rng(settings.seed).permutation(len(recordings))
    ends = np.cumsum([recordings[i][-1] for i in order]) / 3600
    if ends[-1] < hours:
        raise UserError(f"hours has {hours:g}, but all recordings together last {ends[-1]:.2f} hours: give no more than that")
    chosen = sorted(order[: int(np.searchsorted(ends, hours)) + 1])
    lines: dict[Path, list[str]] = {}
    for i in chosen:
        root, name, samples, _ = recordings[i]
        lines.setdefault(root, [str(root)]).append(f"{name}\t{samples}")
    sources = []
    output.mkdir(parents=True, exist_ok=True)
    for number, (root, content) in enumerate(lines.items()):
        text = "\n".join(content) + "\n"
        # A name for each choice of recordings: a finished step is found by its settings, of which this is one.
        manifest = output / f"{number}-{root.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.tsv"
        write_text(manifest, text)
        sources.append({"kind": "manifest", "path": str(manifest)})
    return sources


def pretrain(settings: StudySettings, hours: float) -> Path:
    """Both stages. Returns the encoder's folder."""
    output = Path(settings.output_dir) / f"{hours:g}-hours-seed-{settings.seed}"
    fixed = {"data.sources": choose_recordings(settings, output, hours), "seed": settings.seed, **settings.pretraining}
    return pretrain_both_stages(settings.stage1, settings.stage2, output, fixed, settings.pretraining_stage2)


def run(settings: StudySettings) -> dict[str, Any]:
    """What `frozen_folds.run` finds, by hours."""
    found = {}
    for hours in settings.hours:
        probed = frozen_folds.StudySettings(
            settings.data_dir,
            clips_of_a_class=settings.clips_of_a_class,
            model=str(pretrain(settings, hours)),
            cache_dir=str(Path(settings.output_dir) / "features"),
        )
        found[f"{hours:g}"] = frozen_folds.run(probed)
    return {"settings": settings_dict(settings), "hours": found}


def table(results: dict[str, Any]) -> str:
    """Accuracy in % by fold and its mean, and paired gains over an untrained network and of the last block over the first."""
    folds = list(next(iter(results["hours"].values()))["clips"])
    rows = []
    for hours, found in results["hours"].items():

        def values(name: str, key: str = "accuracy", found: dict[str, Any] = found) -> list[float]:
            return [found["folds"][name][fold][key] for fold in folds]

        accuracy = values("trained")
        gain = summarize_difference(accuracy, values("untrained"))
        blocks = summarize_difference(values("trained", "last_block"), values("trained", "first_block"))
        shown = [format_summary(summary) for summary in (summarize(accuracy), gain, blocks)]
        rows.append([hours, *(f"{100 * value:.1f}" for value in accuracy), *shown])
    return markdown_table(["hours", *folds, "mean", "over an untrained network", "last block over the first"], rows)


def main() -> None:
    transformers.logging.disable_progress_bar()
    try:
        settings = parse_settings(StudySettings, sys.argv[1:], prog="hours.py", description=__doc__)
        results = run(settings)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_json(Path(settings.output_dir) / f"results-seed-{settings.seed}.json", results)
    print(table(results))


if __name__ == "__main__":
    main()
