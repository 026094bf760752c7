"""The decoder layers as two CUDA graphs, one forward and one backward, so that the host launches two things a step.
(Under DDP the backward one is cut into a few, between which gradients leave.)

On a fast GPU the layers of a small model finish sooner than Python launches their kernels: the GPU waits for the host.
Batches of static shapes can be captured: the first passes of a kind run as ever and are looked at (`WARM_UP`), the
next is captured (`graph_capture.py`), and from then on each layer only notes what it is given and hands its input on,
until the last one replays all of them. Embedding, rotary tables, final norm, head, loss and optimizer stay eager.

Graphs of other shapes use the same memory, if the largest is captured first: what is free of it is divided, but never
becomes larger than it was. So the others go before a larger one is captured, and are captured again when they come.

A pass runs eagerly whenever anything that a graph takes for granted is not so (`graph_state.py`): another mode,
another adapter, a hook; other shapes, until they have been captured too; or the backward pass of a replay is still to
come, since what it needs would be overwritten.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chronicals_trl.model.decoder import materialise
from chronicals_trl.model.graph_capture import (
    REMEDY,
    Captured,
    CudaRecorder,
    Recorder,
    Segment,
    Ticket,
    rehearse,
    replay,
    require_equal,
)
from chronicals_trl.model.graph_layers import UNGRAPHED, put_into, take_out
from chronicals_trl.model.graph_state import (
    Call,
    LayerState,
    Reading,
    Unreadable,
    exchange,
    read_call,
    surroundings,
    watched,
)

__all__ = ["GraphedStack"]

logger = logging.getLogger(__name__)

WARM_UP = 3  # eager passes before a capture: kernels are compiled and chosen in the first ones
WARM_UP_OF_A_SHAPE = 1  # where passes of other shapes have been captured
MAX_GRAPHS = 8  # cu_seqlens comes in a few lengths, and so do padded rows
MAX_STATES = 8  # states of the layers that are remembered
MAX_KINDS = 64  # kinds of passes that are counted at a time
MAX_SHORTAGES = 3  # times that the graphs make room for an eager pass, before they do so for good


@dataclass
class _Kind:
    """Passes that are alike in all that a graph takes for granted."""

    state: int
    seen: int = 0
    key: tuple[Any, ...] | None = None  # of all layers' arguments
    captured: Captured | None = None


@dataclass
class _Pass:
    """A pass that is under way: layers run and are looked at, or only note their arguments (`deferred`)."""

    kind: _Kind
    deferred: bool
    hidden: Any  # what the first layer was given
    output: Any  # what the next layer has to be given
    calls: list[Call] = field(default_factory=list)


class GraphedStack:
    """The layers of one model, in order.

    Args:
        layers: patched decoder layers (`decoder_layers`).
        recorder: makes the replays; None for CUDA graphs on the layers' device.
        segments: graphs that the backward pass is cut into, at most one a layer; above one where the gradients of the
            last layers are sent off before those of the first are done.
        sizes: tokens of the batches that are sure to come again, as far as that is known. One of them is captured when
            it first comes, once another has been: an eager pass would need its memory beside that of the graphs.

    Attributes:
        reason: why there are no graphs any more, for good.
        obstacle: why the last pass that could not be replayed or counted towards a capture could not.
        passes, replays, captures: how many there have been.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        recorder: Recorder | None = None,
        segments: int = 1,
        sizes: Collection[int] = (),
    ) -> None:
        self.layers = list(layers)
        self._sizes = frozenset(sizes)
        self._segments = _segments(len(self.layers), segments)
        self.reason: str | None = None
        self.obstacle: str | None = None
        self.passes = self.replays = self.captures = 0
        self.active = False
        self._recorder = recorder
        self._state = LayerState(self.layers)
        self._known_states: dict[int, tuple[Any, ...]] = {}
        self._states = 0
        self._obstacles: dict[int, str | None] = {}  # by number of the state
        self._kinds: dict[Any, _Kind] = {}
        self._pass: _Pass | None = None
        self._outstanding: weakref.ref[Ticket] | None = None
        self._shortages = 0
        self._largest = 0  # numbers in the hidden states that a pass had whose graphs the memory has held
        self._lends = True  # the gradients' memory

    # -- on and off --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        for index, layer in enumerate(self.layers):
            put_into(self, index, layer)

    def remove(self) -> None:
        """Give the layers their forwards back, and the memory of the graphs."""
        for layer in self.layers:
            take_out(layer)
        self.release()
        self._kinds.clear()

    def release(self) -> None:
        """Let go of the graphs and their memory; each is captured again when a pass of its kind comes."""
        if any(kind.captured is not None for kind in self._kinds.values()):
            self._let_go(list(self._kinds.values()))

    def _let_go(self, kinds: list[_Kind]) -> None:
        going = set(map(id, kinds))
        if any(kind.captured is not None and id(kind) not in going for kind in self._kinds.values()):
            self._take_gradients_back()  # those that stay may work where these have lent
        if self._recorder is not None:
            self._recorder.wait()
        ended = self.reason is not None or any(kind.captured is not None for kind in kinds)
        for kind in kinds:
            kind.captured = None
        # Nothing can be captured into a pool whose graphs are gone, and of whose memory a `.grad` still has a part.
        if ended and self._recorder is not None and all(kind.captured is None for kind in self._kinds.values()):
            self._recorder.release()
            self._largest = 0

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """While open, passes are recorded, captured and replayed; otherwise layers run as if there were no stack."""
        self.active = True
        try:
            yield
            self._require_complete()
        finally:
            self.active, self._pass = False, None

    def _require_complete(self) -> None:
        if self._pass is not None and self._pass.deferred:
            raise RuntimeError(
                f"The model called {len(self._pass.calls)} of its {len(self.layers)} decoder layers in this pass, and "
                f"all of them before; its result is wrong. {REMEDY}"
            )

    def _give_up(self, reason: str) -> None:
        self.reason = self.obstacle = reason
        self._pass = None
        self._let_go(list(self._kinds.values()))  # and of what a capture that failed has left
        self._kinds.clear()

    # -- a pass ------------------------------------------------------------------------------------------------------

    def layer_called(self, index: int, hidden: Any, call: Call) -> Any:
        """What layer `index` gives for `hidden` and the other arguments, now or (its input back) with the last one."""
        if index == 0:
            self._begin(hidden, call)
        current = self._pass
        if current is None:
            return self._run_layer(index, hidden, call)
        in_order = index == len(current.calls)
        if current.deferred:
            if not in_order or hidden is not current.hidden:
                raise RuntimeError(
                    f"Decoder layer {index} is called in another way than in earlier passes (out of order, or the "
                    f"model changes the hidden states between layers), which cannot be replayed. {REMEDY}"
                )
            current.calls.append(call)
            return self._finish(current) if index == len(self.layers) - 1 else hidden
        if not in_order:
            self._give_up("the model does not call its decoder layers one after the other")
        elif hidden is not current.output:
            self._give_up("the model does something with the hidden states between its decoder layers")
        output = self._run_layer(index, hidden, call)
        if self._pass is not None:
            current.calls.append(call)
            current.output = output
            if index == len(self.layers) - 1:
                self._pass = None
                self._count(current)
        return output

    def _run_layer(self, index: int, hidden: Any, call: Call) -> Any:
        args, kwargs = call
        return self.layers[index].__dict__[UNGRAPHED](hidden, *args, **kwargs)

    def _run(self, hidden: Any, calls: Sequence[Call], layers: range | None = None) -> Any:
        for index in range(len(calls)) if layers is None else layers:
            hidden = self._run_layer(index, hidden, calls[index])
        return materialise(hidden)

    def _begin(self, hidden: Any, call: Call) -> None:
        self._require_complete()
        self._pass = None
        if self.reason is not None or not torch.is_grad_enabled():
            return
        self.passes += 1
        kind = self._kind_of(hidden, call)
        busy = self._outstanding is not None and self._outstanding() is not None
        warm = kind is not None and kind.seen >= self._warm_up(kind, hidden)
        if not busy and not warm:
            self._make_room()
        if kind is None or busy or self.reason is not None:
            return
        self._pass = _Pass(kind, deferred=warm, hidden=hidden, output=hidden)

    def _warm_up(self, kind: _Kind, hidden: Tensor) -> int:
        """Eager passes of this kind before its capture."""
        if not any(other.state == kind.state and other.captured is not None for other in self._kinds.values()):
            return WARM_UP
        unknown = kind.key is None  # otherwise it is known, and was not the same each time
        return 0 if unknown and hidden.shape[:-1].numel() in self._sizes else WARM_UP_OF_A_SHAPE

    def _kind_of(self, hidden: Any, call: Call) -> _Kind | None:
        """The kind of this pass by what its first layer is given; None, and `obstacle`, if it has to run eagerly."""
        try:
            reading = read_call(hidden, [call])
        except Unreadable as why:
            self.obstacle = str(why)
            return None
        device = reading.tensors[0].device
        state = self._state_number(device)
        obstacle = self._obstacles[state] or watched()
        if obstacle is not None:
            self.obstacle = obstacle
            return None
        key = (state, reading.key, surroundings(device))
        if key not in self._kinds:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds = {k: kind for k, kind in self._kinds.items() if kind.captured is not None}
            self._kinds[key] = _Kind(state)
        kind = self._kinds[key]
        if kind.captured is None and not self._may_capture(state):
            self.obstacle = f"there are {MAX_GRAPHS} graphs already, of batches of other shapes"
            return None
        return kind

    def _state_number(self, device: torch.device) -> int:
        """The number of the state that the layers are in, a new one if it is not among the last ones."""
        state = self._state.read()
        for number in reversed(self._known_states):
            if self._known_states[number] == state:
                return number
        if len(self._known_states) >= MAX_STATES:
            oldest = next(iter(self._known_states))
            del self._known_states[oldest], self._obstacles[oldest]
            self._let_go([kind for kind in self._kinds.values() if kind.state == oldest])
            self._kinds = {key: kind for key, kind in self._kinds.items() if kind.state != oldest}
        self._states += 1
        self._known_states[self._states] = state
        self._obstacles[self._states] = self._state.obstacle(device)
        return self._states

    def _may_capture(self, state: int) -> bool:
        captured = [kind for kind in self._kinds.values() if kind.captured is not None]
        if len(captured) < MAX_GRAPHS:
            return True
        bygone = [kind for kind in captured if kind.state != state]
        if bygone:
            self._let_go(bygone)
        return bool(bygone)

    def _make_room(self) -> None:
        """Before an eager pass, which needs about the memory that the graphs hold."""
        held = any(kind.captured is not None for kind in self._kinds.values())
        if not held or self._recorder is None or not self._recorder.short_of_memory():
            return
        self._shortages += 1
        if self._shortages > MAX_SHORTAGES:
            self._give_up("passes of several kinds take turns, and there is no memory for graphs beside eager passes")
        else:
            self.release()

    def _count(self, done: _Pass) -> None:
        """An eager pass has ended: whether it could have been captured, and was as those before it."""
        if not isinstance(done.output, Tensor):
            self._give_up(f"the last decoder layer returns a {type(done.output).__name__}")
            return
        reading = self._read(done)
        if reading is None:
            return
        kind = done.kind
        kind.seen = kind.seen + 1 if kind.key == reading.key else 1
        kind.key = reading.key

    def _read(self, done: _Pass) -> Reading | None:
        try:
            return read_call(done.hidden, done.calls)
        except Unreadable as why:
            self.obstacle = str(why)
            return None

    # -- capture and replay ------------------------------------------------------------------------------------------

    def _finish(self, current: _Pass) -> Any:
        """The last layer's output, of a pass whose layers have noted their arguments."""
        self._pass = None
        reading, kind = self._read(current), current.kind
        new = kind.key is None
        if reading is not None and new:
            kind.key = reading.key
        if reading is None or reading.key != kind.key:  # as the first layer is called, but not as the others are
            self._let_go([kind])
            kind.seen = 0
            return self._run(current.hidden, current.calls)
        self._take_gradients_back()
        if kind.captured is None:
            self._capture(kind, reading.tensors, current, new)
        if kind.captured is None:
            return self._run(current.hidden, current.calls)
        self.replays += 1
        ticket = Ticket()
        self._outstanding = weakref.ref(ticket)
        return replay(kind.captured, ticket, reading.tensors)

    def _take_gradients_back(self) -> None:
        """Before anything is replayed: what one graph has lent may lie where another one works."""
        captured = [kind.captured for kind in self._kinds.values() if kind.captured is not None]
        lent = list({id(each): each for one in captured for each in one.gradients}.values()) if self._lends else []
        if any(gradients.kept() for gradients in lent):
            logger.info("chronicals-trl: gradients are kept over a step; the CUDA graphs hand out copies from now on")
            self._lends = False
            self.release()  # and whoever keeps them has this memory
            return
        for gradients in lent:
            gradients.take_back()

    def _capture(self, kind: _Kind, tensors: list[Tensor], current: _Pass, new: bool) -> None:
        """Args: new: whether no pass of this kind has run yet, so that kernels may have to be compiled and loaded."""
        if self._recorder is None:
            self._recorder = CudaRecorder(tensors[0].device)
        self._let_smaller_go(tensors[0].numel())
        siblings = (k.captured for k in self._kinds.values() if k.state == kind.state and k.captured is not None)

        start, cause = time.perf_counter(), ""
        try:
            if new:
                # Two layers at a time: an addition between two of them is part of the second one's kernels.
                pairs = [range(i, min(i + 2, len(self.layers))) for i in range(0, len(self.layers), 2)]
                rehearse(self._parts(current, tensors, pairs), tensors, self._state.modules)
            segments = self._parts(current, tensors, self._segments)
            kind.captured = Captured(
                self._recorder, segments, tensors, self._state.modules, next(siblings, None), self._lends,
                apart=len(self._sizes) > 1,
            )  # fmt: skip
            # Forward alone, and without gradients, for the memory's sake.
            require_equal(kind.captured, tensors, lambda: self._run(current.hidden, current.calls))
        except Exception as error:  # a model whose layers cannot be captured is trained without
            cause = _told(error)
        if cause:  # out of the handler, whose traceback would keep the memory
            self._give_up(f"the layers cannot be captured ({cause})")
            return
        kind.seen = WARM_UP  # its kernels have run: should it go, it needs no eager pass, whatever others there are
        self.captures += 1
        logger.info(
            "chronicals-trl: %d decoder layers captured as CUDA graphs in %.1f s",
            len(self.layers),
            time.perf_counter() - start,
        )

    def _let_smaller_go(self, size: int) -> None:
        """Before a capture with so many numbers in its hidden states, all graphs, if their memory is too small.

        It keeps its size where the largest one has gone by itself.
        """
        if size > self._largest:
            self.release()
        self._largest = max(self._largest, size)

    def _parts(self, current: _Pass, tensors: list[Tensor], ranges: Sequence[range]) -> list[Segment]:
        """Ranges of a pass's layers, whose arguments hold `tensors`, in the place of which others may be given."""

        def run(layers: range, hidden: Tensor, statics: Sequence[Tensor]) -> Tensor:
            replacements = dict(zip(map(id, tensors), statics, strict=True))
            calls = [exchange(call, replacements) for call in current.calls]
            output: Tensor = self._run(hidden, calls, layers)
            return output

        trainable = [self._state.trainable(self.layers[layers.start : layers.stop]) for layers in ranges]
        return [
            Segment(functools.partial(run, layers), parameters)
            for layers, parameters in zip(ranges, trainable, strict=True)
        ]


def _segments(layers: int, segments: int) -> list[range]:
    """The layers in so many parts of about one size, but for the first layer, which is one by itself.

    Its gradients come last: while they are sent, there is nothing left to compute.
    """
    if segments == 1 or layers == 1:
        return [range(layers)]
    cuts = [1 + (layers - 1) * number // (segments - 1) for number in range(segments)]
    return [range(*ends) for ends in itertools.pairwise([0, *cuts]) if len(range(*ends))]


def _told(error: BaseException) -> str:
    """The error in a line, with the one before it: ending a capture that is invalid raises another."""
    text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}"
    return text if error.__context__ is None else f"{text}; after {_told(error.__context__)}"
