"""`bench sft`: the sides that add one part at a time, Apple's loss inside of TRL, and PyPI's package."""

from __future__ import annotations

import json
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chronicals_trl.bench.common import NotOffered
from chronicals_trl.bench.sft import command, peers, sides, verdict
from chronicals_trl.bench.sft import models as sft_models
from chronicals_trl.bench.sft import report as sft_report
from chronicals_trl.bench.sft.ablation import ablation_sides, gains
from chronicals_trl.bench.sft.cases import ABLATED, PROTOCOLS, SHAPES, SIDES, Documents, Task, make_documents
from chronicals_trl.bench.sft.count import Counted
from chronicals_trl.bench.sft.meter import Meter

TINY = SHAPES["tiny"]


def task(folder: Path, **changes: Any) -> Task:
    path = folder / "documents.npz"
    if not path.exists():
        make_documents(PROTOCOLS["short"], 512, 24, 2000, 60, 0).save(str(path))
    given: dict[str, Any] = {
        "side": "trl", "mode": "full", "shape": "tiny", "protocol": "packed", "checkpointing": "off",
        "model": str(folder / "model"), "documents": str(path), "row_tokens": 32, "rows": 2, "packs": True,
        "warm_up": 1, "steps": 2, "windows": 2, "learning_rate": 1e-3, "seed": 0, "chronicals": {"lora_plus": "off"},
        **changes,
    }  # fmt: skip
    return Task(**given)


# -- ablation ---------------------------------------------------------------------------------------------------------


def test_each_side_has_one_part_more() -> None:
    names = ablation_sides("lora", packs=True)
    assert names[0] == "ablation-0-off" and SIDES[names[0]].parts == () and SIDES[names[0]].packs is False
    assert not SIDES[names[0]].ours and all(SIDES[name].ours for name in names[1:])
    for number, (before, name) in enumerate(pairwise(names), start=1):
        parts, fewer = SIDES[name].parts, SIDES[before].parts
        assert parts is not None and fewer is not None
        assert parts[:-1] == fewer and name == f"ablation-{number}-{parts[-1]}"
    assert SIDES[names[-1]].parts == ABLATED
    assert [name.split("-")[2] for name in ablation_sides("full", packs=False)] == [
        "off", "attention", "head", "rms_norm", "gated_mlp", "qk_rope", "adamw", "cuda_graphs",
    ]  # fmt: skip


def test_every_part_is_added() -> None:
    from chronicals_trl.config import PARTS

    assert {*ABLATED, "lora_plus", "recompute"} == set(PARTS)  # trains otherwise; is the run's setting


@pytest.mark.parametrize(
    ("side", "flag", "off"),
    [
        ("ablation-0-off", False, {*ABLATED, "lora_plus", "recompute"}),
        ("ablation-2-attention", True, {*ABLATED[2:], "lora_plus", "recompute"}),
        ("chronicals", True, {"lora_plus"}),
    ],
)
def test_the_parts_of_a_side_are_switched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str, flag: bool, off: set[str]
) -> None:
    seen: dict[str, Any] = {}
    trainer = types.SimpleNamespace(chronicals_report=types.SimpleNamespace(to_dict=lambda: {"parts": []}))

    def record(task: Task, meter: Meter, trainer_class: Any, config_class: Any, model: Any, extra: Any) -> Any:
        seen.update(extra)
        return trainer, {"logs": []}

    monkeypatch.setattr(sides, "_run_trainer", record)
    monkeypatch.setattr(sides, "_load", lambda task: None)
    given = task(tmp_path, side=side)
    ran = sides.train(given, Meter(given))
    assert seen["use_chronicals"] is flag and ("report" in ran) is flag
    assert {part for part, state in seen["chronicals_config"].items() if state == "off"} == off
    assert given.chronicals == {"lora_plus": "off"}


def row(side: str, rate: float | None, status: str = "ok") -> dict[str, Any]:
    return {"side": side, "status": status, "tokens_per_second": rate, "peak_memory_gib": 2.0}


def test_gains_are_over_the_row_before_that_has_a_rate() -> None:
    first, second, third, fourth = ablation_sides("lora", packs=True)[:4]
    found = gains([
        row(first, 100.0), row(second, None, "failed"), row("trl", 7.0), row(third, 150.0),
        row(fourth, 300.0, "invalid"), row("ablation-4-rms_norm", 450.0),
    ])  # fmt: skip
    assert [each["added"] for each in found] == ["nothing", "packing", "attention", "head", "rms_norm"]
    assert [each["gain"] for each in found] == [None, None, 1.5, None, 3.0]
    assert [each["over"] for each in found] == [None, first, first, third, third]
    assert gains([row("trl", 1.0), row("chronicals", 2.0)]) == []


def test_a_part_that_was_off_has_gained_nothing() -> None:
    """What its row differs by is chance."""
    parts = [
        {"name": "packing", "state": "on", "reason": None},
        {"name": "attention", "state": "off", "reason": "why"},
    ]
    first, second, third, fourth = ablation_sides("lora", packs=True)[:4]
    rows = [row(first, 100.0), row(second, 150.0), row(third, 180.0), row(fourth, 360.0)]
    for each in rows[1:]:
        each["runs"] = [{"report": {"parts": parts}}, {}]
    found = gains(rows)
    assert [each["gain"] for each in found] == [None, 1.5, None, 2.0]
    assert [each["left_out"] for each in found] == [None, None, "why", None]
    assert sft_report._gain_cells(found[2])[2] == "off: why" and sft_report._gain_cells(found[3])[2] == "ok"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ablation"], [*ablation_sides("lora", True), "chronicals"]),
        (["--ablation", "--mode", "full", "--sides", "trl-liger"], [*ablation_sides("full", True), "trl-liger"]),
        (["--ablation", "--protocol", "short"], [*ablation_sides("lora", False), "chronicals"]),
    ],
)
def test_sides_of_the_command(arguments: list[str], expected: list[str]) -> None:
    import argparse

    parser = command.add_parser(argparse.ArgumentParser().add_subparsers())
    assert command._sides(parser.parse_args(arguments)) == expected


def test_the_start_of_an_ablation_is_a_reference() -> None:
    """It is stock TRL's training: with it alone in the run, losses are compared."""
    logs = [{"step": step, "loss": 8.0 - step, "grad_norm": 1.0} for step in range(1, 7)]
    flat = [{**log, "loss": 8.0} for log in logs]
    rows: list[dict[str, Any]] = [
        {"side": side, "status": "ok", "reason": None, "tokens_per_step": 1e9, "runs": [{"logs": each}]}
        for side, each in (("ablation-0-off", logs), ("ablation-1-packing", flat))
    ]
    assert verdict.judge_validity(rows)["reference"] == "ablation-0-off"
    assert [each["status"] for each in rows] == ["ok", "invalid"]


def test_the_table_of_an_ablation(capsys: pytest.CaptureFixture[str]) -> None:
    found = gains([row("ablation-0-off", 100.0), row("ablation-1-packing", 150.0)])
    assert sft_report._gain_cells(found[1]) == [
        "ablation-1-packing", "packing", "ok", "150", "2.00", "1.500x", "ablation-0-off",
    ]  # fmt: skip


# -- Apple's loss inside of TRL ---------------------------------------------------------------------------------------


def reference(e: Tensor, c: Tensor, targets: Tensor, shift: bool, reduction: str) -> Tensor:
    assert shift
    logits = (e[:, :-1] @ c.t()).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction=reduction)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_its_loss_is_trls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    from trl import SFTConfig, SFTTrainer

    sft_models.write_model(TINY, 0, tmp_path / "model")
    logs = {}
    for name, trainer in (("trl", SFTTrainer), ("cce", peers.cce_trainer(SFTTrainer, reference))):
        monkeypatch.chdir(tmp_path)
        given = task(tmp_path, mode=mode, master="fp32")
        logs[name] = sides._run_trainer(given, Meter(given), trainer, SFTConfig, sides._load(given), {})[1]["logs"]
    assert len(logs["cce"]) == len(logs["trl"]) > 3
    for ours, theirs in zip(logs["cce"], logs["trl"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2) and ours["grad_norm"] > 0


@pytest.mark.parametrize(("mode", "master"), [("lora", "bf16"), ("full", "fp32")])
def test_its_products_are_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, master: str) -> None:
    """As TRL's are, with fp32 adapters or masters: autocast is around its decoder too, and not the model's alone."""
    from trl import SFTConfig, SFTTrainer

    seen: set[torch.dtype] = set()
    plain = nn.functional.linear

    def linear(x: Tensor, *weights: Any) -> Tensor:
        made = plain(x, *weights)
        seen.add(made.dtype)
        return made

    def loss(e: Tensor, c: Tensor, *given: Any, **more: Any) -> Tensor:
        seen.update((e.dtype, c.dtype))
        return reference(e, c, *given, **more)

    sft_models.write_model(TINY, 0, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.functional, "linear", linear)
    given = task(tmp_path, mode=mode, master=master)
    trainer = peers.cce_trainer(SFTTrainer, loss)
    assert sides._run_trainer(given, Meter(given), trainer, SFTConfig, sides._load(given), {})[1]["logs"]
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(("master", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_weights_are_loaded_as_the_run_says(tmp_path: Path, master: str, dtype: torch.dtype) -> None:
    sft_models.write_model(TINY, 0, tmp_path / "model")
    model = sides._load(task(tmp_path, master=master))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_who_is_not_here_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for side, package in (("trl-cce", "cut_cross_entropy"), ("pypi-chronicals", "chronicals")):
        given = task(tmp_path, side=side)
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{package}'"):
            sides.train(given, Meter(given))
    (tmp_path / "cut_cross_entropy").mkdir()
    (tmp_path / "cut_cross_entropy" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(NotOffered, match="need a GPU"):
        peers.cce_function()


# -- PyPI's package ---------------------------------------------------------------------------------------------------


def test_padded_rows() -> None:
    batch = peers.pad([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


class Calls(Meter):
    """What the meter is told."""

    def __init__(self, given: Task) -> None:
        super().__init__(given)
        self.told: list[str] = []

    def restart(self) -> None:
        self.told.append("restart")
        super().restart()

    def begin(self, done: int) -> None:
        self.told.append(f"begin {done}")
        super().begin(done)

    def end(self, done: int) -> None:
        self.told.append(f"end {done}")
        super().end(done)


def test_a_loader_tells_when_steps_begin_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = task(tmp_path, warm_up=1, steps=1, windows=2)
    meter = Calls(given)
    watched = peers.Watched(given, meter)
    warm_up = iter(watched)
    next(warm_up)
    next(warm_up)
    assert len(list(watched)) == len(watched) == 4
    assert meter.told[4:] == ["restart", "begin 0", "end 1", "begin 1", "end 2", "begin 2", "end 3"]
    found = meter.result()
    assert isinstance(meter.counted, Counted) and len(found["windows"]) == 2
    lengths = Documents.load(given.documents).lengths
    assert [window["tokens"] for window in found["windows"]] == [lengths[2:4].sum(), lengths[4:6].sum()]


def fake_package(monkeypatch: pytest.MonkeyPatch, warm_up: int) -> dict[str, Any]:
    """A stand-in of PyPI's package with the parts of its trainer that are used."""
    seen: dict[str, Any] = {}

    class TrainingConfig:
        def __init__(self, **given: Any) -> None:
            seen["given"] = given
            vars(self).update(given)

    class Trainer:
        def __init__(self, model: nn.Module, args: Any, loader: Any) -> None:
            self.model, self.args, self.loader = model, args, loader
            self.optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
            self.state = types.SimpleNamespace(global_step=0, log_history=[])

        def save_checkpoint(self, name: str) -> None:
            raise AssertionError("nothing is saved")

        def _step(self, batch: dict[str, Tensor]) -> float:
            loss = self.model(**batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return float(loss)

        def train(self) -> Any:
            for _, batch in zip(range(warm_up), self.loader, strict=False):
                self._step(batch)
            total = 0.0
            for batch in self.loader:
                total += self._step(batch)
                self.state.global_step += 1
                if self.state.global_step % self.args.logging_steps == 0:
                    entry = {"step": self.state.global_step, "loss": total / self.args.logging_steps}
                    self.state.log_history.append(entry)
                    total = 0.0
                if self.state.global_step >= self.args.max_steps:
                    break
            self.save_checkpoint("final")
            return self.state

        def get_active_optimizations(self) -> dict[str, bool]:
            return {"fp8": True}

    package, config, training = (types.ModuleType(name) for name in ("chronicals", "config", "training"))
    config.TrainingConfig, training.ChronicalsTrainer = TrainingConfig, Trainer  # type: ignore[attr-defined]
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    modules = {"chronicals": package, "chronicals.config": config, "chronicals.training": training}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.mark.parametrize(("side", "fp8"), [("pypi-chronicals", None), ("pypi-chronicals-bf16", False)])
def test_pypis_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str, fp8: bool | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sft_models.write_model(TINY, 0, tmp_path / "model")
    seen = fake_package(monkeypatch, warm_up=2)
    given = task(tmp_path, side=side, packs=False, checkpointing="on")
    meter = Meter(given)
    ran = sides.train(given, meter)
    assert seen["given"].get("fp8") is fp8 and seen["given"]["use_gradient_checkpointing"] is True
    assert seen["given"]["max_steps"] == given.total_steps + 1
    assert len(ran["logs"]) == 6 and all(log["grad_norm"] > 0 for log in ran["logs"])
    assert verdict.broken_logs(ran["logs"]) is None and len(meter.result()["windows"]) == 2
    json.dumps({**meter.result(), **ran}, allow_nan=False)


def test_gradients_that_are_none_are_a_norm_of_zero() -> None:
    weight = nn.Parameter(torch.zeros(2))
    trainer = types.SimpleNamespace(
        optimizer=torch.optim.SGD([weight], lr=0.1), state=types.SimpleNamespace(global_step=0)
    )
    norms = peers._watch_norms(trainer)
    trainer.optimizer.step()
    trainer.state.global_step = 1
    weight.grad = torch.tensor([3.0, 4.0])
    trainer.optimizer.step()
    assert np.allclose([float(norm) for norm in norms], [0.0, 5.0])
    trainer.state.global_step = 0  # what came before was its warm-up
    trainer.optimizer.step()
    assert [float(norm) for norm in norms] == [5.0]
