"""docs/theory/packing.md: its theorem on `pack_lengths`, the bounds from the literature, and its figures."""

from __future__ import annotations

import json
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from theory import pages, small_bins
from theory.small_bins import first_fit_decreasing, johnson, optimum, solve

from chronicals_trl.packing import pack_lengths

PAGE = "packing.md"


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    capacity = draw(st.integers(6, 60))
    lengths = draw(st.lists(st.integers(1, draw(st.sampled_from([capacity, capacity // 2]))), min_size=1, max_size=9))
    return tuple(sorted(lengths, reverse=True)), capacity


@settings(max_examples=150, deadline=None)
@given(problems())
def test_bounds(problem: tuple[tuple[int, ...], int]) -> None:
    lengths, capacity = problem
    bins = solve(lengths, capacity)
    assert bins.optimum <= bins.best_fit <= Fraction(3 * bins.optimum + 1, 2)
    assert bins.best_fit <= Fraction(3, 2) * bins.optimum
    assert bins.best_fit <= Fraction(11, 9) * bins.optimum + 4
    assert bins.first_fit <= Fraction(11, 9) * bins.optimum + Fraction(6, 9)
    if min(lengths) * 3 > capacity:
        assert bins.best_fit == bins.optimum  # case (b) of the proof
    assert pack_lengths(lengths, capacity).lower_bound <= bins.optimum


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_every_row_but_the_last_lacks_less_than_the_document_that_opened_it(lengths: list[int]) -> None:
    plan = pack_lengths(lengths, 64)
    opener = plan.lengths[plan.bin_offsets[-2] :].max()
    assert (plan.bin_tokens[:-1] > 64 - opener).all()
    assert (plan.num_bins - 1) * (64 - opener) <= plan.num_tokens


def test_the_search_for_the_optimum() -> None:
    """Against packings that can be seen to be best, from a start that is far too high."""
    assert optimum((4, 4, 3, 3, 3, 3), 10, 6) == 2
    assert optimum((6, 6, 6), 10, 3) == 3
    assert optimum((7, 4, 4), 10, 3) == 2
    assert optimum((1,) * 9, 9, 9) == 1


def test_the_instances_on_the_page() -> None:
    """Lists of lengths in braces, with their capacity, bins of Best-Fit, of First-Fit, and the optimum."""
    found = re.findall(
        r"\{([\d, ]+)\} in bins of (\d+): BFD (\d+), FFD (\d+), optimum (\d+)", pages.text(PAGE).replace("**", "")
    )
    assert len(found) == 3
    for listed, *rest in found:
        capacity, best_fit, first_fit, best = map(int, rest)
        lengths = tuple(int(length) for length in listed.split(","))
        assert (*solve(lengths, capacity),) == (best_fit, first_fit, best)
    assert {(int(b) > int(f)) - (int(b) < int(f)) for _, _, b, f, _ in found} == {-1, 0, 1}


@pytest.mark.parametrize("m", [1, 5, 100])
def test_eleven_ninths_is_reached(m: int) -> None:
    lengths = johnson(m)
    plan = pack_lengths(lengths, 2048)
    assert plan.num_bins == first_fit_decreasing(lengths, 2048) == 11 * m
    # The optimum fills its 9 m bins to the last token.
    assert sum(lengths) == 9 * m * 2048
    half, longer, quarter, shorter = 1025, 514, 513, 510
    assert half + quarter + shorter == 2 * longer + 2 * shorter == 2048
    assert plan.fill == pytest.approx(9 / 11)
    assert plan.lower_bound == 9 * m  # the report says how far a plan may be from the best


def test_the_table_is_what_comes_out() -> None:
    assert pages.table(PAGE, "instances") == small_bins.table()


def test_the_fill_on_the_page() -> None:
    rows = json.loads((pages.ROOT / "docs" / "results" / "packing_fill.json").read_text())["rows"]
    at_bound = sum(row["bins"] == row["lower_bound"] for row in rows)
    above = max(row["bins"] / row["lower_bound"] - 1 for row in rows)
    fills = [row["fill"] for row in rows]
    text = " ".join(pages.text(PAGE).split())
    assert f"{at_bound} of the {len(rows)} plans" in text
    assert f"at most {above:.1%} above" in text
    assert f"between {np.floor(min(fills) * 1000) / 10}% and {np.floor(max(fills) * 10000) / 100}%" in text
    saved = [row["saved_against_random"] for row in rows]
    assert f"from {min(saved):.0%} to {max(saved):.0%}" in text
