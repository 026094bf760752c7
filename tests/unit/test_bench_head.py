"""`chronicals-trl bench head` on a CPU: the dry run end to end, the reference, wrong and missing sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from chronicals_trl import cli
from chronicals_trl._versions import installed
from chronicals_trl.bench import report
from chronicals_trl.bench.head import cases as head
from chronicals_trl.bench.head import run as head_run
from chronicals_trl.bench.head.cases import Problem, Shape, make_problem
from chronicals_trl.bench.head.check import Reference
from chronicals_trl.bench.head.run import Settings

CPU = torch.device("cpu")
TINY = Shape("tiny", tokens=24, hidden=16, vocab=300)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run is what is tested here, on machines with a GPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run_tiny(
    monkeypatch: pytest.MonkeyPatch, sides: dict[str, Callable[[], Any]], **options: Any
) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows at `TINY` with `sides` beside the usual ones, by case and side; "ours" and eager run too."""
    for name, load in sides.items():
        monkeypatch.setitem(head.SIDES, name, load)
    settings = Settings([TINY], ["ours", *sides, "eager"], {}, torch.float32, CPU, samples=2, **options)
    rows = head_run.run(settings, say=lambda line: None)["rows"]
    return {(row["case"], row["side"]): row for row in rows}


def side(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
    """Eager with the loss that `change` makes of the logits' cross-entropy."""
    return lambda: lambda hidden, weight, labels, items: change(F.cross_entropy(F.linear(hidden, weight), labels))


# -- the command ------------------------------------------------------------------------------------------------------


def test_dry_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "llama-3-8b", "paper", "--sides", "ours", "ours_135", "trl", "eager", "--tokens", "16"]
    assert cli.main(["bench", "head", *arguments, "--output", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(report.DRY_RUN) and "Verdict: none" in text
    assert "[1/4] llama-3-8b trained" in text and "[4/4] paper frozen" in text
    result = json.loads((tmp_path / "new" / "bench_head_cpu.json").read_text())
    assert (result["benchmark"], result["dry_run"], result["gpu"], result["verdict"]) == ("head", True, None, [])
    assert result["versions"]["torch"] == installed("torch") and result["versions"]["trl"]
    assert result["dtype"] == "bfloat16" and result["ignored_labels"] == 0
    names = ["llama-3-8b trained", "llama-3-8b frozen", "paper trained", "paper frozen"]
    assert [case["name"] for case in result["cases"]] == names
    floors = {}
    for case in result["cases"]:
        assert (case["tokens"], case["hidden"], case["vocab"]) == (16, 64, 1000)
        assert case["floor_chunk"] == 16 and len(case["floor_samples"]["16"]) == 15
        operations = (4 if case["frozen"] else 6) * 16 * 64 * 1000
        assert case["floor_tflops"] == pytest.approx(operations / case["floor_ms"] / 1e9)
        floors[case["name"]] = case["floor_ms"]
    found = {(row["case"], row["side"]): row for row in result["rows"]}
    # At the paper's shape only the small budget is in question.
    wanted = {(n, s) for n in names for s in ("ours", "ours_135", "trl", "eager") if s != "eager" or "llama" in n}
    assert set(found) == wanted
    for (name, _), row in found.items():
        assert row["status"] == "ok" and row["reason"] is None
        assert len(row["samples"]) == 15 and 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["of_floor"] == pytest.approx(row["ms"] / floors[name])
        assert row["ours_is_faster_by"] == pytest.approx(row["ms"] / found[name, "ours"]["ms"])
        assert 0 < row["errors"]["hidden_rms"] < row["errors"]["hidden_max"]
        assert (row["errors"]["weight_rms"] is None) == row["frozen"] == name.endswith("frozen")
        assert row["extra_mib"] is None and row["graph_ms"] is None  # a CPU has no such figures


def test_what_a_dry_run_leaves_out_and_quick(tmp_path: Path) -> None:
    assert cli.main(["bench", "head", "--quick", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench_head_cpu.json").read_text())
    assert [case["name"] for case in result["cases"]] == ["qwen2.5-0.5b trained", "qwen2.5-0.5b frozen"]
    skipped = {row["side"] for row in result["rows"] if row["status"] == "not run"}
    assert skipped == set(head.NOT_ON_CPU)
    assert {len(row["samples"]) for row in result["rows"] if row["side"] == "ours"} == {6}
    assert {row["side"] for row in result["rows"]} == set(head.SIDES)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shapes", "gpt2"], "unknown shape 'gpt2'; there are: qwen2.5-0.5b, llama-3-8b, paper"),
        (["--sides", "unsloth"], "unknown side 'unsloth'; there are: ours, ours_1024, ours_135, trl, liger"),
        (["--tokens", "0"], "--tokens must be at least 1, not 0"),
    ],
)
def test_unknown_names_are_refused(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "head", *arguments])
    assert done.value.code == 2
    assert told in capsys.readouterr().err


def test_our_own_failure_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.SIDES, "ours_135", side(lambda loss: 1.1 * loss))
    arguments = ["--sides", "ours", "ours_135", "--quick", "--output", str(tmp_path)]
    assert cli.main(["bench", "head", *arguments]) == 1


# -- what is timed ----------------------------------------------------------------------------------------------------


def test_inputs() -> None:
    problem = make_problem(TINY, torch.bfloat16, CPU)
    assert (problem.hidden.shape, problem.weight.shape, problem.labels.shape) == ((24, 16), (300, 16), (24,))
    assert problem.hidden.dtype == problem.weight.dtype == torch.bfloat16 and int(problem.num_items) == 24
    # Not the loss of noise, log V, for every token: some are nearly sure, some nearly hopeless.
    logits = F.linear(problem.hidden, problem.weight).float().detach()
    losses = F.cross_entropy(logits, problem.labels, reduction="none")
    assert float(losses.min()) < 0.1 and float(losses.max()) > 2


@pytest.mark.parametrize(("frozen", "factor"), [(False, 6), (True, 4)])
def test_the_floor_is_the_multiplications(monkeypatch: pytest.MonkeyPatch, frozen: bool, factor: int) -> None:
    monkeypatch.setattr(head, "FLOOR_CHUNKS", (7, 8, 24, 4096))
    problem = make_problem(TINY, torch.float32, CPU)
    calls = head.floor_calls(problem, frozen)
    chunks = []
    for chunk, multiply in calls:
        with FlopCounterMode(display=False) as counter:
            multiply()
        assert counter.get_total_flops() == factor * 24 * 16 * 300
        chunks.append(chunk)
    assert chunks == [7, 8, 24]  # none beyond the tokens, all of them once


def test_trl_is_the_op_of_its_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same op with the same settings as the fused head calls it with, and the loss that compute_loss makes."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import add_fused_lm_head

    seen: list[tuple[Any, ...]] = []
    original = ChunkedLogProbFunction.apply

    def spy(*args: Any) -> Any:
        seen.append(args)
        return original(*args)

    model = tiny_models.build("llama")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    batch = tiny_models.packed_batch()
    labels = batch["labels"].clamp(min=0)  # none ignored, as in the benchmark
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", spy)
    theirs = model(input_ids=batch["input_ids"], labels=labels, fused_lm_head=True)
    hidden, weight, _, targets, *settings = seen[0]
    ours = head.load_side("trl")(hidden, weight, targets, torch.tensor(targets.numel()))
    assert torch.equal(ours, theirs.loss)
    assert seen[1][4:] == tuple(settings)


def test_eager_is_the_definition() -> None:
    problem = make_problem(TINY, torch.float64, CPU)
    expected = F.cross_entropy(F.linear(problem.hidden, problem.weight).float(), problem.labels)
    assert torch.equal(problem.loss(head.load_side("eager")), expected)


def test_every_side_goes_through_in_each_round_from_another_start(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def watched(name: str) -> Callable[[], Any]:
        def load() -> Any:
            call = head._eager
            return lambda *args: (order.append(name), call(*args))[1]

        return load

    for name in ("ours", "eager"):
        monkeypatch.setitem(head.SIDES, name, watched(name))
    floor_calls = head_run.floor_calls

    def floor(problem: Problem, frozen: bool) -> Any:
        for chunk, multiply in floor_calls(problem, frozen):
            yield chunk, lambda multiply=multiply: (order.append("floor"), multiply())

    monkeypatch.setattr(head_run, "floor_calls", floor)
    head_run.run(
        Settings([TINY], ["ours", "eager"], {}, torch.float32, CPU, samples=2, warm_up=1), say=lambda line: None
    )
    # One call to compile, one that is checked, one to warm up and two samples; then one to warm up and two samples.
    floor, ours, eager = (["floor"] * 3, ["ours"] * 3, ["eager"] * 3)
    first = [*floor, "ours", "ours", *ours, "eager", "eager", *eager]
    later = [ours, eager, floor], [eager, floor, ours]
    assert order == (first + [name for turn in later for part in turn for name in part]) * 2


# -- the check --------------------------------------------------------------------------------------------------------


def test_reference_is_autograd_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks and on samples as on the whole at once."""
    from chronicals_trl.bench.head import check as head_check

    monkeypatch.setattr(head_check, "CHUNK_BYTES", 8 * TINY.vocab * 5)
    monkeypatch.setattr(head_check, "SAMPLED_TOKENS", 9)
    monkeypatch.setattr(head_check, "SAMPLED_VOCAB", 20)
    problem = make_problem(TINY, torch.bfloat16, CPU)
    reference = Reference(problem)
    hidden, weight = (t.detach().double().requires_grad_() for t in (problem.hidden, problem.weight))
    loss = F.cross_entropy(hidden @ weight.t(), problem.labels)
    loss.backward()
    assert reference.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert len(reference.tokens) == 9 and 10 < len(reference.vocab) <= 20
    # Rows of the vocabulary that are labels, and rows that are not.
    assert 0 < sum(int(v) in problem.labels.tolist() for v in reference.vocab) < len(reference.vocab)
    torch.testing.assert_close(reference.grad_hidden, hidden.grad[reference.tokens], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(reference.grad_weight, weight.grad[reference.vocab], rtol=1e-10, atol=1e-14)
    assert reference.errors(float(loss.detach()), hidden.grad, weight.grad).weight_max < 1e-10


def _missing_chunk(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, items: Any) -> torch.Tensor:
    """The weight's gradient without that of the first third of the tokens."""
    logits = torch.cat((F.linear(hidden[:8], weight.detach()), F.linear(hidden[8:], weight)))
    return F.cross_entropy(logits, labels)


def _without_labels(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, items: Any) -> torch.Tensor:
    logits = F.linear(hidden, weight)
    return (logits.logsumexp(1) - logits.gather(1, labels[:, None]).detach().squeeze(1)).mean()


WRONG = {
    "the loss": side(lambda loss: loss + 0.1 - 0 * loss.detach()),
    "a factor in the gradients": side(lambda loss: 1.2 * loss - 0.2 * loss.detach()),
    "a NaN": side(lambda loss: loss * torch.nan),
    "a NaN in the gradients": side(lambda loss: loss + (loss - loss.detach()).sqrt()),
    "a chunk": lambda: _missing_chunk,
    "the labels in the gradients": lambda: _without_labels,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_caught(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    rows = run_tiny(monkeypatch, {"wrong": WRONG[what]})
    for case in ("tiny trained", "tiny frozen"):
        row = rows[case, "wrong"]
        if what == "a chunk" and case == "tiny frozen":  # then it is right
            assert row["status"] == "ok"
            continue
        assert row["status"] == "wrong answer" and row["ms"] is None and row["reason"], row
        assert rows[case, "ours"]["status"] == rows[case, "eager"]["status"] == "ok"


def test_what_is_not_measured_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def not_installed() -> Any:
        import no_such_library  # noqa: F401

    def raising(error: Exception) -> Callable[[], Any]:
        def call(*args: Any) -> Any:
            raise error

        return lambda: call

    def late() -> Any:
        """Runs out of memory in the second round."""
        calls = 0

        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 6:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return head._eager(*args)

        return call

    sides = {
        "absent": not_installed,
        "narrow": raising(NotImplementedError("V must be a multiple of 256")),
        "broken": raising(RuntimeError("no kernel for this\nand a long trace")),
        "large": raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 28 GiB")),
        "late": late,
        "no gradient": lambda: (
            lambda hidden, weight, labels, items: head._eager(hidden.detach(), weight, labels, items)
        ),
    }
    kept: list[int] = []
    rows = run_tiny(monkeypatch, sides, keep=lambda result: kept.append(len(result["cases"])))
    found = {name: (row["status"], row["reason"]) for (case, name), row in rows.items() if case == "tiny trained"}
    assert found["absent"] == ("not installed", "No module named 'no_such_library'")
    assert found["narrow"] == ("not offered", "V must be a multiple of 256")
    assert found["broken"] == ("failed", "RuntimeError: no kernel for this")
    assert found["large"] == ("failed", "OutOfMemoryError: CUDA out of memory. Tried to allocate 28 GiB")
    assert found["late"] == ("failed", "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB")
    assert found["no gradient"][0] == "failed"
    assert found["ours"] == found["eager"] == ("ok", None)
    assert all(row["ms"] is None for row in rows.values() if row["status"] != "ok")
    assert kept == [1, 2]  # after each case, so that a crash does not cost what is there


def test_a_shape_that_does_not_fit_is_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(head_run, "Reference", no_memory)
    rows = run_tiny(monkeypatch, {})
    assert {(row["status"], row["reason"]) for row in rows.values()} == {
        ("failed", "before any side ran: OutOfMemoryError: CUDA out of memory")
    }


def test_a_cases_sizes_are_no_other_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_run, "MOST_BYTES", sizes := {"head": 2**30})
    head_run._release(torch.device("cpu"))
    assert not sizes
