"""Servers, gossip and BytePS: proven by symbolic execution or on arrays, against properties and linear programs."""

from __future__ import annotations

import itertools

import highspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.decentralized import (
    byteps_program,
    byteps_split,
    gossip_program,
    gossip_targets,
    parameter_server_program,
    push_sum_round,
    rolling_rounds,
    rolling_server,
    rolling_server_program,
    sharded_server_program,
)
from headway.collective.program import Program
from headway.collective.reference import evaluate
from headway.collective.verify import verify
from headway.errors import DisconnectedError, InputError, ProgramError
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Cluster

DGX = load_cluster("dgx-1v")
PAIR = load_cluster("dgx-a100:2")


def names(cluster: Cluster, count: int) -> list[str]:
    return [device.name for device in cluster.devices[:count]]


def sent(program: Program, rank: int) -> float:
    """Shares of the vector that a rank sends."""
    return sum(program.fraction(transfer.chunk) for transfer in program.transfers if transfer.source == rank)


# --- Parameter servers ---


@given(size=st.integers(1, 8), data=st.data())
@settings(deadline=None, max_examples=25)
def test_servers_all_reduce(size, data):
    devices = names(DGX, size)
    server = data.draw(st.integers(0, size - 1))
    single = parameter_server_program(DGX, devices, server=server)
    sharded = sharded_server_program(DGX, devices)
    for program in (single, sharded):
        assert verify(program).collective == "all_reduce"
    # One server sends the whole to each of the others; in shards all send alike, and as little as a ring.
    assert sent(single, server) == size - 1
    for rank in range(size):
        assert sent(sharded, rank) == pytest.approx(2 * (size - 1) / size)


def test_servers_work_across_machines():
    verify(parameter_server_program(PAIR, server=9))
    verify(sharded_server_program(PAIR))


@given(size=st.integers(1, 8), start=st.integers(0, 100), data=st.data())
def test_the_rolling_server_lives_and_the_role_moves_on(size, start, data):
    dead = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    servers = [rolling_server(size, start + step, dead) for step in range(size)]
    assert set(servers) == set(range(size)) - dead  # each living rank has its turn
    for step, server in enumerate(servers):
        passed = (server - start - step) % size
        assert all((start + step + skipped) % size in dead for skipped in range(passed))  # only the dead are skipped


@given(size=st.integers(2, 8), number=st.integers(0, 100), data=st.data())
def test_those_who_missed_a_death_agree_on_all_rounds_but_the_dead_ranks(size, number, data):
    dead = data.draw(st.integers(0, size - 1))
    if number % size != dead:
        assert rolling_server(size, number) == rolling_server(size, number, {dead})


def test_rolling_rounds_take_notice_of_deaths_between_rounds():
    dead: set[int] = set()
    rounds = rolling_rounds(DGX, names(DGX, 4), dead=dead)
    assert [next(rounds).server for _ in range(3)] == [0, 1, 2]
    dead.add(3)
    late = next(rounds)
    assert (late.number, late.server, late.living) == (3, 0, (0, 1, 2))
    assert verify(late.program).ranks == 3
    dead.update({0, 2})
    lonely = next(rounds)
    assert (lonely.server, lonely.program.transfers) == (1, ())


@given(size=st.integers(2, 8), number=st.integers(0, 20), data=st.data())
@settings(deadline=None, max_examples=25)
def test_each_rolling_round_all_reduces_among_the_living(size, number, data):
    dead = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    devices = names(DGX, size)
    program = rolling_server_program(DGX, devices, round=number, dead=dead)
    assert verify(program).ranks == size - len(dead)
    server = program.devices.index(devices[rolling_server(size, number, dead)])
    assert all(server in (transfer.source, transfer.target) for transfer in program.transfers)


def test_servers_refuse_what_cannot_be():
    with pytest.raises(ProgramError, match="no rank 8"):
        parameter_server_program(DGX, server=8)
    with pytest.raises(ProgramError, match="no rank lives"):
        rolling_server(3, 5, {0, 1, 2})
    apart = Cluster(name="apart", accelerators=DGX.accelerators, devices=DGX.devices)
    with pytest.raises(DisconnectedError):
        sharded_server_program(apart)


# --- Gossip ---


@given(size=st.integers(2, 9), number=st.integers(0, 1000), seed=st.integers(0, 1000), data=st.data())
def test_gossip_draws_different_peers_from_the_seed(size, number, seed, data):
    fanout = data.draw(st.integers(1, size - 1))
    targets = gossip_targets(size, number, fanout=fanout, seed=seed)
    assert targets == gossip_targets(size, number, fanout=fanout, seed=seed)
    assert len(targets) == size
    for rank, peers in enumerate(targets):
        assert len(set(peers)) == fanout
        assert set(peers) <= set(range(size)) - {rank}


def test_gossip_draws_every_pair_about_equally_often():
    counts = np.zeros((5, 5))
    for number in range(2000):
        for rank, peers in enumerate(gossip_targets(5, number, fanout=2, seed=1)):
            counts[rank, list(peers)] += 1
    # Each of the 20 pairs is drawn with probability 1/2: 1000 times, with a standard deviation of 22.
    off_diagonal = counts[~np.eye(5, dtype=bool)]
    assert np.abs(off_diagonal - 1000).max() < 5 * 22.4


def gossip(values: np.ndarray, rounds: int, fanout: int, seed: int, loss: float, kept: bool):
    weights = np.ones(len(values))
    random = np.random.default_rng(seed)
    for number in range(rounds):
        targets = gossip_targets(len(values), number, fanout=fanout, seed=seed)
        pairs = [(source, target) for source, peers in enumerate(targets) for target in peers]
        lost = {pair for pair in pairs if random.random() < loss}
        values, weights = push_sum_round(values, weights, targets, lost=lost, kept=kept)
    return values, weights


drawn_values = st.integers(2, 9).flatmap(
    lambda size: st.lists(st.lists(st.floats(-100, 100), min_size=2, max_size=2), min_size=size, max_size=size)
)


@given(rows=drawn_values, seed=st.integers(0, 10_000), loss=st.sampled_from([0.0, 0.2]), data=st.data())
@settings(deadline=None, max_examples=30)
def test_gossip_conserves_mass_and_goes_to_the_mean_even_where_messages_are_lost(rows, seed, loss, data):
    start = np.array(rows)
    fanout = data.draw(st.integers(1, min(3, len(rows) - 1)))
    values, weights = gossip(start, 150, fanout, seed, loss, kept=True)
    assert values.sum(axis=0) == pytest.approx(start.sum(axis=0), abs=1e-6)
    assert weights.sum() == pytest.approx(len(rows))
    estimates = values / weights[:, None]
    assert estimates == pytest.approx(np.broadcast_to(start.mean(axis=0), start.shape), abs=1e-3)


@given(rows=drawn_values, seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_without_conservation_the_estimates_agree_on_what_remains(rows, seed):
    start = np.array(rows)
    values, weights = gossip(start, 150, 1, seed, 0.2, kept=False)
    assert 0 < weights.sum() < len(rows)
    remaining = values.sum(axis=0) / weights.sum()
    assert values / weights[:, None] == pytest.approx(np.broadcast_to(remaining, start.shape), abs=1e-3)
    assert (remaining >= start.min(axis=0) - 1e-6).all()  # still a mean, with uneven weights
    assert (remaining <= start.max(axis=0) + 1e-6).all()


def test_the_living_go_to_the_quotient_of_their_own_sums_when_a_rank_dies():
    start = np.array([1.0, 5.0, 9.0, 100.0])
    values, weights = start.copy(), np.ones(4)
    for number in range(100):
        targets = gossip_targets(4, number, seed=3)
        pairs = {(source, target) for source, peers in enumerate(targets) for target in peers}
        lost = {pair for pair in pairs if 3 in pair}  # rank 3 is dead from the first
        values, weights = push_sum_round(values, weights, targets, lost=lost)
    assert values[:3] / weights[:3] == pytest.approx([5.0] * 3)
    assert weights.sum() == pytest.approx(4)


def test_a_gossip_program_sends_to_the_drawn_peers_and_waits_for_what_came_before():
    program = gossip_program(PAIR, names(PAIR, 6), rounds=3, fanout=2, seed=7)
    pairs = [(transfer.source, transfer.target) for transfer in program.transfers]
    drawn = [gossip_targets(6, number, fanout=2, seed=7) for number in range(3)]
    assert pairs == [(s, t) for targets in drawn for s, peers in enumerate(targets) for t in peers]
    for position, transfer in enumerate(program.transfers):
        before = position // 12 * 12
        assert transfer.after == tuple(at for at in range(before) if pairs[at][1] == transfer.source)
    with pytest.raises(ProgramError):
        verify(program)  # it is no collective, and does not claim to be one
    with pytest.raises(ProgramError, match="6 different peers"):
        gossip_program(PAIR, names(PAIR, 6), fanout=6)


# --- BytePS ---


def fastest_by_linear_program(workers: int, helpers: int) -> float:
    """Least time for M = B = 1 when every machine may have a share of its own."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    time = solver.addVariable(lb=0)
    shares = [solver.addVariable(lb=0) for _ in range(workers + helpers)]
    solver.addConstr(sum(shares[1:], shares[0]) == 1)
    for worker in range(workers):
        # It sends what others add up, and what it added up to the other workers; it receives as much.
        solver.addConstr(time >= 1 - shares[worker] + (workers - 1) * shares[worker])
    for helper in range(workers, workers + helpers):
        solver.addConstr(time >= workers * shares[helper])
    solver.minimize(time)
    return solver.getObjectiveValue()


@pytest.mark.parametrize(("workers", "helpers"), [*itertools.product(range(2, 9), range(11))])
def test_no_other_split_is_faster_than_byteps(workers, helpers):
    split = byteps_split(1.0, workers, helpers, 1.0)
    assert split.seconds == pytest.approx(fastest_by_linear_program(workers, helpers))
    assert workers * split.worker_bytes + helpers * split.helper_bytes == pytest.approx(1)


@given(workers=st.integers(2, 64), helpers=st.integers(0, 64), size=st.floats(1, 1e9), rate=st.floats(1e6, 1e11))
def test_byteps_takes_the_papers_time_between_a_ring_and_one_crossing(workers, helpers, size, rate):
    n, k = workers, helpers
    seconds = byteps_split(size, n, k, rate).seconds
    if k <= n:
        assert seconds == pytest.approx(2 * n * (n - 1) * size / ((n * n + k * n - 2 * k) * rate))
    else:
        assert seconds == pytest.approx(size / rate)
    assert byteps_split(size, n, 0, rate).seconds == pytest.approx(2 * (n - 1) / n * size / rate)  # a ring
    assert byteps_split(size, n, n, rate).seconds == pytest.approx(size / rate)


@pytest.mark.parametrize(("workers", "helpers"), [(1, 0), (1, 2), (2, 1), (3, 2), (4, 0), (4, 4), (3, 5), (6, 1)])
def test_a_byteps_program_gives_every_worker_the_sum_and_sends_what_the_split_says(workers, helpers):
    devices = names(PAIR, workers + helpers)
    program = byteps_program(PAIR, devices[:workers], devices[workers:])
    random = np.random.default_rng(0)
    vectors = [random.integers(-9, 9, 4 * program.unit).astype(float) for _ in range(workers)]
    zeros = [np.zeros(4 * program.unit)] * helpers
    for result in evaluate(program, vectors + zeros)[:workers]:
        assert (result == sum(vectors)).all()
    busiest = max(sent(program, rank) for rank in range(workers + helpers))
    assert busiest == pytest.approx(byteps_split(1.0, workers, helpers, 1.0).seconds)
    if not helpers:
        verify(program)
    elif workers > 1:
        with pytest.raises(ProgramError):
            verify(program)  # helpers contribute nothing, which a collective does not know


def test_byteps_refuses_what_cannot_be():
    for arguments in ((-1.0, 2, 1, 1.0), (1.0, 0, 1, 1.0), (1.0, 2, -1, 1.0), (1.0, 2, 1, 0.0)):
        with pytest.raises(InputError):
            byteps_split(*arguments)
    with pytest.raises(ProgramError, match="no workers"):
        byteps_program(PAIR, [])
    assert byteps_split(1.0, 1, 3, 1.0).seconds == 0
