"""Every file of integrations/: launched on CPU processes, equal to one process, and read by its own loader."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from training_runs import saved_model
from transformers import AutoModelForCausalLM

from chronicals_trl import SFTConfig

TESTS = Path(__file__).parents[1]
FOLDER = TESTS.parent / "integrations"
ACCELERATE = ("single_gpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload")
JSONS = ("zero1", "zero2", "zero3", "zero3_offload")
OFFLOADS = ["offload_optimizer", "offload_param"]


def test_the_list_is_the_folder() -> None:
    assert {path.stem for path in (FOLDER / "accelerate").iterdir()} == set(ACCELERATE)
    assert {path.stem for path in (FOLDER / "deepspeed").iterdir()} == set(JSONS)
    assert {path.stem for path in (FOLDER / "trl").iterdir()} == {"full", "lora", "qlora"}


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_knows_every_key(name: str) -> None:
    """Its loader refuses unknown keys at the top; those of a section become arguments of the launcher."""
    path = FOLDER / "accelerate" / f"{name}.yaml"
    load_config_from_file(str(path))
    known = {action.dest for action in launch_command_parser()._actions}
    content = yaml.safe_load(path.read_text())
    for section in ("deepspeed_config", "fsdp_config"):
        assert set(content.get(section, {})) <= known
    assert content["mixed_precision"] == "bf16"


@pytest.mark.parametrize("name", JSONS)
def test_deepspeed_json(name: str) -> None:
    """No optimizer and no scheduler of its own, with which LoRA+ would lose its rates; the rest follows SFTConfig."""
    content = json.loads((FOLDER / "deepspeed" / f"{name}.json").read_text())
    assert not {"optimizer", "scheduler"} & set(content)
    follow = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    assert {content[key] for key in follow} == {"auto"}
    assert content["zero_optimization"]["stage"] == int(name[4])


@pytest.mark.parametrize("name", ["full", "lora", "qlora"])
def test_trl_yaml(name: str) -> None:
    parser = trl.TrlParser((trl.ScriptArguments, SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig))
    path = FOLDER / "trl" / f"{name}.yaml"
    script, training, model, _ = parser.parse_args_and_config(
        ["--config", str(path), "--dataset_name", "data", "--use_cpu", "True"], fail_with_unknown_args=True
    )
    assert (
        training.use_chronicals is True and training.packing is True and training.ddp_find_unused_parameters is False
    )
    assert (model.use_peft, model.load_in_4bit) == {
        "full": (False, False), "lora": (True, False), "qlora": (True, True)
    }[name]  # fmt: skip
    assert (script.dataset_name, training.max_length) == ("data", 4096)
    if name != "full":
        assert training.chronicals_config == {"lora_plus_ratio": 16.0}
        assert trl.get_peft_config(model).target_modules == "all-linear"
    if name == "qlora":
        # FSDP2 shards the packed weights only where they are stored in the dtype of all others.
        assert model.bnb_4bit_quant_storage == model.dtype == "bfloat16"


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"))


def launch(model: Path, output: Path, launcher: list[str], *arguments: str) -> dict[str, Any]:
    script = TESTS / "distributed" / "integration_script.py"
    command = [sys.executable, "-m", *launcher, str(script), str(model), str(output), *arguments]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((output / "found.json").read_text())


def accelerate(model: Path, output: Path, name: str) -> dict[str, Any]:
    file = FOLDER / "accelerate" / f"{name}.yaml"
    # In full precision: without use_cpu, with which the layouts are off, transformers refuses bf16 on a CPU.
    options = ["--config_file", str(file), "--mixed_precision", "no", "--main_process_port", "0"]
    return launch(model, output, ["accelerate.commands.launch", *options])


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of one process, by the file for one GPU."""
    output = tmp_path_factory.mktemp("one")
    found = accelerate(model, output, "single_gpu")
    return {**found, "weights": load_file(output / "model.safetensors")}


def require_same(found: dict[str, Any], output: Path, one: dict[str, Any]) -> None:
    """The losses of one process, and weights that stock transformers reads, under the names of an unpatched model."""
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert found["parts"]["head"] == "on"
    weights = load_file(output / "model.safetensors")
    assert weights.keys() == one["weights"].keys()
    loaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
    for name, value in one["weights"].items():
        assert torch.equal(loaded[name], weights[name])
        assert (weights[name] - value).norm() / value.norm() < 1e-4, name


def needs_deepspeed(name: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    if name.endswith("offload"):
        from deepspeed.ops.op_builder import CPUAdamBuilder

        if not CPUAdamBuilder().is_compatible():
            pytest.skip("DeepSpeed cannot compile its CPU Adam here")


@pytest.mark.slow
def test_one_process(one: dict[str, Any], model: Path) -> None:
    assert (one["type"], one["ranks"]) == ("DistributedType.NO", 1) and one["parts"]["head"] == "on"
    before = load_file(model / "model.safetensors")
    assert all(not torch.equal(before[name], value) for name, value in one["weights"].items())


@pytest.mark.slow
def test_ddp(model: Path, one: dict[str, Any], tmp_path: Path) -> None:
    found = accelerate(model, tmp_path, "ddp")
    assert (found["type"], found["ranks"]) == ("DistributedType.MULTI_CPU", 2)
    require_same(found, tmp_path, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_offload"])
def test_fsdp2(model: Path, one: dict[str, Any], tmp_path: Path, name: str) -> None:
    found = accelerate(model, tmp_path, name)
    assert (found["type"], found["ranks"], found["version"]) == ("DistributedType.FSDP", 2, 2)
    assert found["sharded"] and found["reshard"] is True and found["offload"] is name.endswith("offload")
    require_same(found, tmp_path, one)


def require_zero(found: dict[str, Any], name: str) -> None:
    assert (found["type"], found["ranks"]) == ("DistributedType.DEEPSPEED", 2)
    assert (found["stage"], found["accumulation"], found["clipping"]) == (int(name[4]), 2, 0.7)
    assert found["offloads"] == OFFLOADS * name.endswith("offload")
    assert (found["optimizer"] == "DeepSpeedCPUAdam") is name.endswith("offload")


@pytest.mark.slow
@pytest.mark.timeout(600)  # the CPU Adam is compiled once on a machine: 2 minutes and more on two cores
@pytest.mark.parametrize("name", JSONS)
def test_zero_by_accelerate(model: Path, one: dict[str, Any], tmp_path: Path, name: str) -> None:
    needs_deepspeed(name)
    found = accelerate(model, tmp_path, name)
    require_zero(found, name)
    require_same(found, tmp_path, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", JSONS)
def test_zero_by_json(model: Path, one: dict[str, Any], tmp_path: Path, name: str) -> None:
    needs_deepspeed(name)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = launch(model, tmp_path, launcher, str(FOLDER / "deepspeed" / f"{name}.json"))
    require_zero(found, name)
    require_same(found, tmp_path, one)
