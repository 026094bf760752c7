"""What the trainer does between TRL's own steps: rates in the logs, the order of rows, what the meter measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_data
import tiny_models
from training_runs import SETTINGS, logged
from transformers import TrainerCallback

from chronicals_trl import SFTConfig, SFTTrainer


def make(tmp_path: Path, *, data=None, model=None, trainer_class: type = SFTTrainer, peft_config=None, **options):
    evaluation = options.pop("eval_dataset", None)
    return trainer_class(
        model=tiny_models.build("llama") if model is None else model,
        args=SFTConfig(**{**SETTINGS, "output_dir": str(tmp_path / "out"), "use_chronicals": True, **options}),
        train_dataset=tiny_data.text() if data is None else data,
        eval_dataset=evaluation,
        processing_class=tiny_data.tokenizer(),
        peft_config=peft_config,
    )


# -- LoRA+ -----------------------------------------------------------------------------------------------------------


class Rates(TrainerCallback):
    """The rate of each named parameter in each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.steps.append({n: rates[id(p)] for n, p in model.named_parameters() if id(p) in rates})


@pytest.mark.parametrize("frozen", [None, "lora_A"])
def test_logged_rates_are_those_of_the_step(tmp_path: Path, frozen: str | None) -> None:
    """Also with A frozen, where B's group is the first and the rate that Trainer logs is already B's."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if frozen is not None and frozen in name:
            parameter.requires_grad = False
    trainer = make(tmp_path, model=model, warmup_steps=2, chronicals_config={"lora_plus_ratio": 8.0})
    rates = Rates()
    trainer.add_callback(rates)
    trainer.train()
    (b_name,) = {n for n in rates.steps[0] if "layers.0" in n and "lora_B" in n}
    b = [step[b_name] for step in rates.steps]
    assert logged(trainer, "learning_rate_lora_b") == pytest.approx(b)
    assert max(b) == pytest.approx(8 * SETTINGS["learning_rate"]) and len(set(b)) > 2
    expected = b if frozen else [step[b_name.replace("lora_B", "lora_A")] for step in rates.steps]
    assert logged(trainer, "learning_rate") == pytest.approx(expected)
