"""Recognise a model's blocks by structure and verify each by number before it is swapped.

No table of model classes: a block qualifies by the attributes that its forward needs, and then a *twin* of it, a
shallow copy with small random parameters, runs forward and backward against the replacement on a random probe. The
twin leaves the model's own values untouched and unread (under ZeRO-3 or meta loading there are none yet), and the
probe draws from a generator of its own, so that the user's random stream does not move. A verdict is remembered per
class, shape and dtype: a model of a hundred layers pays for one probe of each kind.

Legend: B batch, S sequence, H hidden, I intermediate, D head dimension, R rotary dimension.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chronicals_trl.kernels import geglu, qk_rope, rms_norm, swiglu

# Largest error that a replacement may show on the probe, relative to the largest value of the original's result: some
# ten roundings in fp32, two units in the last place in half precision (the original's own error against fp64 is one).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}

PROBE_SEED = 20_260_214
EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")
GATED_ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"swiglu": swiglu, "geglu": geglu}


class NormSpec(NamedTuple):
    """How an RMSNorm module is computed: the attribute that holds epsilon, and 1.0 where the weight is 1 + w."""

    epsilon_name: str
    offset: float


class GatedMLPSpec(NamedTuple):
    """How a gated MLP is computed: the activation's op, and whether gate and up share one projection."""

    activation: str
    fused: bool


class Mismatch(Exception):
    """A block looks like one of ours but computes something else; the message is the report's reason."""


@contextmanager
def probe_rng(device: torch.device) -> Iterator[torch.Generator]:
    """A generator for probes; whatever a probed module draws by itself (dropout) is undone afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(PROBE_SEED)
        yield torch.Generator().manual_seed(PROBE_SEED)


def randn(*shape: int, generator: torch.Generator, like: Tensor | None = None, **to: Any) -> Tensor:
    """Standard normal values from `generator`, drawn on the CPU so that every device sees the same."""
    values = torch.randn(shape, generator=generator)
    return values.to(like) if like is not None else values.to(**to)


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
        with probe_rng(device) as generator:
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
        with probe_rng(device) as generator:

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
    """The forward of a patched gated MLP; the projections stay modules, so that PEFT and hooks keep working."""
    if args or kwargs:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    spec: GatedMLPSpec = self._chronicals_spec
    if spec.fused:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
    else:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
    return self.down_proj(GATED_ACTIVATIONS[spec.activation](gate, up))


# A bound method pickles as (instance, name): each has to find the class's own forward again.
rms_norm_forward.__name__ = gated_mlp_forward.__name__ = "forward"


# -- rotary position embedding ---------------------------------------------------------------------------------------

ROPE_NAME = "apply_rotary_pos_emb"


def looks_like_rope_attention(module: nn.Module) -> bool:
    """The class's forward calls a module-global `apply_rotary_pos_emb`."""
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    return code is not None and ROPE_NAME in code.co_names and callable(forward.__globals__.get(ROPE_NAME))


def verify_rope(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Raise Mismatch unless `qk_rope` computes what the block's own `apply_rotary_pos_emb` computes.

    Both at the full rotary dimension and at half of it: where the original is not made for partial rotation it never
    sees the second case, and its failure there says nothing.
    """
    original = type(module).forward.__globals__[ROPE_NAME]
    positional = [
        name
        for name, parameter in inspect.signature(original).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if positional[:4] != ["q", "k", "cos", "sin"]:
        raise Mismatch(f"apply_rotary_pos_emb takes {positional[:4]} instead of q, k, cos, sin")
    head_dim = int(getattr(module, "head_dim", 16) or 16)
    for rotary_dim in (head_dim, head_dim // 2):
        with probe_rng(device) as generator:
            q_BSHD = randn(2, 5, 4, head_dim, generator=generator, device=device, dtype=dtype)
            k_BSHD = randn(2, 5, 2, head_dim, generator=generator, device=device, dtype=dtype)
            angle_BSR = randn(2, 5, rotary_dim, generator=generator, device=device, dtype=dtype)
            cos_BSR, sin_BSR = angle_BSR.cos(), angle_BSR.flip(-1).sin()

            def run(
                function: Callable[..., Any], q: Tensor, k: Tensor, c: Tensor = cos_BSR, s: Tensor = sin_BSR
            ) -> Any:
                return tuple(function(q.transpose(1, 2), k.transpose(1, 2), c, s))

            if rotary_dim < head_dim:
                try:
                    run(original, q_BSHD, k_BSHD)
                except RuntimeError:
                    return
            compare(
                lambda q, k, run=run: run(qk_rope, q, k),
                lambda q, k, run=run: run(original, q, k),
                (q_BSHD, k_BSHD),
                (),
            )
