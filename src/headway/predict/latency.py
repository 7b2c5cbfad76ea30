"""How long an operator, a layer and an optimizer step take on one kind of device.

Without measurements an operator takes the longer of computing and of moving its data, plus the fixed cost of starting
it (the roofline model: Williams, Waterman, Patterson, CACM 2009). A `Profile` replaces that by what was measured; for
GPUs of the catalogue an `Efficiency` says how much of the roofline kernels reach at the shapes at hand.
Tensor parallelism enters through `Operator.sharded_inputs` and `sharded_outputs`: those dimensions are divided.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

from headway.hardware.cluster import Accelerator
from headway.predict.efficiency import TILE_ELEMENTS, UNALIGNED_LINEAR, Efficiency
from headway.predict.measured import MeasuredTimes
from headway.predict.operators import (
    WHOLE,
    Shards,
    elements_of,
    is_matrix_operator,
    operator_bytes,
    operator_name,
    tensor_bytes,
)
from headway.predict.profile import Profile
from headway.workload.graph import Graph, Layer, Operator, Recipe

__all__ = ["Latency", "LayerTime", "flop_rate"]

# Where a device has no units for a dtype, its products run in the next one.
_WIDER = {"float4": "float8", "float8": "bfloat16", "bfloat16": "float16", "float16": "bfloat16"}
# What runs in 8 or 4 bits: products with weights. Attention stays in 16 bits.
_LINEAR = frozenset({"mm", "addmm", "linear", "matmul", "_grouped_mm"})
_BATCHED = frozenset({"bmm", "baddbmm"})


class LayerTime(NamedTuple):
    """Seconds of one micro-batch in one layer, communication excluded.

    `weight_seconds`: the part of backward that makes the parameters' gradients. `attention_seconds`: forward of the
    attention core (scores, softmax, product with the values). `host_*`: what the host needs to start it all.
    `expert_*`: the parts of forward and backward that expert parallelism divides.
    """

    forward_seconds: float
    backward_seconds: float
    weight_seconds: float = 0.0
    attention_seconds: float = 0.0
    host_forward_seconds: float = 0.0
    host_backward_seconds: float = 0.0


def flop_rate(accelerator: Accelerator, dtype: str) -> float:
    """Peak FLOP per second of matrix products in `dtype`, or in the next wider one that the device has units for."""
    tried: set[str] = set()
    while dtype not in accelerator.flop_per_second and dtype in _WIDER and dtype not in tried:
        tried.add(dtype)
        dtype = _WIDER[dtype]
    return accelerator.flop_rate(dtype)


class Latency:
    """Times of operators, layers and updates of one graph on one kind of device, memoised.

    `contention` and `memory_contention` (at least 1) slow computing and streaming down: what the probe saw when every
    device of the machine worked at once. A profile was measured under that load; `crowded` false takes it off again.
    `efficiency`: the constants of a GPU of the catalogue; None takes the accelerator's own figures as they are.
    `measured`: times that go before all of that, where it knows the operator.
    """

    def __init__(
        self,
        graph: Graph,
        accelerator: Accelerator,
        profile: Profile | None = None,
        contention: float = 1.0,
        memory_contention: float = 1.0,
        crowded: bool = True,
        *,
        efficiency: Efficiency | None = None,
        recipe: Recipe | None = None,
        measured: MeasuredTimes | None = None,
    ) -> None:
        self.graph = graph
        self.accelerator = accelerator
        self.profile = profile if profile is not None and profile.is_of(accelerator) else None
        self.efficiency = efficiency if self.profile is None else None
        self.recipe = recipe or Recipe()
        self.measured = measured
        self.contention = max(1.0, contention)
        self.memory_contention = max(1.0, memory_contention)
        share = accelerator.memory_efficiency if self.efficiency is None else self.efficiency.memory
        self.memory_rate = accelerator.memory_bytes_per_second * share
        # A profile was measured among as many processes as there are devices: one rank alone is faster than that.
        self._share = 1.0 if crowded or self.profile is None else self.profile.quiet_share
        self._layers: dict[tuple, LayerTime] = {}
        self._classes: dict[frozenset[int], list[tuple[str | int, int]]] = {}
        self._calibrations: dict[tuple, float] = {}
        self._groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self._splits: dict[Shards, frozenset[int]] = {}
        self._consumers: dict[int, set[int]] = {}

    # --------------------------------------------------------------------------------------------------- operators

    def roofline_seconds(
        self, operator: Operator, samples: float, shards: Shards = WHOLE, precision: str = "float32"
    ) -> float:
        """The roofline of an operator, contention included; a view costs its dispatch alone."""
        kind = self.accelerator
        if operator.is_view:
            return kind.launch_seconds if kind.torch_device == "cpu" else 0.0
        degree = shards.of(operator)
        moved = operator_bytes(operator, samples, degree, precision)
        if self._is_by_tokens(operator, shards):
            moved /= shards.degree
        transfer = moved / self.memory_rate
        flop = operator.flop.at(samples) / (degree if operator.is_sharded else 1)
        compute = casting = 0.0
        if flop:
            compute, casting = self._computing(operator, flop, samples, degree, precision)
        return (
            max(compute * self.contention, transfer * self.memory_contention)
            + casting * self.memory_contention
            + kind.launch_seconds
        )

    def _is_by_tokens(self, operator: Operator, shards: Shards) -> bool:
        """Whether sequence parallelism divides this operator: one that streams, in a layer whose blocks are split."""
        return (
            shards.sequence
            and operator.block not in shards.blocks
            and not operator.flop.per_sample
            and operator.layer in self._split_layers(shards)
        )

    def _split_layers(self, shards: Shards) -> frozenset[int]:
        found = self._splits.get(shards)
        if found is None:
            blocks = (self.graph.blocks[position] for position in shards.blocks)
            found = self._splits[shards] = frozenset(block.layer for block in blocks)
        return found

    def _computing(
        self, operator: Operator, flop: float, samples: float, degree: int, precision: str
    ) -> tuple[float, float]:
        """Seconds of arithmetic, and of casting its operands to fewer than 16 bits."""
        kind, efficiency = self.accelerator, self.efficiency
        low = precision != "float32" and is_matrix_operator(operator)
        dtype = precision if low else (operator.inputs[0].dtype if operator.inputs else "float32")
        share, casting = 1.0, 0.0
        if dtype in ("float8", "float4"):
            # The head stays in 16 bits, as all frameworks have it.
            if operator_name(operator) not in _LINEAR or operator.layer == len(self.graph.layers) - 1:
                dtype = "bfloat16"
            elif flop_rate(kind, dtype) > flop_rate(kind, "bfloat16"):
                share = efficiency.low_precision if efficiency is not None else 1.0
                # Activations and their gradients are read in 16 bits and written in 8; parameters once in a step.
                casting = self._operand_elements(operator, samples, degree) * 3 / self.memory_rate
        rate = flop_rate(kind, dtype) * kind.efficiency * share
        if efficiency is None or not low:
            return flop / rate, casting
        return flop / (rate * self._shape_share(operator, flop, samples, degree)), casting

    def _operand_elements(self, operator: Operator, samples: float, degree: int) -> float:
        dims = operator.sharded_inputs or (-1,) * len(operator.inputs)
        return sum(elements_of(kind, samples) / (degree if dim >= 0 else 1) for kind, dim in zip(operator.inputs, dims))

    def _shape_share(self, operator: Operator, flop: float, samples: float, degree: int) -> float:
        """What a kernel of this shape reaches of the rate of large products."""
        efficiency = self.efficiency
        assert efficiency is not None
        name = operator_name(operator)
        if "scaled_dot_product" in name:
            query, key = operator.inputs[0], operator.inputs[1]
            share = efficiency.attention_backward if "backward" in name else efficiency.attention
            if self.recipe.framework == "megatron":
                share *= efficiency.attention_vendor
            tokens = key.fixed[-2] if len(key.fixed) > 1 else query.fixed[-1]
            return share * tokens / (tokens + efficiency.attention_tokens)
        if name not in _LINEAR and name not in _BATCHED:
            return 1.0
        made = elements_of(operator.outputs[0], samples)
        if operator.sharded_outputs and operator.sharded_outputs[0] >= 0:
            made /= degree
        # 2 FLOP for each element of the result and each step along the inner dimension.
        depth = flop / (2 * made)
        waves = made / TILE_ELEMENTS / efficiency.processors
        # On average the last wave of tiles is half full.
        share = depth / (depth + efficiency.depth) * waves / (waves + 0.5)
        if depth % 8 or operator.outputs[0].fixed[-1] % 8:
            share *= efficiency.unaligned if name in _BATCHED else UNALIGNED_LINEAR
        return share

    def operator_seconds(
        self, operator: Operator, samples: float, shards: Shards = WHOLE, precision: str = "float32"
    ) -> float:
        """Seconds of one operator: measured where that is known, the (calibrated) roofline elsewhere."""
        if self.measured is not None and not operator.is_view:
            known = self.measured.operator_seconds(operator, samples, shards.of(operator), precision)
            if known is not None:
                return known / shards.degree if self._is_by_tokens(operator, shards) else known
        roofline = self.roofline_seconds(operator, samples, shards, precision)
        if self.profile is None or samples != int(samples):
            return roofline
        samples = int(samples)
        # What was not measured split is taken to be as far from its roofline as it is whole; what was not measured at
        # all, as far as everything else.
        whole = self.profile.measured_seconds(operator, samples, 1, precision)
        if whole is None:
            calibrated = roofline * self._calibration(samples, precision)
        else:
            calibrated = whole * roofline / self.roofline_seconds(operator, samples, WHOLE, precision)
        seconds = self.profile.operator_seconds(operator, samples, shards.of(operator), precision, calibrated)
        return seconds * self._share

    def _calibration(self, samples: int, precision: str) -> float:
        """Measured over roofline, summed over what was measured: it corrects the roofline of what was not."""
        key = (samples, precision)
        found = self._calibrations.get(key)
        if found is None:
            assert self.profile is not None
            measured = expected = 0.0
            for operator in self.graph.operators:
                seconds = None if operator.is_view else self.profile.measured_seconds(operator, samples, 1, precision)
                if seconds is not None:
                    measured += seconds
                    expected += self.roofline_seconds(operator, samples, WHOLE, precision)
            found = self._calibrations[key] = measured / expected if expected else 1.0
        return found

    # ------------------------------------------------------------------------------------------------------ layers

    def layer_time(
        self, position: int, samples: float, shards: Shards = WHOLE, precision: str = "float32"
    ) -> LayerTime:
        """Times of the layer at `position`; layers of equal signature are computed once."""
        alike = self._classes_of(shards)[position]
        split = alike[1]
        key = (*alike, samples, shards.degree if split else 1, shards.sequence, precision)
        found = self._layers.get(key)
        if found is None:
            found = self._layers[key] = self._time(self.graph.layers[position], samples, shards, precision)
        return found

    def layer_times(
        self, samples: float, shards: Shards = WHOLE, precision: str = "float32"
    ) -> Iterator[tuple[float, ...]]:
        """Field by field of `LayerTime`, the times of all layers."""
        classes = self._classes_of(shards)
        first = {alike: position for position, alike in reversed(list(enumerate(classes)))}
        times = {alike: self.layer_time(at, samples, shards, precision) for alike, at in first.items()}
        return zip(*(times[alike] for alike in classes), strict=True)

    def _classes_of(self, shards: Shards) -> list[tuple[str | int, int]]:
        """For each layer its signature, and how many of its blocks are split: layers with both alike are alike."""
        found = self._classes.get(shards.blocks)
        if found is None:
            # Two layers of equal signature are alike only if their blocks are split alike.
            found = self._classes[shards.blocks] = [
                (layer.signature or at, len(self._chosen(layer, shards))) for at, layer in enumerate(self.graph.layers)
            ]
        return found

    def _time(self, layer: Layer, samples: float, shards: Shards, precision: str) -> LayerTime:
        forward, attention, host = self._sum(layer.forward, samples, shards, precision)
        backward, _, host_backward = self._sum(layer.backward, samples, shards, precision)
        operators = self.graph.operators
        weights = math.fsum(
            self.operator_seconds(operators[at], samples, shards, precision)
            for at in layer.backward
            if operators[at].flop.per_sample and not any(any(kind.per_sample) for kind in operators[at].outputs)
        )
        return LayerTime(forward, backward, min(weights, backward), attention, host, host_backward)

    def _chosen(self, layer: Layer, shards: Shards) -> set[int]:
        if not shards.blocks:
            return set()
        operators = self.graph.operators
        return {operators[at].block for at in (*layer.forward, *layer.backward)} & shards.blocks

    def _sum(
        self, positions: Collection[int], samples: float, shards: Shards, precision: str
    ) -> tuple[float, float, float]:
        """Seconds of one pass, of the attention core within it, and of the host."""
        operators = self.graph.operators
        seconds: list[float] = []
        core: list[float] = []
        started = views = 0
        for group in self._fused(tuple(positions)):
            first = operators[group[0]]
            if len(group) == 1:
                taken = self.operator_seconds(first, samples, shards, precision)
            else:
                taken = self._fused_seconds(group, samples, shards, precision)
            seconds.append(taken)
            if is_attention_core(first):
                core.append(taken)
            is_kernel = len(group) > 1 or not first.is_view
            started += is_kernel
            views += not is_kernel
        host = started * self.efficiency.host_seconds if self.efficiency is not None else 0.0
        if self.profile is not None and positions:
            is_backward = operators[next(iter(positions))].backward
            profile = self.profile
            host = started * (profile.host_backward_seconds if is_backward else profile.host_forward_seconds)
            if profile.torch_device != "cpu":
                # A view starts nothing on the device, but the host makes it all the same. On a CPU its time is above.
                host += views * profile.view_seconds
        return math.fsum(seconds), math.fsum(core), host

    def _fused(self, positions: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The kernels of a pass: one operator each, but neighbours that stream where the recipe fuses them."""
        if not self.recipe.compiled or self.efficiency is None:
            return [(at,) for at in positions]
        found = self._groups.get(positions)
        if found is None:
            found = self._groups[positions] = list(self._group(positions))
        return found

    def _group(self, positions: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        held: list[int] = []
        for at in positions:
            operator = self.graph.operators[at]
            if operator.is_view:
                continue
            if operator.flop.at(1) or is_matrix_operator(operator):
                if held:
                    yield tuple(held)
                held = []
                yield (at,)
            else:
                held.append(at)
        if held:
            yield tuple(held)

    def _fused_seconds(self, group: tuple[int, ...], samples: float, shards: Shards, precision: str) -> float:
        """One kernel reads what comes from outside of it once, and writes what is used outside of it."""
        operators = self.graph.operators
        low = precision != "float32"
        inside = set(group)
        made: dict[int, float] = {}
        read: dict[int, float] = {}
        moved = 0.0
        for at in group:
            operator = operators[at]
            degree = shards.of(operator)
            part = shards.degree if self._is_by_tokens(operator, shards) else 1
            if not operator.output_tensors:
                moved += operator_bytes(operator, samples, degree, precision) / part
                continue
            in_dims = operator.sharded_inputs or (-1,) * len(operator.inputs)
            out_dims = operator.sharded_outputs or (-1,) * len(operator.outputs)
            for name, kind, dim in zip(operator.input_tensors, operator.inputs, in_dims):
                if name not in made:
                    read[name] = tensor_bytes(operator, kind, dim, samples, degree, low) / part
            for name, kind, dim in zip(operator.output_tensors, operator.outputs, out_dims):
                if not self._readers(name) <= inside or not self._readers(name):
                    moved += tensor_bytes(operator, kind, dim, samples, degree, low) / part
                made[name] = 0.0
        moved += sum(read.values())
        return moved / self.memory_rate * self.memory_contention + self.accelerator.launch_seconds

    def _readers(self, tensor: int) -> set[int]:
        if not self._consumers:
            for at, operator in enumerate(self.graph.operators):
                for name in operator.input_tensors:
                    self._consumers.setdefault(name, set()).add(at)
        return self._consumers.get(tensor, set())

    # ------------------------------------------------------------------------------------------------------ memory

    def update_seconds(self, elements: float, tensors: int, traffic_bytes_per_element: float) -> float:
        """Seconds of one optimizer step over `elements` in `tensors` parameter tensors."""
        kind = self.accelerator
        if self.profile is not None and self.profile.optimizer_element_seconds > 0:
            profile = self.profile
            seconds = elements * profile.optimizer_element_seconds + tensors * profile.optimizer_tensor_seconds
            return seconds * self._share
        streaming = elements * traffic_bytes_per_element / self.memory_rate
        # On a CPU torch updates one tensor after the other, about a dozen operators each; on a GPU the foreach
        # implementation starts about as many kernels for all of them.
        starts = 12 * (tensors if kind.torch_device == "cpu" else 1 + tensors // 64)
        return streaming * self.memory_contention + starts * kind.launch_seconds

    def streaming_seconds(self, size_bytes: float) -> float:
        """Seconds to read or write so many bytes of the device's memory."""
        return size_bytes * self.memory_contention / self.memory_rate


def is_attention_core(operator: Operator) -> bool:
    """Whether an operator works on attention scores: fused attention, or products of activations and their softmax."""
    name = operator_name(operator)
    return "scaled_dot_product" in name or "softmax" in name or (name in _BATCHED and not operator.reads_parameters)
