"""Ranks that were started in different ways: an error on every rank before the first step, and nobody waits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from start_ranks import start_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """[rank][case]"""
    folder = tmp_path_factory.mktemp("agreement")
    start_ranks("agreement_script.py", 2, folder)
    return [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("configuration", ["chronicals_config: head is 'auto' on rank 0 and 'off' on rank 1"]),
        (
            "environment",
            ["logit_budget_mib is None on rank 0 and 64 on rank 1", "CHRONICALS_LOGIT_BUDGET_MIB=64 on rank 1"],
        ),
        ("flag", ["use_chronicals is True on rank 0 and False on rank 1"]),
        ("argument", ["argument max_length is 96 on rank 0 and 64 on rank 1"]),
        ("package", ["version of datasets is", "on rank 0 and not installed on rank 1"]),
        ("number of rows", ["`train_dataset` is not the same on all ranks. Rank 0: 24 rows. Rank 1: 23 rows."]),
        ("order of rows", ["`train_dataset` is not the same on all ranks. Ranks 0 and 1 have 24 rows and other"]),
        ("model", ["the model is a LlamaForCausalLM of 21 tensors", "on rank 0 and a LlamaForCausalLM of 12 tensors"]),
        ("plugin", ["chronicals_config: head is 'auto' on rank 0 and 'off' on rank 1"]),
    ],
)
def test_every_rank_names_what_differs(said: list[dict[str, Any]], case: str, words: list[str]) -> None:
    assert said[0][case] == said[1][case]
    assert said[0][case].startswith("ValueError: ")
    assert all(each in said[0][case] for each in words), said[0][case]


@pytest.mark.parametrize(
    ("case", "words"), [("bad data on one", "has no text"), ("bad weights on one", "hold NaN or infinity")]
)
def test_an_error_of_one_rank_is_one_on_all(said: list[dict[str, Any]], case: str, words: str) -> None:
    assert said[1][case].startswith("ValueError: ") and words in said[1][case]
    assert said[0][case].startswith("RuntimeError: Rank 1 cannot start, so none does.") and words in said[0][case]


def test_the_plugins_parts_are_the_same_on_all_ranks(said: list[dict[str, Any]]) -> None:
    for rank, reason in ((0, "off on another rank"), (1, "off on another rank")):
        parts = {part["name"]: part for part in said[rank]["plugin, a part missing"]}
        assert parts["rms_norm"]["state"] == "off" and parts["rms_norm"]["reason"] == reason
        assert parts["gated_mlp"]["state"] == "on"


def test_ranks_that_were_started_alike_train(said: list[dict[str, Any]]) -> None:
    assert said[0]["alike"] == said[1]["alike"] == 1
