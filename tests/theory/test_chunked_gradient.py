"""docs/theory/chunked-gradient.md: its bounds hold element by element, and its table is what comes out."""

from __future__ import annotations

import pytest
import torch
from theory import chunked_gradient, pages
from theory.chunked_gradient import UNIT_ROUNDOFF, Measured, gamma, inputs, measure, summed_in

PAGE = "chunked-gradient.md"


@pytest.fixture(scope="module")
def smallest_chunks() -> Measured:
    return measure(inputs(), min(chunked_gradient.BUDGETS_MIB))


def test_the_op_keeps_the_bound_of_a_sum_in_float32(smallest_chunks: Measured) -> None:
    """Every term is a product of two bfloat16 numbers; however many chunks, each passes so many additions at most."""
    exact = torch.stack(smallest_chunks.products).sum(0)
    error = (smallest_chunks.gradient.double() - exact).abs()
    summation = gamma(chunked_gradient.TOKENS, torch.float32) * smallest_chunks.sizes
    rounding = UNIT_ROUNDOFF[torch.bfloat16] * (exact.abs() + summation)
    assert smallest_chunks.gradient.dtype == torch.bfloat16
    assert len(smallest_chunks.products) > 100
    assert (error <= summation + rounding).all()
    # And in size it is the last rounding: half of a unit would be the largest error of a number just above a power.
    assert error.norm() < 0.5 * UNIT_ROUNDOFF[torch.bfloat16] * exact.norm()


def test_a_sum_in_bfloat16_keeps_its_bound_and_no_better_one(smallest_chunks: Measured) -> None:
    products = smallest_chunks.products
    total, sizes = summed_in(torch.bfloat16, products)
    exact_of_rounded = sum(p.bfloat16().double() for p in products)
    assert isinstance(exact_of_rounded, torch.Tensor)
    error = (total.double() - exact_of_rounded).abs()
    assert (error <= gamma(len(products) - 1, torch.bfloat16) * sizes).all()
    # With the rounding of each chunk.
    exact = torch.stack(products).sum(0)
    magnitudes = torch.stack(products).abs().sum(0)
    assert ((total.double() - exact).abs() <= gamma(len(products), torch.bfloat16) * magnitudes).all()
    # A bound that did not grow with the chunks would be broken.
    assert (error > 8 * UNIT_ROUNDOFF[torch.bfloat16] * exact_of_rounded.abs()).any()


def test_a_sum_in_bfloat16_comes_to_a_halt() -> None:
    """The page's example: a thousand terms of 1/512 beside a 1."""
    terms = [torch.tensor(1.0, dtype=torch.float64)] + [torch.tensor(2.0**-9, dtype=torch.float64)] * 1000
    assert summed_in(torch.bfloat16, terms)[0] == 1.0
    assert summed_in(torch.float32, terms)[0] == sum(terms)


def test_the_table_is_what_comes_out() -> None:
    found, shown = chunked_gradient.table(), pages.table(PAGE, "chunks")
    assert [list(row) for row in shown] == [list(row) for row in found]
    for row, on_page in zip(found, shown, strict=True):
        for name, value in row.items():
            # GEMMs of other machines sum in other orders; two digits on the page.
            assert pages.number(on_page[name]) == pytest.approx(value, rel=0.1), name
    # What the page says of it.
    ours, narrow = ([row[f"{name}, summation"] for row in found] for name in ("float32", "bfloat16"))
    assert max(ours) < 1.05 * min(ours)
    assert narrow == sorted(narrow) and narrow[-1] > 20 * narrow[0]
