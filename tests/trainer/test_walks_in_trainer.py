"""A run whose steps walk through no module: what it costs is as it was, and so is the model when it has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_data
import tiny_models
from torch import nn
from training_runs import SETTINGS
from transformers import TrainerCallback

from chronicals_trl import SFTConfig, SFTTrainer

STEPS = 4


class Walked(TrainerCallback):
    """The walks through the whole model in each step, from its beginning to the next one's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_step: list[int] = []
        self.root: Any = None
        original = nn.Module.named_modules

        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is self.root and self.by_step:
                self.by_step[-1] += 1
            return original(module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "named_modules", counted)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.root = model
        self.by_step.append(0)


def make(tmp_path: Path, watch: TrainerCallback, *, lora: bool = False, **options: Any) -> SFTTrainer:
    options = {"use_chronicals": True, "max_steps": STEPS, "gradient_accumulation_steps": 2, **options}
    return SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**{**SETTINGS, **options, "output_dir": str(tmp_path / "out")}),
        train_dataset=tiny_data.text(60),
        processing_class=tiny_data.tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules="all-linear") if lora else None,
        callbacks=[watch],
    )


@pytest.mark.parametrize("lora", [False, True])
def test_steps_walk_through_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    watch = Walked(monkeypatch)
    trainer = make(tmp_path, watch, lora=lora)
    before = {id(m): dict(m.__dict__) for m in trainer.model.modules()}
    trainer.train()
    assert watch.by_step[0] > 0  # it lists the model
    assert watch.by_step[1:-1] == [0] * (STEPS - 2)
    assert trainer._walks is None
    assert {"train", "parameters"} & trainer.model.__dict__.keys() == set()
    assert {id(m) for m in trainer.model.modules()} == before.keys()


def test_stock_trl_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would see nothing."""
    watch = Walked(monkeypatch)
    make(tmp_path, watch, use_chronicals=False).train()
    assert all(watch.by_step)


@pytest.mark.parametrize("somebody_else", [False, True])
def test_the_operations_told_are_trainers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, somebody_else: bool
) -> None:
    class Growing(Walked):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if somebody_else:  # has a `train` there: the lists do not answer, and are not kept up
                kwargs["model"].__dict__["train"] = kwargs["model"].train

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                kwargs["model"].add_module("extra", nn.Linear(50, 50))

    told = []
    for on in (True, False):
        # Of the same slots: rows without padding have fewer.
        trainer = make(
            tmp_path / str(on), Growing(monkeypatch), use_chronicals=on, chronicals_config={"padding_free": "off"}
        )
        trainer.train()
        told.append(trainer.state.total_flos)
    assert told[0] == told[1] > 0


@pytest.mark.planted_fault  # the new module has no gradient
def test_the_operations_of_a_second_run_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, Walked(monkeypatch))
    told = []
    for _ in range(2):
        trainer.train()
        told.append((trainer.state.total_flos, trainer.model.num_parameters(exclude_embeddings=True)))
        trainer.model.add_module("extra", nn.Linear(50, 50))
    (first, few), (second, more) = told
    assert second * few == first * more


def test_a_model_that_an_engine_runs_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Walked(monkeypatch)
    trainer = make(tmp_path, watch, auto_find_batch_size=True)
    trainer.train()
    assert all(watch.by_step)


def test_a_run_that_fails_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Walked):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise ArithmeticError("a user's callback")

    trainer = make(tmp_path, Failing(monkeypatch))
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert {"train", "parameters"} & trainer.model.__dict__.keys() == set()
    assert trainer._walks is None


def test_a_parameter_that_comes_in_the_run_is_clipped_and_zeroed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Adding(Walked):
        """The last norm gets a new weight after the second step."""

        seen: nn.Parameter | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            norm = kwargs["model"].model.norm
            if state.global_step == 2:
                norm.weight = self.seen = nn.Parameter(norm.weight.detach().clone())

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.seen is not None:
                assert self.seen.grad is not None and any(p is self.seen for p in kwargs["model"].parameters())

    watch = Adding(monkeypatch)
    make(tmp_path, watch).train()
    assert watch.seen is not None and watch.seen.grad is None
