"""What `bench head` times: the linear head with its cross-entropy, forward and backward, and the GEMMs alone.

**Data.** hidden is normal; weight is normal with a standard deviation of H^-0.5, so that logits have one of about 1.
Each row of hidden then gets its label's weight row added, from 4 to 16 times: the mean loss is near 3, some tokens are
nearly sure and some nearly hopeless, as in training, where noise alone would give log V for every token. No label is
ignored. All sides get the same tensors.

**Sides.** Each is called as its own library calls it in training, with that library's defaults, and gives the mean
loss of the labelled tokens over a number that is on the GPU already, where it takes one.

    ours           as the patched head calls it, with log-probabilities, entropy and accuracy of each token
    ours_1024      the same with logit_budget_mib=1024
    ours_135       and with 135, the paper's figure
    trl            the op behind TRL's fused head, with the outputs that its SFTTrainer asks for. The copy of the
                   labelled rows that the head makes first, and that costs TRL time and memory too, is left out.
    liger          LigerFusedLinearCrossEntropyFunction, Triton
    liger_cute     the same with its CuTe kernel for the cross-entropy of a chunk
    liger_sm90     Liger's other CuTe op, for Hopper: its own GEMMs, all logits in memory, V a multiple of 256
    cce            Apple's Cut Cross-Entropy, which skips small gradients by default
    cce_kahan      its variant cce_kahan_full_c, which no release on PyPI has had so far (25.1.1 is the newest)
    quack          chunked_linear_cross_entropy
    torch          torch.nn.functional.linear_cross_entropy in chunks, where torch has it
    compile        eager under torch.compile(fullgraph=True, dynamic=False)
    eager          all logits: F.cross_entropy(F.linear(hidden, weight).float(), labels)

**The floor.** The multiplications alone: logits and the gradient of hidden in chunks of tokens, the gradient of weight
in one over all tokens, by torch.mm into buffers that are there already, in the dtype of the inputs. That is 6 N H V
operations, 4 N H V with a frozen weight. Of several sizes of chunk the fastest is the floor.

Legend: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from chronicals_trl.bench.common import NotOffered
from chronicals_trl.kernels import linear_cross_entropy

__all__ = ["SHAPES", "SIDES", "Problem", "Shape", "floor_calls", "load_side", "make_problem"]

#: hidden, weight, labels and the number of labelled tokens (a 0-d tensor) to the mean loss.
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

FLOOR_CHUNKS = (2048, 4096, 8192)
LABEL_PULL = (4.0, 16.0)


@dataclass(frozen=True)
class Shape:
    """One head: N tokens, H hidden, V vocabulary; `sides` if not all of them are of interest."""

    name: str
    tokens: int
    hidden: int
    vocab: int
    sides: tuple[str, ...] | None = None


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", 16384, 896, 151_936),
        Shape("llama-3-8b", 8192, 4096, 128_256),
        # The paper's case: 4.98 GB of float32 logits, to be had in 135 MiB.
        Shape("paper", 8192, 896, 151_936, ("ours", "ours_135", "trl")),
    )
}


@dataclass(frozen=True)
class Problem:
    """The inputs of one shape.

    Args:
        hidden: (N, H), a leaf that is differentiated.
        weight: (V, H), a leaf; whether it is differentiated is the case's choice.
        labels: (N,) int64, none ignored.
        num_items: 0-d int64, N.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    num_items: torch.Tensor

    def loss(self, call: Call) -> torch.Tensor:
        return call(self.hidden, self.weight, self.labels, self.num_items)

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What is differentiated."""
        return [t for t in (self.hidden, self.weight) if t.requires_grad]

    def clear(self) -> None:
        """Drop the gradients: each call of a side makes its own."""
        self.hidden.grad = self.weight.grad = None


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Inputs from a fixed seed; see the module's text."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    weight = (normal(shape.vocab, shape.hidden) * shape.hidden**-0.5).to(dtype)
    labels = torch.randint(shape.vocab, (shape.tokens,), generator=generator, device=device)
    pull = torch.empty(shape.tokens, 1, device=device).uniform_(*LABEL_PULL, generator=generator)
    hidden = (normal(shape.tokens, shape.hidden) + pull * F.normalize(weight[labels].float(), dim=1)).to(dtype)
    return Problem(
        hidden.requires_grad_(), weight.requires_grad_(), labels, torch.full((), shape.tokens, device=device)
    )


def floor_calls(problem: Problem, frozen: bool) -> Iterator[tuple[int, Callable[[], None]]]:
    """Tokens in a chunk, and the multiplications alone; the buffers are there while the iterator is."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    tokens = hidden.shape[0]
    # As good as any normal numbers for the gradient of the logits: how fast a GPU multiplies depends on its data.
    grad_logits = hidden @ weight.t()
    logits = torch.empty_like(grad_logits)
    grad_hidden, grad_weight = torch.empty_like(hidden), None if frozen else torch.empty_like(weight)

    def multiply(chunk: int) -> None:
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            torch.mm(hidden[rows], weight.t(), out=logits[: hidden[rows].shape[0]])
            torch.mm(grad_logits[rows], weight, out=grad_hidden[rows])
        if grad_weight is not None:
            torch.mm(grad_logits.t(), hidden, out=grad_weight)

    for chunk in (*(c for c in FLOOR_CHUNKS if c < tokens), tokens):
        yield chunk, partial(multiply, chunk)


# -- the sides, imported when they are asked for ----------------------------------------------------------------------


def _ours(**options: Any) -> Call:
    return lambda hidden, weight, labels, items: (
        linear_cross_entropy(hidden, weight, labels, num_items=items, **options).loss
    )


def _trl() -> Call:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs = ("log_probs", "entropy", "is_top1")

    def call(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        log_probs, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        )
        return (-log_probs).sum() / items.clamp(min=1)

    return call


def _liger(ce_impl: str | None = None) -> Call:
    # From the module itself: the package exports another implementation where one is registered.
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, accum_dtype,
    # use_token_scaling, return_token_accuracy, return_predicted_tokens: the defaults of Liger's own module.
    options = (None, None, -100, 0.0, 0.0, "mean", None, False, None, False, False, False)
    return lambda hidden, weight, labels, items: LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, labels, *options, ce_impl
    )[0]


def _liger_sm90() -> Call:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return lambda hidden, weight, labels, items: liger_fused_linear_cross_entropy_sm90(hidden, weight, labels)


def _cce(impl: str) -> Call:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return lambda hidden, weight, labels, items: cut_cross_entropy(hidden, weight, labels, impl=impl)


def _quack() -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, labels, items: chunked_linear_cross_entropy(hidden, weight, labels)


def _torch() -> Call:
    call = getattr(F, "linear_cross_entropy", None)
    if call is None:
        raise NotOffered(f"torch {torch.__version__} has no linear_cross_entropy")
    chunked = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    options = {} if chunked is None else {"options": chunked()}
    return lambda hidden, weight, labels, items: call(hidden, weight, labels, **options)


def _eager(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _compile() -> Call:
    torch.compiler.reset()  # nothing of the last shape may make it fall back to dynamic shapes
    return torch.compile(_eager, fullgraph=True, dynamic=False)


SIDES: dict[str, Callable[[], Call]] = {
    "ours": _ours,
    "ours_1024": partial(_ours, logit_budget_mib=1024),
    "ours_135": partial(_ours, logit_budget_mib=135),
    "trl": _trl,
    "liger": _liger,
    "cce": partial(_cce, "cce"),
    "cce_kahan": partial(_cce, "cce_kahan_full_c"),
    "torch": _torch,
    "eager": lambda: _eager,
    "compile": _compile,
    "quack": _quack,
    "liger_cute": partial(_liger, "nvidia-cutedsl"),
    "liger_sm90": _liger_sm90,
}

#: What cannot run on a CPU at all, or (torch.compile) only after minutes of compiling C++.
NOT_ON_CPU = ("liger", "cce", "cce_kahan", "compile", "quack", "liger_cute", "liger_sm90")


def load_side(side: str) -> Call:
    """The op of one side. Raises `NotOffered`, here or when it is called, or what importing the library raises."""
    call = SIDES[side]()
    if side.startswith("ours"):  # what it does not support is a failure
        return call

    def peer(*args: torch.Tensor) -> torch.Tensor:
        try:
            return call(*args)
        except NotImplementedError as error:
            raise NotOffered(str(error)) from error

    return peer
