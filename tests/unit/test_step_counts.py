"""How many steps there are, against Accelerate's own count of batches, and what the report says of them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from chronicals_trl.packing.steps import StepCounts

SHORT = StepCounts(
    documents=200, rows=5, empty_rows=0, capacity=1024, batch_size=8, ranks=1, accumulation=1, epochs=1.0
)
LONG = dataclasses.replace(SHORT, documents=32_000, rows=800)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_are_those_of_accelerate(ranks: int, drop_last: bool) -> None:
    for samples, size, accumulation in itertools.product(range(1, 40), (1, 2, 5), (1, 4)):
        batches = BatchSampler(range(samples), size, drop_last)
        shard = len(BatchSamplerShard(batches, num_processes=ranks, process_index=0))
        counts = dataclasses.replace(
            SHORT, batch_size=size, ranks=ranks, accumulation=accumulation, drop_last=drop_last
        )
        steps = shard // accumulation + (shard % accumulation > 0)
        assert counts.in_epoch(samples) == steps, (samples, size, accumulation)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "8 rows of 1,024 tokens, about 320 documents, on 1 process; 100 steps an epoch, 4,000 without packing"),
        ({"documents": 1_000}, "8 rows of 1,024 tokens, about 10 documents, on 1 process; 100 steps an epoch, 125 "
         "without packing"),
        ({"documents": 900}, "8 rows of 1,024 tokens, about 9 documents, on 1 process; 100 steps an epoch, 113 "
         "without packing"),
        ({"documents": 850}, "8 rows of 1,024 tokens, about 8.5 documents, on 1 process; 100 steps an epoch, 107 "
         "without packing"),
        ({"ranks": 2, "accumulation": 4}, "64 rows of 1,024 tokens (gradient_accumulation_steps=4), about 2,560 "
         "documents, on 2 processes; 13 steps an epoch, 500 without packing"),
        ({"rows": 797, "empty_rows": 3, "exact": False}, "8 rows of 1,024 tokens, about 321 documents, on 1 process; "
         "100 steps an epoch, about 4,000 without packing"),
        ({"max_steps": 1_000}, "8 rows of 1,024 tokens, about 320 documents, on 1 process; 100 steps an epoch, 4,000 "
         "without packing; max_steps=1,000 is 10 epochs, 0.25 without"),
    ],
)  # fmt: skip
def test_the_line(changes: dict[str, object], line: str) -> None:
    counts = dataclasses.replace(LONG, **changes)
    assert counts.describe(processes=counts.ranks) == f"a step: {line}"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "all 5 rows of 1,024 tokens, 200 documents, on 1 process; 1 step an epoch, 25 without packing"),
        ({"rows": 1}, "1 row of 1,024 tokens, 200 documents, on 1 process; 1 step an epoch, 25 without packing"),
        ({"empty_rows": 3, "drop_last": True}, "all 5 rows of 1,024 tokens, 200 documents, on 1 process; 1 step an "
         "epoch, 25 without packing"),
        ({"batch_size": 2, "accumulation": 4, "drop_last": True}, "4 rows of 1,024 tokens "
         "(gradient_accumulation_steps=4), about 160 documents, on 1 process; 1 step an epoch, 25 without packing"),
        ({"drop_last": True}, "8 rows of 1,024 tokens, about 320 documents, on 1 process; 0 steps an epoch "
         "(dataloader_drop_last=True, and 5 are no full batch), 25 without packing"),
        ({"max_steps": 100}, "all 5 rows of 1,024 tokens, 200 documents, on 1 process; 1 step an epoch, 25 without "
         "packing; max_steps=100 is 100 epochs, 4 without"),
    ],
)  # fmt: skip
def test_the_line_of_a_small_data_set(changes: dict[str, object], line: str) -> None:
    assert dataclasses.replace(SHORT, **changes).describe(processes=1) == f"a step: {line}"


def test_ranks_that_share_rows_are_processes() -> None:
    assert ", on 4 processes;" in dataclasses.replace(LONG, ranks=2).describe(processes=4)


@pytest.mark.parametrize(
    ("changes", "leaves", "ways"),
    [
        ({}, "1 optimizer step in the whole run, 25 without it", "a smaller per_device_train_batch_size, or more "
         "num_train_epochs"),
        ({"epochs": 3.0}, "3 optimizer steps in the whole run, 75 without it", "a smaller "
         "per_device_train_batch_size, or more num_train_epochs"),
        ({"epochs": 0.5}, "1 optimizer step in the whole run, 13 without it", "a smaller "
         "per_device_train_batch_size, or more num_train_epochs"),
        ({"batch_size": 1, "accumulation": 4}, "2 optimizer steps in the whole run, 50 without it", "a smaller "
         "gradient_accumulation_steps, or more num_train_epochs"),
        ({"batch_size": 1, "exact": False}, "5 optimizer steps in the whole run, about 200 without it",
         "more num_train_epochs"),
        ({"drop_last": True, "max_steps": 50}, "0 optimizer steps in the whole run, 50 without it",
         "dataloader_drop_last=False, or a smaller per_device_train_batch_size"),
    ],
)  # fmt: skip
def test_too_few_steps(changes: dict[str, object], leaves: str, ways: str) -> None:
    told = dataclasses.replace(SHORT, **changes).too_few()
    assert told is not None and f"packing leaves {leaves};" in told and told.endswith(f". Set {ways}")


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 10.0},  # ten steps
        {"max_steps": 5},  # as few without packing
        {"documents": 16, "batch_size": 8},  # two without packing
    ],
)
def test_steps_enough(changes: dict[str, object]) -> None:
    assert dataclasses.replace(SHORT, **changes).too_few() is None


def test_three_times_as_many_are_many() -> None:
    assert dataclasses.replace(SHORT, documents=17).too_few() is not None
    assert dataclasses.replace(SHORT, epochs=9.0).too_few() is not None
