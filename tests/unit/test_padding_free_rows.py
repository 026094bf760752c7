"""Documents of a batch in one row: the lengths of rows, the batch that a row is, and where the mask would be dense."""

from __future__ import annotations

import itertools
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
    even_row_lengths,
    fitted_row_lengths,
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
    fitted = fitted_row_lengths(ALPACA, documents, multiple=multiple)
    even = even_row_lengths(documents, 512, multiple=multiple)
    assert padding_free.MOST_LENGTHS == graphs.MAX_GRAPHS
    for rows in (fitted, even):
        assert len(rows.lengths) <= graphs.MAX_GRAPHS and list(rows.lengths) == sorted(set(rows.lengths))
        assert all(length % multiple == 0 for length in rows.lengths)
        lengths, fill = used(rows, ALPACA, documents)
        assert lengths <= set(rows.lengths)
        if rows is fitted:
            assert rows.fill == pytest.approx(fill, abs=0.05)
    largest = int(np.sort(ALPACA)[-documents:].sum())
    assert largest <= fitted.lengths[-1] < largest + multiple
    assert documents * 512 <= even.lengths[-1] < documents * 512 + even.lengths[0]


def test_fitted_lengths_waste_less() -> None:
    _, fitted = used(fitted_row_lengths(ALPACA, 16), ALPACA, 16)
    _, even = used(even_row_lengths(16, 512), ALPACA, 16)
    assert fitted > 0.93 > 0.89 > even


def test_documents_of_one_length() -> None:
    assert fitted_row_lengths(np.full(50, 24), 4) == RowLengths((96,), 24, 1.0)
    assert fitted_row_lengths(np.array([3, 4]), 16).lengths[-1] == 8  # fewer than a batch
    assert fitted_row_lengths(np.array([0, 0]), 2).lengths == (8,)
    assert even_row_lengths(1, 5).lengths == (8,)


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
    rows = RowLengths((16, 24), 8)
    assert [rows.of(tokens) for tokens in (0, 16, 17, 24, 25, 49)] == [16, 16, 24, 24, 48, 72]


def test_the_bound_on_segments_covers_usual_padding() -> None:
    """Else a shape would come with two bounds, which are two graphs."""
    short = RNG.integers(10, 21, 4000)
    rows = fitted_row_lengths(short, 256)
    sums = [int(RNG.choice(short, 256, replace=False).sum()) for _ in range(500)]
    tails = np.array([rows.of(tokens) - tokens for tokens in sums if rows.of(tokens) < rows.lengths[-1]])
    assert (tails > 20).mean() > 0.05 and (tails > rows.max_segment).mean() < 0.01
    assert rows.max_segment < 200  # not that of the largest batch there can be
    assert fitted_row_lengths(ALPACA, 2).max_segment == 512
    assert even_row_lengths(16, 512).max_segment == 1024


# -- batches ---------------------------------------------------------------------------------------------------------


def collator(lengths: tuple[int, ...] = (16, 24), documents: int = 4, **settings: Any) -> PaddingFreeCollator:
    return PaddingFreeCollator(RowLengths(lengths, 10), documents=documents, pad_token_id=0, **settings)


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
    assert batch["cu_seq_lens_q"][documents + 1 :].tolist() == [16] * (6 - documents - 1)
    assert (batch["labels"][:, total:] == -100).all() and (batch["position_ids"][:, total:] < longest).all()
    assert batch["num_real_tokens"] == int(batch["token_mask"].sum()) == total
    assert batch["max_length_q"] == batch["max_length_k"] == 10
    assert "attention_mask" not in batch


def test_labels_default_to_the_tokens() -> None:
    plain = [{"input_ids": row["input_ids"]} for row in examples(3, 2)]
    assert collator()(plain)["labels"][0, :5].tolist() == [-100, 11, 12, -100, 21]


def test_the_next_length_and_beyond_the_last() -> None:
    assert collator()(examples(9, 8))["input_ids"].shape == (1, 24)
    assert collator()(examples(9, 9, 9))["input_ids"].shape == (1, 48)


def test_empty_documents() -> None:
    batch = collator(filler_ids=[5, 6])(examples(3, 0, 2))
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 16, 16, 16]
    nothing = collator(filler_ids=[5, 6])(examples(0, 0))
    assert nothing["num_real_tokens"] == 0 and nothing["input_ids"].unique().tolist() == [5, 6]
    assert (nothing["labels"] == -100).all()


def test_seq_lengths_count_where_they_count_for_trl() -> None:
    rows = [{**row, "seq_lengths": [2, 3]} for row in examples(5)]
    assert collator()(rows)["cu_seq_lens_q"].tolist() == [0, 5, 16, 16, 16, 16]
    split = collator(splits_rows=True)(rows)
    assert split["cu_seq_lens_q"].tolist() == [0, 2, 5, 16, 16, 16]
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
