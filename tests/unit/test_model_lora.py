"""Fused LoRA on PEFT layers: the same numbers as PEFT, and PEFT's own path whenever the state is not the plain one."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from chronicals_trl.model import lora as fused

peft = pytest.importorskip("peft")
from peft.helpers import disable_input_dtype_casting  # noqa: E402  (needs the skip above)
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Calls:
    """How often lora_linear ran."""

    def __init__(self, monkeypatch):
        self.count = 0
        original = fused.lora_linear

        def counting(*args, **kwargs):
            self.count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(fused, "lora_linear", counting)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def tiny_llama(**config):
    torch.manual_seed(0)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(**config))


def lora_llama(**config):
    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **config}
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **config)).train()


def lora_layer(base=None, **config):
    """A single LoRA layer, 12 -> 10."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": base or nn.Linear(12, 10)})
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["proj"], "init_lora_weights": False, **config}
    return peft.inject_adapter_in_model(peft.LoraConfig(**config), model)["proj"]


def bind(layer):
    layer.forward = types.MethodType(fused.lora_forward, layer)
    return layer


def fuse(model):
    layers = [m for m in model.modules() if fused.match_lora(m)]
    for layer in layers:
        assert fused.fits(layer) is None
        bind(layer)
    return len(layers)


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


IDS = torch.arange(2 * 9).remainder(64).view(2, 9)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"bias": "all"}, {"r": 1}], ids=str)
def test_a_model_learns_the_same(config, calls):
    model = lora_llama(**config).double()  # in fp32 the small gradients of q and k are near their own rounding
    expected_loss, expected = loss_and_gradients(model, IDS)
    assert calls.count == 0
    assert fuse(model) == 14
    loss, gradients = loss_and_gradients(model, IDS)
    assert calls.count == 14
    assert gradients.keys() == expected.keys()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, reference in expected.items():
        assert reference.abs().max() > 0, name
        assert (gradients[name] - reference).abs().max() <= 1e-10 * reference.abs().max(), name


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_precision(weights, autocast, calls):
    """PEFT keeps the adapters in fp32 here; ours is about as close to fp64 as PEFT is."""
    model = lora_llama()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(weights)
    exact_loss, exact = loss_and_gradients(copy.deepcopy(model).double(), IDS)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss_and_gradients(model, IDS)

    eager_loss, eager = run()
    fuse(model)
    loss, gradients = run()
    assert calls.count == 14 and loss.dtype == eager_loss.dtype
    eps = torch.finfo(torch.float32 if weights is torch.float32 and not autocast else torch.bfloat16).eps
    assert (loss - exact_loss).abs() <= 2 * (eager_loss - exact_loss).abs() + eps * exact_loss
    for name, ref in exact.items():
        assert gradients[name].dtype == eager[name].dtype
        error, eager_error = ((g[name].double() - ref).norm() for g in (gradients, eager))
        assert error <= 2 * eager_error + eps * ref.norm(), name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, calls):
    model = lora_llama().double()
    _, expected = loss_and_gradients(model, IDS)
    fuse(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    _, gradients = loss_and_gradients(model, IDS)
    assert calls.count == 28  # each layer again in the backward pass
    for name, reference in expected.items():
        assert (gradients[name] - reference).abs().max() <= 1e-10 * reference.abs().max(), name


def test_compiles_without_a_break():
    torch._dynamo.reset()
    layer, x = bind(lora_layer()), torch.randn(3, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    eager = torch.autograd.grad(LoraLinear.forward(layer, x).square().sum(), wanted)
    for p, q in zip(torch.autograd.grad(compiled(x).square().sum(), wanted), eager, strict=True):
        torch.testing.assert_close(p, q)


def test_one_graph_for_all_layers():
    """The checks on the layer's state must not recompile per layer."""
    torch._dynamo.reset()
    model = nn.Sequential(*(bind(lora_layer(nn.Linear(12, 12))) for _ in range(12)))
    x = torch.randn(3, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_merge_save_and_disable_are_peft_s_own(tmp_path, calls):
    model = lora_llama().eval()
    plain = copy.deepcopy(model)
    fuse(model)

    def logits(m):
        with torch.no_grad():
            return m(input_ids=IDS).logits

    torch.testing.assert_close(logits(model), logits(plain))
    assert calls.count == 14
    with model.disable_adapter():
        without = logits(model)
    assert calls.count == 14
    with plain.disable_adapter():
        torch.testing.assert_close(without, logits(plain), rtol=0, atol=0)
    assert not torch.allclose(without, logits(plain), atol=1e-3)

    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(reloaded), logits(plain))
    assert fuse(reloaded) == 14

    calls.count = 0
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    assert calls.count == 0
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    assert calls.count == 14

    merged = model.merge_and_unload()
    assert not any(fused.match_lora(m) for m in merged.modules())
    torch.testing.assert_close(logits(merged), logits(plain), rtol=1e-4, atol=1e-5)


def test_deepcopy_trains_the_copy():
    layer = bind(lora_layer())
    other = copy.deepcopy(layer)
    assert other.forward.__self__ is other
    other(torch.randn(3, 12)).sum().backward()
    assert other.lora_B["default"].weight.grad is not None and layer.lora_B["default"].weight.grad is None


def test_a_bound_layer_pickles():
    layer, x = bind(lora_layer()), torch.randn(3, 12)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))


def same_as_peft(layer, calls, *args, fused_calls, **kwargs):
    """The call gives exactly what the class's forward gives, through lora_linear as often as said."""
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = type(layer).forward(layer, x, *args, **kwargs)
    calls.count = 0
    torch.manual_seed(1)
    actual = layer(x, *args, **kwargs)
    assert calls.count == fused_calls
    torch.testing.assert_close(actual, expected, rtol=1e-6 if fused_calls else 0, atol=1e-6 if fused_calls else 0)
    return actual


def test_dropout(calls):
    layer = bind(lora_layer(lora_dropout=0.5))
    assert fused.fits(layer) is None
    first = same_as_peft(layer.train(), calls, fused_calls=1)
    second = same_as_peft(layer.eval(), calls, fused_calls=1)
    assert not torch.equal(first, second)
    layer.train().lora_dropout["default"].eval()  # the module's own mode counts
    torch.testing.assert_close(same_as_peft(layer, calls, fused_calls=1), second)
    layer.train().lora_dropout["default"].p = 1.0
    assert fused.fits(layer) == "dropout 1 lets nothing through to the adapter"
    same_as_peft(layer, calls, fused_calls=0)


def test_a_hooked_dropout_is_called(calls):
    layer, seen = bind(lora_layer(lora_dropout=0.5)), []
    layer.lora_dropout["default"].register_forward_hook(lambda *args: seen.append(1) and None)
    same_as_peft(layer.train(), calls, fused_calls=0)
    assert len(seen) == 2


def test_hooks_of_the_whole_process_see_every_call(calls):
    """As torch's own module tracker has them, to count flops for one."""
    layer, seen = bind(lora_layer()), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    try:
        same_as_peft(layer, calls, fused_calls=0)
    finally:
        handle.remove()
    assert seen.count(layer.base_layer) == 2
    same_as_peft(layer, calls, fused_calls=1)


def test_dora(calls):
    layer = bind(lora_layer(use_dora=True))
    assert fused.fits(layer) == "DoRA"
    same_as_peft(layer, calls, fused_calls=0)


def test_lora_bias(calls):
    layer = bind(lora_layer(lora_bias=True))
    assert "lora_bias" in fused.fits(layer)
    same_as_peft(layer, calls, fused_calls=0)


def test_variant(calls):
    layer = bind(lora_layer())
    layer.lora_variant["default"] = peft.tuners.lora.layer.LoraVariant()
    assert fused.fits(layer) == "LoRA variant LoraVariant"
    with pytest.raises(NotImplementedError):  # the variant's own forward was asked
        layer(torch.randn(3, 12))
    assert calls.count == 0


def test_several_adapters_and_switching(calls):
    layer = bind(lora_layer())
    layer.update_layer(
        "other", r=2, lora_alpha=3, **_update_arguments(peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
    )
    by_adapter = {}
    for name in ("default", "other"):
        layer.set_adapter(name)
        by_adapter[name] = same_as_peft(layer, calls, fused_calls=1)
    assert not torch.allclose(by_adapter["default"], by_adapter["other"])
    layer.set_adapter(["default", "other"])
    assert fused.fits(layer) == "2 adapters are active on the layer (1 is fused)"
    same_as_peft(layer, calls, fused_calls=0)
    layer._active_adapter = "elsewhere"  # an adapter that targets other layers
    assert fused.fits(layer) == "no active adapter (elsewhere) is on the layer"
    same_as_peft(layer, calls, fused_calls=0)


def _update_arguments(config):
    """update_layer took the fields one by one before peft 0.19 or so."""
    parameters = inspect.signature(LoraLinear.update_layer).parameters
    if "config" in parameters:
        return {"config": config}
    return {n: getattr(config, n) for n in parameters if hasattr(config, n) and n not in ("r", "lora_alpha")}


def test_per_row_adapters(calls):
    layer = bind(lora_layer())
    same_as_peft(layer, calls, fused_calls=0, adapter_names=["default", "__base__", "default"])


def test_scaling_is_read_on_each_call(calls):
    layer = bind(lora_layer())
    before = same_as_peft(layer, calls, fused_calls=1)
    layer.scale_layer(3.0)
    after = same_as_peft(layer, calls, fused_calls=1)
    assert not torch.allclose(before, after)
    layer.scaling["default"] = torch.tensor(0.5)
    assert "scaling is a tensor" in fused.fits(layer)
    same_as_peft(layer, calls, fused_calls=0)


def test_a_weight_that_becomes_trainable(calls):
    layer = bind(lora_layer())
    layer.base_layer.weight.requires_grad_(True)
    assert fused.fits(layer) == "base weight is trainable"
    same_as_peft(layer, calls, fused_calls=0).sum().backward()
    assert layer.base_layer.weight.grad is not None


@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize(
    "kind", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook", "instance_forward"]
)
def test_hooked_parts_are_called(where, kind, calls):
    """ZeRO-3, FSDP units around single linears and offloading gather the weight in hooks."""
    layer = bind(lora_layer())
    part = layer.base_layer if where == "base_layer" else getattr(layer, where)["default"]
    seen = []
    if kind == "instance_forward":
        part.forward = lambda x: seen.append(1) or type(part).forward(part, x)
    else:
        getattr(part, f"register_{kind}")(lambda *args: seen.append(1) and None)
    assert fused.fits(layer).startswith(f"{where} has hooks")
    layer(torch.randn(3, 12, requires_grad=True)).sum().backward()
    assert seen and calls.count == 0


def test_tensor_subclasses_keep_the_original_path(calls):
    class Quantised(torch.Tensor):
        pass

    layer = bind(lora_layer())
    weight = layer.base_layer.weight.data.as_subclass(Quantised)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    assert fused.fits(layer) == "base_layer's weight is Quantised"
    same_as_peft(layer, calls, fused_calls=0)


def test_dtypes_that_the_op_refuses(calls):
    """bf16 adapters on an fp32 model: PEFT rounds x for the adapter, and so does the original path that is kept."""
    layer = bind(lora_layer())
    for part in (layer.lora_A, layer.lora_B):
        part.to(torch.bfloat16)
    same_as_peft(layer, calls, fused_calls=0)


def test_input_casting_switched_off(calls):
    layer = bind(lora_layer(nn.Linear(12, 10, dtype=torch.bfloat16)))
    for part in (layer.lora_A, layer.lora_B):
        part.float()
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    assert layer(x).dtype is torch.bfloat16 and calls.count == 1
    with disable_input_dtype_casting(layer), pytest.raises(RuntimeError, match="dtype"):
        layer(x)


class Scaled(nn.Linear):
    """A base layer of another class: what it computes is its own business."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_not_a_plain_lora_linear():
    assert not fused.match_lora(nn.Linear(2, 2))
    assert fused.fits(nn.Linear(2, 2)) == "Linear is not a LoRA layer of PEFT"
    layer = lora_layer(Scaled(12, 10))
    assert fused.match_lora(layer) and fused.fits(layer) == "base layer is Scaled"
    embedding = lora_layer(nn.Embedding(12, 10))
    assert fused.match_lora(embedding) and fused.fits(embedding) == "base layer is Embedding"
    subclassed = lora_layer()
    subclassed.__class__ = type("Mine", (LoraLinear,), {})
    assert fused.fits(subclassed).endswith(".Mine")


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"bias": "all"}, {"lora_alpha": 0}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_probe_passes(config, bias):
    layer = lora_layer(nn.Linear(12, 10, bias=bias), **config)
    assert fused.fits(layer) is None
    before = {n: p.clone() for n, p in layer.named_parameters()}
    modules = dict(layer.named_modules())
    attributes = dict(layer.__dict__)
    rng = torch.get_rng_state()
    assert fused.verify(layer, "cpu") is None
    assert torch.equal(torch.get_rng_state(), rng)
    assert dict(layer.named_modules()) == modules and layer.__dict__ == attributes
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_probe_does_not_need_values_or_the_caller_s_modes():
    layer = lora_layer(nn.Linear(12, 10, device="meta"))
    assert fused.verify(layer, "meta") is None
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert fused.verify(layer, "cpu") is None


def wrong_scale(x, weight, a, b, scale, *, bias=None, **options):
    return fused_original(x, weight, a, b, scale * 1.001, bias=bias, **options)


def wrong_bias(x, weight, a, b, scale, *, bias=None, **options):
    return fused_original(x, weight, a, b, scale, **options)


def wrong_gradient(x, weight, a, b, scale, *, bias=None, **options):
    return fused_original(x, weight, a.detach() + 0 * a, b, scale, bias=bias, **options)


def not_finite(x, weight, a, b, scale, *, bias=None, **options):
    return fused_original(x, weight, a, b, scale, bias=bias, **options) * float("nan")


def wrong_dtype(x, weight, a, b, scale, *, bias=None, **options):
    return fused_original(x, weight, a, b, scale, bias=bias, **options).float()


def crashing(*args, **kwargs):
    raise RuntimeError("no such kernel")


fused_original = fused.lora_linear


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (wrong_scale, "probe: output differs"),
        (wrong_bias, "probe: output differs"),
        (wrong_gradient, r"probe: gradient of lora_A\.default\.weight differs"),
        (not_finite, "probe: output differs from PEFT's by nan"),
        (wrong_dtype, r"probe: output is \(2, 3, 16\) torch.float32, PEFT's is \(2, 3, 16\) torch.float64"),
        (crashing, "probe failed: RuntimeError: no such kernel"),
    ],
)
def test_probe_catches(broken, reason, monkeypatch):
    monkeypatch.setattr(fused, "lora_linear", broken)
    verdict = fused.verify(lora_layer(), "cpu")
    assert verdict is not None
    assert re.match(reason, verdict)


def without_dropout(x, weight, a, b, scale, *, bias=None, **options):
    return fused_original(x, weight, a, b, scale, bias=bias, **{**options, "dropout": 0.0})


def test_probe_catches_a_missing_dropout_where_the_layer_has_one(monkeypatch):
    monkeypatch.setattr(fused, "lora_linear", without_dropout)
    assert fused.verify(lora_layer(), "cpu") is None
    assert "output differs" in (fused.verify(lora_layer(lora_dropout=0.1), "cpu") or "")


def test_probe_catches_a_class_that_computes_something_else(monkeypatch):
    original = LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda self, x, *a, **k: original(self, x, *a, **k) + 0.1)
    assert "output differs" in fused.verify(lora_layer(), "cpu")


def test_probe_says_so_when_it_would_compare_the_original_with_itself():
    layer = lora_layer()
    layer.enable_adapters(False)
    assert fused.fits(layer) == "adapters are disabled"
    assert fused.verify(layer, "cpu") == "probe: the layer's state keeps the original path"
