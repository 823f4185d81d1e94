"""The speed of a trained model on texts of a task: `python -m tokprune_exp.bench MODEL_DIR`, top to bottom.

Ours, dense and pruned, on one path, each batch packed and cut into micro-batches as it would be served; the same
weights dense in other runtimes. Everything of one batch size takes turns in one run. What not computing padding is
worth is reported apart, since it is not pruning.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tokprune_exp.bench.accuracy import accuracy
from tokprune_exp.bench.arguments import writable
from tokprune_exp.bench.files import write_rows
from tokprune_exp.bench.peers import check_same_model, find_peers
from tokprune_exp.bench.picture import draw_speed
from tokprune_exp.bench.points import Point, operating_points
from tokprune_exp.bench.race import WARMUP, best_of, padding_of, race, rows_of
from tokprune_exp.bench.report import print_speed
from tokprune_exp.bench.screen import Steps, screen
from tokprune_exp.bench.shares import attentions_of, shares
from tokprune_exp.bench.texts import TimedTexts, Workload, micro_batches, timed_texts, workloads
from tokprune_exp.bench.variants import Variant, our_variants
from tokprune_exp.encoder.fast import DTYPES, Precision
from tokprune_exp.kernels.linear import fastest_product
from tokprune_exp.measure.metrics import METRICS
from tokprune_exp.model import PrunedClassifier, load_model
from tokprune_exp.tracking import hardware, versions, write_json

ONLY_RATIOS = (
    "Only ratios within this run are meaningful: the variants took turns, but times differ from run to run with clocks "
    "and neighbours. Quartiles are those over rounds."
)
CHECKED_BATCHES = 8
"""Batches on which the peers' logits are compared with ours."""
ROUNDS_OF_SHARES = 5
"""The shares of time are measured in no more rounds than this."""
PRECISIONS: dict[str, tuple[Precision, ...]] = {"fp32": ("fp32",), "bf16": ("bf16",), "both": ("fp32", "bf16")}


def bench(arguments: argparse.Namespace) -> None:
    """Measure, print the tables, and write the record.

    Raises:
        UserError: no model or no data is there, no batch can be filled, or the record cannot be written.
    """
    model, card = load_model(arguments.model_dir)
    output = writable(arguments.output or arguments.model_dir)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = screen()
    texts = timed_texts(arguments, card, model.encoder.shape.max_tokens)
    loads = workloads(texts.split, arguments.batch_sizes)
    prepared = {precision: model.for_inference(precision) for precision in PRECISIONS[arguments.precision]}
    first = next(iter(prepared.values()))

    console.print(f"Timing {len(texts.split)} texts of {texts.task.name}, {arguments.rounds} rounds …")
    all_texts = [texts.split.collate(rows) for rows in micro_batches(texts.split, torch.arange(len(texts.split)))]
    with Steps(console, "operating points", None):
        points, notes = operating_points(first, all_texts, arguments.reductions)
    if too_large := sorted({size for size in arguments.batch_sizes if size > len(texts.split)}):
        sizes = ", ".join(map(str, too_large))
        notes.append(f"Left out, as {len(texts.split)} texts do not fill it: batch size {sizes}.")

    with tempfile.TemporaryDirectory() as folder:
        measured = measure(model, prepared, points, loads, arguments, console, Path(folder))
    with Steps(console, "shares of time", None) as steps:
        parts = shares(first, loads, min(arguments.rounds, ROUNDS_OF_SHARES), steps.advance)
    record = {
        "command": shlex.join(["python", "-m", "tokprune_exp.bench", *sys.argv[1:]]),
        "model": {"directory": arguments.model_dir, "method": card.method, "task": card.task},
        "texts": texts.about(),
        "points": [{"name": point.name, "asked": point.asked, "knob": point.knob} for point in points],
        "warmup_rounds": WARMUP,
        "kernels": kernels(prepared),
        **measured,
        "best": best_of(measured["rows"]),
        "shares": parts,
        "accuracy": accuracy_of(model, prepared, texts),
        "notes": notes + measured["notes"],
        "note": ONLY_RATIOS,
        "versions": versions() | peer_versions(),
        "hardware": hardware(),
    }
    print_speed(record, console)
    write_json(output / "bench.json", record)
    write_rows(output / "bench.csv", csv_rows(record))
    written = [output / "bench.json", output / "bench.csv"]
    if any(row["point"] for row in record["rows"]):
        written += draw_speed(output / "bench.png", record, console)
    console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)


def measure(
    model: PrunedClassifier,
    prepared: dict[Precision, PrunedClassifier],
    points: Sequence[Point],
    loads: Sequence[Workload],
    arguments: argparse.Namespace,
    console: Console,
    folder: Path,
) -> dict[str, Any]:
    """Prepare the variants, see that they are one model, and let them race at each batch size."""
    dense, pruned = our_variants(prepared, points)
    with Steps(console, "peers", None):
        threads = torch.get_num_threads()
        peers, notes = find_peers(arguments.peers, model, threads, folder, dense[0].key)
        some = loads[0].sorted[:: max(1, loads[0].batches // CHECKED_BATCHES)]
        differences = check_same_model(model.for_inference(), peers, some)
    variants: list[Variant] = [*dense, *pruned, *peers]
    rows, padding = [], []
    with Steps(console, "race", len(loads) * len(variants) * (arguments.rounds + WARMUP)) as steps:
        for load in loads:
            steps.say(f"race, batch size {load.size}")
            timings = race(variants, load, arguments.rounds, steps.advance)
            rows += rows_of(variants, load, timings)
            padding.append(padding_of(variants, load, timings))
    return {"rows": rows, "padding": padding, "largest_difference_of_logits": differences, "notes": notes}


def accuracy_of(
    model: PrunedClassifier, prepared: dict[Precision, PrunedClassifier], texts: TimedTexts
) -> list[dict[str, Any]]:
    """Check bf16 where it was timed, on texts that have answers."""
    if "bf16" not in prepared or not texts.is_own_task:
        return []
    metrics = [name for name in texts.task.metrics if name in METRICS]
    full = prepared.get("fp32") or model.for_inference()
    return accuracy(full, prepared["bf16"], texts.split, metrics, texts.task.is_regression)


def kernels(prepared: dict[Precision, PrunedClassifier]) -> dict[str, str]:
    """Say which product and which attention our model was run with."""
    found = {f"product_{precision}": fastest_product(DTYPES[precision]).__name__ for precision in prepared}
    return {**found, "attention": next(iter(attentions_of(next(iter(prepared.values())))))}


def peer_versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    return {name: metadata.version(name) for name in ("onnx", "onnxruntime", "openvino") if find_spec(name)}


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measured rows, each with what is needed to read it alone."""
    about = {
        "method": record["model"]["method"],
        "task": record["model"]["task"],
        "texts_of": record["texts"]["task"],
        "cpu": record["hardware"]["cpu"],
        "threads": record["hardware"]["threads"],
        **record["kernels"],
        **{name: record["versions"][name] for name in ("tokprune_exp", "torch", "transformers")},
        "command": record["command"],
    }
    return [{**row, **about} for row in record["rows"]]
