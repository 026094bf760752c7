"""Which rank gets which bin, so that no rank waits for another: equal attention cost in every step.

Bins are padded to the capacity, so every rank computes on the same number of tokens and all that differs between
micro-batches is attention: Σ length² over the documents of a bin, and over its padding, which is one segment more. A
rank with a costlier micro-batch keeps the others waiting where they meet: at each micro-step under FSDP and ZeRO-3, at
each optimizer step under DDP.

The order stays the seeded shuffle that torch's RandomSampler makes under Accelerate. It is cut into windows, and bins
move within their window alone:

1. A window is sorted by cost and cut into rows of R neighbours, one bin for each rank: equal cost, near enough.
2. The rows are shuffled again. B of them, drawn without regard to their cost, are a micro-step, B · A a step.
3. Within a step the ranks' sums are kept level: the rank with the lowest sum so far gets the costliest bin of the row.

What is given up of the shuffle's randomness is that the R bins of a row are alike in cost; a step of B · A rows is a
random draw of rows. The larger the window, the nearer the costs within a row and the further a bin moves.

Which bins a step has may not depend on the number of ranks once a run is under way, or a run that is resumed on
another number would train on some bins twice and on others not at all. So bins without tokens, whose number does
depend on it, are left out of the shuffle and come last; and a resumed run forms its steps for the ranks that the run
began with (`steps_of`), then deals the bins of each to the ranks that there are now.

Legend: N bins, R ranks, B bins in a micro-batch, A micro-batches that a rank accumulates in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import Sampler

__all__ = ["WINDOW_ROWS", "BalancedSampler", "Imbalance", "StepLayout", "attention_costs", "have_tokens", "imbalance"]

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Rows to a window. The costs within a row differ by about the window's whole range over this number.
WINDOW_ROWS = 64


def attention_costs(dataset: Dataset, capacity: int) -> Int64Array:
    """(N,) the attention cost of each row of a packed data set: Σ length² of its documents and of its padding.

    Reads the Arrow column alone; no row becomes a Python object.

    Args:
        dataset: with `seq_lengths`, as `pack_dataset` and `trl.pack_dataset` make it.
        capacity: tokens that the collator pads a row to.
    """
    tokens, squares = _sums_of_rows(dataset, 1), _sums_of_rows(dataset, 2)
    return squares + (capacity - tokens) ** 2


def have_tokens(dataset: Dataset) -> BoolArray:
    """(N,) whether a row of a packed data set holds a document; one that was appended to fill up a step does not."""
    return _sums_of_rows(dataset, 1) > 0


def _sums_of_rows(dataset: Dataset, power: int) -> Int64Array:
    """(N,) Σ length^power over the documents of each row."""
    found = [np.zeros(0, dtype=np.int64)]
    for chunk in dataset.data.column("seq_lengths").chunks:
        found.append(_sums(chunk.values.to_numpy().astype(np.int64) ** power, chunk.offsets.to_numpy()))
    sums = np.concatenate(found)
    # A shuffled or filtered data set keeps a list of the table's rows.
    return sums if dataset._indices is None else sums[dataset._indices.column(0).to_numpy()]


def _sums(values: Int64Array, offsets: NDArray[np.int32]) -> Int64Array:
    running = np.concatenate([[0], np.cumsum(values)])
    return running[offsets[1:]] - running[offsets[:-1]]


@dataclass(frozen=True)
class StepLayout:
    """How the rows of an optimizer step are spread.

    Attributes:
        ranks: R, data-parallel ranks; 1 stands for the plain shuffle.
        batch_size: B, rows that a rank takes in a micro-step.
        accumulation: A, micro-steps in an optimizer step.
    """

    ranks: int
    batch_size: int
    accumulation: int

    @property
    def rows(self) -> int:
        """R · B · A, the rows of a step."""
        return self.ranks * self.batch_size * self.accumulation


class BalancedSampler(Sampler[int]):
    """The rows of a packed data set in a seeded order that Accelerate deals to ranks of equal attention cost.

    For a DataLoader with this `batch_size`, which Accelerate's BatchSamplerShard deals batch by batch to the ranks in
    turn (or, with `split_batches`, a share of each batch; `batch_size` is then the share). The order depends on the
    arguments and the epoch alone: every rank works out the same one, without talking to the others. Each row comes
    once. Rows beyond the last whole micro-step stay as they were shuffled, at the end, and behind them come the rows
    without tokens. One rank gets the plain shuffle.

    Args:
        costs: (N,) int64, the rows' costs.
        ranks: R, data-parallel ranks.
        batch_size: B, rows that a rank takes in a micro-step.
        accumulation: A, micro-steps in an optimizer step.
        seed: with the epoch added it seeds the shuffle, as in Accelerate's SeedableRandomSampler.
        window_rows: rows of R bins within which bins are moved.
        real: (N,) whether a row has tokens, as `have_tokens` finds it; None where all have.
        steps_of: of a run that began with other ranks: each step then has the rows that it had there, whatever ranks
            they are dealt to. None: those of `ranks`, `batch_size` and `accumulation`.

    Raises:
        ValueError: a number below 1, or another number of rows in a step of `steps_of`.
    """

    def __init__(
        self,
        costs: Int64Array,
        *,
        ranks: int,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        window_rows: int = WINDOW_ROWS,
        real: BoolArray | None = None,
        steps_of: StepLayout | None = None,
    ) -> None:
        sizes = {"ranks": ranks, "batch_size": batch_size, "accumulation": accumulation, "window_rows": window_rows}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value!r}; it must be at least 1.")
        self.layout = StepLayout(ranks, batch_size, accumulation)
        self.steps_of = self.layout if steps_of is None else steps_of
        if self.steps_of.rows != self.layout.rows:
            raise ValueError(
                f"steps_of has {self.steps_of.rows} rows a step, and ranks · batch_size · accumulation are "
                f"{self.layout.rows}: a run goes on with steps of the size that it began with."
            )
        self.costs = costs
        self.real = np.arange(len(costs)) if real is None else np.flatnonzero(real)
        self.without_tokens = np.setdiff1d(np.arange(len(costs)), self.real)
        self.ranks = ranks
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.window_rows = window_rows
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.costs)

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from self.order(self.epoch).tolist()

    def shuffled(self, epoch: int) -> Int64Array:
        """(N,) the plain shuffle of an epoch: what Accelerate's seeded sampler gives of the rows with tokens."""
        return np.concatenate([self._shuffle(self._generator(epoch)), self.without_tokens])

    def order(self, epoch: int) -> Int64Array:
        """(N,) the rows in the order of an epoch."""
        generator = self._generator(epoch)
        order = self._shuffle(generator)
        if self.steps_of.ranks > 1:
            order = self._balanced(order, self.steps_of, self.window_rows, generator)
        if self.steps_of != self.layout and self.ranks > 1:
            order = self._dealt_anew(order, generator)
        return np.concatenate([order, self.without_tokens])

    def _balanced(
        self, order: Int64Array, layout: StepLayout, window_rows: int, generator: torch.Generator
    ) -> Int64Array:
        """Rows moved within windows, and each step's dealt to the ranks of `layout`."""
        whole = len(order) - len(order) % (layout.ranks * layout.batch_size)
        rows = self._rows(order[:whole], layout, window_rows, generator)
        step_rows = layout.batch_size * layout.accumulation
        full = len(rows) - len(rows) % step_rows
        dealt = [self._deal(rows[:full], layout.accumulation, layout, generator)]
        if full < len(rows):  # the last step of the epoch has fewer micro-steps
            dealt.append(self._deal(rows[full:], (len(rows) - full) // layout.batch_size, layout, generator))
        return np.concatenate([*dealt, order[whole:]])

    def _dealt_anew(self, order: Int64Array, generator: torch.Generator) -> Int64Array:
        """The same steps, the rows of each dealt to the ranks that there are; no row leaves its step."""
        full = len(order) - len(order) % self.layout.rows
        window_rows = self.batch_size * self.accumulation
        parts = [order[:full], order[full:]]
        return np.concatenate(
            [self._balanced(part, self.layout, window_rows, generator) for part in parts if len(part)] or [order]
        )

    def describe(self) -> str:
        """One line for the report: the first epoch's imbalance, as it is and as it would be."""
        sizes = {"ranks": self.ranks, "batch_size": self.batch_size, "accumulation": self.accumulation}
        dealt = imbalance(self.costs[self.order(0)], **sizes)
        shuffled = imbalance(self.costs[self.shuffled(0)], **sizes)
        text = (
            f"the costliest of {self.ranks} ranks has {1 + dealt.micro_step:.3f} times their mean attention cost in a "
            f"micro-step ({1 + shuffled.micro_step:.3f} if only shuffled)"
        )
        if self.accumulation > 1:
            text += f", {1 + dealt.step:.3f} ({1 + shuffled.step:.3f}) in an optimizer step"
        return text

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self.seed + epoch)

    def _shuffle(self, generator: torch.Generator) -> Int64Array:
        permutation: Int64Array = torch.randperm(len(self.real), generator=generator, device="cpu").numpy()
        return self.real[permutation]

    def _rows(
        self, shuffled: Int64Array, layout: StepLayout, window_rows: int, generator: torch.Generator
    ) -> Int64Array:
        """(rows, R): neighbours in cost within a window side by side, the rows of a window in random order."""
        num_rows = len(shuffled) // layout.ranks
        # Whole steps to a window; what is left over at the end joins the last one.
        step_rows = layout.batch_size * layout.accumulation
        size = -(-window_rows // step_rows) * step_rows
        window = np.minimum(np.arange(num_rows) // size, max(num_rows // size, 1) - 1)
        by_cost = np.lexsort((self.costs[shuffled], np.repeat(window, layout.ranks)))
        keys = torch.rand(num_rows, generator=generator, dtype=torch.float64, device="cpu").numpy()
        rows: Int64Array = shuffled[by_cost].reshape(num_rows, layout.ranks)[np.lexsort((keys, window))]
        return rows

    def _deal(self, rows: Int64Array, accumulation: int, layout: StepLayout, generator: torch.Generator) -> Int64Array:
        """Whole steps of rows -> the flat order (steps, A, R, B) in which Accelerate deals them to the ranks."""
        steps = rows.reshape(-1, accumulation, layout.batch_size, layout.ranks)
        # The rows of a micro-step go into one batch, so their order is free: the widest first, the rest even it out.
        costs = self.costs[steps]
        widest = np.argsort(costs[..., 0] - costs[..., -1], axis=2, kind="stable")
        steps = np.take_along_axis(steps, widest[..., None], axis=2)
        dealt = np.empty_like(steps)
        # Below every cost: who gets what is drawn while the sums are level.
        sums = torch.rand(len(steps), layout.ranks, generator=generator, dtype=torch.float64, device="cpu").numpy()
        for micro_step in range(accumulation):
            for place in range(layout.batch_size):
                row = steps[:, micro_step, place]  # ascending in cost
                highest_first = np.argsort(-sums, axis=1, kind="stable")
                np.put_along_axis(dealt[:, micro_step, place], highest_first, row, axis=1)
                sums += self.costs[dealt[:, micro_step, place]]
        return dealt.transpose(0, 1, 3, 2).reshape(-1)


@dataclass(frozen=True)
class Imbalance:
    """How far the costliest rank is above the mean of the ranks: max / mean - 1, averaged over the epoch.

    Attributes:
        micro_step: of the micro-batches that run at the same time; where FSDP and ZeRO-3 wait.
        step: of what a rank accumulates in an optimizer step; where DDP waits.
    """

    micro_step: float
    step: float


def imbalance(
    costs: Int64Array | NDArray[np.float64], *, ranks: int, batch_size: int, accumulation: int = 1
) -> Imbalance:
    """The imbalance of an order, given the rows' costs (N,) in it.

    What is left over after the last whole step (for `micro_step`: micro-step) is left out; 0 where there is no whole
    one.
    """
    whole = len(costs) - len(costs) % (ranks * batch_size)
    of_micro_steps = costs[:whole].reshape(-1, ranks, batch_size).sum(2, dtype=np.float64)
    steps = len(of_micro_steps) // accumulation
    of_steps = of_micro_steps[: steps * accumulation].reshape(steps, accumulation, ranks).sum(1)
    return Imbalance(_excess(of_micro_steps), _excess(of_steps))


def _excess(cost_of_ranks: NDArray[np.float64]) -> float:
    """`cost_of_ranks`: (moments, R)."""
    return float((cost_of_ranks.max(1) / cost_of_ranks.mean(1) - 1).mean()) if len(cost_of_ranks) else 0.0
