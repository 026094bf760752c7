"""LoRA+ on two gloo processes under DDP, FSDP2 and ZeRO: the weights and the rates of one process, resumed or not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from start_ranks import start_ranks

pytestmark = pytest.mark.slow

Results = dict[str, dict[str, Any]]


def run(folder: Path, processes: int, *modes: str) -> Results:
    output = folder / f"{modes[0]}.pt"
    start_ranks("lora_plus_script.py", processes, output, *modes, timeout=400)
    return torch.load(output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora_plus")


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    found = run(folder, 1, "one")["one"]
    assert "error" not in found and found["whole"]["state"] == "off"
    return found["whole"]


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Results:
    return run(folder, 2, "ddp", "fsdp2")


@pytest.fixture(scope="module")
def zero(folder: Path) -> Results:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    return run(folder, 2, "zero1", "zero2", "zero3")


def require_same(found: dict[str, Any], reference: dict[str, Any]) -> None:
    assert "error" not in found, found
    for part in ("whole", "resumed"):
        mine = found[part]
        assert mine["state"] == "on"
        assert mine["losses"] == pytest.approx(reference["losses"], rel=1e-4), part
        rates = mine["rates"]
        assert rates["learning_rate"] == pytest.approx(reference["rates"]["learning_rate"])
        assert rates["learning_rate_lora_b"] == pytest.approx([8 * rate for rate in rates["learning_rate"]])
        assert rates["learning_rate_lora_embedding"] == pytest.approx([3 * rate for rate in rates["learning_rate"]])
        assert mine["weights"].keys() == reference["weights"].keys()
        for name, value in reference["weights"].items():
            assert (mine["weights"][name] - value).norm() / value.norm() < 1e-6, (part, name)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_ranks(two_ranks: Results, reference: dict[str, Any], mode: str) -> None:
    require_same(two_ranks[mode], reference)
    assert two_ranks[mode]["whole"]["fused"] == "on"  # q_proj and v_proj; accelerate's units hold whole layers


@pytest.mark.parametrize("mode", ["zero1", "zero2", "zero3"])
def test_zero(zero: Results, reference: dict[str, Any], mode: str) -> None:
    require_same(zero[mode], reference)
    assert zero[mode]["whole"]["fused"] == ("off" if mode == "zero3" else "on")  # see test_lora_shards.py
