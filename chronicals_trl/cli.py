"""`chronicals-trl sft`: what `trl sft` does, with the flag on; `chronicals-trl doctor`: what this machine can do;
`chronicals-trl bench`: how fast the fused ops, the head, attention, a layer with LoRA and whole runs are on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from chronicals_trl import __version__
from chronicals_trl._versions import check_floors

COMMANDS = ("sft", "doctor", "bench")
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
    commands = parser.add_subparsers(dest="command", metavar=f"{{{','.join(COMMANDS)}}}")
    commands.add_parser("sft", help="fine-tune, as `trl sft` does, with use_chronicals on", add_help=False)
    doctor = commands.add_parser(
        "doctor", help="whether chronicals can run here, checked by number; with --model, what would be on"
    )
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
    from chronicals_trl.doctor import main as doctor_main

    return doctor_main(namespace.model, namespace.json)


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
    launch_parser = launch_command_parser()
    known = {*parser._option_string_actions, *launch_parser._option_string_actions, "--accelerate_config"}
    misspelt = _near_misses(from_config + from_command_line, known)
    if misspelt:  # Accelerate would print all of its arguments, and these at the end
        text = ", ".join(f"{name} (did you mean {near}?)" for name, near in misspelt.items())
        sys.stderr.write(f"chronicals-trl sft: error: neither TRL nor Accelerate knows {text}.\n")
        return 2
    launch_arguments = resolve_accelerate_config_argument(from_config + from_command_line)
    script_arguments = _without(arguments, from_command_line)
    # The YAML file's value has become the parser's default, quoted words and numbers as they are; SFTConfig reads
    # them. Its `env:` section is in os.environ by now.
    from_yaml = parser.get_default("use_chronicals")
    if (from_yaml is None or isinstance(from_yaml, _FromEnvironment)) and ENV_FLAG not in os.environ:
        # In front: of two values the last one counts, so one that the user gave still wins.
        script_arguments = ["--use_chronicals", "True", *script_arguments]
    launch = launch_parser.parse_args(
        [*launch_arguments, "-m", "chronicals_trl", str(sft.__file__), *script_arguments]
    )
    try:
        launch_command(launch)
    except subprocess.CalledProcessError as error:
        # What went wrong stands above, in the run's own words; the launcher's traceback would push it off the screen.
        return error.returncode if error.returncode > 0 else 128 - error.returncode  # by a signal: as shells have it
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


def _near_misses(unknown: list[str], known: set[str]) -> dict[str, str]:
    """The arguments among `unknown` that are not `known`, but almost, and the one that each is nearest to."""
    options = sorted({f"--{option[2:].replace('-', '_')}" for option in known if option.startswith("--")})
    found: dict[str, str] = {}
    for argument in unknown:
        name = argument.partition("=")[0]
        if not name.startswith("--") or name in known:
            continue
        near = difflib.get_close_matches(f"--{name[2:].replace('-', '_').lower()}", options, n=1, cutoff=0.85)
        if near:
            found[name] = near[0]
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
