"""LoRA layers that share their input, as one node of the block around them: PEFT's numbers, masks and training."""

from __future__ import annotations

import copy
import types

import pytest
import tiny_models
import torch
from torch import nn

from chronicals_trl import patch_model, unpatch_model
from chronicals_trl.kernels import _lora_linear
from chronicals_trl.model import lora, lora_state, match, rope

peft = pytest.importorskip("peft")

SHARED = "q, k and v as one node in 2 layers"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "qkv_proj"]


def build(family="qwen2", targets=ALL, dropout=0.0, **options):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    config = peft.LoraConfig(target_modules=targets, lora_dropout=dropout, **options)
    return peft.get_peft_model(tiny_models.build(family), config).train()


def gradients(model, seed=3, **options):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**tiny_models.packed_batch(), use_cache=False, **options).loss
    loss.backward()
    state = torch.get_rng_state()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, loss.item(), state


def require_same(ours, theirs, tolerance=1e-5):
    assert ours[0].keys() == theirs[0].keys()
    for name, gradient in theirs[0].items():
        assert gradient.norm() > 0, name
        assert (ours[0][name] - gradient).norm() <= tolerance * gradient.norm(), name
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
    assert torch.equal(ours[2], theirs[2])  # the random generator stands where PEFT leaves it


def patch(model, calls, config=None):
    """Patch, and forget the calls that the probes made."""
    report = patch_model(model, config)
    calls.update(dict.fromkeys(calls, 0))
    return report


@pytest.fixture
def calls(monkeypatch):
    """Calls of q/k/v's node, the MLP's, and of single layers."""
    counts = {"qkv": 0, "mlp": 0, "single": 0}

    def count(module, name, key):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            counts[key] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(rope, "lora_linears", "qkv")
    count(match, "lora_gated_mlp", "mlp")
    count(lora, "lora_linear", "single")
    return counts


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_a_model_learns_the_same(family, dropout, calls):
    model = build(family, dropout=dropout)
    expected = gradients(model)
    report = patch(model, calls)
    assert report["lora"].state == "on" and report["lora"].reason is None
    assert (SHARED in report.notes) == (family != "phi3")
    require_same(gradients(model), expected)
    assert calls == ({"qkv": 0, "mlp": 2, "single": 4} if family == "phi3" else {"qkv": 2, "mlp": 2, "single": 2})
    assert not match.DEPUTIES.projections
    unpatch_model(model)
    assert gradients(model)[1] == expected[1]


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["q_proj", "v_proj"], ["gate_proj", "o_proj"], ["down_proj", "k_proj"]]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_some_projections_without_an_adapter(targets, dropout, calls):
    model = build(targets=targets, dropout=dropout)
    expected = gradients(model)
    patch(model, calls)
    require_same(gradients(model), expected)
    assert calls["qkv"] == (2 if {"q_proj", "k_proj", "v_proj"} & set(targets) else 0)
    assert calls["mlp"] == (2 if {"gate_proj", "down_proj"} & set(targets) else 0)


def test_ranks_and_scales_of_their_own(calls):
    model = build(rank_pattern={"k_proj": 1, "v_proj": 9, "up_proj": 2}, alpha_pattern={"v_proj": 1, "down_proj": 2})
    expected = gradients(model)
    patch(model, calls)
    require_same(gradients(model), expected)
    assert calls == {"qkv": 2, "mlp": 2, "single": 2}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant, calls):
    model = build(dropout=0.3)
    expected = gradients(model)
    patch(model, calls)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    require_same(gradients(model), expected)
    # A reentrant checkpoint's first pass has gradients off: there each layer is called by itself, in the same order.
    assert calls["qkv"] == (2 if reentrant else 4)


def test_bf16_autocast(calls):
    """PEFT's fp32 adapters on a bf16 model; the masks are drawn in fp32, as PEFT's are."""
    model = build(dropout=0.2)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    exact = gradients(copy.deepcopy(model).double())[0]

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model)

    eager = run()
    patch(model, calls)
    ours = run()
    assert calls == {"qkv": 2, "mlp": 2, "single": 2}
    assert torch.equal(ours[2], eager[2])
    for name, ref in exact.items():
        error, eager_error = ((g[0][name].double() - ref).norm() for g in (ours, eager))
        assert error <= 2 * eager_error + 2**-8 * ref.norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_hundred_steps(dropout):
    curves = []
    for patched in (False, True):
        model = build(dropout=dropout)
        if patched:
            patch_model(model)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4)
        torch.manual_seed(11)
        curve = []
        for _ in range(100):
            loss = model(**tiny_models.packed_batch(), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-4)


# -- who is in another state, hooked or not ours is called as itself -------------------------------------------------


def hook(model):
    model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj").register_forward_hook(lambda *a: None)


def hook_inside(model):
    part = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj.lora_A.default")
    part.register_forward_hook(lambda *a: None)


def disable_one(model):
    model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj").enable_adapters(False)


def other_forward(model):
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
    layer.forward = types.MethodType(lambda self, x: 1.5 * type(self).forward(self, x), layer)


def merge_one(model):
    model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj").merge()


def train_base(model):
    model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj.base_layer").weight.requires_grad_()


@pytest.mark.parametrize("change", [hook, hook_inside, disable_one, other_forward, merge_one, train_base])
def test_one_that_has_to_be_called(change, calls):
    model = build()
    change(bare := copy.deepcopy(model))
    patch(model, calls)
    change(model)
    ours, theirs = gradients(model), gradients(bare)
    ours[0].update({n: g for n, g in theirs[0].items() if g.norm() == 0})  # of the adapter that is not in use
    assert calls["qkv"] == 1
    assert ours[0].keys() == theirs[0].keys()
    for name, gradient in theirs[0].items():
        assert (ours[0][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_lora_off_leaves_peft_alone(calls):
    model = build(dropout=0.3)
    expected = gradients(model)
    report = patch(model, calls, {"lora": "off"})
    assert SHARED not in report.notes
    require_same(gradients(model), expected)
    assert calls == {"qkv": 0, "mlp": 0, "single": 0}


def test_disable_adapter_and_merging(calls):
    model = build()
    plain = copy.deepcopy(model)
    patch(model, calls)
    ids = torch.arange(12).view(1, 12)
    with model.disable_adapter(), plain.disable_adapter():
        assert calls["qkv"] == 0
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert calls == {"qkv": 0, "mlp": 0, "single": 0}
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert calls["qkv"] == 2
    model.set_adapter("default")
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_swapping_adapters(calls):
    model = build()
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=5, target_modules=ALL, init_lora_weights=False))
    plain = copy.deepcopy(model)
    patch(model, calls)
    for name in ("other", "default"):
        model.set_adapter(name)
        plain.set_adapter(name)
        require_same(gradients(model), gradients(plain))
    assert calls["qkv"] == 4


def test_an_error_in_the_block_leaves_nothing_behind():
    model = build()
    patch_model(model)
    with pytest.raises(RuntimeError):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 9), use_cache=False)
    assert not match.DEPUTIES.projections


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_a_break(dropout):
    torch._dynamo.reset()
    model = build(dropout=dropout)
    patch_model(model)
    block = model.get_submodule("base_model.model.model.layers.0.mlp")
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    ours = compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, block(x), rtol=1e-4, atol=1e-5)


def test_the_probe_notices_another_mask(monkeypatch):
    layer = build(dropout=0.3).get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert lora.verify(layer, "cpu") is None
    original = _lora_linear.core._drop

    def other_mask(x, *args):
        torch.rand(1)
        return original(x, *args)

    monkeypatch.setattr(_lora_linear.core, "_drop", other_mask)
    assert "output differs from PEFT's" in lora.verify(layer, "cpu")


def test_a_plain_projection_that_came_later_is_called(calls):
    """It would not give out what it is handed, and the others' masks would be drawn for a result that nobody takes."""
    model = build(targets=["q_proj", "v_proj"], dropout=0.3)
    patch(model, calls)
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    fresh = nn.Linear(32, attention.k_proj.out_features).requires_grad_(False)
    fresh.load_state_dict(attention.k_proj.state_dict())
    attention.k_proj = fresh
    ours = gradients(model)
    assert calls["qkv"] == 1
    unpatch_model(model)
    require_same(ours, gradients(model))


def test_the_dtype_that_dropout_draws_in():
    """On a GPU the mask depends on it: PEFT hands the dropout what it has cast to the adapter's dtype."""
    layer = build(dropout=0.3).get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    layer.base_layer.bfloat16()
    operands = lora_state.lora_operands(layer, torch.randn(2, 56, dtype=torch.bfloat16))
    assert operands.dropout == 0.3 and operands.dropout_dtype is torch.float32
