"""Whether a row of `bench sft` is a training at all, and the targets that ours is held to.

A row is invalid, whoever's it is, if
    a gradient norm or a loss in its logs is missing, not finite, or (the norm) zero;
    its first logged loss is not within START of the reference's;
    its loss falls by less than FALL_LEAST or more than FALL_MOST of what the reference's falls by.
The fall is the first logged loss less the median of the last three. The reference is the first of REFERENCES in the
run that passes the first rule and whose loss falls by at least LEARNS of where it began. Losses of two sides are of
the same documents in other rows and orders, so they do not agree closely; what does not train, trains another thing,
or looks at its answers is far outside these bounds. Without a reference a row's own loss has to fall by LEARNS.

Few tokens between two logs make the falls uncertain: SIGMAS standard deviations of their difference, at
TOKEN_DEVIATION for one token's loss, are added to the bounds on the fall. Where no fall at all would then pass, the
loss is not judged, and the row is in `not_judged`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chronicals_trl.bench.sft.cases import ABLATION_START, LIGHTER
from chronicals_trl.bench.verdict import NOISE, Judged, conclude

if TYPE_CHECKING:
    from chronicals_trl.bench.sft.run import Settings

__all__ = ["REFERENCES", "fall", "judge", "judge_validity"]

REFERENCES = ("trl-liger", "trl-tuned", "trl", "torch-compile", ABLATION_START)
#: Of these the fastest is the best peer.
BEST_PEERS = ("trl-liger", "trl-cce", "unsloth-packing")
START = 0.1
FALL_LEAST, FALL_MOST = 0.6, 1.6
LEARNS = 0.01
TOKEN_DEVIATION, SIGMAS = 3.0, 3.0

Logs = Sequence[dict[str, Any]]


def fall(logs: Logs) -> float:
    """By how much the loss fell."""
    losses = [log["loss"] for log in logs]
    return float(losses[0] - statistics.median(losses[-3:]))


def judge_validity(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Set `status` to "invalid", with the reason, in the rows that are; returns the reference and the rule."""
    trained = [row for row in rows if row["status"] == "ok"]
    broken = {
        row["side"]: next(filter(None, (broken_logs(run["logs"]) for run in row["runs"])), None) for row in trained
    }
    by_side = {row["side"]: row for row in trained if broken[row["side"]] is None}
    reference = next(
        (side for side in REFERENCES if side in by_side and _learns(by_side[side]["runs"][0]["logs"])), None
    )
    not_judged = []
    for row in trained:
        reasons = [broken[row["side"]]]
        if reasons == [None] and reference is None:
            little = f"the loss falls by less than {LEARNS:.0%}"
            reasons = [None if _learns(run["logs"]) else little for run in row["runs"]]
        elif reasons == [None]:
            assert reference is not None
            like = by_side[reference]
            slack = _slack(row, like)
            if row is not like and FALL_LEAST * fall(like["runs"][0]["logs"]) <= slack:
                not_judged.append(row["side"])
            reasons = [off_reference(run["logs"], like["runs"][0]["logs"], reference, slack) for run in row["runs"]]
        reason = next(filter(None, reasons), None)
        if reason is not None:
            row["status"], row["reason"] = "invalid", reason
    return {
        "reference": reference,
        "not_judged": not_judged,
        "first_loss_within": START,
        "fall_at_least": FALL_LEAST,
        "fall_at_most": FALL_MOST,
        "reference_has_to_fall_by": LEARNS,
    }


def broken_logs(logs: Logs) -> str | None:
    """What no training has, or None."""
    if not logs:
        return "no loss was logged"
    for log in logs:
        for key in ("loss", "grad_norm"):
            value = log.get(key)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                return f"{key} is {value} at step {log['step']}"
        if log["grad_norm"] <= 0:
            return f"grad_norm is {log['grad_norm']:g} at step {log['step']}"
    return None


def off_reference(logs: Logs, reference: Logs, name: str, slack: float = 0.0) -> str | None:
    """How these losses differ from the reference's, or None; a fall may be `slack` beyond its bounds."""
    first, of_reference = logs[0]["loss"], reference[0]["loss"]
    if abs(first - of_reference) > START * abs(of_reference):
        return f"the loss begins at {first:.3f}, {name}'s at {of_reference:.3f}"
    like = fall(reference)
    if not FALL_LEAST * like - slack <= fall(logs) <= FALL_MOST * like + slack:
        return f"the loss falls by {fall(logs):.3f}, {name}'s by {like:.3f}"
    return None


def _slack(*rows: dict[str, Any]) -> float:
    """How far chance alone may take the falls of two rows apart: a log's mean is over so many tokens, the median of
    three over about twice as many.
    """
    tokens = [row["tokens_per_step"] * row["runs"][0]["logs"][0]["step"] for row in rows]
    return SIGMAS * TOKEN_DEVIATION * math.sqrt(sum(1.5 / count for count in tokens))


def _learns(logs: Logs) -> bool:
    return fall(logs) >= LEARNS * abs(logs[0]["loss"])


#: (shape, mode, protocol, side, least gain over it), where the run's settings are those that the target is for.
TARGETS = (
    ("qwen2.5-0.5b", "full", "packed", "trl-liger", 1.5),
    ("qwen2.5-0.5b", "full", "packed", "unsloth-packing", 1.8),
    ("qwen2.5-0.5b", "lora", "packed", "trl-liger", 2.4),
    ("qwen2.5-0.5b", "lora", "packed", "unsloth-packing", 7.0),
    ("qwen2.5-0.5b", "full", "short", "unsloth", 3.51),
    ("qwen2.5-0.5b", "lora", "short", "unsloth", 4.10),
    ("qwen2.5-7b", "qlora", "packed", "unsloth-packing", 1.2),
    *(("llama-3.1-8b", "full", "packed", peer, 1.1) for peer in BEST_PEERS),
)

MFU = 0.52
#: What a step may take over its floor, judged where the run has measured that.
OVER_FLOOR = {
    ("qwen2.5-0.5b", "full", "packed"): 1.10,
    ("qwen2.5-1.5b", "full", "packed"): 1.10,
    ("qwen2.5-7b", "lora", "packed"): 1.15,
}


#: Seconds from the start of our side's process, its imports left out, to the end of its first step.
FIRST_STEP = 60.0


def judge(settings: Settings, rows: Sequence[dict[str, Any]]) -> list[Judged]:
    """The targets that this run's shape, mode and protocol have, and no more memory than the tuned peer.

    Not measured, whatever the figures, in a run with other rows, steps or weights than they are for.
    """
    table = {row["side"]: row for row in rows}
    run = (settings.shape, settings.mode, settings.protocol)
    judged = [
        _ratio(f"{least:g}x {peer}", table, peer, "tokens_per_second", at_least=least)
        for *of, peer, least in TARGETS
        if tuple(of) == run
    ]
    if settings.shape == "qwen2.5-7b" and settings.mode == "lora" and settings.protocol == "packed":
        # 1.7 times the best peer; at the memory of each, which is what checkpointing is for, 1.2 times.
        if settings.checkpointing == "on":
            judged += [_at_memory(table, peer, 1.2) for peer in BEST_PEERS]
        else:
            judged += [_ratio(f"1.7x {peer}", table, peer, "tokens_per_second", at_least=1.7) for peer in BEST_PEERS]
    if run == ("qwen2.5-1.5b", "full", "packed"):
        ours = table.get("chronicals")
        mfu = None if ours is None or ours["status"] != "ok" else ours["mfu"]
        figures, missing = ({}, {"chronicals": "no figure"}) if mfu is None else ({"chronicals": mfu}, {})
        judged.append(conclude(f"MFU {MFU:.0%}", figures, missing, _broken(table), at_least=MFU))
    over = table.get("chronicals", {}).get("over_floor")
    if over is not None and run in OVER_FLOOR:
        most = OVER_FLOOR[run]
        text = f"step: at most {most:.2f} of its floor"
        judged.append(conclude(text, {"chronicals": over}, {}, _broken(table), at_most=most))
    judged += _first_step(table)
    other = _other_settings(settings)
    if other is not None:
        judged = [
            conclude(each.target, {}, {"this run": other}, False, at_least=each.at_least, at_most=each.at_most)
            for each in judged
        ]
    if settings.checkpointing != "default":
        judged.append(
            _ratio("peak memory: no more than trl-liger", table, "trl-liger", "peak_memory_gib", at_most=1 + NOISE)
        )
    return judged


def _first_step(table: dict[str, dict[str, Any]]) -> list[Judged]:
    runs = table["chronicals"]["runs"] if "chronicals" in table else []
    parts = ("seconds_before_first_step", "seconds_of_first_step")
    took = [sum(run[part] for part in parts) for run in runs if all(part in run for part in parts)]
    if not took:
        return []
    text = f"first step: at most {FIRST_STEP:g} s after the start"
    return [conclude(text, {"chronicals": max(took)}, {}, _broken(table), at_most=FIRST_STEP)]


def _other_settings(settings: Settings) -> str | None:
    """In what a run is another one than the targets of its shape, mode and protocol are for, or None."""
    large = settings.shape in ("qwen2.5-7b", "llama-3.1-8b")
    wanted: dict[str, Any] = {"master": "bf16"}
    if settings.protocol == "short":
        wanted |= {"row_tokens": 512, "documents_per_step": 16 if settings.mode == "full" else 2}
    else:
        wanted |= {"row_tokens": 4096 if large else 2048, "tokens_per_step": 8192 if large else 16_384}
    found = [
        f"{name} {getattr(settings, name)}, not {of}" for name, of in wanted.items() if getattr(settings, name) != of
    ]
    return "; ".join(found) or None


def _ratio(
    text: str,
    table: dict[str, dict[str, Any]],
    peer: str,
    key: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Judged:
    missing = _missing(table, ("chronicals", peer), key)
    figures = {} if missing else {peer: table["chronicals"][key] / table[peer][key]}
    return conclude(text, figures, missing, _broken(table), at_least=at_least, at_most=at_most)


def _at_memory(table: dict[str, dict[str, Any]], peer: str, least: float) -> Judged:
    """Of ours in the run that take no more memory than the peer the fastest, over the peer; a miss if none does."""
    text = f"{least:g}x {peer} at its memory"
    ours = [side for side in ("chronicals", *LIGHTER) if side in table] or ["chronicals"]
    missing = _missing(table, (*ours, peer), "tokens_per_second", "peak_memory_gib")
    if missing:
        return conclude(text, {}, missing, _broken(table), at_least=least)
    memory = {side: table[side]["peak_memory_gib"] for side in (*ours, peer)}
    fitting = [side for side in ours if memory[side] <= memory[peer]]
    if not fitting:
        smallest = min(ours, key=memory.__getitem__)
        told = {smallest: f"{memory[smallest]:.2f} GiB, {peer} {memory[peer]:.2f}"}
        return conclude(text, {}, told, True, at_least=least)
    rates = {side: table[side]["tokens_per_second"] for side in (*fitting, peer)}
    fastest = max(fitting, key=rates.__getitem__)
    return conclude(text, {fastest: rates[fastest] / rates[peer]}, {}, _broken(table), at_least=least)


def _missing(table: dict[str, dict[str, Any]], sides: Sequence[str], *keys: str) -> dict[str, str]:
    """Sides that have no valid row with these figures, and why."""
    missing = {}
    for side in sides:
        row = table.get(side)
        if row is None:
            missing[side] = "not in this run"
        elif row["status"] != "ok" or any(row[key] is None for key in keys):
            missing[side] = f"{row['status']} ({row['reason']})"
    return missing


def _broken(table: dict[str, dict[str, Any]]) -> bool:
    """Our own failure is a miss, whatever the figures."""
    return "chronicals" in table and table["chronicals"]["status"] in ("failed", "invalid")
