"""Bins dealt to ranks: each once, in a seeded order, at equal cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler
from trl import pack_dataset as trl_pack_dataset

from chronicals_trl.packing import BalancedSampler, pack_dataset, pack_lengths
from chronicals_trl.packing.balance import WINDOW_ROWS, StepLayout, attention_costs, have_tokens, imbalance

SHAREGPT = Path(__file__).parents[3] / "shared" / "data" / "lengths" / "sharegpt_recovered.npy"
SIZES = [(2, 1, 1), (2, 1, 4), (2, 3, 2), (3, 2, 1), (8, 2, 4)]


def random_costs(count: int, seed: int = 0) -> np.ndarray:
    """Most bins alike, a few some four times as costly, as in chat data."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(count) < 0.05, rng.integers(3_000, 8_000, count), rng.integers(1_800, 2_300, count))


def batches_of_ranks(sampler: BalancedSampler, *, split: bool = False) -> list[list[list[int]]]:
    """[rank][micro-step] -> the row numbers, as Accelerate deals them."""
    size = sampler.batch_size * (sampler.ranks if split else 1)
    return [
        list(
            BatchSamplerShard(
                BatchSampler(sampler, size, drop_last=False),
                sampler.ranks,
                rank,
                split_batches=split,
                even_batches=False,
            )
        )
        for rank in range(sampler.ranks)
    ]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("ranks", "batch_size", "accumulation"), SIZES)
def test_what_accelerate_deals_is_balanced(ranks: int, batch_size: int, accumulation: int, split: bool) -> None:
    """Seen from the far end: the costs of the batches that each rank gets, micro-step by micro-step."""
    costs = random_costs(WINDOW_ROWS * ranks * 5)
    sampler = BalancedSampler(costs, ranks=ranks, batch_size=batch_size, accumulation=accumulation, seed=3)
    dealt = batches_of_ranks(sampler, split=split)
    steps = min(len(batches) for batches in dealt) // accumulation * accumulation
    of_ranks = np.array([[costs[batch].sum() for batch in batches[:steps]] for batches in dealt], dtype=float)
    excess = of_ranks.max(0) / of_ranks.mean(0) - 1
    of_steps = of_ranks.reshape(ranks, -1, accumulation).sum(2)
    sizes: dict[str, int] = {"ranks": ranks, "batch_size": batch_size, "accumulation": accumulation}
    assert excess.mean() < 0.02
    assert (of_steps.max(0) / of_steps.mean(0) - 1).mean() < 0.02
    # The report's figures are those of what is dealt, and the plain shuffle's are far from them.
    reported = imbalance(costs[sampler.order(0)], **sizes)
    whole = len(costs) // (ranks * batch_size)
    assert reported.micro_step == pytest.approx(excess[:whole].mean(), rel=0.02)
    assert reported.step == pytest.approx((of_steps.max(0) / of_steps.mean(0) - 1).mean(), rel=0.02)
    shuffled = imbalance(costs[sampler.shuffled(0)], **sizes)
    assert shuffled.micro_step > 5 * reported.micro_step and shuffled.step > 5 * reported.step


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.integers(1, 2**62), max_size=150),
    ranks=st.integers(1, 5),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    window_rows=st.integers(1, 12),
    seed=st.integers(0, 2**63),
)
def test_every_bin_once(costs: list[int], window_rows: int, seed: int, **sizes: Any) -> None:
    sampler = BalancedSampler(np.array(costs, dtype=np.int64), seed=seed, window_rows=window_rows, **sizes)
    for epoch in (0, 1):
        order = sampler.order(epoch)
        assert sorted(order.tolist()) == list(range(len(costs)))
        assert np.array_equal(order, sampler.order(epoch))
    assert len(sampler) == len(costs)
    assert list(sampler) == sampler.order(0).tolist()


def test_epochs_and_seeds_differ_and_ranks_agree() -> None:
    costs = random_costs(1_000)
    make = lambda seed: BalancedSampler(costs, ranks=2, batch_size=2, accumulation=2, seed=seed)  # noqa: E731
    sampler, again = make(5), make(5)
    first = list(sampler)
    torch.manual_seed(99)  # another rank's generators may be anywhere
    np.random.seed(99)
    assert list(again) == first == list(again)
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and list(make(6)) != first
    again.set_epoch(1)
    assert list(again) == second


@pytest.mark.parametrize("seed", [0, 42])
def test_is_the_stock_shuffle_dealt_within_windows(seed: int) -> None:
    costs = random_costs(WINDOW_ROWS * 2 * 6 + 7)
    sampler = BalancedSampler(costs, ranks=2, batch_size=1, seed=seed)
    stock = SeedableRandomSampler(
        data_source=range(len(costs)), replacement=False, num_samples=None, generator=torch.Generator(), data_seed=seed
    )
    assert isinstance(stock, RandomSampler)
    for epoch in (0, 3):
        stock.set_epoch(epoch)
        shuffled = list(stock)
        assert sampler.shuffled(epoch).tolist() == shuffled
        order = sampler.order(epoch).tolist()
        assert order != shuffled
        size = WINDOW_ROWS * 2
        windows = [(i * size, (i + 1) * size) for i in range(5)] + [(5 * size, len(costs))]
        assert all(set(order[low:high]) == set(shuffled[low:high]) for low, high in windows)
        assert order[-1] == shuffled[-1]  # an odd one is left where it was
        # No curriculum: the place within a window says nothing about the cost.
        places = np.arange(len(costs)) % size
        assert abs(np.corrcoef(places, costs[order])[0, 1]) < 0.1


def test_a_rank_is_not_always_the_costly_one() -> None:
    costs = random_costs(2_000)
    sampler = BalancedSampler(costs, ranks=2, batch_size=1)
    pairs = costs[sampler.order(0)].reshape(-1, 2)
    assert 0.4 < (pairs[:, 0] > pairs[:, 1]).mean() < 0.6


def test_a_short_last_window_joins_the_one_before() -> None:
    """By itself it would be rows of whatever bins came last."""
    costs = np.arange(1, 2 * (WINDOW_ROWS + 1) + 1) * 100
    sampler = BalancedSampler(costs, ranks=2, batch_size=1)
    for epoch in range(5):
        pairs = costs[sampler.order(epoch)].reshape(-1, 2)
        assert (np.abs(np.diff(pairs)) == 100).all()


def test_windows_are_of_whole_steps() -> None:
    costs = random_costs(8 * 30)
    sampler = BalancedSampler(costs, ranks=2, batch_size=2, accumulation=2, window_rows=3)
    order, shuffled = (rows.reshape(-1, 8) for rows in (sampler.order(0), sampler.shuffled(0)))
    for step, drawn in zip(order, shuffled, strict=True):
        assert set(step.tolist()) == set(drawn.tolist())


# Three rows that differ by 10, 4 and 4 within.
UNEQUAL = np.array([100, 110, 200, 204, 300, 304])


def test_the_rows_of_a_micro_step_make_up_for_each_other() -> None:
    """10 - 4 - 4, whatever the order in which the rows were drawn: they go into one batch."""
    for epoch in range(10):
        order = BalancedSampler(UNEQUAL, ranks=2, batch_size=3).order(epoch)
        assert abs(np.diff(UNEQUAL[order].reshape(2, 3).sum(1))) == 2


def test_the_micro_steps_of_a_step_make_up_for_each_other() -> None:
    """As they come: 10 - 4 - 4, 4 - 10 + 4, or 4 - 4 + 10."""
    for epoch in range(10):
        order = BalancedSampler(UNEQUAL, ranks=2, batch_size=1, accumulation=3).order(epoch)
        first, second, third = np.abs(np.diff(UNEQUAL[order].reshape(3, 2)))[:, 0].tolist()
        apart = abs(np.diff(UNEQUAL[order].reshape(3, 2).sum(0)))
        assert apart == abs(abs(first - second) - third)


def test_no_more_rows_than_a_window_or_a_micro_step() -> None:
    costs = random_costs(11)
    few = BalancedSampler(costs[:3], ranks=2, batch_size=2)
    assert few.order(0).tolist() == few.shuffled(0).tolist()
    assert BalancedSampler(costs[:0], ranks=2, batch_size=2).order(0).tolist() == []
    rest = BalancedSampler(costs, ranks=2, batch_size=2, accumulation=2)
    assert rest.order(0)[8:].tolist() == rest.shuffled(0)[8:].tolist()


@pytest.mark.parametrize("name", ["ranks", "batch_size", "accumulation", "window_rows"])
def test_bad_sizes(name: str) -> None:
    sizes = {"ranks": 2, "batch_size": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        BalancedSampler(random_costs(4), **sizes)


# -- costs -----------------------------------------------------------------------------------------------------------


def brute_force(rows: Any, capacity: int) -> list[int]:
    return [sum(n * n for n in row) + (capacity - sum(row)) ** 2 for row in rows]


def documents(count: int, longest: int = 30) -> Dataset:
    lengths = np.random.default_rng(1).integers(1, longest, count)
    return Dataset.from_dict({"input_ids": [[1] * int(n) for n in lengths]})


def test_costs_of_packed_rows() -> None:
    packed, _ = pack_dataset(documents(200), 32, pad_bins_to_multiple_of=7)
    assert packed["seq_lengths"][-1] == []
    costs = attention_costs(packed, 32)
    assert costs.dtype == np.int64 and costs.tolist() == brute_force(packed["seq_lengths"], 32)
    assert costs[-1] == 32 * 32  # an empty row is computed too
    chosen = packed.shuffle(seed=1).select(range(3, 40))
    assert attention_costs(chosen, 32).tolist() == brute_force(chosen["seq_lengths"], 32)
    sliced = packed.select(range(5, 20))  # contiguous: a slice of the table, with offsets that do not start at 0
    assert attention_costs(sliced, 32).tolist() == brute_force(sliced["seq_lengths"], 32)


def test_costs_of_rows_that_trl_packed() -> None:
    packed = trl_pack_dataset(documents(200), 32, strategy="bfd")
    assert attention_costs(packed, 32).tolist() == brute_force(packed["seq_lengths"], 32)


def test_costs_do_not_overflow() -> None:
    rows = Dataset.from_dict({"seq_lengths": [[2**30], [2**30, 2**30]]})
    assert attention_costs(rows, 2**31 - 1).tolist() == brute_force(rows["seq_lengths"], 2**31 - 1)


# -- the target ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHAREGPT.exists(), reason="the lengths are not part of the project")
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_ranks_on_chat_lengths(strategy: str, accumulation: int) -> None:
    """The attention cost alone, of which a step's time is only a part, is within the 2% asked of the time."""
    lengths, capacity = np.load(SHAREGPT).astype(np.int64), 8192
    plan = pack_lengths(np.minimum(lengths, capacity) if strategy == "bfd" else lengths, capacity, strategy=strategy)
    costs = np.add.reduceat(plan.lengths**2, plan.bin_offsets[:-1]) + (capacity - plan.bin_tokens) ** 2
    sampler = BalancedSampler(costs, ranks=2, batch_size=1, accumulation=accumulation)
    for epoch in range(3):
        sizes = {"ranks": 2, "batch_size": 1, "accumulation": accumulation}
        balanced = imbalance(costs[sampler.order(epoch)], **sizes)
        assert balanced.micro_step <= 0.02 and balanced.step <= 0.02
        shuffled = imbalance(costs[sampler.shuffled(epoch)], **sizes)
        assert shuffled.micro_step > 0.1 and shuffled.step > 0.05


def steps_of(order: np.ndarray, rows: int, real: np.ndarray) -> list[set[int]]:
    """The rows with tokens of each optimizer step."""
    return [{int(row) for row in order[i : i + rows] if real[row]} for i in range(0, len(order), rows)]


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 150),
    began=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    now=st.integers(0, 5),
    window_rows=st.integers(1, 12),
    seed=st.integers(0, 2**63),
)
def test_other_ranks_get_the_steps_that_a_run_began_with(
    count: int, began: tuple[int, int, int], now: int, window_rows: int, seed: int
) -> None:
    """Each filled up with as many rows without tokens as its own ranks need."""
    rows = began[0] * began[1] * began[2]
    divisions = [(r, b, rows // r // b) for r in range(1, rows + 1) for b in range(1, rows + 1) if not rows % (r * b)]
    costs = random_costs(count, seed % 1000)

    def sampler(sizes: tuple[int, int, int], steps: StepLayout | None) -> tuple[BalancedSampler, np.ndarray]:
        empty = -count % (sizes[0] * sizes[1])
        real = np.arange(count + empty) < count
        made = BalancedSampler(
            np.append(costs, np.full(empty, 10_000)), ranks=sizes[0], batch_size=sizes[1], accumulation=sizes[2],
            seed=seed, window_rows=window_rows, real=real, steps_of=steps,
        )  # fmt: skip
        return made, real

    first, real = sampler(began, None)
    resumed, real_now = sampler(divisions[now % len(divisions)], StepLayout(*began))
    for epoch in (0, 1):
        order = resumed.order(epoch)
        assert sorted(order.tolist()) == list(range(len(real_now)))
        assert not real_now[order[count:]].any()  # rows without tokens are last
        found, expected = steps_of(order, rows, real_now), steps_of(first.order(epoch), rows, real)
        assert [step for step in found if step] == [step for step in expected if step]


def test_steps_of_another_run_are_balanced_for_the_ranks_of_now() -> None:
    costs = np.random.default_rng(0).integers(1_000, 3_000, 4_000)
    now: dict[str, int] = {"ranks": 4, "batch_size": 2, "accumulation": 2}
    for began in (StepLayout(2, 4, 2), StepLayout(1, 16, 1)):  # balanced for two ranks; only shuffled
        resumed = BalancedSampler(costs, **now, steps_of=began)
        as_it_was = BalancedSampler(costs, ranks=began.ranks, batch_size=began.batch_size, accumulation=2)
        dealt = imbalance(costs[resumed.order(0)], **now).step
        left = imbalance(costs[as_it_was.order(0) if began.ranks > 1 else resumed.shuffled(0)], **now).step
        assert dealt < 0.35 * left
        assert resumed.order(0).tolist() != BalancedSampler(costs, **now).order(0).tolist()


def test_steps_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="steps_of has 8 rows a step, and ranks · batch_size · accumulation are 4"):
        BalancedSampler(random_costs(20), ranks=2, batch_size=2, steps_of=StepLayout(2, 2, 2))


def test_rows_without_tokens_come_last_and_do_not_move_the_others() -> None:
    packed, _ = pack_dataset(documents(200), 32, pad_bins_to_multiple_of=7)
    filled, more = pack_dataset(documents(200), 32, pad_bins_to_multiple_of=64)
    assert more.empty_bins and have_tokens(filled).sum() == more.bins == have_tokens(packed).sum()
    for sizes in ({"ranks": 1, "batch_size": 4}, {"ranks": 2, "batch_size": 2, "accumulation": 2}):
        orders = [
            BalancedSampler(attention_costs(rows, 32), **sizes, real=have_tokens(rows)).order(1)
            for rows in (packed, filled)
        ]
        assert orders[0][: more.bins].tolist() == orders[1][: more.bins].tolist()
    shuffled = filled.shuffle(seed=3)
    assert have_tokens(shuffled).tolist() == [bool(row) for row in shuffled["input_ids"]]
