"""RMSNorm of each head of queries and keys (Qwen3, Gemma 3) and their rotation, in one launch.

With x = q / rms(q) * (offset + w) over all D head dimensions in the place of `_qk_rope.py`'s x; rounded once. Kept are
q, k, the weights, cos and sin. The backward kernel rotates the gradient back, then applies the norm's formula
(`_rms_norm.py`); as there a fixed number of programs keep their shares of the weights' gradients.

Shapes: as in `_qk_rope.py`; norm weights (D,).
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from functools import lru_cache
from typing import Any

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
    tl,
    triton,
    unit_last_stride,
)
from ._qk_rope import (
    NORM_PAIRS,
    WARPS,
    Layout,
    blocks_of,
    check_shapes,
    kernels_take,
    launch_rotation,
    load_tables,
    rotate_reference,
    rotated,
    table_strides,
)
from ._rms_norm import rms_norm_reference, sum_shares

_BACKWARD_PROGRAMS = 8  # for each multiprocessor


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
    return rotate_reference(q_unit, cos, sin).to(q.dtype), rotate_reference(k_unit, cos, sin).to(k.dtype)


# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _backward_heads(
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
        g1, g2 = rotated(g1, g2, c1, c2, s1, s2, True)
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
def _backward_kernel(
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
        c1, c2, s1, s2 = load_tables(cos_ptr, sin_ptr, b, s, cb, cs, sb, ss, col, mask, half, REPEATS)
        qd1, qd2, qdp = _backward_heads(
            gq_ptr, q_ptr, dq_ptr, qw_ptr, b, s, gqb, gqh, gqs, qb, qh, qs, dqb, dqh, dqs, live, n_q, c1, c2, s1, s2,
            eps, offset, qd1, qd2, qdp, half, head_dim, BLOCK_Q, BLOCK_C, BLOCK_P,
        )  # fmt: skip
        kd1, kd2, kdp = _backward_heads(
            gk_ptr, k_ptr, dk_ptr, kw_ptr, b, s, gkb, gkh, gks, kb, kh, ks, dkb, dkh, dks, live, n_k, c1, c2, s1, s2,
            eps, offset, kd1, kd2, kdp, half, head_dim, BLOCK_K, BLOCK_C, BLOCK_P,
        )  # fmt: skip
    if NEED_DW:
        share = tl.program_id(0).to(tl.int64) * head_dim
        _store_share(qs_ptr + share, qd1, qd2, qdp, half, head_dim, BLOCK_C, BLOCK_P)
        _store_share(ks_ptr + share, kd1, kd2, kdp, half, head_dim, BLOCK_C, BLOCK_P)


# -- launches --------------------------------------------------------------------------------------------------------


@lru_cache(MAX_LAUNCHES)
def _backward_launch(
    shape: torch.Size, n_k: int, layouts: tuple[Layout, ...], tables: Layout, half: int, device: torch.device,
    dtypes: Any, need_dw: bool, repeats: bool,
) -> Launch:  # fmt: skip
    batch, n_q, seq_len, head_dim = shape
    tokens, heads, columns, rest = blocks_of(max(n_q, n_k), half, head_dim, NORM_PAIRS)
    heads_k = min(heads, triton.next_power_of_2(n_k))
    programs = min(triton.cdiv(batch * seq_len, tokens), _BACKWARD_PROGRAMS * multiprocessors(device))
    return Launch(
        _backward_kernel, programs, batch * seq_len, seq_len, n_q, n_k,
        *(stride for layout in layouts for stride in layout[:3]), *tables,
        half, head_dim, need_dw, tokens, heads, heads_k, columns, rest, repeats, num_warps=WARPS,
    )  # fmt: skip


def _gradient(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if grad is None else unit_last_stride(grad)


def _backward_fake(
    gq: torch.Tensor, gk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor,
    k_weight: torch.Tensor, eps: float, offset: float, cos: torch.Tensor, sin: torch.Tensor, repeats: bool,
    need_dw: bool,
) -> Any:  # fmt: skip
    dw = [torch.empty_like(w) if need_dw else w.new_empty(0) for w in (q_weight, k_weight)]
    return empty_rows_like(q), empty_rows_like(k), *dw


@kernel_op(
    "qk_norm_rope_backward(Tensor gq, Tensor gk, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, "
    "float offset, Tensor cos, Tensor sin, bool repeats, bool need_dw) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward_op(
    gq: torch.Tensor, gk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor,
    k_weight: torch.Tensor, eps: float, offset: float, cos: torch.Tensor, sin: torch.Tensor, repeats: bool,
    need_dw: bool,
) -> Any:  # fmt: skip
    dq, dk = empty_rows_like(q), empty_rows_like(k)
    launch = _backward_launch(
        q.shape, k.shape[1], tuple(t.stride() for t in (gq, gk, q, k, dq, dk)), table_strides(cos, sin),
        cos.shape[-1] // 2, q.device, tuple(t.dtype for t in (gq, gk, q, k, q_weight, k_weight, cos, sin)), need_dw,
        repeats,
    )  # fmt: skip
    shares = torch.empty(2, launch.grid if need_dw else 0, q.shape[-1], device=q.device, dtype=torch.float32)
    LAUNCHES["qk_norm_rope_backward"] += 1
    launch((gq, gk, q, k, q_weight, k_weight, cos, sin, dq, dk, shares[0], shares[1]), eps, offset)
    if not need_dw:
        return dq, dk, q_weight.new_empty(0), k_weight.new_empty(0)
    return dq, dk, sum_shares(shares[0], torch.empty_like(q_weight)), sum_shares(shares[1], torch.empty_like(k_weight))


def _fake(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, offset: float,
    cos: torch.Tensor, sin: torch.Tensor, repeats: bool,
) -> Any:  # fmt: skip
    return empty_rows_like(q), empty_rows_like(k)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, q_weight, k_weight, ctx.eps, ctx.offset, cos, sin, ctx.repeats = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)


def _backward(ctx: Any, gq: torch.Tensor | None, gk: torch.Tensor | None) -> Any:
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    need_dw = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dq, dk, dq_weight, dk_weight = _backward_op(
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
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
def _op(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, offset: float,
    cos: torch.Tensor, sin: torch.Tensor, repeats: bool,
) -> Any:  # fmt: skip
    LAUNCHES["qk_norm_rope"] += 1
    return launch_rotation(q, k, (q_weight, k_weight), eps, offset, cos, sin, False, repeats)


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
        TypeError: q or k is not floating-point.
    """
    check_shapes("qk_norm_rope", q, k, cos, sin)
    head_dim = q.shape[-1]
    if q_weight.shape != (head_dim,) or k_weight.shape != (head_dim,):
        raise ValueError(
            f"qk_norm_rope: q_weight has shape {tuple(q_weight.shape)} and k_weight {tuple(k_weight.shape)}; both "
            f"must be (D,) with D = {head_dim}."
        )
    if not kernels_take(q, k, cos, sin, q_weight, k_weight):
        require_floating("qk_norm_rope", q=q, k=k)
        return qk_norm_rope_reference(q, k, q_weight, k_weight, eps, cos, sin, offset)
    q, k, cos, sin = (unit_last_stride(t) for t in (q, k, cos, sin))
    return _op(q, k, q_weight.contiguous(), k_weight.contiguous(), float(eps), float(offset), cos, sin, repeats)
