"""Where a kernel finds the rows of a tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chronicals_trl.kernels._common import row_stride

QKV = torch.empty(2, 5, 80)  # a fused projection of (4 + 3 + 3) heads of 8


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(8), 8),
        (torch.empty(1, 1, 8), 8),
        (torch.empty(2, 5, 8), 8),
        (QKV[..., :32], 80),  # gaps between rows, but one stride
        (QKV[..., 32:].unflatten(-1, (6, 8)), None),
        (QKV[..., :32].unflatten(-1, (4, 8)).transpose(1, 2), None),
        (QKV[:, :1, :32].unflatten(-1, (4, 8)), None),
        (QKV[:1, :1, :32].unflatten(-1, (4, 8)), 8),
        (QKV.unflatten(-1, (10, 8)), 8),
        (torch.empty(2, 5, 8).transpose(0, 1), None),
        (torch.empty(1, 5, 8).transpose(0, 1), 8),
        (torch.empty(8).expand(2, 5, 8), 0),
        (torch.empty(2, 1, 8).expand(2, 5, 8), None),
        (torch.empty(10, 8)[::3], 24),
    ],
)
def test_views_of_models(tensor, expected):
    assert row_stride(tensor.shape, tensor.stride()) == expected


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    strides=st.lists(st.sampled_from([0, 1, 3, 4, 6, 8, 12, 24, 48]), min_size=5, max_size=5),
)
def test_it_is_one_stride_or_there_is_none(shape, strides):
    """Against the definition: row i begins i strides after row 0, for all rows."""
    strides = strides[: len(shape)]
    starts = torch.arange(1000).as_strided(shape[:-1], strides[:-1]).flatten().tolist()
    found = row_stride(shape, strides)
    if len(starts) == 1:
        assert found == shape[-1]
    elif found is None:
        assert starts != [i * starts[1] for i in range(len(starts))]
    else:
        assert starts == [i * found for i in range(len(starts))]
