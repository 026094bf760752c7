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
from chronicals_trl.kernels import _common

pytestmark = pytest.mark.skipif(not _common.INTERPRET, reason="needs TRITON_INTERPRET=1 from the start")

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture
def launched():
    """Runs the test, then asserts that the named kernels ran, forward and backward."""
    expected: list[str] = []
    kernels.LAUNCHES.clear()
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
def test_interp_rms_norm_of_transposed_heads(launched, dtype, residual):
    launched(["rms_norm"])
    check.check_rms_norm("cpu", dtype, (2, 5, 3, 24), transposed=True, residual=residual)


def test_interp_rms_norm_many_row_tiles(launched):
    """More tiles than programs, so that each program's loop adds to its share of the weight gradient."""
    launched(["rms_norm"])
    check.check_rms_norm("cpu", torch.float32, (41, 600), offset=1.0)


@dtypes
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("gelu", [False, True], ids=["swiglu", "geglu"])
def test_interp_gated_mlp(launched, dtype, scale, gelu):
    launched(["gated_mlp"])
    check.check_gated_mlp("cpu", dtype, (2, 3, 67), gelu=gelu, scale=scale)


@dtypes
def test_interp_gated_mlp_reads_fused_halves_in_place(launched, dtype, monkeypatch):
    launched(["gated_mlp"])
    check.check_gated_mlp("cpu", dtype, (2, 3, 1100), gelu=False, fused=True)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda _: pytest.fail("a half was copied"))
    kernels.swiglu(*torch.randn(2, 3, 64).chunk(2, -1))


@dtypes
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 5, 2, 7, 16), {}),
        ((2, 3, 3, 6, 24), {"table_batch": 2}),
        ((1, 4, 1, 5, 20), {"rotary_dim": 12}),
        ((1, 2, 1, 5, 8), {"uneven": True}),
        ((1, 9, 2, 2, 512), {}),  # heads in several passes
    ],
    ids=str,
)
def test_interp_qk_rope(launched, dtype, shape, options):
    launched(["qk_rope"])
    check.check_qk_rope("cpu", dtype, shape, **options)


def test_interp_layouts_are_kept():
    heads = torch.randn(2, 5, 3, 8).transpose(1, 2)
    q, _ = kernels.qk_rope(heads, heads, *check.rope_tables(1, 5, 8, "cpu"))
    assert q.stride() == heads.stride()
    assert kernels.rms_norm(heads, torch.ones(8), 1e-6).stride() == heads.stride()


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    width=st.integers(1, 40),
    residual=st.booleans(),
    stride=st.sampled_from([1, 2]),
)
def test_interp_rms_norm_any_shape(shape, width, residual, stride):
    torch.manual_seed(0)
    x, r = (torch.randn(*shape, width, stride)[..., 0].requires_grad_() for _ in range(2))
    w = torch.randn(width, requires_grad=True)
    arguments = (x, w, r) if residual else (x, w)

    def run(fn):
        out = fn(*arguments)
        out = out if isinstance(out, tuple) else (out,)
        return (*out, *torch.autograd.grad(sum((o * torch.arange(width)).sum() for o in out), arguments))

    ours = run(lambda x, w, r=None: kernels.rms_norm(x, w, 1e-6, residual=r))
    reference = run(lambda x, w, r=None: kernels.rms_norm_reference(x, w, 1e-6, 0.0, r))
    torch.testing.assert_close(ours, reference, rtol=2e-5, atol=2e-5 * width)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    seq_len=st.integers(1, 4),
    half=st.integers(1, 9),
    rest=st.integers(0, 5),
)
def test_interp_qk_rope_any_shape(heads, seq_len, half, rest):
    check.check_qk_rope("cpu", torch.float32, (2, *heads, seq_len, 2 * half + rest), rotary_dim=2 * half)


@pytest.mark.parametrize(
    "index", range(6), ids=["plain", "reentrant", "non_reentrant", "autocast", "compiled", "dynamic"]
)
def test_interp_wrapped(launched, index):
    launched(["rms_norm", "gated_mlp", "qk_rope"])
    elementwise.test_wrapped(index)


def test_interp_saved_tensors_survive_a_backward():
    elementwise.test_saved_tensors_survive_a_backward()


def test_interp_one_output_unused():
    """Autograd hands None or zeros for what is not used; either has to count as no gradient."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(2))
    tables = check.rope_tables(1, 3, 8, "cpu")
    grads = torch.autograd.grad(kernels.qk_rope(q, k, *tables)[0].square().sum(), (q, k))
    torch.testing.assert_close(grads, (2 * q, torch.zeros_like(k)))
    x, r, w = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8), torch.ones(8)
    (grad,) = torch.autograd.grad(kernels.rms_norm(x, w, 1e-6, residual=r)[1].sum(), x)
    torch.testing.assert_close(grad, torch.ones(3, 8))


def test_interp_what_the_kernels_do_not_take_runs_the_reference():
    kernels.LAUNCHES.clear()
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(3, 8, dtype=dtype)
        kernels.swiglu(kernels.rms_norm(x, torch.ones(8, dtype=dtype), 1e-6), x)
    assert not kernels.LAUNCHES
