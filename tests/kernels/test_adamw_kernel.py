"""AdamW's update on the CPU: the reference, or the kernel if it is interpreted (`test_interpreter.py`)."""

from __future__ import annotations

import math

import pytest
import torch
from kernels import adamw_checks as check

from chronicals_trl.kernels import LAUNCHES, _adamw, _common

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def launched():
    LAUNCHES.clear()
    yield
    assert LAUNCHES["adamw"] > 0 or not _common.INTERPRET


@dtypes
@pytest.mark.parametrize("clip", [None, 0.25])
def test_it_is_torchs_update(dtype: torch.dtype, clip: float | None) -> None:
    check.check_update("cpu", dtype, clip)


@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.0}, {"betas": (0.0, 0.5)}, {"betas": (0.5, 0.0)}, {"eps": 0.1}, {"step": 1.0},
     {"step": 20_000.0}],
    ids=str,
)  # fmt: skip
def test_settings(options) -> None:
    check.check_update("cpu", torch.float32, 0.5, **options)


def test_tensors_off_the_allocators_alignment() -> None:
    check.check_update("cpu", torch.float32, shapes=[(2050,), (33,)], offset=1)


def test_a_clip_of_one_changes_nothing() -> None:
    lists = check.make("cpu", torch.float32)
    ours, theirs = lists.clone(), lists.clone()
    update = _adamw.AdamWUpdate()
    update(*ours, **check.SETTINGS, clip=torch.tensor(1.0))
    update(*theirs, **check.SETTINGS)
    assert all(map(torch.equal, ours.params, theirs.params))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bound", [1.0, math.inf])
def test_gradients_that_are_not_finite(bad: float, bound: float) -> None:
    """Clipped as clip_grad_norm_ does it: by NaN where the norm is, by 0 where it is infinite and the bound is not."""
    lists = check.make("cpu", torch.float32)
    lists.grads[3][5] = bad
    norm = torch.nn.utils.get_total_norm(lists.grads)
    clip = (bound / (norm + 1e-6)).clamp(max=1.0)
    clipped = lists._replace(grads=[g * clip for g in lists.grads])
    right = check.in_float64(clipped, **check.SETTINGS)
    _adamw.AdamWUpdate()(*lists, **check.SETTINGS, clip=clip)
    assert any(p.isnan().any() for p in lists.params)
    for ours, wanted in zip(lists.params, right.params, strict=True):
        torch.testing.assert_close(ours, wanted.float(), rtol=1e-4, atol=1e-4, equal_nan=True)


@dtypes
def test_a_clipped_gradient_is_rounded(dtype: torch.dtype) -> None:
    """As clip_grad_norm_ leaves it, and before it is squared."""
    lists = check.make("cpu", dtype)
    torch._foreach_mul_(lists.grads, 100.0)
    clip = torch.tensor(0.3, dtype=dtype)
    _adamw.AdamWUpdate()(*lists, **{**check.SETTINGS, "betas": (0.0, 0.0)}, clip=clip)
    for grad, exp_avg_sq in zip(lists.grads, lists.exp_avg_sqs, strict=True):
        assert torch.equal(exp_avg_sq, (grad * clip).float().square().to(dtype))


def test_a_first_update_is_of_the_rates_size() -> None:
    check.check_first_update("cpu")


def test_clipped_and_not_in_turn() -> None:
    lists, update = check.make("cpu", torch.float32), _adamw.AdamWUpdate()
    for clip in (None, torch.tensor(0.5), None, torch.tensor(0.1)):
        clipped = lists if clip is None else lists._replace(grads=[g * clip for g in lists.grads])
        right = check.in_float64(clipped, **check.SETTINGS)
        update(*lists, **check.SETTINGS, clip=clip)
        assert check.error(lists.exp_avgs, right.exp_avgs) < 1e-6


def test_one_update_after_another() -> None:
    """With other gradients, as many parameters but other ones, fewer, and the first ones again."""
    update = _adamw.AdamWUpdate()
    first, other = check.make("cpu", torch.float32), check.make("cpu", torch.float32, shapes=check.SHAPES[::-1])
    fewer = check.make("cpu", torch.float32, shapes=check.SHAPES[:2])
    for lists in (first, first, first._replace(grads=other.grads[::-1]), other, fewer, first):
        right = check.in_float64(lists, **check.SETTINGS)
        update(*lists, **check.SETTINGS)
        assert check.error(lists.params, right.params) < 1e-6
        assert check.error(lists.exp_avgs, right.exp_avgs) < 1e-6
        lists.steps[0] += 1


def test_the_same_sizes_in_another_dtype_and_place() -> None:
    update = _adamw.AdamWUpdate()
    check.check_one_after_another(update, "cpu", [(torch.float32, 0), (torch.float16, 0), (torch.float32, 1)])


def test_each_tensor_has_its_own_step() -> None:
    lists = check.make("cpu", torch.float32)
    for number, step in enumerate(lists.steps):
        step.fill_(1 + number)
    right = check.in_float64(lists, **check.SETTINGS)
    _adamw.AdamWUpdate()(*lists, **check.SETTINGS)
    for ours, wanted in zip(lists.params, right.params, strict=True):
        assert check.error([ours], [wanted]) < 1e-6
