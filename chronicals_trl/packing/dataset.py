"""A tokenised data set in, a packed one out: one row a bin, with the columns that TRL's own packed rows have.

The plan comes from `bfd` and is made over the whole data set, where TRL's `pack_dataset` packs each batch of 1,000
rows by itself (FACTS.md has the difference). Tokens go from Arrow buffers to Arrow buffers, a bounded piece at a time
(`columns`), into a file (`cache`). A streaming data set is packed in windows of documents instead (`stream`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import pyarrow as pa
from datasets import Dataset, DatasetInfo, IterableDataset
from datasets.fingerprint import Hasher
from datasets.utils import tqdm

from chronicals_trl.packing.bfd import check_capacity
from chronicals_trl.packing.cache import cache_path, load_cached, write_cache
from chronicals_trl.packing.columns import TokenColumns
from chronicals_trl.packing.planning import PackStats, check_strategy, nothing_to_pack, plan_documents
from chronicals_trl.packing.rows import packed_batches, packed_schema
from chronicals_trl.packing.stream import pack_stream

__all__ = ["PackStats", "pack_dataset"]

logger = logging.getLogger(__name__)

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

# Part of the fingerprint: raise it when the rows that the same arguments give change.
_FORMAT = 3


def pack_dataset(
    dataset: AnyDataset,
    capacity: int,
    *,
    strategy: str = "bfd",
    pad_bins_to_multiple_of: int = 1,
    window: int = 10_000,
) -> tuple[AnyDataset, PackStats]:
    """Pack a tokenised data set into bins of `capacity` tokens.

    The rows of the result have `input_ids` and `labels` (lists of the integer types that came in), the other columns
    with one number a token, and `seq_lengths` (list of int32, the documents' lengths); they are not padded. The result
    depends on the arguments alone, so every rank gets the same rows. A data set that is backed by files is packed into
    a cache file beside them, which appears under its name only once it is complete and is used again for the same data
    and arguments. Memory does not grow with the tokens: beside the plan (some 30 bytes a document at the peak) there
    is one piece of them at a time.

    Documents of which every label is -100 have nothing to learn and are left out, as TRL leaves them out when it does
    not pack: what counts is what "bfd" keeps of them.

    Best-Fit Decreasing leaves the long documents in the first bins; the rows come in a fixed shuffled order instead,
    so that a run that reads them in sequence (streaming does) is no curriculum from long to short.

    A streaming data set is packed `window` documents at a time, and resumes by `state_dict` at any row.

    Args:
        dataset: `input_ids` and, optionally, `labels` of the same lengths (`input_ids` when absent, as in TRL). Other
            columns that are lists of numbers, one a token in every row, are packed along; the rest is dropped and
            named in the figures.
        capacity: tokens a bin can hold, at least 2.
        strategy: "bfd" cuts the end off documents above the capacity, "bfd_split" cuts them into several. "wrapped"
            fills rows in the order given and cuts where a row ends; a row of it is one segment (`seq_lengths` has one
            entry), in which documents attend to each other: what TRL means by the name.
        pad_bins_to_multiple_of: append rows without tokens until the number of rows is a multiple of this (ranks
            times batch size), which Accelerate would otherwise reach by repeating rows. Not for streaming data sets.
        window: documents to a window when the data set is streamed.

    Raises:
        TypeError: not a Dataset or IterableDataset, or the columns are not lists of integers.
        ValueError: a setting out of range, a missing column, labels of another length than their input_ids, a
            missing value, rows that are packed already, or a data set without a token or a label to learn.
        OSError: the cache file cannot be written; the message says what to do.
    """
    capacity = check_capacity(capacity)
    check_strategy(strategy)
    _check_positive("pad_bins_to_multiple_of", pad_bins_to_multiple_of)
    _check_positive("window", window)
    if isinstance(dataset, IterableDataset):
        return pack_stream(dataset, capacity, strategy, window)
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; it must be a datasets.Dataset or IterableDataset: pass one split."
        )
    if not len(dataset):
        raise nothing_to_pack(0)

    fingerprint = Hasher.hash([dataset._fingerprint, capacity, strategy, pad_bins_to_multiple_of, _FORMAT])
    path = cache_path(dataset, fingerprint)
    if path is not None and (cached := load_cached(path, dataset, fingerprint)) is not None:
        logger.info("Loading the packed data set from %s", path)
        return cached[0], PackStats.from_dict(cached[1]["stats"])

    columns = TokenColumns.of_dataset(dataset)
    if columns.dropped:
        logger.info("Packing leaves out the columns %s: not one number a token.", ", ".join(columns.dropped))
    plan, kept, stats = plan_documents(columns, capacity, strategy, pad_bins_to_multiple_of)
    schema = packed_schema({name: column.value_type for name, column in columns.columns.items()})
    empty_bins = stats.empty_bins or 0
    rows = plan.num_bins + empty_bins
    batches = _with_progress(
        packed_batches(columns, plan, kept, schema, empty_bins=empty_bins, one_segment=strategy == "wrapped"), rows
    )
    if path is None:
        table = pa.Table.from_batches(batches, schema=schema)
        return Dataset(table, info=DatasetInfo(), split=dataset.split, fingerprint=fingerprint), stats
    write_cache(path, schema, batches, {"rows": rows, "stats": stats.to_dict()})
    written = load_cached(path, dataset, fingerprint)
    if written is None:
        raise OSError(f"The packed data set was written to {path} but cannot be read back; is the disk sound?")
    return written[0], stats


def _with_progress(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same batches under a progress bar of `datasets`, which `datasets.disable_progress_bars()` turns off."""
    with tqdm(total=rows, desc="Packing dataset", unit=" rows") as bar:
        for batch in batches:
            yield batch
            bar.update(batch.num_rows)


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
