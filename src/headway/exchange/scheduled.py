"""Gradients exchanged by priority while training goes on, past the end of a step and into the next forward pass.

Data-parallel training usually waits between two steps until every gradient is averaged. `PriorityExchange` does not
(ByteScheduler: Peng et al., SOSP 2019, sections 3.2 and 4): gradients are cut into parts and exchanged by
`collective.priority`, those of the first layers first; `step` returns at once; and each layer's next forward waits
only for its own parameters, which are updated there and then::

    exchange = PriorityExchange(model, optimizer)
    for inputs, targets in data:
        loss = criterion(model(inputs), targets)
        loss.backward()
        exchange.step()
    exchange.close()

**The same numbers.** The update of a parameter is the optimizer's own, with the options (learning rate and so on) that
stood when `step` was called. Only optimizers that treat each parameter by itself can be split so.

**The same order everywhere.** Collectives must start in the same order on all ranks, but gradients get ready in
different orders. So rank 0 alone decides: as soon as it may start parts it tells the others their numbers, over a
group of its own, and every rank starts those parts in that order, waiting where its own gradient is not ready yet.
That wait ends, because backward never waits for the exchange; and a parameter that a rank has no gradient for is
exchanged as zeros once `step` is called there. Nobody listens for numbers unless it has gradients that are not
exchanged, so idle time (an evaluation, say) needs no messages. Data and numbers go over process groups of their own:
what the training loop sends meanwhile cannot get in between.

Two threads on each rank: one starts parts, one waits until they are finished.
"""

from __future__ import annotations

import datetime
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from headway.collective.priority import CREDIT_BYTES, PARTITION_BYTES, PriorityScheduler, SubTensor, partition
from headway.errors import HeadwayError, InputError, RankFailedError, RunError, StalledError

__all__ = ["PriorityExchange"]

_SEPARABLE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)
_ANNOUNCED = 63  # part numbers in one message


class PriorityExchange:
    """Averages the gradients of `model` over `process_group` by priority, and updates its parameters as they arrive.

    Between `backward` and `step` gradients are being averaged in place: to clip or to read them, call
    `wait_for_gradients` first. After `step` every `.grad` is None. A parameter that is read outside the model's
    forward passes may be out of date until `synchronize`; `state_dict` of model and optimizer call it themselves.
    Buffers (a batch norm's averages) are each rank's own. The optimizer's step hooks are not called.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        process_group: dist.ProcessGroup | None = None,
        *,
        partition_bytes: float = PARTITION_BYTES,
        credit_bytes: float = CREDIT_BYTES,
        across_steps: bool = True,
        backward_passes_per_step: int = 1,
        timeout_seconds: float = 300.0,
        on_start: Callable[[SubTensor], object] | None = None,
    ) -> None:
        """Sends rank 0's parameters and buffers to all ranks, and begins to listen to gradients.

        All ranks of `process_group` (all there are, unless given) must call it with the same arguments. If these are
        not all there are, they must have made equally many groups before, or torch does not bring them together. With
        `across_steps=False` every gradient is waited for in `step`, and any optimizer will do. Gradients are added up
        over `backward_passes_per_step` before they are exchanged. `timeout_seconds` bounds every wait for another
        rank. `on_start` is called with each part that is started, on the thread that starts it.

        Raises InputError for an optimizer that cannot be split, or that has parameters the model has not.
        """
        separable = type(optimizer) in _SEPARABLE
        if across_steps and not separable:
            raise InputError(
                f"{type(optimizer).__name__} is not known to treat each parameter by itself",
                place="PriorityExchange",
                remedy="give across_steps=False: gradients are then awaited in step()",
            )
        if backward_passes_per_step < 1:
            raise InputError(
                f"{backward_passes_per_step} backward passes", place="backward_passes_per_step", remedy="give 1 or more"
            )
        self.model = model
        self.optimizer = optimizer
        self.across_steps = across_steps
        self._passes = backward_passes_per_step
        self._timeout_seconds = timeout_seconds
        self._on_start = on_start
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        index = {parameter: i for i, parameter in enumerate(self._parameters)}
        self._group_of: dict[int, int] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad and parameter not in index:
                    raise InputError(
                        "the optimizer has a parameter that the model has not",
                        place=f"optimizer.param_groups[{number}]",
                        remedy="give the model whose parameters the optimizer was made for",
                    )
                if parameter in index:
                    self._group_of[index[parameter]] = number

        # Each parameter's parts, then those of the votes; a part's number is its place in `_parts`.
        count = len(self._parameters)
        self._votes_at = count
        self._votes = torch.zeros(count, dtype=torch.int32)  # how many ranks have a gradient for each parameter
        self._parts: list[SubTensor] = []
        self._counts: list[int] = []
        for i, tensor in enumerate([*self._parameters, self._votes]):
            size = tensor.numel() * tensor.element_size()
            parts = partition(str(i), size, partition_bytes, element_bytes=tensor.element_size())
            self._parts.extend(parts)
            self._counts.append(len(parts))
        self._number = {(part.tensor, part.part): number for number, part in enumerate(self._parts)}
        self._scheduler = PriorityScheduler(partition_bytes, credit_bytes)

        # Shared by the threads, under `_changed`.
        self._changed = threading.Condition()
        self._buffers: list[torch.Tensor | None] = [None] * (count + 1)  # what is being exchanged, flat
        self._produced: list[torch.cuda.Event | None] = [None] * (count + 1)  # on a GPU: when it is really there
        self._to_start = [0] * (count + 1)  # parts that are ready here and not started
        self._left = [0] * (count + 1)  # parts that are ready here and not finished
        self._ready: list[tuple[int, int]] = []  # (tensor, priority): news for rank 0's scheduler
        self._finished: list[SubTensor] = []  # likewise
        self._failure: HeadwayError | None = None
        self._is_closing = False
        self._started: queue.SimpleQueue[tuple[Any, SubTensor] | None] = queue.SimpleQueue()

        # Of the training loop's thread alone.
        self._steps = 0
        self._gradients: list[torch.Tensor | None] = [None] * count
        self._passes_seen = [0] * count
        self._is_complete = False  # whether every parameter of this step is ready, as zeros if need be
        self._options: list[dict[str, Any]] = []  # the optimizer's, when `step` was called
        self._updating: set[int] = set()  # parameters whose update is still to come
        self._silent: set[int] = set()  # parameters without a gradient on this rank
        self._place = list(range(count))  # of each parameter in the order in which forward reads them
        self._seen: dict[int, None] = {}  # parameters that forward has announced in this step, in that order
        self._called: set[str] = set()  # modules whose forward has begun in this step
        self._adopted: dict[str, list[int]] = {}  # module → parameters of others that it reads by itself
        self._eager: set[int] = set()  # parameters that no forward announces: awaited in `step`

        self._open_groups(process_group)
        self._handles: list[Any] = []
        self._listen(index)
        lead = self._lead if self._rank == 0 else self._follow
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=f"headway-exchange-{name}", daemon=True)
            for name, work in (("start", lead), ("finish", self._finish))
        ]
        for thread in self._threads:
            thread.start()

    # What the training loop calls.

    def step(self) -> None:
        """Let the gradients of this backward pass take effect; returns without waiting for them (`across_steps`).

        Raises RankFailedError or StalledError when the exchange has failed.
        """
        self._check()
        self._complete()
        for i, parameter in enumerate(self._parameters):
            replaced, mine = parameter.grad, self._gradients[i]
            if replaced is not None and replaced is not mine:
                if self._left[i]:
                    raise RunError(
                        "its gradient was replaced while it was being averaged",
                        place=f"parameter {self._names[i]}",
                        remedy="call wait_for_gradients() before you change gradients",
                    )
                self._gradients[i] = replaced
            parameter.grad = None  # ours now: `zero_grad` and the next backward do not touch it
        self._updating = set(range(len(self._parameters)))
        self._options = [
            {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in group.items()
                if name != "params"
            }
            for group in self.optimizer.param_groups
        ]
        self._is_complete = False
        self._passes_seen = [0] * len(self._parameters)
        for place, i in enumerate(self._seen):
            self._place[i] = place
        self._seen, self._called = {}, set()
        self._steps += 1
        # A learning-rate scheduler warns if it sees no step of the optimizer before its own.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        self._update(sorted(self._eager if self.across_steps else self._updating))

    def wait_for_gradients(self) -> None:
        """Wait until the gradients of this backward pass are averaged, so that they can be clipped or read.

        Then `.grad` is None only where no rank has a gradient. All ranks must call it in the same steps.
        """
        self._check()
        self._complete()
        self._await(self._votes_at)
        for i, parameter in enumerate(self._parameters):
            self._await(i)
            if i in self._silent and int(self._votes[i]):
                parameter.grad = self._gradients[i]

    def synchronize(self) -> None:
        """Wait until every update that `step` has asked for is made."""
        self._check()
        self._update(sorted(self._updating, key=self._place.__getitem__))

    def close(self) -> None:
        """Make the updates that are left, end the threads and stop listening. Raises as `step` does."""
        try:
            if self._threads and self._failure is None:
                self.synchronize()
                self._await(self._votes_at)
                # So that no rank takes the groups down while another is still receiving.
                try:
                    dist.barrier(group=self._control)
                except RuntimeError as error:
                    raise self._broken(error) from error
        finally:
            self._stop()

    def __enter__(self) -> PriorityExchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._stop()

    # Listening to the model.

    def _open_groups(self, process_group: dist.ProcessGroup | None) -> None:
        group = dist.group.WORLD if process_group is None else process_group
        ranks = dist.get_process_group_ranks(group)
        self._rank = dist.get_rank(group)
        self._size = len(ranks)
        self._leader = ranks[0]
        timeout = datetime.timedelta(seconds=self._timeout_seconds)
        local = self._size < dist.get_world_size()  # then ranks outside the group must not have to take part
        # A group made that way is named after its ranks and how many groups a rank has: once it is destroyed, torch
        # gives the next one of the same ranks its name, under which the store still has the addresses of the old. So
        # these live as long as the group.
        self._may_destroy = not local
        self._data: Any = dist.new_group(
            ranks, timeout=timeout, backend=dist.get_backend(group), use_local_synchronization=local
        )
        self._control: Any = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=local)
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, self._leader, group=self._data)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)

    def _listen(self, index: dict[nn.Parameter, int]) -> None:
        self._owner: dict[int, str] = {}
        for name, module in self.model.named_modules():
            own = [index[parameter] for parameter in module.parameters(recurse=False) if parameter in index]
            for i in own:
                self._owner.setdefault(i, name)

            def before_forward(_module: nn.Module, _inputs: Any, name: str = name, own: list[int] = own) -> None:
                needed = [*own, *self._adopted.get(name, ())]
                self._called.add(name)
                self._seen.update(dict.fromkeys(needed))
                if self._updating:
                    self._update(needed)

            self._handles.append(module.register_forward_pre_hook(before_forward))
        for i, parameter in enumerate(self._parameters):
            self._handles.append(
                parameter.register_post_accumulate_grad_hook(lambda parameter, i=i: self._gradient(i, parameter))
            )
        # A state_dict must not hold what an update is about to change.
        self._handles.append(self.model.register_state_dict_pre_hook(lambda *_: self.synchronize()))
        self._handles.append(self.optimizer.register_state_dict_pre_hook(lambda *_: self.synchronize()))

    def _gradient(self, i: int, parameter: torch.Tensor) -> None:
        """A gradient has been added to; on the thread that runs backward."""
        self._check()
        gradient = parameter.grad
        if gradient is None:
            return
        if i in self._updating:
            raise RunError(
                "was read before it was updated: outside the forward pass of the module that it belongs to",
                place=f"parameter {self._names[i]}",
                remedy="call synchronize() before such a step, or give across_steps=False",
            )
        if i not in self._seen and i not in self._eager:
            self._adopt(i)
        self._passes_seen[i] += 1
        if self._passes_seen[i] < self._passes:
            return
        if self._passes_seen[i] > self._passes:
            raise RunError(
                f"backward pass {self._passes_seen[i]} of a step of {self._passes}",
                place=f"parameter {self._names[i]}",
                remedy="call step() after each, or give backward_passes_per_step",
            )
        if gradient.is_sparse:
            raise InputError(
                "has a sparse gradient", place=f"parameter {self._names[i]}", remedy="make the layer with sparse=False"
            )
        self._submit(i, gradient)

    def _adopt(self, i: int) -> None:
        """Parameter i was read without its module's forward: whichever module around it has begun must wait for it."""
        path = self._owner[i]
        while path and path not in self._called:
            path = path.rpartition(".")[0]
        if path in self._called:
            self._adopted.setdefault(path, []).append(i)
        else:
            self._eager.add(i)
        self._seen[i] = None

    # The training loop's side of the exchange.

    def _complete(self) -> None:
        """Make every parameter of this step ready: with zeros where this rank has no gradient, and say so by votes."""
        if self._is_complete:
            return
        # What is left from the step before was not read in this one's forward, so it has had a whole step's time.
        self.synchronize()
        self._await(self._votes_at)
        self._silent = set()
        for i, parameter in enumerate(self._parameters):
            if self._gradients[i] is None:
                if parameter.grad is None:
                    self._silent.add(i)
                # A gradient that is not ready yet has seen fewer backward passes than a step has.
                self._submit(i, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        self._votes.fill_(1)
        self._votes[sorted(self._silent)] = 0
        self._submit(self._votes_at, self._votes)
        self._is_complete = True

    def _submit(self, i: int, tensor: torch.Tensor) -> None:
        """Tensor i is ready to be exchanged, in place."""
        place = 0  # the votes go first
        if i < self._votes_at:
            self._gradients[i] = tensor
            place = 1 + self._place[i]
        flat = tensor.detach().contiguous().view(-1)
        produced = None
        if tensor.is_cuda:
            produced = torch.cuda.Event()
            produced.record(torch.cuda.current_stream(tensor.device))
        with self._changed:
            self._buffers[i] = flat
            self._produced[i] = produced
            self._to_start[i] = self._left[i] = self._counts[i]
            if self._rank == 0:
                # A step's tensors all go before the next step's: a rank that waits for the former, before it can
                # produce the latter, must not find its thread waiting for the latter.
                self._ready.append((i, self._steps * (len(self._counts) + 1) + place))
            self._changed.notify_all()

    def _await(self, i: int) -> None:
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._failure or not self._left[i], self._timeout_seconds)
            self._raise_failure()
            if not arrived:
                raise StalledError(
                    f"{self._name(i)} was not averaged within {self._timeout_seconds:g} s",
                    place=f"rank {self._rank}",
                    remedy="see whether all ranks run the same steps, or allow more time",
                )

    def _update(self, wanted: Sequence[int]) -> None:
        """Update these parameters as soon as their gradients are here, by the optimizer's own step."""
        by_group: dict[int, list[nn.Parameter]] = {}
        for i in wanted:
            if i not in self._updating:
                continue
            self._await(i)
            if i in self._silent:
                self._await(self._votes_at)
            gradient = self._gradients[i]
            self._updating.discard(i)
            self._gradients[i] = None
            # Without a gradient on any rank a parameter is left alone, momentum and weight decay included.
            if i in self._group_of and (i not in self._silent or int(self._votes[i])):
                self._parameters[i].grad = gradient
                by_group.setdefault(self._group_of[i], []).append(self._parameters[i])
        if not by_group:
            return
        if not self.across_steps:
            # All are here: the optimizer itself, which may look at all of them at once.
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return
        # A copy that shares the state, and has only these parameters: its step is the optimizer's, on them alone.
        part = object.__new__(type(self.optimizer))
        part.__dict__.update(vars(self.optimizer))
        part.param_groups = [
            {**self._options[number], "params": parameters} for number, parameters in sorted(by_group.items())
        ]
        part._optimizer_step_pre_hooks = OrderedDict()
        part._optimizer_step_post_hooks = OrderedDict()
        try:
            # The next forward may be an evaluation, under no_grad or inference_mode.
            with torch.inference_mode(False), torch.no_grad():
                type(self.optimizer).step(part)
        finally:
            for parameters in by_group.values():
                for parameter in parameters:
                    parameter.grad = None

    def _check(self) -> None:
        with self._changed:
            self._raise_failure()
        if not self._threads:
            raise RunError("is closed", place="PriorityExchange", remedy="make a new one")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._started.put(None)
        threads, self._threads = self._threads, []
        for thread in threads:
            # After a failure a thread may still be inside a collective, which ends by the groups' own time-out.
            thread.join(self._timeout_seconds if self._failure is None else 1.0)
        if self._may_destroy and threads and not any(thread.is_alive() for thread in threads):
            for group in (self._data, self._control):
                dist.destroy_process_group(group)

    def _name(self, i: int) -> str:
        return f"the gradient of {self._names[i]}" if i < self._votes_at else "the votes on who has gradients"

    # The threads.

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except HeadwayError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises; told to the training loop
            self._fail(self._broken(error))

    def _broken(self, error: Exception) -> RankFailedError:
        failure = RankFailedError(
            f"the exchange of gradients broke off: {error}",
            place=f"rank {self._rank}",
            remedy="see what the other ranks printed; one of them has probably died",
        )
        failure.__cause__ = error
        return failure

    def _fail(self, failure: HeadwayError) -> None:
        with self._changed:
            if self._failure is None and not self._is_closing:
                self._failure = failure
            self._is_closing = True
            self._changed.notify_all()
        self._started.put(None)

    def _lead(self) -> None:
        """Rank 0: feed the scheduler, tell the others what it says, and start it."""
        while True:
            with self._changed:
                # No time limit: there is nothing to wait for but this rank's own training loop and finished parts.
                self._changed.wait_for(lambda: self._ready or self._finished or self._is_closing)
                if self._is_closing:
                    return
                ready, self._ready = self._ready, []
                finished, self._finished = self._finished, []
            for part in finished:
                self._scheduler.finished(part)
            for i, priority in ready:
                buffer = self._buffers[i]
                assert buffer is not None
                size = buffer.numel() * buffer.element_size()
                self._scheduler.ready(str(i), size, priority, element_bytes=buffer.element_size())
            parts = self._scheduler.next()
            for at in range(0, len(parts), _ANNOUNCED):
                chosen = parts[at : at + _ANNOUNCED]
                if self._size > 1:
                    message = torch.zeros(1 + _ANNOUNCED, dtype=torch.int64)
                    message[0] = len(chosen)
                    for place, part in enumerate(chosen, start=1):
                        message[place] = self._number[part.tensor, part.part]
                    dist.broadcast(message, self._leader, group=self._control)
                for part in chosen:
                    self._start(part)

    def _follow(self) -> None:
        """The other ranks: start what rank 0 says."""
        message = torch.zeros(1 + _ANNOUNCED, dtype=torch.int64)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: any(self._to_start) or self._is_closing)
                if self._is_closing:
                    return
            dist.broadcast(message, self._leader, group=self._control)
            for number in message[1 : 1 + int(message[0])].tolist():
                part = self._parts[number]
                i = int(part.tensor)
                with self._changed:
                    here = self._changed.wait_for(
                        lambda i=i: self._to_start[i] or self._is_closing, self._timeout_seconds
                    )
                    if self._is_closing:
                        return
                    if not here:
                        raise StalledError(
                            f"rank 0 waits for {self._name(i)}, which did not get ready here within "
                            f"{self._timeout_seconds:g} s",
                            place=f"rank {self._rank}",
                            remedy="see whether all ranks run the same steps, or allow more time",
                        )
                self._start(part)

    def _start(self, part: SubTensor) -> None:
        i = int(part.tensor)
        buffer = self._buffers[i]
        assert buffer is not None
        start = part.offset_bytes // buffer.element_size()
        entries = buffer[start : start + part.size_bytes // buffer.element_size()]
        if self._on_start is not None:
            self._on_start(part)
        work = None
        if entries.numel():
            with _Stream(buffer.device, self._produced[i]):
                if i < self._votes_at:
                    # Divided before they are summed, as DistributedDataParallel does: the same bits, no overflow.
                    entries.div_(self._size)
                    work = dist.all_reduce(entries, group=self._data, async_op=True)
                else:
                    work = dist.all_reduce(entries, group=self._control, async_op=True)
        with self._changed:
            self._to_start[i] -= 1
        self._started.put((work, part))

    def _finish(self) -> None:
        """Wait for what was started, in that order, and say so."""
        while (item := self._started.get()) is not None:
            work, part = item
            i = int(part.tensor)
            buffer = self._buffers[i]
            assert buffer is not None
            with _Stream(buffer.device) as stream:
                if work is not None:
                    work.wait()
                gradient = self._gradients[i] if i < self._votes_at else None
                if self._left[i] == 1 and gradient is not None and gradient.data_ptr() != buffer.data_ptr():
                    gradient.copy_(buffer.view(gradient.shape))  # it was not contiguous
                if stream is not None:
                    stream.synchronize()
            with self._changed:
                self._left[i] -= 1
                if self._rank == 0:
                    self._finished.append(part)
                self._changed.notify_all()


class _Stream:
    """On a GPU, a stream of its own for what is done inside, after the event `since`; on a CPU nothing."""

    def __init__(self, device: torch.device, since: torch.cuda.Event | None = None) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._since = since
        self._context: Any = None

    def __enter__(self) -> torch.cuda.Stream | None:
        if self._stream is not None:
            if self._since is not None:
                self._stream.wait_event(self._since)
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()
        return self._stream

    def __exit__(self, *exception: object) -> None:
        if self._context is not None:
            self._context.__exit__(*exception)
