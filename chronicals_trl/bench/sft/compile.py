"""The bare loop: a compiled model over packed rows, full logits, fused AdamW, and no trainer.

Rows are packed by first fit in the order of the documents, and joined into one row of static length; its documents'
bounds are padded with empty documents to a static number, so that nothing is compiled twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from chronicals_trl.bench.sft.cases import PAD, Documents, Task
from chronicals_trl.bench.sft.count import IGNORED, Counted
from chronicals_trl.bench.sft.meter import Meter

__all__ = ["attention", "fill_rows", "loop"]

_OPEN_ROWS = 32


def attention() -> str:
    """torch's varlen attention on a GPU, SDPA elsewhere."""
    if not torch.cuda.is_available():
        return "sdpa"
    from chronicals_trl.bench.sft.attention import register

    return register()


def fill_rows(lengths: np.ndarray[Any, Any], capacity: int) -> Iterator[list[int]]:
    """Indices of the documents of each row: each goes to the first of the last few rows that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths.tolist()):
        at = next((i for i, left in enumerate(room) if left >= length), None)
        if at is None:
            if len(rows) == _OPEN_ROWS:
                fullest = min(range(len(room)), key=room.__getitem__)
                yield rows.pop(fullest)
                room.pop(fullest)
            rows.append([])
            room.append(capacity)
            at = len(rows) - 1
        rows[at].append(index)
        room[at] -= length
    yield from rows


def _batches(task: Task) -> Iterator[list[list[list[int]]]]:
    """Documents of the rows of each step, over and over."""
    documents = Documents.load(task.documents)
    ids = documents.lists()
    while True:
        rows: list[list[list[int]]] = []
        for row in fill_rows(documents.lengths, task.row_tokens):
            rows.append([ids[index] for index in row])
            if len(rows) == task.rows:
                yield rows
                rows = []


def collate(rows: list[list[list[int]]], row_tokens: int, bounds: int) -> dict[str, Tensor]:
    """(1, rows * row_tokens), padding as documents without labels, and `bounds` + 1 cumulative lengths."""
    length = len(rows) * row_tokens
    input_ids = torch.full((1, length), PAD)
    labels = torch.full((1, length), IGNORED)
    positions = torch.zeros((1, length), dtype=torch.int64)
    ends = [0]
    for number, row in enumerate(rows):
        at = number * row_tokens
        for part in row:
            tokens = torch.tensor(part)
            end = at + len(part)
            input_ids[0, at:end] = tokens
            labels[0, at + 1 : end] = tokens[1:]  # the first token follows another document's last
            positions[0, at:end] = torch.arange(len(part))
            ends.append(end)
            at = end
        end = (number + 1) * row_tokens
        if at < end:
            positions[0, at:end] = torch.arange(end - at)
            ends.append(end)
    if len(ends) > bounds + 1:
        raise ValueError(f"{len(ends) - 1} documents in a step, more than the {bounds} that there is room for")
    ends += [length] * (bounds + 1 - len(ends))
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": positions,
        "cu_seq_lens_q": torch.tensor(ends, dtype=torch.int32),
    }


def loop(task: Task, meter: Meter, model: Any, *, checkpointing: bool) -> list[dict[str, Any]]:
    """Train; returns the logs. Loss and gradient norm are read every `log_every` steps, as a Trainer reads them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = device.type == "cuda"

    def loss_of(input_ids: Tensor, positions: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        documents = {"cu_seq_lens_q": cu_seqlens, "max_length_q": task.row_tokens} if packed else {}
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=input_ids, position_ids=positions, use_cache=False, **documents).logits
        return functional.cross_entropy(logits[0].float(), targets, ignore_index=IGNORED)

    # On a CPU Inductor would compile C++ for minutes, to show nothing.
    step = torch.compile(loss_of, backend="inductor" if packed else "aot_eager", dynamic=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.learning_rate, weight_decay=0.0, fused=True)
    bounds = _most_documents(task)
    meter.counted = Counted(lambda rows: collate(rows, task.row_tokens, bounds))
    logs = []
    total = torch.zeros((), device=device)
    batches = _batches(task)
    for done in range(task.total_steps):
        meter.begin(done)
        batch = {
            key: (value.pin_memory() if packed else value).to(device, non_blocking=True)
            for key, value in meter.counted(next(batches)).items()
        }
        targets = functional.pad(batch["labels"][0, 1:], (0, 1), value=IGNORED)
        loss = step(batch["input_ids"], batch["position_ids"], targets, batch["cu_seq_lens_q"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        if (done + 1) % task.log_every == 0:
            logs.append({"step": done + 1, "loss": float(total) / task.log_every, "grad_norm": float(norm)})
            total.zero_()
        meter.end(done + 1)
    return logs


def _most_documents(task: Task) -> int:
    """Enough for any step: the documents of the rows that hold most, with a padding each, rounded up."""
    lengths = Documents.load(task.documents).lengths
    most = sorted((len(row) + 1 for row in fill_rows(lengths, task.row_tokens)), reverse=True)
    return -(-sum(most[: task.rows]) // 64) * 64
