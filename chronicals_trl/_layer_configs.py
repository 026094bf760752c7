"""The configuration of each of a model's layers, where transformers lets them differ."""

from __future__ import annotations

from typing import Any

__all__ = ["layer_configs"]


def layer_configs(config: Any) -> list[Any]:
    """One configuration a layer, from a text configuration.

    From transformers 5.24 on a configuration may have values for single layers (the heads of Gemma 4's full attention
    are wider than those of its sliding attention), and then refuses to give one for the model: with a RuntimeError,
    which `getattr`'s default does not catch. Without such values each layer has the model's.
    """
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * getattr(config, "num_hidden_layers", 0)
