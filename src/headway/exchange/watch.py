"""Who of the ranks is still there: a connection between any two, that ends when one of them does.

The kernel closes the connections of a process that dies, whatever it was doing, so the others know at once, without a
question, a time-out or a third rank in between. Who leaves in good order says so first.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import threading
import weakref
from collections.abc import Callable
from typing import Any

from headway.exchange.membership import listening_address, machine_name
from headway.exchange.tcp import Store, wait_for_key

__all__ = ["MOST_RANKS", "Watch"]

MOST_RANKS = 128
"""Beyond that, connections between any two would be too many: nobody watches."""

_NONCE_BYTES, _PROOF_BYTES = 16, hashlib.sha256().digest_size
_RANK = struct.Struct("!I")
_HELLO_BYTES = _RANK.size + _PROOF_BYTES
_BYE = b"b"
_CONNECT_SECONDS = 30.0
_LINES_PER_RANK = 4


class _Line:
    """A connection: to which rank, once that is known, and what has come of its greeting."""

    def __init__(self, connection: socket.socket, peer: int = -1) -> None:
        self.socket, self.peer = connection, peer
        self.nonce = secrets.token_bytes(_NONCE_BYTES)
        self.greeting = b""
        self.has_left = False


class Watch:
    """Calls `on_death(rank)`, from a thread of its own, as soon as another of `size` ranks has died.

    All ranks make one, with the same `store`, whose keys no earlier watch may have left there. Strangers are turned
    away: a token in the store, which is trusted, has to be known. `close` says goodbye. A forked child has no part.

    Raises StalledError if a rank does not come in `timeout_seconds`.
    """

    def __init__(
        self, rank: int, size: int, store: Store, on_death: Callable[[int], Any], *, timeout_seconds: float = 300.0
    ) -> None:
        self.rank, self.size = rank, size
        self._on_death = on_death
        self._lines: list[_Line] = []
        self._closing = False
        if size > MOST_RANKS:
            return
        store.set(f"machine/{rank}", machine_name())
        if rank == 0:
            store.set("token", secrets.token_hex(32))

        def read(key: str, of: int) -> bytes:
            return wait_for_key(store, key, timeout_seconds, who=f"rank {of}")

        machines = [read(f"machine/{other}", other).decode() for other in range(size)]
        self._token = read("token", 0)
        host = listening_address(machines)
        self._listener = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=size
        )
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        _watches.add(self)
        store.set(f"where/{rank}", f"{host}|{self._listener.getsockname()[1]}")
        try:
            for other in range(rank):
                where, _, port = read(f"where/{other}", other).decode().rpartition("|")
                self._connect(other, (where, int(port)))
        except BaseException:
            self._close_files()
            raise
        for waiting in (self._listener, self._wake_out):
            waiting.setblocking(False)
            self._selector.register(waiting, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="headway-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say goodbye, and watch no more. A second call does nothing."""
        if self._closing or self.size > MOST_RANKS:
            return
        self._closing = True
        with contextlib.suppress(OSError):
            self._wake_in.send(b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for line in self._lines:
            with contextlib.suppress(OSError):  # it has gone before
                line.socket.send(_BYE)
        self._close_files()

    def _connect(self, other: int, where: tuple[str, int]) -> None:
        # A rank that cannot be reached has died already: whoever needs it will say so.
        with contextlib.suppress(OSError):
            line = _Line(socket.create_connection(where, _CONNECT_SECONDS), other)
            self._lines.append(line)
            nonce = b""
            while len(nonce) < _NONCE_BYTES and (more := line.socket.recv(_NONCE_BYTES - len(nonce))):
                nonce += more
            line.socket.sendall(_RANK.pack(self.rank) + self._proof(nonce, self.rank, other))
            self._register(line)

    def _register(self, line: _Line) -> None:
        line.socket.setblocking(False)
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that lost its power closes nothing: the kernel asks, and gives up after a while.
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                line.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._selector.register(line.socket, selectors.EVENT_READ, line)

    def _proof(self, nonce: bytes, source: int, target: int) -> bytes:
        return hmac.digest(self._token, nonce + _RANK.pack(source) + _RANK.pack(target), hashlib.sha256)

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data is not None:
                    self._read(key.data)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            line = _Line(self._listener.accept()[0])
            if len(self._lines) > _LINES_PER_RANK * self.size:  # strangers that say nothing: the oldest goes
                self._drop(next(one for one in self._lines if one.peer < 0))
            self._lines.append(line)
            self._register(line)
            line.socket.send(line.nonce)

    def _read(self, line: _Line) -> None:
        if line not in self._lines:
            return  # dropped a moment ago
        try:
            data = line.socket.recv(_HELLO_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if line.peer < 0:
            line.greeting += data
            if data and len(line.greeting) < _HELLO_BYTES:
                return
            if not self._greets(line):
                self._drop(line)
                return
            data = line.greeting[_HELLO_BYTES:] or None
        if data is None:
            return
        line.has_left |= _BYE in data
        if not data:
            self._drop(line)
            if not line.has_left and not self._closing:
                self._on_death(line.peer)

    def _greets(self, line: _Line) -> bool:
        greeting = line.greeting[:_HELLO_BYTES]
        if len(greeting) < _HELLO_BYTES:
            return False
        (source,) = _RANK.unpack_from(greeting)
        if not hmac.compare_digest(greeting[_RANK.size :], self._proof(line.nonce, source, self.rank)):
            return False
        line.peer = source
        return True

    def _drop(self, line: _Line) -> None:
        self._selector.unregister(line.socket)
        self._lines.remove(line)
        line.socket.close()

    def _close_files(self) -> None:
        self._selector.close()
        for one in (self._listener, self._wake_in, self._wake_out, *(line.socket for line in self._lines)):
            one.close()


_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked child, of a data loader say, would keep the connections open after its parent was killed.
    for watch in list(_watches):
        watch._closing = True
        watch._close_files()


os.register_at_fork(after_in_child=_close_in_child)
