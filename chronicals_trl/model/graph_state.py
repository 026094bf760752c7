"""What a captured graph takes for granted: how the layers are set up, and what kind of call they get.

A graph replays kernels with the addresses and the numbers that they were launched with. Whatever Python decided while
they were launched has to be the same when they are replayed: `LayerState` looks at the layers, `read_call` at what
they are given, `surroundings` at the process.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chronicals_trl.model.match import own_forward
from chronicals_trl.model.members import Members

_PLAIN_TENSORS = (Tensor, nn.Parameter)  # not DTensor, not a subclass whose kernels may differ
_SCALARS = (bool, int, float, str, type(None))
_VALUES = (*_SCALARS, torch.dtype, torch.device, torch.layout)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Modules that only hold others and are not called, of which PEFT's layers have many, and how many attributes one has
# without any of its own: then no hook or flag of it decides anything.
_HOLDERS: dict[type[nn.Module], int] = {
    kind: len(vars(kind())) for kind in (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
}
# Of PEFT's layers: containers that are changed in place.
_CONTAINERS = ("scaling", "merged_adapters", "_active_adapter")
# Of PEFT's layers too: settings whose names begin with an underscore, as torch's own bookkeeping does.
_PRIVATE_SETTINGS = ("_disable_adapters", "_active_adapter")
_MISSING = object()

Call = tuple[tuple[Any, ...], dict[str, Any]]


class LayerState:
    """The settings, hooks and parameters of some layers and of all that is in them, to be compared from pass to pass.

    What to look at is listed once and again only when the structure has changed (modules, parameters, attributes come
    or gone). A look at some thousand modules waits for memory most of the time: so each thing is looked at once, by
    what runs in C over a prepared list, and little is made of it.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._generation = 0
        self._list()

    def _list(self) -> None:
        self._generation += 1
        self.modules = list({id(m): m for layer in self._layers for m in layer.modules()}.values())
        called = [m for m in self.modules if len(vars(m)) != _HOLDERS.get(type(m))]
        dicts = [m.__dict__ for m in called]
        self._hooks = [getattr(m, name) for m in called for name in _HOOKS]
        self._members = Members([t for m in self.modules for t in (m._modules, m._parameters, m._buffers)])
        self._attributes = list(map(vars, self.modules))
        self._attribute_counts = list(map(len, self._attributes))
        self.parameters: list[nn.Parameter] = _distinct(chain(*(m._parameters.values() for m in self.modules)))
        buffers = chain(*(m._buffers.values() for m in self.modules))
        self.tensors: list[Tensor] = _distinct([*self.parameters, *buffers])
        self._settings = _Places([(d, n) for d in dicts for n in ("forward", *_settings_in(d))])
        # Tensors that are neither parameters nor buffers: the kernels have their addresses too.
        mutable = [(d, n) for d in dicts for n in d if n in _CONTAINERS or isinstance(d[n], Tensor)]
        self._containers = _Places(mutable)
        # Of the configuration the layers may read anything while they run.
        self._configs = [vars(c) for c in _distinct(d.get("config") for d in dicts) if hasattr(c, "__dict__")]

    def read(self) -> tuple[Any, ...]:
        """The state as a tuple; two passes with equal ones launch the same kernels, given the same kind of call."""
        if self._members.changed() or list(map(len, self._attributes)) != self._attribute_counts:
            self._list()
        return (
            self._generation,
            self._settings.read(),
            list(map(_copied, self._containers.read())),
            any(self._hooks),
            list(map(Tensor.data_ptr, self.tensors)),
            list(map(attrgetter("requires_grad", "dtype", "shape"), self.tensors)),
            list(map(Tensor.stride, self.tensors)),
            [[value for value in config.values() if isinstance(value, _VALUES)] for config in self._configs],
        )

    def trainable(self, layers: Sequence[nn.Module] | None = None) -> list[nn.Parameter]:
        """What is trained in `layers`, some of these; None for all of them."""
        inside = {id(p) for layer in (self._layers if layers is None else layers) for p in layer.parameters()}
        return [p for p in self.parameters if p.requires_grad and id(p) in inside]

    def obstacle(self, device: torch.device) -> str | None:
        """Why layers in this state cannot be captured on `device`; None if nothing is known against it."""
        if any(self._hooks):
            return "there are hooks on modules of the layers, which a replay would pass over"
        if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self._layers):
            return "gradient checkpointing is on"
        for module in self.modules:
            if "forward" in module.__dict__ and not own_forward(module):
                return f"{type(module).__name__} has the forward of another library"
        # bitsandbytes' Params4bit is a subclass whose address and size are those of its storage.
        if any(p.requires_grad and type(p) not in _PLAIN_TENSORS for p in self.parameters):
            return "a parameter that is trained is a tensor of a kind of its own (sharded?)"
        if any(tensor.device != device for tensor in self.tensors):
            return f"not all parameters of the layers are on {device}"
        return None if self.trainable() else "nothing in the layers is trained"


class _Places:
    """Names in dictionaries, of which all values are read at once."""

    def __init__(self, places: Sequence[tuple[dict[str, Any], str]]) -> None:
        self._dicts, self._names = [d for d, _ in places], [name for _, name in places]

    def read(self) -> list[Any]:
        return list(map(dict.get, self._dicts, self._names, repeat(_MISSING)))


def _distinct(values: Any) -> list[Any]:
    return list({id(value): value for value in values if value is not None}.values())


def _settings_in(attributes: dict[str, Any]) -> list[str]:
    """The names of a module's attributes that are compared by value."""
    public = [name for name in attributes if name[:1] != "_" or name in _PRIVATE_SETTINGS]
    return [name for name in public if name != "forward" and _is_setting(attributes[name])]


def _is_setting(value: Any) -> bool:
    """Whether two of them can be compared, and neither can be changed in place."""
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return isinstance(value, (*_VALUES, types.FunctionType, types.BuiltinFunctionType))


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return [*value, *map(_copied, value.values())]
    if isinstance(value, Tensor):  # its values may change: a replay reads them
        return value.data_ptr(), value.shape, value.stride(), value.dtype, value.requires_grad
    return value


# -- a call ----------------------------------------------------------------------------------------------------------


class Unreadable(Exception):
    """A call with something in it whose value a graph cannot take; the message says what."""


class Reading(NamedTuple):
    """A pass's inputs: their kind, which is what has to be the same, and the tensors, which may hold other values."""

    key: tuple[Any, ...]
    tensors: list[Tensor]  # distinct ones, the hidden states first


def read_call(hidden: Any, calls: Sequence[Call]) -> Reading:
    """What is given to the layers: `hidden` to the first of them, and the rest of each one's arguments.

    Raises:
        Unreadable: an argument is neither a tensor on the device of `hidden` nor a plain value, or one of the others
            is to be differentiated.
    """
    tensors: list[Tensor] = []
    numbers: dict[int, int] = {}
    groups: list[Call] = []  # layers of a kind get the same objects
    pattern: list[int] = []
    keys: list[Any] = [_kind(hidden, tensors, numbers)]
    if not tensors:
        raise Unreadable(f"the hidden states are a {type(hidden).__name__}")
    for call in calls:
        number = next((i for i, group in enumerate(groups) if _same_objects(group, call)), len(groups))
        if number == len(groups):
            groups.append(call)
            keys.append(_kind(call, tensors, numbers))
        pattern.append(number)
    for tensor in tensors[1:]:
        if tensor.requires_grad:
            raise Unreadable("the layers are given a second tensor to be differentiated")
        if tensor.device != tensors[0].device:
            raise Unreadable(f"the layers are given a tensor on {tensor.device}")
    shapes = tuple((t.shape, t.dtype, t.stride(), t.device, t.requires_grad) for t in tensors)
    return Reading((tuple(pattern), tuple(keys), shapes), tensors)


def _same_objects(one: Call, other: Call) -> bool:
    return (
        len(one[0]) == len(other[0])
        and one[1].keys() == other[1].keys()
        and all(map(is_, one[0], other[0]))
        and all(map(is_, one[1].values(), map(other[1].__getitem__, one[1])))
    )


def _kind(value: Any, tensors: list[Tensor], numbers: dict[int, int]) -> Any:
    if isinstance(value, Tensor):
        if type(value) not in _PLAIN_TENSORS:
            raise Unreadable(f"the layers are given a {type(value).__name__}")
        if id(value) not in numbers:
            numbers[id(value)] = len(tensors)
            tensors.append(value)
        return Tensor, numbers[id(value)]
    kind = type(value)
    if kind in (tuple, list):
        return kind, tuple(_kind(item, tensors, numbers) for item in value)
    if kind is dict:
        return kind, tuple((name, _kind(item, tensors, numbers)) for name, item in value.items())
    if kind in _VALUES:
        return kind, value
    raise Unreadable(f"the layers are given a {kind.__name__}")


def exchange(value: Any, replacements: dict[int, Tensor]) -> Any:
    """`value` with each tensor in it replaced by that of its id."""
    if isinstance(value, Tensor):
        return replacements[id(value)]
    if type(value) in (tuple, list):
        return type(value)(exchange(item, replacements) for item in value)
    if type(value) is dict:
        return {name: exchange(item, replacements) for name, item in value.items()}
    return value


# -- the process -----------------------------------------------------------------------------------------------------


def surroundings(device: torch.device) -> tuple[Any, ...]:
    """Settings of the process that decide which kernels run."""
    autocast = torch.is_autocast_enabled(device.type)
    cuda = torch.backends.cuda
    return (
        torch.get_autocast_dtype(device.type) if autocast else None,
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_fp16_accumulation,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


def watched() -> str | None:
    """Who looks at, or alters, each operation of this pass; None if nobody does."""
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules of the process"
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "hooks on saved tensors are active, as in activation offloading"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a torch dispatch or function mode is active"
    return None
