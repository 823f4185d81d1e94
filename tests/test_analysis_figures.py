"""Figures of an analysis: the exact numbers of its tables stand on the axes; what cannot be drawn is said."""

import json
import struct
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from offline_runs import read_offline_run
from safetensors.numpy import save_file

from tokprune_exp.analysis.figures import (
    canvas,
    domain_terms,
    draw,
    lengths,
    present,
    sentence,
    states,
    thresholds,
    word_classes,
    words,
)
from tokprune_exp.analysis.figures.inputs import Tables
from tokprune_exp.config import LoggerConfig
from tokprune_exp.errors import UserError

LABELS = ["bad", "good"]
LAYERS, EXAMPLES = 3, 40
STAGES = ["1", "2", "last_read", "3", "mean"]
CLASSES = [("all", "all"), ("flag", "stop word"), ("flag", "domain term"), ("flag", "other content word")]
CLASSES += [("pos", "NOUN"), ("pos", "DET")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An analysis of 40 examples by a model of three layers, made up of numbers that differ everywhere."""
    folder = tmp_path_factory.mktemp("analysis")
    write_about(folder)
    random = np.random.default_rng(0)
    rows = []
    for number, (kind, name) in enumerate(CLASSES):
        for place, stage in enumerate(STAGES):
            share = round(0.9 - 0.11 * number - 0.07 * place, 4)
            row = {"unit": "word", "group": "all", "kind": kind, "class": name, "layer": stage, "total": 100 + number}
            row |= {"retention": share, "retention_low": share - 0.02, "retention_high": share + 0.03}
            row |= {"lift": 2 * share, "lift_low": 2 * share - 0.1, "lift_high": 2 * share + 0.2}
            row |= {"over_random": 3 * share, "over_random_low": 3 * share - 0.3, "over_random_high": 3 * share + 0.4}
            rows.append(row | {"random_retention": share / 2})
            rows.append(row | {"unit": "piece", "retention": 0.5})
            rows.append(row | {"group": "correct", "retention": 0.6})
    pd.DataFrame(rows).to_csv(folder / "retention.csv", index=False)
    frequent = []
    for name in LABELS:
        for group in (f"class {name}", f"true positives {name}"):
            for rank, (word, kept, total) in enumerate(words_of(name), start=1):
                row = {"group": group, "word": word, "kept": kept, "total": total}
                frequent.append(row | {"stop_words": "with", "rank": rank})
                if word != "the":
                    frequent.append(row | {"stop_words": "without", "rank": rank})
    pd.DataFrame(frequent).to_csv(folder / "frequent_words.csv", index=False)
    terms = [("film", 40, 30), ("plot", 50, 10), ("null", 1, 1), ("unseen", 0, 0)]
    pd.DataFrame(terms, columns=["term", "total", "kept"]).to_csv(folder / "domain_terms.csv", index=False)
    kept = np.sort(random.integers(1, 20, (EXAMPLES, LAYERS)))[:, ::-1]
    answers = random.integers(0, 2, (2, EXAMPLES))
    examples = [
        {
            "example": 2 * number,
            "texts": [f"a film {number}"],
            "label": int(answers[0, number]),
            "predicted": int(answers[1, number]),
            "correct": bool(answers[0, number] == answers[1, number]),
            "probability": 0.75,
            "tokens_kept": kept[number].tolist(),
            "length": 20 + number % 5,
            "truncated": False,
        }
        for number in range(EXAMPLES)
    ]
    pq.write_table(pa.Table.from_pylist(examples), folder / "examples.parquet")
    tokens = [token for one in examples for token in tokens_of(one["example"])]
    pq.write_table(pa.Table.from_pylist(tokens), folder / "tokens.parquet")
    labels = answers[0].astype(np.int64)
    vectors = {
        name: (random.normal(size=(EXAMPLES, 60)) + 3 * labels[:, None] * ("pruned" in name)).astype(np.float32)
        for name in ("unpruned_first", "unpruned_mean", "pruned_first", "pruned_mean")
    }
    read = {"unpruned_read": np.full(EXAMPLES, 5), "pruned_read": np.arange(EXAMPLES) % 4}
    save_file({"example": np.arange(EXAMPLES), "label": labels, "predicted": answers[1], **vectors, **read}, folder / S)
    return folder


S = "states.safetensors"


def write_about(folder, **changes):
    about = {"task": "sst2", "labels": LABELS, "split": "evaluation", "examples": EXAMPLES}
    about |= {"tagger": {"pipeline": "en"}, "random_draws": 5, "bootstrap": 100}
    model = {"method": "ltp", "backbone": "tiny", "thresholds": [None, 0.004, 0.01], "directory": "/secret/place"}
    (folder / "about.json").write_text(json.dumps({**about, "model": model, **changes}))


def words_of(name):
    return [("the", 9, 90), (f"{name}ly", 7, 8), ("nan", 3, 4)]


def tokens_of(example):
    """Four tokens; the layers decide in the first and in the third."""
    lived = [("[CLS]", 3, True, [1.0, 0.5]), ("a", 0, False, [0.25, np.nan])]
    lived += [("film", 2, True, [0.5, 1.0]), ("[SEP]", 1, False, [0.75, np.nan])]
    return [
        {
            "example": example,
            "texts": 0,
            "text": 0,
            "piece": place,
            "piece_text": piece,
            "word": place,
            "word_text": piece,
            "start": -1 if "[" in piece else place,
            "end": -1 if "[" in piece else place + 1,
            "n_layers": LAYERS,
            "survived": survived,
            "kept_last_read": read,
            "importance": [importance[0], np.nan, importance[1]],
            **dict.fromkeys(("pos", "tag", "lemma", "entity"), ""),
            **dict.fromkeys(("stop", "number", "punctuation", "domain_term", "truncated"), False),
            "special": "[" in piece,
        }
        for place, (piece, survived, read, importance) in enumerate(lived)
    ]


@pytest.fixture
def axes():
    return Figure().add_subplot()


def retention_rows(directory, kinds=word_classes.KINDS):
    return word_classes.last_read(word_classes.of_words(Tables(directory).csv("retention.csv"), kinds))


def y_labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_retention_stands_at_its_place_with_interval_and_random_baseline(directory, axes):
    rows = retention_rows(directory)
    word_classes.draw_retention(axes, rows, overall=0.76)
    points, _, (bars,) = axes.containers[0]
    # of CLASSES, at the third stage: 0.9 − 0.11·number − 0.14, best first within a kind
    expected = [65.0, 54.0, 43.0, 32.0, 21.0]
    assert y_labels(axes) == [
        "stop word (101)",
        "domain term (102)",
        "other content word (103)",
        "NOUN (104)",
        "DET (105)",
    ]
    np.testing.assert_allclose(points.get_xdata(orig=False), expected)
    ends = np.array([segment[:, 0] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, np.add.outer(expected, [-2, 3]))
    at_random = next(line for line in axes.lines if line.get_label() == "pruned at random")
    np.testing.assert_allclose(at_random.get_xdata(orig=False), np.array(expected) / 2)
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label() == "all words: 76.0 %"] == [76.0]
    assert "%" in axes.get_xlabel()


def test_lift_is_drawn_over_all_words_and_over_random(directory, axes):
    word_classes.draw_lift(axes, retention_rows(directory))
    lift, over_random = (container[0] for container in axes.containers)
    np.testing.assert_allclose(lift.get_xdata(orig=False), [1.3, 1.08, 0.86, 0.64, 0.42])
    np.testing.assert_allclose(over_random.get_xdata(orig=False), [1.95, 1.62, 1.29, 0.96, 0.63])


def test_the_heat_map_has_a_row_per_class_and_a_column_per_stage(directory, axes):
    rows = word_classes.of_words(Tables(directory).csv("retention.csv"))
    image = word_classes.draw_layers(axes, rows)
    expected = [[90 - 11 * number - 7 * place for place in range(5)] for number in range(1, 6)]
    np.testing.assert_allclose(image.get_array(), expected)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "read\nby last", "3", "mean"]
    assert y_labels(axes)[-1] == "DET" and axes.texts[0].get_text() == "79"


def test_bars_are_occurrences_and_their_dark_part_what_was_kept(directory, axes):
    counts = words.most_kept(Tables(directory).csv("frequent_words.csv"), "class good")
    words.draw_bars(axes, counts, "good")
    total, kept = axes.containers
    assert [bar.get_width() for bar in total] == [90, 8, 4]
    assert [bar.get_width() for bar in kept] == [9, 7, 3]
    assert y_labels(axes) == ["the", "goodly", "nan"]
    assert [label.get_color() for label in axes.get_yticklabels()] == [words.STOP_COLOUR, "black", "black"]


def test_terms_stand_at_their_share_beside_whole_classes_of_words(directory, axes):
    tables = Tables(directory)
    terms = tables.csv("domain_terms.csv").query("total > 0")
    domain_terms.draw_terms(axes, terms, retention_rows(directory, ("flag",)))
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [75, 20, 100])
    assert y_labels(axes) == ["film (40)", "plot (50)", "null (1)"]
    assert {line.get_label(): round(line.get_xdata()[0], 6) for line in axes.lines[1:]} == {
        "all domain terms: 54.0 %": 54.0,
        "other content words: 43.0 %": 43.0,
        "stop words: 65.0 %": 65.0,
    }


def test_trajectories_are_means_and_the_band_holds_the_middle_of_the_examples(axes):
    kept = np.array([[10, 6, 2], [20, 8, 4], [30, 20, 10]])
    lengths.draw_trajectories(axes, kept, np.array([True, True, False]))
    right, wrong = axes.lines
    assert right.get_ydata().tolist() == [15, 7, 3] and wrong.get_ydata().tolist() == [30, 20, 10]
    assert [line.get_label() for line in axes.lines] == ["correct (n = 2)", "incorrect (n = 1)"]
    corners = axes.collections[0].get_paths()[0].vertices
    assert {tuple(np.round(corner, 6)) for corner in corners} >= {(0, 11), (0, 19), (2, 2.2), (2, 3.8)}
    assert axes.get_ylabel() == "tokens"


def test_histograms_are_shares_of_the_right_and_of_the_wrong_answers(axes):
    counts, correct = np.array([3, 3, 4, 9, 5, 5]), np.array([True, True, True, True, False, False])
    lengths.draw_histogram(axes, counts, correct, "input")
    outlines = {patch.get_label(): patch.get_data() for patch in axes.patches if not patch.get_fill()}
    assert outlines["correct"].edges.tolist() == [2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5]
    assert outlines["correct"].values.tolist() == [50, 25, 0, 0, 0, 0, 25]
    assert outlines["incorrect"].values.tolist() == [0, 0, 100, 0, 0, 0, 0]
    assert axes.get_title() == "input"


def test_thresholds_stand_at_their_layers(axes):
    thresholds.draw_thresholds(axes, [None, 0.004, 0.01])
    (bars,) = axes.containers
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars] == [(2.0, 0.004), (3.0, 0.01)]
    assert [text.get_text() for text in axes.texts] == ["0.004", "0.01"]


def test_the_map_of_a_sentence_is_white_where_a_token_is_gone():
    values = sentence.layer_map(pd.DataFrame(tokens_of(0)))
    gone = np.nan
    # layer 2 decided nothing; the last layer read `film` although it did not pass it on
    np.testing.assert_allclose(values, [[1.0, gone, 0.5, 0.75], [0.5, gone, 0.5, gone], [0.5, gone, 1.0, gone]])


def test_the_sentence_is_the_first_readable_one_that_was_answered_rightly():
    examples = pd.DataFrame({"example": [5, 6, 7, 8], "length": [40, 12, 12, 12], "correct": [True, False, True, True]})
    assert sentence.example_to_show(examples) == 7
    assert sentence.example_to_show(examples.assign(correct=None)) == 6
    assert sentence.example_to_show(examples.assign(length=4)) is None


def test_the_silhouette_is_that_of_the_states():
    points = np.array([[0.0, 0], [0, 1], [4, 0], [4, 1]])
    # a = 1 and b = (4 + √17)/2 for each of them
    between = (4 + 17**0.5) / 2
    assert states.silhouette(points, np.array([0, 0, 1, 1])) == pytest.approx((between - 1) / between)
    assert np.isnan(states.silhouette(points, np.zeros(4)))


def test_a_map_of_states_is_the_same_every_time_and_keeps_far_groups_apart():
    random = np.random.default_rng(1)
    vectors = np.concatenate([random.normal(size=(20, 60)), random.normal(size=(20, 60)) + 20]).astype(np.float32)
    once, again = states.embed(vectors), states.embed(vectors)
    np.testing.assert_array_equal(once, again)
    assert states.silhouette(once, np.arange(40) >= 20) > 0.5


def test_states_of_each_class_have_their_own_dots(axes):
    states.draw_states(axes, np.arange(12.0).reshape(6, 2), np.array([0, 1, 1, 0, 1, 1]), LABELS)
    assert [len(dots.get_offsets()) for dots in axes.collections] == [2, 4]
    assert axes.collections[0].get_offsets().tolist() == [[0, 1], [6, 7]]


def test_everything_is_drawn_one_column_wide_but_what_lacks_its_package(directory, monkeypatch):
    without_package(monkeypatch, words, "wordcloud")
    said = []
    files = draw.draw_all(directory, said.append)
    clouds = {"word_clouds", "word_clouds_true_positives"}
    assert [file.stem for file in files] == [name for name in draw.FIGURES if name not in clouds]
    why = "left out: the package wordcloud is not installed: pip install 'tokprune_exp[analysis]'"
    assert said == [f"{name} {why}" for name in sorted(clouds)]
    for file in files:
        width, height = struct.unpack(">II", file.read_bytes()[16:24])
        assert width == round(canvas.COLUMN_INCHES * canvas.DPI) and 300 < height < 3000


def without_package(monkeypatch, module, package):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == package else find(name))


def test_clouds_are_drawn_where_the_package_is_installed(directory, tmp_path):
    pytest.importorskip("wordcloud")
    words.clouds_figure(Tables(directory), tmp_path / "clouds.png")
    assert (tmp_path / "clouds.png").stat().st_size > 10_000


def test_what_a_regression_or_a_missing_table_cannot_show_is_said(tmp_path, directory):
    write_about(tmp_path, labels=[], model={"method": "adtp", "backbone": "tiny", "thresholds": [None, None]})
    examples = pq.read_table(directory / "examples.parquet").to_pylist()
    scores = [one | {"label": 1.5, "predicted": 2.0, "correct": None, "length": 50} for one in examples]
    pq.write_table(pa.Table.from_pylist(scores), tmp_path / "examples.parquet")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "states.png").write_bytes(b"of an earlier analysis")
    said = []
    assert draw.draw_all(tmp_path, said.append) == [] and not (tmp_path / "figures" / "states.png").exists()
    reasons = dict(line.split(" left out: ") for line in said)
    assert reasons["retention_by_word_class"].startswith("there is no retention.csv, which `python -m")
    assert reasons["thresholds"] == "the model has no thresholds"
    assert reasons["states"] == "the task has scores and no classes"
    assert reasons["lengths"] == "the task has scores, so that no answer is right or wrong"
    assert reasons["sentence"] == "no example has 8 to 30 tokens; the page shows the longer ones"


def test_a_directory_without_an_analysis_is_refused(tmp_path):
    for draws in (draw.draw_all, present.present):
        with pytest.raises(UserError, match=r"about\.json"):
            draws(tmp_path)
    called = subprocess.run(
        [sys.executable, "-m", "tokprune_exp.analysis.figures", str(tmp_path)], capture_output=True, text=True
    )
    assert called.returncode == 2 and called.stderr.count("\n") == 1 and "about.json" in called.stderr


def test_page_figures_and_tables_lie_in_one_offline_run(directory, tmp_path, monkeypatch):
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    monkeypatch.setattr(draw, "FIGURES", {name: draw.FIGURES[name] for name in ("thresholds", "lengths")})
    written = present.present(directory, wandb="offline", sentences=3)
    assert [path.name for path in written[:3]] == ["thresholds.png", "lengths.png", "page.html"]
    run = read_offline_run(directory)
    assert written[3] == run.files.parent and run.exit_code == 0
    assert (run.project, run.job_type, run.group) == (LoggerConfig().project, "analysis", "ltp-sst2-tiny")
    assert run.media("page", "html-file").read_text("utf-8") == (directory / "page.html").read_text("utf-8")
    for file in written[:2]:
        assert run.media(f"figure/{file.stem}", "image-file").read_bytes() == file.read_bytes()
    assert run.table("domain_terms")[2] == {"term": "null", "total": 1, "kept": 1}
    assert len(run.table("retention")) == len(CLASSES) * len(STAGES) * 3
    assert "/secret/place" not in json.dumps(asdict(run), default=str)
    assert run.artifacts == []


def test_without_matplotlib_the_page_is_written_and_the_figures_are_said_to_be_missing(directory, monkeypatch):
    without_package(monkeypatch, present, "matplotlib")
    said = []
    assert [path.name for path in present.present(directory, wandb="none", say=said.append)] == ["page.html"]
    assert said == ["figures left out: the package matplotlib is not installed: pip install 'tokprune_exp[analysis]'"]


def test_every_model_of_a_comparison_has_its_figures_and_a_column_on_the_page(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "FIGURES", {"thresholds": draw.FIGURES["thresholds"]})
    both = tmp_path / "both"
    for folder in (both, both / "compare" / "ltp_2"):
        folder.mkdir(parents=True)
        for file in directory.iterdir():
            if file.is_file() and file.name != "page.html":
                (folder / file.name).write_bytes(file.read_bytes())
    assert present.models_of(both) == {"ltp": both, "ltp (ltp_2)": both / "compare" / "ltp_2"}
    written = present.present(both, wandb="none", sentences=2)
    assert [path.relative_to(both).as_posix() for path in written] == [
        "figures/thresholds.png",
        "compare/ltp_2/figures/thresholds.png",
        "page.html",
    ]
    html = (both / "page.html").read_text("utf-8")
    assert "<h2>ltp</h2>" in html and "<h2>ltp (ltp_2)</h2>" in html
