"""Products of a tensor of the model with one of an adapter, which may be wider (fp32 adapters on a bf16 model).

PEFT casts the model's tensor up, whole, and multiplies in fp32 outside of the tensor cores. Two ways to the same
numbers with less:

* on a GPU, for bf16 with fp32: an fp32 number is the sum of three bf16 numbers (8 bits of the significand each), so
  the product is the sum of three bf16 products, which the tensor cores make in one GEMM and add up in fp32. The pieces
  are rank-sized. Where the result is rounded to bf16 anyway, two pieces of each factor do (2^-16).
* elsewhere (fp16, whose range is too small for the pieces; the CPU): some rows are cast up at a time.

With one dtype each of these is the plain GEMM. N rows of the model's tensors; the other letters as in `_lora_core.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of the largest wide copy that exists at a time (64 MiB in fp32).
WIDE_ELEMENTS = 2**24


def mm(p_NK: Tensor, q_KR: Tensor, alpha: float) -> Tensor:
    """alpha (p q) in q's dtype, that of p or a wider one."""
    if p_NK.dtype == q_KR.dtype:
        return _scaled_mm(p_NK, q_KR, alpha)
    if _splits(p_NK, q_KR):
        product = _mm_in_fp32(p_NK, torch.cat(_pieces(q_KR, 3), 1))
        return product.view(p_NK.shape[0], 3, -1).sum(1).mul_(alpha)
    out = q_KR.new_empty(p_NK.shape[0], q_KR.shape[1])
    for rows in _row_chunks(p_NK, p_NK.shape[1]):
        out[rows] = _scaled_mm(p_NK[rows].to(q_KR.dtype), q_KR, alpha)
    return out


def transposed_mm(p_NP: Tensor, q_NQ: Tensor, alpha: float) -> Tensor:
    """alpha (p^T q) in the wider dtype of the two."""
    if p_NP.dtype == q_NQ.dtype:
        return _scaled_mm(p_NP.t(), q_NQ, alpha)
    if _splits(p_NP, q_NQ):
        product = _mm_in_fp32(p_NP.t(), torch.cat(_pieces(q_NQ, 3), 1))
        return product.view(p_NP.shape[1], 3, -1).sum(1).mul_(alpha)
    if _splits(q_NQ, p_NP):
        product = _mm_in_fp32(torch.cat(_pieces(p_NP, 3), 1).t(), q_NQ)
        return product.view(3, -1, q_NQ.shape[1]).sum(0).mul_(alpha)
    wide = torch.promote_types(p_NP.dtype, q_NQ.dtype)
    out = p_NP.new_zeros(p_NP.shape[1], q_NQ.shape[1], dtype=wide)
    for rows in _row_chunks(p_NP, max(p_NP.shape[1], q_NQ.shape[1])):
        out.addmm_(p_NP[rows].to(wide).t(), q_NQ[rows].to(wide), alpha=alpha)
    return out


def add_mm_(y_NO: Tensor, p_NR: Tensor, q_RO: Tensor, alpha: float) -> None:
    """y += alpha (p q). A product in a wider dtype is added in that dtype and rounded once."""
    if _splits(y_NO, p_NR):
        p_NR, q_RO = _narrow_factors(p_NR, q_RO)
    if p_NR.dtype == y_NO.dtype:
        y_NO.addmm_(p_NR, q_RO, alpha=alpha)
        return
    for rows in _row_chunks(y_NO, y_NO.shape[1]):
        y_NO[rows].add_(p_NR[rows] @ q_RO, alpha=alpha)


def add_masked_mm_(y_NO: Tensor, p_NR: Tensor, q_RO: Tensor, mask_NO: Tensor, alpha: float) -> None:
    """y += alpha mask (p q), in the wider dtype of the two; the pieces' product is rounded to bf16, as PEFT's is."""
    if _splits(y_NO, p_NR):
        p_NR, q_RO = _narrow_factors(p_NR, q_RO)
    if p_NR.dtype == y_NO.dtype:
        y_NO.addcmul_(p_NR @ q_RO, mask_NO, value=alpha)
        return
    for rows in _row_chunks(y_NO, y_NO.shape[1]):
        y_NO[rows].addcmul_(p_NR[rows] @ q_RO, mask_NO[rows], value=alpha)


def _scaled_mm(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """alpha (p q), scaled in the GEMM's accumulator: one rounding, one launch."""
    return p @ q if alpha == 1.0 else torch.addmm(p.new_empty(()), p, q, beta=0, alpha=alpha)


# -- bf16 pieces -----------------------------------------------------------------------------------------------------


def _splits(narrow: Tensor, wide: Tensor) -> bool:
    return (
        narrow.dtype == torch.bfloat16
        and wide.dtype == torch.float32
        and narrow.is_cuda
        and torch.version.hip is None
        and not torch.compiler.is_compiling()
    )


def _pieces(wide: Tensor, count: int) -> list[Tensor]:
    """bf16 tensors whose sum is `wide`: to 16 bits of the significand for two, to fp32's 24 for three."""
    pieces = [wide.bfloat16()]
    while len(pieces) < count:
        wide = wide - pieces[-1]
        pieces.append(wide.bfloat16())
    return pieces


def _narrow_factors(p_NR: Tensor, q_RO: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 factors three times as long whose product is p q to a relative 2^-16: high high + high low + low high."""
    (p_high, p_low), (q_high, q_low) = _pieces(p_NR, 2), _pieces(q_RO, 2)
    return torch.cat([p_high, p_high, p_low], 1), torch.cat([q_high, q_low, q_high])


def _mm_in_fp32(p: Tensor, q: Tensor) -> Tensor:
    """The fp32 product of bf16 matrices."""
    return torch.mm(p, q, out_dtype=torch.float32) if p.is_cuda else p.float() @ q.float()


# -- rows at a time --------------------------------------------------------------------------------------------------


def _row_chunks(tensor: Tensor, width: int) -> Iterator[Any]:
    """Slices of rows, a wide copy of which holds WIDE_ELEMENTS at most. A compiler, which fuses the copy, sees one."""
    n_rows = tensor.shape[0]
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    step = max(1, WIDE_ELEMENTS // max(1, width))
    for start in range(0, n_rows, step):
        yield slice(start, start + step)
