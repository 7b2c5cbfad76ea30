"""Who this process is among the ranks, and what it shares with them: Horovod's `init`, `rank`, `size`, process sets.

`init` finds out from the environment who started this process: torchrun, a Headway launcher, Slurm, Open MPI or MPICH,
or nobody (then it is the only rank). It joins the others through `torch.distributed`, and starts the background thread
that exchanges tensors (`exchange.controller`).
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from headway.errors import FieldError, InputError
from headway.exchange.batches import Task
from headway.exchange.controller import Controller, Handle, Options
from headway.exchange.ending import LETTING_GO_SECONDS
from headway.exchange.negotiation import Submission
from headway.exchange.placement import place_of, whole_number

__all__ = [
    "Context",
    "ProcessSet",
    "add_process_set",
    "context",
    "cross_rank",
    "cross_size",
    "get_process_set_ids_and_ranks",
    "global_process_set",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "number_of",
    "options_from",
    "rank",
    "remove_process_set",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]

_ADD_NAME = "headway.process_set"


class ProcessSet:
    """Some of the ranks, to exchange among themselves: `hvd.add_process_set([0, 2])`, then `process_set=…`.

    `ranks` are global ranks. `process_set_id` is None until the set has been added on all ranks.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        if isinstance(ranks, int) or not hasattr(ranks, "__iter__"):
            raise InputError(f"{ranks!r} is no list of ranks", place="ProcessSet", remedy="give a list of rank numbers")
        self.ranks: list[int] | None = sorted(set(ranks))
        self.process_set_id: int | None = None

    def size(self) -> int | None:
        """How many ranks it has; None if it has not been added."""
        return None if self.process_set_id is None or self.ranks is None else len(self.ranks)

    def rank(self) -> int | None:
        """Which of them this process is; None if it has not been added. Raises InputError if this rank is not in it."""
        if self.process_set_id is None or self.ranks is None:
            return None
        if not self.included():
            raise InputError(f"rank {context().rank} is not in {self}", place="ProcessSet.rank")
        return self.ranks.index(context().rank)

    def included(self) -> bool | None:
        """Whether this process is in it; None if it has not been added."""
        return None if self.process_set_id is None or self.ranks is None else context().rank in self.ranks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProcessSet) and (self.process_set_id, self.ranks) == (
            other.process_set_id,
            other.ranks,
        )

    def __hash__(self) -> int:
        return hash(tuple(self.ranks or ()))

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


class _GlobalProcessSet(ProcessSet):
    """All ranks, whatever `init` finds."""

    def __init__(self) -> None:
        self.ranks = None
        self.process_set_id = 0

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


global_process_set = _GlobalProcessSet()
"""All ranks."""


class Context:
    """This process among the others, from `init` to `shutdown`."""

    def __init__(self, rank: int, size: int, controller: Controller, *, owns_distributed: bool) -> None:
        self.rank, self.size, self.controller = rank, size, controller
        self.local_rank, self.local_size = 0, 1
        self.cross_rank, self.cross_size = 0, 1
        self.is_homogeneous = True
        self.owns_distributed = owns_distributed
        self.process = os.getpid()
        self.process_sets: dict[int, ProcessSet] = {0: global_process_set}

    def locate(self, machines: Sequence[str], local_ranks: Sequence[int]) -> None:
        """Set where this rank is, from the machine of each rank and its place there (-1: in the order of ranks)."""
        by_machine: dict[str, list[int]] = {}
        for rank, machine in enumerate(machines):
            by_machine.setdefault(machine, []).append(rank)
        mine = by_machine[machines[self.rank]]
        self.local_size = len(mine)
        given = local_ranks[self.rank]
        self.local_rank = given if 0 <= given < self.local_size else mine.index(self.rank)
        peers = [machine for machine, ranks in by_machine.items() if len(ranks) > self.local_rank]
        self.cross_rank, self.cross_size = peers.index(machines[self.rank]), len(peers)
        self.is_homogeneous = len({len(ranks) for ranks in by_machine.values()}) == 1


_context: Context | None = None
_inits = 0  # how often, so that what one leaves in the store does not meet the next


def context() -> Context:
    """What `init` made. Raises InputError before `init` and after `shutdown`."""
    if _context is None:
        raise InputError("hvd.init() was not called", place="headway.horovod", remedy="call it before anything else")
    return _context


def init(
    comm: Sequence[int] | None = None, process_sets: Sequence[ProcessSet | Sequence[int]] | str | None = None
) -> None:
    """Join the other ranks; without others, be the only one. A second call does nothing.

    `process_sets` are added at once. Where `torch.distributed` is initialised already, its ranks are used. Settings
    come from the environment (docs/horovod.md), those of rank 0 hold for all.

    Raises InputError for `comm` (Headway has no MPI) and for a launcher that leaves out what is needed, FieldError for
    a variable that makes no sense.
    """
    global _context, _inits
    if _context is not None:
        return
    if comm is not None:
        raise InputError("comm is for MPI", place="hvd.init", remedy="use process_sets for some of the ranks")
    if os.environ.get("HEADWAY_TASK") == "trace":
        raise InputError(
            "headway run plans scripts that call headway.start(), and this one calls hvd.init()",
            place="hvd.init",
            remedy="start it by torchrun --nproc-per-node N SCRIPT",
        )
    options = options_from(os.environ)
    owns = not dist.is_initialized()
    if owns:
        place = place_of(os.environ)
        rank, size, local_rank = place.rank, place.size, place.local_rank
        if size > 1:
            os.environ |= place.variables
            method = os.environ.get("HEADWAY_INIT_METHOD", "env://")
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size)
    else:
        rank, size = dist.get_rank(), dist.get_world_size()
        local_rank = whole_number(os.environ, "LOCAL_RANK")
    _inits += 1
    if size > 1:
        options = _shared(options, rank)
    _context = Context(rank, size, Controller(rank, size, options), owns_distributed=owns and size > 1)
    if size > 1:
        machine = f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"
        places = _gather_bytes(msgspec.msgpack.encode((machine, local_rank)))
        known = [msgspec.msgpack.decode(place, type=tuple[str, int]) for place in places]
        _context.locate([machine for machine, _ in known], [local for _, local in known])
    if process_sets and not isinstance(process_sets, str):
        for process_set in process_sets:
            add_process_set(process_set)


def shutdown() -> None:
    """Leave the other ranks; `init` may be called again. Others that wait for this rank raise RankFailedError."""
    global _context
    if _context is None:
        return
    left, _context = _context, None
    if left.process != os.getpid():
        return  # a forked child has no part in this
    left.controller.shutdown()
    for process_set in left.process_sets.values():
        if process_set is not global_process_set:
            process_set.process_set_id = None
    if left.owns_distributed and dist.is_initialized():
        time.sleep(LETTING_GO_SECONDS)  # see headway.exchange.ending
        dist.destroy_process_group()


atexit.register(shutdown)


def is_initialized() -> bool:
    """Whether `init` was called, and `shutdown` was not."""
    return _context is not None


def rank() -> int:
    """The number of this process, from 0."""
    return context().rank


def size() -> int:
    """How many ranks there are."""
    return context().size


def local_rank() -> int:
    """The number of this process among those on its machine: which GPU to use."""
    return context().local_rank


def local_size() -> int:
    """How many ranks are on this machine."""
    return context().local_size


def cross_rank() -> int:
    """The number of this machine among those that have a rank with this local rank."""
    return context().cross_rank


def cross_size() -> int:
    """How many machines have a rank with this local rank."""
    return context().cross_size


def is_homogeneous() -> bool:
    """Whether all machines have the same number of ranks."""
    return context().is_homogeneous


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Record what is exchanged, on rank 0, for Perfetto or chrome://tracing. Raises InputError if one is recorded."""
    if context().rank == 0:
        context().controller.start_timeline(file_path, mark_cycles=mark_cycles)


def stop_timeline() -> None:
    """Stop recording and write the file."""
    context().controller.stop_timeline()


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Make a process set usable: all ranks call it with the same ranks, those that are not in it as well.

    Raises InputError for ranks that do not exist or a set that has been added, MismatchError if ranks disagree.
    """
    here = context()
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    ranks = process_set.ranks or []
    if process_set.process_set_id is not None:
        raise InputError(f"{process_set} has been added", place="hvd.add_process_set")
    if not ranks or ranks[0] < 0 or ranks[-1] >= here.size:
        raise InputError(
            f"{ranks} are not all ranks from 0 to {here.size - 1}",
            place="hvd.add_process_set",
            remedy="give at least one rank, and only ranks that exist",
        )
    if any(known.ranks == ranks for known in here.process_sets.values()):
        raise InputError(f"there is a process set with ranks {ranks}", place="hvd.add_process_set", remedy="use that")
    submission = Submission(name=_ADD_NAME, operation="add_process_set", splits=tuple(ranks))
    number = _settle(submission)
    process_set.process_set_id = number
    here.process_sets[number] = process_set
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Give a process set back, on all ranks; whether there was one to remove. The global one cannot be removed."""
    here = context()
    number = process_set.process_set_id
    if process_set is global_process_set or number is None:
        return False
    _settle(Submission(name="headway.no_process_set", operation="remove_process_set", root=number))
    here.process_sets.pop(number, None)
    process_set.process_set_id = None
    return True


def get_process_set_ids_and_ranks() -> dict[int, list[int]]:
    """The ranks of each process set, by number."""
    return {number: list(ranks) for number, ranks in context().controller.sets.items()}


def number_of(process_set: ProcessSet | None) -> int:
    """The number of a process set; None means all ranks. Raises InputError if it has not been added."""
    if process_set is None:
        return 0
    if process_set.process_set_id is None:
        raise InputError(f"{process_set} has not been added", place="process_set", remedy="call hvd.add_process_set")
    return process_set.process_set_id


def options_from(environment: Mapping[str, str]) -> Options:
    """Horovod's variables, and two of our own, as options. Raises FieldError for one that makes no sense."""
    usual = Options()
    disabled = _flag(environment, "HOROVOD_STALL_CHECK_DISABLE")
    return Options(
        threshold_bytes=_number(environment, "HOROVOD_FUSION_THRESHOLD", usual.threshold_bytes),
        cycle_seconds=_number(environment, "HOROVOD_CYCLE_TIME", usual.cycle_seconds * 1e3) / 1e3,
        cache_capacity=int(_number(environment, "HOROVOD_CACHE_CAPACITY", usual.cache_capacity)),
        stall_seconds=0.0
        if disabled
        else _number(environment, "HOROVOD_STALL_CHECK_TIME_SECONDS", usual.stall_seconds),
        stall_error_seconds=0.0
        if disabled
        else _number(environment, "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", usual.stall_error_seconds),
        timeout_seconds=_number(environment, "HEADWAY_EXCHANGE_TIMEOUT_SECONDS", usual.timeout_seconds),
        backend=_backend(environment.get("HEADWAY_EXCHANGE_BACKEND", "")),
        autotune=_flag(environment, "HOROVOD_AUTOTUNE"),
        autotune_log=environment.get("HOROVOD_AUTOTUNE_LOG", ""),
        timeline=environment.get("HOROVOD_TIMELINE", ""),
        mark_cycles=_flag(environment, "HOROVOD_TIMELINE_MARK_CYCLES"),
    )


def _backend(name: str) -> str:
    if name not in ("", "gloo", "headway"):
        raise FieldError(f"{name!r} is no backend", place="HEADWAY_EXCHANGE_BACKEND", remedy="headway or gloo")
    return "" if name == "gloo" else "headway"


def _shared(options: Options, rank: int) -> Options:
    """The options of rank 0; the files are rank 0's alone."""
    store: Any = dist.distributed_c10d._get_default_store()
    key = f"headway/horovod/options/{_inits}"
    if rank == 0:
        store.set(key, msgspec.msgpack.encode(options))
        return options
    shared = msgspec.msgpack.decode(store.get(key), type=Options)
    return msgspec.structs.replace(shared, timeline="", autotune_log="")


def _settle(submission: Submission) -> int:
    (handle,) = context().controller.submit([submission], [Task(None)])
    return handle.wait()


def _gather_bytes(data: bytes) -> list[bytes]:
    """What each rank gives, on all ranks, by rank."""
    sizes: torch.Tensor = _gather("headway.sizes", torch.tensor([len(data)])).wait()
    whole: torch.Tensor = _gather("headway.bytes", torch.frombuffer(bytearray(data), dtype=torch.uint8)).wait()
    return [part.numpy().tobytes() for part in whole.split(sizes.tolist())]


def _gather(name: str, tensor: torch.Tensor) -> Handle:
    dtype = str(tensor.dtype).removeprefix("torch.")
    submission = Submission(
        name=name, operation="all_gather", shape=tuple(tensor.shape), dtype=dtype, element_bytes=tensor.element_size()
    )
    return context().controller.submit([submission], [Task(tensor)])[0]


def _number(environment: Mapping[str, str], name: str, usual: float) -> float:
    text = environment.get(name, "")
    try:
        value = float(text) if text else usual
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise FieldError(f"{text!r} is no number of 0 or more", place=name)
    return value


def _flag(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() not in ("", "0", "false", "no")
