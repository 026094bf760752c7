"""Run by test_balance_ranks.py: which batches each rank trains on, written by rank 0."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tiny_data
import tiny_models
import torch
from accelerate.utils import gather_object
from ranks import leave
from torch.utils.data import SequentialSampler

from chronicals_trl import SFTConfig, SFTTrainer

CAPACITY = 64
DOCUMENTS = 260


def documents() -> datasets.Dataset:
    """Most of them short, a few that fill a row: rows of which some are eight times as costly as the others."""
    rng = np.random.default_rng(0)
    lengths = np.where(
        rng.random(DOCUMENTS) < 0.15, rng.integers(40, CAPACITY + 1, DOCUMENTS), rng.integers(4, 12, DOCUMENTS)
    )
    return datasets.Dataset.from_dict({"input_ids": [rng.integers(5, 130, n).tolist() for n in lengths]})


class Recording(SFTTrainer):
    """Keeps what each micro-step was: epoch, optimizer step, the rows (a hash), attention cost, real tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(
            {
                "step": self.state.global_step,
                "rows": hashlib.sha256(inputs["input_ids"].numpy().tobytes()).hexdigest()[:16],
                "cost": int(inputs["cu_seq_lens_q"].diff().square().sum()),
                "tokens": inputs["num_real_tokens"],
                "slots": inputs["input_ids"].numel(),
            }
        )
        return super().training_step(model, inputs, *args, **kwargs)


class OwnSampler(Recording):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset)


def run(
    folder: Path, trainer: type[Recording] = Recording, *, resume: str | None = None, **options: Any
) -> dict[str, Any]:
    """[rank][micro-step] of a run of two epochs."""
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_chronicals": True, "packing": True, "max_length": CAPACITY,
        "num_train_epochs": 2, "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none", "bf16": False,
        "use_cpu": True, "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 11,
    }  # fmt: skip
    data = options.pop("data", None)
    made = trainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**{**settings, **options}),
        train_dataset=documents() if data is None else data,
        processing_class=tiny_data.tokenizer(),
    )
    made.train(resume_from_checkpoint=str(folder / resume) if resume else None)
    notes = [note for note in made.chronicals_report.notes if note.startswith("balance")]
    tokens = (
        sum(len(ids) for ids in made.train_dataset["input_ids"])
        if isinstance(made.train_dataset, datasets.Dataset)
        else None
    )
    return {"ranks": gather_object([made.seen]), "notes": notes, "tokens_in_the_data": tokens}


def main(output: Path) -> None:
    saved = output.parent / "saved"
    found = {
        "balanced": run(saved, save_strategy="steps", save_steps=1),
        "only shuffled": run(output.parent / "off", chronicals_config={"balance_ranks": False}, num_train_epochs=1),
        "sequential": run(output.parent / "order", train_sampling_strategy="sequential", num_train_epochs=1),
        "own sampler": run(output.parent / "own", OwnSampler, num_train_epochs=1),
        "stream": run(output.parent / "stream", data=documents().to_iterable_dataset(), max_steps=2),
        "split": run(
            output.parent / "split", num_train_epochs=1, per_device_train_batch_size=4,
            accelerator_config={"split_batches": True},
        ),
    }  # fmt: skip
    steps = 1 + found["balanced"]["ranks"][0][-1]["step"]
    # In the middle of the first epoch, and in the middle of the second.
    for step in (steps // 4, steps // 2 + steps // 4):
        found[f"resumed at {step}"] = run(saved, resume=f"checkpoint-{step}")
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
