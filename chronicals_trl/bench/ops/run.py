"""Check each side of each op against fp64, time it, and gather everything that the report shows."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config

from chronicals_trl.bench import timing
from chronicals_trl.bench.common import explain, finite, versions
from chronicals_trl.bench.ops import verdict
from chronicals_trl.bench.ops.cases import Op, Shape, load_side, make_buffers
from chronicals_trl.bench.timing import BufferSet, Timing

__all__ = ["DIRECTIONS", "Row", "Settings", "deviation", "run"]

DIRECTIONS = ("forward", "backward")
HOST_TOKENS = 16

# In units of the dtype's epsilon (for bf16 2^-7): the norm of the error over that of the reference, and the worst
# element's error over its size plus the mean size. transformers' eager code, which rounds up to five times and adds
# numbers that cancel (rope), stays well below; one wrong row of 16,384 does not.
NORM_BOUND, WORST_BOUND = 2, 16


@dataclass(frozen=True)
class Settings:
    """What to run, and how.

    Args:
        ops, shapes, sides: In the order in which they run.
        skipped: Side to the reason why it is not run; reported as such.
        dtype: Of all tensors.
        device: A CUDA device, or the CPU for a dry run.
        repeats: Samples of each time.
        host: Whether to measure the host's cost too.
    """

    ops: Sequence[Op]
    shapes: Sequence[Shape]
    sides: Sequence[str]
    skipped: dict[str, str]
    dtype: torch.dtype
    device: torch.device
    repeats: int
    host: bool


@dataclass(frozen=True)
class Row:
    """One side's figure for one op, shape and direction.

    Args:
        op, shape, tokens, direction, side: What was timed; direction is "forward" or "backward".
        status: "ok", "not installed", "not offered", "not run", "failed" or "wrong answer". Only "ok" has times.
        reason: Why not "ok".
        error, worst: Deviation from fp64, see `deviation`; None if it was not computed or is not finite.
        bytes: What the op has to move, see `ops`.
        gb_per_s: `bytes` over the median, in 1e9 bytes a second.
        copy_share: `gb_per_s` over the copy bandwidth measured in the same run.
        ours_is_faster_by: This side's median over ours: the speed-up of ours over it.
        timing: Median and spread.
    """

    op: str
    shape: str
    tokens: int
    direction: str
    side: str
    status: str
    reason: str | None = None
    error: float | None = None
    worst: float | None = None
    bytes: int = 0
    gb_per_s: float | None = None
    copy_share: float | None = None
    ours_is_faster_by: float | None = None
    timing: Timing | None = None


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all cases; returns what the JSON file holds. `say` is given a line for each case as it is done."""
    start = time.perf_counter()
    copy_gb, copy_timing = timing.copy_bandwidth(settings.device, settings.repeats)
    say(f"copy: {copy_gb:,.0f} GB/s")
    rows: list[Row] = []
    cases = [(op, shape) for op in settings.ops for shape in settings.shapes]
    # A donated buffer forbids retain_graph, with which the backward is timed; it saves memory, not traffic.
    with functorch_config.patch(donated_buffer=False):
        for number, (op, shape) in enumerate(cases, 1):
            case_start = time.perf_counter()
            found = _run_case(op, shape, settings, copy_gb)
            rows += found
            say(f"[{number}/{len(cases)}] {_summary(op, shape, found)} ({time.perf_counter() - case_start:.1f} s)")
    host: list[dict[str, Any]] = []
    if settings.host and settings.shapes:
        host_start = time.perf_counter()
        for op in settings.ops:
            host += _host_costs(op, replace(settings.shapes[0], tokens=HOST_TOKENS), settings)
        say(f"[host] {len(host)} costs ({time.perf_counter() - host_start:.1f} s)")
    dry_run = settings.device.type != "cuda"
    return {
        "benchmark": "ops",
        "dry_run": dry_run,
        "method": copy_timing.method,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "gpu": None if dry_run else torch.cuda.get_device_name(settings.device),
        "versions": versions("torch", "triton", "transformers", "liger-kernel", "quack-kernels"),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "check_bounds": {"error": _bound(settings.dtype, NORM_BOUND), "worst": _bound(settings.dtype, WORST_BOUND)},
        "copy_gb_per_s": copy_gb,
        "copy_timing": asdict(copy_timing),
        "shapes": [asdict(shape) for shape in settings.shapes],
        "rows": [asdict(row) for row in rows],
        "host": host,
        "verdict": [] if dry_run else [asdict(judged) for judged in verdict.judge(rows)],
    }


def deviation(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> tuple[float, float]:
    """How far outputs and gradients are from the reference, the largest over all of them.

    Returns:
        The norm of the error over the norm of the reference; and the largest error of one element, over the size of
        that element plus the mean size.
    """
    norms, worsts = [], []
    for mine, exact in zip(found, reference, strict=True):
        if mine.shape != exact.shape:
            return math.inf, math.inf
        error, size = (mine.double() - exact).abs_(), exact.abs()
        norms.append(float(error.norm() / size.norm()))
        worsts.append(float(error.div_(size + size.mean()).max()))
    # max() would pass over a NaN that does not come first.
    return (math.nan, math.nan) if any(map(math.isnan, norms)) else (max(norms), max(worsts))


def _evaluate(fn: Callable[..., Any], buffers: BufferSet) -> list[torch.Tensor]:
    """Outputs, then the gradients of all differentiated arguments."""
    outputs = timing.as_tuple(fn(*buffers.args))
    gradients = torch.autograd.grad(outputs, buffers.inputs, buffers.grad_outputs)
    return [t.detach() for t in (*outputs, *gradients)]


def _run_case(op: Op, shape: Shape, settings: Settings, copy_gb: float) -> list[Row]:
    moved = op.bytes_moved(shape, settings.dtype.itemsize)
    blank = Row(op.name, shape.name, shape.tokens, "", "", "ok")
    rows: list[Row] = []
    try:
        pristine = make_buffers(op, shape, settings.dtype, settings.device)
        count = timing.set_count(sum(t.nbytes for t in pristine.args), settings.device)
        sets = [pristine.clone() for _ in range(count)]
        reference = _evaluate(op.eager, pristine.clone(torch.float64))
    except Exception as error:
        status, reason = explain(error)
        rows = [replace(blank, side=side, status=status, reason=f"before any side ran: {reason}")
                for side in settings.sides]  # fmt: skip
    else:
        for side in settings.sides:
            rows += _run_side(op, replace(blank, side=side), settings, pristine, sets, reference, moved)
    rows += [replace(blank, side=side, status="not run", reason=why) for side, why in settings.skipped.items()]
    # What concerns both directions alike is one row so far.
    rows = [r for row in rows for r in ([row] if row.direction else [replace(row, direction=d) for d in DIRECTIONS])]
    ours = {row.direction: row.timing for row in rows if row.side == "ours"}
    finished = []
    for row in rows:
        row, mine = replace(row, bytes=moved[row.direction]), ours.get(row.direction)
        if row.timing is not None:
            speed = row.bytes / row.timing.us / 1e3
            row = replace(
                row, gb_per_s=speed, copy_share=speed / copy_gb,
                ours_is_faster_by=None if mine is None else row.timing.us / mine.us,
            )  # fmt: skip
        finished.append(row)
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return finished


def _run_side(
    op: Op,
    blank: Row,
    settings: Settings,
    pristine: BufferSet,
    sets: Sequence[BufferSet],
    reference: Sequence[torch.Tensor],
    moved: dict[str, int],
) -> list[Row]:
    """Check, then time. One side's failure, of whatever kind, is its own: the others still run."""
    try:
        fn = load_side(op, blank.side)
        error, worst = deviation(_evaluate(fn, pristine.clone()), reference)
    except Exception as failure:
        status, reason = explain(failure)
        return [replace(blank, status=status, reason=reason)]
    blank = replace(blank, error=finite(error), worst=finite(worst))
    norm_bound, worst_bound = (_bound(settings.dtype, factor) for factor in (NORM_BOUND, WORST_BOUND))
    if not (error <= norm_bound and worst <= worst_bound):  # NaN fails both
        reason = (
            f"off from fp64 by {error:.2g} (bound {norm_bound:.2g}), worst element {worst:.2g} ({worst_bound:.2g})"
        )
        return [replace(blank, status="wrong answer", reason=reason)]
    rows = []
    for direction, measure in zip(DIRECTIONS, (timing.time_forward, timing.time_backward), strict=True):
        try:
            for each in sets:
                each.restore(pristine)
            timed = measure(fn, sets, pristine, moved[direction], settings.repeats)
            rows.append(replace(blank, direction=direction, timing=timed))
        except Exception as failure:
            status, reason = explain(failure)
            rows.append(replace(blank, direction=direction, status=status, reason=reason))
    return rows


def _host_costs(op: Op, shape: Shape, settings: Settings) -> list[dict[str, Any]]:
    """Microseconds of the host for one call in eager mode, outside of any CUDA graph.

    A compiled function is left out: it would be compiled once more for these sizes.
    """
    found = []
    for side in settings.sides:
        if side == "compile":
            continue
        entry: dict[str, Any] = {"op": op.name, "side": side}
        try:
            fn = load_side(op, side)
            buffers = make_buffers(op, shape, settings.dtype, settings.device)
            entry["forward_us"] = timing.host_us(partial(fn, *buffers.args), settings.device)
            entry["forward_backward_us"] = timing.host_us(partial(_step, fn, buffers), settings.device)
        except Exception as failure:
            entry["status"], entry["reason"] = explain(failure)
        found.append(entry)
    return found


def _step(fn: Callable[..., Any], buffers: BufferSet) -> None:
    torch.autograd.grad(timing.as_tuple(fn(*buffers.args)), buffers.inputs, buffers.grad_outputs)


def _bound(dtype: torch.dtype, factor: int) -> float:
    # In float32 sums over rows, not the format, set the error.
    return factor * max(torch.finfo(dtype).eps, 1e-5)


def _summary(op: Op, shape: Shape, rows: Sequence[Row]) -> str:
    """The case on one line: forward/backward microseconds of each side."""
    told = []
    for side in dict.fromkeys(row.side for row in rows):
        mine = [row for row in rows if row.side == side]
        if any(row.timing for row in mine):
            told.append(f"{side} " + "/".join(f"{row.timing.us:.1f}" if row.timing else "failed" for row in mine))
        elif mine[0].status not in ("not offered", "not run"):
            told.append(f"{side} {mine[0].status}")
    return f"{op.name} {shape.name}, us forward/backward: {', '.join(told)}"
