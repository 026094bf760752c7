"""The lookup in a weight that the head shares, and its gradient added into the head's.

Apart, the embedding's gradient is a second (V, H) tensor, which is filled with zeros, written where the batch has
tokens, and added to the head's over all V rows. Here the head differentiates what the lookup hands it beside the rows,
so that autograd itself brings the head's gradient to the lookup's node, in whatever part of the graph a backward pass
runs through. That node adds the gradient of its rows, in place.

Each row of the weight is summed in float32, in the order of the tokens, and rounded once: the positions are sorted by
their id, stably, and the program of a first position sums all that follow with the same id.

Legend: N tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._common import LAUNCHES, MAX_LAUNCHES, Launch, jit, tl, triton, unit_last_stride, use_triton

__all__ = ["add_embedding_rows", "tied_embedding"]

# A tile of gradient rows, and warps.
_ROWS, _COLUMNS, _WARPS = 64, 128, 4

_NO_PADDING = -1  # as torch.embedding has it; no token has this id


@jit
def _add_rows_kernel(
    total_ptr, grad_ptr, id_ptr, place_ptr, n_ids, width, total_stride, grad_stride, padding_idx,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Ids sorted, and of each the place of its row in grad; a program has a position and a block of columns."""
    blocks = tl.cdiv(width, COLUMNS)
    start = tl.program_id(0) // blocks
    token = tl.load(id_ptr + start)
    before = tl.load(id_ptr + start - 1, mask=start > 0, other=-1)
    if (token != before) & (token != padding_idx):
        column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        following = token
        while following == token:
            position = start + tl.arange(0, ROWS)
            same = tl.load(id_ptr + position, mask=position < n_ids, other=-1) == token
            place = tl.load(place_ptr + position, mask=same, other=0)
            at = place[:, None] * grad_stride + column[None, :]
            total += tl.load(grad_ptr + at, mask=same[:, None] & inside[None, :], other=0.0).to(tl.float32)
            start += ROWS
            following = tl.load(id_ptr + start, mask=start < n_ids, other=-1)
        to = total_ptr + tl.cast(token, tl.int64) * total_stride + column
        here = tl.load(to, mask=inside).to(tl.float32) + tl.sum(total, axis=0)
        tl.store(to, here.to(total_ptr.dtype.element_ty), mask=inside)


@lru_cache(MAX_LAUNCHES)
def _add_rows_launch(
    n_ids: int, width: int, strides: tuple[int, int], padding_idx: int, device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> Launch:  # fmt: skip
    programs = n_ids * triton.cdiv(width, _COLUMNS)
    fixed = (n_ids, width, *strides, padding_idx, _ROWS, _COLUMNS)
    return Launch(_add_rows_kernel, programs, *fixed, num_warps=_WARPS)


def add_embedding_rows(total_VH: Tensor, grad: Tensor, ids: Tensor, padding_idx: int | None = None) -> Tensor:
    """``total_VH[id] += grad`` for each id but `padding_idx`, in place; the order of summation is always the same.

    Args:
        total_VH: (V, H), any floating dtype.
        grad: (..., H), the gradient of the rows that were looked up.
        ids: (...), int32 or int64, each in 0 to V - 1: a lookup has refused others.
        padding_idx: an id whose row is left as it is; None for none.

    Returns:
        `total_VH`.
    """
    vocabulary, width = total_VH.shape
    padding_idx = _NO_PADDING if padding_idx is None else padding_idx
    if not use_triton(total_VH, grad) or total_VH.stride(1) != 1 or ids.numel() == 0:
        return total_VH.add_(_dense_gradient(grad, ids, vocabulary, padding_idx))
    id_N, place_N = torch.sort(ids.reshape(-1), stable=True)
    grad_NH = unit_last_stride(grad.reshape(-1, width))
    launch = _add_rows_launch(
        id_N.shape[0], width, (total_VH.stride(0), grad_NH.stride(0)), padding_idx, total_VH.device,
        (total_VH.dtype, grad.dtype, ids.dtype),
    )  # fmt: skip
    LAUNCHES["add_embedding_rows"] += 1
    launch((total_VH, grad_NH, id_N, place_N))
    return total_VH


def _dense_gradient(grad: Tensor, ids: Tensor, vocabulary: int, padding_idx: int) -> Tensor:
    """What torch's own embedding gives its weight, (V, H)."""
    return torch.ops.aten.embedding_dense_backward(grad, ids, vocabulary, padding_idx, False)


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VH: Tensor, padding_idx: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)  # as torch's own does: a checkpoint may run that one in the second forward pass
        ctx.vocabulary, ctx.padding_idx = weight_VH.shape[0], padding_idx
        return torch.embedding(weight_VH, ids, padding_idx), weight_VH.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_head_VH: Tensor | None) -> tuple[None, Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        if grad is None:  # nobody has used the rows
            return None, of_head_VH, None
        # To be differentiated once more, or traced: then nothing may change in place.
        apart = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if of_head_VH is None or apart:
            rows_VH = _dense_gradient(grad, ids, ctx.vocabulary, ctx.padding_idx)
            return None, rows_VH if of_head_VH is None else of_head_VH + rows_VH, None
        return None, add_embedding_rows(of_head_VH, grad, ids, ctx.padding_idx), None


def tied_embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> tuple[Tensor, Tensor]:
    """``F.embedding``, and the weight once more, for the head that shares it.

    The weight's gradient is that of both uses, in the memory of the second one's. That use must be one op, whose
    gradient nobody else has, such as `linear_cross_entropy`; or there may be none.

    Args:
        ids: (...), int32 or int64.
        weight: (V, H), with a gradient.
        padding_idx: an id whose row gets no gradient from the lookup; None for none.

    Returns:
        The rows (..., H), and (V, H) in the memory of `weight`.
    """
    rows, alias_VH = _TiedEmbedding.apply(ids, weight, _NO_PADDING if padding_idx is None else padding_idx)
    return rows, alias_VH
