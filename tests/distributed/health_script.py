"""Started by test_health_ranks.py under torchrun: health checks on two gloo processes, with and without a fault.

Argument: a file for what every rank said: {"layout, fault": [[checks of the report, step at which it ended], ...]}.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import tiny_data
import tiny_models
import torch
import torch.distributed as dist
from head_script import _cpus_as_accelerators
from layout_cells import Cell
from layout_script import rows, settings
from ranks import leave

from chronicals_trl import SFTConfig, SFTTrainer

STEPS = 16


def cut(module: Any) -> None:
    module.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())


def build(fault: str) -> Any:
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from ln(V)
    if fault == "none, lora":  # B is zero
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    if fault == "cut":
        model.lm_head.requires_grad_(False)
        model.model.norm.requires_grad_(False)
        cut(model.model.layers[1])
    elif fault == "cut in the middle":
        model.model.embed_tokens.requires_grad_(False)
        cut(model.model.layers[0])
    return model


def train(layout: str, fault: str) -> list[Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        _cpus_as_accelerators(SimpleNamespace(mode=layout)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        options = settings(Cell(layout), folder)
        options |= {"max_steps": STEPS, "chronicals_config": {"health": "stop"}}
        trainer = SFTTrainer(
            model=build(fault), args=SFTConfig(**options), train_dataset=rows(), processing_class=tiny_data.tokenizer()
        )
        assert trainer.args.world_size == 2
        assert trainer._over_ranks(torch.tensor([dist.get_rank(), 0], dtype=torch.int32)).tolist() == [1, 0]
        if fault == "optimizer does nothing":
            trainer.create_optimizer()
            trainer.optimizer.step = lambda closure=None: None
        with contextlib.suppress(RuntimeError):
            trainer.train()
        notes = trainer.chronicals_report.notes
        trainer.accelerator.free_memory()
        checks = [found[1] for note in notes if (found := re.search(r"^health: .*\[(\w+)\]$", note))]
        return [checks, trainer.state.global_step]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    told = {}
    for layout in ("ddp", "fsdp2"):
        for fault in ("none", "none, lora", "cut", "cut in the middle", "optimizer does nothing"):
            if (layout, fault) != (
                "ddp",
                "cut in the middle",
            ):  # of parameters without a gradient DDP complains itself
                everyone: list[Any] = [None, None]
                dist.all_gather_object(everyone, train(layout, fault))
                told[f"{layout}, {fault}"] = everyone
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(told))
    leave()
