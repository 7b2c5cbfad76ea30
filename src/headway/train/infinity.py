"""Parameters that rest off the device: sliced over the replicas, fetched when a module needs them, released after.

ZeRO-Infinity (Rajbhandari et al., SC 2021): every rank keeps 1/N of each parameter in its own tier (host memory, disk,
remote memory) and reads that slice alone, so that all links and disks work at once (section 6.1, bandwidth-centric
partitioning); an all-gather over the replicas makes the parameter whole. What comes next is known from the step before:
while a module computes, the next one's slices are gathered, those of the one after it go from host to device, and of
the third from disk to host (section 6.2). Gradients are reduce-scattered, so that a rank keeps those of its slices.

The unit of fetching is a *group*: parameters that are read at the same places. A place is a unit of the traced model,
or one tile of a layer run in tiles (`memory.tiling`). Tied parameters are a group of their own, fetched at each of the
places; what the model reads outside of all units is whole during the step.

A parameter's memory comes and goes under the same tensor: autograd's saved views of it find it again in backward. With
N = 1 the parameter is its own slice, and nothing is communicated: plain offloading.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_leaves

from headway.errors import InputError, PlanError
from headway.memory.tiers import Store
from headway.plan.plan import Stage, Tier
from headway.train.infinity_gradients import Reductions
from headway.train.infinity_groups import (
    Group,
    Member,
    bounds,
    let_go,
    local_of,
    rows_of_part,
    view_of,
    within,
)
from headway.train.infinity_homes import GroupHome, SliceHome, Staging, piece_bytes
from headway.workload.graph import Graph

__all__ = ["Infinity", "Traffic"]

# torch 2.13 has another name for it, and warns of the old one, which is all that torch 2.11 knows.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """What the parameters of one rank moved since it was last asked, in bytes; and how well the order was known.

    `read`: from the tier; `written`: to it; `gathered`, `reduced`: handed to the collectives (this rank's slice, and
    whole gradients). `ahead`: groups that were on their way when a module asked for them; `late`: that were not.
    """

    read_bytes: int = 0
    written_bytes: int = 0
    gathered_bytes: int = 0
    reduced_bytes: int = 0
    ahead: int = 0
    late: int = 0


class Infinity:
    """Keeps the parameters of one pipeline stage in `tier` of `store`, and brings each to `device` when it is needed.

    `model` is changed in place: hooks on the modules that read parameters, and parameters without memory. `names`:
    every name of a parameter to its canonical one. `mesh`: the replicas over which parameters are sliced, None for one;
    `tensor_mesh` the mesh of (data, tensor) where tensor parallelism divided parameters before. `unread`: parameters
    that no operator reads; they stay as they are. `tiles`: module paths of tiles, each fetched by itself.
    `keeps_root`: whether what no unit reads stays whole until `end_step`, as a pipeline needs it. `staging`: that of
    all stages in `store`.

    Call `fill` before the first forward pass. A model whose control flow differs from rank to rank is not supported:
    ranks must meet in the same collectives.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        stage: Stage,
        *,
        store: Store,
        tier: Tier,
        device: torch.device,
        names: dict[str, str],
        prefix: str = "",
        mesh: DeviceMesh | None = None,
        tensor_dims: dict[str, int] | None = None,
        tensor_mesh: DeviceMesh | None = None,
        unread: Iterable[str] = (),
        tiles: Iterable[str] = (),
        keeps_root: bool = False,
        staging: Staging | None = None,
    ) -> None:
        self.store, self.device = store, device
        self.tier: Tier = tier
        self.replicas = 1 if mesh is None else mesh.size()
        self.replica = 0 if mesh is None else mesh.get_local_rank()
        self.traffic = Traffic()
        self._model, self._mesh, self._tensor_mesh = model, mesh, tensor_mesh
        self._tensor_dims = tensor_dims or {}
        self._keeps_root = keeps_root
        self._order: list[Group] = []  # of the step before
        self._recorded: list[Group] = []
        self._at = 0  # in `_order`: what is expected next
        self._backward_watched = False
        self._entered: set[str] = set()  # places whose inputs tell when their backward pass is through
        self._reductions = None if mesh is None else Reductions(mesh, device)
        self._fresh: set[int] = set()  # parameters that came from the meta device, and have no values yet
        self._in_step = False
        self._homes: dict[str, GroupHome] = {}
        self._staging = staging or Staging(store)
        self.groups = self._make_groups(graph, stage, names, prefix, set(unread), set(tiles))
        self._member = {id(m.parameter): m for group in self.groups for m in group.members}
        self._at_place: dict[str, list[Group]] = {}
        for group in self.groups:
            for place in group.places:
                self._at_place.setdefault(place, []).append(group)

    def slice_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What this rank updates of a parameter of the model: the parameter itself where it is not sliced."""
        member = self._member.get(id(parameter))
        return parameter if member is None else member.slice

    def homes(self) -> Iterator[tuple[nn.Parameter, SliceHome]]:
        """Where each slice rests, for an optimizer off the device that writes to it."""
        for group in self.groups:
            home = self._homes.setdefault(group.name, GroupHome(group, self.store, self.tier, self._staging))
            for member in group.members:
                yield member.slice, SliceHome(home, member)

    def rested(self) -> Iterator[tuple[nn.Parameter, SliceHome]]:
        """`homes`, once all that was updated or written is there: between steps, for a checkpoint."""
        for home in self._homes.values():
            home.finish()
        for group in self.groups:
            self.settle(group)
        return self.homes()

    # -- groups

    def _make_groups(
        self, graph: Graph, stage: Stage, names: dict[str, str], prefix: str, unread: set[str], tiles: set[str]
    ) -> list[Group]:
        units = {unit.module for unit in graph.units if stage.start <= unit.layer < stage.stop}
        points = {path for path in units if path}
        read_at: dict[str, set[str]] = {}
        for operator in graph.operators:
            if not operator.backward and stage.start <= operator.layer < stage.stop:
                for name in operator.reads_parameters:
                    read_at.setdefault(graph.parameter_by_name[name].name, set()).add(within(operator.module, points))
        of_tile = {id(p): path for path in tiles for p in self._model.get_submodule(path).parameters()}
        together: dict[tuple, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self._model.named_parameters():
            canonical = names.get(name, name)
            places = {of_tile[id(parameter)]} if id(parameter) in of_tile else read_at.get(canonical)
            if places is None or name in unread:
                continue
            together.setdefault((tuple(sorted(places)), parameter.dtype), []).append((canonical, parameter))
        return [
            self._make_group(f"{prefix}parameters.{number}", places, members)
            for number, ((places, _), members) in enumerate(together.items())
        ]

    def _make_group(self, name: str, places: tuple[str, ...], given: list[tuple[str, nn.Parameter]]) -> Group:
        dtype = given[0][1].dtype
        shapes = [tuple(local_of(parameter).shape) for _, parameter in given]
        if self.replicas > 1 and () in shapes:
            raise PlanError(
                f"{given[shapes.index(())][0]} is one number, which cannot be sliced over {self.replicas} replicas",
                place="plan: parameters_on",
                remedy="give it the shape (1,), or leave the parameters on the device",
            )
        parts = [rows_of_part(shape, self.replicas) * math.prod(shape[1:]) for shape in shapes]
        whole = torch.empty(sum(math.prod(shape) for shape in shapes), dtype=dtype, device=self.device)
        part = whole if self.replicas == 1 else torch.empty(sum(parts), dtype=dtype, device=self.device)
        group = Group(name, [], whole, part, places, piece_bytes(self.store.pool.budget_bytes, self.tier))
        whole_at = part_at = 0
        for (canonical, parameter), shape, size in zip(given, shapes, parts):
            member = Member(canonical, parameter, parameter, shape, whole_at, part_at, size)
            if parameter.is_meta:
                member.parameter = member.slice = self._give_memory(parameter, member, whole)
                self._fresh.add(id(member.parameter))
            if self.replicas > 1:
                member.slice = self._make_slice(member, part)
            group.members.append(member)
            whole_at += member.elements
            part_at += size
        let_go(part)
        # `fill` gives it memory again, when the model's own values go there.
        let_go(whole)
        return group

    def _give_memory(self, parameter: nn.Parameter, member: Member, whole: torch.Tensor) -> nn.Parameter:
        """A parameter made on the meta device cannot be given memory; another takes its place in all modules."""
        made = nn.Parameter(view_of(whole, member.whole_at, member.shape), requires_grad=parameter.requires_grad)
        for module in self._model.modules():
            for name, held in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if held is parameter:
                    setattr(module, name, made)
        return made

    def _make_slice(self, member: Member, part: torch.Tensor) -> nn.Parameter:
        """Rows of a parameter, as `fully_shard` would divide it: checkpoints and optimizers see no difference."""
        first, last = bounds(member.shape, self.replicas, self.replica)
        local = view_of(part, member.part_at, (last - first, *member.shape[1:]))
        full, stride = member.parameter.shape, torch.empty(member.parameter.shape, device="meta").stride()
        dim = self._tensor_dims.get(member.name)
        if dim is not None and isinstance(member.parameter, DTensor):
            assert self._tensor_mesh is not None
            outer = _StridedShard(0, split_factor=self._tensor_mesh.size(1)) if dim == 0 else Shard(0)
            mesh, placements = self._tensor_mesh, (outer, Shard(dim))
        else:
            assert self._mesh is not None
            mesh, placements = self._mesh, (Shard(0),)
        made = DTensor.from_local(local, mesh, placements, run_check=False, shape=full, stride=stride)
        return nn.Parameter(made, requires_grad=member.parameter.requires_grad)

    # -- the first values

    @torch.no_grad()
    def fill(self, initialise: Callable[[nn.Module], None] | None = None) -> None:
        """Move the model's values to the tier, group by group, and install the hooks that bring them back.

        Parameters on the meta device get their values from `initialise(module)`, called for each module that has such,
        by default its `reset_parameters`, and all replicas take those of the first. So a model is never whole anywhere.
        """
        for group in self.groups:
            group.allocate(group.whole)
            made = [member for member in group.members if id(member.parameter) in self._fresh]
            for member in group.members:
                if member not in made:
                    values = local_of(member.parameter).detach()
                    view_of(group.whole, member.whole_at, member.shape).copy_(values)
                    self._point(member, group)
            if made:
                self._initialise(made, initialise or _reset)
                if self._mesh is not None:
                    dist.broadcast(group.whole, dist.get_global_rank(self._mesh.get_group(), 0), self._mesh.get_group())
            if group.part is not group.whole:
                group.allocate(group.part)
                for member in group.members:
                    self._cut(group, member, view_of(group.whole, member.whole_at, member.shape))
                group.let_go(group.whole)
            self._write(group)
            self.settle(group)
        self._install()

    def _initialise(self, made: list[Member], initialise: Callable[[nn.Module], None]) -> None:
        mine = {id(member.parameter) for member in made}
        for module in self._model.modules():
            direct = [p for p in module.parameters(recurse=False) if id(p) in self._member]
            if not any(id(p) in mine for p in direct):
                continue
            # A module may have parameters of other groups too (tied ones), and cannot be told to leave them alone.
            others = [p for p in direct if local_of(p).untyped_storage().nbytes() == 0]
            absent = [g for g in self.groups if any(m.parameter is p for m in g.members for p in others)]
            for group in absent:
                group.allocate(group.whole)
            initialise(module)
            for group in absent:
                group.let_go(group.whole)

    def _point(self, member: Member, group: Group) -> None:
        """Let a parameter of the model look into its group's memory, from now on."""
        view = view_of(group.whole, member.whole_at, member.shape)
        if isinstance(member.parameter, DTensor):
            member.parameter._local_tensor = view
        else:
            member.parameter.data = view

    def _cut(self, group: Group, member: Member, whole: torch.Tensor) -> None:
        first, last = bounds(member.shape, self.replicas, self.replica)
        view_of(group.part, member.part_at, (last - first, *member.shape[1:])).copy_(whole[first:last])

    # -- when modules compute

    def _install(self) -> None:
        self._model.register_state_dict_pre_hook(_refuse_state_dict)
        for place in self._at_place:
            module = self._model.get_submodule(place)
            module.register_forward_pre_hook(self._before_forward(place), with_kwargs=True, prepend=True)
            module.register_forward_hook(self._after_forward(place), always_call=True)
        for group in self.groups:
            for member in group.members:
                if member.parameter.requires_grad:
                    member.parameter.register_post_accumulate_grad_hook(self._gradient_made(group, member))

    def _before_forward(self, place: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for group in self._at_place[place]:
                self._take(group, f"forward {place}" if place or not self._keeps_root else "step")
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if _needs_gradient(leaf)]
            if place and inputs and torch.is_grad_enabled():
                self._entered.add(place)
                register_multi_grad_hook(inputs, lambda _grads: self._backward_through(place))

        return hook

    def _after_forward(self, place: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs = [leaf for leaf in tree_leaves(output) if _needs_gradient(leaf)]
            if outputs and torch.is_grad_enabled():
                register_multi_grad_hook(outputs, lambda _grad: self._backward_begins(place), mode="any")
            elif torch.is_grad_enabled() and not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(output)):
                # Something that hides its tensors: nobody will tell when they go backward.
                for group in self._at_place[place]:
                    group.holders["step"] = 1
            for group in self._at_place[place]:
                self._leave(group, f"forward {place}")

        return hook

    def _backward_begins(self, place: str) -> None:
        if not self._backward_watched:
            self._backward_watched = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)  # type: ignore[attr-defined]
        for group in self._at_place[place]:
            self._take(group, f"backward {place}")

    def _backward_through(self, place: str) -> None:
        for group in self._at_place[place]:
            self._leave(group, f"backward {place}")

    def _gradient_made(self, group: Group, member: Member) -> Callable[[torch.Tensor], None]:
        expected = {each.name for each in group.members if each.parameter.requires_grad}

        def hook(_parameter: torch.Tensor) -> None:
            group.ready.add(member.name)
            if group.ready == expected:
                if self.replicas > 1:
                    self._reduce(group)
                group.ready.clear()
                for place in group.places:
                    # Others tell by their inputs; theirs need no gradient.
                    if place and place not in self._entered:
                        self._leave(group, f"backward {place}", every=True)

        return hook

    def _backward_ended(self) -> None:
        """After a backward pass: nothing of it is needed any more, and groups that lack some gradients are reduced."""
        self._backward_watched = False
        for group in self.groups:
            if group.ready and self.replicas > 1:
                self._reduce(group)
            group.ready.clear()
            for holder in [holder for holder in group.holders if holder != "step"]:
                self._leave(group, holder, every=True)

    # -- memory that comes and goes

    def _take(self, group: Group, holder: str) -> None:
        if holder == "step":
            group.holders[holder] = 1
        else:
            group.holders[holder] += 1
        self._note(group)
        if group.is_whole:
            self._look_ahead()
            return
        started = group.gathering is not None or group.reading is not None
        self.traffic.ahead += started
        self.traffic.late += not started
        self._make_whole(group)
        self._look_ahead()

    def _leave(self, group: Group, holder: str, *, every: bool = False) -> None:
        if holder not in group.holders:
            return
        group.holders[holder] -= 1
        if every or group.holders[holder] <= 0:
            del group.holders[holder]
        if not group.holders and group.is_whole and self._next() is not group:
            group.is_whole = False
            group.let_go(group.whole)

    def _note(self, group: Group) -> None:
        if not self._in_step:
            return
        self._recorded.append(group)
        for at in range(self._at, len(self._order)):
            if self._order[at] is group:
                self._at = at + 1
                return

    def _next(self) -> Group | None:
        return self._order[self._at] if self._at < len(self._order) else None

    @torch.no_grad()
    def _look_ahead(self) -> None:
        """Start what the order of the step before says comes next: gather one, read the second, prefetch the third."""
        if not self._in_step:
            return
        coming: list[Group] = []
        for group in self._order[self._at : self._at + 8]:
            if not group.is_whole and group not in coming:
                coming.append(group)
        for group, begin in zip(coming, (self._begin_gathering, self.begin_reading, self._begin_prefetch)):
            begin(group)

    def _begin_prefetch(self, group: Group) -> None:
        # What rests on the host is as near as a buffer would be.
        if group.reading is None and group.gathering is None and self.tier in ("disk", "remote"):
            group.prefetch(self.store)

    def begin_reading(self, group: Group) -> None:
        """Begin to bring this rank's part of a group to the device, unless it is there or on its way."""
        if group.reading is not None or group.gathering is not None or group.is_whole:
            return
        self.settle(group)
        group.allocate(group.part)
        group.reading = group.read(self.store)
        self.traffic.read_bytes += group.part.numel() * group.part.element_size()

    def _begin_gathering(self, group: Group) -> None:
        if group.gathering is not None or group.is_whole:
            return
        self.begin_reading(group)
        if self._mesh is None:
            return
        self._end_reading(group)
        group.allocate(group.whole)
        gathered = torch.empty(self.replicas * group.part.numel(), dtype=group.part.dtype, device=self.device)
        work = _all_gather(gathered, group.part, group=self._mesh.get_group(), async_op=True)
        group.gathering = (work, gathered)
        self.traffic.gathered_bytes += group.part.numel() * group.part.element_size()

    def _end_reading(self, group: Group) -> None:
        if group.reading is not None:
            group.reading.wait()
            group.reading = None

    @torch.no_grad()
    def _make_whole(self, group: Group) -> None:
        self._begin_gathering(group)
        self._end_reading(group)
        if group.gathering is not None:
            work, gathered = group.gathering
            work.wait()
            group.gathering = None
            for member in group.members:
                whole = view_of(group.whole, member.whole_at, member.shape)
                for replica in range(self.replicas):
                    first, last = bounds(member.shape, self.replicas, replica)
                    at = replica * group.part.numel() + member.part_at
                    whole[first:last].copy_(view_of(gathered, at, (last - first, *member.shape[1:])))
            group.let_go(group.part)
        group.is_whole = True

    def settle(self, group: Group) -> None:
        """Wait until what was written of a group is in its tier."""
        if group.writing is not None:
            group.writing.wait()
            group.writing = None
            group.let_go(group.part)

    def _write(self, group: Group) -> None:
        group.writing = group.write(self.store, self.tier)
        self.traffic.written_bytes += group.part.numel() * group.part.element_size()

    # -- gradients

    def _reduce(self, group: Group) -> None:
        """Begin the reduce-scatter of a group's gradients, of those that this backward pass has made."""
        assert self._reductions is not None
        self.traffic.reduced_bytes += self._reductions.begin([m for m in group.members if m.name in group.ready])

    def finish_gradients(self, divide_by: int = 1) -> None:
        """Wait until every slice has its gradient; divide them, where a pipeline's schedule divides the others."""
        if self._reductions is not None:
            self._reductions.end()
        if self.replicas > 1 and divide_by > 1:
            for group in self.groups:
                for member in group.members:
                    if member.slice.grad is not None:
                        local_of(member.slice.grad).div_(divide_by)

    # -- the update

    def bring(self, group: Group) -> None:
        """This rank's part of a group, in memory."""
        if group.part is group.whole and group.is_whole:
            return
        if group.gathering is not None:  # gathered in vain
            group.gathering[0].wait()
            group.gathering = None
        self.begin_reading(group)
        self._end_reading(group)

    def put_back(self, group: Group) -> None:
        """Begin to write a part that was changed; what was gathered of the old one is forgotten."""
        group.is_whole = False
        group.holders.clear()
        if group.part is not group.whole:
            group.let_go(group.whole)
        self._write(group)

    @contextlib.contextmanager
    def present(self, *, changed: bool = False) -> Iterator[None]:
        """All slices at once in memory, for who must see or, if `changed`, set them: a checkpoint."""
        for group in self.groups:
            self.bring(group)
        try:
            yield
        finally:
            for group in self.groups:
                if changed:
                    self.put_back(group)
                    self.settle(group)
                elif not (group.part is group.whole and group.is_whole):
                    group.let_go(group.part)

    def begin_step(self) -> None:
        """From here on the order of fetches is recorded, and expected to be that of the step before."""
        self._in_step = True

    def end_step(self) -> None:
        """Between steps: nothing is whole, and what was read in vain is dropped. The order becomes the expected one."""
        for home in self._homes.values():
            home.finish()
        for group in self.groups:
            group.holders.clear()
            if group.gathering is not None:
                group.gathering[0].wait()
                group.gathering = None
            self._end_reading(group)
            self.settle(group)
            group.let_go(group.part)
            if group.part is not group.whole:
                group.let_go(group.whole)
            group.is_whole = False
        if self._recorded:
            self._order, self._recorded = self._recorded, []
        self._at = 0
        self._in_step = False
        self._entered.clear()

    def held_bytes(self) -> int:
        """Bytes of parameters that are on the device now."""
        return sum(
            sum(tensor.untyped_storage().nbytes() for tensor in {id(t): t for t in (g.whole, g.part)}.values())
            for g in self.groups
        )


def _refuse_state_dict(_module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
    raise InputError(
        "the parameters rest off the device, so there is no state_dict to take",
        place="model.state_dict",
        remedy="read a checkpoint with headway.train.checkpoint.load_full, or use Parallel.present()",
    )


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise PlanError(
            f"a {type(module).__name__} on the meta device has parameters and no reset_parameters()",
            place="session.prepare: model",
            remedy="give it one, or make the model on the CPU",
        )
    reset()
