"""Runs of equal lengths into bins by Best-Fit: the core of `bfd.py`, in plain Python over the histogram of lengths.

Why whole runs can be placed at once: let `length` be the current length and `space` the smallest remaining space
that it fits in. The bin that takes the document has `space - length` left. If another document of that length still
fits there, this bin is now the fullest that fits, so Best-Fit goes on with the same bin. Each bin of the class `space`
therefore ends up with `space // length` documents before the next bin is touched, and every one of them lands in the
class `space % length`, which is too small for this length.
"""

from __future__ import annotations

from array import array
from collections import deque

import numpy as np
from numpy.typing import NDArray

__all__ = ["Int64Array", "place_runs"]

Int64Array = NDArray[np.int64]


def place_runs(lengths: list[int], counts: list[int], capacity: int) -> tuple[Int64Array, int]:
    """Place `counts[i]` fragments of `lengths[i]`, the lengths descending.

    Returns the placements, in the order in which they take the fragments, and the number of bins. A placement is a row
    (length, first bin, number of bins, fragments that each of them has already, fragments that each of them gets). A
    step either uses a run of bins up or finishes a length.
    """
    placements = array("q")
    # remaining space -> the bins that have it, as (first bin, count, fragments in each) runs, the oldest first
    classes: dict[int, deque[tuple[int, int, int]]] = {}
    spaces = _SpaceSet()
    num_bins = 0
    for length, left in zip(lengths, counts, strict=True):
        while left:
            space = spaces.at_least(length)
            if space < 0:
                space = capacity
                per_bin = min(space // length, left)
                first, bins, held = num_bins, left // per_bin, 0
                num_bins += bins
            else:
                runs = classes[space]
                first, available, held = runs[0]
                per_bin = min(space // length, left)
                bins = min(available, left // per_bin)
                if bins < available:
                    runs[0] = (first + bins, available - bins, held)
                else:
                    runs.popleft()
                    if not runs:
                        del classes[space]
                        spaces.remove(space)
            placements.extend((length, first, bins, held, per_bin))
            left -= bins * per_bin
            space -= per_bin * length
            held += per_bin
            if not space:
                continue
            if space not in classes:
                classes[space] = deque([(first, bins, held)])
                spaces.add(space)
                continue
            runs = classes[space]
            last_first, last_bins, last_held = runs[-1]
            if last_first + last_bins == first and last_held == held:
                runs[-1] = (last_first, last_bins + bins, held)
            else:
                runs.append((first, bins, held))
    return np.array(placements, dtype=np.int64).reshape(-1, 5), num_bins


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
