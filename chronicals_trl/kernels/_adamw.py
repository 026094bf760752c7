"""AdamW of many tensors in one launch, with the clipping of their gradients inside.

The update is Loshchilov and Hutter's, "Decoupled Weight Decay Regularization", 2019, https://arxiv.org/abs/1711.05101,
with the roundings of `torch.optim.AdamW(fused=True)`: in float32, and once to what is kept. A gradient that is clipped
is multiplied and rounded as `torch.nn.utils.clip_grad_norm_` would leave it, but read alone, and never written.

Each tensor is cut into chunks, a program each. What differs from tensor to tensor is read from a table on the device,
since a launch cannot take hundreds of pointers.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._common import HAS_TRITON, LAUNCHES, Launch, jit, math_dtype, tl, use_triton

# Elements of a step, steps of a program, and its warps (H100: docs/results/adamw_h100.txt).
_BLOCK, _STEPS, _WARPS = 1024, 2, 4

_ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16} if HAS_TRITON else {}


@jit
def _adamw_kernel(
    table_ptr, chunk_ptr, clip_ptr, lr, decay, beta1, beta2, log_beta1, log_beta2, eps,
    n_tensors, DTYPE: tl.constexpr, CLIPS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Table, int64 (6, tensors): addresses of parameter, gradient, both moments and step, and the number of elements.

    Chunks, int32 (chunks, 2): of each its tensor, and which of the tensor's chunks it is.
    """
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunk_ptr + 2 * chunk)
    start = tl.load(chunk_ptr + 2 * chunk + 1).to(tl.int64) * (BLOCK * STEPS)
    pointer: tl.constexpr = tl.pointer_type(DTYPE)
    p_ptr = tl.load(table_ptr + tensor).to(pointer)
    g_ptr = tl.load(table_ptr + n_tensors + tensor).to(pointer)
    m_ptr = tl.load(table_ptr + 2 * n_tensors + tensor).to(pointer)
    v_ptr = tl.load(table_ptr + 3 * n_tensors + tensor).to(pointer)
    step = tl.load(tl.load(table_ptr + 4 * n_tensors + tensor).to(tl.pointer_type(tl.float32))).to(tl.float64)
    n = tl.load(table_ptr + 5 * n_tensors + tensor)
    if ALIGNED:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)
    clip = tl.load(clip_ptr).to(tl.float32) if CLIPS else 1.0
    # In float64: of 1 - beta^step few digits would be left in the first steps.
    correction1 = (1.0 - tl.exp(step * log_beta1)).to(tl.float32)
    correction2 = tl.sqrt_rn((1.0 - tl.exp(step * log_beta2)).to(tl.float32))
    size = tl.div_rn(tl.cast(lr, tl.float32), correction1)
    for i in range(STEPS):
        at = start + i * BLOCK + tl.arange(0, BLOCK)
        if start + (i + 1) * BLOCK <= n:  # a mask would make narrow loads of wide ones
            _update(p_ptr + at, g_ptr + at, m_ptr + at, v_ptr + at, None, clip, decay, beta1, beta2, eps, size,
                    correction2, CLIPS)  # fmt: skip
        elif start + i * BLOCK < n:
            _update(p_ptr + at, g_ptr + at, m_ptr + at, v_ptr + at, at < n, clip, decay, beta1, beta2, eps, size,
                    correction2, CLIPS)  # fmt: skip


@jit
def _update(p_ptr, g_ptr, m_ptr, v_ptr, mask, clip, decay, beta1, beta2, eps, size, correction2, CLIPS: tl.constexpr):
    kept = p_ptr.dtype.element_ty
    p = tl.load(p_ptr, mask=mask).to(tl.float32)
    g = tl.load(g_ptr, mask=mask).to(tl.float32)
    m = tl.load(m_ptr, mask=mask).to(tl.float32)
    v = tl.load(v_ptr, mask=mask).to(tl.float32)
    if CLIPS:
        g = (g * clip).to(kept).to(tl.float32)
    p = tl.fma(p, -decay, p)
    m = tl.fma(m, beta1, tl.fma(g, -beta1, g))
    v = tl.fma(v, beta2, tl.fma(g * g, -beta2, g * g))
    p -= tl.div_rn(size * m, tl.div_rn(tl.sqrt_rn(v), correction2) + eps)
    tl.store(p_ptr, p.to(kept), mask=mask)
    tl.store(m_ptr, m.to(kept), mask=mask)
    tl.store(v_ptr, v.to(kept), mask=mask)


class AdamWUpdate:
    """AdamW on one list of tensors, step after step; the table is sent anew only when an address has changed."""

    def __init__(self) -> None:
        self._addresses: list[list[int]] = []
        self._aligned = False  # all of them, to what the widest loads want
        self._table: Tensor | None = None  # (6, tensors)
        self._chunks: Tensor | None = None  # (chunks, 2)
        self._sizes: list[int] = []
        self._launches: dict[tuple[Any, ...], Launch] = {}  # of these sizes, by dtypes and alignment

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip: Tensor | None = None,
    ) -> None:
        """One update, in place; the gradients stay as they are.

        Args:
            params, grads, exp_avgs, exp_avg_sqs: as many of each, at least one; those of one parameter contiguous and
                of the same size, all of one floating dtype, on one device.
            steps: float32 scalars there: how many updates there have been, this one included.
            clip: a scalar there that each gradient is multiplied by, the product rounded to its dtype; None for 1.
        """
        lists = (params, grads, exp_avgs, exp_avg_sqs, steps)
        if not use_triton(params[0]):
            _reference(*lists, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip=clip)
            return
        self._send(*lists)
        kind = params[0].dtype, None if clip is None else clip.dtype, self._aligned
        launch = self._launches.get(kind)
        if launch is None:
            assert self._table is not None and self._chunks is not None
            launch = self._launches[kind] = Launch(
                _adamw_kernel, self._chunks.shape[0], len(params), _ELEMENTS[params[0].dtype], clip is not None,
                self._aligned, _BLOCK, _STEPS, num_warps=_WARPS,
            )  # fmt: skip
        LAUNCHES["adamw"] += 1
        beta1, beta2 = betas
        launch(
            (self._table, self._chunks, clip),
            float(lr), float(lr * weight_decay), float(beta1), float(beta2), _log(beta1), _log(beta2), float(eps),
        )  # fmt: skip

    def _send(self, *lists: Sequence[Tensor]) -> None:
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
        sizes = [tensor.numel() for tensor in lists[0]]
        if addresses == self._addresses and sizes == self._sizes:
            return
        device = lists[0][0].device
        if sizes != self._sizes:
            n_chunks = -(-torch.tensor(sizes) // (_BLOCK * _STEPS))
            tensor = torch.repeat_interleave(torch.arange(len(sizes)), n_chunks)
            first = torch.repeat_interleave(n_chunks.cumsum(0) - n_chunks, n_chunks)
            chunks = torch.stack([tensor, torch.arange(len(tensor)) - first], 1).int()
            self._chunks = _to(device, chunks)
            self._launches.clear()
        self._table = _to(device, torch.tensor([*addresses, sizes]))
        self._addresses, self._sizes = addresses, sizes
        self._aligned = not any(address % 16 for row in addresses[:4] for address in row)


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy there that does not wait for what is queued."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@lru_cache
def _log(beta: float) -> float:
    """Of beta in float32, with which the moments are summed: its rounding would be 1.3e-5 of 1 - 0.999."""
    beta = ctypes.c_float(beta).value
    return math.log(beta) if beta > 0 else -math.inf


@torch.no_grad()
def _reference(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    clip: Tensor | None,
) -> None:  # fmt: skip
    """The same in torch code, for any device and floating dtype."""
    beta1, beta2 = betas
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        compute = math_dtype(param.dtype)
        p, g, m, v = (t.to(compute) for t in (param, grad, exp_avg, exp_avg_sq))
        if clip is not None:
            g = (g * clip).to(grad.dtype).to(compute)
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        corrections = [1 - beta ** step.double() for beta in betas]
        denominator = (v / corrections[1].to(compute)).sqrt() + eps
        param.copy_(p * (1 - lr * weight_decay) - lr / corrections[0].to(compute) * m / denominator)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
