"""Several runs side by side: the same in this process, in others and on Ray; fleets in others' words."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.errors import ClusterError, FieldError, InputError
from headway.schedule.job import Job
from headway.schedule.pace import Overhead
from headway.schedule.placement.prediction import predict_placement_cost
from headway.schedule.placement.profiles import model_profile
from headway.schedule.study import Case, cases_of, find_fleet, play_cases, vary
from headway.schedule.summary import Summary
from headway.schedule.traces.read import Trace
from headway.schedule.traces.synthetic import synthesize

DATA = Path(__file__).parents[3] / "shared" / "data" / "scheduling" / "tiresias"
FLEET = find_fleet("n4g4")
BASE = synthesize(60, devices=16, load=1.3, seed=1)


def plain(summary: Summary) -> dict:
    return {name: value for name, value in summary.to_builtins().items() if name != "seconds"}


def test_every_policy_placement_and_seed_is_a_case_and_yarn_consolidates_strictly():
    pattern = Case(policy="", promote_knob=2.0, keep=True, overhead=Overhead(fixed_seconds=3.0))
    cases = cases_of(["yarn", "srtf"], ["consolidated", "random"], [4, 5], pattern)
    assert [(case.policy, case.placement, case.seed) for case in cases] == [
        ("yarn", "consolidated-strict", 4), ("yarn", "consolidated-strict", 5), ("yarn", "random", 4),
        ("yarn", "random", 5), ("srtf", "consolidated", 4), ("srtf", "consolidated", 5), ("srtf", "random", 4),
        ("srtf", "random", 5),
    ]  # fmt: skip
    assert {case.overhead.fixed_seconds for case in cases} == {3.0}
    assert [case.keep for case in cases] == [True, False] * 4


def test_processes_give_what_this_process_gives_in_the_order_of_the_cases():
    traces = {seed: vary(BASE, seed, "resample") for seed in (0, 1)}
    cases = cases_of(["2d-las", "headway"], ["skew"], [0, 1])
    seen = []
    here = play_cases(cases, traces, FLEET, workers=1, progress=lambda done, every, case: seen.append((done, every)))
    there = play_cases(cases, traces, FLEET, workers=2)
    assert [plain(each.summary) for each in here] == [plain(each.summary) for each in there]
    assert [each.case for each in there] == cases
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_error_in_another_process_is_the_error_here():
    cases = [Case(policy="srtf"), Case(policy="no-such")]
    with pytest.raises(InputError, match="no-such"):
        play_cases(cases, {0: BASE}, FLEET, workers=2)


@pytest.mark.parametrize("wrong", [{"backend": "carrier pigeon"}, {"traces": {}}])
def test_what_cannot_be_played_is_refused_before_anything_runs(wrong):
    given = {"traces": {0: BASE}, **wrong}
    with pytest.raises(InputError):
        play_cases([Case(policy="fifo")], fleet=FLEET, **given)


def test_seed_zero_is_the_trace_itself_and_others_vary_it():
    assert vary(BASE, 0, "resample") is BASE
    assert vary(BASE, 3, "jitter") != BASE != vary(BASE, 3, "resample")
    with pytest.raises(InputError, match="variation"):
        vary(BASE, 3, "wobble")


def test_a_fleet_is_a_word_a_table_of_tiresias_or_machines_of_ours(tmp_path):
    file = tmp_path / "n4g2.csv"
    file.write_text("num_switch,num_node_p_switch,num_gpu_p_node,num_cpu_p_node,mem_p_node\n2,2,2,64,256\n")
    fleet = find_fleet(str(file))
    assert (fleet.name, len(fleet.nodes), fleet.devices) == ("n4g2", 4, 8)
    assert [node.rack for node in fleet.nodes] == ["r0", "r0", "r1", "r1"]
    assert find_fleet("n256g8").devices == 2048
    machines = find_fleet("dgx-a100:16")
    assert (len(machines.nodes), machines.devices) == (16, 128)
    file.write_text("num_switch,num_node_p_switch\n2,two\n")
    with pytest.raises(FieldError, match="Tiresias"):
        find_fleet(str(file))
    with pytest.raises(ClusterError):
        find_fleet("abacus")


def test_the_fleets_of_tiresias_are_those_their_names_say():
    for name, devices in (("n256g8", 2048), ("n160g8", 1280), ("n1g4", 4), ("n32g4", 128)):
        file = DATA / f"{name}.csv"
        if not file.exists():
            pytest.skip("no Tiresias clusters in ../shared/data")
        assert find_fleet(str(file)).devices == devices


def test_ray_gives_what_this_process_gives():
    pytest.importorskip("ray")
    cases = cases_of(["srsf", "2d-las"], ["best-fit"], [0])
    here = play_cases(cases, {0: BASE}, FLEET, workers=1)
    there = play_cases(cases, {0: BASE}, FLEET, backend="ray")
    assert [plain(each.summary) for each in here] == [plain(each.summary) for each in there]


def test_a_case_says_what_places_cost_the_models_that_are_known():
    """Four workers of AlexNet on two nodes: predicted, by the published factor (0.81), or for nothing."""
    jobs = [Job(name="a", submit_seconds=0.0, devices=4, duration_seconds=100.0, model="alexnet")]
    # First fit: one of six devices leaves half of the second node.
    first = Job(name="first", submit_seconds=0.0, devices=6, duration_seconds=1e4, model="mine")
    trace = Trace(name="t", format="headway", jobs=(first, *jobs))
    fleet = find_fleet("n3g4")
    profiles = {"alexnet": model_profile("alexnet")}
    cost = predict_placement_cost(fleet, ["alexnet"])
    assert cost is not None
    expected = {
        "parameter-server": 100 * cost.slowdown("alexnet", [1, 2], [2, 2]), "published": 100 / 0.81, "none": 100.0,
    }  # fmt: skip
    for name, seconds in expected.items():
        for engine in ("fast", "pure"):
            case = Case(policy="fifo", placement="first-fit", placement_cost=name, engine=engine)
            (played,) = play_cases([case], {0: trace}, fleet, profiles=profiles, workers=1)
            assert played.replay.finish[-1] == pytest.approx(seconds)
            (unknown,) = play_cases([case], {0: trace}, fleet, workers=1)
            assert unknown.replay.finish[-1] == 100
    with pytest.raises(InputError, match="no placement cost 'free'"):
        play_cases([Case(policy="fifo", placement_cost="free")], {0: trace}, fleet, workers=1)
