"""Fused LoRA on instances of PEFT's LoRA linears.

A fitting layer gets ``lora_forward`` bound to the instance (``types.MethodType(lora_forward, layer)``). It decides on
every call whether the state of the layer is the plain one (one active adapter, nothing merged, disabled or hooked:
`lora_state.py`); if it is, the layer becomes one ``lora_linear``, else the class's own forward runs. PEFT's parameters
and attributes stay where they are, so that merging, saving, disabling and deleting adapters are PEFT's own code.

Where layers share their input, the block around them makes one node of them: q, k and v in `rope.py`, gate, up and
down in `match.py`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chronicals_trl.kernels._lora_linear import lora_linear
from chronicals_trl.model.lora_state import active_adapters, fits, is_8bit, lora_operands, match_lora
from chronicals_trl.model.match import DEPUTIES, probing

__all__ = ["fits", "lora_forward", "match_lora", "verify"]

PROBE_TOLERANCE = 1e-5
PROBE_TOLERANCE_FP32 = 1e-4  # of layers whose base has no fp64
_IN, _OUT = 32, 16  # of the twin: multiples of 16, which int8 products on a GPU may ask for


def lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward to bind to a layer that ``fits``; the arguments and the result are those of the class's forward.

    A layer whose result the attention block has already made, together with those beside it, gives that out.
    """
    handed = None if torch.compiler.is_compiling() else DEPUTIES.projections.pop(id(self), None)
    if handed is not None:
        return handed
    # Keyword arguments carry per-row adapters and activated LoRA's offsets: the class's own forward knows them.
    operands = None if args or kwargs else lora_operands(self, x)
    if operands is None:
        y: Tensor = type(self).forward(self, x, *args, **kwargs)
        return y
    return lora_linear(x, **operands._asdict())


# A bound method pickles as (instance, function name): it has to find its way back to the layer's `forward`.
lora_forward.__name__ = "forward"


def verify(module: nn.Module, device: torch.device | str) -> str | None:
    """Compare ``lora_forward`` with the class's own forward on a tiny twin of the layer, by number.

    The twin shares the class and the state of ``module`` (active adapter, scaling, flags, whether it has dropout) but
    has small random weights of its own: the module's may be sharded or without values yet. Output and gradients of x,
    A, B and bias have to agree within ``PROBE_TOLERANCE``, relative to the largest element, in fp64. For quantised
    weights it is fp32: 4-bit ones are dequantised to that at best, and the base output of an 8-bit layer, which is
    coarse, comes from its own forward on both sides. With dropout both draw from the same seed: another mask would
    show. The global random generators are not advanced and grad mode, autocast and inference mode of the caller do not
    matter.

    Returns:
        None when they agree, else the reason for the report.
    """
    device = torch.device(device)
    if device.type == "meta":  # no values there
        device = torch.device("cpu")
    exact = device.type != "mps" and type(module.base_layer) is nn.Linear
    dtype, tolerance = (torch.float64, PROBE_TOLERANCE) if exact else (torch.float32, PROBE_TOLERANCE_FP32)

    with (
        probing(device) as generator,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu", dtype=dtype).to(device)

        try:
            twin = _twin(module, draw)
            x, grad_y = draw(2, 3, _IN).requires_grad_(), draw(2, 3, _OUT)
            if lora_operands(twin, x) is None:
                type(module).forward(twin, x)  # a quantised layer settles some of its state in its first call
            if lora_operands(twin, x) is None:
                return "probe: the layer's state keeps the original path"
            wanted = [x, *(p for p in twin.parameters() if p.requires_grad)]
            names = ["gradient of x", *(f"gradient of {n}" for n, p in twin.named_parameters() if p.requires_grad)]
            results = []
            for forward in (lora_forward, type(module).forward):
                torch.manual_seed(0)
                y = forward(twin, x)
                results.append([y, *torch.autograd.grad(y, wanted, grad_y)])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"probe failed: {type(error).__name__}: {error}"

    for name, ours, theirs in zip(["output", *names], *results, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"probe: {name} is {tuple(ours.shape)} {ours.dtype}, PEFT's is {tuple(theirs.shape)} {theirs.dtype}"
        # The floor: with a scaling of 0 the adapter's gradients are all zero.
        error_rel = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
        if not error_rel <= tolerance:  # NaN fails too
            return f"probe: {name} differs from PEFT's by {error_rel:.1e} relative (allowed {tolerance:.0e})"
    return None


def _twin(module: Any, draw: Callable[..., Tensor]) -> Any:
    """A copy of the layer with state of its own wherever the probe writes, and tiny weights drawn by ``draw``."""
    adapter = active_adapters(module)[0]
    bias = None if module.base_layer.bias is None else draw(_OUT)
    twin = copy.copy(module)
    # copy.copy shares the containers of nn.Module: assigning a submodule would reach into the original.
    twin._modules = {}
    twin._parameters = {}
    twin._buffers = {}
    twin.base_layer = _base_twin(module.base_layer, draw(_OUT, _IN), bias)
    if bias is not None:
        twin.base_layer.bias.requires_grad_(module.base_layer.bias.requires_grad)
    twin.lora_A = nn.ModuleDict({adapter: _linear(draw(4, _IN))})
    twin.lora_B = nn.ModuleDict({adapter: _linear(draw(_OUT, 4))})
    drops = getattr(module.lora_dropout[adapter], "p", 0.0) > 0.0
    twin.lora_dropout = nn.ModuleDict({adapter: nn.Dropout(0.4) if drops else nn.Identity()})
    return twin


def _base_twin(base: Any, weight: Tensor, bias: Tensor | None) -> Any:
    if type(base) is nn.Linear:
        return _linear(weight, bias, trainable=False)
    bnb = sys.modules["bitsandbytes"]
    out_features, in_features = weight.shape
    eight = {"has_fp16_weights": False, "threshold": base.state.threshold} if is_8bit(base) else {}
    with torch.device("meta"):  # bitsandbytes' initialisation too would advance the user's generator
        twin = type(base)(in_features, out_features, bias=bias is not None, **eight)
    if eight:
        twin.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        twin.weight = bnb.nn.Params4bit(
            weight.cpu(),
            requires_grad=False,
            compress_statistics=base.weight.compress_statistics,
            quant_type=base.weight.quant_type,
            module=twin,
        )
    twin.train(base.training)  # on a CPU the mode decides what an 8-bit linear computes
    if bias is not None:
        twin.bias = nn.Parameter(bias)
    return twin.to(weight.device)


def _linear(weight: Tensor, bias: Tensor | None = None, *, trainable: bool = True) -> nn.Linear:
    out_features, in_features = weight.shape
    # Built on meta: nn.Linear's initialisation would advance the user's generator.
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=trainable)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=trainable)
    return linear
