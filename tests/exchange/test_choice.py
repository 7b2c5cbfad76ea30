"""Which program a process group uses: the table, overrides, and the programs themselves, proven."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.program import Collective
from headway.collective.verify import verify
from headway.errors import InputError, ProgramError
from headway.exchange.choice import SMALL_BYTES, ProgramChoice, cluster_of

COLLECTIVES: tuple[Collective, ...] = (
    "broadcast",
    "reduce",
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "gather",
    "scatter",
    "all_to_all",
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from("abc"), min_size=2, max_size=6),
    st.sampled_from(COLLECTIVES),
    st.sampled_from([0, SMALL_BYTES, SMALL_BYTES + 1]),
    st.data(),
)
def test_every_collective_of_any_ranks_on_any_machines_gets_a_program_that_does_it(
    machines: list[str], collective: Collective, size_bytes: int, data: st.DataObject
):
    root = data.draw(st.integers(0, len(machines) - 1)) if collective in ("broadcast", "reduce", "gather") else 0
    program = ProgramChoice(machines).program(collective, size_bytes, root)
    assert (program.collective, program.size, program.root) == (collective, len(machines), root)
    verify(program)


def test_the_table():
    one, each, several = (ProgramChoice(machines) for machines in (["a", "a"], ["a", "b", "c"], ["a", "a", "b", "b"]))
    for size_bytes in (8, 1 << 30):
        assert one.program("all_reduce", size_bytes).name == "direct"
        assert several.program("all_reduce", size_bytes).name == "hierarchical"
        assert several.program("all_to_all", size_bytes).name == "direct"
    assert each.program("all_reduce", 8).name == "direct"
    assert "binomial" in each.program("broadcast", 8).name
    assert each.program("all_reduce", 1 << 30).name == "ring"


def test_an_override_is_for_all_collectives_that_the_algorithm_does_or_for_one():
    choice = ProgramChoice(["a"] * 4)
    choice.override("ring")
    assert choice.program("all_reduce", 8).name == "ring"
    assert choice.program("all_to_all", 8).name == "direct"
    choice.override("", None)
    assert choice.program("all_reduce", 8).name == "direct"
    choice.override("ring", "all_to_all")
    with pytest.raises(ProgramError):
        choice.program("all_to_all", 8)
    with pytest.raises(InputError, match="'rong'"):
        choice.override("rong")


def test_the_environment_names_an_algorithm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HEADWAY_ALGORITHM", "ring")
    assert ProgramChoice(["a"] * 3).program("all_gather", 8).name == "ring"
    monkeypatch.setenv("HEADWAY_ALGORITHM", "wring")
    with pytest.raises(InputError):
        ProgramChoice(["a"] * 3)


def test_ranks_of_one_machine_are_joined_directly_and_others_through_the_network():
    cluster = cluster_of(["a", "b", "a"])
    assert len(cluster.route("rank0", "rank2")) == 1
    assert len(cluster.route("rank0", "rank1")) == 4
