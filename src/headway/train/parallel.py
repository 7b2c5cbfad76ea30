"""Carries a plan out: divides an ordinary PyTorch model and its optimizer among ranks, from outside.

`parallelise` is the road; it composes what torch has: `parallelize_module` for tensor parallelism, `PipelineStage` and
its schedules, `DistributedDataParallel` with `ZeroRedundancyOptimizer` for ZeRO-1, and `fully_shard` (ZeRO-2 and 3).
What it returns trains with the numbers of one process: the same losses, the same parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from headway.errors import PlanError
from headway.memory.tiling import tile
from headway.plan.plan import Plan
from headway.train.measure import Meter
from headway.train.owners import Owners
from headway.train.rank import Parallel, Piece
from headway.train.replication import replicate, replicate_after_all, tile_paths, unread_parameters
from headway.train.stages import StageModule, canonical_names, copy_structure, recompute_units
from headway.train.tensor import split_dimensions, split_modules
from headway.train.ties import make_ties
from headway.workload.graph import Graph

# What carries out pipelines, and plans that rest something off the device, is imported where such a plan is: every rank
# of every other plan would pay for it when it starts.
if TYPE_CHECKING:
    from headway.memory.tiers import Store
    from headway.train.infinity import Infinity
    from headway.train.infinity_homes import Staging
    from headway.train.offload_setup import Masters
    from headway.train.row_owners import RowOwners

__all__ = ["Parallel", "Piece", "parallelise"]
Loss = Callable[[Any, Any], torch.Tensor]


def parallelise(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    graph: Graph | None = None,
    *,
    rank: int = 0,
    device: torch.device | str = "cpu",
    loss: Loss | None = None,
    clip_norm: float | None = None,
    meter: Meter | None = None,
    store: Store | None = None,
    initialise: Callable[[nn.Module], None] | None = None,
) -> Parallel:
    """Divide `model` and `optimizer` as `plan` says; both are changed in place and keep this rank's part.

    The process group must stand when the plan has several ranks. `graph` may be None for a plan that only replicates.
    `loss(output, targets)` is the mean over a micro-batch; None: the model returns its loss. `store` is where states
    rest off the device; by default one is opened, which `Parallel.close` closes. With parameters off the device the
    model may be on the meta device: `initialise(module)` then gives values to the modules one by one (`Infinity.fill`).
    Raises PlanError for what the plan asks and the model or torch cannot give.
    """
    device = torch.device(device)
    meter = meter or Meter(rank, device)
    if graph is not None:
        plan.validate(graph)
    elif (
        plan.pipeline > 1
        or any(stage.recompute for stage in plan.stages)
        or plan.zero_stage > 1
        or plan.parameters_on != "device"
        or plan.activations_on != "device"
    ):
        raise PlanError("needs the traced model", place="plan", remedy="give the workload beside the plan")

    groups = _names_in_groups(model, optimizer)
    names = canonical_names(model)
    mesh = _mesh(plan, device)
    if mesh is not None and plan.collectives:
        _name_algorithms(plan, mesh)
    if mesh is not None:
        _agree(model, device)
    dims = split_dimensions(model, dict(plan.tensor_sharding), graph)
    canonical_dims = {names[name]: dim for name, dim in dims.items()}
    if mesh is not None and plan.tensor > 1:
        split_modules(model, dict(plan.tensor_sharding), dims, mesh["tensor"])

    pieces = [
        _piece(part, position, plan, graph, names, loss, device)
        for position, part in _stage_models(model, plan, plan.coordinates(rank)[0])
    ]
    _separate(pieces)
    for piece in pieces:
        _tile(piece, plan)
    if plan.tiers and store is None:
        from headway.train.tier_store import open_store

        store = open_store(plan, rank, device)
    staging = None
    if plan.parameters_on != "device":
        from headway.train.infinity_homes import Staging

        assert store is not None
        staging = Staging(store)
    masters: Masters = {}
    if plan.optimizer_on != "device":
        from headway.train.offload_setup import lay_out_rows, lower_precision

        for piece in pieces:
            lay_out_rows(piece.module.model)
        masters = {piece.position: lower_precision(piece.module.model, plan) for piece in pieces}
    owners = None
    row_owners: RowOwners | None = None
    if mesh is not None and plan.data > 1 and plan.zero_stage < 2:
        if plan.optimizer_on != "device":
            from headway.train.row_owners import RowOwners

            row_owners = RowOwners(mesh.get_group("data"), piece_bytes=plan.bucket_bytes)
        elif plan.zero_stage == 1:
            owners = Owners(mesh.get_group("data"))
    for piece in pieces:
        if graph is not None:
            stage = plan.stages[piece.position]
            swapped = plan.swapped_layers(stage)
            recompute_units(piece.module.model, graph, [at for at in stage.recompute if at not in swapped])
            if swapped:
                from headway.train.activations import ActivationSwap

                assert store is not None
                piece.swap = ActivationSwap(
                    piece.module,
                    piece.module.model,
                    graph,
                    store=store,
                    tier=plan.activations_on,
                    layers=swapped,
                    recompute=stage.recompute,
                    prefix=f"stage.{piece.position}.",
                )
        if plan.parameters_on != "device":
            assert graph is not None
            assert store is not None
            piece.infinity = _rest(piece, plan, graph, store, device, canonical_dims, mesh, staging)
        _bring_to(device, piece)
        if mesh is not None and plan.data > 1 and graph is not None:
            unread = unread_parameters(piece, graph)
            piece.wrapped = replicate(piece, plan, graph, unread, mesh["data"], meter, owners or row_owners)
        piece.module.watch_cuts()

    parallel = Parallel(
        plan,
        device,
        rank,
        mesh,
        pieces,
        optimizer,
        canonical_dims,
        meter,
        owners=owners,
        row_owners=row_owners,
        clip_norm=clip_norm,
        store=store,
    )
    if mesh is not None and plan.data > 1 and graph is None:
        # DDP has to be told which parameters get no gradient, and without a trace only a step shows it.
        parallel.replicate_later = partial(
            replicate_after_all, pieces[0], plan, mesh["data"], meter, owners or row_owners
        )
    parallel.ties = make_ties(parallel, graph)
    _point_at(optimizer, groups, parallel)
    if owners is not None:
        owners.everywhere(copy for tie in parallel.ties for copy in tie.copies)
        parallel.zero = owners.deal(optimizer)
    if plan.pipeline > 1:
        assert graph is not None
        from headway.train.pipeline import make_schedule

        parallel.stages, parallel.schedule = make_schedule(parallel, graph)
    for infinity in parallel.infinities:
        infinity.fill(initialise=initialise)
    if plan.optimizer_on != "device":
        homes = {id(p): home for each in parallel.infinities for p, home in each.homes()}
        from headway.train.offload_setup import rest_optimizer

        parallel.offload = rest_optimizer(parallel, masters, homes)
    return parallel


def _mesh(plan: Plan, device: torch.device) -> DeviceMesh | None:
    if plan.world_size == 1:
        return None
    return init_device_mesh(
        device.type, (plan.pipeline, plan.data, plan.tensor), mesh_dim_names=("pipeline", "data", "tensor")
    )


def _name_algorithms(plan: Plan, mesh: DeviceMesh) -> None:
    """Have Headway's exchange use the algorithms that the plan names for the collectives of its axes."""
    from headway.exchange.process_group import set_algorithm

    for axis, algorithm in plan.collectives.items():
        if mesh[axis].size() > 1:
            set_algorithm(algorithm, group=mesh.get_group(axis))


def _agree(model: nn.Module, device: torch.device) -> None:
    """Every rank begins with the parameters and buffers of rank 0, however its script was seeded.

    NCCL sends from the device alone: what is elsewhere goes there and back, one tensor at a time.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                sent = tensor.detach().to(device)
                dist.broadcast(sent, 0)
                if sent.device != tensor.device:
                    tensor.copy_(sent)


def _bring_to(device: torch.device, piece: Piece) -> None:
    """Move a stage's parameters and buffers to the device, but for those that rest elsewhere: they may not fit."""
    groups = piece.infinity.groups if piece.infinity is not None else ()
    resting = {id(member.parameter) for group in groups for member in group.members}
    for module in piece.module.model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in resting:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _stage_models(model: nn.Module, plan: Plan, pipeline_rank: int) -> list[tuple[int, nn.Module]]:
    positions = plan.stages_of(pipeline_rank)
    # Copies first: the first stage is cut out of the model itself.
    copies = [copy_structure(model) for _ in positions[1:]]
    return list(zip(positions, [model, *copies]))


def _piece(
    model: nn.Module,
    position: int,
    plan: Plan,
    graph: Graph | None,
    names: dict[str, str],
    loss: Loss | None,
    device: torch.device,
) -> Piece:
    stage = plan.stages[position]
    context: Callable[[], Any] = contextlib.nullcontext
    if plan.precision != "float32":
        context = partial(
            torch.autocast,
            device.type,
            dtype=getattr(torch, plan.precision),
            # It would keep a low-precision copy of every weight until the end of the forward pass.
            cache_enabled=plan.parameters_on == "device",
        )
    module = StageModule(
        model, graph, stage.start, stage.stop, micro_batch=plan.micro_batch, loss=loss, device=device, context=context
    )
    return Piece(module=module, wrapped=module, position=position, names=names)


def _separate(pieces: list[Piece]) -> None:
    """Give each stage its own copy of a parameter that two stages on this rank hold; `Tie` adds up their gradients."""
    seen: set[int] = set()
    for piece in pieces:
        copies: dict[int, nn.Parameter] = {}
        for module in piece.module.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in seen:
                    copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    setattr(module, name, copies.setdefault(id(parameter), copy))
        seen.update(id(parameter) for parameter in piece.module.parameters())


def _tile(piece: Piece, plan: Plan) -> None:
    """Run layers of this stage in tiles; a tile's parameter goes by the name of the untiled one."""
    model = piece.module.model
    here = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    # A layer of another stage is not there, or has a stand-in.
    made = tile(model, {path: count for path, count in plan.tiles.items() if path in here or plan.pipeline == 1})
    piece.names = {**piece.names, **{name: piece.names[each.name] for name, each in made.items()}}
    piece.tiles = made


def _rest(
    piece: Piece,
    plan: Plan,
    graph: Graph,
    store: Store,
    device: torch.device,
    tensor_dims: dict[str, int],
    mesh: DeviceMesh | None,
    staging: Staging | None,
) -> Infinity:
    """Let the parameters of a stage rest off the device, each rank keeping a slice of its own."""
    from headway.train.infinity import Infinity

    replicated = mesh is not None and plan.data > 1
    return Infinity(
        piece.module.model,
        graph,
        plan.stages[piece.position],
        store=store,
        tier=plan.parameters_on,
        device=device,
        names=piece.names,
        prefix=f"stage.{piece.position}.",
        mesh=mesh["data"] if replicated and mesh is not None else None,
        tensor_dims=tensor_dims,
        tensor_mesh=mesh["data", "tensor"] if replicated and mesh is not None and plan.tensor > 1 else None,
        unread=unread_parameters(piece, graph),
        tiles=tile_paths(piece),
        keeps_root=plan.pipeline > 1,
        staging=staging,
    )


def _names_in_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise PlanError(
                    f"group {number} holds a tensor of shape {tuple(parameter.shape)} that the model has not",
                    place="session.prepare: optimizer",
                    remedy="make the optimizer from model.parameters()",
                )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return groups


def _point_at(optimizer: torch.optim.Optimizer, groups: list[list[str]], parallel: Parallel) -> None:
    """Let the user's optimizer update this rank's parameters, each in the group that its name was in."""
    held: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parallel.parameters():
        held.setdefault(name, []).append(parameter)
    old = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for group, names in zip(optimizer.param_groups, groups):
        group["params"] = [parameter for name in names for parameter in held.get(name, ())]
    new = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if optimizer.state and old != new:
        raise PlanError(
            "the optimizer has already made steps, and its state cannot be divided",
            place="session.prepare: optimizer",
            remedy="prepare a fresh optimizer; to go on from a checkpoint, use --resume",
        )
