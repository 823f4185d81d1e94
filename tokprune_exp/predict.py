"""The trained model on the command line: texts in, one answer each, with the tokens that it was read from.

    python -m tokprune_exp.predict MODEL_DIR "a text" "another text"
    python -m tokprune_exp.predict MODEL_DIR --file texts.txt --json > answers.jsonl
    cat texts.txt | python -m tokprune_exp.predict MODEL_DIR

Nothing heavy is imported before the texts are read, so that a mistake is answered at once.
"""

import argparse
import io
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from tokprune_exp.errors import UserError, told_in_a_sentence

if TYPE_CHECKING:
    from tokprune_exp.serving import Prediction


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit code 2."""
    arguments = read_arguments()
    with told_in_a_sentence():
        predict(arguments)


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tokprune_exp.predict",
        description="Classify texts with a trained model and show which of their tokens it kept.",
        epilog="Texts come from the command line, else from --file, else from standard input: one text a line, "
        "for a task on pairs two texts with a tab between them; empty lines are skipped.",
    )
    parser.add_argument("model_dir", type=Path, help="a model directory: model/ of a finished run")
    parser.add_argument("texts", nargs="*", default=[], metavar="text")
    parser.add_argument("--file", type=Path, help="read the texts from this file")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per text, with every token of every layer")
    form.add_argument("--plain", action="store_true", help="dropped tokens in [brackets], as where there is no colour")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw what is printed, in colour, into this file")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch chooses)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the products (default: fp32)")
    arguments = parser.parse_intermixed_args()  # options may stand between MODEL_DIR and the texts
    if arguments.file and arguments.texts:
        parser.error("texts come from the command line or from --file, not from both")
    return arguments


def predict(arguments: argparse.Namespace) -> None:
    """Answer every text, in order.

    Raises:
        UserError: there is no model or no text, or the text is not of the kind that the model reads.
    """
    lines = read_lines(arguments)
    from tokprune_exp.serving import load

    classifier = load(arguments.model_dir, arguments.threads, arguments.precision)
    texts = as_pairs(lines) if classifier.card.pair else lines
    console = Console(highlight=False, soft_wrap=True)
    in_colour = not arguments.plain and console.color_system is not None and not console.no_color
    drawing = Console(highlight=False, width=100, record=True, file=io.StringIO(), force_terminal=True)
    for prediction in classifier.predict(texts):
        if arguments.json:
            print(json.dumps({**asdict(prediction), "tokens_kept": prediction.tokens_kept}, ensure_ascii=False))
            continue
        show(prediction, console, in_colour)
        show(prediction, drawing, in_colour=True)
    if arguments.svg is not None:
        picture = drawing.export_svg(title="tokprune_exp.predict")
        arguments.svg.write_text(
            re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
        )  # fonts of the reader's own


def show(prediction: "Prediction", console: Console, in_colour: bool) -> None:
    """Print one answer: the label, and the text with its dropped tokens greyed or in brackets."""
    console.print(Text(str(prediction), style="bold" if in_colour else ""))
    for stretches in prediction.stretches():
        console.print(Text("  ") + marked(stretches, in_colour))


def read_lines(arguments: argparse.Namespace) -> list[str]:
    """Read the texts: those of the command line, else the lines of the file, else those of standard input.

    Raises:
        UserError: the file cannot be read, or nothing is in it.
    """
    source = arguments.file or "standard input"
    try:
        if arguments.texts:
            source, lines = "the command line", arguments.texts
        elif arguments.file:
            lines = arguments.file.read_text(encoding="utf-8").split("\n")
        else:
            lines = sys.stdin.read().split("\n")
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not a text in UTF-8 (byte {error.start})") from error
    lines = [line.rstrip("\r") for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{source} holds no text: one text a line is needed")
    return lines


def as_pairs(lines: list[str]) -> list[tuple[str, str]]:
    """Cut each line in two at its tab.

    Raises:
        UserError: a line does not hold exactly two texts.
    """
    pairs = []
    for number, line in enumerate(lines, start=1):
        parts = line.split("\t")
        if len(parts) != 2:
            raise UserError(
                f"text {number} has {len(parts) - 1} tabs, but this model reads pairs: two texts, a tab between them"
            )
        pairs.append((parts[0], parts[1]))
    return pairs


def marked(stretches: list[tuple[str, bool]], in_colour: bool) -> Text:
    """Put the stretches together again, the dropped ones grey, or in brackets."""
    line = Text()
    for stretch, is_kept in stretches:
        if in_colour:
            line.append(stretch, style="" if is_kept else "bright_black")
        else:
            line.append(stretch if is_kept else f"[{stretch}]")
    return line


if __name__ == "__main__":
    main()
