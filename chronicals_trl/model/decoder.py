"""Residual additions joined to the norms that follow them, inside decoder layers and from one layer to the next.

A pre-norm layer adds a branch (attention, MLP) to the residual stream and norms the sum, which apart costs two passes
over the stream more in each direction than together. The layer's forward is written out here for two structures,

    Llama and its kin:  h = x + attn(norm(x)),        y = h + mlp(norm(h))
    Gemma 2 and 3:      h = x + norm(attn(norm(x))),  y = h + norm(mlp(norm(h)))

and a layer gets it if it has the children by name, its norms are patched RMSNorms, and a twin of it with stubs for
attention and MLP agrees by number and hands on the same keyword arguments. (Granite's multipliers, OLMo 2's
post-norms and dropout are different functions and keep their own code.)

The last addition of a layer is the first step of the next layer's norm: between two patched layers the sum travels as
a `Deferred`, unless something would see it: hooks on either, a wrapper around one, gradient checkpointing (which would
keep two tensors in the place of one), torch.compile, or a call without gradients.

Legend: B batch, S sequence, H hidden.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chronicals_trl.kernels import rms_norm
from chronicals_trl.model.match import (
    CACHE_NAMES,
    SPEC,
    GatedMLPSpec,
    Mismatch,
    NormSpec,
    compare,
    gated_mlp_of,
    own_forward,
    parameter_shape,
    probing,
    randn,
    shallow_twin,
    unhooked,
)

HANDS_ON = "_chronicals_hands_on"

_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
_SANDWICH_NORMS = (*_PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


class DecoderSpec(NamedTuple):
    """How a decoder layer is computed."""

    sandwich: bool  # a norm behind each branch too
    defaults: tuple[tuple[str, Any], ...]  # keyword arguments of the layer's own forward, which it hands on
    checkpoints: bool  # gradient checkpointing is in the class's forward (transformers 5.20 on), not in __call__


class Deferred:
    """A residual stream whose last addition has not been made: ``branch + residual``, both (B, S, H).

    Meant for the next patched layer. Anybody else who touches it (an attribute, an operator, a torch function) gets
    the sum's.
    """

    def __init__(self, branch: Tensor, residual: Tensor) -> None:
        self.branch, self.residual = branch, residual
        self._sum: Tensor | None = None

    def sum_up(self) -> Tensor:
        """The stream as one tensor."""
        if self._sum is None:
            self._sum = self.residual + self.branch
        return self._sum

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sum_up(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {name: materialise(value) for name, value in (kwargs or {}).items()}
        return func(*(materialise(value) for value in args), **kwargs)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Deferred, *args: Any) -> Any:
        return getattr(self.sum_up(), name)(*map(materialise, args))

    return apply


# Operators are looked up on the class, past __getattr__.
for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "pow", "abs", "getitem", "setitem", "neg", "len",
):  # fmt: skip
    setattr(Deferred, f"__{_name}__", _operator(f"__{_name}__"))


def materialise(value: Any) -> Any:
    """The sum of a `Deferred`, also inside a tuple or list; any other value as it is."""
    if isinstance(value, Deferred):
        return value.sum_up()
    if type(value) in (tuple, list):
        return type(value)(map(materialise, value))
    return value


class Following:
    """The place of a layer in its list. Weakly held, and empty in copies and pickles, which do not defer."""

    def __init__(self, layers: nn.ModuleList | None = None, index: int = -1) -> None:
        self._layers = None if layers is None else weakref.ref(layers)
        self._index = index

    def of(self, layer: nn.Module) -> nn.Module | None:
        """The layer behind `layer`; None if the list has changed, as where FSDP1 or a checkpoint wraps its layers."""
        layers = None if self._layers is None else self._layers()
        if layers is None or len(layers) <= self._index + 1 or layers[self._index] is not layer:
            return None
        following: nn.Module = layers[self._index + 1]
        return following

    def __reduce__(self) -> tuple[type[Following], tuple[()]]:
        return Following, ()


# -- forward ---------------------------------------------------------------------------------------------------------


def decoder_forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a patched decoder layer."""
    spec: DecoderSpec = self.__dict__[SPEC]
    if args:
        return type(self).forward(self, materialise(hidden_states), *args, **kwargs)
    if spec.checkpoints and self.gradient_checkpointing and self.training:
        hidden_states = materialise(hidden_states)
        if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in CACHE_NAMES):
            return type(self).forward(self, hidden_states, **kwargs)  # which clears both, with a word of warning
        run = functools.partial(_layer, self, spec, **kwargs)
        return self._gradient_checkpointing_func(run if torch.compiler.is_compiling() else _Twice(run), hidden_states)
    return _layer(self, spec, hidden_states, **kwargs)


class _Twice:
    """A layer that a checkpoint runs for its result, and after that for the sake of what it keeps alone."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run, self._again = run, False

    def __call__(self, hidden_states: Any) -> Any:
        # In a backward pass both times where a checkpoint around the model runs the layer again: of these two the
        # first one's result is needed too.
        result_needed, self._again = not self._again, True
        return self._run(hidden_states, result_needed=result_needed)


def _layer(self: Any, spec: DecoderSpec, hidden_states: Any, *, result_needed: bool = True, **kwargs: Any) -> Any:
    if isinstance(hidden_states, Deferred):
        y, residual = _add_norm(self.input_layernorm, hidden_states.branch, hidden_states.residual)
    else:
        y, residual = self.input_layernorm(hidden_states), hidden_states
    branch = self.self_attn(hidden_states=y, **{**dict(spec.defaults), **kwargs})[0]
    middle = self.post_attention_layernorm
    if spec.sandwich:
        branch = self.post_attention_layernorm(branch)
        middle = self.pre_feedforward_layernorm
    y, residual = _add_norm(middle, branch, residual)
    # The MLP's last product is the layer's last, and nothing that is kept depends on it, but for a norm behind it.
    if not result_needed and not spec.sandwich and _is_gated_mlp(self.mlp):
        branch = gated_mlp_of(self.mlp, y, result_needed=False)
    else:
        branch = self.mlp(y)
    if isinstance(branch, tuple):  # mixtures of experts that return their router's logits too
        branch = branch[0]
    if spec.sandwich:
        branch = self.post_feedforward_layernorm(branch)
    if _may_defer(self):
        return Deferred(branch, residual)
    return residual + branch


def _is_gated_mlp(mlp: Any) -> bool:
    """Whether calling the module is `gated_mlp_of` it, and nobody looks on."""
    return isinstance(mlp.__dict__.get(SPEC), GatedMLPSpec) and own_forward(mlp) and unhooked(mlp)


def _add_norm(norm: Any, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of ``residual + branch``, and the sum."""
    spec: NormSpec | None = norm.__dict__.get(SPEC)
    if spec is None or not own_forward(norm) or not unhooked(norm):
        residual = residual + branch
        return norm(residual), residual
    return rms_norm(branch, norm.weight, getattr(norm, spec.epsilon_name), offset=spec.offset, residual=residual)


def _may_defer(layer: Any) -> bool:
    following: Following | None = layer.__dict__.get(HANDS_ON)
    if following is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    receiver = following.of(layer)
    return (
        receiver is not None
        and own_forward(receiver)
        and unhooked(layer)
        and unhooked(receiver)
        and not (layer.training and getattr(layer, "gradient_checkpointing", False))
        # In a backward pass: a checkpoint of somebody else's is computing this layer again, alone.
        and torch._C._current_graph_task_id() == -1
    )


decoder_forward.__name__ = "forward"  # a bound method pickles as (instance, name)


# -- recognition and verification ------------------------------------------------------------------------------------


def looks_like_decoder_layer(module: nn.Module) -> bool:
    """Attention, MLP and patched RMSNorms under the names that Llama or Gemma 2 give them."""
    children = module._modules
    norms = _SANDWICH_NORMS if "pre_feedforward_layernorm" in children else _PRE_NORMS
    return {"self_attn", "mlp", *norms} <= set(children) and all(
        isinstance(children[name].__dict__.get(SPEC), NormSpec) for name in norms
    )


class _Stub(nn.Module):
    """Stands for attention or MLP: a fixed function of the hidden states, which remembers what else it was given."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        self.given: list[dict[str, Any]] = []

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        self.given.append(kwargs)
        out = torch.tanh(hidden_states) + 0.3 * hidden_states.roll(1, -1)
        return (out, None) if self.attention else out


def verify_decoder_layer(module: Any, device: torch.device, dtype: torch.dtype) -> DecoderSpec:
    """The spec under which our forward computes what the layer's own does; Mismatch if it does not."""
    forward = type(module).forward
    parameters = list(inspect.signature(forward).parameters.values())[2:]  # after self and the hidden states
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY]
    defaults = tuple((p.name, p.default) for p in parameters if p.name in named and p.default is not p.empty)
    names = set(getattr(forward.__code__, "co_names", ()))
    sandwich = "pre_feedforward_layernorm" in module._modules
    spec = DecoderSpec(sandwich, defaults, checkpoints="_gradient_checkpointing_func" in names)
    given = {name: f"the {name}" for name in [*named, "cu_seq_lens_q"] if name not in {*CACHE_NAMES, "use_cache"}}
    with probing(device) as generator:
        norms = {}
        for name in _SANDWICH_NORMS if sandwich else _PRE_NORMS:
            norm = module._modules[name]
            (width,) = parameter_shape(norm.weight)
            weight = nn.Parameter(randn(width, generator=generator, device=device, dtype=dtype))
            norms[name] = shallow_twin(norm, parameters={"weight": weight})
        stubs = [{"self_attn": _Stub(True), "mlp": _Stub(False)} for _ in range(2)]
        twins = [shallow_twin(module, modules={**norms, **stub}) for stub in stubs]
        for twin in twins:
            twin.__dict__.pop(HANDS_ON, None)
            twin.training = True  # dropout in the layer must show
            if hasattr(twin, "gradient_checkpointing"):
                twin.gradient_checkpointing = False
        compare(
            lambda x: _layer(twins[0], spec, x, result_needed=True, **given),
            lambda x: forward(twins[1], x, **given),
            (randn(2, 3, width, generator=generator, device=device, dtype=dtype),),
            tuple(norm.weight for norm in norms.values()),
        )
        for name in ("self_attn", "mlp"):
            if stubs[0][name].given != stubs[1][name].given:
                raise Mismatch(f"its {name} is called with other arguments")
    return spec


def link_layers(model: nn.Module) -> None:
    """Let each patched layer hand its last addition on, where the next one in the list is patched too."""
    for layers in model.modules():
        if isinstance(layers, nn.ModuleList):
            for index, (layer, following) in enumerate(zip(layers, list(layers)[1:], strict=False)):
                if all(isinstance(m.__dict__.get(SPEC), DecoderSpec) for m in (layer, following)):
                    layer.__dict__[HANDS_ON] = Following(layers, index)
