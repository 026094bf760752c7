"""The libraries below us: which are there, which are too old or too new, and whether they can be imported."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from typing import Any

from chronicals_trl import _versions
from chronicals_trl._environment import ENV_PREFIX, check_environment
from chronicals_trl._versions import FLOORS, REQUIRED, TESTED, meets_floor, newer_than_tested
from chronicals_trl.doctor.findings import Problem, first_line

#: What a part needs and no run must have, by distribution; flash-attn is looked at by `attention_checks`.
OPTIONAL = ("triton", "rich", "deepspeed", "bitsandbytes", "flash-attn-4", "flash-attn-3", "flash-attn")


def examine_packages() -> tuple[dict[str, dict[str, str | None]], list[Problem]]:
    """Versions against floors, from metadata alone: name -> installed, floor, tested and state, and what is wrong."""
    packages: dict[str, dict[str, str | None]] = {}
    problems: list[Problem] = []
    for name in FLOORS:
        found = _versions.installed(name)
        state = _state(name, found)
        packages[name] = {"installed": found, "floor": FLOORS[name], "tested": TESTED[name], "state": state}
        required = name in REQUIRED
        update = f"pip install -U '{name}>={FLOORS[name]}'"
        if state == "missing":
            problems.append(Problem(f"{name} is not installed", f"Install it: {update}", fatal=True))
        elif state == "too old":
            costs = "" if required else ": LoRA and what belongs to it cannot be used"
            what = f"{name} {found} is older than {FLOORS[name]}, the oldest that works{costs}"
            problems.append(Problem(what, f"Update it: {update}", fatal=required))
        elif state == "newer than tested":
            what = f"{name} {found} is newer than {TESTED[name]}, the newest that was tested"
            remedy = (
                "Nothing is refused for that, and each part is verified by number when a run starts; if something "
                f"fails, try pip install '{name}=={TESTED[name]}' and report it"
            )
            problems.append(Problem(what, remedy))
    return packages, problems


def _state(name: str, found: str | None) -> str:
    if found is None:
        return "missing" if name in REQUIRED else "not installed"
    if not meets_floor(name, found):
        return "too old"
    return "newer than tested" if newer_than_tested(name, found) else "ok"


def optional_packages() -> dict[str, str | None]:
    """Distribution -> installed version, None for what is not installed."""
    return {name: _versions.installed(name) for name in OPTIONAL}


def examine_imports() -> list[Problem]:
    """Import what a run imports, in its order; the first that fails, since what follows fails for the same reason.

    A library that is there by its metadata can still be broken: built for another torch or another Python, or half
    removed.
    """
    for name in ("torch", "transformers", "accelerate", "trl", "trl.trainer.sft_trainer"):
        try:
            # Some greet on stdout, where `--json` is to stand alone.
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(name)
        except Exception as error:  # whatever a broken installation raises
            distribution = name.partition(".")[0]
            what = f"{name} cannot be imported ({type(error).__name__}: {first_line(error)})"
            remedy = (
                f"Reinstall it, and what the message names: pip install --force-reinstall '{distribution}"
                f">={FLOORS[distribution]}'"
            )
            return [Problem(what, remedy, fatal=True)]
    return []


def examine_environment() -> tuple[dict[str, Any], list[Problem]]:
    """The variables that a run would read, and what is wrong with them.

    Call it when `examine_imports` found nothing.
    """
    names = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENV_PREFIX) or k in names}
    problems = []
    try:
        check_environment()
        from chronicals_trl.config import ChronicalsConfig

        ChronicalsConfig.resolve(None)
    except (ValueError, TypeError) as error:
        problems.append(Problem(first_line(error), "Correct or unset the variable", fatal=True))
    if found.get("TRITON_INTERPRET", "0") == "1":
        what = "TRITON_INTERPRET=1 is set: Triton's interpreter runs the kernels, thousands of times slower"
        problems.append(Problem(what, "Unset it before training"))
    return found, problems
