"""What a layer keeps, how many may keep it, and whether a setting was the user's own; without a GPU."""

from __future__ import annotations

import ast
import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from trl import ModelConfig, ScriptArguments, TrlParser

from chronicals_trl import SFTConfig, patch_model
from chronicals_trl._explicit import named_by_user
from chronicals_trl.model.graph_layers import decoder_layers
from chronicals_trl.model.recompute import SLACK, LayerMemory, layers_that_keep, set_checkpointing

GIB = 2**30
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("room", "extra", "keeping"),
    [
        (10 * GIB, 0, 0),  # no more than the peak
        (9 * GIB, 0, 0),
        (10 * GIB + int(SLACK * GIB) + 1, 0, 1),
        (10 * GIB + int(3.5 * SLACK * GIB), 0, 3),
        (13 * GIB + 1, 0, 2),  # three of them would leave nothing for what differs from the one measured
        (10 * GIB + int(8 * SLACK * GIB) + 1, 0, 8),
        (10 * GIB + int(8 * SLACK * GIB) + 1, GIB, 7),  # all would fit, what comes with all would not
        (10 * GIB + int(8 * SLACK * GIB) + GIB + 1, GIB, 8),
        (99 * GIB, GIB, 8),
    ],
)
def test_as_many_layers_keep_as_there_is_room_for(room: int, extra: int, keeping: int) -> None:
    assert layers_that_keep(8, 10 * GIB, GIB, room, extra) == keeping


def test_a_layer_of_no_size_tells_nothing() -> None:
    assert layers_that_keep(8, GIB, 0, 99 * GIB) == 0


class Counted:
    """Memory in bytes of live tensors, by counting what autograd saves."""

    def __init__(self) -> None:
        self.reads = [0, 70, 0, 50]

    def allocated(self) -> int:
        return self.reads.pop(0)


def layers_of(model: Any) -> list[torch.nn.Module]:
    layers = decoder_layers(model)
    assert not isinstance(layers, str)
    return layers


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_is_measured_by_itself_and_leaves_nothing(reentrant: bool) -> None:
    model: Any = tiny_models.build("qwen2", num_hidden_layers=3, attention_dropout=0.1)
    patch_model(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layer = layers_of(model)[1]
    layer.requires_grad_(False)  # as where adapters are in other layers; what it keeps goes by its input
    probe = LayerMemory(layer)
    batch = tiny_models.packed_batch()
    model(**batch, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    calls: list[tuple[bool, bool]] = []
    handle = layer.register_forward_hook(
        lambda module, args, output: calls.append((module.gradient_checkpointing, output.requires_grad))
    )
    memory: Any = Counted()
    assert probe.measure(memory) == 50  # the second run's
    handle.remove()
    assert calls == [(False, True)] * 2 and not memory.reads
    assert layer.gradient_checkpointing and not layer._forward_pre_hooks and probe._given is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_a_flag_that_a_layer_did_not_have_is_gone_afterwards() -> None:
    model: Any = tiny_models.build("qwen2", num_hidden_layers=3)
    patch_model(model)
    layer = layers_of(model)[1]
    layer.__dict__.pop("gradient_checkpointing", None)
    probe = LayerMemory(layer)
    model.train()(**tiny_models.packed_batch(), use_cache=False)
    memory: Any = Counted()
    assert probe.measure(memory) == 50 and "gradient_checkpointing" not in layer.__dict__


def test_a_layer_that_was_not_called_is_not_measured() -> None:
    model: Any = tiny_models.build("qwen2", num_hidden_layers=3)
    patch_model(model)
    assert LayerMemory(layers_of(model)[1]).measure(Counted()) is None  # type: ignore[arg-type]


def test_the_last_layers_keep_and_the_flags_come_back() -> None:
    model: Any = tiny_models.build("qwen2", num_hidden_layers=3)
    patch_model(model)
    model.gradient_checkpointing_enable()
    layers = layers_of(model)
    del layers[0].__dict__["gradient_checkpointing"]
    restore = set_checkpointing(layers, 2)
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, False]
    restore()
    assert "gradient_checkpointing" not in layers[0].__dict__
    assert [layer.gradient_checkpointing for layer in layers[1:]] == [True, True]


@pytest.mark.parametrize("keeping", [0, 1, 2, 3])
def test_gradients_are_the_same_however_many_keep(keeping: int) -> None:
    model: Any = tiny_models.build("qwen2", num_hidden_layers=3)
    patch_model(model)
    model.train()
    batch = tiny_models.packed_batch()
    model(**batch, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    set_checkpointing(layers_of(model), keeping)
    ran = []
    for layer in layers_of(model):
        layer.self_attn.register_forward_hook(lambda *args: ran.append(1))
    model(**batch, use_cache=False).loss.backward()
    assert len(ran) == 3 + (3 - keeping)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-5, atol=1e-7), name


# -- was it given? ---------------------------------------------------------------------------------------------------


def test_a_keyword_is_the_users_word(tmp_path: Path) -> None:
    named = SFTConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=True)
    left = SFTConfig(str(tmp_path), use_cpu=True)
    assert named.was_given("gradient_checkpointing") and not left.was_given("gradient_checkpointing")
    for one in (copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert one.was_given("gradient_checkpointing")
    assert "_given" not in named.to_dict()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], False),
        (["--gradient_checkpointing", "True"], True),
        (["--gradient-checkpointing=true"], True),
        (["--no_gradient_checkpointing"], True),
        (["--gradient_checkpointing_kwargs", "{}"], False),
        (["gradient_checkpointing"], False),
        (["--config", "FILE"], True),
        (["--config=FILE"], True),
        (["--config", "OTHER"], False),
        (["--config", "MISSING"], False),
        (["--config"], False),
    ],
)
def test_behind_a_parser_the_command_line_tells(tmp_path: Path, words: list[str], found: bool) -> None:
    (tmp_path / "FILE").write_text("gradient_checkpointing: true\n")
    (tmp_path / "OTHER").write_text("bf16: true\n")
    argv = [
        word.replace(name, str(tmp_path / name)) if name in word else word
        for word in words for name in [next((n for n in ("FILE", "OTHER", "MISSING") if n in word), "-none-")]
    ]  # fmt: skip
    given = {"gradient_checkpointing", "bf16"}
    assert named_by_user("gradient_checkpointing", given, 2, argv) is found
    assert named_by_user("gradient_checkpointing", given, 3, argv) is True  # not all fields: a script's keyword
    assert named_by_user("gradient_checkpointing", {"bf16"}, 2, argv) is False


@pytest.mark.parametrize("file", sorted((ROOT / "integrations" / "trl").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_files_leave_it_open(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On, as TRL has it, and nobody's word: a value in the file would switch `recompute` off."""
    monkeypatch.setattr(sys, "argv", ["sft", "--config", str(file), "--dataset_name", "data", "--use_cpu", "True"])
    _, args, _ = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config()
    assert args.gradient_checkpointing is True and not args.was_given("gradient_checkpointing")


def test_examples_leave_it_open() -> None:
    """But for the demo's, which trains a model so small that there is no need of it."""
    calls = {
        path.name: {keyword.arg for keyword in node.keywords}
        for path in (ROOT / "examples").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "SFTConfig"
    }
    assert "qlora.py" in calls
    assert not [name for name, given in calls.items() if "gradient_checkpointing" in given]


def test_trls_parser_passes_every_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what tells its arguments from a script's."""
    for words, found in ((["--bf16", "False"], False), (["--gradient_checkpointing", "True"], True)):
        monkeypatch.setattr(sys, "argv", ["script.py", "--output_dir", str(tmp_path), "--use_cpu", "True", *words])
        (args,) = TrlParser(SFTConfig).parse_args_and_config()
        assert args.was_given("gradient_checkpointing") is found
