"""Colours, markers and words that the PNG and the page share."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokprune_exp.curves.axes import SPEEDUP, metric_unit
from tokprune_exp.curves.points import Curve, Point, Reference, Spread, TaskCurves

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#B0508F", "#C98500", "#56B4E9", "#6A3D9A", "#7F7F7F")
"""Told apart by most colour-blind readers, and dark enough for thin lines."""
MARKERS = (("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down"))
"""matplotlib's and plotly's names."""
FRONT, DENSE = "#C8C8C8", "#404040"
FRONT_LABEL = "Pareto front of all"
WIDE = 20
"""Ratio of a setting's largest to its smallest value from which on they are drawn side by side."""


@dataclass(frozen=True)
class Style:
    """How a curve is drawn."""

    colour: str
    marker: str
    symbol: str


def styles(task: TaskCurves, methods: Sequence[str]) -> list[Style]:
    """One style per curve: a colour and a marker per method, the same in every task; variants lighter, the next marker.

    A single method has a colour for each variant.
    """
    only_one = len({curve.method for curve in task.curves}) == 1
    found = []
    for number, curve in enumerate(task.curves):
        siblings = [other for other in task.curves if other.method == curve.method]
        place = next(place for place, other in enumerate(siblings) if other is curve)
        method = methods.index(curve.method)
        if only_one:
            colour = PALETTE[number % len(PALETTE)]
        else:
            colour = lighter(PALETTE[method % len(PALETTE)], 0.45 * place / len(siblings))
        found.append(Style(colour, *MARKERS[(method + place) % len(MARKERS)]))
    return found


def lighter(colour: str, share: float) -> str:
    """A #RRGGBB colour mixed with white."""
    parts = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * share):02X}" for part in parts)


def evenly_spaced(task: TaskCurves) -> list[float]:
    """The values of a setting that differ in magnitude and are drawn side by side instead of to scale; else none."""
    key = task.axis.key
    values = sorted({point.costs[key].mean for point in task.points if key in point.costs})
    magnitudes = [abs(value) for value in values if value]
    wide = not task.axis.is_cost and bool(magnitudes) and max(magnitudes) >= WIDE * min(magnitudes)
    return values if wide else []


def axis_label(task: TaskCurves) -> str:
    """The label of the axis that a task is drawn along."""
    return f"{task.axis.label} (not to scale)" if evenly_spaced(task) else task.axis.label


def method_fronts(task: TaskCurves) -> list[tuple[Curve, list[Point]]]:
    """For each method the curve whose colour its front has, and the points on it; none where there is one method."""
    methods = dict.fromkeys(curve.method for curve in task.curves)
    if len(methods) < 2:
        return []
    found = []
    for method in methods:
        of_method = [curve for curve in task.curves if curve.method == method]
        found.append((of_method[0], [point for curve in of_method for point in curve.points if point.on_method_front]))
    return found


def caption(task: TaskCurves) -> str:
    """What is counted, on how many examples, over how many seeds, and on which clock."""
    sentences = [task.axis.note + ".", seeds_sentence(task.points)]
    examples = {point.examples for point in task.points}
    if len(examples) == 1 and (known := examples.pop()) is not None:
        sentences[1] += f", {known:,} evaluated examples"
    sentences[1] += "."
    if task.axis.key.startswith(SPEEDUP) and task.clocks:
        where = task.clocks[0] if len(task.clocks) == 1 else "several machines, so points are not comparable"
        sentences.append(f"Measured on {where}.")
    if task.axis.is_cost:
        sentences.append("Steps: Pareto fronts. Hollow: dominated within its method.")
    elif shares := [point.costs["flops_share"].mean for point in task.points if "flops_share" in point.costs]:
        least, most = f"{min(shares):.1f}", f"{max(shares):.1f}"
        range_of = least if least == most else f"{least} to {most}"
        sentences.append(f"They cost {range_of} % of the unpruned FLOPs, unpadded.")
    return " ".join(sentences)


def seeds_sentence(points: Sequence[Point]) -> str:
    """How many seeds the points are means of."""
    counts = sorted({len(point.seeds) for point in points})
    if not counts or counts == [1]:
        return "One seed per point"
    few, many = counts[0], counts[-1]
    number = f"{many}" if few == many else f"{few} to {many}"
    return f"Mean of {number} seeds, bars: ± 1 standard deviation"


def reference_label(reference: Reference, metric: str) -> str:
    """The name of a dense reference with its value."""
    spread = reference.metric
    mean = f", mean of {spread.n}" if spread.n > 1 else ""
    return f"{reference.label}: {in_unit(spread.mean, metric)}{mean}"


def in_unit(value: float, metric: str) -> str:
    """A metric's value with its unit: 89.2 % or 0.301."""
    return f"{value:.1f} %" if metric_unit(metric) else f"{value:.3f}"


def with_deviation(spread: Spread, digits: int) -> str:
    """Mean, and ± standard deviation where there are several values."""
    mean = f"{spread.mean:.{digits}f}"
    return mean if spread.std is None else f"{mean} ± {spread.std:.{digits}f}"


def settings_text(settings: dict[str, str], keys: Sequence[str]) -> str:
    """Some settings as key=value; of a path the last two parts."""
    return ", ".join(f"{key}={shortened(settings[key])}" for key in keys if key in settings)


def shortened(value: str) -> str:
    """A value; of a path its last two parts, for what is written may be published."""
    parts = value.split("/")
    return value if len(parts) < 3 else "…/" + "/".join(parts[-2:])
