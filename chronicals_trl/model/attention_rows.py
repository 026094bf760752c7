"""Where the documents of a batch lie, as cumulative lengths and as masks; rows as the kernels take them.

Legend: B rows, H heads, S length of a row, D head dimension, T tokens of all rows (B * S), N documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "block_diagonal_mask",
    "cu_seqlens_of_padding",
    "cu_seqlens_of_positions",
    "cu_seqlens_of_rows",
    "document_ids",
    "heads_first",
    "tokens_first",
]


def document_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The document of each token, (T,) int64, from cumulative lengths (N+1,); empty documents are skipped over."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), positions, right=True)


def block_diagonal_mask(cu_seqlens: Tensor, length: int, window: int | None = None, *, rows: int = 1) -> Tensor:
    """Boolean mask (B, 1, S, S): causal, inside one document, and inside the sliding window if there is one.

    Args:
        cu_seqlens: (N+1,) over the tokens of all rows, one row after the other; no document spans two rows.
        length, rows: S and B.
    """
    documents = document_ids(cu_seqlens, rows * length).view(rows, length)
    positions = torch.arange(length, device=cu_seqlens.device)
    distance = positions[:, None] - positions[None, :]
    mask = (documents[:, :, None] == documents[:, None, :]) & (distance >= 0)
    if window is not None:
        mask &= distance < window
    return mask[:, None]


def cu_seqlens_of_positions(position_ids: Tensor) -> Tensor:
    """Cumulative document lengths (N+1,) int32 of one packed row, from position ids (1, T) that restart at 0.

    Reads the device back (the number of documents is data): only for batches whose collator gave no `cu_seq_lens_q`.
    """
    flat = position_ids.reshape(-1)
    starts = (flat == 0).nonzero().flatten().to(torch.int32)
    return torch.cat([starts, starts.new_tensor([flat.numel()])])


def cu_seqlens_of_rows(rows: int, length: int, device: torch.device | str) -> Tensor:
    """(B+1,) int32: each row is one document."""
    return torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)


def cu_seqlens_of_padding(mask: Tensor) -> Tensor:
    """(2B+1,) int32: in each row the real tokens and the padding are a document each, in the order in which they lie.

    So the number of documents is that of the rows, whatever their lengths, and padding costs no more than it does
    with a dense mask. A row without padding has an empty document, a row of padding alone too.

    Args:
        mask: (B, S), nonzero where a token is real; the padding of a row is on one side.
    """
    rows, length = mask.shape
    real = mask.bool()
    lengths = real.sum(1)
    boundary = torch.where(real[:, 0], lengths, length - lengths)
    starts = torch.arange(0, rows * length, length, device=mask.device)
    ends = torch.stack([starts + boundary, starts + length], dim=1).flatten()
    return F.pad(ends, (1, 0)).to(torch.int32)


def tokens_first(x_BHSD: Tensor) -> Tensor:
    """(B, H, S, D), strided as transformers' attention has it, to (T, H, D): a view."""
    heads, dim = x_BHSD.shape[1], x_BHSD.shape[3]
    return x_BHSD.transpose(1, 2).reshape(-1, heads, dim)


def kernel_rows(x_BHSD: Tensor) -> Tensor:
    """`tokens_first` for the inside of an op, where nothing is differentiated: one operation less where it is a view.

    Detached: a kernel is handed plain memory, and a view of what requires a gradient would require one too.
    """
    batch, heads, length, dim = x_BHSD.shape
    of_batch, of_head, of_token, of_element = x_BHSD.stride()
    if batch == 1 or of_batch == length * of_token:
        return x_BHSD.detach().as_strided((batch * length, heads, dim), (of_token, of_head, of_element))
    return tokens_first(x_BHSD.detach())


def heads_first(x_THD: Tensor, like_BHSD: Tensor) -> Tensor:
    """The way back, to the shape of `like_BHSD`."""
    batch, heads, length, _ = like_BHSD.shape
    return x_THD.view(batch, length, heads, -1).transpose(1, 2)
