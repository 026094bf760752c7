"""The padding tail of a packed row is computed on: it must change nothing that the documents compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_data
import tiny_models
import torch
from datasets import Dataset
from training_runs import logged, run

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.packing import PackedCollator

_ROPE = {"rope_theta": 10000.0}
# Documents stay below the length at which the rotation changes; a tail that counted on would be above it.
_POSITION_SENSITIVE = {
    "dynamic NTK": (
        "llama",
        {"max_position_embeddings": 32, "rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 4.0}},
    ),
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                **_ROPE, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}  # fmt: skip


def short_documents(lengths: tuple[int, ...] = (20, 25, 18, 22)) -> Dataset:
    ids = [token for row in tiny_data.tokenized()["input_ids"] for token in row]
    return Dataset.from_dict({"input_ids": [ids[5 * i : 5 * i + length] for i, length in enumerate(lengths)]})


@pytest.mark.parametrize("kind", _POSITION_SENSITIVE)
def test_rope_that_looks_at_the_largest_position_equals_stock(tmp_path: Path, kind: str) -> None:
    family, overrides = _POSITION_SENSITIVE[kind]
    options = {"packing": True, "max_length": 256, "max_steps": 2}
    ours, gradients = run(
        SFTTrainer, SFTConfig, tmp_path, model=tiny_models.build(family, **overrides), data=short_documents(),
        options={**options, "use_chronicals": True},
    )  # fmt: skip
    assert len(ours.train_dataset[0]["input_ids"]) < 128  # most of the row is tail
    theirs, reference = run(
        SFTTrainer, SFTConfig, tmp_path, model=tiny_models.build(family, **overrides), data=ours.train_dataset,
        options={**options, "dataset_kwargs": {"skip_prepare_dataset": True}},
    )  # fmt: skip
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-5)
    for name, gradient in reference.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_learned_positions_shorter_than_a_row(tmp_path: Path) -> None:
    ours, _ = run(
        SFTTrainer, SFTConfig, tmp_path, model=tiny_models.build("gpt2", n_positions=32), data=short_documents(),
        options={"packing": True, "max_length": 128, "max_steps": 2, "use_chronicals": True},
    )  # fmt: skip
    assert logged(ours, "loss")[1] < logged(ours, "loss")[0]


def _norm_without_epsilon() -> torch.nn.Module:
    """What Gemma 3n does with its embeddings: a root of a mean square whose gradient at zero is not finite."""

    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(tiny_models.VOCAB_SIZE, 8)
            torch.nn.init.zeros_(self.embedding.weight[tiny_data.tokenizer().pad_token_id].data)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(input_ids)
            return hidden / hidden.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-5)

    return Root()


@pytest.mark.parametrize("rows", ["with a tail", "with an empty row", "of empty rows alone"])
def test_a_pad_token_without_an_embedding_gives_finite_gradients(rows: str) -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [4]}
    empty: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    examples = {"with a tail": [row], "with an empty row": [row, empty], "of empty rows alone": [empty, empty]}[rows]
    collate = PackedCollator(pad_token_id=tiny_data.tokenizer().pad_token_id, capacity=16, filler_ids=[5, 6])
    batch = collate(examples)
    model = _norm_without_epsilon()
    (model(batch["input_ids"]) * (batch["labels"] != -100)[..., None]).sum().backward()
    assert model.embedding.weight.grad.isfinite().all()


def test_the_trainer_gives_the_collator_real_tokens(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", use_chronicals=True, packing=True,
            max_length=96, disable_tqdm=True,
        ),
        train_dataset=short_documents(),
        processing_class=tiny_data.tokenizer(),
    )  # fmt: skip
    assert trainer.data_collator.filler_ids == trainer.train_dataset[0]["input_ids"][:16]
