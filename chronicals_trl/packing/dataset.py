"""A tokenised data set in, a packed one out: one row a bin, with the columns that TRL's own packed rows have.

The plan comes from `bfd` and is made over the whole data set, where TRL's `pack_dataset` packs each batch of 1,000
rows by itself (FACTS.md has the difference). Documents are copied as slices of the Arrow buffers; no token ever
becomes a Python object. A streaming data set is packed in windows of documents instead.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, IterableDataset, is_caching_enabled
from datasets.fingerprint import Hasher, get_temporary_cache_files_directory
from numpy.typing import NDArray

from chronicals_trl.packing.bfd import PackPlan, check_capacity, check_strategy, pack_lengths

__all__ = ["PackStats", "pack_dataset"]

logger = logging.getLogger(__name__)

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

_COLUMNS = ("input_ids", "labels")
_STATS_KEY = b"chronicals_trl.pack_stats"
# Part of the fingerprint: raise it when the rows that the same arguments give change.
_FORMAT = 1
# Tokens written at once. Arrow's list offsets are int32, and one such piece of both columns stays at some 64 MiB.
_PIECE_TOKENS = 2**22


@dataclass(frozen=True)
class PackStats:
    """What packing did. For a data set packed in windows only `capacity`, `strategy` and `window` are known.

    Attributes:
        capacity: tokens that a bin can hold.
        strategy: "bfd" or "bfd_split".
        window: documents packed together when the data set is streamed; None when the whole data set was planned.
        documents: documents with at least one token.
        bins: rows that hold documents.
        empty_bins: rows without any, after those, so that the number of rows is the multiple asked for.
        tokens: tokens in the rows, padding not counted.
        fill: tokens / (bins · capacity).
        lower_bound: bins below which no packer can go.
        truncated_documents, truncated_tokens: documents above the capacity, and what was cut off their ends ("bfd").
        split_documents: documents above the capacity that were cut into several ("bfd_split").
        dropped_empty: documents without a token, left out.
        max_doc_length: tokens of the longest document as it came.
        max_segment_length: the longest stretch of one document, or of padding, in any row padded to the capacity.
        max_docs_per_bin: documents, or pieces of them, in the fullest row by count; padding not counted.
    """

    capacity: int
    strategy: str
    window: int | None = None
    documents: int | None = None
    bins: int | None = None
    empty_bins: int | None = None
    tokens: int | None = None
    fill: float | None = None
    lower_bound: int | None = None
    truncated_documents: int | None = None
    truncated_tokens: int | None = None
    split_documents: int | None = None
    dropped_empty: int | None = None
    max_doc_length: int | None = None
    max_segment_length: int | None = None
    max_docs_per_bin: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """One line for the report."""
        if self.documents is None:
            return (
                f"{self.strategy} in windows of {self.window:,} documents, {self.capacity:,} tokens a bin "
                "(streamed: the whole data set is not known in advance)"
            )
        parts = [
            f"{self.documents:,} documents in {self.bins:,} bins of {self.capacity:,} tokens",
            f"fill {self.fill:.5f}",
            f"at least {self.lower_bound:,} bins needed",
        ]
        if self.truncated_documents:
            parts.append(f"{self.truncated_documents:,} truncated ({self.truncated_tokens:,} tokens lost)")
        if self.split_documents:
            parts.append(f"{self.split_documents:,} split")
        if self.dropped_empty:
            parts.append(f"{self.dropped_empty:,} empty dropped")
        if self.empty_bins:
            parts.append(f"{self.empty_bins:,} empty bins appended")
        return ", ".join(parts)


def pack_dataset(
    dataset: AnyDataset,
    capacity: int,
    *,
    strategy: str = "bfd",
    pad_bins_to_multiple_of: int = 1,
    window: int = 10_000,
) -> tuple[AnyDataset, PackStats]:
    """Pack a tokenised data set into bins of `capacity` tokens.

    The rows of the result have `input_ids` and `labels` (lists of the integer types that came in) and `seq_lengths`
    (list of int32, the documents' lengths); they are not padded. The result depends on the arguments alone, so every
    rank gets the same rows. A data set that is backed by files is packed into a cache file beside them, which appears
    under its name only once it is complete and is used again for the same data and arguments.

    Best-Fit Decreasing leaves the long documents in the first bins; the rows come in a fixed shuffled order instead,
    so that a run that reads them in sequence (streaming does) is no curriculum from long to short.

    A streaming data set is packed `window` documents at a time. What `IterableDataset.map` keeps, such as resuming by
    `state_dict`, is kept.

    Args:
        dataset: `input_ids` and, optionally, `labels` of the same lengths (`input_ids` when absent, as in TRL); other
            columns are dropped.
        capacity: tokens a bin can hold, at least 2.
        strategy: "bfd" cuts the end off documents above the capacity, "bfd_split" cuts them into several.
        pad_bins_to_multiple_of: append rows without tokens until the number of rows is a multiple of this (ranks
            times batch size), which Accelerate would otherwise reach by repeating rows. Not for streaming data sets.
        window: documents to a window when the data set is streamed.

    Raises:
        TypeError: not a Dataset or IterableDataset, or the columns are not lists of integers.
        ValueError: a setting out of range, a missing column, labels of another length than their input_ids, a
            missing value, or a data set without a single token.
    """
    capacity = check_capacity(capacity)
    check_strategy(strategy)
    _check_positive("pad_bins_to_multiple_of", pad_bins_to_multiple_of)
    _check_positive("window", window)
    if isinstance(dataset, IterableDataset):
        return _pack_stream(dataset, capacity, strategy, window)
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; it must be a datasets.Dataset or IterableDataset: pass one split."
        )
    if not len(dataset):
        raise ValueError(_nothing_to_pack(0))

    fingerprint = Hasher.hash([dataset._fingerprint, capacity, strategy, pad_bins_to_multiple_of, _FORMAT])
    path = _cache_path(dataset, fingerprint)
    if path is not None:
        cached = _load_cached(path, dataset, fingerprint)
        if cached is not None:
            logger.info("Loading the packed data set from %s", path)
            return cached

    documents = _Documents.of_dataset(dataset)
    plan, kept, stats = _plan(documents.lengths(), capacity, strategy, pad_bins_to_multiple_of)
    schema = Features.from_arrow_schema(documents.schema()).arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), _STATS_KEY: json.dumps(stats.to_dict()).encode()})
    batches = documents.batches(plan, kept, schema, empty_bins=stats.empty_bins or 0)
    if path is not None and _write_cache(path, schema, batches):
        cached = _load_cached(path, dataset, fingerprint)
        if cached is None:
            raise OSError(f"The packed data set was written to {path} but cannot be read back; is the disk full?")
        return cached
    table = pa.Table.from_batches(batches, schema=schema)
    return Dataset(table, info=DatasetInfo(), split=dataset.split, fingerprint=fingerprint), stats


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")


def _nothing_to_pack(documents: int) -> str:
    return (
        f"The data set is empty: it has {documents} documents and not a single token, so there is nothing to pack; "
        "check the file that it was loaded from and the filters before packing."
    )


def _plan(
    lengths: NDArray[np.int64], capacity: int, strategy: str, multiple: int
) -> tuple[PackPlan, NDArray[np.int64], PackStats]:
    """The plan over the documents that have tokens, their rows in the data set, and the figures."""
    kept = np.flatnonzero(lengths)
    if not len(kept):
        raise ValueError(_nothing_to_pack(len(lengths)))
    lengths_kept = lengths[kept]
    above = lengths_kept > capacity
    truncates = strategy == "bfd"
    plan = pack_lengths(np.minimum(lengths_kept, capacity) if truncates else lengths_kept, capacity, strategy=strategy)
    empty_bins = -plan.num_bins % multiple
    longest_tail = capacity if empty_bins else capacity - int(plan.bin_tokens.min())
    stats = PackStats(
        capacity=capacity,
        strategy=strategy,
        documents=len(kept),
        bins=plan.num_bins,
        empty_bins=empty_bins,
        tokens=plan.num_tokens,
        fill=plan.fill,
        lower_bound=plan.lower_bound,
        truncated_documents=int(above.sum()) if truncates else 0,
        truncated_tokens=int((lengths_kept[above] - capacity).sum()) if truncates else 0,
        split_documents=0 if truncates else int(above.sum()),
        dropped_empty=len(lengths) - len(kept),
        max_doc_length=int(lengths_kept.max()),
        max_segment_length=max(int(plan.lengths.max()), longest_tail),
        max_docs_per_bin=int(np.diff(plan.bin_offsets).max()),
    )
    return plan.reorder(np.random.default_rng(0).permutation(plan.num_bins)), kept, stats


class _ListColumn:
    """Random access to the rows of a chunked Arrow column of integer lists, without copying it.

    `rows` maps a row of the data set to a row of the table (a shuffled or filtered Dataset keeps such a list).
    """

    def __init__(self, name: str, column: pa.ChunkedArray, rows: NDArray[np.int64] | None = None) -> None:
        kind = column.type
        if getattr(kind, "value_type", None) == pa.null():
            # Arrow infers no integer type where there is no token; that there is none is another error than the type.
            column = column.cast(pa.list_(pa.int64()))
        elif pa.types.is_fixed_size_list(kind):
            column = column.cast(pa.list_(kind.value_type))
        elif not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise TypeError(f"The column {name!r} has the Arrow type {kind}; packing needs lists of integers.")
        if not pa.types.is_integer(column.type.value_type):
            raise TypeError(f"The column {name!r} has the Arrow type {kind}; packing needs lists of integers.")
        self.value_type: pa.DataType = column.type.value_type
        self._values: list[NDArray[Any]] = []
        begins, ends, chunk_ids = [], [], []
        for chunk in column.chunks:
            if chunk.null_count or chunk.values.null_count:
                raise ValueError(
                    f"The column {name!r} has missing values (null) in {chunk.null_count or 'its'} rows; drop the "
                    "documents or fill the values in before packing."
                )
            offsets = chunk.offsets.to_numpy().astype(np.int64)
            begins.append(offsets[:-1])
            ends.append(offsets[1:])
            chunk_ids.append(np.full(len(chunk), len(self._values), dtype=np.int32))
            self._values.append(chunk.values.to_numpy())
        self._begin = np.concatenate([np.zeros(0, dtype=np.int64), *begins])
        self.lengths = np.concatenate([np.zeros(0, dtype=np.int64), *ends]) - self._begin
        self._chunk = np.concatenate([np.zeros(0, dtype=np.int32), *chunk_ids])
        if rows is not None:
            self._begin, self.lengths, self._chunk = self._begin[rows], self.lengths[rows], self._chunk[rows]

    def gather(
        self, rows: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64], kind: pa.DataType
    ) -> pa.Array:
        """The given stretches of the given rows, one after another, as one flat array."""
        begin = self._begin[rows] + starts
        stretches = zip(self._chunk[rows].tolist(), begin.tolist(), (begin + lengths).tolist(), strict=True)
        values = np.concatenate([self._values[chunk][first:last] for chunk, first, last in stretches])
        return pa.array(values, type=kind)


@dataclass(frozen=True)
class _Documents:
    input_ids: _ListColumn
    labels: _ListColumn

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> _Documents:
        # Formats do not matter to the table, but the index list of a shuffled or filtered data set does.
        rows = None if dataset._indices is None else dataset._indices.column(0).to_numpy().astype(np.int64)
        return cls.of_table(dataset.data, rows)

    @classmethod
    def of_table(cls, table: Any, rows: NDArray[np.int64] | None = None) -> _Documents:
        """From a pyarrow Table or one of the `datasets` package's own."""
        if "input_ids" not in table.column_names:
            raise ValueError(
                f"The data set has the columns {table.column_names} and no 'input_ids'; tokenise it before packing."
            )
        input_ids = _ListColumn("input_ids", table.column("input_ids"), rows)
        if "labels" not in table.column_names:
            return cls(input_ids, input_ids)
        labels = _ListColumn("labels", table.column("labels"), rows)
        differs = input_ids.lengths != labels.lengths
        if differs.any():
            row = int(np.argmax(differs))
            raise ValueError(
                f"Row {row} has {input_ids.lengths[row]} input_ids and {labels.lengths[row]} labels; there must be "
                "one label for each token, -100 where the token is not to be learned."
            )
        return cls(input_ids, labels)

    def lengths(self) -> NDArray[np.int64]:
        return self.input_ids.lengths

    def schema(self) -> pa.Schema:
        return _schema(self.input_ids.value_type, self.labels.value_type)

    def batches(
        self, plan: PackPlan, kept: NDArray[np.int64], schema: pa.Schema, *, empty_bins: int = 0
    ) -> Iterator[pa.RecordBatch]:
        """The rows of the plan, about `_PIECE_TOKENS` tokens at a time, then the empty ones."""
        token_offsets = np.concatenate([[0], np.cumsum(plan.bin_tokens)])
        low = 0
        while low < plan.num_bins:
            reach = int(np.searchsorted(token_offsets, token_offsets[low] + _PIECE_TOKENS, side="right")) - 1
            high = max(low + 1, reach)
            piece = slice(plan.bin_offsets[low], plan.bin_offsets[high])
            rows, starts, lengths = kept[plan.doc_ids[piece]], plan.starts[piece], plan.lengths[piece]
            offsets = token_offsets[low : high + 1] - token_offsets[low]
            docs = plan.bin_offsets[low : high + 1] - plan.bin_offsets[low]
            columns = [
                _lists(offsets, column.gather(rows, starts, lengths, field.type.value_type))
                for column, field in zip((self.input_ids, self.labels), schema, strict=False)
            ]
            columns.append(_lists(docs, pa.array(lengths, type=pa.int32())))
            yield pa.RecordBatch.from_arrays(columns, schema=schema)
            low = high
        if empty_bins:
            columns = [pa.array([[]] * empty_bins, type=field.type) for field in schema]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _schema(input_ids: pa.DataType, labels: pa.DataType) -> pa.Schema:
    return pa.schema(
        {"input_ids": pa.list_(input_ids), "labels": pa.list_(labels), "seq_lengths": pa.list_(pa.int32())}
    )


def _lists(offsets: NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)


def _cache_path(dataset: Dataset, fingerprint: str) -> Path | None:
    """Where the packed rows of a data set that lives in files go; None for one that lives in memory."""
    if not dataset.cache_files:
        return None
    folder = (
        Path(dataset.cache_files[0]["filename"]).parent
        if is_caching_enabled()
        else Path(get_temporary_cache_files_directory())
    )
    # The prefix is the one that Dataset.cleanup_cache_files() looks for.
    return folder / f"cache-packed-{fingerprint}.arrow"


def _write_cache(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> bool:
    """Write under a temporary name, then rename, so that no reader ever sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        sink = open(partial, "wb")
    except OSError as error:
        logger.warning("Cannot write the packed data set beside its source (%s); packing it in memory.", error)
        return False
    try:
        with sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
            writer.close()
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _load_cached(path: Path, source: Dataset, fingerprint: str) -> tuple[Dataset, PackStats] | None:
    """The packed rows in the file, or None where there is no whole one."""
    if not path.exists():
        return None
    try:
        # Read from the file: a Dataset keeps no metadata but its own.
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            stats = PackStats(**json.loads((reader.schema.metadata or {})[_STATS_KEY]))
        dataset = Dataset.from_file(str(path), split=source.split)
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("Packing again: %s cannot be read (%s).", path, error)
        return None
    # A stream cut between two batches reads as a shorter one, so count.
    rows = (stats.bins or 0) + (stats.empty_bins or 0)
    if len(dataset) != rows:
        logger.warning("Packing again: %s has %d rows instead of %d.", path, len(dataset), rows)
        return None
    dataset._fingerprint = fingerprint
    return dataset, stats


@dataclass(frozen=True)
class _WindowPacker:
    """Packs one window of a stream: an Arrow table of documents in, one of bins out. Plain data, so it pickles."""

    capacity: int
    strategy: str
    schema: pa.Schema

    def __call__(self, table: pa.Table) -> pa.Table:
        documents = _Documents.of_table(table)
        lengths = documents.lengths()
        if not lengths.any():
            return self.schema.empty_table()
        plan, kept, _ = _plan(lengths, self.capacity, self.strategy, multiple=1)
        return pa.Table.from_batches(documents.batches(plan, kept, self.schema), schema=self.schema)


def _pack_stream(
    dataset: IterableDataset, capacity: int, strategy: str, window: int
) -> tuple[IterableDataset, PackStats]:
    if next(iter(dataset), None) is None:
        raise ValueError("The data set is empty: check the files that it streams and the filters before packing.")
    schema = _schema(*(_stream_value_type(dataset.features, name) for name in _COLUMNS))
    # A function on Arrow tables replaces all columns, so there are none to remove by name.
    packed = dataset.with_format("arrow").map(
        _WindowPacker(capacity, strategy, schema),
        batched=True,
        batch_size=window,
        features=Features.from_arrow_schema(schema),
    )
    return packed.with_format(None), PackStats(capacity=capacity, strategy=strategy, window=window)


def _stream_value_type(features: Features | None, name: str) -> pa.DataType:
    """The integer type of a list column; int64, which holds them all, where the stream does not declare one."""
    kind = None if features is None or name not in features else features.arrow_schema.field(name).type
    value_type = getattr(kind, "value_type", None)
    return value_type if value_type is not None and pa.types.is_integer(value_type) else pa.int64()
