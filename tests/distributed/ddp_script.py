"""Run by test_ddp.py under torchrun: a packed run with the flag on, its figures written by rank 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny_data
import tiny_models
import torch
import torch.distributed as dist

from chronicals_trl import SFTConfig, SFTTrainer


def main(output: Path, batch_size: int, family: str, max_length: int) -> None:
    gradients: dict[str, torch.Tensor] = {}

    class Recording(SFTTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if not gradients:
                gradients.update({n: p.grad.clone() for n, p in self.model.named_parameters()})
            return loss

    trainer = Recording(
        model=tiny_models.build(family),
        args=SFTConfig(
            output_dir=str(output / "out"), use_chronicals=True, packing=True, max_length=max_length,
            num_train_epochs=1, logging_steps=1, learning_rate=1e-2, report_to="none", bf16=False, use_cpu=True,
            save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
            per_device_train_batch_size=batch_size, per_device_eval_batch_size=1,
            router_aux_loss_coef=0.0 if family == "qwen3_moe" else None,
        ),
        train_dataset=tiny_data.prompt_completion(21),
        eval_dataset=tiny_data.text(7, seed=3),
        processing_class=tiny_data.tokenizer(),
    )  # fmt: skip
    seen = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    lengths = [int(batch["num_real_tokens"]) for batch in trainer.get_train_dataloader()]
    counts = torch.tensor([len(seen), sum(lengths)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    trainer.train()
    evaluation = trainer.evaluate()
    if trainer.args.process_index == 0:
        torch.save(gradients, output / "gradients.pt")
        (output / "figures.json").write_text(
            json.dumps(
                {
                    "log": [entry for entry in trainer.state.log_history if "loss" in entry],
                    "eval_loss": evaluation["eval_loss"],
                    "real_tokens_of_all_ranks": int(counts[1]),
                    "tokens_in_the_data": sum(len(ids) for ids in trainer.train_dataset["input_ids"]),
                    "report": trainer.chronicals_report.to_dict(),
                    "world_size": trainer.args.world_size,
                }
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
