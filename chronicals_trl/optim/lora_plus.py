"""LoRA+: the B matrices of LoRA adapters learn at a multiple of the learning rate of the A matrices.

Source: Hayou, Ghosh and Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models" (arXiv 2402.12354). With width
n the paper has the rate of A scale as 1/n and that of B as 1; the ratio itself depends on the model and the task, and
16 is a value that the authors found good, not one that follows.

Existing parameter groups are split and nothing else about them changes, so that the optimizer, its weight-decay rule
and the sharding of its parameters stay those of the code that made them. Which parameter is which is read off the
module tree (PEFT keeps A below ``lora_A``, B below ``lora_B``), not guessed from names or from the number of
dimensions, which sharding changes.

What learns at which rate, and why. With Adam, and widths alone growing, a matrix that sums over the width (A, a whole
linear layer) wants a rate of the order of 1/width; what does not (B, whose inputs are the rank's, biases, gains of
norms, DoRA's magnitudes, embeddings, whose inputs are single tokens) wants one that does not depend on it.

- A: the group's rate. B, and the bias that ``lora_bias=True`` gives it: ``ratio`` times that. Both start at zero, from
  where the paper's argument leads.
- Whole layers in ``modules_to_save``: the group's rate. They sum over the width as A does.
- Biases, gains of norms, DoRA's magnitudes: the group's rate. They scale like B, but start from trained values, which
  is outside the argument: it gives no reason to move a gain of 1 by 16 times what was asked for. (PEFT's
  ``create_loraplus_optimizer`` gives every one-dimensional parameter B's rate.)
- LoRA on embeddings: neither of its two matrices sums over the width, so no ratio between them follows. Both learn at
  the group's rate, or at ``embedding_lr``. New tokens (``trainable_token_indices``): the group's rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# The attributes of PEFT's LoRA layers that hold adapter matrices. Everything else learns at the group's own rate.
_KIND_BELOW = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "embedding", "lora_embedding_B": "embedding"}
_KINDS = ("A", "B", "embedding", "other")


def split_lora_plus_groups(
    model: nn.Module,
    param_groups: Sequence[dict[str, Any]],
    *,
    ratio: float = 16.0,
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Split optimizer parameter groups so that LoRA's B matrices learn at ``ratio`` times their group's rate.

    Each group gives up to three, in this order: everything else at the group's ``lr``; ``lora_B`` (weights and biases)
    at ``lr * ratio``; and, if ``embedding_lr`` is given, ``lora_embedding_A`` and ``lora_embedding_B`` at that rate
    (the paper gives embeddings a rate of their own; without it they stay at the group's). All other options are kept,
    also ``initial_lr``, scaled like ``lr``. Parameters keep their order, empty groups are dropped, the arguments are
    not modified.

    Args:
        model: the model whose modules hold the parameters, wrapped or not.
        param_groups: dicts with ``params`` (tensors or (name, tensor) pairs, in an ordered collection) and ``lr``, as
            passed to an optimizer or as in ``optimizer.param_groups`` (``param_names`` is split along).
        ratio: rate of B over rate of A, above 0 and finite.
        embedding_lr: rate of LoRA on embeddings, above 0 and finite, or None.

    Raises:
        TypeError: ``ratio`` or ``embedding_lr`` is not a number, or ``params`` is a set.
        ValueError: a value out of range, a group without ``lr``, a parameter given twice, or nothing in the groups
            whose rate LoRA+ would set.
    """
    _check_positive("ratio", ratio)
    if embedding_lr is not None:
        _check_positive("embedding_lr", embedding_lr)

    kinds = _lora_kinds(model)
    split: list[dict[str, Any]] = []
    seen: set[int] = set()
    found: set[str] = set()
    for index, group in enumerate(param_groups):
        if group.get("lr") is None:
            raise ValueError(
                f"param_groups[{index}] has no lr (got {group.get('lr')!r}): LoRA+ multiplies it. Give the group a "
                "learning rate (an optimizer that chooses its own cannot be combined with LoRA+), or set "
                "lora_plus='off'"
            )
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        parts: dict[str, list[int]] = {"base": [], "B": [], "embedding": []}
        params = _as_list(group["params"], index)
        for position, item in enumerate(params):
            parameter = _tensor_of(item)
            if id(parameter) in seen:
                raise ValueError(
                    f"param_groups[{index}] has a parameter that is in the groups already: list each once"
                )
            seen.add(id(parameter))
            kind = kinds.get(id(parameter), "other")
            if parameter.requires_grad:
                found.add(kind)
            own_group = kind == "B" or (kind == "embedding" and embedding_lr is not None)
            parts[kind if own_group else "base"].append(position)

        for part, positions in parts.items():
            if not positions:
                continue
            new_group: dict[str, Any] = {"params": [params[p] for p in positions]}
            if "param_names" in group:
                new_group["param_names"] = [group["param_names"][p] for p in positions]
            new_group.update(options)
            for key in ("lr", "initial_lr"):
                if key in options and part == "B":
                    new_group[key] = options[key] * ratio
                elif key in options and part == "embedding":
                    new_group[key] = embedding_lr
            split.append(new_group)

    _check_effect(found, embedding_lr, sum(trainable_kinds(model).values()))
    return split


def apply_lora_plus(
    optimizer: Optimizer, model: nn.Module, *, ratio: float = 16.0, embedding_lr: float | None = None
) -> dict[str, Any]:
    """Split the groups of an optimizer that has not stepped yet, in place. See ``split_lora_plus_groups``.

    Call it before a learning-rate scheduler is made: schedulers scale each group's rate at that moment, and so keep
    the ratio from then on (those with a bound on the rate after ``scale_rate_bounds``). On an error the optimizer is
    as it was.

    Returns:
        ``{"ratio", "embedding_lr", "tensors": {"A", "B", "embedding", "other"}, "groups": [{"lr", "tensors",
        "kind"}]}``, plain numbers and strings; ``kind`` of a group: "B", "embedding" (where ``embedding_lr`` is
        given), else "base".

    Raises:
        ValueError: the optimizer has stepped or was loaded, a scheduler is attached to it, it would not apply the
            rates of its groups or has a ratio of its own (Muon), or as ``split_lora_plus_groups``.
        TypeError: as ``split_lora_plus_groups``.
    """
    _check_optimizer(optimizer)
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            "a learning-rate scheduler is attached to the optimizer (its groups have initial_lr): it would go on with "
            "the old groups. Apply LoRA+ before the scheduler is made, or set lora_plus='off'"
        )
    groups = split_lora_plus_groups(model, optimizer.param_groups, ratio=ratio, embedding_lr=embedding_lr)
    before = list(optimizer.param_groups)
    # Through add_param_group, for optimizers that complete or check a group there; the list object stays, since
    # wrappers hold on to it.
    optimizer.param_groups.clear()
    try:
        for group in groups:
            optimizer.add_param_group(group)
    except Exception:
        optimizer.param_groups[:] = before
        raise

    kinds = _lora_kinds(model)
    counts = dict.fromkeys(_KINDS, 0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            counts[kinds.get(id(parameter), "other")] += 1
    return {
        "ratio": float(ratio),
        "embedding_lr": None if embedding_lr is None else float(embedding_lr),
        "tensors": counts,
        "groups": [
            {"lr": float(g["lr"]), "tensors": len(g["params"]), "kind": _kind_of_group(g, kinds, embedding_lr)}
            for g in optimizer.param_groups
        ],
    }


def scale_rate_bounds(scheduler: Any, optimizer: Optimizer, lr: float) -> None:
    """Scale a scheduler's bounds on the rate, in place, by what each group's rate is to ``lr``.

    ReduceLROnPlateau has a lower bound, transformers' GreedyLR a lower and an upper one. They are given for the rate
    that the user set; one number for all groups would end LoRA+'s ratio where A reaches it before B. A scheduler
    without bounds is left as it is.

    Args:
        scheduler: just made from ``optimizer``.
        optimizer: with split groups, before the first step.
        lr: the rate that the bounds were given for, the one of A; with 0 nothing is scaled.
    """
    if lr == 0:
        return
    for name in ("min_lrs", "max_lrs"):
        if hasattr(scheduler, name):
            pairs = zip(getattr(scheduler, name), optimizer.param_groups, strict=True)
            setattr(scheduler, name, [bound * float(group["lr"]) / lr for bound, group in pairs])


def group_sizes(model: nn.Module, param_groups: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Tensors in each group with LoRA+ off and on, by which a saved optimizer tells how its groups were split.

    Args:
        param_groups: unsplit.
    """
    sizes = {"off": [len(group["params"]) for group in param_groups]}
    for name, embedding_lr in (("on", None), ("on with lora_plus_embedding_lr", 1.0)):
        try:
            groups = split_lora_plus_groups(model, param_groups, embedding_lr=embedding_lr)
        except ValueError:  # nothing for LoRA+ to do
            continue
        sizes[name] = [len(group["params"]) for group in groups]
    return sizes


def trainable_kinds(model: nn.Module) -> dict[str, int]:
    """How many trainable tensors of LoRA adapters there are: ``{"A", "B", "embedding"}``."""
    kinds = _lora_kinds(model)
    counts = dict.fromkeys(_KINDS[:-1], 0)
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) in kinds:
            counts[kinds[id(parameter)]] += 1
    return counts


def has_adapter(model: nn.Module) -> bool:
    """Whether there is any LoRA adapter, trainable or not."""
    return bool(_lora_kinds(model))


def why_frozen(model: nn.Module) -> str:
    """Why no adapter of a model that has some is trainable, with the remedy; for messages."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    names = {name for layer in layers for part in ("lora_A", "lora_embedding_A") for name in getattr(layer, part, ())}
    active = {name for layer in layers for name in getattr(layer, "active_adapters", ())}
    if active and not active & names:  # set_adapter of PEFT's tuner takes any name, and freezes all others
        return (
            f"no adapter is called {', '.join(map(repr, sorted(active)))}, which is set as the active one; there is "
            f"{', '.join(map(repr, sorted(names)))}. Choose one with model.set_adapter(name)"
        )
    return (
        "all of its adapters are frozen. Load the one to train with is_trainable=True, or choose it with "
        "model.set_adapter(name)"
    )


def _lora_kinds(model: nn.Module) -> dict[int, str]:
    """id of parameter -> "A", "B" or "embedding", for the parameters of LoRA adapters."""
    kinds: dict[int, str] = {}
    for module in model.modules():  # parents come first: an adapter that is itself called "lora_B" changes nothing
        for name, child in module.named_children():
            kind = _KIND_BELOW.get(name)
            if kind is not None:
                for parameter in child.parameters():
                    kinds.setdefault(id(parameter), kind)
    return kinds


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number above 0, got {value!r} ({type(value).__name__})")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value!r}")


def _check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that has run, or with which the groups' rates would not be what LoRA+ says they are."""
    name = type(optimizer).__name__
    if hasattr(optimizer, "fused_backward"):
        raise ValueError(
            f"{name} updates the weights during the backward pass with one learning rate for all, and does not read "
            "those of its groups: choose another optim, or set lora_plus='off'"
        )
    if isinstance(optimizer, getattr(torch.optim, "Muon", ())) and any(
        group["adjust_lr_fn"] in (None, "original") for group in optimizer.param_groups
    ):
        raise ValueError(
            "Muon multiplies the rate of a tall matrix by sqrt(rows / columns), which already makes B's updates "
            "sqrt(width / rank) times A's: pass adjust_lr_fn='match_rms_adamw', with which both are alike and the "
            "ratio means what it does with AdamW, or set lora_plus='off'"
        )
    stepped = sum(map(_has_stepped, optimizer.state.values()))
    if stepped:
        raise ValueError(
            f"the optimizer holds state for {stepped} parameters: LoRA+ regroups them, which a loaded or "
            "stepped optimizer does not survive. Apply it right after the optimizer is made, before load_state_dict()"
        )


def _has_stepped(state: Any) -> bool:
    """Whether this state of one parameter is from a step; Adagrad and APOLLO make some when they are constructed."""
    if "step" in state:
        return float(state["step"]) > 0
    return any(isinstance(value, Tensor) for value in state.values())


def _kind_of_group(group: dict[str, Any], kinds: dict[int, str], embedding_lr: float | None) -> str:
    kind = kinds.get(id(group["params"][0]), "other")
    return kind if kind == "B" or (kind == "embedding" and embedding_lr is not None) else "base"


def _check_effect(found: set[str], embedding_lr: float | None, trainable: int) -> None:
    if "B" in found or ("embedding" in found and embedding_lr is not None):
        return
    if "A" in found:
        raise ValueError(
            "LoRA+ found trainable lora_A matrices but no lora_B in the optimizer: make lora_B trainable, or set "
            "lora_plus='off'"
        )
    if "embedding" in found:
        raise ValueError(
            "LoRA+ found LoRA on embeddings alone, which has no rate of its own by default: set "
            "lora_plus_embedding_lr (embedding_lr), or lora_plus='off'"
        )
    if trainable:
        raise ValueError(
            f"LoRA+ without effect: the model has {trainable} trainable LoRA parameters, and the optimizer's groups "
            "hold none of them (layer-wise optimizers keep each in an optimizer of its own): choose another optim, or "
            "set lora_plus='off'"
        )
    raise ValueError(
        "LoRA+ without any adapter: no trainable LoRA parameter of the model is in the optimizer. Pass peft_config "
        "(a LoraConfig) to the trainer, or set lora_plus='off'"
    )


def _as_list(params: Tensor | Iterable[Any], index: int) -> list[Any]:
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, (set, frozenset)):
        raise TypeError(f"param_groups[{index}]['params'] is a set, whose order changes between runs: pass a list")
    return list(params)


def _tensor_of(item: Any) -> Tensor:
    tensor: Tensor = item[1] if isinstance(item, tuple) else item
    return tensor
