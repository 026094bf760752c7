"""Graphs under DDP: the gradients of eager code on two ranks, with the backward pass in one graph and cut in two."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from start_ranks import start_ranks

from chronicals_trl.model.trainer import BUCKET_MB

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("graphs")
    start_ranks("graphs_script.py", 2, output)
    found = json.loads((output / "figures.json").read_text())
    for name, steps in torch.load(output / "gradients.pt").items():
        found[name]["gradients"] = steps
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("segments", [1, 2])
def test_gradients_are_those_of_eager_code(figures: dict[str, Any], segments: int, accumulation: int) -> None:
    eager, ours = figures[f"off, 0, {accumulation}"], figures[f"auto, {segments}, {accumulation}"]
    assert eager["recorded"] == 0 and ours["recorded"] == 1 + segments
    assert ours["replayed"] >= 2 * (1 + segments)
    assert ours["losses"] == pytest.approx(eager["losses"], rel=1e-6)
    assert len(ours["gradients"]) == len(eager["gradients"]) == 6
    for step, reference in zip(ours["gradients"], eager["gradients"], strict=True):
        assert step.keys() == reference.keys()
        for name, gradient in reference.items():
            assert (step[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_gradients_lie_in_the_buckets_that_are_sent(figures: dict[str, Any]) -> None:
    assert all(case["views"] for case in figures.values())


def test_buckets_are_larger_where_graphs_fill_them(figures: dict[str, Any]) -> None:
    sizes = {name: case["bucket_mib"] for name, case in figures.items()}
    assert sizes.pop("the user's buckets") == 7
    assert sizes == {name: 25 if name.startswith("off") else BUCKET_MB for name in sizes}
