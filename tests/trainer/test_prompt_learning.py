"""PEFT's prompt learning with packing: its virtual tokens are the row's, and it drops what keeps documents apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_data
import tiny_models
from training_runs import SETTINGS, logged

from chronicals_trl import SFTConfig, SFTTrainer

peft = pytest.importorskip("peft")


def make(tmp_path: Path, peft_config, **options) -> SFTTrainer:
    return SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**{**SETTINGS, "output_dir": str(tmp_path), "use_chronicals": True, "max_steps": 1, **options}),
        train_dataset=tiny_data.text(),
        processing_class=tiny_data.tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PromptTuningConfig", {}), ("PrefixTuningConfig", {}), ("PromptEncoderConfig", {"encoder_hidden_size": 8})],
)
def test_packing_is_refused(tmp_path: Path, kind: str, options: dict) -> None:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)
    with pytest.raises(RuntimeError, match=rf"{kind} packed documents attend to each other .*Set packing=False"):
        make(tmp_path, config, packing=True)
    trainer = make(tmp_path, config, packing=False)
    trainer.train()
    assert logged(trainer, "loss")[0] > 0


def test_adapters_that_keep_documents_apart_are_packed(tmp_path: Path) -> None:
    for config in (
        peft.LoraConfig(r=2, target_modules="all-linear"),
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    ):
        assert make(tmp_path, config, packing=True).chronicals_report["packing"].state == "on"
