"""What is known before the first step: what is to be trained and how fast, and whether the documents look right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from torch import nn

from chronicals_trl.observe.health.findings import Finding

__all__ = ["describe_groups", "dropped_documents", "duplicate_bos", "elements", "rate_of", "trained_share"]

_DROPPED_SHARE = 0.1
_SAMPLED_DOCUMENTS = 200


def elements(parameters: Iterable[Any]) -> int:
    """Numbers in the parameters, wherever they are: packed in 4 bits, sharded, or not there (ZeRO-3)."""
    count = 0
    for parameter in parameters:
        quantised = getattr(getattr(parameter, "quant_state", None), "shape", None)
        count += quantised.numel() if quantised is not None else getattr(parameter, "ds_numel", parameter.numel())
    return count


def trained_share(model: nn.Module) -> str:
    """How much of a model is trained, in words."""
    parameters = list(model.parameters())
    trained = elements(parameter for parameter in parameters if parameter.requires_grad)
    total = elements(parameters)
    return f"{trained:,} of {total:,} parameters are trained ({trained / max(1, total):.2%})"


def rate_of(group: dict[str, Any]) -> float | None:
    """A group's learning rate; None where the optimizer has its own, or reading a GPU would wait."""
    rate = group.get("lr")
    return None if rate is None or getattr(rate, "is_cuda", False) else float(rate)


def describe_groups(groups: Sequence[dict[str, Any]]) -> str:
    """The optimizer's groups in words: tensors, numbers, learning rate, weight decay."""
    told = []
    for group in groups:
        rate = rate_of(group)
        count = f"{len(group['params'])} tensors of {elements(group['params']):,} numbers"
        decay = f", weight decay {group['weight_decay']:g}" if group.get("weight_decay") else ""
        told.append(count + ("" if rate is None else f" at learning rate {rate:g}") + decay)
    return f"optimizer groups: {'; '.join(told)}"


def dropped_documents(dropped: int, total: int) -> Finding | None:
    """Documents of the training set in which nothing is left to learn; None while they are few."""
    if not total or dropped <= _DROPPED_SHARE * total:
        return None
    return Finding(
        "dropped_documents",
        f"{dropped:,} of {total:,} training documents ({dropped / total:.0%}) have no label to learn and are left out",
        "prompts that fill max_length before the completion begins, an assistant or completion mask that is empty, "
        "or empty texts",
        "raise max_length, or look at the chat template's {% generation %} part and at such a document's labels",
    )


def duplicate_bos(data: Any, bos: int | None) -> Finding | None:
    """Whether documents begin with the beginning-of-sequence token twice, judged by a sample; streams are not read."""
    if bos is None or not isinstance(data, Dataset) or "input_ids" not in data.column_names or not len(data):
        return None
    sample = range(0, len(data), max(1, len(data) // _SAMPLED_DOCUMENTS))
    starts = [list(data[index]["input_ids"][:3]) for index in sample]
    # More than two are padding on the left, of rows that came tokenised.
    twice = sum(start[:2] == [bos, bos] and start[2:] != [bos] for start in starts)
    if 2 * twice <= len(starts):
        return None
    return Finding(
        "duplicate_bos",
        f"{twice:,} of {len(starts):,} sampled training documents begin with the token {bos} (BOS) twice",
        "the tokenizer puts BOS in front of texts that have it already, from a chat template for example",
        "take BOS out of the texts or of the template, or set tokenizer.add_bos_token=False; pass conversations as "
        "'messages' and TRL applies the template without it",
    )
