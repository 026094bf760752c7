"""The health checks in the trainer: where they look, how they speak up, and when they end the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.observe.health.findings import Finding
from chronicals_trl.observe.health.monitor import HealthMonitor, no_gradient
from chronicals_trl.observe.health.series import LogChecks
from chronicals_trl.observe.health.start import describe_groups, dropped_documents, duplicate_bos, trained_share
from chronicals_trl.report import ActivationReport

__all__ = ["HealthMixin"]

logger = logging.getLogger(__name__)

NOTE = "health: "


class HealthMixin(Trainer):
    """The methods of `SFTTrainer` at which health is looked at; each is the parent's with the flag off or
    `health="off"`.

    Raises (in `train`, with `health="stop"`):
        RuntimeError: a check has found that the run does not learn; it names the cause and the remedy.
    """

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    chronicals_report: ActivationReport
    _save_report: Callable[[], None]
    _tokenizer: Any

    _data_findings: Sequence[Finding] = ()
    _health: HealthMonitor | None = None  # of the run in progress, from its first step on
    _disturbed: bool = False  # an evaluation or a save since the last log entry

    @property
    def _checks_health(self) -> bool:
        return self._chronicals is not None and self._chronicals.health != "off"

    # -- before the first step ---------------------------------------------------------------------------------------

    def _look_at_documents(self, data: Any, dropped: int = 0) -> None:
        """The training set, tokenised; `dropped` are the documents that were left out of it."""
        if self._checks_health:
            total = len(data) + dropped if hasattr(data, "__len__") else 0
            found = [dropped_documents(dropped, total), duplicate_bos(data, self._tokenizer.bos_token_id)]
            self._data_findings = [finding for finding in found if finding is not None]

    def _health_notes(self) -> list[str]:
        """For the report at the start."""
        return [NOTE + trained_share(self.model)] if self._checks_health else []

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        groups = getattr(self.optimizer, "param_groups", None)
        if self._checks_health and groups:
            self._note(describe_groups(groups))
        return optimizer

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._health = None
        if self._checks_health:
            self._tell(self._data_findings)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._health = None

    # -- during the run ----------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self._checks_health:
            return super().training_step(model, inputs, num_items_in_batch)
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            # The graph is cut so early that torch itself refuses; it does not say what that means.
            raise RuntimeError(f"{NOTE}{no_gradient(self.model)}") from error
        if self.accelerator.sync_gradients:  # the step's last micro-batch
            if self._health is None:
                self._health = self._monitor()
            skipped = self.state.global_step > 0 and self.accelerator.optimizer_step_was_skipped
            self._tell(self._health.step(num_items_in_batch, skipped=skipped))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self._health is not None and {"loss", "learning_rate"} <= logs.keys():
            disturbed, self._disturbed = self._disturbed, False
            self._tell(self._health.log(logs, disturbed=disturbed))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._disturbed = True
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._disturbed = True
        super()._save_checkpoint(*args, **kwargs)

    # -- what is looked at, and how ----------------------------------------------------------------------------------

    def _monitor(self) -> HealthMonitor:
        hidden = self._why_not_watched()
        if hidden is not None:
            self._note(
                f"gradients and weights of single parameters are not watched ({hidden}); the logged figures are"
            )
        return HealthMonitor(
            self.model,
            getattr(self.optimizer, "param_groups", []),
            device=self.args.device,
            reduce=self._over_ranks,
            series=LogChecks(flat_at=self._loss_of_guessing(), overflows=bool(self.args.fp16)),
            gradients=hidden is None,
            sharded=bool(self.is_fsdp_enabled),
        )

    def _why_not_watched(self) -> str | None:
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if self.is_deepspeed_enabled:
            return "DeepSpeed keeps them to itself"
        if "layerwise" in optim or "lomo" in optim:
            return f"optim={optim!r} steps in the backward pass"
        return None

    def _over_ranks(self, flags: Tensor) -> Tensor:
        """The ranks' maximum: a rank has its shards, and may have had other tokens."""
        if self.args.world_size > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return flags

    def _loss_of_guessing(self) -> float | None:
        plain = self.args.loss_type == "nll" and self.compute_loss_func is None and self.label_smoother is None
        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", None)
        return math.log(vocabulary) if plain and vocabulary else None

    def _tell(self, findings: Sequence[Finding]) -> None:
        """Warn, put it into the report, and end the run where the user wants that."""
        assert self._chronicals is not None
        for finding in findings:
            self._note(str(finding), warn=True)
        stopping = next((finding for finding in findings if finding.stops), None)
        if stopping is not None and self._chronicals.health == "stop":
            raise RuntimeError(
                f"{NOTE}{stopping} (health='stop' ends the run here; health='warn' in chronicals_config goes on in "
                "spite of it.)"
            )

    def _note(self, text: str, *, warn: bool = False) -> None:
        note = NOTE + text
        if note not in self.chronicals_report.notes:
            self.chronicals_report.notes.append(note)
            self._save_report()
        if self.args.should_log:
            logger.log(logging.WARNING if warn else logging.INFO, "chronicals-trl: %s", note)
