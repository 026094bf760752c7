"""Packed rows on two gloo processes: each row once, at equal cost, the same ones after a resume."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from start_ranks import start_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("balance") / "found.json"
    start_ranks("balance_script.py", 2, output)
    return json.loads(output.read_text())


def excess(ranks: list[list[dict[str, Any]]]) -> tuple[float, float]:
    """max / mean - 1 of the ranks' costs: by micro-step, and by step of two."""
    costs = np.array([[batch["cost"] for batch in rank] for rank in ranks], dtype=float)
    whole = costs.shape[1] // 2 * 2
    steps = costs[:, :whole].reshape(2, -1, 2).sum(2)
    return tuple(float((c.max(0) / c.mean(0) - 1).mean()) for c in (costs, steps))  # type: ignore[return-value]


def test_costs_are_level_and_every_token_comes_once(found: dict[str, Any]) -> None:
    balanced, shuffled = found["balanced"], found["only shuffled"]
    first, second = balanced["ranks"]
    assert len(first) == len(second) and len({batch["slots"] for batch in first + second}) == 1
    epoch = len(first) // 2
    for low, high in ((0, epoch), (epoch, 2 * epoch)):
        assert sum(batch["tokens"] for batch in first[low:high] + second[low:high]) == balanced["tokens_in_the_data"]
        costs = excess([first[low:high], second[low:high]])
        unbalanced = excess(shuffled["ranks"])
        assert costs[0] < 0.25 * unbalanced[0] and costs[1] < 0.25 * unbalanced[1], (costs, unbalanced)
    # A new order in the second epoch.
    assert [batch["rows"] for batch in first[:epoch]] != [batch["rows"] for batch in first[epoch:]]


def test_the_report_has_the_figures(found: dict[str, Any]) -> None:
    (note,) = found["balanced"]["notes"]
    micro_step, shuffled, step, shuffled_step = map(float, re.findall(r"\d\.\d+", note))
    epoch = len(found["balanced"]["ranks"][0]) // 2
    costs = excess([rank[:epoch] for rank in found["balanced"]["ranks"]])
    assert (micro_step - 1, step - 1) == pytest.approx(costs, abs=1e-3)
    unbalanced = excess(found["only shuffled"]["ranks"])
    assert (shuffled - 1, shuffled_step - 1) == pytest.approx(unbalanced, abs=1e-3)


@pytest.mark.parametrize("position", [0, 1])
def test_resume_gives_the_same_batches(found: dict[str, Any], position: int) -> None:
    name = [key for key in found if key.startswith("resumed")][position]
    step = int(name.split()[-1])
    for resumed, whole in zip(found[name]["ranks"], found["balanced"]["ranks"], strict=True):
        rest = [batch for batch in whole if batch["step"] >= step]
        assert rest and resumed == rest


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("only shuffled", "balance_ranks=False in the configuration"),
        ("sequential", "train_sampling_strategy='sequential' decides on the order"),
        ("own sampler", "OwnSampler overrides _get_train_sampler"),
        ("stream", "a streamed data set is dealt to the ranks as it comes"),
    ],
)
def test_what_is_not_balanced_says_why(found: dict[str, Any], case: str, reason: str) -> None:
    assert found[case]["notes"] == [f"balance: off, {reason}"]


def test_split_batches(found: dict[str, Any]) -> None:
    """Two rows a rank again, as shares of batches of four: the same rows, the same ranks."""
    epoch = len(found["balanced"]["ranks"][0]) // 2
    for split, whole in zip(found["split"]["ranks"], found["balanced"]["ranks"], strict=True):
        assert [batch["rows"] for batch in split] == [batch["rows"] for batch in whole[:epoch]]
