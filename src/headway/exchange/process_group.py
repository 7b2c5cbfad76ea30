"""Programs as an ordinary process group of torch's: `init_process_group("headway")` and unchanged PyTorch code.

Where the package is installed, torch knows the backend by itself (`exchange.entry`); otherwise importing this module
registers it. DDP, FSDP2, tensor parallelism, pipelining, functional collectives and
distributed checkpoints then run on it: tensors of the CPU through `executor.Communicator` (shared memory in a machine,
`tcp.Mesh` between machines), tensors of a GPU through `point_to_point.run_program` on nccl.

Collectives are carried out in the order of their submission. Sends and receives go their own way (`mailbox.Mailbox`).
What fails raises in `Work.wait`, and in everything that comes after it, with the rank and the operation as its place.
"""

from __future__ import annotations

import atexit
import itertools
import os
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from headway.collective.program import Collective
from headway.errors import HeadwayError, InputError, MismatchError, RankFailedError
from headway.exchange.entry import announce
from headway.exchange.flat import Flat, Scratch, by_dtype, bytes_of, check_alike, joined, listed, slices, text_of
from headway.exchange.mailbox import Ticket
from headway.exchange.membership import Membership
from headway.exchange.reduction import Reduction, reduction_of
from headway.exchange.work import Task, Together, Worker, copy_of, seconds_of

__all__ = ["BACKEND", "HeadwayProcessGroup", "register", "set_algorithm"]

BACKEND = "headway"
"""The name for `init_process_group` and `new_group`."""

_DRAIN_SECONDS = 10.0  # how long `shutdown` waits for operations that are under way
_COLLECTIVE_STAMP = 1 << 63  # told apart from what users send: their tags are below

# The stubs of torch give each method several signatures that no subclass could have.
_ProcessGroup: Any = dist.ProcessGroup


class HeadwayProcessGroup(_ProcessGroup):
    """A group of ranks; torch makes it (`init_process_group`, `new_group`, `DeviceMesh`). Its methods are torch's.

    Each rank says on which machine it is by the environment's HEADWAY_MACHINE; unless given, ranks are on one machine
    if they see the same processes of the same host. HEADWAY_ADDRESS is the address at which this rank may be reached;
    unless given, that of the interface towards MASTER_ADDR.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: timedelta,
        *,
        name: str = "",
        global_ranks: Sequence[int] = (),
    ) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._name = name or "group"
        self._group_store = store
        self._timeout_seconds = timeout.total_seconds()
        self._members = Membership(
            store,
            rank,
            size,
            name=self._name,
            global_ranks=global_ranks,
            timeout_seconds=self._timeout_seconds,
            carrier=os.environ.get("HEADWAY_POINT_TO_POINT", ""),
        )
        self._worker = Worker(f"{self._name}-{rank}", self._on_failure)
        self._numbers = itertools.count(1)
        self._number = 0  # of the latest collective
        self._scratch = Scratch()
        self._coalescing: list[Any] | None = None
        self._is_shut = False
        _groups.add(self)

    # What torch asks about a group

    @property
    def group_name(self) -> str:
        """The name under which torch knows the group."""
        return self._name

    def getGroupName(self) -> str:
        """The same, for torch's C++ side."""
        return self._name

    def getBackendName(self) -> str:
        """ "headway"."""
        return BACKEND

    def name(self) -> str:
        """ "headway"."""
        return BACKEND

    def get_group_store(self) -> dist.Store:
        """The store that the group was made with."""
        return self._group_store

    @property
    def _device_types(self) -> list[torch.device]:
        kinds = [torch.device("cpu")]
        return [*kinds, torch.device("cuda")] if torch.cuda.is_available() else kinds

    def _get_backend(self, device: torch.device) -> HeadwayProcessGroup:
        return self

    @property
    def supports_splitting(self) -> bool:
        """No: new groups are made by themselves."""
        return False

    @property
    def supports_coalescing(self) -> bool:
        """No: point-to-point operations are asynchronous anyway."""
        return False

    @property
    def supports_time_estimate(self) -> bool:
        """No: `predict` estimates."""
        return False

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        """No: any tensor will do."""
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        """The time-out of the operations that are submitted from now on."""
        self._timeout_seconds = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def _set_sequence_number_for_group(self) -> None:
        """Nothing: each rank counts by itself."""

    def _get_sequence_number_for_group(self) -> int:
        return self._number

    def set_algorithm(self, algorithm: str, collective: Collective | None = None) -> None:
        """Use this algorithm for one collective, or for all; see `choice.ProgramChoice`. The same on every rank."""
        self._members.choice().override(algorithm, collective)

    # Collectives

    def allreduce(self, tensors: Any, opts: Any = None, *arguments: Any, **named: Any) -> Task:
        """Each tensor becomes the reduction of the ranks' tensors."""
        return self._all_reduce("all_reduce", listed(tensors), opts)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> Task:
        """The same for many tensors; those of one dtype in one piece."""
        return self._all_reduce("all_reduce_coalesced", tensors, opts)

    def _all_reduce(self, kind: str, tensors: list[torch.Tensor], opts: Any) -> Task:
        operation = reduction_of(opts, self._size)

        def run() -> list[torch.Tensor]:
            for group in by_dtype(tensors):
                with Flat(self._scratch, group) as flat:
                    self._reduce_flat("all_reduce", flat, operation)
            return tensors

        return self._submit(kind, tensors, run, opts, detail=operation.name)

    def reduce(self, tensors: Any, opts: Any) -> Task:
        """The root's tensor becomes the reduction; the others' tensors stay as they are."""
        tensors, operation, root = listed(tensors), reduction_of(opts, self._size), opts.rootRank

        def run() -> list[torch.Tensor]:
            for tensor in tensors:
                flat = self._scratch.borrow(tensor.numel(), tensor)
                flat.view(tensor.shape).copy_(tensor)
                self._reduce_flat("reduce", flat, operation, root)
                if self._rank == root:
                    tensor.detach().copy_(flat.view(tensor.shape))
            return tensors

        return self._submit("reduce", tensors, run, opts, detail=operation.name, root=root)

    def broadcast(self, tensors: Any, opts: Any) -> Task:
        """Each tensor becomes the root's."""
        tensors, root = listed(tensors), opts.rootRank

        def run() -> list[torch.Tensor]:
            for tensor in tensors:
                with Flat(self._scratch, [tensor]) as flat:
                    self._carry_out("broadcast", flat, root=root)
            return tensors

        return self._submit("broadcast", tensors, run, opts, root=root)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Task:
        """`outputs[0][rank]` becomes that rank's `inputs[0]`; the ranks' tensors may be of different sizes."""
        lists = outputs if isinstance(outputs[0], (list, tuple)) else [outputs]
        inputs = listed(inputs)
        for tensors in lists:
            self._check_count("all_gather", tensors)

        def run() -> list[torch.Tensor]:
            for tensors, own in zip(lists, inputs):
                self._gather_all(tensors, own)
            return [tensor for tensors in lists for tensor in tensors]

        return self._submit("all_gather", inputs, run, opts)

    allgather_coalesced = allgather

    def _gather_all(self, outputs: list[torch.Tensor], own: torch.Tensor) -> None:
        length = own.numel()
        if outputs[self._rank].numel() != length:
            raise MismatchError(
                f"the place for rank {self._rank} has {outputs[self._rank].numel()} elements, its tensor {length}",
                remedy="make outputs[rank] as large as the tensor that rank gives",
            )
        if any(tensor.numel() != length for tensor in outputs):
            outputs[self._rank].detach().copy_(own.view(outputs[self._rank].shape))
            for root, tensor in enumerate(outputs):
                with Flat(self._scratch, [tensor]) as flat:
                    self._carry_out("broadcast", flat, root=root)
            return
        whole = joined(outputs)
        flat = self._scratch.borrow(length * self._size, own) if whole is None else whole
        flat[self._rank * length : (self._rank + 1) * length].view(own.shape).copy_(own)
        self._carry_out("all_gather", flat)
        if whole is None:
            for tensor, block in zip(outputs, flat.split(length) if length else outputs):
                tensor.detach().copy_(block.view(tensor.shape))

    def all_gather_single(self, output: torch.Tensor, given: torch.Tensor, opts: Any = None) -> Task:
        """`output` becomes the ranks' tensors one after the other."""
        return self.all_gather_single_coalesced([output], [given], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Task:
        """The same for many tensors."""
        for output, given in zip(outputs, inputs):
            self._check_ratio("all_gather", output, given)

        def run() -> list[torch.Tensor]:
            for output, given in zip(outputs, inputs):
                length = given.numel()
                with Flat(self._scratch, [output], load=False) as flat:
                    own = flat[self._rank * length : (self._rank + 1) * length]
                    if own.data_ptr() != given.data_ptr():
                        own.view(given.shape).copy_(given)
                    self._carry_out("all_gather", flat)
            return outputs

        return self._submit("all_gather_into_tensor", inputs, run, opts)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Task:
        """`outputs[0]` becomes the reduction of the ranks' `inputs[0][this rank]`; sizes may differ among ranks."""
        outputs = listed(outputs)
        lists = inputs if isinstance(inputs[0], (list, tuple)) else [inputs]
        operation = reduction_of(opts, self._size)
        for tensors in lists:
            self._check_count("reduce_scatter", tensors)

        def run() -> list[torch.Tensor]:
            for output, tensors in zip(outputs, lists):
                if any(tensor.numel() != output.numel() for tensor in tensors):
                    for root, tensor in enumerate(tensors):
                        flat = self._scratch.borrow(tensor.numel(), tensor)
                        flat.view(tensor.shape).copy_(tensor)
                        self._reduce_flat("reduce", flat, operation, root)
                        if root == self._rank:
                            output.detach().copy_(flat.view(output.shape))
                    continue
                flat = self._scratch.borrow(output.numel() * self._size, output)
                for block, tensor in zip(flat.view(self._size, -1), tensors):
                    block.view(tensor.shape).copy_(tensor)
                self._reduce_scatter_flat(output, flat, operation)
            return outputs

        return self._submit("reduce_scatter", [t for tensors in lists for t in tensors], run, opts, operation.name)

    def reduce_scatter_single(self, output: torch.Tensor, given: torch.Tensor, opts: Any = None) -> Task:
        """`output` becomes this rank's block of the reduction of the ranks' `given`."""
        return self.reduce_scatter_single_coalesced([output], [given], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Task:
        """The same for many tensors."""
        operation = reduction_of(opts, self._size)
        for output, given in zip(outputs, inputs):
            self._check_ratio("reduce_scatter", given, output)

        def run() -> list[torch.Tensor]:
            for output, given in zip(outputs, inputs):
                flat = self._scratch.borrow(given.numel(), given)
                flat.view(given.shape).copy_(given)
                self._reduce_scatter_flat(output, flat, operation)
            return outputs

        return self._submit("reduce_scatter_tensor", inputs, run, opts, detail=operation.name)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _reduce_scatter_flat(self, output: torch.Tensor, flat: torch.Tensor, operation: Reduction) -> None:
        self._reduce_flat("reduce_scatter", flat, operation)
        length = output.numel()
        output.detach().copy_(flat[self._rank * length : (self._rank + 1) * length].view(output.shape))

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> Task:
        """On the root, `outputs[0][rank]` becomes that rank's `inputs[0]`."""
        own, root = listed(inputs)[0], opts.rootRank
        tensors: list[torch.Tensor] = []
        if self._rank == root:
            tensors = outputs[0] if isinstance(outputs[0], (list, tuple)) else outputs
            self._check_count("gather", tensors)
            check_alike("gather", [own, *tensors])

        def run() -> list[torch.Tensor]:
            length = own.numel()
            flat = self._scratch.borrow(length * self._size, own)
            flat[self._rank * length : (self._rank + 1) * length].view(own.shape).copy_(own)
            self._carry_out("gather", flat, root=root)
            for tensor, block in zip(tensors, flat.view(self._size, -1)):
                tensor.detach().copy_(block.view(tensor.shape))
            return list(tensors)

        return self._submit("gather", [own], run, opts, root=root)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> Task:
        """`outputs[0]` becomes the root's `inputs[0][this rank]`."""
        output, root = listed(outputs)[0], opts.rootRank
        tensors: list[torch.Tensor] = []
        if self._rank == root:
            tensors = inputs[0] if isinstance(inputs[0], (list, tuple)) else inputs
            self._check_count("scatter", tensors)
            check_alike("scatter", [output, *tensors])

        def run() -> list[torch.Tensor]:
            length = output.numel()
            flat = self._scratch.borrow(length * self._size, output)
            for tensor, block in zip(tensors, flat.view(self._size, -1)):
                block.view(tensor.shape).copy_(tensor)
            self._carry_out("scatter", flat, root=root)
            output.detach().copy_(flat[self._rank * length : (self._rank + 1) * length].view(output.shape))
            return [output]

        return self._submit("scatter", [output], run, opts, root=root)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        given: torch.Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        opts: Any = None,
    ) -> Task:
        """Slice r of `given` goes to rank r, slice r of `output` comes from it; equal ones unless given."""
        if output_splits or input_splits:
            outgoing = slices(given, input_splits, self._size)
            arriving = slices(output, output_splits, self._size)
            return self._exchange("all_to_all_single", arriving, outgoing, [output], opts)
        if output.numel() != given.numel() or (given.shape and given.shape[0] % self._size):
            raise self._misfit("all_to_all_single", f"{tuple(given.shape)} does not go into {tuple(output.shape)}")

        def run() -> list[torch.Tensor]:
            with Flat(self._scratch, [output], load=False) as flat:
                flat.view(given.shape).copy_(given)
                self._carry_out("all_to_all", flat)
            return [output]

        return self._submit("all_to_all_single", [given], run, opts)

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None) -> Task:
        """`inputs[r]` goes to rank r, `outputs[r]` comes from it; any sizes."""
        self._check_count("all_to_all", outputs)
        self._check_count("all_to_all", inputs)
        return self._exchange("all_to_all", outputs, inputs, outputs, opts)

    def _exchange(
        self,
        kind: str,
        arriving: list[torch.Tensor],
        outgoing: list[torch.Tensor],
        outputs: list[torch.Tensor],
        opts: Any,
    ) -> Task:
        # Only sender and receiver know the sizes, so that no program can be made: each pair by itself.
        number = self._next_number()

        def run() -> list[torch.Tensor]:
            arriving[self._rank].detach().copy_(outgoing[self._rank].view(arriving[self._rank].shape))
            peers = [(self._rank + shift) % self._size for shift in range(1, self._size)]
            if not peers:
                return outputs
            if self._members.goes_by_point_to_point(outgoing[0]):
                self._exchange_on_device(arriving, outgoing, peers)
                return outputs
            stamp = _COLLECTIVE_STAMP | number
            limit = self._limit(opts)
            buffers = {peer: arriving[peer].detach() for peer in peers}
            landings = {peer: buffer.contiguous() for peer, buffer in buffers.items()}
            mailbox = self._members.mailbox()
            tickets = [mailbox.receive(peer, bytes_of(landings[peer]), stamp, timeout_seconds=limit) for peer in peers]
            tickets += [mailbox.send(peer, bytes_of(outgoing[peer].detach().contiguous()), stamp) for peer in peers]
            for ticket in tickets:
                ticket.done.wait()
                if ticket.error is not None:
                    raise copy_of(ticket.error)
            for peer in peers:
                if landings[peer].data_ptr() != buffers[peer].data_ptr():
                    buffers[peer].copy_(landings[peer])
            return outputs

        return self._submit(kind, outgoing, run, opts, number=number)

    def _exchange_on_device(self, arriving: list[torch.Tensor], outgoing: list[torch.Tensor], peers: list[int]) -> None:
        group = self._members.device_group(outgoing[0].device)
        landings = {peer: arriving[peer].detach().contiguous() for peer in peers}
        batch = []
        for peer in peers:
            if landings[peer].numel():
                batch.append(dist.P2POp(dist.irecv, landings[peer], group=group, group_peer=peer))
            if outgoing[peer].numel():
                batch.append(dist.P2POp(dist.isend, outgoing[peer].detach().contiguous(), group=group, group_peer=peer))
        for work in dist.batch_isend_irecv(batch) if batch else ():
            work.wait()
        for peer in peers:
            if landings[peer].data_ptr() != arriving[peer].data_ptr():
                arriving[peer].detach().copy_(landings[peer])

    def barrier(self, opts: Any = None, *arguments: Any, **named: Any) -> Task:
        """Done when every rank has submitted it."""
        device = getattr(opts, "device", None) or torch.device("cpu")

        def run() -> list[torch.Tensor]:
            self._carry_out("all_reduce", torch.zeros(1, dtype=torch.int32, device=device), operation="max")
            return []

        return self._submit("barrier", [], run, opts)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier that raises StalledError naming the ranks that did not come within `timeout`."""
        self.barrier(_Options(timeout or timedelta(seconds=self._timeout_seconds), asyncOp=False)).wait()

    # Point-to-point

    def send(self, tensors: list[torch.Tensor], target: int, tag: int = 0) -> Any:
        """Send one tensor to a rank of the group. It must not change before the work is done."""
        tensor = tensors[0].detach()
        if self._members.goes_by_point_to_point(tensor):
            return dist.isend(tensor, group=self._members.device_group(tensor.device), group_dst=target, tag=tag)
        return self._post("send", tensor, target, tag)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> Any:
        """Receive one tensor from a rank of the group."""
        tensor = tensors[0].detach()
        if self._members.goes_by_point_to_point(tensor):
            return dist.irecv(tensor, group=self._members.device_group(tensor.device), group_src=source, tag=tag)
        return self._post("recv", tensor, source, tag)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int = 0) -> Any:
        """Receive one tensor from whoever sends first; `Work.source_rank` says who it was."""
        tensor = tensors[0].detach()
        if self._members.goes_by_point_to_point(tensor):
            return dist.irecv(tensor, group=self._members.device_group(tensor.device), tag=tag)
        return self._post("recv", tensor, None, tag)

    def _post(self, kind: str, tensor: torch.Tensor, peer: int | None, tag: int) -> Any:
        task = Task(
            f"{self._members.place}: {kind} {text_of([tensor])}, {'any rank' if peer is None else f'rank {peer}'}", None
        )
        if self._worker.failure is not None:
            task.finish([], self._worker.failure)
            return self._remember(task)
        buffer = tensor.contiguous()
        stamp = tag & (_COLLECTIVE_STAMP - 1)

        def finished(ticket: Ticket) -> None:
            error = ticket.error
            if error is not None:
                error = type(error)(error.message, place=task.what, remedy=error.remedy)
            elif kind == "recv":
                task.source = ticket.source
                if buffer.data_ptr() != tensor.data_ptr():
                    tensor.copy_(buffer)
            task.finish([tensor], error)

        if kind == "send":
            assert peer is not None
            self._members.mailbox().send(peer, bytes_of(buffer), stamp, finished=finished)
        else:
            self._members.mailbox().receive(
                peer, bytes_of(buffer), stamp, timeout_seconds=self._timeout_seconds, finished=finished
            )
        return self._remember(task)

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> Together:
        works, self._coalescing = self._coalescing or [], None
        return Together(f"{self._members.place}: coalesced", works)

    def _remember(self, task: Task) -> Task:
        if self._coalescing is not None:
            self._coalescing.append(task)
        return task

    # Carrying out

    def _submit(
        self,
        kind: str,
        tensors: Sequence[torch.Tensor],
        run: Callable[[], list[torch.Tensor]],
        opts: Any,
        detail: str = "",
        *,
        root: int | None = None,
        number: int = 0,
    ) -> Task:
        for tensor in tensors:
            if tensor.layout != torch.strided:
                raise self._misfit(kind, f"a tensor is {tensor.layout}, not dense")
        number = number or self._next_number()
        words = [f"{kind} #{number}"]
        if tensors:
            words.append(text_of(tensors))
        if detail:
            words.append(detail)
        if root is not None:
            words.append(f"root {root}")
        limit = self._limit(opts)
        device = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
        stream = torch.cuda.current_stream(device) if device is not None else None

        def timed() -> list[torch.Tensor]:
            self._members.limit(limit)
            if stream is None:
                return run()
            with torch.cuda.stream(stream):  # whichever thread this is
                return run()

        task = Task(f"{self._members.place}: {', '.join(words)}", timed, worker=self._worker)
        # On a device, work is only queued, on the current stream.
        at_once = not getattr(opts, "asyncOp", True) or any(tensor.device.type != "cpu" for tensor in tensors)
        self._worker.submit(task, at_once=at_once)
        self._remember(task)
        return task

    def _next_number(self) -> int:
        self._number = next(self._numbers)
        return self._number

    def _limit(self, opts: Any) -> float:
        return seconds_of(getattr(opts, "timeout", None)) or self._timeout_seconds

    def _reduce_flat(self, collective: Collective, flat: torch.Tensor, operation: Reduction, root: int = 0) -> None:
        operation.prepare(flat)
        wire = operation.encode(flat)
        self._carry_out(collective, wire, operation=operation.on_the_wire(flat.dtype), root=root)
        if wire.data_ptr() != flat.data_ptr():
            flat.copy_(wire)

    def _carry_out(self, collective: Collective, flat: torch.Tensor, *, operation: str = "sum", root: int = 0) -> None:
        """A collective on a flat vector, in place; within a task."""
        if self._size == 1:
            return
        program = self._members.choice().program(collective, flat.nbytes, root)
        self._members.carry_out(program, flat, operation)

    # Failure and the end

    def _on_failure(self, error: HeadwayError, task: Task) -> HeadwayError:
        return self._members.tell(error, task.what)

    def abort(self) -> None:
        """Break the group: every rank's operations raise RankFailedError."""
        error = RankFailedError(f"rank {self._rank} aborted the group", place=self._members.place)
        self._worker.fail(error)
        self._members.tell(error, self._members.place)
        self.shutdown()

    def shutdown(self) -> None:
        """Finish what is under way, and give back threads, connections and memory. torch calls it on destruction."""
        if self._is_shut:
            return
        self._is_shut = True
        self._worker.close(min(_DRAIN_SECONDS, self._timeout_seconds) if self._worker.failure is None else 0.0)
        self._members.close()
        self._scratch.free()
        _groups.discard(self)

    # Checks

    def _misfit(self, kind: str, message: str) -> InputError:
        return InputError(
            message, place=f"{self._members.place}: {kind}", remedy="give what torch.distributed documents"
        )

    def _check_count(self, kind: str, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != self._size:
            raise self._misfit(kind, f"{len(tensors)} tensors for {self._size} ranks")

    def _check_ratio(self, kind: str, whole: torch.Tensor, part: torch.Tensor) -> None:
        if whole.numel() != part.numel() * self._size or whole.dtype != part.dtype:
            raise self._misfit(
                kind,
                f"{text_of([whole])} is not {self._size} times {text_of([part])}",
            )


class _Options(NamedTuple):
    """A barrier's options where no caller gives any."""

    timeout: timedelta
    asyncOp: bool


_groups: weakref.WeakSet[HeadwayProcessGroup] = weakref.WeakSet()


def _shut_all() -> None:
    for group in list(_groups):
        group.shutdown()


def _create(options: Any, backend_options: Any = None) -> HeadwayProcessGroup:
    return HeadwayProcessGroup(
        options.store,
        options.group_rank,
        options.group_size,
        options.timeout,
        name=str(options.group_id),
        global_ranks=options.global_ranks_in_group,
    )


def register() -> None:
    """Make "headway" a backend of torch.distributed. Importing this module does it; a second call does nothing."""
    announce()


def set_algorithm(algorithm: str, collective: Collective | None = None, group: dist.ProcessGroup | None = None) -> None:
    """Use `algorithm` in a group (the default one unless given), for one collective or for all. Call on every rank.

    The names are those of `headway.collective.algorithms`; "" goes back to the table in `exchange.choice`. Raises
    InputError for a name that nobody knows or a group of another backend.
    """
    chosen = group if group is not None else dist.group.WORLD
    if not isinstance(chosen, HeadwayProcessGroup):
        raise InputError("not a group of backend 'headway'", place="set_algorithm", remedy='backend="headway"')
    chosen.set_algorithm(algorithm, collective)


register()
# A script that ends without destroy_process_group leaves no thread and no peer waiting behind.
atexit.register(_shut_all)
