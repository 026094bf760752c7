"""The Triton kernels themselves on the CPU, through Triton's interpreter; `test_interpreter.py` starts this file.

The interpreter knows float32 and float16 only (FACTS: bfloat16 arithmetic is silently wrong).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import kernel_checks as check
from kernels import test_elementwise as elementwise

from chronicals_trl import kernels
from chronicals_trl.kernels import _common, _rms_norm

pytestmark = pytest.mark.skipif(not _common.INTERPRET, reason="needs TRITON_INTERPRET=1 from the start")

TABLES = check.rope_tables(1, 3, 8, "cpu")

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def fresh_counts():
    kernels.LAUNCHES.clear()


@pytest.fixture
def launched(fresh_counts):
    """Runs the test, then asserts that the named kernels ran, forward and backward."""
    expected: list[str] = []
    yield expected.extend
    assert expected
    for name in expected:
        assert kernels.LAUNCHES[name] > 0, f"{name} was not launched"
        assert kernels.LAUNCHES[name + "_backward"] > 0, f"{name}_backward was not launched"


@dtypes
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"residual": True}], ids=str)
def test_interp_rms_norm(launched, dtype, scale, options):
    launched(["rms_norm"])
    check.check_rms_norm("cpu", dtype, (2, 9, 37), scale=scale, **options)


@dtypes
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "columns", "heads of a slice"])
def test_interp_rms_norm_of_strided_rows(launched, dtype, layout, residual):
    launched(["rms_norm"])
    check.check_rms_norm("cpu", dtype, (2, 5, 3, 24), layout=layout, residual=residual)


@pytest.mark.parametrize("upstream", ["contiguous", "one row", "one number"])
@pytest.mark.parametrize("layout", ["plain", "transposed", "columns", "heads of a slice"])
def test_interp_rms_norm_gradient_laid_out_otherwise(launched, layout, upstream):
    launched(["rms_norm"])
    check.check_rms_norm("cpu", torch.float32, (2, 5, 3, 24), layout=layout, upstream=upstream)
    check.check_rms_norm("cpu", torch.float32, (2, 5, 3, 24), layout=layout, upstream=upstream, residual=True)


@dtypes
@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["y", "sum"])
def test_interp_rms_norm_one_output_unused(launched, dtype, outputs):
    launched(["rms_norm"])
    check.check_rms_norm("cpu", dtype, (2, 9, 37), residual=True, outputs=outputs)


@pytest.mark.parametrize(("rows", "width"), [(9, 8), (5, 48), (6, 1536), (3, 4100), (2, 32768)], ids=str)
def test_interp_rms_norm_widths(launched, rows, width):
    launched(["rms_norm"])
    check.check_rms_norm("cpu", torch.float32, (rows, width), residual=True)


def test_interp_rms_norm_too_wide_for_a_program():
    check.check_rms_norm("cpu", torch.float32, (2, _rms_norm.MAX_WIDTH + 1), residual=True)
    assert not kernels.LAUNCHES


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((41, 600), {"offset": 1.0}),
        ((35, 1100), {"residual": True}),
        ((11, 5000), {}),
        ((2, 70, 9, 24), {"layout": "transposed"}),
    ],
    ids=str,
)
def test_interp_rms_norm_many_row_tiles(launched, shape, options):
    """More tiles than programs, so that each program's loop adds to its share of the weight gradient."""
    launched(["rms_norm"])
    cpu = torch.device("cpu")
    config = _rms_norm._backward_config(shape[-1], 8 + 4 * options.get("residual", False), cpu)
    n_rows = torch.Size(shape[:-1]).numel()
    assert n_rows > config.block_r * config.programs * _common.multiprocessors(cpu)
    check.check_rms_norm("cpu", torch.float32, shape, **options)


@dtypes
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("gelu", [False, True], ids=["swiglu", "geglu"])
def test_interp_gated_activation(launched, dtype, scale, gelu):
    launched(["gated_mlp"])
    check.check_gated_activation("cpu", dtype, (2, 3, 67), gelu=gelu, scale=scale)


@dtypes
@pytest.mark.parametrize("layout", ["halves", "joint"])
def test_interp_gated_activation_in_one_tensor(launched, dtype, layout):
    launched(["gated_mlp"])
    check.check_gated_activation("cpu", dtype, (2, 3, 1100), gelu=False, layout=layout)
    check.check_gated_activation("cpu", dtype, (67,), gelu=True, layout=layout)


@dtypes
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 5, 2, 7, 16), {}),
        ((2, 3, 3, 6, 24), {"table_batch": 2}),
        ((1, 4, 1, 5, 20), {"rotary_dim": 12}),
        ((1, 2, 1, 5, 8), {"uneven": True}),
        ((1, 9, 2, 2, 512), {}),  # heads in several passes
        ((2, 3, 1, 5, 16), {"layout": "plain", "repeats": True}),
        ((2, 3, 2, 5, 20), {"layout": "fused", "rotary_dim": 12, "repeats": True}),
        ((1, 3, 2, 5, 8), {"outputs": (0,)}),
        ((1, 3, 2, 5, 8), {"outputs": (1,), "layout": "fused"}),
    ],
    ids=str,
)
def test_interp_qk_rope(launched, dtype, shape, options):
    launched(["qk_rope"])
    check.check_qk_rope("cpu", dtype, shape, **options)


@dtypes
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        *elementwise.NORM_ROPE,
        ((1, 5, 2, 3, 512), {}),  # heads in several passes
        ((1, 2, 1, 41, 256), {"rotary_dim": 128, "offset": 1.0}),  # tokens too: more tiles than programs
    ],
    ids=str,
)
def test_interp_qk_norm_rope(launched, dtype, shape, options):
    launched(["qk_norm_rope"])
    check.check_qk_rope("cpu", dtype, shape, norm=True, **options)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_interp_qk_norm_rope_of_small_and_large_heads(launched, scale):
    launched(["qk_norm_rope"])
    check.check_qk_rope("cpu", torch.float16, (2, 5, 2, 7, 16), norm=True, scale=scale)


def test_interp_only_the_left_half_of_repeating_tables_is_read():
    heads = torch.randn(1, 2, 5, 8)
    whole = check.rope_tables(1, 5, 8, "cpu")
    broken = [t.clone() for t in whole]
    for t in broken:
        t[..., 4:] = torch.nan
    for ours, plain in zip(
        kernels.qk_rope(heads, heads, *broken, repeats=True), kernels.qk_rope(heads, heads, *whole), strict=True
    ):
        assert torch.equal(ours, plain)


def test_interp_a_launch_is_remembered_by_every_dtype():
    """The compiled kernel depends on the dtypes of all pointers, weights included."""
    x = torch.randn(3, 40, requires_grad=True)
    counts = []
    for dtype in (torch.float32, torch.float16, torch.float32):
        weight = torch.randn(40, dtype=dtype, requires_grad=True)
        kernels.rms_norm(x, weight, 1e-6).sum().backward()
        counts.append([c.cache_info().currsize for c in (_rms_norm._forward_launch, _rms_norm._backward_launch)])
    assert [b - a for a, b in zip(counts[0], counts[1], strict=True)] == [1, 1]
    assert counts[2] == counts[1]


def test_interp_the_sum_is_normed_as_it_is_stored():
    """In float16: the next block reads the rounded sum, and stock norms that."""
    torch.manual_seed(0)
    x, residual = (torch.randn(64, 48).half() for _ in range(2))
    y, h = kernels.rms_norm(x, torch.ones(48, dtype=torch.float16), 1e-6, residual=residual)
    again = kernels.rms_norm(h, torch.ones(48, dtype=torch.float16), 1e-6)
    assert torch.equal(y, again)


def test_interp_layouts_are_kept():
    heads = torch.randn(2, 5, 3, 8).transpose(1, 2)
    tables = check.rope_tables(1, 5, 8, "cpu")
    assert kernels.qk_rope(heads, heads, *tables)[0].stride() == heads.stride()
    assert kernels.qk_norm_rope(heads, heads, *[torch.ones(8)] * 2, 1e-6, *tables)[0].stride() == heads.stride()
    assert kernels.rms_norm(heads, torch.ones(8), 1e-6).stride() == heads.stride()


def test_interp_strided_rows_are_read_in_place():
    """What an op has saved for the backward pass is what it was given, not a copy."""
    qkv = torch.randn(2, 5, 64, requires_grad=True)
    q, k = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in qkv.split([32, 32], -1))
    w = torch.ones(8)
    for out, passed in (
        (kernels.rms_norm(q, w, 1e-6), (q,)),
        (kernels.qk_norm_rope(q, k, w, w, 1e-6, *check.rope_tables(1, 5, 8, "cpu"))[0], (q, k)),
        (kernels.swiglu(*qkv.chunk(2, -1)), qkv.chunk(2, -1)),
        (kernels.swiglu(qkv[..., 8:40]), (qkv[..., 8:40],)),
    ):
        for kept, t in zip(out.grad_fn.saved_tensors, passed, strict=False):
            assert (kept.data_ptr(), kept.stride()) == (t.data_ptr(), t.stride())


@pytest.mark.parametrize("sliced", ["gate", "up", "gradient"])
def test_interp_gated_activation_of_unlike_strides(launched, sliced):
    """Each of gate, up and the incoming gradient is found by a stride of its own."""
    launched(["gated_mlp"])
    torch.manual_seed(0)
    gate, up, grad = (
        torch.randn(6, 11 if name == sliced else 8)[:, -8:].requires_grad_() for name in ("gate", "up", "gradient")
    )
    ours, plain = (op(gate, up) for op in (kernels.swiglu, kernels.swiglu_reference))
    torch.testing.assert_close(ours, plain)
    ours, plain = (torch.autograd.grad(out, (gate, up), grad) for out in (ours, plain))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("plain", [0, 1], ids=["q", "k"])
def test_interp_queries_and_keys_of_unlike_strides(launched, plain):
    """One lies as (B, heads, S, D), the other as a projection gives it; the gradients the other way round."""
    launched(["qk_rope", "qk_norm_rope"])
    torch.manual_seed(0)
    shapes = [(2, 3, 3, 8), (2, 2, 3, 8)]
    q, k = (laid_out(shape, i == plain).requires_grad_() for i, shape in enumerate(shapes))
    grads = [laid_out(shape, i != plain) for i, shape in enumerate(shapes)]
    w = torch.linspace(0.5, 1.5, 8)
    for name, arguments in (("qk_rope", (q, k, *TABLES)), ("qk_norm_rope", (q, k, w, 2 * w, 1e-6, *TABLES))):
        ours, theirs = (getattr(kernels, name + suffix)(*arguments) for suffix in ("", "_reference"))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        ours, theirs = (torch.autograd.grad(out, (q, k), grads) for out in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def laid_out(shape, plain):
    batch, heads, seq_len, dim = shape
    return torch.randn(shape) if plain else torch.randn(batch, seq_len, heads, dim).transpose(1, 2)


@pytest.mark.parametrize("upstream", ["one number", "elements apart"])
@pytest.mark.parametrize("op", ["swiglu", "joint", "qk_rope", "qk_norm_rope"])
def test_interp_gradients_whose_elements_do_not_lie_side_by_side(op, upstream):
    """`out.sum().backward()` sends one number, expanded; a transposition in the graph a strided gradient."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 2, 3, 8, requires_grad=True), torch.ones(8)
    calls = {
        "swiglu": lambda k, suffix: getattr(k, "swiglu" + suffix)(x, x + 1),
        "joint": lambda k, suffix: getattr(k, "geglu" + suffix)(x),
        "qk_rope": lambda k, suffix: getattr(k, "qk_rope" + suffix)(x, x + 1, *TABLES),
        "qk_norm_rope": lambda k, suffix: getattr(k, "qk_norm_rope" + suffix)(x, x + 1, w, w, 1e-6, *TABLES),
    }
    found = []
    for suffix in ("", "_reference"):
        out = calls[op](kernels, suffix)
        out = out if isinstance(out, tuple) else (out,)
        grads = [
            torch.tensor(0.5).expand(o.shape)
            if upstream == "one number"
            else torch.arange(2.0 * o.numel()).sin().view(*o.shape, 2)[..., 0]
            for o in out
        ]
        found.append(torch.autograd.grad(out, x, grads)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_interp_norm_weights_may_have_gaps():
    torch.manual_seed(0)
    x, gapped, heads = torch.randn(5, 8), torch.randn(8, 2)[:, 0].requires_grad_(), torch.randn(1, 2, 3, 8)
    whole = gapped.detach().clone().requires_grad_()
    for op in (
        lambda w: kernels.rms_norm(x, w, 1e-6),
        lambda w: torch.cat(kernels.qk_norm_rope(heads, heads, w, 2 * w, 1e-6, *TABLES)),
        lambda w: torch.cat(kernels.qk_norm_rope(heads, heads, 2 * w, w, 1e-6, *TABLES)),
    ):
        ours, plain = op(gapped), op(whole)
        assert torch.equal(ours, plain)
        (a,), (b,) = (torch.autograd.grad(o.square().sum(), w) for o, w in ((ours, gapped), (plain, whole)))
        assert torch.equal(a, b)


@pytest.mark.parametrize("n_shares", [1, 256, 300, 513])
def test_interp_sum_of_more_shares_than_a_block(n_shares):
    """A GPU of 132 multiprocessors makes 264 shares, the interpreter 8."""
    shares = torch.randn(n_shares, 40)
    torch.testing.assert_close(_rms_norm.sum_shares(shares, torch.empty(40)), shares.sum(0), rtol=1e-5, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    width=st.integers(1, 40),
    residual=st.booleans(),
    stride=st.sampled_from([1, 2]),
    gap=st.integers(0, 3),
    half=st.booleans(),
    data=st.data(),
)
def test_interp_rms_norm_any_shape(shape, width, residual, stride, gap, half, data):
    """`gap` columns between rows, `stride` between elements, row dimensions in any order."""
    torch.manual_seed(0)
    dtype = torch.float16 if half else torch.float32
    order = data.draw(st.permutations(range(len(shape))))
    x, r = (
        torch.randn(*shape, width + gap, stride).to(dtype)[..., :width, 0].permute(*order, -1).requires_grad_()
        for _ in range(2)
    )
    w = torch.randn(width).to(dtype).requires_grad_()
    arguments = (x, w, r) if residual else (x, w)

    def run(fn):
        out = fn(*arguments)
        out = out if isinstance(out, tuple) else (out,)
        return (*out, *torch.autograd.grad(sum((o * torch.arange(width)).sum() for o in out), arguments))

    ours = run(lambda x, w, r=None: kernels.rms_norm(x, w, 1e-6, residual=r))
    reference = run(lambda x, w, r=None: kernels.rms_norm_reference(x, w, 1e-6, 0.0, r))
    tolerance = 2e-3 if half else 2e-5
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance * width)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    seq_len=st.integers(1, 4),
    half=st.integers(1, 9),
    rest=st.integers(0, 5),
    layout=st.sampled_from(["projections", "plain", "fused"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    repeats=st.booleans(),
)
def test_interp_qk_rope_any_shape(heads, seq_len, half, rest, layout, dtype, repeats):
    options = {"layout": layout, "rotary_dim": 2 * half, "repeats": repeats}
    check.check_qk_rope("cpu", dtype, (2, *heads, seq_len, 2 * half + rest), **options)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    seq_len=st.integers(1, 4),
    half=st.integers(4, 9),
    rest=st.integers(0, 5),
    layout=st.sampled_from(["projections", "plain", "fused"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    repeats=st.booleans(),
)
def test_interp_qk_norm_rope_any_shape(heads, seq_len, half, rest, layout, dtype, repeats):
    options = {"layout": layout, "rotary_dim": 2 * half, "repeats": repeats, "norm": True}
    check.check_qk_rope("cpu", dtype, (2, *heads, seq_len, 2 * half + rest), **options)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    layout=st.sampled_from(["apart", "halves", "joint"]),
    gelu=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_interp_gated_activation_any_shape(shape, layout, gelu, dtype):
    check.check_gated_activation("cpu", dtype, shape, gelu=gelu, layout=layout)


@settings(max_examples=10, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    width=st.integers(8, 24),
    inner=st.integers(8, 40),
    gelu=st.booleans(),
    joint=st.booleans(),
    recompute=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_interp_gated_mlp_any_shape(shape, width, inner, dtype, **options):
    check.check_gated_mlp("cpu", dtype, (*shape, width), inner, **options)


@pytest.mark.parametrize(
    "index", range(6), ids=["plain", "reentrant", "non_reentrant", "autocast", "compiled", "dynamic"]
)
def test_interp_wrapped(launched, index):
    launched(["rms_norm", "gated_mlp", "qk_rope", "qk_norm_rope"])
    elementwise.test_wrapped(index)


def test_interp_saved_tensors_survive_a_backward():
    elementwise.test_saved_tensors_survive_a_backward()


def test_interp_what_the_kernels_do_not_take_runs_the_reference():
    kernels.LAUNCHES.clear()
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(3, 8, dtype=dtype)
        w, q, tables = torch.ones(8, dtype=dtype), x.view(1, 1, 3, 8), [t.to(dtype) for t in TABLES]
        kernels.swiglu(kernels.rms_norm(x, w, 1e-6), x)
        kernels.qk_norm_rope(*kernels.qk_rope(q, q, *tables), w, w, 1e-6, *tables)
        kernels.gated_mlp(x, *[torch.ones(8, 8, dtype=dtype)] * 3)
    assert not kernels.LAUNCHES


def test_interp_queries_and_keys_of_two_dtypes_run_the_reference():
    """The kernels read both through one pointer, and store both in the dtype of the first."""
    q, k, w = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8).half(), torch.ones(8)
    for out in (kernels.qk_rope(q, k, *TABLES), kernels.qk_norm_rope(q, k, w, w, 1e-6, *TABLES)):
        assert [t.dtype for t in out] == [torch.float32, torch.float16]
    kernels.qk_norm_rope(q, q, w, w.half(), 1e-6, *TABLES)
    assert not kernels.LAUNCHES


def test_interp_nothing_is_launched_on_nothing():
    """A grid of no programs is an error of the driver."""
    x, heads = torch.randn(0, 8, requires_grad=True), torch.randn(1, 2, 0, 8)
    w, tables = torch.ones(8), (torch.ones(1, 0, 8),) * 2
    kernels.gated_mlp(kernels.swiglu(kernels.rms_norm(x, w, 1e-6), x), *[torch.ones(8, 8)] * 3).sum().backward()
    kernels.qk_norm_rope(*kernels.qk_rope(heads, heads, *tables), w, w, 1e-6, *tables)
    assert not kernels.LAUNCHES
