"""flash-attn-4's two functions in plain torch: same arguments, same layouts, document by document, on any device.

With them in its place everything around the kernel runs on a CPU: the op, its gradient, its fakes, and what
transformers, checkpointing and torch.compile make of it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chronicals_trl.model import attention_backends, attention_choice, attention_fa4

#: The function that looks for the package, which `install` replaces.
PACKAGE = attention_fa4.package
#: Of the kernels; the forward kernel is also called without its function.
CALLS: Counter[str] = Counter()
CALLS_OF_THE_FUNCTION: Counter[str] = Counter()
LAST: dict[str, Any] = {}


def _weights(
    q_HSD: Tensor, k_HSD: Tensor, scale: float, window: int | None, softcap: float
) -> tuple[Tensor, Tensor | float]:
    """Attention weights of one document (H, S, S), and the derivative of the capped logits by the plain ones."""
    scores = q_HSD @ k_HSD.transpose(1, 2) * scale
    slope: Tensor | float = 1.0
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap) ** 2
    length = q_HSD.shape[1]
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    visible = (j <= i) & (i - j < (window or length))
    return scores.masked_fill(~visible, -torch.inf).softmax(-1), slope


def _documents(cu_seqlens: Tensor) -> list[slice]:
    offsets = cu_seqlens.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(offsets) if start < end]


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None, softcap: float
) -> Tensor:
    """q (T, Hq, D), k and v (T, Hk, D) -> (T, Hq, D); rows that no document covers hold NaN."""
    dtype, groups = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = (x.float() if dtype in attention_backends.HALF else x for x in (q, k, v))  # as kernels do
    parts, covered = [], 0
    for document in _documents(cu_seqlens):
        q_HSD, k_HSD, v_HSD = (x[document].transpose(0, 1) for x in (q, k, v))
        k_HSD, v_HSD = (x.repeat_interleave(groups, dim=0) for x in (k_HSD, v_HSD))
        weights, _ = _weights(q_HSD, k_HSD, scale, window, softcap)
        parts.append((weights @ v_HSD).transpose(0, 1))
        covered += parts[-1].shape[0]
    return torch.cat([*parts, q.new_full((q.shape[0] - covered, *q.shape[1:]), float("nan"))]).to(dtype)


def forward(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, softcap,
    window_size_left, window_size_right, return_lse,
):  # fmt: skip
    assert causal and return_lse and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    assert window_size_right == (None if window_size_left is None else 0)
    CALLS_OF_THE_FUNCTION["forward"] += 1
    key = (q.dtype, q.shape[1:], k.shape[1:], window_size_left is None, softcap)
    if key not in forward.compile_cache:
        forward.compile_cache[key] = kernel
    out = torch.empty(q.shape).to(q)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    longest = (max_seqlen_q, max_seqlen_k)
    forward.compile_cache[key](
        q.detach(), k.detach(), v.detach(), out.detach(), lse, softmax_scale, cu_seqlens_q, cu_seqlens_k, None,
        window_size_left, softcap, max(longest), (None, None),
    )  # fmt: skip
    return out, lse, None, None, None


forward.compile_cache = {}


def kernel(q, k, v, out, lse, scale, cu_seqlens_q, cu_seqlens_k, page_table, left, softcap, max_seqlen, aux):
    """What is compiled, and called again without `forward` once it is known how."""
    CALLS["forward"] += 1
    assert not any(x.requires_grad for x in (q, k, v, out, lse)), "cannot be handed to the kernel"
    assert max_seqlen >= int(cu_seqlens_q.diff().max())
    out.copy_(attend(q, k, v, cu_seqlens_q, scale, None if left is None else left + 1, softcap))
    lse.zero_()


def backward(
    q, k, v, out, dout, lse, softmax_scale, causal, softcap, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, window_size_left, window_size_right, deterministic, dq, dk, dv,
):  # fmt: skip
    CALLS["backward"] += 1
    LAST["deterministic"] = deterministic
    assert lse.shape == (q.shape[1], q.shape[0]) and out.shape == dout.shape == q.shape
    window = None if window_size_left is None else window_size_left + 1
    q, k, v, dout = (x.float() if x.dtype in attention_backends.HALF else x for x in (q, k, v, dout))
    groups = q.shape[1] // k.shape[1]
    for document in _documents(cu_seqlens_q):
        q_HSD, dout_HSD, k_HSD, v_HSD = (x[document].transpose(0, 1) for x in (q, dout, k, v))
        k_HSD, v_HSD = (x.repeat_interleave(groups, dim=0) for x in (k_HSD, v_HSD))
        weights, slope = _weights(q_HSD, k_HSD, softmax_scale, window, softcap)
        d_weights = dout_HSD @ v_HSD.transpose(1, 2)
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * slope * softmax_scale
        dq[document] = (d_scores @ k_HSD).transpose(0, 1)
        for target, gradient in ((dk, d_scores.transpose(1, 2) @ q_HSD), (dv, weights.transpose(1, 2) @ dout_HSD)):
            target[document] = gradient.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return dq, dk, dv


def install(monkeypatch: pytest.MonkeyPatch, forward=forward, backward=backward) -> None:
    """Let "flash_attn_4" be found, in fp32 and on the CPU."""
    CALLS.clear()
    CALLS_OF_THE_FUNCTION.clear()
    monkeypatch.setattr(attention_fa4, "package", lambda: (forward, backward))
    monkeypatch.setattr(attention_fa4, "_replays", {})
    allow_fp32(monkeypatch, "fa4")
    monkeypatch.setattr(attention_choice, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(attention_choice, "_varlen_is_out", lambda model, device: None)
    monkeypatch.setattr(attention_choice, "_verified", {})


def allow_fp32(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    dtypes = (torch.float32, *attention_backends.HALF)
    backend = replace(attention_backends.BACKENDS[name], dtypes=dtypes, device_type="cpu")
    monkeypatch.setitem(attention_backends.BACKENDS, name, backend)
