"""The short tables on the screen; the files hold everything."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokprune_exp.analysis.claims import Claim
from tokprune_exp.analysis.units import LAST_READ, MEAN

Rows = Sequence[Mapping[str, Any]]
WORDS_SHOWN = 12
SHOWN = ("all", "flag", "pos")
"""Kinds of classes that are printed; kinds of entities are in the file."""
NUMBERS = ("retention", "lift", "over random", "mean over random", "accuracy", "difference", "value")


def print_findings(tables: Mapping[str, Rows], claims: Sequence[Claim], title: str, console: Console) -> None:
    """Print metrics, retention, words, lengths, interferences, silhouettes and claims of one model."""
    console.rule(escape(title))
    for table in (
        score_table(tables["scores"]),
        retention_table(tables["retention"]),
        word_table(tables["frequent_words"]),
        length_table(tables["lengths"]),
        forced_table(tables["forced"]),
        claim_table(claims),
    ):
        if table.row_count:
            console.print(table)


def score_table(rows: Rows) -> Table:
    """Metrics before and after pruning."""
    table = table_of("Metrics, same texts and weights", ["model", "", "precision", "recall", "F1", "support", "value"])
    for row in rows:
        numbers = (number(row[name]) for name in ("precision", "recall", "f1"))
        table.add_row(row["model"], escape(row["class"]), *numbers, str(row["support"]), number(row["accuracy"]))
    return table


def retention_table(rows: Rows) -> Table:
    """What the last layer read, by class of words; the last column is of the mean over the layers."""
    table = table_of(
        "Words read by the last layer (95 % intervals over texts)",
        ["class", "words", "kept", "retention", "lift", "over random", "mean over random"],
    )
    in_the_mean = {
        (row["kind"], row["class"]): row
        for row in rows
        if (row["unit"], row["group"], row["layer"]) == ("word", "all", MEAN)
    }
    for row in rows:
        if (row["unit"], row["group"], row["layer"]) == ("word", "all", LAST_READ) and row["kind"] in SHOWN:
            retention, over_random = (with_interval(row, name) for name in ("retention", "over_random"))
            mean = with_interval(in_the_mean[row["kind"], row["class"]], "over_random")
            counts = str(row["total"]), f"{row['kept']:.0f}"
            table.add_row(row["class"], *counts, retention, f"{row['lift']:.2f}", over_random, mean)
    return table


def word_table(rows: Rows) -> Table:
    """The first words of each list."""
    table = table_of(
        f"Most frequent words read by the last layer, the first {WORDS_SHOWN}", ["texts", "stop words", ""]
    )
    lists: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        lists.setdefault((row["group"], row["stop_words"]), []).append(f"{row['word']} {row['kept']}")
    for (group, stop_words), words in lists.items():
        table.add_row(escape(group), stop_words, escape(", ".join(words[:WORDS_SHOWN])))
    return table


def length_table(rows: Rows) -> Table:
    """Tokens that leave each layer, for right and wrong answers."""
    groups = [group for group in dict.fromkeys(row["group"] for row in rows) if not group.startswith("class ")]
    layers = sorted({row["layer"] for row in rows})
    table = table_of(
        "Mean tokens behind each layer (0: the input), special ones included", ["texts", *map(str, layers)]
    )
    for group in groups:
        table.add_row(group, *(f"{row['tokens']:.1f}" for row in rows if row["group"] == group))
    return table


def forced_table(rows: Rows) -> Table:
    """Accuracy under each interference."""
    table = table_of("Domain terms forced to stay or to leave", ["what", "tokens", "accuracy", "difference", "from"])
    for row in rows:
        difference = "" if row["difference"] is None else with_interval(row, "difference", 3)
        accuracy = "" if row["accuracy"] is None else with_interval(row, "accuracy", 3)
        named = "" if row["named"] is None else str(row["named"])
        table.add_row(row["variant"], named, accuracy, difference, row["compared_with"] or "")
    return table


def claim_table(claims: Sequence[Claim]) -> Table:
    """The claims that are about all texts."""
    table = table_of("Claims", ["claim", "quantity", "at", "value", "against", "is"])
    for claim in claims:
        if claim.group == "all":
            interval = {"value": claim.value, "value_low": claim.low, "value_high": claim.high}
            side = claim.record()["is"]
            value = with_interval(interval, "value", 3)
            table.add_row(claim.claim, claim.quantity, claim.stage or "", value, f"{claim.against:g}", side)
    return table


def table_of(title: str, columns: Sequence[str]) -> Table:
    """Make an empty table."""
    table = Table(box=box.SIMPLE, title=title)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in NUMBERS)
    return table


def with_interval(row: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """Write a value and its interval."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return escape(f"{row[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")


def number(value: float | None) -> str:
    """Write a metric; nothing where there is none."""
    return "" if value is None else f"{value:.4f}"
