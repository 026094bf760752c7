"""`bench sft`: a step of `chronicals-accumulation` is one of `chronicals` in two micro-batches."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench_sft_run import collate, task

from chronicals_trl.bench.process import Ended
from chronicals_trl.bench.sft import run as sft_run
from chronicals_trl.bench.sft import worker as sft_worker
from chronicals_trl.bench.sft.cases import SHAPES
from chronicals_trl.bench.sft.count import Counted
from chronicals_trl.bench.sft.figures import finish_row
from chronicals_trl.bench.sft.meter import Meter

SIDE = "chronicals-accumulation"
WARM_UP, STEPS, WINDOWS = 3, 4, 3


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides run in this process: a start of their own would be most of the time."""

    def run_apart(command: list[str], *, folder: Path, **other: Any) -> Ended:
        assert command[:3] == [sys.executable, "-m", "chronicals_trl.bench.sft.worker"]
        before = Path.cwd()
        os.chdir(folder)
        try:
            sft_worker.main(command[3:])
        finally:
            os.chdir(before)
        return Ended(True, "")

    monkeypatch.setattr(sft_run, "run_apart", run_apart)


def dry_run(folder: Path, *sides: str, **changes: Any) -> dict[str, dict[str, Any]]:
    given: dict[str, Any] = {
        "mode": "full", "shape": "tiny", "protocol": "packed", "checkpointing": "off", "row_tokens": 512,
        "tokens_per_step": 2048, "documents_per_step": 6, "warm_up": WARM_UP, "steps": STEPS, "repeats": WINDOWS,
        "fresh": False, "learning_rate": 1e-3, "seed": 0, "timeout": 60.0, "models": None, "logs": folder / "logs",
        "chronicals": {"lora_plus": "off"}, "master": "fp32", **changes,
    }  # fmt: skip
    result = sft_run.run(sft_run.Settings(sides=sides, **given), say=lambda line: None)
    return {row["side"]: row for row in result["rows"]}


@pytest.mark.parametrize(
    ("mode", "protocol", "checkpointing"),
    [("full", "packed", "off"), ("lora", "packed", "on"), ("full", "short", "off")],
)
def test_a_step_is_that_of_ours(tmp_path: Path, here: None, mode: str, protocol: str, checkpointing: str) -> None:
    rows = dry_run(tmp_path, "chronicals", SIDE, mode=mode, protocol=protocol, checkpointing=checkpointing)
    whole, halves = rows["chronicals"], rows[SIDE]
    assert (whole["status"], halves["status"]) == ("ok", "ok"), halves["reason"]
    assert whole["rows"] == halves["rows"] == (4 if protocol == "packed" else 6) and whole["packs"] == halves["packs"]
    (one,), (two,) = whole["runs"], halves["runs"]
    assert (one["micro_batches"], two["micro_batches"]) == (1, 2)
    # The same documents in each window, so the same rows of them: all that is counted, and MFU's operations.
    assert len(one["windows"]) == len(two["windows"]) == WINDOWS
    for key in ("steps", "tokens", "documents", "squares"):
        assert [window[key] for window in one["windows"]] == [window[key] for window in two["windows"]]
    assert all(len(window["step_ms"]) == STEPS for window in two["windows"])
    assert whole["tokens_per_step"] == halves["tokens_per_step"] > 0
    assert whole["documents_per_step"] == halves["documents_per_step"]
    if protocol == "packed":
        assert whole["positions_per_step"] == halves["positions_per_step"] == 2048
    # Steps of the optimizer in the logs, and in them the same training.
    steps = [log["step"] for log in one["logs"]]
    assert steps == [log["step"] for log in two["logs"]] == list(range(2, WARM_UP + STEPS * WINDOWS + 1, 2))
    for ours, theirs in zip(one["logs"], two["logs"], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-2) and theirs["grad_norm"] > 0


@pytest.mark.parametrize(("protocol", "rows"), [("packed", 3), ("short", 1)])
def test_an_odd_number_of_rows_cannot_be_halved(tmp_path: Path, here: None, protocol: str, rows: int) -> None:
    sizes = {"tokens_per_step": 512 * rows, "documents_per_step": rows}
    row = dry_run(tmp_path, SIDE, protocol=protocol, repeats=1, **sizes)[SIDE]
    assert row["status"] == "not offered"
    assert row["reason"] == f"the rows of a step, {rows}, do not divide into 2 micro-batches"


# -- the meter --------------------------------------------------------------------------------------------------------


def trained(meter: Meter, batches: int) -> None:
    """As a Trainer does it: a step's batches are fetched before it begins, and one more is loaded ahead."""
    meter.counted = Counted(collate)
    for number in range(batches):
        meter.counted(10 + number)
    for done in range(8):
        meter.begin(done)
        meter.end(done + 1)


def test_both_batches_of_a_step_are_counted() -> None:
    meter = Meter(task(side=SIDE, rows=2))
    trained(meter, batches=17)
    first, second = meter.result()["windows"]
    assert (first["tokens"], second["tokens"]) == (sum(range(14, 20)), sum(range(20, 26)))
    assert first["squares"] == sum(n * n for n in range(14, 20))
    assert (first["documents"], first["positions"], first["steps"]) == (6, first["tokens"], 3)
    row: dict[str, Any] = {"runs": [{"status": "ok", **meter.result()}], "rows": 2, "packs": True}
    finish_row(row, SHAPES["tiny"], "full", None, None, {"rows": 2, "packs": True, "floor_ms": 1.0})
    assert (row["documents_per_step"], row["tokens_per_step"]) == (2, sum(range(14, 26)) / 6)
    assert row["over_floor"] == row["step_ms"], "as much work in a step as ours has"


def test_a_step_with_one_batch_is_no_step() -> None:
    meter = Meter(task(side=SIDE, rows=2))
    trained(meter, batches=15)
    with pytest.raises(RuntimeError, match="5 batches were counted in 3 steps, not 6"):
        meter.result()
