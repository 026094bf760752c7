"""How much of a row without padding is real, by the number of documents in it and of lengths that rows may have.

    OMP_NUM_THREADS=1 .venv/bin/python tests/acceptance/row_lengths_table.py --lengths ../shared/data/lengths

Not collected by pytest. For each file, documents cut at 1,024 tokens (TRL's own limit), and for lengths like Alpaca's:
4,000 batches of shuffled epochs, in rows of

- `fitted_row_lengths` with 8 lengths, and with 12 and 16;
- eight lengths at equal distances up to the largest batch, and at equal shares of batches;
- the best eight lengths that there can be for these very batches.

`used`: lengths that the first 1,000 batches have, each of which would be captured; `without_graph`: share of the 4,000
that no length fits. Writes docs/results/row_lengths.json, and the manual's table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from fill_table import data_sets
from numpy.typing import NDArray

from chronicals_trl.packing import padding_free
from chronicals_trl.packing.padding_free import RowLengths, fitted_row_lengths, rounded_up

ROOT = Path(__file__).parents[2]
RESULT, MANUAL = ROOT / "docs" / "results" / "row_lengths.json", ROOT / "docs" / "packing.md"
MARKS = "<!-- rows:start -->", "<!-- rows:end -->"
BATCHES, LIMIT = 4000, 1024
ALPACA = "like Alpaca (lognormal, median 160, sigma 0.7, at most 512)"

Lengths = NDArray[np.int64]


def batches_of(lengths: Lengths, documents: int) -> Lengths:
    """(BATCHES, documents) of shuffled epochs."""
    rng, whole = np.random.default_rng(1), len(lengths) // documents
    epochs = -(-BATCHES // whole)
    made = [rng.permutation(lengths)[: whole * documents].reshape(whole, documents) for _ in range(epochs)]
    return np.concatenate(made)[:BATCHES]


def best(sums: Lengths, most: int) -> list[int]:
    """The lengths with the least padding for these sums."""
    padding_free.MOST_LENGTHS = most
    ends, counts = np.unique(-(-sums // 8) * 8, return_counts=True)
    return [int(end) for end in ends[padding_free._least_padding(ends, counts)]]


def share(sums: Lengths, lengths: list[int] | tuple[int, ...]) -> float:
    rows = RowLengths(tuple(lengths), 8, 1, 1, 1, 1)
    return round(float(sums.sum() / sum(rows.of(int(tokens)) for tokens in sums)), 4)


def table_row(name: str, lengths: Lengths, documents: int) -> dict[str, Any]:
    batches = batches_of(lengths, documents)
    sums, largest = batches.sum(axis=1), int(np.sort(lengths)[-documents:].sum())
    row: dict[str, Any] = {"lengths": name, "documents": documents}
    row["padded"] = round(float(sums.sum() / (documents * batches.max(axis=1)).sum()), 4)
    for most in (8, 12, 16):
        padding_free.MOST_LENGTHS = most
        rows = fitted_row_lengths(lengths, documents)
        given = np.array([rows.of(int(tokens)) for tokens in sums])
        row[f"fitted_{most}"] = share(sums, rows.lengths)
        row[f"used_{most}"] = len(set(given[:1000].tolist()))
        row[f"without_graph_{most}"] = round(float((sums > rows.lengths[-1]).mean()), 5)
        row[f"best_{most}"] = share(sums, best(sums, most))
    row["equal_distances_8"] = share(sums, [rounded_up(largest * step // 8, 8) for step in range(1, 9)])
    quantiles = np.quantile(sums, np.arange(1, 9) / 8)
    row["equal_shares_8"] = share(sums, sorted({rounded_up(int(np.ceil(end)), 8) for end in quantiles}))
    return row


def manual(rows: list[dict[str, Any]]) -> str:
    head = "| lengths | documents | padded | 8 lengths | the best 8 | 12 | 16 |\n|---|--:|--:|--:|--:|--:|--:|\n"
    keys = ("padded", "fitted_8", "best_8", "fitted_12", "fitted_16")
    shown = [row for row in rows if row["documents"] in (2, 16)]
    return head + "".join(
        f"| {row['lengths']} | {row['documents']} | " + " | ".join(f"{row[key]:.1%}" for key in keys) + " |\n"
        for row in shown
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=Path, required=True)
    files = {name: np.minimum(found, LIMIT) for name, (found, _) in data_sets(parser.parse_args().lengths).items()}
    files = {name: lengths[lengths > 0] for name, lengths in files.items() if not name.startswith("lognormal")}
    drawn = np.random.default_rng(7).lognormal(np.log(160), 0.7, 20_000)
    files = {ALPACA: np.clip(drawn.astype(np.int64), 2, 512), **files}
    rows = [table_row(name, lengths, n) for name, lengths in files.items() for n in (2, 4, 8, 16, 32)]
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    before, rest = MANUAL.read_text().split(MARKS[0])
    MANUAL.write_text(f"{before}{MARKS[0]}\n{manual(rows)}{MARKS[1]}{rest.split(MARKS[1])[1]}")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
