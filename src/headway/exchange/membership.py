"""What joins the ranks of one process group: who is where, and the communicator, meshes and programs between them.

Everything is made when it is first needed, and given back by `close`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from headway.collective.program import Program
from headway.errors import HeadwayError, InputError, MismatchError, RankFailedError, RunError, StalledError
from headway.exchange.choice import ProgramChoice
from headway.exchange.executor import Communicator
from headway.exchange.mailbox import Mailbox
from headway.exchange.point_to_point import run_program
from headway.exchange.tcp import Mesh, wait_for_key

__all__ = ["Membership", "listening_address", "machine_name"]

_LOOK_SECONDS = 0.5  # how often a rank that waits looks whether it waits in vain
_NEWS: dict[str, type[RunError]] = {kind.__name__: kind for kind in (RankFailedError, MismatchError, StalledError)}
_EXPLAIN_SECONDS = 1.0  # how long a rank waits for what the others submitted, before it raises


class Membership:
    """One rank's part in a group that finds itself through `store`, whose keys no earlier group may have left there.

    `carrier` names a backend of torch's that carries out everything by point-to-point, on the CPU too ("": none).
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        name: str,
        global_ranks: Sequence[int],
        timeout_seconds: float,
        carrier: str = "",
    ) -> None:
        self.rank, self.size, self.name = rank, size, name
        self.timeout_seconds = timeout_seconds
        self.carrier = carrier
        self._global_ranks = tuple(global_ranks)
        # A store outlives the groups that are made with it.
        generation = store.add(f"headway/generation/{rank}", 1)
        self._store = dist.PrefixStore(f"headway/{generation}", store)
        self._store.set(f"machine/{rank}", machine_name())
        if rank == 0:
            self._store.set("token", os.environ.get("HEADWAY_TOKEN", "") or secrets.token_hex(32))
        # One for each thing that is made: making a communicator waits for all ranks, and must not hold up a send that
        # some rank needs to get that far.
        self._locks = {what: threading.Lock() for what in ("machines", "choice", "communicator", "mailbox", "device")}
        self._machines: tuple[str, ...] = ()
        self._choice: ProgramChoice | None = None
        self._communicator: Communicator | None = None
        self._meshes: list[Mesh] = []
        self._between: Mesh | None = None  # of the communicator
        self._carried = 0  # programs so far
        self._words = ""  # what the latest of them is, between machines
        self._next_look = 0.0  # when, if it still waits then, this rank looks whether that is in vain
        self._mailbox: Mailbox | None = None
        self._device_group: dist.ProcessGroup | None = None
        self._is_closed = False

    @property
    def place(self) -> str:
        """Which rank of which group this is, for errors."""
        return f"group {self.name!r}, rank {self.rank}"

    def machines(self) -> tuple[str, ...]:
        """The machine of each rank. Waits for all ranks to have joined."""
        with self._locks["machines"]:
            if not self._machines:
                self._machines = tuple(
                    wait_for_key(self._store, f"machine/{rank}", self.timeout_seconds, who=f"rank {rank}").decode()
                    for rank in range(self.size)
                )
            return self._machines

    def choice(self) -> ProgramChoice:
        """The programs of this group."""
        with self._locks["choice"]:
            if self._choice is None:
                self._choice = ProgramChoice(self.machines())
            return self._choice

    def communicator(self) -> Communicator:
        """What carries programs out on the CPU."""
        with self._locks["communicator"]:
            if self._communicator is None:
                self._check_open()
                if len(set(self.machines())) > 1:
                    self._between = self._join("collectives")
                self._communicator = Communicator(
                    rank=self.rank,
                    size=self.size,
                    store=self._store,
                    machines=self.machines(),
                    timeout_seconds=self.timeout_seconds,
                    name=self.name,
                    transport=self._between,
                )
            return self._communicator

    def mailbox(self) -> Mailbox:
        """What sends and receives outside of collectives."""
        with self._locks["mailbox"]:
            if self._mailbox is None:
                self._mailbox = Mailbox(self._join("post"))
            return self._mailbox

    def device_group(self, device: torch.device) -> dist.ProcessGroup:
        """A process group of another backend, nccl for GPUs, that carries programs out by point-to-point."""
        with self._locks["device"]:
            if self._device_group is None:
                self._check_open()
                backend = self.carrier or ("nccl" if device.type == "cuda" else "")
                if not backend:
                    raise InputError(
                        f"tensors on {device.type} cannot be exchanged", place=self.place, remedy="use cpu or cuda"
                    )
                ranks = list(self._global_ranks) or list(range(self.size))
                made = dist.new_group(ranks, backend=backend, use_local_synchronization=True)
                assert isinstance(made, dist.ProcessGroup)
                self._device_group = made
            return self._device_group

    def goes_by_point_to_point(self, tensor: torch.Tensor) -> bool:
        """Whether `device_group` exchanges this tensor, rather than the communicator and the mailbox."""
        return tensor.device.type != "cpu" or bool(self.carrier)

    def limit(self, seconds: float) -> None:
        """The time-out of the programs that are carried out from now on."""
        if self._communicator is not None:
            self._communicator.timeout_seconds = seconds
        if self._between is not None:
            self._between.timeout_seconds = seconds

    def carry_out(self, program: Program, vector: torch.Tensor, operation: str) -> None:
        """Carry `program` out among the ranks, on a flat vector of the CPU or of a device, in place."""
        if self.goes_by_point_to_point(vector):
            run_program(program, vector, self.device_group(vector.device), operation)
            return
        communicator = self.communicator()
        if self._between is not None:
            # The ranks of one machine compare what they carry out; between machines each frame bears a digest of it.
            self._carried += 1
            kind = str(vector.dtype).removeprefix("torch.")
            self._words = f"{program.collective}, {kind} x {vector.numel()}, {operation}, root {program.root}"
            digest = hashlib.blake2b(f"{self._carried}: {self._words}".encode(), digest_size=8).digest()
            self._between.stamp = int.from_bytes(digest)
            self._next_look = time.monotonic() + _LOOK_SECONDS
        communicator.run(program, vector, operation=operation)

    def _while_waiting(self, waited_seconds: float) -> None:
        """Called by whoever waits for another rank: look now and then whether that is in vain."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        with contextlib.suppress(RuntimeError):  # the store has gone, with rank 0
            self._hear()
            if self._words:
                self._compare()

    def _hear(self) -> None:
        # Who gives up tells the ranks that it is connected with, and they the others; but some may be connected with
        # nobody yet.
        if self._store.check(["broken"]):
            kind, _, message = self._store.get("broken").decode().partition(": ")
            raise _NEWS.get(kind, RankFailedError)(message, place=self.name)

    def _compare(self) -> None:
        # Where a frame arrives, its stamp tells; but two machines may both wait, in programs that let the other begin.
        self._store.set(f"waiting/{self.rank}", f"{self._carried}: {self._words}")
        for rank in range(self.size):
            key = f"waiting/{rank}"
            if rank == self.rank or not self._store.check([key]):
                continue
            number, _, words = self._store.get(key).decode().partition(": ")
            if number == str(self._carried) and words != self._words:
                raise MismatchError(
                    f"rank {self.rank} is in {self._words}, rank {rank} in {words}",
                    place=self.name,
                    remedy="let every rank submit the same operations, in the same order, with the same sizes",
                )

    def _join(self, name: str) -> Mesh:
        self._check_open()
        token = wait_for_key(self._store, "token", self.timeout_seconds, who="rank 0's token")
        machines = self.machines()
        mesh = Mesh(
            self.rank,
            self.size,
            self._store,
            machines,
            token=token,
            timeout_seconds=self.timeout_seconds,
            address=listening_address(machines),
            name=f"{self.name}/{name}",
        )
        mesh.while_waiting = self._while_waiting
        self._meshes.append(mesh)
        return mesh

    def _check_open(self) -> None:
        if self._is_closed:
            raise RankFailedError("the process group was destroyed", place=self.place)

    # Failure and the end

    def tell(self, error: HeadwayError, what: str) -> HeadwayError:
        """Let the other ranks know that `what` has failed here, and say what is raised for it.

        Where ranks disagree, that has what each of them was in.
        """
        news = error if isinstance(error, RunError) else RankFailedError(f"{what}: {error.message}")
        with contextlib.suppress(RuntimeError):  # the store has gone, with rank 0
            self._store.set(f"submitted/{self.rank}", what)
            self._store.set("broken", f"{type(news).__name__}: {news.message}")
        differ = isinstance(error, MismatchError | StalledError)
        if self._communicator is not None and not differ:
            # Of a mismatch or a stall, the executor tells the ranks of this machine itself.
            with contextlib.suppress(HeadwayError):
                self._communicator.abort(news.message)
        for mesh in self._meshes:
            mesh.close(news)
        message = error.message
        if differ:
            told = self._submitted()
            lines = "".join(f"\n  rank {rank}: {told.get(rank, 'nothing yet')}" for rank in range(self.size))
            message = f"{message}\n  what the ranks have submitted:{lines}"
        return type(error)(message, place=what, remedy=error.remedy)

    def _submitted(self) -> dict[int, str]:
        """What the ranks were in when they failed, of those that say so soon."""
        told: dict[int, str] = {}
        deadline = time.monotonic() + _EXPLAIN_SECONDS
        with contextlib.suppress(RuntimeError):  # the store has gone, with rank 0
            while len(told) < self.size and time.monotonic() < deadline:
                for rank in range(self.size):
                    key = f"submitted/{rank}"
                    if rank not in told and self._store.check([key]):
                        told[rank] = self._store.get(key).decode().partition(": ")[2]
                time.sleep(0.01)
        return told

    def close(self) -> None:
        """Give back threads, connections and memory. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._communicator is not None:
            self._communicator.close()
        for mesh in self._meshes:
            mesh.close()
        if self._mailbox is not None:
            self._mailbox.close()


def machine_name() -> str:
    """What tells this machine apart: ranks share memory only where they see each other's processes."""
    named = os.environ.get("HEADWAY_MACHINE", "")
    if named:
        return named
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def listening_address(machines: Sequence[str]) -> str:
    """Where a rank listens: the loopback, unless there are other machines to be reached."""
    named = os.environ.get("HEADWAY_ADDRESS", "")
    if named:
        return named
    if len(set(machines)) == 1:
        return "127.0.0.1"
    try:
        master = socket.getaddrinfo(os.environ.get("MASTER_ADDR", "127.0.0.1"), 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(master[0], socket.SOCK_DGRAM) as probe:
            probe.connect(master[4])  # sends nothing: only asks which interface leads there
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
