"""The `CHRONICALS_*` environment variables by name. No imports beyond the standard library: the runner looks at them
before the script, which may set variables that torch and trl read when they are imported.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

ENV_PREFIX = "CHRONICALS_"
ENV_FLAG = ENV_PREFIX + "USE_CHRONICALS"

# The fields of config.ChronicalsConfig, in its order; a test holds the two together.
FIELDS = (
    "rms_norm", "gated_mlp", "qk_rope", "attention", "head", "packing", "lora", "lora_plus", "adamw", "cuda_graphs",
    "recompute", "strict", "recompute_mlp", "attention_backend", "logit_budget_mib", "packing_window", "profile_steps",
    "balance_ranks", "padding_free", "health", "lora_plus_ratio", "lora_plus_embedding_lr",
)  # fmt: skip


def check_environment(environ: Mapping[str, str] | None = None) -> None:
    """Raise ValueError for a `CHRONICALS_*` variable that names no setting, whether the flag is on or off.

    Args:
        environ: the environment to look at; None for the process's own.
    """
    allowed = [ENV_PREFIX + name.upper() for name in FIELDS]
    for variable, text in (os.environ if environ is None else environ).items():
        if not variable.startswith(ENV_PREFIX) or variable == ENV_FLAG:
            continue
        if variable[len(ENV_PREFIX) :].lower() not in FIELDS:
            near = difflib.get_close_matches(variable, [*allowed, ENV_FLAG], n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Environment variable {variable!r} (value {text!r}) names no setting.{hint} Unset it, or use one of: "
                f"{', '.join([*allowed, ENV_FLAG])}."
            )
