"""What `bench ops` times: the ops, their shapes and layouts, the sides that compete, and the bytes that must move.

**Bytes.** Each tensor that an op takes is read once, each that it gives is written once; nothing else counts. With
T tokens, H hidden, I intermediate, D the head dimension, N all query and key heads, and `i` bytes an element:

    op                 forward                        backward
    rms_norm           2 T H i + H i                  3 T H i + 2 H i       (y's gradient, x; x's gradient)
    rms_norm_residual  4 T H i + H i                  4 T H i + 2 H i       (two gradients, h; one gradient for both)
    swiglu, geglu      3 T I i                        5 T I i
    qk_rope            2 T N D i + T D i              the same: saved are only cos and sin
    qk_norm            2 T N D i + 2 D i              3 T N D i + 4 D i
    qk_norm_rope       qk_norm + T D i                qk_norm + T D i

Of cos and sin one half each counts: the other repeats it. The norms' weights count as inputs both ways, and their
gradients as outputs, in the weights' own dtype. Private float32 buffers (the rows' statistics, partial sums of weight
gradients) do not count: how many there are is the implementation's choice. A side that moves more, eager above all, is
held to the same bytes.

**Sides.** `eager` is what transformers' models run, roundings included. `compile` is that under
`torch.compile(fullgraph=True, dynamic=False)`. Liger and quack are called as their own modules call them, with those
modules' defaults, and so is ours as the models that it patches call it (the halves of cos and sin are known to be
equal, as Liger takes for granted). For the norm with a residual Liger's is its `LigerFusedAddRMSNormFunction`, the
faster of its two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from chronicals_trl import kernels
from chronicals_trl.bench.common import NotOffered
from chronicals_trl.bench.timing import BufferSet

__all__ = ["OPS", "SHAPES", "SIDES", "Op", "Shape", "load_side", "make_buffers"]

EPS = 1e-6
SIDES = ("ours", "eager", "compile", "liger", "quack")

Outputs = torch.Tensor | tuple[torch.Tensor, ...]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """One model's sizes: tokens in the batch, hidden, intermediate, query heads, key heads, head dimension."""

    name: str
    tokens: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", 16384, 896, 4864, 14, 2, 64),
        Shape("qwen2.5-1.5b", 16384, 1536, 8960, 12, 2, 128),
        Shape("llama-3-8b", 8192, 4096, 14336, 32, 8, 128),
    )
}


@dataclass(frozen=True)
class Op:
    """One op as all sides compute it.

    Args:
        name: What `--ops` takes.
        make: Builds the arguments in float32 on the CPU or GPU of the generator, in the layout that models have.
        outputs: How many outputs there are. Output i has the shape and layout of argument i.
        constants: How many arguments, the last ones, need no gradient (cos and sin).
        elements: Elements that have to move, forward and backward; see the module's table.
        eager: The op as transformers writes it; in float64 it is the reference.
        ours: The fused op.
        peers: Side to a function that imports it and returns the op.
    """

    name: str
    make: Callable[[Shape, torch.Generator], tuple[torch.Tensor, ...]]
    outputs: int
    elements: Callable[[Shape], tuple[int, int]]
    eager: Call
    ours: Call
    peers: Mapping[str, Callable[[], Call]] = field(default_factory=dict)
    constants: int = 0

    def bytes_moved(self, shape: Shape, itemsize: int) -> dict[str, int]:
        """Direction to bytes, each input read once and each output written once."""
        forward, backward = self.elements(shape)
        return {"forward": forward * itemsize, "backward": backward * itemsize}


def make_buffers(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device) -> BufferSet:
    """Arguments from a fixed seed, and incoming gradients, uniform in [-1, 1], in the layout of the outputs."""
    generator = torch.Generator(device).manual_seed(0)
    args = tuple(t.to(dtype) for t in op.make(shape, generator))
    for t in args[: len(args) - op.constants]:
        t.requires_grad_(True)
    grads = tuple(torch.empty_like(t).uniform_(-1, 1, generator=generator) for t in args[: op.outputs])
    return BufferSet(args, tuple(g.detach() for g in grads))


def load_side(op: Op, side: str) -> Call:
    """The op of one side. Raises `NotOffered`, or what importing the library raises."""
    if side == "ours":
        return op.ours
    if side == "eager":
        return op.eager
    if side == "compile":
        torch.compiler.reset()  # nothing of the last op or shape may make it fall back to dynamic shapes
        compiled: Call = torch.compile(op.eager, fullgraph=True, dynamic=False)
        return compiled
    if side not in op.peers:
        raise NotOffered(f"{side} has no such op")
    return op.peers[side]()


# -- arguments, in the layouts that transformers' models have ---------------------------------------------------------


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _weight(generator: torch.Generator, width: int) -> torch.Tensor:
    return 1 + 0.1 * _normal(generator, width)


def _norm_args(shape: Shape, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return _normal(generator, 1, shape.tokens, shape.hidden), _weight(generator, shape.hidden)


def _residual_args(shape: Shape, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return _normal(generator, 1, shape.tokens, shape.hidden), *_norm_args(shape, generator)


def _mlp_args(shape: Shape, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    size = (1, shape.tokens, shape.intermediate)
    return _normal(generator, *size), _normal(generator, *size)


def _heads(shape: Shape, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """q and k as projections leave them: (1, T, heads, D)."""
    return tuple(_normal(generator, 1, shape.tokens, n, shape.head_dim) for n in (shape.q_heads, shape.kv_heads))


def _rotary(shape: Shape, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """cos and sin (1, T, D) of positions 0 to T - 1, both halves alike."""
    steps = torch.arange(0, shape.head_dim, 2, device=generator.device) / shape.head_dim
    angle = torch.arange(shape.tokens, device=generator.device)[:, None] * 10_000.0**-steps
    angle = torch.cat((angle, angle), -1)[None]
    return angle.cos(), angle.sin()


def _rope_args(shape: Shape, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """q and k as attention has them, (1, heads, T, D) views of (1, T, heads, D); cos, sin."""
    return *(t.transpose(1, 2) for t in _heads(shape, generator)), *_rotary(shape, generator)


def _qk_norm_args(shape: Shape, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    weights = (_weight(generator, shape.head_dim), _weight(generator, shape.head_dim))
    return *_heads(shape, generator), *weights


def _qk_norm_rope_args(shape: Shape, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    q, k, *weights = _qk_norm_args(shape, generator)
    return q.transpose(1, 2), k.transpose(1, 2), *weights, *_rotary(shape, generator)


# -- eager: transformers' code ----------------------------------------------------------------------------------------


def _eager_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm; float64 stays, for the reference."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def _eager_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Outputs:
    h = residual + x
    return _eager_rms_norm(h, weight), h


def _eager_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _eager_geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _eager_rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Outputs:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _pair(norm: Call) -> Call:
    """A norm of q and of k, each with its weight, on (1, T, heads, D)."""
    return lambda q, k, q_weight, k_weight: (norm(q, q_weight), norm(k, k_weight))


def _pair_then_rope(norm: Call, rope: Call) -> Call:
    """The norms before the transposition, as Qwen3's attention has them, then the rotation."""

    def call(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> Any:
        q, k = norm(q.transpose(1, 2), q_weight), norm(k.transpose(1, 2), k_weight)
        return rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return call


# -- peers, imported when they are asked for --------------------------------------------------------------------------


def _liger_rms_norm() -> Call:
    from liger_kernel.ops import LigerRMSNormFunction

    # offset, casting_mode, in_place (the gradient is written over y's), row_mode: LigerRMSNorm's defaults.
    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", True, None)


def _liger_residual() -> Call:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(
        x, residual, weight, EPS, 0.0, "llama", False
    )


def _liger_swiglu() -> Call:
    from liger_kernel.ops import LigerSiLUMulFunction

    call: Call = LigerSiLUMulFunction.apply
    return call


def _liger_geglu() -> Call:
    from liger_kernel.ops import LigerGELUMulFunction

    call: Call = LigerGELUMulFunction.apply
    return call


def _liger_rope() -> Call:
    from liger_kernel.ops import LigerRopeFunction

    call: Call = LigerRopeFunction.apply
    return call


def _quack_rms_norm() -> Call:
    from quack import rmsnorm

    return lambda x, weight: rmsnorm(x, weight, eps=EPS)


def _quack_residual() -> Call:
    from quack import rmsnorm

    return lambda x, residual, weight: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)


# -- the ops ----------------------------------------------------------------------------------------------------------


def _hidden(s: Shape) -> int:
    return s.tokens * s.hidden


def _qk(s: Shape) -> int:
    return s.tokens * (s.q_heads + s.kv_heads) * s.head_dim


def _all_ops() -> dict[str, Op]:
    ops = [
        Op(
            "rms_norm", _norm_args, 1, lambda s: (2 * _hidden(s) + s.hidden, 3 * _hidden(s) + 2 * s.hidden),
            _eager_rms_norm, lambda x, weight: kernels.rms_norm(x, weight, EPS),
            {"liger": _liger_rms_norm, "quack": _quack_rms_norm},
        ),
        Op(
            "rms_norm_residual", _residual_args, 2,
            lambda s: (4 * _hidden(s) + s.hidden, 4 * _hidden(s) + 2 * s.hidden),
            _eager_residual, lambda x, residual, weight: kernels.rms_norm(x, weight, EPS, residual=residual),
            {"liger": _liger_residual, "quack": _quack_residual},
        ),
        Op(
            "swiglu", _mlp_args, 1, lambda s: (3 * s.tokens * s.intermediate, 5 * s.tokens * s.intermediate),
            _eager_swiglu, kernels.swiglu, {"liger": _liger_swiglu},
        ),
        Op(
            "geglu", _mlp_args, 1, lambda s: (3 * s.tokens * s.intermediate, 5 * s.tokens * s.intermediate),
            _eager_geglu, kernels.geglu, {"liger": _liger_geglu},
        ),
        Op(
            "qk_rope", _rope_args, 2, lambda s: (2 * _qk(s) + s.tokens * s.head_dim,) * 2,
            _eager_rope, partial(kernels.qk_rope, repeats=True), {"liger": _liger_rope}, constants=2,
        ),
        Op(
            "qk_norm", _qk_norm_args, 2, lambda s: (2 * _qk(s) + 2 * s.head_dim, 3 * _qk(s) + 4 * s.head_dim),
            _pair(_eager_rms_norm), _pair(lambda x, weight: kernels.rms_norm(x, weight, EPS)),
            {"liger": lambda: _pair(_liger_rms_norm()), "quack": lambda: _pair(_quack_rms_norm())},
        ),
    ]  # fmt: skip
    fused = getattr(kernels, "qk_norm_rope", None)
    if fused is not None:
        ops.append(
            Op(
                "qk_norm_rope", _qk_norm_rope_args, 2,
                lambda s: (
                    2 * _qk(s) + 2 * s.head_dim + s.tokens * s.head_dim,
                    3 * _qk(s) + 4 * s.head_dim + s.tokens * s.head_dim,
                ),
                _pair_then_rope(_eager_rms_norm, _eager_rope),
                lambda q, k, q_weight, k_weight, cos, sin: fused(
                    q, k, q_weight, k_weight, EPS, cos, sin, repeats=True
                ),
                {"liger": lambda: _pair_then_rope(_liger_rms_norm(), _liger_rope())}, constants=2,
            )
        )  # fmt: skip
    return {op.name: op for op in ops}


OPS: dict[str, Op] = _all_ops()
