"""Started by test_agreement.py: what each rank says when the last one was started in another way."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import tiny_data
import tiny_models
import torch
import torch.distributed as dist
from accelerate import Accelerator
from ranks import leave

from chronicals_trl import ChronicalsPlugin, SFTConfig, SFTTrainer, _agreement
from chronicals_trl.model import patch

RANK = int(os.environ["RANK"])
ODD = RANK == int(os.environ["WORLD_SIZE"]) - 1
FOLDER = Path(sys.argv[1])


def trainer(**options: Any) -> SFTTrainer:
    """Of a model, data and settings that are the same on all ranks, but for `options`."""
    data = options.pop("data", tiny_data.tokenized(24))
    model = options.pop("model", None) or tiny_models.build("llama")
    settings: dict[str, Any] = {
        "output_dir": str(FOLDER / "out"), "use_chronicals": True, "max_length": 96, "max_steps": 1, "bf16": False,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False,
        "disable_tqdm": True, "per_device_train_batch_size": 2,
    }  # fmt: skip
    return SFTTrainer(
        model=model,
        args=SFTConfig(**{**settings, **options}),
        train_dataset=data,
        processing_class=tiny_data.tokenizer(),
    )


def prepare(config: dict[str, Any]) -> ChronicalsPlugin:
    plugin = ChronicalsPlugin(config)
    accelerator = plugin.attach(Accelerator(cpu=True))
    accelerator.prepare(tiny_models.build("llama"))
    return plugin


def without(package: str) -> Any:
    installed = _agreement.installed
    return mock.patch.object(_agreement, "installed", lambda name: None if name == package else installed(name))


def not_a_number() -> Any:
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan") if ODD else 0.0
    return model


def odd(value: Any, other: Any) -> Any:
    return value if ODD else other


def no_norms() -> Any:
    kinds = dict(patch._BLOCKS)
    kinds["rms_norm"] = (lambda module: False, *kinds["rms_norm"][1:])
    return mock.patch.dict(patch._BLOCKS, kinds if ODD else {})


def start_with_package_missing() -> Any:
    with without(odd("datasets", "none of that name")):
        return trainer()


def start_with_environment(**variables: str) -> Any:
    with mock.patch.dict(os.environ, variables if ODD else {}):
        return trainer(chronicals_config={"recompute_mlp": False})


def prepare_with_a_part_missing() -> Any:
    with no_norms():
        return [part.to_dict() for part in prepare({}).reports[0].parts]


def train() -> Any:
    """Alike: a variable on one rank that the configuration overrules makes no difference."""
    made = start_with_environment(CHRONICALS_RECOMPUTE_MLP="false")
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry] or made.state.global_step


CASES: dict[str, Callable[[], Any]] = {
    "configuration": lambda: trainer(chronicals_config=odd({"head": "off"}, {})),
    "environment": lambda: start_with_environment(CHRONICALS_LOGIT_BUDGET_MIB="64"),
    "flag": lambda: trainer(use_chronicals=not ODD),
    "argument": lambda: trainer(packing=True, max_length=odd(64, 96)),
    "package": start_with_package_missing,
    "number of rows": lambda: trainer(data=tiny_data.tokenized(24).select(range(odd(23, 24)))),
    "order of rows": lambda: trainer(data=tiny_data.tokenized(24).shuffle(seed=RANK)),
    "model": lambda: trainer(model=tiny_models.build("llama", num_hidden_layers=odd(1, 2))),
    "bad data on one": lambda: trainer(data=odd(datasets.Dataset.from_dict({"n": [1]}), tiny_data.tokenized(24))),
    "bad weights on one": lambda: trainer(model=not_a_number()),
    "plugin": lambda: prepare(odd({"head": "off"}, {})),
    "plugin, a part missing": prepare_with_a_part_missing,
    "alike": train,
}


def say(case: Callable[[], Any]) -> Any:
    try:
        found = case()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return found if isinstance(found, (list, float, int)) else "started"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    (FOLDER / f"said{RANK}.json").write_text(json.dumps({name: say(case) for name, case in CASES.items()}))
    leave()
