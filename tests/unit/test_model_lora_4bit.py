"""LoRA over bitsandbytes' 4-bit linears: PEFT's numbers, the weight dequantised in each pass and never kept."""

from __future__ import annotations

import lora_checks
import pytest
import tiny_models
import torch

from chronicals_trl import patch_model
from chronicals_trl.model import lora, lora_state
from chronicals_trl.model.patch import require_finite

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")


def quantise(model, **options):
    """bitsandbytes' linears in the decoder layers, as transformers' quantiser puts them there."""
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if type(linear) is torch.nn.Linear:
                    new = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, linear.bias is not None, torch.float32, **options
                    )
                    new.weight = bnb.nn.Params4bit(linear.weight.data, False, module=new, **options)
                    new.bias = linear.bias
                    setattr(block, name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def build(dropout=0.0, quant_type="nf4", compress_statistics=True, quant_storage=torch.uint8):
    model = quantise(
        tiny_models.build("qwen2"), quant_type=quant_type, compress_statistics=compress_statistics,
        quant_storage=quant_storage,
    )  # fmt: skip
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "lora_dropout": dropout}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **options)).train()


def gradients(model, autocast=False):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**tiny_models.packed_batch(), use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    return lora_checks.count_nodes(monkeypatch)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_a_model_learns_the_same(dropout, quant_type, compress_statistics, calls):
    model = build(dropout, quant_type, compress_statistics)
    expected = gradients(model)
    report = patch_model(model)
    assert report["lora"].modules == 14 and report["lora"].reason is None
    calls.clear()
    ours = gradients(model)
    assert calls == {"lora_linears": 2, "lora_gated_mlp": 2, "lora_linear": 2}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_dtype_that_the_first_call_settles_is_settled_before_it(calls):
    """Under gradient checkpointing the first call is made again in the backward pass, and has to go the same way."""
    model = build()
    linears = [module for module in model.modules() if type(module) is bnb.nn.Linear4bit]
    for linear in linears:  # as made without compute_dtype
        linear.compute_dtype, linear.compute_type_is_set = None, False
    patch_model(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    calls.clear()
    ours = gradients(model)
    assert calls["lora_linear"] == calls["lora_gated_mlp"] > 0
    assert all(linear.compute_dtype is torch.float32 and linear.compute_type_is_set for linear in linears)
    expected = gradients(build())
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_weight_that_is_laid_out_otherwise_is_its_own_business():
    layer = build().get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(4, 32)
    assert lora_state.lora_operands(layer, x) is not None
    state = layer.base_layer.weight.quant_state
    state.shape = state.shape[::-1]
    assert lora_state.lora_operands(layer, x) is None


@pytest.mark.parametrize("quant_storage", [torch.bfloat16, torch.float32])
def test_codes_that_are_stored_as_floats(quant_storage, calls):
    """As FSDP wants them. Read as numbers some of the codes are NaN, of which there is nothing to be said."""
    model = build(quant_storage=quant_storage)
    codes = [p for p in model.parameters() if hasattr(p, "quant_state")]
    assert len(codes) == 14 and {p.dtype for p in codes} == {quant_storage}
    next(iter(codes)).data.view(torch.uint8).fill_(255)
    assert not codes[0].isfinite().any()
    expected = gradients(model)
    report = patch_model(model)
    require_finite(model)
    assert report["lora"].modules == 14 and report["lora"].reason is None
    calls.clear()
    ours = gradients(model)
    assert calls == {"lora_linears": 2, "lora_gated_mlp": 2, "lora_linear": 2}
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_no_unpacked_weight_is_kept():
    layer = build().get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert lora.fits(layer) is None and lora.verify(layer, "cpu") is None
    x = torch.randn(40, 32, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append((t.dtype, t.numel())), t)[1], lambda t: t):
        lora.lora_forward(layer, x)
    assert (torch.uint8, 32 * 56 // 2) in sizes and (torch.float32, 32 * 56) not in sizes


def test_a_dtype_that_the_layer_would_cast_is_its_own_business(calls):
    """fp32 hidden states under bf16 autocast: the 4-bit linear computes in its compute dtype and gives back fp32."""
    model = build()
    expected = gradients(model, autocast=True)
    patch_model(model)
    calls.clear()
    ours = gradients(model, autocast=True)
    assert not calls
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 3e-2 * gradient.norm(), name


def test_the_probe_notices_a_wrong_weight(monkeypatch):
    layer = build().get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    original = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *args: original(*args) * 1.01)
    assert "differs from PEFT's" in (lora.verify(layer, "cpu") or "")
