"""Packed data in the trainer: streams that resume, masked documents, columns, and batches that stay whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
from datasets import Dataset, IterableDataset
from training_runs import SETTINGS, logged

from chronicals_trl import SFTConfig, SFTTrainer


def make(tmp_path: Path, *, data: Any, evaluation: Any = None, **options: Any) -> SFTTrainer:
    settings = {**SETTINGS, "use_chronicals": True, "packing": True, "output_dir": str(tmp_path), **options}
    return SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**settings),
        train_dataset=data,
        eval_dataset=evaluation,
        processing_class=tiny_data.tokenizer(),
    )


def generate(rows: list[str]) -> Any:
    for text in rows:
        yield {"text": text}


def stream(kind: str) -> IterableDataset:
    if kind == "generator":
        return IterableDataset.from_generator(generate, gen_kwargs={"rows": tiny_data.sentences(60)})
    return tiny_data.text(60).to_iterable_dataset(num_shards=3)


@pytest.mark.parametrize("kind", ["generator", "arrow"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_training_on_a_stream_resumes_exactly(tmp_path: Path, kind: str, shuffled: bool) -> None:
    """From a checkpoint of each step: the same losses. Step 5 is in the second epoch, with its own order."""
    options = {
        "max_steps": 7, "per_device_train_batch_size": 3, "shuffle_dataset": shuffled,
        "chronicals_config": {"packing_window": 25}, "save_only_model": False,
    }  # fmt: skip
    whole = make(tmp_path, data=stream(kind), save_strategy="steps", save_steps=1, **options)
    whole.train()
    losses = logged(whole, "loss")
    assert len(losses) == len(set(losses)) == 7
    assert 1 < whole.state.log_history[-2]["epoch"] < 2 and whole.state.log_history[3]["epoch"] <= 1
    for step in range(1, 7):
        resumed = make(tmp_path, data=stream(kind), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert logged(resumed, "loss") == losses, step


def test_stream_is_shuffled_before_packing_once_and_every_document_stays(tmp_path: Path) -> None:
    def documents(trainer: SFTTrainer) -> list[tuple[int, ...]]:
        found = []
        for row in trainer.train_dataset:
            start = 0
            for length in row["seq_lengths"]:
                found.append(tuple(row["input_ids"][start : start + length]))
                start += length
        return found

    options = {"chronicals_config": {"packing_window": 25}}
    plain = documents(make(tmp_path, data=stream("generator"), **options))
    trainer = make(tmp_path, data=stream("generator"), shuffle_dataset=True, **options)
    mixed = documents(trainer)
    assert Counter(plain) == Counter(mixed) and plain != mixed
    state = None
    rows = []
    for row in trainer.train_dataset:
        rows.append(row)
        if len(rows) == 5:
            state = trainer.train_dataset.state_dict()
    trainer.train_dataset.load_state_dict(state)
    assert list(trainer.train_dataset) == rows[5:]


def test_batches_are_not_cut_by_the_dispatcher(tmp_path: Path) -> None:
    """Accelerate's default for streams would leave one entry of cu_seqlens."""
    evaluation = tiny_data.text(12, seed=9)
    options: dict[str, Any] = {"accelerator_config": {"dispatch_batches": True}}
    for trainer, noted in (
        (make(tmp_path, data=tiny_data.text(), evaluation=evaluation.to_iterable_dataset()), False),
        (make(tmp_path, data=tiny_data.text(), evaluation=evaluation, **options), True),
        (make(tmp_path, data=stream("arrow"), evaluation=evaluation, **options), True),
    ):
        for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
            batch = next(iter(loader))
            assert batch["cu_seq_lens_q"][-1] == batch["cu_seq_lens_k"][-1] == batch["input_ids"].numel()
        assert any("dispatch_batches=True" in note for note in trainer.chronicals_report.notes) == noted


def labelled(count: int) -> Dataset:
    ids = tiny_data.tokenized(count)["input_ids"]
    labels = [row if number % 3 else [-100] * len(row) for number, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "text": ["a"] * count, "weights": ids})


def test_masked_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    """In the training and in the evaluation set, as without packing."""
    trainer = make(tmp_path, data=labelled(30), evaluation=labelled(12))
    plain = make(tmp_path, data=labelled(30), evaluation=labelled(12), packing=False)
    for packed, alone, dropped in (
        (trainer.train_dataset, plain.train_dataset, 10), (trainer.eval_dataset, plain.eval_dataset, 4),
    ):  # fmt: skip
        assert sum(map(len, packed["seq_lengths"])) == len(alone)
        assert sum(map(len, packed["input_ids"])) == sum(map(len, alone["input_ids"]))
        assert any(f"{dropped} without a label to learn dropped" in note for note in trainer.chronicals_report.notes)


def test_an_evaluation_set_without_labels_is_named(tmp_path: Path) -> None:
    nothing = labelled(12).filter(lambda row: {*row["labels"]} == {-100})
    with pytest.raises(ValueError, match=r"The eval\['b'\] data set cannot be packed.*nothing to learn"):
        make(tmp_path, data=labelled(30), evaluation={"a": labelled(12), "b": nothing})


@pytest.mark.planted_fault
def test_token_columns_stay_where_the_user_keeps_columns(tmp_path: Path) -> None:
    trainer = make(tmp_path, data=labelled(30))
    assert trainer.train_dataset.column_names == ["input_ids", "labels", "seq_lengths"]
    kept = make(tmp_path, data=labelled(30), remove_unused_columns=False)
    assert kept.train_dataset["weights"] == kept.train_dataset["input_ids"]
    assert any("columns left out, not one value a token: text" in note for note in kept.chronicals_report.notes)
    kept.train()
    trainer.train()
    assert logged(kept, "loss") == logged(trainer, "loss")


def test_a_resume_with_other_rows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    make(tmp_path, data=tiny_data.text(60), **options).train()
    checkpoint = str(tmp_path / "checkpoint-2")

    same = make(tmp_path, data=tiny_data.text(60), **options)
    same.train(resume_from_checkpoint=checkpoint)
    assert not any("was written with other rows" in note for note in same.chronicals_report.notes)

    other = make(tmp_path, data=tiny_data.text(50), **{**options, "max_length": 64})
    other.train(resume_from_checkpoint=checkpoint)
    note = next(note for note in other.chronicals_report.notes if "was written with other rows" in note)
    assert "max_length 96 then, 64 now" in note and "documents 60 then, 50 now" in note
    assert note in caplog.text and note in (tmp_path / "chronicals_report.json").read_text()
