"""Each health check finds its planted fault and nothing else; runs without a fault are told nothing.

That healthy runs are left alone is asserted for the whole suite by `no_false_alarm` in conftest.py.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_data
import tiny_models
import torch
from datasets import Dataset
from training_runs import SETTINGS
from transformers import TrainerCallback

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.observe.health import CHECKS, series

STEPS = 16


def model_of(family: str = "llama", **overrides: Any) -> Any:
    """A model that is sure of itself: its loss is far from ln(V)."""
    model = tiny_models.build(family, **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def make(tmp_path: Path, *, model: Any = None, data: Any = None, health: str = "warn", **options: Any) -> SFTTrainer:
    given = {
        name: options.pop(name)
        for name in ("peft_config", "optimizers", "callbacks", "eval_dataset")
        if name in options
    }
    settings = {**SETTINGS, "output_dir": str(tmp_path), "use_chronicals": True, "packing": True, "max_steps": STEPS}
    settings |= {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    settings |= {"chronicals_config": {"health": health}}
    trainer = SFTTrainer(
        model=model_of() if model is None else model,
        args=SFTConfig(**{**settings, **options}),
        train_dataset=tiny_data.text(200) if data is None else data,
        processing_class=tiny_data.tokenizer(),
        **given,
    )
    at_pace(trainer, lambda step: 1000.0)
    return trainer


def at_pace(trainer: SFTTrainer, tokens_per_second: Callable[[int], float]) -> None:
    """Throughput by the step; this machine's own pace varies."""
    meter = getattr(trainer, "_meter", None)
    if meter is not None:  # the flag is on
        read = type(meter).read
        meter.read = lambda: read(meter) | {"tokens_per_second": tokens_per_second(trainer.state.global_step)}


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, act: Callable[[Any], None]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act(kwargs["model"])


def said(trainer: SFTTrainer) -> list[str]:
    """The checks that spoke, by the report."""
    notes = [note for note in trainer.chronicals_report.notes if note.startswith("health: ")]
    return [found[1] for note in notes if (found := re.search(r"\[(\w+)\]$", note))]


# -- the faults ------------------------------------------------------------------------------------------------------


def cut(module: Any, *, trainable: bool) -> None:
    """Detach a module's output; `trainable`: such that torch finds something to differentiate all the same."""
    module.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_(trainable))


def times_zero(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * 0)


def frozen_by_mistake(tmp_path: Path, **options: Any) -> SFTTrainer:
    """What Unsloth showed, to the second digit: 72.44% of the parameters are to be trained, the gradient norm is 0."""
    model = model_of(intermediate_size=13)
    model.lm_head.requires_grad_(False)
    model.model.layers[0].self_attn.k_proj.requires_grad_(False)
    model.model.norm.requires_grad_(False)
    cut(model.model.layers[-1], trainable=True)
    return make(tmp_path, model=model, **options)


def multiplied_by_zero(tmp_path: Path, **options: Any) -> SFTTrainer:
    trainer = make(tmp_path, **options)
    times_zero(trainer.model)
    return trainer


def cut_in_the_middle(tmp_path: Path, **options: Any) -> SFTTrainer:
    model = model_of()
    cut(model.model.layers[0], trainable=True)
    return make(tmp_path, model=model, **options)


def optimizer_of_another_model(tmp_path: Path, **options: Any) -> SFTTrainer:
    return make(tmp_path, optimizers=(torch.optim.AdamW(model_of().parameters(), lr=1e-3), None), **options)


def no_labels(tmp_path: Path, **options: Any) -> SFTTrainer:
    rows = tiny_data.tokenized(200)["input_ids"]
    data = Dataset.from_dict({"input_ids": rows, "labels": [[-100] * len(row) for row in rows]})
    # Of a data set that it prepares the trainer refuses to begin: require_labels.
    return make(tmp_path, data=data, packing=False, dataset_kwargs={"skip_prepare_dataset": True}, **options)


def long_prompts(tmp_path: Path, **options: Any) -> SFTTrainer:
    rows = tiny_data.sentences(100)
    prompts = [row * 20 if number % 3 else row[:9] for number, row in enumerate(rows)]
    data = Dataset.from_dict({"prompt": prompts, "completion": [row[9:] for row in rows]})
    return make(tmp_path, data=data, **options)


def long_prompts_unpacked(tmp_path: Path, **options: Any) -> SFTTrainer:
    return long_prompts(tmp_path, packing=False, **options)


def bos_twice(tmp_path: Path, **options: Any) -> SFTTrainer:
    bos = tiny_data.tokenizer().bos_token_id
    rows = [[bos, bos, *row] for row in tiny_data.tokenized(200)["input_ids"]]
    return make(tmp_path, data=Dataset.from_dict({"input_ids": rows}), **options)


def stops_learning(tmp_path: Path, **options: Any) -> SFTTrainer:
    return make(tmp_path, callbacks=[At(4, times_zero)], **options)


def turns_nan(tmp_path: Path, **options: Any) -> SFTTrainer:
    def act(model: Any) -> None:
        model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan

    return make(tmp_path, callbacks=[At(4, act)], **options)


def not_loaded(tmp_path: Path, **options: Any) -> SFTTrainer:
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    return make(tmp_path, model=model, learning_rate=1e-6, **options)


def below_resolution(tmp_path: Path, **options: Any) -> SFTTrainer:
    return make(tmp_path, model=model_of().bfloat16(), learning_rate=1e-9, **options)


def norms_below_resolution(tmp_path: Path, **options: Any) -> SFTTrainer:
    return make(tmp_path, model=model_of().bfloat16(), learning_rate=1e-4, weight_decay=0.1, **options)


def optimizer_does_nothing(tmp_path: Path, **options: Any) -> SFTTrainer:
    trainer = make(tmp_path, **options)
    trainer.create_optimizer()
    trainer.optimizer.step = lambda closure=None: None
    return trainer


def spikes(tmp_path: Path, **options: Any) -> SFTTrainer:
    return make(tmp_path, callbacks=[At(12, lambda model: model.lm_head.weight.data.mul_(30))], **options)


def slows_down(tmp_path: Path, **options: Any) -> SFTTrainer:
    trainer = make(tmp_path, **options)
    at_pace(trainer, lambda step: 1000.0 if step < 12 else 400.0)
    return trainer


FAULTS: dict[Callable[..., SFTTrainer], str] = {
    frozen_by_mistake: "no_gradient",
    multiplied_by_zero: "no_gradient",
    cut_in_the_middle: "missing_gradients",
    optimizer_of_another_model: "not_optimized",
    no_labels: "no_labels",
    long_prompts: "dropped_documents",
    long_prompts_unpacked: "dropped_documents",
    bos_twice: "duplicate_bos",
    stops_learning: "zero_gradient_norm",
    turns_nan: "not_finite",
    not_loaded: "flat_loss",
    below_resolution: "still_weights",
    optimizer_does_nothing: "still_weights",
    norms_below_resolution: "some_still_weights",
    spikes: "loss_spike",
    slows_down: "slow",
}


@pytest.fixture(autouse=True)
def every_log_entry_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "_STRETCH_SECONDS", 0.0)


def test_every_check_has_a_fault() -> None:
    assert set(FAULTS.values()) == set(CHECKS)


@pytest.mark.planted_fault
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_by_its_check_and_by_no_other(
    fault: Callable[..., SFTTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = fault(tmp_path)
    with caplog.at_level(logging.WARNING, "chronicals_trl"):
        trainer.train()
    assert trainer.state.global_step == STEPS
    assert said(trainer) == [FAULTS[fault]]
    warnings = [record.getMessage() for record in caplog.records if "health:" in record.getMessage()]
    (note,) = [note for note in trainer.chronicals_report.notes if note.endswith("]")]
    assert warnings == [f"chronicals-trl: {note}"]
    assert "Likely cause: " in note and "Remedy: " in note
    assert note in json.loads((tmp_path / "chronicals_report.json").read_text())["notes"]


@pytest.mark.planted_fault
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_stop_ends_the_run(fault: Callable[..., SFTTrainer], tmp_path: Path) -> None:
    trainer = fault(tmp_path, health="stop")
    if not CHECKS[FAULTS[fault]]:
        trainer.train()
        assert said(trainer) == [FAULTS[fault]]
        return
    with pytest.raises(RuntimeError, match=rf"(?s)Likely cause: .*Remedy: .*\[{FAULTS[fault]}\].*health='warn'"):
        trainer.train()
    assert trainer.state.global_step < STEPS


@pytest.mark.planted_fault
def test_frozen_by_mistake_is_found_before_any_step(tmp_path: Path) -> None:
    trainer = frozen_by_mistake(tmp_path, health="stop", gradient_accumulation_steps=2)
    model = trainer.model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert f"{trained / total:.2%}" == "72.44%"
    assert f"health: {trained:,} of {total:,} parameters are trained" in "\n".join(trainer.chronicals_report.notes)
    with pytest.raises(RuntimeError, match=re.escape(f"({trained / total:.2%})")):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.planted_fault
def test_a_graph_that_torch_refuses_is_explained(tmp_path: Path) -> None:
    model = model_of()
    model.lm_head.requires_grad_(False)
    cut(model.model.norm, trainable=False)
    with pytest.raises(RuntimeError, match=r"the graph is cut between the loss and what is to be trained") as caught:
        make(tmp_path, model=model).train()
    assert "does not require grad" in str(caught.value.__cause__)


@pytest.mark.planted_fault
def test_what_is_named(tmp_path: Path) -> None:
    def note(trainer: SFTTrainer) -> str:
        trainer.train()
        return trainer.chronicals_report.notes[-1]

    missing = note(cut_in_the_middle(tmp_path, max_steps=10))
    assert "10 parameters" in missing and "model.embed_tokens.weight, model.layers.0." in missing
    assert "and 6 more" in missing and "layers.1" not in missing
    assert "below the resolution" in note(below_resolution(tmp_path))
    assert "an optimizer that updates other tensors" in note(optimizer_does_nothing(tmp_path))
    norms = note(norms_below_resolution(tmp_path))
    assert "group 1 (5 tensors in bfloat16 at learning rate" in norms and "group 0" not in norms


@pytest.mark.planted_fault
def test_steps_are_the_optimizers(tmp_path: Path) -> None:
    trainer = cut_in_the_middle(tmp_path, health="stop", gradient_accumulation_steps=2)
    with pytest.raises(RuntimeError, match="first 8 steps"):
        trainer.train()
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("pause", ["eval", "save"])
def test_entries_with_an_evaluation_or_a_save_are_not_slow(pause: str, tmp_path: Path) -> None:
    options = {f"{pause}_strategy": "steps", f"{pause}_steps": 1, "save_total_limit": 1}
    trainer = slows_down(tmp_path, eval_dataset=tiny_data.text(4), **options)
    trainer.train()
    assert said(trainer) == []


def test_guessing_has_another_loss_with_dft(tmp_path: Path) -> None:
    trainer = not_loaded(tmp_path, loss_type="dft")
    assert trainer._loss_of_guessing() is None
    smoothed = not_loaded(tmp_path, label_smoothing_factor=0.1)
    assert smoothed._loss_of_guessing() is None
    assert not_loaded(tmp_path)._loss_of_guessing() == pytest.approx(math.log(tiny_models.VOCAB_SIZE))


@pytest.mark.planted_fault
def test_overflows_of_fp16_are_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU would have them; fp16 itself does not run here."""
    trainer = cut_in_the_middle(tmp_path)
    monkeypatch.setattr(
        type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda _: trainer.state.global_step < 5)
    )
    trainer.args.fp16 = True
    heard: list[tuple[int, str]] = []
    tell = trainer._tell
    monkeypatch.setattr(
        trainer,
        "_tell",
        lambda found: (heard.extend((trainer.state.global_step, f.check) for f in found), tell(found)),
    )
    trainer.train()
    # Four of the sixteen were skipped.
    assert heard == [(12, "missing_gradients")]
    assert trainer._monitor()._series._overflow_logs == series._OVERFLOW_LOGS


@pytest.mark.parametrize("fault", [frozen_by_mistake, bos_twice, turns_nan])
def test_nothing_is_checked_where_it_is_off(fault: Callable[..., SFTTrainer], tmp_path: Path) -> None:
    trainer = fault(tmp_path, health="off", max_steps=8)
    trainer.train()
    assert not [note for note in trainer.chronicals_report.notes if "health" in note]


def test_nothing_is_checked_with_the_flag_off(tmp_path: Path) -> None:
    trainer = frozen_by_mistake(tmp_path, use_chronicals=False, max_steps=6)
    trainer.train()
    assert trainer.chronicals_report.notes == []


# -- runs without a fault --------------------------------------------------------------------------------------------


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def frozen_embedding() -> Any:
    model = model_of()
    model.get_input_embeddings().requires_grad_(False)
    return model


HEALTHY: dict[str, Callable[[], dict[str, Any]]] = {
    "full": dict,
    "lora": lambda: {"peft_config": lora()},
    "lora without lora+": lambda: {
        "peft_config": lora(use_dora=True),
        "chronicals_config": {"health": "stop", "lora_plus": "off"},
    },
    "modules_to_save": lambda: {"peft_config": lora(target_modules=["q_proj"], modules_to_save=["lm_head"])},
    "lora on the embedding": lambda: {"peft_config": lora(target_modules=["embed_tokens", "q_proj"])},
    "experts": lambda: {"model": model_of("qwen3_moe", num_experts=32), "data": tiny_data.text(60)},
    "tied": lambda: {"model": model_of("qwen2")},
    "frozen embedding": lambda: {"model": frozen_embedding()},
    "bfloat16": lambda: {"model": model_of().bfloat16(), "learning_rate": 1e-2},
    "warm-up": lambda: {
        "lr_scheduler_type": "linear",
        "warmup_steps": STEPS,
        "model": tiny_models.build("llama").bfloat16(),
        "learning_rate": 1e-4,
    },
    "accumulation": lambda: {"gradient_accumulation_steps": 3, "logging_steps": 5},
    "padded, sgd, checkpointing": lambda: {"packing": False, "optim": "sgd", "gradient_checkpointing": True},
    "no rate": lambda: {"learning_rate": 0.0, "peft_config": lora()},
    "no clipping": lambda: {"max_grad_norm": 0.0},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm(name: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, **{"health": "stop", **HEALTHY[name]()})
    trainer.train()
    assert trainer.state.global_step == STEPS and said(trainer) == []


def test_documents_without_a_label_among_others(tmp_path: Path) -> None:
    rows = tiny_data.tokenized(200)["input_ids"]
    labels = [[-100] * len(row) if number % 2 else row for number, row in enumerate(rows)]
    data = Dataset.from_dict({"input_ids": rows, "labels": labels})
    options = {"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "per_device_train_batch_size": 1}
    trainer = make(tmp_path, data=data, health="stop", max_steps=40, **options)
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert any(first == second == 0 for first, second in itertools.pairwise(norms))
    assert said(trainer) == []


def test_resumed_and_evaluated(tmp_path: Path) -> None:
    options = {"health": "stop", "save_strategy": "steps", "save_steps": 8}
    make(tmp_path, **options, max_steps=8).train()
    trainer = make(tmp_path, **options, max_steps=24)
    trainer.train(resume_from_checkpoint=True)
    trainer.evaluate(tiny_data.text(8))
    assert trainer.state.global_step == 24 and said(trainer) == []


def test_what_is_trained_is_told(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=1, weight_decay=0.1, learning_rate=3e-4)
    trainer.train()
    numbers = sum(p.numel() for p in trainer.model.parameters())
    groups = trainer.optimizer.param_groups
    told = [note for note in trainer.chronicals_report.notes if note.startswith("health:")]
    assert told[0] == f"health: {numbers:,} of {numbers:,} parameters are trained (100.00%)"
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    assert told[1] == (
        f"health: optimizer groups: {len(groups[0]['params'])} tensors of {sizes[0]:,} numbers at learning rate "
        f"0.0003, weight decay 0.1; {len(groups[1]['params'])} tensors of {sizes[1]:,} numbers at learning rate 0.0003"
    )


def test_what_is_not_watched_is_told(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2)
    trainer.args.optim = "galore_adamw_layerwise"
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    cut(trainer.model.model.layers[0], trainable=True)
    trainer.train()
    (note,) = [note for note in trainer.chronicals_report.notes if "not watched" in note]
    assert "galore_adamw_layerwise" in note


# -- what TRL finds itself, before our checks ------------------------------------------------------------------------


@pytest.mark.parametrize("template", [
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}",
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% generation %}{% endgeneration %}",
])  # fmt: skip
def test_an_empty_assistant_mask_is_an_error_that_names_it(template: str, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_data.tokenizer())
    tokenizer.chat_template = template
    settings = {**SETTINGS, "output_dir": str(tmp_path), "use_chronicals": True, "assistant_only_loss": True}
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)generation"):
        SFTTrainer(
            model=model_of(), args=SFTConfig(**settings), train_dataset=tiny_data.chat(), processing_class=tokenizer
        )
