"""The auxiliary loss of a mixture of experts on packed rows: over the real tokens, whoever computes the loss."""

from __future__ import annotations

from pathlib import Path

import tiny_data
import tiny_models
import torch
from training_runs import SETTINGS

from chronicals_trl import SFTConfig, SFTTrainer

COEFFICIENT = 0.3


def make(tmp_path: Path, trainer_class: type = SFTTrainer, **options):
    settings = {
        **SETTINGS, "output_dir": str(tmp_path), "use_chronicals": True, "packing": True,
        "router_aux_loss_coef": COEFFICIENT, **options,
    }  # fmt: skip
    return trainer_class(
        model=tiny_models.build("qwen3_moe"),
        args=SFTConfig(**settings),
        train_dataset=tiny_data.text(),
        processing_class=tiny_data.tokenizer(),
    )


def empty_batch(trainer):
    """What a rank gets whose rows of this step are all empty."""
    trainer.data_collator.max_segment_length = trainer.args.max_length
    return trainer._prepare_inputs(trainer.data_collator([{"input_ids": [], "labels": [], "seq_lengths": []}]))


def test_a_batch_of_empty_rows_adds_nothing(tmp_path: Path) -> None:
    """No token, no auxiliary loss: 0 with gradients of 0, which DDP can average; not 0/0, and not None."""
    trainer = make(tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, empty_batch(trainer), num_items_in_batch=torch.tensor(50))
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
