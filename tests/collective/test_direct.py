"""Everyone to everyone: one step, and reductions in the order of the ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.direct import COLLECTIVES, direct
from headway.collective.reference import evaluate
from headway.collective.verify import verify
from headway.hardware.catalog import load_cluster

CLUSTER = load_cluster("dgx-a100")


@settings(deadline=None, max_examples=60)
@given(collective=st.sampled_from(COLLECTIVES), size=st.integers(2, 8), data=st.data())
def test_nothing_is_passed_on(collective, size, data):
    root = data.draw(st.integers(0, size - 1))
    program = direct(CLUSTER, collective, [device.name for device in CLUSTER.devices][:size], root=root)
    report = verify(program, slots=1)
    reductions = size - 1 if program.reduces else 0
    copies = 0 if collective in ("reduce", "reduce_scatter") else 1
    assert report.steps == reductions + copies
    share = {
        "broadcast": size - 1,
        "reduce": size - 1,
        "all_reduce": 2 * (size - 1),
        "reduce_scatter": size - 1,
        "all_gather": size - 1,
        "gather": (size - 1) / size,
        "scatter": (size - 1) / size,
        "all_to_all": size - 1,
    }[collective]
    assert sum(report.sent) == pytest.approx(share)


def test_each_rank_adds_to_its_own_the_others_in_their_order():
    program = direct(CLUSTER, "all_reduce")
    rng = np.random.default_rng(7)
    vectors = [(rng.standard_normal(8) * 10.0 ** rng.integers(-6, 6, 8)).astype(np.float32) for _ in range(8)]
    results = evaluate(program, vectors)
    for owner in range(8):
        total = vectors[owner][owner]
        for rank in range(8):
            if rank != owner:
                total = total + vectors[rank][owner]
        for result in results:
            assert result is not None
            assert result[owner] == total
