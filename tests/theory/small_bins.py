"""Best-Fit Decreasing beside the optimum, on instances small enough for an exhaustive search: docs/theory/packing.md.

    python tests/theory/small_bins.py

`pack_lengths` is what is checked. First-Fit Decreasing is here to compare with: theorems about one are not theorems
about the other.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from chronicals_trl.packing import pack_lengths  # noqa: E402


class Bins(NamedTuple):
    best_fit: int
    first_fit: int
    optimum: int


def fits(lengths: tuple[int, ...], capacity: int, bins: int) -> bool:
    """Whether documents, the longest first, go into so many bins at all; every choice is tried."""

    @cache
    def place(i: int, spaces: tuple[int, ...]) -> bool:
        if i == len(lengths):
            return True
        return any(
            place(i + 1, tuple(sorted((*spaces[:j], space - lengths[i], *spaces[j + 1 :]))))
            for j, space in enumerate(spaces)
            if space >= lengths[i]
        )

    return place(0, (capacity,) * bins)


def optimum(lengths: tuple[int, ...], capacity: int, found: int) -> int:
    """The least number of bins, where a packing into `found` is known. Nothing but the tokens bounds it from below."""
    while found * capacity - capacity >= sum(lengths) and fits(lengths, capacity, found - 1):
        found -= 1
    return found


def first_fit_decreasing(lengths: tuple[int, ...], capacity: int) -> int:
    spaces: list[int] = []
    for length in lengths:
        place = next((j for j, space in enumerate(spaces) if space >= length), None)
        if place is None:
            spaces.append(capacity - length)
        else:
            spaces[place] -= length
    return len(spaces)


def solve(lengths: tuple[int, ...], capacity: int) -> Bins:
    """`lengths` descending."""
    best_fit, first_fit = pack_lengths(lengths, capacity).num_bins, first_fit_decreasing(lengths, capacity)
    return Bins(best_fit, first_fit, optimum(lengths, capacity, min(best_fit, first_fit)))


def every_instance(capacity: int, most: int) -> Iterator[tuple[int, ...]]:
    """All lists of 1 to `most` documents, but for their order."""
    for count in range(1, most + 1):
        yield from combinations_with_replacement(range(capacity, 0, -1), count)


def sampled(capacity: int, count: int, number: int) -> Iterator[tuple[int, ...]]:
    """Documents of 1/10 to 6/10 of a bin: shorter ones fill any gap, longer ones stand alone."""
    draw = random.Random(capacity)
    for _ in range(number):
        lengths = (draw.randint(capacity // 10, 6 * capacity // 10) for _ in range(count))
        yield tuple(sorted(lengths, reverse=True))


def johnson(m: int, capacity: int = 2048) -> tuple[int, ...]:
    """The instance on which 11/9 is reached: 30 m documents near a half and a quarter of a bin; the optimum is 9 m."""
    half, quarter = capacity // 2, capacity // 4
    return (half + 1,) * 6 * m + (quarter + 2,) * 6 * m + (quarter + 1,) * 6 * m + (quarter - 2,) * 12 * m


def table() -> list[dict[str, str]]:
    rows = []
    for name, capacity, instances in (
        ("every one of up to 9 documents, bins of 8", 8, every_instance(8, 9)),
        ("3,000 samples of 9 documents, bins of 100", 100, sampled(100, 9, 3000)),
        ("2,000 samples of 9 documents, bins of 2,048", 2048, sampled(2048, 9, 2000)),
    ):
        solved = [solve(lengths, capacity) for lengths in instances]
        above = sum(s.best_fit > s.optimum for s in solved)
        rows.append(
            {
                "instances": name,
                "number": f"{len(solved):,}",
                "above the optimum": f"{above:,} ({above / len(solved):.2%})",
                "most bins above it": str(max(s.best_fit - s.optimum for s in solved)),
                "worst ratio": max((f"{s.best_fit}/{s.optimum}" for s in solved), key=_value),
                "fewer bins than FFD": str(sum(s.best_fit < s.first_fit for s in solved)),
                "more bins than FFD": str(sum(s.best_fit > s.first_fit for s in solved)),
            }
        )
    return rows


def _value(ratio: str) -> float:
    above, below = ratio.split("/")
    return int(above) / int(below)


def markdown(rows: list[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---|" + "--:|" * (len(rows[0]) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])


if __name__ == "__main__":
    print(markdown(table()))
