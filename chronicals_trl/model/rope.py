"""The front of an attention block: q, k and v from one input, per-head norms of q and k, and their rotation.

transformers' attention blocks call a function of their module, `apply_rotary_pos_emb`. A copy of the block's forward,
in whose globals that name is ours, is bound to the instance; the process's function stays what it is. Around that
copy, where the block's structure permits and a twin of it agrees by number:

* the norms of q and k (Qwen3, Gemma 3) let their input pass, and the rotation does their work in its own kernel;
* q_proj, k_proj and v_proj are one autograd node (`kernels/_shared_linear.py`, `_lora_linear.py`). Each
  projection is handed its result and gives it out when the block calls it, so the block's own code decides what
  becomes of it.

Both last for one call of the block and are undone when it ends. Whoever calls a projection or a norm otherwise gets
what it has always given. What the rotation has to do is noted beside the call (`DEPUTIES`), never in its arguments: a
block may give cos and sin to others (an indexer, a second rotation function), and they are tensors to all.

Legend: B batch, S sequence, H hidden, D head dimension, R rotary dimension.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronicals_trl.kernels import lora_linears, qk_norm_rope, qk_rope, rms_norm, shared_linear
from chronicals_trl.model.lora_state import fits, match_lora
from chronicals_trl.model.match import (
    DEPUTIES,
    SPEC,
    Mismatch,
    NormSpec,
    adapted_operands,
    compare,
    own_forward,
    parameter_shape,
    plain_linear,
    probing,
    randn,
    rms_norm_forward,
    shallow_twin,
    unhooked,
)

ROPE_NAME = "apply_rotary_pos_emb"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
NORMS = ("q_norm", "k_norm")


class AttentionSpec(NamedTuple):
    """What a patched attention block does besides the rotation."""

    norm: NormSpec | None = None  # of q_norm and k_norm, done by the rotation
    shares_input: bool = False  # q_proj, k_proj and v_proj as one node
    repeats: bool = False  # cos and sin are known to repeat their first half


class _Norms(NamedTuple):
    q_weight: Tensor
    k_weight: Tensor
    eps: float
    offset: float


class _Rotation:
    """What our rotation knows of the block that calls it, for one call of the block.

    Args:
        tables: cos and sin as the block got them, (B, S, R) each.
        repeats: whether their second half is their first once more.
        norms: of q and k, if they have let their input pass.
    """

    __slots__ = ("norms", "pending", "repeats", "tables")

    def __init__(self, tables: tuple[Tensor, Tensor], repeats: bool, norms: _Norms | None) -> None:
        self.tables = tables
        self.repeats = repeats
        self.norms = norms
        self.pending = norms is not None  # until a rotation has done their work


# -- forwards --------------------------------------------------------------------------------------------------------


# One copy a function. A dict, since torch.compile would look behind functools.cache and trace the making of it.
_copies: dict[Callable[..., Any], Callable[..., Any]] = {}


def _with_rope(forward: Any) -> Callable[..., Any]:
    """A copy of an attention block's forward in whose globals `apply_rotary_pos_emb` is ours."""
    if forward not in _copies:
        _copies[forward] = _copy_with_rope(forward)
    return _copies[forward]


def _copy_with_rope(forward: Any) -> Callable[..., Any]:
    inner = _decorated(forward)
    if inner is not None:
        # A decorator around it (transformers 5.24 renames an argument in one) does its work around our copy too.
        ours = _copy_with_rope(inner)
        cells = tuple(types.CellType(ours) if cell.cell_contents is inner else cell for cell in forward.__closure__)
        return _copy(forward, forward.__globals__, cells)
    original = forward.__globals__[ROPE_NAME]

    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 4:  # of one tensor alone (Qwen4-Exp's indexer), or by names
            return original(*args, **kwargs)
        q, k, cos, sin, *others = args
        told: _Rotation | None = None if torch.compiler.is_compiling() else DEPUTIES.rotation
        repeats, norms = False, None
        if told is not None:
            # The block may have made others of the tables that it got: of those nothing is known.
            repeats = told.repeats and cos is told.tables[0] and sin is told.tables[1]
            norms, told.pending = told.norms, False
        usual = not others and (not kwargs or kwargs == {"unsqueeze_dim": 1})
        if norms is not None and usual:
            return qk_norm_rope(
                q, k, norms.q_weight, norms.k_weight, norms.eps, cos, sin, offset=norms.offset, repeats=repeats
            )
        if norms is not None:
            q = rms_norm(q, norms.q_weight, norms.eps, offset=norms.offset)
            k = rms_norm(k, norms.k_weight, norms.eps, offset=norms.offset)
        return qk_rope(q, k, cos, sin, repeats=repeats) if usual else original(q, k, cos, sin, *others, **kwargs)

    return _copy(forward, {**forward.__globals__, ROPE_NAME: apply_rotary_pos_emb}, forward.__closure__)


def _copy(function: Any, names: dict[str, Any], closure: tuple[types.CellType, ...] | None) -> Callable[..., Any]:
    """`function` with `names` for its globals, and `closure`."""
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(copied)


def _decorated(forward: Any) -> Any:
    """What `forward` wraps and keeps in its closure, as a decorator with `functools.wraps` does; else None."""
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        return None
    return inner if any(cell.cell_contents is inner for cell in forward.__closure__ or ()) else None


def _innermost(forward: Any) -> Any:
    while (inner := _decorated(forward)) is not None:
        forward = inner
    return forward


def attention_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a patched attention block."""
    forward = _with_rope(type(self).forward)
    spec: AttentionSpec = self.__dict__[SPEC]
    # Nothing of this is for torch.compile, which would have to trace what is noted for one call and struck out again.
    if torch.compiler.is_compiling():
        return forward(self, *args, **kwargs)
    told: list[nn.Module] = []
    around = DEPUTIES.rotation  # of a block that this one is part of
    try:
        DEPUTIES.rotation = rotation = None if args else _asked_of_rotation(self, spec, kwargs, told)
        if spec.shares_input and torch.is_grad_enabled() and not args:
            projections = [getattr(self, name) for name in PROJECTIONS]
            outputs = _together(projections, kwargs["hidden_states"])
            told += projections if outputs else []
            DEPUTIES.projections.update(zip(map(id, projections), outputs, strict=False))
            del outputs  # each is the block's alone once it has been given out
        output = forward(self, *args, **kwargs)
    finally:
        DEPUTIES.rotation = around
        for module in told:
            DEPUTIES.norms.discard(id(module))
            DEPUTIES.projections.pop(id(module), None)
    if rotation is not None and rotation.pending:
        raise RuntimeError(
            f"{type(self).__name__} has not called {ROPE_NAME}, which does the work of its norms of q and k here. "
            "Set chronicals_config={'qk_rope': 'off'}."
        )
    return output


def _asked_of_rotation(
    self: Any, spec: AttentionSpec, kwargs: dict[str, Any], told: list[nn.Module]
) -> _Rotation | None:
    """What the block's rotation has to know; the norms whose work it does let their input pass, and are in `told`."""
    tables = kwargs.get("position_embeddings")
    if tables is None:
        return None
    norms = None
    if spec.norm is not None and all(own_forward(m) and unhooked(m) for m in (self.q_norm, self.k_norm)):
        eps = getattr(self.q_norm, spec.norm.epsilon_name)
        norms = _Norms(self.q_norm.weight, self.k_norm.weight, eps, spec.norm.offset)
        told += [self.q_norm, self.k_norm]
        DEPUTIES.norms.update(map(id, told))
    return _Rotation(tables, spec.repeats, norms)


def _together(projections: list[Any], x: Tensor) -> tuple[Tensor, ...]:
    """The projections' results from one node, or () where one of them has to be called.

    Handing over is the projection's own forward: PEFT may have put a layer of its own in its place since.
    """
    if not all(own_forward(m) for m in projections):
        return ()
    if all(plain_linear(m) for m in projections):
        return shared_linear(x, [m.weight for m in projections], [m.bias for m in projections])
    layers = adapted_operands(projections, x)
    return () if layers is None else lora_linears(x, layers)


def handed_linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """The forward of a projection: what the attention block has handed it, else its own product."""
    handed = None if torch.compiler.is_compiling() else DEPUTIES.projections.pop(id(self), None)
    return F.linear(input, self.weight, self.bias) if handed is None else handed


# A bound method pickles as (instance, name): each has to find the class's own forward again.
attention_forward.__name__ = handed_linear_forward.__name__ = "forward"


def tables_repeat(model: nn.Module) -> bool:
    """Whether every rotary embedding of `model` gives cos and sin whose second half is the first once more."""
    found = [
        module
        for module in model.modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]
    try:
        return bool(found) and all(_repeats(table) for module in found for table in _tables_of(copy.deepcopy(module)))
    except Exception:  # a rotary embedding of another make, or without values yet: nothing is taken for granted
        return False


def _tables_of(rotary: nn.Module) -> list[Tensor]:
    """cos and sin of a few positions, for each kind of layer that `rotary` (a copy: it may adapt itself) knows."""
    position_ids = torch.tensor([[0, 1, 2, 3, 500]], device=next(rotary.buffers()).device)
    kinds: list[dict[str, Any]] = [{}]
    if "layer_type" in inspect.signature(type(rotary).forward).parameters:
        kinds = [{"layer_type": kind} for kind in set(rotary.config.layer_types)]  # type: ignore[union-attr, arg-type]
    x = torch.zeros(1, device=position_ids.device)
    return [table for kind in kinds for table in rotary(x, position_ids, **kind)]


def _repeats(table: Tensor) -> bool:
    first, second = table.chunk(2, dim=-1)
    return torch.equal(first, second)


# -- recognition and verification ------------------------------------------------------------------------------------


def looks_like_rope_attention(module: nn.Module) -> bool:
    """The class's forward calls a module-global `apply_rotary_pos_emb`."""
    forward: Any = _innermost(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and ROPE_NAME in code.co_names and callable(forward.__globals__.get(ROPE_NAME))


def _other_rotations(forward: Any) -> list[str]:
    """Names of further rotation functions in an attention block's forward.

    DeepSeek-V3's chooses by its configuration between ours and `apply_rotary_pos_emb_interleave`.
    """
    code = _innermost(forward).__code__
    return [name for name in code.co_names if name != ROPE_NAME and name.startswith("apply_rotary")]


def attention_traits(module: nn.Module) -> tuple[Any, ...]:
    """What a verdict on an attention block depends on besides its class and its settings."""
    weights = [getattr(getattr(module, name, None), "weight", None) for name in NORMS]  # Dory's norms have none
    return (
        tuple(None if weight is None else parameter_shape(weight) for weight in weights),
        tuple(getattr(m, "bias", None) is None for m in map(module._modules.get, PROJECTIONS)),
        _projections_fit(module),
    )


def verify_attention(module: Any, device: torch.device, dtype: torch.dtype) -> AttentionSpec:
    """Find how much of the block's front can be fused; Mismatch where not even the rotation is ours."""
    others = _other_rotations(type(module).forward)
    if others:
        raise Mismatch(f"it may rotate by another function instead ({', '.join(others)})")
    _verify_rotation(module, device, dtype)
    wide = AttentionSpec(_fusible_norm(module), _projections_fit(module))
    for spec in (wide, wide._replace(norm=None), wide._replace(shares_input=False)):
        if spec == AttentionSpec():
            break
        try:
            _verify_front(module, spec, device)
        except Exception:  # the block's own code is not what its structure suggests: less is fused
            continue
        return spec
    return AttentionSpec()


def _fusible_norm(module: nn.Module) -> NormSpec | None:
    """The spec of q_norm and k_norm if both are patched RMSNorms of single heads with the same settings."""
    norms: list[Any] = [getattr(module, name, None) for name in NORMS]
    head_dim = getattr(module, "head_dim", None)
    specs = {norm.__dict__.get(SPEC) for norm in norms if isinstance(norm, nn.Module)}
    if len(specs) != 1 or None in norms:
        return None
    (spec,) = specs
    if not isinstance(spec, NormSpec) or any(parameter_shape(norm.weight) != (head_dim,) for norm in norms):
        return None
    if len({getattr(norm, spec.epsilon_name) for norm in norms}) != 1:
        return None
    return spec


def _projections_fit(module: nn.Module) -> bool:
    """Linears without anything about them, or LoRA layers over such."""
    return all(
        m is not None and (fits(m) is None if match_lora(m) else plain_linear(m))
        for m in map(module._modules.get, PROJECTIONS)
    )


def _verify_rotation(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Raise Mismatch unless `qk_rope` computes what the block's own `apply_rotary_pos_emb` computes.

    Both at the full rotary dimension and at half of it: where the original is not made for partial rotation it never
    sees the second case, and its failure there says nothing.
    """
    original = _innermost(type(module).forward).__globals__[ROPE_NAME]
    positional = [
        name
        for name, parameter in inspect.signature(original).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if positional[:4] != ["q", "k", "cos", "sin"]:
        raise Mismatch(f"apply_rotary_pos_emb takes {positional[:4]} instead of q, k, cos, sin")
    head_dim = int(getattr(module, "head_dim", 16) or 16)
    for rotary_dim in (head_dim, head_dim // 2):
        with probing(device) as generator:
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


def _verify_front(module: Any, spec: AttentionSpec, device: torch.device) -> None:
    """Raise Mismatch unless twins of the block, its own forward and ours, agree on a probe.

    The twins have one key-value head, projections of hidden size 16 and eager attention: what is verified lies in
    front of the attention function, and does not depend on how many heads there are. In float32: the question is
    what the block's code does, and each op's rounding is judged elsewhere.
    """
    dtype = torch.float32
    head_dim, groups, hidden = module.head_dim, module.num_key_value_groups, 16
    with probing(device) as generator:

        def parameter(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(randn(*shape, generator=generator, device=device, dtype=dtype) * scale)

        def linear(like: nn.Module | None, inputs: int, outputs: int) -> nn.Linear:
            layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, device=device, dtype=dtype)
            layer.weight = parameter(outputs, inputs, scale=inputs**-0.5)
            if getattr(like, "bias", None) is not None:
                layer.bias = parameter(outputs, scale=1.0)
            return layer

        sizes = {"q_proj": groups * head_dim, "k_proj": head_dim, "v_proj": head_dim}
        parts: dict[str, nn.Module] = {
            name: linear(module._modules.get(name), hidden, size) for name, size in sizes.items()
        }
        parts["o_proj"] = linear(module._modules.get("o_proj"), groups * head_dim, hidden)
        for name in NORMS:
            if name in module._modules:
                norm = module._modules[name]
                # Over single heads, or over all heads together (OLMo 2), of which the twins have fewer.
                alone = parameter_shape(norm.weight) == (head_dim,)
                width = head_dim if alone else sizes[name.replace("norm", "proj")]
                parts[name] = shallow_twin(norm, parameters={"weight": parameter(width, scale=1.0)})

        def twin(modules: dict[str, nn.Module]) -> Any:
            copied = shallow_twin(module, modules=modules)
            copied.config = copy.copy(module.config)
            copied.config._attn_implementation_internal = "eager"
            copied.training = False  # attention dropout is not ours to judge
            return copied

        original = twin(parts)
        fused_parts = {name: shallow_twin(part, parameters=dict(part._parameters)) for name, part in parts.items()}
        forwards: dict[str, Callable[..., Any]] = {
            **dict.fromkeys(PROJECTIONS, handed_linear_forward),
            # With the part rms_norm off they are the model's own.
            **{n: rms_norm_forward for n in NORMS if n in parts and isinstance(parts[n].__dict__.get(SPEC), NormSpec)},
        }
        for name, forward in forwards.items():
            fused_parts[name].forward = types.MethodType(forward, fused_parts[name])
        ours = twin(fused_parts)
        ours.__dict__[SPEC] = spec
        x_BSH = randn(2, 5, hidden, generator=generator, device=device, dtype=dtype)
        angle_BSR = randn(2, 5, head_dim // 2, generator=generator, device=device, dtype=dtype).repeat(1, 1, 2)
        tables = (angle_BSR.cos(), angle_BSR.sin())

        def run(forward: Callable[..., Any], block: Any, x: Tensor) -> Tensor:
            out: Tensor = forward(block, hidden_states=x, position_embeddings=tables, attention_mask=None)[0]
            return out

        compare(
            lambda x: run(attention_forward, ours, x),
            lambda x: run(type(module).forward, original, x),
            (x_BSH,),
            tuple(p for part in parts.values() for p in part.parameters()),
        )
