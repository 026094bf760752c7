"""The package as a package: lazy public names, no side effects, metadata that agrees with itself, the command line."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import chronicals_trl
from chronicals_trl import _versions, cli

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings tomli where Python has no reader of its own
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def in_fresh_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    ).stdout


def test_importing_has_no_side_effect() -> None:
    code = """
import os, sys
environment, finders = dict(os.environ), list(sys.meta_path)
before = set(sys.modules)
import chronicals_trl, chronicals_trl._register, chronicals_trl.__main__
dir(chronicals_trl)
third_party = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(third_party))
assert os.environ == environment and sys.meta_path == finders
"""
    assert in_fresh_python(code).strip() == "['chronicals_trl', 'packaging']"


def test_public_names_load_from_where_they_live() -> None:
    assert set(chronicals_trl.__all__) - {"__version__"} == set(chronicals_trl._HOME)
    for name, home in chronicals_trl._HOME.items():
        module = importlib.import_module(f"chronicals_trl.{home}")
        assert getattr(chronicals_trl, name) is getattr(module, name)
    assert set(chronicals_trl.__all__) <= set(dir(chronicals_trl))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'SFTTrainr'"):
        chronicals_trl.SFTTrainr  # noqa: B018


def test_floors_agree_with_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    requirements += [Requirement(text) for text in project["optional-dependencies"]["peft"]]
    floors = {r.name: str(r.specifier).removeprefix(">=") for r in requirements if r.name in _versions.FLOORS}
    assert floors == _versions.FLOORS


def test_tested_versions_agree_with_constraints() -> None:
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    pinned = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert {name: pinned[name] for name in _versions.TESTED} == _versions.TESTED
    assert all("+" not in version for version in pinned.values())


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.strip() == chronicals_trl.__version__
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["train"])
    assert done.value.code == 2
    assert "'train'" in capsys.readouterr().err


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Namespace]]:
    """What `chronicals-trl sft` hands to accelerate, in place of a launch."""
    import accelerate.commands.launch

    from chronicals_trl import _register

    found: list[Namespace] = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", found.append)
    yield found
    _register.unregister()


SFT = ["sft", "--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu", "--bf16", "False", "--output_dir"]


def test_sft_launches_trls_script_through_the_runner(tmp_path: Path, launched: list[Namespace]) -> None:
    assert cli.main([*SFT, str(tmp_path), "--num_processes", "2", "--packing", "--accelerate_config", "zero2"]) == 0
    (launch,) = launched
    assert (launch.module, launch.training_script, launch.num_processes) == (True, "chronicals_trl", 2)
    assert launch.config_file.endswith("accelerate_configs/zero2.yaml")
    script, *arguments = launch.training_script_args
    assert script.endswith("trl/scripts/sft.py")
    assert arguments == ["--use_chronicals", "True", *SFT[1:], str(tmp_path), "--packing"]


def test_sft_leaves_the_flag_to_whoever_set_it(
    tmp_path: Path, launched: list[Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "off.yaml").write_text("use_chronicals: false\nnum_processes: 1\n")
    assert cli.main([*SFT, str(tmp_path), "--config", str(tmp_path / "off.yaml")]) == 0
    assert "--use_chronicals" not in launched[-1].training_script_args
    assert launched[-1].num_processes == 1
    # Of two values on a command line argparse takes the last, so the user's must come last.
    assert cli.main([*SFT, str(tmp_path), "--use_chronicals", "False"]) == 0
    arguments = launched[-1].training_script_args
    assert [b for a, b in itertools.pairwise(arguments) if a == "--use_chronicals"] == ["True", "False"]
    monkeypatch.setenv("CHRONICALS_USE_CHRONICALS", "0")
    assert cli.main([*SFT, str(tmp_path)]) == 0
    assert "--use_chronicals" not in launched[-1].training_script_args


@pytest.mark.parametrize("value", ['"false"', "0", "'no'"])
def test_sft_takes_a_quoted_flag_of_a_yaml_file(tmp_path: Path, launched: list[Namespace], value: str) -> None:
    (tmp_path / "off.yaml").write_text(f"use_chronicals: {value}\n")
    assert cli.main([*SFT, str(tmp_path), "--config", str(tmp_path / "off.yaml")]) == 0
    assert "--use_chronicals" not in launched[-1].training_script_args


def test_sft_refuses_a_flag_that_is_neither(
    tmp_path: Path, launched: list[Namespace], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "off.yaml").write_text("use_chronicals: 2\n")
    with pytest.raises(ValueError, match="use_chronicals must be one of true"):
        cli.main([*SFT, str(tmp_path), "--config", str(tmp_path / "off.yaml")])
    assert launched == []


def test_sft_refuses_bad_settings_before_it_launches(tmp_path: Path, launched: list[Namespace]) -> None:
    with pytest.raises(ValueError, match="Did you mean 'attention'"):
        cli.main([*SFT, str(tmp_path), "--chronicals_config", '{"atention": "off"}'])
    assert launched == []


@pytest.mark.parametrize(
    ("arguments", "yaml", "told"),
    [
        (["--lora_plus_ratio", "8"], "", '{"lora_plus_ratio": 8}'),
        (["--lora-plus-embedding-lr=1e-4", "--strict"], "", '{"lora_plus_embedding_lr": 0.0001, "strict": true}'),
        ([], "lora_plus_ratio: 4.5\nlora_plus: off\n", '{"lora_plus_ratio": 4.5, "lora_plus": false}'),
        (["--attention_backend", "sdpa"], "", '{"attention_backend": "sdpa"}'),
    ],
)  # fmt: skip
def test_sft_says_where_a_setting_of_ours_belongs(
    tmp_path: Path,
    launched: list[Namespace],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    yaml: str,
    told: str,
) -> None:
    (tmp_path / "c.yaml").write_text(yaml or "num_processes: 1\n")
    assert cli.main([*SFT, str(tmp_path), *arguments, "--config", str(tmp_path / "c.yaml")]) == 2
    text = capsys.readouterr().err
    assert f"--chronicals_config '{told}' on the command line" in text and f"chronicals_config: {told} in" in text
    assert launched == []
    (tmp_path / "right.yaml").write_text(f"chronicals_config: {told}\n")  # the remedy is one
    assert cli.main([*SFT, str(tmp_path), "--chronicals_config", told]) == 0
    assert cli.main([*SFT, str(tmp_path), "--config", str(tmp_path / "right.yaml")]) == 0


@pytest.mark.parametrize(("code", "shown"), [(3, 3), (-15, 143)])
def test_sft_ends_as_its_run_does(
    tmp_path: Path, launched: list[Namespace], monkeypatch: pytest.MonkeyPatch, code: int, shown: int
) -> None:
    """Without a traceback of the launcher's, which would be the last thing on the screen."""

    def fails(launch: Namespace) -> None:
        raise subprocess.CalledProcessError(code, ["python"])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fails)
    assert cli.main([*SFT, str(tmp_path)]) == shown


def test_sft_help_lists_the_flag(launched: list[Namespace], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["sft", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "--use_chronicals" in text
    assert "--packing" in text


def test_arguments_of_accelerate_are_taken_out_once_each() -> None:
    items = ["--packing", "--num_processes", "2", "--seed", "2"]
    assert cli._without(items, ["--num_processes", "2"]) == ["--packing", "--seed", "2"]
    assert cli._without(items, []) == items
