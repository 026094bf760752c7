"""`chronicals-trl bench attention` on a CPU: the dry run end to end, what is timed, wrong sides, the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_flash_attention as fake
import pytest
import torch

from chronicals_trl import cli
from chronicals_trl.bench import report, timing
from chronicals_trl.bench.attention import cases as attention
from chronicals_trl.bench.attention import report as attention_report
from chronicals_trl.bench.attention import run as attention_run
from chronicals_trl.bench.attention.cases import DIRECT, Shape, make_buffers, make_documents
from chronicals_trl.bench.attention.run import Case, Row, Settings, judge
from chronicals_trl.bench.timing import Timing

CPU = torch.device("cpu")
TINY = Shape("tiny", 600, 4, 2, 8)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run is what is tested here, on machines with a GPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run_tiny(sides: list[str], **options: Any) -> dict[tuple[str, str], dict[str, Any]]:
    settings = Settings([TINY], sides, {}, torch.float32, CPU, repeats=2, **options)
    rows = attention_run.run(settings, say=lambda line: None)["rows"]
    return {(row["case"], row["side"]): row for row in rows}


# -- the command ------------------------------------------------------------------------------------------------------


def test_dry_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "attention", "--quick", "--output", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(report.DRY_RUN) and "Verdict: none" in text and "[1/1] qwen2.5-0.5b, us" in text
    result = json.loads((tmp_path / "new" / "bench_attention_cpu.json").read_text())
    assert (result["benchmark"], result["dry_run"], result["gpu"], result["verdict"]) == ("attention", True, None, [])
    (case,) = result["cases"]
    assert (case["tokens"], case["head_dim"], case["q_heads"], case["empty"]) == (1024, 16, 14, 0)
    assert case["documents"] > 1
    rows = {row["side"]: row for row in result["rows"]}
    assert set(rows) == set(attention.SIDES)
    assert {side for side, row in rows.items() if row["status"] == "not run"} == set(attention.NOT_ON_CPU)
    ours = rows["ours_sdpa"]
    assert ours["status"] == "ok" and 0 < ours["error"] < 0.01 and ours["host_us"] > 0
    assert ours["both_us"] == pytest.approx(ours["forward"]["us"] + ours["backward"]["us"])
    assert ours["forward"]["samples"] == 5
    pytest.importorskip("matplotlib")
    assert (tmp_path / "new" / "bench_attention_cpu.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shapes", "gpt2"], "unknown shape 'gpt2'; there are: qwen2.5-0.5b, llama-3-8b"),
        (["--sides", "xformers"], "unknown side 'xformers'; there are: ours_fa4, fa4, ours_varlen"),
        (["--tokens", "0"], "--tokens must be at least 1, not 0"),
    ],
)
def test_unknown_names_are_refused(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "attention", *arguments])
    assert done.value.code == 2
    assert told in capsys.readouterr().err


def test_a_side_that_is_not_there_is_no_failure_and_a_wrong_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["bench", "attention", "--quick", "--sides", "ours_fa4", "fa4", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    rows = {
        (row["case"], row["side"]): row
        for row in json.loads((tmp_path / "bench_attention_cpu.json").read_text())["rows"]
    }
    assert len(rows) == 6
    for (_, side), row in rows.items():
        expected = "not offered" if side == "ours_fa4" else "not installed"
        assert row["status"] == expected and row["reason"]
    monkeypatch.setitem(attention.SIDES, "ours_fa4", leaking)
    assert cli.main(arguments) == 1


# -- what is timed ----------------------------------------------------------------------------------------------------


def test_documents() -> None:
    documents = make_documents(16384, 32, CPU)
    assert sum(documents.lengths) == 16384 and 2 <= min(documents.lengths) and documents.max_seqlen <= 2048
    middle = sorted(documents.lengths)[len(documents.lengths) // 2]
    assert 150 < middle < 450  # the median is 270
    offsets = documents.cu_seqlens
    assert offsets.dtype == torch.int32 and len(offsets) == len(documents.lengths) + 33
    assert offsets.diff().tolist() == [*documents.lengths, *[0] * 32]
    assert (documents.position_ids == 0).sum() == len(documents.lengths)


def test_buffers_have_the_layout_of_the_model() -> None:
    buffers = make_buffers(TINY, torch.bfloat16, CPU)
    assert [tuple(x.shape) for x in buffers.args] == [(1, 4, 600, 8), (1, 2, 600, 8), (1, 2, 600, 8)]
    assert all(x.transpose(1, 2).is_contiguous() and x.is_leaf for x in buffers.args)
    assert [tuple(x.shape) for x in buffers.grad_outputs] == [(1, 600, 4, 8)]
    assert TINY.bytes == sum(x.nbytes for x in buffers.args) + buffers.grad_outputs[0].nbytes


def leaking(documents: attention.Documents) -> attention.Call:
    """As if the first two documents were one."""
    joined = documents.cu_seqlens[[0, *range(2, len(documents.cu_seqlens))]]
    return plain(joined)


def plain(offsets: torch.Tensor) -> attention.Call:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        flat = (x.transpose(1, 2).squeeze(0) for x in (q, k, v))
        return fake.attend(*flat, offsets, q.shape[-1] ** -0.5, None, 0.0)[None]

    return call


def test_our_side_is_what_transformers_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    fake.install(monkeypatch)
    monkeypatch.setattr(attention, "unavailable", lambda backend, device: None)
    monkeypatch.setitem(attention.SIDES, "fa4", lambda documents: plain(documents.cu_seqlens))
    rows = run_tiny(["ours_fa4", "fa4", "ours_sdpa"])
    cases = ("tiny", "tiny +32 empty", "tiny +200 empty")
    assert set(rows) == {(c, s) for c in cases for s in ("ours_fa4", "fa4")} | {("tiny", "ours_sdpa")}
    assert fake.CALLS["forward"] > 10 and fake.CALLS["backward"] > 5
    for (case, side), row in rows.items():
        assert row["status"] == "ok" and row["error"] < 1e-5, row
        assert (row["host_us"] is not None) == (case == "tiny")
        assert (row["of_direct"] is not None) == (side == "ours_fa4")
    ours, direct = rows["tiny", "ours_fa4"], rows["tiny", "fa4"]
    assert ours["of_direct"]["forward"] == pytest.approx(ours["forward"]["us"] / direct["forward"]["us"])
    assert ours["of_direct"]["both"] == pytest.approx(ours["both_us"] / direct["both_us"])


def fails(documents: attention.Documents) -> attention.Call:
    raise RuntimeError("no kernel\nfor this GPU")


def not_a_number(documents: attention.Documents) -> attention.Call:
    return lambda q, k, v: plain(documents.cu_seqlens)(q, k, v) * float("nan")


@pytest.mark.parametrize(
    ("make", "status", "reason"),
    [
        (leaking, "wrong answer", "off from fp64 by 0."),
        (not_a_number, "wrong answer", "off from fp64 by None"),
        (fails, "failed", "RuntimeError: no kernel"),
    ],
)
def test_a_wrong_side_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], status: str, reason: str
) -> None:
    monkeypatch.setitem(attention.SIDES, "varlen", make)
    kept: list[dict[str, Any]] = []
    rows = run_tiny(["varlen", "ours_sdpa"], keep=kept.append)
    row = rows["tiny", "varlen"]
    assert row["status"] == status and row["reason"].startswith(reason) and row["forward"] is None
    assert rows["tiny", "ours_sdpa"]["status"] == "ok"
    assert [len(result["cases"]) for result in kept] == [1, 2, 3]


# -- the verdict ------------------------------------------------------------------------------------------------------


def row(side: str, forward: float, backward: float, **options: Any) -> Row:
    def timed(us: float) -> Timing:
        return Timing(us, us, us, 3, 10, 2, 4.0, timing.GRAPH)

    return Row("a", side, forward=timed(forward), backward=timed(backward), both_us=forward + backward, **options)


def verdict(*rows: Row) -> dict[str, str]:
    case = Case("a", "a", 1, 1, 1, 1, 1, 0, 1)
    attention_run._compare(rows)
    return {judged.target.split(":")[0] + judged.target[-4:]: judged.outcome for judged in judge([case], rows)}


def test_the_verdict() -> None:
    direct = [row("fa4", 100, 300), row("varlen", 200, 500)]
    fine = [row("ours_fa4", 104, 310, host_us=59.0), row("ours_varlen", 190, 500, host_us=20.0)]
    assert set(verdict(*direct, *fine).values()) == {"met"}
    assert len(judge([], [])) == 2 * len(DIRECT)
    slow = verdict(*direct, row("ours_fa4", 106, 290, host_us=61.0), fine[1])
    assert sorted(slow.values()) == ["met", "met", "missed", "missed"]
    # One way may not make up for the other, and both together are judged too.
    assert "missed" in verdict(*direct, row("ours_fa4", 100, 325, host_us=1.0), fine[1]).values()
    absent = verdict(*direct, *fine[1:])
    assert sorted(absent.values()) == ["met", "met", "not measured", "not measured"]
    failed = verdict(*direct, Row("a", "ours_fa4", "failed", "why"), fine[1])
    assert sorted(failed.values()) == ["met", "met", "missed", "missed"]


def test_tables_name_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings([TINY], ["fa4", "ours_sdpa"], {"flex": "not today"}, torch.float32, CPU, repeats=1)
    attention_report.print_tables(attention_run.run(settings, say=lambda line: None))
    text = capsys.readouterr().out
    assert "flex: not run (not today): tiny" in text and "fa4: not installed" in text
