"""Algorithms side by side: nothing beats the bound, prediction and simulation agree, and what fails is said."""

from __future__ import annotations

import pytest

from headway.errors import DisconnectedError, InputError, ProgramError
from headway.hardware.catalog import preset
from headway.simulate.compare import compare

FAST = ["ring", "tree", "binomial", "halving-doubling", "hierarchical", "direct", "packed"]


@pytest.mark.parametrize("collective", ["broadcast", "reduce", "all_reduce", "reduce_scatter", "all_gather"])
@pytest.mark.parametrize("devices", ["0,1,4", "0-7"])
def test_no_algorithm_beats_the_bound_and_packing_reaches_it_with_large_vectors(collective, devices):
    cluster = preset("dgx-1v")
    found = compare(cluster, collective, 1e10, devices=cluster.select(devices)).comparison
    assert [entry.simulated_seconds for entry in found.entries] == sorted(
        entry.simulated_seconds for entry in found.entries
    )
    shares = {entry.algorithm: entry.optimum_share for entry in found.entries}
    assert shares["packed"] == pytest.approx(1.0)
    for entry in found.entries:
        # Those that go over PCIe as well may be a little above the bound, which counts NVLink alone.
        assert entry.optimum_share <= 1.0 + 1e-9 or "root" in str(entry.bottleneck)
        assert entry.simulated_seconds == pytest.approx(entry.predicted_seconds, rel=0.15), entry.algorithm
    packed = next(entry for entry in found.entries if entry.algorithm == "packed")
    assert packed.bytes_per_second == pytest.approx(found.optimal_bytes_per_second, rel=0.02)


def test_a_link_is_busy_for_the_share_of_the_time_that_its_bytes_take():
    cluster = preset("dgx-1v")
    found = compare(cluster, "broadcast", 1e9, devices=cluster.select("0,1"), names=["direct"])
    (busy,) = found.busy("direct").values()
    assert busy == pytest.approx(1e9 / 25e9 / found.simulated["direct"].seconds)
    assert found.best == "direct"


def test_every_collective_can_be_compared_over_a_network():
    cluster = preset("dgx-a100:2")
    for collective in ("gather", "scatter", "all_to_all"):
        found = compare(cluster, collective, 1e6, devices=cluster.select("0,1,8,9")).comparison
        assert found.entries
        assert found.optimal_bytes_per_second == 0.0  # no bound is known, so none is shown


def test_a_single_device_has_nothing_to_do():
    cluster = preset("dgx-1v")
    found = compare(cluster, "all_reduce", 1e6, devices=["node0/gpu3"], names=FAST).comparison
    assert all(entry.simulated_seconds == 0.0 for entry in found.entries)


def test_what_cannot_be_is_refused():
    cluster = preset("dgx-1v")
    with pytest.raises(ProgramError, match="no algorithm"):
        compare(cluster, "all_reduce", 1e6, names=["rings"])
    with pytest.raises(InputError, match="bytes"):
        compare(cluster, "all_reduce", 0.0)
    with pytest.raises(InputError):
        compare(cluster, "broadcast", 1e6, devices=cluster.select("0,1"), root=2)
    apart = preset("aws-g4dn.12xlarge")
    with pytest.raises(DisconnectedError):
        compare(
            type(apart)(name="apart", accelerators=apart.accelerators, devices=apart.devices).validate(),
            "all_reduce",
            1e6,
        )
