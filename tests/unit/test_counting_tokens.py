"""A step's token counts over several ranks: numbers are filled in on the GPU; a copy waits for all that is queued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chronicals_trl.observe.trainer import ThroughputMixin


class Fills(TorchDispatchMode):
    """Counts the tensors that are made by filling them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.full.default
        return func(*args, **(kwargs or {}))


def test_numbers_are_filled_in_where_they_are_needed() -> None:
    device = torch.device("meta")  # stands for the GPU
    updates: list[tuple[Any, ...]] = []
    trainer = SimpleNamespace(
        args=SimpleNamespace(world_size=2), accelerator=SimpleNamespace(reduce=lambda counts, reduction: counts),
        _data_ranks=lambda: 2, _real_tokens=0, _meter=SimpleNamespace(update=lambda *counts: updates.append(counts)),
    )  # fmt: skip
    batch = {
        "input_ids": torch.zeros(1, 24, dtype=torch.long, device=device),
        "cu_seq_lens_q": torch.zeros(4, dtype=torch.int32, device=device),
        "num_real_tokens": 20,
    }
    with Fills() as fills:
        ThroughputMixin._count_tokens(trainer, [batch], device)  # type: ignore[arg-type]
    assert fills.count == 3  # real tokens, slots, filled batches
    assert all(count.device == device and count.dtype == torch.int64 for count in updates[0])
