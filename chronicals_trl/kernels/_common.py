"""What every op shares: where it runs, the dtype it computes in, and the launch counter that the tests read."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # triton has no wheel for macOS and Windows: the references still work
    triton = tl = None

__all__ = [
    "HAS_TRITON",
    "INTERPRET",
    "LAUNCHES",
    "MAX_LAUNCHES",
    "Launch",
    "autocast_dtype",
    "autocast_off",
    "backend",
    "empty_rows_like",
    "jit",
    "kernel_op",
    "math_dtype",
    "multiprocessors",
    "require_floating",
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

# `Launch`es that an op remembers. Batches that are padded to their longest row bring a new shape almost every step.
MAX_LAUNCHES = 1024

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton's interpreter computes in numpy, which has no bfloat16: the results are silently wrong.
_INTERPRETED_DTYPES = (torch.float32, torch.float16)
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def jit(fn: Callable[..., Any]) -> Any:
    """``triton.jit``, or `fn` unchanged (and never called) where triton is not installed."""
    return triton.jit(fn) if HAS_TRITON else fn


def backend(device: torch.device | str) -> str:
    """``"triton"`` if ops on `device` run the kernels, ``"torch"`` if they run the reference."""
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    return "triton" if HAS_TRITON and (kind == "cuda" or (INTERPRET and kind == "cpu")) else "torch"


def use_triton(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the kernels take all of the tensors (None is skipped): device, dtype, and no tensor subclass."""
    device = first.device
    if backend(device) != "triton":
        return False
    dtypes = _INTERPRETED_DTYPES if INTERPRET else _KERNEL_DTYPES
    for t in (first, *others):
        # A DTensor has to go through ops that know how to shard, which ours do not.
        if t is not None and (t.dtype not in dtypes or type(t) not in _PLAIN_TYPES or t.device != device):
            return False
    return True


def require_floating(name: str, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError for integers and complex numbers, which a reference would round or cut without a word.

    Asked only where the kernels do not run: they take floating dtypes alone.
    """
    for argument, t in tensors.items():
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{name}: {argument} is of {t.dtype}; it must be of a floating-point dtype.")


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op on `dtype` computes in: float64 stays (gradient checks), all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _autocast_on(device_type: str) -> bool:
    # Not torch.amp.is_autocast_available: torch 2.11 cannot trace it. Meta is the one device without autocast.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that a GEMM on `x` runs in under autocast; None without it, and for float64, which it leaves alone."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if _autocast_on(kind) and x.dtype != torch.float64 else None


def autocast_off(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """For backward passes: ``loss.backward()`` may run inside an autocast region that the forward pass was not in."""
    return torch.autocast(device_type, enabled=False) if _autocast_on(device_type) else contextlib.nullcontext()


def unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if its last dimension is not laid out element after element."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_rows_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, in the layout that an elementwise torch op on `x` gives, the last dimension unit-strided."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def row_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The distance between consecutive rows (last dimensions) of a tensor, in elements; None if no single one fits."""
    found: int | None = None
    following = 0
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if found is None:
            found = stride
        elif stride != following:
            return None
        following = stride * size
    return shape[-1] if found is None else found


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


class Launch:
    """One way to launch one kernel: its grid, the arguments that a shape decides, and what was compiled for them.

    Triton's own launch looks at every argument anew, for its kind and divisibility, and at the kernel's globals. An
    op that has looked up its `Launch` by shape, strides and dtypes knows all of that but for the alignment of its
    pointers, so the compiled kernel can be called at once.

    Args:
        kernel: a ``triton.jit`` function that takes pointers, then floats, then what `fixed` holds.
        grid: programs along the first axis.
        fixed: the remaining arguments in order: sizes, strides, compile-time constants.
        options: num_warps and the like.
    """

    __slots__ = ("fixed", "grid", "kernel", "options", "run")

    def __init__(self, kernel: Any, grid: int, *fixed: Any, **options: Any) -> None:
        self.kernel, self.grid, self.fixed, self.options = kernel, grid, fixed, options
        self.run: Callable[..., Any] | None = None

    def __call__(self, pointers: tuple[torch.Tensor | None, ...], *floats: float) -> None:
        """`pointers`: tensors of one device, or None where the constants say that it is not read."""
        first = pointers[0]
        assert first is not None
        if INTERPRET:
            self.kernel[(self.grid,)](*pointers, *floats, *self.fixed, **self.options)
            return
        if first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                self._launch(pointers, floats)
        else:
            self._launch(pointers, floats)

    def _launch(self, pointers: tuple[torch.Tensor | None, ...], floats: tuple[float, ...]) -> None:
        addresses = [None if t is None else t.data_ptr() for t in pointers]
        aligned = True
        for address in addresses:
            aligned = aligned and (address is None or address % 16 == 0)
        if aligned and self.run is not None:
            self.run(*addresses, *floats, *self.fixed)
            return
        compiled = self.kernel[(self.grid,)](*pointers, *floats, *self.fixed, **self.options)
        if aligned:
            self.run = compiled[(self.grid, 1, 1)]


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
            None for an output that nobody used. Second derivatives are refused.
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
            # AOT autograd traces backward formulas outside of Dynamo (torch 2.11), with tensors of a type of its own.
            if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN_TYPES:
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
    def forward(ctx: Any, *args: Any) -> Any:
        outputs = launch(*args)
        ctx.set_materialize_grads(False)
        setup_context(ctx, args, outputs)
        if aside:
            ctx.mark_non_differentiable(*(outputs[i] for i in aside))
        return outputs

    @once_differentiable  # or kernels, which autograd does not see, would leave their part out without a word
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return backward_formula(ctx, *grads)

    # By `type`, so that profiles and graphs show the op's name.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    apply: Callable[..., Any] = function.apply
    return apply
