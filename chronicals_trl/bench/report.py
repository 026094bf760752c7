"""What every benchmark needs to tell what it found: a table for the terminal, the verdict, JSON, a plot."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chronicals_trl.bench.verdict import beyond

__all__ = [
    "COLORS",
    "file_stem",
    "print_table",
    "print_verdict",
    "pyplot",
    "save_plot",
    "verdict_lines",
    "write_json",
]

DRY_RUN = "CPU DRY RUN: no GPU here, so the times mean nothing"

COLORS = {"ours": "#d1495b", "eager": "#8d99ae", "compile": "#edae49", "liger": "#30638e", "quack": "#66a182"}


def file_stem(gpu: str | None, benchmark: str = "ops") -> str:
    """`bench_ops_h100` for "NVIDIA H100 80GB HBM3", `bench_ops_cpu` for None."""
    name = "cpu" if gpu is None else re.sub(r"nvidia|geforce|\b\d+ ?gb.*", "", gpu.lower())
    return f"bench_{benchmark}_" + re.sub(r"[^a-z0-9]+", "_", name).strip("_")


def print_verdict(result: dict[str, Any]) -> None:
    """Each target, whether it was met, and its figures; nothing of a dry run is one."""
    if result["dry_run"]:
        print("Verdict: none, the targets are for a GPU.")
    else:
        title = "Verdict at the shapes of this run"
        print_table(title, ("target", "outcome", "figures (worst first)"), verdict_lines(result["verdict"]), 3)


def write_json(result: dict[str, Any], path: Path) -> None:
    """Strict JSON: a NaN would be an error here."""
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def save_plot(figure: Any, path: Path, title: str | None = None) -> None:
    """Write a figure of `pyplot`, under `title` if it has none yet, and let go of it."""
    if title is not None:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files; or why there is no plot."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'chronicals-trl[bench]')"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def verdict_lines(judged: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for each in judged:
        at_most = each["at_most"]
        ordered = sorted(each["figures"].items(), key=lambda item: item[1], reverse=at_most is not None)
        # All that missed, or the six worst: three shapes both ways.
        shown = [f"{key} {value:.3f}" for key, value in ordered if beyond(value, each["at_least"], at_most)]
        shown = shown or [f"{key} {value:.3f}" for key, value in ordered[:6]]
        shown += [f"{key}: {reason}" for key, reason in list(each["missing"].items())[:3]]
        lines.append([each["target"], each["outcome"], "; ".join(shown)])
    return lines


def print_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], text_columns: int) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(_plain_table(title, columns, lines, text_columns))
        return
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        left = index < text_columns
        table.add_column(column, justify="left" if left else "right", no_wrap=index < len(columns) - 1)
    styles = {"met": "green", "missed": "red", "not measured": "yellow", "ours": "bold"}
    for line in lines:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in line))
    # Not to a terminal, rich would cut to 80 columns.
    Console(width=max(shutil.get_terminal_size().columns, 120)).print(table)


def _plain_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], text_columns: int) -> str:
    widths = [max(len(column), *(len(line[i]) for line in lines), 0) for i, column in enumerate(columns)]
    rows = [columns, ["-" * width for width in widths], *lines]
    padded = (
        "  ".join(cell.ljust(w) if i < text_columns else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )  # fmt: skip
    return "\n".join([title, *padded])
