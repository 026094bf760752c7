"""What kernels with rank-sized products inside share: which ranks they take, loads of factors, launches.

Legend: R rank, padded to a power of two of at least 16.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: a pointer has no Python type.)
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._common import INTERPRET, Launch, jit, multiprocessors, tl, triton

MAX_RANK = 64  # the tiles of rank-sized factors grow with it; beyond, the GEMMs amortise their passes better


class Factors(NamedTuple):
    """One low-rank product scale (left right): left (M, R) with rows at one stride; right B (I, R), or A (R, I)."""

    left: Tensor
    right: Tensor
    scale: float = 1.0


class Dropped(NamedTuple):
    """What an adapter reads of a tensor (M, I) after dropout: the elements of `mask`, times `missing`."""

    mask: Tensor  # (M, I) uint8, contiguous
    missing: float  # 1 / (1 - p)


def supported(dtype: torch.dtype, adapter_dtype: torch.dtype, ranks: list[int]) -> bool:
    """Whether the kernels take adapters of these ranks. float32 products would leave the tensor cores."""
    narrow = dtype in (torch.float16, torch.bfloat16) or INTERPRET
    return narrow and dtype == adapter_dtype and bool(ranks) and max(ranks) <= MAX_RANK


# -- in kernels -----------------------------------------------------------------------------------------------------


@jit
def factor(ptr, index, limit, stride, rank, R: tl.constexpr):
    """Rows `index` of an (n, rank) matrix, as (len(index), R) with zeros beyond `limit` and `rank`."""
    r = tl.arange(0, R)
    mask = (index < limit)[:, None] & (r < rank)[None, :]
    return tl.load(ptr + tl.cast(index, tl.int64)[:, None] * stride + r[None, :], mask=mask, other=0.0)


@jit
def wide_factor(ptr, col, n_cols, stride, rank, R: tl.constexpr):
    """Columns `col` of a (rank, n_cols) matrix, as (R, len(col))."""
    r = tl.arange(0, R)
    mask = (r < rank)[:, None] & (col < n_cols)[None, :]
    return tl.load(ptr + tl.cast(r, tl.int64)[:, None] * stride + col[None, :], mask=mask, other=0.0)


@jit
def dot(left, right, total):
    return tl.dot(left, right, total, input_precision="ieee")


# -- launches --------------------------------------------------------------------------------------------------------


def padded_rank(ranks: tuple[int, ...]) -> int:
    """Inner dimension of the products: at least 16, which the tensor cores need, and a power of two for the tiles."""
    return max(16, triton.next_power_of_2(max(ranks)))


def tiled_launch(kernel: Any, grid: int, fixed: tuple[Any, ...], options: dict[str, int]) -> Launch:
    tile = (options["BLOCK_M"], options["BLOCK_N"], options["STAGES"])
    return Launch(kernel, grid, *fixed, *tile, num_warps=options["num_warps"])


def split_rows(
    shape: Sequence[int], options: dict[str, int], programs: int, device: torch.device
) -> tuple[int, int, int]:
    """For programs that own rows: how many; among how many a row's columns are split; columns of each."""
    blocks, tiles = triton.cdiv(shape[0], options["BLOCK_M"]), triton.cdiv(shape[1], options["BLOCK_N"])
    n_shares = max(1, min(tiles, programs * multiprocessors(device) // blocks))
    share_cols = triton.cdiv(tiles, n_shares) * options["BLOCK_N"]
    n_shares = triton.cdiv(shape[1], share_cols)  # none without columns
    return blocks * n_shares, n_shares, share_cols


def split_columns(
    shape: Sequence[int], options: dict[str, int], programs: int, device: torch.device
) -> tuple[int, int]:
    """For programs that own columns: how many; among how many a column's rows are split."""
    blocks, tiles = triton.cdiv(shape[1], options["BLOCK_N"]), triton.cdiv(shape[0], options["BLOCK_M"])
    n_shares = max(1, min(tiles, programs * multiprocessors(device) // blocks))
    return blocks * n_shares, n_shares


def add_up(shares: Tensor) -> Tensor:
    """The sum of float32 shares over the first dimension: torch's, as these are much wider than a norm's."""
    return shares[0] if shares.shape[0] == 1 else shares.sum(0)
