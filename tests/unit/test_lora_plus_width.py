"""The width sweep in examples/: its batched adapters are PEFT's under LoRA+, and its figures are what they say."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chronicals_trl.optim import apply_lora_plus

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora_plus_width", ROOT / "examples" / "lora_plus_width.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_each_setting_is_peft_with_lora_plus(sweep: ModuleType) -> None:
    """Adam over PEFT's layer, its groups split by the library, on the same batches."""
    width, rate, ratio = 24, 3e-3, 4.0
    generator = torch.Generator().manual_seed(0)
    first, second = sweep.teachers(generator)
    base, _ = sweep.pretrain(width, first, generator, 5)
    train, held_out = (sweep.make_task(base, second, generator, count) for count in (200, 50))
    a = sweep.initial_a(width, generator)
    batches = torch.randint(200, (20, 16), generator=generator)

    hidden = nn.Sequential(nn.Linear(width, width, bias=False))
    hidden[0].weight.data = base.w_hidden_WW.T.clone()
    model = peft.get_peft_model(
        hidden, peft.LoraConfig(r=sweep.RANK, lora_alpha=sweep.RANK * sweep.SCALE, target_modules=["0"])
    )
    model.base_model.model[0].lora_A["default"].weight.data = a.clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate, betas=sweep.BETAS, eps=sweep.EPS)
    apply_lora_plus(optimizer, model, ratio=ratio)

    def loss(task) -> torch.Tensor:
        return F.mse_loss(torch.relu(model(task.h_NW)) @ base.w_out_WO, task.y_NO)

    expected = [loss(held_out).item()]
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss(train.rows(batch)).backward()
        optimizer.step()
        if step % sweep.EVAL_EVERY == 0:
            expected.append(loss(held_out).item())

    rates_a = torch.tensor([1e-4, rate, 1e-2])
    history, found_a, found_b = sweep.train_adapters(
        base, train, held_out, a, rates_a, rates_a * torch.tensor([1.0, ratio, 1.0]), batches
    )
    assert history.shape == (3, 3)
    torch.testing.assert_close(history[:, 1], torch.tensor(expected), rtol=1e-4, atol=0)
    layer = model.base_model.model[0]
    torch.testing.assert_close(found_a[1], layer.lora_A["default"].weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found_b[1], layer.lora_B["default"].weight, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(history[-1, 0], history[-1, 1], rtol=1e-2)


def test_figures(sweep: ModuleType) -> None:
    ratios = [1.0, 2.0, 4.0, 8.0]
    values = [(math.log2(ratio) - 1.3) ** 2 for ratio in ratios]
    assert sweep.minimum(ratios, values) == pytest.approx(2**1.3)
    assert sweep.minimum(ratios, [4.0, 3.0, 2.0, 1.0]) == 8.0
    assert sweep.crossing(ratios, [8.0, 4.0, 2.0, 1.0], 2 * math.sqrt(2)) == pytest.approx(2 * math.sqrt(2))
    assert sweep.crossing(ratios, [8.0, 7.0, 6.0, 5.0], 2.0) is None
    # Two rates, one ratio: to a half in 10 steps at the second rate, in 15 at the first.
    history = torch.tensor([[[1.0], [1.0]], [[math.exp(-0.4)], [0.5]], [[math.exp(-1.0)], [0.5]]])
    assert sweep.steps_to(history, math.log(0.5)) == pytest.approx([10.0])
    assert sweep.steps_to(history[:, :1], -0.7) == pytest.approx([15.0])
    assert sweep.steps_to(history, -2.0) == [None]
    rows = [{"seed": s, "width": w, "x": w**0.5 * s} for s in (1, 2) for w in (4, 16, 64)]
    assert sweep.exponents(rows, "x")["seeds"] == pytest.approx([0.5, 0.5])


def test_the_settings_are_the_rates_and_ratios_that_they_are_filed_under(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, rates = sweep.train_adapters, []

    def train_adapters(base, train, held_out, a_RW, rates_a, rates_b, batches):
        rates.append(torch.stack([rates_a, rates_b]))
        return original(base, train, held_out, a_RW, rates_a, rates_b, batches)

    monkeypatch.setattr(sweep, "train_adapters", train_adapters)
    cell = sweep.run(8, 0, 10, 5)
    shape = len(sweep.MEAN_RATES), len(sweep.RATIOS)
    assert cell["growth_MK"].shape == shape
    a_MK, b_MK = torch.cat(rates, 1).unflatten(1, shape)
    torch.testing.assert_close(b_MK / a_MK, torch.tensor(sweep.RATIOS).expand(shape))
    torch.testing.assert_close((a_MK * b_MK).sqrt(), torch.tensor(sweep.MEAN_RATES)[:, None].expand(shape))
    assert (cell["growth_MK"][-1, 0] > cell["growth_MK"][-1, -1]).all()  # the higher A's rate, the more it grows


def test_a_run(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "new" / "sweep.json"
    arguments = ["--widths", "8", "16", "--seeds", "2", "--steps", "20", "--pretrain_steps", "5", "--output", output]
    monkeypatch.setattr(sys, "argv", ["lora_plus_width.py", *map(str, arguments)])
    sweep.main()
    found = json.loads(output.read_text())
    assert [entry["width"] for entry in found["widths"]] == [8, 16] and len(found["seeds"]) == 4
    for row in found["seeds"]:
        single = row["by_ratio"][sweep.RATIOS.index(1.0)]
        assert single["loss_over_single_rate"] == 1 and single["steps_to_halfway_loss"] <= 10
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_what_the_manual_says_of_it(sweep: ModuleType) -> None:
    """The table in the manual is that of the committed figures."""
    found = json.loads((ROOT / "docs" / "results" / "lora_plus_width_cpu.json").read_text())
    text = (ROOT / "docs" / "lora-plus.md").read_text()
    for entry in found["widths"]:
        gains = {e["ratio"]: e["loss_over_single_rate"] for e in entry["by_ratio"]}
        cells = [f"{entry['ratio_of_held_a']:.1f}", f"{entry['ratio_of_lowest_loss']:.1f}"]
        for ratio in (4.0, 16.0, 64.0):
            cells.append(f"{100 * (gains[ratio]['mean'] - 1):+.1f} ± {100 * gains[ratio]['standard_error']:.1f}")
        steps = {e["ratio"]: e["steps_to_halfway_loss"] for e in entry["by_ratio"]}
        cells += [f"{steps[r]['mean']:.1f} ± {steps[r]['standard_error']:.1f}" for r in (4.0, 16.0)]
        assert f"| {entry['width']} | {' | '.join(cells)} |" in text, cells
    for key in ("exponent_of_held_a", "exponent_of_lowest_loss"):
        assert f"width^({found[key]['mean']:.2f} ± {found[key]['standard_error']:.2f})" in text
