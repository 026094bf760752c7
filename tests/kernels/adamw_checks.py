"""What AdamW's kernel has to give, on any device: torch's own update, and no worse than it against float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chronicals_trl.kernels import LAUNCHES, _adamw
from chronicals_trl.kernels._common import INTERPRET

# Below, at and above a block, a program's chunk and what a mask cuts off.
SHAPES = [(1,), (17,), (1023,), (1024,), (2047,), (3, 683), (2048,), (2049,), (70, 90), (5, 1024, 2)]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


class Lists(NamedTuple):
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    def clone(self, dtype: torch.dtype | None = None) -> Lists:
        return Lists(*([t.clone().to(dtype or t.dtype) for t in tensors] for tensors in self[:4]), self.steps)


def make(device: str, dtype: torch.dtype, shapes: Any = SHAPES, step: float = 3.0, offset: int = 0) -> Lists:
    """As after some steps. `offset`: elements by which each tensor is off the allocator's alignment."""
    generator = torch.Generator(device).manual_seed(len(shapes))

    def draw(shape: Any, scale: float, power: int = 1) -> Tensor:
        numbers = torch.randn(math.prod(shape) + offset, device=device, generator=generator).pow(power) * scale
        return numbers.to(dtype)[offset:].view(shape)

    kinds = ((1.0, 1), (1e-2, 1), (1e-3, 1), (1e-4, 2))
    lists = ([draw(shape, *kind) for shape in shapes] for kind in kinds)
    return Lists(*lists, [torch.full((), step, device=device) for _ in shapes])


def in_float64(lists: Lists, lr: float, betas: Any, eps: float, weight_decay: float) -> Lists:
    """The paper's algorithm 2."""
    out = lists.clone(torch.float64)
    for p, g, m, v, step in zip(*out, strict=True):
        t = step.item()
        m.copy_(betas[0] * m + (1 - betas[0]) * g)
        v.copy_(betas[1] * v + (1 - betas[1]) * g * g)
        unbiased_m, unbiased_v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        p.copy_(p - lr * weight_decay * p - lr * unbiased_m / (unbiased_v.sqrt() + eps))
    return out


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    ours, right = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (found, wanted))
    return ((ours - right).norm() / right.norm()).item()


def check_update(device: str, dtype: torch.dtype, clip: float | None = None, **options: Any) -> None:
    settings = {**SETTINGS, **{name: options.pop(name) for name in SETTINGS if name in options}}
    lists = make(device, dtype, **options)
    ours, theirs = lists.clone(), lists.clone()
    if options.get("offset"):  # a clone is aligned
        ours = lists
        lists = lists.clone()
    coefficient = None if clip is None else torch.tensor(clip, device=device, dtype=dtype)
    _adamw.AdamWUpdate()(*ours, **settings, clip=coefficient)
    assert all(map(torch.equal, ours.grads, lists.grads))  # read alone

    if coefficient is not None:
        torch._foreach_mul_(theirs.grads, coefficient)
        lists = lists._replace(grads=[t.clone() for t in theirs.grads])
    beta1, beta2 = settings["betas"]
    torch._fused_adamw_(
        *theirs[:4], [], theirs.steps, lr=settings["lr"], beta1=beta1, beta2=beta2, eps=settings["eps"],
        weight_decay=settings["weight_decay"], amsgrad=False, maximize=False,
    )  # fmt: skip
    right = in_float64(lists, **settings)
    # The kernel, as torch's on a GPU, has betas in float32, and 1 - beta from that: 1.3e-5 off for 0.999.
    narrow = {**settings, "betas": tuple(torch.tensor(settings["betas"]).tolist())}
    rights = in_float64(lists, **narrow) if LAUNCHES["adamw"] else right
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        found = error(getattr(ours, name), getattr(rights, name))
        reference = error(getattr(theirs, name), getattr(right, name))
        # The interpreter rounds between the two halves of an fma.
        slack = 2e-7 if INTERPRET else 3e-8
        assert found <= 1.05 * reference + slack, (name, found, reference)
        # It moved; of a second moment in 16 bits a thousandth is no step.
        assert error(getattr(ours, name), getattr(lists, name)) > 1e-4 or name == "exp_avg_sqs"


def check_first_update(device: str) -> None:
    """What the moments lack, the corrections make up for: both have the same betas, to the last digit."""
    lists = make(device, torch.float32, step=1.0)
    for tensor in (*lists.params, *lists.exp_avgs, *lists.exp_avg_sqs):
        tensor.zero_()
    _adamw.AdamWUpdate()(*lists, **{**SETTINGS, "eps": 0.0})
    rtol = 1e-4 if INTERPRET else 1e-6  # the interpreter rounds within an fma, and 1 - 0.999 has few digits then
    for param, grad in zip(lists.params, lists.grads, strict=True):
        torch.testing.assert_close(param, -SETTINGS["lr"] * grad.sign(), rtol=rtol, atol=0)


def check_one_after_another(update: Any, device: str, kinds: list[tuple[torch.dtype, int]]) -> None:
    """One `AdamWUpdate` on lists of one shape, of these dtypes and offsets, with a clip of the dtype or without."""
    for dtype, offset in kinds:
        for clip in (None, torch.tensor(0.5, device=device, dtype=dtype)):
            lists = make(device, dtype, offset=offset)
            grads = [g if clip is None else g * clip for g in lists.grads]
            right = in_float64(lists._replace(grads=grads), **SETTINGS)
            update(*lists, **SETTINGS, clip=clip)
            assert error(lists.params, right.params) < torch.finfo(dtype).eps
