"""Packed attention: documents that share a row attend to themselves alone, on every device.

One attention function per back end, registered under a name of its own with transformers' AttentionInterface *and*
AttentionMaskInterface (a name unknown to the second drops padding masks in silence). Registering adds names; nothing
that exists changes. A model is switched by `config._attn_implementation`, on a copy of its configuration, so that a
second model that was built from the same configuration object is not touched.

Back ends, best first:
    fa4     flash-attn-4 (`flash_attn.cute`), Hopper and newer
    varlen  torch.nn.attention.varlen, Ampere and newer
    sdpa    scaled_dot_product_attention with a block-diagonal mask, everywhere

Legend: B batch, H heads, S sequence, D head dimension, T tokens of a packed row (B is 1), N documents.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chronicals_trl.model.match import Mismatch, compare, probing, randn

# The names must hold neither "flash" nor "sdpa": transformers looks for those words and takes paths of its own.
IMPLEMENTATION_PREFIX = "chronicals_"
BACKENDS = ("fa4", "varlen", "blockwise")
CONFIG_TO_BACKEND = {"flash_attn_4": "fa4", "varlen": "varlen", "sdpa": "blockwise"}
BACKEND_LABELS = {backend: name for name, backend in CONFIG_TO_BACKEND.items()}

HALF = (torch.bfloat16, torch.float16)


# -- which documents a row holds -------------------------------------------------------------------------------------


def document_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The document of each token, (T,) int64, from cumulative lengths (N+1,); empty documents are skipped over."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), positions, right=True)


def block_diagonal_mask(cu_seqlens: Tensor, num_tokens: int, window: int | None = None) -> Tensor:
    """Boolean mask (1, 1, T, T): causal, inside one document, and inside the sliding window if there is one."""
    documents = document_ids(cu_seqlens, num_tokens)
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    distance = positions[:, None] - positions[None, :]
    mask = (documents[:, None] == documents[None, :]) & (distance >= 0)
    if window is not None:
        mask &= distance < window
    return mask[None, None]


def cu_seqlens_of_positions(position_ids: Tensor) -> Tensor:
    """Cumulative document lengths (N+1,) int32 of one packed row, from position ids (1, T) that restart at 0.

    Reads the device back (the number of documents is data): only for batches whose collator gave no `cu_seq_lens_q`.
    """
    flat = position_ids.reshape(-1)
    starts = (flat == 0).nonzero().flatten().to(torch.int32)
    return torch.cat([starts, starts.new_tensor([flat.numel()])])


# -- back ends: q (T, Hq, D), k and v (T, Hk, D), cu_seqlens (N+1,) -> (T, Hq, D) -------------------------------------


@cache
def _varlen_function() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = set(inspect.signature(varlen_attn).parameters)
    if not {"window_size", "scale"} <= parameters:
        return None
    if "enable_gqa" in parameters:  # from torch 2.12 on; before, fewer key-value heads are simply taken
        return functools.partial(varlen_attn, enable_gqa=True)
    return varlen_attn


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> Tensor:
    function = _varlen_function()
    assert function is not None
    window_size = (-1, 0) if window is None else (window - 1, 0)
    out: Tensor = function(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        scale=scale, window_size=window_size,
    )  # fmt: skip
    return out


@cache
def _fa4_function() -> Callable[..., Any] | None:
    try:
        from flash_attn.cute.interface import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _fa4(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> Tensor:
    function = _fa4_function()
    assert function is not None
    out = function(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        softmax_scale=scale, causal=True, window_size=(None, None) if window is None else (window - 1, 0),
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


VARLEN_BACKENDS: dict[str, Callable[..., Tensor]] = {"fa4": _fa4, "varlen": _varlen}


def unavailable(backend: str, device: torch.device) -> str | None:
    """None if `backend` can be tried on `device`, else the reason why not."""
    if backend == "blockwise":
        return None
    if device.type != "cuda":
        return f"{BACKEND_LABELS[backend]} needs an NVIDIA GPU, the model is on {device.type}"
    major, _ = torch.cuda.get_device_capability(device)
    if backend == "fa4":
        if major < 9:
            return "flash-attn-4 needs a Hopper GPU or newer"
        return None if _fa4_function() is not None else "flash-attn-4 is not installed"
    if major < 8:
        return "torch's varlen attention needs an Ampere GPU or newer"
    return (
        None if _varlen_function() is not None else f"torch {torch.__version__} has no varlen attention with windows"
    )


# -- the functions that transformers calls ---------------------------------------------------------------------------


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the autocast dtype: custom ops do not take part in autocast as SDPA does."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


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
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: q (B, Hq, S, D), k and v (B, Hk, S, D) -> ((B, S, Hq, D), None)."""
    num_tokens = query.shape[2]
    marked = attention_mask is not None and attention_mask.numel() == 0  # by _varlen_mask
    # transformers looks for documents only while there is no cache; `cu_seq_lens_q` says that there are some.
    told = (
        attention_mask is None and cu_seq_lens_q is not None and query.shape[0] == 1 and num_tokens == key.shape[2] > 1
    )
    if marked or told:
        if cu_seq_lens_q is None:
            if position_ids is None:
                raise ValueError(
                    "A packed row reached the attention without `cu_seq_lens_q` and without `position_ids`."
                )
            cu_seq_lens_q, max_length_q = cu_seqlens_of_positions(position_ids), None
        q, k, v = _autocast(query, key, value)
        if backend in VARLEN_BACKENDS and q.dtype in HALF and dropout == 0.0:
            scale = scaling if scaling is not None else q.shape[-1] ** -0.5
            # squeeze, not [0]: the backward of a selection fills a buffer with zeros and copies into it.
            q_THD, k_THD, v_THD = (tensor.transpose(1, 2).squeeze(0) for tensor in (q, k, v))
            out_THD = VARLEN_BACKENDS[backend](
                q_THD, k_THD, v_THD, cu_seq_lens_q, max_length_q or num_tokens, scale, sliding_window
            )
            return out_THD.unsqueeze(0), None
        # The CPU, fp32, or attention dropout: no varlen kernel has them.
        attention_mask = block_diagonal_mask(cu_seq_lens_q, num_tokens, sliding_window)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _fa4_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _attention_forward("fa4", module, *args, **kwargs)


def _varlen_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _attention_forward("varlen", module, *args, **kwargs)


def _blockwise_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _attention_forward("blockwise", module, *args, **kwargs)


def _varlen_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """An empty tensor for a packed row (the kernels take its documents from `cu_seqlens`), SDPA's mask for the rest.

    transformers forbids the causal short cut when it finds position ids that restart, and uses vmap for masks that
    its caller has altered; those are real masks and have to be built.
    """
    packed = not kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap", False)
    if attention_mask is None and packed and batch_size == 1 and q_length == kv_length > 1:
        return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=kwargs.get("device", "cpu"))
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)


def register_implementations() -> None:
    """Make our names known to transformers; idempotent, and without effect on any model that does not use them."""
    for backend, forward in (("fa4", _fa4_forward), ("varlen", _varlen_forward), ("blockwise", _blockwise_forward)):
        AttentionInterface.register(IMPLEMENTATION_PREFIX + backend, forward)
        AttentionMaskInterface.register(
            IMPLEMENTATION_PREFIX + backend, sdpa_mask if backend == "blockwise" else _varlen_mask
        )


# -- verification and choice -----------------------------------------------------------------------------------------

_verified: dict[tuple[Any, ...], str | None] = {}


def verify_backend(
    backend: str, *, heads: int, kv_heads: int, head_dim: int, window: int | None, device: torch.device
) -> str | None:
    """None if `backend` isolates three ragged documents as SDPA document by document does, else the reason."""
    key = (backend, heads, kv_heads, head_dim, window, device.type)
    if key in _verified:
        return _verified[key]
    dtype = torch.bfloat16 if backend in VARLEN_BACKENDS else torch.float32
    lengths = (7, 64, 25)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    # Two empty documents at the end: static shapes pad cu_seqlens with its last value.
    padded = torch.cat([offsets, offsets[-1:], offsets[-1:]])

    stand = nn.Module()  # what transformers' SDPA reads off an attention block
    stand.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]
    stand.is_causal = True  # type: ignore[assignment]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend in VARLEN_BACKENDS:
            mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
        else:
            mask = block_diagonal_mask(padded, sum(lengths), window)
        return _attention_forward(
            backend, stand, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask,
            sliding_window=window, cu_seq_lens_q=padded, max_length_q=max(lengths),
        )[0]  # fmt: skip

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            single = torch.tensor([0, end - start], device=device)
            mask = block_diagonal_mask(single, end - start, window)
            q_1HSD, k_1HSD, v_1HSD = (tensor[:, start:end].transpose(1, 2).float() for tensor in (q, k, v))
            part = nn.functional.scaled_dot_product_attention(
                q_1HSD, k_1HSD, v_1HSD, attn_mask=mask, enable_gqa=heads != kv_heads
            )
            parts.append(part.transpose(1, 2))
        return torch.cat(parts, dim=1).to(q.dtype)

    reason: str | None = None
    with probing(device) as generator:
        inputs = tuple(
            randn(1, sum(lengths), count, head_dim, generator=generator, device=device, dtype=dtype)
            for count in (heads, kv_heads, kv_heads)
        )
        try:
            with torch.autocast(device.type, enabled=False):
                compare(ours, one_by_one, inputs, ())
        except Mismatch as mismatch:
            reason = str(mismatch)
        except Exception as error:  # whatever a third-party kernel raises: it is the reason, and the next is tried
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    _verified[key] = reason
    return reason


def choose_backend(model: PreTrainedModel, requested: str, device: torch.device) -> tuple[str | None, str | None]:
    """The back end for `model` and, where it is not the best one, why.

    Args:
        requested: `ChronicalsConfig.attention_backend`.

    Returns:
        (back end or None to keep the model's own implementation, reason or None).
    """
    config = model.config.get_text_config()
    current = config._attn_implementation
    if config is not model.config:
        return None, "a multimodal model: its own attention is kept"
    if current == "eager" and getattr(config, "attn_logit_softcapping", None):
        return None, "logit softcapping: no back end has it yet, the model's own eager attention is kept"
    if not getattr(model, "_supports_attention_backend", False):
        # Falcon's asks for "sdpa" by name, and would take another name for eager attention without a mask.
        return None, "its attention does not go through transformers' attention interface"
    if current != "sdpa":
        return None, f"the chosen attn_implementation {current!r} is kept"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types & {"chunked_attention"} or getattr(config, "use_bidirectional_attention", False):
        return None, "chunked or bidirectional attention: the model's own SDPA is kept"
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    candidates = BACKENDS if requested == "auto" else (CONFIG_TO_BACKEND[requested],)
    reasons = []
    if requested == "auto" and device.type != "cuda":
        candidates, reasons = ("blockwise",), [f"no varlen kernel on {device.type}"]
    elif requested == "auto" and getattr(config, "attention_dropout", None):
        candidates, reasons = (
            ("blockwise",),
            [f"attention_dropout={config.attention_dropout}: no varlen kernel has it"],
        )
    for backend in candidates:
        reason = unavailable(backend, device)
        for width in {None, window}:
            reason = reason or verify_backend(
                backend, heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=width, device=device
            )
        if reason is None:
            return backend, "; ".join(reasons) or None
        reasons.append(reason if BACKEND_LABELS[backend] in reason else f"{BACKEND_LABELS[backend]}: {reason}")
    return None, "; ".join(reasons)


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
    model.__dict__["_chronicals_configs"] = (old, new)


def restore_attention(model: nn.Module) -> None:
    """Give `model` its own configuration object back, with whatever was set on the copy in the meantime."""
    configs = model.__dict__.pop("_chronicals_configs", None)
    if configs is not None:
        old, new = configs
        vars(old).update({k: v for k, v in vars(new).items() if k != "_attn_implementation_internal"})
        _swap_config(model, new, old)


@torch.no_grad()
def verify_isolation(model: nn.Module, device: torch.device) -> str | None:
    """None if `model`, as it is now, gives a packed document the logits that it has alone; else the difference.

    Two short documents, in evaluation mode, with the keys that a packed batch has. Skipped (None) where the weights
    are not here: on meta, or partitioned by ZeRO-3.

    Args:
        model: what training calls, a PEFT wrapper included: PEFT's prompt tuning, for one, drops `position_ids`.
    """
    parameters = list(model.parameters())
    if any(parameter.is_meta or hasattr(parameter, "ds_shape") for parameter in parameters):
        return None
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    lengths = (6, 9)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    training = {module: module.training for module in model.modules()}
    with probing(device) as generator:
        tokens = torch.randint(vocabulary, (1, sum(lengths)), generator=generator).to(device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
        try:
            model.eval()
            # From the end: virtual tokens, where PEFT adds some, come first.
            packed = model(
                input_ids=tokens, position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
                max_length_q=max(lengths), max_length_k=max(lengths), use_cache=False,
            ).logits[:, -lengths[1] :]  # fmt: skip
            alone = model(
                input_ids=tokens[:, lengths[0] :], position_ids=positions[:, lengths[0] :], use_cache=False
            ).logits[:, -lengths[1] :]
        finally:
            for module, mode in training.items():
                module.training = mode
    error = ((packed - alone).float().norm() / alone.float().norm()).item()
    # Rounding differs between the two shapes; a leak is many times this (0.17 in the case that FACTS.md measured).
    precision = torch.finfo(
        torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else packed.dtype
    )
    allowed = max(8 * precision.eps, 1e-4)
    return None if error <= allowed else f"logits change by a relative {error:.1e} when packed"
