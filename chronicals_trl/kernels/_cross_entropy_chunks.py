"""The GEMMs of `linear_cross_entropy`: never more logits at a time than a budget holds.

The logits are cut in one of two ways (`plan`):

- Chunks of tokens. One GEMM to the chunk's logits, `softmax_pass` over them, which leaves the gradient in their place,
  one GEMM to the hidden gradient, and one to the weight gradient, which is summed over chunks in float32: 6 N H V
  operations in all, and 4 where the weight is frozen. Each chunk reads and writes the float32 sum once.
- Tiles of the vocabulary, where the budget holds so few tokens that reading and writing that sum would take longer
  than forming the logits a second time: all tiles are folded into the log-sum-exp first, and formed again for the
  gradient. 8 N H V operations; the weight gradient is whole after one GEMM a tile.

`score` is the forward pass, and forms the gradient of the summed loss on the way where asked to. `recompute` forms the
gradient from coefficients of each token, once those are known. Both are opaque to torch.compile: the number of chunks
is no part of the graph. Nothing waits for the GPU.

Legend: M tokens, H hidden size, V vocabulary, C tokens in a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ._common import kernel_op, math_dtype, use_triton
from ._cross_entropy_pass import (
    Head,
    OfLoss,
    OfTokens,
    Running,
    Statistics,
    fold_pass,
    gradient_pass,
    softmax_pass,
)

MIB = 2**20

# A larger budget makes nothing faster (H100).
MOST_MIB = 1024

# TRL 1.16's tile of logits: at most so many tokens, of so many columns of the vocabulary.
_TRL_TILE = 4096, 32_768

# Chunks of fewer tokens than this cost more in traffic of the float32 sum than vocabulary tiles do in operations:
# 8 V H bytes a chunk against 2 C H V operations and 2 C V bytes, at an H100's 3 TB/s and 650 TFLOP/s.
FEWEST_ROWS = 768

# Bytes of the largest block that chunks of tokens have had so far, by head, budget, and whether gradients are formed.
MOST_BYTES: dict[tuple[Any, ...], int] = {}
_ALIGNED = 512

# Rows of the logits' buffer begin at multiples of this many elements, for the GEMMs' and the kernels' wide accesses.
_PITCH = 64


class Plan(NamedTuple):
    """How logits are cut: tokens in a chunk, and columns in a tile of the vocabulary (V: whole rows)."""

    rows: int
    columns: int


def automatic_budget_mib(
    n_rows: int, vocab: int, hidden_size: int, compute: torch.dtype, *, narrowed: bool, kernels: bool
) -> int:
    """MiB of logits with which the head's peak is that of TRL's fused head, but at most MOST_MIB.

    TRL holds its tile of logits, and the gradients in float32 and in their own dtype at once when it converts them. Of
    the weight gradient, ours is `narrowed` in its own memory, or made as it will be where one chunk is all; of the
    hidden gradient there is only one. What TRL has for all of that is there for logits. (A batch behind a longer one
    has the longer one's memory: `_Block`.)
    """
    itemsize = compute.itemsize
    tile = min(n_rows, _TRL_TILE[0]) * min(vocab, _TRL_TILE[1]) * itemsize
    float32_half = itemsize * vocab * hidden_size if narrowed else 0
    spare = tile + 4 * n_rows * hidden_size + float32_half
    whole = -(-n_rows * vocab * _per_logit(compute, kernels) // MIB)
    if whole <= min(MOST_MIB, (spare + float32_half) // MIB):
        return max(1, whole)
    return min(MOST_MIB, max(1, spare // MIB))


def plan(
    n_rows: int, vocab: int, compute: torch.dtype, budget_mib: int, *, trainable: bool, kernels: bool
) -> Plan:  # fmt: skip
    """Cut (n_rows, vocab) logits so that their buffers stay within the budget, at least one row of them.

    Args:
        trainable: whether a weight gradient is formed.
        kernels: whether the Triton kernels run; the torch code holds some five times as much per logit.
    """
    per_logit = _per_logit(compute, kernels)
    rows = max(1, budget_mib * MIB // (per_logit * vocab))
    if rows >= n_rows:
        return Plan(max(1, n_rows), vocab)
    if rows > 128:
        rows -= rows % 128  # whole GEMM tiles
    if kernels and trainable and rows < FEWEST_ROWS:
        columns = max(1, budget_mib * MIB // (per_logit * n_rows))
        if columns > 256:
            return Plan(n_rows, columns - columns % 256)  # whole GEMM tiles
    return Plan(rows, vocab)


def _per_logit(compute: torch.dtype, kernels: bool) -> int:
    """Bytes; in torch those of the GEMM's logits, and of four buffers of softmax and gradient in the math dtype."""
    return compute.itemsize if kernels else compute.itemsize + 4 * math_dtype(compute).itemsize


def weight_gradient_dtype(weight: torch.dtype, compute: torch.dtype, final: bool) -> torch.dtype:
    """Float32 until the gradient is `final`, that is, multiplied by all that it will be multiplied by."""
    return weight if final and weight == compute else math_dtype(compute)


def _pitch(n_cols: int) -> int:
    return -(-n_cols // _PITCH) * _PITCH if n_cols > _PITCH else n_cols


def _pitched(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(n_rows, _pitch(n_cols), dtype=dtype, device=device)


class _Block:
    """What chunks of tokens need beside results: logits, and a part of the weight gradient's sum, in one block.

    Batches of several lengths have chunks of several lengths, and torch's allocator would keep a block for each, half
    a gigabyte or so: it makes no larger one of smaller ones. So none is smaller than the one before it, as long as
    there is memory for that.

    Args:
        rows: of logits (rows, V).
        beside: shape of the sum's part, in the dtype `wide`, or None.
        key: blocks of the same one have the size of the largest.
    """

    def __init__(
        self, rows: int, vocab: int, compute: torch.dtype, beside: tuple[int, int] | None, wide: torch.dtype,
        key: tuple[Any, ...], device: torch.device,
    ) -> None:  # fmt: skip
        pitch = _pitch(vocab)
        logits_end = rows * pitch * compute.itemsize
        start = -(-logits_end // _ALIGNED) * _ALIGNED
        end = start + (0 if beside is None else math.prod(beside) * wide.itemsize)
        most = max(end, MOST_BYTES.get(key, 0))
        try:
            block = torch.empty(most, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:  # a longer batch may have run before there was all that is there now
            if most == end:
                raise
            most = end
            block = torch.empty(most, dtype=torch.uint8, device=device)
        MOST_BYTES[key] = most  # not before: what no memory was found for is not to be asked for again
        self.logits_RV = block[:logits_end].view(compute).view(rows, pitch)
        self.beside = None if beside is None else block[start:end].view(wide).view(beside)


def _products(
    hidden: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, buffer: torch.Tensor
) -> torch.Tensor:
    """hidden @ weight.T + bias, in the buffer."""
    out = buffer[: hidden.shape[0], : weight_VH.shape[0]]
    if not hidden.is_cuda:  # the CPU's GEMM rounds differently with a pitch
        return out.copy_(F.linear(hidden, weight_VH, bias_V))
    if bias_V is None:
        return torch.mm(hidden, weight_VH.t(), out=out)
    return torch.addmm(bias_V, hidden, weight_VH.t(), out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total += a @ b, or = where `first`: 16-bit operands on the tensor cores, their sum never rounded to 16 bits."""
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif a.is_cuda and torch.version.hip is None:
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        product = a.to(total.dtype) @ b.to(total.dtype)
        total.copy_(product) if first else total.add_(product)


class _WeightSum:
    """A weight gradient (V, H) that chunks add up to in float32, and that ends in its own dtype without a copy.

    Of a 16-bit gradient the memory holds half of the rows in float32; the other half lies beside it. When all is
    summed, the rows are rounded into their places from the front, over float32 rows that have been rounded before.

    Args:
        beside: memory for the other half, as `shape_beside` has it; None where rows are written as they will be, each
            by one product.
    """

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, beside: torch.Tensor | None
    ) -> None:
        self.out = torch.empty(shape, dtype=dtype, device=device)
        self.parts = [self.out]
        if beside is not None:
            half = shape[0] // 2
            inside = self.out.view(-1)[: half * shape[1] * 2].view(beside.dtype).view(half, shape[1])
            self.parts = [inside, beside]
        self.empty = True

    @staticmethod
    def shape_beside(shape: torch.Size) -> tuple[int, int]:
        return shape[0] - shape[0] // 2, shape[1]

    def add(self, grad_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        start = 0
        for part in self.parts:
            columns = grad_CV[:, start : start + part.shape[0]]
            _add_product(part, columns.t(), hidden_CH, self.empty)
            start += part.shape[0]
        self.empty = False

    def put(self, tile: slice, grad_MC: torch.Tensor, hidden_MH: torch.Tensor) -> None:
        """The rows of one tile of the vocabulary, from all tokens at once."""
        _add_product(self.out[tile], grad_MC.t(), hidden_MH, first=True)
        self.empty = False

    def finish(self) -> torch.Tensor:
        if self.empty:
            return self.out.zero_()
        if len(self.parts) == 2:
            inside, beside = self.parts
            half = inside.shape[0]
            # Rows [n, 2 n) of float32 lie in bytes that rows [2 n, 4 n) of 16 bits will take: once rows before n are
            # in their places, these can go to theirs without touching any that is still to be read.
            if half:
                self.out[:1] = inside[:1].clone()
            start = 1
            while start < half:
                stop = min(2 * start, half)
                self.out[start:stop] = inside[start:stop]
                start = stop
            self.out[half:] = beside
        return self.out


class _Gradients:
    """The gradients asked for: hidden in the GEMMs' dtype, weight as `weight_gradient_dtype` says, bias in float32."""

    def __init__(
        self, hidden_MH: torch.Tensor, weight_VH: torch.Tensor, needs: Sequence[bool], compute: torch.dtype, *,
        final: bool, beside: torch.Tensor | None,
    ) -> None:  # fmt: skip
        device, wide = hidden_MH.device, math_dtype(compute)
        self.device = device
        self.hidden_MH = torch.empty(hidden_MH.shape, dtype=compute, device=device) if needs[0] else None
        self.weight = None
        if needs[1]:
            dtype = weight_gradient_dtype(weight_VH.dtype, compute, final)
            self.weight = _WeightSum(weight_VH.shape, dtype, device, beside)
        self.bias_V = torch.zeros(weight_VH.shape[0], dtype=wide, device=device) if needs[2] else None

    def add_rows(self, rows: slice, grad_CV: torch.Tensor, hidden_CH: torch.Tensor, weight_VH: torch.Tensor) -> None:
        """A chunk of tokens, whole rows of the logits' gradient."""
        if self.bias_V is not None:
            self.bias_V.add_(grad_CV.sum(0, dtype=self.bias_V.dtype))
        if self.hidden_MH is not None:
            torch.mm(grad_CV, weight_VH, out=self.hidden_MH[rows])
        if self.weight is not None:
            self.weight.add(grad_CV, hidden_CH)

    def get(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden, weight and bias gradient; empty where not asked for, since an op cannot return None."""
        none = [torch.empty(0, device=self.device) for _ in range(3)]
        weight_VH = none[1] if self.weight is None else self.weight.finish()
        return (
            none[0] if self.hidden_MH is None else self.hidden_MH,
            weight_VH,
            none[2] if self.bias_V is None else self.bias_V,
        )


def _run(
    hidden_MH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, label_M: torch.Tensor, head: Head,
    compute: torch.dtype, budget_mib: int | None, gradient: OfLoss | OfTokens | None, needs: Sequence[bool],
    final: bool,
) -> tuple[Statistics, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # fmt: skip
    n_rows, (vocab, width) = hidden_MH.shape[0], weight_VH.shape
    device = hidden_MH.device
    statistics = Statistics.empty(n_rows, math_dtype(compute), device)
    kernels = use_triton(hidden_MH, weight_VH)
    # Evaluation has batches of its own, often larger ones, and no layers' activations beside them.
    key = device, compute, vocab, width, budget_mib, gradient is not None
    wide = math_dtype(compute)
    narrowed = needs[1] and weight_gradient_dtype(weight_VH.dtype, compute, final) != wide
    if budget_mib is None:
        budget_mib = automatic_budget_mib(n_rows, vocab, width, compute, narrowed=narrowed, kernels=kernels)
    cut = plan(n_rows, vocab, compute, budget_mib, trainable=needs[1], kernels=kernels)
    tiles = cut.columns < vocab
    block = None
    if n_rows and not tiles:
        beside = _WeightSum.shape_beside(weight_VH.shape) if narrowed and cut.rows < n_rows else None
        block = _Block(min(cut.rows, n_rows), vocab, compute, beside, wide, key, device)
    gradients = _Gradients(
        hidden_MH, weight_VH, needs, compute, final=final, beside=None if block is None else block.beside
    )
    if n_rows == 0:
        return statistics, gradients.get()
    with torch.autocast(device.type, enabled=False):
        weight_VH = weight_VH.to(compute)
        bias_V = None if bias_V is None else bias_V.to(compute)
        if block is None:
            _run_tiles(hidden_MH.to(compute), weight_VH, bias_V, label_M, head, cut, gradient, statistics, gradients)
        else:
            for start in range(0, n_rows, cut.rows):
                rows = slice(start, min(start + cut.rows, n_rows))
                hidden_CH = hidden_MH[rows].to(compute)
                logits_CV = _products(hidden_CH, weight_VH, bias_V, block.logits_RV)
                here = gradient.rows(rows) if isinstance(gradient, OfTokens) else gradient
                softmax_pass(logits_CV, label_M[rows], statistics.rows(rows), head, here)
                if gradient is not None:
                    gradients.add_rows(rows, logits_CV, hidden_CH, weight_VH)
        return statistics, gradients.get()


def _run_tiles(
    hidden_MH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, label_M: torch.Tensor, head: Head,
    cut: Plan, gradient: OfLoss | OfTokens | None, statistics: Statistics, gradients: _Gradients,
) -> None:  # fmt: skip
    """Twice over the tiles of the vocabulary, all tokens at a time."""
    n_rows, vocab = hidden_MH.shape[0], weight_VH.shape[0]
    buffer = _pitched(n_rows, cut.columns, hidden_MH.dtype, hidden_MH.device)
    tiles = [slice(start, min(start + cut.columns, vocab)) for start in range(0, vocab, cut.columns)]

    def products(tile: slice) -> torch.Tensor:
        return _products(hidden_MH, weight_VH[tile], None if bias_V is None else bias_V[tile], buffer)

    running = Running.start(n_rows, hidden_MH.device)
    for tile in tiles:
        fold_pass(products(tile), tile.start, label_M, running, head)
    log_total_M = running.finish(label_M, head, statistics)
    if gradient is None:
        return
    hidden_sum_MH = torch.empty_like(hidden_MH, dtype=torch.float32) if gradients.hidden_MH is not None else None
    for tile in tiles:
        grad_MC = products(tile)
        gradient_pass(grad_MC, tile.start, label_M, running, log_total_M, statistics, head, gradient)
        if hidden_sum_MH is not None:
            _add_product(hidden_sum_MH, grad_MC, weight_VH[tile], first=tile.start == 0)
        if gradients.weight is not None:
            gradients.weight.put(tile, grad_MC, hidden_MH)
        if gradients.bias_V is not None:
            gradients.bias_V[tile] = grad_MC.sum(0, dtype=torch.float32)
    if gradients.hidden_MH is not None and hidden_sum_MH is not None:
        gradients.hidden_MH.copy_(hidden_sum_MH)


def _fake_score(
    hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, logit_scale: Any, cap: Any, compute: Any,
    budget: Any, dft: Any, z_loss: Any, needs: Any,
) -> Any:  # fmt: skip
    floats = [hidden.new_empty(hidden.shape[0], dtype=math_dtype(compute)) for _ in range(3)]
    is_top1 = hidden.new_empty(hidden.shape[0], dtype=torch.bool)
    return *floats, is_top1, *_fake_gradients(hidden, weight, needs, compute, compute != torch.float16)


@kernel_op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? scale, "
    "float logit_scale, float? softcap, ScalarType compute, int? budget_mib, bool dft, float z_loss, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_score,
)
def score(
    hidden_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    label_M: torch.Tensor,
    scale: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    budget_mib: int | None,
    dft: bool,
    z_loss: float,
    needs: list[bool],
) -> Any:
    """Forward pass: log_prob, entropy, log-sum-exp, is_top1 (M,), and the summed loss's gradients as asked for.

    The gradients are those of the loss times `scale`, but for float16's, which would underflow: theirs are not scaled.
    """
    gradient = None
    if any(needs):
        assert scale is not None
        scale = torch.ones_like(scale) if compute == torch.float16 else scale
        gradient = OfLoss(scale, dft, z_loss)
    statistics, gradients = _run(
        hidden_MH, weight_VH, bias_V, label_M, Head(logit_scale, softcap), compute, budget_mib, gradient, needs,
        final=compute != torch.float16,
    )  # fmt: skip
    return *statistics, *gradients


@torch.library.custom_op(
    "chronicals_trl::linear_cross_entropy_recompute",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float logit_scale, float? softcap, "
    "ScalarType compute, int? budget_mib, Tensor grad_log_prob, Tensor? grad_entropy, Tensor? grad_lse, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
)
def recompute(
    hidden_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    label_M: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    budget_mib: int | None,
    grad_log_prob_M: torch.Tensor,
    grad_entropy_M: torch.Tensor | None,
    grad_lse_M: torch.Tensor | None,
    needs: list[bool],
) -> Any:
    """Gradients from the coefficients (M,) of log_prob, entropy and log-sum-exp, the logits computed once more."""
    if not any(needs):
        return _fake_gradients(hidden_MH, weight_VH, needs, compute, True)
    given = (None if g is None else g.contiguous() for g in (grad_log_prob_M, grad_entropy_M, grad_lse_M))
    _, gradients = _run(
        hidden_MH, weight_VH, bias_V, label_M, Head(logit_scale, softcap), compute, budget_mib,
        OfTokens(*given), needs, final=True,  # type: ignore[arg-type]
    )  # fmt: skip
    return gradients


@recompute.register_fake
def _(
    hidden: Any, weight: Any, bias: Any, labels: Any, logit_scale: Any, cap: Any, compute: Any, budget: Any,
    grad_log_prob: Any, grad_entropy: Any, grad_lse: Any, needs: Any,
) -> Any:  # fmt: skip
    return _fake_gradients(hidden, weight, needs, compute, True)


def _fake_gradients(hidden: Any, weight: Any, needs: Any, compute: Any, final: bool) -> Any:
    dtypes = compute, weight_gradient_dtype(weight.dtype, compute, final), math_dtype(compute)
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    return tuple(
        hidden.new_empty(shape, dtype=dtype) if need else hidden.new_empty(0, dtype=torch.float32)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )
