"""From a traced graph to a problem: views folded into what they show, writes in place made visible.

Tensors are storages. An operation that writes in place makes a new version of its storage and may overwrite the old
one. What follows from parameters, buffers and inputs alone without a reading of activations is an operation like any
other; those tensors themselves are given. Results that nobody reads (gradients of parameters) have no bytes: their
place is counted with the model states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from headway.hardware.cluster import Accelerator
from headway.memory.swapping.problem import Encoding, Operation, Path, Problem, Tensor
from headway.predict.latency import Latency
from headway.predict.operators import operator_name
from headway.workload.graph import Graph, Operator

__all__ = ["graph_problem", "kind_of", "with_encodings"]

_KINDS = {
    "convolution": ("convolution", "conv2d"),
    "attention": ("scaled_dot_product", "_softmax"),
    "normalization": ("batch_norm", "layer_norm", "group_norm", "rms_norm"),
    "pool": ("pool",),
    "dropout": ("dropout", "bernoulli"),
    "activation": ("relu", "gelu", "silu", "tanh", "sigmoid", "hardtanh", "threshold", "elu"),
    "matmul": ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "_grouped_mm"),
}


def kind_of(name: str) -> str:
    """The kind of operation that an aten operator is: `"addmm"` → "matmul"."""
    for kind, words in _KINDS.items():
        if kind == "matmul":
            if name in words:
                return kind
        elif any(word in name for word in words):
            return kind
    return "other"


def graph_problem(
    graph: Graph,
    samples: int,
    accelerator: Accelerator,
    *,
    precision: str = "float32",
    paths: Iterable[Path] = (),
    streams: int = 3,
    latency: Latency | None = None,
    sparsity: float = 0.5,
) -> Problem:
    """One step of `graph` with `samples` samples as a problem; an operator takes what `predict.latency` says.

    `sparsity`: the share of zeros among the outputs of ReLU, for encodings that leave them out.
    """
    latency = latency or Latency(graph, accelerator)

    def seconds(operator: Operator) -> float:
        return latency.operator_seconds(operator, samples, precision=precision)

    builder = _Builder(graph, samples, seconds)
    problem = Problem(
        name=graph.name,
        operations=tuple(builder.operations),
        tensors=tuple(builder.tensors),
        paths=tuple(paths),
        streams=streams,  # type: ignore[arg-type]
    )
    return with_encodings(problem, accelerator.memory_bytes_per_second, sparsity=sparsity)


class _Builder:
    def __init__(self, graph: Graph, samples: int, seconds: Callable[[Operator], float]) -> None:
        self.graph = graph
        self.samples = samples
        self.operations: list[Operation] = []
        self.tensors: list[Tensor] = []
        self.version: dict[int, int] = {}  # identity in the graph → tensor
        self.made_by: dict[int, int] = {}
        self.given = self._tensor("given", 0.0, -1)
        for position, operator in enumerate(graph.operators):
            self._add(position, operator, seconds)
        read = {at for operation in self.operations for at in operation.inputs}
        for at, tensor in enumerate(self.tensors):
            # The gradients of parameters are counted with the model states.
            if tensor.maker >= 0 and at not in read and self.operations[tensor.maker].backward:
                self.tensors[at] = Tensor(name=tensor.name, bytes=0.0, maker=tensor.maker)

    def _tensor(self, name: str, size: float, maker: int) -> int:
        self.tensors.append(Tensor(name=name, bytes=size, maker=maker))
        return len(self.tensors) - 1

    def _add(self, position: int, operator: Operator, seconds: Callable[[Operator], float]) -> None:
        sources = [self.version.get(identity, self.given) for identity in operator.input_tensors]
        name = operator_name(operator)
        if operator.is_view and sources:
            for identity in operator.output_tensors:
                self.version[identity] = sources[0]
            return
        inplace = name.endswith("_") and not name.endswith("__") and bool(sources)
        at = len(self.operations)
        overwrites = -1
        outputs: list[int] = []
        if inplace:
            old = sources[0]
            if self.tensors[old].maker < 0:
                # Buffers and gradients of parameters: given, and written where they are.
                for identity in operator.output_tensors:
                    self.version[identity] = old
                return
            made = self._tensor(f"{operator.module}:{name}", self.tensors[old].bytes, at)
            outputs.append(made)
            overwrites = old
            for identity in operator.output_tensors:
                self.version[identity] = made
        else:
            plain = len(operator.outputs)
            for slot, (identity, kind) in enumerate(zip(operator.output_tensors, operator.outputs)):
                if slot >= plain:
                    break
                made = self._tensor(f"{operator.module}:{name}", float(kind.bytes(self.samples)), at)
                outputs.append(made)
                self.version[identity] = made
        self.operations.append(
            Operation(
                name=f"{operator.module}:{name}",
                seconds=seconds(operator),
                inputs=tuple(dict.fromkeys(source for source in sources if source != self.given)),
                outputs=tuple(outputs),
                backward=operator.backward,
                overwrites=overwrites,
                repeatable=not operator.backward,
                kind=kind_of(name),
                source=position,
            )
        )


def with_encodings(problem: Problem, memory_bytes_per_second: float, *, sparsity: float = 0.5) -> Problem:
    """The same problem, saved tensors that have a lossless encoding marked with it.

    Which applies follows from the readers in backward, as in Gist (Jain et al., ISCA 2018, section 4): the output of
    ReLU that only ReLU's own backward reads needs a sign; the positions of a max-pool need a byte each; its input, only
    its shape; the output of ReLU that others read, its non-zero elements. Encoding and decoding stream through memory.
    """
    stop = problem.forward_stop
    tensors = list(problem.tensors)
    names = [operation.name.rpartition(":")[2] for operation in problem.operations]
    for at in problem.saved:
        tensor = tensors[at]
        readers = {names[reader] for reader in problem.readers[at] if reader >= stop}
        maker = names[tensor.maker]
        relu = maker in ("relu", "relu_")
        pools = {"max_pool2d_with_indices_backward"}
        found: tuple[str, float] | None = None
        made = problem.operations[tensor.maker].outputs
        if maker == "max_pool2d_with_indices" and readers == pools and at != made[0]:
            found = ("window", 1 / 8)
        elif readers == pools:
            found = ("shape", 0.0)
        elif relu and readers <= {"threshold_backward"} | pools:
            found = ("sign", 1 / 32)
        elif relu and (1 - sparsity) + 1 / 32 < 1:
            found = ("sparse", (1 - sparsity) + 1 / 32)
        if found:
            seconds = tensor.bytes * (1 + found[1]) / memory_bytes_per_second if found[1] else 0.0
            encoding = Encoding(name=found[0], ratio=found[1], seconds=seconds)
            tensors[at] = Tensor(name=tensor.name, bytes=tensor.bytes, maker=tensor.maker, encoding=encoding)
    return Problem(
        name=problem.name,
        operations=problem.operations,
        tensors=tuple(tensors),
        paths=problem.paths,
        streams=problem.streams,
    )
