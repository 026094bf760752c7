"""examples/multi_gpu.md: every command through the parsers that would get it, every file, and some of them run.

`python tests/distributed/test_multi_gpu_page.py [WORD ...]` runs all that train (those that contain all the words) on
two CPU processes with a tiny model.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # pytest has both on its path
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import accelerate.commands.launch  # noqa: E402
import tiny_data  # noqa: E402
import torch.distributed.run  # noqa: E402
import trl  # noqa: E402
from accelerate.commands.merge import merge_command_parser  # noqa: E402
from cpu_launch import FULL_PRECISION, run  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from training_runs import saved_model  # noqa: E402

from chronicals_trl import SFTConfig, _register, cli  # noqa: E402

PAGE = (ROOT / "examples" / "multi_gpu.md").read_text("utf-8")
CONSOLE_SCRIPT = "from chronicals_trl.cli import main; main()"
VARIABLES = {"$NODE": "0", "$FIRST_NODE": "127.0.0.1"}


def commands() -> list[list[str]]:
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in VARIABLES.items():
                line = line.replace(name, value)
            found.append(shlex.split(line))
    return found


COMMANDS = commands()
LAYOUTS = ("single_gpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload")


def label(command: list[str]) -> str:
    files = [Path(word).stem for word in command if word.startswith(("integrations/", "examples/"))]
    return " ".join([*command[:2], *files])


def option(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


# -- read -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("accelerate.accelerator", "a model and optimizer must be passed together to"),
        ("accelerate.accelerator", "FSDP2 mapping failed (missing: "),
        ("accelerate.utils.fsdp_utils", "non-floating frozen Params4bit"),
        ("torch.distributed.fsdp._fully_shard._fsdp_param_group", "FSDP expects uniform original parameter dtype"),
        ("deepspeed.ops.op_builder.builder", "Unable to JIT load the "),
        ("chronicals_trl.packing.ranks", " is not the same on all ranks"),
        ("chronicals_trl._agreement", "off on another rank"),
        ("chronicals_trl._agreement", "The ranks were not started alike"),
        ("chronicals_trl._agreement", "do not know of each other"),
        ("chronicals_trl.checkpoints", "is only half written"),
        ("chronicals_trl._inputs", "has its own "),
        ("chronicals_trl.model.apart", "hooks on the linears inside"),
    ],
)
def test_messages_are_those_that_are_raised(module: str, said: str) -> None:
    assert said in PAGE
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip("not installed")
    spec = importlib.util.find_spec(module)
    assert spec is not None and said in Path(str(spec.origin)).read_text("utf-8")


# -- parsed ----------------------------------------------------------------------------------------------------------


def test_each_layout_is_there_full_and_with_adapters() -> None:
    used = {
        (layout, Path(option(command, "--config") or "full").stem)
        for command in COMMANDS
        for layout in LAYOUTS
        if f"integrations/accelerate/{layout}.yaml" in command
    }
    assert {layout for layout, _ in used} == set(LAYOUTS)
    sharded = {"ddp", "zero2", "zero3", "fsdp2"}
    assert {layout for layout, kind in used if kind == "lora"} == {*sharded, "single_gpu", "zero1"}
    assert {layout for layout, kind in used if kind == "qlora"} == sharded


@pytest.mark.parametrize("command", COMMANDS, ids=label)
def test_files_exist(command: list[str]) -> None:
    files = [word for word in command if word.startswith(("integrations/", "examples/", "tests/"))]
    assert files or command[0] == "python" or "merge-weights" in command
    for word in files:
        assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("command", COMMANDS, ids=label)
def test_parsers_take_it(command: list[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(ROOT)
    request.addfinalizer(_register.unregister)  # what the console script does to trl is for its own process
    if command[:2] == ["chronicals-trl", "sft"]:
        launched: list[Any] = []
        monkeypatch.setattr(accelerate.commands.launch, "launch_command", launched.append)
        assert cli.main([*command[1:], *on_cpu(command)]) == 0
        [launch] = launched
        script = launch.training_script_args
        assert (launch.training_script, Path(script[0]).name) == ("chronicals_trl", "sft.py")
        known_by_accelerate(launch, command)
        parse_script(script[1:])
    elif command[:2] == ["accelerate", "launch"]:
        launch = accelerate.commands.launch.launch_command_parser().parse_args(command[2:])
        known_by_accelerate(launch, command)
        parse_runner(launch.module, launch.training_script, launch.training_script_args, command)
    elif command[0] == "torchrun":
        launch = torch.distributed.run.get_args_parser().parse_args(command[1:])
        parse_runner(launch.module, launch.training_script, launch.training_script_args, command)
    elif command[:2] == ["accelerate", "merge-weights"]:
        assert merge_command_parser().parse_args(command[2:]).output_path == "outputs/merged"
    else:  # DeepSpeed copies the script beside its checkpoints
        assert command[0] == "python" and Path(command[1]).name == "zero_to_fp32.py"
        if spec := importlib.util.find_spec("deepspeed"):
            text = (Path(str(spec.origin)).parent / "utils" / "zero_to_fp32.py").read_text()
            assert '"--safe_serialization"' in text


def known_by_accelerate(launch: Any, command: list[str]) -> None:
    if (number := option(command, "--num_processes")) is not None:
        assert launch.num_processes == int(number)
    assert Path(launch.config_file).parent == Path("integrations/accelerate")


def parse_runner(module: bool, name: str, arguments: list[str], command: list[str]) -> None:
    """What follows the launcher: `-m chronicals_trl SCRIPT ...`, or a script of a raw loop."""
    if module:
        assert (name, arguments[0]) == ("chronicals_trl", "examples/sft.py")
        parse_script([*arguments[1:], *on_cpu(command)])
        assert "--use_chronicals" in arguments
    else:
        assert name == "examples/accelerate_loop.py"
        known = re.findall(r'add_argument\("(--\w+)"', (ROOT / name).read_text())
        assert {word for word in arguments if word.startswith("--")} <= set(known)


def parse_script(arguments: list[str]) -> None:
    if "--deepspeed" in arguments and importlib.util.find_spec("deepspeed") is None:
        at = arguments.index("--deepspeed")  # its file was looked for; reading it takes DeepSpeed
        arguments = [*arguments[:at], *arguments[at + 2 :]]
    parser = trl.TrlParser((trl.ScriptArguments, SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig))
    _, training, *_ = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
    assert training.use_chronicals is True and training.packing is True
    assert training.output_dir.startswith("outputs/")


def on_cpu(command: list[str]) -> list[str]:
    """Sharded layouts take the CPUs for accelerators, and transformers must not know of them."""
    return ["--use_cpu", "True", *(["--use_chronicals", "True"] if command[0] == "chronicals-trl" else [])]


# -- run -------------------------------------------------------------------------------------------------------------


def trains(command: list[str]) -> bool:
    """Whether it can be run here: QLoRA needs a GPU, and some commands take another one's output."""
    if command[0] == "python" or "merge-weights" in command or "integrations/trl/qlora.yaml" in command:
        return False
    return "--resume_from_checkpoint" not in command


def made_small(command: list[str], folder: Path, output: Path) -> list[str]:
    """Arguments for Python that start `command` on two processes, for two steps of a tiny model; the rest stays."""
    data = folder / "data"
    if "examples/accelerate_loop.py" in command:
        small = ["--model", folder / "model", "--data", data / "train.jsonl", "--output_dir", output]
        small += ["--max_steps", "2"]
    else:
        small = [
            "--model_name_or_path", folder / "model", "--dataset_name", data, "--output_dir", output,
            "--max_steps", "2", "--max_length", "64", "--per_device_train_batch_size", "1",
            "--gradient_accumulation_steps", "2",
            "--bf16", "False", "--dtype", "float32", "--report_to", "none", "--logging_steps", "1",
            "--learning_rate", "1e-3", "--warmup_steps", "0", "--save_steps", "2",
        ]  # fmt: skip
        if not any(word in " ".join(command) for word in ("fsdp2", "zero")):
            small += ["--use_cpu", "True"]
    one = "integrations/accelerate/single_gpu.yaml" in command
    processes = ["--num_processes", "1" if one else "2"]
    machines = ["--num_machines", "1"] if "--num_machines" in command else []
    words = list(map(str, small))
    if command[0] == "chronicals-trl":
        return ["-c", CONSOLE_SCRIPT, *command[1:], *processes, *FULL_PRECISION, *words]
    if command[0] == "accelerate":
        at = command.index("-m") if "-m" in command else command.index("examples/accelerate_loop.py")
        start = ["-m", "accelerate.commands.launch", *command[2:at], *processes, *machines, *FULL_PRECISION]
        return [*start, *command[at:], *words]
    at = command.index("-m")
    return [
        "-m",
        "torch.distributed.run",
        *command[1:at],
        "--nnodes",
        "1",
        "--nproc-per-node",
        "2",
        *command[at:],
        *words,
    ]


def trained(command: list[str], folder: Path, output: Path) -> None:
    """Run it; weights that moved and, on two processes, a single report."""
    printed = run(made_small(command, folder, output), timeout=580)
    assert len(re.findall(r"rms_norm\W+on\b", printed)) == 1, printed[-3000:]
    if (output / "adapter_model.safetensors").exists():
        adapter = load_file(output / "adapter_model.safetensors")
        assert all(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
        return
    before, after = load_file(folder / "model" / "model.safetensors"), saved_weights(output)
    if after is not None:
        assert before.keys() == after.keys()
        assert all(not value.equal(before[name]) for name, value in after.items())


def saved_weights(output: Path) -> dict[str, Any] | None:
    """The whole weights; None where they are sharded."""
    file = output / "model.safetensors"
    sharded = (output / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    return None if sharded and not file.exists() else load_file(file)


def tiny(folder: Path) -> Path:
    saved_model(folder / "model")
    (folder / "data").mkdir()
    tiny_data.text(40).to_json(folder / "data" / "train.jsonl")
    return folder


def first(*words: str) -> list[str]:
    return next(command for command in COMMANDS if set(words) <= set(command))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        first("accelerate", "integrations/accelerate/ddp.yaml", "examples/sft.py", "integrations/trl/full.yaml"),
        first("chronicals-trl", "integrations/accelerate/fsdp2.yaml", "integrations/trl/lora.yaml"),
    ],
    ids=label,
)
def test_it_trains(command: list[str], tmp_path: Path) -> None:
    trained(command, tiny(tmp_path), tmp_path / "out")


if __name__ == "__main__":
    failures = 0
    for wanted in [each for each in COMMANDS if trains(each) and all(word in label(each) for word in sys.argv[1:])]:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                trained(wanted, tiny(Path(scratch)), Path(scratch) / "out")
                print(f"ok      {label(wanted)}", flush=True)
            except Exception as error:  # the others are tried all the same
                failures += 1
                print(f"FAILED  {label(wanted)}: {str(error)[-3000:]}", flush=True)
    sys.exit(failures > 0)
