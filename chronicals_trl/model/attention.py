"""Packed and padded attention: documents that share a row, or a batch, attend to themselves alone, on every device.

One attention function per back end, registered under a name of its own with transformers' AttentionInterface *and*
AttentionMaskInterface (a name unknown to the second drops padding masks in silence). Registering adds names; nothing
that exists changes. A model is switched by `config._attn_implementation`, on a copy of its configuration, so that a
second model that was built from the same configuration object is not touched.

What transformers takes for a mask and hands to each layer is, for a varlen back end, one of
    an empty tensor            a packed row; its documents are in `cu_seq_lens_q`
    int32 (N+1, 1, 1, 1)       cumulative lengths over all rows: whole rows, or padded ones (see `use_padding`)
    a boolean mask, or None    anything else (a cache, a user's own mask): torch's scaled_dot_product_attention

Legend: B batch, H heads, S sequence, D head dimension, N documents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chronicals_trl.model.attention_backends import BACKENDS
from chronicals_trl.model.attention_rows import (
    block_diagonal_mask,
    cu_seqlens_of_padding,
    cu_seqlens_of_positions,
    cu_seqlens_of_rows,
)
from chronicals_trl.model.match import CACHE_NAMES

__all__ = [
    "FORWARDS",
    "capped_attention",
    "register_implementations",
    "restore_attention",
    "use_backend",
    "use_padding",
]

# The names must hold neither "flash" nor "sdpa": transformers looks for those words and takes paths of its own.
IMPLEMENTATION_PREFIX = "chronicals_"
PADDED_SUFFIX = "_padded"

_CONFIGS = "_chronicals_configs"


# -- the functions that transformers calls ---------------------------------------------------------------------------


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the autocast dtype: custom ops do not take part in autocast as SDPA does."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with logits capped at ±`softcap` (Gemma 2), in plain torch, for what no kernel takes.

    Args:
        query, key, value: (B, Hq, S, D), (B, Hk, L, D) twice.
        mask: boolean (B, 1, S, L), or None: causal, or everything for a single query.

    Returns:
        (B, S, Hq, D).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    length = query.shape[2]
    if mask is None and length > 1:
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # not -inf: a row may be masked as a whole
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous()


def _masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """What no varlen kernel takes: a cache, a user's own mask, the CPU, fp32, attention dropout."""
    if softcap is not None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return capped_attention(query, key, value, mask, scale=scale, softcap=softcap, dropout=dropout), None
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _attention_forward(
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: q (B, Hq, S, D), k and v (B, Hk, S, D) -> ((B, S, Hq, D), None)."""
    batch, _, length, _ = query.shape
    cu_seqlens: Tensor | None = None
    max_seqlen = length
    of_rows = attention_mask is not None and attention_mask.dtype is torch.int32
    if of_rows:
        assert attention_mask is not None
        cu_seqlens = attention_mask.view(-1)
    # transformers looks for documents only while there is no cache; `cu_seq_lens_q` says that there are some.
    unmasked = attention_mask is None or (of_rows and attention_mask.shape[0] == batch + 1)
    told = unmasked and cu_seq_lens_q is not None and batch == 1 and length == key.shape[2] > 1
    if told or (attention_mask is not None and attention_mask.numel() == 0):  # by `_varlen_mask`
        if cu_seq_lens_q is not None:
            cu_seqlens, max_seqlen = cu_seq_lens_q, max_length_q or length
        elif position_ids is not None:
            cu_seqlens = cu_seqlens_of_positions(position_ids)
        else:
            raise ValueError("A packed row reached the attention without `cu_seq_lens_q` and without `position_ids`.")
    if cu_seqlens is None:
        return _masked_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, kwargs)
    kernel = BACKENDS.get(backend)
    if kernel is not None and dropout == 0.0 and kwargs.get("position_bias") is None:
        q, k, v = _autocast(query, key, value)
        if q.dtype in kernel.dtypes and q.device.type == kernel.device_type:
            if cu_seqlens.dtype is not torch.int32:
                cu_seqlens = cu_seqlens.to(torch.int32)
            scale = scaling if scaling is not None else q.shape[-1] ** -0.5
            return kernel.call(q, k, v, cu_seqlens, max_seqlen, scale, sliding_window, softcap or 0.0), None
    mask = block_diagonal_mask(cu_seqlens, length, sliding_window, rows=batch)
    return _masked_attention(module, query, key, value, mask, dropout, scaling, softcap, kwargs)


def _forward_of(backend: str) -> Callable[..., tuple[Tensor, None]]:
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return _attention_forward(backend, module, *args, **kwargs)

    forward.__name__ = f"{backend}_forward"
    return forward


#: Back end to the function that transformers calls; "blockwise" is torch's own attention with a mask.
FORWARDS = {backend: _forward_of(backend) for backend in (*BACKENDS, "blockwise")}


# -- the masks that transformers asks for ----------------------------------------------------------------------------


def _varlen_mask(
    trusted: bool,
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """See the module's text. Without gradients, as in generation, rows keep the mask that SDPA takes.

    transformers forbids the causal short cut when it finds position ids that restart, and uses vmap for masks that
    its caller has altered; those are real masks and have to be built.

    Args:
        trusted: padding masks are such by construction: see `use_padding`.
    """
    offset = kwargs.get("q_offset", 0)
    altered = kwargs.get("use_vmap", False) or kwargs.get("allow_is_bidirectional_skip", False)
    whole = q_length == kv_length > 1 and isinstance(offset, int) and offset == 0 and not altered
    if whole and not kwargs.get("allow_is_causal_skip", True):
        if attention_mask is None and batch_size == 1:
            return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=kwargs.get("device", "cpu"))
    elif whole and torch.is_grad_enabled():
        if attention_mask is None:
            return cu_seqlens_of_rows(batch_size, q_length, kwargs.get("device", "cpu")).view(-1, 1, 1, 1)
        if trusted and attention_mask.shape == (batch_size, q_length):
            return cu_seqlens_of_padding(attention_mask).view(-1, 1, 1, 1)
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)


def register_implementations() -> None:
    """Make our names known to transformers; idempotent, and without effect on any model that does not use them."""
    for backend, forward in FORWARDS.items():
        varlen = backend in BACKENDS
        name = IMPLEMENTATION_PREFIX + backend
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, partial(_varlen_mask, False) if varlen else sdpa_mask)
        if varlen:
            AttentionInterface.register(name + PADDED_SUFFIX, forward)
            AttentionMaskInterface.register(name + PADDED_SUFFIX, partial(_varlen_mask, True))


def _mark_packed(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of a decoder: a batch that says where its documents lie comes with the mask that says so.

    transformers would look for documents in `position_ids`, and wait for the GPU to tell it whether there are any,
    once for each kind of mask.
    """
    offsets, tokens = kwargs.get("cu_seq_lens_q"), kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if offsets is None or tokens is None or tokens.shape[0] != 1:
        return None
    if any(kwargs.get(name) is not None for name in ("attention_mask", *CACHE_NAMES)):
        return None
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=offsets.device)
    return args, {**kwargs, "attention_mask": mask}


# -- switching a model over ------------------------------------------------------------------------------------------


def _swap_config(model: nn.Module, old: Any, new: Any) -> None:
    """Point every module of `model` that refers to the configuration `old` at `new`."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def use_backend(model: PreTrainedModel, backend: str) -> None:
    """Switch `model` to `backend`, on a copy of its text configuration; `restore_attention` undoes it."""
    register_implementations()
    old = model.config.get_text_config()
    new = copy.copy(old)
    new._attn_implementation_internal = IMPLEMENTATION_PREFIX + backend
    _swap_config(model, old, new)
    model.__dict__[_CONFIGS] = (old, new)
    # Layers of other kinds (linear attention) take masks of their own.
    if backend in BACKENDS and set(getattr(new, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}:
        model.base_model.register_forward_pre_hook(_mark_packed, with_kwargs=True)


def use_padding(model: nn.Module, trusted: bool = True) -> bool:
    """Whether `model` runs on a varlen back end, which from now on takes padded rows without a dense mask.

    For models that are trained on batches whose `attention_mask` (B, S) marks padding and nothing else, and has it on
    one side of each row: that cannot be checked without waiting for the GPU, so it is for whoever knows the collator
    to say. A mask with holes would be read wrongly. `trusted=False` takes it back.
    """
    configs = model.__dict__.get(_CONFIGS)
    if configs is None:
        return False
    _, config = configs
    name = config._attn_implementation_internal.removeprefix(IMPLEMENTATION_PREFIX).removesuffix(PADDED_SUFFIX)
    if name not in BACKENDS:
        return False
    config._attn_implementation_internal = IMPLEMENTATION_PREFIX + name + (PADDED_SUFFIX if trusted else "")
    return True


def restore_attention(model: nn.Module) -> None:
    """Give `model` its own configuration object back, with whatever was set on the copy in the meantime."""
    configs = model.__dict__.pop(_CONFIGS, None)
    if configs is not None:
        old, new = configs
        vars(old).update({k: v for k, v in vars(new).items() if k != "_attn_implementation_internal"})
        _swap_config(model, new, old)
        decoder: Any = model.base_model
        for key in [key for key, hook in decoder._forward_pre_hooks.items() if hook is _mark_packed]:
            del decoder._forward_pre_hooks[key]
            decoder._forward_pre_hooks_with_kwargs.pop(key, None)
