"""The masks and document boundaries of packed attention, against values written out by hand."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch

from chronicals_trl import patch_model
from chronicals_trl.model.attention import block_diagonal_mask, cu_seqlens_of_positions, document_ids


def test_block_diagonal_mask_by_hand() -> None:
    """Documents of 3 and 2 tokens, and two empty ones at the end, as padded cu_seqlens have them."""
    mask = block_diagonal_mask(torch.tensor([0, 3, 5, 5, 5], dtype=torch.int32), 5)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert mask.shape == (1, 1, 5, 5) and mask[0, 0].int().tolist() == expected


def test_a_window_of_two_is_the_token_and_its_predecessor() -> None:
    mask = block_diagonal_mask(torch.tensor([0, 4, 5], dtype=torch.int32), 5, window=2)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert mask[0, 0].int().tolist() == expected


def test_documents_of_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    offsets = cu_seqlens_of_positions(positions)
    assert offsets.tolist() == [0, 3, 4, 6] and offsets.dtype == torch.int32
    assert document_ids(offsets, 6).tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_our_own_mask_equals_transformers(family: str) -> None:
    """With a cache transformers builds no packed mask and ours is used: the losses must be those without a cache."""
    batch = tiny_models.packed_batch()
    model = tiny_models.build(family)
    patch_model(model)
    with torch.no_grad():
        assert model(**copy.copy(batch)).loss.item() == pytest.approx(
            model(**copy.copy(batch), use_cache=False).loss.item(), rel=1e-6
        )
