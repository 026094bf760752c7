"""The head's products as our head makes them: chunk by chunk to logits, to hidden's gradient and to the weight's."""

from __future__ import annotations

import torch

from chronicals_trl.bench.sft.cases import Shape
from chronicals_trl.bench.sft.floor_ops import GEMM, Op, product
from chronicals_trl.kernels._cross_entropy_chunks import (
    FEWEST_ROWS,
    _pitched,
    _WeightSum,
    automatic_budget_mib,
    plan,
)

__all__ = ["chunk_rows", "head_ops"]

BF16 = torch.bfloat16


def chunk_rows(shape: Shape, mode: str, master: str, tokens: int, kernels: bool) -> int:
    """Positions in a chunk, with the budget that our head takes by itself."""
    trained = mode == "full"
    narrowed = trained and master == "bf16"
    budget = automatic_budget_mib(tokens, shape.vocab, shape.hidden, BF16, narrowed=narrowed, kernels=kernels)
    cut = plan(tokens, shape.vocab, BF16, budget, trainable=trained, kernels=kernels)
    return cut.rows if cut.columns == shape.vocab else min(tokens, FEWEST_ROWS)


def head_ops(shape: Shape, mode: str, master: str, tokens: int, device: torch.device) -> list[Op]:
    """Of N positions of hidden (N, H), each scored, with the weight (V, H)."""
    rows = chunk_rows(shape, mode, master, tokens, kernels=device.type != "cpu")
    hidden = torch.empty(tokens, shape.hidden, dtype=BF16, device=device)
    weight = torch.empty(shape.vocab, shape.hidden, dtype=BF16, device=device)
    logits = _pitched(rows, shape.vocab, BF16, device)[:, : shape.vocab]
    if device.type != "meta":
        hidden.normal_()
        weight.normal_(0.0, shape.hidden**-0.5)
    d_hidden = torch.empty_like(hidden)
    d_weight = None
    if mode == "full":
        beside = None
        if master == "bf16" and rows < tokens:
            beside = torch.empty(_WeightSum.shape_beside(weight.shape), device=device)
        d_weight = _WeightSum(weight.shape, BF16 if master == "bf16" else torch.float32, device, beside)
    ops = []
    for start in range(0, tokens, rows):
        part = slice(start, min(start + rows, tokens))
        chunk = logits[: part.stop - part.start]
        ops.append(product("logits", chunk, hidden[part], weight.t()))
        ops.append(product("logits dx", d_hidden[part], chunk, weight))
        if d_weight is not None:
            ops.append(_weight_product(d_weight, chunk, hidden[part], first=start == 0))
    return ops


def _weight_product(total: _WeightSum, chunk: torch.Tensor, hidden: torch.Tensor, first: bool) -> Op:
    def call() -> None:
        total.empty = first
        total.add(chunk, hidden)

    return Op(GEMM, "logits dW", call, 2.0 * chunk.shape[0] * chunk.shape[1] * hidden.shape[1])
