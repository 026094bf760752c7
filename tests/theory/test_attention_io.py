"""docs/theory/attention-io.md: what is counted is what its formulas say, within its bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from theory import attention_io, pages
from theory.attention_io import HEAD, TOKENS, Machine, keys_outside, operands, packed, plain, queries_outside

from chronicals_trl.packing.balance import attention_costs

PAGE = "attention-io.md"


def formula(n: int, d: int, size: int) -> int:
    """q, the output and the log-sum-exp once; keys and values once for each tile of queries."""
    rows = min(n, (size - 2 * d) // (2 * d + 3))
    return 2 * n * d + n + math.ceil(n / rows) * 2 * n * d


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 60), st.integers(4, 12), st.floats(0, 1))
def test_counts_and_bounds(n: int, d: int, at: float) -> None:
    """Sizes from 8 d to N d, spread by their logarithms; the bounds as the page proves them."""
    size = round(8 * d * (n / 8) ** at)
    q, k, v = operands(n, d)
    machine = Machine(size)
    np.testing.assert_allclose(queries_outside(machine, q, k, v), plain(q, k, v), rtol=1e-9, atol=1e-12)
    assert machine.moved == formula(n, d, size)
    assert machine.stored == n * d + n
    assert machine.held == 0 and machine.most_held <= size
    if n * d > size:
        assert machine.most_held > size - (2 * d + 3)  # a row more would not fit
    bound = n**2 * d**2 / size
    assert 4 * bound <= machine.moved <= 16 * bound


@pytest.mark.parametrize("columns", [1, 3, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_any_shape_are_attention(columns: int, causal: bool) -> None:
    q, k, v = operands(45, 5)
    machine = Machine(400)
    found = queries_outside(machine, q, k, v, columns=columns, causal=causal)
    np.testing.assert_allclose(found, plain(q, k, v, causal=causal), rtol=1e-9, atol=1e-12)
    # Wider tiles of keys take the place of queries: more is moved.
    assert machine.moved >= formula(45, 5, 400) or causal


def test_no_formula_below_the_reading_of_the_inputs() -> None:
    """The condition M <= N d: with more memory the bound falls on and the traffic does not."""
    n, d = 64, 8
    q, k, v = operands(n, d)
    for size in (2 * n * d, 16 * n * d):
        machine = Machine(size + 8 * n * d)
        queries_outside(machine, q, k, v)
        assert machine.moved == 4 * n * d + n > n**2 * d**2 / size


def test_too_little_memory_is_an_error() -> None:
    q, k, v = operands(8, 8)
    for order in (queries_outside, keys_outside):
        with pytest.raises(MemoryError, match="holds no tile"):
            order(Machine(4 * 8), q, k, v)
    with pytest.raises(MemoryError, match="65 elements in a fast memory of 64"):
        Machine(64).new(65)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=6), st.booleans())
def test_packed_documents(lengths: list[int], causal: bool) -> None:
    d, size, n = 6, 120, sum(lengths)
    q, k, v = operands(n, d)
    machine = Machine(size)
    found = packed(machine, q, k, v, lengths, causal=causal)
    starts = np.cumsum(lengths) - lengths
    for start, length in zip(starts, lengths, strict=True):
        part = slice(start, start + length)
        alone = plain(q[part], k[part], v[part], causal=causal)
        np.testing.assert_allclose(found[part], alone, rtol=1e-9, atol=1e-12)
    whole = sum(formula(length, d, size) for length in lengths)
    assert machine.moved == whole if not causal else machine.moved <= whole
    # Two documents never cost more than one of both lengths.
    assert whole <= formula(n, d, size)


def test_the_trainer_counts_the_same_squares() -> None:
    """`attention_costs`, by which rows are dealt to ranks, is the sum that the page has."""
    row = Dataset.from_dict({"seq_lengths": [attention_io.DOCUMENTS]})
    assert attention_costs(row, TOKENS).tolist() == [sum(n * n for n in attention_io.DOCUMENTS)]


def test_the_tables_are_what_comes_out() -> None:
    for found, first in ((attention_io.table(), "M"), (attention_io.packed_table(), "packed row")):
        expected = [{name: attention_io.shown(name, value) for name, value in row.items()} for row in found]
        assert pages.table(PAGE, first) == expected


def test_what_the_page_says_of_the_table() -> None:
    rows = pages.table(PAGE, "M")
    sizes = [int(pages.number(row["M"])) for row in rows]
    assert sizes[0] < HEAD**2 < sizes[2] and sizes[-2] == TOKENS * HEAD
    for size, row in zip(sizes, rows, strict=True):
        tiled, keys, unfused = (pages.number(row[name]) for name in ("queries outside", "keys outside", "unfused"))
        assert (tiled < unfused) == (size > 2 * HEAD**2 - 1)
        assert (keys < unfused) == (size > 4 * HEAD**2 - 1)
        assert 2 < keys / tiled < 4
        if HEAD**2 <= size <= TOKENS * HEAD:
            assert 5 <= float(row["over the bound"]) <= 8.2
    one, eight, _ = pages.table(PAGE, "packed row")
    assert 0.19 < pages.number(eight["Σn²"]) / pages.number(one["Σn²"]) < 0.21
    assert 0.25 < pages.number(eight["moved"]) / pages.number(one["moved"]) < 0.28
    once = 4 * TOKENS * HEAD + TOKENS
    assert f"4·N·d + N = {once:,}" in pages.text(PAGE)
    assert (pages.number(one["moved, causal"]) - once) / (pages.number(one["moved"]) - once) == pytest.approx(
        0.5, abs=0.02
    )
