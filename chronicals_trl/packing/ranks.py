"""Packing on several ranks: one writes the cache, the others read it, and all have the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate import PartialState
from accelerate.utils import gather_object

from chronicals_trl.packing.planning import PackStats

__all__ = ["main_process_first", "require_same_on_all_ranks"]


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block on the main process, then on the main process of each other node, then on the other ranks.

    A cache that all nodes share is written once, one on a node's own disk once a node. Accelerate's context managers
    of that name leave the other ranks waiting where the block fails; here they go on, and fail for themselves.
    """
    state = PartialState()
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    for _ in range(turn):
        state.wait_for_everyone()
    try:
        yield
    except Exception:
        _let_others_go(state, 2 - turn)
        raise
    _let_others_go(state, 2 - turn)


def _let_others_go(state: PartialState, rounds: int) -> None:
    for _ in range(rounds):
        state.wait_for_everyone()


def require_same_on_all_ranks(name: str, stats: PackStats) -> None:
    """Raise ValueError where the ranks packed different data, on all of them."""
    if PartialState().num_processes == 1:
        return
    plans = gather_object([stats.describe()])
    differs = next((rank for rank, plan in enumerate(plans) if plan != plans[0]), None)
    if differs is not None:
        raise ValueError(
            f"The {name} data set is not the same on all ranks. Rank 0: {plans[0]}. Rank {differs}: {plans[differs]}. "
            "Load the same files, with the same filters and seeds, on every rank: the trainer deals the rows out."
        )
