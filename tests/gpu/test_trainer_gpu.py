"""The trainer on a GPU beside settings that need one: Liger, activation offloading, torch.compile, bf16 packing."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_data
import torch
import trl
from training_runs import logged, run

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
