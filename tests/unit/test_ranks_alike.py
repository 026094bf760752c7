"""What ranks compare before they train, one rank at a time: the gather of text is a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from chronicals_trl import _agreement
from chronicals_trl._agreement import compare_starts, lone_note, patch_alike, started_with
from chronicals_trl._environment import ENV_PREFIX
from chronicals_trl.config import PARTS, ChronicalsConfig
from chronicals_trl.report import ActivationReport, PartReport

Told = tuple[dict[str, str], str | None]
Others = Callable[..., None]
ENVIRONMENT = _agreement._ENVIRONMENT


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    """Sets what the other ranks tell: functions of what this one, rank 0, does."""

    def say(*ranks: Callable[[Told], Told]) -> None:
        monkeypatch.setattr(
            _agreement, "gather_object", lambda told: [told[0], *(rank(told[0]) for rank in ranks)]
        )  # fmt: skip

    return say


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(told: Any) -> Any:
        raise AssertionError("there is nobody to ask")

    monkeypatch.setattr(_agreement, "gather_object", nobody)


def with_facts(**facts: str) -> Callable[[Told], Told]:
    return lambda told: ({**told[0], **facts}, told[1])


def same(told: Told) -> Told:
    return told


def failing(message: str) -> Callable[[Told], Told]:
    return lambda told: ({}, message)


# -- what is told ----------------------------------------------------------------------------------------------------


def test_with_the_flag_off_nothing_but_the_flag_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}HEAD", "off")
    arguments = SimpleNamespace(max_length=3)
    assert started_with(None, arguments) == {"use_chronicals": "False", ENVIRONMENT: f"{ENV_PREFIX}HEAD=off"}


def test_settings_arguments_and_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STRICT", "HEAD"):
        monkeypatch.setenv(f"{ENV_PREFIX}{name}", "auto")
    monkeypatch.setattr(_agreement, "installed", lambda name: {"triton": "3.6"}.get(name))
    config = ChronicalsConfig(logit_budget_mib=77)
    facts = started_with(config, SimpleNamespace(max_length=96, seed=7, of_no_interest=1))
    assert facts["use_chronicals"] == "True"
    assert facts[ENVIRONMENT] == f"{ENV_PREFIX}HEAD=auto, {ENV_PREFIX}STRICT=auto"
    settings = {name.partition(": ")[2] for name in facts if name.startswith("chronicals_config: ")}
    assert settings == set(config.to_dict()) and facts["chronicals_config: logit_budget_mib"] == "77"
    assert {name for name in facts if name.startswith("argument ")} == {"argument max_length", "argument seed"}
    assert facts["argument max_length"] == "96"
    assert facts["version of triton"] == "3.6" and facts["version of deepspeed"] == "not installed"
    assert {"version of torch", "version of trl", "version of datasets", "version of Python"} <= facts.keys()


def test_the_arguments_are_those_of_an_sft_config() -> None:
    """One that TRL renames would be compared no more, without a word."""
    from chronicals_trl import SFTConfig

    assert all(name in SFTConfig.__dataclass_fields__ for name in _agreement._ARGUMENTS)


def test_no_variables_are_told_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in _agreement.os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    assert started_with(None)[ENVIRONMENT] == "none"


# -- compared --------------------------------------------------------------------------------------------------------


def compare(ranks: int = 3, **facts: str) -> Any:
    return compare_starts(lambda: ("result", facts), ranks)


def test_alike(others: Others) -> None:
    others(same, with_facts(**{ENVIRONMENT: "of its own"}))
    assert compare(a="1", **{ENVIRONMENT: "none"}) == "result"


def test_one_rank_asks_nobody(alone: None) -> None:
    assert compare(ranks=1, a="1") == "result"


def test_what_differs_is_named_with_the_first_rank_that_differs(others: Others) -> None:
    others(same, with_facts(b="3"), with_facts(b="4", only_there="5"))
    with pytest.raises(ValueError) as told:
        compare(a="1", b="2", **{ENVIRONMENT: "none"})
    text = str(told.value)
    assert "not started alike: b is 2 on rank 0 and 3 on rank 2; only_there is None on rank 0 and 5 on rank 3." in text
    assert "environment variables CHRONICALS" not in text  # which explain settings alone


@pytest.mark.parametrize("name", ["chronicals_config: head", "use_chronicals"])
def test_variables_are_told_beside_a_setting(others: Others, name: str) -> None:
    others(with_facts(**{name: "other", ENVIRONMENT: "X=1"}))
    with pytest.raises(ValueError, match=r"environment variables CHRONICALS_\* is none on rank 0 and X=1 on rank 1"):
        compare(**{name: "one", ENVIRONMENT: "none"})


def test_of_a_rank_without_the_flag_nothing_else_is_told(others: Others) -> None:
    others(lambda told: ({"use_chronicals": "False", ENVIRONMENT: "none"}, None))
    with pytest.raises(ValueError) as told:
        compare(**{"use_chronicals": "True", "chronicals_config: head": "'auto'", ENVIRONMENT: "none"})
    assert "use_chronicals is True on rank 0 and False on rank 1" in str(told.value)
    assert "head" not in str(told.value)


def test_a_few_are_shown_and_the_rest_counted(others: Others) -> None:
    others(with_facts(**dict.fromkeys("abcdef", "2")))
    with pytest.raises(ValueError) as told:
        compare(**dict.fromkeys("abcdef", "1"))
    assert "d is 1 on rank 0 and 2 on rank 1; and 2 more. Start all" in str(told.value)


def test_an_error_here_is_itself_whatever_the_others_say(others: Others) -> None:
    heard: list[Told] = []

    def listening(told: Told) -> Told:
        heard.append(told)
        return {}, "KeyError: there"

    def prepare() -> Any:
        raise LookupError("here")

    others(listening)
    with pytest.raises(LookupError, match="here"):
        compare_starts(prepare, 2)
    assert heard == [({}, "LookupError: here")]  # or it would wait for us


def test_an_error_of_another_rank_is_one_here(others: Others) -> None:
    others(same, failing("ValueError: no text"))
    with pytest.raises(RuntimeError, match=r"Rank 2 cannot start, so none does. It says: ValueError: no text"):
        compare(a="1")


@pytest.mark.parametrize(
    ("world_size", "ranks", "told"),
    [("2", 1, True), ("2", 2, False), ("1", 1, False), (None, 1, False), ("x", 1, False)],
)
def test_processes_that_do_not_know_of_each_other(
    world_size: str | None, ranks: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What two processes on CPUs are, where Accelerate was not told to use these: two trainings in one folder."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    note = lone_note(ranks)
    assert (note is not None) is told
    assert not told or ("2 processes were started" in str(note) and "ACCELERATE_USE_CPU=1" in str(note))


# -- the parts of a model --------------------------------------------------------------------------------------------


class Patching:
    """In the place of a patch: notes what is left out, and takes out `off` by itself."""

    def __init__(self, *off: str) -> None:
        self.calls: list[dict[str, str]] = []
        self.off = off

    def __call__(self, leave_out: dict[str, str]) -> ActivationReport:
        self.calls.append(leave_out)
        off = {*self.off, *leave_out}
        return ActivationReport(
            [PartReport(name, "off" if name in off else "on", reason=leave_out.get(name)) for name in PARTS]
        )


def test_parts_are_on_where_all_ranks_have_them(others: Others) -> None:
    patch = Patching("lora")
    others(with_facts(head="off"), with_facts(head="off", attention="off"), with_facts(lora="on"))
    report = patch_alike(patch, nn.Linear(2, 2), 4)
    assert patch.calls == [{}, dict.fromkeys(("attention", "head", "lora"), "off on another rank")]
    assert report["head"].reason == "off on another rank" and report["rms_norm"].state == "on"


def test_ranks_that_are_alike_patch_once(others: Others) -> None:
    patch = Patching("lora")
    others(same)
    assert patch_alike(patch, nn.Linear(2, 2), 2)["lora"].state == "off" and patch.calls == [{}]


@pytest.mark.parametrize(("here", "there"), [("on", "off"), ("off", "on"), ("on", "on"), ("off", "off")])
def test_what_is_no_part_is_on_where_all_ranks_have_it_too(others: Others, here: str, there: str) -> None:
    patch = Patching()
    others(with_facts(padding_free=there))
    patch_alike(patch, nn.Linear(2, 2), 2, lambda: {"padding_free": here})
    assert patch.calls == [{}] + [{"padding_free": "off on another rank"}] * (here != there)


def test_one_rank_patches_without_asking(alone: None) -> None:
    patch = Patching()
    assert patch_alike(patch, nn.Linear(2, 2), 1)["head"].state == "on" and patch.calls == [{}]


def test_ranks_with_other_models_are_refused(others: Others) -> None:
    others(lambda told: ({**told[0], "the model": _agreement._describe(nn.Linear(3, 2)), "head": "off"}, None))
    with pytest.raises(ValueError) as told:
        patch_alike(Patching(), nn.Linear(2, 2), 2)
    assert (
        "the model is a Linear of 2 tensors (6 numbers), 2 of them trained, on rank 0 and a Linear of 2 tensors "
        "(8 numbers), 2 of them trained, on rank 1"
    ) in str(told.value)
    assert "head" not in str(told.value)  # that would be mended, not refused


def test_weights_that_are_not_here_yet_count() -> None:
    """ZeRO-3 leaves an empty tensor that knows how many numbers it stands for."""
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(model.weight.new_empty(0), requires_grad=False)
    model.weight.ds_numel = 400  # type: ignore[assignment]
    assert _agreement._describe(model) == "a Linear of 2 tensors (402 numbers), 1 of them trained,"
