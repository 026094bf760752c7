"""Flag on against flag off and against stock TRL: same batches, same losses, same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
import trl
from training_runs import SETTINGS, logged, run

from chronicals_trl import SFTConfig, SFTTrainer


def require_same_run(ours, theirs, our_gradients, their_gradients) -> None:
    assert len(logged(ours, "loss")) == SETTINGS["max_steps"]
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-4, abs=1e-6), key
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        error = (our_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-5, f"{name}: {error:.1e}"
    assert min(logged(ours, "grad_norm")) > 0


@pytest.mark.parametrize("packing", [False, True])
def test_flag_off_is_stock_to_the_bit(tmp_path: Path, packing: bool) -> None:
    ours, gradients = run(SFTTrainer, SFTConfig, tmp_path, options={"packing": packing})
    theirs, reference = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, options={"packing": packing})
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(ours, key) == logged(theirs, key)
    assert all(torch.equal(gradients[name], reference[name]) for name in reference)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    assert {part.state for part in ours.chronicals_report.parts} == {"off"}


# loss_type, completion-only, assistant-only, pre-tokenised, padding-free, checkpointing, accumulation, a mixture of
# experts with its auxiliary loss, label smoothing: each has to train as TRL's does on the same (unpacked) batches.
CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "dft": {"options": {"loss_type": "dft"}},
    "completion_only": {"data": tiny_data.prompt_completion},
    "prompt_completion_whole": {"data": tiny_data.prompt_completion, "options": {"completion_only_loss": False}},
    "assistant_only": {"data": tiny_data.chat, "options": {"assistant_only_loss": True}},
    "tokenized": {"data": tiny_data.tokenized},
    "padding_free": {"options": {"padding_free": True, "max_length": None}},
    "accumulation": {"options": {"gradient_accumulation_steps": 2}},
    "checkpointing": {"options": {"gradient_checkpointing": True}},
    "experts": {"family": "qwen3_moe", "options": {"router_aux_loss_coef": 0.3, "gradient_accumulation_steps": 2}},
    "label_smoothing": {"options": {"label_smoothing_factor": 0.1}},
    "gemma3": {"family": "gemma3"},
    "torch_compile": {"options": {"torch_compile": True, "torch_compile_backend": "aot_eager"}},
}


@pytest.mark.parametrize("case", CASES)
def test_same_as_trl_on_the_same_batches(tmp_path: Path, case: str) -> None:
    settings = dict(CASES[case])
    data, options = settings.pop("data", tiny_data.text), settings.pop("options", {})
    ours, gradients = run(
        SFTTrainer, SFTConfig, tmp_path, data=data(), options={**options, "use_chronicals": True}, **settings
    )
    theirs, reference = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, data=data(), options=options, **settings)
    require_same_run(ours, theirs, gradients, reference)
    assert logged(ours, "num_tokens") == logged(theirs, "num_tokens")
    assert ours.chronicals_report["rms_norm"].state == "on"
    assert ours.chronicals_report["head"].state == ("off" if case == "label_smoothing" else "on")
    if case == "experts":
        assert logged(ours, "aux_loss") == pytest.approx(logged(theirs, "aux_loss"), rel=1e-4)


def packed_dataset(family: str, options: dict[str, Any], tmp_path: Path):
    """The rows that our trainer packs, for a stock trainer that takes them as they are."""
    trainer = SFTTrainer(
        model=tiny_models.build(family),
        args=SFTConfig(**{**SETTINGS, **options, "output_dir": str(tmp_path / "packed"), "use_chronicals": True}),
        train_dataset=tiny_data.prompt_completion(),
        processing_class=tiny_data.tokenizer(),
    )
    return trainer.train_dataset


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_packed_same_as_trl_on_the_same_rows(tmp_path: Path, family: str, loss_type: str) -> None:
    """Our bins, trained by TRL's own trainer and collator, give our losses and gradients."""
    options: dict[str, Any] = {"packing": True, "loss_type": loss_type}
    if family == "qwen3_moe":
        options["router_aux_loss_coef"] = 0.3
    rows = packed_dataset(family, options, tmp_path)
    ours, gradients = run(
        SFTTrainer, SFTConfig, tmp_path, family=family, data=tiny_data.prompt_completion(),
        options={**options, "use_chronicals": True},
    )  # fmt: skip
    theirs, reference = run(
        trl.SFTTrainer, trl.SFTConfig, tmp_path, family=family, data=rows,
        options={**options, "dataset_kwargs": {"skip_prepare_dataset": True}},
    )  # fmt: skip
    assert list(ours.train_dataset["input_ids"]) == list(rows["input_ids"])
    require_same_run(ours, theirs, gradients, reference)
    assert logged(ours, "num_tokens") == logged(theirs, "num_tokens")


def test_packed_lora_same_as_trl(tmp_path: Path) -> None:
    """With one learning rate for A and B, LoRA on packed rows is TRL's to rounding."""
    peft = pytest.importorskip("peft")

    def lora():
        return peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True)

    options = {"packing": True}
    rows = packed_dataset("llama", options, tmp_path)
    ours, gradients = run(
        SFTTrainer, SFTConfig, tmp_path, data=tiny_data.prompt_completion(), peft_config=lora(),
        options={**options, "use_chronicals": True, "chronicals_config": {"lora_plus": "off"}},
    )  # fmt: skip
    theirs, reference = run(
        trl.SFTTrainer, trl.SFTConfig, tmp_path, data=rows, peft_config=lora(),
        options={**options, "dataset_kwargs": {"skip_prepare_dataset": True}},
    )  # fmt: skip
    assert ours.chronicals_report["lora"].state == "on"
    # At the first step B is zero, so A's gradient is: its rows compare nothing.
    trained = {name for name in reference if "lora_B" in name}
    require_same_run(ours, theirs, {n: gradients[n] for n in trained}, {n: reference[n] for n in trained})


def test_evaluation_same_as_trl(tmp_path: Path) -> None:
    results = []
    for trainer_class, config_class, options in (
        (SFTTrainer, SFTConfig, {"use_chronicals": True}),
        (trl.SFTTrainer, trl.SFTConfig, {}),
    ):
        trainer, _ = run(
            trainer_class, config_class, tmp_path, options=options, eval_dataset=tiny_data.text(9, seed=4)
        )
        results.append(trainer.evaluate())
        assert next(p for p in trainer.model.parameters()).grad is None or not torch.is_inference_mode_enabled()
    ours, theirs = results
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


def test_compute_metrics_gets_the_logits(tmp_path: Path) -> None:
    seen = {}

    def compute_metrics(prediction):
        seen["logits"] = prediction.predictions
        return {"count": float(prediction.predictions.shape[0])}

    trainer, _ = run(
        SFTTrainer, SFTConfig, tmp_path, options={"use_chronicals": True, "max_steps": 1},
        eval_dataset=tiny_data.text(6, seed=4), compute_metrics=compute_metrics,
    )  # fmt: skip
    assert trainer.evaluate()["eval_count"] == 6
    assert seen["logits"].shape[-1] == tiny_models.VOCAB_SIZE
