"""Real tokens a second, share of the GPU's rate, packing fill, peak memory and waiting for the host of a training run.

A token counts as real when it is not padding: tokens a second over padded positions reward waste. Counting must not
slow the step down, so a count that lives on the GPU stays there until the figures are read.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from chronicals_trl.observe.flops import TrainingFlops

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
        flops: operations that training needs; None leaves "mfu" out.
        flop_rate: operations a second of all GPUs whose tokens are counted; None likewise.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        flops: TrainingFlops | None = None,
        flop_rate: float | None = None,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.flops, self.flop_rate = flops, flop_rate
        self._clock = clock
        self._paused = 0  # depth: an evaluation may save, and both exclude their time
        self._next: ThroughputMeter | None = None  # whose interval begins where this one's ends
        self.reset()

    def reset(self) -> None:
        """Start a new interval now, with nothing counted."""
        self._tokens = _Total()
        self._slots = _Total()
        self._squares = _Total()
        self._step, self._steps, self._dry_steps = -1, 0, 0
        self._dry, self._waited = False, True
        self._counted = False
        self._seconds = 0.0
        self._since = self._clock()

    def update(
        self, num_real_tokens: int | torch.Tensor, num_slots: int | torch.Tensor, squares: int | torch.Tensor = 0
    ) -> None:
        """Count one step. Nothing is read from the device.

        Args:
            num_real_tokens: tokens that are not padding; an int, or an integer tensor with one element.
            num_slots: positions in the batch, padding included; likewise.
            squares: sum of the documents' squared lengths, which attention's work goes by; likewise.
        """
        self._tokens.add(num_real_tokens)
        self._slots.add(num_slots)
        self._squares.add(squares)
        self._counted = True

    def look(self, *, step: int) -> None:
        """Note whether the GPU has nothing left to do, without waiting for it: then it waits for the host.

        Call it before and after a pass is launched. Behind a launch of many kernels at once, as a CUDA graph is, there
        is always something to do; before it, the work of the step before is.

        Args:
            step: a number of the step; of its passes and looks, one that found nothing is enough.
        """
        if self.device.type != "cuda":
            return
        if step != self._step:
            self._step, self._dry = step, False
            self._steps += 1
            if self._waited:  # for the GPU, in a log: what it has left says nothing
                self._waited = False
                return
        if not self._dry and torch.cuda.current_stream(self.device).query():
            self._dry = True
            self._dry_steps += 1

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
        self._waited = True
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

    def split(self) -> ThroughputMeter:
        """A meter with what has been counted, to be read later; this one counts on from here.

        The interval ends when the returned meter is read, and this one's begins then: read it when the work that was
        queued up to here is done, and that which was queued since is not.
        """
        ended = copy.copy(self)
        ended._next = self
        self.reset()
        self._waited = False
        return ended

    def read(self) -> dict[str, float]:
        """The figures since the last reading, and a new interval.

        The one place that waits for the device, for what is queued on the current stream.

        Returns:
            "tokens_per_second": real tokens; absent if no time has passed.
            "mfu": model FLOPs utilisation, 0 to 1; absent without `flops` and `flop_rate`.
            "packing_fill": real tokens over positions.
            "host_bound": share of the steps in which a look found the GPU with nothing left to do; absent without a
            GPU.
            "peak_memory_gib": the most memory of the CUDA device that torch has taken for itself (what tensors
            occupied, which leaves out the inside of CUDA graphs, is less), else the most resident memory that the
            process has had (absent on Windows).
            Empty, and the interval goes on, when nothing has been counted.
        """
        if not self._counted:
            return {}
        if self.device.type == "cuda":
            # Work that is only queued would otherwise count as done.
            torch.cuda.current_stream(self.device).synchronize()
        now = self._clock()
        seconds = self._seconds if self._paused else self._seconds + now - self._since
        if self._next is not None:
            self._next._since, self._next = now, None
        tokens, slots = self._tokens.value(), self._slots.value()
        figures = {"packing_fill": tokens / slots} if slots else {}
        if seconds > 0:
            figures["tokens_per_second"] = tokens / seconds
            if self.flops is not None and self.flop_rate is not None:
                done = self.flops.per_token * tokens + self.flops.per_square * self._squares.value()
                figures["mfu"] = done / seconds / self.flop_rate
        if self._steps:
            figures["host_bound"] = self._dry_steps / self._steps
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
