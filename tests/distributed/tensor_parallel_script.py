"""Started by test_tensor_parallel.py: a tiny model that two ranks share, with the flag on and off."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_data
import tiny_models
import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from head_script import _cpus_as_accelerators
from ranks import leave
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from chronicals_trl import ChronicalsPlugin, SFTConfig, SFTTrainer
from chronicals_trl.model.patch import patch_model

RANKS = int(os.environ["WORLD_SIZE"])
FOLDER = Path(sys.argv[1])


def load() -> Any:
    shared: dict[str, Any] = {}
    if RANKS > 1:
        from transformers.distributed import DistributedConfig

        shared["distributed_config"] = DistributedConfig(tp_size=RANKS)
    return AutoModelForCausalLM.from_pretrained(str(FOLDER / "model"), dtype=torch.float32, **shared)


def train(name: str, **options: Any) -> dict[str, Any]:
    trainer = SFTTrainer(
        model=load(),
        args=SFTConfig(**{
            "output_dir": str(FOLDER / name), "use_chronicals": True, "packing": True, "max_length": 96,
            "max_steps": 4, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
            "gradient_checkpointing": False, "disable_tqdm": True, "per_device_train_batch_size": 2,
            "logging_steps": 1, "learning_rate": 1e-2, "optim": "adamw_torch", "seed": 7, **options,
        }),
        train_dataset=tiny_data.text(38),
        processing_class=tiny_data.tokenizer(),
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "num_tokens": [entry["num_tokens"] for entry in logs],
        "weights": {n: whole(p) for n, p in trainer.model.named_parameters() if p.requires_grad},
        "parts": {part.name: part.to_dict() for part in trainer.chronicals_report.parts},
    }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def patched() -> dict[str, Any]:
    """`patch_model` by itself, as a raw loop without an accelerator has it: what it leaves on must be right."""
    model, ids = load(), torch.arange(5, 25).view(2, 10)
    before = model(input_ids=ids, labels=ids).loss.item()
    report = patch_model(model)
    return {
        "before": before,
        "after": model(input_ids=ids, labels=ids).loss.item(),
        "parts": {part.name: part.to_dict() for part in report.parts},
    }


def prepared() -> dict[str, Any]:
    plugin = ChronicalsPlugin()
    sizes = {"parallelism_config": ParallelismConfig(tp_size=RANKS)} if RANKS > 1 else {}
    accelerator = plugin.attach(Accelerator(cpu=True, **sizes))
    accelerator.prepare(load())
    return {"parts": {part.name: part.to_dict() for part in plugin.reports[0].parts}}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "packed": lambda: train("packed"),
    "padded": lambda: train("padded", packing=False),
    "flag off": lambda: train("off", packing=False, use_chronicals=False),
    "patch_model": patched,
    "plugin": prepared,
}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    if RANKS == 1:
        tiny_models.build("llama").save_pretrained(FOLDER / "model")
        tiny_data.tokenizer().save_pretrained(FOLDER / "model")
    with _cpus_as_accelerators(SimpleNamespace(mode="tp" if RANKS > 1 else "ddp")):
        found = {name: case() for name, case in CASES.items()}
    if dist.get_rank() == 0:
        torch.save(found, FOLDER / f"of{RANKS}.pt")
    leave()
