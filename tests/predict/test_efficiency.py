"""What the constants of a generation do to kernels: directions, limits, and who they do not apply to."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.hardware.catalog import ACCELERATORS, preset
from headway.predict.efficiency import DEFAULT, GENERATIONS, UNALIGNED_LINEAR, efficiency_of, generation_of
from headway.predict.latency import Latency
from headway.workload.graph import Affine, Operator, Recipe, TensorKind
from headway.workload.transformer import TransformerShape, transformer

GRAPH = transformer(TransformerShape(layers=2, hidden=1024, heads=16, vocabulary=32000, sequence=1024), "small")


def product(rows: int, inner: int, columns: int) -> Operator:
    def kind(*shape: int) -> TensorKind:
        return TensorKind(fixed=shape, per_sample=(0,) * len(shape), dtype="float32")

    return Operator(
        target="aten.mm.default",
        module="",
        layer=0,
        backward=False,
        inputs=(kind(rows, inner), kind(inner, columns)),
        outputs=(kind(rows, columns),),
        flop=Affine(fixed=2.0 * rows * inner * columns),
    )


def latency(name: str, **fields) -> Latency:
    kind = ACCELERATORS[name]
    return Latency(GRAPH, kind, efficiency=efficiency_of(kind), **fields)


def achieved(name: str, rows: int, inner: int, columns: int) -> float:
    kind = ACCELERATORS[name]
    operator = product(rows, inner, columns)
    seconds = latency(name).roofline_seconds(operator, 1, precision="float16")
    return operator.flop.fixed / seconds / kind.flop_rate("float16")


@pytest.mark.parametrize("name", ["V100-SXM2-32GB", "A100-SXM-80GB", "H100-SXM-80GB", "B200-SXM", "L40S-48GB"])
def test_large_products_reach_the_share_that_the_catalogue_says(name):
    assert achieved(name, 2**16, 2**15, 2**15) == pytest.approx(ACCELERATORS[name].efficiency, rel=0.03)


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 9), st.integers(3, 9), st.integers(3, 9), st.sampled_from([0, 1, 2]))
def test_a_larger_product_is_never_less_efficient(rows, inner, columns, larger):
    shape = [2 ** (3 + rows), 2 ** (3 + inner), 2 ** (3 + columns)]
    more = [size * 2 if at == larger else size for at, size in enumerate(shape)]
    assert achieved("A100-SXM-80GB", *shape) <= achieved("A100-SXM-80GB", *more) * (1 + 1e-9)


def test_rows_that_tensor_cores_cannot_load_at_once_are_slow():
    aligned, crooked = achieved("A100-SXM-80GB", 4096, 4096, 152), achieved("A100-SXM-80GB", 4096, 4096, 150)
    assert crooked == pytest.approx(UNALIGNED_LINEAR * aligned, rel=0.05)


def test_no_constant_is_beyond_what_is_physically_possible():
    for constants in (DEFAULT, *GENERATIONS.values()):
        assert 0 < constants.memory < 1
        assert 0 < constants.nvlink < 1
        assert 0 < constants.network < 1
        assert 0 <= constants.slowdown < 1
        assert 0 < constants.unaligned <= 1
        assert min(constants) >= 0


def test_parts_follow_their_generation_and_others_the_defaults():
    assert {generation_of(ACCELERATORS[name]) for name in ("A100-SXM-40GB", "A100-PCIe-80GB")} == {"A100"}
    assert generation_of(ACCELERATORS["GB300"]) == "B200"
    assert efficiency_of(ACCELERATORS["L40S-48GB"]) == DEFAULT


def test_a_device_that_is_not_of_the_catalogue_keeps_its_own_figures():
    own = msgspec.structs.replace(ACCELERATORS["A100-SXM-80GB"], name="my A100")
    processor = msgspec.structs.replace(ACCELERATORS["A100-SXM-80GB"], torch_device="cpu")
    assert efficiency_of(own) is None
    assert efficiency_of(processor) is None


def test_fusing_moves_fewer_bytes_and_starts_fewer_kernels():
    kind = ACCELERATORS["A100-SXM-80GB"]
    eager, compiled = (
        Latency(GRAPH, kind, efficiency=efficiency_of(kind), recipe=Recipe(compiled=compiled)).layer_time(
            1, 4, precision="bfloat16"
        )
        for compiled in (False, True)
    )
    assert compiled.forward_seconds < eager.forward_seconds
    assert compiled.backward_seconds < eager.backward_seconds
    assert compiled.host_forward_seconds < eager.host_forward_seconds


def test_half_a_sample_is_about_half_the_work():
    time = latency("A100-SXM-80GB")
    half, whole = time.layer_time(1, 8.5, precision="bfloat16"), time.layer_time(1, 17, precision="bfloat16")
    assert half.forward_seconds == pytest.approx(whole.forward_seconds / 2, rel=0.15)


def test_links_of_catalogued_machines_reach_their_generations_share():
    from headway.predict.communication import Communication

    cluster = preset("dgx-a100")
    channel = Communication(cluster).group(tuple(device.name for device in cluster.devices))
    assert channel.bytes_per_second == pytest.approx(300e9 * GENERATIONS["A100"].nvlink)
