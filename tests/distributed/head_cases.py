"""Which runs of the trainer on several ranks there are, for head_script.py and its tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

FAMILIES = {"untied": "llama", "tied": "qwen2"}
MODES = ("ddp", "fsdp2 own unit", "fsdp2 tail unit", "fsdp2 root", "zero 1", "zero 2", "zero 3")


@dataclass(frozen=True)
class Case:
    """One run of the trainer.

    Args:
        mode: One of `MODES`. "own unit": PEFT's modules_to_save=["lm_head"], which accelerate shards by itself; "tail
            unit": the head with the last norm, as accelerate shards full models; "root": with all that is no layer.
        weights: "tied" or "untied" embedding and head.
        bf16: Mixed precision: the policy of FSDP2, autocast elsewhere, DeepSpeed's bf16 under ZeRO.
        accumulation: Batches of a rank in the step.
        ignored: Whether every label of the last rank is ignored.
        lora: Whether adapters alone are trained, in all layers; the head is frozen.
        ours: use_chronicals.
    """

    mode: str
    weights: str = "untied"
    bf16: bool = False
    accumulation: int = 1
    ignored: bool = False
    ours: bool = True
    lora: bool = False

    @property
    def name(self) -> str:
        told = [self.mode, self.weights, "bf16" if self.bf16 else "fp32", f"accumulation {self.accumulation}"]
        told += ["one rank ignored"] * self.ignored + ["stock TRL"] * (not self.ours)
        told += ["LoRA"] * self.lora
        return ", ".join(told)


#: What gloo runs in CI: every layout, tied and untied, mixed precision, accumulation, a rank with nothing to learn.
CI = (
    Case("ddp", bf16=True),
    Case("ddp", "tied", accumulation=2, ignored=True),
    Case("fsdp2 own unit"),
    Case("fsdp2 own unit", ours=False),
    Case("fsdp2 own unit", bf16=True),
    Case("fsdp2 own unit", accumulation=2, ignored=True),
    Case("fsdp2 tail unit"),
    Case("fsdp2 tail unit", "tied", accumulation=2, ignored=True),
    Case("fsdp2 tail unit", bf16=True, ignored=True),
    Case("fsdp2 tail unit", "tied", bf16=True, accumulation=2),
    Case("fsdp2 root", accumulation=2),
    Case("fsdp2 root", "tied", ignored=True),
    Case("fsdp2 root", "tied", bf16=True),
    Case("ddp", ignored=True, lora=True),
    Case("ddp", "tied", accumulation=2, ignored=True, lora=True),
    Case("fsdp2 tail unit", ignored=True, lora=True),
    Case("fsdp2 tail unit", "tied", accumulation=2, ignored=True, lora=True),
)
#: The same for DeepSpeed, where it is installed.
ZERO = (
    Case("zero 1", accumulation=2, ignored=True),
    Case("zero 2", "tied", accumulation=2),
    Case("zero 3", "tied"),
    Case("zero 3", accumulation=2, ignored=True),
)


def matrix(modes: Sequence[str] = MODES) -> list[Case]:
    """Every combination, each followed by stock TRL's where the head is a unit of its own or nothing else differs."""
    found = []
    for mode in modes:
        for weights in FAMILIES:
            for bf16 in (False, True):
                for accumulation in (1, 2):
                    for ignored in (False, True):
                        case = Case(mode, weights, bf16, accumulation, ignored)
                        found.append(case)
                        if mode == "fsdp2 own unit" or not (bf16 or accumulation > 1 or ignored):
                            found.append(replace(case, ours=False))
    return found
