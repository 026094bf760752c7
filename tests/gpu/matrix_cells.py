"""The cells of run_matrix_two_gpus.py: which there are, and in which order they run. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: "one" is a single process on the batch that two share.
LAYOUTS = ("one", "ddp", "zero 1", "zero 2", "zero 3", "fsdp2")
PARTS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Cell:
    """One training.

    Args:
        layout, part: One of `LAYOUTS`, one of `PARTS`.
        accumulation: Micro-batches of a rank in a step.
        ours: use_chronicals.
        exact: In float32 throughout: the reference of the gradients.
        shape: A name in bench.sft.cases.SHAPES for a model of real size on packed rows, no gradients compared;
            None for the small model.
        steps, warm_up: Optimizer steps in all, and how many of them are not timed.
        rows, row_tokens: A rank's rows in a micro-batch, and the longest row.
        checkpointing: gradient_checkpointing.
    """

    layout: str
    part: str = "full"
    accumulation: int = 1
    ours: bool = True
    exact: bool = False
    shape: str | None = None
    steps: int = 6
    warm_up: int = 3
    rows: int = 4
    row_tokens: int = 256
    checkpointing: bool = False

    @property
    def scaling(self) -> bool:
        """Whether the cell is there for its speed, beside the same one on another number of GPUs."""
        return self.shape is not None and self.layout in ("one", "ddp")

    @property
    def name(self) -> str:
        told = [self.layout, self.part, f"accumulation {self.accumulation}", "on" if self.ours else "off"]
        return ", ".join(told + ["float32"] * self.exact + [self.shape] * (self.shape is not None))


def gradient_cells(layouts: Sequence[str], parts: Sequence[str], tiny: bool) -> list[Cell]:
    """The matrix; one process first, with the references in float32 (of QLoRA, whose weights are rounded, in bf16)."""
    size = {"steps": 3, "warm_up": 1, "rows": 2, "row_tokens": 24} if tiny else {}
    found = []
    for layout in ("one", *(each for each in layouts if each != "one")):
        for part in parts:
            for accumulation in (1, 2):
                if layout == "one" and part != "qlora":
                    found.append(Cell(layout, part, accumulation, ours=False, exact=True, **size))  # type: ignore[arg-type]
                for ours in (False, True):
                    found.append(Cell(layout, part, accumulation, ours, **size))  # type: ignore[arg-type]
    return found


def is_reference(cell: Cell) -> bool:
    """Whether the gradients of the cells of this part and accumulation are compared with this one's."""
    return cell.layout == "one" and not cell.ours and (cell.exact or cell.part == "qlora")


def scaling_cells(tiny: bool) -> list[Cell]:
    """Full fine-tuning under DDP of the same batch a GPU: one GPU, then two. What is timed is 16 steps."""
    found = []
    for layout in ("one", "ddp"):
        for shape in ("tiny",) if tiny else ("qwen2.5-0.5b", "qwen2.5-1.5b"):
            size = {"steps": 4, "warm_up": 2, "rows": 2, "row_tokens": 64} if tiny else {
                "steps": 24, "warm_up": 8, "rows": 8, "row_tokens": 2048,
            }  # fmt: skip
            found.append(Cell(layout, shape=shape, **size))  # type: ignore[arg-type]
    return found


def zero3_cells(tiny: bool) -> list[Cell]:
    size = {"steps": 4, "warm_up": 2, "row_tokens": 64} if tiny else {"steps": 20, "warm_up": 5, "row_tokens": 4096}
    shape = "tiny" if tiny else "qwen2.5-7b"
    return [
        Cell("zero 3", ours=ours, shape=shape, rows=1, checkpointing=True, **size)  # type: ignore[arg-type]
        for ours in (True, False)
    ]
