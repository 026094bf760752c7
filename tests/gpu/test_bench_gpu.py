"""The benchmarks on a GPU: times are those of a plain loop, and a run measures what it says."""

from __future__ import annotations

import json

import pytest
import torch

from chronicals_trl.bench import timing
from chronicals_trl.bench.command import main
from chronicals_trl.bench.ops.cases import OPS, SHAPES, make_buffers
from chronicals_trl.bench.sft import cases as sft
from chronicals_trl.bench.sft import floor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def loop_us(call, calls=40):
    """Events around a plain loop: right where kernels are so long that the host is never late."""
    for _ in range(3):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / calls


@pytest.mark.parametrize("side", ["ours", "eager"])
def test_times_agree_with_a_plain_loop(side):
    op, shape = OPS["swiglu"], SHAPES["qwen2.5-1.5b"]
    device = torch.device("cuda", torch.cuda.current_device())
    fn = getattr(op, side)
    pristine = make_buffers(op, shape, torch.bfloat16, device)
    moved = op.bytes_moved(shape, 2)
    sets = [pristine.clone() for _ in range(timing.set_count(sum(t.nbytes for t in pristine.args), device))]
    forward = timing.time_forward(fn, sets, pristine, moved["forward"], repeats=5)
    backward = timing.time_backward(fn, sets, pristine, moved["backward"], repeats=5)
    out = fn(*pristine.args)
    plain = loop_us(lambda: torch.autograd.grad(out, pristine.inputs, pristine.grad_outputs, retain_graph=True))
    assert forward.method == timing.GRAPH and forward.cache_factor >= timing.L2_FACTOR
    assert forward.us == pytest.approx(loop_us(lambda: fn(*pristine.args)), rel=0.1)
    assert backward.us == pytest.approx(plain, rel=0.1)


def test_a_run(tmp_path):
    arguments = ["--ops", "rms_norm", "rms_norm_residual", "qk_rope", "--quick", "--sides", "ours", "eager", "compile"]
    assert main(["ops", *arguments, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("bench_ops_*.json")
    result = json.loads(path.read_text())
    assert result["dry_run"] is False and len(result["verdict"]) > 0
    assert {row["status"] for row in result["rows"]} == {"ok"}
    # Nothing beats the memory by much; a time from the cache, or of an empty graph, would.
    assert all(0.01 < row["copy_share"] < 1.25 for row in result["rows"])


def test_a_run_of_the_head(tmp_path):
    """Of the sides that need no package but TRL, at a fraction of the tokens; the memory is what one can count."""
    arguments = ["--quick", "--tokens", "2048", "--sides", "ours", "ours_135", "trl", "eager"]
    assert main(["head", *arguments, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("bench_head_*.json")
    result = json.loads(path.read_text())
    assert [case["floor_chunk"] for case in result["cases"]] == [2048, 2048]
    assert all(100 < case["floor_tflops"] < 1000 for case in result["cases"])
    rows = {(row["frozen"], row["side"]): row for row in result["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}
    # Nothing beats the multiplications alone; eager also waits for the memory.
    assert all(0.95 < row["of_floor"] < 30 for row in rows.values())
    tokens, hidden, vocab, mib = 2048, 896, 151_936, 2**20
    for frozen in (False, True):
        # log_softmax's backward: its result, the gradient that it gets and the one that it gives, all in float32.
        gradients = 2 * hidden * (tokens + (0 if frozen else vocab)) / mib
        assert rows[frozen, "eager"]["extra_mib"] == pytest.approx(12 * tokens * vocab / mib - gradients, rel=0.03)
        # TRL's sums of the gradients in float32, and a tile of 2048 x 32768 logits.
        sums = 4 * hidden * (tokens + (0 if frozen else vocab)) / mib
        assert rows[frozen, "trl"]["extra_mib"] == pytest.approx(sums + 2 * tokens * 32768 / mib, rel=0.03)
        ours = rows[frozen, "ours"]
        assert ours["graph_reason"] is None and ours["graph_ms"] == pytest.approx(ours["launched_ms"], rel=0.1)
        assert ours["errors"]["hidden_rms"] < 0.02


def test_a_run_of_the_attention(tmp_path):
    """Of the sides that need torch alone, at a fraction of the tokens."""
    arguments = ["--quick", "--tokens", "4096", "--sides", "ours_varlen", "varlen", "ours_sdpa"]
    assert main(["attention", *arguments, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("bench_attention_*.json")
    result = json.loads(path.read_text())
    assert [case["empty"] for case in result["cases"]] == [0, 32, 200] and len(result["verdict"]) == 4
    assert {row["status"] for row in result["rows"]} == {"ok"}
    for row in result["rows"]:
        assert row["error"] < 0.01 and 1 < row["forward"]["us"] < row["backward"]["us"]
    ours, theirs, dense = (row for row in result["rows"] if row["case"] == "qwen2.5-0.5b")
    assert ours["of_direct"]["both"] == pytest.approx(1.0, abs=0.2)
    assert dense["both_us"] > theirs["both_us"]  # a mask of 4096 x 4096, and no tile of it skipped
    assert 1 < ours["host_us"] < 1000


def test_a_run_of_the_lora_layer(tmp_path):
    """PEFT's layer and ours: the host was ahead, and the GPU's time is that of its own work."""
    assert main(["lora", "--quick", "--sides", "peft", "ours", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("bench_lora_*.json")
    result = json.loads(path.read_text())
    assert len(result["verdict"]) == 3
    peft, ours = result["rows"]
    for row in (peft, ours):
        assert row["status"] == "ok" and row["queued"] is True, row
        assert row["issue_ms"] < row["sleep_ms"]
        # From idle to idle a pass takes no less than the GPU's work (but for clocks), nor less than the host's.
        assert 0.9 * row["gpu_ms"] < row["step_ms"] and 0.5 < row["gpu_ms"] < 100
        # The output alone is 28 MiB, gate, up and their product are 456.
        assert 28 < row["saved_mib"] < row["peak_mib"] < 20_000
    assert ours["saved_mib"] < peft["saved_mib"] and ours["gpu_ms"] < peft["gpu_ms"]


@pytest.mark.parametrize(("mode", "checkpointing"), [("full", "off"), ("lora", "on")])
def test_a_floor(tmp_path, mode, checkpointing):
    """Captured as graphs at a fraction of the tokens: no product beats the tensor cores, no part is left out."""
    shape = sft.SHAPES["qwen2.5-0.5b"]
    sft.make_documents(sft.PROTOCOLS["packed"], shape.vocab, 2048, 40_000, 50, 0).save(str(tmp_path / "documents.npz"))
    task = sft.Task(
        side="chronicals", mode=mode, shape=shape.name, protocol="packed", checkpointing=checkpointing, model="",
        documents=str(tmp_path / "documents.npz"), row_tokens=2048, rows=2, packs=True, warm_up=1, steps=1, windows=1,
        learning_rate=1e-4, seed=0, chronicals={},
    )  # fmt: skip
    found = floor.measure(task)
    assert found["method"] == timing.GRAPH and found["tokens"] == 4096
    assert all(ms > 0 for ms in found["parts_ms"].values())
    assert 100 < found["gemm_tflops"] < 2000 and 500 < found["bandwidth_gbps"] < 10_000
    assert found["replayed_ms"] == pytest.approx(found["sum_ms"], rel=0.3)
    assert found["floor_ms"] == min(found["sum_ms"], found["replayed_ms"])
