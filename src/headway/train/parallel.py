"""Carries a plan out: divides an ordinary PyTorch model and its optimizer among ranks, from outside.

`parallelise` is the road; it composes what torch has: `parallelize_module` for tensor parallelism, `PipelineStage` and
its schedules, `DistributedDataParallel`, `ZeroRedundancyOptimizer` (ZeRO-1) and `fully_shard` (ZeRO-2 and 3). What it
returns trains with the numbers of one process: the same losses, the same parameters.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from headway.errors import PlanError
from headway.memory.tiling import Tile, tile
from headway.plan.plan import Plan
from headway.train.measure import Meter
from headway.train.stages import StageModule, canonical_names, copy_structure, recompute_units
from headway.train.tensor import split_dimensions, split_modules
from headway.workload.graph import Graph, TensorKind
from headway.workload.trace import without_cache

# What carries out plans that rest something off the device is imported where such a plan is: every rank of every other
# plan would pay for it when it starts.
if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    from headway.memory.tiers import Store
    from headway.train.activations import ActivationSwap
    from headway.train.infinity import Infinity
    from headway.train.offload import OffloadedOptimizer
    from headway.train.offload_setup import Masters

__all__ = ["Parallel", "Piece", "parallelise"]

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass
class Piece:
    """One stage of the model on this rank: the module to call, and the same wrapped for data parallelism."""

    module: StageModule
    wrapped: nn.Module
    position: int  # in Plan.stages
    names: dict[str, str]  # of every parameter of the whole model, aliases included → the canonical one
    infinity: Infinity | None = None  # keeps the parameters, where they rest off the device
    swap: ActivationSwap | None = None  # … and saved activations
    tiles: dict[str, Tile] = field(
        default_factory=dict
    )  # by the name, in the module, of a parameter that is but a tile

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(canonical name, parameter) of this stage, as this rank updates it; of a layer in tiles, each tile."""
        for name, parameter in self.module.model.named_parameters():
            yield self.names[name], self.slice_of(parameter)

    def slice_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What this rank updates of a parameter of the module."""
        return parameter if self.infinity is None else self.infinity.slice_of(parameter)

    def tile_of(self) -> dict[int, Tile]:
        """By the id of a parameter, as this rank updates it: which tile it is."""
        found = {name: parameter for name, parameter in self.module.model.named_parameters() if name in self.tiles}
        return {id(self.slice_of(parameter)): self.tiles[name] for name, parameter in found.items()}


@dataclass
class Parallel:
    """What one rank trains, and how: `step` runs forward, backward and update over one replica's samples."""

    plan: Plan
    device: torch.device
    rank: int
    mesh: DeviceMesh | None
    pieces: list[Piece]
    optimizer: torch.optim.Optimizer  # the user's, pointed at this rank's parameters
    tensor_dims: dict[str, int]
    meter: Meter
    zero: ZeroRedundancyOptimizer | None = None
    schedule: Any = None
    stages: list[PipelineStage] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    replicate_later: Callable[[set[str]], None] | None = None
    clip_norm: float | None = None
    store: Store | None = None  # for what rests off the device
    offload: OffloadedOptimizer | None = None

    @property
    def infinities(self) -> list[Infinity]:
        """Of each stage whose parameters rest off the device, what keeps them."""
        return [piece.infinity for piece in self.pieces if piece.infinity is not None]

    @contextlib.contextmanager
    def present(self, *, changed: bool = False) -> Iterator[None]:
        """With all parameters of this rank in memory, for who must see or, if `changed`, set them: a checkpoint."""
        with contextlib.ExitStack() as held:
            for infinity in self.infinities:
                held.enter_context(infinity.present(changed=changed))
            yield

    def tiles(self) -> dict[int, Tile]:
        """By the id of a parameter of this rank: which tile of a layer it is."""
        return {known: each for piece in self.pieces for known, each in piece.tile_of().items()}

    def close(self) -> None:
        """Let go of what rests off the device, files included. Idempotent."""
        if self.offload is not None:
            self.offload.close()
            self.offload = None
        if self.store is not None:
            self.store.close()

    @property
    def coordinates(self) -> tuple[int, int, int]:
        return self.plan.coordinates(self.rank)

    def group(self, dimension: str) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group(dimension)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(canonical name, parameter) of this rank; a tied parameter comes once for each stage that holds it."""
        for piece in self.pieces:
            yield from piece.parameters()

    def step(self, micro_batches: Sequence[tuple[Any, Any]]) -> torch.Tensor | None:
        """One training step over the replica's micro-batches; its mean loss, on ranks that hold the last stage."""
        for piece in self.pieces:
            piece.module.micro_batches = micro_batches
            if piece.infinity is not None:
                piece.infinity.begin_step()
        if self.offload is not None:
            hooked = self.schedule is None and (self.plan.data == 1 or self.plan.zero_stage >= 2)
            self.offload.begin(len(micro_batches), hooked=hooked)
        with contextlib.ExitStack() as settings:
            if self.plan.tensor > 1:
                # In backward too: operators on divided tensors meet plain ones (masks) there as well.
                settings.enter_context(implicit_replication())
            for piece in self.pieces:
                settings.enter_context(without_cache(piece.module.model))
            loss = self._accumulate(len(micro_batches)) if self.schedule is None else self._pipeline(len(micro_batches))
        for piece in self.pieces:
            piece.module.micro_batches = ()
        if self.replicate_later is not None:
            self._replicate_now(self.replicate_later)
        for infinity in self.infinities:
            infinity.finish_gradients(1 if self.schedule is None else len(micro_batches))
        self._add_up_ties()
        with self.meter.section("optimizer", "update"):
            if self.clip_norm is not None:
                self._clip(self.clip_norm)
            self._update()
            for _, parameter in self.parameters():
                parameter.grad = None
        for piece in self.pieces:
            if piece.infinity is not None:
                piece.infinity.end_step()
            if piece.swap is not None:
                piece.swap.end_step()
        return loss

    def held_bytes(self, batch: Any = ()) -> float:
        """Bytes of all tensors that stay alive between steps, each storage once, and of `batch`."""
        tensors: list[Any] = tree_leaves(batch)
        inner = self.optimizer if self.zero is None else self.zero.optim
        for state in inner.state.values():
            tensors.extend(state.values())
        if self.offload is not None:
            tensors.extend(self.offload.kept_tensors())
        for piece in self.pieces:
            tensors.extend((*piece.module.parameters(), *piece.module.buffers()))
        for stage in self.stages:
            for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
                tensors.extend(info.buffer for info in infos)
        storages: dict[int, int] = {}
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                local = _local(tensor)
                assert local is not None
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
        # DDP keeps its buckets when the gradients that look into them are dropped.
        buckets = sum(
            parameter.numel() * parameter.element_size()
            for piece in self.pieces
            if isinstance(piece.wrapped, DistributedDataParallel)
            for parameter in piece.module.parameters()
            if parameter.requires_grad
        )
        return float(sum(storages.values()) + buckets)

    def tier_bytes(self) -> dict[str, float]:
        """The most bytes that rested in each tier off the device so far, and that transfer buffers held ("buffers")."""
        if self.store is None:
            return {}
        found = {str(tier): float(use.peak_bytes) for tier, use in self.store.use().items() if tier != "device"}
        return {tier: size for tier, size in {**found, "buffers": float(self.store.pool.peak_bytes)}.items() if size}

    def _accumulate(self, count: int) -> torch.Tensor:
        (piece,) = self.pieces
        total = torch.zeros((), device=self.device, dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
        for number in range(count):
            last = number == count - 1
            hold = contextlib.nullcontext()
            if isinstance(piece.wrapped, DistributedDataParallel) and not last:
                hold = piece.wrapped.no_sync()
            elif isinstance(piece.wrapped, FSDPModule):
                # Gradients are divided after every micro-batch: that they never lie whole is what ZeRO-2 is for.
                piece.wrapped.set_is_last_backward(last)
            with hold:
                with self.meter.section("forward", f"forward {number}"):
                    loss = piece.wrapped(index=torch.tensor([number]))
                with self.meter.section("backward", f"backward {number}"):
                    (loss / count).backward()
            total += loss.detach()
        return total / count

    def _pipeline(self, count: int) -> torch.Tensor | None:
        losses: list[torch.Tensor] = []
        numbers = torch.arange(count)
        last = any(piece.module.is_last for piece in self.pieces)
        # Outside of forward and backward a stage waits for its neighbours.
        self.meter.waiting_kind = "bubble"
        try:
            self.schedule.step(index=numbers, target=numbers if last else None, losses=losses, return_outputs=False)
        finally:
            self.meter.waiting_kind = "communication"
        return torch.stack([loss.detach() for loss in losses]).mean() if last else None

    def _replicate_now(self, unread: Callable[[set[str]], None]) -> None:
        """After the first backward pass of a model that was not traced: reduce by hand, and wrap it for the next."""
        assert self.mesh is not None
        without = {name for name, parameter in self.parameters() if parameter.grad is None}
        with self.meter.section("communication", "gradients"):
            for _, parameter in self.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self.group("data"))
                    parameter.grad /= self.plan.data
        unread(without)
        self.replicate_later = None

    def _add_up_ties(self) -> None:
        """A parameter that several stages hold gets the sum of their gradients, everywhere the same."""
        for tie in self.ties:
            total = _local(tie.copies[0].grad)
            assert total is not None
            for copy in tie.copies[1:]:
                total += _local(copy.grad)  # type: ignore[operator]
            if tie.group is not None:
                dist.all_reduce(total, group=tie.group)
            for copy in tie.copies[1:]:
                _local(copy.grad).copy_(total)  # type: ignore[union-attr]

    def _clip(self, norm: float) -> None:
        """Scale all gradients so that their norm over the whole model is at most `norm`, as `clip_grad_norm_` does."""
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        square = torch.zeros((), dtype=dtype, device=self.device)
        for parameter in self._counted():
            if self.offload is not None and self.offload.holds(parameter):
                square += self.offload.square(parameter, dtype)
                continue
            gradient = _local(parameter.grad)
            if gradient is not None:
                square += gradient.detach().to(dtype).square().sum()
        if self.mesh is not None:
            dist.all_reduce(square)
        factor = torch.clamp(norm / (square.sqrt() + 1e-6), max=1.0)
        if self.offload is not None:
            self.offload.factor = float(factor)
            return
        for _, parameter in self.parameters():
            if parameter.grad is not None:
                gradient = _local(parameter.grad)
                assert gradient is not None
                gradient.mul_(factor.to(gradient.dtype))

    def _counted(self) -> Iterator[nn.Parameter]:
        """Parameters whose gradient this rank adds to the norm, so that over all ranks each element counts once."""
        _, data, tensor = self.coordinates
        followers = {id(copy) for tie in self.ties for copy in (tie.copies[1:] if tie.leads else tie.copies)}
        for name, parameter in self.parameters():
            if data and not isinstance(parameter, DTensor):
                continue
            if tensor and name not in self.tensor_dims:
                continue
            if id(parameter) not in followers:
                yield parameter

    def _update(self) -> None:
        if self.offload is not None:
            self.offload.step()
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # as below
            return
        if self.infinities:
            from headway.train.infinity import update_slices

            update_slices(self.infinities, self.optimizer)
            return
        if self.zero is None:
            self.optimizer.step()
            return
        held = [group for group in self.optimizer.param_groups if group["params"]]
        for mine, theirs in zip(self.zero.param_groups, held, strict=True):
            # A scheduler works on the user's optimizer; ZeRO's own follows it.
            mine.update({key: value for key, value in theirs.items() if key != "params"})
        self.zero.step()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or a scheduler believes there was no step


@dataclass
class Tie:
    """Copies of one parameter on this rank, held by several stages; `group` reaches the copies on other ranks."""

    copies: list[nn.Parameter]
    group: dist.ProcessGroup | None
    leads: bool  # this rank's first copy stands for all of them, in the norm and in checkpoints


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
        _agree(model)
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
    masters: Masters = {}
    if plan.optimizer_on != "device":
        from headway.train.offload_setup import lower_precision

        masters = {piece.position: lower_precision(piece.module.model, plan) for piece in pieces}
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
            piece.infinity = _rest(piece, plan, graph, store, device, canonical_dims, mesh)
        piece.module.model.to(device)
        if mesh is not None and plan.data > 1 and graph is not None:
            piece.wrapped = _replicate(piece, plan, graph, _unread(piece, graph), mesh["data"], meter)
        piece.module.watch_cuts()

    parallel = Parallel(
        plan, device, rank, mesh, pieces, optimizer, canonical_dims, meter, clip_norm=clip_norm, store=store
    )
    if mesh is not None and plan.data > 1 and graph is None:
        # DDP has to be told which parameters get no gradient, and without a trace only a step shows it.
        parallel.replicate_later = partial(_wrap_after_all, pieces[0], plan, mesh["data"], meter)
    parallel.ties = _ties(parallel, graph)
    _point_at(optimizer, groups, parallel)
    if plan.zero_stage == 1 and plan.optimizer_on == "device":
        parallel.zero = _zero(optimizer, parallel)
    if plan.pipeline > 1:
        assert graph is not None
        parallel.stages, parallel.schedule = _schedule(parallel, graph)
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


def _agree(model: nn.Module) -> None:
    """Every rank begins with the parameters and buffers of rank 0, however its script was seeded."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            dist.broadcast(tensor.detach(), 0)


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
        model, graph, stage.start, stage.stop, micro_batch=plan.micro_batch, loss=loss, context=context
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


def _wrap_after_all(piece: Piece, plan: Plan, mesh: DeviceMesh, meter: Meter, unread: set[str]) -> None:
    gradients = {parameter: parameter.grad for _, parameter in piece.parameters()}
    piece.wrapped = _replicate(piece, plan, None, sorted(unread), mesh, meter)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient


def _replicate(
    piece: Piece, plan: Plan, graph: Graph | None, unread: list[str], mesh: DeviceMesh, meter: Meter
) -> nn.Module:
    """Data parallelism over the ranks of `mesh`. `unread`: parameters that never get a gradient."""
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
    _watch_buckets(wrapped, mesh.get_group(), meter)
    return wrapped


def _keep_buffers_apart() -> dict[str, Any]:
    """DDP's word for it changed: buffers (running statistics) are each replica's own, as under ZeRO-2 and 3."""
    accepted = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers": False}


def _unread(piece: Piece, graph: Graph) -> list[str]:
    """Names of parameters that no operator of the traced model reads: they never get a gradient."""
    read = graph.layer_parameters(0, len(graph.layers))
    found = []
    for name, _ in piece.module.model.named_parameters():
        known = graph.parameter_by_name.get(piece.names[name])
        if known is None or known.name not in read:
            found.append(name)
    return found


def _watch_buckets(wrapped: DistributedDataParallel, group: dist.ProcessGroup, meter: Meter) -> None:
    """Tell the meter when the last bucket of gradients was handed over: what backward lasts from then on is waiting."""

    def reduce(_state, bucket):  # DDP refuses annotations that are text, and here all are
        if bucket.is_last():
            meter.last_bucket = meter.mark()
        return default_hooks.allreduce_hook(group, bucket)

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
    for path in _tile_paths(piece):
        shard(model.get_submodule(path), ignored_params=ignored)
    for path in paths:
        unit = model.get_submodule(path)
        if path and any(True for _ in unit.parameters()) and not shared.intersection(unit.parameters()):
            shard(unit, ignored_params=ignored)
    shard(piece.module, ignored_params=ignored)


def _tile(piece: Piece, plan: Plan) -> None:
    """Run layers of this stage in tiles; a tile's parameter goes by the name of the untiled one."""
    model = piece.module.model
    here = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    # A layer of another stage is not there, or has a stand-in.
    made = tile(model, {path: count for path, count in plan.tiles.items() if path in here or plan.pipeline == 1})
    piece.names = {**piece.names, **{name: piece.names[each.name] for name, each in made.items()}}
    piece.tiles = made


def _tile_paths(piece: Piece) -> list[str]:
    """Modules that are one tile of a layer."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in piece.tiles))


def _rest(
    piece: Piece,
    plan: Plan,
    graph: Graph,
    store: Store,
    device: torch.device,
    tensor_dims: dict[str, int],
    mesh: DeviceMesh | None,
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
        unread=_unread(piece, graph),
        tiles=_tile_paths(piece),
        keeps_root=plan.pipeline > 1,
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


def _zero(optimizer: torch.optim.Optimizer, parallel: Parallel) -> ZeroRedundancyOptimizer | None:
    groups = [group for group in optimizer.param_groups if group["params"]]
    if not groups:
        return None
    accepted = inspect.signature(type(optimizer).__init__).parameters
    defaults = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
    with warnings.catch_warnings():
        # Importing it compiles with TorchScript, which torch itself deprecates; nobody else needs to pay for that.
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(
            [dict(group) for group in groups],
            type(optimizer),
            process_group=parallel.group("data"),
            # One broadcast for each owner, and not one for each parameter.
            parameters_as_bucket_view=len(dtypes) == 1,
            **defaults,
        )


def _ties(parallel: Parallel, graph: Graph | None) -> list[Tie]:
    """Parameters that several stages read. Every rank of a holder's pipeline takes part in making their groups."""
    plan = parallel.plan
    if graph is None or len(plan.stages) == 1:
        return []
    holders: dict[str, list[int]] = {}
    for position, stage in enumerate(plan.stages):
        for name, parameter in graph.layer_parameters(stage.start, stage.stop).items():
            if parameter.trainable:
                holders.setdefault(name, []).append(position)
    ties = []
    groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    mine: dict[tuple[int, str], nn.Parameter] = {
        (piece.position, name): parameter for piece in parallel.pieces for name, parameter in piece.parameters()
    }
    pipeline_rank, data, tensor = parallel.coordinates
    for name, positions in sorted(holders.items()):
        if len(positions) < 2:
            continue
        ranks = sorted({position % plan.pipeline for position in positions})
        if len(ranks) > 1:
            for d in range(plan.data):
                for t in range(plan.tensor):
                    members = tuple(plan.rank_of(p, d, t) for p in ranks)
                    if members not in groups:
                        made = dist.new_group(list(members))
                        groups[members] = made if isinstance(made, dist.ProcessGroup) else None
        copies = [mine[position, name] for position in positions if (position, name) in mine]
        if copies:
            members = tuple(plan.rank_of(p, data, tensor) for p in ranks)
            ties.append(Tie(copies, groups.get(members), leads=pipeline_rank == positions[0] % plan.pipeline))
    return ties


def _schedule(parallel: Parallel, graph: Graph) -> tuple[list[PipelineStage], Any]:
    plan, group = parallel.plan, parallel.group("pipeline")
    stages: list[PipelineStage] = []
    for piece in parallel.pieces:
        stage = plan.stages[piece.position]
        received = None if stage.start == 0 else graph.layers[stage.start].input
        handed_on = None if piece.module.is_last else graph.layers[stage.stop].input
        made = _MeasuredStage(
            piece.wrapped,
            piece.position,
            len(plan.stages),
            parallel.device,
            input_args=() if received is None else (_example(received, plan.micro_batch),),
            output_args=(_example(handed_on, plan.micro_batch),),
            group=group,
        )
        made.meter = parallel.meter
        stages.append(made)
    make: Any = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}[plan.schedule]
    schedule = make(
        stages if plan.schedule == "interleaved" else stages[0],
        plan.micro_batches,
        loss_fn=lambda loss, _number: loss,  # the last stage has computed it
    )
    return stages, schedule


def _example(kind: TensorKind | None, samples: int) -> torch.Tensor:
    if kind is None:
        return torch.empty((), device="meta", requires_grad=True)
    return torch.empty(kind.shape(samples), dtype=getattr(torch, kind.dtype), device="meta", requires_grad=True)


class _MeasuredStage(PipelineStage):
    """A stage that tells the meter when it computes."""

    meter: Meter

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.meter.section("forward", f"forward {fwd_chunk_id} (stage {self.stage_index})"):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.meter.section("backward", f"backward {bwd_chunk_id} (stage {self.stage_index})"):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def perform_reduce_grad(self, grad_scale_factor: int) -> Any:
        with self.meter.section("backward", f"reduce gradients (stage {self.stage_index})"):
            return super().perform_reduce_grad(grad_scale_factor)


def _local(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
