"""The lookup in a tied weight on the CPU: the reference, or the kernel, interpreted (`test_interpreter.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import embedding_checks as check
from torch import Tensor

from chronicals_trl.kernels import LAUNCHES, _common, _embedding_rows
from chronicals_trl.kernels._embedding_rows import tied_embedding

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
paddings = pytest.mark.parametrize("padding_idx", [None, 2])


@pytest.fixture
def launched():
    LAUNCHES.clear()
    yield
    assert LAUNCHES["add_embedding_rows"] > 0 or not _common.INTERPRET


launches = pytest.mark.usefixtures("launched")


# -- the addition ----------------------------------------------------------------------------------------------------


@dtypes
@paddings
@pytest.mark.parametrize("shape", check.SHAPES, ids=str)
def test_rows(dtype: torch.dtype, padding_idx: int | None, shape: Any) -> None:
    check.check_rows(check.make("cpu", dtype, *shape), padding_idx)


@launches
def test_the_commonest_token_is_padding() -> None:
    check.check_rows(check.make("cpu", torch.float32, (3, 50), 7, 20), 6)


@launches
def test_ids_in_int32() -> None:
    case = check.make("cpu", torch.float32, (3, 50), 7, 20)
    check.check_rows(case, ids=case.ids.int())


@launches
def test_gradients_laid_out_otherwise() -> None:
    case = check.make("cpu", torch.float32, (6, 50), 7, 20)
    transposed = case.grad.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    wide = torch.randn(6, 50, 33)
    wide[..., 5:25] = case.grad
    check.check_rows(case, grad=transposed)
    check.check_rows(case, grad=wide[..., 5:25])
    expanded = case.grad[:1, :1].expand_as(case.grad)  # as of a sum
    check.check_rows(case._replace(grad=expanded))


@launches
def test_a_total_with_rows_apart() -> None:
    case = check.make("cpu", torch.float32, (50,), 7, 20)
    wide = torch.full((7, 33), 5.0)
    wide[:, 3:23] = case.total
    _embedding_rows.add_embedding_rows(wide[:, 3:23], case.grad, case.ids)
    torch.testing.assert_close(wide[:, 3:23].double(), check.exact(case), rtol=1e-5, atol=1e-5)
    assert (wide[:, :3] == 5).all() and (wide[:, 23:] == 5).all()


@launches
@pytest.mark.skipif(not _common.INTERPRET, reason="torch's own addition rounds twice")
def test_one_rounding() -> None:
    check.check_one_rounding("cpu", torch.float16)


@launches
def test_deterministic() -> None:
    check.check_deterministic("cpu", torch.float32, (300,), 5, 40)


def test_no_ids() -> None:
    total = torch.randn(5, 4)
    before = total.clone()
    _embedding_rows.add_embedding_rows(total, torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    assert torch.equal(total, before)


# -- in the graph ----------------------------------------------------------------------------------------------------


@launches
@dtypes
@paddings
def test_gradient(dtype: torch.dtype, padding_idx: int | None) -> None:
    check.check_gradient("cpu", dtype, padding_idx)


def both(function: Any) -> tuple[Tensor, Tensor]:
    """What `function` gives of (weight, rows, hidden, loss), with our lookup and with torch's."""
    found = []
    for tied in (True, False):
        weight, ids = check.weight_and_ids("cpu", torch.float32)
        found.append(function(weight, *check.losses(weight, ids, tied=tied)))
    return found[0], found[1]


def close(found: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[1].abs().max() > 0


@launches
def test_it_is_written_into_the_heads_gradient() -> None:
    """And that becomes `.grad` without a copy."""
    weight, ids = check.weight_and_ids("cpu", torch.float32)
    rows, _, loss = check.losses(weight, ids, tied=True)
    arrived: list[int] = []
    rows.grad_fn.register_prehook(lambda grads: arrived.append(grads[1].data_ptr()))
    loss.backward()
    assert arrived == [weight.grad.data_ptr()]


@pytest.mark.parametrize("of", ["rows", "head", "hidden"])
def test_one_use_alone(of: str) -> None:
    def gradient(weight: Tensor, rows: Tensor, hidden: Tensor, loss: Tensor) -> Tensor:
        if of == "head":
            return torch.autograd.grad(loss, weight)[0]
        return torch.autograd.grad((rows if of == "rows" else hidden).square().sum(), weight)[0]

    if of != "head":
        close(both(gradient))
        return
    found = []
    for tied in (True, False):
        weight, ids = check.weight_and_ids("cpu", torch.float32)
        rows, of_head = tied_embedding(ids, weight) if tied else (F.embedding(ids, weight), weight)
        loss = check.linear_cross_entropy(rows.detach().flatten(0, 1), of_head, ids.flatten()).loss
        found.append(gradient(weight, rows, rows, loss))
    close((found[0], found[1]))


def test_the_gradient_of_the_rows_alone() -> None:
    close(both(lambda weight, rows, hidden, loss: torch.autograd.grad(loss, rows)[0]))


@launches
def test_some_inputs_of_a_backward_pass() -> None:
    def gradients(weight: Tensor, rows: Tensor, hidden: Tensor, loss: Tensor) -> Tensor:
        of_hidden, of_weight = torch.autograd.grad(loss, [hidden, weight])
        return torch.cat([of_hidden.flatten(0, 1), of_weight])

    close(both(gradients))


@launches
def test_backward_twice() -> None:
    """And the second time after one that failed half-way."""

    def gradient(weight: Tensor, rows: Tensor, hidden: Tensor, loss: Tensor) -> Tensor:
        loss.backward(retain_graph=True)
        weight.grad = None
        handle = hidden.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        assert weight.grad is None
        handle.remove()
        loss.backward(retain_graph=True)
        loss.backward()
        return weight.grad

    close(both(gradient))


@launches
def test_another_loss_beside_the_heads() -> None:
    """Of the rows, whose own gradient is ready before the head's or after."""
    for order in (1, -1):

        def gradient(weight: Tensor, rows: Tensor, hidden: Tensor, loss: Tensor, order: int = order) -> Tensor:
            parts = [loss, rows.square().mean(), hidden.mean()][::order]
            return torch.autograd.grad(sum(parts), weight)[0]

        close(both(gradient))


@pytest.mark.parametrize("of", ["rows", "loss"])
def test_second_derivatives(of: str) -> None:
    """Of the lookup, as torch's own has them; the head's gradient is a constant with both."""

    def second(weight: Tensor, rows: Tensor, hidden: Tensor, loss: Tensor) -> Tensor:
        of_what = rows.pow(3).sum() if of == "rows" else loss
        (first,) = torch.autograd.grad(of_what, weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    close(both(second))


def test_a_weight_that_changes_is_noticed() -> None:
    """By the head, which has kept it for a second backward pass."""
    weight, ids = check.weight_and_ids("cpu", torch.float32)
    *_, loss = check.losses(weight, ids, tied=True)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
