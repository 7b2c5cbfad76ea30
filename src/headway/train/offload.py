"""The optimizer off the device: forward and backward there, master weights, moments and the update elsewhere.

ZeRO-Offload (Ren et al., ATC 2021) and the optimizer's part of ZeRO-Infinity (Rajbhandari et al., SC 2021). Gradients
leave the device as backward makes them; each rank updates its own share of the parameters, in chunks, so that one chunk
is updated while the gradient of the next comes and the parameters of the one before go back; with several replicas the
new parameters are then all-gathered, or stay divided under ZeRO-2 and 3.

What happens to a gradient depends on what else the step needs of it:

- one micro-batch, and nothing that needs all gradients at once: the update follows at once, beside backward, and no
  gradient ever waits anywhere;
- gradient clipping, several micro-batches, or the delayed update: gradients are held on the host until backward has
  ended, several micro-batches added up there in float32. Where the device is the host itself, and the sum has the
  parameter's dtype anyway, they stay where autograd put them;
- under DDP and in pipelines they are complete only after backward, and leave then.

Without the delayed update the parameters are those of the same training not offloaded, bit for bit on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from headway.errors import InputError, PlanError
from headway.memory.optimizer import BLOCK_ELEMENTS, HostOptimizer, StateTensor
from headway.memory.threads import work_on
from headway.memory.tiers import Store
from headway.plan.plan import Plan
from headway.train.offload_kept import Kept
from headway.train.offload_lanes import Lane, Returning, Transfer
from headway.train.offload_shares import Held, Share, gather_rows
from headway.train.offload_states import ChunkStates
from headway.train.offload_times import OffloadTimes

__all__ = ["OffloadedOptimizer", "Share"]

CHUNK_ELEMENTS = 4 * 2**20
"""Elements updated at once: 16 MiB of float32, enough for full bandwidth on every road, and little to wait for."""

_RING = 6  # buffers on each road: one filled, one emptied, the others for the unevenness of both


class OffloadedOptimizer:
    """Does what `optimizer.step()` would, for the `shares` of this rank, with the states in `plan.optimizer_on`.

    `optimizer` keeps being what a scheduler turns; its own state stays empty. `initial(share)` gives the float32 values
    that the master weights begin with, where the parameter itself no longer has them. `group`: the replicas that divide
    parameters by `Share.rows`. `clips`: gradients are clipped, so all of them must be there before the first update.
    `staged`: whether gradients and parameters are copied between device and host; by default where the device has
    memory of its own. Raises PlanError for an optimizer or a dtype that the host cannot update.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shares: Sequence[Share],
        plan: Plan,
        store: Store,
        *,
        device: torch.device | str,
        group: dist.ProcessGroup | None = None,
        clips: bool = False,
        initial: Callable[[Share], torch.Tensor | None] = lambda share: None,
        staged: bool | None = None,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        self.optimizer, self.plan, self.store, self.device = optimizer, plan, store, torch.device(device)
        self.all_shares, self.clips = list(shares), clips
        self.shares = [share for share in shares if share.elements]
        for share in self.shares:
            if share.dtype not in (torch.float32, torch.bfloat16):
                raise PlanError(
                    f"{share.name} is of {str(share.dtype).removeprefix('torch.')}, which the host does not update",
                    place="plan: optimizer_on",
                    remedy="use a model in float32 (and precision bfloat16 if you like), or optimizer_on device",
                )
        self.factor: float | None = None  # what gradients are multiplied by, once their norm is known
        self.steps_done = 0
        self.times = OffloadTimes()
        self.staged = self.device.type != "cpu" if staged is None else staged
        self._process_group = group
        # A scheduler may turn the user's groups while a delayed update still goes on with those of its own step.
        self._groups = [{**each, "params": []} for each in optimizer.param_groups]
        self._rules = [_rule(optimizer, each, plan) for each in self._groups]
        self._by_parameter = {id(share.parameter): share for share in self.all_shares}
        self._mode = "late"
        self._micro_batches = 1
        self._held: dict[Share, Held] = {}
        self._rooms: set[str] = set()
        self._given: list[Share] = []  # in this step, in order
        self._pending: dict[Share, list[Future[None]]] = {}
        self._unpublished: list[Share] = []
        self._returning = Returning()
        self._kept: dict[Share, Kept] = {}
        there = {"max_workers": 1, "initializer": work_on, "initargs": (self.device,)}
        self._updates = (
            ThreadPoolExecutor(thread_name_prefix="headway-update", **there)
            if self.staged or plan.delayed_update
            else None
        )
        self._arrivals = ThreadPoolExecutor(thread_name_prefix="headway-arrivals", **there) if self.staged else None
        self._out, self._back = self._make_lanes(chunk_elements) if self.staged else (None, None)
        self._states = ChunkStates(store, plan.optimizer_on)
        if not self._states.is_resident:
            # Half of the buffers for chunks on their way, the rest for whoever else moves something.
            chunks = 2 * (2 * self._states.ahead + 1)
            bound = int(
                store.pool.budget_bytes / chunks / max(4 + each.state_bytes_per_element for each in self._rules)
            )
            chunk_elements = max(BLOCK_ELEMENTS, min(chunk_elements, bound - bound % BLOCK_ELEMENTS))
        self._divide(chunk_elements)
        self._fill(initial)

    # -- Setting up

    def _make_lanes(self, chunk_elements: int) -> tuple[Lane, Lane]:
        largest = max((share.elements for share in self.shares), default=1)
        size = min(chunk_elements, largest) * 4
        return Lane(self.device, size, _RING), Lane(self.device, size, _RING)

    def _divide(self, chunk_elements: int) -> None:
        """Say which elements stay on the device, cut the others into chunks, and make room for their states."""
        left = round(self.plan.optimizer_kept * sum(share.elements for share in self.shares))
        for number, share in enumerate(self.shares):
            share.number = number
            # The first parameters of the model: their gradients come last, when nothing is left to hide a transfer.
            share.kept = share.elements if left >= share.elements else left - left % BLOCK_ELEMENTS
            left -= share.kept
            edges = range(share.kept, share.elements, chunk_elements)
            share.chunks = tuple((start, min(start + chunk_elements, share.elements)) for start in edges)
            for start, stop in share.chunks:
                self._states.add(share.key(start), stop - start, self._sections(share))
                if self.plan.delayed_update:
                    self.store.create(share.fresh_key(start), (stop - start,), share.dtype, self.plan.optimizer_on)

    def _sections(self, share: Share) -> list[StateTensor]:
        moments = self._rules[share.group].states
        return list(moments) if self._is_own_master(share) else [StateTensor("master", torch.float32), *moments]

    def _is_own_master(self, share: Share) -> bool:
        """Whether the parameter itself is the float32 that the host updates, so that no second copy is needed."""
        if self.plan.delayed_update or share.dtype != torch.float32 or self.staged:
            return False
        return share.home is None or share.home.view() is not None

    def _fill(self, initial: Callable[[Share], torch.Tensor | None]) -> None:
        """Give the masters their first values."""
        for share in self.shares:
            values = initial(share)
            if share.kept:
                first = None if values is None else values[: share.kept]
                self._kept[share] = Kept(self.optimizer, self._groups[share.group], share, first)
            is_own, rule = self._is_own_master(share), self._rules[share.group]
            if is_own and self.plan.moments != "int8":
                continue
            if values is None and not is_own:
                values = share.read(0, share.elements)  # at once: a home may read more than it is asked for
            for start, stop in share.chunks:
                tensors = self._states.open(share.key(start))
                if not is_own:
                    assert values is not None
                    tensors.pop(0).copy_(values[start:stop])
                if self.plan.moments == "int8":  # whose code of 0 is not the number 0
                    for name in rule.moment_names:
                        rule.write_moment(tensors, name, torch.zeros(stop - start), start=start)
                self._states.close(share.key(start))
        self._states.flush()

    def watch(self) -> None:
        """Take each gradient when backward has made it. Not where DDP or a pipeline works on gradients afterwards."""
        for share in self.all_shares:
            share.parameter.register_post_accumulate_grad_hook(self._arrived)

    # -- One step

    def begin(self, micro_batches: int, *, hooked: bool) -> None:
        """Before the first forward pass of a step. `hooked`: gradients are complete as soon as autograd made them."""
        self._micro_batches = micro_batches
        self.factor = None
        narrow = any(share.dtype != torch.float32 for share in self.shares)
        if hooked and micro_batches == 1 and not self.clips and not self.plan.delayed_update:
            self._mode = "eager"
            self._refresh()
        elif hooked and (self.staged or (narrow and micro_batches > 1)):
            self._mode = "hold"
        else:
            self._mode = "late"

    def take(self, share: Share, gradient: torch.Tensor) -> None:
        """This rank's share of one micro-batch's gradient, flat, reduced over the replicas. The caller lets it go."""
        if self._mode == "eager":
            self._hand_over(share, gradient)
        else:
            self._hold(share, gradient)

    def _arrived(self, parameter: torch.Tensor) -> None:
        if self._mode == "late":
            return
        share = self._by_parameter[id(parameter)]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self.take(share, share.flat(gradient))

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter's gradient is here, and no longer in its `grad`."""
        share = self._by_parameter.get(id(parameter))
        return share is not None and share in self._held

    def square(self, parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        """The sum of squares of the gradient held for a parameter."""
        held = self._held[self._by_parameter[id(parameter)]]
        if held.square is not None:
            return held.square.to(dtype)
        for future in held.arriving:
            future.result()
        parts = [part for part in (held.whole, held.kept, held.off) if part is not None]
        return torch.stack([part.to(dtype).square().sum().to(self.device) for part in parts]).sum()

    def step(self) -> None:
        """After backward: update what has not been yet, and bring the new parameters where forward finds them.

        With the delayed update in force, those of the step before; this one's update begins, and goes on beside the
        next step.
        """
        started = time.perf_counter()
        delayed = self.plan.delayed_update and self.steps_done >= self.plan.delay_warmup
        if self._mode != "eager":
            self._wait_and_publish()
            self._refresh()
            for share in self.all_shares:
                self._hand_over_late(share, delayed)
        self.steps_done += 1
        if not delayed:
            self._wait_and_publish()
        self.times.exposed_seconds += time.perf_counter() - started

    def settle(self) -> None:
        """Put an update that still goes on (`delayed_update`) in force, as before a checkpoint or at the end."""
        self._wait_and_publish()
        self._states.flush()

    def close(self) -> None:
        """Finish what goes on, and end the threads."""
        try:
            self.settle()
        finally:
            for executor in (self._updates, self._arrivals):
                if executor is not None:
                    executor.shutdown()
            try:
                self._returning.wait()  # after a failure some may be under way, from buffers that are let go of now
            finally:
                for lane in (self._out, self._back):
                    if lane is not None:
                        lane.close()
                for rule in self._rules:
                    rule.close()

    def _refresh(self) -> None:
        """Let this step's update go by the hyperparameters as they stand now."""
        for mine, theirs in zip(self._groups, self.optimizer.param_groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})

    def _hold(self, share: Share, gradient: torch.Tensor) -> None:
        held = self._held.get(share)
        is_first = held is None
        if held is None:
            held = self._held[share] = Held()
        if not self.staged:
            held.whole = self._sum(held.whole, gradient)
            return
        if self.clips and self._micro_batches == 1:
            held.square = gradient.float().square().sum()
        if share.kept:
            # A copy: the whole gradient must not stay on the device for its first elements' sake.
            held.kept = self._sum(held.kept, gradient[: share.kept].clone())
        if share.chunks:
            assert self._out is not None
            assert self._arrivals is not None
            held.off = self._room(share, gradient.dtype)
            for start, stop in share.chunks:
                transfer = self._out.out(gradient[start:stop])
                into = held.off[start - share.kept : stop - share.kept]
                held.arriving.append(self._arrivals.submit(self._receive, share, transfer, into, is_first))

    def _sum(self, total: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor:
        if total is None:
            return gradient.float() if self._micro_batches > 1 else gradient
        return total.add_(gradient)

    def _room(self, share: Share, dtype: torch.dtype) -> torch.Tensor:
        """Host memory for the gradient of the elements off the device, the same from step to step."""
        name = f"gradient/{share.name}/{share.number}"
        if name not in self._rooms:
            kind = torch.float32 if self._micro_batches > 1 else dtype
            self.store.create(name, (share.elements - share.kept,), kind, "host")
            self._rooms.add(name)
        return self.store.resident(name)

    def _receive(self, share: Share, transfer: Transfer, into: torch.Tensor, is_first: bool) -> None:
        # Where the step before has not been carried out yet, its gradient is still needed.
        for future in self._pending.get(share, ()) if is_first else ():
            future.exception()
        try:
            gradient = transfer.wait()
            if is_first:
                into.copy_(gradient)
            else:
                into.add_(gradient)
        finally:
            transfer.free()

    def _hand_over_late(self, share: Share, delayed: bool) -> None:
        held = self._held.pop(share, None)
        if held is not None:
            for future in held.arriving:
                future.result()
            if held.whole is not None:
                self._hand_over(share, held.whole, delayed=delayed)
            else:
                self._hand_over(share, held.off, kept=held.kept, on_host=True, delayed=delayed)
            return
        gradient = share.parameter.grad
        if gradient is None:
            return
        flat = share.flat(gradient)
        if delayed and self.staged:
            # Off the device first: the update must not keep the ring full while the next step begins.
            self._hold(share, flat)
            self._hand_over_late(share, delayed)
            return
        if delayed and self._process_group is not None:
            flat = flat.clone()  # DDP's buckets are written to in the next backward pass
        self._hand_over(share, flat, delayed=delayed)

    def _hand_over(
        self,
        share: Share,
        gradient: torch.Tensor | None,
        *,
        kept: torch.Tensor | None = None,
        on_host: bool = False,
        delayed: bool = False,
    ) -> None:
        """Begin the update of a share. With `on_host`, `gradient` lacks the elements kept, which are `kept`."""
        share.steps += 1
        self._given.append(share)
        offset = share.kept if on_host else 0
        if share.kept:
            mine = kept if on_host else gradient
            assert mine is not None
            started = time.perf_counter()
            self._kept[share].step(share, mine[: share.kept], self._groups[share.group], self.factor)
            self.times.kept_seconds += time.perf_counter() - started
        futures = self._pending[share] = []
        for start, stop in share.chunks:
            assert gradient is not None
            part: torch.Tensor | Transfer = gradient[start - offset : stop - offset]
            if self._out is not None and not on_host:
                part = self._out.out(part)
            work = (share, start, stop, part, share.steps, self.factor, delayed)
            if self._updates is None:
                self._update(*work)
            else:
                futures.append(self._updates.submit(self._update, *work))
        if delayed and share.chunks:
            self._unpublished.append(share)

    # -- The update of a chunk, in the thread for updates where there is one

    def _update(
        self,
        share: Share,
        start: int,
        stop: int,
        given: torch.Tensor | Transfer,
        step: int,
        factor: float | None,
        delayed: bool,
    ) -> None:
        transfer = None
        out: torch.Tensor | None
        try:
            gradient = given.wait() if isinstance(given, Transfer) else given
            key = share.key(start)
            tensors = self._states.open(key)
            started = time.perf_counter()
            is_own = self._is_own_master(share)
            view = None if self.staged and share.home is None else share.view()
            if is_own:
                assert view is not None
                master, moments, out = view[start:stop], tensors, None
            else:
                master, moments = tensors[0], tensors[1:]
                if delayed:
                    out = self._fresh_room(share, start, stop)
                elif view is not None:
                    out = view[start:stop]
                else:
                    transfer = self._room_back(stop - start, share.dtype)
                    out = transfer.tensor if transfer is not None else torch.empty(stop - start, dtype=share.dtype)
            scale = 1.0 if factor is None else factor
            self._rules[share.group].step(step, gradient, master, moments, out, start=start, gradient_scale=scale)
            self.times.update_seconds += time.perf_counter() - started
            self._states.close(key)
        except BaseException:
            if transfer is not None:
                transfer.free()
            raise
        finally:
            # After a failure too: backward would wait for the buffer, and never come to where it hears of it.
            if isinstance(given, Transfer):
                given.free()
        if delayed:
            assert out is not None
            if self.plan.optimizer_on != "host":
                self.store.write(share.fresh_key(start), out).wait()
        elif view is None:
            assert out is not None
            self._send_back(share, start, stop, out, transfer)

    def _fresh_room(self, share: Share, start: int, stop: int) -> torch.Tensor:
        if self.plan.optimizer_on == "host":
            return self.store.resident(share.fresh_key(start))
        return torch.empty(stop - start, dtype=share.dtype)

    def _room_back(self, elements: int, dtype: torch.dtype) -> Transfer | None:
        """A buffer to put updated parameters in; waits for the oldest on its way back if all are."""
        if self._back is None:
            return None
        self._returning.wait(at_most=_RING - 1)
        return self._back.buffer(elements, dtype)

    def _send_back(self, share: Share, start: int, stop: int, values: torch.Tensor, transfer: Transfer | None) -> None:
        """Begin to bring updated parameters to where they rest; `transfer` is the buffer that they are in, if one."""
        pending = None
        try:
            if share.home is not None:
                pending = share.home.write(start, stop, values)
            else:
                assert self._back is not None
                assert transfer is not None
                self._back.back(transfer, share.flat()[start:stop])
        finally:
            if transfer is not None or pending is not None:
                self._returning.add(transfer, pending)
        if share.home is not None:
            self._returning.wait(at_most=1)  # a write of a home keeps memory of its own until it is done

    # -- The end of an update

    def _wait_and_publish(self) -> None:
        """Wait for all updates begun, put delayed ones in force, and share new parameters out among the replicas."""
        given, self._given = self._given, []
        unpublished, self._unpublished = self._unpublished, []
        if not given:
            return
        late = set(unpublished)
        if late and self._back is not None:
            self._back.follow_compute()  # backward may still read what these copies overwrite
        waiting: list[Share] = []
        try:
            for share in given:
                for future in self._pending.pop(share, ()):
                    future.result()
                if share in late:
                    self._publish(share)
                if self._process_group is None or share.rows is None:
                    continue
                waiting.append(share)
                if sum(each.sent_bytes(self.plan.data) for each in waiting) >= self.plan.bucket_bytes:
                    self._gather(waiting)
                    waiting = []
            self._gather(waiting)
            self._returning.wait()
        finally:
            self._note_lanes()

    def _publish(self, share: Share) -> None:
        """Bring what the delayed update made of a share to where forward finds it."""
        view = None if self.staged and share.home is None else share.view()
        for start, stop in share.chunks:
            name = share.fresh_key(start)
            is_resident = self.plan.optimizer_on == "host"
            values = self.store.resident(name) if is_resident else self.store.read(name).wait()
            if view is not None:
                view[start:stop].copy_(values)
            else:
                transfer = self._room_back(stop - start, share.dtype)
                if transfer is not None:
                    transfer.tensor.copy_(values)
                self._send_back(share, start, stop, values if transfer is None else transfer.tensor, transfer)
                if transfer is None:
                    self._returning.wait()
            if not is_resident:
                self.store.release(values)

    def _gather(self, shares: Sequence[Share]) -> None:
        """All-gather the rows that each replica has updated, in one collective for each dtype."""
        if self._process_group is None or not shares:
            return
        started = time.perf_counter()
        self._returning.wait()
        for dtype in dict.fromkeys(share.dtype for share in shares):
            gather_rows([share for share in shares if share.dtype == dtype], self._process_group)
        self.times.gathered_seconds += time.perf_counter() - started

    def _note_lanes(self) -> None:
        times, out, back = self.times, self._out, self._back
        times.states_seconds = self._states.waited_seconds
        if out is not None and back is not None:
            times.gradients_out_seconds, times.gradients_out_bytes = out.seconds, out.transferred_bytes
            times.parameters_back_seconds, times.parameters_back_bytes = back.seconds, back.transferred_bytes
            times.stalled_seconds = out.waited_seconds

    def clear_times(self) -> None:
        """Begin to count anew."""
        self.times = OffloadTimes()
        self._states.waited_seconds = 0.0
        for lane in (self._out, self._back):
            if lane is not None:
                lane.seconds, lane.transferred_bytes, lane.waited_seconds = 0.0, 0, 0.0

    # -- States as torch's optimizer would have them, for checkpoints

    def master_of(self, share: Share) -> torch.Tensor:
        """A share's master weights, flat, in float32 (or the parameter's dtype where that is its own master)."""
        whole = torch.empty(share.elements)
        if share.kept:
            whole[: share.kept] = self._kept[share].master.detach()
        for start, stop in share.chunks:
            if self._is_own_master(share):
                whole[start:stop] = share.read(start, stop)
            else:
                whole[start:stop] = self._states.open(share.key(start))[0]
                self._states.close(share.key(start), changed=False)
        return whole

    def kept_tensors(self) -> Iterator[torch.Tensor]:
        """Masters and moments that stay on the device."""
        for kept in self._kept.values():
            yield kept.master
            yield from (value for value in kept.state.values() if isinstance(value, torch.Tensor))

    def moment_names(self, share: Share) -> tuple[str, ...]:
        """The names that torch gives the moments of a share; none before its first update."""
        return self.possible_moments(share) if share.steps else ()

    def possible_moments(self, share: Share) -> tuple[str, ...]:
        """The names that torch gives the moments of a share."""
        return self._rules[share.group].moment_names

    def counts_steps(self, share: Share) -> bool:
        """Whether torch's optimizer would keep the number of updates among its states."""
        return self._rules[share.group].rule != "sgd"

    def moment_of(self, share: Share, name: str) -> torch.Tensor:
        """One of a share's moments, flat, in float32."""
        whole = torch.empty(share.elements)
        if share.kept:
            whole[: share.kept] = self._kept[share].state[name]
        rule = self._rules[share.group]
        for start, stop in share.chunks:
            tensors = self._states.open(share.key(start))
            moments = tensors if self._is_own_master(share) else tensors[1:]
            rule.read_moment(moments, name, whole[start:stop])
            self._states.close(share.key(start), changed=False)
        return whole

    def put(self, share: Share, master: torch.Tensor, moments: dict[str, torch.Tensor], steps: int) -> None:
        """Let a share go on from these float32 values; the parameter itself takes the master's."""
        share.steps = steps
        rule = self._rules[share.group]
        if share.kept:
            self._kept[share].put(share, master, moments, steps)
        view = share.view() if share.home is not None or not self.staged else None
        for start, stop in share.chunks:
            key, values = share.key(start), master[start:stop]
            tensors = self._states.open(key)
            if not self._is_own_master(share):
                tensors.pop(0).copy_(values)
            for name, whole in moments.items():
                rule.write_moment(tensors, name, whole[start:stop], start=start)
            self._states.close(key)
            if view is not None:
                view[start:stop].copy_(values)
            elif share.home is None:
                share.flat()[start:stop].copy_(values)
            elif (pending := share.home.write(start, stop, values.to(share.dtype))) is not None:
                pending.wait()
        self._states.flush()


def _rule(optimizer: torch.optim.Optimizer, group: dict[str, Any], plan: Plan) -> HostOptimizer:
    try:
        return HostOptimizer.for_torch(optimizer, group, moments=plan.moments)
    except InputError as error:
        raise PlanError(error.message, place="plan: optimizer_on", remedy=error.remedy) from error
