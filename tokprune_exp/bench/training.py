"""What an epoch of each method costs: `python -m tokprune_exp.bench training`, against plain fine-tuning.

    transformers   transformers' own model (SDPA) with the same weights, a plain loop: autocast, backward, clip, AdamW
    finetune       ours, the same training
    ltp_soft       LTP's soft stage: thresholds and weights, through soft masks
    ltp_hard       LTP's hard stage, at the thresholds that training starts from
    adtp           AD-TP's student, its teacher's signals cached

What is timed is training as a run does it: configurations composed as on the command line, methods built and their
stages prepared by the code of a run, each chunk of batches fitted by the configured Trainer. The clock runs from the
first batch to the last, optimizer and learning-rate steps and the terms' bookkeeping in it; loading, the teacher's
signals, validation and checkpoints are not. Nor is turning AD-TP's knob back to its cost, which a run does a few times
in a stage: it is timed on its own.

Every variant trains on the same batches in the same precision, dropout on, with the fp32 products that a run chooses.
They take turns over chunks of the batches, so that what else the machine does hits all alike; a new optimizer begins
each chunk, and a first chunk that is not counted warms up.
"""

import argparse
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Timer
from rich.table import Table
from torch import Tensor, nn

from tokprune_exp.bench.arguments import writable
from tokprune_exp.bench.files import write_rows
from tokprune_exp.bench.peers import PlainTransformers
from tokprune_exp.bench.report import new_table
from tokprune_exp.bench.screen import Steps, screen
from tokprune_exp.build import as_backbone, bounds_are_user_errors, build_data, build_method, build_model
from tokprune_exp.config import check_config, config_directory, instantiate
from tokprune_exp.data.batches import BatchLoader, length_grouped_batches
from tokprune_exp.encoder.pretrained import load_backbone
from tokprune_exp.errors import UserError
from tokprune_exp.losses import task_loss
from tokprune_exp.measure.latency import Timing
from tokprune_exp.methods.module import PruningModule
from tokprune_exp.methods.student import CALIBRATIONS, StudentModule
from tokprune_exp.precision import resolve_precision, use_fast_exact_float32
from tokprune_exp.tracking import hardware, quieten_lightning, versions, write_json

CHUNK = 8
"""Batches that a variant trains on before it is another one's turn."""
AIMS = {"ltp_soft": 1.3, "adtp": 3.5}
"""The most that an epoch may cost, as a multiple of plain fine-tuning."""
STAGES = {
    "finetune": ("finetune", ["finetune"]),
    "ltp_soft": ("ltp", ["soft"]),
    "ltp_hard": ("ltp", ["soft", "hard"]),
    "adtp": ("adtp", ["student"]),
}
"""Method of each variant and the stages that are prepared, of which the last one is trained."""
REFERENCE = "transformers"

Train = Callable[[list[Tensor]], float]
"""Train on the batches of these rows and return the seconds that it took."""


def bench(arguments: argparse.Namespace) -> None:
    """Measure, print the table, and write the record.

    Raises:
        UserError: the task, its data or the weights are not there, or the record cannot be written.
    """
    output = writable(arguments.output or Path("outputs/bench_training"))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    use_fast_exact_float32()  # as a run does
    quieten_lightning()
    console = screen()
    console.print(f"Timing training on {arguments.examples} texts of {arguments.task}, {arguments.rounds} rounds …")
    precision = resolve_precision("auto", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        with Steps(console, "preparing", None):
            prepared = {name: prepare(name, arguments, precision, Path(folder)) for name in STAGES}
            trainers: dict[str, Train] = {REFERENCE: PlainLoop(prepared["finetune"], precision)}
            trainers |= {name: Fitted(each, precision, Path(folder)) for name, each in prepared.items()}
        data = prepared["finetune"].data
        order = length_grouped_batches(data.train.lengths, data.settings.batch_size, data.settings.seed, epoch=0)
        with Steps(console, "training", None) as steps:
            seconds = race(trainers, order, arguments.rounds, steps)
    rows = rows_of(seconds)
    record = {
        "command": shlex.join(["python", "-m", "tokprune_exp.bench", *sys.argv[1:]]),
        "task": arguments.task,
        "backbone": prepared["finetune"].backbone,
        "examples": len(data.train),
        "batches": len(order),
        "batch_size": data.settings.batch_size,
        "chunk": CHUNK,
        "precision": precision,
        "rows": rows,
        "seconds_of_holding_adtp_at_its_cost": prepared["adtp"].seconds_of_holding,
        "texts": data.source,
        "versions": versions(),
        "hardware": hardware(),
    }
    console.print(table_of(record))
    console.print(
        f"Turning AD-TP's knob back to its cost takes {record['seconds_of_holding_adtp_at_its_cost']:.1f} s and is "
        f"not in it: a run does it {CALIBRATIONS} times in a stage and at the end of each epoch."
    )
    write_json(output / "training.json", record)
    write_rows(output / "training.csv", rows)
    console.print(f"Written: {output / 'training.json'}, {output / 'training.csv'}", soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------
# Who trains


@dataclass
class Prepared:
    """A method that is about to train, its data, and what its configuration says of trainer and optimizer."""

    method: PruningModule
    data: Any
    trainer: Any
    optimizer: Any
    backbone: str
    seconds_of_holding: float = 0.0


def prepare(name: str, arguments: argparse.Namespace, precision: str, folder: Path) -> Prepared:
    """Compose a configuration, build its method as a run does, and prepare the stage that is timed."""
    method_name, stages = STAGES[name]
    chosen = [
        f"+method={method_name}",
        f"task={arguments.task}",
        f"data.max_train_examples={arguments.examples}",
        "data.max_evaluation_examples=256",
        "data.selection_examples=64",
        "data.cut_missing_split=true",
        "logger=none",
        "trainer.enable_progress_bar=false",
        *arguments.overrides,
    ]
    if arguments.data_root is not None:
        chosen.append(f"data.root='{arguments.data_root}'")
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            cfg = compose("config", chosen)
    except HydraException as error:
        raise UserError(f"{' '.join(chosen)}: {str(error).strip().splitlines()[0]}") from error
    check_config(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    with bounds_are_user_errors():
        backbone = load_backbone(as_backbone(cfg.backbone), cfg.data.cache)
        data = build_data(cfg, backbone.tokenizer, cfg.task)
        method = build_method(cfg, build_model(cfg, backbone, data.task), data)
    for stage in method.stages():
        if stage.name in stages and stage.before is not None:
            stage.before(data, torch.device("cpu"))
    method.prefix = stages[-1]
    prepared = Prepared(method, data, instantiate(cfg.trainer), instantiate(cfg.optimizer), cfg.backbone.name)
    if isinstance(method, StudentModule) and method.target_share is not None:
        start = time.perf_counter()
        method.hold_share()
        prepared.seconds_of_holding = time.perf_counter() - start
        method.target_share = None
    return prepared


class Fitted:
    """Trains a method by the configured Trainer."""

    def __init__(self, prepared: Prepared, precision: str, folder: Path) -> None:
        self.method, self.split = prepared.method, prepared.data.train
        self.build_trainer = partial(
            prepared.trainer,
            accelerator="cpu",
            precision=precision,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )

    def __call__(self, batches: list[Tensor]) -> float:
        """Fit the method to the batches of these rows once."""
        timer = Timer()
        self.method.train()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You defined a `validation_step`")  # it is not part of the time
            self.build_trainer(callbacks=[timer]).fit(self.method, BatchLoader(self.split, batches))
        return timer.time_elapsed("train")


class PlainLoop:
    """Trains transformers' own model in a plain PyTorch loop, from the weights and by the recipe of `finetune`."""

    def __init__(self, finetune: Prepared, precision: str) -> None:
        self.model = PlainTransformers(finetune.method.model)
        self.split, self.optimizer, self.precision = finetune.data.train, finetune.optimizer, precision
        self.model.head = deepcopy(self.model.head)  # else both would train it

    def __call__(self, batches: list[Tensor]) -> float:
        """Train on the batches of these rows once."""
        self.model.train()
        decays = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]
        optimizer = self.optimizer([{"params": decays}, {"params": others, "weight_decay": 0.0}])
        steps = len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)
        start = time.perf_counter()
        for batch in BatchLoader(self.split, batches):
            with self.autocast():
                loss = task_loss(self.model(batch).float(), batch.labels).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the precision in which the methods train."""
        return torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16-mixed" else nullcontext()


# ---------------------------------------------------------------------------------------------------------------
# The race


def race(
    trainers: Mapping[str, Train],
    order: Sequence[Tensor],
    rounds: int,
    steps: Steps,
) -> dict[str, list[float]]:
    """Return the seconds that each variant takes for all batches, an entry per round; they take turns by chunks."""
    chunks = [list(order[start : start + CHUNK]) for start in range(0, len(order), CHUNK)]

    def train(name: str, chunk: list[Tensor]) -> float:
        steps.say(f"training, {name}")
        took = trainers[name](chunk)
        steps.advance()
        return took

    for name in trainers:
        train(name, chunks[0])
    seconds = {name: [0.0] * rounds for name in trainers}
    for round_ in range(rounds):
        for number, chunk in enumerate(chunks):
            names = list(trainers) if (round_ + number) % 2 == 0 else list(trainers)[::-1]
            for name in names:
                seconds[name][round_] += train(name, chunk)
    return seconds


def rows_of(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Say for each variant what an epoch takes, and how many times as long as plain fine-tuning."""
    rows = []
    for name, each in seconds.items():
        ratio = Timing(list(each)).over(Timing(list(seconds[REFERENCE])))
        rows.append(
            {
                "variant": name,
                "seconds": Timing(list(each)).median_s,
                "seconds_quartiles": list(Timing(list(each)).quartiles_s),
                "ratio": ratio.median,
                "ratio_quartiles": list(ratio.quartiles),
                "aim": AIMS.get(name),
                "rounds": len(each),
            }
        )
    return rows


def table_of(record: Mapping[str, Any]) -> Table:
    """Lay out the times and the ratios, each aim beside what was reached."""
    machine = record["hardware"]
    table = new_table(
        f"An epoch: {record['examples']} texts of {record['task']}, {record['backbone']}, {record['batches']} batches "
        f"of {record['batch_size']}, {record['precision']}, threads: {machine['threads']}",
        "training",
        "seconds",
        "÷ transformers",
        "aim",
        "",
    )
    for row in record["rows"]:
        (least, most), aim = row["ratio_quartiles"], row["aim"]
        table.add_row(
            row["variant"],
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.2f} ({least:.2f}–{most:.2f})",
            "" if aim is None else f"at most {aim}",
            "" if aim is None else "met" if row["ratio"] <= aim else "not met",
        )
    return table
