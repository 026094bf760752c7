"""What the width does to an adapter's gradients and to what a step changes: the table of docs/theory/lora-plus.md.

    OMP_NUM_THREADS=1 python tests/theory/lora_magnitudes.py

One adapted layer of width n between inputs with entries of order 1 and a readout with entries of order 1/n, which is
how the LoRA+ paper's limit is taken. Every gradient comes from this package's own `lora_linear`.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from chronicals_trl.kernels import lora_linear  # noqa: E402

# Legend: T examples, W width, R rank.
WIDTHS = (64, 128, 256, 512, 1024)
RANK, EXAMPLES, SEEDS = 8, 8, 8
STEP = 2.0**-7  # of a rate, in A and B alike


class Layer(NamedTuple):
    x_TW: Tensor
    weight_WW: Tensor
    readout_W: Tensor
    target_T: Tensor
    a_RW: Tensor
    b_WR: Tensor

    def gradients(self, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Of half the squared error, by A and by B."""
        a, b = self.a_RW.clone().requires_grad_(), self.b_WR.clone().requires_grad_()
        out_TW = lora_linear(self.x_TW, self.weight_WW, a, b, 1.0)
        loss = loss_scale * (out_TW @ self.readout_W - self.target_T).square().sum() / 2
        grad_a, grad_b = torch.autograd.grad(loss, (a, b))
        return grad_a, grad_b


def layer(width: int, seed: int) -> Layer:
    """A as PEFT starts it, entries within 1/sqrt(n); B zero."""
    generator = torch.Generator().manual_seed(1000 * width + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    a = (2 * torch.rand(RANK, width, generator=generator) - 1) / math.sqrt(width)
    weight = normal(width, width) / math.sqrt(width)
    return Layer(normal(EXAMPLES, width), weight, normal(width) / width, normal(EXAMPLES), a, torch.zeros(width, RANK))


def size(x: Tensor) -> float:
    """Root of the mean square of the entries."""
    return x.square().mean().sqrt().item()


def measure(width: int, seed: int) -> dict[str, float]:
    """Sizes of entries; a step is Adam's first, the sign of the gradient times STEP."""
    start = layer(width, seed)
    first_a, first_b = start.gradients()
    after_b = start._replace(b_WR=-STEP * first_b.sign())
    second_a, _ = after_b.gradients()
    step_a = -STEP * second_a.sign()
    low_TR = start.x_TW @ start.a_RW.T
    return {
        "dA at the start": size(first_a),
        "dB at the start": size(first_b),
        "dA after a step of B": size(second_a),
        "A x at the start": size(low_TR),
        "change of A x by a step of A": size(start.x_TW @ step_a.T),
        "change of B A x by a step of B": size(low_TR @ after_b.b_WR.T),
    }


def table() -> list[dict[str, float | str]]:
    """Geometric means over the seeds, then the exponent of the width, by least squares in logarithms."""
    found = {n: [measure(n, seed) for seed in range(SEEDS)] for n in WIDTHS}
    rows: list[dict[str, float | str]] = []
    for name in found[WIDTHS[0]][0]:
        sizes = {n: [each[name] for each in found[n]] for n in WIDTHS}
        if not all(min(values) > 0 for values in sizes.values()):
            if any(max(values) > 0 for values in sizes.values()):
                raise AssertionError(f"{name} is zero for some seeds alone")
            rows.append({"quantity": name, **dict.fromkeys(map(str, WIDTHS), 0.0), "exponent": math.nan})
            continue
        means = {n: statistics.geometric_mean(values) for n, values in sizes.items()}
        slope = statistics.linear_regression([math.log(n) for n in means], [math.log(m) for m in means.values()]).slope
        rows.append({"quantity": name, **{str(n): m for n, m in means.items()}, "exponent": slope})
    return rows


def markdown(rows: list[dict[str, float | str]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---|" + "--:|" * (len(rows[0]) - 1)]
    for row in rows:
        cells = (v if isinstance(v, str) else "none" if math.isnan(v) else f"{v:.2g}" for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(table()))
