"""What hooks keep apart, of a model that was patched before they came.

Sharding follows patching. ZeRO-3 gathers a weight in hooks of the very module that holds it, FSDP2 in those of its
unit: where such a module is one that a fused block reads instead of calling, the block calls it after all, in every
forward pass. That is right, but it is not what the report of `patch_model` says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from chronicals_trl.model import tied_weight
from chronicals_trl.model.lm_head import HeadSpec
from chronicals_trl.model.lora_state import hooked_part, match_lora
from chronicals_trl.model.match import SPEC, GatedMLPSpec, own_forward, unhooked
from chronicals_trl.model.rope import PROJECTIONS, AttentionSpec
from chronicals_trl.report import ActivationReport

_MLP_PROJECTIONS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


def amend(report: ActivationReport, model: nn.Module) -> list[str]:
    """Set right what `report` says of a patched model, as the hooks on its modules are now: call it after sharding.

    The part `lora` is off where every layer takes PEFT's own path; `head` says so where a weight that embedding and
    head share gets two gradients.

    Returns:
        What is new in the report; [] where nothing is.
    """
    patched = [module for module in model.modules() if own_forward(module)]
    adapted = [module for module in patched if match_lora(module)]
    apart = sum(hooked_part(layer) is not None for layer in adapted)
    why = "hooks on the linears inside, which only their own calls run: ZeRO-3, FSDP2 units, offloading or your own"
    news, notes = [], []
    if apart and apart == len(adapted):
        if report["lora"].state == "on":
            report.set(replace(report["lora"], state="off", modules=0, backend=None, reason=why, omitted=True))
            news.append(f"lora is off: {why}")
    elif apart:
        notes.append(f"lora: {apart} of {len(adapted)} layers take PEFT's own path: {why}")
    blocks = sum(any(map(_called, _projections(module))) for module in patched)
    if blocks:
        notes.append(f"{blocks} attention blocks and MLPs call their projections one by one, since these have hooks")
    if report["head"].reason == tied_weight.TOGETHER:
        news += _amend_head(report, model)
    notes = [note for note in notes if note not in report.notes]
    report.notes += notes
    return news + notes


def _amend_head(report: ActivationReport, model: nn.Module) -> list[str]:
    """What the embedding that shares the head's weight does now; [] where that is what the report says."""
    of: Any
    for of in model.modules():
        spec = of.__dict__.get(SPEC)
        if not isinstance(spec, HeadSpec) or not spec.tied:
            continue
        ends = of.get_input_embeddings(), of.get_output_embeddings()
        why = tied_weight.obstacle(of, *ends)
        if why is not None:
            said = f"{tied_weight.APART}: {why}" if tied_weight.is_tied(*ends) else None  # frozen, or no longer tied
            report.set(replace(report["head"], reason=said))
            return [] if said is None else [f"head: {said}"]
    return []


def _projections(module: nn.Module) -> list[Any]:
    """The modules of a patched block that it reads, where nothing is hooked, instead of calling them."""
    spec = module.__dict__.get(SPEC)
    joined: tuple[str, ...] = ()
    if isinstance(spec, AttentionSpec) and spec.shares_input:
        joined = PROJECTIONS
    elif isinstance(spec, GatedMLPSpec):
        joined = _MLP_PROJECTIONS
    return [module._modules[name] for name in joined if name in module._modules]


def _called(projection: Any) -> bool:
    return not unhooked(projection) or (match_lora(projection) and hooked_part(projection) is not None)
