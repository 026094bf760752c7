"""Where the time of a whole training step goes: SFTTrainer with the flag on, a random Qwen2.5-0.5B shape, one GPU.

    python3 tests/gpu/profile_step.py --output $OUT        (--tiny: a dry run of the script on a CPU)

Full fine-tuning in bf16, eight packed rows of 2,048 tokens a step, documents of lognormal length (median 270, sigma
0.95, at most 2,048: FACTS.md), fused AdamW, no gradient checkpointing; with `--lora` rank 32 on every linear layer,
PEFT's defaults under autocast. Each variant leaves out one of the things that join blocks, so that its worth can be
read off. Kernels are sorted by name and by the op that launched them; writes profile_step.json and profile_step.txt
(profile_step_lora.*).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import triton

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_data  # noqa: E402
from run_qwen_shape import qwen_config  # noqa: E402

import chronicals_trl  # noqa: E402
from chronicals_trl import SFTConfig, SFTTrainer  # noqa: E402
from chronicals_trl.model import decoder, match, patch, rope  # noqa: E402
from chronicals_trl.observe.profile import CATEGORIES, sort_kernels, totals  # noqa: E402


def model(tiny: bool) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return transformers.Qwen2ForCausalLM(qwen_config(tiny=tiny, use_cache=False)).to(torch.bfloat16)


def documents(count: int, longest: int, vocab: int) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(270), 0.95, count).round().astype(int), 2, longest)
    # Zipf's law: there is something to learn, so that a run in which nothing trains can be told.
    return datasets.Dataset.from_dict({"input_ids": [(rng.zipf(1.2, n) % (vocab - 3) + 3).tolist() for n in lengths]})


class Watch(transformers.TrainerCallback):
    """Times steps 10 to the end, after the peak of memory has been reset, and profiles three steps before them."""

    def __init__(self, steps: int) -> None:
        self.steps, self.profile, self.start, self.seconds = steps, None, 0.0, 0.0

    def _sync(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self._sync()
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.__enter__()
        if state.global_step == 10:
            self._sync()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            self._sync()
            self.profile.__exit__(None, None, None)
        if state.global_step == self.steps:
            self._sync()
            self.seconds = time.perf_counter() - self.start


@contextmanager
def variant(name: str):
    """The code with one thing left out."""
    patches = {
        "all": [],
        "recompute_mlp=False": [],
        "no CUDA graphs": [],
        "no MLP node": [(match, "plain_linear", lambda m: False)],
        "no q/k/v node": [(rope, "_projections_fit", lambda m: False)],
        "no residual joins": [(decoder, "looks_like_decoder_layer", lambda m: False)],
        "no hand-over between layers": [(decoder, "link_layers", lambda m: None)],
    }[name]
    kept = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in patches]
    patch._verdicts.clear()
    for module, attribute, value in patches:
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, attribute, value in kept:
            setattr(module, attribute, value)


VARIANTS = (
    "all",
    "no CUDA graphs",
    "recompute_mlp=False",
    "no MLP node",
    "no q/k/v node",
    "no residual joins",
    "no hand-over between layers",
)


def adapters() -> Any:
    import peft

    return peft.LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")


def run(name: str, tiny: bool, steps: int, lora: bool) -> dict:
    length, rows = (64, 2) if tiny else (2048, 8)
    watch = Watch(steps)
    with variant(name), tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model(tiny),
            args=SFTConfig(
                output_dir=folder, use_chronicals=True, packing=True,
                chronicals_config={
                    "recompute_mlp": name != "recompute_mlp=False",
                    "cuda_graphs": "off" if name == "no CUDA graphs" else "auto",
                },
                max_length=length, max_steps=steps,
                per_device_train_batch_size=rows, gradient_checkpointing=False, bf16=True, logging_steps=5,
                learning_rate=1e-4, optim="adamw_torch_fused", report_to="none", save_strategy="no",
                disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=documents(steps * rows * (3 if tiny else 8), length, 512 if tiny else 151_936),
            processing_class=tiny_data.tokenizer(),
            callbacks=[watch],
            peft_config=adapters() if lora else None,
        )  # fmt: skip
        trainer.train()
    kernels = sort_kernels(watch.profile, 3, torch.cuda.is_available())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"] and all(log["grad_norm"] > 0 for log in logs), "nothing was learned"
    timed = steps - 10
    return {
        "variant": name,
        "step_ms": watch.seconds / timed * 1e3,
        "real_tokens_per_second": logs[-1].get("tokens_per_second"),
        "peak_memory_gib": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None,
        "loss": [logs[0]["loss"], logs[-1]["loss"]],
        "grad_norm": logs[-1]["grad_norm"],
        "categories_ms": totals(kernels),
        "kernels": [row for row in kernels if row["ms"] > 0.005],
        "report": trainer.chronicals_report.to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    arguments = parser.parse_args()
    results = []
    for name in arguments.variants:
        results.append(run(name, arguments.tiny, arguments.steps, arguments.lora))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    summary = {
        "gpu": properties.name if properties else "none: a dry run on the CPU",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
            "transformers": transformers.__version__, "chronicals-trl": chronicals_trl.__version__,
        },
        "training": "LoRA" if arguments.lora else "full",
        "tokens_per_step": 16_384 if not arguments.tiny else 128,
        "runs": results,
    }  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    suffix = "_lora" if arguments.lora else ""
    (arguments.output / f"profile_step{suffix}.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = [f"{summary['gpu']}, {summary['versions']}", ""]
    lines.append(f"{'ms a step':<30}{'step':>8}{'GiB':>7}" + "".join(f"{c[:14]:>16}" for c in CATEGORIES))
    for result in results:
        lines.append(
            f"{result['variant']:<30}{result['step_ms']:8.1f}{result['peak_memory_gib'] or 0:7.2f}"
            + "".join(f"{result['categories_ms'][c]:16.2f}" for c in CATEGORIES)
        )
    for chosen in CATEGORIES:
        lines += ["", f"{chosen} ({results[0]['variant']})"]
        for row in results[0]["kernels"]:
            if row["category"] == chosen and row["ms"] >= 0.02:
                lines.append(
                    f"  {row['ms']:8.3f} ms {row['calls']:6.1f} x  {row['kernel'][:70]:<70}  {row['op'][:60]}"
                )
    (arguments.output / f"profile_step{suffix}.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
