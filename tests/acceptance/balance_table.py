"""How evenly ranks share packed rows, by the attention cost and by a model of the step's time, on a CPU.

    OMP_NUM_THREADS=1 .venv/bin/python tests/acceptance/balance_table.py \\
        --lengths ../shared/data/lengths/sharegpt_recovered.npy --capacity 8192

Not collected by pytest. For ranks, rows a batch and accumulation of several sizes, and for windows of several numbers
of rows (0: only shuffled): max / mean - 1 over the ranks, by micro-step and by optimizer step, averaged over EPOCHS.

The time of a micro-batch is taken as a · slots + b · Σ length², with a and b of a model of Qwen2.5-0.5B's shape:

- by operations: 6 for each of 494M parameters and token; 7 · 896 · 24 layers for each squared length (causal forward
  and backward: two and five products of 2 · 896 · length² / 2). A row that is one document of 8,192 then spends 29% of
  its operations on attention.
- by an H100's time: 117 ms of GPU work for 16,384 tokens, 13.2 ms of them attention, with Σ length² / Σ length = 814
  for the documents of that run (FACTS). There attention is 56% of the time of such a row, since it runs further below
  the card's peak than the GEMMs. Long documents run nearer to it than those: the truth lies between the two.

Writes docs/results/balance_cpu.json; exits with 1 if a spread of two ranks' time is above 2% by either.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronicals_trl._versions import installed
from chronicals_trl.packing import BalancedSampler, pack_lengths
from chronicals_trl.packing.balance import WINDOW_ROWS, imbalance

RESULT = Path(__file__).parents[2] / "docs" / "results" / "balance_cpu.json"
TARGET = 0.02
EPOCHS = 5
WINDOWS = (0, 8, 16, 32, 64, 128, 256)
# ranks, rows a batch, micro-steps a step
SIZES = ((2, 1, 1), (2, 1, 4), (2, 2, 1), (2, 4, 2), (8, 1, 1), (8, 2, 4), (64, 1, 1))
# per slot, per squared length
MODELS = {
    "operations": (6 * 494e6, 7 * 896 * 24),
    "h100_time": ((117 - 13.2) / 16_384, 13.2 / (16_384 * 814)),
}


def costs_of(lengths: NDArray[np.int64], capacity: int, strategy: str) -> NDArray[np.int64]:
    cut = np.minimum(lengths, capacity) if strategy == "bfd" else lengths
    plan = pack_lengths(cut, capacity, strategy=strategy)
    squares = np.add.reduceat(plan.lengths**2, plan.bin_offsets[:-1])
    costs: NDArray[np.int64] = squares + (capacity - plan.bin_tokens) ** 2
    return costs


def spreads(costs: NDArray[np.int64], capacity: int, window: int, **sizes: int) -> dict[str, list[float]]:
    """What is measured -> [by micro-step, by step]."""
    sampler = BalancedSampler(costs, window_rows=max(1, window), **sizes)
    found: dict[str, list[list[float]]] = {}
    for epoch in range(EPOCHS):
        dealt = costs[sampler.order(epoch) if window else sampler.shuffled(epoch)]
        measures = {"attention_cost": dealt.astype(float)}
        measures |= {name: a * capacity + b * dealt for name, (a, b) in MODELS.items()}
        for name, values in measures.items():
            spread = imbalance(values, **sizes)
            found.setdefault(name, []).append([spread.micro_step, spread.step])
    return {name: np.mean(values, axis=0).round(5).tolist() for name, values in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    lengths = np.load(options.lengths).astype(np.int64)
    rows: list[dict[str, Any]] = []
    for strategy in ("bfd", "bfd_split"):
        costs = costs_of(lengths, options.capacity, strategy)
        for ranks, batch_size, accumulation in SIZES:
            sizes = {"ranks": ranks, "batch_size": batch_size, "accumulation": accumulation}
            for window in WINDOWS:
                row = {"strategy": strategy, "bins": len(costs), **sizes, "window_rows": window}
                rows.append(row | spreads(costs, options.capacity, window, **sizes))
                print(rows[-1], flush=True)
    many = np.random.default_rng(0).integers(1, options.capacity**2, 2**20)
    sampler = BalancedSampler(many, ranks=8, batch_size=2, accumulation=4)
    start = time.perf_counter()
    sampler.order(0)
    seconds = round(time.perf_counter() - start, 3)
    result = {
        "lengths": options.lengths.stem, "capacity": options.capacity, "window_rows_default": WINDOW_ROWS,
        "seconds_to_deal_2^20_rows": seconds, "models": MODELS,
        "versions": {name: installed(name) for name in ("chronicals-trl", "numpy", "torch")}, "rows": rows,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"2^20 rows dealt in {seconds} s. Wrote {options.out}")
    held = [row for row in rows if row["ranks"] == 2 and row["window_rows"] == WINDOW_ROWS]
    return int(any(max(row[name]) > TARGET for row in held for name in MODELS))


if __name__ == "__main__":
    sys.exit(main())
