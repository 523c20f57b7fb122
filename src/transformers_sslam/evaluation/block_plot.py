"""A picture of a probe's results by block: which blocks hold what a task needs."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reports import new_figure, replace_picture
from .features import TITLES


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "accuracy_by_block.png"
COLUMNS = 3  # of panels
# Okabe and Ito's colours, which colour-blind readers tell apart; on paper without colours lines and markers differ too.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "trained": ("trained network", {"color": "#0072b2", "marker": "o"}),
    "untrained": ("untrained network", {"color": "#d55e00", "marker": "s", "linestyle": "--"}),
}
LEVELS: dict[str, tuple[str, dict[str, Any]]] = {
    "weighted_sum": ("weighted sum of all blocks", {"color": "#009e73", "linestyle": "-."}),
    "gated": ("gates over all blocks", {"color": "#cc79a7", "linestyle": (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5))}),
}
LOG_MEL: tuple[str, dict[str, Any]] = ("log-mel, no network", {"color": "0.25", "linestyle": ":"})


def replace_block_plot(results: dict[str, Any], folder: Path) -> bool:
    """Put `accuracy_by_block.png` in place of that of an earlier run, if a linear probe was run on several blocks, and return whether it is
    there."""
    draw = partial(plot_by_block, results) if _panels(results) else None
    return replace_picture(folder / PICTURE, "picture of the results by block", draw)


def plot_by_block(results: dict[str, Any]) -> "Figure":
    """Draw a panel for each pooling: means and 95 % intervals over folds of linear probes by block; and, as levels, what reads all blocks,
    and the log-mel.

    Args:
        results: what `evaluate_frozen` returned.

    Raises:
        ImportError: as [`new_figure`].
    """
    panels = _panels(results)
    columns, lines = min(COLUMNS, len(panels)), -(-len(panels) // COLUMNS)
    figure = new_figure(figsize=(max(6.0, 1 + 3.6 * columns), 1.1 + 3.3 * lines))
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for i, (axes, (pooling, rows)) in enumerate(zip(grid.flat, panels.items())):
        _draw(axes, rows, {name: row for row in results["probes"] for name in LEVELS if row["probe"] == f"{name}_{pooling}"})
        axes.set_title(TITLES[pooling], fontsize=10)  # type: ignore[index]
        axes.set_xlabel("block")
        if i % columns == 0:
            axes.set_ylabel(f"{results['metric'].replace('_', ' ')}, %, with 95 % interval")
    handles = {label: handle for axes in grid.flat[: len(panels)] for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _panels(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By pooling, the rows of linear probes, of which there are several."""
    by_pooling = {name: [row for row in results["probes"] if row["probe"] == f"linear_{name}"] for name in TITLES}
    return {name: rows for name, rows in by_pooling.items() if len(rows) > 1}


def _draw(axes: "Axes", rows: list[dict[str, Any]], combined: dict[str, dict[str, Any]]) -> None:
    blocks = [row["block"] for row in rows]
    for who, (label, style) in NETWORKS.items():
        if who not in rows[0]:
            continue
        mean, low, high = ([100 * row[who]["summary"][name] for row in rows] for name in ("mean", "low", "high"))
        axes.plot(blocks, mean, label=label, markersize=4, linewidth=1.8, **style)
        axes.fill_between(blocks, low, high, color=style["color"], alpha=0.15, linewidth=0)
    for name, row in combined.items():
        label, style = LEVELS[name]
        axes.axhline(100 * row["trained"]["summary"]["mean"], label=label, linewidth=1.6, **style)
    if "log_mel" in rows[0]:
        label, style = LOG_MEL
        axes.axhline(100 * rows[0]["log_mel"]["summary"]["mean"], label=label, linewidth=1.8, **style)
    axes.set_xticks(blocks if len(blocks) <= 12 else blocks[:: -(-len(blocks) // 12)])
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
