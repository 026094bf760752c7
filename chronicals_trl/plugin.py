"""ChronicalsPlugin: the parts of this package for a raw Accelerate loop, without a Trainer.

Accelerate has no slot for a third-party plugin (its `kwargs_handlers` take its own classes alone), so the plugin wraps
`prepare` of one accelerator instance: models are patched on their way in, before DDP, FSDP2 or DeepSpeed see them, and
optimizers that come along get LoRA+'s groups. Other accelerators in the process are not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from chronicals_trl._inputs import lora_plus_of_model
from chronicals_trl.config import ChronicalsConfig, without_trainer_parts
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
        ValueError, RuntimeError: as `patch_model` does; and LoRA+ where an optimizer has state already.
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

        @functools.wraps(original)
        def prepare(*objects: Any, **kwargs: Any) -> Any:
            models = [item for item in objects if _is_language_model(item)]
            optimizers = [item for item in objects if isinstance(item, Optimizer)]
            for model in models:
                report = self._patch(model, optimizers if len(models) == 1 else [])
                self.reports.append(report)
                if accelerator.is_main_process:
                    report.print()
            return original(*objects, **kwargs)

        accelerator.prepare = prepare
        return accelerator

    def _patch(self, model: nn.Module, optimizers: list[Optimizer]) -> ActivationReport:
        config = self.config
        assert isinstance(config, ChronicalsConfig)
        report = patch_model(model, without_trainer_parts(config))
        report.set(PartReport("packing", "off", reason="a raw loop brings its own batches: see packing.dataset"))
        try:
            report.set(self._split(model, optimizers, config))
            report.raise_for_omissions(config)
        except BaseException:
            unpatch_model(model)
            raise
        return report

    @staticmethod
    def _split(model: nn.Module, optimizers: list[Optimizer], config: ChronicalsConfig) -> PartReport:
        part = lora_plus_of_model(model, config)
        if part.state == "off":
            return part
        plain = [item for item in optimizers if not isinstance(item, AcceleratedOptimizer)]
        if not plain:
            return PartReport(
                "lora_plus", "off", reason="no optimizer in the same call of prepare: pass both together", omitted=True
            )
        for optimizer in plain:
            apply_lora_plus(optimizer, model, ratio=config.lora_plus_ratio, embedding_lr=config.lora_plus_embedding_lr)
        return part


def _is_language_model(item: Any) -> bool:
    """A transformers model, or a PEFT model around one; not a model that is wrapped already."""
    return isinstance(item, PreTrainedModel) or (isinstance(item, nn.Module) and hasattr(item, "get_base_model"))
