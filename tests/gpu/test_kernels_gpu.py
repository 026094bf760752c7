"""The Triton kernels on a GPU, by the checks that the CPU tests use, at model shapes and in every dtype."""

from __future__ import annotations

import pytest
import torch
from kernels import kernel_checks as check

from chronicals_trl import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
scales = pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])


@pytest.fixture(autouse=True)
def fresh_counts():
    kernels.LAUNCHES.clear()


def launched(name: str) -> bool:
    return kernels.LAUNCHES[name] > 0 and kernels.LAUNCHES[name + "_backward"] > 0


@dtypes
@scales
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"residual": True}], ids=str)
def test_rms_norm(dtype, scale, options):
    check.check_rms_norm("cuda", dtype, (3, 71, 896), scale=scale, **options)
    assert launched("rms_norm")


@dtypes
@pytest.mark.parametrize("width", [8, 37, 128, 4096, 8191])
def test_rms_norm_widths(dtype, width):
    check.check_rms_norm("cuda", dtype, (67, width))


@dtypes
def test_rms_norm_of_transposed_heads(dtype):
    check.check_rms_norm("cuda", dtype, (2, 50, 14, 64), transposed=True)


@dtypes
@scales
@pytest.mark.parametrize("gelu", [False, True], ids=["swiglu", "geglu"])
def test_gated_mlp(dtype, scale, gelu):
    check.check_gated_mlp("cuda", dtype, (3, 71, 4864), scale=scale, gelu=gelu)
    assert launched("gated_mlp")


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (32, 8, 128), (4, 4, 96)])
def test_qk_rope(dtype, heads, kv_heads, head_dim):
    check.check_qk_rope("cuda", dtype, (2, heads, kv_heads, 51, head_dim))
    assert launched("qk_rope")


@dtypes
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"ignored": 1.0}, {"weighting": "dft"}], ids=str)
def test_linear_cross_entropy(dtype, options):
    check.check_linear_cross_entropy("cuda", dtype, (257, 896, 1531), **options)
