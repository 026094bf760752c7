"""The token columns of an Arrow table: lists with one value a token, read in place and gathered a piece at a time.

Nothing here holds more than a few bytes a document. Offsets and values are views of the Arrow buffers, which lie in a
memory-mapped file where the data set does, and no token ever becomes a Python object.

Legend: R rows of the table, D documents (rows of the data set: a selection of the table's in some order), T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

__all__ = ["ListColumn", "TokenColumns", "token_blocks"]

IGNORE_INDEX = -100
# Tokens handled at once. A gather needs some 30 bytes a token for a moment; Arrow's list offsets are int32.
PIECE_TOKENS = 2**22
# Documents looked at at once where only their lengths or their last labels count.
_RUN = 2**18

Integers = NDArray[Any]  # of any integer type


def token_blocks(lengths: Integers, most: int) -> Iterator[slice]:
    """Runs of neighbours with at most `most` tokens together, or of a single longer one."""
    for first in range(0, len(lengths), _RUN):
        ends = np.cumsum(lengths[first : first + _RUN], dtype=np.int64)
        low = 0
        while low < len(ends):
            taken = int(ends[low - 1]) if low else 0
            high = max(low + 1, int(np.searchsorted(ends, taken + most, side="right")))
            yield slice(first + low, first + high)
            low = high


class ListColumn:
    """Random access to the rows of a chunked Arrow column of lists of numbers, without copying it.

    Raises:
        TypeError: the column does not hold lists of numbers.
    """

    def __init__(self, name: str, column: pa.ChunkedArray) -> None:
        self.name = name
        kind = column.type
        if getattr(kind, "value_type", None) == pa.null():
            # Arrow infers no number type where there is no token; that there is none is another error than the type.
            column = column.cast(pa.list_(pa.int64()))
        elif pa.types.is_fixed_size_list(kind):
            column = column.cast(pa.list_(kind.value_type))
        if not is_number_list(column.type):
            raise TypeError(f"The column {name!r} has the Arrow type {kind}; packing needs lists of integers.")
        self.value_type: pa.DataType = column.type.value_type
        self._is_large = pa.types.is_large_list(column.type)
        chunks = column.chunks
        self.first_rows: NDArray[np.int64] = np.cumsum([0, *map(len, chunks)], dtype=np.int64)
        self.offsets: list[Integers] = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values: list[Any] = []
        null_rows = [np.zeros(0, dtype=np.int64)]
        for number, chunk in enumerate(chunks):
            null_rows += self._null_rows(number, chunk)
            values = chunk.values
            if values.null_count:
                values = values.fill_null(False if pa.types.is_boolean(self.value_type) else 0)
            # Arrow keeps booleans as bits, which numpy has no view of.
            self._values.append(values if pa.types.is_boolean(self.value_type) else values.to_numpy())
        self.null_rows = np.concatenate(null_rows)

    def _null_rows(self, number: int, chunk: Any) -> list[Integers]:
        """Rows of the table that are missing, or that miss a token."""
        found = []
        if chunk.null_count:
            found.append(np.flatnonzero(chunk.is_null().to_numpy(zero_copy_only=False)))
        if chunk.values.null_count:
            places = np.flatnonzero(chunk.values.is_null().to_numpy(zero_copy_only=False))
            offsets = self.offsets[number]
            places = places[(places >= offsets[0]) & (places < offsets[-1])]
            found.append(np.searchsorted(offsets, places, side="right") - 1)
        return [rows + self.first_rows[number] for rows in found]

    def lengths(self) -> Integers:
        """(R,) int32, or int64 for large lists: tokens of each row of the table."""
        lengths = np.empty(int(self.first_rows[-1]), dtype=np.int64 if self._is_large else np.int32)
        for first, offsets in zip(self.first_rows.tolist(), self.offsets, strict=False):
            np.subtract(offsets[1:], offsets[:-1], out=lengths[first : first + len(offsets) - 1])
        return lengths

    def lies_like(self, other: ListColumn) -> bool:
        """Whether each row is at the same place in its buffers as in the other column's."""
        return np.array_equal(self.first_rows, other.first_rows) and all(
            map(np.array_equal, self.offsets, other.offsets)
        )

    def take(self, chunk: int, places: NDArray[np.int64]) -> NDArray[Any]:
        values = self._values[chunk]
        if isinstance(values, pa.Array):
            return np.asarray(values.take(pa.array(places)).to_numpy(zero_copy_only=False))
        return np.asarray(values[places])


def is_number_list(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    value = kind.value_type
    return bool(pa.types.is_integer(value) or pa.types.is_floating(value) or pa.types.is_boolean(value))


@dataclass(frozen=True)
class TokenColumns:
    """The columns of a data set that have one value a token, `input_ids` and `labels` the first two.

    Attributes:
        columns: by name.
        rows: (D,) the table's row of each document; None where they are the same.
        dropped: the other columns, which have no value a token and so no meaning in a row of several documents.
    """

    columns: dict[str, ListColumn]
    rows: Integers | None
    dropped: tuple[str, ...] = ()

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> TokenColumns:
        # Formats do not matter to the table, but the index list of a shuffled or filtered data set does.
        rows = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
        return cls.of_table(dataset.data, rows)

    @classmethod
    def of_table(cls, table: Any, rows: Integers | None = None, *, only: Sequence[str] | None = None) -> TokenColumns:
        """From a pyarrow Table or one of the `datasets` package's own; `only`: the columns that have to be there.

        Raises:
            TypeError: `input_ids` or `labels` are not lists of integers.
            ValueError: no `input_ids`; a missing value in a required column, or another length than the `input_ids`;
                rows that are packed already.
        """
        names = list(table.column_names)
        if "input_ids" not in names:
            raise ValueError(f"The data set has the columns {names} and no 'input_ids'; tokenise it before packing.")
        if "seq_lengths" in names and is_number_list(table.schema.field("seq_lengths").type):
            raise ValueError(
                "The data set has a column 'seq_lengths', as packed rows have: packed again, each row would count as "
                "one document. Pass the documents, or dataset.remove_columns('seq_lengths') if that is what they are."
            )
        required = [name for name in ("input_ids", "labels") if name in names] if only is None else list(only)
        input_ids = cls._integers("input_ids", table)
        self = cls({"input_ids": input_ids, "labels": input_ids}, rows)
        self._require_values(input_ids)
        dropped = []
        for name in names:
            if name == "input_ids":
                column = input_ids
            elif name in required:
                column = cls._integers(name, table) if name == "labels" else ListColumn(name, table.column(name))
                self._require_values(column)
                self._require_lengths(column)
            elif only is None and (extra := self._token_column(name, table)) is not None:
                column = extra
            else:
                dropped.append(name)
                continue
            self.columns[name] = column
        return cls(self.columns, rows, tuple(dropped))

    @staticmethod
    def _integers(name: str, table: Any) -> ListColumn:
        column = ListColumn(name, table.column(name))
        if not pa.types.is_integer(column.value_type):
            kind = table.schema.field(name).type
            raise TypeError(f"The column {name!r} has the Arrow type {kind}; packing needs lists of integers.")
        return column

    def _token_column(self, name: str, table: Any) -> ListColumn | None:
        """The column if it has a number for each token, else None."""
        try:
            column = ListColumn(name, table.column(name))
        except TypeError:
            return None
        return None if len(self._missing(column)) or len(self._other_lengths(column)) else column

    def _missing(self, column: ListColumn) -> Integers:
        """The documents without a value, or with a token without one."""
        if not len(column.null_rows) or self.rows is None:
            return column.null_rows
        return np.flatnonzero(np.isin(self.rows, column.null_rows))

    def _require_values(self, column: ListColumn) -> None:
        missing = self._missing(column)
        if len(missing):
            raise ValueError(
                f"The column {column.name!r} has missing values (null) in {len(missing):,} rows, first in row "
                f"{missing.min()}; drop the documents or fill the values in before packing."
            )

    def _other_lengths(self, column: ListColumn) -> Integers:
        """The documents of which the column has another length than their input_ids."""
        if column.lies_like(self.columns["input_ids"]):
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(self._chosen(column.lengths() != self.columns["input_ids"].lengths()))

    def _require_lengths(self, column: ListColumn) -> None:
        differs = self._other_lengths(column)
        if len(differs):
            row = int(differs[0])
            ids, others = (int(self._chosen(each.lengths())[row]) for each in (self.columns["input_ids"], column))
            remedy = (
                "there must be one label for each token, -100 where the token is not to be learned."
                if column.name == "labels"
                else f"a column that is packed needs one value a token: drop it with remove_columns({column.name!r})."
            )
            raise ValueError(f"Row {row} has {ids} input_ids and {others} {column.name}; {remedy}")

    def _chosen(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self.rows is None else values[self.rows]

    def lengths(self) -> Integers:
        """(D,) int32, or int64 for large lists: tokens of each document; the caller's own array."""
        return self._chosen(self.columns["input_ids"].lengths())

    @cached_property
    def _groups(self) -> list[list[str]]:
        """The names of the columns, those that lie alike together: they share one computation of places."""
        groups: list[list[str]] = []
        for name, column in self.columns.items():
            group = next((group for group in groups if column.lies_like(self.columns[group[0]])), None)
            if group is None:
                groups.append([name])
            else:
                group.append(name)
        return groups

    def gather(
        self, documents: Integers, starts: Integers, lengths: Integers, names: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The given stretches of the given documents, one after another, as one flat array (T,) a column.

        The table is read from front to back, chunk by chunk, whatever order the documents are in: neighbours share
        pages, and a file that is not in memory yet is read in ascending order. A second pass, in memory, puts the
        documents in the order asked for. Both take by one index a token, so that the time goes with tokens and hardly
        with documents.
        """
        rows = documents if self.rows is None else self.rows[documents]
        order = np.argsort(rows, kind="stable")
        rows, starts, spans = rows[order].astype(np.int64), starts[order], lengths[order]
        ends = np.cumsum(spans, dtype=np.int64)
        begins = np.empty_like(ends)
        begins[order] = ends - spans
        in_order = _token_places(begins, lengths)
        flat: dict[str, NDArray[Any]] = {}
        wanted = self.columns if names is None else names
        for group in self._groups:
            found = {
                name: np.empty(len(in_order), dtype=self.columns[name].value_type.to_pandas_dtype())
                for name in group
                if name in wanted
            }
            layout = self.columns[group[0]]
            chunks = np.searchsorted(layout.first_rows, rows, side="right") - 1
            borders = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(rows)]
            for low, high in pairwise(borders if found and len(rows) else []):
                part, chunk = slice(low, high), int(chunks[low])
                begins = layout.offsets[chunk][rows[part] - layout.first_rows[chunk]] + starts[part]
                places = _token_places(begins, spans[part])
                for name, values in found.items():
                    values[ends[low] - spans[low] : ends[high - 1]] = self.columns[name].take(chunk, places)
            flat |= {name: values[in_order] for name, values in found.items()}
        return flat

    def have_labels(self, lengths: Integers) -> NDArray[np.bool_]:
        """(D,) whether any of the first `lengths` labels of each document is to be learned; False where that is 0."""
        found: NDArray[np.bool_] = lengths > 0
        if self.columns["labels"] is self.columns["input_ids"]:
            return found
        for low in range(0, len(lengths), _RUN):
            documents = low + np.flatnonzero(found[low : low + _RUN])
            # Most documents end with a label, so only the others have to be read whole.
            last = self._labels(documents, lengths[documents] - 1, np.ones_like(documents))
            found[documents] = last != IGNORE_INDEX
            documents = documents[last == IGNORE_INDEX]
            spans = lengths[documents]
            found[documents] = self.have_labels_in(documents, np.zeros_like(spans), spans)
        return found

    def have_labels_in(self, documents: Integers, starts: Integers, lengths: Integers) -> NDArray[np.bool_]:
        """(F,) whether any label of each stretch of a document, of at least one token, is to be learned."""
        found = np.ones(len(documents), dtype=bool)
        if self.columns["labels"] is self.columns["input_ids"]:
            return found
        for block in token_blocks(lengths, PIECE_TOKENS):
            spans = lengths[block]
            labels = self._labels(documents[block], starts[block], spans)
            firsts = np.cumsum(spans, dtype=np.int64) - spans
            found[block] = np.logical_or.reduceat(labels != IGNORE_INDEX, firsts)
        return found

    def _labels(self, documents: Integers, starts: Integers, lengths: Integers) -> NDArray[Any]:
        return self.gather(documents, starts, lengths, ["labels"])["labels"]


def _token_places(begins: Integers, lengths: Integers) -> NDArray[np.int64]:
    """(T,) the places of the tokens of stretches that begin at the given places, one stretch after another."""
    ends = np.cumsum(lengths, dtype=np.int64)
    places = np.arange(ends[-1] if len(ends) else 0)
    places += np.repeat(begins - (ends - lengths), lengths)
    return places
