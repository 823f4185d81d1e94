"""The dashboard: what its panels read is what real runs log, and its command line."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from hydra import compose, initialize_config_dir
from offline_runs import OfflineRun, read_offline_run

from tokprune_exp.config import check_config, choices, config_directory
from tokprune_exp.dashboard import STAGES, build_workspace, make, specification
from tokprune_exp.errors import UserError
from tokprune_exp.run import run

CHECKOUT = Path(__file__).resolve().parent.parent
METHODS = ("finetune", "adtp", "ltp", "sttabt")
"""Together they have every stage and log everything."""

pytest.importorskip("wandb_workspaces")


@pytest.fixture(scope="module")
def runs(
    tiny_root: Path, tiny_tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, OfflineRun]:
    """A whole run of each method, logged offline, moved elsewhere and read from there."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(variable, str(root / "elsewhere"))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONSOLE", "off")
        for method in METHODS:
            with initialize_config_dir(str(config_directory()), version_base="1.3"):
                cfg = compose("config", [f"+method={method}", *overrides(tiny_root, tiny_tokenizer_directory, root)])
            check_config(cfg)
            run(cfg, root / "here" / method)
    shutil.move(root / "here", root / "there")
    return {method: read_offline_run(root / "there" / method) for method in METHODS}


def overrides(data: Path, tokenizer: Path, root: Path) -> list[str]:
    return [
        "task=sst2",
        "task.name=tiny",
        "task.directory=tiny",
        "backbone=tiny",
        f"backbone.path={tokenizer}",
        f"data.root={data}",
        f"data.cache={root / 'cache'}",
        "data.batch_size=16",
        "data.selection_examples=20",
        "epochs=1",
        "optimizer.lr=1e-3",
        "measure.latency_examples=4",
        "measure.latency_rounds=1",
        "measure.latency_batch_sizes=[2]",
        "measure.fvcore_examples=1",
        "measure.attribution_examples=4",
        "trainer.enable_progress_bar=false",
        "trainer.precision=32-true",
        "trainer.log_every_n_steps=5",
        "logger.csv=false",
        "tags=[tried]",
    ]


@pytest.fixture(scope="module")
def panels() -> list[tuple[str, dict[str, Any]]]:
    """Kind and configuration of every panel in the specification."""
    sections = specified({"tiny": "accuracy"})["spec"]["section"]["panelBankConfig"]["sections"]
    return [(panel["viewType"], panel["config"]) for section in sections for panel in section["panels"]]


def specified(first_metrics: dict[str, str]) -> dict[str, Any]:
    return specification(build_workspace("an_entity", "a_project", first_metrics))


# ---------------------------------------------------------------------------------------------------------------
# Panels and runs


def test_the_frontier_and_the_parallel_coordinates_read_what_every_run_has(runs, panels) -> None:
    (scatter,) = [config for kind, config in panels if kind == "Scatter Plot"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:frontier/flops_share", "summary:frontier/tiny/accuracy")
    assert scatter["showMaxYAxisLine"] is True
    (parallel,) = [config for kind, config in panels if kind == "Parallel Coordinates Plot"]
    assert [column["displayName"] for column in parallel["columns"]] == [
        *("method", "retention", "share of FLOPs", "GFLOPs per example", "accuracy", "speed-up")
    ]
    for method, logged in runs.items():
        for accessor in (scatter["xAxis"], scatter["yAxis"], *(column["accessor"] for column in parallel["columns"])):
            value = looked_up(logged, accessor)
            assert value == method if accessor.startswith("config:") else isinstance(value, float), accessor


def test_every_curve_is_logged_against_the_axis_that_it_is_drawn_against(runs, panels) -> None:
    plots = [config for kind, config in panels if kind == "Run History Line Plot"]
    drawn = set()
    for plot in plots:
        pattern = plot.get("metricRegex")
        for logged in runs.values():
            found = {key for key in logged.logged if key in plot["metrics"] or (pattern and re.fullmatch(pattern, key))}
            assert all(logged.axes[key] == plot["xAxis"] and logged.curve(key) for key in found), plot
            drawn |= found | ({pattern} if pattern and found else set())
    asked = {key for plot in plots for key in (*plot["metrics"], *filter(None, [plot.get("metricRegex")]))}
    assert asked <= drawn


def test_every_stage_that_a_run_has_is_drawn(runs, panels) -> None:
    seen = {key.partition("/")[0] for logged in runs.values() for key in logged.logged if key.endswith("/epoch")}
    assert seen == set(STAGES)


def test_the_media_panels_read_tables_and_a_page_that_every_run_has(runs, panels) -> None:
    (browser,) = [config for kind, config in panels if kind == "Media Browser"]
    tables = {name for kind, config in panels if kind == "Weave" for name in picked(config)}
    assert browser["mediaKeys"] == ["examples_page"]
    assert tables == {"examples", "layers", "by_length"}
    for logged in runs.values():
        assert all(logged.table(name) for name in tables)
        assert "Token dropped in layer" in logged.media("examples_page", "html-file").read_text()


def test_the_columns_of_the_list_of_runs_are_logged(runs) -> None:
    (runset,) = specified({"tiny": "accuracy"})["spec"]["section"]["runSets"]
    columns = [name for name in runset["runFeed"]["columnPinned"] if not name.startswith("run:")]
    assert len(columns) == 4
    assert all(looked_up(logged, name) is not None for logged in runs.values() for name in columns)


def test_there_is_a_frontier_for_each_task_by_its_own_metric() -> None:
    sections = specified({"sst2": "accuracy", "cola": "matthews"})["spec"]["section"]["panelBankConfig"]["sections"]
    shown = [panel["config"] for section in sections for panel in section["panels"]]
    frontiers = [config["yAxis"] for config in shown if "yAxis" in config]
    assert frontiers == ["summary:frontier/sst2/accuracy", "summary:frontier/cola/matthews"]


# ---------------------------------------------------------------------------------------------------------------
# What whole runs leave behind


def test_a_whole_run_logs_its_configuration_and_keeps_everything_in_its_folder(runs) -> None:
    for method, logged in runs.items():
        assert (logged.group, logged.job_type) == (f"{method}-tiny-tiny", method)
        assert sorted(logged.tags) == sorted({"tried", method, "tiny"})
        assert logged.config["task"]["name"] == "tiny"
        assert logged.config["optimizer"]["lr"] == 1e-3
        assert logged.config["trainer"]["log_every_n_steps"] == 5
        assert logged.artifacts == []
        assert logged.summary["status"] == "completed"
        assert logged.exit_code == 0


def test_a_whole_run_shows_twenty_texts_with_the_tokens_that_each_layer_dropped(runs) -> None:
    for method, logged in runs.items():
        rows = logged.table("examples")
        assert len(rows) == 20
        assert {row["gold"] for row in rows} == {"negative", "positive"}
        for row in rows:
            assert row["gold"] == ("positive" if row["text"].split()[0] == "good" else "negative")
            assert row["correct"] == (row["gold"] == row["predicted"])
            dropped = " ".join(row[f"dropped_in_layer_{layer}"] for layer in (1, 2, 3)).split()
            words = [word for word in dropped if not word.startswith("[")]
            shown = [word for stretch in re.findall(r"\[([^]]*)\]", row["marked"]) for word in stretch.split()]
            assert sorted(words) == sorted(shown)
            assert row["marked"].replace("[", "").replace("]", "") == row["text"]
        assert any(row["marked"] != row["text"] for row in rows) == (method != "finetune")


# ---------------------------------------------------------------------------------------------------------------
# The command line


def test_a_dry_run_prints_the_specification_without_a_login(tmp_path) -> None:
    done = command(tmp_path, "--task", "sst2", "stsb", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    view = json.loads(done.stdout)
    assert (view["entity"], view["project"]) == ("an_entity", "a_project")
    assert [section["name"] for section in view["spec"]["section"]["panelBankConfig"]["sections"]][:2] == [
        "sst2: accuracy against FLOPs",
        "stsb: pearson_spearman against FLOPs",
    ]


def test_without_a_login_nothing_is_saved_and_one_sentence_says_so(tmp_path) -> None:
    done = command(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("an_entity/a_project: Weights & Biases does not take the dashboard (")
    assert "--dry-run" in line
    assert done.stdout == ""


def test_an_unknown_task_is_refused_with_those_there_are(tmp_path) -> None:
    done = command(tmp_path, "--task", "sst3", "--dry-run")
    assert done.returncode == 2
    assert all(name in done.stderr for name in choices("task"))


def test_the_specification_is_written_into_a_file_that_can_be_written(tmp_path) -> None:
    make(arguments(dry_run=True, file=tmp_path / "view.json"))
    assert json.loads((tmp_path / "view.json").read_text())["project"] == "a_project"
    with pytest.raises(UserError, match=r"view\.json cannot be written: No such file"):
        make(arguments(dry_run=True, file=tmp_path / "absent" / "view.json"))


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UserError, match=r"pip install 'tokprune_exp\[dashboard\]'"):
        make(arguments(dry_run=True))


def test_the_saved_view_is_told_by_its_address(monkeypatch, capsys) -> None:
    from wandb_workspaces.workspaces import Workspace

    saved = []
    monkeypatch.setattr(Workspace, "save", lambda self: saved.append(specification(self)))
    monkeypatch.setattr(Workspace, "url", "https://wandb.example/view")
    make(arguments())
    assert [view["entity"] for view in saved] == ["an_entity"]
    assert capsys.readouterr().out == "https://wandb.example/view\n"


def test_a_view_that_is_not_taken_is_an_error_for_the_user(monkeypatch) -> None:
    from wandb_workspaces.workspaces import Workspace

    def refused(self: Workspace) -> None:
        raise wandb.Error("no such project.")

    monkeypatch.setattr(Workspace, "save", refused)
    with pytest.raises(UserError, match=r"does not take the dashboard \(no such project\)"):
        make(arguments())


# ---------------------------------------------------------------------------------------------------------------


def arguments(dry_run: bool = False, file: Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(entity="an_entity", project="a_project", task=["sst2"], dry_run=dry_run, file=file)


def command(home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as somebody who has never logged in."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(CHECKOUT), "NETRC": str(home / "none")}
    line = [sys.executable, "-m", "tokprune_exp.dashboard", "--entity", "an_entity", "--project", "a_project", *options]
    return subprocess.run(
        line, env=environment, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def looked_up(logged: OfflineRun, accessor: str) -> Any:
    """What W&B finds under an accessor of a panel: `summary:key`, or `config:key.value.key`."""
    place, _, key = accessor.partition(":")
    if place == "summary":
        return logged.summary[key]
    first, value, *rest = key.split(".")
    assert (place, value) == ("config", "value")
    found = logged.config[first]
    for name in rest:
        found = found[name]
    return found


def picked(node: Any) -> Iterator[str]:
    """The keys of the summary that a query panel asks for."""
    if isinstance(node, dict):
        if node.get("name") == "pick":
            yield node["inputs"]["key"]["val"]
        for each in node.values():
            yield from picked(each)
    elif isinstance(node, list):
        for each in node:
            yield from picked(each)
