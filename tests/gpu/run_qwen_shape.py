"""examples/sft.py on a random model of Qwen2.5-0.5B's shape, flag on and flag off, in bf16 on one GPU.

    python3 tests/gpu/run_qwen_shape.py --output $OUT          (--tiny: a dry run of the script on a CPU)

Packed rows of 2048, documents of lognormal length (median 270, sigma 0.95, at most 2048, as in FACTS.md), full
fine-tuning and LoRA. Writes qwen_shape.json: the report, the logs and the versions of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import tiny_data  # noqa: E402


def qwen_config(*, tiny: bool, **options: Any) -> transformers.Qwen2Config:
    shape = (
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
        if tiny
        else {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936}
    )
    return transformers.Qwen2Config(
        **shape, num_attention_heads=2 if tiny else 14, num_key_value_heads=1 if tiny else 2,
        max_position_embeddings=32_768, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        **options,
    )  # fmt: skip


def write_model(folder: Path, *, tiny: bool) -> None:
    config = qwen_config(tiny=tiny)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_data.tokenizer().save_pretrained(folder)


def write_data(folder: Path, rows: int, longest: int) -> None:
    rng = random.Random(0)
    pool = tiny_data.sentences(200)
    folder.mkdir()
    with open(folder / "train.jsonl", "w") as file:
        for _ in range(rows):
            words = min(longest, max(4, round(rng.lognormvariate(5.6, 0.95)))) // 2
            text = ""
            while text.count(" ") < words:
                text += rng.choice(pool) + " "
            file.write(json.dumps({"text": text}) + "\n")


def run(model: Path, data: Path, output: Path, *, flag: bool, extra: list[str], tiny: bool) -> dict:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *(["--cpu"] if not torch.cuda.is_available() else []),
        "-m", "chronicals_trl", str(ROOT / "examples" / "sft.py"),
        "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output),
        "--use_chronicals", str(flag), "--packing", "True", "--max_length", "256" if tiny else "2048",
        "--per_device_train_batch_size", "2" if tiny else "8", "--max_steps", "4" if tiny else "30",
        "--logging_steps", "1" if tiny else "5", "--learning_rate", "1e-4", "--dtype", "bfloat16",
        "--bf16", str(not tiny), "--gradient_checkpointing", "False", "--report_to", "none", "--save_strategy", "no",
        *extra,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    print(f"--- use_chronicals={flag} {extra}: exit {done.returncode}")
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-5000:])
        return {"use_chronicals": flag, "arguments": extra, "failed": done.stderr[-3000:]}
    print("\n".join(line for line in done.stdout.splitlines() if "it/s]" not in line)[-4500:])
    report = output / "chronicals_report.json"
    return {
        "use_chronicals": flag,
        "arguments": extra,
        "log": json.loads((output / "trainer_state.json").read_text())["log_history"],
        "report": json.loads(report.read_text()) if report.exists() else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", tiny=options.tiny)
        write_data(folder / "data", 200 if options.tiny else 6000, 200 if options.tiny else 2048)
        lora = ["--use_peft", "--lora_r", "32", "--lora_target_modules", "all-linear"]
        runs = [
            run(folder / "model", folder / "data", folder / f"out{i}", flag=flag, extra=extra, tiny=options.tiny)
            for i, (flag, extra) in enumerate([(True, []), (False, []), (True, lora), (False, lora)])
        ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {"gpu": gpu, "torch": torch.__version__, "transformers": transformers.__version__, "runs": runs}
    (options.output / "qwen_shape.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(any("failed" in entry for entry in runs))


if __name__ == "__main__":
    sys.exit(main())
