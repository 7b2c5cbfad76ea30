"""DeepSpeed's own estimates of the memory of model states, for a table beside Headway's prediction.

The formulas of `estimate_zero2_model_states_mem_needs` (deepspeed/runtime/zero/stage_1_and_2.py) and
`estimate_zero3_model_states_mem_needs` (deepspeed/runtime/zero/stage3.py), as published with DeepSpeed's memory
documentation (deepspeed.readthedocs.io, "Memory Requirements"). They count parameters, gradients and Adam's states in
16-bit training; activations, buffers and what the allocator loses are left out, and host memory is given 1.5 times.
"""

from __future__ import annotations

from typing import Literal

from headway.value import Value

__all__ = ["StatesEstimate", "zero2_estimate", "zero3_estimate"]

Offload = Literal["none", "optimizer", "any"]

# Room that DeepSpeed's estimate adds to host memory.
_BUFFER_FACTOR = 1.5


class StatesEstimate(Value):
    """Bytes of model states: on each device, and in the memory of each node's host. `offload`: what rests there."""

    zero_stage: int
    offload: Offload
    device_bytes: float
    host_bytes: float


def zero2_estimate(
    elements: float, devices_per_node: int, nodes: int = 1, *, offload: Literal["none", "optimizer"] = "none",
    buffer_factor: float = _BUFFER_FACTOR,
) -> StatesEstimate:  # fmt: skip
    """ZeRO 2 of a model of so many parameters, evenly divided.

    Without offload 4 bytes for each parameter and 16 for each device's share; with the optimizer on the host 2 on the
    device, and there the larger of 4 for each device (while the model is made) and 16.
    """
    total = devices_per_node * nodes
    if offload == "optimizer":
        host = elements * max(4 * devices_per_node, 16) * buffer_factor
        return StatesEstimate(zero_stage=2, offload=offload, device_bytes=2 * elements, host_bytes=host)
    host = elements * 4 * devices_per_node * buffer_factor
    return StatesEstimate(
        zero_stage=2, offload=offload, device_bytes=4 * elements + 16 * elements / total, host_bytes=host
    )


def zero3_estimate(
    elements: float, largest_layer_elements: float, devices_per_node: int, nodes: int = 1, *,
    offload: Offload = "none", buffer_factor: float = _BUFFER_FACTOR, initialised_in_parts: bool = True,
) -> StatesEstimate:  # fmt: skip
    """ZeRO 3; the largest layer stands gathered with its gradients, 4 bytes for each of its parameters.

    `initialised_in_parts`: under `deepspeed.zero.Init`; otherwise each process makes the whole model on the host first.
    """
    total = devices_per_node * nodes
    largest = 4 * largest_layer_elements
    share = 1.0 / nodes
    if offload == "any":
        device, states = largest, 18 * elements * share
    elif offload == "optimizer":
        device, states = largest + 2 * elements / total, 16 * elements * share
    else:
        device, states = largest + 18 * elements / total, 0.0
    if initialised_in_parts:
        host = states if offload != "none" else largest_layer_elements * 4 * devices_per_node
    else:
        host = max(4 * elements * devices_per_node, states)
    return StatesEstimate(zero_stage=3, offload=offload, device_bytes=device, host_bytes=host * buffer_factor)
