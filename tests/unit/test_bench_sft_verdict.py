"""`bench sft`: a row that is no training is invalid, whoever's it is; planted faults."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from chronicals_trl.bench import report
from chronicals_trl.bench.sft import models as sft_models
from chronicals_trl.bench.sft import verdict as sft_verdict
from chronicals_trl.bench.sft import worker as sft_worker
from chronicals_trl.bench.sft.cases import PROTOCOLS, SHAPES, make_documents
from chronicals_trl.bench.verdict import Judged
from chronicals_trl.observe.flops import datasheet_tflops

GOOD = (8.0, 7.6, 7.3, 7.0, 6.9, 6.8)


def logs(losses: Any = GOOD, norm: Any = 1.0) -> list[dict[str, Any]]:
    return [{"step": 10 * (i + 1), "loss": loss, "grad_norm": norm} for i, loss in enumerate(losses)]


def row(side: str, *of_runs: list[dict[str, Any]], status: str = "ok", **more: Any) -> dict[str, Any]:
    runs = [{"logs": each} for each in of_runs]
    return {"side": side, "status": status, "reason": None, "runs": runs, "tokens_per_step": 16_384, **more}


def status(*rows: dict[str, Any]) -> dict[str, str]:
    sft_verdict.judge_validity(rows)
    return {each["side"]: each["status"] for each in rows}


def test_like_the_reference_is_valid() -> None:
    near = tuple(loss + 0.05 for loss in GOOD)
    assert status(row("chronicals", logs(near)), row("trl-liger", logs())) == {"chronicals": "ok", "trl-liger": "ok"}
    assert sft_verdict.fall(logs()) == pytest.approx(8.0 - 6.9)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (logs(norm=0.0), "grad_norm is 0 at step 10"),
        (logs()[:3] + logs(norm=0.0)[3:], "grad_norm is 0 at step 40"),
        (logs(norm=math.nan), "grad_norm is nan"),
        (logs(norm="nan"), "grad_norm is nan"),  # as the worker's JSON has it
        (logs(norm=math.inf), "grad_norm is inf"),
        (logs(norm=None), "grad_norm is None"),
        (logs((8.0, 7.6, math.nan, 7.0, 6.9, 6.8)), "loss is nan at step 30"),
        (logs((8.0,) * 6), "the loss falls by 0.000, trl-liger's by 1.100"),
        (logs((8.0, 7.9, 7.8, 7.7, 7.6, 7.5)), "the loss falls by 0.400"),
        (logs((8.0, 8.2, 8.4, 8.6, 8.8, 9.0)), "the loss falls by -0.800"),
        (logs((8.0, 6.0, 4.0, 3.0, 2.0, 1.0)), "the loss falls by 6.000"),  # it sees its answers
        (logs(tuple(loss / 8 for loss in GOOD)), "the loss begins at 1.000, trl-liger's at 8.000"),
        ([], "no loss was logged"),
    ],
)
@pytest.mark.parametrize("side", ["chronicals", "unsloth-packing"])
def test_planted_faults(side: str, fault: list[dict[str, Any]], told: str) -> None:
    rows = row(side, fault), row("trl-liger", logs())
    assert status(*rows) == {side: "invalid", "trl-liger": "ok"}
    assert told in rows[0]["reason"]


def test_few_tokens_leave_room_for_chance() -> None:
    slower = logs((8.0, 7.8, 7.6, 7.5, 7.45, 7.4))  # 0.55 where the reference falls by 1.1
    assert status(row("unsloth", slower), row("trl", logs())) == {"unsloth": "invalid", "trl": "ok"}
    # 9 * sqrt(2 * 1.5 / 4000) = 0.25 nats.
    few = row("unsloth", slower, tokens_per_step=400), row("trl", logs(), tokens_per_step=400)
    assert sft_verdict.judge_validity(few)["not_judged"] == [] and few[0]["status"] == "ok"
    flat = row("unsloth", logs((8.0,) * 6), tokens_per_step=400), row("trl", logs(), tokens_per_step=400)
    assert status(*flat) == {"unsloth": "invalid", "trl": "ok"}
    none = row("unsloth", logs((8.0,) * 6), tokens_per_step=40), row("trl", logs(), tokens_per_step=40)
    assert sft_verdict.judge_validity(none)["not_judged"] == ["unsloth"] and none[0]["status"] == "ok"


def test_one_bad_repeat_is_enough() -> None:
    rows = row("unsloth", logs(), logs(norm=0.0)), row("trl", logs())
    assert status(*rows) == {"unsloth": "invalid", "trl": "ok"}


def test_the_reference_is_the_first_that_trains() -> None:
    rows = (
        row("trl-liger", logs(norm=0.0)),
        row("trl-tuned", logs((8.0,) * 6)),
        row("trl", logs()),
        row("unsloth", logs()),
    )
    assert sft_verdict.judge_validity(rows)["reference"] == "trl"
    assert [each["status"] for each in rows] == ["invalid", "invalid", "ok", "ok"]
    failed = row("trl-liger", logs(), status="failed"), row("chronicals", logs())
    assert sft_verdict.judge_validity(failed)["reference"] is None
    assert [each["status"] for each in failed] == ["failed", "ok"]


def test_without_a_reference_the_loss_has_to_fall() -> None:
    assert status(row("chronicals", logs())) == {"chronicals": "ok"}
    flat = row("chronicals", logs((8.0, 8.0, 8.0, 7.95, 7.95, 7.95)))
    assert status(flat) == {"chronicals": "invalid"} and "falls by less than 1%" in flat["reason"]


# -- a real training with a fault -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One side's result, as its process would write it."""
    folder = tmp_path_factory.mktemp("sft")
    sft_models.write_model(SHAPES["tiny"], 0, folder / "model")
    documents = make_documents(PROTOCOLS["packed"], 512, 64, 6000, 10, 0)
    documents.save(str(folder / "documents.npz"))

    def train(side: str, **changes: Any) -> dict[str, Any]:
        task = {
            "side": side, "mode": "full", "shape": "tiny", "protocol": "packed", "checkpointing": "off",
            "model": str(folder / "model"), "documents": str(folder / "documents.npz"), "row_tokens": 64, "rows": 4,
            "packs": True, "warm_up": 4, "steps": 7, "windows": 2, "learning_rate": 1e-3, "seed": 0,
            "chronicals": {}, **changes,
        }  # fmt: skip
        given, found = folder / "task.json", folder / "result.json"
        given.write_text(json.dumps(task))
        assert sft_worker.main(["train", str(given), str(found)]) == 0
        result: dict[str, Any] = json.loads(found.read_text())
        return result

    return train


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_real_trainings_and_one_that_learns_nothing(trained: Any) -> None:
    stock, ours, still = trained("trl"), trained("chronicals"), trained("trl", learning_rate=1e-12)
    for result in (stock, ours, still):
        assert result["status"] == "ok", result["reason"]
        assert [window["steps"] for window in result["windows"]] == [7, 7]
        assert all(len(window["step_ms"]) == 7 and window["seconds"] > 0 for window in result["windows"])
        assert all(0 < window["tokens"] <= window["positions"] <= 7 * 4 * 64 for window in result["windows"])
        assert [log["step"] for log in result["logs"]] == [3, 6, 9, 12, 15, 18]
        assert result["trained_weights"] == {"bfloat16": result["trained_weights"]["bfloat16"]}
        assert result["trained_share"] == 1.0 and result["gradient_checkpointing"] is False
        assert result["seconds_of_first_step"] > 0 and result["versions"]["trl"]
    assert {part["name"]: part["state"] for part in ours["report"]["parts"]}["packing"] == "on"
    assert "report" not in stock
    rows = [
        {"side": side, "status": "ok", "reason": None, "runs": [result], "tokens_per_step": 1_000_000}
        for side, result in (("trl", stock), ("chronicals", ours), ("trl-liger", still))
    ]
    assert sft_verdict.judge_validity(rows)["reference"] == "trl"
    assert [each["status"] for each in rows] == ["ok", "ok", "invalid"]
    assert "the loss falls by" in rows[2]["reason"]


def test_the_bare_loop_and_adapters(trained: Any) -> None:
    pytest.importorskip("peft")
    loop, stock = trained("torch-compile"), trained("trl-tuned")
    adapters = trained("trl", mode="lora", packs=False, checkpointing="default")
    for result in (loop, stock, adapters):
        assert result["status"] == "ok", result["reason"]
        assert len(result["windows"]) == 2 and result["attention"] == "sdpa"
    assert adapters["trained_weights"] == {"float32": SHAPES["tiny"].lora_weights}
    assert (stock["gradient_checkpointing"], adapters["gradient_checkpointing"]) == (False, True)  # as TRL comes
    rows = [
        {"side": side, "status": "ok", "reason": None, "runs": [result], "tokens_per_step": 1_000_000}
        for side, result in (("trl-tuned", stock), ("torch-compile", loop))
    ]
    sft_verdict.judge_validity(rows)
    assert [each["status"] for each in rows] == ["ok", "ok"], rows[1]["reason"]


def test_what_cannot_run_here_says_why(trained: Any) -> None:
    liger = trained("trl-liger")
    assert (liger["status"], liger["reason"]) in (
        ("not installed", "No module named 'liger_kernel'"),
        ("not offered", "Liger and torch's varlen attention need a GPU"),
    )
    broken = trained("trl", model="nowhere")
    assert broken["status"] == "failed" and broken["reason"].startswith("OSError: ") and broken["versions"]["torch"]


# -- targets ----------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> Any:
    class Some:
        shape, mode, protocol, checkpointing = "qwen2.5-0.5b", "lora", "packed", "off"
        row_tokens, tokens_per_step, documents_per_step, master = 2048, 16_384, 2, "bf16"

    for key, value in changes.items():
        setattr(Some, key, value)
    return Some


def test_targets() -> None:
    rows = [
        row("chronicals", tokens_per_second=100.0, peak_memory_gib=10.0),
        row("trl-liger", tokens_per_second=40.0, peak_memory_gib=9.0),
        row("unsloth-packing", status="not installed", tokens_per_second=None, peak_memory_gib=None),
    ]
    by_target = {each.target: each for each in sft_verdict.judge(settings(), rows)}
    assert by_target["2.4x trl-liger"].outcome == "met"
    assert by_target["2.4x trl-liger"].figures == {"trl-liger": 2.5}
    assert by_target["7x unsloth-packing"].outcome == "not measured"
    assert by_target["peak memory: no more than trl-liger"].outcome == "missed"
    as_they_come = sft_verdict.judge(settings(checkpointing="default"), rows)
    assert not any("memory" in each.target for each in as_they_come), "not at equal checkpointing"
    rows[1]["status"] = "invalid"
    assert {each.outcome for each in sft_verdict.judge(settings(), rows)} == {"not measured"}
    rows[0]["status"] = "invalid"
    assert {each.outcome for each in sft_verdict.judge(settings(), rows)} == {"missed"}
    mfu = {"tokens_per_second": 1.0, "peak_memory_gib": 1.0, "mfu": 0.55}
    (first, *_) = sft_verdict.judge(settings(shape="qwen2.5-1.5b", mode="full"), [row("chronicals", **mfu)])
    assert (first.target, first.outcome, first.figures) == ("MFU 52%", "met", {"chronicals": 0.55})
    on, off = (
        [each.target for each in sft_verdict.judge(settings(shape="qwen2.5-7b", checkpointing=which), rows)]
        for which in ("on", "off")
    )
    peers = ("trl-liger", "trl-cce", "unsloth-packing")  # any may be the best
    assert on[:3] == [f"1.2x {peer} at its memory" for peer in peers]
    assert off[:3] == [f"1.7x {peer}" for peer in peers]
    assert not {f"1.2x {peer}" for peer in peers} & {*on, *off}, "said once"
    largest = sft_verdict.judge(settings(shape="llama-3.1-8b", mode="full"), rows)
    assert [each.target for each in largest[:3]] == [f"1.1x {peer}" for peer in peers]


@pytest.mark.parametrize(
    ("run", "other"),
    [
        ({"row_tokens": 4096}, "row_tokens 4096, not 2048"),
        ({"tokens_per_step": 2048}, "tokens_per_step 2048, not 16384"),
        ({"master": "fp32"}, "master fp32, not bf16"),
        ({"shape": "qwen2.5-7b", "tokens_per_step": 8192}, "row_tokens 2048, not 4096"),
        ({"protocol": "short", "row_tokens": 512, "documents_per_step": 8}, "documents_per_step 8, not 2"),
        ({"protocol": "short", "mode": "full", "row_tokens": 512}, "documents_per_step 2, not 16"),
    ],
)
def test_targets_of_another_run(run: dict[str, Any], other: str) -> None:
    """At other settings the figures say nothing of them, not even where ours has failed."""
    for status in ("ok", "failed"):
        rows = [
            row("chronicals", status=status, tokens_per_second=100.0, peak_memory_gib=10.0, over_floor=1.0),
            *(row(side, tokens_per_second=1.0, peak_memory_gib=10.0) for side in ("trl-liger", "unsloth")),
        ]
        *judged, memory = sft_verdict.judge(settings(**run), rows)
        assert judged and {each.outcome for each in judged} == {"not measured"}
        assert all(each.missing == {"this run": other} for each in judged)
        assert memory.outcome == ("met" if status == "ok" else "missed")


SEVEN = {"shape": "qwen2.5-7b", "checkpointing": "on", "row_tokens": 4096, "tokens_per_step": 8192}


def at_memory(**sides: tuple[float, float]) -> Judged:
    """The line for Unsloth, of sides with these tokens a second and GiB."""
    names = {"whole": "chronicals", "halves": "chronicals-accumulation", "offload": "chronicals-offload"}
    rows = [
        row(names.get(side, "unsloth-packing"), tokens_per_second=rate, peak_memory_gib=gib)
        for side, (rate, gib) in sides.items()
    ]
    return judged_at_memory(rows)


def judged_at_memory(rows: list[dict[str, Any]], **run: Any) -> Judged:
    found = sft_verdict.judge(settings(**{**SEVEN, **run}), rows)
    (line,) = [each for each in found if each.target == "1.2x unsloth-packing at its memory"]
    return line


def test_the_fastest_of_ours_that_takes_no_more_than_the_peer() -> None:
    peer = (100.0, 17.3)
    # The fastest takes too much; of the others, both of which fit, the faster one counts.
    line = at_memory(whole=(170.0, 18.7), halves=(150.0, 17.2), offload=(140.0, 16.0), peer=peer)
    assert (line.outcome, line.figures, line.missing) == ("met", {"chronicals-accumulation": 1.5}, {})
    line = at_memory(whole=(170.0, 18.7), halves=(150.0, 17.31), offload=(140.0, 16.0), peer=peer)
    assert (line.outcome, line.figures) == ("met", {"chronicals-offload": 1.4})
    line = at_memory(whole=(170.0, 17.3), halves=(150.0, 15.0), peer=peer)  # as much is no more
    assert (line.outcome, line.figures) == ("met", {"chronicals": 1.7})
    line = at_memory(whole=(170.0, 18.7), halves=(119.0, 17.2), peer=peer)
    assert (line.outcome, line.figures, line.at_least) == ("missed", {"chronicals-accumulation": 1.19}, 1.2)
    # Only those that the run has are asked for.
    assert at_memory(whole=(120.0, 17.0), peer=peer).figures == {"chronicals": 1.2}
    assert at_memory(halves=(130.0, 17.0), peer=peer).figures == {"chronicals-accumulation": 1.3}


def test_none_of_ours_fits() -> None:
    line = at_memory(whole=(170.0, 18.7), halves=(150.0, 17.66), offload=(140.0, 18.0), peer=(100.0, 17.3))
    assert (line.outcome, line.figures) == ("missed", {})
    assert line.missing == {"chronicals-accumulation": "17.66 GiB, unsloth-packing 17.30"}
    ((_, outcome, told),) = report.verdict_lines([asdict(line)])
    assert (outcome, told) == ("missed", "chronicals-accumulation: 17.66 GiB, unsloth-packing 17.30")


def test_a_side_without_a_figure_leaves_it_open() -> None:
    fits = {"tokens_per_second": 150.0, "peak_memory_gib": 17.0}
    none = {"tokens_per_second": None, "peak_memory_gib": None}
    peer = row("unsloth-packing", tokens_per_second=100.0, peak_memory_gib=17.3)
    for rows, missing in (
        ([row("chronicals", **fits)], {"unsloth-packing": "not in this run"}),
        ([row("chronicals", **fits), row("unsloth-packing", status="invalid", **fits)],
         {"unsloth-packing": "invalid (None)"}),
        ([peer], {"chronicals": "not in this run"}),
        ([row("chronicals", **fits), row("chronicals-accumulation", status="not run", **none), peer],
         {"chronicals-accumulation": "not run (None)"}),
        ([row("chronicals", **fits), row("chronicals-offload", status="invalid", **fits), peer],
         {"chronicals-offload": "invalid (None)"}),
        ([row("chronicals", **{**fits, "peak_memory_gib": None}), peer], {"chronicals": "ok (None)"}),
    ):  # fmt: skip
        line = judged_at_memory(rows)
        assert (line.outcome, line.figures, line.missing) == ("not measured", {}, missing)
    # The script as it is has failed: a miss, as for every target.
    for rows in (
        [row("chronicals", status="failed", **none), peer],
        [row("chronicals", status="invalid", **fits), peer],
    ):
        assert judged_at_memory(rows).outcome == "missed"
    line = judged_at_memory([row("chronicals", **fits), peer], tokens_per_step=16_384)
    assert (line.outcome, line.missing) == ("not measured", {"this run": "tokens_per_step 16384, not 8192"})


def test_the_first_step_is_soon() -> None:
    def judged(*seconds: float) -> list[tuple[str, dict[str, float], str]]:
        ours = row("chronicals", *[logs()] * len(seconds), tokens_per_second=1.0, peak_memory_gib=1.0)
        for run, each in zip(ours["runs"], seconds, strict=True):
            run |= {"seconds_before_first_step": 10.0, "seconds_of_first_step": each}
        found = sft_verdict.judge(settings(), [ours])
        return [(each.target, each.figures, each.outcome) for each in found if each.target.startswith("first")]

    target = "first step: at most 60 s after the start"
    assert judged(20.0, 50.0) == [(target, {"chronicals": 60.0}, "met")]  # the slowest of the processes
    assert judged(51.0, 1.0) == [(target, {"chronicals": 61.0}, "missed")]
    assert judged() == []


def test_targets_of_the_papers_protocol() -> None:
    short = {"protocol": "short", "row_tokens": 512}
    full, lora = (
        sft_verdict.judge(settings(**short, mode=mode, documents_per_step=count), [])[0].target
        for mode, count in (("full", 16), ("lora", 2))
    )
    assert (full, lora) == ("3.51x unsloth", "4.1x unsloth")


def test_a_step_is_held_to_its_floor() -> None:
    def judged(over: float | None, **run: Any) -> list[tuple[str, str]]:
        ours = row("chronicals", tokens_per_second=1.0, peak_memory_gib=1.0, mfu=0.5, over_floor=over)
        found = sft_verdict.judge(settings(**run), [ours])
        return [(each.target, each.outcome) for each in found if each.target.startswith("step")]

    full = {"mode": "full"}
    assert judged(1.09, **full) == [("step: at most 1.10 of its floor", "met")]
    assert judged(1.11, **full) == [("step: at most 1.10 of its floor", "missed")]
    seven = {"shape": "qwen2.5-7b", "row_tokens": 4096, "tokens_per_step": 8192}
    assert judged(1.12, **seven) == [("step: at most 1.15 of its floor", "met")]
    assert judged(None, **full) == judged(1.0) == []  # not measured in this run; no target


def test_datasheet() -> None:
    rates = {
        name: datasheet_tflops(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H100 PCIe", "Foo")
    }
    assert rates == {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0, "NVIDIA H100 PCIe": 756.0, "Foo": None}
    assert datasheet_tflops(None) is None
    assert datasheet_tflops("NVIDIA L40") == 181.0 and datasheet_tflops("NVIDIA L4") == 121.0
    assert datasheet_tflops("NVIDIA H20") == 148.0 and datasheet_tflops("NVIDIA H200 NVL") == 835.0
    assert datasheet_tflops("NVIDIA GH200 480GB") == 989.0 and datasheet_tflops("NVIDIA GB200") is None
    assert datasheet_tflops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None  # a seventh of it


def test_a_loss_that_is_no_number_is_written_as_a_word() -> None:
    found = sft_worker._strict({"logs": [{"loss": math.nan, "grad_norm": -math.inf}, 1.5, (2, None, "x")]})
    assert found == {"logs": [{"loss": "nan", "grad_norm": "-inf"}, 1.5, [2, None, "x"]]}
