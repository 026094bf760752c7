"""Whole steps of SFTTrainer on packed rows, on two gloo processes, against one process that knows no packing.

Each cell of layout_cells.py trains five steps. The reference is plain torch on rank 0: the unpatched model in float32
on each document by itself, full logits, their summed cross-entropy over the step's labels, AdamW. Compared are the
first step's gradients, gathered, and every step's logged loss and gradient norm.

Started by test_layouts.py. Arguments: the file for what was found, and "ddp", "fsdp2", "zero", or "all"
and some layouts for every combination.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import json
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import layout_cells
import peft
import tiny_data
import tiny_models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from balance_script import documents
from datasets import Dataset
from head_script import _cpus_as_accelerators, _Gradients, _Recording, _sharded_at_the_root
from layout_cells import Cell
from ranks import leave
from torch import Tensor, nn

from chronicals_trl import SFTConfig
from chronicals_trl.packing import pack_dataset

STEPS, ROWS, CAPACITY, RANKS = 5, 4, 64, 2  # rows of a step, over all ranks
LR, LOSS_SCALE = 1e-3, 2.0**10
FAMILIES = {"untied": "llama", "tied": "qwen2"}


class Recording(_Recording):
    """Keeps where the documents lie, too; and has fp16 with loss scaling on a CPU, as accelerate has it on a GPU."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if "cu_seq_lens_q" in inputs:
            self.batches[-1] |= {"offsets": inputs["cu_seq_lens_q"].clone(), "step": self.state.global_step}
        return loss

    def scale_losses(self) -> None:
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)


@functools.cache
def rows() -> Dataset:
    packed, _ = pack_dataset(documents(), CAPACITY)
    return packed.select(range(ROWS * STEPS))


def build(cell: Cell) -> nn.Module:
    """The model, equal on all ranks."""
    model = tiny_models.build(FAMILIES[cell.weights])
    if cell.part == "full":
        return model
    head = {"modules_to_save": ["lm_head"]} if cell.layout == "fsdp2 own unit" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return peft.get_peft_model(
            model,
            peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **head),
        )


def settings(cell: Cell, output: str) -> dict[str, Any]:
    """Of SFTConfig. The bound for clipping is out of reach: it is there for the logged norm, and for unscaling."""
    options: dict[str, Any] = {
        "output_dir": output, "use_chronicals": cell.ours, "packing": True, "max_length": CAPACITY,
        "max_steps": STEPS, "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": ROWS // RANKS // cell.accumulation,
        "gradient_accumulation_steps": cell.accumulation, "max_grad_norm": 1e6, "logging_steps": 1,
        "learning_rate": LR, "lr_scheduler_type": "constant", "optim": "adamw_torch", "report_to": "none",
        "save_strategy": "no", "bf16": cell.precision == "bf16", "fp16": cell.precision == "fp16",
        "gradient_checkpointing": cell.checkpointing == "trainer", "torch_compile": cell.compiled,
        "disable_tqdm": True, "use_cpu": not cell.layout.startswith("zero"),  # which would turn DeepSpeed off
    }  # fmt: skip
    if cell.ours:
        options["chronicals_config"] = {"lora_plus": "off"}
    else:
        options["dataset_kwargs"] = {"skip_prepare_dataset": True}  # the rows came packed
    if cell.compiled:
        options["torch_compile_backend"] = "aot_eager"
    if cell.layout.startswith("fsdp2"):
        sharding: dict[str, Any] = {"version": 2, "activation_checkpointing": cell.checkpointing == "fsdp"}
        if cell.lean:
            layer = "LlamaDecoderLayer" if cell.weights == "untied" else "Qwen2DecoderLayer"
            sharding |= {"transformer_layer_cls_to_wrap": [layer], "cpu_ram_efficient_loading": True}
        options |= {"fsdp": True, "fsdp_config": sharding}
    if cell.layout.startswith("zero"):
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(cell.layout[-1]), "stage3_param_persistence_threshold": 0},
        }  # fmt: skip
    return options


def plain(name: str) -> str:
    """A parameter's name without what DDP, checkpointing and torch.compile put into it."""
    for put in ("module.", "_orig_mod.", "module."):
        name = name.removeprefix(put)
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


# -- one process ------------------------------------------------------------------------------------------------------


def steps_of(batches: Sequence[dict[str, Any]]) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Each step's documents: (input_ids, labels), both (S,)."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        ids, labels = (batch[key].flatten() for key in ("input_ids", "labels"))
        for start, end in itertools.pairwise(batch["offsets"].tolist()):
            if bool((labels[start:end] != -100).any()):
                found.setdefault(batch["step"], []).append((ids[start:end], labels[start:end]))
    return found


def reference(model: nn.Module, steps: dict[int, list[tuple[Tensor, Tensor]]]) -> dict[str, Any]:
    """Losses and gradient norms of all steps, and the first step's gradients."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in sorted(steps):
        count = sum(int((labels[1:] != -100).sum()) for _, labels in steps[step])
        total = 0.0
        for ids, labels in steps[step]:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits, labels[1:], reduction="sum") / count
            loss.backward()
            total += loss.item()
        grads = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        found.setdefault("gradients", grads)
        found["losses"].append(total)
        found["norms"].append(float(torch.stack([grad.norm() for grad in grads.values()]).norm()))
        optimizer.step()
        optimizer.zero_grad()
    return found


REFERENCES: dict[Any, dict[str, Any]] = {}  # the rows of a step are the same in every cell


def reference_of(cell: Cell, model: nn.Module, steps: dict[int, list[tuple[Tensor, Tensor]]]) -> dict[str, Any]:
    key = (cell.part, cell.weights, cell.layout == "fsdp2 own unit")
    told = {step: sorted(tuple(ids.tolist()) for ids, _ in parts) for step, parts in steps.items()}
    assert len(told) == STEPS and sum(map(len, told.values())) > 40
    if key not in REFERENCES:
        REFERENCES[key] = reference(model, steps) | {"rows": told}
    assert REFERENCES[key]["rows"] == told, "the rows of a step must not depend on the layout"
    return REFERENCES[key]


# -- a cell -----------------------------------------------------------------------------------------------------------


def train(cell: Cell) -> dict[str, Any]:
    stand_in = _cpus_as_accelerators(SimpleNamespace(mode=cell.layout))
    root = _sharded_at_the_root(SimpleNamespace(mode=cell.layout))
    with tempfile.TemporaryDirectory() as folder, stand_in, root, contextlib.redirect_stdout(io.StringIO()):
        model = build(cell)
        exact = copy.deepcopy(model)
        if cell.lean and dist.get_rank() > 0:
            with torch.no_grad():  # those of rank 0 are to come in their place
                for parameter in model.parameters():
                    parameter.normal_()
        watch = _Gradients()
        trainer = Recording(
            model=model, args=SFTConfig(**settings(cell, folder)), train_dataset=rows(),
            processing_class=tiny_data.tokenizer(), callbacks=[watch],
        )  # fmt: skip
        watch.trainer = trainer
        assert trainer.args.world_size == RANKS
        if cell.precision == "fp16":
            trainer.scale_losses()
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        parts = {part.name: part.state for part in trainer.chronicals_report.parts}
        wrapped = [type(module).__name__ for module in trainer.model_wrapped.modules()]
        if trainer.is_deepspeed_enabled:
            trainer.deepspeed.destroy()
        trainer.accelerator.free_memory()
    torch._dynamo.reset()
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, trainer.batches if cell.ours else [])
    told = {
        "losses": [entry["loss"] for entry in logs], "norms": [float(entry["grad_norm"]) for entry in logs],
        "parts": parts, "checkpointed": any(name.endswith("CheckpointWrapper") for name in wrapped),
    }  # fmt: skip
    if dist.get_rank() > 0:
        return told
    steps = steps_of([batch for batches in everyone for batch in batches])
    return told | compare(
        told, trainer.gradients, reference_of(cell, exact, steps) if cell.ours else known(cell, exact)
    )


def known(cell: Cell, model: nn.Module) -> dict[str, Any]:
    """The reference for a run with the flag off, which does not say where its documents lie."""
    flat: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for number, row in enumerate(rows()):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        ends = [0, *itertools.accumulate(row["seq_lengths"])]
        flat.setdefault(number // ROWS, []).extend((ids[a:b], labels[a:b]) for a, b in itertools.pairwise(ends))
    return reference_of(cell, model, flat)


def compare(told: dict[str, Any], gradients: dict[str, Tensor], exact: dict[str, Any]) -> dict[str, Any]:
    """Relative errors: of the gradients together and of the worst tensor (in norm), the worst of losses and norms."""
    found = {plain(name): grad for name, grad in gradients.items()}
    assert found.keys() == exact["gradients"].keys(), found.keys() ^ exact["gradients"].keys()
    errors = {name: float((found[name] - grad).norm()) for name, grad in exact["gradients"].items()}
    norms = {name: float(grad.norm()) for name, grad in exact["gradients"].items()}
    worst = max(errors, key=lambda name: _finite(errors[name] / norms[name]))
    result = {
        "gradients": math.hypot(*errors.values()) / math.hypot(*norms.values()),
        "worst": errors[worst] / norms[worst], "worst_name": worst,
    }  # fmt: skip
    for key in ("losses", "norms"):
        assert len(told[key]) == len(exact[key]) == STEPS
        pairs = zip(told[key], exact[key], strict=True)
        result[f"{key}_error"] = max(_finite(abs(ours - theirs) / abs(theirs)) for ours, theirs in pairs)
    return result


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf


def main(output: Path, kind: str, *layouts: str) -> None:
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    cells = layout_cells.product(layouts) if kind == "all" else getattr(layout_cells, kind.upper())
    results = []
    for cell in cells:
        row: dict[str, Any] = {"name": cell.name, **asdict(cell), "error": None}
        try:
            row |= train(cell)
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        errors: list[Any] = [None] * RANKS
        dist.all_gather_object(errors, row["error"])
        row["error"] = next((each for each in errors if each), None)
        results.append(row)
        if os.environ["RANK"] == "0":
            output.write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
