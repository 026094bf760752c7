"""Adapters that read the same input through dropout, in two kernels: their h, and their part of dx and dA.

    h_i = D_i x A_i^T,      dx += sum over i of D_i (g_i A_i),      dA_i = g_i^T (D_i x)

Each adapter draws a mask of its own, so their A's cannot share a GEMM, and made one by one each of these costs a
dropped copy of x or a full-size product, written and read again. Here x, dx and the masks, a byte an element, are read
once for all adapters, and the rank-sized products are made on the tensor cores. Sums as in `_lora_gated.py`.

Legend: N tokens, I in features, R rank, S shares; up to three adapters (q, k and v).
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._common import LAUNCHES, MAX_LAUNCHES, Launch, jit, tl
from ._low_rank import Dropped, add_up, dot, factor, padded_rank, split_columns, split_rows, tiled_launch, wide_factor

MAX_ADAPTERS = 3

# Rows and columns of a tile, warps and pipeline stages; programs for each multiprocessor.
_READ = {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 3, "num_warps": 4}
_GRADIENTS = {"BLOCK_M": 32, "BLOCK_N": 64, "STAGES": 3, "num_warps": 8}
_READ_PROGRAMS, _GRADIENTS_PROGRAMS = 2, 4
# The same for one adapter of a small rank, whose factors leave room: the best of a sweep on an H100, on 8,192 rows of
# 18,944 (gradients 0.44 against 1.0 ms) and 16,384 of 896 (docs/results/lora_dropout_tiles_h100.txt).
_READ_ONE = {"BLOCK_M": 64, "BLOCK_N": 128, "STAGES": 3, "num_warps": 4}
_GRADIENTS_ONE = {"BLOCK_M": 64, "BLOCK_N": 128, "STAGES": 2, "num_warps": 4}
_READ_ONE_PROGRAMS, _GRADIENTS_ONE_PROGRAMS = 2, 8
_SMALL_RANK = 32


# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _read_one(x, mask_ptr, a_ptr, at, col, mask, n_cols, a_stride, rank, total, R: tl.constexpr):
    """`total` plus (D x) A^T of one tile."""
    kept = tl.load(mask_ptr + at * n_cols + col[None, :], mask=mask, other=0)
    a = wide_factor(a_ptr, col, n_cols, a_stride, rank, R)
    return dot(tl.where(kept != 0, x, 0.0).to(x.dtype), tl.trans(a), total)


@jit
def _store_h(h_ptr, share, row, n_rows, rank, total, R: tl.constexpr):
    r = tl.arange(0, R)
    at = tl.cast(share, tl.int64) * n_rows + tl.cast(row, tl.int64)
    tl.store(h_ptr + at[:, None] * rank + r[None, :], total, mask=(row < n_rows)[:, None] & (r < rank)[None, :])


@jit
def _read_kernel(
    x_ptr, m0_ptr, m1_ptr, m2_ptr, a0_ptr, a1_ptr, a2_ptr, h0_ptr, h1_ptr, h2_ptr, missing0, missing1, missing2,
    n_rows, n_cols, x_stride, a0_stride, a1_stride, a2_stride, rank0, rank1, rank2, n_shares, share_cols,
    COUNT: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % n_shares
    row = (tl.program_id(0) // n_shares) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.cast(row, tl.int64)[:, None]
    h0 = tl.zeros([BLOCK_M, R], dtype=tl.float32)
    h1 = tl.zeros([BLOCK_M, R], dtype=tl.float32)
    h2 = tl.zeros([BLOCK_M, R], dtype=tl.float32)
    first = share * share_cols
    for start in tl.range(first, tl.minimum(first + share_cols, n_cols), BLOCK_N, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK_N)
        mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
        x = tl.load(x_ptr + at * x_stride + col[None, :], mask=mask, other=0.0)
        h0 = _read_one(x, m0_ptr, a0_ptr, at, col, mask, n_cols, a0_stride, rank0, h0, R)
        if COUNT > 1:
            h1 = _read_one(x, m1_ptr, a1_ptr, at, col, mask, n_cols, a1_stride, rank1, h1, R)
        if COUNT > 2:
            h2 = _read_one(x, m2_ptr, a2_ptr, at, col, mask, n_cols, a2_stride, rank2, h2, R)
    _store_h(h0_ptr, share, row, n_rows, rank0, missing0 * h0, R)
    if COUNT > 1:
        _store_h(h1_ptr, share, row, n_rows, rank1, missing1 * h1, R)
    if COUNT > 2:
        _store_h(h2_ptr, share, row, n_rows, rank2, missing2 * h2, R)


@jit
def _gradients_of_one(
    x, d_x, mask_ptr, g_ptr, a, missing, at, row, col, mask, n_rows, n_cols, g_stride, rank, d_a, R: tl.constexpr
):
    """`d_x` plus D (g A), and `d_a` plus (D x)^T g, of one tile."""
    kept = tl.load(mask_ptr + at * n_cols + col[None, :], mask=mask, other=0) != 0
    g = factor(g_ptr, row, n_rows, g_stride, rank, R)
    d_x += tl.where(kept, missing * dot(g, a, tl.zeros_like(d_x)), 0.0)
    return d_x, dot(tl.trans(tl.where(kept, x, 0.0).to(x.dtype)), g, d_a)


@jit
def _gradients_kernel(
    x_ptr, dx_ptr, m0_ptr, m1_ptr, m2_ptr, g0_ptr, g1_ptr, g2_ptr, a0_ptr, a1_ptr, a2_ptr, share_ptr,
    missing0, missing1, missing2,
    n_rows, n_cols, x_stride, dx_stride, g0_stride, g1_stride, g2_stride, a0_stride, a1_stride, a2_stride,
    rank0, rank1, rank2, n_shares,
    COUNT: tl.constexpr, HAS_DX: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % n_shares
    col = (tl.program_id(0) // n_shares) * BLOCK_N + tl.arange(0, BLOCK_N)
    a0 = wide_factor(a0_ptr, col, n_cols, a0_stride, rank0, R)
    if COUNT > 1:
        a1 = wide_factor(a1_ptr, col, n_cols, a1_stride, rank1, R)
    if COUNT > 2:
        a2 = wide_factor(a2_ptr, col, n_cols, a2_stride, rank2, R)
    d_a0 = tl.zeros([BLOCK_N, R], dtype=tl.float32)
    d_a1 = tl.zeros([BLOCK_N, R], dtype=tl.float32)
    d_a2 = tl.zeros([BLOCK_N, R], dtype=tl.float32)
    for tile in tl.range(share, tl.cdiv(n_rows, BLOCK_M), n_shares, num_stages=STAGES):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        at = tl.cast(row, tl.int64)[:, None]
        mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
        x = tl.load(x_ptr + at * x_stride + col[None, :], mask=mask, other=0.0)
        d_x = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if HAS_DX:
            d_x = tl.load(dx_ptr + at * dx_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        d_x, d_a0 = _gradients_of_one(
            x, d_x, m0_ptr, g0_ptr, a0, missing0, at, row, col, mask, n_rows, n_cols, g0_stride, rank0, d_a0, R
        )
        if COUNT > 1:
            d_x, d_a1 = _gradients_of_one(
                x, d_x, m1_ptr, g1_ptr, a1, missing1, at, row, col, mask, n_rows, n_cols, g1_stride, rank1, d_a1, R
            )
        if COUNT > 2:
            d_x, d_a2 = _gradients_of_one(
                x, d_x, m2_ptr, g2_ptr, a2, missing2, at, row, col, mask, n_rows, n_cols, g2_stride, rank2, d_a2, R
            )
        if HAS_DX:  # each element of which this program alone has read
            tl.store(dx_ptr + at * dx_stride + col[None, :], d_x.to(dx_ptr.dtype.element_ty), mask=mask)
    r = tl.arange(0, R)
    into = share_ptr + (tl.cast(share, tl.int64) * COUNT * n_cols + col[:, None]) * R + r[None, :]
    mask = (col < n_cols)[:, None] & (r < R)[None, :]
    tl.store(into, missing0 * d_a0, mask=mask)
    if COUNT > 1:
        tl.store(into + tl.cast(n_cols, tl.int64) * R, missing1 * d_a1, mask=mask)
    if COUNT > 2:
        tl.store(into + tl.cast(n_cols, tl.int64) * 2 * R, missing2 * d_a2, mask=mask)


# -- launches --------------------------------------------------------------------------------------------------------


@lru_cache(MAX_LAUNCHES)
def _read_launch(
    shape: torch.Size, strides: tuple[int, ...], ranks: tuple[int, ...], count: int, device: torch.device, dtype: Any
) -> tuple[Launch, int]:
    one = _is_small(count, ranks)
    tile, programs = (_READ_ONE, _READ_ONE_PROGRAMS) if one else (_READ, _READ_PROGRAMS)
    grid, n_shares, share_cols = split_rows(shape, tile, programs, device)
    fixed = (*shape, *strides, *ranks, n_shares, share_cols, count, padded_rank(ranks))
    return tiled_launch(_read_kernel, grid, fixed, tile), n_shares


@lru_cache(MAX_LAUNCHES)
def _gradients_launch(
    shape: torch.Size, strides: tuple[int, ...], ranks: tuple[int, ...], count: int, has_dx: bool,
    device: torch.device, dtype: Any,
) -> tuple[Launch, int]:  # fmt: skip
    one = _is_small(count, ranks)
    tile, programs = (_GRADIENTS_ONE, _GRADIENTS_ONE_PROGRAMS) if one else (_GRADIENTS, _GRADIENTS_PROGRAMS)
    grid, n_shares = split_columns(shape, tile, programs, device)
    fixed = (*shape, *strides, *ranks, n_shares, count, has_dx, padded_rank(ranks))
    return tiled_launch(_gradients_kernel, grid, fixed, tile), n_shares


def _is_small(count: int, ranks: tuple[int, ...]) -> bool:
    return count == 1 and padded_rank(ranks) <= _SMALL_RANK


def _filled(values: Sequence[Any], filling: Any) -> tuple[Any, ...]:
    return (*values, *[filling] * (MAX_ADAPTERS - len(values)))


def read(x: Tensor, dropped: Sequence[Dropped], a: Sequence[Tensor]) -> list[Tensor]:
    """``D_i x A_i^T`` of each adapter.

    Args:
        x: (N, I), rows at one stride, elements side by side; not empty.
        dropped, a: of one to three adapters; A (R_i, I), contiguous, in x's dtype.

    Returns:
        (N, R_i) each, in x's dtype.
    """
    ranks = _filled([t.shape[0] for t in a], 0)
    strides = (x.stride(0), *_filled([t.stride(0) for t in a], 0))
    launch, n_shares = _read_launch(x.shape, strides, ranks, len(a), x.device, x.dtype)
    shares = [torch.empty(n_shares, x.shape[0], t.shape[0], device=x.device, dtype=torch.float32) for t in a]
    LAUNCHES["lora_dropout"] += 1
    masks, missing = _filled([d.mask for d in dropped], None), _filled([d.missing for d in dropped], 1.0)
    launch((x, *masks, *_filled(a, None), *_filled(shares, None)), *missing)
    return [add_up(share).to(x.dtype) for share in shares]


def gradients(
    x: Tensor, d_x: Tensor | None, dropped: Sequence[Dropped], g: Sequence[Tensor], a: Sequence[Tensor]
) -> list[Tensor]:
    """Add ``D_i (g_i A_i)`` of each adapter to `d_x`, if given; return ``g_i^T (D_i x)`` (R_i, I), float32.

    Args:
        x, dropped, a: as `read` took them.
        d_x: (N, I), rows at one stride, elements side by side.
        g: (N, R_i), rows at one stride.
    """
    ranks = _filled([t.shape[0] for t in a], 0)
    strides = (
        x.stride(0), 0 if d_x is None else d_x.stride(0),
        *_filled([t.stride(0) for t in g], 0), *_filled([t.stride(0) for t in a], 0),
    )  # fmt: skip
    launch, n_shares = _gradients_launch(x.shape, strides, ranks, len(a), d_x is not None, x.device, x.dtype)
    shares = torch.empty(n_shares, len(a), x.shape[1], padded_rank(ranks), device=x.device, dtype=torch.float32)
    LAUNCHES["lora_dropout_backward"] += 1
    masks, missing = _filled([d.mask for d in dropped], None), _filled([d.missing for d in dropped], 1.0)
    launch((x, d_x, *masks, *_filled(g, None), *_filled(a, None), shares), *missing)
    sums = add_up(shares)
    return [sums[i, :, : t.shape[0]].t() for i, t in enumerate(a)]
