"""What the floor's step is made of: ops that run a product or attention, or that stand for bytes to be moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chronicals_trl.kernels._cross_entropy_chunks import _add_product

__all__ = [
    "ATTENTION",
    "ELEMENTWISE",
    "GEMM",
    "KINDS",
    "OPTIMIZER",
    "Mover",
    "Op",
    "Operand",
    "moved",
    "product",
    "run",
]

GEMM, ATTENTION, ELEMENTWISE, OPTIMIZER = KINDS = ("gemm", "attention", "elementwise", "optimizer")

#: A matrix, or what gives it when the op runs: attention's results are made anew in each pass.
Operand = Tensor | Callable[[], Tensor]

#: Each of the two areas that copies go between: together several L2 caches, so that no copy finds its data there.
MOVED_BYTES = 2**28
#: Copies begin at multiples of so many elements, as tensors do: others would be read and written one by one.
ALIGNMENT = 256


@dataclass(frozen=True)
class Op:
    """One piece of the step.

    Args:
        kind: One of KINDS.
        name: As in the tables.
        run: Does it; None for what only moves bytes.
        flops: Operations.
        bytes: To be moved, of an op without `run`.
    """

    kind: str
    name: str
    run: Callable[[], Any] | None = None
    flops: float = 0.0
    bytes: float = 0.0


def product(name: str, out: Tensor, a: Operand, b: Operand, *, bias: Tensor | None = None, add: bool = False) -> Op:
    """out = a b + bias, or out += a b; one of a and b is a tensor. A float32 sum of bf16 factors is kept as such.

    Args:
        out: (M, N).
        a, b: (M, K), (K, N).
        bias: (N,), without `add`.
    """
    inner = a.shape[1] if isinstance(a, Tensor) else b.shape[0]  # type: ignore[union-attr]

    def call() -> None:
        left, right = (x if isinstance(x, Tensor) else x() for x in (a, b))
        if bias is not None:
            torch.addmm(bias, left, right, out=out)
        else:
            _add_product(out, left, right, not add)

    return Op(GEMM, name, call, 2.0 * out.shape[0] * out.shape[1] * inner)


def moved(name: str, count: float, kind: str = ELEMENTWISE, flops: float = 0.0) -> list[Op]:
    """An op that moves `count` bytes, or none."""
    return [Op(kind, name, None, flops, count)] if count else []


class Mover:
    """Copies as many bytes as an op has to move, read and written together, from and to memory that is not cached.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        count = MOVED_BYTES // 2 if device.type == "cuda" else 2**16
        self._source = torch.randn(count, device=device, dtype=torch.bfloat16)
        self._target = torch.empty_like(self._source)
        self._at = 0

    def __call__(self, count: float) -> None:
        elements = round(count / 4)  # bf16, read and written
        while elements > 0:
            part = min(elements, self._source.numel() - self._at)
            piece = slice(self._at, self._at + part)
            torch.neg(self._source[piece], out=self._target[piece])
            end = -(-(self._at + part) // ALIGNMENT) * ALIGNMENT
            self._at = end if end < self._source.numel() else 0
            elements -= part


def run(ops: Iterable[Op], mover: Mover | None = None) -> None:
    """Run all that run; with `mover`, what only moves bytes is a copy of as many."""
    for op in ops:
        if op.run is not None:
            op.run()
        elif mover is not None:
            mover(op.bytes)
