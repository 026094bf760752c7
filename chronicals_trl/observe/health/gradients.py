"""Whether the parameters that are to be trained get a gradient, and whether they move.

Both look at tensors where they are. A result stays on the device until somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Movement", "have_gradients"]

Reduce = Callable[[Tensor], Tensor]  # the ranks' maximum, in place or not; the tensor itself where there is one rank

# Of each group's parameters so many are watched, evenly spread, and two elements of each.
_WATCHED = 16


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor; without its graph."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def have_gradients(parameters: Sequence[nn.Parameter], device: torch.device, reduce: Reduce) -> Tensor:
    """(len(parameters),) int32 on `device`: 1 where any element of the gradient is not zero, on any rank.

    NaN counts as not zero. A few launches for all parameters together, and no wait. A sparse gradient counts as one.
    """
    found = torch.zeros(len(parameters), dtype=torch.int32, device=device)
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for index, parameter in enumerate(parameters):
        if parameter.grad is None:
            continue
        gradient = _local(parameter.grad)
        if gradient.layout != torch.strided:
            found[index].fill_(1)
        elif gradient.numel():  # a shard may be empty
            kinds.setdefault((gradient.device, gradient.dtype), []).append((index, gradient))
    for (where, _), members in kinds.items():
        largest = torch.stack(torch._foreach_norm([gradient for _, gradient in members], float("inf")))
        indices = torch.tensor([index for index, _ in members])
        if where.type == "cuda":
            indices = indices.pin_memory()
        found[indices.to(device, non_blocking=True)] = (largest != 0).to(device, torch.int32)
    return reduce(found)


class Movement:
    """Some elements of each group, and whether the optimizer changes them.

    Watched are the elements with the largest and the smallest gradient of a parameter at the moment of `start`: an
    element without a gradient (a token that does not occur, an expert that is not asked) need not move.

    Args:
        groups: parameters of each of the optimizer's groups.
        device: for the results.
        reduce: the ranks' maximum.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], device: torch.device, reduce: Reduce) -> None:
        self._groups = [_spread(group) for group in groups]
        self._device, self._reduce = device, reduce
        # (group, parameter, indices, values then, whether the gradient there was not zero)
        self._then: list[tuple[int, nn.Parameter, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def start(self) -> None:
        """Take the values of now. Call it while there are gradients, before a step of the optimizer."""
        self._then.clear()
        for number, group in enumerate(self._groups):
            for parameter in group:
                values = _elements(parameter)
                gradient = None if parameter.grad is None else _local(parameter.grad)
                if values is None or gradient is None or gradient.layout != torch.strided:
                    continue
                flat = gradient.reshape(-1)
                if not flat.numel() or flat.shape != values.shape:
                    continue
                indices = torch.stack([flat.argmax(), flat.argmin()])
                self._then.append((number, parameter, indices, values[indices], flat[indices] != 0))

    @torch.no_grad()
    def finish(self) -> Tensor:
        """(2, groups) int32: whether any watched element had a gradient at `start`, and whether any of those moved."""
        seen: list[list[Tensor]] = [[] for _ in self._groups]
        for number, parameter, indices, values, had_gradient in self._then:
            now = _elements(parameter)
            if now is not None:
                moved = had_gradient & (now[indices] != values)
                seen[number].append(torch.stack([had_gradient.any(), moved.any()]).to(self._device))
        self._then.clear()
        none = torch.zeros(2, dtype=torch.bool, device=self._device)
        columns = [torch.stack(group).any(0) if group else none for group in seen]
        return self._reduce(torch.stack(columns, 1).to(torch.int32))


def _spread(group: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    count = min(_WATCHED, len(group))
    return [group[number * len(group) // count] for number in range(count)]


def _elements(parameter: Any) -> Tensor | None:
    """A parameter's elements (of this rank's shard) as one row, without a copy; None where that cannot be."""
    values = _local(parameter)
    return values.view(-1) if values.layout == torch.strided and values.is_contiguous() else None
