"""ChronicalsPlugin: the parts of this package for a raw Accelerate loop, without a Trainer.

Accelerate has no slot for a third-party plugin (its `kwargs_handlers` take its own classes alone), so the plugin wraps
`prepare` of one accelerator instance: models are patched on their way in, before DDP, FSDP2 or DeepSpeed see them, and
optimizers that come along get LoRA+'s groups. Other accelerators in the process are not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from chronicals_trl._agreement import compare_starts, patch_alike, started_with
from chronicals_trl._inputs import lora_plus_of_model, model_parallelism, refuse_deepspeed_rates
from chronicals_trl.config import ChronicalsConfig, without_trainer_parts
from chronicals_trl.model import apart
from chronicals_trl.model.patch import patch_model, unpatch_model
from chronicals_trl.optim.lora_plus import apply_lora_plus
from chronicals_trl.report import ActivationReport, PartReport


@dataclass
class ChronicalsPlugin:
    """Patches the models, and splits the optimizers, that one accelerator prepares.

    ```python
    accelerator = Accelerator()
    ChronicalsPlugin().attach(accelerator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss = model(**batch, fused_lm_head=True).loss  # the head without logits; model(**batch) is the stock path
    ```

    Args:
        config: as `ChronicalsConfig.resolve` takes it: a ChronicalsConfig, a dict or JSON text; `None` takes the
            environment (`CHRONICALS_*`) and the defaults.

    Attributes:
        reports: one ActivationReport for each prepared model, in order.

    Raises (in `prepare`):
        ValueError: ranks with other settings, packages or models; on every rank.
        ValueError, RuntimeError: as `patch_model` does; RuntimeError where LoRA+ is left out (an optimizer with a
            scheduler or with state, say) and `strict=True` or `lora_plus="on"` is set; ValueError for a DeepSpeed
            configuration with its own optimizer or scheduler, which would undo LoRA+ without a word.
    """

    config: ChronicalsConfig | Mapping[str, Any] | str | None = None
    reports: list[ActivationReport] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.config = ChronicalsConfig.resolve(self.config)

    def attach(self, accelerator: Accelerator) -> Accelerator:
        """Put the plugin in front of `accelerator.prepare`, for this instance alone, and return the accelerator.

        Raises:
            ValueError: a plugin is attached already.
        """
        if "prepare" in vars(accelerator):
            raise ValueError(
                "`accelerator` has a plugin attached already: attach one ChronicalsPlugin to an Accelerator."
            )
        original = accelerator.prepare
        config = self.config
        assert isinstance(config, ChronicalsConfig)

        @functools.wraps(original)
        def prepare(*objects: Any, **kwargs: Any) -> Any:
            models = [item for item in objects if _is_language_model(item)]
            optimizers = [item for item in objects if isinstance(item, Optimizer)]
            if models:
                compare_starts(lambda: (None, started_with(config)), accelerator.num_processes)
            reports = []
            for model in models:
                report = self._patch(model, optimizers if len(models) == 1 else None, accelerator)
                reports.append(report)
            self.reports += reports
            prepared = original(*objects, **kwargs)
            for model, report in zip(models, reports, strict=True):
                apart.amend(report, model)  # sharding may have put hooks where blocks would be fused
                if accelerator.is_main_process:
                    report.print()
                report.raise_for_omissions(config)
            return prepared

        accelerator.prepare = prepare
        return accelerator

    def _patch(
        self, model: nn.Module, optimizers: list[Optimizer] | None, accelerator: Accelerator
    ) -> ActivationReport:
        config = self.config
        assert isinstance(config, ChronicalsConfig)
        report = patch_alike(
            lambda on_another_rank: patch_model(
                model, without_trainer_parts(config), leave_out=model_parallelism(accelerator) | on_another_rank
            ),
            model,
            accelerator.num_processes,
        )
        report.set(PartReport("packing", "off", reason="a raw loop brings its own batches: see packing.dataset"))
        report.set(PartReport("cuda_graphs", "off", reason="in SFTTrainer's training steps alone"))
        try:
            report.set(self._split(model, optimizers, config, accelerator))
            report.raise_for_omissions(config)
        except BaseException:
            unpatch_model(model)
            raise
        return report

    @staticmethod
    def _split(
        model: nn.Module, optimizers: list[Optimizer] | None, config: ChronicalsConfig, accelerator: Accelerator
    ) -> PartReport:
        """Split the groups of the model's optimizers; None stands for optimizers that may be another model's."""
        part = lora_plus_of_model(model, config)
        if part.state == "off":
            return part
        deepspeed = accelerator.state.deepspeed_plugin
        if deepspeed is not None:
            refuse_deepspeed_rates(deepspeed.deepspeed_config, "make both in the loop, and pass them to prepare")
        reasons = []
        if optimizers is None:
            reasons.append("several models in one call of prepare: pass each with its own optimizer, one by one")
        elif not optimizers:
            reasons.append("no optimizer in the same call of prepare: pass both together")
        split = 0
        for optimizer in optimizers or ():
            if isinstance(optimizer, AcceleratedOptimizer):
                reasons.append("the optimizer is prepared already: pass it together with the model")
                continue
            try:
                apply_lora_plus(
                    optimizer, model, ratio=config.lora_plus_ratio, embedding_lr=config.lora_plus_embedding_lr
                )
                split += 1
            except ValueError as error:  # it has a scheduler or state, or holds no adapter; it is as it was
                reasons.append(str(error))
        reason = "; ".join(reasons) or None
        if not split:
            return PartReport("lora_plus", "off", reason=reason, omitted=True)
        return replace(part, reason=reason)


def _is_language_model(item: Any) -> bool:
    """A transformers model, or a PEFT model around one; not a model that is wrapped already."""
    return isinstance(item, PreTrainedModel) or (isinstance(item, nn.Module) and hasattr(item, "get_base_model"))
