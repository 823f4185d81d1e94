"""How many tokens each layer has left, for texts that are answered rightly and wrongly."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from tokprune_exp.analysis.resampling import Bootstrap, interval, ratio


def length_rows(
    tokens_kept: Int[np.ndarray, "examples layers"],
    lengths: Int[np.ndarray, " examples"],
    groups: Mapping[str, Bool[np.ndarray, " examples"]],
    replicates: int,
) -> list[dict[str, Any]]:
    """Make a row per group and layer: mean tokens that leave it (layer 0: that enter the first), with interval.

    `share` is Σ tokens that leave / Σ tokens that entered, special tokens included; quartiles are over the examples.
    """
    rows = []
    through = np.concatenate([lengths[:, None], tokens_kept], axis=1).astype(float)
    for group, inside in groups.items():
        here = through[inside]
        means = Bootstrap(len(here), replicates).sums(here) / len(here)
        low, high = interval(means)
        share_low, share_high = interval(ratio(means, means[:, :1]))
        quartiles = np.percentile(here, [25, 50, 75], axis=0)
        for layer in range(here.shape[1]):
            rows.append(
                {
                    "group": group,
                    "examples": len(here),
                    "layer": layer,
                    "tokens": here[:, layer].mean(),
                    "tokens_low": low[layer],
                    "tokens_high": high[layer],
                    "quartile_1": quartiles[0, layer],
                    "median": quartiles[1, layer],
                    "quartile_3": quartiles[2, layer],
                    "share": here[:, layer].sum() / here[:, 0].sum(),
                    "share_low": share_low[layer],
                    "share_high": share_high[layer],
                }
            )
    return rows
