"""Measured operators: replaying a traced model, the cache, and what stands in for what was not measured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import FileError
from headway.predict import Predictor, Profile
from headway.predict.operators import Shards, operator_key
from headway.predict.profile import _interpolated


@pytest.fixture(scope="module")
def measured(make, tmp_path_factory):
    cache = tmp_path_factory.mktemp("profile") / "cache.sqlite"
    graph = make.graph(layers=2)
    profile = Profile.measure(graph, samples=(1, 4), degrees=(1, 2), threads=1, budget_seconds=30, cache=cache)
    return graph, profile, cache


def test_every_operator_of_a_model_is_measured_at_every_size(measured):
    graph, profile, _ = measured
    assert profile.unreplayed == {}
    for operator in graph.operators:
        for degree in (1, 2):
            times = profile.seconds[operator_key(operator, degree, "float32")]
            assert set(times) == {1, 4}
            assert all(0 < seconds < 1 for seconds in times.values())
    assert profile.optimizer_tensor_seconds > 0
    assert profile.optimizer_element_seconds > 0


def test_what_was_measured_is_not_measured_again(measured):
    graph, profile, cache = measured
    again = Profile.measure(graph, samples=(1, 4), degrees=(1, 2), threads=1, budget_seconds=0, cache=cache)
    assert again == profile


def test_measured_times_replace_the_roofline_on_the_device_they_are_of(make, measured):
    graph, profile, _ = measured
    plan = make.plan(graph, make.cluster(1, 1), 4, 4)
    times = {}
    for device in ("cpu", "cuda"):
        cluster = make.cluster(1, 1, accelerators=(make.accelerator(torch_device=device),))
        workload = make.workload(graph, 4)
        times[device] = Predictor(workload, cluster, profile).predict(plan).time.compute_seconds
        if device == "cuda":
            assert times[device] == Predictor(workload, cluster).predict(plan).time.compute_seconds
    operators = sum(profile.operator_seconds(operator, 4, 1, "float32", 0.0) for operator in graph.operators)
    assert times["cpu"] == pytest.approx(operators)


@given(st.integers(1, 64))
def test_between_measured_sizes_times_are_interpolated(make, samples):
    operator = make.graph(layers=1).operators[0]
    seconds = _interpolated(operator, {2: 2e-3, 4: 3e-3, 16: 9e-3}, samples)
    assert seconds > 0
    if samples >= 2:
        assert seconds == pytest.approx(1e-3 + 0.5e-3 * samples)


def test_one_measured_size_is_scaled_by_flop(make):
    operator = make.graph(layers=1).operators[0]
    assert _interpolated(operator, {2: 1e-3}, 8) == pytest.approx(4e-3)


def test_a_real_model_is_replayed_whole(make, tmp_path):
    """A traced transformer block: views, attention, normalisation, embedding, loss, forward and backward."""
    trace = pytest.importorskip("headway.workload.trace").trace

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(50, 16)
            self.norm = torch.nn.LayerNorm(16)
            self.qkv = torch.nn.Linear(16, 48)
            self.head = torch.nn.Linear(16, 50)

        def forward(self, tokens):
            x = self.embedding(tokens)
            q, k, v = self.qkv(self.norm(x)).view(*tokens.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.head(torch.nn.functional.gelu(x + y.transpose(1, 2).flatten(2)))

    def loss(output, target):
        return torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    tokens = torch.zeros(2, 8, dtype=torch.int64)
    graph = trace(Model(), tokens, name="small", loss=loss, target=tokens)
    for precision in ("float32", "bfloat16"):
        profile = Profile.measure(
            graph, samples=(2,), threads=1, precision=precision, budget_seconds=30, cache=tmp_path / "cache.sqlite"
        )
        assert profile.unreplayed == {}
        assert profile.forward_overhead_seconds + profile.backward_overhead_seconds > 0


def test_operators_that_cannot_be_replayed_keep_a_calibrated_roofline(make, tmp_path):
    import msgspec

    graph = make.graph(layers=2)
    operators = list(graph.operators)
    operators[1] = msgspec.structs.replace(operators[1], target="aten.no_such_operator.default")
    graph = msgspec.structs.replace(graph, operators=tuple(operators))
    profile = Profile.measure(graph, samples=(2,), threads=1, budget_seconds=30, cache=tmp_path / "cache.sqlite")
    assert profile.unreplayed == {"no_such_operator": 1}
    cluster = make.cluster(1, 1, accelerators=(make.accelerator(torch_device="cpu"),))
    time = Predictor(make.workload(graph, 4), cluster, profile).predict(make.plan(graph, cluster, 4, 2)).time
    assert time.step_seconds > 0


def test_a_crowd_of_processes_measures_and_leaves_nobody_behind(make, tmp_path):
    graph = make.graph(layers=1)
    profile = Profile.measure(
        graph, samples=(2,), threads=1, concurrent=2, budget_seconds=30, cache=tmp_path / "cache.sqlite"
    )
    assert profile.concurrent == 2
    assert set(profile.seconds) == {operator_key(operator, 1, "float32") for operator in graph.operators}


def test_a_cache_that_cannot_be_used_is_reported_with_its_place(make, tmp_path):
    broken = tmp_path / "cache.sqlite"
    broken.write_bytes(b"this is no database, and long enough to be looked at as one" * 20)
    with pytest.raises(FileError) as caught:
        Profile.measure(make.graph(layers=1), samples=(1,), cache=broken)
    assert str(broken) in caught.value.place
    assert caught.value.remedy


def test_one_rank_alone_is_faster_than_one_in_a_crowd(make, measured):
    import msgspec

    graph, profile, _ = measured
    profile = msgspec.structs.replace(profile, quiet_share=0.5)
    cluster = make.cluster(1, 2, accelerators=(make.accelerator(torch_device="cpu"),))
    predictor = Predictor(make.workload(graph, 4), cluster, profile)
    quiet, _ = predictor.layer_seconds("unit", 4, crowded=False)
    crowded, _ = predictor.layer_seconds("unit", 4, crowded=True)
    assert quiet[-1] == pytest.approx(crowded[-1] / 2)


def test_a_size_that_was_measured_whole_only_is_divided_as_its_roofline_is(make, tmp_path):
    graph = make.graph(layers=1)
    cluster = make.cluster(1, 2, accelerators=(make.accelerator(torch_device="cpu"),))
    profile = Profile.measure(graph, samples=(4,), threads=1, budget_seconds=30, cache=tmp_path / "cache.sqlite")
    shards = Shards(2, frozenset({0}))
    predictor = Predictor(make.workload(graph, 4), cluster, profile)
    whole, _ = predictor.layer_seconds("unit", 4, crowded=True)
    split, _ = predictor.layer_seconds("unit", 4, shards, crowded=True)
    assert 0 < split[-1] < whole[-1]


def test_the_host_of_a_gpu_makes_views_too_and_that_of_a_cpu_counts_them_once(make):
    import torch

    from headway.predict.latency import Latency
    from headway.workload.trace import trace

    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x).unsqueeze(1).transpose(1, 2).squeeze(2)

    inputs = torch.zeros(2, 4)
    graph = trace(Turned(), inputs, name="turned", loss=lambda y, t: (y - t).square().sum(), target=inputs)
    positions = [at for layer in graph.layers for at in layer.forward]
    views = sum(graph.operators[at].is_view for at in positions)
    started = len(positions) - views
    assert views
    assert started
    for device, share in (("cuda", 1.0), ("cpu", 0.0)):
        profile = Profile(torch_device=device, view_seconds=3e-6, host_forward_seconds=20e-6)
        latency = Latency(graph, make.accelerator(torch_device=device), profile)
        host = sum(latency.layer_time(at, 2).host_forward_seconds for at in range(len(graph.layers)))
        assert host == pytest.approx(started * 20e-6 + share * views * 3e-6)
