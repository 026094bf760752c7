"""Runs of a trainer on tiny models and data, with the figures that tests compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_data
import tiny_models
import torch

SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
    "max_length": 96,
}


def run(
    trainer_class: type,
    config_class: type,
    tmp_path: Path,
    *,
    family: str = "llama",
    data=None,
    options=None,
    **arguments,
):
    """Train and return (trainer, gradients of the first step by name)."""
    settings = {**SETTINGS, "output_dir": str(tmp_path / "out"), **(options or {})}
    gradients: dict[str, torch.Tensor] = {}

    trainer = trainer_class(
        model=arguments.pop("model", None) or tiny_models.build(family),
        args=config_class(**settings),
        train_dataset=tiny_data.text() if data is None else data,
        processing_class=tiny_data.tokenizer(),
        **arguments,
    )
    training_step = trainer.training_step

    def recording(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return loss

    trainer.training_step = recording  # on the instance: a subclass is looked at for what it overrides
    trainer.train()
    return trainer, gradients


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry and "train_runtime" not in entry]


def saved_model(folder: Path) -> Path:
    """A tiny Llama with its tokenizer, as scripts load it."""
    tiny_models.build("llama").save_pretrained(folder)
    tiny_data.tokenizer().save_pretrained(folder)
    return folder
