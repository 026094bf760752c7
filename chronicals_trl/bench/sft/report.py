"""What a run of `bench sft` found, as a table for the terminal and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chronicals_trl.bench.report import DRY_RUN, print_table, print_verdict, pyplot, save_plot
from chronicals_trl.bench.sft.cases import SIDES
from chronicals_trl.bench.sft.figures import floor_summary
from chronicals_trl.bench.sft.verdict import fall

__all__ = ["print_tables", "write_plot"]

_COLUMNS = (
    "side", "status", "tokens/s", "spread", "step ms", "p20-p80", "GiB", "MFU", "of GEMM", "/ floor", "ours is",
)  # fmt: skip
_TRAINING = ("side", "tokens a step", "filled", "loss from", "falls by", "grad norm", "trained", "attention")
_ABLATION = ("side", "added", "status", "tokens/s", "GiB", "gain", "over")
_OURS, _PEER, _INVALID = "#d1495b", "#30638e", "#c9cdd6"


def print_tables(result: dict[str, Any]) -> None:
    """The figures, why a side has none, and the verdict."""
    print(f"{DRY_RUN if result['dry_run'] else result['gpu']}. {result['method']}.")
    told = result["settings"]
    title = f"{told['shape']}, {told['mode']}, {told['protocol']}, checkpointing {told['checkpointing']}"
    if result["gemm_tflops"] is not None:
        title += f"; GEMM {result['gemm_tflops']:,.0f} TFLOP/s"
    floor = result["floor"]
    if floor is not None:
        print(floor_summary(floor))
    print_table(title, _COLUMNS, [_cells(row, result["dry_run"]) for row in result["rows"]], 2)
    trained = [row for row in result["rows"] if row["tokens_per_second"] is not None]
    print_table("What was trained", _TRAINING, [_training_cells(row) for row in trained], 1)
    if result["ablation"]:
        print_table("One part more in each row", _ABLATION, [_gain_cells(each) for each in result["ablation"]], 3)
    for row in result["rows"]:
        if row["reason"]:
            print(f"{row['side']}: {row['status']} ({row['reason']})")
    reference = result["validity"]["reference"]
    print(f"Losses compared with {reference}'s." if reference else "No reference: losses were not compared.")
    if result["validity"]["not_judged"]:
        print(f"Too few tokens to judge by the loss: {', '.join(result['validity']['not_judged'])}.")
    print_verdict(result)


def write_plot(result: dict[str, Any], path: Path) -> str | None:
    """A bar a side: real tokens a second, grey where the row is invalid; returns why there is no plot, or None."""
    plt = pyplot()
    if isinstance(plt, str):
        return plt
    rows = [row for row in result["rows"] if row["tokens_per_second"] is not None]
    if not rows:
        return "no plot: nothing was measured"
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.5 * len(rows)), layout="constrained")
    names = [row["side"] for row in rows]
    rates = [row["tokens_per_second"] for row in rows]
    colors = [_INVALID if row["status"] != "ok" else _OURS if SIDES[row["side"]].ours else _PEER for row in rows]
    lower = [rate - min(row["rates"]) for rate, row in zip(rates, rows, strict=True)]
    upper = [max(row["rates"]) - rate for rate, row in zip(rates, rows, strict=True)]
    bars = axis.barh(names, rates, color=colors, xerr=(lower, upper), error_kw={"linewidth": 0.8})
    axis.bar_label(bars, [_label(row) for row in rows], padding=6, fontsize=8)
    axis.invert_yaxis()
    floor = result["floor"]
    if floor is not None and floor["status"] == "ok":
        rate = floor["real_tokens"] / floor["floor_ms"] * 1e3
        axis.axvline(rate, color="black", linestyle="--", linewidth=1, label=f"floor of ours: {rate:,.0f}")
        axis.legend(fontsize=8, loc="lower right", frameon=False)
    axis.margins(x=0.3)
    axis.set_xlabel("real tokens a second")
    axis.spines[["top", "right"]].set_visible(False)
    told = result["settings"]
    where = DRY_RUN if result["dry_run"] else result["gpu"]
    axis.set_title(
        f"{told['shape']}, {told['mode']}, {told['protocol']}, checkpointing {told['checkpointing']}: {where}",
        fontsize=9,
    )
    save_plot(figure, path)
    return None


def _label(row: dict[str, Any]) -> str:
    memory = "" if row["peak_memory_gib"] is None else f", {row['peak_memory_gib']:.1f} GiB"
    return f"{row['tokens_per_second']:,.0f}{memory}" + ("" if row["status"] == "ok" else f", {row['status']}")


def _cells(row: dict[str, Any], dry_run: bool) -> list[str]:
    between = "" if row["step_ms"] is None else f"{row['step_ms_p20']:.1f}-{row['step_ms_p80']:.1f}"
    return [
        row["side"],
        row["status"],
        _number(row["tokens_per_second"], ",.0f"),
        _number(row["spread"], ".1%"),
        _number(row["step_ms"], ".1f"),
        between,
        _number(row["peak_memory_gib"], ".2f"),
        _number(row["mfu"], ".1%"),
        _number(row["of_gemm"], ".1%"),
        _number(row["over_floor"], ".2f", "x"),
        "" if dry_run or row["side"] == "chronicals" else _number(row["ours_is_faster_by"], ".2f", "x"),
    ]


def _gain_cells(each: dict[str, Any]) -> list[str]:
    return [
        each["side"],
        each["added"],
        each["status"] if each["left_out"] is None else f"off: {each['left_out']}"[:40],
        _number(each["tokens_per_second"], ",.0f"),
        _number(each["peak_memory_gib"], ".2f"),
        _number(each["gain"], ".3f", "x"),
        each["over"] or "",
    ]


def _training_cells(row: dict[str, Any]) -> list[str]:
    run = row["runs"][0]
    logs = run["logs"]
    numbers = bool(logs) and all(isinstance(log[key], (int, float)) for log in logs for key in ("loss", "grad_norm"))
    return [
        row["side"],
        f"{row['tokens_per_step']:,.0f}",
        f"{row['tokens_per_step'] / row['positions_per_step']:.1%}",
        f"{logs[0]['loss']:.3f}" if numbers else "",
        f"{fall(logs):.3f}" if numbers else "",
        f"{logs[-1]['grad_norm']:.3f}" if numbers else "",
        f"{run['trained_share']:.2%}",
        str(run["attention"]),
    ]


def _number(value: float | None, form: str, after: str = "") -> str:
    return "" if value is None else f"{value:{form}}{after}"
