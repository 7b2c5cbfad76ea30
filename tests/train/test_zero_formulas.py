"""ZeRO's memory and communication on real ranks, against Rajbhandari et al. (SC 2020), sections 5 and 7.

The paper's formulas are for mixed precision: 2 bytes a parameter for weights, 2 for gradients, K = 12 for the float32
master and Adam's moments. Headway without offloading keeps weights and gradients in float32 and no master, so the same
division gives 4P + 4P + 8P. What is asserted is that division, measured on tensors that really stand there, and the
elements handed to collectives, counted at the process group.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from zero import Measured, float32_bytes, measure_on, mixed_precision_bytes, offloaded_bytes

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def measured() -> dict[tuple[int, int, str], Measured]:
    return {(each.stage, each.ranks, each.optimizer_on): each for ranks in (2, 4) for each in measure_on(ranks)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_of_each_rank_follow_the_formula(measured: dict, stage: int, ranks: int) -> None:
    found = measured[stage, ranks, "device"]
    # Rows are rounded up to ranks, and ZeRO-1 hands out whole tensors: a few parts in a hundred here.
    assert found.state_bytes == pytest.approx(float32_bytes(stage, ranks, found.elements), rel=0.05)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_optimizer_on_the_host_is_divided_there_under_every_stage(measured: dict, stage: int, ranks: int) -> None:
    # ZeRO-Offload (Ren et al., ATC 2021), section 4.2. Adam's two moments: float32 parameters are their own masters.
    found = measured[stage, ranks, "host"]
    assert found.optimizer_bytes == 0
    assert found.host_bytes == pytest.approx(8 * found.elements / ranks, rel=0.05)
    assert found.state_bytes == pytest.approx(offloaded_bytes(stage, ranks, found.elements), rel=0.05)


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("stage", "volume"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_a_step_communicates_2p_and_3p_elements(measured: dict, stage: int, volume: int, ranks: int, tier: str) -> None:
    # Section 7: under ZeRO-1 and 2 gradients are reduced to their owners (P) and parameters come from there (P). So
    # they are with the optimizer on the host, and under ZeRO-0 too (ZeRO-Offload, section 4.2).
    found = measured[stage, ranks, tier]
    # A ring moves (N - 1) / N of a gathered or reduce-scattered tensor through each rank; the paper leaves that out.
    assert found.volume_elements == pytest.approx(volume * found.elements, rel=0.05)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", [0, 1])
def test_replicas_that_update_on_the_host_send_each_element_once_each_way(
    measured: dict, stage: int, ranks: int
) -> None:
    # What a reduce-scatter and an all-gather need at least; messages have headers. gloo's own reduce-scatter would send
    # as much as its all-reduce does, and this half as much again.
    found = measured[stage, ranks, "host"]
    assert found.sent_elements == pytest.approx(2 * (ranks - 1) / ranks * found.elements, rel=0.1)


def test_the_papers_own_table_comes_out_of_the_mixed_precision_formula() -> None:
    # Figure 1: 7.5 billion parameters, 64 devices: 120 GB, 31.4 GB, 16.6 GB, 1.9 GB.
    table = [mixed_precision_bytes(stage, 64, 7.5e9) / 1e9 for stage in range(4)]
    assert table == pytest.approx([120, 31.4, 16.6, 1.88], abs=0.05)
