"""Which parts would be on for a model, by its configuration alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from chronicals_trl.report import ActivationReport


def what_would_be_on(model: str, device: torch.device | None = None) -> ActivationReport:
    """The report of `patch_model` on the model's structure, without its weights.

    Args:
        model: A folder, or a name on the Hub; only its configuration is read.
        device: Where the kernels are chosen and verified; None for the CPU.

    Raises:
        OSError, ValueError, and others of transformers: there is no configuration of a causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from chronicals_trl.config import PARTS, ChronicalsConfig
    from chronicals_trl.model.patch import patch_model
    from chronicals_trl.report import PartReport

    # To show and not to refuse: "on" and strict, from the environment, are for a run.
    settings = ChronicalsConfig.resolve(None)
    wanted: dict[str, Any] = {name: "auto" for name in PARTS if getattr(settings, name) == "on"}
    settings = dataclasses.replace(settings, strict=False, **wanted)

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        structure = AutoModelForCausalLM.from_config(config)
    report = patch_model(structure, settings, device=device)
    # These depend on what a run is given, and say nothing about the model.
    for name, needs in {
        "packing": "packing=True",
        "lora": "a LoRA adapter",
        "lora_plus": "a LoRA adapter",
        "adamw": "a GPU and torch's fused AdamW",
        "cuda_graphs": "packing=True and a GPU",
        "recompute": "a GPU and gradient_checkpointing left at its default",
    }.items():
        if getattr(settings, name) != "off":
            report.set(PartReport(name, "-", reason=f"not looked at: it takes {needs}, in a run"))
    return report
