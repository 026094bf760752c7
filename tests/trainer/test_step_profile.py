"""`profile_steps`: which kernels count as what, and the files of a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_data
from training_runs import run

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.observe import profile


@pytest.mark.parametrize(
    ("kernel", "ops", "category"),
    [
        ("nvjet_sm90_tst_192x192", ["aten::mm"], "gemm"),
        ("Memset (Device)", ["aten::mm"], "gemm"),
        ("Memset (Device)", ["aten::zero_", "aten::mm"], "elementwise"),
        ("void cutlass::flash_fwd", ["_Attention"], "attention"),
        ("softmax_pass_kernel", ["chronicals_trl::linear_cross_entropy"], "cross-entropy pass"),
        ("nvjet_sm90", ["aten::mm", "chronicals_trl::linear_cross_entropy"], "gemm"),
        ("void gemv2T_kernel", ["aten::mv", "chronicals_trl::linear_cross_entropy"], "cross-entropy pass"),
        ("multi_tensor_apply_kernel", ["Optimizer.step#AdamW.step"], "optimizer and clipping"),
        ("Memcpy HtoD (Pinned -> Device)", ["aten::copy_"], "copies to the GPU"),
        ("_gated_mlp_kernel", ["_Gated"], "elementwise"),
        ("void gemv2T_kernel", ["aten::mv"], "elementwise"),
        ("fused_kernel", ["aten::_scaled_dot_product_flash_attention"], "attention"),
    ],
)
def test_categories(kernel: str, ops: list[str], category: str) -> None:
    assert profile._category(kernel, ops) == category


def event(kernels: list[tuple[str, float]], *names: str) -> Any:
    parent = None
    for name in reversed(names):
        parent = SimpleNamespace(name=name, cpu_parent=parent)
    parent.kernels = [SimpleNamespace(name=k, duration=us) for k, us in kernels]
    return parent


def test_times_and_calls_are_those_of_a_step() -> None:
    events = [
        event([("nvjet", 100.0), ("nvjet", 300.0)], "cudaLaunchKernel", "aten::mm"),
        event([("nvjet", 200.0)], "aten::mm"),
        event([("copy", 1000.0)], "aten::copy_"),
    ]
    rows = profile.sort_kernels(SimpleNamespace(events=lambda: events), 2, cuda=True)
    assert rows == [
        {"category": "elementwise", "kernel": "copy", "op": "aten::copy_", "ms": 0.5, "calls": 0.5},
        {"category": "gemm", "kernel": "nvjet", "op": "aten::mm", "ms": 0.3, "calls": 1.5},
    ]
    text = profile.render(rows, 1.25)
    assert "1.25 ms" in text and "of which busy" in text and "0.80 ms" in text and "37.5%" in text


@pytest.mark.parametrize(("max_steps", "wanted", "first", "steps"), [(4, 2, 2, 2), (2, 5, 0, 2), (13, 2, 10, 2)])
def test_the_files_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_steps: int, wanted: int, first: int, steps: int
) -> None:
    began, trained = list[int](), list[Any]()
    enter = profile.torch.profiler.profile.__enter__

    def noting(self):
        began.append(trained[0].state.global_step)
        return enter(self)

    monkeypatch.setattr(profile.torch.profiler.profile, "__enter__", noting)

    class Noted(SFTTrainer):
        def train(self, *args, **kwargs):
            trained.append(self)
            return super().train(*args, **kwargs)

    run(
        Noted, SFTConfig, tmp_path, data=tiny_data.text(60),
        options={"use_chronicals": True, "max_steps": max_steps, "chronicals_config": {"profile_steps": wanted}},
    )  # fmt: skip
    told = json.loads((tmp_path / "out" / "chronicals_profile.json").read_text())
    assert began == [first] and told["steps"] == steps
    assert told["categories_ms"]["gemm"] + told["categories_ms"]["elementwise"] > 0 and told["step_ms"] > 0
    assert any("mm" in row["op"] for row in told["kernels"])
    assert "optimizer and clipping" in (tmp_path / "out" / "chronicals_profile.txt").read_text()


def test_a_training_after_one_that_failed_has_a_table_of_its_own(tmp_path: Path) -> None:
    failures = []

    class Failing(SFTTrainer):
        def train(self, *args, **kwargs):
            try:
                return super().train(*args, **kwargs)
            except KeyError:
                return super().train(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 2 and not failures:
                failures.append(1)
                raise KeyError
            return super().compute_loss(*args, **kwargs)

    run(
        Failing, SFTConfig, tmp_path, data=tiny_data.text(60),
        options={"use_chronicals": True, "max_steps": 4, "chronicals_config": {"profile_steps": 3}},
    )  # fmt: skip
    told = json.loads((tmp_path / "out" / "chronicals_profile.json").read_text())
    steps = {row["calls"] for row in told["kernels"] if "Optimizer.step" in row["op"]}
    assert failures and told["steps"] == 3 and steps == {1.0}, "of the second training alone"


def test_a_resumed_run_warms_up_too() -> None:
    callback = profile.StepProfile(2)
    callback.on_train_begin(None, SimpleNamespace(max_steps=200, global_step=100), None)
    assert callback._first == 110


def test_only_one_rank_watches() -> None:
    for first, watched in ((True, True), (False, False)):
        callback = profile.StepProfile(1)
        state = SimpleNamespace(max_steps=2, global_step=1, is_world_process_zero=first)
        callback.on_train_begin(None, state, None)
        callback.on_step_begin(None, state, None)
        assert (callback._profile is not None) is watched
        if watched:
            callback.on_train_begin(None, state, None)  # ends it


def test_without_the_setting_there_are_none(tmp_path: Path) -> None:
    run(SFTTrainer, SFTConfig, tmp_path, options={"use_chronicals": True, "max_steps": 1})
    assert not list((tmp_path / "out").glob("chronicals_profile*"))
