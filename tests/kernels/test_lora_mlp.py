"""The MLP with adapters as one node. `test_interpreter.py` runs this file once more with the kernels interpreted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from kernels.test_lora_linears import (
    leaves,
    make,
    own_forward_reference,
    own_forwards,
    reference,
    run,
    saved_sizes,
)
from torch.nn import functional as F

from chronicals_trl import kernels
from chronicals_trl.kernels import (
    LoraOperands,
    _common,
    _lora_core,
    _lora_dropout,
    _lora_gated,
    _lora_mlp,
    _low_rank,
    lora_gated_mlp,
)

NODE = _common.INTERPRET  # without kernels the same formula runs as separate nodes
INNER = 40


@pytest.fixture(autouse=True)
def launches():
    kernels.LAUNCHES.clear()
    yield kernels.LAUNCHES


@pytest.fixture(autouse=True, params=[True, False], ids=["products inside", "products apart"])
def inside(request, monkeypatch):
    """Where the adapters' products are made; with tiles so small that there are several, and several shares."""
    if not request.param:
        monkeypatch.setattr(_low_rank, "MAX_RANK", -1)
        yield False
        return
    for options in (
        _lora_gated._FORWARD,
        _lora_gated._BACKWARD,
        _lora_dropout._READ,
        _lora_dropout._GRADIENTS,
        _lora_dropout._READ_ONE,
        _lora_dropout._GRADIENTS_ONE,
    ):
        monkeypatch.setitem(options, "BLOCK_M", 16)
        monkeypatch.setitem(options, "BLOCK_N", 16)
    launches = (
        _lora_gated._forward_launch, _lora_gated._backward_launch,
        _lora_dropout._read_launch, _lora_dropout._gradients_launch,
    )  # fmt: skip
    for launch in launches:
        launch.cache_clear()
    yield True
    for launch in launches:
        launch.cache_clear()


def mlp(joint=False, dropout=0.0, ranks=(4, 3, 5), dtype=torch.float32, adapter_dtype=None, lead=(7, 5), bias=False):
    width = 12
    inner = (2 * INNER,) if joint else (INNER, INNER)
    options = {"dtype": dtype, "adapter_dtype": adapter_dtype, "dropout": dropout, "bias": bias}
    x, layers = make(ranks[: len(inner)], lead, width, inner, **options)
    _, (down,) = make(ranks[-1:], lead, INNER, (width,), **options)
    return x, [*layers, down]


def separately(activation, linears=reference):
    def function(x, layers):
        halves = linears(x, layers[:-1])
        gate, up = halves if len(halves) == 2 else halves[0].chunk(2, dim=-1)
        gate = F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh")
        return linears(gate * up, layers[-1:])

    return function


def ours(activation="swiglu", recompute=False):
    return lambda x, ls: (lora_gated_mlp(x, ls[:-1], ls[-1], activation=activation, recompute=recompute),)


def assert_close(actual, expected, tolerance=2e-6):
    assert actual.keys() == expected.keys()
    for name, ref in expected.items():
        assert (actual[name] is None) == (ref is None), name
        if ref is not None:
            assert actual[name].shape == ref.shape, name
            if not ref.numel():
                continue
            error = (actual[name].double() - ref.double()).abs().max()
            assert error <= tolerance * ref.abs().max().clamp_min(1e-6), f"{name}: {error:.1e}"


def doubled(x, layers):
    def wide(t):
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    return wide(x), [LoraOperands(*map(wide, layer[:4]), *layer[4:]) for layer in layers]


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("bias", [False, True])
def test_against_fp64(launches, inside, activation, joint, recompute, bias):
    x, layers = mlp(joint, bias=bias)
    actual, _ = run(ours(activation, recompute), x, layers)
    if NODE:
        name = "lora_gated" if inside else "gated_mlp"
        assert launches - Counter(column_sums=9) == {name: 1, f"{name}_backward": 1}
    assert_close(actual, run(separately(activation), *doubled(x, layers))[0])


@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_with_a_forward_of_their_own(launches, inside, joint, recompute, bias):
    """8-bit linears: what the kernels complete is the layer's own result."""
    x, layers = mlp(joint, bias=bias)
    layers = own_forwards(layers)
    actual, _ = run(ours("swiglu", recompute), x, layers)
    assert not NODE or launches["lora_gated" if inside else "gated_mlp"] == 1
    assert_close(actual, run(separately("swiglu", own_forward_reference), *doubled(x, layers))[0])


@pytest.mark.parametrize("dropout", [0.3, (0.3, 0.0), (0.0, 0.3)], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_dropout_draws_what_peft_draws(dropout, recompute):
    x, layers = mlp(dropout=dropout)
    (actual, our_state), (expected, state) = (
        run(ours(recompute=recompute), x, layers),
        run(separately("swiglu"), x, layers),
    )
    assert torch.equal(our_state, state)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("ranks", [(4, 0, 0), (0, 3, 0), (0, 0, 5), (4, 3, 0), (0, 3, 5)], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_some_without_adapters(ranks, recompute):
    x, layers = mlp(ranks=ranks)
    assert_close(run(ours(recompute=recompute), x, layers)[0], run(separately("swiglu"), *doubled(x, layers))[0])


@pytest.mark.parametrize(
    "frozen", [("x",), ("a2",), ("b2",), ("a0", "b0", "a1", "b1"), ("x", "a0", "a2")], ids=" ".join
)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_what_is_frozen_gets_no_gradient(frozen, recompute):
    x, layers = mlp()
    for name in frozen:
        leaves(x, layers)[name].requires_grad_(False)
    actual = run(ours(recompute=recompute), x, layers)[0]
    assert not {f"grad_{name}" for name in frozen} & actual.keys()
    assert_close(actual, run(separately("swiglu"), x, layers)[0], 1e-5)


def test_empty_input():
    x, layers = mlp(lead=(2, 0))
    assert_close(run(ours(), x, layers)[0], run(separately("swiglu"), x, layers)[0])


def test_wide_adapters_in_half_precision():
    x, layers = mlp(dtype=torch.float16, adapter_dtype=torch.float32)
    actual = run(ours(), x, layers)[0]
    assert actual["grad_a0"].dtype is actual["grad_b2"].dtype is torch.float32
    assert_close(actual, run(separately("swiglu"), *doubled(x, layers))[0], 3e-3)


@pytest.mark.parametrize("ranks", [(4, 3, 0), (0, 0, 5), (0, 3, 5)], ids=str)
def test_wide_adapters_on_some_of_them(ranks):
    """A layer without an adapter says nothing about the adapters' dtype."""
    x, layers = mlp(dtype=torch.float16, adapter_dtype=torch.float32, ranks=ranks)
    assert_close(run(ours(), x, layers)[0], run(separately("swiglu"), *doubled(x, layers))[0], 3e-3)


@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_adapters_that_lie_in_memory_as_their_transpose(joint):
    """As after an initialisation by `weight.data = u.t()`."""
    x, layers = mlp(joint=joint)
    expected = run(separately("swiglu"), *doubled(x, layers))[0]
    turned = [
        layer._replace(**{n: getattr(layer, n).detach().t().contiguous().t().requires_grad_() for n in ("a", "b")})
        for layer in layers
    ]
    assert turned[-1].a.stride(-1) > 1
    assert_close(run(ours(), x, turned)[0], expected)


@pytest.mark.parametrize(
    ("ranks", "lead", "width", "inner"),
    [((2, 2, 5), (60,), 12, 40), ((4, 4, 4), (7, 5), 60, 4)],
    ids=["into gate and up", "into down"],
)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_that_are_views_of_longer_rows(monkeypatch, inside, ranks, lead, width, inner, recompute):
    """`_in_one_pass` has the rank-sized products beside the input gradient."""
    taken, one_pass = [], _lora_core._in_one_pass
    monkeypatch.setattr(_lora_core, "_in_one_pass", lambda *a: taken.append(one_pass(*a)) or taken[-1])
    x, layers = make(ranks[:2], lead, width, (inner, inner), dtype=torch.float32)
    layers += make(ranks[2:], lead, inner, (width,), dtype=torch.float32)[1]
    actual = run(ours(recompute=recompute), x, layers)[0]
    if inner > width or not (inside and NODE):  # the kernels take the gradient without the part through the adapter
        assert any(way is not None for way in taken)
    assert_close(actual, run(separately("swiglu"), *doubled(x, layers))[0])


@pytest.mark.skipif(not NODE, reason="the node is made of kernels")
@pytest.mark.parametrize(("recompute", "trained", "products"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_the_product_is_kept_once_where_it_is_needed(inside, recompute, trained, products):
    x, layers = mlp()
    layers[-1].a.requires_grad_(trained)
    sizes, _ = saved_sizes(lambda: ours(recompute=recompute)(x, layers), layers)
    assert len([s for s in sizes if s[0] == 35 * INNER]) == 2 + (0 if inside else products)


@pytest.mark.skipif(not NODE, reason="the node is made of kernels")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("ranks", "own"), [((64, 1, 17), True), ((65, 4, 4), False)], ids=str)
def test_ranks_up_to_the_limit(launches, inside, ranks, own, dropout):
    x, layers = mlp(ranks=ranks, dropout=dropout)
    actual = run(ours(), x, layers)[0]
    assert launches["lora_gated_backward"] == (own and inside)
    expected = run(separately("swiglu"), *((x, layers) if dropout else doubled(x, layers)))[0]
    assert_close(actual, expected, 1e-5 if dropout else 4e-6)


@pytest.mark.skipif(not NODE, reason="the node is made of kernels")
def test_the_same_bits_in_every_run():
    x, layers = mlp(lead=(50, 5))
    first, second = (run(ours(), x, layers)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not NODE, reason="the node is made of kernels")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_its_result_the_gradients_are_the_same(inside, dropout, recompute):
    """As where a checkpoint computes it again: `down` is not multiplied with."""
    x, layers = mlp(dropout=dropout)
    wanted = [t for t in (x, *(t for layer in layers for t in layer[:4])) if t is not None and t.requires_grad]
    found, outputs = [], []
    for needed in (True, False):
        torch.manual_seed(0)
        y = lora_gated_mlp(x, layers[:-1], layers[-1], recompute=recompute, result_needed=needed)
        outputs.append(y.detach().clone())
        found.append(torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view(y.shape)))
    assert all(map(torch.equal, *found)) and not torch.equal(*outputs)
    assert outputs[0].shape == outputs[1].shape and outputs[0].dtype == outputs[1].dtype


@pytest.mark.skipif(not NODE, reason="the node is made of kernels")
def test_it_is_one_node():
    x, layers = mlp()
    (y,) = ours()(x, layers)
    assert "LoraGatedMLP" in str(y.grad_fn.next_functions[0][0])
    assert not _lora_mlp.use_triton(x.double())


def test_bad_arguments():
    x, layers = mlp()
    with pytest.raises(ValueError, match="activation is 'relu'"):
        lora_gated_mlp(x, layers[:-1], layers[-1], activation="relu")
    with pytest.raises(ValueError, match="3 inner projections"):
        lora_gated_mlp(x, layers, layers[-1])
    with pytest.raises(ValueError, match="last dimension"):
        lora_gated_mlp(x, layers[:-1], mlp(joint=True)[1][0])


@pytest.mark.skipif(not NODE, reason="the node is made of kernels")
def test_adapters_of_two_dtypes_are_refused():
    x, layers = mlp(dtype=torch.float16, adapter_dtype=torch.float32)
    down = layers[-1]._replace(a=layers[-1].a.detach().half(), b=layers[-1].b.detach().half())
    with pytest.raises(TypeError, match="different dtypes"):
        lora_gated_mlp(x, layers[:-1], down)
