"""Ranks that were not started alike are found before the first step, on every one of them.

A rank with another setting, another package or another model would wait for a collective that the others never enter,
or average gradients of another loss. So the ranks compare what they were given, in small gathers of text, and each one
raises with the name of what differs. A rank that fails by itself says so to the others, which would wait for it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from accelerate.utils import gather_object
from torch import nn

from chronicals_trl._environment import ENV_PREFIX
from chronicals_trl._versions import installed, versions
from chronicals_trl.config import PARTS, ChronicalsConfig
from chronicals_trl.report import ActivationReport

__all__ = ["compare_starts", "lone_note", "patch_alike", "started_with"]

T = TypeVar("T")
Facts = Mapping[str, str]

# Of the arguments: what decides on the rows, on the gradients, and on who enters which collective when.
_ARGUMENTS = (
    "packing", "eval_packing", "packing_strategy", "max_length", "padding_free", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "seed", "data_seed",
    "train_sampling_strategy", "shuffle_dataset", "dataloader_drop_last", "loss_type", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16",
    "gradient_checkpointing", "average_tokens_across_devices", "auto_find_batch_size", "torch_compile",
    "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
)  # fmt: skip

# Beside those that have a floor: what brings kernels, and what moves data and parameters.
_PACKAGES = ("triton", "datasets", "deepspeed", "bitsandbytes", "flash-attn-4", "flash-attn")

# Told, to explain a difference, and not compared: a variable that an argument overrules does no harm.
_ENVIRONMENT = f"environment variables {ENV_PREFIX}*"

_SHOWN = 4


def started_with(config: ChronicalsConfig | None, arguments: Any = None) -> dict[str, str]:
    """What every rank has to have alike: name -> value, as text.

    Args:
        config: None where the flag is off; nothing else is compared then.
        arguments: the trainer's, if there is one.
    """
    variables = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(ENV_PREFIX)]
    facts = {"use_chronicals": str(config is not None), _ENVIRONMENT: ", ".join(sorted(variables)) or "none"}
    if config is None:
        return facts
    facts |= {f"chronicals_config: {name}": repr(value) for name, value in config.to_dict().items()}
    facts |= {f"argument {name}": repr(getattr(arguments, name)) for name in _ARGUMENTS if hasattr(arguments, name)}
    found = versions() | {name: installed(name) for name in _PACKAGES} | {"Python": platform.python_version()}
    return facts | {f"version of {name}": version or "not installed" for name, version in found.items()}


def compare_starts(prepare: Callable[[], tuple[T, Facts]], ranks: int) -> T:
    """Run `prepare` on every rank and return what it returns, if the ranks' facts are the same.

    Args:
        prepare: gives the result and the facts to compare.
        ranks: processes; one has nobody to ask.

    Raises:
        ValueError: the facts differ; on every rank, with each name and both values.
        RuntimeError: `prepare` failed on another rank alone. Its own error on the rank where it failed.
    """
    if ranks == 1:
        return prepare()[0]
    result, everyone = _ask_all(prepare)
    _require_alike(everyone)
    return result


def patch_alike(
    patch: Callable[[dict[str, str]], ActivationReport],
    model: nn.Module,
    ranks: int,
    facts: Callable[[], dict[str, str]] = dict,
) -> ActivationReport:
    """Run `patch`, with what to leave out and why, such that the same parts are on at all ranks.

    Args:
        facts: what else `patch` has switched on or off, name -> state; left out where the ranks differ, as parts are.

    Raises:
        ValueError: the ranks have different models; on every rank.
        RuntimeError: `patch` failed on another rank alone. Its own error on the rank where it failed.
    """
    if ranks == 1:
        return patch({})

    def prepare() -> tuple[ActivationReport, Facts]:
        report = patch({})
        states = {part.name: part.state for part in report.parts} | facts()
        return report, {"the model": _describe(model)} | states

    report, everyone = _ask_all(prepare)
    _require_alike([{"the model": found["the model"]} for found in everyone])
    apart = [name for name in (*PARTS, *facts()) if len({found[name] for found in everyone}) > 1]
    return patch(dict.fromkeys(apart, "off on another rank")) if apart else report


def lone_note(ranks: int) -> str | None:
    """What to tell of a launch whose processes are `ranks` of one each, and not of one job; None where that is not so.

    On a CPU Accelerate joins them only when it is told to use the CPU, and says nothing where it does not.
    """
    started = os.environ.get("WORLD_SIZE", "")
    if ranks > 1 or not started.isdigit() or int(started) < 2:
        return None
    return (
        f"{started} processes were started (WORLD_SIZE) and do not know of each other: each trains by itself, on all "
        "rows, and saves over the others. On CPUs pass --use_cpu True, or set ACCELERATE_USE_CPU=1 for a raw loop; on "
        "GPUs see that torch finds one for each process"
    )


def _ask_all(prepare: Callable[[], tuple[T, Facts]]) -> tuple[T, list[Facts]]:
    """What `prepare` returns here, and the facts of each rank; an error anywhere is one everywhere."""
    failure: Exception | None = None
    try:
        result, facts = prepare()
    except Exception as error:
        failure, facts = error, {}
    told = None if failure is None else f"{type(failure).__name__}: {failure}"
    everyone: list[tuple[Facts, str | None]] = gather_object([(facts, told)])
    if failure is not None:
        raise failure
    for rank, (_, of_another) in enumerate(everyone):
        if of_another is not None:
            raise RuntimeError(f"Rank {rank} cannot start, so none does. It says: {of_another}")
    return result, [facts for facts, _ in everyone]


def _require_alike(everyone: list[Facts]) -> None:
    first = everyone[0]
    differing: dict[str, int] = {}  # and the first rank that differs from rank 0
    for rank, facts in enumerate(everyone):
        for name in [*first, *(name for name in facts if name not in first)]:
            if name != _ENVIRONMENT and first.get(name) != facts.get(name):
                differing.setdefault(name, rank)
    if "use_chronicals" in differing:  # the rest differs because of it
        differing = {"use_chronicals": differing["use_chronicals"]}
    if not differing:
        return
    for name, rank in list(differing.items()):
        if name.startswith(("use_chronicals", "chronicals_config")):
            differing.setdefault(_ENVIRONMENT, rank)
    told = [
        f"{name} is {first.get(name)} on rank 0 and {everyone[rank].get(name)} on rank {rank}"
        for name, rank in list(differing.items())[:_SHOWN]
    ]
    told += [f"and {len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
    raise ValueError(
        f"The ranks were not started alike: {'; '.join(told)}. Start all of them with the same command, the same "
        "environment variables and the same installed packages (one image or virtual environment for all nodes)."
    )


def _describe(model: nn.Module) -> str:
    """A model in a line. Weights that a rank has not loaded yet (FSDP, ZeRO-3) count with the shape they will have."""
    parameters = list(model.parameters())
    numbers = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    trained = sum(parameter.requires_grad for parameter in parameters)
    return f"a {type(model).__name__} of {len(parameters)} tensors ({numbers:,} numbers), {trained} of them trained,"
