"""What ours is held to at the level of a layer: against each side no slower, without the host and with it, and no more
memory, in each setting that the side runs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chronicals_trl.bench.lora.cases import SIDES
from chronicals_trl.bench.verdict import NOISE, Judged, conclude

__all__ = ["judge"]

#: What is compared: figure, in words, and whether theirs over ours has a least (times) or ours over theirs a most.
_COMPARED = (
    ("gpu_ms", f"no slower than {{side}}, host out of the way (within {NOISE:.0%})"),
    ("step_ms", f"no slower than {{side}}, host included (within {NOISE:.0%})"),
    ("peak_mib", f"peak memory no higher than {{side}}'s (within {NOISE:.0%})"),
)


def judge(rows: Sequence[dict[str, Any]]) -> list[Judged]:
    """Each comparison with each side that is in `rows`."""
    table = {(row["case"], row["side"]): row for row in rows}
    sides = [side for side in SIDES if side != "ours" and any(row["side"] == side for row in rows)]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    return [_judge(key, text.format(side=side), side, table, cases) for side in sides for key, text in _COMPARED]


def _judge(
    key: str, text: str, side: str, table: dict[tuple[str, str], dict[str, Any]], cases: Sequence[str]
) -> Judged:
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    broken = False
    for case in cases:
        ours, peer = table.get((case, "ours")), table.get((case, side))
        if peer is None or peer["status"] == "not offered":
            continue  # there is nothing to compare
        reasons = [f"{name}: {why}" for name, row in (("ours", ours), (side, peer)) if (why := _without(row, key))]
        broken = broken or (ours is not None and ours["status"] in ("failed", "wrong answer"))
        if reasons or ours is None:
            missing[case] = "; ".join(reasons)
        elif key == "peak_mib":
            figures[case] = ours[key] / peer[key]
        else:
            figures[case] = peer[key] / ours[key]
    bounds: dict[str, float] = {"at_most": 1 + NOISE} if key == "peak_mib" else {"at_least": 1 - NOISE}
    return conclude(text, figures, missing, broken, **bounds)


def _without(row: dict[str, Any] | None, key: str) -> str | None:
    """Why the row has no such figure that may be compared, or None."""
    if row is None:
        return "not in this run"
    if row["status"] != "ok":
        return str(row["status"])
    if row[key] is None:
        return "not measured"
    if key == "gpu_ms" and not row["queued"]:
        return "the host was not ahead"
    return None
