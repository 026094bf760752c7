"""Checks of the ops that the CPU, the interpreter and the GPU tests share: each judged against eager's own error.

An op in some dtype may be as far from the float64 result as twice eager torch's distance in that dtype, plus one
rounding of the value and one of the typical value. Eager here is what transformers' models do, roundings included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from chronicals_trl import kernels

Tensors = tuple[torch.Tensor, ...]
Case = tuple[Callable[..., Tensors], Callable[..., Tensors], Callable[..., Tensors]]


def assert_as_accurate(
    name: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, summed: bool = False
) -> None:
    """Each element of `ours` within ``2 |eager - exact| + eps (|exact| + mean |exact|)`` of `exact`.

    The last term is one rounding; its mean is of the element's row, or of the tensor if that is larger.

    Where an element is a sum of many terms as rounded as itself (all of float32, and GEMMs: `summed`), eager's error
    in it is chance and often 0: held against ours as the exact one's rival, eager fails that test as often as ours.
    There the same is asked of the root mean square over the tensor, and no element may be off by more than chance
    gives, which is four times eager's worst and one rounding.
    """
    assert ours.shape == exact.shape, (name, ours.shape, exact.shape)
    if exact.numel() == 0:
        return
    ours, eager, exact = (t.detach().double() for t in (ours, eager, exact))
    typical = exact.abs().mean()
    if exact.dim():
        typical = exact.abs().mean(-1, keepdim=True).clamp(min=typical)
    rounding = (torch.finfo(dtype).eps * (exact.abs() + typical)).clamp(min=1e-300)
    error, eager_error = (ours - exact).abs() / rounding, (eager - exact).abs() / rounding
    if summed or dtype == torch.float32:
        rms, eager_rms = (float(e.square().mean().sqrt()) for e in (error, eager_error))
        assert rms <= 2 * eager_rms + 1, f"{name}: off by {rms:.3g} roundings, eager by {eager_rms:.3g} (rms)"
        allowed = (4 * (eager_error.max() + 1)).expand_as(error)
    else:
        allowed = 2 * eager_error + 1
    excess = error - allowed
    worst = excess.argmax()
    assert bool((excess <= 0).all()), (
        f"{name}: {int((~(excess <= 0)).sum())} of {excess.numel()} elements off, the worst "
        f"{ours.flatten()[worst]:.9g} for {exact.flatten()[worst]:.9g} (eager {eager.flatten()[worst]:.9g})"
    )


def run(fn: Callable[..., Tensors], inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> Tensors:
    """Outputs of `fn`, then the gradients of those `inputs` that require one, for the upstream `grads`."""
    outputs = fn(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    return (
        *outputs,
        *torch.autograd.grad(outputs, wanted, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]),
    )


def compare(
    name: str, case: Case, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], summed: bool = False
) -> None:
    """Run ours and eager on `inputs`, the definition on them in float64; compare all outputs and gradients."""
    ours_fn, eager_fn, exact_fn = case
    kept = [t.detach().clone() for t in (*inputs, *grads)]
    ours = run(ours_fn, inputs, grads)
    for before, after in zip(kept, (*inputs, *grads), strict=True):
        assert torch.equal(before, after), f"{name} wrote into a tensor that it was given"
    eager = run(eager_fn, inputs, grads)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    exact = run(exact_fn, wide, [g.double() for g in grads])
    dtype = inputs[0].dtype
    for i, (o, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_as_accurate(f"{name}[{i}]", o, e, x, dtype, summed)


def leaf(
    shape: Sequence[int], dtype: torch.dtype, device: str, scale: float = 1.0, shift: float = 0.0
) -> torch.Tensor:
    return (torch.randn(*shape, device=device) * scale + shift).to(dtype).requires_grad_()


# RMSNorm ------------------------------------------------------------------------------------------------------------


def eager_rms_norm(x, weight, eps, offset, residual=None):
    """transformers' LlamaRMSNorm, or Gemma's with offset 1, behind an eager residual addition."""
    h = x if residual is None else residual + x
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = (unit * (offset + weight.to(unit.dtype))).to(h.dtype) if offset else weight * unit.to(h.dtype)
    return (y,) if residual is None else (y, h)


def check_rms_norm(
    device: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    residual: bool = False,
    transposed: bool = False,
) -> None:
    torch.manual_seed(0)
    eps = 1e-6
    view = (lambda t: t.transpose(1, 2)) if transposed else (lambda t: t)

    def as_tuple(out):
        return out if isinstance(out, tuple) else (out,)

    def ours(x, w, *r):
        out = as_tuple(kernels.rms_norm(view(x), w, eps, offset=offset, residual=view(r[0]) if r else None))
        assert all(o.dtype == dtype for o in out)
        return out

    def eager(x, w, *r):
        return eager_rms_norm(view(x), w, eps, offset, *(view(t) for t in r))

    inputs = [leaf(shape, dtype, device, scale), leaf(shape[-1:], dtype, device, 0.3, 1.0 - offset)]
    if residual:
        inputs.append(leaf(shape, dtype, device, scale))
    grads = [torch.randn_like(view(inputs[0])) for _ in range(1 + residual)]
    compare("rms_norm", (ours, eager, eager), inputs, grads)


# Gated MLP ----------------------------------------------------------------------------------------------------------


def check_gated_mlp(
    device: str, dtype: torch.dtype, shape: Sequence[int], *, gelu: bool, scale: float = 1.0, fused: bool = False
) -> None:
    torch.manual_seed(0)
    op = kernels.geglu if gelu else kernels.swiglu

    def eager(*tensors):
        gate, up = tensors[0].chunk(2, -1) if fused else tensors
        return ((F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up,)

    def ours(*tensors):
        gate, up = tensors[0].chunk(2, -1) if fused else tensors
        return (op(gate, up),)

    if fused:
        inputs = [leaf((*shape[:-1], 2 * shape[-1]), dtype, device, scale)]
    else:
        # float16 ends at 65504: only the argument of the activation is scaled
        inputs = [leaf(shape, dtype, device, scale), leaf(shape, dtype, device, min(scale, 1.0))]
    compare(op.__name__, (ours, eager, eager), inputs, [torch.randn(*shape, device=device).to(dtype)])


# QK-RoPE ------------------------------------------------------------------------------------------------------------


def eager_rope(q, k, cos, sin):
    """transformers' apply_rotary_pos_emb (Llama; Phi-3 with a partial rotary width)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = cos.shape[-1]

    def rotate_half(x):
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    def apply(x):
        rot, rest = x[..., :width], x[..., width:]
        return torch.cat([rot * cos + rotate_half(rot) * sin, rest], dim=-1)

    return apply(q), apply(k)


def rope_tables(batch: int, seq_len: int, width: int, device: str) -> Tensors:
    """cos and sin (batch, S, R) of shuffled positions, the two halves equal, as models make them."""
    positions = torch.stack([torch.randperm(4 * seq_len)[:seq_len] for _ in range(batch)])
    angles = positions[..., None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], dim=-1).to(device)
    return angles.cos(), angles.sin()


def check_qk_rope(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    *,
    rotary_dim: int | None = None,
    table_batch: int = 1,
    scale: float = 1.0,
    uneven: bool = False,
) -> None:
    """`shape` is (B, Hq, Hk, S, D); q and k lie in memory as (B, S, heads, D), as the projections give them."""
    torch.manual_seed(0)
    batch, n_q, n_k, seq_len, head_dim = shape
    cos, sin = (t.to(dtype) for t in rope_tables(table_batch, seq_len, rotary_dim or head_dim, device))
    if uneven:  # the op promises the formula for any table, also one whose halves differ
        cos, sin = torch.randn_like(cos), torch.randn_like(sin)

    def ours(q, k):
        out = kernels.qk_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        assert all(o.dtype == dtype for o in out)
        return out

    def eager(q, k):
        return eager_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    inputs = [leaf((batch, seq_len, n, head_dim), dtype, device, scale) for n in (n_q, n_k)]
    grads = [torch.randn(batch, n, seq_len, head_dim, device=device).to(dtype) for n in (n_q, n_k)]
    compare("qk_rope", (ours, eager, eager), inputs, grads)


# Linear cross-entropy -----------------------------------------------------------------------------------------------


def ce_inputs(
    device: str, dtype: torch.dtype, n: int, h: int, v: int, *, scale: float = 1.0, ignored: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden, weight and bias as leaves, and labels of which the share `ignored` is -100."""
    torch.manual_seed(0)
    hidden, weight = leaf((n, h), dtype, device, scale), leaf((v, h), dtype, device, h**-0.5)
    bias = leaf((v,), dtype, device, 0.1)
    labels = torch.randint(0, v, (n,), device=device)
    labels[torch.randperm(n, device=device)[: round(ignored * n)]] = -100
    return hidden, weight, bias, labels


def check_linear_cross_entropy(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    *,
    scale: float = 1.0,
    ignored: float = 0.2,
    huge: bool = False,
    bias: bool = False,
    parts: Sequence[str] = ("loss",),
    budget: int = 1,
    differentiate: str = "all",
    **options: object,
) -> None:
    """`parts` of the output are differentiated, all are compared; `huge` puts one logit far above the others."""
    hidden, weight, bias_V, labels = ce_inputs(device, dtype, *shape, scale=scale, ignored=ignored)
    if huge:
        with torch.no_grad():
            hidden[0], weight[3] = 0, 0
            hidden[0, 0], weight[3, 0] = 100.0, 50.0
        labels[0] = 1  # which has probability 0, and a loss of 5000
    inputs = [hidden, weight, *([bias_V] if bias else [])]

    def outputs(out):
        rest = [getattr(out, name) for name in ("loss", "log_probs", "entropy") if name not in parts]
        return [getattr(out, name) for name in parts], rest

    checked: dict[str, list[torch.Tensor]] = {}

    def make(kind, op, extra):
        def fn(h, w, b=None):
            out = op(h, w, labels, bias=b, **options, **extra)
            diff, checked[kind] = outputs(out)
            checked[kind].append(out.is_top1)
            return tuple(diff)

        return fn

    reference = kernels.linear_cross_entropy_reference
    extra = {"logit_budget_mib": budget, "differentiate": differentiate}
    case = (
        make("ours", kernels.linear_cross_entropy, extra),
        make("eager", reference, {}),
        make("exact", reference, {}),
    )
    with torch.no_grad():
        sizes = [o.shape for o in case[1](*inputs)]
    grads = [torch.randn(size, device=device) for size in sizes]
    compare("linear_cross_entropy", case, inputs, grads, summed=True)
    *rest, is_top1 = checked["ours"]
    for i, tensor in enumerate(rest):
        eager, exact = checked["eager"][i], checked["exact"][i]
        assert_as_accurate(f"undifferentiated[{i}]", tensor, eager, exact, dtype, summed=True)
    assert is_top1.dtype == torch.bool
    assert not is_top1[labels == -100].any()
    logits = F.linear(hidden.double(), weight.double(), bias_V.double() if bias else None).detach()
    best = logits.topk(2, dim=-1).values
    clear = (best[:, 0] - best[:, 1]) > 16 * torch.finfo(dtype).eps * logits.abs().amax(-1)
    assert torch.equal(is_top1[clear], checked["exact"][-1][clear])
