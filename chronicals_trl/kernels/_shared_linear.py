"""Linear layers that read the same input (q, k and v; gate and up), as one autograd node.

Apart, each layer's backward pass makes an input gradient of its own and autograd adds them up, which reads and writes
every one of them once more. Here each GEMM after the first adds into the buffer of the first. Nothing else differs:
the weights stay parameters of their own, and the input and the weights are all that is kept.

Legend: M tokens, H input width, N output width of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MH: torch.Tensor, count: int, *tensors: torch.Tensor | None) -> Any:
        weights, biases = tensors[:count], tensors[count:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_MH, *weights)
        ctx.count = count
        return tuple(F.linear(x_MH, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads_MN: torch.Tensor | None) -> Any:
        x_MH, *weights_NH = ctx.saved_tensors
        need_x, _, *need = ctx.needs_input_grad
        d_x: torch.Tensor | None = None
        d_weights: list[torch.Tensor | None] = []
        d_biases: list[torch.Tensor | None] = []
        for i, (grad_MN, weight_NH) in enumerate(zip(grads_MN, weights_NH, strict=True)):
            if grad_MN is None:  # nobody used this layer's output
                d_weights.append(None)
                d_biases.append(None)
                continue
            if need_x:
                d_x = grad_MN @ weight_NH if d_x is None else d_x.addmm_(grad_MN, weight_NH)
            d_weights.append(grad_MN.t() @ x_MH if need[i] else None)
            d_biases.append(grad_MN.sum(0) if need[ctx.count + i] else None)
        return d_x, None, *d_weights, *d_biases


def shared_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """``F.linear(x, w, b)`` for each of `weights` and `biases`, with the input gradient summed inside the GEMMs.

    Under autocast the GEMMs run in the autocast dtype, as `torch.nn.functional.linear` does.

    Args:
        x: (..., H).
        weights: each (N_i, H), in x's dtype.
        biases: each (N_i,) or None, as many as `weights`.

    Returns:
        One (..., N_i) for each weight.

    Raises:
        ValueError: not as many biases as weights.
    """
    if len(weights) != len(biases):
        raise ValueError(f"shared_linear: {len(weights)} weights and {len(biases)} biases; give None for no bias.")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
        biases = [None if b is None else b.to(dtype) for b in biases]
    outputs = _SharedLinear.apply(x.reshape(-1, x.shape[-1]), len(weights), *weights, *biases)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outputs)
