"""Fused LoRA on instances of ``peft.tuners.lora.layer.Linear``.

A fitting layer gets ``lora_forward`` bound to the instance (``types.MethodType(lora_forward, layer)``). It decides on
every call whether the state of the layer is the plain one (one active adapter, nothing merged, disabled, dropped out
or hooked); if it is, the layer becomes one ``lora_linear``, else the class's own forward runs. PEFT's parameters and
attributes stay where they are, so that merging, saving, disabling and deleting adapters are PEFT's own code.

The state that is read (``active_adapters``, ``lora_A``, ``scaling``, ``lora_variant``, ...) and the result for the
plain state follow ``peft/tuners/lora/layer.py``, 0.18 to 0.21. PEFT is optional: importing this module does not import
it.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chronicals_trl.kernels._lora_linear import lora_linear, lora_linear_supported

PROBE_TOLERANCE = 1e-5
_PLAIN_TENSORS = (Tensor, nn.Parameter)  # not DTensor, not a quantised subclass


class _Operands(NamedTuple):
    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None


def match_lora(module: nn.Module) -> bool:
    """Whether the module is a LoRA layer of PEFT, of any kind. ``fits`` says whether it can be fused."""
    peft_layer = sys.modules.get("peft.tuners.lora.layer")  # no LoRA layer exists before PEFT has been imported
    return peft_layer is not None and isinstance(module, peft_layer.LoraLayer)


def fits(module: nn.Module) -> str | None:
    """None when ``lora_forward`` fuses this layer in training as it stands, else the reason, for the report."""
    if not match_lora(module):
        return f"{type(module).__name__} is not a LoRA layer of PEFT"
    base_layer = getattr(module, "base_layer", None)
    if type(base_layer) is not nn.Linear:
        return f"base layer is {type(base_layer).__name__}"
    if type(module) is not sys.modules["peft.tuners.lora.layer"].Linear:
        return f"LoRA layer is {type(module).__module__}.{type(module).__name__}"
    return _obstacle(module, training=True)


def lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward to bind to a layer that ``fits``; the arguments and the result are those of the class's forward."""
    # Keyword arguments carry per-row adapters and activated LoRA's offsets: the class's own forward knows them.
    operands = None if args or kwargs else _operands(self, x)
    if operands is None:
        y: Tensor = type(self).forward(self, x, *args, **kwargs)
        return y
    weight, a, b, scale, bias = operands
    return lora_linear(x, weight, a, b, scale, bias=bias)


# A bound method pickles as (instance, function name): it has to find its way back to the layer's `forward`.
lora_forward.__name__ = "forward"


def verify(module: nn.Module, device: torch.device | str) -> str | None:
    """Compare ``lora_forward`` with the class's own forward on a tiny twin of the layer, by number.

    The twin shares the class and the state of ``module`` (active adapter, scaling, flags) but has small random weights
    of its own: the module's may be sharded or without values yet. Output and gradients of x, A, B and bias have to
    agree within ``PROBE_TOLERANCE``, relative to the largest element, in fp64 (fp32 GEMMs may run as TF32, which is
    coarser than the tolerance). The global random generators are not advanced and grad mode, autocast and inference
    mode of the caller do not matter.

    Returns:
        None when they agree, else the reason for the report.
    """
    device = torch.device(device)
    if device.type == "meta":  # no values there
        device = torch.device("cpu")
    dtype = torch.float32 if device.type == "mps" else torch.float64
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=dtype).to(device)

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            twin = _twin(module, draw)
            x, grad_y = draw(2, 3, 8).requires_grad_(), draw(2, 3, 6)
            if _operands(twin, x) is None:
                return "probe: the layer's state keeps the original path"
            wanted = [x, *(p for p in twin.parameters() if p.requires_grad)]
            names = ["gradient of x", *(f"gradient of {n}" for n, p in twin.named_parameters() if p.requires_grad)]
            expected_y = type(module).forward(twin, x)
            actual_y = lora_forward(twin, x)
            expected = [expected_y, *torch.autograd.grad(expected_y, wanted, grad_y)]
            actual = [actual_y, *torch.autograd.grad(actual_y, wanted, grad_y)]
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"probe failed: {type(error).__name__}: {error}"

    for name, ours, theirs in zip(["output", *names], actual, expected, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"probe: {name} is {tuple(ours.shape)} {ours.dtype}, PEFT's is {tuple(theirs.shape)} {theirs.dtype}"
        # The floor: with a scaling of 0 the adapter's gradients are all zero.
        error_rel = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
        if not error_rel <= PROBE_TOLERANCE:  # NaN fails too
            return f"probe: {name} differs from PEFT's by {error_rel:.1e} relative (allowed {PROBE_TOLERANCE:.0e})"
    return None


def _obstacle(layer: Any, *, training: bool) -> str | None:
    """Why the layer's state keeps the original path, or None. Called on each forward: no tensor is read here."""
    adapters = _active_adapters(layer)
    if len(adapters) != 1:
        return f"{len(adapters)} adapters are active on the layer (1 is fused)"
    adapter = adapters[0]
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged into the weight"
    if layer.use_dora.get(adapter):
        return "DoRA"
    if adapter in layer.lora_variant:
        return f"LoRA variant {type(layer.lora_variant[adapter]).__name__}"
    if layer.lora_bias.get(adapter) or layer.lora_B[adapter].bias is not None:
        return "lora_bias: the adapter has a bias of its own"
    dropout = layer.lora_dropout[adapter]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"dropout is {type(dropout).__name__}"
    if training and getattr(dropout, "p", 0.0) > 0.0:
        return f"dropout {dropout.p:g} is active in training: the original path is kept"
    if not isinstance(layer.scaling[adapter], (int, float)):
        return "scaling is a tensor (compiled hot-swapping)"
    if layer.base_layer.weight.requires_grad:
        return "base weight is trainable"
    for name, linear in (
        ("base_layer", layer.base_layer),
        ("lora_A", layer.lora_A[adapter]),
        ("lora_B", layer.lora_B[adapter]),
    ):
        if type(linear) is not nn.Linear:
            return f"{name} is {type(linear).__name__}"
        if _is_hooked(linear):
            return f"{name} has hooks (sharding, offloading or the user's own), which only its own call runs"
        if type(linear.weight) not in _PLAIN_TENSORS:
            return f"{name}'s weight is {type(linear.weight).__name__}"
    return None


def _operands(layer: Any, x: Tensor) -> _Operands | None:
    """What ``lora_linear`` needs for this call, or None when the original path has to run."""
    adapters = _active_adapters(layer)
    # The dropout module's own mode counts: users put single modules into eval mode.
    if not adapters or _obstacle(layer, training=layer.lora_dropout[adapters[0]].training) is not None:
        return None
    adapter = adapters[0]
    base, a, b = layer.base_layer, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if type(x) not in _PLAIN_TENSORS or not lora_linear_supported(x, base.weight, a, b):
        return None
    if a.dtype != x.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return None
    return _Operands(base.weight, a, b, float(layer.scaling[adapter]), base.bias)


def _active_adapters(layer: Any) -> list[str]:
    """The active adapters that have weights on this layer: an adapter may target other layers only."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__  # Accelerate's offloading replaces forward on the instance
    )


def _twin(module: Any, draw: Any) -> Any:
    """A copy of the layer with state of its own wherever the probe writes, and tiny weights drawn by ``draw``."""
    adapter = _active_adapters(module)[0]
    bias = None if module.base_layer.bias is None else draw(6)
    twin = copy.copy(module)
    # copy.copy shares the containers of nn.Module: assigning a submodule would reach into the original.
    twin._modules = {}
    twin._parameters = {}
    twin._buffers = {}
    twin.base_layer = _linear(draw(6, 8), bias, trainable=False)
    if bias is not None:
        twin.base_layer.bias.requires_grad_(module.base_layer.bias.requires_grad)
    twin.lora_A = nn.ModuleDict({adapter: _linear(draw(4, 8))})
    twin.lora_B = nn.ModuleDict({adapter: _linear(draw(6, 4))})
    twin.lora_dropout = nn.ModuleDict({adapter: nn.Identity()})
    return twin


def _linear(weight: Tensor, bias: Tensor | None = None, *, trainable: bool = True) -> nn.Linear:
    out_features, in_features = weight.shape
    # Built on meta: nn.Linear's initialisation would advance the user's generator.
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=trainable)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=trainable)
    return linear
