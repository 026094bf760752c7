"""Hooks that come after patching: what they keep from being fused is set right in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
from accelerate import Accelerator
from torch import nn
from training_runs import SETTINGS

from chronicals_trl import ChronicalsPlugin, SFTConfig, SFTTrainer, patch_model
from chronicals_trl.model.apart import amend

peft = pytest.importorskip("peft")

PARTS = ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"]


def build() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
    return peft.get_peft_model(tiny_models.build("qwen2"), config)


def hook(model: nn.Module, ending: str) -> None:
    for name, module in model.named_modules():
        if name.endswith(ending):
            module.register_forward_pre_hook(lambda *args: None)


def test_nothing_to_say_without_hooks() -> None:
    for model in (build(), tiny_models.build("qwen2")):
        report = patch_model(model)
        before = report.to_dict()
        assert amend(report, model) == []
        assert report.to_dict() == before


@pytest.mark.parametrize("part", PARTS)
def test_hooks_in_every_layer(part: str) -> None:
    model = build()
    report = patch_model(model)
    hook(model, "." + part)
    first, second = amend(report, model)
    assert first.startswith("lora is off: hooks on the linears inside")
    assert second.startswith("4 attention blocks and MLPs call their projections one by one")
    assert report["lora"].state == "off" and report["lora"].omitted and report["lora"].modules == 0
    assert second in report.notes and first not in report.notes
    notes = list(report.notes)
    assert amend(report, model) == [] and report.notes == notes


def test_hooks_in_some_layers() -> None:
    model = build()
    report = patch_model(model)
    hook(model, "o_proj.lora_A.default")
    (news,) = amend(report, model)  # o_proj is no part of a joined node
    assert news.startswith("lora: 2 of 14 layers take PEFT's own path: hooks")
    assert report["lora"].state == "on" and news in report.notes


def test_hooks_on_a_lora_layer_itself() -> None:
    """Its own call is fused as before; the block around it has to make that call."""
    model = build()
    report = patch_model(model)
    hook(model, ".up_proj")
    assert amend(report, model) == [
        "2 attention blocks and MLPs call their projections one by one, since these have hooks"
    ]
    assert report["lora"].state == "on"


@pytest.mark.parametrize(("ending", "blocks"), [(".q_proj", 2), (".down_proj", 2), (".o_proj", 0), (".k_proj", 2)])
def test_a_model_without_adapters(ending: str, blocks: int) -> None:
    model = tiny_models.build("qwen2")
    report = patch_model(model)
    hook(model, ending)
    assert [note.split()[0] for note in amend(report, model)] == [str(blocks)] * bool(blocks)


def test_projections_that_were_never_joined() -> None:
    model = build()
    for layer in model.get_base_model().model.layers:
        layer.self_attn.k_proj.use_dora["default"] = True  # q, k and v are no node then
    report = patch_model(model)
    hook(model, ".q_proj")
    assert amend(report, model) == []


@pytest.mark.parametrize("hooked", [".base_layer", "o_proj.base_layer"])
def test_parts_that_are_off_have_nothing_apart(hooked: str) -> None:
    model = build()
    report = patch_model(model, {"lora": "off", "qk_rope": "off", "gated_mlp": "off"})
    hook(model, hooked)
    assert amend(report, model) == []


# -- who asks --------------------------------------------------------------------------------------------------------


class _Sharded(SFTTrainer):
    """Hooks come where sharding would bring them: between the trainer's construction and the first step."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        hook(self.model, ".base_layer")
        return super().create_optimizer(*args, **kwargs)


def trainer_of(tmp_path: Path, config: dict[str, str] | None = None) -> SFTTrainer:
    options = {"output_dir": str(tmp_path), "use_chronicals": True, "chronicals_config": config, "max_steps": 2}
    return _Sharded(
        model=build(),
        args=SFTConfig(**{**SETTINGS, **options}),
        train_dataset=tiny_data.text(),
        processing_class=tiny_data.tokenizer(),
    )


def test_the_trainer_amends_its_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path)
    assert trainer.chronicals_report["lora"].state == "on"
    trainer.train()
    assert trainer.chronicals_report["lora"].state == "off"
    saved = json.loads((tmp_path / "chronicals_report.json").read_text())
    assert {part["name"]: part["state"] for part in saved["parts"]}["lora"] == "off"
    assert sum("lora is off: hooks" in record.message for record in caplog.records) == 1


def test_the_trainer_refuses_where_the_part_is_insisted_on(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {"lora": "on"})
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(RuntimeError, match="lora is off: hooks"):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


def test_the_plugin_amends_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Accelerator.prepare_model

    def prepare_model(self: Accelerator, model: nn.Module, *args: object, **kwargs: object) -> nn.Module:
        hook(model, ".base_layer")
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "prepare_model", prepare_model)
    plugin = ChronicalsPlugin({"lora_plus": "off"})
    plugin.attach(Accelerator(cpu=True)).prepare(build())
    assert plugin.reports[0]["lora"].state == "off" and "hooks" in plugin.reports[0]["lora"].reason
    strict = ChronicalsPlugin({"lora": "on", "lora_plus": "off"})
    with pytest.raises(RuntimeError, match="lora is off: hooks"):
        strict.attach(Accelerator(cpu=True)).prepare(build())
