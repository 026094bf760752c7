"""What full fine-tuning, LoRA and QLoRA cost on many GPUs, on paper: memory, communication, and what to take.

    python examples/multi_gpu_arithmetic.py            # the tables of docs/multi-gpu.md, as Markdown
    python examples/multi_gpu_arithmetic.py --write    # put them into that page

Nothing is measured here, and nothing is imported but the standard library. GB are 1e9 bytes. The assumptions are the
constants below; docs/multi-gpu.md has their sources.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GPUS = (8, 16, 32, 64)
GPUS_PER_NODE = 8
TOKENS = 8192  # of a GPU's micro-step: two rows of 4,096
RANK = 32  # of the adapters, on all linear layers of the decoder

MEMORY = 85.5e9  # of an H100 80GB (81,559 MiB)
USABLE = 0.9 * MEMORY  # CUDA, NCCL's buffers and fragmentation take the rest
PEAK_FLOPS = 989e12  # bf16, dense
MFU = 0.5
NVLINK = 450e9  # bytes a second, one way, of a GPU
NETWORK = 50e9  # the same, of a GPU's own 400 Gb/s adapter
REACHED = 0.8  # of these rates, by collectives of this size

LOGIT_BUDGET = 2**30  # bytes, `logit_budget_mib` at its most
LOGIT_BYTES = 12  # of a full logit: bf16 and fp32, and their gradients
NF4_BYTES = 0.516  # of a weight: 4 bits, and the doubly quantised scales of each 64
MODES = ("full", "LoRA", "QLoRA")


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's structure, by its config.json."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    qkv_bias: bool
    head_dim: int = 128
    tied: bool = False  # the head is the embedding

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of a decoder layer's linear layers: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        mlp = [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return attention + mlp

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return sum(a * b for a, b in self.linears) + bias + 2 * self.hidden

    @property
    def table(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + (1 if self.tied else 2) * self.table + self.hidden

    @property
    def adapters(self) -> int:
        return self.layers * sum(RANK * (a + b) for a, b in self.linears)


SHAPES = (
    Shape("Qwen2.5-7B", 3584, 28, 28, 4, 18944, 152064, qkv_bias=True),
    Shape("Qwen2.5-32B", 5120, 64, 40, 8, 27648, 152064, qkv_bias=True),
    Shape("Llama-3-70B", 8192, 80, 64, 8, 28672, 128256, qkv_bias=False),
)


# -- memory of a GPU, in bytes ---------------------------------------------------------------------------------------


def layer_activations(shape: Shape, mode: str) -> int:
    """What a decoder layer keeps for its backward pass, in bf16 for a token.

    Input and output of both norms; q, k, v and what attention gives; gate, up and, where weights are trained, their
    product (with adapters the fused MLP does not keep it).
    """
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    mlp = (3 if mode == "full" else 2) * shape.intermediate
    return 2 * (4 * shape.hidden + attention + mlp)


def activations(shape: Shape, mode: str, checkpointing: bool, tokens: int = TOKENS) -> int:
    """All layers' activations; with checkpointing a layer keeps its input, and one layer at a time all of it."""
    whole = layer_activations(shape, mode)
    return tokens * (shape.layers * 2 * shape.hidden + whole if checkpointing else shape.layers * whole)


def full_logits(shape: Shape) -> int:
    return LOGIT_BYTES * TOKENS * shape.vocab


def states(shape: Shape, mode: str, layout: str, gpus: int) -> float:
    """Weights, gradients and AdamW's states that lie on a GPU all the time.

    Trained: 4 bytes of fp32 weights, 4 of gradients, 8 of AdamW; DeepSpeed has 2 of bf16 weights, 2 of gradients and
    12 of fp32 weights and AdamW. Adapters are small and counted whole. Frozen: 2 bytes, or NF4's.
    """
    if mode == "full":
        p = shape.parameters
        return {
            "ddp": 16 * p, "zero1": 4 * p + 12 * p / gpus, "zero2": 2 * p + 14 * p / gpus, "fsdp2": 16 * p / gpus,
            "fsdp2_offload": 0,
        }[layout]  # fmt: skip
    share = {"ddp": 1.0, "fsdp2": 1 / gpus, "fsdp2_offload": 0.0}[layout]
    return frozen(shape, mode) * share + 16 * shape.adapters


def frozen(shape: Shape, mode: str) -> float:
    """The base model's bytes under an adapter; QLoRA leaves embedding, head and norms in bf16."""
    if mode == "LoRA":
        return 2 * shape.parameters
    in_4_bits = shape.layers * sum(a * b for a, b in shape.linears)
    return NF4_BYTES * in_4_bits + 2 * (shape.parameters - in_4_bits)


def working(shape: Shape, mode: str, layout: str) -> float:
    """Copies of weights and gradients that are there for a while.

    DDP: the bf16 copies that autocast keeps of fp32 weights. FSDP2: two layers, gathered (the next one is on its way),
    embedding and head, and the gradients of one layer and the head before they are reduced. QLoRA: one weight in bf16.
    """
    largest = 2 * max(a * b for a, b in shape.linears) if mode == "QLoRA" else 0
    if layout.startswith("fsdp2"):
        layer = 2 * shape.layer * (1 if mode != "QLoRA" else NF4_BYTES / 2)
        gradients = 2 * (shape.layer + shape.table) if mode == "full" else 0
        return 2 * layer + 2 * 2 * shape.table + gradients + largest
    return (2 * shape.parameters if layout == "ddp" and mode == "full" else 0) + largest


def memory(shape: Shape, mode: str, layout: str, checkpointing: bool, gpus: int, tokens: int = TOKENS) -> float:
    """`tokens`: of a GPU's micro-step."""
    kept = activations(shape, mode, checkpointing, tokens)
    return states(shape, mode, layout, gpus) + working(shape, mode, layout) + kept + LOGIT_BUDGET


# -- communication and compute of a micro-step -----------------------------------------------------------------------


def traffic(shape: Shape, mode: str, layout: str, checkpointing: bool, gpus: int) -> float:
    """Bytes that a GPU sends (and receives) in a step of one micro-batch, by ring collectives.

    DDP reduces fp32 gradients: 2(n-1)/n of their bytes. ZeRO-1 and 2 scatter bf16 gradients and gather bf16 weights.
    FSDP2 gathers bf16 weights for the forward and again for the backward pass, and scatters bf16 gradients; ZeRO-3
    may gather a third time to recompute a checkpointed layer. Frozen weights are gathered, and have no gradient.
    """
    ring = (gpus - 1) / gpus
    if mode != "full":
        adapters = 2 * 4 * shape.adapters
        gathers = 3 if layout == "zero3" and checkpointing else 2
        return ring * (adapters + (0 if layout == "ddp" else gathers * frozen(shape, mode)))
    p = shape.parameters
    passes = {
        "ddp": 2 * 4, "zero1": 2 * 2, "zero2": 2 * 2, "fsdp2": 3 * 2, "fsdp2_offload": 3 * 2,
        "zero3": 4 * 2 if checkpointing else 3 * 2,
    }  # fmt: skip
    return ring * passes[layout] * p


def bandwidth(gpus: int) -> float:
    """What a ring moves through a GPU in a second.

    Over several nodes NCCL runs a ring for each network adapter, so that a node's eight share the crossing.
    """
    between = GPUS_PER_NODE * NETWORK
    return REACHED * (NVLINK if gpus <= GPUS_PER_NODE else min(NVLINK, between))


def transfer_seconds(shape: Shape, mode: str, layout: str, checkpointing: bool, gpus: int) -> float:
    return traffic(shape, mode, layout, checkpointing, gpus) / bandwidth(gpus)


def compute_seconds(shape: Shape, mode: str, checkpointing: bool) -> float:
    """2 operations for each weight that multiplies a token, in the forward, the input's and the weight's gradient.

    Frozen weights have no gradient of their own; checkpointing runs the layers' forward pass twice. Attention itself
    is left out.
    """
    layers, head = shape.layers * shape.layer, shape.table
    passes = 3 if mode == "full" else 2
    operations = 2 * TOKENS * (passes * (layers + head) + (layers if checkpointing else 0))
    return operations / (MFU * PEAK_FLOPS)


# -- what to take ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    layout: str
    checkpointing: bool
    bytes: float
    seconds: float


def choices(shape: Shape, mode: str, gpus: int) -> Iterator[Choice]:
    """The layouts that fit, the simpler ones first; transfers are taken to run beside the work."""
    for layout in ("ddp", "fsdp2", "zero2", "zero1") if mode == "full" else ("ddp", "fsdp2"):
        for checkpointing in (False, True):
            size = memory(shape, mode, layout, checkpointing, gpus)
            if size <= USABLE:
                seconds = max(
                    compute_seconds(shape, mode, checkpointing),
                    transfer_seconds(shape, mode, layout, checkpointing, gpus),
                )
                yield Choice(layout, checkpointing, size, seconds)


def recommend(shape: Shape, mode: str, gpus: int) -> Choice | None:
    """The quickest that fits; of equals the simplest. None: nothing does without offloading."""
    return min(choices(shape, mode, gpus), key=lambda choice: choice.seconds, default=None)


# -- tables ----------------------------------------------------------------------------------------------------------


def gb(value: float) -> str:
    return f"{value / 1e9:,.1f}" if value < 99.95e9 else f"{value / 1e9:,.0f}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shapes_table() -> str:
    rows = []
    for s in SHAPES:
        dims = f"{s.layers} x {s.hidden:,}, MLP {s.intermediate:,}, heads {s.heads}/{s.kv_heads} x {s.head_dim}"
        rows.append([s.name, dims, f"{s.vocab:,}", f"{s.parameters:,}", f"{s.adapters / 1e6:,.0f}M"])
    return markdown(["model", "layers x hidden", "vocabulary", "parameters", f"adapters, rank {RANK}"], rows)


def activations_table() -> str:
    rows = [
        [
            s.name,
            gb(activations(s, "full", False)),
            gb(activations(s, "LoRA", False)),
            gb(activations(s, "full", True)),
            gb(full_logits(s)),
            gb(LOGIT_BUDGET),
        ]
        for s in SHAPES
    ]
    header = ["model", "all kept, full", "all kept, LoRA", "checkpointing", "full logits", "logits in chunks, at most"]
    return markdown(header, rows)


def memory_table() -> str:
    """Everything but activations and logits, full fine-tuning."""
    rows = []
    for s in SHAPES:
        for layout in ("ddp", "zero1", "zero2", "fsdp2"):
            sizes = [states(s, "full", layout, gpus) + working(s, "full", layout) for gpus in GPUS]
            rows.append([s.name, layout, *map(gb, sizes)])
    return markdown(["model", "layout", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def adapters_table() -> str:
    rows = []
    for s in SHAPES:
        for mode in ("LoRA", "QLoRA"):
            for layout in ("ddp", "fsdp2"):
                sizes = [states(s, mode, layout, gpus) + working(s, mode, layout) for gpus in GPUS]
                rows.append([s.name, mode, layout, *map(gb, sizes)])
    return markdown(["model", "mode", "layout", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def traffic_table() -> str:
    """GB and milliseconds of the transfers, and the milliseconds of the work."""
    rows = []
    for s in SHAPES:
        for mode, layout, checkpointing in (
            ("full", "ddp", True),
            ("full", "zero2", True),
            ("full", "fsdp2", True),
            ("full", "zero3", True),
            ("LoRA", "ddp", True),
            ("LoRA", "fsdp2", True),
            ("QLoRA", "fsdp2", True),
        ):
            cells = [
                f"{gb(traffic(s, mode, layout, checkpointing, gpus))} / "
                f"{ms(transfer_seconds(s, mode, layout, checkpointing, gpus))}"
                for gpus in (GPUS[0], GPUS[1], GPUS[-1])
            ]
            name = "zero1, zero2" if layout == "zero2" else layout
            rows.append([s.name, mode, name, *cells, ms(compute_seconds(s, mode, checkpointing))])
    header = ["model", "mode", "layout", *(f"{n} GPUs, GB / ms" for n in (GPUS[0], GPUS[1], GPUS[-1])), "work, ms"]
    return markdown(header, rows)


def recommendation_table() -> str:
    rows = []
    for s in SHAPES:
        for mode in MODES:
            cells = []
            for gpus in GPUS:
                found = recommend(s, mode, gpus)
                if found is None:
                    host = 16 * s.parameters / gpus
                    cells.append(f"fsdp2_offload ({gb(host)} on the host)")
                else:
                    cells.append(f"{found.layout}{', checkpointing' * found.checkpointing} ({gb(found.bytes)})")
            rows.append([s.name, mode, *cells])
    return markdown(["model", "mode", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


TABLES: dict[str, Callable[[], str]] = {
    "shapes": shapes_table,
    "activations": activations_table,
    "memory": memory_table,
    "adapters": adapters_table,
    "traffic": traffic_table,
    "recommendation": recommendation_table,
}


def filled(page: str, tables: dict[str, Callable[[], str]] = TABLES) -> str:
    """`page` with each table between its marks."""
    for name, table in tables.items():
        start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
        before, _, rest = page.partition(start)
        _, mark, after = rest.partition(end)
        if not mark:
            raise ValueError(f"the page has no marks for the table {name!r}")
        page = before + start + table() + end + after
    return page


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        path = Path(__file__).parents[1] / "docs" / "multi-gpu.md"
        path.write_text(filled(path.read_text("utf-8")), "utf-8")
    elif arguments:
        raise SystemExit("usage: python examples/multi_gpu_arithmetic.py [--write]")
    else:
        print("\n".join(f"{name}\n\n{table()}" for name, table in TABLES.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
