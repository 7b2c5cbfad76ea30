"""In-network aggregation on real sockets: the machines of `headway.collective` on UDP.

The server is a stand-in, in user space, for a programmable switch: workers send it segments of their vectors, it sends
back the sums. `python -m headway.exchange.aggregation --port 7000` starts one; `AggregationClient` is a worker's end::

    with AggregationClient(("127.0.0.1", 7000), job=1, workers=2) as client:
        outcome = client.all_reduce(gradient)        # in place; every worker gets the same bits

Floating-point vectors are summed as integers with one exponent for each segment, on which the workers agree first, so
the sum does not depend on the order in which packets come (`how="integer"`), or as float32 in the order of the workers
(`how="ordered"`). Without a token the aggregator listens on the loopback alone.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch

from headway.collective.aggregation_worker import Worker
from headway.collective.aggregator import Aggregator, Outgoing
from headway.collective.packets import (
    HEADER_BYTES,
    LARGEST_PAYLOAD_BYTES,
    Operation,
    Packet,
    decode,
    encode_header,
    payload_checksum,
)
from headway.errors import FieldError, FileError, HeadwayError, InputError, Interrupted, RankFailedError, RunError
from headway.exchange.block_exponents import block_exponents, quantise, restore
from headway.exchange.compiled_aggregator import CompiledAggregator
from headway.exchange.compiled_round import CompiledRound, Stop
from headway.exchange.datagrams import host_and_port, is_supported

__all__ = ["AggregationClient", "AggregationServer", "Outcome", "aggregate", "main", "serve"]

# What the kernel is asked to hold for a socket. It gives no more than its limit (net.core.rmem_max) and says nothing.
_BUFFER_BYTES = 4 << 20
# Less for what a worker receives: on a loopback it counts as the aggregator's until it is read, and a worker that does
# not read must not use up all that the aggregator may send.
_RESULTS_BYTES = 2 << 20
# A datagram occupies more of that than its bytes.
_BUFFER_SHARE = 0.5
# More slots than that only move what is under way out of the processor's caches.
_MOST_SLOTS = 32
# What an aggregator keeps of a worker in a slot: its contribution, and its share of the results of both sets.
_BUFFERS_PER_SLOT = 3
_GOODBYE_SECONDS = 1.0
_DATAGRAM_BYTES = LARGEST_PAYLOAD_BYTES + HEADER_BYTES
_BURST = 64  # datagrams taken in before the clock is looked at again
_BATCH = 8  # results taken in before more is sent: each turn costs a change of processes

Disturbance = Callable[[bool, bytes], Sequence[bytes]]


def _socket(host: str, receive_bytes: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.setblocking(False)
    return made


class AggregationServer:
    """An aggregator on a UDP socket; `run` serves until `stop`, `start` does so in a thread.

    `slots` bounds what is under way of one job: by default as much as the socket can hold for `workers` workers that
    send the largest payloads. Raises FieldError for an address beyond the loopback without a token, InputError if it
    cannot be had.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        slots: int | None = None,
        jobs: int = 16,
        workers: int = 2,
        token: bytes | None = None,
    ) -> None:
        if not token and not _is_loopback(host):
            raise FieldError(
                "would take packets from the network without a token",
                place=f"aggregator: {host}",
                remedy="give one with --token-file or HEADWAY_TOKEN, or bind to 127.0.0.1",
            )
        if workers < 1 or not 0 <= port < 1 << 16:
            raise FieldError(f"{workers} workers, port {port}", place="aggregator", remedy="1 or more; 0 to 65535")
        try:
            self._socket = _socket(host, _BUFFER_BYTES)
            self._socket.bind((host, port))
        except OSError as error:
            if hasattr(self, "_socket"):
                self._socket.close()
            raise InputError(
                f"cannot listen: {error.strerror}", place=f"{host}:{port}", remedy="choose another address or port"
            ) from error
        held = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) * _BUFFER_SHARE
        room = int(held // (workers * _DATAGRAM_BYTES))
        # Another epoch than that of a server that was here before: a worker of its must not be taken for one of ours.
        epoch = int.from_bytes(os.urandom(4), "big") >> 2
        slots = slots or min(max(2, room), _MOST_SLOTS)
        options: dict[str, Any] = {"slots": slots, "jobs": jobs, "token": token or None, "first_epoch": epoch}
        self.aggregator = (
            CompiledAggregator(buffers=_BUFFERS_PER_SLOT * slots * workers, **options)
            if is_supported()
            else Aggregator(**options)
        )
        self._removals: deque[tuple[int, int]] = deque()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._wake_out, self._wake_in = socket.socketpair()
        for end in (self._wake_out, self._wake_in):
            end.setblocking(False)
        self._unsent = 0

    @property
    def unsent(self) -> int:
        """Datagrams that the kernel did not take: they are asked for again."""
        return self._unsent + (self.aggregator.unsent if isinstance(self.aggregator, CompiledAggregator) else 0)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self._socket.getsockname()[:2]

    def start(self) -> AggregationServer:
        """Serve in a thread."""
        self._thread = threading.Thread(target=self.run, name="headway aggregator", daemon=True)
        self._thread.start()
        return self

    def ask_to_stop(self) -> None:
        """Have `run` return; good in a signal handler, and in any thread."""
        self._stopping.set()
        self._wake()

    def stop(self) -> None:
        """End `run`, and free the address."""
        self.ask_to_stop()
        if self._thread is not None:
            self._thread.join()  # it looks at least once a second
        for end in (self._socket, self._wake_in, self._wake_out):
            end.close()

    def remove(self, job: int, worker: int) -> None:
        """No longer wait for a worker that is gone without a word. From any thread."""
        self._removals.append((job, worker))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake up anyhow
            self._wake_in.send(b"x")

    def run(self) -> None:
        """Serve until `stop` or `ask_to_stop` is called."""
        serve = self._turn if isinstance(self.aggregator, CompiledAggregator) else self._plain_turn()
        while not self._stopping.is_set():
            while self._removals:
                self._send(self.aggregator.remove(*self._removals.popleft()))
            serve()
            with contextlib.suppress(BlockingIOError):
                self._wake_out.recv(64)

    def _turn(self) -> None:
        assert isinstance(self.aggregator, CompiledAggregator)
        address_bytes = 28 if self._socket.family == socket.AF_INET6 else 16
        self._send(self.aggregator.serve(self._socket.fileno(), self._wake_out.fileno(), address_bytes))

    def _plain_turn(self) -> Callable[[], None]:
        """The same where the compiled aggregator cannot be: a datagram at a time, by the interpreter."""
        buffer = bytearray(_DATAGRAM_BYTES + 8)
        view = memoryview(buffer)
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._wake_out, select.POLLIN)

        def turn() -> None:
            try:
                size, source = self._socket.recvfrom_into(buffer)
            except BlockingIOError:
                poller.poll(1000)
                return
            # What is written to a socket is copied: the buffer is free again for the next datagram.
            self._send(self.aggregator.receive(view[:size], source))

        return turn

    def _send(self, outgoing: Outgoing) -> None:
        known: object = None
        of_payload = 0
        for address, packet in outgoing:
            if packet.payload is not known:
                known, of_payload = packet.payload, payload_checksum(packet.payload)
            target = host_and_port(address) if isinstance(address, bytes) else address
            try:
                self._socket.sendmsg((encode_header(packet, of_payload), packet.payload), (), 0, target)  # pyright: ignore[reportArgumentType]
            except OSError:
                self._unsent += 1


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Outcome(NamedTuple):
    """What came out of an all-reduce: the least and the most workers in any of its segments, whether contributions of
    workers that take part are missing in one (`partial`), whether an integer left its range or had to be clipped
    (`overflow`)."""

    least: int
    most: int
    partial: bool
    overflow: bool


class _Quantised(Sequence[memoryview]):
    """A vector's segments as integers, made when they are sent: the vector stays in place until its sum comes."""

    def __init__(self, values: np.ndarray, width: int, own: Any, agreed: Any, bits: int) -> None:
        self._values, self._width = values, width
        self._own, self._agreed, self._bits = own, agreed, bits

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, segment: Any) -> Any:
        values = self._values[segment * self._width : (segment + 1) * self._width]
        integers: Any = np.empty(len(values), np.int32)
        quantise(values, self._own[segment], self._agreed[segment], self._bits, integers)
        return memoryview(integers).cast("B")


class AggregationClient:
    """A worker's end of an aggregation job, joined when it is made. One thread at a time.

    `workers` is how many found the job; who comes later takes part from the next all-reduce on that nobody has begun.
    `payload_bytes` is the size of a segment, the same for all workers: with the largest, a vector takes the fewest
    datagrams, which a loopback carries whole; across Ethernet choose what fits into a frame. `disturb` is for tests:
    it is given (whether it goes out, a datagram), and gives what is delivered instead.

    Raises RankFailedError if the aggregator refuses, StalledError if it does not answer, or not all workers join, in
    `timeout_seconds`.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        job: int,
        workers: int,
        token: bytes = b"",
        payload_bytes: int = LARGEST_PAYLOAD_BYTES,
        timeout_seconds: float = 30.0,
        patience_seconds: float = 0.02,
        nonce: bytes | None = None,
        disturb: Disturbance | None = None,
    ) -> None:
        if not 8 <= payload_bytes <= LARGEST_PAYLOAD_BYTES:
            raise FieldError(f"{payload_bytes}", place="payload_bytes", remedy=f"8 to {LARGEST_PAYLOAD_BYTES}")
        if not 0 <= job < 1 << 32:
            raise FieldError(f"{job}", place="job", remedy="0 to 2**32 - 1")
        self.payload_bytes = payload_bytes // 8 * 8
        self._place = f"aggregation, {address[0]}:{address[1]}, job {job}"
        self._disturb = disturb
        self._machine = Worker(
            job,
            nonce or os.urandom(8),
            workers=workers,
            token=token,
            timeout_seconds=timeout_seconds,
            patience_seconds=patience_seconds,
        )
        self._buffer = bytearray(_DATAGRAM_BYTES + 8)
        self._view = memoryview(self._buffer)
        self._is_closed = False
        self._is_refused = False
        try:
            self._socket = _socket(address[0], _RESULTS_BYTES)
            self._socket.connect(address)
        except OSError as error:
            if hasattr(self, "_socket"):
                self._socket.close()
            raise InputError(
                f"cannot be reached: {error.strerror}", place=self._place, remedy="give a host's name and a port"
            ) from error
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._writable.register(self._socket, select.POLLOUT)
        try:
            self._pump(lambda: self._machine.is_member)
        except BaseException:
            self.close()  # the seat is for somebody else
            raise

    def __enter__(self) -> AggregationClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def number(self) -> int:
        """This worker's number in the job."""
        return self._machine.number or 0

    @property
    def machine(self) -> Worker:
        """The state machine, for its counters."""
        return self._machine

    # Requests to the aggregator

    def set_threshold(self, contributions: int) -> None:
        """Have results made of so many contributions (0: of all workers), marked as partial where some are missing."""
        self._machine.set_threshold(contributions)
        self._pump(lambda: self._machine.is_settled)

    def reset(self) -> None:
        """Drop what is going on: rounds of all workers end with RunError, and the next ones are counted from 0."""
        self._machine.reset()
        self._pump(lambda: self._machine.is_settled)

    def halt(self) -> None:
        """Suspend the job: rounds of all workers wait for a `reset`."""
        self._machine.halt()
        self._pump(lambda: self._machine.is_settled)

    # Rounds

    def all_reduce(
        self,
        tensor: torch.Tensor,
        *,
        operation: Literal["sum", "average"] = "sum",
        how: Literal["integer", "ordered"] = "integer",
    ) -> Outcome:
        """Sum a contiguous float32 or int32 CPU tensor over the workers, in place.

        An average is over the workers whose contributions are in each segment. All workers must call it with tensors
        of one size and type. With `how="integer"` a float32 is rounded to 30 bits less those that the sum needs,
        relative to the largest in its segment. A segment with an infinity or NaN comes back as NaN.

        Raises FieldError for another tensor, MismatchError if another worker's is of another size or type, StalledError
        if results do not come, RankFailedError if the aggregator is gone, RunError after `close`, or when a worker has
        reset the job. After any of these but FieldError, part of the tensor may hold sums already.
        """
        machine = self._machine
        if self._is_closed:
            raise RunError("this client has been closed", place=self._place, remedy="make another")
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype not in _TYPES:
            raise FieldError(
                f"a {tensor.dtype} tensor on {tensor.device}, {'' if tensor.is_contiguous() else 'not '}contiguous",
                place="all_reduce", remedy="give a contiguous float32 or int32 tensor on the CPU",
            )  # fmt: skip
        if operation not in ("sum", "average") or (tensor.dtype == torch.int32 and operation == "average"):
            raise FieldError(
                f"{operation!r} of {tensor.dtype}", place="all_reduce", remedy="sum, or average of float32"
            )
        if how not in ("integer", "ordered"):
            raise FieldError(f"{how!r}", place="all_reduce: how", remedy="integer or ordered")
        # What has come in between rounds: a Reset, say, that this one must not be taken for having missed.
        self._take_in(time.monotonic())
        if not machine.is_done:
            raise RunError("the last all-reduce came to no end", place=self._place, remedy="reset the job, or close")
        if not tensor.numel():
            return Outcome(machine.workers, machine.workers, partial=False, overflow=False)
        values: Any = tensor.detach().view(-1).numpy()
        if tensor.dtype == torch.int32:
            return self._in_place(values, Operation.SUM_INT32, is_average=False)
        if how == "ordered":
            return self._in_place(values, Operation.SUM_FLOAT32, is_average=operation == "average")
        return self._as_integers(values, is_average=operation == "average")

    def _in_place(self, values: Any, operation: Operation, *, is_average: bool) -> Outcome:
        parts = self._segments(memoryview(values).cast("B"))
        width = self.payload_bytes // 4

        def deliver(position: int, packet: Packet) -> None:
            parts[position][:] = packet.payload
            if is_average:
                values[position * width : (position + 1) * width] /= np.float32(packet.count)

        self._machine.begin(parts, operation, deliver=deliver)
        return self._round(self._compiled(values, operation, is_average=is_average))

    def _as_integers(self, values: Any, *, is_average: bool) -> Outcome:
        width = self.payload_bytes // 4
        own: Any = block_exponents(values, width)
        agreed = own.copy()
        parts = self._segments(memoryview(agreed))

        def agree(position: int, packet: Packet) -> None:
            parts[position][:] = packet.payload

        machine = self._machine
        machine.begin(parts, Operation.MAX_UINT8, deliver=agree, following=len(own))
        first = self._round(self._compiled(agreed, Operation.MAX_UINT8))
        # Room for the sum of all founders' largest values, and of as many again that may join.
        bits = 30 - machine.workers.bit_length()

        def deliver(position: int, packet: Packet) -> None:
            integers = np.frombuffer(packet.payload, np.int32)
            block = values[position * width : (position + 1) * width]
            restore(integers, agreed[position], bits, 1.0 / packet.count if is_average else 1.0, block)

        # With a threshold, this worker may have been too late for the agreement, but in time for the sum.
        clipped = (own > agreed).tolist()
        quantised = _Quantised(values, width, own, agreed, bits)
        machine.begin(quantised, Operation.SUM_INT32, deliver=deliver, clipped=clipped)
        compiled = self._compiled(
            values, Operation.SUM_INT32, is_average=is_average, exponents=(own, agreed), bits=bits
        )
        outcome = self._round(compiled)
        return outcome._replace(partial=first.partial or outcome.partial)

    def _compiled(self, values: Any, operation: Operation, **options: Any) -> CompiledRound | None:
        if self._disturb is not None or not is_supported():
            return None
        vector = values.view(np.uint8)
        return CompiledRound(self._machine, self._socket.fileno(), vector, self.payload_bytes, operation, **options)

    def _segments(self, data: memoryview) -> list[memoryview]:
        return [data[start : start + self.payload_bytes] for start in range(0, len(data), self.payload_bytes)]

    def _round(self, compiled: CompiledRound | None) -> Outcome:
        """Carry out the round that has just begun."""
        machine = self._machine
        epoch = machine.epoch
        self._pump(lambda: machine.is_done, compiled)
        if machine.epoch != epoch:
            raise RunError(
                "another worker has reset the job", place=self._place, remedy="begin the step again, on all workers"
            )
        return Outcome(min(machine.counts), max(machine.counts), any(machine.partial), machine.overflow)

    # Datagrams

    def _pump(self, is_over: Callable[[], bool], compiled: CompiledRound | None = None) -> None:
        """Send and receive until it is over; the machine's time-outs bound it."""
        machine = self._machine
        while not is_over():
            is_compiled = compiled is not None and machine.is_plain and not self._is_refused
            if compiled is not None and is_compiled:
                self._go_on(compiled)
                if is_over():
                    return
            now = time.monotonic()
            for packet in machine.poll(now):
                self._send(packet)
            if is_compiled and not self._is_refused:
                continue
            if self._take_in(now) or is_over():
                continue
            if self._is_refused and machine.is_member:
                # While joining, the aggregator may yet be started. Now its slots are lost with it.
                raise RankFailedError(
                    "nobody listens there any more: the aggregator is gone", place=self._place,
                    remedy="start it again, and join again on all workers",
                )  # fmt: skip
            wait = min(machine.wake_seconds - time.monotonic(), 0.2)
            if wait > 0:
                self._readable.poll(math.ceil(wait * 1000))

    def _go_on(self, compiled: CompiledRound) -> None:
        """Have compiled code go on with the round, up to something that is for the machine to see to."""
        try:
            stopped = compiled.run()
        except OSError as error:
            raise RunError(f"the socket failed: {error.strerror}", place=self._place) from error
        if stopped is Stop.REFUSED:
            self._is_refused = True
        elif stopped is Stop.PACKET:
            packet = decode(compiled.datagram)
            if packet is not None:
                self._machine.handle(packet, time.monotonic())

    def _take_in(self, now_seconds: float) -> bool:
        """Handle what is there, until there is something to send; whether there was anything for us."""
        machine, view = self._machine, self._view
        took = False
        batch = min(_BATCH, machine.window // 4)
        for count in range(1, _BURST + 1):
            try:
                size = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                break
            except ConnectionRefusedError:
                self._is_refused = True
                break
            self._is_refused = False
            for datagram in (view[:size],) if self._disturb is None else self._disturb(False, bytes(view[:size])):
                packet = decode(datagram)
                took |= packet is not None and machine.handle(packet, now_seconds)
            if took and count >= batch and machine.has_to_send:
                break
        return took

    def _send(self, packet: Packet) -> None:
        parts = (encode_header(packet), packet.payload)
        for datagram in (parts,) if self._disturb is None else [(one,) for one in self._disturb(True, b"".join(parts))]:
            for _ in range(2):
                try:
                    self._socket.sendmsg(datagram)
                except BlockingIOError:
                    self._writable.poll(10)
                    continue  # and if there is still no room, it is lost, and asked for again
                except ConnectionRefusedError:
                    self._is_refused = True
                break

    def close(self) -> None:
        """Leave the job. Returns within a second or so, whether the aggregator answers or not."""
        if self._is_closed:
            return
        self._is_closed = True
        machine = self._machine
        machine.leave()
        end = time.monotonic() + _GOODBYE_SECONDS
        # It has no meaning for who leaves what else comes in, or that nobody is there to say goodbye to.
        with contextlib.suppress(HeadwayError, OSError):
            self._pump(lambda: machine.is_settled or self._is_refused or time.monotonic() > end)
        self._socket.close()


_TYPES = (torch.float32, torch.int32)


def serve(
    host: str = "127.0.0.1",
    port: int = 7000,
    *,
    workers: int = 2,
    slots: int | None = None,
    jobs: int = 16,
    token: bytes | None = None,
    as_json: bool = False,
) -> NoReturn:
    """Run an aggregator in this process until Ctrl-C or SIGTERM, then raise Interrupted. For the main thread.

    Prints its address on stdout as soon as it listens, and what it has seen on stderr at the end; with `as_json` both
    on stdout, each as one line of JSON. For the arguments and errors see `AggregationServer`.
    """
    server = AggregationServer(host, port, workers=workers, slots=slots, jobs=jobs, token=token)
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, lambda *_: server.ask_to_stop()) for each in signals}
    try:
        address, number = server.address
        print(json.dumps({"address": address, "port": number}) if as_json else f"{address}:{number}", flush=True)
        server.run()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        server.stop()
    counters = server.aggregator.counters
    seen = {**asdict(counters), "unsent": server.unsent}
    if as_json:
        print(json.dumps(seen), flush=True)
    else:
        for name, value in seen.items():
            print(f"{name:>14} {value}", file=sys.stderr)
    raise Interrupted(
        f"stopped after {counters.results} results of {counters.contributions} contributions; "
        f"{counters.duplicates} duplicates, {counters.refused} packets refused",
        place=f"aggregator, {host}:{port}",
    )


def aggregate(
    *,
    port: int = 7000,
    bind: str = "127.0.0.1",
    workers: int = 2,
    slots: int | None = None,
    jobs: int = 16,
    token_file: str | Path | None = None,
    as_json: bool = False,
) -> NoReturn:
    """What `headway aggregate` does: `serve`, with the token from a file, or else from the environment's HEADWAY_TOKEN.

    Raises FieldError for a number out of its range, an address that is none, and one beyond the loopback without a
    token; FileError for a token file that cannot be read or is empty; InputError for an address that cannot be had;
    Interrupted (exit code 130) at the end.
    """
    for name, number, least, most in (
        ("port", port, 0, 65_535), ("workers", workers, 1, 65_535), ("jobs", jobs, 1, 65_536),
        ("slots", 1 if slots is None else slots, 1, 65_536),
    ):  # fmt: skip
        if not least <= number <= most:
            raise FieldError(f"{number}", place=f"aggregate: {name}", remedy=f"{least} to {most}")
    if bind != "localhost":
        try:
            ipaddress.ip_address(bind)
        except ValueError as error:
            raise FieldError(
                f"{bind!r} is no address", place="aggregate: bind", remedy="give an address of this machine's own"
            ) from error
    token = os.environ.get("HEADWAY_TOKEN", "").encode() if token_file is None else _read_token(Path(token_file))
    serve(bind, port, workers=workers, slots=slots, jobs=jobs, token=token or None, as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m headway.exchange.aggregation`: an aggregator until Ctrl-C; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m headway.exchange.aggregation", description="An aggregator on UDP.")
    parser.add_argument("--bind", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=7000, help="the UDP port (7000); 0 for any that is free")
    parser.add_argument("--workers", type=int, default=2, help="how many workers a job will have, about (2)")
    parser.add_argument("--slots", type=int, help="segments under way of a job; by default what the socket can hold")
    parser.add_argument("--jobs", type=int, default=16, help="jobs at a time (16)")
    parser.add_argument("--token-file", help="a file with the token that workers must have; else HEADWAY_TOKEN")
    try:
        aggregate(**vars(parser.parse_args(arguments)))
    except HeadwayError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _read_token(path: Path) -> bytes:
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", place=str(path), remedy="name a file") from error
    if not token:
        raise FileError("is empty", place=str(path), remedy="write the token into it")
    return token


if __name__ == "__main__":
    sys.exit(main())
