"""Throughput in the trainer: what a step's batches hold, how long steps take, and both in the logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.observe.flops import datasheet_tflops, training_flops
from chronicals_trl.observe.profile import StepProfile
from chronicals_trl.observe.throughput import ThroughputMeter

# Micro-batches whose sums may wait on the device, of a run that hardly ever logs.
MOST_SUMS = 1024


@dataclass(frozen=True)
class Interval:
    """What a log entry tells beside the loss, of the steps since the entry before; nothing of it has been read.

    Attributes:
        meter: throughput of these steps.
        sums: of their micro-batches, as `_record` makes them, over all ranks.
        metrics: TRL's, where its own head makes them.
        real_tokens: since the run began.
    """

    meter: ThroughputMeter
    sums: list[Tensor]
    metrics: dict[str, list[Any]]
    real_tokens: int | Tensor


class ThroughputMixin(Trainer):
    """The methods of `SFTTrainer` that throughput takes; each is the parent's with the flag off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    _metrics: dict[str, dict[str, list[Any]]]
    _data_ranks: Callable[[], int]
    _batch_tokens: int | None
    aux_loss_enabled: bool

    _meter: ThroughputMeter
    _real_tokens: int | Tensor = 0
    _router_share: float | Tensor = 1.0
    _sums: list[Tensor]  # of training's micro-batches since the last log
    _sums_on_their_way: list[Any]  # around the ranks

    def _start_meter(self) -> None:
        """A meter for the model as it is trainable now, before it is sharded."""
        device: Any = self.args.device
        rate = datasheet_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        flop_rate = None if rate is None else rate * 1e12 * self.args.world_size * max(1, self.args.n_gpu)
        model: Any = self.model
        assert self._chronicals is not None
        if self._chronicals.profile_steps is not None:
            self.add_callback(StepProfile(self._chronicals.profile_steps))
        self._sums, self._sums_on_their_way = [], []
        self._meter = ThroughputMeter(device, flops=training_flops(model), flop_rate=flop_rate)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._chronicals is not None and batches:
            self._count_tokens(batches, device)
        return batches, num_items

    def _count_tokens(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        """Count the step's real tokens and its slots, over all ranks, without reading the device."""
        real: int | Tensor = 0
        squares: int | Tensor = 0
        slots: int | Tensor = sum(batch["input_ids"].numel() for batch in batches)
        filled = sum(batch.get("num_real_tokens") != 0 for batch in batches)
        for batch in batches:
            lengths = _lengths(batch)
            squares += lengths.square().sum()
            real += batch["num_real_tokens"] if "num_real_tokens" in batch else lengths.sum()
        if self.args.world_size > 1:
            counts = torch.stack([_on_device(count, device) for count in (real, slots, squares, filled)])
            counts = self.accelerator.reduce(counts, reduction="sum")
            # Ranks that share a model's layers, or a row's tokens, have counted the same batch.
            real, slots, squares, all_filled = (counts // (self.args.world_size // self._data_ranks())).unbind()
            # TRL's router loss is the mean over the ranks' micro-batches. One of empty rows alone has none: the mean
            # is over the others, as it would be without it.
            self._router_share = self._data_ranks() * len(batches) / all_filled.clamp(min=1)
        self._real_tokens = self._real_tokens + real
        self._meter.update(real, slots, squares)

    @torch.no_grad()
    def _record(self, mode: str, outputs: Any) -> None:
        """Keep what TRL's metrics of one micro-batch are made of, on the device until they are logged."""
        values = [outputs.label_mask.sum(), outputs.entropy.detach().sum(), outputs.is_top1.sum()]
        if self.aux_loss_enabled:
            aux_loss = outputs.aux_loss.detach()
            values += [aux_loss, aux_loss.new_full((), self._batch_tokens != 0)]
        sums = torch.stack([value.to(values[0].device, torch.float32) for value in values])
        if mode == "eval":
            if self.args.world_size > 1:  # as TRL does: without the ranks that have repeated rows alone
                sums = self.accelerator.gather_for_metrics(sums[None]).sum(0)
            self._keep_metrics(mode, sums[None])
            return
        if self.args.world_size > 1:
            # Beside the step: it would have all ranks wait for the slowest one in the middle of it.
            self._sums_on_their_way.append(torch.distributed.all_reduce(sums, async_op=True))
        self._sums.append(sums)
        if len(self._sums) >= MOST_SUMS:
            self._settle_metrics()

    def _keep_metrics(self, mode: str, sums: Tensor) -> None:
        """TRL's metrics of micro-batches with these `sums` over all ranks, float32 (micro-batches, 3 or 5)."""
        labelled, entropy, top1, *router = sums.unbind(1)
        told = {"entropy": entropy / labelled.clamp(min=1), "mean_token_accuracy": top1 / labelled.clamp(min=1)}
        if router:
            told["aux_loss"] = router[0] / router[1].clamp(min=1)
        for name, values in told.items():
            self._metrics[mode][name] += values.unbind()
        self._metrics[mode]["num_tokens"] = [0]  # filled in by `log`

    def _settle_metrics(self) -> None:
        """Metrics of what has been trained since the last log."""
        self._await_sums()
        if self._sums:
            self._keep_metrics("train", torch.stack(self._sums).cpu())
        self._sums = []

    def _await_sums(self) -> None:
        for work in self._sums_on_their_way:
            work.wait()
        self._sums_on_their_way = []

    def _begin_interval(self) -> Interval:
        """What a log entry would be made of now; from here on the next one is counted. Waits for nothing."""
        self._await_sums()
        metrics = self._metrics["train"]
        ended = Interval(self._meter.split(), self._sums, dict(metrics), self._real_tokens)
        self._sums = []
        metrics.clear()
        return ended

    @contextmanager
    def _of_interval(self, interval: Interval) -> Iterator[None]:
        """Inside, a log entry is of that interval. What has been counted since is there again afterwards."""
        now = Interval(self._meter, self._sums, dict(self._metrics["train"]), self._real_tokens)
        # To wait for these is to wait for the passes since.
        on_their_way, self._sums_on_their_way = self._sums_on_their_way, []
        self._take(interval)
        try:
            yield
        finally:
            self._take(now)
            self._sums_on_their_way = on_their_way

    def _take(self, interval: Interval) -> None:
        self._meter, self._sums, self._real_tokens = interval.meter, interval.sums, interval.real_tokens
        self._metrics["train"].clear()
        self._metrics["train"].update(interval.metrics)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._chronicals is None:
            return super().training_step(*args, **kwargs)
        self._meter.look(step=self.state.global_step)
        loss: Tensor = super().training_step(*args, **kwargs)
        self._meter.look(step=self.state.global_step)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._chronicals is not None:
            model: Any = self.model
            mode = "train" if model.training else "eval"
            if mode == "train":
                self._settle_metrics()
            for name, values in self._metrics[mode].items():
                self._metrics[mode][name] = [float(value) for value in values]
            if "num_tokens" in self._metrics[mode]:  # not in a log of anything else, as a run's last one is
                # Real tokens, padding left out; TRL counts the slots of a padding-free batch.
                self._metrics[mode]["num_tokens"] = [int(self._real_tokens)]
            if "loss" in logs:
                logs.update(self._meter.read())
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._chronicals is not None:
            self._meter.reset()  # what came before the first step is not training
            self._sums, self._sums_on_their_way = [], []
        return super().train(*args, **kwargs)

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


def _on_device(count: int | Tensor, device: torch.device) -> Tensor:
    """As an int64 there; a number is filled in by a kernel, since a copy of it would wait for all that is queued."""
    if isinstance(count, Tensor):
        return count.to(device, torch.int64, non_blocking=True)
    return torch.full((), count, device=device, dtype=torch.int64)


def _lengths(batch: dict[str, Any]) -> Tensor:
    """Lengths of a batch's documents, the padding at the end of packed rows among them; int64."""
    if "cu_seq_lens_q" in batch:
        return batch["cu_seq_lens_q"].long().diff()
    ids: Tensor = batch["input_ids"]
    if "attention_mask" in batch:
        return batch["attention_mask"].long().sum(-1).flatten()
    return torch.full((ids.shape[0],), ids.shape[-1])
