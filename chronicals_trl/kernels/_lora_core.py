"""The arithmetic of frozen linear layers with LoRA adapters that read the same input, without autograd.

    y_i = x W_i^T + bias_i + scale_i (D_i x A_i^T) B_i^T          D_i: the adapter's dropout, or nothing

The equation is LoRA's (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), the fusion our own.
`_lora_linear.py` and `_lora_mlp.py` make autograd nodes of it.

Shape suffixes: N tokens (all leading dimensions of x), I in features, O out features, R rank (of all adapters that
read the same tensor together, where they are concatenated).

Forward: the adapters without dropout share one GEMM with x, their A's concatenated (rank-sized: cheap to do anew in
each step), and every low-rank product is accumulated by the GEMM itself into the base output.

Backward, with dy_i (N, O_i):
    g_i  = scale_i dy_i B_i
    dx   = sum over i of dy_i W_i + D_i (g_i A_i)       one buffer, into which every GEMM adds
    dA_i = g_i^T (D_i x)                                 one GEMM for the adapters without dropout
    dB_i = scale_i dy_i^T (D_i x A_i^T)

What is kept between the two: x as the GEMMs read it, once for all layers; D_i x A_i^T, which is rank-sized; and the
dropout's mask, a byte an element, from which D_i x is made again; for adapters in the GEMMs' own narrow dtype inside
kernels that read x and the masks once (`_lora_dropout.py`).

Dropout is torch's own call on a tensor of the dtype and layout that PEFT's layer hands it, so that the mask and what
is consumed of the random generator are PEFT's. (On a GPU the mask depends on the dtype: it decides how many elements
share a draw.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _lora_dropout
from ._common import autocast_dtype, use_triton
from ._low_rank import Dropped, supported
from ._shared_linear import column_sums
from ._wide_products import add_masked_mm_, add_mm_, mm, transposed_mm

# Tokens, and out features, for each in feature, from which on a copy of the weight is small beside the outputs.
_MANY = 4

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LoraOperands(NamedTuple):
    """One frozen linear layer and its adapter, as `lora_linears` takes it.

    Attributes:
        weight: (O, I), frozen; or packed in some other form, of which `unpack` makes (O, I).
        bias: (O,), may be trainable, or None.
        a, b: (R, I) and (O, R), LoRA's A and B; both None for a layer without an adapter.
        scale: LoRA's scaling, ``alpha / r`` (``alpha / sqrt(r)`` for rsLoRA).
        dropout: probability, in [0, 1), with which an element of x is dropped on its way to `a`. 0 in eval mode.
        dropout_dtype: the dtype in which the dropout draws; None takes x's.
        unpack: makes the weight of what is stored (a quantised weight), in the forward pass and again in the backward
            pass.
        call: the layer without its adapter, of (N, I) to (N, O) in the same dtype, bias included, into a tensor of its
            own. For a layer whose forward is no product with the weight that `unpack` makes, which is then the
            backward pass's alone. Called without gradients.
    """

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    dropout_dtype: torch.dtype | None = None
    unpack: Callable[[Tensor], Tensor] | None = None
    call: Callable[[Tensor], Tensor] | None = None


class Kept(NamedTuple):
    """What the backward pass needs of one set of adapters that read the same tensor."""

    h_NR: Tensor  # D x A^T of all of them, side by side
    mask_NI: Tensor | None  # which elements of x the dropout let pass; as bytes where the kernels read it


def for_kernels(kept: Kept) -> bool:
    """Whether `_lora_dropout.py` read the input, and makes its part of dx together with dA."""
    return kept.mask_NI is not None and kept.mask_NI.dtype == torch.uint8


def compute_dtypes(x: Tensor, layers: Sequence[LoraOperands]) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes of the base GEMMs and of the adapters', or None where the layers cannot be computed together."""
    tensors = [x, *(t for layer in layers for t in (layer.a, layer.b) if t is not None)]
    weights = [layer.weight for layer in layers if layer.unpack is None]
    if any(t.dtype not in FLOATS for t in (*tensors, *weights)):
        return None
    dtype = autocast_dtype(x)
    if dtype is not None:
        return dtype, dtype
    adapter_dtypes = {t.dtype for t in tensors[1:]} or {x.dtype}
    if len(adapter_dtypes) != 1 or any(w.dtype != x.dtype for w in weights):
        return None
    (adapter_dtype,) = adapter_dtypes
    return (x.dtype, adapter_dtype) if torch.promote_types(x.dtype, adapter_dtype) == adapter_dtype else None


def out_features(layer: LoraOperands) -> int:
    """O, also of a packed weight with an adapter."""
    return (layer.weight if layer.b is None else layer.b).shape[0]


# -- forward ---------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor, layers: Sequence[LoraOperands], dtype: torch.dtype, adapter_dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, list[Kept]]:
    """Outputs (N, O_i) in `dtype`; x as (N, I) in `dtype`; and what is kept of each of `input_sets`."""
    x_NI = x.to(dtype).reshape(-1, x.shape[-1])
    outputs = [base(x_NI, layer) for layer in layers]
    kept = read_input(x, x_NI, layers, adapter_dtype)
    add_adapters_(outputs, layers, kept, adapter_dtype)
    return outputs, x_NI, kept


def base(x_NI: Tensor, layer: LoraOperands) -> Tensor:
    """The layer without its adapter."""
    if layer.call is not None:
        return layer.call(x_NI)
    weight_IO = _weight(layer, x_NI.dtype).t()
    return x_NI @ weight_IO if layer.bias is None else torch.addmm(layer.bias.to(x_NI.dtype), x_NI, weight_IO)


def read_input(
    x: Tensor, x_NI: Tensor, layers: Sequence[LoraOperands], adapter_dtype: torch.dtype, by_kernels: bool = True
) -> list[Kept]:
    """D x A^T of each of `input_sets`, and the mask."""
    sets = input_sets(layers)
    together = _read_through_dropout(x, x_NI, layers, adapter_dtype) if by_kernels else []
    kept = []
    for members in sets[: len(sets) - len(together)]:
        first = layers[members[0]]
        read_NI, mask_NI, missing = x_NI, None, 1.0
        if first.dropout and x.numel():
            read_NI, mask_NI, missing = _drop(x, x_NI, first)
        kept.append(Kept(mm(read_NI, _stack_a(layers, members, adapter_dtype).t(), missing), mask_NI))
        del read_NI
    return kept + together


def _read_through_dropout(
    x: Tensor, x_NI: Tensor, layers: Sequence[LoraOperands], adapter_dtype: torch.dtype
) -> list[Kept]:
    """What `read_input` gives for the layers with dropout, which come last there, by one kernel; or nothing."""
    behind = behind_dropout(layers)
    if not kernels_take(x_NI, layers, adapter_dtype) or not behind:
        return []
    dropped = []
    for layer in (layers[i] for i in behind):
        mask = draw_mask(torch.empty_like(x, dtype=layer.dropout_dtype or x.dtype), layer)
        dropped.append(Dropped(mask.reshape(x_NI.shape), missing_factor(layer)))
    a = [_stack_a(layers, [i], adapter_dtype).contiguous() for i in behind]
    hs_NR = [h for at in _groups(len(behind)) for h in _lora_dropout.read(x_NI, dropped[at], a[at])]
    return [Kept(h_NR, d.mask) for h_NR, d in zip(hs_NR, dropped, strict=True)]


def _groups(count: int) -> list[slice]:
    """As many adapters at a time as the kernels take."""
    return [slice(i, i + _lora_dropout.MAX_ADAPTERS) for i in range(0, count, _lora_dropout.MAX_ADAPTERS)]


def behind_dropout(layers: Sequence[LoraOperands]) -> list[int]:
    """Indices of the layers whose adapter reads its input through dropout."""
    return [i for i, layer in enumerate(layers) if layer.a is not None and layer.dropout]


def kernels_take(x_NI: Tensor, layers: Sequence[LoraOperands], adapter_dtype: torch.dtype) -> bool:
    """Whether the kernels with rank-sized products inside take the adapters of `layers`, which read x."""
    ranks = [layer.a.shape[0] for layer in layers if layer.a is not None]
    return (
        supported(x_NI.dtype, adapter_dtype, ranks)
        and not torch.compiler.is_compiling()
        and use_triton(x_NI)
        and x_NI.numel() > 0
        and x_NI.stride(1) == 1
    )


def draw_mask(drawn_on: Tensor, layer: LoraOperands) -> Tensor:
    """What dropout lets through, as bytes, drawn as nn.Dropout draws on a tensor of this dtype and layout.

    The values of `drawn_on` do not matter, and are lost.
    """
    if drawn_on.is_cuda:
        return torch.native_dropout(drawn_on, layer.dropout, True)[1].view(torch.uint8)
    return (F.dropout(drawn_on.fill_(1), layer.dropout, training=True) != 0).view(torch.uint8)


def missing_factor(layer: LoraOperands) -> float:
    """1 / (1 - p)."""
    return 1.0 / (1.0 - layer.dropout)


def add_adapters_(
    outputs: Sequence[Tensor], layers: Sequence[LoraOperands], kept: Sequence[Kept], adapter_dtype: torch.dtype
) -> None:
    """Add scale h B^T to each output."""
    for layer, output, h_NR in zip(layers, outputs, by_layer(layers, [k.h_NR for k in kept]), strict=True):
        if h_NR is not None:
            add_mm_(output, h_NR, b_matrix(layer, adapter_dtype).t(), layer.scale)


def by_layer(layers: Sequence[LoraOperands], joint_NR: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The columns of each layer in the rank-sized tensors of `input_sets`; None for a layer without an adapter."""
    parts: list[Tensor | None] = [None] * len(layers)
    for members, joint in zip(input_sets(layers), joint_NR, strict=True):
        if joint is not None:
            for i, part in zip(members, joint.split(_ranks(layers, members), 1), strict=True):
                parts[i] = part
    return parts


def input_sets(layers: Sequence[LoraOperands]) -> list[list[int]]:
    """Indices of the layers with adapters, those together whose A's read the same tensor.

    A dropped-out x is its adapter's alone. The sets with dropout are in the order of the layers: each draws.
    """
    adapted = [i for i, layer in enumerate(layers) if layer.a is not None]
    together = [i for i in adapted if not layers[i].dropout]
    return [together] * bool(together) + [[i] for i in adapted if layers[i].dropout]


def _weight(layer: LoraOperands, dtype: torch.dtype) -> Tensor:
    weight = layer.weight if layer.unpack is None else layer.unpack(layer.weight)
    return weight.to(dtype)


def _stack_a(layers: Sequence[LoraOperands], members: list[int], dtype: torch.dtype) -> Tensor:
    stack = [layers[i].a.to(dtype) for i in members]  # type: ignore[union-attr]
    return stack[0] if len(stack) == 1 else torch.cat(stack)


def b_matrix(layer: LoraOperands, dtype: torch.dtype) -> Tensor:
    """B in the dtype of the products."""
    assert layer.b is not None
    return layer.b.to(dtype)


def _ranks(layers: Sequence[LoraOperands], members: list[int]) -> list[int]:
    return [layers[i].a.shape[0] for i in members]  # type: ignore[union-attr]


def _drop(x: Tensor, x_NI: Tensor, layer: LoraOperands) -> tuple[Tensor, Tensor, float]:
    """x with elements dropped, the mask of the others, and the factor 1 / (1 - p) if x has yet to get it."""
    p = layer.dropout
    drawn_on = x.to(layer.dropout_dtype or x.dtype)
    if x.is_cuda:  # there F.dropout is this very call, which gives the mask too
        dropped, mask = torch.native_dropout(drawn_on, p, True)
        mask_NI = mask.reshape(x_NI.shape)
        if dropped.dtype == x_NI.dtype:
            return dropped.reshape(x_NI.shape), mask_NI, 1.0
    else:
        mask_NI = draw_mask(torch.empty_like(drawn_on), layer).view(torch.bool).reshape(x_NI.shape)
    return x_NI * mask_NI, mask_NI, missing_factor(layer)


# -- backward --------------------------------------------------------------------------------------------------------


def input_and_b_gradients(
    layers: Sequence[LoraOperands],
    kept: Sequence[Kept],
    grads_NO: Sequence[Tensor | None],
    need_x: bool,
    need_b: Sequence[bool],
    adapter_dtype: torch.dtype,
    through_adapters: bool = True,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor]]:
    """dx (N, I); dB of each layer in B's dtype; and g of each of `input_sets`, for `a_gradients`.

    A layer whose output nobody used has None in `grads_NO`, and gets None. Without `through_adapters` dx is what goes
    through the base weights alone.
    """
    wide = _in_one_pass(layers, grads_NO, adapter_dtype) if need_x and through_adapters else None
    d_x, gs_NR = wide or (_base_input_gradient(layers, grads_NO) if need_x else None, None)
    d_b: list[Tensor | None] = [None] * len(layers)
    hs_NR = by_layer(layers, [k.h_NR for k in kept])
    for i, (layer, grad_NO, h_NR) in enumerate(zip(layers, grads_NO, hs_NR, strict=True)):
        if need_b[i] and grad_NO is not None and h_NR is not None:
            d_b[i] = transposed_mm(grad_NO, h_NR, layer.scale).to(layer.b.dtype)  # type: ignore[union-attr]
    if gs_NR is None:
        gs_NR = _output_gradients(layers, grads_NO, kept, adapter_dtype)
    if d_x is not None and through_adapters:
        _add_input_gradients_(d_x, layers, kept, gs_NR, grads_NO, adapter_dtype)
    return d_x, d_b, gs_NR


def _base_input_gradient(layers: Sequence[LoraOperands], grads_NO: Sequence[Tensor | None]) -> Tensor | None:
    """The part of dx that goes through the base weights; None if no output was used."""
    d_x: Tensor | None = None
    for layer, grad_NO in zip(layers, grads_NO, strict=True):
        if grad_NO is not None:
            weight_OI = _weight(layer, grad_NO.dtype)
            d_x = grad_NO @ weight_OI if d_x is None else d_x.addmm_(grad_NO, weight_OI)
            del weight_OI
    return d_x


def _in_one_pass(
    layers: Sequence[LoraOperands], grads_NO: Sequence[Tensor | None], adapter_dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]] | None:
    """Base input gradient and g from one reading of each dy, dy [W B]; None where that would cost more than it spares.

    Each W is copied for it, so there have to be many more tokens than W has columns; and the outputs have to be wide
    for the reading to count (gate and up). dx is a view into rows that are R longer.
    """
    grads = [grad for grad in grads_NO if grad is not None and grad.dtype == adapter_dtype]
    if len(grads) < len(layers) or any(layer.a is None for layer in layers):
        return None
    ranks, width = _ranks(layers, list(range(len(layers)))), layers[0].a.shape[1]  # type: ignore[union-attr]
    pays = min(grads[0].shape[0], sum(map(out_features, layers))) >= _MANY * width
    if not pays or (width + sum(ranks)) % 8:  # rows that the GEMMs cannot read 16 bytes at a time
        return None
    joint: Tensor | None = None
    for i, (grad_NO, layer) in enumerate(zip(grads, layers, strict=True)):
        weight_OI = _weight(layer, adapter_dtype)
        columns = [weight_OI.new_zeros(weight_OI.shape[0], rank) for rank in ranks]
        columns[i] = b_matrix(layer, adapter_dtype)
        right = torch.cat([weight_OI, *columns], 1)
        joint = grad_NO @ right if joint is None else joint.addmm_(grad_NO, right)
    assert joint is not None
    gs_NR = joint[:, width:].split(ranks, 1)
    scales = [layer.scale for layer in layers]
    parts = [[gs_NR[i] * scales[i] for i in members] for members in input_sets(layers)]
    if len(parts) == 1 and len(set(scales)) == 1:
        parts = [[joint[:, width:] * scales[0]]]
    return joint[:, :width], [part[0] if len(part) == 1 else torch.cat(part, 1) for part in parts]


def _output_gradients(
    layers: Sequence[LoraOperands],
    grads_NO: Sequence[Tensor | None],
    kept: Sequence[Kept],
    adapter_dtype: torch.dtype,
) -> list[Tensor]:
    """g = scale dy B of each of `input_sets`."""
    hs_NR = by_layer(layers, [k.h_NR for k in kept])
    gs_NR = []
    for members in input_sets(layers):
        parts = []
        for i in members:
            layer, grad_NO = layers[i], grads_NO[i]
            if grad_NO is None:
                parts.append(torch.zeros_like(hs_NR[i]))  # type: ignore[arg-type]
            else:
                parts.append(mm(grad_NO, b_matrix(layer, adapter_dtype), layer.scale))
        gs_NR.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    return gs_NR


def _add_input_gradients_(
    d_x: Tensor,
    layers: Sequence[LoraOperands],
    kept: Sequence[Kept],
    gs_NR: Sequence[Tensor],
    grads_NO: Sequence[Tensor | None],
    adapter_dtype: torch.dtype,
) -> None:
    """Add D (g A) of each of `input_sets` to dx."""
    for members, of_set, g_NR in zip(input_sets(layers), kept, gs_NR, strict=True):
        if for_kernels(of_set) or all(grads_NO[i] is None for i in members):
            continue
        mask_NI = of_set.mask_NI
        a_RI = _stack_a(layers, members, adapter_dtype)
        if mask_NI is None:
            add_mm_(d_x, g_NR, a_RI, 1.0)
        else:
            add_masked_mm_(d_x, g_NR, a_RI, mask_NI, missing_factor(layers[members[0]]))


def a_gradients(
    x_NI: Tensor,
    layers: Sequence[LoraOperands],
    kept: Sequence[Kept],
    gs_NR: Sequence[Tensor],
    grads_NO: Sequence[Tensor | None],
    need_a: Sequence[bool],
    d_x: Tensor | None,
    adapter_dtype: torch.dtype,
) -> list[Tensor | None]:
    """dA of each layer, in A's dtype; None where it is not needed or the layer's output was not used.

    Completes `d_x`, which comes from `input_and_b_gradients` without the part that the kernels make here.
    """
    d_a: list[Tensor | None] = [None] * len(layers)
    for members, of_set, g_NR in zip(input_sets(layers), kept, gs_NR, strict=True):
        wanted = [need_a[i] and grads_NO[i] is not None for i in members]
        if not any(wanted) or for_kernels(of_set):
            continue
        missing = 1.0 if of_set.mask_NI is None else missing_factor(layers[members[0]])
        joint_RI = transposed_mm(g_NR, x_NI if of_set.mask_NI is None else x_NI * of_set.mask_NI, missing)
        for i, want, d in zip(members, wanted, joint_RI.split(_ranks(layers, members)), strict=True):
            if want:
                d_a[i] = d.to(layers[i].a.dtype)  # type: ignore[union-attr]
    used = [
        (i, of_set, g_NR)
        for (i, *_), of_set, g_NR in zip(input_sets(layers), kept, gs_NR, strict=True)
        if for_kernels(of_set) and grads_NO[i] is not None
    ]
    for at in _groups(len(used)):
        dropped = [Dropped(k.mask_NI, missing_factor(layers[i])) for i, k, _ in used[at]]  # type: ignore[arg-type]
        a = [_stack_a(layers, [i], adapter_dtype).contiguous() for i, *_ in used[at]]
        found = _lora_dropout.gradients(x_NI, d_x, dropped, [g_NR for *_, g_NR in used[at]], a)
        for (i, *_), d in zip(used[at], found, strict=True):
            d_a[i] = d.to(layers[i].a.dtype) if need_a[i] else None  # type: ignore[union-attr]
    return d_a


def bias_gradients(
    layers: Sequence[LoraOperands], grads_NO: Sequence[Tensor | None], need: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of each bias in its dtype, or None."""
    return [
        _bias_gradient(grad_NO, layer.bias.dtype)
        if wanted and grad_NO is not None and layer.bias is not None
        else None
        for layer, grad_NO, wanted in zip(layers, grads_NO, need, strict=True)
    ]


def _bias_gradient(grad_NO: Tensor, dtype: torch.dtype) -> Tensor:
    return column_sums(grad_NO) if grad_NO.dtype == dtype else grad_NO.sum(0, dtype=dtype)
