"""A stream packed in windows: every document once, and resumed at any row exactly, shuffled and sharded ones too."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from packing_data import LENGTHS, documents_of, expected_documents, make_rows
from torch.utils.data import DataLoader

from chronicals_trl.packing import PackStats, pack_dataset, pack_lengths


def generate() -> Iterator[dict[str, list[int]]]:
    yield from make_rows(LENGTHS)


def generate_nothing() -> Iterator[dict[str, list[int]]]:
    yield from ()


def generate_shards(shards: list[int]) -> Iterator[dict[str, list[int]]]:
    for shard in shards:
        yield from make_rows(LENGTHS)[50 * shard : 50 * shard + 50]


def stream(kind: str) -> IterableDataset:
    if kind == "generator":  # columns and types unknown
        return IterableDataset.from_generator(generate)
    return Dataset.from_list(make_rows(LENGTHS)).to_iterable_dataset(num_shards=2)


def test_windows_without_a_label_to_learn_are_named(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3 if i < 4 else [1, 2, 3]} for i in range(6)]
    packed, _ = pack_dataset(Dataset.from_list(rows).to_iterable_dataset(), 8, window=4)
    with caplog.at_level(logging.WARNING):
        assert [row["seq_lengths"] for row in packed] == [[3, 3]]
    (record,) = caplog.records
    assert "None of the 4 documents in this window of the stream has a label to learn" in record.getMessage()


@pytest.mark.parametrize("kind", ["generator", "arrow"])
def test_packed_in_windows(kind: str) -> None:
    packed, stats = pack_dataset(stream(kind), 32, window=50)
    assert stats == PackStats(capacity=32, strategy="bfd", window=50)
    assert "windows of 50 documents" in stats.describe()
    names = ("input_ids", "labels", "completion_mask")
    assert packed.column_names == [*names, "seq_lengths"]
    rows = list(packed)
    assert documents_of(rows, *names) == expected_documents(make_rows(LENGTHS), 32, *names)
    assert isinstance(rows[0]["input_ids"], list)
    learning = [length if number % 7 != 6 else 0 for number, length in enumerate(LENGTHS)]
    for number, row in enumerate(make_rows(LENGTHS)):
        learning[number] *= any(label != -100 for label in row["labels"])
    windows = [[length for length in learning[i : i + 50] if length] for i in range(0, 200, 50)]
    assert len(rows) == sum(pack_lengths(window, 32).num_bins for window in windows)
    # Each window by itself gives the same rows as a data set of its documents.
    alone, _ = pack_dataset(Dataset.from_list(make_rows(LENGTHS)[:50]), 32)
    assert rows[: len(alone)] == alone.to_list()


def test_wrapped_in_windows() -> None:
    packed, stats = pack_dataset(stream("generator"), 32, strategy="wrapped", window=50)
    rows = list(packed)
    assert [i for row in rows for i in row["input_ids"]] == list(range(1, sum(LENGTHS) + 1))
    assert all(row["seq_lengths"] == [len(row["input_ids"])] for row in rows)
    assert len(rows) == sum(-(-sum(LENGTHS[i : i + 50]) // 32) for i in range(0, 200, 50))
    assert "attend to each other" in stats.describe()


def test_pickles_and_splits_long_documents() -> None:
    source = Dataset.from_list(make_rows([30, 0, 5, 0, 0, 0])).to_iterable_dataset()
    packed, _ = pack_dataset(source, 8, strategy="bfd_split", window=3)
    packed = pickle.loads(pickle.dumps(packed))
    # The second window has no token at all and gives no row.
    assert sorted(i for row in packed for i in row["input_ids"]) == list(range(1, 36))


def test_empty_documents_and_arrays_of_a_generator() -> None:
    """An empty list has no type of its own; numpy's and torch's rows are taken as lists are."""

    def rows() -> Iterator[dict[str, Any]]:
        for length in (3, 0, 2, 0, 0, 4):
            ids = np.arange(length)
            yield {"input_ids": ids, "labels": torch.from_numpy(ids) + 1, "text": "a"}

    packed, stats = pack_dataset(IterableDataset.from_generator(rows), 4, window=2)
    assert sorted(map(tuple, (row["input_ids"] for row in packed))) == [(0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert stats.dropped_columns == ("text",)


def test_columns_that_come_later_are_left_out() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for number in range(40):
            yield {"input_ids": [number], **({"late": "a"} if number > 20 else {})}

    packed, _ = pack_dataset(IterableDataset.from_generator(rows), 4, window=8)
    assert sorted(i for row in packed for i in row["labels"]) == list(range(40))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "data set is empty"),
        ([{"text": "a"}], ValueError, r"columns \['text'\] and no 'input_ids'"),
        ([{"input_ids": "a b"}], TypeError, "'input_ids' of the stream holds 'a b'"),
        ([{"input_ids": [1.5]}], TypeError, r"'input_ids' of the stream holds \[1\.5\]"),
        ([{"input_ids": [1], "labels": "a"}], TypeError, "'labels' of the stream holds 'a'"),
    ],
)
def test_bad_streams_are_refused_at_once(rows: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_dataset(IterableDataset.from_generator(lambda: iter(rows)), 8)


def test_bad_rows_further_on() -> None:
    good = [{"input_ids": [1, 2], "labels": [1, 2], "mask": [0, 1]}] * 20
    for bad, error, message in (
        ({"mask": [0]}, ValueError, r"2 input_ids and 1 mask; .*remove_columns\('mask'\)"),
        ({"labels": [1]}, ValueError, "2 input_ids and 1 labels"),
        ({"labels": None}, ValueError, "'labels' has missing values"),
        ({"labels": "a"}, TypeError, "'labels' of the stream holds something else than lists of int64"),
    ):
        rows = [*good, {**good[0], **bad}]
        packed, _ = pack_dataset(IterableDataset.from_generator(lambda rows=rows: iter(rows)), 8, window=8)
        with pytest.raises(error, match=message):
            list(packed)


# -- resuming --------------------------------------------------------------------------------------------------------

CHAINS: dict[str, Callable[[], IterableDataset]] = {
    "generator": lambda: stream("generator"),
    "arrow": lambda: stream("arrow"),
    "shards": lambda: IterableDataset.from_generator(generate_shards, gen_kwargs={"shards": [0, 1, 2, 3]}),
    "mapped and filtered": lambda: stream("arrow").map(dict).filter(lambda row: len(row["input_ids"]) % 5 > 0),
    "shuffled": lambda: stream("generator").shuffle(seed=3, buffer_size=30),
    "shuffled shards": lambda: IterableDataset.from_generator(
        generate_shards, gen_kwargs={"shards": [0, 1, 2, 3]}
    ).shuffle(seed=3, buffer_size=30),
    "shuffled arrow": lambda: stream("arrow").shuffle(seed=3, buffer_size=30),
    "shuffled arrow, then mapped": lambda: stream("arrow").shuffle(seed=3, buffer_size=30).map(dict),
    "shuffled, two joined": lambda: datasets.concatenate_datasets(
        [stream("generator").shuffle(seed=3, buffer_size=30), stream("generator")]
    ),
}


def packed_chain(chain: str, epoch: int, rank: int | None) -> IterableDataset:
    packed, _ = pack_dataset(CHAINS[chain](), 64, window=30)
    if rank is not None:
        packed = split_dataset_by_node(packed, rank, 2)
    packed.set_epoch(epoch)
    return packed


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("chain", CHAINS)
def test_resumes_at_every_row(chain: str, epoch: int, rank: int | None) -> None:
    """In the middle of a window, at its end, before the first row and after the last; and a second time."""
    source = packed_chain(chain, epoch, rank)
    rows, states = [], [source.state_dict()]
    for row in source:
        rows.append(row)
        states.append(pickle.loads(pickle.dumps(source.state_dict())))
    assert len(rows) > 20
    for taken, state in enumerate(states):
        resumed = packed_chain(chain, epoch, rank)
        resumed.load_state_dict(state)
        further = list(islice(resumed, 2))
        again = packed_chain(chain, epoch, rank)
        again.load_state_dict(resumed.state_dict())
        assert rows[:taken] + further + list(again) == rows, taken


@pytest.mark.parametrize("chain", ["shuffled shards", "shuffled arrow, then mapped"])
def test_an_epoch_has_an_order_of_its_own(chain: str) -> None:
    """And the same documents; a data set that was looked at before starts from the beginning."""
    source = CHAINS[chain]()
    for row in islice(source, 3):
        assert row
    packed, _ = pack_dataset(source, 64, window=30)
    orders = []
    for epoch in (0, 1, 0):
        packed.set_epoch(epoch)
        orders.append(list(packed))
        assert documents_of(orders[-1]) == expected_documents(make_rows(LENGTHS), 64)
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("chain", CHAINS)
def test_ranks_share_the_documents(chain: str) -> None:
    ranks = [split_dataset_by_node(pack_dataset(CHAINS[chain](), 64, window=30)[0], rank, 3) for rank in range(3)]
    found = sum((documents_of(rank) for rank in ranks), start=documents_of([]))
    whole = documents_of(pack_dataset(CHAINS[chain](), 64, window=30)[0])
    assert found == whole


def test_workers_share_the_documents() -> None:
    packed, _ = pack_dataset(CHAINS["shuffled shards"](), 64, window=30)
    rows = list(DataLoader(packed, batch_size=None, num_workers=2))
    assert documents_of(rows) == expected_documents(make_rows(LENGTHS), 64)
