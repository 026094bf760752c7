"""A model whose embedding and head share a weight, trained with the flag on and off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
import trl
from training_runs import SETTINGS, logged, run

from chronicals_trl import SFTConfig, SFTTrainer, patch_model
from chronicals_trl.model import tied_weight

WEIGHT = "model.embed_tokens.weight"

CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "completion_only": {"data": tiny_data.prompt_completion},
    "accumulation": {"options": {"gradient_accumulation_steps": 2}},
    "checkpointing": {"options": {"gradient_checkpointing": True}},
    "reentrant": {
        "options": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    },
    "neftune": {"options": {"neftune_noise_alpha": 5.0, "chronicals_config": {"padding_free": "off"}}},
    "dft": {"options": {"loss_type": "dft"}},
    "gpt2": {"family": "gpt2"},
}


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the ids looked up for a head; those of the check at the start are of one dimension."""
    found: list[tuple[int, ...]] = []
    lookup = tied_weight.tied_embedding

    def noted(ids: torch.Tensor, *args: Any) -> Any:
        if ids.dim() > 1:
            found.append(tuple(ids.shape))
        return lookup(ids, *args)

    monkeypatch.setattr(tied_weight, "tied_embedding", noted)
    return found


@pytest.mark.parametrize("case", CASES)
def test_same_as_trl(tmp_path: Path, case: str, lookups: list[tuple[int, ...]]) -> None:
    settings = {"family": "qwen2", "data": tiny_data.text, "options": {}, **CASES[case]}
    data, options = settings.pop("data"), settings.pop("options")
    ours, gradients = run(
        SFTTrainer, SFTConfig, tmp_path, data=data(), options={**options, "use_chronicals": True}, **settings
    )
    micro_batches = SETTINGS["max_steps"] * options.get("gradient_accumulation_steps", 1)
    assert len(lookups) == micro_batches
    assert ours.chronicals_report["head"].reason == tied_weight.TOGETHER
    options = {name: value for name, value in options.items() if name != "chronicals_config"}
    theirs, reference = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, data=data(), options=options, **settings)
    assert len(lookups) == micro_batches
    for key in ("loss", "grad_norm"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-4), key
    assert gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        assert (gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_evaluation_between_the_steps(tmp_path: Path, lookups: list[tuple[int, ...]]) -> None:
    options = {"use_chronicals": True, "eval_strategy": "steps", "eval_steps": 1}
    evaluated, _ = run(
        SFTTrainer, SFTConfig, tmp_path, family="qwen2", options=options, eval_dataset=tiny_data.text(5, seed=4)
    )
    assert len(lookups) == SETTINGS["max_steps"]
    plain, _ = run(SFTTrainer, SFTConfig, tmp_path, family="qwen2", options={"use_chronicals": True})
    assert logged(evaluated, "loss") == logged(plain, "loss")


def test_bf16_autocast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lookups: list[tuple[int, ...]]) -> None:
    """To the bit what it is with torch's own lookup: the shared weight's gradient is float32 with both."""
    options = {"use_chronicals": True, "bf16": True}
    ours, gradients = run(SFTTrainer, SFTConfig, tmp_path, family="qwen2", options=options)
    assert len(lookups) == SETTINGS["max_steps"]
    monkeypatch.setattr(tied_weight, "obstacle", lambda *args: "not today")
    theirs, reference = run(SFTTrainer, SFTConfig, tmp_path, family="qwen2", options=options)
    assert len(lookups) == SETTINGS["max_steps"]
    assert theirs.chronicals_report["head"].reason == f"{tied_weight.APART}: not today"
    assert torch.equal(gradients[WEIGHT], reference[WEIGHT]) and gradients[WEIGHT].dtype == torch.float32
    assert logged(ours, "loss") == logged(theirs, "loss")


@pytest.mark.slow
def test_torch_compile_has_torchs_own(tmp_path: Path, lookups: list[tuple[int, ...]]) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    ours, gradients = run(SFTTrainer, SFTConfig, tmp_path, family="qwen2", options={**options, "use_chronicals": True})
    assert lookups == []
    theirs, reference = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, family="qwen2", options=options)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)
    assert (gradients[WEIGHT] - reference[WEIGHT]).norm() < 1e-5 * reference[WEIGHT].norm()


def test_adapters_leave_the_weight_frozen(tmp_path: Path, lookups: list[tuple[int, ...]]) -> None:
    peft = pytest.importorskip("peft")
    ours, gradients = run(
        SFTTrainer, SFTConfig, tmp_path, family="qwen2", options={"use_chronicals": True},
        peft_config=peft.LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    assert lookups == [] and not any("embed" in name for name in gradients)
    assert ours.chronicals_report["head"].state == "on" and ours.chronicals_report["head"].reason is None


def test_hooks_on_saved_tensors(lookups: list[tuple[int, ...]]) -> None:
    """They see the head's view in the weight's memory, by which TRL's activation offloading knows a weight."""
    model = tiny_models.build("qwen2")
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    patch_model(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**tiny_models.packed_batch(), fused_lm_head=True).loss
    loss.backward()
    weights = [t for t in packed if t.shape == model.lm_head.weight.shape]
    assert len(weights) == 1
    assert weights[0].untyped_storage().data_ptr() == model.lm_head.weight.untyped_storage().data_ptr()
    assert len(lookups) == 1
