"""How far mixtures of log-mels are from those of waveforms, and what more sources and the mixture-invariant baseline cost.

python scripts/studies/mixtures.py --data_dir PATH/TO/esc

Distances: pairs of clips, the second at the level that gives the signal-to-noise ratio asked for, mixed in each way of `mixing_domain`;
errors of the elementwise maximum and of the sum of mel energies, against the log-mel of the sum of the waveforms, in dB, over all cells of
time and frequency in which neither clip is digital silence. Costs: updates of a small model under each setting in turns; medians over
rounds of each one's processor time over that of the published setting in the same round. Beside them floating-point operations.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from transformers_sslam import PRETRAINING_STAGES, SSLAMConfig, SSLAMForPreTraining
from transformers_sslam.audio import AUDIO_SUFFIXES, load_waveform
from transformers_sslam.audio.paths import files_below
from transformers_sslam.errors import UserError
from transformers_sslam.fbank import log_mel
from transformers_sslam.files import write_json
from transformers_sslam.mixing import ENERGY_FLOOR, DrawnSources, LogMelScale, gather_sources
from transformers_sslam.pretraining.monitoring import training_flops_per_clip
from transformers_sslam.reports import markdown_table
from transformers_sslam.settings import parse_settings, setting


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from timing import Spread, ratio


RATE = 16_000  # Hz
Domain = Literal["log_mel", "mel", "waveform"]
APPROXIMATIONS: dict[Domain, str] = {"log_mel": "maximum", "mel": "sum of energies"}
BASELINE = {"objective": "mixture_invariant"}
GAINS = {"gain_db": [-10, 10]}
PUBLISHED = "published: 2 sources, maximum"
VARIANTS: dict[str, dict[str, Any]] = {
    PUBLISHED: {},
    "2 sources, energies": {"mixing_domain": "mel"},
    "2 sources, waveforms": {"mixing_domain": "waveform"},
    "3 sources": {"num_sources": 3},
    "4 sources": {"num_sources": 4},
    "3 sources, gains": {"num_sources": 3, **GAINS},
    "4 sources, gains": {"num_sources": 4, **GAINS},
    "mixture-invariant, 4 latent sources": BASELINE,
    "mixture-invariant, 8 latent sources": {**BASELINE, "num_latent_sources": 8},
    "mixture-invariant, 4 latent sources, 4 sources": {**BASELINE, "num_sources": 4},
}
# The network and the batch of the recipe pretrain_tiny_stage2.
SMALL: dict[str, Any] = {
    **{"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 512, "max_length": 1024},
    **{"decoder_hidden_size": 128, "decoder_num_hidden_layers": 4, "decoder_num_groups": 8, "unmixed_span_length": 112},
}
SMALL_FRAMES = 512


@dataclass
class StudySettings:
    data_dir: str | None = setting("folder of recordings to measure distances on; null: none", None)
    output_file: str = setting("file for all figures", "runs/mixtures.json")
    clips: int = setting("pairs of clips, drawn from the folder", 300)
    seconds: float = setting("of a clip, from its start", 5.0)
    snr_db: list[float] = setting("levels of the first clip over the second, in dB", [0.0, 5.0, 10.0, 20.0, 30.0])
    rounds: int = setting("updates of each setting that are timed; 0: none", 20)
    batch_size: int = setting("clips of an update", 4)
    seed: int = setting("random seed for clips and pairs", 0)


def pairs(settings: StudySettings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two clips of as many samples, neither silent, one after the other through the recordings in random order.

    Raises:
        UserError: if there are too few.
    """
    root, samples = Path(settings.data_dir or "."), round(settings.seconds * RATE)
    names = sorted(files_below(root, AUDIO_SUFFIXES))
    order = np.random.default_rng(settings.seed).permutation(len(names))
    found, last = 0, None
    for number in order:
        waveform = torch.from_numpy(load_waveform(root / names[number], RATE)[:samples])
        if len(waveform) < samples or waveform.square().mean() < 1e-10:
            continue
        if last is not None:
            yield last, waveform
            found += 1
        if found == settings.clips:
            return
        last = waveform
    raise UserError(f"{root} has {found} pairs of clips of {settings.seconds:g} s that sound, fewer than {settings.clips}: lower clips")


def errors_db(first: torch.Tensor, second: torch.Tensor, snr_db: float) -> dict[Domain, torch.Tensor]:
    """Errors of each approximation in dB, where neither clip nor their mixture is silence."""
    first, second = first - first.mean(), second - second.mean()
    gain = 10 * math.log10(first.square().mean().item() / second.square().mean().item()) - snr_db
    scale = LogMelScale(mean=0.0, std=0.5, sampling_rate=RATE)  # log-mels as they are
    waveforms = torch.stack((first, second))
    log_mels = log_mel(waveforms, RATE)
    drawn = DrawnSources(torch.tensor([[1, 0]]), torch.tensor([[gain, -gain]]))
    exact = gather_sources(log_mels, drawn, torch.ones(log_mels.shape[:2]), waveforms, "waveform", scale)
    reference = exact.mix()[0]
    sounds = torch.stack((reference, *exact.log_mels[:, 0])).amin(0) > math.log(ENERGY_FLOOR) + 1e-3
    return {domain: ((replace(exact, domain=domain).mix()[0] - reference) * 10 / math.log(10))[sounds] for domain in APPROXIMATIONS}


def distances(settings: StudySettings) -> dict[str, dict[Domain, dict[str, float]]]:
    """By signal-to-noise ratio and approximation: median and root mean square of the errors in dB, and the fraction beyond 3 dB."""
    errors: dict[str, dict[Domain, list[torch.Tensor]]] = {f"{snr:g}": {name: [] for name in APPROXIMATIONS} for snr in settings.snr_db}
    for first, second in pairs(settings):
        for snr in settings.snr_db:
            for name, values in errors_db(first, second, snr).items():
                errors[f"{snr:g}"][name].append(values.half())

    def summarise(parts: list[torch.Tensor]) -> dict[str, float]:
        values = torch.cat(parts).float().numpy()
        return {
            "median": float(np.median(values)),
            "rms": float(np.sqrt(np.mean(values.astype(np.float64) ** 2))),
            "beyond_3_db": float(np.mean(np.abs(values) > 3)),
        }

    return {snr: {name: summarise(parts) for name, parts in by_name.items()} for snr, by_name in errors.items()}


def update_of(variant: dict[str, Any], batch_size: int) -> Callable[[], None]:
    """Forward, backward, optimiser and teacher of a small model, each time with other masks."""
    torch.manual_seed(0)
    model = SSLAMForPreTraining(SSLAMConfig(**SMALL, **PRETRAINING_STAGES[2], **variant)).train()
    optimizer = torch.optim.AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), lr=1e-5, fused=True)
    batch: dict[str, torch.Tensor] = {"input_values": 0.2 * torch.randn(batch_size, SMALL_FRAMES, 128)}
    if variant.get("mixing_domain") == "waveform":
        waveforms = torch.randn(batch_size, (SMALL_FRAMES - 1) * 160 + 400)
        batch |= {"waveforms": waveforms, "attention_mask": torch.ones(batch_size, SMALL_FRAMES)}

    def update() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 4.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(1)

    return update


def operations(variant: dict[str, Any], base: bool) -> float:
    """Floating-point operations of a clip, over those of the published setting."""
    sizes, frames = ({}, 1024) if base else (SMALL, SMALL_FRAMES)
    counts = [training_flops_per_clip(SSLAMConfig(**sizes, **PRETRAINING_STAGES[2], **fields), frames) for fields in (variant, {})]
    return counts[0] / counts[1]


def costs(settings: StudySettings) -> dict[str, Spread]:
    """Processor time of each setting's update over the published one's."""
    updates = {name: update_of(variant, settings.batch_size) for name, variant in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for number in range(-2, settings.rounds):  # the first two are not counted
        for name, update in updates.items():
            start = time.process_time()  # other programs do not count
            update()
            if number >= 0:
                seconds[name].append(time.process_time() - start)
    return {name: ratio(times, seconds[PUBLISHED]) for name, times in seconds.items()}


def report(measured: dict[str, dict[Domain, dict[str, float]]], spreads: dict[str, Spread]) -> str:
    tables = []
    if measured:
        names = [f"{title}: {what}" for title in APPROXIMATIONS.values() for what in ("median, dB", "RMS, dB", "beyond 3 dB, %")]
        rows = []
        for snr, by_name in measured.items():
            values = (by_name[name] for name in APPROXIMATIONS)
            cells = [text for v in values for text in (f"{v['median']:.2f}", f"{v['rms']:.2f}", f"{100 * v['beyond_3_db']:.1f}")]
            rows.append([snr, *cells])
        tables.append(markdown_table(["SNR, dB", *names], rows))
    if spreads:
        rows = []
        for name, spread in spreads.items():
            counted = (f"{operations(VARIANTS[name], base):.2f}" for base in (False, True))
            rows.append([name, "1" if name == PUBLISHED else str(spread), *counted])
        header = [
            "setting",
            "processor time of an update, median (smallest - largest)",
            "operations, small model",
            "operations, base model",
        ]
        tables.append(markdown_table(header, rows))
    return "\n\n".join(tables)


def main() -> None:
    try:
        settings = parse_settings(StudySettings, sys.argv[1:], prog="mixtures.py", description=__doc__)
        measured = distances(settings) if settings.data_dir else {}
        spreads = costs(settings) if settings.rounds else {}
    except UserError as error:
        sys.exit(f"error: {error}")
    figures = {"distances": measured, "costs": {name: spread.to_dict() for name, spread in spreads.items()}}
    write_json(Path(settings.output_file), figures)
    print(report(measured, spreads))


if __name__ == "__main__":
    main()
