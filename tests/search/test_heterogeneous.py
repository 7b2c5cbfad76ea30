"""Unequal devices: shares, virtual workers, and where stages are placed."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.predict.step import Predictor
from headway.search.dynamic_plans import fits
from headway.search.exhaustive import exhaustive_search
from headway.search.heterogeneous import apportion, better_mapping, search_heterogeneous, virtual_workers
from headway.search.ranking import Candidate, Constraints
from headway.search.space import Space
from headway.workload.graph import Workload

rates = st.lists(st.tuples(st.floats(0, 3), st.floats(0.1, 5)), min_size=1, max_size=4)


@given(rates, st.integers(0, 6))
@settings(deadline=None, max_examples=100)
def test_no_other_shares_are_done_sooner(each, more):
    total = len(each) + more
    takes = [lambda share, fixed=fixed, slope=slope: fixed + slope * share for fixed, slope in each]

    def done(shares):
        return max(one(share) for one, share in zip(takes, shares, strict=True))

    found = apportion(takes, total)
    assert sum(found) == total
    assert min(found) >= 1
    choices = product(range(1, total + 1), repeat=len(each))
    assert done(found) == min(done(shares) for shares in choices if sum(shares) == total)


def test_fewer_micro_batches_than_replicas_are_refused():
    with pytest.raises(InputError, match="1 micro-batches for 2 replicas"):
        apportion([float, float], 1)


@pytest.fixture
def mixed(toy):
    """Two nodes, of which one computes four times as fast."""
    return toy.cluster([[toy.accelerator("slow")] * 2, [toy.accelerator("fast", rate=4e13)] * 2])


@pytest.fixture
def job(toy):
    return Workload(graph=toy.graph(8), global_batch=32)


def test_virtual_workers_are_valid_fit_and_work_by_their_speeds(mixed, job):
    predictor = Predictor(job, mixed)
    kind_of = {device.name: device.accelerator for device in mixed.devices}
    plans = list(virtual_workers(job, mixed, predictor))
    for plan in plans:
        plan.validate(job.graph, mixed)
        assert fits(plan, mixed, predictor)
    unequal = [plan for plan in plans if plan.shares]
    assert unequal
    for plan in unequal:
        kinds = [{kind_of[plan.devices[plan.rank_of(p, d, 0)]] for p in range(plan.pipeline)} for d in range(plan.data)]
        assert all(len(kind) == 1 for kind in kinds)  # node partition: each worker is of one kind
        slow = [share for share, kind in zip(plan.shares, kinds, strict=True) if kind == {"slow"}]
        fast = [share for share, kind in zip(plan.shares, kinds, strict=True) if kind == {"fast"}]
        assert min(fast) > max(slow)
    alike = [plan for plan in plans if not plan.shares and plan.pipeline == 2]
    assert any(  # equal distribution: the same stage on the same kind, the longer one on the faster
        {kind_of[plan.devices[rank]] for rank in range(plan.width(0))} == {"slow"}
        and plan.stages[0].stop - plan.stages[0].start < plan.stages[1].stop - plan.stages[1].start
        for plan in alike
    )


def test_shares_by_speed_beat_equal_shares(mixed, job):
    predictor = Predictor(job, mixed)
    unequal = min(
        predictor.predict(plan).time.step_seconds for plan in virtual_workers(job, mixed, predictor) if plan.shares
    )
    space = Space(job, mixed, Constraints(pipeline=1, tensor=1), 4)
    equal = exhaustive_search(space, predictor, goal="time", keep=1).best[0][1].prediction.time.step_seconds
    assert unequal < 0.8 * equal


def test_the_search_is_at_least_as_good_as_each_family_and_sorted(mixed, job):
    predictor = Predictor(job, mixed)
    found = search_heterogeneous(job, mixed, predictor, keep=50)
    seconds = [one.prediction.time.step_seconds for one in found]
    assert seconds == sorted(seconds)
    assert all(fits(one.plan, mixed, predictor) for one in found)
    workers = (predictor.predict(plan).time.step_seconds for plan in virtual_workers(job, mixed, predictor))
    assert seconds[0] <= min(workers)


def test_stages_on_the_wrong_devices_trade_places(mixed, job):
    predictor = Predictor(job, mixed)
    good = next(
        plan for plan in virtual_workers(job, mixed, predictor)
        if not plan.shares and plan.pipeline == 2 and len({b - a for a, b in pairwise((0, plan.stages[0].stop, 8))}) > 1
    )  # fmt: skip
    import msgspec

    half = len(good.devices) // 2
    wrong = msgspec.structs.replace(good, devices=good.devices[half:] + good.devices[:half])
    worse = Candidate(plan=wrong, prediction=predictor.predict(wrong))
    mapped = better_mapping(worse, mixed, predictor)
    assert mapped.plan.devices == good.devices
    assert mapped.prediction.time.step_seconds < worse.prediction.time.step_seconds
