"""The gated activation between LoRA linears: what the adapters around it add, inside its own two passes.

    gate = gate_base + s_g h_g B_g^T,   up = up_base + s_u h_u B_u^T,   product = act(gate) * up,   h_d = product A_d^T

A GEMM that adds h B^T to a wide output reads and writes all of it for an inner dimension of a few dozen, and each
gradient of B or A reads a wide tensor once more: for Qwen2.5-0.5B's MLP at 16k tokens 0.9 ms a layer beside GEMMs of
1.2 ms (docs/results/lora_kernels_h100.txt). The activation's kernels hold every element of these tensors anyway, so
the rank-sized products are made there on the tensor cores:

* forward: gate and up keep their base values in memory, and are completed on the way into the activation, again so in
  the backward pass; the down adapter's h_d is summed up on the way out.
* backward: d_product gets the down adapter's g_d A_d on the way in; dB_g, dB_u and dA_d are summed up on the way out.
  The product itself is neither kept nor made. With dropout before the down adapter both passes read its mask.

The forward kernel owns rows, since h_d sums over columns; the backward kernel columns, since dB and dA sum over rows.
Each sum is made in float32, in shares that are added up in a fixed order: the results are the same in every run.

Rounding: eager rounds the adapter's output and then the sum; here the sum goes on in float32. The gradients enter the
sums in the dtype in which they are stored, as in eager.

Legend: M tokens, I intermediate size, R rank. S shares.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._common import LAUNCHES, MAX_LAUNCHES, Launch, jit, tl
from ._gated_mlp import _activation
from ._low_rank import (
    Dropped,
    Factors,
    add_up,
    dot,
    factor,
    padded_rank,
    split_columns,
    split_rows,
    tiled_launch,
    wide_factor,
)

# Rows and columns of a tile, warps and pipeline stages; programs for each multiprocessor. The fastest of some hundred
# on an H100, at rank 32, 16384 x 4864 and 8192 x 18944 (docs/results/lora_kernels_h100.txt).
_FORWARD = {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 3, "num_warps": 4}
_BACKWARD = {"BLOCK_M": 32, "BLOCK_N": 64, "STAGES": 3, "num_warps": 8}
_FORWARD_PROGRAMS, _BACKWARD_PROGRAMS = 2, 8


# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    gate_ptr, up_ptr, hg_ptr, hu_ptr, bg_ptr, bu_ptr, a_ptr, mask_ptr, out_ptr, hd_ptr, scale_g, scale_u, scale_m,
    n_rows, n_cols, gate_stride, up_stride, hg_stride, hu_stride, bg_stride, bu_stride, a_stride,
    rank_g, rank_u, rank_d, n_shares, share_cols,
    GELU: tl.constexpr, HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_D: tl.constexpr, HAS_M: tl.constexpr,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % n_shares
    row = (tl.program_id(0) // n_shares) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.cast(row, tl.int64)[:, None]
    if HAS_G:
        hg = factor(hg_ptr, row, n_rows, hg_stride, rank_g, R)
    if HAS_U:
        hu = factor(hu_ptr, row, n_rows, hu_stride, rank_u, R)
    zero = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    total = tl.zeros([BLOCK_M, R], dtype=tl.float32)
    first = share * share_cols
    for start in tl.range(first, tl.minimum(first + share_cols, n_cols), BLOCK_N, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK_N)
        mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
        gate = tl.load(gate_ptr + at * gate_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at * up_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_G:
            gate += scale_g * dot(hg, tl.trans(factor(bg_ptr, col, n_cols, bg_stride, rank_g, R)), zero)
        if HAS_U:
            up += scale_u * dot(hu, tl.trans(factor(bu_ptr, col, n_cols, bu_stride, rank_u, R)), zero)
        value, _ = _activation(gate, GELU)
        product = (value * up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at * n_cols + col[None, :], product, mask=mask)
        if HAS_M:
            kept = tl.load(mask_ptr + at * n_cols + col[None, :], mask=mask, other=0)
            product = tl.where(kept != 0, product, 0.0).to(product.dtype)
        if HAS_D:
            total = dot(product, tl.trans(wide_factor(a_ptr, col, n_cols, a_stride, rank_d, R)), total)
    if HAS_D:
        r = tl.arange(0, R)
        into = hd_ptr + (tl.cast(share, tl.int64) * n_rows + at) * rank_d + r[None, :]
        tl.store(into, scale_m * total, mask=(row < n_rows)[:, None] & (r < rank_d)[None, :])


@jit
def _backward_kernel(
    grad_ptr, gate_ptr, up_ptr, hg_ptr, hu_ptr, gd_ptr, bg_ptr, bu_ptr, a_ptr, mask_ptr, dgate_ptr, dup_ptr, share_ptr,
    scale_g, scale_u, scale_m,
    n_rows, n_cols, grad_stride, gate_stride, up_stride, hg_stride, hu_stride, gd_stride, bg_stride, bu_stride,
    a_stride, d_stride, rank_g, rank_u, rank_d, n_shares,
    GELU: tl.constexpr, HAS_G: tl.constexpr, HAS_U: tl.constexpr, HAS_D: tl.constexpr, HAS_M: tl.constexpr,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % n_shares
    col = (tl.program_id(0) // n_shares) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_G:
        bg = tl.trans(factor(bg_ptr, col, n_cols, bg_stride, rank_g, R))
    if HAS_U:
        bu = tl.trans(factor(bu_ptr, col, n_cols, bu_stride, rank_u, R))
    if HAS_D:
        a = wide_factor(a_ptr, col, n_cols, a_stride, rank_d, R)
    zero = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    d_bg = tl.zeros([BLOCK_N, R], dtype=tl.float32)
    d_bu = tl.zeros([BLOCK_N, R], dtype=tl.float32)
    d_a = tl.zeros([BLOCK_N, R], dtype=tl.float32)
    for tile in tl.range(share, tl.cdiv(n_rows, BLOCK_M), n_shares, num_stages=STAGES):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        at = tl.cast(row, tl.int64)[:, None]
        mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
        grad = tl.load(grad_ptr + at * grad_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at * gate_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at * up_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_G:
            hg = factor(hg_ptr, row, n_rows, hg_stride, rank_g, R)
            gate += scale_g * dot(hg, bg, zero)
        if HAS_U:
            hu = factor(hu_ptr, row, n_rows, hu_stride, rank_u, R)
            up += scale_u * dot(hu, bu, zero)
        if HAS_D:
            gd = factor(gd_ptr, row, n_rows, gd_stride, rank_d, R)
            if HAS_M:
                kept = tl.load(mask_ptr + at * n_cols + col[None, :], mask=mask, other=0)
                grad += tl.where(kept != 0, scale_m * dot(gd, a, zero), 0.0)
            else:
                grad = dot(gd, a, grad)
        value, slope = _activation(gate, GELU)
        d_gate = (grad * up * slope).to(dgate_ptr.dtype.element_ty)
        d_up = (grad * value).to(dup_ptr.dtype.element_ty)
        tl.store(dgate_ptr + at * d_stride + col[None, :], d_gate, mask=mask)
        tl.store(dup_ptr + at * d_stride + col[None, :], d_up, mask=mask)
        if HAS_G:
            d_bg = dot(tl.trans(d_gate), hg, d_bg)
        if HAS_U:
            d_bu = dot(tl.trans(d_up), hu, d_bu)
        if HAS_D:
            product = (value * up).to(dgate_ptr.dtype.element_ty)
            if HAS_M:
                product = tl.where(kept != 0, product, 0.0).to(product.dtype)
            d_a = dot(tl.trans(product), gd, d_a)
    r = tl.arange(0, R)
    into = share_ptr + (tl.cast(share, tl.int64) * 3 * n_cols + col[:, None]) * R + r[None, :]
    mask = (col < n_cols)[:, None] & (r < R)[None, :]
    if HAS_G:
        tl.store(into, scale_g * d_bg, mask=mask)
    if HAS_U:
        tl.store(into + tl.cast(n_cols, tl.int64) * R, scale_u * d_bu, mask=mask)
    if HAS_D:
        tl.store(into + tl.cast(n_cols, tl.int64) * 2 * R, scale_m * d_a, mask=mask)


# -- launches --------------------------------------------------------------------------------------------------------


@lru_cache(MAX_LAUNCHES)
def _forward_launch(
    shape: torch.Size, strides: tuple[int, ...], ranks: tuple[int, ...], device: torch.device, dtypes: Any, gelu: bool,
    has: tuple[bool, ...],
) -> tuple[Launch, int]:  # fmt: skip
    grid, n_shares, share_cols = split_rows(shape, _FORWARD, _FORWARD_PROGRAMS, device)
    fixed = (*shape, *strides, *ranks, n_shares, share_cols, gelu, *has, padded_rank(ranks))
    return tiled_launch(_forward_kernel, grid, fixed, _FORWARD), n_shares


@lru_cache(MAX_LAUNCHES)
def _backward_launch(
    shape: torch.Size, strides: tuple[int, ...], ranks: tuple[int, ...], device: torch.device, dtypes: Any, gelu: bool,
    has: tuple[bool, ...],
) -> tuple[Launch, int]:  # fmt: skip
    grid, n_shares = split_columns(shape, _BACKWARD, _BACKWARD_PROGRAMS, device)
    fixed = (*shape, *strides, *ranks, n_shares, gelu, *has, padded_rank(ranks))
    return tiled_launch(_backward_kernel, grid, fixed, _BACKWARD), n_shares


def _stride(factors: Factors | None) -> tuple[int, int]:
    """Row strides of left and right."""
    return (0, 0) if factors is None else (factors.left.stride(0), factors.right.stride(0))


def _rank(factors: Factors | None) -> int:
    return 0 if factors is None else factors.left.shape[1]


def forward(
    gate: Tensor, up: Tensor, inner: tuple[Factors | None, Factors | None], a_down: Tensor | None, gelu: bool,
    dropped: Dropped | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The product and the down adapter's ``D product A^T``.

    Args:
        gate, up: (M, I), what the base layers give; rows at one stride, elements side by side; not empty.
        inner: h (M, R), B (I, R) and scale of gate's adapter and of up's; None for a layer without.
        a_down: (R, I), contiguous; None without an adapter on down.
        dropped: what dropout lets through to that adapter; None without dropout.

    Returns:
        (M, I) contiguous; (M, R) or None; both in gate's dtype.
    """
    (g, u), shape = inner, gate.shape
    ranks = (_rank(g), _rank(u), 0 if a_down is None else a_down.shape[0])
    (hg_stride, bg_stride), (hu_stride, bu_stride) = _stride(g), _stride(u)
    a_stride = 0 if a_down is None else a_down.stride(0)
    strides = (gate.stride(0), up.stride(0), hg_stride, hu_stride, bg_stride, bu_stride, a_stride)
    has = (g is not None, u is not None, a_down is not None, dropped is not None)
    launch, n_shares = _forward_launch(shape, strides, ranks, gate.device, gate.dtype, gelu, has)
    out = torch.empty(shape, device=gate.device, dtype=gate.dtype)
    h_shares = None
    if a_down is not None:
        h_shares = torch.empty(n_shares, shape[0], ranks[2], device=gate.device, dtype=torch.float32)
    mask, missing = dropped or (None, 1.0)
    LAUNCHES["lora_gated"] += 1
    launch(
        (gate, up, g and g.left, u and u.left, g and g.right, u and u.right, a_down, mask, out, h_shares),
        *(1.0 if f is None else f.scale for f in inner),
        missing,
    )
    return out, None if h_shares is None else add_up(h_shares).to(gate.dtype)


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, inner: tuple[Factors | None, Factors | None], down: Factors | None,
    gelu: bool, d_gate: Tensor, d_up: Tensor, dropped: Dropped | None = None,
) -> tuple[tuple[Tensor | None, Tensor | None], Tensor | None]:  # fmt: skip
    """Gradients of what `forward` computes: writes those of gate and up, gives those of the adapters.

    Args:
        grad: (M, I), the base layer's part of the product's gradient.
        gate, up, inner, dropped: as `forward` took them.
        down: g = scale dy B (M, R) and A (R, I), contiguous; None as in `forward`.
        d_gate, d_up: (M, I) to be written, rows at one stride, the same for both; d_gate may be `grad`.

    Returns:
        dB (I, R) of gate's and up's adapter, and dA (R, I) of down's, float32; None for those that are not there.
    """
    (g, u), shape = inner, gate.shape
    ranks = (_rank(g), _rank(u), _rank(down))
    (hg_stride, bg_stride), (hu_stride, bu_stride), (gd_stride, a_stride) = _stride(g), _stride(u), _stride(down)
    strides = (
        grad.stride(0), gate.stride(0), up.stride(0), hg_stride, hu_stride, gd_stride, bg_stride, bu_stride, a_stride,
        d_gate.stride(0),
    )  # fmt: skip
    assert d_gate.stride() == d_up.stride()
    has = (g is not None, u is not None, down is not None, dropped is not None)
    launch, n_shares = _backward_launch(shape, strides, ranks, gate.device, gate.dtype, gelu, has)
    shares = torch.empty(n_shares, 3, shape[1], padded_rank(ranks), device=gate.device, dtype=torch.float32)
    mask, missing = dropped or (None, 1.0)
    LAUNCHES["lora_gated_backward"] += 1
    launch(
        (grad, gate, up, g and g.left, u and u.left, down and down.left, g and g.right, u and u.right,
         down and down.right, mask, d_gate, d_up, shares),
        *(1.0 if f is None else f.scale for f in inner),
        missing,
    )  # fmt: skip
    sums = add_up(shares)
    d_bg, d_bu = (None if f is None else sums[i, :, : _rank(f)] for i, f in enumerate(inner))
    return (d_bg, d_bu), None if down is None else sums[2, :, : _rank(down)].t()
