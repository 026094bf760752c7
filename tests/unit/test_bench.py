"""`chronicals-trl bench ops` on a CPU: the dry run end to end, the bytes, the check, missing peers, the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_package import in_fresh_python

from chronicals_trl import cli, kernels
from chronicals_trl._versions import installed
from chronicals_trl.bench import report, timing
from chronicals_trl.bench.ops import cases as ops_module
from chronicals_trl.bench.ops import report as ops_report
from chronicals_trl.bench.ops.cases import OPS, SHAPES, Op, Shape, make_buffers
from chronicals_trl.bench.ops.run import Settings, run
from chronicals_trl.bench.timing import BufferSet

CPU = torch.device("cpu")
TINY = Shape("tiny", tokens=6, hidden=16, intermediate=24, q_heads=4, kv_heads=2, head_dim=8)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run is what is tested here, on machines with a GPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run_tiny(
    *ops: Op, sides: tuple[str, ...] = ("ours", "eager"), dtype: torch.dtype = torch.bfloat16
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows of a run at `TINY`, by op, side and direction."""
    settings = Settings(ops, [TINY], sides, {}, dtype, CPU, repeats=2, host=False)
    rows = run(settings, say=lambda line: None)["rows"]
    return {(row["op"], row["side"], row["direction"]): row for row in rows}


def with_peer(op: str, call: Callable[..., Any], name: str = "liger") -> Op:
    return replace(OPS[op], peers={name: lambda: call})


# -- the command ------------------------------------------------------------------------------------------------------


def test_dry_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ops", "swiglu", "qk_rope", "--shapes", "qwen2.5-0.5b", "--tokens", "4", "--sides", "ours", "eager"]
    assert cli.main(["bench", "ops", *arguments, "--output", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(report.DRY_RUN)
    assert "[1/2] swiglu qwen2.5-0.5b" in text and "[2/2] qk_rope qwen2.5-0.5b" in text
    assert "Verdict: none" in text
    result = json.loads((tmp_path / "new" / "bench_ops_cpu.json").read_text())
    assert (result["dry_run"], result["gpu"], result["verdict"]) == (True, None, [])
    assert result["method"] == result["rows"][0]["timing"]["method"] == "cpu dry run"
    assert result["versions"]["torch"] == installed("torch")
    assert result["dtype"] == "bfloat16" and result["copy_gb_per_s"] > 0
    wanted = {
        (op, side, d) for op in ("swiglu", "qk_rope") for side in ("ours", "eager") for d in ("forward", "backward")
    }
    assert {(row["op"], row["side"], row["direction"]) for row in result["rows"]} == wanted
    times = {(row["op"], row["side"], row["direction"]): row["timing"]["us"] for row in result["rows"]}
    for row in result["rows"]:
        spread = row["timing"]
        assert (row["status"], row["tokens"]) == ("ok", 4)
        assert 0 < spread["us_p20"] <= spread["us"] <= spread["us_p80"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / spread["us"] / 1e3)
        assert row["copy_share"] == pytest.approx(row["gb_per_s"] / result["copy_gb_per_s"])
        ours = times[row["op"], "ours", row["direction"]]
        assert row["ours_is_faster_by"] == pytest.approx(spread["us"] / ours)
        assert (
            0 < row["error"] < result["check_bounds"]["error"] and 0 < row["worst"] < result["check_bounds"]["worst"]
        )
    assert {(entry["op"], entry["side"]) for entry in result["host"]} == {(op, side) for op, side, _ in wanted}
    assert all(0 < entry["forward_us"] < entry["forward_backward_us"] for entry in result["host"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ops", "rmsnorm"], "unknown op 'rmsnorm'; there are: rms_norm, rms_norm_residual, swiglu"),
        (["--shapes", "gpt2"], "unknown shape 'gpt2'; there are: qwen2.5-0.5b, qwen2.5-1.5b, llama-3-8b"),
        (["--sides", "ours", "unsloth"], "unknown side 'unsloth'; there are: ours, eager, compile, liger, quack"),
        (["--dtype", "int8"], "unknown dtype 'int8'; there are: bfloat16, float16, float32"),
        (["--tokens", "0"], "--tokens must be at least 1, not 0"),
    ],
)
def test_unknown_names_are_refused(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "ops", *arguments])
    assert done.value.code == 2
    assert told in capsys.readouterr().err


def test_help_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "ops", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*OPS, *SHAPES, "--quick", "dry run"))
    with pytest.raises(SystemExit) as done:
        cli.main(["bench"])
    assert done.value.code == 2


def test_the_rest_of_the_command_line_does_not_load_it() -> None:
    code = "import sys; from chronicals_trl import cli; cli.main(['--help'])"
    assert in_fresh_python(
        f"import atexit, sys\natexit.register(lambda: print('torch' in sys.modules))\n{code}"
    ).endswith("False\n")


# -- ops --------------------------------------------------------------------------------------------------------------

# At TINY, in bf16: x is 6 · 16 elements, gate 6 · 24, q and k together 6 · (4 + 2) · 8, cos 6 · 8.
BYTES_BY_HAND = {
    "rms_norm": (2 * (96 + 96 + 16), 2 * (96 * 3 + 16 + 16)),
    "rms_norm_residual": (2 * (96 * 4 + 16), 2 * (96 * 4 + 16 + 16)),
    "swiglu": (2 * 144 * 3, 2 * 144 * 5),
    "geglu": (2 * 144 * 3, 2 * 144 * 5),
    "qk_rope": (2 * (288 * 2 + 24 * 2), 2 * (288 * 2 + 24 * 2)),
    "qk_norm": (2 * (288 * 2 + 8 * 2), 2 * (288 * 3 + 8 * 2 + 8 * 2)),
    "qk_norm_rope": (2 * (288 * 2 + 8 * 2 + 24 * 2), 2 * (288 * 3 + 8 * 4 + 24 * 2)),
}


@pytest.mark.parametrize("name", OPS)
def test_bytes(name: str) -> None:
    forward, backward = BYTES_BY_HAND[name]
    assert OPS[name].bytes_moved(TINY, 2) == {"forward": forward, "backward": backward}
    buffers = make_buffers(OPS[name], TINY, torch.bfloat16, CPU)
    outputs = timing.as_tuple(OPS[name].eager(*buffers.args))
    tables = buffers.args[-2:] if name.endswith("rope") else ()  # of which one half is read
    assert forward == sum(t.nbytes for t in (*buffers.args, *outputs)) - sum(t.nbytes for t in tables) // 2
    assert [(t.shape, t.stride()) for t in outputs] == [(g.shape, g.stride()) for g in buffers.grad_outputs]


def test_layouts_are_those_of_models() -> None:
    q, k, cos, sin = make_buffers(OPS["qk_rope"], TINY, torch.float32, CPU).args
    assert q.shape == (1, 4, 6, 8) and q.transpose(1, 2).is_contiguous()
    assert k.shape == (1, 2, 6, 8) and cos.shape == sin.shape == (1, 6, 8)
    assert [t.requires_grad for t in (q, k, cos, sin)] == [True, True, False, False]
    copied = make_buffers(OPS["qk_rope"], TINY, torch.float32, CPU).clone(torch.float64)
    assert copied.args[0].stride() == q.stride() and copied.args[0].dtype == torch.float64


def test_eager_is_what_transformers_runs() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    x, weight = make_buffers(OPS["rms_norm"], TINY, torch.bfloat16, CPU).args
    norm = LlamaRMSNorm(TINY.hidden, eps=1e-6).to(torch.bfloat16)
    norm.weight.data.copy_(weight.data)
    assert torch.equal(OPS["rms_norm"].eager(x, weight), norm(x))
    rope = make_buffers(OPS["qk_rope"], TINY, torch.bfloat16, CPU).args
    for mine, theirs in zip(OPS["qk_rope"].eager(*rope), apply_rotary_pos_emb(*rope), strict=True):
        assert torch.equal(mine, theirs)


def test_the_fused_norm_and_rope_is_timed_once_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("qk_norm_rope" in OPS) == hasattr(kernels, "qk_norm_rope")

    def stand_in(q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float, cos: Any, sin: Any, **options: Any) -> Any:
        assert options == {"repeats": True}
        return kernels.qk_rope(kernels.rms_norm(q, q_weight, eps), kernels.rms_norm(k, k_weight, eps), cos, sin)

    monkeypatch.setattr(kernels, "qk_norm_rope", stand_in, raising=False)
    op = ops_module._all_ops()["qk_norm_rope"]
    forward, backward = BYTES_BY_HAND["qk_norm_rope"]
    assert op.bytes_moved(TINY, 2) == {"forward": forward, "backward": backward}
    assert {row["status"] for row in run_tiny(op).values()} == {"ok"}


# -- the check and what is not measured -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ours_and_eager_pass(dtype: torch.dtype) -> None:
    assert {row["status"] for row in run_tiny(*OPS.values(), dtype=dtype).values()} == {"ok"}


def _wrong_in_one_row(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out = torch.nn.functional.silu(gate) * up
    keep = torch.ones(gate.shape[1], 1, dtype=out.dtype)
    keep[2] = 0
    return out * keep


def _nan_in_the_last_gradient(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    up = up * 1
    up.register_hook(lambda grad: grad * torch.nan)
    return torch.nn.functional.silu(gate) * up


WRONG = {
    "a NaN in the last gradient": _nan_in_the_last_gradient,
    "an output": lambda gate, up: torch.nn.functional.silu(gate) * up * 1.05,
    "one row": _wrong_in_one_row,
    "a gradient": lambda gate, up: torch.nn.functional.silu(gate).detach() * up + 0 * gate,
    "a NaN": lambda gate, up: torch.nn.functional.silu(gate) * up * torch.where(up == up.max(), torch.nan, 1.0),
    "a shape": lambda gate, up: (torch.nn.functional.silu(gate) * up)[0],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_caught(what: str) -> None:
    rows = run_tiny(with_peer("swiglu", WRONG[what]), sides=("ours", "liger", "eager"))
    for direction in ("forward", "backward"):
        row = rows["swiglu", "liger", direction]
        # A gradient of another shape than the output's is refused by autograd before there is anything to compare.
        assert row["status"] == ("failed" if what == "a shape" else "wrong answer"), row
        assert row["timing"] is None and row["reason"]
        assert rows["swiglu", "ours", direction]["status"] == rows["swiglu", "eager", direction]["status"] == "ok"


def test_one_wrong_row_of_many_is_caught() -> None:
    """The norm of the error alone would let it pass."""
    shape = replace(TINY, tokens=40_000, intermediate=4)
    settings = Settings(
        [with_peer("swiglu", _wrong_in_one_row)], [shape], ["liger"], {}, torch.bfloat16, CPU, 1, False
    )
    result = run(settings, say=lambda line: None)
    row = result["rows"][0]
    assert row["error"] < result["check_bounds"]["error"]
    assert row["status"] == "wrong answer" and row["worst"] > result["check_bounds"]["worst"]


def test_what_is_not_measured_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def not_installed() -> Any:
        import no_such_library  # noqa: F401

    def fails(x: torch.Tensor, weight: torch.Tensor) -> Any:
        raise RuntimeError("no kernel for this\nand a long trace")

    op = replace(OPS["rms_norm"], peers={"liger": not_installed, "quack": lambda: fails})
    settings = Settings(
        [op, OPS["geglu"]], [TINY], ["eager", "liger", "quack"], {"compile": "too slow"}, torch.bfloat16, CPU, 2, False
    )
    told: list[str] = []
    result = run(settings, say=told.append)
    found = {(r["op"], r["side"]): (r["status"], r["reason"]) for r in result["rows"] if r["timing"] is None}
    assert found["rms_norm", "liger"] == ("not installed", "No module named 'no_such_library'")
    assert found["rms_norm", "quack"] == ("failed", "RuntimeError: no kernel for this")
    assert found["geglu", "quack"] == ("not offered", "quack has no such op")
    assert found["geglu", "compile"] == ("not run", "too slow")
    assert "liger not installed, quack failed" in told[1]
    ops_report.print_tables(result)
    text = capsys.readouterr().out
    assert "liger: not installed (No module named 'no_such_library'): rms_norm" in text
    assert "compile: not run (too slow): all ops" in text


def test_our_own_failure_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "swiglu", replace(OPS["swiglu"], ours=WRONG["an output"]))
    arguments = ["--ops", "swiglu", "--tokens", "4", "--quick", "--sides", "ours", "eager", "--output", str(tmp_path)]
    assert cli.main(["bench", "ops", *arguments]) == 1


# -- timing -----------------------------------------------------------------------------------------------------------


class InPlaceSwiGLU(torch.autograd.Function):
    """As Liger's: the backward writes the gradients over the saved gate and up, unseen by autograd."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = (t.data for t in ctx.saved_tensors)
        sigmoid = gate.sigmoid()
        dgate, dup = grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
        return gate.copy_(dgate), up.copy_(dup)


class InPlaceRope(torch.autograd.Function):
    """As Liger's: q and k are rotated where they lie, and the incoming gradients too."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        rotated = OPS["qk_rope"].eager(q, k, cos, sin)
        return tuple(t.transpose(1, 2).transpose(1, 2) for t in (q.data.copy_(rotated[0]), k.data.copy_(rotated[1])))

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        rotated = OPS["qk_rope"].eager(dq, dk, cos, -sin)
        return dq.data.copy_(rotated[0]), dk.data.copy_(rotated[1]), None, None


@pytest.mark.parametrize(("name", "call"), [("swiglu", InPlaceSwiGLU.apply), ("qk_rope", InPlaceRope.apply)])
def test_peers_that_write_in_place(name: str, call: Callable[..., Any]) -> None:
    """They are checked on copies, timed, and leave nothing behind for the sides after them."""
    rows = run_tiny(with_peer(name, call), sides=("ours", "liger", "eager"), dtype=torch.float32)
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_values_are_put_back_between_samples() -> None:
    pristine = make_buffers(OPS["swiglu"], TINY, torch.float32, CPU)
    sets = [pristine.clone(), pristine.clone()]
    seen: list[bool] = []

    def watched(gate: torch.Tensor, up: torch.Tensor) -> Any:
        seen.append(torch.equal(gate, pristine.args[0]))
        return InPlaceSwiGLU.apply(gate, up)

    timing.time_backward(watched, sets, pristine, 1, repeats=3)
    assert not torch.equal(sets[0].args[0], pristine.args[0])
    timed = timing.time_forward(watched, sets, pristine, 1, repeats=3)
    assert seen == [True] * (2 + 2 * 4)
    assert (timed.samples, timed.calls, timed.sets) == (3, 2, 2)


def test_the_backward_is_timed_without_the_forward() -> None:
    calls: list[str] = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            calls.append("forward")
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            calls.append("backward")
            return grad

    x = torch.ones(3, requires_grad=True)
    buffers = BufferSet((x,), (torch.ones(3),))
    timing.time_backward(Spy.apply, [buffers], buffers.clone(), 1, repeats=4)
    assert calls == ["forward"] + ["backward"] * 5


@pytest.fixture
def l2_of_50_mb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(timing, "_l2_bytes", lambda device: 50_000_000)
    yield


@pytest.mark.parametrize(("touched", "sets"), [(60_000_000, 4), (1_000_000_000, 2), (200_000_000, 2), (10, 64)])
def test_sets_exceed_the_cache_four_times(l2_of_50_mb: None, touched: int, sets: int) -> None:
    assert timing.set_count(touched, torch.device("cuda")) == sets


def test_quantiles() -> None:
    assert [timing.quantile([4.0, 1.0, 3.0, 2.0, 5.0], q) for q in (0, 0.2, 0.5, 1)] == [1, 1.8, 3, 5]
    assert timing.quantile([7.0], 0.8) == 7
