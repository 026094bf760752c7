"""RMSNorm, optionally with the residual addition in front of it.

    y = h / sqrt(mean(h^2) + eps) * (offset + weight),   h = x or x + residual

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; `offset` 1.0 is Gemma's parametrisation. Statistics
and product are float32 and y is rounded once. (transformers' Llama norm rounds once more, before the weight.)

Both passes read and write each element once and hold a row in registers. With u = h / rms and w = offset + weight,

    dh = (gy w - u mean(gy w u)) / rms + gh,    dw = sum over rows of gy u,

where gh is the gradient of the sum h. The backward kernel runs a fixed number of programs, each of which walks over
many rows and keeps its share of dw in registers; a second, tiny kernel adds the shares up, always in the same order.

Shapes: x (..., W), weight (W,). R rows are all leading dimensions together. Rows lie at one stride, or are addressed
by three, so that a q/k norm on a transposed (B, S, heads, D) view needs no copy and keeps that layout.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from functools import cache, lru_cache
from typing import Any, NamedTuple, overload

import torch

from ._common import (
    LAUNCHES,
    MAX_LAUNCHES,
    Launch,
    empty_rows_like,
    jit,
    kernel_op,
    math_dtype,
    multiprocessors,
    require_floating,
    row_stride,
    shared_memory,
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


# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _row_offsets(row, n1, n2, s0, s1, s2, FLAT: tl.constexpr):
    # Rows are 64-bit: rows times stride passes 2^31 elements at 16k tokens of a 128k-wide fused projection.
    if FLAT:
        return row * s2
    i2 = row % n2
    i1 = (row // n2) % n1
    i0 = row // (n1 * n2)
    return i0 * s0 + i1 * s1 + i2 * s2


@jit
def _inverse_rms(h, eps, WIDTH: tl.constexpr):
    # Correctly rounded: it is once a row, and the approximate instructions show in float32.
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, axis=1) / WIDTH + eps))


@jit
def _forward_kernel(
    x_ptr, res_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, eps, offset, n_rows, n1, n2, xs0, xs1, xs2, ys0, ys1, ys2,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, HAS_RESIDUAL: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_W)
    mask = (row < n_rows)[:, None] & (col < WIDTH)[None, :]
    x_at = _row_offsets(row, n1, n2, xs0, xs1, xs2, FLAT)[:, None] + col[None, :]
    y_at = _row_offsets(row, n1, n2, ys0, ys1, ys2, FLAT)[:, None] + col[None, :]
    h = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(res_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
        stored = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + y_at, stored, mask=mask)
        h = stored.to(tl.float32)  # the norm is of the sum as the next block will read it, rounded
    rstd = _inverse_rms(h, eps, WIDTH)
    weight = tl.load(weight_ptr + col, mask=col < WIDTH, other=0.0).to(tl.float32) + offset
    y = h * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)


@jit
def _backward_kernel(
    gy_ptr, gh_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, share_ptr, offset, n_rows, n1, n2,
    gs0, gs1, gs2, hs0, hs1, hs2, ds0, ds1, ds2,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, HAS_GH: tl.constexpr, NEED_DW: tl.constexpr,
    FLAT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_W)
    weight = tl.load(weight_ptr + col, mask=col < WIDTH, other=0.0).to(tl.float32) + offset
    # Kept apart by row of the tile until the end: a sum over threads in every turn would cost a barrier each.
    dw = tl.zeros([BLOCK_R, BLOCK_W], dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_R), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        live = row < n_rows
        mask = live[:, None] & (col < WIDTH)[None, :]
        g_at = _row_offsets(row, n1, n2, gs0, gs1, gs2, FLAT)[:, None] + col[None, :]
        h_at = _row_offsets(row, n1, n2, hs0, hs1, hs2, FLAT)[:, None] + col[None, :]
        d_at = _row_offsets(row, n1, n2, ds0, ds1, ds2, FLAT)[:, None] + col[None, :]
        gy = tl.load(gy_ptr + g_at, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + h_at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
        unit = h * rstd[:, None]
        gw = gy * weight[None, :]
        dx = (gw - unit * (tl.sum(gw * unit, axis=1) / WIDTH)[:, None]) * rstd[:, None]
        if HAS_GH:
            dx += tl.load(gh_ptr + d_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + d_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += gy * unit
    if NEED_DW:
        share = tl.program_id(0).to(tl.int64) * WIDTH + col
        tl.store(share_ptr + share, tl.sum(dw, axis=0), mask=col < WIDTH)


@jit
def _sum_shares_kernel(share_ptr, dw_ptr, n_shares, width, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    for first in range(0, n_shares, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        mask = (share < n_shares)[:, None] & (col < width)[None, :]
        total += tl.load(share_ptr + share[:, None] * width + col[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + col, tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty), mask=col < width)


# -- launches --------------------------------------------------------------------------------------------------------


class _Config(NamedTuple):
    """How a kernel is launched for rows of one width."""

    block_r: int
    block_w: int
    warps: int
    programs: int = 0  # for each multiprocessor; of the backward kernel
    stages: int = 1  # tiles in flight and in use


# Chosen on an H100 from some 300 combinations a shape; the best few are hard to tell apart.


@cache
def _forward_config(width: int) -> _Config:
    block_w = triton.next_power_of_2(width)
    block_r = max(1, 4096 // block_w)  # narrow rows (q/k norms) share a program
    return _Config(block_r, block_w, 4 if block_w <= 1024 else min(32, max(8, block_w // 1024)))


@cache
def _backward_config(width: int, bytes_per_element: int, device: torch.device) -> _Config:
    """`bytes_per_element`: of all tensors that a tile is loaded from, together."""
    block_w = triton.next_power_of_2(width)
    tile, programs = (4096, 2) if block_w <= 2048 else (8192, 1)
    block_r = max(1, tile // block_w)
    # All stages but the one in use wait in shared memory, which other GPUs have less of.
    room = shared_memory(device) // (programs * block_r * block_w * bytes_per_element)
    return _Config(
        block_r, block_w, 4 if block_w <= 1024 else min(32, max(8, block_w // 1024)), programs, min(3, 1 + room)
    )


Layout = tuple[int, ...]  # the strides of a tensor


def _row_strides(shape: torch.Size, *layouts: Layout) -> tuple[bool, list[int], tuple[int, int]]:
    """How the kernels find rows: whether at one stride in each tensor, all strides, and the inner row dimensions."""
    flat = [row_stride(shape, layout) for layout in layouts]
    if None not in flat:
        return True, [stride for row in flat for stride in (0, 0, row)], (1, 1)  # type: ignore[misc]
    padding = (0,) * (4 - len(shape))
    return False, [s for layout in layouts for s in (*padding, *layout[:-1])], ((1, 1, *shape)[-3], shape[-2])


# Everything about a launch that shapes, strides and dtypes decide, looked up by them: `Launch` says why.


@lru_cache(MAX_LAUNCHES)
def _forward_launch(
    shape: torch.Size, x: Layout, y: Layout, device: torch.device, dtypes: Any, has_residual: bool
) -> Launch:
    width, n_rows = shape[-1], shape[:-1].numel()
    config = _forward_config(width)
    flat, strides, inner = _row_strides(shape, x, y)
    return Launch(
        _forward_kernel, triton.cdiv(n_rows, config.block_r), n_rows, *inner, *strides,
        width, config.block_r, config.block_w, has_residual, flat, num_warps=config.warps,
    )  # fmt: skip


@lru_cache(MAX_LAUNCHES)
def _backward_launch(
    shape: torch.Size, gy: Layout, h: Layout, dx: Layout, device: torch.device, dtypes: Any, loaded: int,
    has_gh: bool, need_dw: bool,
) -> Launch:  # fmt: skip
    width, n_rows = shape[-1], shape[:-1].numel()
    config = _backward_config(width, loaded, device)
    flat, strides, inner = _row_strides(shape, gy, h, dx)
    programs = min(triton.cdiv(n_rows, config.block_r), config.programs * multiprocessors(device))
    return Launch(
        _backward_kernel, programs, n_rows, *inner, *strides,
        width, config.block_r, config.block_w, has_gh, need_dw, flat, config.stages, num_warps=config.warps,
    )  # fmt: skip


@lru_cache(MAX_LAUNCHES)
def _sum_launch(n_shares: int, width: int, device: torch.device, dtype: torch.dtype) -> Launch:
    block_s = min(256, triton.next_power_of_2(n_shares))
    return Launch(_sum_shares_kernel, triton.cdiv(width, 32), n_shares, width, block_s, 32, num_warps=8)


def sum_shares(shares: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Column sums of `shares` (P, W) float32 into `out` (W,) of any dtype, in a fixed order."""
    _sum_launch(*shares.shape, out.device, out.dtype)((shares, out))
    return out


def _backward_fake(
    gy: torch.Tensor,
    gh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_rows_like(h), torch.empty_like(weight) if need_dw else weight.new_empty(0)


@kernel_op(
    "rms_norm_backward(Tensor gy, Tensor? gh, Tensor h, Tensor weight, Tensor rstd, float offset, bool need_dw)"
    " -> (Tensor, Tensor)",
    _backward_fake,
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
    dx = empty_rows_like(h)
    loaded = gy.element_size() + h.element_size() + (gh.element_size() if gh is not None else 0)
    launch = _backward_launch(
        h.shape, gy.stride(), h.stride(), dx.stride(), h.device, (gy.dtype, h.dtype, weight.dtype), loaded,
        gh is not None, need_dw,
    )  # fmt: skip
    shares = torch.empty(launch.grid if need_dw else 0, h.shape[-1], device=h.device, dtype=torch.float32)
    LAUNCHES["rms_norm_backward"] += 1
    launch((gy, gh, h, weight, rstd, dx, shares), offset)
    return dx, sum_shares(shares, torch.empty_like(weight)) if need_dw else weight.new_empty(0)


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


def _fake(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float) -> Any:
    h = empty_rows_like(x) if residual is not None else x.new_empty(0)
    return empty_rows_like(x), h, torch.empty(x.shape[:-1].numel(), device=x.device, dtype=torch.float32)


@kernel_op(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    aside=(2,),
)
def _op(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float) -> Any:
    y = empty_rows_like(x)
    h = empty_rows_like(x) if residual is not None else x.new_empty(0)
    rstd = torch.empty(x.shape[:-1].numel(), device=x.device, dtype=torch.float32)
    launch = _forward_launch(x.shape, x.stride(), y.stride(), x.device, (x.dtype, weight.dtype), residual is not None)
    LAUNCHES["rms_norm"] += 1
    launch((x, residual, weight, y, h, rstd), eps, offset)
    return y, h, rstd


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
        TypeError: x is not floating-point.
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
        require_floating("rms_norm", x=x)
        return rms_norm_reference(x, weight, eps, offset, residual)
    shape = x.shape
    if residual is not None:
        x, residual = x.contiguous(), residual.contiguous()
    x = unit_last_stride(x)
    if x.dim() > 4:
        x = x.reshape(-1, shape[-1])
        residual = residual.reshape(-1, shape[-1]) if residual is not None else None
    y, h, _ = _op(x, residual, weight.contiguous(), float(eps), float(offset))
    if y.shape != shape:
        y, h = y.view(shape), h.view(shape) if residual is not None else h
    return y if residual is None else (y, h)
