"""The MLP as one autograd node. `test_interpreter.py` runs this file once more with the kernels interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernels import kernel_checks as check
from torch.utils.checkpoint import checkpoint

from chronicals_trl import kernels
from chronicals_trl.kernels import _common

NODE = _common.INTERPRET  # without kernels the same formula runs as separate ops
WEIGHTS = ("gate", "up", "down")

dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (not _common.INTERPRET), ids=str
)


recompute = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


@pytest.fixture(autouse=True)
def launches():
    kernels.LAUNCHES.clear()
    yield kernels.LAUNCHES
    assert not (kernels.LAUNCHES and not NODE)


def weights(width=12, inner=20, **options):
    torch.manual_seed(0)
    gate, up = (torch.randn(inner, width, requires_grad=True, **options) for _ in range(2))
    return gate, up, torch.randn(width, inner, requires_grad=True, **options)


@dtypes
@pytest.mark.parametrize("gelu", [False, True], ids=["swiglu", "geglu"])
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
@recompute
def test_values_and_gradients(launches, dtype, recompute, joint, gelu):
    check.check_gated_mlp("cpu", dtype, (3, 5, 24), 44, gelu=gelu, joint=joint, recompute=recompute)
    assert launches == ({"gated_mlp": 1, "gated_mlp_backward": 1} if NODE else {})


@dtypes
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_small_and_large_inputs(dtype, scale):
    check.check_gated_mlp("cpu", dtype, (3, 5, 24), 44, scale=scale)


@pytest.mark.parametrize(
    "frozen",
    [("x",), ("gate",), ("up",), ("down",), ("gate", "up"), WEIGHTS, ("x", "gate", "up"), ("x", "up", "down")],
    ids=" ".join,
)
@recompute
def test_what_is_frozen_gets_no_gradient(frozen, recompute):
    check.check_gated_mlp("cpu", torch.float32, (3, 5, 24), 44, frozen=frozen, recompute=recompute)
    if "up" not in frozen:
        check.check_gated_mlp("cpu", torch.float32, (3, 5, 24), 44, frozen=frozen, joint=True, recompute=recompute)


def test_frozen_tensors_stay_without_gradient():
    gate, up, down = weights()
    x = torch.randn(3, 12)
    kernels.gated_mlp(x, gate, up.requires_grad_(False), down.requires_grad_(False)).sum().backward()
    assert gate.grad.abs().sum() > 0
    assert x.grad is up.grad is down.grad is None


@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_autocast(launches, joint):
    """float32 weights and input. (Interpreted kernels know no bfloat16.)"""
    half = torch.float16 if _common.INTERPRET else torch.bfloat16
    check.check_gated_mlp("cpu", torch.float32, (3, 5, 24), 44, joint=joint, autocast=half)
    assert bool(launches) == NODE


def test_autocast_leaves_float64_alone():
    x, given = torch.randn(3, 12, dtype=torch.float64), weights(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.gated_mlp(x, *given)
    torch.testing.assert_close(out, kernels.gated_mlp(x, *given), rtol=0, atol=0)


def test_backward_inside_an_autocast_region_that_forward_was_not_in():
    inputs = (torch.randn(3, 12, requires_grad=True), *weights())
    out = kernels.gated_mlp(*inputs)
    outside = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    half = torch.float16 if _common.INTERPRET else torch.bfloat16
    with torch.autocast("cpu", half):
        inside = torch.autograd.grad(out.sum(), inputs)
    # the separate ops, as eager does, compute these in the autocast dtype
    tolerance = {"rtol": 0, "atol": 0} if NODE else {"rtol": 0.05, "atol": 0.5}
    torch.testing.assert_close(inside, outside, **tolerance)


def test_float64_gradients():
    inputs = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True), *weights(4, 6, dtype=torch.float64))
    assert torch.autograd.gradcheck(kernels.gated_mlp, inputs)
    assert torch.autograd.gradcheck(lambda *t: kernels.gated_mlp(*t, activation="geglu"), inputs)


def test_strided_input_and_expanded_gradient():
    x = torch.randn(5, 3, 12).transpose(0, 1).requires_grad_()
    inputs = (x, *weights())
    eager = F.linear(check.eager_activation(F.linear(x, inputs[1]), F.linear(x, inputs[2]), False), inputs[3])
    ours = kernels.gated_mlp(*inputs)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(eager.sum(), inputs), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("lead", [(), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_one_row_and_none(lead, joint):
    gate, up, down = weights()
    x = torch.randn(*lead, 12, requires_grad=True)
    gate, up = (torch.cat([gate, up]), None) if joint else (gate, up)
    out = kernels.gated_mlp(x, gate, up, down)
    assert out.shape == (*lead, 12)
    grads = torch.autograd.grad(out.sum(), (x, gate, down))
    assert [g.shape for g in grads] == [x.shape, gate.shape, down.shape]
    assert all((g == 0).all() for g in grads) == (x.numel() == 0)


@recompute
def test_two_backward_passes_give_the_same(recompute):
    """The node computes over buffers of its own in the backward pass; what it saved has to survive."""
    inputs = (torch.randn(3, 12, requires_grad=True), *weights())
    out = kernels.gated_mlp(*inputs, recompute=recompute)
    first = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out.square().sum(), inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not NODE, reason="the separate ops keep what torch keeps")
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
@pytest.mark.parametrize(
    ("options", "frozen", "halves"),
    [({}, False, 3), ({}, True, 2), ({"recompute": True}, False, 2)],
    ids=["gate, up and product", "no product if down is frozen", "no product if recomputed"],
)
def test_what_is_kept(joint, options, frozen, halves):
    gate, up, down = weights()
    x = torch.randn(2, 3, 12, requires_grad=True)
    given = (torch.cat([gate, up]).detach().requires_grad_(), None, down) if joint else (gate, up, down)
    down.requires_grad_(not frozen)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        kernels.gated_mlp(x, *given, **options)
    for t in (x, *given):
        assert t is None or kept.pop(t.data_ptr()).numel() == t.numel()
    assert sum(t.nbytes for t in kept.values()) == halves * (2 * 3 * 20) * 4


def test_meta_tensors():
    """What shape inference and meta-device loading run on; it has no autocast to ask about."""
    given = [t.detach().to("meta") for t in (torch.randn(2, 3, 12), *weights())]
    assert kernels.gated_mlp(*given).shape == (2, 3, 12)


def test_inputs_offloaded_between_the_passes():
    inputs = (torch.randn(3, 12, requires_grad=True), *weights())
    plain = torch.autograd.grad(kernels.gated_mlp(*inputs).square().sum(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = kernels.gated_mlp(*inputs)
    assert all(map(torch.equal, plain, torch.autograd.grad(out.square().sum(), inputs)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed(use_reentrant):
    inputs = (torch.randn(3, 12, requires_grad=True), *weights())
    plain = torch.autograd.grad(kernels.gated_mlp(*inputs).square().sum(), inputs)
    checkpoint(kernels.gated_mlp, *inputs, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(inputs, plain, strict=True))


@pytest.mark.skipif(not _common.INTERPRET, reason="the node is made of kernels")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_without_the_result(use_reentrant, recompute, monkeypatch):
    """Computed again, the block does not multiply with `down`, and has the same gradients."""
    inputs = (torch.randn(3, 12, requires_grad=True), *weights())
    plain = torch.autograd.grad(kernels.gated_mlp(*inputs).square().sum(), inputs)
    empty, calls = torch.empty_like, []

    def block(*given):
        calls.append(None)
        return kernels.gated_mlp(*given, recompute=recompute, result_needed=len(calls) == 1)

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    before = _common.LAUNCHES["gated_mlp"]
    checkpoint(block, *inputs, use_reentrant=use_reentrant).square().sum().backward()
    assert len(calls) == 2 and _common.LAUNCHES["gated_mlp"] - before == (1 if recompute else 2)
    assert all(torch.equal(t.grad, g) for t, g in zip(inputs, plain, strict=True))
    assert kernels.gated_mlp(*inputs, result_needed=False).isnan().all()


@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_compiled(joint):
    torch._dynamo.reset()
    gate, up, down = weights()
    x = torch.randn(2, 3, 12, requires_grad=True)
    given = (x, torch.cat([gate, up]).detach().requires_grad_(), None, down) if joint else (x, gate, up, down)
    compiled = torch.compile(kernels.gated_mlp, fullgraph=True, backend="aot_eager")
    wanted = [t for t in given if t is not None]
    ours, plain = compiled(*given), kernels.gated_mlp(*given)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), wanted), torch.autograd.grad(plain.sum(), wanted), rtol=1e-5, atol=1e-3
    )


@pytest.mark.skipif(not NODE, reason="the separate ops have one")
def test_a_second_derivative_is_refused():
    inputs = (torch.randn(3, 12, requires_grad=True), *weights())
    (grad,) = torch.autograd.grad(kernels.gated_mlp(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, r"activation is 'relu'; it must be one of \['geglu', 'swiglu'\]"),
        ({"x": torch.ones(3, 11)}, r"weights of shapes \[\(20, 12\), .*do not fit x of shape \(3, 11\)"),
        ({"x": torch.ones(())}, r"do not fit x of shape \(\)"),
        ({"gate_weight": torch.ones(12, 20)}, r"\[\(12, 20\), \(20, 12\), \(12, 20\)\]"),
        ({"up_weight": None}, r"\[\(20, 12\), \(12, 20\)\]"),
        ({"up_weight": torch.ones(21, 12)}, r"\(21, 12\)"),
        ({"down_weight": torch.ones(20, 12)}, r"\(20, 12\)\] do not.*; gate and up must be \(I, H\).*H = 12"),
        ({"down_weight": torch.ones(())}, r", \(\)\] do not fit"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(change, message):
    given = dict(zip(("gate_weight", "up_weight", "down_weight"), weights(), strict=True)) | {"x": torch.ones(3, 12)}
    with pytest.raises(ValueError, match=message):
        kernels.gated_mlp(**given | change)
