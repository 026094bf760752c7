"""One side in a process of its own: `python -m chronicals_trl.bench.sft.worker train TASK.json RESULT.json`.

In place of `train`, `prepare` writes the model's folder and measures the GPU's rate of matrix products, and `floor`
measures what the task's step takes at least. Importing this module imports no trainer: a peer may need another TRL
than ours.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

_VERSIONS = (
    "torch", "triton", "transformers", "trl", "accelerate", "peft", "datasets", "bitsandbytes", "liger-kernel",
    "unsloth", "unsloth_zoo", "xformers", "flash-attn", "flash-attn-4",
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """What is asked for goes to the last argument's file, as does why it failed."""
    what, given, result = arguments
    work: Callable[[dict[str, Any]], dict[str, Any]] = {
        "train": _train, "prepare": _prepare, "floor": _floor,
    }[what]  # fmt: skip
    try:
        found = {"status": "ok", "reason": None, **work(json.loads(Path(given).read_text()))}
    except Exception as error:
        traceback.print_exc()
        from chronicals_trl.bench.common import explain

        status, reason = explain(_cause(error))
        found = {"status": status, "reason": reason}
    Path(result).write_text(json.dumps(_strict({**found, "versions": _versions()})))
    return 0


def _train(given: dict[str, Any]) -> dict[str, Any]:
    from chronicals_trl.bench.sft import meter as sft_meter
    from chronicals_trl.bench.sft import sides as sft_sides
    from chronicals_trl.bench.sft.cases import Task

    task = Task(**given)
    meter = sft_meter.Meter(task)
    ran = sft_sides.train(task, meter)
    return {**meter.result(), **ran}


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    import torch

    from chronicals_trl.bench.sft import models as sft_models
    from chronicals_trl.bench.sft.cases import SHAPES

    sft_models.write_model(SHAPES[given["shape"]], given["seed"], Path(given["folder"]))
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"gpu": gpu, "gemm_tflops": sft_models.gemm_tflops()}


def _floor(given: dict[str, Any]) -> dict[str, Any]:
    from chronicals_trl.bench.sft import floor as sft_floor
    from chronicals_trl.bench.sft.cases import Task

    return sft_floor.measure(Task(**given))


def _cause(error: Exception) -> Exception:
    """A lazy import wraps what is missing in words that do not name it: what a failed import was raised from."""
    while isinstance(error, ImportError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _versions() -> dict[str, str | None]:
    from chronicals_trl.bench.common import versions

    return versions(*_VERSIONS)


def _strict(value: Any) -> Any:
    """JSON has no NaN: a loss that is none goes as a word, which is no number to whoever reads it."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
