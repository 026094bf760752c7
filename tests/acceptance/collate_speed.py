"""Host time of a packed batch: rows out of Arrow, the collator, the rows with a label.

    OMP_NUM_THREADS=1 .venv/bin/python tests/acceptance/collate_speed.py

Not collected by pytest. Documents of lognormal length (median 270 and 1,500, sigma 0.95), labels on all of them. Each
figure is the best and the median of 30 calls in ms, for rows as Python lists (a data set's default) and as numpy
arrays (what the trainer asks for). Writes docs/results/collate_cpu.json; exits with 1 if 16,384 tokens take more than
2 ms.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from chronicals_trl._versions import installed
from chronicals_trl.packing import PackedCollator, pack_dataset
from chronicals_trl.packing.label_rows import WithLabelRows
from chronicals_trl.packing.trainer import CU_SEQLENS_BUCKET

RESULT = Path(__file__).parents[2] / "docs" / "results" / "collate_cpu.json"
BOUND_MS = 2.0


def timed(call: Callable[[], Any]) -> list[float]:
    call()
    times = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return [round(min(times), 3), round(statistics.median(times), 3)]


def measure(capacity: int, rows: int, median: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    count = 4 * capacity * rows // median
    lengths = np.clip(rng.lognormal(np.log(median), 0.95, count).round(), 2, capacity).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = rng.integers(0, 150_000, offsets[-1])
    documents = Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))}))
    packed, stats = pack_dataset(documents, capacity)
    collate = WithLabelRows(
        PackedCollator(
            pad_token_id=0,
            capacity=capacity,
            max_segment_length=stats.max_segment_length,
            max_docs_per_bin=stats.max_docs_per_bin,
            cu_seqlens_bucket=CU_SEQLENS_BUCKET,
        )
    )
    numbers = list(range(rows))
    figures: dict[str, Any] = {"rows": rows, "capacity": capacity, "tokens": rows * capacity, "median_length": median}
    for kind, data in {"lists": packed, "arrays": packed.with_format("numpy")}.items():
        examples = data.__getitems__(numbers)
        figures[kind] = {
            "read_ms": timed(lambda data=data: data.__getitems__(numbers)),
            "collate_ms": timed(lambda examples=examples: collate(examples)),
        }
    return figures


def main() -> int:
    torch.set_num_threads(1)
    shapes = [(8192, 8, 270), (8192, 8, 1500), (8192, 2, 270), (2048, 8, 270)]
    rows = [measure(*shape) for shape in shapes]
    for row in rows:
        print(row)
    versions = {name: installed(name) for name in ("chronicals-trl", "numpy", "torch", "datasets", "pyarrow")}
    RESULT.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    totals = [sum(value[1] for value in row["arrays"].values()) for row in rows if row["tokens"] == 16_384]
    return int(max(totals) > BOUND_MS)


if __name__ == "__main__":
    sys.exit(main())
