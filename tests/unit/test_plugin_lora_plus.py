"""LoRA+ in ChronicalsPlugin: which optimizers are split, and what the report says of the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from accelerate import Accelerator

from chronicals_trl import ChronicalsPlugin
from chronicals_trl.model.patch import is_patched

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

peft = pytest.importorskip("peft")

LR = 1e-3


def lora():
    return peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)


def rates(optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def attached(config=None) -> tuple[Accelerator, ChronicalsPlugin]:
    plugin = ChronicalsPlugin(config)
    return plugin.attach(Accelerator(cpu=True)), plugin


def test_a_scheduler_made_before_prepare_leaves_lora_plus_off() -> None:
    """The order of Accelerate's own examples; the loop runs, the report has the reason."""
    accelerator, plugin = attached()
    model = lora()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    part = plugin.reports[0]["lora_plus"]
    assert part.state == "off" and part.omitted and "scheduler is attached" in part.reason
    assert plugin.reports[0]["lora"].state == "on"
    accelerator.backward(model(**tiny_models.packed_batch(), fused_lm_head=True).loss)
    optimizer.step()
    scheduler.step()
    assert rates(optimizer) == [LR / 2]


@pytest.mark.parametrize(
    ("config", "reason"), [({"lora_plus": "on"}, ""), ({"strict": True}, "a learning-rate scheduler is attached")]
)
def test_insisting_on_lora_plus_is_an_error_where_it_does_not_fit(config: dict, reason: str) -> None:
    model = lora()
    optimizer = adam(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    accelerator, _ = attached(config)
    with pytest.raises(RuntimeError, match=f"lora_plus is off: {reason}"):
        accelerator.prepare(model, optimizer)
    assert rates(optimizer) == [LR]


def test_optimizers_of_several_models_are_left_alone() -> None:
    """Whose optimizer is whose is not known, and an optimizer split for one model would be wrong for the other."""
    accelerator, plugin = attached()
    models = [lora(), lora()]
    optimizers = [adam(model) for model in models]
    accelerator.prepare(*models, *optimizers)
    for report, optimizer in zip(plugin.reports, optimizers, strict=True):
        assert report["lora_plus"].omitted and "several models" in report["lora_plus"].reason
        assert rates(optimizer) == [LR]


def test_an_optimizer_that_is_prepared_already_is_left_alone() -> None:
    model = lora()
    optimizer = Accelerator(cpu=True).prepare(adam(model))
    accelerator, plugin = attached()
    accelerator.prepare(model, optimizer)
    part = plugin.reports[0]["lora_plus"]
    assert part.omitted and "prepared already" in part.reason
    assert rates(optimizer) == [LR]


def test_a_second_optimizer_without_an_adapter_is_named() -> None:
    model, other = lora(), torch.nn.Linear(2, 2)
    accelerator, plugin = attached()
    optimizers = [adam(other), adam(model)]
    accelerator.prepare(model, *optimizers)
    part = plugin.reports[0]["lora_plus"]
    assert part.state == "on" and "hold none of them" in part.reason
    assert [rates(optimizer) for optimizer in optimizers] == [[LR], [LR, 16 * LR]]


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_section_that_sets_the_rates_is_refused(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scheduler gives all groups one rate, in silence; the model is left as it came."""
    accelerator, _ = attached()
    deepspeed = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}, section: {"type": "any"}})
    monkeypatch.setattr(type(accelerator.state), "deepspeed_plugin", deepspeed)
    model = lora()
    optimizer = adam(model)
    with pytest.raises(ValueError, match=rf"own '{section}'.*make both in the loop.*lora_plus='off'"):
        accelerator.prepare(model, optimizer)
    assert rates(optimizer) == [LR] and not is_patched(model)


def test_frozen_adapters_are_named() -> None:
    accelerator, plugin = attached()
    model = lora()
    optimizer = adam(model)
    model.requires_grad_(False)
    accelerator.prepare(model, optimizer)
    part = plugin.reports[0]["lora_plus"]
    assert part.state == "off" and "all of its adapters are frozen" in part.reason
    assert rates(optimizer) == [LR]
