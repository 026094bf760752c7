"""CUDA graphs of the decoder layers on a GPU: the numbers of eager code, less host time, no more memory."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import torch
import transformers
from torch import Tensor, nn
from training_runs import logged, run
from waits import refused

from chronicals_trl import SFTConfig, SFTTrainer, patch_model, unpatch_model
from chronicals_trl.model.graph_layers import decoder_layers
from chronicals_trl.model.graphs import WARM_UP, GraphedStack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

VOCABULARY = 512


def model_of(
    *, lora: float | None = None, layers: int = 4, hidden: int = 256, prepare: Callable[[Any], Any] | None = None
) -> Any:
    config = transformers.Qwen2Config(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, vocab_size=VOCABULARY, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.Qwen2ForCausalLM(config).to("cuda", torch.bfloat16)
    if prepare is not None:
        prepare(model)
    if lora is not None:
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=lora)
        model = peft.get_peft_model(model, adapter)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    patch_model(model)
    return model.train()


def batch_of(seed: int, tokens: int = 1024, documents: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(tokens - 1, generator=generator)[: documents - 1].sort().values + 1
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])])
    lengths = offsets.diff().tolist()
    input_ids = torch.randint(3, VOCABULARY, (1, tokens), generator=generator)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = offsets.to(torch.int32).cuda()
    return {
        "input_ids": input_ids.cuda(), "position_ids": position_ids.cuda(),
        "labels": input_ids.masked_fill(position_ids == 0, -100).cuda(),
        "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": tokens, "max_length_k": tokens,
        "use_cache": False,
    }  # fmt: skip


def graphed(model: Any, sizes: tuple[int, ...] = ()) -> GraphedStack:
    layers = decoder_layers(model)
    assert not isinstance(layers, str), layers
    stack = GraphedStack(layers, sizes=sizes)
    stack.install()
    return stack


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def gradients(model: Any, batch: dict[str, Any], seed: int, autocast: bool = False) -> dict[str, Tensor]:
    """The gradients of one pass, and the loss."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
        loss = model(**batch).loss
    loss.backward()
    # Clones: gradients that are kept are another test's matter.
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def exact_copy(model: Any) -> Any:
    """The model in float32, by its own code."""
    copied = copy.deepcopy(model)
    unpatch_model(copied)
    return copied.float()


def require_as_good(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """As far from float32's gradients as an eager pass is; and, where dropout makes float32's masks others, near it.

    Not the same bits: attention's backward pass adds with atomics, and where a product is split along its inner
    dimension cuBLAS may choose otherwise for memory in another place.
    """
    assert ours.keys() == eager.keys()
    for name, reference in (exact or eager).items():
        error, of_eager = ((found[name].float() - reference.float()).norm() for found in (ours, eager))
        assert error <= 1.25 * of_eager + 1e-2 * reference.float().norm(), (name, error, of_eager)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [None, 0.0, 0.2])
def test_the_numbers_are_those_of_eager_code(lora: float | None, autocast: bool) -> None:
    """Dropout's masks too: a replay draws what an eager pass would have drawn."""
    model = model_of(lora=lora)
    stack = graphed(model)
    for step in range(WARM_UP + 4):
        batch = batch_of(step)
        with stack.enabled():
            ours = gradients(model, batch, step, autocast)
        exact = {} if lora else gradients(exact_copy(model), batch, step)
        require_as_good(ours, gradients(model, batch, step, autocast), exact)
        with torch.no_grad():  # the weights move on
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.02 * parameter.grad.to(parameter.dtype)
    assert stack.reason is None and stack.replays == 4 and stack.captures == 1
    stack.remove()


def test_shapes_share_a_pool_and_gradients_add_up() -> None:
    model = model_of()
    stack = graphed(model)
    for step in range(4 * WARM_UP):
        batches = [batch_of(2 * step, documents=5), batch_of(2 * step + 1, documents=9)]
        with stack.enabled():
            ours = added(model, batches)
        require_as_good(ours, added(model, batches), added(exact_copy(model), batches))
    assert stack.captures == 2 and stack.replays == 2 * 3 * WARM_UP
    stack.remove()


def added(model: Any, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_dropout_draws_new_masks() -> None:
    model = model_of(lora=0.5)
    stack = graphed(model)
    batch, losses = batch_of(0), []
    torch.manual_seed(1)
    for _ in range(WARM_UP + 5):
        with stack.enabled():
            loss = model(**batch).loss
            loss.backward()
        losses.append(loss.item())
    assert stack.replays == 5 and len(set(losses)) == len(losses)
    stack.remove()


def test_the_host_has_less_to_do_and_waits_for_nothing() -> None:
    model = model_of(lora=0.0, layers=12)
    stack = graphed(model)
    batch = batch_of(0)

    def host_seconds() -> float:
        times = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(**batch).loss.backward()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    with stack.enabled():
        for _ in range(WARM_UP + 2):
            model(**batch).loss.backward()
        with refused():
            model(**batch).loss.backward()
        ours = host_seconds()
    assert stack.replays >= 13
    stack.remove()
    theirs = host_seconds()
    print(f"host time of a pass: {1e3 * ours:.2f} ms with graphs, {1e3 * theirs:.2f} ms eager")
    assert ours < 0.5 * theirs


@pytest.mark.parametrize("lora", [0.0, None])
def test_memory(lora: float | None) -> None:
    """What is reserved: a pool's blocks that are free between replays are nobody else's."""
    model = model_of(lora=lora, layers=8, hidden=1024)
    batch = batch_of(0, tokens=16_384, documents=20)

    def peak(passes: int, stack: GraphedStack | None = None) -> int:
        for step in range(passes):
            if step == passes - 2:  # what came before, the capture among it, may have left something behind
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            model.zero_grad(set_to_none=True)
            with nullcontext() if stack is None else stack.enabled():
                model(**batch).loss.backward()
        return torch.cuda.max_memory_reserved()

    theirs = peak(4)
    stack = graphed(model)
    ours = peak(WARM_UP + 4, stack)
    assert stack.replays == 4
    print(f"reserved at the peak: {ours / 2**20:.0f} MiB with graphs, {theirs / 2**20:.0f} MiB eager")
    assert ours <= 1.05 * theirs + 64 * 2**20  # the gradients are not there twice
    before = torch.cuda.memory_reserved()
    model.zero_grad(set_to_none=True)
    stack.remove()
    assert torch.cuda.memory_reserved() < 0.5 * before


SIZES = (6144, 8192, 10_240, 12_288, 14_336, 16_384)


def run_passes(model: Any, stack: GraphedStack, tokens: int, passes: int) -> int:
    """How many of them were replayed."""
    before = stack.replays
    for step in range(passes):
        model.zero_grad(set_to_none=True)
        with stack.enabled():
            model(**batch_of(step, tokens, documents=20)).loss.backward()
    return stack.replays - before


def reserved() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.mark.parametrize("lora", [0.0, None])
def test_a_pool_is_hardly_larger_than_its_largest_graph_needs(lora: float | None) -> None:
    """In whatever order sizes come; here in the worst one."""
    model = model_of(lora=lora, layers=8, hidden=1024)
    before = reserved()
    stack = graphed(model, SIZES)
    run_passes(model, stack, SIZES[-1], WARM_UP + 1)
    alone = reserved() - before
    stack.remove()
    model.zero_grad(set_to_none=True)
    assert reserved() - before < 0.1 * alone
    stack = graphed(model, SIZES)
    run_passes(model, stack, SIZES[0], WARM_UP)
    for tokens in (*SIZES, *SIZES):
        assert run_passes(model, stack, tokens, 1) == 1
    assert stack.reason is None
    # All but the last are captured a second time; what that found in the second round, it replays.
    assert stack.captures == 2 * len(SIZES) - 1 and run_passes(model, stack, SIZES[0], 1) == 1
    together = reserved() - before
    print(f"reserved: {together / 2**20:.0f} MiB for {len(SIZES)} sizes, {alone / 2**20:.0f} for the largest alone")
    assert together < 1.15 * alone
    stack.remove()


def test_a_known_size_takes_no_eager_passes_memory_beside_the_graphs() -> None:
    model = model_of(layers=8, hidden=1024)
    peaks = {}
    for known in (False, True):
        stack = graphed(model, SIZES if known else ())
        run_passes(model, stack, SIZES[-1], WARM_UP + 1)
        before = reserved()
        torch.cuda.reset_peak_memory_stats()
        assert run_passes(model, stack, SIZES[-2], 1) == known
        peaks[known] = torch.cuda.max_memory_reserved() - before
        stack.remove()
        model.zero_grad(set_to_none=True)
        reserved()
    print(f"beside the graphs: {peaks[True] / 2**20:.0f} MiB, {peaks[False] / 2**20:.0f} with an eager pass")
    assert peaks[True] < 0.5 * peaks[False]


@pytest.mark.parametrize("lora", [None, 0.0, 0.2])
def test_the_first_pass_of_a_known_size_is_that_of_eager_code(lora: float | None) -> None:
    model = model_of(lora=lora)
    stack = graphed(model, (1024, 712, 1416))
    run_passes(model, stack, 1024, WARM_UP + 1)
    for step, tokens in enumerate((712, 1416, 712, 1024, 1416)):
        batch = batch_of(step, tokens)
        with stack.enabled():
            ours = gradients(model, batch, step)
        exact = {} if lora else gradients(exact_copy(model), batch, step)
        require_as_good(ours, gradients(model, batch, step), exact)
    assert stack.reason is None and stack.replays == 6 and stack.captures == 5
    stack.remove()


class Waiting(nn.Linear):
    """A projection that reads a value back, which a capture does not permit."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * (input.abs().sum().item() >= 0))


def with_a_wait(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.__class__ = Waiting


def test_a_failing_capture_leaves_the_process_as_it_was() -> None:
    """The generator (dropout), the allocator, the current stream; and another model can be captured after it."""
    model = model_of(lora=0.2, prepare=with_a_wait)
    stack = graphed(model)
    stream = torch.cuda.current_stream()
    for step in range(WARM_UP + 3):
        batch = batch_of(step)
        with stack.enabled():
            ours = gradients(model, batch, step)
        require_as_good(ours, gradients(model, batch, step), {})
    assert stack.replays == stack.captures == 0 and "captured" in str(stack.reason)
    print(stack.reason)
    assert torch.cuda.current_stream() == stream
    stack.remove()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved
    test_the_numbers_are_those_of_eager_code(0.2, False)


def test_released_graphs_give_their_memory_back() -> None:
    model = model_of(layers=8, hidden=512)
    stack = graphed(model)
    batch = batch_of(0, tokens=8192)
    for _ in range(2):
        for _ in range(WARM_UP + 1):
            with stack.enabled():
                model(**batch).loss.backward()
        held = torch.cuda.memory_reserved()
        stack.release()
        assert torch.cuda.memory_reserved() < held
    assert stack.captures == 2
    stack.remove()


# -- the trainer -----------------------------------------------------------------------------------------------------

GPU = {
    "use_cpu": False, "max_length": 256, "per_device_train_batch_size": 1, "packing": True, "use_chronicals": True,
    "max_steps": 12, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("options", [{"bf16": True}, {"bf16": True, "gradient_accumulation_steps": 2}, {}], ids=str)
def test_the_trainers_losses_are_equal(tmp_path: Path, lora: bool, options: dict[str, Any]) -> None:
    losses, norms = {}, {}
    for setting in ("on", "off"):
        adapter = {}
        if lora:
            peft = pytest.importorskip("peft")
            adapter["peft_config"] = peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1)
        trainer, _ = run(
            SFTTrainer, SFTConfig, tmp_path / setting, data=tiny_data.text(200),
            options={**GPU, **options, "chronicals_config": {"cuda_graphs": setting}}, **adapter,
        )  # fmt: skip
        losses[setting], norms[setting] = logged(trainer, "loss"), logged(trainer, "grad_norm")
        if setting == "on":
            (note,) = (n for n in trainer.chronicals_report.notes if n.startswith("CUDA graphs"))
            assert not note.startswith("CUDA graphs: 0 "), trainer.chronicals_report.render()
    assert losses["on"] == pytest.approx(losses["off"], rel=2e-3 if "bf16" in options else 1e-5)
    assert norms["on"] == pytest.approx(norms["off"], rel=2e-2 if "bf16" in options else 1e-3)


def test_evaluation_in_the_middle(tmp_path: Path) -> None:
    options = {**GPU, "bf16": True, "eval_strategy": "steps", "eval_steps": 6, "eval_packing": True}
    results = []
    for setting in ("on", "off"):
        trainer, _ = run(
            SFTTrainer, SFTConfig, tmp_path / setting, data=tiny_data.text(200), eval_dataset=tiny_data.text(30),
            options={**options, "chronicals_config": {"cuda_graphs": setting}},
        )  # fmt: skip
        results.append((logged(trainer, "loss"), logged(trainer, "eval_loss")))
    for ours, theirs in zip(*results, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
