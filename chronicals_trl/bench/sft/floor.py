"""The floor of our side of `bench sft`: what a step takes if every part of it is at its wall, measured in this run.

    products    its matrix products, replayed as one CUDA graph in the shapes, dtypes, layouts and order of the step
    attention   by the back end of this run on a real batch's documents: what the same graph takes longer with it
    elementwise, optimizer    the bytes that they have to move (floor_bytes.py) over the copy bandwidth

Their sum is `sum_ms`. `replayed_ms` is a third graph, of the whole step: what only moves bytes is there a copy of as
many, between the products where the step has it. It finds the GPU's clock as the step does, which copies let rest and
products alone do not, and its small copies do not reach the bandwidth of a large one. `floor_ms` is the lower of the
two, as what has been replayed is no floor if the sum is above it, and the other way round.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from chronicals_trl.bench import timing
from chronicals_trl.bench.sft.cases import SHAPES, Task
from chronicals_trl.bench.sft.floor_attention import attend_by, chosen_backend
from chronicals_trl.bench.sft.floor_batch import Batch, make_batch
from chronicals_trl.bench.sft.floor_ops import ATTENTION, ELEMENTWISE, GEMM, KINDS, OPTIMIZER, Mover, Op, run
from chronicals_trl.bench.sft.floor_step import Step, make_step, set_bytes

__all__ = ["measure", "recomputes", "tables"]

#: Milliseconds of replays before the first sample, which a GPU's clock takes to settle under load, and of all samples.
WARM_UP_MS, SAMPLED_MS = 1500.0, 2500.0
FEWEST_SAMPLES = 5
COPY_SAMPLES = 15


def recomputes(task: Task) -> bool:
    """Whether all layers of our side are computed again. By "default" no more than memory needs: at the least none."""
    off = task.chronicals.get("recompute", "auto") in ("off", False)
    return task.checkpointing == "on" or (task.checkpointing == "default" and off)


def measure(task: Task) -> dict[str, Any]:
    """The floor of a step of `task`, a task of our side."""
    begun = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, batch = SHAPES[task.shape], make_batch(task)
    backend = chosen_backend(shape, task.chronicals, device)
    step = Step(
        shape, task.mode, task.master, batch.tokens, batch.squares, recomputes(task),
        attend_by(backend, shape, batch, device), device,
    )  # fmt: skip
    step = replace(step, sets=timing.set_count(set_bytes(step), device))
    torch.manual_seed(task.seed)
    ops = make_step(step)
    mover = Mover(device)
    bandwidth, _ = timing.copy_bandwidth(device, COPY_SAMPLES)
    only = [op for op in ops if op.kind == GEMM]
    with torch.no_grad():
        products, both, whole = (
            _median_ms(call, device) for call in (partial(run, only), partial(run, ops), partial(run, ops, mover))
        )
    found = tables(ops)
    moved = {kind: found["bytes"][kind] / bandwidth / 1e6 for kind in (ELEMENTWISE, OPTIMIZER)}
    total = both + sum(moved.values())
    return {
        "floor_ms": min(total, whole),
        "sum_ms": total,
        "replayed_ms": whole,
        "parts_ms": {GEMM: products, ATTENTION: max(0.0, both - products), **moved},
        "bandwidth_gbps": bandwidth,
        "gemm_tflops": found["flops"][GEMM] / products / 1e9,
        **found,
        **_of_batch(batch),
        "rows": task.rows,
        "packs": task.packs,
        "attention": backend,
        "sets": step.sets,
        "method": timing.GRAPH if device.type == "cuda" else timing.DRY_RUN,
        "seconds": time.perf_counter() - begun,
    }


def tables(ops: Sequence[Op]) -> dict[str, Any]:
    """Operations and bytes by kind, and by the name of the op, with how many there are."""
    by_name: dict[str, dict[str, Any]] = {}
    for op in ops:
        entry = by_name.setdefault(op.name, {"kind": op.kind, "count": 0, "flops": 0.0, "bytes": 0.0})
        entry["count"] += 1
        entry["flops"] += op.flops
        entry["bytes"] += op.bytes
    return {
        "flops": {kind: sum(op.flops for op in ops if op.kind == kind) for kind in KINDS},
        "bytes": {kind: sum(op.bytes for op in ops if op.kind == kind) for kind in (ELEMENTWISE, OPTIMIZER)},
        "ops": by_name,
    }


def _of_batch(batch: Batch) -> dict[str, Any]:
    bounds = torch.tensor(batch.cu_seqlens)
    return {
        "tokens": batch.tokens,
        "real_tokens": batch.real_tokens,
        "segments": int((bounds.diff() > 0).sum()),
        "empty_segments": int((bounds.diff() == 0).sum()),
        "max_seqlen": batch.max_seqlen,
    }


def _median_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Of replays one after the other, as a training is; on a CPU of calls."""
    if device.type != "cuda":
        return timing.quantile([timing.sample_ms(call, device) for _ in range(3)], 0.5)
    graph, kept = timing.capture([call], 1, device)
    once = timing.sample_ms(graph.replay, device)
    for _ in range(int(WARM_UP_MS / once) + 1):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(max(FEWEST_SAMPLES, int(SAMPLED_MS / once)) + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    marks[-1].synchronize()
    kept.clear()
    graph.reset()
    return timing.quantile([a.elapsed_time(b) for a, b in itertools.pairwise(marks)], 0.5)
