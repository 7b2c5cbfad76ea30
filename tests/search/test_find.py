"""The search finds the best plan, says why others are not, and misses nothing by pruning."""

from __future__ import annotations

import itertools
import re

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.errors import DoesNotFitError, FieldError, InputError, PlanError
from headway.plan.plan import Plan, Stage
from headway.predict.step import Predictor, check_fit
from headway.predict.tiers import TierRates
from headway.search.bounds import Bounds
from headway.search.exhaustive import exhaustive_search
from headway.search.find import Constraints, Ranking, find
from headway.search.space import Mesh, Space, States
from headway.train.support import check_supported
from headway.workload.graph import Recipe, Workload
from headway.workload.transformer import TransformerShape, transformer

MEGATRON = Recipe(framework="megatron", parameter_bytes=2.0, gradient_bytes=4.0, master_bytes=4.0)
GOALS = ["time", "memory", "cost"]


def figures_of(found):
    return [figure for figures, _ in found.best for figure in figures]


@pytest.mark.parametrize("goal", GOALS)
@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pruning_loses_nothing(goal, data, toy):
    memory = data.draw(st.sampled_from([1.5e8, 3e8, 6e8, 1e10]), label="memory")
    devices = data.draw(st.sampled_from([2, 3, 4]), label="devices in a node")
    kinds = [toy.accelerator("gpu", memory=memory, dollars=data.draw(st.sampled_from([0.0, 2.0]), label="dollars"))]
    if data.draw(st.booleans(), label="two kinds"):
        kinds.append(toy.accelerator("old gpu", rate=4e12, memory=2 * memory, dollars=1.0))
    cluster = toy.cluster([[kind] * devices for kind in kinds], network=data.draw(st.sampled_from([1e9, 1e11])))
    graph = toy.graph(data.draw(st.integers(2, 4)), vocabulary=data.draw(st.sampled_from([0, 20000])))
    workload = Workload(graph=graph, global_batch=data.draw(st.sampled_from([6, 8, 12])))
    space = Space(workload, cluster, Constraints(), None)
    predictor = Predictor(workload, cluster)
    pruned = exhaustive_search(space, predictor, goal=goal, keep=3)
    whole = exhaustive_search(space, predictor, goal=goal, keep=3, prune=False)
    assert figures_of(pruned) == pytest.approx(figures_of(whole), rel=1e-12)
    assert pruned.considered == whole.considered
    for found in (pruned, whole):
        assert sum(found.totals.values()) + len(found.best) == found.considered


@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_plan_takes_at_least_its_bounds(data, toy):
    devices = data.draw(st.sampled_from([2, 4]))
    kinds = [toy.accelerator("gpu"), toy.accelerator("old gpu", rate=3e12)][: data.draw(st.integers(1, 2))]
    cluster = toy.cluster([[kind] * devices for kind in kinds])
    graph = toy.graph(data.draw(st.integers(2, 6)), vocabulary=data.draw(st.sampled_from([0, 20000])))
    workload = Workload(graph=graph, global_batch=12)
    recompute = data.draw(st.sampled_from(["none", "full", "any"]))
    space = Space(workload, cluster, Constraints(recompute=recompute), None)
    predictor = Predictor(workload, cluster)
    bounds = Bounds(space, predictor)
    found = exhaustive_search(space, predictor, keep=10**6, limited=False, prune=False)
    plans = {}
    for _, candidate in found.best:
        plan = candidate.plan
        plans.setdefault((plan.devices, plan.data, plan.tensor, plan.pipeline), []).append(candidate)
    assert len(found.best) == found.considered
    for record in found.records:
        mesh = record.mesh
        for candidate in plans[mesh.placement.devices, mesh.data, mesh.tensor, mesh.pipeline]:
            plan, seconds = candidate.plan, candidate.prediction.time.step_seconds
            (group,) = (
                one
                for one in space.groups(mesh)
                if (one.schedule, one.virtual_stages, one.micro_batch)
                == (plan.schedule, plan.virtual_stages, plan.micro_batch)
            )
            assert bounds.mesh_seconds(mesh) <= seconds
            assert bounds.group_seconds(mesh, group) <= seconds
            assert bounds.cut_seconds(mesh, group) <= seconds
            assert bounds.state_bytes(mesh, States(plan.zero_stage)) <= candidate.prediction.peak_bytes
            assert bounds.group_bytes(mesh, group, States(plan.zero_stage)) <= candidate.prediction.peak_bytes


@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_wide_space_keeps_its_bounds_and_loses_nothing_by_pruning(data, toy):
    """Context, expert and sequence parallelism, selective recomputation, zero bubble and offload."""
    memory = data.draw(st.sampled_from([2e8, 4e8, 1e10]), label="memory")
    kinds = [toy.accelerator("gpu", memory=memory), toy.accelerator("old gpu", rate=3e12, memory=memory)]
    offload = data.draw(st.sampled_from(["none", "optimizer", "any"]), label="offload")
    # The space with other tiers is some thirty times as large, and all of it is predicted below.
    nodes = [[kind] * 2 for kind in kinds[: data.draw(st.integers(1, 2), label="kinds") if offload == "none" else 1]]
    cluster = toy.cluster(nodes, network=data.draw(st.sampled_from([1e9, 1e11])))
    experts = data.draw(st.sampled_from([0, 4]), label="experts")
    shape = TransformerShape(
        layers=data.draw(st.integers(2, 4)), hidden=64, heads=4, vocabulary=data.draw(st.sampled_from([512, 20000])),
        sequence=data.draw(st.sampled_from([256, 2048])), experts=experts, experts_chosen=min(experts, 2),
        attention=data.draw(st.sampled_from(["flash", "unfused"])), dropout=True,
    )  # fmt: skip
    recipe = data.draw(st.sampled_from([Recipe(), MEGATRON]), label="recipe")
    workload = Workload(graph=transformer(shape), global_batch=data.draw(st.sampled_from([4, 6])), recipe=recipe)
    constraints = Constraints(
        runnable=False,
        offload=offload,
        delayed_update=offload == "optimizer" and data.draw(st.booleans()),
        recompute=data.draw(st.sampled_from(["any", "selective"])),
        precision=data.draw(st.sampled_from(["float32", "bfloat16"])),
    )
    space = Space(workload, cluster, constraints, None)
    predictor = Predictor(workload, cluster)
    pruned = exhaustive_search(space, predictor, keep=3)
    whole = exhaustive_search(space, predictor, keep=10**6, prune=False)
    assert figures_of(pruned) == pytest.approx(figures_of(whole)[: len(figures_of(pruned))], rel=1e-12)
    bounds = Bounds(space, predictor)
    placements = {mesh.placement.devices: mesh.placement for mesh in (record.mesh for record in whole.records)}
    for _, candidate in whole.best:
        plan, seconds = candidate.plan.validate(workload.graph, cluster), candidate.prediction.time.step_seconds
        mesh = Mesh(placements[plan.devices], plan.data, plan.tensor, plan.pipeline, plan.context, plan.expert)
        (group,) = (
            one
            for one in space.groups(mesh)
            if (one.schedule, one.virtual_stages, one.micro_batch)
            == (plan.schedule, plan.virtual_stages, plan.micro_batch)
        )
        held = States(
            plan.zero_stage, plan.parameters_on, plan.optimizer_on, plan.activations_on, plan.optimizer_kept,
            plan.delayed_update,
        )  # fmt: skip
        assert bounds.mesh_seconds(mesh) <= seconds
        assert bounds.group_seconds(mesh, group) <= seconds
        assert bounds.cut_seconds(mesh, group) <= seconds
        assert bounds.state_bytes(mesh, held) <= candidate.prediction.peak_bytes
        assert bounds.group_bytes(mesh, group, held) <= candidate.prediction.peak_bytes


def test_a_layer_larger_than_any_device_is_named(toy):
    cluster = toy.cluster([[toy.accelerator("gpu", memory=1e8)] * 4])
    shape = TransformerShape(layers=2, hidden=64, heads=4, vocabulary=1_000_003, sequence=16, tied=False)
    with pytest.raises(DoesNotFitError, match=r"layer '\w+' alone has 256 MB of parameters more than any device"):
        find(Workload(graph=transformer(shape), global_batch=4), cluster)


def test_a_plan_to_run_never_has_what_the_runtime_lacks(toy):
    cluster = toy.cluster([[toy.accelerator("gpu")] * 4])
    shape = TransformerShape(layers=4, hidden=64, heads=4, vocabulary=512, sequence=4096, attention="unfused")
    for constraints in (Constraints(), Constraints(offload="any"), Constraints(exchange="headway", zero_stage=0)):
        ranking = find(Workload(graph=transformer(shape), global_batch=8), cluster, keep=300, constraints=constraints)
        for candidate in ranking.best:
            check_supported(candidate.plan)


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("memory", [3e8, 1e10])
def test_no_plan_that_we_can_write_down_without_a_pipeline_is_better(goal, memory, toy):
    cluster = toy.cluster([[toy.accelerator("gpu", memory=memory)] * 4])
    workload = Workload(graph=toy.graph(), global_batch=16)
    predictor = Predictor(workload, cluster)
    best = find(workload, cluster, goal=goal).best[0].prediction
    count = 4
    sharding = {
        name: style for at in range(4) for name, style in ((f"layers.{at}.up", "column"), (f"layers.{at}.down", "row"))
    }

    def value(prediction, devices):
        step = prediction.time.step_seconds
        return {"time": step, "memory": prediction.peak_bytes, "cost": step * devices}[goal]

    ours = []
    for count in (1, 2, 4):
        for tensor in divisors(count):
            data = count // tensor
            for micro_batch in divisors(16 // data):
                for zero in (0, 1, 2, 3) if data > 1 else (0,):
                    for again in ((), (0, 1, 2, 3)):
                        plan = Plan(
                            model="toy", devices=tuple(f"n0d{at}" for at in range(count)), global_batch=16,
                            micro_batch=micro_batch, stages=(Stage(start=0, stop=4, recompute=again),), data=data,
                            tensor=tensor, zero_stage=zero, tensor_sharding=sharding if tensor > 1 else {},
                        ).validate(workload.graph, cluster)  # fmt: skip
                        prediction = predictor.predict(plan)
                        if prediction.peak_bytes <= 0.95 * memory:
                            ours.append(value(prediction, count))
    winner = find(workload, cluster, goal=goal).best[0].plan
    assert value(best, winner.world_size) <= min(ours) * (1 + 1e-9)


def test_plans_come_best_first_and_each_is_valid_and_fits(workload, node):
    ranking = find(workload, node, keep=8)
    assert len(ranking.best) == 8
    seconds = [candidate.prediction.time.step_seconds for candidate in ranking.best]
    assert seconds == sorted(seconds)
    for candidate in ranking.best:
        candidate.plan.validate(workload.graph, node)
        assert check_fit(candidate.prediction, candidate.plan, node) > 0
    assert ranking.evaluated < ranking.considered


def test_the_answer_is_the_same_every_time(workload, node):
    first, second = find(workload, node), find(workload, node)
    assert msgspec.structs.replace(first, seconds=0.0, history=()) == msgspec.structs.replace(
        second, seconds=0.0, history=()
    )
    assert [step for _, step in first.history] == [step for _, step in second.history]


def test_a_ranking_survives_json(workload, node):
    ranking = find(workload, node)
    assert Ranking.from_json(ranking.to_json()) == ranking


def test_one_device_beats_two_where_the_link_is_slow(toy):
    cluster = toy.cluster([[toy.accelerator("gpu")] * 2], bandwidth=1e6)
    workload = Workload(graph=toy.graph(), global_batch=2)
    assert find(workload, cluster).best[0].plan.world_size == 1
    forced = find(workload, cluster, devices=2)
    assert {candidate.plan.world_size for candidate in forced.best} == {2}


def test_tensor_parallelism_stays_within_a_node(toy):
    cluster = toy.cluster([[toy.accelerator("gpu")] * 2] * 2, bandwidth=1e11, network=1e9)
    workload = Workload(graph=toy.graph(), global_batch=8)
    plan = find(workload, cluster, constraints=Constraints(tensor=2, data=2)).best[0].plan
    for rank in range(4):
        nodes = {plan.devices[other].split("d")[0] for other in plan.tensor_group(rank)}
        assert len(nodes) == 1


def test_each_stage_of_a_mixed_cluster_has_one_kind_of_device_and_the_slow_one_has_fewer_layers(toy):
    fast, slow = toy.accelerator("fast"), toy.accelerator("slow", rate=2.5e12)
    cluster = toy.cluster([[fast, slow], [slow, fast]], network=1e11)
    workload = Workload(graph=toy.graph(10), global_batch=64)
    plan = find(workload, cluster, devices=4, constraints=Constraints(pipeline=2, data=2, schedule="1f1b")).best[0].plan
    kind = {device.name: device.accelerator for device in cluster.devices}
    kinds = [{kind[name] for name in plan.devices[:2]}, {kind[name] for name in plan.devices[2:]}]
    assert sorted(map(sorted, kinds)) == [["fast"], ["slow"]]
    lengths = {next(iter(have)): stage.stop - stage.start for have, stage in zip(kinds, plan.stages, strict=True)}
    assert lengths["fast"] > lengths["slow"]


def test_only_as_many_layers_are_recomputed_as_make_it_fit(toy):
    workload = Workload(graph=toy.graph(8), global_batch=32)
    fixed = {"data": 1, "tensor": 1, "pipeline": 1, "micro_batch": 32}

    def peak(recompute):
        roomy = toy.cluster([[toy.accelerator("gpu")]])
        constraints = Constraints(recompute=recompute, **fixed)
        return find(workload, roomy, constraints=constraints).best[0].prediction

    plain, full = peak("none"), peak("full")
    room = (plain.peak_bytes + full.peak_bytes) / 2
    tight = toy.cluster([[toy.accelerator("gpu", memory=room / 0.95)]])
    (found,) = find(workload, tight, constraints=Constraints(**fixed)).best
    recomputed = len(found.plan.stages[0].recompute)
    assert 0 < recomputed < 8
    assert found.prediction.peak_bytes <= room
    assert plain.time.step_seconds < found.prediction.time.step_seconds < full.time.step_seconds
    predictor = Predictor(workload, tight)
    fewer = Stage(start=0, stop=8, recompute=found.plan.stages[0].recompute[1:])
    assert predictor.predict(msgspec.structs.replace(found.plan, stages=(fewer,))).peak_bytes > room


def test_a_pipeline_is_cut_elsewhere_when_the_fastest_cut_does_not_fit(toy):
    # The embedding computes nothing, so a cut that balances time gives its stage as many layers as the other.
    workload = Workload(graph=toy.graph(8, vocabulary=40000), global_batch=8)
    constraints = Constraints(pipeline=2, schedule="1f1b", micro_batch=1)
    roomy = find(workload, toy.cluster([[toy.accelerator("gpu")] * 2]), devices=2, constraints=constraints).best[0]
    assert roomy.plan.stages[0].stop == 5
    room = 0.9 * roomy.prediction.memory[0].total_bytes
    tight = toy.cluster([[toy.accelerator("gpu", memory=room / 0.95)] * 2])
    found = find(workload, tight, devices=2, constraints=constraints).best[0]
    assert found.plan.stages[0].stop < 5
    assert found.prediction.peak_bytes <= room


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize(
    "constraints",
    [
        {"data": 2},
        {"tensor": 2, "pipeline": 2},
        {"zero_stage": 3},
        {"micro_batch": 2, "schedule": "gpipe"},
        {"schedule": "interleaved"},
        {"recompute": "full"},
        {"precision": "bfloat16"},
    ],
)
def test_constraints_are_kept(goal, constraints, workload, node):
    ranking = find(workload, node, goal=goal, constraints=Constraints(**constraints))
    for candidate in ranking.best:
        plan = candidate.plan
        for field, value in constraints.items():
            if field == "recompute":
                assert plan.stages[0].recompute == tuple(range(plan.stages[0].stop))
            else:
                assert getattr(plan, field) == value


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"tensor": 3, "data": 1, "pipeline": 1, "micro_batch": 5}, "micro-batches of 5 do not divide 16"),
        ({"pipeline": 8}, "no degrees like these"),
        ({"data": 3}, "data 3 does not divide the global batch of 16"),
        ({"schedule": "gpipe", "data": 4}, "schedule 'gpipe' with pipeline 1"),
    ],
)
def test_constraints_that_leave_nothing_are_refused_with_the_reason(constraints, message, workload, node):
    with pytest.raises(PlanError, match=message) as caught:
        find(workload, node, constraints=Constraints(**constraints))
    assert caught.value.place == "constraints"


def test_a_tensor_degree_that_divides_no_heads_is_named(toy, node):
    workload = Workload(graph=toy.graph(heads=6), global_batch=16)
    with pytest.raises(PlanError, match="tensor 4 does not divide 6 heads"):
        find(workload, node, constraints=Constraints(tensor=4))
    reasons = [item.reason for item in find(workload, node).rejected]
    assert "tensor 4 does not divide 6 heads" in reasons


@pytest.mark.parametrize(
    ("constraints", "place"),
    [
        ({"data": 0}, "data"),
        ({"memory_fraction": 1.5}, "memory_fraction"),
        ({"zero_stage": 1, "data": 1}, "zero_stage"),
        ({"pipeline": 1, "schedule": "1f1b"}, "schedule"),
    ],
)
def test_constraints_that_mean_nothing_are_refused(constraints, place, workload, node):
    with pytest.raises(FieldError) as caught:
        find(workload, node, constraints=Constraints(**constraints))
    assert caught.value.place == f"constraints: {place}"


def test_an_unknown_goal_and_too_many_devices_are_refused(workload, node):
    with pytest.raises(FieldError, match="speed"):
        find(workload, node, goal="speed")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="5 devices asked for"):
        find(workload, node, devices=5)
    with pytest.raises(InputError, match="at least 1"):
        find(workload, node, keep=0)


@pytest.mark.parametrize("goal", GOALS)
def test_when_nothing_fits_the_nearest_plan_and_what_it_lacks_are_named(goal, toy, workload):
    memory = 1e7
    cluster = toy.cluster([[toy.accelerator("gpu", memory=memory)] * 2])
    with pytest.raises(DoesNotFitError) as caught:
        find(workload, cluster, goal=goal)
    error = caught.value
    assert "no plan for toy fits" in error.message
    assert re.search(r"on rank \d where 95% of 10.0 MB can be used: \d.* too little", error.message)
    assert "use more devices" in error.remedy
    space = Space(workload, cluster, Constraints(), None)
    every = exhaustive_search(space, Predictor(workload, cluster), goal="memory", keep=1, limited=False, prune=False)
    assert every.best[0][1].plan.describe() in error.place


def test_what_was_left_out_has_a_reason_in_numbers(toy):
    cluster = toy.cluster([[toy.accelerator("gpu", memory=2.2e8)] * 4])
    ranking = find(Workload(graph=toy.graph(), global_batch=16), cluster, keep=1)
    kinds = {item.kind for item in ranking.rejected}
    assert {"slower", "does not fit"} <= kinds
    best = ranking.best[0].plan
    for item in ranking.rejected:
        assert (item.data, item.tensor, item.pipeline) != (best.data, best.tensor, best.pipeline) or best.world_size < 4
        if item.kind == "slower":
            assert item.factor >= 1
            assert "x slower: " in item.reason
            assert item.because in item.reason
        elif item.kind == "does not fit":
            assert item.excess_bytes > 0
            assert " over " in item.reason
    assert sum(ranking.totals.values()) - ranking.totals.get("impossible degrees", 0) + 1 == ranking.considered


def test_fewer_dollars_may_mean_fewer_or_older_devices(toy):
    new, old = toy.accelerator("new", dollars=10.0), toy.accelerator("old", rate=5e12, dollars=1.0)
    cluster = toy.cluster([[new, new], [old, old]])
    workload = Workload(graph=toy.graph(), global_batch=16)
    plan = find(workload, cluster, goal="cost").best[0].plan
    kind = {device.name: device.accelerator for device in cluster.devices}
    assert {kind[name] for name in plan.devices} == {"old"}
    fast = find(workload, cluster, goal="time").best[0].plan
    assert "new" in {kind[name] for name in fast.devices}


def test_progress_counts_up_to_all_plans(workload, node):
    seen: list[tuple[int, int]] = []
    ranking = find(workload, node, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (ranking.considered, ranking.considered)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_what_fits_only_elsewhere_gets_the_cheapest_tiers(toy):
    """Against trying every place of parameters, optimizer and activations, with the planner's steps of what is kept."""
    cluster = toy.cluster([[toy.accelerator("gpu", memory=1.7e8)] * 2])
    workload = Workload(graph=toy.graph(), global_batch=8)
    with pytest.raises(DoesNotFitError):
        find(workload, cluster, devices=2, constraints=Constraints(data=2, runnable=False, recompute="none"))
    constraints = Constraints(data=2, runnable=False, recompute="none", offload="any")
    best = find(workload, cluster, devices=2, constraints=constraints).best[0]
    predictor = Predictor(workload, cluster)
    tiers = ("device", *predictor.stages.tiers.available)
    rank = {tier: at for at, tier in enumerate(tiers)}
    room = 1.7e8 * constraints.memory_fraction
    least = None
    for micro, zero, parameters, optimizer, activations, kept in itertools.product(
        (1, 2, 4), (0, 1, 2, 3), tiers, tiers, ("device", "host"), (0.0, 0.25, 0.5, 0.75)
    ):
        if (optimizer == "device" and kept) or rank[parameters] > rank[optimizer] or (parameters != "device" and kept):
            continue
        plan = msgspec.structs.replace(
            best.plan, micro_batch=micro, zero_stage=zero, parameters_on=parameters, optimizer_on=optimizer,
            activations_on=activations, optimizer_kept=kept, stages=(Stage(start=0, stop=4),),
        )  # fmt: skip
        prediction = predictor.predict(plan.validate(workload.graph, cluster))
        if prediction.peak_bytes <= room and (least is None or prediction.time.step_seconds < least):
            least = prediction.time.step_seconds
    assert least is not None
    assert best.prediction.peak_bytes <= room
    assert not best.plan.optimizer_on == best.plan.parameters_on == best.plan.activations_on == "device"
    # All of them swapped, where the planner swaps only as many as it must: it is at least as fast.
    assert best.prediction.time.step_seconds <= least * (1 + 1e-9)


def test_a_host_that_is_too_small_is_named(toy, monkeypatch):
    """With less and less memory beside the devices, at last it is that which the nearest plan lacks."""
    cluster = toy.cluster([[toy.accelerator("gpu", memory=1.7e8)] * 2])
    workload = Workload(graph=toy.graph(), global_batch=8)
    constraints = Constraints(data=2, runnable=False, recompute="none", offload="any")
    defaults = TierRates.__init__.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "disk_bytes", 1e3)
    monkeypatch.setitem(defaults, "host_bytes", 2e8)

    def shrink_until_nothing_fits() -> None:
        while defaults["host_bytes"] > 1e6:
            find(workload, cluster, devices=2, constraints=constraints)
            defaults["host_bytes"] -= 4e6

    with pytest.raises(DoesNotFitError, match=r"the nearest fits on the devices and needs .* on host"):
        shrink_until_nothing_fits()


def test_a_delayed_update_needs_an_optimizer_elsewhere_and_is_only_made_where_it_is_allowed(toy):
    with pytest.raises(FieldError, match="off the device"):
        Constraints(runnable=False, delayed_update=True).validate()
    cluster = toy.cluster([[toy.accelerator("gpu", memory=1.7e8)] * 2])
    workload = Workload(graph=toy.graph(), global_batch=8)
    found = [
        find(
            workload, cluster, devices=2,
            constraints=Constraints(data=2, runnable=False, offload="optimizer", delayed_update=delayed),
        ).best[0]
        for delayed in (False, True)
    ]  # fmt: skip
    assert not found[0].plan.delayed_update
    assert found[1].prediction.time.step_seconds <= found[0].prediction.time.step_seconds
