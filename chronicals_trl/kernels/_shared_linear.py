"""Linear layers that read the same input (q, k and v; gate and up), as one autograd node.

Apart, each layer's backward pass makes an input gradient of its own and autograd adds them up, which reads and writes
every one of them once more. Here each GEMM after the first adds into the buffer of the first. The weights stay
parameters of their own, and the input and the weights are all that is kept.

Legend: M tokens, H input width, N output width of one layer.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import _gradient_memory
from ._common import (
    LAUNCHES,
    MAX_LAUNCHES,
    Launch,
    autocast_dtype,
    autocast_off,
    jit,
    multiprocessors,
    tl,
    triton,
    use_triton,
)
from ._rms_norm import sum_shares

_BLOCK_R, _BLOCK_C, _WARPS, _PROGRAMS = 64, 64, 4, 2  # chosen on an H100; programs for each multiprocessor


@jit
def _column_sums_kernel(
    x_ptr, share_ptr, n_rows, n_cols, stride, n_shares, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    blocks = tl.cdiv(n_cols, BLOCK_C)
    share = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for tile in tl.range(share, tl.cdiv(n_rows, BLOCK_R), n_shares, num_stages=3):
        row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
        total += tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    at = tl.cast(share, tl.int64) * n_cols + col
    tl.store(share_ptr + at, tl.sum(total, axis=0), mask=col < n_cols)


@lru_cache(MAX_LAUNCHES)
def _column_sums_launch(
    n_rows: int, n_cols: int, stride: int, device: torch.device, dtype: torch.dtype
) -> tuple[Launch, int]:
    blocks = triton.cdiv(n_cols, _BLOCK_C)
    n_shares = max(1, min(triton.cdiv(n_rows, _BLOCK_R), _PROGRAMS * multiprocessors(device) // blocks))
    fixed = (n_rows, n_cols, stride, n_shares, _BLOCK_R, _BLOCK_C)
    return Launch(_column_sums_kernel, n_shares * blocks, *fixed, num_warps=_WARPS), n_shares


def column_sums(x: torch.Tensor) -> torch.Tensor:
    """``x.sum(0)`` of a matrix (M, N) in its own dtype, summed in float32 and always in the same order.

    A bias's gradient. In a training step torch's own reductions for q, k and v take 1.93 ms, these 0.65 ms
    (docs/results/profile_step_h100.json, with and without the q/k/v node; aten::sum with its memsets).
    """
    # A compiler fuses the sum itself, and cannot trace the launch.
    if torch.compiler.is_compiling() or not use_triton(x) or x.numel() == 0 or x.stride(-1) != 1:
        return x.sum(0)
    launch, n_shares = _column_sums_launch(*x.shape, x.stride(0), x.device, x.dtype)
    shares = torch.empty(n_shares, x.shape[1], device=x.device, dtype=torch.float32)
    LAUNCHES["column_sums"] += 1
    launch((x, shares))
    return sum_shares(shares, torch.empty(x.shape[1], device=x.device, dtype=x.dtype))


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MH: torch.Tensor, count: int, *tensors: torch.Tensor | None) -> Any:
        weights, biases = tensors[:count], tensors[count:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_MH, *weights)
        ctx.count = count
        return tuple(F.linear(x_MH, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_MN: torch.Tensor | None) -> Any:
        x_MH, *weights_NH = ctx.saved_tensors
        need_x, _, *need = ctx.needs_input_grad
        d_x: torch.Tensor | None = None
        d_weights: list[torch.Tensor | None] = []
        d_biases: list[torch.Tensor | None] = []
        with autocast_off(x_MH.device.type):
            for i, (grad_MN, weight_NH) in enumerate(zip(grads_MN, weights_NH, strict=True)):
                if grad_MN is None:  # nobody used this layer's output
                    d_weights.append(None)
                    d_biases.append(None)
                    continue
                if need_x:
                    d_x = grad_MN @ weight_NH if d_x is None else d_x.addmm_(grad_MN, weight_NH)
                d_weights.append(_gradient_memory.product(grad_MN.t(), x_MH, weight_NH) if need[i] else None)
                d_biases.append(column_sums(grad_MN) if need[ctx.count + i] else None)
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
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
        biases = [None if b is None else b.to(dtype) for b in biases]
    outputs = _SharedLinear.apply(x.reshape(-1, x.shape[-1]), len(weights), *weights, *biases)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outputs)
