"""Forward and backward of one decoder layer with LoRA on all of its linears: PEFT, torch.compile of PEFT, and ours.

    python3 tests/gpu/run_lora_layer.py --output $OUT          (--tiny: a dry run of the script on a CPU)

Qwen2.5-0.5B's layer at 16,384 tokens and a 7B's at 8,192, bf16 base weights, r 32; adapters in fp32 under bf16
autocast (Trainer's bf16=True over PEFT's default), in bf16, and in fp32 without autocast; dropout 0 and 0.05. Times
are medians of CUDA events around a step, so the host counts; `host_ms` is what issuing a step costs. The error is the
largest of the gradients' (adapters and x), by norm against fp64 on 512 tokens, without dropout. Attention is SDPA over
rows of 2048 for all. Writes lora_layer.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from chronicals_trl import patch_model  # noqa: E402

SHAPES = {
    "0.5B": (
        {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
        16384,
    ),
    "7B": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
        8192,
    ),
    "tiny": ({"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}, 64),
}
# name -> (dtype of the adapters, autocast)
PRECISIONS = {
    "fp32 adapters, autocast": (torch.float32, True),
    "bf16 adapters": (torch.bfloat16, False),
    "fp32 adapters, no autocast": (torch.float32, False),
}
ROW = 2048  # tokens of a row


def build(shape: dict[str, int], adapters: torch.dtype, dropout: float, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**shape, num_hidden_layers=1, vocab_size=64, attn_implementation="sdpa")
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        options = {"r": 32, "lora_alpha": 64, "lora_dropout": dropout, "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options)).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    return model


class Step:
    """One layer's forward and backward on fixed tensors."""

    def __init__(self, model: nn.Module, tokens: int, width: int, autocast: bool, compile: bool) -> None:
        self.model, self.autocast = model, autocast
        base = model.get_base_model().model
        self.layer = torch.compile(base.layers[0]) if compile else base.layers[0]
        device = next(model.parameters()).device
        self.device = device.type
        dtype = base.layers[0].mlp.up_proj.base_layer.weight.dtype
        row = min(ROW, tokens)
        generator = torch.Generator(device).manual_seed(1)
        draw = lambda: torch.randn(tokens // row, row, width, generator=generator, device=device)  # noqa: E731
        self.x = draw().bfloat16().to(dtype).requires_grad_()
        self.grad = draw().bfloat16().to(dtype)
        positions = torch.arange(row, device=device)[None]
        self.tables = base.rotary_emb(self.x, positions)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def __call__(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            y = self.layer(self.x, position_embeddings=self.tables, attention_mask=None)
            y = y[0] if isinstance(y, tuple) else y
        y.backward(self.grad)

    def gradients(self) -> dict[str, torch.Tensor]:
        self.clear()
        self()
        return {"x": self.x.grad, **{n: p.grad for n, p in self.parameters.items()}}

    def clear(self) -> None:
        self.x.grad = None
        for parameter in self.parameters.values():
            parameter.grad = None


def measure(step: Step, repeats: int) -> dict[str, Any]:
    """Milliseconds (median), what the host takes to issue it, and the peak above what lay there before."""
    cuda = step.device == "cuda"
    for _ in range(5 if cuda else 1):
        step.clear()
        step()
    step.clear()
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times, host = [], []
    for _ in range(repeats):
        step.clear()
        start = time.perf_counter()
        if cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
        step()
        host.append(1e3 * (time.perf_counter() - start))
        if cuda:
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
    return {
        "ms": statistics.median(times or host),
        "host_ms": statistics.median(host),
        "peak_mib": peak,
    }


def error(make: Callable[[torch.dtype | None, bool], Step], exact: dict[str, torch.Tensor], ours: bool) -> float:
    """The largest relative error, by norm, of a gradient."""
    found = make(None, ours).gradients()
    return max(((found[n].double() - ref).norm() / ref.norm()).item() for n, ref in exact.items())


def case(name: str, precision: str, dropout: float, device: str, repeats: int) -> list[dict[str, Any]]:
    shape, tokens = SHAPES[name]
    adapters, autocast = PRECISIONS[precision]
    width = shape["hidden_size"]
    rows = []

    def small(dtype: torch.dtype | None, ours: bool) -> Step:
        model = build(shape, adapters, 0.0, device)
        if ours:
            patch_model(model)
        if dtype is not None:
            model = copy.deepcopy(model).to(dtype)
        return Step(model, min(512, tokens), width, autocast and dtype is None, False)

    exact = small(torch.float64, False).gradients() if not dropout else None
    for side in ("peft", "peft compiled", "ours"):
        row: dict[str, Any] = {
            "layer": name,
            "tokens": tokens,
            "adapters": precision,
            "dropout": dropout,
            "side": side,
        }
        try:
            model = build(shape, adapters, dropout, device)
            if side == "ours":
                report = patch_model(model)
                row["parts"] = {part: report[part].state for part in ("rms_norm", "gated_mlp", "qk_rope", "lora")}
                row["notes"] = report.notes
            torch._dynamo.reset()
            row |= measure(Step(model, tokens, width, autocast, side == "peft compiled"), repeats)
            if exact is not None and side != "peft compiled":
                row["error"] = error(small, exact, side == "ours")
        except Exception as failure:
            row["failed"] = f"{type(failure).__name__}: {failure}"[:2000]
        rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k not in ("parts", "notes")})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    layers = ["tiny"] if options.tiny else ["0.5B", "7B"]
    rows = []
    for layer in layers:
        for precision in PRECISIONS:
            for dropout in (0.0, 0.05):
                rows += case(layer, precision, dropout, device, 3 if options.tiny else 30)
                result = {
                    "dry_run": options.tiny,
                    "gpu": None if options.tiny else torch.cuda.get_device_name(),
                    "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
                    "rows": rows,
                }
                (options.output / "lora_layer.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
