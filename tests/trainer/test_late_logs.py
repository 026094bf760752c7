"""Log entries that are written after the next step's passes: what is in them, and when they are written at once.

The CPU passes for a device that works on while the host reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import SETTINGS
from transformers import Trainer, TrainerCallback
from transformers.training_args import ParallelMode

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.observe import late_logs

# Of a clock, or of the process.
MEASURED = {"tokens_per_second", "peak_memory_gib", "train_runtime", "train_samples_per_second",
            "train_steps_per_second", "train_tokens_per_second"}  # fmt: skip


@pytest.fixture(autouse=True)
def cpu_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_logs, "DEVICES", ("cpu",))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened, in order: passes (with the step that they are a part of) and entries (with theirs)."""
    events: list[str] = []
    step, log = Trainer.training_step, Trainer.log

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        events.append(f"pass {self.state.global_step + 1}")
        return step(self, *args, **kwargs)

    def write(self: Any, logs: dict[str, float], *args: Any) -> None:
        if "loss" in logs:
            events.append(f"entry {self.state.global_step}")
        log(self, logs, *args)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(Trainer, "log", write)
    return events


def make(tmp_path: Path, *callbacks: TrainerCallback, kind: type = SFTTrainer, family: str = "llama", **options: Any):
    options = {"use_chronicals": True, "output_dir": str(tmp_path / "out"), **options}
    return kind(
        model=tiny_models.build(family),
        args=SFTConfig(**{**SETTINGS, **options}),
        train_dataset=tiny_data.text(60),
        eval_dataset=tiny_data.text(4, seed=2) if "eval_steps" in options else None,
        processing_class=tiny_data.tokenizer(),
        callbacks=list(callbacks),
    )


def history(trainer: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k not in MEASURED} for entry in trainer.state.log_history]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"packing": True, "include_num_input_tokens_seen": "all"}),
        ("llama", {"gradient_accumulation_steps": 2, "logging_steps": 3, "max_steps": 7}),
        ("llama", {"max_grad_norm": 0.0, "logging_first_step": True, "logging_steps": 2}),
        ("llama", {"chronicals_config": {"head": "off"}}),  # TRL's own metrics
        ("qwen3_moe", {"packing": True, "router_aux_loss_coef": 0.3}),
        ("llama", {"max_steps": -1, "num_train_epochs": 2, "packing": True, "logging_steps": 2}),  # over epochs' ends
    ],
)
def test_entries_are_those_of_a_run_that_waits(
    family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    late = make(tmp_path / "late", family=family, **options)
    late_result = late.train()
    order = list(told)
    told.clear()
    monkeypatch.setattr(late_logs, "DEVICES", ())
    waiting = make(tmp_path / "waiting", family=family, **options)
    result = waiting.train()
    assert history(late) == history(waiting)
    assert [set(entry) for entry in late.state.log_history] == [set(entry) for entry in waiting.state.log_history]
    assert all("tokens_per_second" in entry for entry in late.state.log_history[:-1])
    assert late_result.training_loss == result.training_loss
    assert late.state.total_flos == waiting.state.total_flos > 0
    assert all(a.equal(b) for a, b in zip(late.model.parameters(), waiting.model.parameters(), strict=True))
    assert sorted(order) == sorted(told) and order != told  # or nothing was late


def test_an_entry_comes_after_the_next_pass_and_before_the_next_update(tmp_path: Path, told: list[str]) -> None:
    weights, written = {}, {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weights[state.global_step] = trainer.model.lm_head.weight.detach().clone()

    trainer = make(tmp_path, Watch(), gradient_accumulation_steps=2, max_steps=3)
    log = trainer.callback_handler.on_log

    def on_log(args: Any, state: Any, control: Any, logs: Any) -> Any:
        assert state.total_flos > 0
        written[state.global_step] = trainer.model.lm_head.weight.detach().clone()
        return log(args, state, control, logs)

    trainer.callback_handler.on_log = on_log
    trainer.train()
    assert told == ["pass 1", "pass 1", "pass 2", "entry 1", "pass 2", "pass 3", "entry 2", "pass 3", "entry 3"]
    assert all(written[step].equal(weights[step]) for step in (1, 2, 3))


def test_a_save_and_an_evaluation_find_the_entry_written(tmp_path: Path, told: list[str]) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    trainer = make(tmp_path, max_steps=4, **options)
    late = []
    set_aside = trainer._set_entry_aside
    trainer._set_entry_aside = lambda *args: (late.append(trainer.state.global_step), set_aside(*args))
    trainer.train()
    assert late == [1]
    assert told == ["pass 1", "pass 2", "entry 1", "entry 2", "pass 3", "entry 3", "pass 4", "entry 4"]
    kinds = ["eval" if "eval_loss" in entry else entry["step"] for entry in trainer.state.log_history[:-1]]
    assert kinds == [1, 2, 3, "eval", 4, "eval"]


def test_the_entry_of_an_epoch_is_written_at_its_end(tmp_path: Path, told: list[str]) -> None:
    make(tmp_path, max_steps=-1, num_train_epochs=2, packing=True, logging_strategy="epoch").train()
    passes = len(told) // 2 - 1
    assert told[passes] == f"entry {passes}" and told[-1] == f"entry {2 * passes}"


def test_a_norm_that_is_sharded_is_read_at_once(tmp_path: Path) -> None:
    class Sharded(torch.Tensor):
        """As FSDP2's, whose reading is a matter of all ranks."""

    trainer = make(tmp_path)
    trainer.control.should_log, trainer.state.global_step, trainer._globalstep_last_logged = True, 1, 0
    assert trainer._can_be_late(torch.ones(())) and trainer._can_be_late(1.0) and trainer._can_be_late(None)
    assert not trainer._can_be_late(torch.ones(()).as_subclass(Sharded))


class OnLog(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


class OnStepBegin(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert len(state.log_history) == state.global_step


class OnEpochEnd(TrainerCallback):
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert len(state.log_history) == state.global_step


class OwnLog(SFTTrainer):
    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(*args, **kwargs)


class OwnLoss(SFTTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        assert len(self.state.log_history) == self.state.global_step
        return super().compute_loss(*args, **kwargs)


class OwnBatches(SFTTrainer):
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        assert len(self.state.log_history) == self.state.global_step
        return super().get_batch_samples(*args, **kwargs)


class OwnInputs(SFTTrainer):
    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        assert len(self.state.log_history) == self.state.global_step
        return super()._prepare_inputs(*args, **kwargs)


@pytest.mark.parametrize(
    ("callback", "kind", "who"),
    [
        (OnLog(), SFTTrainer, "OnLog"),
        (OnStepBegin(), SFTTrainer, "OnStepBegin"),
        (OnEpochEnd(), SFTTrainer, "OnEpochEnd"),
        (TrainerCallback(), OwnLog, "OwnLog overrides log"),
        (TrainerCallback(), OwnLoss, "OwnLoss overrides compute_loss"),
        (TrainerCallback(), OwnBatches, "OwnBatches overrides get_batch_samples"),
        (TrainerCallback(), OwnInputs, "OwnInputs overrides _prepare_inputs"),
    ],
)
def test_at_once_where_somebody_may_act_on_it(
    callback: TrainerCallback, kind: type, who: str, tmp_path: Path, told: list[str]
) -> None:
    trainer = make(tmp_path, callback, kind=kind, max_steps=3)
    trainer.train()
    steps = 1 if isinstance(callback, OnLog) else 3
    assert told == [event for step in range(1, steps + 1) for event in (f"pass {step}", f"entry {step}")]
    assert [note for note in trainer.chronicals_report.notes if note.startswith("each log entry is waited for")] == [
        f"each log entry is waited for: {who} may act on it"
        if "overrides" not in who
        else f"each log entry is waited for: {who} and may act on it"
    ]


def test_a_method_put_on_a_librarys_callback_is_somebodys(tmp_path: Path, told: list[str]) -> None:
    trainer = make(tmp_path, max_steps=2)
    [printer] = [each for each in trainer.callback_handler.callbacks if type(each).__name__ == "PrinterCallback"]
    seen = []
    printer.on_log = lambda args, state, control, **kwargs: seen.append(state.global_step)
    trainer.train()
    assert told == ["pass 1", "entry 1", "pass 2", "entry 2"] and seen[:2] == [1, 2]


def test_a_method_put_on_the_trainer_is_somebodys(tmp_path: Path, told: list[str]) -> None:
    trainer = make(tmp_path, max_steps=6)
    log = trainer.log

    def stopping(logs: dict[str, float], *args: Any) -> None:
        log(logs, *args)
        trainer.control.should_training_stop = trainer.state.global_step == 2

    trainer.log = stopping
    trainer.train()
    assert told == ["pass 1", "entry 1", "pass 2", "entry 2"]
    assert "each log entry is waited for: this trainer's log has been replaced and may act on it" in (
        trainer.chronicals_report.notes
    )


def test_what_is_read_is_queued_before_the_mark_that_reading_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind it, on a GPU, the reading stream could be ahead of what makes it."""
    trainer = make(tmp_path)
    trainer.create_optimizer_and_scheduler(4)
    trainer.state.global_step, trainer._globalstep_last_logged = 1, 0
    queued: list[str] = []

    class Queue(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            queued.append(str(func))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(trainer, "_mark_of_what_is_queued", lambda: queued.append("mark"))
    norm = torch.tensor(3.0)
    with Queue():
        trainer._set_entry_aside(torch.tensor(2.0), norm, 0.0, 1e-3)
    assert "aten.clone.default" in queued and queued[-1] == "mark"
    norm.fill_(5.0)  # as a step does that keeps its norm in one place
    assert trainer._entry.grad_norm == 3.0
    norm.zero_()
    trainer._globalstep_last_logged, trainer._total_loss_scalar = 0, 0.0
    trainer._set_entry_aside(torch.tensor(2.0), norm, 0.0, 1e-3)
    trainer._write_entry()
    assert trainer.state.log_history[-1]["grad_norm"] == 0.0  # health looks for it


def test_reading_waits_for_no_sums_of_the_pass_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    class Sending:
        def __init__(self, step: int) -> None:
            self.step = step

        def wait(self) -> None:
            told.append(f"wait {self.step}")

    record = SFTTrainer._record

    def recording(self: Any, mode: str, outputs: Any) -> None:
        record(self, mode, outputs)
        self._sums_on_their_way.append(Sending(self.state.global_step + 1))

    monkeypatch.setattr(SFTTrainer, "_record", recording)
    make(tmp_path, max_steps=3).train()
    assert told == [
        "pass 1", "wait 1", "pass 2", "entry 1", "wait 2", "pass 3", "entry 2", "wait 3", "entry 3",
    ]  # fmt: skip


def test_ranks_operations_are_not_read_when_the_entry_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank under a launcher is distributed to Trainer, whose `store_flos` reads the device then."""
    trainer = make(tmp_path)
    trainer.state.global_step, trainer._globalstep_last_logged, trainer.current_flos = 1, 0, 64.0
    monkeypatch.setattr(type(trainer.args), "parallel_mode", ParallelMode.DISTRIBUTED)
    monkeypatch.setattr(late_logs, "nested_gather", lambda tensor, mode: torch.stack([tensor.flatten()[0]] * 2))
    monkeypatch.setattr(trainer, "store_flos", None)  # called for nothing
    trainer._set_entry_aside(torch.tensor(2.0), None, 0.0, 1e-3)
    assert trainer._entry.flos.tolist() == [64.0, 64.0] and trainer.current_flos == 0
    assert trainer._entry.loss.item() == 2.0  # the ranks' mean


class Evaluate(TrainerCallback):
    trainer: Any

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.trainer.evaluate()


def test_an_entry_after_an_evaluation_of_a_callbacks_is_trls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is left in evaluation mode, and TRL puts the step's metrics into the entry after."""
    histories = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(late_logs, "DEVICES", devices)
        callback = Evaluate()
        callback.trainer = make(tmp_path, callback, eval_steps=100)
        callback.trainer.train()
        histories.append(
            [
                (e["step"], set(e) - MEASURED, e.get("loss"), e.get("entropy"))
                for e in callback.trainer.state.log_history
            ]
        )
    assert histories[0] == histories[1]
    assert any("loss" in names and "entropy" not in names for _, names, *_ in histories[0])


def test_an_entry_that_is_asked_for_in_the_next_pass_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(late_logs, "DEVICES", devices)
        trainer = make(tmp_path, logging_steps=3, logging_first_step=True, max_steps=6)

        def ask(*args: Any, trainer: Any = trainer) -> None:
            trainer.control.should_log |= trainer.state.global_step in (1, 3)

        trainer.model.register_forward_pre_hook(ask)
        trainer.train()
        steps.append([entry["step"] for entry in trainer.state.log_history[:-1]])
    assert steps[0] == steps[1] == [1, 2, 3, 4, 6]


def test_an_entry_of_the_users_own_comes_behind(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=3)

    def log(*args: Any) -> None:
        if trainer.state.global_step:
            trainer.log({"mine": float(trainer.state.global_step)})

    trainer.model.register_forward_pre_hook(log)
    trainer.train()
    assert ["mine" if "mine" in entry else entry["step"] for entry in trainer.state.log_history[:-1]] == [
        1, "mine", 2, "mine", 3,
    ]  # fmt: skip


@pytest.mark.parametrize("interruption", [ArithmeticError, KeyboardInterrupt])
def test_an_error_in_the_next_step_does_not_lose_the_entry(
    interruption: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, max_steps=3)
    prepare = SFTTrainer._prepare_inputs

    def failing(self: Any, inputs: Any) -> Any:
        if trainer.state.global_step == 2:
            assert len(trainer.state.log_history) == 1
            raise interruption("in the third step")
        return prepare(self, inputs)

    monkeypatch.setattr(SFTTrainer, "_prepare_inputs", failing)
    with pytest.raises(interruption, match="in the third step"):
        trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 2]
    monkeypatch.undo()
    monkeypatch.setattr(late_logs, "DEVICES", ("cpu",))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history[:-1]] == [1, 2, 3]


@pytest.mark.planted_fault
def test_health_ends_the_run_before_another_update(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=6, chronicals_config={"health": "stop"})
    meter = trainer._meter
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(RuntimeError, match="gradient norm nan"):
        trainer.train()
    assert trainer.state.global_step == 1 and not before.equal(trainer.model.lm_head.weight)
    assert trainer._meter is meter  # not the entry's


def test_plain_runs_write_at_once(tmp_path: Path, told: list[str]) -> None:
    make(tmp_path, max_steps=2, use_chronicals=False).train()
    assert told == ["pass 1", "entry 1", "pass 2", "entry 2"]


def test_a_loader_that_has_no_second_epoch_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Once:
        def __init__(self, loader: Any) -> None:
            self.batches = list(loader)[:3]

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            batches, self.batches = self.batches, []
            return iter(batches)

    trainer = make(tmp_path, max_steps=6)
    loader = Once(trainer.get_train_dataloader())
    monkeypatch.setattr(trainer, "get_train_dataloader", lambda: loader)
    result = trainer.train()
    entries = trainer.state.log_history[:-1]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert result.training_loss == pytest.approx(sum(entry["loss"] for entry in entries) / 3)


def test_a_checkpoint_at_an_epochs_end_says_what_one_of_a_run_that_waits_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(late_logs, "DEVICES", devices)
        make(tmp_path / str(devices), max_steps=-1, num_train_epochs=2, packing=True, save_strategy="epoch").train()
        files = sorted((tmp_path / str(devices) / "out").glob("checkpoint-*/trainer_state.json"))
        states.append([json.loads(file.read_text()) for file in files])
        for state in states[-1]:
            state["log_history"] = [
                {k: v for k, v in entry.items() if k not in MEASURED} for entry in state["log_history"]
            ]
    assert states[0] == states[1] and len(states[0]) == 2


@pytest.mark.parametrize("what", ["evaluate", "save"])
def test_an_evaluation_or_a_save_in_the_next_pass_finds_the_entry(what: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_steps=100, max_steps=3)
    seen: list[list[int]] = []

    def act(*args: Any) -> None:
        if trainer.state.global_step == 2 and not seen:
            seen.append([])  # the evaluation's own passes come by here
            if what == "save":
                trainer._save_checkpoint(trainer.model, None)
                [file] = (tmp_path / "out").glob("checkpoint-2/trainer_state.json")
                seen[0] += [entry["step"] for entry in json.loads(file.read_text())["log_history"]]
                return
            trainer.evaluate()
            trainer.model.train()
            seen[0] += [entry["step"] for entry in trainer.state.log_history if "entropy" in entry]

    trainer.model.register_forward_pre_hook(act)
    trainer.train()
    assert seen == [[1, 2]]
