"""Places of tensors: counted when given, given back when freed, and nothing counted for what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import DoesNotFitError, InputError
from headway.memory.places import UNLIMITED_BYTES, Places, held_bytes


def places(**budgets: int) -> Places:
    return Places(torch.device("cpu"), pinned=False, disk=None, remote=None, budgets=budgets)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(0, 300_000),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 100_000), st.integers(0, 99)), max_size=30),
)
def test_a_tier_holds_what_was_given_and_not_freed_and_never_more_than_its_budget(budget, steps):
    own = places(host=budget)
    held = []
    for gives, size, which in steps:
        if gives or not held:
            used = sum(held_bytes(each.size, "host") for each in held)
            if used + held_bytes(size, "host") <= budget:
                held.append(own.give(f"{len(held)}", (size,), torch.uint8, "host", announce=False))
            else:
                with pytest.raises(DoesNotFitError, match="missing"):
                    own.give("x", (size,), torch.uint8, "host", announce=False)
        else:
            own.discard(held.pop(which % len(held)))
        use = own.use()["host"]
        assert use.used_bytes == sum(held_bytes(each.size, "host") for each in held) <= use.peak_bytes <= budget


@pytest.mark.parametrize(("tier", "remedy"), [("disk", "directory"), ("remote", "remote"), ("cloud", "one of")])
def test_a_tier_that_is_not_there_is_refused_and_nothing_is_counted(tier, remedy):
    own = places()
    with pytest.raises(InputError) as caught:
        own.give("x", (100,), torch.uint8, tier, announce=False)
    assert remedy in str(caught.value.remedy)
    assert all(use.used_bytes == 0 and use.budget_bytes == UNLIMITED_BYTES for use in own.use().values())


def test_budgets_are_of_known_tiers_and_not_negative():
    Places.check({"host": 0})
    for wrong in ({"host": -1}, {"cloud": 1}):
        with pytest.raises(InputError, match="budgets"):
            Places.check(wrong)  # type: ignore[arg-type]


def test_large_tensors_on_the_host_begin_at_a_page_and_are_zeros():
    given = places().give("x", (70_000,), torch.float32, "host", announce=False)
    assert isinstance(given.place, torch.Tensor)
    assert given.place.data_ptr() % 4096 == 0
    assert not given.place.any()
