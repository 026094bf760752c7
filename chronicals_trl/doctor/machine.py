"""The GPUs as torch sees them, the driver below them, and why there are none where there are none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

from chronicals_trl.doctor.findings import Problem, first_line

#: Compute capability from which a GPU has bfloat16 and the varlen attention kernels.
AMPERE = (8, 0)

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def driver_version() -> str | None:
    """The NVIDIA driver's version; None where there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is not None:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):  # a driver that hangs is no reason to hang with it
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    try:
        text = _DRIVER_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return None if found is None else found[0]


def examine_gpus() -> tuple[dict[str, Any], list[Problem]]:
    """`{"driver", "cuda", "devices": [{"name", "memory_gib", "capability"}]}`, and what is wrong."""
    import torch

    driver = driver_version()
    found: dict[str, Any] = {"driver": driver, "cuda": torch.version.cuda, "devices": []}
    if getattr(torch.version, "hip", None):
        what = f"torch is built for AMD GPUs (ROCm {torch.version.hip}), on which nothing here was tested"
        return found, [Problem(what, "Use an NVIDIA GPU, or hold the report of a run against one without the flag")]
    with warnings.catch_warnings():  # of a driver that is too old; `_why_no_gpu` asks for the reason itself
        warnings.simplefilter("ignore")
        available = torch.cuda.is_available()
    if not available:
        return found, [_why_no_gpu(driver, torch.version.cuda)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found["devices"].append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found, _problems_of(found["devices"], torch.version.cuda)


def _why_no_gpu(driver: str | None, cuda: str | None) -> Problem:
    works = "everything runs in plain torch on the CPU, which is right and slow"
    if driver is None:
        what = f"No NVIDIA GPU: there is no driver, {works}"
        return Problem(what, "For speed use a machine with an NVIDIA GPU (compute capability 8.0 or higher)")
    if cuda is None:
        what = (
            f"No GPU in use: there is an NVIDIA driver ({driver}), but this torch is a build without CUDA, so {works}"
        )
        return Problem(what, "Install a CUDA build of torch: uninstall torch, then choose one on pytorch.org")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        what = f"No GPU in use: CUDA_VISIBLE_DEVICES hides them all, so {works}"
        return Problem(what, "Unset CUDA_VISIBLE_DEVICES, or name a GPU in it")
    what = f"No GPU in use: torch (CUDA {cuda}) cannot start CUDA on the driver {driver} ({_cuda_error()}), so {works}"
    return Problem(
        what, "Update the NVIDIA driver, or install a torch built for the CUDA version that nvidia-smi shows"
    )


def _cuda_error() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # a RuntimeError or an AssertionError, as torch likes
        return first_line(error)
    return "without giving a reason"


def _problems_of(devices: list[dict[str, Any]], cuda: str | None) -> list[Problem]:
    problems = []
    error = _compute()
    if error is not None:
        first = devices[0]
        what = (
            f"torch (CUDA {cuda}) cannot compute on the {first['name']} (compute capability {first['capability']}): "
            f"{error}"
        )
        remedy = "Install a torch build that has kernels for this GPU, or free it if another process holds its memory"
        problems.append(Problem(what, remedy, fatal=True))
    for device in {device["name"]: device for device in devices}.values():
        if _capability(device) < AMPERE:
            what = (
                f"The {device['name']} (compute capability {device['capability']}) is older than Ampere (8.0): it has "
                "no bfloat16 and no varlen attention kernel, so packed rows take torch's attention with a dense mask"
            )
            remedy = "Train with bf16=False, fp16=True and a max_length of 2048 or less, or use a newer GPU"
            problems.append(Problem(what, remedy))
    if len({(device["name"], device["memory_gib"]) for device in devices}) > 1:
        names = ", ".join(f"{index}: {device['name']}" for index, device in enumerate(devices))
        what = f"The GPUs differ ({names}); the checks ran on GPU 0 alone, and the slowest sets the pace"
        problems.append(Problem(what, "Choose equal ones with CUDA_VISIBLE_DEVICES"))
    return problems


def _capability(device: dict[str, Any]) -> tuple[int, ...]:
    return tuple(map(int, device["capability"].split(".")))


def _compute() -> str | None:
    """None if torch can add on the GPU; else why not: a build may lack kernels for it, or it may be full."""
    import torch

    try:
        return None if (torch.ones(1, device="cuda") + 1).item() == 2 else "1 + 1 is not 2 there"
    except Exception as error:  # whatever the runtime reports
        return first_line(error)
