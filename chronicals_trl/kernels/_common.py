"""What every op shares: where it runs, the dtype it computes in, and the launch counter that the tests read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # triton has no wheel for macOS and Windows: the references still work
    triton = tl = None

__all__ = [
    "HAS_TRITON",
    "INTERPRET",
    "LAUNCHES",
    "backend",
    "empty_rows_like",
    "jit",
    "math_dtype",
    "num_warps",
    "tl",
    "triton",
    "unit_last_stride",
    "use_triton",
]

HAS_TRITON: bool = triton is not None

# Triton reads the variable when a kernel is decorated, so a later change could not take effect here either. A module
# constant also keeps os.environ out of what torch.compile has to trace.
INTERPRET: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"

#: Kernel launches by op name since the process started. Compiled graphs count too: the count is made inside the op.
LAUNCHES: Counter[str] = Counter()

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton's interpreter computes in numpy, which has no bfloat16: the results are silently wrong.
_INTERPRETED_DTYPES = (torch.float32, torch.float16)
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def jit(fn: Callable[..., Any]) -> Any:
    """``triton.jit``, or `fn` unchanged (and never called) where triton is not installed."""
    return triton.jit(fn) if HAS_TRITON else fn


def backend(device: torch.device | str) -> str:
    """``"triton"`` if ops on `device` run the kernels, ``"torch"`` if they run the reference."""
    kind = torch.device(device).type
    return "triton" if HAS_TRITON and (kind == "cuda" or (INTERPRET and kind == "cpu")) else "torch"


def use_triton(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernels take all of `tensors` (None is skipped): device, dtype, and no tensor subclass."""
    dtypes = _INTERPRETED_DTYPES if INTERPRET else _KERNEL_DTYPES
    given = [t for t in tensors if t is not None]
    # A DTensor has to go through ops that know how to shard, which ours do not.
    return all(
        backend(t.device) == "triton" and t.device == given[0].device and t.dtype in dtypes and type(t) in _PLAIN_TYPES
        for t in given
    )


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op on `dtype` computes in: float64 stays (gradient checks), all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if its last dimension is not laid out element after element."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_rows_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, in the layout that an elementwise torch op on `x` gives, the last dimension unit-strided."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def num_warps(elements: int) -> int:
    """Warps for a program that holds `elements` values: 8 to 16 values a thread, within what one block allows."""
    return min(16, max(4, triton.next_power_of_2(elements) // 512))
