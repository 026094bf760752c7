"""Rotary position embedding of queries and keys in one launch.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-rotation layout of transformers' Llama: with
x = [x1, x2] the halves of the first R of D head dimensions, and cos = [c1, c2], sin = [s1, s2] likewise,

    y1 = x1 c1 - x2 s1,    y2 = x2 c2 + x1 s2,    the other D - R dimensions pass through.

The backward pass applies the transpose: dx1 = g1 c1 + g2 s2, dx2 = g2 c2 - g1 s1. Nothing but cos and sin is kept.
The forward kernel can norm each head on the way: `_qk_norm_rope.py`.

Shapes: q (B, Hq, S, D), k (B, Hk, S, D), cos and sin (B or 1, S, R). Models hand over transposed
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
    require_floating,
    tl,
    triton,
    unit_last_stride,
    use_triton,
)


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
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
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)


# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def load_tables(cos_ptr, sin_ptr, b, s, cb, cs, sb, ss, col, mask, half, REPEATS: tl.constexpr):
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
def rotated(x1, x2, c1, c2, s1, s2, TRANSPOSE: tl.constexpr):
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
    c1, c2, s1, s2 = load_tables(
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
    y1, y2 = rotated(x1, x2, c1, c2, s1, s2, TRANSPOSE)
    q_to = (b * qob + s * qos)[:, None, None] + head[None, :, None] * qoh
    k_to = (b * kob + s * kos)[:, None, None] + of_k[None, :, None] * koh
    y_row = tl.where(of_q[None, :, None], qo_ptr + q_to, ko_ptr + k_to)
    tl.store(y_row + col[None, None, :], y1.to(qo_ptr.dtype.element_ty), mask=mask)
    tl.store(y_row + half + col[None, None, :], y2.to(qo_ptr.dtype.element_ty), mask=mask)
    if BLOCK_P > 0:
        tl.store(y_row + rest[None, None, :], xp.to(qo_ptr.dtype.element_ty), mask=keep)


# -- launches --------------------------------------------------------------------------------------------------------


# One warp a program, few heads at a time: chosen on an H100 from some 30 combinations a head layout.
WARPS = 1
_PAIRS, NORM_PAIRS, _HEADS = 256, 512, 2


class _Blocks(NamedTuple):
    tokens: int
    heads: int
    columns: int
    rest: int


def blocks_of(n_heads: int, half: int, head_dim: int, pairs: int) -> _Blocks:
    """A program's share of tokens, heads and columns: `pairs` rotated pairs together."""
    columns = triton.next_power_of_2(half)
    heads = min(triton.next_power_of_2(n_heads), _HEADS, max(1, pairs // columns))
    rest = triton.next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0
    return _Blocks(max(1, pairs // (columns * heads)), heads, columns, rest)


Layout = tuple[int, ...]  # the strides of a tensor


def table_strides(cos: torch.Tensor, sin: torch.Tensor) -> Layout:
    """Batch and sequence strides of both; a table shared by the whole batch is read with batch stride 0."""
    return tuple(stride for t in (cos, sin) for stride in (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)))


# Everything about a launch that shapes, strides and dtypes decide, looked up by them: `Launch` says why.


@lru_cache(MAX_LAUNCHES)
def _forward_launch(
    shape: torch.Size, n_k: int, layouts: tuple[Layout, ...], tables: Layout, half: int, device: torch.device,
    dtypes: Any, norm: bool, transpose: bool, repeats: bool,
) -> Launch:  # fmt: skip
    batch, n_q, seq_len, head_dim = shape
    blocks = blocks_of(n_q + n_k, half, head_dim, NORM_PAIRS if norm else _PAIRS)
    programs = triton.cdiv(batch * seq_len, blocks.tokens) * triton.cdiv(n_q + n_k, blocks.heads)
    return Launch(
        _kernel, programs, batch * seq_len, seq_len, n_q, n_k,
        *(stride for layout in layouts for stride in layout[:3]), *tables,
        half, head_dim, norm, *blocks, transpose, repeats, num_warps=WARPS,
    )  # fmt: skip


def launch_rotation(
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
        q.shape, k.shape[1], tuple(t.stride() for t in (q, k, q_out, k_out)), table_strides(cos, sin),
        cos.shape[-1] // 2, q.device, tuple(None if t is None else t.dtype for t in (q, k, *weights, cos, sin)),
        norm, transpose, repeats,
    )  # fmt: skip
    launch((q, k, *weights, cos, sin, q_out, k_out), eps, offset)
    return q_out, k_out


# -- the op ----------------------------------------------------------------------------------------------------------


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
    return launch_rotation(q, k, (None, None), 0.0, 0.0, cos, sin, transpose, repeats)


# -- public ----------------------------------------------------------------------------------------------------------


def check_shapes(name: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
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


def kernels_take(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *weights: torch.Tensor
) -> bool:
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
        TypeError: q or k is not floating-point.
    """
    check_shapes("qk_rope", q, k, cos, sin)
    if not kernels_take(q, k, cos, sin):
        require_floating("qk_rope", q=q, k=k)
        return qk_rope_reference(q, k, cos, sin)
    q, k, cos, sin = (unit_last_stride(t) for t in (q, k, cos, sin))
    return _op(q, k, cos, sin, False, repeats)
