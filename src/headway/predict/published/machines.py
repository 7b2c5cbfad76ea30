"""The machines of published measurements: a cluster of what the catalog knows, with the network that the words say."""

from __future__ import annotations

import re
from functools import lru_cache

import msgspec

from headway.errors import HeadwayError
from headway.hardware.catalog import PRESETS, Machine, Part, assemble, find_accelerator
from headway.hardware.cluster import Cluster
from headway.predict.published.cells import Line

__all__ = ["cluster_of"]

_GPUS = {
    "a100-sxm": "A100-SXM-80GB", "v100-sxm-32gb": "V100-SXM2-32GB", "v100-sxm-16gb": "V100-SXM2-16GB",
    "h100-sxm-95gb-hbm2e-lowtdp": "H100-SXM-96GB-HBM2e-500W", "h100_80gb": "H100-SXM-80GB",
    "a100_80gb": "A100-SXM-80GB", "a100_40gb": "A100-SXM-40GB",
}  # fmt: skip
# Where a source trained, if the row itself does not say.
_MACHINES = (
    ("experiments/gpt2", "jeanzay-v100"), ("tr11-176b", "jeanzay-a100"), ("dlperf", "oneflow-dlperf-v100"),
    ("vtrain", "vtrain-a100"), ("llama3_h100", "grandteton-h100"),
)  # fmt: skip
_FABRICS = (
    ("omni-path", r"omni|opa"), ("roce", r"roce|rdma"), ("efa", r"efa"), ("infiniband", r"\bib\b|infiniband|[hnex]dr"),
    ("ethernet", r"ethernet|tcp"),
)  # fmt: skip
_RACK = 72  # GPUs that one NVLink domain joins
_RACK_IN_USE = 64  # of which a job of several racks takes these


@lru_cache(maxsize=256)
def _cluster(accelerator: str, machine: Machine, nodes: int) -> Cluster:
    name = f"{nodes} x {machine.size} {accelerator}"
    return assemble(name, [(f"node{at}", machine) for at in range(nodes)])


def cluster_of(line: Line, devices: int) -> tuple[str, Cluster] | None:
    """The GPU's name, and machines with `devices` of it; None: `line` says why not."""
    text = line.text("gpu")
    try:
        kind = find_accelerator(_GPUS.get(text.lower(), text)).name
    except HeadwayError:
        line.refuse(f"gpu: {text!r} is not in the catalog")
        return None
    network, source = line.text("interconnect").lower(), line.text("source").lower()
    known = [machine for machine in PRESETS.values() if machine.parts[0].accelerator == kind]
    # The machine that the words name, then the one that the source is known to have used, then the usual one.
    known.sort(key=lambda machine: machine is not next(
        (PRESETS[name] for word, name in _MACHINES if word in source and PRESETS[name].parts[0].accelerator == kind),
        None))  # fmt: skip
    known.sort(key=lambda machine: machine not in [one for name, one in PRESETS.items() if name in network])
    if not known:
        line.refuse(f"gpu: no machine with {kind} is in the catalog")
        return None
    size = line.number("gpus_per_node", known[0].size, "of the source's machines, or as usual for this GPU")
    if kind.startswith("GB"):
        return kind, _racks(line, kind, devices)
    fits = [machine for machine in known if machine.size == size]
    machine = _with_network(line, (fits or known)[0], network, size if devices > size else 0)
    if machine.size < size or devices > size != machine.size:
        # Wiring that is drawn for one number of GPUs cannot be stretched to another.
        if machine.wiring == "cube-mesh":
            line.refuse(f"gpus_per_node: {kind} is wired in eights, not {size}")
            return None
        machine = msgspec.structs.replace(machine, parts=(Part(accelerator=kind, count=size),))
    return kind, _cluster(kind, machine, -(-devices // size))


def _racks(line: Line, kind: str, devices: int) -> Cluster:
    """Racks of one NVLink domain each."""
    usual = [machine for machine in PRESETS.values() if machine.parts[0].accelerator == kind]
    rack = max(usual, key=lambda machine: machine.size)
    nics = rack.nics // rack.size
    if devices <= _RACK:
        return _cluster(kind, msgspec.structs.replace(rack, parts=(Part(accelerator=kind, count=_RACK),)), 1)
    line.assumed.append(f"{_RACK_IN_USE} of {_RACK} GPUs used in each NVLink domain")
    part = (Part(accelerator=kind, count=_RACK_IN_USE),)
    rack = msgspec.structs.replace(rack, parts=part, nics=nics * _RACK_IN_USE)
    return _cluster(kind, rack, -(-devices // _RACK_IN_USE))


def _with_network(line: Line, machine: Machine, network: str, size: int) -> Machine:
    """`machine` with the NICs that the words say: "8x HDR IB 200Gbps/node", "RoCE 1600Gbps/node", "400Gbps/GPU".

    With a count, the rate is that of each NIC; without one, of the whole node. `size` 0: no network is used.
    """
    if not size:
        return machine
    rate = re.search(r"(\d+(?:\.\d+)?)\s*gbps", network)
    if rate is None:
        line.assumed.append(f"interconnect: {machine.nics} x {machine.nic_bytes_per_second * 8e-9:g} Gb/s (not stated)")
        return machine
    gbit = float(rate[1])
    count = re.search(r"(\d+)\s*x\b", network)
    if count is not None:
        nics = int(count[1])
    elif "/gpu" in network:
        nics = size
    else:
        # As many NICs as the machine is known with, unless they would have to be slower than usual ones.
        nics = machine.nics if machine.nics and gbit / machine.nics >= 100 else max(1, round(gbit / 200))
        nics, gbit = (nics, gbit / nics) if gbit / nics < 400 else (max(1, round(gbit / 200)), 200.0)
    fabric = next((name for name, pattern in _FABRICS if re.search(pattern, network)), None)
    like = next((one for one in PRESETS.values() if fabric and _fabric_latency(one, fabric)), machine)
    return msgspec.structs.replace(
        machine, nics=nics, nic_bytes_per_second=gbit * 1e9 / 8, nic_latency_seconds=like.nic_latency_seconds
    )


_REPRESENTATIVES = {
    "infiniband": "dgx-a100", "omni-path": "jeanzay-a100", "roce": "mosaicml-a100-roce", "efa": "aws-p5.48xlarge",
    "ethernet": "aws-p3.16xlarge",
}  # fmt: skip


def _fabric_latency(machine: Machine, fabric: str) -> bool:
    return PRESETS.get(_REPRESENTATIVES[fabric]) is machine
