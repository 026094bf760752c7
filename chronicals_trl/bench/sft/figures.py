"""What follows from the measurements of a side: rates, shares, and how far it is from the floor."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from chronicals_trl.bench.sft.cases import Shape, training_flops
from chronicals_trl.bench.timing import quantile
from chronicals_trl.observe.flops import datasheet_tflops

__all__ = ["finish_row", "floor_summary"]


def finish_row(
    row: dict[str, Any],
    shape: Shape,
    mode: str,
    gpu: str | None,
    gemm_tflops: float | None,
    floor: Mapping[str, Any],
) -> None:
    """What follows from the runs of a side.

    Args:
        row: Given these figures.
        gemm_tflops: Of a large product, measured in this run.
        floor: What `floor.measure` found, or why it did not; empty if it was not asked for.
    """
    runs = row["runs"]
    failed = next((run for run in runs if run["status"] != "ok"), None)
    if runs:
        row["status"], row["reason"] = ("ok", None) if failed is None else (failed["status"], failed["reason"])
    windows = [] if failed is not None else [window for run in runs for window in run["windows"]]
    rates = [window["tokens"] / window["seconds"] for window in windows]
    steps = [ms for window in windows for ms in window["step_ms"]]
    row["tokens_per_second"] = statistics.median(rates) if rates else None
    row["rates"] = rates
    row["spread"] = (max(rates) - min(rates)) / statistics.median(rates) if rates else None
    row["step_ms"], row["step_ms_p20"], row["step_ms_p80"] = (
        quantile(steps, q) if steps else None for q in (0.5, 0.2, 0.8)
    )
    count = sum(window["steps"] for window in windows)
    for key in ("tokens", "documents", "positions"):
        row[f"{key}_per_step"] = sum(window[key] for window in windows) / count if count else None
    peaks = [run["peak_memory_gib"] for run in runs if run.get("peak_memory_gib") is not None]
    row["peak_memory_gib"] = max(peaks) if peaks and failed is None else None
    rate = [
        training_flops(shape, mode, window["tokens"], window["squares"]) / window["seconds"] / 1e12
        for window in windows
    ]
    row["tflops"] = statistics.median(rate) if rate else None
    row["mfu"] = _share(row["tflops"], datasheet_tflops(gpu))
    row["of_gemm"] = _share(row["tflops"], gemm_tflops)
    row["of_gemm_in_place"] = _share(row["tflops"], floor.get("gemm_tflops"))
    same_work = (row.get("packs"), row.get("rows")) == (floor.get("packs"), floor.get("rows"))
    row["over_floor"] = _share(row["step_ms"], floor.get("floor_ms")) if same_work else None


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def floor_summary(floor: Mapping[str, Any]) -> str:
    """One line."""
    if floor["status"] != "ok":
        return f"floor: {floor['status']} ({floor['reason']})"
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in floor["parts_ms"].items())
    figures = f"{floor['floor_ms']:.1f} ms (sum {floor['sum_ms']:.1f}: {parts}; replayed {floor['replayed_ms']:.1f})"
    walls = f"GEMMs at {floor['gemm_tflops']:,.3g} TFLOP/s, {floor['bandwidth_gbps']:,.0f} GB/s"
    return f"floor: {figures}, {walls} ({floor['seconds']:.0f} s)"
