"""What `bench attention` times: attention within the documents of one packed row, forward and backward in bf16.

**Data.** Normal q, k and v, strided as transformers' models give them: (1, H, T, D) over a buffer (1, T, H, D). The
lengths of the documents are lognormal (median 270, sigma 0.95, at most 2,048) and fill the row; the last is cut.
`max_seqlen` is the longest, for all sides. A case may have empty documents at the end: a cu_seqlens whose shape does
not depend on the data has as many as it takes, and every one costs thread blocks that find nothing to do.

**Sides.**

    ours_fa4       flash-attn-4 through the function that transformers calls in each layer, as the patched model has it
    ours_varlen    the same with torch's varlen kernel
    ours_sdpa      the same without a varlen kernel: transformers' SDPA with the block-diagonal mask, which is there
                   already, as it is made once for all layers
    fa4            flash_attn.cute.interface.flash_attn_varlen_func, called directly
    varlen         torch.nn.attention.varlen.varlen_attn, called directly
    flex           flex_attention under torch.compile, with a block mask that is there already

Legend: T tokens, H heads, D head dimension, N documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chronicals_trl.bench.common import NotOffered
from chronicals_trl.bench.timing import BufferSet
from chronicals_trl.model.attention import FORWARDS
from chronicals_trl.model.attention_backends import BACKENDS, unavailable
from chronicals_trl.model.attention_rows import block_diagonal_mask, document_ids

__all__ = [
    "DIRECT",
    "NOT_ON_CPU",
    "SHAPES",
    "SIDES",
    "Documents",
    "Shape",
    "load_side",
    "make_buffers",
    "make_documents",
]

#: q (1, Hq, T, D), k and v (1, Hk, T, D) to (1, T, Hq, D).
Call = Callable[[Tensor, Tensor, Tensor], Tensor]

MEDIAN, SIGMA, LONGEST = 270.0, 0.95, 2048
#: A draw whose median is near that of the distribution, and whose longest document is as long as it may be.
LENGTHS_SEED = 8


@dataclass(frozen=True)
class Shape:
    """One model's attention: tokens in the row, query heads, key-value heads, head dimension."""

    name: str
    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int

    @property
    def bytes(self) -> int:
        """What the forward pass has to move in bf16: q, k, v and the output."""
        return 2 * self.tokens * self.head_dim * 2 * (self.q_heads + self.kv_heads)


SHAPES: dict[str, Shape] = {
    shape.name: shape for shape in (Shape("qwen2.5-0.5b", 16384, 14, 2, 64), Shape("llama-3-8b", 8192, 32, 8, 128))
}


@dataclass(frozen=True)
class Documents:
    """Where the documents of the row lie.

    Args:
        lengths: In tokens; the empty ones at the end are not among them.
        cu_seqlens: (N+1,) int32, with the empty ones.
        position_ids: (1, T), from 0 in each document.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    position_ids: Tensor

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)


def make_documents(tokens: int, empty: int, device: torch.device) -> Documents:
    """Lengths from a fixed seed; see the module's text."""
    generator = torch.Generator().manual_seed(LENGTHS_SEED)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = torch.empty(()).log_normal_(0.0, SIGMA, generator=generator) * MEDIAN
        lengths.append(min(max(2, round(float(drawn))), LONGEST, tokens - sum(lengths)))
    offsets = torch.tensor([0, *lengths, *[0] * empty]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return Documents(tuple(lengths), offsets.to(device), positions.to(device))


def make_buffers(shape: Shape, dtype: torch.dtype, device: torch.device) -> BufferSet:
    """q, k, v that are differentiated, and the gradient of the output, from a fixed seed."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(heads: int) -> Tensor:
        values = torch.randn(1, shape.tokens, heads, shape.head_dim, generator=generator, device=device)
        return values.to(dtype)

    args = tuple(normal(h).transpose(1, 2).requires_grad_() for h in (shape.q_heads, shape.kv_heads, shape.kv_heads))
    return BufferSet(args, (normal(shape.q_heads),))


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    """(1, H, T, D) to (T, H, D)."""
    return [x.transpose(1, 2).squeeze(0) for x in tensors]


# -- the sides, imported when they are asked for ----------------------------------------------------------------------


def _ours(backend: str) -> Callable[[Documents], Call]:
    def make(documents: Documents) -> Call:
        device = documents.cu_seqlens.device
        if backend in BACKENDS:
            reason = unavailable(BACKENDS[backend], device)
            if reason is not None:
                raise NotOffered(reason)
            mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
        else:
            mask = block_diagonal_mask(documents.cu_seqlens, documents.position_ids.shape[1])
        module = nn.Module()  # what transformers' SDPA reads off an attention block
        module.is_causal = True  # type: ignore[assignment]
        keys = {
            "position_ids": documents.position_ids, "cu_seq_lens_q": documents.cu_seqlens,
            "cu_seq_lens_k": documents.cu_seqlens, "max_length_q": documents.max_seqlen,
            "max_length_k": documents.max_seqlen,
        }  # fmt: skip

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            module.num_key_value_groups = q.shape[1] // k.shape[1]  # type: ignore[assignment]
            return FORWARDS[backend](module, q, k, v, mask, dropout=0.0, scaling=q.shape[-1] ** -0.5, **keys)[0]

        return call

    return make


def _fa4(documents: Documents) -> Call:
    from flash_attn.cute.interface import flash_attn_varlen_func

    offsets, longest = documents.cu_seqlens, documents.max_seqlen

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_varlen_func(
            *_tokens_first(q, k, v), cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest,
            max_seqlen_k=longest, causal=True,
        )  # fmt: skip
        out_THD: Tensor = out[0] if isinstance(out, tuple) else out
        return out_THD.unsqueeze(0)

    return call


def _varlen(documents: Documents) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = documents.cu_seqlens, documents.max_seqlen
    # From torch 2.12 on; before, fewer key-value heads are simply taken.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_THD, k_THD, v_THD = _tokens_first(q, k, v)
        out: Any = varlen_attn(q_THD, k_THD, v_THD, offsets, offsets, longest, longest, window_size=(-1, 0), **grouped)
        out_THD: Tensor = out
        return out_THD.unsqueeze(0)

    return call


def _flex(documents: Documents) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = documents.position_ids.shape[1]
    of = document_ids(documents.cu_seqlens, tokens)
    mask = create_block_mask(
        lambda b, h, i, j: (i >= j) & (of[i] == of[j]), None, None, tokens, tokens, device=of.device
    )
    torch.compiler.reset()  # nothing of the last shape may make it fall back to dynamic shapes
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


SIDES: dict[str, Callable[[Documents], Call]] = {
    "ours_fa4": _ours("fa4"),
    "fa4": _fa4,
    "ours_varlen": _ours("varlen"),
    "varlen": _varlen,
    "ours_sdpa": _ours("blockwise"),
    "flex": _flex,
}

#: Our side to the same kernel called directly.
DIRECT = {"ours_fa4": "fa4", "ours_varlen": "varlen"}
NOT_ON_CPU = ("ours_fa4", "fa4", "ours_varlen", "varlen", "flex")
#: Sides whose work does not depend on how many documents are empty.
WITHOUT_OFFSETS = ("ours_sdpa", "flex")


def load_side(side: str, documents: Documents) -> Call:
    """The call of one side. Raises `NotOffered`, or what importing or compiling it raises."""
    return SIDES[side](documents)
