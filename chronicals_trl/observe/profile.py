"""Where the GPU's time goes: a table of a few training steps, by category and kernel.

torch's profiler watches the steps; its events are sorted by the kernel's name and by the ops that launched it, which
for those of a replayed CUDA graph is the replay. Without a GPU the ops' own times on the CPU stand in.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

__all__ = ["CATEGORIES", "StepProfile", "render", "sort_kernels"]

logger = logging.getLogger(__name__)

CATEGORIES = ("gemm", "attention", "cross-entropy pass", "elementwise", "optimizer and clipping", "copies to the GPU")
FILE = "chronicals_profile"

# Steps before the first one that is watched: by then kernels are compiled and graphs captured.
WARM_UP = 10

_GEMM = re.compile(r"gemm|nvjet|cutlass|splitK|cublas", re.IGNORECASE)
_ATTENTION = re.compile(r"flash|fmha|attention", re.IGNORECASE)
_HEAD = re.compile(r"linear_?cross_?entropy|softmax_pass", re.IGNORECASE)


def _category(kernel: str, ops: list[str]) -> str:
    if "Memcpy HtoD" in kernel:
        return "copies to the GPU"
    # Nothing else in a step works on lists of tensors.
    if any("Optimizer.step" in op or "_foreach_" in op for op in ops):
        return "optimizer and clipping"
    head = any(_HEAD.search(op) for op in [kernel, *ops])
    if head and "gemv" in kernel:  # the entropy's sum of products
        return "cross-entropy pass"
    if any(map(_ATTENTION.search, [kernel, *ops])):  # before the GEMMs: its name may say that it is built with CUTLASS
        return "attention"
    # Memset: split-K products clear their workspace.
    if _GEMM.search(kernel) or (kernel.startswith("Memset") and any("mm" in op for op in ops[:1])):
        return "gemm"
    return "cross-entropy pass" if head else "elementwise"


def sort_kernels(profile: Any, steps: int, cuda: bool) -> list[dict[str, Any]]:
    """Kernels by category, name and launching op, in milliseconds and calls a step; the longest first.

    Args:
        profile: a `torch.profiler.profile` that is over.
        steps: how many it has watched.
        cuda: whether to count the GPU's kernels, and not the CPU's ops.
    """
    time_us: dict[tuple[str, str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str, str], int] = defaultdict(int)
    for event in profile.events():
        ops, parent = [], event
        while parent is not None:
            ops.append(parent.name)
            parent = parent.cpu_parent
        spent = [(k.name, k.duration) for k in event.kernels] if cuda else [(event.name, event.self_cpu_time_total)]
        for name, duration in spent:
            interesting = [op for op in ops if not op.startswith(("cuda", "cuLaunch"))]
            key = (_category(name, ops), name[:120], interesting[0][:80] if interesting else "")
            time_us[key] += duration
            calls[key] += 1
    rows = [
        {"category": c, "kernel": k, "op": o, "ms": us / 1e3 / steps, "calls": calls[c, k, o] / steps}
        for (c, k, o), us in time_us.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def totals(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds a step of each category."""
    return {c: sum(row["ms"] for row in kernels if row["category"] == c) for c in CATEGORIES}


def render(kernels: list[dict[str, Any]], step_ms: float, shortest_ms: float = 0.02) -> str:
    """The table: categories with their shares, then each one's kernels."""
    found = totals(kernels)
    busy = sum(found.values())
    lines = [f"{'a step under the profiler':<28}{step_ms:10.2f} ms", f"{'of which busy':<28}{busy:10.2f} ms"]
    lines += [f"  {c:<26}{ms:10.2f} ms{ms / max(busy, 1e-9):8.1%}" for c, ms in found.items()]
    for c in CATEGORIES:
        chosen = [row for row in kernels if row["category"] == c and row["ms"] >= shortest_ms]
        lines += ["", c] if chosen else []
        lines += [f"  {r['ms']:8.3f} ms {r['calls']:6.1f} x  {r['kernel'][:70]:<70}  {r['op'][:60]}" for r in chosen]
    return "\n".join(lines)


class StepProfile(TrainerCallback):
    """Watches `steps` training steps and writes `chronicals_profile.txt` and `.json` to the output directory.

    Args:
        steps: at least 1. Steps 11 to 10 + `steps` are watched, or the last ones of a shorter run.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._profile: Any = None
        self._first = self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profile is not None:  # an earlier training ended in an error
            profile, self._profile = self._profile, None
            profile.__exit__(None, None, None)
        room = max(0, state.max_steps - state.global_step - self.steps)
        self._first = state.global_step + min(WARM_UP, room)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self._first or self._profile is not None or not state.is_world_process_zero:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.__enter__()
        self._began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profile is not None and state.global_step - self._first == self.steps:
            self._end(args, self.steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profile is not None:  # training was stopped before
            self._end(args, max(1, int(state.global_step - self._first)))

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _end(self, args: Any, steps: int) -> None:
        profile, self._profile = self._profile, None
        step_ms = (self._now() - self._began) / steps * 1e3
        profile.__exit__(None, None, None)
        kernels = sort_kernels(profile, steps, torch.cuda.is_available())
        told = {"steps": steps, "step_ms": step_ms, "categories_ms": totals(kernels), "kernels": kernels}
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{FILE}.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
        (folder / f"{FILE}.txt").write_text(render(kernels, step_ms) + "\n", "utf-8")
        logger.info("chronicals-trl: profile of %d steps written to %s", steps, folder / f"{FILE}.txt")
