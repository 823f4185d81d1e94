"""The bench of threshold against top-k: all ways keep the same tokens, and the command says what it measured."""

import json

import pytest
import torch

from tokprune_exp.bench.arguments import read_arguments
from tokprune_exp.bench.selection import COMPARE, SHARES, THRESHOLD, WAYS, bench, kept


@pytest.mark.parametrize("share", SHARES)
def test_every_way_keeps_the_largest(share):
    tokens = 40
    scores = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0))
    k = kept(tokens, share)
    threshold = float(scores.sort(descending=True).values[0, k - 1 : k + 1].mean())
    largest = set(scores[0].argsort(descending=True)[:k].tolist())
    found = {name: way(scores, k, threshold) for name, way in WAYS.items()}
    as_sets = {
        COMPARE: found[COMPARE][0].nonzero().flatten(),
        THRESHOLD: found[THRESHOLD].flatten(),
        "top-k, sorted": found["top-k, sorted"].indices[0],
        "top-k, unsorted": found["top-k, unsorted"].indices[0],
        "k-th value, compare": found["k-th value, compare"][0].nonzero().flatten(),
        "argsort": found["argsort"][0],
    }
    assert set(as_sets) == set(WAYS)
    for name, indices in as_sets.items():
        assert set(indices.tolist()) == largest, name


def test_a_share_that_is_a_whole_number_of_tokens_is_that_number():
    assert [kept(10, share) for share in SHARES] == list(range(1, 10))
    assert kept(128, 0.1) == 13


def test_the_command_leaves_a_table_and_three_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    chosen = ["--lengths", "16", "8", "--batch", "2", "--rounds", "1", "--output", str(tmp_path / "out")]
    bench(read_arguments(["selection", *chosen]))
    printed = capsys.readouterr().out
    assert "2 texts of 16 tokens" in printed and "a BERT-base layer takes" in printed
    assert max(len(line) for line in printed.splitlines() if "Written" not in line) <= 100
    record = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert len(record["rows"]) == 2 * len(SHARES) * len(WAYS)
    for row in record["rows"]:
        assert row["share_of_layer"] == pytest.approx(1e-6 * row["us"] / (1e-3 * row["layer_ms"]))
        if row["way"] == COMPARE:
            assert row["over_compare"] == 1.0
        if row["way"] == THRESHOLD:
            assert row["over_threshold"] == 1.0
    assert (tmp_path / "out" / "selection.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "out" / "selection.csv").read_text().splitlines()) == 1 + len(record["rows"])
