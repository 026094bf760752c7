"""`chronicals-trl sft`: what `trl sft` does, with the flag on; `chronicals-trl doctor`: what this machine can do;
`chronicals-trl bench`: how fast the fused ops, the head, attention, a layer with LoRA and whole runs are on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from chronicals_trl import __version__
from chronicals_trl._versions import (
    FLOORS,
    REQUIRED,
    TESTED,
    check_floors,
    installed,
    meets_floor,
    newer_than_tested,
)

_EPILOG = (
    "`chronicals-trl sft --help` lists the arguments: TRL's, and --use_chronicals and --chronicals_config. "
    "`chronicals-trl bench --help` lists the benchmarks."
)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Everything after `sft` belongs to TRL's parser, --help included.
    if arguments[:1] == ["sft"]:
        return _sft(arguments[1:])
    if arguments[:1] == ["bench"]:
        from chronicals_trl.bench.command import main as bench

        return bench(arguments[1:])
    parser = argparse.ArgumentParser(prog="chronicals-trl", description=__doc__, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="{sft,doctor,bench}")
    commands.add_parser("sft", help="fine-tune, as `trl sft` does, with use_chronicals on", add_help=False)
    doctor = commands.add_parser("doctor", help="versions, GPUs and back ends; with --model, what would be on")
    doctor.add_argument("--model", help="a model's folder or hub id; only its config is read, never its weights")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    commands.add_parser(
        "bench",
        help="time the fused ops, the head, attention, a LoRA layer or whole runs against others",
        add_help=False,
    )
    namespace = parser.parse_args(arguments)
    if namespace.command is None:
        parser.print_help()
        return 0
    return _doctor(namespace.model, namespace.json)


def _sft(arguments: list[str]) -> int:
    """Parse as `trl sft` does (it sorts out what is accelerate's), then launch TRL's script through our runner."""
    check_floors()
    from chronicals_trl._register import register

    register()
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.scripts import sft

    from chronicals_trl._environment import ENV_FLAG
    from chronicals_trl.config import _FromEnvironment

    parser = sft.make_parser(prog="chronicals-trl sft")
    *_, from_config, from_command_line = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    misplaced = _own_settings(from_config + from_command_line)
    if misplaced:
        text = json.dumps(misplaced)
        sys.stderr.write(
            f"chronicals-trl sft: error: {', '.join(misplaced)} belongs into chronicals_config. Write "
            f"--chronicals_config '{text}' on the command line, or chronicals_config: {text} in a YAML file.\n"
        )
        return 2
    launch_arguments = resolve_accelerate_config_argument(from_config + from_command_line)
    script_arguments = _without(arguments, from_command_line)
    # The YAML file's value has become the parser's default, quoted words and numbers as they are; SFTConfig reads
    # them. Its `env:` section is in os.environ by now.
    from_yaml = parser.get_default("use_chronicals")
    if (from_yaml is None or isinstance(from_yaml, _FromEnvironment)) and ENV_FLAG not in os.environ:
        # In front: of two values the last one counts, so one that the user gave still wins.
        script_arguments = ["--use_chronicals", "True", *script_arguments]
    launch = launch_command_parser().parse_args(
        [*launch_arguments, "-m", "chronicals_trl", str(sft.__file__), *script_arguments]
    )
    launch_command(launch)
    return 0


def _own_settings(unknown: list[str]) -> dict[str, Any]:
    """Fields of `ChronicalsConfig` among arguments that TRL's parser does not know, with their values."""
    from chronicals_trl.config import ChronicalsConfig, _parse_text

    found: dict[str, Any] = {}
    fields = {field.name for field in dataclasses.fields(ChronicalsConfig)}
    for index, argument in enumerate(unknown):
        name, has_value, value = argument.partition("=")
        key = name[2:].replace("-", "_")
        if not name.startswith("--") or key not in fields:
            continue
        following = unknown[index + 1 : index + 2]
        if not has_value and following and not following[0].startswith("--"):
            (value,) = following
        found[key] = _parse_text(key, value or "true")  # without a value it is meant as a switch
    return found


def _without(items: list[str], taken: list[str]) -> list[str]:
    """`items` less `taken`, which is a subsequence of it: the earliest match of each goes."""
    left, queue = [], list(taken)
    for item in items:
        if queue and item == queue[0]:
            queue.pop(0)
        else:
            left.append(item)
    return left


def _doctor(model: str | None, as_json: bool) -> int:
    """Print the findings; 1 when a needed library is missing or too old, or the model cannot be read, else 0."""
    packages = {name: _package(name) for name in FLOORS}
    findings: dict[str, Any] = {
        "chronicals-trl": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }
    sound = all(packages[name]["state"] in ("ok", "newer than tested") for name in REQUIRED)
    # Without torch, or with one too old, the rest could only fail.
    report, problem = None, None
    if sound:
        findings["gpus"] = _gpus()
        findings["backends"] = _backends()
        if model is not None:
            try:
                report = _what_would_be_on(model)
                findings["model"] = {"name": model, **report.to_dict()}
            except Exception as error:  # a wrong name, no network, a configuration of no causal language model ...
                problem = f"cannot read the model {model!r}: {_first_line(error)}. Pass a model's folder or hub id."
                findings["model"] = {"name": model, "error": problem}
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        print(_as_text(findings))
        if report is not None:
            print(f"\nOn {model} (structure only, from its config; weights and quantisation not looked at):")
            report.print()
        if problem is not None:
            print(f"\n{problem}")
    return 0 if sound and problem is None else 1


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _package(name: str) -> dict[str, str | None]:
    found = installed(name)
    if found is None:
        state = "missing" if name in REQUIRED else "not installed"
    elif not meets_floor(name, found):
        state = f"too old: pip install -U '{name}>={FLOORS[name]}'"
    elif newer_than_tested(name, found):
        state = "newer than tested"
    else:
        state = "ok"
    return {"installed": found, "floor": FLOORS[name], "tested": TESTED[name], "state": state}


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a parent package that is not there, or is broken
        return False


def _backends() -> dict[str, bool]:
    """Which optional libraries are there. Found, not imported: some take seconds or need a GPU to import."""
    modules = {
        "triton": "triton",
        "torch varlen attention": "torch.nn.attention.varlen",
        "flash-attn-4": "flash_attn.cute",
        "flash-attn-3": "flash_attn_interface",
        "flash-attn": "flash_attn_2_cuda",
        "peft": "peft",
        "deepspeed": "deepspeed",
        "bitsandbytes": "bitsandbytes",
    }
    return {label: _importable(module) for label, module in modules.items()}


def _what_would_be_on(model: str) -> Any:
    """The report of `patch_model` on the model's structure, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from chronicals_trl.config import PARTS, ChronicalsConfig
    from chronicals_trl.model.patch import patch_model
    from chronicals_trl.report import PartReport

    # To show and not to refuse: "on" and strict, from the environment, are for a run.
    settings = ChronicalsConfig.resolve(None)
    wanted: dict[str, Any] = {name: "auto" for name in PARTS if getattr(settings, name) == "on"}
    settings = dataclasses.replace(settings, strict=False, **wanted)

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        structure = AutoModelForCausalLM.from_config(config)
    report = patch_model(structure, settings)
    # These depend on what a run is given, and say nothing about the model.
    for name, needs in {
        "packing": "packing=True",
        "lora": "a LoRA adapter",
        "lora_plus": "a LoRA adapter",
        "cuda_graphs": "packing=True and a GPU",
    }.items():
        if getattr(settings, name) != "off":
            report.set(PartReport(name, "off", reason=f"not looked at: it takes {needs}, in a run"))
    return report


def _as_text(findings: dict[str, Any]) -> str:
    lines = [f"chronicals-trl {findings['chronicals-trl']}, Python {findings['python']}, {findings['platform']}", ""]
    lines.append(f"{'package':<14}{'installed':<16}{'floor':<8}{'tested':<10}state")
    for name, package in findings["packages"].items():
        found = package["installed"] or "-"
        lines.append(f"{name:<14}{found:<16}{package['floor']:<8}{package['tested']:<10}{package['state']}")
    if "gpus" in findings:
        described = [f"{g['name']}, {g['memory_gib']} GiB, capability {g['capability']}" for g in findings["gpus"]]
        lines += ["", "GPU: " + ("; ".join(described) or "none: the plain-torch reference of each kernel runs")]
        lines += ["", "back ends:"]
        lines += [f"  {label:<24}{'found' if found else '-'}" for label, found in findings["backends"].items()]
    return "\n".join(lines)
