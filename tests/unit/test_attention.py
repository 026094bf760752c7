"""The masks and document boundaries of packed attention, against values written out by hand."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chronicals_trl import patch_model, unpatch_model
from chronicals_trl.model.attention import _attention_forward
from chronicals_trl.model.attention_rows import block_diagonal_mask, cu_seqlens_of_positions, document_ids


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


def test_a_chunk_after_a_cache_is_no_packed_row() -> None:
    """Queries that continue a cache attend to its keys too, whatever `cu_seq_lens_q` the caller passes along."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, False
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 3, 8, generator=generator)
    key, value = (torch.randn(1, 2, 8, 8, generator=generator) for _ in range(2))
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    ours, _ = _attention_forward("blockwise", module, query, key, value, None, cu_seq_lens_q=offsets)
    theirs, _ = sdpa_attention_forward(module, query, key, value, None)
    assert torch.equal(ours, theirs)
    # The same queries with keys of their own are a packed row.
    own, _ = _attention_forward(
        "blockwise", module, query, key[:, :, :3], value[:, :, :3], None, cu_seq_lens_q=offsets
    )
    assert own.shape == ours.shape and not torch.allclose(own, ours)


def test_what_is_set_on_a_patched_model_outlives_the_patch() -> None:
    """The patched model has a copy of its configuration; the original comes back with what was set on the copy."""
    model = tiny_models.build("llama")
    config = model.config
    patch_model(model)
    assert model.config is not config and model.model.layers[0].self_attn.config is model.config
    model.config.use_cache = False
    model.config.name_of_the_user = "kept"
    unpatch_model(model)
    assert model.config is config and model.model.layers[0].self_attn.config is config
    assert (config.use_cache, config.name_of_the_user) == (False, "kept")
    assert config._attn_implementation == "sdpa"
