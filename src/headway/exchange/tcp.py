"""The transport between machines: authenticated TCP streams among ranks, in order, with prompt news of failure.

A `Mesh` joins ranks. Each direction of a pair has a connection of its own, opened by the sender when it first sends.
Both sides prove by HMAC-SHA256 over each other's random challenge that they know the token, before a byte of data is
looked at; strangers are refused and counted. The bytes themselves are neither encrypted nor signed: use a network that
you trust, or a tunnel.

**Failure.** A watcher thread sees every connection's end. One that ends without a farewell is a rank that died: every
call that waits, for whichever rank, raises RankFailedError naming it. A rank that gives up says why before it closes
(`close(error)`), so that the news goes on and names the rank that really failed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import os
import secrets
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from headway.errors import InputError, MismatchError, RankFailedError, RunError, StalledError

__all__ = ["Mesh", "Store", "wait_for_key"]

_HELLO = struct.Struct("<4sBII16s")  # magic, kind, source, target, the connecting side's challenge
_ANSWER = struct.Struct("<16s32s")  # the accepting side's challenge, its proof
_PROOF = struct.Struct("<32s")
_FRAME = struct.Struct("<4sIQQ")  # magic, reserved, stamp, bytes that follow
_NOTICE = struct.Struct("<BH")  # which error (0: none, a farewell), bytes of the reason
_MAGIC = b"HWM1"
_DATA, _NEWS = 1, 2
_GREETINGS = 64  # strangers and peers that may be in the middle of a handshake at one time
_HANDSHAKE_SECONDS = 5.0
_FAREWELL_SECONDS = 0.3
_ERRORS: tuple[type[RunError], ...] = (RankFailedError, MismatchError, StalledError)  # that a notice tells of
_SLICE_SECONDS = 0.1  # how often a call that waits looks for bad news
_BUFFER_BYTES = 4 << 20
_REASON_BYTES = 4096


class Store(Protocol):
    """What is used of a rendezvous store; torch.distributed's stores fit."""

    def set(self, key: str, value: Any, /) -> None:
        """Put a value under a key."""

    def get(self, key: str, /) -> bytes:
        """The value of a key that is there."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all the keys are there."""
        ...


def wait_for_key(store: Store, key: str, timeout_seconds: float, *, who: str) -> bytes:
    """The value of `key` as soon as it is there. StalledError after the time-out, naming `who` should have set it.

    Polls, because a torch store that blocks in one thread blocks all the others that use it.
    """
    deadline = time.monotonic() + timeout_seconds
    pause = 0.001
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise StalledError(
                f"{who} did not turn up within {timeout_seconds:g} s",
                place=key,
                remedy="see whether it was started and can reach the rendezvous store",
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return store.get(key)


class _Inbound:
    """What arrives from one rank: its connection, once it is there, and a frame's header that was read ahead."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # one reader at a time
        self.socket: socket.socket | None = None
        self.begun = bytearray()  # the beginning of a header
        self.header: tuple[int, int] | None = None


class _Outbound:
    """What goes to one rank."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # one writer at a time
        self.socket: socket.socket | None = None


class Mesh:
    """TCP between the ranks of one group. `machines` names each rank's machine.

    Listens on `address`: unless given, on the address that the rank's machine name is, or else on the loopback. The
    `token` that all ranks must know is, unless given, the environment's HEADWAY_TOKEN or else a random one that rank 0
    puts into `store`, which is trusted. `name` tells meshes in one store apart.

    Thread-safe. Frames between two ranks arrive in the order in which they were sent. Every call that waits raises
    StalledError after `timeout_seconds` without progress, and RankFailedError when any rank of the mesh has died.
    `refused` counts the strangers.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        machines: Sequence[str],
        *,
        token: bytes | str = b"",
        timeout_seconds: float = 300.0,
        address: str = "",
        name: str = "mesh",
    ) -> None:
        if len(machines) != size:
            raise InputError(f"{len(machines)} machines for {size} ranks", place=name, remedy="name one for each rank")
        self.rank = rank
        self.size = size
        self.machines = tuple(machines)
        self.timeout_seconds = timeout_seconds
        self.name = name
        self.stamp = 0  # goes with each frame that is sent, and must be that of each frame that is received
        self.refused = 0
        self.while_waiting: Callable[[float], None] | None = None  # called now and then with the seconds waited so far
        self._store = store
        self._inbound = {source: _Inbound() for source in range(size)}
        self._outbound = {target: _Outbound() for target in range(size)}
        self._arrived = threading.Condition()  # an inbound connection is there, or bad news
        self._failure: RunError | None = None
        self._left: set[int] = set()
        self._closing = False
        self._closed = False
        self._greetings = threading.BoundedSemaphore(_GREETINGS)
        self._counting = threading.Lock()
        self._token = self._agree_on_token(token)
        self._listener = _listen(address or _address_of(self.machines[rank]), name)
        host, port = self._listener.getsockname()[:2]
        self._ranks_of: dict[int, int] = {}  # file descriptor that is watched → rank
        self._poll = select.epoll()
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        self._wake, self._woken = os.pipe()
        self._poll.register(self._wake, select.EPOLLIN)
        self._watcher = threading.Thread(target=self._watch, name=f"headway-{name}-watcher", daemon=True)
        self._watcher.start()
        _meshes.add(self)
        store.set(self._key(rank), f"{host}|{port}")

    def _key(self, rank: int) -> str:
        return f"{self.name}/tcp/{rank}"

    def _agree_on_token(self, token: bytes | str) -> bytes:
        token = token or os.environ.get("HEADWAY_TOKEN", "")
        if not token:
            key = f"{self.name}/tcp/token"
            if self.rank == 0:
                self._store.set(key, secrets.token_hex(32))
            token = wait_for_key(self._store, key, self.timeout_seconds, who="rank 0's token")
        return token.encode() if isinstance(token, str) else bytes(token)

    # Data

    def send(self, target: int, array: np.ndarray, *, stamp: int | None = None) -> None:
        """Send the bytes of a contiguous uint8 array to rank `target`. Returns when the system has them all."""
        self._check_peer(target)
        view = array.reshape(-1).view(np.uint8).data
        way = self._outbound[target]
        with way.lock:
            if way.socket is None:
                way.socket = self._connect(target)
            header = _FRAME.pack(_MAGIC, 0, self.stamp if stamp is None else stamp, view.nbytes)
            try:
                self._send_all(way.socket, [memoryview(header), view], target)
            except OSError:
                raise self._lost(target) from None

    def receive(self, source: int, array: np.ndarray, *, stamp: int | None = None) -> None:
        """Fill a contiguous, writable uint8 array with the next frame from rank `source`.

        MismatchError if the frame has another length or another stamp.
        """
        self._check_peer(source)
        view = array.reshape(-1).view(np.uint8).data
        way = self._inbound[source]
        expected = self.stamp if stamp is None else stamp
        with way.lock:
            found, length = self._header(source, way)
            if found != expected:
                raise MismatchError(
                    f"rank {source} and rank {self.rank} are not in the same operation",
                    place=self.name,
                    remedy="let every rank submit the same operations, in the same order, with the same sizes",
                )
            if length != view.nbytes:
                raise MismatchError(
                    f"rank {source} sent {length} bytes where rank {self.rank} expects {view.nbytes}",
                    place=self.name,
                    remedy="let every rank submit tensors of the same size and dtype",
                )
            self._payload(source, way, view)

    def next_frame(self, source: int, *, timeout_seconds: float | None = None) -> tuple[int, int]:
        """(stamp, bytes) of the next frame from rank `source`, which stays there to be received."""
        self._check_peer(source)
        way = self._inbound[source]
        with way.lock:
            return self._header(source, way, timeout_seconds=timeout_seconds)

    def _check_peer(self, peer: int) -> None:
        if not 0 <= peer < self.size or peer == self.rank:
            raise InputError(f"rank {self.rank} cannot exchange data with rank {peer}", place=self.name)

    def _header(self, source: int, way: _Inbound, *, timeout_seconds: float | None = None) -> tuple[int, int]:
        if way.header is None:
            limit = self.timeout_seconds if timeout_seconds is None else timeout_seconds
            if way.socket is None:
                self._await_connection(source, way, limit)
            # What has arrived of a header stays there when the call gives up: the next call goes on.
            while len(way.begun) < _FRAME.size:
                piece = bytearray(_FRAME.size - len(way.begun))
                count = self._receive_some(way, memoryview(piece), source, limit)
                way.begun += piece[:count]
            magic, _, stamp, length = _FRAME.unpack(way.begun)
            way.begun.clear()
            if magic != _MAGIC:
                raise self._fail(RankFailedError(f"rank {source} sent what is not a frame", place=self.name))
            way.header = (stamp, length)
        return way.header

    def _payload(self, source: int, way: _Inbound, view: memoryview) -> None:
        way.header = None
        got = 0
        while got < view.nbytes:
            got += self._receive_some(way, view[got:], source, self.timeout_seconds)

    def _await_connection(self, source: int, way: _Inbound, timeout_seconds: float) -> None:
        began = time.monotonic()
        while way.socket is None:
            with self._arrived:
                if way.socket is None:
                    patience = began + timeout_seconds - time.monotonic()
                    self._arrived.wait(max(0.0, min(_SLICE_SECONDS, patience)))
            if way.socket is None:
                self._wait_on(source, began, timeout_seconds)

    def _receive_some(self, way: _Inbound, view: memoryview, source: int, limit: float) -> int:
        """At least a byte, or an error."""
        connection = way.socket
        assert connection is not None
        began = time.monotonic()
        while True:
            try:
                count = connection.recv_into(view)
            except TimeoutError:
                self._wait_on(source, began, limit)
                continue
            except OSError:
                count = 0
            if count == 0:
                raise self._lost(source)
            return count

    def _send_all(self, connection: socket.socket, parts: list[memoryview], target: int) -> None:
        began = time.monotonic()
        parts = [part for part in parts if part.nbytes]
        while parts:
            try:
                count = connection.sendmsg(parts)
            except TimeoutError:
                self._wait_on(target, began, self.timeout_seconds)
                continue
            began = time.monotonic()
            while parts and count >= parts[0].nbytes:
                count -= parts.pop(0).nbytes
            if parts and count:
                parts[0] = parts[0][count:]

    # Bad news

    def _raise_bad_news(self, peer: int | None = None) -> None:
        if self._failure is not None:
            raise self._failure
        if peer is not None and peer in self._left:
            raise RankFailedError(f"rank {peer} has left the group", place=self.name)
        if self._closing:
            raise RankFailedError(f"rank {self.rank} has closed its connections", place=self.name)

    def _wait_on(self, peer: int, began: float, limit: float) -> None:
        """Nothing has come: whether to wait on. Raises bad news, and StalledError when it is late."""
        self._raise_bad_news(peer)
        waited = time.monotonic() - began
        if self.while_waiting is not None:
            self.while_waiting(waited)
        if waited > limit:
            raise StalledError(
                f"rank {self.rank} waited {limit:g} s for rank {peer}",
                place=self.name,
                remedy="see what that rank does, or allow more time",
            )

    def _lost(self, peer: int) -> RunError:
        """What to raise when the connection to `peer` has ended: the news that came before it counts."""
        # A rank that gives up says why before it closes; the watcher may still be reading that.
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self._failure is None and peer not in self._left and time.monotonic() < deadline and not self._closing:
            time.sleep(0.005)
        if self._failure is not None:
            return self._failure
        if peer in self._left:
            return RankFailedError(f"rank {peer} has left the group", place=self.name)
        if self._closing:
            return RankFailedError(f"rank {self.rank} has closed its connections", place=self.name)
        return self._fail(_died(peer, self.name))

    def _fail(self, failure: RunError) -> RunError:
        with self._arrived:
            if self._failure is None and not self._closing:
                self._failure = failure
            self._arrived.notify_all()
        return self._failure or failure

    @property
    def failure(self) -> RunError | None:
        """What broke the mesh, if something did."""
        return self._failure

    # Connections

    def _connect(self, target: int) -> socket.socket:
        where = wait_for_key(self._store, self._key(target), self.timeout_seconds, who=f"rank {target}")
        self._raise_bad_news(target)
        host, _, port = where.decode().rpartition("|")
        try:
            connection = self._greet(target, (host, int(port)), _DATA, self.timeout_seconds)
        except (OSError, EOFError):
            raise self._lost(target) from None
        self._watch_connection(connection, target)
        return connection

    def _greet(self, target: int, where: tuple[str, int], kind: int, timeout_seconds: float) -> socket.socket:
        """A connection to `target`, each side sure that the other knows the token."""
        connection = socket.create_connection(where, timeout=min(timeout_seconds, 30.0))
        try:
            _tune(connection)
            hello = _HELLO.pack(_MAGIC, kind, self.rank, target, secrets.token_bytes(16))
            connection.sendall(hello)
            answer = _read_exactly(connection, _ANSWER.size)
            challenge, proof = _ANSWER.unpack(answer)
            if not hmac.compare_digest(proof, self._proof(b"accepts", hello, challenge)):
                raise RankFailedError(
                    f"what answers at rank {target}'s address does not know the token",
                    place=self.name,
                    remedy="give every rank the same HEADWAY_TOKEN",
                )
            connection.sendall(_PROOF.pack(self._proof(b"connects", hello, challenge)))
            if _read_exactly(connection, 1) != b"\x01":
                raise RankFailedError(
                    f"rank {target} refuses rank {self.rank}'s token",
                    place=self.name,
                    remedy="give every rank the same HEADWAY_TOKEN",
                )
        except BaseException:
            connection.close()
            raise
        connection.settimeout(_SLICE_SECONDS)
        return connection

    def _proof(self, side: bytes, hello: bytes, challenge: bytes) -> bytes:
        return hmac.digest(self._token, b"|".join((side, self.name.encode(), hello, challenge)), hashlib.sha256)

    def _watch_connection(self, connection: socket.socket, rank: int) -> None:
        self._ranks_of[connection.fileno()] = rank
        with contextlib.suppress(ValueError, OSError):  # closed in the meantime
            self._poll.register(connection.fileno(), select.EPOLLRDHUP | select.EPOLLHUP)

    def _watch(self) -> None:
        """Accept connections and see connections end, until closed."""
        while not self._closed:
            try:
                events = self._poll.poll()
            except (OSError, ValueError):
                return
            for descriptor, _ in events:
                if descriptor == self._wake:
                    return
                if descriptor == self._listener.fileno():
                    self._accept()
                    continue
                rank = self._ranks_of.get(descriptor)
                with contextlib.suppress(OSError, ValueError):
                    self._poll.unregister(descriptor)
                if rank is not None and not self._closing:
                    threading.Thread(
                        target=self._lost, args=(rank,), name=f"headway-{self.name}-lost", daemon=True
                    ).start()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if not self._greetings.acquire(blocking=False):
            self._refuse(connection)
            return
        threading.Thread(
            target=self._welcome, args=(connection,), name=f"headway-{self.name}-greeting", daemon=True
        ).start()

    def _refuse(self, connection: socket.socket) -> None:
        with self._counting:
            self.refused += 1
        connection.close()

    def _welcome(self, connection: socket.socket) -> None:
        """The accepting side of a handshake, in a thread of its own, so that a silent stranger delays nobody."""
        try:
            connection.settimeout(_HANDSHAKE_SECONDS)
            hello = _read_exactly(connection, _HELLO.size)
            magic, kind, source, target, _ = _HELLO.unpack(hello)
            if magic != _MAGIC or kind not in (_DATA, _NEWS) or target != self.rank or source >= self.size:
                self._refuse(connection)
                return
            challenge = secrets.token_bytes(16)
            connection.sendall(_ANSWER.pack(challenge, self._proof(b"accepts", hello, challenge)))
            (proof,) = _PROOF.unpack(_read_exactly(connection, _PROOF.size))
            if not hmac.compare_digest(proof, self._proof(b"connects", hello, challenge)):
                self._refuse(connection)
                return
            connection.sendall(b"\x01")
            if kind == _NEWS:
                self._hear(connection, source)
            else:
                self._take_in(connection, source)
        except (OSError, EOFError):
            self._refuse(connection)
        finally:
            self._greetings.release()

    def _take_in(self, connection: socket.socket, source: int) -> None:
        way = self._inbound[source]
        with self._arrived:
            if way.socket is not None or self._closing:
                # Each rank opens one connection in each direction; a second one has no place to be read from.
                self._refuse(connection)
                return
            _tune(connection)
            connection.settimeout(_SLICE_SECONDS)
            way.socket = connection
            self._watch_connection(connection, source)
            self._arrived.notify_all()

    def _hear(self, connection: socket.socket, source: int) -> None:
        with connection:
            kind, length = _NOTICE.unpack(_read_exactly(connection, _NOTICE.size))
            reason = _read_exactly(connection, min(length, _REASON_BYTES)).decode(errors="replace")
            if kind:
                self._fail(_ERRORS[(kind - 1) % len(_ERRORS)](reason, place=self.name))
            else:
                with self._arrived:
                    self._left.add(source)
                    self._arrived.notify_all()
            connection.sendall(b"\x01")

    # The end

    def close(self, error: RunError | None = None) -> None:
        """Say farewell to the ranks that are connected and close everything. A second call does nothing.

        With an `error` the group is broken: the others' calls that wait raise the same.
        """
        with self._counting:
            if self._closing:
                return
            self._closing = True
        try:
            peers = sorted(set(self._ranks_of.values()) - self._left)
            threads = [
                threading.Thread(target=self._bid_farewell, args=(peer, error), name="headway-farewell", daemon=True)
                for peer in peers
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(2 * _FAREWELL_SECONDS)
        finally:
            self._closed = True
            os.write(self._woken, b"x")
            if threading.current_thread() is not self._watcher:
                self._watcher.join(5.0)
            self._close_files()
            with self._arrived:
                self._arrived.notify_all()

    def _bid_farewell(self, peer: int, error: RunError | None) -> None:
        try:
            where = self._store_address(peer)
            if where is None:
                return
            with self._greet(peer, where, _NEWS, _FAREWELL_SECONDS) as connection:
                connection.settimeout(_FAREWELL_SECONDS)
                raw = b"" if error is None else error.message.encode()[:_REASON_BYTES]
                connection.sendall(_NOTICE.pack(_number(error), len(raw)) + raw)
                _read_exactly(connection, 1)
        except (OSError, EOFError, RunError):
            return  # It has left, or is dead: then it needs no news.

    def _store_address(self, peer: int) -> tuple[str, int] | None:
        # The peer of a connection that it opened to us listens elsewhere, and only the store knows where.
        try:
            host, _, port = self._store.get(self._key(peer)).decode().rpartition("|")
        except (RuntimeError, OSError):  # the store has gone, with rank 0
            return None
        return host, int(port)

    def _close_files(self) -> None:
        for way in (*self._inbound.values(), *self._outbound.values()):
            if way.socket is not None:
                way.socket.close()
        self._listener.close()
        self._poll.close()
        for descriptor in (self._wake, self._woken):
            with contextlib.suppress(OSError):
                os.close(descriptor)


_meshes: weakref.WeakSet[Mesh] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked child, of a data loader say, would keep the connections open after its parent was killed, and no one
    # would notice. Closing the child's descriptors does not touch the parent's connections.
    for mesh in list(_meshes):
        mesh._closing = mesh._closed = True
        mesh._close_files()


os.register_at_fork(after_in_child=_close_in_child)


def _number(error: RunError | None) -> int:
    if error is None:
        return 0
    return next((at for at, kind in enumerate(_ERRORS, start=1) if isinstance(error, kind)), 1)


def _died(peer: int, place: str) -> RankFailedError:
    return RankFailedError(
        f"rank {peer} closed its connection in the middle of the run: it died or was killed",
        place=place,
        remedy=f"see rank {peer}'s own output",
    )


def _address_of(machine: str) -> str:
    """The machine's name if it is an address, else the loopback."""
    try:
        return str(ipaddress.ip_address(machine))
    except ValueError:
        return "127.0.0.1"


def _listen(address: str, place: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # The buffer is inherited by what is accepted, and must be large before the window is agreed upon.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        listener.bind((address, 0))
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {address}: {error}", place=place, remedy="give an address of this machine's own"
        ) from None
    return listener


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    # A machine that lost power sends no farewell: probes find out.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _read_exactly(connection: socket.socket, count: int) -> bytes:
    """`count` bytes, within the connection's time-out in all. EOFError if it ends, TimeoutError (an OSError)."""
    limit = connection.gettimeout()
    deadline = time.monotonic() + (limit if limit is not None else _HANDSHAKE_SECONDS)
    data = bytearray()
    while len(data) < count:
        if time.monotonic() > deadline:
            # A stranger that sends a byte now and then must not hold the place of a peer.
            raise TimeoutError
        piece = connection.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
