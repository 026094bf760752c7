"""Started by test_saves.py: two steps; what is saved of them patched, and of the same state unpatched.

Arguments: the folder for both saves of every cell (NAME/on, NAME/off), and cells LAYOUT+PART+WEIGHTS[+sharded].
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import layout_script
import tiny_data
import torch
import torch.distributed as dist
from accelerate.utils import save_fsdp_model
from head_script import _cpus_as_accelerators
from layout_cells import Cell
from ranks import leave

from chronicals_trl import SFTConfig, SFTTrainer, unpatch_model
from chronicals_trl.model.patch import is_patched


def settings(cell: Cell, sharded: bool, output: str) -> dict[str, Any]:
    options = layout_script.settings(cell, output) | {"max_steps": 2, "logging_strategy": "no"}
    if sharded:
        options["fsdp_config"]["state_dict_type"] = "SHARDED_STATE_DICT"
    if "deepspeed" in options:
        options["deepspeed"]["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return options


def save(folder: Path, name: str) -> None:
    layout, part, weights, *more = name.split("+")
    cell = Cell(layout, part, weights)
    with _cpus_as_accelerators(SimpleNamespace(mode=layout)):
        trainer = SFTTrainer(
            model=layout_script.build(cell), args=SFTConfig(**settings(cell, bool(more), str(folder / name))),
            train_dataset=layout_script.rows(), processing_class=tiny_data.tokenizer(),
        )  # fmt: skip
        trainer.train()
        assert is_patched(trainer.model)
        for state in ("on", "off"):
            if state == "off":
                unpatch_model(trainer.model)
                assert not is_patched(trainer.model)
            output = folder / name / state
            if more:
                plugin = trainer.accelerator.state.fsdp_plugin
                save_fsdp_model(plugin, trainer.accelerator, trainer.model, str(output))
            else:
                trainer.save_model(str(output))
        if trainer.is_deepspeed_enabled:
            trainer.deepspeed.destroy()
        trainer.accelerator.free_memory()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    for each in sys.argv[2:]:
        save(Path(sys.argv[1]), each)
        torch.distributed.barrier()
    leave()
