"""Sending and receiving outside of collectives: any rank to any other, matched by tag, many at a time.

Each send and receive is a `Ticket`. One thread for each rank sends to it in order, one for each rank reads what comes
from it, and only while some receive is waiting for it: what nobody asked for stays in the sockets, so that memory does
not grow, unless its tag lets something behind it pass.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from headway.errors import HeadwayError, MismatchError, RankFailedError, StalledError
from headway.exchange.tcp import Mesh

__all__ = ["Mailbox", "Ticket"]

_SLICE_SECONDS = 0.2


class Ticket:
    """One send or receive on its way: wait for it with `done`, then look at `error`; `source` says who sent."""

    def __init__(
        self, view: np.ndarray, stamp: int, deadline: float, finished: Callable[[Ticket], None] | None
    ) -> None:
        self.view = view
        self.stamp = stamp
        self.deadline = deadline
        self.done = threading.Event()
        self.error: HeadwayError | None = None
        self.source = -1
        self._finished = finished

    def finish(self, error: HeadwayError | None = None) -> None:
        """Mark it as done; called once."""
        self.error = error
        self.done.set()
        if self._finished is not None:
            self._finished(self)


class _Post:
    """A thread that sends to one rank, and what it still has to send."""

    def __init__(self) -> None:
        self.queue: deque[Ticket] = deque()
        self.thread: threading.Thread | None = None


class Mailbox:
    """Tickets for one rank of a `Mesh`. `stamp` is any 64-bit number; a receive takes the first frame with its own.

    Thread-safe. Tickets fail with RankFailedError, with StalledError when `timeout_seconds` have passed, and with
    MismatchError where the sender's length is not the receiver's.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._changed = threading.Condition()
        self._wanted: list[tuple[int | None, Ticket]] = []  # (source, receive) in the order of posting
        self._kept: dict[int, deque[tuple[int, np.ndarray]]] = {}  # source → frames that nobody wanted yet
        self._posts: dict[int, _Post] = {}
        self._readers: dict[int, threading.Thread] = {}
        self._closed = False
        self._names = itertools.count()

    def send(
        self,
        target: int,
        view: np.ndarray,
        stamp: int,
        *,
        finished: Callable[[Ticket], None] | None = None,
    ) -> Ticket:
        """Send the bytes of `view` (uint8, flat); they must not change before the ticket is done."""
        ticket = Ticket(view, stamp, math.inf, finished)
        with self._changed:
            closed = self._closed
            if not closed and target != self._mesh.rank:
                post = self._posts.setdefault(target, _Post())
                post.queue.append(ticket)
                if post.thread is None:
                    post.thread = self._start(self._deliver, target, post)
                self._changed.notify_all()
        if closed:
            ticket.finish(self._gone())
        elif target == self._mesh.rank:
            self._keep(target, stamp, view.copy())
            ticket.finish()
        return ticket

    def receive(
        self,
        source: int | None,
        view: np.ndarray,
        stamp: int,
        *,
        timeout_seconds: float,
        finished: Callable[[Ticket], None] | None = None,
    ) -> Ticket:
        """Fill `view` (uint8, flat) with the next frame of that stamp from rank `source`, or, if None, from any."""
        ticket = Ticket(view, stamp, time.monotonic() + timeout_seconds, finished)
        found: tuple[int, np.ndarray] | None = None
        with self._changed:
            closed = self._closed
            if not closed:
                found = self._take_kept(source, stamp)
                if found is None:
                    self._wanted.append((source, ticket))
                    for peer in range(self._mesh.size) if source is None else (source,):
                        if peer != self._mesh.rank and peer not in self._readers:
                            self._readers[peer] = self._start(self._read, peer)
                    self._changed.notify_all()
        if closed:
            ticket.finish(self._gone())
        elif found is not None:
            self._hand_over(ticket, *found)
        return ticket

    def close(self) -> None:
        """Fail what is still waiting, and end the threads. The mesh must be closed before, so that none is stuck."""
        with self._changed:
            self._closed = True
            waiting = [ticket for _, ticket in self._wanted]
            waiting += [ticket for post in self._posts.values() for ticket in post.queue]
            self._wanted.clear()
            for post in self._posts.values():
                post.queue.clear()
            threads = [*self._readers.values(), *(post.thread for post in self._posts.values() if post.thread)]
            self._changed.notify_all()
        for ticket in waiting:
            ticket.finish(self._gone())
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(5.0)

    def _start(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        name = f"headway-{self._mesh.name}-post-{next(self._names)}"
        thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
        thread.start()
        return thread

    def _gone(self) -> HeadwayError:
        return self._mesh.failure or RankFailedError(
            f"rank {self._mesh.rank} has left the group", place=self._mesh.name
        )

    # Sending

    def _deliver(self, target: int, post: _Post) -> None:
        while True:
            with self._changed:
                while not post.queue and not self._closed:
                    self._changed.wait()
                if not post.queue:
                    return
                ticket = post.queue.popleft()
            try:
                self._mesh.send(target, ticket.view, stamp=ticket.stamp)
            except HeadwayError as error:
                ticket.finish(error)
            else:
                ticket.finish()

    # Receiving

    def _take_kept(self, source: int | None, stamp: int) -> tuple[int, np.ndarray] | None:
        for peer in list(self._kept) if source is None else (source,):
            frames = self._kept.get(peer, ())
            for at, (found, data) in enumerate(frames):
                if found == stamp:
                    del self._kept[peer][at]
                    return peer, data
        return None

    def _take_wanted(self, source: int, stamp: int) -> Ticket | None:
        for at, (wanted, ticket) in enumerate(self._wanted):
            if wanted in (None, source) and ticket.stamp == stamp:
                del self._wanted[at]
                return ticket
        return None

    def _keep(self, source: int, stamp: int, data: np.ndarray) -> None:
        # Somebody may have asked for it while it was read.
        with self._changed:
            ticket = self._take_wanted(source, stamp)
            if ticket is None:
                self._kept.setdefault(source, deque()).append((stamp, data))
        if ticket is not None:
            self._hand_over(ticket, source, data)

    def _hand_over(self, ticket: Ticket, source: int, data: np.ndarray) -> None:
        ticket.source = source
        if data.nbytes != ticket.view.nbytes:
            ticket.finish(self._unequal(source, data.nbytes, ticket))
            return
        ticket.view[:] = data
        ticket.finish()

    def _unequal(self, source: int, length: int, ticket: Ticket) -> MismatchError:
        return MismatchError(
            f"rank {source} sent {length} bytes where rank {self._mesh.rank} expects {ticket.view.nbytes}",
            place=self._mesh.name,
            remedy="receive into a tensor of the size and dtype that was sent",
        )

    def _is_wanted(self, source: int) -> bool:
        return any(wanted in (None, source) for wanted, _ in self._wanted)

    def _read(self, source: int) -> None:
        while True:
            with self._changed:
                while not self._is_wanted(source) and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                soonest = min(ticket.deadline for wanted, ticket in self._wanted if wanted in (None, source))
            try:
                # In slices, because a receive with an earlier deadline may be posted in the meantime.
                patience = min(max(0.0, soonest - time.monotonic()), _SLICE_SECONDS)
                stamp, length = self._mesh.next_frame(source, timeout_seconds=patience)
                with self._changed:
                    if not self._is_wanted(source):
                        continue  # the frame stays in the mesh
                    ticket = self._take_wanted(source, stamp)
                if ticket is not None and ticket.view.nbytes == length:
                    ticket.source = source
                    try:
                        self._mesh.receive(source, ticket.view, stamp=stamp)
                    except HeadwayError as error:
                        ticket.finish(error)
                        raise
                    ticket.finish()
                    continue
                data = np.empty(length, dtype=np.uint8)
                self._mesh.receive(source, data, stamp=stamp)
                if ticket is not None:
                    self._hand_over(ticket, source, data)
                else:
                    self._keep(source, stamp, data)
            except StalledError:
                self._give_up_late(source)
            except HeadwayError as error:
                self._fail(source, error)

    def _give_up_late(self, source: int) -> None:
        now = time.monotonic()
        with self._changed:
            late = [ticket for wanted, ticket in self._wanted if wanted in (None, source) and ticket.deadline <= now]
            self._wanted = [(wanted, ticket) for wanted, ticket in self._wanted if ticket not in late]
        for ticket in late:
            ticket.finish(
                StalledError(
                    f"rank {source} sent nothing that rank {self._mesh.rank} waits for, in time",
                    place=self._mesh.name,
                    remedy="see whether that rank sends with the same tag",
                )
            )

    def _fail(self, source: int, error: HeadwayError) -> None:
        with self._changed:
            # A receive from anyone may still be served by others, unless the mesh itself is broken.
            broken = self._mesh.failure is not None or self._mesh.size == 2
            lost = [ticket for wanted, ticket in self._wanted if wanted == source or (wanted is None and broken)]
            self._wanted = [(wanted, ticket) for wanted, ticket in self._wanted if ticket not in lost]
        for ticket in lost:
            ticket.finish(error)
        if not lost:
            time.sleep(0.05)  # it will fail again, until whoever waits for anyone gives up
