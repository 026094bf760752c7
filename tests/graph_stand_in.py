"""A recorder without a GPU: its replays run the work again, into the tensors of the first time.

What is particular to a graph is kept: recording computes nothing that anybody could use (the results are NaN until
they are replayed, and the random generator stands where it stood), the tensors are the same ones each time, and what
a forward replay has kept for the backward pass is overwritten by the next one. So are the tensors of all recordings
that came after the one that is replayed: they may lie where it had something that was dead by then. And nothing can be
recorded into the memory of recordings that are gone, of which somebody still holds a part, until `release`.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


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
        self._replays: list[weakref.ref[Any]] = []
        self._statics: list[list[weakref.ref[Tensor]]] = []  # of each recording those that are its own
        self._memory: list[StorageWeakRef] = []

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        gc.collect()  # a replay of ours holds the work, which holds the replay; a graph holds nothing
        if all(replay() is None for replay in self._replays) and not all(map(StorageWeakRef.expired, self._memory)):
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        with torch.random.fork_rng(devices=[]):
            result = work()
            if self.recorded == self.fails_at:
                raise RuntimeError("operation not permitted when stream is capturing")
        statics = _tensors(result)
        earlier = {id(ref()) for refs in self._statics for ref in refs}
        number = len(self._statics)
        self._statics.append([weakref.ref(static) for static in statics if id(static) not in earlier])
        self._memory += [StorageWeakRef(static.untyped_storage()) for static in statics]
        for static in statics:
            static.fill_(torch.nan)

        # The tape of the recording is gone once its backward pass was recorded, as it is in a graph.
        def replay() -> None:
            self.replayed += 1
            for overwritten in (ref() for later in self._statics[number + 1 :] for ref in later):
                if overwritten is not None:
                    overwritten.fill_(torch.nan)
            for static, new in zip(statics, _tensors(work()), strict=True):
                static.copy_(0.9 * new if self.loses else new)

        self._replays.append(weakref.ref(replay))
        return replay, result

    def short_of_memory(self) -> bool:
        return self.short

    def wait(self) -> None:
        self.waited = self.replayed

    def release(self) -> None:
        self.released += 1
        self._replays, self._statics, self._memory = [], [], []


def _tensors(result: Any) -> list[Tensor]:
    values = [result] if isinstance(result, Tensor) else result
    return [value for value in values if value is not None]
