"""Fused LoRA on two gloo processes: one process's gradients in each layout of shards, and what is apart is named."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from start_ranks import start_ranks

pytestmark = pytest.mark.slow

JOINED = {"lora_linears": 2, "lora_gated_mlp": 2, "lora_linear": 2}  # q, k and v; the MLP; o_proj: in two layers
ONE_BY_ONE = "4 attention blocks and MLPs call their projections one by one, since these have hooks"
HOOKS = "hooks on the linears inside"


def run(folder: Path, kind: str) -> dict[str, Any]:
    output = folder / "found.json"
    start_ranks("lora_shards_script.py", 2, output, kind)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("fsdp2"), "fsdp2")


def require_exact(row: dict[str, Any], fused: bool = True) -> None:
    """One process's gradients: to rounding of the very ops that ran, and those that PEFT's ops give."""
    assert row["errors"]["patched" if fused else "stock"] < 1e-6, row
    assert max(row["errors"].values()) < 1e-5, row


@pytest.mark.parametrize("units", ["decoder layers", "attention and MLP"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_units_that_hold_whole_blocks(fsdp2: dict[str, Any], units: str, checkpointing: bool) -> None:
    row = fsdp2[units + ", checkpointing" * checkpointing]
    require_exact(row)
    assert row["nodes"] == {name: count * (1 + checkpointing) for name, count in JOINED.items()}
    assert row["news"] == [] and row["lora"]["state"] == "on"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_lora_layer_a_unit(fsdp2: dict[str, Any], checkpointing: bool) -> None:
    """Its own call gathers all that its node reads; the blocks around it have to make that call."""
    row = fsdp2["LoRA layers" + ", checkpointing" * checkpointing]
    require_exact(row)
    assert row["nodes"] == {"lora_linear": 14 * (1 + checkpointing)}
    assert row["news"] == [ONE_BY_ONE] and row["lora"]["state"] == "on"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_and_b_units_of_their_own(fsdp2: dict[str, Any], checkpointing: bool) -> None:
    row = fsdp2["A and B" + ", checkpointing" * checkpointing]
    require_exact(row, fused=False)
    require_off(row)


def test_zero3(tmp_path: Path) -> None:
    """A parameter is empty outside of its module's own call: nothing may read it there."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    row = run(tmp_path, "zero3")["zero3"]
    require_exact(row, fused=False)
    require_off(row)


def require_off(row: dict[str, Any]) -> None:
    assert row["nodes"] == {}
    assert row["lora"]["state"] == "off" and row["lora"]["modules"] == 0 and HOOKS in row["lora"]["reason"]
    assert HOOKS in row["news"][0] and row["news"][1] == ONE_BY_ONE and ONE_BY_ONE in row["notes"]
