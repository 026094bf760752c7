"""A TRL script inside a package: `trl.` attributes, HfArgumentParser, and classes that spawned workers must find."""

import tiny
import torch
import trl
from transformers import HfArgumentParser

from . import __name__ as package


class MyCollator:
    """Defined in the script: a spawned worker unpickles it from `__main__`."""

    def __call__(self, examples):
        assert package == "pkg"
        length = max(len(example["input_ids"]) for example in examples)
        rows = [example["input_ids"] + [1] * (length - len(example["input_ids"])) for example in examples]
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": ids.masked_fill(ids == 1, -100)}


class MyTrainer(trl.SFTTrainer):
    """Nothing overridden: a user's subclass gets ours as its base."""


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    (training_args,) = HfArgumentParser(trl.SFTConfig).parse_args_into_dataclasses()
    assert MyTrainer.__mro__[1].__module__.startswith("chronicals_trl"), MyTrainer.__mro__
    tiny.train(MyTrainer, training_args, data_collator=MyCollator())
