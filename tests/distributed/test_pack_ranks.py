"""Two processes pack one data set: one of them plans, both have the same rows, and an error is one on both."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pack_script
import pytest
from datasets import load_from_disk
from start_ranks import start_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    pack_script.save(folder)
    start_ranks("pack_script.py", 2, folder)
    figures = [json.loads((folder / f"figures{rank}.json").read_text()) for rank in range(2)]
    figures[0]["source"] = load_from_disk(str(folder / "data"))["input_ids"][:]
    return figures


def test_main_process_plans_and_the_other_reads(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["planned"] == [0] and ranks[1]["planned"] == []
    assert ranks[0]["rows"] == ranks[1]["rows"] and ranks[0]["file"] == ranks[1]["file"]


def test_a_stream_is_shared_out(ranks: list[dict[str, Any]]) -> None:
    tokens = [Counter(token for batch in rank["stream"] for token in batch) for rank in ranks]
    assert all(tokens)
    assert tokens[0] + tokens[1] == Counter(token for ids in ranks[0]["source"] for token in ids)


def test_different_data_is_an_error_on_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "not the same on all ranks" in rank["other data"] and "Rank 1: 31 documents" in rank["other data"]


def test_another_order_is_an_error_on_both(ranks: list[dict[str, Any]]) -> None:
    """A shuffle without a seed: the same figures on all ranks, and rows of which some would be trained on twice."""
    for rank in ranks:
        assert "Ranks 0 and 1 have the same figures" in rank["other order"]


def test_a_cache_that_cannot_be_written_is_an_error_on_both(ranks: list[dict[str, Any]]) -> None:
    """The main process's error does not leave the other one waiting."""
    for rank in ranks:
        assert "Cannot write the packed data set" in rank["no room"]
