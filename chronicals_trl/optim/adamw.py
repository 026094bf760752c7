"""torch's fused AdamW with its update made by one kernel for each group (`kernels/_adamw.py`), the clipping inside.

The optimizer stays the one that it is: its groups, its state and what a checkpoint holds of it, its hooks and whatever
wraps its `step`. Its class alone is exchanged for one that differs where `step` collects a group's tensors: there the
group is updated, and torch is given nothing left to do. A group that does not fit (`_fits`) goes torch's way, and each
does in the first step of its state.

torch makes the state in that step, in the memory that the first pass has cut into pieces: each of the pass's large
blocks then holds some of it and can never be given back, which CUDA graphs, whose memory is apart, would need. So it
is made before that pass (`make_state`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim import optimizer as torch_optimizer
from torch.utils.hooks import RemovableHandle

from chronicals_trl.kernels._adamw import AdamWUpdate

__all__ = ["FusedAdamW", "give_back", "is_wrapped", "obstacle", "take_over"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, nn.Parameter)
_STATE = ("exp_avg", "exp_avg_sq", "step")

_Kind = tuple[torch.device, torch.dtype]
_Lists = list[list[Tensor]]


class FusedAdamW(AdamW):
    """What `take_over` makes of a `torch.optim.AdamW`; not to be constructed."""

    _clip: Tensor | None  # of the step that comes
    _updates: dict[tuple[Any, ...], AdamWUpdate]  # by index of the group
    _looked_at: dict[int, list[list[int]]]  # addresses of a group's tensors, gradients apart, that were found to fit
    _early: dict[Tensor, dict[str, Any]]  # by parameter, state that is there before its first step
    _after_step: RemovableHandle

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_after_step" not in vars(self):  # a copy, or one that was pickled: they have groups and state alone
            _start(self)
        self._early.clear()  # what is loaded is nobody's but the loader's

    def clip(self, coefficient: Tensor) -> None:
        """Multiply the gradients by a scalar in the next step, and in that alone; `.grad` is left as it is."""
        self._clip = coefficient

    @torch.no_grad()
    def make_state(self) -> None:
        """Make the state that torch makes in a first step, for parameters that have neither state nor gradient.

        It goes again where that step finds no gradient, and all of it where some cannot be made.
        """
        for group in self.param_groups:
            without = [p for p in group["params"] if p.requires_grad and p.grad is None and p not in self.state]
            try:
                for p in without:  # of a gradient nothing but its being there is asked for
                    p.grad = torch.zeros((), dtype=p.dtype, device=p.device).expand_as(p)
                super()._init_group({**group, "params": without}, *([] for _ in range(6)))
            except BaseException:
                # Memory may have run out between two tensors of one parameter, which torch would take for whole.
                for p in without:
                    self.state.pop(p, None)
                self._take_back(list(self._early))
                raise
            finally:
                for p in without:
                    p.grad = None
            self._early.update({p: self.state[p] for p in without})

    def _take_back(self, params: Iterable[Tensor]) -> None:
        """Let go of state of theirs that was made early, unless somebody has put other state in its place."""
        for p in params:
            made = self._early.pop(p, None)
            if made is not None and self.state.get(p) is made:
                del self.state[p]

    def _is_first(self, params: Iterable[Tensor]) -> bool:
        """Whether state of theirs was made early: this is its first step. Where there is no gradient it goes again."""
        if not self._early:
            return False
        early = [p for p in params if p in self._early]
        self._take_back([p for p in early if p.grad is None])
        for p in early:
            self._early.pop(p, None)
        return bool(early)

    def watched(self) -> bool:
        """Whether somebody has a hook before or after the step, or is around it, and may look at gradients there."""
        mine = self._after_step.id
        return bool(
            is_wrapped(self)
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks.keys() - {mine}
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )

    @torch.compiler.disable  # as torch's are: a step that is compiled calls it as it is
    def _init_group(self, group: dict[str, Any], *collected: list[Tensor]) -> Any:
        first = self._is_first(group["params"])
        if torch.compiler.is_compiling():  # which calls it once more, for the lists
            return super()._init_group(group, *collected)
        index = next(index for index, each in enumerate(self.param_groups) if each is group)
        lists = None if first else self._lists(index, group)
        if lists is None:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            if self._clip is not None and grads:
                torch._foreach_mul_(grads, self._clip)
            return super()._init_group(group, *collected)
        for kind, (params, grads, exp_avgs, exp_avg_sqs, steps) in lists.items():
            torch._foreach_add_(steps, 1)
            self._updates.setdefault((index, *kind), AdamWUpdate())(
                params, grads, exp_avgs, exp_avg_sqs, steps, lr=group["lr"], betas=group["betas"], eps=group["eps"],
                weight_decay=group["weight_decay"], clip=self._clip,
            )  # fmt: skip
        return False  # nothing is complex

    def _lists(self, index: int, group: dict[str, Any]) -> dict[_Kind, _Lists] | None:
        """Parameters, gradients, both moments and steps, by device and dtype; None for a group that is torch's."""
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return None  # float16's scaler
        if not _plain_settings(group):
            return None
        params = [p for p in group["params"] if p.grad is not None]
        states: list[Any] = [self.state.get(p) for p in params]
        if not all(states):  # torch makes them
            return None
        grads = [p.grad for p in params]
        lists = [params, grads, *([state[name] for state in states] for name in _STATE)]
        # All of this is looked at in every step, and hardly ever changes: of what lies where it lay only the
        # gradients, which are new ones, are looked at anew.
        where = [list(map(Tensor.data_ptr, tensors)) for tensors in (params, *lists[2:])]
        if self._looked_at.get(index) == where and not any(map(_other_kind, params, grads)):
            return {_kind(params[0]): lists}
        self._looked_at.pop(index, None)  # what comes to lie there later may be of another kind
        found: dict[_Kind, _Lists] = {}
        for tensors in zip(*lists, strict=True):
            if not _fits(*tensors):
                return None
            if tensors[0].numel():
                of_kind = found.setdefault(_kind(tensors[0]), [[] for _ in lists])
                for known, tensor in zip(of_kind, tensors, strict=True):
                    known.append(tensor)
        if len(found) == 1 and all(map(Tensor.numel, params)):
            self._looked_at[index] = where
        return found


def obstacle(optimizer: Any) -> str | None:
    """Why an optimizer's update is not taken over, in words; None if it is."""
    if type(optimizer) is not AdamW:
        return f"the optimizer is {type(optimizer).__name__}, and not torch's AdamW"
    for group in optimizer.param_groups:
        if not group.get("fused"):
            return "AdamW is not the fused one, which rounds otherwise (optim='adamw_torch_fused' is)"
        if not _plain_settings(group):
            unusual = "amsgrad, maximize, a rate that is a tensor, a decay that is not decoupled"
            return f"AdamW has a setting that the kernel does not have ({unusual})"
        if not all(map(_is_plain, group["params"])):
            return "the optimizer holds parameters that are no plain tensors of 16 or 32 bits"
    return None


def is_wrapped(optimizer: Any) -> bool:
    """Whether somebody else than a scheduler, which counts the steps, has put himself around an optimizer's step."""
    step = vars(optimizer).get("step")
    return step is not None and getattr(step, "__wrapped__", None) is not type(optimizer).step


def take_over(optimizer: AdamW) -> FusedAdamW:
    """The same optimizer, which makes its updates with our kernel until `give_back`."""
    optimizer.__class__ = FusedAdamW
    assert isinstance(optimizer, FusedAdamW)
    _start(optimizer)
    return optimizer


def _start(optimizer: FusedAdamW) -> None:
    optimizer._clip, optimizer._updates, optimizer._looked_at, optimizer._early = None, {}, {}, {}
    optimizer._after_step = optimizer.register_step_post_hook(_forget_clip)


def give_back(optimizer: FusedAdamW) -> None:
    """Make it torch's AdamW again."""
    optimizer._after_step.remove()
    optimizer._take_back(list(optimizer._early))  # it has made no step
    for name in ("_clip", "_updates", "_looked_at", "_early", "_after_step"):
        del optimizer.__dict__[name]
    optimizer.__class__ = AdamW  # type: ignore[assignment]


def _forget_clip(optimizer: Any, *_: Any) -> None:
    optimizer._clip = None


def _plain_settings(group: dict[str, Any]) -> bool:
    unusual = ("amsgrad", "maximize", "capturable", "differentiable")
    numbers = (group["lr"], *group["betas"])
    return (
        bool(group["fused"] and group["decoupled_weight_decay"])
        and not any(group[name] for name in unusual)
        and not any(isinstance(number, Tensor) for number in numbers)
    )


def _is_plain(p: Tensor) -> bool:
    return type(p) in _PLAIN and p.dtype in _DTYPES


def _kind(p: Tensor) -> _Kind:
    return p.device, p.dtype


def _other_kind(p: Tensor, grad: Tensor) -> bool:
    """Whether a gradient is of another kind than its parameter, or lies in another way than element by element."""
    return grad.dtype != p.dtype or type(grad) is not Tensor or not grad.is_contiguous() or grad.device != p.device


def _fits(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> bool:
    """Whether all of one parameter's tensors are such as the kernel takes."""
    return (
        _is_plain(p)
        and p.is_contiguous()
        and not any(_other_kind(p, other) or other.numel() != p.numel() for other in (grad, exp_avg, exp_avg_sq))
        and (step.device, step.dtype) == (p.device, torch.float32)
    )
