"""What raw loops find: Accelerate as it is when a process starts, whatever tests before them have left."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """No precision from an earlier TrainingArguments (it is in the environment), no loader left half read."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
