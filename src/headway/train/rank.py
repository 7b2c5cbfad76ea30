"""What one rank trains: its pieces of the model, and one training step over them.

`parallel.parallelise` makes a `Parallel` from a plan; a session calls its `step`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from headway.memory.tiling import Tile
from headway.plan.plan import Plan
from headway.train.infinity_groups import local_of
from headway.train.measure import Meter
from headway.train.owners import Owners
from headway.train.stages import StageModule
from headway.train.ties import Tie
from headway.workload.trace import without_cache

# What carries out pipelines, and plans that rest something off the device, is imported where such a plan is: every rank
# of every other plan would pay for it when it starts.
if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.pipelining import PipelineStage

    from headway.memory.tiers import Store
    from headway.train.activations import ActivationSwap
    from headway.train.infinity import Infinity
    from headway.train.offload import OffloadedOptimizer
    from headway.train.row_owners import RowOwners

__all__ = ["Parallel", "Piece"]


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
    zero: ZeroRedundancyOptimizer | None = None  # updates what this replica owns, under ZeRO-1
    owners: Owners | None = None
    row_owners: RowOwners | None = None  # with replicas and an optimizer off the device, under ZeRO-0 and 1
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
        offload, self.offload = self.offload, None
        try:
            if offload is not None:
                offload.close()
        finally:
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
        if self.owners is not None:
            self.owners.drop_others(parameter for _, parameter in self.parameters())
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
                storage = local_of(tensor).untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
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
                    loss = piece.wrapped(index=number)  # a tensor would be moved to the device, and waited for
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
                if parameter.grad is None:
                    continue
                if (owners := self.owners or self.row_owners) is not None:
                    owners.reduce_by_itself(parameter)
                else:
                    dist.all_reduce(parameter.grad, group=self.group("data"))
                    parameter.grad /= self.plan.data
        unread(without)
        self.replicate_later = None

    def _add_up_ties(self) -> None:
        """A parameter that several stages hold gets the sum of their gradients, everywhere the same."""
        for tie in self.ties:
            total = self._reduced(tie.copies[0])
            for copy in tie.copies[1:]:
                total += self._reduced(copy)
            if tie.group is not None and total.numel():
                dist.all_reduce(total, group=tie.group)
            for copy in tie.copies[1:]:
                self._reduced(copy).copy_(total)

    def _reduced(self, parameter: nn.Parameter) -> torch.Tensor:
        """What of a gradient is reduced over the replicas on this rank."""
        gradient = local_of(parameter.grad)
        return gradient if self.row_owners is None else self.row_owners.part(gradient)

    def _clip(self, norm: float) -> None:
        """Scale all gradients so that their norm over the whole model is at most `norm`, as `clip_grad_norm_` does."""
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        square = torch.zeros((), dtype=dtype, device=self.device)
        for parameter in self._counted():
            if self.offload is not None and self.offload.holds(parameter):
                square += self.offload.square(parameter, dtype)
                continue
            if parameter.grad is not None:
                square += self._reduced(parameter).detach().to(dtype).square().sum()
        if self.mesh is not None:
            dist.all_reduce(square)
        factor = torch.clamp(norm / (square.sqrt() + 1e-6), max=1.0)
        if self.offload is not None:
            self.offload.factor = float(factor)
            return
        for _, parameter in self.parameters():
            if parameter.grad is not None:
                gradient = local_of(parameter.grad)
                gradient.mul_(factor.to(gradient.dtype))

    def _counted(self) -> Iterator[nn.Parameter]:
        """Parameters whose gradient this rank adds to the norm, so that over all ranks each element counts once."""
        _, data, tensor = self.coordinates
        followers = {id(copy) for tie in self.ties for copy in (tie.copies[1:] if tie.leads else tie.copies)}
        for name, parameter in self.parameters():
            # Under ZeRO-1 only its owner still has the gradient of a parameter; else each replica may have its rows.
            divided = isinstance(parameter, DTensor) or (self.row_owners is not None and parameter.ndim)
            if data and not divided and self.owners is None:
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
            from headway.train.infinity_update import update_slices

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
