"""The system calls of UDP for code that numba compiles: receive, send, wait, without the interpreter in between.

A `workspace` has the structures that the kernel wants, so that no call has to allocate any; each thread needs its own.
Addresses of peers are `sockaddr` structures as the kernel gives them, in four words (32 bytes) that are zero beyond
their end, so that two are equal when their words are. Linux, little-endian.
"""

from __future__ import annotations

import errno
import select
import socket
import sys
from typing import Any

import numpy as np
from numba import types

from headway.compiled import compiled

__all__ = [
    "NOT_READY",
    "REFUSED",
    "host_and_port",
    "is_supported",
    "monotonic_seconds",
    "receive",
    "send",
    "wait",
    "workspace",
]

_RECVFROM = types.ExternalFunction(
    "recvfrom", types.int64(types.int32, types.uintp, types.uintp, types.int32, types.uintp, types.uintp)
)
_SENDMSG = types.ExternalFunction("sendmsg", types.int64(types.int32, types.uintp, types.int32))
_POLL = types.ExternalFunction("poll", types.int32(types.uintp, types.uintp, types.int32))
_CLOCK = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))
_ERRNO = types.ExternalFunction("__errno_location", types.CPointer(types.int32)())

NOT_READY, REFUSED = -int(errno.EAGAIN), -int(errno.ECONNREFUSED)
"""What `receive` and `send` give if the call would have to wait; if nobody listens at the other end."""

_MSG_DONTWAIT = int(getattr(socket, "MSG_DONTWAIT", 0))
_POLLIN, _POLLOUT = int(getattr(select, "POLLIN", 1)), int(getattr(select, "POLLOUT", 4))
_CLOCK_MONOTONIC = 1
# Words of the workspace: msghdr, two iovec, two pollfd, timespec, the length of a sockaddr.
_HEADER, _PARTS, _POLLED, _TIME, _LENGTH, _WORDS = 0, 7, 11, 13, 15, 16
_ADDRESS_BYTES = 32


def is_supported() -> bool:
    """Whether these calls are there: with the C libraries of Linux."""
    return sys.platform == "linux" and sys.byteorder == "little"


def host_and_port(address: bytes) -> tuple[Any, ...]:
    """What Python's sockets call an address that `receive` gave."""
    family, port = int.from_bytes(address[:2], "little"), int.from_bytes(address[2:4], "big")
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, address[4:8]), port
    flow, scope = int.from_bytes(address[4:8], "big"), int.from_bytes(address[24:28], "little")
    return socket.inet_ntop(socket.AF_INET6, address[8:24]), port, flow, scope


def workspace() -> np.ndarray:
    """What the other functions of one thread work with."""
    return np.zeros(_WORDS, np.int64)


@compiled(nogil=True)
def monotonic_seconds(work: np.ndarray) -> float:
    """`time.monotonic`."""
    _CLOCK(_CLOCK_MONOTONIC, work[_TIME:].ctypes.data)
    return work[_TIME] + work[_TIME + 1] * 1e-9


@compiled(nogil=True)
def receive(descriptor: int, work: np.ndarray, buffer: np.ndarray, source: np.ndarray) -> int:
    """Take a datagram in, without waiting: its length, and its sender's address in `source`; or minus an errno."""
    work[_LENGTH] = _ADDRESS_BYTES
    size = _RECVFROM(
        descriptor, buffer.ctypes.data, len(buffer), _MSG_DONTWAIT, source.ctypes.data, work[_LENGTH:].ctypes.data
    )
    return size if size >= 0 else -int(_ERRNO()[0])


@compiled(nogil=True)
def send(
    descriptor: int, work: np.ndarray, header: np.ndarray, payload: np.ndarray, target: np.ndarray, target_bytes: int
) -> int:
    """Send a datagram of two parts, without waiting: 0 or more, or minus an errno. `target_bytes` 0: connected."""
    work[_HEADER] = target.ctypes.data if target_bytes else 0
    work[_HEADER + 1] = target_bytes
    work[_HEADER + 2] = work[_PARTS:].ctypes.data
    work[_HEADER + 3] = 2
    work[_HEADER + 4] = work[_HEADER + 5] = work[_HEADER + 6] = 0
    work[_PARTS], work[_PARTS + 1] = header.ctypes.data, len(header)
    work[_PARTS + 2], work[_PARTS + 3] = payload.ctypes.data, len(payload)
    size = _SENDMSG(descriptor, work[_HEADER:].ctypes.data, _MSG_DONTWAIT)
    return size if size >= 0 else -int(_ERRNO()[0])


@compiled(nogil=True)
def wait(descriptor: int, other: int, work: np.ndarray, milliseconds: int, to_send: bool = False) -> int:
    """Until a socket is ready (1), or `other` has something to be read (2); 0 when the time is up, or for a signal."""
    work[_POLLED] = descriptor | (_POLLOUT if to_send else _POLLIN) << 32
    work[_POLLED + 1] = (other & 0xFFFFFFFF) | _POLLIN << 32  # a descriptor of -1 is passed over
    if _POLL(work[_POLLED:].ctypes.data, 2, milliseconds) <= 0:
        return 0
    return 2 if work[_POLLED + 1] >> 48 else 1
