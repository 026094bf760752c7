"""What `bench lora` measures: forward and backward of one decoder layer with LoRA on all seven of its linears.

**Layers.** Qwen2.5-0.5B's at 16,384 tokens and Qwen2.5-7B's at 8,192, in rows of 2,048, with random bf16 weights; no
bias is zero and no norm's weight is one. Rank 32, alpha 64. Attention is SDPA, causal, without a mask, for every side
that lets it be chosen.

**Settings.**

    autocast    adapters in fp32 under bf16 autocast: what the Trainer's bf16=True makes of PEFT's defaults
    bf16        adapters in bf16, no autocast
    fp32        adapters in fp32, no autocast: what a loop of one's own makes of PEFT's defaults
    nf4         as `autocast`, on a 4-bit base (nf4 with quantised scales, computing in bf16)

The first three with dropout 0 and 0.05, the last without.

**Sides.**

    peft            transformers' layer with PEFT's LoRA layers
    peft-compiled   the same under torch.compile(dynamic=False)
    unsloth         the layer of the model that Unsloth loads, called as its model calls it; in a process of its own
    ours            PEFT's model after `patch_model`, attention left as it is

Nothing but numpy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from chronicals_trl.bench.sft.cases import SHAPES, Shape

__all__ = ["LAYERS", "SETTINGS", "SIDES", "TINY", "Layer", "Setting", "not_offered"]

ROW = 2048
#: The gradients of every side are compared with fp64's on so many tokens.
CHECKED_TOKENS = 512

#: Name to what it is, for the table.
SIDES = {
    "peft": "transformers with PEFT",
    "peft-compiled": "the same under torch.compile",
    "unsloth": "Unsloth's layer with its LoRA kernels",
    "ours": "PEFT's layer, patched",
}


@dataclass(frozen=True)
class Layer:
    """One decoder layer and the tokens it is given.

    Args:
        name: Of the model that it is from.
        shape: The model with this one layer.
        tokens, row: In all, and in a row.
        checked: Tokens of the comparison with fp64, in one row.
    """

    name: str
    shape: Shape
    tokens: int
    row: int = ROW
    checked: int = CHECKED_TOKENS


LAYERS = {
    name: Layer(name, replace(SHAPES[name], layers=1), tokens)
    for name, tokens in (("qwen2.5-0.5b", 16_384), ("qwen2.5-7b", 8192))
}


#: Of the dry run on a CPU, in the place of all of them.
TINY = Layer("tiny", replace(SHAPES["tiny"], layers=1), tokens=128, row=64, checked=64)


@dataclass(frozen=True)
class Setting:
    """How the layer is run; see the top of this file.

    Args:
        name: Unique.
        adapters: Their dtype: "float32" or "bfloat16".
        autocast: Whether under bf16 autocast.
        dropout: Of the adapters' inputs.
        four_bit: Whether the base is in nf4.
    """

    name: str
    adapters: str
    autocast: bool
    dropout: float = 0.0
    four_bit: bool = False


def _settings() -> dict[str, Setting]:
    of_bf16_base = [
        Setting(f"{name}{' dropout' if dropout else ''}", adapters, autocast, dropout)
        for name, adapters, autocast in (
            ("autocast", "float32", True), ("bf16", "bfloat16", False), ("fp32", "float32", False),
        )
        for dropout in (0.0, 0.05)
    ]  # fmt: skip
    return {setting.name: setting for setting in [*of_bf16_base, Setting("nf4", "float32", True, four_bit=True)]}


SETTINGS = _settings()


def not_offered(side: str, setting: Setting) -> str | None:
    """Why `side` does not run in `setting`, or None."""
    if side == "unsloth" and not setting.autocast:
        return "its loader makes adapters in fp32 and its trainer runs under autocast"
    return None
