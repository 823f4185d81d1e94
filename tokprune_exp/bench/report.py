"""The tables of a model's speed, each readable at 100 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tokprune_exp.bench.shares import PARTS


def print_speed(record: Mapping[str, Any], console: Console) -> None:
    """Print every table of a record, and what has to be known to read them."""
    model, texts, machine = record["model"], record["texts"], record["hardware"]
    tokens = texts["tokens"]
    console.print(
        f"\n{model['method']} of {model['task']}, timed on {texts['examples']} texts of {texts['task']} "
        f"({tokens['shortest']} to {tokens['longest']} tokens, median {tokens['median']}); "
        f"{record['rows'][0]['rounds']} rounds after {record['warmup_rounds']} of warm-up; "
        f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} of {machine['cpu']}."
    )
    if not texts["is_own_task"]:
        console.print(
            f"The model was trained on {model['task']}: on texts of {texts['task']} its speed means something, its "
            f"answers nothing, so there is no accuracy check."
        )
    for size in unique(row["batch_size"] for row in record["rows"]):
        console.print(table_of_size([row for row in record["rows"] if row["batch_size"] == size]))
    console.print(table_of_best(record["best"]))
    if any(row["time_over_ours_dense"] for row in record["padding"]):
        console.print(table_of_padding(record["padding"], record["rows"]))
    console.print(table_of_shares(record["shares"]))
    if record["accuracy"]:
        console.print(table_of_accuracy(record["accuracy"]))
    for note in record["notes"]:
        console.print(f"· {note}")
    kernels = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record["kernels"].items())
    console.print(f"· Ours: {kernels}. Peers' logits differ from ours by at most: {differences(record)}.")
    console.print(f"· {record['note']}\n")


def differences(record: Mapping[str, Any]) -> str:
    """List how far the peers' logits are from ours."""
    found = record["largest_difference_of_logits"]
    return ", ".join(f"{key} {value:.1g}" for key, value in found.items()) or "no peer was run"


def unique(values: Any) -> list[Any]:
    """Return each value once, in the order in which they come."""
    return list(dict.fromkeys(values))


def new_table(title: str, first: str, *others: str) -> Table:
    """Begin a table: a column of words and columns of numbers."""
    table = Table(box=box.SIMPLE, title=title, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def spread(row: Mapping[str, Any], key: str) -> str:
    """Write a median with its quartiles behind it."""
    low, high = row[f"{key}_quartiles"]
    return f"{row[key]:.2f} ({low:.2f}–{high:.2f})"


def table_of_size(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out one batch size, a line per variant."""
    first = rows[0]
    table = new_table(
        f"Batch size {first['batch_size']} ({first['batches']} batches), ms per batch; in brackets quartiles of rounds",
        "variant",
        "ms",
        "texts/s",
        "tokens/s",
        "over dense (×)",
        "FLOPs ÷",
        "attained",
    )
    for row in rows:
        pruned = row["flops_reduction"] is not None
        table.add_row(
            row["label"],
            f"{row['ms']:.2f}" if row["ms"] < 10 else f"{row['ms']:.1f}",
            f"{row['texts_per_s']:.0f}",
            f"{row['tokens_per_s']:.0f}",
            spread(row, "speedup"),
            f"{row['flops_reduction']:.2f}" if pruned else "",
            f"{row['attained']:.0%}" if pruned else "",
        )
    return table


def table_of_best(best: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out every variant at its best batch size, and how far our pruned ones are ahead of the others."""
    pruned = [row for row in best if row["point"] is not None]
    table = new_table(
        "Each at its best batch size; behind the line: texts/s of ours, pruned, over its own",
        "variant",
        "batch",
        "texts/s",
        "tokens/s",
        "│",
        *(f"{row['precision']}\n{row['point'].replace('x', '×')}" for row in pruned),
    )
    for row in best:
        is_dense = row["point"] is None
        ratios = [f"{row['ratios'][ours['variant']]:.2f}" if is_dense else "" for ours in pruned]
        figures = [f"{row['batch_size']}", f"{row['texts_per_s']:.0f}", f"{row['tokens_per_s']:.0f}"]
        table.add_row(row["label"], *figures, "│", *ratios)
    return table


def table_of_padding(padding: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out what is computed besides real tokens, and what our dense model gains over transformers."""
    labels = {row["variant"]: row["label"].removeprefix("transformers").strip(", ") for row in rows}
    keys = list(padding[0]["time_over_ours_dense"])
    table = new_table(
        "Padding, apart from pruning: share of real tokens; our dense model's speed over transformers'",
        "batch size",
        "real, sorted",
        "real, unsorted",
        *(f"over {labels[key] or 'default'}" for key in keys),
    )
    for row in padding:
        ratios = [f"{row['time_over_ours_dense'][key]:.2f}" for key in keys]
        table.add_row(str(row["batch_size"]), f"{row['filled_sorted']:.0%}", f"{row['filled_unsorted']:.0%}", *ratios)
    return table


def table_of_shares(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out where the time of a pass at the model's own point goes."""
    has_parts = PARTS[0] in rows[0]
    table = new_table(
        "Share of a pass at the model's own point, in %; and scores alone, as a share of a layer",
        "batch size, attention",
        *(PARTS if has_parts else ()),
        "scores / layer",
    )
    for row in rows:
        parts = [percent(row, part) for part in PARTS if has_parts]
        table.add_row(f"{row['batch_size']}, {row['attention']}", *parts, percent(row, "scores_of_layer"))
    return table


def percent(row: Mapping[str, Any], key: str) -> str:
    """Write a share in percent with its quartiles behind it."""
    low, high = row[f"{key}_quartiles"]
    return f"{100 * row[key]:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def table_of_accuracy(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out what bf16 changes."""
    names = list(rows[0]["fp32"])
    table = new_table(
        "bf16 against fp32 on the timed texts",
        "model",
        *(f"{name} {precision}" for name in names for precision in ("fp32", "bf16")),
        "equal labels",
        "largest difference",
    )
    for row in rows:
        metrics = [f"{row[precision][name]:.4f}" for name in names for precision in ("fp32", "bf16")]
        equal = "" if row["equal_labels"] is None else f"{row['equal_labels']:.1%}"
        table.add_row(row["model"], *metrics, equal, f"{row['largest_difference']:.4f}")
    return table
