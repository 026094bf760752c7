"""Started by test_lora_plus_ranks.py: LoRA+ in SFTTrainer under DDP, FSDP2 and ZeRO, and resumed.

The first argument is the file for what was found, the others are modes. "one" is the reference, for a single process:
stock TRL on all ranks' rows at once, with an optimizer whose groups are made by hand.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import tiny_data
import tiny_models
import torch
import torch.distributed as dist
from datasets import Dataset
from head_script import _cpus_as_accelerators
from ranks import leave
from torch import nn
from torch.distributed.tensor import DTensor

from chronicals_trl import SFTConfig, SFTTrainer

ROWS, LENGTH, STEPS, RANKS = 2, 12, 4, 2
LR, RATIO, EMBEDDING_LR, DECAY = 1e-2, 8.0, 3e-2, 0.1


def build() -> nn.Module:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return peft.get_peft_model(tiny_models.build("llama"), config)


def rows() -> Any:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, tiny_models.VOCAB_SIZE, (ROWS * RANKS * STEPS, LENGTH), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def settings(mode: str, output: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "output_dir": output, "use_chronicals": mode != "one", "packing": False, "max_length": None,
        "max_steps": STEPS, "dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": ROWS * (RANKS if mode == "one" else 1), "max_grad_norm": 0.0,
        "logging_steps": 1, "learning_rate": LR, "weight_decay": DECAY, "warmup_steps": 2, "optim": "adamw_torch",
        "report_to": "none", "save_strategy": "steps", "save_steps": STEPS // 2, "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False, "use_cpu": not mode.startswith("zero"),  # which would turn DeepSpeed off
        "chronicals_config": {"lora_plus_ratio": RATIO, "lora_plus_embedding_lr": EMBEDDING_LR},
    }  # fmt: skip
    if mode == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    if mode.startswith("zero"):
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": int(mode[-1]), "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        }  # fmt: skip
    return options


def by_hand(model: nn.Module) -> torch.optim.Optimizer:
    groups: dict[float, list[nn.Parameter]] = {LR: [], LR * RATIO: [], EMBEDDING_LR: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = EMBEDDING_LR if "lora_embedding" in name else LR * RATIO if "lora_B" in name else LR
            groups[lr].append(parameter)
    return torch.optim.AdamW([{"params": p, "lr": lr} for lr, p in groups.items()], lr=LR, weight_decay=DECAY)


def weights(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    """The whole adapter, on every rank."""
    found = {}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_full_fp32_param

            value = safe_get_full_fp32_param(parameter)
        else:
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name.removeprefix("module.")] = value.detach().float().cpu().clone()
    return found


def train(mode: str, output: str, checkpoint: str | None = None) -> dict[str, Any]:
    model = build()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings(mode, output)),
        train_dataset=rows(),
        processing_class=tiny_data.tokenizer(),
        optimizers=(by_hand(model), None) if mode == "one" else (None, None),
    )
    assert trainer.args.world_size == (1 if mode == "one" else RANKS)
    trainer.train(resume_from_checkpoint=checkpoint)
    keys = ("learning_rate", "learning_rate_lora_b", "learning_rate_lora_embedding")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "weights": weights(trainer),
        "rates": {key: [entry[key] for entry in logs if key in entry] for key in keys},
        "losses": [entry["loss"] for entry in logs],
        "state": trainer.chronicals_report["lora_plus"].state,
        "fused": trainer.chronicals_report["lora"].state,
    }


def run(mode: str) -> dict[str, Any]:
    """A run, and the same one from the checkpoint in its middle; or why it failed."""
    quiet = contextlib.redirect_stdout(io.StringIO())
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    try:
        with quiet, _cpus_as_accelerators(SimpleNamespace(mode="ddp" if mode == "one" else mode)):
            whole = train(mode, shared[0])
            checkpoint = str(Path(shared[0]) / f"checkpoint-{STEPS // 2}")
            return {"whole": whole, "resumed": None if mode == "one" else train(mode, shared[0], checkpoint)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    results = {mode: run(mode) for mode in sys.argv[2:]}
    if int(os.environ["RANK"]) == 0:
        torch.save(results, sys.argv[1])
    leave()
