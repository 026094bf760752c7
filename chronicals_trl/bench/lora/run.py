"""Run `bench lora`: for each layer and setting the sides of this process by turns, then Unsloth in one of its own."""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from chronicals_trl._versions import installed
from chronicals_trl.bench.common import NotOffered, explain, finite, versions
from chronicals_trl.bench.lora import layer as lora_layer
from chronicals_trl.bench.lora import measure as lora_measure
from chronicals_trl.bench.lora import sides as lora_sides
from chronicals_trl.bench.lora import verdict as lora_verdict
from chronicals_trl.bench.lora.cases import Layer, Setting, not_offered
from chronicals_trl.bench.lora.timing import STEP_PASSES
from chronicals_trl.bench.process import run_apart
from chronicals_trl.bench.sft.cases import LORA_ALPHA, LORA_RANK
from chronicals_trl.bench.sft.models import gemm_tflops

__all__ = ["Settings", "run"]

_APART = ("unsloth",)
#: What a row has; a side fills in what it measures.
_EMPTY: dict[str, Any] = dict.fromkeys(
    (
        "reason", "gpu_ms", "gpu_ms_p20", "gpu_ms_p80", "step_ms", "step_ms_p20", "step_ms_p80", "host_ms", "queued",
        "queued_passes", "sleep_ms", "issue_ms", "peak_mib", "saved_mib", "errors", "parts", "ours_is_faster_by",
        "ours_step_is_faster_by",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What to run, and how.

    Args:
        layers, settings, sides: In this order.
        skipped: Side to the reason why it is not run; reported as such.
        device: A CUDA device, or the CPU for a dry run with one tiny layer.
        rounds, samples: Rounds, and samples of each side in each.
        timeout: Seconds for the process of one peer and layer.
        logs: Folder for what each process says.
        python, pythonpath: Side to an interpreter, or to a folder put first on its path.
        keep: Called with the result so far after each case.
    """

    layers: Sequence[Layer]
    settings: Sequence[Setting]
    sides: Sequence[str]
    skipped: Mapping[str, str]
    device: torch.device
    rounds: int
    samples: int
    timeout: float
    logs: Path
    python: Mapping[str, str] = field(default_factory=dict)
    pythonpath: Mapping[str, str] = field(default_factory=dict)
    keep: Callable[[dict[str, Any]], None] = lambda result: None


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all cases; returns what the JSON file holds. `say` is given a line for each case as it is done."""
    start = time.perf_counter()
    dry_run = settings.device.type != "cuda"
    cases: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []

    def result() -> dict[str, Any]:
        _compare(rows)
        return {
            "benchmark": "lora",
            "dry_run": dry_run,
            "method": "cpu dry run" if dry_run else _method(settings),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 1),
            "gpu": None if dry_run else torch.cuda.get_device_name(settings.device),
            "versions": versions("torch", "triton", "transformers", "peft", "bitsandbytes"),
            "rank": LORA_RANK,
            "alpha": LORA_ALPHA,
            "layers": layers,
            "cases": cases,
            "rows": rows,
            "verdict": [] if dry_run else [asdict(judged) for judged in lora_verdict.judge(rows)],
        }

    with tempfile.TemporaryDirectory(prefix="bench-lora-") as scratch:
        for layer in settings.layers:
            folder = Path(scratch) / layer.name
            lora_layer.write_model(layer, folder / "model")
            lora_measure.release()
            about = {
                "layer": layer.name, "tokens": layer.tokens, "row": layer.row, "hidden": layer.shape.hidden,
                "intermediate": layer.shape.intermediate, "checked_tokens": layer.checked,
                "gemm_tflops": gemm_tflops(),
            }  # fmt: skip
            layers.append(about)
            apart: list[tuple[dict[str, Any], dict[str, Any]]] = []  # a task for the other process, and its row
            for setting in settings.settings:
                begun = time.perf_counter()
                case, new, task = _run_case(layer, setting, folder, settings)
                cases.append(case)
                rows += new
                apart += [(task, row) for row in new if row["status"] == "waiting" and task is not None]
                took = time.perf_counter() - begun
                total = len(settings.layers) * len(settings.settings)
                say(f"[{len(cases)}/{total}] {_summary(case, new)} ({took:.0f} s)")
                settings.keep(result())
            for side in _APART:
                waiting = [(task, row) for task, row in apart if row["side"] == side]
                if waiting:
                    about[side] = _run_apart(side, layer, folder, waiting, settings)
                    say(f"{layer.name}, {side}: " + ", ".join(_told(row, row["setting"]) for _, row in waiting))
                    settings.keep(result())
    return result()


def _run_case(
    layer: Layer, setting: Setting, folder: Path, settings: Settings
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any] | None]:
    """The case, its rows (a peer's that runs apart is "waiting"), and what such a peer is to do."""
    name = f"{layer.name} {setting.name}"
    case: dict[str, Any] = {"name": name, "layer": layer.name, **_told_setting(setting), "peft_errors": None}

    def row(side: str, status: str, reason: str | None = None) -> dict[str, Any]:
        of_case = {"case": name, "layer": layer.name, "setting": setting.name, "side": side, "status": status}
        return {**of_case, **_EMPTY, "reason": reason}

    rows = [row(side, "not run") for side in settings.sides]
    rows += [row(side, "not run", reason) for side, reason in settings.skipped.items()]
    here = [each for each in rows if each["side"] in settings.sides]
    for each in here:
        reason = not_offered(each["side"], setting)
        if reason is not None:
            each |= {"status": "not offered", "reason": reason}
    here = [each for each in here if each["status"] == "not run"]
    task = None
    try:
        if setting.four_bit and (installed("bitsandbytes") is None or settings.device.type != "cuda"):
            raise NotOffered("4-bit weights need bitsandbytes and a GPU")
        task = _measure_here(case, here, layer, setting, folder, settings)
    except Exception as error:
        status, reason = explain(error)
        for each in here:
            each |= {"status": status, "reason": f"before any side ran: {reason}"}
    lora_measure.release()
    return case, rows, task


def _measure_here(
    case: dict[str, Any], rows: list[dict[str, Any]], layer: Layer, setting: Setting, folder: Path, settings: Settings
) -> dict[str, Any]:
    """Fill in the rows of this process's sides; one side's failure is its own. Returns the task for the others."""
    torch._dynamo.reset()
    model = lora_layer.load(folder / "model", setting)
    values = lora_layer.make_adapters(model)
    lora_layer.set_adapters(model, values)
    checked = lora_layer.make_inputs(layer, layer.checked, layer.checked, settings.device)
    exact = lora_layer.exact_gradients(folder / "model", model, setting, values, checked)
    of_peft = lora_measure.errors_of(lora_sides.stock(model, setting), checked, exact)
    case["peft_errors"] = {kind: finite(value) for kind, value in of_peft.items()}
    inputs = lora_layer.make_inputs(layer, layer.tokens, layer.row, settings.device)
    going: list[tuple[dict[str, Any], lora_measure.Measured]] = []
    for row in rows:
        if row["side"] in _APART:
            row["status"] = "waiting"
            continue
        try:
            if row["side"] == "ours":
                runner, row["parts"] = lora_sides.ours(folder / "model", setting, values)
            else:
                make = {"peft": lora_sides.stock, "peft-compiled": lora_sides.compiled}[row["side"]]
                runner = make(model, setting)
            row |= lora_measure.check(runner, checked, exact, of_peft, setting)
            if row["status"] == "ok":
                going.append((row, lora_measure.Measured(lora_layer.Pass(runner, inputs))))
        except Exception as error:
            row["status"], row["reason"] = explain(error)
    queue = lora_measure.queue_of(settings.device)
    lora_measure.time_by_turns([side for _, side in going], queue, settings.rounds, settings.samples)
    for row, side in going:
        row |= side.figures()
    tensors = folder / f"{setting.name}.pt"
    torch.save({"x": checked.x, "grad": checked.grad, "adapters": values, "exact": exact}, tensors)
    return {"setting": setting.name, "tensors": str(tensors), "peft_errors": of_peft}


# -- a peer's process ---------------------------------------------------------------------------------------------


def _run_apart(
    side: str, layer: Layer, folder: Path, waiting: Sequence[tuple[dict[str, Any], dict[str, Any]]], settings: Settings
) -> dict[str, Any]:
    """Fill in the rows of a side that has a process of its own; returns its versions and its rate of products."""
    given, found = folder / f"{side}.json", folder / f"{side}-result.json"
    given.write_text(
        json.dumps(
            {
                "layer": layer.name,
                "folder": str(folder / "model"),
                "rounds": settings.rounds,
                "samples": settings.samples,
                "cases": [task for task, _ in waiting],
            }
        )
    )
    settings.logs.mkdir(parents=True, exist_ok=True)
    command = [settings.python.get(side, sys.executable), "-m", "chronicals_trl.bench.lora.worker"]
    work = folder / side
    work.mkdir()
    ended = run_apart(
        [*command, str(given), str(found)], first=settings.pythonpath.get(side), folder=work,
        log=settings.logs / f"{side}_{layer.name}.log", timeout=settings.timeout,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(found.read_text()) if found.exists() else {"cases": {}}
    for task, row in waiting:
        missing = {"status": "failed", "reason": ended.told}
        row |= result["cases"].get(task["setting"], missing)
    return {key: result.get(key) for key in ("versions", "gemm_tflops")}


# -- figures ------------------------------------------------------------------------------------------------------


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """How much faster ours is: without the host where both were queued ahead, and with it."""
    ours = {row["case"]: row for row in rows if row["side"] == "ours" and row["status"] == "ok"}
    for row in rows:
        mine = ours.get(row["case"])
        if mine is None or row["status"] != "ok":
            continue
        row["ours_step_is_faster_by"] = row["step_ms"] / mine["step_ms"]
        if row["queued"] and mine["queued"]:
            row["ours_is_faster_by"] = row["gpu_ms"] / mine["gpu_ms"]


def _told_setting(setting: Setting) -> dict[str, Any]:
    return {"setting": setting.name, **{k: v for k, v in asdict(setting).items() if k != "name"}}


def _method(settings: Settings) -> str:
    return (
        f"gpu_ms: launches queued behind a sleep of the GPU; step_ms: {STEP_PASSES} passes from idle to idle; medians "
        f"of {settings.rounds * settings.samples}, sides of a process by turns in {settings.rounds} rounds"
    )


def _told(row: dict[str, Any], name: str) -> str:
    if row["status"] != "ok":
        return f"{name} {row['status']}"
    gpu = "" if row["gpu_ms"] is None else f"{row['gpu_ms']:.2f}{'' if row['queued'] else '*'} / "
    return f"{name} {gpu}{row['step_ms']:.2f}"


def _summary(case: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The case on one line: milliseconds on the GPU, and with the host."""
    return f"{case['name']}, ms: " + ", ".join(_told(row, row["side"]) for row in rows)
