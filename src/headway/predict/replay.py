"""Replaying a traced graph with real tensors, operator by operator, to time each where it stands."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch

from headway.predict.operators import (
    WHOLE,
    Shards,
    is_matrix_operator,
    needs_full_precision,
    operator_key,
    operator_name,
    sharded_shape,
)
from headway.predict.replay_attention import on_gpu
from headway.workload.graph import Graph, Operator

__all__ = ["Replay", "replayed_positions"]

_CACHE_BYTES = 128 * 2**20  # more than the last-level cache of one rank
# Operators started while a GPU is held back: with their events and casts fewer than what its queue takes.
_AHEAD = 128
_CYCLES_PER_SECOND = 2e9  # about the fastest clock of any GPU, so that it is held back long enough


def replayed_positions(graph: Graph) -> list[int]:
    """Positions of the operators that are replayed, in order of execution: of up to three layers of each kind."""
    seen: Counter[str] = Counter()
    chosen: set[int] = set()
    for at, layer in enumerate(graph.layers):
        kind = layer.signature or str(at)
        seen[kind] += 1
        if seen[kind] <= 3:
            chosen.update(layer.forward)
            chosen.update(layer.backward)
    return sorted(chosen)


class Replay:
    """Runs some layers of a graph, operator by operator, with real tensors flowing along its edges."""

    def __init__(self, graph: Graph, samples: int, degree: int, precision: str, torch_device: str) -> None:
        self.graph = graph
        self.samples = samples
        self.precision = precision
        self.device = torch.device(torch_device)
        self.shards = Shards(degree, frozenset(range(len(graph.blocks)))) if degree > 1 else WHOLE
        self.positions = replayed_positions(graph)
        self.keys = {
            at: operator_key(graph.operators[at], degree if graph.operators[at].is_sharded else 1, precision)
            for at in self.positions
        }
        self.parameters = {parameter.tensor for parameter in graph.parameters if parameter.tensor >= 0}
        self.given: dict[int, torch.Tensor] = {}  # tensors that no replayed operator makes
        self.refused: set[int] = set()
        self.roots: dict[int, int] = {}  # a view's tensor → the tensor that it looks into
        self.gradients: set[int] = set()  # what backward makes
        for at in self.positions:
            operator = graph.operators[at]
            if operator.is_view and operator.input_tensors:
                root = self.roots.get(operator.input_tensors[0], operator.input_tensors[0])
                self.roots.update(dict.fromkeys(operator.output_tensors, root))
            elif operator.backward:
                self.gradients.update(operator.output_tensors)
        self.gradients |= self._gradients_given(graph)
        self.host_seconds = 100e-6  # of one operator; the first pass shows it
        self.lowered: set[int] = set()  # of which this pass has made a low-precision copy that others read too
        self.last_use: dict[int, int] = {}
        for at in self.positions:
            for tensor in graph.operators[at].input_tensors:
                self.last_use[tensor] = at
        # What nobody reads (gradients of parameters) stays until the pass ends, as it stays until the update.
        self.flush = torch.empty(0 if torch_device != "cpu" else _CACHE_BYTES // 4)

    def _gradients_given(self, graph: Graph) -> set[int]:
        """Gradients that come from layers that are not replayed."""
        forward = {
            tensor for operator in graph.operators if not operator.backward for tensor in operator.output_tensors
        }
        read = {
            self.roots.get(tensor, tensor)
            for at in self.positions if graph.operators[at].backward
            for tensor in graph.operators[at].input_tensors
        }  # fmt: skip
        return read - forward - self.parameters

    def run(self) -> dict[str, float]:
        """One pass: key of each operator that could be replayed, and its mean time in seconds."""
        live: dict[int, torch.Tensor] = {}
        total: dict[str, float] = defaultdict(float)
        count: Counter[str] = Counter()
        pending: list[tuple[str, Any, Any]] = []
        self.lowered.clear()
        began = time.perf_counter()
        with torch.no_grad(), torch.device(self.device):
            # The update comes between two steps, and leaves nothing of the last one in the caches.
            self.flush.fill_(0.0)
            for number, at in enumerate(self.positions):
                if number % _AHEAD == 0:
                    self._hold_back(min(_AHEAD, len(self.positions) - number))
                operator = self.graph.operators[at]
                inputs = [self._input(operator, index, live) for index in range(len(operator.inputs))]
                seconds = self._execute(at, operator, inputs, live, pending)
                if seconds is not None and not operator.is_view:
                    total[self.keys[at]] += seconds
                    count[self.keys[at]] += 1
                for tensor in (*operator.input_tensors, *operator.output_tensors):
                    if self.last_use.get(tensor) == at:
                        live.pop(tensor, None)
        self.host_seconds = (time.perf_counter() - began) / len(self.positions)
        if pending:
            torch.cuda.synchronize()
            for key, start, stop in pending:
                total[key] += start.elapsed_time(stop) / 1e3
                count[key] += 1
        return {key: total[key] / count[key] for key in total}

    def _hold_back(self, operators: int) -> None:
        """Keep a GPU busy while the host starts the next `operators`: what is timed must not wait for the host."""
        if self.device.type == "cuda":
            torch.cuda._sleep(int(_CYCLES_PER_SECOND * 1.5 * self.host_seconds * operators))

    def _input(self, operator: Operator, index: int, live: dict[int, torch.Tensor]) -> torch.Tensor:
        identity = operator.input_tensors[index] if index < len(operator.input_tensors) else -1
        found = live.get(identity)
        if found is not None:
            return found
        key = identity if identity >= 0 else -1 - index
        found = self.given.get(key)
        dims = operator.sharded_inputs if self.shards.of(operator) > 1 else ()
        dim = dims[index] if dims else -1
        shape = sharded_shape(operator.inputs[index], self.samples, dim, self.shards.degree)
        if found is None or tuple(found.shape) != shape:
            made = _random(operator, index, shape, self.samples, identity in self.parameters).to(self.device)
            # Tensors of one number are one tensor; what has no number is made once for each shape.
            found = self.given[key] = made
        return found

    def _execute(
        self, at: int, operator: Operator, inputs: list[torch.Tensor], live: dict[int, torch.Tensor],
        pending: list[tuple[str, Any, Any]],
    ) -> float | None:  # fmt: skip
        if at in self.refused:
            return None
        try:
            function = _function(operator.target)
            swap = self._swap(operator)
            given = self._lowering(operator, inputs, function)

            def arguments() -> tuple[list[Any], dict[str, Any]]:
                return _call(function, operator, given(), self.samples, swap)

            if self.device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                call = on_gpu(operator.target, function, arguments)
                begin.record()
                result = call()
                end.record()
                if not operator.is_view:
                    pending.append((self.keys[at], begin, end))
                seconds = None
            else:
                start = time.perf_counter()
                tensors = given()
                cast = time.perf_counter() - start
                positional, keywords = _call(function, operator, tensors, self.samples, swap)
                start = time.perf_counter()
                result = function(*positional, **keywords)
                seconds = cast + time.perf_counter() - start
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
            # Not every call can be made again (a size that sharding changes, a layout that the trace does not keep).
            # Its roofline stands in, `Profile.unreplayed` names it, and what it should make is made up on demand.
            self.refused.add(at)
            return None
        results = result if isinstance(result, tuple | list) else [result]
        made = [item for item in results if isinstance(item, torch.Tensor)]
        for identity, tensor in zip(operator.output_tensors, made):
            live[identity] = tensor
        return seconds

    def _swap(self, operator: Operator) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Whole shapes to sharded ones, for operators that are told the shape of their result."""
        degree = self.shards.of(operator)
        if degree == 1:
            return {}
        pairs = zip((*operator.inputs, *operator.outputs), (*operator.sharded_inputs, *operator.sharded_outputs))
        return {
            kind.shape(self.samples): sharded_shape(kind, self.samples, dim, degree) for kind, dim in pairs if dim >= 0
        }

    def _lowering(
        self, operator: Operator, inputs: list[torch.Tensor], function: Any
    ) -> Callable[[], list[torch.Tensor]]:
        """The inputs as autocast would hand them over; the casts that a real step makes at this place are left to the
        call, so that they are timed, and all others are made now.

        Forward, matrix operators read low-precision copies: of a parameter one for the whole pass, of anything else one
        for each reader. Backward runs without autocast: saved tensors are what forward made of them, and a gradient is
        cast once, where it goes from one precision to the other.
        """
        if self.precision == "float32" or operator.is_view:
            return lambda: inputs
        wanted = self._dtype_of(operator)
        # The statistics that attention keeps for its backward pass stay in float32.
        names = [argument.name for argument in function._schema.arguments]
        statistics_at = names.index("logsumexp") if "logsumexp" in names else -1
        kept = -1
        if 0 <= statistics_at < len(operator.arguments) and isinstance(operator.arguments[statistics_at], dict):
            kept = operator.arguments[statistics_at].get("tensor", -1)
        ready = list(inputs)
        timed: list[int] = []
        for at, tensor in enumerate(inputs):
            if at == kept or not tensor.is_floating_point() or tensor.dtype == wanted:
                continue
            identity = operator.input_tensors[at] if at < len(operator.input_tensors) else -1
            root = self.roots.get(identity, identity)
            if wanted is None:
                # A bias's gradient is summed from the copy that the matrix operators read.
                if operator_name(operator) == "sum" and root in self.lowered:
                    ready[at] = tensor.to(torch.bfloat16)
                continue
            is_gradient = root in self.gradients
            is_made = root in self.lowered or (operator.backward and not is_gradient)
            if wanted == torch.bfloat16 and is_made:
                ready[at] = tensor.to(wanted)
            else:
                timed.append(at)
            if wanted == torch.bfloat16 and (operator.backward or root in self.parameters):
                self.lowered.add(root)
        if not timed:
            return lambda: ready

        def cast() -> list[torch.Tensor]:
            for at in timed:
                ready[at] = ready[at].to(wanted)
            return ready

        return cast

    def _dtype_of(self, operator: Operator) -> torch.dtype | None:
        """What an operator computes in below float32; None: in whatever comes."""
        if is_matrix_operator(operator):
            return torch.bfloat16
        if needs_full_precision(operator) and not (operator.backward and operator_name(operator) == "sum"):
            return torch.float32
        return None


def _random(operator: Operator, index: int, shape: tuple[int, ...], samples: int, is_parameter: bool) -> torch.Tensor:
    dtype = getattr(torch, operator.inputs[index].dtype)
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.randn(shape) * 0.02 if is_parameter else torch.rand(shape) + 0.5
        return made.to(dtype)
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    # Indices: zero is always valid; where the range is known, values spread over it as real ones do.
    return torch.randint(_index_range(operator, index, samples), shape, dtype=dtype)


def _index_range(operator: Operator, index: int, samples: int) -> int:
    name = operator_name(operator)
    if name == "embedding" and index == 1:
        return operator.inputs[0].shape(samples)[0]
    if name == "embedding_dense_backward" and index == 1:
        rows = operator.arguments[2]
        return rows if isinstance(rows, int) else 1
    if name.startswith("nll_loss"):
        target = 2 if name.endswith("backward") else 1
        classes = operator.inputs[target - 1].shape(samples)
        return classes[1] if index == target and len(classes) > 1 else 1
    return 1


def _function(target: str) -> Any:
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part)
    return found


def _call(
    function: Any, operator: Operator, inputs: list[torch.Tensor], samples: int,
    swap: dict[tuple[int, ...], tuple[int, ...]],
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    """`Operator.arguments` and `keywords` as torch takes them."""
    schema = function._schema.arguments
    types = {argument.name: str(argument.type) for argument in schema}
    device = next((tensor.device for tensor in inputs), torch.device("cpu"))

    def decode(value: Any, kind: str) -> Any:
        if isinstance(value, dict):
            if "tensor" in value:
                return inputs[value["tensor"]]
            if "dtype" in value:
                return getattr(torch, value["dtype"])
            return value["fixed"] + value["per_sample"] * samples
        if isinstance(value, list | tuple):
            items = [decode(item, kind) for item in value]
            if swap and all(isinstance(item, int) for item in items):
                return list(swap.get(tuple(items), items))
            return items
        if isinstance(value, str) and "str" not in kind:
            if "Device" in kind or value.split(":")[0] in ("cpu", "cuda", "meta"):
                return device
            return float(value) if value in ("inf", "-inf", "nan") else getattr(torch, value)
        return value

    names = [argument.name for argument in schema]
    arguments = [decode(value, types[names[at]]) for at, value in enumerate(operator.arguments)]
    return arguments, {name: decode(value, types.get(name, "")) for name, value in operator.keywords.items()}
