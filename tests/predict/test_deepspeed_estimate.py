"""DeepSpeed's estimates, against the tables in DeepSpeed's own documentation ("Memory Requirements")."""

from __future__ import annotations

import pytest

from headway.hardware.catalog import ACCELERATORS
from headway.hardware.cluster import Cluster, Device
from headway.plan.plan import Plan, Stage
from headway.predict.deepspeed_estimate import zero2_estimate, zero3_estimate
from headway.predict.memory import Sizes
from headway.predict.residency import Residency
from headway.workload.graph import OptimizerKind, Recipe, Workload
from headway.workload.transformer import TransformerShape, transformer

GIB = 2**30


@pytest.mark.parametrize(("offload", "host", "device"), [("optimizer", 127.45, 5.31), ("none", 127.45, 15.93)])
def test_zero_2_of_t5_3b_on_eight_devices(offload, host, device):
    found = zero2_estimate(2851e6, 8, offload=offload)
    assert found.host_bytes / GIB == pytest.approx(host, abs=0.01)
    assert found.device_bytes / GIB == pytest.approx(device, abs=0.01)


@pytest.mark.parametrize(
    ("offload", "in_parts", "host", "device"),
    [("any", True, 71.69, 0.12), ("any", False, 127.45, 0.12), ("optimizer", True, 63.72, 0.78),
     ("optimizer", False, 127.45, 0.78), ("none", True, 1.43, 6.09), ("none", False, 127.45, 6.09)],
)  # fmt: skip
def test_zero_3_of_t5_3b_on_eight_devices(offload, in_parts, host, device):
    found = zero3_estimate(2851e6, 32e6, 8, offload=offload, initialised_in_parts=in_parts)
    assert found.host_bytes / GIB == pytest.approx(host, abs=0.01)
    assert found.device_bytes / GIB == pytest.approx(device, abs=0.01)


def test_nodes_share_the_states_and_not_the_making_of_the_model():
    one, four = (zero3_estimate(1e9, 1e7, 8, nodes, offload="any") for nodes in (1, 4))
    assert four.host_bytes == one.host_bytes / 4
    assert four.device_bytes == one.device_bytes


@pytest.mark.parametrize("stage", [2, 3])
def test_what_headway_predicts_of_the_states_lies_above_by_the_buffers_alone(stage):
    """DeepSpeed counts no buckets and no activations; of the states both say the same to a few percent."""
    shape = TransformerShape(hidden=2048, heads=16, layers=8, vocabulary=32768, sequence=256, attention="flash")
    graph = transformer(shape)
    recipe = Recipe(framework="megatron-deepspeed", parameter_bytes=2, gradient_bytes=2, master_bytes=4)
    cluster = Cluster(
        name="machines", accelerators={"A100-SXM-80GB": ACCELERATORS["A100-SXM-80GB"]},
        devices=tuple(Device(f"d{at}", "A100-SXM-80GB", "n") for at in range(8)),
    )  # fmt: skip
    workload = Workload(graph=graph, optimizer=OptimizerKind(), recipe=recipe, global_batch=8)
    plan = Plan(
        model="m", devices=tuple(device.name for device in cluster.devices), data=8, global_batch=8, micro_batch=1,
        stages=(Stage(start=0, stop=len(graph.layers)),), zero_stage=stage, precision="bfloat16",
    )  # fmt: skip
    memory = Residency(workload, cluster, Sizes(graph)).memory(plan)[0]
    sizes = Sizes(graph).parameters(0, len(graph.layers), Residency(workload, cluster, Sizes(graph)).shards_of(plan))
    elements = float(sizes.elements)
    states = memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes
    if stage == 2:
        # Gradients: whole in DeepSpeed's estimate, and divided as the stage says in the prediction.
        estimate = zero2_estimate(elements, 8).device_bytes - 2 * elements - 2 * elements / 8
        assert states == pytest.approx(estimate, rel=0.03)
    else:
        estimate = zero3_estimate(elements, 0.0, 8).device_bytes - 2 * elements / 8
        assert states == pytest.approx(estimate, rel=0.03)
    assert memory.tiers == {}
