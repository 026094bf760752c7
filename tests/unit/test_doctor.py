"""`chronicals-trl doctor` on machines that this one is not: stand-ins for what is broken, missing, old or new."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from chronicals_trl import _versions, cli, doctor, kernels
from chronicals_trl.doctor import attention_checks, kernel_checks, machine, packages, text
from chronicals_trl.doctor.findings import Check, Problem, first_line
from chronicals_trl.model import attention_backends, attention_choice, attention_fa4

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No verdict, and no package that was looked for, outlives a test; what is installed here counts as tested."""
    for name, tested in _versions.TESTED.items():
        monkeypatch.setitem(_versions.TESTED, name, max(tested, _versions.installed(name) or "0", key=Version))
    monkeypatch.setattr(attention_choice, "_verified", {})
    attention_backends._package.cache_clear()
    yield
    attention_backends._package.cache_clear()


def version_of(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = _versions.installed
    given = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(_versions, "installed", lambda name: given[name] if name in given else real(name))


def gpu(monkeypatch: pytest.MonkeyPatch, name: str = "NVIDIA H100", capability: tuple[int, int] = (9, 0)) -> None:
    """What torch says on a machine with one GPU, as far as the doctor asks."""
    properties = types.SimpleNamespace(name=name, total_memory=80 * 2**30, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(machine, "driver_version", lambda: "580.65")
    monkeypatch.setattr(machine, "_compute", lambda: None)


def verified(monkeypatch: pytest.MonkeyPatch, **wrong: str) -> None:
    """Every back end that is available is right on the GPU, but for those in `wrong`."""
    monkeypatch.setattr(attention_choice, "verify_backend", lambda name, **_: wrong.get(name))


def whats(problems: list[Problem]) -> str:
    return "\n".join(map(str, problems))


# -- as a whole ------------------------------------------------------------------------------------------------------


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "driver_version", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["trl"]["installed"] == _versions.installed("trl")
    assert found["packages"]["torch"]["floor"] == _versions.FLOORS["torch"]
    assert set(found["optional"]) >= {"triton", "flash-attn-4", "flash-attn", "deepspeed", "bitsandbytes"}
    assert found["gpu"] == {"driver": None, "cuda": torch.version.cuda, "devices": []}
    assert [check["name"] for check in found["attention"]] == list(attention_choice.LABELS.values())
    assert {check["name"]: check["state"] for check in found["kernels"]} == dict.fromkeys(kernel_checks.CASES, "ok")
    assert found["can_run"] is True
    assert [problem["what"][:15] for problem in found["problems"]] == ["No NVIDIA GPU: "]
    assert "It can run here." in found["verdict"] and "\n" not in found["verdict"]


def test_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["sdpa", "ok", *line.split()[-2:]] for line in lines)
    assert any(line.startswith("  rms_norm ") and " ok " in line for line in lines)
    start = lines.index("Verdict, to paste into an issue:")
    paragraph = lines[start + 2 :]
    assert paragraph[0].startswith("chronicals-trl ") and "" not in paragraph
    assert max(map(len, paragraph)) <= text.WIDTH


def test_a_back_end_is_named_once() -> None:
    check = {"state": "ok", "seconds": 0.0, "detail": None}
    assert text._check_line({**check, "name": "sdpa", "backend": "sdpa"}).split() == ["sdpa", "ok", "0.0", "s"]
    assert "triton" in text._check_line({**check, "name": "rms_norm", "backend": "triton"})


def test_broken_things_are_not_built_upon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a library missing nothing is imported, and the rest of the findings are not there."""
    version_of(monkeypatch, torch=None)
    monkeypatch.setattr(packages.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not {"gpu", "attention", "kernels", "model"} & set(found)
    assert found["packages"]["torch"]["state"] == "missing"
    assert "It cannot run here as it should. (1) torch is not installed. Install it: pip install" in found["verdict"]


def test_without_torch_at_all() -> None:
    """Not a stand-in: an interpreter in which torch, transformers and trl cannot be imported."""
    code = """
import sys
for name in ("torch", "transformers", "trl", "accelerate"):
    sys.modules[name] = None
from chronicals_trl import _versions
_versions.installed = lambda name: None
from chronicals_trl.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stderr
    for name in _versions.REQUIRED:
        assert f"{name} is not installed. Install it: pip" in done.stdout.replace("\n", " ")


# -- libraries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _versions.REQUIRED)
def test_a_library_that_is_too_old(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version_of(monkeypatch, **{name: "1.0.0"})
    assert cli.main(["doctor"]) == 1
    floor = _versions.FLOORS[name]
    told = capsys.readouterr().out.replace("\n", " ")
    assert (
        f"{name} 1.0.0 is older than {floor}, the oldest that works. Update it: pip install -U '{name}>={floor}'"
        in told
    )


def test_an_old_peft_costs_lora_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    version_of(monkeypatch, peft="0.1")
    _, (problem,) = packages.examine_packages()
    assert not problem.fatal and "LoRA" in problem.what
    version_of(monkeypatch, peft=None)
    found, problems = packages.examine_packages()
    assert found["peft"]["state"] == "not installed" and not problems


def test_a_library_that_is_newer_than_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    version_of(monkeypatch, trl="99.0.0")
    found, (problem,) = packages.examine_packages()
    assert found["trl"]["state"] == "newer than tested"
    assert not problem.fatal and "trl 99.0.0 is newer than" in problem.what
    assert f"trl=={_versions.TESTED['trl']}" in problem.remedy


def test_a_library_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def broken(name: str) -> Any:
        if name == "transformers":
            raise ImportError("cannot import name 'x'.\nmore")
        return real(name)

    monkeypatch.setattr(packages.importlib, "import_module", broken)
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (problem,) = found["problems"]
    assert problem["what"] == "transformers cannot be imported (ImportError: cannot import name 'x')"
    assert "--force-reinstall 'transformers>=" in problem["remedy"]
    assert "gpu" not in found


def test_what_a_library_prints_stays_out_of_the_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages.importlib, "import_module", lambda name: print("welcome"))
    assert packages.examine_imports() == [] and capsys.readouterr().out == ""


def test_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CHRONICALS_ATENTION", "off")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found, (mistyped, interpreter) = packages.examine_environment()
    assert found["CHRONICALS_ATENTION"] == "off"
    assert mistyped.fatal and "Did you mean 'CHRONICALS_ATTENTION'" in mistyped.what
    assert not interpreter.fatal and "TRITON_INTERPRET" in interpreter.what
    monkeypatch.delenv("CHRONICALS_ATENTION")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("CHRONICALS_LOGIT_BUDGET_MIB", "many")
    assert cli.main(["doctor", "--json", "--model", "/nonexistent"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "logit_budget_mib" in whats([Problem(p["what"], "") for p in found["problems"]]).lower()
    assert "model" not in found  # its settings could not be read


# -- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "cuda", "visible", "words"),
    [
        (None, None, None, ("there is no driver", "use a machine with an NVIDIA GPU")),
        ("580.65", None, None, ("a build without CUDA", "Install a CUDA build")),
        ("580.65", "13.0", "", ("CUDA_VISIBLE_DEVICES hides them all", "Unset CUDA_VISIBLE_DEVICES")),
        ("580.65", "13.0", "-1", ("CUDA_VISIBLE_DEVICES hides them all",)),
        (
            "470.1",
            "13.0",
            None,
            ("cannot start CUDA on the driver 470.1 (driver too old)", "Update the NVIDIA driver"),
        ),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, cuda: str | None, visible: str | None, words: tuple[str, ...]
) -> None:
    def init() -> None:
        raise RuntimeError("driver too old.")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    found, (problem,) = machine.examine_gpus()
    assert found["devices"] == [] and not problem.fatal  # the CPU will do
    for said in words:
        assert said in str(problem)


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, "Tesla T4", (7, 5))
    found, (problem,) = machine.examine_gpus()
    assert found["devices"] == [{"name": "Tesla T4", "memory_gib": 80.0, "capability": "7.5"}]
    assert not problem.fatal and "older than Ampere" in problem.what and "fp16=True" in problem.remedy
    assert kernel_checks.probe_dtype(CUDA) is torch.float16
    verified(monkeypatch)
    checks = attention_checks.check_attention(CUDA)
    assert {check.name: check.state for check in checks if check.state != "not available"} == {"sdpa": "ok"}
    assert attention_checks.attention_problems(checks, CUDA) == []  # said once, with the GPU


def test_a_gpu_that_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, "NVIDIA A100", (8, 0))
    assert machine.examine_gpus()[1] == []
    assert kernel_checks.probe_dtype(CUDA) is torch.bfloat16


def test_gpus_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_compute", lambda: None)
    device = {"name": "NVIDIA A100", "memory_gib": 79.3, "capability": "8.0"}
    assert machine._problems_of([device, dict(device)], "12.8") == []
    (problem,) = machine._problems_of([device, device | {"memory_gib": 39.4}], "12.8")
    assert "The GPUs differ" in problem.what and not problem.fatal


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(monkeypatch, "Tesla P100", (6, 0))
    monkeypatch.setattr(machine, "_compute", lambda: "CUDA error: no kernel image is available for execution")
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"][0]["fatal"] and "no kernel image" in found["problems"][0]["what"]
    assert "kernels" not in found  # nothing there could run


def test_computing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.tensor([5.0]))
    assert machine._compute() == "1 + 1 is not 2 there"
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert machine._compute() is not None
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.tensor([1.0]))
    assert machine._compute() is None


def test_gpus_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    kinds = [types.SimpleNamespace(name=name, total_memory=2**35, major=9, minor=0) for name in ("A", "B", "A")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: kinds[index])
    found, (problem,) = machine.examine_gpus()
    assert "0: A, 1: B, 2: A" in problem.what and not problem.fatal
    assert text.gpus_in_words(found).startswith("2 x A, 32.0 GiB, compute capability 9.0; B, 32.0 GiB")


def test_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found, (problem,) = machine.examine_gpus()
    assert "ROCm 7.0" in problem.what and found["devices"] == []


def test_the_driver_s_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.driver_version() == "580.65.06"
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    proc = tmp_path / "version"
    monkeypatch.setattr(machine, "_DRIVER_FILE", proc)
    assert machine.driver_version() is None
    proc.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 02:13:41 UTC 2025\n")
    assert machine.driver_version() == "570.124.06"


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(monkeypatch)
    monkeypatch.setattr("chronicals_trl.kernels._common.HAS_TRITON", False)
    monkeypatch.setattr(attention_checks, "check_attention", lambda device: [Check("sdpa", "ok", "sdpa")])
    monkeypatch.setattr(kernel_checks, "check_kernels", lambda device: [Check("rms_norm", "ok", "torch")])
    assert cli.main(["doctor", "--json"]) == 0  # it runs, by the references
    found = json.loads(capsys.readouterr().out)
    assert any(
        "triton cannot be imported" in p["what"] and "pip install triton" in p["remedy"] for p in found["problems"]
    )
    assert "plain torch, without kernels" in found["verdict"]


# -- attention -------------------------------------------------------------------------------------------------------


def install_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, source: str) -> None:
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()


FLASH_ATTN = {
    "built for another CUDA": (
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab')",
        ("flash-attn 2.8.3 cannot be imported (ImportError: flash_attn_2_cuda.so: undefined symbol",
         "rebuild it for torch", "CUDA 13.0", "pip uninstall flash-attn"),
    ),
    "half removed": (
        "import einops_that_is_not_there",
        ("flash-attn 2.8.3 cannot be imported (ModuleNotFoundError: No module named 'einops_that", "rebuild it"),
    ),
    "without the function": (
        "def flash_attn_func(): ...",
        ("flash-attn 2.8.3 has no flash_attn.flash_attn_varlen_func", "pip install -U flash-attn"),
    ),
    "with an older function": (
        "def flash_attn_varlen_func(q, k, v, causal): ...",
        ("flash-attn 2.8.3: flash_attn_2 in this version: no deterministic, softcap", "pip install -U flash-attn"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLASH_ATTN)
def test_a_wrong_flash_attn(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Found, explained, and no obstacle: torch's own varlen attention works."""
    source, words = FLASH_ATTN[kind]
    gpu(monkeypatch)
    verified(monkeypatch)
    install_module(monkeypatch, tmp_path, "flash_attn", source)
    version_of(monkeypatch, flash_attn="2.8.3")
    attention_fa4.package.cache_clear()
    try:
        checks = attention_checks.check_attention(CUDA)
    finally:
        attention_fa4.package.cache_clear()
    states = {check.name: check.state for check in checks}
    assert states == {
        "flash_attn_4": "not available", "varlen": "ok", "flash_attn_3": "not available", "flash_attn_2": "failed",
        "sdpa": "ok",
    }  # fmt: skip
    (problem,) = attention_checks.attention_problems(checks, CUDA)
    assert not problem.fatal and "varlen, which is taken, does without it" in problem.what
    for said in words:
        assert said in str(problem)


def test_a_gpu_on_which_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    verified(monkeypatch)
    checks = attention_checks.check_attention(CUDA)
    assert attention_checks.chosen(checks) == "varlen"
    assert attention_checks.attention_problems(checks, CUDA) == []


def test_a_module_that_no_package_has_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_versions, "installed", lambda name: None)
    assert attention_checks._broken("fa3", "flash-attn 3 is not installed") is None
    # Copied from a checkout of flash-attention's hopper folder.
    assert attention_checks._broken("fa3", "its function takes no window") == "its function takes no window"
    # Its module shares a name with flash-attn 2's.
    assert attention_checks._broken("fa4", "no function") is None


def test_a_broken_flash_attn_4(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    verified(monkeypatch)
    version_of(monkeypatch, flash_attn_4="4.0.0b36")
    monkeypatch.setattr(attention_fa4, "package", lambda: "flash_attn_4: No module named 'cutlass'")
    checks = attention_checks.check_attention(CUDA)
    assert checks[0].state == "failed" and "flash-attn-4 4.0.0b36 cannot be imported" in (checks[0].detail or "")
    (problem,) = attention_checks.attention_problems(checks, CUDA)
    assert "varlen is taken in its place" in problem.what and "pip uninstall flash-attn-4" in problem.remedy


def test_wrong_numbers_and_none_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    verified(monkeypatch, varlen="output 0 differs")
    checks = attention_checks.check_attention(CUDA)
    (problem,) = attention_checks.attention_problems(checks, CUDA)
    assert "varlen does not work: output 0 differs; sdpa is taken in its place" in problem.what and not problem.fatal
    assert "Update torch" in problem.remedy
    verified(monkeypatch, varlen="wrong", blockwise="wrong too")
    checks = attention_checks.check_attention(CUDA)
    (problem,) = attention_checks.attention_problems(checks, CUDA)
    assert problem.fatal and "varlen: wrong; sdpa: wrong too" in problem.what


def test_a_gpu_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str, **_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(attention_choice, "verify_backend", full)
    check = attention_checks.check_attention(CPU)[-1]
    assert (check.state, check.detail) == ("failed", "OutOfMemoryError: CUDA out of memory")


def test_a_torch_without_varlen_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    verified(monkeypatch)
    import dataclasses

    old = dataclasses.replace(attention_backends.BACKENDS["varlen"], missing=lambda: "varlen: torch 2.1 has none")
    monkeypatch.setitem(attention_backends.BACKENDS, "varlen", old)
    checks = attention_checks.check_attention(CUDA)
    (problem,) = attention_checks.attention_problems(checks, CUDA)
    assert "torch 2.1 has none" in problem.what and "Update torch" in problem.remedy


def test_attention_is_compared_by_number_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from chronicals_trl.model import attention_choice as choice

    assert attention_checks.check_attention(CPU)[-1].state == "ok"
    monkeypatch.setattr(choice, "_verified", {})
    monkeypatch.setattr(choice, "block_diagonal_mask", lambda cu, length, window: torch.ones(length, length).bool())
    wrong = attention_checks.check_attention(CPU)[-1]
    assert wrong.state == "failed" and wrong.detail is not None


# -- fused ops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_references_are_right_in_each_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training has on GPUs is within the tolerance, too."""
    monkeypatch.setattr(kernel_checks, "probe_dtype", lambda device: dtype)
    checks = kernel_checks.check_kernels(CPU)
    assert [check for check in checks if check.state != "ok"] == []
    assert {check.backend for check in checks} == {"torch"}


OPS = {
    "rms_norm": "rms_norm", "swiglu": "swiglu", "geglu": "geglu", "qk_rope": "qk_rope",
    "qk_norm_rope": "qk_norm_rope", "shared_linear": "shared_linear", "linear_cross_entropy": "linear_cross_entropy",
    "linear_cross_entropy, tiles": "linear_cross_entropy", "lora_linear": "lora_linear",
    "lora_linear, dropout": "lora_linears", "lora_gated_mlp": "lora_gated_mlp",
}  # fmt: skip


def nudged(function: Any) -> Any:
    """`function` with every result a thousandth too large."""

    def call(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out * 1.001
        if hasattr(out, "_replace"):
            return out._replace(loss=out.loss * 1.001)
        return tuple(t * 1.001 for t in out)

    return call


@pytest.mark.parametrize("name", kernel_checks.CASES)
def test_an_op_that_is_wrong_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, OPS[name], nudged(getattr(kernels, OPS[name])))
    monkeypatch.setattr(kernel_checks, "CASES", {name: kernel_checks.CASES[name]})
    (check,) = kernel_checks.check_kernels(CPU)
    assert check.state == "failed" and "differs from the original" in (check.detail or "")
    (problem,) = kernel_checks.kernel_problems([check])
    assert problem.fatal and f"Self-check failed for {name}: " in problem.what


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy, tiles"])
def test_a_loss_that_counts_ignored_labels_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.linear_cross_entropy
    monkeypatch.setattr(
        kernels, "linear_cross_entropy", lambda hidden, weight, labels, **_: right(hidden, weight, labels.clamp(min=0))
    )
    monkeypatch.setattr(kernel_checks, "CASES", {name: kernel_checks.CASES[name]})
    assert kernel_checks.check_kernels(CPU)[0].state == "failed"


def test_a_kernel_that_is_not_launched_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "backend", lambda device: "triton")
    monkeypatch.setattr(kernel_checks, "CASES", {"rms_norm": kernel_checks.CASES["rms_norm"]})
    (check,) = kernel_checks.check_kernels(CPU)
    assert (check.state, check.detail) == ("failed", "not launched: rms_norm, rms_norm_backward")


def test_one_cause_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton without a C compiler: every kernel fails alike."""

    def fails(draw: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore")

    monkeypatch.setattr(kernel_checks, "CASES", {"rms_norm": fails, "swiglu": fails})
    checks = kernel_checks.check_kernels(CPU)
    (problem,) = kernel_checks.kernel_problems(checks)
    assert problem.what.startswith("Self-check failed for rms_norm, swiglu: RuntimeError: Failed to find C compiler")
    assert "install gcc" in problem.remedy and "More" not in problem.what


def test_a_failed_check_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernel_checks, "CASES", {"swiglu": kernel_checks.CASES["swiglu"]})
    monkeypatch.setattr(kernels, "swiglu", nudged(kernels.swiglu))
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "It cannot run here as it should. 0 of 1 fused ops agree" in told.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.skipif(not kernels._common.HAS_TRITON, reason="triton is not installed")
def test_the_kernels_themselves_by_the_interpreter() -> None:
    """All of them are launched, and agree; the tiles' are left out, which take half a minute there."""
    code = """
import json, sys
from chronicals_trl.doctor import kernel_checks
del kernel_checks.CASES["linear_cross_entropy, tiles"]
import torch
print(json.dumps([check.to_dict() for check in kernel_checks.check_kernels(torch.device("cpu"))]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    checks = {check["name"]: check for check in json.loads(done.stdout.splitlines()[-1])}
    assert {name: check["detail"] for name, check in checks.items() if check["state"] != "ok"} == {}
    assert {name for name, check in checks.items() if check["backend"] == "torch"} == {"lora_linear"}


# -- a model ----------------------------------------------------------------------------------------------------------


def test_shows_what_would_be_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_models import build

    build("llama").config.save_pretrained(tmp_path)
    assert cli.main(["doctor", "--model", str(tmp_path), "--json"]) == 0
    parts = {part["name"]: part for part in json.loads(capsys.readouterr().out)["model"]["parts"]}
    assert parts["rms_norm"]["state"] == "on"
    assert parts["rms_norm"]["modules"] == 5  # two in each of two layers, one at the end
    assert parts["gated_mlp"]["modules"] == 2
    assert parts["packing"]["reason"] == "not looked at: it takes packing=True, in a run"
    assert parts["cuda_graphs"]["reason"] == "not looked at: it takes packing=True and a GPU, in a run"
    assert (
        parts["lora"]["reason"] == parts["lora_plus"]["reason"] == "not looked at: it takes a LoRA adapter, in a run"
    )
    unseen = {"packing", "lora", "lora_plus", "adamw", "cuda_graphs", "recompute"}
    assert {name for name, part in parts.items() if part["state"] == "-"} == unseen
    assert {parts[name]["reason"].partition(":")[0] for name in unseen} == {"not looked at"}
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "gated_mlp" in told
    assert "transformers" in told
    verdict = told.replace("\n", " ")
    assert f"For {tmp_path} on: rms_norm, gated_mlp, qk_rope, attention, head." in verdict


def test_shows_where_a_run_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_models import build

    build("llama").config.save_pretrained(tmp_path)
    settings = {"CHRONICALS_PACKING": "on", "CHRONICALS_STRICT": "1", "CHRONICALS_LORA": "off"}
    for name, value in {**settings, "CHRONICALS_ATTENTION_BACKEND": "flash_attn_2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["doctor", "--model", str(tmp_path), "--json"]) == 0
    parts = {part["name"]: part for part in json.loads(capsys.readouterr().out)["model"]["parts"]}
    assert parts["packing"]["state"] == "-" and parts["packing"]["reason"].startswith("not looked at")
    assert parts["attention"]["state"] == "off" and "flash_attn_2" in parts["attention"]["reason"]
    assert (parts["lora"]["state"], parts["lora"]["reason"]) == ("off", "lora='off' in the configuration")


def test_on_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("/nonexistent", str(tmp_path)):
        assert cli.main(["doctor", "--model", name]) == 1
        told = capsys.readouterr().out
        assert (
            f"cannot read the model {name!r}: " in told.replace("\n", " ") and "Pass a model's folder or hub" in told
        )
        assert cli.main(["doctor", "--model", name, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert "cannot read" in found["model"]["error"] and found["can_run"]  # of the machine it says nothing


# -- small things ----------------------------------------------------------------------------------------------------


def test_first_line() -> None:
    assert first_line(ValueError("a b.\nc")) == "a b"
    assert first_line(KeyError()) == "KeyError"


def test_the_verdict_has_what_costs_most_first() -> None:
    problems = [Problem("a", "b").to_dict(), Problem("c", "d", fatal=True).to_dict()]
    found = doctor.verdict(
        {"chronicals-trl": "1", "python": "3", "platform": "x", "packages": {}, "problems": problems, "can_run": False}
    )
    assert found.endswith("It cannot run here as it should. (1) c. d. (2) a. b.")
