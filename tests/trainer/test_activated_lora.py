"""PEFT's activated LoRA: its adapter begins at the last invocation of a row, so a row has to be one document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
import trl
from datasets import Dataset
from training_runs import SETTINGS, logged, run

from chronicals_trl import SFTConfig, SFTTrainer

peft = pytest.importorskip("peft")

INVOCATION = [100, 101]


def documents() -> Dataset:
    """Each with its invocation in the middle."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (21, 9, 14, 17, 11, 25, 8, 15):
        tokens = torch.randint(5, 99, (length,), generator=generator).tolist()
        rows.append([*tokens[: length // 2], *INVOCATION, *tokens[length // 2 :]])
    return Dataset.from_dict({"input_ids": rows})


def adapter(**options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options)


def loss(tmp_path: Path, config: Any, **options: Any) -> float:
    """Of one step of stock TRL over all documents."""
    torch.manual_seed(0)
    trainer, _ = run(
        trl.SFTTrainer,
        trl.SFTConfig,
        tmp_path,
        data=documents(),
        peft_config=config,
        options={"max_steps": 1, **options},
    )
    return logged(trainer, "loss")[0]


@pytest.mark.parametrize("setting", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_stock_trl_learns_another_thing_from_rows_of_several_documents(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    """Without a word: the reason why it is refused. A plain LoRA learns the same."""
    rows = 1 if "packing" in setting else 8
    together = {"per_device_train_batch_size": rows, "max_length": 256, **setting}
    apart = {"per_device_train_batch_size": 8}
    plain = [loss(tmp_path, adapter(), **options) for options in (together, apart)]
    assert plain[0] == pytest.approx(plain[1], rel=1e-5)
    activated = [
        loss(tmp_path, adapter(alora_invocation_tokens=INVOCATION), **options) for options in (together, apart)
    ]
    assert activated[0] != pytest.approx(activated[1], rel=1e-3)


def ours(tmp_path: Path, **options: Any) -> SFTTrainer:
    return SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**{**SETTINGS, "output_dir": str(tmp_path), "use_chronicals": True, "max_steps": 1, **options}),
        train_dataset=documents(),
        eval_dataset=documents(),
        processing_class=tiny_data.tokenizer(),
        peft_config=adapter(alora_invocation_tokens=INVOCATION),
    )


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("packing", {}),
        ("packing", {"chronicals_config": {"packing": "off"}}),
        ("packing", {"packing_strategy": "wrapped"}),
        ("eval_packing", {"packing": False}),
        ("padding_free", {"max_length": None}),
    ],
)
def test_such_rows_are_refused(tmp_path: Path, setting: str, options: dict[str, Any]) -> None:
    message = rf"^{setting}=True with an activated LoRA \(alora_invocation_tokens .*Set {setting}=False"
    with pytest.raises(ValueError, match=message):
        ours(tmp_path, **{setting: True, **options})


def test_a_document_a_row_is_what_stock_trl_learns(tmp_path: Path) -> None:
    def train(trainer_class: type, config_class: type, **options: Any) -> Any:
        torch.manual_seed(0)
        return run(
            trainer_class,
            config_class,
            tmp_path,
            data=documents(),
            peft_config=adapter(alora_invocation_tokens=INVOCATION),
            options={"per_device_train_batch_size": 4, **options},
        )

    mine, gradients = train(SFTTrainer, SFTConfig, use_chronicals=True, chronicals_config={"lora_plus": "off"})
    theirs, reference = train(trl.SFTTrainer, trl.SFTConfig)
    assert mine.chronicals_report["lora"].state == "off"
    assert logged(mine, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-5)
    assert gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
