"""How long an operator, a layer and an optimizer step take on one kind of device.

Without measurements an operator takes the longer of computing and of moving its data, plus the fixed cost of starting
it (the roofline model: Williams, Waterman, Patterson, CACM 2009). A `Profile` replaces that by what was measured.
Tensor parallelism enters through `Operator.sharded_inputs` and `sharded_outputs`: those dimensions are divided.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from headway.hardware.cluster import Accelerator
from headway.predict.operators import WHOLE, Shards, is_matrix_operator, operator_bytes
from headway.predict.profile import Profile
from headway.workload.graph import Graph, Layer, Operator

__all__ = ["Latency", "LayerTime"]


class LayerTime(NamedTuple):
    """Seconds of one micro-batch in one layer, communication excluded."""

    forward_seconds: float
    backward_seconds: float


class Latency:
    """Times of operators, layers and updates of one graph on one kind of device, memoised.

    `contention` and `memory_contention` (at least 1) slow computing and streaming down: what the probe saw when every
    device of the machine worked at once. A profile was measured under that load; `crowded` false takes it off again.
    """

    def __init__(
        self,
        graph: Graph,
        accelerator: Accelerator,
        profile: Profile | None = None,
        contention: float = 1.0,
        memory_contention: float = 1.0,
        crowded: bool = True,
    ) -> None:
        self.graph = graph
        self.accelerator = accelerator
        self.profile = profile if profile is not None and profile.is_of(accelerator) else None
        self.contention = max(1.0, contention)
        self.memory_contention = max(1.0, memory_contention)
        # A profile was measured among as many processes as there are devices: one rank alone is faster than that.
        self._share = 1.0 if crowded or self.profile is None else self.profile.quiet_share
        self._layers: dict[tuple, LayerTime] = {}
        self._calibrations: dict[tuple, float] = {}

    def roofline_seconds(
        self, operator: Operator, samples: int, shards: Shards = WHOLE, precision: str = "float32"
    ) -> float:
        """The roofline of an operator, contention included; a view costs its dispatch alone."""
        kind = self.accelerator
        if operator.is_view:
            return kind.launch_seconds if kind.torch_device == "cpu" else 0.0
        degree = shards.of(operator)
        compute = 0.0
        flop = operator.flop.at(samples)
        if flop:
            low = precision != "float32" and is_matrix_operator(operator)
            dtype = precision if low else (operator.inputs[0].dtype if operator.inputs else "float32")
            compute = flop / (degree if operator.is_sharded else 1) / (kind.flop_rate(dtype) * kind.efficiency)
        moved = operator_bytes(operator, samples, degree, precision)
        transfer = moved / (kind.memory_bytes_per_second * kind.memory_efficiency)
        return max(compute * self.contention, transfer * self.memory_contention) + kind.launch_seconds

    def operator_seconds(
        self, operator: Operator, samples: int, shards: Shards = WHOLE, precision: str = "float32"
    ) -> float:
        """Seconds of one operator: measured where the profile knows it, the (calibrated) roofline elsewhere."""
        roofline = self.roofline_seconds(operator, samples, shards, precision)
        if self.profile is None:
            return roofline
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

    def layer_time(self, position: int, samples: int, shards: Shards = WHOLE, precision: str = "float32") -> LayerTime:
        """Forward and backward seconds of the layer at `position`; layers of equal signature are computed once."""
        layer = self.graph.layers[position]
        # Two layers of equal signature are alike only if their blocks are split alike.
        split = tuple(sorted(self._chosen(layer, shards)))
        key = (layer.signature or position, samples, shards.degree if split else 1, len(split), precision)
        found = self._layers.get(key)
        if found is None:
            found = self._layers[key] = LayerTime(
                forward_seconds=self._sum(layer.forward, samples, shards, precision),
                backward_seconds=self._sum(layer.backward, samples, shards, precision),
            )
        return found

    def _chosen(self, layer: Layer, shards: Shards) -> set[int]:
        if not shards.blocks:
            return set()
        operators = self.graph.operators
        return {operators[at].block for at in (*layer.forward, *layer.backward)} & shards.blocks

    def _sum(self, positions: Collection[int], samples: int, shards: Shards, precision: str) -> float:
        operators = self.graph.operators
        return math.fsum(self.operator_seconds(operators[at], samples, shards, precision) for at in positions)

    def update_seconds(self, elements: float, tensors: int, traffic_bytes_per_element: float) -> float:
        """Seconds of one optimizer step over `elements` in `tensors` parameter tensors."""
        kind = self.accelerator
        if self.profile is not None and self.profile.optimizer_element_seconds > 0:
            profile = self.profile
            seconds = elements * profile.optimizer_element_seconds + tensors * profile.optimizer_tensor_seconds
            return seconds * self._share
        streaming = elements * traffic_bytes_per_element / (kind.memory_bytes_per_second * kind.memory_efficiency)
        # On a CPU torch updates one tensor after the other, about a dozen operators each; on a GPU the foreach
        # implementation starts about as many kernels for all of them.
        starts = 12 * (tensors if kind.torch_device == "cpu" else 1 + tensors // 64)
        return streaming * self.memory_contention + starts * kind.launch_seconds

    def streaming_seconds(self, size_bytes: float) -> float:
        """Seconds to read or write so many bytes of the device's memory."""
        rate = self.accelerator.memory_bytes_per_second * self.accelerator.memory_efficiency
        return size_bytes * self.memory_contention / rate
