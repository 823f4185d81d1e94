"""Threshold against top-k: `python -m tokprune_exp.bench selection` (LTP, appendix B, Fig. A.6).

What is timed on random importances of a batch of texts, all of one length:

    compare             s > θ: a mask, as LTP times it
    compare + indices   and the indices of what is kept, which removing tokens needs
    top-k, sorted       the k largest in their order, torch's default; unsorted: in any order
    k-th value, compare the k-th largest as a threshold of each text
    argsort             all of them in order, of which the first k are taken

θ keeps the same share as k. Whether it matters is told by a BERT-base layer over the same tokens, timed in the same
run.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from tokprune_exp.bench.arguments import writable
from tokprune_exp.bench.files import write_rows
from tokprune_exp.bench.picture import draw_selection
from tokprune_exp.bench.race import WARMUP
from tokprune_exp.bench.report import new_table
from tokprune_exp.bench.screen import Steps, screen
from tokprune_exp.encoder.encoder import EncoderShape, PrunedEncoder
from tokprune_exp.encoder.fast import FastLayer, fast_encoder
from tokprune_exp.encoder.layout import Packed, Sequences, Wants
from tokprune_exp.measure.latency import interleaved_medians
from tokprune_exp.serving import BATCH_TOKENS
from tokprune_exp.tracking import hardware, versions, write_json

SHARES = [tenths / 10 for tenths in range(1, 10)]
"""Shares of the tokens that are kept."""
DRAWS = 8
"""Different importances that a call goes through, so that no branch is learned by heart."""
AT_LEAST = 5e-4
"""Seconds that one measurement takes: a way of some microseconds is repeated until it does. So short that most are not
interrupted by what else runs, and the median over many of them is not touched by those that are."""
LAYER_ROUNDS = 3
BERT_BASE = EncoderShape(vocabulary=8, dim=768, heads=12, layers=1, ff_dim=3072, positions=2)

Way = Callable[[Float[Tensor, "batch tokens"], int, float], Any]

COMPARE, THRESHOLD = "compare", "compare + indices"
WAYS: dict[str, Way] = {
    COMPARE: lambda scores, k, threshold: scores > threshold,
    THRESHOLD: lambda scores, k, threshold: (scores > threshold).flatten().nonzero(),
    "top-k, sorted": lambda scores, k, threshold: scores.topk(k),
    "top-k, unsorted": lambda scores, k, threshold: scores.topk(k, sorted=False),
    "k-th value, compare": lambda scores, k, threshold: (
        scores >= scores.kthvalue(scores.shape[1] - k + 1, dim=1, keepdim=True).values
    ),
    "argsort": lambda scores, k, threshold: scores.argsort(dim=1, descending=True)[:, :k],
}


def bench(arguments: argparse.Namespace) -> None:
    """Measure, print the table, and write the record.

    Raises:
        UserError: the record cannot be written.
    """
    output = writable(arguments.output or Path("outputs/bench_selection"))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = screen()
    lengths = sorted(set(arguments.lengths))
    with Steps(console, "selection", len(lengths) * (len(SHARES) + 1)) as steps:
        rows: list[dict[str, Any]] = []
        for length in lengths:
            steps.say(f"selection, {length} tokens")
            layer = seconds_of_layer(arguments.batch, length)
            steps.advance()
            for share in SHARES:
                rows += measure(arguments.batch, length, share, arguments.rounds, layer)
                steps.advance()
    record = {
        "command": shlex.join(["python", "-m", "tokprune_exp.bench", *sys.argv[1:]]),
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "warmup_rounds": WARMUP,
        "rows": rows,
        "versions": versions(),
        "hardware": hardware(),
    }
    for table in tables_of(record):
        console.print(table)
    write_json(output / "selection.json", record)
    write_rows(output / "selection.csv", rows)
    written = [output / "selection.json", output / "selection.csv"]
    written += draw_selection(output / "selection.png", record, console)
    console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)


@torch.inference_mode()
def measure(batch: int, length: int, share: float, rounds: int, layer: float) -> list[dict[str, Any]]:
    """Time every way of keeping a share of the tokens; one row each, `layer` being the seconds of a BERT-base layer."""
    generator = torch.Generator().manual_seed(0)
    draws = cycle(torch.rand(DRAWS, batch, length, generator=generator))
    k, threshold = kept(length, share), 1 - share

    def repeated(way: Way, times: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                way(next(draws), k, threshold)

        return run

    times = {name: repeats(repeated(way, DRAWS)) for name, way in WAYS.items()}
    calls = {name: repeated(way, times[name]) for name, way in WAYS.items()}
    timings = interleaved_medians(calls, rounds, WARMUP)
    medians = {name: timing.median_s / times[name] for name, timing in timings.items()}

    def over(name: str, other: str) -> float:
        return timings[name].over(timings[other]).median * times[other] / times[name]

    return [
        {
            "length": length,
            "kept_share": share,
            "kept": k,
            "way": name,
            "us": 1e6 * medians[name],
            "us_quartiles": [1e6 * second / times[name] for second in timings[name].quartiles_s],
            "over_compare": over(name, COMPARE),
            "over_threshold": over(name, THRESHOLD),
            "layer_ms": 1e3 * layer,
            "share_of_layer": medians[name] / layer,
        }
        for name in WAYS
    ]


def kept(length: int, share: float) -> int:
    """Return ⌈share · length⌉, where a share that is a whole number of tokens stays that number."""
    return math.ceil(share * length - 1e-9)


def repeats(call: Callable[[], None]) -> int:
    """Say how often a way has to run for a measurement to last, from a call that runs it `DRAWS` times."""
    call()
    start = time.perf_counter()
    call()
    return math.ceil(AT_LEAST * DRAWS / (time.perf_counter() - start))


@torch.inference_mode()
def seconds_of_layer(batch: int, length: int) -> float:
    """Time one BERT-base layer in fp32 with scores asked for over a batch, in micro-batches as it would be served."""
    encoder = fast_encoder(PrunedEncoder(BERT_BASE).eval(), "fp32")
    layer = encoder.layers[0]
    assert isinstance(layer, FastLayer)
    texts = max(1, BATCH_TOKENS // length)
    parts = []
    for start in range(0, batch, texts):
        valid = torch.ones(min(texts, batch - start), length, dtype=torch.bool)
        layout = Packed.start(Sequences(valid, torch.zeros_like(valid)))
        parts.append((torch.randn(valid.numel(), BERT_BASE.dim), layout))

    def run() -> None:
        for hidden, layout in parts:
            attended = layer.attend(hidden, hidden, layout, layout, Wants(received=True))
            layer.finish(hidden, attended.context)

    return interleaved_medians({"layer": run}, LAYER_ROUNDS, WARMUP)["layer"].median_s


def tables_of(record: dict[str, Any]) -> list[Table]:
    """Lay out the times at some shares, a table per length."""
    machine = record["hardware"]
    tables = []
    for length in dict.fromkeys(row["length"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["length"] == length]
        shown = [share for share in SHARES if share in (0.1, 0.5, 0.9)]
        table = new_table(
            f"{record['batch']} texts of {length} tokens, {machine['threads']} thread"
            f"{'s' if machine['threads'] > 1 else ''}; a BERT-base layer takes {rows[0]['layer_ms']:.0f} ms",
            "µs if so much is kept",
            *(f"{share:.0%}" for share in shown),
            "50 %: ÷ compare",
            "÷ with indices",
            "worst, of a layer",
        )
        for way in WAYS:
            of_way = {row["kept_share"]: row for row in rows if row["way"] == way}
            half = of_way[0.5]
            table.add_row(
                way,
                *(f"{of_way[share]['us']:.1f}" for share in shown),
                f"{half['over_compare']:.1f}×",
                f"{half['over_threshold']:.2f}×",
                f"{max(row['share_of_layer'] for row in of_way.values()):.4%}",
            )
        tables.append(table)
    return tables
