"""Tables as files that other programs read."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV; of a pair of quartiles each becomes a column, `_1` and `_3`, and what is unknown is empty."""
    lines = [flat_row(row) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose values are single ones."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name}_1": value[0], f"{name}_3": value[1]} if name.endswith("_quartiles") else {name: value}
    return flat
