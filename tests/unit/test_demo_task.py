"""The demo's task: deterministic, no leak between the splits, and a scorer that forgives white space alone."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def task() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_task", EXAMPLES / "demo_task.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def test_same_seed_same_rows_other_seed_others(task: ModuleType) -> None:
    assert task.generate(50, 20, seed=3) == task.generate(50, 20, seed=3)
    assert task.generate(50, 20, seed=3)[0] != task.generate(50, 20, seed=4)[0]


@pytest.mark.parametrize("seed", range(5))
def test_splits_share_no_pair_and_no_request(task: ModuleType, seed: int) -> None:
    train, held_out = task.generate(1500, 300, seed=seed)
    assert (len(train), len(held_out)) == (1500, 300)
    assert not {row.pair for row in train} & {row.pair for row in held_out}
    assert len({row.request for row in train + held_out}) == 1800
    # The pair is what the record is about, not only a label that the generator keeps.
    assert all(word in row.record for row in train + held_out for word in row.pair)


def test_held_out_words_are_all_known_from_training(task: ModuleType) -> None:
    """Only the combinations are new: a name or an item never trained on would be another task."""
    train, held_out = task.generate(320, 48)
    assert {word for row in held_out for word in row.pair} <= {word for row in train for word in row.pair}


def test_record_says_what_the_request_says(task: ModuleType) -> None:
    order = re.compile(r"@order\{ (\w+) / (\d+) x ([\w ]+) / (\w{3}) \}")
    book = re.compile(r"@book\{ (\w+) / (\d+) in ([\w ]+) / (\w{3}) (\d+)([ap]m) \}")
    kinds = set()
    for row in task.generate(1000, 100)[0]:
        if match := order.fullmatch(row.record):
            name, count, item, day = match.groups()
            thing = task.PLURALS[item]
        else:
            match = book.fullmatch(row.record)
            assert match is not None, row.record
            name, count, thing, day, hour, half = match.groups()
            assert f"{hour} {half}" in row.request
        kinds.add(match.re.pattern)
        words = re.findall(r"\w+", row.request.lower())
        assert name in row.request and thing in row.request
        assert task.NUMBERS[int(count) - 2] in words
        assert [word[:3] for word in words if word.endswith("day")] == [day]
    assert len(kinds) == 2


def test_exact_match_forgives_white_space_alone(task: ModuleType) -> None:
    record = "@order{ Mia / 3 x lemon cake / fri }"
    assert task.is_match("\n@order{  Mia / 3 x\tlemon cake / fri }  ", record)
    for wrong in (
        record.lower(),
        record[:-1],
        record + " @",
        record.replace("3", "4"),
        record.replace(" / ", "/"),
        "",
    ):
        assert not task.is_match(wrong, record)
    assert task.exact_match([record, "no", record, "no"], [record] * 4) == 0.5
    for answers, expected in (([record], [record, record]), ([], [])):
        with pytest.raises(ValueError, match="one answer for each record"):
            task.exact_match(answers, expected)


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_impossible_counts_are_refused(task: ModuleType, count: int) -> None:
    with pytest.raises(ValueError, match=f"num_train={count} is not possible"):
        task.generate(count, 1)


def test_jsonl_has_trl_s_prompt_completion_rows(task: ModuleType, tmp_path: Path) -> None:
    train, _ = task.generate(7, 1)
    task.write_jsonl(tmp_path / "data" / "train.jsonl", train)
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert [row["completion"][0]["content"] for row in rows] == [example.record for example in train]
    assert [message["role"] for message in rows[0]["prompt"] + rows[0]["completion"]] == [
        "system",
        "user",
        "assistant",
    ]
    assert rows[0]["prompt"][1]["content"] == train[0].request
