"""What a run of `bench head` found, as tables for the terminal and as a plot of time against memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chronicals_trl.bench.report import COLORS, DRY_RUN, print_table, print_verdict, pyplot, save_plot

__all__ = ["print_tables", "write_plot"]

_COLUMNS = (
    "side", "ms", "spread", "x floor", "ours is", "graph ms", "extra MiB", "loss off", "d hidden off", "d weight off",
)  # fmt: skip
_PANEL_COLUMNS = 2

# In pixels of the figure before it is saved: a character and a line of a label, a marker, and where labels may go.
_CHARACTER, _LINE, _MARKER = 5.3, 11.0, 4.0
_SHIFTS = tuple(sign * step * _LINE for step in range(7) for sign in ((1, -1) if step else (1,)))

_Box = tuple[float, float, float, float]  # left, bottom, right, top


def print_tables(result: dict[str, Any]) -> None:
    """The figures, a table a case; what could not be measured; the verdict."""
    print(f"{DRY_RUN if result['dry_run'] else result['gpu']}; {result['dtype']}, {result['method']}.")
    print("extra MiB: peak above what was there before, gradients not counted. off: from fp64, root mean square.")
    for case in result["cases"]:
        lines = [_cells(row) for row in result["rows"] if row["case"] == case["name"] and row["ms"] is not None]
        print_table(f"{case['name']}: {_sizes(case)}; {_floor(case)}", _COLUMNS, lines, 1)
    for line in _not_measured(result):
        print(line)
    print_verdict(result)


def write_plot(result: dict[str, Any], path: Path) -> str | None:
    """A panel a case: each side at its memory and time, the floor as a line; returns why there is no plot, or None."""
    plt = pyplot()
    if isinstance(plt, str):
        return plt
    points = {
        case["name"]: [row for row in result["rows"] if row["case"] == case["name"] and row["ms"] is not None]
        for case in result["cases"]
    }
    cases = [case for case in result["cases"] if points[case["name"]]]
    if not cases:
        return "no plot: nothing was measured"
    lines = -(-len(cases) // _PANEL_COLUMNS)
    figure, axes = plt.subplots(
        lines, _PANEL_COLUMNS, figsize=(6 * _PANEL_COLUMNS, 1 + 3.6 * lines), squeeze=False, layout="constrained",
        sharex=True,
    )  # fmt: skip
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        for row in points[case["name"]]:
            color = COLORS["ours"] if row["side"].startswith("ours") else COLORS.get(row["side"], "#4a4e69")
            axis.plot(*_point(row), "o", color=color)
        if case["floor_ms"] is not None:
            axis.axhline(case["floor_ms"], color="black", linewidth=0.8, linestyle="--")
        axis.set_xscale("log")
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
        axis.margins(x=0.2)
        axis.set_title(f"{case['name']}: {_sizes(case)}", fontsize=10)
        axis.set_xlabel("extra memory, MiB (gradients not counted)", fontsize=8)
        axis.set_ylabel("forward + backward, ms", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    where = DRY_RUN if result["dry_run"] else result["gpu"]
    figure.suptitle(f"Linear head with cross-entropy: {where}, {result['dtype']}", fontsize=11)
    figure.draw_without_rendering()  # only now is it known where the points lie
    for axis, case in zip(axes.flat, cases, strict=False):
        _name_points(axis, points[case["name"]], case["floor_ms"])
    save_plot(figure, path)
    return None


def _point(row: dict[str, Any]) -> tuple[float, float]:
    """Memory and time; on a logarithmic axis what needs none stands at 1."""
    return max(row["extra_mib"] or 0.0, 1.0), row["ms"]


def _name_points(axis: Any, rows: list[dict[str, Any]], floor_ms: float | None) -> None:
    """A label beside each point, moved up or down, with a line to it, where it would cover something."""
    at = {row["side"]: tuple(axis.transData.transform(_point(row))) for row in rows}
    taken: list[_Box] = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in at.values()]
    frame = axis.get_window_extent()
    if floor_ms is not None:
        text = f"multiplications alone {floor_ms:.1f}"
        y = axis.transData.transform((1, floor_ms))[1]
        taken.append((frame.x0, y - 1, frame.x1, y + 1))
        taken.append((frame.x0, y - _LINE, frame.x0 + _CHARACTER * len(text), y))
        axis.annotate(
            text, (0, floor_ms), xycoords=("axes fraction", "data"),
            xytext=(2, -9), textcoords="offset points", fontsize=7,
        )  # fmt: skip
    for row in sorted(rows, key=lambda row: row["ms"]):
        text = f"{row['side']} {row['ms']:.1f}"
        x, y = at[row["side"]]
        shift, left = _free_place(x, y, _CHARACTER * len(text), taken, (frame.x0, frame.x1))
        points = 72 / axis.figure.dpi
        axis.annotate(
            text, _point(row), xytext=((-7 if left else 7) * points, shift * points), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=7,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2} if shift else None,
        )  # fmt: skip


def _free_place(x: float, y: float, width: float, taken: list[_Box], frame: tuple[float, float]) -> tuple[float, bool]:
    """How far up a label goes and whether to the left, the nearest place that is free; it is taken then."""
    box: _Box = (0.0, 0.0, 0.0, 0.0)
    for shift in _SHIFTS:
        for left in (False, True):
            start = x - 7 - width if left else x + 7
            box = (start, y + shift - _LINE / 2, start + width, y + shift + _LINE / 2)
            if frame[0] <= box[0] and box[2] <= frame[1] and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                return shift, left
    return 0.0, False


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _sizes(case: dict[str, Any]) -> str:
    return " x ".join(f"{case[size]:,}" for size in ("tokens", "hidden", "vocab"))


def _floor(case: dict[str, Any]) -> str:
    if case["floor_ms"] is None:
        return case["reason"] or "no floor"
    return (
        f"multiplications alone {case['floor_ms']:.2f} ms "
        f"(chunks of {case['floor_chunk']:,}, {case['floor_tflops']:,.3g} TFLOP/s)"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["side"],
        f"{row['ms']:.2f}",
        f"{(row['ms_p80'] - row['ms_p20']) / row['ms']:.1%}",
        _number(row["of_floor"], ".3f"),
        "" if row["side"] == "ours" else _number(row["ours_is_faster_by"], ".2f", "x"),
        _number(row["graph_ms"], ".2f"),
        _number(row["extra_mib"], ",.0f"),
        *(_number(row["errors"][key], ".1e") for key in ("loss", "hidden_rms", "weight_rms")),
    ]


def _number(value: float | None, form: str, after: str = "") -> str:
    return "" if value is None else f"{value:{form}}{after}"


def _not_measured(result: dict[str, Any]) -> list[str]:
    """One line for each side and reason, with the cases that it concerns."""
    concerned: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["ms"] is None:
            told = f"{row['side']}: {row['status']}" + (f" ({row['reason']})" if row["reason"] else "")
            concerned.setdefault(told, []).append(row["case"])
        if row["graph_reason"] is not None:
            concerned.setdefault(f"{row['side']}: no CUDA graph ({row['graph_reason']})", []).append(row["case"])
    for case in result["cases"]:
        if case["reason"] is not None:
            concerned.setdefault(case["reason"], []).append(case["name"])
    return [
        f"{told}: {'all cases' if len(which) == len(result['cases']) else ', '.join(which)}"
        for told, which in concerned.items()
    ]
