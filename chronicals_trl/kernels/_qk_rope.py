"""Rotary position embedding of queries and keys in one launch.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-rotation layout of transformers' Llama: with
x = [x1, x2] the halves of the first R of D head dimensions, and cos = [c1, c2], sin = [s1, s2] likewise,

    y1 = x1 c1 - x2 s1,    y2 = x2 c2 + x1 s2,    the other D - R dimensions pass through.

The backward pass applies the transpose: dx1 = g1 c1 + g2 s2, dx2 = g2 c2 - g1 s1. Nothing but cos and sin is kept.

Shapes: q (B, Hq, S, D), k (B, Hk, S, D), cos and sin (B or 1, S, R). Models hand over transposed (B, S, heads, D)
views; they are read by stride, and the results keep that layout, which packed attention can flatten without a copy.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from typing import Any

import torch

from ._common import LAUNCHES, empty_rows_like, jit, math_dtype, tl, triton, unit_last_stride, use_triton


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


@jit
def _rotate_heads(
    x_ptr, y_ptr, x_at, y_at, xh, yh, n_heads, c1, c2, s1, s2, col, col_mask, half, head_dim,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    for first in range(0, n_heads, BLOCK_H):
        head = (first + tl.arange(0, BLOCK_H)).to(tl.int64)
        x_row = x_ptr + x_at + head[:, None] * xh
        y_row = y_ptr + y_at + head[:, None] * yh
        live = (head < n_heads)[:, None]
        mask = live & col_mask[None, :]
        x1 = tl.load(x_row + col[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_row + half + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if TRANSPOSE:
            y1 = x1 * c1[None, :] + x2 * s2[None, :]
            y2 = x2 * c2[None, :] - x1 * s1[None, :]
        else:
            y1 = x1 * c1[None, :] - x2 * s1[None, :]
            y2 = x2 * c2[None, :] + x1 * s2[None, :]
        tl.store(y_row + col[None, :], y1.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_row + half + col[None, :], y2.to(y_ptr.dtype.element_ty), mask=mask)
        if BLOCK_P > 0:
            rest = 2 * half + tl.arange(0, BLOCK_P)
            keep = live & (rest < head_dim)[None, :]
            tl.store(y_row + rest[None, :], tl.load(x_row + rest[None, :], mask=keep), mask=keep)


@jit
def _kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, qo_ptr, ko_ptr, seq_len, n_q, n_k, half, head_dim,
    qb, qh, qs, kb, kh, ks, qob, qoh, qos, kob, koh, kos, cb, cs, sb, ss,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    # One program a token: cos and sin are read once for all heads of q and k.
    token = tl.program_id(0).to(tl.int64)
    b = token // seq_len
    s = token % seq_len
    col = tl.arange(0, BLOCK_C)
    mask = col < half
    cos_row = cos_ptr + b * cb + s * cs + col
    sin_row = sin_ptr + b * sb + s * ss + col
    c1 = tl.load(cos_row, mask=mask, other=0.0).to(tl.float32)
    c2 = tl.load(cos_row + half, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin_row, mask=mask, other=0.0).to(tl.float32)
    s2 = tl.load(sin_row + half, mask=mask, other=0.0).to(tl.float32)
    _rotate_heads(
        q_ptr, qo_ptr, b * qb + s * qs, b * qob + s * qos, qh, qoh, n_q, c1, c2, s1, s2, col, mask, half, head_dim,
        BLOCK_H, BLOCK_P, TRANSPOSE,
    )  # fmt: skip
    _rotate_heads(
        k_ptr, ko_ptr, b * kb + s * ks, b * kob + s * kos, kh, koh, n_k, c1, c2, s1, s2, col, mask, half, head_dim,
        BLOCK_H, BLOCK_P, TRANSPOSE,
    )  # fmt: skip


@torch.library.custom_op(
    "chronicals_trl::qk_rope",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transpose) -> (Tensor, Tensor)",
)
def _op(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool) -> Any:
    batch, n_q, seq_len, head_dim = q.shape
    half = cos.shape[-1] // 2
    q_out, k_out = empty_rows_like(q), empty_rows_like(k)
    block_c = triton.next_power_of_2(half)
    rest = head_dim - 2 * half
    # Batch, head, sequence; a table shared by the whole batch is read with batch stride 0.
    tables = [stride for t in (cos, sin) for stride in (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1))]
    LAUNCHES["qk_rope_backward" if transpose else "qk_rope"] += 1
    _kernel[(batch * seq_len,)](
        q, k, cos, sin, q_out, k_out, seq_len, n_q, k.shape[1], half, head_dim,
        *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3], *tables,
        BLOCK_H=max(1, min(triton.next_power_of_2(n_q), 1024 // block_c)), BLOCK_C=block_c,
        BLOCK_P=triton.next_power_of_2(rest) if rest else 0, TRANSPOSE=transpose,
    )  # fmt: skip
    return q_out, k_out


@_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool) -> Any:
    return empty_rows_like(q), empty_rows_like(k)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, cos, sin, ctx.transpose = inputs
    ctx.save_for_backward(cos, sin)
    ctx.out_meta = [(o.shape, o.dtype, o.device) for o in output]


def _backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
    cos, sin = ctx.saved_tensors
    gq, gk = (
        torch.zeros(shape, dtype=dtype, device=device) if g is None else unit_last_stride(g)
        for g, (shape, dtype, device) in zip(grads, ctx.out_meta, strict=True)
    )
    return (*_op(gq, gk, cos, sin, not ctx.transpose), None, None, None)


_op.register_autograd(_backward, setup_context=_setup_context)


def qk_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: (B, Hq, S, D), bf16, fp16, fp32 (or fp64: reference), any strides.
        k: (B, Hk, S, D), likewise.
        cos, sin: (B or 1, S, R), R even and at most D; any floating dtype. The two halves of R may differ.

    Returns:
        q and k rotated, each in its own dtype (eager torch would promote to that of cos), in the input's layout.
        Gradients go to q and k; if cos or sin requires one, the reference runs and gives it.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"qk_rope: q has shape {tuple(q.shape)} and k {tuple(k.shape)}; they must be (B, Hq, S, D) and "
            "(B, Hk, S, D)."
        )
    batch, _, seq_len, head_dim = q.shape
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[0] not in (1, batch) or cos.shape[1] != seq_len:
        raise ValueError(
            f"qk_rope: cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; both must be (B or 1, S, R) with "
            f"B = {batch}, S = {seq_len}."
        )
    if cos.shape[-1] % 2 or cos.shape[-1] > head_dim:
        raise ValueError(
            f"qk_rope: the rotary width R, cos's last dimension, is {cos.shape[-1]}; it must be even and at most the "
            f"head dimension {head_dim}."
        )
    if (
        not use_triton(q, k, cos, sin)
        or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
        or q.numel() == 0
        or k.numel() == 0
        or cos.shape[-1] == 0
    ):
        return qk_rope_reference(q, k, cos, sin)
    q, k, cos, sin = (unit_last_stride(t) for t in (q, k, cos, sin))
    return _op(q, k, cos, sin, False)
