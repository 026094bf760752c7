"""The head in SFTTrainer on several ranks: one optimizer step's gradients against one process on the joined batch.

Every rank trains a step with the library's own trainer, under DDP, FSDP2 or ZeRO. The reference knows nothing of them,
nor of TRL: the unpatched model in float32 in one process, full logits, the summed cross-entropy of all ranks' batches
over the number of their labels.

Started by test_head_ranks.py on two gloo processes, it runs `CI`, or with "zero" after that `ZERO`, and
writes what it found to the file that it is given. tests/gpu/run_head_two_gpus.py runs the whole matrix with it on two
GPUs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate.accelerator
import peft
import tiny_data
import tiny_models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from head_cases import CI, FAMILIES, ZERO, Case
from ranks import leave
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from chronicals_trl import SFTConfig, SFTTrainer

ROWS, LENGTH = 2, 12  # of a rank's batch


@dataclass(frozen=True)
class Found:
    """What a case came to.

    Args:
        loss: Relative error of the logged loss.
        head, rest: Relative error (in norm) of the gradient of the head's weight, and the largest of all others.
        units: The modules that FSDP2 gathers together with the head's weight; empty without FSDP2.
        head_part: State of the part "head" in the report.
    """

    loss: float
    head: float
    rest: float
    units: list[str]
    head_part: str


def data(case: Case, ranks: int) -> Dataset:
    """Rows that the sequential sampler deals to the ranks batch by batch; a fifth of the labels is ignored."""
    generator = torch.Generator().manual_seed(3)
    count = ROWS * case.accumulation * ranks
    ids = torch.randint(3, tiny_models.VOCAB_SIZE, (count, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    labels[0, -3:] = ids[0, -3:]
    if case.ignored:
        of_last_rank = torch.arange(count) // ROWS % ranks == ranks - 1
        labels[of_last_rank] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def build(case: Case) -> nn.Module:
    """The model, equal on all ranks; with adapters of which none is zero where the case has any."""
    model = tiny_models.build(FAMILIES[case.weights])
    if case.mode != "fsdp2 own unit" and not case.lora:
        return model
    config = peft.LoraConfig(
        r=4, target_modules="all-linear" if case.lora else ["q_proj", "v_proj"], task_type="CAUSAL_LM",
        modules_to_save=None if case.lora else ["lm_head"], init_lora_weights=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return peft.get_peft_model(model, config)


class _Recording(SFTTrainer):
    """Keeps the batches, and the first optimizer step's gradients as whole tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        kept = ("input_ids", "attention_mask", "labels")
        self.batches.append({key: inputs[key].cpu().clone() for key in kept if key in inputs})
        if self.is_deepspeed_enabled and not hasattr(self.deepspeed, "_step_of_engine"):
            self._watch_engine(self.deepspeed)
        return super().training_step(model, inputs, *args, **kwargs)

    def _watch_engine(self, engine: Any) -> None:
        """DeepSpeed's engine steps inside `backward`, and then has no gradients left."""
        from deepspeed.utils import safe_get_full_grad

        engine._step_of_engine = engine.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if not self.gradients:
                for name, parameter in engine.module.named_parameters():
                    if parameter.requires_grad:
                        self.gradients[name] = safe_get_full_grad(parameter).detach().float().cpu()
            return engine._step_of_engine(*args, **kwargs)

        engine.step = step


class _Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.trainer.gradients or self.trainer.is_deepspeed_enabled:
            return
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                self.trainer.gradients[name.removeprefix("module.")] = (
                    grad.detach().float().cpu().clone()
                )  # DDP may own it


def settings(case: Case, output: str) -> dict[str, Any]:
    """Of SFTConfig. Nothing is clipped: the callback comes after that."""
    # Without use_cpu: it would turn DeepSpeed off.
    use_cpu = not torch.cuda.is_available() and not case.mode.startswith("zero")
    options: dict[str, Any] = {
        "output_dir": output, "use_chronicals": case.ours, "packing": False, "max_length": None, "max_steps": 1,
        "dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": case.accumulation, "max_grad_norm": 0.0,
        "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no", "bf16": case.bf16,
        "gradient_checkpointing": False, "disable_tqdm": True, "use_cpu": use_cpu,
    }  # fmt: skip
    if case.mode.startswith("fsdp2"):
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    if case.mode.startswith("zero"):
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": int(case.mode[-1]), "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": case.bf16}, "zero_allow_untested_optimizer": True,
        }  # fmt: skip
    return options


@contextlib.contextmanager
def _cpus_as_accelerators(case: Case) -> Iterator[None]:
    """accelerate offers FSDP2 and DeepSpeed to accelerators alone; on gloo the CPUs pass for such."""
    if torch.cuda.is_available() or case.mode == "ddp":
        yield
        return
    backend = mock.patch.object(PartialState, "_prepare_backend", lambda *args: ("gloo", DistributedType.MULTI_GPU))
    with backend, mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"):
        yield


@contextlib.contextmanager
def _sharded_at_the_root(case: Case) -> Iterator[None]:
    """Layers in units of their own, all the rest in the root's, as accelerate did before it had a tail unit."""
    if case.mode != "fsdp2 root":
        yield
        return

    def prepare(accelerator: Any, model: nn.Module) -> nn.Module:
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy or MixedPrecisionPolicy()
        for layer in getattr(model, "get_base_model", lambda: model)().model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        return model

    with mock.patch.object(accelerate.accelerator, "fsdp2_prepare_model", prepare):
        yield


def run(case: Case) -> Found:
    """Train, gather, compare. Called on every rank; the result is the same on each."""
    ranks = int(os.environ["WORLD_SIZE"])
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, _cpus_as_accelerators(case), _sharded_at_the_root(case), quiet:
        model = build(case)
        reference = copy.deepcopy(model)
        callback = _Gradients()
        trainer = _Recording(
            model=model,
            args=SFTConfig(**settings(case, folder)),
            train_dataset=data(case, ranks),
            processing_class=tiny_data.tokenizer(),
            callbacks=[callback],
        )
        callback.trainer = trainer
        assert trainer.args.world_size == ranks
        trainer.train()
        units = _units(trainer.model)
        head_part = trainer.chronicals_report["head"].state
        logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        gradients, batches = trainer.gradients, trainer.batches
        trainer.accelerator.free_memory()
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, batches)
    assert [len(each) for each in everyone] == [case.accumulation] * ranks
    has_labels = [any(bool((batch["labels"][:, 1:] != -100).any()) for batch in each) for each in everyone]
    assert has_labels == [True] * (ranks - 1) + [not case.ignored]
    loss, exact = joined(reference, [batch for each in everyone for batch in each])
    assert gradients.keys() >= exact.keys(), exact.keys() - gradients.keys()
    head = head_name(reference)
    assert (head in exact) != case.lora
    errors = {name: _error(gradients[name], grad) for name, grad in exact.items()}
    rest = max(error for name, error in errors.items() if name != head)
    return Found(abs(logged - loss) / abs(loss), errors.get(head, 0.0), rest, units, head_part)


def joined(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process on all of `batches` as one, from full logits in float32."""
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model.float().train()(**inputs, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def head_name(model: nn.Module) -> str:
    """The name of the trained weight that the head multiplies by."""
    head = model.get_output_embeddings()
    weight = head.modules_to_save["default"].weight if hasattr(head, "modules_to_save") else head.weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    error = float((found - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


def _units(model: nn.Module) -> list[str]:
    """The modules in the FSDP2 unit of the head."""
    head = model.get_output_embeddings()
    head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            group = state._fsdp_param_group
            if group is not None and any(
                head in (p._module_info.module, *p._module_info.shared_modules) for p in group.fsdp_params
            ):
                return sorted(type(m).__name__ for m in group.modules)
    return []


def run_all(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Each case's fields, and what it came to or why it failed; under torchrun, on every rank alike."""
    logging.disable(logging.WARNING)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=120))
    rows = []
    for case in cases:
        row: dict[str, Any] = {"name": case.name, **asdict(case)}
        try:
            row |= asdict(run(case))
            reason = None
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
            if all(reason != earlier["reason"] for earlier in rows):
                traceback.print_exc()
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        row["reason"] = next((each for each in reasons if each is not None), None)
        rows.append(row)
    return rows


if __name__ == "__main__":
    results = run_all(ZERO if sys.argv[2:] == ["zero"] else CI)
    if int(os.environ["RANK"]) == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    leave()
