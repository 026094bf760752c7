"""A packed run that stopped goes on as if it had not: on the same number of ranks, and on another.

The same rows in each optimizer step, the scheduler's rates, the losses and, at the end, the weights; with dropout too,
whose generators a checkpoint holds for each rank.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from start_ranks import start_ranks

pytestmark = pytest.mark.slow

Found = dict[str, dict[str, Any]]
MIDDLE = "checkpoint-3"
UNEVEN = ["ddp+epoch", "fsdp2+epoch", "ddp+epoch+lora+still", "fsdp2+epoch+lora+still"]
ALONE = ["ddp+epoch", "ddp+epoch+lora+still"]  # of one process, which they are compared with
TO_ONE = ["ddp", "ddp+balance", "ddp+lora+still", "fsdp2"]
TO_TWO = ["ddp", "ddp+balance", "fsdp2"]


def run(folder: Path, ranks: int, name: str, *runs: str) -> Found:
    output = folder / f"{name}.pt"
    start_ranks("resume_script.py", ranks, folder, output, *runs)
    found = torch.load(output)
    assert all(each["ranks"] == ranks for each in found.values())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def two(folder: Path) -> Found:
    runs = [
        f"{layout}{end}={layout}{options}{checkpoint}"
        for layout, options in (("ddp", "+balance"), ("ddp", "+balance+lora"), ("fsdp2", "+balance"))
        for end, checkpoint in ((options, ""), (f"{options} resumed", f"@{layout}{options}/{MIDDLE}"))
    ]
    whole = [f"{run}={run}" for run in ("ddp", "fsdp2", "ddp+lora+still")]
    return run(folder, 2, "two", *runs, *whole, *(f"{each}={each}" for each in UNEVEN))


@pytest.fixture(scope="module")
def one(folder: Path, two: Found) -> Found:
    resumed = [f"{name} to one={name}@{name}/{MIDDLE}" for name in TO_ONE]
    return run(
        folder,
        1,
        "one",
        "ddp of one=ddp+balance",
        "fsdp2 of one=fsdp2",
        *resumed,
        *(f"{each}={each}" for each in ALONE),
    )


@pytest.fixture(scope="module")
def two_after_one(folder: Path, one: Found) -> Found:
    resumed = [f"{name} to two={name}@{name.partition('+')[0]} of one/{MIDDLE}" for name in TO_TWO]
    # A run that changed the number of ranks once, resumed on the first number again.
    return run(folder, 2, "after", *resumed, "there and back=ddp+balance@ddp+balance to one/checkpoint-6")


@pytest.fixture(scope="module")
def four(folder: Path, two: Found) -> Found:
    return run(folder, 4, "four", f"to four=ddp+balance@ddp+balance/{MIDDLE}")


def require_same(resumed: dict[str, Any], whole: dict[str, Any], steps: tuple[int, ...] = (4, 5, 6, 7)) -> None:
    """The steps are those of the whole run, and so is what came of them; an epoch has each row once."""
    assert list(resumed["rows"]) == list(steps) and list(whole["rows"]) == [1, 2, 3, 4, 5, 6, 7]
    rows = [row for step in whole["rows"].values() for row in step]
    assert len(rows) == 54 and len(set(rows)) == 54
    for step in steps:
        assert resumed["rows"][step] == whole["rows"][step]
        assert resumed["rates"][step] == pytest.approx(whole["rates"][step], rel=1e-9)
        assert resumed["losses"][step] == pytest.approx(whole["losses"][step], rel=1e-5)
        assert resumed["norms"][step] == pytest.approx(whole["norms"][step], rel=1e-4)
    assert resumed["weights"].keys() == whole["weights"].keys()
    for name, value in whole["weights"].items():
        assert (resumed["weights"][name] - value).norm() / value.norm() < 1e-4, name


def require_same_epoch(two: dict[str, Any], one: dict[str, Any]) -> None:
    """Where one rank has a row less, and nothing to learn in its last batch, nobody waits and nothing is lost."""
    assert any("1 empty bins appended" in note for note in two["notes"])
    assert len(one["losses"]) == 5 and len({row for step in one["rows"].values() for row in step}) == 9
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, value in one["weights"].items():
        assert (two["weights"][name] - value).norm() / value.norm() < 1e-4, name


@pytest.mark.parametrize("name", ["ddp+balance", "ddp+balance+lora", "fsdp2+balance"])
def test_on_the_same_ranks(two: Found, name: str) -> None:
    require_same(two[f"{name} resumed"], two[name])


def notes_on_steps(found: dict[str, Any]) -> list[str]:
    return [note for note in found["notes"] if "each step goes on with the rows" in note or "with other rows" in note]


@pytest.mark.parametrize("name", TO_ONE)
def test_from_two_ranks_on_one(two: Found, one: Found, name: str) -> None:
    """Balanced or not; with LoRA+'s groups and their rates."""
    assert two[name]["bins"] == 56 and one[f"{name} to one"]["bins"] == 54  # filled up for two ranks alone
    require_same(one[f"{name} to one"], two[name])
    notes = notes_on_steps(one[f"{name} to one"])
    assert len(notes) == ("balance" in name) and all("from a run on 2 ranks" in note for note in notes)


@pytest.mark.parametrize("name", TO_TWO)
def test_from_one_rank_on_two(one: Found, two_after_one: Found, name: str) -> None:
    require_same(two_after_one[f"{name} to two"], one[f"{name.partition('+')[0]} of one"])


def test_there_and_back(two: Found, two_after_one: Found) -> None:
    require_same(two_after_one["there and back"], two["ddp+balance"], (7,))


def test_from_two_ranks_on_four(two: Found, four: Found) -> None:
    require_same(four["to four"], two["ddp+balance"])


@pytest.mark.parametrize("name", UNEVEN)
def test_an_odd_number_of_rows(two: Found, one: Found, name: str) -> None:
    require_same_epoch(two[name], one[name.replace("fsdp2", "ddp")])


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_zero_on_the_same_ranks(folder: Path, one: Found, layout: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    resumed = f"{layout} resumed={layout}+balance@{layout}/{MIDDLE}"
    found = run(folder, 2, layout, f"{layout}={layout}+balance", resumed, f"epoch={layout}+epoch")
    require_same(found[f"{layout} resumed"], found[layout])
    require_same_epoch(found["epoch"], one["ddp+epoch"])
