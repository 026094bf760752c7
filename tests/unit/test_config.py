"""ChronicalsConfig and SFTConfig: precedence, validation, errors, parsers, pickling."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import HfArgumentParser
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import TrlParser

from chronicals_trl import _environment, _versions
from chronicals_trl.config import PARTS, ChronicalsConfig, SFTConfig


def make_args(tmp_path: Path, **settings: Any) -> SFTConfig:
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)


def test_defaults() -> None:
    config = ChronicalsConfig()
    assert {getattr(config, part) for part in PARTS} == {"auto"}
    assert (config.strict, config.attention_backend, config.logit_budget_mib) == (False, "auto", None)
    assert (config.balance_ranks, config.health) == (True, "warn")
    assert (config.packing_window, config.lora_plus_ratio, config.lora_plus_embedding_lr) == (10_000, 16.0, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.strict = True  # type: ignore[misc]


def test_a_setting_of_ours_among_the_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"chronicals_config=\{'strict': True, 'lora_plus_ratio': 8\}"):
        make_args(tmp_path, strict=True, lora_plus_ratio=8)
    assert make_args(tmp_path, packing=True).packing is True  # TRL's, and a part of ours
    with pytest.raises(TypeError, match="unexpected keyword argument 'use_chronicles'"):
        make_args(tmp_path, use_chronicles=True)

    @dataclasses.dataclass
    class Strict(SFTConfig):
        strict: bool = False

    assert Strict(str(tmp_path), use_cpu=True, bf16=False, report_to="none", strict=True).strict


def test_precedence_is_explicit_then_environment_then_default() -> None:
    environ = {"CHRONICALS_HEAD": "off", "CHRONICALS_LOGIT_BUDGET_MIB": "64", "CHRONICALS_USE_CHRONICALS": "1"}
    config = ChronicalsConfig.resolve({"head": "on"}, environ)
    assert (config.head, config.logit_budget_mib, config.lora) == ("on", 64, "auto")


def test_resolve_takes_dict_json_config_and_none() -> None:
    expected = ChronicalsConfig(attention="off", lora_plus_ratio=4)
    settings = {"attention": "off", "lora_plus_ratio": 4}
    assert ChronicalsConfig.resolve(settings, {}) == expected
    assert ChronicalsConfig.resolve(json.dumps(settings), {}) == expected
    assert ChronicalsConfig.resolve(expected, {"CHRONICALS_ATTENTION": "on"}) is expected
    assert ChronicalsConfig.resolve(None, {}) == ChronicalsConfig()
    assert ChronicalsConfig.resolve(expected.to_dict(), {}) == expected


def test_resolve_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHRONICALS_PACKING", "off")
    assert ChronicalsConfig.resolve().packing == "off"


def test_booleans_and_case_of_parts() -> None:
    config = ChronicalsConfig.resolve({"head": False, "lora": True, "qk_rope": "OFF", "health": False}, {})
    assert (config.head, config.lora, config.qk_rope, config.health) == ("off", "on", "off", "off")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("HEAD", "on", "on"),
        ("HEAD", "0", "off"),
        ("HEAD", "Auto", "auto"),
        ("STRICT", "yes", True),
        ("STRICT", "off", False),
        ("RECOMPUTE_MLP", "1", True),
        ("LOGIT_BUDGET_MIB", " 135 ", 135),
        ("LORA_PLUS_RATIO", "8", 8.0),
        ("LORA_PLUS_EMBEDDING_LR", "1e-4", 1e-4),
        ("LORA_PLUS_EMBEDDING_LR", "none", None),
        ("ATTENTION_BACKEND", "sdpa", "sdpa"),
        ("HEALTH", "Stop", "stop"),
        ("HEALTH", "off", "off"),
    ],
)
def test_environment_values(key: str, text: str, value: Any) -> None:
    config = ChronicalsConfig.resolve(None, {f"CHRONICALS_{key}": text})
    found = getattr(config, key.lower())
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"atention": "off"}, ValueError, ["'atention'", "'attention'", "Allowed:", "lora_plus_ratio"]),
        ({"attention": "flash_attn_2"}, ValueError, ["'auto', 'on', 'off'", "attention_backend='flash_attn_2'"]),
        ({"head": "onn"}, ValueError, ["head", "'onn'", "'auto', 'on', 'off'", "Did you mean 'on'"]),
        ({"head": 3}, TypeError, ["head", "3", "int", "'auto', 'on', 'off'"]),
        ({"head": None}, TypeError, ["head", "None"]),
        ({"strict": "true"}, TypeError, ["strict", "'true'", "true or false"]),
        ({"attention_backend": "flash"}, ValueError, ["attention_backend", "'flash'", "'varlen'", "flash_attn_4"]),
        ({"logit_budget_mib": 0}, ValueError, ["logit_budget_mib", "0", "at least 1"]),
        ({"logit_budget_mib": True}, TypeError, ["logit_budget_mib", "True"]),
        ({"balance_ranks": "auto"}, TypeError, ["balance_ranks", "'auto'", "true or false"]),
        ({"health": "stopp"}, ValueError, ["health", "'stopp'", "'warn', 'stop', 'off'", "Did you mean 'stop'"]),
        ({"health": True}, TypeError, ["health", "True", "'warn', 'stop', 'off'"]),
        ({"packing_window": 1.5}, TypeError, ["packing_window", "1.5", "integer"]),
        ({"lora_plus_ratio": -1}, ValueError, ["lora_plus_ratio", "-1", "above 0"]),
        ({"lora_plus_ratio": float("nan")}, ValueError, ["lora_plus_ratio", "nan"]),
        ({"lora_plus_ratio": 10**400}, ValueError, ["lora_plus_ratio", "finite"]),
        ({"lora_plus_ratio": "nan"}, ValueError, ["lora_plus_ratio", "nan", "above 0"]),
        ({"lora_plus_ratio": "-8"}, ValueError, ["lora_plus_ratio", "-8", "above 0"]),
        ({"lora_plus_embedding_lr": "fast"}, TypeError, ["lora_plus_embedding_lr", "'fast'"]),
        ("{head: off}", ValueError, ["chronicals_config", "JSON", "{head: off}"]),
        ("[1]", TypeError, ["chronicals_config", "dict", "list"]),
        (7, TypeError, ["chronicals_config", "7", "int"]),
    ],
)
def test_bad_settings_name_key_value_and_remedy(settings: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        ChronicalsConfig.resolve(settings, {})
    for word in ["chronicals_config", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text", "error", "words"),
    [
        ("CHRONICALS_HAED", "on", ValueError, ["CHRONICALS_HAED", "CHRONICALS_HEAD"]),
        ("CHRONICALS_STRICT", "maybe", TypeError, ["CHRONICALS_STRICT", "'maybe'"]),
        ("CHRONICALS_LOGIT_BUDGET_MIB", "1.5", TypeError, ["CHRONICALS_LOGIT_BUDGET_MIB", "1.5"]),
        ("CHRONICALS_LORA", "of", ValueError, ["CHRONICALS_LORA", "'of'", "'off'"]),
    ],
)
def test_bad_environment_names_the_variable(
    variable: str, text: str, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        ChronicalsConfig.resolve({}, {variable: text})
    for word in ["environment variable", *words]:
        assert word.lower() in str(caught.value).lower()


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ValueError, match="logit_budget_mib"):
        ChronicalsConfig(logit_budget_mib=-5)
    assert ChronicalsConfig(head=False).head == "off"  # type: ignore[arg-type]


def test_sft_config_keeps_a_plain_dict_of_what_was_given(tmp_path: Path) -> None:
    for given in (
        {"head": False, "logit_budget_mib": 8},
        '{"head": "off", "logit_budget_mib": 8}',
    ):
        args = make_args(tmp_path, chronicals_config=given)
        assert args.chronicals_config == {"head": "off", "logit_budget_mib": 8}
        assert type(args.chronicals_config) is dict
    json.dumps(args.to_dict())
    whole = ChronicalsConfig(head="off")
    assert make_args(tmp_path, chronicals_config=whole).chronicals_config == whole.to_dict()
    assert make_args(tmp_path).chronicals_config is None


def test_sft_config_refuses_bad_settings_even_with_the_flag_off(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'atention'"):
        make_args(tmp_path, chronicals_config={"atention": "off"})


def test_sft_config_reports_a_bad_value_in_the_environment_when_the_flag_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHRONICALS_HEAD", "of")
    make_args(tmp_path)
    with pytest.raises(ValueError, match="CHRONICALS_HEAD"):
        make_args(tmp_path, use_chronicals=True)


@pytest.mark.parametrize(("text", "expected"), [(None, False), ("1", True), ("True", True), ("off", False)])
def test_flag_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, expected: bool
) -> None:
    if text is not None:
        monkeypatch.setenv("CHRONICALS_USE_CHRONICALS", text)
    assert make_args(tmp_path).use_chronicals is expected
    assert make_args(tmp_path, use_chronicals=False).use_chronicals is False
    assert make_args(tmp_path, use_chronicals=True).use_chronicals is True


def test_flag_in_the_environment_must_be_a_truth_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHRONICALS_USE_CHRONICALS", "perhaps")
    with pytest.raises(ValueError, match=r"CHRONICALS_USE_CHRONICALS.*perhaps"):
        make_args(tmp_path)


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
def test_parsers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parser_class: type) -> None:
    parser = parser_class(SFTConfig)
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--report_to", "none"]

    def parse(*extra: str) -> SFTConfig:
        return parser.parse_args_into_dataclasses(args=[*common, *extra])[0]

    assert parse().use_chronicals is False
    assert parse("--use_chronicals").use_chronicals is True
    on = parse("--use_chronicals", "True", "--chronicals_config", '{"strict": true, "head": "off"}')
    assert (on.use_chronicals, on.chronicals_config) == (True, {"strict": True, "head": "off"})
    # The parser must not turn "not given" into an explicit False, which would beat the environment.
    monkeypatch.setenv("CHRONICALS_USE_CHRONICALS", "1")
    assert parse().use_chronicals is True
    assert parse("--use_chronicals", "False").use_chronicals is False
    assert "--use_chronicals" in parser.format_help()


def test_yaml_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHRONICALS_LORA", raising=False)
    path = tmp_path / "train.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nreport_to: none\nuse_chronicals: true\n"
        "chronicals_config:\n  attention: off\n  head: on\n  logit_budget_mib: 32\n"
    )
    (args,) = TrlParser(SFTConfig).parse_args_and_config(["--config", str(path)])
    assert args.use_chronicals is True
    assert args.chronicals_config == {"attention": "off", "head": "on", "logit_budget_mib": 32}
    (args,) = TrlParser(SFTConfig).parse_args_and_config(["--config", str(path), "--use_chronicals", "False"])
    assert args.use_chronicals is False


def test_arguments_pickle_copy_and_survive_torch_save(tmp_path: Path) -> None:
    args = make_args(tmp_path, use_chronicals=True, chronicals_config={"head": "off"})
    for again in (pickle.loads(pickle.dumps(args)), dataclasses.replace(args)):
        assert again.use_chronicals is True
        assert again.chronicals_config == {"head": "off"}
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.to_dict() == args.to_dict()


def test_fields_added_to_trls_are_only_the_two() -> None:
    base = SFTConfig.__mro__[1]  # not by its place in trl, where a test before this one may have put ours
    assert base.__module__ == "trl.trainer.sft_config"
    stock = {field.name for field in dataclasses.fields(base)}
    assert {field.name for field in dataclasses.fields(SFTConfig)} - stock == {"use_chronicals", "chronicals_config"}


def test_arguments_without_the_field_count_as_off() -> None:
    # What stock TRL pickled has no such attribute on the instance; the class's default must not read as "on".
    assert not SFTConfig.use_chronicals


def test_too_old_library_is_an_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _versions.installed
    monkeypatch.setattr(_versions, "installed", lambda name: "1.14.0" if name == "trl" else real(name))
    with pytest.raises(ImportError, match=r"trl>=1\.15 \(found 1\.14\.0\).*pip install -U 'trl>=1\.15'"):
        make_args(tmp_path, use_chronicals=True)
    assert make_args(tmp_path).use_chronicals is False


def test_missing_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_versions, "installed", lambda name: None if name == "accelerate" else "99.0")
    with pytest.raises(ImportError, match=r"accelerate>=1\.12 \(found none\)"):
        _versions.check_floors()


@pytest.mark.parametrize(
    ("name", "version", "enough"),
    [("torch", "2.11.0", True), ("torch", "2.11.0a0+nv26.1", True), ("torch", "2.10.1", False), ("trl", "2.0", True)],
)
def test_floor_comparison(name: str, version: str, enough: bool) -> None:
    assert _versions.meets_floor(name, version) is enough


def test_newer_than_tested_goes_by_minor_release() -> None:
    assert not _versions.newer_than_tested("trl", "1.16.3")
    assert _versions.newer_than_tested("trl", "1.17.0")
    assert not _versions.newer_than_tested("trl", "1.15.0")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("off", False), ("false", False), (" No ", False), (0, False), ("0", False), (False, False),
     ("on", True), ("True", True), ("yes", True), (1, True), (True, True)],
)  # fmt: skip
def test_the_flag_takes_the_usual_words(tmp_path: Path, value: Any, expected: bool) -> None:
    assert make_args(tmp_path, use_chronicals=value).use_chronicals is expected


@pytest.mark.parametrize(
    ("value", "error"), [("maybe", ValueError), (2, ValueError), ("", ValueError), (0.5, TypeError)]
)
def test_the_flag_refuses_all_else(tmp_path: Path, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="use_chronicals must be"):
        make_args(tmp_path, use_chronicals=value)


def test_a_flag_of_none_looks_at_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_args(tmp_path, use_chronicals=None).use_chronicals is False
    monkeypatch.setenv("CHRONICALS_USE_CHRONICALS", "1")
    assert make_args(tmp_path, use_chronicals=None).use_chronicals is True


def test_a_misspelt_variable_is_an_error_with_the_flag_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHRONICALS_USE_CHRONICAL", "1")
    with pytest.raises(ValueError, match="Did you mean 'CHRONICALS_USE_CHRONICALS'"):
        make_args(tmp_path)


def test_the_environments_names_are_the_configurations_fields() -> None:
    assert tuple(field.name for field in dataclasses.fields(ChronicalsConfig)) == _environment.FIELDS


# -- copies to the GPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, True),
        ({"even_batches": True}, True),
        ('{"split_batches": false}', True),
        ({"non_blocking": False}, False),
        ('{"non_blocking": false}', False),
        ({"non_blocking": True}, True),
        (AcceleratorConfig(), False),
    ],
)
def test_copies_do_not_block_unless_the_user_says_so(tmp_path: Path, given: Any, expected: bool) -> None:
    def non_blocking(**settings: Any) -> bool:
        # A copy: what is set in the one must not be what the next is given.
        args = SFTConfig(
            output_dir=str(tmp_path), bf16=False, report_to="none", accelerator_config=copy.copy(given), **settings
        )
        return args.accelerator_config.non_blocking

    stock = isinstance(given, dict) and given.get("non_blocking", False)
    assert non_blocking(use_chronicals=True) == expected
    assert non_blocking(use_chronicals=False) == stock
    # From pageable memory a copy waits all the same, and transformers warns.
    assert non_blocking(use_chronicals=True, dataloader_pin_memory=False) == stock
    assert non_blocking(use_chronicals=True, use_cpu=True) == stock


def test_a_file_says_whether_copies_block(tmp_path: Path) -> None:
    (tmp_path / "accelerator.json").write_text('{"split_batches": false}')
    args = SFTConfig(
        output_dir=str(tmp_path), bf16=False, report_to="none", use_chronicals=True,
        accelerator_config=str(tmp_path / "accelerator.json"),
    )  # fmt: skip
    assert args.accelerator_config.non_blocking is False


def test_a_rate_that_yaml_reads_as_text() -> None:
    settings = yaml.safe_load("{lora_plus_embedding_lr: 1e-4, lora_plus_ratio: '8'}")
    assert settings == {"lora_plus_embedding_lr": "1e-4", "lora_plus_ratio": "8"}
    config = ChronicalsConfig.resolve(settings)
    assert (config.lora_plus_embedding_lr, config.lora_plus_ratio) == (1e-4, 8.0)
