"""The table of fill: its arithmetic, its bounds, and that the manual shows what was found."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from chronicals_trl.packing import pack_lengths

ROOT = Path(__file__).parents[2]
LENGTHS = ROOT.parent / "shared" / "data" / "lengths"

spec = importlib.util.spec_from_file_location("fill_table", ROOT / "tests" / "acceptance" / "fill_table.py")
assert spec is not None and spec.loader is not None
fill_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill_table)


def test_slots_of_padded_batches() -> None:
    lengths = np.array([3, 9, 1, 5, 7])
    assert fill_table.padded_slots(lengths, [0, 1, 2, 3, 4], batch=2) == 9 * 2 + 5 * 2 + 7
    assert fill_table.padded_slots(lengths, [2, 0, 3, 4, 1], batch=3) == 5 * 3 + 9 * 2
    equal = np.full(64, 6)
    assert fill_table.random_slots(equal) == fill_table.grouped_slots(equal) == 64 * 6


def test_a_row_of_the_table() -> None:
    """Documents of half a row, and others above the capacity."""
    row = fill_table.table_row("x", np.array([4] * 400 + [20] * 200), 8)
    assert (row["bins"], row["lower_bound"], row["fill"], row["trl_bins"]) == (400, 400, 1.0, 400)
    assert row["saved_against_trl"] == 0.0 and "recovered_from_trl" not in row and row["split_bins"] == 200 + 500
    # 600 documents in batches of 8: 4,800 slots where each batch has a long one, for 3,200 tokens.
    assert 0.3 < row["saved_against_random"] <= round(1 - 3200 / 4800, 4)
    assert row["recovered_from_random"] == 1.0
    assert 0 <= row["saved_against_grouped"] < 0.1


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return json.loads((ROOT / "docs" / "results" / "packing_fill.json").read_text("utf-8"))["rows"]


def test_the_manual_has_the_table(found: list[dict]) -> None:
    assert fill_table.markdown(found) in (ROOT / "docs" / "packing.md").read_text("utf-8")


def test_the_figures_of_the_record(found: list[dict]) -> None:
    assert {(row["lengths"], row["capacity"]) for row in found} >= set(fill_table.BOUNDS)
    assert not any(fill_table.missed(row) for row in found)
    worse = [{**row, "fill": row["fill"] - 1e-4} for row in found]
    assert sum(bool(fill_table.missed(row)) for row in worse) >= 3


def test_what_is_said_of_the_papers_claim(found: list[dict]) -> None:
    """The ranges in docs/packing.md."""
    saved = {(row["lengths"], row["capacity"]): row["saved_against_random"] for row in found}
    real = {key: value for key, value in saved.items() if not key[0].startswith("lognormal")}
    assert {key for key, value in real.items() if value >= 0.6} == {("arena_hard_answers", 8192)}
    at_2048 = [value for key, value in real.items() if key[1] == 2048]
    assert (round(min(at_2048), 2), round(max(at_2048), 2)) == (0.29, 0.54)
    others = [value for key, value in real.items() if key[1] == 8192 and key[0] != "arena_hard_answers"]
    assert (round(min(others), 2), round(max(others), 2)) == (0.32, 0.56)
    lognormal = [value for key, value in saved.items() if key[0].startswith("lognormal")]
    assert (round(min(lognormal), 2), round(max(lognormal), 2)) == (0.64, 0.68)
    assert round(min(row["recovered_from_random"] for row in found), 2) == 0.97
    grouped = [row["saved_against_grouped"] for row in found]
    assert (round(min(grouped), 3), round(max(grouped), 1)) == (0.005, 0.3)


@pytest.mark.skipif(not LENGTHS.exists(), reason="the lengths are not part of the project")
@pytest.mark.parametrize(("name", "capacity"), list(fill_table.BOUNDS))
def test_the_figures_from_this_code(name: str, capacity: int) -> None:
    lengths, _ = fill_table.data_sets(LENGTHS)[name]
    bins, fill = fill_table.BOUNDS[name, capacity]
    plan = pack_lengths(np.minimum(lengths, capacity), capacity)
    assert round(plan.fill, 5) >= fill and bins in (None, plan.num_bins)
