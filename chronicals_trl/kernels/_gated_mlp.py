"""The gated activations of transformer MLPs, silu(gate) * up (SwiGLU) and gelu_tanh(gate) * up (GeGLU), and the MLP.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202; the tanh approximation is Hendrycks and Gimpel 2016,
https://arxiv.org/abs/1606.08415. Computed in float32, rounded once; the backward pass recomputes the activation, so
only gate and up are kept.

`gated_mlp` is the whole block, down_proj(act(gate_proj(x)) * up_proj(x)), as one autograd node. The two halves of the
input gradient meet inside the second GEMM, not in an addition. The product that down_proj's weight gradient needs is
kept, as torch does, or (`recompute`) made again by the kernel that reads gate and up anyway, in the buffer of its own
gradient: one more write for a third less to keep.

Shapes: gate, up (..., I), which inside the kernels are rows of I columns at one stride each, so that the two halves
of one fused projection (Phi-3) are read, and their gradients written, in place. M tokens, H hidden size.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import _gradient_memory
from ._common import (
    LAUNCHES,
    MAX_LAUNCHES,
    Launch,
    autocast_dtype,
    autocast_off,
    jit,
    kernel_op,
    math_dtype,
    require_floating,
    row_stride,
    tl,
    triton,
    use_triton,
)

# Elements and warps of a program. At the memory wall one sensible choice is as good as another (H100).
_BLOCK, _WARPS = 1024, 8


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _gated_reference(gate: torch.Tensor, up: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    compute = math_dtype(gate.dtype)
    activation = _gelu_tanh if gelu else F.silu
    return (activation(gate.to(compute)) * up.to(compute)).to(gate.dtype)


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """`swiglu` in differentiable torch code, for any device and floating dtype."""
    return _gated_reference(gate, up, gelu=False)


def geglu_reference(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """`geglu` in differentiable torch code, for any device and floating dtype."""
    return _gated_reference(gate, up, gelu=True)


# -- kernels ---------------------------------------------------------------------------------------------------------


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
def _tile(n_cols, BLOCK: tl.constexpr):
    """Row and columns of this program. One grid axis: the others end at 65,535."""
    per_row = (n_cols - 1) // BLOCK + 1  # the sum in tl.cdiv would pass 2^31 for one row of just under that
    program = tl.program_id(0).to(tl.int64)
    return program // per_row, (program % per_row) * BLOCK + tl.arange(0, BLOCK)


@jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, gs, us, n_cols, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row, col = _tile(n_cols, BLOCK)
    mask = col < n_cols
    gate = tl.load(gate_ptr + row * gs + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * us + col, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(gate, GELU)
    tl.store(out_ptr + row * n_cols + col, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, rs, gs, us, ds, n_cols,
    GELU: tl.constexpr, HAS_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col = _tile(n_cols, BLOCK)
    mask = col < n_cols
    grad = tl.load(grad_ptr + row * rs + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gs + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * us + col, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activation(gate, GELU)
    tl.store(dgate_ptr + row * ds + col, (grad * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * ds + col, (grad * value).to(dup_ptr.dtype.element_ty), mask=mask)
    if HAS_OUT:  # over the gradient, each element of which this thread alone has read
        tl.store(out_ptr + row * rs + col, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


# -- launches: gate, up (..., I), or one gate (..., 2I) that holds both halves and no up ------------------------------

Layout = tuple[int, ...]  # the strides of a tensor


def _halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.chunk(2, dim=-1) if up is None else (gate, up)  # type: ignore[return-value]


def _addressable(t: torch.Tensor) -> torch.Tensor:
    """`t`, copied only if its rows do not lie at one stride with their elements side by side."""
    return t if t.stride(-1) == 1 and row_stride(t.shape, t.stride()) is not None else t.contiguous()


def _extent(shape: torch.Size, *layouts: Layout) -> tuple[int, int, list[Any]]:
    """Programs, columns to launch over, and row strides; one long row where all lie without gaps."""
    strides = [row_stride(shape, layout) for layout in layouts]
    n_cols = shape[-1]
    n_rows = shape.numel() // n_cols
    if all(stride == n_cols for stride in strides):
        n_rows, n_cols = 1, shape.numel()
    return n_rows * triton.cdiv(n_cols, _BLOCK), n_cols, strides


# Everything about a launch that shapes, strides and dtypes decide, looked up by them: `Launch` says why.


@lru_cache(MAX_LAUNCHES)
def _forward_launch(
    shape: torch.Size, gate: Layout, up: Layout, device: torch.device, dtypes: Any, gelu: bool
) -> Launch:
    programs, n_cols, strides = _extent(shape, gate, up)
    return Launch(_forward_kernel, programs, *strides, n_cols, gelu, _BLOCK, num_warps=_WARPS)


@lru_cache(MAX_LAUNCHES)
def _backward_launch(
    shape: torch.Size, layouts: tuple[Layout, ...], device: torch.device, dtypes: Any, gelu: bool, has_out: bool
) -> Launch:
    programs, n_cols, strides = _extent(shape, *layouts)
    return Launch(_backward_kernel, programs, *strides, n_cols, gelu, has_out, _BLOCK, num_warps=_WARPS)


def _launch_forward(gate: torch.Tensor, up: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    gate, up = _halves(gate, up)
    out = gate.new_empty(gate.shape)
    launch = _forward_launch(gate.shape, gate.stride(), up.stride(), gate.device, (gate.dtype, up.dtype), gelu)
    LAUNCHES["gated_mlp"] += 1
    launch((gate, up, out))
    return out


def _launch_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, gelu: bool, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, or of both halves in one (..., 2I) and an empty tensor.

    `out`, if given, is `grad` itself, and is overwritten with the forward pass's result.
    """
    assert out is None or out is grad
    joint = up is None
    d_gate, d_up = gate.new_empty(gate.shape), gate.new_empty(0) if up is None else up.new_empty(up.shape)
    gate, up = _halves(gate, up)
    left, right = _halves(d_gate, None if joint else d_up)
    launch = _backward_launch(
        gate.shape, (grad.stride(), gate.stride(), up.stride(), left.stride()), gate.device,
        (grad.dtype, gate.dtype, up.dtype), gelu, out is not None,
    )  # fmt: skip
    LAUNCHES["gated_mlp_backward"] += 1
    launch((grad, gate, up, left, right, out))
    return d_gate, d_up


# -- the activation as an op -----------------------------------------------------------------------------------------


def _fake(gate: torch.Tensor, up: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _backward_fake(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, gelu: bool) -> Any:
    return gate.new_empty(gate.shape), gate.new_empty(0) if up is None else up.new_empty(up.shape)


@kernel_op("gated_activation_backward(Tensor grad, Tensor gate, Tensor? up, bool gelu) -> (Tensor, Tensor)",
           _backward_fake)  # fmt: skip
def _backward_op(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, gelu: bool) -> Any:
    return _launch_backward(grad, gate, up, gelu)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, ctx.gelu = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    gate, up = ctx.saved_tensors
    d_gate, d_up = _backward_op(_addressable(grad), gate, up, ctx.gelu)
    return d_gate, None if up is None else d_up, None


@kernel_op("gated_activation(Tensor gate, Tensor? up, bool gelu) -> Tensor", _fake,
           setup_context=_setup_context, backward=_backward)  # fmt: skip
def _op(gate: torch.Tensor, up: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    return _launch_forward(gate, up, gelu)


def _gated(name: str, gate: torch.Tensor, up: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    if up is None and (gate.dim() == 0 or gate.shape[-1] % 2):
        raise ValueError(
            f"{name}: gate has shape {tuple(gate.shape)}; without up its last dimension holds both halves and must be "
            "even."
        )
    if up is not None and gate.shape != up.shape:
        raise ValueError(f"{name}: gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}; they must be equal.")
    if not use_triton(gate, up) or gate.dim() == 0 or gate.numel() == 0:
        require_floating(name, gate=gate, up=up)
        return _gated_reference(gate, up, gelu)
    # Read in place wherever the rows lie at one stride, as in both halves of a fused projection.
    return _op(_addressable(gate), None if up is None else _addressable(up), gelu)


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate, up: (..., I), equal shapes, bf16, fp16, fp32 (or fp64: reference), any strides. Without `up`, `gate` is
            (..., 2I) and holds gate and up side by side, as one fused projection gives them.

    Returns:
        (..., I) in gate's dtype, contiguous. Gradients come in gate's and up's own dtypes and shapes.

    Raises:
        ValueError: the shapes differ, or a joint `gate` has an odd width.
        TypeError: gate or up is not floating-point.
    """
    return _gated("swiglu", gate, up, gelu=False)


def geglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """``gelu(gate, approximate="tanh") * up``; arguments, result and errors as for `swiglu`."""
    return _gated("geglu", gate, up, gelu=True)


# -- the MLP as one autograd node ------------------------------------------------------------------------------------


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MH: torch.Tensor,
        gate_IH: torch.Tensor,
        up_IH: torch.Tensor | None,
        down_HI: torch.Tensor,
        gelu: bool,
        recompute: bool,
        result_needed: bool,
    ) -> torch.Tensor:
        gate_MI = x_MH @ gate_IH.t()
        up_MI = None if up_IH is None else x_MH @ up_IH.t()
        keep = ctx.needs_input_grad[3] and not recompute
        product_MI = _launch_forward(gate_MI, up_MI, gelu) if keep or result_needed else None
        ctx.save_for_backward(x_MH, gate_MI, up_MI, product_MI if keep else None, gate_IH, up_IH, down_HI)
        ctx.gelu = gelu
        return product_MI @ down_HI.t() if result_needed else torch.empty_like(x_MH)  # type: ignore[operator]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MH: torch.Tensor) -> Any:
        with autocast_off(grad_MH.device.type):
            return _GatedMLP._gradients(ctx, grad_MH)

    @staticmethod
    def _gradients(ctx: Any, grad_MH: torch.Tensor) -> Any:
        x_MH, gate_MI, up_MI, product_MI, gate_IH, up_IH, down_HI = ctx.saved_tensors
        need_x, need_gate, need_up, need_down = ctx.needs_input_grad[:4]
        d_product_MI = grad_MH @ down_HI
        again = d_product_MI if need_down and product_MI is None else None
        d_gate_MI, d_up_MI = _launch_backward(d_product_MI, gate_MI, up_MI, ctx.gelu, out=again)
        product_MI = again if product_MI is None else product_MI
        d_down = None if product_MI is None else _gradient_memory.product(grad_MH.t(), product_MI, down_HI)
        del d_product_MI, product_MI, again
        d_x = d_gate_MI @ gate_IH if need_x else None
        if d_x is not None and up_IH is not None:
            d_x.addmm_(d_up_MI, up_IH)
        d_gate = _gradient_memory.product(d_gate_MI.t(), x_MH, gate_IH) if need_gate else None
        d_up = _gradient_memory.product(d_up_MI.t(), x_MH, up_IH) if need_up else None
        return d_x, d_gate, d_up, d_down, None, None, None


def gated_mlp(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor | None,
    down_weight: torch.Tensor,
    *,
    activation: str = "swiglu",
    recompute: bool = False,
    result_needed: bool = True,
) -> torch.Tensor:
    """``down(act(gate(x)) * up(x))`` for projections without bias, as one autograd node.

    Under autocast the GEMMs run in the autocast dtype, as `torch.nn.functional.linear` does. Where the kernels do not
    run, and under torch.compile, the same formula runs as separate ops.

    Args:
        x: (..., H), bf16, fp16 or fp32.
        gate_weight, up_weight: (I, H); or `gate_weight` (2I, H) with both, gate first, and `up_weight` None.
        down_weight: (H, I).
        activation: ``"swiglu"`` or ``"geglu"``.
        recompute: keep x, gate and up alone, and make the product ``act(gate) * up`` again in the backward pass.
        result_needed: False where a checkpoint computes the block again for the sake of what it keeps: the result may
            be any numbers then, and `down` is not multiplied with.

    Returns:
        (..., H).

    Raises:
        ValueError: an unknown activation, or shapes that do not fit together.
    """
    ops = {"swiglu": swiglu, "geglu": geglu}
    if activation not in ops:
        raise ValueError(f"gated_mlp: activation is {activation!r}; it must be one of {sorted(ops)}.")
    width, inner = (t.shape[-1] if t.dim() else 0 for t in (x, down_weight))
    given = [tuple(w.shape) for w in (gate_weight, up_weight, down_weight) if w is not None]
    wanted = [(2 * inner, width)] if up_weight is None else [(inner, width), (inner, width)]
    if given != [*wanted, (width, inner)]:
        raise ValueError(
            f"gated_mlp: weights of shapes {given} do not fit x of shape {tuple(x.shape)}; gate and up must be (I, H) "
            f"or one (2I, H), and down (H, I), with H = {width}."
        )
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, gate_weight, down_weight = x.to(dtype), gate_weight.to(dtype), down_weight.to(dtype)
        up_weight = None if up_weight is None else up_weight.to(dtype)
    one_dtype = x.dtype == gate_weight.dtype == down_weight.dtype
    by_kernels = one_dtype and use_triton(x, gate_weight, up_weight, down_weight) and x.numel() > 0
    if torch.compiler.is_compiling() or not by_kernels:
        gate = F.linear(x, gate_weight)
        up = None if up_weight is None else F.linear(x, up_weight)
        return F.linear(ops[activation](gate, up), down_weight)
    out = _GatedMLP.apply(
        x.reshape(-1, width), gate_weight, up_weight, down_weight, activation == "geglu", recompute, result_needed
    )
    return out.view(x.shape)
