"""The products of one training step of ours, with attention, in their order, shapes, dtypes and layouts.

What the patched model computes (`kernels/_shared_linear`, `_gated_mlp`, `_lora_core`, `_lora_mlp`,
`_cross_entropy_chunks`), without what lies between. Each layer has weights, q, k and v of its own; all other tensors
rotate among so many sets that together they exceed the L2 cache. What an op of the step would read from another one's
hand holds normal numbers of unit size: the power that a product draws, and with it the clock, depends on its operands.

Legend: N positions, H hidden, I intermediate, A and K widths of query and key heads, O outputs, V vocabulary, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chronicals_trl.bench.sft.cases import LORA_RANK, Shape
from chronicals_trl.bench.sft.floor_bytes import Traffic
from chronicals_trl.bench.sft.floor_head import head_ops
from chronicals_trl.bench.sft.floor_layer import Attend, Attention, Group, Linear
from chronicals_trl.bench.sft.floor_ops import ELEMENTWISE, OPTIMIZER, Op, Operand, moved
from chronicals_trl.kernels import _lora_core as core

__all__ = ["Step", "make_step", "set_bytes"]

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Step:
    """What to replay, and what it is made from.

    Args:
        shape, mode, master: As in `Task`.
        tokens, squares: As in `Batch`.
        recompute: Gradient checkpointing of all layers.
        attend: Attention within the batch's documents; None (with tensors on meta) if nothing will run.
        device: Of the tensors.
        sets: How many sets of tensors layers take in turn.
    """

    shape: Shape
    mode: str
    master: str
    tokens: int
    squares: int
    recompute: bool
    attend: Attend | None
    device: torch.device
    sets: int = 2

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.shape, self.mode, self.master, self.tokens)


def make_step(step: Step) -> list[Op]:
    """All ops of the step, in order."""
    traffic, layers = step.traffic, _layers(step)
    ops = moved("casts of weights", traffic.weight_casts()) + moved("embedding", traffic.embedding())
    for number, layer in enumerate(layers):
        ops += layer.forward(first=number == 0)
    ops += moved("norm", traffic.norm())
    ops += head_ops(step.shape, step.mode, step.master, step.tokens, step.device)
    ops += moved("cross-entropy", traffic.cross_entropy()) + moved("head's sum", traffic.head_sum())
    ops += moved("last norm, backward", traffic.last_norm_backward())
    for number, layer in reversed(list(enumerate(layers))):
        if step.recompute:
            ops += layer.forward(first=number == 0, again=True)
        ops += layer.backward(first=number == 0)
    ops += moved("embedding, backward", traffic.embedding_backward())
    ops += moved("casts of gradients", traffic.gradient_casts())
    ops += moved("gradient norm", traffic.gradient_norm(), OPTIMIZER) + moved("AdamW", traffic.adamw(), OPTIMIZER)
    return ops


# -- tensors ----------------------------------------------------------------------------------------------------------


def _random(step: Step, rows: int, columns: int, deviation: float = 1.0) -> Tensor:
    made = torch.empty(rows, columns, dtype=BF16, device=step.device)
    return made if made.is_meta else made.normal_(0.0, deviation)


# -- a layer ----------------------------------------------------------------------------------------------------------


class _Layer:
    def __init__(self, step: Step, attention: Attention, qkv: Group, o: Group, inner: Group, down: Group) -> None:
        self._step, self._traffic, self._attention = step, step.traffic, attention
        self._qkv, self._o, self._inner, self._down = qkv, o, inner, down

    def forward(self, first: bool, again: bool = False) -> list[Op]:
        """With `again` without down: the backward pass needs what it reads, not what it gives."""
        traffic = self._traffic
        ops = moved("first norm" if first else "norm", traffic.norm(first))
        ops += moved("weights from 4 bits", traffic.dequantised(down=not again))
        ops += self._qkv.forward()
        ops += moved("rope", traffic.rope())
        ops += [self._attention.forward, *self._o.forward()]
        ops += moved("norm", traffic.norm())
        ops += self._inner.forward()
        ops += self._activation("activation", traffic.activation(), 3)
        return ops if again else [*ops, *self._down.forward()]

    def backward(self, first: bool) -> list[Op]:
        traffic, adapted = self._traffic, self._traffic.adapted
        # Nothing in front of the first layer is trained beside adapters, unless checkpoints make the input a leaf.
        need_x = not (first and adapted and not self._step.recompute)
        ops = moved("weights from 4 bits", traffic.dequantised())
        ops += self._down.input_gradient()
        if adapted:
            ops += self._down.adapter_gradients(True)
        ops += self._activation("activation, backward", traffic.activation_backward(), 4)
        ops += self._down.weight_gradients()
        ops += self._inner.input_gradient()
        ops += self._inner.adapter_gradients(True) if adapted else self._inner.weight_gradients()
        ops += moved("norm, backward", traffic.norm_backward())
        ops += [*self._o.input_gradient(), *self._o.adapter_gradients(True)] if adapted else self._o.by_turns()
        ops += [self._attention.backward, *moved("rope, backward", traffic.rope())]
        if adapted:
            ops += self._qkv.input_gradient() if need_x else []
            ops += self._qkv.adapter_gradients(need_x)
        else:
            ops += self._qkv.by_turns()
        ops += moved("biases", traffic.biases())
        if need_x:
            ops += moved("first norm, backward" if first else "norm, backward", traffic.norm_backward(first))
        return ops

    def _activation(self, name: str, count: float, products: int) -> list[Op]:
        """Of adapters with the rank-sized products inside: of gate, up and down; back, dB of two, down's dx and dA."""
        shape, traffic = self._step.shape, self._traffic
        each = 2.0 * self._step.tokens * shape.intermediate * LORA_RANK if traffic.adapted else 0.0
        inside = traffic.inside_activation()
        return moved(name, count, ELEMENTWISE, products * each) + moved("adapters in the activation", inside)


def set_bytes(step: Step) -> int:
    """Of the tensors that rotate, one layer's."""
    return sum(tensor.nbytes for tensor in _rotating(replace(step, device=torch.device("meta"))).values())


def _layers(step: Step) -> list[_Layer]:
    sets = [_rotating(step) for _ in range(min(step.sets, step.shape.layers))]
    return [_layer(step, sets[number % len(sets)]) for number in range(step.shape.layers)]


def _rotating(step: Step) -> dict[str, Tensor]:
    """Tensors of a layer whose contents no other op of the replay depends on."""
    shape, full = step.shape, step.mode == "full"
    a, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    n, h, i = step.tokens, shape.hidden, shape.intermediate
    made = {name: _random(step, n, h) for name in ("x", "x2", "o", "d_o", "down", "d_out", "d_x", "d_x2")}
    made |= {name: _random(step, n, i) for name in ("gate", "up", "product", "d_product", "d_gate", "d_up")}
    made |= {name: _random(step, n, a) for name in ("attended", "d_attended", "d_q")}
    made |= {name: _random(step, n, k) for name in ("d_k", "d_v")}
    if not full:
        made |= {"h1": _random(step, n, LORA_RANK), "h2": _random(step, n, 2 * LORA_RANK)}
        made["h3"] = _random(step, n, 3 * LORA_RANK)
        if _pays(step):
            made |= {f"joint_{name}": _random(step, i, h + 2 * LORA_RANK, i**-0.5) for name in ("gate", "up")}
            made["d_x2"] = _random(step, n, h + 2 * LORA_RANK)
        return made
    sizes = {"q": (a, h), "k": (k, h), "v": (k, h), "o": (h, a), "gate": (i, h), "up": (i, h), "down": (h, i)}
    return made | {f"d_{name}_weight": _random(step, *size) for name, size in sizes.items()}


def _pays(step: Step) -> bool:
    """As `_lora_core._in_one_pass` decides for gate and up; for no other group of these models it does."""
    shape = step.shape
    enough = min(step.tokens, 2 * shape.intermediate) >= core._MANY * shape.hidden
    return enough and (shape.hidden + 2 * LORA_RANK) % 8 == 0


def _layer(step: Step, of_set: dict[str, Tensor]) -> _Layer:
    shape, full = step.shape, step.mode == "full"
    a, k, h, i = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden, shape.intermediate

    def linear(name: str, inputs: int, outputs: int, out: Tensor, grad: Operand, bias: bool = False) -> Linear:
        return Linear(
            name, _random(step, outputs, inputs, inputs**-0.5), out, grad, of_set.get(f"d_{name}_weight"),
            _random(step, 1, outputs)[0] if bias else None,
            None if full else _random(step, outputs, LORA_RANK, LORA_RANK**-0.5),
        )  # fmt: skip

    def group(x: Operand, d_x: Tensor, inputs: int, linears: list[Linear], **inside: Any) -> Group:
        count = len(linears)
        a_of_all = None if full else _random(step, count * LORA_RANK, inputs, inputs**-0.5)
        return Group(x, d_x, linears, a_of_all, of_set.get(f"h{count}"), **inside)

    outs = [_random(step, step.tokens, width) for width in (a, k, k)]
    stand_ins = [of_set[name] for name in ("attended", "d_q", "d_k", "d_v")]
    attention = Attention(step.attend, shape.head_dim, step.squares, outs, of_set["d_attended"], stand_ins)
    bias = shape.family == "qwen2"
    parts = zip("qkv", outs, range(3), strict=True)
    qkv = [linear(name, h, out.shape[1], out, attention.grad_of(at), bias) for name, out, at in parts]
    inner = [linear(name, h, i, of_set[name], of_set[f"d_{name}"]) for name in ("gate", "up")]
    joint = [of_set[f"joint_{name}"] for name in ("gate", "up")] if "joint_gate" in of_set else []
    o = linear("o", a, h, of_set["o"], of_set["d_o"])
    down = linear("down", i, h, of_set["down"], of_set["d_out"])
    return _Layer(
        step,
        attention,
        group(of_set["x"], of_set["d_x"], h, qkv),
        group(attention.out, of_set["d_attended"], a, [o]),
        group(of_set["x2"], of_set["d_x2"], h, inner, joint=joint, added_inside=True),
        group(of_set["product"], of_set["d_product"], i, [down], read_inside=True),
    )
