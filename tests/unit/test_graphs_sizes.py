"""Batches of several sizes: which are captured when they first come, and whose graphs go before whose; on the CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_models
import torch
from graph_stand_in import StandIn
from test_graphs import FAMILIES, Pair
from torch import Tensor, nn

from chronicals_trl.model import graphs
from chronicals_trl.model.graph_capture import Captured, Segment, rehearse
from chronicals_trl.model.graphs import WARM_UP, WARM_UP_OF_A_SHAPE

USUAL = (13, 9, 5, 5)  # 32 tokens, as `Pair.step` has them
SMALL, LARGE = (12, 8, 4), (20, 12, 16)
SIZES = (24, 32, 48)


def captured(pair: Pair) -> set[int]:
    """Tokens of the passes that have a graph."""
    found = (kind.captured for kind in pair.stack._kinds.values())
    return {each.inputs[0].shape[:-1].numel() for each in found if each is not None}


# -- sizes that are known --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*({"family": name} for name in FAMILIES), {"lora": 0.0}, {"lora": 0.3}], ids=str)
@pytest.mark.parametrize("lengths", [SMALL, LARGE])
def test_the_first_pass_of_a_known_size_is_captured(lengths: tuple[int, ...], options: dict[str, Any]) -> None:
    """And the same as an eager one, dropout's masks included: the rehearsal draws none."""
    pair = Pair(sizes=SIZES, **options)
    assert pair.replayed(WARM_UP + 1) == 1
    assert pair.replayed(2, lengths=lengths) == 2 and pair.stack.captures == 2
    assert pair.replayed(2) == 2


def test_one_of_another_size_runs_eagerly_first() -> None:
    pair = Pair(sizes=[32, 40])
    pair.replayed(WARM_UP + 1)
    assert WARM_UP_OF_A_SHAPE == 1
    assert pair.replayed(1, lengths=SMALL) == 0 and pair.replayed(1, lengths=SMALL) == 1


def test_before_the_first_capture_known_sizes_run_eagerly_too() -> None:
    pair = Pair(sizes=SIZES)
    assert pair.replayed(WARM_UP - 1) == pair.replayed(1, lengths=SMALL) == pair.replayed(1) == 0
    assert pair.stack.captures == 0 and pair.replayed(1) == 1


@pytest.mark.parametrize("segments", [1, 3])
def test_accumulated_over_sizes(segments: int) -> None:
    pair = Pair(sizes=SIZES, segments=segments)
    pair.replayed(WARM_UP + 1)
    for lengths in (SMALL, LARGE, SMALL):
        assert pair.replayed(1, micro=2, lengths=lengths) == 2
        assert pair.replayed(1, zero=False) == 1
    assert captured(pair) == set(SIZES)


def test_two_layers_at_a_time_are_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pass that nobody has seen; never of one that has run."""
    rehearsals: list[list[int]] = []

    def watching(segments: Sequence[Segment], *args: Any) -> None:
        rehearsals.append([len(segment.parameters) for segment in segments])
        rehearse(segments, *args)

    monkeypatch.setattr(graphs, "rehearse", watching)
    pair = Pair(sizes=[24, 32])
    pair.replayed(WARM_UP + 1)
    assert rehearsals == []
    pair.replayed(2, lengths=SMALL)
    each = len(list(pair.ours.model.layers[0].parameters()))
    assert rehearsals == [[2 * each, each]]  # of three layers
    pair.replayed(WARM_UP_OF_A_SHAPE + 1, lengths=(15, 25))
    pair.stack.release()
    pair.replayed(2)
    assert len(rehearsals) == 1


def test_a_pass_that_changes_after_its_capture_is_looked_at_again() -> None:
    pair = Pair(sizes=SIZES)
    pair.replayed(WARM_UP + 1)
    pair.replayed(2, lengths=SMALL)
    (kind,) = [k for k in pair.stack._kinds.values() if k.captured is not None and k.captured.inputs[0].shape[1] == 24]
    kind.key = ("as the first layer is called, but not as the others are",)
    assert pair.replayed(1, lengths=SMALL) == 0 and kind.captured is None
    assert pair.replayed(1, lengths=SMALL) == 0 and kind.seen == 1  # not at once: it has not been the same each time
    assert pair.replayed(2, lengths=SMALL) == 2


def test_a_capture_that_fails_after_its_rehearsal_ends_the_graphs_alone() -> None:
    pair = Pair(recorder=StandIn(fails_at=3), sizes=SIZES)
    assert pair.replayed(WARM_UP + 1) == 1
    assert pair.replayed(2, lengths=SMALL) == 0  # as ever, by losses and gradients
    assert "cannot be captured" in str(pair.stack.reason)


# -- the rehearsal ---------------------------------------------------------------------------------------------------


def rehearsed(run: Callable[[Tensor, Sequence[Tensor]], Tensor], module: nn.Linear, hidden: Tensor) -> None:
    rehearse([Segment(run, [p for p in module.parameters() if p.requires_grad])] * 2, [hidden], [module])


def test_it_runs_each_segment_there_and_back_and_leaves_nothing() -> None:
    linear, hidden = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    given: list[Tensor] = []
    backward: list[int] = []

    def run(x: Tensor, statics: Sequence[Tensor]) -> Tensor:
        given.append(x)
        assert linear.weight is not weight  # whose hooks are the user's
        output = torch.dropout(linear(x), 0.5, True)
        output.register_hook(lambda gradient: backward.append(1))
        return output

    weight = linear.weight
    weight.register_hook(lambda gradient: pytest.fail("the parameter's own hook"))
    state = torch.get_rng_state()
    rehearsed(run, linear, hidden)
    assert len(given) == len(backward) == 2
    assert given[0].grad_fn is None and given[1].grad_fn is None and given[1].requires_grad
    assert linear.weight is weight and weight.grad is None and hidden.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_trained_has_no_way_back() -> None:
    linear = nn.Linear(4, 4).requires_grad_(False)
    calls: list[Tensor] = []

    def run(x: Tensor, statics: Sequence[Tensor]) -> Tensor:
        calls.append(x)
        return linear(x)

    rehearsed(run, linear, torch.randn(3, 4))
    assert len(calls) == 2 and not calls[1].requires_grad


def test_hooks_on_the_hidden_states_are_not_run() -> None:
    hidden = torch.randn(3, 4, requires_grad=True) * 2
    hidden.register_hook(lambda gradient: pytest.fail("the user's hook"))
    linear = nn.Linear(4, 4)
    rehearsed(lambda x, statics: linear(x), linear, hidden)


def test_it_runs_under_autocast_as_the_capture_will() -> None:
    """Without autocast's cache, which would keep the casts; and the way back without autocast."""
    linear = nn.Linear(4, 4)
    there, back = [], []

    def run(x: Tensor, statics: Sequence[Tensor]) -> Tensor:
        output = linear(x)
        there.append((output.dtype, torch.is_autocast_cache_enabled()))
        output.register_hook(lambda gradient: back.append(torch.is_autocast_enabled("cpu")))
        return output

    with torch.autocast("cpu", torch.bfloat16):
        rehearsed(run, linear, torch.randn(3, 4))
        assert torch.is_autocast_cache_enabled()
    assert there == [(torch.bfloat16, False)] * 2 and back == [False] * 2


# -- the largest first -----------------------------------------------------------------------------------------------


def test_the_others_go_before_a_larger_one_is_captured() -> None:
    pair = Pair(sizes=SIZES)
    pair.replayed(WARM_UP + 1)
    pair.replayed(1, lengths=SMALL)  # fits into the memory of the usual one
    assert captured(pair) == {24, 32} and pair.recorder.released == 0
    assert pair.replayed(1, lengths=LARGE) == 1
    assert captured(pair) == {48} and pair.recorder.released == 1
    # Without an eager pass, or another rehearsal.
    assert pair.replayed(1, lengths=SMALL) == pair.replayed(1) == 1
    assert captured(pair) == set(SIZES) and pair.recorder.released == 1
    assert pair.stack.captures == 5
    assert pair.replayed(2, lengths=LARGE) == pair.replayed(2) == pair.replayed(2, lengths=SMALL) == 2
    assert pair.stack.captures == 5


def test_nothing_holds_those_that_go_while_the_larger_one_is_captured() -> None:
    """Their memory would be there beside the new one's."""
    alive: list[int] = []

    class Looking(StandIn):
        before: Sequence[weakref.ref[Captured]] = ()

        def record(self, work: Callable[[], Any]) -> Any:
            gc.collect()  # the stand-in's own cycles
            alive.append(sum(ref() is not None for ref in self.before))
            return super().record(work)

    recorder = Looking()
    pair = Pair(recorder=recorder, sizes=SIZES)
    pair.replayed(WARM_UP + 1)
    pair.replayed(1, lengths=SMALL)
    recorder.before = [weakref.ref(k.captured) for k in pair.stack._kinds.values() if k.captured is not None]
    alive.clear()
    assert len(recorder.before) == 2 and pair.replayed(1, lengths=LARGE) == 1
    assert alive == [0, 0]


def test_so_do_those_of_sizes_that_nobody_knows() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    assert pair.replayed(1, lengths=LARGE) == 0
    assert captured(pair) == {32} and pair.recorder.released == 0  # it may never come again
    assert pair.replayed(1, lengths=LARGE) == 1
    assert captured(pair) == {48} and pair.recorder.released == 1
    assert pair.replayed(1) == 1


def test_in_another_state_too_they_come_back_without_eager_passes() -> None:
    """One of the graphs that go may be the only one of its state, and have been captured at its first pass."""
    pair = Pair(sizes=SIZES, lora=0.2)

    def dropout(p: float) -> None:
        pair.both(lambda m: [setattr(d, "p", p) for d in m.modules() if isinstance(d, nn.Dropout)])

    pair.replayed(WARM_UP + 1)
    assert pair.replayed(1, lengths=SMALL) == 1
    dropout(0.4)
    assert pair.replayed(WARM_UP + 1, lengths=LARGE) == 1 and captured(pair) == {48}
    dropout(0.2)
    assert pair.replayed(1, lengths=SMALL) == pair.replayed(1) == 1


def test_after_a_release_a_graph_of_a_known_size_needs_no_eager_pass() -> None:
    """As after an evaluation; and the memory is sized anew."""
    pair = Pair(sizes=SIZES)
    pair.replayed(WARM_UP + 1)
    pair.replayed(1, lengths=SMALL)
    pair.stack.release()
    assert pair.replayed(1, lengths=SMALL) == 1 and captured(pair) == {24}
    assert pair.replayed(1) == 1 and captured(pair) == {32}


def test_the_largest_one_that_goes_by_itself_takes_no_other_with_it() -> None:
    """Gemma 3's padded batches: one without any padding has no mask in the layers with full attention, and is as ever
    in the first one, whose window is shorter. The largest graph then goes, but not what it has made of the pool."""
    pair = Pair("gemma3", sizes=(32, 64), layer_types=["sliding_attention", "full_attention", "sliding_attention"])

    def replayed(length: int, *padding: int) -> list[bool]:
        results = []
        for tokens in padding:
            pair.seed += 1
            mask = torch.arange(length) < torch.tensor([[length], [length - tokens]])
            ids = tiny_models.packed_batch((2 * length,), seed=pair.seed)["input_ids"].view(2, length)
            batch = {"input_ids": ids, "labels": ids, "attention_mask": mask.long()}
            results.append(pair.stack.replays)
            pair.both(lambda model: model.zero_grad(set_to_none=True))
            with pair.stack.enabled():
                ours = pair.loss(pair.ours, batch)
                ours.backward()
            theirs = pair.loss(pair.theirs, batch)
            theirs.backward()
            assert torch.equal(ours, theirs)
            pair.require_equal_gradients()
            results[-1] = pair.stack.replays > results[-1]
        return results

    assert replayed(32, *[3] * (WARM_UP + 1))[-1] and replayed(16, 3) == [True]
    for captures in (3, 4):
        assert replayed(32, 0) == [False] and captured(pair) == {32}
        assert replayed(32, 3, 3, 3) == [False, True, True]
        assert captured(pair) == {32, 64} and pair.stack.captures == captures and not pair.recorder.released
        assert replayed(16, 3) == [True]


def test_another_kind_of_the_same_size_is_captured_beside_it() -> None:
    pair = Pair(sizes=SIZES)
    pair.replayed(WARM_UP + 1)
    assert pair.replayed(1, lengths=(16, 16)) == 1  # other offsets
    assert pair.stack.captures == 2 and pair.recorder.released == 0
    assert pair.replayed(1) == 1 and pair.stack.captures == 2


def test_gradients_that_are_kept_outlive_the_graphs_that_go() -> None:
    """Accumulated ones lie in the memory of the smaller graph, which is given back between two micro-batches."""
    pair = Pair(sizes=SIZES)
    pair.replayed(WARM_UP + 2)
    assert pair.replayed(1, zero=False) == 1
    assert pair.replayed(1, zero=False, lengths=LARGE) == 1
    assert pair.replayed(1, zero=False) == 1


def test_a_graph_that_goes_alone_takes_back_what_it_has_lent() -> None:
    """One of another state stays, which has gradients' memory of its own, and may work where these lie."""
    pair = Pair(sizes=SIZES)
    projection = "model.layers.1.mlp.up_proj.weight"
    for trained in (True, False, True):
        pair.both(lambda model, trained=trained: model.get_parameter(projection).requires_grad_(trained))
        pair.replayed(WARM_UP + 1)
    first, second = pair.stack._kinds.values()
    assert first.captured is not None and second.captured is not None
    lent = {t.data_ptr() for gradients in first.captured.gradients for t in gradients.tensors if t is not None}
    gradients = [p.grad for p in pair.ours.parameters() if p.grad is not None]
    before = [gradient.clone() for gradient in gradients]
    assert any(gradient.data_ptr() in lent for gradient in gradients)
    memory = first.captured  # else its addresses could be another's by now
    pair.stack._let_go([first])
    assert first.captured is None and second.captured is not None and memory is not None
    assert not any(p.grad is not None and p.grad.data_ptr() in lent for p in pair.ours.parameters())
    assert all(map(torch.equal, [p.grad for p in pair.ours.parameters() if p.grad is not None], before))
