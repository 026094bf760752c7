"""`kernel_op`: one function by two ways, eager and traced. `test_interpreter.py` runs this file; it needs kernels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from kernels import kernel_checks as check
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from chronicals_trl import kernels
from chronicals_trl.kernels import _common, _rms_norm

pytestmark = pytest.mark.skipif(not _common.INTERPRET, reason="needs TRITON_INTERPRET=1 from the start")

TABLES = check.rope_tables(1, 5, 8, "cpu")


def heads(*tensors):
    """(B, S, heads * 8) as attention sees it, (B, heads, S, 8)."""
    return [t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in tensors]


# The op behind a GEMM: name and backward name of its nodes, function of (x, other) (2, 5, 24) and w (24,).
OPS = {
    "norm": ("rms_norm", "rms_norm_backward", lambda x, other, w: (kernels.rms_norm(x, w, 1e-6),)),
    "residual and norm": (
        "rms_norm", "rms_norm_backward", lambda x, other, w: kernels.rms_norm(x, w, 1e-6, residual=other),
    ),
    "activation": (
        "gated_activation", "gated_activation_backward", lambda x, other, w: (kernels.swiglu(x, other * w),),
    ),
    "joint activation": (
        "gated_activation", "gated_activation_backward", lambda x, other, w: (kernels.geglu(x * w),),
    ),
    "rotation": ("qk_rope", "qk_rope", lambda x, other, w: kernels.qk_rope(*heads(x * w, other), *TABLES)),
    "norm and rotation": (
        "qk_norm_rope", "qk_norm_rope_backward",
        lambda x, other, w: kernels.qk_norm_rope(*heads(x, other), w[:8], w[8:16], 1e-6, *TABLES, offset=1.0),
    ),
}  # fmt: skip

ops = pytest.mark.parametrize("op", OPS)


def problem(*names):
    """A function of these ops, its inputs, and its outputs and gradients as eager calls give them."""
    torch.manual_seed(0)
    mix = torch.randn(24, 24) / 5
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 24), (2, 5, 24), (24,))]

    def fn(x, other, w):
        return tuple(output for name in names for output in OPS[name][2](x @ mix, other, w))

    return fn, inputs, outputs_and_gradients(fn, inputs)


def outputs_and_gradients(fn, inputs):
    outputs = fn(*inputs)
    return *outputs, *torch.autograd.grad(
        sum(o.square().sum() for o in outputs), inputs, allow_unused=True, materialize_grads=True
    )


def offloaded(fn, *inputs):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return fn(*inputs)


def keep_gemms(_, op, *args, **kwargs):
    gemm = op in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if gemm else CheckpointPolicy.PREFER_RECOMPUTE


WAYS = {
    "compiled": lambda fn: torch.compile(fn, fullgraph=True, backend="aot_eager"),
    "compiled, dynamic": lambda fn: torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True),
    "checkpointed": lambda fn: partial(checkpoint, fn, use_reentrant=False),
    "checkpointed selectively": lambda fn: partial(
        checkpoint, fn, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, keep_gemms)
    ),
    "offloaded": lambda fn: partial(offloaded, fn),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same(way):
    torch._dynamo.reset()
    fn, inputs, expected = problem(*OPS)
    for ours, plain in zip(outputs_and_gradients(WAYS[way](fn), inputs), expected, strict=True):
        assert torch.equal(ours, plain)


@ops
def test_without_gradients(op):
    fn, inputs, expected = problem(op)
    with torch.no_grad():
        outputs = fn(*inputs)
    assert all(map(torch.equal, outputs, expected[: len(outputs)]))
    assert not any(o.requires_grad for o in outputs)
    with torch.inference_mode():
        assert all(map(torch.equal, fn(*inputs), outputs))


def test_one_node_for_each_op_in_each_graph():
    torch._dynamo.reset()
    found = {"forward": [], "backward": []}

    def record(way, graph, _):
        ours = [str(n.target) for n in graph.graph.nodes if str(n.target).startswith("chronicals_trl.")]
        found[way] += ours
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=partial(record, "forward"), bw_compiler=partial(record, "backward"))
    fn, inputs, _ = problem(*OPS)
    outputs_and_gradients(torch.compile(fn, fullgraph=True, backend=backend), inputs)
    forward, backward, _ = zip(*OPS.values(), strict=True)
    assert sorted(found["forward"]) == sorted(f"chronicals_trl.{name}.default" for name in forward)
    assert sorted(found["backward"]) == sorted(f"chronicals_trl.{name}.default" for name in backward)


def test_tensors_of_a_tracer_go_to_the_op():
    """AOT autograd traces backward formulas where Dynamo does not say that it is compiling."""
    kernels.LAUNCHES.clear()
    with FakeTensorMode() as mode:
        x, w, rstd = (mode.from_tensor(torch.ones(*shape)) for shape in ((2, 8), (8,), (2,)))
        outputs = *_rms_norm._op(x, None, w, 1e-6, 0.0), *_rms_norm._backward_op(x, None, x, w, rstd, 0.0, True)
    assert all(isinstance(o, FakeTensor) for o in outputs)
    assert not kernels.LAUNCHES


@ops
def test_a_second_derivative_is_refused(op):
    fn, inputs, _ = problem(op)
    loss = sum(o.square().sum() for o in fn(*inputs))
    grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in grads).backward()
