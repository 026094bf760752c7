"""Memory that the gradient of a weight is to be written into, where somebody has some for it.

The gradients of a captured backward pass lie where the first capture has put them; those of a second one, for rows of
another length, would be copied there, all weights once more. The ops that make the large ones ask here instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["lent", "product"]

# By the weight's address: autograd runs a pass's nodes in a thread of its own, and hands them the weights as it likes.
_memory: Mapping[int, Tensor] = {}


@contextlib.contextmanager
def lent(memory: Mapping[int, Tensor]) -> Iterator[None]:
    """While open, `product` writes the gradient of the weight at an address into the tensor for it.

    Each of the weights may get one gradient in between: a second one would be written over the first.
    """
    global _memory
    _memory = memory
    try:
        yield
    finally:
        _memory = {}


def product(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """a @ b, the gradient of `weight`: memory of its own, or what is lent for it."""
    out = _memory.get(weight.data_ptr()) if _memory else None
    return a @ b if out is None else torch.mm(a, b, out=out)
