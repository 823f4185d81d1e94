"""Do the states fall into classes? t-SNE of the first and of the retained tokens' states, unpruned and pruned."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tokprune_exp.analysis.figures.canvas import OF_CLASS, caption, printable, sheet
from tokprune_exp.analysis.figures.inputs import Tables
from tokprune_exp.errors import UserError

FEWEST = 10
"""Examples of which a map can be drawn."""
PASSES = ("unpruned", "pruned")
VECTORS = ("first", "mean")


def embed(states: np.ndarray) -> np.ndarray:
    """Place the states in the plane by t-SNE of their first 50 principal components; always the same way."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    number, dim = states.shape
    if dim > 50 and number > 50:
        states = PCA(50, random_state=0).fit_transform(states)
    return TSNE(init="pca", perplexity=min(30.0, (number - 1) / 3), random_state=0).fit_transform(states)


def silhouette(states: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette of the states themselves, not of their picture, by class; NaN where there is only one class."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(states, labels)) if 1 < len(np.unique(labels)) < len(labels) else float("nan")


def draw_states(axes: Any, points: np.ndarray, labels: np.ndarray, names: list[str]) -> None:
    """A dot per example at its place in the plane, coloured by its class."""
    for number, name in enumerate(names):
        chosen = labels == number
        colour = OF_CLASS[number % len(OF_CLASS)]
        marker = "o^sDv"[number // len(OF_CLASS) % 5]
        axes.scatter(*points[chosen].T, s=3, marker=marker, color=colour, linewidth=0, alpha=0.7, label=printable(name))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)


def states_figure(tables: Tables, file: Path) -> None:
    """A panel per pass and vector, with the silhouette in its title.

    Raises:
        UserError: there are no states, too few, no classes, or scikit-learn is not installed.
    """
    names = tables.labels
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("the package scikit-learn is not installed: pip install 'tokprune_exp[analysis]'")
    states = load_file(tables.file("states.safetensors"))
    panels = [(name, vector) for name in PASSES for vector in VECTORS if f"{name}_{vector}" in states]
    shown = {}
    for name, vector in panels:
        used = states[f"{name}_read"] > 0 if vector == "mean" else np.ones(len(states["label"]), bool)
        if used.sum() >= FEWEST:
            shown[name, vector] = states[f"{name}_{vector}"][used], states["label"][used]
    if not shown:
        raise UserError(f"fewer than {FEWEST} examples have states")
    rows = -(-len(shown) // 2)
    with sheet(file, 0.5 + 1.65 * rows) as figure:
        places = list(figure.subplots(rows, 2, squeeze=False).flat)
        for axes, ((name, vector), (vectors, labels)) in zip(places, shown.items(), strict=False):
            draw_states(axes, embed(vectors), labels, names)
            which = "first token" if vector == "first" else f"{'retained' if name == 'pruned' else 'all'} tokens"
            axes.set_title(f"{name}, {which}\nsilhouette {silhouette(vectors, labels):.2f}", fontsize=7)
        for axes in places[len(shown) :]:
            axes.set_axis_off()
        figure.legend(
            *places[0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=min(4, len(names)),
            frameon=False,
            markerscale=2.5,
        )
        caption(figure, f"t-SNE of {len(states['label']):,} examples; axes have no unit. Silhouette: of the states.")
