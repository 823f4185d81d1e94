"""The record of a run as a Weights & Biases run shows it: summary, tables, and curves over the layers."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

from tokprune_exp.tracking.record import json_safe
from tokprune_exp.tracking.weights_and_biases import log_rows, log_table, wandb_runs

LAYER_COLUMNS = ("retention", "tokens", "thresholds", "kept_probability")
"""What `flops` may hold for every layer, as <name>_per_layer."""
SUMMARISED = ("status", "reason", "metrics", "flops", "saliency", "findings", "wall_seconds")
"""Fields of the record whose numbers go into the summary under their own path."""


def log_result(loggers: Iterable[Logger], result: Mapping[str, Any]) -> None:
    """Write a record into the W&B run: every number into its summary under `metrics/pruned/accuracy` and the like.

    The point that a frontier needs stands under `frontier/…`, see `frontier_point`, latency rows under
    `latency/batch_8/speedup`. Figures per layer become the table `layers` and curves `layer/retention` and the like
    against `layer/number`; the quartiles of the lengths become the table `by_length`.
    """
    safe = json_safe(result)
    by_size = {f"batch_{row['batch_size']}": row for row in safe["latency"]}
    parts = {key: safe.get(key) for key in SUMMARISED} | {"latency": by_size, "frontier": frontier_point(safe)}
    layers = layer_rows(safe["flops"])
    for run in wandb_runs(loggers):
        run.summary.update(dict(flat_numbers(parts)))
        if layers:
            log_table(run, "layers", list(layers[0]), [list(row.values()) for row in layers])
            renamed = ({f"layer/{'number' if key == 'layer' else key}": row[key] for key in row} for row in layers)
            log_rows(run, "layer/number", renamed)
        if safe["by_length"]:
            quartiles = quartile_rows(safe["by_length"])
            log_table(run, "by_length", list(quartiles[0]), [list(row.values()) for row in quartiles])


def frontier_point(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that runs of all methods are drawn by, of the pruned model, or of the dense one if nothing is pruned.

    <task>/<metric>: the task's first metric. flops_share: FLOPs per example over those of the unpruned encoder at the
    same unpadded lengths. retention: share of the tokens that leave a layer, mean. speedup: at the largest batch timed,
    over the same model unpruned, which is 1 where nothing is pruned. Empty until the run is measured.
    """
    metrics, flops = result["metrics"], result["flops"]
    scores = metrics.get("pruned") or metrics.get("dense")
    if not scores or not flops:
        return {}
    name, score = next(iter(scores.items()))
    point = {
        result["task"]: {name: score},
        "flops_share": 1 / flops["reduction_unpadded"],
        "gflops_per_example": flops["gflops_per_example"],
        "retention": flops["retention_mean"],
    }
    if "pruned" not in metrics:
        point["speedup"] = 1.0
    elif result["latency"]:
        point["speedup"] = max(result["latency"], key=lambda row: row["batch_size"])["speedup"]
    return point


def layer_rows(flops: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per layer, counted from 1, with every figure that there is for each layer; none before it was counted."""
    columns = {name: flops.get(f"{name}_per_layer") for name in LAYER_COLUMNS}
    given = {name: values for name, values in columns.items() if values is not None}
    return [
        {"layer": layer, **dict(zip(given, values, strict=True))}
        for layer, values in enumerate(zip(*given.values(), strict=True), start=1)
    ]


def quartile_rows(by_length: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The quartiles of all models as rows of one table: the model, then every figure in a column of its own."""
    return [{"model": model, **dict(flat_numbers(row))} for model, rows in by_length.items() for row in rows]


def flat_numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings under its path with slashes; lists are left out."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from flat_numbers(each, f"{prefix}/{key}" if prefix else key)
    elif not isinstance(value, list):
        yield prefix, value
