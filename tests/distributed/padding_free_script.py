"""Run by test_padding_free_ranks.py: padding-free batches beside TRL's padded ones; rank 0 writes the logs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny_data
import tiny_models
import trl
from accelerate.utils import gather_object
from ranks import leave

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl import trainer as trainer_module

# As under FSDP, where one rank alone has the weights to try the model with.
LEAK = "one rank sees a leak"

CASES: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "batches of both ranks, split": {
        "accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 6,
    },
    "stream": {},
    LEAK: {},
}  # fmt: skip


def train(output: Path, ours: bool, case: str) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(output / "out"), "max_length": 96, "max_steps": 5, "logging_steps": 1,
        "learning_rate": 1e-2, "report_to": "none", "bf16": False, "use_cpu": True, "save_strategy": "no",
        "gradient_checkpointing": False, "disable_tqdm": True, "per_device_train_batch_size": 3, **CASES[case],
    }  # fmt: skip
    if ours:
        setting = "auto" if case == LEAK else "on"
        settings |= {"use_chronicals": True, "chronicals_config": {"padding_free": setting, "lora_plus": "off"}}
    leak = "logits differ" if case == LEAK and os.environ["RANK"] == "0" else None
    trainer_module.verify_isolation = lambda model, device: leak
    data = tiny_data.text(46)  # no multiple of a step's documents
    trainer = (SFTTrainer if ours else trl.SFTTrainer)(
        model=tiny_models.build("llama"),
        args=(SFTConfig if ours else trl.SFTConfig)(**settings),
        train_dataset=data.to_iterable_dataset() if case == "stream" else data,
        processing_class=tiny_data.tokenizer(),
    )
    trainer.train()
    return trainer


def main(output: Path) -> None:
    figures = {}
    for case in CASES:
        ours, theirs = (train(output, flag, case) for flag in (True, False))
        batch = next(iter(ours.get_train_dataloader()))
        figures[case] = {
            "ours": [entry for entry in ours.state.log_history if "loss" in entry],
            "theirs": [entry for entry in theirs.state.log_history if "loss" in entry],
            "rows": gather_object([batch["input_ids"].shape[0]]),
            "offsets": len(batch.get("cu_seq_lens_q", ())),
            "notes": gather_object([note for note in ours.chronicals_report.notes if note.startswith("padding-free")]),
        }
    if int(os.environ["RANK"]) == 0:
        (output / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
