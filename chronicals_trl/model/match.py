"""Recognise a model's blocks by structure and verify each by number before it is swapped.

No table of model classes: a block qualifies by the attributes that its forward needs, and then a *twin* of it, a
shallow copy with small random parameters, runs forward and backward against the replacement on a random probe. The
twin leaves the model's own values untouched and unread (under ZeRO-3 or meta loading there are none yet), and the
probe draws from a generator of its own, so that the user's random stream does not move. A verdict is remembered per
class, shape and dtype: a model of a hundred layers pays for one probe of each kind.

Legend: B batch, S sequence, H hidden, I intermediate.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chronicals_trl.kernels import LoraOperands, gated_mlp, geglu, lora_gated_mlp, rms_norm, swiglu
from chronicals_trl.kernels._lora_linear import lora_linears_supported
from chronicals_trl.model.lora_state import match_lora, unchecked_operands

# Largest error that a replacement may show on the probe, relative to the largest value of the original's result: some
# ten roundings in fp32, two units in the last place in half precision (the original's own error against fp64 is one).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}

PROBE_SEED = 20_260_214
EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")
GATED_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"swiglu": swiglu, "geglu": geglu}

# Name in a patched module's __dict__ of its spec: what its forward needs to know.
SPEC = "_chronicals_spec"


class _Deputies(threading.local):
    """Modules, by id, whose work their caller does in this one call: in this thread alone, others have calls too."""

    def __init__(self) -> None:
        self.norms: set[int] = set()  # let their input pass
        self.projections: dict[int, Tensor] = {}  # give out what they were handed
        self.rotation: Any = None  # what the rotation of the attention block that runs has to know (`model.rope`)


DEPUTIES = _Deputies()


class NormSpec(NamedTuple):
    """How an RMSNorm module is computed: the attribute that holds epsilon, and 1.0 where the weight is 1 + w."""

    epsilon_name: str
    offset: float


class GatedMLPSpec(NamedTuple):
    """How a gated MLP is computed."""

    activation: str  # the name of the op
    fused: bool  # gate and up share one projection
    recompute: bool = False  # the product of activation and up is made again in the backward pass


class Mismatch(Exception):
    """A block looks like one of ours but computes something else; the message is the report's reason."""


@contextmanager
def probing(device: torch.device) -> Iterator[torch.Generator]:
    """A generator for probes; whatever a probed module draws by itself (dropout) is undone afterwards.

    Products are in full fp32 inside, also where the run has TF32 on: its rounding would pass for a difference.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _full_fp32():
        torch.manual_seed(PROBE_SEED)
        yield torch.Generator().manual_seed(PROBE_SEED)


@contextmanager
def _full_fp32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"  # as torch.backends.fp32_precision says, unless that is not what it was
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before


def randn(*shape: int, generator: torch.Generator, like: Tensor | None = None, **to: Any) -> Tensor:
    """Standard normal values from `generator`, drawn on the CPU so that every device sees the same."""
    values = torch.randn(shape, generator=generator)
    return values.to(like) if like is not None else values.to(**to)


def unhooked(module: nn.Module) -> bool:
    """Whether nobody has hooked `module`, so that its work can be done without calling it.

    DeepSpeed ZeRO-3 gathers a module's parameters in its hooks; users read activations in theirs.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and not torch.nn.modules.module._has_any_global_hook()


def own_forward(module: nn.Module) -> bool:
    """Whether the forward of `module` is the one that patching put there, and not another library's or another's."""
    bound: Any = module.__dict__.get("forward")
    function = getattr(bound, "__func__", None)
    return function is not None and function.__module__.startswith("chronicals_trl.") and bound.__self__ is module


def plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` is ``F.linear`` with its own weight, without adapter, quantisation or hook."""
    return (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, Tensor)  # not DTensor
        and ("forward" not in module.__dict__ or own_forward(module))  # no other library's
        and unhooked(module)
    )


def adapted_operands(modules: Sequence[Any], x: Tensor) -> list[LoraOperands] | None:
    """What one node over `modules` needs: patched LoRA layers as they stand, and plain frozen linears beside them.

    None where none of them is a LoRA layer, or one has to be called.
    """
    adapted = [match_lora(m) for m in modules]
    if not any(adapted):
        return None
    layers = []
    for m, is_adapted in zip(modules, adapted, strict=True):
        if is_adapted:
            layer = unchecked_operands(m, x) if own_forward(m) and unhooked(m) else None
        else:
            layer = LoraOperands(m.weight, m.bias) if plain_linear(m) else None
        if layer is None:
            return None
        layers.append(layer)
    return layers if lora_linears_supported(x, layers) else None


# The argument that is the key-value cache: transformers 5.24 calls it by the second name.
CACHE_NAMES = ("past_key_values", "cache")

# Of every module, and no part of what its forward computes.
_NO_TRAITS = {"training", "gradient_checkpointing", "config"}


def traits(module: nn.Module) -> tuple[Any, ...]:
    """What a verdict on `module` depends on besides its class: its settings, and those of its small children.

    The layer's number counts only where the forward reads it other than to find its cache. The configuration does not:
    it is the model's, and verdicts are kept for one model.
    """
    ignored = _NO_TRAITS if _reads_layer_idx(module) else {*_NO_TRAITS, "layer_idx"}
    settings = [
        (name, value if isinstance(value, Hashable) else repr(value))
        for name, value in sorted(module.__dict__.items())
        if not name.startswith("_") and name not in ignored and not isinstance(value, Tensor)
    ]
    children = [
        (name, type(child), child.__dict__.get(SPEC), repr(child) if not any(True for _ in child.parameters()) else "")
        for name, child in module.named_children()
    ]
    return tuple(settings), tuple(children)


def _reads_layer_idx(module: nn.Module) -> bool:
    names = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return names is not None and "layer_idx" in names.co_names and set(CACHE_NAMES).isdisjoint(names.co_varnames)


def parameter_shape(parameter: Tensor) -> tuple[int, ...]:
    """The full shape, also where ZeRO-3 has partitioned the parameter (its own shape is then [0])."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def shallow_twin(
    module: nn.Module, *, parameters: dict[str, Any] | None = None, modules: dict[str, Any] | None = None
) -> Any:
    """A copy of `module` that shares its settings but neither parameters, children nor an instance-level forward."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    twin._parameters = dict(parameters or {})
    twin._modules = {**module._modules, **(modules or {})}
    twin._forward_hooks = type(module._forward_hooks)()
    twin._forward_pre_hooks = type(module._forward_pre_hooks)()
    return twin


def require_close(ours: Tensor, original: Tensor, what: str) -> None:
    """Raise Mismatch unless both agree within TOLERANCE of their dtype.

    Args:
        ours, original: same shape; compared in fp64.
        what: name of the compared quantity, for the report.
    """
    if ours.shape != original.shape:
        raise Mismatch(f"{what} has shape {tuple(ours.shape)} instead of {tuple(original.shape)}")
    tolerance = TOLERANCE.get(ours.dtype, TOLERANCE[torch.float32])
    scale = original.double().abs().max().clamp_min(1e-30)
    error = ((ours.double() - original.double()).abs().max() / scale).item()
    if not error <= tolerance:  # also catches NaN
        raise Mismatch(f"{what} differs from the original by {error:.1e} of its largest value on a random probe")


def compare(
    ours: Callable[..., Any], original: Callable[..., Any], inputs: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
) -> None:
    """Run both on `inputs`, forward and backward, and raise Mismatch where outputs or gradients differ.

    `parameters` are the leaves, besides the inputs, whose gradients are compared. Both callables return one tensor or
    a tuple of tensors.
    """
    results = []
    for function in (ours, original):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            generator = torch.Generator().manual_seed(PROBE_SEED + 1)
            upstream = [randn(*output.shape, generator=generator, like=output) for output in outputs]
            # In fp32 whatever the output's dtype: an original that promotes gets the same upstream gradient.
            loss = sum((output.float() * grad.float()).sum() for output, grad in zip(outputs, upstream, strict=True))
        gradients = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)
        results.append((outputs, gradients))
    (our_outputs, our_gradients), (original_outputs, original_gradients) = results
    for index, (output, reference) in enumerate(zip(our_outputs, original_outputs, strict=True)):
        require_close(output, reference, f"output {index}")
    for index, (gradient, reference) in enumerate(zip(our_gradients, original_gradients, strict=True)):
        if (gradient is None) != (reference is None):
            raise Mismatch(f"gradient {index} is None on one side only")
        if gradient is not None:
            require_close(gradient, reference, f"gradient {index}")


# -- RMSNorm ---------------------------------------------------------------------------------------------------------


def looks_like_rms_norm(module: nn.Module) -> bool:
    """One one-dimensional `weight`, nothing else, and an epsilon: RMSNorm by structure (or a bias-free LayerNorm)."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    return (
        set(parameters) == {"weight"}
        and weight is not None
        and len(parameter_shape(weight)) == 1
        and not module._modules
        and not module._buffers
        and any(isinstance(getattr(module, name, None), float) for name in EPSILON_NAMES)
    )


def verify_rms_norm(module: Any, device: torch.device, dtype: torch.dtype) -> NormSpec:
    """Find the offset with which `rms_norm` computes what `module` computes; Mismatch if there is none."""
    epsilon_name = next(name for name in EPSILON_NAMES if isinstance(getattr(module, name, None), float))
    (width,) = parameter_shape(module.weight)
    failure: Mismatch | None = None
    for offset in (0.0, 1.0):
        with probing(device) as generator:
            weight_H = nn.Parameter(randn(width, generator=generator, device=device, dtype=dtype))
            x_BSH = randn(2, 3, width, generator=generator, device=device, dtype=dtype)
            twin = shallow_twin(module, parameters={"weight": weight_H})
            epsilon = getattr(twin, epsilon_name)
            try:
                compare(
                    lambda x, w=weight_H, e=epsilon, o=offset: rms_norm(x, w, e, offset=o),
                    lambda x, t=twin: type(t).forward(t, x),
                    (x_BSH,),
                    (weight_H,),
                )
            except Mismatch as mismatch:
                failure = failure or mismatch
            else:
                return NormSpec(epsilon_name, offset)
    assert failure is not None
    raise failure


def rms_norm_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a patched RMSNorm; a call with more than the hidden states is the original's own business."""
    if args or kwargs:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    if not torch.compiler.is_compiling() and id(self) in DEPUTIES.norms:
        return hidden_states
    spec: NormSpec = self._chronicals_spec  # type: ignore[assignment]
    weight: Tensor = self.weight  # type: ignore[assignment]
    return rms_norm(hidden_states, weight, getattr(self, spec.epsilon_name), offset=spec.offset)


# -- gated MLP -------------------------------------------------------------------------------------------------------


def gated_mlp_layout(module: nn.Module) -> str | None:
    """`"split"` for gate_proj/up_proj/down_proj, `"fused"` for gate_up_proj/down_proj, None for anything else."""
    children = set(module._modules)
    if not any(callable(getattr(module, name, None)) for name in ACTIVATION_NAMES):
        return None
    if {"gate_proj", "up_proj", "down_proj"} <= children:
        return "split"
    if {"gate_up_proj", "down_proj"} <= children:
        return "fused"
    return None


def verify_gated_mlp(module: nn.Module, device: torch.device, dtype: torch.dtype) -> GatedMLPSpec:
    """Find the activation with which our forward computes what `module` computes; Mismatch if there is none.

    The projections of the twin are small plain linears: the block's own may be large, quantised or LoRA-wrapped, and
    what is replaced is only what lies between them.
    """
    fused = gated_mlp_layout(module) == "fused"
    hidden, intermediate = 16, 24
    failure: Mismatch | None = None
    for activation in GATED_ACTIVATIONS:
        spec = GatedMLPSpec(activation, fused)
        with probing(device) as generator:

            def linear(inputs: int, outputs: int, generator: torch.Generator = generator) -> nn.Linear:
                layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, device=device, dtype=dtype)
                layer.weight.data.copy_(randn(outputs, inputs, generator=generator) * inputs**-0.5 * 2)
                return layer

            projections = (
                {"gate_up_proj": linear(hidden, 2 * intermediate)}
                if fused
                else {"gate_proj": linear(hidden, intermediate), "up_proj": linear(hidden, intermediate)}
            )
            twin = shallow_twin(module, modules={**projections, "down_proj": linear(intermediate, hidden)})
            twin.training = True  # dropout inside the block must show
            twin._chronicals_spec = spec
            try:
                compare(
                    lambda x, t=twin: gated_mlp_forward(t, x),
                    lambda x, t=twin: type(t).forward(t, x),
                    (randn(2, 3, hidden, generator=generator, device=device, dtype=dtype),),
                    tuple(layer.weight for layer in twin._modules.values() if isinstance(layer, nn.Linear)),
                )
            except Mismatch as mismatch:
                failure = failure or mismatch
            else:
                return spec
    assert failure is not None
    raise failure


def gated_mlp_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a patched gated MLP: one node over plain projections or LoRA layers in their plain state.

    Else the projections stay calls (quantised ones, hooked ones, a merged adapter).
    """
    if args or kwargs:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return gated_mlp_of(self, hidden_states)


def gated_mlp_of(self: Any, hidden_states: Tensor, result_needed: bool = True) -> Tensor:
    """What `gated_mlp_forward` gives, or any numbers where the result is not needed, with the same gradients."""
    spec: GatedMLPSpec = self._chronicals_spec
    activation = GATED_ACTIVATIONS[spec.activation]
    inner = (self.gate_up_proj,) if spec.fused else (self.gate_proj, self.up_proj)
    if torch.is_grad_enabled() and all(plain_linear(m) and m.bias is None for m in (*inner, self.down_proj)):
        up_weight = None if spec.fused else self.up_proj.weight
        return gated_mlp(
            hidden_states,
            inner[0].weight,
            up_weight,
            self.down_proj.weight,
            activation=spec.activation,
            recompute=spec.recompute,
            result_needed=result_needed,
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        layers = adapted_operands((*inner, self.down_proj), hidden_states)
        if layers is not None:
            return lora_gated_mlp(
                hidden_states, layers[:-1], layers[-1], activation=spec.activation, recompute=spec.recompute,
                result_needed=result_needed,
            )  # fmt: skip
    return self.down_proj(activation(*(projection(hidden_states) for projection in inner)))


# A bound method pickles as (instance, name): each has to find the class's own forward again.
rms_norm_forward.__name__ = gated_mlp_forward.__name__ = "forward"
