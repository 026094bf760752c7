"""The meter with a clock of its own, and that counting reads nothing back from the device."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from chronicals_trl.observe import ThroughputMeter
from chronicals_trl.observe.flops import TrainingFlops


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> ThroughputMeter:
    return ThroughputMeter("cpu", clock=clock)


def test_rate_and_fill_of_an_interval(meter: ThroughputMeter, clock: Clock) -> None:
    for tokens in (300, torch.tensor(500), torch.tensor([200], dtype=torch.int32)):
        clock.now += 1.0
        meter.update(tokens, 400)
    clock.now += 1.0
    figures = meter.read()
    assert figures["tokens_per_second"] == 1000 / 4
    assert figures["packing_fill"] == 1000 / 1200

    # A new interval: nothing of the first is left in it.
    clock.now += 2.0
    meter.update(100, 100)
    figures = meter.read()
    assert figures["tokens_per_second"] == 50 and figures["packing_fill"] == 1.0


def test_excluded_time_does_not_count(meter: ThroughputMeter, clock: Clock) -> None:
    meter.update(100, 100)
    clock.now += 1.0
    with meter.excluding():
        clock.now += 50.0
        with meter.excluding():
            clock.now += 50.0
        clock.now += 50.0
    clock.now += 1.0
    meter.pause()
    clock.now += 7.0
    meter.resume()
    assert meter.read()["tokens_per_second"] == 50


def test_excluding_ends_with_an_error(meter: ThroughputMeter, clock: Clock) -> None:
    with pytest.raises(KeyError), meter.excluding():
        clock.now += 5.0
        raise KeyError
    meter.update(10, 10)
    clock.now += 1.0
    assert meter.read()["tokens_per_second"] == 10


def test_reading_while_paused(meter: ThroughputMeter, clock: Clock) -> None:
    meter.update(100, 100)
    clock.now += 2.0
    with meter.excluding():
        clock.now += 9.0
        assert meter.read()["tokens_per_second"] == 50
        clock.now += 9.0
    meter.update(30, 30)
    clock.now += 3.0
    assert meter.read()["tokens_per_second"] == 10


def test_resume_without_pause(meter: ThroughputMeter) -> None:
    with pytest.raises(RuntimeError, match="without a pause"):
        meter.resume()


def test_reading_nothing_keeps_the_interval(meter: ThroughputMeter, clock: Clock) -> None:
    clock.now += 1.0
    assert meter.read() == {}
    meter.update(100, 100)
    clock.now += 1.0
    assert meter.read()["tokens_per_second"] == 50


def test_no_time_no_rate(meter: ThroughputMeter) -> None:
    meter.update(1, 2)
    figures = meter.read()
    assert "tokens_per_second" not in figures and figures["packing_fill"] == 0.5


def test_reset_forgets(meter: ThroughputMeter, clock: Clock) -> None:
    meter.update(1000, 1000)
    meter.update(torch.tensor(1000), 1000)
    clock.now += 5.0
    meter.reset()
    meter.update(10, 20)
    clock.now += 1.0
    figures = meter.read()
    assert figures["tokens_per_second"] == 10 and figures["packing_fill"] == 0.5


def test_update_reads_nothing_and_keeps_the_callers_tensor(meter: ThroughputMeter, clock: Clock) -> None:
    # A tensor without storage: any read-back raises.
    meter.update(torch.zeros((), dtype=torch.int64, device="meta"), 8)
    meter.update(torch.zeros((), dtype=torch.int64, device="meta"), 8)
    meter.reset()
    count = torch.tensor(3)
    meter.update(count, 8)
    count += 100  # whose it is: what was counted stays
    meter.update(count, 8)
    assert count.item() == 103
    clock.now += 1.0
    assert meter.read()["tokens_per_second"] == 106


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
def test_peak_memory_of_the_process(meter: ThroughputMeter) -> None:
    meter.update(1, 1)
    before = meter.read()["peak_memory_gib"]
    # torch is loaded, so the process holds some 0.1 GiB at least; a wrong unit is off by 1024.
    assert 0.05 < before < 200
    block = torch.ones(2**26)  # 256 MiB, written
    meter.update(1, 1)
    after = meter.read()["peak_memory_gib"]
    del block
    meter.update(1, 1)
    assert meter.read()["peak_memory_gib"] >= after >= before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_the_gpu(clock: Clock) -> None:
    meter = ThroughputMeter(clock=clock)
    torch.cuda.reset_peak_memory_stats()
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    meter.update(torch.tensor(5, device="cuda"), 10)
    figures = meter.read()
    assert figures["packing_fill"] == 0.5
    assert figures["peak_memory_gib"] >= block.numel() / 2**30


def test_utilisation(clock: Clock) -> None:
    meter = ThroughputMeter("cpu", clock=clock, flops=TrainingFlops(10.0, 2.0), flop_rate=1e4)
    for _ in range(2):
        meter.update(100, 120, torch.tensor(500))
    clock.now += 4.0
    assert meter.read()["mfu"] == pytest.approx((10 * 200 + 2 * 1000) / 4 / 1e4)
    meter.update(100, 100)
    clock.now += 1.0
    assert meter.read()["mfu"] == pytest.approx(1000 / 1e4), "an interval of its own"


def test_no_utilisation_without_a_rate(clock: Clock) -> None:
    for arguments in ({"flops": TrainingFlops(1.0, 1.0)}, {"flop_rate": 1.0}):
        meter = ThroughputMeter("cpu", clock=clock, **arguments)
        meter.update(1, 1, 1)
        clock.now += 1.0
        assert "mfu" not in meter.read()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> tuple[ThroughputMeter, list[bool]]:
    """A meter of a GPU, and whether that has nothing to do at the looks to come."""
    idle: list[bool] = []
    stream = SimpleNamespace(query=lambda: idle.pop(0), synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 0)
    return ThroughputMeter("cuda", clock=clock), idle


def test_a_look_at_an_idle_gpu_is_enough_for_a_step(gpu: tuple[ThroughputMeter, list[bool]]) -> None:
    meter, idle = gpu
    # The first look follows a wait, and is none. Then: before the second step, behind its pass, behind the third's.
    for step, answers in enumerate([[False], [True], [False, True], [False, False, False, False]]):
        idle += answers
        looks = 4 if step == 3 else 2  # two passes in the last one
        for _ in range(looks):
            meter.look(step=step)
        assert not idle, "a step that was found idle is not asked again"
    meter.update(1, 1)
    assert meter.read()["host_bound"] == 2 / 4


def test_a_run_begins_with_the_step_that_the_one_before_ended_with(gpu: tuple[ThroughputMeter, list[bool]]) -> None:
    meter, idle = gpu
    for answers in ([True], [False]):
        idle += answers
        meter.reset()
        meter.look(step=0), meter.look(step=0)
        meter.update(1, 1)
        assert meter.read()["host_bound"] == float(answers[0])


def test_after_a_wait_for_the_gpu_its_idleness_is_not_the_hosts(gpu: tuple[ThroughputMeter, list[bool]]) -> None:
    meter, idle = gpu
    idle += [False, True, False]
    for step in (0, 1):
        meter.look(step=step), meter.look(step=step)
    meter.update(1, 1)
    assert meter.read()["host_bound"] == 1 / 2
    meter.look(step=2), meter.look(step=2)  # the first of these follows the log
    with meter.excluding():
        pass
    idle += [False]
    meter.look(step=3), meter.look(step=3)
    meter.update(1, 1)
    assert meter.read()["host_bound"] == 0 and not idle


def test_without_a_gpu_nothing_is_host_bound(meter: ThroughputMeter) -> None:
    meter.look(step=0)
    meter.update(1, 1)
    assert "host_bound" not in meter.read()


def test_a_meter_that_is_split_off_is_read_later(meter: ThroughputMeter, clock: Clock) -> None:
    clock.now += 1.0
    meter.update(300, 400)
    ended = meter.split()
    meter.update(50, 100)
    clock.now += 0.5  # until the device has done what was queued before the split
    figures = ended.read()
    assert figures["tokens_per_second"] == 300 / 1.5 and figures["packing_fill"] == 300 / 400
    clock.now += 0.25  # from then on
    figures = meter.read()
    assert figures["tokens_per_second"] == 50 / 0.25 and figures["packing_fill"] == 50 / 100
    # The one that was split off is done with: reading it anew moves nobody's interval.
    meter.update(10, 10)
    clock.now += 1.0
    assert ended.read() == {}
    assert meter.read()["tokens_per_second"] == 10


def test_a_split_is_no_wait_for_the_gpu(gpu: tuple[ThroughputMeter, list[bool]]) -> None:
    meter, idle = gpu
    idle += [False]
    meter.look(step=0), meter.look(step=0)
    meter.update(1, 1)
    ended = meter.split()
    idle += [True]  # it has run dry by itself
    meter.look(step=1)
    meter.update(1, 1)
    assert ended.read()["host_bound"] == 0 and meter.read()["host_bound"] == 1
