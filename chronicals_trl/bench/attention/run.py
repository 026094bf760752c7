"""Check each side of the attention against fp64, time it both ways, and count what a call costs the host."""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config

from chronicals_trl.bench import timing
from chronicals_trl.bench.attention.cases import (
    DIRECT,
    WITHOUT_OFFSETS,
    Call,
    Documents,
    Shape,
    load_side,
    make_buffers,
    make_documents,
)
from chronicals_trl.bench.common import explain, finite, versions
from chronicals_trl.bench.timing import BufferSet, Timing
from chronicals_trl.bench.verdict import Judged, conclude

__all__ = ["Case", "Row", "Settings", "judge", "run"]

#: Empty documents at the end of cu_seqlens: none, a bucket's worth, and as many as a bin could hold besides.
EMPTY = (0, 32, 200)
# A side beyond it gets no time: bf16 rounding comes to 0.003 of the norm, a leak into one document to more than this.
ERROR_BOUND = 0.02
HOST_TOKENS = 512
WITHIN, HOST_US = 1.05, 60.0


@dataclass(frozen=True)
class Settings:
    """What to run, and how.

    Args:
        shapes, sides: In the order in which they run.
        skipped: Side to the reason why it is not run; reported as such.
        dtype: Of q, k and v.
        device: A CUDA device, or the CPU for a dry run.
        repeats: Samples of each time.
        keep: Called with the result so far after each case.
    """

    shapes: Sequence[Shape]
    sides: Sequence[str]
    skipped: dict[str, str]
    dtype: torch.dtype
    device: torch.device
    repeats: int
    keep: Callable[[dict[str, Any]], None] = lambda result: None


@dataclass(frozen=True)
class Case:
    """A shape with so many documents, of which the last `empty` are empty."""

    name: str
    shape: str
    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    documents: int
    empty: int
    max_seqlen: int


@dataclass
class Row:
    """One side of one case.

    Args:
        case, side: What was timed.
        status: "ok", "not installed", "not offered", "not run", "failed" or "wrong answer". Only "ok" has times.
        reason: Why not "ok".
        error: The largest of output and three gradients: the norm of the error over the norm of the fp64 reference.
        forward, backward: Median and spread of a CUDA-graph replay.
        both_us: Their sum, in microseconds.
        of_direct: Ours over the same kernel called directly, "forward" and "both".
        host_us: Of one forward call with gradients on, at few tokens; only in cases without empty documents.
        host_reason: Why there is none.
    """

    case: str
    side: str
    status: str = "ok"
    reason: str | None = None
    error: float | None = None
    forward: Timing | None = None
    backward: Timing | None = None
    both_us: float | None = None
    of_direct: dict[str, float] | None = None
    host_us: float | None = None
    host_reason: str | None = None


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all cases; returns what the JSON file holds. `say` is given a line for each case as it is done."""
    start = time.perf_counter()
    cases: list[Case] = []
    rows: list[Row] = []
    dry_run = settings.device.type != "cuda"

    def result() -> dict[str, Any]:
        return {
            "benchmark": "attention",
            "dry_run": dry_run,
            "method": timing.DRY_RUN if dry_run else timing.GRAPH,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 1),
            "gpu": None if dry_run else torch.cuda.get_device_name(settings.device),
            "versions": versions(
                "torch", "triton", "transformers", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels"
            ),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "error_bound": ERROR_BOUND,
            "cases": [asdict(case) for case in cases],
            "rows": [asdict(row) for row in rows],
            "verdict": [] if dry_run else [asdict(judged) for judged in judge(cases, rows)],
        }

    # A donated buffer forbids retain_graph, with which the backward is timed; it saves memory, not traffic.
    with functorch_config.patch(donated_buffer=False):
        for shape in settings.shapes:
            buffers = make_buffers(shape, settings.dtype, settings.device)
            reference: list[torch.Tensor] | None = None
            for empty in _empty(settings.sides):
                case_start = time.perf_counter()
                documents = make_documents(shape.tokens, empty, settings.device)
                case = _case(shape, documents, empty)
                # The same documents in every case of a shape, and so the same results.
                reference = reference or _reference(buffers, documents)
                sides = [side for side in settings.sides if not empty or side not in WITHOUT_OFFSETS]
                new = [Row(case.name, side) for side in sides]
                for row in new:
                    _run_side(row, case, shape, buffers, documents, reference, settings)
                _compare(new)
                cases.append(case)
                rows += new
                if not empty:
                    rows += [Row(case.name, side, "not run", why) for side, why in settings.skipped.items()]
                seconds = time.perf_counter() - case_start
                of = len(_empty(settings.sides)) * len(settings.shapes)
                say(f"[{len(cases)}/{of}] {_summary(case, new)} ({seconds:.1f} s)")
                settings.keep(result())
    return result()


def _empty(sides: Sequence[str]) -> Sequence[int]:
    return EMPTY if any(side not in WITHOUT_OFFSETS for side in sides) else EMPTY[:1]


def _case(shape: Shape, documents: Documents, empty: int) -> Case:
    name = shape.name + (f" +{empty} empty" if empty else "")
    sizes = (shape.tokens, shape.q_heads, shape.kv_heads, shape.head_dim)
    return Case(name, shape.name, *sizes, len(documents.lengths) + empty, empty, documents.max_seqlen)


def _run_side(
    row: Row,
    case: Case,
    shape: Shape,
    buffers: BufferSet,
    documents: Documents,
    reference: Sequence[torch.Tensor],
    settings: Settings,
) -> None:
    """Fill in `row`. A side's failure, of whatever kind, is its own: the others still run."""
    try:
        call = load_side(row.side, documents)
        row.error = finite(_error(call, buffers, reference))
        if row.error is None or row.error > ERROR_BOUND:
            row.status, row.reason = (
                "wrong answer",
                f"off from fp64 by {row.error} of its norm (bound {ERROR_BOUND:g})",
            )
            return
        # SDPA reads a mask of a byte for each pair of tokens besides.
        moved = shape.bytes + (shape.tokens**2 if row.side == "ours_sdpa" else 0)
        sets = [buffers.clone() for _ in range(timing.set_count(moved, settings.device))]
        row.forward = timing.time_forward(call, sets, buffers, moved, settings.repeats)
        row.backward = timing.time_backward(call, sets, buffers, 2 * moved, settings.repeats)
        row.both_us = row.forward.us + row.backward.us
    except Exception as error:
        row.status, row.reason = explain(error)
        row.forward = row.backward = None
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    if row.status == "ok" and not case.empty:
        _count_host(row, shape, settings)


def _count_host(row: Row, shape: Shape, settings: Settings) -> None:
    """At the heads of `shape` and few tokens, so that the GPU keeps up."""
    try:
        small = replace(shape, tokens=min(HOST_TOKENS, shape.tokens))
        call = load_side(row.side, make_documents(small.tokens, 0, settings.device))
        args = make_buffers(small, settings.dtype, settings.device).args
        row.host_us = timing.host_us(lambda: call(*args), settings.device)
    except Exception as error:
        row.host_reason = explain(error)[1]


def _error(call: Call, buffers: BufferSet, reference: Sequence[torch.Tensor]) -> float:
    found = _evaluate(call, buffers)
    errors = [
        float((mine.double() - exact).norm() / exact.norm()) for mine, exact in zip(found, reference, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("nan")


def _evaluate(call: Call, buffers: BufferSet) -> list[torch.Tensor]:
    """Output, then the gradients of q, k and v."""
    out = call(*buffers.args)
    return [out.detach(), *torch.autograd.grad(out, buffers.inputs, buffers.grad_outputs)]


def _reference(buffers: BufferSet, documents: Documents) -> list[torch.Tensor]:
    """The same in float64, one document after the other."""

    def parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[torch.Tensor]:
        each = (x.split(documents.lengths, dim=2) for x in (q, k, v))
        for q_1HSD, k_1HSD, v_1HSD in zip(*each, strict=True):
            out = F.scaled_dot_product_attention(q_1HSD, k_1HSD, v_1HSD, is_causal=True, enable_gqa=True)
            yield out.transpose(1, 2)

    exact = buffers.clone(torch.float64)
    return _evaluate(lambda q, k, v: torch.cat(list(parts(q, k, v)), dim=1), exact)


def _compare(rows: Sequence[Row]) -> None:
    by_side = {row.side: row for row in rows if row.status == "ok"}
    for side, direct in DIRECT.items():
        ours, theirs = by_side.get(side), by_side.get(direct)
        if ours is None or theirs is None:
            continue
        assert ours.forward and theirs.forward and ours.both_us and theirs.both_us
        ours.of_direct = {"forward": ours.forward.us / theirs.forward.us, "both": ours.both_us / theirs.both_us}


def judge(cases: Sequence[Case], rows: Sequence[Row]) -> list[Judged]:
    """The targets, at the cases without empty documents; those with some are there to be looked at."""
    table = {(row.case, row.side): row for row in rows}
    judged = []
    for side, direct in DIRECT.items():
        figures, missing, broken = dict[str, float](), dict[str, str](), False
        host, no_host = dict[str, float](), dict[str, str]()
        for case in cases:
            if case.empty:
                continue
            ours, theirs = table.get((case.name, side)), table.get((case.name, direct))
            if ours is not None and ours.of_direct is not None:
                figures |= {f"{case.name} {way}": ratio for way, ratio in ours.of_direct.items()}
            else:
                missing[case.name] = _without(side, ours) or _without(direct, theirs) or "not measured"
            if ours is not None and ours.host_us is not None:
                host[case.name] = ours.host_us
            else:
                no_host[case.name] = _without(side, ours) or (ours and ours.host_reason) or "not measured"
            broken = broken or (ours is not None and ours.status in ("failed", "wrong answer"))
        text = f"{side}: within {WITHIN - 1:.0%} of the kernel called directly"
        judged.append(conclude(text, figures, missing, broken, at_most=WITHIN))
        text = f"{side}: at most {HOST_US:g} us of the host for a forward call"
        judged.append(conclude(text, host, no_host, broken, at_most=HOST_US))
    return judged


def _without(side: str, row: Row | None) -> str | None:
    """Why this side has no times; None if it has."""
    if row is None:
        return f"{side}: not run"
    if row.status == "ok":
        return None
    return f"{side}: {row.status}" + (f" ({row.reason})" if row.reason else "")


def _summary(case: Case, rows: Sequence[Row]) -> str:
    """The case on one line: microseconds forward and backward."""
    told = [
        f"{row.side} {row.forward.us:.0f}/{row.backward.us:.0f}"
        if row.forward is not None and row.backward is not None
        else f"{row.side} {row.status}"
        for row in rows
    ]
    return f"{case.name}, us forward/backward: {', '.join(told)}"
