"""What a LoRA layer of PEFT would compute in this call, as operands of `kernels.lora_linears`, or why it is its own.

The state that is read (``active_adapters``, ``lora_A``, ``scaling``, ``lora_variant``, ...) and the result for the
plain state follow ``peft/tuners/lora/layer.py`` and ``bnb.py``, 0.18 to 0.21. PEFT and bitsandbytes are optional:
importing this module imports neither.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chronicals_trl.kernels import LoraOperands
from chronicals_trl.kernels._common import autocast_dtype
from chronicals_trl.kernels._lora_linear import lora_linears_supported

_PLAIN_TENSORS = (Tensor, nn.Parameter)  # not DTensor, not a quantised subclass


def match_lora(module: nn.Module) -> bool:
    """Whether the module is a LoRA layer of PEFT, of any kind. ``fits`` says whether it can be fused."""
    peft_layer = sys.modules.get("peft.tuners.lora.layer")  # no LoRA layer exists before PEFT has been imported
    return peft_layer is not None and isinstance(module, peft_layer.LoraLayer)


def fits(module: nn.Module) -> str | None:
    """None when ``lora_forward`` fuses this layer in training as it stands, else the reason, for the report."""
    if not match_lora(module):
        return f"{type(module).__name__} is not a LoRA layer of PEFT"
    base_layer = getattr(module, "base_layer", None)
    if type(base_layer) is nn.Linear:
        expected = sys.modules["peft.tuners.lora.layer"].Linear
    elif is_4bit(base_layer):
        expected = getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None)
    elif is_8bit(base_layer):
        expected = getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear8bitLt", None)
    else:
        return f"base layer is {type(base_layer).__name__}"
    if type(module) is not expected:
        return f"LoRA layer is {type(module).__module__}.{type(module).__name__}"
    adapters = active_adapters(module)
    if not adapters:
        active: Any = module.active_adapters
        return f"no active adapter ({', '.join(active) or 'there is none'}) is on the layer"
    if len(adapters) > 1:
        return f"{len(adapters)} adapters are active on the layer (1 is fused)"
    return _obstacle(module, adapters[0], _parts(module, adapters[0]), training=True)


def is_4bit(module: Any) -> bool:
    """Whether the module is a 4-bit linear of bitsandbytes."""
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and type(module) is bnb.nn.Linear4bit


def is_8bit(module: Any) -> bool:
    """Whether the module is an 8-bit linear of bitsandbytes."""
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and type(module) is bnb.nn.Linear8bitLt


def lora_operands(layer: Any, x: Tensor) -> LoraOperands | None:
    """What ``lora_linears`` needs for this call, or None when the original path has to run."""
    operands = unchecked_operands(layer, x)
    return operands if operands is not None and lora_linears_supported(x, [operands]) else None


def unchecked_operands(layer: Any, x: Tensor) -> LoraOperands | None:
    """`lora_operands` of a layer whose dtypes the caller compares, together with those of others."""
    adapters = active_adapters(layer)
    if len(adapters) != 1 or type(x) not in _PLAIN_TENSORS or nn.modules.module._has_any_global_hook():
        return None
    (adapter,) = adapters
    parts = _parts(layer, adapter)
    base, a, dropout = parts.base_layer, parts.weight_a, parts.dropout
    training = dropout.training  # the module's own mode counts: users put single modules into eval mode
    if _obstacle(layer, adapter, parts, training=training) is not None:
        return None
    if a.dtype != x.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return None
    quantised = type(base) is not nn.Linear
    stored: _Stored | None = _Stored(parts.weight)
    if quantised:
        stored = _stored_in_4bit(base, x) if is_4bit(base) else _stored_in_8bit(base, x)
    if stored is None:
        return None
    return LoraOperands(
        stored.weight,
        base.bias,
        a,
        parts.weight_b,
        float(layer.scaling[adapter]),
        float(getattr(dropout, "p", 0.0)) if training else 0.0,
        # PEFT casts x before the dropout, but for quantised layers under autocast.
        x.dtype if quantised and autocast_dtype(x) is not None else a.dtype,
        stored.unpack,
        stored.call,
    )


class _Parts(NamedTuple):
    """The modules of one adapter's path through a layer, and the weights of its linears.

    Looked up once a call: reading a child or a parameter as an attribute of a module costs as much as all the rest.
    """

    base_layer: Any
    a: Any
    b: Any
    dropout: Any
    weight: Any
    weight_a: Any
    weight_b: Any


def _parts(layer: Any, adapter: str) -> _Parts:
    modules = layer._modules
    a, b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    base, dropout = modules["base_layer"], modules["lora_dropout"]._modules[adapter]
    weights = getattr(base, "weight", None), getattr(a, "weight", None), getattr(b, "weight", None)
    return _Parts(base, a, b, dropout, *weights)


class _Stored(NamedTuple):
    """A base weight as `LoraOperands` takes it."""

    weight: Tensor
    unpack: Callable[[Tensor], Tensor] | None = None
    call: Callable[[Tensor], Tensor] | None = None


def _stored_in_4bit(base: Any, x: Tensor) -> _Stored | None:
    """The weight of a 4-bit linear if it computes on x in x's own dtype, from a weight that is laid out as (O, I)."""
    if torch.compiler.is_compiling():  # which cannot trace what PEFT's own path leaves to bitsandbytes' ops
        return None
    # What its forward does first, done by now for the reason that `_stored_in_8bit` has.
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    state = getattr(base.weight, "quant_state", None)
    fits_x = (
        state is not None
        and not getattr(state, "packing_format_for_cpu", False)
        and tuple(state.shape) == (base.out_features, base.in_features)
        and (base.compute_dtype or x.dtype) == x.dtype == (autocast_dtype(x) or x.dtype)
    )
    return _Stored(base.weight, functools.partial(_unpack_4bit, state)) if fits_x else None


def _unpack_4bit(quant_state: Any, weight: Tensor) -> Tensor:
    functional = sys.modules["bitsandbytes"].functional
    unpacked: Tensor = functional.dequantize_4bit(weight.detach().view(-1, 1), quant_state)
    return unpacked


def _stored_in_8bit(base: Any, x: Tensor) -> _Stored | None:
    """The weight of an 8-bit linear if its result has x's dtype under autocast too.

    On a GPU, and in eval mode anywhere, its forward rounds each row of x to 127 levels and multiplies int8 by int8
    (LLM.int8(), Dettmers et al. 2022), which is 0.8% from a product with the dequantised weight (x normal). So the
    forward has to be its own; its backward is a product with the dequantised weight.
    """
    if torch.compiler.is_compiling() or x.dtype != (autocast_dtype(x) or x.dtype):
        return None
    # What its forward does first. It has to be done by now: a first call that went another way than the same call
    # made again in the backward pass would be an error of gradient checkpointing.
    if getattr(base.weight, "CB", None) is not None:
        base.init_8bit_state()
    if base.bias is not None and base.bias.dtype != x.dtype:
        base.bias.data = base.bias.data.to(x.dtype)
    state = base.state
    if state.CB is None or state.SCB is None:  # not quantised yet
        return None
    return _Stored(state.CB, functools.partial(_unpack_8bit, state.SCB, x.dtype), base)


def _unpack_8bit(scales_O: Tensor, dtype: torch.dtype, weight_OI: Tensor) -> Tensor:
    """As ``MatMul8bitLt.backward``: the scales are fp32, and each element is rounded to `dtype` once."""
    return weight_OI.to(dtype).mul_(scales_O[:, None] * (1.0 / 127.0))


def _obstacle(layer: Any, adapter: str, parts: _Parts, *, training: bool) -> str | None:
    """Why the layer's state keeps the original path, or None. Called on each forward: no tensor is read here."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged into the weight"
    if layer.use_dora.get(adapter):
        return "DoRA"
    if adapter in layer.lora_variant:
        return f"LoRA variant {type(layer.lora_variant[adapter]).__name__}"
    dropout = parts.dropout
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"dropout is {type(dropout).__name__}"
    if training and getattr(dropout, "p", 0.0) >= 1.0:
        return f"dropout {dropout.p:g} lets nothing through to the adapter"
    if not isinstance(layer.scaling[adapter], (int, float)):
        return "scaling is a tensor (compiled hot-swapping)"
    reason = (
        _part_obstacle("base_layer", parts.base_layer, parts.weight)
        or _part_obstacle("lora_A", parts.a, parts.weight_a)
        or _part_obstacle("lora_B", parts.b, parts.weight_b)
        or (_hooks_of("lora_dropout") if _is_hooked(dropout) else None)
    )
    if reason is not None:
        return reason
    if layer.lora_bias.get(adapter) or parts.b.bias is not None:
        return "lora_bias: the adapter has a bias of its own"
    return "base weight is trainable" if parts.weight.requires_grad else None


def hooked_part(layer: Any) -> str | None:
    """The name of a module inside a LoRA layer that has hooks, which only its own call runs; None if none has."""
    adapter = next(iter(active_adapters(layer)), None)
    if adapter is None:
        return None
    base, a, b, dropout, *_ = _parts(layer, adapter)
    parts = {"base_layer": base, "lora_A": a, "lora_B": b, "lora_dropout": dropout}
    return next((name for name, part in parts.items() if _is_hooked(part)), None)


def _part_obstacle(name: str, part: Any, weight: Any) -> str | None:
    if _is_hooked(part):
        return _hooks_of(name)
    if type(part) is nn.Linear:
        plain = type(weight) in _PLAIN_TENSORS
    elif name == "base_layer" and is_4bit(part):
        plain = type(weight) is sys.modules["bitsandbytes"].nn.Params4bit
    elif name == "base_layer" and is_8bit(part):
        if part.state.has_fp16_weights:
            return "base_layer keeps its weight in 16 bits (has_fp16_weights) and quantises it in its calls"
        plain = type(weight) is sys.modules["bitsandbytes"].nn.Int8Params
    else:
        return f"{name} is {type(part).__name__}"
    return None if plain else f"{name}'s weight is {type(weight).__name__}"


def _hooks_of(name: str) -> str:
    return f"{name} has hooks (sharding, offloading or the user's own), which only its own call runs"


def active_adapters(layer: Any) -> list[str]:
    """The active adapters that have weights on this layer: an adapter may target other layers only."""
    on_the_layer = layer.lora_A
    return [name for name in layer.active_adapters if name in on_the_layer]


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__  # Accelerate's offloading replaces forward on the instance
    )
