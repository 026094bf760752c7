"""torch's varlen attention as an attention function of transformers: what the best tuned peer runs packed rows with.

Stock transformers has flash-attn by package and SDPA, whose mask of a packed row is dense. A user can register this in
a dozen lines, so the peer gets it, with nothing of ours in it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAME", "register"]

NAME = "bench_varlen"


def register() -> str:
    """Make NAME an attention implementation; returns it.

    No mask function goes with it: then transformers builds no mask and does not look for documents in the position
    ids, which would wait for the GPU. A padded batch would lose its mask by that; the function refuses it.
    """
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    # From torch 2.12 on; before, fewer key-value heads are simply taken.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
            raise ValueError(f"{NAME} takes one packed row with cu_seq_lens_q and max_length_q")
        device = query.device.type
        if query.dtype is torch.float32 and torch.is_autocast_enabled(device):  # a custom op takes no part in it
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))
        out: Any = varlen_attn(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0),
            **grouped,
        )  # fmt: skip
        return out[None], None

    AttentionInterface.register(NAME, forward)
    return NAME
