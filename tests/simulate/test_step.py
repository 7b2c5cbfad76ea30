"""A step played event by event: against the closed form, against itself, and when things go wrong."""

from __future__ import annotations

import functools
import itertools
import math

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.hardware.catalog import preset
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan, Stage
from headway.predict.pipeline import in_flight
from headway.predict.step import Predictor
from headway.simulate.faults import DeviceLost, DeviceSlowed, Fault, Faults, LinkChanged, parse_fault, parse_straggler
from headway.simulate.step import simulate_step
from headway.workload import zoo
from headway.workload.graph import OptimizerKind, Workload

SCHEDULES = ["gpipe", "1f1b", "interleaved", "zero_bubble"]


@functools.cache
def predictor_of(cluster: str, model: str = "gpt2") -> Predictor:
    return Predictor(Workload(graph=traced(model), optimizer=OptimizerKind(), global_batch=64), preset(cluster))


@functools.cache
def traced(model: str):
    return zoo.trace(model, sequence=512, layers=14)


def make_plan(predictor: Predictor, micro_batches: int, micro_batch: int = 2, **fields) -> Plan:
    graph = predictor.workload.graph
    data, tensor, pipeline = (fields.get(axis, 1) for axis in ("data", "tensor", "pipeline"))
    schedule = fields.setdefault("schedule", "1f1b" if pipeline > 1 else "none")
    chunks = pipeline * (2 if schedule == "interleaved" else 1)
    cuts = [round(at * len(graph.layers) / chunks) for at in range(chunks + 1)]
    sharding = {}
    for block in graph.blocks if tensor > 1 else ():
        sharding |= dict.fromkeys(block.columns, "column") | dict.fromkeys(block.rows, "row")
    return Plan(
        model=graph.name,
        devices=tuple(device.name for device in predictor.cluster.devices[: data * tensor * pipeline]),
        global_batch=micro_batches * micro_batch * data,
        micro_batch=micro_batch,
        stages=tuple(Stage(start=start, stop=stop) for start, stop in itertools.pairwise(cuts)),
        tensor_sharding=sharding,
        precision="bfloat16",
        **fields,
    ).validate(graph, predictor.cluster)


@st.composite
def plans(draw, zero=(0, 1), pipelines=(1, 2, 4), data=(1, 2, 4, 8)):
    pipeline = draw(st.sampled_from(pipelines))
    replicas = draw(st.sampled_from(data))
    tensor = draw(st.sampled_from([1, 2, 4]))
    nodes = max(1, pipeline * replicas * tensor // 8)
    # GPT-2 ties its embeddings, Llama does not.
    predictor = predictor_of(f"dgx-a100:{nodes}", draw(st.sampled_from(["gpt2", "llama3.1-8b"])))
    return predictor, make_plan(
        predictor,
        pipeline * draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([1, 2, 4])),
        data=replicas,
        tensor=tensor,
        pipeline=pipeline,
        schedule=draw(st.sampled_from(SCHEDULES)) if pipeline > 1 else "none",
        zero_stage=draw(st.sampled_from(zero)) if replicas > 1 else 0,
    )


def assumptions_hold(predictor: Predictor, plan: Plan) -> bool:
    """What the closed form takes for granted.

    - A send is shorter than any pass, so that a stream of sends is never behind.
    - Gradients that are reduced beside backward are a small part of the step. How many of them are hidden is a rule of
      thumb: it knows of no tensor-parallel communication that hides them too, and of no split backward.
    - No parameter is tied across pipeline ranks: the ranks that hold it do not wait for each other there.
    - No ZeRO 2 or 3, whose collectives are taken to be equal from layer to layer and spread over the micro-batches.
    """
    parts = predictor.parts(plan)
    split = plan.schedule == "zero_bubble"
    shortest = min(
        min(stage.forward_seconds, stage.backward_seconds - stage.backward_weight * split) for stage in parts.stages
    )
    reduced = max(rank.exchanged for rank in parts.ranks) / predictor.predict(plan).time.step_seconds
    tied = any(rank.tied for rank in parts.ranks)
    return max(parts.sends) < shortest and reduced < 0.02 and not tied and plan.zero_stage < 2


# Most drawn plans reduce too much for the closed form: they are left out, and what is left is still drawn widely.
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(plans())
def test_closed_form_and_simulation_agree_where_the_closed_forms_assumptions_hold(drawn):
    predictor, plan = drawn
    assume(assumptions_hold(predictor, plan))
    simulated = simulate_step(predictor, plan).step_seconds
    assert simulated == pytest.approx(predictor.predict(plan).time.step_seconds, rel=0.03)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["host", "disk", "remote"]), st.sampled_from([0.0, 0.25, 0.5]), st.sampled_from([1, 2]),
    st.sampled_from(["device", "host"]), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_states_elsewhere_cost_the_same_in_both(tier, kept, pipeline, activations, micro_batches):
    """Offload (ZeRO-Offload, ATC 2021, section 4): gradients out beside backward, the update on the host, back."""
    predictor = predictor_of("dgx-a100:2", "gpt2")
    plan = make_plan(
        predictor, pipeline * micro_batches, 8, pipeline=pipeline, schedule="1f1b" if pipeline > 1 else "none",
        optimizer_on=tier, optimizer_kept=kept, activations_on=activations,
    )  # fmt: skip
    simulation = simulate_step(predictor, plan)
    # GPT-2 ties its embeddings: pipeline ranks wait for each other there, which the closed form does not know.
    close = 0.03 if pipeline == 1 else 0.06
    assert simulation.step_seconds == pytest.approx(predictor.predict(plan).time.step_seconds, rel=close)
    lanes = {span.lane for span in simulation.timeline.spans}
    assert {"rank 0/host", "rank 0/copies"} <= lanes
    assert ("rank 0/states" in lanes) == (tier != "host")


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("micro_batch", [1, 32])
def test_a_delayed_update_goes_on_beside_the_next_step(tier, micro_batch):
    """ZeRO-Offload, section 5.2: a step takes the longer of itself and of the host's update, no longer both."""
    predictor = predictor_of("dgx-a100:1", "gpt2")
    plan = make_plan(predictor, 1, micro_batch, optimizer_on=tier)
    delayed = msgspec.structs.replace(plan, delayed_update=True)
    played = simulate_step(predictor, delayed, steps=8).attempts[-1].ends
    steady = (played[-1] - played[2]) / (len(played) - 3)
    assert steady == pytest.approx(predictor.predict(delayed).time.step_seconds, rel=0.03)
    assert steady < simulate_step(predictor, plan).step_seconds


def test_long_pipelines_agree_beyond_what_the_closed_form_plays_out():
    predictor = predictor_of("dgx-a100:4", "llama3.1-8b")
    for schedule in ("gpipe", "1f1b", "zero_bubble"):
        plan = make_plan(predictor, 128, 2, pipeline=8, tensor=4, schedule=schedule)
        assert 2 * 128 * 8 > 512
        simulated = simulate_step(predictor, plan).step_seconds
        assert simulated == pytest.approx(predictor.predict(plan).time.step_seconds, rel=0.03), schedule


# ---------------------------------------------------------------------------------------------------- what always holds


@settings(deadline=None, max_examples=40)
@given(plans(zero=(0, 1, 2, 3)), st.sampled_from([0.0, 0.1]), st.booleans())
def test_lanes_do_one_thing_at_a_time_and_busy_and_idle_make_the_step(drawn, jitter, slow):
    predictor, plan = drawn
    stragglers = {plan.world_size - 1: 1.7} if slow else {}
    played = simulate_step(predictor, plan, jitter=jitter, stragglers=stragglers)
    ranks = sorted({0, plan.world_size // 2, plan.world_size - 1})
    timeline = played.timeline_of(ranks)
    assert timeline.overlaps(tolerance_seconds=1e-9) == []
    assert timeline.stop_seconds == pytest.approx(played.seconds)
    for rank in ranks:
        use = played.use_of(rank)
        assert min(use) >= -1e-9
        assert use.total == pytest.approx(played.seconds)
        compute = optimizer = 0.0
        for span in timeline.spans:
            if span.lane == f"rank {rank}/compute":
                if span.kind == "optimizer":
                    optimizer += span.duration_seconds
                else:
                    compute += span.duration_seconds
        # The pictures and the figures come from the same record by two ways.
        assert compute == pytest.approx(use.compute)
        assert optimizer == pytest.approx(use.optimizer)
    assert sum(count for _, count in played.uses) == plan.world_size
    assert 0 <= played.bubble_share < 1


@settings(deadline=None, max_examples=30)
@given(plans(zero=(0, 1, 3)), st.floats(1.0, 3.0), st.data())
def test_a_straggler_never_makes_the_step_faster_nor_slower_than_all_devices_being_slow(drawn, factor, data):
    predictor, plan = drawn
    rank = data.draw(st.integers(0, plan.world_size - 1))
    alone = simulate_step(predictor, plan).step_seconds
    one = simulate_step(predictor, plan, stragglers={rank: factor}).step_seconds
    everybody = dict(zip(range(plan.world_size), itertools.repeat(factor), strict=False))
    every = simulate_step(predictor, plan, stragglers=everybody).step_seconds
    # Replicas out of step may share a link at another moment: a per cent is left for that.
    assert alone * (1 - 1e-9) <= one <= every * 1.01
    assert every <= alone * factor * (1 + 1e-9)


def test_the_same_seed_gives_the_same_step_and_another_seed_another():
    predictor = predictor_of("dgx-a100:1")
    plan = make_plan(predictor, 8, pipeline=4, data=2)
    first, again, other = (simulate_step(predictor, plan, jitter=0.2, seed=seed) for seed in (3, 3, 4))
    assert first.timeline == again.timeline
    assert first.step_seconds == again.step_seconds != other.step_seconds


def test_jitter_costs_time_wherever_ranks_wait_for_each_other():
    predictor = predictor_of("dgx-a100:1")
    plan = make_plan(predictor, 4, data=8)
    calm = simulate_step(predictor, plan).step_seconds
    assert simulate_step(predictor, plan, jitter=0.3).step_seconds > calm


def test_steps_follow_each_other():
    predictor = predictor_of("dgx-a100:1")
    plan = make_plan(predictor, 8, pipeline=4, data=2, zero_stage=1)
    one = simulate_step(predictor, plan)
    three = simulate_step(predictor, plan, steps=3)
    assert three.seconds == pytest.approx(3 * one.seconds)
    assert three.step_seconds == pytest.approx(one.step_seconds)


# ------------------------------------------------------------------------------------------------------------- symmetry


def test_ranks_that_are_alike_are_played_once_and_a_straggler_splits_off_only_its_own_pipeline():
    predictor = predictor_of("dgx-a100:8")
    plan = make_plan(predictor, 8, pipeline=4, data=8, tensor=2)
    assert len(simulate_step(predictor, plan).kinds) == 4
    split = simulate_step(predictor, plan, stragglers={plan.rank_of(1, 3, 1): 1.5})
    assert len(split.kinds) == 8
    # The one beside the straggler waits for it in every layer; those of other replicas only at the end.
    slow, beside, other = (split.use_of(plan.rank_of(1, *at)) for at in ((3, 1), (3, 0), (4, 0)))
    assert slow.compute == pytest.approx(1.5 * beside.compute, rel=1e-6)
    # But for what compute loses to communication beside it, of which it sees more while it waits.
    assert beside.compute == pytest.approx(other.compute, rel=0.05)
    assert beside.idle > slow.idle


@settings(deadline=None, max_examples=15)
@given(plans(zero=(0, 1, 3)))
def test_one_for_all_takes_as_long_as_each_for_itself(drawn):
    predictor, plan = drawn
    together = simulate_step(predictor, plan)
    # Factors too near to 1 to matter, and all different: every team is played by itself.
    apart = simulate_step(predictor, plan, stragglers={rank: 1 + rank * 1e-12 for rank in range(plan.world_size)})
    assert len(apart.kinds) == plan.world_size // plan.tensor
    assert apart.step_seconds == pytest.approx(together.step_seconds, rel=1e-6)


def test_unequal_shares_are_played_as_they_are():
    predictor = predictor_of("dgx-a100:1")
    even = make_plan(predictor, 4, data=2)
    plan = Plan(**{**{name: getattr(even, name) for name in even.__struct_fields__}, "shares": (6, 2)})
    played = simulate_step(predictor, plan.validate())
    assert played.use_of(0).compute == pytest.approx(3 * played.use_of(1).compute, rel=0.05)
    assert played.use_of(1).idle > played.use_of(0).idle


def test_stages_of_different_width_hand_their_micro_batches_on():
    predictor = predictor_of("dgx-a100:1")
    even = make_plan(predictor, 4, pipeline=2, data=2)
    stages = (even.stages[0], Stage(start=even.stages[1].start, stop=even.stages[1].stop, data=4))
    fields = {**{name: getattr(even, name) for name in even.__struct_fields__}, "stages": stages}
    devices = tuple(device.name for device in predictor.cluster.devices[:6])
    plan = Plan(**{**fields, "devices": devices}).validate(predictor.workload.graph, predictor.cluster)
    played = simulate_step(predictor, plan, stragglers={5: 2.0})
    assert {team for kind in played.kinds for team in kind.one.ranks} <= set(range(6))
    assert played.step_seconds > simulate_step(predictor, plan).step_seconds
    assert played.timeline.overlaps(tolerance_seconds=1e-9) == []


# ------------------------------------------------------------------------------------------------------------ schedules


def test_zero_bubble_waits_less_than_1f1b_and_holds_no_more():
    predictor = predictor_of("dgx-a100:1", "llama3.1-8b")
    plans = {name: make_plan(predictor, 16, 1, pipeline=4, schedule=name) for name in ("1f1b", "zero_bubble")}
    played = {name: simulate_step(predictor, plan) for name, plan in plans.items()}
    assert played["zero_bubble"].bubble_share < played["1f1b"].bubble_share
    assert played["zero_bubble"].step_seconds < played["1f1b"].step_seconds
    most = {
        name: max(held.micro_batches for rank in range(4) for held in one.held(rank)) for name, one in played.items()
    }
    assert most["zero_bubble"] == most["1f1b"] == 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rank_holds_as_many_micro_batches_as_the_schedule_says(schedule):
    predictor = predictor_of("dgx-a100:1")
    plan = make_plan(predictor, 8, pipeline=4, schedule=schedule)
    played = simulate_step(predictor, plan, steps=2)
    for rank in range(4):
        now: dict[int, int] = {}
        most = 0
        for held in played.held(rank):
            now[held.stage] = held.micro_batches
            most = max(most, sum(now.values()))
        assert most == sum(in_flight(schedule, rank, 4, plan.virtual_stages, plan.micro_batches))
        assert sum(now.values()) == 0


def test_buckets_leave_while_backward_goes_on():
    predictor = predictor_of("dgx-a100:1")
    plan = make_plan(predictor, 2, data=8)
    played = simulate_step(predictor, plan)
    spans = played.timeline.spans
    reduces = [span for span in spans if span.name.startswith("reduce gradients")]
    backward = max(span.stop_seconds for span in spans if span.kind == "backward")
    assert len(reduces) > 2
    assert reduces[0].start_seconds < backward < reduces[-1].stop_seconds


# --------------------------------------------------------------------------------------------------------------- faults


def test_a_lost_device_stalls_the_step_until_it_is_noticed_and_the_job_begins_again_behind_the_checkpoint():
    predictor = predictor_of("dgx-a100:1")
    plan = make_plan(predictor, 8, pipeline=4, data=2)
    step = simulate_step(predictor, plan).step_seconds
    loss = DeviceLost(seconds=2.5 * step, device=plan.devices[5], detection_seconds=1.0, restart_seconds=4.0)
    often = simulate_step(predictor, plan, steps=5, faults=[loss])
    assert often.restarts == 1
    assert often.seconds == pytest.approx(2.5 * step + 1.0 + 4.0 + 3 * step)
    rarely = simulate_step(predictor, plan, steps=5, faults=[loss], checkpoint_steps=4)
    assert rarely.seconds == pytest.approx(2.5 * step + 1.0 + 4.0 + 5 * step)
    timeline = often.timeline_of(range(8))
    assert timeline.overlaps(tolerance_seconds=1e-9) == []
    dead = [span for span in timeline.spans if span.lane.startswith("rank 5/")]
    assert not [span for span in dead if loss.seconds + 1e-9 < span.stop_seconds < loss.seconds + 5.0]
    # The others go on until they need it, and nobody works between the stop and the new beginning.
    assert any(
        loss.seconds < span.stop_seconds <= loss.seconds + 1.0 for span in timeline.spans if span.kind == "forward"
    )
    assert {span.name for span in timeline.spans if span.lane == "job/faults"} == {"rank 5 lost", "restart"}
    for rank in range(8):
        assert often.use_of(rank).total == pytest.approx(often.seconds)


def test_a_device_lost_after_the_last_step_costs_nothing():
    predictor = predictor_of("dgx-a100:1")
    plan = make_plan(predictor, 4, data=2)
    calm = simulate_step(predictor, plan)
    late = simulate_step(predictor, plan, faults=[DeviceLost(seconds=2 * calm.seconds, device=plan.devices[0])])
    assert (late.seconds, late.restarts) == (calm.seconds, 0)


def test_a_device_that_slows_down_is_a_straggler_from_then_on():
    predictor = predictor_of("dgx-a100:1")
    plan = make_plan(predictor, 8)
    calm = simulate_step(predictor, plan).seconds
    slow = DeviceSlowed(seconds=calm / 2, device=plan.devices[0], factor=3.0)
    assert simulate_step(predictor, plan, faults=[slow]).seconds == pytest.approx(calm / 2 + 3 * calm / 2)
    short = DeviceSlowed(seconds=calm / 2, device=plan.devices[0], factor=3.0, lasts_seconds=0.3 * calm)
    assert simulate_step(predictor, plan, faults=[short]).seconds == pytest.approx(calm * (0.5 + 0.3 + 0.4))


def network_link(cluster: Cluster) -> tuple[str, str]:
    return next((link.source, link.target) for link in cluster.links if link.kind == "network")


def test_a_degraded_link_slows_what_crosses_it_and_a_mended_one_no_more():
    predictor = predictor_of("dgx-a100:2")
    plan = make_plan(predictor, 2, data=16)
    source, target = network_link(predictor.cluster)
    calm = simulate_step(predictor, plan).seconds
    scales = [1.0, 0.5, 0.1]
    times = [
        simulate_step(
            predictor, plan, faults=[LinkChanged(seconds=0.0, source=source, target=target, scale=scale)]
        ).seconds
        for scale in scales
    ]
    assert times[0] == pytest.approx(calm)
    # Traffic goes round a link that is slow enough.
    assert times[0] < times[1] <= times[2]
    late = LinkChanged(seconds=2 * calm, source=source, target=target, scale=0.1)
    assert simulate_step(predictor, plan, faults=[late]).seconds == pytest.approx(calm)
    inside = make_plan(predictor, 2, data=8)
    now = LinkChanged(seconds=0.0, source=source, target=target, scale=0.1)
    alone = simulate_step(predictor, inside).seconds
    assert simulate_step(predictor, inside, faults=[now]).seconds == pytest.approx(alone)


def test_a_link_that_is_down_stalls_the_job_unless_there_is_another_way_or_it_comes_back():
    predictor = predictor_of("dgx-a100:2")
    plan = make_plan(predictor, 2, data=16)
    calm = simulate_step(predictor, plan)
    reduces = [span for span in calm.timeline.spans if span.name.startswith("reduce gradients")]
    when = (reduces[0].start_seconds + reduces[-1].stop_seconds) / 2
    links = predictor.cluster.links
    uplinks = [(link.source, link.target) for link in links if link.source.startswith("node0/nic")]
    uplinks = [pair for pair in uplinks if pair[1] == "network"]

    def fall(lasts: float) -> list[LinkChanged]:
        return [
            LinkChanged(
                seconds=when, source=a, target=b, lasts_seconds=lasts, detection_seconds=2.0, restart_seconds=3.0
            )
            for a, b in uplinks
        ]

    down = fall(0.0)
    one = simulate_step(predictor, plan, faults=down[:1])
    assert one.restarts == 0
    assert one.seconds >= calm.seconds
    cut = simulate_step(predictor, plan, faults=down)
    assert cut.restarts >= 1
    assert cut.seconds == pytest.approx(when + 2.0 + 3.0 + calm.seconds)
    waited = simulate_step(predictor, plan, faults=fall(0.5))
    assert waited.restarts == 0
    # What was computing when the links went down goes on.
    assert when + 0.5 < waited.seconds <= calm.seconds + 0.5 + 1e-9
    long = simulate_step(predictor, plan, steps=60, faults=down)
    assert long.restarts == 1
    assert long.seconds == pytest.approx(when + 2.0 + 3.0 + 60 * calm.seconds)


def test_faults_go_to_and_from_files_and_lines(tmp_path):
    faults: tuple[Fault, ...] = (
        DeviceLost(seconds=1.5, device="a", detection_seconds=10.0),
        DeviceSlowed(seconds=0.5, device="b", factor=2.0, lasts_seconds=3.0),
        LinkChanged(seconds=0.1, source="a", target="b", scale=0.1),
    )
    for name in ("faults.yaml", "faults.json"):
        Faults(faults=faults).save(tmp_path / name)
        assert Faults.load(tmp_path / name).faults == faults
    assert parse_fault("lost=node0/gpu3@1500ms") == DeviceLost(seconds=1.5, device="node0/gpu3")
    assert parse_fault("slow=gpu3*2@1.5s+20s") == DeviceSlowed(
        seconds=1.5, device="gpu3", factor=2.0, lasts_seconds=20.0
    )
    assert parse_fault("link=n0/nic->net*0@1s") == LinkChanged(seconds=1.0, source="n0/nic", target="net")
    assert parse_straggler("5=2.0") == (5, 2.0)


@pytest.mark.parametrize(
    "text", ["", "lost=a", "slow=a@1s", "link=a*2@1s", "lost=a*2@1s", "gone=a@1s", "link=a->b*x@1s"]
)
def test_a_line_that_is_no_fault_is_refused(text):
    with pytest.raises(InputError):
        parse_fault(text)


def test_what_cannot_be_is_refused_and_named():
    predictor = predictor_of("dgx-a100:1")
    plan = make_plan(predictor, 4, data=2)
    impossible: list[tuple[dict, str]] = [
        ({"stragglers": {9: 2.0}}, "rank 9"),
        ({"stragglers": {0: 0.0}}, "rank 0"),
        ({"jitter": -0.1}, "jitter"),
        ({"jitter": math.inf}, "jitter"),
        ({"steps": 0}, "steps"),
        ({"faults": [DeviceLost(seconds=1.0, device="nobody")]}, "nobody"),
        ({"faults": [DeviceLost(seconds=-1.0, device=plan.devices[0])]}, "seconds"),
        ({"faults": [DeviceSlowed(seconds=0.0, device=plan.devices[0], factor=0.0)]}, "factor"),
        ({"faults": [LinkChanged(seconds=0.0, source="a", target="b")]}, "no link leads"),
    ]
    for arguments, text in impossible:
        with pytest.raises(InputError, match=text):
            simulate_step(predictor, plan, **arguments)
