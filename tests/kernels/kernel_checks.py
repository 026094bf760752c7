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
    """Outputs of `fn`, then the gradients of those `inputs` that require one (0 if unused), for upstream `grads`."""
    outputs = fn(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    upstream = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    return (*outputs, *torch.autograd.grad(outputs, wanted, upstream, materialize_grads=True))


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


def rows_as(layout: str, shape: Sequence[int]) -> tuple[Sequence[int], Callable[[torch.Tensor], torch.Tensor]]:
    """The shape of a leaf, and the view of it that an op is given; its rows (last dimensions) lie as `layout` says."""
    if layout == "transposed":  # (B, S, heads, D) seen as (B, heads, S, D)
        return shape, lambda t: t.transpose(1, 2)
    if layout == "columns":  # the first columns of a wider tensor: gaps between rows, but one stride
        return (*shape[:-1], shape[-1] + 8), lambda t: t[..., : shape[-1]]
    if layout == "heads of a slice":  # (B, S, heads, D) of a fused projection: no one stride fits
        *outer, heads, width = shape
        return (*outer, (heads + 2) * width), lambda t: t[..., : heads * width].unflatten(-1, (heads, width))
    assert layout == "plain"
    return shape, lambda t: t


def upstream_as(kind: str, like: torch.Tensor) -> torch.Tensor:
    """A random gradient for a result that lies as `like` does: laid out so too, or contiguous, or expanded."""
    shape, options = like.shape, {"device": like.device, "dtype": like.dtype}
    if kind == "one row":
        return torch.randn(shape[-1], **options).expand(shape)
    if kind == "one number":  # what sum() sends back
        return torch.randn((), **options).expand(shape)
    return torch.randn(shape, **options) if kind == "contiguous" else torch.randn_like(like)


def check_rms_norm(
    device: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    residual: bool = False,
    layout: str = "plain",
    upstream: str = "like",
    outputs: Sequence[int] = (0, 1),
) -> None:
    """`outputs` of (y, x + residual) are differentiated; `layout` and `upstream` as above."""
    torch.manual_seed(0)
    eps = 1e-6
    leaf_shape, view = rows_as(layout, shape)
    picked = outputs if residual else (0,)

    def ours(x, w, *r):
        out = kernels.rms_norm(view(x), w, eps, offset=offset, residual=view(r[0]) if r else None)
        out = out if residual else (out,)
        assert all(o.dtype == dtype for o in out)
        return tuple(out[i] for i in picked)

    def eager(x, w, *r):
        out = eager_rms_norm(view(x), w, eps, offset, *(view(t) for t in r))
        return tuple(out[i] for i in picked)

    inputs = [leaf(leaf_shape, dtype, device, scale), leaf(shape[-1:], dtype, device, 0.3, 1.0 - offset)]
    if residual:
        inputs.append(leaf(leaf_shape, dtype, device, scale))
    compare("rms_norm", (ours, eager, eager), inputs, [upstream_as(upstream, view(inputs[0])) for _ in picked])


# Gated MLP ----------------------------------------------------------------------------------------------------------


def eager_activation(gate, up, gelu):
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


def check_gated_activation(
    device: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    *,
    gelu: bool,
    scale: float = 1.0,
    layout: str = "apart",
) -> None:
    """`layout` of gate and up: "apart"; or in one tensor, given as its "halves" or as it is ("joint")."""
    torch.manual_seed(0)
    op = kernels.geglu if gelu else kernels.swiglu

    def eager(*tensors):
        return (eager_activation(*(tensors if layout == "apart" else tensors[0].chunk(2, -1)), gelu),)

    def ours(*tensors):
        return (op(*(tensors[0].chunk(2, -1) if layout == "halves" else tensors)),)

    if layout == "apart":
        # float16 ends at 65504: only the argument of the activation is scaled
        inputs = [leaf(shape, dtype, device, scale), leaf(shape, dtype, device, min(scale, 1.0))]
    else:
        inputs = [leaf((*shape[:-1], 2 * shape[-1]), dtype, device, scale)]
    compare(op.__name__, (ours, eager, eager), inputs, [torch.randn(*shape, device=device).to(dtype)])


def freeze(inputs: dict[str, torch.Tensor], frozen: Sequence[str]) -> list[torch.Tensor]:
    """The inputs, those named in `frozen` without a gradient."""
    for name in frozen:
        inputs[name].requires_grad_(False)
    return list(inputs.values())


def under(autocast: torch.dtype | None, device: str, fn: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """`fn` in an autocast region, which the backward pass, as usual, is not in."""

    def run_in_region(*inputs):
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return fn(*inputs)

    return run_in_region


def check_gated_mlp(
    device: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    inner: int,
    *,
    gelu: bool = False,
    joint: bool = False,
    scale: float = 1.0,
    frozen: Sequence[str] = (),
    autocast: torch.dtype | None = None,
    **options: bool,
) -> None:
    """`shape` is x's, (..., H); `inner` is I; `frozen` names of "x", "gate", "up" and "down"; `options` of the op."""
    torch.manual_seed(0)
    width = shape[-1]

    def ours(x, gate, *rest):
        up, down = (None, *rest) if joint else rest
        out = kernels.gated_mlp(x, gate, up, down, activation="geglu" if gelu else "swiglu", **options)
        assert out.dtype == (autocast or dtype)
        return (out,)

    def eager(x, gate, *rest):
        projected = F.linear(x, gate).chunk(2, -1) if joint else (F.linear(x, gate), F.linear(x, rest[0]))
        return (F.linear(eager_activation(*projected, gelu), rest[-1]),)

    shapes = {"gate": (2 * inner, width)} if joint else {"gate": (inner, width), "up": (inner, width)}
    inputs = {"x": leaf(shape, dtype, device, scale)}
    inputs |= {name: leaf(s, dtype, device, width**-0.5) for name, s in shapes.items()}
    inputs["down"] = leaf((width, inner), dtype, device, inner**-0.5)
    case = (under(autocast, device, ours), under(autocast, device, eager), eager)
    compare("gated_mlp", case, freeze(inputs, frozen), [torch.randn(*shape, device=device).to(dtype)], summed=True)


def check_shared_linear(
    device: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    widths: Sequence[int],
    *,
    biases: Sequence[int] = (),
    outputs: Sequence[int] | None = None,
    frozen: Sequence[str] = (),
    autocast: torch.dtype | None = None,
) -> None:
    """`biases` and `outputs`: indices of the layers with a bias and of the results that are differentiated (all).

    `frozen` names of "x", "w0", "b0", "w1" and so on.
    """
    torch.manual_seed(0)
    picked = range(len(widths)) if outputs is None else outputs

    def arguments(tensors):
        given = iter(tensors)
        weights = [next(given) for _ in widths]
        return weights, [next(given) if i in biases else None for i in range(len(widths))]

    def ours(x, *tensors):
        out = kernels.shared_linear(x, *arguments(tensors))
        return tuple(out[i] for i in picked)

    def eager(x, *tensors):
        out = [F.linear(x, w, b) for w, b in zip(*arguments(tensors), strict=True)]
        return tuple(out[i] for i in picked)

    inputs = {"x": leaf(shape, dtype, device)}
    inputs |= {f"w{i}": leaf((n, shape[-1]), dtype, device, shape[-1] ** -0.5) for i, n in enumerate(widths)}
    inputs |= {f"b{i}": leaf((widths[i],), dtype, device) for i in biases}
    grads = [torch.randn(*shape[:-1], widths[i], device=device).to(dtype) for i in picked]
    case = (under(autocast, device, ours), under(autocast, device, eager), eager)
    compare("shared_linear", case, freeze(inputs, frozen), grads, summed=True)


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


def eager_norm_rope(q, k, q_weight, k_weight, eps, cos, sin, offset=0.0):
    """transformers' Qwen3 attention (Gemma 3's with offset 1): the norm is rounded, then rotated in that dtype."""
    (q,), (k,) = eager_rms_norm(q, q_weight, eps, offset), eager_rms_norm(k, k_weight, eps, offset)
    return eager_rope(q, k, cos, sin)


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
    norm: bool = False,
    offset: float = 0.0,
    rotary_dim: int | None = None,
    table_batch: int = 1,
    scale: float = 1.0,
    uneven: bool = False,
    repeats: bool = False,
    layout: str = "projections",
    outputs: Sequence[int] = (0, 1),
    frozen: Sequence[str] = (),
) -> None:
    """qk_rope, or with `norm` qk_norm_rope. `shape` is (B, Hq, Hk, S, D).

    `layout`: q and k lie in memory as (B, S, heads, D), as the "projections" give them, or as slices of one "fused"
    projection (Phi-3), or "plain". `outputs` of (q, k) are differentiated; `frozen` names inputs.
    """
    torch.manual_seed(0)
    batch, n_q, n_k, seq_len, head_dim = shape
    cos, sin = (t.to(dtype) for t in rope_tables(table_batch, seq_len, rotary_dim or head_dim, device))
    if uneven:  # the op promises the formula for any table, also one whose halves differ
        cos, sin = torch.randn_like(cos), torch.randn_like(sin)

    known = {"repeats": True} if repeats else {}

    def arguments(tensors):
        if layout == "fused":
            sizes = [n * head_dim for n in (n_q, n_k, n_k)]
            q, k, _ = (t.unflatten(-1, (-1, head_dim)) for t in tensors[0].split(sizes, dim=-1))
        else:
            q, k = tensors[:2]
        if layout != "plain":
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return (q, k, *tensors[-2:], 1e-6, cos, sin) if norm else (q, k, cos, sin)

    def ours(*tensors):
        if norm:
            out = kernels.qk_norm_rope(*arguments(tensors), offset=offset, **known)
        else:
            out = kernels.qk_rope(*arguments(tensors), **known)
        assert all(o.dtype == dtype for o in out)
        return tuple(out[i] for i in outputs)

    def eager(*tensors):
        out = eager_norm_rope(*arguments(tensors), offset) if norm else eager_rope(*arguments(tensors))
        return tuple(out[i] for i in outputs)

    if layout == "fused":
        inputs = {"qkv": leaf((batch, seq_len, (n_q + 2 * n_k) * head_dim), dtype, device, scale)}
    else:
        outer = (lambda n: (n, seq_len)) if layout == "plain" else (lambda n: (seq_len, n))
        inputs = {
            name: leaf((batch, *outer(n), head_dim), dtype, device, scale) for name, n in (("q", n_q), ("k", n_k))
        }
    if norm:
        inputs |= {f"{n}_weight": leaf((head_dim,), dtype, device, 0.3, 1.0 - offset) for n in "qk"}
    heads = [(n_q, n_k)[i] for i in outputs]
    grads = [torch.randn(batch, n, seq_len, head_dim, device=device).to(dtype) for n in heads]
    compare("qk_norm_rope" if norm else "qk_rope", (ours, eager, eager), freeze(inputs, frozen), grads)


# All of them in a row, one feeding the next --------------------------------------------------------------------------


def block_inputs(device: str = "cpu", shape: Sequence[int] = (2, 4, 16), head_dim: int = 8) -> Tensors:
    """x and residual (B, S, W), weights (W,) and (D,), which all require a gradient; cos and sin."""
    torch.manual_seed(0)
    leaves = [leaf(s, torch.float32, device) for s in (shape, shape, shape[-1:], (head_dim,))]
    return *leaves, *rope_tables(1, shape[1], head_dim, device)


def block(x, residual, weight, head_weight, cos, sin):
    y, h = kernels.rms_norm(x, weight, 1e-6, residual=residual)
    joint = kernels.geglu(torch.cat([h, y], -1))
    heads = kernels.swiglu(y, joint).unflatten(-1, (-1, head_weight.shape[0])).transpose(1, 2)
    q, k = kernels.qk_rope(heads, kernels.geglu(heads, heads), cos, sin)
    q, k = kernels.qk_norm_rope(q, k, head_weight, head_weight, 1e-6, cos, sin)
    return (q * heads).sum() + k.pow(3).sum() + h.sum()


def eager_block(x, residual, weight, head_weight, cos, sin):
    y, h = eager_rms_norm(x, weight, 1e-6, 0.0, residual)
    joint = eager_activation(h, y, gelu=True)
    heads = eager_activation(y, joint, gelu=False).unflatten(-1, (-1, head_weight.shape[0])).transpose(1, 2)
    q, k = eager_rope(heads, eager_activation(heads, heads, gelu=True), cos, sin)
    q, k = eager_norm_rope(q, k, head_weight, head_weight, 1e-6, cos, sin)
    return (q * heads).sum() + k.pow(3).sum() + h.sum()


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
