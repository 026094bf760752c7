"""RMSNorm, optionally with the residual addition in front of it.

    y = h / sqrt(mean(h^2) + eps) * (offset + weight),   h = x or x + residual

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; `offset` 1.0 is Gemma's parametrisation. Statistics
and product are float32 and y is rounded once. (transformers' Llama norm rounds once more, before the weight.)

Shapes: x (..., W), weight (W,). R rows are all leading dimensions together. Rows are addressed by up to three strides,
so that a q/k norm on a transposed (B, S, heads, D) view needs no copy and keeps that layout for the attention.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from typing import Any, overload

import torch

from ._common import (
    INTERPRET,
    LAUNCHES,
    empty_rows_like,
    jit,
    math_dtype,
    num_warps,
    tl,
    triton,
    unit_last_stride,
    use_triton,
)

# One program holds a whole row, so that x is read once. Wider rows than this would spill.
MAX_WIDTH = 32768


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` in differentiable torch code, for any device and floating dtype."""
    h = x if residual is None else x + residual
    compute = math_dtype(h.dtype)
    h_wide = h.to(compute)
    inverse_rms = torch.rsqrt(h_wide.square().mean(-1, keepdim=True) + eps)
    y = (h_wide * inverse_rms * (weight.to(compute) + offset)).to(h.dtype)
    return y if residual is None else (y, h)


@jit
def _row_offsets(row, n1, n2, s0, s1, s2):
    # Rows are 64-bit: rows times stride passes 2^31 elements at 16k tokens of a 128k-wide fused projection.
    i2 = row % n2
    i1 = (row // n2) % n1
    i0 = row // (n1 * n2)
    return i0 * s0 + i1 * s1 + i2 * s2


@jit
def _forward_kernel(
    x_ptr, res_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, n_rows, n1, n2, width, xs0, xs1, xs2, ys0, ys1, ys2,
    eps, offset, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_W)
    mask = (row < n_rows)[:, None] & (col < width)[None, :]
    x_at = _row_offsets(row, n1, n2, xs0, xs1, xs2)[:, None] + col[None, :]
    y_at = _row_offsets(row, n1, n2, ys0, ys1, ys2)[:, None] + col[None, :]
    h = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(res_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
        stored = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + y_at, stored, mask=mask)
        h = stored.to(tl.float32)  # the norm is of the sum as the next block will read it, rounded
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=1) / width + eps)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32) + offset
    y = h * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)


@jit
def _backward_kernel(
    gy_ptr, gh_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, dw_ptr, n_rows, n1, n2, width,
    gs0, gs1, gs2, hs0, hs1, hs2, ds0, ds1, ds2, offset,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, HAS_GH: tl.constexpr, NEED_DW: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_W)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([BLOCK_W], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_R), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        live = row < n_rows
        mask = live[:, None] & (col < width)[None, :]
        g_at = _row_offsets(row, n1, n2, gs0, gs1, gs2)[:, None] + col[None, :]
        h_at = _row_offsets(row, n1, n2, hs0, hs1, hs2)[:, None] + col[None, :]
        d_at = _row_offsets(row, n1, n2, ds0, ds1, ds2)[:, None] + col[None, :]
        gy = tl.load(gy_ptr + g_at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
        unit = tl.load(h_ptr + h_at, mask=mask, other=0.0).to(tl.float32) * rstd[:, None]
        gw = gy * weight[None, :]
        dx = (gw - unit * (tl.sum(gw * unit, axis=1) / width)[:, None]) * rstd[:, None]
        if HAS_GH:
            dx += tl.load(gh_ptr + d_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + d_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += tl.sum(gy * unit, axis=0)
    if NEED_DW:
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * width + col, dw, mask=col < width)


def _rows(x: torch.Tensor) -> tuple[int, int, tuple[int, int, int]]:
    """Sizes of the two inner row dimensions and the strides of all three, `x` having at most four dimensions."""
    pad = 4 - x.dim()
    sizes = (1,) * pad + tuple(x.shape)
    strides = (0,) * pad + x.stride()
    return sizes[1], sizes[2], (strides[0], strides[1], strides[2])


def _blocks(width: int) -> tuple[int, int, int]:
    block_w = triton.next_power_of_2(width)
    block_r = max(1, 2048 // block_w)  # narrow rows (q/k norms) share a program
    return block_r, block_w, num_warps(block_r * block_w)


@torch.library.custom_op(
    "chronicals_trl::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
)
def _op(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float) -> Any:
    width = x.shape[-1]
    n_rows = x.numel() // width
    y = empty_rows_like(x)
    h = empty_rows_like(x) if residual is not None else x.new_empty(0)
    rstd = torch.empty(n_rows, device=x.device, dtype=torch.float32)
    n1, n2, x_strides = _rows(x)
    block_r, block_w, warps = _blocks(width)
    LAUNCHES["rms_norm"] += 1
    _forward_kernel[(triton.cdiv(n_rows, block_r),)](
        x, residual if residual is not None else x, weight, y, h, rstd, n_rows, n1, n2, width,
        *x_strides, *_rows(y)[2], eps, offset,
        BLOCK_R=block_r, BLOCK_W=block_w, HAS_RESIDUAL=residual is not None, num_warps=warps,
    )  # fmt: skip
    return y, h, rstd


@_op.register_fake
def _(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float) -> Any:
    h = empty_rows_like(x) if residual is not None else x.new_empty(0)
    return empty_rows_like(x), h, torch.empty(x.shape[:-1].numel(), device=x.device, dtype=torch.float32)


@torch.library.custom_op(
    "chronicals_trl::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor gy, Tensor? gh, Tensor h, Tensor weight, Tensor rstd, float offset, bool need_dw)"
    " -> (Tensor, Tensor)",
)
def _backward_op(
    gy: torch.Tensor,
    gh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
) -> Any:
    width = h.shape[-1]
    n_rows = h.numel() // width
    dx = empty_rows_like(h)
    block_r, block_w, warps = _blocks(width)
    # Each program keeps its share of the weight gradient in registers; a tiny sum then joins them, in a fixed order.
    cores = 4 if INTERPRET else 2 * torch.cuda.get_device_properties(h.device).multi_processor_count
    programs = min(triton.cdiv(n_rows, block_r), cores)
    dw = torch.empty(programs if need_dw else 0, width, device=h.device, dtype=torch.float32)
    n1, n2, h_strides = _rows(h)
    LAUNCHES["rms_norm_backward"] += 1
    _backward_kernel[(programs,)](
        gy, gh if gh is not None else gy, h, weight, rstd, dx, dw, n_rows, n1, n2, width,
        *_rows(gy)[2], *h_strides, *_rows(dx)[2], offset,
        BLOCK_R=block_r, BLOCK_W=block_w, HAS_GH=gh is not None, NEED_DW=need_dw, num_warps=warps,
    )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype) if need_dw else weight.new_empty(0)


@_backward_op.register_fake
def _(
    gy: torch.Tensor,
    gh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
) -> Any:
    return empty_rows_like(h), torch.empty_like(weight) if need_dw else weight.new_empty(0)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, _, ctx.offset = inputs
    _, h, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, rstd)
    ctx.has_residual = residual is not None


def _backward(ctx: Any, gy: torch.Tensor | None, gh: torch.Tensor | None, _: Any) -> Any:
    h, weight, rstd = ctx.saved_tensors
    need_dw = ctx.needs_input_grad[2]
    gy = torch.zeros_like(h) if gy is None else unit_last_stride(gy)
    gh = gh.contiguous() if ctx.has_residual and gh is not None else None
    dx, dw = _backward_op(gy, gh, h, weight, rstd, ctx.offset, need_dw)
    return dx, dx if ctx.has_residual else None, dw if need_dw else None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, residual: None = None
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the last dimension, with the residual addition fused in if one is given.

    Args:
        x: (..., W), bf16, fp16, fp32 (or fp64: reference), any strides.
        weight: (W,), any floating dtype. Its gradient is summed in float32 and comes in its own dtype.
        eps: added to the mean square.
        offset: added to `weight`; 1.0 for Gemma's norms.
        residual: (..., W). If given, what is normed is ``x + residual``.

    Returns:
        y (..., W) in x's dtype, in x's layout; with `residual` the pair (y, x + residual), both in the dtype that
        torch promotes the sum to.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}; it must be (W,), W the last dimension of x, whose "
            f"shape is {tuple(x.shape)}."
        )
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"rms_norm: residual has shape {tuple(residual.shape)}; it must be x's, {tuple(x.shape)}: expand it."
            )
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if not use_triton(x, weight, residual) or x.shape[-1] > MAX_WIDTH or x.numel() == 0:
        return rms_norm_reference(x, weight, eps, offset, residual)
    shape = x.shape
    if residual is not None:
        x, residual = x.contiguous(), residual.contiguous()
    x = unit_last_stride(x)
    if x.dim() > 4:
        x = x.reshape(-1, shape[-1])
        residual = residual.reshape(-1, shape[-1]) if residual is not None else None
    y, h, _ = _op(x, residual, weight.contiguous(), eps, offset)
    return y.view(shape) if residual is None else (y.view(shape), h.view(shape))
