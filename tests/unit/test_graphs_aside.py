"""Gradients of weights made aside while the stack's backward pass is recorded; on the CPU, by a stand-in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_graphs import Pair

from chronicals_trl.model.graphs import WARM_UP


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_they_are_done_when_the_recording_ends(family: str, segments: int) -> None:
    pair = Pair(family, segments=segments)
    pair.step()
    for _ in range(WARM_UP + 2):
        pair.step()
    assert pair.stack.replays == 3
    assert pair.recorder.deferred.done > 0


def test_layers_that_share_a_weight_make_theirs_at_once() -> None:
    """Autograd adds the two up as they come."""
    pair = Pair("qwen2")

    def share(model: Any) -> None:
        first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
        second.k_proj.weight = first.k_proj.weight

    pair.both(share)
    assert pair.replayed(WARM_UP + 3) == 3
    assert pair.recorder.deferred.done == 0


def test_weights_that_autocast_casts() -> None:
    pair = Pair("qwen2")
    loss = pair.loss

    def under_autocast(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    pair.loss = under_autocast  # type: ignore[method-assign]
    assert pair.replayed(WARM_UP + 3) == 3
    assert pair.recorder.deferred.done == 0
