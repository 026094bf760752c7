"""What is in the tables of a model's modules, and whether it still is: without a walk through the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

__all__ = ["Members"]


class Members:
    """The entries of some modules' `_modules`, `_parameters` or `_buffers`, as they are now.

    The entries are held, and compared themselves: of two that are never there at once, the ids may be the same. The
    look runs in C over prepared lists, some thousand tables in a fraction of a millisecond.

    Args:
        tables: in the order that counts. One that is no dictionary (scripted modules keep theirs in C++) cannot be
            looked at.
    """

    def __init__(self, tables: Sequence[Any]) -> None:
        self._opaque = not all(isinstance(table, dict) for table in tables)
        self._empty = [table for table in tables if not table]
        self._filled: list[dict[str, Any]] = [table for table in tables if table and isinstance(table, dict)]
        self._sizes = list(map(len, self._filled))
        self._held = list(chain.from_iterable(map(dict.values, self._filled)))

    def changed(self) -> bool:
        """Whether something has come, gone or moved since, or whether that cannot be told."""
        present = chain.from_iterable(map(dict.values, self._filled))
        return (
            self._opaque
            or any(self._empty)
            or list(map(len, self._filled)) != self._sizes
            or not all(map(is_, present, self._held))  # as many as there were
        )
