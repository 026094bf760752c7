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
from torch.autograd.function import once_differentiable

from ._common import math_dtype
from ._cross_entropy_chunks import recompute, score
from ._cross_entropy_pass import scale_unless_one

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
        label_M: torch.Tensor,
        scale: torch.Tensor | None,
        head: tuple[float, float | None, torch.dtype, int | None],
        dft: bool,
        z_loss: float,
        differentiate: str,
        needs: tuple[bool, bool, bool],
    ) -> Any:
        # A gradient summed over tokens in advance is right only if each token's share of the loss is known by now.
        early = differentiate != "tokens" and scale is not None
        log_prob_M, entropy_M, lse_M, is_top1_M, *grads = score(
            hidden_MH, weight_VH, bias_V, label_M, scale, *head, dft, z_loss, list(needs) if early else [False] * 3
        )
        loss_M = -log_prob_M * log_prob_M.exp() if dft else -log_prob_M
        if z_loss:
            loss_M = loss_M + z_loss * lse_M.square()
        loss = loss_M if scale is None else loss_M.sum() * scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(is_top1_M, *((log_prob_M, entropy_M) if differentiate == "loss" else ()))
        ctx.head, ctx.dft, ctx.z_loss, ctx.needs, ctx.early = head, dft, z_loss, needs, early
        ctx.dtypes = hidden_MH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype
        inputs = (None, None, None) if differentiate == "loss" and early else (hidden_MH, weight_VH, bias_V)
        # Not among the saved tensors, which autograd holds on to: so the weight gradient is handed over, not copied.
        ctx.handed_over = None if torch.compiler.is_compiling() else grads
        kept = grads if torch.compiler.is_compiling() else []
        ctx.save_for_backward(
            *inputs, label_M, scale, log_prob_M if dft else None, lse_M if z_loss else None, *kept
        )  # fmt: skip
        return loss, log_prob_M, entropy_M, is_top1_M

    @staticmethod
    @once_differentiable  # the loss's gradients are plain tensors: a second derivative would miss their part
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> Any:
        grad_loss, grad_log_prob_M, grad_entropy_M, _ = upstream
        hidden_MH, weight_VH, bias_V, label_M, scale, log_prob_M, lse_M, *grads = ctx.saved_tensors
        compute = ctx.head[2]
        handed_over = False
        if not grads and ctx.handed_over is not None:
            grads, handed_over, ctx.handed_over = ctx.handed_over, True, None
        grad_lse_M = None
        totals: list[torch.Tensor | None] = [None, None, None]
        if grad_loss is not None:
            if ctx.early and grads:
                # float16's are in float32 and not scaled yet: one token's share, or a loss scale, may be beyond it.
                share = grad_loss * scale if compute == torch.float16 else grad_loss
                totals = [
                    None if not need else _scaled(grad, share, handed_over, compute)
                    for grad, need in zip(grads, ctx.needs, strict=True)
                ]
            elif ctx.early and hidden_MH is None:
                raise RuntimeError(
                    "linear_cross_entropy: the gradients of this loss have been handed out in a first backward pass "
                    "and differentiate='loss' keeps nothing to form them again: use differentiate='all'."
                )
            else:
                share = (grad_loss if scale is None else grad_loss * scale).expand(label_M.shape)
                if lse_M is not None:
                    grad_lse_M = share * (2 * ctx.z_loss) * lse_M
                share = -share * (1.0 if log_prob_M is None else log_prob_M.exp())
                grad_log_prob_M = share if grad_log_prob_M is None else grad_log_prob_M + share
        if hidden_MH is not None and (grad_log_prob_M is not None or grad_entropy_M is not None):
            if grad_log_prob_M is None:
                grad_log_prob_M = torch.zeros(label_M.shape, dtype=math_dtype(compute), device=label_M.device)
            late = recompute(
                hidden_MH, weight_VH, bias_V, label_M, *ctx.head,
                grad_log_prob_M, grad_entropy_M, grad_lse_M, list(ctx.needs),
            )  # fmt: skip
            totals = [
                (g if t is None else t + g) if need else None
                for t, g, need in zip(totals, late, ctx.needs, strict=True)
            ]
        return *(None if t is None else t.to(d) for t, d in zip(totals, ctx.dtypes, strict=True)), *([None] * 7)


def _scaled(grad: torch.Tensor, share: torch.Tensor, ours: bool, compute: torch.dtype) -> torch.Tensor:
    """`grad * share`; in place, at no cost for a share of one, if nobody else will read `grad`."""
    if compute == torch.float16:
        return grad.to(share.dtype) * share
    return scale_unless_one(grad, share) if ours else grad * share.to(grad.dtype)


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
    z_loss: float = 0.0,
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
    loss = loss + z_loss * logits.logsumexp(-1).square().masked_fill(~live, 0.0)
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
    logit_scale: float,
    z_loss: float,
    logit_budget_mib: int | None,
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
    if not logit_scale > 0:
        raise ValueError(f"{op}: logit_scale is {logit_scale}; it must be positive.")
    if not z_loss >= 0:
        raise ValueError(f"{op}: z_loss is {z_loss}; it must be at least 0, which is none.")
    if logit_budget_mib is not None and logit_budget_mib < 1:
        raise ValueError(f"{op}: logit_budget_mib is {logit_budget_mib}; it must be at least 1, or None.")
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
    z_loss: float = 0.0,
    logit_budget_mib: int | None = None,
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
        logit_scale, softcap: multiplier and cap of the logits; positive.
        reduction: "mean" (sum / `num_items`), "sum", or "none" (loss is (N,)).
        num_items: int or 0-d tensor, what "mean" divides by, clamped to 1; by default the number of labelled rows.
        weighting: "none", or "dft": each token's loss times its own probability, detached (Wu et al. 2025,
            https://arxiv.org/abs/2508.05629).
        z_loss: coefficient of the squared log-sum-exp in each token's loss (PaLM, Chowdhery et al. 2022,
            https://arxiv.org/abs/2204.02311).
        logit_budget_mib: memory for logits, MiB; at least one row is always computed. None: as much as leaves the peak
            of the whole op no higher than that of TRL's fused head, at most 1,024. A small one (135) costs time.
        differentiate: which outputs carry gradients, and so when they are formed. "all": the loss's in the forward
            pass, those of log_probs and entropy in the backward pass if they are used. "loss": log_probs and entropy
            are detached, and hidden and weight need not be kept. "tokens": all in the backward pass. torch.compile
            hands every output a gradient, zero if unused: choose "loss" or "tokens" there; "all" is right but does
            both. A second backward pass (`retain_graph`) recomputes with "all", and is an error with "loss".

    Returns:
        A LinearCrossEntropyOutput. With nothing labelled the loss is 0 and so are all gradients (they are not None).

    Raises:
        ValueError: shapes, dtypes or choices that do not fit, each named.
    """
    _check(
        hidden, weight, labels, rows, bias, softcap, num_items, logit_scale, z_loss, logit_budget_mib,
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
        scale = (one / items.clamp(min=1)).to(one.dtype)  # whatever dtype a count on the device has
    grad_enabled = torch.is_grad_enabled()  # it is always off inside the Function
    needs = tuple(grad_enabled and t is not None and t.requires_grad for t in (hidden, weight, bias))
    loss, log_probs, entropy, is_top1 = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels.masked_fill(~live_M, -1), scale,
        (float(logit_scale), softcap if softcap is None else float(softcap), compute, logit_budget_mib),
        weighting == "dft", float(z_loss), differentiate, needs,
    )  # fmt: skip
    if rows is not None:
        # Added, not assigned: padding names a row a second time, with zeros.
        log_probs, entropy = (t.new_zeros(n_rows).index_add(0, rows, t) for t in (log_probs, entropy))
        loss = loss.new_zeros(n_rows).index_add(0, rows, loss) if reduction == "none" else loss
        is_top1 = torch.zeros(n_rows, device=hidden.device).index_add(0, rows, is_top1.float()) > 0
    return LinearCrossEntropyOutput(loss, log_probs, entropy, is_top1)
