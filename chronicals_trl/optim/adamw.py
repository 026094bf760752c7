"""torch's fused AdamW with its update made by one kernel for each group (`kernels/_adamw.py`), the clipping inside.

The optimizer stays the one that it is: its groups, its state and what a checkpoint holds of it, its hooks and whatever
wraps its `step`. Its class alone is exchanged for one that differs where `step` collects a group's tensors: there the
group is updated, and torch is given nothing left to do. A group that does not fit (`_fits`), and a step in which state
is to be made, goes torch's way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim import optimizer as torch_optimizer
from torch.utils.hooks import RemovableHandle

from chronicals_trl.kernels._adamw import AdamWUpdate

__all__ = ["FusedAdamW", "give_back", "obstacle", "take_over"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, nn.Parameter)
_STATE = ("exp_avg", "exp_avg_sq", "step")


class FusedAdamW(AdamW):
    """What `take_over` makes of a `torch.optim.AdamW`; not to be constructed."""

    # Here too, for copies and pickles, which have none of an optimizer's attributes but its groups and its state.
    _clip: Tensor | None = None  # of the step that comes
    _updates: dict[tuple[int, torch.device, torch.dtype], AdamWUpdate] | None = None
    _after_step: RemovableHandle

    def clip(self, coefficient: Tensor) -> None:
        """Multiply the gradients by a scalar in the next step, and in that alone; `.grad` is left as it is."""
        self._clip = coefficient

    def watched(self) -> bool:
        """Whether somebody has a hook before or after the step, and may look at gradients there."""
        mine = self._after_step.id
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks.keys() - {mine}
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )

    def _init_group(self, group: dict[str, Any], *collected: list[Tensor]) -> Any:
        lists = self._lists(group)
        if lists is None:
            if self._clip is not None:
                torch._foreach_mul_([p.grad for p in group["params"] if p.grad is not None], self._clip)
            return super()._init_group(group, *collected)
        index = next(index for index, each in enumerate(self.param_groups) if each is group)
        if self._updates is None:
            self._updates = {}
        for (device, dtype), (params, grads, exp_avgs, exp_avg_sqs, steps) in lists.items():
            torch._foreach_add_(steps, 1)
            update = self._updates.setdefault((index, device, dtype), AdamWUpdate())
            update(
                params, grads, exp_avgs, exp_avg_sqs, steps, lr=group["lr"], betas=group["betas"], eps=group["eps"],
                weight_decay=group["weight_decay"], clip=self._clip,
            )  # fmt: skip
        return False  # nothing is complex

    def _lists(self, group: dict[str, Any]) -> dict[tuple[torch.device, torch.dtype], list[list[Tensor]]] | None:
        """Parameters, gradients, both moments and steps, by device and dtype; None for a group that is torch's."""
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return None  # float16's scaler
        if not _plain_settings(group):
            return None
        lists: dict[tuple[torch.device, torch.dtype], list[list[Tensor]]] = {}
        for p in group["params"]:
            grad = p.grad
            if grad is None or not p.numel():
                continue
            if p.dtype not in _DTYPES or type(p) not in _PLAIN:
                return None
            state = self.state.get(p)
            if not state:  # torch makes it
                return None
            exp_avg, exp_avg_sq, step = (state[name] for name in _STATE)
            if not (_fits(p, grad) and _fits(p, exp_avg) and _fits(p, exp_avg_sq) and step.device == p.device):
                return None
            found = lists.setdefault((p.device, p.dtype), [[], [], [], [], []])
            for tensors, tensor in zip(found, (p, grad, exp_avg, exp_avg_sq, step), strict=True):
                tensors.append(tensor)
        return lists


def obstacle(optimizer: Any) -> str | None:
    """Why an optimizer's update is not taken over, in words; None if it is."""
    if type(optimizer) is not AdamW:
        return f"the optimizer is {type(optimizer).__name__}, and not torch's AdamW"
    for group in optimizer.param_groups:
        if not group.get("fused"):
            return "AdamW is not the fused one, which rounds otherwise (optim='adamw_torch_fused' is)"
        if not _plain_settings(group):
            return "AdamW has a setting that the kernel does not have (amsgrad, maximize, a rate that is a tensor)"
        if not all(type(p) in _PLAIN and p.dtype in _DTYPES for p in group["params"]):
            return "the optimizer holds parameters that are no plain tensors"
    return None


def take_over(optimizer: AdamW) -> FusedAdamW:
    """The same optimizer, which makes its updates with our kernel until `give_back`."""
    optimizer.__class__ = FusedAdamW
    assert isinstance(optimizer, FusedAdamW)
    optimizer._after_step = optimizer.register_step_post_hook(_forget_clip)
    return optimizer


def give_back(optimizer: FusedAdamW) -> None:
    """Make it torch's AdamW again."""
    optimizer._after_step.remove()
    for name in ("_clip", "_updates", "_after_step"):
        optimizer.__dict__.pop(name, None)
    optimizer.__class__ = AdamW  # type: ignore[assignment]


def _forget_clip(optimizer: Any, *_: Any) -> None:
    optimizer._clip = None


def _plain_settings(group: dict[str, Any]) -> bool:
    unusual = ("amsgrad", "maximize", "capturable", "differentiable")
    numbers = (group["lr"], *group["betas"])
    return not any(group[name] for name in unusual) and not any(isinstance(number, Tensor) for number in numbers)


def _fits(p: Tensor, other: Tensor) -> bool:
    """Whether `other` lies element for element as the parameter does."""
    return (
        other.dtype == p.dtype
        and other.device == p.device
        and type(other) is Tensor
        and other.layout is torch.strided
        and p.is_contiguous()
        and other.is_contiguous()
        and other.numel() == p.numel()
    )
