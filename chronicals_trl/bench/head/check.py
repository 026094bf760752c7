"""The head's loss and gradients in float64 on a sample of them, at the size that is timed.

For a sample of tokens the gradient of hidden is exact, and for a sample of the vocabulary that of weight: half of the
latter are labels of the batch, half are not (unless by chance). All tokens' logits are made in float64 for it, a chunk
at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from chronicals_trl.bench.common import finite
from chronicals_trl.bench.head.cases import Problem

__all__ = ["Errors", "Reference"]

SAMPLED_TOKENS, SAMPLED_VOCAB = 128, 256
CHUNK_BYTES = 2**30

# A side beyond these gets no time. bf16 logits (rounded at 16, they are off by up to 0.06) come to a tenth of them; a
# gradient that misses a factor, a chunk or the label exceeds them.
LOSS_BOUND, GRADIENT_BOUND = 5e-3, 0.1


@dataclass(frozen=True)
class Errors:
    """Deviation from float64; None if it is not finite or (weight, frozen) there is no gradient.

    Args:
        loss: Relative.
        hidden_rms, hidden_max, weight_rms, weight_max: Of the sampled rows of a gradient: the root mean square of the
            error, and its largest element, each over the root mean square of the reference.
    """

    loss: float | None
    hidden_rms: float | None
    hidden_max: float | None
    weight_rms: float | None = None
    weight_max: float | None = None

    def too_large(self, frozen: bool) -> str | None:
        """Why this is a wrong answer, or None."""
        bounds = [("loss", self.loss, LOSS_BOUND), ("gradient of hidden", self.hidden_rms, GRADIENT_BOUND)]
        if not frozen:
            bounds.append(("gradient of weight", self.weight_rms, GRADIENT_BOUND))
        for what, error, bound in bounds:
            if error is None:
                return f"{what} is not finite"
            if error > bound:
                return f"{what} off from fp64 by {error:.2g} (bound {bound:g})"
        return None


class Reference:
    """The sampled results of a `Problem`, of the mean loss, in float64."""

    def __init__(self, problem: Problem) -> None:
        hidden, weight, labels = problem.hidden.detach(), problem.weight.detach(), problem.labels
        tokens, vocab = hidden.shape[0], weight.shape[0]
        generator = torch.Generator(hidden.device).manual_seed(1)

        def draw(total: int, count: int) -> torch.Tensor:
            return torch.randperm(total, generator=generator, device=hidden.device)[:count]

        self.tokens = draw(tokens, SAMPLED_TOKENS)
        of_labels = labels[draw(tokens, SAMPLED_VOCAB // 2)]
        self.vocab = torch.cat((of_labels, draw(vocab, SAMPLED_VOCAB // 2))).unique()
        weight_VH = weight.double()
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_weight = torch.zeros(len(self.vocab), weight.shape[1], dtype=torch.float64, device=hidden.device)
        chunk = max(1, CHUNK_BYTES // (8 * vocab))
        for hidden_CH, labels_C in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            hidden_CH = hidden_CH.double()
            logits_CV = hidden_CH @ weight_VH.t()
            log_sum_exp_C1 = logits_CV.logsumexp(1, keepdim=True)
            loss += (log_sum_exp_C1 - logits_CV.gather(1, labels_C[:, None])).sum()
            grad_CS = (logits_CV[:, self.vocab] - log_sum_exp_C1).exp_()
            grad_CS -= (labels_C[:, None] == self.vocab).double()
            grad_weight += grad_CS.t() @ hidden_CH
        grad_TV = (hidden[self.tokens].double() @ weight_VH.t()).softmax(1)
        grad_TV.scatter_add_(1, labels[self.tokens, None], grad_TV.new_full((len(self.tokens), 1), -1.0))
        self.loss = float(loss / tokens)
        self.grad_hidden = grad_TV @ weight_VH / tokens
        self.grad_weight = grad_weight / tokens

    def errors(self, loss: float, grad_hidden: torch.Tensor, grad_weight: torch.Tensor | None) -> Errors:
        """Of a side's loss and gradients."""
        hidden = _deviation(grad_hidden[self.tokens], self.grad_hidden)
        weight = (None, None) if grad_weight is None else _deviation(grad_weight[self.vocab], self.grad_weight)
        return Errors(finite(abs(loss - self.loss) / abs(self.loss)), *hidden, *weight)


def _deviation(found: torch.Tensor, exact: torch.Tensor) -> tuple[float | None, float | None]:
    error = found.double() - exact
    size = float(exact.square().mean().sqrt())
    rms, worst = float(error.square().mean().sqrt()) / size, float(error.abs().max()) / size
    return (finite(rms), finite(worst)) if math.isfinite(rms) else (None, None)
