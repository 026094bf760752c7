"""The targets that the fused ops are held to, each met or missed, from the rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chronicals_trl.bench.verdict import NOISE, Judged, conclude

if TYPE_CHECKING:
    from chronicals_trl.bench.ops.run import Row

__all__ = ["TARGETS", "Target", "judge"]


@dataclass(frozen=True)
class Target:
    """A figure that has to be reached at every shape.

    Args:
        text: In words.
        ops: The ops it holds for; empty for all.
        directions: "forward", "backward", or "both" for the sum of the two.
        against: A peer, whose time over ours is the figure; or "copy": our share of the copy bandwidth is the figure.
        at_least: The bound.
    """

    text: str
    ops: tuple[str, ...]
    directions: tuple[str, ...]
    against: str
    at_least: float


_BOTH_WAYS = ("forward", "backward")
_NO_SLOWER = 1 - NOISE

TARGETS = (
    Target("RMSNorm forward: 85% of copy bandwidth", ("rms_norm",), ("forward",), "copy", 0.85),
    Target("RMSNorm backward: 75% of copy bandwidth", ("rms_norm",), ("backward",), "copy", 0.75),
    Target("RMSNorm backward: 1.5x Liger", ("rms_norm",), ("backward",), "liger", 1.5),
    Target("RMSNorm forward + backward: 7x eager", ("rms_norm",), ("both",), "eager", 7.0),
    Target("SwiGLU both ways: 95% of copy bandwidth", ("swiglu",), _BOTH_WAYS, "copy", 0.95),
    Target("QK-RoPE both ways: 80% of copy bandwidth", ("qk_rope",), _BOTH_WAYS, "copy", 0.80),
    Target("QK-RoPE both ways: 2.3x eager", ("qk_rope",), _BOTH_WAYS, "eager", 2.3),
    Target("QK-RoPE both ways: ahead of Liger", ("qk_rope",), _BOTH_WAYS, "liger", 1 + NOISE),
    Target(f"no op slower than torch.compile (within {NOISE:.0%})", (), _BOTH_WAYS, "compile", _NO_SLOWER),
    Target(f"no op slower than Liger (within {NOISE:.0%})", (), _BOTH_WAYS, "liger", _NO_SLOWER),
)


def judge(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[Judged]:
    """Each target against each op and shape in `rows`."""
    table = {(row.op, row.shape, row.direction, row.side): row for row in rows}
    cases = list(dict.fromkeys((row.op, row.shape) for row in rows))
    return [_judge(target, table, cases) for target in targets]


def _judge(target: Target, table: dict[tuple[str, str, str, str], Row], cases: list[tuple[str, str]]) -> Judged:
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    # Our own op failing is a miss; a peer that is not there leaves the question open.
    broken = False
    concerned = [case for case in cases if not target.ops or case[0] in target.ops]
    for op, shape in concerned:
        for direction in target.directions:
            key = f"{op} {shape} {direction}"
            ways = _BOTH_WAYS if direction == "both" else (direction,)
            ours, peer = ([table.get((op, shape, way, side)) for way in ways] for side in ("ours", target.against))
            without = _first_without_time(ours)
            if without is not None:
                missing[key] = f"ours: {without}"
                broken = broken or any(row is not None and row.status in ("failed", "wrong answer") for row in ours)
            elif target.against == "copy":
                figures[key] = min(_get(row, lambda r: r.copy_share) for row in ours)
            else:
                without = _first_without_time(peer)
                if without == "not offered":  # the peer has no such op, so there is nothing to compare
                    continue
                if without is not None:
                    missing[key] = f"{target.against}: {without}"
                else:
                    figures[key] = _total(peer) / _total(ours)
    return conclude(target.text, figures, missing, broken, at_least=target.at_least)


def _first_without_time(rows: Sequence[Row | None]) -> str | None:
    """Why there is no time, or None if there is one in each of `rows`."""
    for row in rows:
        if row is None:
            return "not run"
        if row.timing is None:
            return row.status
    return None


def _get(row: Row | None, read: Callable[[Row], float | None]) -> float:
    value = None if row is None else read(row)
    assert value is not None  # the caller has looked
    return value


def _total(rows: Sequence[Row | None]) -> float:
    return sum(_get(row, lambda r: r.timing.us if r.timing else None) for row in rows)
