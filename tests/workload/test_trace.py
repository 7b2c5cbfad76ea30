"""The tracer against oracles: torch's FLOP counter, torch's saved-tensor hooks, a real run's operators and storages."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from headway.errors import TraceError
from headway.workload.flop import FLOP_FORMULAS
from headway.workload.graph import Graph
from headway.workload.recording import tensor_leaves
from headway.workload.trace import construct_on_meta, meta_construction, trace, without_cache

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
VOCABULARY = 64
LENGTH = 16


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.second(self.relu(self.norm(self.first(x)))))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*[Residual(8) for _ in range(3)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        return self.head(self.pool(self.blocks(self.relu(self.stem(image)))).flatten(1))


class Block(nn.Module):
    """Pre-norm, with a feed-forward network in a Sequential that holds most of the block's parameters."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.attention(self.norm1(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.project(mixed)
        return x + self.feed(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3, tied: bool = True):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def perceptron() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(12, 32), nn.ReLU()]
    layers += [nn.Linear(32, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 5)]
    return nn.Sequential(*layers)


def language_model(kind: str, depth: int = 3) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": depth, "hidden_size": 32}
    llama = {**sizes, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": VOCABULARY}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        gpt2 = {"n_embd": 32, "n_layer": depth, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2))
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, **tokens))
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**llama, **tokens, num_local_experts=4))
    bert = {**sizes, "intermediate_size": 48, "vocab_size": VOCABULARY}
    return transformers.BertForMaskedLM(transformers.BertConfig(**bert))


def images(batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, 3, 11, 11),)


def tokens(batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, VOCABULARY, (batch, LENGTH)),)


def token_dict(batch: int) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(batch)[0]}


def features(batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, 3, 4),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "perceptron": (perceptron, features),
    "convnet": (ConvNet, images),
    "decoder": (Decoder, tokens),
    **{kind: (lambda kind=kind: language_model(kind), token_dict) for kind in ("gpt2", "llama", "bert", "mixtral")},
}
every_model = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[needs_transformers] if kind in ("gpt2", "llama", "bert", "mixtral") else [])
        for kind in MODELS
    ],
)


def build(kind: str, *, dropout: bool = True) -> tuple[nn.Module, Callable[[int], Any]]:
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    model = make()
    if not dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
    return model, inputs


def call(model: nn.Module, inputs: Any) -> Any:
    with without_cache(model):
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def scalar(output: Any) -> torch.Tensor:
    return (output.logits if hasattr(output, "logits") else output).sum()


# -- FLOP, parameters, operators --------------------------------------------------------------------------------------


@every_model
def test_flop_equal_those_of_torchs_counter(kind):
    model, inputs = build(kind)
    graph = trace(model, inputs(4), name=kind)
    for batch in (2, 5):
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            output = call(model, inputs(batch))
            forward = counter.get_total_flops()
            scalar(output).backward()
        assert graph.forward_flop.at(batch) == forward
        assert graph.backward_flop.at(batch) == counter.get_total_flops() - forward
        assert forward > 0


@every_model
def test_parameters_are_those_of_the_model(kind):
    model, inputs = build(kind)
    graph = trace(model, inputs(2), name=kind)
    expected = dict(model.named_parameters())
    assert {parameter.name: parameter.shape for parameter in graph.parameters} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert graph.parameter_count == sum(tensor.numel() for tensor in expected.values())
    assert graph.parameter_bytes == sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert graph.buffer_bytes == sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    names = {name for layer in graph.layers for name in layer.parameters}
    used = {name for name, tensor in expected.items() if _is_used(graph, name)}
    assert names == used
    for parameter in graph.parameters:
        if parameter.name in names:
            first = min(i for i, layer in enumerate(graph.layers) if parameter.name in layer.parameters)
            assert parameter.layer == first


def _is_used(graph: Graph, name: str) -> bool:
    return any(name in operator.reads_parameters for operator in graph.operators)


class _RealOperators(TorchDispatchMode):
    """Operators that a real run dispatches, with their outputs' shapes; detach and looking at a value left out."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "detach" not in str(func) and func is not torch.ops.aten._local_scalar_dense.default:
            self.seen.append((str(func), [tuple(tensor.shape) for tensor in tensor_leaves(result)]))
        return result


@every_model
def test_a_real_run_at_another_batch_size_dispatches_the_traced_operators_with_the_traced_shapes(kind):
    model, inputs = build(kind)
    graph = trace(model, inputs(2), name=kind)
    given = inputs(7)
    with _RealOperators() as real:
        scalar(call(model, given)).backward()
    traced = [(operator.target, [kind.shape(7) for kind in operator.outputs]) for operator in graph.operators]
    assert [name for name, _ in real.seen] == [name for name, _ in traced]
    for (name, shapes), (_, expected) in zip(real.seen, traced):
        assert expected[: len(shapes)] == shapes, name


@every_model
def test_every_tensor_that_an_operator_reads_was_made_before_or_given(kind):
    model, inputs = build(kind)
    graph = trace(model, inputs(2), name=kind)
    known = {*graph.input_tensors, *(parameter.tensor for parameter in graph.parameters)}
    made: set[int] = set()
    unknown: set[int] = set()
    for operator in graph.operators:
        assert len(operator.inputs) == len(operator.input_tensors)
        assert len(operator.outputs) == len(operator.output_tensors)
        unknown.update(set(operator.input_tensors) - known - made)
        assert not made & set(operator.output_tensors) or operator.is_view
        made.update(operator.output_tensors)
    # What remains are buffers, and such are few.
    assert len(unknown) <= len(list(model.buffers()))
    assert not unknown & made


def test_operators_can_be_replayed_from_their_arguments():
    model, inputs = build("decoder")
    graph = trace(model, inputs(2), name="decoder")

    def value(item: Any, tensors: list[torch.Tensor]) -> Any:
        if isinstance(item, dict):
            if "tensor" in item:
                return tensors[item["tensor"]]
            if "dtype" in item:
                return getattr(torch, item["dtype"])
            return item["fixed"] + item["per_sample"] * 5
        return [value(each, tensors) for each in item] if isinstance(item, list) else item

    replayed = 0
    for operator in graph.operators:
        if operator.target in ("aten.mm.default", "aten.addmm.default", "aten.view.default", "aten.add.Tensor"):
            tensors = [torch.zeros(kind.shape(5), dtype=getattr(torch, kind.dtype)) for kind in operator.inputs]
            _, name, overload = operator.target.split(".")
            function = getattr(getattr(torch.ops.aten, name), overload)
            arguments = [value(item, tensors) for item in operator.arguments]
            result = function(*arguments, **{key: value(item, tensors) for key, item in operator.keywords.items()})
            assert tuple(result.shape) == operator.outputs[0].shape(5)
            replayed += 1
    assert replayed > 50


# -- memory -----------------------------------------------------------------------------------------------------------


@every_model
def test_saved_bytes_are_those_that_autograd_really_saves(kind):
    model, inputs = build(kind)
    graph = trace(model, inputs(2), name=kind)
    for batch in (2, 4):
        given = inputs(batch)
        outside = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        outside |= {tensor.untyped_storage()._cdata for tensor in tensor_leaves(given)}
        storages: dict[int, int] = {}
        alive = []

        def pack(tensor, storages=storages, alive=alive, outside=outside):
            storage = tensor.untyped_storage()
            if storage._cdata not in outside:
                storages[storage._cdata] = storage.nbytes()
                alive.append(storage)  # addresses are reused otherwise
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call(model, given)
        del output
        assert graph.saved.at(batch) == sum(storages.values())


class _LiveStorages(TorchDispatchMode):
    """The most bytes of storages alive at once in a real run, given ones and those of `ignored` left out."""

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.numbers = {tensor.untyped_storage()._cdata: -1 for tensor in given}
        self.references: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tensor_leaves(result):
            storage = tensor.untyped_storage()
            if storage._cdata in self.numbers:
                continue
            number, address, size = len(self.references), storage._cdata, storage.nbytes()
            self.numbers[address] = number
            self.events.append((number, size))

            def freed(_, number=number, address=address, size=size):
                self.numbers.pop(address, None)
                self.events.append((number, -size))

            self.references.append(weakref.ref(storage, freed))
        return result

    def peak(self, gradients: list[torch.Tensor]) -> int:
        ignored = {self.numbers[gradient.untyped_storage()._cdata] for gradient in gradients}
        live = most = 0
        for number, size in self.events:
            if number not in ignored:
                live += size
                most = max(most, live)
        return most


@pytest.mark.parametrize("kind", ["perceptron", "convnet", "decoder", pytest.param("llama", marks=needs_transformers)])
def test_the_peak_over_the_layers_is_the_peak_of_a_real_step(kind):
    model, inputs = build(kind)
    graph = trace(model, inputs(2), name=kind)
    given = inputs(6)
    with _LiveStorages([*model.parameters(), *model.buffers(), *tensor_leaves(given)]) as live:
        output = call(model, given)
        loss = scalar(output)
        loss.backward()
        del loss
    peak = live.peak([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    through = 0.0
    predicted = 0.0
    for position, layer in enumerate(graph.layers):
        through += layer.saved.at(6)
        kept = through + (graph.loss_saved.at(6) if position == len(graph.layers) - 1 else 0)
        predicted = max(predicted, kept + layer.forward_peak_extra.at(6), kept + layer.backward_peak_extra.at(6))
    # Layers before the last count without the output, which a pipeline stage may not hold.
    assert predicted <= peak <= predicted + graph.loss_saved.at(6)


# -- layers and cuts --------------------------------------------------------------------------------------------------

LAYERS = {
    "perceptron": ["1", "3", "6"],
    "convnet": ["stem", "blocks.0", "blocks.1", "blocks.2", "head"],
    "decoder": ["tokens..positions", "blocks.0", "blocks.1", "blocks.2", "norm", "head"],
    "gpt2": [
        "transformer.wte..transformer.wpe",
        *[f"transformer.h.{i}" for i in range(3)],
        "transformer.ln_f",
        "lm_head",
    ],
    "llama": ["model.embed_tokens", *[f"model.layers.{i}" for i in range(3)], "model.norm", "lm_head"],
    "bert": ["bert.embeddings", *[f"bert.encoder.layer.{i}" for i in range(3)], "cls"],
    "mixtral": ["model.embed_tokens", *[f"model.layers.{i}" for i in range(3)], "model.norm", "lm_head"],
}


@every_model
def test_layers_are_where_a_person_would_cut(kind):
    model, inputs = build(kind)
    graph = trace(model, inputs(2), name=kind)
    assert [layer.name for layer in graph.layers] == LAYERS[kind]
    assert all(layer.parameters for layer in graph.layers)
    positions = sorted(position for layer in graph.layers for position in (*layer.forward, *layer.backward))
    assert positions == list(range(len(graph.operators)))
    for before, after in zip(graph.layers, graph.layers[1:]):
        assert after.input == before.output
    if kind not in ("perceptron", "convnet"):
        assert len({layer.signature for layer in graph.layers[1:4]}) == 1
        assert len({layer.signature for layer in graph.layers}) == len(graph.layers) - 2


@every_model
def test_a_pipeline_may_be_cut_before_every_layer(kind):
    """Run from each layer on: earlier units stubbed by zeros, earlier parameters gone, the crossing tensor put in."""
    model, inputs = build(kind, dropout=False)
    given = inputs(3)
    graph = trace(model, given, name=kind)
    with torch.no_grad():
        expected = tensor_leaves(call(model, given))
        for position in range(1, len(graph.layers)):
            for whole, part in zip(expected, tensor_leaves(_run_from(model, graph, position, given)), strict=True):
                torch.testing.assert_close(part, whole)


def _run_from(model: nn.Module, graph: Graph, position: int, given: Any) -> Any:
    layer = graph.layers[position]
    taken: list[torch.Tensor] = []
    modules = dict(model.named_modules())
    entry = modules[layer.entry_module]

    def take(_, args, kwargs):
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        taken.append(leaves[layer.entry_argument].clone())

    def put(_, args, kwargs):
        leaves, structure = pytree.tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        assert not leaves[places[layer.entry_argument]].equal(taken[0])
        leaves[places[layer.entry_argument]] = taken[0]
        return pytree.tree_unflatten(leaves, structure)

    handle = entry.register_forward_pre_hook(take, with_kwargs=True)
    call(model, given)
    handle.remove()
    assert tuple(taken[0].shape) == layer.input.shape(3)
    handle = entry.register_forward_pre_hook(put, with_kwargs=True)
    needed = {name for later in graph.layers[position:] for name in later.parameters}
    gone = {p.name: p for p in graph.parameters if p.name not in needed}
    kept = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if name in gone}
    stubbed = [unit for unit in graph.units if unit.layer < position and unit.depends_on_parameters]
    for unit in stubbed:
        zeros = [torch.zeros(kind.shape(3), dtype=getattr(torch, kind.dtype)) for kind in unit.produces]
        output = pytree.tree_unflatten(zeros, pytree.treespec_loads(unit.structure))
        modules[unit.module].forward = lambda *args, output=output, **kwargs: output
    for name in gone:
        model.get_parameter(name).fill_(float("nan"))
    try:
        return call(model, given)
    finally:
        handle.remove()
        for unit in stubbed:
            del modules[unit.module].forward
        for name, tensor in kept.items():
            model.get_parameter(name).copy_(tensor)


class _Skip(nn.Module):
    """A skip connection over all of its blocks, outside of them: two tensors cross everywhere in between."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.leave = nn.Linear(8, 8)

    def forward(self, x):
        first = x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x + first)


def test_no_cut_where_two_tensors_cross():
    graph = trace(_Skip(), torch.zeros(2, 8), name="skip")
    assert [layer.entry_module for layer in graph.layers] == ["", "leave"]


class _Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.shared(self.other(self.shared(x))))


def test_a_module_called_twice_keeps_everything_in_between_in_one_layer():
    graph = trace(_Again(), torch.zeros(2, 8), name="again")
    assert [layer.entry_module for layer in graph.layers] == ["", "last"]


def test_no_cut_inside_what_activation_checkpointing_runs_again():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
            self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

        def forward(self, x):
            return self.last(torch.utils.checkpoint.checkpoint(self.inner, self.first(x), use_reentrant=False))

    graph = trace(Model(), torch.zeros(2, 8), name="checkpointed")
    assert [layer.entry_module for layer in graph.layers] == ["", "last"]
    forward = 2 * 8 * (8 + 16 + 16 + 2)
    assert graph.forward_flop.at(1) == forward
    again = [operator for operator in graph.operators if operator.backward and operator.target == "aten.addmm.default"]
    assert len(again) == 1  # the first; nobody needs what the last one gives a second time


def test_the_loss_may_not_read_parameters_across_a_cut():
    model = perceptron()
    graph = trace(
        model,
        torch.zeros(2, 3, 4),
        name="decay",
        loss=lambda output: output.mean() + model[1].weight.square().sum(),  # type: ignore[operator, union-attr]
    )
    assert len(graph.layers) == 1
    assert any("loss reads parameters" in note for note in graph.notes)


class _Pair(nn.Module):
    def forward(self, x):
        return x, 3


def test_no_cut_after_a_unit_whose_result_cannot_be_written_down():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.pair = _Pair()

        def forward(self, x):
            x, _ = self.pair(self.second(self.first(x)))
            return self.third(x)

    graph = trace(Model(), torch.zeros(2, 8), name="pair")
    assert [layer.entry_module for layer in graph.layers] == ["", "second"]


# -- what else the graph says -----------------------------------------------------------------------------------------


def test_tied_weights_are_one_parameter_with_an_alias():
    graph = trace(Decoder(), tokens(2), name="decoder")
    weight = graph.parameter_by_name["head.weight"]
    assert weight.name == "tokens.weight"
    assert weight.aliases == ("head.weight",)
    assert weight.layer == 0
    assert "tokens.weight" in graph.layers[-1].parameters


def test_tokens_and_notes():
    graph = trace(Decoder(), tokens(2), name="decoder")
    assert graph.tokens_per_sample == LENGTH
    assert graph.notes == ()
    graph = trace(ConvNet(), images(2), name="convnet")
    assert graph.tokens_per_sample == 0
    assert any("BatchNorm" in note for note in graph.notes)
    assert any("dropout" in note for note in trace(perceptron(), features(2), name="perceptron").notes)
    assert trace(ConvNet().eval(), images(2), name="convnet").notes == ()


def test_the_loss_belongs_to_the_last_layer():
    model = Decoder()

    def loss(output, target):
        return F.cross_entropy(output.flatten(0, 1), target)

    graph = trace(model, tokens(2)[0], name="decoder", loss=loss, target=torch.zeros(2 * LENGTH, dtype=torch.long))
    of_loss = [operator for operator in graph.operators if operator.module == "(loss)"]
    assert {operator.layer for operator in of_loss} == {len(graph.layers) - 1}
    assert {operator.target for operator in of_loss if not operator.backward} >= {"aten._log_softmax.default"}
    # The logits, which the caller holds, the logarithms of the probabilities, and a weight.
    assert graph.loss_saved.at(3) == 2 * 3 * LENGTH * VOCABULARY * 4 + 4


def test_a_write_through_a_view_is_an_edge_of_the_dataflow():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)
            self.last = nn.Linear(8, 2)

        def forward(self, x):
            canvas = torch.zeros(x.shape[0], 8)
            canvas[:, 2:6] = self.linear(x)
            return self.last(canvas)

    graph = trace(Model(), torch.zeros(2, 8), name="canvas")
    write = next(operator for operator in graph.operators if operator.target == "aten.copy_.default")
    read = next(
        operator for operator in graph.operators if operator.module == "last" and "aten.addmm" in operator.target
    )
    assert set(write.output_tensors) & set(read.input_tensors)
    assert len(write.outputs) == 2
    assert write.outputs[1].shape(3) == (3, 8)


def test_a_graph_goes_through_json():
    graph = trace(ConvNet(), images(2), name="convnet")
    assert Graph.from_json(graph.to_json()) == graph


def test_a_model_on_the_meta_device_gives_the_same_graph():
    real = trace(Decoder(), tokens(4), name="decoder")
    with meta_construction():
        model = Decoder()
    assert trace(model, torch.empty(3, LENGTH, dtype=torch.long, device="meta"), name="decoder") == real


def test_frozen_parameters_have_no_backward_flop():
    model = Decoder(tied=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.head.parameters():
        parameter.requires_grad_(True)
    graph = trace(model, tokens(2), name="decoder")
    assert [layer.backward_flop.at(1) > 0 for layer in graph.layers] == [False] * 5 + [True]
    assert not graph.parameter_by_name["tokens.weight"].trainable


def test_recurrent_networks_trace():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = nn.LSTM(8, 8, num_layers=2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.recurrent(x)[0])

    graph = trace(Model(), torch.zeros(2, 5, 8), name="lstm")
    assert [layer.name for layer in graph.layers] == ["recurrent", "head"]


# -- errors -----------------------------------------------------------------------------------------------------------


class _Item(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.linear(x)
        return x * 2 if x.sum().item() > 0 else x


def test_a_branch_on_values_is_refused_with_its_place_and_a_remedy():
    model = nn.Sequential(nn.Linear(8, 8), _Item())
    before = dict(model.named_parameters())
    with pytest.raises(TraceError) as raised:
        trace(model, torch.zeros(2, 8), name="branchy")
    assert raised.value.place == "branchy: 1"
    assert "shapes, not values" in raised.value.remedy
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not model._forward_hooks
    assert not model[0]._forward_pre_hooks
    model(torch.zeros(2, 8))


def test_an_exception_in_forward_is_reported_with_its_message():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("the heads do not divide")

    with pytest.raises(TraceError, match="the heads do not divide") as raised:
        trace(nn.Sequential(nn.Linear(8, 8), Broken()), torch.zeros(2, 8), name="broken")
    assert raised.value.place == "broken: 1"


def test_a_model_that_depends_on_the_batch_size_is_refused():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).relu() if x.shape[0] % 2 else self.linear(x)

    with pytest.raises(TraceError, match="every batch size"):
        trace(Moody(), torch.zeros(2, 8), name="moody")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": ()}, "no tensor"),
        ({"inputs": torch.zeros(2, 3, 4), "loss": lambda output: output}, "the loss is"),
        ({"inputs": torch.zeros(2, 7)}, "reduction dim|shape"),
    ],
)
def test_unusable_inputs_are_refused(arguments, message):
    with pytest.raises(TraceError, match=message):
        trace(perceptron(), name="perceptron", **arguments)


# -- construction without allocation ----------------------------------------------------------------------------------


def test_modules_constructed_on_meta_keep_their_shapes_ties_and_flags():
    with meta_construction():
        model = Decoder()
        shared = nn.Parameter(torch.ones(3), requires_grad=False)
        pair = nn.ParameterList([shared, shared])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight is model.tokens.weight
    assert pair[0] is pair[1]
    assert not pair[0].requires_grad
    assert not next(nn.Linear(2, 2).parameters()).is_meta


def test_the_process_wide_form_ends_when_removed():
    handle = construct_on_meta()
    try:
        assert nn.Linear(2, 2).weight.is_meta
    finally:
        handle.remove()
    assert not nn.Linear(2, 2).weight.is_meta


@needs_transformers
def test_transformers_models_construct_on_meta_with_their_ties():
    with meta_construction():
        model = language_model("gpt2")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]


@needs_transformers
def test_llama_405b_traces_in_under_two_gigabytes():
    script = """
        import resource
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from headway.workload.trace import meta_construction, trace
        config = LlamaConfig(
            hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8,
            intermediate_size=53248, vocab_size=128256,
        )
        with meta_construction():
            model = LlamaForCausalLM(config)
        graph = trace(model, {"input_ids": torch.empty(1, 8192, dtype=torch.long, device="meta")}, name="llama")
        assert len(graph.layers) == 129
        print(graph.parameter_count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, peak_bytes = map(int, done.stdout.split())
    assert count == 405_853_388_800
    assert peak_bytes < 2e9
