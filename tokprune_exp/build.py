"""From a checked configuration to the objects of a run: backbone, classifier, method."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tokprune_exp.config import instantiate, teacher_hash
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.task import Task
from tokprune_exp.encoder.backbone import Backbone
from tokprune_exp.encoder.pretrained import LoadedBackbone, load_backbone, load_tokenizer
from tokprune_exp.errors import UserError
from tokprune_exp.head import Head
from tokprune_exp.measure.metrics import METRICS
from tokprune_exp.methods.finetune import Finetune
from tokprune_exp.methods.module import PruningModule
from tokprune_exp.model import ModelCard, PrunedClassifier, load_model
from tokprune_exp.pruning.pruning import Pruning


@contextmanager
def bounds_are_user_errors() -> Iterator[None]:
    """Turn a constructor's complaint about a value of the configuration into an error for the user."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def as_task(node: DictConfig) -> Task:
    """Read a task node into its dataclass."""
    task = OmegaConf.to_object(node)
    assert isinstance(task, Task)
    return task


def as_backbone(node: Any) -> Backbone:
    """Read a backbone node, the student's or the teacher's, into its dataclass."""
    backbone = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Backbone), node))
    assert isinstance(backbone, Backbone)
    return backbone


def plain(node: DictConfig) -> dict[str, Any]:
    """Resolve a node into plain Python values."""
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def method_name(cfg: DictConfig) -> str:
    """Return the name of the method's page, e.g. adtp."""
    return str(cfg.method._target_).split(".")[-2]


def build_data(cfg: DictConfig, tokenizer: Any, task: DictConfig) -> TaskData:
    """Load and tokenise the examples of a task."""
    return TaskData(as_task(task), SimpleNamespace(**plain(cfg.data), tokenizer=tokenizer, seed=cfg.seed))


def build_model(cfg: DictConfig, backbone: LoadedBackbone, task: Task, with_pruning: bool = True) -> PrunedClassifier:
    """Put encoder, pruning and head together; a checkpoint's pooler is used where it has one."""
    shape = backbone.encoder.shape
    head = Head(shape.dim, task.outputs, shape.dropout)
    if backbone.pooler is not None:
        head.pooler.load_state_dict(backbone.pooler)
    pruning = None
    if with_pruning and cfg.scorer is not None and cfg.retainer is not None:
        pruning = Pruning(instantiate(cfg.scorer)(shape.dim), instantiate(cfg.retainer)(shape.dim, shape.layers))
    model = PrunedClassifier(backbone.encoder, head, pruning, backbone.tokenizer.sep_token_id)
    if with_pruning and cfg.start_from is not None:  # the model of the run, not its teacher
        trained, card = load_model(Path(cfg.start_from))
        if card.task != task.name:
            raise UserError(f"start_from={cfg.start_from} was trained on {card.task}, not on {task.name}")
        if load_tokenizer(cfg.start_from).get_vocab() != backbone.tokenizer.get_vocab():
            raise UserError(f"start_from={cfg.start_from} reads other tokens than {cfg.backbone.name}")
        model.start_from(trained, "start_from")
    return model


def build_method(cfg: DictConfig, model: PrunedClassifier, data: TaskData) -> PruningModule:
    """Build the method, with its teacher where it has one.

    Raises:
        UserError: a metric is unknown; the teacher was trained on another task, reads other tokens than the student, or
            is another backbone than the student that is to start from it.
    """
    unknown = sorted(set(data.task.metrics) - set(METRICS))
    if unknown or not data.task.metrics:
        raise UserError(f"task.metrics={data.task.metrics}: choose from {', '.join(METRICS)}")
    optimizer = instantiate(cfg.optimizer)
    build = partial(instantiate(cfg.method), model=model, metrics=data.task.metrics, optimizer=optimizer)
    if cfg.budget is not None:
        build = partial(build, budget=cfg.budget)
    if cfg.text is not None:
        build = partial(build, text=build_data(cfg, data.tokenizer, cfg.text))
    if cfg.teacher is None:
        return build()
    if cfg.teacher.path is not None:
        teacher_model, card = load_model(Path(cfg.teacher.path))
        tokenizer = load_tokenizer(cfg.teacher.path)
        if card.task != data.task.name:
            raise UserError(f"teacher.path={cfg.teacher.path} was trained on {card.task}, not on {data.task.name}")
        if cfg.teacher.initialises_student and card.backbone != cfg.backbone.name:
            raise UserError(
                f"teacher.path={cfg.teacher.path} holds {card.backbone}, from which {cfg.backbone.name} cannot start: "
                f"set teacher.initialises_student=false, or backbone={card.backbone}"
            )
    else:
        backbone = load_backbone(as_backbone(cfg.teacher.backbone), cfg.data.cache)
        teacher_model = build_model(cfg, backbone, data.task, with_pruning=False)
        tokenizer = backbone.tokenizer
    if tokenizer.get_vocab() != data.tokenizer.get_vocab():
        raise UserError(f"{cfg.backbone.name} and its teacher must read the same tokens, but have other vocabularies")
    if cfg.teacher.lr is not None:
        optimizer = partial(optimizer, lr=cfg.teacher.lr)
    return build(
        teacher=Finetune(teacher_model, data.task.metrics, optimizer, cfg.teacher.epochs, cfg.method.warmup_fraction),
        teacher_is_trained=cfg.teacher.path is not None,
        initialises_student=cfg.teacher.initialises_student,
    )


def shared_teacher(cfg: DictConfig, teacher: PruningModule) -> Callable[[TaskData, Any], tuple[Path, PrunedClassifier]]:
    """Name the file in which runs that train the same dense model first keep it for one another."""
    file = Path(cfg.shared_dir) / "teachers" / f"{teacher_hash(cfg)}.safetensors"
    return lambda data, trainer: (file, teacher.model)


def model_card(cfg: DictConfig, of_teacher: bool = False) -> ModelCard:
    """Say what whoever loads the model, or the teacher that was trained for it, needs to know of its task."""
    task = as_task(cfg.task)
    return ModelCard(
        task=task.name,
        backbone=cfg.teacher.backbone.name if of_teacher else cfg.backbone.name,
        labels=task.labels,
        max_tokens=task.max_tokens,
        pair=len(task.text) == 2,
        published_length=task.published_length,
        method="finetune" if of_teacher else method_name(cfg),
        metrics=task.metrics,
    )
