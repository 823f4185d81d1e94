"""The page of an analysis, read back by a parser and by a browser: what it shows, and that it runs nothing else."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokprune_exp.analysis.page import ModelRows, page, read_models, units_of, write_page
from tokprune_exp.errors import UserError

NAN = float("nan")
NASTY = {
    "markup": "A <br /><br />\"fine\" & 'dull' film &amp; <b>not</b> </script><script>alert(1)</script> <!-- -->",
    "emoji": "I 💖 this 👨‍👩‍👧‍👦 film 🏳️‍🌈, 10/10 👍🏽",
    "arabic": "هذا الفيلم رائع جدا and the end was fine",
    "hebrew override": "סרט נפלא ‮abc‬ end",
    "space": "two\n\nlines,\ta tab and  two blanks ",
    "dollars": "It costs $5 or $x^2$ {{ braces }} \\u003c `${1}`",
    "empty": "",
}


def tokens_of(text, survived=None, example=0, number=0, layers=2, piece=0, special=True, **changes):
    """Rows of tokens.parquet for one text, a token per word and per mark, between [CLS] and [SEP]."""
    spans = [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]
    names = [("[CLS]", -1, -1), *((text[a:b].lower(), a, b) for a, b in spans), ("[SEP]", -1, -1)]
    names = names if special else names[1:-1]
    survived = [layers] * len(names) if survived is None else survived
    rows = []
    for place, ((name, start, end), lived) in enumerate(zip(names, survived, strict=True)):
        is_special = start < 0
        rows.append(
            {
                "example": example,
                "text": number,
                "piece": piece + place,
                "piece_text": name,
                "word": -1 if is_special else place - 1,
                "word_text": "" if is_special else text[start:end],
                "start": start,
                "end": end,
                "n_layers": layers,
                "survived": lived,
                "kept_last_read": lived >= layers - 1,
                "importance": [0.123456] * layers,
                "pos": "" if is_special else "NOUN",
                "tag": "" if is_special else "NN",
                "lemma": "" if is_special else name,
                "stop": False,
                "entity": "",
                "number": False,
                "punctuation": False,
                "domain_term": False,
                "special": is_special,
                "truncated": False,
                **changes,
            }
        )
    return rows


def example_of(*texts, example=0, label="good", predicted="good", probability=0.9):
    correct = None if isinstance(label, float) else label == predicted
    answer = {"label": label, "predicted": predicted, "correct": correct, "probability": probability}
    return {"example": example, "texts": list(texts), "tokens_kept": [3, 2], "length": 4, **answer}


def shown(*models, title="title", note=""):
    return Read(page([ModelRows(*model) for model in models], title, note))


class Read(HTMLParser):
    """The sheets of a page: model, note, and of each row its count and its (kind, text) units; all tags and scripts."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.html, self.tags, self.scripts, self.sheets, self.meta, self.attributes = html, [], [], [], {}, set()
        self.summaries, self.stack, self.unread = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.attributes |= set(values)
        if tag in ("meta", "br", "input"):
            self.meta |= {values.get("http-equiv"): values.get("content")}
            return
        kind = values.get("class") or ""
        self.stack.append((tag, kind))
        if tag == "section":
            self.sheets.append({"model": "", "note": "", "rows": [], "counts": []})
        if tag == "script":
            self.scripts.append([values, ""])
        if tag == "summary":
            self.summaries.append("")
        if self.sheets and kind == "text":
            self.sheets[-1]["rows"].append([])
        if kind == "count":
            self.sheets[-1]["counts"].append("")
        if tag in "bus" and self.inside("div", "text"):
            self.sheets[-1]["rows"][-1].append([tag + ("+" if "name" in kind else ""), ""])

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag, f"</{tag}> closes another element"

    def inside(self, tag, kind=None):
        return any(one == tag and kind in (None, its) for one, its in self.stack)

    def handle_data(self, data):
        if not self.stack:
            return
        tag, kind = self.stack[-1]
        if tag == "script":
            self.scripts[-1][1] += data
        elif self.inside("summary"):
            self.summaries[-1] += data
        elif tag == "h2":
            self.sheets[-1]["model"] += data
        elif self.inside("section") and self.inside("p"):
            self.sheets[-1]["note"] += data
        elif kind == "count":
            self.sheets[-1]["counts"][-1] += data
        elif tag == "em":
            self.unread.append(data)
        elif self.inside("div", "text"):
            assert tag in "bus", f"{data!r} stands in no token"
            self.sheets[-1]["rows"][-1][-1][1] += data

    def row(self, sheet, layer):
        return [tuple(unit) for unit in self.sheets[sheet]["rows"][layer]]

    def text(self, sheet, layer):
        return "".join(text for kind, text in self.row(sheet, layer) if not kind.endswith("+"))

    def hover(self, sheet):
        data = [text for values, text in self.scripts if values.get("type") == "application/json"]
        return json.loads(data[sheet])


@pytest.mark.parametrize("name", NASTY)
def test_every_layer_shows_the_text_as_it_is(name):
    text = NASTY[name]
    read = shown(("m", [example_of(text)], tokens_of(text)))
    end = max((match.end() for match in re.finditer(r"\w+|[^\w\s]", text)), default=0)
    for layer in range(3):
        assert read.text(0, layer) == text[:end]


def test_control_characters_become_visible():
    text = "a\x00b\x1bc"
    token = tokens_of("abc")[1] | {"start": 0, "end": 5}
    assert shown(("m", [example_of(text)], [token])).text(0, 1) == "a\u2400b\u241bc"


def test_nothing_that_a_table_holds_becomes_markup_or_a_script():
    attack = "\"'></script></b><script>alert(1)</script><img src=x onerror=alert(1)>"
    rows = tokens_of(attack, word_text=attack, lemma=attack, entity=attack, pos=attack, tag=attack)
    rows[0]["piece_text"] = attack
    example = example_of(attack, label=attack, predicted=attack)
    harmless = shown(("m", [example_of("a film")], tokens_of("a film")))
    read = shown((attack, [example], rows), title=attack, note=attack)
    assert set(read.tags) == set(harmless.tags) and read.attributes == harmless.attributes
    assert read.tags.count("script") == harmless.tags.count("script") == 2
    assert read.text(0, 1) == attack and read.sheets[0]["model"] == attack
    assert read.hover(0)["words"][1][0] == attack


def test_the_policy_lets_the_page_run_its_own_script_and_load_nothing():
    read = shown(("m", [example_of("a film")], tokens_of("a film")))
    (script,) = [text for values, text in read.scripts if "type" not in values]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = read.meta["Content-Security-Policy"]
    assert policy == f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    assert "http" not in read.html.replace("http-equiv", "") and not {"src", "href"} & read.attributes


def test_a_token_is_gone_from_the_layer_on_that_drops_it():
    rows = tokens_of("a fine film", survived=[3, 0, 2, 1, 3], layers=3)
    read = shown(("m", [example_of("a fine film")], rows))
    kinds = [[kind for kind, _ in read.row(0, layer)] for layer in range(4)]
    assert kinds == [
        ["b+", "b", "b", "b", "b+"],
        ["b+", "s", "b", "b", "b+"],
        ["b+", "s", "b", "s", "b+"],
        ["b+", "s", "u", "s", "b+"],  # fine: read by the last layer, which did not pass it on
    ]
    assert read.sheets[0]["counts"] == ["5", "4", "3", "2"]
    assert "5 tokens" in read.sheets[0]["note"] and "behind the layers 4 3 2" in read.sheets[0]["note"]


def test_hovering_tells_tags_and_importances():
    rows = tokens_of("Paris", importance=[NAN, 0.0123456], entity="GPE", stop=True, domain_term=True)
    rows[0]["importance"] = [None, float("inf")]
    read = shown(("m", [example_of("Paris")], rows))
    hover = read.hover(0)
    assert hover["units"][1] == [[1, "paris", 2, [None, 0.0123]]]
    assert hover["units"][0][0][3] == [None, None]
    assert hover["words"][1] == ["Paris", "NOUN (NN) · lemma paris · entity GPE · stop word · domain term"]
    assert hover["words"][0] == ["[CLS]", "special token"]


def test_byte_level_pieces_of_one_character_are_drawn_once_and_as_the_best_of_them():
    text = "so 💖!"
    base = tokens_of("x", special=False)[0]
    spans = [("so", 0, 2, 2), ("ð", 3, 4, 0), ("Ł", 3, 4, 1), ("ĵ", 3, 4, 0), ("!", 4, 5, 0), ("Ġ", 5, 5, 2)]
    rows = [base | {"piece_text": p, "start": a, "end": b, "survived": s} for p, a, b, s in spans]
    units = units_of(rows, [text])
    assert [(unit.gap, unit.shown, unit.survived, len(unit.tokens)) for unit in units] == [
        ("", "so", 2, 1),
        (" ", "💖", 1, 3),
        ("", "!", 0, 1),
        ("", "Ġ", 2, 1),
    ]


def test_a_pair_shows_both_texts():
    first, second = "a film", "the plot is dull"
    rows = tokens_of(first) + tokens_of(second, number=1, piece=4, special=False)
    rows.append(rows[3] | {"text": 1, "piece": 8})
    read = shown(("m", [example_of(first, second)], rows))
    assert read.text(0, 0) == f"{first} ‖ {second}"
    assert [kind for kind, _ in read.row(0, 0)] == ["b+", "b", "b", "b+", "b", "b", "b", "b", "b+"]


def test_models_stand_side_by_side_on_the_same_texts_only():
    both, alone = "a film", "the plot"
    one = ("one", [example_of(both)], tokens_of(both))
    other = (
        "other",
        [example_of(both, example=7, predicted="bad"), example_of(alone, example=8)],
        tokens_of(both, example=7) + tokens_of(alone, example=8),
    )
    read = shown(one, other)
    assert [sheet["model"] for sheet in read.sheets] == ["one", "other", "other"]
    assert read.tags.count("details") == 2
    assert read.summaries == ["a film good ✓ ✗", "the plot good ✓"]
    assert "predicted bad, probability 0.900; label good" in read.sheets[1]["note"]


def test_a_score_is_neither_right_nor_wrong():
    example = example_of("a film", label=3.5, predicted=2.25, probability=NAN)
    read = shown(("m", [example], tokens_of("a film")))
    assert read.summaries == ["a film 3.500 "]
    assert "predicted 2.250; label 3.500" in read.sheets[0]["note"] and "probability" not in read.sheets[0]["note"]


def test_a_text_of_3000_words_is_whole_folded_away_and_small():
    text = " ".join(f"word{number}" for number in range(3000))
    rows = tokens_of(" ".join(text.split()[:510]), layers=12)
    read = shown(("m", [example_of(text)], rows))
    assert read.text(0, 12) == " ".join(text.split()[:510])
    assert "".join(read.unread) == text[len(read.text(0, 12)) :]
    assert "512 tokens, 2,490 words behind them were not read" in read.sheets[0]["note"]
    assert "<details open" not in read.html and 'class="sheet long"' in read.html
    assert len(read.html) < 400_000 and len(read.summaries[0]) < 140


def write_analysis(directory, texts, predicted, labels=("bad", "good")):
    """tokens.parquet, examples.parquet and about.json; every text's label is `good`."""
    directory.mkdir()
    examples, tokens = [], []
    for number, (text, answer) in enumerate(zip(texts, predicted, strict=True)):
        examples.append(example_of(text, example=number, label=1, predicted=answer))
        tokens += tokens_of(text, example=number)
    pq.write_table(pa.Table.from_pylist(examples), directory / "examples.parquet")
    pq.write_table(pa.Table.from_pylist(tokens), directory / "tokens.parquet")
    (directory / "about.json").write_text(json.dumps({"labels": list(labels)}))
    return directory


def test_sentences_are_those_that_all_models_were_asked_a_third_of_them_wrong(tmp_path):
    texts = [f"film {number}" for number in range(20)]
    one = write_analysis(tmp_path / "one", texts, [1] * 10 + [0] * 10)
    two = write_analysis(tmp_path / "two", texts[3:], [1] * 17)
    first, second = read_models({"one": one, "two": two}, number=6)
    chosen = [example["texts"][0] for example in first.examples]
    assert chosen == ["film 3", "film 4", "film 5", "film 6", "film 10", "film 11"]
    assert [example["texts"][0] for example in second.examples] == chosen
    assert [example["predicted"] for example in first.examples] == ["good"] * 4 + ["bad"] * 2
    assert {token["example"] for token in second.tokens} == {0, 1, 2, 3, 7, 8}


@pytest.mark.parametrize(("number", "wrong", "right"), [(6, 2, 4), (19, 9, 10), (20, 10, 10), (50, 10, 10), (1, 0, 1)])
def test_as_many_sentences_as_asked_are_chosen_where_there_are(tmp_path, number, wrong, right):
    answers = [1] * 10 + [0] * 10
    (rows,) = read_models({"m": write_analysis(tmp_path / "m", list(map(str, range(20))), answers)}, number)
    outcomes = [example["correct"] for example in rows.examples]
    assert (outcomes.count(False), outcomes.count(True)) == (wrong, right)


def test_of_long_texts_fewer_are_shown(tmp_path, monkeypatch):
    one = write_analysis(tmp_path / "one", list(map(str, range(20))), [1] * 20)
    two = write_analysis(tmp_path / "two", list(map(str, range(20))), [1] * 20)
    monkeypatch.setattr("tokprune_exp.analysis.page.MOST_DRAWN", 50)  # 4 tokens in 2 layers of 2 models: 16 each
    assert len(read_models({"one": one, "two": two})[0].examples) == 3
    assert len(read_models({"one": one})[0].examples) == 6
    monkeypatch.setattr("tokprune_exp.analysis.page.MOST_DRAWN", 1)
    assert len(read_models({"one": one})[0].examples) == 1


def test_a_directory_without_tables_and_models_without_a_common_text_are_refused(tmp_path):
    one = write_analysis(tmp_path / "one", ["a"], [1])
    two = write_analysis(tmp_path / "two", ["b"], [1])
    with pytest.raises(UserError, match="no sentence was asked of all of one, two"):
        read_models({"one": one, "two": two})
    (two / "tokens.parquet").unlink()
    with pytest.raises(UserError, match=r"two holds no tokens.parquet: name a directory that"):
        read_models({"two": two})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_runs_the_script_opens_the_first_sentence_and_shows_the_tooltip(tmp_path):
    file = tmp_path / "page.html"
    rows = tokens_of("Paris <br /> is fine", survived=[2, 2, *[0] * 6, 2], importance=[0.5, NAN])
    write_page(file, [ModelRows("m", [example_of("Paris <br /> is fine")], rows)], "title")
    assert "<details open" in dom(file, tmp_path)
    # the policy would not let a test point at a token
    token = 'document.querySelectorAll(".text")[2].children[1]'
    point = f'{token}.dispatchEvent(new MouseEvent("mouseover", {{bubbles: true}}))'
    html = re.sub(r"<meta http-equiv[^>]*>", "", file.read_text("utf-8"))
    file.write_text(html.replace("</body>", f"<script>{point}</script></body>"), "utf-8")
    seen = dom(file, tmp_path)
    (tip,) = re.findall(r'<div id="tip"(?![^>]*hidden)[^>]*>(.*?)</div>', seen)
    words = re.sub(r"<[^>]+>", " ", tip).split()
    assert " ".join(words) == (
        "Paris (paris) NOUN (NN) · lemma paris passed on by 2 of 2 layers layer 1 importance 0.5"
    )
    assert len(re.findall(r'class="on"', seen)) == 3


def dom(file, scratch):
    """The page as the browser has it once its script ran."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch / 'browser'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


def test_importances_of_the_real_type_are_read(tmp_path):
    directory = write_analysis(tmp_path / "m", ["a film"], [1])
    tokens = pq.read_table(directory / "tokens.parquet")
    values = pa.array([np.array([np.nan, 0.25], np.float32)] * len(tokens), pa.list_(pa.float32()))
    place = tokens.schema.get_field_index("importance")
    pq.write_table(tokens.set_column(place, "importance", values), directory / "tokens.parquet")
    (rows,) = read_models({"m": directory})
    assert shown((rows.model, rows.examples, rows.tokens)).hover(0)["units"][1][0][3] == [None, 0.25]
