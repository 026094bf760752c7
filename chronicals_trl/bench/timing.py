"""Times of one op on a GPU, free of the host and of the L2 cache, and the host's own cost of a call.

An op is called on several sets of buffers in turn, all in one CUDA graph, and the graph is replayed between two CUDA
events. The sets together are several times the L2 cache, so by the time a set comes round again its data has been
evicted, as in a training step. Outputs are kept as long as their set is not due again: they rotate with the inputs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

__all__ = [
    "DRY_RUN",
    "GRAPH",
    "BufferSet",
    "Timing",
    "capture",
    "copy_bandwidth",
    "host_us",
    "quantile",
    "replay_ms",
    "sample_ms",
    "set_count",
    "time_backward",
    "time_forward",
]

#: The sets of buffers together touch at least this many times the L2 cache.
L2_FACTOR = 4
#: However small the op; beyond it (toy sizes) the sets do fit into the cache, and `Timing.cache_factor` shows it.
MAX_SETS = 64
#: One graph moves about this much, so that the few microseconds between two replays do not count.
GRAPH_BYTES = 2 * 2**30
#: But it holds no more calls than this, for toy sizes.
GRAPH_CALLS = 256
REPLAYS = 3
WARM_UP = 2
COPY_BYTES = 2**30
#: About a millisecond of a GPU.
BUSY_CYCLES = 2_000_000

GRAPH, DRY_RUN = "CUDA graph replay", "cpu dry run"


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median of the samples, and their 20th and 80th percentile.

    Args:
        us, us_p20, us_p80: Microseconds.
        samples: How many were taken; each is the mean over `calls` calls.
        calls: Calls of the op between two events.
        sets: Sets of buffers that the calls went through in turn.
        cache_factor: Bytes touched by all sets over the size of the L2 cache; None on a CPU.
        method: "CUDA graph replay", or "cpu dry run", which is no measurement.
    """

    us: float
    us_p20: float
    us_p80: float
    samples: int
    calls: int
    sets: int
    cache_factor: float | None
    method: str


@dataclass(frozen=True)
class BufferSet:
    """The arguments of one call of an op, and the gradients that its outputs receive."""

    args: tuple[torch.Tensor, ...]
    grad_outputs: tuple[torch.Tensor, ...]

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The arguments that are differentiated."""
        return [t for t in self.args if t.requires_grad]

    def clone(self, dtype: torch.dtype | None = None) -> BufferSet:
        """Copies in memory of their own, same layout, leaves of autograd; in `dtype` if one is given."""

        def copy(t: torch.Tensor) -> torch.Tensor:
            # Keeps the strides of a transposed view: what the model hands over is part of what is timed.
            return t.detach().to(dtype or t.dtype, copy=True).requires_grad_(t.requires_grad)

        return BufferSet(tuple(map(copy, self.args)), tuple(map(copy, self.grad_outputs)))

    def restore(self, pristine: BufferSet) -> None:
        """Overwrite all values with those of `pristine`, out of autograd's sight: forward graphs stay usable."""
        for mine, theirs in zip(self.args + self.grad_outputs, pristine.args + pristine.grad_outputs, strict=True):
            mine.data.copy_(theirs.data)


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def set_count(bytes_touched: int, device: torch.device) -> int:
    """How many sets to rotate over, so that together they are `L2_FACTOR` caches.

    Args:
        bytes_touched: The least that any side touches of one set. An op that works in place touches its inputs alone,
            and would find some of them in the cache if the outputs of others were counted.
    """
    if device.type != "cuda":
        return 2
    return min(max(2, math.ceil(L2_FACTOR * _l2_bytes(device) / bytes_touched)), MAX_SETS)


def time_forward(
    fn: Callable[..., Any], sets: Sequence[BufferSet], pristine: BufferSet, bytes_touched: int, repeats: int
) -> Timing:
    """The forward pass as in training: gradients are on, so what the backward needs is written too.

    Args:
        fn: The op; called as `fn(*set.args)`.
        sets: What to rotate over; see `set_count`.
        pristine: A set with the values that `sets` hold. Some libraries write into their inputs (Liger's rope): the
            values are put back before each sample. Between the calls of one sample they drift, within bounds: a
            rotation keeps the norm.
        bytes_touched: What one call has to move; decides how often the sets are gone through in one graph.
        repeats: Samples to take.
    """
    return _time([partial(fn, *s.args) for s in sets], partial(_restore, sets, pristine), bytes_touched, repeats,
                 sets[0].args[0].device)  # fmt: skip


def time_backward(
    fn: Callable[..., Any], sets: Sequence[BufferSet], pristine: BufferSet, bytes_touched: int, repeats: int
) -> Timing:
    """The backward pass alone: the forward graphs are built beforehand and kept; arguments as for `time_forward`.

    Liger's swiglu, geglu and rmsnorm write gradients over saved inputs or incoming gradients. A second replay then
    starts from other numbers, which costs the same time. As incoming gradients are in [-1, 1], the few dozen replays
    of a sample do not overflow in bf16, and before the next sample all values are put back.
    """
    device = sets[0].args[0].device
    # Autograd runs a backward node on the stream of its forward, which has to be the one that captures.
    with _on_side_stream(device):
        outputs = [as_tuple(fn(*s.args)) for s in sets]
    calls = [
        partial(torch.autograd.grad, o, s.inputs, s.grad_outputs, retain_graph=True)
        for o, s in zip(outputs, sets, strict=True)
    ]
    return _time(calls, partial(_restore, sets, pristine), bytes_touched, repeats, device)


def copy_bandwidth(device: torch.device, repeats: int) -> tuple[float, Timing]:
    """GB/s (1e9 bytes read plus written) of a device-to-device copy of 1 GiB, and its timing.

    The faster of the driver's copy and of a kernel that reads and writes each element once: the driver's is not always
    the wall.
    """
    size = COPY_BYTES if device.type == "cuda" else 2**20
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copies = (partial(target.copy_, source), partial(torch.neg, source, out=target))
    timing = min((_time([copy], lambda: None, 2 * size, repeats, device) for copy in copies), key=lambda t: t.us)
    return 2 * size / timing.us / 1e3, timing


def host_us(call: Callable[[], Any], device: torch.device, *, batches: int = 7) -> float:
    """Microseconds that the host spends in one `call`, which has to be so small that the GPU keeps up."""
    calls = 50 if device.type == "cuda" else 2
    samples = []
    for _ in range(batches + 1):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) * 1e6 / calls)
    _synchronize(device)
    return statistics.median(samples[1:])  # the first was the warm-up


def sample_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one `call` that is long enough to be timed by itself, launched as a training step launches it.

    The GPU is kept busy for a moment first, so that `call`'s first kernels are queued by the time that it is free: the
    host counts where it is late, as after a synchronisation inside `call`, and not for having started.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def replay_ms(call: Callable[[], Any], device: torch.device, repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds of one `call` launched, and as a CUDA graph; `repeats` of each, by turns, so that both find the GPU
    equally warm. Raises what capturing raises.
    """
    graph, kept = capture([call], 1, device)
    launched, replayed = [], []
    for number in range(WARM_UP + repeats):
        times = sample_ms(call, device), sample_ms(graph.replay, device)
        if number >= WARM_UP:
            launched.append(times[0])
            replayed.append(times[1])
    kept.clear()
    graph.reset()
    return launched, replayed


def _time(
    calls: Sequence[Callable[[], Any]],
    restore: Callable[[], None],
    bytes_touched: int,
    repeats: int,
    device: torch.device,
) -> Timing:
    if device.type == "cuda":
        rounds = max(1, min(round(GRAPH_BYTES / (bytes_touched * len(calls))), GRAPH_CALLS // len(calls)))
        samples = _replay(calls, restore, rounds, repeats, device)
        count, factor, method = REPLAYS * rounds * len(calls), bytes_touched * len(calls) / _l2_bytes(device), GRAPH
    else:
        samples = _run_on_cpu(calls, restore, repeats)
        count, factor, method = len(calls), None, DRY_RUN
    low, high = (quantile(samples, q) for q in (0.2, 0.8))
    return Timing(statistics.median(samples), low, high, len(samples), count, len(calls), factor, method)


def _replay(
    calls: Sequence[Callable[[], Any]], restore: Callable[[], None], rounds: int, repeats: int, device: torch.device
) -> list[float]:
    """Microseconds of a call, once for each of `repeats` samples."""
    graph, kept = capture(calls, rounds, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(WARM_UP + repeats):
        restore()
        # Fills the cache with what it holds in the long run, and keeps the GPU busy while the next ones are queued.
        graph.replay()
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / (REPLAYS * rounds * len(calls)))
    kept.clear()
    graph.reset()
    return samples[WARM_UP:]


def capture(calls: Sequence[Callable[[], Any]], rounds: int, device: torch.device) -> tuple[Any, list[Any]]:
    """A graph of `rounds` times all calls, and what they return: its memory, to be held while the graph is used."""
    with _on_side_stream(device) as stream:
        for call in calls:  # compiles, loads and tunes kernels, none of which a capture allows
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = [None] * len(calls)
    # thread_local: autograd's own thread may do what a capture forbids to the thread that captures.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(rounds):
            for index, call in enumerate(calls):
                kept[index] = call()
    return graph, kept


def _run_on_cpu(calls: Sequence[Callable[[], Any]], restore: Callable[[], None], repeats: int) -> list[float]:
    samples = []
    for _ in range(1 + repeats):
        restore()
        start = time.perf_counter()
        for call in calls:
            call()
        samples.append((time.perf_counter() - start) * 1e6 / len(calls))
    return samples[1:]


def _restore(sets: Sequence[BufferSet], pristine: BufferSet) -> None:
    for each in sets:
        each.restore(pristine)


@contextmanager
def _on_side_stream(device: torch.device) -> Iterator[Any]:
    """Run the block on the stream that captures, ordered after what is queued; a CPU has none, and nothing happens."""
    if device.type != "cuda":
        yield None
        return
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream(device).wait_stream(stream)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for the whole process: a leaf's gradient node stays on the stream that it was first made on.
    return torch.cuda.Stream(device)


@cache
def _l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear interpolation between the two samples nearest to the quantile."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
