"""Check one side's gradients, then time it: by turns with the other sides of its process."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chronicals_trl.bench.common import explain, finite
from chronicals_trl.bench.lora import check as lora_check
from chronicals_trl.bench.lora.cases import Setting
from chronicals_trl.bench.lora.layer import Inputs, Pass, Runner, memory
from chronicals_trl.bench.lora.timing import CudaQueue, Queue, Samples, take_queued, take_stepped, warm_up
from chronicals_trl.bench.timing import quantile

__all__ = ["Measured", "check", "errors_of", "queue_of", "release", "time_by_turns"]


def queue_of(device: torch.device) -> Queue | None:
    return CudaQueue() if device.type == "cuda" else None


def errors_of(runner: Runner, inputs: Inputs, exact: Mapping[str, Tensor]) -> lora_check.Deviations:
    """Deviations of a side's gradients from fp64's; the dropout's masks are of one seed."""
    torch.manual_seed(0)
    return lora_check.deviations(runner.gradients(inputs), exact)


def check(
    runner: Runner, inputs: Inputs, exact: Mapping[str, Tensor], of_peft: lora_check.Deviations, setting: Setting
) -> dict[str, Any]:
    """Status, reason and errors."""
    errors = errors_of(runner, inputs, exact)
    wrong = lora_check.too_far(errors, of_peft, setting.dropout)
    return {
        "status": "ok" if wrong is None else "wrong answer",
        "reason": wrong,
        "errors": {kind: finite(value) for kind, value in errors.items()},
    }


class Measured:
    """A side on its way through the rounds.

    Args:
        step: What is timed.
    """

    def __init__(self, step: Pass) -> None:
        self.step = step
        self.samples = Samples()
        self.memory: tuple[float | None, float | None] = None, None
        self.failure: tuple[str, str] | None = None

    def take(self, queue: Queue | None, count: int, *, first: bool) -> None:
        """One round's samples. A failure is kept, and later rounds are left out."""
        if self.failure is not None:
            return
        try:
            warm_up(self.step, queue)
            if first:
                self.memory = memory(self.step)
            take_stepped(self.step, queue, self.samples, count)
            if queue is not None:
                take_queued(self.step, queue, self.samples, count)
        except Exception as error:
            self.failure = explain(error)
        finally:
            with contextlib.suppress(RuntimeError):  # a broken context says so itself, at the next side
                self.step.clear()

    def figures(self) -> dict[str, Any]:
        """What the row is filled with."""
        if self.failure is not None:
            return {"status": self.failure[0], "reason": self.failure[1]}
        samples = self.samples
        return {
            **_spread("gpu_ms", samples.gpu),
            **_spread("step_ms", samples.step),
            "host_ms": statistics.median(samples.host),
            "gpu_samples": samples.gpu,
            "step_samples": samples.step,
            "host_samples": samples.host,
            "queued": samples.queued,
            "queued_passes": samples.passes if samples.gpu else None,
            "sleep_ms": samples.sleep_ms,
            "issue_ms": samples.issue_ms,
            "peak_mib": self.memory[0],
            "saved_mib": self.memory[1],
        }


def time_by_turns(sides: Sequence[Measured], queue: Queue | None, rounds: int, count: int) -> None:
    """`count` samples of each side in each round, so that what drifts is in all; each round begins with another."""
    for number in range(rounds):
        for index in range(len(sides)):
            sides[(index + number) % len(sides)].take(queue, count, first=number == 0)


def release() -> None:
    """What a case leaves in the allocator's cache is no other case's matter."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _spread(name: str, samples: Sequence[float]) -> dict[str, float | None]:
    middle = statistics.median(samples) if samples else None
    low, high = (quantile(samples, q) if samples else None for q in (0.2, 0.8))
    return {name: middle, f"{name}_p20": low, f"{name}_p80": high}
