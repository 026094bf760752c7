"""What the lookup in a tied weight has to give, on any device: torch's gradient, in the head's memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kernels.kernel_checks import assert_as_accurate
from torch import Tensor

from chronicals_trl.kernels import linear_cross_entropy
from chronicals_trl.kernels._embedding_rows import add_embedding_rows, tied_embedding

# Ids (shape), vocabulary, width: below, at and above a tile's rows and columns; the third has runs of several tiles.
SHAPES: list[tuple[tuple[int, ...], int, int]] = [((1,), 5, 1), ((64,), 7, 128), ((500,), 3, 130), ((3, 37), 211, 300)]


class Case(NamedTuple):
    total: Tensor
    grad: Tensor
    ids: Tensor


def make(device: str, dtype: torch.dtype, shape: Any, vocabulary: int, width: int, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, shape, generator=generator)
    ids.view(-1)[: ids.numel() // 2] = vocabulary - 1  # as common as a token gets
    ids = ids.view(-1)[torch.randperm(ids.numel(), generator=generator)].view(shape)
    total = torch.randn(vocabulary, width, generator=generator)
    grad = torch.randn(*shape, width, generator=generator)
    return Case(total.to(device, dtype), grad.to(device, dtype), ids.to(device))


def exact(case: Case, padding_idx: int | None = None) -> Tensor:
    ids, grad = case.ids.flatten(), case.grad.flatten(0, -2).double()
    if padding_idx is not None:
        grad = grad * (ids != padding_idx)[:, None]
    return case.total.double().index_add(0, ids.long(), grad)


def check_rows(
    case: Case, padding_idx: int | None = None, *, grad: Tensor | None = None, ids: Tensor | None = None
) -> None:
    """`grad`, `ids`: the same values, in another dtype or layout."""
    total, vocabulary = case.total.clone(), case.total.shape[0]
    given = case.grad if grad is None else grad, case.ids if ids is None else ids
    assert add_embedding_rows(total, *given, padding_idx) is total
    padding = -1 if padding_idx is None else padding_idx
    dense = torch.ops.aten.embedding_dense_backward(case.grad, case.ids, vocabulary, padding, False)
    assert_as_accurate("rows", total, case.total + dense, exact(case, padding_idx), total.dtype)
    kept = torch.ones(vocabulary, dtype=torch.bool, device=total.device)
    kept[case.ids.flatten()] = False
    if padding_idx is not None:
        kept[padding_idx] = True
    assert torch.equal(total[kept], case.total[kept])
    assert not torch.equal(total[~kept], case.total[~kept]) or bool(kept.all())


def check_one_rounding(device: str, dtype: torch.dtype) -> None:
    """Terms that each vanish in the sum's dtype do not vanish together: rows and total meet in float32."""
    eps = torch.finfo(dtype).eps
    total = torch.ones(2, 4, device=device, dtype=dtype)
    grad = torch.full((204, 4), eps / 8, device=device, dtype=dtype)
    grad[0] = 1.0  # with which the rest of the rows, summed in the dtype one by one, would be lost
    add_embedding_rows(total, grad, torch.ones(204, dtype=torch.int64, device=device))
    # 25.375 eps more than 2, where numbers are 2 eps apart; rows that were rounded first would give 24 of them.
    wanted = torch.tensor(2.0 + 203 * eps / 8, dtype=torch.float64).to(dtype).item()
    assert wanted == 2.0 + 26 * eps
    assert total.tolist() == [[1.0] * 4, [wanted] * 4]


def check_deterministic(device: str, dtype: torch.dtype, shape: Any, vocabulary: int, width: int) -> None:
    """To the bit, however often."""
    case = make(device, dtype, shape, vocabulary, width)
    first = add_embedding_rows(case.total.clone(), case.grad, case.ids)
    for _ in range(3):
        assert torch.equal(add_embedding_rows(case.total.clone(), case.grad, case.ids), first)


def losses(
    weight: Tensor, ids: Tensor, *, tied: bool, padding_idx: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, something in place of the layers, and the head: (rows, hidden, loss)."""
    if tied:
        rows, head_weight = tied_embedding(ids, weight, padding_idx)
    else:
        rows, head_weight = F.embedding(ids, weight, padding_idx), weight
    hidden = torch.tanh(rows * 3).roll(1, 0)
    labels = ids.flatten().roll(-2)
    loss = linear_cross_entropy(hidden.flatten(0, -2), head_weight, labels, num_items=labels.numel()).loss
    return rows, hidden, loss


def weight_and_ids(device: str, dtype: torch.dtype, vocabulary: int = 53, width: int = 24) -> tuple[Tensor, Tensor]:
    case = make(device, dtype, (2, 40), vocabulary, width)
    return (case.total * 0.3).requires_grad_(), case.ids


def check_gradient(device: str, dtype: torch.dtype, padding_idx: int | None = None, **sizes: int) -> None:
    """Through lookup and head, in `dtype`, no farther from float64 than with torch's own lookup."""
    weight, ids = weight_and_ids(device, dtype, **sizes)
    wide = weight.detach().double().requires_grad_()

    def gradient(weight: Tensor, tied: bool) -> Tensor:
        *_, loss = losses(weight, ids, tied=tied, padding_idx=padding_idx)
        return torch.autograd.grad(loss, weight)[0]

    found, torchs, right = gradient(weight, True), gradient(weight, False), gradient(wide, False)
    assert_as_accurate("weight", found, torchs, right, dtype)
    errors = [(g.double() - right).norm().item() for g in (found, torchs)]
    assert errors[0] <= 1.02 * errors[1], errors
