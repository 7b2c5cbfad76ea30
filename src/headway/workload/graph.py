"""What a model computes: operators with shapes, FLOP and bytes, grouped in layers that a pipeline may cut between.

Every size is *affine in the number of samples*: `fixed + per_sample * samples`. The tracer runs the model at two batch
sizes and solves for both, so that one traced graph answers for any micro-batch.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from headway.value import Value

__all__ = [
    "Affine",
    "Attention",
    "Experts",
    "Graph",
    "Layer",
    "Operator",
    "OptimizerKind",
    "Parameter",
    "Recipe",
    "TensorBlock",
    "TensorKind",
    "Unit",
    "Workload",
    "dtype_bytes",
]

_DTYPE_BYTES = {
    "float64": 8, "int64": 8, "complex64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1, "bool": 1, "complex128": 16,
}  # fmt: skip


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element: `"float32"` → 4."""
    return _DTYPE_BYTES[dtype]


class Affine(Value):
    """`fixed + per_sample * samples`."""

    fixed: float = 0.0
    per_sample: float = 0.0

    def at(self, samples: float) -> float:
        return self.fixed + self.per_sample * samples

    def __add__(self, other: Affine) -> Affine:
        return Affine(fixed=self.fixed + other.fixed, per_sample=self.per_sample + other.per_sample)


class TensorKind(Value):
    """Shape and dtype of a tensor; dimension i is `fixed[i] + per_sample[i] * samples`."""

    fixed: tuple[int, ...]
    per_sample: tuple[int, ...]
    dtype: str

    def shape(self, samples: int) -> tuple[int, ...]:
        return tuple(fixed + slope * samples for fixed, slope in zip(self.fixed, self.per_sample, strict=True))

    def elements(self, samples: int) -> int:
        product = 1
        for size in self.shape(samples):
            product *= size
        return product

    def bytes(self, samples: int) -> int:
        return self.elements(samples) * dtype_bytes(self.dtype)


class Operator(Value):
    """One aten operator, forward or backward, at the place where it ran.

    `arguments` is the call as JSON, so that it can be replayed and timed: numbers, strings, lists and null stand for
    themselves, `{"tensor": i}` for `inputs[i]`, `{"fixed": a, "per_sample": b}` for an integer that grows with the
    batch, `{"dtype": "float32"}` for a dtype; keywords are under `keywords`.

    `flop` follows torch.utils.flop_counter (2 per multiply-add; zero for what it does not count). `is_view` marks
    operators that move no data. `block` is the position in `Graph.blocks` of the tensor-parallel block that this
    operator belongs to, or -1; within it, `sharded_inputs` and `sharded_outputs` give for each tensor the dimension
    that is divided among the tensor-parallel ranks, or -1 for a tensor that each rank holds whole.
    """

    target: str  # "aten.addmm.default"
    module: str  # path of the innermost module that called it
    layer: int
    backward: bool
    inputs: tuple[TensorKind, ...]
    outputs: tuple[TensorKind, ...]
    input_tensors: tuple[int, ...] = ()  # identities: equal numbers are the same tensor, so these are the graph's edges
    output_tensors: tuple[int, ...] = ()
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    flop: Affine = Affine()
    is_view: bool = False
    reads_parameters: tuple[str, ...] = ()
    block: int = -1
    sharded_inputs: tuple[int, ...] = ()
    sharded_outputs: tuple[int, ...] = ()

    @property
    def is_sharded(self) -> bool:
        """Whether tensor parallelism divides the work of this operator."""
        return any(dim >= 0 for dim in (*self.sharded_inputs, *self.sharded_outputs))


class Parameter(Value):
    """One parameter tensor. `aliases` are further names under which the very same tensor is reached (tied weights)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int
    tensor: int = -1  # its identity among the operators' input_tensors
    trainable: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def bytes(self) -> int:
        return self.elements * dtype_bytes(self.dtype)


class Unit(Value):
    """A module that the tracer treats as one step of the model's forward pass, in order of execution.

    Layers are made of units. `produces` is what its call returns: the tensors in the order of torch's pytree, and
    `structure`, the pytree's specification as JSON (torch.utils._pytree.treespec_dumps), by which a pipeline stage
    that does not hold this unit stands in for it. `depends_on_parameters` is false for units whose outputs follow from
    the model's inputs alone (masks, rotary tables): those are kept on every stage.
    """

    module: str
    layer: int
    produces: tuple[TensorKind, ...]
    structure: str
    depends_on_parameters: bool = True


class Attention(Value):
    """The attention core of a layer, as far as plans need to know it; bytes and FLOP grow with the samples.

    `core_saved`: what selective recomputation does not keep (scores and their softmax; nothing under FlashAttention,
    where it is part of no saved tensor). `core_flop`: forward FLOP of scores and of their product with the values, the
    work that selective recomputation repeats. `keys_values`: bytes of keys and values in the layer's dtype: what ring
    attention passes round a context group, once forward and twice backward.
    """

    core_saved: Affine = Affine()
    core_flop: Affine = Affine()
    keys_values: Affine = Affine()


class Experts(Value):
    """The experts of a layer: a mixture in which a router sends each token to `chosen` of `count` experts.

    `parameters`: names of the tensors that hold the experts' weights; expert parallelism divides them. `dispatched`:
    bytes of the tokens that are sent to experts, `chosen` copies of each, in one direction: each of the two all-to-all
    of a forward pass, and each of the two of a backward pass, moves them.
    """

    count: int
    chosen: int
    parameters: tuple[str, ...] = ()
    dispatched: Affine = Affine()


class Layer(Value):
    """Consecutive operators between two places where a pipeline can be cut: exactly one tensor crosses each cut.

    `entry_module` is the unit whose call begins the layer (empty for the first layer, which begins with the model's
    inputs), and `entry_argument` says which of its tensor arguments, flattened by pytree over (args, kwargs), is the
    tensor that crosses the cut. `saved` counts the bytes of activations kept for the backward pass, each storage once,
    parameters and the layer's own input excluded; `input` is the crossing tensor (None for the first layer).
    `peak_extra` is the most memory that temporaries of this layer take at once above what it saves, in bytes.
    `signature` is equal for layers that compute the same thing at the same shapes (the blocks of a transformer).
    `attention` and `experts` say what is known of those parts; None where there is none, or it was not recognised.
    """

    name: str
    entry_module: str
    entry_argument: int
    forward: tuple[int, ...]  # positions in Graph.operators
    backward: tuple[int, ...]
    parameters: tuple[str, ...]  # names of the parameters that it reads
    forward_flop: Affine
    backward_flop: Affine
    saved: Affine
    saved_sharded: Affine  # the part of `saved` that tensor parallelism divides
    output: TensorKind
    input: TensorKind | None = None
    forward_peak_extra: Affine = Affine()
    backward_peak_extra: Affine = Affine()
    signature: str = ""
    attention: Attention | None = None
    experts: Experts | None = None


class TensorBlock(Value):
    """Linear modules that tensor parallelism splits together (Megatron-LM, arXiv:1909.08053, section 3).

    The weights of `columns` are split by output features and those of `rows` by input features; every operator in
    between was proven, on the traced graph, to work on the split tensors without communication. One all-reduce of
    `output` follows in the forward pass, and one of `input` in the backward pass. `divisor`: the number of
    tensor-parallel ranks must divide it (heads, or features).
    """

    layer: int
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    divisor: int
    input: TensorKind
    output: TensorKind
    parameters: dict[str, int]  # parameter name → dimension that is split (column biases included, row biases not)


class Graph(Value):
    """A traced model: operators in order of execution (forward, then backward), layers, parameters."""

    name: str
    operators: tuple[Operator, ...]
    layers: tuple[Layer, ...]
    parameters: tuple[Parameter, ...]
    units: tuple[Unit, ...]
    inputs: tuple[TensorKind, ...]  # of the model, flattened
    input_tensors: tuple[int, ...] = ()
    output_tensors: tuple[int, ...] = ()  # what the model returns, flattened
    blocks: tuple[TensorBlock, ...] = ()
    buffer_bytes: int = 0
    tokens_per_sample: int = 0  # 0: the input is not a sequence of tokens
    loss_saved: Affine = Affine()  # activations that the loss keeps for backward
    notes: tuple[str, ...] = ()  # what the user should know, e.g. BatchNorm couples the samples of a micro-batch

    @cached_property
    def parameter_by_name(self) -> dict[str, Parameter]:
        found: dict[str, Parameter] = {}
        for parameter in self.parameters:
            for name in (parameter.name, *parameter.aliases):
                found[name] = parameter
        return found

    @property
    def parameter_count(self) -> int:
        return sum(parameter.elements for parameter in self.parameters)

    @property
    def parameter_bytes(self) -> int:
        return sum(parameter.bytes for parameter in self.parameters)

    @property
    def forward_flop(self) -> Affine:
        return _total(layer.forward_flop for layer in self.layers)

    @property
    def backward_flop(self) -> Affine:
        return _total(layer.backward_flop for layer in self.layers)

    @property
    def saved(self) -> Affine:
        return _total(layer.saved for layer in self.layers)

    def layer_parameters(self, start: int, stop: int) -> dict[str, Parameter]:
        """Parameters that layers `start` to `stop` (exclusive) read, each once, by its canonical name."""
        found: dict[str, Parameter] = {}
        for layer in self.layers[start:stop]:
            for name in layer.parameters:
                parameter = self.parameter_by_name[name]
                found[parameter.name] = parameter
        return found


def _total(terms) -> Affine:
    total = Affine()
    for term in terms:
        total = total + term
    return total


class OptimizerKind(Value):
    """What the optimizer keeps and does for each parameter.

    `state_bytes_per_element`: 8 for AdamW in float32, 4 for SGD with momentum, 0 for plain SGD.
    `traffic_bytes_per_element`: memory read and written by one update (28 for AdamW).
    `temporary_bytes_per_element`: what one step allocates besides (torch's foreach implementations make copies).
    """

    name: str = "AdamW"
    state_bytes_per_element: float = 8.0
    traffic_bytes_per_element: float = 28.0
    temporary_bytes_per_element: float = 4.0


class Recipe(Value):
    """What the program that trains does with numbers and kernels, where that changes time or memory.

    The default is Headway's own runtime: autocast over float32 parameters, PyTorch's kernels. Others are needed to
    predict what was trained by other frameworks, and what a plan exported to them will do.
    `parameter_bytes`, `gradient_bytes`: of one element as kept on the device between micro-batches; `master_bytes`: of
    the higher-precision copy of one parameter element that the optimizer keeps beside its states (0: none).
    """

    framework: Literal["headway", "megatron", "megatron-deepspeed", "fsdp", "torchtitan"] = "headway"
    parameter_bytes: float = 4.0
    gradient_bytes: float = 4.0
    master_bytes: float = 0.0
    attention: Literal["flash", "unfused"] = "flash"
    compiled: bool = False  # fused elementwise operators (torch.compile, or a framework's own fused kernels)


class Workload(Value):
    """A training job as planned: the traced model, its optimizer and how many samples make a step."""

    graph: Graph
    optimizer: OptimizerKind = OptimizerKind()
    global_batch: int = 1
    precision: str = "float32"  # "float32", or "bfloat16": autocast, with parameters and optimizer in float32
    recipe: Recipe = Recipe()
