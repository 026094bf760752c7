"""What `bench sft` trains: shapes of models, documents, protocols, and the sides that compete.

Nothing but numpy is imported here: the runner and the process of every side read this file, and a peer's process may
hold other versions of everything else.

    packed   rows of 2,048 or 4,096 tokens, 8k or 16k tokens a step; FACTS' document lengths, cut at the row's length
    short    lengths as Alpaca's, at most 512, and so many documents a step (16; 2 with adapters): the paper's protocol

In `short` the script has packing off, as the paper's had; a side whose name says that it packs packs rows of 512, as
many as hold that number of documents on average. In `packed` a side that pads takes as many documents as the others
take rows, which is what the script with `packing` taken out does, so it sees fewer tokens in a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ABLATED",
    "ABLATION_START",
    "LIGHTER",
    "LONGEST",
    "LORA_ALPHA",
    "LORA_RANK",
    "LORA_TARGETS",
    "MASTERS",
    "MODES",
    "PROTOCOLS",
    "SHAPES",
    "SIDES",
    "Documents",
    "Protocol",
    "Shape",
    "Side",
    "Task",
    "batch_rows",
    "make_documents",
    "training_flops",
]

MODES = ("full", "lora", "qlora")
MASTERS = ("bf16", "fp32")
LORA_RANK, LORA_ALPHA = 32, 64
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: The tokenizer's and the model's; no document holds one of them.
BOS, EOS, PAD = 0, 1, 2
SPECIAL = 3
SHORTEST = 2
#: Positions that the models have.
LONGEST = 32_768


@dataclass(frozen=True)
class Shape:
    """A model by its numbers; the weights are random.

    Args:
        name, family: What it is called, and whose code it runs: "qwen2" or "llama".
        hidden, intermediate, layers, heads, kv_heads, vocab: As in its configuration.
        tied: Whether the head's weight is the embedding's.
        rope_theta, eps: As in its configuration.
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    rope_theta: float = 1e6
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def linear_weights(self) -> int:
        """Weights that every token is multiplied with, the head's left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def lora_weights(self) -> int:
        """Weights of adapters of rank LORA_RANK on every linear of the layers."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        pairs = [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden)]
        pairs += [(self.hidden, self.intermediate)] * 3
        return self.layers * LORA_RANK * sum(a + b for a, b in pairs)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", "qwen2", 896, 4864, 24, 14, 2, 151_936, True),
        Shape("qwen2.5-1.5b", "qwen2", 1536, 8960, 28, 12, 2, 151_936, True),
        Shape("qwen2.5-7b", "qwen2", 3584, 18_944, 28, 28, 4, 152_064, False),
        Shape("llama-3.1-8b", "llama", 4096, 14_336, 32, 32, 8, 128_256, False, 5e5, 1e-5),
        Shape("tiny", "qwen2", 64, 96, 2, 2, 1, 512, True),
    )
}


@dataclass(frozen=True)
class Protocol:
    """How long documents are, and whether the script packs them.

    Args:
        name: Its name.
        packs: Whether the script has `packing=True`.
        median, sigma: Of the lognormal lengths.
        row_tokens: The longest row, unless the run gives another.
    """

    name: str
    packs: bool
    median: float
    sigma: float
    row_tokens: int


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (Protocol("packed", True, 270.0, 0.95, 2048), Protocol("short", False, 160.0, 0.7, 512))
}


@dataclass(frozen=True)
class Side:
    """Someone who trains.

    Args:
        name: Its name; `sft_sides.train` has the function of the same name.
        told: In words, for the table.
        packs: True or False, or None: as the protocol's script.
        checkpointing: Under "default": None is as the framework comes.
        ours: Whether it is this package that trains.
        parts: Of ours, those that are on; None: as `chronicals_config` says. Without any the flag is off.
        micro_batches: That an optimizer step's rows come in, one after the other.
    """

    name: str
    told: str
    packs: bool | None = None
    checkpointing: bool | None = None
    ours: bool = False
    parts: tuple[str, ...] | None = None
    micro_batches: int = 1


#: Ours for less memory at the cost of speed; only where `--sides` names them.
LIGHTER = ("chronicals-accumulation", "chronicals-offload")

#: The parts of ours in the order in which an ablation adds them, and the side without any.
ABLATED = ("packing", "attention", "head", "rms_norm", "gated_mlp", "qk_rope", "lora", "adamw", "cuda_graphs")
ABLATION_START = "ablation-0-off"

SIDES = {
    side.name: side
    for side in (
        Side("chronicals", "ours, flag on, the script as it is", ours=True),
        Side("chronicals-packing", "ours, flag on, packing=True", packs=True, ours=True),
        Side("chronicals-accumulation", "ours, flag on, two micro-batches a step", ours=True, micro_batches=2),
        Side("chronicals-offload", "ours, flag on, activation_offloading=True", ours=True),
        Side("trl", "stock TRL as it comes, padded", packs=False),
        Side("trl-tuned", "stock TRL, packing, no checkpointing, flash-attn or else SDPA", True, False),
        Side("trl-liger", "TRL + Liger, packing, torch varlen attention", True, False),
        Side("trl-cce", "TRL + Apple's Cut Cross-Entropy, Liger's other kernels, varlen, packing", True, False),
        Side("unsloth", "Unsloth as it comes", packs=False),
        Side("unsloth-packing", "Unsloth, packing=True", packs=True),
        Side("torch-compile", "a bare loop: torch.compile, packed rows, full logits", True, False),
        Side("pypi-chronicals", "PyPI's chronicals 0.1.4 with its own trainer, padded", packs=False),
        Side("pypi-chronicals-bf16", "the same, fp8=False", packs=False),
        Side(ABLATION_START, "our trainer, flag off, padded", packs=False, parts=()),
        *(
            Side(f"ablation-{count}-{part}", f"the one before, and {part}", ours=True, parts=ABLATED[:count])
            for count, part in enumerate(ABLATED, start=1)
        ),
    )
}


@dataclass(frozen=True)
class Task:
    """What one process does; goes to it as JSON.

    Args:
        side, mode, shape, protocol: Names.
        checkpointing: "on", "off" or "default": as the framework comes.
        model: Folder with weights, configuration and tokenizer.
        documents: File of `Documents.save`.
        row_tokens: Longest row, and `max_length`.
        rows: Rows, or documents where the side pads, in an optimizer step.
        packs: Whether this side packs here.
        warm_up, steps, windows: Steps before the first timed window, steps of a window, and windows.
        learning_rate, seed: As for every side.
        chronicals: `chronicals_config` of our sides.
        master: What weights are loaded as, of MASTERS: trained in bf16, or fp32 with products in bf16 by autocast.
    """

    side: str
    mode: str
    shape: str
    protocol: str
    checkpointing: str
    model: str
    documents: str
    row_tokens: int
    rows: int
    packs: bool
    warm_up: int
    steps: int
    windows: int
    learning_rate: float
    seed: int
    chronicals: dict[str, Any]
    master: str = "bf16"

    @property
    def micro_batches(self) -> int:
        """Batches of a step, of equal numbers of rows."""
        return SIDES[self.side].micro_batches

    @property
    def total_steps(self) -> int:
        return self.warm_up + self.windows * self.steps

    @property
    def log_every(self) -> int:
        """Steps between two logs. Reading the loss waits for the GPU, so it is the same for all sides."""
        return max(1, min(10, self.total_steps // 6))


@dataclass(frozen=True)
class Documents:
    """Token ids of all documents one after the other, and where each begins and ends.

    Args:
        ids: (T,) int32.
        offsets: (N + 1,) int64.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def lists(self) -> list[list[int]]:
        return [part.tolist() for part in np.split(self.ids, self.offsets[1:-1])]

    def texts(self) -> list[str]:
        """Words that the bench's tokenizer turns into the same ids: every id is a word."""
        return [" ".join(map(str, ids)) for ids in self.lists()]

    def save(self, path: str) -> None:
        np.savez(path, ids=self.ids, offsets=self.offsets)

    @classmethod
    def load(cls, path: str) -> Documents:
        with np.load(path) as arrays:
            return cls(arrays["ids"], arrays["offsets"])


def make_documents(protocol: Protocol, vocab: int, longest: int, tokens: int, count: int, seed: int) -> Documents:
    """At least `count` documents with at least `tokens` tokens in all, of 2 to `longest` tokens each.

    Their tokens follow Zipf's law: there is something to learn, so that a run in which nothing trains can be told.
    """
    if longest < SHORTEST:
        raise ValueError(f"longest must be at least {SHORTEST}, not {longest}")
    rng = np.random.default_rng(seed)
    lengths = np.zeros(0, np.int64)
    while len(lengths) < count or lengths.sum() < tokens:
        more = rng.lognormal(np.log(protocol.median), protocol.sigma, max(count, 1024)).round().astype(np.int64)
        lengths = np.concatenate([lengths, np.clip(more, SHORTEST, longest)])
    needed = max(count, int(np.searchsorted(np.cumsum(lengths), tokens)) + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths[:needed])])
    ids = rng.zipf(1.2, int(offsets[-1])) % (vocab - SPECIAL) + SPECIAL
    return Documents(ids.astype(np.int32), offsets)


def batch_rows(side: Side, protocol: Protocol, rows: int, row_tokens: int, mean_length: float) -> tuple[int, bool]:
    """Rows (or documents) that `side` takes in a step, and whether it packs them; see the top of this file."""
    packs = protocol.packs if side.packs is None else side.packs
    if packs and not protocol.packs:
        return max(1, round(rows * mean_length / row_tokens)), True
    return rows, packs


def training_flops(shape: Shape, mode: str, tokens: int, squares: float) -> float:
    """Operations that training needs for these tokens: a product's backward is two products, one if its weight is
    frozen. What is computed a second time (checkpointing) is not counted, nor are elementwise operations.

    Args:
        tokens: Real tokens, padding left out.
        squares: Sum of the squared lengths of the documents: attention is within them, and causal.
    """
    base = shape.linear_weights + shape.head_weights
    products = 6 * base if mode == "full" else 4 * base + 6 * shape.lora_weights
    attention = 6 * shape.layers * shape.heads * shape.head_dim
    return float(products) * tokens + attention * squares
