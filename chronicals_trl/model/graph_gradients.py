"""The gradients that a captured backward pass writes, lent out as `.grad` instead of copied.

A graph writes to the same memory each time. Copies of all gradients would take as much again, and a pass over them.
So autograd is given tensors on the graph's own memory, which become `.grad` as they are. Before any graph is replayed
again (the forward pass's has used this memory for what was dead by the time the gradients came), each `.grad` that
still lies there, of gradients that accumulate or are zeroed in place, is moved to memory of its own. What else
somebody may have kept cannot be moved; that it is there shows in the storage's reference count, and the graphs go on
with copies (`model.graphs`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["StaticGradients"]


class StaticGradients:
    """What one graph writes.

    Args:
        parameters: that the gradients are of.
        tensors: one for each, of its shape, or None for a parameter that gets none; held by nobody else for long.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor | None]) -> None:
        self.tensors = list(tensors)
        self._pairs = [(p, t) for p, t in zip(parameters, tensors, strict=True) if t is not None]
        # A storage may hold several: the parts of a product that was computed as one.
        self._storages = list({_storage(tensor): None for _, tensor in self._pairs})
        self._at_home = self._references()

    def lent(self) -> list[Tensor | None]:
        """Tensors on the graph's memory. One that nobody else holds becomes `.grad` without a copy."""
        return [None if tensor is None else tensor.detach() for tensor in self.tensors]

    def copied(self) -> list[Tensor | None]:
        """The same values in memory of their own."""
        copies = iter(_copies([tensor for _, tensor in self._pairs]))
        return [None if tensor is None else next(copies) for tensor in self.tensors]

    def kept(self) -> bool:
        """Whether somebody holds on to this memory otherwise than by `.grad`."""
        references = self._references()
        if references == self._at_home:
            return False
        lent = Counter(_storage(tensor) for _, tensor in self._borrowers())
        counts = zip(self._storages, references, self._at_home, strict=True)
        return any(now > at_home + lent[storage] for storage, now, at_home in counts)

    def take_back(self) -> None:
        """Move each `.grad` on this memory to memory of its own."""
        borrowers = [gradient for gradient, _ in self._borrowers()]
        for gradient, copy in zip(borrowers, _copies(borrowers), strict=True):
            gradient.data = copy

    def _borrowers(self) -> list[tuple[Tensor, Tensor]]:
        """Each `.grad` on this memory, with the tensor of ours that it shares it with."""
        return [(p.grad, t) for p, t in self._pairs if p.grad is not None and p.grad.data_ptr() == t.data_ptr()]

    def _references(self) -> list[int]:
        """How many tensors, and objects of Python's for it, hold each storage."""
        return list(map(torch._C._storage_Use_Count, self._storages))


def _storage(tensor: Tensor) -> int:
    """A name for the tensor's storage, as long as there is the tensor; with none of Python's objects for it."""
    return tensor.untyped_storage()._cdata


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in as few launches as there are dtypes."""
    places: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.dtype, []).append(place)
    copies = list(tensors)
    for same in places.values():
        # Multiplied by 1, which is exact, NaN and -0 included: there is no foreach copy into new memory in torch 2.11.
        made = torch._foreach_mul([tensors[place] for place in same], 1.0)
        for place, copy in zip(same, made, strict=True):
            copies[place] = copy
    return copies
