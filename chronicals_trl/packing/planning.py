"""From a data set's lengths to the plan of its bins and the figures of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chronicals_trl.packing.bfd import STRATEGIES as BFD_STRATEGIES
from chronicals_trl.packing.bfd import PackPlan, pack_lengths
from chronicals_trl.packing.columns import Integers, TokenColumns

__all__ = ["STRATEGIES", "NothingToPack", "PackStats", "check_strategy", "nothing_to_pack", "plan_documents"]

STRATEGIES = (*BFD_STRATEGIES, "wrapped")


@dataclass(frozen=True)
class PackStats:
    """What packing did. For a data set packed in windows only `capacity`, `strategy` and `window` are known.

    Attributes:
        capacity: tokens that a bin can hold.
        strategy: "bfd", "bfd_split" or "wrapped".
        window: documents packed together when the data set is streamed; None when the whole data set was planned.
        documents: documents that are in the rows.
        bins: rows that hold documents.
        empty_bins: rows without any, after those, so that the number of rows is the multiple asked for.
        tokens: tokens in the rows, padding not counted.
        fill: tokens / (bins · capacity).
        lower_bound: bins below which no packer can go.
        truncated_documents, truncated_tokens: documents above the capacity, and what was cut off their ends ("bfd").
        split_documents: documents that were cut into several, above the capacity ("bfd_split") or at a row's end
            ("wrapped").
        masked_pieces: pieces of split documents without a label to learn ("bfd_split"): kept, but nothing is learned.
        dropped_empty: documents without a token, left out.
        dropped_masked: documents without a label to learn in what would be kept of them, left out.
        max_doc_length: tokens of the longest document as it came.
        max_segment_length: the longest stretch of one document, or of padding, in any row padded to the capacity.
        max_docs_per_bin: documents, or pieces of them, in the fullest row by count; padding not counted.
        dropped_columns: columns that do not have one value a token, left out.
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
    masked_pieces: int | None = None
    dropped_empty: int | None = None
    dropped_masked: int | None = None
    max_doc_length: int | None = None
    max_segment_length: int | None = None
    max_docs_per_bin: int | None = None
    dropped_columns: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PackStats:
        """From `to_dict`'s result, or what JSON made of it."""
        return cls(**{**values, "dropped_columns": tuple(values["dropped_columns"])})

    def describe(self) -> str:
        """One line for the report."""
        parts = self._figures() if self.documents is not None else [self._window()]
        if self.strategy == "wrapped":
            parts.append("wrapped: documents are cut where a row ends and attend to each other within it")
        if self.dropped_columns:
            parts.append(f"columns left out, not one value a token: {', '.join(self.dropped_columns)}")
        return ", ".join(parts)

    def _window(self) -> str:
        return (
            f"{self.strategy} in windows of {self.window:,} documents, {self.capacity:,} tokens a bin "
            "(streamed: the whole data set is not known in advance)"
        )

    def _figures(self) -> list[str]:
        parts = [
            f"{_count(self.documents, 'document')} in {_count(self.bins, 'bin')} of {self.capacity:,} tokens",
            f"fill {self.fill:.5f}",
            f"at least {_count(self.lower_bound, 'bin')} needed",
        ]
        if self.truncated_documents:
            parts.append(f"{self.truncated_documents:,} truncated ({self.truncated_tokens:,} tokens lost)")
        if self.split_documents:
            parts.append(f"{self.split_documents:,} split")
        if self.masked_pieces:
            parts[-1] += f" ({_count(self.masked_pieces, 'piece')} without a label to learn)"
        if self.dropped_empty:
            parts.append(f"{self.dropped_empty:,} empty dropped")
        if self.dropped_masked:
            parts.append(f"{self.dropped_masked:,} without a label to learn dropped")
        if self.empty_bins:
            parts.append(f"{self.empty_bins:,} empty bins appended")
        return parts


def _count(number: int | None, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; it must be one of {STRATEGIES}.")


class NothingToPack(ValueError):
    """No document with a token and something to learn."""


def nothing_to_pack(documents: int) -> NothingToPack:
    return NothingToPack(
        f"The data set is empty: it has {documents} documents and not a single token, so there is nothing to pack; "
        "check the file that it was loaded from and the filters before packing."
    )


def plan_documents(
    columns: TokenColumns, capacity: int, strategy: str, multiple: int
) -> tuple[PackPlan, Integers | None, PackStats]:
    """Plan the documents that have tokens and something to learn.

    Returns the plan; the documents that its `doc_ids` count, None where they are all; and the figures. Beside the
    plan some 5 bytes a document are held, or 9 where documents are dropped.

    Raises:
        NothingToPack: no document is left.
    """
    lengths = columns.lengths()
    count = len(lengths)
    has_tokens = int(np.count_nonzero(lengths))
    if not has_tokens:
        raise nothing_to_pack(count)
    # What is left of a document decides whether it has something to learn, as when TRL truncates without packing.
    # A row of "wrapped" may go on with the document that follows, so there nothing is masked for certain.
    if strategy == "wrapped":
        keep = lengths > 0
    else:
        keep = columns.have_labels(np.minimum(lengths, capacity) if strategy == "bfd" else lengths)
    kept: Integers | None = None
    if not keep.all():
        kept = np.flatnonzero(keep).astype(np.int32 if count < 2**31 else np.int64)
        lengths = lengths[kept]
    del keep
    if not len(lengths):
        raise NothingToPack(
            f"The data set has nothing to learn: every label of its {has_tokens:,} documents with tokens is -100"
            f"{' within the first ' + str(capacity) if strategy == 'bfd' else ''}. Look at the masks and templates "
            "that made the labels, or raise the capacity (max_length)."
        )

    longest = int(lengths.max())
    above = lengths > capacity
    cut, lost = int(np.count_nonzero(above)), 0
    if strategy == "bfd" and cut:
        lost = int(lengths[above].sum(dtype=np.int64)) - cut * capacity
        np.minimum(lengths, capacity, out=lengths)
    del above
    if strategy == "wrapped":
        plan = _wrap(lengths, capacity)
        cut = int(np.count_nonzero(np.bincount(plan.doc_ids) > 1))
    else:
        plan = pack_lengths(lengths, capacity, strategy=strategy)
    empty_bins = -plan.num_bins % multiple
    longest_tail = capacity if empty_bins else capacity - int(plan.bin_tokens.min())
    # The documents of a row are one segment under "wrapped".
    longest_segment = int((plan.bin_tokens if strategy == "wrapped" else plan.lengths).max())
    stats = PackStats(
        capacity=capacity,
        strategy=strategy,
        documents=len(lengths),
        bins=plan.num_bins,
        empty_bins=empty_bins,
        tokens=plan.num_tokens,
        fill=plan.fill,
        lower_bound=plan.num_bins if strategy == "wrapped" else plan.lower_bound,
        truncated_documents=cut if strategy == "bfd" else 0,
        truncated_tokens=lost,
        split_documents=cut if strategy != "bfd" else 0,
        masked_pieces=_masked_pieces(columns, plan, kept, lengths) if strategy == "bfd_split" and cut else 0,
        dropped_empty=count - has_tokens,
        dropped_masked=has_tokens - len(lengths),
        max_doc_length=longest,
        max_segment_length=max(longest_segment, longest_tail),
        max_docs_per_bin=1 if strategy == "wrapped" else int(np.diff(plan.bin_offsets).max()),
        dropped_columns=columns.dropped,
    )
    del lengths
    if strategy != "wrapped":
        plan = plan.reorder(np.random.default_rng(0).permutation(plan.num_bins))
    return plan, kept, stats


def _masked_pieces(columns: TokenColumns, plan: PackPlan, kept: Integers | None, lengths: Integers) -> int:
    """How many pieces of documents above the capacity have no label to learn, as a long prompt's beginnings."""
    pieces = np.flatnonzero((lengths > plan.capacity)[plan.doc_ids])
    documents = plan.doc_ids[pieces] if kept is None else kept[plan.doc_ids[pieces]]
    return int(np.count_nonzero(~columns.have_labels_in(documents, plan.starts[pieces], plan.lengths[pieces])))


def _wrap(lengths: Integers, capacity: int) -> PackPlan:
    """Documents one after another in the order given, cut wherever a bin is full."""
    ends = np.cumsum(lengths, dtype=np.int64)
    borders = np.union1d(ends, np.arange(capacity, int(ends[-1]), capacity))
    begins = np.concatenate([[0], borders[:-1]])
    doc_ids = np.searchsorted(ends, begins, side="right")
    bins = begins // capacity
    return PackPlan(
        capacity=capacity,
        doc_ids=doc_ids,
        starts=begins - (ends - lengths)[doc_ids],
        lengths=borders - begins,
        bin_offsets=np.append(np.flatnonzero(np.diff(bins, prepend=-1)), len(bins)),
        num_tokens=int(ends[-1]),
    )
