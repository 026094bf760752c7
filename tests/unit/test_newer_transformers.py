"""transformers 5.24 calls the key-value cache `cache` in place of `past_key_values`, and renames it in a decorator.

`make setup` pins the release before it, so both are made up here.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from chronicals_trl import patch_model, unpatch_model
from chronicals_trl.model import match, rope
from chronicals_trl.model.attention import _mark_packed
from chronicals_trl.model.decoder import DecoderSpec, decoder_forward

CALLS: list[str] = []


def renaming(forward: Any) -> Any:
    """`tables` becomes `position_embeddings` on its way into `forward`."""

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        CALLS.append(type(args[0]).__name__)
        if "tables" in kwargs:
            kwargs["position_embeddings"] = kwargs.pop("tables")
        return forward(*args, **kwargs)

    return renamed


HIDDEN: list[Any] = []


def out_of_sight(forward: Any) -> Any:
    HIDDEN.append(forward)

    @functools.wraps(forward)
    def called_by_index(*args: Any, **kwargs: Any) -> Any:
        return HIDDEN[-1](*args, **kwargs)

    return called_by_index


def decorated(*decorators: Any) -> nn.Module:
    model = tiny_models.build("llama")
    for layer in model.model.layers:
        kind = type(layer.self_attn)
        forward = kind.forward
        for decorator in decorators:
            forward = decorator(forward)
        layer.self_attn.__class__ = type("Decorated", (kind,), {"forward": forward})
    return model


@pytest.mark.parametrize("decorators", [(renaming,), (renaming, renaming)])
def test_a_decorator_around_the_forward_goes_on_working(monkeypatch: pytest.MonkeyPatch, decorators: Any) -> None:
    model, stock = decorated(*decorators), decorated(*decorators)
    assert patch_model(model)["qk_rope"].modules == 2
    rotations = []
    ours = rope.qk_rope
    monkeypatch.setattr(rope, "qk_rope", lambda *args, **kwargs: rotations.append(1) or ours(*args, **kwargs))
    batch = {name: tensor for name, tensor in tiny_models.packed_batch().items() if name in ("input_ids", "labels")}
    CALLS.clear()
    model(**batch).loss.backward()
    assert len(rotations) == 2 and CALLS == ["Decorated"] * 2 * len(decorators)
    stock(**batch).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)

    block = model.model.layers[0].self_attn
    x, tables = torch.randn(1, 3, 32), model.model.rotary_emb(torch.zeros(1), torch.arange(3)[None])
    renamed = block(hidden_states=x, tables=tables, attention_mask=None)[0]
    torch.testing.assert_close(renamed, block(hidden_states=x, position_embeddings=tables, attention_mask=None)[0])
    unpatch_model(model)
    assert "forward" not in block.__dict__


def test_a_decorator_that_cannot_be_copied_leaves_the_rotation_alone() -> None:
    part = patch_model(decorated(out_of_sight))["qk_rope"]
    assert part.state == "off" and "rotary" in (part.reason or "")


@pytest.mark.parametrize("name", match.CACHE_NAMES)
def test_a_row_that_goes_on_from_a_cache_is_not_marked(name: str) -> None:
    tokens, offsets = torch.zeros(1, 5, dtype=torch.long), torch.tensor([0, 2, 5])
    batch = {"input_ids": tokens, "cu_seq_lens_q": offsets, name: None}
    assert _mark_packed(nn.Module(), (), batch) is not None
    assert _mark_packed(nn.Module(), (), {**batch, name: object()}) is None


@pytest.mark.parametrize("name", match.CACHE_NAMES)
def test_a_checkpointed_layer_with_a_cache_is_its_own_business(name: str) -> None:
    class Layer(nn.Module):
        gradient_checkpointing = True

        def forward(self, hidden_states: Any, **kwargs: Any) -> str:
            return "its own"

        def _gradient_checkpointing_func(self, function: Any, *args: Any) -> str:
            return "checkpointed"

    layer = Layer()
    layer.__dict__[match.SPEC] = DecoderSpec(sandwich=False, defaults=(), checkpoints=True)
    x = torch.zeros(1)
    assert decoder_forward(layer, x, **{name: object()}) == "its own"
    assert decoder_forward(layer, x, **{name: None}) == "checkpointed"


def test_layers_that_differ_in_their_number_alone_are_judged_once() -> None:
    class Old(nn.Module):
        def forward(self, x: Any, past_key_values: Any = None) -> Any:
            return x if past_key_values is None else past_key_values.update(x, self.layer_idx)

    class New(nn.Module):
        def forward(self, x: Any, cache: Any = None) -> Any:
            return x if cache is None else cache.update(x, self.layer_idx)

    class Counts(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * self.layer_idx

    def judged_alike(kind: type[nn.Module]) -> bool:
        first, second = kind(), kind()
        first.layer_idx, second.layer_idx = 0, 1
        return match.traits(first) == match.traits(second)

    assert judged_alike(Old) and judged_alike(New) and not judged_alike(Counts)
