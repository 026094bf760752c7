"""Documents of a batch in one row: the lengths of rows, the batch that a row is, and where the mask would be dense."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chronicals_trl.model import graphs
from chronicals_trl.packing import padding_free
from chronicals_trl.packing.padding_free import (
    PaddingFreeCollator,
    RowLengths,
    fitted_row_lengths,
    spread_row_lengths,
)
from chronicals_trl.padding_free import dense_mask

RNG = np.random.default_rng(7)
ALPACA = np.clip(RNG.lognormal(np.log(160), 0.7, 4000).astype(np.int64), 2, 512)


def used(rows: RowLengths, lengths: Any, documents: int, batches: int = 100) -> tuple[set[int], float]:
    """The lengths that random batches get, and the share of their tokens that is real."""
    sums = [int(RNG.choice(lengths, documents, replace=False).sum()) for _ in range(batches)]
    given = [rows.of(tokens) for tokens in sums]
    assert all(length >= tokens for length, tokens in zip(given, sums, strict=True))
    return set(given), sum(sums) / sum(given)


# -- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("documents", "multiple"), [(1, 8), (2, 8), (16, 8), (16, 40)])
def test_random_batches_have_at_most_as_many_lengths_as_there_may_be_graphs(documents: int, multiple: int) -> None:
    rows = fitted_row_lengths(ALPACA, documents, multiple=multiple)
    assert padding_free.MOST_LENGTHS == graphs.MAX_GRAPHS == len(rows.lengths)
    assert list(rows.lengths) == sorted(set(rows.lengths)) and all(length % multiple == 0 for length in rows.lengths)
    lengths, fill = used(rows, ALPACA, documents, 2000)
    assert len(lengths - set(rows.lengths)) <= 2  # a batch that is larger than all that were drawn
    assert rows.fill == pytest.approx(fill, abs=0.01)
    assert rows.usual == pytest.approx(documents * ALPACA.mean(), rel=0.02)
    largest = int(np.sort(ALPACA)[-documents:].sum())
    assert rows.lengths[-1] <= rows.largest and largest <= rows.largest < largest + multiple


def test_the_share_of_padded_rows_that_is_real() -> None:
    """By which a run tells whether there is anything to win."""
    for documents, expected in ((2, 0.74), (16, 0.42)):
        rows = fitted_row_lengths(ALPACA, documents)
        batches = RNG.choice(ALPACA, (2000, documents))
        assert rows.padded == pytest.approx(batches.sum() / (documents * batches.max(axis=1)).sum(), abs=0.01)
        assert rows.padded == pytest.approx(expected, abs=0.02)


def test_fitted_lengths_waste_little() -> None:
    _, fill = used(fitted_row_lengths(ALPACA, 16), ALPACA, 16, 1000)
    assert fill > 0.945


def test_documents_of_one_length() -> None:
    assert fitted_row_lengths(np.full(50, 24), 4) == RowLengths((96,), 8, 24, 96, 96, 96, 1.0, 1.0)
    assert fitted_row_lengths(np.array([3, 4]), 16).largest == 8  # fewer than a batch
    assert fitted_row_lengths(np.array([0, 0]), 2).lengths == (8,)


def test_batches_of_very_many_documents() -> None:
    """Of which fewer are drawn."""
    rows = fitted_row_lengths(np.tile(ALPACA, 5), 20_000)
    assert rows.lengths[0] > 0.98 * 20_000 * ALPACA.mean() and rows.fill > 0.99


def test_a_search_among_many_ends_stays_small() -> None:
    """The candidates are rounded, which costs little, and no row gets longer than the largest batch for it."""
    long = RNG.integers(1, 32_000, 5000)
    rows = fitted_row_lengths(long, 16)
    largest = int(np.sort(long)[-16:].sum())
    assert rows.lengths[-1] <= rows.largest == -(-largest // 8) * 8
    _, fill = used(rows, long, 16, 1000)
    assert fill > 0.95
    alike = fitted_row_lengths(np.full(50, 30_001), 16)
    assert alike.lengths == (alike.largest,) == (480_016,)


def test_batches_in_the_order_of_the_documents() -> None:
    """Of documents that are sorted by length, those drawn at random have other sums."""
    lengths = np.sort(ALPACA)
    rows = fitted_row_lengths(lengths, 16, in_order=True)
    sums = lengths.reshape(-1, 16).sum(axis=1)
    assert {rows.of(int(tokens)) for tokens in sums} == set(rows.lengths) and len(rows.lengths) == graphs.MAX_GRAPHS
    assert rows.fill == pytest.approx(sums.sum() / sum(rows.of(int(tokens)) for tokens in sums))
    assert len({fitted_row_lengths(lengths, 16).of(int(tokens)) for tokens in sums} - set(rows.lengths)) > 20
    assert fitted_row_lengths(np.array([5, 9, 30]), 2, in_order=True).lengths == (16,)  # the last one is by itself
    assert fitted_row_lengths(np.array([5, 9, 30]), 16, in_order=True).lengths == (48,)


def test_of_very_many_batches_in_order_those_at_the_end_count_too() -> None:
    lengths = np.repeat([10, 1000], 9000)
    assert fitted_row_lengths(lengths, 1, in_order=True).usual == 505


@pytest.mark.parametrize("documents", [1, 2, 16, 64])
def test_lengths_where_only_a_limit_is_known(documents: int) -> None:
    """Wherever below the limit the documents are, about eight lengths hold them, and little of a row is wasted."""
    for limit in (512, 2048, 32_768):
        rows = spread_row_lengths(documents, limit)
        assert rows.lengths[-1] == rows.largest == documents * limit and rows.fill is None
        lengths, fill = used(rows, ALPACA, documents, 1000)
        assert lengths <= set(rows.lengths) and len(lengths) <= 13
        assert fill > {1: 0.76, 2: 0.82, 16: 0.93, 64: 0.95}[documents]
        assert rows.longest == limit and all(length % 8 == 0 for length in rows.lengths)
    assert spread_row_lengths(1, 5).lengths == (8,)
    assert spread_row_lengths(2, 100, multiple=40).lengths == (40, 80, 120, 160, 200)


def test_rows_as_long_as_their_documents() -> None:
    for rows in (fitted_row_lengths(ALPACA, 16, multiple=24), spread_row_lengths(16, 512, multiple=24)):
        exact = rows.exact()
        assert [exact.of(tokens) for tokens in (0, 1, 24, 25, 9999)] == [24, 24, 24, 48, 10_008]
        assert (exact.largest, exact.longest_segment(240)) == (rows.largest, 512)


def test_the_lengths_are_the_best_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding_free, "MOST_LENGTHS", 3)
    for _ in range(20):
        ends = np.sort(RNG.choice(500, 9, replace=False)) + 1
        counts = RNG.integers(0, 9, 9)

        def padding(chosen: tuple[int, ...], ends: Any = ends, counts: Any = counts) -> int:
            given = ends[list(chosen)][np.searchsorted(ends[list(chosen)], ends)]
            return int(((given - ends) * counts).sum())

        best = min(padding((*pair, 8)) for pair in itertools.combinations(range(8), 2))
        found = padding_free._least_padding(ends, counts)
        assert found[-1] == 8 and len(found) == 3 and padding(tuple(found)) == best


def test_nothing_of_the_users_is_drawn_and_every_rank_draws_the_same() -> None:
    state = np.random.get_state()[1].copy()
    assert fitted_row_lengths(ALPACA, 16) == fitted_row_lengths(ALPACA, 16)
    assert (np.random.get_state()[1] == state).all()


def test_longer_than_promised() -> None:
    rows = RowLengths((16, 24), 8, 8, 0, 20, 24)
    assert [rows.of(tokens) for tokens in (0, 16, 17, 24, 25, 49)] == [16, 16, 24, 24, 32, 56]


def test_the_bound_on_segments_covers_usual_padding() -> None:
    """Else a shape would come with two bounds, which are two graphs."""
    short = RNG.integers(10, 21, 4000)
    rows = fitted_row_lengths(short, 256)
    sums = [int(RNG.choice(short, 256, replace=False).sum()) for _ in range(500)]
    tails = np.array([rows.of(tokens) - tokens for tokens in sums])
    bounds = np.array([rows.longest_segment(rows.of(tokens)) for tokens in sums])
    assert (tails > 20).mean() > 0.05 and (tails > bounds).mean() < 0.01
    assert bounds.max() < 300  # not that of the largest batch there can be


@pytest.mark.parametrize("rows", [fitted_row_lengths(ALPACA, 16), spread_row_lengths(16, 512)])
def test_each_length_has_a_bound_of_its_own(rows: RowLengths) -> None:
    """The few largest batches stand far apart: long padding there is no reason for a larger bound elsewhere."""
    assert [rows.longest_segment(length) for length in rows.lengths[1:4]] == [512] * 3
    assert 512 <= rows.longest_segment(rows.lengths[0]) < 700
    assert rows.longest_segment(rows.lengths[-1]) == rows.lengths[-1] - rows.lengths[-2] > 512
    assert rows.longest_segment(rows.lengths[-1] - 8) == rows.longest_segment(rows.lengths[-1])  # a guess, held down
    assert rows.longest_segment(rows.lengths[-1] + 8) == rows.exact().longest_segment(8000) == 512
    assert fitted_row_lengths(np.array([3, 1]), 2).exact().longest_segment(8) == 8  # of padding, at most


# -- batches ---------------------------------------------------------------------------------------------------------


def collator(lengths: tuple[int, ...] = (16, 24), documents: int = 4, **settings: Any) -> PaddingFreeCollator:
    return PaddingFreeCollator(
        RowLengths(lengths, 8, 10, 10, 20, 48, 0.9), documents=documents, pad_token_id=0, **settings
    )


def examples(*lengths: int) -> list[dict[str, list[int]]]:
    rows = [[10 * (row + 1) + i for i in range(length)] for row, length in enumerate(lengths)]
    return [{"input_ids": ids, "labels": [-100 if i % 3 == 2 else i for i in ids]} for ids in rows]


@pytest.mark.parametrize("lengths", [(5, 3, 7), (9,), (5, 8, 3), (1, 2, 3, 4)])
def test_the_documents_are_those_of_trls_padding_free_collator(lengths: tuple[int, ...]) -> None:
    total, longest = sum(lengths), max(lengths)
    batch = collator(emit_token_mask=True)(examples(*lengths))
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples(*lengths))
    for name in ("input_ids", "labels", "position_ids", "seq_idx"):
        assert batch[name].dtype == theirs[name].dtype and batch[name].shape == (1, 16)
        assert torch.equal(batch[name][:, :total], theirs[name]), name
    documents = len(lengths)
    assert torch.equal(batch["cu_seq_lens_q"][: documents + 1], theirs["cu_seq_lens_q"])
    assert batch["cu_seq_lens_q"][documents + 1 :].tolist() == [16] * (7 - documents - 1)
    assert (batch["labels"][:, total:] == -100).all() and (batch["position_ids"][:, total:] < longest).all()
    assert batch["num_real_tokens"] == int(batch["token_mask"].sum()) == total
    assert batch["max_length_q"] == batch["max_length_k"] == 10
    assert "attention_mask" not in batch


def shape_of(batch: dict[str, Any]) -> tuple[int, ...]:
    """What a CUDA graph of its decoder layers takes for granted."""
    return batch["input_ids"].shape[1], len(batch["cu_seq_lens_q"]), batch["max_length_q"]


def test_all_batches_of_a_length_are_alike() -> None:
    """Those as well that are shorter than hardly any, whose padding is longer than any other's."""
    rows = fitted_row_lengths(ALPACA, 16)
    collate = PaddingFreeCollator(rows, documents=16, pad_token_id=0)
    shapes: dict[int, set[tuple[int, ...]]] = {}
    for total in (1, 20, 500, rows.smallest - 1, rows.smallest, rows.lengths[0], *rows.lengths, rows.lengths[0] + 1):
        for documents in (1, 16):
            if documents <= total <= 512 * documents:
                parts = np.full(documents, total // documents)
                parts[: total % documents] += 1
                batch = collate(examples(*parts.tolist()))
                shapes.setdefault(batch["input_ids"].shape[1], set()).add(shape_of(batch))
    assert set(shapes) == set(rows.lengths) and all(len(alike) == 1 for alike in shapes.values())
    tails = [rows.most_paddings(length) for length in rows.lengths]
    assert tails == [math.ceil(rows.lengths[0] / rows.longest_segment(rows.lengths[0])), *[1] * 7] and tails[0] > 2
    assert rows.exact().most_paddings(8) == 1


def test_labels_default_to_the_tokens() -> None:
    plain = [{"input_ids": row["input_ids"]} for row in examples(3, 2)]
    assert collator()(plain)["labels"][0, :5].tolist() == [-100, 11, 12, -100, 21]


def test_the_next_length_and_beyond_the_last() -> None:
    assert collator()(examples(9, 8))["input_ids"].shape == (1, 24)
    assert collator()(examples(9, 9, 9))["input_ids"].shape == (1, 32)


def test_where_lengths_are_a_guess_no_row_takes_more_than_padded_rows_have() -> None:
    """Neither of the documents that a limit allows nor of those that come."""
    guess = PaddingFreeCollator(RowLengths((40, 160, 640), 8, 160, 0, 320, 640), documents=4, pad_token_id=0)
    sizes = [(10, 10), (20, 2), (20, 20, 20), (50, 1, 1), (10, 10), (300, 300, 20)]
    rows = [guess(examples(*lengths))["input_ids"].shape[1] for lengths in sizes]
    #      2·10  40  60, not 160  150, not 160  40, the first that fits  beyond all
    assert rows == [24, 40, 64, 152, 40, 640]
    padded = [len(lengths) * max(lengths) for lengths in sizes]
    assert all(row < max(padded[: index + 1]) + 8 for index, row in enumerate(rows))
    known = PaddingFreeCollator(RowLengths((40, 160), 8, 160, 0, 320, 640, 0.9, 0.5), documents=4, pad_token_id=0)
    assert known(examples(10, 10))["input_ids"].shape[1] == 40  # shapes that recur are worth more


def test_workers_that_are_spawned_get_a_copy() -> None:
    batch, copied = (each(examples(9, 8)) for each in (collator(), pickle.loads(pickle.dumps(collator()))))
    assert torch.equal(batch["input_ids"], copied["input_ids"])


def test_empty_documents() -> None:
    batch = collator(filler_ids=[5, 6])(examples(3, 0, 2))
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 15, 16, 16, 16]
    nothing = collator(filler_ids=[5, 6])(examples(0, 0))
    assert nothing["num_real_tokens"] == 0 and nothing["input_ids"].unique().tolist() == [5, 6]
    assert (nothing["labels"] == -100).all()


def test_seq_lengths_count_where_they_count_for_trl() -> None:
    rows = [{**row, "seq_lengths": [2, 3]} for row in examples(5)]
    assert collator()(rows)["cu_seq_lens_q"].tolist() == [0, 5, 15, 16, 16, 16, 16]
    split = collator(splits_rows=True)(rows)
    assert split["cu_seq_lens_q"].tolist() == [0, 2, 5, 15, 16, 16, 16]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    assert torch.equal(split["labels"][:, :5], theirs["labels"])


# -- attention -------------------------------------------------------------------------------------------------------


def test_where_the_mask_would_be_dense() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    model = tiny_models.build("llama")
    assert dense_mask(model, cpu, half=False) is None
    for implementation in ("sdpa", "eager", "chronicals_blockwise"):
        model.config._attn_implementation_internal = implementation
        assert f"({implementation})" in str(dense_mask(model, gpu, half=True))
    for implementation in ("chronicals_fa4", "chronicals_varlen", "flash_attention_2"):
        model.config._attn_implementation_internal = implementation
        assert dense_mask(model, gpu, half=True) is None
        assert "float32" in str(dense_mask(model, gpu, half=False))
    assert dense_mask(model.to(torch.bfloat16), gpu, half=False) is None
