"""The Weights & Biases dashboard of a project as code: frontiers, curves of every stage, layers, examples.

    python -m tokprune_exp.dashboard --entity ENTITY --project PROJECT              saves the view, prints where it is
    python -m tokprune_exp.dashboard --entity ENTITY --project PROJECT --dry-run    prints its specification, offline

Every key that a panel reads is one that a run logs (tracking/); the tests hold the two together.
"""

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokprune_exp.config import choices, load_task
from tokprune_exp.errors import UserError, told_in_a_sentence

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import LinePlot
    from wandb_workspaces.reports.v2.interface import PanelTypes
    from wandb_workspaces.workspaces import Section, Workspace

STAGES = {
    "teacher": "the dense model",
    "finetune": "the dense model, alone",
    "approx": "STTABT's ApproxNet",
    "soft": "soft masks (LTP, STTABT)",
    "hard": "hard masks (LTP, STTABT, manual)",
    "student": "AD-TP's student",
}
"""Every stage that a method has, which is what its curves' names begin with, and what it trains."""
PRUNES = ("soft", "hard", "student")
HAS_THRESHOLDS = ("soft", "hard")
LAYER_FIGURES = {
    "retention": "share of the tokens that leaves a layer",
    "tokens": "tokens that leave a layer",
    "thresholds": "threshold θ of a layer (LTP)",
    "kept_probability": "probability to be kept in a layer (STTABT)",
}


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit code 2."""
    with told_in_a_sentence():
        make(read_arguments())


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tokprune_exp.dashboard",
        description="Save a Weights & Biases dashboard of the runs of a project as a new view of its workspace.",
        epilog="Saving needs the network and `wandb login`; --dry-run needs neither.",
    )
    parser.add_argument("--entity", required=True, help="user or team that owns the project")
    parser.add_argument("--project", required=True, help="the runs' logger.project")
    parser.add_argument(
        "--task",
        nargs="+",
        default=["sst2"],
        choices=choices("task"),
        metavar="TASK",
        help=f"tasks to draw frontiers for (default: sst2): {', '.join(choices('task'))}",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the specification as JSON instead of saving it")
    parser.add_argument("--file", type=Path, help="with --dry-run: write the specification into this file")
    arguments = parser.parse_args()
    if arguments.file and not arguments.dry_run:
        parser.error("--file goes with --dry-run")
    return arguments


def make(arguments: argparse.Namespace) -> None:
    """Save the dashboard, or print or write its specification.

    Raises:
        UserError: wandb-workspaces is not installed, the file cannot be written, or W&B does not take the dashboard.
    """
    first_metrics = {name: load_task(name).metrics[0] for name in arguments.task}
    workspace = build_workspace(arguments.entity, arguments.project, first_metrics)
    if arguments.dry_run:
        text = json.dumps(specification(workspace), indent=2)
        if arguments.file is None:
            print(text)
            return
        try:
            arguments.file.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{arguments.file} cannot be written: {error.strerror}") from error
        return
    import wandb

    try:
        workspace.save()
    except wandb.Error as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"{arguments.entity}/{arguments.project}: Weights & Biases does not take the dashboard ({reason}); "
            f"--dry-run shows its specification without a login"
        ) from error
    print(workspace.url)


def build_workspace(entity: str, project: str, first_metrics: Mapping[str, str]) -> "Workspace":
    """Put the sections together; `first_metrics` names the tasks to draw frontiers for and the first metric of each.

    Nothing is asked of the network.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it defines its models in pydantic's old way
            import wandb_workspaces.reports.v2 as wr
            import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError(
            "the dashboard needs the package wandb-workspaces: pip install 'tokprune_exp[dashboard]'"
        ) from error

    frontiers = [frontier_section(task, metric) for task, metric in first_metrics.items()]
    metrics = tuple(dict.fromkeys(first_metrics.values()))
    return ws.Workspace(
        entity=entity,
        project=project,
        name="Token pruning",
        sections=[
            *frontiers,
            layer_section(),
            ws.Section(
                name="Examples",
                panels=[
                    wr.MediaBrowser(title="Texts, the darker the longer a token stayed", media_keys=["examples_page"]),
                    wr.WeavePanelSummaryTable(table_name="examples"),
                ],
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=1, rows=2),
            ),
            *(stage_section(stage, trains, metrics) for stage, trains in STAGES.items()),
        ],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            pinned_columns=[
                "config:run.value.method",
                "config:run.value.task",
                "summary:frontier/flops_share",
                *(f"summary:frontier/{task}/{metric}" for task, metric in first_metrics.items()),
            ]
        ),
    )


def specification(workspace: "Workspace") -> dict[str, Any]:
    """The dashboard in plain values, as W&B stores it."""
    values: dict[str, Any] = workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return values


def frontier_section(task: str, metric: str) -> "Section":
    """Draw the metric against the share of the FLOPs, with the best so far as a line, and all figures of a run."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    score = wr.SummaryMetric(f"frontier/{task}/{metric}")
    axes: dict[str, wr.Config | wr.SummaryMetric] = {
        "method": wr.Config("run.method"),
        "retention": wr.SummaryMetric("frontier/retention"),
        "share of FLOPs": wr.SummaryMetric("frontier/flops_share"),
        "GFLOPs per example": wr.SummaryMetric("frontier/gflops_per_example"),
        metric: score,
        "speed-up": wr.SummaryMetric("frontier/speedup"),
    }
    return ws.Section(
        name=f"{task}: {metric} against FLOPs",
        panels=[
            wr.ScatterPlot(
                title=f"{task}: {metric} against the share of the unpruned FLOPs (line: best at that cost or below)",
                x=wr.SummaryMetric("frontier/flops_share"),
                y=score,
                running_ymax=True,
            ),
            wr.ParallelCoordinatesPlot(
                title=f"{task}: method, cost, {metric}, speed-up",
                columns=[wr.ParallelCoordinatesPlotColumn(axis, display_name=name) for name, axis in axes.items()],
            ),
        ],
        is_open=True,
        layout_settings=ws.SectionLayoutSettings(columns=2, rows=1),
    )


def stage_section(stage: str, trains: str, metrics: Sequence[str]) -> "Section":
    """Draw a stage's loss against its own steps, and its figures on the selection slice against its own epochs."""
    import wandb_workspaces.workspaces as ws

    judged = ("attention_kl",) if stage == "approx" else metrics
    panels: list[PanelTypes] = [
        curves(f"{stage}: loss", f"{stage}/step", [f"{stage}/loss"]),
        curves(f"{stage}: on the selection slice", f"{stage}/epoch", [f"{stage}/selection_{name}" for name in judged]),
    ]
    if stage in PRUNES:
        panels.append(curves(f"{stage}: retention", f"{stage}/epoch", [f"{stage}/selection_retention"]))
    if stage in HAS_THRESHOLDS:
        panels.append(curves(f"{stage}: thresholds", f"{stage}/step", [], regex=f"{stage}/threshold_[0-9]+"))
    return ws.Section(
        name=f"Stage {stage}: {trains}",
        panels=panels,
        layout_settings=ws.SectionLayoutSettings(columns=len(panels), rows=1),
    )


def layer_section() -> "Section":
    """Draw what is kept against the layer, all runs in one picture, and show the tables by layer and by length."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    figures = [curves(title, "layer/number", [f"layer/{name}"], "layer") for name, title in LAYER_FIGURES.items()]
    tables = [wr.WeavePanelSummaryTable(table_name=name) for name in ("layers", "by_length")]
    return ws.Section(
        name="Layers and lengths",
        panels=[*figures, *tables],
        is_open=True,
        layout_settings=ws.SectionLayoutSettings(columns=2, rows=3),
    )


def curves(
    title: str, axis: str, metrics: Sequence[str], axis_title: str | None = None, regex: str | None = None
) -> "LinePlot":
    """Draw metrics, or all that a regular expression finds, against an axis that is logged with them."""
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x=axis, y=list(metrics), title_x=axis_title or axis, metric_regex=regex)


if __name__ == "__main__":
    main()
