"""One gradient for a weight that the input embedding and the head share.

Torch makes two, each as large as the weight, and adds them. Here the embedding leaves the head a second view of the
weight, whose gradient comes back to the embedding's own autograd node, and that adds the rows of the batch's tokens in
place (`kernels._embedding_rows`). So the weight gets one gradient, in one piece, and whatever listens for it (DDP,
hooks, the fused optimizer) sees no difference.

The view is left for the head of the same forward pass alone, and nowhere that another pass could find it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from chronicals_trl.kernels import linear_cross_entropy
from chronicals_trl.kernels._embedding_rows import tied_embedding
from chronicals_trl.model.match import compare, probing, randn

__all__ = [
    "APART",
    "TOGETHER",
    "Handover",
    "embedding_forward",
    "handover",
    "input_embedding",
    "is_tied",
    "obstacle",
    "verify",
]

# What the report says.
TOGETHER = "one gradient for the weight that the embedding shares"
APART = "the embedding makes its own gradient of the weight that they share"


class Handover:
    """What the embedding leaves for the head in one forward pass.

    Args:
        embedding: whose first lookup is awaited.
        weight: that it shares with the head.
    """

    def __init__(self, embedding: nn.Embedding, weight: Tensor) -> None:
        self._embedding, self._weight = embedding, weight
        self._view_VH: Tensor | None = None

    def awaits(self, embedding: nn.Embedding, ids: Any) -> bool:
        """Whether this lookup is the one. Of several the first is; gradients are off where a layer is computed again.

        Hooks may have put another weight in its place, or taken its gradient, since the pass began.
        """
        return (
            self._view_VH is None
            and embedding is self._embedding
            and embedding.weight is self._weight
            and self._weight.requires_grad
            and torch.is_grad_enabled()
            and type(ids) is Tensor
        )

    def look_up(self, ids: Tensor) -> Tensor:
        rows, self._view_VH = tied_embedding(ids, self._weight, self._embedding.padding_idx)
        return rows

    def weight_for(self, head: nn.Linear) -> Tensor:
        """The weight with which `head` computes: what the embedding has left, once, or its own."""
        view_VH, self._view_VH = self._view_VH, None
        return view_VH if view_VH is not None and head.weight is self._weight else head.weight


_current: ContextVar[Handover | None] = ContextVar("chronicals_trl_handover", default=None)


@contextmanager
def handover(model: Any, head: Any) -> Iterator[Handover | None]:
    """While open, the embedding of `model` leaves `head` its view of their weight, if all is as patching found it."""
    embedding = model.get_input_embeddings()
    if obstacle(model, embedding, head) is not None:
        yield None
        return
    current = Handover(embedding, embedding.weight)
    token = _current.set(current)
    try:
        yield current
    finally:
        _current.reset(token)


def embedding_forward(self: nn.Embedding, *args: Any, **kwargs: Any) -> Any:
    """The forward of a patched embedding: its own, but for the one lookup that a `handover` awaits."""
    if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
        current = _current.get()
        if current is not None and current.awaits(self, args[0]):
            return current.look_up(args[0])
    return type(self).forward(self, *args, **kwargs)


embedding_forward.__name__ = "forward"  # a bound method pickles by name, and has to find the class's own forward again


def _replaced(embedding: Any) -> bool:
    """Whether the forward on the instance is ours: offloading puts its own around it, and moves the weight."""
    return getattr(embedding.__dict__.get("forward"), "__func__", None) is embedding_forward


# -- what fits -------------------------------------------------------------------------------------------------------


def input_embedding(model: Any) -> Any:
    """The model's input embedding, or None."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def is_tied(embedding: Any, head: Any) -> bool:
    """Whether both hold the very same weight, and it is trained."""
    weight = getattr(embedding, "weight", None)
    return isinstance(weight, Tensor) and weight.requires_grad and weight is getattr(head, "weight", None)


def obstacle(model: Any, embedding: Any, head: Any) -> str | None:
    """Why the weight of `embedding` and `head` gets its gradient as ever; None if nothing is in the way."""
    if type(embedding) is not nn.Embedding:
        return f"it is a {type(embedding).__name__}"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}"
    if not is_tied(embedding, head):
        return "its weight is not the head's, or not trained"
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return "max_norm, scale_grad_by_freq or sparse is set"
    weight = embedding.weight
    # ZeRO-3's parameters have an id; FSDP2 puts plain ones in the place of its own while a unit computes.
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id") or any(map(_fsdp_unit, (model, model.base_model))):
        return "its weight is sharded, or no plain parameter"
    if "forward" in embedding.__dict__ and not _replaced(embedding):
        return "another library has replaced its forward"
    return None


def verify(embedding: nn.Embedding, device: torch.device, dtype: torch.dtype) -> None:
    """Raise Mismatch unless a lookup and a head in one small weight give the gradients that torch's own give."""
    vocabulary, width = 53, embedding.embedding_dim
    padding_idx = None if embedding.padding_idx is None else 3
    with probing(device) as generator:
        weight_VH = (randn(vocabulary, width, generator=generator) * width**-0.5).to(device, dtype).requires_grad_()
        ids_N = torch.randint(vocabulary, (7,), generator=generator).to(device)
        ids_N[2:6] = torch.tensor([3, 5, 3, 5], device=device)

        def ours(factor_NH: Tensor) -> tuple[Tensor, Tensor]:
            rows_NH, view_VH = tied_embedding(ids_N, weight_VH, padding_idx)
            hidden_NH = rows_NH * factor_NH
            return hidden_NH, linear_cross_entropy(hidden_NH, view_VH, ids_N).loss

        def torchs(factor_NH: Tensor) -> tuple[Tensor, Tensor]:
            hidden_NH = nn.functional.embedding(ids_N, weight_VH, padding_idx) * factor_NH
            return hidden_NH, linear_cross_entropy(hidden_NH, weight_VH, ids_N).loss

        compare(ours, torchs, (randn(7, width, generator=generator).to(device, dtype),), (weight_VH,))


def _fsdp_unit(module: nn.Module) -> bool:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # which takes a while to import
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))
