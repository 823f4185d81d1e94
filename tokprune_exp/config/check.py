"""What is wrong with a composed configuration: everything at once, before anything heavy is imported."""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from tokprune_exp.config.construction import target_problems
from tokprune_exp.config.files import choices
from tokprune_exp.config.nodes import Chosen, nodes
from tokprune_exp.config.pairs import impossible_pairs
from tokprune_exp.config.schema import RunConfig
from tokprune_exp.errors import ConfigError
from tokprune_exp.targets import hint, nearest

ADDED_GROUPS = ("method", "experiment", "sweep", "hparams_search", "text")
"""Groups that are not in the defaults list: they are chosen by +group=name."""


def check_config(cfg: DictConfig) -> None:
    """Find everything that is wrong with a composed configuration without importing what it constructs.

    Raises:
        ConfigError: One line for each unknown key, missing value, argument that a constructor does not take, value of a
            wrong type and pair of choices that makes no sense. Bounds of values are checked by the constructors.
    """
    problems = [
        *_unknown_keys(cfg),
        *_missing_values(cfg),
        *target_problems(cfg),
        *_out_of_bounds(cfg),
        *impossible_pairs(cfg),
    ]
    if problems:
        raise ConfigError(problems)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Say that the dotted `key` ends in none of the `known` names."""
    parent, _, name = key.rpartition(".")
    return f"{key}: {parent or 'the configuration'} has no key {name}; {hint(name, known)}"


def method_needed() -> str:
    """Say how a method is chosen."""
    return f"choose one: {' | '.join(f'+method={name}' for name in choices('method'))}"


def _unknown_keys(cfg: DictConfig) -> Iterator[str]:
    """Keys that `+key=value` has added beyond the schema; Hydra takes a misspelt +group=name for one."""
    for path, node in nodes(cfg):
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
    for path, node in nodes(cfg):
        for key in node:
            if OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, str(key)):
                name = f"{path}.{key!s}".strip(".")
                if name == "method" and any(_misspelt_group(other) == "method" for other in cfg):
                    continue  # told by `_unknown_keys`
                yield f"no method is chosen; {method_needed()}" if name == "method" else f"{name}: a value is needed"


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
    chosen = Chosen(cfg)
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
