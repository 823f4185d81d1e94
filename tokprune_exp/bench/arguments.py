"""What the three commands of the bench are told on the command line; nothing heavy is imported before it is read."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from tokprune_exp.errors import UserError

COMMANDS = ("selection", "training")
PEERS = ("transformers", "onnxruntime", "openvino")
PROGRAM = "python -m tokprune_exp.bench"


def read_arguments(given: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `command` is speed, selection or training."""
    command = given[0] if given and given[0] in COMMANDS else "speed"
    parser = {"speed": _speed, "selection": _selection, "training": _training}[command]()
    arguments = parser.parse_args(given if command == "speed" else given[1:])
    arguments.command = command
    if command == "speed" and "none" in arguments.peers:
        if len(arguments.peers) > 1:
            parser.error(f"--peers none stands alone, not with {' '.join(sorted(set(arguments.peers) - {'none'}))}")
        arguments.peers = []
    return arguments


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


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def above_one(text: str) -> float:
    """Read a number above 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 1")
    return number


def _speed() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Time a trained model against its dense self and against other runtimes. Other commands: "
        f"{PROGRAM} selection, {PROGRAM} training.",
    )
    parser.add_argument("model_dir", type=Path, help="a model directory: model/ of a finished run")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8, 32, 128], metavar="N")
    parser.add_argument(
        "--reductions",
        type=above_one,
        nargs="+",
        default=[],
        metavar="X",
        help="also time the model pruned to these reductions of its FLOPs, unpadded, e.g. 2.1 4",
    )
    parser.add_argument("--precision", choices=["fp32", "bf16", "both"], default="fp32", help="of our own model")
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "none"], default=list(PEERS), metavar="PEER")
    parser.add_argument("--texts-of", metavar="TASK", help="time on the texts of another task than the model's own")
    parser.add_argument("--examples", type=positive, default=256, metavar="N", help="texts of the reported split")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="measurements of each variant")
    _common(parser, "MODEL_DIR")
    _data_root(parser)
    return parser


def _selection() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} selection", description="Time choosing tokens by a threshold against top-k (LTP, Fig. A.6)."
    )
    parser.add_argument("--lengths", type=positive, nargs="+", default=[128, 256, 512, 1024], metavar="N")
    parser.add_argument("--batch", type=positive, default=32, metavar="N", help="texts of a batch")
    parser.add_argument("--rounds", type=positive, default=31, metavar="N", help="measurements of each way")
    _common(parser, "outputs/bench_selection")
    return parser


def _training() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} training", description="Time an epoch of each method against plain fine-tuning."
    )
    parser.add_argument("--task", default="sst2", metavar="TASK")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="further choices of the configuration: backbone=gte_small"
    )
    parser.add_argument("--examples", type=positive, default=2048, metavar="N", help="training texts")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="measurements of each method")
    _common(parser, "outputs/bench_training")
    _data_root(parser)
    return parser


def _common(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: what torch chooses)")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"for tables and picture (default: {output})")


def _data_root(parser: argparse.ArgumentParser) -> None:
    root = os.environ.get("TOKPRUNE_DATA")
    parser.add_argument("--data-root", metavar="DIR", default=root, help="data.root of a run (default: $TOKPRUNE_DATA)")
