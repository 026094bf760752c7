"""Times of one layer's pass, without the host and with it.

**gpu_ms.** The GPU is told to sleep, and only then forward and backward are launched, between two events: when it
wakes everything is queued, so the events are apart by what the GPU works. That holds only if the host was ahead: the
first event must not have been reached when the host is done. If it was, the sleep is lengthened and the sample taken
again; then one pass is taken in place of two, since the queue of launches has an end (about 1,024). A pass that cannot
be queued even so (it waits for the GPU somewhere) has `queued` False, and its time has the host in it.

The GPU rests while it sleeps, so its clocks are those of a short burst. That is the same for all sides.

**step_ms.** A few passes launched one after the other, from an idle GPU to an idle GPU, over their number: what one
layer costs a user who does not capture graphs. **host_ms** is what launching the first of them takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

__all__ = ["CudaQueue", "Queue", "Samples", "take_queued", "take_stepped", "warm_up"]

PASSES = 2
STEP_PASSES = 5
#: The first sleep, if the host is fast; it is three times what the host is known to need otherwise.
SHORTEST_SLEEP_MS, LONGEST_SLEEP_MS = 5.0, 1000.0
LENGTHEN = 4
WARM_UP_SECONDS = 0.3
WARM_UP_PASSES = 3
_CYCLES = 20_000_000


class Queue(Protocol):
    """A GPU's queue of work."""

    def sleep(self, ms: float) -> None:
        """Queue a pause."""

    def mark(self) -> Any:
        """Queue an event."""

    def reached(self, mark: Any) -> bool:
        """Whether the GPU has come to the event by now."""

    def ms_between(self, first: Any, last: Any) -> float:
        """Waits for both events."""

    def wait(self) -> None:
        """Until nothing is queued."""


class CudaQueue:
    """The current stream of the current device."""

    def __init__(self) -> None:
        self._cycles_per_ms = 0.0
        for _ in range(2):  # the first is the warm-up
            first = self.mark()
            torch.cuda._sleep(_CYCLES)
            self._cycles_per_ms = _CYCLES / self.ms_between(first, self.mark())

    def sleep(self, ms: float) -> None:
        torch.cuda._sleep(int(ms * self._cycles_per_ms))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reached(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def ms_between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return float(first.elapsed_time(last))

    def wait(self) -> None:
        torch.cuda.synchronize()


@dataclass
class Samples:
    """Of one side; milliseconds of one pass.

    Args:
        gpu: With everything queued beforehand (or not, if `queued` is False); empty without a GPU.
        step, host: From idle to idle, and to launch the first pass.
        queued: Whether the host was ahead in every sample of `gpu`.
        passes: Between two events of `gpu`.
        sleep_ms: The sleep that was long enough, by the GPU's events.
        issue_ms: The longest that the host took to launch a sample of `gpu`.
    """

    gpu: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    queued: bool | None = None
    passes: int = PASSES
    sleep_ms: float | None = None
    issue_ms: float | None = None


def take_queued(call: Callable[[], Any], queue: Queue, samples: Samples, count: int) -> None:
    """Add `count` samples to `samples.gpu`; `samples.host` has to be there."""
    sleep = _first_sleep(samples)
    taken: list[float] = []
    while len(taken) < count:
        queue.wait()
        before = queue.mark()
        queue.sleep(sleep)
        begin = queue.mark()
        start = time.perf_counter()
        for _ in range(samples.passes):
            call()
        end = queue.mark()
        issue_ms = (time.perf_counter() - start) * 1e3
        ahead = not queue.reached(begin)
        ms = queue.ms_between(begin, end) / samples.passes
        if not ahead and samples.queued is not False:
            taken.clear()
            samples.issue_ms = None
            if sleep < LONGEST_SLEEP_MS:
                sleep = min(LENGTHEN * sleep, LONGEST_SLEEP_MS)
            elif samples.passes > 1:
                samples.gpu.clear()  # of another number of passes
                samples.passes, samples.sleep_ms = 1, None
                sleep = _first_sleep(samples)
            else:
                samples.gpu.clear()
                samples.queued, sleep = False, SHORTEST_SLEEP_MS
            continue
        taken.append(ms)
        samples.sleep_ms = queue.ms_between(before, begin)
        samples.issue_ms = max(samples.issue_ms or 0.0, issue_ms)
    samples.gpu += taken
    if samples.queued is None:
        samples.queued = True


def _first_sleep(samples: Samples) -> float:
    known = 3 * samples.passes * statistics.median(samples.host)
    return max(SHORTEST_SLEEP_MS, known, samples.sleep_ms or 0.0)


def take_stepped(call: Callable[[], Any], queue: Queue | None, samples: Samples, count: int) -> None:
    """Add `count` samples to `samples.step` and `samples.host`; without a queue both are the host's time."""
    for _ in range(count):
        if queue is not None:
            queue.wait()
            begin = queue.mark()
        start = time.perf_counter()
        call()
        samples.host.append((time.perf_counter() - start) * 1e3)
        if queue is None:
            samples.step.append(samples.host[-1])
            continue
        for _ in range(STEP_PASSES - 1):
            call()
        samples.step.append(queue.ms_between(begin, queue.mark()) / STEP_PASSES)


def warm_up(call: Callable[[], Any], queue: Queue | None) -> None:
    """Passes without a pause: kernels compiled, memory in the allocator's cache, clocks as under load."""
    for _ in range(WARM_UP_PASSES if queue is not None else 1):
        call()
    if queue is None:
        return
    queue.wait()
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS:
        call()
        call()
        queue.wait()  # else the host runs ahead by many seconds of work
