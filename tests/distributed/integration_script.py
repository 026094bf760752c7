"""Started by test_integrations.py with one file of integrations/: three steps of SFTTrainer, and what was in force.

Arguments: the model's folder, the output folder, and, for a JSON of DeepSpeed's, that file. The processes share four
rows a batch, whatever their number, so that every file's run is comparable with one process's.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import tiny_data
import tiny_models
import torch
from datasets import Dataset
from head_script import _cpus_as_accelerators
from ranks import leave
from torch.distributed.fsdp import CPUOffloadPolicy

from chronicals_trl import SFTConfig, SFTTrainer

ROWS, ACCUMULATION, STEPS, LENGTH = 4, 2, 3, 12


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, tiny_models.VOCAB_SIZE, (ROWS * ACCUMULATION * STEPS, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def in_force(trainer: SFTTrainer) -> dict[str, Any]:
    """What Accelerate made of the file."""
    state = trainer.accelerator.state
    found: dict[str, Any] = {"type": str(trainer.accelerator.distributed_type), "ranks": trainer.args.world_size}
    if state.deepspeed_plugin is not None:
        config = trainer.deepspeed.config  # DeepSpeed's own, every "auto" filled in
        zero = config["zero_optimization"]
        found |= {
            "stage": zero["stage"],
            "accumulation": config["gradient_accumulation_steps"],
            "clipping": config["gradient_clipping"],
            "offloads": sorted(k for k in ("offload_optimizer", "offload_param") if _device(zero.get(k)) == "cpu"),
            "optimizer": type(trainer.deepspeed.optimizer.optimizer).__name__,
        }
    elif getattr(state, "fsdp_plugin", None) is not None:
        plugin = state.fsdp_plugin
        found |= {
            "version": plugin.fsdp_version,
            "offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "reshard": plugin.reshard_after_forward,
            "sharded": all(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
        }
    return found


def _device(section: dict[str, Any] | None) -> str:
    return (section or {}).get("device", "none")


def main(model: str, output: str, deepspeed: str | None = None) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    kinds = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    sharded = deepspeed is not None or any(os.environ.get(kind) == "true" for kind in kinds)
    # Accelerate shards on accelerators alone: CPUs pass for such. DDP takes them as they are.
    stand_in = _cpus_as_accelerators(SimpleNamespace(mode="sharded")) if sharded else contextlib.nullcontext()
    # FSDP2 pins what it offloads, for which torch wants an accelerator.
    pinned = mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *args: tensor)
    with stand_in, pinned if sharded else contextlib.nullcontext():
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=output, use_chronicals=True, packing=False, max_length=None, max_steps=STEPS,
                dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
                per_device_train_batch_size=ROWS // ranks, gradient_accumulation_steps=ACCUMULATION,
                max_grad_norm=0.7, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no",
                bf16=False, gradient_checkpointing=False, disable_tqdm=True, optim="adamw_torch",
                use_cpu=not sharded, model_init_kwargs={"dtype": "float32"}, deepspeed=deepspeed,
            ),
            train_dataset=rows(),
            processing_class=tiny_data.tokenizer(),
        )  # fmt: skip
        trainer.train()
        trainer.save_model(output)
        found = in_force(trainer)
    if trainer.is_world_process_zero():
        found |= {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "parts": {part.name: part.state for part in trainer.chronicals_report.parts},
        }
        (Path(output) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
