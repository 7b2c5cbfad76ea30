"""Pictures of a step: what they show is what was simulated."""

from __future__ import annotations

import itertools

import numpy
import pytest

from headway.errors import InputError
from headway.hardware.catalog import preset
from headway.plan.plan import Plan, Stage
from headway.predict.operators import operator_name
from headway.predict.step import Predictor
from headway.report import gantt
from headway.report.charts import to_svg
from headway.report.saving import save
from headway.report.step import compared, play, step_table, write_step
from headway.simulate.step import simulate_step
from headway.workload import zoo
from headway.workload.graph import Workload


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(Workload(graph=zoo.trace("gpt2", sequence=128, layers=6), global_batch=32), preset("dgx-a100:1"))


@pytest.fixture(scope="module")
def plan(predictor) -> Plan:
    layers = len(predictor.workload.graph.layers)
    cuts = [round(at * layers / 4) for at in range(5)]
    return Plan(
        model="gpt2",
        devices=tuple(device.name for device in predictor.cluster.devices),
        global_batch=32,
        micro_batch=2,
        data=2,
        pipeline=4,
        schedule="zero_bubble",
        stages=tuple(Stage(start=start, stop=stop) for start, stop in itertools.pairwise(cuts)),
    ).validate(predictor.workload.graph, predictor.cluster)


def test_the_gantt_chart_says_the_bubble_and_has_a_row_for_each_kind_of_rank(predictor, plan):
    played = simulate_step(predictor, plan, stragglers={0: 2.0})
    svg = to_svg(gantt.gantt_figure(played))
    assert f"{played.bubble_share:.1%} of it bubble" in svg
    assert svg.count("stage ") == len(played.kinds) == 8
    assert "gradients of parameters" in svg


def test_too_many_kinds_of_ranks_are_refused(predictor, plan, monkeypatch):
    monkeypatch.setattr(gantt, "MOST_ROWS", 3)
    with pytest.raises(InputError, match="too many"):
        gantt.gantt_figure(simulate_step(predictor, plan))


def test_the_memory_chart_says_each_stages_peak_and_what_it_is_made_of(predictor, plan):
    memory = predictor.memory(plan)
    figure = gantt.memory_figure(simulate_step(predictor, plan), memory, capacity_bytes=80e9)
    svg = to_svg(figure)
    assert svg.count("peak ") == 4
    for axes, rank in zip(figure.axes, (0, 2, 4, 6), strict=True):
        tops = [numpy.asarray(path.vertices)[:, 1].max() for band in axes.collections for path in band.get_paths()]
        assert max(tops) == pytest.approx(memory[rank].total_bytes)


def test_no_operator_lies_above_its_roof(predictor):
    kind = predictor.cluster.accelerators["A100-SXM-80GB"]
    latency = predictor.stages.latency(kind, crowded=False)
    figure = gantt.roofline_figure(latency, 4, precision="bfloat16")
    peak, rate = kind.flop_rate("bfloat16"), kind.memory_bytes_per_second
    points = [tuple(point) for dots in figure.axes[0].collections for point in numpy.asarray(dots.get_offsets())]
    names = {operator_name(one) for one in predictor.workload.graph.operators if one.flop.at(4)}
    assert len(points) >= len(names) > 1
    for intensity, speed in points:
        assert speed <= min(peak, intensity * rate) * 1.001


def test_the_search_chart_draws_every_method_and_refuses_what_is_out_of_order():
    good = gantt.Series("dynamic", ((0.1, 2.0), (1.0, 1.5)))
    svg = to_svg(gantt.search_figure([good, gantt.Series("mcmc", ((0.01, 3.0),))], bound=1.4))
    assert all(name in svg for name in ("dynamic", "mcmc", "bound"))
    for bad in ((), ((1.0, 2.0), (0.5, 1.0)), ((0.0, float("inf")),)):
        with pytest.raises(InputError, match="order of time"):
            gantt.search_figure([good, gantt.Series("odd", bad)])


def test_a_simulated_step_leaves_its_pictures_and_a_table_of_predicted_beside_simulated(predictor, plan, tmp_path):
    prediction, played = play(
        predictor, plan, stragglers=["1=1.5"], jitter=0.02, faults=[f"slow={plan.devices[3]}*2@1ms"], steps=2, seed=1
    )
    files = write_step(tmp_path, prediction, played)
    assert [file.name for file in files] == ["gantt.svg", "memory.svg", "timeline.json"]
    assert all(file.stat().st_size > 500 for file in files)
    rows = compared(prediction, played)
    whole, *parts = rows
    assert sum(row.simulated_seconds for row in parts) == pytest.approx(whole.simulated_seconds)
    assert sum(row.predicted_seconds for row in parts) == pytest.approx(whole.predicted_seconds)
    assert step_table(prediction, played).row_count == len(rows)
    with pytest.raises(InputError):
        save(gantt.gantt_figure(played), tmp_path / "picture.gif")
