"""The configuration of a run: its schema, where its files lie, what is wrong with it, and the folder it names.

Nothing heavy is imported here, so that a mistake in the configuration is answered at once.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokprune_exp.data.task import Task
from tokprune_exp.encoder.backbone import Backbone
from tokprune_exp.errors import ConfigError, UserError
from tokprune_exp.targets import Constructor, constructor, mismatch, nearest

TARGETS = {
    "method": "tokprune_exp.methods.",
    "method.attribution": "tokprune_exp.attribution.",
    "scorer": "tokprune_exp.pruning.scorers.",
    "retainer": "tokprune_exp.pruning.retainers.",
    "loss": "tokprune_exp.losses.",
    "optimizer": "torch.optim.",
    "trainer": "lightning.pytorch.Trainer",
}
"""Where a `_target_` may stand and what it may construct there; a stranger's configuration can do nothing else."""

SUPPLIED = {
    "method": (
        "model",
        "metrics",
        "optimizer",
        "teacher",
        "teacher_is_trained",
        "initialises_student",
        "budget",
        "text",
    ),
    "scorer": ("dim",),
    "retainer": ("dim", "layers"),
    "optimizer": ("params",),
    "trainer": (
        "max_epochs",
        "max_steps",
        "min_epochs",
        "min_steps",
        "logger",
        "callbacks",
        "default_root_dir",
        "reload_dataloaders_every_n_epochs",
        "num_sanity_val_steps",
        "enable_model_summary",
        "limit_val_batches",
        "fast_dev_run",
    ),
}
"""Arguments that the run itself gives; a value for one of them in the configuration would be lost."""

INSTANTIATE_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")
ADDED_GROUPS = ("method", "experiment", "sweep", "hparams_search", "text")
"""Groups that are not in the defaults list: they are chosen by +group=name."""

SOURCES = ("directory", "hub", "wheel")


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


def config_directory() -> Path:
    """Directory of the configuration files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    candidates = (package / "conf", package.parent / "conf")
    return next(directory for directory in candidates if (directory / "config.yaml").is_file())


def sweep_directory() -> Path:
    """Directory that holds the group `sweep`; it lies beside the configuration files."""
    return config_directory().parent / "multirun_sweeps"


def choices(group: str) -> list[str]:
    """Names of the files of one configuration group."""
    places = (config_directory() / group, sweep_directory() / group)
    return sorted(file.stem for place in places for file in place.glob("*.yaml"))


def load_task(name: str) -> Task:
    """Read conf/task/<name>.yaml.

    Raises:
        UserError: there is no such file.
    """
    file = config_directory() / "task" / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"the model is of task {name}, but there is no {file}; there are {', '.join(choices('task'))}")
    task = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Task), OmegaConf.load(file)))
    assert isinstance(task, Task)
    return task


class SweepDirectory(SearchPathPlugin):
    """Lets Hydra find `+sweep=NAME`, from any working directory."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the directory of the sweeps."""
        search_path.append("tokprune_exp", f"file://{sweep_directory()}")


ConfigStore.instance().store(name="run_schema", node=RunConfig)
ConfigStore.instance().store(name="backbone_schema", node=BACKBONE_FROM_ENVIRONMENT)
Plugins.instance().register(SweepDirectory)


def config_hash(cfg: DictConfig) -> str:
    """Eight hexadecimal digits that differ whenever a value differs that can change the result."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    for key in ("run_dir", "shared_dir", "overwrite", "logger", "tags"):
        values.pop(key, None)
    values["data"].pop("cache", None)
    for node, key in ((values, "start_from"), (values.get("teacher") or {}, "path")):
        weights = Path(node.get(key) or "") / "model.safetensors"  # a model is its weights, not its place
        if node.get(key) and weights.is_file():
            node[key] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def teacher_hash(cfg: DictConfig) -> str:
    """Digits that differ whenever a value differs that can change the dense model which is trained first."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    parts = {key: values[key] for key in ("seed", "task", "teacher", "optimizer", "data", "trainer", "epochs")}
    parts["data"].pop("cache", None)
    parts["warmup_fraction"] = values["method"].get("warmup_fraction")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def run_directory(cfg: DictConfig, root: Path) -> Path:
    """`run_dir`, or a folder below `root` that the same command always finds again, to go on where it was stopped."""
    if cfg.run_dir is not None:
        return Path(cfg.run_dir)
    method = cfg.method._target_.split(".")[-2]
    return root / f"{method}-{cfg.task.name}-{cfg.backbone.name}-seed{cfg.seed}-{config_hash(cfg)}"


def overrides() -> list[str]:
    """Return what was chosen on the command line; nothing when the configuration was composed in Python."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def instantiate(node: DictConfig) -> Any:
    """Construct what a node describes.

    Raises:
        UserError: the constructor refused a value; its own sentence, without Hydra's around it.
    """
    try:
        return hydra_instantiate(node)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise UserError(str(error.__cause__)) from error
        raise


def check_config(cfg: DictConfig) -> None:
    """Find everything that is wrong with a composed configuration without importing what it constructs.

    Raises:
        ConfigError: One line for each unknown key, missing value, argument that a constructor does not take, value of a
            wrong type and pair of choices that makes no sense. Bounds of values are checked by the constructors.
    """
    problems = [
        *_unknown_keys(cfg),
        *_missing_values(cfg),
        *_target_problems(cfg),
        *_out_of_bounds(cfg),
        *_impossible_pairs(cfg),
    ]
    if problems:
        raise ConfigError(problems)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Say that the dotted `key` ends in none of the `known` names."""
    parent, _, name = key.rpartition(".")
    return f"{key}: {parent or 'the configuration'} has no key {name}; {_hint(name, known)}"


def method_needed() -> str:
    """Say how a method is chosen."""
    return f"choose one: {' | '.join(f'+method={name}' for name in choices('method'))}"


def _hint(name: str, known: Iterable[str]) -> str:
    known = [other for other in known if not other.startswith("_")]
    guess = nearest(name, known)
    return f"did you mean {guess}?" if guess else f"it has {', '.join(sorted(known)) or 'none'}"


def _unknown_keys(cfg: DictConfig) -> Iterator[str]:
    """Keys that `+key=value` has added beyond the schema; Hydra takes a misspelt +group=name for one."""
    for path, node in _nodes(cfg):
        schema = OmegaConf.get_type(node)
        if not is_dataclass(schema):
            continue
        known = [entry.name for entry in fields(schema)]
        for key in sorted(set(map(str, node)) - set(known)):
            guess = None if path else _misspelt_group(key)
            if guess:
                yield f"{key}: there is no such group; did you mean +{guess}={node[key]}?"
            else:
                yield unknown_key(f"{path}.{key}".strip("."), known)


def _misspelt_group(key: Any) -> str | None:
    """The group that a key of the configuration's top level, which the schema does not have, was meant for."""
    return None if key in (entry.name for entry in fields(RunConfig)) else nearest(str(key), ADDED_GROUPS)


def _missing_values(cfg: DictConfig) -> Iterator[str]:
    for path, node in _nodes(cfg):
        for key in node:
            if OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, str(key)):
                name = f"{path}.{key!s}".strip(".")
                if name == "method" and any(_misspelt_group(other) == "method" for other in cfg):
                    continue  # told by `_unknown_keys`
                yield f"no method is chosen; {method_needed()}" if name == "method" else f"{name}: a value is needed"


def _target_problems(cfg: DictConfig) -> Iterator[str]:
    for path, node in _nodes(cfg):
        if "_target_" not in node:
            continue
        target, allowed = str(node._target_), TARGETS.get(path)
        if allowed is None:
            yield f"{path}._target_: nothing is constructed here; targets stand in {', '.join(TARGETS)}"
            continue
        if not target.startswith(allowed):
            yield f"{path}._target_: {target} is not allowed; here a target starts with {allowed}"
            continue
        try:
            yield from _argument_problems(path, node, constructor(target))
        except LookupError as error:
            yield f"{path}._target_: {target} cannot be found: {error}"


def _argument_problems(path: str, node: DictConfig, called: Constructor) -> Iterator[str]:
    is_partial = node.get("_partial_", False)  # the run then supplies what is required
    expected = {parameter.name: parameter for parameter in called.parameters}
    given = [str(key) for key in node if key not in INSTANTIATE_KEYS]
    for name in given:
        value = _plain(node, name)
        if isinstance(value, OmegaConfBaseException):
            yield f"{path}.{name}: {str(value).splitlines()[0]}"
        elif name in SUPPLIED.get(path, ()):
            yield f"{path}.{name}: the run sets this itself" + (
                "; epochs are set by epochs, teacher.epochs and method.epochs" if "epochs" in name else ""
            )
        elif name in expected:
            words = mismatch(value, expected[name].annotation)
            if words and value != MISSING:
                yield f"{path}.{name}={_shown(value)}: must be {_either(words)}"
        elif not called.open_ended:
            settable = [other for other in expected if not (is_partial and expected[other].required)]
            yield f"{path}.{name}: {called.name} has no such argument; {_hint(name, settable)}"
    absent = [name for name in expected if expected[name].required and name not in given]
    if absent and not is_partial:
        yield f"{path}: {called.name} needs {', '.join(absent)}"


AT_LEAST_ONE = (
    "epochs",
    "teacher.epochs",
    "data.batch_size",
    "data.evaluation_batch_size",
    "data.selection_examples",
    "data.max_train_examples",
    "data.max_evaluation_examples",
    "task.max_tokens",
    "task.published_length",
    "backbone.layers",
    "measure.latency_examples",
    "measure.latency_rounds",
    "measure.fvcore_examples",
    "measure.attribution_examples",
    "measure.latency_batch_sizes",
)
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true")


def _out_of_bounds(cfg: DictConfig) -> Iterator[str]:
    """Numbers that would fail only after hours of training; those of constructors are checked when these are built."""
    chosen = _Choices(cfg)
    for key in AT_LEAST_ONE:
        value = chosen(key)
        numbers = list(value) if isinstance(value, ListConfig) else [value]
        if any(isinstance(number, int) and number < 1 for number in numbers):
            yield f"{key}={value}: must be at least 1"
    quantile = chosen("data.train_shorter_than")
    if isinstance(quantile, int | float) and not 0 < quantile < 1:
        yield f"data.train_shorter_than={quantile}: must be a quantile above 0 and below 1 (0.5: the median)"
    if chosen("trainer.precision") not in (None, *PRECISIONS):
        yield f"trainer.precision={chosen('trainer.precision')}: choose from {', '.join(PRECISIONS)}"
    devices, strategy = chosen("trainer.devices"), chosen("trainer.strategy")
    if devices is not None and (not isinstance(devices, int) or isinstance(devices, bool) or devices < 1):
        yield f"trainer.devices={devices}: must be the number of devices, 1 or more"
    if strategy not in (None, "auto", "ddp"):
        yield f"trainer.strategy={strategy}: several devices train by ddp, which needs no strategy to be named"


def _nodes(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every dictionary of the configuration, once, at the place where it is written and not where it is referred to."""
    if isinstance(node, DictConfig):
        yield path, node
        keys: list[Any] = list(node)
    else:
        keys = list(range(len(node)))
    for key in keys:
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if isinstance(node[key], DictConfig | ListConfig):
            yield from _nodes(node[key], f"{path}.{key}".strip("."))


def _plain(node: DictConfig, key: str) -> Any:
    """The value in plain Python, `MISSING`, or the error that its interpolation ends in."""
    if OmegaConf.is_missing(node, key):
        return MISSING
    try:
        value = node[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        return error


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


@dataclass(frozen=True)
class _Choices:
    """What the table of impossible pairs asks about a configuration; a missing part is None."""

    cfg: DictConfig

    def __call__(self, key: str) -> Any:
        """The value at a dotted key."""
        try:
            return OmegaConf.select(self.cfg, key, default=None)
        except OmegaConfBaseException:  # told by `_target_problems`
            return None

    def kind(self, part: str) -> str | None:
        """Name of the class that a part constructs."""
        target = self(f"{part}._target_")
        return str(target).rpartition(".")[2] if target else None

    def positive(self, key: str) -> bool:
        """Whether the value is a number above 0."""
        return isinstance(self(key), int | float) and self(key) > 0


PRUNES_A_DENSE_MODEL = (
    ("LTP", "ltp"),
    ("STTABT", "sttabt"),
    ("ManualThreshold", "manual_threshold"),
    ("ManualTopK", "manual_topk"),
)
IMPOSSIBLE_PAIRS: list[tuple[Callable[[_Choices], bool], str]] = [
    *(
        (
            lambda of, part=part: of.kind("method") == "Finetune" and of(part) is not None,
            f"finetune takes no {part}: it trains the unpruned encoder",
        )
        for part in ("scorer", "retainer", "loss", "teacher")
    ),
    (
        lambda of: of.kind("method") == "Finetune" and of("budget") is not None,
        "finetune takes no budget: it prunes nothing",
    ),
    (
        lambda of: of.kind("method") == "ADTP" and of("compile") is True,
        "adtp cannot be compiled: its loss needs second derivatives, which torch.compile does not give",
    ),
    (
        lambda of: (
            of("trainer.precision") == "16-mixed"
            and of("trainer.accelerator") != "cpu"  # where it becomes bf16-mixed, whose gradients are not scaled
            and of.positive("trainer.gradient_clip_val")
            and of("optimizer.fused") is True
        ),
        "in 16-mixed gradients are scaled, and a fused optimizer unscales them too late to be clipped: "
        "set optimizer.fused=false, or trainer.precision=bf16-mixed",
    ),
    (
        lambda of: isinstance(of("budget"), int | float) and not 0 < of("budget") < 1,
        "budget is a share of the unpruned FLOPs: a number above 0 and below 1",
    ),
    *(
        (
            lambda of, method=method, retainer=retainer: (
                of.kind("method") == method and of("retainer") is not None and of.kind("retainer") not in retainer
            ),
            f"{name} prunes with retainer={' or '.join(files)}",
        )
        for method, name, retainer, files in (
            (
                "ADTP",
                "adtp",
                ("AdaptiveRatio", "Nucleus", "MinP", "StaticRatio", "RandomRatio"),
                ("adaptive", "nucleus", "min_p", "static", "random"),
            ),
            ("LTP", "ltp", ("LearnedThreshold",), ("learned_threshold",)),
            ("ManualThreshold", "manual_threshold", ("ManualThreshold",), ("manual_threshold",)),
            ("ManualTopK", "manual_topk", ("TopKSchedule",), ("topk",)),
            ("STTABT", "sttabt", ("Backtracking", "Concrete"), ("backtracking", "concrete")),
        )
    ),
    *(
        (
            lambda of, method=method, loss=loss: (
                of.kind("method") == method and of("loss") is not None and of.kind("loss") != loss
            ),
            f"{name} has a loss of its own: loss={name}",
        )
        for method, name, loss in (
            ("ADTP", "adtp", "ADTPLoss"),
            ("LTP", "ltp", "LTPLoss"),
            ("STTABT", "sttabt", "STTABTLoss"),
        )
    ),
    *(
        (
            lambda of, method=method, part=part: of.kind("method") == method and of(part) is None,
            f"{name} needs a {part}",
        )
        for method, name, parts in (
            ("ADTP", "adtp", ("scorer", "retainer", "loss")),
            ("LTP", "ltp", ("scorer", "retainer", "loss")),
            ("STTABT", "sttabt", ("scorer", "retainer", "loss")),
            ("ManualThreshold", "manual_threshold", ("scorer", "retainer")),
            ("ManualTopK", "manual_topk", ("scorer", "retainer")),
        )
        for part in parts
    ),
    *(
        (
            lambda of, method=method: of.kind("method") == method and of("loss") is not None,
            f"{name} takes no loss: it has the task's only",
        )
        for method, name in (("ManualThreshold", "manual_threshold"), ("ManualTopK", "manual_topk"))
    ),
    (
        lambda of: (
            of.kind("scorer") not in ("ApproxAttention", "ExactAttention")
            if of.kind("method") == "STTABT" and of.kind("retainer") in ("Backtracking", "Concrete")
            else of.kind("method") != "STTABT" and of.kind("scorer") in ("ApproxAttention", "ExactAttention")
        ),
        "scorer=approx_attention and exact_attention go with retainer=backtracking and concrete, and with no other",
    ),
    (
        lambda of: of("method.ratio_target") not in (None, "mass") and of.kind("retainer") != "AdaptiveRatio",
        "only an adaptive retainer learns its ratio: set retainer=adaptive or method.ratio_target=mass",
    ),
    (
        lambda of: (
            of("method.ratio_target") == "gumbel"
            and not (of.positive("loss.budget_weight") and of.positive("loss.gamma"))
        ),
        "with method.ratio_target=gumbel nothing holds the ratio: set loss.budget_weight and loss.gamma above 0",
    ),
    (
        lambda of: of("method.ratio_target") == "gumbel" and of("retainer.gate_temperature") is not None,
        "method.ratio_target=gumbel has its own gate: set retainer.gate_temperature=null",
    ),
    (
        lambda of: (
            of.kind("loss") == "ADTPLoss"
            and of.positive("loss.budget_weight")
            and of.kind("retainer") != "AdaptiveRatio"
        ),
        "loss.budget_weight holds the ratio of an adaptive retainer: set it to 0, or retainer=adaptive",
    ),
    (
        lambda of: of("retainer.summary") == "cls" and of("retainer.layer") == 0,
        "retainer.summary=cls is the same for every text at layer 0: set retainer.summary=mean, or retainer.layer",
    ),
    (
        lambda of: of.kind("method") == "ADTP" and of("teacher") is None and of.positive("loss.alpha"),
        "without a teacher there is nothing to distil: set loss.alpha=0, or choose a teacher",
    ),
    (
        lambda of: of.kind("method") == "ADTP" and of("teacher") is None and of("loss.kappa_max") not in (None, 1),
        "without a teacher there are no attributions of it to mix in: set loss.kappa_max=1, or choose a teacher",
    ),
    (
        lambda of: (
            bool(of("teacher.initialises_student"))
            and any(of(f"teacher.backbone.{key}") != of(f"backbone.{key}") for key in ("name", "random"))
        ),
        "the student cannot start from a teacher with another backbone: set teacher.initialises_student=false",
    ),
    (
        lambda of: of.kind("scorer") == "ExactAttention" and of("budget") is not None,
        "scorer=exact_attention costs a whole unpruned pass, so no budget can be met: choose scorer=approx_attention",
    ),
    (
        lambda of: bool(of("method.trains_approx")) and of.kind("retainer") != "Concrete",
        "method.trains_approx=true needs masks that carry a gradient: choose retainer=concrete",
    ),
    (
        lambda of: bool(of("method.trains_approx")) and of.kind("scorer") == "ExactAttention",
        "method.trains_approx=true trains an ApproxNet, and scorer=exact_attention has none: choose approx_attention",
    ),
    (
        lambda of: (
            bool(of("method.regularises_hard")) and (of.kind("retainer") != "Concrete" or of("budget") is not None)
        ),
        "method.regularises_hard=true moves θ under a hard plan: it needs retainer=concrete, and no budget",
    ),
    (
        lambda of: of("retainer.k_base") not in (None, "valid") and of("budget") is not None,
        "a budget is met by k as a share of the real tokens: set retainer.k_base=valid, or no budget",
    ),
    *(
        (
            lambda of, method=method: of.kind("method") == method and of.kind("scorer") == "TokenSaliency",
            f"{name} trains no token saliency: choose scorer=attention_mass or random",
        )
        for method, name in (("ManualThreshold", "manual_threshold"), ("ManualTopK", "manual_topk"))
    ),
    *(
        (
            lambda of, method=method: (
                of.kind("method") == method
                and of("teacher") is not None
                and not of("teacher.initialises_student")
                and of("start_from") is None
            ),
            f"{name} learns nothing from a teacher but its weights: choose teacher=same, or name start_from",
        )
        for method, name in PRUNES_A_DENSE_MODEL
    ),
    *(
        (
            lambda of, method=method: (
                of.kind("method") == method
                and of("teacher") is None
                and of("start_from") is None
                and (method == "STTABT" or of("method.epochs") == 0)
            ),
            f"{name} needs a model that was trained on the task: choose teacher=same, or name start_from",
        )
        for method, name in PRUNES_A_DENSE_MODEL
    ),
    (
        lambda of: of("text") is not None and of.kind("scorer") != "ApproxAttention",
        "text is what an ApproxNet is distilled on: choose +method=sttabt scorer=approx_attention, or no text",
    ),
    (
        lambda of: of("start_from") is not None and bool(of("teacher.initialises_student")),
        "a model starts from its teacher or from start_from: set teacher.initialises_student=false",
    ),
    (
        lambda of: of("data.source") not in (None, *SOURCES),
        f"data.source is one of {', '.join(SOURCES)}, or null",
    ),
    (
        lambda of: of("data.source") == "directory" and of("data.root") is None,
        "data.source=directory needs the directory: set data.root=DIR or the environment variable TOKPRUNE_DATA",
    ),
    (
        lambda of: of("data.source") == "directory" and of("task.directory") is None,
        "data.source=directory: this task has no directory; see task.directory",
    ),
    (
        lambda of: of("data.source") == "hub" and of("task.hub") is None,
        "data.source=hub: this task is not on the hub; see task.hub",
    ),
    (
        lambda of: not any(of(f"backbone.{key}") for key in ("path", "hub", "wheel", "weights_root")),
        "the backbone names no place to read from: set backbone.path, hub, wheel or weights_root",
    ),
]
"""Pairs of choices that make no sense, and the sentence that says what to do instead."""


def _impossible_pairs(cfg: DictConfig) -> Iterator[str]:
    chosen = _Choices(cfg)
    return (sentence for is_impossible, sentence in IMPOSSIBLE_PAIRS if is_impossible(chosen))
