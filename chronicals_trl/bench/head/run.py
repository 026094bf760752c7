"""Check each side of the head against fp64, measure its memory and time it beside the GEMMs alone.

A case is a shape with the weight trained or frozen. All sides go through it several times, and the floor with them.
The first time a side is checked and its memory measured; each time some of its samples are taken. So what drifts in
the run is in all of them. Each round begins with another side.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from chronicals_trl.bench.common import explain, versions
from chronicals_trl.bench.head import verdict as head_verdict
from chronicals_trl.bench.head.cases import Problem, Shape, floor_calls, load_side, make_problem
from chronicals_trl.bench.head.check import Errors, Reference
from chronicals_trl.bench.timing import quantile, replay_ms, sample_ms
from chronicals_trl.kernels._cross_entropy_chunks import MOST_BYTES

__all__ = ["Case", "Row", "Settings", "run"]

ROUNDS = 3
# Calls, some hundreds of milliseconds: enough for the clocks to become those that a long run of this call has.
WARM_UP = 6
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What to run, and how.

    Args:
        shapes, sides: In the order in which they run; a shape may have fewer sides.
        skipped: Side to the reason why it is not run; reported as such.
        dtype: Of hidden and weight.
        device: A CUDA device, or the CPU for a dry run.
        samples: Of each side, in each of the ROUNDS.
        warm_up: Calls before them, each time.
        keep: Called with the result so far after each case: a crash of a peer's kernel must not cost what is there.
    """

    shapes: Sequence[Shape]
    sides: Sequence[str]
    skipped: dict[str, str]
    dtype: torch.dtype
    device: torch.device
    samples: int
    warm_up: int = WARM_UP
    keep: Callable[[dict[str, Any]], None] = lambda result: None


@dataclass
class Case:
    """A shape with a trained or a frozen weight, and its floor.

    Args:
        name: "SHAPE trained" or "SHAPE frozen".
        shape, tokens, hidden, vocab, frozen: What that is.
        floor_samples: Tokens in a chunk to milliseconds of the multiplications alone.
        floor_chunk, floor_ms: The fastest of them, by the median.
        floor_tflops: What that is in 1e12 operations a second.
        reason: Why there is no floor, or no case at all.
    """

    name: str
    shape: str
    tokens: int
    hidden: int
    vocab: int
    frozen: bool
    floor_samples: dict[int, list[float]] = field(default_factory=dict)
    floor_chunk: int | None = None
    floor_ms: float | None = None
    floor_tflops: float | None = None
    reason: str | None = None


@dataclass
class Row:
    """One side's figures for one case.

    Args:
        case, shape, frozen, side: What was timed.
        status: "ok", "not installed", "not offered", "not run", "failed" or "wrong answer". Only "ok" has a time.
        reason: Why not "ok".
        loss: The mean loss.
        errors: Against float64, see `Errors`.
        peak_mib: Most memory during forward and backward above what was allocated before, gradients included.
        extra_mib: The same less the gradients of hidden and weight in their own dtypes, which every side has to leave.
        ms, ms_p20, ms_p80: Median of `samples` (milliseconds of forward and backward), 20th and 80th percentile.
        of_floor: `ms` over the floor.
        ours_is_faster_by: `ms` over that of "ours".
        graph_ms, graph_samples: The same as a replayed CUDA graph; of "ours" alone.
        launched_ms, launched_samples: The same launched, by turns with the graph.
        graph_reason: Why there is no such time.
    """

    case: str
    shape: str
    frozen: bool
    side: str
    status: str = "ok"
    reason: str | None = None
    loss: float | None = None
    errors: Errors | None = None
    peak_mib: float | None = None
    extra_mib: float | None = None
    samples: list[float] = field(default_factory=list)
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    of_floor: float | None = None
    ours_is_faster_by: float | None = None
    graph_ms: float | None = None
    graph_samples: list[float] = field(default_factory=list)
    launched_ms: float | None = None
    launched_samples: list[float] = field(default_factory=list)
    graph_reason: str | None = None


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all cases; returns what the JSON file holds. `say` is given a line for each case as it is done."""
    start = time.perf_counter()
    dry_run = settings.device.type != "cuda"
    cases: list[Case] = []
    rows: list[Row] = []

    def result() -> dict[str, Any]:
        return {
            "benchmark": "head",
            "dry_run": dry_run,
            "method": "cpu dry run" if dry_run else "CUDA events around one forward and backward",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 1),
            "gpu": None if dry_run else torch.cuda.get_device_name(settings.device),
            "versions": versions(
                "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels",
                "nvidia-cutlass-dsl",
            ),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "ignored_labels": 0,
            "cases": [asdict(case) for case in cases],
            "rows": [asdict(row) for row in rows],
            "verdict": [] if dry_run else [asdict(judged) for judged in head_verdict.judge(cases, rows)],
        }  # fmt: skip

    for shape in settings.shapes:
        sides, skipped = (
            [side for side in which if shape.sides is None or side in shape.sides]
            for which in (settings.sides, settings.skipped)
        )
        problem = reference = None  # the last shape's go before this one's are made
        _release(settings.device)
        failed = None
        try:
            problem = make_problem(shape, settings.dtype, settings.device)
            reference = Reference(problem)
        except Exception as error:
            failed = f"before any side ran: {explain(error)[1]}"
        for frozen in (False, True):
            case_start = time.perf_counter()
            name = f"{shape.name} {'frozen' if frozen else 'trained'}"
            case = Case(name, shape.name, shape.tokens, shape.hidden, shape.vocab, frozen)
            new = [Row(name, shape.name, frozen, side) for side in sides]
            if problem is None or reference is None:
                case.reason = failed
                new = [replace(row, status="failed", reason=failed) for row in new]
            else:
                _run_case(case, new, problem, reference, settings)
            cases.append(case)
            rows += new
            rows += [Row(name, shape.name, frozen, side, "not run", settings.skipped[side]) for side in skipped]
            seconds = time.perf_counter() - case_start
            say(f"[{len(cases)}/{2 * len(settings.shapes)}] {_summary(case, new)} ({seconds:.1f} s)")
            settings.keep(result())
    return result()


def _run_case(case: Case, rows: list[Row], problem: Problem, reference: Reference, settings: Settings) -> None:
    """Fill in `case` and `rows`. One side's failure, of whatever kind, is its own: the others still run."""
    problem.weight.requires_grad_(not case.frozen)
    calls: dict[str, Callable[..., Any]] = {}
    for number in range(ROUNDS):
        for row in _turn([None, *rows], number):
            if row is None:
                _time_floor(case, problem, settings)
                continue
            if row.status != "ok":
                continue
            try:
                if number == 0:
                    calls[row.side] = load_side(row.side)
                    _check(row, calls[row.side], problem, reference, settings.device)
                if row.status == "ok":
                    _take_samples(row, calls[row.side], problem, settings)
            except Exception as error:
                row.status, row.reason = explain(error)
                gc.collect()  # frames of the failed call may hold its buffers; takes too long to do it each time
            problem.clear()
            _release(settings.device)
    for row in rows:
        if row.side == "ours" and row.status == "ok":
            _time_graph(row, calls[row.side], problem, settings)
    _finish(case, rows)


def _turn(parts: Sequence[Any], number: int) -> Sequence[Any]:
    """The parts in the order of round `number`: each round begins elsewhere, so that none always follows the same."""
    first = number * len(parts) // ROUNDS
    return [*parts[first:], *parts[:first]]


def _check(row: Row, call: Callable[..., Any], problem: Problem, reference: Reference, device: torch.device) -> None:
    """Compile and tune by a first call, measure the memory of a second one, and compare its results."""
    _step(call, problem)
    _release(device)
    before = _memory(device, reset=True)
    loss = problem.loss(call)
    loss.backward()
    peak = _memory(device) - before
    gradients = [t.grad for t in problem.leaves if t.grad is not None]
    if len(gradients) < len(problem.leaves):
        raise RuntimeError("a gradient is missing")
    row.loss = float(loss.detach())
    row.peak_mib = peak / MIB if device.type == "cuda" else None
    row.extra_mib = (peak - sum(g.nbytes for g in gradients)) / MIB if device.type == "cuda" else None
    row.errors = reference.errors(row.loss, gradients[0], None if row.frozen else gradients[1])
    wrong = row.errors.too_large(row.frozen)
    if wrong is not None:
        row.status, row.reason = "wrong answer", wrong
    row.loss = row.loss if row.errors.loss is not None else None


def _take_samples(row: Row, call: Callable[..., Any], problem: Problem, settings: Settings) -> None:
    for number in range(settings.warm_up + settings.samples):
        problem.clear()  # not in the time: an optimizer does it between steps
        ms = sample_ms(lambda: problem.loss(call).backward(), settings.device)
        if number >= settings.warm_up:
            row.samples.append(ms)


def _time_floor(case: Case, problem: Problem, settings: Settings) -> None:
    try:
        for chunk, multiply in floor_calls(problem, case.frozen):
            samples = case.floor_samples.setdefault(chunk, [])
            samples += [sample_ms(multiply, settings.device) for _ in range(settings.warm_up + settings.samples)][
                settings.warm_up :
            ]
    except Exception as error:
        case.reason = f"no floor: {explain(error)[1]}"
    _release(settings.device)


def _time_graph(row: Row, call: Callable[..., Any], problem: Problem, settings: Settings) -> None:
    if settings.device.type != "cuda":
        return

    # Leaves of their own: a gradient's last node belongs to the stream that it was made on, which is another one here.
    weight = problem.weight.detach().requires_grad_(not row.frozen)
    fresh = replace(problem, hidden=problem.hidden.detach().requires_grad_(), weight=weight)

    def step() -> Any:
        loss = fresh.loss(call)
        return loss, torch.autograd.grad(loss, fresh.leaves)

    try:
        row.launched_samples, row.graph_samples = replay_ms(step, settings.device, ROUNDS * settings.samples)
        row.launched_ms, row.graph_ms = map(statistics.median, (row.launched_samples, row.graph_samples))
    except Exception as error:
        row.graph_reason = explain(error)[1]
    _release(settings.device)


def _finish(case: Case, rows: Sequence[Row]) -> None:
    """What follows from the samples."""
    medians = {chunk: statistics.median(samples) for chunk, samples in case.floor_samples.items() if samples}
    if medians and case.reason is None:
        case.floor_chunk = min(medians, key=medians.__getitem__)
        case.floor_ms = medians[case.floor_chunk]
        operations = (4 if case.frozen else 6) * case.tokens * case.hidden * case.vocab
        case.floor_tflops = operations / case.floor_ms / 1e9
    timed = [row for row in rows if row.status == "ok"]
    for row in timed:
        row.ms = statistics.median(row.samples)
        row.ms_p20, row.ms_p80 = (quantile(row.samples, q) for q in (0.2, 0.8))
        row.of_floor = None if case.floor_ms is None else row.ms / case.floor_ms
    ours = next((row.ms for row in timed if row.side == "ours"), None)
    for row in timed:
        row.ours_is_faster_by = None if ours is None or row.ms is None else row.ms / ours


def _step(call: Callable[..., Any], problem: Problem) -> None:
    problem.clear()
    problem.loss(call).backward()
    problem.clear()


def _memory(device: torch.device, *, reset: bool = False) -> int:
    """Bytes: the peak so far, or, with `reset`, what is allocated now, from which on the peak counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    if not reset:
        return torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _release(device: torch.device) -> None:
    """What a side leaves in the allocator's cache is no other side's matter, nor are a case's sizes another's."""
    MOST_BYTES.clear()
    if device.type == "cuda":
        # A kernel that wrote where it should not have breaks all that follows; what follows says so itself.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _summary(case: Case, rows: Sequence[Row]) -> str:
    """The case on one line: milliseconds, and MiB of extra memory."""
    told = ["no floor" if case.floor_ms is None else f"floor {case.floor_ms:.1f}"]
    for row in rows:
        if row.ms is None:
            told.append(f"{row.side} {row.status}")
        else:
            told.append(f"{row.side} {row.ms:.1f}" + (f" ({row.extra_mib:,.0f})" if row.extra_mib is not None else ""))
    return f"{case.name}, ms (extra MiB): {', '.join(told)}"
