"""Three ways of timing behind one interface, and no device's times taken for another's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import InputError
from headway.hardware.catalog import find_accelerator, preset
from headway.predict.communication import Communication, all_reduce_seconds
from headway.predict.database import Measurement
from headway.predict.learned import Learned
from headway.predict.timing import Catalogued, Curve, Interpolated, Linear, axis_place, for_cluster, time_operator

V100 = "V100-SXM2-16GB"
PLACE = {"mesh": (1, 8), "group_size": 8}

curve_points = st.lists(
    st.tuples(st.integers(1, 2**30), st.floats(1e-6, 10.0)), min_size=2, max_size=12, unique_by=lambda point: point[0]
)


def collective(size, seconds, **changes) -> Measurement:
    fields = {
        "device": V100, "operation": "all_reduce", "dtype": "float32", "nodes": 1, "devices_per_node": 8,
        "group_size": 8, "size": float(size), "unit": "bytes", "seconds": seconds,
    }  # fmt: skip
    return Measurement(**fields | changes)


def product(flop, seconds, dtype="float32", device=V100) -> Measurement:
    return Measurement(device=device, operation="dot", dtype=dtype, size=flop, unit="flop", seconds=seconds, flop=flop)


def line(rate=1e10, start=1e-5, **changes) -> list[Measurement]:
    return [collective(2**k, start + 2**k / rate, **changes) for k in range(4, 31)]


@given(curve_points, st.floats(1, 2**31))
def test_interpolation_goes_through_the_points_and_stays_between_its_neighbours(points, size):
    way = Interpolated([collective(*point) for point in points])
    points = sorted(points)
    for at, seconds in points:
        assert way.collective("all_reduce", at, **PLACE).seconds == pytest.approx(seconds)
    found = way.collective("all_reduce", size, **PLACE)
    assert 0 < found.low_seconds <= found.seconds <= found.high_seconds
    below = [point for point in points if point[0] <= size]
    above = [point for point in points if point[0] >= size]
    if below and above:
        between = (below[-1][1], above[0][1])
        assert min(between) * (1 - 1e-9) <= found.seconds <= max(between) * (1 + 1e-9)
    elif below:
        assert found.seconds == pytest.approx(points[-1][1] * size / points[-1][0])
        assert "beyond" in found.how
    else:
        assert found.seconds == points[0][1]


def test_a_power_law_is_interpolated_exactly():
    sizes = np.array([1.0, 16.0, 4096.0])
    curve = Curve(sizes, 3e-6 * sizes**0.7)
    for size in (2.0, 100.0, 4000.0):
        assert curve.at(size) == pytest.approx(3e-6 * size**0.7)


@given(curve_points)
def test_the_linear_fit_is_that_of_numpy(points):
    way = Linear([collective(*point) for point in points])
    sizes, seconds = np.array(sorted(points)).T
    slope, start = np.polyfit(sizes / sizes.max(), seconds, 1)
    ((first, second),) = way.lines.values()
    assert second * sizes.max() == pytest.approx(slope, abs=1e-6 * seconds.max(), rel=1e-4)
    assert first == pytest.approx(start, abs=1e-6 * seconds.max(), rel=1e-4)


@pytest.mark.parametrize("way", [Interpolated, Linear])
def test_what_was_not_measured_is_not_made_up(way):
    fitted = way(line())
    for kind, changes in (("all_gather", {}), ("all_reduce", {"group_size": 4}), ("all_reduce", {"mesh": (2, 8)})):
        with pytest.raises(InputError, match="not measured"):
            fitted.collective(kind, 1024, **PLACE | changes)
    with pytest.raises(InputError, match="not measured"):
        fitted.operator("mm", "float32", flop=1e9)


def test_failed_and_fixed_measurements_are_not_points_of_the_curve():
    way = Interpolated([collective(0, 5e-6), collective(64, 1e-5), collective(128, None), collective(256, 2e-5)])
    assert way.collective("all_reduce", 0, **PLACE).seconds == 5e-6
    assert way.collective("all_reduce", 128, **PLACE).seconds == pytest.approx(math.sqrt(2) * 1e-5)


def test_measurements_of_several_devices_are_not_mixed():
    with pytest.raises(InputError, match="together"):
        Interpolated([collective(1, 1e-5), collective(1, 1e-5, device="A100-SXM-80GB")])
    with pytest.raises(InputError, match="no measurements"):
        Interpolated([])


def test_products_of_any_name_are_timed_by_the_flop_of_square_ones():
    way = Interpolated([product(1e9, 1e-3), product(4e9, 4e-3)])
    assert way.operator("addmm", "float32", flop=2e9).seconds == pytest.approx(2e-3)
    with pytest.raises(InputError):
        way.operator("gelu", "float32", flop=2e9)


def test_the_catalogue_answers_with_roofline_and_formulas():
    cluster = preset("dgx-1v")
    way = Catalogued(cluster)
    kind = cluster.accelerator_of(0)
    compute = way.operator("mm", "float32", flop=1e12, moved_bytes=1.0).seconds
    assert compute == pytest.approx(1e12 / (kind.flop_rate("float32") * kind.efficiency) + kind.launch_seconds)
    moving = way.operator("add", "float32", flop=1.0, moved_bytes=1e10).seconds
    streaming = 1e10 / (kind.memory_bytes_per_second * kind.memory_efficiency)
    assert moving == pytest.approx(streaming + kind.launch_seconds)
    names = tuple(device.name for device in cluster.devices)
    expected = all_reduce_seconds(1e8, Communication(cluster).group(names))
    assert way.collective("all_reduce", 1e8, **PLACE).seconds == pytest.approx(expected)
    for other in ("all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"):
        assert 0 < way.collective(other, 1e8, **PLACE).seconds < 2 * expected
    with pytest.raises(InputError):
        way.collective("gossip", 1e8, **PLACE)
    with pytest.raises(InputError, match="2x8"):
        way.collective("all_reduce", 1e8, mesh=(2, 8), group_size=16)


def test_groups_that_share_a_network_take_longer_in_the_catalogue():
    way = Catalogued(preset("aws-p3:2"))
    alone = way.collective("all_reduce", 1e9, mesh=(2, 8), group_size=16)
    crowded = way.collective("all_reduce", 1e9, mesh=(2, 8), group_size=2, groups=8, stride=8)
    assert crowded.seconds > 2 * alone.seconds


@pytest.mark.parametrize("axis", ["data", "tensor"])
@pytest.mark.parametrize(("pipeline", "data", "tensor"), [(1, 4, 4), (2, 2, 4), (2, 4, 2), (1, 2, 8), (1, 16, 1)])
def test_an_axis_of_a_plan_is_placed_as_its_channels_are(axis, pipeline, data, tensor):
    """The catalogue, asked by place, answers as the channels of the axis do."""
    cluster = preset("aws-p3:2")
    devices = tuple(device.name for device in cluster.devices)
    place = axis_place(cluster, devices, pipeline, data, tensor, axis)
    assert place is not None
    if place["group_size"] == 1:
        return
    channels = Communication(cluster).channels(devices, pipeline, data, tensor, axis)
    expected = max(all_reduce_seconds(1e8, channel) for channel in channels)
    assert Catalogued(cluster).collective("all_reduce", 1e8, **place).seconds == pytest.approx(expected)


def test_devices_that_do_not_lie_node_by_node_have_no_place():
    cluster = preset("aws-p3:2")
    devices = [device.name for device in cluster.devices]
    assert axis_place(cluster, devices[::2] + devices[1::2], 1, 4, 4, "data") is None
    assert axis_place(cluster, devices[:12], 1, 3, 4, "data") is None


def test_times_of_another_device_are_refused_unless_scaling_is_asked_for():
    way = Interpolated([*line(), product(1e12, 0.1)])
    assert for_cluster(way, preset("dgx-1v")) is way
    with pytest.raises(InputError, match=V100) as caught:
        for_cluster(way, preset("dgx-a100"))
    assert "scaled" in caught.value.remedy
    scaled = for_cluster(way, preset("dgx-a100"), scale=True, origin=preset("dgx-1v"))
    assert scaled.device == "A100-SXM-80GB"
    assert scaled.collective("all_reduce", 2**20, **PLACE).how.startswith(f"scaled from {V100}")


def test_scaling_divides_by_the_ratio_of_peak_rates_and_keeps_the_launch():
    way = Interpolated([product(1e12, 0.1), product(4e12, 0.4)])
    scaled = for_cluster(way, preset("dgx-a100"), scale=True)
    source, target = find_accelerator("v100"), find_accelerator("a100")
    ratio = target.flop_rate("float32") / source.flop_rate("float32")
    launch = source.launch_seconds
    assert scaled.operator("mm", "float32", flop=1e12).seconds == pytest.approx(launch + (0.1 - launch) / ratio)
    # A collective needs the links that were measured.
    with pytest.raises(InputError, match="links"):
        for_cluster(Interpolated(line()), preset("dgx-a100"), scale=True).collective("all_reduce", 1e6, **PLACE)


def test_scaling_to_a_cluster_with_the_same_links_changes_nothing():
    way = Interpolated(line())
    there = preset("dgx-1v")
    scaled = for_cluster(Interpolated(line(device="another")), there, scale=True, origin=there)
    for size in (2**5, 2**20, 2**29):
        expected = way.collective("all_reduce", size, **PLACE).seconds
        assert scaled.collective("all_reduce", size, **PLACE).seconds == pytest.approx(expected)


@pytest.mark.parametrize("way", [Interpolated, Learned])
def test_a_traced_operator_is_timed_by_its_flop(make, way):
    operator = make.graph(layers=1).operators[0]
    fitted = way([product(flop, flop / 1e12) for flop in (1e3, 1e6, 1e9, 1e12)])
    for samples in (1, 8):
        expected = operator.flop.at(samples) / 1e12
        assert time_operator(fitted, operator, samples, 1, "float32").seconds == pytest.approx(expected)
        assert time_operator(fitted, operator, samples, 2, "float32").seconds == pytest.approx(expected / 2)
