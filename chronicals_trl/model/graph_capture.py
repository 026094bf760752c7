"""One forward pass as a CUDA graph, and its backward pass as one or a few, over static tensors.

A graph is launched by one call, whatever the number of kernels in it; the kernels read and write the addresses that
they had when they were captured. All graphs of a stack share one memory pool: what a forward pass keeps for its
backward pass is dead once that has run, so the next graph may use the same memory. That holds as long as no other
forward pass is replayed between the two, which is for the caller (`model.graphs`) to see to.

The backward pass is cut into segments where gradients are to leave before the whole of it is done: DDP sends what the
last layers gave while the first ones are still computed.

Random numbers: torch registers the device's default generator with a capture, and each replay takes its numbers from
where the generator then stands and moves it on, as eager code does. So dropout draws a new mask each time, and the
capture itself, in which nothing runs, draws none.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chronicals_trl.kernels._gradient_memory import lent
from chronicals_trl.model.graph_gradients import StaticGradients

T = TypeVar("T")

TOLERANCE = 0.02  # of the norm: other kernels run without gradients, and bf16 rounds after each
REMEDY = "Set cuda_graphs='off' in chronicals_config."

# Graphs whose capture failed. torch's allocator may go on asking them whether an allocation is theirs.
_FAILED: list[Any] = []


class Recorder(Protocol):
    """What records work for replay; on CUDA by `CudaRecorder`, in the tests by one that runs the work again."""

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """The replay of `work`, and its result, whose tensors hold values only once it has been replayed."""

    def short_of_memory(self) -> bool:
        """Whether an eager pass beside the recorded ones may not have the memory that it needs."""

    def wait(self) -> None:
        """Return when no replay is running any more: one that is must not be let go of."""

    def release(self) -> None:
        """Give back the memory of replays that are gone."""


class CudaRecorder:
    """Captures on a stream of its own, into a memory pool of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._pool_bytes = 0

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        # A handle of an earlier pool that has been given back is not valid any more.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            drawn = generator.clone_state()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            try:
                # "thread_local": the threads that pin memory or watch over NCCL go on meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    result = work()
            except BaseException:
                self._recover(graph, before)
                generator.graphsafe_set_state(drawn)
                raise
            self._pool_bytes += torch.cuda.memory_reserved() - reserved
        return graph.replay, result

    def _recover(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        """Undo what a capture that was broken off leaves behind; torch does so only for one that ends well."""
        _FAILED.append(graph)
        torch.cuda.set_stream(stream)
        device = torch.cuda.current_device()
        # After an invalid operation ending the capture is an error too, which leaves the allocator serving the pool.
        with contextlib.suppress(RuntimeError):  # it has ended well: there was an error of Python's alone
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
        graph.reset()
        self._stream = torch.cuda.Stream(self._device)  # the old one may still count as capturing
        torch.cuda.synchronize()

    def short_of_memory(self) -> bool:
        free, _ = torch.cuda.mem_get_info(self._device)
        statistics = torch.cuda.memory_stats(self._device)
        reserved = statistics["reserved_bytes.all.current"]
        cached = reserved - statistics["allocated_bytes.all.current"] - self._pool_bytes
        # What the pool holds is what a pass of this size keeps.
        return free + max(cached, 0) < self._pool_bytes

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def release(self) -> None:
        torch.cuda.empty_cache()
        self._pool, self._pool_bytes = None, 0


@dataclass
class Segment:
    """Some layers in a row, whose backward pass is a graph of its own.

    Args:
        run: from the hidden states, and tensors like the pass's inputs, to the hidden states behind the layers.
        parameters: of these layers, those that are trained.
    """

    run: Callable[[Tensor, Sequence[Tensor]], Tensor]
    parameters: Sequence[nn.Parameter]


class Captured:
    """A pass through `segments`, recorded; of the tensors of each pass its shapes alone are kept.

    Args:
        inputs: distinct tensors; the first, of which alone a gradient may be required, are the hidden states.
        owners: the modules that hold the segments' parameters.
        sibling: another pass through the same parameters, whose gradients' memory this one uses too.
        lends: whether that memory is handed out as `.grad`; copies of it otherwise.
        apart: whether, without a sibling, gradients have memory of their own, as far as the ops write where they are
            told to. In the recorder's pool they lie among what the pass keeps, and what siblings keep would not fit.
    """

    def __init__(
        self,
        recorder: Recorder,
        segments: Sequence[Segment],
        inputs: Sequence[Tensor],
        owners: Sequence[nn.Module],
        sibling: Captured | None = None,
        lends: bool = True,
        apart: bool = False,
    ) -> None:
        self._lends = lends
        device_type = inputs[0].device.type
        self.inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        self.parameters = [segment.parameters for segment in segments]
        # Stand-ins on the same memory: a parameter of the model's own may have hooks, which would be captured too, and
        # DDP holds on to its accumulator, which belongs to another stream than the one that captures.
        leaves = {id(p): nn.Parameter(p.detach()) for segment in segments for p in segment.parameters}
        # Of each segment: given, leaves, output, and how many gradients each leaf gets.
        traced: list[tuple[Tensor, list[nn.Parameter], Tensor, Counter[int]]] = []

        def forward() -> Tensor:
            traced.clear()
            output = hidden = self.inputs[0]
            # Autocast's cache would keep the casts of all weights until the caller leaves it, over the backward pass.
            with torch.enable_grad(), _in_place_of(owners, leaves), _autocast_uncached(device_type):
                for segment in segments:
                    hidden = output.detach().requires_grad_(output.requires_grad) if traced else output
                    output = segment.run(hidden, self.inputs)
                    own = [leaves[id(p)] for p in segment.parameters]
                    traced.append((hidden, own, output, _uses_of_leaves(output, [hidden, *own])))
            return output.detach()

        def backward(
            grad_output: Tensor, places: Sequence[Tensor | None] | None, shared: list[Tensor | None] | None
        ) -> list[Tensor | None]:
            # Popped: what the forward pass has kept is freed as the backward pass goes on.
            hidden, own, output, uses = traced.pop()
            wanted = [hidden, *own] if hidden.requires_grad else own
            memory = {} if places is None else _memory_of_single_gradients(own, places, uses)
            with torch.autocast(device_type, enabled=False), lent(memory):
                found = torch.autograd.grad(output, wanted, grad_output, allow_unused=True)
            gradients: list[Tensor | None] = list(found) if hidden.requires_grad else [None, *found]
            if shared is None:
                return gradients
            pairs = list(zip(shared, gradients[1:], strict=True))
            if any((s is None) != (g is None) for s, g in pairs):
                lying = {s.data_ptr() for s in memory.values()}
                return [g.clone() if g is not None and g.data_ptr() in lying else g for g in gradients]
            apart = [(s, g) for s, g in pairs if s is not None and g is not None and g.data_ptr() != s.data_ptr()]
            if apart:
                torch._foreach_copy_([s for s, _ in apart], [g for _, g in apart])
            return [gradients[0], *shared]

        self.gradients: list[StaticGradients]
        places: list[Sequence[Tensor | None]] | None = None
        if sibling is not None:
            places = [gradients.tensors for gradients in sibling.gradients]
        elif apart:
            # Of what autocast casts, the ops see the cast alone.
            cast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
            places = [[torch.empty_like(p) if cast in (None, p.dtype) else None for p in ps] for ps in self.parameters]
        self._replay_forward, self.output = recorder.record(forward)
        self.grad_output = torch.empty_like(self.output)
        self._replay_backward: dict[int, Callable[[], None]] = {}
        self.grad_hidden: Tensor | None = self.grad_output
        self.gradients = [StaticGradients(ps, [None] * len(ps)) for ps in self.parameters]
        for index in reversed(range(len(segments))):
            if self.grad_hidden is None:  # nothing is trained from here on down
                break
            shared = None if sibling is None else sibling.gradients[index]
            place = None if places is None else places[index]
            work = functools.partial(backward, self.grad_hidden, place, None if shared is None else shared.tensors)
            self._replay_backward[index], (self.grad_hidden, *found) = recorder.record(work)
            if shared is not None and all(map(operator.is_, found, shared.tensors)):
                self.gradients[index] = shared
            else:
                self.gradients[index] = StaticGradients(self.parameters[index], found)
            del found
        traced.clear()

    def __len__(self) -> int:
        """Segments."""
        return len(self.parameters)

    @torch.no_grad()
    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """The output for `tensors`, as memory of its own: the caller may keep it, or write into it."""
        for static, given in zip(self.inputs, tensors, strict=True):
            static.copy_(given, non_blocking=True)
        self._replay_forward()
        return self.output.clone()

    @torch.no_grad()
    def backward(self, index: int, grad_output: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the hidden states before segment `index`, the last first, and of its parameters.

        Those of parameters are lent (`StaticGradients`), or memory of their own. Between segments the gradient of the
        hidden states stays in the static one.

        Args:
            grad_output: of the last segment's output; of the others' not read.
        """
        if index == len(self) - 1:
            self.grad_output.copy_(grad_output)
        self._replay_backward[index]()
        hidden = self.grad_hidden.clone() if index == 0 and self.grad_hidden is not None else None
        gradients = self.gradients[index]
        return hidden, gradients.lent() if self._lends else gradients.copied()


def rehearse(segments: Sequence[Segment], inputs: Sequence[Tensor], owners: Sequence[nn.Module]) -> None:
    """Run each segment there and back, one after the other, and keep nothing: what a capture will launch is then
    compiled and loaded. It takes the memory of one segment. Random numbers are left as they were.

    Args:
        segments, inputs, owners: as `Captured` takes them.
    """
    device = inputs[0].device
    leaves = {id(p): nn.Parameter(p.detach()) for segment in segments for p in segment.parameters}
    given = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    hidden = given[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for segment in segments:
            with torch.enable_grad(), _in_place_of(owners, leaves), _autocast_uncached(device.type):
                output = segment.run(hidden, given)
            wanted = [t for t in (hidden, *(leaves[id(p)] for p in segment.parameters)) if t.requires_grad]
            if output.requires_grad:
                with torch.autocast(device.type, enabled=False):
                    torch.autograd.grad(output, wanted, torch.zeros_like(output), allow_unused=True)
            hidden = output.detach().requires_grad_(output.requires_grad)


@torch.no_grad()
def require_equal(captured: Captured, tensors: Sequence[Tensor], layers: Callable[[], Tensor]) -> None:
    """Raise RuntimeError unless a replay for `tensors` gives what the layers give: a kernel that was launched past the
    capture, on a stream of its own choice, would be missing. Random numbers are left as they were.
    """
    device = tensors[0].device
    results = []
    for run in (lambda: captured.forward(tensors), layers):
        # Both draw the same numbers.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            results.append(run().float())
    error = ((results[0] - results[1]).norm() / results[1].norm().clamp_min(1e-30)).item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"a replay's hidden states differ from the layers' own by {error:.1e} of their norm")


class Ticket:
    """Stands for what a replayed forward pass has kept, until its backward pass has used it or nobody can."""


def replay(captured: Captured, ticket: Ticket, tensors: list[Tensor]) -> Tensor:
    """The recorded pass in the place of the layers: the hidden states behind them.

    One autograd node a segment, in a chain: the hidden states between two nodes are the graphs' own, and an empty
    tensor stands for them. What accumulates a node's gradients, DDP's and the user's hooks included, runs before the
    next node does.
    """
    hidden = tensors[0]
    for index, parameters in enumerate(captured.parameters):
        hidden = _Replay.apply(captured, index, ticket, tensors, hidden, *parameters)
    return hidden


class _Replay(torch.autograd.Function):
    """One segment of a replay. The parameters are arguments for their gradients' sake alone."""

    @staticmethod
    def forward(
        ctx: Any, captured: Captured, index: int, ticket: Ticket, tensors: list[Tensor], hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.captured, ctx.index, ctx.ticket = captured, index, ticket
        ctx.empty = hidden.new_empty(0)
        return captured.forward(tensors) if index == len(captured) - 1 else ctx.empty.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if ctx.ticket is None:
            raise RuntimeError(
                "The backward pass of the decoder layers ran a second time (retain_graph=True): CUDA graphs keep what "
                f"it needs for one. {REMEDY}"
            )
        ctx.ticket = None
        grad_hidden, gradients = ctx.captured.backward(ctx.index, grad_output)
        return None, None, None, None, grad_hidden if ctx.index == 0 else ctx.empty, *gradients


def _memory_of_single_gradients(
    leaves: Sequence[Tensor], shared: Sequence[Tensor | None], uses: Counter[int]
) -> dict[int, Tensor]:
    """The memory for each leaf's gradient by the leaf's address; none for those that get several, which add up."""
    at = [leaf.data_ptr() for leaf in leaves]
    alone = Counter(at)
    return {
        address: memory
        for address, leaf, memory in zip(at, leaves, shared, strict=True)
        if memory is not None and uses[id(leaf)] == 1 and alone[address] == 1
    }


def _uses_of_leaves(output: Tensor, wanted: Sequence[Tensor]) -> Counter[int]:
    """How many gradients each of the leaves gets that `output` depends on, by id.

    Raise RuntimeError where one of them is trained, but not among the layers' parameters: a tensor that a closure or
    a plain attribute holds. Its gradient would be missing, and nobody would see it.
    """
    known = set(map(id, wanted))
    uses: Counter[int] = Counter()
    seen: set[Any] = set()
    to_visit: list[Any] = [output.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            uses[id(leaf)] += 1
            if id(leaf) not in known:
                shape = tuple(leaf.shape)
                raise RuntimeError(f"the layers read a trained tensor of shape {shape} that none of them holds")
        elif node not in seen:
            seen.add(node)
            to_visit += [function for function, _ in node.next_functions]
    return uses


@contextlib.contextmanager
def _in_place_of(owners: Sequence[nn.Module], leaves: dict[int, nn.Parameter]) -> Iterator[None]:
    """The modules' parameters replaced by the leaves of their ids, for as long as this is open."""
    places = [
        (module._parameters, name, parameter)
        for module in owners
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in leaves
    ]
    try:
        for parameters, name, parameter in places:
            parameters[name] = leaves[id(parameter)]
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


def _autocast_uncached(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=False)
