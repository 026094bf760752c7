"""Started by test_fsdp2.py: gradients of patched tiny models under FSDP2 against the whole, unpatched model's."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
from fsdp_traffic import traffic
from ranks import leave

from chronicals_trl import patch_model
from chronicals_trl.model import match, rope

NODES: list[str] = []  # LoRA nodes of blocks, in the order of their calls


def counting(module, name):
    original = getattr(module, name)

    def counted(*args, **kwargs):
        NODES.append(name)
        return original(*args, **kwargs)

    setattr(module, name, counted)


def with_adapters(model, dropout: float = 0.2):
    torch.manual_seed(0)
    options = {"target_modules": "all-linear", "lora_dropout": dropout, "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options)).train()


def worst_gradient(family: str, checkpointing: bool, lora: bool = False) -> float:
    batch = tiny_models.packed_batch()
    adapt = with_adapters if lora else lambda model: model
    whole = adapt(tiny_models.build(family).train())
    torch.manual_seed(1)  # of dropout
    whole(**copy.copy(batch), use_cache=False).loss.backward()
    sharded = adapt(tiny_models.build(family).train())
    patch_model(sharded)
    if checkpointing:
        sharded.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in (sharded.get_base_model() if lora else sharded).model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    torch.manual_seed(1)
    sharded(**copy.copy(batch), use_cache=False).loss.backward()
    errors = [
        (ours.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True)
        if theirs.grad is not None
    ]
    return max(error.item() for error in errors)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {f"{f} {c}": worst_gradient(f, c) for f in ("llama", "qwen3", "gemma3") for c in (False, True)}
    counting(rope, "lora_linears")
    counting(match, "lora_gated_mlp")
    found |= {f"qwen2 {c} LoRA": worst_gradient("qwen2", c, lora=True) for c in (False, True)}
    assert NODES.count("lora_linears") == NODES.count("lora_gated_mlp") == 2 + 4, NODES
    moved = {str(checkpointing): traffic(checkpointing) for checkpointing in (False, True)}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps({"gradients": found, "traffic": moved}))
    leave()
