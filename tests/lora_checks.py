"""What tests of fused LoRA over quantised layers share, on CPUs and on a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from chronicals_trl.model import lora, lora_state, match, rope


def count_nodes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of q/k/v's node, the MLP's, and of single layers, by the op's name."""
    counts: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(rope, "lora_linears")
    count(match, "lora_gated_mlp")
    count(lora, "lora_linear")
    return counts


def break_eight_bit(monkeypatch: pytest.MonkeyPatch, what: str) -> str:
    """Operands of 8-bit layers that are wrong in `scales`, or in `forward`; what the probe has to say of them."""
    original = lora_state._stored_in_8bit

    def wrong(base: Any, x: Any) -> Any:
        stored = original(base, x)
        if what == "scales":
            return stored._replace(unpack=lambda weight: stored.unpack(weight) * 1.01)
        return stored._replace(call=None)  # the dequantised product

    monkeypatch.setattr(lora_state, "_stored_in_8bit", wrong)
    return f"probe: {({'scales': 'gradient of x', 'forward': 'output'})[what]} differs from PEFT's"
