"""Two processes on gloo against one on the joined batch: same losses, same gradients, every token once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from start_ranks import start_ranks

pytestmark = pytest.mark.slow


def _run(output: Path, processes: int) -> dict[str, Any]:
    """The figures of ddp_script.py on so many ranks, case by case."""
    output.mkdir()
    start_ranks("ddp_script.py", processes, output)
    figures = json.loads((output / "figures.json").read_text())
    for name, steps in torch.load(output / "gradients.pt").items():
        figures[name]["gradients"] = steps
    return figures


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same cases on two ranks and on one."""
    folder = tmp_path_factory.mktemp("ranks")
    return _run(folder / "two", 2), _run(folder / "one", 1)


@pytest.mark.parametrize("case", ["llama", "tied", "experts", "experts, head off"])
def test_two_ranks_equal_one_process(ranks: tuple[dict[str, Any], dict[str, Any]], case: str) -> None:
    two, one = (figures[case] for figures in ranks)
    # An odd number of rows: the second rank's last one is empty, and nothing is trained on twice.
    assert any("packing train" in note and "1 empty bins appended" in note for note in two["report"]["notes"])
    for figures, held in ((two, "2 rows of 96 tokens, about 7.2 documents, on 2 processes; 3 steps an epoch, 9"),
                          (one, "2 rows")):  # fmt: skip
        (line,) = (note for note in figures["report"]["notes"] if note.startswith("a step: "))
        assert line.startswith(f"a step: {held}"), line
    assert two["real_tokens_of_all_ranks"] == one["real_tokens_of_all_ranks"] == two["tokens_in_the_data"]
    assert len(two["log"]) == len(one["log"]) == 3
    assert two["finite"] and one["finite"]
    metrics = ["entropy", "mean_token_accuracy"] if case in ("llama", "tied") else []
    # Of a weight that embedding and head share there is one gradient, of which DDP hears once.
    assert two["lookups_with_one_gradient"] == one["lookups_with_one_gradient"] == (3 if case == "tied" else 0)
    if case == "experts":
        # The mean over the micro-batches that have tokens, as one process accumulates it; an empty one has no part.
        metrics = ["aux_loss"]
        assert min(entry["aux_loss"] for entry in two["log"]) > 1
    for key in ("loss", "grad_norm", "num_tokens", *metrics):
        assert [e[key] for e in two["log"]] == pytest.approx([e[key] for e in one["log"]], rel=1e-5), key
    for ours, reference in zip(two["gradients"], one["gradients"], strict=True):
        assert ours.keys() == reference.keys()
        for name, gradient in reference.items():
            assert (ours[name] - gradient).norm() / gradient.norm() < 1e-4, name
    assert two["report"]["parts"] == one["report"]["parts"]
    said = any("of a rank whose rows are all empty" in note for note in two["report"]["notes"])
    assert said == (case == "experts, head off")


def test_steps_are_counted_as_trainer_does(ranks: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for figures in ranks:
        for case in figures["step counts"]:
            assert case["report"] == case["Trainer"]
    two, one = (figures["step counts"] for figures in ranks)
    assert [case["report"] for case in two] == [[2, 5], [2, 4], [3, 9]]
    assert one[0]["report"] == [3, 9]


def test_entries_that_are_written_late_are_of_all_ranks(ranks: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for figures in ranks:
        late, at_once = figures["late"], figures["at once"]
        assert late["late"] == [1, 2] and at_once["late"] == []  # the last one ends the run
        for name in ("tokens_per_second", "peak_memory_gib"):  # of a clock, and of the process
            assert all(entry.pop(name) > 0 for entry in late["log"] + at_once["log"])
        assert late["log"] == at_once["log"] and len(late["log"]) == 3
        assert late["loss"] == at_once["loss"] and late["flos"] == at_once["flos"] > 0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_on_ranks(ranks: tuple[dict[str, Any], dict[str, Any]], batch_size: int) -> None:
    """The loss is the one with the flag off on the same rows, and the one of a single process."""
    two, one = (figures[f"eval {batch_size}"] for figures in ranks)
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert two["on"][key] == pytest.approx(two["off"][key], rel=1e-5), key
        assert one["on"][key] == pytest.approx(one["off"][key], rel=1e-5), key
    # In a batch that Accelerate fills up with rows from the start, those take part in the batch's mean.
    assert two["on"]["eval_loss"] == pytest.approx(one["on"]["eval_loss"], rel=1e-5 if batch_size == 1 else 0.01)


def test_a_part_that_is_off_on_one_rank_is_off_on_all(ranks: tuple[dict[str, Any], dict[str, Any]]) -> None:
    two, one = ({part["name"]: part for part in figures["apart"]["parts"]} for figures in ranks)
    assert one["rms_norm"]["state"] == "on"
    assert (two["rms_norm"]["state"], two["rms_norm"]["reason"]) == ("off", "off on another rank")
    assert two["gated_mlp"]["state"] == "on"
