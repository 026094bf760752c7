"""One run's checks: called at the end of each step's backward pass, and at each log entry."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chronicals_trl.observe.health.findings import Finding
from chronicals_trl.observe.health.gradients import Movement, Reduce, have_gradients
from chronicals_trl.observe.health.series import LogChecks
from chronicals_trl.observe.health.start import rate_of, trained_share

__all__ = ["HealthMonitor", "no_gradient"]

#: Steps after which a parameter should have had a gradient. LoRA's A has none in the first one, since B is zero.
GRADIENT_STEPS = 8
#: Steps without a single label, from the first on, that are no accident.
LABEL_STEPS = 4
#: Steps over which weights should move, and from the start of one such look to that of the next.
MOVEMENT_STEPS, MOVEMENT_PERIOD = 10, 100
#: The first step at which movement is looked at: by then A has a gradient too.
_FIRST_LOOK = 3

# What may go without a token for long: one expert of a list of them, and PEFT's few trainable tokens.
_OCCASIONAL = re.compile(r"(^|\.)experts\.\d+\.|trainable_tokens_delta")

# check -> those that it explains, which then say nothing new
_EXPLAINS = {
    "no_gradient": ("missing_gradients", "zero_gradient_norm", "flat_loss", "still_weights", "some_still_weights"),
    "no_labels": ("no_gradient", "missing_gradients", "zero_gradient_norm", "flat_loss"),
    "zero_gradient_norm": ("flat_loss", "still_weights", "some_still_weights"),
    "not_finite": ("loss_spike",),
    "still_weights": ("flat_loss",),
    "not_optimized": ("flat_loss", "still_weights"),
}


class HealthMonitor:
    """The checks of one run that look at the model and its logs.

    Args:
        model: as it is trained, sharded already.
        groups: the optimizer's parameter groups.
        device: of training.
        reduce: the ranks' maximum of a tensor; every rank calls `step` alike, so that all enter it together.
        series: the checks of logged figures.
        gradients: False where the parameters' gradients cannot be seen (DeepSpeed, optimizers that step in the
            backward pass); then `step` does nothing.
        sharded: the optimizer may hold other tensors than the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        *,
        device: torch.device,
        reduce: Reduce,
        series: LogChecks,
        gradients: bool = True,
        sharded: bool = False,
    ) -> None:
        self._model, self._groups, self._device, self._reduce = model, groups, device, reduce
        self._series, self._watches, self._sharded = series, gradients, sharded
        self._said: set[str] = set()
        self._steps = self._unlabelled = 0
        self._labels: int | Tensor | None = None  # of the last step
        # Parameters without a gradient so far; None until a first step has had one at all.
        self._pending: list[tuple[str, nn.Parameter]] | None = None
        self._pending_had: Tensor | None = None
        self._pending_looks = 1  # the first step's
        self._missing: Tensor | None = None  # to be read with the next log entry; 0 for a parameter of these names
        self._missing_names: list[str] = []
        self._movement: Movement | None = None
        self._watched_groups: list[tuple[int, list[nn.Parameter]]] = []
        self._look_began: int | None = None
        self._looked_at: list[bool] = []  # the groups that were at their full rate when the look began
        self._next_look, self._moving_steps = _FIRST_LOOK, 0
        self._moved: Tensor | None = None  # likewise

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self, labels: int | Tensor | None, *, skipped: bool = False) -> list[Finding]:
        """Look at the gradients of a step, before the optimizer's. Waits for the device in the first step alone.

        Args:
            labels: labelled tokens of the step, over all ranks; None where nobody counted.
            skipped: the optimizer left out the step before this one (an overflow in float16).
        """
        self._labels = labels
        if not self._watches:
            return []
        found = []
        if self._pending is None:
            found += [*self._outside_the_optimizer(), *self._first_gradients(labels)]
        elif self._pending and any(rate_of(group) != 0 for group in self._groups):
            self._later_gradients(skipped)
        if not skipped:
            self._steps += 1
            self._look_at_movement()
        return self._new(found)

    def _first_gradients(self, labels: int | Tensor | None) -> list[Finding]:
        named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        had = have_gradients([parameter for _, parameter in named], self._device, self._reduce)
        flags = had.tolist()
        due = [not _OCCASIONAL.search(name) for name, _ in named]
        if any(flags) or not any(due):
            self._pending = [each for each, flag, d in zip(named, flags, due, strict=True) if d and not flag]
            return []
        if labels is not None and self._of_all_ranks(labels) == 0:  # of that nothing follows about the model
            self._unlabelled += 1
            if self._unlabelled < LABEL_STEPS:
                return []
            self._pending = []
            return [_no_labels(LABEL_STEPS)]
        self._pending = []
        return [no_gradient(self._model)]

    def _of_all_ranks(self, labels: int | Tensor) -> int:
        """The ranks' most labels: with `average_tokens_across_devices=False` each has counted its own."""
        count = torch.as_tensor(labels, device=self._device).detach().clone().reshape(1)
        return int(self._reduce(count).item())

    def _later_gradients(self, skipped: bool) -> None:
        assert self._pending is not None
        # The ranks are asked once, at the end.
        had = have_gradients([parameter for _, parameter in self._pending], self._device, _this_rank)
        self._pending_had = had if self._pending_had is None else self._pending_had | had
        self._pending_looks += not skipped
        if self._pending_looks >= GRADIENT_STEPS:
            self._missing = self._reduce(self._pending_had)
            self._missing_names = [name for name, _ in self._pending]
            self._pending = []

    def _outside_the_optimizer(self) -> list[Finding]:
        """Sort the parameters by group, and name those that are in none."""
        if self._watched_groups:
            return []
        trained = {id(p): name for name, p in self._model.named_parameters() if p.requires_grad}
        for number, group in enumerate(self._groups):
            inside = [p for p in group["params"] if trained.pop(id(p), None) is not None]
            if inside:
                self._watched_groups.append((number, inside))
        self._movement = Movement([group for _, group in self._watched_groups], self._device, self._reduce)
        if not trained or self._sharded:
            return []
        return [
            Finding(
                "not_optimized",
                f"{len(trained):,} parameters are to be trained, but no group of the optimizer has them: "
                f"{_listed(list(trained.values()))}",
                "an optimizer that was made of another model, or before layers were replaced or adapters added",
                "leave `optimizers` out so that the Trainer makes one, make it of this trainer's model, or freeze "
                "these parameters (requires_grad_(False)) if they are not meant to be trained",
            )
        ]

    def _look_at_movement(self) -> None:
        if self._movement is None or not self._watched_groups or not at_full_rate(self._groups):
            return
        if self._look_began is not None:
            self._moving_steps += 1
            if self._moving_steps == MOVEMENT_STEPS:
                self._moved, self._look_began = self._movement.finish(), None
        elif self._steps >= self._next_look and self._pending is not None:
            self._movement.start()
            self._look_began, self._moving_steps = self._steps, 0
            self._looked_at = [at_full_rate([self._groups[number]]) for number, _ in self._watched_groups]
            self._next_look = self._steps + MOVEMENT_PERIOD

    # -- logs --------------------------------------------------------------------------------------------------------

    def log(self, logs: Mapping[str, float], *, disturbed: bool = False) -> list[Finding]:
        """Look at a log entry of training, and at what steps before have left to be read.

        Args:
            logs: as `LogChecks.look` takes them.
            disturbed: an evaluation or a save fell into the interval.
        """
        found = []
        # Norm 0 stands for the last step; without a label it says nothing about the model.
        empty = logs.get("grad_norm") == 0 and self._labels is not None and self._of_all_ranks(self._labels) == 0
        if self._missing is not None:
            had, self._missing = self._missing.tolist(), None
            names = [name for name, flag in zip(self._missing_names, had, strict=True) if not flag]
            found += [_missing_gradients(names)] if names else []
        if self._moved is not None:
            had, moved = self._moved.tolist()
            self._moved = None
            found += self._still(had, moved)
        found += self._series.look(logs, full_rate=at_full_rate(self._groups), disturbed=disturbed, labelled=not empty)
        return self._new(found)

    def _still(self, had: list[int], moved: list[int]) -> list[Finding]:
        groups = zip(self._watched_groups, self._looked_at, had, moved, strict=True)
        still = [group for group, looked, h, m in groups if looked and h and not m]
        if not still:
            return []
        told, low = [], False
        for number, parameters in still:
            rate, dtype = rate_of(self._groups[number]), parameters[0].dtype
            low |= dtype in (torch.bfloat16, torch.float16)
            at = "" if rate is None else f" at learning rate {rate:.3g}"
            told.append(f"group {number} ({len(parameters)} tensors in {str(dtype).removeprefix('torch.')}{at})")
        seen = f"weights with a gradient have not changed over {MOVEMENT_STEPS} steps: {', '.join(told)}"
        check = "still_weights" if not any(moved) else "some_still_weights"
        if low:
            return [
                Finding(
                    check,
                    seen,
                    "updates below the resolution of the weights' type: a bfloat16 weight changes by 1/256 of its "
                    "value at the least (float16: 1/2048), and a smaller update rounds to nothing; norms, whose "
                    "weights are near 1, are the first to stand still",
                    "keep the weights in float32 (dtype='float32' with bf16=True), raise learning_rate, or train a "
                    "LoRA adapter in float32",
                )
            ]
        return [
            Finding(
                check,
                seen,
                "an optimizer that updates other tensors than the model's (layers moved, replaced or loaded anew "
                "after it was made), a step that a callback or wrapper leaves out, or a learning rate that is far "
                "too low",
                "make the optimizer last, of this trainer's model, and look at learning_rate",
            )
        ]

    def _new(self, found: Sequence[Finding]) -> list[Finding]:
        """Those that were not said, and do not follow from what was."""
        fresh = []
        for finding in found:
            explained = {follows for said in self._said for follows in _EXPLAINS.get(said, ())}
            if finding.check not in self._said | explained:
                self._said.add(finding.check)
                fresh.append(finding)
        return fresh


def at_full_rate(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a group has at least half of its peak learning rate: neither warming up nor running out."""
    for group in groups:
        rate = rate_of(group)
        if rate is None or (rate > 0 and rate >= 0.5 * float(group.get("initial_lr", rate))):
            return True
    return False


def _this_rank(flags: Tensor) -> Tensor:
    return flags


def no_gradient(model: nn.Module) -> Finding:
    """Unsloth's case: nothing of what is to be trained gets a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    none = sum(p.grad is None for p in trained)
    return Finding(
        "no_gradient",
        f"no parameter has a gradient in the first step (gradient norm 0), though {trained_share(model)}: "
        f"{none:,} of {len(trained):,} tensors have none at all, the others zeros",
        "the graph is cut between the loss and what is to be trained (an output that is detached or made under "
        "torch.no_grad, gradient checkpointing whose input needs no gradient), or the wrong parameters are frozen",
        "print the names whose requires_grad is True and check that the loss depends on them; with a frozen embedding "
        "and checkpointing call model.enable_input_require_grads()",
    )


def _no_labels(steps: int) -> Finding:
    return Finding(
        "no_labels",
        f"the first {steps} steps had no labelled token: their labels are all -100 and nothing is learned",
        "a mask that is empty (a chat template without {% generation %}, a completion that is cut off), or a "
        "collator that ignores every token",
        "look at the labels of trainer.train_dataset[0] and of a batch of trainer.get_train_dataloader()",
    )


def _missing_gradients(names: Sequence[str]) -> Finding:
    return Finding(
        "missing_gradients",
        f"{len(names):,} parameters that are to be trained had no gradient in the first {GRADIENT_STEPS} steps: "
        f"{_listed(names)}",
        "layers that the loss does not depend on (a vision tower given text alone, an unused adapter or head), or an "
        "output that is detached behind them",
        "freeze what is not meant to be trained (requires_grad_(False), target_modules), else look for a detach() or "
        "torch.no_grad() between them and the loss",
    )


def _listed(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
