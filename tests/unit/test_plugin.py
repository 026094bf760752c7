"""ChronicalsPlugin on a raw Accelerate loop."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from accelerate import Accelerator

from chronicals_trl import ChronicalsPlugin
from chronicals_trl.model.patch import is_patched

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def _train(model, *, plugin: bool, steps: int = 3, fused: bool = False) -> list[float]:
    accelerator = Accelerator(cpu=True)
    if plugin:
        ChronicalsPlugin().attach(accelerator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(steps):
        batch = tiny_models.packed_batch()
        # Without use_cache=False transformers does not look for documents in a row.
        loss = model(**batch, use_cache=False, **({"fused_lm_head": True} if fused else {})).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("fused", [False, True])
def test_a_raw_loop_trains_the_same(fused: bool) -> None:
    stock = _train(tiny_models.build("llama"), plugin=False)
    ours = _train(tiny_models.build("llama"), plugin=True, fused=fused)
    assert ours == pytest.approx(stock, rel=1e-5)
    assert stock[-1] < stock[0] - 0.1


def test_only_the_attached_accelerator_patches() -> None:
    first, second = Accelerator(cpu=True), Accelerator(cpu=True)
    plugin = ChronicalsPlugin({"attention": "off"})
    assert plugin.attach(first) is first
    patched, stock = tiny_models.build("llama"), tiny_models.build("llama")
    first.prepare(patched)
    second.prepare(stock)
    assert any("_chronicals_patched" in module.__dict__ for module in patched.modules())
    assert not any("_chronicals_patched" in module.__dict__ for module in stock.modules())
    assert plugin.reports[0]["attention"].reason == "attention='off' in the configuration"
    with pytest.raises(ValueError, match="attached already"):
        ChronicalsPlugin().attach(first)


def test_lora_plus_needs_the_optimizer_in_the_same_call() -> None:
    peft = pytest.importorskip("peft")

    def lora():
        return peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))

    accelerator, plugin = Accelerator(cpu=True), ChronicalsPlugin({"lora_plus_ratio": 4})
    plugin.attach(accelerator)
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    accelerator.prepare(model, optimizer)
    assert plugin.reports[-1]["lora_plus"].state == "on"
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(4e-3 if "lora_B" in name else 1e-3)
    accelerator.prepare(lora())
    assert plugin.reports[-1]["lora_plus"].omitted and "same call" in plugin.reports[-1]["lora_plus"].reason


def test_on_for_the_parts_that_the_plugin_sets() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    plugin = ChronicalsPlugin({"lora_plus": "on"})
    plugin.attach(Accelerator(cpu=True)).prepare(model, optimizer)
    assert plugin.reports[0]["lora_plus"].state == "on"
    for config, reason in (
        ({"packing": "on"}, "packing is off: a raw loop brings its own batches"),
        ({"lora_plus": "on"}, "lora_plus is off: the model has no trainable LoRA adapter"),
    ):
        model = tiny_models.build("llama")
        with pytest.raises(RuntimeError, match=reason):
            ChronicalsPlugin(config).attach(Accelerator(cpu=True)).prepare(model)
        assert not is_patched(model)


def test_documents_are_apart_even_with_a_cache() -> None:
    """`model(**batch)` makes a cache; transformers then looks for no documents, but `cu_seq_lens_q` tells of them."""
    batch = tiny_models.packed_batch()
    reference = tiny_models.build("llama")(**batch, use_cache=False).loss
    model = tiny_models.build("llama")
    assert abs(model(**batch).loss - reference) > 1e-3
    accelerator = ChronicalsPlugin().attach(Accelerator(cpu=True))
    model = accelerator.prepare(model)
    assert model(**batch).loss.item() == pytest.approx(reference.item(), rel=1e-5)
