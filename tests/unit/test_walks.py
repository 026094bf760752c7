"""A model's modules and parameters listed once: the answers are those of a walk, whatever is done to the model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import tiny_models
import torch
from torch import nn

from chronicals_trl.model import walks as walks_module
from chronicals_trl.model.walks import Walks


@pytest.fixture
def model() -> nn.Module:
    return tiny_models.build("llama").train()


@pytest.fixture
def walks(model: nn.Module) -> Walks:
    made = Walks(model)
    assert made.install()
    return made


def walked(model: nn.Module) -> list[nn.Parameter]:
    return list(type(model).parameters(model))


def same(found: list[nn.Parameter], expected: list[nn.Parameter]) -> bool:
    return list(map(id, found)) == list(map(id, expected))


def count_walks(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The walks there are from now on, by what was called."""
    calls: list[str] = []
    for name in ("train", "parameters"):
        original = getattr(type(model), name)

        def counted(
            self: nn.Module, *args: object, _name: str = name, _original: Callable = original, **kwargs: object
        ):
            calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(type(model), name, counted)
    return calls


def test_nothing_is_walked_through_twice(model: nn.Module, walks: Walks, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_walks(model, monkeypatch)
    assert model.train() is model
    model.zero_grad()
    assert same(list(model.parameters()), walks.parameters())
    assert calls == []


def test_parameters_are_those_of_a_walk_in_its_order(model: nn.Module, walks: Walks) -> None:
    assert same(list(model.parameters()), walked(model))
    assert list(model.parameters(recurse=False)) == []


CHANGES = {
    "a module more": lambda model: model.add_module("extra", nn.Linear(2, 2)),
    "a parameter more": lambda model: model.model.layers[0].register_parameter("extra", nn.Parameter(torch.ones(1))),
    "one more behind all others": lambda model: model.lm_head.register_parameter("extra", nn.Parameter(torch.ones(1))),
    "another parameter": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight * 2)),
    "a parameter gone": lambda model: delattr(model.model.layers[0].mlp.up_proj, "weight"),
    "a parameter swapped for none": lambda model: model.model.norm._parameters.update(weight=None),
    "a layer gone": lambda model: model.model.layers.pop(0),
    "layers in another order": lambda model: model.model.layers._modules.update(
        dict(zip("01", list(model.model.layers)[1::-1], strict=True))
    ),
    "a weight tied": lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
    "deep inside": lambda model: setattr(model.model.layers[1].self_attn, "q_proj", nn.Linear(3, 3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_seen(model: nn.Module, walks: Walks, change: str) -> None:
    before = list(model.parameters())
    CHANGES[change](model)
    assert same(list(model.parameters()), walked(model))
    assert not same(before, walked(model)), "the change is none"
    assert walks.generation == 2


def test_a_module_in_the_place_of_one_that_is_gone_is_seen(model: nn.Module, walks: Walks) -> None:
    """It gets the memory, and so the id, of the one before: what deleting an adapter and adding another one does."""
    del model.lm_head
    model.lm_head = nn.Linear(32, 3, bias=False)
    assert same(list(model.parameters()), walked(model))


@pytest.mark.parametrize("way", [torch.compile, torch.jit.script])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_module_that_keeps_its_mode_elsewhere(model: nn.Module, way: Callable) -> None:
    model.lm_head = way(nn.Linear(32, 3, bias=False))
    walks = Walks(model)
    assert walks.install()
    assert same(list(model.parameters()), walked(model))
    model.lm_head.eval()
    assert model.train() is model
    assert model.lm_head.training


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_scripted_module_that_comes_later(model: nn.Module, walks: Walks) -> None:
    model.lm_head = torch.jit.script(nn.Linear(32, 3, bias=False))
    for _ in range(2):
        assert same(list(model.parameters()), walked(model))
        assert model.train() is model


def test_modes_are_set_as_ever(model: nn.Module, walks: Walks) -> None:
    inner = model.model.layers[1].mlp
    inner.eval()
    model.train()
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())


def test_a_new_module_is_set_too(model: nn.Module, walks: Walks) -> None:
    model.model.layers[0].add_module("extra", nn.Dropout().eval())
    model.train()
    assert model.model.layers[0].extra.training


@pytest.mark.parametrize("by", ["class", "instance"])
def test_a_module_with_a_train_of_its_own_has_it_called(model: nn.Module, by: str) -> None:
    calls = []

    class Frozen(nn.Module):
        def train(self, mode: bool = True) -> nn.Module:
            calls.append(mode)
            return super().train(mode)

    module = Frozen() if by == "class" else nn.Identity()
    if by == "instance":
        module.train = lambda mode=True: calls.append(mode)  # type: ignore[method-assign]
    model.model.add_module("frozen", module)
    Walks(model).install()
    model.train()
    model.train()
    assert calls == [True, True]


def test_what_is_no_mode_is_refused_as_ever(model: nn.Module, walks: Walks) -> None:
    with pytest.raises(ValueError, match="boolean"):
        model.train(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle"])
def test_a_copy_answers_for_itself(model: nn.Module, walks: Walks, way: str) -> None:
    if way == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = getattr(copy, way)(model)
    other.eval()
    other.train()
    assert all(module.training for module in other.modules())
    other.add_module("extra", nn.Linear(2, 2))
    assert same(list(other.parameters()), walked(other))
    if way != "copy":  # which shares its tables, and its lists, with the original
        assert other.__dict__[walks_module._WALKS]._model is None
        assert same(list(model.parameters()), walked(model)) and len(walked(model)) < len(walked(other))


def test_removed_it_leaves_nothing(model: nn.Module) -> None:
    before = dict(model.__dict__)
    walks = Walks(model)
    walks.install()
    assert model.__dict__.keys() - before.keys() == {"train", "parameters", walks_module._WALKS}
    walks.remove()
    assert model.__dict__ == before
    walks.remove()


@pytest.mark.parametrize("name", ["train", "parameters"])
def test_what_somebody_else_has_put_there_stays(model: nn.Module, name: str) -> None:
    own = lambda *args: model  # noqa: E731
    model.__dict__[name] = own
    walks = Walks(model)
    assert not walks.install()
    assert walks_module._WALKS not in model.__dict__
    walks.remove()
    assert model.__dict__[name] is own
    del model.__dict__[name]
    # Put there later.
    walks = Walks(model)
    assert walks.install()
    model.__dict__[name] = own
    walks.remove()
    assert model.__dict__.pop(name) is own and walks_module._WALKS not in model.__dict__


def test_a_second_one_does_not_take_over(model: nn.Module, walks: Walks) -> None:
    second = Walks(model)
    assert not second.install()
    second.remove()
    assert model.__dict__[walks_module._WALKS] is walks
