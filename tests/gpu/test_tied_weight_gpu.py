"""The lookup in a tied weight on a GPU: its kernel, what it takes and spares, and a trainer with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import torch
import waits
from kernels import embedding_checks as check
from torch import Tensor
from training_runs import logged, run

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.kernels import LAUNCHES
from chronicals_trl.kernels._embedding_rows import add_embedding_rows
from chronicals_trl.model import tied_weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# Qwen2.5-0.5B's weight; tokens of a step of six rows of 512, and of eight of 2,048.
VOCABULARY, WIDTH, TOKENS = 151_936, 896, (3072, 16_384)
LARGE = ((8, 2048), VOCABULARY, WIDTH)


@pytest.fixture(autouse=True)
def launched():
    LAUNCHES.clear()
    yield
    assert LAUNCHES["add_embedding_rows"] > 0


@dtypes
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [*check.SHAPES, LARGE], ids=str)
def test_rows(dtype: torch.dtype, padding_idx: int | None, shape: Any) -> None:
    check.check_rows(check.make("cuda", dtype, *shape), padding_idx)


def test_ids_in_int32_and_gradients_laid_out_otherwise() -> None:
    case = check.make("cuda", torch.bfloat16, (6, 50), 7, 20)
    check.check_rows(case, ids=case.ids.int())
    check.check_rows(case, grad=case.grad.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    wide = torch.zeros(6, 50, 33, device="cuda", dtype=torch.bfloat16)
    wide[..., 5:25] = case.grad
    check.check_rows(case, grad=wide[..., 5:25])  # off the allocator's alignment


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_rounding(dtype: torch.dtype) -> None:
    check.check_one_rounding("cuda", dtype)


@dtypes
def test_deterministic(dtype: torch.dtype) -> None:
    check.check_deterministic("cuda", dtype, *LARGE)


@dtypes
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradient(dtype: torch.dtype, padding_idx: int | None) -> None:
    check.check_gradient("cuda", dtype, padding_idx, vocabulary=331, width=136)


def test_rows_beyond_the_reach_of_32_bits() -> None:
    vocabulary, width = 2**18 + 9, 8192
    total = torch.zeros(vocabulary, width, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([vocabulary - 1, 2**18 - 1, 3, vocabulary - 1], device="cuda")
    grad = torch.arange(1, 5, device="cuda", dtype=torch.bfloat16)[:, None].expand(4, width)
    add_embedding_rows(total, grad, ids)
    assert total[[vocabulary - 1, 2**18 - 1, 3]].amax(1).tolist() == [5.0, 2.0, 3.0]
    assert total.sum(dtype=torch.float32).item() == 10.0 * width


def test_it_waits_for_nothing() -> None:
    weight, ids = check.weight_and_ids("cuda", torch.bfloat16, vocabulary=331, width=136)

    def step() -> None:
        weight.grad = None
        check.losses(weight, ids, tied=True)[2].backward()

    step()
    with waits.refused():
        step()


# -- what it takes ---------------------------------------------------------------------------------------------------


def zipf(tokens: int) -> Tensor:
    """Ids as common as words are, spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    common = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    drawn = torch.multinomial(common, tokens, replacement=True, generator=generator)
    return torch.randperm(VOCABULARY, generator=generator)[drawn]


def half_of_them_one(tokens: int) -> Tensor:
    ids = zipf(tokens)
    ids[::2] = 7
    return ids


def milliseconds(function: Callable[[], Any], repeats: int = 20) -> float:
    """The GPU's, the median; between two the L2 cache is filled with something else."""
    other = torch.empty(2**27, device="cuda", dtype=torch.int8)
    times = []
    for _ in range(repeats + 3):
        other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[repeats // 2]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("draw", [zipf, half_of_them_one])
def test_time(tokens: int, draw: Callable[[int], Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not judged: beside torch's way, of which both passes over the whole vocabulary are a part."""
    ids = draw(tokens).cuda()
    total = torch.zeros(VOCABULARY, WIDTH, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(tokens, WIDTH, device="cuda").to(torch.bfloat16) * 1e-3

    def torchs() -> None:
        total.add_(torch.ops.aten.embedding_dense_backward(grad, ids, VOCABULARY, -1, False))

    ours, theirs = milliseconds(lambda: add_embedding_rows(total, grad, ids)), milliseconds(torchs)
    sort = milliseconds(lambda: torch.sort(ids, stable=True))
    with capsys.disabled():
        print(
            f"\n{draw.__name__}, {tokens:,} tokens, {len(ids.unique()):,} distinct, ({VOCABULARY:,}, {WIDTH}) bf16: "
            f"rows {ours:.3f} ms, the sort of them {sort:.3f}; torch {theirs:.3f} ms"
        )


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """A backward pass has no second gradient of the weight's size."""
    ids = zipf(TOKENS[0]).cuda()[None]
    peaks = {}
    for tied in (True, False):
        weight = (torch.randn(VOCABULARY, WIDTH, device="cuda") * 0.02).to(torch.bfloat16).requires_grad_()
        loss = check.losses(weight, ids, tied=tied)[2]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        peaks[tied] = torch.cuda.max_memory_allocated() - before
        del weight, loss
    size = 2 * VOCABULARY * WIDTH
    with capsys.disabled():
        print(f"\nthe backward pass's own peak: {peaks[True] / 2**20:.0f} MiB, torch {peaks[False] / 2**20:.0f} MiB")
    assert peaks[True] < 0.2 * size < 0.95 * size < peaks[False]


# -- whole steps -----------------------------------------------------------------------------------------------------


def test_in_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside CUDA graphs and the fused optimizer, with accumulation: what torch's own lookup gives."""

    def trained(name: str) -> Any:
        options = {
            "use_chronicals": True, "packing": True, "max_length": 256, "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2, "max_steps": 8, "learning_rate": 1e-3, "use_cpu": False, "bf16": True,
            "chronicals_config": {"cuda_graphs": "on"},
        }  # fmt: skip
        return run(SFTTrainer, SFTConfig, tmp_path / name, family="qwen2", data=tiny_data.text(200), options=options)

    ours, gradients = trained("ours")
    added = LAUNCHES["add_embedding_rows"]
    monkeypatch.setattr(tied_weight, "obstacle", lambda *args: "not today")
    theirs, reference = trained("torch's")
    assert ours.chronicals_report["head"].reason == tied_weight.TOGETHER
    assert added >= 16 and LAUNCHES["add_embedding_rows"] == added
    for trainer in (ours, theirs):
        (note,) = (n for n in trainer.chronicals_report.notes if n.startswith("CUDA graphs"))
        assert not note.startswith("CUDA graphs: 0 "), trainer.chronicals_report.render()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=2e-3)
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=2e-2)
    for name, gradient in reference.items():
        assert (gradients[name] - gradient).norm() < 1e-2 * gradient.norm(), name
