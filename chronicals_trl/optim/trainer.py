"""LoRA+ in the trainer: the parent's optimizer with its groups split, its schedule with bounds to match, checkpoints
of other layouts or rates explained, the rates logged."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.optim.lora_plus import apply_lora_plus, group_sizes, scale_rate_bounds
from chronicals_trl.report import ActivationReport, PartReport

logger = logging.getLogger(__name__)

# The keys of the logs, by the kind of group whose rate they hold. `learning_rate`, of the first group, is Trainer's.
_LOG_KEYS = {"B": "learning_rate_lora_b", "embedding": "learning_rate_lora_embedding"}


class LoraPlusMixin(Trainer):
    """The methods of `SFTTrainer` that LoRA+ takes; each is the parent's where LoRA+ is off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    chronicals_report: ActivationReport
    _save_report: Callable[[], None]
    _tell_once: Callable[..., None]

    _lora_plus: bool = False
    _lora_plus_rates: str = ""  # which rates it sets, as the report has it
    _logged_groups: Mapping[str, int] = MappingProxyType({})  # key of the logs -> index of the group with its rate
    _logged_rates: Mapping[str, float | Tensor] = MappingProxyType({})
    _stock_groups: Sequence[dict[str, Any]] = ()  # the optimizer's groups before the split

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._chronicals is not None and self._lora_plus and not existed:
            self._split_groups(self._chronicals)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        existed = self.lr_scheduler is not None
        scheduler = super().create_scheduler(*args, **kwargs)
        if self._chronicals is not None and self._lora_plus and not existed:
            scale_rate_bounds(scheduler, self.optimizer, self.args.learning_rate)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._chronicals is not None and checkpoint is not None:
            _require_same_layers(self.model, checkpoint)
        configured = _rates_to_first(self.optimizer)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            # torch says that the groups differ; if LoRA+ is why, say so.
            mismatch = self._lora_plus_mismatch(str(checkpoint))
            if mismatch is None:
                raise
            raise ValueError(mismatch) from error
        if self._chronicals is not None and self._lora_plus and checkpoint is not None:
            loaded = _rates_to_first(self.optimizer)
            if not all(map(math.isclose, loaded, configured)):
                # As Trainer does with learning_rate: what the checkpoint has goes on. It must not go on unsaid.
                note = (
                    f"LoRA+: {checkpoint} was written with other rates, which go on (of its groups, to the first: "
                    f"{_listed(loaded)}; configured: {_listed(configured)}). For the configured ones remove "
                    f"{OPTIMIZER_NAME} and {SCHEDULER_NAME} from the checkpoint"
                )
                report = self.chronicals_report
                rates = f"rates of {checkpoint}, not {self._lora_plus_rates}"
                report.set(dataclasses.replace(report["lora_plus"], backend=rates))
                # What was said of the configured rates is not so.
                report.notes[:] = [n for n in report.notes if not n.startswith("LoRA+: B learns")]
                self._tell_once(note, warn=True)

    def _lora_plus_mismatch(self, checkpoint: str) -> str | None:
        file = Path(checkpoint) / OPTIMIZER_NAME
        if not file.is_file():
            return None
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
        layouts = group_sizes(self.model, self._stock_groups or self.optimizer.param_groups)
        written = next((name for name, sizes in layouts.items() if sizes == [len(g["params"]) for g in saved]), None)
        if written is None:
            return None
        remedy = {
            "off": "lora_plus='off' in chronicals_config",
            "on": "use_chronicals=True and lora_plus='auto'",
            "on with lora_plus_embedding_lr": "use_chronicals=True, lora_plus='auto' and lora_plus_embedding_lr",
        }[written]
        return (
            f"{checkpoint} was written with LoRA+ {written}, and this run has other parameter groups (LoRA+ "
            f"{self._lora_plus_rates or 'off'}), which its optimizer state does not fit. Resume with {remedy}; or go "
            f"on from the weights alone: remove {OPTIMIZER_NAME} and {SCHEDULER_NAME} from the checkpoint."
        )

    def _split_groups(self, config: ChronicalsConfig) -> None:
        stock = list(self.optimizer.param_groups)
        try:
            summary = apply_lora_plus(
                self.optimizer, self.model, ratio=config.lora_plus_ratio, embedding_lr=config.lora_plus_embedding_lr
            )
            kinds = [group["kind"] for group in summary["groups"]]
            self._logged_groups = {key: kinds.index(kind) for kind, key in _LOG_KEYS.items() if kind in kinds}
            self._stock_groups = stock
        except ValueError as error:
            self._lora_plus, self._lora_plus_rates = False, ""
            self.chronicals_report.set(PartReport("lora_plus", "off", reason=str(error), omitted=True))
            self.chronicals_report.raise_for_omissions(config)
            self._save_report()
            logger.warning("chronicals-trl: lora_plus is off: %s", error)

    def _get_learning_rate(self) -> float:
        # Trainer asks between the optimizer's step and the scheduler's, while the groups hold the rates of the step.
        rate: float = super()._get_learning_rate()
        rates = {key: self.optimizer.param_groups[index]["lr"] for key, index in self._logged_groups.items()}
        self._logged_rates = {key: lr.clone() if isinstance(lr, Tensor) else lr for key, lr in rates.items()}
        return rate

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if {"loss", "learning_rate"} <= logs.keys():
            logs.update({key: float(rate) for key, rate in self._logged_rates.items()})
        super().log(logs, start_time)


def _require_same_layers(model: Any, checkpoint: str) -> None:
    """Raise ValueError if a checkpoint's adapter is on other layers than the model's.

    PEFT loads what fits, with a warning, and torch gives the optimizer's state to whatever tensor has its place.
    """
    file = Path(checkpoint) / "adapter_model.safetensors"
    names = getattr(model, "active_adapters", None)
    if not file.is_file() or not isinstance(names, list) or len(names) != 1:  # several are in folders of their own
        return
    with safe_open(file, "pt") as saved:
        there = {name.partition(".lora_")[0] for name in saved.keys() if ".lora_" in name}
    here = {
        name
        for name, module in model.named_modules()
        if any(names[0] in getattr(module, part, ()) for part in ("lora_A", "lora_embedding_A"))
    }
    if there and here and there != here:
        raise ValueError(
            f"{checkpoint} holds an adapter on other layers than this run's: {_kinds(there - here) or 'none'} there "
            f"alone, {_kinds(here - there) or 'none'} here alone. Resume with the target_modules of its "
            "adapter_config.json; or train the new adapter from its start, without resume_from_checkpoint."
        )


def _kinds(layers: set[str]) -> str:
    """The last names of layers, with how many have each."""
    counts = Counter(name.rpartition(".")[2] for name in layers)
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _rates_to_first(optimizer: Any) -> list[float]:
    """Each group's rate at the start of the schedule, over that of the first group."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in getattr(optimizer, "param_groups", ())]
    return [rate / rates[0] for rate in rates] if rates and rates[0] else []


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
