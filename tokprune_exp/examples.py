"""Some texts of the reported split as a Weights & Biases run shows them: the answer, and where each token left."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tokprune_exp.data.module import TaskData
from tokprune_exp.measure.report import sample
from tokprune_exp.serving import Prediction, TextClassifier, Token
from tokprune_exp.tracking import log_table

if TYPE_CHECKING:
    from wandb import Run

SHOWN = 20
"""Texts of the reported split that a run shows."""
BETWEEN_TEXTS = " ‖ "
"""Stands between the two texts of a pair."""


@dataclass
class Example:
    """What a model answered, and what it should have: the name of a label, or the score of a regression."""

    prediction: Prediction
    gold: str | float


def answered(classifier: TextClassifier, data: TaskData) -> list[Example]:
    """Let a trained model answer a few texts of the reported split, the same ones for every model of the task."""
    split, labels = data.evaluation, data.task.labels
    rows = sample(split, SHOWN).tolist()
    predictions = classifier.predict([split.texts[row] for row in rows])
    golds = [labels[int(split.labels[row])] if labels else float(split.labels[row]) for row in rows]
    return [Example(*pair) for pair in zip(predictions, golds, strict=True)]


def log_examples(runs: Iterable["Run"], examples: Sequence[Example]) -> None:
    """Log the table `examples`, a row per text, and the page `examples_page`, tokens shaded by the layer they left.

    All examples must be of one task and one model.
    """
    rows = [example_row(example) for example in examples]
    for run in runs:
        import wandb

        log_table(run, "examples", list(rows[0]), [list(row.values()) for row in rows])
        run.log({"examples_page": wandb.Html(examples_page(examples), inject=False, data_is_not_path=True)})


def example_row(example: Example) -> dict[str, Any]:
    """One row: text, answers, tokens (special ones included) kept by each layer, the text with dropped ones in [ ].

    `correct` is said of a label, `error` = |predicted − gold| of a score. `retention` is the mean over the layers of
    the share that is kept. `dropped_in_layer_l` holds the tokens that left there, see `left_in_layer`.
    """
    prediction, gold = example.prediction, example.gold
    if isinstance(gold, str):
        answer: dict[str, Any] = {"gold": gold, "predicted": prediction.label, "correct": prediction.label == gold}
    else:
        score = prediction.logits[0]
        answer = {"gold": gold, "predicted": score, "error": abs(score - gold)}
    kept, tokens = prediction.tokens_kept, len(prediction.tokens)
    left = left_in_layer(prediction)
    dropped = {
        f"dropped_in_layer_{layer}": " ".join(
            spelled(prediction, token) for token, place in zip(prediction.tokens, left, strict=True) if place == layer
        )
        for layer in range(1, len(kept) + 1)
    }
    marked = (
        "".join(stretch if is_kept else f"[{stretch}]" for stretch, is_kept in text) for text in prediction.stretches()
    )
    return {
        "text": BETWEEN_TEXTS.join(texts_of(prediction)),
        **answer,
        "tokens": tokens,
        "tokens_kept": " ".join(map(str, kept)),
        "retention": sum(kept) / (len(kept) * tokens),
        "marked": BETWEEN_TEXTS.join(marked),
        **dropped,
    }


def left_in_layer(prediction: Prediction) -> list[int | None]:
    """For each token the first layer, counted from 1, that did not pass it on; None: the last layer still read it.

    Behind the last layer LTP and STTABT drop all but the first token; what was read there has served its purpose.
    """
    return [
        None if is_read else next((layer for layer, kept in enumerate(of_token, start=1) if not kept), None)
        for is_read, *of_token in zip(prediction.read, *prediction.kept, strict=True)
    ]


def spelled(prediction: Prediction, token: Token) -> str:
    """A token as it stands in the text, a special one by its name."""
    return token.piece if token.text is None else texts_of(prediction)[token.text][token.start : token.end]


def texts_of(prediction: Prediction) -> list[str]:
    """The text, or the two of a pair."""
    return [prediction.text] if isinstance(prediction.text, str) else list(prediction.text)


# ---------------------------------------------------------------------------------------------------------------
# The page

STYLE = """
body { font: 15px/1.6 sans-serif; color: #111; background: #fff; margin: 1em; max-width: 60em }
p { margin: 0 0 1em } .answer { font-size: 13px; color: #555 } .wrong { color: #b00020 }
"""
COLOUR, DARKEST = "31,119,180", 0.65
"""Of the background: red, green, blue, and the opacity behind what the last layer read; 0 is what left in the first."""


def examples_page(examples: Sequence[Example]) -> str:
    """An HTML page that needs nothing else: each text once, its tokens the darker the longer they stayed."""
    layers = max(len(example.prediction.kept) for example in examples)
    legend = " ".join(shaded(f" {layer} ", layer, layers) for layer in range(1, layers + 1))
    legend += f" {shaded(' read by the last layer ', None, layers)}"
    body = "\n".join(_paragraph(example) for example in examples)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Tokens dropped</title>'
        f"<style>{STYLE}</style></head><body>\n"
        f"<p>Token dropped in layer {legend}</p>\n"
        f"{body}\n</body></html>\n"
    )


def _paragraph(example: Example) -> str:
    prediction = example.prediction
    layers, wrong = len(prediction.kept), isinstance(example.gold, str) and prediction.label != example.gold
    gold = example.gold if isinstance(example.gold, str) else f"{example.gold:.3f}"
    text = escape(BETWEEN_TEXTS).join(
        "".join(shaded(stretch, layer, layers) for stretch, layer in stretches)
        for stretches in stretches_by_layer(prediction)
    )
    return (
        f"<p>{text}<br><span class='answer{' wrong' if wrong else ''}'>"
        f"{escape(str(prediction))} · gold: {escape(gold)}</span></p>"
    )


def stretches_by_layer(prediction: Prediction) -> list[list[tuple[str, int | None]]]:
    """Cut each text into stretches that left in the same layer; None: read by the last layer."""
    # characters between two tokens belong to the one that stays longer, as in Prediction.stretches
    left = left_in_layer(prediction)
    texts = [[(character, 0) for stretch, _ in text for character in stretch] for text in prediction.stretches()]
    layers = len(prediction.kept)
    for layer in range(1, layers + 1):
        still_there = replace(prediction, read=[place is None or place > layer for place in left])
        for number, text in enumerate(still_there.stretches()):
            stays = [kept for stretch, kept in text for _ in stretch]
            texts[number] = [(one, stayed + kept) for (one, stayed), kept in zip(texts[number], stays, strict=True)]
    return [
        [
            ("".join(one for one, _ in run), None if stayed == layers else stayed + 1)
            for stayed, run in groupby(text, key=lambda pair: pair[1])
        ]
        for text in texts
    ]


def shaded(text: str, layer: int | None, layers: int) -> str:
    """A piece of text as HTML, its background by the layer that dropped it, none for the first."""
    opacity = DARKEST * (layers if layer is None else layer - 1) / layers
    place = "read by the last layer" if layer is None else f"dropped in layer {layer}"
    return f'<span title="{place}" style="background:rgba({COLOUR},{opacity:.2f})">{escape(text)}</span>'
