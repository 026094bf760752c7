"""The error of a weight gradient that is summed over chunks of tokens: the table of docs/theory/chunked-gradient.md.

    OMP_NUM_THREADS=1 python tests/theory/chunked_gradient.py

`linear_cross_entropy` in bfloat16, with budgets of logits that make more and more chunks of the same tokens. It adds
its chunks up in float32. Beside it: the same chunks added up in bfloat16, as a `.grad` in bfloat16 adds up
micro-batches. Both against float64 sums of the very products that went in, so that what is measured is the summation
and the last rounding alone; and against the gradient that float64 has of the same hidden states and weight.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from chronicals_trl.kernels import _cross_entropy_chunks as chunks  # noqa: E402
from chronicals_trl.kernels import linear_cross_entropy, linear_cross_entropy_reference  # noqa: E402

# The vocabulary is small so that float64 of the whole fits a test; a mebibyte of logits then holds few tokens.
TOKENS, HIDDEN, VOCAB = 4096, 16, 2048
BUDGETS_MIB = (144, 16, 4, 1)
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor


class Measured(NamedTuple):
    """Gradients (V, H) of one run: as the op gives it, and what its chunks were."""

    rows: int  # of a chunk
    gradient: Tensor
    products: list[Tensor]  # float64, one a chunk, of the operands that the op multiplied
    sizes: Tensor  # float64, the sum of the magnitudes of all that was added


def inputs() -> Inputs:
    """Hidden states of unit scale with a mean of their own, as a model's have, so that sums grow with the tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator) + torch.randn(HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return Inputs(hidden.bfloat16(), weight.bfloat16(), labels)


def measure(given: Inputs, budget_mib: int) -> Measured:
    """The op's gradient of the summed loss, and its own operands, overheard where each chunk is added."""
    products: list[Tensor] = []
    sizes = torch.zeros(given.weight.shape, dtype=torch.float64)
    rows: list[int] = []
    add = chunks._WeightSum.add

    def overhear(self: chunks._WeightSum, grad_CV: Tensor, hidden_CH: Tensor) -> None:
        g, h = grad_CV.double(), hidden_CH.double()
        products.append(g.t() @ h)
        sizes.add_(g.abs().t() @ h.abs())
        rows.append(len(g))
        add(self, grad_CV, hidden_CH)

    chunks._WeightSum.add = overhear  # type: ignore[method-assign]
    try:
        weight = given.weight.clone().requires_grad_()
        out = linear_cross_entropy(
            given.hidden, weight, given.labels, reduction="sum", logit_budget_mib=budget_mib, differentiate="loss"
        )
        (gradient,) = torch.autograd.grad(out.loss, weight)
    finally:
        chunks._WeightSum.add = add  # type: ignore[method-assign]
    return Measured(rows[0], gradient, products, sizes)


def summed_in(dtype: torch.dtype, products: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Chunks rounded to `dtype` and added one after another in it; and the magnitudes of what was added, float64."""
    total = products[0].to(dtype)
    sizes = total.double().abs()
    for product in products[1:]:
        total = total + product.to(dtype)
        sizes += product.to(dtype).double().abs()
    return total, sizes


def true_gradient(given: Inputs) -> Tensor:
    weight = given.weight.double().requires_grad_()
    out = linear_cross_entropy_reference(given.hidden.double(), weight, given.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(out.loss, weight)
    return gradient


def relative(error: Tensor, of: Tensor) -> float:
    return (error.double().norm() / of.double().norm()).item()


def gamma(operations: int, dtype: torch.dtype) -> float:
    """Higham's constant: so many roundings one after another move a result by no more than this, relatively."""
    nu = operations * UNIT_ROUNDOFF[dtype]
    return nu / (1 - nu) if nu < 1 else float("inf")


def table() -> list[dict[str, float]]:
    given = inputs()
    truth = true_gradient(given)
    rows = []
    for budget in BUDGETS_MIB:
        measured = measure(given, budget)
        exact = torch.stack(measured.products).sum(0)
        narrow, _ = summed_in(torch.bfloat16, measured.products)
        rows.append(
            {
                "chunks": len(measured.products),
                "tokens in a chunk": measured.rows,
                "float32, summation": relative(measured.gradient - exact, exact),
                "bfloat16, summation": relative(narrow - exact, exact),
                "float32, against float64": relative(measured.gradient - truth, truth),
                "bfloat16, against float64": relative(narrow - truth, truth),
            }
        )
    return rows


def markdown(rows: list[dict[str, float]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "--:|" * len(rows[0])]
    for row in rows:
        cells = (f"{v:,}" if isinstance(v, int) else f"{v:.2%}" for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(table()))
