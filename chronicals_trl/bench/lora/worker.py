"""Unsloth's side of one layer, in a process of its own:

    python -m chronicals_trl.bench.lora.worker TASK.json RESULT.json

The task has the layer's name and folder, and the cases with their inputs, adapters and fp64 gradients in files. What
is found is written after each case, so that a crash in one costs that one and those after it.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

_VERSIONS = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "unsloth",
    "unsloth_zoo",
    "xformers",
    "flash-attn",
)


def main(arguments: Sequence[str]) -> int:
    """`arguments`: the task's file and the result's."""
    given, result = map(Path, arguments)
    task: dict[str, Any] = json.loads(given.read_text())
    found: dict[str, Any] = {"cases": {}}

    def keep() -> None:
        # Written beside and moved: a reader never finds half a file.
        beside = result.with_suffix(".part")
        beside.write_text(json.dumps(found))
        beside.replace(result)

    for case in task["cases"]:
        found["cases"][case["setting"]] = _case(task, case)
        keep()
    from chronicals_trl.bench.common import versions
    from chronicals_trl.bench.sft.models import gemm_tflops

    found |= {"versions": versions(*_VERSIONS), "gemm_tflops": gemm_tflops()}
    keep()
    return 0


def _case(task: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Status, reason and figures of one setting."""
    from chronicals_trl.bench.common import explain
    from chronicals_trl.bench.lora import measure as lora_measure

    try:
        return _measured(task, case)
    except Exception as error:
        traceback.print_exc()
        status, reason = explain(_cause(error))
        return {"status": status, "reason": reason}
    finally:
        lora_measure.release()


def _measured(task: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    import torch

    from chronicals_trl.bench.lora import cases as lora
    from chronicals_trl.bench.lora import measure as lora_measure
    from chronicals_trl.bench.lora import sides as lora_sides
    from chronicals_trl.bench.lora.layer import Inputs, Pass, make_inputs

    layer = {**lora.LAYERS, lora.TINY.name: lora.TINY}[task["layer"]]
    setting = lora.SETTINGS[case["setting"]]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = torch.load(case["tensors"], map_location=device, weights_only=True)
    runner = lora_sides.unsloth(Path(task["folder"]), layer, setting, tensors["adapters"])
    checked = Inputs(tensors["x"], tensors["grad"])
    figures: dict[str, Any] = lora_measure.check(runner, checked, tensors["exact"], case["peft_errors"], setting)
    if figures["status"] == "ok":
        side = lora_measure.Measured(Pass(runner, make_inputs(layer, layer.tokens, layer.row, device)))
        lora_measure.time_by_turns([side], lora_measure.queue_of(device), task["rounds"], task["samples"])
        figures |= side.figures()
    return figures


def _cause(error: Exception) -> Exception:
    """What `error` was raised from: a lazy import wraps what is missing in words that do not name it."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
