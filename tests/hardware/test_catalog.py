"""The catalog against the tables of facts, and the wiring of each kind of machine."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from pathlib import Path

import pytest

from headway.errors import ClusterError
from headway.hardware.catalog import (
    ACCELERATORS,
    PRESETS,
    Machine,
    Network,
    Part,
    assemble,
    find_accelerator,
    load_cluster,
    preset,
)
from headway.hardware.cluster import Cluster

FACTS = Path(__file__).parents[2].parent / "shared" / "data" / "hardware"
needs_facts = pytest.mark.skipif(
    not FACTS.is_dir(), reason="the tables of facts (../shared/data/hardware) are not here"
)


def rows(name: str) -> list[dict[str, str]]:
    with (FACTS / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def nvlinks(cluster: Cluster, each: float) -> Counter[frozenset[str]]:
    """Number of NVLinks of `each` bytes per second between every two devices, both directions checked to be alike."""
    rates = {(link.source, link.target): link.bytes_per_second for link in cluster.links if link.kind == "nvlink"}
    assert all(rates[other, one] == rate for (one, other), rate in rates.items())
    return Counter({frozenset(pair): round(rate / each) for pair, rate in rates.items()})


@needs_facts
def test_accelerators_agree_with_the_table() -> None:
    for row in rows("gpus.csv"):
        found = ACCELERATORS[row["name"]]
        for column, dtype in (
            ("fp32_tflops", "float32"),
            ("tf32_tflops_dense", "tfloat32"),
            ("fp16_tflops_dense", "float16"),
            ("bf16_tflops_dense", "bfloat16"),
            ("fp8_tflops_dense", "float8"),
        ):
            assert found.flop_per_second.get(dtype, 0) == pytest.approx(float(row[column] or 0) * 1e12), row["name"]
        # What a program finds of a part's memory lies between its GB and its GiB.
        assert float(row["mem_gb"]) * 1e9 <= found.memory_bytes < float(row["mem_gb"]) * 2**30
        assert found.memory_bytes_per_second == float(row["mem_bw_gbs"]) * 1e9
        assert found.power_watts == float(row["tdp_w"])
        assert found.source


# Names in the table that are longer than what a user would type.
TABLE_NAMES = {"dgx-a100-80 (selene)": "dgx-a100", "dgx-h200": "hgx-h200"}


@needs_facts
def test_machines_agree_with_the_table() -> None:
    for row in rows("nodes.csv"):
        name = TABLE_NAMES.get(row["preset"].lower(), row["preset"].lower())
        cluster = preset(f"{name}:2")
        count = int(row["gpus_per_node"])
        assert [len(positions) for positions in cluster.nodes.values()] == [count, count], name
        assert cluster.accelerator_of(0).name == row["gpu"]
        leaving = sum(link.bytes_per_second for link in cluster.links if link.target == "network") / 2
        assert leaving == pytest.approx(float(row["node_gbps_total"]) * 1e9 / 8), name
        assert leaving / count == pytest.approx(float(row["net_gbs_per_gpu_unidir"]) * 1e9, rel=0.01), name
        wired = sum(
            link.bytes_per_second
            for link in cluster.links
            if link.source == "node0/gpu0" and link.kind in ("nvlink", "xgmi")
        )
        assert wired == pytest.approx(float(row["intra_gbs_per_gpu_unidir"]) * 1e9), name


@pytest.mark.parametrize(("name", "each", "degree"), [("dgx-1p", 20e9, 4), ("dgx-1v", 25e9, 6), ("p3", 25e9, 6)])
def test_every_gpu_of_a_hybrid_cube_mesh_has_all_its_nvlinks(name: str, each: float, degree: int) -> None:
    links = nvlinks(preset(name), each)
    for gpu in range(8):
        assert sum(count for pair, count in links.items() if f"node0/gpu{gpu}" in pair) == degree
    assert len(links) == 16


def test_dgx_1v_has_the_true_multiplicities() -> None:
    double = "03 32 21 15 56 67 74 40"
    single = "02 26 64 45 57 73 31 10"
    expected = {
        frozenset(f"node0/gpu{gpu}" for gpu in edge): count
        for edges, count in ((double, 2), (single, 1))
        for edge in edges.split()
    }
    assert nvlinks(preset("dgx-1v"), 25e9) == expected
    assert nvlinks(preset("dgx-1p"), 20e9) == dict.fromkeys(expected, 1)


def test_gpus_without_an_nvlink_between_them_talk_over_pcie() -> None:
    cluster = preset("dgx-1v")
    direct = cluster.route("node0/gpu0", "node0/gpu3")
    assert [cluster.links[position].bytes_per_second for position in direct] == [50e9]
    around = cluster.route("node0/gpu0", "node0/gpu7")
    assert {cluster.links[position].kind for position in around} == {"pcie", "socket"}


def test_nvswitch_is_preferred_to_pcie() -> None:
    cluster = preset("dgx-2")
    for one, other in itertools.combinations(range(16), 2):
        path = cluster.route(f"node0/gpu{one}", f"node0/gpu{other}")
        assert {cluster.links[position].kind for position in path} == {"nvlink"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_pair_of_devices_of_two_machines_has_a_path(name: str) -> None:
    cluster = preset(f"{name}:2")
    names = [device.name for device in cluster.devices]
    for other in names[1:]:
        assert cluster.route(names[0], other)
        assert cluster.route(other, names[0])
    path = cluster.route("node0/gpu0", "node1/gpu0")
    assert "network" in {cluster.links[position].target for position in path}


def test_names_are_understood_in_any_case() -> None:
    assert preset("DGX-A100") == preset("dgx-a100")
    assert preset("Azure-ND96asr_v4:2") == preset("azure-nd96asr_v4:2")
    assert find_accelerator("v100").name == "V100-SXM2-16GB"
    assert find_accelerator("mi300x").name == "MI300X"


def test_machines_of_several_kinds_stand_in_one_cluster() -> None:
    cluster = load_cluster("dgx-a100:2 + dgx-1v:4")
    assert not cluster.is_homogeneous
    assert len(cluster) == 48
    assert cluster.accelerator_of(0).name == "A100-SXM-80GB"
    assert cluster.accelerator_of(16).name == "V100-SXM2-16GB"
    path = [cluster.links[position] for position in cluster.route("node1/gpu2", "node5/gpu2")]
    # The slower end decides.
    assert min(link.bytes_per_second for link in path) == 12.5e9


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("dgx-1w", "did you mean.*dgx-1v"),
        ("dgx-h100:x", "not a number"),
        ("dgx-h100:0", "not a number"),
        ("dgx-h100:-1", "not a number"),
        ("dgx-h100:", "not a number"),
        ("", "names no machine"),
        ("dgx-1v+", "names no machine"),
        ("dgx-1v+local", "joined"),
        ("local:zero", "not a number"),
        ("nothing like it at all", "known are"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_what_would(spec: str, says: str) -> None:
    with pytest.raises(ClusterError, match=f"(?s){says}") as caught:
        load_cluster(spec)
    assert caught.value.exit_code == 2
    assert caught.value.remedy


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lab.txt"
    path.write_text("preset: dgx-1v")
    with pytest.raises(ClusterError, match="neither YAML nor JSON"):
        load_cluster(str(path))


def test_an_oversubscribed_network_narrows_between_switches() -> None:
    cluster = preset("dgx-a100:4", network=Network(oversubscription=4, nodes_per_switch=2))
    near = [cluster.links[position] for position in cluster.route("node0/gpu0", "node1/gpu0")]
    far = [cluster.links[position] for position in cluster.route("node0/gpu0", "node2/gpu0")]
    assert "network" not in {link.target for link in near}
    uplink = next(link for link in far if link.target == "network")
    assert uplink.bytes_per_second == 2 * 8 * 25e9 / 4
    with pytest.raises(ClusterError, match="oversubscription"):
        preset("dgx-a100:2", network=Network(oversubscription=0.5))


def test_kinds_may_be_mixed_in_one_machine() -> None:
    machine = Machine(
        parts=(Part(accelerator="A100-SXM-80GB", count=2), Part(accelerator="t4")), pcie_bytes_per_second=31e9
    )
    cluster = assemble("mixed", [("tower", machine)])
    assert [cluster.accelerator_of(position).name for position in range(3)] == [
        "A100-SXM-80GB",
        "A100-SXM-80GB",
        "T4-16GB",
    ]
    assert cluster.route("tower/gpu0", "tower/gpu2")


def test_a_cube_mesh_of_another_size_is_refused() -> None:
    machine = Machine(parts=(Part(accelerator="v100", count=4),), wiring="cube-mesh", wiring_bytes_per_second=25e9)
    with pytest.raises(ClusterError, match="joins 8 devices, not 4"):
        assemble("small", [("tower", machine)])


def test_every_machine_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")
    assert [name for name in PRESETS if f"| `{name}` |" not in text] == []
