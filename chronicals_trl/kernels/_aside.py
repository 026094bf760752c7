"""Gradients of weights on a second stream, while a backward pass is captured as a CUDA graph.

What comes next in a backward pass waits for the gradient of a layer's input; those of its weights are wanted when all
is done. In a graph they can lie on a branch of their own, where their products fill the multiprocessors that small
kernels and the ends of other products leave idle.

An op hands such a gradient to `made`, with the memory that it is to be in: memory of the main stream, so that what
the pass has freed serves again. What is read meanwhile is held on to until `settle`, which the op that needs the most
memory calls first. Outside of `opened`, `made` does the work where it stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Aside", "CudaAside", "made", "opened", "product", "settle"]

Fill = Callable[[Tensor], Any]

# Pieces of work under way at a time, where no op settles.
_MOST = 16


class Aside(Protocol):
    """Where work goes that nobody waits for."""

    def run(self, out: Tensor, fill: Fill) -> None:
        """Let `fill` write `out` at some time before `settle` returns."""

    def settle(self) -> None:
        """What comes next on the caller's stream finds all of it done."""


class CudaAside:
    """A branch of the graph that is being captured on the caller's stream.

    Args:
        stream: of a lower priority than the capture's, which is what waits.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._under_way: list[tuple[Tensor, Fill]] = []  # which hold what they read

    def run(self, out: Tensor, fill: Fill) -> None:
        if len(self._under_way) >= _MOST:
            self.settle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            fill(out)
        self._under_way.append((out, fill))

    def settle(self) -> None:
        if self._under_way:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._under_way.clear()


# Of the capture in progress; autograd runs a pass's nodes in a thread of its own.
_open: Aside | None = None


@contextlib.contextmanager
def opened(aside: Aside) -> Iterator[None]:
    """While open, gradients of leaves are made aside; when it closes, they are done.

    No leaf may be used twice in between: autograd would add up its gradients before they are there.
    """
    global _open
    _open = aside
    try:
        yield
        aside.settle()
    finally:
        _open = None


def made(out: Tensor, fill: Fill, *, of_leaf: bool) -> Tensor:
    """`out`, written by `fill`, or to be written by it before the pass ends.

    Args:
        of_leaf: whether `out` is the gradient of a leaf; what else reads it would read it now.
    """
    if _open is None or not of_leaf or (out.is_cuda and not torch.cuda.is_current_stream_capturing()):
        fill(out)
    else:
        _open.run(out, fill)
    return out


def product(a: Tensor, b: Tensor, *, of_leaf: bool) -> Tensor:
    """a @ b, as `made`."""
    if _open is None:
        return a @ b
    return made(a.new_empty(a.shape[0], b.shape[1]), lambda out: torch.mm(a, b, out=out), of_leaf=of_leaf)


def settle() -> None:
    """Wait for what is under way, and let go of what it reads."""
    if _open is not None:
        _open.settle()
