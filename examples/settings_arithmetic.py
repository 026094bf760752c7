"""Which settings fit a model on a GPU, on paper: the tables of docs/choosing-settings.md.

    python examples/settings_arithmetic.py            # the tables, as Markdown
    python examples/settings_arithmetic.py --write    # put them into that page

The arithmetic is that of multi_gpu_arithmetic.py, with its assumptions, for one GPU: nothing is measured here. GB are
1e9 bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import multi_gpu_arithmetic as base
from multi_gpu_arithmetic import Shape, gb, markdown

SEVEN, THIRTY_TWO, SEVENTY = base.SHAPES
SHAPES = (
    Shape("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936, qkv_bias=True, head_dim=64, tied=True),
    Shape("Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, 151936, qkv_bias=True, tied=True),
    SEVEN,
    Shape("Llama-3-8B", 4096, 32, 32, 8, 14336, 128256, qkv_bias=False),
    Shape("Qwen2.5-14B", 5120, 48, 40, 8, 13824, 152064, qkv_bias=True),
    THIRTY_TWO,
    SEVENTY,
)
#: Name to MiB, as nvidia-smi shows it.
GPUS = {
    "24 GB (RTX 4090)": 24_564,
    "40 GB (A100)": 40_960,
    "48 GB (L40S)": 46_068,
    "80 GB (H100)": 81_559,
    "141 GB (H200)": 143_771,
}
SHARE = base.USABLE / base.MEMORY  # of it that can be counted on

#: Tokens of a micro-step, `per_device_train_batch_size` x `max_length`, from the most to the fewest worth having.
TOKENS = (32_768, 16_384, 8_192, 4_096, 2_048)
ENOUGH = 8_192  # tokens from which on the multiplications of a micro-step fill a GPU
FSDP_GPUS = (2, 4, 8, 16, 32, 64)

#: Kind of training to the mode of the arithmetic.
KINDS = {"full": "full", "full, bf16": "full", "LoRA": "LoRA", "QLoRA": "QLoRA"}
#: Bytes of a trained parameter whose weight is bf16: itself, its gradient, and AdamW's two moments of its own dtype.
BF16_STATES = 2 + 2 + 4


def memory(shape: Shape, kind: str, checkpointing: bool, tokens: int) -> float:
    """Bytes on one GPU."""
    if kind == "full, bf16":
        kept = base.activations(shape, "full", checkpointing, tokens)
        return BF16_STATES * shape.parameters + kept + base.LOGIT_BUDGET
    return base.memory(shape, KINDS[kind], "ddp", checkpointing, 1, tokens)


@dataclass(frozen=True)
class Setting:
    tokens: int
    checkpointing: bool

    def __str__(self) -> str:
        return f"{self.tokens:,}{', ckpt' * self.checkpointing}"


def choose(shape: Shape, kind: str, mebibytes: int) -> Setting | None:
    """Without checkpointing, which costs a third more work, while `ENOUGH` tokens fit; else with it; None: neither.

    With checkpointing at least twice as many tokens fit as without, for every shape here.
    """
    usable = SHARE * mebibytes * 2**20
    found = {
        checkpointing: next((n for n in TOKENS if memory(shape, kind, checkpointing, n) <= usable), 0)
        for checkpointing in (False, True)
    }
    if found[False] >= ENOUGH:
        return Setting(found[False], False)
    return Setting(found[True], True) if found[True] else None


def fewest_gpus(shape: Shape, kind: str, mebibytes: int) -> int | None:
    """How many such GPUs FSDP2 needs for 4,096 tokens each with checkpointing."""
    usable = SHARE * mebibytes * 2**20
    mode = KINDS[kind]
    return next((n for n in FSDP_GPUS if base.memory(shape, mode, "fsdp2", True, n, 4096) <= usable), None)


def settings_table(kind: str) -> str:
    rows = []
    for shape in SHAPES:
        cells = []
        for mebibytes in GPUS.values():
            setting = choose(shape, kind, mebibytes)
            if setting is not None:
                cells.append(str(setting))
            elif kind == "full, bf16":
                cells.append("-")
            else:
                gpus = fewest_gpus(shape, kind, mebibytes)
                cells.append(f"{gpus} GPUs" if gpus else "offload")
        rows.append([shape.name, *cells])
    return markdown(["model", *GPUS], rows)


def paper_table() -> str:
    """The paper's 84 GB for "a 7B model", line by line, beside the same lines for a model that exists."""
    p = SEVEN.parameters
    lines = [("weights, bf16", 2), ("gradients, bf16", 2), ("AdamW's two moments, fp32", 8)]
    rows = [[what, str(n), gb(n * 7e9), gb(n * p)] for what, n in lines]
    total = sum(n for _, n in lines)
    rows.append(["**what the paper counts**", str(total), f"**{gb(total * 7e9)}**", f"**{gb(total * p)}**"])
    rows.append(["fp32 weights and gradients in the place of bf16 ones", "4", gb(4 * 7e9), gb(4 * p)])
    rows.append(["bf16 copies of the weights, under autocast", "2", gb(2 * 7e9), gb(2 * p)])
    rows.append([f"activations of {base.TOKENS:,} tokens", "", "", gb(base.activations(SEVEN, "full", False))])
    rows.append([f"full logits of {base.TOKENS:,} tokens", "", "", gb(base.full_logits(SEVEN))])
    whole = 18 * p + base.activations(SEVEN, "full", False) + base.full_logits(SEVEN)
    rows.append(["**all of it**", "", "", f"**{gb(whole)}**"])
    return markdown(["what", "bytes a parameter", "7.0e9 parameters, GB", f"{SEVEN.name}, GB"], rows)


def changes_table() -> str:
    """What each setting makes of those lines, for the 7B model at the same tokens."""
    p, tokens = SEVEN.parameters, base.TOKENS
    kept = base.activations(SEVEN, "full", False)
    half = base.activations(SEVEN, "full", False, tokens // 2)
    adapters = 16 * SEVEN.adapters
    rows = [
        ["`head` on", "logits", gb(base.full_logits(SEVEN)), f"{gb(base.LOGIT_BUDGET)} at most"],
        ["`logit_budget_mib: 135`", "logits", f"{gb(base.LOGIT_BUDGET)} at most", gb(135 * 2**20)],
        ["`recompute_mlp` (the default)", "activations", gb(kept), gb(base.activations(SEVEN, "LoRA", False))],
        ["`gradient_checkpointing=True`", "activations", gb(kept), gb(base.activations(SEVEN, "full", True))],
        ["half the tokens a micro-step", "activations", gb(kept), gb(half)],
        ["`optim=\"adamw_bnb_8bit\"`", "AdamW", gb(8 * p), gb(2 * p)],
        ["weights loaded as bf16", "weights, gradients, AdamW, copies", gb(18 * p), gb(BF16_STATES * p)],
        ["LoRA, rank 32", "weights, gradients, AdamW, copies", gb(18 * p), gb(2 * p + adapters)],
        ["QLoRA, rank 32", "weights, gradients, AdamW, copies", gb(18 * p),
         gb(base.frozen(SEVEN, "QLoRA") + adapters)],
        ["FSDP2 over 8 GPUs", "weights, gradients, AdamW, copies", gb(18 * p),
         gb(base.states(SEVEN, "full", "fsdp2", 8) + base.working(SEVEN, "full", "fsdp2"))],
        ["`attention` on a varlen kernel", "mask of a row of 32,768 tokens", gb(32_768**2), "0"],
    ]  # fmt: skip
    return markdown(["setting", "of", "from, GB", "to, GB"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "paper": paper_table,
    "changes": changes_table,
    "full": lambda: settings_table("full"),
    "bf16": lambda: settings_table("full, bf16"),
    "lora": lambda: settings_table("LoRA"),
    "qlora": lambda: settings_table("QLoRA"),
}


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        path = Path(__file__).parents[1] / "docs" / "choosing-settings.md"
        path.write_text(base.filled(path.read_text("utf-8"), TABLES), "utf-8")
    elif arguments:
        raise SystemExit("usage: python examples/settings_arithmetic.py [--write]")
    else:
        print("\n".join(f"{name}\n\n{table()}" for name, table in TABLES.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
