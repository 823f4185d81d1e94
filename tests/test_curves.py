"""Curves of a sweep: what is read, how it is averaged, who is on the front, and the files that are left behind."""

import csv
import io
import json
import os
import random
import statistics
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from offline_runs import read_offline_run
from rich.console import Console

from tokprune_exp.config import choices
from tokprune_exp.curves import __main__ as command_line
from tokprune_exp.curves.axes import AXES, axis_named, metric_label
from tokprune_exp.curves.figure import write_figure, write_published_figure
from tokprune_exp.curves.page import write_page
from tokprune_exp.curves.points import Point, Spread, collect, pareto_front, staircase
from tokprune_exp.curves.published import published_panels, read_published
from tokprune_exp.curves.read import LeftOut, read_run, read_runs
from tokprune_exp.curves.style import caption, evenly_spaced
from tokprune_exp.curves.tables import rows, screen_table
from tokprune_exp.curves.wandb_run import log_to_wandb
from tokprune_exp.errors import UserError

CHECKOUT = Path(__file__).resolve().parent.parent
SHARE, REDUCTION, SPEEDUP = axis_named("flops_share"), axis_named("reduction_padded"), axis_named("speedup@32")


def write_result(root, name, /, config=None, **changes):
    """A completed ltp run on sst2 with a reduction of 2, in which some keys are replaced; `flops` is merged."""
    flops = {
        "examples": 872,
        "gflops_per_example": 0.25,
        "gflops_dense": 0.5,
        "gflops_dense_padded": 1.5,
        "reduction_unpadded": 2.0,
        "reduction_padded": 6.0,
        "reduction_ltp_convention": 1.9,
        "retention_mean": 0.45,
        "retention_per_layer": [0.6, 0.3],
    }
    result = {
        "status": "completed",
        "reason": None,
        "method": "ltp",
        "task": "sst2",
        "backbone": "minilm_l6",
        "seed": 0,
        "overrides": ["+method=ltp", "budget=0.5"],
        "config_hash": name,
        "finished": "2026-11-20T10:00:00+00:00",
        "metrics": {"dense": {"accuracy": 0.9}, "unpruned": {"accuracy": 0.89}, "pruned": {"accuracy": 0.88}},
        "latency": [{"batch_size": 32, "speedup": 1.7, "device": "cpu", "threads": 2}],
        "hardware": {"cpu": "a processor", "gpu": None},
        **changes,
        "flops": {**flops, **changes.get("flops", {})},
    }
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(result), "utf-8")
    if config:
        (directory / "config.yaml").write_text(config, "utf-8")
    return directory


def pruned(value, metric="accuracy", dense=0.9):
    return {"dense": {metric: dense}, "pruned": {metric: value}}


def the_task(root, axis=SHARE, **options):
    """The curves of the only task below a directory."""
    (task,), left_out = collect(read_runs([root])[0], axis, **options)
    assert left_out == []
    return task


@pytest.fixture
def sweep(tmp_path):
    """Two methods, two budgets, three seeds; ltp is better at 0.5, adtp at 0.25."""
    root = tmp_path / "a_sweep"
    for method, values in {"ltp": {0.25: 0.70, 0.5: 0.88}, "adtp": {0.25: 0.80, 0.5: 0.86}}.items():
        for budget, value in values.items():
            for seed in range(3):
                overrides = [f"method={method}", f"budget={budget}", "+sweep=a_sweep", f"seed={seed}"]
                write_result(
                    root,
                    f"{method}-{budget}-{seed}",
                    method=method,
                    seed=seed,
                    overrides=overrides,
                    metrics=pruned(value + 0.01 * seed),
                    flops={"reduction_unpadded": 1 / budget, "reduction_padded": 3 / budget},
                )
    return root


# ---------------------------------------------------------------------------------------------------------------
# Reading


def test_a_record_is_read_with_what_curves_need(tmp_path):
    run = read_run(write_result(tmp_path, "one", seed=4) / "result.json")
    assert (run.method, run.task, run.backbone, run.seed) == ("ltp", "sst2", "minilm_l6", 4)
    assert run.settings == {"budget": "0.5"}
    assert run.metrics["pruned"] == {"accuracy": 0.88}
    assert run.speedups == {32: 1.7}
    assert run.clock == "a processor, 2 threads"
    assert "retention_per_layer" not in run.flops


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"status": "compl', "broken: not JSON (Unterminated string starting at, line 1)"),
        (b"\xff\xfe", "broken: not UTF-8"),
        (b"[1, 2]", "broken: not a JSON object"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b"{}", "broken: status is no text"),
        (b'{"status": "running"}', "running"),
        (b'{"status": "failed", "reason": "FloatingPointError: \x1b[31mloss"}', "broken: not JSON"),
        (b'{"status": "failed", "reason": "Error: \\u001b[31mloss"}', "failed: Error:  [31mloss"),
        (b'{"status": "completed", "method": "ltp", "task": 3}', "broken: task is no text"),
    ],
)
def test_what_cannot_be_used_is_named_and_the_rest_goes_on(tmp_path, content, why):
    write_result(tmp_path, "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_bytes(content)
    runs, left_out = read_runs([tmp_path])
    assert [run.path.parent.name for run in runs] == ["good"]
    (bad,) = left_out
    assert bad.path == tmp_path / "bad" / "result.json"
    assert bad.why.startswith(why)


def test_numbers_that_are_none_and_files_that_are_too_large_are_no_results(tmp_path):
    directory = write_result(tmp_path, "one", metrics={"pruned": {"accuracy": float("nan"), "f1": True, "matthews": 1}})
    assert read_run(directory / "result.json").metrics == {"pruned": {"matthews": 1.0}}
    with (directory / "result.json").open("ab") as file:
        file.truncate(20_000_000)
    with pytest.raises(ValueError, match="20,000,000 bytes are no record"):
        read_run(directory / "result.json")
    write_result(tmp_path, "huge", flops={"gflops_dense": 10**400})
    assert [each.path.parent.name for each in read_runs([tmp_path])[1]] == ["huge", "one"]


def test_a_file_that_lies_below_two_of_the_directories_is_read_once(sweep):
    assert len(read_runs([sweep, sweep / "ltp-0.5-0", sweep.parent])[0]) == 12


def test_scorer_and_retainer_are_those_of_the_configuration_else_of_the_overrides(tmp_path):
    target = "scorer:\n  _target_: tokprune_exp.pruning.scorers.{}\nretainer:\n  _target_: {}\n"
    known = target.format("ApproxAttention", "tokprune_exp.pruning.retainers.Backtracking")
    overrides = ["retainer=concrete"]
    for name, config in {"known": known, "unknown": target.format("X", "os.system"), "absent": None}.items():
        run = read_run(write_result(tmp_path, name, config=config, overrides=overrides) / "result.json")
        expected = ("approx_attention", "backtracking") if name == "known" else (None, "concrete")
        assert (run.scorer, run.retainer) == expected
    run = read_run(write_result(tmp_path, "evil", config="!!python/object/apply:os.getcwd []") / "result.json")
    assert (run.scorer, run.retainer) == (None, None)


def test_an_operating_point_is_made_of_what_changes_the_result(tmp_path):
    overrides = ["+method=ltp", "task=rte", "seed=3", "++loss.lam=0.1", "run_dir=/somewhere", "logger=csv", "tags=[a]"]
    overrides += ["data.root=/data", "measure.latency_rounds=1", "logger.offline=true", "data.max_train_examples=9"]
    run = read_run(write_result(tmp_path, "one", overrides=overrides) / "result.json")
    assert run.settings == {"data.max_train_examples": "9", "loss.lam": "0.1"}
    run = read_run(write_result(tmp_path, "composed", overrides=[]) / "result.json")
    assert run.settings == {"config_hash": "composed"}


# ---------------------------------------------------------------------------------------------------------------
# Averages, labels, references


def test_seeds_are_averaged_and_their_spread_is_the_sample_deviation(sweep):
    task = the_task(sweep)
    assert [curve.label for curve in task.curves] == ["adtp", "ltp"]
    cheap, dear = task.curves[1].points
    assert (cheap.settings["budget"], dear.settings["budget"]) == ("0.25", "0.5")
    assert cheap.seeds == [0, 1, 2]
    values = [70.0, 71.0, 72.0]
    assert cheap.metric.mean == pytest.approx(statistics.mean(values))
    assert cheap.metric.std == pytest.approx(statistics.stdev(values))
    assert (cheap.metric.least, cheap.metric.greatest) == (pytest.approx(70), pytest.approx(72))
    assert cheap.costs["flops_share"].mean == pytest.approx(25)
    assert cheap.costs["reduction_padded"].mean == pytest.approx(12)
    assert Spread.of([3.0]).std is None
    assert task.curves[1].shown_settings == ["budget"]


@pytest.mark.parametrize(
    ("key", "cost", "dense"),
    [
        ("flops_share", 50.0, 100.0),
        ("gflops_per_example", 0.25, 0.5),
        ("reduction_unpadded", 2.0, 1.0),
        ("reduction_padded", 6.0, 3.0),
        ("reduction_ltp_convention", 1.9, 1.0),
        ("retention", 45.0, 100.0),
        ("speedup@32", 1.7, 1.0),
    ],
)
def test_each_axis_is_its_convention_and_has_the_dense_model_on_it(tmp_path, key, cost, dense):
    write_result(tmp_path, "one")
    axis = axis_named(key)
    task = the_task(tmp_path, axis)
    assert task.points[0].costs[key].mean == pytest.approx(cost)
    assert task.references[0].costs[key] == pytest.approx(dense)
    assert axis.larger_is_cheaper == (key.startswith(("reduction", "speedup")))


def test_every_axis_has_a_case_above():
    assert len(AXES) == 6


def test_metrics_are_in_the_unit_people_expect(tmp_path):
    write_result(tmp_path, "one", task="cola", metrics=pruned(0.24, "matthews", dense=0.3))
    task = the_task(tmp_path)
    assert (task.points[0].metric.mean, task.references[0].metric.mean) == (0.24, 0.3)
    assert metric_label("matthews") == "Matthews correlation"
    assert metric_label("accuracy") == "Accuracy, %"


def test_another_metric_can_be_asked_for_and_runs_without_it_are_left_out(tmp_path):
    scores = {"dense": {"accuracy_f1": 0.8, "f1": 0.84}, "pruned": {"accuracy_f1": 0.7, "f1": 0.74}}
    write_result(tmp_path, "one", task="mrpc", metrics=scores)
    write_result(tmp_path, "two", task="sst2")
    runs, _ = read_runs([tmp_path])
    tasks, left_out = collect(runs, SHARE)
    assert [(task.task, task.metric) for task in tasks] == [("mrpc", "accuracy_f1"), ("sst2", "accuracy")]
    assert left_out == []
    (task,), (missing,) = collect(runs, SHARE, metric="f1")
    assert task.points[0].metric.mean == pytest.approx(74)
    assert missing.why == "completed, but without metrics.pruned.f1; it has accuracy"


def test_of_two_runs_with_one_seed_and_the_same_settings_the_later_one_counts(tmp_path):
    early = write_result(tmp_path, "early", metrics=pruned(0.5), overrides=["budget=0.5", "measure.latency_rounds=1"])
    write_result(tmp_path, "late", finished="2026-11-21T10:00:00+00:00")
    (task,), (left_out,) = collect(read_runs([tmp_path])[0], SHARE)
    assert task.points[0].metric == Spread.of([88.0])
    assert left_out.path == early / "result.json"
    assert "the same seed and settings as the later" in left_out.why


def test_a_curve_is_named_by_what_differs(tmp_path):
    write_result(tmp_path, "a", method="adtp", overrides=["retainer=static", "scorer=token_saliency"])
    write_result(tmp_path, "b", method="adtp", overrides=["retainer=random", "scorer=token_saliency"])
    write_result(tmp_path, "c", overrides=["retainer=learned_threshold", "method.epochs=0"])
    write_result(tmp_path, "d", overrides=["retainer=learned_threshold", "method.epochs=2"])
    assert [curve.label for curve in the_task(tmp_path).curves] == ["adtp · random", "adtp · static", "ltp"]
    by_epochs = the_task(tmp_path, by=["method.epochs"])
    assert [curve.label for curve in by_epochs.curves][2:] == ["ltp · method.epochs=0", "ltp · method.epochs=2"]
    write_result(tmp_path, "e", backbone="gte_small", overrides=["retainer=learned_threshold"])
    assert [curve.label for curve in the_task(tmp_path).curves][2:] == ["ltp · gte_small", "ltp · minilm_l6"]


def test_dense_models_are_references_larger_teachers_apart_and_shared_ones_once(tmp_path):
    for seed in range(2):
        write_result(tmp_path, f"shared{seed}", seed=seed)
    write_result(tmp_path, "finetuned", method="finetune", metrics={"dense": {"accuracy": 0.92}}, overrides=[])
    write_result(tmp_path, "taught", method="adtp", metrics=pruned(0.8, dense=0.95), flops={"gflops_teacher": 1.0})
    own, teacher = the_task(tmp_path).references
    assert (own.label, own.size, own.metric.n, own.metric.mean) == ("dense", 1.0, 2, pytest.approx(91))
    assert teacher.label == "dense teacher of 2× the FLOPs"
    assert teacher.metric.mean == pytest.approx(95)
    assert teacher.costs["flops_share"] == 200
    assert teacher.costs["reduction_padded"] == pytest.approx(1.5)
    assert "speedup@32" not in teacher.costs


def test_a_task_with_dense_models_only_is_left_out_by_name(tmp_path):
    write_result(tmp_path, "pruned")
    write_result(tmp_path, "dense", task="rte", method="finetune", metrics={"dense": {"accuracy": 0.6}})
    (task,), (left_out,) = collect(read_runs([tmp_path])[0], SHARE)
    assert (task.task, left_out.path.parent.name) == ("sst2", "dense")
    assert left_out.why == "a dense model, and no pruned result to compare with it"


# ---------------------------------------------------------------------------------------------------------------
# Fronts


def points_at(axis, places):
    return [
        Point({}, [0], Spread.of([float(value)]), None, {axis.key: Spread.of([float(cost)])}, None)
        for cost, value in places
    ]


@pytest.mark.parametrize("axis", [SHARE, REDUCTION], ids=["less is cheaper", "more is cheaper"])
def test_the_front_is_what_a_sweep_from_the_cheapest_finds(axis):
    """Another way than the tested one: sorted by cost, a point is on it when it beats all the cheaper ones."""
    generator = random.Random(0)
    for _ in range(50):
        places = [(float(generator.randint(1, 9)), float(generator.randint(1, 9))) for _ in range(12)]
        expected, best = set(), float("-inf")
        for cost, value in sorted(set(places), key=lambda place: (axis.sign * place[0], -place[1])):
            if value > best:
                expected.add((cost, value))
                best = value
        on_front = pareto_front(points_at(axis, places), axis)
        assert {place for place, is_on in zip(places, on_front, strict=True) if is_on} == expected
        assert all(is_on == (place in expected) for place, is_on in zip(places, on_front, strict=True))


def test_fronts_are_marked_for_the_task_and_for_each_method(sweep):
    marks = {
        (curve.method, point.settings["budget"]): (point.on_front, point.on_method_front)
        for curve in the_task(sweep).curves
        for point in curve.points
    }
    assert marks == {
        ("adtp", "0.25"): (True, True),
        ("adtp", "0.5"): (False, True),
        ("ltp", "0.25"): (False, True),
        ("ltp", "0.5"): (True, True),
    }


def test_a_point_without_a_cost_is_on_no_front_and_last(tmp_path):
    write_result(tmp_path, "a", latency=[], metrics=pruned(0.99))
    write_result(tmp_path, "b", overrides=["budget=0.4"])
    points = the_task(tmp_path, SPEEDUP).points
    assert [(point.settings["budget"], point.on_front) for point in points] == [("0.4", True), ("0.5", False)]


def test_the_step_line_holds_a_value_until_the_next_better_one_is_paid_for():
    assert staircase(points_at(SHARE, [(50, 8), (20, 5)]), SHARE) == ([20, 50, 50], [5, 5, 8])
    assert staircase(points_at(REDUCTION, [(2, 8), (5, 5)]), REDUCTION) == ([5, 2, 2], [5, 5, 8])
    assert staircase([], SHARE) == ([], [])


# ---------------------------------------------------------------------------------------------------------------
# Published points


def test_every_published_point_is_complete_and_of_a_known_task():
    points = list(read_published())
    assert len(points) > 300
    assert {point.task for point in points} - set(choices("task")) == {"mnli_mismatched", "imagenet1k"}
    for point in points:
        assert point.method and point.paper and point.figure_or_table and point.model and point.metric and point.unit
        assert 0 <= point.value <= 100
        assert point.is_dense if point.flops_value is None else point.flops_value > 0
    keys = [(p.method, p.paper, p.task, p.unit, p.value, p.flops_value) for p in points]
    repeated = {key for key in keys if keys.count(key) > 1}
    assert not repeated


def test_the_published_gflops_of_ltp_give_the_reductions_of_its_table():
    """Table I prints the ratio beside the two GFLOPs."""
    printed = {
        "mnli": 1.88,
        "mnli_mismatched": 1.97,
        "qqp": 2.10,
        "qnli": 1.87,
        "sst2": 2.09,
        "stsb": 1.95,
        "mrpc": 2.10,
        "rte": 1.81,
    }
    gflops = {(p.task, p.method): p.flops_value for p in read_published() if p.paper == "LTP"}
    for task, ratio in printed.items():
        assert gflops[task, "dense"] / gflops[task, "LTP"] == pytest.approx(ratio, abs=0.012)


def test_a_panel_holds_one_paper_and_one_convention():
    panels = published_panels("sst2")
    assert [(panel.paper, panel.unit.split()[0]) for panel in panels] == [
        ("LTP", "GFLOPs"),
        ("STTABT", "token"),
        ("STTABT", "GFLOPs"),
        ("AD-TP", "×"),
        ("AD-TP", "×"),
        ("AD-TP", "share"),
    ]
    for panel in panels:
        assert {(point.paper, point.unit, point.task) for point in panel.points} == {(panel.paper, panel.unit, "sst2")}
        assert len({point.metric for point in panel.points}) == 1
    assert panels[0].title == "LTP (RoBERTa-base), Table I"
    assert [point.flops_value for point in panels[1].of("manual top-k")][:2] == [17.6, 23.2]
    assert published_panels("a_task_of_mine") == []


# ---------------------------------------------------------------------------------------------------------------
# What is written


def test_the_rows_are_tidy_and_hold_every_convention(sweep):
    dense, *points = rows([the_task(sweep)])
    assert (dense["method"], dense["metric_mean"], dense["flops_share_percent_mean"]) == (
        "dense",
        pytest.approx(90),
        100.0,
    )
    (row,) = [row for row in points if (row["method"], row["settings"]) == ("ltp", "budget=0.5")]
    assert row["seeds"] == "0 1 2"
    assert (row["metric"], row["metric_unit"], row["metric_n"]) == ("accuracy", "%", 3)
    assert row["metric_mean"] == pytest.approx(89)
    assert row["metric_std"] == pytest.approx(1)
    assert (row["pareto_axis"], row["pareto_task"], row["pareto_method"]) == ("flops_share", 1, 1)
    assert row["flops_share_percent_mean"] == pytest.approx(50)
    assert row["retention_percent_mean"] == pytest.approx(45)
    for axis in (*AXES, SPEEDUP):
        assert any(name.startswith(axis.key) and name.endswith("_mean") for name in row)
    assert row["reduction_padded_mean"] == pytest.approx(6)


def test_no_path_of_the_machine_is_written(tmp_path):
    write_result(tmp_path, "one", overrides=["teacher.path=/home/me/runs/dense/model"])
    task = the_task(tmp_path)
    assert rows([task])[1]["settings"] == "teacher.path=…/dense/model"
    write_page(tmp_path / "page.html", [task], None, ["ltp"], [LeftOut(tmp_path / "two" / "result.json", "x")], "")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "/home/me" not in page and str(tmp_path) not in page


def test_the_table_on_the_screen_fits_100_columns_whatever_the_axis(sweep):
    for axis in (SHARE, SPEEDUP, axis_named("reduction_ltp_convention")):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(screen_table(the_task(sweep, axis)))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= 100
        (line,) = [line for line in lines if line.split()[:2] == ["ltp", "budget=0.25"]]
        words = line.split()
        assert words[2:8] == ["3", "71.0", "±", "1.0", "25.0", "4.00"]
        assert (words[-1] == "+") == (axis is SHARE)  # on the other axes the fixture's points are all at the same place


def test_the_command_writes_everything_and_says_where(sweep, tmp_path):
    write_result(sweep, "failed", status="failed", reason="KeyError: x")
    called = [sys.executable, "-m", "tokprune_exp.curves", str(sweep), "--published", "--wandb", "none"]
    done = subprocess.run(
        [*called, "--title", "Mine"],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "60"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    output = sweep / "curves"
    names = ["curves.csv", "index.html", "sst2.png", "sst2_published.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    for name in names:
        assert f"  {output / name}\n" in done.stdout
    assert "Left out: 1 of" in done.stdout
    assert f"  {sweep / 'failed' / 'result.json'}: failed: KeyError: x\n" in done.stdout
    with (output / "curves.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["dense", "adtp", "adtp", "ltp", "ltp"]
    assert float(lines[4]["metric_mean"]) == pytest.approx(89)
    page = (output / "index.html").read_text("utf-8")
    assert "<h1>Mine</h1>" in page
    assert "…/failed/result.json: failed: KeyError: x" in page


def command(*arguments, cwd):
    """Run the command line; without a W&B run."""
    return subprocess.run(
        [sys.executable, "-m", "tokprune_exp.curves", *map(str, arguments), "--wandb", "none"],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def the_lines(table):
    with table.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("options", [(), ("--by", "budget"), ("--x", "speedup@32")])
def test_a_table_drawn_once_more_is_the_same_table(options, sweep, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert command(sweep, *options, "--output", first, cwd=tmp_path).returncode == 0
    done = command(first / "curves.csv", *options, "--output", second, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (second / "curves.csv").read_text("utf-8") == (first / "curves.csv").read_text("utf-8")


def test_new_runs_stand_beside_the_points_of_an_earlier_table_and_take_the_place_of_the_same_point(sweep, tmp_path):
    earlier = tmp_path / "earlier"
    assert command(sweep, "--output", earlier, cwd=tmp_path).returncode == 0
    new = tmp_path / "new"
    for method, budget, value in (("sttabt", 0.5, 0.95), ("ltp", 0.5, 0.97)):
        overrides = [f"method={method}", f"budget={budget}"]
        write_result(new, method, method=method, overrides=overrides, metrics=pruned(value))
    assert command(new, earlier / "curves.csv", cwd=tmp_path).returncode == 0
    lines = the_lines(new / "curves" / "curves.csv")
    found = {(one["method"], one["settings"]): (float(one["metric_mean"]), one["metric_n"]) for one in lines}
    assert found == {
        ("dense", ""): (90.0, "1"),
        ("adtp", "budget=0.25"): (pytest.approx(81), "3"),
        ("adtp", "budget=0.5"): (pytest.approx(87), "3"),
        ("ltp", "budget=0.25"): (pytest.approx(71), "3"),
        ("ltp", "budget=0.5"): (pytest.approx(97), "1"),
        ("sttabt", "budget=0.5"): (pytest.approx(95), "1"),
    }
    on_front = {(one["method"], one["settings"]) for one in lines if one["pareto_task"] == "1"}
    assert on_front == {("adtp", "budget=0.25"), ("ltp", "budget=0.5")}


def test_dense_models_of_new_runs_and_of_an_earlier_table_are_one_reference(tmp_path):
    """Their mean and spread are what they are when all runs are drawn together."""
    write_result(tmp_path / "old", "one", overrides=["budget=0.3"], metrics=pruned(0.7))
    write_result(tmp_path / "old", "two", overrides=["budget=0.5"], metrics=pruned(0.8, dense=0.94))
    write_result(tmp_path / "new", "one", overrides=["budget=0.4"], metrics=pruned(0.75, dense=0.95))
    assert command(tmp_path / "old", cwd=tmp_path).returncode == 0
    table = tmp_path / "old" / "curves" / "curves.csv"
    assert command(tmp_path / "new", table, "--output", tmp_path / "both", cwd=tmp_path).returncode == 0
    assert command(tmp_path / "new", tmp_path / "old", "--output", tmp_path / "at once", cwd=tmp_path).returncode == 0
    ours, at_once = (the_lines(tmp_path / name / "curves.csv")[0] for name in ("both", "at once"))
    for name in ("mean", "std", "min", "max", "n"):
        assert float(ours[f"metric_{name}"]) == pytest.approx(float(at_once[f"metric_{name}"]))
    assert ours["metric_n"] == "3"


def test_a_setting_of_an_earlier_table_is_an_axis_beside_new_runs(tmp_path):
    for folder, alpha in (("old", 0.2), ("new", 0.8)):
        write_result(tmp_path / folder, "one", overrides=["+method=adtp", f"loss.alpha={alpha}"], metrics=pruned(alpha))
    assert command(tmp_path / "old", cwd=tmp_path).returncode == 0
    table = tmp_path / "old" / "curves" / "curves.csv"
    assert command(tmp_path / "new", table, "--x", "loss.alpha", cwd=tmp_path).returncode == 0
    lines = the_lines(tmp_path / "new" / "curves" / "curves.csv")
    assert [one["loss.alpha_mean"] for one in lines if one["method"] != "dense"] == ["0.2", "0.8"]


def test_lines_of_a_table_that_hold_no_numbers_or_another_metric_are_named_and_left_out(sweep, tmp_path):
    assert command(sweep, cwd=tmp_path).returncode == 0
    lines = (sweep / "curves" / "curves.csv").read_text("utf-8").splitlines()
    table = tmp_path / "table.csv"
    dense, first, second, *_ = lines[1:]
    broken = [first.replace(",81.0,", ",nan,"), second.replace("accuracy", "matthews")]
    place = lines[0].split(",").index("metric_n")
    broken += [",".join(first.split(",")[:place]), ",".join([*first.split(",")[:place], "0"])]
    table.write_text("\n".join([lines[0], dense, *broken]) + "\n", "utf-8")
    done = command(sweep, table, cwd=tmp_path)
    assert done.returncode == 0 and "Left out: 4 of" in done.stdout
    assert f"{table}: line 3: metric_mean=nan is no number" in done.stdout
    assert f"{table}: line 4: its metric is matthews, not accuracy" in done.stdout
    assert f"{table}: line 5: metric_n=None is no number" in done.stdout
    assert f"{table}: line 6: metric_n=0 is no number of runs" in done.stdout


def test_a_table_alone_needs_a_place_and_no_other_file_is_taken_for_a_table(sweep, tmp_path):
    assert command(sweep, cwd=tmp_path).returncode == 0
    done = command(sweep / "curves" / "curves.csv", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--output DIR" in done.stderr
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n", "utf-8")
    for file, said in ((other, "is no curves.csv: it has no column task"), (tmp_path / "no.csv", "cannot be read")):
        done = command(sweep, file, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr


class Links(HTMLParser):
    """Everything that a page would load, and its elements' names."""

    def __init__(self):
        super().__init__()
        self.loaded, self.elements = [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_loads_nothing_and_no_name_becomes_markup(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    write_result(tmp_path, "one", task=evil, method=f"ltp{evil}", overrides=[f"loss.lam={evil}", f"retainer={evil}"])
    task = the_task(tmp_path)
    write_page(tmp_path / "page.html", [task], {}, [task.curves[0].method], [LeftOut(Path(evil), evil)], evil)
    page = (tmp_path / "page.html").read_text("utf-8")
    links = Links()
    links.feed(page)
    assert links.loaded == []
    assert set(links.elements) & {"img", "iframe", "link"} == set()
    assert evil not in page
    assert "default-src 'none'" in page
    assert "1 seed: 0" in page
    assert "holds no points of this task" in page


def test_a_hover_text_says_settings_metric_flops_and_seeds(sweep, tmp_path):
    task = the_task(sweep)
    write_page(tmp_path / "page.html", [task], None, ["adtp", "ltp"], [], "Title")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert str(tmp_path) not in page
    for words in ("Accuracy: 89.0 % \\u00b1 1.0 %", "flops share: 50", "3 seeds: 0, 1, 2", "budget=0.5"):
        assert words in page
    assert "Every result.json that was found is in these pictures." in page


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("axis", [SHARE, REDUCTION, SPEEDUP], ids=lambda axis: axis.key)
def test_the_figure_is_one_column_wide_at_300_dots_per_inch(sweep, tmp_path, axis):
    write_figure(tmp_path / "one.png", the_task(sweep, axis), ["adtp", "ltp"], "A $ title_")
    assert png_size(tmp_path / "one.png")[0] == 1020
    assert png_size(tmp_path / "one.png")[1] > 900


def test_the_figure_with_the_papers_is_two_columns_wide(sweep, tmp_path):
    write_published_figure(tmp_path / "two.png", the_task(sweep), published_panels("sst2"), ["adtp", "ltp"], "sst2")
    assert png_size(tmp_path / "two.png")[0] == 2040


def test_the_caption_says_convention_seeds_and_examples(sweep, tmp_path):
    words = caption(the_task(sweep))
    assert "unpadded, against the unpruned encoder at the same lengths" in words
    assert "Mean of 3 seeds, bars: ± 1 standard deviation, 872 evaluated examples." in words
    assert "Measured on a processor, 2 threads." in caption(the_task(sweep, SPEEDUP))
    write_result(tmp_path / "b", "one", hardware={"cpu": "another"})
    write_result(tmp_path / "b", "two", overrides=["budget=0.4"])
    words = caption(the_task(tmp_path / "b", SPEEDUP))
    assert "One seed per point" in words
    assert "several machines, so points are not comparable" in words


@pytest.fixture
def by_weight(tmp_path):
    """One method at one cost by a weight of several magnitudes, and by a second setting."""
    for k in ("0.1", "0.4"):
        for weight, value in {"0.0": 0.80, "1e-3": 0.84, "10.0": 0.82}.items():
            write_result(
                tmp_path / "weights",
                f"{k}-{weight}",
                overrides=[f"loss.lam={weight}", f"retainer.k={k}"],
                metrics=pruned(value + float(k) / 10),
            )
    return tmp_path / "weights"


def test_against_a_setting_there_is_no_front_and_the_points_stand_in_its_order(by_weight, tmp_path):
    axis = axis_named("loss.lam", read_runs([by_weight])[0])
    task = the_task(by_weight, axis, by=["retainer.k"])
    assert [curve.label for curve in task.curves] == ["ltp · retainer.k=0.1", "ltp · retainer.k=0.4"]
    assert [point.costs["loss.lam"].mean for point in task.curves[0].points] == [0, 1e-3, 10]
    assert [round(point.metric.mean, 6) for point in task.curves[0].points] == [81, 85, 83]
    assert not any(point.on_front or point.on_method_front for point in task.points)
    assert caption(task) == (
        "Points by loss.lam. One seed per point, 872 evaluated examples. "
        "They cost 50.0 % of the unpruned FLOPs, unpadded."
    )
    write_figure(tmp_path / "one.png", task, ["ltp"], "weights")
    assert png_size(tmp_path / "one.png")[0] == 1020
    write_page(tmp_path / "page.html", [task], None, ["ltp"], [], "Weights")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "loss.lam (not to scale)" in page and '"ticktext":["0","0.001","10"]' in page
    assert "Pareto front of all" not in page.partition("<body>")[2]


def test_values_of_one_magnitude_are_drawn_to_scale_and_costs_always(by_weight, sweep):
    runs = read_runs([by_weight])[0]
    assert evenly_spaced(the_task(by_weight, axis_named("loss.lam", runs), by=["retainer.k"])) == [0, 1e-3, 10]
    assert evenly_spaced(the_task(by_weight, axis_named("retainer.k", runs), by=["loss.lam"])) == []
    assert evenly_spaced(the_task(sweep)) == []


def test_the_wandb_run_holds_the_table_the_figure_and_the_curves(sweep, tmp_path, monkeypatch):
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    task = the_task(sweep)
    task.curves[1].label = "ltp · method.epochs=0"
    output = tmp_path / "out"
    output.mkdir()
    write_figure(output / "sst2.png", task, ["adtp", "ltp"], "sst2")
    place = log_to_wandb(output, [task], rows([task]), {"sst2": output / "sst2.png"}, "a_sweep", True, left_out=2)

    run = read_offline_run(output)
    assert place == run.files.parent
    assert (run.project, run.group, run.job_type, run.name) == ("tokprune_exp", "a_sweep", "curves", "curves-a_sweep")
    assert run.tags == ["sst2"]
    assert run.config["x"] == "flops_share"
    assert run.axes["sst2/adtp"] == "sst2/flops_share"
    assert run.curve("sst2/adtp") == [(25, pytest.approx(81)), (50, pytest.approx(87))]
    assert run.curve("sst2/ltp · method_epochs=0") == [(25, pytest.approx(71)), (50, pytest.approx(89))]
    table = run.table("points")
    assert [row["method"] for row in table] == ["dense", "adtp", "adtp", "ltp", "ltp"]
    assert [row["pareto_task"] for row in table] == [None, 1, 0, 0, 1]
    assert table[4]["metric_std"] == pytest.approx(1)
    assert run.media("figure/sst2", "image-file").read_bytes() == (output / "sst2.png").read_bytes()
    assert (run.summary["left_out"], run.summary["points"]) == (2, 4)
    assert run.summary["sst2/dense"] == pytest.approx(90)
    assert run.artifacts == []
    assert run.exit_code == 0


# ---------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{empty}"], "no result.json lies below {empty}; name the directory of a sweep or of a run"),
        (["{empty}/nothing"], "{empty}/nothing is no directory; name the directory of a sweep"),
        (["{sweep}", "--x", "flops"], "--x flops: there is no such axis; choose from flops_share, "),
        (["{sweep}", "--x", "speedup@7"], "--x speedup@7: no result holds a value for it"),
        (["{sweep}", "--x", "method"], "--x method: there is no such axis; choose from flops_share, "),
        (["{sweep}", "--metric", "f1"], "none of the results below {sweep} can be drawn: adtp-0.25-0: completed, but"),
        (["{running}"], "none of the results below {running} can be drawn: one: running"),
        (["{sweep}", "--output", "{file}"], "--output {file} cannot be made: File exists"),
        (["{sweep}", "--wandb", "perhaps"], "argument --wandb: invalid choice: 'perhaps'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(sweep, tmp_path, monkeypatch, capsys, arguments, sentence):
    write_result(tmp_path / "running", "one", status="running")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {"sweep": sweep} | {name: tmp_path / name for name in ("empty", "file", "running")}
    monkeypatch.setattr(sys, "argv", ["curves", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    assert sentence.format(**places) in capsys.readouterr().err.splitlines()[-1]
    assert not (sweep / "curves").exists()


def test_what_the_pictures_are_drawn_with_must_be_there(sweep, monkeypatch):
    monkeypatch.setattr(command_line, "is_installed", lambda package: package != "plotly")
    with pytest.raises(UserError, match=r"need plotly, .* pip install 'tokprune_exp\[analysis\]'"):
        command_line.curves(command_line.read_arguments([str(sweep)]))
    assert not (sweep / "curves").exists()


def test_without_wandb_there_is_a_sentence_and_no_run(sweep, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "is_installed", lambda package: package != "wandb")
    command_line.curves(command_line.read_arguments([str(sweep)]))
    assert "wandb is not installed, so there is no W&B run." in capsys.readouterr().out
    assert sorted(path.name for path in (sweep / "curves").iterdir()) == ["curves.csv", "index.html", "sst2.png"]


def test_file_and_group_names_stay_where_they_belong():
    names = command_line.file_names(["sst2", "../../etc/passwd", "a b", "a/b", ".."])
    assert names == ["sst2", "_.._etc_passwd", "a_b", "a_b_", "task"]
    sweeps = [Path(name) for name in "abacde"]
    assert command_line.group_name(sweeps[:3]) == "a+b"
    assert command_line.group_name(sweeps) == "a+b+c+2 more"


def test_a_mistake_is_answered_before_anything_heavy_is_imported():
    heavy = ("torch", "matplotlib", "plotly", "wandb", "pandas", "transformers")
    program = f"import sys, tokprune_exp.curves.__main__; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]"
