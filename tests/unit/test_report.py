"""ActivationReport: always every part, shown three ways, saved whole, strict."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chronicals_trl.config import PARTS, ChronicalsConfig
from chronicals_trl.report import ActivationReport, PartReport

LONG_REASON = "the activation is quick_gelu, which is neither SiLU nor tanh-GELU, so the original module is kept"


@pytest.fixture
def report() -> ActivationReport:
    return ActivationReport(
        [
            PartReport("head", "on", modules=1, backend="triton"),
            PartReport("rms_norm", "on", modules=49, backend="triton"),
            PartReport("packing", "on"),
            PartReport("gated_mlp", "off", reason=LONG_REASON, omitted=True),
            PartReport("lora", "off", reason="no adapter [yet]"),
        ],
        notes=["trl 9.9 is newer than tested"],
    )


def test_every_part_is_listed_in_order(report: ActivationReport) -> None:
    assert [part.name for part in report.parts] == list(PARTS)
    assert report["head"].modules == 1
    assert report["attention"] == PartReport("attention", "off", reason="not set up")
    assert [part.name for part in ActivationReport().parts] == list(PARTS)


def test_set_replaces(report: ActivationReport) -> None:
    report.set(PartReport("head", "off", reason="quantised"))
    assert report["head"].state == "off"
    assert len(report.parts) == len(PARTS)


def test_reports_share_nothing() -> None:
    one, other = ActivationReport(), ActivationReport()
    one.set(PartReport("head", "on"))
    one.notes.append("x")
    assert other["head"].state == "off"
    assert other.notes == []


def test_all_off() -> None:
    report = ActivationReport.all_off("use_chronicals is False")
    assert {(part.state, part.reason, part.omitted) for part in report.parts} == {
        ("off", "use_chronicals is False", False)
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "norm", "state": "on"}, "'norm'"),
        ({"name": "head", "state": "maybe"}, "'maybe'"),
        ({"name": "head", "state": "on", "omitted": True}, "omitted"),
    ],
)
def test_impossible_parts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartReport(**settings)


def test_unknown_and_double_parts() -> None:
    with pytest.raises(KeyError, match="norms"):
        ActivationReport()["norms"]
    with pytest.raises(ValueError, match="twice"):
        ActivationReport([PartReport("head", "on"), PartReport("head", "off")])


def test_to_dict(report: ActivationReport) -> None:
    found = report.to_dict()
    assert set(found) == {"parts", "notes", "versions"}
    assert [set(part) for part in found["parts"]] == [{"name", "state", "modules", "backend", "reason"}] * len(PARTS)
    assert found["parts"][0] == {
        "name": "rms_norm",
        "state": "on",
        "modules": 49,
        "backend": "triton",
        "reason": None,
    }
    assert set(found["versions"]) == {"chronicals-trl", "torch", "transformers", "trl", "accelerate", "peft"}
    assert json.loads(json.dumps(found)) == found


def test_save_is_whole_and_replaces(report: ActivationReport, tmp_path: Path) -> None:
    path = tmp_path / "new" / "chronicals_report.json"
    report.save(path)
    report.set(PartReport("head", "off"))
    report.save(str(path))
    assert json.loads(path.read_text()) == report.to_dict()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_failed_save_leaves_the_old_file(
    report: ActivationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chronicals_report.json"
    report.save(path)
    before = path.read_text()
    report.notes.append(object())  # type: ignore[arg-type]  # JSON cannot hold it
    with pytest.raises(TypeError):
        report.save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("width", [None, 60, 100])
def test_render_fits_and_loses_nothing(report: ActivationReport, width: int | None) -> None:
    text = report.render(width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= (width or 100)
    assert " ".join(LONG_REASON.split()) in " ".join(
        " ".join(line[lines[1].index("reason") :] for line in lines[3:]).split()
    )
    assert "trl 9.9 is newer than tested" in text
    for part in PARTS:
        assert part in text


def test_render_and_print_work_without_rich(
    report: ActivationReport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def no_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ImportError("no rich here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_rich)
    report.print()
    assert capsys.readouterr().out.rstrip("\n") == report.render()


def test_print_through_rich_shows_brackets_as_they_are(report: ActivationReport) -> None:
    report.notes.append("columns left out: [bold]")
    console = Console(file=io.StringIO(), width=120)
    report.print(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "no adapter [yet]" in text
    # A mark for each, since a long note goes on in the next line.
    assert "- columns left out: [bold]" in text
    assert "- trl 9.9 is newer than tested" in text
    assert all(part in text for part in PARTS)


@pytest.mark.parametrize("width", [60, 80])
def test_a_long_word_in_the_table_is_not_cut(width: int) -> None:
    """A file or a pipe is 80 columns to rich, of which these parts leave 22 for the reason."""
    parts = [
        PartReport("packing", "on", backend="best-fit decreasing"),
        PartReport("cuda_graphs", "off", reason="gradient_checkpointing=False: nothing is computed again"),
    ]
    console = Console(file=io.StringIO(), width=width)
    ActivationReport(parts).print(console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    reasons = "".join(line.split("│")[-2].strip() for line in shown.splitlines() if line.startswith("│"))
    assert "…" not in shown and "gradient_checkpointing=False:" in reasons


def test_log_line(report: ActivationReport) -> None:
    report.set(PartReport("qk_rope", "off", reason="probe failed:\n  0.1 > 1e-5"))
    line = report.log_line()
    assert "\n" not in line
    assert line.startswith("chronicals-trl: on: rms_norm (triton x49), head (triton x1), packing; off: gated_mlp (")
    assert "qk_rope (probe failed: 0.1 > 1e-5)" in line
    assert line.endswith("trl 9.9 is newer than tested")


def test_no_error_without_strict_or_insistence(report: ActivationReport) -> None:
    report.raise_for_omissions(ChronicalsConfig())
    report.raise_for_omissions(ChronicalsConfig(head="on", lora="off"))


def test_insisting_on_a_part_that_is_off(report: ActivationReport) -> None:
    with pytest.raises(RuntimeError, match=r'lora is off: no adapter \[yet\] \(set lora="auto"'):
        report.raise_for_omissions(ChronicalsConfig(lora="on"))


def test_strict_counts_omissions_alone(report: ActivationReport) -> None:
    with pytest.raises(RuntimeError) as caught:
        report.raise_for_omissions(ChronicalsConfig(strict=True))
    message = str(caught.value)
    assert LONG_REASON in message
    assert 'set gated_mlp="off"' in message
    assert "strict=True" in message
    # Off without being an omission (nothing to do for it, or switched off) is what strict lets pass.
    assert "lora" not in message
    report.set(PartReport("gated_mlp", "off", reason="switched off"))
    report.raise_for_omissions(ChronicalsConfig(strict=True))


def test_every_problem_is_named_at_once(report: ActivationReport) -> None:
    with pytest.raises(RuntimeError, match=r"gated_mlp is off.*lora is off"):
        report.raise_for_omissions(ChronicalsConfig(strict=True, lora="on"))
