"""Calls to a server that is a process of this machine: what `Call` needs beside the four verbs.

    server = CallServer(verbs, metadata.handle, idle=metadata.sweep)      # in the server's process
    server.serve_for_ever()
    client = Blocking(verbs, CallClient({"metadata": server.address}))    # in each client's

A server answers one request after the other, so its handler needs no locks. Requests and replies are MessagePack on
sequenced-packet sockets with abstract names: nothing is left in the file system, whoever is killed. Linux only.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from headway.errors import InputError, RunError
from headway.memory.remote import Blocking, Logic, Verbs

__all__ = ["CallClient", "CallServer"]

_LARGEST = 1 << 20  # bytes of a request or reply that are received


class CallServer:
    """Answers calls by carrying out `handler(client, request)` on `verbs`; `address` is what clients need to know.

    `idle()` is carried out every `idle_seconds`, between requests: a sweep, say.
    """

    def __init__(
        self,
        verbs: Verbs,
        handler: Callable[[str, list[Any]], Logic[Any]],
        *,
        idle: Callable[[], Logic[Any]] | None = None,
        idle_seconds: float = 0.05,
    ) -> None:
        self.address = f"headway-calls-{secrets.token_hex(8)}"
        self._runner = Blocking(verbs, name="server")
        self._handler, self._idle, self._idle_seconds = handler, idle, idle_seconds
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind("\0" + self.address)
        self._socket.listen(128)
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(self._socket, selectors.EVENT_READ)

    def serve_for_ever(self) -> None:
        """Answer calls until the process ends. Raises what the verbs raise, the node's end for one."""
        due = time.monotonic() + self._idle_seconds
        while True:
            for key, _ in self._waiting.select(max(due - time.monotonic(), 0.0) if self._idle else None):
                if key.fileobj is self._socket:
                    self._waiting.register(self._socket.accept()[0], selectors.EVENT_READ)
                else:
                    self._answer(key.fileobj)
            if self._idle is not None and time.monotonic() >= due:
                self._runner.carry_out(self._idle())
                due = time.monotonic() + self._idle_seconds

    def _answer(self, connection: Any) -> None:
        try:
            data = connection.recv(_LARGEST)
        except OSError:
            data = b""
        if not data:  # the client is gone
            self._waiting.unregister(connection)
            connection.close()
            return
        try:
            reply = [None, self._runner.carry_out(self._handler("", msgspec.msgpack.decode(data)))]
        except InputError as error:  # the client's mistake; anything else is the server's
            reply = [str(error), None]
        encoded = msgspec.msgpack.encode(reply)
        with contextlib.suppress(OSError):  # gone while it was being answered; the next recv says so
            if not _sent(connection, encoded):
                refusal = f"the reply of {len(encoded)} bytes is more than a packet holds"
                connection.send(msgspec.msgpack.encode([refusal, None]))


class CallClient:
    """Carries calls to servers, by name → address; for `Blocking`. One thread at a time.

    Raises InputError for a server that is not known, what it refused, or a request or reply that is larger than a
    packet (some 200 kB); RunError for a server that is gone.
    """

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self._addresses = dict(addresses)
        self._connections: dict[str, socket.socket] = {}

    def __call__(self, server: str, request: tuple[Any, ...]) -> Any:
        """The reply to `request`."""
        if server not in self._addresses:
            raise InputError("no server has that name", place=f"call to {server}", remedy="give its address")
        try:
            connection = self._connections.get(server)
            if connection is None:
                connection = self._connections[server] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                connection.connect("\0" + self._addresses[server])
            encoded = msgspec.msgpack.encode(request)
            is_sent = _sent(connection, encoded)
            data = connection.recv(_LARGEST) if is_sent else b""
        except OSError:
            is_sent, data = True, b""
        if not is_sent:
            raise InputError(
                f"a request of {len(encoded)} bytes is more than a packet holds",
                place=f"call to {server}",
                remedy="ask for less at once, or raise net.core.wmem_default",
            )
        if not data:
            raise RunError("is gone", place=f"call to {server}", remedy="start the server again, and the store anew")
        refusal, reply = msgspec.msgpack.decode(data)
        if refusal is not None:
            raise InputError(refusal, place=f"call to {server}")
        return reply

    def close(self) -> None:
        """Close the connections. Idempotent."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()


def _sent(connection: socket.socket, packet: bytes) -> bool:
    """Send a packet; False, and nothing is sent, where it is larger than the system's buffer for one."""
    try:
        connection.send(packet)
    except OSError as error:
        if error.errno != errno.EMSGSIZE:
            raise
        return False
    return True
