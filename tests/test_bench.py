"""The bench as a command: variants of one model raced on real texts, and a record that can be read back."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from model_directories import save_random_model

from tokprune_exp.bench.__main__ import main
from tokprune_exp.bench.arguments import read_arguments
from tokprune_exp.bench.picture import draw_speed
from tokprune_exp.bench.report import print_speed
from tokprune_exp.bench.screen import screen
from tokprune_exp.bench.speed import bench
from tokprune_exp.config import load_task
from tokprune_exp.errors import UserError

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def directory(random_classifier, tiny_tokenizer, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"), random_classifier, tiny_tokenizer)


@pytest.fixture(scope="module")
def data_root(tiny_root, tmp_path_factory):
    """A data root that holds the tiny task's rows under the names of SST-2 and CoLA."""
    root = tmp_path_factory.mktemp("root")
    for name in ("glue_sst2", "glue_cola"):
        (root / name).mkdir()
        for split in ("train", "validation"):
            pd.read_parquet(tiny_root / "tiny" / f"{split}.parquet").to_parquet(root / name / f"{split}.parquet")
    return root


def called(*arguments):
    """Run the bench as a command in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tokprune_exp.bench", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def benched(directory, data_root, tmp_path_factory):
    """One whole bench in both precisions: what it printed and its folder."""
    out = tmp_path_factory.mktemp("out") / "new"
    sizes = ["--examples", "8", "--rounds", "2", "--batch-sizes", "1", "4", "32", "--threads", "1"]
    done = called(
        directory, *sizes, "--reductions", "1.4", "90", "--precision", "both", "--data-root", data_root, "--output", out
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, out


def test_a_bench_is_tables_three_files_and_a_record_of_how_it_was_measured(benched, directory):
    printed, out = benched
    for words in (
        "Batch size 4 (2 batches)",
        "ours pruned bf16, 1.4×",
        "transformers, ",
        "Padding, apart from pruning",
        "bf16 against fp32",
        "--reductions 90: out of reach",
        "batch size 32",
        "Only ratios within this run are meaningful",
        "bench.csv",
    ):
        assert words in printed
    assert "…" not in printed.split("rounds …")[1], "a cell was cut"
    assert max(len(line) for line in printed.splitlines() if "Written" not in line) <= 100

    record = json.loads((out / "bench.json").read_text())
    assert record["model"] == {"directory": str(directory), "method": "random", "task": "sst2"}
    assert record["command"].startswith("python -m tokprune_exp.bench ")
    assert (record["hardware"]["threads"], record["warmup_rounds"]) == (1, 1)
    assert {"torch", "transformers"} <= set(record["versions"])
    assert set(record["kernels"]) == {"product_fp32", "product_bf16", "attention"}
    assert record["texts"]["examples"] == record["texts"]["source"]["rows_used"] == 8
    assert [point["name"] for point in record["points"]] == ["own", "1.4x"]
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_every_variant_has_a_row_at_each_batch_size_that_the_texts_fill(benched):
    record = json.loads((benched[1] / "bench.json").read_text())
    ours = {"dense_fp32", "dense_bf16", *(f"pruned_{p}_{at}" for p in ("fp32", "bf16") for at in ("own", "1.4x"))}
    variants = {row["variant"] for row in record["rows"]}
    assert ours | {"transformers"} <= variants
    assert {(row["variant"], row["batch_size"]) for row in record["rows"]} == {(v, n) for v in variants for n in (1, 4)}
    for row in record["rows"]:
        assert row["texts_per_s"] == pytest.approx(1e3 * row["batch_size"] / row["ms"])
        assert (row["flops_reduction"] is None) == (row["point"] is None)
        if row["point"]:
            assert row["attained"] == pytest.approx(row["speedup"] / row["flops_reduction"])
            assert row["reference"] == f"dense_{row['precision']}"
    assert [row["model"] for row in record["accuracy"]] == ["dense", "pruned"]
    assert {row["batch_size"] for row in record["shares"]} == {1, 4}
    assert {row["variant"] for row in record["best"]} == variants


def test_the_csv_has_a_line_per_row_that_can_be_read_alone(benched):
    record = json.loads((benched[1] / "bench.json").read_text())
    with (benched[1] / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, record["rows"], strict=True):
        assert (line["variant"], int(line["batch_size"])) == (row["variant"], row["batch_size"])
        assert float(line["speedup"]) == row["speedup"]
        assert [float(line[f"speedup_quartiles_{end}"]) for end in (1, 3)] == row["speedup_quartiles"]
        assert (line["command"], line["threads"], line["task"]) == (record["command"], "1", "sst2")


def test_texts_of_another_task_are_timed_and_not_judged(directory, data_root, tmp_path, capsys):
    few = ["--examples", "4", "--rounds", "1", "--batch-sizes", "4", "--peers", "none", "--precision", "both"]
    places = ["--data-root", str(data_root), "--output", str(tmp_path)]
    bench(read_arguments([str(directory), *few, "--texts-of", "cola", *places]))
    printed = capsys.readouterr().out
    assert "The model was trained on sst2: on texts of cola" in printed
    record = json.loads((tmp_path / "bench.json").read_text())
    assert (record["texts"]["task"], record["texts"]["is_own_task"], record["accuracy"]) == ("cola", False, [])
    assert {row["side"] for row in record["rows"]} == {"ours"}
    assert "Padding" not in printed


def test_without_matplotlib_a_line_says_that_there_is_no_picture(benched, tmp_path, monkeypatch, capsys):
    record = json.loads((benched[1] / "bench.json").read_text())
    monkeypatch.setattr("tokprune_exp.bench.picture.find_spec", lambda name: None)
    assert draw_speed(tmp_path / "no.png", record, screen()) == []
    assert "No picture: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "no.png").exists()


def test_a_model_that_prunes_nothing_has_tables_too(benched, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    record = json.loads((benched[1] / "bench.json").read_text())
    for table in ("rows", "best"):
        record[table] = [row for row in record[table] if row["point"] is None]
    parts = ("scoring", "selection", "gathering")
    record["shares"] = [
        {key: value for key, value in row.items() if not key.startswith(parts)} for row in record["shares"]
    ]
    print_speed(record, screen())
    assert "ours dense fp32" in capsys.readouterr().out


def test_a_task_without_a_file_is_refused():
    assert load_task("mnli").text == ["premise", "hypothesis"]
    with pytest.raises(
        UserError, match=r"the model is of task mine, but there is no .*; there are 20newsgroups, ag_news"
    ):
        load_task("mine")


def test_each_command_has_its_own_arguments():
    assert read_arguments(["here", "--peers", "none"]).peers == []
    assert read_arguments(["here"]).batch_sizes == [1, 8, 32, 128]
    assert read_arguments(["selection", "--lengths", "64"]).lengths == [64]
    training = read_arguments(["training", "--task", "cola", "backbone=gte_small"])
    assert (training.command, training.task, training.overrides) == ("training", "cola", ["backbone=gte_small"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{empty}"], "no model in {empty}: looked for"),
        (["{model}", "--output", "{file}"], "--output {file} cannot be made: File exists"),
        (["{model}", "--data-root", "{empty}", "--threads", "none"], "none is not a whole number above 0"),
        (["{model}", "--reductions", "1"], "1 is not a number above 1"),
        (["{model}", "--peers", "none", "openvino"], "--peers none stands alone, not with openvino"),
        (["{model}", "--texts-of", "mine", "--output", "{empty}"], "--texts-of mine: there is no such task"),
        (["selection", "--batch", "0"], "0 is not a whole number above 0"),
        (["training", "--task", "mine", "--output", "{empty}"], "task/mine"),
        (["training", "--output", "{empty}", "data.batch_size=many"], "data.batch_size=many"),
        (["training", "--output", "{empty}", "data.batchsize=8"], "data.batchsize=8"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(directory, tmp_path, monkeypatch, capsys, arguments, sentence):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    places = {"model": directory, "file": tmp_path / "file", "empty": tmp_path / "empty"}
    monkeypatch.setattr(sys, "argv", ["bench", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert sentence.format(**places) in capsys.readouterr().err.splitlines()[-1]
