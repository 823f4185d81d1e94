"""The result as a table on the screen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

VARIANTS = {"dense": "dense teacher", "unpruned": "student unpruned", "pruned": "student pruned"}
"""The three evaluated models: their key in `metrics` and their name in the table."""


def summary_table(result: Mapping[str, Any]) -> Table:
    """The result side by side: the dense teacher, the student before and after pruning; a dash was not measured.

    A method that prunes nothing has one column. The teacher's GFLOPs stand there only if the record holds
    `flops.gflops_teacher`, since the teacher may be larger than the student.
    """
    prunes_nothing = set(result["metrics"]) == {"dense"}
    variants = {"dense": "dense"} if prunes_nothing else VARIANTS
    rows = {**_score_rows(result["metrics"]), **_cost_rows(result["flops"], prunes_nothing)}
    for timed in result["latency"]:
        rows[f"speed-up at batch {timed['batch_size']}"] = {"unpruned": 1.0, "pruned": timed["speedup"]}
    table = Table(box=box.SIMPLE, title=f"{result['method']} · {result['task']} · {result['backbone']}")
    table.add_column("")
    for title in variants.values():
        table.add_column(title, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(_number(values.get(variant)) for variant in variants))
    return table


def print_summary(result: Mapping[str, Any], directory: Path, console: Console | None = None) -> None:
    """Print the table and the path of everything that lies in the run's directory."""
    console = console or Console()
    console.print(summary_table(result))
    if result.get("commonest_answer") == 1:
        console.print(
            "All texts got the same answer: this model has not learned to tell them apart. More epochs, more training "
            "texts or a larger budget may help.",
            style="bold",
        )
    console.print("Written:")
    for path in sorted(directory.iterdir()):
        console.print(f"  {path}{'/' if path.is_dir() else ''}", soft_wrap=True, highlight=False)


def _score_rows(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Each metric's values by variant."""
    names = dict.fromkeys(name for scores in metrics.values() for name in scores)
    return {name: {variant: scores.get(name) for variant, scores in metrics.items()} for name in names}


def _cost_rows(flops: Mapping[str, Any], prunes_nothing: bool) -> dict[str, dict[str, float | None]]:
    """GFLOPs, reductions and retention by variant; nothing where FLOPs were not counted."""
    if not flops:
        return {}
    if prunes_nothing:
        return {
            "GFLOPs per example": {"dense": flops["gflops_dense"]},
            "GFLOPs padded": {"dense": flops["gflops_dense_padded"]},
        }
    asked = flops.get("share_asked")
    budget = {f"share (asked {asked:g})": {"pruned": flops["share_unpadded"]}} if asked is not None else {}
    dense, pad_inflation = flops["gflops_dense"], flops["gflops_dense_padded"] / flops["gflops_dense"]
    return {
        "GFLOPs per example": {
            "dense": flops.get("gflops_teacher"),
            "unpruned": dense,
            "pruned": flops["gflops_per_example"],
        },
        "reduction unpadded": {"unpruned": 1.0, "pruned": flops["reduction_unpadded"]},
        "reduction padded": {"unpruned": pad_inflation, "pruned": flops["reduction_padded"]},
        "retention": {"unpruned": 1.0, "pruned": flops["retention_mean"]},
        **budget,
    }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
