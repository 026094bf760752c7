"""LoRA+ in SFTTrainer: what the logs, the report and the errors say of it, and checkpoints of other rates."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
from training_runs import SETTINGS, logged

from chronicals_trl import SFTConfig, SFTTrainer

peft = pytest.importorskip("peft")

LR = SETTINGS["learning_rate"]
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}


def lora(**options: Any):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})


def make(
    tmp_path: Path, *, model=None, peft_config=None, config: dict[str, Any] | None = None, **options
) -> SFTTrainer:
    settings = {
        "output_dir": str(tmp_path / "out"),
        "use_chronicals": True,
        "chronicals_config": config,
        "max_steps": 4,
    }
    optimizer = options.pop("optimizer_cls_and_kwargs", None)
    optimizers = options.pop("optimizers", (None, None))
    return SFTTrainer(
        model=tiny_models.build("llama") if model is None else model,
        args=SFTConfig(**{**SETTINGS, **settings, **options}),
        train_dataset=tiny_data.text(),
        eval_dataset=tiny_data.text(8),
        processing_class=tiny_data.tokenizer(),
        peft_config=peft_config,
        optimizer_cls_and_kwargs=optimizer,
        optimizers=optimizers,
    )


# -- the logs --------------------------------------------------------------------------------------------------------


def test_each_rate_is_in_the_logs(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, peft_config=lora(target_modules=["q_proj", "embed_tokens"]), warmup_steps=2,
        config={"lora_plus_ratio": 4.0, "lora_plus_embedding_lr": LR / 10},
    )  # fmt: skip
    trainer.train()
    a = logged(trainer, "learning_rate")
    assert max(a) == pytest.approx(LR) and len(set(a)) > 2
    assert logged(trainer, "learning_rate_lora_b") == pytest.approx([4 * rate for rate in a])
    assert logged(trainer, "learning_rate_lora_embedding") == pytest.approx([rate / 10 for rate in a])
    assert not any("learning_rate_lora_b" in entry for entry in trainer.state.log_history if "loss" not in entry)


def test_no_rate_in_the_logs_that_is_none_of_its_own(tmp_path: Path) -> None:
    """Embeddings that learn at A's rate have no key, nor has B with LoRA+ off."""
    trainer = make(tmp_path, peft_config=lora(target_modules=["q_proj", "embed_tokens"]))
    trainer.train()
    assert logged(trainer, "learning_rate_lora_b") and not logged(trainer, "learning_rate_lora_embedding")
    trainer = make(tmp_path, peft_config=lora(), config={"lora_plus": "off"})
    trainer.train()
    assert not logged(trainer, "learning_rate_lora_b")


def test_a_schedule_with_a_lower_bound_keeps_the_ratio_in_training(tmp_path: Path) -> None:
    """The loss can only get worse by this measure: the rate falls at each evaluation, down to the bound."""
    trainer = make(
        tmp_path, peft_config=lora(), **PLATEAU,
        lr_scheduler_kwargs={"factor": 0.5, "patience": 0, "min_lr": LR / 3, "mode": "max"},
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "learning_rate")[-1] == pytest.approx(LR / 3)
    assert logged(trainer, "learning_rate_lora_b")[-1] == pytest.approx(16 * LR / 3)


def test_rates_that_are_tensors(tmp_path: Path) -> None:
    """The schedule writes the next step's rate into them before the step is logged."""
    adamw = (torch.optim.AdamW, {"lr": torch.tensor(LR), "foreach": False})
    trainer = make(tmp_path, peft_config=lora(), optimizer_cls_and_kwargs=adamw)
    trainer.train()
    a = logged(trainer, "learning_rate")
    assert len(set(a)) > 2 and logged(trainer, "learning_rate_lora_b") == pytest.approx([16 * rate for rate in a])


def test_groups_are_split_once(tmp_path: Path) -> None:
    """By who makes the optimizer before training, and who trains twice: split again, B would learn faster."""
    trainer = make(tmp_path, peft_config=lora(), config={"lora_plus_ratio": 4.0}, lr_scheduler_type="constant")
    trainer.create_optimizer()
    trainer.create_optimizer()
    for _ in range(2):
        trainer.train()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [LR, 4 * LR]
    assert trainer.chronicals_report["lora_plus"].state == "on"


def test_bounds_are_scaled_once(tmp_path: Path) -> None:
    options = {**PLATEAU, "lr_scheduler_kwargs": {"min_lr": LR / 3}}
    trainer = make(tmp_path, peft_config=lora(), **options)
    trainer.create_optimizer()
    for _ in range(2):
        trainer.create_scheduler(4, trainer.optimizer)
        assert trainer.lr_scheduler.min_lrs == pytest.approx([LR / 3, 16 * LR / 3])


def test_bounds_of_the_user_s_own_groups_are_the_user_s(tmp_path: Path) -> None:
    """An optimizer that was passed in is used as it is, whatever the rates of its groups: so is its schedule."""
    model = peft.get_peft_model(tiny_models.build("llama"), lora())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD([{"params": trained[:1]}, {"params": trained[1:], "lr": 2 * LR}], lr=LR)
    options = {**PLATEAU, "lr_scheduler_kwargs": {"min_lr": LR / 3}}
    trainer = make(tmp_path, model=model, optimizers=(optimizer, None), **options)
    assert trainer.chronicals_report["lora_plus"].state == "off"
    trainer.create_scheduler(4, optimizer)
    assert trainer.lr_scheduler.min_lrs == [LR / 3] * 2


# -- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "options", "reason"),
    [
        ("lomo_optim", {"optim": "lomo"}, "Lomo updates the weights during the backward pass"),
        (
            "galore_torch",
            {"optim": "galore_adamw_layerwise", "optim_target_modules": ["lora_A"], "optim_args": "rank=2"},
            "hold none of them .layer-wise",
        ),
        ("torch", {"optimizer_cls_and_kwargs": (torch.optim.Muon, {"lr": LR})}, "Muon multiplies the rate"),
    ],
)
def test_an_optimizer_that_would_lose_the_ratio(tmp_path: Path, package: str, options: dict, reason: str) -> None:
    """Off with the reason in the report, and an error where LoRA+ is insisted on; before the first step."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    trainer = make(tmp_path, peft_config=lora(), **options)
    trainer.train()
    part = trainer.chronicals_report["lora_plus"]
    assert part.state == "off" and part.omitted
    assert not logged(trainer, "learning_rate_lora_b")
    saved = {p["name"]: p for p in json.loads((tmp_path / "out" / "chronicals_report.json").read_text())["parts"]}
    assert saved["lora_plus"]["reason"] == part.reason
    with pytest.raises(RuntimeError, match=f"lora_plus is off: .*{reason}"):
        make(tmp_path, peft_config=lora(), config={"lora_plus": "on"}, **options).train()


def test_muon_with_updates_of_equal_size(tmp_path: Path) -> None:
    muon = (torch.optim.Muon, {"lr": LR, "adjust_lr_fn": "match_rms_adamw"})
    trainer = make(tmp_path, peft_config=lora(), optimizer_cls_and_kwargs=muon)
    trainer.train()
    assert trainer.chronicals_report["lora_plus"].state == "on"
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [LR, 16 * LR]


# -- adapters that cannot be trained ---------------------------------------------------------------------------------


def test_frozen_adapters(tmp_path: Path) -> None:
    """As PeftModel.from_pretrained leaves one without is_trainable; a layer of the base model is trained."""
    model = peft.get_peft_model(tiny_models.build("llama"), lora())
    model.requires_grad_(False)
    model.base_model.model.lm_head.weight.requires_grad_(True)
    part = make(tmp_path, model=model).chronicals_report["lora_plus"]
    assert part.state == "off" and "all of its adapters are frozen" in part.reason
    with pytest.raises(RuntimeError, match=r"lora_plus is off: .*frozen.*is_trainable=True.*set_adapter"):
        make(tmp_path, model=model, config={"lora_plus": "on"})


@pytest.mark.parametrize("name", ["default", "missing"])
def test_nothing_to_train(tmp_path: Path, name: str) -> None:
    """A clear error in place of torch's "does not require grad"; to evaluate, such a model is as good as any."""
    model = peft.get_peft_model(tiny_models.build("llama"), lora())
    model.base_model.set_adapter(name)
    model.requires_grad_(False)
    trainer = make(tmp_path, model=model)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="nothing to train.*" + ("frozen" if name == "default" else "'missing'")):
        trainer.train()


def test_a_frozen_b(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_models.build("llama"), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match="lora_plus is off: no lora_B matrix is trainable"):
        make(tmp_path, model=model, config={"lora_plus": "on"})


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan")])
def test_a_ratio_that_is_none(tmp_path: Path, ratio: float) -> None:
    with pytest.raises(ValueError, match="lora_plus_ratio"):
        make(tmp_path, peft_config=lora(), config={"lora_plus_ratio": ratio})


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_resume_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "warmup_steps": 3, "peft_config": lora()}
    whole = make(tmp_path, **options)
    whole.train()
    resumed = make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert logged(resumed, "learning_rate_lora_b") == logged(whole, "learning_rate_lora_b")
    assert not any("other rates" in note for note in resumed.chronicals_report.notes)
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_a_checkpoint_with_another_ratio_says_so(tmp_path: Path, schedule: str) -> None:
    """Trainer goes on with the checkpoint's rates; a ratio in the configuration would be ignored without a word."""
    # The warm-up starts at a rate of 0, whose multiples tell nothing.
    options = {"save_strategy": "steps", "save_steps": 2, "warmup_steps": 2, "peft_config": lora()}
    if schedule != "linear":
        options |= PLATEAU
    make(tmp_path, **options).train()
    resumed = make(tmp_path, config={"lora_plus_ratio": 4.0}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    (note,) = (note for note in resumed.chronicals_report.notes if "other rates" in note)
    assert "not ratio" in str(resumed.chronicals_report["lora_plus"].backend)
    assert not any(note.startswith("LoRA+: B learns") for note in resumed.chronicals_report.notes)
    assert "to the first: 1, 16; configured: 1, 4)" in note and "remove optimizer.pt and scheduler.pt" in note
    rates = [group["lr"] for group in resumed.optimizer.param_groups]
    assert len(rates) == 2 and rates[1] == pytest.approx(16 * rates[0])
    assert note in json.loads((tmp_path / "out" / "chronicals_report.json").read_text())["notes"]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="a torch without Muon")
def test_a_checkpoint_with_a_ratio_where_the_optimizer_has_turned_it_off(tmp_path: Path) -> None:
    """What the error says of this run is what became of LoRA+, not what was asked for."""
    options = {"save_strategy": "steps", "save_steps": 2, "peft_config": lora()}
    make(tmp_path, **options).train()
    resumed = make(tmp_path, optimizer_cls_and_kwargs=(torch.optim.Muon, {"lr": LR}), **options)
    with pytest.raises(ValueError, match=r"written with LoRA\+ on, and this run has other .*\(LoRA\+ off\)"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["o_proj"], r"q_proj \(2\) there alone, o_proj \(2\) here alone"),  # as many tensors, of the same shapes
        (["q_proj", "v_proj"], r"none there alone, v_proj \(2\) here alone"),
    ],
)
def test_a_checkpoint_of_other_layers_is_refused(tmp_path: Path, targets: list[str], told: str) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, peft_config=lora(), **saves).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match=told):
        make(tmp_path, peft_config=lora(target_modules=targets)).train(resume_from_checkpoint=checkpoint)
    make(
        tmp_path, peft_config=lora(target_modules="all-linear", exclude_modules=r".*([kvo]|gate|up|down)_proj")
    ).train(resume_from_checkpoint=checkpoint)  # the same layers in other words
