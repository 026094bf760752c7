"""The trainer on a GPU beside settings that need one: Liger, activation offloading, torch.compile, bf16 packing."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import torch
import trl
from training_runs import logged, run
from transformers import TrainerCallback

from chronicals_trl import SFTConfig, SFTTrainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

GPU = {"use_cpu": False, "max_length": 512, "per_device_train_batch_size": 1, "packing": True}


def both(tmp_path: Path, **options):
    """Our run, and TRL's on the rows that ours packed."""
    ours, _ = run(SFTTrainer, SFTConfig, tmp_path, options={**GPU, "use_chronicals": True, **options})
    theirs, _ = run(
        trl.SFTTrainer, trl.SFTConfig, tmp_path, data=ours.train_dataset,
        options={**GPU, **options, "dataset_kwargs": {"skip_prepare_dataset": True}},
    )  # fmt: skip
    return ours, theirs


def test_fp32_losses_are_trls(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-3)


def test_bf16_autocast(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, bf16=True)
    assert ours.chronicals_report["attention"].backend in ("varlen", "flash_attn_4")
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-2)


def test_activation_offloading(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, activation_offloading=True)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)
    assert ours.chronicals_report["head"].state == "on"


def test_gradient_checkpointing(tmp_path: Path) -> None:
    for kwargs in ({"use_reentrant": False}, {"use_reentrant": True}, {"selective": True}):
        ours, theirs = both(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
        assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)


def test_torch_compile(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, torch_compile=True)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)


def test_padding_free(tmp_path: Path) -> None:
    """TRL's padded batches in one row each: by a varlen kernel, from graphs, with the padded run's losses."""
    options = {**GPU, "packing": False, "bf16": True, "per_device_train_batch_size": 8, "max_steps": 30}
    data = tiny_data.text(400)
    padded, _ = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, data=data, options=options)
    for setting in ("off", "auto"):
        config = {"padding_free": setting, "lora_plus": "off"}
        ours, _ = run(
            SFTTrainer, SFTConfig, tmp_path, data=data,
            options={**options, "use_chronicals": True, "chronicals_config": config},
        )  # fmt: skip
        assert logged(ours, "loss") == pytest.approx(logged(padded, "loss"), rel=1e-2)
        assert logged(ours, "num_tokens") == logged(padded, "num_tokens")
    notes = "\n".join(ours.chronicals_report.notes)
    assert "padding-free: the documents of a batch are one row" in notes
    assert "batches replayed" in notes and "CUDA graphs: 0 of" not in notes
    assert min(logged(ours, "packing_fill")) > 0.5


def test_padding_free_in_fp32_stays_padded(tmp_path: Path) -> None:
    options = {**GPU, "packing": False, "per_device_train_batch_size": 4, "use_chronicals": True}
    ours, _ = run(SFTTrainer, SFTConfig, tmp_path, options={**options, "chronicals_config": {"padding_free": "auto"}})
    assert any("batches stay as they are: in float32" in note for note in ours.chronicals_report.notes)


def test_tf32(tmp_path: Path) -> None:
    try:
        ours, theirs = both(tmp_path, tf32=True)
    finally:
        torch.backends.fp32_precision = "ieee"
    assert all(ours.chronicals_report[name].state == "on" for name in ("rms_norm", "gated_mlp", "qk_rope", "head"))
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-3)


def test_liger(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    ours, theirs = both(tmp_path, use_liger_kernel=True)
    for name in ("rms_norm", "gated_mlp", "qk_rope"):
        assert "use_liger_kernel" in ours.chronicals_report[name].reason
    assert ours.chronicals_report["head"].state == "on"
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)


def test_lora_in_bf16(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer, _ = run(
        SFTTrainer, SFTConfig, tmp_path, data=tiny_data.text(), options={**GPU, "bf16": True, "use_chronicals": True},
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear"),
    )  # fmt: skip
    assert trainer.chronicals_report["lora"].state == "on"
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    assert min(logged(trainer, "grad_norm")) > 0


class Waits(TrainerCallback):
    """Makes torch warn where the host waits for the GPU, from the beginning of step `first` to the end of `last`."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.found: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:  # kernels are compiled and chosen by now
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_does_not_wait_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    """From the batch to the optimizer's step; only logging reads anything back."""
    options = {**GPU, "bf16": True, "use_chronicals": True, "max_steps": 12, "logging_strategy": "no"}
    adapter = {}
    if lora:
        adapter["peft_config"] = pytest.importorskip("peft").LoraConfig(r=8, target_modules="all-linear")
    waits = Waits(first=6, last=12)  # capturing the layers, in the fourth step, does wait

    def record(message: Any, *args: Any, **kwargs: Any) -> None:
        if "called a synchronizing" in str(message):
            waits.found.append("".join(traceback.format_stack(limit=14)))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", record)
        trainer, _ = run(SFTTrainer, SFTConfig, tmp_path, options=options, callbacks=[waits], **adapter)
    assert trainer.state.global_step == 12
    assert not waits.found, f"{len(waits.found)} waits in 6 steps; the first at\n{waits.found[0]}"
