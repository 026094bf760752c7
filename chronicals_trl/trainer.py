"""SFTTrainer: TRL's, with the parts of this package put in at the seams that TRL leaves open. Glue, and nothing else.

The seams, all of them methods that TRL or transformers calls: `compute_loss` (the head), `_prepare_inputs` and
`set_initial_training_values` (there is a batch); in `packing/trainer.py` `_prepare_dataset`, `_get_train_sampler` (the
ranks' shares) and `_get_dataloader`, the last in `padding_free.py` too; in `optim/trainer.py` `create_optimizer`; in
`model/trainer.py` (CUDA graphs) and `model/recompute_trainer.py` `train`, `training_step` and `evaluation_loop`; in
`optim/adamw_trainer.py` `train`, `training_step` and `_clip_grad_norm`; in `model/walks_trainer.py` `training_step`
and `floating_point_ops`; in `observe/trainer.py` `get_batch_samples` (token counts) and `log`; in
`observe/late_logs.py` `log`, `_maybe_log_save_evaluate` and what may come between the two; in
`observe/health/trainer.py` `log` and `training_step`, once more, and `create_optimizer`; in `observe/out_of_memory.py`
errors on their way out; in `checkpoints.py` which one `train` resumes from. With the flag off each returns the
parent's result as it is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.sft_trainer import SFTTrainer as TrlSFTTrainer
from trl.trainer.utils import get_config_model_id

from chronicals_trl import _inputs, _start
from chronicals_trl._agreement import lone_note, patch_alike
from chronicals_trl._versions import installed, newer_than_tested
from chronicals_trl.checkpoints import CheckpointsMixin
from chronicals_trl.config import ChronicalsConfig, SFTConfig, without_trainer_parts
from chronicals_trl.model import apart
from chronicals_trl.model.attention import use_padding
from chronicals_trl.model.attention_choice import verify_isolation, verify_padding, verify_positions
from chronicals_trl.model.lm_head import HeadCall, mask_for_the_router_alone
from chronicals_trl.model.patch import base_model, is_patched, patch_model, unpatch_model
from chronicals_trl.model.recompute_trainer import RecomputeMixin
from chronicals_trl.model.trainer import CudaGraphsMixin
from chronicals_trl.model.walks_trainer import WalksMixin
from chronicals_trl.observe.health.trainer import HealthMixin
from chronicals_trl.observe.late_logs import LateLogsMixin
from chronicals_trl.observe.out_of_memory import OutOfMemoryMixin
from chronicals_trl.observe.trainer import ThroughputMixin
from chronicals_trl.optim.adamw_trainer import AdamWMixin
from chronicals_trl.optim.trainer import LoraPlusMixin
from chronicals_trl.packing.trainer import PackingMixin
from chronicals_trl.padding_free import BETWEEN, PADDING_FREE, PaddingFreeMixin
from chronicals_trl.report import ActivationReport, PartReport

logger = logging.getLogger(__name__)

REPORT_FILE = "chronicals_report.json"


class SFTTrainer(
    OutOfMemoryMixin,
    CheckpointsMixin,
    PaddingFreeMixin,
    PackingMixin,
    HealthMixin,
    LoraPlusMixin,
    AdamWMixin,
    WalksMixin,
    RecomputeMixin,
    CudaGraphsMixin,
    LateLogsMixin,
    ThroughputMixin,
    TrlSFTTrainer,
):
    """TRL's SFTTrainer; with `SFTConfig(use_chronicals=True)` it trains the same model from packed, fused steps.

    Takes exactly what TRL's takes. What is on, and what is off and why, is printed at the start, kept in
    `chronicals_report` and written to `chronicals_report.json` in the output directory.

    Attributes:
        chronicals_report (ActivationReport): the state of every part.

    Raises:
        ValueError: no usable text in a data set, an empty data set, nothing to learn or to train, too few rows for a
            batch, tokens that the model does not know, packing into fewer than 2 tokens, or NaN or infinite weights;
            each before the first step.
        RuntimeError: `strict=True`, or a part set to `"on"`, and the part does not fit; packed documents that the
            model does not keep apart. In `train`, with `health="stop"`: the run does not learn as it should.
    """

    router_aux_loss_coef: float | Tensor  # TRL's

    @functools.wraps(TrlSFTTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(TrlSFTTrainer.__init__).bind(self, *args, **kwargs)
        given = bound.arguments
        if given.get("args") is None and "model" in given:
            # As the parent would, but ours: CHRONICALS_USE_CHRONICALS counts here too.
            model = given["model"]
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            given["args"] = SFTConfig(f"{name.split('/')[-1]}-SFT")
            args, kwargs = bound.args[1:], bound.kwargs
        arguments: Any = given.get("args")
        self._chronicals: ChronicalsConfig | None = None
        self._data_notes: dict[str, str] = {}
        self._filters_losses = False  # in place of Trainer, until the step is logged
        self._saw_hooks = False
        config = _start.start(arguments, given)
        if config is None:
            reason = "use_chronicals=False"
            if arguments is not None and not hasattr(arguments, "use_chronicals"):
                reason = f"the arguments are a plain {type(arguments).__module__}.{type(arguments).__qualname__}"
            self.chronicals_report = ActivationReport.all_off(reason)
            if _unpatch(given.get("model")):
                self.chronicals_report.notes.append("the model came patched, by an earlier run: unpatched")
            super().__init__(*args, **kwargs)
            # The report of an earlier run in this folder would say what is not true of this one.
            if (Path(self.args.output_dir) / REPORT_FILE).exists():
                self._save_report()
            if self.args.should_log:
                logger.warning(
                    "chronicals-trl is off (%s): this run is stock TRL. To switch it on, set use_chronicals=True in "
                    "chronicals_trl's SFTConfig, or pass --use_chronicals True.",
                    reason,
                )
            return

        self._chronicals = config
        self._packing = _inputs.packing_part(arguments, config)
        if self._packing.state == "on":
            self._data_notes |= _inputs.keep_batches_whole(arguments)
        self._data_notes |= _inputs.masking_notes(arguments, given.get("train_dataset"))
        _unpatch(given.get("model"))
        super().__init__(*args, **kwargs)
        _start.check_data(self)
        self._start_meter()
        if self.accelerator.ddp_handler is not None:
            # Gradients lie in the buckets that DDP sends, and not beside them: less memory, and no copy back.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self._token_mask: Tensor | None = None
        self._label_rows: tuple[Tensor, Tensor] | None = None  # with the labels that they are of
        self._batch_tokens: int | None = None
        try:
            self.chronicals_report = self._activate(config)
        except BaseException:
            unpatch_model(self.model)  # the caller still has the model, and may go on without us
            raise
        if self.args.should_log:
            self.chronicals_report.print()
            logger.info(self.chronicals_report.log_line())
        self._save_report()

    # -- activation --------------------------------------------------------------------------------------------------

    def _activate(self, config: ChronicalsConfig) -> ActivationReport:
        """Patch the model, set the trainer's own parts, and agree with the other ranks on what is on."""
        _inputs.require_rows_of_one_document(self.args, getattr(self.model, "active_peft_config", None))
        leave_out = _inputs.conflicts(self, SFTTrainer)
        report = patch_alike(
            lambda on_another_rank: self._patch(config, leave_out | on_another_rank), self.model, self.args.world_size,
            facts=self._padding_free_fact,
        )  # fmt: skip
        self._lora_plus = report["lora_plus"].state == "on"
        self._lora_plus_rates = report["lora_plus"].backend or ""
        self._head = report["head"].state == "on"
        self._enlarge_buckets(report)
        rounding = self._round_lengths_up(report)  # of TRL's collator, before one for packed rows is put around it
        if self._packing.state == "on":
            self.data_collator = self._packed_collator(base_model(self.model).config.get_text_config())
            self._check_isolation()
        elif self._unpadded is None:
            report.notes += self._use_padded_attention()
        report.notes += self._padding_free_notes(report)
        report.notes += rounding
        report.notes += self._notes(config)
        report.notes += self._health_notes()
        report.notes += self._balance_notes()
        report.notes += filter(None, [_inputs.copies_note(self.args), lone_note(self.args.world_size)])
        report.raise_for_omissions(config)
        return report

    def _patch(self, config: ChronicalsConfig, leave_out: dict[str, str]) -> ActivationReport:
        report = patch_model(
            self.model, without_trainer_parts(config), leave_out=leave_out, device=self._device_of_training()
        )
        report.set(self._packing)
        self._choose_padding_free(config, leave_out.get(PADDING_FREE))
        lora_plus = _inputs.lora_plus_part(self, config)
        if "lora_plus" in leave_out and lora_plus.state == "on":
            lora_plus = PartReport("lora_plus", "off", reason=leave_out["lora_plus"], omitted=True)
        report.set(lora_plus)
        report.set(self._adamw_part(config, leave_out.get("adamw")))
        recompute = self._recompute_part(config, leave_out.get("recompute"))
        report.set(recompute)
        report.set(self._graphs_part(config, leave_out.get("cuda_graphs"), recompute))
        return report

    def _device_of_training(self) -> torch.device | None:
        """Where a model will be that FSDP or DeepSpeed places, later; None where it stays as it is."""
        placed = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return self.args.device if placed and not getattr(self.model, "hf_device_map", None) else None

    def _leak(self) -> str | None:
        """How far documents that share a row attend to each other; None if they do not."""
        with self.accelerator.autocast():
            return verify_isolation(self.model, self.args.device)

    def _renumbers(self) -> str | None:
        """How far positions that are given differ from the model's own; None if they do not."""
        with self.accelerator.autocast():
            return verify_positions(self.model, self.args.device)

    def _overridden(self, names: tuple[str, ...]) -> str | None:
        """The first of the methods that a subclass has of its own, in words; None without any."""
        for name in names:
            if getattr(type(self), name) is not getattr(SFTTrainer, name):
                owner = next(base for base in type(self).__mro__ if name in vars(base))
                return f"{owner.__qualname__} overrides {name}"
        return None

    def _check_isolation(self) -> None:
        model = base_model(self.model)
        leak = self._leak()
        peft_config = getattr(self.model, "active_peft_config", None)
        setting = _inputs.packing_setting(self.args)
        if leak is not None and getattr(peft_config, "is_prompt_learning", False):
            raise RuntimeError(
                f"{setting}=True, but with PEFT's {type(peft_config).__name__} packed documents attend to each other "
                f"({leak}): its virtual tokens stand before the row, not before each document, and it drops "
                f"position_ids. Set {setting}=False, or use LoRA."
            )
        if leak is not None:
            others = _inputs.other_attention(model)
            remedy = f", or load the model with attn_implementation={others}" if others else ""
            raise RuntimeError(
                f"{setting}=True, but this model lets packed documents attend to each other ({leak}). Set "
                f"{setting}=False{remedy}."
            )

    def _use_padded_attention(self) -> list[str]:
        """Padded rows through a varlen kernel, where the mask is sure to mark padding alone; a note for the report."""
        # TRL's own collator makes the mask from the lengths, and pads on the right. Another's may mean anything.
        collator: Any = self.data_collator
        if type(collator) is not DataCollatorForLanguageModeling or collator.padding_free:
            return []
        model = base_model(self.model)
        if not use_padding(model):
            return []
        overrides = self._overridden(BETWEEN)
        if overrides is not None:  # it may alter the mask on its way
            use_padding(model, trusted=False)
            return [f"attention: padded rows keep SDPA's dense mask ({overrides})"]
        with self.accelerator.autocast():
            difference = verify_padding(self.model, self.args.device)
        if difference is not None:
            use_padding(model, trusted=False)
            return [f"attention: padded rows keep SDPA's dense mask ({difference})"]
        return ["attention: padded rows go through the same kernel, without a dense mask"]

    def _notes(self, config: ChronicalsConfig) -> list[str]:
        notes = [*self._data_notes.values(), *self._step_notes()]
        if self._lora_plus:
            rates = []
            if "ratio" in self._lora_plus_rates:
                rates.append(f"B learns at {config.lora_plus_ratio:g} times the learning rate of A")
            if "embedding_lr" in self._lora_plus_rates:
                rates.append(f"LoRA's embedding matrices at {config.lora_plus_embedding_lr:g}")
            note = f"LoRA+: {', '.join(rates)}; lora_plus='off' restores one rate for all"
            if "ratio" in self._lora_plus_rates and config.lora_plus_ratio > 1:
                # At the best rates the product of A's and B's hardly depends on the ratio (docs/lora-plus.md).
                divisor = config.lora_plus_ratio**0.5
                note += f"; a rate that was tuned without LoRA+ is to be divided by about {divisor:.2g}"
            notes.append(note)
        notes += self._router_notes()
        for package in ("trl", "transformers"):
            version = installed(package)
            if version is not None and newer_than_tested(package, version):
                notes.append(f"{package} {version} is newer than the newest tested release")
        if self.args.auto_find_batch_size and self._packing.state == "on":
            notes.append("auto_find_batch_size: after a change of the batch size an epoch's last batch may be short")
        return notes

    def _router_notes(self) -> list[str]:
        """Where the router's auxiliary loss on packed rows cannot be kept to their real tokens."""
        if not self.aux_loss_enabled or self._packing.state == "off" or self._head:
            return []
        notes = []
        if type(self).compute_loss is not SFTTrainer.compute_loss:
            notes.append(
                "auxiliary loss: compute_loss is overridden; unless it calls super().compute_loss, the router's "
                "auxiliary loss counts the padding of packed rows"
            )
        if self.args.world_size > 1:
            notes.append(
                "auxiliary loss: with the head off, aux_loss of a rank whose rows are all empty (logged, or read by a "
                "compute_loss_func) is that of padding; the loss of TRL leaves it out"
            )
        return notes

    def _save_report(self) -> None:
        if self.args.should_save:
            self.chronicals_report.save(Path(self.args.output_dir) / REPORT_FILE)

    def _tell_once(self, note: str, *, warn: bool = False) -> None:
        """In the report, and in the log."""
        if note in self.chronicals_report.notes:
            return
        self.chronicals_report.notes.append(note)
        self._save_report()
        if self.args.should_log:
            logger.log(logging.WARNING if warn else logging.INFO, "chronicals-trl: %s", note)

    def _amend_report(self, config: ChronicalsConfig) -> None:
        """Sharding, which follows patching, may have put hooks where blocks would be fused."""
        self._saw_hooks = True
        news = apart.amend(self.chronicals_report, self.model)
        if not news:
            return
        self.chronicals_report.raise_for_omissions(config)
        self._save_report()
        if self.args.should_log:
            logger.warning("chronicals-trl: %s", "; ".join(news))

    # -- the step ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # With outputs asked for (compute_metrics) the parent runs a second forward for the logits: nothing to win.
        if self._chronicals is None or not self._head or return_outputs:
            with self._router_mask(inputs) as inputs:
                return super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )
        mode = "train" if self.model.training else "eval"
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        call = HeadCall(
            weighting="dft" if self.args.loss_type == "dft" else "none",
            router_loss=False,
            token_mask=self._token_mask,
            rows=self._rows_of(inputs),
        )
        outputs = model(**inputs, fused_lm_head=True, num_items_in_batch=num_items_in_batch, head_call=call)
        loss = outputs.loss
        # The count is of all ranks' tokens, and DDP averages the gradients over the ranks.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            coefficient = self.router_aux_loss_coef * (self._router_share if mode == "train" else 1.0)
            loss = loss + coefficient * outputs.aux_loss / steps
        self._record(mode, outputs)
        return loss

    def _rows_of(self, inputs: dict[str, Any]) -> Tensor | None:
        """The positions with a label, if they are those that the head will see."""
        if self._label_rows is None or "shift_labels" in inputs:  # a rank's share of a context-parallel run
            return None
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            return None  # PEFT puts virtual tokens in front of each row
        rows, labels = self._label_rows
        return rows if inputs.get("labels") is labels else None  # of another batch, or replaced

    @contextlib.contextmanager
    def _router_mask(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """For the parent's compute_loss: inputs with which the router's auxiliary loss leaves out the padding."""
        if self._chronicals is None or self._token_mask is None:
            yield inputs
            return
        mask, coefficient = self._token_mask.long(), self.router_aux_loss_coef
        if self.model.training:
            self.router_aux_loss_coef = coefficient * self._router_share
        if self._batch_tokens == 0:  # a mean over no token is 0/0: the mean over the padding, times 0
            mask, self.router_aux_loss_coef = torch.ones_like(mask), 0.0
        try:
            with mask_for_the_router_alone(base_model(self.model)):
                yield {**inputs, "attention_mask": mask}
        finally:
            self.router_aux_loss_coef = coefficient

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self._chronicals is not None and isinstance(inputs, MutableMapping):  # BatchEncoding is no dict
            # What the collator adds for the trainer is not the model's to see.
            self._batch_tokens = inputs.pop("num_real_tokens", None)
            self._token_mask = inputs.pop("token_mask", None)
            rows = inputs.pop("label_rows", None)
            self._label_rows = None if rows is None else (rows, inputs["labels"])
        return inputs

    # -- the run -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._restore_loss_filter()
        if self._chronicals is not None and not self._saw_hooks:
            self._amend_report(self._chronicals)
        loss: Tensor = super().training_step(*args, **kwargs)
        if self._chronicals is None or not self.args.logging_nan_inf_filter:
            return loss
        # What Trainer adds to the logged loss in place of a NaN or an infinity: the mean since the last log. Its own
        # test reads every micro-batch's loss, and so waits for the GPU; until the step is logged it does not make it.
        mean = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        self.args.logging_nan_inf_filter, self._filters_losses = False, True
        return torch.where(loss.isfinite(), loss, mean.to(loss))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._restore_loss_filter()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _restore_loss_filter(self) -> None:
        if self._filters_losses:
            self.args.logging_nan_inf_filter, self._filters_losses = True, False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._chronicals is not None:
            _inputs.require_trainable(self.model)
            self._saw_hooks = False
        try:
            return super().train(*args, **kwargs)
        finally:
            self._restore_loss_filter()

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any, **named: Any) -> Any:
        if self._chronicals is not None:
            _inputs.require_batches(self, dataloader)
        return super().set_initial_training_values(args, dataloader, *more, **named)


def _unpatch(model: Any) -> bool:
    """Whether `model` (or the name of one) came patched, by an earlier trainer in a notebook say; now it is not."""
    if not isinstance(model, nn.Module):
        return False
    patched = is_patched(model)
    unpatch_model(model)
    return patched
