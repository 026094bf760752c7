"""Started by test_lora_shards.py: fused LoRA on sharded tiny models, by the layout of the shards.

For each layout: the largest relative error of a gradient against the whole, unpatched model's, which nodes ran, and
what `apart.apart_now` says of it. The arguments are the file for what was found and "fsdp2" or "zero3".
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
from ranks import leave

from chronicals_trl import patch_model
from chronicals_trl.model import apart, lora, match, rope
from chronicals_trl.report import ActivationReport

NODES = Counter[str]()
EMPTY: list[str] = []  # nodes that were given a parameter without values


def watch(module: Any, name: str) -> None:
    original = getattr(module, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        NODES[name] += 1
        layers = [item for arg in args for item in (arg if isinstance(arg, list) else [arg])]
        tensors = [t for layer in layers for t in (layer if isinstance(layer, tuple) else [layer])]
        tensors += list(kwargs.values())
        EMPTY.extend(name for t in tensors if isinstance(t, torch.Tensor) and not t.numel())
        return original(*args, **kwargs)

    setattr(module, name, watched)


def build() -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False)
    return peft.get_peft_model(tiny_models.build("qwen2").train(), config).train()


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if lora.match_lora(module)]


def leaves(model: nn.Module) -> list[nn.Module]:
    """The linears of A and B, each a unit of its own: what PEFT's fsdp_auto_wrap_policy makes of an adapter."""
    return [m for m in model.modules() if type(m) is nn.Linear and m.weight.requires_grad]


def blocks(model: Any) -> list[nn.Module]:
    return [block for layer in model.get_base_model().model.layers for block in (layer.self_attn, layer.mlp)]


FSDP2: dict[str, Callable[[Any], list[nn.Module]]] = {
    "decoder layers": lambda model: [],
    "attention and MLP": blocks,
    "LoRA layers": lora_layers,
    "A and B": leaves,
}


def gradients(model: Any, backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward) -> None:
    torch.manual_seed(1)  # of dropout
    backward(model(**copy.copy(tiny_models.packed_batch()), use_cache=False).loss)


def whole(patched: bool) -> list[torch.Tensor]:
    model = build()
    if patched:
        patch_model(model)
    gradients(model)
    return [p.grad for p in model.parameters() if p.grad is not None]


def result(found: list[torch.Tensor], nodes: Counter[str], model: nn.Module, report: ActivationReport) -> Any:
    errors = {}
    for name, patched in (("patched", True), ("stock", False)):
        errors[name] = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, whole(patched), strict=True))
    news = apart.amend(report, model)
    assert not apart.amend(report, model), "said twice"
    return {"errors": errors, "nodes": nodes, "news": news, "lora": report["lora"].to_dict(), "notes": report.notes}


def under_fsdp2(units: Callable[[Any], list[nn.Module]], checkpointing: bool) -> Any:
    model = build()
    report = patch_model(model)
    assert report["lora"].modules == 14
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in [*units(model), *model.get_base_model().model.layers, model]:
        fully_shard(module)
    NODES.clear()
    gradients(model)
    nodes = NODES.copy()
    return result([p.grad.full_tensor() for p in model.parameters() if p.grad is not None], nodes, model, report)


def under_zero3() -> Any:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = build()
    report = patch_model(model)
    assert report["lora"].modules == 14
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained), config=settings)
    NODES.clear()
    gradients(engine, engine.backward)
    return result([safe_get_full_grad(p).detach() for p in trained], NODES.copy(), model, report)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for module, name in ((rope, "lora_linears"), (match, "lora_gated_mlp"), (lora, "lora_linear")):
        watch(module, name)
    found: dict[str, Any] = {}
    if sys.argv[2] == "fsdp2":
        for checkpointing in (False, True):
            again = ", checkpointing" * checkpointing
            found |= {f"{name}{again}": under_fsdp2(units, checkpointing) for name, units in FSDP2.items()}
    else:
        found["zero3"] = under_zero3()
    assert not EMPTY, EMPTY
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    leave()
