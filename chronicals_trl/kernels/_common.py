"""What every op shares: where it runs, the dtype it computes in, and the launch counter that the tests read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
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
    "kernel_op",
    "math_dtype",
    "multiprocessors",
    "row_stride",
    "shared_memory",
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


def row_stride(x: torch.Tensor) -> int | None:
    """The distance between consecutive rows (last dimensions) of `x`, in elements; None if no single one fits all."""
    if x.is_contiguous():
        return x.shape[-1]
    found: int | None = None
    following = 0
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if found is None:
            found = stride
        elif stride != following:
            return None
        following = stride * size
    return x.shape[-1] if found is None else found


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few under the interpreter, so that persistent loops loop there too."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block of a GPU may use, less a little for the kernel's own reductions."""
    if device.type == "cpu":
        return 64 * 2**10
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 8 * 2**10


def kernel_op(
    schema: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    aside: tuple[int, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: a function that launches kernels, as an op for torch.compile and at little cost for eager code.

    A `torch.library.custom_op` is opaque to torch.compile, as a launch has to be, but costs some tens of microseconds
    a call in Python. Eager calls therefore go to the function itself, or through a `torch.autograd.Function` where it
    has a backward. Both ways share the formulas.

    Args:
        schema: name and signature, without the namespace.
        fake: outputs without values, for tracing.
        setup_context, backward: as `torch.library.CustomOpDef.register_autograd` takes them; `backward` may be given
            None for an output that nobody used.
        aside: indices of outputs that are kept for the backward pass alone and have no gradient.
    """

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        name, _, signature = schema.partition("(")
        definition = torch.library.custom_op(
            f"chronicals_trl::{name}", launch, mutates_args=(), schema=f"({signature}"
        )
        definition.register_fake(fake)
        eager: Callable[..., Any] = launch
        if backward is not None:
            assert setup_context is not None
            definition.register_autograd(backward, setup_context=setup_context)
            eager = _eager_function(name, launch, setup_context, backward, aside)
        traced = getattr(torch.ops.chronicals_trl, name).default

        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return traced(*args)
            return eager(*args) if torch.is_grad_enabled() else launch(*args)

        return call

    return decorate


def _eager_function(
    name: str,
    launch: Callable[..., Any],
    setup_context: Callable[..., None],
    backward_formula: Callable[..., Any],
    aside: tuple[int, ...],
) -> Callable[..., Any]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = launch(*args)
            ctx.set_materialize_grads(False)
            setup_context(ctx, args, outputs)
            if aside:
                ctx.mark_non_differentiable(*(outputs[i] for i in aside))
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
            return backward_formula(ctx, *grads)

    Function.__name__ = Function.__qualname__ = name
    return Function.apply
