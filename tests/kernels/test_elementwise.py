"""RMSNorm, gated activations and QK-RoPE on the CPU (the reference path, or the kernels if they are interpreted)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import kernel_checks as check
from torch.utils.checkpoint import checkpoint

from chronicals_trl import kernels
from chronicals_trl.kernels import _common

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALES = [1e-3, 1.0, 1e3]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
scales = pytest.mark.parametrize("scale", SCALES)


@dtypes
@scales
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype, scale, offset, residual):
    check.check_rms_norm("cpu", dtype, (2, 9, 37), scale=scale, offset=offset, residual=residual)


@dtypes
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "columns", "heads of a slice"])
def test_rms_norm_of_strided_rows(dtype, layout, residual):
    check.check_rms_norm("cpu", dtype, (2, 5, 3, 24), layout=layout, residual=residual)


@dtypes
@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["y", "sum"])
def test_rms_norm_one_output_unused(dtype, outputs):
    check.check_rms_norm("cpu", dtype, (2, 9, 37), residual=True, outputs=outputs)


def test_rms_norm_gradients_of_the_two_summands_are_apart():
    """They are the same numbers; scaling one in place (gradient clipping does) must leave the other alone."""
    x, r = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    kernels.rms_norm(x, torch.ones(8), 1e-6, residual=r)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, r.grad)
    assert x.grad.data_ptr() != r.grad.data_ptr()


def test_rms_norm_weight_in_another_dtype():
    x, weight = torch.randn(6, 10, dtype=torch.bfloat16), torch.randn(10, requires_grad=True)
    y = kernels.rms_norm(x, weight, 1e-6)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    unit = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(weight.grad.double(), unit.sum(0), rtol=1e-5, atol=1e-5)


def test_rms_norm_promotes_a_wider_residual():
    y, h = kernels.rms_norm(torch.randn(4, 8).half(), torch.ones(8), 1e-6, residual=torch.randn(4, 8))
    assert y.dtype == h.dtype == torch.float32


@dtypes
@scales
@pytest.mark.parametrize("gelu", [False, True], ids=["swiglu", "geglu"])
def test_gated_activation(dtype, scale, gelu):
    check.check_gated_activation("cpu", dtype, (2, 5, 67), gelu=gelu, scale=scale)
    if scale == 1.0:
        for layout in ("halves", "joint"):
            check.check_gated_activation("cpu", dtype, (2, 5, 67), gelu=gelu, layout=layout)


@dtypes
@scales
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 5, 2, 7, 16), {"repeats": True}),
        ((2, 3, 3, 6, 24), {"table_batch": 2, "layout": "plain"}),
        ((1, 4, 1, 5, 20), {"rotary_dim": 12, "layout": "fused"}),
        ((1, 2, 1, 5, 8), {"uneven": True, "outputs": (1,)}),
    ],
    ids=str,
)
def test_qk_rope(dtype, scale, shape, options):
    check.check_qk_rope("cpu", dtype, shape, scale=scale, **options)


NORM_ROPE = [
    ((2, 5, 2, 7, 16), {"repeats": True}),
    ((2, 3, 3, 6, 24), {"table_batch": 2, "offset": 1.0, "layout": "plain"}),
    ((1, 7, 3, 5, 20), {"rotary_dim": 12, "layout": "fused"}),
    ((1, 2, 1, 5, 8), {"uneven": True, "outputs": (0,)}),
    ((2, 2, 1, 5, 8), {"outputs": (1,), "frozen": ("q_weight",)}),
    ((1, 3, 1, 4, 12), {"frozen": ("q_weight", "k_weight")}),
    ((1, 3, 1, 4, 12), {"frozen": ("q", "k", "k_weight"), "offset": 1.0, "outputs": (0,)}),
]


@dtypes
@pytest.mark.parametrize(("shape", "options"), NORM_ROPE, ids=str)
def test_qk_norm_rope(dtype, shape, options):
    check.check_qk_rope("cpu", dtype, shape, norm=True, **options)


@dtypes
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_qk_norm_rope_of_small_and_large_heads(dtype, scale):
    check.check_qk_rope("cpu", dtype, (2, 5, 2, 7, 16), norm=True, scale=scale)


def test_qk_norm_rope_weight_in_another_dtype():
    """bf16 heads under a float32 norm weight: the gradient of the weight is good to float32."""
    weights = [torch.randn(8, requires_grad=True) for _ in range(2)]
    q, k = (torch.randn(2, n, 5, 8, dtype=torch.bfloat16) for n in (3, 1))
    cos, sin = check.rope_tables(1, 5, 8, "cpu")
    out = kernels.qk_norm_rope(q, k, *weights, 1e-6, cos, sin)
    assert {t.dtype for t in out} == {torch.bfloat16}
    grads = torch.autograd.grad(sum(t.sum() for t in out), weights)
    wide = [w.detach().double().requires_grad_() for w in weights]
    exact = check.eager_norm_rope(q.double(), k.double(), *wide, 1e-6, cos.double(), sin.double())
    torch.testing.assert_close(
        grads, torch.autograd.grad(sum(t.sum() for t in exact), wide), rtol=1e-5, atol=1e-5, check_dtype=False
    )


def test_qk_rope_keeps_its_own_dtype_under_float32_tables():
    cos, sin = check.rope_tables(1, 5, 8, "cpu")
    q, k = (torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) for _ in range(2))
    assert {t.dtype for t in kernels.qk_rope(q, k, cos, sin)} == {torch.bfloat16}


def test_qk_rope_tables_that_require_a_gradient_get_one():
    cos, sin = (t.requires_grad_() for t in check.rope_tables(1, 5, 8, "cpu"))
    q, k = (torch.randn(1, 2, 5, 8) for _ in range(2))
    ours = torch.autograd.grad(sum(t.square().sum() for t in kernels.qk_rope(q, k, cos, sin * 2)), (cos, sin))
    eager = torch.autograd.grad(sum(t.square().sum() for t in check.eager_rope(q, k, cos, sin * 2)), (cos, sin))
    torch.testing.assert_close(ours, eager)


def wide(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (lambda x, w: kernels.rms_norm(x, w, 1e-3), ((3, 5), (5,))),
        (lambda x, w, r: kernels.rms_norm(x, w, 1e-3, offset=1.0, residual=r), ((3, 5), (5,), (3, 5))),
        (kernels.swiglu, ((3, 5), (3, 5))),
        (kernels.swiglu, ((3, 10),)),
        (kernels.geglu, ((3, 5), (3, 5))),
        (kernels.geglu, ((3, 10),)),
        (kernels.qk_rope, ((2, 2, 3, 6), (2, 1, 3, 6), (1, 3, 4), (1, 3, 4))),
        (
            lambda q, k, qw, kw, cos, sin: kernels.qk_norm_rope(q, k, qw, kw, 1e-3, cos, sin, offset=1.0),
            ((2, 2, 3, 6), (2, 1, 3, 6), (6,), (6,), (2, 3, 4), (2, 3, 4)),
        ),
    ],
)  # fmt: skip
def test_float64_gradients(op, shapes):
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(op, tuple(wide(*shape) for shape in shapes))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    width=st.integers(1, 70),
    stride=st.sampled_from([1, 2]),
    residual=st.booleans(),
)
def test_rms_norm_any_shape(shape, width, stride, residual):
    torch.manual_seed(0)
    x, r = (torch.randn(*shape, width, stride, requires_grad=True) for _ in range(2))
    w = torch.randn(width, requires_grad=True)

    def run(fn):
        out = fn(x[..., 0], w, 1e-6, r[..., 0] if residual else None)
        out = out if isinstance(out, tuple) else (out,)
        return (*out, *torch.autograd.grad(sum((o * torch.arange(width)).sum() for o in out), (x, w)))

    ours = run(lambda x, w, eps, r: kernels.rms_norm(x, w, eps, residual=r))
    eager = run(lambda x, w, eps, r: check.eager_rms_norm(x, w, eps, 0.0, r))
    torch.testing.assert_close(ours, eager, rtol=2e-5, atol=2e-5 * width)


@settings(max_examples=25, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    batch=st.integers(1, 2),
    seq_len=st.integers(1, 6),
    half=st.integers(1, 9),
    rest=st.integers(0, 5),
)
def test_qk_rope_any_shape(heads, batch, seq_len, half, rest):
    check.check_qk_rope("cpu", torch.float32, (batch, *heads, seq_len, 2 * half + rest), rotary_dim=2 * half)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    layout=st.sampled_from(["apart", "halves", "joint"]),
    gelu=st.booleans(),
)
def test_gated_activation_any_shape(shape, layout, gelu):
    check.check_gated_activation("cpu", torch.float32, shape, gelu=gelu, layout=layout)


def test_empty_input():
    x = torch.randn(0, 3, 8, requires_grad=True)
    w = torch.ones(8, requires_grad=True)
    kernels.swiglu(kernels.rms_norm(x, w, 1e-6), x).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros(8))
    q = torch.randn(1, 2, 0, 8, requires_grad=True)
    tables = torch.ones(1, 0, 8), torch.ones(1, 0, 8)
    sum(t.sum() for t in kernels.qk_rope(q, q, *tables)).backward()
    assert q.grad.shape == q.shape
    w.grad = None
    sum(t.sum() for t in kernels.qk_norm_rope(q, q, w, w, 1e-6, *tables)).backward()
    assert torch.equal(w.grad, torch.zeros(8))
    joint = torch.randn(0, 3, 8, requires_grad=True)
    out = kernels.geglu(joint)
    assert out.shape == (0, 3, 4)
    out.sum().backward()
    assert joint.grad.shape == joint.shape


def wrapped_blocks():
    def reentrant(*inputs):
        return checkpoint(check.block, *inputs, use_reentrant=True)

    def non_reentrant(*inputs):
        return checkpoint(check.block, *inputs, use_reentrant=False)

    def autocast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return check.block(*inputs)

    # inductor needs a C++ compiler, which CI may not have; the graph is the same
    compiled = torch.compile(check.block, fullgraph=True, backend="aot_eager")
    dynamic = torch.compile(check.block, fullgraph=True, backend="aot_eager", dynamic=True)
    return [check.block, reentrant, non_reentrant, autocast, compiled, dynamic]


@pytest.mark.parametrize(
    "index", range(6), ids=["plain", "reentrant", "non_reentrant", "autocast", "compiled", "dynamic"]
)
def test_wrapped(index):
    torch._dynamo.reset()
    inputs = check.block_inputs()
    ours = wrapped_blocks()[index](*inputs)
    eager = check.eager_block(*inputs)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    ours.backward()  # reentrant checkpoints refuse torch.autograd.grad
    for tensor, grad in zip(inputs[:4], torch.autograd.grad(eager, inputs[:4]), strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-4, atol=1e-4)


def test_saved_tensors_survive_a_backward():
    inputs = check.block_inputs()
    loss = check.block(*inputs)
    first = torch.autograd.grad(loss, inputs[:4], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, inputs[:4]), strict=True))


def test_frozen_weight():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    kernels.rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


def norm_rope(**changed):
    heads, weight, table = torch.ones(1, 2, 4, 6), torch.ones(6), torch.ones(1, 4, 6)
    given = {"q": heads, "k": heads, "q_weight": weight, "k_weight": weight, "cos": table, "sin": table} | changed
    kernels.qk_norm_rope(**given, eps=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.rms_norm(torch.ones(2, 4), torch.ones(3), 1e-6), r"weight has shape \(3,\)"),
        (
            lambda: kernels.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6, residual=torch.ones(4)),
            r"residual has shape \(4,\).*\(2, 4\)",
        ),
        (lambda: kernels.swiglu(torch.ones(2, 4), torch.ones(2, 3)), r"swiglu: gate.*\(2, 4\).*\(2, 3\)"),
        (lambda: kernels.geglu(torch.ones(4), torch.ones(1)), "geglu: gate"),
        (lambda: kernels.swiglu(torch.ones(2, 5)), r"swiglu: gate.*\(2, 5\); without up.*must be even"),
        (lambda: kernels.geglu(torch.ones(())), r"geglu: gate.*\(\); without up"),
        (lambda: kernels.qk_rope(*[torch.ones(1, 2, 4, 6)] * 2, *[torch.ones(1, 4, 8)] * 2), "is 8.*at most.*6"),
        (lambda: kernels.qk_rope(*[torch.ones(1, 2, 4, 6)] * 2, *[torch.ones(1, 4, 3)] * 2), "is 3; it must be even"),
        (lambda: kernels.qk_rope(*[torch.ones(1, 2, 4, 6)] * 2, *[torch.ones(4, 6)] * 2), r"cos has shape \(4, 6\)"),
        (lambda: kernels.qk_rope(*[torch.ones(2, 4, 6)] * 2, *[torch.ones(1, 4, 6)] * 2), r"q has shape \(2, 4, 6\)"),
        (lambda: norm_rope(q_weight=torch.ones(4)), r"q_weight has shape \(4,\) and k_weight \(6,\).*D = 6"),
        (lambda: norm_rope(k_weight=torch.ones(1, 6)), r"k_weight \(1, 6\)"),
        (lambda: norm_rope(k=torch.ones(1, 2, 5, 6)), r"qk_norm_rope: q has.*k \(1, 2, 5, 6\)"),
        (lambda: norm_rope(cos=torch.ones(3, 4, 6)), r"qk_norm_rope: cos has shape \(3, 4, 6\).*B = 1, S = 4"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, h, w, t: kernels.rms_norm(x, w, 1e-6), "rms_norm: x"),
        (lambda x, h, w, t: kernels.swiglu(x.float(), x), "swiglu: up"),
        (lambda x, h, w, t: kernels.geglu(x), "geglu: gate"),
        (lambda x, h, w, t: kernels.qk_rope(h, h.float(), t, t), "qk_rope: q"),
        (lambda x, h, w, t: kernels.qk_norm_rope(h.float(), h, w, w, 1e-6, t, t), "qk_norm_rope: k"),
    ],
)
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_what_is_not_floating_point_is_refused(call, named, dtype):
    """The references would round, or drop the imaginary part, without a word."""
    x = torch.ones(4, 6).to(dtype)
    with pytest.raises(TypeError, match=f"{named} is of {dtype}; it must be of a floating"):
        call(x, x.view(1, 1, 4, 6), torch.ones(6), torch.ones(1, 4, 6))


def test_backend():
    assert kernels.backend(torch.device("cpu")) == ("triton" if _common.INTERPRET else "torch")
    assert kernels.backend("cuda") == ("triton" if _common.HAS_TRITON else "torch")
    assert kernels.backend("meta") == "torch"
