"""A step's log entry, written while the GPU is busy with the next one.

A log entry has the step's loss in it, so whoever writes it waits until the GPU has done all that is queued; and then
the GPU waits for the writing, for the next batch and for the first launches. Here what the entry is made of is set
aside on the device when the step ends, and read once the next step's passes are queued, on a stream that waits for the
step's own work alone. The entry is the same: the trainer's state and weights are still those of its step then, since
the optimizer's next update comes after it.

Who acts on an entry would act one update late. So entries are written at once where that could be anybody (a callback
of the user's, a method of a subclass), and where an evaluation, a save or the run's end follows the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import ParallelMode

from chronicals_trl._callbacks import acts_on, is_a_librarys
from chronicals_trl.observe.trainer import Interval, ThroughputMixin
from chronicals_trl.report import ActivationReport

# Device types that work on while the host reads.
DEVICES = ("cuda",)

# Between the end of a step and the end of the next one's first pass: who has these may look for the entry.
_EVENTS = ("on_log", "on_step_begin", "on_epoch_end")
_METHODS = (
    "log", "store_flos", "_maybe_log_save_evaluate", "get_batch_samples", "training_step", "_prepare_inputs",
    "compute_loss",
)  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """What a log entry will be made of. Tensors are on the device, and nobody else's.

    Attributes:
        loss: 0-d, summed over `steps` steps, the ranks' mean.
        flos: one a rank, float32; None where there are no ranks.
        ready: passed by the device when all of it is there; None where it is already.
    """

    loss: Tensor
    grad_norm: Tensor | float | None
    learning_rate: float
    steps: int
    flos: Tensor | None
    start_time: float
    interval: Interval
    ready: torch.cuda.Event | None


class LateLogsMixin(ThroughputMixin):
    """The methods of `SFTTrainer` at which log entries are set aside and written; the parent's with the flag off."""

    # Of the trainer that mixes this in.
    chronicals_report: ActivationReport
    _tell_once: Callable[..., None]
    _overridden: Callable[[tuple[str, ...]], str | None]
    current_flos: float
    _globalstep_last_logged: int

    _entry: _Entry | None = None
    _reading_stream: torch.cuda.Stream | None = None

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: Any,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        self._write_entry()  # of an epoch's last step: no pass has come after it
        if self._can_be_late(grad_norm):
            self._set_entry_aside(tr_loss, grad_norm, start_time, learning_rate)
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self._write_entry()
        return loss

    # -- who comes in between finds the entry written -----------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._write_entry()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._write_entry()
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._write_entry()
        super()._save_checkpoint(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except BaseException:
            with contextlib.suppress(Exception):  # after an error of the GPU's there is nothing to read
                self._write_entry()
            raise

    # -- when, and how ------------------------------------------------------------------------------------------------

    def _can_be_late(self, grad_norm: Any) -> bool:
        control, device = self.control, self.args.device
        if self._chronicals is None or device.type not in DEVICES or not control.should_log:
            return False
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return False
        if control.should_evaluate or control.should_save or control.should_training_stop or control.should_epoch_stop:
            return False
        if self.state.global_step <= self._globalstep_last_logged:
            return False
        model: Any = self.model
        if not model.training:  # a callback has evaluated: to TRL the entry is one of evaluation
            return False
        if not (grad_norm is None or isinstance(grad_norm, float) or type(grad_norm) is Tensor):
            return False
        reason = self._who_may_act()
        if reason is not None:
            self._tell_once(f"each log entry is waited for: {reason}")
        return reason is None

    def _who_may_act(self) -> str | None:
        overrides = self._overridden(_METHODS)
        if overrides is not None:
            return f"{overrides} and may act on it"
        replaced = next((name for name in _METHODS if name in vars(self)), None)
        if replaced is not None:
            return f"this trainer's {replaced} has been replaced and may act on it"
        others = (each for each in self.callback_handler.callbacks if not is_a_librarys(each))
        acting = (each for each in others if any(acts_on(each, event) for event in _EVENTS))
        return next((f"{type(callback).__name__} may act on it" for callback in acting), None)

    def _set_entry_aside(
        self, tr_loss: Tensor, grad_norm: Tensor | float | None, start_time: float, learning_rate: float | None
    ) -> None:
        """What Trainer does for a log entry, but for reading it."""
        loss = nested_gather(tr_loss, self.args.parallel_mode).mean()
        tr_loss -= tr_loss
        # Another's, who may write the next step's into it.
        norm = grad_norm.detach().clone() if isinstance(grad_norm, Tensor) else grad_norm
        flos = None
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED:  # of one rank too, whose store_flos waits as well
            # Filled by a kernel: a copy to the device would wait for all that is queued.
            own = torch.full((1,), self.current_flos, dtype=torch.float32, device=self.args.device)
            flos = nested_gather(own, self.args.parallel_mode)
            self.current_flos = 0
        else:
            self.store_flos()
        interval = self._begin_interval()
        rate = self._get_learning_rate() if learning_rate is None else learning_rate
        steps = self.state.global_step - self._globalstep_last_logged
        ready = self._mark_of_what_is_queued()  # after all of the above: what is read waits for nothing else
        self._entry = _Entry(loss, norm, rate, steps, flos, start_time, interval, ready)
        self._globalstep_last_logged = self.state.global_step  # so Trainer takes it for logged
        self.control.should_log = False  # likewise

    def _write_entry(self) -> None:
        entry, self._entry = self._entry, None
        if entry is None:
            return
        asked = self.control.should_log  # since, for the step that is under way
        with self._reading(entry.ready), self._of_interval(entry.interval):
            loss = entry.loss.item()
            self._total_loss_scalar += loss
            if entry.flos is not None:
                self.state.total_flos += entry.flos.sum().item()
            logs = {"loss": loss / entry.steps}
            if entry.grad_norm is not None:
                logs["grad_norm"] = float(entry.grad_norm)
            logs["learning_rate"] = entry.learning_rate
            self.log(logs, entry.start_time)
        self.control.should_log = asked

    def _mark_of_what_is_queued(self) -> torch.cuda.Event | None:
        if self.args.device.type != "cuda":
            return None
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.args.device))
        return mark

    @contextlib.contextmanager
    def _reading(self, ready: torch.cuda.Event | None) -> Iterator[None]:
        """What is read inside waits for `ready`, and for nothing that was queued after it."""
        if ready is None:
            yield
            return
        if self._reading_stream is None:
            self._reading_stream = torch.cuda.Stream(self.args.device)
        self._reading_stream.wait_event(ready)
        with torch.cuda.stream(self._reading_stream):
            yield
