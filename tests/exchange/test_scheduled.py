"""Priority exchange on real processes: ByteScheduler (Peng et al., SOSP 2019), held against DistributedDataParallel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import gloo_ranks

pytestmark = pytest.mark.processes
FILE = str(Path(__file__).with_name("scheduled_ranks.py"))


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return gloo_ranks.run_case("everything", 3, tmp_path_factory.mktemp("scheduled"), file=FILE)


@pytest.fixture(params=["gloo", "headway"])
def ranks(request, found):
    """What each rank saw on a backend."""
    return found if request.param == "gloo" else [{**rank, **rank["on headway"]} for rank in found]


@pytest.fixture
def trained(ranks):
    """The two ranks that trained, in a group of their own."""
    return ranks[:2]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_gives_the_bits_that_distributed_data_parallel_gives(trained, optimizer):
    for rank in trained:
        assert same(rank["ddp", optimizer], rank["priority", optimizer])
        assert same(trained[0]["priority", optimizer], rank["priority", optimizer])


def test_clipping_and_gradient_accumulation_give_them_too(trained):
    for rank in trained:
        for name in ("clipped", "accumulated"):
            # The norm, and sums over passes, are taken of other layouts than DistributedDataParallel's buckets.
            torch.testing.assert_close(rank[name][0], rank[name][1])
            assert same(rank[name][1], trained[0][name][1])


def test_waiting_in_step_looking_in_between_and_whole_tensors_change_no_bit(trained):
    for rank in trained:
        assert same(rank["awaited"], rank["ddp", "sgd"])
        assert same(rank["whole"], rank["ddp", "adam"])
        assert same(rank["looked at"], rank["ddp", "adam"])


def test_both_backends_give_the_same_bits(found):
    for rank in found[:2]:  # two numbers have one sum
        assert same(rank["priority", "adam"], rank["on headway"]["priority", "adam"])


def test_no_thread_is_left_behind(found):
    assert [rank["threads"] for rank in found] == [0, 0, 0]


def test_parts_start_in_the_same_order_on_all_ranks_whatever_gets_ready_when(ranks):
    started = ranks[0]["started"]
    # Five steps of six weights in four parts, six biases in one, and the votes in one.
    assert len(started) == 5 * (6 * 4 + 6 + 1)
    for rank in ranks[1:]:
        assert rank["started"] == started
        assert same(rank["parameters"], ranks[0]["parameters"])
    steps = [started[at : at + 31] for at in range(0, len(started), 31)]
    for step in steps:
        assert sorted(step) == sorted(steps[0]), "a step's tensors all go before the next step's"


def test_the_first_layers_gradients_overtake_the_last_ones_that_were_ready_before(ranks):
    first, *others = ranks[0]["hurried"]
    # All but the first part was chosen when everything was ready: the votes, then layer after layer.
    expected = [12, *(i for layer in range(6) for i in (*[2 * layer] * 4, 2 * layer + 1))]
    expected.remove(first)
    assert others == expected


def test_misuse_is_told_with_its_remedy(found):
    for rank in found:
        messages = rank["misuse"]
        assert "across_steps=False" in messages["unsplit"]
        assert "model has not" in messages["foreign"]
        assert "backward pass 2 of a step of 1" in messages["twice"]
        assert "read before it was updated" in messages["outside"]
        assert "is closed" in messages["closed"]
        assert "sparse=False" in messages["sparse"]


@pytest.mark.parametrize("case", ["killed", "killed_on_headway"])
def test_when_a_rank_is_killed_the_others_raise(tmp_path, case):
    survivors = [r for r in gloo_ranks.run_case(case, 3, tmp_path, file=FILE, killed=1) if r is not None]
    assert len(survivors) == 2
    for survivor in survivors:
        assert survivor["failure"] == "RankFailedError", survivor["text"]
