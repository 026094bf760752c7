"""`chronicals-trl bench lora` on a CPU: the dry run, whether the host is ahead, wrong sides, the verdict."""

from __future__ import annotations

import copy
import json
import math
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from chronicals_trl import cli
from chronicals_trl._versions import installed
from chronicals_trl.bench import report
from chronicals_trl.bench.lora import cases as lora
from chronicals_trl.bench.lora import check as lora_check
from chronicals_trl.bench.lora import command as lora_command
from chronicals_trl.bench.lora import layer as lora_layer
from chronicals_trl.bench.lora import measure as lora_measure
from chronicals_trl.bench.lora import report as lora_report
from chronicals_trl.bench.lora import run as lora_run
from chronicals_trl.bench.lora import sides as lora_sides
from chronicals_trl.bench.lora import timing as lora_timing
from chronicals_trl.bench.lora import verdict as lora_verdict
from chronicals_trl.bench.lora import worker as lora_worker
from chronicals_trl.bench.lora.cases import SETTINGS, TINY
from chronicals_trl.bench.lora.timing import Samples, take_queued, take_stepped

pytest.importorskip("peft")

CPU = torch.device("cpu")
FAKE_UNSLOTH = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit, use_exact_model_name,
                        use_gradient_checkpointing):
        return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), None

    @staticmethod
    def get_peft_model(model, r, lora_alpha, lora_dropout, bias, target_modules, random_state,
                       use_gradient_checkpointing):
        config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=target_modules)
        return get_peft_model(model, config)
"""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run is what is tested here, on machines with a GPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def settings(tmp_path: Path, sides: list[str], names: list[str], **options: Any) -> lora_run.Settings:
    given = {"rounds": 1, "samples": 2, "timeout": 100.0, "skipped": {}, **options}
    chosen = [SETTINGS[name] for name in names]
    return lora_run.Settings([TINY], chosen, sides, device=CPU, logs=tmp_path / "logs", **given)


def run(*args: Any, **options: Any) -> dict[tuple[str, str], dict[str, Any]]:
    result = lora_run.run(settings(*args, **options), say=lambda line: None)
    return {(row["setting"], row["side"]): row for row in result["rows"]}


# -- the command ------------------------------------------------------------------------------------------------------


def test_dry_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").write_text(FAKE_UNSLOTH)
    arguments = ["--quick", "--sides", "unsloth", "ours", "peft", "--pythonpath", f"unsloth={tmp_path}"]
    assert cli.main(["bench", "lora", *arguments, "--output", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(report.DRY_RUN) and "Verdict: none" in text
    assert "[1/1] tiny autocast, ms: peft" in text
    result = json.loads((tmp_path / "new" / "bench_lora_cpu.json").read_text())
    assert (result["benchmark"], result["dry_run"], result["gpu"], result["verdict"]) == ("lora", True, None, [])
    (case,) = result["cases"]
    assert (case["adapters"], case["autocast"], case["dropout"], case["four_bit"]) == ("float32", True, 0.0, False)
    assert 0 < case["peft_errors"]["A"] < 0.03
    rows = {row["side"]: row for row in result["rows"]}
    assert list(rows) == ["peft", "unsloth", "ours"]
    for row in rows.values():
        assert row["status"] == "ok", row
        assert row["step_ms"] > 0 and row["host_ms"] > 0 and len(row["step_samples"]) == 5
        assert (row["gpu_ms"], row["queued"], row["peak_mib"]) == (None, None, None)
        assert set(row["errors"]) == {"A", "B", "x"} and 0 < row["errors"]["B"] < 0.03
    # The fake is PEFT, in another process: same weights, adapters, inputs and rounding.
    assert rows["unsloth"]["errors"] == pytest.approx(rows["peft"]["errors"], rel=1e-3)
    assert rows["ours"]["parts"]["lora"] == "on"
    assert rows["peft"]["ours_step_is_faster_by"] == pytest.approx(rows["peft"]["step_ms"] / rows["ours"]["step_ms"])
    assert result["layers"][0]["unsloth"]["versions"]["torch"] == installed("torch")
    pytest.importorskip("matplotlib")
    assert (tmp_path / "new" / "bench_lora_cpu.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--layers", "gpt2"], "invalid choice: 'gpt2'"),
        (["--sides", "axolotl"], "invalid choice: 'axolotl'"),
        (["--pythonpath", "peft=."], "only unsloth has a process of its own, not 'peft'"),
        (["--pythonpath", "unsloth"], "must be SIDE=DIR"),
        (["--pythonpath", "unsloth=/no/such"], "names no folder"),
        (["--timeout", "0"], "--timeout must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "lora", *arguments])
    assert done.value.code == 2
    assert told in capsys.readouterr().err


def test_a_part_of_the_layers_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(given: lora_run.Settings, say: Any) -> dict[str, Any]:
        seen.append(given)
        given.keep({})
        raise KeyboardInterrupt

    seen: list[lora_run.Settings] = []
    monkeypatch.setattr(lora_run, "run", stop)
    for arguments in ([], ["--layers", "qwen2.5-7b"], ["--quick", "--layers", "qwen2.5-7b"]):
        with pytest.raises(KeyboardInterrupt):
            cli.main(["bench", "lora", *arguments, "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.json")} == {"bench_lora_cpu.json", "bench_lora_qwen257b_cpu.json"}
    assert [each.layers for each in seen] == [[TINY]] * 3 and [len(each.settings) for each in seen] == [7, 7, 1]
    assert list(seen[0].skipped) == ["peft-compiled", "unsloth"] and list(seen[0].sides) == ["peft", "ours"]


def test_the_settings() -> None:
    assert len(SETTINGS) == 7 and [name for name, s in SETTINGS.items() if s.four_bit] == ["nf4"]
    assert {(s.adapters, s.autocast, s.dropout) for s in SETTINGS.values()} == {
        (adapters, autocast, dropout)
        for adapters, autocast in (("float32", True), ("bfloat16", False), ("float32", False))
        for dropout in (0.0, 0.05)
    }
    assert [(layer.tokens, layer.row, layer.checked) for layer in lora.LAYERS.values()] == [
        (16384, 2048, 512),
        (8192, 2048, 512),
    ]
    offered = [name for name, setting in SETTINGS.items() if lora.not_offered("unsloth", setting) is None]
    assert offered == ["autocast", "autocast dropout", "nf4"]
    assert lora.not_offered("ours", SETTINGS["bf16"]) is None


# -- times ------------------------------------------------------------------------------------------------------------


class FakeGpu:
    """A GPU and a host on one clock, in milliseconds.

    Args:
        gpu, host: Of one pass.
        waits: Whether a pass waits for the GPU in its middle.
        holds: Passes that the queue has room for.
    """

    def __init__(self, gpu: float, host: float, *, waits: bool = False, holds: int = 1000) -> None:
        self.now = self.free = 0.0
        self.gpu, self.host, self.waits, self.holds = gpu, host, waits, holds
        self.ends: list[float] = []
        self.sleeps: list[float] = []

    def call(self) -> None:
        self.now += self.host
        pending = [end for end in self.ends if end > self.now]
        if len(pending) >= self.holds:
            self.now = pending[-self.holds]
        self.free = max(self.free, self.now) + self.gpu
        self.ends.append(self.free)
        if self.waits:
            self.now = self.free

    def sleep(self, ms: float) -> None:
        self.sleeps.append(ms)
        self.free = max(self.free, self.now) + ms

    def mark(self) -> float:
        return max(self.free, self.now)

    def reached(self, mark: float) -> bool:
        return mark <= self.now

    def ms_between(self, first: float, last: float) -> float:
        self.now = max(self.now, last)
        return last - first

    def wait(self) -> None:
        self.now = max(self.now, self.free)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*args: Any, **options: Any) -> FakeGpu:
        gpu = FakeGpu(*args, **options)
        monkeypatch.setattr(lora_timing, "time", types.SimpleNamespace(perf_counter=lambda: gpu.now / 1e3))
        return gpu

    return make


@pytest.mark.parametrize(("gpu_ms", "host_ms"), [(2.0, 0.5), (2.0, 30.0)])
def test_the_host_is_out_of_the_way(fake: Any, gpu_ms: float, host_ms: float) -> None:
    gpu, samples = fake(gpu_ms, host_ms), Samples()
    take_stepped(gpu.call, gpu, samples, 3)
    take_queued(gpu.call, gpu, samples, 3)
    assert samples.gpu == pytest.approx([gpu_ms] * 3) and samples.queued is True and samples.passes == 2
    assert samples.host == pytest.approx([host_ms] * 3)
    assert samples.issue_ms == pytest.approx(2 * host_ms) and samples.issue_ms < samples.sleep_ms
    # Five passes: where the host is the slower one, it alone counts, and the last one's work.
    both = (5 * host_ms + gpu_ms) / 5 if host_ms > gpu_ms else (host_ms + 5 * gpu_ms) / 5
    assert samples.step == pytest.approx([both] * 3)


def test_a_sleep_that_was_too_short_is_lengthened(fake: Any) -> None:
    gpu, samples = fake(2.0, 30.0), Samples(host=[0.1])
    take_queued(gpu.call, gpu, samples, 2)
    assert samples.gpu == pytest.approx([2.0, 2.0]) and samples.queued is True
    assert gpu.sleeps == [5.0, 20.0, 80.0, 80.0] and samples.sleep_ms == pytest.approx(80.0)
    take_queued(gpu.call, gpu, samples, 1)
    assert gpu.sleeps[4:] == [80.0] and len(samples.gpu) == 3  # the next round begins with what was enough


def test_a_queue_with_room_for_one_pass(fake: Any) -> None:
    gpu, samples = fake(2.0, 1.0, holds=1), Samples(host=[1.0])
    take_queued(gpu.call, gpu, samples, 2)
    assert samples.gpu == pytest.approx([2.0, 2.0]) and (samples.queued, samples.passes) == (True, 1)
    assert samples.sleep_ms == pytest.approx(5.0)


def test_samples_of_another_number_of_passes_are_dropped(fake: Any) -> None:
    gpu, samples = fake(2.0, 1.0), Samples(host=[1.0])
    take_queued(gpu.call, gpu, samples, 3)
    gpu.holds = 1
    take_queued(gpu.call, gpu, samples, 2)
    assert (samples.passes, samples.queued, len(samples.gpu)) == (1, True, 2)


def test_a_side_that_waits_is_marked(fake: Any) -> None:
    gpu, samples = fake(2.0, 3.0, waits=True), Samples(host=[3.0])
    take_queued(gpu.call, gpu, samples, 3)
    assert samples.queued is False and len(samples.gpu) == 3
    take_queued(gpu.call, gpu, samples, 2)
    assert samples.queued is False and len(samples.gpu) == 5


def test_samples_from_before_the_host_fell_behind_are_dropped(fake: Any) -> None:
    gpu, samples = fake(2.0, 1.0), Samples(host=[1.0])
    take_queued(gpu.call, gpu, samples, 3)
    gpu.waits = True
    take_queued(gpu.call, gpu, samples, 2)
    assert samples.queued is False and len(samples.gpu) == 2


def test_without_a_gpu_there_is_the_host_alone(fake: Any) -> None:
    gpu, samples = fake(0.0, 3.0), Samples()
    take_stepped(gpu.call, None, samples, 2)
    assert samples.step == samples.host == pytest.approx([3.0, 3.0]) and samples.queued is None


def test_sides_take_turns() -> None:
    order: list[str] = []

    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

        def take(self, queue: Any, count: int, *, first: bool) -> None:
            order.append(self.name + ("!" if first else ""))

    lora_measure.time_by_turns([Side("a"), Side("b"), Side("c")], None, 3, 1)  # type: ignore[list-item]
    assert order == ["a!", "b!", "c!", "b", "c", "a", "c", "a", "b"]


# -- right or wrong ---------------------------------------------------------------------------------------------------


def test_deviations() -> None:
    exact = {name: torch.ones(4, dtype=torch.float64) for name in ("x", "q.lora_A.w", "k.lora_A.w", "q.lora_B.w")}
    found: dict[str, torch.Tensor | None] = {name: value.float() for name, value in exact.items()}
    assert lora_check.deviations(found, exact) == {"x": 0.0, "A": 0.0, "B": 0.0}
    found["q.lora_A.w"] = 1.5 * torch.ones(4)  # the worst of the A's counts
    assert lora_check.deviations(found, exact) == {"x": 0.0, "A": 0.5, "B": 0.0}
    for broken in (None, torch.full((4,), math.nan), torch.ones(1)):
        assert lora_check.deviations({**found, "q.lora_B.w": broken}, exact)["B"] == math.inf


@pytest.mark.parametrize(
    ("found", "dropout", "told"),
    [
        ({"A": 0.014, "B": 0.001, "x": 0.01}, 0.0, None),
        ({"A": 0.016, "B": 0.01, "x": 0.01}, 0.0, "gradient of A off from fp64 by 0.016, PEFT's by 0.01"),
        ({"A": 0.01, "B": 0.01, "x": 0.016}, 0.0, "gradient of x off"),
        ({"A": 0.01, "B": math.inf, "x": 0.01}, 0.0, "gradient of B off from fp64 by inf"),
        ({"A": 0.01, "B": math.nan, "x": 0.01}, 0.0, "gradient of B off from fp64 by nan"),
        ({"A": 0.01, "x": 0.01}, 0.0, "gradient of B off from fp64 by inf"),
        ({"A": 0.01, "B": 0.006, "x": 0.001}, 0.05, "gradient of B off from fp64 by 0.006 with dropout 0.05"),
        ({"A": 0.01, "B": 0.007, "x": 0.001}, 0.05, None),  # x: what rounds less may be nearer
    ],
)
def test_too_far(found: dict[str, float], dropout: float, told: str | None) -> None:
    wrong = lora_check.too_far(found, {"A": 0.01, "B": 0.01, "x": 0.01}, dropout)
    assert wrong is None if told is None else wrong is not None and wrong.startswith(told)


def test_a_yardstick_that_is_wrong_itself() -> None:
    wrong = lora_check.too_far({"A": 0.5, "B": 0.5, "x": 0.5}, {"A": 0.5, "B": 0.5, "x": 0.5}, 0.0)
    assert wrong is not None and "no yardstick" in wrong
    assert lora_check.too_far({"A": 0.5, "B": 0.5, "x": 0.5}, {"A": 0.5, "B": 0.5, "x": 0.5}, 0.05) is None


def _with(change: Any) -> Any:
    """Ours with its model changed."""
    original = lora_sides.ours

    def ours(*args: Any) -> Any:
        runner, parts = original(*args)
        change(runner.layer)
        return runner, parts

    return ours


def _scaled(layer: Any) -> None:
    layer.mlp.down_proj.scaling["default"] *= 1.1


def test_planted_faults_get_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(lora_sides, "ours", _with(_scaled))
        rows = run(tmp_path, ["peft", "ours"], ["autocast"])
    row = rows["autocast", "ours"]
    assert row["status"] == "wrong answer" and "off from fp64" in row["reason"] and row["step_ms"] is None
    assert rows["autocast", "peft"]["status"] == "ok" and rows["autocast", "peft"]["ours_step_is_faster_by"] is None
    with monkeypatch.context() as patched:
        patched.setattr(lora_sides, "ours", _with(lambda layer: layer.eval()))
        rows = run(tmp_path, ["ours"], ["fp32", "fp32 dropout"])
    assert rows["fp32", "ours"]["status"] == "ok"
    row = rows["fp32 dropout", "ours"]
    assert row["status"] == "wrong answer" and "less is dropped" in row["reason"]


def test_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ours on a CPU: the yardstick is there without PEFT among the sides; 4 bits need a GPU."""
    kept: list[dict[str, Any]] = []
    rows = run(tmp_path, ["unsloth", "ours"], list(SETTINGS)[1:], keep=lambda result: kept.append(copy.copy(result)),
               python={"unsloth": "/bin/false"})  # fmt: skip
    statuses = {name: rows[name, "ours"]["status"] for name in list(SETTINGS)[1:]}
    assert statuses == {**dict.fromkeys(statuses, "ok"), "nf4": "not offered"}, rows
    assert rows["bf16", "unsloth"]["status"] == "not offered"
    assert rows["nf4", "unsloth"]["status"] == "not offered"
    assert rows["autocast dropout", "unsloth"]["status"] == "failed"
    assert len(kept) == 7  # after each case, and after the peer's process
    lora_report.print_tables(kept[-1])
    text = capsys.readouterr().out
    assert "unsloth: not offered (its loader makes adapters in fp32" in text
    assert "tiny bf16, tiny bf16 dropout" in text


def test_fp64_has_the_weights_that_the_model_computes_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantised ones in 4 bits; adapters as rounded to their dtype; no dropout."""
    import peft.utils.integrations

    lora_layer.write_model(TINY, tmp_path)
    inputs = lora_layer.make_inputs(TINY, 64, 64, CPU)

    def exact(model: Any, name: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = lora_layer.exact_gradients(tmp_path, model, SETTINGS[name], values, inputs)
        assert all(gradient.dtype == torch.float64 for gradient in found.values())
        return found

    model = lora_layer.load(tmp_path, SETTINGS["autocast"])
    values = lora_layer.make_adapters(model)
    plain = exact(model, "autocast")
    assert set(plain) == {"x", *values}
    dropped = exact(model, "autocast dropout")
    assert all(torch.equal(gradient, plain[name]) for name, gradient in dropped.items())
    rounded = lora_check.deviations(exact(model, "bf16"), plain)
    assert all(1e-5 < off < 0.02 for off in rounded.values()), rounded
    for module in lora_layer.only_layer(model).modules():
        if hasattr(module, "base_layer"):
            module.base_layer.weight.data *= 0.5  # as if this were what 4 bits had left
    monkeypatch.setattr(peft.utils.integrations, "dequantize_module_weight", lambda module: module.weight)
    lora_layer.set_adapters(model, values)
    halved = exact(model, "nf4")
    runner = lora_sides.stock(model, SETTINGS["autocast"])
    assert max(lora_check.deviations(runner.gradients(inputs), halved).values()) < 0.03
    assert min(lora_check.deviations(runner.gradients(inputs), plain).values()) > 0.1


def test_ours_without_fused_lora_is_no_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHRONICALS_LORA", "off")
    row = run(tmp_path, ["ours"], ["autocast"])["autocast", "ours"]
    assert row["status"] == "failed" and "lora is off" in row["reason"]


def test_a_pass_starts_from_no_gradients(tmp_path: Path) -> None:
    lora_layer.write_model(TINY, tmp_path)
    setting = SETTINGS["fp32"]
    model = lora_layer.load(tmp_path, setting)
    lora_layer.set_adapters(model, lora_layer.make_adapters(model))
    runner = lora_sides.stock(model, setting)
    step = lora_layer.Pass(runner, lora_layer.make_inputs(TINY, 128, 64, CPU))
    step()
    first = {name: p.grad.clone() for name, p in runner.adapters.items()}
    assert len(first) == 14 and all(grad.norm() > 0 for grad in first.values())
    step()
    assert all(torch.equal(runner.adapters[name].grad, grad) for name, grad in first.items())
    # Nothing is zero or one that an error could hide behind.
    layer = lora_layer.only_layer(model)
    assert layer.self_attn.q_proj.base_layer.bias.abs().min() > 0
    assert (layer.input_layernorm.weight - 1).abs().max() > 0.05
    with pytest.raises(RuntimeError, match="the trained parameters are others"):
        lora_layer.set_adapters(model, {"other": torch.zeros(1)})


# -- a peer's process -------------------------------------------------------------------------------------------------


def test_a_peer_is_called_as_its_model_calls_its_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("unsloth")
    exec(FAKE_UNSLOTH, module.__dict__)
    monkeypatch.setitem(sys.modules, "unsloth", module)
    lora_layer.write_model(TINY, tmp_path)
    setting = SETTINGS["autocast"]
    values = lora_layer.make_adapters(lora_layer.load(tmp_path, setting))
    runner = lora_sides.unsloth(tmp_path, TINY, setting, values)
    arguments = runner.arguments(torch.zeros(3, 8, TINY.shape.hidden, dtype=torch.bfloat16))
    cos, _ = arguments["position_embeddings"]
    assert cos.shape[-2] == 8 and "hidden_states" not in arguments and arguments["attention_mask"] is None
    assert not runner.layer._forward_pre_hooks
    with pytest.raises(lora_sides.NotOffered, match="its adapters are in float32"):
        lora_sides.unsloth(tmp_path, TINY, SETTINGS["bf16"], values)


def test_a_failure_in_one_case_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(task: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
        if case["setting"] == "autocast":
            raise ImportError("wrapped") from ModuleNotFoundError("No module named 'unsloth'")
        return {"status": "ok", "reason": None, "step_ms": 1.0}

    monkeypatch.setattr(lora_worker, "_measured", measured)
    (tmp_path / "task").write_text(json.dumps({"cases": [{"setting": "autocast"}, {"setting": "nf4"}]}))
    assert lora_worker.main([str(tmp_path / "task"), str(tmp_path / "result")]) == 0
    cases = json.loads((tmp_path / "result").read_text())["cases"]
    assert cases["autocast"] == {"status": "not installed", "reason": "No module named 'unsloth'"}
    assert cases["nf4"]["status"] == "ok"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo out of luck; exit 3", "exit code 3; its last words: out of luck"),
        ("echo thinking; sleep 60", "not done after 0.5 s; its last words: thinking"),
    ],
)
def test_a_process_that_dies_or_hangs(tmp_path: Path, script: str, told: str) -> None:
    """What it had written by then counts."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho \'{{"cases": {{"nf4": {{"status": "ok", "step_ms": 2}}}}}}\' > "$4"\n{script}\n'
    )
    python.chmod(0o755)
    given = settings(tmp_path, [], [], python={"unsloth": str(python)}, timeout=0.5)
    rows = [{"status": "waiting", "reason": None, "setting": name} for name in ("nf4", "autocast")]
    lora_run._run_apart("unsloth", TINY, tmp_path, [({"setting": row["setting"]}, row) for row in rows], given)
    assert rows[0]["status"] == "ok" and rows[0]["step_ms"] == 2
    assert rows[1]["status"] == "failed" and rows[1]["reason"] == told


# -- the verdict ------------------------------------------------------------------------------------------------------


def row(side: str, gpu: float, step: float, peak: float, case: str = "a", **options: Any) -> dict[str, Any]:
    figures = {"gpu_ms": gpu, "step_ms": step, "peak_mib": peak, "queued": True, "status": "ok"}
    return {
        "case": case,
        "side": side,
        "ours_is_faster_by": None,
        "ours_step_is_faster_by": None,
        **figures,
        **options,
    }


def verdict(*rows: dict[str, Any]) -> dict[str, str]:
    named = {"host out": "gpu", "included": "step", "memory": "peak"}
    return {
        next(short for words, short in named.items() if words in judged.target): judged.outcome
        for judged in lora_verdict.judge(rows)
    }


def test_the_verdict() -> None:
    peer = row("peft", 10.0, 20.0, 100.0)
    assert verdict(peer, row("ours", 10.1, 20.3, 101.0)) == {"gpu": "met", "step": "met", "peak": "met"}
    assert verdict(peer, row("ours", 10.3, 20.0, 100.0)) == {"gpu": "missed", "step": "met", "peak": "met"}
    assert verdict(peer, row("ours", 5.0, 20.5, 100.0)) == {"gpu": "met", "step": "missed", "peak": "met"}
    assert verdict(peer, row("ours", 5.0, 5.0, 103.0)) == {"gpu": "met", "step": "met", "peak": "missed"}
    # One case may not make up for another.
    slow = [row("peft", 10.0, 20.0, 100.0, "b"), row("ours", 11.0, 20.0, 100.0, "b")]
    assert verdict(peer, row("ours", 1.0, 1.0, 1.0), *slow)["gpu"] == "missed"
    judged = lora_verdict.judge([peer, row("ours", 5.0, 4.0, 50.0)])
    assert [each.figures for each in judged] == [{"a": 2.0}, {"a": 5.0}, {"a": 0.5}]


def test_what_cannot_be_judged() -> None:
    peer, ours = row("peft", 10.0, 20.0, 100.0), row("ours", 5.0, 5.0, 50.0)
    late = {"gpu": "not measured", "step": "met", "peak": "met"}
    assert verdict(peer, {**ours, "queued": False}) == late
    assert verdict({**peer, "queued": False}, ours) == late
    assert set(verdict({**peer, "status": "failed"}, ours).values()) == {"not measured"}
    assert set(verdict({**peer, "status": "wrong answer"}, ours).values()) == {"not measured"}
    for status in ("failed", "wrong answer"):
        assert set(verdict(peer, {**ours, "status": status}).values()) == {"missed"}
    assert set(verdict(peer).values()) == {"not measured"}
    # What a peer does not offer leaves nothing open.
    other = row("peft", 0.0, 0.0, 0.0, "b", status="not offered")
    assert set(verdict(peer, ours, other, row("ours", 5.0, 5.0, 50.0, "b")).values()) == {"met"}


def test_how_much_faster() -> None:
    rows = [row("peft", 10.0, 20.0, 1.0), row("ours", 5.0, 5.0, 1.0), row("unsloth", 9.0, 9.0, 1.0, queued=False)]
    lora_run._compare(rows)
    assert [each["ours_is_faster_by"] for each in rows] == [2.0, 1.0, None]
    assert [each["ours_step_is_faster_by"] for each in rows] == [4.0, 1.0, 1.8]


def test_a_late_host_is_marked_in_the_table() -> None:
    assert lora_report._time(row("peft", 10.0, 20.0, 1.0)) == "10.00"
    assert lora_report._time(row("peft", 10.0, 20.0, 1.0, queued=False)) == "10.00*"


def test_tables_and_plot_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a dry run has no figures for."""
    result = lora_run.run(settings(tmp_path, ["peft", "ours"], ["autocast", "fp32"]), say=lambda line: None)
    for at, each in enumerate(result["rows"]):
        each |= {"gpu_ms": 3.0 + at, "gpu_ms_p20": 3.0, "gpu_ms_p80": 3.3, "queued": at != 2, "peak_mib": 1234.5}
    result["layers"][0] |= {"gemm_tflops": 700.4, "unsloth": {"gemm_tflops": 690.0}}
    lora_run._compare(result["rows"])
    judged = [asdict(each) for each in lora_verdict.judge(result["rows"])]
    result |= {"dry_run": False, "gpu": "NVIDIA H100", "verdict": judged}
    lora_report.print_tables(result)
    text = capsys.readouterr().out
    assert "5.00*" in text and "GEMM TFLOP/s: here 700, unsloth 690" in text and "1,234" in text
    assert "no slower than peft, host out of the way" in text and "the host was not ahead" in text
    report.write_json(result, tmp_path / "x.json")
    pytest.importorskip("matplotlib")
    assert lora_report.write_plot(result, tmp_path / "x.png") is None and (tmp_path / "x.png").exists()


def test_a_dry_run_times_one_tiny_layer_whatever_layers_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_command, "SETTINGS", {"bf16": SETTINGS["bf16"]})
    arguments = ["--layers", "qwen2.5-7b", "qwen2.5-0.5b", "--sides", "peft", "--output", str(tmp_path)]
    assert cli.main(["bench", "lora", *arguments]) == 0
    said = capsys.readouterr()
    assert "One tiny layer instead of qwen2.5-7b and qwen2.5-0.5b." in said.out and "[1/1] tiny bf16" in said.out
    assert "Loading weights" not in said.err
    (layer,) = json.loads((tmp_path / "bench_lora_cpu.json").read_text())["layers"]
    assert (layer["layer"], layer["hidden"], layer["tokens"]) == ("tiny", 64, 128)
