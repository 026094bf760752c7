"""What a layer of the floor's step is made of: groups of projections that read one tensor, and attention.

The products and their order are those of `kernels/_shared_linear`, `_gated_mlp`, `_lora_core` and `_lora_mlp`.

Legend: N positions, I inputs, O outputs, A and K widths of query and key heads, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chronicals_trl.bench.sft.cases import LORA_ALPHA, LORA_RANK
from chronicals_trl.bench.sft.floor_ops import ATTENTION, GEMM, Op, Operand, product
from chronicals_trl.kernels._wide_products import add_mm_, mm, transposed_mm

__all__ = ["Attend", "Attention", "Group", "Linear"]

#: q (1, Hq, N, D), k and v (1, Hk, N, D) to (1, N, Hq, D).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SCALE = LORA_ALPHA / LORA_RANK


@dataclass
class Linear:
    """A projection: its weight (O, I) and what belongs to it, the rotating tensors among it."""

    name: str
    weight: Tensor
    out: Tensor  # (N, O)
    grad: Operand  # (N, O)
    d_weight: Tensor | None  # (O, I)
    bias: Tensor | None = None
    b: Tensor | None = None  # (O, R)


@dataclass
class Group:
    """Projections that read one tensor; `read_inside` and `added_inside`: of their adapters, by the activation."""

    x: Operand  # (N, I)
    d_x: Tensor  # (N, I), or with R columns more for each adapter
    linears: list[Linear]
    a: Tensor | None  # (R of all, I)
    h: Tensor | None  # (N, R of all): x A^T, and as well what has its shape on the way back
    joint: list[Tensor] = field(default_factory=list)  # [W B] of each, where one pass takes both
    read_inside: bool = False
    added_inside: bool = False

    def forward(self) -> Iterator[Op]:
        for each in self.linears:
            yield product(f"{each.name}", each.out, self.x, each.weight.t(), bias=each.bias)
        if self.a is not None and not self.read_inside:
            yield _low_rank("A", self.x, self.a, lambda x, a: mm(x, a.t(), 1.0), self.d_x.shape[0])
        if self.a is not None and not self.added_inside:
            for each, h in self._with_h():
                yield _low_rank("B", h, each.b, lambda h, b, out=each.out: add_mm_(out, h, b.t(), SCALE), len(h))

    def input_gradient(self) -> Iterator[Op]:
        for number, each in enumerate(self.linears):
            right = self.joint[number] if self.joint else each.weight
            yield product(f"{each.name} dx", self.d_x, each.grad, right, add=number > 0)

    def weight_gradients(self) -> Iterator[Op]:
        for each in self.linears:
            if each.d_weight is not None:
                yield self.weight_gradient(each)

    def weight_gradient(self, each: Linear) -> Op:
        assert each.d_weight is not None
        return product(f"{each.name} dW", each.d_weight, _transposed(each.grad), self.x)

    def by_turns(self) -> Iterator[Op]:
        """The input gradient of each and its weight's, one after the other."""
        for number, op in enumerate(self.input_gradient()):
            yield op
            yield self.weight_gradient(self.linears[number])

    def adapter_gradients(self, need_x: bool) -> Iterator[Op]:
        """Those of B; then what comes through B; the input gradient through A, and A's own gradient."""
        assert self.a is not None and self.h is not None
        rows = len(self.h)
        for each, h in self._with_h():
            if not self.added_inside:
                yield _low_rank("dB", each.grad, h, lambda g, h: transposed_mm(g, h, SCALE), rows, each.b)
        for each, _ in self._with_h():
            if not self.joint:
                yield _low_rank("dy B", each.grad, each.b, lambda g, b: mm(g, b, SCALE), rows)
        if self.read_inside:
            return
        if need_x:
            d_x = self.d_x[:, : self.a.shape[1]]
            yield _low_rank("dx A", self.h, self.a, lambda h, a: add_mm_(d_x, h, a, 1.0), rows)
        yield _low_rank("dA", self.x, self.h, lambda x, h: transposed_mm(h, x, 1.0), rows, self.a)

    def _with_h(self) -> Iterator[tuple[Linear, Tensor]]:
        assert self.h is not None
        yield from zip(self.linears, self.h.split(LORA_RANK, 1), strict=True)


def _transposed(x: Operand) -> Operand:
    return x.t() if isinstance(x, Tensor) else lambda: x().t()


def _low_rank(name: str, x: Operand, y: Any, call: Callable[..., Any], rows: int, factor: Tensor | None = None) -> Op:
    """A product with a factor of an adapter, whose operations are 2 N (numbers in the factor); `y` unless given."""
    weight = y if factor is None else factor
    return Op(
        GEMM, f"adapters' {name}", lambda: call(x if isinstance(x, Tensor) else x(), y), 2.0 * rows * weight.numel()
    )


class Attention:
    """Attention of one layer, on q, k and v (N, A), (N, K) that its products have written.

    Args:
        attend: See `Attend`; None if nothing will run.
        dim, squares: Of a head; of the documents.
        qkv, grad: What it reads; grad (N, A).
        stand_ins: The output and the gradients of q, k and v, for who replays products alone, before attention runs.
    """

    def __init__(
        self, attend: Attend | None, dim: int, squares: int, qkv: Sequence[Tensor], grad: Tensor,
        stand_ins: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self._attend, self._grad = attend, _heads(grad, dim)
        self._stand_in, *self._stand_in_grads = stand_ins
        # `data`: what writes into these buffers again is not autograd's matter.
        self._qkv = [_heads(x.data, dim).transpose(1, 2).requires_grad_() for x in qkv]
        self._out: Tensor | None = None
        self._grads: list[Tensor] = []
        flops = 2.0 * grad.shape[1] * squares  # of two causal products
        self.forward = Op(ATTENTION, "attention", self._forward, flops)
        self.backward = Op(ATTENTION, "attention, backward", self._backward, 2 * flops)

    def _forward(self) -> None:
        assert self._attend is not None
        self._grads = []
        with torch.enable_grad():
            self._out = self._attend(*self._qkv)

    def _backward(self) -> None:
        assert self._out is not None
        grads = torch.autograd.grad(self._out, self._qkv, self._grad)
        self._grads = [x.transpose(1, 2).flatten(0, 1).flatten(1) for x in grads]
        self._out = None  # the layer's o has read it

    def out(self) -> Tensor:
        return self._stand_in if self._out is None else self._out.detach().flatten(0, 1).flatten(1)

    def grad_of(self, index: int) -> Operand:
        return lambda: (self._grads or self._stand_in_grads)[index]


def _heads(x: Tensor, dim: int) -> Tensor:
    return x.view(1, len(x), -1, dim)
