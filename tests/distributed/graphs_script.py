"""Run by test_graph_ranks.py: CUDA graphs under DDP, by the stand-in for a GPU's, on and off."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny_data
import torch
from ddp_script import Gradients, make
from graph_stand_in import StandIn
from ranks import leave
from torch import nn

from chronicals_trl.model import graphs
from chronicals_trl.model import trainer as graphs_trainer


def train(output: Path, setting: str, segment_bytes: int, accumulation: int, **options: Any) -> dict[str, Any]:
    recorder = StandIn()
    graphs_trainer.DEVICES = ("cpu",)
    graphs_trainer.SEGMENT_BYTES = segment_bytes
    graphs.CudaRecorder = lambda device: recorder  # type: ignore[misc,assignment]
    trainer = make(
        output, data=tiny_data.text(120), max_steps=6, gradient_accumulation_steps=accumulation,
        chronicals_config={"cuda_graphs": setting}, **options,
    )  # fmt: skip
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    wrapped = trainer.model_wrapped
    return {
        "gradients": gradients.steps,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "recorded": recorder.recorded,
        "replayed": recorder.replayed,
        "views": isinstance(wrapped, nn.parallel.DistributedDataParallel) and wrapped.gradient_as_bucket_view,
        "bucket_mib": wrapped.bucket_bytes_cap / 2**20,
    }


def main(output: Path) -> None:
    figures = {
        f"{setting}, {segments}, {accumulation}": train(output, setting, size, accumulation)
        for accumulation in (1, 2)
        for setting, segments, size in (("off", 0, 1), ("auto", 1, 2**40), ("auto", 2, 1))
    }
    figures["the user's buckets"] = train(output, "auto", 1, 1, ddp_bucket_cap_mb=7)
    if int(os.environ["RANK"]) == 0:
        torch.save({name: case.pop("gradients") for name, case in figures.items()}, output / "gradients.pt")
        (output / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
