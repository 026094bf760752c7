"""patch_model and unpatch_model: swap the blocks of one model instance, and say what was swapped.

A patched forward is an instance attribute, a `types.MethodType` over a module-level function that reads everything off
`self`: a deep copy (PEFT makes them) is bound to the copy, a pickle finds the class's own forward by name, and nothing
outside the instance changes.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.kernels import backend as kernel_backend
from chronicals_trl.model import attention, attention_choice, decoder, lm_head, match, rope, tied_weight
from chronicals_trl.model.lora_state import match_lora
from chronicals_trl.model.match import SPEC, Mismatch
from chronicals_trl.report import ActivationReport, PartReport

_PATCHED = "_chronicals_patched"
_PREVIOUS = "_chronicals_previous_forward"

# Verdicts on one model's blocks by (part, class, its forward, shape, traits, device, dtype): a spec, or a Mismatch.
# Emptied at the start of `patch_model`: another model may have another configuration, which its blocks may read.
_verdicts: dict[tuple[Any, ...], Any] = {}


def patch_model(
    model: nn.Module,
    config: ChronicalsConfig | Mapping[str, Any] | str | None = None,
    *,
    leave_out: Mapping[str, str] | None = None,
    device: torch.device | None = None,
) -> ActivationReport:
    """Swap the blocks of `model` for fused ones where they fit.

    Each candidate is recognised by structure and verified by number (`model.match`). Patching twice is patching once.
    Packing and LoRA+ belong to the trainer (LoRA+ to the plugin, in a raw loop) and are off in the report until it
    sets them; `"on"` for one of them is an error here.

    Args:
        model: a `PreTrainedModel`, or a PEFT model around one; changed in place.
        config: which parts (see ChronicalsConfig); `None` takes the environment and the defaults.
        leave_out: part -> reason, for parts that a setting outside the model rules out.
        device: where the model will run, if its weights are on the CPU or on meta until sharding moves them; `None`
            takes it to run where they are. Kernels are chosen for that device, and verified on it.

    Returns:
        The report: one line a part, on or off and why.

    Raises:
        ValueError: a parameter holds NaN or infinity, or `config` is not valid.
        TypeError: `model` is not a module.
        RuntimeError: with `strict=True` a part did not fit, or a part that is set to `"on"` did not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    resolved = config if isinstance(config, ChronicalsConfig) else ChronicalsConfig.resolve(config)
    unpatch_model(model)
    _verdicts.clear()
    require_finite(model)
    base = base_model(model)
    device, dtype = placement(model, device)
    report = ActivationReport.all_off("decided by the trainer, not by patch_model")
    skip = dict(leave_out or {})
    if layers_are_shared(model):
        reason = "the model's layers are cut over ranks (tensor parallelism): not verified there"
        skip = dict.fromkeys((*_BLOCKS, "lora", "attention", "head"), reason) | skip

    def settle(name: str, swap: Callable[[], PartReport]) -> None:
        if getattr(resolved, name) == "off":
            report.set(PartReport(name, "off", reason=f"{name}='off' in the configuration"))
        elif name in skip:
            report.set(PartReport(name, "off", reason=skip[name], omitted=True))
        else:
            try:
                report.set(swap())
            except Exception as error:  # an unknown kind of model must cost this part alone; the table shows why
                reason = f"cannot be judged on this model ({type(error).__name__}: {error})"
                report.set(PartReport(name, "off", reason=reason, omitted=True))

    settle("rms_norm", lambda: _swap_blocks(model, "rms_norm", device, dtype))
    recompute = resolved.recompute_mlp
    settle(
        "gated_mlp",
        lambda: _swap_blocks(model, "gated_mlp", device, dtype, lambda spec: spec._replace(recompute=recompute)),
    )
    repeats = rope.tables_repeat(model)
    settle(
        "qk_rope", lambda: _swap_blocks(model, "qk_rope", device, dtype, lambda spec: spec._replace(repeats=repeats))
    )
    settle("lora", lambda: _swap_lora(model, device))
    report.notes += _join_blocks(model, device, dtype)
    settle("attention", lambda: _swap_attention(base, resolved, device))
    settle("head", lambda: _swap_head(base, resolved, device, dtype))
    try:
        report.raise_for_omissions(resolved)
    except RuntimeError:
        unpatch_model(model)
        raise
    return report


def unpatch_model(model: nn.Module) -> None:
    """Give every block of `model` the forward back that it had before `patch_model`; without effect on others."""
    for module in model.modules():
        if module.__dict__.pop(_PATCHED, False):
            module.__dict__.pop("forward", None)
            module.__dict__.pop(SPEC, None)
            module.__dict__.pop(decoder.HANDS_ON, None)
            previous = module.__dict__.pop(_PREVIOUS, None)
            if previous is not None:
                module.forward = previous
        attention.restore_attention(module)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_model` has changed a block of `model`."""
    return any(_PATCHED in module.__dict__ or "_chronicals_configs" in module.__dict__ for module in model.modules())


# -- the model as a whole --------------------------------------------------------------------------------------------


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def layers_are_shared(model: nn.Module) -> bool:
    """Whether ranks hold parts of the same layers and compute on them as they are (tensor parallelism).

    FSDP's shards are gathered before a module computes, so they do not count.
    """
    if (getattr(base_model(model), "_tp_size", None) or 1) > 1:
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule  # which take a while to import
    from torch.distributed.tensor import DTensor

    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return sharded and not any(isinstance(module, FSDPModule) for module in model.modules())


def placement(model: nn.Module, device: torch.device | None = None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the probes: those of the floating-point parameters.

    Args:
        device: Instead of the CPU or meta. FSDP and DeepSpeed move a model when they shard it, after patching.
    """
    elsewhere = torch.device("cpu") if device is None else device
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dim() > 0:
            here = parameter.device if parameter.device.type not in ("cpu", "meta") else elsewhere
            dtype = parameter.dtype if parameter.dtype in match.TOLERANCE else torch.float32
            return here, dtype
    return elsewhere, torch.float32


def require_finite(model: nn.Module) -> None:
    """Raise ValueError naming the first parameters that hold NaN or infinity; one device read for the whole model."""
    names, flags = [], []
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state"):  # bitsandbytes' codes, which `bnb_4bit_quant_storage` calls bfloat16
            continue
        if parameter.is_floating_point() and parameter.device.type != "meta" and parameter.numel():
            names.append(name)
            # A sum is not finite if any element is not; it reads the tensor once and needs no mask of its size.
            flags.append(~parameter.detach().sum(dtype=torch.float32).isfinite())
    if flags and bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any()):
        suspects = {name for name, flag in zip(names, flags, strict=True) if flag}
        # A sum of large finite weights may overflow: what is suspected is looked at element by element.
        bad = [n for n, p in model.named_parameters() if n in suspects and not bool(p.detach().isfinite().all())]
        if bad:
            raise ValueError(
                f"{len(bad)} parameter(s) of the model hold NaN or infinity before training, first: {bad[0]}. Nothing "
                "can be learned from there: reload the checkpoint, or look for the run that wrote it."
            )


def _install(module: nn.Module, forward: Callable[..., Any], spec: Any = None) -> None:
    previous = module.__dict__.get("forward")
    if previous is not None:
        module.__dict__[_PREVIOUS] = previous
    module.__dict__[SPEC] = spec
    module.__dict__[_PATCHED] = True
    module.__dict__["forward"] = types.MethodType(forward, module)


# -- blocks: norms, MLPs, rotary embeddings --------------------------------------------------------------------------


# part -> (looks like one, what the verdict may depend on besides the class, verification, forward)
_BLOCKS: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
    "rms_norm": (
        match.looks_like_rms_norm,
        lambda module: match.parameter_shape(module.weight),
        match.verify_rms_norm,
        lambda module: match.rms_norm_forward,
    ),
    "gated_mlp": (
        match.gated_mlp_layout,
        lambda module: None,
        match.verify_gated_mlp,
        lambda module: match.gated_mlp_forward,
    ),
    "qk_rope": (
        rope.looks_like_rope_attention,
        rope.attention_traits,
        rope.verify_attention,
        lambda module: rope.attention_forward,
    ),
}
_WHAT = {"rms_norm": "RMSNorm", "gated_mlp": "gated MLP", "qk_rope": "attention with rotary position embedding"}


def _swap_blocks(
    model: nn.Module, part: str, device: torch.device, dtype: torch.dtype, adapt: Callable[[Any], Any] | None = None
) -> PartReport:
    looks_like, shape, verify, forward = _BLOCKS[part]
    swapped, left = 0, Counter[str]()
    for module in model.modules():
        if not looks_like(module):
            continue
        if "forward" in module.__dict__:
            left[f"{type(module).__name__} already has the forward of another library"] += 1
            continue
        verdict = _remembered(part, verify, module, shape(module), device, dtype)
        if isinstance(verdict, Mismatch):
            left[f"{type(module).__name__}: {verdict}"] += 1
        else:
            _install(module, forward(module), verdict if adapt is None else adapt(verdict))
            swapped += 1
    reason = "; ".join(f"{count} left out, {why}" for why, count in left.items()) or None
    if swapped:
        return PartReport(part, "on", modules=swapped, backend=kernel_backend(device), reason=reason)
    return PartReport(part, "off", reason=reason or f"the model has no {_WHAT[part]}", omitted=True)


def _join_blocks(model: nn.Module, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What goes beyond single blocks, where those are patched; notes for the report."""
    counts = Counter[str]()
    for module in list(model.modules()):
        spec = module.__dict__.get(SPEC)
        if isinstance(spec, rope.AttentionSpec):
            counts["q/k norms done by the rotation"] += spec.norm is not None
            if spec.shares_input:
                projections: list[Any] = [module._modules[name] for name in rope.PROJECTIONS]
                if any(match_lora(m) and not match.own_forward(m) for m in projections):
                    continue  # the part `lora` is off for one of them
                counts["q, k and v as one node"] += 1
                for projection in projections:
                    if not match.own_forward(projection):  # a LoRA layer has one, or it is shared with another block
                        _install(projection, rope.handed_linear_forward)
        elif "forward" not in module.__dict__ and decoder.looks_like_decoder_layer(module):
            verdict = _remembered("decoder", decoder.verify_decoder_layer, module, None, device, dtype)
            if not isinstance(verdict, Mismatch):
                _install(module, decoder.decoder_forward, verdict)
                counts["residual additions joined to the norms"] += 1
    decoder.link_layers(model)
    return [f"{what} in {count} layers" for what, count in counts.items() if count]


def _remembered(
    part: str, verify: Callable[..., Any], module: Any, shape: Any, device: torch.device, dtype: torch.dtype
) -> Any:
    key = (part, type(module), type(module).forward, shape, match.traits(module), device, dtype)
    if key not in _verdicts:
        _verdicts[key] = _verdict(verify, module, device, dtype)
    return _verdicts[key]


def _verdict(verify: Callable[..., Any], module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """The spec under which the replacement holds in fp32 and in the model's own dtype, or the Mismatch."""
    try:
        with torch.autocast(device.type, enabled=False):
            spec = verify(module, device, torch.float32)
            if dtype != torch.float32 and verify(module, device, dtype) != spec:
                return Mismatch(f"another variant matches in {dtype} than in float32")
            return spec
    except Mismatch as mismatch:
        return mismatch
    except Exception as error:  # a block that cannot even run on the probe is not one of ours
        return Mismatch(f"its forward does not run on a probe ({type(error).__name__}: {error})")


# -- attention, head, LoRA -------------------------------------------------------------------------------------------


def _swap_attention(base: Any, config: ChronicalsConfig, device: torch.device) -> PartReport:
    backend, reason = attention_choice.choose_backend(base, config.attention_backend, device)
    if backend is None:
        return PartReport("attention", "off", reason=reason, omitted=True)
    attention.use_backend(base, backend)
    layers = base.config.get_text_config().num_hidden_layers
    return PartReport("attention", "on", modules=layers, backend=attention_choice.LABELS[backend], reason=reason)


def _swap_head(base: Any, config: ChronicalsConfig, device: torch.device, dtype: torch.dtype) -> PartReport:
    linears = lm_head.head_linears(base)
    if isinstance(linears, str):
        return PartReport("head", "off", reason=linears, omitted=True)
    spec = lm_head.head_spec(base, config.logit_budget_mib)
    key = ("head", type(base), type(base).forward, base.config.get_text_config().hidden_size, spec, device, dtype)
    if key not in _verdicts:
        _verdicts[key] = _verdict(
            lambda model, device, dtype: lm_head.verify_head(model, spec, device, dtype), base, device, dtype
        )
    if isinstance(_verdicts[key], Mismatch):
        return PartReport("head", "off", reason=str(_verdicts[key]), omitted=True)
    for linear in linears:
        _install(linear, lm_head.head_forward)
    reason, tied = _swap_embedding(base, device, dtype)
    _install(base, lm_head.causal_lm_forward(type(base).forward), replace(spec, tied=tied))
    return PartReport("head", "on", modules=1, backend=kernel_backend(device), reason=reason)


def _swap_embedding(base: Any, device: torch.device, dtype: torch.dtype) -> tuple[str | None, bool]:
    """What the report says of a trained weight that embedding and head share, and whether they share its gradient."""
    embedding, head = tied_weight.input_embedding(base), base.get_output_embeddings()
    if not tied_weight.is_tied(embedding, head):
        return None, False
    why = tied_weight.obstacle(base, embedding, head)
    if why is None:
        verdict = _verdict(tied_weight.verify, embedding, device, dtype)
        why = str(verdict) if isinstance(verdict, Mismatch) else None
    if why is not None:
        return f"{tied_weight.APART}: {why}", False
    _install(embedding, tied_weight.embedding_forward)
    return tied_weight.TOGETHER, True


def _swap_lora(model: nn.Module, device: torch.device) -> PartReport:
    try:
        from peft.tuners.lora.layer import LoraLayer
    except ImportError:
        return PartReport("lora", "off", reason="peft is not installed")
    candidates = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not candidates:
        return PartReport("lora", "off", reason="the model has no LoRA adapter")
    from chronicals_trl.model import lora

    swapped, left = 0, Counter[str]()
    for module in candidates:
        why = "another library has patched it" if "forward" in module.__dict__ else lora.fits(module)
        if why is None:
            key = ("lora", type(module), type(module).forward, type(module.base_layer), _drops(module), device)
            if key not in _verdicts:
                _verdicts[key] = lora.verify(module, device)
            why = _verdicts[key]
        if why is None:
            _install(module, lora.lora_forward)
            swapped += 1
        else:
            left[why] += 1
    reason = "; ".join(f"{count} left out: {why}" for why, count in left.items()) or None
    if swapped:
        return PartReport("lora", "on", modules=swapped, backend="torch", reason=reason)
    return PartReport("lora", "off", reason=reason, omitted=True)


def _drops(module: Any) -> bool:
    """Whether an adapter of a LoRA layer has dropout."""
    return any(getattr(dropout, "p", 0.0) > 0.0 for dropout in module.lora_dropout.values())
