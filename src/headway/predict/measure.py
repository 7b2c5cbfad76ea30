"""Filling the database of measured times from a model: what `headway probe --profile MODEL` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from headway.errors import DoesNotFitError, InputError
from headway.hardware.cluster import Cluster
from headway.predict.profile import Profile
from headway.predict.replay import replayed_positions
from headway.units import format_bytes
from headway.workload.graph import Graph, Workload, dtype_bytes

__all__ = ["measure_workload", "spanning_samples"]


def measure_workload(
    workload: Workload,
    cluster: Cluster,
    *,
    samples: Sequence[int] = (),
    degrees: Sequence[int] = (),
    budget_seconds: float = 10.0,
    database: Path | None = None,
    refresh: bool = False,
) -> Profile:
    """Measure the operators of a traced model on this machine, into the database; what is there is not measured again.

    `cluster`: this machine, probed. `samples` and `degrees`: micro-batches and tensor-parallel degrees (none given: a
    few that span what a search tries). Raises InputError if the cluster is the description of another machine or has
    several kinds of device, DoesNotFitError if the layers to be measured are larger than the free memory, FileError.
    """
    if not cluster.fingerprint:
        raise InputError(
            "is a description, and times are measured on the machine at hand",
            place=cluster.name,
            remedy="probe this machine (--cluster local)",
        )
    if not cluster.is_homogeneous:
        raise InputError("has several kinds of device", place=cluster.name, remedy="probe devices of one kind")
    kind = cluster.accelerator_of(0)
    graph = workload.graph
    samples = samples or spanning_samples(workload.global_batch)
    if not degrees:
        divisors = [block.divisor for block in graph.blocks]
        degrees = [n for n in range(1, len(cluster) + 1) if n == 1 or any(divisor % n == 0 for divisor in divisors)]
    needed = _replay_bytes(graph, min(samples)) * (len(cluster) if kind.torch_device == "cpu" else 1)
    free = _free_bytes(kind.torch_device)
    if needed > free:
        raise DoesNotFitError(
            f"measuring needs about {format_bytes(needed)} for layers and inputs, and {format_bytes(free)} are free",
            place=graph.name,
            remedy="measure a smaller model with layers of the same kind, or on a machine with more memory",
        )
    return Profile.measure(
        graph,
        samples=samples,
        degrees=degrees,
        precision=workload.precision,
        torch_device=kind.torch_device,
        threads=kind.threads,
        concurrent=len(cluster) if kind.torch_device == "cpu" else 1,
        optimizer=workload.optimizer.name,
        budget_seconds=budget_seconds,
        fingerprint=cluster.fingerprint,
        device=kind.name,
        cache=database,
        refresh=refresh,
    )


def spanning_samples(largest: int) -> list[int]:
    """1, 4, 16, … and `largest`: between them times are interpolated."""
    sizes = [1]
    while sizes[-1] * 4 < largest:
        sizes.append(sizes[-1] * 4)
    return sizes if largest == 1 else [*sizes, largest]


def _replay_bytes(graph: Graph, samples: int) -> float:
    """Bytes that a replay needs at least: inputs that none of its operators makes, and its largest operator."""
    given: dict[int, float] = {}
    made: set[int] = set()
    largest = 0.0
    for at in replayed_positions(graph):
        operator = graph.operators[at]
        tensors = (*operator.inputs, *operator.outputs)
        largest = max(largest, sum(kind.elements(samples) * dtype_bytes(kind.dtype) for kind in tensors))
        for tensor, kind in zip(operator.input_tensors, operator.inputs):
            if tensor >= 0 and tensor not in made:
                given[tensor] = kind.elements(samples) * dtype_bytes(kind.dtype)
        made.update(operator.output_tensors)
    return sum(given.values()) + largest


def _free_bytes(torch_device: str) -> float:
    if torch_device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
