"""Memory beyond the device: ZeRO-Infinity's model (SC 2021, sections 3, 4), and what a plan's tiers hold and cost."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.hardware.catalog import preset
from headway.hardware.cluster import Accelerator
from headway.plan.plan import Plan, Stage
from headway.predict import tiers
from headway.predict.step import Predictor
from headway.predict.tiers import TierRates
from headway.workload.graph import Workload
from headway.workload.transformer import TransformerShape, transformer

GIB = 2**30


def workload_of(batch: int = 8, layers: int = 6, precision: str = "bfloat16") -> Workload:
    shape = TransformerShape(
        hidden=1024, heads=16, ffn=4096, layers=layers, vocabulary=32768, sequence=512, dropout=False,
        attention="flash",
    )  # fmt: skip
    return Workload(graph=transformer(shape, name="model"), global_batch=batch, precision=precision)


def plan_of(workload: Workload, cluster, data: int = 1, micro: int = 1, **fields) -> Plan:
    layers = len(workload.graph.layers)
    values = {
        "model": "model", "devices": tuple(device.name for device in cluster.devices[:data]), "data": data,
        "global_batch": workload.global_batch, "micro_batch": micro, "precision": workload.precision,
        "stages": (Stage(start=0, stop=layers, recompute=fields.pop("recompute", ())),),
    }  # fmt: skip
    return Plan(**{**values, **fields}).validate(workload.graph, cluster)


# -- section 3 and 4 of the paper ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "hidden", "trillions", "states_tb", "working_gb"),
    [(80, 10 * 1024, 0.10, 1.83, 1.56), (100, 20 * 1024, 0.50, 9.16, 6.25), (128, 25 * 1024, 1.01, 18.31, 9.77),
     (195, 64 * 1024, 10.05, 182.81, 64.00)],
)  # fmt: skip
def test_a_model_takes_what_figure_2a_of_zero_infinity_says(layers, hidden, trillions, states_tb, working_gb):
    assert tiers.parameters(layers, hidden) / 1e12 == pytest.approx(trillions, rel=0.01)
    assert tiers.state_bytes(layers, hidden) / 2**40 == pytest.approx(states_tb, rel=0.01)
    assert tiers.working_bytes(hidden) / GIB == pytest.approx(working_gb, rel=0.01)


def test_half_the_rate_is_reached_where_copies_take_as_long_as_compute():
    """Section 4.2: 70 GB/s give over 50 % for parameters at a batch of 1 and a peak of 70 TFLOP/s."""
    assert tiers.efficiency(tiers.parameter_intensity(1024, 1), 70e9, 70e12) == pytest.approx(0.5, abs=0.02)
    # Optimizer states ask for four times that, and 1.5 TB/s for 90 % at a batch of 2.
    assert tiers.optimizer_intensity(1024, 2) == tiers.parameter_intensity(1024, 2) / 4
    assert tiers.efficiency(tiers.optimizer_intensity(1024, 2), 1.5e12, 70e12) > 0.9
    # Activation checkpoints: 2 GB/s are enough at hidden 2048, less than 1 GB/s from 8192 on.
    assert tiers.efficiency(tiers.activation_intensity(2048), 2e9, 70e12) > 0.5
    assert tiers.efficiency(tiers.activation_intensity(8192), 1e9, 70e12) > 0.5


@given(st.floats(1, 1e6), st.floats(1e8, 1e13), st.floats(1e12, 1e16), st.floats(1.01, 10))
def test_efficiency_grows_with_intensity_and_bandwidth_alike(intensity, rate, peak, factor):
    here = tiers.efficiency(intensity, rate, peak)
    assert 0 < here < 1
    more = tiers.efficiency(intensity * factor, rate, peak)
    assert more == pytest.approx(tiers.efficiency(intensity, rate * factor, peak))
    assert more > here


def test_a_plan_without_overlap_is_as_efficient_as_equation_6_says():
    """Parameters that come twice in a step, for forward and for backward: 4 bytes, where the paper moves 8."""
    cluster, workload = preset("dgx-a100:1"), workload_of(batch=2)
    predictor = Predictor(workload, cluster)
    recompute = tuple(range(1, 7))
    plan = plan_of(
        workload, cluster, micro=2, parameters_on="host", optimizer_on="host", overlap=False, recompute=recompute
    )
    parts = predictor.parts(plan).stages[0]
    copies = parts.transfer.exposed_forward + parts.transfer.exposed_backward
    compute = parts.forward + parts.backward
    rate = predictor.stages.tiers.copy_rate("host", cluster.devices[0].name)
    # What the device reaches of its peak by itself, on the FLOP that the paper counts: 8 for each parameter and token.
    elements = sum(parameter.elements for parameter in workload.graph.parameters)
    flop = 8.0 * elements * 2 * 512
    expected = tiers.efficiency(2 * tiers.parameter_intensity(512, 2), rate, flop / compute)
    assert compute / (compute + copies) == pytest.approx(expected, rel=0.01)


# -- what rests where ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(("host", "disk", "remote")), st.sampled_from((0.0, 0.25, 0.5, 1.0)),
    st.sampled_from(("float32", "bfloat16", "int8")), st.sampled_from(("float32", "bfloat16")),
    st.sampled_from((1, 2, 4)),
)  # fmt: skip
def test_an_optimizer_elsewhere_takes_its_bytes_there_and_leaves_them_here(tier, kept, moments, precision, data):
    cluster, workload = preset("dgx-a100:2"), workload_of(precision=precision)
    predictor = Predictor(workload, cluster)
    stage = 1 if data > 1 else 0
    here = predictor.memory(plan_of(workload, cluster, data, zero_stage=stage))
    plan = plan_of(workload, cluster, data, zero_stage=stage, optimizer_on=tier, optimizer_kept=kept, moments=moments)
    away = predictor.memory(plan)
    elements = sum(parameter.elements for parameter in workload.graph.parameters)
    each = {"float32": 8.0, "bfloat16": 4.0, "int8": 2 + 8 / 256}[moments]
    wire = 2.0 if precision == "bfloat16" else 4.0
    states = (1 - kept) * elements * (4.0 + each)
    found = sum(memory.tiers.get(tier, 0.0) for memory in away)
    # Replicas under ZeRO-1 keep DDP's buckets on the device until backward is through.
    gradients = (1 - kept) * elements * wire if data == 1 else 0.0
    pool = 256 * 2**20
    if tier == "host":
        assert found == pytest.approx(states + gradients)
    else:
        assert found == pytest.approx(states)
        on_host = sum(memory.tiers.get("host", 0.0) for memory in away)
        assert gradients <= on_host * (1 + 1e-9) + 1
        assert on_host <= gradients + pool * data
    # On the device stays the part that is updated there, with a float32 copy where parameters have 16 bits.
    master = 4.0 if precision == "bfloat16" else 0.0
    assert sum(memory.optimizer_bytes for memory in away) == pytest.approx(kept * elements * (8.0 + master), rel=1e-6)
    assert all(memory.pinned_bytes <= pool for memory in away)
    assert all(memory.tiers == {} and memory.pinned_bytes == 0 for memory in here)
    if kept == 0:
        assert max(memory.total_bytes for memory in away) < max(memory.total_bytes for memory in here)


def test_a_layer_that_is_swapped_is_not_here_and_the_others_are():
    cluster, workload = preset("dgx-a100:1"), workload_of(batch=4)
    predictor = Predictor(workload, cluster)

    def memory(swap, on="host"):
        stage = Stage(start=0, stop=8, swap=swap)
        return predictor.memory(plan_of(workload, cluster, micro=4, stages=(stage,), activations_on=on))[0]

    none, all_of_them = memory((), "device"), memory(())
    one, three = memory((2,)), memory((2, 3, 4))
    away = [each.tiers["host"] for each in (one, three, all_of_them)]
    assert away[1] == pytest.approx(3 * away[0])
    assert away[2] > away[1]
    assert none.activations_bytes > three.activations_bytes > all_of_them.activations_bytes
    parts = [
        predictor.parts(
            plan_of(workload, cluster, micro=4, activations_on="host", stages=(Stage(start=0, stop=8, swap=swap),))
        ).stages[0].transfer.forward
        for swap in ((2,), (2, 3, 4))
    ]  # fmt: skip
    assert parts[1] == pytest.approx(3 * parts[0])


def test_rates_go_by_the_links_that_a_tier_lies_behind():
    cluster = preset("dgx-a100:2")
    rates = TierRates(cluster, disk_bytes_per_second=2e9)
    device = cluster.devices[0].name
    assert rates.available == ("host", "remote", "disk")
    assert TierRates(preset("dgx-a100:1")).available == ("host", "disk")
    assert rates.copy_rate("disk", device) == 2e9
    assert rates.copy_rate("remote", device) <= rates.copy_rate("host", device)
    one = Accelerator(
        name="cpu", flop_per_second={"float32": 1e12}, memory_bytes=4e9, memory_bytes_per_second=2e10,
        torch_device="cpu",
    )  # fmt: skip
    machine = msgspec.structs.replace(
        preset("dgx-a100:1").subset(1), accelerators={"cpu": one},
        devices=(msgspec.structs.replace(preset("dgx-a100:1").devices[0], accelerator="cpu"),),
    )  # fmt: skip
    there = TierRates(machine)
    assert there.capacity_bytes("host", machine.devices[0].name) == 4e9
    assert there.update_rate(machine.devices[0].name) == 2e10


# -- what that costs -------------------------------------------------------------------------------------------------


def test_the_more_stays_the_less_the_host_has_to_do_and_a_delay_hides_it():
    cluster, workload = preset("dgx-a100:1"), workload_of(batch=8)
    predictor = Predictor(workload, cluster)
    steps = [
        predictor.step_time(plan_of(workload, cluster, micro=8, optimizer_on="host", optimizer_kept=kept)).step_seconds
        for kept in (0.0, 0.25, 0.5, 0.75)
    ]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 1.05 * steps[-1]
    own = plan_of(workload, cluster, micro=8, optimizer_on="host")
    delayed = predictor.step_time(msgspec.structs.replace(own, delayed_update=True)).step_seconds
    assert delayed < steps[0]
    background = max(rank.background for rank in predictor.parts(
        msgspec.structs.replace(own, delayed_update=True)).ranks)  # fmt: skip
    assert delayed >= background
    disk = msgspec.structs.replace(own, optimizer_on="disk")
    assert predictor.step_time(disk).step_seconds > steps[0]
    small = predictor.step_time(msgspec.structs.replace(disk, moments="int8")).step_seconds
    assert small < predictor.step_time(disk).step_seconds
