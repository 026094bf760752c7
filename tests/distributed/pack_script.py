"""Run by test_pack_ranks.py: packs one data set on all ranks, the figures written by each rank."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import datasets
import tiny_data
import tiny_models
from packing_data import make_rows
from ranks import leave

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.packing import dataset as dataset_module

RANK = int(os.environ.get("RANK", "0"))


def trainer(data: datasets.Dataset | datasets.IterableDataset, output: Path) -> SFTTrainer:
    return SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(
            output_dir=str(output), use_chronicals=True, packing=True, max_length=96, max_steps=2, report_to="none",
            bf16=False, use_cpu=True, disable_tqdm=True, save_strategy="no", gradient_checkpointing=False,
            per_device_train_batch_size=1, chronicals_config={"packing_window": 25},
        ),
        train_dataset=data,
        processing_class=tiny_data.tokenizer(),
    )  # fmt: skip


def main(folder: Path) -> None:
    plan, planned = dataset_module.plan_documents, []

    def counted(*args, **kwargs):
        planned.append(RANK)
        if RANK == 0:
            time.sleep(1)  # the others would overtake it
        return plan(*args, **kwargs)

    dataset_module.plan_documents = counted
    data = datasets.load_from_disk(str(folder / "data"))
    packed = trainer(data, folder / "out").train_dataset
    figures = {"planned": list(planned), "rows": packed["input_ids"][:], "file": packed.cache_files[0]["filename"]}

    stream = data.to_iterable_dataset(num_shards=3)
    loader = trainer(stream, folder / "out").get_train_dataloader()
    figures["stream"] = [batch["input_ids"][0, : batch["num_real_tokens"]].tolist() for batch in loader]

    for name, broken in (
        ("other data", lambda: data.select(range(30 + RANK))),
        ("other order", lambda: data.shuffle(seed=RANK)),
        ("no room", lambda: datasets.load_from_disk(str(folder / "data")).select(range(20))),
    ):
        if name == "no room":
            dataset_module.cache_path = lambda *args: Path("/nonexistent/packed.arrow")
        try:
            trainer(broken(), folder / "out")
        except (ValueError, OSError) as error:
            figures[name] = str(error)
    (folder / f"figures{RANK}.json").write_text(json.dumps(figures))


def save(folder: Path) -> None:
    rows = [{**row, "input_ids": [i % 130 for i in row["input_ids"]]} for row in make_rows([30, 7, 60, 2] * 10)]
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "data")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
