"""How long this process has been kept waiting for a core by others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["Contention"]

_THREADS = Path("/proc/self/task")


class Contention:
    """Seconds for which threads of this process could have run and had no core, since the look before.

    Linux alone counts that; elsewhere it is 0. Threads that are new since the look before count from their beginning,
    those that have ended not at all.

    Args:
        read: thread -> such nanoseconds since it began.
    """

    def __init__(self, read: Callable[[], dict[str, int]] | None = None) -> None:
        self._read = read or _of_threads
        self._before = self._read()

    def look(self) -> float:
        before, self._before = self._before, self._read()
        return sum(waited - before.get(thread, 0) for thread, waited in self._before.items()) / 1e9


def _of_threads() -> dict[str, int]:
    waited = {}
    for path in _THREADS.glob("*/schedstat"):
        try:
            waited[path.parent.name] = int(path.read_text().split()[1])  # time on a core, time without, turns
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel does not count
            continue
    return waited
