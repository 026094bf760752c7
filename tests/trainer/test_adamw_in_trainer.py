"""The fused AdamW in the trainer: the same training, what it leaves to torch, and nothing of it left; on the CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
import trl
from torch.optim import SGD, AdamW
from training_runs import SETTINGS, logged, run
from transformers import TrainerCallback

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.optim import adamw_trainer
from chronicals_trl.optim.adamw import FusedAdamW, take_over

CLIPS = 0.05  # far below the gradients of these models


@pytest.fixture(autouse=True)
def clips(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Training on the CPU as if the kernel were there; the coefficient of each step that clips inside of it."""
    given: list[float] = []
    original = FusedAdamW.clip

    def clip(self: FusedAdamW, coefficient: torch.Tensor) -> None:
        given.append(float(coefficient))
        original(self, coefficient)

    monkeypatch.setattr(adamw_trainer, "DEVICES", ("cpu",))
    monkeypatch.setattr(FusedAdamW, "clip", clip)
    return given


def trained(tmp_path: Path, setting: str = "auto", **options: Any) -> Any:
    names = ("peft_config", "callbacks", "optimizers", "optimizer_cls_and_kwargs", "model", "trainer_class")
    arguments = {name: options.pop(name) for name in names if name in options}
    options = {
        "use_chronicals": True, "max_steps": 4, "max_grad_norm": CLIPS,
        "chronicals_config": {"adamw": setting, **options.pop("config", {})}, **options,
    }  # fmt: skip
    trainer_class = arguments.pop("trainer_class", SFTTrainer)
    return run(trainer_class, SFTConfig, tmp_path / setting, options=options, **arguments)[0]


def require_same(ours: Any, theirs: Any) -> None:
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(logged(ours, key), logged(theirs, key), rtol=1e-4, atol=1e-6)
    # Adam's first steps are of the rate's size whatever the gradient's: a rounding of one near 0 shows.
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_same_training(tmp_path: Path, clips: list[float], lora: bool, accumulation: int) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "weight_decay": 0.1}
    if lora:
        options["peft_config"] = pytest.importorskip("peft").LoraConfig(r=2, target_modules="all-linear")
    ours = trained(tmp_path, **options)
    assert len(clips) == 4 and max(clips) < 0.9
    theirs = trained(tmp_path, "off", **options)
    assert len(clips) == 4
    assert ours.chronicals_report["adamw"].state == "on"
    assert theirs.chronicals_report["adamw"].state == "off"
    require_same(ours, theirs)
    assert type(ours.optimizer.optimizer) is AdamW
    assert ours._adamw is None


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_the_state_is_there_before_the_first_pass(tmp_path: Path, setting: str) -> None:
    """Behind it, it would lie in pieces of that pass's memory."""
    seen: list[tuple[int, int]] = []

    class Looking(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            gradients = sum(p.grad is not None for p in self.model.parameters())
            seen.append((len(self.optimizer.state), gradients))
            return super().compute_loss(*args, **kwargs)

    trainer = trained(tmp_path, setting, trainer_class=Looking)
    trainable = sum(p.requires_grad for p in trainer.model.parameters())
    assert seen[0] == (trainable if setting == "auto" else 0, 0)
    assert seen[-1] == (trainable, 0)


def test_memory_that_runs_out_for_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second try, with smaller batches, has it in time too."""
    tries: list[int] = []
    seen: list[int] = []
    make_state = FusedAdamW.make_state

    def making(self: FusedAdamW) -> None:
        tries.append(len(self.state))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        make_state(self)

    class Looking(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(len(self.optimizer.state))
            return super().compute_loss(*args, **kwargs)

    monkeypatch.setattr(FusedAdamW, "make_state", making)
    trainer = trained(tmp_path, trainer_class=Looking, auto_find_batch_size=True)
    assert tries == [0, 0]
    assert set(seen) == {sum(p.requires_grad for p in trainer.model.parameters())}
    assert type(trainer.optimizer.optimizer) is AdamW


def test_stock_trl_trains_the_same(tmp_path: Path) -> None:
    ours = trained(tmp_path, packing=False, config={"padding_free": "off"})
    theirs = run(trl.SFTTrainer, trl.SFTConfig, tmp_path / "trl", options={"max_grad_norm": CLIPS})[0]
    require_same(ours, theirs)


def test_nothing_is_clipped_without_a_bound(tmp_path: Path, clips: list[float]) -> None:
    ours, theirs = trained(tmp_path, max_grad_norm=0.0), trained(tmp_path, "off", max_grad_norm=0.0)
    assert not clips
    require_same(ours, theirs)


def test_a_bound_that_is_not_reached(tmp_path: Path, clips: list[float]) -> None:
    trained(tmp_path, max_grad_norm=1e6)
    assert clips == [1.0] * 4


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_a_callback_sees_clipped_gradients(tmp_path: Path, clips: list[float], event: str) -> None:
    norms: list[float] = []

    def look(self: Any, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())

    callback = type("Looking", (TrainerCallback,), {event: look})
    trainer = trained(tmp_path, callbacks=[callback()])
    assert norms == pytest.approx([CLIPS] * 4, rel=1e-3)
    assert not clips
    assert trainer.chronicals_report["adamw"].state == "on"
    (note,) = (note for note in trainer.chronicals_report.notes if "clipped" in note)
    assert "Looking" in note


def test_a_hook_sees_clipped_gradients(tmp_path: Path, clips: list[float]) -> None:
    norms: list[float] = []

    class Hooking(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            optimizer.optimizer.register_step_pre_hook(self.look)

        def look(self, optimizer: Any, *_: Any) -> None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads).item())

    trained(tmp_path, callbacks=[Hooking()])
    assert norms == pytest.approx([CLIPS] * 4, rel=1e-3)
    assert not clips


def _around_clipping(trainer: SFTTrainer, look: Any) -> None:
    own = trainer.accelerator.clip_grad_norm_

    def clip(*args: Any) -> Any:
        norm = own(*args)
        look()
        return norm

    trainer.accelerator.clip_grad_norm_ = clip  # type: ignore[method-assign]


def _on_a_callback(trainer: SFTTrainer, look: Any) -> None:
    callback = TrainerCallback()
    callback.on_pre_optimizer_step = lambda *_, **__: look()  # type: ignore[method-assign]
    trainer.add_callback(callback)


class _AroundTheStep(TrainerCallback):
    def __init__(self, look: Any, inner: bool) -> None:
        self.look, self.inner = look, inner

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer = optimizer.optimizer if self.inner else optimizer
        step = optimizer.step

        def looking(*args: Any) -> Any:
            self.look()
            return step(*args)

        optimizer.step = looking


@pytest.mark.parametrize("way", ["accelerator", "callback", "step", "optimizer's step", "subclass"])
def test_who_else_sees_clipped_gradients(tmp_path: Path, clips: list[float], way: str) -> None:
    norms: list[float] = []

    class Mine(SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if way == "accelerator":
                _around_clipping(self, self.look)
            elif way == "callback":
                _on_a_callback(self, self.look)
            elif way != "subclass":
                self.add_callback(_AroundTheStep(self.look, inner=way != "step"))

        def look(self) -> None:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads).item())

    class Clipping(Mine):
        def _clip_grad_norm(self, *args: Any) -> Any:
            norm = super()._clip_grad_norm(*args)
            self.look()
            return norm

    trainer = trained(tmp_path, trainer_class=Clipping if way == "subclass" else Mine)
    assert norms == pytest.approx([CLIPS] * 4, rel=1e-3)
    assert not clips
    assert trainer.chronicals_report["adamw"].state == "on"
    assert any("clipped in a pass of their own" in note for note in trainer.chronicals_report.notes)


def test_parameters_that_are_not_the_models_are_not_clipped(tmp_path: Path, clips: list[float]) -> None:
    def run(setting: str) -> Any:
        model, other = tiny_models.build("llama"), torch.nn.Parameter(torch.zeros(3))

        class Giving(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                other.grad = torch.arange(3.0) * (1 + state.global_step) ** 2

        optimizer = AdamW([*model.parameters(), other], lr=1e-2, fused=True)
        trained(tmp_path, setting, model=model, optimizers=(optimizer, None), callbacks=[Giving()])
        return optimizer.state[other]["exp_avg"]

    torch.testing.assert_close(run("auto"), run("off"))
    assert not clips


def test_another_optimizer_in_mid_run(tmp_path: Path, clips: list[float]) -> None:
    def run(setting: str) -> tuple[SFTTrainer, list[AdamW]]:
        optimizers: list[AdamW] = []

        class Mine(SFTTrainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                if self.state.global_step % 2:  # anew, as ReLoRA does
                    self.optimizer = AdamW(self.model.parameters(), lr=1e-2, fused=True)
                optimizers.append(getattr(self.optimizer, "optimizer", self.optimizer))
                return super().training_step(*args, **kwargs)

        return trained(tmp_path, setting, trainer_class=Mine), optimizers

    ours, optimizers = run("auto")
    assert len(clips) == 4
    require_same(ours, run("off")[0])
    assert all(type(optimizer) is AdamW for optimizer in optimizers)


def test_training_twice(tmp_path: Path, clips: list[float]) -> None:
    ours, theirs = trained(tmp_path), trained(tmp_path, "off")
    ours.train()
    theirs.train()
    assert len(clips) == 8
    require_same(ours, theirs)


def test_a_step_of_somebody_elses(tmp_path: Path, clips: list[float], caplog: pytest.LogCaptureFixture) -> None:
    class Bare(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
            return loss.detach()

    with caplog.at_level(logging.WARNING):
        part = trained(tmp_path, trainer_class=Bare).chronicals_report["adamw"]
    assert part.state == "off" and "training_step" in part.reason
    assert "adamw is off: no step came through" in caplog.text
    assert not clips


def test_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clips: list[float]) -> None:
    monkeypatch.setattr(adamw_trainer, "HAS_TRITON", False)
    assert trained(tmp_path).chronicals_report["adamw"].reason == "triton is not installed"
    assert not clips


def test_gradients_of_two_dtypes_are_clipped_as_ever(tmp_path: Path, clips: list[float]) -> None:
    """Their coefficient would be in the wider dtype, and torch multiplies by it in the gradient's own."""
    trainer = trained(tmp_path)
    done = len(clips)
    net = torch.nn.ParameterList([torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])
    for p in net:
        p.grad = torch.full_like(p, 2.0)
    trainer._adamw = take_over(AdamW(net.parameters(), fused=True))
    norm = trainer._clip_grad_norm(net)
    assert norm.item() == pytest.approx(20**0.5, rel=1e-2)
    assert len(clips) == done
    assert net[0].grad[0].item() == pytest.approx(2 * CLIPS / 20**0.5, rel=1e-2)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_other_optimizers_are_left_alone(tmp_path: Path, clips: list[float], optim: str) -> None:
    trainer = trained(tmp_path, optim=optim, config={"strict": True, "packing": "off", "head": "off"})
    part = trainer.chronicals_report["adamw"]
    assert part.state == "off" and optim in part.reason and not part.omitted
    assert not clips


def test_an_optimizer_that_is_passed_in(tmp_path: Path, clips: list[float]) -> None:
    model = tiny_models.build("llama")
    optimizer = AdamW(model.parameters(), lr=1e-2, fused=True)
    trainer = trained(tmp_path, model=model, optimizers=(optimizer, None))
    assert trainer.chronicals_report["adamw"].state == "on" and len(clips) == 4
    assert type(optimizer) is AdamW

    model = tiny_models.build("llama")
    trainer = trained(tmp_path, model=model, optimizers=(SGD(model.parameters(), 1e-2), None))
    assert "SGD" in trainer.chronicals_report["adamw"].reason and len(clips) == 4


def test_an_optimizer_that_turns_out_otherwise(
    tmp_path: Path, clips: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    class Mine(SFTTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer = SGD(self.model.parameters(), 1e-2)
            return self.optimizer

    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, trainer_class=Mine)
    assert trainer.chronicals_report["adamw"].state == "off"
    assert "adamw is off: the optimizer is SGD" in caplog.text
    assert not clips
    with pytest.raises(RuntimeError, match="adamw is off"):
        trained(tmp_path, "on", trainer_class=Mine)


def test_insisting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="adamw is off: optim='sgd'"):
        trained(tmp_path, "on", optim="sgd")
    monkeypatch.setattr(adamw_trainer, "DEVICES", ("cuda",))
    with pytest.raises(RuntimeError, match="no CUDA GPU"):
        trained(tmp_path, "on")
    assert trained(tmp_path).chronicals_report["adamw"].state == "off"


@pytest.mark.parametrize(("before", "after"), [("auto", "auto"), ("off", "auto"), ("auto", "off")])
def test_resuming_goes_on_as_one_run_would(tmp_path: Path, before: str, after: str) -> None:
    whole = trained(tmp_path, before, save_strategy="steps", save_steps=2, max_steps=4)
    checkpoint = tmp_path / before / "out" / "checkpoint-2"
    options = {"use_chronicals": True, "max_grad_norm": CLIPS, "chronicals_config": {"adamw": after}}
    resumed = SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**{**SETTINGS, "output_dir": str(tmp_path / "again"), **options}),
        train_dataset=tiny_data.text(),
        processing_class=tiny_data.tokenizer(),
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        if before == after:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_an_error_leaves_torchs_optimizer(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    model = tiny_models.build("llama")
    optimizer = AdamW(model.parameters(), lr=1e-2, fused=True)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, model=model, optimizers=(optimizer, None), callbacks=[Failing()])
    assert type(optimizer) is AdamW
