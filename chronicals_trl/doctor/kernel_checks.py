"""Each fused op on a small input, forward and backward, against the formula in plain torch.

On a GPU the Triton kernels run, and a kernel that was not launched fails its check; on a CPU the op's own reference
runs. The formulas here are written anew from torch's own functions, in float32: a reference compared with itself would
prove nothing.

Legend: B batch, S sequence, D head dimension, N tokens, H hidden, I intermediate, V vocabulary, R rank.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chronicals_trl import kernels
from chronicals_trl.doctor.findings import Check, Problem, first_line
from chronicals_trl.kernels import LAUNCHES, LoraOperands
from chronicals_trl.model.match import compare, probing, randn

Draw = Callable[..., Tensor]

HIDDEN, INTERMEDIATE, VOCABULARY, RANK, SCALE, EPS = 48, 80, 131, 8, 0.5, 1e-6


@dataclass(frozen=True)
class Case:
    """One op on one input.

    Args:
        ours, plain: Take `inputs`, whose gradients are compared; return a tensor or a tuple of tensors.
        launches: Kernels that have to run on a GPU, by their names in `LAUNCHES`.
    """

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    launches: tuple[str, ...]


def check_kernels(device: torch.device) -> list[Check]:
    """One check for each op of `CASES`, on `device`, in the dtype that training has there."""
    dtype = probe_dtype(device)
    checks = []
    for name, build in CASES.items():
        start, before = time.perf_counter(), Counter(LAUNCHES)
        detail = None
        try:
            with probing(device) as generator:
                case = build(lambda *shape, g=generator: randn(*shape, generator=g, device=device, dtype=dtype))
                compare(_in_full(case.ours, dtype), _in_full(case.plain, dtype), case.inputs, ())
        except Exception as error:  # a Mismatch, or whatever a compiler or driver raises: it is what was asked for
            detail = first_line(error) if type(error).__name__ == "Mismatch" else f"{type(error).__name__}: {error}"
        launched = LAUNCHES - before
        if detail is None and kernels.backend(device) == "triton":
            missing = [kernel for kernel in case.launches if not launched[kernel]]
            detail = f"not launched: {', '.join(missing)}" if missing else None
        ran = "triton" if launched else "torch"
        seconds = round(time.perf_counter() - start, 3)
        checks.append(Check(name, "ok" if detail is None else "failed", ran, detail, seconds))
    return checks


def probe_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU that has it, fp16 on an older one, fp32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def _in_full(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """`function` with its outputs in `dtype`, by which `compare` knows how much rounding there may be."""

    def call(*inputs: Tensor) -> Any:
        outputs = function(*inputs)
        return tuple(t.to(dtype) for t in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return call


def kernel_problems(checks: list[Check]) -> list[Problem]:
    """One problem for each cause: without a C compiler, say, all kernels fail for the same reason."""
    failed: dict[str, list[str]] = {}
    for check in checks:
        if check.state == "failed" and check.detail is not None:
            failed.setdefault(check.detail.strip().splitlines()[0], []).append(check.name)
    return [
        Problem(f"Self-check failed for {', '.join(names)}: {detail.rstrip('. ')}", _remedy(detail), fatal=True)
        for detail, names in failed.items()
    ]


_REMEDIES = (
    ("C compiler", "Triton compiles a small C file on first use: install gcc, or name a compiler in CC"),
    ("Python.h", "Triton needs Python's headers: install the package python3-dev (or python3-devel)"),
    ("libcuda", "Triton does not find the driver's libcuda.so: in a container, start it with the NVIDIA runtime"),
    ("active driver", "Triton sees no GPU driver: check nvidia-smi in this very environment"),
    ("no kernel image", "This GPU is not one that the installed torch and triton are built for: use another build"),
    ("out of memory", "Another process has the GPU's memory: free it, and run the doctor again"),
    ("Permission denied", "Triton cannot write its cache: set TRITON_CACHE_DIR to a folder that you may write to"),
    ("No space left", "Triton cannot write its cache: free some space, or set TRITON_CACHE_DIR to another folder"),
)


def _remedy(detail: str) -> str:
    for words, remedy in _REMEDIES:
        if words in detail:
            return remedy
    return (
        "Reinstall triton in the version that this torch names (pip show torch); if it goes on failing, report it: a "
        "run leaves such parts out, and its table says so"
    )


# -- the cases -------------------------------------------------------------------------------------------------------


def _rms_norm(draw: Draw) -> Case:
    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return F.rms_norm(h.float(), (HIDDEN,), weight.float(), EPS), h

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.rms_norm(x, weight, EPS, residual=residual)

    inputs = (draw(2, 7, HIDDEN), draw(2, 7, HIDDEN), draw(HIDDEN))
    return Case(ours, plain, inputs, ("rms_norm", "rms_norm_backward"))


def _swiglu(draw: Draw) -> Case:
    inputs = (draw(2, 7, INTERMEDIATE), draw(2, 7, INTERMEDIATE))
    return Case(kernels.swiglu, _plain_swiglu, inputs, ("gated_mlp", "gated_mlp_backward"))


def _plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.float()) * up.float()


def _geglu(draw: Draw) -> Case:
    inputs = (draw(2, 7, INTERMEDIATE), draw(2, 7, INTERMEDIATE))
    return Case(
        kernels.geglu,
        lambda gate, up: F.gelu(gate.float(), approximate="tanh") * up.float(),
        inputs,
        ("gated_mlp", "gated_mlp_backward"),
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers turns the first half of the head dimension against the second."""
    x = x.float()
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def _tables(draw: Draw) -> tuple[Tensor, Tensor]:
    """cos and sin (B, S, D) of angles that repeat over the two halves."""
    angles = draw(2, 9, 8).float().repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def _qk_rope(draw: Draw) -> Case:
    cos, sin = _tables(draw)
    return Case(
        lambda q, k: kernels.qk_rope(q, k, cos.to(q.dtype), sin.to(q.dtype)),
        lambda q, k: tuple(_rotated(t, cos.to(t.dtype).float(), sin.to(t.dtype).float()) for t in (q, k)),
        (draw(2, 4, 9, 16), draw(2, 2, 9, 16)),
        ("qk_rope", "qk_rope_backward"),
    )


def _qk_norm_rope(draw: Draw) -> Case:
    cos, sin = _tables(draw)

    def plain(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        pairs = ((q, q_weight), (k, k_weight))
        return tuple(_rotated(F.rms_norm(t.float(), (16,), w.float(), EPS), cos, sin) for t, w in pairs)

    return Case(
        lambda q, k, q_weight, k_weight: kernels.qk_norm_rope(q, k, q_weight, k_weight, EPS, cos, sin),
        plain,
        (draw(2, 4, 9, 16), draw(2, 2, 9, 16), draw(16), draw(16)),
        ("qk_norm_rope", "qk_norm_rope_backward"),
    )


def _cross_entropy(draw: Draw, tokens: int, vocabulary: int, budget: int | None, launches: tuple[str, ...]) -> Case:
    weight = draw(vocabulary, HIDDEN) * HIDDEN**-0.5
    labels = torch.arange(tokens, device=weight.device) * 37 % vocabulary
    labels[::5] = -100

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(hidden, weight, labels, logit_budget_mib=budget).loss

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden.float(), weight.float()), labels)

    if weight.dtype != torch.float16:  # whose gradients are scaled in float32, by torch
        launches = (*launches, "scale_unless_one")
    return Case(ours, plain, (draw(tokens, HIDDEN), weight), launches)


def _linear_cross_entropy(draw: Draw) -> Case:
    return _cross_entropy(draw, 33, VOCABULARY, None, ("softmax_pass",))


def _linear_cross_entropy_tiles(draw: Draw) -> Case:
    """So many logits that the smallest budget cuts the vocabulary in tiles."""
    return _cross_entropy(draw, 36, 16_001, 1, ("fold_pass", "gradient_pass"))


def _adapters(draw: Draw, *sizes: tuple[int, int]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Frozen weights (O, I), and A (R, I) and B (O, R) of each."""
    weights = [draw(outputs, inputs) * inputs**-0.5 for outputs, inputs in sizes]
    pairs = [(draw(RANK, inputs) * inputs**-0.5, draw(outputs, RANK) * RANK**-0.5) for outputs, inputs in sizes]
    return weights, tuple(t for pair in pairs for t in pair)


def _plain_lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, read: Tensor | None = None) -> Tensor:
    """`read`: what A reads in the place of `x`, after dropout."""
    read = x if read is None else read
    return F.linear(x.float(), weight.float()) + SCALE * F.linear(F.linear(read.float(), a.float()), b.float())


def _lora_linear(draw: Draw) -> Case:
    (weight,), adapter = _adapters(draw, (INTERMEDIATE, HIDDEN))
    return Case(
        lambda x, a, b: kernels.lora_linear(x, weight, a, b, SCALE),
        lambda x, a, b: _plain_lora(x, weight, a, b),
        (draw(21, HIDDEN), *adapter),
        (),  # GEMMs, which are torch's
    )


def _lora_dropout(draw: Draw) -> Case:
    (weight,), adapter = _adapters(draw, (INTERMEDIATE, HIDDEN))

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)  # the mask is drawn as torch draws it
        return kernels.lora_linears(x, [LoraOperands(weight, None, a, b, SCALE, 0.25)])[0]

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        return _plain_lora(x, weight, a, b, F.dropout(x, 0.25))

    return Case(ours, plain, (draw(21, HIDDEN), *adapter), ("lora_dropout", "lora_dropout_backward"))


def _lora_gated_mlp(draw: Draw) -> Case:
    sizes = (INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    weights, adapters = _adapters(draw, *sizes)

    def ours(x: Tensor, *adapters: Tensor) -> Tensor:
        pairs = zip(adapters[::2], adapters[1::2], strict=True)
        *inner, down = (LoraOperands(w, None, a, b, SCALE) for w, (a, b) in zip(weights, pairs, strict=True))
        return kernels.lora_gated_mlp(x, inner, down)

    def plain(x: Tensor, *adapters: Tensor) -> Tensor:
        pairs = list(zip(weights, adapters[::2], adapters[1::2], strict=True))
        gate, up = (_plain_lora(x, *pair) for pair in pairs[:2])
        return _plain_lora(_plain_swiglu(gate, up), *pairs[2])

    return Case(ours, plain, (draw(21, HIDDEN), *adapters), ("lora_gated", "lora_gated_backward"))


def _shared_linear(draw: Draw) -> Case:
    """As q, k and v take it; the kernel is the gradient of the biases."""
    weights = tuple(draw(size, HIDDEN) * HIDDEN**-0.5 for size in (32, 16, 16))
    return Case(
        lambda x, *rest: kernels.shared_linear(x, rest[:3], rest[3:]),
        lambda x, *rest: tuple(
            F.linear(x.float(), w.float(), b.float()) for w, b in zip(rest[:3], rest[3:], strict=True)
        ),
        (draw(2, 7, HIDDEN), *weights, draw(32), draw(16), draw(16)),
        ("column_sums",),
    )


CASES: dict[str, Callable[[Draw], Case]] = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "qk_rope": _qk_rope,
    "qk_norm_rope": _qk_norm_rope,
    "shared_linear": _shared_linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy, tiles": _linear_cross_entropy_tiles,
    "lora_linear": _lora_linear,
    "lora_linear, dropout": _lora_dropout,
    "lora_gated_mlp": _lora_gated_mlp,
}
