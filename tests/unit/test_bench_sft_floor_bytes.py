"""`bench sft --floor`: its bytes against a count by hand, its batch, and what its figures are made of."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chronicals_trl.bench.sft import floor
from chronicals_trl.bench.sft import models as sft_models
from chronicals_trl.bench.sft.cases import PROTOCOLS, SHAPES, Documents, Shape, Task, make_documents
from chronicals_trl.bench.sft.floor_batch import Batch, make_batch
from chronicals_trl.bench.sft.floor_bytes import Traffic
from chronicals_trl.bench.sft.floor_ops import ATTENTION, ELEMENTWISE, GEMM, OPTIMIZER, Mover, moved, run
from chronicals_trl.bench.sft.floor_step import Step, make_step

TINY = SHAPES["tiny"]
UNTIED = Shape("untied", "llama", 64, 96, 3, 4, 2, 512, False)


def by_name(shape: Shape, mode: str, master: str = "bf16", recompute: bool = False) -> dict[str, float]:
    made = Step(shape, mode, master, 160, 160**2, recompute, None, torch.device("meta"))
    ops = floor.tables(make_step(made))["ops"]
    return {name: entry["bytes"] for name, entry in ops.items() if entry["bytes"]}


def test_bytes_of_full_training_by_hand() -> None:
    """Tiny: H 64, I 96, two layers, A 64, K 32, V 512, tied; N 160. So NH is 10,240."""
    assert by_name(TINY, "full") == {
        "embedding": 40_960,  # 10,240 x (2 + 2)
        "first norm": 40_960,
        "norm": 4 * 81_920,  # two in the layers' middle, one between them, the last: 10,240 x 8
        "rope": 2 * 61_440,  # 160 x 96 x 2 x 2
        "activation": 2 * 92_160,  # 160 x 96 x 3 x 2
        "cross-entropy": 327_680,  # 160 x 512 x 2 x 2
        "head's sum": 196_608,  # 512 x 64 x 6
        "last norm, backward": 61_440,  # 10,240 x 6
        "activation, backward": 2 * 153_600,  # 160 x 96 x 5 x 2
        "norm, backward": 3 * 81_920,
        "rope, backward": 2 * 61_440,
        "biases": 2 * 40_960,  # 160 x 128 x 2
        "first norm, backward": 81_920,
        "embedding, backward": 61_440,  # 10,240 x 6
        # 2 x (64 x 64 x 2 + 64 x 32 x 2 + 3 x 64 x 96) + 512 x 64 + 5 x 64 + 2 x 128 = 94,784 weights
        "gradient norm": 189_568,
        "AdamW": 1_326_976,
    }


def test_bytes_of_masters_by_hand() -> None:
    found = by_name(TINY, "full", "fp32")
    assert found["norm"] == 4 * 122_880  # 10,240 x (2 x 2 + 2 x 4)
    assert found["norm, backward"] == 3 * 163_840  # 10,240 x (2 + 3 x 4 + 2)
    assert found["first norm, backward"] == 143_360 and found["last norm, backward"] == 122_880
    assert found["first norm"] == 61_440  # 10,240 x (4 + 2)
    assert found["embedding"] == 81_920 and found["embedding, backward"] == 122_880
    assert found["casts of weights"] == 6 * (61_440 + 32_768) and found["casts of gradients"] == 6 * 61_440
    assert found["AdamW"] == 2 * 1_326_976 and "head's sum" not in found
    assert found["activation"] == 2 * 92_160  # in bf16 all the same


def test_bytes_of_adapters_by_hand() -> None:
    full, found = by_name(TINY, "full"), by_name(TINY, "lora")
    # 2 x 32 x (64 + 64 + 2 (64 + 32) + 64 + 64 + 3 (64 + 96)) = 59,392 weights
    assert TINY.lora_weights == 59_392
    assert found["casts of weights"] == found["casts of gradients"] == 6 * 59_392
    assert (found["gradient norm"], found["AdamW"]) == (4 * 59_392, 28 * 59_392)
    assert found["adapters in the activation"] == 4 * 30_720  # two layers, both ways: 160 x 32 x 3 x 2
    # Nothing in front of the first layer is trained, nor any bias, nor the head.
    assert set(full) - set(found) == {"first norm, backward", "biases", "embedding, backward", "head's sum"}
    for name in ("norm", "rope", "activation", "cross-entropy", "norm, backward"):
        assert found[name] == full[name]
    # With fp32 weights the frozen ones are cast for the products too, and have no gradients.
    wide = by_name(TINY, "lora", "fp32")
    assert wide["casts of weights"] == 6 * (59_392 + 61_440 + 32_768)
    assert wide["casts of gradients"] == found["casts of gradients"]


def test_bytes_of_four_bit_weights_and_of_an_untied_head() -> None:
    layers = by_name(TINY, "qlora")["weights from 4 bits"]
    assert layers == 2 * TINY.linear_weights * (2.5 + 1 / 64)  # for the forward pass and for the backward pass
    again = by_name(TINY, "qlora", recompute=True)["weights from 4 bits"]
    assert again == layers + (TINY.linear_weights - 2 * 64 * 96) * (2.5 + 1 / 64)  # all but down's
    untied = by_name(UNTIED, "full")
    assert untied["embedding, backward"] == 20_480 + 65_536 and "biases" not in untied


@pytest.mark.parametrize("shape", [TINY, UNTIED], ids=lambda shape: shape.name)
def test_trained_weights_are_those_of_the_model(shape: Shape) -> None:
    expected = sum(p.numel() for p in sft_models.make_model(shape, 0).parameters())
    assert Traffic(shape, "full", "bf16", 1).trained == expected


def test_a_mover_moves_as_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    moved_bytes: list[int] = []
    plain = torch.neg

    def neg(x: Tensor, out: Tensor) -> Tensor:
        assert x.data_ptr() != out.data_ptr()
        assert x.storage_offset() % 256 == 0  # else it is copied one element at a time
        moved_bytes.append(x.nbytes + out.nbytes)
        return plain(x, out=out)

    monkeypatch.setattr(torch, "neg", neg)
    mover = Mover(torch.device("cpu"))
    for count in (4, 1000, 400_000, 3 * 2**20):
        moved_bytes.clear()
        mover(count)
        assert sum(moved_bytes) == count
    moved_bytes.clear()
    run([*moved("one", 1000), *moved("none", 0), *moved("two", 600, OPTIMIZER)], mover)
    assert moved_bytes == [1000, 600]
    run(moved("one", 1000))
    assert moved_bytes == [1000, 600]  # without a mover nothing is moved


# -- the batch --------------------------------------------------------------------------------------------------------


def task(folder: Path, documents: Documents, **changes: Any) -> Task:
    documents.save(str(folder / "documents.npz"))
    given: dict[str, Any] = {
        "side": "chronicals", "mode": "full", "shape": "tiny", "protocol": "packed", "checkpointing": "off",
        "model": "", "documents": str(folder / "documents.npz"), "row_tokens": 256, "rows": 4, "packs": True,
        "warm_up": 1, "steps": 1, "windows": 1, "learning_rate": 1e-4, "seed": 0, "chronicals": {}, **changes,
    }  # fmt: skip
    return Task(**given)


def test_a_packed_batch(tmp_path: Path) -> None:
    documents = make_documents(replace(PROTOCOLS["packed"], median=40.0), 512, 256, 60_000, 10, 0)
    made = make_batch(task(tmp_path, documents))
    assert made.tokens == 1024 and made.cu_seqlens[0] == 0 and made.cu_seqlens[-1] == 1024
    assert 0.97 * 1024 < made.real_tokens <= 1024 and made.max_seqlen == 256
    spans = np.diff(made.cu_seqlens)
    assert len(made.cu_seqlens) % 32 == 0 and (spans[-2:] == 0).all()
    assert {256 * row for row in range(5)} <= set(made.cu_seqlens)  # no document across rows
    # The attention of a step is that of the mean one, not of the rows that the planner fills first.
    lengths = documents.lengths
    assert made.squares == pytest.approx((lengths**2).sum() / lengths.sum() * 1024, rel=0.2)


FOUR = Documents(np.zeros(100, np.int32), np.array([0, 10, 30, 60, 100]))


def test_a_padded_batch(tmp_path: Path) -> None:
    made = make_batch(task(tmp_path, FOUR, packs=False, chronicals={"padding_free": "off"}))
    assert made == Batch(160, 100, 3000, made.cu_seqlens, 40)
    assert {0, 40, 80, 120, 160} <= set(made.cu_seqlens)
    assert sorted(b - a for a, b in pairwise(made.cu_seqlens)) == [10, 10, 20, 20, 30, 30, 40]


@pytest.mark.parametrize("config", [{}, {"padding_free": "on"}])
def test_a_batch_without_padding(tmp_path: Path, config: dict[str, Any]) -> None:
    made = make_batch(task(tmp_path, FOUR, packs=False, chronicals=config))
    assert made == Batch(100, 100, 3000, made.cu_seqlens, 40)
    assert sorted(b - a for a, b in pairwise(made.cu_seqlens)) == [10, 20, 30, 40]


# -- the figures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("whole", "expected"), [(7.0, 7.0), (1e9, None)])
def test_the_floor_is_the_lower_of_sum_and_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: float, expected: float | None
) -> None:
    took = iter([5.0, 8.0, whole])  # products, with attention, with copies
    ran: list[tuple[set[str], bool]] = []

    def record(ops: Any, mover: Mover | None = None) -> None:
        ran.append(({op.kind for op in ops}, mover is not None))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(floor, "run", record)
    monkeypatch.setattr(floor, "_median_ms", lambda call, device: (call(), next(took))[1])
    monkeypatch.setattr(floor.timing, "copy_bandwidth", lambda device, repeats: (2.0, None))
    documents = make_documents(PROTOCOLS["packed"], 512, 256, 6000, 10, 0)
    found = floor.measure(task(tmp_path, documents))
    every = {GEMM, ATTENTION, ELEMENTWISE, OPTIMIZER}
    assert ran == [({GEMM}, False), (every, False), (every, True)]
    moved_ms = {kind: found["bytes"][kind] / 2e6 for kind in (ELEMENTWISE, OPTIMIZER)}  # 2 GB/s
    assert found["parts_ms"] == {GEMM: 5.0, ATTENTION: 3.0, **moved_ms}
    assert found["sum_ms"] == pytest.approx(8.0 + sum(moved_ms.values()))
    assert found["floor_ms"] == (expected or found["sum_ms"])
    assert found["gemm_tflops"] == pytest.approx(found["flops"][GEMM] / 5e9)
    assert (found["tokens"], found["attention"], found["rows"], found["packs"]) == (1024, "blockwise", 4, True)


def test_a_dry_run_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    documents = make_documents(PROTOCOLS["short"], 512, 64, 6000, 10, 0)
    given = task(tmp_path, documents, mode="lora", row_tokens=64, rows=2, packs=False, checkpointing="on")
    found = floor.measure(given)
    assert 0 < found["floor_ms"] <= found["sum_ms"] and found["method"] == "cpu dry run"


def test_checkpointing_of_our_side(tmp_path: Path) -> None:
    documents = make_documents(PROTOCOLS["packed"], 512, 256, 6000, 10, 0)
    words = ("on", "off", "default")
    wanted = {word: floor.recomputes(task(tmp_path, documents, checkpointing=word)) for word in words}
    assert wanted == {"on": True, "off": False, "default": False}  # no more than memory needs: at the least none
    kept = {"checkpointing": "default", "chronicals": {"recompute": "off"}}
    assert floor.recomputes(task(tmp_path, documents, **kept)), "TRL's own default"
