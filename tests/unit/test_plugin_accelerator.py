"""How ChronicalsPlugin sits in an accelerator, ChronicalsAccelerator, and what of it the environment sets."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from accelerate import Accelerator

from chronicals_trl import ChronicalsAccelerator, ChronicalsConfig, ChronicalsPlugin
from chronicals_trl.config import PARTS
from chronicals_trl.model.patch import is_patched, patch_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

LR = 1e-3


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def adam(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)


def loss(model: Any) -> float:
    return model(**tiny_models.packed_batch(), use_cache=False, fused_lm_head=True).loss.item()


# -- ChronicalsAccelerator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"attention": "off"}, json.dumps({"attention": "off"}), ChronicalsConfig(attention="off"),
     ChronicalsPlugin({"attention": "off"})],
    ids=["dict", "json", "config", "plugin"],
)  # fmt: skip
def test_takes_a_plugin_or_its_settings_beside_accelerate_s_own_arguments(given: Any) -> None:
    accelerator = ChronicalsAccelerator(cpu=True, gradient_accumulation_steps=3, chronicals_plugin=given)
    assert isinstance(accelerator, Accelerator) and accelerator.gradient_accumulation_steps == 3
    assert accelerator.chronicals_plugin is given or not isinstance(given, ChronicalsPlugin)
    model = accelerator.prepare(tiny_models.build("llama"))
    assert is_patched(model)
    [report] = accelerator.chronicals_plugin.reports
    assert report["attention"].state == "off" and report["head"].state == "on"
    with pytest.raises(ValueError, match="attached already"):
        ChronicalsPlugin().attach(accelerator)


def test_a_wrong_setting_shows_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "__init__", lambda *args, **kwargs: pytest.fail("the process group would start"))
    with pytest.raises(ValueError, match="atention"):
        ChronicalsAccelerator(chronicals_plugin={"atention": "off"})


@pytest.mark.parametrize("attached", [False, True])
def test_copies_go_on_patching(attached: bool) -> None:
    """Accelerate's own objects can be pickled; a deep copy of one is itself."""
    original = (
        ChronicalsPlugin({"head": "off"}).attach(Accelerator(cpu=True))
        if attached
        else ChronicalsAccelerator(cpu=True, chronicals_plugin={"head": "off"})
    )
    assert copy.deepcopy(original) is original
    loaded = pickle.loads(pickle.dumps(original))
    assert type(loaded) is type(original)
    model = loaded.prepare(tiny_models.build("llama"))
    assert is_patched(model) and loaded._models == [model] and original._models == []
    assert [report["head"].state for report in loaded.chronicals_plugin.reports] == ["off"]
    assert original.chronicals_plugin.reports == []
    assert is_patched(original.prepare(tiny_models.build("llama")))


def test_accelerators_share_their_state_but_not_the_plugin() -> None:
    ours = ChronicalsAccelerator(cpu=True)
    stock, other = Accelerator(cpu=True), ChronicalsAccelerator(cpu=True, chronicals_plugin={"rms_norm": "off"})
    assert stock.state.__dict__ is ours.state.__dict__
    assert is_patched(ours.prepare(tiny_models.build("llama")))
    assert not is_patched(stock.prepare(tiny_models.build("llama")))
    other.prepare(tiny_models.build("llama"))
    assert [len(each.chronicals_plugin.reports) for each in (ours, other)] == [1, 1]
    assert other.chronicals_plugin.reports[0]["rms_norm"].state == "off"


# -- what is prepared, and how often ---------------------------------------------------------------------------------


def test_prepare_model_patches_too() -> None:
    """prepare calls it for each model; on its own it is a call of the user's."""
    accelerator = ChronicalsAccelerator(cpu=True)
    model = accelerator.prepare_model(lora(), True)
    [report] = accelerator.chronicals_plugin.reports
    assert is_patched(model) and report["lora"].state == "on"
    assert report["lora_plus"].omitted and "prepare_model takes no optimizer" in report["lora_plus"].reason
    accelerator.prepare(tiny_models.build("llama"))
    assert len(accelerator.chronicals_plugin.reports) == 2
    assert accelerator.prepare_model(torch.nn.Linear(2, 2)) is not None
    assert len(accelerator.chronicals_plugin.reports) == 2


def test_a_model_for_evaluation_alone() -> None:
    """Its adapters may be trainable: without an optimizer LoRA+ has nothing to do, which is no omission."""
    accelerator = ChronicalsAccelerator(cpu=True, chronicals_plugin={"strict": True})
    model = accelerator.prepare_model(lora(), evaluation_mode=True)
    [report] = accelerator.chronicals_plugin.reports
    assert "evaluation_mode=True" in report["lora_plus"].reason and not report["lora_plus"].omitted
    with torch.no_grad():
        assert loss(model.eval()) == pytest.approx(loss(patched(lora()).eval()), rel=1e-6)
    with pytest.raises(RuntimeError, match="lora_plus is off: prepare_model takes no optimizer"):
        accelerator.prepare_model(lora())


def patched(model: Any) -> Any:
    patch_model(model)
    return model


def test_preparing_twice_is_preparing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate returns what it has prepared as it is. Patched anew, its forward would lose autocast."""
    accelerator = ChronicalsAccelerator(cpu=True)
    monkeypatch.setitem(accelerator.state.__dict__, "_mixed_precision", "bf16")  # other tests share the state
    accelerator.native_amp = True
    model = tiny_models.build("llama")
    model, _ = accelerator.prepare(model, adam(model))
    before, forward = loss(model), model.__dict__["forward"]
    assert accelerator.prepare(model) is model and accelerator.prepare_model(model) is model
    assert model.__dict__["forward"] is forward
    assert loss(model) == before
    assert len(accelerator.chronicals_plugin.reports) == 1
    assert before != pytest.approx(loss(patched(tiny_models.build("llama"))), rel=1e-7), "autocast was on"


def test_models_that_cannot_be_patched_are_reported() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_models.build("llama")

    accelerator = ChronicalsAccelerator(cpu=True)
    assert not is_patched(accelerator.prepare(Wrapper()))
    assert not is_patched(accelerator.prepare(Accelerator(cpu=True).prepare(tiny_models.build("llama"))))
    inside, late = accelerator.chronicals_plugin.reports
    assert "inside of a Wrapper" in inside["rms_norm"].reason
    assert "prepared the model already" in late["head"].reason
    strict = ChronicalsAccelerator(cpu=True, chronicals_plugin={"strict": True})
    with pytest.raises(RuntimeError, match="rms_norm is off: the model is inside of a Wrapper"):
        strict.prepare(Wrapper())
    model = lora()  # around which everything is as PEFT has it
    assert is_patched(accelerator.prepare(model)) and accelerator.chronicals_plugin.reports[2]["lora"].state == "on"


def test_behind_torch_compile() -> None:
    model = tiny_models.build("llama")
    accelerator = ChronicalsAccelerator(cpu=True)
    compiled = accelerator.prepare(torch.compile(model, backend="eager"))
    assert is_patched(model) and accelerator.chronicals_plugin.reports[0]["head"].state == "on"
    assert loss(compiled) == pytest.approx(loss(patched(tiny_models.build("llama"))), rel=1e-6)


def test_when_accelerate_refuses_all_is_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a model and optimizer must be passed together")

    stock = Accelerator.prepare
    monkeypatch.setattr(Accelerator, "prepare", lambda *args, **kwargs: refusal(*args, **kwargs))
    refusal = refuse
    accelerator = ChronicalsAccelerator(cpu=True)
    model = lora()
    optimizer = adam(model)
    with pytest.raises(ValueError, match="must be passed together"):
        accelerator.prepare(model, optimizer)
    assert not is_patched(model) and [group["lr"] for group in optimizer.param_groups] == [LR]
    assert accelerator.chronicals_plugin.reports == []
    refusal = stock
    accelerator.prepare(model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, 16 * LR]


def test_unverified_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = ChronicalsAccelerator(cpu=True)
    tensors = SimpleNamespace(tp_enabled=True)
    monkeypatch.setattr(Accelerator, "parallelism_config", property(lambda self: tensors))
    monkeypatch.setattr(Accelerator, "prepare_model", lambda self, model, **kwargs: model)
    report = ChronicalsPlugin()
    report._around(lambda: None, accelerator, [model := tiny_models.build("llama")], [], None)
    assert "tp_size > 1" in report.reports[0]["rms_norm"].reason and not is_patched(model)


def test_processes_that_do_not_know_of_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = ChronicalsAccelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    accelerator.prepare(tiny_models.build("llama"))
    [report] = accelerator.chronicals_plugin.reports
    assert any("do not know of each other" in note for note in report.notes)


def test_a_part_that_is_off_on_another_rank_is_off_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(told: list[tuple[dict[str, str], str | None]]) -> list[tuple[dict[str, str], str | None]]:
        facts, error = told[0]
        return [*told, ({**facts, "gated_mlp": "off"} if "gated_mlp" in facts else facts, error)]

    monkeypatch.setattr("chronicals_trl._agreement.gather_object", other)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    accelerator = ChronicalsAccelerator(cpu=True)
    accelerator.prepare(tiny_models.build("llama"))
    [report] = accelerator.chronicals_plugin.reports
    assert report["gated_mlp"].reason == "off on another rank" and report["rms_norm"].state == "on"


def test_ranks_with_other_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(told: list[tuple[dict[str, str], str | None]]) -> list[tuple[dict[str, str], str | None]]:
        facts, error = told[0]
        return [*told, ({**facts, "chronicals_config: strict": "True"}, error)]

    monkeypatch.setattr("chronicals_trl._agreement.gather_object", other)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    model = tiny_models.build("llama")
    with pytest.raises(ValueError, match="strict is False on rank 0 and True on rank 1"):
        ChronicalsAccelerator(cpu=True).prepare(model)
    assert not is_patched(model)


# -- the environment -------------------------------------------------------------------------------------------------

OTHER_VALUES: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(PARTS, ("off", "off")),
    "strict": ("true", True),
    "recompute_mlp": ("0", False),
    "attention_backend": ("sdpa", "sdpa"),
    "logit_budget_mib": ("135", 135),
    "packing_window": ("77", 77),
    "profile_steps": ("3", 3),
    "balance_ranks": ("no", False),
    "padding_free": ("off", "off"),
    "health": ("off", "off"),
    "lora_plus_ratio": ("8", 8.0),
    "lora_plus_embedding_lr": ("1e-6", 1e-6),
}


def test_the_list_has_every_setting() -> None:
    assert list(OTHER_VALUES) == list(ChronicalsConfig().to_dict())


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_each_setting_has_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = OTHER_VALUES[name]
    monkeypatch.setenv(f"CHRONICALS_{name.upper()}", text)
    defaults = ChronicalsConfig().to_dict()
    assert defaults[name] != value
    config = ChronicalsAccelerator(cpu=True).chronicals_plugin.config
    assert isinstance(config, ChronicalsConfig) and config.to_dict() == {**defaults, name: value}
    explicit = ChronicalsPlugin({name: defaults[name]}).config
    assert isinstance(explicit, ChronicalsConfig) and explicit.to_dict() == defaults


@pytest.mark.parametrize(
    ("given", "text", "on"),
    [(None, None, True), (None, " ", True), (None, "1", True), (None, "off", False), (None, "0", False),
     (True, "0", True), (False, "1", False), (False, None, False)],
)  # fmt: skip
def test_one_variable_switches_it_off(
    given: bool | None, text: str | None, on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CHRONICALS_USE_CHRONICALS", raising=False)
    if text is not None:
        monkeypatch.setenv("CHRONICALS_USE_CHRONICALS", text)
    found = ChronicalsPlugin({"strict": True, "head": "on"}, use_chronicals=given)
    model = lora()
    optimizer = adam(model)
    found.attach(Accelerator(cpu=True)).prepare(model, optimizer)
    [report] = found.reports
    assert is_patched(model) == on == (report["head"].state == "on")
    assert len(optimizer.param_groups) == 1 + on
    assert on or {part.reason for part in report.parts} == {"use_chronicals=False"}
    assert on or "use_chronicals=False" in capsys.readouterr().out


def test_switched_off_the_same_loop_runs_and_gives_the_same_loss() -> None:
    """`fused_lm_head=True` stays in the loop: transformers passes on what it does not know."""
    stock = ChronicalsPlugin(use_chronicals=False).attach(Accelerator(cpu=True)).prepare(tiny_models.build("llama"))
    ours = ChronicalsAccelerator(cpu=True).prepare(tiny_models.build("llama"))
    assert not is_patched(stock)
    assert loss(stock) == pytest.approx(loss(ours), rel=1e-5)
    unpatched = ChronicalsPlugin(use_chronicals=False).attach(Accelerator(cpu=True)).prepare(patched(lora()))
    assert not is_patched(unpatched)


@pytest.mark.parametrize(
    ("variable", "words"),
    [("CHRONICALS_USE_CHRONICALS", "must be one of true"), ("CHRONICALS_USE_CHRONICLES", "Did you mean")],
)
def test_a_wrong_variable_is_an_error(variable: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "fast")
    with pytest.raises(ValueError, match=words):
        ChronicalsPlugin(ChronicalsConfig())
