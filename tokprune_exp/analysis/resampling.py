"""Percentile bootstrap over examples: how much a figure would differ on other texts of the same kind."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

CONFIDENCE = 0.95
AT_ONCE = 64
"""Resamples that are summed in one product."""


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of `examples` examples, with replacement; always the same ones, so that differences are paired."""

    examples: int
    replicates: int
    seed: int = 0

    def sums(self, counts: Num[np.ndarray, "examples ..."]) -> Float[np.ndarray, "replicates ..."]:
        """Sum a count per example over the examples of each resample."""
        random = np.random.default_rng(self.seed)
        flat = counts.reshape(self.examples, -1).astype(float)
        sums = np.empty((self.replicates, flat.shape[1]))
        for start in range(0, self.replicates, AT_ONCE):
            some = range(start, min(start + AT_ONCE, self.replicates))
            drawn = [random.integers(self.examples, size=self.examples) for _ in some]
            times = np.stack([np.bincount(one, minlength=self.examples) for one in drawn])
            sums[some.start : some.stop] = times.astype(float) @ flat
        return sums.reshape(self.replicates, *counts.shape[1:])


def interval(
    replicates: Float[np.ndarray, "replicates ..."],
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Return the ends between which the middle 95 % of the replicates lie; NaN replicates (0/0) are left out."""
    tail = 100 * (1 - CONFIDENCE) / 2
    known = ~np.isnan(replicates).all(0)
    ends = np.full((2, *replicates.shape[1:]), np.nan)
    if known.any():
        ends[:, known] = np.nanpercentile(replicates[:, known], [tail, 100 - tail], axis=0)
    return np.asarray(ends[0]), np.asarray(ends[1])


def ratio(above: np.ndarray | np.generic, below: np.ndarray | np.generic) -> np.ndarray:
    """Divide, NaN where there is nothing to divide by."""
    above, below = np.broadcast_arrays(above, below)
    return np.asarray(np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0))
