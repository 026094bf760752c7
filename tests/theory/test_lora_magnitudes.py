"""docs/theory/lora-plus.md: exponents of the width, and the figures it takes from the width sweep."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from theory import lora_magnitudes, pages
from theory.lora_magnitudes import STEP, layer

PAGE = "lora-plus.md"


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {str(row["quantity"]): row for row in lora_magnitudes.table()}


@pytest.mark.parametrize(
    ("quantity", "exponent"),
    [
        ("dB at the start", -1),
        ("dA after a step of B", 0),
        ("A x at the start", 0),
        ("change of A x by a step of A", 1),
        ("change of B A x by a step of B", 0),
    ],
)
def test_exponents(found: dict[str, dict[str, Any]], quantity: str, exponent: int) -> None:
    assert found[quantity]["exponent"] == pytest.approx(exponent, abs=0.1)


def test_the_first_gradient_of_a_is_zero(found: dict[str, dict[str, Any]]) -> None:
    start = layer(64, seed=0)
    grad_a, grad_b = start.gradients()
    assert (grad_a == 0).all() and (grad_b != 0).all()
    assert math.isnan(found["dA at the start"]["exponent"])


def test_the_gradients_are_the_formulas() -> None:
    """dB = (dy)ᵀ (A x)ᵀ and dA = Bᵀ (dy)ᵀ x, in the page's words, from the op."""
    start = layer(32, seed=1)
    start = start._replace(b_WR=torch.randn(32, lora_magnitudes.RANK, generator=torch.Generator().manual_seed(2)))
    low = start.x_TW @ start.a_RW.T
    out = start.x_TW @ start.weight_WW.T + low @ start.b_WR.T
    delta = (out @ start.readout_W - start.target_T)[:, None] * start.readout_W
    torch.testing.assert_close(start.gradients(), (start.b_WR.T @ delta.T @ start.x_TW, delta.T @ low))


def test_adam_takes_the_size_out_of_the_gradient() -> None:
    """So no ratio of rates follows from a ratio of gradients: a loss a thousand times as large steps as far."""
    steps = []
    for scale in (1.0, 1000.0):
        start = layer(64, seed=0)
        b = start.b_WR.clone().requires_grad_()
        _, b.grad = start.gradients(scale)
        torch.optim.Adam([b], lr=STEP, eps=1e-12).step()
        steps.append(b.detach())
        torch.testing.assert_close(b.detach(), -STEP * b.grad.sign())
    assert torch.equal(*(step.sign() for step in steps))


def test_the_table_is_what_comes_out(found: dict[str, dict[str, Any]]) -> None:
    shown = pages.table(PAGE, "quantity")
    assert [row["quantity"] for row in shown] == list(found)
    for row in shown:
        for width in map(str, lora_magnitudes.WIDTHS):
            assert float(row[width]) == pytest.approx(found[row["quantity"]][width], rel=0.06)
        if row["exponent"] != "none":
            assert float(row["exponent"]) == pytest.approx(found[row["quantity"]]["exponent"], abs=0.02)


def test_the_figures_of_the_sweep() -> None:
    sweep = json.loads((pages.ROOT / "docs" / "results" / "lora_plus_width_cpu.json").read_text())
    text = " ".join(pages.text(PAGE).split())
    for key in ("exponent_of_held_a", "exponent_of_lowest_loss"):
        assert f"width^({sweep[key]['mean']:.2f} ± {sweep[key]['standard_error']:.2f})" in text
    rows = pages.table(PAGE, "width")
    assert len(rows) == len(sweep["widths"])
    for row, entry in zip(rows, sweep["widths"], strict=True):
        assert row["width"] == str(entry["width"])
        assert row["ratio that keeps A's output"] == f"{entry['ratio_of_held_a']:.1f}"
        assert row["ratio of the lowest loss"] == f"{entry['ratio_of_lowest_loss']:.1f}"
        gain = next(e["loss_over_single_rate"] for e in entry["by_ratio"] if e["ratio"] == 16)
        shown = f"{100 * (gain['mean'] - 1):+.1f} ± {100 * gain['standard_error']:.1f}"
        assert row["loss at ratio 16, against one rate, in %"] == shown
