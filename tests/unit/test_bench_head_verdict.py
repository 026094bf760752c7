"""What `chronicals-trl bench head` shows of a run, and the verdict on made-up figures."""

from __future__ import annotations

import builtins
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from chronicals_trl.bench import report
from chronicals_trl.bench.head import report as head_report
from chronicals_trl.bench.head import run as head_run
from chronicals_trl.bench.head import verdict as head_verdict
from chronicals_trl.bench.head.check import Errors
from chronicals_trl.bench.head.run import Case, Row

SIZES = {"qwen2.5-0.5b": (16384, 896, 151_936), "llama-3-8b": (8192, 4096, 128_256), "paper": (8192, 896, 151_936)}
ACCURATE = Errors(1e-5, 2e-3, 1e-2, 2e-3, 1e-2)


def planted(
    shape: str = "qwen2.5-0.5b", frozen: bool = False, floor: float | None = 20.0, graph: float | None = None,
    sides: dict[str, tuple[float, float]] | None = None, errors: dict[str, Errors] | None = None,
) -> tuple[Case, list[Row]]:  # fmt: skip
    """A case with sides of (milliseconds, extra MiB)."""
    name = f"{shape} {'frozen' if frozen else 'trained'}"
    samples = {} if floor is None else {2048: [floor + 1] * 3, 4096: [floor] * 3}
    case = Case(name, shape, *SIZES[shape], frozen, floor_samples=samples)
    sides = {"ours": (24.0, 800.0), "trl": (36.0, 832.0), "eager": (60.0, 28_200.0)} if sides is None else sides
    rows = [
        Row(
            name,
            shape,
            frozen,
            s,
            errors=(errors or {}).get(s, ACCURATE),
            peak_mib=mib + 288,
            extra_mib=mib,
            samples=[ms] * 3,
            graph_ms=(graph or ms) if s == "ours" else None,
            launched_ms=ms if s == "ours" else None,
        )
        for s, (ms, mib) in sides.items()
    ]
    head_run._finish(case, rows)
    return case, rows


def outcome(start: str, *cases: tuple[Case, list[Row]]) -> tuple[str, dict[str, float], dict[str, str]]:
    judged = head_verdict.judge([case for case, _ in cases], [row for _, rows in cases for row in rows])
    (found,) = [each for each in judged if each.target.startswith(start) and not each.target.startswith(start + "_")]
    return found.outcome, found.figures, found.missing


@pytest.mark.parametrize(
    ("shape", "frozen", "bound"),
    [
        ("qwen2.5-0.5b", False, 1.25),
        ("qwen2.5-0.5b", True, 1.30),
        ("llama-3-8b", False, 1.08),
        ("llama-3-8b", True, 1.05),
    ],
)
def test_multiples_of_the_floor(shape: str, frozen: bool, bound: float) -> None:
    for ms, expected in ((20 * bound, "met"), (20 * bound + 0.01, "missed")):
        case = planted(shape, frozen, sides={"ours": (ms, 800.0)})
        found, figures, _ = outcome(case[0].name, case)
        assert (found, figures) == (expected, {case[0].name: pytest.approx(ms / 20)})


def test_without_a_floor_there_is_no_answer() -> None:
    assert outcome("qwen2.5-0.5b trained", planted(floor=None))[0] == "not measured"


@pytest.mark.parametrize(("peer", "expected"), [(24.6, "met"), (24.4, "missed"), (23.0, "missed")])
def test_faster_than_a_peer(peer: float, expected: str) -> None:
    case = planted(sides={"ours": (24.0, 800.0), "cce": (peer, 2.0)})
    found, figures, _ = outcome("faster than cce", case, planted(frozen=True, sides={"ours": (1, 1), "cce": (9, 2)}))
    assert found == expected and figures["qwen2.5-0.5b trained"] == pytest.approx(peer / 24)


def test_a_peer_that_is_not_there() -> None:
    case, rows = planted()
    rows.append(Row(case.name, case.shape, False, "quack", "not installed", "No module named 'quack'"))
    found, _, missing = outcome("faster than quack", (case, rows))
    assert (found, missing) == ("not measured", {case.name: "quack: not installed (No module named 'quack')"})
    # One that cannot do this case at all raises no question, unless it can do none.
    rows[-1] = replace(rows[-1], status="not offered", reason="V")
    assert outcome("faster than quack", (case, rows))[0] == "not measured"
    other = planted("llama-3-8b", sides={"ours": (40, 1), "quack": (50, 1)})
    assert outcome("faster than quack", (case, rows), other) == ("met", {"llama-3-8b trained": 1.25}, {})


@pytest.mark.parametrize(
    ("frozen", "extra", "expected"),
    [(True, 1024.0, "met"), (True, 1024.1, "missed"), (False, 1024 + 519.3, "met"), (False, 1024 + 519.4, "missed")],
)
def test_extra_memory(frozen: bool, extra: float, expected: str) -> None:
    """4 V H bytes, 519.31 MiB, are the weight gradient's sum in float32, where there is one."""
    assert outcome("extra memory", planted(frozen=frozen, sides={"ours": (24.0, extra)}))[0] == expected


@pytest.mark.parametrize(("extra", "expected"), [(832.0, "met"), (833.0, "missed")])
def test_peak_against_trl(extra: float, expected: str) -> None:
    assert outcome("peak", planted(sides={"ours": (24.0, extra), "trl": (36.0, 832.0)}))[0] == expected


@pytest.mark.parametrize(("ms", "expected"), [(36.0, "met"), (36.7, "met"), (37.0, "missed")])
def test_the_small_budget(ms: float, expected: str) -> None:
    """At the paper's shape too, which no other target looks at."""
    paper = planted("paper", sides={"ours": (99.0, 9_999.0), "ours_135": (ms, 135.0), "trl": (36.0, 832.0)})
    main = planted(sides={"ours": (24.0, 800.0), "ours_135": (30.0, 135.0), "trl": (36.0, 832.0)})
    found, figures, _ = outcome("135 MiB", main, paper)
    assert found == expected and set(figures) == {"qwen2.5-0.5b trained", "paper trained"}
    assert outcome("faster than trl", main, paper)[0] == outcome("peak", main, paper)[0] == "met"


@pytest.mark.parametrize(
    ("mine", "frozen", "expected"),
    [
        (Errors(1e-5, 4e-3, 1, 4e-3, 1), False, "met"),
        (Errors(1e-5, 4.1e-3, 1, 1e-3, 1), False, "missed"),
        (Errors(1e-5, 1e-3, 1, 4.1e-3, 1), False, "missed"),
        (Errors(1e-5, 4e-3, 1), True, "met"),
    ],
)
def test_gradient_errors(mine: Errors, frozen: bool, expected: str) -> None:
    assert outcome("gradient errors", planted(frozen=frozen, errors={"ours": mine}))[0] == expected


def test_the_graph() -> None:
    assert outcome("replays", planted())[0] == "met"
    assert outcome("replays", planted(graph=26.0))[0] == "missed"
    case, rows = planted()
    rows[0] = replace(rows[0], graph_ms=None, graph_reason="RuntimeError: not permitted when stream is capturing")
    found, _, missing = outcome("replays", (case, rows))
    assert found == "missed" and "not permitted" in missing[case.name]


@pytest.mark.parametrize("status", ["failed", "wrong answer"])
def test_our_own_failure_is_a_miss(status: str) -> None:
    case, rows = planted()
    rows[0] = replace(rows[0], status=status, ms=None)
    judged = {each.target: each.outcome for each in head_verdict.judge([case], rows)}
    concerned = {target for target in judged if "135" not in target}
    assert {judged[target] for target in concerned} == {"missed"}


def test_nothing_measured_is_not_met() -> None:
    assert {each.outcome for each in head_verdict.judge([], [])} == {"not measured"}


# -- what is shown ----------------------------------------------------------------------------------------------------


def made_up() -> dict[str, Any]:
    case, rows = planted()
    rows.append(Row(case.name, case.shape, False, "quack", "failed", "made up"))
    return {
        "dry_run": False, "gpu": "NVIDIA H100", "dtype": "bfloat16", "method": "events", "cases": [asdict(case)],
        "rows": [asdict(row) for row in rows],
        "verdict": [asdict(each) for each in head_verdict.judge([case], rows)],
    }  # fmt: skip


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert head_report.write_plot(made_up(), tmp_path / "plot.png") is None
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    nothing = {**made_up(), "rows": made_up()["rows"][-1:]}
    assert head_report.write_plot(nothing, tmp_path / "none.png") == "no plot: nothing was measured"


def test_without_matplotlib_and_rich(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("matplotlib", "rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pip install 'chronicals-trl[bench]'" in (head_report.write_plot(made_up(), tmp_path / "plot.png") or "")
    head_report.print_tables(made_up())
    text = capsys.readouterr().out
    columns = [line.split() for line in text.splitlines()]
    assert ["ours", "24.00", "0.0%", "1.200", "24.00", "800", "1.0e-05", "2.0e-03", "2.0e-03"] in columns
    assert ["trl", "36.00", "0.0%", "1.800", "1.50x", "832", "1.0e-05", "2.0e-03", "2.0e-03"] in columns
    assert "quack: failed (made up): all cases" in text
    assert "16,384 x 896 x 151,936; multiplications alone 20.00 ms (chunks of 4,096, 669 TFLOP/s)" in text


def test_file_names() -> None:
    assert report.file_stem("NVIDIA H100 80GB HBM3", "head") == "bench_head_h100"
