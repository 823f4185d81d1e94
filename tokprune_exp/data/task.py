"""A task: which columns are read, what the labels mean, which metric is reported, and where the files may come from."""

from dataclasses import dataclass, field


@dataclass
class HubSource:
    """A data set on the Hugging Face hub, pinned to a revision."""

    path: str
    name: str | None = None
    revision: str | None = None


@dataclass
class Task:
    """One text-classification or regression task; each file of `conf/task` fills one of these.

    `train` (from which the selection slice is cut) and `evaluation` (reported once, never used for selection) are names
    of the source's splits; the first that exists is used.
    """

    name: str = "???"
    text: list[str] = field(default_factory=lambda: ["sentence"])
    """One column, or two for a pair of sentences."""
    label: str | None = "label"
    """null: texts without labels, on which attention can be distilled and nothing be answered."""
    group: str | None = None
    """Column whose values never stand on both sides when a split is cut in two, for instance the film of a review."""
    labels: list[str] = field(default_factory=list)
    """Class names in the order of their index; empty for regression."""
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])
    """Names known to `measure/metrics.py`; the first is the one that is selected and summarised by."""
    train: list[str] = field(default_factory=lambda: ["train"])
    evaluation: list[str] = field(default_factory=lambda: ["validation"])
    max_tokens: int = 128
    """Longer texts are truncated (the longer of a pair first)."""
    published_length: int = 128
    """The fixed length that ToP and AD-TP pad their unpruned baseline to; only `reduction_padded` uses it."""
    source: str = "hub"
    """Where the task comes from unless `data.root` or `data.source` says otherwise: hub or wheel."""
    directory: str | None = None
    """Folder below `data.root` that holds the parquet files."""
    hub: HubSource | None = None

    @property
    def label_column(self) -> str:
        """The column of the labels; where there are none it is filled with 0."""
        return self.label or "unlabelled"

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score."""
        return not self.labels

    @property
    def outputs(self) -> int:
        """Numbers that the head puts out: one per class, or one score."""
        return len(self.labels) or 1
