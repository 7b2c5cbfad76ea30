"""Flows that share links: against the definition of max-min fairness, and against a network that recomputes all."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ClusterError, InputError
from headway.hardware.catalog import preset
from headway.hardware.cluster import Accelerator, Cluster, Device, Link
from headway.simulate import sharing
from headway.simulate.engine import Engine
from headway.simulate.network import Conditions, LinkChange, Network
from headway.simulate.shares import add_path, new_shares

KIND = Accelerator(name="a", flop_per_second={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e11)


def max_min(capacities: Sequence[float], paths: Sequence[Sequence[int]], weights: Sequence[float]) -> list[float]:
    """Rates by progressive filling, link by link, from nothing."""
    rates = [0.0] * len(paths)
    left = list(capacities)
    growing = set(range(len(paths)))
    while growing:
        bound = {
            link: max(0.0, left[link]) / sum(weights[flow] * paths[flow].count(link) for flow in growing)
            for link in range(len(left))
            if any(link in paths[flow] for flow in growing)
        }
        tightest = min(bound, key=lambda link: bound[link])
        for flow in sorted(growing):
            if tightest in paths[flow]:
                growing.remove(flow)
                rates[flow] = weights[flow] * bound[tightest]
                for link in paths[flow]:
                    left[link] -= rates[flow]
    return rates


def leaving_times(
    capacities: Sequence[float],
    flows: Sequence[tuple[float, Sequence[int], float, float]],
    changes: Sequence[tuple[float, int, float]] = (),
) -> list[float]:
    """When each flow (start, path, bytes, weight) has left, with links changed at (time, link, capacity)."""
    capacities = list(capacities)
    left = {number: size for number, (_, _, size, _) in enumerate(flows)}
    done = [math.inf] * len(flows)
    now = 0.0
    pending = sorted(changes)
    while left:
        while pending and pending[0][0] <= now:
            _, link, capacity = pending.pop(0)
            capacities[link] = capacity
        active = [number for number in left if flows[number][0] <= now]
        rates = max_min(capacities, [flows[number][1] for number in active], [flows[number][3] for number in active])
        ends = {
            number: now + left[number] / rate if rate else (math.inf if left[number] else now)
            for number, rate in zip(active, rates, strict=True)
        }
        times = [flows[number][0] for number in left if flows[number][0] > now]
        times += [time for time, _, _ in pending[:1]] + list(ends.values())
        following = min(times, default=math.inf)
        if following == math.inf:
            break
        for number, rate in zip(active, rates, strict=True):
            left[number] -= rate * (following - now)
            if ends[number] <= following * (1 + 1e-12):
                done[number] = following
                del left[number]
        now = following
    return done


def cluster_of(links, latency=0.0):
    """A cluster with these directed links, (source, target, bytes per second), among devices named in them."""
    names = dict.fromkeys(name for link in links for name in link[:2])
    return Cluster(
        name="drawn",
        accelerators={"a": KIND},
        devices=tuple(Device(name=name, accelerator="a", node="n") for name in names),
        links=tuple(
            Link(source=source, target=target, bytes_per_second=rate, latency_seconds=latency)
            for source, target, rate in links
        ),
    ).validate()


def line(rates, latency=0.0):
    """Devices 0, 1, 2, … joined one way by links of these rates; link k leads from k to k + 1."""
    return cluster_of([(str(at), str(at + 1), rate) for at, rate in enumerate(rates)], latency)


def played(capacities, flows, changes=(), **conditions):
    """When each flow has left; flows are (start, first link, last link, bytes, weight) on a line."""
    engine = Engine()
    network = Network(engine, line(capacities), conditions=Conditions(**conditions))
    left = [math.inf] * len(flows)

    def send(number, first, last, size, weight):
        flow = network.send([str(at) for at in range(first, last + 2)], size, weight=weight)
        flow.sent.then(lambda _: left.__setitem__(number, engine.now))

    for number, (start, *rest) in enumerate(flows):
        engine.call_at(start, send, number, *rest)
    network.schedule(
        LinkChange(seconds=time, source=str(link), target=str(link + 1), scale=capacity / capacities[link])
        for time, link, capacity in changes
    )
    engine.run()
    return left


# Sharing by itself.


class Played:
    """Shares beside a list of what flows there should be."""

    def __init__(self, capacities, paths, congestion=(1.0, 0.0, 0.0)):
        self.capacities, self.paths = list(capacities), paths
        slots = sum(map(len, paths))
        self.shares = new_shares(
            np.array(capacities, dtype=float), paths=len(paths), slots=slots, flows=64, congestion=congestion
        )
        for path in paths:
            add_path(self.shares, path)
        self.live = {}
        self.free = list(range(64))
        self.now = 0.0

    def add(self, path, size, weight):
        if self.free:
            flow = self.free.pop()
            self.live[flow] = (path, weight)
            sharing.add_flow(self.shares, flow, path, size, weight, self.now)

    def cancel(self, which):
        if self.live:
            flow = sorted(self.live)[which % len(self.live)]
            sharing.cancel_flow(self.shares, flow, self.now)
            del self.live[flow]
            self.free.append(flow)

    def change(self, link, capacity):
        self.capacities[link] = capacity
        sharing.change_capacity(self.shares, link, capacity)

    def finish(self):
        due = sharing.earliest(self.shares)
        if due < math.inf:
            self.now = due
            for flow in self.shares.flows["done"][: sharing.complete(self.shares, due)].tolist():
                del self.live[flow]
                self.free.append(flow)

    def check(self):
        flows = list(self.live.values())
        rates = max_min(self.capacities, [self.paths[path] for path, _ in flows], [weight for _, weight in flows])
        for (path, weight), rate in zip(flows, rates, strict=True):
            assert self.shares.paths["level"][path] * weight == pytest.approx(rate, rel=1e-9, abs=1e-9)


@st.composite
def histories(draw):
    """Links, paths, and lists of changes that each happen at one instant."""
    count = draw(st.integers(1, 8))
    capacities = draw(st.lists(st.sampled_from([1.0, 2.0, 5.0, 10.0, 100.0]), min_size=count, max_size=count))
    paths = draw(
        st.lists(st.lists(st.integers(0, count - 1), min_size=1, max_size=4, unique=True), min_size=1, max_size=10)
    )
    path = st.integers(0, len(paths) - 1)
    change = st.one_of(
        st.tuples(st.just("add"), path, st.sampled_from([1.0, 3.0, 7.3]), st.sampled_from([1.0, 1.0, 0.5, 3.0])),
        st.tuples(st.just("cancel"), st.integers(0, 63)),
        st.tuples(st.just("change"), st.integers(0, count - 1), st.sampled_from([0.0, 0.7, 4.0, 50.0])),
        st.tuples(st.just("finish")),
    )
    return capacities, paths, draw(st.lists(st.lists(change, min_size=1, max_size=3), min_size=1, max_size=25))


@given(histories())
@settings(deadline=None, max_examples=150)
def test_after_every_change_the_rates_are_max_min_fair(history):
    capacities, paths, instants = history
    play = Played(capacities, paths)
    for changes in instants:
        for kind, *values in changes:
            if kind == "finish":
                sharing.refill(play.shares, play.now)
            getattr(play, kind)(*values)
        sharing.refill(play.shares, play.now)
        play.check()


def levels_of(capacities: np.ndarray, uses: np.ndarray) -> np.ndarray:
    """Progressive filling in one table: `uses[link, path]` counts the flows of a path on a link."""
    left, growing, levels = capacities.copy(), np.ones(uses.shape[1], dtype=bool), np.zeros(uses.shape[1])
    while growing.any():
        count = uses[:, growing].sum(axis=1)
        bound = np.divide(left, count, out=np.full(len(left), math.inf), where=count > 0)
        tightest = int(bound.argmin())
        full = growing & (uses[tightest] > 0)
        levels[full] = max(0.0, bound[tightest])
        left -= uses[:, full].sum(axis=1) * levels[full][0]
        growing &= ~full
    return levels


@pytest.mark.parametrize("seed", range(4))
def test_a_crowd_on_a_real_machine_is_shared_fairly_through_hundreds_of_changes(seed):
    # 300 flows over paths of two to six links: many links fill at one level, and some in the middle of a refill.
    source = random.Random(seed)
    cluster = preset("dgx-h100:4")
    names = [device.name for device in cluster.devices]
    paths = [list(cluster.route(one, other)) for one in names for other in names if one != other]
    capacities = np.array([link.bytes_per_second for link in cluster.links])
    lies_on = np.zeros((len(capacities), len(paths)))
    for number, path in enumerate(paths):
        lies_on[path, number] = 1.0
    shares = new_shares(capacities, paths=len(paths), slots=sum(map(len, paths)), flows=300)
    for path in paths:
        add_path(shares, path)
    free, live, now = list(range(300)), {}, 0.0
    for step in range(900):
        for _ in range(min(source.randint(1, 4), len(free))):
            flow, path = free.pop(), source.randrange(len(paths))
            live[flow] = path
            sharing.add_flow(shares, flow, path, 24_000.0, 1.0, now)
        sharing.refill(shares, now)
        now = sharing.earliest(shares)
        for flow in shares.flows["done"][: sharing.complete(shares, now)].tolist():
            free.append(flow)
            del live[flow]
        sharing.refill(shares, now)
        if step % 7 == 0 and live:
            used, count = np.unique(list(live.values()), return_counts=True)
            right = levels_of(capacities, lies_on[:, used] * count)
            assert shares.paths["level"][used] == pytest.approx(right, rel=1e-9), f"step {step}"


def test_a_change_at_one_end_of_a_network_does_not_touch_the_other():
    # 30 pairs of links; on each one flow on the first link and one on both. Nothing joins the pairs.
    play = Played([1.0] * 60, [path for pair in range(30) for path in ([2 * pair], [2 * pair, 2 * pair + 1])])
    for path in range(60):
        play.add(path, 5.0, 1.0)
    assert sharing.refill(play.shares, 0.0) == 60
    play.add(0, 1.0, 1.0)
    assert sharing.refill(play.shares, 0.0) == 2
    play.check()


def test_a_link_that_is_not_full_does_not_carry_a_change_further():
    # Every flow passes the wide link 0 and one narrow link of its own.
    play = Played([1e6] + [1.0] * 40, [[0, 1 + number] for number in range(40)])
    for path in range(40):
        play.add(path, 5.0, 1.0)
    assert sharing.refill(play.shares, 0.0) == 40
    play.add(7, 5.0, 1.0)
    assert sharing.refill(play.shares, 0.0) == 1
    play.check()


def test_a_link_that_has_emptied_is_known_to_have_room():
    play = Played([10.5] + [1.0] * 20, [[0, 1 + number] for number in range(20)])
    for path in range(20):
        play.add(path, 5.0, 1.0)
    sharing.refill(play.shares, 0.0)
    for _ in range(15):
        play.cancel(0)
        sharing.refill(play.shares, 0.0)
    # Five are left on the shared link, which has room for ten: whoever comes concerns nobody else.
    for path in range(5, 10):
        play.add(path, 5.0, 1.0)
        assert sharing.refill(play.shares, 0.0) == 1
        play.check()


def test_a_message_that_takes_the_place_of_another_concerns_nobody_else():
    play = Played([1.0], [[0]])
    play.add(0, 1.0, 1.0)
    play.add(0, 2.0, 1.0)
    sharing.refill(play.shares, 0.0)
    play.finish()
    play.add(0, 9.0, 1.0)
    assert sharing.refill(play.shares, play.now) == 0
    assert sharing.earliest(play.shares) == 4.0


# The network in virtual time.

sizes = st.sampled_from([1.0, 2.0, 5.0, 12.5])


@st.composite
def scenarios(draw):
    count = draw(st.integers(1, 5))
    capacities = draw(st.lists(st.sampled_from([1.0, 2.0, 4.0, 10.0]), min_size=count, max_size=count))
    flows = []
    for _ in range(draw(st.integers(1, 12))):
        first = draw(st.integers(0, count - 1))
        last = draw(st.integers(first, count - 1))
        start = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.25]))
        flows.append((start, first, last, draw(sizes), draw(st.sampled_from([1.0, 1.0, 2.0, 0.25]))))
    change = st.tuples(
        st.sampled_from([0.0, 0.25, 1.0, 2.0]), st.integers(0, count - 1), st.sampled_from([0.0, 0.5, 1.0, 8.0])
    )
    changes = draw(st.lists(change, max_size=4, unique_by=lambda change: change[:2]))
    return capacities, flows, changes


@given(scenarios())
@settings(deadline=None, max_examples=100)
def test_every_flow_leaves_when_a_network_that_recomputes_everything_says(scenario):
    capacities, flows, changes = scenario
    expected = leaving_times(
        capacities,
        [(start, range(first, last + 1), size, weight) for start, first, last, size, weight in flows],
        changes,
    )
    assert played(capacities, flows, changes) == pytest.approx(expected, rel=1e-9)


@given(scenarios())
@settings(deadline=None, max_examples=25)
def test_two_runs_are_equal_to_the_last_bit(scenario):
    assert played(*scenario) == played(*scenario)


def test_a_message_arrives_a_latency_after_it_has_left_hops_and_start_included():
    engine = Engine()
    conditions = Conditions(hop_seconds=0.25, message_seconds=2.0)
    network = Network(engine, line([10.0, 5.0], latency=1.0), conditions=conditions)
    flow = network.send("012", 20.0)
    left = []
    flow.sent.then(lambda _: left.append(engine.now))
    engine.run(flow)
    assert left == [2.0 + 4.0]
    assert engine.now == 6.0 + 2 * (1.0 + 0.25)


def test_links_with_the_same_ends_are_one_link():
    engine = Engine()
    network = Network(engine, cluster_of([("a", "b", 3.0), ("a", "b", 5.0), ("b", "a", 1.0)]))
    engine.run(network.send("ab", 16.0))
    assert engine.now == 2.0


def test_an_empty_message_takes_the_latency_alone_and_one_to_oneself_nothing():
    engine = Engine()
    network = Network(engine, line([1.0], latency=0.5))
    engine.run(network.send("01", 0.0))
    assert engine.now == 0.5
    engine.run(network.send("0", 100.0))
    assert engine.now == 0.5


@pytest.mark.parametrize(("number", "share"), [(1, 1.0), (2, 1.0), (3, 0.9), (4, 0.8), (9, 0.75)])
def test_a_congested_link_loses_a_share_for_each_flow_too_many_down_to_its_floor(number, share):
    flows = [(0.0, 0, 0, 8.0, 1.0)] * number
    left = played([8.0], flows, congestion_free_flows=2, congestion_share=0.1, congestion_floor=0.75)
    assert left == pytest.approx([number / share] * number)


def test_the_rest_of_a_congested_crowd_speeds_up_when_somebody_leaves():
    left = played([1.0], [(0.0, 0, 0, 1.0, 1.0), (0.0, 0, 0, 2.0, 1.0)], congestion_share=0.5, congestion_floor=0.1)
    # Two at half speed: 1 byte each takes 4 s; then one byte alone.
    assert left == pytest.approx([4.0, 5.0])


def test_loss_costs_what_must_be_sent_again():
    assert played([10.0], [(0.0, 0, 0, 30.0, 1.0)], loss=0.25) == pytest.approx([4.0])


def test_who_waits_for_a_link_that_is_down_is_told_and_goes_on_when_it_is_up():
    engine = Engine()
    stalls = []
    network = Network(
        engine, line([1.0, 1.0]), on_stall=lambda flow: stalls.append((engine.now, flow.name, flow.is_stalled))
    )
    both = network.send("012", 10.0, name="both")
    network.send("01", 1.0, name="one")
    network.schedule(
        [
            LinkChange(seconds=3.0, source="1", target="2", scale=0.0),
            LinkChange(seconds=8.0, source="1", target="2", scale=0.5),
        ]
    )
    engine.run(5.0)
    assert stalls == [(3.0, "both", True)]
    assert network.stalled() == (both,)
    assert both.bytes_per_second == 0.0
    # 1 byte in the first 2 s beside the other, 1 more alone.
    assert both.remaining_bytes == pytest.approx(8.0)
    late = network.send("12", 1.0, name="late")
    engine.run(6.0)
    assert stalls[1:] == [(5.0, "late", True)]
    late.cancel()
    engine.run(both.sent)
    assert not both.is_stalled
    assert network.stalled() == ()
    assert engine.now == pytest.approx(8.0 + 8.0 / 0.5)


def test_a_cancelled_flow_gives_its_share_back_and_never_arrives():
    engine = Engine()
    network = Network(engine, line([2.0]))
    one, other = network.send("01", 4.0), network.send("01", 4.0)
    engine.run(1.0)
    assert one.cancel() == pytest.approx(3.0)
    assert one.cancel() == 0.0
    engine.run(other)
    assert engine.now == pytest.approx(1.0 + 1.5)
    engine.run()
    assert not one.happened
    assert not one.sent.happened


def test_a_flow_can_be_cancelled_before_its_first_byte():
    engine = Engine()
    network = Network(engine, line([1.0]), conditions=Conditions(message_seconds=1.0))
    flow = network.send("01", 5.0)
    assert flow.cancel() == 5.0
    engine.run()
    assert not flow.happened
    network = Network(engine, line([1.0]))
    flow = network.send("01", 5.0)
    assert flow.remaining_bytes == 5.0
    assert flow.cancel() == 5.0
    engine.run()
    assert not flow.happened


def test_loads_are_what_flows_take_and_never_more_than_a_link_has():
    engine = Engine()
    network = Network(engine, line([4.0, 2.0]))
    flows = [network.send("012", 10.0), network.send("01", 10.0), network.send("12", 10.0)]
    engine.run(1.0)
    assert [flow.bytes_per_second for flow in flows] == [1.0, 3.0, 1.0]
    assert (network.load("0", "1"), network.load("1", "2")) == (4.0, 2.0)


def test_many_flows_on_many_paths_need_no_room_set_aside():
    engine = Engine()
    rates = [1.0] * 12
    network = Network(engine, line(rates))
    flows = [
        network.send([str(at) for at in range(first, last + 2)], 1.0)
        for first, last in itertools.combinations_with_replacement(range(12), 2)
        for _ in range(3)
    ]
    engine.run(engine.all_of(*flows))
    assert network.flows_ended == len(flows) == 234
    # The links in the middle carry the most: 2 * (6 * 7) flows, three times over, each of one byte.
    assert engine.now == pytest.approx(max(3 * (at + 1) * (12 - at) for at in range(12)))


def test_what_cannot_be_is_refused():
    engine = Engine()
    network = Network(engine, line([1.0]))
    with pytest.raises(ClusterError, match="no link leads from 1 to 0"):
        network.send("10", 1.0)
    for size, weight in ((-1.0, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, -1.0), (math.nan, 1.0)):
        with pytest.raises(InputError, match="a message of"):
            network.send("01", size, weight=weight)
    with pytest.raises(InputError, match="a change at"):
        network.change("0", "1", -0.5)
    for wrong in ({"loss": 1.0}, {"congestion_floor": 0.0}, {"hop_seconds": -1.0}, {"message_seconds": math.inf}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Network(engine, line([1.0]), conditions=msgspec.structs.replace(Conditions(), **wrong))


def test_what_is_through_when_a_link_goes_down_but_for_rounding_does_not_wait_for_it():
    # 0.1 + 0.2 seconds are 0.30000000000000004, a moment after the link is gone.
    left = played([1.0], [(0.1, 0, 0, 0.2, 1.0)], [(0.3, 0, 0.0), (9.0, 0, 1.0)])
    assert left == pytest.approx([0.3])
