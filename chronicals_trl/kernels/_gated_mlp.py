"""The gated activations of transformer MLPs: silu(gate) * up (SwiGLU) and gelu_tanh(gate) * up (GeGLU).

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202; the tanh approximation is Hendrycks and Gimpel 2016,
https://arxiv.org/abs/1606.08415. Computed in float32, rounded once; the backward pass recomputes the activation, so
only gate and up are kept.

Shapes: gate, up (..., I), which inside the kernels are R rows of I columns with a row stride each, so that the two
halves of one fused projection (Phi-3) are read in place.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from typing import Any

import torch
import torch.nn.functional as F

from ._common import LAUNCHES, jit, math_dtype, tl, triton, unit_last_stride, use_triton

_BLOCK = 1024


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`swiglu` in differentiable torch code, for any device and floating dtype."""
    compute = math_dtype(gate.dtype)
    return (F.silu(gate.to(compute)) * up.to(compute)).to(gate.dtype)


def geglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`geglu` in differentiable torch code, for any device and floating dtype."""
    compute = math_dtype(gate.dtype)
    return (_gelu_tanh(gate.to(compute)) * up.to(compute)).to(gate.dtype)


@jit
def _activation(x, GELU: tl.constexpr):
    """Value and derivative. Both activations are x * sigmoid(u): gelu_tanh since (1 + tanh(t)) / 2 = sigmoid(2 t)."""
    if GELU:
        u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)  # 2 * sqrt(2 / pi)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        u = x
        slope = 1.0
    # Sigmoid and its complement from one exponential that cannot overflow; 1 - s would cancel for large u.
    e = tl.exp(-tl.abs(u))
    r = 1.0 / (1.0 + e)
    s = tl.where(u >= 0, r, e * r)
    c = tl.where(u >= 0, e * r, r)
    return x * s, s * (1.0 + x * c * slope)


@jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, gs, us, n_cols, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < n_cols
    gate = tl.load(gate_ptr + row * gs + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * us + col, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(gate, GELU)
    tl.store(out_ptr + row * n_cols + col, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rs, gs, us, n_cols, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < n_cols
    grad = tl.load(grad_ptr + row * rs + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gs + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * us + col, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activation(gate, GELU)
    out = row * n_cols + col
    tl.store(dgate_ptr + out, (grad * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + out, (grad * value).to(dup_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op(
    "chronicals_trl::gated_activation", mutates_args=(), schema="(Tensor gate, Tensor up, bool gelu) -> Tensor"
)
def _op(gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    n_rows, n_cols = gate.shape
    out = gate.new_empty(n_rows, n_cols)
    LAUNCHES["gated_mlp"] += 1
    _forward_kernel[(n_rows, triton.cdiv(n_cols, _BLOCK))](
        gate, up, out, gate.stride(0), up.stride(0), n_cols, GELU=gelu, BLOCK=_BLOCK
    )
    return out


@_op.register_fake
def _(gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op(
    "chronicals_trl::gated_activation_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor gate, Tensor up, bool gelu) -> (Tensor, Tensor)",
)
def _backward_op(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> Any:
    n_rows, n_cols = gate.shape
    dgate, dup = gate.new_empty(n_rows, n_cols), up.new_empty(n_rows, n_cols)
    LAUNCHES["gated_mlp_backward"] += 1
    _backward_kernel[(n_rows, triton.cdiv(n_cols, _BLOCK))](
        grad, gate, up, dgate, dup, grad.stride(0), gate.stride(0), up.stride(0), n_cols, GELU=gelu, BLOCK=_BLOCK
    )
    return dgate, dup


@_backward_op.register_fake
def _(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> Any:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, ctx.gelu = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    gate, up = ctx.saved_tensors
    return (*_backward_op(unit_last_stride(grad), gate, up, ctx.gelu), None)


_op.register_autograd(_backward, setup_context=_setup_context)


def _gated(name: str, gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    if gate.shape != up.shape:
        raise ValueError(f"{name}: gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}; they must be equal.")
    if not use_triton(gate, up) or gate.dim() == 0 or gate.numel() == 0:
        return geglu_reference(gate, up) if gelu else swiglu_reference(gate, up)
    width = gate.shape[-1]
    # Views wherever the rows lie at one stride, as in both halves of a fused projection.
    gate_RI = unit_last_stride(gate.reshape(-1, width))
    up_RI = unit_last_stride(up.reshape(-1, width))
    return _op(gate_RI, up_RI, gelu).view(gate.shape)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate, up: (..., I), equal shapes, bf16, fp16, fp32 (or fp64: reference), any strides.

    Returns:
        (..., I) in gate's dtype, contiguous. Gradients come in gate's and up's own dtypes.

    Raises:
        ValueError: the shapes differ.
    """
    return _gated("swiglu", gate, up, gelu=False)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate, approximate="tanh") * up``; arguments, result and errors as for `swiglu`."""
    return _gated("geglu", gate, up, gelu=True)
