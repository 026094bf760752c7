"""Supervised fine-tuning with Hugging Face TRL, packed and fused, with the same script and the same result.

Importing this package changes nothing and imports neither torch nor trl: each public name is loaded when it is first
used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chronicals_trl._register import register
    from chronicals_trl.config import ChronicalsConfig, SFTConfig
    from chronicals_trl.model.patch import patch_model, unpatch_model
    from chronicals_trl.optim.lora_plus import split_lora_plus_groups
    from chronicals_trl.packing.bfd import pack_lengths
    from chronicals_trl.plugin import ChronicalsAccelerator, ChronicalsPlugin
    from chronicals_trl.report import ActivationReport
    from chronicals_trl.trainer import SFTTrainer

__version__ = "0.1.0"

__all__ = [
    "ActivationReport",
    "ChronicalsAccelerator",
    "ChronicalsConfig",
    "ChronicalsPlugin",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "pack_lengths",
    "patch_model",
    "register",
    "split_lora_plus_groups",
    "unpatch_model",
]

_HOME = {
    "ActivationReport": "report",
    "ChronicalsAccelerator": "plugin",
    "ChronicalsConfig": "config",
    "ChronicalsPlugin": "plugin",
    "SFTConfig": "config",
    "SFTTrainer": "trainer",
    "pack_lengths": "packing.bfd",
    "patch_model": "model.patch",
    "register": "_register",
    "split_lora_plus_groups": "optim.lora_plus",
    "unpatch_model": "model.patch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
