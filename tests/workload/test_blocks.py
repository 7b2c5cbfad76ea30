"""Which Linears can be split together, and, by replaying operators on parts of real tensors, that they really can.

Megatron-LM (arXiv:1909.08053), section 3, says which ones: query, key, value with the output projection, and the two
(or three) matrices of the feed-forward layer.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from headway.workload import zoo
from headway.workload.blocks import find_blocks
from headway.workload.graph import Graph, Operator
from headway.workload.sharding import Sharding, through_view
from headway.workload.trace import trace

SEQUENCE = 16
GPT = {"layers": 2, "width": 32, "heads": 4, "vocabulary": 61, "context": SEQUENCE}
LLAMA = {"layers": 2, "width": 32, "heads": 8, "kv_heads": 4, "hidden": 48, "vocabulary": 61}


def zoo_graph(name: str, **overrides) -> Graph:
    with torch.device("meta"):
        model = zoo.build(name, **overrides)
    inputs, targets = zoo.sample_inputs(name, 2, SEQUENCE, **overrides)
    return find_blocks(trace(model, (inputs,), name=name, loss=zoo.loss(name), target=targets))


def module_graph(model: nn.Module, *shape: int) -> Graph:
    return find_blocks(trace(model.to("meta"), (torch.empty(2, *shape, device="meta"),), name="test"))


def transformers_graph(build) -> Graph:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = build(transformers)
    tokens = torch.empty(2, SEQUENCE, dtype=torch.int64, device="meta")
    return find_blocks(trace(model, {"input_ids": tokens}, name="transformers"))


def found(graph: Graph) -> set[tuple[tuple[str, ...], tuple[str, ...], int]]:
    return {(block.columns, block.rows, block.divisor) for block in graph.blocks}


# -- replaying ---------------------------------------------------------------------------------------------------------

_SIZED = {"view", "_unsafe_view", "reshape", "expand", "slice_backward", "select_backward"}


def decode(value: Any, tensors: list[torch.Tensor], samples: int) -> Any:
    if isinstance(value, list):
        return [decode(item, tensors, samples) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "dtype" in value:
            return getattr(torch, value["dtype"])
        return value["fixed"] + value["per_sample"] * samples
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if value == "cpu":
        return torch.device(value)
    named = getattr(torch, value, None) if isinstance(value, str) else None
    return named if isinstance(named, torch.layout | torch.memory_format) else value


def run(operator: Operator, tensors: list[torch.Tensor], samples: int, sizes=None) -> list[torch.Tensor]:
    """The operator on these tensors; `sizes` replaces an argument that spells the shape of the output."""
    space, packet, overload = operator.target.split(".")
    shape = list(operator.outputs[0].shape(samples)) if operator.outputs else []
    arguments = []
    for argument in operator.arguments:
        value = decode(argument, tensors, samples)
        spells = packet in _SIZED and isinstance(value, list) and len(value) == len(shape)
        spells = spells and all(size in (-1, known) for size, known in zip(value, shape, strict=True))
        arguments.append(list(sizes) if sizes is not None and spells else value)
    keywords = {name: decode(value, tensors, samples) for name, value in operator.keywords.items()}
    result = getattr(getattr(getattr(torch.ops, space), packet), overload)(*arguments, **keywords)
    results = result if isinstance(result, tuple | list) else (result,)
    return [item for item in results if isinstance(item, torch.Tensor)]


def part(tensor: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    return tensor.clone() if dim < 0 else tensor.chunk(ranks, dim)[rank].clone()


def check_by_replay(graph: Graph, ranks: int, samples: int = 2) -> int:
    """Run the training step on real tensors; before each operator of a block, run it on every rank's part and compare.

    Returns how many operators were compared. Every tensor that is marked divided must come out as the parts of what the
    whole operator computes, and every product summed over a divided dimension as terms that add up to it.
    """
    torch.manual_seed(0)
    values: dict[int, torch.Tensor] = {}
    compared = 0
    for operator in graph.operators:
        for identity, kind in zip(operator.input_tensors, operator.inputs, strict=True):
            if identity not in values:  # a parameter, an input, a target, a buffer
                shape, dtype = kind.shape(samples), getattr(torch, kind.dtype)
                drawn = torch.randn(shape) * 0.3 if dtype.is_floating_point else torch.randint(0, SEQUENCE, shape)
                values[identity] = drawn.to(dtype)
        inputs = [values[identity] for identity in operator.input_tensors]
        before = [tensor.clone() for tensor in inputs]
        outputs = run(operator, inputs, samples)
        values.update(zip(operator.output_tensors, outputs, strict=False))
        if operator.block < 0 or "empty" in operator.target:  # there is nothing in it to compare
            continue
        compared += 1
        parts: list[list[torch.Tensor]] = []
        for rank in range(ranks):
            mine = [part(x, dim, rank, ranks) for x, dim in zip(before, operator.sharded_inputs, strict=True)]
            if operator.target == "aten.addmm.default" and operator.sharded_inputs[0] < 0 and rank > 0:
                mine[0].zero_()  # a bias that is not divided is added once
            first = operator.sharded_outputs[0]
            sizes = [n // ranks if d == first else n for d, n in enumerate(operator.outputs[0].shape(samples))]
            parts.append(run(operator, mine, samples, sizes))
        for place, (whole, dim) in enumerate(zip(outputs, operator.sharded_outputs)):
            pieces = [results[place] for results in parts]
            joined = torch.cat(pieces, dim) if dim >= 0 else torch.stack(pieces).sum(0)
            message = f"{operator.target} in {operator.module}, backward={operator.backward}"
            torch.testing.assert_close(joined, whole, rtol=1e-3, atol=1e-4, msg=lambda text, m=message: f"{m}: {text}")
    return compared


def check_parameters(graph: Graph) -> None:
    """Every divided parameter has a gradient that is divided alike."""
    for index, block in enumerate(graph.blocks):
        for name, dim in block.parameters.items():
            shape = graph.parameter_by_name[name].shape
            assert any(
                operator.backward and operator.block == index and operator.outputs[place].shape(1) == shape
                for operator in graph.operators
                for place, divided in enumerate(operator.sharded_outputs)
                if divided == dim
            ), name


# -- what is found -----------------------------------------------------------------------------------------------------


def attention(prefix: str, names=("query", "key", "value", "output"), units: int = 4):
    return tuple(f"{prefix}.{name}" for name in names[:3]), (f"{prefix}.{names[3]}",), units


def test_gpt_splits_by_heads_and_by_features():
    graph = zoo_graph("gpt2", **GPT)
    expected = set()
    for layer in range(2):
        block = f"blocks.{layer}"
        expected.add(attention(f"{block}.attention"))
        expected.add(((f"{block}.feed_forward.expand",), (f"{block}.feed_forward.contract",), 128))
    assert found(graph) == expected
    first = graph.blocks[0]
    assert first.parameters == {
        "blocks.0.attention.query.weight": 0, "blocks.0.attention.query.bias": 0,
        "blocks.0.attention.key.weight": 0, "blocks.0.attention.key.bias": 0,
        "blocks.0.attention.value.weight": 0, "blocks.0.attention.value.bias": 0,
        "blocks.0.attention.output.weight": 1,
    }  # fmt: skip
    assert first.input.shape(3) == first.output.shape(3) == (3, SEQUENCE, 32)
    assert graph.layers[first.layer].name == "blocks.0"


def test_grouped_query_attention_splits_by_key_value_heads():
    graph = zoo_graph("llama3.1-8b", **LLAMA)
    gated = (("blocks.0.feed_forward.gate", "blocks.0.feed_forward.up"), ("blocks.0.feed_forward.down",), 48)
    assert {attention("blocks.0.attention"), gated} <= found(graph)
    assert len(graph.blocks) == 4


def test_every_expert_of_mixtral_is_a_block_and_its_router_is_none():
    graph = zoo_graph("mixtral-8x7b", **{**LLAMA, "layers": 1}, experts=4)
    assert len(graph.blocks) == 1 + 4
    assert not any("router" in name for block in graph.blocks for name in (*block.columns, *block.rows))


def test_bert_splits_and_its_pooler_does_not():
    graph = zoo_graph("bert-base", **GPT)
    assert len(graph.blocks) == 4
    assert not any("pooler" in name for block in graph.blocks for name in block.columns)


def test_a_convolutional_network_has_no_blocks():
    with torch.device("meta"):
        model = zoo.build("resnet18", width=8, classes=10)
    images = torch.empty(2, 3, 64, 64, device="meta")
    assert find_blocks(trace(model, (images,), name="resnet")).blocks == ()


def llama(transformers, implementation: str) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, attn_implementation=implementation,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_llama_of_transformers_splits_like_ours(implementation):
    graph = transformers_graph(lambda transformers: llama(transformers, implementation))
    prefix = "model.layers.1"
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    gated = ((f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"), (f"{prefix}.mlp.down_proj",), 48)
    assert {attention(f"{prefix}.self_attn", names), gated} <= found(graph)
    assert len(graph.blocks) == 4


def test_gpt2_of_transformers_has_no_blocks():
    # Its modules are Conv1D, whose weights stand the other way round, and query, key and value are one after another.
    graph = transformers_graph(
        lambda transformers: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=1, n_embd=32, n_head=4, vocab_size=61, n_positions=16, bos_token_id=0, eos_token_id=0
            )
        )
    )
    assert graph.blocks == ()


def neox(transformers):
    config = transformers.GPTNeoXConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        bos_token_id=0, eos_token_id=0, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


def test_query_key_value_fused_head_by_head_split_and_parallel_branches_are_two_blocks():
    # GPT-NeoX lays the one matrix out as (heads, 3, head width), and feeds attention and MLP side by side.
    graph = transformers_graph(neox)
    layer = "gpt_neox.layers.0"
    assert found(graph) == {
        ((f"{layer}.attention.query_key_value",), (f"{layer}.attention.dense",), 4),
        ((f"{layer}.mlp.dense_h_to_4h",), (f"{layer}.mlp.dense_4h_to_h",), 64),
    }


class MLP(nn.Module):
    """Two Linears with something in between."""

    def __init__(self, between, width: int = 8, hidden: int = 12, **options) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, **options)
        self.down = nn.Linear(hidden, width, **options)
        self.between = between

    def forward(self, x):
        return x + self.down(self.between(self.up(x)))


class Scaled(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return x * self.scale


class Stack(nn.Module):
    """Blocks one after another, so that each is a layer."""

    def __init__(self, make, count: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


SPLITTABLE = {
    "activation": lambda: nn.GELU(),
    "activation in place": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.1),
    "softmax along the tokens": lambda: nn.Softmax(dim=1),
    "reshaped and back": lambda: Call(lambda x: x.view(*x.shape[:2], 4, 3).tanh().flatten(2)),
    "heads merged into the batch and back": lambda: Call(
        lambda x: x.view(-1, 5, 4, 3).transpose(1, 2).flatten(0, 1).exp().view(-1, 4, 5, 3).transpose(1, 2).flatten(2)
    ),
    "halves of each group": lambda: Call(lambda x: torch.cat(x.view(-1, 5, 4, 3).split([1, 2], -1), -1).flatten(2)),
    "mean over the tokens": lambda: Call(lambda x: x - x.mean(1, keepdim=True)),
    "a constant for each token": lambda: Call(lambda x: x * torch.arange(5.0, device=x.device)[:, None]),
}
UNSPLITTABLE = {
    "normalization": lambda: nn.LayerNorm(12),
    "softmax along the features": lambda: nn.Softmax(dim=-1),
    "a learned factor for each feature": lambda: Scaled(12),
    "a learned factor for all": lambda: Scaled(1),  # its gradient would be a sum over the ranks
    "a constant for each feature": lambda: Call(lambda x: x * torch.arange(12.0, device=x.device)),
    "halves of the features": lambda: Call(lambda x: torch.cat(x.chunk(2, -1)[::-1], -1)),
    "features mixed with tokens": lambda: Call(lambda x: x.transpose(1, 2).reshape(x.shape)),
    "sorted": lambda: Call(lambda x: x.sort(-1).values),
    "mean over the features": lambda: Call(lambda x: x - x.mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("name", SPLITTABLE)
def test_operators_that_keep_the_parts_apart_allow_a_split(name):
    graph = module_graph(Stack(lambda: MLP(SPLITTABLE[name]())), 5, 8)
    units = 4 if name in _BY_GROUP else 12
    assert found(graph) == {((f"blocks.{i}.up",), (f"blocks.{i}.down",), units) for i in range(2)}
    assert all(layer.saved_sharded.per_sample <= layer.saved.per_sample for layer in graph.layers)


_BY_GROUP = {"reshaped and back", "heads merged into the batch and back", "halves of each group"}


@pytest.mark.parametrize("name", UNSPLITTABLE)
def test_operators_that_mix_the_parts_forbid_a_split(name):
    assert module_graph(Stack(lambda: MLP(UNSPLITTABLE[name]())), 5, 8).blocks == ()


def test_without_biases_and_with_frozen_weights_a_block_splits_too():
    assert len(module_graph(Stack(lambda: MLP(nn.GELU(), bias=False)), 5, 8).blocks) == 2
    frozen = Stack(lambda: MLP(nn.GELU()))
    frozen.blocks[1].requires_grad_(False)
    assert len(module_graph(frozen, 5, 8).blocks) == 2


def test_a_weight_with_a_second_reader_is_left_alone():
    with torch.device("meta"):  # moving it there would untie the weights
        model = Stack(lambda: MLP(nn.GELU()))
    model.blocks[1].up.weight = model.blocks[0].up.weight
    assert module_graph(model, 5, 8).blocks == ()


def test_a_divided_tensor_that_leaves_its_layer_or_the_model_forbids_a_split():
    chain = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    graph = module_graph(chain, 8)
    assert len(graph.layers) == 3  # a pipeline may cut between any two of the three
    assert graph.blocks == ()

    class Returning(MLP):
        def __init__(self, returns_inner: bool) -> None:
            super().__init__(None)
            self.first = nn.Linear(8, 8)
            self.returns_inner = returns_inner

        def forward(self, x):
            x = self.first(x)  # crosses the two Linears, so that they are in one layer
            inner = self.up(x)
            y = x + self.down(inner)
            return (y, inner) if self.returns_inner else y

    assert found(module_graph(Returning(False), 5, 8)) == {(("up",), ("down",), 12)}
    assert module_graph(Returning(True), 5, 8).blocks == ()


def test_linears_with_different_inputs_are_not_one_block():
    class Crossing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return x + self.down(self.first(x) * self.second(x.tanh()))

    assert module_graph(Stack(Crossing), 5, 8).blocks == ()


# -- that it is true ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "ranks"),
    [
        ("gpt2", GPT, 4),
        ("llama3.1-8b", LLAMA, 4),
        ("bert-base", GPT, 2),
        ("mixtral-8x7b", {**LLAMA, "layers": 1, "experts": 4}, 2),
    ],
)
def test_every_marked_operator_computes_its_part_from_its_parts(name, overrides, ranks):
    graph = zoo_graph(name, **overrides)
    assert check_by_replay(graph, ranks) > 50
    check_parameters(graph)
    for operator in graph.operators:
        if operator.block >= 0 and any(dim >= 0 for dim in operator.sharded_outputs):
            assert operator.layer == graph.blocks[operator.block].layer


@pytest.mark.parametrize(
    ("build", "samples"), [(neox, 2), (lambda transformers: llama(transformers, "eager"), 1)]
)  # 1: heads merge into a batch of one
def test_every_marked_operator_of_models_that_nobody_here_wrote(build, samples):
    graph = transformers_graph(build)
    assert check_by_replay(graph, 2, samples) > 50
    check_parameters(graph)


@pytest.mark.parametrize("name", sorted(set(SPLITTABLE) - {"dropout", "heads merged into the batch and back"}))
def test_every_marked_operator_of_small_blocks(name):
    graph = module_graph(Stack(lambda: MLP(SPLITTABLE[name]()), 1), 5, 8)
    assert check_by_replay(graph, 2) > 10
    check_parameters(graph)


def test_saved_activations_are_counted_as_divided_where_they_are():
    graph = zoo_graph("gpt2", **GPT)
    tokens, width, heads = SEQUENCE, 32, 4
    # query, key, value, attention's output and its log-sum-exp; the two sides of the GELU.
    divided = 4 * (4 * tokens * width + heads * tokens + 2 * tokens * 4 * width)
    layer = graph.layers[1]
    assert layer.saved_sharded.per_sample == divided
    assert 0 < layer.saved_sharded.per_sample < layer.saved.per_sample
    assert graph.layers[0].saved_sharded.per_sample == 0


@st.composite
def views(draw):
    """A shape, and another of as many elements, made by cutting a product of primes at other places."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=6))

    def cut() -> tuple[int, ...]:
        shape = [1]
        for factor in factors:
            if draw(st.booleans()):
                shape.append(1)
            shape[-1] *= factor
        return tuple(shape)

    return cut(), cut()


@given(views(), st.data())
@settings(max_examples=300, deadline=None)
def test_a_view_of_the_parts_is_the_parts_of_the_view(shapes, data):
    source, target = shapes
    dim = data.draw(st.integers(0, len(source) - 1))
    before = data.draw(st.sampled_from([n for n in range(1, source[dim] + 1) if source[dim] % n == 0]))
    sharding = Sharding(dim, before)
    moved = through_view(sharding, source, target)
    assume(moved is not None)
    assert moved is not None
    whole = torch.arange(math.prod(source)).view(source)

    def cut(tensor: torch.Tensor, by: Sharding, ranks: int) -> list[torch.Tensor]:
        shape = tensor.shape
        open_ = tensor.reshape(*shape[: by.dim], by.before, by.units(tuple(shape)), *shape[by.dim + 1 :])
        return [piece.flatten(by.dim, by.dim + 1) for piece in open_.chunk(ranks, by.dim + 1)]

    for ranks in range(1, 13):
        if sharding.units(source) % ranks == 0 and moved.units(target) % ranks == 0:
            for mine, theirs in zip(cut(whole, sharding, ranks), cut(whole.view(target), moved, ranks), strict=True):
                assert torch.equal(mine.reshape(theirs.shape), theirs)


def test_a_view_that_cuts_across_the_parts_is_refused():
    assert through_view(Sharding(2), (2, 5, 12), (2, 60)) == Sharding(1, before=5)
    assert through_view(Sharding(2), (2, 5, 12), (2, 5, 4, 3)) == Sharding(2)
    assert through_view(Sharding(1), (10, 12), (120,)) == Sharding(0, before=10)
    assert through_view(Sharding(2), (2, 5, 12), (5, 2, 12)) == Sharding(2)
    assert through_view(Sharding(1), (3, 4), (6, 2)) == Sharding(0, before=3)
    assert through_view(Sharding(0), (4, 3), (3, 4)) is None
