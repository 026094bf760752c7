"""A frozen linear layer with a LoRA adapter as one autograd node, in plain torch.

    y = x W^T + bias + scale (x A^T) B^T

The equation is LoRA's (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), the fusion our own.

Written layer by layer, the adapter costs two more full-size tensors in the forward pass (the adapter's output and its
scaled copy) and two more in the backward pass (the scaled gradient and a second gradient of x). Here the low-rank
product is accumulated by the GEMM itself into the base output, and the same way into the gradient of x, so that with
one dtype throughout each pass allocates its result and rank-sized tensors only.

Shape suffixes: N tokens (all leading dimensions of x), I in features, O out features, R rank.

Gradients, with dy (N, O):
    g_NR = dy B
    dx   = dy W + scale g A
    dA   = scale g^T x
    dB   = scale dy^T (x A^T)
    dbias = sum over N of dy

The node saves x (as the GEMMs read it) and x A^T. W, A and B are saved as the parameters themselves and cast again in
the backward pass: under autocast that spares the low-precision copy of each frozen weight which eager keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import autocast_dtype, autocast_off

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def lora_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, *, bias: Tensor | None = None
) -> Tensor:
    """Return ``x W^T + bias + scale (x A^T) B^T``.

    Args:
        x: (..., I), any strides; may be empty.
        weight: (O, I), frozen.
        a: (R, I), LoRA's A.
        b: (O, R), LoRA's B.
        scale: LoRA's scaling, ``alpha / r`` (``alpha / sqrt(r)`` for rsLoRA).
        bias: (O,), may be trainable.

    Dtypes, chosen so that the numbers are those of PEFT's layer:
        - under autocast everything is computed in the autocast dtype, whatever the dtypes of the arguments;
        - without autocast ``x`` and ``weight`` share a dtype, and ``a`` and ``b`` have it too;
        - or ``a`` and ``b`` share a wider one (fp32 adapters on a bf16 or fp16 model, PEFT's default). The adapter's
          GEMMs then run in the wider dtype, as PEFT's do. Rounding A and B to bf16 instead was tried: the gradients of
          A and B, which PEFT has exact to fp32, lose four digits, and that of x leaves the bf16 rounding of eager's.
          Wide copies of x and dy and a wide product exist while they are used; none is saved.

    Returns:
        (..., O) in the autocast dtype under autocast, else in the dtype of ``x``. Gradients of ``x``, ``a``, ``b`` and
        ``bias`` come in the dtype of each. Second derivatives are not supported (torch raises).

    Raises:
        ValueError: ``weight`` requires a gradient, or shapes do not fit together.
        TypeError: ``scale`` is not a number, or the dtypes are none of the above.
    """
    if weight.requires_grad:
        raise ValueError(
            "weight requires a gradient, and lora_linear computes none for it: freeze it with "
            "weight.requires_grad_(False), or use the unfused layer"
        )
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}: pass float(scale)")
    _check_shapes(x, weight, a, b, bias)
    dtypes = _compute_dtypes(x, weight, a, b)
    if dtypes is None:
        raise TypeError(
            f"no dtype to compute in: x is {x.dtype}, weight {weight.dtype}, a {a.dtype}, b {b.dtype}. Without "
            "autocast x and weight must have one floating-point dtype, and a and b the same or a wider one: cast "
            "them, or enable torch.autocast"
        )
    y: Tensor = _LoraLinear.apply(x, weight, a, b, bias, float(scale), *dtypes)
    return y


def lora_linear_supported(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether ``lora_linear`` takes these dtypes in the current autocast state, and the weight is frozen."""
    return not weight.requires_grad and _compute_dtypes(x, weight, a, b) is not None


def lora_linear_reference(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, *, bias: Tensor | None = None
) -> Tensor:
    """The same function as separate torch operations, in the order and the dtypes of PEFT's layer."""
    base = torch.nn.functional.linear(x, weight, bias)
    adapter = torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b)
    return (base + adapter * scale).to(base.dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
    ) -> Tensor:
        x_NI = x.to(dtype).reshape(-1, x.shape[-1])
        weight_IO = weight.to(dtype).t()
        h_NR = x_NI.to(adapter_dtype) @ a.to(adapter_dtype).t()
        y_NO = x_NI @ weight_IO if bias is None else torch.addmm(bias.to(dtype), x_NI, weight_IO)
        _add_scaled_mm_(y_NO, h_NR, b.to(adapter_dtype).t(), scale)

        ctx.save_for_backward(x_NI, h_NR, weight, a, b)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.scale, ctx.dtype, ctx.adapter_dtype = scale, dtype, adapter_dtype
        return y_NO.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable  # x A^T is saved as a plain tensor: a second derivative would miss the path through it
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, h_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        need_x, _, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        scale, dtype, adapter_dtype = ctx.scale, ctx.dtype, ctx.adapter_dtype
        grad_x = grad_a = grad_b = grad_bias = None

        # loss.backward() may run inside an autocast region that the forward pass was not in.
        with autocast_off(grad_y.device.type):
            dy_NO = grad_y.reshape(-1, grad_y.shape[-1])
            wide_dy_NO = dy_NO.to(adapter_dtype)  # dy itself, but for fp32 adapters on a half-precision model
            if need_b:
                grad_b = _scaled_mm(wide_dy_NO.t(), h_NR, scale).to(b_OR.dtype)
            if need_x or need_a:
                g_NR = wide_dy_NO @ b_OR.to(adapter_dtype)
            del wide_dy_NO
            if need_a:
                grad_a = _scaled_mm(g_NR.t(), x_NI.to(adapter_dtype), scale).to(a_RI.dtype)
            if need_x:
                dx_NI = _add_scaled_mm_(dy_NO @ weight_OI.to(dtype), g_NR, a_RI.to(adapter_dtype), scale)
                grad_x = dx_NI.view(ctx.x_shape).to(ctx.x_dtype)
            if need_bias:
                grad_bias = dy_NO.sum(0, dtype=ctx.bias_dtype)
        return grad_x, None, grad_a, grad_b, grad_bias, None, None, None


def _add_scaled_mm_(y: Tensor, p: Tensor, q: Tensor, scale: float) -> Tensor:
    """y += scale (p q). A product in a wider dtype is added in that dtype and rounded once."""
    if p.dtype == y.dtype:
        return y.addmm_(p, q, alpha=scale)
    return y.add_(p @ q, alpha=scale)


def _scaled_mm(p: Tensor, q: Tensor, scale: float) -> Tensor:
    """scale (p q), scaled in the GEMM's accumulator: one rounding, one launch."""
    return torch.addmm(p.new_zeros(()), p, q, beta=0, alpha=scale)


def _compute_dtypes(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes of the base GEMMs and of the adapter's, or None where ``lora_linear`` does not take these inputs."""
    if any(t.dtype not in _FLOATS for t in (x, weight, a, b)):
        return None
    dtype = autocast_dtype(x)
    if dtype is not None:
        return dtype, dtype
    if weight.dtype != x.dtype or a.dtype != b.dtype or torch.promote_types(x.dtype, a.dtype) != a.dtype:
        return None
    return x.dtype, a.dtype


def _check_shapes(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or a.dim() != 2 or b.dim() != 2:
        raise ValueError(
            f"weight, a and b must be matrices, got shapes {tuple(weight.shape)}, {tuple(a.shape)}, {tuple(b.shape)}: "
            "a sharded parameter has to be gathered first"
        )
    (out_features, in_features), rank = weight.shape, a.shape[0]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "a": (a, (rank, in_features)),
        "b": (b, (out_features, rank)),
    }
    if bias is not None:
        expected["bias"] = (bias, (out_features,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but weight {tuple(weight.shape)} and rank {rank} (a's first "
                f"dimension) need {shape}: a is (rank, in), b is (out, rank)"
            )
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: its last dimension must be weight's in features, {in_features}"
        )
