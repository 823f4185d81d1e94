"""Pictures of what was measured; without matplotlib there are none, and a line says so."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

MARKERS = "osD^vP*X"
NO_MATPLOTLIB = "No picture: matplotlib is not installed (pip install 'tokprune_exp[bench]')."


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Sequence[Any]]:
    """Make a figure with some axes side by side, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def can_draw(console: Console) -> bool:
    """Say whether matplotlib is there, and where it is not, say so on the screen."""
    if find_spec("matplotlib") is None:
        console.print(NO_MATPLOTLIB)
        return False
    return True


def draw_speed(path: Path, record: Mapping[str, Any], console: Console) -> list[Path]:
    """Draw measured speed-up over our dense model against the reduction of FLOPs; return the files written."""
    if not can_draw(console):
        return []
    figure, (axes,) = new_figure(7.0, 5.5)
    rows = [row for row in record["rows"] if row["point"] is not None]
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    for number, size in enumerate(sizes):
        for precision in precisions:
            chosen = [row for row in rows if (row["batch_size"], row["precision"]) == (size, precision)]
            chosen.sort(key=lambda row: row["flops_reduction"])
            medians = [row["speedup"] for row in chosen]
            bars = [[abs(row["speedup_quartiles"][end] - row["speedup"]) for row in chosen] for end in (0, 1)]
            axes.errorbar(
                [row["flops_reduction"] for row in chosen],
                medians,
                yerr=bars,
                marker=MARKERS[number % len(MARKERS)],
                color=f"C{number}",
                linestyle="-" if precision == "fp32" else "--",
                linewidth=1,
                markerfacecolor=f"C{number}" if precision == "fp32" else "none",
                capsize=2,
                label=f"batch {size}" + (f", {precision}" if len(precisions) > 1 else ""),
            )
    top = 1.05 * max([2.0, *(row["flops_reduction"] for row in rows), *(row["speedup"] for row in rows)])
    low = min([0.9, *(0.95 * row["speedup"] for row in rows)])
    axes.plot([1, top], [1, top], color="0.4", linewidth=1, linestyle=":", label="as fast as the FLOPs say")
    axes.axhline(1, color="0.8", linewidth=1, zorder=0)
    axes.set_xlim(0.95, top)
    axes.set_ylim(low, top)
    axes.set_xlabel("reduction of FLOPs, unpadded (×)")
    axes.set_ylabel("measured speed-up over our dense model (×)")
    threads = record["hardware"]["threads"]
    model, texts = record["model"], record["texts"]["task"]
    axes.set_title(
        f"{model['method']}, trained on {model['task']}, timed on texts of {texts}, "
        f"{threads} CPU thread{'s' if threads > 1 else ''}",
        fontsize=11,
    )
    axes.legend(loc="upper left", fontsize=9)  # above the diagonal there is room
    figure.savefig(path, dpi=150)
    return [path]


def draw_selection(path: Path, record: Mapping[str, Any], console: Console) -> list[Path]:
    """Draw the time of top-k relative to that of a threshold over the share that is kept; return the files written."""
    if not can_draw(console):
        return []
    figure, panels = new_figure(10.0, 4.5, columns=2)
    rows = record["rows"]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    for axes, base, title in (
        (panels[0], "over_compare", "over comparing alone (as in LTP)"),
        (panels[1], "over_threshold", "over comparing and finding the indices"),
    ):
        for number, length in enumerate(lengths):
            for way, line in (("top-k, sorted", "-"), ("top-k, unsorted", "--")):
                chosen = [row for row in rows if (row["length"], row["way"]) == (length, way)]
                axes.plot(
                    [100 * row["kept_share"] for row in chosen],
                    [row[base] for row in chosen],
                    color=f"C{number}",
                    linestyle=line,
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4,
                    label=f"{length} tokens, {way.removeprefix('top-k, ')}",
                )
        axes.axhline(1, color="0.6", linewidth=1, zorder=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens kept (%)")
        axes.set_title(title, fontsize=11)
    panels[0].set_ylabel("time of top-k / time of a threshold (×)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    threads = record["hardware"]["threads"]
    figure.suptitle(
        f"Choosing among the tokens of {record['batch']} texts, {threads} CPU thread{'s' if threads > 1 else ''}"
    )
    figure.savefig(path, dpi=150)
    return [path]
