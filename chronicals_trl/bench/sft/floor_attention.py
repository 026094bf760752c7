"""Attention of the floor: by the back end that our model gets here, through the function that transformers calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chronicals_trl.bench.sft.cases import Shape
from chronicals_trl.bench.sft.floor_batch import Batch
from chronicals_trl.bench.sft.floor_layer import Attend

__all__ = ["attend_by", "chosen_backend"]


def chosen_backend(shape: Shape, chronicals: dict[str, Any], device: torch.device) -> str:
    """What `patch_model` chooses for a model of this shape, verified by number as there.

    Raises:
        RuntimeError: The attention part is off, with the reason.
    """
    from chronicals_trl.bench.sft.models import make_model
    from chronicals_trl.config import ChronicalsConfig
    from chronicals_trl.model.attention_choice import choose_backend

    config = ChronicalsConfig.resolve(chronicals)
    small = replace(shape, layers=1, vocab=512, intermediate=64)  # heads decide, and nothing else of the model
    backend, reason = choose_backend(make_model(small, 0), config.attention_backend, device)
    if backend is None or config.attention == "off":
        raise RuntimeError(f"no attention back end of ours: {reason or 'attention=off in the configuration'}")
    return backend


def attend_by(backend: str, shape: Shape, batch: Batch, device: torch.device) -> Attend:
    """Attention within the documents of `batch`."""
    from chronicals_trl.model.attention import FORWARDS
    from chronicals_trl.model.attention_backends import BACKENDS
    from chronicals_trl.model.attention_rows import block_diagonal_mask

    cu_seqlens = torch.tensor(batch.cu_seqlens, dtype=torch.int32, device=device)
    block: Any = nn.Module()  # what transformers' SDPA reads off an attention block
    block.num_key_value_groups = shape.heads // shape.kv_heads
    block.is_causal = True
    if backend in BACKENDS:
        mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
    else:
        mask = block_diagonal_mask(cu_seqlens, batch.tokens, None)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = FORWARDS[backend](
            block, q, k, v, mask, scaling=shape.head_dim**-0.5, cu_seq_lens_q=cu_seqlens,
            max_length_q=batch.max_seqlen,
        )[0]  # fmt: skip
        return out

    return attend
