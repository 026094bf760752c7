"""Started by test_killed_rank.py under torchrun: runs of which a rank is killed, and what is resumed from the rest.

Arguments: a folder, and what happens: "step" (rank 1 dies in step 5), "optimizer" (rank 0 dies while it writes that
file of checkpoint-6), or "resume" (a whole run, and runs that go on from both).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import tiny_data
import tiny_models
import torch
import torch.distributed as dist
from balance_script import documents
from ranks import leave

from chronicals_trl import SFTConfig, SFTTrainer

RANK = int(os.environ["RANK"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killed(SFTTrainer):
    """Dies as `kill` says."""

    kill = ""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.kill == "step" and RANK == 1 and self.state.global_step == 4:
            die()
        return super().training_step(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str, *args: Any, **kwargs: Any) -> None:
        super()._save_optimizer_and_scheduler(output_dir, *args, **kwargs)
        if self.kill == "optimizer" and RANK == 0 and output_dir.endswith("-6"):
            file = Path(output_dir) / "optimizer.pt"
            os.truncate(file, file.stat().st_size // 2)
            die()


def train(folder: Path, *, kill: str = "", resume: str | bool | None = None) -> dict[str, Any]:
    trainer = Killed(
        model=tiny_models.build("llama"),
        args=SFTConfig(
            output_dir=str(folder), use_chronicals=True, packing=True, max_length=64, max_steps=7, bf16=False,
            learning_rate=1e-2, report_to="none", use_cpu=True, logging_steps=1, save_strategy="steps", save_steps=3,
            gradient_checkpointing=False, disable_tqdm=True, per_device_train_batch_size=2, seed=11,
        ),
        train_dataset=documents(),
        processing_class=tiny_data.tokenizer(),
    )  # fmt: skip
    trainer.kill = kill
    trainer.train(resume_from_checkpoint=resume)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {"losses": losses, "notes": trainer.chronicals_report.notes}


def main(folder: Path, what: str) -> None:
    if what != "resume":
        train(folder / what, kill=what)
        return
    found: dict[str, Any] = {"whole": train(folder / "whole")}
    try:
        train(folder / "optimizer", resume=str(folder / "optimizer" / "checkpoint-6"))
    except ValueError as error:
        found["half"] = str(error)
    for name in ("step", "optimizer"):
        found[name] = train(folder / name, resume=True)
    (folder / f"found{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]), sys.argv[2])
    leave()
