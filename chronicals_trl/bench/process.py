"""A side that has a process of its own: another interpreter, another path, and whatever it starts ended with it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Ended", "environment", "run_apart", "side_and_folder", "side_and_python"]

_ROOT = Path(__file__).parents[2]
_TOLD = 400  # characters of a log's last line


def side_and_python(text: str) -> tuple[str, str]:
    """SIDE=PATH of a command line, whose path is an interpreter's; absolute, as the side runs in another folder."""
    side, value = _side_and(text, "PATH")
    found = shutil.which(value)
    if found is None:
        raise argparse.ArgumentTypeError(f"names no program: {value!r}")
    return side, os.path.abspath(found)  # links stay: a virtual environment's interpreter is one


def side_and_folder(text: str) -> tuple[str, str]:
    """SIDE=DIR of a command line, absolute likewise."""
    side, value = _side_and(text, "DIR")
    if not os.path.isdir(value):
        raise argparse.ArgumentTypeError(f"names no folder: {value!r}")
    return side, os.path.abspath(value)


def _side_and(text: str, what: str) -> tuple[str, str]:
    side, equals, value = text.partition("=")
    if not (side and equals and value):
        raise argparse.ArgumentTypeError(f"must be SIDE={what}, not {text!r}")
    return side, value


def environment(first: str | None = None) -> dict[str, str]:
    """Of a side's process: `first` goes before all else on the path; nothing is fetched from a hub."""
    path = [first or "", *os.environ.get("PYTHONPATH", "").split(os.pathsep), str(_ROOT)]
    return {
        **os.environ,
        # Absolute: the process runs in a folder of its own.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(part) for part in path if part),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "PYTHONUNBUFFERED": "1",
    }


class Ended(NamedTuple):
    """How a process ended: of itself, and in words, with its last ones."""

    in_time: bool
    told: str


def run_apart(command: Sequence[str], *, first: str | None, folder: Path, log: Path, timeout: float) -> Ended:
    """Run `command` in `folder`, where peers leave files, `first` going before all else on its path.

    What it prints is added to `log`. After `timeout` seconds it is ended, and in any case what it has started.
    """
    with log.open("a") as told:
        try:
            process = subprocess.Popen(
                command, cwd=folder, env=environment(first), stdout=told, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Ended(False, f"its interpreter does not start: {error.strerror}")
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout)
        finally:  # also when this process is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    how = f"not done after {timeout:g} s" if code is None else f"exit code {code}"
    return Ended(code is not None, f"{how}; its last words: {_last(log)}")


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:_TOLD] if lines else "none"
