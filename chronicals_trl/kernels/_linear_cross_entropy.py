"""Cross-entropy of a linear head without ever holding all of its logits.

Source of the idea: Cut Cross-Entropy, Wijmans et al. 2024, https://arxiv.org/abs/2411.09009, and Liger Kernel's
gradient in the forward pass, Hsu et al. 2024, https://arxiv.org/abs/2410.10989. Tokens go through in chunks, in
`_cross_entropy_chunks`; this file holds the autograd wiring, the definition to test against, and the public function.

What is differentiated decides which gradients are used. The loss is a known sum, so its gradient is formed in the
forward pass, unscaled (p - onehot does not underflow in float16), and only scaled in the backward pass. log_probs and
entropy may be given any gradient per token, so theirs recomputes the logits. Both together add.

Legend: N tokens, M of them scored, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ._common import math_dtype
from ._cross_entropy_chunks import chunk_rows, recompute, score

_DIFFERENTIATE = ("all", "loss", "tokens")


class LinearCrossEntropyOutput(NamedTuple):
    """What `linear_cross_entropy` returns; all but a reduced loss is (N,) and zero (False) on rows not scored.

    Attributes:
        loss: float32 scalar, or (N,) with reduction "none".
        log_probs: float32, the log-probability of each label.
        entropy: float32, in nats, of each predicted distribution.
        is_top1: bool, whether the label is the (first) most likely token.
    """

    loss: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_M: torch.Tensor,
        live_M: torch.Tensor,
        scale: torch.Tensor | None,
        head: tuple[float, float | None, torch.dtype, int],
        dft: bool,
        differentiate: str,
        needs: tuple[bool, bool, bool],
    ) -> Any:
        # A gradient summed over tokens in advance is right only if each token's share of the loss is known by now.
        early = differentiate != "tokens" and scale is not None
        log_probs_M, entropy_M, is_top1_M, *grads = score(
            hidden_MH, weight_VH, bias_V, labels_M, live_M, *head, dft, list(needs) if early else [False] * 3
        )
        loss_M = -log_probs_M * log_probs_M.exp() if dft else -log_probs_M
        loss = loss_M if scale is None else loss_M.sum() * scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(is_top1_M, *((log_probs_M, entropy_M) if differentiate == "loss" else ()))
        ctx.head, ctx.dft, ctx.needs, ctx.early = head, dft, needs, early
        ctx.dtypes = hidden_MH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype
        inputs = (None, None, None) if differentiate == "loss" and early else (hidden_MH, weight_VH, bias_V)
        ctx.save_for_backward(*inputs, labels_M, live_M, scale, log_probs_M if dft else None, *grads)
        return loss, log_probs_M, entropy_M, is_top1_M

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> Any:
        grad_loss, grad_log_probs_M, grad_entropy_M, _ = upstream
        hidden_MH, weight_VH, bias_V, labels_M, live_M, scale, log_probs_M, *early = ctx.saved_tensors
        totals: list[torch.Tensor | None] = [None, None, None]
        if grad_loss is not None:
            share = grad_loss if scale is None else grad_loss * scale
            if ctx.early:
                # In float32, also for 16-bit gradients: one token's share, or a loss scale, may be beyond float16. And
                # not in place: what is saved here is needed again if the graph is retained.
                totals = [g.to(share.dtype) * share if n else None for g, n in zip(early, ctx.needs, strict=True)]
            else:
                share = -share.expand(labels_M.shape) * (1.0 if log_probs_M is None else log_probs_M.exp())
                grad_log_probs_M = share if grad_log_probs_M is None else grad_log_probs_M + share
        if hidden_MH is not None and (grad_log_probs_M is not None or grad_entropy_M is not None):
            if grad_log_probs_M is None:
                grad_log_probs_M = torch.zeros(labels_M.shape, dtype=math_dtype(ctx.head[2]), device=labels_M.device)
            late = recompute(
                hidden_MH, weight_VH, bias_V, labels_M, live_M, *ctx.head,
                grad_log_probs_M, grad_entropy_M, list(ctx.needs),
            )  # fmt: skip
            totals = [
                (g if t is None else t + g) if need else None
                for t, g, need in zip(totals, late, ctx.needs, strict=True)
            ]
        return *(None if t is None else t.to(d) for t, d in zip(totals, ctx.dtypes, strict=True)), *([None] * 7)


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | torch.Tensor | None = None,
    weighting: str = "none",
) -> LinearCrossEntropyOutput:
    """`linear_cross_entropy` from all N x V logits at once: its definition, and what tests compare with."""
    live = labels != ignore_index
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(math_dtype(logits.dtype)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    all_log_probs = logits.log_softmax(-1)
    target = labels.masked_fill(~live, 0)
    log_probs = all_log_probs.gather(1, target[:, None]).squeeze(1).masked_fill(~live, 0.0)
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1).masked_fill(~live, 0.0)
    loss = -log_probs * log_probs.detach().exp() if weighting == "dft" else -log_probs
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / torch.as_tensor(live.sum() if num_items is None else num_items, device=loss.device).clamp(min=1)
    return LinearCrossEntropyOutput(loss, log_probs, entropy, (logits.argmax(-1) == target) & live)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    softcap: float | None,
    num_items: int | torch.Tensor | None,
    logit_budget_mib: int,
    choices: tuple[tuple[str, str, tuple[str, ...]], ...],
) -> None:
    op = "linear_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; they must be (N, H) and "
            "(V, H): flatten batch and sequence."
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{op}: labels has shape {tuple(labels.shape)}; it must be (N,) = ({hidden.shape[0]},).")
    if rows is not None and rows.dim() != 1:
        raise ValueError(f"{op}: rows has shape {tuple(rows.shape)}; it must be (M,), the rows to score.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; it must be (V,) = ({weight.shape[0]},).")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap is {softcap}; it must be positive, or None for no cap.")
    if logit_budget_mib < 1:
        raise ValueError(f"{op}: logit_budget_mib is {logit_budget_mib}; it must be at least 1.")
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{op}: {name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")
    if num_items is not None and choices[0][1] != "mean":
        raise ValueError(f"{op}: num_items divides the loss, so it needs reduction='mean', not {choices[0][1]!r}.")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | torch.Tensor | None = None,
    weighting: str = "none",
    logit_budget_mib: int = 1024,
    differentiate: str = "all",
) -> LinearCrossEntropyOutput:
    """Cross-entropy of ``hidden @ weight.T + bias`` with `labels` (already shifted), never holding all the logits.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), as TRL orders them. The softmax is
    float32 whatever the dtype of the GEMMs; gradients come in the dtypes of the tensors they belong to. Nothing waits
    for the GPU.

    Args:
        hidden: (N, H), bf16, fp16, fp32 or fp64.
        weight: (V, H), hidden's dtype; under autocast any, and the GEMMs run in autocast's dtype.
        labels: (N,) int64, `ignore_index` where a row is not scored.
        rows: (M,) int64, the only rows to compute: all labelled ones, each once. What pads it to a static length must
            be -1, or the index of an ignored row. None computes all rows.
        bias: (V,).
        logit_scale, softcap: multiplier and cap of the logits.
        reduction: "mean" (sum / `num_items`), "sum", or "none" (loss is (N,)).
        num_items: int or 0-d tensor, what "mean" divides by, clamped to 1; by default the number of labelled rows.
        weighting: "none", or "dft": each token's loss times its own probability, detached (Wu et al. 2025,
            https://arxiv.org/abs/2508.05629).
        logit_budget_mib: memory for logits and what is made of them, MiB; at least one row is always computed.
        differentiate: which outputs carry gradients, and so when they are formed. "all": the loss's in the forward
            pass, those of log_probs and entropy in the backward pass if they are used. "loss": log_probs and entropy
            are detached, and hidden and weight need not be kept. "tokens": all in the backward pass. torch.compile
            hands every output a gradient, zero if unused: choose "loss" or "tokens" there; "all" is right but does
            both.

    Returns:
        A LinearCrossEntropyOutput. With nothing labelled the loss is 0 and so are all gradients (they are not None).

    Raises:
        ValueError: shapes, dtypes or choices that do not fit, each named.
    """
    _check(
        hidden, weight, labels, rows, bias, softcap, num_items, logit_budget_mib,
        (
            ("reduction", reduction, ("mean", "sum", "none")),
            ("weighting", weighting, ("none", "dft")),
            ("differentiate", differentiate, _DIFFERENTIATE),
        ),
    )  # fmt: skip
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        compute = torch.get_autocast_dtype(device)
    elif weight.dtype == hidden.dtype and (bias is None or bias.dtype == hidden.dtype):
        compute = hidden.dtype
    else:
        raise ValueError(
            f"linear_cross_entropy: hidden is {hidden.dtype}, weight {weight.dtype}"
            + (f", bias {bias.dtype}" if bias is not None else "")
            + "; without autocast they must be equal: cast hidden, or use torch.autocast."
        )
    n_rows = hidden.shape[0]
    if rows is not None:
        padding_M = rows < 0
        rows = rows.masked_fill(padding_M, 0)
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
        labels = labels.masked_fill(padding_M, ignore_index)
    live_M = labels != ignore_index
    one = torch.ones((), dtype=math_dtype(compute), device=hidden.device)
    scale = one if reduction == "sum" else None  # None: a loss per token
    if reduction == "mean":
        items = live_M.sum() if num_items is None else torch.as_tensor(num_items).to(hidden.device, non_blocking=True)
        scale = one / items.clamp(min=1)
    grad_enabled = torch.is_grad_enabled()  # it is always off inside the Function
    needs = tuple(grad_enabled and t is not None and t.requires_grad for t in (hidden, weight, bias))
    chunk = chunk_rows(max(1, hidden.shape[0]), weight.shape[0], compute.itemsize, logit_budget_mib)
    loss, log_probs, entropy, is_top1 = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels.masked_fill(~live_M, 0), live_M, scale,
        (float(logit_scale), softcap if softcap is None else float(softcap), compute, chunk),
        weighting == "dft", differentiate, needs,
    )  # fmt: skip
    if rows is not None:
        # Added, not assigned: padding names a row a second time, with zeros.
        log_probs, entropy = (t.new_zeros(n_rows).index_add(0, rows, t) for t in (log_probs, entropy))
        loss = loss.new_zeros(n_rows).index_add(0, rows, loss) if reduction == "none" else loss
        is_top1 = torch.zeros(n_rows, device=hidden.device).index_add(0, rows, is_top1.float()) > 0
    return LinearCrossEntropyOutput(loss, log_probs, entropy, is_top1)
