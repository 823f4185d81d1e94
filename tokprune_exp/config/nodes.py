"""Ways to read a composed configuration that may be wrong."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
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
            yield from nodes(node[key], f"{path}.{key}".strip("."))


def plain(node: DictConfig, key: str) -> Any:
    """The value in plain Python, `MISSING`, or the error that its interpolation ends in."""
    if OmegaConf.is_missing(node, key):
        return MISSING
    try:
        value = node[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        return error


@dataclass(frozen=True)
class Chosen:
    """What the table of impossible pairs asks about a configuration; a missing part is None."""

    cfg: DictConfig

    def __call__(self, key: str) -> Any:
        """The value at a dotted key."""
        try:
            return OmegaConf.select(self.cfg, key, default=None)
        except OmegaConfBaseException:  # told by `target_problems`
            return None

    def kind(self, part: str) -> str | None:
        """Name of the class that a part constructs."""
        target = self(f"{part}._target_")
        return str(target).rpartition(".")[2] if target else None

    def positive(self, key: str) -> bool:
        """Whether the value is a number above 0."""
        return isinstance(self(key), int | float) and self(key) > 0
