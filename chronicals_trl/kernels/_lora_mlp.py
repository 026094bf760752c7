"""A gated MLP over frozen projections with LoRA adapters, down(act(gate(x)) * up(x)), as one autograd node.

`_gated_mlp.py` does this for trained projections without adapters, and has the activation's kernels. As there the
product act(gate) * up is kept once, or made again by the kernel that reads gate and up anyway. Apart, PEFT's layers
keep it as the activation's result and again as what dropout has left of it. No adapter on `down`: it is not kept.

M tokens, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lora_core as core
from ._common import autocast_off, use_triton
from ._gated_mlp import _launch_backward, _launch_forward, geglu, swiglu
from ._lora_core import LoraOperands
from ._lora_linear import check_operands, gradients_of, lora_linears, needs, pairs, restore, save, unflatten

_OPS = {"swiglu": swiglu, "geglu": geglu}


def lora_gated_mlp(
    x: Tensor,
    inner: Sequence[LoraOperands],
    down: LoraOperands,
    *,
    activation: str = "swiglu",
    recompute: bool = False,
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` of LoRA linears, as one autograd node.

    Dropout draws in the order gate, up, down. Where the kernels do not run, and under torch.compile, the same formula
    runs as one node for `inner`, the activation, and one for `down`.

    Args:
        x: (..., H).
        inner: gate and up, each (I, H); or one projection (2I, H) with both, gate first.
        down: (H, I).
        activation: ``"swiglu"`` or ``"geglu"``.
        recompute: make the product ``act(gate) * up`` again in the backward pass instead of keeping it.

    Returns:
        (..., H); dtypes as `lora_linear`.

    Raises:
        ValueError: an unknown activation, not one or two inner projections, or shapes that do not fit together.
        TypeError: as `lora_linear`.
    """
    if activation not in _OPS:
        raise ValueError(f"lora_gated_mlp: activation is {activation!r}; it must be one of {sorted(_OPS)}.")
    if len(inner) not in (1, 2):
        raise ValueError(f"lora_gated_mlp: {len(inner)} inner projections; give gate and up, or one that holds both.")
    layers = [*inner, down]
    plain = [t for layer in layers for t in (layer.bias, layer.a, layer.b)]
    plain += [layer.weight for layer in layers if layer.unpack is None]
    if torch.compiler.is_compiling() or not use_triton(x, *plain) or x.numel() == 0:
        (y,) = lora_linears(_OPS[activation](*lora_linears(x, inner)), [down])
        return y
    dtypes = check_operands(x, inner)
    # `down` reads what `inner` gives: checked on its shape and dtype, without the values.
    width = core.out_features(inner[0]) // (3 - len(inner))
    if check_operands(x.new_empty((0, width), dtype=dtypes[0]), [down]) != dtypes:
        raise TypeError("lora_gated_mlp: down and the inner projections have adapters of different dtypes: cast them")
    flat = [value for layer in layers for value in layer]
    y = _LoraGatedMLP.apply(x, *dtypes, activation == "geglu", recompute, *flat)
    return y.view(*x.shape[:-1], y.shape[-1])


class _LoraGatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        gelu: bool,
        recompute: bool,
        *flat: Any,
    ) -> Tensor:
        *inner, down = layers = unflatten(flat)
        outputs, x_MH, kept = core.forward(x, inner, dtype, adapter_dtype)
        gate_MI, up_MI = outputs[0], outputs[1] if len(outputs) == 2 else None
        product_MI = _launch_forward(gate_MI, up_MI, gelu)
        (y_MH,), _, kept_down = core.forward(product_MI, [down], dtype, adapter_dtype)
        _, need_a, _ = needs(ctx.needs_input_grad[5:])
        kept_MI = product_MI if need_a[-1] and not recompute else None
        save(ctx, [x_MH, gate_MI, up_MI, kept_MI, *(t for pair in (*kept, *kept_down) for t in pair)], layers)
        ctx.x_shape, ctx.x_dtype, ctx.adapter_dtype, ctx.gelu = x.shape, x.dtype, adapter_dtype, gelu
        return y_MH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MH: Tensor) -> Any:
        with autocast_off(grad_MH.device.type):
            return _LoraGatedMLP._gradients(ctx, grad_MH)

    @staticmethod
    def _gradients(ctx: Any, grad_MH: Tensor) -> Any:
        (x_MH, gate_MI, up_MI, product_MI, *kept_flat), (*inner, down) = restore(ctx)
        need_bias, need_a, need_b = needs(ctx.needs_input_grad[5:])
        kept = pairs(kept_flat)
        sets = len(core.input_sets(inner))
        kept, kept_down = kept[:sets], kept[sets:]

        d_product_MI, d_b_down, gs_down = core.input_and_b_gradients(
            [down], kept_down, [grad_MH], True, need_b[-1:], ctx.adapter_dtype
        )
        assert d_product_MI is not None
        again = d_product_MI if need_a[-1] and product_MI is None else None
        d_gate_MI, d_up_MI = _launch_backward(d_product_MI, gate_MI, up_MI, ctx.gelu, out=again)
        product_MI = again if product_MI is None else product_MI
        d_a_down = core.a_gradients(product_MI, [down], kept_down, gs_down, [grad_MH], need_a[-1:])
        d_bias_down = core.bias_gradients([down], [grad_MH], need_bias[-1:])
        del d_product_MI, product_MI, again

        grads = [d_gate_MI] if up_MI is None else [d_gate_MI, d_up_MI]
        d_x, d_b, gs = core.input_and_b_gradients(
            inner, kept, grads, ctx.needs_input_grad[0], need_b[:-1], ctx.adapter_dtype
        )
        d_a = core.a_gradients(x_MH, inner, kept, gs, grads, need_a[:-1])
        d_bias = core.bias_gradients(inner, grads, need_bias[:-1])
        if d_x is not None:
            d_x = d_x.view(ctx.x_shape).to(ctx.x_dtype)
        return d_x, None, None, None, None, *gradients_of(d_bias + d_bias_down, d_a + d_a_down, d_b + d_b_down)
