"""Packed rows as numpy arrays on Arrow's own memory.

A data set in numpy's format makes a batch by looking at the type of each cell, and copies: of a row of 512 tokens it
takes twice the time that finding the row takes. All columns of packed rows are lists of numbers, which lie in Arrow's
buffers as numpy wants them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from datasets import Dataset
from datasets.formatting import query_table

from chronicals_trl.packing.columns import Integers, is_number_list

__all__ = ["ArrayRows"]


class ArrayRows(Dataset):
    """A data set in numpy's format, of which a `DataLoader` gets batches of rows as read-only views; else the same.

    The arrays have the columns' own integer types, where numpy's format has int64 for all.
    """

    @classmethod
    def of(cls, dataset: Dataset) -> Dataset:
        """`dataset` so, or in plain numpy's format where a column does not hold lists of numbers."""
        if not all(is_number_list(field.type) for field in dataset.data.schema):
            return dataset.with_format("numpy")
        same = {"info": dataset.info, "split": dataset.split, "fingerprint": dataset._fingerprint}
        rows: Dataset = cls(dataset.data, indices_table=dataset._indices, **same).with_format("numpy")
        return rows

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        table = query_table(self.data, keys, indices=self._indices)
        columns = {name: _views(table.column(name)) for name in table.column_names}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _views(column: Any) -> list[Integers]:
    rows: list[Integers] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False)  # booleans are bits there
        rows += [values[begin:end] for begin, end in pairwise(chunk.offsets.to_numpy())]
    return rows
