"""What happens between the GEMMs of `linear_cross_entropy`: softmax statistics, and gradients in the logits' place.

`softmax_pass` does both in one visit to each row. A program has a row. It folds every element into a running maximum,
sum of exponentials and entropy (the online softmax of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867),
and then replaces each element by its gradient. A row of a large vocabulary is bigger than the registers of a
multiprocessor: `HELD` tiles of it stay in them, and the rest is read again. The few rows that are under way at a time
would fit into the L2 cache, but on an H100 the pass takes as long as if all of it came from memory.

`fold_pass` and `gradient_pass` are its two halves for logits that come in tiles of the vocabulary, and come twice.

Nothing is reduced across threads until the end of the row: each thread keeps the running values of its own groups of
neighbouring elements. Differences from the maximum are formed before they are scaled, so that their rounding does not
grow with the logits.

With v the logit after scale and cap, p its softmax, H its entropy in nats, the gradients are

    loss        w (p - onehot) + 2 z lse s p                 w = s, or s p[label] for DFT; s the loss's own scale
    tokens      a (onehot - p) - b p (log p + H) + c p       from coefficients of log_prob, entropy and log-sum-exp

Legend: C rows, V columns of logits, whose rows may lie further apart than V.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ._common import LAUNCHES, MAX_LAUNCHES, Launch, math_dtype, triton, use_triton
from ._cross_entropy_kernels import fold_pass_kernel, gradient_pass_kernel, scale_kernel, softmax_pass_kernel

_LN_2 = 0.6931471805599453

# Groups of elements that a thread loads at once in a tile, warps, and the tiles that registers hold (H100, bf16): one
# program on a multiprocessor that holds as much as it can; of shorter rows, two that hold all or most of theirs.
_GROUPS, _WARPS, _MOST_HELD, _STAGES = 1024, 16, 9, 4
_SHORT_ROW, _SHORT_GROUPS, _SHORT_WARPS, _SHORT_HELD = 65_536, 512, 8, 5
# A narrow tile of the vocabulary is folded by one warp a row: there is nothing to reduce across warps then.
_NARROW, _NARROW_GROUPS, _NARROW_WARPS = 16_384, 64, 1


class Head(NamedTuple):
    """What makes logits of the GEMM's products: softcap * tanh(logit_scale * product / softcap)."""

    logit_scale: float
    softcap: float | None


class Statistics(NamedTuple):
    """What a pass writes of each row, zero (False) where the row has no label; slices go along."""

    log_prob: torch.Tensor
    entropy: torch.Tensor
    log_sum_exp: torch.Tensor
    is_top1: torch.Tensor

    @classmethod
    def empty(cls, n_rows: int, dtype: torch.dtype, device: torch.device) -> Statistics:
        log_prob, entropy, log_sum_exp = (torch.empty(n_rows, dtype=dtype, device=device) for _ in range(3))
        return cls(log_prob, entropy, log_sum_exp, torch.empty(n_rows, dtype=torch.bool, device=device))

    def rows(self, rows: slice) -> Statistics:
        return Statistics(*(t[rows] for t in self))


class OfLoss(NamedTuple):
    """The gradient of the summed loss.

    Attributes:
        scale: float32, one element: what each token's loss is multiplied by.
        dft: whether it is multiplied by the token's probability too.
        z_loss: coefficient of the squared log-sum-exp.
    """

    scale: torch.Tensor
    dft: bool
    z_loss: float


class OfTokens(NamedTuple):
    """The gradient from one coefficient a row (C,) for each of the statistics; None stands for zeros."""

    log_prob: torch.Tensor
    entropy: torch.Tensor | None
    log_sum_exp: torch.Tensor | None

    def rows(self, rows: slice) -> OfTokens:
        return OfTokens(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]


# -- in torch ---------------------------------------------------------------------------------------------------------


def _softmax_pass_torch(
    logits_CV: torch.Tensor, label_C: torch.Tensor, out: Statistics, head: Head, gradient: OfLoss | OfTokens | None
) -> None:
    v_CV = logits_CV.to(math_dtype(logits_CV.dtype)) * head.logit_scale
    if head.softcap is not None:
        v_CV = v_CV.div_(head.softcap).tanh_().mul_(head.softcap)
    peak_C, top_C = v_CV.max(dim=-1)
    shifted_CV = v_CV - peak_C[:, None]  # so that nothing overflows
    total_C = shifted_CV.exp().sum(-1)
    # entropy = log total - sum(p * shifted), of smaller terms than -sum(p log p).
    log_p_CV = shifted_CV - total_C.log()[:, None]
    p_CV = log_p_CV.exp()
    entropy_C = total_C.log() - (p_CV * shifted_CV).sum(-1)
    lse_C = peak_C + total_C.log()
    dead_C, label_C1 = label_C < 0, label_C.clamp(min=0)[:, None]
    log_prob_C = log_p_CV.gather(1, label_C1).squeeze(1)
    out.log_prob.copy_(log_prob_C.masked_fill(dead_C, 0.0))
    out.entropy.copy_(entropy_C.masked_fill(dead_C, 0.0))
    out.log_sum_exp.copy_(lse_C.masked_fill(dead_C, 0.0))
    out.is_top1.copy_((top_C == label_C) & ~dead_C)
    if gradient is None:
        return
    if isinstance(gradient, OfLoss):
        on_label_C = gradient.scale * (log_prob_C.exp() if gradient.dft else torch.ones_like(log_prob_C))
        on_p_C = on_label_C + 2 * gradient.z_loss * gradient.scale * lse_C
    else:
        on_label_C = -gradient.log_prob
        on_p_C = on_label_C if gradient.log_sum_exp is None else on_label_C + gradient.log_sum_exp
    d_CV = p_CV * on_p_C[:, None]
    if isinstance(gradient, OfTokens) and gradient.entropy is not None:
        d_CV -= gradient.entropy[:, None] * p_CV * (log_p_CV + entropy_C[:, None])
    d_CV.scatter_add_(1, label_C1, -on_label_C.to(d_CV.dtype)[:, None])
    if head.softcap is not None:
        d_CV *= 1 - (v_CV / head.softcap).square()
    # A fill, not a product: an ignored row may hold NaN.
    logits_CV.copy_((d_CV * head.logit_scale).masked_fill_(dead_C[:, None], 0.0))


# -- launches ---------------------------------------------------------------------------------------------------------


def _tiling(n_cols: int, itemsize: int) -> tuple[int, int, int, int]:
    """Groups of a tile, elements of a group (16 bytes), warps, and the tiles to hold in registers."""
    group = 16 // itemsize
    most, warps, held = _GROUPS, _WARPS, _MOST_HELD
    if n_cols < _SHORT_ROW:
        most, warps, held = _SHORT_GROUPS, _SHORT_WARPS, _SHORT_HELD
    groups = min(most, max(32, triton.next_power_of_2(triton.cdiv(n_cols, group))))
    held = min(held, n_cols // (groups * group)) if itemsize == 2 else 0
    return groups, group, max(1, groups * warps // most), held


def _factors(head: Head) -> tuple[float, float]:
    """What products are multiplied by inside of a tanh, if there is one, and then to be logits over log 2."""
    if head.softcap is None:
        return 1.0, head.logit_scale / _LN_2
    return head.logit_scale / head.softcap, head.softcap / _LN_2


class _Extent(NamedTuple):
    """Of logits (C, V): what decides, with a kernel's constants, how it is launched."""

    n_rows: int
    n_cols: int
    stride: int
    dtype: torch.dtype

    @classmethod
    def of(cls, logits: torch.Tensor) -> _Extent:
        return cls(logits.shape[0], logits.shape[1], logits.stride(0), logits.dtype)


# `given` tells which of the optional pointers are there: kernels are compiled for that.


@lru_cache(MAX_LAUNCHES)
def _softmax_launch(extent: _Extent, gradient: bool, dft: bool, cap: bool, given: tuple[bool, ...]) -> Launch:
    groups, group, warps, held = _tiling(extent.n_cols, extent.dtype.itemsize)
    if not gradient or extent.stride % 2:  # nothing is read twice; words have to be aligned
        held = 0
    return Launch(
        softmax_pass_kernel, extent.n_rows, extent.n_cols, extent.stride, gradient, dft, cap, held, groups, group,
        _STAGES,
        num_warps=warps,
    )  # fmt: skip


@lru_cache(MAX_LAUNCHES)
def _fold_launch(extent: _Extent, column: int, cap: bool) -> Launch:
    groups, group, warps, _ = _tiling(extent.n_cols, extent.dtype.itemsize)
    if extent.n_cols < _NARROW:
        groups, warps = min(groups, _NARROW_GROUPS), _NARROW_WARPS
    return Launch(
        fold_pass_kernel,
        extent.n_rows,
        column,
        extent.n_cols,
        extent.stride,
        cap,
        groups,
        group,
        _STAGES,
        num_warps=warps,
    )


@lru_cache(MAX_LAUNCHES)
def _gradient_launch(extent: _Extent, column: int, dft: bool, cap: bool, given: tuple[bool, ...]) -> Launch:
    groups, group, warps, _ = _tiling(extent.n_cols, extent.dtype.itemsize)
    return Launch(
        gradient_pass_kernel, extent.n_rows, column, extent.n_cols, extent.stride, dft, cap, groups, group,
        num_warps=warps,
    )  # fmt: skip


def _pointers(gradient: OfLoss | OfTokens | None) -> tuple[tuple[torch.Tensor | None, ...], float, bool]:
    """The optional tensors in the kernels' order, the z-loss, and whether DFT weights."""
    if isinstance(gradient, OfLoss):
        return (gradient.scale, None, None, None), gradient.z_loss, gradient.dft
    return (None, *(gradient or (None, None, None))), 0.0, False


def softmax_pass(
    logits_CV: torch.Tensor, label_C: torch.Tensor, out: Statistics, head: Head, gradient: OfLoss | OfTokens | None
) -> None:
    """Write the statistics of each row to `out`, and its gradient, if any is asked for, over the logits.

    Args:
        logits_CV: (C, V) products of the GEMM, any floating dtype, unit stride along V; overwritten.
        label_C: (C,) int64, negative where a row is not scored: its gradient is zero.
        out: (C,) each, float32 (float64 with float64 logits).
    """
    if not use_triton(logits_CV, out.log_prob):
        _softmax_pass_torch(logits_CV, label_C, out, head, gradient)
        return
    optional, z_loss, dft = _pointers(gradient)
    given = tuple(t is not None for t in optional)
    launch = _softmax_launch(_Extent.of(logits_CV), gradient is not None, dft, head.softcap is not None, given)
    LAUNCHES["softmax_pass"] += 1
    launch((logits_CV, label_C, *out, *optional), *_factors(head), head.logit_scale, z_loss)


class Running(NamedTuple):
    """What `fold_pass` keeps of each row (M,): maximum, sum of p, sum of p log2 p, the label's v, the top column."""

    peak: torch.Tensor
    total: torch.Tensor
    mean: torch.Tensor
    label_v: torch.Tensor
    top: torch.Tensor

    @classmethod
    def start(cls, n_rows: int, device: torch.device) -> Running:
        peak, total, mean = (torch.zeros(n_rows, device=device) for _ in range(3))
        label_v = torch.full((n_rows,), float("nan"), device=device)  # of a label beyond the vocabulary
        return cls(peak, total.add_(1), mean, label_v, torch.zeros(n_rows, dtype=torch.int32, device=device))

    def finish(self, label_M: torch.Tensor, head: Head, out: Statistics) -> torch.Tensor:
        """Write the statistics; returns (M,) log2 of the sum of p."""
        _, to_log2 = _factors(head)
        log_total, dead = self.total.log2(), label_M < 0
        label_log2_p = (self.label_v - self.peak) * to_log2 - log_total
        out.log_prob.copy_((label_log2_p * _LN_2).masked_fill_(dead, 0.0))
        out.entropy.copy_(((log_total - self.mean / self.total) * _LN_2).masked_fill_(dead, 0.0))
        out.log_sum_exp.copy_(((self.peak * to_log2 + log_total) * _LN_2).masked_fill_(dead, 0.0))
        out.is_top1.copy_((self.top == label_M) & ~dead)
        return log_total


def fold_pass(logits_MC: torch.Tensor, column: int, label_M: torch.Tensor, running: Running, head: Head) -> None:
    """The columns from `column` on, M rows of them, into the running values; `column` 0 comes first. Kernel only."""
    launch = _fold_launch(_Extent.of(logits_MC), column, head.softcap is not None)
    LAUNCHES["fold_pass"] += 1
    launch((logits_MC, label_M, *running), *_factors(head))


def gradient_pass(
    logits_MC: torch.Tensor, column: int, label_M: torch.Tensor, running: Running, log_total: torch.Tensor,
    statistics: Statistics, head: Head, gradient: OfLoss | OfTokens,
) -> None:  # fmt: skip
    """The columns from `column` on replaced by their gradient, once the statistics are known. Kernel only."""
    optional, z_loss, dft = _pointers(gradient)
    given = tuple(t is not None for t in optional)
    launch = _gradient_launch(_Extent.of(logits_MC), column, dft, head.softcap is not None, given)
    LAUNCHES["gradient_pass"] += 1
    launch(
        (logits_MC, label_M, running.peak, log_total, *statistics[:3], *optional),
        *_factors(head), head.logit_scale, z_loss,
    )  # fmt: skip


@lru_cache(MAX_LAUNCHES)
def _scale_launch(numel: int, programs: int, dtype: torch.dtype) -> Launch:
    return Launch(scale_kernel, programs, numel, 4096, num_warps=8)


def scale_unless_one(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`x` times a 0-d float32 `factor`: in place, and at no cost where the factor is one, on a GPU; else a new tensor.

    The host does not know the factor, and reading it would wait for the GPU.
    """
    if not use_triton(x, factor) or not x.is_contiguous():
        return x * factor.to(x.dtype)
    programs = min(triton.cdiv(max(1, x.numel()), 4096), 1024)
    LAUNCHES["scale_unless_one"] += 1
    _scale_launch(x.numel(), programs, x.dtype)((x, factor))
    return x
