"""Oracle for `+method=finetune`: the same weights and recipe in plain transformers and a plain PyTorch loop.

    python tests/oracles/finetune_with_transformers.py --weights DIR --task sst2 --data-root DIR --epochs 3 --seed 0

compares with

    python -m tokprune_exp +method=finetune task=sst2 backbone.path=DIR data.root=DIR seed=0

whose metric must agree within half a point. Shared on purpose are the texts, tokens and batches, the slice that chooses
the epoch, and the functions that compute metrics; model, loss, optimizer, schedule and loop are transformers' and
torch's. The recipe: AdamW at 5e-5, decay 0.01 except for biases and norms, batches of 32 of similar length, 10 %
linear warm-up then linear decay, gradient norm at most 1, bf16 autocast where the CPU multiplies bf16, dropout on.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup, set_seed

from tokprune_exp.config import load_task
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.batches import BatchLoader, length_grouped_batches
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.task import Task
from tokprune_exp.errors import UserError
from tokprune_exp.measure.metrics import evaluate_metrics
from tokprune_exp.precision import resolve_precision, use_fast_exact_float32


def main() -> None:
    arguments = read_arguments()
    try:
        result = finetune(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(f"Written: {arguments.output}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune with plain transformers.")
    parser.add_argument("--weights", required=True, help="directory in the layout of Hugging Face")
    parser.add_argument("--task", required=True, help="name of a file of conf/task")
    parser.add_argument("--data-root", default=os.environ.get("TOKPRUNE_DATA"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="train and report on no more examples than this: does it run?")
    parser.add_argument("--output", type=Path, default=Path("finetune_with_transformers.json"))
    return parser.parse_args()


def finetune(arguments: argparse.Namespace) -> dict[str, object]:
    """Train, choose the epoch on the selection slice, report once on the evaluation split."""
    set_seed(arguments.seed)
    use_fast_exact_float32()
    task = load_task(arguments.task)
    data = TaskData(task, settings(arguments))
    model, newly_initialised = classifier(arguments.weights, task)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=5e-5, fused=True)
    steps = arguments.epochs * len(data.train_dataloader())
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    precision = resolve_precision("auto", "cpu")
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()

    best, chosen, history, started = float("-inf"), model.state_dict(), [], time.perf_counter()
    for epoch in range(arguments.epochs):
        model.train()
        order = length_grouped_batches(data.train.lengths, data.settings.batch_size, arguments.seed, epoch)
        for batch in BatchLoader(data.train, order):
            with autocast:
                loss = model(**inputs(batch, task), labels=batch.labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with autocast:
            scores = metrics(model, data.val_dataloader(), task)
        history.append({"loss_of_last_batch": loss.item(), "selection": scores})
        print(f"epoch {epoch}: {history[-1]}", flush=True)
        if scores[task.metrics[0]] > best:
            best = scores[task.metrics[0]]
            chosen = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model.load_state_dict(chosen)
    return {
        "metrics": metrics(model, data.evaluation_batches(), task),
        "task": task.name,
        "weights": arguments.weights,
        "seed": arguments.seed,
        "epochs": history,
        "precision": precision,
        "newly_initialised": newly_initialised,
        "data": data.source,
        "seconds": time.perf_counter() - started,
        "torch": torch.__version__,
    }


def settings(arguments: argparse.Namespace) -> SimpleNamespace:
    """What a run has in its group `data`; the values not given here are its defaults."""
    return SimpleNamespace(
        root=arguments.data_root,
        source=None,
        cache=os.environ.get("TOKPRUNE_CACHE", "~/.cache/tokprune_exp"),
        batch_size=32,
        evaluation_batch_size=32,
        selection_examples=1000,
        max_train_examples=arguments.limit,
        max_evaluation_examples=arguments.limit,
        train_shorter_than=None,
        cut_missing_split=False,
        tokenizer=arguments.weights,
        seed=arguments.seed,
    )


def classifier(weights: str, task: Task) -> tuple[torch.nn.Module, list[str]]:
    """transformers' classifier and the names of its parameters that the checkpoint lacks (the pooler, for one)."""
    model, report = AutoModelForSequenceClassification.from_pretrained(
        weights, num_labels=task.outputs, dtype=torch.float32, output_loading_info=True
    )
    return model, sorted(report["missing_keys"])


def parameter_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    """Biases and the parameters of norms apart, without decay."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[not (name.endswith("bias") or "LayerNorm" in name or "layer_norm" in name)].append(parameter)
    return [{"params": groups[True], "weight_decay": 0.01}, {"params": groups[False], "weight_decay": 0.0}]


def inputs(batch: Batch, task: Task) -> dict[str, torch.Tensor]:
    """A batch under transformers' names."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.valid.long(),
        # of a single text all types are 0, which models fill in themselves; DistilBERT and RoBERTa take none
        **({"token_type_ids": batch.token_type_ids} if len(task.text) == 2 and batch.token_type_ids.any() else {}),
    }


@torch.inference_mode()
def metrics(model: torch.nn.Module, batches: Iterable[Batch], task: Task) -> dict[str, float]:
    """The task's metrics, dropout off."""
    model.eval()
    results = [(model(**inputs(batch, task)).logits.float(), batch.labels) for batch in batches]
    logits, labels = (torch.cat(parts) for parts in zip(*results, strict=True))
    return evaluate_metrics(task.metrics, logits, labels)


if __name__ == "__main__":
    main()
