"""LoRA+ in the trainer: the parent's optimizer with its groups split, a checkpoint of another layout explained, the
rate of B logged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.optim.lora_plus import apply_lora_plus, group_sizes
from chronicals_trl.report import ActivationReport, PartReport

logger = logging.getLogger(__name__)


class LoraPlusMixin(Trainer):
    """The methods of `SFTTrainer` that LoRA+ takes; each is the parent's where LoRA+ is off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    chronicals_report: ActivationReport
    _save_report: Callable[[], None]

    _lora_plus: bool = False
    _lora_plus_rates: str = ""  # which rates it sets, as the report has it
    _lora_b_group: int | None = None  # of the optimizer's groups, the one whose rate is logged
    _lora_b_rate: float | Tensor | None = None
    _stock_groups: Sequence[dict[str, Any]] = ()  # the optimizer's groups before the split

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._chronicals is not None and self._lora_plus and not existed:
            self._split_groups(self._chronicals)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            # torch says that the groups differ; if LoRA+ is why, say so.
            mismatch = self._lora_plus_mismatch(str(checkpoint))
            if mismatch is None:
                raise
            raise ValueError(mismatch) from error

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
            self._lora_b_group = next((i for i, group in enumerate(summary["groups"]) if group["lora_b"]), None)
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
        if self._lora_b_group is not None:
            lora_b = self.optimizer.param_groups[self._lora_b_group]["lr"]
            self._lora_b_rate = lora_b.clone() if isinstance(lora_b, Tensor) else lora_b
        return rate

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._lora_b_rate is not None and {"loss", "learning_rate"} <= logs.keys():
            logs["learning_rate_lora_b"] = float(self._lora_b_rate)
        super().log(logs, start_time)
