"""Data on several ranks: one packs it and writes the cache, the others read it, and all have the same rows."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

from chronicals_trl.packing.planning import PackStats

__all__ = ["main_process_first", "require_same_on_all_ranks", "require_same_rows"]

# Rows that the ranks compare.
_SAMPLED = 64


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


def require_same_on_all_ranks(name: str, packed: Dataset | IterableDataset, stats: PackStats) -> None:
    """Raise ValueError where the ranks packed different data, on all of them.

    The same documents in another order have the same figures, so a sample of the rows is compared too.
    """
    if PartialState().num_processes == 1:
        return
    plans = gather_object([(stats.describe(), _sample(packed))])
    differs = next((rank for rank, plan in enumerate(plans) if plan != plans[0]), None)
    if differs is None:
        return
    (first, _), (other, _) = plans[0], plans[differs]
    found = f"Rank 0: {first}. Rank {differs}: {other}."
    if first == other:
        found = f"Ranks 0 and {differs} have the same figures ({first}) and other rows: another order of documents."
    raise ValueError(_not_the_same(f"The {name} data set", found))


def require_same_rows(named: Mapping[str, Any]) -> None:
    """Raise ValueError where the ranks have different rows in a data set, packed or not, on all of them.

    Args:
        named: argument -> what it holds: a Dataset is compared by its length and some of its rows, another object not.
    """
    if PartialState().num_processes == 1:
        return
    mine = {name: (len(data), _sample(data)) for name, data in named.items() if isinstance(data, Dataset)}
    everyone: list[dict[str, tuple[int, str]]] = gather_object([mine])
    for rank, theirs in enumerate(everyone):
        for name in [*everyone[0], *(name for name in theirs if name not in everyone[0])]:
            first, other = everyone[0].get(name), theirs.get(name)
            if first == other:
                continue
            found = f"Ranks 0 and {rank} have {first[0] if first else 0:,} rows and other ones."
            if (first or (0,))[0] != (other or (0,))[0]:
                found = f"Rank 0: {first[0] if first else 0:,} rows. Rank {rank}: {other[0] if other else 0:,} rows."
            raise ValueError(_not_the_same(f"`{name}`", found))


def _not_the_same(what: str, found: str) -> str:
    return (
        f"{what} is not the same on all ranks. {found} Load the same files, with the same filters and seeds, on every "
        "rank: the trainer deals the rows out."
    )


def _sample(packed: Dataset | IterableDataset) -> str:
    """A digest of some rows' tokens, the first and the last among them; of a stream, which is not read, nothing."""
    if not isinstance(packed, Dataset):
        return ""
    names = [name for name in ("input_ids", "labels") if name in packed.column_names]
    if not len(packed) or not names:
        return ""
    rows = np.unique(np.linspace(0, len(packed) - 1, _SAMPLED).astype(np.int64)).tolist()
    table = packed.select_columns(names).with_format("arrow")[rows]
    digest = hashlib.sha256()
    for column in table.columns:
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            digest.update(pa.concat_arrays(column.chunks).flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
