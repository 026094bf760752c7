"""Gradient checkpointing in the trainer: measured in the first two steps, then no more of it than memory needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from chronicals_trl.config import ChronicalsConfig, SFTConfig
from chronicals_trl.model import graphs
from chronicals_trl.model.graph_layers import decoder_layers
from chronicals_trl.model.recompute import LayerMemory, Memory, layers_that_keep, set_checkpointing
from chronicals_trl.report import ActivationReport, PartReport

PART = "recompute"

# Device types whose memory can be measured.
DEVICES = ("cuda",)

# Optimizer steps that run as the arguments say; the last of them has gradients and optimizer states in its peak.
MEASURED_STEPS = 2
_GIB = 2**30


class RecomputeMixin(Trainer):
    """The methods of `SFTTrainer` in which layers stop being computed again; the parent's where the part is off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    chronicals_report: ActivationReport
    _tell_once: Callable[..., None]
    _graphs: graphs.GraphedStack | None
    _graphs_wanted: bool
    _graphs_wait: bool
    _engine_in_the_way: Callable[[], str | None]
    _largest_batch: Callable[[], int | None]

    _recompute_layers: list[nn.Module] | None = None  # inside `train`, with the part on
    _recompute_probe: LayerMemory | None = None
    _recompute_restore: Callable[[], None] | None = None
    _recompute_keeping = 0
    _layer_bytes: int | None = None  # of a batch of the largest size
    _first_step = 0

    def _recompute_part(self, config: ChronicalsConfig, leave_out: str | None) -> PartReport:
        """Whether some layers may stop being computed again, as far as that is known before the first step."""
        args: Any = self.args
        if config.recompute == "off":
            return PartReport(PART, "off", reason="recompute='off' in the configuration")
        if not args.gradient_checkpointing:
            return PartReport(PART, "off", reason="gradient_checkpointing=False: nothing is computed again")
        if args.device.type not in DEVICES:
            return PartReport(PART, "off", reason=f"no CUDA GPU: on {args.device.type} no memory is measured")
        asked = isinstance(args, SFTConfig) and args.was_given("gradient_checkpointing")
        if asked and config.recompute != "on":
            return PartReport(
                PART, "off", reason="gradient_checkpointing=True was asked for (without it, or with recompute='on', "
                "layers are computed again only as far as memory needs it)",
            )  # fmt: skip
        if self._largest_batch() is None:
            return PartReport(PART, "off", reason="max_length=None leaves open how large a batch can be")
        layers = decoder_layers(self.model)
        reason = leave_out or self._recompute_ruled_out() or (layers if isinstance(layers, str) else None)
        if reason is not None:
            return PartReport(PART, "off", reason=reason, omitted=True)
        return PartReport(PART, "on", modules=len(layers), backend=f"measured in {MEASURED_STEPS} steps")

    def _recompute_ruled_out(self) -> str | None:
        metrics = None if self.compute_metrics is None else "compute_metrics, which holds all logits"
        present = self._engine_in_the_way() or metrics
        return None if present is None else f"not measured beside {present}"

    # -- the run -----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._chronicals is not None and self.chronicals_report[PART].state == "on":
            layers = decoder_layers(self.model)
            self._recompute_layers = None if isinstance(layers, str) else layers
            self._graphs_wait = self._recompute_layers is not None
        self._first_step = -1
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_recompute()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        layers = self._recompute_layers
        if layers is None:
            return super().training_step(model, inputs, *args, **kwargs)
        step = self.state.global_step
        if self._first_step < 0:
            self._first_step = step
            self._recompute_probe = LayerMemory(layers[min(1, len(layers) - 1)])
        measured = step - self._first_step
        if self._recompute_restore is None and measured == MEASURED_STEPS:
            self._decide(layers)
        memory = self._memory()
        tokens = inputs["input_ids"].numel()
        if measured == MEASURED_STEPS - 1:
            if self._peak_step != step:
                self._peak_step, self._peak_tokens = step, 0
                self._begin_peak(memory)
            self._peak_tokens = max(self._peak_tokens, tokens)
        loss = self._step_or_fall_back(model, inputs, *args, **kwargs)
        if self._recompute_probe is not None:
            self._probe(memory, tokens)
        return loss

    _peak_step = -1
    _peak_tokens = 1  # of the largest micro-batch of that step
    _fixed = 0  # bytes at the peak that are not of the batch

    def _begin_peak(self, memory: Memory) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad and p.grad is None]
        self._fixed = memory.allocated() + sum(p.numel() * p.element_size() for p in trained)
        memory.begin_peak()

    def _peak(self, memory: Memory) -> int:
        """The peak of a step whose batches are of the largest size."""
        peak = memory.peak()
        return peak + int(max(0, peak - self._fixed) * (self._more(self._peak_tokens) - 1))

    def _more(self, tokens: int) -> float:
        """How many times so many tokens the largest batch has: rows that are not packed differ in length."""
        largest = self._largest_batch()
        assert largest is not None
        return max(1.0, largest / tokens)

    def _memory(self) -> Memory:
        return Memory(self.args.device)

    def _probe(self, memory: Memory, tokens: int) -> None:
        probe, self._recompute_probe = self._recompute_probe, None
        assert probe is not None
        with self.accelerator.autocast():  # which in a step is around the model's forward
            found = probe.measure(memory)
        if found is not None:
            self._layer_bytes = int(found * self._more(tokens))

    def _decide(self, layers: list[nn.Module]) -> None:
        """Let layers keep what they compute, as many as have room on every rank."""
        memory = self._memory()
        keeping, peak, room = 0, self._peak(memory), memory.room()
        if self._layer_bytes is not None:
            # Under DDP, and while they accumulate, graphs hold the layers' gradients a second time; else it is room to
            # spare.
            trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
            twice = sum(p.numel() * p.element_size() for p in trained)
            keeping = layers_that_keep(len(layers), peak, self._layer_bytes, room, twice)
        if self.args.world_size > 1:
            on_device = torch.tensor([-keeping], device=self.args.device)
            torch.distributed.all_reduce(on_device, torch.distributed.ReduceOp.MAX)
            keeping = -int(on_device)
        self._recompute_keeping = keeping
        self._recompute_restore = set_checkpointing(layers, keeping)
        memory.release()  # what lay free between blocks of another order
        again = len(layers) - keeping
        told = f"{again} of {len(layers)} layers computed again" if again else "no layer computed again"
        why = "what a layer keeps could not be measured" if self._layer_bytes is None else (
            f"peak {peak / _GIB:.1f} GiB with all, {self._layer_bytes / _GIB:.2f} GiB a layer, {room / _GIB:.1f} GiB "
            "to be had"
        )  # fmt: skip
        self._report_recompute(
            PartReport(PART, "on", modules=len(layers), backend=told), f"gradient checkpointing: {told} ({why})"
        )
        self._graphs_wait = False
        if again and self._graphs_off_for(again):
            assert self._chronicals is not None
            self.chronicals_report.raise_for_omissions(self._chronicals)

    def _graphs_off_for(self, again: int) -> bool:
        """Whether graphs were on, which the table at the start said; now they are off, as so many layers are computed
        again."""
        if self.chronicals_report["cuda_graphs"].state == "off":
            return False
        self._graphs_wanted = False
        reason = f"memory needs {again} layers computed again, which is not captured"
        self._report_recompute(PartReport("cuda_graphs", "off", reason=reason), f"cuda_graphs is off: {reason}")
        return True

    def _step_or_fall_back(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if not self._recompute_keeping or self.args.world_size > 1:
            return super().training_step(model, inputs, *args, **kwargs)
        # A micro-batch behind the first adds to gradients that a second try would need as they were.
        repeatable = all(parameter.grad is None for parameter in model.parameters())
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError:
            if not repeatable:
                raise
        # Out of the handler, whose traceback holds what the step has made.
        layers = self._recompute_layers
        assert layers is not None
        self._recompute_keeping = 0
        set_checkpointing(layers, 0)
        model.zero_grad(set_to_none=True)
        if self._graphs is not None:
            self._graphs.release()
        self._memory().release()
        told = f"all {len(layers)} layers computed again"
        self._report_recompute(
            PartReport(PART, "on", modules=len(layers), backend=told, reason="memory ran out otherwise"),
            f"gradient checkpointing: memory ran out in step {self.state.global_step + 1}; from there on {told}",
        )
        self._graphs_off_for(len(layers))
        return super().training_step(model, inputs, *args, **kwargs)

    def _report_recompute(self, part: PartReport, note: str) -> None:
        """The part as it is now; a warning where it is less than was said."""
        self.chronicals_report.set(part)
        self._save_report()
        self._tell_once(note, warn=bool(part.reason))

    def _end_recompute(self) -> None:
        if self._recompute_probe is not None:
            self._recompute_probe.forget()
        if self._recompute_restore is not None:
            self._recompute_restore()
        self._recompute_layers = self._recompute_probe = self._recompute_restore = None
        self._graphs_wait = False
        self._recompute_keeping, self._layer_bytes, self._peak_step = 0, None, -1
