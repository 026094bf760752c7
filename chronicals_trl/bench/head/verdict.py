"""The targets that the head is held to, each met or missed, from the cases and rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from chronicals_trl.bench.verdict import NOISE, Judged, conclude

if TYPE_CHECKING:
    from chronicals_trl.bench.head.run import Case, Row

__all__ = ["FLOOR_BOUNDS", "PEERS", "judge"]

#: (shape, frozen) to the most that ours may take, as a multiple of the multiplications alone.
FLOOR_BOUNDS = {
    ("qwen2.5-0.5b", False): 1.25,
    ("qwen2.5-0.5b", True): 1.30,
    ("llama-3-8b", False): 1.08,
    ("llama-3-8b", True): 1.05,
}
PEERS = ("trl", "liger", "liger_cute", "liger_sm90", "cce", "cce_kahan", "quack", "torch", "compile", "eager")
#: At the paper's shape only the small budget is in question; the others are what the head runs at.
SMALL_BUDGET_ONLY = ("paper",)

EXTRA_MIB = 1024.0
ERROR_FACTOR = 2.0
#: How far a replayed graph may be from the launched op: what counts as noise everywhere.
GRAPH_FACTOR = 1.02

_Table = dict[tuple[str, str], "Row"]


def judge(cases: Sequence[Case], rows: Sequence[Row]) -> list[Judged]:
    """Every target against every case that it concerns."""
    table: _Table = {(row.case, row.side): row for row in rows}
    main = [case for case in cases if case.shape not in SMALL_BUDGET_ONLY]
    judged = [_against_floor(case, table) for case in main if (case.shape, case.frozen) in FLOOR_BOUNDS]
    judged += [
        _compare(f"faster than {peer}", main, table, ("ours", peer), _speed_up, at_least=1 + NOISE) for peer in PEERS
    ]
    judged.append(_extra_memory(main, table))
    judged.append(
        _compare(
            "peak no higher than trl",
            main,
            table,
            ("ours", "trl"),
            lambda a, b: _ratio(a.peak_mib, b.peak_mib),
            at_most=1.0,
        )
    )
    judged.append(
        _compare(
            f"135 MiB: no slower than trl (within {NOISE:.0%})",
            cases,
            table,
            ("ours_135", "trl"),
            _speed_up,
            at_least=1 - NOISE,
        )
    )
    judged.append(
        _compare(
            f"gradient errors: at most {ERROR_FACTOR:g}x eager's",
            main,
            table,
            ("ours", "eager"),
            _error_ratio,
            at_most=ERROR_FACTOR,
        )
    )
    judged.append(_graph(main, table))
    return judged


def _against_floor(case: Case, table: _Table) -> Judged:
    bound = FLOOR_BOUNDS[case.shape, case.frozen]
    figures, missing, broken = _figures([case], table, ("ours",), lambda ours: ours.of_floor)
    return conclude(f"{case.name}: at most {bound:.2f}x the floor", figures, missing, broken, at_most=bound)


def _extra_memory(cases: Sequence[Case], table: _Table) -> Judged:
    accumulator = {case.name: 0.0 if case.frozen else 4 * case.vocab * case.hidden / 2**20 for case in cases}

    def besides(ours: Row) -> float | None:
        return None if ours.extra_mib is None else ours.extra_mib - accumulator[ours.case]

    figures, missing, broken = _figures(cases, table, ("ours",), besides)
    text = "extra memory besides the fp32 sum: at most 1 GiB"
    return conclude(text, figures, missing, broken, at_most=EXTRA_MIB)


def _graph(cases: Sequence[Case], table: _Table) -> Judged:
    figures, missing, broken = _figures(cases, table, ("ours",), lambda ours: _ratio(ours.graph_ms, ours.launched_ms))
    for key in missing:
        reason = table[key, "ours"].graph_reason if (key, "ours") in table else None
        if reason is not None:  # it ran, but not in a graph
            missing[key], broken = f"ours: {reason}", True
    return conclude("replays in a CUDA graph, no slower", figures, missing, broken, at_most=GRAPH_FACTOR)


def _compare(
    text: str,
    cases: Sequence[Case],
    table: _Table,
    sides: tuple[str, str],
    figure: Callable[[Row, Row], float | None],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Judged:
    figures, missing, broken = _figures(cases, table, sides, figure)
    return conclude(text, figures, missing, broken, at_least=at_least, at_most=at_most)


def _figures(
    cases: Sequence[Case], table: _Table, sides: tuple[str, ...], figure: Callable[..., float | None]
) -> tuple[dict[str, float], dict[str, str], bool]:
    """The figure of each case; where there is none, why; and whether that is our own fault.

    A peer that is not there leaves the question open; one that cannot do the case at all does not raise it, unless it
    can do none.
    """
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    not_offered: dict[str, str] = {}
    broken = False
    for case in cases:
        rows = [table.get((case.name, side)) for side in sides]
        without = next(
            ((side, row) for side, row in zip(sides, rows, strict=True) if row is None or row.ms is None), None
        )
        if without is None:
            value = figure(*rows)
            if value is None:
                missing[case.name] = "not measured"
            else:
                figures[case.name] = value
            continue
        side, row = without
        why = "not run" if row is None else row.status
        told = f"{side}: {why}" + (f" ({row.reason})" if row is not None and row.reason else "")
        if side.startswith("ours"):
            broken = broken or why in ("failed", "wrong answer")
        (not_offered if why == "not offered" else missing)[case.name] = told
    if not figures:
        missing = {**not_offered, **missing}
    return figures, missing, broken


def _speed_up(ours: Row, peer: Row) -> float | None:
    return _ratio(peer.ms, ours.ms)


def _error_ratio(ours: Row, eager: Row) -> float | None:
    """The larger of the two gradients' ratios."""
    if ours.errors is None or eager.errors is None:
        return None
    ratios = [_ratio(ours.errors.hidden_rms, eager.errors.hidden_rms)]
    if not ours.frozen:
        ratios.append(_ratio(ours.errors.weight_rms, eager.errors.weight_rms))
    known = [ratio for ratio in ratios if ratio is not None]
    return max(known) if len(known) == len(ratios) else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below
