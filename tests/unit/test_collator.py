"""The packed collator against TRL's own, and the padding that it adds."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chronicals_trl.packing import PackedCollator, pack_dataset


def make_row(seq_lengths: list[int], first_token: int = 1) -> dict[str, list[int]]:
    ids = list(range(first_token, first_token + sum(seq_lengths)))
    return {"input_ids": ids, "labels": [-100 if i % 4 == 0 else i for i in ids], "seq_lengths": seq_lengths}


def test_equals_trl_on_full_bins() -> None:
    rows = [make_row([3, 1, 4]), make_row([8], 50), make_row([2, 2, 2, 2], 70)]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    ours = PackedCollator(pad_token_id=0, capacity=8)(rows)
    assert ours.pop("num_real_tokens") == 24
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert type(ours[name]) is type(expected), name
        if isinstance(expected, torch.Tensor):
            assert ours[name].dtype == expected.dtype and torch.equal(ours[name], expected), name
        else:
            assert ours[name] == expected, name


def test_padding_is_a_segment_that_holds_nothing_new() -> None:
    rows = [make_row([3, 2]), make_row([]), make_row([4, 3], 20), make_row([4, 4], 40)]
    batch = PackedCollator(pad_token_id=99, capacity=8, emit_token_mask=True)(rows)
    n = -100
    # The first document's tokens, and positions below the longest document's length.
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, *range(20, 27), 1, *range(40, 48)],
    ]
    assert batch["labels"].tolist() == [
        [n, 2, 3, n, 5, n, n, n, *[n] * 8, n, 21, 22, 23, n, 25, 26, n, n, 41, 42, 43, n, 45, 46, 47],
    ]
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 0, 1, 0, 1, 2, *[0, 1, 2, 3] * 2, 0, 1, 2, 3, 0, 1, 2, 0, *[0, 1, 2, 3] * 2],
    ]
    # The tail is one segment all the same, for attention and for linear-attention layers.
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 16, 20, 23, 24, 28, 32]
    assert batch["seq_idx"].tolist() == [
        [*[0] * 3, *[1] * 2, *[2] * 3, *[3] * 8, *[4] * 4, *[5] * 3, 6, *[7] * 4, *[8] * 4],
    ]
    assert batch["token_mask"].tolist() == [[*[True] * 5, *[False] * 11, *[True] * 7, False, *[True] * 8]]
    assert batch["num_real_tokens"] == 20 and type(batch["num_real_tokens"]) is int
    assert batch["max_length_q"] == batch["max_length_k"] == 8
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].dtype == torch.int64 and batch[name].shape == (1, 32)
    assert batch["cu_seq_lens_q"].dtype == batch["seq_idx"].dtype == torch.int32
    assert batch["cu_seq_lens_q"] is batch["cu_seq_lens_k"]
    assert batch["token_mask"].dtype == torch.bool
    assert "token_mask" not in PackedCollator(pad_token_id=99, capacity=8)(rows)


def test_a_batch_of_only_padding() -> None:
    batch = PackedCollator(pad_token_id=9, capacity=4)([make_row([])] * 2)
    assert batch["num_real_tokens"] == 0
    assert batch["labels"].unique().tolist() == [-100]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 8]
    assert batch["input_ids"].tolist() == [[9] * 8] and batch["position_ids"].tolist() == [[0] * 8]
    filled = PackedCollator(pad_token_id=9, capacity=4, filler_ids=[5, 6, 7])([make_row([])] * 2)
    assert filled["input_ids"].tolist() == [[5, 6, 7, 5] * 2] and filled["num_real_tokens"] == 0


def test_a_longer_segment_than_training_had_is_served() -> None:
    """A data set that is only evaluated may have longer documents than the plan that was made."""
    collate = PackedCollator(pad_token_id=0, capacity=8, max_segment_length=4, max_docs_per_bin=2, cu_seqlens_bucket=2)
    assert collate([make_row([4, 4])])["max_length_q"] == 4
    assert collate([make_row([6, 2])])["max_length_q"] == 8


def test_a_longer_tail_than_training_had_is_in_pieces() -> None:
    """So that the bound on segments is that of all batches."""
    collate = PackedCollator(
        pad_token_id=0, capacity=12, max_segment_length=4, max_docs_per_bin=4, cu_seqlens_bucket=1
    )
    batch = collate([make_row([3]), make_row([3, 2, 3])])
    assert batch["max_length_q"] == 4
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 7, 11, 12, 15, 17, 20, 24, 24, 24]
    assert batch["position_ids"][0, :12].tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0, 0]
    assert batch["position_ids"][0, 12:].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 0]
    assert batch["seq_idx"][0, :12].tolist() == [0] * 3 + [1] * 4 + [2] * 4 + [3]
    assert batch["labels"][0, 3:12].tolist() == [-100] * 9 and batch["num_real_tokens"] == 11


def test_every_epoch_of_a_packed_data_set_has_one_shape() -> None:
    lengths = np.random.default_rng(0).integers(1, 17, 80)
    source = Dataset.from_dict({"input_ids": [[int(n)] * int(n) for n in lengths]})
    packed, stats = pack_dataset(source, 16, pad_bins_to_multiple_of=4)
    collate = PackedCollator(
        pad_token_id=0,
        capacity=16,
        max_segment_length=stats.max_segment_length,
        max_docs_per_bin=stats.max_docs_per_bin,
        cu_seqlens_bucket=8,
    )
    exact = PackedCollator(pad_token_id=0, capacity=16)
    shapes, tokens = set(), 0
    for start in range(0, len(packed), 4):
        rows = [packed[i] for i in range(start, start + 4)]
        batch = collate(rows)
        shapes.add(tuple((k, v.shape) for k, v in batch.items() if isinstance(v, torch.Tensor)))
        tokens += batch["num_real_tokens"]
        cu_seqlens, expected = batch["cu_seq_lens_q"].tolist(), exact(rows)["cu_seq_lens_q"].tolist()
        assert cu_seqlens == expected + [64] * (len(cu_seqlens) - len(expected))
        assert len(cu_seqlens) % 8 == 0
    assert len(shapes) == 1
    assert tokens == lengths.sum()


def test_cu_seqlens_length() -> None:
    def length(rows: list[dict[str, list[int]]], **settings: Any) -> int:
        return len(PackedCollator(pad_token_id=0, capacity=8, **settings)(rows)["cu_seq_lens_q"])

    rows = [make_row([3, 2]), make_row([8])]  # 4 segments
    assert length(rows) == 5
    assert length(rows, max_docs_per_bin=4) == 5  # without a bucket exact
    assert length(rows, cu_seqlens_bucket=4) == 8
    assert length(rows, cu_seqlens_bucket=5) == 5
    assert length(rows, cu_seqlens_bucket=1, max_docs_per_bin=4) == 2 * 5 + 1
    assert length(rows, cu_seqlens_bucket=8, max_docs_per_bin=4) == 16
    # More documents than promised (an evaluation set): longer, never cut.
    assert length([make_row([1] * 8)], cu_seqlens_bucket=2, max_docs_per_bin=2) == 10


def test_accepts_arrays_and_leaves_the_rows_alone() -> None:
    row = make_row([3, 2])
    expected = PackedCollator(pad_token_id=0, capacity=8)([row])
    for kind in (np.array, torch.tensor):
        rows = [{name: kind(value) for name, value in row.items()}]
        batch = PackedCollator(pad_token_id=0, capacity=8)(rows)
        assert torch.equal(batch["labels"], expected["labels"])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert rows[0]["labels"].tolist() == row["labels"] == [1, 2, 3, -100, 5]


def test_labels_default_to_the_tokens() -> None:
    row = {"input_ids": [5, 6, 7], "seq_lengths": [2, 1]}
    assert PackedCollator(pad_token_id=0, capacity=4)([row])["labels"].tolist() == [[-100, 6, -100, -100]]


def test_rows_that_are_not_packed_go_to_the_fallback() -> None:
    theirs = DataCollatorForLanguageModeling(pad_token_id=0)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = PackedCollator(pad_token_id=0, capacity=8, fallback=theirs)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match=r"columns \['input_ids', 'labels'\] and no 'seq_lengths': pack"):
        PackedCollator(pad_token_id=0, capacity=8)(rows)


def test_pickles() -> None:
    collate = PackedCollator(0, 8, 8, 4, 4, DataCollatorForLanguageModeling(pad_token_id=0), True)
    again = pickle.loads(pickle.dumps(collate))
    assert again == collate
    assert torch.equal(again([make_row([3])])["labels"], collate([make_row([3])])["labels"])


def test_rows_as_arrays_give_the_same_batch() -> None:
    """As a data set formatted as numpy hands them out; a row without tokens has no integer type there."""
    rows = [make_row([3, 2]), make_row([]), make_row([8], 20)]
    source = Dataset.from_list([{k: list(v) for k, v in row.items()} for row in rows])
    collate = PackedCollator(pad_token_id=0, capacity=8, cu_seqlens_bucket=4)
    from_lists = collate(rows)
    arrays = source.with_format("numpy").__getitems__([0, 1, 2])
    assert all(isinstance(row["input_ids"], np.ndarray) for row in arrays)
    from_arrays = collate(arrays)
    assert from_arrays.keys() == from_lists.keys()
    for name, expected in from_lists.items():
        if isinstance(expected, torch.Tensor):
            assert from_arrays[name].dtype == expected.dtype and torch.equal(from_arrays[name], expected), name
        else:
            assert from_arrays[name] == expected and type(from_arrays[name]) is type(expected), name
    empty = collate(source.with_format("numpy").__getitems__([1]))
    assert empty["num_real_tokens"] == 0 and empty["input_ids"].dtype == torch.int64


def test_errors() -> None:
    collate = PackedCollator(pad_token_id=0, capacity=8)
    with pytest.raises(ValueError, match="Row 1 of the batch has 9 tokens and the capacity is 8"):
        collate([make_row([3]), make_row([9])])
    for seq_lengths in ([3, 1], [5, 0], [6, -1]):
        with pytest.raises(ValueError, match=r"Row 0 .*5 input_ids and the seq_lengths"):
            collate([{**make_row([5]), "seq_lengths": seq_lengths}])
    with pytest.raises(ValueError, match="examples is empty"):
        collate([])
    with pytest.raises(ValueError, match="capacity is 1;"):
        PackedCollator(pad_token_id=0, capacity=1)
    with pytest.raises(ValueError, match="cu_seqlens_bucket is 0"):
        PackedCollator(pad_token_id=0, capacity=8, cu_seqlens_bucket=0)
