"""Times a training from within, alike for every side: windows of steps with the GPU idle at both ends.

One code for a Trainer (`callback`) and for a loop of one's own (`begin`, `end`).
"""

from __future__ import annotations

import subprocess
import time
from typing import Any

import torch

from chronicals_trl.bench.sft.cases import Task
from chronicals_trl.bench.sft.count import Counted

__all__ = ["Meter", "gpu_state"]

_QUERY = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def gpu_state() -> dict[str, float] | None:
    """Clocks in MHz, power in W and temperature, as nvidia-smi tells them; None where it does not."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return dict(zip(_QUERY, map(float, told.splitlines()[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


class Meter:
    """Seconds of each window, milliseconds of each step in them, and the peak of memory over all windows.

    Args:
        task: Gives the windows.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._cuda = torch.cuda.is_available()
        self._began = 0.0
        self._seconds: list[float] = []
        self._marks: list[Any] = []
        self._started = time.perf_counter()
        self._ready = self._first = 0.0
        self._gpu: dict[str, float] | None = None
        self._peak: tuple[int, int] | None = None
        self.counted: Counted | None = None

    def restart(self) -> None:
        """Forget the steps so far: a trainer that warms up by itself begins anew."""
        self._seconds.clear()
        self._marks.clear()

    def begin(self, done: int) -> None:
        """Before the step after `done` steps."""
        if done == 0:
            self._ready = time.perf_counter()
        if self._cuda and done == self._task.warm_up - 1:
            # A step early: what is given back has to be taken from the driver anew, by whoever has no graphs that hold
            # on to it, and that is no part of a window.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what loading has left
            torch.cuda.reset_peak_memory_stats()
        if done != self._task.warm_up:
            return
        self._synchronize()
        self._mark()
        self._began = time.perf_counter()

    def end(self, done: int) -> None:
        """After `done` steps in all."""
        if done == 1:
            self._synchronize()
            self._first = time.perf_counter()
        if done <= self._task.warm_up:
            return
        self._mark()
        if (done - self._task.warm_up) % self._task.steps == 0:
            self._synchronize()
            now = time.perf_counter()
            self._seconds.append(now - self._began)
            if self._cuda:
                self._peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            if done == self._task.total_steps:
                self._gpu = gpu_state() if self._cuda else None
            self._began = time.perf_counter()

    def callback(self) -> Any:
        """As a TrainerCallback. A class of the transformers that this process has."""
        from transformers import TrainerCallback

        meter = self

        class Watch(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                meter.begin(state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                meter.end(state.global_step)

        return Watch()

    def count_batches_of(self, trainer: Any) -> None:
        """Keep what the trainer's training batches are made of, whatever makes them."""
        make = trainer.get_train_dataloader

        def get_train_dataloader() -> Any:
            loader = make()
            if loader.num_workers > 0:
                raise RuntimeError(f"batches cannot be counted: {loader.num_workers} workers make them")
            # Accelerate's loader reads from another one that it holds.
            source = getattr(loader, "base_dataloader", loader)
            source.collate_fn = self.counted = Counted(source.collate_fn)
            return loader

        trainer.get_train_dataloader = get_train_dataloader

    def result(self) -> dict[str, Any]:
        """What was measured, windows with their tokens.

        Raises:
            RuntimeError: The training ended before the last window did.
        """
        task = self._task
        if len(self._seconds) < task.windows:
            raise RuntimeError(f"only {len(self._seconds)} of {task.windows} windows were trained")
        step_ms = self._step_ms()
        expected = task.steps * task.micro_batches  # batches of a window
        windows = []
        for index, seconds in enumerate(self._seconds):
            first = index * task.steps
            window: dict[str, Any] = {"seconds": seconds, "steps": task.steps}
            window["step_ms"] = step_ms[first : first + task.steps]
            begin = (task.warm_up + first) * task.micro_batches
            batches = [] if self.counted is None else list(self.counted.batches(begin, begin + expected))
            if len(batches) != expected:
                raise RuntimeError(f"{len(batches)} batches were counted in {task.steps} steps, not {expected}")
            lengths = [length for documents, _ in batches for length in documents]
            window["tokens"] = sum(lengths)
            window["documents"] = len(lengths)
            window["squares"] = sum(length * length for length in lengths)
            window["positions"] = sum(positions for _, positions in batches)
            windows.append(window)
        return {
            "windows": windows,
            # What the process takes of the GPU: tensors inside of CUDA graphs are in no other figure.
            "peak_memory_gib": None if self._peak is None else self._peak[1] / 2**30,
            "peak_allocated_gib": None if self._peak is None else self._peak[0] / 2**30,
            "seconds_before_first_step": self._ready - self._started,
            "seconds_of_first_step": self._first - self._ready,
            "gpu_state": self._gpu,
        }

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _mark(self) -> None:
        """A point in time, of the GPU's where there is one: reading it later costs the step nothing."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _step_ms(self) -> list[float]:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [a.elapsed_time(b) if self._cuda else (b - a) * 1e3 for a, b in pairs]
