"""Cut Cross-Entropy at the head: the loss runs inside the head module's own call.

`model(..., labels=..., fused_lm_head=True)` keeps TRL's contract (trl.trainer.utils.add_fused_lm_head) and returns its
`FusedCausalLMOutput`; without that flag the forward is the one that was there before, so generation and evaluation
with logits do not change. The loss is computed in `lm_head.forward(hidden, labels=...)` and not on the head's weight
from outside, because FSDP2 and ZeRO-3 gather a weight, and reduce its gradient, in the hooks of the module's call.

Legend: B batch, S sequence, N = B * S tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput

from chronicals_trl.kernels import LinearCrossEntropyOutput, linear_cross_entropy
from chronicals_trl.model import tied_weight
from chronicals_trl.model.match import Mismatch, compare, probing, randn, require_close, shallow_twin


@dataclass(frozen=True)
class HeadSpec:
    """What lies between the head's projection and the loss: logits = softcap(scale * (hidden W^T + bias)).

    `tied`: the embedding, whose weight is the head's, is patched as well (`tied_weight`).
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    logit_budget_mib: int | None = None
    tied: bool = False


@dataclass(frozen=True)
class HeadCall:
    """What one training step asks of the head, beyond the labels.

    Attributes:
        weighting: `"none"`, or `"dft"` for Dynamic Fine-Tuning (the loss of a token times its detached probability).
        router_loss: whether `loss` includes the router's auxiliary loss, as TRL's contract has it.
        token_mask: (B, S) bool, False on padding that the router's auxiliary loss must not count.
        rows: (R,) int64 into the B * S positions, those with a label and -1 or others up to a static length; None
            computes all of them.
    """

    weighting: str = "none"
    router_loss: bool = True
    token_mask: Tensor | None = None
    rows: Tensor | None = None


def head_spec(model: PreTrainedModel, logit_budget_mib: int | None) -> HeadSpec:
    """Read the logit conventions off the text configuration; `verify_head` checks them by number.

    Cohere multiplies by `logit_scale`, Muse by `output_multiplier`, Falcon-H1 by `lm_head_multiplier`, Granite and
    MiniCPM3 divide by `logits_scaling` where HyperCLOVA X multiplies by it; Gemma 2 caps with a tanh.
    """
    config = model.config.get_text_config()
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None) if scale is None else scale
    if scale is None and (scaling := getattr(config, "logits_scaling", None)) is not None:
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return HeadSpec(
        logit_scale=1.0 if scale is None else float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_budget_mib=logit_budget_mib,
    )


# -- the patched forwards --------------------------------------------------------------------------------------------


def head_forward(self: nn.Linear, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of a patched head: logits as before, or, given `labels`, the loss in their place.

    Args:
        hidden: (B, S, H).
        labels: (B, S) int64, already shifted; -100 is ignored.
        spec: the model's HeadSpec.
        call: the step's HeadCall.
        num_items: tokens of the whole optimizer step over which the loss is averaged; their count here if None.
        handover: what the embedding may have left in this forward pass, or None.

    Returns:
        LinearCrossEntropyOutput; `loss` a scalar, the others (B * S,).
    """
    if "labels" not in kwargs:
        return type(self).forward(self, hidden, *args, **kwargs)
    handover: tied_weight.Handover | None = kwargs.pop("handover", None)
    weight = self.weight if handover is None else handover.weight_for(self)
    return _head_loss(hidden, weight, self.bias, **kwargs)


head_forward.__name__ = "forward"  # a bound method pickles by name, and has to find the class's own forward again


# The op's autograd node forms gradients in its forward and must not be given materialised tangents, which AOTAutograd
# would do; the break costs one graph boundary in front of the head.
@torch.compiler.disable
def _head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    spec: HeadSpec,
    call: HeadCall,
    num_items: Tensor | int | None,
) -> LinearCrossEntropyOutput:
    return linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        rows=None if call.rows is None else call.rows.to(hidden.device),
        bias=bias,
        logit_scale=spec.logit_scale,
        softcap=spec.softcap,
        num_items=num_items,
        weighting=call.weighting,
        logit_budget_mib=spec.logit_budget_mib,
    )


def causal_lm_loss(
    model: PreTrainedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items: Tensor | int | None,
    call: HeadCall,
) -> FusedCausalLMOutput:
    """Backbone, head and loss of `model`, as TRL's FusedCausalLMOutput.

    The labels are shifted, not the hidden states: slicing those would copy them. The last position of a row has no
    next token and is ignored.
    """
    config = model.config.get_text_config()
    kwargs["use_cache"] = False
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    head, spec = model.get_output_embeddings(), model._chronicals_spec
    meets = spec.tied and not torch.compiler.is_compiling()
    with tied_weight.handover(model, head) if meets else contextlib.nullcontext() as handover:
        backbone = model.base_model(*args, **kwargs)
    hidden_BSH = backbone.last_hidden_state
    if shift_labels is None:
        if labels is None:
            raise ValueError("`fused_lm_head=True` computes the loss: pass `labels` or `shift_labels`.")
        labels_BS = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        length = hidden_BSH.shape[1] - 1
    else:
        labels_BS, length = shift_labels, hidden_BSH.shape[1]
    # A model split by `device_map` may end on another device than its head. But where FSDP2 keeps the shards of a head
    # in a unit of its own (the CPU, when offloading) is not where that head will compute.
    if not isinstance(head.weight, DTensor):
        hidden_BSH, labels_BS = hidden_BSH.to(head.weight.device), labels_BS.to(head.weight.device)
    out = head(hidden_BSH, labels=labels_BS, spec=spec, call=call, num_items=num_items, handover=handover)

    loss, router_loss = out.loss, None
    if kwargs.get("output_router_logits"):
        router_loss = _router_loss(config, backbone, call.token_mask, kwargs.get("attention_mask"))
        if call.router_loss:
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * router_loss
    log_probs, entropy, is_top1 = (
        value.view(labels_BS.shape)[:, :length] for value in (out.log_probs, out.entropy, out.is_top1)
    )
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=labels_BS[:, :length] != -100,
        aux_loss=router_loss,
    )


def _router_loss(config: Any, backbone: Any, token_mask: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss over the tokens of the mask; 0, with gradients of 0, where the mask has none."""
    # Mixtral's load-balancing loss is the one that every mixture-of-experts family of transformers uses.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    num_experts = getattr(config, "num_experts", None) or config.num_local_experts
    logits, mask = backbone.router_logits, attention_mask if token_mask is None else token_mask.to(torch.int64)
    if mask is None or not logits:
        return load_balancing_loss_func(logits, num_experts, config.num_experts_per_tok)
    # On one of several ranks all rows may be empty, and the mean over no token is 0/0: the mean over all of them
    # stands in, times 0. Nothing is read back from the device.
    mask = mask.to(logits[0].device)
    some = (mask != 0).any()
    mask = torch.where(some, mask, torch.ones_like(mask))
    return load_balancing_loss_func(logits, num_experts, config.num_experts_per_tok, mask) * some


def _without_attention_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attention_mask": None}


@contextlib.contextmanager
def mask_for_the_router_alone(model: PreTrainedModel) -> Iterator[None]:
    """While open, `attention_mask` reaches the router's auxiliary loss of `model`, and not its layers.

    The forwards of mixtures of experts, and TRL's own fused head, leave out of that loss what the mask leaves out. On
    a packed row the layers must not see one: transformers then looks for no documents.
    """
    handle = model.base_model.register_forward_pre_hook(_without_attention_mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@functools.cache
def causal_lm_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward for a model class whose own is `original`; one function a class, so that instances share its code.

    It keeps the signature of `original`, against which `generate` checks its arguments.
    """

    @functools.wraps(original)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        head_call: HeadCall | None = None,
        **kwargs: Any,
    ) -> Any:
        if fused_lm_head:
            return causal_lm_loss(
                self, args, kwargs, labels=labels, shift_labels=shift_labels, num_items=num_items_in_batch,
                call=head_call or HeadCall(),
            )  # fmt: skip
        for name, value in (
            ("labels", labels),
            ("shift_labels", shift_labels),
            ("num_items_in_batch", num_items_in_batch),
        ):
            if value is not None:
                kwargs[name] = value
        before = self.__dict__.get("_chronicals_previous_forward")
        return before(*args, **kwargs) if before is not None else original(self, *args, **kwargs)

    return forward


class _BackboneOutput(MoeModelOutputWithPast):
    """What a stub backbone returns: hidden states, and None for whatever else a family's forward passes on."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


# -- matching and verification ---------------------------------------------------------------------------------------


def head_linears(model: PreTrainedModel) -> list[nn.Linear] | str:
    """The linears that may act as the head (PEFT's ModulesToSaveWrapper holds several), or why there is none."""
    head = model.get_output_embeddings()
    if head is None:
        return "the model has no output embeddings"
    if type(head) is nn.Linear:
        return [head] if "forward" not in head.__dict__ else "another library has replaced the head's forward"
    kind = type(head).__name__
    if kind == "ModulesToSaveWrapper":
        linears = [head.original_module, *head.modules_to_save.values()]
        if all(type(linear) is nn.Linear for linear in linears):
            return linears
        return f"modules_to_save wraps a {type(head.original_module).__name__}, not a Linear"
    if kind == "TrainableTokensWrapper":
        return "trainable_token_indices on the head: TRL's own path is kept"
    if hasattr(head, "lora_A"):
        return "LoRA on the head: its own forward is kept"
    return f"the head is a {kind}, not a Linear: TRL's own path is kept"


def verify_head(model: PreTrainedModel, spec: HeadSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Raise Mismatch unless the loss from `spec` is that of the model's own forward.

    The twin is the model's own class with a stub for a backbone and a small head, so that what its forward does with
    the logits (scales, caps) is what is measured, at the cost of a few rows.
    """
    hidden_size, vocabulary, tokens = model.config.get_text_config().hidden_size, 53, 7
    original = type(model).forward

    class Backbone(nn.Module):
        hidden_BSH: Tensor

        def forward(self, *args: Any, **kwargs: Any) -> _BackboneOutput:
            return _BackboneOutput(last_hidden_state=self.hidden_BSH)

    with probing(device) as generator:
        head = nn.utils.skip_init(nn.Linear, hidden_size, vocabulary, bias=False, device=device, dtype=dtype)
        head.weight.data.copy_(randn(vocabulary, hidden_size, generator=generator) * 3 * hidden_size**-0.5)
        backbone = Backbone()
        name = next((name for name, child in model.named_children() if child is model.get_output_embeddings()), None)
        if name is None:
            raise Mismatch("the head is not a direct child of the model")
        twin = shallow_twin(model, modules={model.base_model_prefix: backbone, name: head})
        labels_N = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        labels_N[2] = -100

        def from_logits(hidden_BSH: Tensor) -> Tensor:
            backbone.hidden_BSH = hidden_BSH
            logits = original(twin, input_ids=labels_N.clamp_min(0)[None], use_cache=False).logits
            return nn.functional.cross_entropy(logits[0].float(), labels_N, reduction="mean")

        def ours(hidden_BSH: Tensor) -> Tensor:
            return _head_loss(
                hidden_BSH, head.weight, None, labels=labels_N, spec=spec, call=HeadCall(), num_items=None
            ).loss

        hidden = randn(1, tokens, hidden_size, generator=generator, device=device, dtype=dtype)
        compare(ours, from_logits, (hidden,), (head.weight,))
        # The loss again through log_probs, the recompute path that a caller's own loss takes.
        require_close(
            _head_loss(hidden, head.weight, None, labels=labels_N, spec=spec, call=HeadCall(), num_items=1).loss,
            from_logits(hidden) * (tokens - 1),
            "the summed loss",
        )
