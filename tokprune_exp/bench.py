"""How much faster a trained model is on the CPU, measured on texts of its task, against what it is compared with.

    python -m tokprune_exp.bench MODEL_DIR --batch-sizes 1 8 32 128

Three variants take turns on the same length-sorted batches: the pruned model; (a) the same weights unpruned in the same
gathered code; (b) the same weights in plain transformers (scaled-dot-product attention, padded to the longest text of
each batch). (b) / (a) is what not computing padding and the code are worth; that is not pruning.
"""

import argparse
import csv
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tokprune_exp.config import load_task
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.sources import load_source, texts_of
from tokprune_exp.data.tokenise import EncodedSplit, encode_texts
from tokprune_exp.encoder.pretrained import load_tokenizer, to_transformers, transformers_config
from tokprune_exp.errors import UserError
from tokprune_exp.measure.flops import FlopsReport
from tokprune_exp.measure.latency import compare_latency, length_sorted_chunks
from tokprune_exp.model import ModelCard, PrunedClassifier, load_model
from tokprune_exp.precision import use_fast_exact_float32
from tokprune_exp.tracking import hardware, versions, write_json

ONLY_RATIOS = (
    "Only ratios within this run are meaningful: the variants took turns, but times differ from run to run "
    "with clocks and neighbours. Quartiles are those over rounds."
)
TOLERANCE = 1e-3
"""Largest difference of logits at which plain transformers counts as the same model."""


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit code 2."""
    arguments = read_arguments()
    try:
        bench(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tokprune_exp.bench",
        description="Time a trained model against its unpruned self and against plain transformers.",
    )
    parser.add_argument("model_dir", type=Path, help="a model directory: model/ of a finished run")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8, 32, 128], metavar="N")
    parser.add_argument("--examples", type=positive, default=256, metavar="N", help="texts of the reported split")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="measurements of each variant")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: what torch chooses)")
    root = os.environ.get("TOKPRUNE_DATA")
    parser.add_argument("--data-root", metavar="DIR", default=root, help="data.root of a run (default: $TOKPRUNE_DATA)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for bench.json and bench.csv (default: MODEL_DIR)")
    return parser.parse_args()


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def bench(arguments: argparse.Namespace) -> None:
    """Measure, print the table, and write the record.

    Raises:
        UserError: no model or no data is there, no batch can be filled, or the record cannot be written.
    """
    model, card = load_model(arguments.model_dir)
    output = writable(arguments.output or arguments.model_dir)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    use_fast_exact_float32()
    is_fast = torch.get_float32_matmul_precision() == "medium"
    split, source = evaluation_texts(arguments, card)
    console = Console(highlight=False)
    console.print(f"Timing {len(split)} texts of {card.task}, {arguments.rounds} rounds of three variants …")
    record = {
        "command": shlex.join(["python", "-m", "tokprune_exp.bench", *sys.argv[1:]]),
        "model": {"directory": arguments.model_dir, "method": card.method, "task": card.task},
        "float32_products": "oneDNN, measured to be as exact as the default" if is_fast else "torch's default",
        "attention_of_transformers": "sdpa",
        "note": ONLY_RATIOS,
        "texts": source,
        "versions": versions(),
        "hardware": hardware(),
        "rows": measure(model, split, arguments.batch_sizes, arguments.rounds),
    }
    console.print(table_of(record))
    if too_large := [size for size in arguments.batch_sizes if size > len(split)]:
        console.print(f"Left out, as {len(split)} texts do not fill it: batch size {', '.join(map(str, too_large))}.")
    console.print(f"fp32 products, all variants: {record['float32_products']}. {ONLY_RATIOS}")
    write_json(output / "bench.json", record)
    write_csv(output / "bench.csv", record)
    console.print(f"Written: {output / 'bench.json'}, {output / 'bench.csv'}", soft_wrap=True)


def writable(directory: Path) -> Path:
    """Make a directory, before a long measurement and not after it.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {directory} cannot be made: {error.strerror}") from error
    if not os.access(directory, os.W_OK):
        raise UserError(f"{directory} cannot be written to; name another directory with --output DIR")
    return directory


# ---------------------------------------------------------------------------------------------------------------
# What is measured


def evaluation_texts(arguments: argparse.Namespace, card: ModelCard) -> tuple[EncodedSplit, dict[str, Any]]:
    """Encode some texts of the split that the model's task reports on; and say where they came from."""
    task = load_task(card.task)
    settings = SimpleNamespace(
        root=arguments.data_root,
        source=None,
        cache=os.environ.get("TOKPRUNE_CACHE", "~/.cache/tokprune_exp"),
        selection_examples=1,
        max_train_examples=1,
        max_evaluation_examples=arguments.examples,
        cut_missing_split=True,
    )
    source = load_source(task, settings)
    texts = texts_of(source.evaluation, task)
    tokenizer = load_tokenizer(arguments.model_dir)
    return encode_texts(tokenizer, texts, card.max_tokens), source.description["evaluation"]


@torch.inference_mode()
def measure(model: PrunedClassifier, split: EncodedSplit, batch_sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Time the three variants at each batch size that the texts fill; one row per size.

    `flops_reduction` is that of the very texts timed, unpadded, scorer and retainer charged; `attained` the share of it
    that the speed-up over (a) reaches. It can exceed 1: softmax, no part of FLOPs, falls with the square of the tokens.

    Raises:
        UserError: there are fewer texts than the smallest batch holds.
    """
    batches = {
        size: [split.collate(rows) for rows in length_sorted_chunks(split.lengths.tolist(), size)]
        for size in sorted(set(batch_sizes))
        if size <= len(split)
    }
    if not batches:
        raise UserError(f"{len(split)} texts fill no batch of {min(batch_sizes)}: raise --examples")
    plain = PlainTransformers(model)
    smallest = next(iter(batches.values()))
    check_same_model(model, plain, smallest[:: max(1, len(smallest) // 8)])
    rows = compare_latency(
        partial(model, execution="gathered"),
        partial(model, execution="gathered", prune=False),
        batches,
        rounds,
        hugging_face=plain,
    )
    return [row | reached(row, flops_reduction(model, batches[row["batch_size"]])) for row in rows]


def reached(row: Mapping[str, Any], reduction: float) -> dict[str, float]:
    """Compare a row's speed-up with the reduction of FLOPs, and turn its times into throughput."""
    variants = ("pruned", "dense", "hugging_face")
    throughput = {f"{name}_texts_per_s": 1e3 * row["batch_size"] / row[f"{name}_ms"] for name in variants}
    return {**throughput, "flops_reduction": reduction, "attained": row["speedup"] / reduction}


def flops_reduction(model: PrunedClassifier, batches: Iterable[Batch]) -> float:
    """Divide the FLOPs of the unpruned encoder by those of the pruned one and its pruner, at unpadded lengths."""
    report = FlopsReport(model.encoder.shape.dim, model.encoder.shape.ff_dim)
    for batch in batches:
        trace = model(batch, "gathered").trace
        report.update(trace, 0 if model.pruning is None else model.pruning.macs(trace))
    return report.summary(published_length=1)["reduction_unpadded"]


# ---------------------------------------------------------------------------------------------------------------
# Plain transformers


class PlainTransformers(nn.Module):
    """The same weights in transformers' own model, unpruned and padded, with our head on the first token."""

    def __init__(self, model: PrunedClassifier) -> None:
        super().__init__()
        self.encoder = to_transformers(model.encoder, transformers_config(model.encoder.shape))
        self.encoder.pooler = None  # it has no weights of ours, and the head holds the pooler
        self.head = model.head
        self.takes_types = model.encoder.shape.token_types > 0
        self.eval()

    def forward(self, batch: Batch) -> Float[Tensor, "batch outputs"]:
        """Compute logits of a padded batch."""
        types = {"token_type_ids": batch.token_type_ids} if self.takes_types else {}
        encoded = self.encoder(input_ids=batch.input_ids, attention_mask=batch.valid.long(), **types)
        return self.head(encoded.last_hidden_state[:, 0])


def check_same_model(model: PrunedClassifier, plain: PlainTransformers, batches: Iterable[Batch]) -> None:
    """Compare the logits of our unpruned model with those of transformers: a race of two models would say nothing.

    Raises:
        RuntimeError: they differ.
    """
    for batch in batches:
        difference = (model(batch, "gathered", prune=False).logits - plain(batch)).abs().max().item()
        if difference > TOLERANCE:
            raise RuntimeError(
                f"plain transformers with the same weights puts out other logits (by {difference:.2g}), so its time "
                f"cannot be compared"
            )


# ---------------------------------------------------------------------------------------------------------------
# What is said


@dataclass(frozen=True)
class Line:
    """One line of the table: its name, the key of the rows and how the value is written."""

    name: str
    key: str
    form: str


LINES = [
    Line("ms per batch: pruned", "pruned_ms", "{:.2f}"),
    Line("  (a) unpruned, same code", "dense_ms", "{:.2f}"),
    Line("  (b) plain transformers", "hugging_face_ms", "{:.2f}"),
    Line("texts per second: pruned", "pruned_texts_per_s", "{:.0f}"),
    Line("  (a) unpruned, same code", "dense_texts_per_s", "{:.0f}"),
    Line("  (b) plain transformers", "hugging_face_texts_per_s", "{:.0f}"),
    Line("speed-up over (a)", "speedup", "{:.2f}×"),
    Line("  quartiles", "speedup_quartiles", "{0[0]:.2f}–{0[1]:.2f}"),
    Line("speed-up over (b)", "speedup_over_hugging_face", "{:.2f}×"),
    Line("  quartiles", "speedup_over_hugging_face_quartiles", "{0[0]:.2f}–{0[1]:.2f}"),
    Line("FLOPs reduction, unpadded", "flops_reduction", "{:.2f}×"),
    Line("attained: (a) / reduction", "attained", "{:.0%}"),
]


def table_of(record: Mapping[str, Any]) -> Table:
    """Lay out the measurement, a column per batch size."""
    model, machine, rows = record["model"], record["hardware"], record["rows"]
    title = (
        f"{model['method']} · {model['task']} · {record['texts']['rows_used']} texts · {rows[0]['rounds']} rounds · "
        f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} of {machine['cpu']}"
    )
    table = Table(box=box.SIMPLE, title=title)
    table.add_column("batch size")
    for row in rows:
        table.add_column(str(row["batch_size"]), justify="right")
    for line in LINES:
        table.add_row(line.name, *(line.form.format(row[line.key]) for row in rows))
    return table


def write_csv(path: Path, record: Mapping[str, Any]) -> None:
    """Write a line per batch size, each with what is needed to read it alone; quartiles are two columns."""
    about = {key: record["model"][key] for key in ("method", "task")} | {
        "cpu": record["hardware"]["cpu"],
        "transformers": record["versions"]["transformers"],
        "tokprune_exp": record["versions"]["tokprune_exp"],
        "float32_products": record["float32_products"],
        "command": record["command"],
    }
    lines = []
    for row in record["rows"]:
        line: dict[str, Any] = {}
        for name, value in row.items():
            line |= {f"{name}_1": value[0], f"{name}_3": value[1]} if name.endswith("_quartiles") else {name: value}
        lines.append(line | about)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
