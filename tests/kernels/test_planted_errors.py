"""Shows that the checks can fail: each op in turn is replaced by one with a likely mistake, and its check must object.

What stands in is the reference with one thing wrong, so these tests need no kernels.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernels import kernel_checks as check

from chronicals_trl import kernels

# Held on to before anything is replaced.
rms_norm, swiglu, geglu = kernels.rms_norm_reference, kernels.swiglu_reference, kernels.geglu_reference
qk_rope, qk_norm_rope = kernels.qk_rope_reference, kernels.qk_norm_rope_reference


def minus_gradient(x):
    """The value of x, the gradient with the wrong sign."""
    return 2 * x.detach() - x


def with_gradient_of(value, other):
    """The value of `value`, the gradient of `other`."""
    return value.detach() + other - other.detach()


# rms_norm(x, weight, eps, offset=, residual=) ------------------------------------------------------------------------


def over_padded_width(x, weight, eps, offset=0.0, residual=None):
    """The mean is over the block, a power of two."""
    h = x if residual is None else x + residual
    padded = 2 ** (h.shape[-1] - 1).bit_length()
    rstd = torch.rsqrt(h.float().square().sum(-1, keepdim=True) / padded + eps)
    y = (h.float() * rstd * (weight.float() + offset)).to(h.dtype)
    return y if residual is None else (y, h)


def constant_statistics(x, weight, eps, offset=0.0, residual=None):
    """dx = gy w / rms, without the mean's share."""
    rstd = torch.rsqrt(x.detach().float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * rstd * (weight.float() + offset)).to(x.dtype)


def weight_gradient_without_the_last_row(x, weight, eps, offset=0.0, residual=None):
    rows = x.flatten(0, -2)
    parts = rms_norm(rows[:-1], weight, eps, offset), rms_norm(rows[-1:], weight.detach(), eps, offset)
    return torch.cat(parts).view_as(x)


def sum_without_gradient(x, weight, eps, offset=0.0, residual=None):
    y, h = rms_norm(x, weight, eps, offset, residual)
    return y, with_gradient_of(h, 0 * h)


def residual_after_the_norm(x, weight, eps, offset=0.0, residual=None):
    return rms_norm(x, weight, eps, offset), x + residual


RMS_NORM = {
    "statistics over the padded width": (over_padded_width, {}),
    "the same with a residual": (over_padded_width, {"residual": True}),
    "statistics taken for constants": (constant_statistics, {}),
    "last row not in the weight gradient": (weight_gradient_without_the_last_row, {}),
    "no offset": (lambda x, w, eps, offset, residual: rms_norm(x, w, eps), {"offset": 1.0}),
    "sign of the residual gradient": (
        lambda x, w, eps, offset, residual: rms_norm(x, w, eps, offset, minus_gradient(residual)),
        {"residual": True},
    ),
    "gradient of the sum left out": (sum_without_gradient, {"residual": True}),
    "residual added after the norm": (residual_after_the_norm, {"residual": True}),
}

# swiglu(gate, up), or geglu ------------------------------------------------------------------------------------------


def swap(op):
    return lambda gate, up=None: op(*(gate.chunk(2, -1)[::-1] if up is None else (up, gate)))


ACTIVATION = {
    "gate and up swapped": (swap(swiglu), {}),
    "halves swapped": (swap(swiglu), {"layout": "joint"}),
    "gate and up of geglu swapped": (swap(geglu), {"gelu": True}),
    "GELU for SiLU": (geglu, {}),
    "QuickGELU": (lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up, {"gelu": True}),
    "derivative of the sigmoid left out": (
        lambda gate, up: with_gradient_of(swiglu(gate, up), gate * torch.sigmoid(gate).detach() * up),
        {},
    ),
    "no gradient to up": (lambda gate, up: swiglu(gate, up.detach()), {"layout": "halves"}),
}

# qk_rope(q, k, cos, sin) ---------------------------------------------------------------------------------------------


def interleaved(q, k, cos, sin):
    """GPT-J's pairs (0, 1), (2, 3), in place of (0, R/2), (1, R/2 + 1)."""
    half = q.shape[-1] // 2
    apart = [x.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2) for x in (q, k)]
    return tuple(x.unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2) for x in qk_rope(*apart, cos, sin))


def left_half_of_the_tables(q, k, cos, sin):
    return qk_rope(q, k, *(t[..., : t.shape[-1] // 2].repeat(1, 1, 2) for t in (cos, sin)))


ROPE = {
    "cos and sin swapped": (lambda q, k, cos, sin: qk_rope(q, k, sin, cos), {}),
    "transpose used forward": (lambda q, k, cos, sin: qk_rope(q, k, cos, -sin), {}),
    "not transposed backward": (
        lambda q, k, cos, sin: tuple(map(with_gradient_of, qk_rope(q, k, cos, sin), qk_rope(q, k, cos, -sin))),
        {},
    ),
    "interleaved pairs": (interleaved, {}),
    "keys not rotated": (lambda q, k, cos, sin: (qk_rope(q, k, cos, sin)[0], k), {}),
    "first table for all": (lambda q, k, cos, sin: qk_rope(q, k, cos[:1], sin[:1]), {"table_batch": 2}),
    "position off by one": (lambda q, k, cos, sin: qk_rope(q, k, cos.roll(1, 1), sin.roll(1, 1)), {}),
    "left half of the tables for both": (left_half_of_the_tables, {"uneven": True}),
    "the rest lost": (
        lambda q, k, cos, sin: tuple(F.pad(t[..., :8], (0, t.shape[-1] - 8)) for t in qk_rope(q, k, cos, sin)),
        {"rotary_dim": 8},
    ),
}

# qk_norm_rope(q, k, q_weight, k_weight, eps, cos, sin, offset=) ------------------------------------------------------


def norm_after_rotation(q, k, q_weight, k_weight, eps, cos, sin, offset):
    q, k = qk_rope(q, k, cos, sin)
    return rms_norm(q, q_weight, eps, offset), rms_norm(k, k_weight, eps, offset)


def over_padded_heads(q, k, q_weight, k_weight, eps, cos, sin, offset):
    return qk_rope(over_padded_width(q, q_weight, eps, offset), over_padded_width(k, k_weight, eps, offset), cos, sin)


def over_the_rotary_part(q, k, q_weight, k_weight, eps, cos, sin, offset):
    width = cos.shape[-1]
    heads = [
        torch.cat([rms_norm(x[..., :width], w[:width], eps, offset), rms_norm(x, w, eps, offset)[..., width:]], -1)
        for x, w in ((q, q_weight), (k, k_weight))
    ]
    return qk_rope(*heads, cos, sin)


def weight_gradient_of_the_first_head(q, k, q_weight, k_weight, *rest, offset):
    first = qk_norm_rope(q[:, :1], k[:, :1], q_weight, k_weight, *rest, offset)
    others = qk_norm_rope(q[:, 1:], k[:, 1:], q_weight.detach(), k_weight.detach(), *rest, offset)
    return tuple(torch.cat(pair, 1) for pair in zip(first, others, strict=True))


NORM_ROPE = {
    "norm after the rotation": (norm_after_rotation, {}),
    "statistics over the padded head": (over_padded_heads, {}),
    "statistics over the rotary part": (over_the_rotary_part, {"rotary_dim": 8}),
    "no offset": (lambda *args, offset: qk_norm_rope(*args), {"offset": 1.0}),
    "weights swapped": (lambda q, k, qw, kw, *rest, offset: qk_norm_rope(q, k, kw, qw, *rest, offset), {}),
    "cos and sin swapped": (
        lambda q, k, qw, kw, eps, cos, sin, offset: qk_norm_rope(q, k, qw, kw, eps, sin, cos, offset),
        {},
    ),
    "not transposed backward": (
        lambda q, k, qw, kw, eps, cos, sin, offset: tuple(
            map(with_gradient_of, *(qk_norm_rope(q, k, qw, kw, eps, cos, s, offset) for s in (sin, -sin)))
        ),
        {},
    ),
    "weight gradient of the first head alone": (weight_gradient_of_the_first_head, {}),
}

# gated_mlp(x, gate_weight, up_weight, down_weight, activation=) ------------------------------------------------------


def mlp(x, gate, up, down, activation="swiglu", *, op=swiglu, x_of_up=lambda x: x, product=lambda p: p):
    gate, up = gate.chunk(2) if up is None else (gate, up)
    return F.linear(product(op(F.linear(x, gate), F.linear(x_of_up(x), up))), down)


GATED_MLP = {
    "gate and up swapped": (partial(mlp, op=swap(swiglu)), {}),
    "halves swapped": (partial(mlp, op=swap(swiglu)), {"joint": True}),
    "GELU for SiLU": (partial(mlp, op=geglu), {}),
    "d_up not in the input gradient": (partial(mlp, x_of_up=torch.Tensor.detach), {}),
    "sign of d_up in the input gradient": (partial(mlp, x_of_up=minus_gradient), {}),
    "weight gradient of down_proj from a stale product": (
        lambda x, gate, up, down, activation: with_gradient_of(
            mlp(x, gate, up, down), mlp(x, gate, up, down.detach()) + mlp(x.detach().flip(1), gate.detach(), up, down)
        ),
        {"frozen": ("up",)},
    ),
}

# shared_linear(x, weights, biases) -----------------------------------------------------------------------------------


def linears(x, weights, biases, x_of=lambda i, x: x, bias_of=lambda i, b: b):
    return [F.linear(x_of(i, x), w, bias_of(i, b)) for i, (w, b) in enumerate(zip(weights, biases, strict=True))]


SHARED_LINEAR = {
    "last input gradient alone": (partial(linears, x_of=lambda i, x: x if i == 2 else x.detach()), {}),
    "sign of one input gradient": (partial(linears, x_of=lambda i, x: minus_gradient(x) if i == 1 else x), {}),
    "bias left out": (partial(linears, bias_of=lambda i, b: None if i == 0 else b), {"frozen": ("b0",)}),
    "bias twice in the gradient": (
        partial(linears, bias_of=lambda i, b: None if b is None else with_gradient_of(b, 2 * b)),
        {},
    ),
}

CHECKS = {
    "rms_norm": (RMS_NORM, partial(check.check_rms_norm, shape=(4, 9, 40))),
    "swiglu": (ACTIVATION, partial(check.check_gated_activation, shape=(4, 9, 40), gelu=False)),
    "qk_rope": (ROPE, partial(check.check_qk_rope, shape=(2, 3, 2, 9, 12))),
    "qk_norm_rope": (NORM_ROPE, partial(check.check_qk_rope, shape=(2, 3, 2, 9, 12), norm=True)),
    "gated_mlp": (GATED_MLP, partial(check.check_gated_mlp, shape=(4, 9, 24), inner=40)),
    "shared_linear": (
        SHARED_LINEAR,
        partial(check.check_shared_linear, shape=(4, 9, 24), widths=(16, 8, 8), biases=(0, 2)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "error"), [(op, error) for op, (errors, _) in CHECKS.items() for error in errors])
def test_a_planted_error_is_caught(monkeypatch, op, error, dtype):
    errors, check_op = CHECKS[op]
    stand_in, options = errors[error]
    check_op("cpu", dtype, **options)  # the op itself passes
    monkeypatch.setattr(kernels, "geglu" if options.get("gelu") else op, stand_in)
    with pytest.raises(AssertionError, match=r"roundings|elements off"):
        check_op("cpu", dtype, **options)
