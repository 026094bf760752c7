"""Started by test_resume_ranks.py: packed runs that stop and go on, on this number of ranks or another.

Arguments: a folder for all checkpoints, a file for what was found, and runs NAME=LAYOUT[+OPTION ...][@CHECKPOINT]: the
folder that the checkpoints go to, how the run is sharded, and the checkpoint (below the first folder) that it goes on
from. Options: lora, with dropout, in place of the whole model; still, without dropout; balance, rows that
`balance_ranks` deals; epoch, one epoch of an odd number of rows.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import tiny_data
import tiny_models
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from balance_script import documents
from head_script import _cpus_as_accelerators
from ranks import leave
from torch.distributed.tensor import DTensor

from chronicals_trl import SFTConfig, SFTTrainer

STEPS, ROWS, ACCUMULATION, CAPACITY = 7, 4, 2, 64  # rows of a micro-batch, over all ranks
# 54 rows, one epoch of the steps: two and four ranks have empty rows appended, one rank has not.
DOCUMENTS = 242
# 9 rows: of two ranks with a row each, the second one's last is empty.
UNEVEN_DOCUMENTS = 30
RANKS = int(os.environ["WORLD_SIZE"])


class Recording(SFTTrainer):
    """Keeps the rows (a hash of each) of every optimizer step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: dict[int, list[str]] = {}
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        # Of its labelled tokens: what fills a row up depends on the batch.
        rows = zip(inputs["input_ids"].view(-1, CAPACITY), inputs["labels"].view(-1, CAPACITY), strict=True)
        real = [row[labels != -100].numpy().tobytes() for row, labels in rows if (labels != -100).any()]
        hashes = [hashlib.sha256(tokens).hexdigest()[:16] for tokens in real]
        self.seen.setdefault(self.state.global_step + 1, []).extend(hashes)
        return super().training_step(model, inputs, *args, **kwargs)


def adapter(dropout: float) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def train(folder: Path, name: str, layout: str, options: list[str], checkpoint: str | None) -> dict[str, Any]:
    lora = "lora" in options
    sharding = {"fsdp": True, "fsdp_config": {"version": 2}} if layout == "fsdp2" else {}
    if layout.startswith("zero"):
        sharding = {
            "deepspeed": {
                "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": int(layout[-1]), "stage3_gather_16bit_weights_on_model_save": True},
            }
        }  # fmt: skip
    steps: dict[str, Any] = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 3,
        "per_device_train_batch_size": ROWS // RANKS, "gradient_accumulation_steps": ACCUMULATION,
    }  # fmt: skip
    if "epoch" in options:
        steps = {
            "num_train_epochs": 1, "save_strategy": "no", "per_device_train_batch_size": 2 // RANKS,
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
    with _cpus_as_accelerators(SimpleNamespace(mode=layout)):
        trainer = Recording(
            model=tiny_models.build("llama"),
            args=SFTConfig(
                output_dir=str(folder / name), use_chronicals=True, packing=True, max_length=CAPACITY,
                chronicals_config={"balance_ranks": "balance" in options}, learning_rate=1e-2, weight_decay=0.1,
                lr_scheduler_type="cosine", warmup_steps=2, optim="adamw_torch", logging_steps=1, report_to="none",
                seed=11,
                bf16=False, gradient_checkpointing=False,
                disable_tqdm=True, use_cpu=not layout.startswith("zero"), **sharding, **steps,
            ),
            train_dataset=documents().select(range(UNEVEN_DOCUMENTS if "epoch" in options else DOCUMENTS)),
            processing_class=tiny_data.tokenizer(),
            peft_config=adapter(0.0 if "still" in options else 0.3) if lora else None,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(folder / checkpoint))
        weights = {plain(n): whole(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
        notes = trainer.chronicals_report.notes
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = gather_object([trainer.seen])
    return {
        "losses": {entry["step"]: entry["loss"] for entry in logs},
        "norms": {entry["step"]: float(entry["grad_norm"]) for entry in logs},
        "rates": {entry["step"]: entry["learning_rate"] for entry in logs},
        "rows": {step: sorted(row for rank in seen for row in rank[step]) for step in trainer.seen},
        "weights": weights,
        "notes": notes,
        "bins": len(trainer.train_dataset),
        "ranks": trainer.args.world_size,
    }


def plain(name: str) -> str:
    return name.removeprefix("module.")


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().cpu().clone()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    found = {}
    for run in sys.argv[3:]:
        name, _, told = run.partition("=")
        told, _, checkpoint = told.partition("@")
        layout, *options = told.split("+")
        found[name] = train(Path(sys.argv[1]), name, layout, options, checkpoint or None)
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[2])
    leave()
