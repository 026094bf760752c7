"""flash-attn-4 (`flash_attn.cute`): its forward and backward functions, at less cost to the host than it has itself.

The package's public function neither compiles nor lets its backward pass be called, so the two functions behind it
are. What they compute is verified before a model is switched (`attention_choice`).

For each call the forward function works out anew which of its kernels fits, some 40 us of Python, to look up a
compiled kernel and call it. That choice depends on shapes, strides and settings alone. The first call of a kind
therefore goes through the function while the lookup is watched, and the next ones call the kernel that was looked up
with the arguments that it got, their own tensors in the place of the first call's.

Legend: B batch, H heads, S sequence, D head dimension, T tokens of all rows (B * S), N documents.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chronicals_trl.kernels._common import LAUNCHES, MAX_LAUNCHES
from chronicals_trl.model.attention_rows import heads_first, kernel_rows

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["backward", "forward", "missing"]

_FORWARD = {"softcap", "window_size_left", "window_size_right", "return_lse", "max_seqlen_q", "cu_seqlens_q"}
_BACKWARD = {"softcap", "window_size_left", "window_size_right", "deterministic", "dq", "dk", "dv"}


# The package's own settings. Without its cache on disk every process compiles its five kernels anew, for 10 s.
_CACHE, _CACHE_FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


def _keep_compiled_kernels() -> None:
    """Switch the package's cache on, unless the user has said something about it, or it could not lock files there.

    Its own default folder is one in the machine's temporary folder, where others could have put code of theirs. Ours
    is one for each kind of GPU: the package finds some of its kernels by a key that leaves the GPU out, and a home
    may be shared by several kinds.
    """
    if fcntl is None or _CACHE in os.environ or "flash_attn.cute.cache_utils" in sys.modules:
        return
    if not torch.cuda.is_available():
        return
    try:
        if importlib.util.find_spec("flash_attn") is None:
            return
        kind = "sm_{}{}".format(*torch.cuda.get_device_capability())
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(os.environ.get(_CACHE_FOLDER) or caches / "chronicals-trl" / "flash_attn_4" / kind)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (OSError, RuntimeError, ValueError):  # read-only, no locks there; no home; a module without a spec
        return
    os.environ |= {_CACHE: "1", _CACHE_FOLDER: str(folder)}


@cache
def package() -> tuple[Callable[..., Any], Callable[..., Any]] | str:
    """Its forward and backward functions, or why there are none."""
    _keep_compiled_kernels()
    # Three times a process, over many lines, and of no consequence: nothing of that kind is given to it.
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
    try:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "flash_attn":
            return "flash_attn_4 is not installed"
        return f"flash_attn_4: {error}"
    except Exception as error:  # a broken installation, of it or of what it is built on
        return f"flash_attn_4 cannot be imported ({type(error).__name__}: {error})"
    for function, needed in ((_flash_attn_fwd, _FORWARD), (_flash_attn_bwd, _BACKWARD)):
        absent = needed - set(inspect.signature(function).parameters)
        if absent:
            return f"flash_attn_4 in this version: {function.__name__} takes no {', '.join(sorted(absent))}"
    return _flash_attn_fwd, _flash_attn_bwd


def missing() -> str | None:
    """Why it cannot be called, or None."""
    found = package()
    return found if isinstance(found, str) else None


def _bounds(window: int | None) -> dict[str, int | None]:
    """A window of W tokens, the own one included, as flash-attn-4 counts: how many to the left and to the right."""
    if window is None:
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": window - 1, "window_size_right": 0}


# -- calls that are known already ------------------------------------------------------------------------------------


class _Replay(NamedTuple):
    """A kernel, its arguments, and which tensor goes to which of their places."""

    kernel: Callable[..., Any]
    arguments: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        arguments = list(self.arguments)
        for place, tensor in self.places:
            arguments[place] = tensors[tensor]
        self.kernel(*arguments)


_Called = tuple[Callable[..., Any], tuple[Any, ...]]  # a kernel, and what it was called with


class _Watched:
    """Stands for the package's cache of compiled kernels, and keeps what is called from it."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self.calls: list[_Called] = []

    def __contains__(self, key: Any) -> bool:
        return key in self._kernels

    def __setitem__(self, key: Any, kernel: Any) -> None:
        self._kernels[key] = kernel

    def __getitem__(self, key: Any) -> Callable[..., Any]:
        kernel = self._kernels[key]

        def call(*arguments: Any) -> Any:
            self.calls.append((kernel, arguments))
            return kernel(*arguments)

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


# None for kinds of calls that cannot be replayed.
_replays: dict[Any, _Replay | None] = {}
_watching = threading.Lock()


def _watch(function: Any, call: Callable[[], tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> Any:
    """The outputs of `call`, which calls `function` on `inputs`, and how to replay it, or None."""
    with _watching:  # one at a time: another thread's watch would be taken for the package's own cache
        kernels = getattr(function, "compile_cache", None)
        if kernels is None:
            return call(), None
        watched = function.compile_cache = _Watched(kernels)
        try:
            outputs = call()
        finally:
            function.compile_cache = kernels
    return outputs, _replay_of(watched.calls, (*inputs, *outputs))


def _identity(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _replay_of(
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], tensors: Sequence[Tensor]
) -> _Replay | None:
    """None unless there was one kernel, and each tensor that it got is one of `tensors`, beyond doubt."""
    known = {_identity(tensor): index for index, tensor in enumerate(tensors)}
    if len(calls) != 1:
        return None
    kernel, arguments = calls[0]
    fixed, places = list(arguments), []
    for place, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            if _identity(argument) not in known:  # a copy, or a table that was made from the values of another
                return None
            places.append((place, known[_identity(argument)]))
            fixed[place] = None
        elif isinstance(argument, (tuple, list)) and any(part is not None for part in argument):
            return None
    if {tensor for _, tensor in places} != set(range(len(tensors))):
        return None
    return _Replay(kernel, tuple(fixed), tuple(places))


# -- the two passes --------------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, S, Hq, D) and the log-sum-exp (Hq, T), from q (B, Hq, S, D), k and v (B, Hk, S, D), cu_seqlens (N+1,)."""
    LAUNCHES["flash_attn_4"] += 1
    q_THD, k_THD, v_THD = kernel_rows(q), kernel_rows(k), kernel_rows(v)
    inputs = q_THD, k_THD, v_THD, cu_seqlens
    # The package copies what is not aligned, and the kernel would not find the copy again.
    aligned = not (q_THD.data_ptr() | k_THD.data_ptr() | v_THD.data_ptr()) % 16
    kind = (
        q_THD.shape, q_THD.stride(), k_THD.shape, k_THD.stride(), v_THD.shape, v_THD.stride(), q.dtype, k.dtype,
        v.dtype, q.device, cu_seqlens.shape, cu_seqlens.stride(), cu_seqlens.dtype, max_seqlen, scale, window, softcap,
        aligned,
    )  # fmt: skip
    replay = _replays.get(kind)
    if replay is not None:
        out = q.new_empty(*q_THD.shape[:2], v.shape[-1])
        lse = q.new_empty(q.shape[1], q_THD.shape[0], dtype=torch.float32)
        replay((*inputs, out, lse))
    else:
        function: Any = package()[0]

        def call() -> tuple[Tensor, Tensor]:
            found = function(
                q_THD, k_THD, v_THD, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
                max_seqlen_k=max_seqlen, softmax_scale=scale, causal=True, softcap=softcap, return_lse=True,
                **_bounds(window),
            )  # fmt: skip
            return found[0], found[1]

        if kind in _replays:
            out, lse = call()
        else:
            if len(_replays) >= MAX_LAUNCHES:
                _replays.clear()
            (out, lse), _replays[kind] = _watch(function, call, inputs)
    return out.view(q.shape[0], q.shape[2], q.shape[1], -1), lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, window: int | None, softcap: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of q, k and v, of their shapes."""
    LAUNCHES["flash_attn_4_backward"] += 1
    function: Any = package()[1]
    inputs = [kernel_rows(x) for x in (q, k, v)]
    # Of its own it would give gradients in the layout of q, k and v, whatever that is.
    gradients = [x.new_empty(x.shape) for x in inputs]
    function(
        *inputs, out.flatten(0, 1), grad_out.flatten(0, 1), lse, scale, True, softcap,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **dict(zip(("dq", "dk", "dv"), gradients, strict=True)), **_bounds(window),
    )  # fmt: skip
    return tuple(heads_first(gradient, x) for gradient, x in zip(gradients, (q, k, v), strict=True))
