"""Started by torchrun: gradients of patched tiny models under FSDP2 against the whole, unpatched model's."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
from ranks import leave

from chronicals_trl import patch_model


def worst_gradient(family: str, checkpointing: bool) -> float:
    batch = tiny_models.packed_batch()
    whole = tiny_models.build(family).train()
    whole(**copy.copy(batch), use_cache=False).loss.backward()
    sharded = tiny_models.build(family).train()
    patch_model(sharded)
    if checkpointing:
        sharded.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    sharded(**copy.copy(batch), use_cache=False).loss.backward()
    errors = [
        (ours.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True)
    ]
    return max(error.item() for error in errors)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {f"{f} {c}": worst_gradient(f, c) for f in ("llama", "qwen3", "gemma3") for c in (False, True)}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    leave()
