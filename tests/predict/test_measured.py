"""Measured times in a prediction: a slower operator makes the plan slower, and nobody else's times are used."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from headway.errors import FieldError, InputError
from headway.hardware.catalog import preset
from headway.predict.alpa import import_profile, read_measurements
from headway.predict.communication import Communication, all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds
from headway.predict.database import Database, Measurement
from headway.predict.learned import Learned
from headway.predict.measured import MeasuredTimes, measured_times
from headway.predict.operators import computed_dtype, operator_key, operator_name
from headway.predict.step import Predictor
from headway.predict.timing import Interpolated, axis_place
from headway.search.find import find
from headway.search.ranking import Constraints
from headway.simulate.faults import LinkChanged
from headway.simulate.step import simulate_step

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "planning" / "alpa_prof_database.csv"
V100 = "V100-SXM2-16GB"
_KINDS = {"all_reduce": all_reduce_seconds, "all_gather": all_gather_seconds, "reduce_scatter": reduce_scatter_seconds}


def measured_operators(graph, device: str, slower: str = "", factor: float = 1.0) -> list[Measurement]:
    """Every operator of a graph at 1 and 16 samples: 1 ms for each, `slower` ones `factor` times as much."""
    rows = {}
    for operator in graph.operators:
        shape = operator_key(operator, 1, "float32").partition(" ")[2]
        name = operator_name(operator)
        for samples in (1, 16):
            seconds = 1e-3 * samples * (factor if name == slower else 1.0)
            rows[name, shape, samples] = Measurement(
                device=device, operation=name, dtype=computed_dtype(operator, "float32"), shape=shape,
                size=samples, unit="samples", seconds=seconds, source="test",
            )  # fmt: skip
    return list(rows.values())


def test_an_operator_that_is_twice_as_slow_costs_its_time_once_more(make, tmp_path):
    graph, cluster = make.graph(layers=3), make.cluster(1, 2)
    workload = make.workload(graph, global_batch=4)
    plan = make.plan(graph, cluster, 4, 4)
    steps = {}
    for factor in (1.0, 2.0):
        database = Database(tmp_path / f"{factor}.sqlite")
        database.add(measured_operators(graph, "unit", "relu", factor))
        times = measured_times(database.path, cluster, way="interpolated")
        steps[factor] = Predictor(workload, cluster, measured=times).predict(plan).time.compute_seconds
    relus = sum(operator_name(operator) == "relu" for operator in graph.operators)
    assert relus == 3
    # Between 1 and 16 samples times grow in proportion: 4 ms at 4 samples.
    assert steps[2.0] - steps[1.0] == pytest.approx(relus * 4e-3, rel=1e-6)
    assert steps[1.0] == pytest.approx(len(graph.operators) * 4e-3, rel=0.05)  # and a little for adding gradients


def test_the_search_is_informed_and_says_by_what(make):
    graph, cluster = make.graph(layers=4), make.cluster(1, 4)
    workload = make.workload(graph, global_batch=16)
    times = MeasuredTimes(Interpolated(measured_operators(graph, "unit")), cluster, way="interpolated")
    constraints = Constraints(data=1, tensor=1, pipeline=1)
    informed = find(workload, cluster, constraints=constraints, measured=times).best[0]
    guessed = find(workload, cluster, constraints=constraints).best[0]
    compute = informed.prediction.time.compute_seconds
    assert compute == pytest.approx(len(graph.operators) * 16e-3, rel=0.05)
    assert compute > 10 * guessed.prediction.time.compute_seconds
    assert set(times.used().operators) == {"interpolated"}
    assert "interpolated times of unit" in times.used().describe()


def test_what_was_not_measured_keeps_the_formulas(make):
    graph, cluster = make.graph(layers=2), make.cluster(2, 4)
    workload = make.workload(graph, global_batch=16)
    nothing = Measurement(device="unit", operation="dot", dtype="int8", size=1e9, unit="flop", seconds=1.0)
    times = MeasuredTimes(Interpolated([nothing]), cluster, way="interpolated")
    plan = make.plan(graph, cluster, 16, 2, data=4, tensor=2)
    assert Predictor(workload, cluster, measured=times).predict(plan) == Predictor(workload, cluster).predict(plan)
    assert set(times.used().operators) == set(times.used().collectives) == {"catalogue"}


def test_a_link_that_is_slower_is_still_felt_where_collectives_were_measured(make):
    graph, cluster = make.graph(layers=2), make.cluster(2, 2)
    workload = make.workload(graph, global_batch=8)
    rows = [
        Measurement(
            device="unit", operation="all_reduce", dtype="float32", nodes=2, devices_per_node=2, group_size=4,
            size=float(size), unit="bytes", seconds=1e-3 + size * 1e-7,
        )
        for size in (1, 2**30)
    ]  # fmt: skip
    times = MeasuredTimes(Interpolated(rows), cluster, way="interpolated")
    predictor = Predictor(workload, cluster, measured=times)
    plan = make.plan(graph, cluster, 8, 2, data=4)
    usual = simulate_step(predictor, plan).seconds
    slow = LinkChanged(source="n0/nic0", target="network", seconds=0.0, scale=0.1)
    assert simulate_step(predictor, plan, faults=[slow]).seconds > 1.5 * usual


@pytest.mark.skipif(not DATA.exists(), reason="Alpa's profile is not here")
@pytest.mark.parametrize(("data", "tensor"), [(2, 8), (4, 4), (16, 1), (8, 2)])
def test_on_v100_nodes_collectives_take_what_alpa_measured(data, tensor):
    cluster = preset("aws-p3:2")
    rows = read_measurements(DATA, device=V100)
    times = MeasuredTimes(Interpolated(rows), cluster, way="interpolated")
    devices = tuple(device.name for device in cluster.devices)
    channels = Communication(cluster, known=times).channels(devices, 1, data, tensor, "data")
    place = axis_place(cluster, devices, 1, data, tensor, "data")
    assert place is not None
    compared = 0
    for row in rows:
        there = (row.nodes, row.devices_per_node, row.group_size, row.groups, row.stride)
        wanted = (*place["mesh"], place["group_size"], place["groups"], place["stride"])
        if there == wanted and row.operation in _KINDS and row.dtype == "float32" and row.size and row.seconds:
            found = _KINDS[row.operation](row.size, channels[0])
            assert found == pytest.approx(row.seconds, rel=1e-6)
            compared += 1
    assert compared >= 40


@pytest.mark.skipif(not DATA.exists(), reason="Alpa's profile is not here")
def test_pipeline_ranks_with_nodes_of_their_own_are_priced_apart(make):
    """Learned from meshes of one and two nodes: two stages on a node each are as fast as one node alone."""
    rows = [row for row in read_measurements(DATA, device=V100) if row.operation == "all_reduce" and row.nodes <= 2]
    learned = Learned(rows, bounds=False)
    one, two = preset("aws-p3:1"), preset("aws-p3:2")

    def seconds(cluster, pipeline):
        times = MeasuredTimes(learned, cluster)
        devices = tuple(device.name for device in cluster.devices)
        channels = Communication(cluster, known=times).channels(devices, pipeline, 1, 8, "tensor")
        return [all_reduce_seconds(1e8, channel) for channel in channels]

    assert seconds(two, 2) == [*seconds(one, 1), *seconds(one, 1)]


def test_times_of_another_device_are_refused_or_scaled_and_said_so(tmp_path):
    database = Database(tmp_path / "times.sqlite")
    rows = [
        Measurement(device=V100, operation="dot", dtype="float16", size=size, unit="flop", seconds=size / 5e13)
        for size in (1e10, 1e12)
    ]
    database.add(rows)
    with pytest.raises(InputError, match="A100-SXM-80GB") as caught:
        measured_times(database.path, preset("dgx-a100"))
    assert "--scale-profile" in caught.value.remedy
    scaled = measured_times(database.path, preset("dgx-a100"), scale=True)
    assert scaled is not None
    assert scaled.used().scaled
    assert scaled.used().device == V100
    assert "scaled to another device" in scaled.used().describe()
    own = measured_times(database.path, preset("dgx-1v"))
    assert own is not None
    assert not own.used().scaled


def test_what_cannot_be_chosen_alone_is_asked_for(tmp_path):
    database = Database(tmp_path / "times.sqlite")
    row = Measurement(device="one", operation="dot", dtype="float32", size=1.0, unit="flop", seconds=1.0, source="a")
    database.add([row, msgspec.structs.replace(row, device="two"), msgspec.structs.replace(row, source="b")])
    with pytest.raises(InputError, match="one, two") as caught:
        measured_times(database.path, preset("dgx-1v"))
    assert "--profile-device" in caught.value.remedy
    with pytest.raises(InputError, match="2 sources") as caught:
        measured_times(database.path, preset("dgx-1v"), device="one")
    assert "--profile-source" in caught.value.remedy
    with pytest.raises(InputError, match="no such file"):
        measured_times(tmp_path / "nothing.sqlite", preset("dgx-1v"))
    with pytest.raises(InputError, match="no times of three"):
        measured_times(database.path, preset("dgx-1v"), device="three")
    with pytest.raises(FieldError, match="guessed"):
        measured_times(database.path, preset("dgx-1v"), way="guessed")  # type: ignore[arg-type]
    assert measured_times(database.path, preset("dgx-1v"), way="catalog") is None


@pytest.mark.skipif(not DATA.exists(), reason="Alpa's profile is not here")
def test_a_table_and_the_database_that_it_was_imported_into_say_the_same(tmp_path):
    database = Database(tmp_path / "times.sqlite")
    import_profile(DATA, device=V100, database=database)
    cluster = preset("aws-p3:1")
    devices = tuple(device.name for device in cluster.devices)
    found = []
    for path, device in ((DATA, V100), (database.path, None)):
        times = measured_times(path, cluster, way="interpolated", device=device)
        assert times is not None
        place = times.place(devices, 1, 8, 1, "data", 1, 1)
        assert place is not None
        found.append(place.seconds("all_reduce", 1e7))
    assert found[0] == found[1]
    assert math.isfinite(found[0] or math.inf)
