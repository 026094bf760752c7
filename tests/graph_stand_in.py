"""A recorder without a GPU: its replays run the work again, into the tensors of the first time.

What is particular to a graph is kept: recording computes nothing that anybody could use (the results are NaN until
they are replayed, and the random generator stands where it stood), the tensors are the same ones each time, and what
a forward replay has kept for the backward pass is overwritten by the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StandIn:
    """What a test looks at, and what it sets.

    Attributes:
        recorded, replayed, released: how often.
        waited: `replayed` when it was last waited.
        fails_at: the number of the recording that raises.
        short: whether memory is short.
        loses: whether replays lose something of the work.
    """

    def __init__(self, fails_at: int | None = None) -> None:
        self.recorded = self.replayed = self.released = self.waited = 0
        self.fails_at = fails_at
        self.short = self.loses = False

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        with torch.random.fork_rng(devices=[]):
            result = work()
            if self.recorded == self.fails_at:
                raise RuntimeError("operation not permitted when stream is capturing")
        statics = _tensors(result)
        for static in statics:
            static.fill_(torch.nan)

        # The tape of the recording is gone once its backward pass was recorded, as it is in a graph.
        def replay() -> None:
            self.replayed += 1
            for static, new in zip(statics, _tensors(work()), strict=True):
                static.copy_(0.9 * new if self.loses else new)

        return replay, result

    def short_of_memory(self) -> bool:
        return self.short

    def wait(self) -> None:
        self.waited = self.replayed

    def release(self) -> None:
        self.released += 1


def _tensors(result: Any) -> list[Tensor]:
    values = [result] if isinstance(result, Tensor) else result
    return [value for value in values if value is not None]
