"""FSDP2 on two gloo processes: joined blocks read weights that FSDP2 has gathered for their layer, and no others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from start_ranks import start_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("fsdp2") / "found.json"
    start_ranks("fsdp_script.py", 2, output)
    return json.loads(output.read_text())


def test_gradients_of_sharded_models(found: dict[str, Any]) -> None:
    assert len(found["gradients"]) == 8
    assert all(error < 1e-5 for error in found["gradients"].values()), found


def test_checkpointing_gathers_nothing_more(found: dict[str, Any]) -> None:
    """As docs/multi-gpu.md says."""
    moved = found["traffic"]
    assert moved["True"] == moved["False"]
    # Twice, but for what the forward pass ends with and the backward pass begins with.
    assert 1.5 < moved["True"]["gathered"] < 2 and moved["True"]["scattered"] == 1
