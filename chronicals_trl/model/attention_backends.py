"""The varlen attention kernels that there are, behind one signature: what transformers has in, what it wants out.

    fa4     flash-attn-4 (`flash_attn.cute`), Hopper and newer
    varlen  the op behind torch.nn.attention.varlen, Ampere and newer
    fa3     an installed flash-attn 3 (`flash_attn_interface`)
    fa2     an installed flash-attn 2 (`flash_attn`)

The first two are custom ops of ours: opaque to torch.compile, as kernels have to be, and plain function calls for
eager code (`kernel_op`). flash-attn-4's own autograd function breaks graphs; `torch.nn.attention.varlen` goes through
two layers of Python and fills a buffer that nobody reads. The names of the ops hold "flash_attn", which is what TRL's
selective activation checkpointing saves. The packages have wrapped their kernels in ops themselves.

cu_seqlens is never read on the host, and has to cover all rows: what no document covers holds whatever was there.

Legend: B batch, H heads, S sequence, D head dimension, T tokens of all rows (B * S), N documents.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from chronicals_trl.kernels._common import LAUNCHES, kernel_op
from chronicals_trl.model import attention_fa4
from chronicals_trl.model.attention_rows import heads_first, kernel_rows, tokens_first

__all__ = ["BACKENDS", "HALF", "Backend", "unavailable"]

HALF = (torch.bfloat16, torch.float16)

#: q (B, Hq, S, D), k and v (B, Hk, S, D), cu_seqlens (N+1,) int32, max_seqlen, scale, window or None, softcap or 0.0
#: to (B, S, Hq, D).
Call = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None, float], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to attend within documents.

    Args:
        label: Its name in the configuration and in the report.
        call: See `Call`.
        softcap: Whether it can cap logits.
        missing: Why it cannot be called on a machine with a GPU, or None.
        capability: The least compute capability, and the GPU's name for it.
        dtypes: What it takes.
        device_type: Where it runs. Tensors elsewhere, of weights that are yet to be sharded, take torch's attention.
    """

    label: str
    call: Call
    softcap: bool
    missing: Callable[[], str | None]
    capability: tuple[int, str]
    dtypes: tuple[torch.dtype, ...] = HALF
    device_type: str = "cuda"


def unavailable(backend: Backend, device: torch.device) -> str | None:
    """None if `backend` can be tried on `device`, else the reason why not."""
    if device.type != backend.device_type:
        return f"{backend.label} needs an NVIDIA GPU, the model is on {device.type}"
    capability, gpu = backend.capability
    if torch.cuda.get_device_capability(device)[0] < capability:
        return f"{backend.label} needs {gpu} GPU or newer"
    return backend.missing()


# -- kernels as ops --------------------------------------------------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _dim = q.shape
    out = q.new_empty(batch, length, heads, v.shape[-1])
    return out, q.new_empty(heads, batch * length, dtype=torch.float32)


def _fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward_formula(op: Callable[..., Any], ctx: Any, grad_out: Tensor | None, _: Any) -> Any:
    if grad_out is None:
        return (None,) * (4 + len(ctx.settings))
    return (*op(grad_out, *ctx.saved_tensors, *ctx.settings), None, *(None for _ in ctx.settings))


_SETTINGS = "Tensor cu_seqlens, SymInt max_seqlen, float scale, int? window, float softcap"


def _attention_op(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Call:
    """An op of two functions that launch kernels, as a `Call`."""
    backward_op = kernel_op(
        f"{name}_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SETTINGS})"
        " -> (Tensor, Tensor, Tensor)",
        _fake_backward,
    )(backward)
    eager = kernel_op(
        f"{name}(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)",
        _fake_forward,
        setup_context=_setup_context,
        backward=partial(_backward_formula, backward_op),
        aside=(1,),
    )(forward)
    op = getattr(torch.ops.chronicals_trl, name).default

    def call(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None,
        softcap: float,
    ) -> Tensor:  # fmt: skip
        # A mode that watches ops, as selective checkpointing does, has to see this one.
        watched = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
        out: Tensor = (op if watched else eager)(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap)[0]
        return out

    return call


# -- torch -----------------------------------------------------------------------------------------------------------


def _varlen_missing() -> str | None:
    ops = (getattr(torch.ops.aten, name, None) for name in ("_flash_attention_forward", "_flash_attention_backward"))
    for op in ops:
        if op is None or "window_size_left" not in str(op.default._schema):
            return f"varlen: torch {torch.__version__} has no varlen attention with windows"
    return None


def _refuse_softcap(softcap: float) -> None:
    if softcap:
        raise NotImplementedError("varlen: torch's attention has no softcap")


def _varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _refuse_softcap(softcap)
    LAUNCHES["flash_attn_varlen"] += 1
    out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
        kernel_rows(q), kernel_rows(k), kernel_rows(v), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        0.0, window is None, False,
        scale=scale, window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return out.contiguous().view(q.shape[0], q.shape[2], q.shape[1], -1), lse


def _varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, window: int | None, softcap: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    LAUNCHES["flash_attn_varlen_backward"] += 1
    # The state of a dropout that there is not, as torch.nn.attention.varlen passes it. Deterministic mode is torch's
    # own matter: the op looks.
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    offset = torch.empty(0, device=q.device)
    gradients = torch.ops.aten._flash_attention_backward.default(
        grad_out.flatten(0, 1), kernel_rows(q), kernel_rows(k), kernel_rows(v), out.flatten(0, 1), lse,
        cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, window is None, seed, offset,
        scale=scale, window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return tuple(heads_first(gradient.contiguous(), x) for gradient, x in zip(gradients, (q, k, v), strict=True))


# -- installed flash-attn 2 and 3 ------------------------------------------------------------------------------------

_PACKAGES = {"flash_attn_3": "flash_attn_interface", "flash_attn_2": "flash_attn"}
_PACKAGE_ARGUMENTS = {"softmax_scale", "causal", "window_size", "softcap", "deterministic"}


@cache
def _package(label: str) -> Callable[..., Any] | str:
    """`flash_attn_varlen_func` of an installed package, or why there is none."""
    try:
        # flash-attn-4 alone is a `flash_attn` too, without this function.
        function: Callable[..., Any] = importlib.import_module(_PACKAGES[label]).flash_attn_varlen_func
    except (ModuleNotFoundError, AttributeError):
        return f"{label} is not installed"
    except Exception as error:  # built for another torch, most often
        return f"{label} cannot be imported ({type(error).__name__}: {error})"
    absent = _PACKAGE_ARGUMENTS - set(inspect.signature(function).parameters)
    return f"{label} in this version: no {', '.join(sorted(absent))}" if absent else function


def _package_missing(label: str) -> str | None:
    found = _package(label)
    return found if isinstance(found, str) else None


def _package_call(
    label: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    window: int | None, softcap: float,
) -> Tensor:  # fmt: skip
    out = _package(label)(  # type: ignore[operator]
        tokens_first(q), tokens_first(k), tokens_first(v), cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, softmax_scale=scale, causal=True, softcap=softcap,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out
    return out.view(q.shape[0], q.shape[2], q.shape[1], -1)


#: Best first; what comes after them is torch's scaled_dot_product_attention with a mask.
BACKENDS: dict[str, Backend] = {
    "fa4": Backend(
        "flash_attn_4",
        _attention_op("flash_attn_4", attention_fa4.forward, attention_fa4.backward),
        softcap=True,
        missing=attention_fa4.missing,
        capability=(9, "a Hopper"),
    ),
    "varlen": Backend(
        "varlen",
        _attention_op("flash_attn_varlen", _varlen_forward, _varlen_backward),
        softcap=False,
        missing=_varlen_missing,
        capability=(8, "an Ampere"),
    ),
    **{
        name: Backend(
            label,
            partial(_package_call, label),
            softcap=True,
            missing=partial(_package_missing, label),
            capability=(8, "an Ampere"),
        )
        for name, label in (("fa3", "flash_attn_3"), ("fa2", "flash_attn_2"))
    },
}
