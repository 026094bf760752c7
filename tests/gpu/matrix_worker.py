"""Trains the cells of one layout for run_matrix_two_gpus.py, under torchrun or, for "one", by itself.

Arguments: a JSON of cells, the small model's folder, the folder of the reference gradients, and the file to which the
first rank appends a line for each cell. Ranks that failed in a cell may be apart from then on: the process ends there,
and a new one takes the cells that are left.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "distributed"), str(ROOT / "tests" / "gpu")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from datasets import Dataset  # noqa: E402
from head_script import _cpus_as_accelerators  # noqa: E402
from matrix_cells import Cell, is_reference  # noqa: E402
from ranks import leave  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from chronicals_trl import SFTConfig, SFTTrainer  # noqa: E402
from chronicals_trl.bench.sft.cases import PROTOCOLS, SHAPES, SPECIAL, make_documents  # noqa: E402
from chronicals_trl.bench.sft.models import make_model, make_tokenizer  # noqa: E402

CUDA = torch.cuda.is_available()
FIRST = int(os.environ.get("RANK", "0")) == 0


class Watch(TrainerCallback):
    """The first step's gradients as whole tensors on the first rank, and the time of the steps after the warm-up."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.trainer: Any = None
        self.wanted = cell.shape is None
        self.gradients: dict[str, torch.Tensor] = {}
        self.times: dict[int, float] = {}
        self.waits: list[str] = []  # in one step: where the host waited for the GPU
        self._listening = contextlib.ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.wanted and state.global_step == 0 and self.trainer.is_deepspeed_enabled:
            self._watch_engine(self.trainer.deepspeed)

    def _watch_engine(self, engine: Any) -> None:
        """DeepSpeed's engine steps inside `backward`, and then has no gradients left."""
        from deepspeed.utils import safe_get_full_grad

        original = engine.step

        def step(*args: Any, **kwargs: Any) -> Any:
            # Called after each micro-batch; it is the last one's that ends the step.
            if self.wanted and engine.is_gradient_accumulation_boundary():
                self.wanted = False
                for name, parameter in engine.module.named_parameters():
                    if parameter.requires_grad:
                        self._keep(name, safe_get_full_grad(parameter))
            return original(*args, **kwargs)

        engine.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.wanted or self.trainer.is_deepspeed_enabled:
            return
        self.wanted = False
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                self._keep(name, grad.full_tensor() if isinstance(grad, DTensor) else grad)

    def _keep(self, name: str, grad: torch.Tensor) -> None:
        if FIRST:
            self.gradients[plain(name)] = grad.detach().float().cpu().clone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if CUDA and self.cell.scaling and state.global_step == self.cell.warm_up - 2:  # no step that logs, or is timed
            heard = self._listening.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self._listening.callback(lambda: self.waits.extend(map(place, filter(is_wait, heard))))
            self._listening.callback(torch.cuda.set_sync_debug_mode, "default")
            torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == self.cell.warm_up - 1:
            self._listening.close()
        if state.global_step in (self.cell.warm_up, self.cell.steps):
            if CUDA:
                torch.cuda.synchronize()
            self.times[state.global_step] = time.perf_counter()


def is_wait(warning: Any) -> bool:
    return "called a synchronizing CUDA operation" in str(warning.message)


def place(warning: Any) -> str:
    return f"{warning.filename}:{warning.lineno}"


def plain(name: str) -> str:
    """A parameter's name without what DDP and checkpointing put into it."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


# -- what is trained ----------------------------------------------------------------------------------------------


def data(cell: Cell, vocab: int) -> Dataset:
    ranks = 2  # of "one" too, so that the runs share their rows
    if cell.shape is not None:
        tokens = cell.rows * cell.row_tokens * cell.accumulation * ranks * (cell.steps + 2)
        made = make_documents(PROTOCOLS["packed"], vocab, cell.row_tokens, tokens, 64, seed=0)
        return Dataset.from_dict({"input_ids": made.lists()})
    generator = torch.Generator().manual_seed(3)
    count = cell.rows * cell.accumulation * ranks * cell.steps
    lengths = torch.randint(cell.row_tokens // 2, cell.row_tokens + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(SPECIAL, vocab, (length,), generator=generator) for length in lengths]
    labels = [row.masked_fill(torch.rand(len(row), generator=generator) < 0.2, -100) for row in ids]
    return Dataset.from_dict({"input_ids": [row.tolist() for row in ids], "labels": [row.tolist() for row in labels]})


def settings(cell: Cell, folder: str) -> dict[str, Any]:
    sharded = cell.layout.startswith("zero") or cell.layout == "fsdp2"
    bf16 = CUDA and not cell.exact
    # One process has the rows of both in its batch, but for scaling, where it has one GPU's.
    share = 2 if cell.layout == "one" and cell.shape is None else 1
    options: dict[str, Any] = {
        "output_dir": folder, "use_chronicals": cell.ours, "max_steps": cell.steps, "max_grad_norm": 0.0,
        "per_device_train_batch_size": cell.rows * share, "gradient_accumulation_steps": cell.accumulation,
        # At 1e-4 all weights of the 7B shape, which are random, went astray with the flag on and off.
        "learning_rate": 1e-5 if cell.shape == "qwen2.5-7b" else 1e-4, "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused" if CUDA else "adamw_torch",
        "bf16": bf16, "gradient_checkpointing": cell.checkpointing, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": not CUDA and not sharded, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    if cell.ours:
        # LoRA+ has other rates by intent; the losses are to be the ones with the flag off.
        options["chronicals_config"] = {"lora_plus": "off"}
    if cell.shape is None:
        options |= {
            "packing": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "logging_steps": 1,
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
    else:
        options |= {"packing": True, "max_length": cell.row_tokens, "logging_steps": 1, "max_grad_norm": 1.0}
    if cell.scaling:  # a log waits for the GPU
        options["logging_steps"] = cell.warm_up
    if cell.layout == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    if cell.layout.startswith("zero"):
        stage = int(cell.layout[-1])
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "bf16": {"enabled": bf16}, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "overlap_comm": CUDA, "contiguous_gradients": True},
        }  # fmt: skip
    return options


def four_bit() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip


def make_trainer(cell: Cell, folder: str, small_model: str, watch: Watch) -> SFTTrainer:
    options = settings(cell, folder)
    arguments: dict[str, Any] = {"callbacks": [watch]}
    if cell.part == "qlora":
        import bitsandbytes  # noqa: F401  # its absence by its own name

        options["model_init_kwargs"] = {"dtype": torch.bfloat16, "quantization_config": four_bit()}
    elif cell.shape is None:
        options["model_init_kwargs"] = {"dtype": torch.float32}
    if cell.part != "full":
        import peft

        arguments["peft_config"] = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    args = SFTConfig(**options)
    if cell.shape is None:
        arguments["model"], vocab = (
            small_model,
            json.loads((Path(small_model) / "config.json").read_text())["vocab_size"],
        )
    else:
        shape = SHAPES[cell.shape]
        arguments["model"], vocab = make_model(shape, seed=0), shape.vocab
        if not CUDA:
            arguments["model"].float()
    trainer = SFTTrainer(
        args=args, train_dataset=data(cell, vocab), processing_class=make_tokenizer(vocab), **arguments
    )
    watch.trainer = trainer
    fill_adapters(trainer.model)
    return trainer


def fill_adapters(model: torch.nn.Module) -> None:
    """Adapters that depend on their names alone, none of them zero, whatever the layout took of the generators."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        context: Any = contextlib.nullcontext()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            context = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        with context, torch.no_grad():
            if parameter.numel():
                generator = torch.Generator().manual_seed(zlib.crc32(plain(name).encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


# -- a cell -------------------------------------------------------------------------------------------------------


def train(cell: Cell, small_model: str, references: Path) -> dict[str, Any]:
    if CUDA:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(cell)
    sharded = cell.layout.startswith("zero") or cell.layout == "fsdp2"
    stand_in = _cpus_as_accelerators(SimpleNamespace(mode="sharded")) if sharded else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, stand_in:
        trainer = make_trainer(cell, folder, small_model, watch)
        loaded = torch.cuda.max_memory_reserved() if CUDA else 0
        trainer.train()
        peak = torch.cuda.max_memory_reserved() if CUDA else 0
        logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
        parts = [vars(part) for part in trainer.chronicals_report.parts] if cell.ours else []
        ranks = trainer.args.world_size
        if trainer.is_deepspeed_enabled:
            trainer.deepspeed.destroy()
        trainer.accelerator.free_memory()
    seconds = watch.times[cell.steps] - watch.times[cell.warm_up]
    tokens = logs[cell.steps]["num_tokens"] - logs[cell.warm_up]["num_tokens"]
    row = {
        "ranks": ranks,
        "waits": [text.replace(str(ROOT), "") for text in watch.waits],
        "losses": [entry["loss"] for entry in logs.values()],
        "tokens_per_second": tokens / seconds,
        "step_ms": seconds / (cell.steps - cell.warm_up) * 1e3,
        "peak_reserved_gib": max(everywhere(peak)) / 2**30,
        "reserved_before_training_gib": max(everywhere(loaded)) / 2**30,
        "parts": {part["name"]: part["state"] for part in parts},
        "reasons": {part["name"]: part["reason"] for part in parts if part["reason"]},
    }
    return row | (compare(cell, watch, row["losses"][0], references) if cell.shape is None and FIRST else {})


def compare(cell: Cell, watch: Watch, loss: float, references: Path) -> dict[str, Any]:
    """Relative errors, in norm, of all gradients together and of the worst tensor; relative error of the loss."""
    file = references / f"{cell.part}-{cell.accumulation}.pt"
    if is_reference(cell):
        torch.save({"loss": loss, "gradients": watch.gradients}, file)
        return {"is_reference": True}
    if not file.exists():
        return {"gradient_error": None, "why_no_error": "one process's run, the reference, failed"}
    reference = torch.load(file)
    exact = reference["gradients"]
    missing = exact.keys() ^ watch.gradients.keys()
    if missing:
        raise RuntimeError(f"gradients of one side alone: {sorted(missing)[:3]}")
    errors = {name: float((watch.gradients[name] - grad).norm()) for name, grad in exact.items()}
    norms = {name: float(grad.norm()) for name, grad in exact.items()}
    worst = max(exact, key=lambda name: errors[name] / max(norms[name], 1e-30))
    return {
        "gradient_error": sum(e * e for e in errors.values()) ** 0.5 / sum(n * n for n in norms.values()) ** 0.5,
        "worst_tensor_error": errors[worst] / max(norms[worst], 1e-30),
        "worst_tensor": worst,
        "loss_error": abs(loss - reference["loss"]) / abs(reference["loss"]),
    }


def everywhere(value: Any) -> list[Any]:
    """The value of each rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main(cells: list[Cell], small_model: str, references: Path, output: Path) -> None:
    logging.disable(logging.WARNING)
    # torchrun gives each rank a session of its own: a rank ends with the launcher that started it (PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if "WORLD_SIZE" in os.environ:
        if CUDA:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", timeout=timedelta(seconds=120))
    for cell in cells:
        start, row, error = time.perf_counter(), {}, None
        try:
            row = train(cell, small_model, references)
        except Exception as problem:
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}"[:500]
        if FIRST or error is not None:
            row |= {"name": cell.name, "error": error, "seconds": round(time.perf_counter() - start, 1)}
            with open(output, "a") as file:
                file.write(json.dumps(row) + "\n")
        if error is not None:
            sys.stderr.flush()
            os._exit(1)
    leave()


if __name__ == "__main__":
    made = [Cell(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    main(made, sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
