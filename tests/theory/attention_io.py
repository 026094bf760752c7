"""Attention in tiles on a machine with a small fast memory, every transfer counted: docs/theory/attention-io.md.

    python tests/theory/attention_io.py

The machine computes: its outputs are compared with plain attention, so that what is counted is a way to do it. Its
fast memory holds `size` elements, and running over that is an error. Elements, not bytes: times two in bfloat16.

Legend: N tokens, d the size of a head, M the size of the fast memory; R query rows and C key rows in a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Machine:
    """A slow memory that is counted, and a fast one that is limited."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.loaded = self.stored = self.held = self.most_held = 0

    @property
    def moved(self) -> int:
        return self.loaded + self.stored

    def hold(self, elements: int) -> None:
        self.held += elements
        self.most_held = max(self.most_held, self.held)
        if self.held > self.size:
            raise MemoryError(f"{self.held} elements in a fast memory of {self.size}")

    def free(self, *arrays: Array) -> None:
        self.held -= sum(array.size for array in arrays)

    def new(self, *shape: int, fill: float = 0.0) -> Array:
        array = np.full(shape, fill)
        self.hold(array.size)
        return array

    def load(self, source: Array) -> Array:
        self.hold(source.size)
        self.loaded += source.size
        return source.copy()

    def store(self, target: Array, array: Array) -> None:
        self.stored += array.size
        target[...] = array


def plain(q: Array, k: Array, v: Array, *, causal: bool = False) -> Array:
    """What attention is; no machine. The scale 1 / sqrt(d) is part of q."""
    scores = q @ k.T
    if causal:
        scores[np.triu_indices(len(q), 1)] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)) @ v


def unfused(machine: Machine, q: Array, k: Array, v: Array) -> Array:
    """Scores to slow memory, softmax over them, weights to slow memory, as three kernels do it.

    At its best: q, k and v are counted once, as if the products needed no tiles of their own.
    """
    scores = q @ k.T
    machine.loaded += q.size + k.size
    machine.stored += scores.size
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    machine.loaded += scores.size
    machine.stored += weights.size
    out = weights @ v
    machine.loaded += weights.size + v.size
    machine.stored += out.size
    return out


def _fold(machine: Machine, scores: Array, v: Array, out: Array, peak: Array, total: Array) -> None:
    """One tile into the running values of its rows: the merge of docs/theory/online-softmax.md, with an output."""
    new = np.maximum(peak, scores.max(1))
    shrink = np.exp(peak - new)  # 0 for a row without keys so far: each row sees one in its first tile
    scores -= new[:, None]
    np.exp(scores, out=scores)
    total *= shrink
    total += scores.sum(1)
    out *= shrink[:, None]
    out += scores @ v
    peak[:] = new


def query_rows(size: int, d: int, columns: int) -> int:
    """The most rows R of a query tile: q, out, peak, total and scores beside `columns` rows of k and v."""
    return (size - 2 * columns * d) // (2 * d + 2 + columns)


def queries_outside(
    machine: Machine, q: Array, k: Array, v: Array, *, columns: int = 1, causal: bool = False
) -> Array:
    """The order of FlashAttention-2's forward pass: a tile of queries stays, keys and values pass by."""
    n, d = q.shape
    rows = min(n, query_rows(machine.size, d, columns))
    if rows < 1:
        raise MemoryError(f"a fast memory of {machine.size} holds no tile of heads of {d}")
    result = np.full_like(q, np.nan)
    log_sum_exp = np.full(n, np.nan)  # for the backward pass
    for top in range(0, n, rows):
        q_RD = machine.load(q[top : top + rows])
        here = len(q_RD)
        out, total = machine.new(here, d), machine.new(here)
        peak = machine.new(here, fill=-np.inf)
        for left in range(0, min(n, top + here) if causal else n, columns):
            k_CD, v_CD = machine.load(k[left : left + columns]), machine.load(v[left : left + columns])
            scores = machine.new(here, len(k_CD))
            scores[:] = q_RD @ k_CD.T
            if causal:
                scores[np.arange(top, top + here)[:, None] < np.arange(left, left + len(k_CD))] = -np.inf
            _fold(machine, scores, v_CD, out, peak, total)
            machine.free(k_CD, v_CD, scores)
        machine.store(result[top : top + here], out / total[:, None])
        machine.store(log_sum_exp[top : top + here], peak + np.log(total))
        machine.free(q_RD, out, total, peak)
    return result


def keys_outside(machine: Machine, q: Array, k: Array, v: Array) -> Array:
    """The order of the first FlashAttention: a tile of keys and values stays, queries and outputs pass by.

    Tiles as in its paper, M / 4 d key rows and as many query rows, at most d; a little less, for what it neglects.
    """
    n, d = q.shape
    columns = min(n, machine.size // (4 * d + 8))
    rows = min(columns, d, (machine.size - 2 * columns * d) // (2 * d + 2 + columns) if columns else 0)
    if rows < 1:
        raise MemoryError(f"a fast memory of {machine.size} holds no tile of heads of {d}")
    out, total, peak = np.zeros_like(q), np.zeros(n), np.full(n, -np.inf)
    for left in range(0, n, columns):
        k_CD, v_CD = machine.load(k[left : left + columns]), machine.load(v[left : left + columns])
        for top in range(0, n, rows):
            slow = out[top : top + rows], total[top : top + rows], peak[top : top + rows]
            q_RD = machine.load(q[top : top + rows])
            out_RD, total_R, peak_R = map(machine.load, slow)
            scores = machine.new(len(q_RD), len(k_CD))
            scores[:] = q_RD @ k_CD.T
            _fold(machine, scores, v_CD, out_RD, peak_R, total_R)
            for target, array in zip(slow, (out_RD, total_R, peak_R), strict=True):
                machine.store(target, array)
            machine.free(q_RD, out_RD, total_R, peak_R, scores)
        machine.free(k_CD, v_CD)
    return out / total[:, None]  # could be done in the last visit: not counted


def packed(machine: Machine, q: Array, k: Array, v: Array, lengths: list[int], *, causal: bool = False) -> Array:
    """Documents that lie one after another, each attending to itself, as attention over `cu_seqlens` does it."""
    result = np.full_like(q, np.nan)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        result[part] = queries_outside(machine, q[part], k[part], v[part], causal=causal)
        start += length
    return result


def operands(n: int, d: int, seed: int = 0) -> tuple[Array, Array, Array]:
    q, k, v = np.random.default_rng(seed).standard_normal((3, n, d))
    return q / math.sqrt(d), k, v


def count(order: Callable[..., Array], size: int, n: int, d: int) -> int:
    """Elements moved, after the result has been found right."""
    q, k, v = operands(n, d)
    machine = Machine(size)
    np.testing.assert_allclose(order(machine, q, k, v), plain(q, k, v), rtol=1e-9, atol=1e-12)
    return machine.moved


TOKENS, HEAD = 256, 16
SIZES = (128, 256, 512, 1024, 2048, 4096, 16384)
DOCUMENTS = [80, 60, 44, 32, 20, 12, 6, 2]


def table() -> list[dict[str, float | str]]:
    """Counts beside the bound, from an M below d² to one that holds everything."""
    rows: list[dict[str, float | str]] = []
    for size in SIZES:
        bound = TOKENS**2 * HEAD**2 / size
        moved = count(queries_outside, size, TOKENS, HEAD)
        rows.append(
            {
                "M": size,
                "M / d²": size / HEAD**2,
                "N²d² / M": bound,
                "queries outside": moved,
                "over the bound": moved / bound,
                "keys outside": count(keys_outside, size, TOKENS, HEAD),
                "unfused": count(unfused, size, TOKENS, HEAD),
            }
        )
    return rows


def packed_table(size: int = 512) -> list[dict[str, float | str]]:
    """The same tokens as one document and as several, each attending to itself alone."""
    q, k, v = operands(TOKENS, HEAD)
    rows: list[dict[str, float | str]] = []
    for name, lengths in (("one document", [TOKENS]), ("8 documents", DOCUMENTS), ("16 equal ones", [16] * 16)):
        row: dict[str, float | str] = {"packed row": name, "Σn²": sum(n * n for n in lengths)}
        for heading, causal in (("moved", False), ("moved, causal", True)):
            machine = Machine(size)
            result = packed(machine, q, k, v, lengths, causal=causal)
            ends = np.cumsum(lengths)
            for start, end in zip(ends - lengths, ends, strict=True):
                part = slice(start, end)
                np.testing.assert_allclose(result[part], plain(q[part], k[part], v[part], causal=causal), rtol=1e-9)
            row[heading] = machine.moved
        rows.append(row)
    return rows


def shown(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1f}" if name in ("M / d²", "over the bound") else f"{value:,.0f}"


def markdown(rows: list[dict[str, float | str]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "--:|" * len(rows[0])]
    for row in rows:
        lines.append("| " + " | ".join(shown(name, value) for name, value in row.items()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(table()), markdown(packed_table()), sep="\n\n")
