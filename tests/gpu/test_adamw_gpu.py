"""AdamW's kernel on a GPU: torch's own update to the bit, and in the trainer the weights that torch's give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import adamw_checks as check
from training_runs import logged, run

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.kernels import LAUNCHES
from chronicals_trl.kernels._adamw import AdamWUpdate
from chronicals_trl.optim.adamw import take_over

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LARGE = [(896, 4864), (32, 896), (7,), (151_936, 8), (1_000_003,)]


@pytest.fixture(autouse=True)
def launched():
    LAUNCHES.clear()
    yield
    assert LAUNCHES["adamw"] > 0


@dtypes
@pytest.mark.parametrize("clip", [None, 0.25])
@pytest.mark.parametrize("shapes", [check.SHAPES, LARGE], ids=["small", "large"])
def test_it_is_torchs_update(dtype: torch.dtype, clip: float | None, shapes: Any) -> None:
    check.check_update("cuda", dtype, clip, shapes=shapes)


def test_tensors_off_the_allocators_alignment() -> None:
    check.check_update("cuda", torch.bfloat16, shapes=[(20_050,), (33,)], offset=1)


def test_a_first_update_is_of_the_rates_size() -> None:
    check.check_first_update("cuda")


def test_the_same_sizes_in_other_dtypes_and_places() -> None:
    kinds = [(torch.bfloat16, 0), (torch.bfloat16, 1), (torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 0)]
    check.check_one_after_another(AdamWUpdate(), "cuda", kinds)


@dtypes
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_torchs_to_the_bit(dtype: torch.dtype, decay: float) -> None:
    """Ten steps, clipped by the norm, with a rate that changes; both moments, and all but few of the weights.

    Each step begins with torch's weights: one that was rounded otherwise may cross zero later, where no share of its
    size bounds the difference any more.
    """
    lists = check.make("cuda", dtype, LARGE)
    start = [torch.nn.Parameter(p.clone()) for p in lists.params]
    both = [copy.deepcopy(start), copy.deepcopy(start)]
    optimizers = [torch.optim.AdamW(params, lr=1e-3, weight_decay=decay, fused=True) for params in both]
    mine = take_over(optimizers[1])
    differing = total = 0
    for step in range(10):
        generator = torch.Generator("cuda").manual_seed(step)
        grads = [torch.randn(p.shape, device="cuda", generator=generator).to(dtype) for p in start]
        for params, optimizer in zip(both, optimizers, strict=True):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            if optimizer is mine:
                mine.clip((1000.0 / (norm + 1e-6)).clamp(max=1.0))
            else:
                torch.nn.utils.clip_grads_with_norm_(params, 1000.0, norm)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + step)
            optimizer.step()
        for a, b in zip(*both, strict=True):
            states = optimizers[0].state[a], optimizers[1].state[b]
            for name in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(states[0][name], states[1][name]), name
            differing, total = differing + (a != b).sum().item(), total + a.numel()
            # One rounding of the weight, and in float32 that of the decay before it. The bias corrections are made in
            # float64, torch's in float32: 1e-6 of updates that are 1e-3.
            info, roundings = torch.finfo(dtype), 2 if dtype == torch.float32 else 1
            torch.testing.assert_close(a, b, rtol=roundings * info.eps, atol=1e-8 + info.tiny * info.eps)
            b.data.copy_(a)
    assert differing < 1e-3 * total or dtype == torch.float32


def test_it_waits_for_nothing() -> None:
    import waits

    params = [torch.nn.Parameter(p) for p in check.make("cuda", torch.bfloat16).params]
    optimizer = take_over(torch.optim.AdamW(params, fused=True))
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    with waits.refused():
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


def test_in_the_trainer(tmp_path: Path) -> None:
    def trained(setting: str) -> Any:
        options = {
            "use_chronicals": True, "packing": True, "max_steps": 8, "use_cpu": False, "bf16": True,
            "max_grad_norm": 0.05, "chronicals_config": {"adamw": setting},
        }  # fmt: skip
        return run(SFTTrainer, SFTConfig, tmp_path / setting, options=options)[0]

    ours, theirs = trained("auto"), trained("off")
    assert ours.chronicals_report["adamw"].state == "on"
    torch.testing.assert_close(logged(ours, "loss"), logged(theirs, "loss"), rtol=1e-3, atol=0)
    torch.testing.assert_close(logged(ours, "grad_norm"), logged(theirs, "grad_norm"), rtol=1e-2, atol=0)
