"""`bench sft`: the runner, with processes that are stand-ins: what fails is a row, and what the file holds."""

from __future__ import annotations

import json
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from chronicals_trl.bench import process, report
from chronicals_trl.bench.sft import report as sft_report
from chronicals_trl.bench.sft import run as sft_run
from chronicals_trl.bench.sft.cases import Task
from chronicals_trl.bench.sft.count import Counted
from chronicals_trl.bench.sft.meter import Meter

STAND_IN = """#!{python} -S
import json, os, sys, time
_, module, what, given, result = sys.argv[1:]
assert module == "chronicals_trl.bench.sft.worker"
task = json.load(open(given))
print("hello from", task.get("side", what), "in", os.getcwd())
with open({calls!r}, "a") as calls:
    who = what if what == "floor" else task.get("side", what)
    calls.write(who + " " + os.environ["PYTHONPATH"].split(os.pathsep)[0] + "\\n")
"""
WORKS = """
if what == "prepare":
    found = {"gpu": "NVIDIA H100 80GB HBM3", "gemm_tflops": 500.0}
elif what == "floor":
    found = {"floor_ms": 200.0, "sum_ms": 200.0, "replayed_ms": 210.0, "parts_ms": {"gemm": 150.0, "attention": 50.0},
             "bandwidth_gbps": 3000.0, "gemm_tflops": 600.0, "seconds": 9.0, "real_tokens": 400, "task": task,
             "rows": task["rows"], "packs": task["packs"]}
else:
    steps = task["steps"]
    window = {"seconds": 2.0, "steps": steps, "step_ms": [2000.0 / steps] * steps, "tokens": 1000, "documents": 4,
              "squares": 250000, "positions": 1280}
    logs = [{"step": i + 1, "loss": 8.0 - i, "grad_norm": 1.0} for i in range(4)]
    found = {"windows": [{**window, "seconds": 2.0 + i} for i in range(task["windows"])], "logs": logs,
             "peak_memory_gib": 5.0, "trained_share": 0.5, "attention": "sdpa", "task": task}
json.dump({"status": "ok", "reason": None, **found}, open(result, "w"))
"""
CRASHES = "print('Segmentation fault, nearly'); sys.exit(139)\n"
HANGS = "import subprocess; subprocess.Popen(['sleep', '60']); time.sleep(60)\n"
REFUSES = 'json.dump({"status": "not installed", "reason": "No module named \'liger_kernel\'"}, open(result, "w"))\n'


@pytest.fixture
def interpreter(tmp_path: Path) -> Any:
    def make(name: str, body: str) -> str:
        path = tmp_path / name
        path.write_text(STAND_IN.format(python=sys.executable, calls=str(tmp_path / "calls")) + body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def settings(tmp_path: Path, python: dict[str, str], **changes: Any) -> sft_run.Settings:
    given: dict[str, Any] = {
        "sides": list(python), "mode": "lora", "shape": "tiny", "protocol": "packed", "checkpointing": "off",
        "row_tokens": 256, "tokens_per_step": 512, "documents_per_step": 2, "warm_up": 2, "steps": 4, "repeats": 3,
        "fresh": False, "learning_rate": 1e-4, "seed": 0, "timeout": 30.0, "models": None, "logs": tmp_path / "logs",
        "python": python, **changes,
    }  # fmt: skip
    given["sides"] = [side for side in given["sides"] if side not in ("prepare", "floor")]
    return sft_run.Settings(**given)


def run(made: sft_run.Settings) -> dict[str, Any]:
    result = sft_run.run(made, say=lambda line: None)
    json.dumps(result, allow_nan=False)
    return result


def calls(tmp_path: Path) -> list[str]:
    return [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]


def test_what_the_file_holds(tmp_path: Path, interpreter: Any) -> None:
    works = interpreter("works", WORKS)
    kept: list[list[str]] = []

    def keep(so_far: dict[str, Any]) -> None:
        kept.append([row["side"] for row in so_far["rows"] if row["runs"]])

    result = run(settings(tmp_path, {"prepare": works, "chronicals": works, "trl-liger": works}, keep=keep))
    assert (result["benchmark"], result["gpu"], result["dry_run"]) == ("sft", "NVIDIA H100 80GB HBM3", False)
    assert (result["datasheet_tflops"], result["gemm_tflops"]) == (989.0, 500.0)
    assert "3 x 4 steps after 2 of warm-up, repeats as windows in one process" in result["method"]
    assert result["settings"]["sides"] == ["chronicals", "trl-liger"]
    assert str(tmp_path) not in json.dumps({key: value for key, value in result.items() if key != "rows"})
    assert result["documents"]["tokens"] >= 14 * 512 and result["validity"]["reference"] == "trl-liger"
    ours, peer = result["rows"]
    assert ours["rates"] == [500.0, 1000 / 3, 250.0] and ours["tokens_per_second"] == 1000 / 3
    assert ours["spread"] == pytest.approx(0.75) and ours["step_ms"] == 500.0
    assert (ours["tokens_per_step"], ours["documents_per_step"], ours["positions_per_step"]) == (250, 1, 320)
    assert (ours["rows"], ours["packs"]) == (2, True)
    assert ours["peak_memory_gib"] == 5.0 and ours["status"] == "ok"
    assert ours["of_gemm"] == pytest.approx(ours["tflops"] / 500) and ours["mfu"] == pytest.approx(
        ours["tflops"] / 989
    )
    assert (ours["ours_is_faster_by"], peer["ours_is_faster_by"]) == (1.0, 1.0)
    task = ours["runs"][0]["task"]
    assert (task["rows"], task["packs"], task["row_tokens"], task["windows"]) == (2, True, 256, 3)
    assert kept == [["chronicals"], ["chronicals", "trl-liger"]]
    assert calls(tmp_path) == ["prepare", "chronicals", "trl-liger"]
    assert result["verdict"] and result["floor"] is None and result["ablation"] is None and ours["over_floor"] is None


@pytest.mark.parametrize("still", ["chronicals", "unsloth-packing"])
def test_nothing_is_faster_than_what_does_not_train(tmp_path: Path, interpreter: Any, still: str) -> None:
    works, flat = interpreter("works", WORKS), interpreter("flat", WORKS.replace("8.0 - i", "8.0"))
    sides = {name: flat if name == still else works for name in ("prepare", "chronicals", "unsloth-packing", "trl")}
    rows = {row["side"]: row for row in run(settings(tmp_path, sides))["rows"]}
    assert rows[still]["status"] == "invalid" and rows[still]["ours_is_faster_by"] is None
    assert rows["trl"]["ours_is_faster_by"] == (None if still == "chronicals" else 1.0)


def test_the_floor_is_a_process_of_the_run(tmp_path: Path, interpreter: Any) -> None:
    works = interpreter("works", WORKS)
    sides = {"prepare": works, "floor": works, "trl": works, "trl-liger": works, "chronicals": works}
    kept: list[bool] = []
    result = run(settings(tmp_path, sides, sides=["chronicals", "trl-liger", "trl"], floor=True, master="fp32",
                          keep=lambda so_far: kept.append(so_far["floor"] is not None)))  # fmt: skip
    assert calls(tmp_path) == ["prepare", "floor", "chronicals", "trl-liger", "trl"] and kept == [True] * 4
    found = result["floor"]
    assert (found["floor_ms"], found["task"]["side"], found["task"]["master"]) == (200.0, "chronicals", "fp32")
    ours, packed, padded = result["rows"]
    assert ours["runs"][0]["task"]["master"] == "fp32"
    assert ours["over_floor"] == packed["over_floor"] == 2.5 and padded["over_floor"] is None  # 500 ms; other work
    assert ours["of_gemm_in_place"] == pytest.approx(ours["tflops"] / 600)
    told = sft_report.floor_summary(found)
    assert told.startswith("floor: 200.0 ms (sum 200.0: gemm 150.0, attention 50.0; replayed 210.0)")
    sft_report.print_tables(result)
    assert sft_report.write_plot(result, tmp_path / "plot.png") is None


def test_the_plot_has_a_line_at_the_floor(tmp_path: Path, interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    works = interpreter("works", WORKS)
    result = run(settings(tmp_path, {"prepare": works, "floor": works, "trl-liger": works}, floor=True))
    drawn: list[Any] = []
    monkeypatch.setattr(sft_report, "save_plot", lambda figure, path: drawn.append(figure))
    assert sft_report.write_plot(result, tmp_path / "plot.png") is None
    (line,) = drawn[0].axes[0].lines[-1:]
    assert list(line.get_xdata()) == [2000.0, 2000.0]  # 400 tokens in 200 ms


def test_an_ablation_is_a_table_of_its_own(
    tmp_path: Path, interpreter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    works, names = interpreter("works", WORKS), ["ablation-0-off", "ablation-1-packing", "chronicals"]
    result = run(settings(tmp_path, {"prepare": works, **dict.fromkeys(names, works)}))
    assert [(each["added"], each["gain"]) for each in result["ablation"]] == [("nothing", None), ("packing", 1.0)]
    padded, packed = result["rows"][:2]
    assert (padded["packs"], packed["packs"]) == (False, True)
    sft_report.print_tables(result)
    told = capsys.readouterr().out
    assert "One part more in each row" in told and "1.000x" in told
    result["ablation"] = None
    sft_report.print_tables(result)
    assert "One part more" not in capsys.readouterr().out


def test_a_floor_that_fails_leaves_the_sides_their_figures(tmp_path: Path, interpreter: Any) -> None:
    works = interpreter("works", WORKS)
    sides = {"prepare": works, "floor": interpreter("crashes", CRASHES), "chronicals": works}
    result = run(settings(tmp_path, sides, floor=True))
    (ours,) = result["rows"]
    assert ours["status"] == "ok" and ours["over_floor"] is None and ours["of_gemm_in_place"] is None
    assert sft_report.floor_summary(result["floor"]).startswith("floor: failed (exit code 139; its last words:")
    sft_report.print_tables(result)
    assert sft_report.write_plot(result, tmp_path / "plot.png") is None


def test_a_side_that_fails_is_a_row(tmp_path: Path, interpreter: Any) -> None:
    works = interpreter("works", WORKS)
    sides = {
        "prepare": works, "trl": interpreter("crashes", CRASHES), "unsloth": interpreter("hangs", HANGS),
        "trl-liger": interpreter("refuses", REFUSES), "chronicals": works,
    }  # fmt: skip
    start = time.perf_counter()
    result = run(settings(tmp_path, sides, timeout=2.0))
    assert time.perf_counter() - start < 20
    rows = {row["side"]: row for row in result["rows"]}
    assert {side: row["status"] for side, row in rows.items()} == {
        "trl": "failed", "unsloth": "failed", "trl-liger": "not installed", "chronicals": "ok",
    }  # fmt: skip
    assert rows["trl"]["reason"] == "exit code 139; its last words: Segmentation fault, nearly"
    assert rows["unsloth"]["reason"].startswith("not done after 2 s; its last words: hello from unsloth")
    assert rows["trl-liger"]["reason"] == "No module named 'liger_kernel'"
    assert rows["trl"]["tokens_per_second"] is None and rows["trl"]["ours_is_faster_by"] is None
    assert "hello from trl in" in (tmp_path / "logs" / "trl.log").read_text()
    sft_report.print_tables(result)
    assert sft_report.write_plot(result, tmp_path / "plot.png") is None or not report.pyplot()


def test_an_interpreter_that_does_not_start_is_a_row(tmp_path: Path, interpreter: Any) -> None:
    works = interpreter("works", WORKS)
    sides = {"prepare": works, "trl": str(tmp_path / "gone"), "chronicals": works}
    stock, ours = run(settings(tmp_path, sides))["rows"]
    assert stock["status"] == "failed" and "does not start: No such file or directory" in stock["reason"]
    assert ours["status"] == "ok"


def test_without_a_model_nothing_runs(tmp_path: Path, interpreter: Any) -> None:
    sides = {"prepare": interpreter("crashes", CRASHES), "chronicals": interpreter("works", WORKS)}
    (row,) = run(settings(tmp_path, sides))["rows"]
    assert row["status"] == "not run" and "no model: exit code 139" in row["reason"]
    assert calls(tmp_path) == ["prepare"]


def test_repeats_as_processes_are_interleaved(tmp_path: Path, interpreter: Any) -> None:
    works = interpreter("works", WORKS)
    sides = {"prepare": works, "chronicals": works, "trl": works, "unsloth": interpreter("crashes", CRASHES)}
    result = run(settings(tmp_path, sides, fresh=True))
    # One that failed is not asked again.
    assert calls(tmp_path) == [
        "prepare", "chronicals", "trl", "unsloth", "chronicals", "trl", "chronicals", "trl",
    ]  # fmt: skip
    ours = result["rows"][0]
    assert len(ours["runs"]) == 3 and ours["rates"] == [500.0] * 3 and ours["runs"][0]["task"]["windows"] == 1
    assert "processes of their own, interleaved" in result["method"]


def test_a_path_and_an_interpreter_for_a_family(tmp_path: Path, interpreter: Any) -> None:
    works = interpreter("works", WORKS)
    python = {"prepare": works, "unsloth": works, "chronicals": works, "trl-liger": works, "trl": works}
    paths = {"unsloth": "/first", "trl-liger": "/second"}
    run(settings(tmp_path, python, sides=["unsloth-packing", "trl-liger", "chronicals"], pythonpath=paths))
    first = dict(line.split() for line in (tmp_path / "calls").read_text().splitlines())
    assert first["unsloth-packing"] == "/first" and first["trl-liger"] == "/second"
    assert first["chronicals"] not in ("/first", "/second")


def test_a_side_finds_the_package_and_stays_off_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/given")
    environment = process.environment("/first")
    path = environment["PYTHONPATH"].split(":")
    assert path[:2] == ["/first", "/given"] and (Path(path[2]) / "chronicals_trl").is_dir()
    monkeypatch.setenv("PYTHONPATH", "given")
    path = process.environment("packages")["PYTHONPATH"].split(":")
    assert path[:2] == [str(Path.cwd() / "packages"), str(Path.cwd() / "given")], "it runs in another folder"
    assert environment["HF_HUB_OFFLINE"] == "1" and "UNSLOTH_DISABLE_STATISTICS" in environment


# -- the meter --------------------------------------------------------------------------------------------------------


def task(**changes: Any) -> Task:
    given: dict[str, Any] = {
        "side": "trl", "mode": "full", "shape": "tiny", "protocol": "packed", "checkpointing": "off", "model": "",
        "documents": "", "row_tokens": 8, "rows": 1, "packs": True, "warm_up": 2, "steps": 3, "windows": 2,
        "learning_rate": 1e-4, "seed": 0, "chronicals": {}, **changes,
    }  # fmt: skip
    return Task(**given)


def collate(n: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(1, n, dtype=torch.int64)}


def test_windows_leave_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    meter = Meter(task())
    meter.counted = Counted(collate)
    for done in range(8):
        meter.begin(done)
        meter.counted(10 + done)
        time.sleep(0.05 if done < 2 else 0.01)
        meter.end(done + 1)
    meter.counted(99)  # loaded ahead, never trained on
    first, second = meter.result()["windows"]
    assert (first["tokens"], second["tokens"]) == (12 + 13 + 14, 15 + 16 + 17)
    assert first["squares"] == 12**2 + 13**2 + 14**2 and first["documents"] == 3
    assert all(0.03 <= window["seconds"] < 0.1 for window in (first, second))
    assert len(first["step_ms"]) == len(second["step_ms"]) == 3
    assert all(9 < ms < 40 for ms in first["step_ms"])


def test_memory_is_given_back_before_the_last_step_of_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking it again is not in a window; the peak is of the windows and of no step that loading is in."""
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter() * 1e3

        def elapsed_time(self, other: Any) -> float:
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: told.append(name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**31)
    meter = Meter(task(warm_up=2))
    meter.counted = Counted(collate)
    for done in range(8):
        meter.begin(done)
        told.append(str(done))
        meter.counted(4)
        meter.end(done + 1)
    assert told == ["0", "empty_cache", "reset_peak_memory_stats", *"1234567"]
    found = meter.result()
    assert (found["peak_memory_gib"], found["peak_allocated_gib"]) == (2.0, 1.0)
    assert [len(window["step_ms"]) for window in found["windows"]] == [3, 3]


def test_a_training_that_ends_early_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    meter = Meter(task())
    meter.counted = Counted(collate)
    for done in range(5):
        meter.begin(done)
        meter.counted(4)
        meter.end(done + 1)
    with pytest.raises(RuntimeError, match="only 1 of 2 windows"):
        meter.result()
    for done in range(5, 8):
        meter.end(done + 1)
    with pytest.raises(RuntimeError, match="0 batches were counted in 3 steps, not 3"):
        meter.result()


def test_batches_of_worker_processes_cannot_be_counted() -> None:
    class Trainer:
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(range(4), num_workers=1)  # type: ignore[arg-type]

    trainer = Trainer()
    Meter(task()).count_batches_of(trainer)
    with pytest.raises(RuntimeError, match="1 workers make them"):
        trainer.get_train_dataloader()
