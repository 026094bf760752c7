"""`chronicals-trl doctor`: whether chronicals can run on this machine, with what, and what to do where it cannot.

Looked at in the order in which one thing rests on another: versions (from metadata), imports, the environment, GPUs
and driver, each attention back end and each fused op by number, and which parts a model would get. What rests on
something broken is not looked at. Nothing here imports torch before the versions are known to be right.
"""

from __future__ import annotations

import json
import platform
from typing import Any

from chronicals_trl import __version__
from chronicals_trl.doctor.findings import Problem, first_line
from chronicals_trl.doctor.machine import examine_gpus
from chronicals_trl.doctor.packages import examine_environment, examine_imports, examine_packages, optional_packages
from chronicals_trl.doctor.text import as_text, verdict, wrapped

__all__ = ["diagnose", "main"]


def main(model: str | None, as_json: bool) -> int:
    """Print the findings, and return 0 if chronicals can run (and `model`, if given, can be read), else 1."""
    findings, report = diagnose(model)
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        print(as_text(findings))
        if report is not None:
            print(f"\nOn {model} (structure only, from its config; weights and quantisation not looked at):")
            report.print()
        print(f"\nVerdict, to paste into an issue:\n\n{wrapped(findings['verdict'])}")
    return 0 if findings["can_run"] and "error" not in findings.get("model", {}) else 1


def diagnose(model: str | None = None) -> tuple[dict[str, Any], Any]:
    """Everything that `doctor` knows, as JSON would have it, and the model's ActivationReport or None.

    Keys: "chronicals-trl", "python", "platform", "packages", "optional", and as far as it got "environment", "gpu",
    "attention", "kernels" (lists of checks: name, state, backend, detail, seconds), "model"; then "problems" (what,
    remedy, fatal), "can_run" and "verdict".
    """
    packages, problems = examine_packages()
    findings: dict[str, Any] = {
        "chronicals-trl": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "optional": optional_packages(),
    }
    report = None
    if not _fatal(problems):
        problems += examine_imports()
    if not _fatal(problems):
        findings["environment"], found = examine_environment()
        problems += found
        report, found = _examine_machine(findings, model, settings_are_right=not _fatal(found))
        problems += found
    findings["problems"] = [problem.to_dict() for problem in problems]
    findings["can_run"] = not _fatal(problems)
    findings["verdict"] = verdict(findings)
    return findings, report


def _fatal(problems: list[Problem]) -> bool:
    return any(problem.fatal for problem in problems)


def _examine_machine(
    findings: dict[str, Any], model: str | None, *, settings_are_right: bool
) -> tuple[Any, list[Problem]]:
    """Add "gpu", "attention", "kernels" and "model" to `findings`."""
    import torch

    findings["gpu"], problems = examine_gpus()
    devices = findings["gpu"]["devices"]
    if _fatal(problems):  # the GPU cannot compute
        return None, problems
    device = torch.device("cuda", 0) if devices else torch.device("cpu")

    from chronicals_trl.doctor.attention_checks import attention_problems, check_attention
    from chronicals_trl.doctor.kernel_checks import check_kernels, kernel_problems
    from chronicals_trl.kernels._common import HAS_TRITON

    if devices and not HAS_TRITON:
        what = "triton cannot be imported, so the fused ops run in plain torch: right, and much slower"
        problems.append(
            Problem(what, "Install the version that this torch names (pip show torch): pip install triton")
        )
    attention = check_attention(device)
    kernels = check_kernels(device)
    findings["attention"] = [check.to_dict() for check in attention]
    findings["kernels"] = [check.to_dict() for check in kernels]
    problems += [*attention_problems(attention, device), *kernel_problems(kernels)]
    report = None
    if model is not None and settings_are_right:
        from chronicals_trl.doctor.model import what_would_be_on

        try:
            report = what_would_be_on(model, device)
            findings["model"] = {"name": model, **report.to_dict()}
        except Exception as error:  # a wrong name, no network, a configuration of no causal language model ...
            what = f"cannot read the model {model!r}: {first_line(error)}"
            problem = Problem(what, "Pass a model's folder or hub id")  # of the machine it says nothing: not fatal
            findings["model"] = {"name": model, "error": str(problem)}
            problems.append(problem)
    return report, problems
