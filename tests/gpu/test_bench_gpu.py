"""`bench ops` on a GPU: its times are those of a plain loop, and a run measures what it says."""

from __future__ import annotations

import json

import pytest
import torch

from chronicals_trl.bench import timing
from chronicals_trl.bench.command import main
from chronicals_trl.bench.ops import OPS, SHAPES, make_buffers

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
