"""Pipeline schedules: what runs when, what is held, and the formulas against playing it out."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules

from headway.predict.pipeline import WEIGHT, closed_form, finish_seconds, in_flight, order_of_rank, play

SCHEDULES = st.sampled_from(["gpipe", "1f1b", "interleaved"])


def shape(schedule: str, pipeline: int, factor: int, virtual: int) -> tuple[int, int]:
    """(micro-batches, virtual stages) that the schedule accepts."""
    return pipeline * factor, virtual if schedule == "interleaved" else 1


@given(SCHEDULES, st.integers(2, 5), st.integers(1, 4), st.integers(2, 3))
def test_every_micro_batch_goes_once_forward_and_then_once_backward_through_every_stage(schedule, p, factor, virtual):
    m, v = shape(schedule, p, factor, virtual)
    for rank in range(p):
        cells = order_of_rank(schedule, rank, p, v, m)
        assert len(set(cells)) == len(cells) == 2 * m * v
        for cell in cells:
            if cell.backward:
                assert cells.index(cell._replace(backward=False)) < cells.index(cell)


@given(SCHEDULES, st.integers(2, 5), st.integers(1, 4), st.integers(2, 3))
def test_equal_stages_have_the_textbook_bubble(schedule, p, factor, virtual):
    m, v = shape(schedule, p, factor, virtual)
    stages = p * v
    forward, backward, nothing = [1.0] * stages, [2.0] * stages, [0.0] * p
    played = play(schedule, p, m, forward, backward, nothing)
    # (p - 1)/m of the work of a rank, or (p - 1)/(v m) interleaved (Narayanan et al., SC 2021, section 2.2).
    assert played.seconds == pytest.approx(3 * m * v * (1 + (p - 1) / (v * m)))
    assert max(closed_form(schedule, p, m, forward, backward, nothing)) == pytest.approx(played.seconds)


@given(
    st.sampled_from(["gpipe", "1f1b"]),
    st.integers(1, 6),
    st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), min_size=2, max_size=4),
)
def test_uneven_stages_take_at_least_the_slowest_and_the_formula_is_close(schedule, factor, times):
    p, m = len(times), len(times) * factor
    forward, backward = [f for f, _ in times], [b for _, b in times]
    played = play(schedule, p, m, forward, backward, [0.0] * p)
    slowest = max(f + b for f, b in times)
    assert played.seconds >= m * slowest - 1e-9
    assert played.seconds >= sum(forward) + sum(backward) - 1e-9
    formula = max(closed_form(schedule, p, m, forward, backward, [0.0] * p))
    assert formula >= played.seconds - 1e-9 or schedule == "1f1b"
    assert 0.6 < formula / played.seconds < 1.7


@given(SCHEDULES, st.integers(2, 4), st.integers(1, 3), st.floats(0, 2), st.floats(0, 2))
def test_slower_links_never_shorten_a_step(schedule, p, factor, quick, slow):
    m, v = shape(schedule, p, factor, 2)
    times = [1.0] * (p * v)
    quick, slow = sorted((quick, slow))
    one = play(schedule, p, m, times, times, [quick] * p).seconds
    other = play(schedule, p, m, times, times, [slow] * p).seconds
    assert one <= other + 1e-9


@given(st.integers(2, 8), st.integers(1, 4))
def test_1f1b_holds_as_many_micro_batches_as_ranks_follow_and_gpipe_all(p, factor):
    m = p * factor
    for rank in range(p):
        assert in_flight("1f1b", rank, p, 1, m) == (min(m, p - rank),)
        assert in_flight("gpipe", rank, p, 1, m) == (m,)


@given(st.integers(2, 4), st.integers(2, 3), st.integers(1, 4))
def test_the_interleaved_schedule_holds_what_megatron_says(p, v, factor):
    m = p * factor
    for rank in range(p):
        # Warm-up of (v - 1) p + 2 (p - rank - 1) forward passes, and one more (Megatron-LM's schedules.py).
        assert sum(in_flight("interleaved", rank, p, v, m)) == min(m * v, (v - 1) * p + 2 * (p - rank - 1) + 1)


def test_played_cells_do_not_overlap_and_respect_what_they_need():
    times = [1.0, 2.0, 1.5]
    played = play("1f1b", 3, 6, times, times, [0.25] * 3)
    for rank in range(3):
        cells = sorted((start, cell) for cell, start in played.starts.items() if cell.stage == rank)
        for (start, _), (following, _) in itertools.pairwise(cells):
            assert start + times[rank] <= following + 1e-9
    for cell, start in played.starts.items():
        if not cell.backward and cell.stage:
            before = cell._replace(stage=cell.stage - 1)
            assert start >= played.starts[before] + times[before.stage] + 0.25 - 1e-9


def torch_order(schedule, rank: int, pipeline: int, virtual: int, micro_batches: int) -> list[tuple[int, str, int]]:
    """What torch's own schedule does on a rank, communication and pauses left out."""
    rounds = max(1, micro_batches // pipeline)
    given = SimpleNamespace(
        pp_group_size=pipeline,
        n_local_stages=virtual,
        number_of_rounds=rounds,
        microbatches_per_round=micro_batches // rounds,
        _n_microbatches=micro_batches,
    )
    found = schedule._calculate_single_rank_operations(given, rank)
    return [(op.stage_index, str(op.computation_type.value), op.microbatch_index) for op in found if op is not None]


@given(st.integers(2, 5), st.integers(1, 4), st.integers(2, 3))
def test_the_interleaved_order_is_the_one_that_torch_carries_out(p, factor, v):
    for rank in range(p):
        ours = [
            (cell.stage, "B" if cell.backward else "F", cell.micro_batch)
            for cell in order_of_rank("interleaved", rank, p, v, p * factor)
        ]
        assert ours == torch_order(schedules.ScheduleInterleaved1F1B, rank, p, v, p * factor)


@given(st.integers(2, 6), st.integers(1, 4))
def test_the_zero_bubble_order_holds_as_many_micro_batches_as_torchs_and_makes_gradients_in_its_order(p, factor):
    m = p * factor
    for rank in range(p):
        cells = order_of_rank("zero_bubble", rank, p, 1, m)
        ours = [(cell.stage, {0: "F", 1: "I", WEIGHT: "W"}[int(cell.backward)], cell.micro_batch) for cell in cells]
        theirs = torch_order(schedules.ScheduleInterleavedZeroBubble, rank, p, 1, m)
        # torch does a forward pass before each backward pass, and its parameters' gradients right behind: another
        # spelling of the same turns, in which every backward and every split gradient keeps its place.
        assert [op for op in ours if op[1] != "F"] == [op for op in theirs if op[1] != "F"]
        assert sorted(ours) == sorted(theirs)
        held = [
            list(itertools.accumulate({"F": 1, "I": 0, "W": -1}[op[1]] for op in order)) for order in (ours, theirs)
        ]
        assert max(held[0]) == max(held[1]) == in_flight("zero_bubble", rank, p, 1, m)[0] == p


@given(st.integers(2, 6), st.integers(1, 6), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.1, 3))
def test_zero_bubble_has_the_bubble_of_the_paper(p, factor, forward, inputs, weights):
    m = p * factor
    weights = min(weights, inputs, forward)  # as in every operator with parameters, or nearly
    played = play("zero_bubble", p, m, [forward] * p, [inputs + weights] * p, [0.0] * p, [weights] * p)
    # Qi et al., ICLR 2024, table 2: (p - 1)(F + B - W).
    assert played.seconds == pytest.approx(m * (forward + inputs + weights) + (p - 1) * (forward + inputs - weights))
    formula = closed_form("zero_bubble", p, m, [forward] * p, [inputs + weights] * p, [0.0] * p, [weights] * p)
    assert max(formula) == pytest.approx(played.seconds)
    plain = play("1f1b", p, m, [forward] * p, [inputs + weights] * p, [0.0] * p)
    assert played.seconds < plain.seconds


@given(st.sampled_from(["1f1b", "gpipe", "zero_bubble"]), st.integers(2, 6), st.integers(2, 12), st.floats(0.0, 1.0))
def test_the_formula_knows_that_long_sends_show_in_every_round(schedule, p, factor, send):
    m = p * factor
    times = [1.0] * p, [2.0] * p, [send] * p, [1.0] * p
    played = play(schedule, p, m, *times).seconds
    assert max(closed_form(schedule, p, m, *times)) == pytest.approx(played, rel=0.04)


@given(
    st.sampled_from(["gpipe", "1f1b", "interleaved", "zero_bubble"]),
    st.integers(2, 5),
    st.integers(1, 4),
    st.integers(2, 3),
    st.randoms(use_true_random=False),
)
def test_every_cell_starts_when_its_rank_is_free_and_what_it_needs_has_arrived(schedule, p, factor, virtual, random):
    m, v = shape(schedule, p, factor, virtual)
    stages = p * v
    forward, backward, weight = ([random.uniform(0.1, 3) for _ in range(stages)] for _ in range(3))
    backward = [b + w for b, w in zip(backward, weight, strict=True)]
    sends = [random.choice([0.0, 0.2, 2.0]) for _ in range(p)]
    played = play(schedule, p, m, forward, backward, sends, weight)
    split = schedule == "zero_bubble"
    takes = {False: forward, True: [b - w * split for b, w in zip(backward, weight, strict=True)], WEIGHT: weight}
    ends = {cell: start + takes[cell.backward][cell.stage] for cell, start in played.starts.items()}
    for rank in range(p):
        before = 0.0
        for cell in order_of_rank(schedule, rank, p, v, m):
            stage, _, kind = cell
            arrived = 0.0
            if kind is False and stage:
                arrived = ends[cell._replace(stage=stage - 1)] + sends[(stage - 1) % p]
            elif kind is True and stage < stages - 1:
                arrived = ends[cell._replace(stage=stage + 1)] + sends[stage % p]
            elif kind is True:
                arrived = ends[cell._replace(backward=False)]
            assert played.starts[cell] == max(before, arrived)
            before = ends[cell]
        assert played.finish[rank] == before
    assert finish_seconds(schedule, p, m, forward, backward, sends, weight) == played.finish


@given(st.integers(2, 9), st.integers(1, 40), st.randoms(use_true_random=False))
def test_the_formula_of_1f1b_follows_the_slowest_round_of_any_run_of_ranks(p, more, random):
    """A round from rank i to j takes their work and 2 (j - i) sends, for j - i + 1 micro-batches."""
    m = p + more
    both = [random.uniform(0.1, 3) for _ in range(p)]
    sends = [random.choice([0.0, 0.3, 3.0]) for _ in range(p)]
    rounds = [
        max(sum(both[i : i + n]) + 2 * sum(sends[i : i + n - 1]) for i in range(p - n + 1)) for n in range(1, p + 1)
    ]
    size = max(range(p), key=lambda n: rounds[n] / (n + 1)) + 1
    whole, rest = divmod(m - 1, size)
    following = whole * rounds[size - 1] + max(rounds[rest - 1] if rest else 0.0, rest * rounds[0])
    found = closed_form("1f1b", p, m, [0.0] * p, both, sends)[0]
    assert found == pytest.approx(sum(both) + 2 * sum(sends[: p - 1]) + following, rel=1e-12)
