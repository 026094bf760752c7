"""The Triton kernels of `_cross_entropy_pass`, which says what they compute and why in this way.

A tile is `GROUPS` groups of `GROUP` neighbouring columns; a thread loads whole groups, and reduces a tile only within
them. In here `v` is a logit up to a factor: the GEMM's product, or the tanh of its cap; `to_log2` is that factor over
log 2, so that exp2 and log2 serve, and `inner` what a product is multiplied by inside of the tanh.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def, assignment"
# (Triton kernels: a pointer has no Python type.)
from ._common import jit, tl


@jit
def _tanh(x):
    """From one exponential, which cannot overflow."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@jit
def _up_to_a_factor(product, inner, CAP: tl.constexpr):
    v = product.to(tl.float32)
    if CAP:
        v = _tanh(v * inner)
    return v


@jit
def _offsets(GROUPS: tl.constexpr, GROUP: tl.constexpr):
    return tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@jit
def _load_words(pointer, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """A tile of 16-bit elements, two in a word: kept one by one, each would take a register of its own."""
    words = pointer.to(tl.pointer_type(tl.int32))
    return tl.load(words + _offsets(GROUPS, GROUP // 2), eviction_policy="evict_first")


@jit
def _unpack(words, GROUPS: tl.constexpr, GROUP: tl.constexpr, dtype: tl.constexpr):
    low = (words & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high).reshape(GROUPS, GROUP)


@jit
def _nothing_folded(GROUPS: tl.constexpr):
    """Maximum, sum of p, sum of p log2 p, tile of the maximum. Finite where minus infinity would make a NaN."""
    zeros = tl.zeros([GROUPS], tl.float32)
    return tl.full([GROUPS], -1e30, tl.float32), zeros, zeros, tl.zeros([GROUPS], tl.int32)


@jit
def _fold(v, tile, to_log2, peak, total, mean, first):
    """A tile (GROUPS, GROUP) into the running values (GROUPS,)."""
    tile_peak = tl.max(v, axis=1)
    new = tl.maximum(peak, tile_peak)
    first = tl.where(tile_peak > peak, tile, first)
    moved = (peak - new) * to_log2
    shrink = tl.exp2(moved)
    y = (v - new[:, None]) * to_log2
    p = tl.exp2(y)
    mean = shrink * (mean + moved * total) + tl.sum(p * y, axis=1)
    total = shrink * total + tl.sum(p, axis=1)
    return new, total, mean, first


@jit
def _fold_last(pointer, tile, n_cols, inner, to_log2, peak, total, mean, first, CAP: tl.constexpr,
               GROUPS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """`_fold` of a tile that the row ends in."""
    offsets = _offsets(GROUPS, GROUP)
    mask = tile * GROUPS * GROUP + offsets < n_cols
    v = _up_to_a_factor(tl.load(pointer + offsets, mask=mask, other=0.0), inner, CAP)
    return _fold(tl.where(mask, v, -2e30), tile, to_log2, peak, total, mean, first)


@jit
def _of_the_row(to_log2, peak, total, mean):
    """Maximum, sum of p, sum of p log2 p: the row's values from its threads'."""
    row_peak = tl.max(peak, axis=0)
    moved = (peak - row_peak) * to_log2
    shrink = tl.exp2(moved)
    return row_peak, tl.sum(shrink * total, axis=0), tl.sum(shrink * (mean + moved * total), axis=0)


@jit
def _first_of_the_maxima(row_ptr, n_cols, inner, row_peak, peak, first, CAP: tl.constexpr, GROUPS: tl.constexpr,
                         GROUP: tl.constexpr):  # fmt: skip
    """The column: the first group that has the maximum, then the first in the group. `n_cols` if all is NaN."""
    columns = first * (GROUPS * GROUP) + tl.arange(0, GROUPS) * GROUP
    start = tl.min(tl.where(peak == row_peak, columns, n_cols), axis=0)
    members = start + tl.arange(0, GROUP)
    group = _up_to_a_factor(tl.load(row_ptr + members, mask=members < n_cols, other=0.0), inner, CAP)
    return tl.min(tl.where((group == row_peak) & (members < n_cols), members, n_cols), axis=0)


@jit
def _gradient(v, row_peak, to_log2, log_total, on_p, on_log_p, slope, CAP: tl.constexpr, ENTROPY: tl.constexpr):
    """All but the label's share; `slope` is the derivative of the logit, but for its cap's."""
    log2_p = (v - row_peak) * to_log2 - log_total
    d = on_p * tl.exp2(log2_p)
    if ENTROPY:
        d = (on_p + on_log_p * log2_p) * tl.exp2(log2_p)
    if CAP:
        d *= 1.0 - v * v
    return d * slope


@jit
def _coefficients(row, scale_ptr, on_log_prob_ptr, on_entropy_ptr, on_lse_ptr, label_log2_p, entropy, lse, z_loss,
                  DFT: tl.constexpr):  # fmt: skip
    """What p, p log2 p and the label's logit are multiplied by, from either kind of gradient."""
    on_log_p = 0.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        on_label = scale
        if DFT:
            on_label = scale * tl.exp2(label_log2_p)
        on_p = on_label + scale * 2.0 * z_loss * lse
    else:
        on_label = -tl.load(on_log_prob_ptr + row)
        on_p = on_label
        if on_lse_ptr is not None:
            on_p += tl.load(on_lse_ptr + row)
        if on_entropy_ptr is not None:
            on_entropy = tl.load(on_entropy_ptr + row)
            on_p -= on_entropy * entropy
            on_log_p = -on_entropy * 0.6931471805599453
    return on_p, on_log_p, on_label


@jit
def _clear(row_ptr, n_cols, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    offsets = _offsets(GROUPS, GROUP)
    nothing = tl.zeros([GROUPS, GROUP], row_ptr.dtype.element_ty)
    for tile in tl.range(0, tl.cdiv(n_cols, GROUPS * GROUP)):
        columns = tile * GROUPS * GROUP + offsets
        tl.store(row_ptr + columns, nothing, mask=columns < n_cols)


@jit
def softmax_pass_kernel(
    logits_ptr, label_ptr, log_prob_ptr, entropy_ptr, lse_ptr, top1_ptr,
    scale_ptr, on_log_prob_ptr, on_entropy_ptr, on_lse_ptr,
    inner, to_log2, slope, z_loss,
    n_cols, stride,
    GRADIENT: tl.constexpr, DFT: tl.constexpr, CAP: tl.constexpr,
    HELD: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = GROUPS * GROUP
    ENTROPY: tl.constexpr = on_entropy_ptr is not None
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    label = tl.load(label_ptr + row)
    n_full = n_cols // BLOCK
    # A label beyond the vocabulary has no logit: NaN, which nobody overlooks. Read early: it need not be waited for.
    label_product = tl.load(row_ptr + label, mask=(label >= 0) & (label < n_cols), other=float("nan"))
    # Zero, but not known to the compiler: or it keeps the unpacked elements of the first reading for the second.
    zero = n_cols >> 31
    offsets = _offsets(GROUPS, GROUP)

    if label < 0:  # what lies in such a row is not even read: it may be NaN
        tl.store(log_prob_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(top1_ptr + row, 0)
        if GRADIENT:
            _clear(row_ptr, n_cols, GROUPS, GROUP)
    else:
        held = ()
        for tile in tl.static_range(HELD):
            held = held + (_load_words(row_ptr + tile * BLOCK, GROUPS, GROUP),)  # noqa: RUF005
        peak, total, mean, first = _nothing_folded(GROUPS)
        for tile in tl.static_range(HELD):
            v = _up_to_a_factor(_unpack(held[tile], GROUPS, GROUP, dtype), inner, CAP)
            peak, total, mean, first = _fold(v, tile, to_log2, peak, total, mean, first)
        for tile in tl.range(HELD, n_full, num_stages=STAGES):
            product = tl.load(row_ptr + tile * BLOCK + offsets, eviction_policy="evict_last")
            v = _up_to_a_factor(product, inner, CAP)
            peak, total, mean, first = _fold(v, tile, to_log2, peak, total, mean, first)
        if n_full * BLOCK < n_cols:
            peak, total, mean, first = _fold_last(
                row_ptr + n_full * BLOCK, n_full, n_cols, inner, to_log2, peak, total, mean, first, CAP, GROUPS, GROUP
            )
        row_peak, row_total, row_mean = _of_the_row(to_log2, peak, total, mean)
        log_total = tl.log2(row_total)
        entropy = (log_total - row_mean / row_total) * 0.6931471805599453
        lse = (row_peak * to_log2 + log_total) * 0.6931471805599453
        label_v = _up_to_a_factor(label_product, inner, CAP)
        label_log2_p = (label_v - row_peak) * to_log2 - log_total
        top = _first_of_the_maxima(row_ptr, n_cols, inner, row_peak, peak, first, CAP, GROUPS, GROUP)
        tl.store(log_prob_ptr + row, label_log2_p * 0.6931471805599453)
        tl.store(entropy_ptr + row, entropy)
        tl.store(lse_ptr + row, lse)
        tl.store(top1_ptr + row, (top == label).to(tl.int8))

        if GRADIENT:
            on_p, on_log_p, on_label = _coefficients(
                row, scale_ptr, on_log_prob_ptr, on_entropy_ptr, on_lse_ptr, label_log2_p, entropy, lse, z_loss, DFT
            )
            tl.debug_barrier()  # every thread has read the label's logit and the group of the maximum
            if n_full * BLOCK < n_cols:
                mask = n_full * BLOCK + offsets < n_cols
                v = _up_to_a_factor(tl.load(row_ptr + n_full * BLOCK + offsets, mask=mask, other=0.0), inner, CAP)
                d = _gradient(v, row_peak, to_log2, log_total, on_p, on_log_p, slope, CAP, ENTROPY)
                tl.store(row_ptr + n_full * BLOCK + offsets, d.to(dtype), mask=mask)
            for done in tl.range(
                0, n_full - HELD, num_stages=STAGES
            ):  # backwards: what was read last is in the cache most surely
                tile_ptr = row_ptr + (n_full - 1 - done) * BLOCK + offsets
                v = _up_to_a_factor(tl.load(tile_ptr, eviction_policy="evict_first"), inner, CAP)
                d = _gradient(v, row_peak, to_log2, log_total, on_p, on_log_p, slope, CAP, ENTROPY)
                tl.store(tile_ptr, d.to(dtype))
            for tile in tl.static_range(HELD):
                v = _up_to_a_factor(_unpack(held[tile] ^ zero, GROUPS, GROUP, dtype), inner, CAP)
                d = _gradient(v, row_peak, to_log2, log_total, on_p, on_log_p, slope, CAP, ENTROPY)
                tl.store(row_ptr + tile * BLOCK + offsets, d.to(dtype))
            tl.debug_barrier()  # every thread has written its part of the row
            d = _gradient(label_v, row_peak, to_log2, log_total, on_p, on_log_p, slope, CAP, ENTROPY)
            if CAP:
                on_label *= 1.0 - label_v * label_v
            tl.store(row_ptr + label, (d - on_label * slope).to(dtype), mask=label < n_cols)


@jit
def fold_pass_kernel(
    logits_ptr, label_ptr, peak_ptr, total_ptr, mean_ptr, label_v_ptr, top_ptr,
    inner, to_log2,
    column, n_cols, stride,
    CAP: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Columns `column` to `column + n_cols` of each row into the row's running values; the first tile starts them."""
    BLOCK: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    label = tl.load(label_ptr + row)
    if label >= 0:
        n_full = n_cols // BLOCK
        offsets = _offsets(GROUPS, GROUP)
        peak, total, mean, first = _nothing_folded(GROUPS)
        for tile in tl.range(0, n_full, num_stages=STAGES):
            v = _up_to_a_factor(tl.load(row_ptr + tile * BLOCK + offsets), inner, CAP)
            peak, total, mean, first = _fold(v, tile, to_log2, peak, total, mean, first)
        if n_full * BLOCK < n_cols:
            peak, total, mean, first = _fold_last(
                row_ptr + n_full * BLOCK, n_full, n_cols, inner, to_log2, peak, total, mean, first, CAP, GROUPS, GROUP
            )
        row_peak, row_total, row_mean = _of_the_row(to_log2, peak, total, mean)
        top = column + _first_of_the_maxima(row_ptr, n_cols, inner, row_peak, peak, first, CAP, GROUPS, GROUP)
        if column > 0:
            old_peak = tl.load(peak_ptr + row)
            old_total = tl.load(total_ptr + row)
            new = tl.maximum(old_peak, row_peak)
            top = tl.where(row_peak > old_peak, top, tl.load(top_ptr + row))
            old_moved = (old_peak - new) * to_log2
            moved = (row_peak - new) * to_log2
            row_mean = tl.exp2(moved) * (row_mean + moved * row_total)
            row_mean += tl.exp2(old_moved) * (tl.load(mean_ptr + row) + old_moved * old_total)
            row_total = tl.exp2(moved) * row_total + tl.exp2(old_moved) * old_total
            row_peak = new
        tl.store(peak_ptr + row, row_peak)
        tl.store(total_ptr + row, row_total)
        tl.store(mean_ptr + row, row_mean)
        tl.store(top_ptr + row, top)
        if (label >= column) & (label < column + n_cols):
            tl.store(label_v_ptr + row, _up_to_a_factor(tl.load(row_ptr + label - column), inner, CAP))


@jit
def gradient_pass_kernel(
    logits_ptr, label_ptr, peak_ptr, log_total_ptr, log_prob_ptr, entropy_ptr, lse_ptr,
    scale_ptr, on_log_prob_ptr, on_entropy_ptr, on_lse_ptr,
    inner, to_log2, slope, z_loss,
    column, n_cols, stride,
    DFT: tl.constexpr, CAP: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Columns `column` to `column + n_cols` of each row replaced by their gradient."""
    ENTROPY: tl.constexpr = on_entropy_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    label = tl.load(label_ptr + row)
    if label < 0:
        _clear(row_ptr, n_cols, GROUPS, GROUP)
    else:
        row_peak = tl.load(peak_ptr + row)
        log_total = tl.load(log_total_ptr + row)
        on_p, on_log_p, on_label = _coefficients(
            row, scale_ptr, on_log_prob_ptr, on_entropy_ptr, on_lse_ptr,
            tl.load(log_prob_ptr + row) * 1.4426950408889634, tl.load(entropy_ptr + row), tl.load(lse_ptr + row),
            z_loss, DFT,
        )  # fmt: skip
        offsets = _offsets(GROUPS, GROUP)
        for tile in tl.range(0, tl.cdiv(n_cols, GROUPS * GROUP)):
            columns = tile * GROUPS * GROUP + offsets
            mask = columns < n_cols
            v = _up_to_a_factor(tl.load(row_ptr + columns, mask=mask, other=0.0), inner, CAP)
            d = _gradient(v, row_peak, to_log2, log_total, on_p, on_log_p, slope, CAP, ENTROPY)
            on_this = on_label * slope
            if CAP:
                on_this = on_label * slope * (1.0 - v * v)
            d = tl.where(columns + column == label, d - on_this, d)
            tl.store(row_ptr + columns, d.to(logits_ptr.dtype.element_ty), mask=mask)


@jit
def scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """x *= factor, unless the factor is one: then nothing is read."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < n:
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offsets, mask=offsets < n).to(tl.float32)
            tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=offsets < n)
            start += tl.num_programs(0).to(tl.int64) * BLOCK
