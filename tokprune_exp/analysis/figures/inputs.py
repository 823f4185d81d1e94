"""The tables of one analysis, read when a figure asks for them."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from tokprune_exp.errors import UserError


class Tables:
    """What `python -m tokprune_exp.analyze` wrote into a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def about(self) -> dict[str, Any]:
        """about.json: the task, its labels, the model and its thresholds.

        Raises:
            UserError: there is no such file.
        """
        return json.loads(self.file("about.json").read_text("utf-8"))

    @property
    def labels(self) -> list[str]:
        """The names of the classes.

        Raises:
            UserError: the task has scores.
        """
        if not self.about["labels"]:
            raise UserError("the task has scores and no classes")
        return list(self.about["labels"])

    @cached_property
    def examples(self) -> pd.DataFrame:
        """examples.parquet without the texts.

        Raises:
            UserError: there is no such file.
        """
        columns = ["example", "label", "predicted", "correct", "tokens_kept", "length"]
        return pq.read_table(self.file("examples.parquet"), columns=columns).to_pandas()

    @cached_property
    def kept_per_layer(self) -> np.ndarray:
        """Tokens behind each layer, the input first: examples × (layers + 1)."""
        return np.column_stack([self.examples["length"], np.array(self.examples["tokens_kept"].to_list())])

    def tokens_of(self, example: int) -> pd.DataFrame:
        """The rows of tokens.parquet of one example, in order.

        Raises:
            UserError: there is no such file.
        """
        rows = pq.read_table(self.file("tokens.parquet"), filters=[("example", "==", example)]).to_pandas()
        return rows.sort_values("piece", ignore_index=True)

    def csv(self, name: str) -> pd.DataFrame:
        """A table of the analysis.

        Raises:
            UserError: there is no such file.
        """
        return pd.read_csv(self.file(name), keep_default_na=False, na_values=[""])  # null and nan are words too

    def file(self, name: str) -> Path:
        """The path of a file.

        Raises:
            UserError: it is not there.
        """
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"there is no {name}, which `python -m tokprune_exp.analyze MODEL_DIR` writes")
        return path


def answer(value: Any, labels: list[str]) -> str:
    """A label, or an answer, of the tables: its name, or the score."""
    return labels[int(value)] if labels else f"{value:.3f}"
