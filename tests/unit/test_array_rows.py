"""Packed rows as views of Arrow's memory: the same batches as by the formatter of `datasets`, without it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from datasets.formatting import NumpyFormatter

from chronicals_trl.packing import PackedCollator, pack_dataset
from chronicals_trl.packing.arrays import ArrayRows


def packed(rows: int = 60) -> Dataset:
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 99, size).tolist() for size in generator.integers(1, 9, rows)]
    mask = [[i % 2 == 0 for i in row] for row in ids]
    return pack_dataset(
        Dataset.from_dict({"input_ids": ids, "completion_mask": mask}), 16, pad_bins_to_multiple_of=32
    )[0]


SOURCES = {
    "as packed": lambda d: d,
    "shuffled": lambda d: d.shuffle(seed=1),
    "in chunks": lambda d: concatenate_datasets([d.select(range(3)), d, d.select([5])]),
    "some of it": lambda d: d.select(range(4, len(d))),
    "without a column": lambda d: d.remove_columns("completion_mask"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_rows(source: str) -> None:
    data = SOURCES[source](packed())
    rows = ArrayRows.of(data)
    for keys in ([0], [3, 1, 2, 3], list(range(len(data)))):
        for ours, theirs in zip(rows.__getitems__(keys), data.select(keys).to_list(), strict=True):
            assert {name: value.tolist() for name, value in ours.items()} == theirs
    assert all(value.dtype == data.features[name].feature.dtype for name, value in ours.items())
    # Whatever else is asked of it is as ever, in numpy's format.
    assert rows.format["type"] == "numpy" and rows[1]["input_ids"].tolist() == data[1]["input_ids"]
    with pytest.raises(IndexError):
        rows.__getitems__([len(data)])


def test_the_formatter_is_not_asked_and_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(NumpyFormatter, "format_batch", refuse)
    (row,) = ArrayRows.of(packed()).__getitems__([2])
    assert not row["input_ids"].flags.owndata and not row["input_ids"].flags.writeable


def test_the_same_batch() -> None:
    data = packed()
    collate = PackedCollator(pad_token_id=0, capacity=16, cu_seqlens_bucket=4, emit_token_mask=True)
    keys = [len(data) - 1, 0, 1, 2]  # the last one has no tokens
    ours, theirs = collate(ArrayRows.of(data).__getitems__(keys)), collate(data.select(keys).to_list())
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        same = torch.equal if isinstance(expected, torch.Tensor) else lambda a, b: a == b
        assert same(ours[name], expected), name


def test_copies_pickles_and_columns_taken_away_stay_what_they_are() -> None:
    rows = ArrayRows.of(packed())
    for again in (copy.deepcopy(rows), pickle.loads(pickle.dumps(rows)), rows.remove_columns("labels")):
        assert type(again) is ArrayRows
        assert again.__getitems__([1])[0]["input_ids"].tolist() == rows[1]["input_ids"].tolist()
    assert "labels" not in rows.remove_columns("labels").__getitems__([1])[0]


def test_columns_of_other_kinds_are_left_to_the_formatter() -> None:
    data = packed()
    data = data.add_column("name", ["x"] * len(data))
    rows = ArrayRows.of(data)
    assert type(rows) is Dataset and rows.format["type"] == "numpy"
    assert rows.__getitems__([1])[0]["name"] == "x"
