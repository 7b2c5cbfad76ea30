"""The background thread on real processes: what goes wrong is told to everybody, and settings hold for everybody."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import horovod_ranks

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("horovod")]

SCENARIOS = [
    "a_mismatch_is_raised_on_every_rank_and_the_run_goes_on",
    "a_timeline_shows_negotiation_and_exchange",
    "settings_of_rank_0_hold_for_all_and_thresholds_fuse",
    "the_autotuner_changes_settings_on_all_ranks_while_the_sums_stay_right",
    "a_stall_is_a_warning_that_names_tensor_and_rank_then_an_error_on_every_rank",
    "a_rank_that_leaves_is_named_by_those_that_wait_for_it",
]
DEATHS = {
    "a_killed_rank_is_named_by_every_survivor": (3, 2),
    "a_killed_coordinator_is_named_by_every_survivor": (3, 0),
    "a_silent_rank_is_named_by_every_other": (3, 1),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    deaths = [(size, [scenario]) for scenario, (size, _) in DEATHS.items()]
    return horovod_ranks.run(tmp_path_factory.mktemp("controller"), (3, SCENARIOS), *deaths)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_three_ranks(outcomes, scenario):
    assert outcomes[scenario] == ["", "", ""]


@pytest.mark.parametrize("scenario", DEATHS)
def test_a_rank_that_is_lost_ends_the_exchange_on_every_other(outcomes, scenario):
    size, victim = DEATHS[scenario]
    assert outcomes[scenario] == ["killed" if rank == victim else "" for rank in range(size)]
