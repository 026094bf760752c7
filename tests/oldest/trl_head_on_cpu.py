"""A pytest plugin for `make test-oldest`: TRL 1.15's head on a CPU.

Stock TRL 1.15 has its head in Triton alone: on a CPU it fails, with the interpreter or without triton too. 1.16 folds
the same tiles in torch there. Tests that compare with stock TRL need one that runs, so the function behind 1.15's head
is replaced by its definition, for the process of the tests. Nothing of ours is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class PlainLogProbs:
    """In the place of `trl.kernels.ChunkedLogProbFunction`, of which TRL calls `apply` alone."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """hidden (N, H), weight (V, H), targets (N,) -> log-probabilities, entropy, -, -, is_top1, each (N,)."""
        logits = F.linear(hidden, weight, bias).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_probs = (logits / temperature).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1) if "entropy" in outputs else None
        is_top1 = log_probs.argmax(-1) == targets if "is_top1" in outputs else None
        return log_probs.gather(1, targets[:, None]).squeeze(1), entropy, None, None, is_top1


def pytest_configure(config: Any) -> None:
    import trl
    from trl.trainer import utils

    if trl.__version__.startswith("1.15.") and not torch.cuda.is_available():
        utils._ChunkedLogProbFunction = PlainLogProbs
