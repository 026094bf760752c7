"""ChronicalsPlugin and ChronicalsAccelerator: the parts of this package for a raw Accelerate loop, without a Trainer.

Accelerate has no slot for a third-party plugin (its `kwargs_handlers` take its own classes alone), so the plugin wraps
`prepare` and `prepare_model` of one accelerator instance: models are patched on their way in, before DDP, FSDP2 or
DeepSpeed see them, and optimizers that come along get LoRA+'s groups. Other accelerators in the process are not
touched, though all of them share Accelerate's state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from chronicals_trl import _inputs
from chronicals_trl._agreement import compare_starts, lone_note, patch_alike, started_with
from chronicals_trl._environment import check_environment
from chronicals_trl.config import ChronicalsConfig, read_flag, without_trainer_parts
from chronicals_trl.model import apart
from chronicals_trl.model.patch import is_patched, patch_model, unpatch_model
from chronicals_trl.optim.lora_plus import apply_lora_plus
from chronicals_trl.report import ActivationReport, PartReport

# What a model that is not patched goes without; packing is not the model's, LoRA's parts want an adapter.
_MODEL_PARTS = ("rms_norm", "gated_mlp", "qk_rope", "attention", "head")


@dataclass
class ChronicalsPlugin:
    """Patches the models, and splits the optimizers, that one accelerator prepares.

    ```python
    accelerator = Accelerator()
    ChronicalsPlugin().attach(accelerator)  # or, in one: accelerator = ChronicalsAccelerator()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss = model(**batch, fused_lm_head=True).loss  # the head without logits; model(**batch) is the stock path
    ```

    As with Accelerate's own plugins, what is not given comes from the environment.

    Args:
        config: as `ChronicalsConfig.resolve` takes it: a ChronicalsConfig, a dict or JSON text; the settings that it
            leaves open, all of them for `None`, come from the environment (`CHRONICALS_*`), then the defaults.
        use_chronicals: False leaves all models and optimizers as they are, and the report says so. None: the
            environment's `CHRONICALS_USE_CHRONICALS`, else True; who attaches a plugin wants it.

    Attributes:
        reports: one ActivationReport for each prepared model, in order.

    Raises:
        TypeError, ValueError: an impossible setting, naming where it came from.

    Raises (in `prepare` and `prepare_model`; models and optimizers are then as they came):
        ValueError, RuntimeError: as `patch_model` does; RuntimeError where LoRA+ is left out (an optimizer with a
            scheduler or with state, say) and `strict=True` or `lora_plus="on"` is set; ValueError for a DeepSpeed
            configuration with its own optimizer or scheduler, which would undo LoRA+ without a word, and, on every
            rank, for ranks with other settings, packages or models.
    """

    config: ChronicalsConfig | Mapping[str, Any] | str | None = None
    use_chronicals: bool | None = None
    reports: list[ActivationReport] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        check_environment()  # a whole ChronicalsConfig does not look there, but the flag does
        self.use_chronicals = read_flag(self.use_chronicals, default=True)
        self.config = ChronicalsConfig.resolve(self.config)
        self._preparing = False

    def attach(self, accelerator: Accelerator) -> Accelerator:
        """Put the plugin in front of what `accelerator` prepares, for this instance alone, and return the accelerator.

        The plugin is `accelerator.chronicals_plugin` from then on. What was prepared before stays as it is.

        Raises:
            ValueError: a plugin is attached already.
        """
        if getattr(accelerator, "chronicals_plugin", None) is not None:
            raise ValueError(
                "`accelerator` has a plugin attached already: attach one ChronicalsPlugin to an Accelerator."
            )
        # Partials over bound methods, since an accelerator can be pickled and a closure could not.
        for name, through in (("prepare", self._prepare), ("prepare_model", self._prepare_model)):
            original = getattr(accelerator, name)
            wrapped = functools.partial(through, accelerator, original)
            setattr(accelerator, name, functools.update_wrapper(wrapped, original))
        accelerator.chronicals_plugin = self
        return accelerator

    # -- in place of the accelerator's methods -----------------------------------------------------------------------

    def _prepare(self, accelerator: Accelerator, original: Callable[..., Any], *objects: Any, **kwargs: Any) -> Any:
        models = [item for item in objects if _is_new(item)]
        optimizers = [item for item in objects if isinstance(item, Optimizer)]
        lone = "no optimizer in the same call of prepare: pass both together"
        if len(models) > 1:  # an optimizer that was split for one of them would be wrong for the other
            optimizers = []
            lone = "several models in one call of prepare: pass each with its own optimizer, one by one"
        return self._around(lambda: original(*objects, **kwargs), accelerator, models, optimizers, lone)

    def _prepare_model(
        self,
        accelerator: Accelerator,
        original: Callable[..., Any],
        model: Any,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> Any:
        call = functools.partial(original, model, device_placement=device_placement, evaluation_mode=evaluation_mode)
        if self._preparing or not _is_new(model):  # prepare itself calls prepare_model
            return call()
        lone = None if evaluation_mode else "prepare_model takes no optimizer: pass both to prepare"
        return self._around(call, accelerator, [model], [], lone)

    def _around(
        self,
        call: Callable[[], Any],
        accelerator: Accelerator,
        models: list[nn.Module],
        optimizers: list[Optimizer],
        lone: str | None,
    ) -> Any:
        """Patch `models`, make the call, and report; when either fails, all are as they came.

        Args:
            optimizers: those of a single model, which LoRA+ may split.
            lone: why there may be none; None where nothing is trained.
        """
        if not models:
            return call()
        config = self.config if self.use_chronicals else None
        assert config is None or isinstance(config, ChronicalsConfig)
        compare_starts(lambda: (None, started_with(config)), accelerator.num_processes)
        groups = [list(optimizer.param_groups) for optimizer in optimizers]
        self._preparing = True
        try:
            reports = [self._patch(model, optimizers, lone, accelerator) for model in models]
            prepared = call()
        except BaseException:
            for model in models:
                unpatch_model(model)
            for optimizer, before in zip(optimizers, groups, strict=True):
                optimizer.param_groups[:] = before
            raise
        finally:
            self._preparing = False
        self.reports += reports
        for model, report in zip(models, reports, strict=True):
            apart.amend(report, model)  # sharding may have put hooks where blocks would be fused
            if accelerator.is_main_process:
                report.print()
            self._raise_for_omissions(report)
        return prepared

    # -- one model ---------------------------------------------------------------------------------------------------

    def _patch(
        self, model: nn.Module, optimizers: list[Optimizer], lone: str | None, accelerator: Accelerator
    ) -> ActivationReport:
        """Patch `model`, split its optimizers, and say what is on; an omission that matters is an error."""
        config = self.config
        assert isinstance(config, ChronicalsConfig)
        if not self.use_chronicals:
            unpatch_model(model)  # an earlier run may have patched it
            return ActivationReport.all_off("use_chronicals=False")
        if why := _out_of_reach(model):
            report = ActivationReport([PartReport(name, "off", reason=why, omitted=True) for name in _MODEL_PARTS])
            report.set(PartReport("lora_plus", "off", reason=why))
        else:
            report = _agreed_patch(model, without_trainer_parts(config), accelerator)
            report.set(_split(model, optimizers, lone, config, accelerator))
        report.set(PartReport("packing", "off", reason="a raw loop brings its own batches: see packing.dataset"))
        for part in ("adamw", "cuda_graphs", "recompute"):
            report.set(PartReport(part, "off", reason="in SFTTrainer's training steps alone"))
        report.notes += filter(None, [lone_note(accelerator.num_processes)])
        self._raise_for_omissions(report)
        return report

    def _raise_for_omissions(self, report: ActivationReport) -> None:
        if self.use_chronicals:
            assert isinstance(self.config, ChronicalsConfig)
            report.raise_for_omissions(self.config)


class ChronicalsAccelerator(Accelerator):
    """Accelerate's Accelerator with a ChronicalsPlugin attached.

    ```python
    accelerator = ChronicalsAccelerator(gradient_accumulation_steps=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ```

    Args:
        args, kwargs: Accelerator's own.
        chronicals_plugin: a ChronicalsPlugin, its `config` (a ChronicalsConfig, a dict or JSON text), or `None` for
            the environment and the defaults.

    Attributes:
        chronicals_plugin (ChronicalsPlugin): the plugin, with its `reports`.

    Raises:
        TypeError, ValueError: as ChronicalsPlugin does.
    """

    def __init__(
        self,
        *args: Any,
        chronicals_plugin: ChronicalsPlugin | ChronicalsConfig | Mapping[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> None:
        plugin = chronicals_plugin
        if not isinstance(plugin, ChronicalsPlugin):
            # Before Accelerate starts the process group: a wrong setting shows at once.
            plugin = ChronicalsPlugin(plugin)
        super().__init__(*args, **kwargs)
        plugin.attach(self)


def _is_new(item: Any) -> bool:
    """Whether `item` is or holds a transformers model that the plugin has not yet seen in this accelerator."""
    if not isinstance(item, nn.Module) or not any(isinstance(module, PreTrainedModel) for module in item.modules()):
        return False
    return not (_is_prepared(item) and is_patched(item))


def _is_prepared(item: nn.Module) -> bool:
    return bool(getattr(item, "_is_accelerate_prepared", False))


def _out_of_reach(item: nn.Module) -> str | None:
    """Why a module that holds a transformers model cannot be patched; None where it can.

    Behind torch.compile it can: that looks at the model when it is first called.
    """
    if _is_prepared(item):  # Accelerate's wrappers are around its forward: nothing must be exchanged under them
        return "Accelerate has prepared the model already: attach the plugin before that"
    model = getattr(item, "_orig_mod", item)
    if isinstance(model, PreTrainedModel) or hasattr(model, "get_base_model"):
        return None
    return f"the model is inside of a {type(model).__name__}: pass the transformers model itself to prepare"


def _agreed_patch(model: Any, config: ChronicalsConfig, accelerator: Accelerator) -> ActivationReport:
    """`patch_model` with the same parts on all ranks, for the device that Accelerate will move the model to."""
    model = getattr(model, "_orig_mod", model)
    leave_out = _inputs.model_parallelism(accelerator)
    device = None if getattr(model, "hf_device_map", None) else accelerator.device
    return patch_alike(
        lambda on_another_rank: patch_model(model, config, leave_out=leave_out | on_another_rank, device=device),
        model,
        accelerator.num_processes,
    )


def _split(
    model: nn.Module,
    optimizers: list[Optimizer],
    lone: str | None,
    config: ChronicalsConfig,
    accelerator: Accelerator,
) -> PartReport:
    """Give the model's optimizers LoRA+'s groups; `lone` is the reason where there are none."""
    part = _inputs.lora_plus_of_model(model, config)
    if part.state == "off":
        return part
    if lone is None:
        return PartReport("lora_plus", "off", reason="evaluation_mode=True: nothing is trained")
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None:
        _inputs.refuse_deepspeed_rates(deepspeed.deepspeed_config, "make both in the loop, and pass them to prepare")
    reasons = [] if optimizers else [lone]
    split = 0
    for optimizer in optimizers:
        if isinstance(optimizer, AcceleratedOptimizer):
            reasons.append("the optimizer is prepared already: pass it together with the model")
            continue
        try:
            apply_lora_plus(optimizer, model, ratio=config.lora_plus_ratio, embedding_lr=config.lora_plus_embedding_lr)
            split += 1
        except ValueError as error:  # it has a scheduler or state, or holds no adapter; it is as it was
            reasons.append(str(error))
    reason = "; ".join(reasons) or None
    if not split:
        return PartReport("lora_plus", "off", reason=reason, omitted=True)
    return replace(part, reason=reason)
