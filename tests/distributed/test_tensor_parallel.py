"""A model whose layers two ranks share: what is on trains as one process does, and the rest is off with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from start_ranks import start_ranks

pytestmark = pytest.mark.slow

MODEL_PARTS = ("rms_norm", "gated_mlp", "qk_rope", "attention", "head", "lora")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """[ranks][case]; one rank has the model to itself."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for ranks in (1, 2):
        start_ranks("tensor_parallel_script.py", ranks, folder)
    return {ranks: torch.load(folder / f"of{ranks}.pt") for ranks in (1, 2)}


@pytest.mark.parametrize("case", ["packed", "padded", "flag off"])
def test_trains_as_one_process_does(found: dict[int, dict[str, Any]], case: str) -> None:
    shared, alone = found[2][case], found[1][case]
    assert len(shared["losses"]) == 4 and shared["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name, weight in alone["weights"].items():
        assert (shared["weights"][name] - weight).norm() / weight.norm() < 1e-4, name
    assert (alone["parts"]["head"]["state"] == "on") == (case != "flag off")


@pytest.mark.parametrize("case", ["packed", "padded"])
def test_tokens_of_a_shared_batch_count_once(found: dict[int, dict[str, Any]], case: str) -> None:
    assert found[2][case]["num_tokens"] == found[1][case]["num_tokens"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("packed", "tp_size > 1: not verified"),
        ("padded", "tp_size > 1: not verified"),
        ("plugin", "tp_size > 1: not verified"),
        ("patch_model", "the model's layers are cut over ranks (tensor parallelism)"),
    ],
)
def test_what_needs_whole_layers_is_off_and_says_why(found: dict[int, dict[str, Any]], case: str, reason: str) -> None:
    parts = found[2][case]["parts"]
    for name in MODEL_PARTS:
        assert parts[name]["state"] == "off" and parts[name]["reason"].startswith(reason), name
        if name != "lora":
            assert found[1][case]["parts"][name]["state"] == "on"
    assert (parts["packing"]["state"] == "on") == (case == "packed")


def test_patching_leaves_a_shared_model_right(found: dict[int, dict[str, Any]]) -> None:
    for ranks in (1, 2):
        one = found[ranks]["patch_model"]
        assert one["after"] == pytest.approx(one["before"], rel=1e-5)
    assert found[2]["patch_model"]["before"] == pytest.approx(found[1]["patch_model"]["before"], rel=1e-5)
