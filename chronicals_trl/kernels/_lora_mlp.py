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
from . import _lora_gated
from ._common import autocast_off, use_triton
from ._gated_mlp import _halves, _launch_backward, _launch_forward, geglu, swiglu
from ._lora_core import LoraOperands
from ._lora_linear import check_operands, gradients_of, lora_linears, needs, pairs, restore, save, unflatten
from ._low_rank import Dropped, Factors

_OPS = {"swiglu": swiglu, "geglu": geglu}


def lora_gated_mlp(
    x: Tensor,
    inner: Sequence[LoraOperands],
    down: LoraOperands,
    *,
    activation: str = "swiglu",
    recompute: bool = False,
    result_needed: bool = True,
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
        result_needed: as `gated_mlp`.

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
    dtype, _ = check_operands(x, inner)
    # `down` reads what `inner` gives: checked on its shape and dtype, without the values.
    width = core.out_features(inner[0]) // (3 - len(inner))
    check_operands(x.new_empty((0, width), dtype=dtype), [down])
    # Of all together: a layer without an adapter goes with whatever the others have.
    dtypes = core.compute_dtypes(x, layers)
    if dtypes is None:
        raise TypeError("lora_gated_mlp: down and the inner projections have adapters of different dtypes: cast them")
    flat = [value for layer in layers for value in layer]
    y = _LoraGatedMLP.apply(x, *dtypes, activation == "geglu", recompute, result_needed, *flat)
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
        result_needed: bool,
        *flat: Any,
    ) -> Tensor:
        *inner, down = layers = unflatten(flat)
        x_MH = x.to(dtype).reshape(-1, x.shape[-1])
        inside = core.kernels_take(x_MH, layers, adapter_dtype)
        outputs = [core.base(x_MH, layer) for layer in inner]
        kept = core.read_input(x, x_MH, inner, adapter_dtype)
        gate_MI, up_MI = outputs[0], outputs[1] if len(outputs) == 2 else None
        if inside:
            a_down, dropped = None, None
            if down.a is not None:
                a_down = down.a.to(dtype).contiguous()
                dropped = _drop_product(gate_MI, up_MI, down)
            factors = _inner_factors(inner, kept, adapter_dtype)
            product_MI, h_down_MR = _lora_gated.forward(*_halves(gate_MI, up_MI), factors, a_down, gelu, dropped)
            kept_down = [] if h_down_MR is None else [core.Kept(h_down_MR, dropped and dropped.mask)]
        else:
            core.add_adapters_(outputs, inner, kept, adapter_dtype)
            product_MI = _launch_forward(gate_MI, up_MI, gelu)
            kept_down = core.read_input(product_MI, product_MI, [down], adapter_dtype, by_kernels=False)
        if result_needed or down.call is not None:  # which may leave its backward pass something
            y_MH = core.base(product_MI, down)
            core.add_adapters_([y_MH], [down], kept_down, adapter_dtype)
        else:
            y_MH = x_MH.new_empty(x_MH.shape[0], core.out_features(down))

        # Where the kernels read the product on its way, they make dA of down with it too.
        needed = needs(ctx.needs_input_grad[6:])[1][-1] and not inside
        kept_MI = product_MI if needed and not recompute else None
        save(ctx, [x_MH, gate_MI, up_MI, kept_MI, *(t for pair in (*kept, *kept_down) for t in pair)], layers)
        ctx.x_shape, ctx.x_dtype, ctx.adapter_dtype, ctx.gelu = x.shape, x.dtype, adapter_dtype, gelu
        ctx.inside = inside
        return y_MH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MH: Tensor) -> Any:
        with autocast_off(grad_MH.device.type):
            return _LoraGatedMLP._gradients(ctx, grad_MH)

    @staticmethod
    def _gradients(ctx: Any, grad_MH: Tensor) -> Any:
        (x_MH, gate_MI, up_MI, product_MI, *kept_flat), (*inner, down) = restore(ctx)
        need_bias, need_a, need_b = needs(ctx.needs_input_grad[6:])
        kept, dtype = pairs(kept_flat), ctx.adapter_dtype
        sets = len(core.input_sets(inner))
        kept, kept_down = kept[:sets], kept[sets:]
        d_product_MI, d_b_down, gs_down = core.input_and_b_gradients(
            [down], kept_down, [grad_MH], True, need_b[-1:], dtype, through_adapters=not ctx.inside
        )
        assert d_product_MI is not None
        if ctx.inside:
            grads, d_b, d_a_down = _gradients_inside(
                d_product_MI, gate_MI, up_MI, inner, kept, down, kept_down, gs_down, dtype, ctx.gelu
            )
        else:
            again = d_product_MI if need_a[-1] and product_MI is None else None
            d_gate_MI, d_up_MI = _launch_backward(d_product_MI, gate_MI, up_MI, ctx.gelu, out=again)
            grads, d_b = [d_gate_MI] if up_MI is None else [d_gate_MI, d_up_MI], []
            product_MI = again if product_MI is None else product_MI
            (d_a_down,) = core.a_gradients(product_MI, [down], kept_down, gs_down, [grad_MH], need_a[-1:], None, dtype)
            del again
        del d_product_MI, product_MI

        need_b_apart = [need and not ctx.inside for need in need_b[:-1]]
        d_x, d_b_apart, gs = core.input_and_b_gradients(
            inner, kept, grads, ctx.needs_input_grad[0], need_b_apart, dtype
        )
        d_a = core.a_gradients(x_MH, inner, kept, gs, grads, need_a[:-1], d_x, dtype)
        d_bias = core.bias_gradients([*inner, down], [*grads, grad_MH], need_bias)
        if d_x is not None:
            d_x = d_x.view(ctx.x_shape).to(ctx.x_dtype)
        d_layers = gradients_of(d_bias, [*d_a, d_a_down], [*(d_b or d_b_apart), *d_b_down])
        return d_x, None, None, None, None, None, *d_layers


# -- the adapters' products inside the activation's kernels ----------------------------------------------------------


def _drop_product(gate_MI: Tensor, up_MI: Tensor | None, down: LoraOperands) -> Dropped | None:
    """What dropout lets through of the product, which is yet to be made; None without dropout."""
    if not down.dropout:
        return None
    drawn_on = torch.empty_like(
        _halves(gate_MI, up_MI)[0], dtype=down.dropout_dtype, memory_format=torch.contiguous_format
    )
    return Dropped(core.draw_mask(drawn_on, down), core.missing_factor(down))


def _inner_factors(
    inner: Sequence[LoraOperands], kept: Sequence[core.Kept], dtype: torch.dtype
) -> tuple[Factors | None, Factors | None]:
    """What completes gate and up. A joint projection's B (2I, R) has both halves, which read the same h."""
    hs_MR = core.by_layer(inner, [k.h_NR for k in kept])
    factors = [
        None if h is None else Factors(h, core.b_matrix(layer, dtype).contiguous(), layer.scale)
        for layer, h in zip(inner, hs_MR, strict=True)
    ]
    if len(factors) == 2:
        return factors[0], factors[1]
    (joint,) = factors
    if joint is None:
        return None, None
    first, second = joint.right.chunk(2)
    return joint._replace(right=first), joint._replace(right=second)


def _gradients_inside(
    d_product_MI: Tensor,
    gate_MI: Tensor,
    up_MI: Tensor | None,
    inner: Sequence[LoraOperands],
    kept: Sequence[core.Kept],
    down: LoraOperands,
    kept_down: Sequence[core.Kept],
    gs_down: Sequence[Tensor],
    dtype: torch.dtype,
    gelu: bool,
) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:
    """Gradients of the inner outputs, of the inner B's, and of down's A. Overwrites `d_product_MI`."""
    below, dropped = None, None
    if down.a is not None:
        below = Factors(gs_down[0], down.a.to(dtype).contiguous())
        mask = kept_down[0].mask_NI
        dropped = None if mask is None else Dropped(mask, core.missing_factor(down))
    # Every element of it is read before that of gate's gradient is written.
    grads = [torch.empty_like(gate_MI)] if up_MI is None else [d_product_MI, torch.empty_like(up_MI)]
    halves = _halves(grads[0], None if up_MI is None else grads[1])
    factors = _inner_factors(inner, kept, dtype)
    d_bs, d_a = _lora_gated.backward(d_product_MI, *_halves(gate_MI, up_MI), factors, below, gelu, *halves, dropped)
    found = [d for d in d_bs if d is not None]
    by_layer = list(d_bs) if up_MI is not None else [torch.cat(found) if found else None]
    d_b = [None if d is None else d.to(layer.b.dtype) for d, layer in zip(by_layer, inner, strict=True)]  # type: ignore[union-attr]
    return grads, d_b, None if d_a is None else d_a.to(down.a.dtype)  # type: ignore[union-attr]
