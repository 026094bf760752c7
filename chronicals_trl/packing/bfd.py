"""Best-Fit Decreasing over all document lengths at once: lengths in, plan out, numpy only.

Packing documents for language-model training by Best-Fit Decreasing is from Ding et al. 2024, "Fewer Truncations
Improve Language Modeling" (arXiv 2404.10830); working on the histogram of lengths instead of on single documents is
the idea of Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027). Here the
histogram only speeds the work up: the bins are those of the textbook algorithm, document by document.

Why whole runs can be placed at once: let `length` be the current length and `space` the smallest remaining space
that it fits in. The bin that takes the document has `space - length` left. If another document of that length still
fits there, this bin is now the fullest that fits, so Best-Fit goes on with the same bin. Each bin of the class `space`
therefore ends up with `space // length` documents before the next bin is touched, and every one of them lands in the
class `space % length`, which is too small for this length.

Legend: D documents, F fragments (D plus the extra pieces of "bfd_split"), N bins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["STRATEGIES", "PackPlan", "check_capacity", "check_strategy", "pack_lengths"]

STRATEGIES = ("bfd", "bfd_split")

# cu_seqlens, which counts the tokens of a bin, is int32 wherever attention kernels take it.
_MAX_CAPACITY = 2**31 - 1
_INT64_MAX = np.iinfo(np.int64).max

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Which piece of which document goes into which bin.

    Bin i holds the fragments `bin_offsets[i]` to `bin_offsets[i + 1]` (compressed sparse rows), the longest first.

    Attributes:
        capacity: tokens that a bin can hold.
        doc_ids: (F,) int64, the index of a fragment's document in the lengths that were given.
        starts: (F,) int64, the fragment's first token in its document; all 0 for the strategy "bfd".
        lengths: (F,) int64, the fragment's tokens.
        bin_offsets: (N + 1,) int64.
        num_tokens: tokens in all bins.
    """

    capacity: int
    doc_ids: Int64Array
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
        ends = np.concatenate([[0], np.cumsum(self.lengths)])[self.bin_offsets]
        return np.diff(ends)

    @cached_property
    def lower_bound(self) -> int:
        """A number of bins below which no packer can go.

        The bound L2 of Martello and Toth (Knapsack Problems, 1990, section 8.3.2); it is never below
        ceil(tokens / capacity), and higher where fragments longer than half a bin cannot share one.
        """
        return _martello_toth_bound(self.lengths, self.capacity)

    def reorder(self, order: Int64Array) -> PackPlan:
        """The same bins in another order; `order` (N,) is a permutation of their numbers."""
        counts = np.diff(self.bin_offsets)[order]
        bin_offsets = np.concatenate([[0], np.cumsum(counts)])
        fragments = np.arange(len(self.doc_ids)) + np.repeat(self.bin_offsets[order] - bin_offsets[:-1], counts)
        return replace(
            self,
            doc_ids=self.doc_ids[fragments],
            starts=self.starts[fragments],
            lengths=self.lengths[fragments],
            bin_offsets=bin_offsets,
        )


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
    doc_ids, starts, frag_lengths = _split(doc_lengths, capacity)

    # The keys fit 16 bits at common capacities, and numpy's stable sort of those is a radix sort.
    key = (capacity - frag_lengths).astype(np.uint16 if capacity <= 2**16 else np.int64)
    order = np.argsort(key, kind="stable")
    descending = frag_lengths[order]
    run_starts = np.flatnonzero(np.diff(descending, prepend=-1))
    run_counts = np.diff(run_starts, append=len(descending))
    placements, num_bins = _place_runs(descending[run_starts].tolist(), run_counts.tolist(), capacity)

    # The placements take the sorted fragments one after another, so a fragment's bin follows from its position.
    first_bin, bins, per_bin = np.asarray(placements, dtype=np.int64).reshape(-1, 3).T
    sizes = bins * per_bin
    within = np.arange(len(descending)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    bin_of = np.repeat(first_bin, sizes) + within // np.repeat(per_bin, sizes)

    order = order[np.argsort(bin_of, kind="stable")]
    bin_offsets = np.zeros(num_bins + 1, dtype=np.int64)
    np.cumsum(np.bincount(bin_of, minlength=num_bins), out=bin_offsets[1:])
    return PackPlan(
        capacity=capacity,
        doc_ids=doc_ids[order],
        starts=starts[order],
        lengths=frag_lengths[order],
        bin_offsets=bin_offsets,
        num_tokens=int(doc_lengths.sum()),
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
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"lengths has the shape {array.shape}; it must be one-dimensional, one length a document.")
    if not len(array):
        return np.zeros(0, dtype=np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        index = 0
        if np.issubdtype(array.dtype, np.floating):
            # A fraction or NaN says more about what went wrong than the first float does.
            index = int(np.argmax(array != np.floor(array)))
        elif array.dtype == object:
            return _check_lengths(array.tolist(), limit)
        raise _bad_length(index, array[index].item(), limit)
    bad = (array < 1) | (array > (_INT64_MAX if limit is None else limit))
    if bad.any():
        index = int(np.argmax(bad))
        raise _bad_length(index, array[index].item(), limit)
    return array.astype(np.int64)


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


def _split(doc_lengths: Int64Array, capacity: int) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Cut documents at multiples of the capacity: each fragment's document, start and length, in document order."""
    pieces = -(-doc_lengths // capacity)
    doc_ids = np.repeat(np.arange(len(doc_lengths), dtype=np.int64), pieces)
    piece = np.arange(len(doc_ids), dtype=np.int64) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = piece * capacity
    return doc_ids, starts, np.minimum(doc_lengths[doc_ids] - starts, capacity)


class _SpaceSet:
    """A set of remaining spaces that answers "the smallest one of at least n": a bitset in two levels.

    One Python integer would do, but every question would then cost a pass over `capacity` bits.
    """

    _BITS = 9  # 512 spaces a block
    _MASK = (1 << _BITS) - 1

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}
        self._summary = 0

    def add(self, space: int) -> None:
        block = space >> self._BITS
        self._blocks[block] = self._blocks.get(block, 0) | 1 << (space & self._MASK)
        self._summary |= 1 << block

    def remove(self, space: int) -> None:
        block = space >> self._BITS
        self._blocks[block] ^= 1 << (space & self._MASK)
        if not self._blocks[block]:
            self._summary ^= 1 << block

    def at_least(self, space: int) -> int:
        """The smallest member that is not below `space`, or -1."""
        block = space >> self._BITS
        bits = self._blocks.get(block, 0) >> (space & self._MASK)
        if bits:
            return space + _lowest_bit(bits)
        later = self._summary >> (block + 1)
        if not later:
            return -1
        block += 1 + _lowest_bit(later)
        return (block << self._BITS) + _lowest_bit(self._blocks[block])


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _place_runs(lengths: list[int], counts: list[int], capacity: int) -> tuple[list[tuple[int, int, int]], int]:
    """Place `counts[i]` fragments of `lengths[i]`, the lengths descending.

    Returns the placements, (first bin, number of bins, fragments for each of them), in the order in which they take
    the fragments, and the number of bins. A step either uses a class of bins up or finishes a length.
    """
    placements: list[tuple[int, int, int]] = []
    # remaining space -> the bins that have it, as (first bin, count) runs, the oldest first
    classes: dict[int, deque[tuple[int, int]]] = {}
    spaces = _SpaceSet()
    num_bins = 0
    for length, left in zip(lengths, counts, strict=True):
        while left:
            space = spaces.at_least(length)
            if space < 0:
                space = capacity
                per_bin = min(space // length, left)
                first, bins = num_bins, left // per_bin
                num_bins += bins
            else:
                runs = classes[space]
                first, available = runs[0]
                per_bin = min(space // length, left)
                bins = min(available, left // per_bin)
                if bins < available:
                    runs[0] = (first + bins, available - bins)
                else:
                    runs.popleft()
                    if not runs:
                        del classes[space]
                        spaces.remove(space)
            placements.append((first, bins, per_bin))
            left -= bins * per_bin
            space -= per_bin * length
            if not space:
                continue
            if space not in classes:
                classes[space] = deque([(first, bins)])
                spaces.add(space)
                continue
            runs = classes[space]
            last_first, last_bins = runs[-1]
            if last_first + last_bins == first:
                runs[-1] = (last_first, last_bins + bins)
            else:
                runs.append((first, bins))
    return placements, num_bins


def _martello_toth_bound(lengths: Int64Array, capacity: int) -> int:
    if not len(lengths):
        return 0
    values, counts = np.unique(lengths, return_counts=True)
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
