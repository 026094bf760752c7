"""LoRA over 8-bit linears on a GPU, where they multiply int8 by int8: PEFT's numbers and masks, in bf16."""

from __future__ import annotations

import lora_checks
import pytest
import tiny_models
import torch
from torch import nn

from chronicals_trl import kernels, patch_model
from chronicals_trl.model import lora, lora_state, match, rope

if not torch.cuda.is_available():  # bitsandbytes takes seconds to import
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.gpu

A, B = "lora_A.default.weight", "lora_B.default.weight"
BF16 = torch.bfloat16


def eight_bit(linear: nn.Linear, threshold: float = 6.0) -> nn.Module:
    """As transformers' quantiser makes it. Weights are quantised on their way from the CPU."""
    new = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=threshold
    )
    weight = linear.weight.detach().cpu().clone()
    new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    new = new.to("cuda")
    assert new.weight.dtype == torch.int8 and new.weight.is_cuda
    return new


def wrapped(model: nn.Module, targets, adapters: torch.dtype, **options) -> nn.Module:
    """`model` with adapters on the GPU, which are not left at zero."""
    model.is_loaded_in_8bit = True
    torch.manual_seed(0)
    options = {"r": 8, "lora_alpha": 12, "init_lora_weights": False, "lora_dropout": 0.0, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options)).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to("cuda", adapters)
    return model


def layer_of(adapters=torch.float32, *, bias=True, threshold=6.0, **options) -> nn.Module:
    torch.manual_seed(2)
    net = nn.Sequential(eight_bit(nn.Linear(896, 512, bias, dtype=BF16), threshold))
    layer = wrapped(net, ["0"], adapters, **options).base_model.model[0]
    assert type(layer) is peft.tuners.lora.bnb.Linear8bitLt
    return layer


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = BF16) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to("cuda", dtype).requires_grad_()


def autocast(enabled: bool):
    return torch.autocast("cuda", BF16, enabled=enabled)


def layer_gradients(forward, layer, x, under_autocast):
    torch.manual_seed(4)
    with autocast(under_autocast):
        y = forward(layer, x)
    grad_y = draw(*y.shape, seed=5).detach().to(y.dtype)
    wanted = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(y, list(wanted.values()), grad_y)
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}, torch.cuda.get_rng_state()


def error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    return ((actual.double() - reference.double()).norm() / reference.double().norm()).item()


# -- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("adapters", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 512, 896), (3, 7, 896)], ids=str)
def test_a_layer(shape, bias, adapters, under_autocast, dropout):
    """Another mask would be 20 to 30% of A's gradient. fp32 adapters without autocast keep theirs to about fp32."""
    layer, x = layer_of(adapters, bias=bias, lora_dropout=dropout), draw(*shape)
    with autocast(under_autocast):
        assert lora_state.lora_operands(layer, x) is not None
    ours, our_state = layer_gradients(lora.lora_forward, layer, x, under_autocast)
    theirs, state = layer_gradients(type(layer).forward, layer, x, under_autocast)
    assert torch.equal(our_state, state)  # as much was drawn
    exact = adapters == torch.float32 and not under_autocast
    for name, reference in theirs.items():
        assert ours[name].dtype == reference.dtype and ours[name].shape == reference.shape, name
        allowed = 1e-3 if exact and name in (A, B) else 2e-2
        assert error(ours[name], reference) <= allowed, f"{name}: {error(ours[name], reference):.1e}"


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_the_base_output_is_bitsandbytes_own_to_the_bit(dtype, threshold):
    """With outlier columns, which are multiplied apart. An adapter whose B is zero adds nothing."""
    layer = layer_of(threshold=threshold, init_lora_weights=True)
    x = draw(2, 300, 896, dtype=dtype).detach()
    x[..., 17] *= 30
    ours = lora.lora_forward(layer, x)
    state = layer.base_layer.state
    assert not threshold or state.idx.tolist() == [17]
    assert lora_state.lora_operands(layer, x) is not None
    assert torch.equal(ours, layer.base_layer(x))
    weight = state.CB.float() * state.SCB[:, None] / 127
    product = torch.nn.functional.linear(x.float(), weight, layer.base_layer.bias.float())
    assert 1e-4 < error(ours, product) < 0.1  # int8 by int8, and no product of floats


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_the_unpacked_weight_is_that_of_bitsandbytes_backward(dtype):
    """To the bit: the identity goes through its backward, which then is the weight it multiplies by."""
    base, x = layer_of().base_layer, draw(512, 896, dtype=dtype)
    (theirs,) = torch.autograd.grad(base(x), x, torch.eye(512, dtype=dtype, device="cuda"))
    stored = lora_state._stored_in_8bit(base, x)
    assert torch.equal(stored.unpack(stored.weight), theirs)


def test_a_bias_that_is_trained():
    layer, x = layer_of(bias=True), draw(4, 128, 896)
    layer.base_layer.bias.requires_grad_()
    ours, _ = layer_gradients(lora.lora_forward, layer, x, True)
    theirs, _ = layer_gradients(type(layer).forward, layer, x, True)
    assert ours["base_layer.bias"].dtype == theirs["base_layer.bias"].dtype == BF16
    assert error(ours["base_layer.bias"], theirs["base_layer.bias"]) <= 2e-2


def test_nothing_wide_is_kept():
    layer, x = layer_of(), draw(64, 896)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        lora.lora_forward(layer, x)
    wide = [t for t in saved if t.numel() == 512 * 896]
    assert [t.dtype for t in wide] == [torch.int8] and wide[0].data_ptr() == layer.base_layer.state.CB.data_ptr()


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.05}, {"bias": False}, {"threshold": 0.0}], ids=str)
def test_the_probe_agrees(options):
    layer = layer_of(**options)
    state = torch.cuda.get_rng_state()
    assert lora.fits(layer) is None and lora.verify(layer, "cuda") is None
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("what", ["scales", "forward"])
def test_the_probe_notices(what, monkeypatch):
    told = lora_checks.break_eight_bit(monkeypatch, what)
    assert told in (lora.verify(layer_of(), "cuda") or "")


# -- a decoder layer: q, k and v, o_proj, the MLP ---------------------------------------------------------------------


def model_of(adapters=torch.float32, dropout=0.0) -> nn.Module:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    model = tiny_models.build("qwen2", **sizes).to("cuda", BF16)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if type(linear) is nn.Linear:
                    setattr(block, name, eight_bit(linear))
    return wrapped(model, "all-linear", adapters, lora_dropout=dropout)


def batch() -> dict:
    return {k: v.cuda() if torch.is_tensor(v) else v for k, v in tiny_models.packed_batch((130, 90, 36)).items()}


def model_gradients(model: nn.Module, under_autocast: bool, dtype: torch.dtype = BF16) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    given = batch()
    x = model.get_input_embeddings()(given.pop("input_ids")).detach().to(dtype).requires_grad_()
    with autocast(under_autocast):
        loss = model(inputs_embeds=x, **given, use_cache=False).loss
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad} | {"x": x}
    return {"loss": loss.detach(), **dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))}


@pytest.fixture
def calls(monkeypatch):
    counts = {}
    for module, name in ((rope, "lora_linears"), (match, "lora_gated_mlp"), (lora, "lora_linear")):
        original = getattr(module, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            counts[_name] = counts.get(_name, 0) + 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return counts


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("adapters", [torch.float32, BF16], ids=str)
def test_a_decoder_layer(adapters, under_autocast, calls):
    """By PEFT's own error against the same model computing in fp32 between its int8 products.

    A difference in the last bit of bf16 makes elements round to another of the 127 levels, so neither is the other.
    """
    exact = model_gradients(model_of(adapters).float(), False, torch.float32)
    eager = model_gradients(model_of(adapters), under_autocast)
    model = model_of(adapters)
    report = patch_model(model)
    assert report["lora"].modules == 7 and report["lora"].reason is None, report["lora"]
    calls.clear()
    kernels.LAUNCHES.clear()
    ours = model_gradients(model, under_autocast)  # the first call of all
    assert calls == {"lora_linears": 1, "lora_gated_mlp": 1, "lora_linear": 1}
    inside = under_autocast or adapters == BF16
    assert kernels.LAUNCHES["lora_gated_backward" if inside else "gated_mlp_backward"] == 1, kernels.LAUNCHES
    for name, reference in exact.items():
        assert ours[name].dtype == eager[name].dtype, name
        ours_error, eager_error = error(ours[name], reference), error(eager[name], reference)
        assert ours_error <= 2 * eager_error + 5e-3, f"{name}: {ours_error:.1e}, PEFT {eager_error:.1e}"


@pytest.mark.parametrize("under_autocast", [False, True])
def test_dropout_draws_pefts_masks(under_autocast, calls):
    """Gradients of A, which another mask would leave 20 to 30% off: more than rounding does."""
    eager = model_gradients(model_of(dropout=0.05), under_autocast)
    model = model_of(dropout=0.05)
    patch_model(model)
    calls.clear()
    ours = model_gradients(model, under_autocast)
    assert calls == {"lora_linears": 1, "lora_gated_mlp": 1, "lora_linear": 1}
    for name, reference in eager.items():
        assert error(ours[name], reference) <= 0.1, f"{name}: {error(ours[name], reference):.1e}"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_from_the_first_call(reentrant):
    expected = model_gradients(model_of(), under_autocast=True)
    model = model_of()
    patch_model(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with autocast(True):
        loss = model(**batch(), use_cache=False).loss
    loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in ours.items():
        assert error(gradient, expected[name]) <= 0.1, f"{name}: {error(gradient, expected[name]):.1e}"
