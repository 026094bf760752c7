"""The layer of every side: its weights, its adapters, what it is given, and the gradients in fp64.

All sides load one folder of weights, and are given one set of adapters, inputs and incoming gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chronicals_trl.bench.lora.cases import Layer, Setting
from chronicals_trl.bench.sft.cases import LORA_ALPHA, LORA_RANK, LORA_TARGETS
from chronicals_trl.bench.sft.models import make_model, make_tokenizer

__all__ = [
    "Inputs",
    "Pass",
    "Runner",
    "adapters_of",
    "exact_gradients",
    "load",
    "make_adapters",
    "make_inputs",
    "memory",
    "only_layer",
    "set_adapters",
    "stock_arguments",
    "write_model",
]

MIB = 2**20
X_SCALE = 0.1

#: What the layer is called with beside the hidden states, for rows of a shape (rows, tokens).
Arguments = Callable[[Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """Hidden states and the gradient of the layer's output, both (rows, tokens of a row, hidden) in bf16."""

    x: Tensor
    grad: Tensor


def make_inputs(layer: Layer, tokens: int, row: int, device: torch.device) -> Inputs:
    """Normal numbers of one seed.

    Hidden states are as small as in a model's first layers: at 1, what the residual path hands through would be nearly
    all of x's gradient, and an error in the layer's own part would hide behind its rounding.
    """
    generator = torch.Generator(device).manual_seed(tokens)
    x, grad = (
        torch.randn(tokens // row, row, layer.shape.hidden, generator=generator, device=device) for _ in range(2)
    )
    return Inputs((X_SCALE * x).bfloat16(), grad.bfloat16())


def write_model(layer: Layer, folder: Path) -> None:
    """Random weights of one seed, with a tokenizer, as Unsloth's loader wants it."""
    model = make_model(layer.shape, seed=0)
    generator = torch.Generator(model.device).manual_seed(1)
    with torch.no_grad():
        for parameter in only_layer(model).parameters():
            if parameter.dim() == 1:  # biases are made as zeros, norms' weights as ones: an error in them would hide
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.add_(0.1 * noise.to(parameter.dtype))
    model.save_pretrained(folder)
    make_tokenizer(layer.shape.vocab).save_pretrained(folder)


def load(folder: Path, setting: Setting) -> Any:
    """transformers' model with PEFT's adapters on its linears, in training mode."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    if setting.four_bit:
        from chronicals_trl.bench.sft.sides import four_bit

        options["quantization_config"] = four_bit()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa", **options)
    config = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=setting.dropout, target_modules=list(LORA_TARGETS)
    )
    peft_model = get_peft_model(model, config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, setting.adapters))
    return peft_model.train()


def only_layer(model: Any) -> Any:
    """The only decoder layer, adapters around the model or not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    (layer,) = base.model.layers
    return layer


# -- adapters -----------------------------------------------------------------------------------------------------


def adapters_of(model: Any) -> dict[str, nn.Parameter]:
    """By name within the layer; every trained parameter is one."""
    return {name: p for name, p in only_layer(model).named_parameters() if p.requires_grad}


def make_adapters(model: Any) -> dict[str, Tensor]:
    """Random values in fp32, none of them zero: PEFT starts B at zero, and A would have no gradient."""
    generator = torch.Generator().manual_seed(2)
    made = {}
    for name, parameter in sorted(adapters_of(model).items()):
        scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02
        made[name] = scale * torch.randn(parameter.shape, generator=generator)
    return made


def set_adapters(model: Any, values: Mapping[str, Tensor]) -> None:
    """Give the adapters these values, in their own dtype. Raises RuntimeError if the names or shapes are others."""
    adapters = adapters_of(model)
    if {n: p.shape for n, p in adapters.items()} != {n: v.shape for n, v in values.items()}:
        raise RuntimeError(f"the trained parameters are others: {', '.join(sorted(adapters)) or 'none'}")
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(values[name])


# -- a pass -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """A side's layer.

    Args:
        layer: Called with the hidden states and what `arguments` gives; returns hidden states, or a tuple with them.
        adapters: See `adapters_of`.
        arguments: What else it is called with.
        autocast: Whether under bf16 autocast.
    """

    layer: Callable[..., Any]
    adapters: Mapping[str, nn.Parameter]
    arguments: Arguments
    autocast: bool

    def gradients(self, inputs: Inputs) -> dict[str, Tensor | None]:
        """Of the adapters and of x, from one pass."""
        step = Pass(self, inputs)
        step()
        found = {"x": step.x.grad, **{name: p.grad for name, p in self.adapters.items()}}
        step.clear()
        return found


class Pass:
    """Forward and backward on tensors of its own; every call starts from no gradients."""

    def __init__(self, runner: Runner, inputs: Inputs) -> None:
        self._runner = runner
        self.x = inputs.x.clone().requires_grad_()
        self._grad = inputs.grad.clone()
        self._arguments = runner.arguments(self.x.detach())

    def __call__(self) -> None:
        self.clear()
        self.backward(self.forward())

    def forward(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self._runner.autocast):
            y = self._runner.layer(self.x, **self._arguments)
        first: Tensor = y[0] if isinstance(y, tuple) else y
        return first

    def backward(self, y: Tensor) -> None:
        if self._grad.dtype != y.dtype:
            self._grad = self._grad.to(y.dtype)
        y.backward(self._grad)

    def clear(self) -> None:
        for leaf in (self.x, *self._runner.adapters.values()):
            leaf.grad = None


def stock_arguments(model: Any) -> Arguments:
    """What transformers' model hands its layer: cos and sin, and no mask where attention is causal."""
    rotary = model.get_base_model().model.rotary_emb

    def arguments(x: Tensor) -> dict[str, Any]:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return {"position_embeddings": rotary(x, positions), "attention_mask": None}

    return arguments


def memory(step: Pass) -> tuple[float | None, float | None]:
    """MiB: the peak of a pass, and what lies there between forward and backward (the output too), both above what lay
    there before. Gradients are in the peak. None on a CPU.
    """
    if step.x.device.type != "cuda":
        return None, None
    step.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = step.forward()
    saved = torch.cuda.memory_allocated() - before
    step.backward(y)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB, saved / MIB


# -- fp64 ---------------------------------------------------------------------------------------------------------


def exact_gradients(folder: Path, model: Any, setting: Setting, values: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """The gradients in fp64, by name, of the weights that `model` has: dequantised ones where it is in 4 bits.

    Adapters count as rounded to the dtype they have in `setting`; there is no dropout.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    plain = Setting("exact", setting.adapters, autocast=False)
    exact = load(folder, plain)
    set_adapters(exact, values)
    if setting.four_bit:
        quantised = dict(only_layer(model).named_modules())
        with torch.no_grad():
            for name, module in only_layer(exact).named_modules():
                if isinstance(module, LoraLayer):
                    module.base_layer.weight.copy_(dequantize_module_weight(quantised[name].base_layer))
    only_layer(exact).double()
    runner = Runner(only_layer(exact), adapters_of(exact), stock_arguments(exact), autocast=False)
    return runner.gradients(Inputs(inputs.x.double(), inputs.grad.double()))
