"""What each part of ours is worth: sides that have one part more than the side before, from none to all.

Joined blocks have no switch: residual additions are joined where `rms_norm` is on, q, k and v where `qk_rope` is, gate
and up where `gated_mlp` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chronicals_trl.bench.sft.cases import ABLATED, ABLATION_START, SIDES

__all__ = ["ablation_sides", "gains"]


def ablation_sides(mode: str, packs: bool) -> list[str]:
    """Names, from nothing on to all on.

    Args:
        mode: Without adapters there is no part `lora`.
        packs: Whether the script does; else there is no part `packing`.
    """
    without = {"lora"} if mode == "full" else set()
    without |= set() if packs else {"packing"}
    added = {f"ablation-{number}-{part}": part for number, part in enumerate(ABLATED, start=1)}
    return [ABLATION_START, *(name for name, part in added.items() if part not in without)]


def gains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each part added, of the rows in which the ablation ran; empty if it did not.

    The gain is over the last row before that has a rate and is valid, which `over` names. A part that was off in its
    row after all, as `left_out` says why, has none.
    """
    found = []
    before: dict[str, Any] | None = None
    for row in rows:
        if SIDES[row["side"]].parts is None:
            continue
        rate = row["tokens_per_second"] if row["status"] == "ok" else None
        added = (SIDES[row["side"]].parts or ("nothing",))[-1]
        left_out = _left_out(row, added)
        gain = None if before is None or rate is None or left_out is not None else rate / before["tokens_per_second"]
        found.append({
            "side": row["side"],
            "added": added,
            "status": row["status"],
            "left_out": left_out,
            "tokens_per_second": row["tokens_per_second"],
            "peak_memory_gib": row["peak_memory_gib"],
            "over": None if before is None else before["side"],
            "gain": gain,
        })  # fmt: skip
        before = row if rate else before
    return found


def _left_out(row: dict[str, Any], part: str) -> str | None:
    """Why the part was off in the training of this row, by its activation report; None if it was on."""
    parts = [each for run in row.get("runs", ()) for each in run.get("report", {}).get("parts", ())]
    return next((each["reason"] for each in parts if each["name"] == part and each["state"] == "off"), None)
