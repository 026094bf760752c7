"""LoRA over bitsandbytes' 8-bit linears: PEFT's numbers, from bitsandbytes' own forward, nothing full-size kept.

bitsandbytes multiplies in floats where a layer trains on a CPU, and int8 by int8 on a GPU and in eval mode anywhere.
`int8` in these tests puts the base layers into eval mode, and only those.
"""

from __future__ import annotations

import lora_checks
import pytest
import tiny_models
import torch
from torch import nn

from chronicals_trl import patch_model
from chronicals_trl.model import lora, lora_state

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")


def eight_bit(linear: nn.Linear, threshold: float = 6.0) -> nn.Module:
    """As transformers' quantiser makes it: frozen int8, outliers above 6 in full precision."""
    new = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=threshold
    )
    new.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    new.bias = linear.bias
    return new.to("cpu")


# fp64: a difference in the last bit of fp32 makes some element of x round to another of the 127 levels.
def build(*blocks: str, dropout: float = 0.05, int8: bool = False, **options) -> nn.Module:
    model = tiny_models.build("qwen2")
    for layer in model.model.layers:
        for block in map(layer.get_submodule, blocks or ("self_attn", "mlp")):
            for name, linear in list(block.named_children()):
                if type(linear) is nn.Linear:
                    setattr(block, name, eight_bit(linear))
    model.is_loaded_in_8bit = True
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return mode(peft.get_peft_model(model, peft.LoraConfig(lora_dropout=dropout, **options)), int8).double()


def mode(model: nn.Module, int8: bool) -> nn.Module:
    """The model in training mode, its 8-bit linears in the mode in which they multiply int8."""
    for module in model.train().modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.train(not int8)
    return model


def gradients(model: nn.Module, dtype: torch.dtype = torch.float64, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Of every trained parameter and of the embedded tokens in `dtype`, and the loss."""
    torch.manual_seed(3)
    batch = tiny_models.packed_batch()
    x = model.get_input_embeddings()(batch.pop("input_ids")).detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(inputs_embeds=x, **batch, use_cache=False).loss
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad} | {"x": x}
    found = torch.autograd.grad(loss, list(wanted.values()))
    return {"loss": loss.detach(), **dict(zip(wanted, found, strict=True))}


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == expected.keys()
    for name, reference in expected.items():
        assert ours[name].dtype == reference.dtype
        assert (ours[name] - reference).norm() <= tolerance * reference.norm(), name


@pytest.fixture
def calls(monkeypatch):
    return lora_checks.count_nodes(monkeypatch)


def test_bitsandbytes_forward_is_no_dequantised_product_and_its_backward_is() -> None:
    """What the operands rest on: the forward has to be bitsandbytes' own."""
    torch.manual_seed(0)
    layer = eight_bit(nn.Linear(64, 48, bias=False)).eval()
    x = torch.randn(40, 64, requires_grad=True)
    y = layer(x)
    grad_y = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    weight = layer.state.CB.float() * layer.state.SCB[:, None] / 127
    assert 1e-3 < (y - x @ weight.t()).norm() / y.norm() < 2e-2
    assert (grad_x - grad_y @ weight).norm() < 1e-5 * grad_x.norm()


# -- whole models: q, k and v, the MLP, o_proj ------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_model_learns_the_same(dropout, int8, calls):
    expected = gradients(build(dropout=dropout, int8=int8))
    model = build(dropout=dropout, int8=int8)
    report = patch_model(model)
    assert report["lora"].state == "on" and report["lora"].modules == 14 and report["lora"].reason is None
    calls.clear()  # the probes'
    ours = gradients(model)  # the first call of all
    assert calls == {"lora_linears": 2, "lora_gated_mlp": 2, "lora_linear": 2}
    assert_same(ours, expected)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_under_autocast(dropout, int8, calls):
    """bf16 hidden states: adapters in fp32, everything computed in bf16."""
    exact = gradients(build(dropout=dropout, int8=int8))
    model = build(dropout=dropout, int8=int8).bfloat16()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    eager = gradients(mode(model, int8), torch.bfloat16, autocast=True)
    patch_model(model)
    calls.clear()
    ours = gradients(model, torch.bfloat16, autocast=True)
    assert calls == {"lora_linears": 2, "lora_gated_mlp": 2, "lora_linear": 2}
    for name, reference in exact.items():
        assert ours[name].dtype == eager[name].dtype
        error, eager_error = ((g[name].float() - reference).norm() / reference.norm() for g in (ours, eager))
        assert error <= 1.5 * eager_error + 2e-3, name


def test_hidden_states_that_autocast_would_narrow_are_the_layers_own_business(calls):
    model = build(int8=True).float()
    expected = gradients(model, torch.float32, autocast=True)
    patch_model(model)
    calls.clear()
    ours = gradients(model, torch.float32, autocast=True)
    assert calls == {"lora_linear": 2}  # o_proj, whose input is bf16
    assert_same(ours, expected, 3e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_from_the_first_call(reentrant, calls):
    """What the backward pass makes again has to be what the first call made, though that had to set up the state."""
    expected = gradients(build(int8=True))
    model = build(int8=True)
    patch_model(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad(set_to_none=True)
    model.enable_input_require_grads()
    torch.manual_seed(3)
    model(**tiny_models.packed_batch(), use_cache=False).loss.backward()
    # A reentrant checkpoint's first pass has gradients off: there each layer is called by itself.
    assert calls["lora_gated_mlp"] == (2 if reentrant else 4)
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(ours, {n: g for n, g in expected.items() if n in ours and "lora_" in n})


def test_layers_of_other_kinds_in_the_same_model(calls):
    expected = gradients(build("mlp", int8=True))
    model = build("mlp", int8=True)
    assert patch_model(model)["lora"].modules == 14
    calls.clear()
    ours = gradients(model)
    assert calls == {"lora_linears": 2, "lora_gated_mlp": 2, "lora_linear": 2}
    assert_same(ours, expected)


def test_kinds_mixed_in_one_node(calls):
    """q in 8 bits, k and v as they were."""

    def mixed():
        model = build("mlp", int8=True)
        for layer in model.base_model.model.model.layers:
            attention = layer.self_attn
            q = attention.q_proj
            new = peft.tuners.lora.bnb.Linear8bitLt(
                eight_bit(q.base_layer), "default", config=model.peft_config["default"], r=4, lora_alpha=6
            )
            new.load_state_dict(q.state_dict(), strict=False)
            attention.q_proj = new
        return mode(model, int8=True).double()

    torch.manual_seed(1)
    expected = gradients(mixed())
    torch.manual_seed(1)
    model = mixed()
    patch_model(model)
    calls.clear()
    ours = gradients(model)
    assert calls == {"lora_linears": 2, "lora_gated_mlp": 2, "lora_linear": 2}
    assert_same(ours, expected)


# -- one layer --------------------------------------------------------------------------------------------------------


def layer_of(*, linear_bias: bool = True, threshold: float = 6.0, **options) -> nn.Module:
    torch.manual_seed(2)
    net = nn.Sequential(eight_bit(nn.Linear(40, 24, linear_bias), threshold))
    net.is_loaded_in_8bit = True
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "lora_dropout": 0.05, **options}
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], **options))
    return mode(model, int8=True).base_model.model[0]


def layer_gradients(forward, layer, x, autocast=False):
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = forward(layer, x)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    wanted = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_y), strict=True))}


def both(layer, x, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert lora_state.lora_operands(layer, x) is not None
    ours = layer_gradients(lora.lora_forward, layer, x, autocast)
    return ours, layer_gradients(type(layer).forward, layer, x, autocast)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 7, 40), (5, 40), (1, 40), (2, 0, 40)], ids=str)
def test_a_layer(shape, dtype, dropout, int8):
    """Adapters in fp32, which a 16-bit x is widened for. With an empty batch nothing is drawn either."""
    layer = layer_of(lora_dropout=dropout)
    layer.base_layer.train(not int8)
    x = torch.randn(shape).to(dtype).requires_grad_()
    ours, theirs = both(layer, x)
    assert_same(ours, theirs, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    for name in ("lora_A.default.weight", "lora_B.default.weight"):
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_layer_under_autocast(dropout, int8):
    layer = layer_of(lora_dropout=dropout)
    layer.base_layer.train(not int8)
    x = torch.randn(3, 7, 40).bfloat16().requires_grad_()
    ours, theirs = both(layer, x, autocast=True)
    assert_same(ours, theirs, 2e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_dtype_in_which_dropout_draws(autocast):
    """PEFT casts x to A's dtype before it, but not under autocast. On a GPU the mask depends on it."""
    layer, x = layer_of(), torch.randn(3, 40).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        operands = lora_state.lora_operands(layer, x)
    assert operands.dropout_dtype == (torch.bfloat16 if autocast else torch.float32)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_outlier_columns(threshold):
    layer, x = layer_of(threshold=threshold), torch.randn(3, 7, 40, requires_grad=True)
    ours, theirs = both(layer, x)
    assert layer.base_layer.state.idx is None if not threshold else layer.base_layer.state.idx.numel()
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_is_trained(dtype):
    """bitsandbytes casts it to x's dtype, for good; its gradient comes in that dtype."""
    layer, x = layer_of(bias="lora_only"), torch.randn(3, 7, 40, dtype=dtype, requires_grad=True)
    assert layer.base_layer.bias.requires_grad
    ours, theirs = both(layer, x)
    assert ours["base_layer.bias"].dtype == dtype
    assert_same(ours, theirs, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_a_layer_without_bias():
    assert_same(*both(layer_of(linear_bias=False), torch.randn(3, 40, requires_grad=True)))


def test_the_base_output_is_bitsandbytes_own_to_the_bit():
    """An adapter of zeros adds nothing. Made in fp32 from fp16 results, so a second rounding would show too."""
    layer, x = layer_of(init_lora_weights=True, lora_dropout=0.0), torch.randn(3, 7, 40)
    operands = lora_state.lora_operands(layer, x)
    assert operands.weight is layer.base_layer.state.CB and operands.call is layer.base_layer
    assert torch.equal(lora.lora_forward(layer, x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_unpacked_weight_is_that_of_bitsandbytes_backward(dtype):
    """To the bit: the identity goes through its backward, which then is the weight it multiplies by."""
    layer = layer_of().base_layer
    x = torch.randn(24, 40, dtype=dtype, requires_grad=True)
    (theirs,) = torch.autograd.grad(layer(x), x, torch.eye(24, dtype=dtype))
    stored = lora_state._stored_in_8bit(layer, x)
    before = layer.state.CB.clone()
    assert torch.equal(stored.unpack(stored.weight), theirs)
    assert torch.equal(layer.state.CB, before)


def test_no_unpacked_weight_is_kept():
    layer, x = layer_of(), torch.randn(9, 40, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        lora.lora_forward(layer, x)
    sizes = [(t.dtype, t.numel()) for t in saved]
    assert (torch.int8, 24 * 40) in sizes and not any(t.is_floating_point() and t.numel() == 24 * 40 for t in saved)
    codes = next(t for t in saved if t.dtype == torch.int8)
    assert codes.data_ptr() == layer.base_layer.state.CB.data_ptr()


# -- states in which PEFT's own path runs ----------------------------------------------------------------------------


@pytest.fixture
def plain_state():
    layer, x = layer_of(), torch.randn(3, 7, 40, requires_grad=True)
    assert lora_state.lora_operands(layer, x) is not None
    return layer, x


@pytest.mark.filterwarnings("ignore:.*merge lora module to 8-bit")
def test_merged_and_unmerged(plain_state):
    layer, x = plain_state
    layer.merge()
    assert lora_state.lora_operands(layer, x) is None
    assert torch.equal(lora.lora_forward(layer, x), layer.base_layer(x))
    layer.unmerge()  # bitsandbytes quantises the weight anew: another state
    ours, theirs = both(layer, x)
    assert_same(ours, theirs)


def test_disabled_and_enabled(plain_state):
    layer, x = plain_state
    layer.enable_adapters(False)
    assert lora_state.lora_operands(layer, x) is None
    assert torch.equal(lora.lora_forward(layer, x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert lora_state.lora_operands(layer, x) is not None


@pytest.mark.parametrize("missing", ["CB", "SCB"])
def test_a_state_without_a_quantised_weight(plain_state, missing):
    layer, x = plain_state
    setattr(layer.base_layer.state, missing, None)
    assert lora_state.lora_operands(layer, x) is None


def test_torch_compile_gets_pefts_path(plain_state, monkeypatch):
    layer, x = plain_state
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert lora_state.lora_operands(layer, x) is None


def test_hooks_on_the_base_layer(plain_state):
    layer, x = plain_state
    layer.base_layer.register_forward_hook(lambda module, args, output: None)
    assert lora_state.lora_operands(layer, x) is None and "base_layer has hooks" in lora.fits(layer)


def test_weights_that_stay_in_16_bits_are_named():
    layer = layer_of()
    layer.base_layer.state.has_fp16_weights = True
    assert "has_fp16_weights" in lora.fits(layer)
    assert lora_state.lora_operands(layer, torch.randn(3, 40)) is None


def test_a_subclass_is_named():
    class Mine(bnb.nn.Linear8bitLt):
        pass

    layer = layer_of()
    layer.base_layer.__class__ = Mine
    assert lora.fits(layer) == "base layer is Mine"


def test_strict_takes_them():
    assert patch_model(build(), {"lora": "on", "gated_mlp": "on"})["lora"].state == "on"


# -- the probe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.0}, {"linear_bias": False}, {"threshold": 0.0}], ids=str)
def test_the_probe_agrees_and_leaves_no_trace(options, int8):
    layer = layer_of(**options)
    layer.base_layer.train(not int8)
    state = torch.get_rng_state()
    assert lora.fits(layer) is None and lora.verify(layer, "cpu") is None
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.base_layer.state.CB is None and layer.base_layer.weight.CB is not None  # still before its first call


@pytest.mark.parametrize("what", ["scales", "forward"])
def test_the_probe_notices(what, monkeypatch):
    told = lora_checks.break_eight_bit(monkeypatch, what)
    assert told in (lora.verify(layer_of(), "cpu") or "")
