"""How much a step holds and how many there are, packed and not: what a user's step counts were chosen for.

A row holds many documents, so the same batch size makes far fewer steps. Learning rate, warm-up and `save_steps` that
were right without packing are then not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FEW = 10  # optimizer steps, below which a run hardly learns
MANY_TIMES = 3  # as many without packing: then it is the packing that made them few


@dataclass(frozen=True)
class StepCounts:
    """The steps of a run, as `Trainer` and Accelerate count them.

    Args:
        documents: documents in the packed rows, which are those that would be trained on without packing.
        rows: packed rows that hold documents.
        empty_rows: rows without any, appended for the sake of the ranks.
        capacity: tokens of a row.
        batch_size: rows of a data loader's batch.
        ranks: ranks that get batches of their own; 1 with `split_batches`, where they get shares of one.
        accumulation: batches of a rank that make a step.
        epochs: `num_train_epochs`.
        max_steps: above 0 it takes the place of the epochs.
        drop_last: whether an epoch's last batch is left out where it is short.
        exact: whether `documents` is exactly what would be trained on without packing.
    """

    documents: int
    rows: int
    empty_rows: int
    capacity: int
    batch_size: int
    ranks: int
    accumulation: int
    epochs: float
    max_steps: int = -1
    drop_last: bool = False
    exact: bool = True

    def in_epoch(self, samples: int) -> int:
        """Optimizer steps of an epoch of so many rows, or documents; 0 where `drop_last` leaves no batch."""
        batches = samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)
        # Accelerate gives each rank as many batches, by repeating some or by leaving the last ones out.
        batches = batches // self.ranks if self.drop_last else -(-batches // self.ranks)
        return -(-batches // self.accumulation)

    @property
    def packed(self) -> int:
        return self.in_epoch(self.rows + self.empty_rows)

    @property
    def unpacked(self) -> int:
        return self.in_epoch(self.documents)

    def in_run(self, in_epoch: int) -> int:
        """Optimizer steps of the whole run, where an epoch has so many."""
        if self.max_steps > 0 and in_epoch:
            return self.max_steps
        return math.ceil(self.epochs * in_epoch)

    def describe(self, processes: int) -> str:
        """One line for the report; `processes` may be more than the ranks, where several share their rows."""
        size = self.batch_size * self.ranks * self.accumulation
        together = self.batch_size * self.ranks
        rows = self.rows + self.empty_rows
        used = rows // together * together if self.drop_last else rows
        if self.rows <= min(size, used):
            held = f"{'all ' if self.rows > 1 else ''}{_count(self.rows, 'row')}"
            documents = _count(self.documents, "document")
        else:
            size = min(size, used) or size
            held = _count(size, "row")
            documents = f"about {_rounded(size * self.documents / self.rows)} documents"
        accumulated = f" (gradient_accumulation_steps={self.accumulation})" if self.accumulation > 1 else ""
        dropped = "" if self.packed else f" (dataloader_drop_last=True, and {self.rows:,} are no full batch)"
        line = (
            f"a step: {held} of {self.capacity:,} tokens{accumulated}, {documents}, on "
            f"{_count(processes, 'process', 'processes')}; {_count(self.packed, 'step')} an epoch{dropped}, "
            f"{self._about(self.unpacked)} without packing"
        )
        if self.max_steps > 0 and self.packed and self.unpacked:
            packed, unpacked = (_rounded(self.max_steps / each) for each in (self.packed, self.unpacked))
            epochs = "epoch" if packed == "1" else "epochs"
            line += f"; max_steps={self.max_steps:,} is {packed} {epochs}, {unpacked} without"
        return line

    def too_few(self) -> str | None:
        """What to do about a run that packing has left with hardly any steps; None where it has not."""
        packed, unpacked = self.in_run(self.packed), self.in_run(self.unpacked)
        if packed >= FEW or unpacked < MANY_TIMES * max(packed, 1):
            return None
        smaller = ["per_device_train_batch_size"] if self.batch_size > 1 else []
        smaller += ["gradient_accumulation_steps"] if self.accumulation > 1 else []
        ways = [] if self.packed else ["dataloader_drop_last=False"]
        ways += [f"a smaller {' or '.join(smaller)}"] if smaller else []
        ways += ["more num_train_epochs"] if self.max_steps <= 0 else []
        return (
            f"few steps: packing leaves {_count(packed, 'optimizer step')} in the whole run, {self._about(unpacked)} "
            "without it; learning rate, warm-up and save_steps were hardly chosen for that. Set "
            f"{', or '.join(ways)}"
        )

    def _about(self, unpacked: int) -> str:
        return f"{'' if self.exact else 'about '}{unpacked:,}"


def _count(number: int, noun: str, several: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"


def _rounded(number: float) -> str:
    """One decimal place below 10, none from there on; two digits below 1."""
    if number >= 9.95:
        return f"{number:,.0f}"
    return f"{number:.1f}".removesuffix(".0") if number >= 1 else f"{number:.2g}"
