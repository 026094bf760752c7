"""Padded batches on a varlen kernel: trained as stock TRL trains on the same batches, and left alone where unsure."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import fake_flash_attention as fake
import pytest
import tiny_data
import tiny_models
import trl
from trainer.test_parity import require_same_run
from training_runs import SETTINGS, run
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chronicals_trl import SFTConfig, SFTTrainer

FA4 = {
    "use_chronicals": True,
    "chronicals_config": {"attention_backend": "flash_attn_4", "packing": "off", "padding_free": "off"},
}
STEPS, LAYERS = SETTINGS["max_steps"], 2


@pytest.fixture(autouse=True)
def fake_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fake.install(monkeypatch)


def notes(trainer: Any) -> str:
    return "\n".join(note for note in trainer.chronicals_report.notes if note.startswith("attention"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_padded_batches(tmp_path: Path, family: str) -> None:
    ours, gradients = run(SFTTrainer, SFTConfig, tmp_path, family=family, options=FA4)
    assert "padded rows go through the same kernel" in notes(ours)
    assert fake.CALLS["backward"] >= STEPS * LAYERS
    theirs, reference = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, family=family)
    require_same_run(ours, theirs, gradients, reference)


def test_padding_free(tmp_path: Path) -> None:
    options = {"padding_free": True, "max_length": None}
    ours, gradients = run(SFTTrainer, SFTConfig, tmp_path, options={**options, **FA4})
    assert not notes(ours) and fake.CALLS["backward"] >= STEPS * LAYERS
    theirs, reference = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, options=options)
    require_same_run(ours, theirs, gradients, reference)


def test_another_collators_mask_is_read_as_a_mask(tmp_path: Path) -> None:
    class Holes(DataCollatorForLanguageModeling):
        def torch_call(self, examples: Any) -> Any:
            batch = super().torch_call(examples)
            batch["attention_mask"][:, 2] = 0
            batch["labels"][:, 2] = -100
            return batch

    collator = Holes(pad_token_id=tiny_data.tokenizer().pad_token_id)
    ours, gradients = run(SFTTrainer, SFTConfig, tmp_path, options=FA4, data_collator=collator)
    assert not notes(ours)
    theirs, reference = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, data_collator=collator)
    require_same_run(ours, theirs, gradients, reference)


@pytest.mark.parametrize("method", ["compute_loss", "training_step", "_prepare_inputs"])
def test_a_mask_that_a_subclass_alters_is_read_as_a_mask(tmp_path: Path, method: str) -> None:
    def altering(stock: type) -> type:
        def altered(self: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = next(arg for arg in args if isinstance(arg, MutableMapping))
            inputs["attention_mask"][:, 2] = 0
            inputs["labels"][:, 2] = -100
            return getattr(stock, method)(self, *args, **kwargs)

        return type("Altering", (stock,), {method: altered})

    ours, gradients = run(altering(SFTTrainer), SFTConfig, tmp_path, options=FA4)
    assert f"keep SDPA's dense mask (Altering overrides {method})" in notes(ours)
    theirs, reference = run(altering(trl.SFTTrainer), trl.SFTConfig, tmp_path)
    require_same_run(ours, theirs, gradients, reference)


def test_a_kernel_that_fails_on_padding_is_not_used_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chronicals_trl import trainer as trainer_module

    monkeypatch.setattr(trainer_module, "verify_padding", lambda model, device: "logits differ")
    ours, _ = run(SFTTrainer, SFTConfig, tmp_path, options=FA4)
    assert "keep SDPA's dense mask (logits differ)" in notes(ours)
    assert ours.model.config._attn_implementation == "chronicals_fa4"


def test_without_a_varlen_kernel_nothing_is_said(tmp_path: Path) -> None:
    options = {**SETTINGS, "output_dir": str(tmp_path / "out"), "use_chronicals": True}
    trainer = SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**options, chronicals_config={"attention_backend": "sdpa"}),
        train_dataset=tiny_data.text(),
        processing_class=tiny_data.tokenizer(),
    )
    assert not notes(trainer)
