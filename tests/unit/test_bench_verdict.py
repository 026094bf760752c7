"""What `chronicals-trl bench ops` shows of a run: tables, plot and file names; and the verdict on made-up figures."""

from __future__ import annotations

import builtins
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from chronicals_trl.bench import report, timing
from chronicals_trl.bench.ops import report as ops_report
from chronicals_trl.bench.ops import verdict
from chronicals_trl.bench.ops.run import Row
from chronicals_trl.bench.timing import Timing
from chronicals_trl.bench.verdict import Judged


def judged_row(
    side: str, us: float | None, *, op: str = "rms_norm", shape: str = "tiny", direction: str = "backward",
    share: float = 0.5, status: str = "failed",
) -> Row:  # fmt: skip
    """A made-up row: measured if `us` is given."""
    row = Row(op, shape, 6, direction, side, status, reason="made up")
    if us is None:
        return row
    timed = Timing(us, us, us, 3, 9, 3, 4.0, timing.GRAPH)
    faster = us / 2.0
    return replace(
        row, status="ok", reason=None, timing=timed, gb_per_s=3e3, copy_share=share, ours_is_faster_by=faster
    )


def made_up(rows: list[Row]) -> dict[str, Any]:
    return {
        "dry_run": False, "gpu": "NVIDIA H100", "copy_gb_per_s": 6e3, "dtype": "bfloat16", "method": timing.GRAPH,
        "rows": [asdict(row) for row in rows], "host": [], "verdict": [asdict(each) for each in verdict.judge(rows)],
    }  # fmt: skip


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [judged_row("ours", 2.0), judged_row("liger", 3.0), judged_row("quack", None)]
    assert ops_report.write_plot(made_up(rows), tmp_path / "plot.png") is None
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert ops_report.write_plot(made_up(rows[2:]), tmp_path / "none.png") == "no plot: nothing was measured"


def test_without_matplotlib_and_rich(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("matplotlib", "rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    result = made_up([judged_row("ours", 2.0), judged_row("liger", 3.0), judged_row("quack", None)])
    assert "pip install 'chronicals-trl[bench]'" in (ops_report.write_plot(result, tmp_path / "plot.png") or "")
    ops_report.print_tables(result)
    lines = capsys.readouterr().out.splitlines()
    columns = [line.split() for line in lines]
    assert ["rms_norm", "tiny", "backward", "ours", "2.0", "0.0%", "3,000", "50%"] in columns
    assert ["liger", "3.0", "0.0%", "3,000", "50%", "1.50x"] in columns
    assert "quack: failed (None): all ops" not in lines and "quack: failed (made up): all ops" in lines


def test_file_names() -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100_sxm4",
             "NVIDIA GeForce RTX 4090": "rtx_4090", None: "cpu"}  # fmt: skip
    assert {name: report.file_stem(name) for name in names} == {k: f"bench_ops_{v}" for k, v in names.items()}


# -- the verdict ----------------------------------------


def outcome(rows: list[Row], start: str) -> Judged:
    (judged,) = [each for each in verdict.judge(rows) if each.target.startswith(start)]
    return judged


@pytest.mark.parametrize(("share", "expected"), [(0.75, "met"), (0.749, "missed")])
def test_share_of_copy_bandwidth(share: float, expected: str) -> None:
    judged = outcome([judged_row("ours", 2.0, share=share)], "RMSNorm backward: 75%")
    assert (judged.outcome, judged.figures) == (expected, {"rms_norm tiny backward": share})


def test_one_shape_below_is_a_miss() -> None:
    rows = [judged_row("ours", 2.0, shape=shape, share=share) for shape, share in (("a", 0.9), ("b", 0.7))]
    assert outcome(rows, "RMSNorm backward: 75%").outcome == "missed"


@pytest.mark.parametrize(("liger", "expected"), [(3.0, "met"), (2.9, "missed")])
def test_against_liger(liger: float, expected: str) -> None:
    judged = outcome([judged_row("ours", 2.0), judged_row("liger", liger)], "RMSNorm backward: 1.5x Liger")
    assert (judged.outcome, judged.figures) == (expected, {"rms_norm tiny backward": liger / 2})


@pytest.mark.parametrize(("eager", "expected"), [(17.0, "met"), (16.0, "missed")])
def test_forward_and_backward_together(eager: float, expected: str) -> None:
    """Ours 1 + 2, eager 4 + 17 or 16: 7x or a little less, though the forward alone is only 4x."""
    rows = [
        judged_row("ours", 1.0, direction="forward"), judged_row("ours", 2.0),
        judged_row("eager", 4.0, direction="forward"), judged_row("eager", eager),
    ]  # fmt: skip
    judged = outcome(rows, "RMSNorm forward + backward")
    assert (judged.outcome, judged.figures) == (expected, {"rms_norm tiny both": (4 + eager) / 3})


def test_no_op_slower() -> None:
    rows = [
        judged_row(side, us, op=op, direction=direction)
        for direction in ("forward", "backward")
        for op, side, us in (("geglu", "ours", 2.0), ("geglu", "compile", 1.97), ("qk_norm", "ours", 2.0),
                             ("qk_norm", "compile", 1.97))
    ]  # fmt: skip
    assert outcome(rows, "no op slower than torch.compile").outcome == "met"  # within the noise
    rows[-1] = judged_row("compile", 1.9, op="qk_norm")
    judged = outcome(rows, "no op slower than torch.compile")
    assert judged.outcome == "missed"
    assert min(judged.figures, key=judged.figures.__getitem__) == "qk_norm tiny backward"
    assert len(judged.figures) == 4


def test_ahead_means_ahead() -> None:
    rows = [
        judged_row(side, 2.0, op="qk_rope", direction=d) for side in ("ours", "liger") for d in ("forward", "backward")
    ]
    assert outcome(rows, "QK-RoPE both ways: ahead of Liger").outcome == "missed"
    assert outcome(rows, "no op slower than Liger").outcome == "met"


def test_a_missing_peer_leaves_the_question_open() -> None:
    rows = [judged_row("ours", 2.0), judged_row("liger", None, status="not installed")]
    judged = outcome(rows, "RMSNorm backward: 1.5x Liger")
    assert (judged.outcome, judged.missing) == ("not measured", {"rms_norm tiny backward": "liger: not installed"})
    # but a miss elsewhere is a miss
    rows += [judged_row("ours", 2.0, shape="b"), judged_row("liger", 2.0, shape="b")]
    assert outcome(rows, "RMSNorm backward: 1.5x Liger").outcome == "missed"


def test_a_peer_without_the_op_is_no_open_question() -> None:
    rows = [judged_row(side, 2.0, direction=d) for side in ("ours", "liger") for d in ("forward", "backward")]
    for direction in ("forward", "backward"):
        rows.append(judged_row("ours", 2.0, op="qk_norm", direction=direction))
        rows.append(judged_row("liger", None, op="qk_norm", direction=direction, status="not offered"))
    assert outcome(rows, "no op slower than Liger").outcome == "met"


def test_our_own_failure_is_a_miss() -> None:
    rows = [judged_row("ours", None, status="wrong answer"), judged_row("liger", 3.0)]
    judged = outcome(rows, "RMSNorm backward: 1.5x Liger")
    assert (judged.outcome, judged.missing) == ("missed", {"rms_norm tiny backward": "ours: wrong answer"})


def test_nothing_measured_is_not_met() -> None:
    assert {each.outcome for each in verdict.judge([])} == {"not measured"}
