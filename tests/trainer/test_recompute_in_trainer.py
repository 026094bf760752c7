"""Layers stop being computed again where memory permits; on the CPU, with a memory that the test makes up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import tiny_data
import tiny_models
import torch
from graph_stand_in import StandIn
from training_runs import SETTINGS, logged, run

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.model import graphs, recompute_trainer
from chronicals_trl.model import trainer as graphs_trainer
from chronicals_trl.model.graph_layers import decoder_layers

LAYERS = 2
LEFT_OPEN = {k: v for k, v in SETTINGS.items() if k != "gradient_checkpointing"}


class MadeUp:
    """`layer` bytes a layer, and room for `layers` of them above a peak of 1,000."""

    def __init__(self, layers: float, layer: int = 100) -> None:
        self.layers, self.layer, self.reads, self.peaks, self.released = layers, layer, 0, 0, 0

    def allocated(self) -> int:
        self.reads += 1
        return self.layer * (self.reads % 2 == 0)

    def begin_peak(self) -> None:
        self.peaks += 1

    def peak(self) -> int:
        assert self.peaks == 1
        return 1000

    def room(self) -> int:
        return 1000 + int(self.layers * 106)

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    made_up = MadeUp(LAYERS)
    monkeypatch.setattr(recompute_trainer, "DEVICES", ("cpu",))
    monkeypatch.setattr(recompute_trainer, "Memory", lambda device: made_up)
    return made_up


def train(tmp_path: Path, **options: Any) -> tuple[Any, list[int]]:
    """The trainer, and how many layers were computed again in each micro-batch."""
    counts: list[int] = []

    class Counting(SFTTrainer):
        def training_step(self, *args, **kwargs):
            ran: list[int] = []
            layers = [m for m in self.model.modules() if type(m).__name__ == "LlamaAttention"]
            handles = [layer.register_forward_hook(lambda *a: ran.append(1)) for layer in layers]
            loss = super().training_step(*args, **kwargs)
            for handle in handles:
                handle.remove()
            counts.append(len(ran) - len(layers))
            return loss

    settings = {**LEFT_OPEN, "output_dir": str(tmp_path), "use_chronicals": True, "packing": True, **options}
    peft_config = settings.pop("peft_config", None)
    trainer = Counting(
        model=tiny_models.build("llama"), args=SFTConfig(**settings), train_dataset=tiny_data.text(120),
        processing_class=tiny_data.tokenizer(), peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    return trainer, counts


@pytest.mark.parametrize(("fits", "again"), [(1e6, 0), (1, 1), (0.5, 2)])
def test_from_the_third_step_on(tmp_path: Path, memory: MadeUp, fits: float, again: int) -> None:
    memory.layers = fits
    memory.layer = 100
    trainer, counts = train(tmp_path, max_steps=5, chronicals_config={"cuda_graphs": "off"})
    # The probe's two runs of one layer are in the first count.
    assert counts[1:] == [LAYERS, again, again, again]
    part = trainer.chronicals_report["recompute"]
    assert part.state == "on"
    assert part.backend == (f"{again} of {LAYERS} layers computed again" if again else "no layer computed again")
    assert memory.released == 1
    saved = json.loads((tmp_path / "chronicals_report.json").read_text())
    assert saved == json.loads(json.dumps(trainer.chronicals_report.to_dict())), "what is known later is written too"
    layers = [m for m in trainer.model.modules() if hasattr(m, "gradient_checkpointing") and hasattr(m, "self_attn")]
    assert all(layer.gradient_checkpointing for layer in layers), "as they were, after the run"


def test_gradients_that_graphs_hold_twice_count(tmp_path: Path, memory: MadeUp) -> None:
    """All layers would fit; with the layers' gradients a second time they do not."""
    memory.layers = LAYERS + 0.1
    trainer, counts = train(tmp_path, max_steps=4, chronicals_config={"cuda_graphs": "off"})
    assert counts[2:] == [1, 1] and trainer.chronicals_report["recompute"].modules == LAYERS


def test_a_layer_is_measured_in_the_precision_of_training(
    tmp_path: Path, memory: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast is around the model's forward alone; outside of it fp32 weights would keep twice the bytes."""
    seen: list[bool] = []
    probed: list[Any] = []

    def measure(probe: Any, memory: Any) -> int:
        seen.append(torch.is_autocast_enabled("cpu"))
        probed.append(probe._layer)
        probe.forget()
        return 100

    monkeypatch.setattr(recompute_trainer.LayerMemory, "measure", measure)
    for bf16 in (True, False):
        trainer, _ = train(tmp_path, max_steps=1, bf16=bf16, chronicals_config={"cuda_graphs": "off"})
        # Not the first, in front of which nothing may need a gradient.
        assert probed[-1] is decoder_layers(trainer.model)[1]
    assert seen == [True, False]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_padded_rows_are_taken_for_the_longest(
    tmp_path: Path, memory: MadeUp, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """What was measured of short ones is scaled; weights, optimizer states and gradients are not."""
    given: list[int] = []
    monkeypatch.setattr(recompute_trainer, "layers_that_keep", lambda *args: given.extend(args) or 0)
    monkeypatch.setattr(memory, "peak", lambda: 10**9)
    sizes: list[int] = []

    class Noting(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            sizes.append(inputs["input_ids"].numel())
            return super().training_step(model, inputs, *args, **kwargs)

    settings = {**LEFT_OPEN, "output_dir": str(tmp_path), "use_chronicals": True, "max_steps": 3, "max_length": 512}
    trainer = Noting(
        model=tiny_models.build("llama"), args=SFTConfig(**settings, gradient_accumulation_steps=accumulation),
        train_dataset=tiny_data.text(120), processing_class=tiny_data.tokenizer(),
    )  # fmt: skip
    trainer.train()
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    largest = max(sizes[accumulation : 2 * accumulation])
    assert sizes[0] < 1024 and memory.peaks == 1
    assert given[2] == int(100 * 1024 / sizes[0])
    assert given[1] == 10**9 + int((10**9 - trained) * (1024 / largest - 1))


@pytest.mark.parametrize("options", [{"max_length": 512}, {"padding_free": True, "max_length": None}])
def test_unpadded_rows_are_taken_for_the_longest_documents(
    tmp_path: Path, memory: MadeUp, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """All of them in one batch: no row can have more tokens, whatever `max_length` would allow."""
    given: list[int] = []
    monkeypatch.setattr(recompute_trainer, "layers_that_keep", lambda *args: given.extend(args) or 0)
    monkeypatch.setattr(memory, "peak", lambda: 10**9)
    settings = {**LEFT_OPEN, "output_dir": str(tmp_path), "use_chronicals": True, "max_steps": 3, **options}
    settings |= {"per_device_train_batch_size": 4}
    trainer = SFTTrainer(
        model=tiny_models.build("llama"), args=SFTConfig(**settings),
        train_dataset=tiny_data.text(120), processing_class=tiny_data.tokenizer(),
    )  # fmt: skip
    sizes: list[int] = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.train()
    longest = sorted(map(len, trainer.train_dataset["input_ids"]))[-4:]
    largest = -(-sum(longest) // 8) * 8
    assert max(sizes) < largest < 4 * 512 and given[2] == int(100 * largest / sizes[0])
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert given[1] == 10**9 + int((10**9 - trained) * (largest / sizes[1] - 1))


def test_of_adapters_graphs_hold_little_twice(tmp_path: Path, memory: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(recompute_trainer, "layers_that_keep", lambda *args: given.extend(args) or 0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    trainer, _ = train(tmp_path, max_steps=3, peft_config=config)
    assert given[4] == sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad) > 0


def test_a_second_training_is_measured_anew(tmp_path: Path, memory: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak", lambda: 1000)
    trainer, _ = train(tmp_path, max_steps=3, chronicals_config={"cuda_graphs": "off"})
    assert (memory.peaks, memory.released) == (1, 1)
    trainer.train()
    assert (memory.peaks, memory.released) == (2, 2)


def test_ranks_keep_what_the_fullest_can(tmp_path: Path, memory: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    roomy(memory)

    def all_reduce(given: torch.Tensor, op: Any) -> None:
        """The other rank has room for one."""
        join = {torch.distributed.ReduceOp.MAX: torch.maximum, torch.distributed.ReduceOp.MIN: torch.minimum}[op]
        given.copy_(join(given, torch.full_like(given, -1 if given[0] < 0 else 1)))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    trainer, _ = train(tmp_path, max_steps=1, chronicals_config={"cuda_graphs": "off"})
    trainer.args = SimpleNamespace(
        world_size=2, device=torch.device("cpu"), should_log=False, should_save=False, max_length=96,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer._layer_bytes = memory.peaks = 1
    layers = decoder_layers(trainer.model)
    trainer._decide(layers)
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert trainer._recompute_keeping == 1
    # One rank cannot make its step again while the others wait for its gradients.
    monkeypatch.setattr(trainer, "compute_loss", None)  # called for nothing
    tried: list[int] = []

    def step(*args: Any, **kwargs: Any) -> Any:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(graphs_trainer.CudaGraphsMixin, "training_step", step)
    with pytest.raises(torch.OutOfMemoryError):
        trainer._step_or_fall_back(trainer.model, {})
    assert tried == [1]


def roomy(memory: MadeUp) -> None:
    memory.room = lambda: 10**12  # type: ignore[method-assign]


def test_the_losses_are_those_of_computing_again(tmp_path: Path, memory: MadeUp) -> None:
    roomy(memory)
    losses = {}
    for setting in ("auto", "off"):
        trainer, _ = train(tmp_path, max_steps=6, chronicals_config={"recompute": setting, "cuda_graphs": "off"})
        losses[setting] = logged(trainer, "loss")
        memory.peaks = 0
    assert len(losses["auto"]) == 6 and losses["auto"] == pytest.approx(losses["off"], rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_graphs_begin_when_no_layer_is_computed_again(
    tmp_path: Path, memory: MadeUp, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    roomy(memory)
    recorder = StandIn()
    monkeypatch.setattr(graphs_trainer, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: recorder)
    trainer, _ = run(
        SFTTrainer, SFTConfig, tmp_path, data=tiny_data.text(120),
        options={"max_steps": 7, "gradient_accumulation_steps": accumulation, "use_chronicals": True, "packing": True,
                 "gradient_checkpointing": True, "chronicals_config": {"recompute": "on"}},
    )  # fmt: skip
    assert recorder.recorded == 2
    passes = (7 - recompute_trainer.MEASURED_STEPS) * accumulation
    note = f"CUDA graphs: {passes - graphs.WARM_UP} of {passes} batches replayed"
    assert any(each.startswith(note) for each in trainer.chronicals_report.notes), trainer.chronicals_report.notes


def test_graphs_are_off_where_layers_are_computed_again(
    tmp_path: Path, memory: MadeUp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said aloud: the table at the start has it on."""
    memory.layers = 1
    monkeypatch.setattr(graphs_trainer, "DEVICES", ("cpu",))
    trainer, _ = train(tmp_path, max_steps=4)
    part = trainer.chronicals_report["cuda_graphs"]
    assert part.state == "off" and "memory needs 1 layers computed again" in part.reason
    told = [record for record in caplog.records if "cuda_graphs is off" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"]


def test_graphs_that_were_insisted_on_are_an_error(
    tmp_path: Path, memory: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.layers = 1
    monkeypatch.setattr(graphs_trainer, "DEVICES", ("cpu",))
    with pytest.raises(RuntimeError, match="memory needs 1 layers computed again"):
        train(tmp_path, max_steps=4, chronicals_config={"cuda_graphs": "on"})


@pytest.mark.parametrize("after_backward", [False, True])
def test_memory_that_runs_out_after_all(tmp_path: Path, memory: MadeUp, after_backward: bool) -> None:
    """The step is made again with every layer computed again, once; the losses are those of a run without all this."""
    roomy(memory)
    failures, flags = [], []

    class Failing(SFTTrainer):
        def fail(self):
            if self.state.global_step == 3 and not failures:
                failures.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory.")

        def compute_loss(self, *args, **kwargs):
            if self.state.global_step >= 3 and failures:
                flags.append([layer.gradient_checkpointing for layer in decoder_layers(self.model)])
            if not after_backward:
                self.fail()
            return super().compute_loss(*args, **kwargs)

        def train(self, *args, **kwargs):
            backward = self.accelerator.backward

            def failing(*args, **kwargs):
                backward(*args, **kwargs)
                if after_backward:  # with gradients there
                    self.fail()

            self.accelerator.backward = failing
            return super().train(*args, **kwargs)

    settings = {**LEFT_OPEN, "output_dir": str(tmp_path), "use_chronicals": True, "packing": True, "max_steps": 6}
    losses, norms = [], []
    for trainer_class, config in ((Failing, {}), (SFTTrainer, {"recompute": "off"})):
        memory.peaks = 0
        trainer = trainer_class(
            model=tiny_models.build("llama"), args=SFTConfig(**settings, chronicals_config=config),
            train_dataset=tiny_data.text(120), processing_class=tiny_data.tokenizer(),
        )  # fmt: skip
        trainer.train()
        losses.append(logged(trainer, "loss"))
        norms.append(logged(trainer, "grad_norm"))
        if config == {}:
            part = trainer.chronicals_report["recompute"]
            assert part.reason == "memory ran out otherwise" and part.backend == f"all {LAYERS} layers computed again"
            assert any("ran out in step 4" in note for note in trainer.chronicals_report.notes)
    assert failures == [1] and losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5), "what the failed try had added is gone"
    assert flags == [[True] * LAYERS] * 3


def nine_steps(trainer_class: type[SFTTrainer], folder: Path) -> SFTTrainer:
    settings = {**LEFT_OPEN, "output_dir": str(folder), "use_chronicals": True, "packing": True, "max_steps": 9}
    return trainer_class(
        model=tiny_models.build("llama"), args=SFTConfig(**settings), train_dataset=tiny_data.text(120),
        processing_class=tiny_data.tokenizer(),
    )  # fmt: skip


def test_memory_that_runs_out_twice_is_an_error(tmp_path: Path, memory: MadeUp) -> None:
    """With every layer computed again there is nothing left to give."""
    roomy(memory)
    failures = []

    class Failing(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == len(failures) + 3:
                failures.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().compute_loss(*args, **kwargs)

    trainer = nine_steps(Failing, tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert failures == [1, 1]


def test_graphs_end_when_memory_runs_out(
    tmp_path: Path, memory: MadeUp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Layers that are computed again are not captured: the report, which had them on, says so."""
    roomy(memory)
    monkeypatch.setattr(graphs_trainer, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: StandIn())
    failures, released, at_retry = [], [], []

    class Failing(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 7 and not failures:
                failures.append(self._graphs.replays)
                release = self._graphs.release
                self._graphs.release = lambda: (released.append(1), release())
                raise torch.OutOfMemoryError("CUDA out of memory.")
            if self.state.global_step == 7:
                at_retry.append(len(released))
            return super().compute_loss(*args, **kwargs)

    trainer = nine_steps(Failing, tmp_path)
    trainer.train()
    part = trainer.chronicals_report["cuda_graphs"]
    assert failures[0] > 0 and at_retry == [1], "graphs were in use, and their memory is given back first"
    assert part.state == "off" and part.reason == "memory needs 2 layers computed again, which is not captured"
    assert trainer.chronicals_report["recompute"].reason == "memory ran out otherwise"
    assert any("cuda_graphs is off" in record.getMessage() for record in caplog.records)


def test_memory_that_runs_out_in_a_later_micro_batch_is_an_error(tmp_path: Path, memory: MadeUp) -> None:
    """What earlier micro-batches have added cannot be told from what this one has."""
    roomy(memory)

    class Failing(SFTTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += self.state.global_step == 3
            if self.calls == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().compute_loss(*args, **kwargs)

    settings = {**LEFT_OPEN, "output_dir": str(tmp_path), "use_chronicals": True, "packing": True, "max_steps": 6}
    trainer = Failing(
        model=tiny_models.build("llama"), args=SFTConfig(**settings, gradient_accumulation_steps=2),
        train_dataset=tiny_data.text(120), processing_class=tiny_data.tokenizer(),
    )  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gradient_checkpointing": False}, "gradient_checkpointing=False"),
        ({"gradient_checkpointing": True}, "was asked for"),
        ({"chronicals_config": {"recompute": "off"}}, "recompute='off'"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"max_length": None, "packing": False}, "max_length=None"),
    ],
)
def test_when_it_is_off(tmp_path: Path, memory: MadeUp, options: dict[str, Any], reason: str) -> None:
    trainer, counts = train(tmp_path, max_steps=4, **options)
    part = trainer.chronicals_report["recompute"]
    assert part.state == "off" and reason in part.reason
    assert set(counts) == ({0} if options.get("gradient_checkpointing") is False else {LAYERS})
    assert memory.reads == memory.peaks == 0


def test_when_it_does_not_fit(tmp_path: Path, memory: MadeUp) -> None:
    """Another rank's reason, and metrics of the user's, which hold all logits."""
    trainer, _ = train(tmp_path, max_steps=1)
    part = trainer._recompute_part(trainer._chronicals, "off on another rank")
    assert (part.state, part.reason, part.omitted) == ("off", "off on another rank", True)
    trainer.compute_metrics = lambda prediction: {}
    part = trainer._recompute_part(trainer._chronicals, None)
    assert part.state == "off" and "compute_metrics" in part.reason and part.omitted


def test_on_a_cpu_it_is_off(tmp_path: Path) -> None:
    trainer, counts = train(tmp_path, max_steps=3)
    assert "no CUDA GPU" in trainer.chronicals_report["recompute"].reason and set(counts) == {LAYERS}
