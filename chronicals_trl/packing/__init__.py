"""Packing: lengths in, a plan out (`bfd`); a data set packed by that plan (`dataset`); its bins dealt to ranks
(`balance`); batches of bins (`collator`).

The names are loaded when they are first used, so that the planner alone costs an import of numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chronicals_trl.packing.balance import BalancedSampler
    from chronicals_trl.packing.bfd import PackPlan, pack_lengths
    from chronicals_trl.packing.collator import PackedCollator
    from chronicals_trl.packing.dataset import PackStats, pack_dataset

__all__ = ["BalancedSampler", "PackPlan", "PackStats", "PackedCollator", "pack_dataset", "pack_lengths"]

_HOME = {
    "BalancedSampler": "balance",
    "PackPlan": "bfd",
    "PackStats": "dataset",
    "PackedCollator": "collator",
    "pack_dataset": "dataset",
    "pack_lengths": "bfd",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
