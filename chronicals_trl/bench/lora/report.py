"""What a run of `bench lora` found, as tables for the terminal and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chronicals_trl.bench.report import COLORS, DRY_RUN, print_table, print_verdict, pyplot, save_plot

__all__ = ["print_tables", "write_plot"]

_TIMES = ("setting", "side", "gpu ms", "spread", "ours is", "step ms", "spread", "ours is", "host ms")
_REST = ("setting", "side", "peak MiB", "saved MiB", "A off", "B off", "x off")
_COLORS = {"ours": COLORS["ours"], "peft": COLORS["eager"], "peft-compiled": COLORS["compile"], "unsloth": "#66a182"}


def print_tables(result: dict[str, Any]) -> None:
    """The figures, a table a layer; what could not be measured; the verdict."""
    print(f"{DRY_RUN if result['dry_run'] else result['gpu']}. {result['method']}.")
    print("off: from fp64 by norm, the worst gradient. *: the host was not ahead, so the time has the host in it.")
    for layer in result["layers"]:
        of_layer = [row for row in result["rows"] if row["layer"] == layer["layer"] and row["status"] == "ok"]
        print_table(_title(layer), _TIMES, [_times(row, result["dry_run"]) for row in of_layer], 2)
        print_table("Memory above what was there before, and gradients", _REST, [_rest(row) for row in of_layer], 2)
    for line in _not_measured(result["rows"]):
        print(line)
    print_verdict(result)


def write_plot(result: dict[str, Any], path: Path) -> str | None:
    """A panel a layer: a bar a side and setting for the GPU's time, and a mark where a step is; returns why there is
    no plot, or None.
    """
    plt = pyplot()
    if isinstance(plt, str):
        return plt
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    layers = [layer for layer in result["layers"] if any(row["layer"] == layer["layer"] for row in rows)]
    if not layers:
        return "no plot: nothing was measured"
    count = max(sum(row["layer"] == layer["layer"] for row in rows) for layer in layers)
    size = (7 * len(layers), 1.5 + 0.28 * count)
    figure, axes = plt.subplots(1, len(layers), figsize=size, squeeze=False, layout="constrained")
    for axis, layer in zip(axes.flat, layers, strict=True):
        bars = [row for row in rows if row["layer"] == layer["layer"]]
        for at, row in enumerate(bars):
            gpu = row["gpu_ms"] if row["gpu_ms"] is not None else row["step_ms"]
            axis.barh(at, gpu, color=_COLORS.get(row["side"]))
            axis.plot([gpu, row["step_ms"]], [at, at], color="black", linewidth=0.8)
            axis.plot(row["step_ms"], at, "|", color="black")
            end = max(gpu, row["step_ms"])
            axis.annotate(f"  {_time(row)} / {row['step_ms']:.2f}", (end, at), va="center", fontsize=7)
        axis.set_yticks(range(len(bars)), [f"{row['setting']}: {row['side']}" for row in bars], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.3 * axis.get_xlim()[1])  # room for the figures
        axis.set_xlabel("ms, forward + backward: GPU (bar) / with the host (mark)", fontsize=8)
        axis.set_title(f"{layer['layer']}: {layer['tokens']:,} tokens", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    where = DRY_RUN if result["dry_run"] else result["gpu"]
    save_plot(figure, path, f"One decoder layer with LoRA, rank {result['rank']}: {where}")
    return None


def _title(layer: dict[str, Any]) -> str:
    title = f"{layer['layer']}, {layer['tokens']:,} tokens, hidden {layer['hidden']}, {layer['intermediate']}"
    rates = {"here": layer["gemm_tflops"], "unsloth": (layer.get("unsloth") or {}).get("gemm_tflops")}
    told = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items() if rate is not None)
    return title + (f"; GEMM TFLOP/s: {told}" if told else "")


def _times(row: dict[str, Any], dry_run: bool) -> list[str]:
    no_ratio = dry_run or row["side"] == "ours"
    return [
        row["setting"],
        row["side"],
        _time(row),
        _spread(row, "gpu_ms"),
        "" if no_ratio else _number(row["ours_is_faster_by"], ".2f", "x"),
        _number(row["step_ms"], ".2f"),
        _spread(row, "step_ms"),
        "" if no_ratio else _number(row["ours_step_is_faster_by"], ".2f", "x"),
        _number(row["host_ms"], ".2f"),
    ]


def _rest(row: dict[str, Any]) -> list[str]:
    figures = [_number(row[key], ",.0f") for key in ("peak_mib", "saved_mib")]
    return [row["setting"], row["side"], *figures, *(_number(row["errors"][kind], ".1e") for kind in ("A", "B", "x"))]


def _spread(row: dict[str, Any], key: str) -> str:
    return "" if not row[key] else f"{(row[f'{key}_p80'] - row[f'{key}_p20']) / row[key]:.1%}"


def _time(row: dict[str, Any]) -> str:
    return _number(row["gpu_ms"], ".2f", "" if row["queued"] else "*")


def _number(value: float | None, form: str, after: str = "") -> str:
    return "" if value is None else f"{value:{form}}{after}"


def _not_measured(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each side and reason, with the cases that it concerns."""
    concerned: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            concerned.setdefault(f"{row['side']}: {row['status']} ({row['reason']})", []).append(row["case"])
    return [f"{told}: {', '.join(which)}" for told, which in concerned.items()]
