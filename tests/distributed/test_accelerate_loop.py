"""examples/accelerate_loop.py by the files of integrations/accelerate, on two processes: one result, on and off."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_data
import torch
from cpu_launch import FULL_PRECISION, run
from safetensors.torch import load_file
from training_runs import saved_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    saved_model(folder / "model")
    tiny_data.text(24).to_json(folder / "train.jsonl")
    return folder


def loop(folder: Path, layout: str, switch: str) -> tuple[str, dict[str, torch.Tensor]]:
    """What the loop printed and the weights that it saved; `switch` is CHRONICALS_USE_CHRONICALS."""
    output = folder / f"{layout} {switch}"
    config = ["--config_file", f"integrations/accelerate/{layout}.yaml", *FULL_PRECISION]
    arguments = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--output_dir", str(output)]
    steps = ["--max_steps", "4", "--batch_size", "2", "--learning_rate", "1e-3"]
    printed = run(
        ["-m", "accelerate.commands.launch", *config, "examples/accelerate_loop.py", *arguments, *steps],
        variables={"CHRONICALS_USE_CHRONICALS": switch},
    )
    return printed, load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def stock(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    return loop(folder, "ddp", "0")


def test_one_variable_makes_it_a_stock_loop(stock: tuple[str, dict[str, torch.Tensor]], folder: Path) -> None:
    printed, weights = stock
    assert printed.count("use_chronicals=False") >= 1 and not re.search(r"rms_norm\W+on\b", printed)
    before = load_file(folder / "model" / "model.safetensors")
    assert all(not torch.equal(before[name], value) for name, value in weights.items())


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_processes(stock: tuple[str, dict[str, torch.Tensor]], folder: Path, layout: str) -> None:
    printed, weights = loop(folder, layout, "1")
    # One table and one line: the processes know of each other.
    assert len(re.findall(r"rms_norm\W+on\b", printed)) == len(re.findall("step 4: loss", printed)) == 1
    assert _loss(printed) == pytest.approx(_loss(stock[0]), rel=1e-4)
    assert weights.keys() == stock[1].keys()
    loaded = AutoModelForCausalLM.from_pretrained(folder / f"{layout} 1").state_dict()
    for name, value in stock[1].items():
        assert (weights[name] - value).norm() / value.norm() < 1e-4, name
        assert torch.equal(loaded[name], weights[name])


def _loss(printed: str) -> float:
    found = re.search(r"step 4: loss ([\d.]+)", printed)
    assert found is not None, printed
    return float(found.group(1))
