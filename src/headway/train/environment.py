"""What the environment of a rank says: who it is, where it computes, whom it meets, and under which plan.

Variables of `headway run`, torchrun and Slurm; under plain `python` nothing is said, and a rank is alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from headway.errors import PlanError
from headway.exchange.placement import place_of
from headway.plan.plan import Plan, Stage
from headway.train.support import check_supported
from headway.workload.graph import Workload

__all__ = ["device_of", "join", "path_in", "place_among_ranks", "read_plan", "replicas_only"]


def replicas_only(model: nn.Module, world_size: int, precision: str) -> Plan:
    """Data parallel over all ranks, in one micro-batch: what happens without a plan. Its batch is a placeholder."""
    return Plan(
        model=type(model).__name__,
        devices=tuple(f"rank {rank}" for rank in range(world_size)),
        global_batch=world_size,
        micro_batch=1,
        data=world_size,
        stages=(Stage(start=0, stop=1),),
        precision=precision,  # type: ignore[arg-type]
    )


def read_plan(world_size: int) -> tuple[Plan | None, Workload | None]:
    """The plan that HEADWAY_PLAN names, and the workload that it is for, as far as the environment names them.

    Raises PlanError for another number of ranks, or what cannot be carried out.
    """
    path, workload_path = path_in("HEADWAY_PLAN"), path_in("HEADWAY_WORKLOAD")
    if path is None:
        return None, None
    plan = check_supported(Plan.load(path).validate(place=str(path)), place=str(path))
    if plan.world_size != world_size:
        raise PlanError(
            f"the plan is for {plan.world_size} ranks, and {world_size} were started",
            place=str(path),
            remedy=f"start {plan.world_size} ranks (torchrun --nproc-per-node {plan.world_size}), or plan again",
        )
    workload = Workload.load(workload_path) if workload_path is not None else None
    if workload is not None:
        plan.validate(workload.graph, place=str(path))
    return plan, workload


def place_among_ranks() -> tuple[int, int, int]:
    """(rank, world size, rank on this node), from what started this process; (0, 1, 0) if nothing says."""
    place = place_of(os.environ)
    os.environ.update(place.variables)
    return place.rank, place.size, place.local_rank if place.local_rank >= 0 else place.rank


def device_of(local_rank: int, is_trace: bool) -> torch.device:
    """Where a rank computes: a GPU of this machine, unless there is none or HEADWAY_DEVICE says otherwise."""
    wanted = os.environ.get("HEADWAY_DEVICE", "")
    if is_trace or wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join(rank: int, world_size: int, device: torch.device, plan: Plan | None) -> None:
    """Meet the other ranks, in a process group of the backend that device and plan ask for."""
    method = os.environ.get("HEADWAY_INIT_METHOD", "env://")
    if plan is not None and plan.exchange == "headway":
        dist.init_process_group("headway", init_method=method, rank=rank, world_size=world_size)
    elif device.type == "cuda":
        dist.init_process_group("nccl", init_method=method, rank=rank, world_size=world_size, device_id=device)
    else:
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world_size)


def path_in(variable: str) -> Path | None:
    """The path that a variable names, None where it names none."""
    value = os.environ.get(variable, "")
    return Path(value) if value else None
