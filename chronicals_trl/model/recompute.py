"""Gradient checkpointing as far as memory needs it, and no further.

TRL's SFTConfig has `gradient_checkpointing=True` unless it is told otherwise: every layer is computed a second time in
the backward pass, which costs a third of the layers' time, however much memory is free. Here the first two steps run
like that and are measured: the peak of the second, in which gradients and optimizer states are all there, and what one
layer keeps for its backward pass if it is not computed again. From then on as many layers keep theirs as there is room
for: the last ones, whose memory is free again by the time that the first ones are computed again.

The result is the same: what a layer computes again is what it would have kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LayerMemory", "Memory", "layers_that_keep"]

# Of the whole memory, left free: what the allocator loses between blocks, and batches that differ a little.
MARGIN = 0.08
# On top of what was measured of one layer, for the same reasons.
SLACK = 1.05


class Memory:
    """A GPU's memory as this process sees it, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """The most that was allocated since `begin_peak`."""
        return torch.cuda.max_memory_allocated(self._device)

    def begin_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def room(self) -> int:
        """What this process could have: what is free, and what its allocator holds; without the margin."""
        free, total = torch.cuda.mem_get_info(self._device)
        return int(free + torch.cuda.memory_reserved(self._device) - MARGIN * total)

    def release(self) -> None:
        torch.cuda.empty_cache()


class LayerMemory:
    """Notes what one decoder layer is given in a training step, and measures afterwards what it would keep.

    Afterwards, since within the step it runs inside of a checkpoint, which keeps nothing.

    Args:
        layer: of the stack, not the first one, which may be the only one to get hidden states without a gradient.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle = layer.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = args, kwargs

    def forget(self) -> None:
        self._handle.remove()
        self._given = None

    def measure(self, memory: Memory) -> int | None:
        """Bytes that the layer keeps for its backward pass, its output among them; None if it was not called.

        The layer is run twice: what the first run leaves behind for good (cuBLAS's workspace, weights that autocast
        has cast) is no part of it.
        """
        given = self._given
        self.forget()
        if given is None:
            return None
        args, kwargs = given
        device = next(self._layer.parameters()).device
        flag = self._layer.__dict__.get("gradient_checkpointing")
        kept = 0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            try:
                self._layer.gradient_checkpointing = False  # type: ignore[assignment]
                for _ in range(2):
                    before = memory.allocated()
                    output = self._layer(*_with_gradient(args), **kwargs)
                    kept = memory.allocated() - before
                    del output
            finally:
                if flag is None:
                    del self._layer.__dict__["gradient_checkpointing"]
                else:
                    self._layer.gradient_checkpointing = flag
        return kept


def _with_gradient(args: Sequence[Any]) -> list[Any]:
    """The arguments, of which the hidden states require a gradient as those behind the first layer do."""
    return [a.detach().requires_grad_() if i == 0 and isinstance(a, Tensor) else a for i, a in enumerate(args)]


def layers_that_keep(layers: int, peak: int, layer_bytes: int, room: int, extra_for_all: int = 0) -> int:
    """How many of `layers` may keep what they compute.

    Args:
        peak: bytes at the peak of a step in which every layer is computed again.
        layer_bytes: that one layer keeps. (At that peak one layer's were there already, the one just computed again;
            that is left as room.)
        room: bytes that the process may have.
        extra_for_all: bytes that come on top if all layers keep theirs.
    """
    if layer_bytes <= 0:
        return 0
    count = int((room - peak) // (SLACK * layer_bytes))
    if count >= layers and peak + SLACK * layers * layer_bytes + extra_for_all <= room:
        return layers
    return max(0, min(count, layers - 1))


def set_checkpointing(layers: Sequence[nn.Module], keeping: int) -> Callable[[], None]:
    """Let the last `keeping` layers keep what they compute; the returned function puts the flags back."""
    before = [layer.__dict__.get("gradient_checkpointing") for layer in layers]
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < len(layers) - keeping  # type: ignore[assignment]

    def restore() -> None:
        for layer, flag in zip(layers, before, strict=True):
            if flag is None:
                layer.__dict__.pop("gradient_checkpointing", None)
            else:
                layer.gradient_checkpointing = flag

    return restore
