"""Data parallelism of one stage: `DistributedDataParallel` for ZeRO-0 and 1, `fully_shard` for ZeRO-2 and 3."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from headway.plan.plan import Plan
from headway.train.measure import Meter
from headway.train.owners import Owners
from headway.workload.graph import Graph

if TYPE_CHECKING:
    from headway.train.rank import Piece
    from headway.train.row_owners import RowOwners

__all__ = ["replicate", "replicate_after_all", "tile_paths", "unread_parameters"]


def replicate_after_all(
    piece: Piece, plan: Plan, mesh: DeviceMesh, meter: Meter, owners: Owners | RowOwners | None, unread: set[str]
) -> None:
    """`replicate` for a model that was not traced, after its first backward pass: gradients stay as they are."""
    gradients = {parameter: parameter.grad for _, parameter in piece.parameters()}
    piece.wrapped = replicate(piece, plan, None, sorted(unread), mesh, meter, owners)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient


def replicate(
    piece: Piece,
    plan: Plan,
    graph: Graph | None,
    unread: list[str],
    mesh: DeviceMesh,
    meter: Meter,
    owners: Owners | RowOwners | None = None,
) -> nn.Module:
    """The module of a stage, wrapped for data parallelism over the ranks of `mesh`.

    `unread`: parameters that never get a gradient. With `owners` a gradient, or each row of it, is reduced to its
    owner alone (ZeRO-1; an optimizer off the device).
    """
    module = piece.module
    trained = [p for name, p in module.model.named_parameters() if p.requires_grad and name not in unread]
    if not trained or piece.infinity is not None:
        return module
    if plan.zero_stage >= 2:
        assert graph is not None
        _shard(piece, plan, graph, unread, mesh)
        return module
    # Buffers (running statistics) are each replica's own, as under ZeRO-2 and 3; and stand-ins cannot be written to.
    ignored = [f"model.{name}" for name in unread] + [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    bucket_bytes = plan.bucket_bytes if plan.overlap else sum(p.numel() * p.element_size() for p in trained)
    wrapped = DistributedDataParallel(
        module,
        process_group=mesh.get_group(),
        bucket_cap_mb=bucket_bytes / 2**20,  # type: ignore[arg-type]  # a fraction is welcome
        gradient_as_bucket_view=True,
        **_keep_buffers_apart(),
    )
    _reduce_buckets(wrapped, mesh.get_group(), meter, owners)
    return wrapped


def _keep_buffers_apart() -> dict[str, Any]:
    """DDP's word for it changed: buffers (running statistics) are each replica's own, as under ZeRO-2 and 3."""
    accepted = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers": False}


def unread_parameters(piece: Piece, graph: Graph) -> list[str]:
    """Names of parameters that no operator of the traced model reads: they never get a gradient."""
    read = graph.layer_parameters(0, len(graph.layers))
    found = []
    for name, _ in piece.module.model.named_parameters():
        known = graph.parameter_by_name.get(piece.names[name])
        if known is None or known.name not in read:
            found.append(name)
    return found


def _reduce_buckets(
    wrapped: DistributedDataParallel, group: dist.ProcessGroup, meter: Meter, owners: Owners | RowOwners | None
) -> None:
    """Reduce gradients bucket by bucket, and tell the meter when the last bucket was handed over.

    What backward lasts from then on is waiting.
    """

    def reduce(_state, bucket):  # DDP refuses annotations that are text, and here all are
        if bucket.is_last():
            meter.last_bucket = meter.mark()
        return default_hooks.allreduce_hook(group, bucket) if owners is None else owners.reduce(bucket)

    wrapped.register_comm_hook(None, reduce)


def _shard(piece: Piece, plan: Plan, graph: Graph, unread: list[str], mesh: DeviceMesh) -> None:
    """ZeRO-2 and 3: parameters are divided unit by unit, so that only one unit's lie whole at a time.

    A parameter that several units share stays with the root, whole during the step.
    """
    model = piece.module.model
    stage = plan.stages[piece.position]
    shard = partial(fully_shard, mesh=mesh, reshard_after_forward=plan.zero_stage == 3)
    ignored = {model.get_parameter(name) for name in unread}
    owners: dict[nn.Parameter, set[str]] = {}
    paths = list(dict.fromkeys(unit.module for unit in graph.units if stage.start <= unit.layer < stage.stop))
    for path in paths:
        for parameter in model.get_submodule(path).parameters():
            owners.setdefault(parameter, set()).add(path)
    shared = {parameter for parameter, where in owners.items() if len(where) > 1}
    for path in tile_paths(piece):
        shard(model.get_submodule(path), ignored_params=ignored)
    for path in paths:
        unit = model.get_submodule(path)
        if path and any(True for _ in unit.parameters()) and not shared.intersection(unit.parameters()):
            shard(unit, ignored_params=ignored)
    shard(piece.module, ignored_params=ignored)


def tile_paths(piece: Piece) -> list[str]:
    """Modules that are one tile of a layer."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in piece.tiles))
