"""Fused operations: each file holds one op as Triton kernels, autograd wiring and a plain-torch reference.

This package imports torch, and triton where it is installed; nothing else. Tensors on a GPU run the kernels. Tensors
on the CPU, dtypes that the kernels do not take (float64) and tensor subclasses (DTensor) run the reference, which is
ordinary differentiable torch code. With ``TRITON_INTERPRET=1`` in the environment before the first import, CPU tensors
run the kernels too, through Triton's interpreter.
"""

from __future__ import annotations

from ._common import LAUNCHES, backend
from ._gated_mlp import gated_mlp, geglu, geglu_reference, swiglu, swiglu_reference
from ._linear_cross_entropy import (
    LinearCrossEntropyOutput,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from ._lora_core import LoraOperands
from ._lora_linear import lora_linear, lora_linear_reference, lora_linears
from ._lora_mlp import lora_gated_mlp
from ._qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from ._qk_rope import qk_rope, qk_rope_reference
from ._rms_norm import rms_norm, rms_norm_reference
from ._shared_linear import shared_linear

__all__ = [
    "LAUNCHES",
    "LinearCrossEntropyOutput",
    "LoraOperands",
    "backend",
    "gated_mlp",
    "geglu",
    "geglu_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "lora_gated_mlp",
    "lora_linear",
    "lora_linear_reference",
    "lora_linears",
    "qk_norm_rope",
    "qk_norm_rope_reference",
    "qk_rope",
    "qk_rope_reference",
    "rms_norm",
    "rms_norm_reference",
    "shared_linear",
    "swiglu",
    "swiglu_reference",
]
