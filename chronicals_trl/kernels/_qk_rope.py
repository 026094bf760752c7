"""Rotary position embedding of queries and keys in one launch, behind a per-head RMSNorm where the model has one.

Sources: Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-rotation layout of transformers' Llama; the norm
in front is that of Qwen3 and Gemma 3. With x = [x1, x2] the halves of the first R of D head dimensions, and
cos = [c1, c2], sin = [s1, s2] likewise,

    y1 = x1 c1 - x2 s1,    y2 = x2 c2 + x1 s2,    the other D - R dimensions pass through.

The backward pass applies the transpose: dx1 = g1 c1 + g2 s2, dx2 = g2 c2 - g1 s1. Nothing but cos and sin is kept.
With the norm, x = q / rms(q) * (offset + w) over all D dimensions, and q is kept too; its backward formula is that of
`_rms_norm.py`, on dx.

Shapes: q (B, Hq, S, D), k (B, Hk, S, D), cos and sin (B or 1, S, R), norm weights (D,). Models hand over transposed
(B, S, heads, D) views; they are read by stride, and the results keep that layout, which packed attention can flatten
without a copy. Inside the kernels: T tokens, H heads, C = R / 2 columns of a half, P columns that pass through.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from functools import lru_cache
from typing import Any, NamedTuple

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
    tl,
    triton,
    unit_last_stride,
    use_triton,
)
from ._rms_norm import rms_norm_reference, sum_shares


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    compute = math_dtype(x.dtype)
    rotary_dim = cos.shape[-1]
    x1, x2 = x[..., :rotary_dim].to(compute).chunk(2, dim=-1)
    c1, c2 = cos.to(compute).unsqueeze(1).chunk(2, dim=-1)
    s1, s2 = sin.to(compute).unsqueeze(1).chunk(2, dim=-1)
    rotated = torch.cat([x1 * c1 - x2 * s1, x2 * c2 + x1 * s2], dim=-1).to(x.dtype)
    return torch.cat([rotated, x[..., rotary_dim:]], dim=-1) if rotary_dim < x.shape[-1] else rotated


def qk_rope_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`qk_rope` in differentiable torch code, for any device and floating dtype; cos and sin get gradients too."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def qk_norm_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`qk_norm_rope` in differentiable torch code; rounds once, as the kernel does."""
    compute = math_dtype(q.dtype)
    q_unit = rms_norm_reference(q.to(compute), q_weight, eps, offset)
    k_unit = rms_norm_reference(k.to(compute), k_weight, eps, offset)
    assert isinstance(q_unit, torch.Tensor) and isinstance(k_unit, torch.Tensor)
    return _rotate(q_unit, cos, sin).to(q.dtype), _rotate(k_unit, cos, sin).to(k.dtype)


# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _tables(cos_ptr, sin_ptr, b, s, cb, cs, sb, ss, col, mask, half, REPEATS: tl.constexpr):
    """Both halves of cos and sin, (T, C) each."""
    cos_row = cos_ptr + (b * cb + s * cs)[:, None] + col[None, :]
    sin_row = sin_ptr + (b * sb + s * ss)[:, None] + col[None, :]
    c1 = tl.load(cos_row, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin_row, mask=mask, other=0.0).to(tl.float32)
    c2, s2 = c1, s1
    if not REPEATS:
        c2 = tl.load(cos_row + half, mask=mask, other=0.0).to(tl.float32)
        s2 = tl.load(sin_row + half, mask=mask, other=0.0).to(tl.float32)
    return c1[:, None, :], c2[:, None, :], s1[:, None, :], s2[:, None, :]


@jit
def _rotated(x1, x2, c1, c2, s1, s2, TRANSPOSE: tl.constexpr):
    if TRANSPOSE:
        return x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    return x1 * c1 - x2 * s1, x2 * c2 + x1 * s2


@jit
def _kernel(
    q_ptr, k_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, qo_ptr, ko_ptr, eps, offset, n_tokens, seq_len, n_q, n_k,
    qb, qh, qs, kb, kh, ks, qob, qoh, qos, kob, koh, kos, cb, cs, sb, ss,
    half: tl.constexpr, head_dim: tl.constexpr, NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, TRANSPOSE: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    # The heads of q and k are numbered through and a program takes a few of a few tokens: all of its loads are in
    # flight at once, and neighbouring programs find cos and sin in the cache.
    blocks = tl.cdiv(n_q + n_k, BLOCK_H)
    token = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    col = tl.arange(0, BLOCK_C)
    live = token < n_tokens
    b = token // seq_len
    s = token % seq_len
    of_q = head < n_q
    of_k = (head - n_q).to(tl.int64)
    head = head.to(tl.int64)
    inside = live[:, None, None] & (head < n_q + n_k)[None, :, None]
    mask = inside & (col < half)[None, None, :]
    q_at = (b * qb + s * qs)[:, None, None] + head[None, :, None] * qh
    k_at = (b * kb + s * ks)[:, None, None] + of_k[None, :, None] * kh
    x_row = tl.where(of_q[None, :, None], q_ptr + q_at, k_ptr + k_at)
    c1, c2, s1, s2 = _tables(
        cos_ptr, sin_ptr, b, s, cb, cs, sb, ss, col, live[:, None] & (col < half)[None, :], half, REPEATS
    )
    x1 = tl.load(x_row + col[None, None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_row + half + col[None, None, :], mask=mask, other=0.0).to(tl.float32)
    if BLOCK_P > 0:
        rest = 2 * half + tl.arange(0, BLOCK_P)
        keep = inside & (rest < head_dim)[None, None, :]
        xp = tl.load(x_row + rest[None, None, :], mask=keep, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(x1 * x1 + x2 * x2, axis=2)
        if BLOCK_P > 0:
            square += tl.sum(xp * xp, axis=2)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(square / head_dim + eps))[:, :, None]
        weight_row = tl.where(of_q[:, None], qw_ptr + col[None, :], kw_ptr + col[None, :])
        w1 = tl.load(weight_row, mask=(col < half)[None, :], other=0.0).to(tl.float32) + offset
        w2 = tl.load(weight_row + half, mask=(col < half)[None, :], other=0.0).to(tl.float32) + offset
        x1 = x1 * rstd * w1[None, :, :]
        x2 = x2 * rstd * w2[None, :, :]
        if BLOCK_P > 0:
            weight_rest = tl.where(of_q[:, None], qw_ptr + rest[None, :], kw_ptr + rest[None, :])
            wp = tl.load(weight_rest, mask=(rest < head_dim)[None, :], other=0.0).to(tl.float32) + offset
            xp = xp * rstd * wp[None, :, :]
    y1, y2 = _rotated(x1, x2, c1, c2, s1, s2, TRANSPOSE)
    q_to = (b * qob + s * qos)[:, None, None] + head[None, :, None] * qoh
    k_to = (b * kob + s * kos)[:, None, None] + of_k[None, :, None] * koh
    y_row = tl.where(of_q[None, :, None], qo_ptr + q_to, ko_ptr + k_to)
    tl.store(y_row + col[None, None, :], y1.to(qo_ptr.dtype.element_ty), mask=mask)
    tl.store(y_row + half + col[None, None, :], y2.to(qo_ptr.dtype.element_ty), mask=mask)
    if BLOCK_P > 0:
        tl.store(y_row + rest[None, None, :], xp.to(qo_ptr.dtype.element_ty), mask=keep)


@jit
def _norm_backward_heads(
    g_ptr, x_ptr, d_ptr, weight_ptr, b, s, gb, gh, gs, xb, xh, xs, db, dh, ds, live, n_heads, c1, c2, s1, s2, eps,
    offset, dw1, dw2, dwp, half: tl.constexpr, head_dim: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of the heads of these tokens; returns the weight's, added to dw1, dw2 (C) and dwp (P)."""
    col = tl.arange(0, BLOCK_C)
    w1 = tl.load(weight_ptr + col, mask=col < half, other=0.0).to(tl.float32) + offset
    w2 = tl.load(weight_ptr + half + col, mask=col < half, other=0.0).to(tl.float32) + offset
    for first in range(0, n_heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        inside = live[:, None, None] & (head < n_heads)[None, :, None]
        mask = inside & (col < half)[None, None, :]
        at = head.to(tl.int64)[None, :, None]
        g_row = g_ptr + (b * gb + s * gs)[:, None, None] + at * gh
        x_row = x_ptr + (b * xb + s * xs)[:, None, None] + at * xh
        d_row = d_ptr + (b * db + s * ds)[:, None, None] + at * dh
        g1 = tl.load(g_row + col[None, None, :], mask=mask, other=0.0).to(tl.float32)
        g2 = tl.load(g_row + half + col[None, None, :], mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(x_row + col[None, None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_row + half + col[None, None, :], mask=mask, other=0.0).to(tl.float32)
        square = tl.sum(x1 * x1 + x2 * x2, axis=2)
        if BLOCK_P > 0:
            rest = 2 * half + tl.arange(0, BLOCK_P)
            keep = inside & (rest < head_dim)[None, None, :]
            gp = tl.load(g_row + rest[None, None, :], mask=keep, other=0.0).to(tl.float32)
            xp = tl.load(x_row + rest[None, None, :], mask=keep, other=0.0).to(tl.float32)
            wp = tl.load(weight_ptr + rest, mask=rest < head_dim, other=0.0).to(tl.float32) + offset
            square += tl.sum(xp * xp, axis=2)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(square / head_dim + eps))[:, :, None]
        g1, g2 = _rotated(g1, g2, c1, c2, s1, s2, True)
        x1 *= rstd
        x2 *= rstd
        along = tl.sum(g1 * w1[None, None, :] * x1 + g2 * w2[None, None, :] * x2, axis=2)
        if BLOCK_P > 0:
            xp *= rstd
            along += tl.sum(gp * wp[None, None, :] * xp, axis=2)
        along = (along / head_dim)[:, :, None]
        d1 = (g1 * w1[None, None, :] - x1 * along) * rstd
        d2 = (g2 * w2[None, None, :] - x2 * along) * rstd
        tl.store(d_row + col[None, None, :], d1.to(d_ptr.dtype.element_ty), mask=mask)
        tl.store(d_row + half + col[None, None, :], d2.to(d_ptr.dtype.element_ty), mask=mask)
        dw1 += tl.sum(tl.sum(g1 * x1, axis=0), axis=0)
        dw2 += tl.sum(tl.sum(g2 * x2, axis=0), axis=0)
        if BLOCK_P > 0:
            dp = (gp * wp[None, None, :] - xp * along) * rstd
            tl.store(d_row + rest[None, None, :], dp.to(d_ptr.dtype.element_ty), mask=keep)
            dwp += tl.sum(tl.sum(gp * xp, axis=0), axis=0)
    return dw1, dw2, dwp


@jit
def _store_share(share_ptr, dw1, dw2, dwp, half: tl.constexpr, head_dim: tl.constexpr, BLOCK_C: tl.constexpr,
                 BLOCK_P: tl.constexpr):  # fmt: skip
    col = tl.arange(0, BLOCK_C)
    tl.store(share_ptr + col, dw1, mask=col < half)
    tl.store(share_ptr + half + col, dw2, mask=col < half)
    if BLOCK_P > 0:
        rest = 2 * half + tl.arange(0, BLOCK_P)
        tl.store(share_ptr + rest, dwp, mask=rest < head_dim)


@jit
def _norm_backward_kernel(
    gq_ptr, gk_ptr, q_ptr, k_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, qs_ptr, ks_ptr,
    eps, offset, n_tokens, seq_len, n_q, n_k, gqb, gqh, gqs, gkb, gkh, gks, qb, qh, qs, kb, kh, ks,
    dqb, dqh, dqs, dkb, dkh, dks, cb, cs, sb, ss,
    half: tl.constexpr, head_dim: tl.constexpr, NEED_DW: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    REPEATS: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_C)
    qd1 = tl.zeros([BLOCK_C], dtype=tl.float32)
    qd2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    kd1 = tl.zeros([BLOCK_C], dtype=tl.float32)
    kd2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    qdp = tl.zeros([BLOCK_P if BLOCK_P > 0 else 1], dtype=tl.float32)
    kdp = tl.zeros([BLOCK_P if BLOCK_P > 0 else 1], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_tokens, BLOCK_T), tl.num_programs(0)):
        token = tl.cast(tile, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        live = token < n_tokens
        b = token // seq_len
        s = token % seq_len
        mask = live[:, None] & (col < half)[None, :]
        c1, c2, s1, s2 = _tables(cos_ptr, sin_ptr, b, s, cb, cs, sb, ss, col, mask, half, REPEATS)
        qd1, qd2, qdp = _norm_backward_heads(
            gq_ptr, q_ptr, dq_ptr, qw_ptr, b, s, gqb, gqh, gqs, qb, qh, qs, dqb, dqh, dqs, live, n_q, c1, c2, s1, s2,
            eps, offset, qd1, qd2, qdp, half, head_dim, BLOCK_Q, BLOCK_C, BLOCK_P,
        )  # fmt: skip
        kd1, kd2, kdp = _norm_backward_heads(
            gk_ptr, k_ptr, dk_ptr, kw_ptr, b, s, gkb, gkh, gks, kb, kh, ks, dkb, dkh, dks, live, n_k, c1, c2, s1, s2,
            eps, offset, kd1, kd2, kdp, half, head_dim, BLOCK_K, BLOCK_C, BLOCK_P,
        )  # fmt: skip
    if NEED_DW:
        share = tl.program_id(0).to(tl.int64) * head_dim
        _store_share(qs_ptr + share, qd1, qd2, qdp, half, head_dim, BLOCK_C, BLOCK_P)
        _store_share(ks_ptr + share, kd1, kd2, kdp, half, head_dim, BLOCK_C, BLOCK_P)


# -- launches --------------------------------------------------------------------------------------------------------


# One warp a program, few heads at a time: chosen on an H100 from some 30 combinations a head layout.
_WARPS = 1
_PAIRS, _NORM_PAIRS, _HEADS = 256, 512, 2
_BACKWARD_PROGRAMS = 8  # of the norm, for each multiprocessor


class _Blocks(NamedTuple):
    tokens: int
    heads: int
    columns: int
    rest: int


def _blocks(n_heads: int, half: int, head_dim: int, pairs: int) -> _Blocks:
    """A program's share of tokens, heads and columns: `pairs` rotated pairs together."""
    columns = triton.next_power_of_2(half)
    heads = min(triton.next_power_of_2(n_heads), _HEADS, max(1, pairs // columns))
    rest = triton.next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0
    return _Blocks(max(1, pairs // (columns * heads)), heads, columns, rest)


Layout = tuple[int, ...]  # the strides of a tensor


def _tables_of(cos: torch.Tensor, sin: torch.Tensor) -> Layout:
    """Batch and sequence strides of both; a table shared by the whole batch is read with batch stride 0."""
    return tuple(stride for t in (cos, sin) for stride in (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)))


# Everything about a launch that shapes, strides and dtypes decide, looked up by them: `Launch` says why.


@lru_cache(MAX_LAUNCHES)
def _forward_launch(
    shape: torch.Size, n_k: int, layouts: tuple[Layout, ...], tables: Layout, half: int, device: torch.device,
    dtypes: Any, norm: bool, transpose: bool, repeats: bool,
) -> Launch:  # fmt: skip
    batch, n_q, seq_len, head_dim = shape
    blocks = _blocks(n_q + n_k, half, head_dim, _NORM_PAIRS if norm else _PAIRS)
    programs = triton.cdiv(batch * seq_len, blocks.tokens) * triton.cdiv(n_q + n_k, blocks.heads)
    return Launch(
        _kernel, programs, batch * seq_len, seq_len, n_q, n_k,
        *(stride for layout in layouts for stride in layout[:3]), *tables,
        half, head_dim, norm, *blocks, transpose, repeats, num_warps=_WARPS,
    )  # fmt: skip


@lru_cache(MAX_LAUNCHES)
def _norm_backward_launch(
    shape: torch.Size, n_k: int, layouts: tuple[Layout, ...], tables: Layout, half: int, device: torch.device,
    dtypes: Any, need_dw: bool, repeats: bool,
) -> Launch:  # fmt: skip
    batch, n_q, seq_len, head_dim = shape
    tokens, heads, columns, rest = _blocks(max(n_q, n_k), half, head_dim, _NORM_PAIRS)
    heads_k = min(heads, triton.next_power_of_2(n_k))
    programs = min(triton.cdiv(batch * seq_len, tokens), _BACKWARD_PROGRAMS * multiprocessors(device))
    return Launch(
        _norm_backward_kernel, programs, batch * seq_len, seq_len, n_q, n_k,
        *(stride for layout in layouts for stride in layout[:3]), *tables,
        half, head_dim, need_dw, tokens, heads, heads_k, columns, rest, repeats, num_warps=_WARPS,
    )  # fmt: skip


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | tuple[None, None],
    eps: float,
    offset: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    transpose: bool,
    repeats: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = empty_rows_like(q), empty_rows_like(k)
    norm = weights[0] is not None
    launch = _forward_launch(
        q.shape, k.shape[1], tuple(t.stride() for t in (q, k, q_out, k_out)), _tables_of(cos, sin),
        cos.shape[-1] // 2, q.device, tuple(None if t is None else t.dtype for t in (q, k, *weights, cos, sin)),
        norm, transpose, repeats,
    )  # fmt: skip
    launch((q, k, *weights, cos, sin, q_out, k_out), eps, offset)
    return q_out, k_out


def _gradient(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if grad is None else unit_last_stride(grad)


# -- rotation alone --------------------------------------------------------------------------------------------------


def _fake(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool, repeats: bool
) -> Any:
    return empty_rows_like(q), empty_rows_like(k)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, cos, sin, ctx.transpose, ctx.repeats = inputs
    ctx.save_for_backward(cos, sin)
    ctx.meta = [(o.shape, o.dtype, o.device) for o in output]


def _backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
    cos, sin = ctx.saved_tensors
    gq, gk = (
        torch.zeros(shape, dtype=dtype, device=device) if g is None else unit_last_stride(g)
        for g, (shape, dtype, device) in zip(grads, ctx.meta, strict=True)
    )
    return (*_op(gq, gk, cos, sin, not ctx.transpose, ctx.repeats), None, None, None, None)


@kernel_op(
    "qk_rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transpose, bool repeats) -> (Tensor, Tensor)",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
def _op(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool, repeats: bool) -> Any:
    LAUNCHES["qk_rope_backward" if transpose else "qk_rope"] += 1
    return _launch(q, k, (None, None), 0.0, 0.0, cos, sin, transpose, repeats)


# -- norm and rotation -----------------------------------------------------------------------------------------------


def _norm_backward_fake(
    gq: torch.Tensor, gk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor,
    k_weight: torch.Tensor, eps: float, offset: float, cos: torch.Tensor, sin: torch.Tensor, repeats: bool,
    need_dw: bool,
) -> Any:  # fmt: skip
    dw = [torch.empty_like(w) if need_dw else w.new_empty(0) for w in (q_weight, k_weight)]
    return empty_rows_like(q), empty_rows_like(k), *dw


@kernel_op(
    "qk_norm_rope_backward(Tensor gq, Tensor gk, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, "
    "float offset, Tensor cos, Tensor sin, bool repeats, bool need_dw) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_backward_fake,
)
def _norm_backward_op(
    gq: torch.Tensor, gk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor,
    k_weight: torch.Tensor, eps: float, offset: float, cos: torch.Tensor, sin: torch.Tensor, repeats: bool,
    need_dw: bool,
) -> Any:  # fmt: skip
    dq, dk = empty_rows_like(q), empty_rows_like(k)
    launch = _norm_backward_launch(
        q.shape, k.shape[1], tuple(t.stride() for t in (gq, gk, q, k, dq, dk)), _tables_of(cos, sin),
        cos.shape[-1] // 2, q.device, tuple(t.dtype for t in (gq, gk, q, k, q_weight, k_weight, cos, sin)), need_dw,
        repeats,
    )  # fmt: skip
    shares = torch.empty(2, launch.grid if need_dw else 0, q.shape[-1], device=q.device, dtype=torch.float32)
    LAUNCHES["qk_norm_rope_backward"] += 1
    launch((gq, gk, q, k, q_weight, k_weight, cos, sin, dq, dk, shares[0], shares[1]), eps, offset)
    if not need_dw:
        return dq, dk, q_weight.new_empty(0), k_weight.new_empty(0)
    return dq, dk, sum_shares(shares[0], torch.empty_like(q_weight)), sum_shares(shares[1], torch.empty_like(k_weight))


def _norm_fake(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, offset: float,
    cos: torch.Tensor, sin: torch.Tensor, repeats: bool,
) -> Any:  # fmt: skip
    return empty_rows_like(q), empty_rows_like(k)


def _norm_setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, q_weight, k_weight, ctx.eps, ctx.offset, cos, sin, ctx.repeats = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)


def _norm_backward(ctx: Any, gq: torch.Tensor | None, gk: torch.Tensor | None) -> Any:
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    need_dw = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dq, dk, dq_weight, dk_weight = _norm_backward_op(
        _gradient(gq, q),
        _gradient(gk, k),
        q,
        k,
        q_weight,
        k_weight,
        ctx.eps,
        ctx.offset,
        cos,
        sin,
        ctx.repeats,
        need_dw,
    )
    return dq, dk, dq_weight if need_dw else None, dk_weight if need_dw else None, None, None, None, None, None


@kernel_op(
    "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, float offset, Tensor cos, "
    "Tensor sin, bool repeats) -> (Tensor, Tensor)",
    _norm_fake,
    setup_context=_norm_setup_context,
    backward=_norm_backward,
)
def _norm_op(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, offset: float,
    cos: torch.Tensor, sin: torch.Tensor, repeats: bool,
) -> Any:  # fmt: skip
    LAUNCHES["qk_norm_rope"] += 1
    return _launch(q, k, (q_weight, k_weight), eps, offset, cos, sin, False, repeats)


# -- public ----------------------------------------------------------------------------------------------------------


def _check(name: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"{name}: q has shape {tuple(q.shape)} and k {tuple(k.shape)}; they must be (B, Hq, S, D) and "
            "(B, Hk, S, D)."
        )
    batch, _, seq_len, head_dim = q.shape
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[0] not in (1, batch) or cos.shape[1] != seq_len:
        raise ValueError(
            f"{name}: cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; both must be (B or 1, S, R) with "
            f"B = {batch}, S = {seq_len}."
        )
    if cos.shape[-1] % 2 or cos.shape[-1] > head_dim:
        raise ValueError(
            f"{name}: the rotary width R, cos's last dimension, is {cos.shape[-1]}; it must be even and at most the "
            f"head dimension {head_dim}."
        )


def _takes(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether the kernels run: they give no gradient to cos and sin, and read q and k through one pointer."""
    tables_learn = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    empty = q.numel() == 0 or k.numel() == 0 or cos.shape[-1] == 0
    alike = q.dtype == k.dtype and len({w.dtype for w in weights}) <= 1
    return use_triton(q, k, cos, sin, *weights) and alike and not tables_learn and not empty


def qk_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, repeats: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: (B, Hq, S, D), bf16, fp16, fp32 (or fp64: reference), any strides.
        k: (B, Hk, S, D), likewise.
        cos, sin: (B or 1, S, R), R even and at most D; any floating dtype. The two halves of R may differ.
        repeats: the caller knows that they do not, as in the tables that transformers' models make: the second half
            is then not read.

    Returns:
        q and k rotated, each in its own dtype (eager torch would promote to that of cos), in the input's layout.
        Gradients go to q and k; if cos or sin requires one, the reference runs and gives it.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check("qk_rope", q, k, cos, sin)
    if not _takes(q, k, cos, sin):
        return qk_rope_reference(q, k, cos, sin)
    q, k, cos, sin = (unit_last_stride(t) for t in (q, k, cos, sin))
    return _op(q, k, cos, sin, False, repeats)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    offset: float = 0.0,
    repeats: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of each head of q and of k, then their rotation, rounded once.

    Args:
        q, k, cos, sin, repeats: as for `qk_rope`.
        q_weight, k_weight: (D,), any floating dtype; their gradients are summed in float32.
        eps, offset: as for `rms_norm`; the same for q and k.

    Returns:
        q and k, normed and rotated, each in its own dtype and layout.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check("qk_norm_rope", q, k, cos, sin)
    head_dim = q.shape[-1]
    if q_weight.shape != (head_dim,) or k_weight.shape != (head_dim,):
        raise ValueError(
            f"qk_norm_rope: q_weight has shape {tuple(q_weight.shape)} and k_weight {tuple(k_weight.shape)}; both "
            f"must be (D,) with D = {head_dim}."
        )
    if not _takes(q, k, cos, sin, q_weight, k_weight):
        return qk_norm_rope_reference(q, k, q_weight, k_weight, eps, cos, sin, offset)
    q, k, cos, sin = (unit_last_stride(t) for t in (q, k, cos, sin))
    return _norm_op(q, k, q_weight.contiguous(), k_weight.contiguous(), float(eps), float(offset), cos, sin, repeats)
