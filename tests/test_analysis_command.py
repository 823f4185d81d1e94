"""The command: every table of a model on a task, readable again, consistent with the classifier in use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from model_directories import save_random_model
from safetensors.torch import load_file
from test_analysis_words import blank_pipeline

from tokprune_exp.analysis.study import names_of
from tokprune_exp.analysis.units import LAST_READ, read_pieces
from tokprune_exp.analyze import main
from tokprune_exp.serving import load

CHECKOUT = Path(__file__).resolve().parent.parent
TABLES = ["composition", "domain_terms", "forced", "frequent_words", "lengths", "retention", "scores", "silhouettes"]
COLUMNS = {
    *("example", "text", "piece", "piece_text", "word", "word_text", "start", "end", "n_layers", "survived"),
    *("kept_last_read", "importance", "pos", "tag", "lemma", "stop", "entity", "number", "punctuation", "domain_term"),
    *("special", "label", "predicted", "correct", "probability", "length", "truncated"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return blank_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def directory(random_classifier, tiny_tokenizer, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"), random_classifier, tiny_tokenizer)


@pytest.fixture(scope="module")
def data_root(tiny_root, tmp_path_factory):
    """The tiny task's rows as those of SST-2, and pairs of them with scores as those of STS-B."""
    root = tmp_path_factory.mktemp("root")
    for name in ("glue_sst2", "glue_stsb"):
        (root / name).mkdir()
    for split in ("train", "validation"):
        rows = pd.read_parquet(tiny_root / "tiny" / f"{split}.parquet")
        rows.to_parquet(root / "glue_sst2" / f"{split}.parquet")
        pairs = {"sentence1": rows["sentence"], "sentence2": rows["sentence"][::-1].to_numpy()}
        scores = rows["label"] + rows["idx"] / 100
        pd.DataFrame({**pairs, "label": scores}).to_parquet(root / "glue_stsb" / f"{split}.parquet")
    return root


def called(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "tokprune_exp.analyze", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        **options,
    )


@pytest.fixture(scope="module")
def analysed(directory, data_root, pipeline, tmp_path_factory):
    """A whole analysis of 30 of the 40 texts, compared with the same model: what it printed, and its folder."""
    out = tmp_path_factory.mktemp("out") / "new"
    few = ["--examples", "30", "--random-draws", "3", "--bootstrap", "50", "--threads", "1"]
    where = ["--data-root", data_root, "--spacy", pipeline, "--output", out]
    done = called(directory, *few, *where, "--compare", directory, cwd=out.parent)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, out


def test_every_file_is_written_and_named_on_the_screen(analysed):
    printed, out = analysed
    expected = {f"{name}.csv" for name in TABLES} | {"tokens.parquet", "examples.parquet", "states.safetensors"}
    expected |= {"claims.json", "about.json"}
    for folder in (out, out / "compare" / "random"):
        assert {path.name for path in folder.iterdir() if path.is_file()} - {"comparison.csv", "page.html"} == expected
        assert (folder / "figures" / "retention_by_word_class.png").is_file()
    assert (out / "page.html").is_file()
    listed = {line.strip() for line in printed.split("Written:")[1].splitlines() if line.strip()}
    files = {str(path) for path in out.rglob("*") if path.is_file() and "wandb" not in path.parts}
    (run,) = listed - files
    assert files <= listed and Path(run).is_dir() and Path(run).parent.name == "wandb"
    assert "Words read by the last layer" in printed and "Domain terms forced to stay or to leave" in printed


def test_the_long_table_is_what_the_classifier_in_use_says(analysed, directory, data_root):
    _, out = analysed
    tokens, examples = (pq.read_table(out / f"{name}.parquet").to_pandas() for name in ("tokens", "examples"))
    assert set(tokens) == COLUMNS
    texts = pd.read_parquet(data_root / "glue_sst2" / "validation.parquet")
    assert list(examples["example"]) == sorted(set(examples["example"])) and len(examples) == 30
    predictions = load(directory).predict([texts["sentence"][row] for row in examples["example"]])
    for (_, example), prediction in zip(examples.iterrows(), predictions, strict=True):
        assert list(example["texts"]) == [prediction.text]
        assert example["label"] == texts["label"][example["example"]]
        assert ["negative", "positive"][example["predicted"]] == prediction.label
        assert example["correct"] == (example["predicted"] == example["label"])
        assert example["probability"] == pytest.approx(prediction.probability)
        assert list(example["tokens_kept"]) == prediction.tokens_kept
        rows = tokens[tokens["example"] == example["example"]]
        assert list(rows["piece"]) == list(range(len(prediction.tokens)))
        assert list(rows["piece_text"]) == [token.piece for token in prediction.tokens]
        assert list(rows["survived"]) == np.sum(prediction.kept, axis=0).tolist()
        assert list(rows["kept_last_read"]) == prediction.read
        for column in ("label", "predicted", "correct", "probability", "length", "truncated"):
            assert (rows[column] == example[column]).all()
        for row, token in zip(rows.itertuples(), prediction.tokens, strict=True):
            assert row.special == (token.text is None)
            assert (row.start, row.end) == ((-1, -1) if row.special else (token.start, token.end))
            assert row.word_text == ("" if row.special else prediction.text[row.start : row.end])
            assert row.n_layers == len(row.importance) == 4
            # the model's one decision is in its second layer, when everything is still there
            assert [not np.isnan(value) for value in row.importance] == [False, True, False, False]
    assert set(tokens.loc[tokens["word_text"].isin(["film", "plot"]), "pos"]) == {"NOUN"}


def test_depths_give_back_what_was_kept_at_every_stage(analysed):
    _, out = analysed
    pieces = read_pieces(out)
    assert pieces.stages == ["1", "2", "3", LAST_READ, "4"] and pieces.examples == 30
    for place, stage in enumerate(pieces.stages, start=1):
        frame = pieces.frame
        kept = frame["kept_last_read"] if stage == LAST_READ else frame["survived"] >= int(stage)
        assert ((frame["depth"] >= place) == kept).all()


def test_the_tables_agree_with_each_other(analysed):
    _, out = analysed
    table = {name: pd.read_csv(out / f"{name}.csv", dtype={"layer": str}) for name in TABLES}
    retention = table["retention"]
    np.testing.assert_allclose(retention["kept"] + retention["dropped"], retention["total"], rtol=1e-5)
    tokens = pq.read_table(out / "tokens.parquet").to_pandas()
    words = tokens[~tokens["special"]].groupby(["example", "word"])["kept_last_read"].any()
    row = retention.set_index(["unit", "group", "kind", "class", "layer"]).loc["word", "all", "all", "all", LAST_READ]
    assert (row["total"], row["kept"]) == (len(words), words.sum())
    assert row["retention_low"] <= row["retention"] <= row["retention_high"]
    scores = table["scores"].set_index(["model", "class"])
    examples = pq.read_table(out / "examples.parquet").to_pandas()
    accuracy = examples["correct"].mean()
    assert scores.loc[("pruned", "accuracy"), "accuracy"] == pytest.approx(accuracy, rel=1e-4)
    forced = table["forced"].set_index("variant")
    assert forced.loc["as it is", "accuracy"] == pytest.approx(accuracy, rel=1e-4)
    terms = table["domain_terms"]
    assert {"good", "bad"} == set(terms["term"])  # what tells the tiny task's classes apart
    assert dict(zip(terms["term"], terms["class"], strict=True)) == {"good": "positive", "bad": "negative"}
    term_words = tokens[tokens["domain_term"]].groupby(["example", "word"])["kept_last_read"].any()
    assert terms["total"].sum() == len(term_words) and terms["kept"].sum() == term_words.sum()
    assert (terms["kept"] + terms["dropped"] == terms["total"]).all()
    assert set(tokens.loc[tokens["domain_term"], "word_text"]) == {"good", "bad"}
    named = forced.loc["domain terms stay"].dropna(subset=["named"]) if "domain terms stay" in forced.index else None
    assert named is not None and set(named["named"]) == {tokens["domain_term"].sum()}
    assert table["lengths"].set_index(["group", "layer"]).loc[("all", "0"), "tokens"] == pytest.approx(
        examples["length"].mean(), rel=1e-4
    )
    comparison = pd.read_csv(out / "comparison.csv")
    beside = comparison[["1_random_retention", "2_random_retention"]].to_numpy()
    np.testing.assert_allclose(beside[:, 0], beside[:, 1])  # it is the same model


def test_claims_are_numbers_with_intervals_and_sides(analysed):
    _, out = analysed
    record = json.loads((out / "claims.json").read_text())
    assert (record["examples"], record["random_draws"], record["bootstrap"]) == (30, 3, 50)
    for claim in record["claims"]:
        assert claim["low"] <= claim["high"]
        side = "above" if claim["low"] > claim["against"] else "below" if claim["high"] < claim["against"] else None
        assert claim["is"] == (side or "undecided")
    names = {claim["claim"] for claim in record["claims"]}
    assert {"nouns are kept more", "domain terms are kept more", "domain terms decide"} <= names
    assert {"pruning changes accuracy", "classes form clusters"} <= names
    about = json.loads((out / "about.json").read_text())
    assert about["labels"] == ["negative", "positive"] and about["model"]["method"] == "random"
    assert about["source"]["evaluation"]["rows"] == 40 and len(about["model"]["thresholds"]) == 4
    states = load_file(out / "states.safetensors")
    assert states["unpruned_first"].shape == states["pruned_mean"].shape == (30, 64)


def test_a_regression_of_pairs_has_no_classes_and_no_terms(
    random_classifier, tiny_tokenizer, data_root, pipeline, tmp_path, monkeypatch, capsys
):
    model = save_random_model(tmp_path, random_classifier, tiny_tokenizer, labels=(), pair=True, task="stsb")
    options = ["--examples", "12", "--random-draws", "2", "--bootstrap", "20"]
    where = ["--data-root", data_root, "--spacy", pipeline, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["analyze", str(model), *options, *map(str, where)])
    main()
    assert "pearson" in capsys.readouterr().out
    out = tmp_path / "out"
    tokens, examples = (pq.read_table(out / f"{name}.parquet").to_pandas() for name in ("tokens", "examples"))
    assert examples["correct"].isna().all() and examples["probability"].isna().all()
    assert set(tokens["text"]) == {0, 1} and not tokens["domain_term"].any()
    assert all(len(texts) == 2 for texts in examples["texts"])
    for _, of_example in tokens.groupby("example"):
        # [CLS] stands before the first text, each [SEP] behind its own
        assert of_example.loc[of_example["special"], "text"].tolist() == [0, 0, 1]
    assert not (out / "domain_terms.csv").exists() and not (out / "forced.csv").exists()
    assert set(pd.read_csv(out / "retention.csv")["group"]) == {"all"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "no model in nowhere"),
        (["MODEL", "--spacy", "nonsense"], "--spacy nonsense: neither an installed spaCy pipeline nor the folder"),
        (["MODEL", "--task", "nonsense"], "--task nonsense: there is no such task"),
        (["MODEL", "--task", "stsb"], "does not fit task stsb (pairs, no classes)"),
        (["MODEL", "--data-root", "nowhere"], "nowhere/glue_sst2"),
    ],
)
def test_what_can_be_mended_is_one_sentence(arguments, sentence, directory, data_root, pipeline, monkeypatch, capsys):
    given = [str(directory) if one == "MODEL" else one for one in arguments]
    defaults = {"--data-root": data_root, "--spacy": pipeline, "--output": directory / "out"}
    given += [str(part) for name, value in defaults.items() if name not in given for part in (name, value)]
    monkeypatch.setattr(sys, "argv", ["analyze", *given])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_models_of_one_method_get_numbers(directory):
    one = load(directory)
    assert names_of([one, one]) == ["random_1", "random_2"]
    assert names_of([one]) == ["random"]
