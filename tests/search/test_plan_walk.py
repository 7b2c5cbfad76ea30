"""Walks over whole plans, against the search that misses nothing."""

from __future__ import annotations

import math

import pytest

from headway.errors import FieldError
from headway.predict.step import Predictor, check_fit
from headway.search.find import find
from headway.search.plan_walk import _Plans, mcmc_plans
from headway.search.ranking import Constraints
from headway.train.support import check_supported
from headway.workload.graph import Recipe, Workload
from headway.workload.transformer import TransformerShape, transformer


@pytest.mark.parametrize("memory", [1e10, 1.6e8], ids=["roomy", "tight"])
def test_on_a_small_cluster_it_comes_within_two_percent_of_the_exhaustive_search(toy, memory):
    workload = Workload(graph=toy.graph(), global_batch=16)
    for kinds in ([["fast"] * 4], [["fast", "fast"], ["slow", "slow"]]):
        rates = {"fast": 1e13, "slow": 4e12}
        cluster = toy.cluster(
            [[toy.accelerator(kind, rate=rates[kind], memory=memory) for kind in node] for node in kinds]
        )
        predictor = Predictor(workload, cluster)
        best = find(workload, cluster, devices=4).best[0].prediction.time.step_seconds
        found = mcmc_plans(predictor, seed=1, evaluations=600)
        assert found.plan is not None
        assert found.seconds <= best * 1.02
        found.plan.validate(workload.graph, cluster)
        prediction = predictor.predict(found.plan)
        assert prediction.time.step_seconds == found.seconds
        check_fit(prediction, found.plan, cluster)
        seconds = [entry.seconds for entry in found.history]
        assert seconds == sorted(seconds, reverse=True)
        assert seconds[-1] == found.seconds


def test_the_same_seed_gives_the_same_plan_and_constraints_hold(toy):
    workload = Workload(graph=toy.graph(), global_batch=16)
    cluster = toy.cluster([[toy.accelerator("gpu")] * 4])
    constraints = Constraints(pipeline=2, recompute="full", schedule="gpipe")
    one, other = (
        mcmc_plans(Predictor(workload, cluster), constraints=constraints, seed=3, evaluations=60) for _ in range(2)
    )
    assert (one.plan, one.seconds, one.evaluated) == (other.plan, other.seconds, other.evaluated)
    assert one.evaluated <= 60
    assert one.plan is not None
    assert one.plan.pipeline == 2
    assert one.plan.schedule == "gpipe"
    assert all(len(stage.recompute) == stage.stop - stage.start for stage in one.plan.stages)


def test_where_no_plan_fits_none_is_returned(toy):
    workload = Workload(graph=toy.graph(), global_batch=16)
    cluster = toy.cluster([[toy.accelerator("gpu", memory=1e3)] * 2])
    found = mcmc_plans(Predictor(workload, cluster), evaluations=30)
    assert found.plan is None
    assert math.isinf(found.seconds)


def test_budgets_are_checked(toy):
    predictor = Predictor(Workload(graph=toy.graph(), global_batch=16), toy.cluster([[toy.accelerator("gpu")] * 2]))
    with pytest.raises(FieldError):
        mcmc_plans(predictor)
    with pytest.raises(FieldError):
        mcmc_plans(predictor, evaluations=5, restarts=0)


def test_it_walks_over_context_experts_schedules_and_tiers_too(toy):
    shape = TransformerShape(
        layers=4, hidden=64, heads=4, vocabulary=512, sequence=4096, experts=4, experts_chosen=2, attention="flash"
    )
    workload = Workload(graph=transformer(shape), global_batch=4)
    cluster = toy.cluster([[toy.accelerator("gpu", memory=2.5e8)] * 4])
    constraints = Constraints(runnable=False, offload="any", sequence_parallel=False)
    best = find(workload, cluster, devices=4, constraints=constraints).best[0].prediction.time.step_seconds
    found = mcmc_plans(Predictor(workload, cluster), constraints=constraints, seed=2, evaluations=1500)
    assert found.plan is not None
    assert found.seconds <= best * 1.02


@pytest.mark.parametrize(
    "fixed",
    [
        {"context": 4}, {"expert": 2, "context": 1}, {"schedule": "zero_bubble", "pipeline": 2},
        {"context": 2, "data": 2},
    ],
)  # fmt: skip
def test_what_is_fixed_of_the_new_axes_holds(toy, fixed):
    shape = TransformerShape(
        layers=4, hidden=64, heads=4, vocabulary=512, sequence=4096, experts=4, experts_chosen=2, attention="flash"
    )
    workload = Workload(graph=transformer(shape), global_batch=4)
    cluster = toy.cluster([[toy.accelerator("gpu")] * 4])
    constraints = Constraints(runnable=False, **fixed)
    found = mcmc_plans(Predictor(workload, cluster), constraints=constraints, seed=0, evaluations=80)
    assert found.plan is not None
    assert {name: getattr(found.plan, name) for name in fixed} == fixed


def test_where_plans_are_to_be_run_none_is_judged_that_the_runtime_refuses(toy, monkeypatch):
    judged, judge = [], _Plans.judge
    monkeypatch.setattr(_Plans, "judge", lambda plans, plan: judged.append(plan) or judge(plans, plan))
    workload = Workload(graph=toy.graph(), global_batch=16)
    cluster = toy.cluster([[toy.accelerator("gpu", memory=1e8)] * 4])
    mcmc_plans(Predictor(workload, cluster), constraints=Constraints(offload="any"), seed=1, evaluations=300)
    for plan in judged:
        check_supported(plan)
    assert any(plan.parameters_on != "device" and plan.data > 1 for plan in judged)
    assert any(plan.tensor > 1 for plan in judged)


@pytest.mark.parametrize("kinds", [[["fast"] * 4] * 2, [["fast"] * 4, ["slow"] * 4]], ids=["one kind", "two kinds"])
@pytest.mark.parametrize("framework", ["headway", "megatron"])
def test_what_was_predicted_before_changes_no_prediction(toy, kinds, framework):
    """Plans share parts of their predictions: a part that depends on more than it is known by would show here."""
    shape = TransformerShape(
        layers=6, hidden=64, heads=4, vocabulary=512, sequence=4096, experts=4, experts_chosen=2, attention="flash",
        tied=framework == "headway",
    )  # fmt: skip
    recipe = Recipe(framework=framework)  # type: ignore[arg-type]
    workload = Workload(graph=transformer(shape), global_batch=16, recipe=recipe)
    rates = {"fast": 1e13, "slow": 4e12}
    cluster = toy.cluster([[toy.accelerator(kind, rate=rates[kind]) for kind in node] for node in kinds])
    shared, judged = Predictor(workload, cluster), []
    predict = shared.predict
    shared.predict = lambda plan: judged.append(plan) or predict(plan)  # type: ignore[method-assign]
    mcmc_plans(shared, constraints=Constraints(runnable=False, offload="any"), seed=4, evaluations=150)
    # Each asked once more of a predictor that knows nothing else, but for the routes.
    for plan in judged[::3]:
        alone = Predictor(workload, cluster, communication=shared.communication)
        one, other = predict(plan), alone.predict(plan)
        assert one.time.step_seconds == pytest.approx(other.time.step_seconds, rel=1e-12)
        assert one.samples_per_second == pytest.approx(other.samples_per_second, rel=1e-12)
        for memory, wanted in zip(dict.fromkeys(one.memory), dict.fromkeys(other.memory), strict=True):
            assert memory.total_bytes == pytest.approx(wanted.total_bytes, rel=1e-12)
            assert memory.tiers == pytest.approx(wanted.tiers, rel=1e-12)
        assert shared.residency.peaks_of(plan, one.memory) == shared.residency.peaks(plan)
