"""The head in SFTTrainer on two GPUs, every layout: gradients of a step against one process on the joined batch.

    torchrun --nproc-per-node 2 tests/gpu/run_head_two_gpus.py --output $OUT

DDP; FSDP2 with the head in its own unit (PEFT's modules_to_save), in accelerate's tail unit and at the root; ZeRO-1, 2
and 3, if DeepSpeed is installed. Each with tied and untied embeddings, in float32 and in mixed precision, with one and
two accumulated batches, with and without a rank whose labels are all ignored. Beside it stock TRL, in every case where
the layout is the one that it gets wrong, and once in every other. Writes head_two_gpus.json. It runs on CPUs too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "distributed")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from head_cases import MODES, Case, matrix  # noqa: E402
from head_script import run_all  # noqa: E402

from chronicals_trl._versions import installed  # noqa: E402

# Of the relative error in norm; a lost reduction comes to 0.5 and more, a wrong factor of 2 to 0.5 and 1.
BOUND, BF16_BOUND = 1e-4, 0.04
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "triton", "flash-attn-4")


def outcomes(rows: list[dict[str, Any]]) -> None:
    """Give each row its outcome: "exact", "WRONG", "failed", or, where stock TRL fails alike, "not possible"."""
    table = {row["name"]: row for row in rows}
    for row in rows:
        case = Case(**{key: row[key] for key in ("mode", "weights", "bf16", "accumulation", "ignored")}, ours=False)
        stock = table.get(case.name)
        if row["reason"] is None:
            bound = BF16_BOUND if row["bf16"] else BOUND
            row["outcome"] = "exact" if max(row["head"], row["rest"], row["loss"]) < bound else "WRONG"
        elif stock is not None and stock["reason"] is not None and stock["reason"][:60] == row["reason"][:60]:
            row["outcome"] = "not possible"
        else:
            row["outcome"] = "failed"


def table(rows: list[dict[str, Any]]) -> str:
    """On a line the worst of the cases that differ only in accumulation and in a rank with nothing to learn."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        told = [row["mode"], row["weights"], "bf16" if row["bf16"] else "fp32", "ours" if row["ours"] else "stock TRL"]
        groups.setdefault(", ".join(told), []).append(row)
    lines = [f"{'cases':<42}{'outcomes':<16}  loss     head     rest  gathered with the head"]
    for name, group in groups.items():
        outcome = " ".join(f"{n} {what}" for what, n in Counter(row["outcome"] for row in group).items())
        ran = [row for row in group if row["reason"] is None]
        worst = "  ".join(f"{max(row[key] for row in ran):.1e}" for key in ("loss", "head", "rest")) if ran else ""
        told = {", ".join(unit.removeprefix("FSDP") for unit in row["units"]) for row in ran}
        told |= {row["reason"] for row in group if row["reason"] is not None}
        lines.append(f"{name:<42}{outcome:<16}{worst}  {'; '.join(sorted(told))}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    modes = [mode for mode in options.modes if not mode.startswith("zero") or installed("deepspeed")]
    cases = matrix(modes)
    if not on_gpu:  # without use_cpu, with which DeepSpeed is off, transformers refuses bf16 on a CPU
        cases = [case for case in cases if not (case.bf16 and case.mode.startswith("zero"))]
    first = int(os.environ["RANK"]) == 0
    start = time.perf_counter()
    rows = run_all(cases)
    dist.destroy_process_group()
    outcomes(rows)
    if first:
        print(table(rows))
        left_out = sorted(set(options.modes) - set(modes))
        if left_out:
            print(f"not run, as DeepSpeed is not installed: {', '.join(left_out)}")
        result = {
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu else None,
            "ranks": int(os.environ["WORLD_SIZE"]),
            "seconds": round(time.perf_counter() - start, 1),
            "versions": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
            "bounds": {"fp32": BOUND, "bf16": BF16_BOUND},
            "not_run": left_out,
            "cases": rows,
        }
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "head_two_gpus.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        print(f"{options.output / 'head_two_gpus.json'}; {result['seconds']} s in all")
    ours = [row for row in rows if row["ours"]]
    return int(any(row["outcome"] in ("WRONG", "failed") for row in ours))


if __name__ == "__main__":
    sys.exit(main())
