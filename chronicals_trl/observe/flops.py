"""Operations that a training step needs, counted from the model's own modules, and what a GPU's datasheet promises.

A product with a weight takes 2 operations a weight and token, and its backward pass twice that, or once where the
weight is frozen. Attention is causal and within documents: for a document of n tokens its two products and their four
in the backward pass take 6 n² operations a head and dimension. What is computed a second time (checkpointing) and
elementwise operations are not counted: the usual model FLOPs utilisation (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from chronicals_trl._layer_configs import layer_configs

__all__ = ["DATASHEET_TFLOPS", "TrainingFlops", "datasheet_tflops", "training_flops"]

#: 1e12 dense bf16 operations a second, without sparsity, by whole words of the GPU's name; the first that fits.
DATASHEET_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200 NVL": 835.0, "H200": 989.0, "GH200": 989.0,
    "H20": 148.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "RTX 4090": 165.0,
}  # fmt: skip


def datasheet_tflops(gpu: str | None) -> float | None:
    """1e12 bf16 operations a second by the maker's word; None for a GPU that is not in the table, or a part of one."""
    if gpu is None or re.search(r"\b(MIG|Laptop)\b", gpu):
        return None
    return next((rate for name, rate in DATASHEET_TFLOPS.items() if re.search(rf"\b{name}\b", gpu)), None)


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of forward and backward pass for each token, and for each squared length of a document."""

    per_token: float
    per_square: float


def training_flops(model: nn.Module) -> TrainingFlops | None:
    """The operations of training `model`, its parameters trainable as they are now; None if it is not for text alone,
    or has experts of which it does not say how many a token goes to.

    Of a mixture's experts those count that a token goes to; of sliding and linear attention nothing but the
    projections. An adapter that is not active counts as frozen.
    """
    config = getattr(model, "config", None)
    if config is None or any(hasattr(config, f"{kind}_config") for kind in ("vision", "audio")):
        return None
    config = config.get_text_config()
    weights = 0.0
    for name, module in model.named_modules():
        if "original_module" in name.split("."):  # beside the copy that PEFT trains
            continue
        of_module = sum(count * (6 if trained else 4) for count, trained in _products(name, module))
        share = _experts_share(config) if of_module and "experts" in name.split(".") else 1.0
        if share is None:
            return None
        weights += share * of_module
    layers = layer_configs(config)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        layers = [layer for layer, kind in zip(layers, kinds, strict=False) if kind == "full_attention"]
    else:
        layers = [layer for layer in layers if not getattr(layer, "sliding_window", None)]
    return TrainingFlops(weights, 6.0 * sum(map(_attention_width, layers)))


def _attention_width(layer: Any) -> int:
    """Heads times their dimension, from a layer's configuration."""
    heads: int = getattr(layer, "num_attention_heads", 0)
    head_dim: int = getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else 0)
    return heads * head_dim


def _products(name: str, module: nn.Module) -> list[tuple[int, bool]]:
    """Weights of the products that `module` itself makes of every token, and whether they are trained."""
    if isinstance(module, nn.Linear):  # bitsandbytes' too, whose weight is packed, and ZeRO-3's, which has no elements
        return [(module.in_features * module.out_features, module.weight.requires_grad)]
    if isinstance(module, Conv1D):
        return [(module.nx * module.nf, module.weight.requires_grad)]
    if name.split(".")[-1] == "experts":
        shapes = [(getattr(p, "ds_shape", p.shape), p) for p in module.parameters(recurse=False)]  # ZeRO-3's own name
        return [(math.prod(shape), p.requires_grad) for shape, p in shapes if len(shape) == 3]
    return []


def _experts_share(config: Any) -> float | None:
    """The share of a layer's experts that a token goes to; None if the configuration has other names for it."""
    counts = [getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    experts = next((count for count in counts if count), None)
    taken = getattr(config, "num_experts_per_tok", None)
    return taken / experts if experts and taken else None
