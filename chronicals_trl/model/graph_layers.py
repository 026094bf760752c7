"""Which layers a graph is captured of, and the forward that each of them has while it is in a stack.

It is, as everywhere in this package, a `types.MethodType` over a function of the module: a copy or a pickle of the
model is not part of any stack, and its layers run as before.
"""

from __future__ import annotations

import types
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chronicals_trl.model.decoder import DecoderSpec
from chronicals_trl.model.match import SPEC

if TYPE_CHECKING:
    from chronicals_trl.model.graphs import GraphedStack

__all__ = ["PLACE", "UNGRAPHED", "decoder_layers", "graphed_forward", "put_into", "take_out"]

PLACE = "_chronicals_graph_place"
UNGRAPHED = "_chronicals_ungraphed_forward"


def decoder_layers(model: nn.Module) -> list[nn.Module] | str:
    """The decoder layers of `model`, all of them patched, or why there is no such list."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    patched = [[isinstance(layer.__dict__.get(SPEC), DecoderSpec) for layer in layers] for layers in lists]
    found = [layers for layers, flags in zip(lists, patched, strict=True) if any(flags)]
    if not found:
        return "the model's decoder layers are not patched (their norms, additions and MLPs are not ours)"
    if len(found) > 1:
        return f"the model has {len(found)} stacks of decoder layers"
    layers = list(found[0])
    if not all(isinstance(layer.__dict__.get(SPEC), DecoderSpec) for layer in layers):
        return "some of the model's decoder layers are not patched"
    return "a decoder layer is in the list twice" if len(set(map(id, layers))) < len(layers) else layers


class _Place:
    """The place of a layer in its stack. Weakly held, and empty in copies and pickles."""

    def __init__(self, stack: GraphedStack | None = None, index: int = -1) -> None:
        self._stack = None if stack is None else weakref.ref(stack)
        self.index = index

    def stack(self) -> GraphedStack | None:
        return None if self._stack is None else self._stack()

    def __reduce__(self) -> tuple[type[_Place], tuple[()]]:
        return _Place, ()


def graphed_forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a layer in a stack."""
    place: _Place = self.__dict__[PLACE]
    stack = place.stack()
    if stack is None or not stack.active or torch.compiler.is_compiling():
        return self.__dict__[UNGRAPHED](hidden_states, *args, **kwargs)
    return stack.layer_called(place.index, hidden_states, (args, kwargs))


graphed_forward.__name__ = "forward"  # a bound method pickles as (instance, name)


def put_into(stack: GraphedStack, index: int, layer: nn.Module) -> None:
    """Let the layer be called through `stack`, as its layer `index`."""
    layer.__dict__[UNGRAPHED] = layer.forward
    layer.__dict__[PLACE] = _Place(stack, index)
    layer.__dict__["forward"] = types.MethodType(graphed_forward, layer)


def take_out(layer: nn.Module) -> None:
    """Give a layer the forward back that it had."""
    previous = layer.__dict__.pop(UNGRAPHED, None)
    layer.__dict__.pop(PLACE, None)
    # Somebody else's forward, put there since, stays, and so does none (`unpatch_model`).
    if previous is not None and getattr(layer.__dict__.get("forward"), "__func__", None) is graphed_forward:
        layer.__dict__["forward"] = previous
