"""The chunk loop of `linear_cross_entropy`: two ops that never hold more logits than one chunk of tokens has.

`score` goes over the chunks forward and, where asked to, forms the gradient of the summed loss on the way: one GEMM to
the chunk's logits, softmax statistics, the gradient of the logits in their place, one GEMM to the hidden gradient and
one to the weight gradient, which is summed over chunks in float32. `recompute` forms the gradient from one coefficient
a token, once those are known. Both are opaque to torch.compile: the number of chunks is no part of the graph.

Plain torch for now. Legend: M tokens, H hidden size, V vocabulary, C tokens in a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ._common import math_dtype


def chunk_rows(n_rows: int, vocab: int, itemsize: int, logit_budget_mib: int) -> int:
    """Tokens in a chunk, so that its buffers of C x V stay within the budget; at least 1, at most `n_rows`."""
    # Two float32 buffers (p, log p), and for 16-bit heads the gradient of the logits as the GEMMs take it.
    per_row = vocab * (8 + itemsize if itemsize == 2 else 2 * itemsize)
    rows = max(1, logit_budget_mib * 2**20 // per_row)
    if rows > 128:
        rows -= rows % 128  # whole GEMM tiles
    return max(1, min(rows, n_rows))


class _Softmax(NamedTuple):
    """One chunk's distribution. p is exp(log p), not exp / sum: p - 1 of a sure token then keeps its digits."""

    log_probs_CV: torch.Tensor
    probs_CV: torch.Tensor
    log_sum_exp_C: torch.Tensor
    entropy_C: torch.Tensor
    top_C: torch.Tensor  # the (first) most likely token


class _Head(NamedTuple):
    """The settings of the head, and the dtype that its GEMMs run in."""

    logit_scale: float
    softcap: float | None
    compute: torch.dtype

    def softmax(self, hidden_CH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> _Softmax:
        logits_CV = F.linear(hidden_CH, weight_VH, bias_V).to(math_dtype(self.compute))
        if self.logit_scale != 1.0:
            logits_CV.mul_(self.logit_scale)
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        peak_C, top_C = logits_CV.max(dim=-1)
        shifted_CV = logits_CV.sub_(peak_C[:, None])  # so that nothing overflows
        buffer_CV = shifted_CV.exp()
        total_C = buffer_CV.sum(-1)
        log_total_C = total_C.log()
        # entropy = log total - sum(p * shifted), of smaller terms than -sum(p log p). The sum of products is a
        # batched GEMM, which needs no buffer for the products.
        mean_C = torch.bmm(buffer_CV[:, None, :], shifted_CV[:, :, None]).flatten() / total_C
        log_probs_CV = shifted_CV.sub_(log_total_C[:, None])
        probs_CV = torch.exp(log_probs_CV, out=buffer_CV)
        return _Softmax(log_probs_CV, probs_CV, peak_C + log_total_C, log_total_C - mean_C, top_C)

    def chain(self, grad_CV: torch.Tensor, softmax: _Softmax) -> torch.Tensor:
        """Gradient of the softmax's input to gradient of the GEMM's output, in place; overwrites the log_probs."""
        if self.softcap is not None:
            capped_CV = softmax.log_probs_CV.add_(softmax.log_sum_exp_C[:, None])
            grad_CV.mul_(capped_CV.div_(self.softcap).square_().neg_().add_(1.0))
        if self.logit_scale != 1.0:
            grad_CV.mul_(self.logit_scale)
        return grad_CV


class _Sums:
    """The gradients that chunks add up to: hidden in the GEMMs' dtype, weight and bias in the math dtype."""

    def __init__(
        self, hidden_MH: torch.Tensor, weight_VH: torch.Tensor, needs: Sequence[bool], compute: torch.dtype
    ) -> None:
        wide = math_dtype(compute)
        device = hidden_MH.device
        self.compute, self.device = compute, device
        # What no chunk writes (nothing labelled, no rows) has to read as zero, not as None.
        self.hidden_MH = torch.zeros(hidden_MH.shape, dtype=compute, device=device) if needs[0] else None
        self.weight_VH = torch.zeros(weight_VH.shape, dtype=wide, device=device) if needs[1] else None
        self.bias_V = torch.zeros(weight_VH.shape[0], dtype=wide, device=device) if needs[2] else None

    def add(self, rows: slice, grad_CV: torch.Tensor, hidden_CH: torch.Tensor, weight_VH: torch.Tensor) -> None:
        if self.bias_V is not None:
            self.bias_V.add_(grad_CV.sum(0))
        grad_CV = grad_CV.to(self.compute)
        if self.hidden_MH is not None:
            torch.mm(grad_CV, weight_VH, out=self.hidden_MH[rows])
        if self.weight_VH is None:
            return
        if grad_CV.is_cuda and torch.version.hip is None and self.compute != self.weight_VH.dtype:
            # 16-bit operands on the tensor cores, but each chunk is added to the sum before it is rounded.
            torch.addmm(self.weight_VH, grad_CV.t(), hidden_CH, out_dtype=self.weight_VH.dtype, out=self.weight_VH)
        else:
            self.weight_VH.addmm_(grad_CV.t().to(self.weight_VH.dtype), hidden_CH.to(self.weight_VH.dtype))

    def get(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden, weight and bias gradient; empty where not asked for, since an op cannot return None."""
        none = torch.empty(0, device=self.device)
        hidden_MH = none if self.hidden_MH is None else self.hidden_MH
        weight_VH = torch.empty_like(none) if self.weight_VH is None else self.weight_VH
        bias_V = torch.empty_like(none) if self.bias_V is None else self.bias_V
        return hidden_MH, weight_VH, bias_V


@torch.library.custom_op(
    "chronicals_trl::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor live, float logit_scale, "
    "float? softcap, ScalarType compute, SymInt chunk, bool dft, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def score(
    hidden_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_M: torch.Tensor,
    live_M: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    chunk: int,
    dft: bool,
    needs: list[bool],
) -> Any:
    """Forward pass over all chunks: log_probs, entropy, is_top1 (M,), and the summed loss's gradients as asked for."""
    head = _Head(logit_scale, softcap, compute)
    n_rows = hidden_MH.shape[0]
    log_probs_M = torch.zeros(n_rows, dtype=math_dtype(compute), device=hidden_MH.device)
    entropy_M = torch.zeros_like(log_probs_M)
    is_top1_M = torch.zeros(n_rows, dtype=torch.bool, device=hidden_MH.device)
    sums = _Sums(hidden_MH, weight_VH, needs, compute)
    with torch.autocast(hidden_MH.device.type, enabled=False):
        weight_VH = weight_VH.to(compute)
        bias_V = bias_V.to(compute) if bias_V is not None else None
        for start in range(0, n_rows, chunk):
            rows = slice(start, min(start + chunk, n_rows))
            hidden_CH, label_C1, dead_C = hidden_MH[rows].to(compute), labels_M[rows, None], ~live_M[rows]
            softmax = head.softmax(hidden_CH, weight_VH, bias_V)
            log_probs_C = softmax.log_probs_CV.gather(1, label_C1).squeeze(1)
            log_probs_M[rows] = log_probs_C.masked_fill(dead_C, 0.0)
            entropy_M[rows] = softmax.entropy_C.masked_fill(dead_C, 0.0)
            is_top1_M[rows] = (softmax.top_C == label_C1.squeeze(1)) & live_M[rows]
            if any(needs):
                grad_CV = softmax.probs_CV
                grad_CV.scatter_add_(1, label_C1, grad_CV.new_full((1, 1), -1.0).expand(label_C1.shape))
                if dft:
                    grad_CV.mul_(log_probs_C.exp()[:, None])
                # A fill, not a product: an ignored row may hold NaN.
                grad_CV.masked_fill_(dead_C[:, None], 0.0)
                sums.add(rows, head.chain(grad_CV, softmax), hidden_CH, weight_VH)
    return log_probs_M, entropy_M, is_top1_M, *sums.get()


@score.register_fake
def _(
    hidden: Any, weight: Any, bias: Any, labels: Any, live: Any, scale: Any, cap: Any, compute: Any, chunk: Any,
    dft: Any, needs: Any,
) -> Any:  # fmt: skip
    log_probs = hidden.new_empty(hidden.shape[0], dtype=math_dtype(compute))
    is_top1 = hidden.new_empty(hidden.shape[0], dtype=torch.bool)
    return log_probs, torch.empty_like(log_probs), is_top1, *_Sums(hidden, weight, needs, compute).get()


@torch.library.custom_op(
    "chronicals_trl::linear_cross_entropy_recompute",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor live, float logit_scale, "
    "float? softcap, ScalarType compute, SymInt chunk, Tensor grad_log_probs, Tensor? grad_entropy, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
)
def recompute(
    hidden_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_M: torch.Tensor,
    live_M: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    chunk: int,
    grad_log_probs_M: torch.Tensor,
    grad_entropy_M: torch.Tensor | None,
    needs: list[bool],
) -> Any:
    """Gradients from one coefficient a token for log_probs and entropy each, the logits computed once more.

    d log_prob / d logit = onehot - p,    d entropy / d logit = -p (log p + entropy)
    """
    head = _Head(logit_scale, softcap, compute)
    sums = _Sums(hidden_MH, weight_VH, needs, compute)
    n_rows = hidden_MH.shape[0]
    with torch.autocast(hidden_MH.device.type, enabled=False):
        weight_VH = weight_VH.to(compute)
        bias_V = bias_V.to(compute) if bias_V is not None else None
        for start in range(0, n_rows, chunk):
            rows = slice(start, min(start + chunk, n_rows))
            hidden_CH = hidden_MH[rows].to(compute)
            softmax = head.softmax(hidden_CH, weight_VH, bias_V)
            if grad_entropy_M is None:
                grad_CV = softmax.probs_CV.mul_(-grad_log_probs_M[rows, None])
            else:
                grad_CV = (softmax.log_probs_CV + softmax.entropy_C[:, None]).mul_(grad_entropy_M[rows, None])
                grad_CV.add_(grad_log_probs_M[rows, None]).mul_(softmax.probs_CV).neg_()
            grad_CV.scatter_add_(1, labels_M[rows, None], grad_log_probs_M[rows, None])
            grad_CV.masked_fill_(~live_M[rows, None], 0.0)
            sums.add(rows, head.chain(grad_CV, softmax), hidden_CH, weight_VH)
    return sums.get()


@recompute.register_fake
def _(
    hidden: Any, weight: Any, bias: Any, labels: Any, live: Any, scale: Any, cap: Any, compute: Any, chunk: Any,
    grad_log_probs: Any, grad_entropy: Any, needs: Any,
) -> Any:  # fmt: skip
    return _Sums(hidden, weight, needs, compute).get()
