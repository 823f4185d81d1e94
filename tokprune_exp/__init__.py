"""Token pruning of Transformer encoders, done for real: a pruned token is gone, and the time and the FLOPs go with it.

The way of the data, in the order to read the code in:

    data/         text → token ids → `Batch`
    encoder/      layers → `PrunedEncoder`, which asks pruning/ which tokens go on and notes it in a `PruningTrace`;
                  `fast.py` with kernels/: the same for inference, by the fastest way of the machine
    pruning/      scorers: how important is each token; retainers: which tokens stay
    head.py       the pooled token → logits or score
    losses.py     each term of each objective, with the number of its equation
    methods/      what trains, in which stages: a page per method over the parts above
    measure/      metrics, FLOPs and latency of what was trained
    tracking/     names, loggers, result.json
    serving.py    the trained model in use
    sweep.py      many runs; curves/ draws them, bench/ times a model, analysis/ asks what was kept

`run.py` says the same sentence in code. `tokprune_exp.load(directory).predict(texts)` uses the model of a finished run.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `load` when it is asked for, so that the command line starts without torch."""
    if name == "load":
        from tokprune_exp.serving import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
