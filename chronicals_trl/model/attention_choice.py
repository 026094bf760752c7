"""Which attention back end a model gets: what the machine has, what the model needs, and what holds by number.

Legend: H heads, S sequence, D head dimension, T tokens of a packed row (B is 1), N documents.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chronicals_trl._layer_configs import layer_configs
from chronicals_trl.model.attention import FORWARDS, capped_attention
from chronicals_trl.model.attention_backends import BACKENDS, unavailable
from chronicals_trl.model.attention_rows import block_diagonal_mask
from chronicals_trl.model.match import Mismatch, compare, probing, randn

__all__ = [
    "LABELS",
    "Heads",
    "choose_backend",
    "heads_of",
    "verify_backend",
    "verify_isolation",
    "verify_padding",
    "verify_positions",
]

BLOCKWISE = "blockwise"
#: Back end to its name in the configuration and in the report.
LABELS = {**{name: backend.label for name, backend in BACKENDS.items()}, BLOCKWISE: "sdpa"}
_BY_LABEL = {label: name for name, label in LABELS.items()}


class Heads(NamedTuple):
    """What an attention kernel is compiled for, and so what it is verified for."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


def heads_of(model: PreTrainedModel) -> set[Heads]:
    """The distinct ones among the layers; from the configuration where no layer says otherwise."""
    layers = layer_configs(model.config.get_text_config())
    found = set()
    for module in model.modules():
        if isinstance(getattr(module, "head_dim", None), int):
            index = getattr(module, "layer_idx", None)
            said = _heads_by_config(layers[index if isinstance(index, int) and index < len(layers) else 0])
            own = getattr(module, "num_heads", None) or said.heads
            groups = getattr(module, "num_key_value_groups", None) or said.heads // said.kv_heads
            window = getattr(module, "sliding_window", said.window) or None
            found |= {Heads(own, own // groups, module.head_dim, each) for each in (None, window)}
    return found or {
        said._replace(window=each) for said in map(_heads_by_config, layers) for each in (None, said.window)
    }


def _heads_by_config(layer: Any) -> Heads:
    heads = layer.num_attention_heads
    window = getattr(layer, "sliding_window", None) if getattr(layer, "use_sliding_window", True) else None
    return Heads(
        heads,
        getattr(layer, "num_key_value_heads", None) or heads,
        getattr(layer, "head_dim", None) or layer.hidden_size // heads,
        window or None,
    )


# -- one back end ----------------------------------------------------------------------------------------------------

# More than one tile of any kernel between two short ones, and two empty ones, as static shapes have them.
_LENGTHS = (7, 300, 25, 0, 0)
# A batch's bound is that of its data set, not the longest document that it happens to hold.
_MAX_SEQLEN = 2048

_verified: dict[tuple[Any, ...], str | None] = {}


def verify_backend(
    backend: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    device: torch.device,
    softcap: float | None = None,
) -> str | None:
    """None if `backend` attends within ragged documents, forward and backward, as plain torch does in each alone.

    Else the reason. In the mode that is on: a kernel may have no deterministic backward pass.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = (backend, heads, kv_heads, head_dim, window, softcap, device.type, deterministic)
    if key in _verified:
        return _verified[key]
    kernel = BACKENDS.get(backend)
    dtype = torch.float32 if kernel is None else kernel.dtypes[0]
    cu_seqlens = torch.tensor([0, *_LENGTHS], device=device).cumsum(0).to(torch.int32)
    scale = 1.1 * head_dim**-0.5  # not the one that a kernel would take by itself

    stand = nn.Module()  # what transformers' SDPA reads off an attention block
    stand.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]
    stand.is_causal = True  # type: ignore[assignment]
    # Logits that a cap leaves as they are would not show whether there is one.
    gain = 1.0 if softcap is None else softcap / 8

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kernel is not None:
            mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
        else:
            mask = block_diagonal_mask(cu_seqlens, sum(_LENGTHS), window)
        return FORWARDS[backend](
            stand, (q * gain).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scaling=scale,
            sliding_window=window, softcap=softcap, cu_seq_lens_q=cu_seqlens, max_length_q=_MAX_SEQLEN,
        )[0]  # fmt: skip

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for q_1SHD, k_1SHD, v_1SHD in zip(*(x.split(_LENGTHS, dim=1) for x in (q * gain, k, v)), strict=True):
            length = q_1SHD.shape[1]
            if not length:
                continue
            alone = torch.tensor([0, length], device=device)
            q_1HSD, k_1HSD, v_1HSD = (x.transpose(1, 2).float() for x in (q_1SHD, k_1SHD, v_1SHD))
            mask = block_diagonal_mask(alone, length, window)
            if softcap is not None:
                part = capped_attention(q_1HSD, k_1HSD, v_1HSD, mask, scale=scale, softcap=softcap)
            else:
                part = nn.functional.scaled_dot_product_attention(
                    q_1HSD, k_1HSD, v_1HSD, attn_mask=mask, enable_gqa=heads != kv_heads, scale=scale
                ).transpose(1, 2)
            parts.append(part)
        return torch.cat(parts, dim=1).to(q.dtype)

    reason: str | None = None
    with probing(device) as generator:
        inputs = tuple(
            randn(1, sum(_LENGTHS), count, head_dim, generator=generator, device=device, dtype=dtype)
            for count in (heads, kv_heads, kv_heads)
        )
        try:
            with torch.autocast(device.type, enabled=False):
                with torch.no_grad():
                    ours(*inputs)  # flash-attn-4 calls its kernel in another way from the second time on
                compare(ours, one_by_one, inputs, ())
        except Mismatch as mismatch:
            reason = str(mismatch)
        except Exception as error:  # whatever a third-party kernel raises: it is the reason, and the next is tried
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    _verified[key] = reason
    return reason


# -- the choice ------------------------------------------------------------------------------------------------------


def choose_backend(model: PreTrainedModel, requested: str, device: torch.device) -> tuple[str | None, str | None]:
    """The back end for `model` and, where it is not the best one, why.

    Args:
        requested: `ChronicalsConfig.attention_backend`.

    Returns:
        (back end or None to keep the model's own implementation, reason or None).
    """
    config = model.config.get_text_config()
    kept = _kept(model)
    if kept is not None:
        return None, kept
    softcap = getattr(config, "attn_logit_softcapping", None)
    candidates = (*BACKENDS, BLOCKWISE) if requested == "auto" else (_BY_LABEL[requested],)
    reasons: list[str] = []
    varlen_is_out = _varlen_is_out(model, device) if requested == "auto" else None
    if _works_on_masks(model):
        varlen_is_out = "its decoder works on the mask itself, which a varlen kernel does without"
    if softcap:
        candidates = tuple(name for name in candidates if name in BACKENDS and BACKENDS[name].softcap)
        if varlen_is_out is not None or not candidates:
            why = varlen_is_out or f"{requested} has none"
            return None, f"logit softcapping: {why}, the model's own eager attention is kept"
    elif varlen_is_out is not None and candidates != (BLOCKWISE,):
        candidates, reasons = tuple(name for name in candidates if name == BLOCKWISE), [varlen_is_out]
    for backend in candidates:
        reason = unavailable(BACKENDS[backend], device) if backend in BACKENDS else None
        for heads in sorted(heads_of(model), key=str):
            reason = reason or verify_backend(backend, **heads._asdict(), device=device, softcap=softcap)
        if reason is None:
            return backend, "; ".join(reasons) or None
        reasons.append(reason if LABELS[backend] in reason else f"{LABELS[backend]}: {reason}")
    if softcap:
        reasons.insert(0, "logit softcapping: the model's own eager attention is kept")
    return None, "; ".join(reasons)


def _kept(model: PreTrainedModel) -> str | None:
    """Why the model keeps its own attention, whatever the machine has; None if it need not."""
    config = model.config.get_text_config()
    current = config._attn_implementation
    if config is not model.config:
        return "a multimodal model: its own attention is kept"
    if any(isinstance(getattr(module, "sinks", None), Tensor) for module in model.modules()):
        return f"attention sinks: no back end here has them, the model's own {current} attention is kept"
    if not getattr(model, "_supports_attention_backend", False):
        # Falcon's asks for "sdpa" by name, and would take another name for eager attention without a mask.
        return "its attention does not go through transformers' attention interface"
    asking = _asks_for_sdpa(model)
    if asking is not None:
        return (
            f"{asking} asks for 'sdpa' by name, and does something else without it: the model's own attention is kept"
        )
    # What caps its logits has been eager by default: no SDPA can.
    if current != ("eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"):
        return f"the chosen attn_implementation {current!r} is kept"
    layer_types = set(getattr(config, "layer_types", None) or ())
    bidirectional = getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True)
    if layer_types & {"chunked_attention"} or bidirectional:
        return f"chunked or bidirectional attention: the model's own {current.upper()} is kept"
    return None


def _asks_for_sdpa(model: PreTrainedModel) -> str | None:
    """The class of a block that compares the attention implementation with "sdpa"; None without one.

    Sparse attention that selects keys by an indexer (DeepSeek-V3.2) puts its selection into the mask for "eager" and
    "sdpa" alone, and leaves it to the kernel under any other name: with one of ours it would be lost.
    """
    for block in {type(module) for module in model.modules()}:
        code = getattr(inspect.unwrap(block.forward), "__code__", None)
        if code is None or "_attn_implementation" not in code.co_names:
            continue
        if any(const == "sdpa" or (isinstance(const, tuple) and "sdpa" in const) for const in code.co_consts):
            return block.__name__
    return None


def _varlen_is_out(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why no varlen kernel need be tried, or None."""
    if device.type != "cuda":
        return f"no varlen kernel on {device.type}"
    dropout = getattr(model.config.get_text_config(), "attention_dropout", None)
    if dropout:
        return f"attention_dropout={dropout}: no varlen kernel has it"
    if any(getattr(module, "v_head_dim", None) != getattr(module, "qk_head_dim", None) for module in model.modules()):
        return "heads of values and of keys differ in size: not verified on varlen kernels"
    return None


def _works_on_masks(model: PreTrainedModel) -> bool:
    """Whether the decoder asks transformers for a mask to add to or to index with (Doge), or for blocks in it.

    A varlen back end has documents in the place of a mask, and the mask is asked for in the words that it is asked
    for where there are documents.
    """
    try:
        source = inspect.getsource(type(model.base_model))
    except (OSError, TypeError):  # defined where no source is kept
        return False
    return "allow_is_causal_skip=False" in source or "block_sequence_ids=" in source


# -- the model as a whole --------------------------------------------------------------------------------------------


def verify_isolation(model: nn.Module, device: torch.device) -> str | None:
    """None if `model`, as it is now, gives a packed document the logits that it has alone; else the difference.

    Two short documents, in evaluation mode, with the keys that a packed batch has. Skipped (None) where the weights
    are not here: on meta, or partitioned by ZeRO-3.

    Args:
        model: what training calls, a PEFT wrapper included: PEFT's prompt tuning, for one, drops `position_ids`.
    """
    lengths = (6, 9)
    device = _reachable(model, device)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    packed = {
        "position_ids": positions, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip
    document = slice(lengths[0], sum(lengths))
    alone = {"position_ids": positions[:, document]}
    difference = _difference(model, device, (1, sum(lengths)), document, packed, alone, gradients=False)
    return None if difference is None else f"{difference} when packed"


def verify_padding(model: nn.Module, device: torch.device) -> str | None:
    """None if `model`, as it is now, gives a padded row the logits that it has alone; else the difference.

    As `verify_isolation`, for the padded batches that `use_padding` is for: with gradients on, as in training.
    """
    length, padding = 9, 6
    device = _reachable(model, device)
    mask = torch.ones(2, length + padding, dtype=torch.int64, device=device)
    mask[1, length:] = 0
    padded = {"attention_mask": mask}
    difference = _difference(model, device, (2, length + padding), slice(0, length), padded, {}, gradients=True)
    return None if difference is None else f"{difference} when padded"


def verify_positions(model: nn.Module, device: torch.device) -> str | None:
    """None if `model` gives a row without `position_ids` the logits of one whose positions count from 0.

    Arguments and what is skipped as for `verify_isolation`.
    """
    length = 9
    device = _reachable(model, device)
    given = {"position_ids": torch.arange(length, device=device)[None]}
    difference = _difference(model, device, (1, length), slice(0, length), given, {}, gradients=False)
    return None if difference is None else f"{difference} with positions from 0"


def _reachable(model: nn.Module, device: torch.device) -> torch.device:
    """`device`, or the CPU while all weights are there: FSDP and DeepSpeed move them later, and never as a whole.

    torch's attention then stands in for a kernel, which `verify_backend` looks at by itself.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return torch.device("cpu") if on_cpu else device


def _difference(
    model: nn.Module,
    device: torch.device,
    shape: tuple[int, int],
    document: slice,
    batch: dict[str, Any],
    alone: dict[str, Any],
    *,
    gradients: bool,
) -> str | None:
    """How far the logits of a document in the last row of a batch are from those that it has alone, if too far.

    Args:
        shape: of the batch, rows and their length.
        document: where it lies in the last row.
        batch, alone: what the model is called with, besides the tokens, for the one and for the other.
        gradients: whether they are on for the batch.
    """
    parameters = list(model.parameters())
    if any(parameter.is_meta or hasattr(parameter, "ds_shape") for parameter in parameters):
        return None
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    training = {module: module.training for module in model.modules()}
    with probing(device) as generator:
        tokens = torch.randint(vocabulary, shape, generator=generator).to(device)
        try:
            model.eval()
            for module in training:
                # In eval mode without gradients, on a CPU, its 4-bit layers repack their weights, for good, in a form
                # that is for inference alone.
                if type(module).__module__.startswith("bitsandbytes"):
                    module.training = True
            with torch.set_grad_enabled(gradients):
                logits = model(input_ids=tokens, use_cache=False, **batch).logits.detach()
            # From the end: virtual tokens, where PEFT adds some, come first.
            ours = logits[-1:, -shape[1] :][:, document]
            with torch.no_grad():
                own = model(input_ids=tokens[-1:, document], use_cache=False, **alone).logits
            reference = own[:, -ours.shape[1] :]
        finally:
            for module, mode in training.items():
                module.training = mode
    error = ((ours - reference).float().norm() / reference.float().norm()).item()
    # Rounding differs between the two shapes; a leak is many times this (0.17 in the case that FACTS.md measured).
    allowed = max(8 * _coarsest_eps(model, ours.dtype, device), 1e-4)
    return None if error <= allowed else f"logits change by a relative {error:.1e}"


def _coarsest_eps(model: nn.Module, dtype: torch.dtype, device: torch.device) -> float:
    """Of the dtypes that the model computes in, as far as it shows them, besides that of its logits."""
    dtypes = {dtype}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    for module in model.modules():
        if not type(module).__module__.startswith("bitsandbytes"):
            continue
        # A 4-bit layer computes in a dtype of its own, whatever it is given (QLoRA: bf16 within a float32 model). An
        # 8-bit one chooses the columns that it leaves in 16 bits by all tokens, so that its error is another one.
        own = getattr(module, "compute_dtype", None)
        dtypes.add(own if isinstance(own, torch.dtype) else torch.bfloat16)
    return max(torch.finfo(each).eps for each in dtypes)
