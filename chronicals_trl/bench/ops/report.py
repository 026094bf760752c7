"""The fused ops' figures, as tables and as a plot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chronicals_trl.bench.report import COLORS, DRY_RUN, print_table, print_verdict, pyplot, save_plot

__all__ = ["print_tables", "write_plot"]

_COLUMNS = ("op", "shape", "pass", "side", "us", "spread", "GB/s", "of copy", "ours is")
_TEXT_COLUMNS = 4  # the first ones, aligned to the left


def print_tables(result: dict[str, Any]) -> None:
    """The figures, what could not be measured, the host's costs and the verdict; rich where it is installed."""
    where = DRY_RUN if result["dry_run"] else f"{result['gpu']}, copy {result['copy_gb_per_s']:,.0f} GB/s"
    print_table(f"{where}; {result['dtype']}, {result['method']}", _COLUMNS, _figures(result), _TEXT_COLUMNS)
    for line in _not_measured(result["rows"]):
        print(line)
    if result["host"]:
        title = "Host's cost of one call in eager mode, tiny inputs"
        print_table(title, ("op", "side", "forward us", "forward + backward us"), _host(result["host"]), 2)
    print_verdict(result)


def write_plot(result: dict[str, Any], path: Path) -> str | None:
    """Bars of the share of the copy bandwidth; returns why there is no plot, or None."""
    plt = pyplot()
    if isinstance(plt, str):
        return plt
    rows = [row for row in result["rows"] if row["timing"] is not None]
    if not rows:
        return "no plot: nothing was measured"
    share = {(row["op"], row["shape"], row["direction"], row["side"]): 100 * row["copy_share"] for row in rows}
    ops, shapes, sides = (list(dict.fromkeys(row[key] for row in rows)) for key in ("op", "shape", "side"))
    tokens = {row["shape"]: row["tokens"] for row in rows}
    width = 0.8 / len(sides)
    size = (2 * max(5.0, 0.85 * len(ops) + 1), 1 + 2.9 * len(shapes))
    names = [re.sub(r"_(?=[^_]+$)", "_\n", op) if len(op) > 8 else op for op in ops]
    figure, axes = plt.subplots(len(shapes), 2, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for row_of_axes, shape in zip(axes, shapes, strict=True):
        for axis, direction in zip(row_of_axes, ("forward", "backward"), strict=True):
            for index, side in enumerate(sides):
                offset = (index - (len(sides) - 1) / 2) * width
                # A side without a figure has no bar: 0 would read as a measurement.
                at = [x for x, op in enumerate(ops) if (op, shape, direction, side) in share]
                heights = [share[ops[x], shape, direction, side] for x in at]
                bars = axis.bar([x + offset for x in at], heights, width, color=COLORS.get(side), label=side)
                if side == "ours":
                    # On white, in front of the line at 100, which would strike through figures just below it.
                    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                    axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=1, bbox=behind, zorder=3)
            axis.axhline(100, color="black", linewidth=0.8, linestyle="--")
            axis.set_title(f"{shape}, {tokens[shape]:,} tokens: {direction}", fontsize=10)
            axis.set_xticks(range(len(ops)), names, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        row_of_axes[0].set_ylabel("% of copy bandwidth")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(sides), frameon=False)
    where = DRY_RUN if result["dry_run"] else f"{result['gpu']}, copy {result['copy_gb_per_s']:,.0f} GB/s (dashed)"
    save_plot(figure, path, f"Bytes that each op has to move, per second: {where}, {result['dtype']}")
    return None


def _figures(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    before = None
    for row in result["rows"]:
        if row["timing"] is None:
            continue
        case = [row["op"], row["shape"], row["direction"]]
        timing = row["timing"]
        faster = row["ours_is_faster_by"]
        lines.append(
            [
                *(case if case != before else ["", "", ""]),
                row["side"],
                f"{timing['us']:.1f}",
                f"{(timing['us_p80'] - timing['us_p20']) / timing['us']:.1%}",
                f"{row['gb_per_s']:,.0f}",
                f"{row['copy_share']:.0%}",
                "" if faster is None or row["side"] == "ours" else f"{faster:.2f}x",
            ]
        )
        before = case
    return lines


def _not_measured(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each side and reason, with the ops that it concerns."""
    concerned: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in rows:
        if row["timing"] is None:
            key = (row["side"], row["status"], row["reason"] or "")
            concerned.setdefault(key, {})[row["op"]] = None
    ops = len({row["op"] for row in rows})
    return [
        f"{side}: {status} ({reason}): {'all ops' if len(which) == ops else ', '.join(which)}"
        for (side, status, reason), which in concerned.items()
    ]


def _host(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [entry["op"], entry["side"], *(f"{entry[key]:.1f}" for key in ("forward_us", "forward_backward_us"))]
        for entry in entries
        if "reason" not in entry
    ]
