"""Packing a data set that is streamed: a window of documents at a time, resumed at any row.

`IterableDataset.map` keeps its place to the row: its state says where the window began and how many of the window's
rows are gone. One thing in `datasets` does not keep its place: a shuffle buffer, whose content no state holds. A
stream that has one is run again from the start of the epoch instead, up to the document where it was (`_Replayed`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, IterableDataset
from datasets.iterable_dataset import BufferShuffledExamplesIterable, _BaseExamplesIterable

from chronicals_trl.packing.columns import TokenColumns, is_number_list
from chronicals_trl.packing.planning import NothingToPack, PackStats, plan_documents
from chronicals_trl.packing.rows import packed_batches, packed_schema

__all__ = ["pack_stream"]

logger = logging.getLogger(__name__)

# Rows that are looked at to see which columns have one value a token.
_PROBED = 16


@dataclass(frozen=True)
class _WindowPacker:
    """Packs one window of a stream: a batch of documents in, one of bins out. Plain data, so it pickles.

    Plain lists on both sides, not Arrow tables: `datasets` would make a table of each example, whose type is another
    one where a document is empty.
    """

    capacity: int
    strategy: str
    schema: pa.Schema

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        names = [name for name in self.schema.names if name in batch and name != "seq_lengths"]
        table = pa.table({name: _arrow(name, batch[name], self.schema.field(name).type) for name in names})
        columns = TokenColumns.of_table(table, only=names)
        try:
            plan, kept, _ = plan_documents(columns, self.capacity, self.strategy, multiple=1)
        except NothingToPack:
            # No error: the next window may have some. A stream of such windows gives no batch and says no more.
            logger.warning(
                "None of the %d documents in this window of the stream has a label to learn: it is passed over. Look "
                "at the masks and templates that made the labels, or raise max_length.",
                len(columns.lengths()),
            )
            return {name: [] for name in self.schema.names}
        batches = packed_batches(columns, plan, kept, self.schema, one_segment=self.strategy == "wrapped")
        return pa.Table.from_batches(batches, schema=self.schema).to_pydict()


def pack_stream(
    dataset: IterableDataset, capacity: int, strategy: str, window: int
) -> tuple[IterableDataset, PackStats]:
    """`pack_dataset` for a stream, whose arguments and errors these are."""
    dataset = dataset.with_format(None)
    rows = list(islice(dataset, _PROBED))
    if not rows:
        raise ValueError("The data set is empty: check the files that it streams and the filters before packing.")
    names = list(dict.fromkeys([*(dataset.features or ()), *rows[0]]))
    if "input_ids" not in names:
        raise ValueError(f"The data set has the columns {names} and no 'input_ids'; tokenise it before packing.")
    types = _token_types(dataset.features, rows, names)
    schema = packed_schema(types)
    kept = [name for name in types if name in names]
    packed = _resumable(dataset.select_columns(kept)).map(
        _WindowPacker(capacity, strategy, schema),
        batched=True,
        batch_size=window,
        remove_columns=kept,
        features=Features.from_arrow_schema(schema),
    )
    dropped = tuple(name for name in names if name not in types)
    return packed, PackStats(capacity, strategy, window=window, dropped_columns=dropped)


def _token_types(
    features: Features | None, rows: list[dict[str, Any]], names: Sequence[str]
) -> dict[str, pa.DataType]:
    """The number types of the columns with one value a token, as the first rows have them."""
    types: dict[str, pa.DataType] = {}
    for name in dict.fromkeys(["input_ids", "labels", *names]):
        declared = None if features is None or name not in features else features.arrow_schema.field(name).type
        found = [row.get(name) for row in rows]
        kind = declared.value_type if declared is not None and is_number_list(declared) else _number_type(found)
        if name == "labels" and name not in names:
            types[name] = types["input_ids"]
        elif name in ("input_ids", "labels"):
            if kind is None or not pa.types.is_integer(kind):
                raise TypeError(
                    f"The column {name!r} of the stream holds {found[0]!r}; packing needs lists of integers."
                )
            types[name] = kind
        elif kind is not None and all(
            one is not None and len(one) == len(row["input_ids"]) for one, row in zip(found, rows, strict=True)
        ):
            types[name] = kind
    return types


def _number_type(values: Sequence[Any]) -> pa.DataType | None:
    """The type that Arrow gives to the numbers in lists; None where a value is no list of numbers."""
    try:
        kind = pa.array([_plain(value) for value in values]).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    if kind == pa.list_(pa.null()):  # every list is empty
        return pa.int64()
    return kind.value_type if is_number_list(kind) else None


def _plain(value: Any) -> Any:
    """A list (or None) as it is; numpy's arrays and torch's tensors as arrays that Arrow reads."""
    return np.asarray(value) if hasattr(value, "__array__") else value


def _arrow(name: str, values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array([_plain(value) for value in values], type=pa.large_list(kind.value_type))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise TypeError(
            f"The column {name!r} of the stream holds something else than lists of {kind.value_type} ({error})."
        ) from error


def _resumable(dataset: IterableDataset) -> IterableDataset:
    if not _has_shuffle_buffer(dataset._ex_iterable):
        return dataset
    dataset = copy.copy(dataset)
    dataset._ex_iterable = _Replayed(dataset._ex_iterable)
    return dataset


def _has_shuffle_buffer(examples: Any) -> bool:
    children = [examples.ex_iterable] if hasattr(examples, "ex_iterable") else getattr(examples, "ex_iterables", [])
    return isinstance(examples, BufferShuffledExamplesIterable) or any(map(_has_shuffle_buffer, children))


class _Replayed(_BaseExamplesIterable):
    """The same examples; its state is the number of them, and a resumed one passes over that many.

    `ex_iterable` is the name by which `datasets` finds what it has to give a new seed for each epoch.
    """

    def __init__(self, ex_iterable: Any) -> None:
        super().__init__()
        self.ex_iterable = ex_iterable

    @property
    def iter_arrow(self) -> Callable[[], Iterator[tuple[Any, pa.Table]]] | None:
        return self._iter_arrow if self.ex_iterable.iter_arrow else None

    @property
    def is_typed(self) -> bool:
        return bool(self.ex_iterable.is_typed)

    @property
    def features(self) -> Features | None:
        return self.ex_iterable.features

    @property
    def num_shards(self) -> int:
        return int(self.ex_iterable.num_shards)

    def _init_state_dict(self) -> dict[str, Any]:
        self.ex_iterable._init_state_dict()  # back to the start, wherever an earlier iteration left it
        state: dict[str, Any] = {"rows": 0, "type": type(self).__name__}
        self._state_dict = state
        return state

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        for example in islice(self.ex_iterable, self._rows(), None):
            self._count(1)
            yield example

    def _iter_arrow(self) -> Iterator[tuple[Any, pa.Table]]:
        passed_over = self._rows()
        for key, table in self.ex_iterable.iter_arrow():
            left = table.slice(min(passed_over, len(table)))
            passed_over -= len(table) - len(left)
            if len(left):
                self._count(len(left))
                yield key, left

    def _rows(self) -> int:
        return int(self._state_dict["rows"]) if self._state_dict else 0

    def _count(self, rows: int) -> None:
        if self._state_dict:
            self._state_dict["rows"] = self._rows() + rows

    def shuffle_data_sources(self, generator: np.random.Generator) -> _Replayed:
        return _Replayed(self.ex_iterable.shuffle_data_sources(generator))

    def shard_data_sources(self, *args: Any, **kwargs: Any) -> _Replayed:
        return _Replayed(self.ex_iterable.shard_data_sources(*args, **kwargs))

    def reshard_data_sources(self) -> _Replayed:
        return _Replayed(self.ex_iterable.reshard_data_sources())
