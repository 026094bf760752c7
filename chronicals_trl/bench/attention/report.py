"""What a run of `bench attention` found, as tables for the terminal and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chronicals_trl.bench.report import COLORS, DRY_RUN, print_table, print_verdict, pyplot, save_plot

__all__ = ["print_tables", "write_plot"]

_COLUMNS = (
    "side", "forward us", "spread", "backward us", "spread", "both us", "of direct", "host us", "off from fp64",
)  # fmt: skip
_OURS, _PEER = COLORS["ours"], COLORS["eager"]


def print_tables(result: dict[str, Any]) -> None:
    """The figures, a table a case; what could not be measured; the verdict."""
    print(f"{DRY_RUN if result['dry_run'] else result['gpu']}; {result['dtype']}, {result['method']}.")
    print("of direct: ours over the same kernel called directly, forward and both ways. host us: a forward call.")
    for case in result["cases"]:
        rows = [row for row in result["rows"] if row["case"] == case["name"] and row["forward"] is not None]
        print_table(f"{case['name']}: {_sizes(case)}", _COLUMNS, [_cells(row) for row in rows], 1)
    for line in _not_measured(result["rows"]):
        print(line)
    print_verdict(result)


def write_plot(result: dict[str, Any], path: Path) -> str | None:
    """A panel a shape: forward and backward of each side, stacked; returns why there is no plot, or None."""
    plt = pyplot()
    if isinstance(plt, str):
        return plt
    measured = {
        case["name"]: [row for row in result["rows"] if row["case"] == case["name"] and row["forward"] is not None]
        for case in result["cases"]
    }
    shapes = list(dict.fromkeys(case["shape"] for case in result["cases"] if measured[case["name"]]))
    if not shapes:
        return "no plot: nothing was measured"
    figure, axes = plt.subplots(1, len(shapes), figsize=(7 * len(shapes), 5), squeeze=False, layout="constrained")
    for axis, shape in zip(axes.flat, shapes, strict=True):
        cases = [case for case in result["cases"] if case["shape"] == shape]
        bars = [(f"{row['side']}{_empty(case)}", row) for case in cases for row in measured[case["name"]]]
        for at, (_, row) in enumerate(bars):
            color = _OURS if row["side"].startswith("ours") else _PEER
            forward, backward = row["forward"]["us"], row["backward"]["us"]
            axis.barh(at, forward, color=color)
            axis.barh(at, backward, left=forward, color=color, alpha=0.5)
            axis.annotate(
                f" {forward:,.0f} + {backward:,.0f}", (forward + backward, at), va="center", fontsize=7,
            )  # fmt: skip
        axis.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.margins(x=0.25)
        axis.set_xlabel("us, forward (full colour) + backward, logarithmic", fontsize=8)
        axis.set_title(f"{shape}: {_sizes(cases[0])}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    where = DRY_RUN if result["dry_run"] else result["gpu"]
    save_plot(figure, path, f"Attention within packed documents: {where}, {result['dtype']}")
    return None


def _empty(case: dict[str, Any]) -> str:
    return f" +{case['empty']} empty" if case["empty"] else ""


def _sizes(case: dict[str, Any]) -> str:
    heads = f"{case['q_heads']}/{case['kv_heads']} heads of {case['head_dim']}"
    return f"{case['tokens']:,} tokens, {case['documents']} documents up to {case['max_seqlen']:,}, {heads}"


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["side"]]
    for timing in (row["forward"], row["backward"]):
        cells += [f"{timing['us']:.1f}", f"{(timing['us_p80'] - timing['us_p20']) / timing['us']:.1%}"]
    ratios = row["of_direct"]
    return [
        *cells,
        f"{row['both_us']:.1f}",
        "" if ratios is None else f"{ratios['forward']:.3f} {ratios['both']:.3f}",
        "" if row["host_us"] is None else f"{row['host_us']:.1f}",
        f"{row['error']:.1e}",
    ]


def _not_measured(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each side and reason, with the cases that it concerns."""
    concerned: dict[str, list[str]] = {}
    for row in rows:
        if row["forward"] is None:
            told = f"{row['side']}: {row['status']}" + (f" ({row['reason']})" if row["reason"] else "")
            concerned.setdefault(told, []).append(row["case"])
        if row["host_reason"] is not None:
            concerned.setdefault(f"{row['side']}: no host time ({row['host_reason']})", []).append(row["case"])
    return [f"{told}: {', '.join(which)}" for told, which in concerned.items()]
