"""Gradients of weights that are made aside: the same, of leaves alone, and done when the pass is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_stand_in import Deferred
from torch import Tensor, nn

from chronicals_trl.kernels import _aside, _common, gated_mlp, rms_norm, shared_linear

KERNELS = _common.INTERPRET


def weights(*shapes: Any) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.3) for shape in shapes]


def norm(x: Tensor, w: list[Tensor]) -> Tensor:
    return rms_norm(x, w[0], 1e-6)


def mlp(x: Tensor, w: list[Tensor]) -> Tensor:
    return gated_mlp(x, w[0], w[1], w[2])


def two_mlps(x: Tensor, w: list[Tensor]) -> Tensor:
    return mlp(mlp(x, w[:3]), w[3:])


def joined(x: Tensor, w: list[Tensor]) -> Tensor:
    return torch.cat(shared_linear(x, w[:3], [w[3], None, w[4]]), -1)


# op, shapes of its weights, pieces of work aside, the most of them under way; None where the kernels make the node
OPS: dict[str, Any] = {
    "rms_norm": (norm, [(16,)], 1 if KERNELS else None, 1),
    "gated_mlp": (mlp, [(24, 16), (24, 16), (16, 24)], 3 if KERNELS else None, 3),
    "two MLPs": (two_mlps, 2 * [(24, 16), (24, 16), (16, 24)], 6 if KERNELS else None, 3),
    "shared_linear": (joined, [(16, 16), (8, 16), (8, 16), (16,), (8,)], 5 if KERNELS else 3, 5),
}


def gradients(op: Any, w: list[nn.Parameter], given: list[Tensor], aside: Deferred | None) -> list[Tensor]:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = op(x, given).square().sum()
    if aside is None:
        return list(torch.autograd.grad(loss, [x, *w]))
    with _aside.opened(aside):
        return list(torch.autograd.grad(loss, [x, *w]))


@pytest.mark.parametrize("name", OPS)
def test_gradients_are_the_same(name: str) -> None:
    op, shapes, pieces, most = OPS[name]
    w, aside = weights(*shapes), Deferred()
    ours = gradients(op, w, list(w), aside)
    for a, b in zip(ours, gradients(op, w, list(w), None), strict=True):
        assert torch.equal(a, b)
    assert aside.done == (pieces or 0)
    assert aside.most <= most


@pytest.mark.parametrize("name", OPS)
def test_what_is_no_leafs_is_made_at_once(name: str) -> None:
    """As of a weight that autocast has cast: the next node reads its gradient."""
    op, shapes, _, _ = OPS[name]
    w, aside = weights(*shapes), Deferred()
    ours = gradients(op, w, [2 * each for each in w], aside)
    for a, b in zip(ours, gradients(op, w, [2 * each for each in w], None), strict=True):
        assert torch.equal(a, b)
    assert aside.done == 0


def test_it_closes_after_an_error() -> None:
    with pytest.raises(KeyError), _aside.opened(Deferred()):
        raise KeyError
    out = _aside.product(torch.ones(2, 3), torch.ones(3, 4), of_leaf=True)
    assert torch.equal(out, torch.full((2, 4), 3.0))
