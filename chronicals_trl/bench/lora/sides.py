"""How each side of `bench lora` makes its layer. Unsloth's is made in a process of its own: it patches the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chronicals_trl.bench.common import NotOffered
from chronicals_trl.bench.lora.cases import Layer, Setting
from chronicals_trl.bench.lora.layer import (
    Arguments,
    Runner,
    adapters_of,
    load,
    only_layer,
    set_adapters,
    stock_arguments,
)
from chronicals_trl.bench.sft.cases import LORA_ALPHA, LORA_RANK, LORA_TARGETS

__all__ = ["compiled", "ours", "stock", "unsloth"]


def stock(model: Any, setting: Setting) -> Runner:
    """PEFT's layer as it is; `model` is `lora_layer.load`'s."""
    return Runner(only_layer(model), adapters_of(model), stock_arguments(model), setting.autocast)


def compiled(model: Any, setting: Setting) -> Runner:
    """The same layer under torch.compile; it shares `model` with the stock side."""
    # Static shapes: made dynamic by the second shape that it sees, the kernels would be others.
    layer = torch.compile(only_layer(model), dynamic=False)
    return Runner(layer, adapters_of(model), stock_arguments(model), setting.autocast)


def ours(folder: Path, setting: Setting, values: Mapping[str, Tensor]) -> tuple[Runner, dict[str, Any]]:
    """PEFT's layer after `patch_model`, and what of it is on.

    Raises:
        RuntimeError: LoRA is not fused: then there is nothing of ours to measure.
    """
    from chronicals_trl import patch_model

    model = load(folder, setting)
    set_adapters(model, values)
    report = patch_model(model, {"attention": "off", "head": "off"})  # all sides have one attention, and no head runs
    if report["lora"].state != "on":
        raise RuntimeError(f"lora is {report['lora'].state}: {report['lora'].reason}")
    parts = {name: report[name].state for name in ("rms_norm", "gated_mlp", "qk_rope", "lora")}
    return stock(model, setting), parts


def unsloth(folder: Path, layer: Layer, setting: Setting, values: Mapping[str, Tensor]) -> Runner:
    """The layer of the model that Unsloth's loader and its `get_peft_model` give, without checkpointing.

    Raises:
        NotOffered: Its adapters are of another dtype than `setting` has.
    """
    import unsloth  # before transformers and peft, which it patches

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=layer.row, dtype=torch.bfloat16, load_in_4bit=setting.four_bit,
        use_exact_model_name=True, use_gradient_checkpointing=False,
    )  # fmt: skip
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=setting.dropout, bias="none",
        target_modules=list(LORA_TARGETS), random_state=0, use_gradient_checkpointing=False,
    )  # fmt: skip
    model.train()
    for module in model.modules():  # its trainer would see to it
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    dtypes = {str(p.dtype).removeprefix("torch.") for p in adapters_of(model).values()}
    if dtypes != {setting.adapters}:
        raise NotOffered(f"its adapters are in {', '.join(sorted(dtypes)) or 'no dtype: nothing is trained'}")
    set_adapters(model, values)
    return Runner(only_layer(model), adapters_of(model), _as_called(model, setting), setting.autocast)


class _Called(Exception):
    """Ends the model's forward pass where its layer is called."""


def _as_called(model: Any, setting: Setting) -> Arguments:
    """What the model hands its layer beside the hidden states, whatever that is: a call of the model is stopped there.

    Its layer takes other arguments than transformers', and they change between its releases.
    """

    def arguments(x: Tensor) -> dict[str, Any]:
        handed: dict[str, Any] = {}

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) > 1:
                raise RuntimeError(f"the layer is called with {len(args)} positional arguments")
            handed.update({name: value for name, value in kwargs.items() if name != "hidden_states"})
            raise _Called

        hook = only_layer(model).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=setting.autocast):
                model(input_ids=torch.full(x.shape[:2], 3, device=x.device))
        except _Called:
            return handed
        finally:
            hook.remove()
        raise RuntimeError("the model did not call its layer")

    return arguments
