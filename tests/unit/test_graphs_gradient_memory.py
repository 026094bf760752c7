"""Where the gradients of a second shape's graph are written: to the first one's memory, without a copy; on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_stand_in import StandIn
from test_graphs import Pair
from torch import nn

from chronicals_trl.kernels import _gradient_memory, shared_linear
from chronicals_trl.model import graphs
from chronicals_trl.model.graph_capture import Captured, Segment
from chronicals_trl.model.graphs import WARM_UP, WARM_UP_OF_A_SHAPE

OTHER = (16, 16)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the gradients that are copied while a pass is recorded, or replayed by the stand-in."""
    shapes: list[torch.Size] = []
    original = torch._foreach_copy_

    def foreach_copy(to: list[torch.Tensor], given: list[torch.Tensor]) -> None:
        shapes.extend(t.shape for t in to)
        original(to, given)

    monkeypatch.setattr(torch, "_foreach_copy_", foreach_copy)
    return shapes


def both_shapes(pair: Pair) -> None:
    assert pair.replayed(WARM_UP + 1) == 1
    pair.replayed(WARM_UP_OF_A_SHAPE, lengths=OTHER)
    for _ in range(2):
        assert pair.replayed(1, lengths=OTHER) == pair.replayed(1) == 1


@pytest.mark.parametrize("segments", [1, 3])
def test_products_are_written_where_they_are_to_lie(copied: list[torch.Size], segments: int) -> None:
    pair = Pair("qwen2", segments=segments)
    both_shapes(pair)
    attention = pair.ours.model.layers[0].self_attn
    assert copied  # o's, for one
    assert attention.k_proj.weight.shape not in copied


def test_a_weight_of_two_layers_has_its_gradients_added_up(copied: list[torch.Size]) -> None:
    pair = Pair("qwen2")

    def share(model: Any) -> None:
        first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
        second.k_proj.weight = first.k_proj.weight

    pair.both(share)
    both_shapes(pair)
    assert pair.ours.model.layers[0].self_attn.k_proj.weight.shape in copied


def test_two_parameters_on_one_memory(copied: list[torch.Size]) -> None:
    pair = Pair("qwen2")

    def alias(model: Any) -> None:
        first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
        second.k_proj.weight = nn.Parameter(first.k_proj.weight.detach())

    pair.both(alias)
    # Both are stepped, the one after the other: as in the other model.
    both_shapes(pair)
    assert pair.ours.model.layers[0].self_attn.k_proj.weight.shape in copied


def test_weights_that_autocast_casts() -> None:
    pair = Pair("qwen2")
    loss = pair.loss

    def under_autocast(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    pair.loss = under_autocast  # type: ignore[method-assign]
    both_shapes(pair)


def test_a_pass_that_trains_other_weights_has_memory_of_its_own() -> None:
    """Of a sibling without one of the gradients nothing may be overwritten."""
    owner = nn.Module()
    owner.first, owner.second = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    def one(hidden: torch.Tensor, _: Any) -> torch.Tensor:
        return shared_linear(hidden, [owner.first], [None])[0]

    def two(hidden: torch.Tensor, _: Any) -> torch.Tensor:
        return sum(shared_linear(hidden, [owner.first, owner.second], [None, None]))  # type: ignore[return-value]

    recorder, weights, x = StandIn(), [owner.first, owner.second], torch.randn(3, 4)
    fewer = Captured(recorder, [Segment(one, weights)], [x], [owner])
    more = Captured(recorder, [Segment(two, weights)], [x], [owner], fewer)
    again = Captured(recorder, [Segment(two, weights)], [x], [owner], more)
    addresses = [captured.gradients[0].tensors[0].data_ptr() for captured in (fewer, more, again)]
    assert addresses[0] != addresses[1] == addresses[2]
    for captured in (fewer, more, again):
        captured.forward([x])
        _, (first, *_) = captured.backward(0, torch.ones(3, 4))
        torch.testing.assert_close(first, x.sum(0).expand(4, 4))


class Listing(StandIn):
    """Notes what is there when something is recorded."""

    def __init__(self, made: list[int]) -> None:
        super().__init__()
        self.made, self.before = made, [0]

    def record(self, work: Any) -> Any:
        self.before.append(len(self.made))
        return super().record(work)


@pytest.mark.parametrize("apart", [True, False])
def test_memory_that_is_there_before_the_pass(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product is written into it; what is made in another way stays where it was made."""
    owner = nn.Module()
    owner.weight, owner.scale, owner.unused = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
    made: list[int] = []
    kept: list[torch.Tensor] = []

    def empty_like(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(original(tensor))
        made.append(kept[-1].data_ptr())
        return kept[-1]

    def run(hidden: torch.Tensor, _: Any) -> torch.Tensor:
        return shared_linear(hidden @ owner.scale, [owner.weight], [None])[0]

    original = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", empty_like)
    recorder, x = Listing(made), torch.randn(3, 4)
    captured = Captured(recorder, [Segment(run, list(owner.parameters()))], [x], [owner], apart=apart)
    monkeypatch.undo()
    weight, scale, unused = captured.gradients[0].tensors
    assert weight is not None and scale is not None and unused is None
    early = made[: recorder.before[1]]
    assert len(early) == (3 if apart else 0)
    assert (weight.data_ptr() in early) is apart and scale.data_ptr() not in early
    captured.forward([x])
    _, gradients = captured.backward(0, torch.ones(3, 4))
    torch.testing.assert_close(gradients[0], (x @ owner.scale).sum(0).expand(4, 4))
    torch.testing.assert_close(gradients[1], x.t() @ torch.ones(3, 4) @ owner.weight)


@pytest.mark.parametrize(("dtype", "taken"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_no_memory_for_what_autocast_casts(dtype: torch.dtype, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would lie there unused while the pass is captured, as large as all gradients."""
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.randn(4, 4, dtype=dtype))
    made: list[int] = []
    original = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t: made.append(t.data_ptr()) or original(t))
    recorder = Listing(made)

    def run(hidden: torch.Tensor, _: Any) -> torch.Tensor:
        return shared_linear(hidden, [owner.weight], [None])[0]

    with torch.autocast("cpu", torch.bfloat16):
        Captured(recorder, [Segment(run, [owner.weight])], [torch.randn(3, 4)], [owner], apart=True)
    assert recorder.before[1] == taken


@pytest.mark.parametrize(("sizes", "apart"), [((), False), ((24,), False), ((24, 48), True)])
def test_where_several_sizes_are_known(sizes: tuple[int, ...], apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Spy(Captured):
        def __init__(self, *args: Any, apart: bool, **kwargs: Any) -> None:
            given.append(apart)
            super().__init__(*args, apart=apart, **kwargs)

    monkeypatch.setattr(graphs, "Captured", Spy)
    pair = Pair("qwen2", sizes=sizes)
    both_shapes(pair)
    assert given and set(given) == {apart}


def test_memory_is_lent_while_it_is() -> None:
    a, b, weight, memory = torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 4), torch.zeros(2, 4)
    with pytest.raises(KeyError), _gradient_memory.lent({weight.data_ptr(): memory}):
        assert _gradient_memory.product(a, b, weight) is memory
        assert torch.equal(memory, a @ b)
        assert _gradient_memory.product(a, b, weight.clone()) is not memory
        raise KeyError
    assert _gradient_memory.product(a, b, weight) is not memory
