"""The negotiation, played: any number of ranks, any order, any delay; every message goes through its bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError, RankFailedError, StalledError
from headway.exchange.negotiation import Answer, Coordinator, Message, Negotiator, Outcome, Response, Submission

thorough = settings(deadline=None, max_examples=120)


@dataclass
class Cluster:
    """Ranks that go through cycles in virtual time, and what each of them was told to do."""

    size: int
    capacity: int = 64
    threshold_bytes: float = 400
    stall_seconds: float = 10.0
    stall_error_seconds: float = 0.0
    now: float = 0.0
    done: list[list[tuple[str, ...]]] = field(default_factory=list)  # by rank: batches of names, in order
    outcomes: list[list[Outcome]] = field(default_factory=list)
    told: int = 0  # submissions that were sent in full
    answered: int = 0  # responses that were sent in full
    longest_bytes: int = 0  # the longest message or answer

    def __post_init__(self) -> None:
        self.ranks = [
            Negotiator(
                rank,
                self.size,
                capacity=self.capacity,
                threshold_bytes=self.threshold_bytes,
                stall_seconds=self.stall_seconds,
            )
            for rank in range(self.size)
        ]
        self.coordinator = Coordinator(
            self.size,
            capacity=self.capacity,
            stall_seconds=self.stall_seconds,
            stall_error_seconds=self.stall_error_seconds,
        )
        self.done = [[] for _ in self.ranks]

    def submit(self, rank: int, *submissions: Submission) -> None:
        self.ranks[rank].submit(submissions, self.now)

    def everywhere(self, *submissions: Submission) -> None:
        for rank in range(self.size):
            self.submit(rank, *submissions)

    def cycle(self, seconds: float = 0.001) -> list[Outcome]:
        self.now += seconds
        messages = [over_the_wire(rank.message(self.now), Message) for rank in self.ranks]
        answer = over_the_wire(self.coordinator.answer(messages, self.now), Answer)
        self.longest_bytes = max(self.longest_bytes, *(len(msgspec.msgpack.encode(m)) for m in (*messages, answer)))
        self.told += sum(len(message.submissions) for message in messages)
        self.answered += len(answer.responses)
        outcomes = [rank.take(answer, self.now) for rank in self.ranks]
        for done, outcome in zip(self.done, outcomes):
            done.extend(names(batch) for batch in outcome.batches)
        self.outcomes.append(outcomes)
        assert all(outcome == outcomes[0] for outcome in outcomes), "ranks were told to do different things"
        return outcomes

    def errors(self) -> list[str]:
        return [response.error for outcomes in self.outcomes for response in outcomes[0].errors]

    def until_idle(self, limit: int = 200) -> None:
        for _ in range(limit):
            self.cycle()
            if all(rank.is_idle for rank in self.ranks):
                return
        raise AssertionError(f"still waiting: {[rank.waiting[:5] for rank in self.ranks]}")


def over_the_wire(value, kind):
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=kind)


def names(batch: tuple[Response, ...]) -> tuple[str, ...]:
    return tuple(response.submission.name for response in batch)


def summed(name: str, *shape: int, **more) -> Submission:
    return Submission(name=name, operation="all_reduce", shape=shape or (10,), reduction="sum", **more)


shapes = st.tuples(st.integers(1, 40)) | st.tuples(st.integers(0, 5), st.integers(1, 5))
tensors = st.dictionaries(
    st.integers(0, 11),
    st.builds(
        lambda shape, half, operation, priority: Submission(
            name="",
            operation=operation,
            shape=shape,
            dtype="float16" if half else "float32",
            element_bytes=2 if half else 4,
            reduction="sum" if operation == "all_reduce" else "",
            root=0 if operation == "broadcast" else -1,
            priority=priority,
        ),
        shapes,
        st.booleans(),
        st.sampled_from(["all_reduce", "all_reduce", "all_reduce", "all_gather", "broadcast", "barrier"]),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=12,
)


@thorough
@given(
    tensors=tensors,
    size=st.integers(1, 5),
    steps=st.integers(1, 5),
    capacity=st.sampled_from([0, 1, 3, 8, 64]),
    threshold=st.sampled_from([0, 100, 400, 10**9]),
    seed=st.integers(0, 10**6),
)
def test_all_ranks_do_the_same_in_the_same_order_and_nothing_is_lost(tensors, size, steps, capacity, threshold, seed):
    chance = random.Random(seed)
    cluster = Cluster(size, capacity=capacity, threshold_bytes=threshold)
    given_ = [msgspec.structs.replace(tensor, name=f"t{number}") for number, tensor in tensors.items()]
    for step in range(steps):
        queues = []
        for _ in range(size):
            queue = list(given_)
            chance.shuffle(queue)
            queues.append(queue)
        while any(queues):
            for rank, queue in enumerate(queues):
                for _ in range(chance.choice([0, 0, 1, 3])):
                    if queue:
                        cluster.submit(rank, queue.pop())
            cluster.cycle(chance.choice([0.0, 0.001, 1.0]))
        cluster.until_idle()
        for done in cluster.done:
            executed = sorted(name for batch in done for name in batch)
            assert executed == sorted(tensor.name for tensor in given_ for _ in range(step + 1))
    assert not cluster.errors()


@thorough
@given(size=st.integers(1, 4), count=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_a_step_that_repeats_needs_only_bits(size, count, seed):
    chance = random.Random(seed)
    cluster = Cluster(size)
    for step in range(4):
        told, answered = cluster.told, cluster.answered
        for rank in range(size):
            for number in chance.sample(range(count), count):
                cluster.submit(rank, summed(f"t{number}"))
                if chance.random() < 0.3:
                    cluster.cycle()
        cluster.until_idle()
        if step:
            assert (cluster.told, cluster.answered) == (told, answered)
        else:
            assert (cluster.told, cluster.answered) == (size * count, count)


def test_the_message_of_a_repeated_step_is_as_long_as_the_bits():
    cluster = Cluster(2, capacity=1024)
    for _ in range(2):
        cluster.everywhere(*(summed(f"layer{number}.weight") for number in range(200)))
        cluster.longest_bytes = 0
        cluster.until_idle()
    assert cluster.longest_bytes <= 1024 * 2 // 8 + 40


def test_tensors_that_are_ready_together_are_fused_up_to_the_threshold():
    cluster = Cluster(2, threshold_bytes=100)
    cluster.everywhere(*(summed(f"t{number}", 10) for number in range(5)))  # 40 bytes each
    cluster.until_idle()
    assert cluster.done[0] == [("t0", "t1"), ("t2", "t3"), ("t4",)]


def test_what_the_next_step_needs_first_goes_first():
    cluster = Cluster(2, threshold_bytes=0)
    for _ in range(2):  # told in full, then by bits
        cluster.everywhere(*(summed(f"layer{number}", priority=-number) for number in (3, 2, 1, 0)))
        cluster.until_idle()
    assert cluster.done[1] == [("layer0",), ("layer1",), ("layer2",), ("layer3",)] * 2


different = [
    ("shape", summed("w", 10, 20), summed("w", 10, 21), ["(10, 20)", "(10, 21)"]),
    ("number of dimensions", summed("w", 10), summed("w", 10, 1), ["1", "2"]),
    ("dtype", summed("w"), summed("w", dtype="float16", element_bytes=2), ["float32", "float16"]),
    ("device", summed("w"), summed("w", device="cuda"), ["cpu", "cuda"]),
    ("operation", summed("w"), Submission(name="w", operation="all_gather", shape=(10,)), ["all_reduce", "all_gather"]),
    ("reduction", summed("w"), msgspec.structs.replace(summed("w"), reduction="max"), ["sum", "max"]),
    (
        "root",
        Submission(name="w", operation="broadcast", shape=(3,), root=0),
        Submission(name="w", operation="broadcast", shape=(3,), root=2),
        ["0", "2"],
    ),
    ("factors", summed("w"), summed("w", postscale=0.5), ["(1.0, 1.0)", "(1.0, 0.5)"]),
    (
        "shape",
        Submission(name="w", operation="all_gather", shape=(3, 4)),
        Submission(name="w", operation="all_gather", shape=(5, 6)),
        ["(3, 4)", "(5, 6)"],
    ),
    (
        "shape",
        Submission(name="w", operation="reduce_scatter", reduction="sum", shape=(3, 4)),
        Submission(name="w", operation="reduce_scatter", reduction="sum", shape=(5, 4)),
        ["(3, 4)", "(5, 4)"],
    ),
]


@pytest.mark.parametrize(
    ("aspect", "one", "other", "texts"), different, ids=[f"{case[0]}-{case[1].operation}" for case in different]
)
@pytest.mark.parametrize("known", [False, True], ids=["first time", "after it fitted once"])
def test_what_does_not_fit_is_told_to_every_rank_with_what_each_submitted(aspect, one, other, texts, known):
    cluster = Cluster(3)
    if known:
        cluster.everywhere(one)
        cluster.until_idle()
    for rank in range(3):
        cluster.submit(rank, other if rank == 1 else one)
    cluster.until_idle()
    (error,) = cluster.errors()
    assert "tensor 'w'" in error
    assert f"different {aspect}" in error
    assert "ranks 0, 2: " in error
    assert "rank 1: " in error
    assert all(text in error for text in texts)
    # The run goes on, with the same tensor too.
    cluster.everywhere(one, summed("v"))
    cluster.until_idle()
    assert len(cluster.errors()) == 1
    assert sorted(name for batch in cluster.done[2] for name in batch) == ["v", *["w"] * (1 + known)]


@thorough
@given(size=st.integers(2, 4), seed=st.integers(0, 10**6), capacity=st.sampled_from([0, 4, 64]))
def test_under_random_changes_of_shape_each_tensor_is_exchanged_or_refused_exactly_once(size, seed, capacity):
    chance = random.Random(seed)
    cluster = Cluster(size, capacity=capacity)
    expected = {"done": 0, "refused": 0}
    for _ in range(6):
        for number in range(5):
            shapes = [chance.choice([1, 2]) for _ in range(size)] if chance.random() < 0.5 else [1] * size
            expected["done" if len(set(shapes)) == 1 else "refused"] += 1
            for rank, shape in enumerate(shapes):
                cluster.submit(rank, summed(f"t{number}", shape))
                if chance.random() < 0.2:
                    cluster.cycle()
        cluster.until_idle()
    assert sum(len(batch) for batch in cluster.done[0]) == expected["done"]
    assert len(cluster.errors()) == expected["refused"]


def test_rows_may_differ_in_all_gather_and_change_from_step_to_step():
    cluster = Cluster(3)
    for rows in ([1, 2, 3], [1, 2, 3], [1, 5, 3]):
        for rank in range(3):
            cluster.submit(rank, Submission(name="g", operation="all_gather", shape=(rows[rank], 4)))
        cluster.until_idle()
        sizes = [batch[0].sizes for outcomes in cluster.outcomes for batch in outcomes[0].batches]
        assert sizes[-1] == tuple(rows)
    assert cluster.answered == 2  # the second time by its bit


def test_all_to_all_tells_everybody_how_many_rows_come_from_whom():
    cluster = Cluster(2)
    for rank, splits in enumerate([(1, 3), (2, 0)]):
        cluster.submit(rank, Submission(name="a", operation="all_to_all", shape=(sum(splits), 2), splits=splits))
    cluster.until_idle()
    (batch,) = [batch for outcomes in cluster.outcomes for batch in outcomes[1].batches]
    assert batch[0].sizes == (1, 3, 2, 0)


def test_a_stalled_tensor_is_named_on_every_rank_with_who_is_missing_first_as_a_warning_then_as_an_error():
    cluster = Cluster(4, stall_seconds=10, stall_error_seconds=35)
    for rank in (0, 3):
        cluster.submit(rank, summed("late"))
    warnings = []
    while not cluster.outcomes or cluster.outcomes[-1][0].ending is None:
        warnings += cluster.cycle(1.0)[2].stalls
        assert cluster.now < 100
    assert [(stall.name, stall.ready, stall.missing) for stall in warnings] == [("late", (0, 3), (1, 2))] * 4
    assert [stall.seconds for stall in warnings[:3]] == pytest.approx([10, 20, 30], abs=1.1)
    assert 35 <= cluster.now <= 37
    for rank in cluster.ranks:
        with pytest.raises(StalledError, match=r"tensor 'late': ranks 1, 2 did not submit it, ranks 0, 3 waited 3"):
            rank.submit([summed("other")], cluster.now)


def test_a_stall_is_seen_when_the_tensor_is_in_the_cache_too_and_ends_when_it_comes():
    cluster = Cluster(3, stall_seconds=10)
    cluster.everywhere(summed("w"))
    cluster.until_idle()
    cluster.submit(1, summed("w"))
    stalls = [stall for _ in range(15) for stall in cluster.cycle(1.0)[0].stalls]
    assert [(stall.name, stall.missing) for stall in stalls] == [("w", (0, 2))]
    assert stalls[0].seconds < 13
    for rank in (0, 2):
        cluster.submit(rank, summed("w"))
    cluster.until_idle()
    assert cluster.done[0] == [("w",), ("w",)]


@thorough
@given(size=st.integers(1, 5), seed=st.integers(0, 10**6), ahead=st.booleans())
def test_ranks_that_have_joined_take_part_until_all_have_and_all_learn_who_was_last(size, seed, ahead):
    chance = random.Random(seed)
    cluster = Cluster(size)
    for _ in range(2):  # the second time everything is in the cache
        steps = [chance.randint(1, 4) for _ in range(size)]
        before, moments, done_before = list(steps), [-1] * size, len(cluster.done[0])
        left = list(steps)
        joined = [False] * size
        for moment in range(1000):
            for rank in range(size):
                if cluster.ranks[rank].waiting and not ahead:
                    continue
                if (
                    left[rank]
                    and chance.random() < 0.7
                    and f"t{before[rank] - left[rank]}" not in cluster.ranks[rank].waiting
                ):
                    cluster.submit(rank, summed(f"t{before[rank] - left[rank]}"))
                    left[rank] -= 1
                elif not left[rank] and not joined[rank]:
                    cluster.ranks[rank].join()
                    joined[rank], moments[rank] = True, moment
            outcomes = cluster.cycle()
            joins = [batch[0] for batch in outcomes[0].batches if batch[0].submission.operation == "join"]
            if joins:
                break
        else:
            raise AssertionError("join never came")
        assert all(joined)
        assert all(rank.is_idle for rank in cluster.ranks)
        executed = sorted(name for batch in cluster.done[0][done_before:] for name in batch)
        assert executed == sorted(["headway.join", *(f"t{number}" for number in range(max(steps)))])
        assert steps[joins[0].value] == max(steps) or ahead
    assert not cluster.errors()


def test_a_rank_that_has_joined_cannot_be_the_root_of_a_broadcast():
    cluster = Cluster(2)
    cluster.ranks[1].join()
    cluster.submit(0, Submission(name="b", operation="broadcast", shape=(2,), root=1))
    cluster.submit(0, Submission(name="c", operation="broadcast", shape=(2,), root=0))
    cluster.submit(0, msgspec.structs.replace(summed("m"), reduction="max"))
    for _ in range(3):
        cluster.cycle()
    assert ["'b'" in cluster.errors()[0], "'m'" in cluster.errors()[1], len(cluster.errors())] == [True, True, 2]
    assert "rank 1 joined" in cluster.errors()[0]
    assert cluster.done[0] == [("c",)]


def test_a_process_set_needs_only_its_own_ranks_and_names_do_not_clash():
    cluster = Cluster(4)
    cluster.everywhere(Submission(name="set", operation="add_process_set", splits=(1, 3)))
    cluster.until_idle()
    assert all(rank.sets == {0: (0, 1, 2, 3), 1: (1, 3)} for rank in cluster.ranks)
    for _ in range(3):
        for rank in (1, 3):
            cluster.submit(rank, summed("w", 5, process_set=1))
        cluster.everywhere(summed("w", 7))
        cluster.until_idle()
    assert cluster.answered == 3  # the set, and each of both tensors once
    with pytest.raises(InputError, match=r"rank 0 is not in process set 1, which has ranks 1, 3"):
        cluster.submit(0, summed("v", process_set=1))
    cluster.everywhere(Submission(name="no set", operation="remove_process_set", root=1))
    cluster.until_idle()
    with pytest.raises(InputError, match="does not exist"):
        cluster.submit(1, summed("w", 5, process_set=1))
    cluster.everywhere(summed("w", 7))
    cluster.until_idle()


def test_ranks_must_agree_on_who_is_in_a_process_set():
    cluster = Cluster(2)
    for rank in range(2):
        cluster.submit(rank, Submission(name="set", operation="add_process_set", splits=(0, rank)))
    cluster.until_idle()
    assert "different ranks: rank 0: (0, 0); rank 1: (0, 1)" in cluster.errors()[0]


@thorough
@given(
    size=st.integers(1, 4),
    members=st.integers(1, 5),
    capacity=st.sampled_from([0, 2, 5, 64]),
    seed=st.integers(0, 10**6),
)
def test_a_group_is_exchanged_whole_or_not_at_all(size, members, capacity, seed):
    chance = random.Random(seed)
    cluster = Cluster(size, capacity=capacity, threshold_bytes=10**9)
    for _ in range(5):
        odd = chance.random() < 0.3
        order = list(range(size))
        chance.shuffle(order)
        for rank in order:
            group = [summed(f"g{i}", group="g", group_size=members) for i in range(members)]
            if odd and rank == order[0] and size > 1:
                group[-1] = msgspec.structs.replace(group[-1], shape=(3,))
            if chance.random() < 0.5:
                cluster.submit(rank, summed("single0"), *group)
            else:
                cluster.submit(rank, *group)
                cluster.cycle()
                cluster.submit(rank, summed("single0"))
            cluster.cycle()
        cluster.until_idle()
    whole = tuple(f"g{i}" for i in range(members))
    done = [tuple(sorted(batch)) for batch in cluster.done[0]]
    assert set(done) <= {whole, ("single0",)}
    assert done.count(("single0",)) == 5
    assert done.count(whole) + len(cluster.errors()) / members == 5


def test_a_name_cannot_be_used_twice_at_once():
    cluster = Cluster(2)
    cluster.submit(0, summed("w"))
    with pytest.raises(InputError, match="still being exchanged"):
        cluster.submit(0, summed("w"))
    with pytest.raises(InputError, match="still being exchanged"):
        cluster.submit(1, summed("v"), summed("v"))
    assert cluster.ranks[1].is_idle  # all or nothing


def test_shutting_down_ends_it_for_everybody_after_what_was_ready():
    cluster = Cluster(3)
    cluster.everywhere(summed("w"))
    cluster.submit(0, summed("v"))
    cluster.ranks[2].stop()
    outcomes = cluster.cycle()
    assert outcomes[0].stopped == (2,)
    assert names(outcomes[0].batches[0]) == ("w",)
    for rank in cluster.ranks:
        with pytest.raises(RankFailedError, match="rank 2 shut down"):
            rank.submit([summed("u")], 0.0)


def test_a_failed_exchange_ends_it_for_everybody_naming_the_rank():
    cluster = Cluster(3)
    messages = [
        rank.message(0.0, failure="connection lost" if number == 1 else "") for number, rank in enumerate(cluster.ranks)
    ]
    answer = cluster.coordinator.answer(messages, 0.0)
    for rank in cluster.ranks:
        rank.take(answer, 0.0)
        with pytest.raises(RankFailedError, match="rank 1: connection lost"):
            rank.submit([summed("u")], 0.0)


def test_a_new_threshold_holds_on_all_ranks_from_the_same_cycle_on():
    cluster = Cluster(2, threshold_bytes=0)
    cluster.everywhere(summed("a"), summed("b"))
    messages = [rank.message(0.0) for rank in cluster.ranks]
    answer = msgspec.structs.replace(cluster.coordinator.answer(messages, 0.0), threshold_bytes=1000.0)
    assert [len(rank.take(answer, 0.0).batches) for rank in cluster.ranks] == [1, 1]
