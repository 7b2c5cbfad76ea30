"""How the messages of a negotiation get to the coordinator and its answer to everybody.

The messages go over a gloo group of their own, as MessagePack that is checked against `Message` and `Answer`, so
nothing that arrives is ever executed. They go straight to rank 0 and back rather than through an all-reduce, because
then rank 0 knows whose message did not come. A connection that breaks is a rank that died; one that is silent for
longer than the time-out is named likewise. Rank 0 tells the others, and also writes it into the store that the ranks
met in: a rank whose connection to rank 0 is gone looks there before it concludes that it was rank 0 that died.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from headway.errors import RankFailedError
from headway.exchange.negotiation import Answer, Coordinator, Ending, Message

__all__ = ["Alone", "Star", "Tune", "died"]

_FRAME_BYTES = 1024  # one message of a step that repeats; longer ones are sent in two parts
_LONGEST_BYTES = 256 * 2**20
_GRACE_SECONDS = 5.0  # for the other ranks to come, once one is known to have died
_ROUNDING_SECONDS = 0.05  # by which a wait of gloo's may end before its time
_OBITUARY_SECONDS = 0.7  # for rank 0 to say which rank died
_OBITUARY = "headway/exchange/ended"

Tune = Callable[[Answer], Answer]
"""Adds to the answer what rank 0 alone decides."""


class Alone:
    """One rank, which is its own coordinator: the same as `Star`, for a single rank."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def exchange(self, message: Message, tune: Tune) -> Answer:
        """The answer to this rank's message."""
        return tune(self._coordinator.answer([message], time.monotonic()))

    def close(self) -> None:
        """Nothing to give back."""


class Star:
    """Every rank's message to rank 0, and rank 0's answer to every rank, over `torch.distributed`.

    A rank that does not answer for `timeout_seconds` ends the exchange.
    """

    def __init__(self, rank: int, size: int, coordinator: Coordinator, *, timeout_seconds: float) -> None:
        self.rank, self.size = rank, size
        self._coordinator = coordinator
        self._timeout_seconds = timeout_seconds
        # The group's own time-out is for when nothing else helps: rank 0 gives up earlier, and tells the others.
        longest = datetime.timedelta(seconds=2 * timeout_seconds + 60.0)
        self._group: Any = dist.new_group(backend="gloo", timeout=longest)
        # A connection of its own: the main thread may be waiting in the store.
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._store.set_timeout(datetime.timedelta(seconds=_GRACE_SECONDS))
        self.store: Any = dist.PrefixStore(f"headway/watch/{self._group.group_name}", self._store)
        """For the ranks of this star to find one another in."""
        self._key = f"{_OBITUARY}/{self._group.group_name}"
        peers = range(1, size) if rank == 0 else (0,)
        self._incoming = {peer: torch.zeros(_FRAME_BYTES, dtype=torch.uint8) for peer in peers}

    def exchange(self, message: Message, tune: Tune) -> Answer:
        """The answer to this rank's message and those of all others. Raises RankFailedError if rank 0 is gone."""
        if self.rank == 0:
            return self._coordinate(message, tune)
        started = time.monotonic()
        patience_seconds = 2 * self._timeout_seconds + _GRACE_SECONDS
        try:
            if self._send(msgspec.msgpack.encode(message), (0,), patience_seconds):
                raise RuntimeError("no connection")
            return msgspec.msgpack.decode(self._receive(0, patience_seconds), type=Answer)
        except RuntimeError as error:
            silent = time.monotonic() - started > self._timeout_seconds
            raise (self._obituary() or _gone(0, silent, self._timeout_seconds)).error() from error

    def close(self) -> None:
        """Give the process group back."""
        with suppress(ValueError):  # the user has destroyed all groups already
            dist.destroy_process_group(self._group)

    def _coordinate(self, message: Message, tune: Tune) -> Answer:
        messages, ending = self._collect(message)
        if ending is None:
            answer = tune(self._coordinator.answer([messages[rank] for rank in range(self.size)], time.monotonic()))
        else:
            answer = self._farewell(ending)
        failed = self._send(msgspec.msgpack.encode(answer), [peer for peer in messages if peer], self._timeout_seconds)
        silent = next((peer for peer, is_silent in failed.items() if is_silent), None)
        if ending is None and silent is not None:
            return self._farewell(_gone(silent, True, self._timeout_seconds))
        return answer  # one that died after it had sent its message: the next cycle tells which rank it was

    def _collect(self, message: Message) -> tuple[dict[int, Message], Ending | None]:
        """The messages that came, by rank, and why it ends if not all did."""
        messages, lost, ending = {0: message}, [], None
        works: dict[int, Any] = {}
        for peer, frame in self._incoming.items():
            with suppress(RuntimeError):  # its connection is gone already
                works[peer] = dist.irecv(frame, peer, group=self._group)
        until = time.monotonic() + self._timeout_seconds
        for peer in self._incoming:
            left = max(until - time.monotonic(), 0.001)
            try:
                if peer not in works:
                    raise RuntimeError("no connection")
                messages[peer] = msgspec.msgpack.decode(self._received(peer, works[peer], left), type=Message)
            except RuntimeError:
                if time.monotonic() >= until - _ROUNDING_SECONDS and not lost:
                    return messages, _gone(peer, True, self._timeout_seconds)  # gloo has closed all connections now
                lost.append(peer)
                ending = _gone(peer, False, 0.0) if len(lost) == 1 else Ending("lost", f"ranks {_list(lost)} died")
                until = min(until, time.monotonic() + _GRACE_SECONDS)
        return messages, ending

    def _farewell(self, ending: Ending) -> Answer:
        """The last answer. Survivors whose connection to rank 0 is gone read it in the store."""
        with suppress(RuntimeError):  # the store may have been with the rank that is gone
            self._store.set(self._key, msgspec.msgpack.encode(ending))
        return Answer(vector=b"", ending=ending)

    def _send(self, data: bytes, peers: Sequence[int], seconds: float) -> dict[int, bool]:
        """Send to each of `peers`; those for which it failed, and whether it was for silence."""
        frame = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
        whole = torch.frombuffer(bytearray(len(data).to_bytes(8, "little") + data), dtype=torch.uint8)
        first, rest = whole[:_FRAME_BYTES], whole[_FRAME_BYTES:]
        frame[: len(first)] = first
        parts = [frame, rest] if len(rest) else [frame]
        works: list[tuple[int, Any]] = []
        failed: dict[int, bool] = {}
        for peer in peers:
            try:
                works += [(peer, dist.isend(part, peer, group=self._group)) for part in parts]
            except RuntimeError:
                failed[peer] = False
        until = time.monotonic() + seconds
        for peer, work in works:
            try:
                # Gloo sends when the other side says that it receives, so a rank that does nothing is noticed here too.
                work.wait(datetime.timedelta(seconds=max(until - time.monotonic(), 0.001)))
            except RuntimeError:
                # Once gloo has closed all connections for one silent rank, the others fail at once.
                failed.setdefault(peer, time.monotonic() >= until - _ROUNDING_SECONDS and not any(failed.values()))
        return failed

    def _receive(self, peer: int, seconds: float) -> bytes:
        return self._received(peer, dist.irecv(self._incoming[peer], peer, group=self._group), seconds)

    def _received(self, peer: int, work: Any, seconds: float) -> bytes:
        work.wait(datetime.timedelta(seconds=seconds))
        frame = self._incoming[peer].numpy().tobytes()
        length = int.from_bytes(frame[:8], "little")
        if length > _LONGEST_BYTES:
            raise RankFailedError(f"rank {peer} announced a message of {length} bytes")
        data = frame[8 : 8 + length]
        if len(data) == length:
            return data
        rest = torch.empty(length - len(data), dtype=torch.uint8)
        work = dist.irecv(rest, peer, group=self._group)
        assert work is not None
        work.wait(datetime.timedelta(seconds=seconds))
        return data + rest.numpy().tobytes()

    def _obituary(self) -> Ending | None:
        """What rank 0 has written down about the end, if it comes in time."""
        until = time.monotonic() + _OBITUARY_SECONDS
        while time.monotonic() < until:
            try:
                if self._store.check([self._key]):
                    return msgspec.msgpack.decode(self._store.get(self._key), type=Ending)
            except RuntimeError:
                return None  # the store was rank 0's
            time.sleep(0.02)
        return None


def died(rank: int) -> RankFailedError:
    """What a survivor raises."""
    error = _gone(rank, False, 0.0).error()
    assert isinstance(error, RankFailedError)
    return error


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _gone(rank: int, silent: bool, seconds: float) -> Ending:
    if silent:
        return Ending("lost", f"rank {rank} has not answered for {seconds:g} s", "look at what that rank does")
    return Ending("lost", f"rank {rank} died", "its own output says why")
