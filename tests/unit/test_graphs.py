"""The stack of decoder layers recorded and replayed, against the same model run eagerly; on the CPU, by a stand-in."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from graph_stand_in import StandIn
from torch import Tensor, nn

from chronicals_trl import patch_model, unpatch_model
from chronicals_trl.model import decoder, graphs
from chronicals_trl.model.graph_capture import Captured, Segment, require_equal
from chronicals_trl.model.graph_layers import PLACE, decoder_layers
from chronicals_trl.model.graph_state import LayerState, Unreadable, read_call, surroundings
from chronicals_trl.model.graphs import WARM_UP, GraphedStack

# The families whose layers are written out in model/decoder.py; Gemma's layers get masks and tables by their kind.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "qwen3_moe")


def patched(family: str = "qwen2", *, lora: float | None = None, **options: Any) -> Any:
    """A patched model of 3 layers; with LoRA, of that dropout, and B away from its initial zeros."""
    model: Any = tiny_models.build(family, num_hidden_layers=3, **options)
    if lora is not None:
        peft = pytest.importorskip("peft")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=lora)
            model = peft.get_peft_model(model, config)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1)
    patch_model(model)
    return model.train()


class Pair:
    """A graphed model and an equal one without graphs, through the same batches."""

    def __init__(
        self,
        family: str = "qwen2",
        recorder: StandIn | None = None,
        segments: int = 1,
        sizes: Collection[int] = (),
        **options: Any,
    ) -> None:
        self.ours, self.theirs = patched(family, **options), patched(family, **options)
        self.recorder = recorder or StandIn()
        layers = decoder_layers(self.ours)
        assert not isinstance(layers, str), layers
        self.stack = GraphedStack(layers, self.recorder, segments, sizes)
        self.stack.install()
        self.seed = 0

    def both(self, change: Callable[[Any], Any]) -> None:
        for model in (self.ours, self.theirs):
            change(model)

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        torch.manual_seed(self.seed)
        return model(**batch, use_cache=False).loss

    def step(self, *, micro: int = 1, lengths: tuple[int, ...] = (13, 9, 5, 5), zero: bool = True, **options: Any):
        """Some micro-batches and a step of SGD on both; losses and gradients have to agree to the bit."""
        if zero:
            self.both(lambda model: model.zero_grad(set_to_none=True))
        for _ in range(micro):
            self.seed += 1
            batch = tiny_models.packed_batch(lengths, seed=self.seed)
            with self.stack.enabled():
                ours = self.loss(self.ours, batch)
                ours.backward()
            theirs = self.loss(self.theirs, batch)
            theirs.backward()
            assert torch.equal(ours, theirs)
        self.require_equal_gradients()
        with torch.no_grad():
            for model in (self.ours, self.theirs):
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.05 * parameter.grad

    def require_equal_gradients(self) -> None:
        pairs = zip(self.ours.named_parameters(), self.theirs.parameters(), strict=True)
        for (name, ours), theirs in pairs:
            assert (ours.grad is None) == (theirs.grad is None), name
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name

    def replayed(self, steps: int = 1, **options: Any) -> int:
        before = self.stack.replays
        for _ in range(steps):
            self.step(**options)
        return self.stack.replays - before


# -- the same training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_training_is_the_same(family: str) -> None:
    pair = Pair(family)
    assert pair.replayed(WARM_UP) == 0
    assert pair.replayed(4) == 4
    assert pair.stack.captures == 1 and pair.recorder.recorded == 2
    assert pair.recorder.replayed == 1 + 8  # one was looked at


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_training_is_the_same(dropout: float) -> None:
    """The embedding is frozen: the layers' input requires no gradient. Dropout draws what it would have drawn."""
    pair = Pair(lora=dropout)
    assert pair.replayed(WARM_UP + 4) == 4
    assert {n for n, p in pair.ours.named_parameters() if p.grad is not None} == {
        n for n, p in pair.ours.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("segments", [2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"lora": 0.0}, {"lora": 0.3}, {"family": "gemma2"}], ids=str)
def test_a_backward_pass_in_segments_is_the_same(segments: int, options: dict[str, Any]) -> None:
    """Three layers: as many segments at the most."""
    pair = Pair(segments=segments, **options)
    assert pair.replayed(WARM_UP + 3) == 3
    cuts = min(segments, 3)
    assert pair.recorder.recorded == 1 + cuts and pair.recorder.replayed == 1 + 3 * (1 + cuts)
    assert pair.replayed(2, micro=2, zero=False) == 4


def test_where_the_backward_pass_is_cut() -> None:
    """The first layer, whose gradients nothing can hide, by itself; each layer once."""
    assert graphs._segments(24, 1) == [range(24)] and graphs._segments(1, 4) == [range(1)]
    assert graphs._segments(24, 3) == [range(1), range(1, 12), range(12, 24)]
    for layers, segments in ((28, 6), (24, 5), (3, 3), (2, 5), (7, 2)):
        parts = graphs._segments(layers, segments)
        assert [layer for part in parts for layer in part] == list(range(layers))
        assert parts[0] == range(1) and len(parts) == min(layers, segments)
        sizes = [len(part) for part in parts[1:]]
        assert max(sizes) - min(sizes) <= 1


def test_gradients_of_the_last_layers_come_before_the_first_ones_are_made() -> None:
    pair = Pair(segments=3)
    pair.replayed(WARM_UP + 1)
    layers = pair.ours.model.layers
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, index=index: seen[index].add(pair.recorder.replayed)
            )
    before = pair.recorder.replayed
    assert pair.replayed(1) == 1
    assert seen == {2: {before + 2}, 1: {before + 3}, 0: {before + 4}}


@pytest.mark.parametrize("frozen", [(0,), (0, 1), (1,), (2,), (0, 2)])
def test_segments_in_which_nothing_is_trained(frozen: tuple[int, ...]) -> None:
    pair = Pair(segments=3, lora=0.0)
    for model in (pair.ours, pair.theirs):
        for index in frozen:
            model.base_model.model.model.layers[index].requires_grad_(False)
    assert pair.replayed(WARM_UP + 2) == 2
    trained = {0, 1, 2} - set(frozen)
    found = {n.split("layers.")[1][0] for n, p in pair.ours.named_parameters() if p.grad is not None}
    assert found == set(map(str, trained))
    assert pair.recorder.recorded == 1 + 3 - min(trained)


def test_a_parameter_that_two_segments_share() -> None:
    pair = Pair(segments=3)
    for model in (pair.ours, pair.theirs):
        layers = model.model.layers
        layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    assert pair.replayed(WARM_UP + 2) == 2


def test_dropout_differs_from_replay_to_replay() -> None:
    pair = Pair(lora=0.5)
    pair.replayed(WARM_UP + 1)
    batch = tiny_models.packed_batch()
    losses = set()
    with pair.stack.enabled():
        torch.manual_seed(0)
        for _ in range(3):
            loss = pair.ours(**batch, use_cache=False).loss
            losses.add(loss.item())
            del loss  # or the replay would count as waiting for its backward pass
    assert len(losses) == 3 and pair.stack.replays == 4


@pytest.mark.parametrize("lora", [None, 0.0])
def test_gradients_add_up_over_micro_batches(lora: float | None) -> None:
    pair = Pair(lora=lora)
    assert pair.replayed(3, micro=3) == 9 - WARM_UP
    # Across steps too, where nothing is set to None in between.
    assert pair.replayed(2, micro=2, zero=False) == 4


def on_the_graphs_memory(pair: Pair) -> list[bool]:
    """Of each trained parameter of the layers: whether its gradient lies where the graph writes it."""
    (kind,) = [kind for kind in pair.stack._kinds.values() if kind.captured is not None]
    assert kind.captured is not None
    statics = [t for gradients in kind.captured.gradients for t in gradients.tensors]
    parameters = [p for segment in kind.captured.parameters for p in segment]
    return [
        p.grad is not None and t is not None and p.grad.data_ptr() == t.data_ptr()
        for p, t in zip(parameters, statics, strict=True)
    ]


@pytest.mark.parametrize("segments", [1, 3])
def test_gradients_are_lent(segments: int) -> None:
    """No copy where each step begins with none; what accumulates, or is zeroed in place, gets memory of its own."""
    pair = Pair(segments=segments)
    for _ in range(2):
        pair.replayed(WARM_UP + 1)
        lent = on_the_graphs_memory(pair)
        assert len(lent) > 20 and all(lent)
        assert pair.replayed(1, micro=2) == 2
        assert not any(on_the_graphs_memory(pair))
    pair.both(lambda model: model.zero_grad(set_to_none=False))
    assert pair.replayed(1, zero=False) == 1
    assert pair.stack.captures == 1


@pytest.mark.parametrize("view", [lambda g: g, lambda g: g.detach(), lambda g: g.flatten()[1:]], ids="gdv")
def test_gradients_that_are_kept_stay_as_they_are(view: Callable[[Tensor], Tensor]) -> None:
    """Over a step: the graphs give their memory up, and hand out copies from then on."""
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    (kept,) = [view(p.grad) for n, p in pair.ours.named_parameters() if n.endswith("1.mlp.down_proj.weight")]
    before = kept.clone()
    assert pair.replayed(3) == 3
    assert torch.equal(kept, before)
    assert pair.stack.captures == 2 and not any(on_the_graphs_memory(pair))


def test_gradients_by_torch_autograd_grad_stay_as_they_are() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    with pair.stack.enabled():
        loss = pair.loss(pair.ours, tiny_models.packed_batch())
    kept = torch.autograd.grad(loss, list(pair.ours.parameters()))
    before = [grad.clone() for grad in kept]
    assert pair.replayed(1) == 1
    assert all(map(torch.equal, kept, before))


def test_gradients_that_are_kept_by_their_parameters_and_elsewhere() -> None:
    """As `.grad` over the next forward pass, and elsewhere from then on: moved with it."""
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    with pair.stack.enabled():
        loss = pair.loss(pair.ours, tiny_models.packed_batch())
        kept = [parameter.grad for parameter in pair.ours.parameters()]
        before = [gradient.clone() for gradient in kept if gradient is not None]
        pair.ours.zero_grad(set_to_none=True)
        loss.backward()
    assert len(before) == len(kept) and all(map(torch.equal, kept, before))
    assert pair.replayed(1) == 1 and pair.stack.captures == 1


def test_the_output_is_not_the_graphs_own_memory() -> None:
    """A hidden state that somebody keeps, or writes into, belongs to him."""
    pair = Pair()
    pair.replayed(WARM_UP)
    kept = []
    for model in (pair.ours, pair.theirs):
        model.base_model.norm.register_forward_pre_hook(lambda m, args: kept.append(args[0]) or (args[0].mul_(2.0),))
    pair.replayed(1)
    first = kept[0].clone()
    assert pair.replayed(1) == 1
    assert torch.equal(kept[0], first)


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The casts of weights are part of what is replayed, and autocast's cache does not keep them."""
    pair = Pair()
    cached: list[bool] = []

    def look(value: Any) -> Any:
        if torch.is_grad_enabled():
            cached.append(torch.is_autocast_cache_enabled())
        return decoder.materialise(value)

    monkeypatch.setattr(graphs, "materialise", look)
    plain = pair.loss

    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(model, batch)

    pair.loss = loss  # type: ignore[method-assign]
    assert pair.replayed(WARM_UP + 3) == 3
    assert cached and not any(cached)
    pair.loss = plain  # type: ignore[method-assign]
    assert pair.replayed(1) == 0  # another kind of pass
    pair.loss = loss  # type: ignore[method-assign]
    assert pair.replayed(1) == 1


# -- batches of other kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 3])
def test_shapes_are_captured_one_by_one_and_share_their_gradients_memory(segments: int) -> None:
    pair = Pair(segments=segments)
    other = (16, 8, 8)
    assert pair.replayed(WARM_UP + 1) == 1
    assert pair.replayed(graphs.WARM_UP_OF_A_SHAPE, lengths=other) == 0
    for _ in range(2):
        assert pair.replayed(1, lengths=other) == pair.replayed(1) == 1
    assert pair.stack.captures == 2
    one, two = (kind.captured for kind in pair.stack._kinds.values())
    assert one is not None and two is not None
    assert len(one.gradients) == segments
    assert all(ours is theirs for ours, theirs in zip(one.gradients, two.gradients, strict=True))


def test_no_more_graphs_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 4)
    pair = Pair()
    kinds = [(32,), (16, 16), (16, 8, 8), (8, 8, 8, 8), (8, 8, 8, 4, 4)]
    for lengths in kinds:
        pair.replayed(WARM_UP + 1, lengths=lengths)
    assert pair.stack.captures == graphs.MAX_GRAPHS == len(kinds) - 1
    assert pair.replayed(1, lengths=kinds[-1]) == 0 and "already" in str(pair.stack.obstacle)
    assert pair.replayed(1, lengths=kinds[0]) == 1


def test_graphs_of_a_bygone_state_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    pair = Pair()
    assert pair.replayed(WARM_UP + 1) == 1
    pair.both(lambda model: model.base_model.layers[0].mlp.up_proj.requires_grad_(False))
    assert pair.replayed(WARM_UP + 1) == 1
    assert sum(kind.captured is not None for kind in pair.stack._kinds.values()) == 1


def test_a_stream_of_new_shapes_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_KINDS", 3)
    pair = Pair()
    for length in range(20, 30):
        pair.step(lengths=(length,))
    assert len(pair.stack._kinds) <= 3 and pair.stack.replays == 0


# -- the model changes in the middle ---------------------------------------------------------------------------------


def test_adapter_off_and_on_again() -> None:
    pair = Pair(lora=0.0)
    pair.replayed(WARM_UP + 1)
    pair.both(lambda model: model.base_model.disable_adapter_layers())
    # Nothing is trained now, by the way: only the loss is compared.
    batch = tiny_models.packed_batch()
    with pair.stack.enabled():
        assert torch.equal(pair.loss(pair.ours, batch), pair.loss(pair.theirs, batch))
    pair.both(lambda model: model.base_model.enable_adapter_layers())
    assert pair.replayed(1) == 1


def scaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 3.0


def rehung(model: Any) -> None:
    """The weights at another address, as after loading a checkpoint by assignment, or moving the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scaling": scaled,
    "weights elsewhere": rehung,
    "eval": lambda model: model.eval(),
    "one module in eval": lambda model: model.get_decoder().layers[1].self_attn.v_proj.lora_dropout.eval(),
    "dropout": lambda model: setattr(model.get_decoder().layers[2].mlp.down_proj.lora_dropout["default"], "p", 0.9),
    "frozen": lambda model: model.get_decoder().layers[1].self_attn.v_proj.lora_A.requires_grad_(False),
    "attention": lambda model: setattr(
        model.get_decoder().layers[0].self_attn.config, "_attn_implementation", "eager"
    ),
    "another module": lambda model: setattr(model.get_decoder().layers[1], "mlp", nn.Linear(32, 32)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_captured_anew(change: str) -> None:
    pair = Pair(lora=0.2)
    pair.replayed(WARM_UP + 1)
    with torch.random.fork_rng(devices=[]):
        for model in (pair.ours, pair.theirs):
            torch.manual_seed(5)
            CHANGES[change](model)
    assert pair.replayed(WARM_UP) == 0
    assert pair.replayed(2) == 2


STATE_CHANGES: dict[str, Callable[[Any], Any]] = {
    "a setting of the configuration": lambda layer: setattr(layer.self_attn.config, "attention_bias", "changed"),
    "a dtype": lambda layer: setattr(layer.mlp, "compute_dtype", torch.bfloat16),
    "a tuple": lambda layer: setattr(layer.mlp, "window", (4, 0)),
    "a function": lambda layer: setattr(layer.mlp, "function", torch.tanh),
    "a tensor in an attribute": lambda layer: setattr(layer.mlp, "table", layer.mlp.table.clone()),
    "a scaling that is another tensor": lambda layer: layer.mlp.scaling.update(x=layer.mlp.scaling["x"].clone()),
    "a scaling that is a number now": lambda layer: layer.mlp.scaling.update(x=2.0),
    "a weight laid out otherwise": lambda layer: setattr(
        layer.mlp.square.weight, "data", layer.mlp.square.weight.data.t()
    ),
    "a weight cut short": lambda layer: setattr(layer.mlp.square.weight, "data", layer.mlp.square.weight.data[:2]),
    "a weight's bits as integers": lambda layer: setattr(
        layer.mlp.square.bias, "data", layer.mlp.square.bias.data.view(torch.int32)
    ),
    "a weight that is trained now": lambda layer: layer.mlp.square.bias.requires_grad_(),
    "a weight in another object": lambda layer: setattr(
        layer.mlp.square, "weight", nn.Parameter(layer.mlp.square.weight.data)
    ),
    "a module in a holder": lambda layer: layer.mlp.held.update({"a": nn.Linear(2, 2)}),
    "a module in a holder that was empty": lambda layer: layer.mlp.nothing.update({"a": nn.Linear(2, 2)}),
    "modules in another order": lambda layer: layer.mlp.held.update({"a": layer.mlp.held.pop("a")}),
    "an attribute of a holder": lambda layer: setattr(layer.mlp.held, "more", 1),
    "an attribute of a holder, changed": lambda layer: setattr(layer.mlp.told, "more", 2),
    "a value among parameters": lambda layer: layer.mlp.values.update({"a": 2}),
    "a value among no parameters": lambda layer: layer.mlp.no_values.update({"a": 2}),
    "a buffer more": lambda layer: layer.mlp.square.register_buffer("more", torch.ones(1)),
    "one setting in the place of another": lambda layer: (delattr(layer.mlp, "window"), setattr(layer.mlp, "x", 1)),
    "a forward in the place of an attribute": lambda layer: (
        layer.mlp.square.__dict__.pop("_note"),
        setattr(layer.mlp.square, "forward", torch.relu),
    ),
    "a hook inside of a holder": lambda layer: layer.mlp.held["a"].register_forward_hook(lambda *_: None),
    "a scaling by another name": lambda layer: (layer.mlp.scaling.update(y=layer.mlp.scaling.pop("x")),),
}


@pytest.mark.parametrize("change", STATE_CHANGES)
def test_what_else_belongs_to_the_state(change: str) -> None:
    layers = list(patched().base_model.layers)
    mlp = layers[1].mlp
    mlp.compute_dtype, mlp.window, mlp.function, mlp.table = None, (8, 0), torch.relu, torch.ones(3)
    mlp.scaling = {"x": torch.tensor(2.0)}
    mlp.square = nn.Linear(4, 4)
    mlp.square.bias.requires_grad_(False)
    mlp.square._note = None
    mlp.held, mlp.nothing = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), nn.ModuleDict()
    mlp.told = nn.ModuleList()
    mlp.told.more = 1
    mlp.values, mlp.no_values = nn.ParameterDict({"a": 1, "b": torch.ones(1)}), nn.ParameterDict()
    state = LayerState(layers)
    before = state.read()
    mlp.table += 1.0  # a value, which replays read
    assert state.read() == before
    STATE_CHANGES[change](layers[1])
    assert state.read() != before


def test_a_look_runs_no_python_for_a_module() -> None:
    """It is taken before every replay; in PEFT's layers there are some eighty modules a layer."""
    layers = decoder_layers(patched(lora=0.2))

    def calls(state: LayerState) -> int:
        found: list[str] = []

        def note(frame: Any, event: str, argument: Any) -> None:
            if event in ("call", "c_call"):
                found.append(frame.f_code.co_name)

        sys.setprofile(note)
        try:
            state.read()
        finally:
            sys.setprofile(None)
        return len(found) - found.count("_copied")  # for PEFT's dictionaries alone

    assert calls(LayerState(layers[:1])) == calls(LayerState(layers))


FLAGS = {
    "allow_fp16_accumulation": torch.backends.cuda.matmul,
    "allow_fp16_reduced_precision_reduction": torch.backends.cuda.matmul,
    "allow_bf16_reduced_precision_reduction": torch.backends.cuda.matmul,
}
SDP = ("flash", "mem_efficient", "math", "cudnn")


@pytest.mark.parametrize("flag", [*FLAGS, *SDP, "default dtype"])
def test_a_setting_of_the_process_is_another_kind_of_pass(flag: str) -> None:
    def turn() -> Callable[[], Any]:
        """Change it; what changes it back."""
        if flag == "default dtype":
            torch.set_default_dtype(torch.float64)
            return lambda: torch.set_default_dtype(torch.float32)
        if flag in SDP:
            value = getattr(torch.backends.cuda, f"{flag}_sdp_enabled")()
            enable = getattr(torch.backends.cuda, f"enable_{flag}_sdp")
            enable(not value)
            return lambda: enable(value)
        value = getattr(FLAGS[flag], flag)
        setattr(FLAGS[flag], flag, not value)
        return lambda: setattr(FLAGS[flag], flag, value)

    before = surroundings(torch.device("cpu"))
    turn_back = turn()
    try:
        assert surroundings(torch.device("cpu")) != before
    finally:
        turn_back()
    assert surroundings(torch.device("cpu")) == before


def test_a_trained_tensor_that_no_layer_holds() -> None:
    """Its gradient would be lost: no argument of the replay, and no parameter of the layers."""
    pair = Pair()
    for model in (pair.ours, pair.theirs):
        model.register_parameter("gain", nn.Parameter(torch.tensor(1.5)))
        mlp = model.get_decoder().layers[1].mlp
        plain = mlp.down_proj

        class Scaled(nn.Module):
            def __init__(self, inside: nn.Module, gain: nn.Parameter) -> None:
                super().__init__()
                self.inside, self.closure = inside, lambda: gain

            def forward(self, x: Tensor) -> Tensor:
                return self.inside(x) * self.closure()

        mlp.down_proj = Scaled(plain, model.gain)
    assert pair.replayed(WARM_UP + 2) == 0
    assert pair.ours.gain.grad is not None
    assert "that none of them holds" in str(pair.stack.reason)


def test_states_that_are_forgotten_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose replay is still running must not be let go of."""
    monkeypatch.setattr(graphs, "MAX_STATES", 1)
    pair = Pair(lora=0.0)
    pair.replayed(WARM_UP + 1)
    waited, replayed = pair.recorder.waited, pair.recorder.replayed
    assert waited < replayed
    pair.both(scaled)
    pair.replayed(1)
    assert pair.recorder.waited == replayed
    assert pair.replayed(WARM_UP) == 1


def test_a_merged_adapter() -> None:
    pair = Pair(lora=0.0)
    pair.replayed(WARM_UP + 1)
    # (Merging changes the weights in place; of the state only PEFT's list tells.)
    pair.both(lambda model: model.merge_adapter())
    state = pair.stack._state.read()
    pair.both(lambda model: model.unmerge_adapter())
    assert state != pair.stack._state.read()


def test_another_attention_is_another_state() -> None:
    """(A batch shows it too, by its mask, if the two take different ones.)"""
    model = patched()
    state = LayerState(list(model.base_model.layers))
    before = state.read()
    assert state.read() == before
    model.base_model.layers[0].self_attn.config._attn_implementation_internal = "eager"
    assert state.read() != before


def test_a_hook_sees_every_pass() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    seen: list[str] = []
    layer = pair.ours.base_model.layers[1]
    handle = layer.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    assert pair.replayed(2) == 0 and len(seen) == 2 and "hooks" in str(pair.stack.obstacle)
    handle.remove()
    assert pair.replayed(1) == 1


def test_hooks_of_the_process_and_on_saved_tensors_see_every_pass() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert pair.replayed(1) == 0
    handle.remove()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert pair.replayed(1) == 0 and "saved tensors" in str(pair.stack.obstacle)
    assert pair.replayed(1) == 1


def test_hooks_on_parameters_run_once_a_pass() -> None:
    pair = Pair()
    for model in (pair.ours, pair.theirs):
        model.base_model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * 3.0)
    assert pair.replayed(WARM_UP + 2) == 2


def test_gradient_checkpointing_and_no_grad_run_eagerly() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    with pair.stack.enabled(), torch.no_grad():
        pair.ours(**tiny_models.packed_batch(), use_cache=False)
    assert pair.stack.passes == WARM_UP + 1
    pair.both(lambda model: model.gradient_checkpointing_enable())
    assert pair.replayed(WARM_UP + 1) == 0 and "checkpointing" in str(pair.stack.obstacle)
    pair.both(lambda model: model.gradient_checkpointing_disable())
    assert pair.replayed(WARM_UP + 1) >= 1


def test_outside_of_enabled_the_model_is_as_ever() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    passes = pair.stack.passes
    pair.ours(**tiny_models.packed_batch(), use_cache=False).loss.backward()
    assert pair.stack.passes == passes


# -- the order of passes ---------------------------------------------------------------------------------------------


def test_two_forwards_before_a_backward() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    pair.both(lambda model: model.zero_grad(set_to_none=True))
    batches = [tiny_models.packed_batch(seed=seed) for seed in (50, 51)]
    before = pair.stack.replays
    with pair.stack.enabled():
        first, second = (pair.loss(pair.ours, batch) for batch in batches)
        (first + 2 * second).backward()
    assert pair.stack.replays == before + 1
    first, second = (pair.loss(pair.theirs, batch) for batch in batches)
    (first + 2 * second).backward()
    for (name, ours), theirs in zip(pair.ours.named_parameters(), pair.theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    assert pair.replayed(1) == 1


def test_a_forward_without_backward_does_not_block() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    with pair.stack.enabled():
        pair.loss(pair.ours, tiny_models.packed_batch())
    assert pair.replayed(1) == 1


def test_a_second_backward_is_refused() -> None:
    pair = Pair()
    pair.replayed(WARM_UP)
    with pair.stack.enabled():
        loss = pair.loss(pair.ours, tiny_models.packed_batch())
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"second time .*cuda_graphs='off'"):
            loss.backward()


def test_second_derivatives_are_refused() -> None:
    pair = Pair()
    pair.replayed(WARM_UP)
    weight = pair.ours.base_model.layers[0].mlp.up_proj.weight
    with pair.stack.enabled():
        loss = pair.loss(pair.ours, tiny_models.packed_batch())
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# -- models that cannot be replayed ----------------------------------------------------------------------------------


def test_capture_fails() -> None:
    for fails_at in (1, 2):
        pair = Pair(lora=0.3, recorder=StandIn(fails_at))
        assert pair.replayed(WARM_UP + 3) == 0
        assert "stream is capturing" in str(pair.stack.reason)
        assert pair.recorder.recorded == fails_at  # it is not tried again
        assert pair.recorder.released == 1


def test_a_replay_that_does_not_agree() -> None:
    """As with a kernel that chooses its stream itself: it runs during the capture, and in no replay."""
    pair = Pair(lora=0.3)
    pair.recorder.loses = True
    assert pair.replayed(WARM_UP + 2) == 0
    assert "differ from the layers' own by 1.0e-01" in str(pair.stack.reason)
    assert pair.recorder.recorded == 2 and pair.recorder.released == 1


def test_a_replay_that_gives_no_numbers() -> None:
    captured: Any = SimpleNamespace(forward=lambda tensors: torch.full((2,), torch.nan))
    with pytest.raises(RuntimeError, match="differ from the layers' own by nan"):
        require_equal(captured, [torch.ones(2)], lambda: torch.ones(2))


def between(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """What the model does between its first two layers."""

    def put(model: Any) -> None:
        layers = model.base_model.layers
        calls = layers[1].__call__

        class Changing(type(layers[1])):  # type: ignore[misc]
            def __call__(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
                return calls(change(hidden), *args, **kwargs)

        layers[1].__class__ = Changing

    return put


def test_a_model_that_works_on_the_stream_between_layers() -> None:
    pair = Pair()
    pair.both(between(lambda hidden: hidden * 0.5))
    assert pair.replayed(WARM_UP + 2) == 0
    assert "between its decoder layers" in str(pair.stack.reason)


def test_one_that_begins_to_is_told() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    between(lambda hidden: hidden * 0.5)(pair.ours)
    with pytest.raises(RuntimeError, match=r"layer 1 .*cuda_graphs='off'"):
        pair.step()


def test_a_model_that_leaves_layers_out() -> None:
    pair = Pair()
    pair.both(lambda model: setattr(model.config, "num_hidden_layers", 2))
    assert pair.replayed(WARM_UP + 2) == 0
    assert pair.stack.captures == 0


def test_one_that_begins_to_leave_layers_out_is_told() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    pair.ours.base_model.layers = pair.ours.base_model.layers[:2]
    with pytest.raises(RuntimeError, match=r"2 of its 3 decoder layers"):
        pair.step()


def test_an_argument_that_cannot_be_read() -> None:
    pair = Pair()
    with pair.stack.enabled():
        for _ in range(WARM_UP + 2):
            pair.ours(**tiny_models.packed_batch(), use_cache=False, something=object()).loss.backward()
    assert pair.stack.replays == 0 and "a object" in str(pair.stack.obstacle)


def test_a_layer_that_gets_other_arguments_later() -> None:
    """The first layer is called as ever, another one is not: the pass runs eagerly, and is right."""
    pair = Pair("gemma2")
    pair.replayed(WARM_UP + 1)

    def one_more(model: Any) -> None:
        layers = model.base_model.layers
        calls = layers[2].__call__

        class Told(type(layers[2])):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return calls(*args, **kwargs, told=3)

        layers[2].__class__ = Told

    pair.both(one_more)
    assert pair.replayed(WARM_UP + 1) == 0
    assert pair.replayed(2) == 2


def test_short_of_memory_the_graphs_make_room() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    pair.recorder.short = True
    pair.step(lengths=(16, 16))
    assert pair.recorder.released == 1
    assert pair.replayed(1) == 1  # captured anew, without further eager passes
    for others in range(graphs.MAX_SHORTAGES):
        pair.step(lengths=(24 - others, 8 + others))
        pair.step()
    assert "no memory" in str(pair.stack.reason)
    pair.step()


def test_released_graphs_are_captured_anew() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    pair.stack.release()
    assert pair.recorder.released == 1 and pair.recorder.waited == pair.recorder.replayed
    assert pair.replayed(2) == 2 and pair.stack.captures == 2


# -- copies, pickles, the end ----------------------------------------------------------------------------------------


def test_a_copy_is_a_model_of_its_own() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    passes = pair.stack.passes
    twin = copy.deepcopy(pair.ours)
    with pair.stack.enabled():
        loss = pair.loss(twin, tiny_models.packed_batch())
    loss.backward()
    assert pair.stack.passes == passes
    assert torch.equal(loss, pair.loss(pair.theirs, tiny_models.packed_batch()))
    assert all(p.grad is not None for p in twin.parameters())
    assert pair.replayed(1) == 1


def test_a_pickle_holds_no_graph() -> None:
    pair = Pair()
    pair.replayed(WARM_UP + 1)
    file = io.BytesIO()
    pickle.dump(pair.ours, file)
    file.seek(0)
    loss = pickle.load(file)(**tiny_models.packed_batch(), use_cache=False).loss
    torch.testing.assert_close(loss, pair.loss(pair.theirs, tiny_models.packed_batch()))


def test_remove_leaves_nothing() -> None:
    pair = Pair()
    before = {name: set(module.__dict__) for name, module in pair.theirs.named_modules()}
    pair.replayed(WARM_UP + 1)
    pair.stack.remove()
    assert {name: set(module.__dict__) for name, module in pair.ours.named_modules()} == before
    for layer in pair.ours.base_model.layers:
        assert layer.forward.__func__ is decoder.decoder_forward and layer.forward.__self__ is layer
    assert pair.recorder.released == 1
    assert pair.replayed(1) == 0


def test_remove_after_unpatching_keeps_the_models_own_forward() -> None:
    pair = Pair()
    pair.replayed(WARM_UP)
    unpatch_model(pair.ours)
    pair.stack.remove()
    assert not any("forward" in layer.__dict__ or PLACE in layer.__dict__ for layer in pair.stack.layers)


# -- recognition, state and calls ------------------------------------------------------------------------------------


def test_which_models_have_a_stack() -> None:
    assert len(decoder_layers(patched())) == 3
    for model in (patched("granite"), patched("gpt2"), tiny_models.build("llama")):
        assert "not patched" in str(decoder_layers(model))
    model = patched()
    unpatch_model(model.base_model.layers[1])
    assert "some of" in str(decoder_layers(model))
    model = patched()
    model.base_model.layers[2] = model.base_model.layers[0]
    assert "twice" in str(decoder_layers(model))


def test_the_obstacles_of_a_state() -> None:
    cpu = torch.device("cpu")
    model = patched()
    layers = list(model.base_model.layers)
    assert LayerState(layers).obstacle(cpu) is None
    assert "cuda" in str(LayerState(layers).obstacle(torch.device("cuda", 0)))
    layers[1].mlp.up_proj.forward = lambda x: x
    assert "another library" in str(LayerState(layers).obstacle(cpu))
    del layers[1].mlp.up_proj.forward
    model.requires_grad_(False)
    assert "nothing in the layers is trained" in str(LayerState(layers).obstacle(cpu))


def test_what_is_the_same_call() -> None:
    x, mask, table = torch.ones(2, 3), torch.ones(3), torch.ones(3)

    def key(hidden: Tensor, *calls: dict[str, Any]) -> Any:
        return read_call(hidden, [((), call) for call in calls]).key

    usual = key(x, {"mask": mask, "tables": (table, mask), "n": 3})
    assert usual == key(x + 1, {"mask": table, "tables": (mask, table), "n": 3})
    for other in (
        key(x, {"mask": mask, "tables": (table, mask), "n": 4}),
        key(x, {"mask": mask, "tables": (table, mask), "n": 3.0}),
        key(x, {"mask": mask, "tables": [table, mask], "n": 3}),
        key(x, {"mask": mask, "tables": (mask, table), "n": 3}),  # the same object elsewhere
        key(x, {"mask": None, "tables": (table, mask), "n": 3}),
        key(x.double(), {"mask": mask, "tables": (table, mask), "n": 3}),
        key(x.clone().requires_grad_(), {"mask": mask, "tables": (table, mask), "n": 3}),
        key(torch.ones(3, 2).t(), {"mask": mask, "tables": (table, mask), "n": 3}),
        key(x, {"mask": mask, "tables": (table, mask), "n": 3}, {"mask": mask, "tables": (table, mask), "n": 4}),
    ):
        assert other != usual
    same = {"mask": mask, "n": 3}
    assert key(x, same, same, {"mask": table, "n": 3}) == key(x, same, same, {"mask": table, "n": 3})
    assert key(x, same, same, {"mask": table, "n": 3}) != key(x, same, {"mask": table, "n": 3}, same)
    for unreadable in (object(), torch.ones(3).requires_grad_(), torch.ones(3, device="meta"), lambda: 0):
        with pytest.raises(Unreadable):
            key(x, {"mask": unreadable})


def test_the_backward_pass_is_recorded_without_autocast_as_it_would_run() -> None:
    """The capture happens in the forward pass of a training step, which autocast is around."""
    seen: list[bool] = []
    layer = nn.Linear(4, 4)

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    with torch.autocast("cpu", torch.bfloat16):
        inputs = [torch.randn(2, 4, requires_grad=True)]
        segment = Segment(lambda hidden, statics: Spy.apply(layer(hidden)), list(layer.parameters()))
        Captured(StandIn(), [segment], inputs, [layer])
    assert seen == [False]
