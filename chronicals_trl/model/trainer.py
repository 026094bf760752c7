"""CUDA graphs in the trainer: whether a run can have them, on inside its training steps alone, gone when it ends."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.model import graphs
from chronicals_trl.model.graph_layers import decoder_layers
from chronicals_trl.report import ActivationReport, PartReport

logger = logging.getLogger(__name__)

PART = "cuda_graphs"

# Device types that capture.
DEVICES = ("cuda",)

# Padded rows get one of at most so many lengths, so that shapes recur; multiples of 8, for the GEMMs' sake.
PADDED_LENGTHS = graphs.MAX_GRAPHS
# More padding pays while the GPU waits for Python. An estimate: launching a layer's kernels, both ways, took 9 ms on a
# slow host (docs/results/profile_step_lora_h100.json), of which a third is assumed; and 4e14 FLOP/s.
HOST_SECONDS_PER_LAYER, FLOP_RATE = 3e-3, 4e14
# Rows without padding are filled up by a few percent for it. That little pays while the GPU waits on a slow host.
SLOW_HOST_SECONDS_PER_LAYER = 9e-3

# Under DDP the backward pass is cut into graphs of so many bytes of gradients, so that those of one are sent while the
# next one computes. At most so many, since between two of them a residual addition stands alone.
SEGMENT_BYTES, MAX_SEGMENTS = 128 * 2**20, 7

# A graph's gradients come all at once, so that nothing is won by sending them in DDP's 25 MiB: each sending takes
# multiprocessors from the graph after it, for 0.1 ms and more before its bytes count
# (docs/results/ddp_profile_h200.txt).
BUCKET_MB = 100

# Passes without a single replay after which the user is told why.
PATIENCE = 16


class CudaGraphsMixin(Trainer):
    """The methods of `SFTTrainer` that CUDA graphs take; each is the parent's where they are off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    _packing: PartReport
    _unpadded: DataCollatorForLanguageModeling | None
    _usual_batch: Callable[[], int]
    _recurring_rows: Callable[[], tuple[int, ...]]
    _documents_in_a_row: Callable[[int], int]
    data_collator: Any
    chronicals_report: ActivationReport
    _save_report: Callable[[], None]
    _tell_once: Callable[..., None]

    _graphs_wanted: bool = False  # inside `train`, with the part on
    _graphs: graphs.GraphedStack | None = None
    _graphs_missed: bool = False  # none after PATIENCE passes, and the user knows
    _graphs_wait: bool = False  # until it is known which layers are computed again

    def _graphs_part(self, config: ChronicalsConfig, leave_out: str | None, recompute: PartReport) -> PartReport:
        """Whether the decoder layers will be captured, as far as that is known before the first step."""
        if config.cuda_graphs == "off":
            return PartReport(PART, "off", reason="cuda_graphs='off' in the configuration")
        reason = self._graphs_pointless(recompute)
        if reason is not None:
            return PartReport(PART, "off", reason=reason)
        engine = self._engine_in_the_way()
        reason = leave_out or (None if engine is None else f"{engine}: not captured beside it")
        layers = decoder_layers(self.model)
        if reason is None and isinstance(layers, str):
            reason = layers
        if reason is not None:
            return PartReport(PART, "off", reason=reason, omitted=True)
        return PartReport(PART, "on", modules=len(layers), backend=f"captured after {graphs.WARM_UP} batches")

    def _graphs_pointless(self, recompute: PartReport) -> str | None:
        """Why there is nothing to win, so that nobody misses them."""
        args: Any = self.args
        if args.device.type not in DEVICES:
            return f"no CUDA GPU: on {args.device.type} there is nothing to capture"
        if self._pads_rows():
            reason = self._padding_obstacle()
            if reason is not None:
                return f"batches are not packed here, so their shapes differ from step to step, and {reason}"
        elif self._unpadded is not None and self._rows_outlast_a_slow_host():
            return "rows without padding are so long here that filling them up to a few lengths would cost more"
        if args.gradient_checkpointing and recompute.state == "off":
            return "gradient_checkpointing=True: what a layer computes again is not captured"
        return None

    def _pads_rows(self) -> bool:
        """Whether training's rows are padded, not packed by this package (which may pack evaluation's alone)."""
        return self._unpadded is None and (self._packing.state == "off" or not self.args.packing)

    def _padding_obstacle(self) -> str | None:
        """Why padded rows cannot be given lengths that recur, or are better off as they are."""
        args: Any = self.args
        collator = self.data_collator
        if type(collator) is not DataCollatorForLanguageModeling or collator.padding_free:
            return "it is not TRL's collator that pads them"
        if not args.max_length:
            return "max_length=None leaves their lengths open"
        if args.max_length / (collator.pad_to_multiple_of or args.max_length) > PADDED_LENGTHS:
            return f"pad_to_multiple_of={collator.pad_to_multiple_of} gives them more than {PADDED_LENGTHS} lengths"
        assert self._chronicals is not None
        if collator.pad_to_multiple_of or self._chronicals.cuda_graphs == "on":
            return None
        if self._seconds_per_layer(args.per_device_train_batch_size * args.max_length) > HOST_SECONDS_PER_LAYER:
            return "they are too large for more padding to pay (cuda_graphs='on' insists; packing=True is better)"
        return None

    def _rows_outlast_a_slow_host(self) -> bool:
        """Whether the GPU takes longer over a row without padding than any host over the launches."""
        assert self._chronicals is not None
        insists = self._chronicals.cuda_graphs == "on"
        return not insists and self._seconds_per_layer(self._usual_batch()) > SLOW_HOST_SECONDS_PER_LAYER

    def _seconds_per_layer(self, tokens: int) -> float:
        """The GPU's, by estimate; 0 where it is not known which the layers are."""
        layers = decoder_layers(self.model)
        if isinstance(layers, str):
            return 0.0
        parameters = sum(p.numel() for layer in layers for p in layer.parameters())
        return 6 * parameters * tokens / FLOP_RATE / len(layers)

    def _round_lengths_up(self, report: ActivationReport) -> list[str]:
        """Let the lengths of padded rows recur, if graphs are to be captured of them; a note for the report."""
        collator = self.data_collator
        if report[PART].state == "off" or not self._pads_rows() or collator.pad_to_multiple_of:
            return []
        length: Any = self.args.max_length
        multiple = 8 * math.ceil(length / (8 * PADDED_LENGTHS))
        self.data_collator = dataclasses.replace(collator, pad_to_multiple_of=multiple)
        return [f"CUDA graphs: rows are padded to multiples of {multiple} tokens, so that their shapes recur"]

    def _recurring_sizes(self) -> Sequence[int]:
        """Tokens of the training batches that will come again; none where that is not known."""
        args: Any = self.args
        rows, length = self._documents_in_a_row(self._train_batch_size), args.max_length
        if self._unpadded is not None:
            return self._recurring_rows()
        if not self._pads_rows():
            return [rows * length] if length else []
        # Beside a packed evaluation TRL's collator is the other one's fallback.
        collator = getattr(self.data_collator, "fallback", self.data_collator)
        multiple = getattr(collator, "pad_to_multiple_of", None)
        return [rows * multiple * n for n in range(1, math.ceil(length / multiple) + 1)] if length and multiple else []

    def _graph_segments(self, layers: list[nn.Module]) -> int:
        if self.args.world_size == 1:
            return 1
        sent = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters() if p.requires_grad)
        full = sent // SEGMENT_BYTES
        return 1 if full < 2 else min(MAX_SEGMENTS, len(layers), full + 1)  # and the first layer's, a small one

    def _enlarge_buckets(self, report: ActivationReport) -> None:
        """DDP's buckets as they suit graphs, where the user has not set their size."""
        handler: Any = self.accelerator.ddp_handler
        if handler is None or report[PART].state == "off" or self.args.ddp_bucket_cap_mb is not None:
            return
        handler.bucket_cap_mb = BUCKET_MB

    def _engine_in_the_way(self) -> str | None:
        """What runs or moves the decoder layers in a way of its own, in words; None if nothing does."""
        args: Any = self.args
        parallelism = self.accelerator.parallelism_config
        engines = {
            "torch_compile=True": args.torch_compile,
            "activation_offloading=True": getattr(args, "activation_offloading", False),
            "auto_find_batch_size=True": args.auto_find_batch_size,
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled,
            "several GPUs in one process": args.n_gpu > 1,
            "tensor, context or sequence parallelism": parallelism is not None
            and any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")),
        }
        return next((name for name, present in engines.items() if present), None)

    # -- the run -----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._graphs_wanted = self._chronicals is not None and self.chronicals_report[PART].state == "on"
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_graphs()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._graphs_wait:
            return super().training_step(*args, **kwargs)
        if self._graphs_wanted and self._graphs is None:
            # Here, and not before: by now the layers are those that are trained, whatever was put around them.
            layers = decoder_layers(self.model)
            if isinstance(layers, str):
                self._graphs_off(layers)
            else:
                segments, sizes = self._graph_segments(layers), self._recurring_sizes()
                self._graphs = graphs.GraphedStack(layers, segments=segments, sizes=sizes)
                self._graphs.install()
        stack = self._graphs
        if not self._graphs_wanted or stack is None:
            return super().training_step(*args, **kwargs)
        with stack.enabled():
            loss: Tensor = super().training_step(*args, **kwargs)
        if stack.reason is not None:
            self._graphs_off(stack.reason)
        elif stack.passes >= PATIENCE and not stack.replays and not self._graphs_missed:
            self._graphs_missed = True
            logger.warning("chronicals-trl: no CUDA graph after %d batches: %s", PATIENCE, _why_none(stack))
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # An evaluation may need the memory; the next training step captures again.
        if self._graphs is not None:
            self._graphs.release()
        return super().evaluation_loop(*args, **kwargs)

    def _graphs_off(self, reason: str) -> None:
        """Go on without, and say so."""
        assert self._chronicals is not None
        self._graphs_wanted = False
        self.chronicals_report.set(PartReport(PART, "off", reason=reason, omitted=True))
        self._save_report()
        logger.warning("chronicals-trl: %s is off: %s", PART, reason)
        self.chronicals_report.raise_for_omissions(self._chronicals)

    def _end_graphs(self) -> None:
        stack, self._graphs, self._graphs_wanted = self._graphs, None, False
        if stack is None:
            return
        stack.remove()
        if stack.reason is not None or not stack.passes:
            return
        if not stack.replays:
            self.chronicals_report.set(PartReport(PART, "off", reason=f"nothing was replayed: {_why_none(stack)}"))
            self._save_report()
        self._tell_once(
            f"CUDA graphs: {stack.replays:,} of {stack.passes:,} batches replayed, {stack.captures} captured"
        )


def _why_none(stack: graphs.GraphedStack) -> str:
    if stack.obstacle is not None:
        return stack.obstacle
    return f"no more than {graphs.WARM_UP} batches of a shape, in one state of the model ({stack.passes} in all)"
