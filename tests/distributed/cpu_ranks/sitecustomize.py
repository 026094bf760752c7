"""Put on PYTHONPATH, it lets unchanged commands for GPUs run on CPU processes: each Python that starts imports it.

accelerate offers FSDP2 and DeepSpeed to accelerators alone: on gloo the CPUs pass for such. FSDP2 pins what it
offloads, for which torch wants an accelerator. A process that imports neither is as it was. Nobody knows that its
script has come to its end (ranks.py's `leave`): as a rank it leaves by itself.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def _accelerate_state(module: Any) -> None:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    if _sharded():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        module.PartialState._prepare_backend = lambda *args: ("gloo", module.DistributedType.MULTI_GPU)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # the launcher has said no


def _torch(module: Any) -> None:
    module.Tensor.pin_memory = lambda tensor, *args: tensor
    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit.register(_leave, module.distributed)


def _leave(distributed: Any) -> None:
    """As ranks.py's `leave`; a script that has failed ends as it would, by its exit code."""
    if hasattr(sys, "last_type"):
        return
    if distributed.is_initialized():
        distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _sharded() -> bool:
    kinds = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    return "--deepspeed" in sys.argv or any(os.environ.get(kind) == "true" for kind in kinds)


_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {"accelerate.state": _accelerate_state, "torch": _torch}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        change = _AFTER_IMPORT.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if change else None
        if spec is None or spec.loader is None or change is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
