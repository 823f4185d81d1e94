"""The interactive page: one HTML file that loads nothing from anywhere, every name in it escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tokprune_exp.curves.axes import metric_label
from tokprune_exp.curves.points import Curve, Point, TaskCurves, staircase
from tokprune_exp.curves.published import Panel
from tokprune_exp.curves.read import LeftOut
from tokprune_exp.curves.style import (
    DENSE,
    FRONT,
    FRONT_LABEL,
    MARKERS,
    PALETTE,
    axis_label,
    caption,
    evenly_spaced,
    in_unit,
    method_fronts,
    reference_label,
    settings_text,
    shortened,
    styles,
    with_deviation,
)

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""What the page may load: itself."""
LOOK = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1060px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.25em; margin-top: 2em; } h3 { font-size: 1.05em; margin: 1.2em 0 0; }
.note { color: #555; font-size: .88em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85em; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; white-space: normal; }
"""
CONFIG = {"displaylogo": False, "responsive": True}
STAR = "star"


def write_page(
    path: Path,
    tasks: Sequence[TaskCurves],
    published: Mapping[str, Sequence[Panel]] | None,
    methods: Sequence[str],
    left_out: Sequence[LeftOut],
    title: str,
) -> None:
    """Write the page: a section per task, the papers' panels where they are asked for, and what was left out."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for number, task in enumerate(tasks):
        parts.append(f"<h2>{escape(task.task)}</h2>")
        parts.append(as_div(task_figure(task, methods), f"task-{number}"))
        parts.append(f'<p class="note">{escape(caption(task))} Point at a marker for its settings.</p>')
        parts.append(points_table(task))
        if published is not None:
            parts += published_parts(published.get(task.task, ()), number)
    parts.append(left_out_part(left_out))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{LOOK}</style><script>{get_plotlyjs()}</script>"
    )
    body = "\n".join(parts)
    path.write_text(f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n', "utf-8")


def as_div(figure: Any, name: str) -> str:
    """A figure as a part of the page; plotly writes < and > in its data as escapes."""
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=CONFIG)


# ---------------------------------------------------------------------------------------------------------------
# Figures


def task_figure(task: TaskCurves, methods: Sequence[str]) -> Any:
    """The interactive picture of one task; the same as the PNG, with what a point is in its hover text."""
    figure, axis, x = go.Figure(), task.axis, task.axis.key
    if axis.is_cost:
        xs, ys = staircase([point for point in task.points if point.on_front], axis)
        line = {"color": FRONT, "width": 7}
        figure.add_scatter(x=xs, y=ys, mode="lines", line=line, name=FRONT_LABEL, hoverinfo="skip")
    spaced = evenly_spaced(task)
    its_styles = styles(task, methods)
    colour_of = {curve.label: style.colour for curve, style in zip(task.curves, its_styles, strict=True)}
    for curve, points in method_fronts(task) if axis.is_cost else ():
        xs, ys = staircase(points, axis)
        line = {"color": colour_of[curve.label], "width": 1.5}
        figure.add_scatter(
            x=xs, y=ys, mode="lines", line=line, hoverinfo="skip", showlegend=False, legendgroup=escape(curve.label)
        )
    for curve, style in zip(task.curves, its_styles, strict=True):
        points = [point for point in curve.points if x in point.costs]
        group = {"name": escape(curve.label), "legendgroup": escape(curve.label)}
        marker = {"color": style.colour, "symbol": style.symbol, "size": 10}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, **group)  # in the legend never hollow
        figure.add_scatter(
            x=[spaced.index(point.costs[x].mean) if spaced else point.costs[x].mean for point in points],
            y=[point.metric.mean for point in points],
            error_x=error_bars([point.costs[x].std for point in points], style.colour),
            error_y=error_bars([point.metric.std for point in points], style.colour),
            mode="markers" if axis.is_cost else "lines+markers",
            line={"color": style.colour, "width": 1.5},
            marker={
                **marker,
                "color": [style.colour if point.on_method_front or not axis.is_cost else "#FFFFFF" for point in points],
                "line": {"color": style.colour, "width": 2},
            },
            showlegend=False,
            **group,
            hovertext=[hover(task, curve, point) for point in points],
            hoverinfo="text",
        )
    for number, reference in enumerate(task.references):
        name = escape(reference_label(reference, task.metric))
        line = {"color": DENSE, "width": 1.2, "dash": ("dash", "dot", "dashdot")[number % 3]}
        figure.add_hline(y=reference.metric.mean, line=line, layer="below")
        at = reference.costs.get(x) if reference.size == 1 else None  # a larger teacher would stretch the axis
        figure.add_scatter(
            x=[at],
            y=[None if at is None else reference.metric.mean],
            mode="lines" if at is None else "lines+markers",
            line=line,
            marker={"color": DENSE, "symbol": STAR, "size": 12},
            name=name,
            hovertext=[name],
            hoverinfo="text",
        )
    lay_out(figure, escape(axis_label(task)), escape(metric_label(task.metric)), 520)
    if spaced:
        figure.update_xaxes(tickvals=[*range(len(spaced))], ticktext=[f"{value:g}" for value in spaced])
    return figure


def error_bars(deviations: Sequence[float | None], colour: str) -> dict[str, Any]:
    """Bars of one standard deviation; none where every point is one seed."""
    lengths = [deviation or 0.0 for deviation in deviations]
    return {"type": "data", "array": lengths, "visible": any(lengths), "color": colour, "thickness": 1.2, "width": 3}


def hover(task: TaskCurves, curve: Curve, point: Point) -> str:
    """What a point is: curve, metric, every cost, seeds and settings."""
    metric = f"{in_unit(point.metric.mean, task.metric)}"
    if point.metric.std is not None:
        metric += f" ± {in_unit(point.metric.std, task.metric)}"
    lines = [f"<b>{escape(curve.label)}</b>", f"{escape(metric_label(task.metric).partition(',')[0])}: {metric}"]
    lines += [f"{escape(label_of(key))}: {cost.mean:.4g}" for key, cost in point.costs.items()]
    seeds = ", ".join(map(str, point.seeds))
    lines.append(f"{len(point.seeds)} seed{'s' if len(point.seeds) > 1 else ''}: {seeds}")
    lines += [escape(f"{key}={shortened(value)}"[:90]) for key, value in point.settings.items()]
    return "<br>".join(lines)


def published_figure(panel: Panel) -> Any:
    """A paper's points under its own convention."""
    figure = go.Figure()
    for number, method in enumerate(panel.methods):
        points = panel.of(method)
        figure.add_scatter(
            x=[point.flops_value for point in points],
            y=[point.value for point in points],
            mode="lines+markers",
            line={"color": PALETTE[number % len(PALETTE)], "width": 1.5},
            marker={"symbol": MARKERS[number % len(MARKERS)][1], "size": 8},
            name=escape(method),
            hovertext=[
                "<br>".join(
                    escape(part)
                    for part in (
                        f"{point.method}, {point.model}",
                        f"{point.printed} at {point.flops_value:g} {point.unit}",
                        f"{point.paper}, {point.figure_or_table}",
                        point.note,
                    )
                    if part
                )
                for point in points
            ],
            hoverinfo="text",
        )
    for number, dense in enumerate(point for point in panel.points if point.is_dense):
        line = {"color": DENSE, "width": 1.2, "dash": ("dash", "dot", "dashdot")[number % 3]}
        figure.add_hline(y=dense.value, line=line, layer="below")
        figure.add_scatter(
            x=[dense.flops_value],
            y=[dense.value],
            mode="lines" if dense.flops_value is None else "lines+markers",
            line=line,
            marker={"color": DENSE, "symbol": STAR, "size": 12},
            name=escape(f"{dense.method} ({dense.model}): {dense.printed}"),
            hoverinfo="name",
        )
    lay_out(figure, escape(panel.unit), escape(panel.metric_label), 420)
    figure.update_xaxes(rangemode="tozero")
    return figure


def lay_out(figure: Any, x: str, y: str, height: int) -> None:
    """Axes, legend beside the picture, plain background."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        hovermode="closest",
        hoverlabel={"align": "left"},
        legend={"x": 1.02, "y": 1, "xanchor": "left"},
        showlegend=True,
    )
    figure.update_xaxes(title=x, zeroline=False, showline=True, linecolor="#888")
    figure.update_yaxes(title=y, zeroline=False, showline=True, linecolor="#888")


# ---------------------------------------------------------------------------------------------------------------
# Text


def points_table(task: TaskCurves) -> str:
    """The points of a task as an HTML table, in every convention."""
    keys = list(dict.fromkeys(key for point in task.points for key in point.costs))
    digits = 2 if metric_label(task.metric).endswith("%") else 4
    headings = ["curve", "settings", "seeds", metric_label(task.metric), *map(label_of, keys), "Pareto front"]
    lines = []
    for curve in task.curves:
        for point in curve.points:
            front = "of all" if point.on_front else "of its method" if point.on_method_front else ""
            cells = [
                curve.label,
                settings_text(point.settings, curve.shown_settings),
                str(len(point.seeds)),
                with_deviation(point.metric, digits),
                *(f"{point.costs[key].mean:.4g}" if key in point.costs else "–" for key in keys),
                front,
            ]
            lines.append(table_row("td", cells))
    for reference in task.references:
        costs = (f"{reference.costs[key]:.4g}" if key in reference.costs else "–" for key in keys)
        cells = [reference.label, "", str(reference.metric.n), with_deviation(reference.metric, digits), *costs, ""]
        lines.append(table_row("td", cells))
    return f'<div class="scroll"><table>{table_row("th", headings)}{"".join(lines)}</table></div>'


def table_row(tag: str, cells: Sequence[str]) -> str:
    """One row of an HTML table."""
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def label_of(key: str) -> str:
    """A cost's column heading."""
    return key.replace("_", " ").replace("@", " at batch ")


def published_parts(panels: Sequence[Panel], number: int) -> list[str]:
    """The papers' panels of one task."""
    if not panels:
        return ['<p class="note">published.csv holds no points of this task.</p>']
    parts = [
        "<h3>Published points</h3>",
        '<p class="note">As printed, with the papers\' own models, each under its own convention: their axes are '
        "comparable neither with the picture above nor with each other.</p>",
    ]
    for place, panel in enumerate(panels):
        parts.append(f"<h3>{escape(panel.title)}</h3>")
        parts.append(as_div(published_figure(panel), f"published-{number}-{place}"))
    return parts


def left_out_part(left_out: Sequence[LeftOut]) -> str:
    """The results that are in no picture."""
    if not left_out:
        return '<p class="note">Every result.json that was found is in these pictures.</p>'
    items = "".join(f"<li>{escape(shortened(str(each.path)))}: {escape(each.why)}</li>" for each in left_out)
    return f'<h2>Left out: {len(left_out)}</h2><ul class="note">{items}</ul>'
