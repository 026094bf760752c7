"""The judge of `tests/acceptance/families.py`: what it calls equal, what it leaves out, and its exit status."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "acceptance"))
import families

from chronicals_trl.report import ActivationReport

STOCK = {"big": torch.tensor([1.0, -2.0]), "small": torch.tensor([1e-9, 0.0])}


def made(loss: float = 4.0, **gradients: torch.Tensor) -> families.Step:
    return families.Step(loss, STOCK | gradients, ActivationReport())


@pytest.mark.parametrize(
    ("ours", "equal"),
    [
        (made(), True),
        (made(4.0 * (1 + 0.9e-5)), True),
        (made(4.0 * (1 - 1.1e-5)), False),
        (made(math.nan), False),
        (made(big=torch.tensor([1.0 - 3.9e-4, -2.0])), True),  # 2e-4 of the largest entry, 2
        (made(big=torch.tensor([1.0 - 4.1e-4, -2.0])), False),
        (made(big=torch.tensor([math.nan, -2.0])), False),
        (made(small=torch.tensor([2e-8, 0.0])), True),  # below 2e-4 of 1e-4 of 2
        (made(small=torch.tensor([5e-8, 0.0])), False),
        (made(another=torch.zeros(1)), False),
        (families.Step(4.0, {"big": STOCK["big"]}, None), False),
        (families.Step(4.0, {}, None), False),
    ],
)
def test_what_agrees(ours: families.Step, equal: bool) -> None:
    assert families.agrees(families.compare(ours, made())) is equal


def test_the_worst_parameter_is_named() -> None:
    row = families.compare(made(small=torch.tensor([math.nan, 0.0]), big=torch.tensor([0.0, -2.0])), made())
    assert (row["worst_parameter"], row["gradient"]) == ("small", math.inf)


def outcome_and_status(monkeypatch, file: Path, stock: Any, off: Any, auto: Any) -> tuple[dict[str, Any], int]:
    """Of one family whose three runs end so; an exception is raised."""
    left = [stock, off, auto]

    def step(*_: object) -> families.Step:
        result = left.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(families, "step", step)
    monkeypatch.setattr(families.transformers.logging, "set_verbosity_error", lambda: None)  # for the other tests
    monkeypatch.setattr(sys, "argv", ["families.py", "--families", "llama", "--output", str(file)])
    status = families.main()
    written = json.loads(file.read_text())
    assert written["counts"] == {written["rows"][0]["outcome"]: 1}
    return written["rows"][0], status


@pytest.mark.parametrize(
    ("runs", "outcome", "status"),
    [
        ((made(), made(), made()), "agrees", 0),
        ((made(), made(5.0), made()), "differs", 1),
        ((made(), made(), made(5.0)), "differs", 1),
        ((made(), made(), ValueError("no")), "ours fails", 1),
        ((made(), ValueError("no"), made()), "ours fails", 1),
        ((ValueError("no"), made(), made()), "stock TRL fails", 0),
        ((ValueError("no"), ValueError("no"), ValueError("no")), "stock TRL fails", 0),
        ((made(math.nan), made(math.nan), made(math.nan)), "stock TRL fails", 0),
        ((made(small=torch.tensor([math.nan, 0.0])), made(), made()), "stock TRL fails", 0),
        ((families.Step(4.0, {"big": torch.zeros(2)}, None), made(), made()), "stock TRL fails", 0),
    ],
)
def test_outcomes(monkeypatch, tmp_path: Path, runs: tuple[Any, ...], outcome: str, status: int) -> None:
    row, left = outcome_and_status(monkeypatch, tmp_path / "out.json", *runs)
    assert (row["outcome"], left) == (outcome, status)


def test_a_family_of_several_models_is_not_built() -> None:
    row = families.row_of("gemma3")
    assert row["outcome"] == "not built" and "other models" in row["reason"]


def test_rows_are_kept_only_on_resume_and_of_these_versions(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    result = families.begun(file, resume=False)
    result["rows"].append({"family": "llama", "outcome": "agrees"})
    families.write(file, result)
    assert families.begun(file, resume=True)["rows"] == result["rows"]
    assert families.begun(file, resume=False)["rows"] == []
    families.write(file, result | {"versions": {"trl": "0"}})
    assert families.begun(file, resume=True)["rows"] == []


def test_tiny_settings() -> None:
    """Each kind of layer is there, values come from the table, a family's own ones go first."""
    assert families.shortened(["a", "a", "b"] * 5) == ["a", "b", "a", "b"]
    assert families.tiny_config("qwen3_next").layer_types == ["linear_attention", "full_attention"] * 2
    assert families.tiny_config("mamba2").num_heads == 8 != families.TINY["num_heads"]
    assert families.tiny_config("llama").hidden_size == 32
    first, second = families.build("llama"), families.build("llama")
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert (first.model.norm.weight != 1).all()


def test_the_manual_has_what_was_found() -> None:
    result = json.loads(families.RESULT.read_text("utf-8"))
    rows = [row for row in result["rows"] if row["outcome"] == "agrees"]
    names = ("docs/parts.md", "docs/all-results.md", "README.md")
    page, results, readme = ((families.ROOT / name).read_text("utf-8") for name in names)
    counts = result["counts"]
    assert counts.keys() == {"agrees", "stock TRL fails", "not built"} and sum(counts.values()) == 196
    for outcome, words in (
        ("agrees", "agree with"),
        ("stock TRL fails", "stock TRL fails"),
        ("not built", "not built:"),
    ):
        assert f"| {counts[outcome]} | {words}" in page
    assert f"{counts['agrees']} agree (" in results and f"{counts['not built']} are not built" in results
    assert f"{counts['agrees']} agree with" in readme and f"{counts['not built']} are not built" in readme
    assert max(row[name]["loss"] for row in rows for name in families.SETTINGS) <= 2.9e-7
    close = sum(all(row[name]["gradient"] < 1e-5 for name in families.SETTINGS) for row in rows)
    assert f"({close} of them to 1e-5)" in page
    parts = ("rms_norm", "gated_mlp", "qk_rope", "attention", "head")
    for part in parts:
        on = sum(row["parts"][part].startswith("on") for row in rows)
        assert f"| `{part}` | {on} | {len(rows) - on} |" in page
    without_padding = sum(not row["padding_free"].startswith("padding-free: off") for row in rows)
    assert f"#without-packing) | {without_padding} | {len(rows) - without_padding} |" in page
    none = sum(not any(row["parts"][part].startswith("on") for part in parts) for row in rows)
    assert f"In {none} families none" in page


def test_a_run_that_hangs_is_ended() -> None:
    with pytest.raises(TimeoutError, match="1 s"), families.limited(1):
        time.sleep(10)
