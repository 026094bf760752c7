"""Checks of the figures that are logged: plain numbers, one call a log entry, nothing read from a device."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping

from chronicals_trl.observe.health.contention import Contention
from chronicals_trl.observe.health.findings import Finding

__all__ = ["LogChecks"]

# Log entries whose median a new one is held against, and how many there have to be.
_WINDOW, _ENOUGH = 16, 8

_FLAT_LOGS, _FLAT_SHARE = 10, 0.01
_SPIKE_LOGS = 2  # one odd batch in a small run is no spike
_ZERO_LOGS = 2  # one may be an accident
_UNLABELLED_LOGS = 20  # where documents are not looked at, half of them may have no label
# fp16's loss scale begins at 65,536 and is halved by an overflow: ten in a row leave it at 64.
_OVERFLOW_LOGS = 10

# Throughput is judged over stretches of this length; two cores of a busy machine halve it for a second.
_STRETCH_SECONDS, _SLOW_STRETCHES, _SLOW_SHARE = 5.0, 3, 0.5
# Of a stretch; threads that wait at once count each. More than that, and others on the cores are the cause.
_CONTENDED_SHARE = 0.2


class LogChecks:
    """Holds a run's log entries against each other.

    Args:
        flat_at: the loss of guessing, ln(V), in nats; None where the loss is not a cross-entropy over V tokens.
        overflows: gradients may overflow now and then, as they do while fp16's loss scale is found.
        clock: seconds, monotonic.
        contention: for how long others held the cores.
    """

    def __init__(
        self,
        *,
        flat_at: float | None,
        overflows: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        contention: Contention | None = None,
    ) -> None:
        self._flat_at, self._overflow_logs = flat_at, _OVERFLOW_LOGS if overflows else 1
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._spike: list[float] = []
        self._flat = self._zeros = self._labelled_zeros = self._overflows = 0
        self._speed = _Speed(clock, contention or Contention())

    def look(
        self, logs: Mapping[str, float], *, full_rate: bool = True, disturbed: bool = False, labelled: bool = True
    ) -> list[Finding]:
        """What is wrong, as of this entry.

        Args:
            logs: "loss" and, where they are known, "grad_norm", "learning_rate" and "tokens_per_second".
            full_rate: the learning rate is at least half of its peak; a warm-up may well leave the loss where it is.
            disturbed: an evaluation or a save fell into the interval.
            labelled: the step that the gradient norm is of had labels.
        """
        loss, norm = logs["loss"], logs.get("grad_norm")
        rate = logs.get("learning_rate", math.nan)
        found = [self._finite(loss, norm), self._zero(norm, labelled), self._speed.look(logs, disturbed)]
        if math.isfinite(loss) and labelled:
            found += [self._flat_loss(loss, full_rate), self._spiked(loss, rate)]
        return [finding for finding in found if finding is not None]

    def _finite(self, loss: float, norm: float | None) -> Finding | None:
        wrong = [f"{name} {value}" for name, value in (("gradient norm", norm), ("loss", loss))
                 if value is not None and not math.isfinite(value)]  # fmt: skip
        self._overflows = self._overflows + 1 if wrong else 0
        if self._overflows < self._overflow_logs:
            return None
        return Finding(
            "not_finite",
            f"the run has {' and '.join(wrong)}: such a step makes the weights NaN, unless it is skipped",
            "a learning rate that is too high, overflow in float16, or weights that a step before made infinite",
            "go on from a checkpoint before this step with a lower learning_rate or a longer warm-up, max_grad_norm "
            "above 0, and bf16 in place of fp16",
        )

    def _zero(self, norm: float | None, labelled: bool) -> Finding | None:
        self._zeros = self._zeros + 1 if norm == 0 else 0
        self._labelled_zeros = self._labelled_zeros + labelled if norm == 0 else 0
        if self._labelled_zeros < _ZERO_LOGS and self._zeros < _UNLABELLED_LOGS:
            return None
        return Finding(
            "zero_gradient_norm",
            f"the gradient norm was exactly 0 in {self._zeros} log entries in a row: nothing is learned",
            "batches whose labels are all -100, parameters frozen or replaced after the start, or a loss that does "
            "not depend on them",
            "look at a batch's labels, and at requires_grad of the model's parameters",
        )

    def _flat_loss(self, loss: float, full_rate: bool) -> Finding | None:
        flat = self._flat_at is not None and abs(loss - self._flat_at) <= _FLAT_SHARE * self._flat_at
        self._flat = (self._flat + full_rate) if flat else 0
        if self._flat_at is None or self._flat < _FLAT_LOGS:
            return None
        return Finding(
            "flat_loss",
            f"the loss has stayed at {loss:.3f} over {self._flat} log entries, which is ln(V) = {self._flat_at:.3f}: "
            "the model takes every token of the vocabulary for equally likely, and does not get better",
            "weights that were not loaded (from_config in place of from_pretrained, names that did not match the "
            "checkpoint's), a head that is frozen or cut off from the layers, or a learning rate that is far too low",
            "look for 'newly initialized' in what loading the model says, try the model on one text, and raise "
            "learning_rate if the model is meant to start at random",
        )

    def _spiked(self, loss: float, rate: float) -> Finding | None:
        if len(self._losses) < _ENOUGH:
            self._losses.append(loss)
            return None
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(value - median) for value in self._losses)
        # Ten deviations: batches of few documents differ a lot; one nat: a run that knows its texts by heart has
        # losses next to nothing, and next to no deviation.
        if loss <= median + max(10 * deviation, 0.5 * median, 1.0):
            self._losses.extend([*self._spike, loss])
            self._spike.clear()
            return None
        self._spike.append(loss)
        if len(self._spike) < _SPIKE_LOGS:
            return None
        return Finding(
            "loss_spike",
            f"the loss has jumped to {loss:.3f}; the median of the log entries before is {median:.3f}",
            f"a learning rate that is too high (now {rate:.3g}), broken documents, or data of another kind from here "
            "on",
            "if it does not come down by itself, go on from a checkpoint before this step with a lower learning_rate "
            "or max_grad_norm, and look at the documents of these steps",
        )


class _Speed:
    """Real tokens a second, over stretches of some seconds, against the median of the run's own."""

    def __init__(self, clock: Callable[[], float], contention: Contention) -> None:
        self._clock, self._contention = clock, contention
        self._since: float | None = None  # the first entry's interval has compilation in it
        self._stretches: deque[float] = deque(maxlen=_WINDOW)
        self._tokens = self._seconds = 0.0
        self._slow: list[float] = []
        self._contended: list[float] = []  # in each of these, the share of the time that was waited for a core

    def look(self, logs: Mapping[str, float], disturbed: bool) -> Finding | None:
        now = self._clock()
        since, self._since = self._since, now
        speed = logs.get("tokens_per_second")
        if since is None or speed is None or disturbed:
            return None
        self._tokens += speed * (now - since)
        self._seconds += now - since
        if self._seconds < _STRETCH_SECONDS:
            return None
        speed, contended = self._tokens / self._seconds, self._contention.look() / self._seconds
        self._tokens = self._seconds = 0.0
        return self._compare(speed, contended)

    def _compare(self, speed: float, contended: float) -> Finding | None:
        usual = statistics.median(self._stretches) if len(self._stretches) >= _ENOUGH else None
        if usual is None or speed >= _SLOW_SHARE * usual:
            self._stretches.extend([*self._slow, speed])
            self._slow.clear()
            self._contended.clear()
            return None
        self._slow.append(speed)
        self._contended.append(contended)
        if len(self._slow) < _SLOW_STRETCHES:
            return None
        contended = min(self._contended)
        seen = f"throughput has fallen to {speed:,.0f} tokens a second, from a median of {usual:,.0f}"
        if contended > _CONTENDED_SHARE:
            return Finding(
                "slow",
                seen,
                f"other processes on the CPU cores: this one waited for a core {contended:.0%} of the time, all its "
                "threads together",
                "give the run cores of its own, or wait until the others are done; data loader workers count too",
            )
        return Finding(
            "slow",
            seen,
            "another process on the GPU or on the CPU cores, a GPU that is too hot or at its power limit, memory that "
            "is nearly full (the allocator frees and asks again), or a data loader that does not keep up",
            "look at nvidia-smi (processes, clocks, memory) and at host_bound in the logs; raise "
            "dataloader_num_workers if the GPU waits",
        )
