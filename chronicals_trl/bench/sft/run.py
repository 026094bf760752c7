"""Run the sides of `bench sft` in turn, each in a process of its own, and gather what they measured.

A side that fails, hangs or is not there is a row with the reason. Repeats are windows within one process (one start-up
a side), or, with `fresh`, processes of their own in the order A, B, C, A, B, C, so that what drifts is in all sides.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chronicals_trl.bench.common import versions
from chronicals_trl.bench.process import run_apart
from chronicals_trl.bench.sft import verdict as sft_verdict
from chronicals_trl.bench.sft.ablation import gains
from chronicals_trl.bench.sft.cases import (
    PROTOCOLS,
    SHAPES,
    SIDES,
    Documents,
    Task,
    batch_rows,
    make_documents,
)
from chronicals_trl.bench.sft.figures import finish_row, floor_summary
from chronicals_trl.observe.flops import datasheet_tflops

__all__ = ["Settings", "run"]

#: Whose floor it is.
FLOOR_OF = "chronicals"


@dataclass(frozen=True)
class Settings:
    """What to run, and how.

    Args:
        sides: In this order.
        mode, shape, protocol, checkpointing: As in `sft.Task`.
        row_tokens, tokens_per_step: Of the packed protocol; rows a step are their quotient.
        documents_per_step: Of the short protocol.
        warm_up, steps, repeats: Steps that are not timed, steps of a window, windows.
        fresh: A process for each repeat.
        learning_rate, seed: The same for all.
        timeout: Seconds for one process.
        models: Folder that keeps models between runs; None: a temporary one.
        logs: Folder for what each process says.
        python, pythonpath: Side, or the part of its name before "-", to an interpreter or a folder put first on its
            path.
        chronicals: `chronicals_config` of our sides.
        master: As in `sft.Task`.
        floor: Measure the floor of our side too.
        keep: Called with the result so far after each process.
    """

    sides: Sequence[str]
    mode: str
    shape: str
    protocol: str
    checkpointing: str
    row_tokens: int
    tokens_per_step: int
    documents_per_step: int
    warm_up: int
    steps: int
    repeats: int
    fresh: bool
    learning_rate: float
    seed: int
    timeout: float
    models: Path | None
    logs: Path
    python: Mapping[str, str] = field(default_factory=dict)
    pythonpath: Mapping[str, str] = field(default_factory=dict)
    chronicals: Mapping[str, Any] = field(default_factory=dict)
    master: str = "bf16"
    floor: bool = False
    keep: Callable[[dict[str, Any]], None] = lambda result: None


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all sides; returns what the JSON file holds. `say` is given a line for each process as it is done."""
    start = time.perf_counter()
    shape = SHAPES[settings.shape]
    rows: list[dict[str, Any]] = [
        {"side": name, "told": SIDES[name].told, "status": "not run", "reason": None, "runs": []}
        for name in settings.sides
    ]
    prepared: dict[str, Any] = {}
    floor: dict[str, Any] = {}
    data: dict[str, Any] = {}

    def result() -> dict[str, Any]:
        gpu = prepared.get("gpu")
        for row in rows:
            finish_row(row, shape, settings.mode, gpu, prepared.get("gemm_tflops"), floor)
        judged = sft_verdict.judge_validity(rows)
        valid = {row["side"]: row["tokens_per_second"] for row in rows if row["status"] == "ok"}
        for row in rows:
            ours, theirs = valid.get("chronicals"), valid.get(row["side"])
            row["ours_is_faster_by"] = None if not ours or not theirs else ours / theirs
        return {
            "benchmark": "sft",
            "dry_run": gpu is None,
            "method": _method(settings),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 1),
            "gpu": gpu,
            "datasheet_tflops": datasheet_tflops(gpu),
            "gemm_tflops": prepared.get("gemm_tflops"),
            "floor": floor or None,
            "versions": versions("torch", "triton", "transformers", "trl", "peft", "datasets"),
            "settings": _told(settings),
            "shape": {**asdict(shape), "linear_weights": shape.linear_weights, "head_weights": shape.head_weights},
            "documents": data,
            "validity": judged,
            "rows": rows,
            "ablation": gains(rows) or None,
            "verdict": [] if gpu is None else [asdict(each) for each in sft_verdict.judge(settings, rows)],
        }

    settings.logs.mkdir(parents=True, exist_ok=True)
    for name in ("prepare", "floor", *settings.sides):
        (settings.logs / f"{name}.log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-sft-") as scratch:
        work = Path(scratch)
        documents, mean_length, tasks = _tasks(settings, work)
        for row in rows:
            row["rows"], row["packs"] = tasks[row["side"]].rows, tasks[row["side"]].packs
        data |= {
            "documents": len(documents.lengths), "tokens": int(documents.lengths.sum()), "mean_length": mean_length,
            "median_length": float(statistics.median(documents.lengths.tolist())),
            "longest": int(documents.lengths.max()),
        }  # fmt: skip
        model = settings.models / f"{shape.name}-{settings.seed}" if settings.models else work / "model"
        given = {"shape": shape.name, "seed": settings.seed, "folder": str(model.resolve())}
        prepared |= _process("prepare", given, "prepare", settings, work)
        if prepared["status"] != "ok":
            for row in rows:
                row["status"], row["reason"] = "not run", f"no model: {prepared['reason']}"
            return result()
        say(f"{shape.name} made: {prepared['gpu'] or 'no GPU'}")
        if settings.floor:
            floor |= _process("floor", asdict(tasks[FLOOR_OF]), "floor", settings, work)
            say(floor_summary(floor))
            settings.keep(result())
        rounds = settings.repeats if settings.fresh else 1
        for number in range(rounds):
            for row in rows:
                if row["runs"] and row["runs"][-1]["status"] != "ok":
                    continue  # it will fail again
                task = {**asdict(tasks[row["side"]]), "model": given["folder"]}
                begun = time.perf_counter()
                row["runs"].append(_process("train", task, row["side"], settings, work))
                kept = result()
                took = time.perf_counter() - begun
                say(
                    f"[{number * len(rows) + rows.index(row) + 1}/{rounds * len(rows)}] {_summary(row)} ({took:.0f} s)"
                )
                settings.keep(kept)
        return result()


def _tasks(settings: Settings, work: Path) -> tuple[Documents, float, dict[str, Task]]:
    """The documents of this run, their mean length, and what each side is asked to do with them."""
    shape, protocol = SHAPES[settings.shape], PROTOCOLS[settings.protocol]
    rows = settings.tokens_per_step // settings.row_tokens if protocol.packs else settings.documents_per_step
    windows = 1 if settings.fresh else settings.repeats
    total = settings.warm_up + windows * settings.steps
    # Packing leaves rows out that do not fill a step; and no side should come to the data's end.
    slack = 1.1
    tokens = int(slack * total * settings.tokens_per_step) if protocol.packs else 0
    documents = make_documents(
        protocol, shape.vocab, settings.row_tokens, tokens, int(slack * total * rows) + 64, settings.seed
    )
    documents.save(str(work / "documents.npz"))
    mean_length = float(documents.lengths.mean())
    tasks = {}
    for name in {*settings.sides, FLOOR_OF}:
        of_side, packs = batch_rows(SIDES[name], protocol, rows, settings.row_tokens, mean_length)
        tasks[name] = Task(
            side=name, mode=settings.mode, shape=shape.name, protocol=protocol.name,
            checkpointing=settings.checkpointing, model="", documents=str(work / "documents.npz"),
            row_tokens=settings.row_tokens, rows=of_side, packs=packs, warm_up=settings.warm_up, steps=settings.steps,
            windows=windows, learning_rate=settings.learning_rate, seed=settings.seed,
            chronicals=dict(settings.chronicals), master=settings.master,
        )  # fmt: skip
    return documents, mean_length, tasks


# -- processes ----------------------------------------------------------------------------------------------------


def _process(what: str, given: dict[str, Any], name: str, settings: Settings, work: Path) -> dict[str, Any]:
    """What the process wrote, or status and reason if it wrote nothing."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=work))  # peers leave files where they run
    task, found = folder / "task.json", folder / "result.json"
    task.write_text(json.dumps(given))
    python = _of_side(settings.python, name) or sys.executable
    command = [python, "-m", "chronicals_trl.bench.sft.worker", what, str(task), str(found)]
    ended = run_apart(
        command, first=_of_side(settings.pythonpath, name), folder=folder, log=settings.logs / f"{name}.log",
        timeout=settings.timeout,
    )  # fmt: skip
    if not ended.in_time or not found.exists():
        return {"status": "failed", "reason": ended.told}
    result: dict[str, Any] = json.loads(found.read_text())
    if result["reason"]:
        result["reason"] = result["reason"].replace(str(work), "")  # no folder of this machine
    return result


def _of_side(given: Mapping[str, str], name: str) -> str | None:
    return given.get(name, given.get(name.split("-")[0]))


# -- what is told ------------------------------------------------------------------------------------------------


def _method(settings: Settings) -> str:
    where = "processes of their own, interleaved" if settings.fresh else "windows in one process"
    return (
        f"{settings.repeats} x {settings.steps} steps after {settings.warm_up} of warm-up, repeats as {where}; "
        "GPU idle at both ends of a window; real tokens counted from the batches"
    )


def _told(settings: Settings) -> dict[str, Any]:
    """What can be told of the settings: folders of the machine stay out."""
    left_out = ("keep", "models", "logs", "python", "pythonpath")
    told = {key: value for key, value in vars(settings).items() if key not in left_out}
    return {**told, "sides": list(settings.sides), "chronicals": dict(settings.chronicals)}


def _summary(row: dict[str, Any]) -> str:
    if row["tokens_per_second"] is None:
        return f"{row['side']}: {row['status']} ({row['reason']})"
    memory = "" if row["peak_memory_gib"] is None else f", {row['peak_memory_gib']:.1f} GiB"
    figures = f"{row['tokens_per_second']:,.0f} tokens/s, {row['step_ms']:.1f} ms a step"
    return f"{row['side']}: {figures}{memory}, {row['status']}"
