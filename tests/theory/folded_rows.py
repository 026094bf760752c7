"""The online softmax as the Triton kernels do it, in the interpreter: printed as JSON, largest errors by quantity.

    TRITON_INTERPRET=1 python tests/theory/folded_rows.py

Rows of 1,500 float32 logits are cut at random columns; `fold_pass` folds the pieces one after another into its running
values. They are compared with the states of docs/theory/online-softmax.md, in float64, and the whole row's statistics
with those of one `softmax_pass`.
"""

from __future__ import annotations

import json
import math
import sys
from functools import reduce
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from theory import online_softmax  # noqa: E402

from chronicals_trl.kernels import LAUNCHES  # noqa: E402
from chronicals_trl.kernels import _cross_entropy_pass as kernel_pass  # noqa: E402

VOCAB = 1500
HEAD = kernel_pass.Head(1.0, None)


def rows() -> torch.Tensor:
    """Logits of scale 0.001, 1 and 1000; one huge; a fifth minus infinity; ascending, so that each piece shifts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, VOCAB, generator=generator)
    logits[0] *= 1e-3
    logits[2] *= 1e3
    logits[3, 700] = 3e4
    logits[4, torch.rand(VOCAB, generator=generator) < 0.2] = -math.inf
    logits[5] = torch.linspace(-3e3, 3e3, VOCAB)
    return logits


def errors(pieces: int) -> dict[str, float]:
    logits = rows()
    generator = torch.Generator().manual_seed(pieces)
    cuts = torch.randperm(VOCAB - 1, generator=generator)[: pieces - 1].add(1).sort().values.tolist()
    # A label whose logit is finite in every row.
    labels = logits.argmax(-1)
    running = kernel_pass.Running.start(len(logits), logits.device)
    for start, stop in zip([0, *cuts], [*cuts, VOCAB], strict=True):
        kernel_pass.fold_pass(logits[:, start:stop].contiguous(), start, labels, running, HEAD)
    folded, whole = (kernel_pass.Statistics.empty(len(logits), torch.float32, logits.device) for _ in range(2))
    running.finish(labels, HEAD, folded)
    kernel_pass.softmax_pass(logits.clone(), labels, whole, HEAD, None)
    found = {"peak": 0.0, "total": 0.0, "log_sum_exp": 0.0, "one_pass": 0.0}
    for i, row in enumerate(logits.tolist()):
        state = reduce(online_softmax.merge, map(online_softmax.of_logit, row))
        lse = online_softmax.log_sum_exp(state)
        of_row = {
            "peak": abs(running.peak[i].item() - state.peak),
            "total": abs(running.total[i].item() / state.total - 1),
            "log_sum_exp": abs(folded.log_sum_exp[i].item() - lse) / (1 + abs(lse)),
            "one_pass": abs(whole.log_sum_exp[i].item() - lse) / (1 + abs(lse)),
        }
        # Not max(): it would pass over NaN.
        found = {key: value if not value <= found[key] else found[key] for key, value in of_row.items()}
    return found


if __name__ == "__main__":
    print(json.dumps({"errors": {n: errors(n) for n in (1, 2, 7)}, "launches": dict(LAUNCHES)}))
