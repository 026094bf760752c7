"""Log entries on a GPU: read while it works on, and what they are when somebody waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_data
import torch
from training_runs import SETTINGS
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.observe import late_logs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

STEPS = 12


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], **options: Any) -> Any:
    """A trainer whose steps take the GPU longer than the host, and whether it was busy when an entry was written."""
    busy = []
    log = Trainer.log

    def watching(self: Any, logs: dict[str, float], *args: Any) -> None:
        if "loss" in logs:
            busy.append(not torch.cuda.default_stream().query())
        log(self, logs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(late_logs, "DEVICES", devices)
        patch.setattr(Trainer, "log", watching)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tiny_data.tokenizer()), hidden_size=2048, intermediate_size=8192, num_hidden_layers=6,
            num_attention_heads=16,
        )  # fmt: skip
        settings = {
            **SETTINGS, "output_dir": str(folder), "use_chronicals": True, "use_cpu": False, "bf16": True,
            "max_steps": STEPS, "learning_rate": 1e-4, "packing": True, "max_length": 2048,
            "per_device_train_batch_size": 4, **options,
        }  # fmt: skip
        trainer = SFTTrainer(
            model=LlamaForCausalLM(config).to(torch.bfloat16), args=SFTConfig(**settings),
            train_dataset=tiny_data.text(6000), processing_class=tiny_data.tokenizer(),
        )  # fmt: skip
        trainer.train()
    return trainer, busy


@pytest.mark.parametrize("setting", ["off", "auto"])
def test_the_gpu_works_on_and_the_entries_are_the_same(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"chronicals_config": {"cuda_graphs": setting}}
    late, busy = trained(tmp_path / "late", monkeypatch, ("cuda",), **options)
    waiting, idle = trained(tmp_path / "waiting", monkeypatch, (), **options)
    # In the first steps kernels are compiled and graphs captured, and the last step has none behind it.
    assert all(busy[STEPS // 2 : -1]) and not busy[-1]
    assert not any(idle)
    for a, b in zip(late.state.log_history[:-1], waiting.state.log_history[:-1], strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=2e-2, abs=1e-4), name  # bf16, gradients added by atomics
        assert (a["num_tokens"], a["step"], a["packing_fill"]) == (b["num_tokens"], b["step"], b["packing_fill"])
    speeds = [[e["tokens_per_second"] for e in t.state.log_history[STEPS // 2 : -2]] for t in (late, waiting)]
    print(f"cuda_graphs={setting!r}: {[round(sum(s) / len(s)) for s in speeds]} tokens/s, late and waiting")
    assert sum(speeds[0]) > 0.9 * sum(speeds[1])
