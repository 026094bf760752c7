"""Health checks on a GPU: after the first step they wait for nothing, and what they cost."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from waits import refused

from chronicals_trl.observe.health.monitor import HealthMonitor
from chronicals_trl.observe.health.series import LogChecks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_wait_for_nothing(dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).to(device, dtype)
    model.append(nn.Linear(4, 4, device=device, dtype=dtype))  # in no pass: to be found missing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    monitor = HealthMonitor(
        model, optimizer.param_groups, device=device, reduce=lambda flags: flags, series=LogChecks(flat_at=None)
    )
    torch.manual_seed(0)
    x = torch.randn(64, 1024, device=device, dtype=dtype)
    times = []
    for step in range(120):
        optimizer.zero_grad()
        model[:-1](x).square().sum().backward()
        if step == 0:
            assert monitor.step(torch.tensor(5, device=device)) == []
        else:
            with refused():
                start = time.perf_counter()
                assert monitor.step(torch.tensor(5), skipped=False) == []
                times.append(time.perf_counter() - start)
        optimizer.step()
    print(f"host time of a look: {1e3 * max(times):.2f} ms at most, {1e3 * sum(times) / len(times):.3f} ms on average")
    assert [finding.check for finding in monitor.log({"loss": 1.0})] == ["missing_gradients"]
