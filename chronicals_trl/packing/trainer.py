"""Packing in the trainer: the data set packed once it is prepared, the batches of its rows, the ranks' shares."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from chronicals_trl import _data_sets, _inputs
from chronicals_trl._files import write_text
from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.packing.arrays import ArrayRows
from chronicals_trl.packing.balance import BalancedSampler, StepLayout, attention_costs, have_tokens
from chronicals_trl.packing.collator import PackedCollator
from chronicals_trl.packing.dataset import PackStats, pack_dataset
from chronicals_trl.packing.label_rows import WithLabelRows
from chronicals_trl.packing.planning import NothingToPack
from chronicals_trl.packing.ranks import main_process_first, require_same_on_all_ranks
from chronicals_trl.packing.steps import StepCounts
from chronicals_trl.report import ActivationReport, PartReport

logger = logging.getLogger(__name__)

PACKING_FILE = "chronicals_packing.json"

# Where a subclass has its own of these, what it makes may have any length.
_LOADING = ("get_train_dataloader", "_get_dataloader", "_get_train_sampler")

# cu_seqlens is padded to a multiple of this many entries, so that batches share few shapes.
CU_SEQLENS_BUCKET = 32


class PackingMixin(Trainer):
    """The methods of `SFTTrainer` between the data set and the batch; each is the parent's with the flag off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    _packing: PartReport
    _head: bool
    _data_notes: dict[str, str]
    chronicals_report: ActivationReport
    _tell_once: Callable[..., None]
    aux_loss_enabled: bool
    data_collator: Any
    _look_at_documents: Callable[..., None]
    _overridden: Callable[[tuple[str, ...]], str | None]

    _train_stats: PackStats | None = None
    _train_prepared: bool = False
    _steps_of: StepLayout | None = None  # of the run that this one goes on from, where it is another one

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
        if packs and _data_sets.came_packed(f"{name} data set", dataset, args.max_length):
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
            keep_end = not packs and args.truncation_mode == "keep_end"  # TRL packs the beginnings whatever it says
            _data_sets.require_labels(dataset, args.max_length if cuts else None, keep_end=keep_end)
        if not packs:
            # The second step of two, so that what is cut off is seen: tokens are there, and are truncated now.
            if args.max_length is not None:
                self._note_truncation(name, dataset, args.max_length)
            kept = prepare(dataset, processing_class, args, False, None, dataset_name)
            if training:
                self._look_at_documents(kept, self._note_dropped(name, len(dataset), len(kept)))
            return kept
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
        require_same_on_all_ranks(name, packed, stats)
        if training:
            self._train_stats = stats
            self._look_at_documents(dataset, stats.dropped_masked or 0)
        self._data_notes[name] = f"packing {name}: {stats.describe()}"
        # The rows of a stream's window are shuffled already, and another buffer of them would not resume.
        shuffles = args.shuffle_dataset and isinstance(packed, Dataset)
        return _shuffle_bins(packed, args.seed) if shuffles else packed

    # -- a checkpoint knows what it was packed as ---------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self._train_stats is None:
            return
        self.accelerator.wait_for_everyone()  # what this file says of the checkpoint is true once all have written
        if self.args.should_save:
            folder = Path(self._get_output_dir(kwargs.get("trial", args[1] if len(args) > 1 else None)))
            checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if checkpoint.is_dir():  # save_total_limit may have removed it again
                write_text(checkpoint / PACKING_FILE, json.dumps(self._packed_as(), indent=2) + "\n")

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        self._steps_of = None
        then = _packed_as_of(resume_from_checkpoint) if self._chronicals is not None else None
        if then is not None:
            self._go_on_with_steps_of(str(resume_from_checkpoint), then)
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _go_on_with_steps_of(self, checkpoint: str, then: dict[str, Any]) -> None:
        """Have each step train on the rows that it would have had in the run that wrote the checkpoint."""
        steps = then.get("steps")
        if steps is None or not self._shuffles_bins(self.train_dataset):
            return
        steps_of, layout = StepLayout(**steps), self._step_layout()
        if steps_of == layout or steps_of.rows != layout.rows:
            return
        self._steps_of = steps_of
        self._tell_once(
            f"packing: {checkpoint} comes from a run on {then['ranks']} ranks; each step goes on with the rows that "
            f"it would have had there, dealt to {self._data_ranks()}. Dropout's masks are those of other ranks"
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        then = _packed_as_of(checkpoint)
        if then is None or self._train_stats is None:
            return
        now = self._packed_as()
        other = [name for name in now if then.get(name) != now[name] and name not in ("ranks", "steps")]
        other += self._other_steps(then, now)
        if other:
            told = ", ".join(f"{name} {then.get(name)} then, {now[name]} now" for name in other)
            self._tell_once(
                f"packing: {checkpoint} was written with other rows ({told}). The steps that it has done are skipped "
                "in the rows of now: some documents come twice and some not at all in this epoch. To go on with the "
                "rows that are left, resume with the settings of then",
                warn=True,
            )

    def _packed_as(self) -> dict[str, Any]:
        """What decides which rows there are and who gets them."""
        assert self._train_stats is not None and self._chronicals is not None
        figures = self._train_stats.to_dict()
        named = {"max_length": "capacity", "packing_strategy": "strategy", "packing_window": "window"}
        counted = ("documents", "tokens", "bins")
        packed = {name: figures[key] for name, key in named.items()} | {name: figures[name] for name in counted}
        return packed | {
            "ranks": self.args.world_size,
            "rows_per_step": self._step_layout().rows,
            "steps": asdict(self._steps_of or self._step_layout()),
        }

    def _other_steps(self, then: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """What gives the steps other rows than they had on the ranks of then, although the data set is the same."""
        if then.get("rows_per_step") != now["rows_per_step"]:
            return []  # which is named by itself
        same = self._shuffles_bins(self.train_dataset) or (
            isinstance(self.train_dataset, Dataset) and self.args.train_sampling_strategy == "sequential"
        )
        return [] if same or then.get("ranks") == now["ranks"] else ["ranks"]

    def _note_truncation(self, name: str, dataset: Dataset, max_length: int) -> None:
        lengths = _data_sets.list_lengths(dataset, "input_ids")
        above = lengths[lengths > max_length]
        if len(above):
            self._data_notes[name] = (
                f"{name}: {len(above):,} of {len(lengths):,} documents truncated to max_length={max_length:,} "
                f"({int((above - max_length).sum()):,} tokens lost)"
            )

    def _note_dropped(self, name: str, documents: int, kept: int) -> int:
        """How many documents TRL has left out, since nothing labelled was left of them."""
        if documents > kept:
            told = f"{documents - kept:,} of {documents:,} documents left out: no label to learn"
            self._data_notes[name] = "; ".join(filter(None, [self._data_notes.get(name), told]))
        return documents - kept

    def _packed_collator(self, text_config: Any) -> PackedCollator:
        """The collator of packed rows, around the present one; `text_config` is that of the language model."""
        stats = self._train_stats
        # Linear-attention and state-space layers start a new state at each entry of cu_seqlens: exact ones for them.
        hybrid = not set(getattr(text_config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        return PackedCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            capacity=self.args.max_length,
            max_segment_length=stats.max_segment_length if stats else None,
            max_docs_per_bin=_usual_docs_per_bin(stats) if stats else None,
            cu_seqlens_bucket=None if hybrid else CU_SEQLENS_BUCKET,
            fallback=self.data_collator,
            emit_token_mask=self.aux_loss_enabled,
            filler_ids=first_tokens(self.train_dataset),
        )

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        collator: Any = self.data_collator
        if self._chronicals is not None and self._head and not self._cuts_batches(dataset):
            self.data_collator = WithLabelRows(collator)
        if type(collator) is PackedCollator and _python_rows_of_bins(dataset):
            dataset = ArrayRows.of(dataset)  # lists of Python integers take ten times as long
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

    def _step_notes(self) -> list[str]:
        """What a step of packed rows holds, and how many there are; nothing where that is not known beforehand."""
        counts = self._step_counts()
        if counts is None:
            return []
        few = counts.too_few()
        if few is not None and self.args.should_log:
            logger.warning("chronicals-trl: %s", few)
        return [counts.describe(self.accelerator.num_processes), *filter(None, [few])]

    def _step_counts(self) -> StepCounts | None:
        args, stats = self.args, self._train_stats
        if stats is None or not stats.documents or not stats.bins or not isinstance(self.train_dataset, Dataset):
            return None
        parallelism = self.accelerator.parallelism_config
        if self._overridden(_LOADING) or args.train_sampling_strategy == "batch_rebalance":
            return None
        if parallelism is not None and parallelism.sp_size > 1:
            return None
        return StepCounts(
            documents=stats.documents,
            rows=stats.bins,
            empty_rows=stats.empty_bins or 0,
            capacity=stats.capacity,
            batch_size=self._train_batch_size,
            ranks=1 if self.accelerator.split_batches else self._data_ranks(),
            accumulation=args.gradient_accumulation_steps,
            epochs=args.num_train_epochs,
            max_steps=args.max_steps,
            drop_last=args.dataloader_drop_last,
            exact=not stats.masked_pieces,  # a long document of which TRL keeps no label may be among those
        )

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
        return _inputs.balance_off(self, self._chronicals, PackingMixin)

    def _balanced_sampler(self, dataset: Dataset) -> BalancedSampler:
        layout = self._step_layout()
        return BalancedSampler(
            attention_costs(dataset, self.args.max_length),
            ranks=layout.ranks,
            batch_size=layout.batch_size,
            accumulation=layout.accumulation,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            real=have_tokens(dataset),
            steps_of=self._steps_of,
        )

    def _step_layout(self) -> StepLayout:
        """Of the present run. Where the ranks are not balanced, the plain shuffle is cut into steps."""
        ranks, accumulation = self._data_ranks(), self.args.gradient_accumulation_steps
        shares = ranks if self.accelerator.split_batches else 1
        batch_size = max(1, self._train_batch_size // shares)
        if ranks > 1 and self._balance_off() is None:
            return StepLayout(ranks, batch_size, accumulation)
        return StepLayout(1, ranks * batch_size * accumulation, 1)

    def _data_ranks(self) -> int:
        """Ranks that get rows of their own; those of one tensor- or context-parallel group share theirs."""
        parallelism = self.accelerator.parallelism_config
        shared = 1 if parallelism is None else parallelism.tp_size * parallelism.cp_size
        ranks: int = self.accelerator.num_processes // shared
        return ranks

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return self._balanced_sampler(dataset) if self._shuffles_bins(dataset) else super()._get_train_sampler(dataset)

    def _shuffles_bins(self, dataset: Any) -> bool:
        """Whether the rows are packed and come in the order of `BalancedSampler`, on one rank too."""
        return (
            self._chronicals is not None
            and self._packing.state == "on"
            and self.args.packing
            and isinstance(dataset, Dataset)
            and "seq_lengths" in dataset.column_names
            and self.args.train_sampling_strategy == "random"
            and type(self).get_train_dataloader is PackingMixin.get_train_dataloader
        )


def _packed_as_of(checkpoint: str | None) -> dict[str, Any] | None:
    """What the run that wrote a checkpoint says of its rows, if it packed them."""
    file = Path(checkpoint or "") / PACKING_FILE
    if checkpoint is None or not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _shuffle_bins(packed: Dataset, seed: int) -> Dataset:
    """The rows in another order, those without tokens last: how many there are depends on the number of ranks."""
    real = have_tokens(packed)
    shuffled = packed.select(np.flatnonzero(real)).shuffle(seed=seed)
    return shuffled if real.all() else concatenate_datasets([shuffled, packed.select(np.flatnonzero(~real))])


def _python_rows_of_bins(dataset: Any) -> bool:
    """Whether the rows are packed and come as Python lists; another format is the user's own wish."""
    return isinstance(dataset, Dataset) and "seq_lengths" in dataset.column_names and dataset.format["type"] is None


def _usual_docs_per_bin(stats: PackStats) -> int | None:
    """What most bins stay below, for the usual length of `cu_seqlens`.

    Not the fullest bin's number: the last bins of a plan may hold hundreds of short documents, and attention pays for
    entries that a batch does not need (1% for 32 of them, 19 to 32% for 200: docs/benchmarks.md).
    """
    if not stats.bins or not stats.documents or stats.max_docs_per_bin is None:
        return stats.max_docs_per_bin
    return min(stats.max_docs_per_bin, math.ceil(stats.documents / stats.bins) + CU_SEQLENS_BUCKET // 2)


def first_tokens(dataset: Any) -> list[int]:
    """A few real tokens, for batches of empty rows alone; a stream has no such rows, and is not read for them."""
    rows = iter(dataset) if isinstance(dataset, Dataset) else iter(())
    ids: Any = next((row["input_ids"] for row in rows if len(row["input_ids"])), [])
    return [int(token) for token in ids[:16]]
