"""Run by test_ddp.py: every case on this number of ranks, the figures written by rank 0."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny_data
import tiny_models
import torch
from ranks import leave
from transformers import TrainerCallback

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.model import patch, tied_weight
from chronicals_trl.observe import late_logs

MAX_LENGTH = 96
RANKS = int(os.environ["WORLD_SIZE"])
# Text whose 18 documents make 5 rows: on two ranks with one row a batch, the last step of one of them is empty.
DOCUMENTS = 18


class Gradients(TrainerCallback):
    """The gradients of each optimizer step, over all ranks."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        named = [(name.removeprefix("module."), p) for name, p in model.named_parameters()]
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def make(output: Path, family: str = "llama", *, data=None, evaluation=None, **options: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(output / "out"), "use_chronicals": True, "packing": True, "max_length": MAX_LENGTH,
        "num_train_epochs": 1, "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none", "bf16": False,
        "use_cpu": True, "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return SFTTrainer(
        model=tiny_models.build(family),
        args=SFTConfig(**{**settings, **options}),
        train_dataset=tiny_data.text(DOCUMENTS) if data is None else data,
        eval_dataset=evaluation,
        processing_class=tiny_data.tokenizer(),
    )


def train(output: Path, family: str, **options: Any) -> dict[str, Any]:
    """The log and the gradients of an epoch, and how many real tokens the ranks' batches hold together."""
    trainer = make(output, family, **options)
    gradients = Gradients()
    trainer.add_callback(gradients)
    lookups, lookup = [], tied_weight.tied_embedding
    tied_weight.tied_embedding = lambda *args: lookups.append(family) or lookup(*args)
    real = torch.tensor(sum(int(batch["num_real_tokens"]) for batch in trainer.get_train_dataloader()))
    try:
        trainer.train()
    finally:
        tied_weight.tied_embedding = lookup
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "gradients": gradients.steps,
        "real_tokens_of_all_ranks": int(trainer.accelerator.reduce(real, reduction="sum")),
        "tokens_in_the_data": sum(len(ids) for ids in trainer.train_dataset["input_ids"]),
        "finite": all(bool(p.isfinite().all()) for p in trainer.model.parameters()),
        "report": trainer.chronicals_report.to_dict(),
        "lookups_with_one_gradient": len(lookups),
    }


def entries(output: Path, devices: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """The log of a run whose entries are written late on these devices, and how many were."""
    late_logs.DEVICES, before = devices, late_logs.DEVICES
    try:
        trainer = make(output, **options)
        late = []
        set_aside = trainer._set_entry_aside
        trainer._set_entry_aside = lambda *args: (late.append(trainer.state.global_step), set_aside(*args))
        result = trainer.train()
    finally:
        late_logs.DEVICES = before
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry], "late": late,
        "loss": result.training_loss, "flos": trainer.state.total_flos,
    }  # fmt: skip


def evaluate(output: Path, family: str, batch_size: int) -> dict[str, dict[str, float]]:
    """Evaluation of packed rows with the flag on, and of the same rows with the flag off."""
    sizes = {"per_device_eval_batch_size": batch_size}
    ours = make(output, family, evaluation=tiny_data.text(DOCUMENTS, seed=3), **sizes)
    theirs = make(
        output, family, data=ours.train_dataset, evaluation=ours.eval_dataset, use_chronicals=False,
        dataset_kwargs={"skip_prepare_dataset": True}, **sizes,
    )  # fmt: skip
    assert sum(map(bool, ours.eval_dataset["input_ids"])) % 2 == 1, "the ranks must not come out even"
    return {"on": ours.evaluate(), "off": theirs.evaluate()}


def apart(output: Path) -> dict[str, Any]:
    """The report of rank 0 when a part is off on the last rank alone."""
    kinds = dict(patch._BLOCKS)
    if RANKS > 1 and int(os.environ["RANK"]) == RANKS - 1:
        patch._BLOCKS["rms_norm"] = (lambda module: False, *kinds["rms_norm"][1:])
    try:
        return make(output).chronicals_report.to_dict()
    finally:
        patch._BLOCKS.update(kinds)


def step_counts(output: Path) -> list[dict[str, list[int]]]:
    """Steps of an epoch, packed and not, as the report has them and as Trainer counts them."""
    cases = [
        {"gradient_accumulation_steps": 2},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 2},
        {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 2},
    ]
    found = []
    for options in cases:
        packed = make(output, **options)
        made = (packed, make(output, packing=False, **options))
        counts = packed._step_counts()
        assert counts is not None
        own = [each.set_initial_training_values(each.args, each.get_train_dataloader())[1] for each in made]
        found.append({"report": [counts.packed, counts.unpacked], "Trainer": own})
    return found


def main(output: Path) -> None:
    # One process sees in an accumulated step what the ranks see in one.
    accumulated = {"gradient_accumulation_steps": 2 // RANKS, "router_aux_loss_coef": 0.3}
    figures = {
        "llama": train(output, "llama", per_device_train_batch_size=2 // RANKS),
        "tied": train(output, "qwen2", per_device_train_batch_size=2 // RANKS),
        "experts": train(output, "qwen3_moe", **accumulated),
        "experts, head off": train(output, "qwen3_moe", chronicals_config={"head": "off"}, **accumulated),
        "late": entries(output, ("cpu",), per_device_train_batch_size=2 // RANKS),
        "at once": entries(output, (), per_device_train_batch_size=2 // RANKS),
        "eval 1": evaluate(output, "llama", 1),
        "eval 4": evaluate(output, "llama", 4),
        "apart": apart(output),
        "step counts": step_counts(output),
    }
    if int(os.environ["RANK"]) == 0:
        steps = {name: case.pop("gradients") for name, case in figures.items() if "gradients" in case}
        torch.save(steps, output / "gradients.pt")
        (output / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
