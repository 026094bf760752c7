"""Which trainings layout_script.py runs: layouts times parts times settings, and those that CI takes of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

LAYOUTS = ("ddp", "fsdp2", "fsdp2 own unit", "fsdp2 root", "zero 1", "zero 2", "zero 3")
HALF = ("bf16", "fp16")


@dataclass(frozen=True)
class Cell:
    """One training of five steps on packed rows.

    Args:
        layout: One of `LAYOUTS`. "fsdp2": units as accelerate makes them, the head with the last norm; "own unit":
            the head alone (PEFT's modules_to_save=["lm_head"]); "root": the head with all that is no layer.
        part: "full" or "lora" (adapters on all linears, none of them zero).
        weights: "tied" or "untied" embedding and head.
        accumulation: A rank's micro-batches in a step.
        checkpointing: None, "trainer" (gradient_checkpointing=True) or "fsdp" (fsdp_activation_checkpointing).
        precision: "fp32", "bf16", or "fp16" with loss scaling.
        compiled: torch_compile=True.
        lean: `fsdp_cpu_ram_efficient_loading`, the other rank's weights not those of the model, and the layers' class
            by name in `fsdp_transformer_layer_cls_to_wrap`.
        ours: use_chronicals.
    """

    layout: str
    part: str = "full"
    weights: str = "untied"
    accumulation: int = 1
    checkpointing: str | None = None
    precision: str = "fp32"
    compiled: bool = False
    lean: bool = False
    ours: bool = True

    @property
    def name(self) -> str:
        told = [self.layout, self.part, self.weights, f"accumulation {self.accumulation}"]
        told += [f"checkpointing by {self.checkpointing}"] * (self.checkpointing is not None) + [self.precision]
        told += ["compiled"] * self.compiled + ["lean"] * self.lean
        return ", ".join([*told, "on" if self.ours else "off"])

    @property
    def stock(self) -> Cell:
        return replace(self, ours=False)


def with_stock(*cells: Cell) -> tuple[Cell, ...]:
    """Each cell behind the same one with the flag off, whose error is the measure where rounding decides."""
    return tuple(each for cell in cells for each in (cell.stock, cell))


DDP = (
    *with_stock(Cell("ddp"), Cell("ddp", checkpointing="trainer", precision="bf16"), Cell("ddp", precision="fp16")),
    Cell("ddp", "full", "tied", 2, "trainer"),
    Cell("ddp", "lora", "untied", 2, "trainer"),
    Cell("ddp", "lora", "tied"),
    *with_stock(Cell("ddp", "lora", "tied", 2, precision="bf16")),
    Cell("ddp", "full", "untied", 2, compiled=True),
)
FSDP2 = (
    *with_stock(Cell("fsdp2", "full", "tied"), Cell("fsdp2", "full", "untied", 2, "fsdp", "bf16")),
    Cell("fsdp2", "full", "untied", 2, "trainer"),
    Cell("fsdp2", "lora", "untied", 2, "fsdp"),
    Cell("fsdp2", "lora", "tied", 1, "trainer"),
    *with_stock(Cell("fsdp2", "lora", "tied", 2, precision="bf16"), Cell("fsdp2", precision="fp16")),
    Cell("fsdp2", "full", "tied", 2, "fsdp", lean=True),
    Cell("fsdp2", "lora", "untied", lean=True),
    Cell("fsdp2 root", "full", "tied", 2, "trainer"),
    Cell("fsdp2 root", "lora", "untied"),
    Cell("fsdp2 own unit", "lora", "untied", 2, "trainer"),
    Cell("fsdp2 own unit", "lora", "untied", precision="bf16"),
)
# In float32: transformers refuses bf16 on a CPU without use_cpu, which would turn DeepSpeed off.
ZERO = tuple(
    cell
    for stage in ("zero 1", "zero 2", "zero 3")
    for cell in (
        *with_stock(Cell(stage, "full", "tied", 2, "trainer")),
        Cell(stage, "lora", "untied"),
        Cell(stage, "lora", "tied", 2, "trainer"),
    )
)


def product(layouts: tuple[str, ...]) -> Iterator[Cell]:
    """Every combination that there is, the flag off first."""
    options = itertools.product(
        layouts, ("full", "lora"), ("untied", "tied"), (1, 2), (None, "trainer", "fsdp"), ("fp32", "bf16"),
        (False, True),
    )  # fmt: skip
    for layout, part, weights, accumulation, checkpointing, precision, compiled in options:
        cell = Cell(layout, part, weights, accumulation, checkpointing, precision, compiled)
        if checkpointing == "fsdp" and not layout.startswith("fsdp2"):
            continue
        if layout == "fsdp2 own unit" and (part, weights) != ("lora", "untied"):
            continue
        yield from with_stock(cell)
