"""The fused AdamW in the trainer: taken over inside `train` alone, and gradients clipped where it reads them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import Trainer
from transformers.training_args import OptimizerNames

from chronicals_trl._callbacks import acts_on
from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.kernels._common import HAS_TRITON
from chronicals_trl.optim.adamw import FusedAdamW, give_back, is_wrapped, obstacle, take_over
from chronicals_trl.report import ActivationReport, PartReport

logger = logging.getLogger(__name__)

PART = "adamw"

# Device types whose updates are taken over.
DEVICES = ("cuda",)

# Where callbacks and subclasses can look at gradients that Trainer has clipped, and what clips them.
_EVENTS = ("on_pre_optimizer_step", "on_optimizer_step")
_METHODS = ("_clip_grad_norm", "_get_grad_norm")
_CLIP = Accelerator.clip_grad_norm_


class AdamWMixin(Trainer):
    """The methods of `SFTTrainer` that the optimizer's kernel takes; each is the parent's where it is off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    chronicals_report: ActivationReport
    _save_report: Callable[[], None]
    _tell_once: Callable[..., None]
    _overridden: Callable[[tuple[str, ...]], str | None]

    _adamw: FusedAdamW | None = None  # inside `train`
    _adamw_wanted: bool = False  # inside `train`, until an optimizer turns out to be another
    _holds_others: bool = False  # the optimizer: parameters that are not the model's, and never clipped

    def _adamw_part(self, config: ChronicalsConfig, leave_out: str | None) -> PartReport:
        """Whether the optimizer's update will be ours, as far as that is known before it is made."""
        args: Any = self.args
        if config.adamw == "off":
            return PartReport(PART, "off", reason="adamw='off' in the configuration")
        if args.device.type not in DEVICES:
            return PartReport(PART, "off", reason=f"no CUDA GPU: on {args.device.type} torch's own update is as good")
        if not HAS_TRITON:
            return PartReport(PART, "off", reason="triton is not installed")
        engine = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else None
        reason = leave_out or (None if engine is None else f"{engine} has its own way to update what it has sharded")
        if reason is not None:
            return PartReport(PART, "off", reason=reason, omitted=True)
        if self.optimizer is not None:
            reason = obstacle(self.optimizer)
        elif args.optim != OptimizerNames.ADAMW_TORCH_FUSED and self.optimizer_cls_and_kwargs is None:
            reason = f"optim={str(getattr(args.optim, 'value', args.optim))!r}: for adamw_torch_fused alone"
        if reason is not None:
            return PartReport(PART, "off", reason=reason)
        return PartReport(PART, "on", backend="triton")

    # -- the run -----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._adamw_wanted = self._chronicals is not None and self.chronicals_report[PART].state == "on"
        try:
            result = super().train(*args, **kwargs)
            if self._adamw_wanted and self._adamw is None:
                self._switch_off("no step came through SFTTrainer's training_step")
            return result
        finally:
            self._give_back()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._adamw_wanted:
            # Here, and not before: by now there is the optimizer, whoever has made it, and Accelerate's around it. In
            # each step: a callback, or a second try with smaller batches, may have put another one in its place.
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            if optimizer is not self._adamw:
                self._give_back()
                self._take_over(optimizer)
        return super().training_step(*args, **kwargs)

    def _give_back(self) -> None:
        if self._adamw is not None:
            give_back(self._adamw)
            self._adamw = None

    def _take_over(self, optimizer: Any) -> None:
        reason = obstacle(optimizer)
        if reason is None:
            self._adamw = take_over(optimizer)
            try:
                self._adamw.make_state()
            except BaseException:  # a second try, with smaller batches, begins here again
                self._give_back()
                raise
            mine, trained = self._adamw.param_groups, set(self.model.parameters())
            self._holds_others = any(p not in trained for group in mine for p in group["params"])
            return
        self._switch_off(reason)
        assert self._chronicals is not None
        self.chronicals_report.raise_for_omissions(self._chronicals)

    def _switch_off(self, reason: str) -> None:
        self._adamw_wanted = False
        self.chronicals_report.set(PartReport(PART, "off", reason=reason))
        self._save_report()
        logger.warning("chronicals-trl: %s is off: %s", PART, reason)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._adamw is None:
            return super()._clip_grad_norm(model)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients:
            return super()._clip_grad_norm(model)
        reason = self._why_clip_apart(gradients)
        if reason is not None:
            self._tell_once(f"gradients are clipped in a pass of their own: {reason}")
            return super()._clip_grad_norm(model)
        # As torch.nn.utils.clip_grad_norm_ does it, but for the pass that multiplies.
        norm = get_total_norm(gradients)
        self._adamw.clip((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _why_clip_apart(self, gradients: list[Tensor]) -> str | None:
        """Who else than the optimizer has use for clipped gradients, or why there is no one coefficient for them."""
        assert self._adamw is not None
        if self.accelerator.scaler is not None:
            return "fp16 scales the gradients"
        if self._adamw.watched() or is_wrapped(self.optimizer):
            return "the optimizer has hooks, or something around its step"
        if self._holds_others:
            return "the optimizer has parameters that are not the model's"
        if getattr(self.accelerator.clip_grad_norm_, "__func__", None) is not _CLIP:
            return "the accelerator's clip_grad_norm_ is not Accelerate's"
        overrides = self._overridden(_METHODS)
        if overrides is not None:
            return f"{overrides} and may look at them"
        if len({(type(g), g.device, g.dtype) for g in gradients}) > 1 or type(gradients[0]) is not Tensor:
            return "the gradients are of several dtypes or devices"
        watching = (each for each in self.callback_handler.callbacks if any(acts_on(each, event) for event in _EVENTS))
        return next((f"{type(callback).__name__} may look at them" for callback in watching), None)
