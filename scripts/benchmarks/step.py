"""One update of pre-training: its parts, its memory, its operations against what the device's matrix products reach, and the gain over
the same update written plainly."""

import math
import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from plain import PlainForPreTraining
from timing import MatrixProducts, Spread, interleave, ratio, spread, timed

from transformers_sslam.allocator import keep_freed_memory
from transformers_sslam.attention_sslam import CPU_HALF_PRECISION_ATTENTION
from transformers_sslam.configuration_sslam import PRETRAINING_STAGES, SSLAMConfig
from transformers_sslam.masking import inverse_block_masks
from transformers_sslam.modeling_sslam_pretraining import SSLAMForPreTraining
from transformers_sslam.pretraining.model import compile_model
from transformers_sslam.pretraining.monitoring import matmul_peak, peak_memory, training_flops_per_clip


Precision = Literal["float32", "bfloat16", "float16"]
SIZES: dict[str, Callable[..., SSLAMConfig]] = {
    "base": SSLAMConfig.base,
    "large": SSLAMConfig.large,
    "tiny": lambda **fields: SSLAMConfig(
        **{
            **{"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 512, "max_length": 1024},
            **{"decoder_hidden_size": 128, "decoder_num_hidden_layers": 2, "decoder_num_groups": 8},
            **fields,
        }
    ),
}
LOSSES = ("loss", "local_loss", "global_loss", "source_retention_loss")


@dataclass(frozen=True)
class StepSettings:
    """What is measured.

    Args:
        size: "tiny", "base" or "large".
        stage: 1 (EAT) or 2 (SSLAM).
        batch_size: clips of an update.
        frames: of a clip, 10 ms each.
        views: masks a clip; `None`: the stage's.
        precision: of autocast; weights are float32.
        plain_precision: that of the plain update beside it.
        compile: whether the model is compiled.
        device: "cpu", "cuda" ...
        repeats, warmup: updates that are timed, and those before them. Of ViT-B on a CPU the first fetches 700,000 pages and, where the
            optimiser's new states have scattered its memory, the next ones 200,000 and 5,000 more, each cleared by the kernel; then none.
    """

    size: str = "base"
    stage: Literal[1, 2] = 2
    batch_size: int = 2
    frames: int = 1024
    views: int | None = None
    precision: Precision = "float32"
    plain_precision: Precision = "float32"
    compile: bool = False
    device: str = "cpu"
    repeats: int = 5
    warmup: int = 4

    def config(self) -> SSLAMConfig:
        fields = dict(PRETRAINING_STAGES[self.stage])
        if self.views is not None:
            fields["num_views"] = self.views
        return SIZES[self.size](**fields)


class Update:
    """One update as the pre-training loop does it, in parts.

    The random numbers of an update follow from its number alone, so that two of these see the same masks, mixtures and noise.
    """

    PARTS = ("forward", "backward", "clipping and optimiser", "teacher's moving average")

    def __init__(self, settings: StepSettings, plain: bool = False):
        self.settings, self.device = settings, torch.device(settings.device)
        self.precision = settings.plain_precision if plain else settings.precision
        config = settings.config()
        if self.device.type == "cpu" and self.precision != "float32":
            config._attn_implementation = CPU_HALF_PRECISION_ATTENTION  # as the pre-training loop asks for it
        torch.manual_seed(0)
        model = SSLAMForPreTraining(config)
        if plain:
            weights, config._attn_implementation = model.state_dict(), "eager"
            model = PlainForPreTraining(config)
            model.load_state_dict(weights)
        self.model = model.to(self.device).train()  # type: ignore[arg-type]  # as Transformers wraps it
        self.compiled = settings.compile and not plain
        if self.compiled:
            compile_model(self.model, fullgraph=True)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, **({} if plain else {"fused": True}))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        torch.manual_seed(1)
        self.input_values = torch.randn(settings.batch_size, settings.frames, config.num_mel_bins).to(self.device)
        self.number = 0
        self.output: Any = None

    def forward(self) -> None:
        torch.manual_seed(self.number)
        autocast = self.precision != "float32"
        with torch.autocast(self.device.type, dtype=getattr(torch, self.precision), enabled=autocast):
            self.output = self.model(self.input_values)

    def backward(self) -> None:
        self.scaler.scale(self.output.loss).backward()

    def step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 4.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def move_teacher(self) -> None:
        self.number += 1
        self.model.update_teacher(self.number)

    def parts(self) -> dict[str, Callable[[], None]]:
        return dict(zip(self.PARTS, (self.forward, self.backward, self.step, self.move_teacher)))

    def __call__(self) -> None:
        for part in self.parts().values():
            part()

    def losses(self) -> dict[str, float]:
        """Of the last update."""
        values = {name: self.output.get(name) for name in LOSSES}
        return {name: value.item() for name, value in values.items() if value is not None}


def measure_step(settings: StepSettings, baseline: bool = False, memory: bool = True) -> dict[str, Any]:
    """All figures of an update, and of the plain one beside it if `baseline`.

    Returns:
        `seconds` of the whole update, of each part and of the mask drawing, `clips_per_second`, `flops` of an update, `flops_per_second`
        and `utilisation` against `peak_flops_per_second` (square matrix products on this device, before the rest), `floor_seconds` (the
        update's own matrix products) and `share_of_floor` (of the update, round by round), `peak_memory` (bytes), and with `baseline` the
        same of it under `plain`, `speedup` pair by pair and the largest relative `difference` of a loss.
    """
    keep_freed_memory()
    device = torch.device(settings.device)
    peaks = {name: matmul_peak(device, getattr(torch, name), seconds=1.0) for name in (settings.precision, settings.plain_precision)}
    updates = {"fast": Update(settings)}
    if baseline:
        updates["plain"] = Update(settings, plain=True)
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    difference = 0.0
    for turn in range(-settings.warmup, settings.repeats):
        for name, update in updates.items():
            elapsed = timed(update, device)
            if turn >= 0:
                seconds[name].append(elapsed)
        if baseline:
            difference = max(difference, _difference(updates["fast"].losses(), updates["plain"].losses()))
    flops = settings.batch_size * training_flops_per_clip(settings.config(), settings.frames)
    results = _figures(updates["fast"], spread(seconds["fast"]), flops, peaks)
    if memory:
        results["peak_memory"] = peak_memory_of_step(settings)
    if baseline:
        results["plain"] = _figures(updates["plain"], spread(seconds["plain"]), flops, peaks)
        if memory:
            results["plain"]["peak_memory"] = peak_memory_of_step(settings, plain=True)
        results["speedup"] = ratio(seconds["plain"], seconds["fast"])
        results["difference"] = difference
    return results


def _figures(update: Update, whole: Spread, flops: float, peaks: Mapping[Precision, float]) -> dict[str, Any]:
    settings, device, peak = update.settings, update.device, peaks[update.precision]
    # Compiled code does not show its products; they are those of the same update before it is compiled.
    shown = Update(replace(settings, compile=False)) if update.compiled else update
    parts, floors, wholes = [], [], []
    for _ in range(min(3, settings.repeats)):  # in turns, for a machine's speed drifts
        parts.append({name: timed(part, device) for name, part in update.parts().items()})
        with MatrixProducts(device) as products:
            observed = timed(shown, device)
        floors.append(products.seconds)
        # Of one update if possible, so that both are of the same moment; not where it is compiled, or where waiting for each product costs.
        wholes.append(observed if device.type == "cpu" and not update.compiled else sum(parts[-1].values()))
    config = update.model.config
    time, views = settings.frames // config.patch_size, settings.batch_size * config.num_views
    draw = {"masks": lambda: inverse_block_masks(views, time, config.num_frequency_patches, device=device)}
    masks = interleave(draw, repeats=20, warmup=2, device=device)["masks"]
    return {
        "seconds": {
            "update": whole,
            **{name: spread([part[name] for part in parts]) for name in Update.PARTS},
            f"drawing {views} masks": spread(masks),
        },
        "clips_per_second": whole.inverse(settings.batch_size),
        "flops": flops,
        "flops_per_second": whole.inverse(flops),
        "peak_flops_per_second": peak,
        "utilisation": whole.inverse(flops / peak),
        "floor_seconds": spread(floors),
        "share_of_floor": ratio(floors, wholes),
    }


def _difference(losses: dict[str, float], others: dict[str, float]) -> float:
    return max(abs(losses[name] - others[name]) / max(abs(others[name]), 1e-12) for name in losses)


def peak_memory_of_step(settings: StepSettings, plain: bool = False) -> int:
    """The most memory that two updates hold, in bytes: of a GPU; otherwise of a process of their own."""
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.accelerator.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _two_updates(settings, plain)
        return peak_memory(device) - before
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_memory_in_process, (settings, plain, torch.get_num_threads()))


def _memory_in_process(settings: StepSettings, plain: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    keep_freed_memory()
    _two_updates(settings, plain)
    return peak_memory(torch.device("cpu"))


def _two_updates(settings: StepSettings, plain: bool) -> None:
    update = Update(settings, plain)  # the first one also makes the optimiser's states
    update()
    update()


def summary(results: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: what, the fast update, the plain one, plain over fast."""
    plain = results.get("plain", {})

    def cells(what: str, fast: Any, other: Any, better: str = "") -> list[str]:
        return [what, str(fast), "" if other is None else str(other), better]

    rows = []
    for name, fast in results["seconds"].items():
        other = plain.get("seconds", {}).get(name)
        gain = str(results["speedup"]) if name == "update" and plain else "" if other is None else f"{other.median / fast.median:.3g}"
        rows.append(cells(f"{name}, ms", fast.scaled(1e3), other and other.scaled(1e3), gain))
    for name, title, factor in (
        ("clips_per_second", "clips a second", 1),
        ("flops_per_second", "model TFLOP/s", 1e-12),
        ("utilisation", "of square products' peak, %", 100),
        ("share_of_floor", "own matrix products, share of the update, %", 100),
    ):
        other = plain.get(name)
        rows.append(cells(title, results[name].scaled(factor), other and other.scaled(factor)))
    if "peak_memory" in results:
        other = plain.get("peak_memory", math.nan)
        rows.append(
            cells(
                "peak memory, GiB",
                f"{results['peak_memory'] / 2**30:.2f}",
                f"{other / 2**30:.2f}" if plain else None,
                f"{other / results['peak_memory']:.3g}" if plain else "",
            )
        )
    if "difference" in results:
        rows.append(["largest difference of a loss, relative", f"{results['difference']:.1e}", "", ""])
    return rows
