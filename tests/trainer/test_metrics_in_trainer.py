"""TRL's metrics from sums that wait for the log: around the ranks first, and none of another run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
from training_runs import SETTINGS, logged
from transformers import TrainerCallback

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.observe import trainer as observe_trainer


def make(tmp_path: Path, *callbacks: TrainerCallback, **options: Any) -> SFTTrainer:
    options = {"use_chronicals": True, "output_dir": str(tmp_path / "out"), **options}
    return SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**{**SETTINGS, **options}),
        train_dataset=tiny_data.text(60),
        processing_class=tiny_data.tokenizer(),
        callbacks=list(callbacks),
    )


def test_sums_are_read_when_they_have_been_around(tmp_path: Path) -> None:
    class Work:
        def __init__(self, sums: torch.Tensor) -> None:
            self.sums = sums

        def wait(self) -> None:
            self.sums.mul_(2)  # another rank with the same numbers
            self.sums[0] /= 2  # and no label

    trainer = make(tmp_path)
    trainer._sums = [torch.tensor(sums) for sums in ([4.0, 6.0, 1.0, 3.0, 1.0], [0.0] * 5, [2.0, 1.0, 1.0, 1.0, 0.5])]
    trainer._sums_on_their_way = list(map(Work, trainer._sums))
    trainer.model.train()
    trainer.log({})
    told = trainer.state.log_history[-1]
    assert told["entropy"] == pytest.approx((12 / 4 + 0 + 2 / 2) / 3)
    assert told["mean_token_accuracy"] == pytest.approx((2 / 4 + 0 + 2 / 2) / 3)
    assert told["aux_loss"] == pytest.approx((6 / 2 + 0 + 2 / 1) / 3)  # over the ranks that have one
    assert trainer._sums == trainer._sums_on_their_way == []


def test_an_interval_ends_with_sums_that_have_been_around(tmp_path: Path) -> None:
    """On a GPU `wait` has the stream wait on which the step is, not the one on which the entry is read."""
    waited = []
    trainer = make(tmp_path)
    trainer._sums = [torch.ones(5)]
    trainer._sums_on_their_way = [SimpleNamespace(wait=lambda: waited.append(True))]
    interval = trainer._begin_interval()
    assert waited and len(interval.sums) == 1 and trainer._sums == trainer._sums_on_their_way == []


def test_a_run_that_failed_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    class FailingOnce(TrainerCallback):
        failed = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3 and not self.failed:
                self.failed = True
                raise ArithmeticError("a user's callback")

    # A rate of 0: the runs' losses, and so their metrics, are alike.
    trainer = make(tmp_path, FailingOnce(), logging_steps=4, learning_rate=0.0)
    with pytest.raises(ArithmeticError):
        trainer.train()
    trainer.train()
    fresh = make(tmp_path / "fresh", logging_steps=4, learning_rate=0.0)
    fresh.train()
    assert logged(trainer, "entropy") == logged(fresh, "entropy")


def test_few_sums_wait_in_a_run_that_hardly_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            waiting.append(len(trainer._sums))

    told = []
    for most in (1024, 3):
        monkeypatch.setattr(observe_trainer, "MOST_SUMS", most)
        trainer = make(tmp_path / str(most), Watch(), logging_steps=8, max_steps=8)
        trainer.train()
        told.append([logged(trainer, name) for name in ("entropy", "mean_token_accuracy", "num_tokens")])
    assert waiting[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert waiting[8:] == [1, 2, 0, 1, 2, 0, 1, 2]
    assert told[0] == told[1]


def test_a_log_of_anything_else_has_no_metrics(tmp_path: Path) -> None:
    """Of TRL's keys neither: of a run's last log, say, which is told of its time."""
    trainer = make(tmp_path)
    trainer.train()
    assert "num_tokens" in trainer.state.log_history[-2]
    trainer.log({"mine": 1.0})
    for entry in trainer.state.log_history[-2:]:
        assert not [key for key in entry if key.endswith(("num_tokens", "entropy", "mean_token_accuracy"))]
