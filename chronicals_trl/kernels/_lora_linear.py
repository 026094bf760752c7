"""Frozen linear layers with LoRA adapters, one or several that read the same input, as one autograd node.

Written layer by layer, an adapter costs two more full-size tensors in the forward pass (its output and the scaled
copy) and two more in the backward pass (the scaled gradient and a second gradient of x), dropout another two, and
layers that share an input (q, k and v) as many input gradients, which autograd adds up. Here each pass allocates its
results and rank-sized tensors, and with dropout the dropped input while it is read. `_lora_core.py` has the
arithmetic.

The node saves x (as the GEMMs read it), x A^T and the dropouts' masks. W, A and B are saved as the parameters
themselves and cast again in the backward pass: under autocast that spares the low-precision copy of each frozen weight
which eager keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lora_core as core
from ._common import autocast_off
from ._lora_core import LoraOperands


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Return ``x W^T + bias + scale (dropout(x) A^T) B^T``.

    Args:
        x: (..., I), any strides; may be empty.
        weight: (O, I), frozen.
        a: (R, I), LoRA's A.
        b: (O, R), LoRA's B.
        scale: LoRA's scaling, ``alpha / r`` (``alpha / sqrt(r)`` for rsLoRA).
        bias: (O,), may be trainable.
        **options: ``dropout``, ``dropout_dtype``, ``unpack`` and ``call`` of `LoraOperands`.

    Dtypes, chosen so that the numbers are those of PEFT's layer:
        - under autocast everything is computed in the autocast dtype, whatever the dtypes of the arguments;
        - without autocast ``x`` and ``weight`` share a dtype, and ``a`` and ``b`` have it too;
        - or ``a`` and ``b`` share a wider one (fp32 adapters on a bf16 or fp16 model, PEFT's default). The adapter's
          GEMMs then run in the wider dtype, as PEFT's do. Rounding A and B to bf16 instead was tried: the gradients of
          A and B, which PEFT has exact to fp32, lose four digits, and that of x leaves the bf16 rounding of eager's.
          Wide copies of some rows of x and dy exist while they are used; none is saved.

    Returns:
        (..., O) in the autocast dtype under autocast, else in the dtype of ``x``. Gradients of ``x``, ``a``, ``b`` and
        ``bias`` come in the dtype of each. Second derivatives are not supported (torch raises).

    Raises:
        ValueError: ``weight`` requires a gradient, shapes do not fit together, or ``dropout`` is not in [0, 1).
        TypeError: ``scale`` is not a number, or the dtypes are none of the above.
    """
    (y,) = lora_linears(x, [LoraOperands(weight, bias, a, b, scale, **options)])
    return y


def lora_linears(x: Tensor, layers: Sequence[LoraOperands]) -> tuple[Tensor, ...]:
    """`lora_linear` for each of `layers`, which share x, as one node: one input gradient, the A's in one GEMM.

    With dropout each adapter draws a mask of its own, in the order of the layers, as PEFT's layers do one by one.

    Args:
        x: (..., I).
        layers: at least one; those without an adapter are plain frozen linears.

    Returns:
        One (..., O_i) for each layer.

    Raises:
        ValueError, TypeError: as `lora_linear`.
    """
    dtypes = check_operands(x, layers)
    flat = [value for layer in layers for value in layer]
    outputs = _LoraLinears.apply(x, *dtypes, *flat)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def lora_linears_supported(x: Tensor, layers: Sequence[LoraOperands]) -> bool:
    """Whether ``lora_linears`` takes these dtypes in the current autocast state, and the weights are frozen."""
    return not any(layer.weight.requires_grad for layer in layers) and core.compute_dtypes(x, layers) is not None


def lora_linear_supported(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """`lora_linears_supported` for one layer."""
    return lora_linears_supported(x, [LoraOperands(weight, None, a, b)])


def lora_linear_reference(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, *, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The same function as separate torch operations, in the order and the dtypes of PEFT's layer."""
    base = torch.nn.functional.linear(x, weight, bias)
    x = torch.nn.functional.dropout(x.to(a.dtype), dropout)
    adapter = torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
    return (base + adapter * scale).to(base.dtype)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, adapter_dtype: torch.dtype, *flat: Any) -> Any:
        layers = unflatten(flat)
        outputs, x_NI, kept = core.forward(x, layers, dtype, adapter_dtype)
        ctx.set_materialize_grads(False)
        save(ctx, [x_NI, *(t for pair in kept for t in pair)], layers)
        ctx.x_shape, ctx.x_dtype, ctx.adapter_dtype = x.shape, x.dtype, adapter_dtype
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # x A^T is saved as a plain tensor: a second derivative would miss the path through it
    def backward(ctx: Any, *grads_NO: Tensor | None) -> Any:
        (x_NI, *kept_flat), layers = restore(ctx)
        kept = pairs(kept_flat)
        need_bias, need_a, need_b = needs(ctx.needs_input_grad[3:])
        # loss.backward() may run inside an autocast region that the forward pass was not in.
        with autocast_off(x_NI.device.type):
            d_x, d_b, gs_NR = core.input_and_b_gradients(
                layers, kept, grads_NO, ctx.needs_input_grad[0], need_b, ctx.adapter_dtype
            )
            d_a = core.a_gradients(x_NI, layers, kept, gs_NR, grads_NO, need_a, d_x, ctx.adapter_dtype)
            d_bias = core.bias_gradients(layers, grads_NO, need_bias)
            if d_x is not None:
                d_x = d_x.view(ctx.x_shape).to(ctx.x_dtype)
        return d_x, None, None, *gradients_of(d_bias, d_a, d_b)


# -- a node's arguments: after its own, the fields of one `LoraOperands` after the other ------------------------------

_FIELDS = len(LoraOperands._fields)
_TENSORS = 4  # weight, bias, a, b: the first fields


def unflatten(flat: Sequence[Any]) -> list[LoraOperands]:
    """The layers of a node's arguments."""
    return [LoraOperands(*flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)]


def save(ctx: Any, tensors: Sequence[Tensor | None], layers: Sequence[LoraOperands]) -> None:
    """Save `tensors` and the parameters of `layers` for `restore`."""
    ctx.save_for_backward(*tensors, *(t for layer in layers for t in layer[:_TENSORS]))
    ctx.settings = [layer[_TENSORS:] for layer in layers]


def restore(ctx: Any) -> tuple[list[Tensor], list[LoraOperands]]:
    """What `save` saved."""
    settings = ctx.settings
    saved = list(ctx.saved_tensors)
    first = len(saved) - _TENSORS * len(settings)
    parts = [saved[first + _TENSORS * i : first + _TENSORS * (i + 1)] for i in range(len(settings))]
    return saved[:first], [LoraOperands(*part, *rest) for part, rest in zip(parts, settings, strict=True)]


def pairs(flat: Sequence[Any]) -> list[core.Kept]:
    """The `Kept` of tensors that were saved one after the other."""
    return [core.Kept(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]


def needs(flat: Sequence[bool]) -> tuple[list[bool], list[bool], list[bool]]:
    """Which biases, A's and B's need a gradient."""
    return list(flat[1::_FIELDS]), list(flat[2::_FIELDS]), list(flat[3::_FIELDS])


def gradients_of(d_bias: Sequence[Any], d_a: Sequence[Any], d_b: Sequence[Any]) -> list[Tensor | None]:
    """Gradients in the places of the flattened layers."""
    others = [None] * (_FIELDS - _TENSORS)
    return [d for layer in zip(d_bias, d_a, d_b, strict=True) for d in (None, *layer, *others)]


# -- checks ----------------------------------------------------------------------------------------------------------


def check_operands(x: Tensor, layers: Sequence[LoraOperands]) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes to compute in; ValueError or TypeError, naming the argument, where the layers do not fit."""
    for layer in layers:
        if layer.weight.requires_grad:
            raise ValueError(
                "weight requires a gradient, and lora_linear computes none for it: freeze it with "
                "weight.requires_grad_(False), or use the unfused layer"
            )
        if isinstance(layer.scale, bool) or not isinstance(layer.scale, (int, float)):
            raise TypeError(f"scale must be a number, got {type(layer.scale).__name__}: pass float(scale)")
        if not 0.0 <= layer.dropout < 1.0:
            raise ValueError(f"dropout is {layer.dropout}: it must be in [0, 1)")
        if (layer.a is None) != (layer.b is None):
            raise ValueError("a and b belong together: give both, or None for both where there is no adapter")
        _check_shapes(x, layer)
    dtypes = core.compute_dtypes(x, layers)
    if dtypes is None:
        given = "; ".join(f"weight {w.dtype}, a {_dtype(a)}, b {_dtype(b)}" for w, _, a, b, *_ in layers)
        raise TypeError(
            f"no dtype to compute in: x is {x.dtype}, {given}. Without autocast x and weight must have one "
            "floating-point dtype, and a and b the same or a wider one: cast them, or enable torch.autocast"
        )
    return dtypes


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _check_shapes(x: Tensor, layer: LoraOperands) -> None:
    weight, bias, a, b = layer.weight, layer.bias, layer.a, layer.b
    if layer.unpack is not None:
        return  # the shape shows when it is unpacked, and the GEMM says so
    if weight.dim() != 2 or any(t is not None and t.dim() != 2 for t in (a, b)):
        shapes = ", ".join(str(tuple(t.shape)) for t in (weight, a, b) if t is not None)
        raise ValueError(
            f"weight, a and b must be matrices, got shapes {shapes}: a sharded parameter has to be gathered first"
        )
    out_features, in_features = weight.shape
    rank = 0 if a is None else a.shape[0]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "a": (a, (rank, in_features)),
        "b": (b, (out_features, rank)),
        "bias": (bias, (out_features,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but weight {tuple(weight.shape)} and rank {rank} (a's first "
                f"dimension) need {shape}: a is (rank, in), b is (out, rank)"
            )
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: its last dimension must be weight's in features, {in_features}"
        )
