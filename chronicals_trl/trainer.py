"""SFTTrainer: TRL's, with the parts of this package put in at the seams that TRL leaves open. Glue, and nothing else.

The seams, all of them methods that TRL or transformers calls: `_prepare_dataset` (packing), `_get_train_sampler` (the
ranks' shares), `compute_loss` (the head), `create_optimizer` (LoRA+), `get_batch_samples` and `_prepare_inputs` (token
counts), `log`. With the flag off each returns the parent's result as it is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.sft_trainer import SFTTrainer as TrlSFTTrainer
from trl.trainer.utils import get_config_model_id

from chronicals_trl import _inputs
from chronicals_trl._versions import installed, newer_than_tested
from chronicals_trl.config import PARTS, ChronicalsConfig, SFTConfig, read_flag, without_trainer_parts
from chronicals_trl.model.attention import use_padding
from chronicals_trl.model.attention_choice import verify_isolation, verify_padding
from chronicals_trl.model.lm_head import HeadCall, mask_for_the_router_alone
from chronicals_trl.model.patch import base_model, is_patched, patch_model, unpatch_model
from chronicals_trl.observe.throughput import ThroughputMeter
from chronicals_trl.optim.lora_plus import apply_lora_plus, group_sizes
from chronicals_trl.packing.balance import BalancedSampler, attention_costs
from chronicals_trl.packing.collator import PackedCollator
from chronicals_trl.packing.dataset import PackStats, pack_dataset
from chronicals_trl.packing.label_rows import WithLabelRows
from chronicals_trl.packing.planning import NothingToPack
from chronicals_trl.packing.ranks import main_process_first, require_same_on_all_ranks
from chronicals_trl.report import ActivationReport, PartReport

logger = logging.getLogger(__name__)

REPORT_FILE = "chronicals_report.json"
# cu_seqlens is padded to a multiple of this many entries, so that batches share few shapes.
CU_SEQLENS_BUCKET = 32


class SFTTrainer(TrlSFTTrainer):
    """TRL's SFTTrainer; with `SFTConfig(use_chronicals=True)` it trains the same model from packed, fused steps.

    Takes exactly what TRL's takes. What is on, and what is off and why, is printed at the start, kept in
    `chronicals_report` and written to `chronicals_report.json` in the output directory.

    Attributes:
        chronicals_report (ActivationReport): the state of every part.

    Raises:
        ValueError: no usable text in a data set, an empty data set, nothing to learn, tokens that the model does not
            know, packing into fewer than 2 tokens, or NaN or infinite weights; each before the first step.
        RuntimeError: `strict=True`, or a part set to `"on"`, and the part does not fit; packed documents that the
            model does not keep apart.
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
        self._train_stats: PackStats | None = None
        self._train_prepared = False
        self._lora_plus = False
        self._lora_b_group: int | None = None  # of the optimizer's groups, the one whose rate is logged
        self._lora_b_rate: float | Tensor | None = None
        self._filters_losses = False  # in place of Trainer, until the step is logged
        self._lora_plus_rates = ""  # which rates it sets, as the report has it
        self._stock_groups: list[dict[str, Any]] = []  # the optimizer's groups before the split
        # The class's default, "look at the environment", is what stock TRL's pickled arguments fall back to: off.
        flag = getattr(arguments, "use_chronicals", False)
        if not (flag and read_flag(flag)):
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

        config = ChronicalsConfig.resolve(arguments.chronicals_config)
        _inputs.check(arguments, given)
        self._chronicals = config
        self._packing = _inputs.packing_part(arguments, config)
        if self._packing.state == "on":
            self._data_notes |= _inputs.keep_batches_whole(arguments)
        _unpatch(given.get("model"))
        super().__init__(*args, **kwargs)
        self._check_tokens()
        self._meter = ThroughputMeter(device=self.args.device)
        self._real_tokens: int | Tensor = 0
        self._token_mask: Tensor | None = None
        self._label_rows: tuple[Tensor, Tensor] | None = None  # with the labels that they are of
        self._batch_tokens: int | None = None
        self._router_share: float | Tensor = 1.0
        try:
            self.chronicals_report = self._activate(config)
        except BaseException:
            unpatch_model(self.model)  # the caller still has the model, and may go on without us
            raise
        if self.args.should_log:
            self.chronicals_report.print()
            logger.info(self.chronicals_report.log_line())
        self._save_report()

    def _check_tokens(self) -> None:
        embedding = base_model(self.model).get_input_embeddings()
        vocabulary = getattr(embedding, "num_embeddings", None)
        if vocabulary is None:  # PEFT's layer around one, perhaps
            inner = getattr(embedding, "base_layer", None) or getattr(embedding, "original_module", None)
            vocabulary = getattr(inner, "num_embeddings", None)
        if vocabulary is None:
            return
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        _inputs.require_known_tokens("train_dataset", self.train_dataset, vocabulary)
        for key, dataset in evaluation.items():
            _inputs.require_known_tokens(f"eval_dataset[{key!r}]" if key else "eval_dataset", dataset, vocabulary)

    # -- activation --------------------------------------------------------------------------------------------------

    def _activate(self, config: ChronicalsConfig) -> ActivationReport:
        """Patch the model, set the trainer's own parts, and agree with the other ranks on what is on."""
        leave_out = _inputs.conflicts(self, TrlSFTTrainer, SFTTrainer)
        report = self._patch(config, leave_out)
        if self.args.world_size > 1:
            states = gather_object([{part.name: part.state for part in report.parts}])
            apart = [name for name in PARTS if len({state[name] for state in states}) > 1]
            if apart:
                leave_out |= dict.fromkeys(apart, "off on another rank")
                report = self._patch(config, leave_out)
        self._lora_plus = report["lora_plus"].state == "on"
        self._lora_plus_rates = report["lora_plus"].backend or ""
        self._head = report["head"].state == "on"
        if self._packing.state == "on":
            self._use_packed_collator()
            self._check_isolation()
        else:
            report.notes += self._use_padded_attention()
        report.notes += self._notes(config)
        report.notes += [*self._balance_notes(), *filter(None, [_inputs.copies_note(self.args)])]
        report.raise_for_omissions(config)
        return report

    def _patch(self, config: ChronicalsConfig, leave_out: dict[str, str]) -> ActivationReport:
        report = patch_model(self.model, without_trainer_parts(config), leave_out=leave_out)
        report.set(self._packing)
        lora_plus = _inputs.lora_plus_part(self, config)
        if "lora_plus" in leave_out and lora_plus.state == "on":
            lora_plus = PartReport("lora_plus", "off", reason=leave_out["lora_plus"], omitted=True)
        report.set(lora_plus)
        return report

    def _use_packed_collator(self) -> None:
        stats = self._train_stats
        text_config = base_model(self.model).config.get_text_config()
        # Linear-attention and state-space layers start a new state at each entry of cu_seqlens: exact ones for them.
        hybrid = not set(getattr(text_config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        self.data_collator = PackedCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            capacity=self.args.max_length,
            max_segment_length=stats.max_segment_length if stats else None,
            max_docs_per_bin=stats.max_docs_per_bin if stats else None,
            cu_seqlens_bucket=None if hybrid else CU_SEQLENS_BUCKET,
            fallback=self.data_collator,  # type: ignore[has-type]
            emit_token_mask=self.aux_loss_enabled,
            filler_ids=_first_tokens(self.train_dataset),
        )

    def _check_isolation(self) -> None:
        model = base_model(self.model)
        with self.compute_loss_context_manager():
            leak = verify_isolation(self.model, self.args.device)
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
        with self.compute_loss_context_manager():
            difference = verify_padding(self.model, self.args.device)
        if difference is not None:
            use_padding(model, trusted=False)
            return [f"attention: padded rows keep SDPA's dense mask ({difference})"]
        return ["attention: padded rows go through the same kernel, without a dense mask"]

    def _notes(self, config: ChronicalsConfig) -> list[str]:
        notes = list(self._data_notes.values())
        if self._lora_plus:
            rates = []
            if "ratio" in self._lora_plus_rates:
                rates.append(f"B learns at {config.lora_plus_ratio:g} times the learning rate of A")
            if "embedding_lr" in self._lora_plus_rates:
                rates.append(f"LoRA's embedding matrices at {config.lora_plus_embedding_lr:g}")
            notes.append(f"LoRA+: {', '.join(rates)}; lora_plus='off' restores one rate for all")
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

    # -- packing -----------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Dataset | IterableDataset:
        prepare = super()._prepare_dataset
        if self._chronicals is None:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        # TRL prepares the training set first; the name does not tell, since a key of an eval_dataset may be "train".
        training, self._train_prepared = not self._train_prepared, True
        name = "train" if training else "eval" if dataset_name == "eval" else f"eval[{dataset_name!r}]"
        packs = packing and self._packing.state == "on"
        if packs and _inputs.came_packed(f"{name} data set", dataset, args.max_length):
            self._data_notes[name] = f"packing {name}: the rows came packed (seq_lengths) and are used as they are"
            return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        # Without max_length and packing the parent only tokenises and builds labels: truncating here would lose the
        # tokens that bfd_split keeps. A data set is shuffled as TRL does it, before and after packing.
        plain = copy.copy(args)
        plain.max_length = None
        plain.shuffle_dataset = False
        if not packs and (packing or not isinstance(dataset, Dataset)):
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        dataset = prepare(dataset, processing_class, plain, False, formatting_func, dataset_name)
        if training:
            cuts = not packs or args.packing_strategy == "bfd"
            _inputs.require_labels(dataset, args.max_length if cuts else None)
        if not packs:
            # The second step of two, so that what is cut off is seen: tokens are there, and are truncated now.
            if args.max_length is not None:
                self._note_truncation(name, dataset, args.max_length)
            return prepare(dataset, processing_class, args, False, None, dataset_name)
        if args.remove_unused_columns:  # else other columns with one value a token are packed along
            dataset = dataset.select_columns(["input_ids", "labels"])
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        try:
            with main_process_first():
                packed, stats = pack_dataset(
                    dataset,
                    args.max_length,
                    strategy=args.packing_strategy,
                    pad_bins_to_multiple_of=_inputs.bins_per_round(args, training=training),
                    window=self._chronicals.packing_window,
                )
        except NothingToPack as error:
            raise ValueError(f"The {name} data set cannot be packed. {error}") from error
        require_same_on_all_ranks(name, stats)
        if training:
            self._train_stats = stats
        self._data_notes[name] = f"packing {name}: {stats.describe()}"
        # The rows of a stream's window are shuffled already, and another buffer of them would not resume.
        shuffles = args.shuffle_dataset and isinstance(packed, Dataset)
        return packed.shuffle(seed=args.seed) if shuffles else packed

    def _note_truncation(self, name: str, dataset: Dataset, max_length: int) -> None:
        lengths = _inputs.list_lengths(dataset, "input_ids")
        above = lengths[lengths > max_length]
        if len(above):
            self._data_notes[name] = (
                f"{name}: {len(above):,} of {len(lengths):,} documents truncated to max_length={max_length:,} "
                f"({int((above - max_length).sum()):,} tokens lost)"
            )

    # -- the ranks' shares -------------------------------------------------------------------------------------------

    def _balance_notes(self) -> list[str]:
        """How even the ranks' shares of packed rows are; nothing where one rank has them all."""
        if not self._deals_packed_rows():
            return []
        reason = self._balance_off()
        return [f"balance: {self._balanced_sampler(self.train_dataset).describe() if reason is None else reason}"]

    def _deals_packed_rows(self) -> bool:
        on = self._chronicals is not None and self._packing.state == "on" and self.args.packing
        return on and self._data_ranks() > 1

    def _balance_off(self) -> str | None:
        assert self._chronicals is not None
        return _inputs.balance_off(self, self._chronicals, SFTTrainer)

    def _balanced_sampler(self, dataset: Dataset) -> BalancedSampler:
        ranks = self._data_ranks()
        shares = ranks if self.accelerator.split_batches else 1
        return BalancedSampler(
            attention_costs(dataset, self.args.max_length),
            ranks=ranks,
            batch_size=max(1, self._train_batch_size // shares),
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _data_ranks(self) -> int:
        """Ranks that get rows of their own; those of one tensor- or context-parallel group share theirs."""
        parallelism = self.accelerator.parallelism_config
        shared = 1 if parallelism is None else parallelism.tp_size * parallelism.cp_size
        ranks: int = self.accelerator.num_processes // shared
        return ranks

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._deals_packed_rows() or self._balance_off():
            return super()._get_train_sampler(train_dataset)
        return self._balanced_sampler(self.train_dataset if train_dataset is None else train_dataset)

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

    @torch.no_grad()
    def _record(self, mode: str, outputs: Any) -> None:
        """TRL's metrics of one micro-batch, over all ranks, kept on the device until they are logged."""
        values = [outputs.label_mask.sum(), outputs.entropy.detach().sum(), outputs.is_top1.sum()]
        if self.aux_loss_enabled:
            aux_loss = outputs.aux_loss.detach()
            values += [aux_loss, aux_loss.new_full((), self._batch_tokens != 0)]
        sums = torch.stack([value.to(values[0].device, torch.float32) for value in values])
        if self.args.world_size > 1:
            if mode == "train":
                sums = self.accelerator.reduce(sums, reduction="sum")
            else:  # as TRL does: without the ranks that have repeated rows alone
                sums = self.accelerator.gather_for_metrics(sums[None]).sum(0)
        labelled = sums[0].clamp(min=1)
        self._metrics[mode]["entropy"].append(sums[1] / labelled)
        self._metrics[mode]["mean_token_accuracy"].append(sums[2] / labelled)
        self._metrics[mode]["num_tokens"] = [0]  # filled in by `log`
        if self.aux_loss_enabled:
            self._metrics[mode]["aux_loss"].append(sums[3] / sums[4].clamp(min=1))

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        collator: Any = self.data_collator
        if self._chronicals is not None and self._head and not self._cuts_batches(dataset):
            self.data_collator = WithLabelRows(collator)  # type: ignore[assignment]
        if type(collator) is PackedCollator and _python_rows_of_bins(dataset):
            dataset = dataset.with_format("numpy")  # lists of Python integers take ten times as long
        try:
            loader = super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collator  # the user's own, to whoever looks
        shard = getattr(loader, "batch_sampler", None)
        sampler = getattr(getattr(shard, "batch_sampler", None), "sampler", None)
        if isinstance(sampler, BalancedSampler):
            # As Accelerate does with its own sampler: set_epoch then finds it behind skip_first_batches (resume) too.
            loader.set_sampler(sampler)
        return loader

    def _cuts_batches(self, dataset: Any) -> bool:
        """Whether batches will be cut into shares, on one rank too, by what knows nothing of indices."""
        if self.args.n_gpu > 1:
            return True
        dispatches = self.accelerator.dispatch_batches  # by default accelerate does so with streams
        streams = isinstance(dataset, (IterableDataset, torch.utils.data.IterableDataset))
        return streams if dispatches is None else bool(dispatches)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._chronicals is not None and batches:
            self._count_tokens(batches, device)
        return batches, num_items

    def _count_tokens(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        """Count the step's real tokens and its slots, over all ranks, without reading the device."""
        real: int | Tensor = 0
        slots: int | Tensor = sum(batch["input_ids"].numel() for batch in batches)
        filled = sum(batch.get("num_real_tokens") != 0 for batch in batches)
        for batch in batches:
            if "num_real_tokens" in batch:
                real += batch["num_real_tokens"]
            elif "attention_mask" in batch:
                real += batch["attention_mask"].sum()
            else:
                real += batch["input_ids"].numel()
        if self.args.world_size > 1:
            counts = torch.stack(
                [torch.as_tensor(count, device=device, dtype=torch.int64) for count in (real, slots, filled)]
            )
            real, slots, all_filled = self.accelerator.reduce(counts, reduction="sum").unbind()
            # TRL's router loss is the mean over the ranks' micro-batches. One of empty rows alone has none: the mean
            # is over the others, as it would be without it.
            self._router_share = self.args.world_size * len(batches) / all_filled.clamp(min=1)
        self._real_tokens = self._real_tokens + real
        self._meter.update(real, slots)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self._chronicals is not None and isinstance(inputs, MutableMapping):  # BatchEncoding is no dict
            # What the collator adds for the trainer is not the model's to see.
            self._batch_tokens = inputs.pop("num_real_tokens", None)
            self._token_mask = inputs.pop("token_mask", None)
            rows = inputs.pop("label_rows", None)
            self._label_rows = None if rows is None else (rows, inputs["labels"])
        return inputs

    # -- optimizer, logging, evaluation, saving ----------------------------------------------------------------------

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
        if self._chronicals is not None:
            mode = "train" if self.model.training else "eval"
            for name, values in self._metrics[mode].items():
                self._metrics[mode][name] = [float(value) for value in values]
            # Real tokens, padding left out; TRL counts the slots of a padding-free batch.
            self._metrics[mode]["num_tokens"] = [int(self._real_tokens)]
            if "loss" in logs:
                logs.update(self._meter.read())
                if self._lora_b_rate is not None and "learning_rate" in logs:
                    logs["learning_rate_lora_b"] = float(self._lora_b_rate)
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._restore_loss_filter()
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
            self._meter.reset()  # what came before the first step is not training
        try:
            return super().train(*args, **kwargs)
        finally:
            self._restore_loss_filter()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self._chronicals is None:
            return super().evaluate(*args, **kwargs)
        with self._meter.excluding():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._chronicals is None:
            return super()._save_checkpoint(*args, **kwargs)
        with self._meter.excluding():
            return super()._save_checkpoint(*args, **kwargs)


def _unpatch(model: Any) -> bool:
    """Whether `model` (or the name of one) came patched, by an earlier trainer in a notebook say; now it is not."""
    if not isinstance(model, nn.Module):
        return False
    patched = is_patched(model)
    unpatch_model(model)
    return patched


def _python_rows_of_bins(dataset: Any) -> bool:
    """Whether the rows are packed and come as Python lists; another format is the user's own wish."""
    return isinstance(dataset, Dataset) and "seq_lengths" in dataset.column_names and dataset.format["type"] is None


def _first_tokens(dataset: Any) -> list[int]:
    """A few real tokens, for batches of empty rows alone; a stream has no such rows, and is not read for them."""
    rows = iter(dataset) if isinstance(dataset, Dataset) else iter(())
    ids: Any = next((row["input_ids"] for row in rows if len(row["input_ids"])), [])
    return [int(token) for token in ids[:16]]
