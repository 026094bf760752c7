"""How full the rows are and how much compute packing saves, on every length file, in one table.

    OMP_NUM_THREADS=1 .venv/bin/python tests/acceptance/fill_table.py --lengths ../shared/data/lengths

Not collected by pytest. For each file, at capacities of 2,048 and 8,192 (histograms of Krell et al. at 512 too), with
documents cut at the capacity: the bins of `pack_lengths` beside the lower bound, and the token slots that a run
computes on for the same documents

- in random batches of 8, each padded to its longest (the mean of five shuffles),
- in batches of 8 from transformers' length-grouped order, padded likewise (the mean of five),
- in TRL's packed rows, which it packs 1,000 documents at a time, each row counted as a full one. (TRL hands rows to
  the model without padding: no slot is empty there, but a step with rows that are not full has fewer tokens.)

`saved`: slots saved by packing, over the slots of the other way. `recovered`: the same, over the empty slots of the
other way. Slots stand for the work of all layers but attention, whose cost grows with the square of the lengths.

Writes docs/results/packing_fill.json; exits with 1 if a figure of FACTS is missed: see BOUNDS.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, disable_progress_bars
from numpy.typing import NDArray
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import pack_dataset as trl_pack_dataset

from chronicals_trl._versions import installed
from chronicals_trl.packing import pack_lengths

RESULT = Path(__file__).parents[2] / "docs" / "results" / "packing_fill.json"
BATCH = 8
SHUFFLES = 5
# Above it, the ways that need each document are measured on so many of them.
MOST_DOCUMENTS = 100_000
LOGNORMAL = "lognormal, median 300, sigma 1, 100,000 documents"

Lengths = NDArray[np.int64]

# (file, capacity) -> bins at most, fill at least
BOUNDS: dict[tuple[str, int], tuple[int | None, float]] = {
    ("gsm8k_train", 2048): (801, 0.98781),
    ("sgd_train_chat", 2048): (2183, 0.99043),
    ("krell_wikipedia_histogram", 512): (None, 0.99949),
    **{(LOGNORMAL, capacity): (None, 0.9997) for capacity in (2048, 8192, 32_768)},
}


def data_sets(folder: Path) -> dict[str, tuple[Lengths, tuple[int, ...]]]:
    """name -> the documents' lengths, and the capacities to pack them at."""
    found: dict[str, tuple[Lengths, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.npy")):
        values = np.load(path).astype(np.int64)
        if "histogram" in path.stem:  # index i holds the number of documents of length i + 1, in no order
            lengths = np.repeat(np.arange(1, len(values) + 1), values)
            found[path.stem] = np.random.default_rng(0).permutation(lengths), (512, 2048, 8192)
        else:
            found[path.stem] = values, (2048, 8192)
    lengths = np.random.default_rng(0).lognormal(np.log(300), 1.0, 100_000)
    found[LOGNORMAL] = np.maximum(1, lengths.round()).astype(np.int64), (2048, 8192, 32_768)
    return found


def padded_slots(lengths: Lengths, order: Lengths | list[int], batch: int = BATCH) -> int:
    """Slots of batches in this order, each padded to its longest; the last one may be short."""
    ordered = lengths[np.asarray(order)]
    starts = np.arange(0, len(ordered), batch)
    return int((np.maximum.reduceat(ordered, starts) * np.diff([*starts, len(ordered)])).sum())


def random_slots(lengths: Lengths) -> float:
    rng = np.random.default_rng(0)
    return float(np.mean([padded_slots(lengths, rng.permutation(len(lengths))) for _ in range(SHUFFLES)]))


def grouped_slots(lengths: Lengths) -> float:
    generator = torch.Generator().manual_seed(0)
    orders = (get_length_grouped_indices(lengths.tolist(), BATCH, generator=generator) for _ in range(SHUFFLES))
    return float(np.mean([padded_slots(lengths, order) for order in orders]))


def trl_rows(lengths: Lengths, capacity: int) -> int:
    """Rows of TRL's packer, in windows of 1,000 documents as its users get them."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pa.array(np.zeros(offsets[-1], dtype=np.int8))
    rows = pa.LargeListArray.from_arrays(pa.array(offsets), tokens).cast(pa.list_(pa.int8()))
    return len(trl_pack_dataset(Dataset(pa.table({"input_ids": rows})), capacity, strategy="bfd"))


def table_row(name: str, lengths: Lengths, capacity: int) -> dict[str, Any]:
    plan = pack_lengths(np.minimum(lengths, capacity), capacity)
    split = pack_lengths(lengths, capacity, strategy="bfd_split")
    sample = lengths
    if len(lengths) > MOST_DOCUMENTS:
        sample = np.random.default_rng(0).choice(lengths, MOST_DOCUMENTS, replace=False)
    cut = np.minimum(sample, capacity)
    tokens = int(cut.sum())
    ours_per_token = 1 / plan.fill
    rows = trl_rows(cut, capacity)
    slots = {"random": random_slots(cut), "grouped": grouped_slots(cut), "trl": float(rows * capacity)}
    row: dict[str, Any] = {
        "lengths": name,
        "capacity": capacity,
        "documents": len(lengths),
        "bins": plan.num_bins,
        "lower_bound": plan.lower_bound,
        "fill": round(plan.fill, 6),
        "split_bins": split.num_bins,
        "split_fill": round(split.fill, 6),
        "documents_compared": len(sample),
        "trl_fill": round(tokens / (rows * capacity), 6),
    }
    if len(sample) == len(lengths):
        row["trl_bins"] = rows
    for way, count in slots.items():
        per_token = count / tokens
        # + 0.0: no minus before a zero
        row[f"saved_against_{way}"] = round(1 - ours_per_token / per_token, 4) + 0.0
        if per_token > 1:  # there is something to recover
            row[f"recovered_from_{way}"] = round((per_token - ours_per_token) / (per_token - 1), 4) + 0.0
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/packing.md."""
    lines = [
        "| lengths | capacity | rows (at least) | fill | TRL's fill | saved against random | grouped | TRL's rows |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        saved = [f"{row[f'saved_against_{way}']:.1%}" for way in ("random", "grouped", "trl")]
        fills = [f"{row[key]:.5f}" for key in ("fill", "trl_fill")]
        bins = f"{row['bins']:,} ({row['lower_bound']:,})"
        lines.append(f"| {row['lengths']} | {row['capacity']:,} | {' | '.join([bins, *fills, *saved])} |")
    return "".join(f"{line}\n" for line in lines)


def missed(row: dict[str, Any]) -> list[str]:
    bins, fill = BOUNDS.get((row["lengths"], row["capacity"]), (None, 0.0))
    found = []
    if bins is not None and row["bins"] != bins:
        found.append(f"{row['bins']} bins instead of {bins}")
    if round(row["fill"], 5) < fill:
        found.append(f"fill {row['fill']} is below {fill}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    disable_progress_bars()
    rows = []
    for name, (lengths, capacities) in data_sets(options.lengths).items():
        for capacity in capacities:
            row = table_row(name, lengths, capacity)
            if problems := missed(row):
                row["missed"] = problems
            print(row, flush=True)
            rows.append(row)
    absent = [name for name, _ in BOUNDS if name not in {row["lengths"] for row in rows}]
    packages = ("chronicals-trl", "numpy", "trl", "transformers", "datasets")
    versions = {name: installed(name) for name in packages}
    result = {"batch": BATCH, "shuffles": SHUFFLES, "versions": versions, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(rows))
    print(f"Wrote {options.out}" + "".join(f"\nNo length file for {name}" for name in absent))
    return int(any("missed" in row for row in rows) or bool(absent))


if __name__ == "__main__":
    sys.exit(main())
