"""Padding-free batches in the trainer: whether a run that is not packed can have them, and its training batches.

Evaluation keeps TRL's collator. Trainer weights the loss of an evaluation batch by its number of rows, and
`compute_metrics` is handed logits row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chronicals_trl import _data_sets
from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.model.patch import base_model
from chronicals_trl.packing.padding_free import (
    PaddingFreeCollator,
    RowLengths,
    fitted_row_lengths,
    spread_row_lengths,
)
from chronicals_trl.packing.trainer import first_tokens
from chronicals_trl.report import ActivationReport

PADDING_FREE = "padding_free"
PADDING_FREE_NOTE = "padding-free: the documents of a batch are one row, without padding between them"

# What lies between the collator and the model, and may look for padded rows in a batch.
BETWEEN = ("get_train_dataloader", "get_batch_samples", "training_step", "_prepare_inputs", "compute_loss")

# What else a subclass may have that counts on a row for each document, and is not between the two.
_BESIDE = ("_get_dataloader", "_get_num_items_in_batch", "_prepare_input", "_inner_training_loop")

# Implementations that attend through a mask of a row's tokens by a row's tokens.
_DENSE = ("sdpa", "eager", "chronicals_blockwise")

# On CPUs, where that is the only way: from here on such a mask has a quarter of a gibibyte.
LONGEST_DENSE_ROW = 16_384

# Strategies whose batches have hardly any padding.
_ALIKE = ("group_by_length", "batch_rebalance")


class PaddingFreeMixin(Trainer):
    """The methods of `SFTTrainer` that padding-free batches take; each is the parent's where they are off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    _cuts_batches: Callable[[Any], bool]
    _data_ranks: Callable[[], int]
    _leak: Callable[[], str | None]
    _renumbers: Callable[[], str | None]
    _overridden: Callable[[tuple[str, ...]], str | None]
    _loss_shifts_labels: bool
    chronicals_report: ActivationReport
    _tell_once: Callable[..., None]
    data_collator: Any
    aux_loss_enabled: bool

    _unpadded: DataCollatorForLanguageModeling | None = None  # TRL's collator, which trains without its padding
    _padded_because: str | None = None
    _rows_recur: bool = False  # as CUDA graphs need it

    def _choose_padding_free(self, config: ChronicalsConfig, leave_out: str | None = None) -> None:
        """Decide, once the model is patched.

        Args:
            leave_out: why not, if another rank has found a reason.

        Raises:
            ValueError: `padding_free="on"` and it cannot be.
        """
        self._unpadded = self._padded_because = None
        if config.padding_free == "off" or self.args.packing:
            return
        reason = self._padding_free_ruled_out()
        if reason is not None and config.padding_free == "on":
            raise ValueError(
                f"padding_free='on' in chronicals_config, but {reason}. Set padding_free='auto', which leaves the "
                "batches of such a run as they are, or change what stands in the way."
            )
        if reason is None and config.padding_free == "auto":
            reason = self._padding_free_pointless() or leave_out
        if reason is None:
            self._unpadded = self.data_collator
        else:
            self._padded_because = reason

    def _padding_free_fact(self) -> dict[str, str]:
        """For the ranks to compare: where one of them alone has the weights (FSDP), it alone can try the model."""
        return {PADDING_FREE: "off" if self._unpadded is None else "on"}

    def _padding_free_ruled_out(self) -> str | None:
        """Why the result would be another one; the cheap questions first."""
        args: Any = self.args
        collator = self.data_collator
        if type(collator) is not DataCollatorForLanguageModeling:
            return f"the batches are those of {type(collator).__name__}, not of TRL's collator for text"
        overrides = self._overridden((*BETWEEN, *_BESIDE))
        if overrides is not None:
            return f"{overrides}, which may count on padded rows"
        if self.compute_loss_func is not None:
            return "compute_loss_func may count on a row for each document"
        if args.neftune_noise_alpha is not None:
            return "neftune_noise_alpha is set, and NEFTune's noise depends on the length of the padded rows"
        if not collator.padding_free and not self._loss_shifts_labels:
            return "of this model transformers counts each document's first token as a label, as it is in padded rows"
        if args.include_num_input_tokens_seen == "non_padding" and not collator.padding_free:
            return "include_num_input_tokens_seen='non_padding' counts by the mask of padded rows"
        if args.n_gpu > 1:
            return "several GPUs in one process get a share of each batch's rows"
        if self._cuts_batches(self.train_dataset):  # TRL has set it to False for streams
            return "dispatch_batches=True cuts batches apart"
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or getattr(parallelism, "sp_enabled", False)):
            return "context or sequence parallelism cuts each row into one part a rank"
        if self._row_lengths(self.train_dataset, self._train_batch_size) is None:
            return "nothing limits the length of its documents: set max_length"
        return self._model_in_the_way()

    def _model_in_the_way(self) -> str | None:
        model: Any = base_model(self.model)
        peft_config = getattr(self.model, "active_peft_config", None)
        if getattr(peft_config, "is_prompt_learning", False):
            return f"PEFT's {type(peft_config).__name__} puts its virtual tokens before each row"
        if getattr(peft_config, "alora_invocation_tokens", None):
            return "an activated LoRA (alora_invocation_tokens) begins at one place in each row"
        config = model.config.get_text_config()
        if config is not model.config:
            return "the model is multimodal"
        others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if others:
            return f"the model has layers ({', '.join(sorted(others))}) that go by a row, not by a document"
        try:
            leak = self._leak()
            renumbers = self._renumbers() if leak is None else None
        except Exception as error:  # of whatever kind: batches as they were have run without this
            words = str(error).splitlines()
            return f"this model could not be tried on it ({type(error).__name__}: {words[0] if words else ''})"
        if renumbers is not None:  # RoBERTa's count from the number of the padding token on
            return f"this model numbers the tokens of a padded row otherwise ({renumbers})"
        return None if leak is None else f"this model lets documents of a row attend to each other ({leak})"

    def _padding_free_pointless(self) -> str | None:
        """Why padded batches are no slower, or why it cannot be told whether the result would be another one."""
        args: Any = self.args
        if self._train_batch_size == 1:
            return "a batch of one document has no padding"
        if isinstance(self.train_dataset, Dataset) and args.train_sampling_strategy in _ALIKE:
            return f"train_sampling_strategy={args.train_sampling_strategy!r} puts documents of like length together"
        half = self.accelerator.mixed_precision in ("bf16", "fp16")
        dense = dense_mask(base_model(self.model), args.device, half=half)
        if dense is not None:
            return dense
        rows = self._row_lengths(self.train_dataset, self._train_batch_size)
        assert rows is not None
        if args.device.type == "cpu" and rows.largest > LONGEST_DENSE_ROW:
            return f"on a CPU its attention would need a mask of {rows.largest:,} tokens by as many"
        if rows.fill is not None and rows.padded is not None and rows.padded >= rows.fill:
            return f"its documents are of like length: about {rows.padded:.0%} of padded batches is real already"
        if any(hasattr(parameter, "ds_shape") for parameter in self.model.parameters()):
            return (
                "the weights are partitioned (ZeRO-3), so whether documents of a row attend to each other cannot be "
                "tried (padding_free='on' insists)"
            )
        return None

    # -- the rows ----------------------------------------------------------------------------------------------------

    def _row_lengths(self, dataset: Any, batch_size: int) -> RowLengths | None:
        """For batches of so many documents (of all ranks, where a batch is split); None where there is no limit."""
        args: Any = self.args
        collator: Any = self._unpadded or self.data_collator
        multiple = math.lcm(8, collator.pad_to_multiple_of or 1)
        documents = self._documents_in_a_row(batch_size)
        if not (isinstance(dataset, Dataset) and len(dataset) and _data_sets.has_token_lists(dataset)):
            return spread_row_lengths(documents, args.max_length, multiple=multiple) if args.max_length else None
        lengths, order = _data_sets.list_lengths(dataset, "input_ids"), args.train_sampling_strategy
        if order in _ALIKE:
            return spread_row_lengths(documents, max(1, int(lengths.max())), multiple=multiple)
        return fitted_row_lengths(lengths, documents, multiple=multiple, in_order=order == "sequential")

    def _documents_in_a_row(self, batch_size: int) -> int:
        """Of a rank's batch; where it is padded, its rows."""
        return max(1, batch_size // (self._data_ranks() if self.accelerator.split_batches else 1))

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if self._unpadded is None or not kwargs.get("is_training") or self._collator_was_replaced():
            return super()._get_dataloader(dataset, *args, **kwargs)
        row_lengths = self._row_lengths(dataset, kwargs["batch_size"])
        assert row_lengths is not None
        present = self.data_collator
        self.data_collator = PaddingFreeCollator(
            row_lengths if self._rows_recur else row_lengths.exact(),
            documents=self._documents_in_a_row(kwargs["batch_size"]),
            pad_token_id=self._unpadded.pad_token_id,
            filler_ids=first_tokens(dataset),
            emit_token_mask=self.aux_loss_enabled,
            splits_rows=self._unpadded.padding_free,
        )
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = present

    def _collator_was_replaced(self) -> bool:
        """Whether the user has set another one since; then batches are what that makes of them, and it is said."""
        collator: Any = self.data_collator
        if self._unpadded is collator or self._unpadded is getattr(collator, "fallback", None):
            return False
        self._unpadded = None
        self._tell_once(
            f"padding-free: off from here on, data_collator was replaced (by {type(collator).__name__})", warn=True
        )
        return True

    def _largest_batch(self) -> int | None:
        """Tokens of a rank's largest training batch, padding included; None where nothing limits it."""
        args: Any = self.args
        if self._unpadded is None:
            return args.per_device_train_batch_size * args.max_length if args.max_length else None
        rows = self._row_lengths(self.train_dataset, self._train_batch_size)
        return None if rows is None else rows.largest

    def _usual_batch(self) -> int:
        """Tokens of a training batch whose documents are one row, on average."""
        rows = self._row_lengths(self.train_dataset, self._train_batch_size)
        assert rows is not None
        return rows.usual

    def _recurring_rows(self) -> tuple[int, ...]:
        """The lengths of training's rows, where they are few and fit the documents."""
        rows = self._row_lengths(self.train_dataset, self._train_batch_size)
        return () if rows is None or rows.fill is None else rows.lengths

    def _padding_free_notes(self, report: ActivationReport) -> list[str]:
        """What is said of the rows, once it is known whether graphs of them are captured."""
        self._rows_recur = report["cuda_graphs"].state == "on"
        if self._padded_because is not None:
            return [f"padding-free: off, batches stay as they are: {self._padded_because}"]
        if self._unpadded is None:
            return []
        rows = self._row_lengths(self.train_dataset, self._train_batch_size)
        assert rows is not None
        return [f"{PADDING_FREE_NOTE}; {self._told(rows)}"]

    def _told(self, rows: RowLengths) -> str:
        assert self._unpadded is not None
        padded = None if rows.padded is None or self._unpadded.padding_free else f"{rows.padded:.0%}"
        if not self._rows_recur:
            told = f"rows are as long as their documents, up to a multiple of {rows.multiple} tokens"
            return told if padded is None else f"{told} (padded, about {padded} of them would be real)"
        if rows.fill is None:
            return f"rows of few lengths, of {rows.largest:,} tokens at most"
        told = f"rows of {len(rows.lengths)} lengths, {rows.lengths[0]:,} to {rows.lengths[-1]:,} tokens, about "
        return f"{told}{rows.fill:.0%} of them real" + ("" if padded is None else f" (padded, {padded})")


def dense_mask(model: nn.Module, device: torch.device, *, half: bool) -> str | None:
    """Why attention over one long row costs more on this GPU than over padded ones: its mask has S × S entries.

    Args:
        half: whether autocast makes half precision of what the model computes.
    """
    if device.type == "cpu":
        return None  # where there is nothing else
    config: Any = model.config
    implementation = config.get_text_config()._attn_implementation
    if implementation in _DENSE:
        return f"its attention ({implementation}) would need a mask of a whole row's tokens by as many"
    if not half and next(model.parameters()).dtype == torch.float32:
        return "in float32 its attention would need a mask of a whole row's tokens by as many"
    return None
