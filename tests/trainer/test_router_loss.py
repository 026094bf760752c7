"""The auxiliary loss of a mixture of experts on packed rows: over the real tokens, whoever computes the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
import trl
from training_runs import SETTINGS, logged

from chronicals_trl import SFTConfig, SFTTrainer

COEFFICIENT = 0.3


# Text whose 13 documents make 5 rows, one of them nearly empty.
DOCUMENTS = 13


def make(tmp_path: Path, trainer_class: type = SFTTrainer, *, data=None, arguments=None, **options):
    settings = {
        **SETTINGS, "output_dir": str(tmp_path), "packing": True, "max_steps": 5, "per_device_train_batch_size": 1,
        "router_aux_loss_coef": COEFFICIENT, **options,
    }  # fmt: skip
    stock = issubclass(trainer_class, trl.SFTTrainer) and not issubclass(trainer_class, SFTTrainer)
    return trainer_class(
        model=tiny_models.build("qwen3_moe"),
        args=trl.SFTConfig(**settings) if stock else SFTConfig(use_chronicals=True, **settings),
        train_dataset=tiny_data.text(DOCUMENTS) if data is None else data,
        processing_class=tiny_data.tokenizer(),
        **(arguments or {}),
    )


def empty_batch(trainer):
    """What a rank gets whose rows of this step are all empty."""
    trainer.data_collator.max_segment_length = trainer.args.max_length
    return trainer._prepare_inputs(trainer.data_collator([{"input_ids": [], "labels": [], "seq_lengths": []}]))


@pytest.mark.parametrize("head", ["auto", "off"])
def test_a_batch_of_empty_rows_adds_nothing(tmp_path: Path, head: str) -> None:
    """No token, no auxiliary loss: 0 with gradients of 0, which DDP can average; not 0/0, and not None."""
    trainer = make(tmp_path, chronicals_config={"head": head})
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, empty_batch(trainer), num_items_in_batch=torch.tensor(50))
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def loss_func(outputs, labels, num_items_in_batch=None):
    """A user's own, that adds the auxiliary loss to the sum over the tokens."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
    return loss + COEFFICIENT * outputs.aux_loss


def doubling(base: type) -> type:
    class Doubling(base):  # type: ignore[misc, valid-type]
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 2 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    return Doubling


PATHS: dict[str, dict[str, Any]] = {
    "head": {},
    "head_off": {"ours": {"chronicals_config": {"head": "off"}}},
    "accumulation": {"ours": {"chronicals_config": {"head": "off"}}, "options": {"gradient_accumulation_steps": 2}},
    "label_smoothing": {"options": {"label_smoothing_factor": 0.1}},
    "compute_loss_func": {"options": {"arguments": {"compute_loss_func": loss_func}}},
    "subclass": {"classes": (doubling(SFTTrainer), doubling(trl.SFTTrainer))},
}


@pytest.mark.parametrize("path", PATHS)
def test_padding_is_left_out_whoever_computes_the_loss(tmp_path: Path, path: str) -> None:
    """TRL's own trainer on the same rows, which pads nothing, has the same losses and gradients."""
    case = PATHS[path]
    options, classes = case.get("options", {}), case.get("classes", (SFTTrainer, trl.SFTTrainer))
    ours = make(tmp_path / "ours", classes[0], **options, **case.get("ours", {}))
    theirs = make(
        tmp_path / "theirs", classes[1], data=ours.train_dataset, dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )  # fmt: skip
    assert min(map(len, ours.train_dataset["input_ids"])) < 10
    assert ours.chronicals_report["head"].state == ("on" if path == "head" else "off")
    assert any("compute_loss is overridden" in note for note in ours.chronicals_report.notes) == (path == "subclass")
    for trainer in (ours, theirs):
        trainer.train()
    for key in ("loss", "grad_norm", "aux_loss"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-4), key
    assert ours.router_aux_loss_coef == COEFFICIENT
    assert not ours.model.model._forward_pre_hooks


def test_evaluation_with_logits_leaves_padding_out(tmp_path: Path) -> None:
    """compute_metrics takes the parent's path with the head on."""
    losses = []
    for metrics in (None, lambda prediction: {}):
        trainer = make(
            tmp_path, per_device_eval_batch_size=1,
            arguments={"eval_dataset": tiny_data.text(DOCUMENTS, seed=3), "compute_metrics": metrics},
        )  # fmt: skip
        evaluation = trainer.evaluate()
        losses.append((evaluation["eval_loss"], evaluation["eval_aux_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("head", ["auto", "off"])
def test_documents_stay_apart_under_the_mask(tmp_path: Path, head: str) -> None:
    """The mask for the router does not reach the layers: documents of other rows and texts change nothing."""
    trainer = make(tmp_path, chronicals_config={"head": head})
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1]
    first, length = rows[0], rows[0]["seq_lengths"][0]
    changed = {**first, "input_ids": [token % 97 + 5 for token in first["input_ids"][:length]]}
    changed["input_ids"] = changed["input_ids"] + first["input_ids"][length:]
    losses = []
    for row in (first, changed):
        row = {**row, "labels": [-100] * length + row["input_ids"][length:]}
        batch = trainer._prepare_inputs(trainer.data_collator([row]))
        trainer.router_aux_loss_coef = 0.0  # the router's loss is of all documents
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(50)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
