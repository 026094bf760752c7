"""When memory runs out: torch's error names the part and the settings to change, and stays the error that it was."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import tiny_data
import tiny_models
import torch
from training_runs import SETTINGS

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.observe import out_of_memory

WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB."


def run_out(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError(WORDS)


def make(tmp_path: Path, *, lora: bool = False, **options: Any) -> SFTTrainer:
    settings = {**SETTINGS, "output_dir": str(tmp_path), "use_chronicals": True, "packing": True, "max_steps": 2}
    return SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**{**settings, "optim": "adamw_torch", **options}),
        train_dataset=tiny_data.text(),
        eval_dataset=tiny_data.text(8),
        processing_class=tiny_data.tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )


def note_of(run: Callable[[], Any]) -> str:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run()
    assert caught.value.args == (WORDS,) and type(caught.value) is torch.OutOfMemoryError
    (note,) = caught.value.__notes__
    return note


def in_the_head(trainer: SFTTrainer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("chronicals_trl.kernels._linear_cross_entropy.score", run_out)


def in_the_head_going_back(trainer: SFTTrainer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("chronicals_trl.kernels._linear_cross_entropy._scaled", run_out)


def in_attention(trainer: SFTTrainer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", run_out)


def in_lora(trainer: SFTTrainer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("chronicals_trl.kernels._lora_core.mm", run_out)


def in_a_layer(trainer: SFTTrainer, patch: pytest.MonkeyPatch) -> None:
    trainer.model.model.layers[1].mlp.down_proj.forward = run_out


def in_the_embedding(trainer: SFTTrainer, patch: pytest.MonkeyPatch) -> None:
    trainer.model.model.embed_tokens.forward = run_out


def in_the_optimizer(trainer: SFTTrainer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys.modules[torch.optim.Adam.__module__], "adam", run_out)  # which AdamW's step calls


def in_our_optimizer(trainer: SFTTrainer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("chronicals_trl.optim.adamw_trainer.DEVICES", ("cpu",))
    patch.setattr("chronicals_trl.kernels._adamw._reference", run_out)
    report = trainer.chronicals_report
    report.set(dataclasses.replace(report["adamw"], state="on"))


def in_the_backward_pass(trainer: SFTTrainer, patch: pytest.MonkeyPatch) -> None:
    trainer.model.model.norm.weight.register_hook(run_out)


@pytest.mark.parametrize(
    ("plant", "place", "first", "options"),
    [
        (in_the_head, out_of_memory.HEAD, "logit_budget_mib=256 (now None: at most 1,024)", {}),
        (in_the_head_going_back, out_of_memory.HEAD, "logit_budget_mib=256", {}),
        (
            in_attention,
            out_of_memory.ATTENTION,
            "per_device_train_batch_size=1 with gradient_accumulation_steps=2",
            {},
        ),
        (in_lora, out_of_memory.LORA, "per_device_train_batch_size=1", {"lora": True}),
        (in_a_layer, out_of_memory.LAYERS, "per_device_train_batch_size=1", {}),
        (
            in_the_embedding,
            out_of_memory.LAYERS,
            "recompute_mlp=true",
            {"per_device_train_batch_size": 1, "chronicals_config": {"recompute_mlp": False}},
        ),
        (in_the_optimizer, out_of_memory.OPTIMIZER, "LoRA in place of all weights", {}),
        (in_our_optimizer, out_of_memory.OPTIMIZER, "LoRA in place of all weights", {"optim": "adamw_torch_fused"}),
        (in_the_backward_pass, out_of_memory.BACKWARD, "logit_budget_mib", {}),
    ],
)
def test_names_the_place_and_the_cheapest_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any, place: str, first: str, options: dict[str, Any]
) -> None:
    trainer = make(tmp_path, **options)
    plant(trainer, monkeypatch)
    note = note_of(trainer.train)
    assert f"memory ran out in training, in {place}." in note
    assert first in note.partition("(1) ")[2].partition("; (2)")[0], note
    assert ("LoRA in place" in note) != options.get("lora", False)
    assert "fsdp2.yaml or zero3.yaml" in note


def test_the_stock_head_is_told_apart_from_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of `LlamaForCausalLM`, and those of TRL's own head."""
    trainer = make(tmp_path, chronicals_config={"head": "off"})
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", SimpleNamespace(apply=run_out))
    note = note_of(trainer.train)
    assert f"in {out_of_memory.HEAD}" in note and "(1) the head part, which is off (head='off'" in note
    monkeypatch.setattr("torch.nn.functional.linear", fails_for(trainer.model.lm_head.weight))
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.model(input_ids=ids, labels=ids)
    assert out_of_memory.find_place(caught.value.__traceback__) == out_of_memory.HEAD


def fails_for(weight: torch.Tensor) -> Any:
    linear = torch.nn.functional.linear

    def of_another(x: torch.Tensor, w: torch.Tensor, *rest: Any) -> torch.Tensor:
        return run_out() if w.shape == weight.shape else linear(x, w, *rest)

    return of_another


def test_settings_that_are_spent_are_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"logit_budget_mib": 64}
    trainer = make(
        tmp_path, chronicals_config=spent, gradient_checkpointing=True, per_device_train_batch_size=1, lora=True
    )
    in_the_head(trainer, monkeypatch)
    note = note_of(trainer.train)
    for name in ("logit_budget_mib", "recompute_mlp", "gradient_checkpointing", "per_device_train", "LoRA in place"):
        assert name not in note.partition("cheapest first")[2], name
    assert "(1) a smaller max_length (now 96)" in note


@pytest.mark.parametrize(
    ("ranks", "engine", "words"),
    [
        (1, None, "weights and optimizer sharded over several GPUs: fsdp2.yaml or zero3.yaml"),
        (2, None, "weights and optimizer sharded over the 2 ranks: fsdp2.yaml or zero3.yaml"),
        (2, "is_fsdp_enabled", "fsdp2_offload.yaml or zero3_offload.yaml of integrations/accelerate, much slower"),
        (2, "is_deepspeed_enabled", "fsdp2_offload.yaml or zero3_offload.yaml"),
    ],
)
def test_the_next_layout_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, engine: str | None, words: str
) -> None:
    trainer = make(tmp_path)
    monkeypatch.setattr(SFTConfig, "world_size", property(lambda self: ranks))
    if engine is not None:
        monkeypatch.setattr(trainer, engine, True)
    assert trainer._model_settings()[-1].startswith(words)


def test_evaluation_has_a_batch_size_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, per_device_eval_batch_size=6, eval_strategy="steps", eval_steps=1)
    linear, projection = torch.nn.functional.linear, trainer.model.model.layers[1].mlp.down_proj

    projection.forward = lambda x: linear(x, projection.weight) if projection.training else run_out()
    for run in (trainer.evaluate, trainer.train):  # in a run's evaluation it gets one note, not another of training
        note = note_of(run)
        assert "memory ran out in evaluation, in the decoder layers" in note
        assert "(1) per_device_eval_batch_size=3 (now 6)" in note and "train_batch" not in note
        assert "LoRA in place" not in note and "sharded" not in note


def test_auto_find_batch_size_still_finds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    class Small(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tried.append(inputs["input_ids"].numel() // 96)
            if tried[-1] > 2:
                run_out()
            return super().training_step(model, inputs, *args, **kwargs)

    for version in ((3, 10), (3, 11)):
        monkeypatch.setattr(out_of_memory, "sys", SimpleNamespace(version_info=version))
        tried.clear()
        trainer = Small(
            model=tiny_models.build("llama"),
            args=SFTConfig(
                **{**SETTINGS, "output_dir": str(tmp_path), "use_chronicals": True, "packing": True, "max_steps": 2},
                auto_find_batch_size=True,
            ),
            train_dataset=tiny_data.text(120),
            processing_class=tiny_data.tokenizer(),
        )
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = 4
        trainer.train()
        assert tried[0] == 4 and tried[-1] <= 2 and trainer.state.global_step == 2


def test_python_3_10_has_no_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "sys", SimpleNamespace(version_info=(3, 10)))
    trainer = make(tmp_path)
    in_attention(trainer, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    assert not getattr(caught.value, "__notes__", None) and len(caught.value.args) == 1
    assert str(caught.value).startswith(f"{WORDS}\nchronicals-trl: memory ran out in training, in attention.")


def test_nothing_is_added_with_the_flag_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, use_chronicals=False, packing=False)
    in_a_layer(trainer, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    assert not getattr(caught.value, "__notes__", None) and caught.value.args == (WORDS,)
