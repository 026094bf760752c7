"""Best-Fit Decreasing over all document lengths at once: lengths in, plan out, numpy only.

Packing documents for language-model training by Best-Fit Decreasing is from Ding et al. 2024, "Fewer Truncations
Improve Language Modeling" (arXiv 2404.10830); working on the histogram of lengths instead of on single documents is
the idea of Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027). Here the
histogram only speeds the work up: the bins are those of the textbook algorithm, document by document.

Runs of documents of one length are placed at once, by `placement.py`.

What is left to do for single documents is a counting sort by length and one scatter into the bins. Both go over chunks
that stay in the processor's cache, so a plan costs little memory beyond itself: some 18 bytes a document at the peak
where a bin holds several documents, 28 where each holds one.

Legend: D documents, F fragments (D plus the extra pieces of "bfd_split"), N bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chronicals_trl.packing.placement import Int64Array, place_runs

__all__ = ["STRATEGIES", "PackPlan", "check_capacity", "check_strategy", "pack_lengths"]

STRATEGIES = ("bfd", "bfd_split")

# cu_seqlens, which counts the tokens of a bin, is int32 wherever attention kernels take it.
_MAX_CAPACITY = 2**31 - 1
_INT64_MAX = np.iinfo(np.int64).max
# Fragments handled at once: their int64 temporaries fit a core's level-2 cache.
_CHUNK = 2**15
# Up to this number of lengths (or the fragments over 16, if that is more) a table with one entry a length is cheap.
_TABLE = 2**16

IndexArray = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Which piece of which document goes into which bin.

    Bin i holds the fragments `bin_offsets[i]` to `bin_offsets[i + 1]` (compressed sparse rows), the longest first.

    Attributes:
        capacity: tokens that a bin can hold.
        doc_ids: (F,), the index of a fragment's document in the lengths that were given; int32, or int64 for 2^31
            fragments and more.
        starts: (F,) int64, the fragment's first token in its document; where no document is cut, as under the strategy
            "bfd", one 0 seen F times (read-only, without memory of its own).
        lengths: (F,) int64, the fragment's tokens: not int32, in which a square of them would overflow.
        bin_offsets: (N + 1,) int64.
        num_tokens: tokens in all bins.
    """

    capacity: int
    doc_ids: IndexArray
    starts: Int64Array
    lengths: Int64Array
    bin_offsets: Int64Array
    num_tokens: int

    @property
    def num_bins(self) -> int:
        return len(self.bin_offsets) - 1

    @property
    def fill(self) -> float:
        """Tokens over the tokens that the bins could hold; 1.0 for a plan without bins."""
        return self.num_tokens / (self.num_bins * self.capacity) if self.num_bins else 1.0

    @cached_property
    def bin_tokens(self) -> Int64Array:
        """(N,) int64, the tokens in each bin."""
        if not self.num_bins:
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(self.lengths, self.bin_offsets[:-1])  # no bin is empty

    @cached_property
    def lower_bound(self) -> int:
        """A number of bins below which no packer can go.

        The bound L2 of Martello and Toth (Knapsack Problems, 1990, section 8.3.2); it is never below
        ceil(tokens / capacity), and higher where fragments longer than half a bin cannot share one.
        """
        return _martello_toth_bound(self.lengths, self.capacity)

    def reorder(self, order: Int64Array) -> PackPlan:
        """The same bins in another order; `order` (N,) is a permutation of their numbers."""
        bin_offsets = np.zeros(self.num_bins + 1, dtype=np.int64)
        np.cumsum(np.diff(self.bin_offsets)[order], out=bin_offsets[1:])
        doc_ids, lengths = np.empty_like(self.doc_ids), np.empty_like(self.lengths)
        one_start = self.starts.strides == (0,)
        starts = self.starts if one_start else np.empty_like(self.starts)
        for low in range(0, self.num_bins, _CHUNK):
            offsets = bin_offsets[low : low + _CHUNK + 1]
            piece = slice(offsets[0], offsets[-1])
            shift = self.bin_offsets[order[low : low + _CHUNK]] - offsets[:-1]
            fragments = np.arange(piece.start, piece.stop) + np.repeat(shift, np.diff(offsets))
            doc_ids[piece] = self.doc_ids[fragments]
            lengths[piece] = self.lengths[fragments]
            if not one_start:
                starts[piece] = self.starts[fragments]
        return replace(self, doc_ids=doc_ids, starts=starts, lengths=lengths, bin_offsets=bin_offsets)


def pack_lengths(lengths: ArrayLike, capacity: int, *, strategy: str = "bfd") -> PackPlan:
    """Plan bins for documents of the given lengths by Best-Fit Decreasing over the whole list.

    Documents go in descending length (equal lengths: in the order given), each into the fullest open bin that still
    has room for it. Among equally full bins the one that has been in that state for the longest takes it. The result
    depends on nothing but the arguments, so every rank computes the same plan.

    Args:
        lengths: (D,) integers, the tokens of each document.
        capacity: tokens a bin can hold, at least 2.
        strategy: "bfd" wants every length to fit in a bin; "bfd_split" cuts a longer document into pieces of
            `capacity` tokens and one shorter piece for what remains.

    Raises:
        ValueError: capacity is not an integer of at least 2; a length is not a positive integer (bool, float and NaN
            are not), or is above `capacity` under "bfd"; the strategy is unknown, or is "wrapped".
    """
    capacity = check_capacity(capacity)
    check_strategy(strategy)
    doc_lengths = _check_lengths(lengths, capacity if strategy == "bfd" else None)
    num_tokens = int(doc_lengths.sum())
    pieces, frag_lengths = _split(doc_lengths, capacity)
    del doc_lengths  # possibly a copy: it has to be gone before the result is made

    values, counts = _histogram(frag_lengths)
    order = _descending_order(frag_lengths, values, counts)
    del frag_lengths
    placements, num_bins = place_runs(values[::-1].tolist(), counts[::-1].tolist(), capacity)
    bin_offsets = _bin_offsets(placements, num_bins)

    # The placements take the sorted fragments one after another.
    doc_ids = np.empty_like(order)
    frag_lengths = np.empty(len(order), dtype=np.int64)
    taken = 0
    for slots, slot_lengths in _slots(placements, bin_offsets):
        doc_ids[slots] = order[taken : taken + len(slots)]
        frag_lengths[slots] = slot_lengths
        taken += len(slots)
    del order

    starts: Int64Array = np.broadcast_to(np.int64(0), len(doc_ids))
    if pieces is not None:
        doc_ids, starts = _document_of(doc_ids, pieces, capacity)
    return PackPlan(
        capacity=capacity,
        doc_ids=doc_ids,
        starts=starts,
        lengths=frag_lengths,
        bin_offsets=bin_offsets,
        num_tokens=num_tokens,
    )


def check_capacity(capacity: Any, name: str = "capacity") -> int:
    """Return `capacity` as an int, or raise ValueError that names it."""
    if isinstance(capacity, (bool, np.bool_)) or not isinstance(capacity, (int, np.integer)):
        raise ValueError(
            f"{name} is {capacity!r} ({type(capacity).__name__}); it must be an integer from 2 to {_MAX_CAPACITY}: "
            "set max_length to the number of tokens that a bin shall hold."
        )
    if not 2 <= capacity <= _MAX_CAPACITY:
        raise ValueError(
            f"{name} is {capacity}; it must be from 2 to {_MAX_CAPACITY}: "
            "set max_length to the number of tokens that a bin shall hold."
        )
    return int(capacity)


def check_strategy(strategy: str) -> None:
    """Raise ValueError unless the strategy is one that this package packs by."""
    if strategy == "wrapped":
        raise ValueError(
            "strategy 'wrapped' cuts documents wherever a bin ends and is left to TRL's own packer, "
            f"trl.pack_dataset; here the strategy is one of {STRATEGIES}."
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; it must be one of {STRATEGIES}.")


def _check_lengths(lengths: ArrayLike, limit: int | None) -> Int64Array:
    if isinstance(lengths, Sequence):
        if not lengths:
            return np.zeros(0, dtype=np.int64)
        # numpy would turn True into 1 and a list with one float into floats: look at the types first.
        if any(_not_integer(kind) for kind in set(map(type, lengths))):
            index = next(i for i, length in enumerate(lengths) if _not_integer(type(length)))
            raise _bad_length(index, lengths[index], limit)
        for index, length in enumerate(lengths):
            if abs(length) > _INT64_MAX:
                raise _bad_length(index, length, limit)
        lengths = np.asarray(lengths, dtype=np.int64)
    found = np.asarray(lengths)
    if found.ndim != 1:
        raise ValueError(f"lengths has the shape {found.shape}; it must be one-dimensional, one length a document.")
    if not len(found):
        return np.zeros(0, dtype=np.int64)
    if not np.issubdtype(found.dtype, np.integer):
        index = 0
        if np.issubdtype(found.dtype, np.floating):
            # A fraction or NaN says more about what went wrong than the first float does.
            index = int(np.argmax(found != np.floor(found)))
        elif found.dtype == object:
            return _check_lengths(found.tolist(), limit)
        raise _bad_length(index, found[index].item(), limit)
    upper = _INT64_MAX if limit is None else limit
    if found.min() < 1 or found.max() > upper:
        index = int(np.argmax((found < 1) | (found > upper)))
        raise _bad_length(index, found[index].item(), limit)
    return found.astype(np.int64, copy=False)


def _not_integer(kind: type) -> bool:
    return issubclass(kind, (bool, np.bool_)) or not issubclass(kind, (int, np.integer))


def _bad_length(index: int, value: Any, limit: int | None) -> ValueError:
    shown = f"lengths[{index}] is {value!r}"
    if _not_integer(type(value)):
        return ValueError(
            f"{shown} ({type(value).__name__}); lengths must be positive integers: pass the token counts themselves, "
            "for example numpy.array([len(ids) for ids in input_ids])."
        )
    if limit is not None and value > limit:
        return ValueError(
            f"{shown}; a length must not be above the capacity, {limit}: truncate the document, raise the capacity "
            '(max_length), or cut long documents with strategy="bfd_split".'
        )
    if value > _INT64_MAX:
        return ValueError(f"{shown}; a length must be from 1 to {_INT64_MAX}.")
    return ValueError(f"{shown}; a length must be at least 1: drop empty documents before packing.")


def _split(doc_lengths: Int64Array, capacity: int) -> tuple[Int64Array | None, Int64Array]:
    """Cut documents at multiples of the capacity.

    Returns the number of pieces of each document (None where every document is one piece) and the fragments' lengths,
    in document order.
    """
    if not len(doc_lengths) or doc_lengths.max() <= capacity:
        return None, doc_lengths
    pieces = -(-doc_lengths // capacity)
    last = np.cumsum(pieces) - 1
    frag_lengths = np.full(int(last[-1]) + 1, capacity, dtype=np.int64)
    frag_lengths[last] = doc_lengths - (pieces - 1) * capacity
    return pieces, frag_lengths


def _document_of(frag_ids: IndexArray, pieces: Int64Array, capacity: int) -> tuple[IndexArray, Int64Array]:
    """For fragments, numbered in document order: their documents, and their first tokens there."""
    document: IndexArray = np.repeat(np.arange(len(pieces)).astype(frag_ids.dtype), pieces)
    first = np.cumsum(pieces) - pieces
    doc_ids = document[frag_ids]
    del document
    starts: Int64Array = first[doc_ids]
    np.subtract(frag_ids, starts, out=starts)
    starts *= capacity
    return doc_ids, starts


def _fits_table(longest: int, fragments: int) -> bool:
    return longest <= max(_TABLE, fragments // 16)


def _chunks(fragments: int, longest: int) -> Iterator[slice]:
    """Pieces long enough that a pass over a table of the lengths, once for each of them, does not count."""
    step = max(_CHUNK, 4 * longest)
    return (slice(low, min(low + step, fragments)) for low in range(0, fragments, step))


def _histogram(lengths: Int64Array) -> tuple[Int64Array, Int64Array]:
    """The distinct lengths, ascending, and how often each occurs."""
    longest = int(lengths.max(initial=0))
    if not _fits_table(longest, len(lengths)):
        ascending = np.sort(lengths)
        ends = np.append(np.flatnonzero(np.diff(ascending)), len(ascending) - 1)
        distinct: Int64Array = ascending[ends]
        return distinct, np.diff(ends, prepend=-1)
    table = np.bincount(lengths, minlength=1)
    values = np.flatnonzero(table)
    return values, table[values]


def _descending_order(lengths: Int64Array, values: Int64Array, counts: Int64Array) -> IndexArray:
    """The fragments, the longest first, equal ones in the order given; `values` and `counts` are the histogram."""
    order: IndexArray = np.empty(len(lengths), dtype=np.int32)
    if len(lengths) >= 2**31:
        order = np.empty(len(lengths), dtype=np.int64)
    longest = int(values[-1]) if len(values) else 0
    if not _fits_table(longest, len(lengths)):
        order[:] = np.argsort(longest - lengths, kind="stable")
        return order
    # next_place[i]: where the next fragment that is i shorter than the longest goes. numpy's stable sort of 16-bit
    # keys is a radix sort; within a chunk it makes runs of equal lengths, each of which is written to one stretch.
    key_type = np.uint16 if longest <= 2**16 else np.int64
    next_place = np.zeros(longest + 1, dtype=np.int64)
    next_place[longest - values] = len(lengths) - np.cumsum(counts)
    for chunk in _chunks(len(lengths), longest):
        key = (longest - lengths[chunk]).astype(key_type)
        run_counts = np.bincount(key, minlength=longest + 1)
        run_shift = next_place - (np.cumsum(run_counts) - run_counts)
        places = np.repeat(run_shift, run_counts)
        places += np.arange(len(key))
        order[places] = np.argsort(key, kind="stable") + chunk.start
        next_place += run_counts
    return order


def _bin_offsets(placements: Int64Array, num_bins: int) -> Int64Array:
    _, first_bin, bins, _, per_bin = placements.T
    # Twice summed: what changes from a bin to the next one gives the bins' fragments, and those the offsets.
    offsets = np.zeros(num_bins + 2, dtype=np.int64)
    np.add.at(offsets, first_bin + 1, per_bin)
    np.subtract.at(offsets, first_bin + bins + 1, per_bin)
    np.cumsum(offsets, out=offsets)
    np.cumsum(offsets, out=offsets)
    return offsets[:-1]


def _slots(placements: Int64Array, bin_offsets: Int64Array) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Where the plan's arrays take the sorted fragments, and these fragments' lengths: chunk by chunk, in order.

    A visit is one bin of one placement. A chunk is whole visits with about `_CHUNK` fragments, at least one visit.
    """
    length, first_bin, bins, held, per_bin = placements.T.copy()
    visit_ends, frag_ends = np.cumsum(bins), np.cumsum(bins * per_bin)
    visit_starts = visit_ends - bins
    if not len(placements):
        return
    marks = np.arange(0, frag_ends[-1], _CHUNK)
    at = np.searchsorted(frag_ends, marks, side="right")
    into = (marks - (frag_ends - bins * per_bin)[at]) // per_bin[at]
    cuts = [*np.unique(visit_starts[at] + into).tolist(), int(visit_ends[-1])]
    for low, high in pairwise(cuts):
        near = slice(np.searchsorted(visit_ends, low, side="right"), np.searchsorted(visit_starts, high, side="left"))
        visits = np.minimum(visit_ends[near], high) - np.maximum(visit_starts[near], low)
        bin_ids = np.repeat(first_bin[near] - visit_starts[near], visits)
        bin_ids += np.arange(low, high)
        slots = bin_offsets[bin_ids]
        slots += np.repeat(held[near], visits)
        if (per_bin[near] > 1).any():
            each = np.repeat(per_bin[near], visits)
            slots -= np.cumsum(each) - each
            slots = np.repeat(slots, each)
            slots += np.arange(len(slots))
        yield slots, np.repeat(length[near], visits * per_bin[near])


def _martello_toth_bound(lengths: Int64Array, capacity: int) -> int:
    if not len(lengths):
        return 0
    values, counts = _histogram(lengths)
    count_below = np.concatenate([[0], np.cumsum(counts)])  # [i]: fragments among the i shortest lengths
    sum_below = np.concatenate([[0], np.cumsum(values * counts)])
    half = int(np.searchsorted(values, capacity // 2, side="right"))  # values[half:] are longer than half a bin

    # For each threshold: fragments above capacity - threshold share with nothing that is at least the threshold long;
    # the other long ones leave a known room; what exceeds that room among the shorter ones needs further bins.
    thresholds = np.concatenate([[0], values[:half]])
    alone = np.searchsorted(values, capacity - thresholds, side="right")
    num_long = count_below[-1] - count_below[half]
    room = (count_below[alone] - count_below[half]) * capacity - (sum_below[alone] - sum_below[half])
    short = sum_below[half] - sum_below[np.searchsorted(values, thresholds, side="left")]
    further = -(-(short - room) // capacity)
    return int(num_long + np.maximum(further, 0).max())
