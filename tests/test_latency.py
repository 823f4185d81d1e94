"""The stop-watch: who runs when, and what is made of the times; nothing here depends on how fast anything is."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from tokprune_exp.data.batch import Batch
from tokprune_exp.measure import latency
from tokprune_exp.measure.latency import Timing, compare_latency, interleaved_medians, length_sorted_chunks


def test_variants_take_turns_in_alternating_order_after_the_warm_up() -> None:
    calls: list[str] = []
    timings = interleaved_medians(recording(calls, "a", "b"), rounds=3, warmup=1)
    warmup, *rounds = (calls[start : start + 2] for start in range(0, 8, 2))
    assert sorted(warmup) == ["a", "b"]
    assert rounds == [["a", "b"], ["b", "a"], ["a", "b"]]
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_a_timing_is_its_median_and_its_quartiles() -> None:
    timing = Timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.median_s, timing.quartiles_s) == (3.0, (2.0, 4.0))
    assert Timing([7.0]).quartiles_s == (7.0, 7.0)


def test_no_round_is_no_measurement() -> None:
    with pytest.raises(ValueError, match=r"measure\.latency_rounds is 0"):
        interleaved_medians({}, rounds=0)


def test_chunks_hold_neighbours_in_length_and_are_full() -> None:
    assert length_sorted_chunks([5, 1, 9, 3, 7], 2) == [[1, 3], [0, 4]]
    assert length_sorted_chunks([5, 1], 8) == []


def test_the_speed_up_is_the_median_ratio_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # a clock that ticks before and after each call: rounds take (dense, pruned) = (4, 2), (9, 3), (8, 8) seconds
    durations = iter([4.0, 2.0, 3.0, 9.0, 8.0, 8.0])
    monkeypatch.setattr(latency.time, "perf_counter", ticking(durations).__next__)
    batches = [one_batch(), one_batch()]
    (row,) = compare_latency(pruned=id, dense=id, batches_by_size={4: batches}, rounds=3, warmup=0)
    assert row["speedup"] == 2.0 and "plan_ms" not in row
    assert row["speedup_quartiles"] == [1.5, 2.5]
    assert (row["dense_ms"], row["pruned_ms"]) == (4000.0, 1500.0)
    assert (row["batch_size"], row["batches"], row["rounds"]) == (4, 2, 3)
    assert (row["threads"], row["torch"]) == (torch.get_num_threads(), torch.__version__)


def test_the_time_of_the_plan_stands_beside_the_others_where_there_is_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    # one round of dense, pruned, plan: 4, 2 and 1 seconds for two batches
    monkeypatch.setattr(latency.time, "perf_counter", ticking(iter([4.0, 2.0, 1.0])).__next__)
    (row,) = compare_latency(id, id, {4: [one_batch(), one_batch()]}, rounds=1, warmup=0, plan=id)
    assert (row["dense_ms"], row["pruned_ms"], row["plan_ms"], row["speedup"]) == (2000.0, 1000.0, 500.0, 2.0)


def test_each_size_is_a_row_and_nothing_is_timed_with_gradients() -> None:
    rows = compare_latency(
        pruned=lambda batch: torch.is_grad_enabled() and pytest.fail("timed with gradients"),
        dense=lambda batch: batch,
        batches_by_size={1: [one_batch()], 8: [one_batch()]},
        rounds=2,
    )
    assert [row["batch_size"] for row in rows] == [1, 8]


def test_a_size_without_a_full_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"measure\.latency_batch_sizes has 128"):
        compare_latency(pruned=id, dense=id, batches_by_size={128: []}, rounds=1)


def recording(calls: list[str], *names: str) -> dict[str, Callable[[], None]]:
    """Callables that write their name down."""
    return {name: lambda name=name: calls.append(name) for name in names}


def ticking(durations: Iterator[float]) -> Iterator[float]:
    """Clock readings such that the measured calls take these durations."""
    now = itertools.count()
    for start, duration in zip(now, durations, strict=False):
        yield 100.0 * start
        yield 100.0 * start + duration


def one_batch() -> Batch:
    """One example of three tokens."""
    ids = torch.ones(1, 3, dtype=torch.long)
    return Batch(ids, torch.zeros_like(ids), ids.bool(), torch.zeros(1, dtype=torch.long), torch.zeros(1).long())
