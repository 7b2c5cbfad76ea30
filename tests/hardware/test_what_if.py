"""Machines that nobody has yet: what is asked for changes, and nothing else."""

from __future__ import annotations

import msgspec
import pytest

from headway.errors import FieldError
from headway.hardware.catalog import load_cluster
from headway.hardware.what_if import what_if


def test_a_figure_replaces_and_a_factor_multiplies() -> None:
    before = load_cluster("dgx-a100:2")
    after = what_if(before, "network=400Gb/s, memory=141GB, memory-bandwidth=2x")
    assert {link.bytes_per_second for link in after.links if link.kind == "network"} == {50e9}
    for name, kind in after.accelerators.items():
        assert kind.memory_bytes == 141e9
        assert kind.memory_bytes_per_second == 2 * before.accelerators[name].memory_bytes_per_second
    others = [link for link in before.links if link.kind != "network"]
    assert [link for link in after.links if link.kind != "network"] == others


def test_flops_grow_in_proportion_over_all_dtypes() -> None:
    before = load_cluster("dgx-h100:1").accelerator_of(0)
    after = what_if(load_cluster("dgx-h100:1"), "flops=2000TFLOP/s").accelerator_of(0)
    assert after.flop_per_second["bfloat16"] == 2e15
    ratios = {dtype: rate / before.flop_per_second[dtype] for dtype, rate in after.flop_per_second.items()}
    assert len({round(ratio, 9) for ratio in ratios.values()}) == 1


def test_changes_apply_one_after_the_other_and_are_named() -> None:
    before = load_cluster("dgx-a100:1")
    after = what_if(before, "memory=2x,memory=2x")
    assert after.accelerator_of(0).memory_bytes == 4 * before.accelerator_of(0).memory_bytes
    assert "memory=2x, memory=2x" in after.name
    assert msgspec.json.decode(msgspec.json.encode(after), type=type(after)) == after


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("", "no change"),
        ("memory", "no change"),
        ("netwrk=2x", "network"),
        ("memory=3Gb/s", "not a number of bytes"),
        ("flops=0x", "above zero"),
        ("price=dear", "no number"),
        ("network=400Gb/s,,", "no change"),
    ],
)
def test_what_means_nothing_is_refused_with_its_place(changes: str, said: str) -> None:
    with pytest.raises(FieldError, match="what-if") as caught:
        what_if(load_cluster("dgx-a100:2"), changes)
    assert said in str(caught.value)


def test_a_kind_of_link_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(FieldError, match="no network links"):
        what_if(load_cluster("dgx-a100"), "network=2x")
