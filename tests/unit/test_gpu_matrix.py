"""The script of the matrix on two GPUs, without GPUs: its cells, its verdicts, and processes that fail or hang."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import run_matrix_two_gpus as matrix
from matrix_cells import LAYOUTS, PARTS, Cell, gradient_cells, is_reference, scaling_cells

EXACT = {
    "gradient_error": 1e-6, "worst_tensor_error": 1e-6, "loss_error": 1e-6, "error": None, "tokens_per_second": 1.0,
    "peak_reserved_gib": 0.0, "seconds": 1.0,
}  # fmt: skip


def results(folder: Path) -> matrix.Results:
    made = matrix.Results(folder / "matrix.json", argparse.Namespace(tiny=True, output=folder))
    made.head["bound"] = 1e-4
    return made


def test_every_combination_once_and_each_with_a_reference() -> None:
    cells = gradient_cells(LAYOUTS, PARTS, tiny=False)
    assert len({cell.name for cell in cells}) == len(cells) == 6 * 3 * 2 * 2 + 4
    references = {(cell.part, cell.accumulation): i for i, cell in enumerate(cells) if is_reference(cell)}
    assert len(references) == 6
    assert all(references[cell.part, cell.accumulation] <= i for i, cell in enumerate(cells))


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, "exact"),
        ({"gradient_error": 0.5}, "WRONG"),
        ({"gradient_error": float("nan")}, "WRONG"),
        ({"loss_error": 0.5}, "WRONG"),
        ({"gradient_error": None}, "not compared"),
        ({"error": "no"}, "failed"),
        ({"error": "no", "not_run": True}, "not run"),
    ],
)
def test_outcomes(tmp_path: Path, change: dict[str, Any], outcome: str) -> None:
    made = results(tmp_path)
    made.add(Cell("ddp"), EXACT | change)
    (row,) = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    assert row["outcome"] == outcome and row["layout"] == "ddp"


def test_what_stock_trl_cannot_do_either(tmp_path: Path) -> None:
    made = results(tmp_path)
    made.add(Cell("zero 3", "qlora", ours=False), {"error": "no"})
    made.add(Cell("zero 3", "qlora"), {"error": "no"})
    made.add(Cell("zero 3", "lora"), {"error": "no"})
    assert [row["outcome"] for row in made.rows.values()] == ["failed", "not possible", "failed"]


def collected(folder: Path, code: str, limit: float = 60) -> tuple[str | None, list[Cell], matrix.Results, float]:
    """What comes of a process that does `code`, with two cells to run."""
    found, made = folder / "found", results(folder)
    found.touch()
    left = [Cell("ddp", accumulation=1), Cell("ddp", accumulation=2)]
    told = (
        f"import json, time; file = open({str(found)!r}, 'a', 1); row = {EXACT!r}; names = {[c.name for c in left]!r}"
    )
    process = subprocess.Popen([sys.executable, "-c", f"{told}\n{code}"], start_new_session=True)
    begin = time.monotonic()
    error = matrix.collect(process, left, found, made, 1e9, limit)
    assert process.poll() is not None
    return error, left, made, time.monotonic() - begin


WRITE = "file.write(json.dumps({**row, 'name': names[%d]}) + '\\n')\n"


def test_rows_of_a_process_that_ends_well(tmp_path: Path) -> None:
    error, left, made, _ = collected(tmp_path, WRITE % 0 + WRITE % 1)
    assert error is None and left == [] and len(made.rows) == 2


def test_a_process_that_dies_in_the_second_cell(tmp_path: Path) -> None:
    error, left, made, _ = collected(tmp_path, WRITE % 0 + "raise SystemExit(3)")
    assert error == "the processes ended with 3"
    assert [cell.accumulation for cell in left] == [2] and len(made.rows) == 1


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    error, left, _, seconds = collected(tmp_path, WRITE % 0 + "time.sleep(100)", limit=1.5)
    assert error is not None and error.startswith("no result after")
    assert [cell.accumulation for cell in left] == [2] and seconds < 30


def test_a_row_with_an_error_ends_the_processes(tmp_path: Path) -> None:
    """Its ranks may be apart: the cells that are left are for new ones."""
    code = "row['error'] = 'no'\n" + WRITE % 0 + "time.sleep(100)"
    error, left, made, seconds = collected(tmp_path, code)
    assert error is None and [cell.accumulation for cell in left] == [2] and seconds < 30
    assert made.rows[Cell("ddp").name]["outcome"] == "failed"


def test_scaling_is_two_gpus_over_one() -> None:
    rows = [
        {"shape": "a", "layout": "one", "tokens_per_second": 10.0},
        {"shape": "a", "layout": "ddp", "tokens_per_second": 19.5},
        {"shape": "b", "layout": "one", "tokens_per_second": 10.0},
        {"shape": "b", "layout": "ddp"},  # failed
    ]
    assert matrix.scaling(rows)["scaling"] == {"a": 1.95}


@pytest.mark.slow
def test_the_cells_of_one_process_for_real(tmp_path: Path) -> None:
    """As on GPUs: the reference, then stock and ours against it, and a model of bench.sft on packed rows."""
    cells = gradient_cells(["one"], ["full"], tiny=True)
    chosen = [cell for cell in cells if cell.accumulation == 2] + scaling_cells(tiny=True)[:1]
    assert [cell.layout for cell in chosen] == ["one"] * 4
    model = tmp_path / "model"
    matrix.write_small_model(model, tiny=True)
    made = results(tmp_path)
    matrix.run_group(chosen, tmp_path, model, made, argparse.Namespace(deadline=200.0, cell_timeout=100.0))
    rows = list(made.rows.values())
    assert [row["outcome"] for row in rows] == ["ran", "exact", "exact", "ran"], [row["error"] for row in rows]
    assert rows[2]["parts"]["head"] == rows[3]["parts"]["packing"] == "on"
    assert all(row["tokens_per_second"] > 0 and row["ranks"] == 1 for row in rows)
