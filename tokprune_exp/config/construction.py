"""What a configuration may construct, and which arguments it may give."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import MISSING, DictConfig
from omegaconf.errors import OmegaConfBaseException

from tokprune_exp.config.nodes import nodes, plain
from tokprune_exp.errors import UserError
from tokprune_exp.targets import Constructor, constructor, hint, mismatch

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


def target_problems(cfg: DictConfig) -> Iterator[str]:
    """What is constructed where nothing may be, cannot be found, or is given arguments that it does not take."""
    for path, node in nodes(cfg):
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
        value = plain(node, name)
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
            yield f"{path}.{name}: {called.name} has no such argument; {hint(name, settable)}"
    absent = [name for name in expected if expected[name].required and name not in given]
    if absent and not is_partial:
        yield f"{path}: {called.name} needs {', '.join(absent)}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
