"""Real tokens a second, packing fill and peak memory of a training run.

A token counts as real when it is not padding: tokens a second over padded positions reward waste. Counting must not
slow the step down, so a count that lives on the GPU stays there until the figures are read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["ThroughputMeter"]

_GIB = 2**30


class _Total:
    """A sum of host integers and of device integers; the latter stay where they are until `value` is called."""

    def __init__(self) -> None:
        self.host = 0
        self.on_device: dict[torch.device, torch.Tensor] = {}

    def add(self, count: int | torch.Tensor) -> None:
        if not isinstance(count, torch.Tensor):
            self.host += count
            return
        count = count.detach().reshape(()).to(torch.int64)
        total = self.on_device.get(count.device)
        # Added out of place: the caller's tensor, which `count` may be, must keep its value.
        self.on_device[count.device] = count.clone() if total is None else total + count

    def value(self) -> int:
        return self.host + sum(int(total.item()) for total in self.on_device.values())


class ThroughputMeter:
    """Counts tokens as steps go by and turns them into rates when asked.

    The counts are those given to `update`: pass this process's for its own rate, or sums over all ranks for the rate
    of the whole run. Time inside `excluding()`, or between `pause()` and `resume()`, does not count: evaluation and
    saving are not training.

    Args:
        device: where training runs; the current CUDA device when there is one, else the CPU.
        clock: seconds, monotonic.
    """

    def __init__(
        self, device: torch.device | str | None = None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self._clock = clock
        self._paused = 0  # depth: an evaluation may save, and both exclude their time
        self.reset()

    def reset(self) -> None:
        """Start a new interval now, with nothing counted."""
        self._tokens = _Total()
        self._slots = _Total()
        self._counted = False
        self._seconds = 0.0
        self._since = self._clock()

    def update(self, num_real_tokens: int | torch.Tensor, num_slots: int | torch.Tensor) -> None:
        """Count one step. Nothing is read from the device.

        Args:
            num_real_tokens: tokens that are not padding; an int, or an integer tensor with one element.
            num_slots: positions in the batch, padding included; likewise.
        """
        self._tokens.add(num_real_tokens)
        self._slots.add(num_slots)
        self._counted = True

    def pause(self) -> None:
        """Stop the clock. Pauses nest: as many `resume` calls start it again."""
        if not self._paused:
            self._seconds += self._clock() - self._since
        self._paused += 1

    def resume(self) -> None:
        """Undo one `pause`.

        Raises:
            RuntimeError: the meter is not paused.
        """
        if not self._paused:
            raise RuntimeError("ThroughputMeter.resume() without a pause() before it; use `with meter.excluding():`.")
        self._paused -= 1
        if not self._paused:
            self._since = self._clock()

    @contextmanager
    def excluding(self) -> Iterator[None]:
        """Leave the time of the block out."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def read(self) -> dict[str, float]:
        """The figures since the last reading, and a new interval. The one place that waits for the device.

        Returns:
            "tokens_per_second": real tokens; absent if no time has passed.
            "packing_fill": real tokens over positions.
            "peak_memory_gib": the most memory of the CUDA device that torch has taken for itself (what tensors
            occupied, which leaves out the inside of CUDA graphs, is less), else the most resident memory that the
            process has had (absent on Windows).
            Empty, and the interval goes on, when nothing has been counted.
        """
        if not self._counted:
            return {}
        if self.device.type == "cuda":
            # Work that is only queued would otherwise count as done.
            torch.cuda.synchronize(self.device)
        seconds = self._seconds if self._paused else self._seconds + self._clock() - self._since
        tokens, slots = self._tokens.value(), self._slots.value()
        figures = {"packing_fill": tokens / slots} if slots else {}
        if seconds > 0:
            figures["tokens_per_second"] = tokens / seconds
        peak = _peak_memory_bytes(self.device)
        if peak is not None:
            figures["peak_memory_gib"] = peak / _GIB
        self.reset()
        return figures


def _peak_memory_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, the others KiB.
    return peak if sys.platform == "darwin" else peak * 1024
