"""The bytes that a training step has to move outside of its products and of attention, op by op.

Each op reads what it needs once and writes what others need once, whatever today's kernels do. N positions, H hidden,
I intermediate, A and K the widths of all query and of all key heads, V vocabulary, R rank; e = 2 bytes of a product's
operand; s of the residual stream and w of a weight, each 2, or 4 with fp32 masters under autocast; p of a trained
weight, which is 4 for adapters (PEFT's default) and else w; b = e where s is another dtype, else 0: a second, narrow
copy of a gradient, for the products.

    embedding                 N H (w + s)             rows in, stream out
    first norm                N H (s + e)
    norm                      N H (2 e + 2 s)         branch and stream in; their sum and the normed out
    rope, both ways           2 N (A + K) e
    activation                3 N I e                 gate, up in; their product out
    activation, backward      5 N I e                 and its gradient in; two gradients out
    adapters in the activation   3 N R e              each way: the rank-sized tensors of gate, up and down
    last norm, backward       N H (e + 2 s + b)
    norm, backward            N H (e + 3 s + b)       gradients of both outputs, the sum in; one gradient out
    first norm, backward      N H (e + 3 s)
    biases                    N (A + 2 K) e           sums of gradients over tokens
    cross-entropy             2 N V e                 logits in, their gradient out
    head's sum                6 V H                   float32 to bf16; none with fp32 masters
    embedding, backward       N H (s + 2 w) tied      gradient rows in, added to rows of the head's gradient
                              N H s + V H w           untied: and a gradient of its own out
    casts of weights          6 each                  fp32 masters, or adapters: to bf16
    casts of gradients        6 each                  and back; not of the head's, whose sum is float32 already
    weights from 4 bits       (2.5 + 1/64) each       for each product's pass over them
    gradient norm             p each trained weight
    AdamW                     7 p each                weight, gradient, two moments in; three of them out

Gradients are summed over micro-batches in the products (there is one here), clipped inside of AdamW, and freed, not
zeroed. Statistics of a number a row (a norm's, the softmax's, attention's) are left out, as are token ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from chronicals_trl.bench.sft.cases import LORA_RANK, Shape

__all__ = ["Traffic"]

E = 2
FOUR_BITS = 0.5 + 1 / 64  # and a scale of a byte for 64 weights


@dataclass(frozen=True)
class Traffic:
    """Bytes of each op of one step; see the top of this file.

    Args:
        shape, mode, master: As in `Task`.
        tokens: N.
    """

    shape: Shape
    mode: str
    master: str
    tokens: int

    @property
    def adapted(self) -> bool:
        return self.mode != "full"

    @property
    def _w(self) -> int:
        return 4 if self.master == "fp32" else 2

    @property
    def _b(self) -> int:
        return E if self._w != E else 0

    @property
    def _nh(self) -> int:
        return self.tokens * self.shape.hidden

    @property
    def _widths(self) -> tuple[int, int]:
        return self.shape.heads * self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim

    # -- forward ------------------------------------------------------------------------------------------------------

    def embedding(self) -> float:
        return self._nh * 2 * self._w

    def norm(self, first: bool = False) -> float:
        return self._nh * (self._w + E) if first else self._nh * (2 * E + 2 * self._w)

    def rope(self) -> float:
        return 2 * self.tokens * sum(self._widths) * E

    def activation(self) -> float:
        return 3 * self.tokens * self.shape.intermediate * E

    def inside_activation(self) -> float:
        return 3 * self.tokens * LORA_RANK * E if self.adapted else 0.0

    def cross_entropy(self) -> float:
        return 2 * self.tokens * self.shape.vocab * E

    # -- backward -----------------------------------------------------------------------------------------------------

    def activation_backward(self) -> float:
        return 5 * self.tokens * self.shape.intermediate * E

    def norm_backward(self, first: bool = False) -> float:
        return self._nh * (E + 3 * self._w + (0 if first else self._b))

    def last_norm_backward(self) -> float:
        return self._nh * (E + 2 * self._w + self._b)

    def biases(self) -> float:
        a, k = self._widths
        return self.tokens * (a + 2 * k) * E if self.shape.family == "qwen2" and not self.adapted else 0.0

    def head_sum(self) -> float:
        return 6 * self.shape.head_weights if self.mode == "full" and self.master == "bf16" else 0.0

    def embedding_backward(self) -> float:
        if self.adapted:
            return 0.0
        if self.shape.tied:
            return self._nh * 3 * self._w
        return self._nh * self._w + self.shape.head_weights * self._w

    # -- weights ------------------------------------------------------------------------------------------------------

    def weight_casts(self) -> float:
        """fp32 to bf16, once a step."""
        return 6 * self._wide_weights(head=True)

    def gradient_casts(self) -> float:
        return 6 * self._wide_weights(head=False)

    def _wide_weights(self, head: bool) -> int:
        """Weights in fp32 that products read in bf16; 4-bit ones are none."""
        wide = self.shape.lora_weights if self.adapted else 0
        if self.master == "fp32" and self.mode == "full":
            wide += self.shape.linear_weights + (self.shape.head_weights if head else 0)
        elif self.master == "fp32" and head:  # frozen: cast for the forward pass, no gradient
            wide += self.shape.head_weights + (0 if self.mode == "qlora" else self.shape.linear_weights)
        return wide

    def dequantised(self, down: bool = True) -> float:
        """One pass over one layer's weights, with down's or without."""
        layer = self.shape.linear_weights // self.shape.layers
        layer -= 0 if down else self.shape.hidden * self.shape.intermediate
        return layer * (FOUR_BITS + E) if self.mode == "qlora" else 0.0

    # -- optimizer ----------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> int:
        """Trained weights."""
        if self.adapted:
            return self.shape.lora_weights
        shape, (a, k) = self.shape, self._widths
        norms = (2 * shape.layers + 1) * shape.hidden
        biases = shape.layers * (a + 2 * k) if shape.family == "qwen2" else 0
        return shape.linear_weights + shape.head_weights * (1 if shape.tied else 2) + norms + biases

    def gradient_norm(self) -> float:
        return self.trained * self._p

    def adamw(self) -> float:
        return 7 * self.trained * self._p

    @property
    def _p(self) -> int:
        return 4 if self.adapted else self._w
