"""LoRA over bitsandbytes' 8-bit linears stays PEFT's own path, by name, since no dequantised product is its result."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from chronicals_trl import patch_model
from chronicals_trl.model import lora, match, rope

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")


def eight_bit(linear: nn.Linear) -> nn.Module:
    """As transformers' quantiser makes it: frozen int8, outliers above 6 in full precision."""
    new = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
    )
    new.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    new.bias = linear.bias
    return new.to("cpu")


def build(*blocks: str) -> nn.Module:
    model = tiny_models.build("qwen2")
    for layer in model.model.layers:
        for block in map(layer.get_submodule, blocks):
            for name, linear in list(block.named_children()):
                if type(linear) is nn.Linear:
                    setattr(block, name, eight_bit(linear))
    model.is_loaded_in_8bit = True
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.2)
    return peft.get_peft_model(model, config).train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    model(**tiny_models.packed_batch(), use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_its_forward_is_no_dequantised_product_and_its_backward_is() -> None:
    """What the reason says. Should a bitsandbytes come whose forward is one, this layer could be fused as 4-bit is."""
    torch.manual_seed(0)
    layer = eight_bit(nn.Linear(64, 48, bias=False)).eval()  # training on a CPU takes another way than on a GPU
    x = torch.randn(40, 64, requires_grad=True)
    y = layer(x)
    grad_y = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    weight = layer.state.CB.float() * layer.state.SCB[:, None] / 127
    assert 1e-3 < (y - x @ weight.t()).norm() / y.norm() < 2e-2
    assert (grad_x - grad_y @ weight).norm() < 1e-5 * grad_x.norm()


def test_off_and_named_and_the_model_learns_the_same() -> None:
    model = build("self_attn", "mlp")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert type(layer) is peft.tuners.lora.bnb.Linear8bitLt
    assert "Linear8bitLt, which quantises x too" in (lora.fits(layer) or "")
    expected = gradients(model)
    report = patch_model(model)
    assert report["lora"].state == "off" and report["lora"].omitted
    assert "14 left out: base layer is Linear8bitLt, which quantises x too" in report["lora"].reason
    ours = gradients(model)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_layers_beside_it_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mlp")
    expected = gradients(model)
    report = patch_model(model)
    assert report["lora"].state == "on" and report["lora"].modules == 8
    assert "6 left out: base layer is Linear8bitLt" in report["lora"].reason
    calls: list[str] = []
    for module, name in ((rope, "lora_linears"), (match, "lora_gated_mlp"), (lora, "lora_linear")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, o=original, **k: (calls.append(n), o(*a, **k))[1])
    ours = gradients(model)
    assert sorted(calls) == ["lora_linear"] * 2 + ["lora_linears"] * 2  # o_proj; q, k and v
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_strict_makes_an_error_of_it() -> None:
    with pytest.raises(RuntimeError, match="Linear8bitLt"):
        patch_model(build("self_attn", "mlp"), {"lora": "on"})
