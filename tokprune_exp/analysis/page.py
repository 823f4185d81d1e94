"""The page: sentences through the layers of one or several models, one HTML file that loads nothing from anywhere."""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tokprune_exp.errors import UserError

SENTENCES = 24
"""Shown where nobody says how many."""
MOST_DRAWN = 150_000
"""Tokens times rows on a page, about; of long texts fewer are shown, so that the page stays at some three megabytes."""
SUMMARY = 110
"""Characters of a text that stand for it while it is folded away."""
LONG = 60
"""Tokens; the layers of a longer text get a window each that scrolls."""
BETWEEN_TEXTS = " ‖ "
"""Stands between the two texts of a pair."""

Row = Mapping[str, Any]


@dataclass
class ModelRows:
    """Some sentences as one model saw them: rows of its examples.parquet and, in order, of its tokens.parquet."""

    model: str
    examples: Sequence[Row]
    tokens: Sequence[Row]


@dataclass
class Unit:
    """What is drawn as one: a token, or several that share characters, as the bytes of an emoji do.

    `gap` stands before it in the text and belongs to no token. `survived` layers passed it on, `read` says that the
    last layer could attend to it: of several tokens, the best of them. `is_name`: it has no characters of its own.
    """

    shown: str
    gap: str
    text: int
    end: int
    is_name: bool
    tokens: list[Row] = field(default_factory=list)

    @property
    def survived(self) -> int:
        """Number of layers that passed it on."""
        return max(int(token["survived"]) for token in self.tokens)

    @property
    def read(self) -> bool:
        """Whether the last layer could attend to it."""
        return any(token["kept_last_read"] for token in self.tokens)


# ---------------------------------------------------------------------------------------------------------------
# What is shown


def read_models(directories: Mapping[str, Path], number: int = SENTENCES) -> list[ModelRows]:
    """Read up to `number` sentences that every model was asked; `directories` maps a model's name to its analysis.

    A third of them are sentences that some model got wrong, where there are as many; both parts in the order of the
    first model's split. There are fewer where texts are so long that the page would exceed `MOST_DRAWN`. Nothing else
    of the tables is read.

    Raises:
        UserError: a table is missing, or no sentence is in all of them.
    """
    asked = {model: _examples_by_text(directory) for model, directory in directories.items()}
    shared = [texts for texts in next(iter(asked.values())) if all(texts in examples for examples in asked.values())]
    if not shared:
        raise UserError(f"no sentence was asked of all of {', '.join(directories)}: analyse them on the same split")
    costs = [len(one["tokens_kept"]) * one["length"] for examples in asked.values() for one in examples.values()]
    fitting = MOST_DRAWN / (len(asked) * sum(costs) / len(costs))
    number = max(1, min(number, int(fitting)))
    wrong = [texts for texts in shared if any(examples[texts]["correct"] is False for examples in asked.values())]
    wrong = wrong[: max(number // 3, number - (len(shared) - len(wrong)))]
    right = [texts for texts in shared if all(examples[texts]["correct"] is not False for examples in asked.values())]
    chosen = {*wrong, *right[: number - len(wrong)]}
    found = []
    for model, directory in directories.items():
        examples = [asked[model][texts] for texts in shared if texts in chosen]
        numbers = [example["example"] for example in examples]
        tokens = pq.read_table(directory / "tokens.parquet", filters=[("example", "in", numbers)]).to_pylist()
        tokens.sort(key=lambda token: (token["example"], token["piece"]))
        found.append(ModelRows(model, examples, tokens))
    return found


def _examples_by_text(directory: Path) -> dict[tuple[str, ...], Row]:
    """The examples, their labels by name; of a text that stands there twice the first."""
    for name in ("about.json", "examples.parquet", "tokens.parquet"):
        if not (directory / name).is_file():
            raise UserError(
                f"{directory} holds no {name}: name a directory that `python -m tokprune_exp.analyze MODEL_DIR` wrote"
            )
    labels = json.loads((directory / "about.json").read_text("utf-8"))["labels"]
    found: dict[tuple[str, ...], Row] = {}
    for example in pq.read_table(directory / "examples.parquet").to_pylist():
        if labels:
            example |= {key: labels[example[key]] for key in ("label", "predicted")}
        found.setdefault(tuple(example["texts"]), example)
    return found


def units_of(tokens: Iterable[Row], texts: Sequence[str]) -> list[Unit]:
    """Cut the texts into what is drawn, in the order of the tokens."""
    units: list[Unit] = []
    ends = [0] * len(texts)
    for token in tokens:
        number, start, end = (int(token[key]) for key in ("text", "start", "end"))
        if token["special"] or start < 0 or start == end:
            units.append(Unit(token["piece_text"], "", number, ends[number], True, [token]))
        elif units and not units[-1].is_name and units[-1].text == number and start < ends[number]:
            last = units[-1]
            last.shown += texts[number][ends[number] : end]
            last.end = ends[number] = max(end, ends[number])
            last.tokens.append(token)
        else:
            gap = texts[number][ends[number] : start]
            units.append(Unit(texts[number][start:end], gap, number, end, False, [token]))
            ends[number] = end
    return units


# ---------------------------------------------------------------------------------------------------------------
# HTML


def write_page(file: Path, models: Sequence[ModelRows], title: str, note: str = "") -> None:
    """Write the page of `page`."""
    file.write_text(page(models, title, note), "utf-8")


def page(models: Sequence[ModelRows], title: str, note: str = "") -> str:
    """The page: each sentence with a row per layer, the models side by side where they were asked the same texts.

    Everything that comes from a table is escaped, and the page's policy runs no script but its own.
    """
    sentences: dict[tuple[str, ...], list[tuple[str, Row, list[Row]]]] = {}
    for rows in models:
        of_example: dict[int, list[Row]] = {}
        for token in rows.tokens:
            of_example.setdefault(token["example"], []).append(token)
        for example in rows.examples:
            its_tokens = of_example.get(example["example"], [])
            sentences.setdefault(tuple(example["texts"]), []).append((rows.model, example, its_tokens))
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'unsafe-inline'"
    body = "\n".join(_sentence(texts, shown) for texts, shown in sentences.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{_safe(title)}</title><style>{LOOK}</style></head>\n<body>\n"
        f'<h1>{_safe(title)}</h1>\n<p class="note">{_safe(note)}</p>\n{LEGEND}\n'
        f'{body}\n<div id="tip" hidden></div>\n<script>{SCRIPT}</script>\n</body></html>\n'
    )


def _sentence(texts: tuple[str, ...], shown: Sequence[tuple[str, Row, list[Row]]]) -> str:
    """One sentence, folded away: its beginning and the answers, then the sheets of the models."""
    text = BETWEEN_TEXTS.join(texts)
    beginning = " ".join(text[: 4 * SUMMARY].split())
    beginning = beginning if len(beginning) <= SUMMARY and len(text) <= 4 * SUMMARY else f"{beginning[:SUMMARY]}…"
    beginning = beginning or "(an empty text)"
    gold = _answer(shown[0][1]["label"])
    marks = " ".join(_mark(example, model) for model, example, _ in shown)
    sheets = "".join(_sheet(texts, *each) for each in shown)
    return (
        f'<details><summary><bdi dir="auto">{_safe(beginning)}</bdi> <span class="gold">{_safe(gold)}</span> {marks}'
        f'</summary><div class="sheets">{sheets}</div></details>'
    )


def _mark(example: Row, model: str) -> str:
    if example["correct"] is None:
        return ""
    kind, mark = ("right", "✓") if example["correct"] else ("wrong", "✗")
    return f'<span class="{kind}" title="{_safe(model)}">{mark}</span>'


def _sheet(texts: tuple[str, ...], model: str, example: Row, tokens: list[Row]) -> str:
    """One sentence through one model: a row per layer, and what hovering tells as JSON."""
    units = units_of(tokens, texts)
    layers = int(tokens[0]["n_layers"]) if tokens else 0
    unread, words = _unread(units, texts)
    left = [sum(int(token["survived"]) >= layer for token in tokens) for layer in range(layers + 1)]
    rows = [
        f'<div class="row"><span class="where">{"input" if not layer else f"layer {layer}"}</span>'
        f'<span class="count">{count}<span class="bar"><i style="width:{100 * count / left[0]:.0f}%"></i></span></span>'
        f'<div class="text" dir="auto">{_marked(units, layer, layers)}'
        f"{unread if not layer else ''}</div></div>"
        for layer, count in enumerate(left)
    ]
    answer, probability = _answer(example["predicted"]), example["probability"]
    sure = "" if probability is None or math.isnan(probability) else f", probability {probability:.3f}"
    cut = f", {words:,} words behind them were not read" if words else ""
    kept = " ".join(map(str, left[1:]))
    data = json.dumps(_hover(units), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<section class="sheet{" long" if len(tokens) > LONG else ""}"><h2>{_safe(model)}</h2>'
        f'<p class="note">{_mark(example, model)} predicted <b>{_safe(answer)}</b>{sure}; '
        f"label {_safe(_answer(example['label']))}<br>{left[0]} tokens{cut}; behind the layers {kept}</p>"
        f'{"".join(rows)}<script type="application/json">{data}</script></section>'
    )


def _marked(units: Sequence[Unit], layer: int, layers: int) -> str:
    """The text behind a layer: b what it passed on, u what the last layer read but did not pass on, s what is gone."""
    parts, before = [], 0
    for unit in units:
        kind = "b" if unit.survived >= layer else "u" if layer == layers and unit.read else "s"
        gap = unit.gap
        if not unit.is_name and unit.text != before:
            gap, before = BETWEEN_TEXTS + gap, unit.text
        named = ' class="name" dir="ltr"' if unit.is_name else ""  # with a dir it does not decide that of the text
        parts.append(f"<{kind}{named}>{_safe(gap)}{_safe(unit.shown)}</{kind}>")
    return "".join(parts)


def _unread(units: Sequence[Unit], texts: Sequence[str]) -> tuple[str, int]:
    """What stands behind the last token of each text, and how many words that are."""
    ends = [max((unit.end for unit in units if unit.text == number), default=0) for number in range(len(texts))]
    rest = BETWEEN_TEXTS.join(text[end:] for text, end in zip(texts, ends, strict=True) if text[end:].strip())
    return f'<em title="not read">{_safe(rest)}</em>' if rest else "", len(rest.replace(BETWEEN_TEXTS, " ").split())


def _hover(units: Sequence[Unit]) -> dict[str, Any]:
    """What hovering tells: the words with their tags and, per unit, its tokens with word, fate and importances."""
    words: dict[tuple[str, str], int] = {}
    return {
        "units": [
            [
                [
                    words.setdefault((token["word_text"] or token["piece_text"], _tags(token)), len(words)),
                    token["piece_text"],
                    int(token["survived"]),
                    [_rounded(value) for value in token["importance"]],
                ]
                for token in unit.tokens
            ]
            for unit in units
        ],
        "words": [list(word) for word in words],
    }


def _rounded(value: float | None) -> float | None:
    """Three digits of an importance; None where nothing was decided."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")


FLAGS = {"stop": "stop word", "number": "number", "punctuation": "punctuation", "domain_term": "domain term"}


def _tags(token: Row) -> str:
    """The tags of a token's word in one line."""
    if token["special"]:
        return "special token"
    tag = f"{token['pos']} ({token['tag']})" if token["tag"] else token["pos"]
    found = [tag, f"lemma {token['lemma']}" if token["lemma"] else ""]
    found += [f"entity {token['entity']}" if token["entity"] else "", *(FLAGS[key] for key in FLAGS if token[key])]
    return " · ".join(each for each in found if each)


def _answer(value: Any) -> str:
    """The name of a label, a score of a regression, or a dash."""
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _safe(text: str) -> str:
    """A text as HTML; characters that a page cannot hold, control characters, become their pictures (␀)."""
    return escape("".join(chr(0x2400 + ord(one)) if one < " " and one not in "\t\n\r" else one for one in text))


LEGEND = (
    '<p class="note">Each row is the text behind a layer: <b class="demo">passed on</b>, '
    '<u class="demo">read by the last layer, not passed on</u>, <s class="demo">gone</s>; '
    "at its left the number of tokens. Point at a token for its importance in every layer. "
    '<label><input type="checkbox" id="hide"> hide what is gone</label></p>'
)

LOOK = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1400px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1em; margin: 0; overflow-wrap: anywhere; }
.note { color: #555; font-size: .88em; margin: .2em 0 .8em; }
details { border-top: 1px solid #e6e6e6; padding: .4em 0; }
summary { cursor: pointer; } .gold { color: #555; font-size: .85em; border: 1px solid #ccc; border-radius: 3px;
          padding: 0 .4em; white-space: nowrap; }
.right { color: #00704f; } .wrong { color: #b00020; font-weight: bold; }
.sheets { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26em, 100%), 1fr)); gap: 1.5em;
          margin: .8em 0 1.2em; }
.row { display: grid; grid-template-columns: 3.6em 4em 1fr; gap: .5em; border-top: 1px solid #f0f0f0; padding: .2em 0; }
.where, .count { color: #555; font-size: .85em; } .count { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: block; height: 4px; background: #eee; } .bar i { display: block; height: 4px; background: #0072B2; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; }
.long .text { max-height: 9.5em; overflow-y: auto; }
.text b, .demo { font-weight: normal; color: #111; text-decoration: none; }
.text u, u.demo { color: #0072B2; font-weight: bold; text-decoration: none; }
.text s, s.demo { opacity: .27; text-decoration: none; } .text em { color: #999; background: #f6f6f6; }
.name { font-size: .78em; font-family: monospace; margin: 0 .15em; }
.text .on { outline: 2px solid #D55E00; } .text s.on { opacity: .5; }
body:has(#hide:checked) .text s { display: none; }
#tip { position: fixed; z-index: 1; max-width: 24em; background: #fff; border: 1px solid #888; border-radius: 4px;
       padding: .4em .7em; font-size: .85em; box-shadow: 0 2px 8px #0003; pointer-events: none; }
#tip[hidden] { display: none; } #tip p { margin: 0; } #tip table { border-collapse: collapse; }
#tip td { padding: 0 .6em 0 0; font-variant-numeric: tabular-nums; }
"""

SCRIPT = """
"use strict";
const tip = document.getElementById("tip"), read = new Map();
let lit = [];
function aboutOf(sheet) {
  if (!read.has(sheet)) read.set(sheet, JSON.parse(sheet.querySelector("script").textContent));
  return read.get(sheet);
}
function line(parent, kind, text) {
  const made = parent.appendChild(document.createElement(kind));
  made.textContent = text;
  return made;
}
function describe(about, place) {
  tip.replaceChildren();
  for (const [word, piece, survived, importances] of about.units[place]) {
    const [text, tags] = about.words[word];
    line(line(tip, "p", ""), "strong", text === piece ? text : text + " (" + piece + ")");
    line(tip, "p", tags);
    line(tip, "p", "passed on by " + survived + " of " + importances.length + " layers");
    const table = line(tip, "table", "");
    importances.forEach((value, layer) => {
      if (value === null) return;
      const row = line(table, "tr", "");
      line(row, "td", "layer " + (layer + 1));
      line(row, "td", "importance " + value);
    });
  }
}
document.addEventListener("mouseover", event => {
  lit.forEach(token => token.classList.remove("on"));
  lit = [];
  const token = event.target.closest(".text > *:not(em)");
  tip.hidden = !token;
  if (!token) return;
  const sheet = token.closest(".sheet"), place = [...token.parentNode.children].indexOf(token);
  lit = [...sheet.querySelectorAll(".text")].map(row => row.children[place]);
  lit.forEach(each => each.classList.add("on"));
  describe(aboutOf(sheet), place);
  const box = token.getBoundingClientRect();
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (below ? box.bottom + 8 : Math.max(4, box.top - tip.offsetHeight - 8)) + "px";
});
document.addEventListener("scroll", () => { tip.hidden = true; }, true);
const first = document.querySelector("details");
if (first && !first.querySelector(".long")) first.open = true;
"""
