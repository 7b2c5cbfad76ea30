"""In-network aggregation, a worker's side: a pure state machine that joins, contributes and gathers the results.

It has no clock and no socket: see `collective.aggregator` for the protocol, `exchange.aggregation` for what runs both
on UDP. Three things may be going on: joining, one request (Reset, SetH, FBcast, Halt or Leave), one round of segments.
Whatever is lost is noticed here, since only workers keep time: requests are repeated, and a segment without a result is
asked for with Help. But most often nothing is lost, only some worker is late, and asking for a whole window again and
again would load a machine that is late because it is loaded. So after a while of patience the first segment is asked
for, less and less often, and another one only if something that was sent after it has been answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from headway.collective.packets import Kind, Operation, Packet, Status, decode
from headway.errors import FieldError, MismatchError, RankFailedError, StalledError

__all__ = ["Progress", "Worker"]

_MOST_PATIENCE_SECONDS = 1.0


@dataclass(slots=True)
class _Waiting:
    """A segment that was sent and has no result yet."""

    since_seconds: float  # when it was sent, or last asked for
    due_seconds: float  # when to ask for it
    length: int
    tries: int = 0


@dataclass
class _Request:
    kind: Kind
    number: int
    count: int = 0
    segment: int = 0
    due_seconds: float = -math.inf
    since_seconds: float | None = None


class Progress(NamedTuple):
    """How far a round has come: segments from `start` to `round_end`, of which those below `sent` were sent.

    `waiting`: when each of those without a result was sent; `low` is the first of them, or `sent`. `received`: how many
    have a result. `due_seconds`: when to ask for results; `answered_seconds`: when the latest of those was sent that
    have been answered.
    """

    start: int
    round_end: int
    low: int
    sent: int
    waiting: Mapping[int, float]
    received: int
    due_seconds: float
    answered_seconds: float


class Worker:
    """One worker's side of a job with `workers` founders. `nonce`: 8 bytes that no other worker has.

    Time is given in seconds, from any origin. `poll` says what to send now, `wake_seconds` when to call it again if
    nothing comes in before. A round is begun with `begin` and over when `is_done`; then `payloads`, `counts`, `partial`
    and `overflow` say what came out of it. `patience_seconds` is the least time before a lost packet is asked for;
    `timeout_seconds` without any progress makes StalledError.
    """

    def __init__(
        self,
        job: int,
        nonce: bytes,
        *,
        workers: int,
        token: bytes = b"",
        patience_seconds: float = 0.02,
        timeout_seconds: float = 30.0,
        window: int | None = None,
    ) -> None:
        if len(nonce) != 8:
            raise FieldError("must have 8 bytes", place="worker: nonce", remedy="draw it at random")
        if not 1 <= workers < 1 << 16:
            raise FieldError(f"{workers}", place="worker: workers", remedy="1 to 65535 found a job")
        if patience_seconds <= 0 or timeout_seconds <= 0 or (window is not None and window < 1):
            raise FieldError("must be above 0", place="worker: patience_seconds, timeout_seconds, window")
        self.job = job
        self.nonce = nonce
        self.workers = workers  # founders, as the aggregator has them once it has taken this worker in
        self.token = token
        self.patience_seconds = patience_seconds
        self.timeout_seconds = timeout_seconds
        self.window = window or 0  # 0: as many segments as the aggregator has slots
        self.number: int | None = None
        self.epoch = 0
        self.halted = False
        self.next_segment = 0
        self.asked = 0  # Help packets sent
        self.resent = 0  # contributions sent again
        self.payloads: list[bytes | None] = []
        self.counts: list[int] = []
        self.partial: list[bool] = []
        self.overflow = False
        self._welcome = False
        self._is_leaving = False
        self._join_at = -math.inf
        self._request: _Request | None = None
        self._requests = 0
        self._was_forced = True
        self._parts: Sequence[bytes | memoryview] = ()
        self._clipped: Sequence[bool] | None = None
        self._deliver: Callable[[int, Packet], None] | None = None
        self._operation = Operation.SUM_INT32
        self._length = 0  # segments of this round
        self._start = 0  # the first of them
        self._round_end = 0
        self._sent = 0  # the first that was not sent
        self._low = 0  # the first without a result
        self._received = 0
        self._waiting: dict[int, _Waiting] = {}  # in the order of segments
        self._again: dict[int, None] = {}
        self._due_seconds = math.inf  # when the first of the waiting is to be asked for, or before
        self._news_at = -math.inf  # when to ask how it stands, while halted
        self._answered_seconds = -math.inf  # when the latest was sent of what has been answered
        self._heard_seconds: float | None = None  # of progress
        self._missing = 0  # bits of the workers that the aggregator last said it waits for

    @property
    def _place(self) -> str:
        return f"aggregation, job {self.job}, worker {self.number if self.number is not None else '?'}"

    # Membership and requests

    @property
    def is_member(self) -> bool:
        """Whether the aggregator has taken this worker in, and the job has all its founders."""
        return self._welcome

    @property
    def is_settled(self) -> bool:
        """Whether no request is under way."""
        return self._request is None

    @property
    def was_forced(self) -> bool:
        """Whether the last `force` found its segment waiting."""
        return self._was_forced

    def leave(self) -> None:
        """Ask to be let go. Settled when the aggregator no longer counts on this worker."""
        self._request = None  # whatever else was asked for
        self._is_leaving = True
        self._ask(Kind.LEAVE)

    def reset(self) -> None:
        """Ask for the job's slots to be cleared: another epoch begins for all its workers, and rounds are dropped."""
        self._ask(Kind.RESET)

    def halt(self) -> None:
        """Ask for the job to be suspended on all workers, until a Reset."""
        self._ask(Kind.HALT)

    def set_threshold(self, contributions: int) -> None:
        """Ask for results to be made of so many contributions (0: of all that take part)."""
        if not 0 <= contributions < 1 << 16:
            raise FieldError(f"{contributions}", place="threshold", remedy="0 (all) to 65535")
        self._ask(Kind.SETH, count=contributions)

    def force(self, segment: int) -> None:
        """Ask for a segment's sum to be sent as it is."""
        if not 0 <= segment < 1 << 64:
            raise FieldError(f"{segment}", place="segment", remedy="0 or more")
        self._ask(Kind.FBCAST, segment=segment)

    def _ask(self, kind: Kind, *, count: int = 0, segment: int = 0) -> None:
        if self._request is not None:
            raise FieldError(f"{self._request.kind.name} is under way", place=self._place, remedy="wait for it")
        self._requests += 1
        self._request = _Request(kind, self._requests, count, segment)

    # Rounds

    def begin(
        self,
        payloads: Sequence[bytes | memoryview],
        operation: Operation,
        *,
        deliver: Callable[[int, Packet], None] | None = None,
        clipped: Sequence[bool] | None = None,
        following: int = 0,
    ) -> None:
        """Begin a round: one payload for each segment, taken from the sequence when it is sent, and each time it is.

        A result is given to `deliver(position, packet)`, whose payload is good only until it returns, or else kept in
        `payloads`; its position's payload is not asked for any more. `clipped` says for each segment whether its
        values had to be. The `following` segments, of later rounds, belong to this one: who joins meanwhile will take
        part only after them. Raises FieldError while another round is going on.
        """
        if not self.is_done:
            raise FieldError("a round is going on", place=self._place, remedy="wait for it, or reset the job")
        self._parts, self._operation = payloads, operation
        self._deliver, self._clipped = deliver, clipped
        self._length = len(payloads)
        self._start = self._low = self._sent = self.next_segment
        self.next_segment += self._length
        self._round_end = self.next_segment + following
        self._received = self._missing = 0
        self._waiting.clear()
        self._again.clear()
        self._due_seconds = math.inf
        self.payloads = [None] * self._length
        self.counts = [0] * self._length
        self.partial = [False] * self._length
        self.overflow = False
        self._heard_seconds = None

    @property
    def is_done(self) -> bool:
        """Whether no round is going on."""
        return self._received == self._length

    @property
    def has_to_send(self) -> bool:
        """Whether the window has room for a segment that was not sent yet, or one must be sent again."""
        return bool(self._again) or self._sent < min(self.next_segment, self._low + self.window)

    @property
    def is_plain(self) -> bool:
        """Whether a round is going on, and nothing but sending its segments for the first time and taking results."""
        return not (
            self.is_done
            or self.halted
            or self._is_leaving
            or self._again
            or self._request is not None
            or not self._welcome
        )

    def progress(self) -> Progress:
        """How far the round has come: for somebody else who goes on with it, and calls `catch_up` before `poll`."""
        waiting = {segment: one.since_seconds for segment, one in self._waiting.items()}
        return Progress(
            self._start, self._round_end, self._low, self._sent, waiting, self._received, self._due_seconds,
            self._answered_seconds,
        )  # fmt: skip

    def catch_up(
        self, progress: Progress, counts: Any, partial: Any, now_seconds: float, *, overflow: bool = False
    ) -> None:
        """Take over what somebody else has sent and received for this worker while the round was plain.

        `counts` and `partial` are arrays of what came out, by position, 0 where it did not come in elsewhere.
        """
        if progress.received > self._received:
            self._heard_seconds, self._missing = now_seconds, 0
        elif self._heard_seconds is None:
            self._heard_seconds = now_seconds
        self._waiting = {
            segment: self._waiting.get(segment)
            or _Waiting(since, since + self.patience_seconds, len(self._parts[segment - self._start]))
            for segment, since in progress.waiting.items()
        }
        self._sent, self._received = progress.sent, progress.received
        self._low = next(iter(self._waiting), self._sent)
        self._due_seconds, self._answered_seconds = progress.due_seconds, progress.answered_seconds
        self.overflow |= overflow
        if self.is_done:
            self.counts = [theirs or ours for theirs, ours in zip(counts.tolist(), self.counts, strict=True)]
            self.partial = [theirs or ours for theirs, ours in zip(partial.tolist(), self.partial, strict=True)]

    @property
    def wake_seconds(self) -> float:
        """When `poll` has something to do again, if nothing comes in before."""
        request = self._request.due_seconds if self._request is not None else math.inf
        if self._is_leaving:
            return request
        if not self._welcome:
            return min(self._join_at, request)
        if self.halted:
            return min(self._news_at, request)
        return min(self._due_seconds if self._waiting else math.inf, request)

    def poll(self, now_seconds: float) -> list[Packet]:
        """What to send now. Raises StalledError when nothing has come for the time-out."""
        if self._heard_seconds is None:
            self._heard_seconds = now_seconds
        outgoing = self._repeat_request(now_seconds) if self._request is not None else []
        if self._is_leaving:
            return outgoing
        if now_seconds - self._heard_seconds > self.timeout_seconds and not (
            self._welcome and self.is_done and not self.halted
        ):
            raise self._stalled()
        if not self._welcome:
            return outgoing + self._ask_to_join(now_seconds)
        if self.halted:
            return outgoing + self._ask_for_news(now_seconds)
        if self._again:
            outgoing += [self._contribution(segment, now_seconds) for segment in self._again]
            self._again.clear()
        limit = min(self.next_segment, self._low + self.window)
        while self._sent < limit:
            outgoing.append(self._contribution(self._sent, now_seconds))
            self._sent += 1
        if now_seconds >= self._due_seconds:
            outgoing += self._ask_for_results(now_seconds)
        return outgoing

    def _stalled(self) -> StalledError:
        remedy = "see whether the aggregator and all workers are alive"
        if self._welcome and self.halted:
            what = "the job is halted, and nobody answers"
        elif self._welcome:
            late = [str(worker) for worker in range(64) if self._missing >> worker & 1]
            what = f"segment {self._low} has no result" + (f": worker {', '.join(late)} is late" if late else "")
        elif self.number is not None:
            what = "not all workers have joined"
        else:
            what = "nobody has answered a Join"
            remedy = "see whether the aggregator listens there, and takes this token"
        return StalledError(f"{what} after {self.timeout_seconds:g} s", place=self._place, remedy=remedy)

    def _repeat_request(self, now_seconds: float) -> list[Packet]:
        request = self._request
        assert request is not None
        if now_seconds < request.due_seconds:
            return []
        if request.since_seconds is None:
            request.since_seconds = now_seconds
        if now_seconds - request.since_seconds > self.timeout_seconds:
            self._request = None
            raise StalledError(
                f"nobody has answered {request.kind.name} after {self.timeout_seconds:g} s",
                place=self._place, remedy="see whether the aggregator is alive",
            )  # fmt: skip
        request.due_seconds = now_seconds + self.patience_seconds
        payload = self.nonce if request.kind is Kind.LEAVE else b""
        return [self._packet(request.kind, request.segment, request.count, request.number, payload)]

    def _packet(self, kind: Kind, segment: int = 0, count: int = 0, number: int = 0, payload: bytes = b"") -> Packet:
        return Packet(kind, self.job, self.epoch, self.number or 0, segment, number, count, payload=payload)

    def _ask_to_join(self, now_seconds: float) -> list[Packet]:
        if now_seconds < self._join_at:
            return []
        self._join_at = now_seconds + self.patience_seconds
        payload = self.nonce + self.workers.to_bytes(4, "big") + self.token
        return [self._packet(Kind.JOIN, payload=payload)]

    def _ask_for_news(self, now_seconds: float) -> list[Packet]:
        # The Reset that ends a Halt may be lost: a question of an earlier epoch is answered with the present one.
        if now_seconds < self._news_at:
            return []
        self._news_at = now_seconds + 10 * self.patience_seconds
        return [self._packet(Kind.HELP, self._low)]

    def _ask_for_results(self, now_seconds: float) -> list[Packet]:
        outgoing = []
        first = next(iter(self._waiting), None)
        soonest = math.inf
        for segment, waiting in self._waiting.items():
            if segment == first or waiting.since_seconds < self._answered_seconds:
                if now_seconds >= waiting.due_seconds:
                    waiting.tries += 1
                    waiting.since_seconds = now_seconds
                    waiting.due_seconds = now_seconds + self._patience_after(waiting.tries)
                    self.asked += 1
                    outgoing.append(self._packet(Kind.HELP, segment))
                soonest = min(soonest, waiting.due_seconds)
        self._due_seconds = soonest
        return outgoing

    def _patience_after(self, tries: int) -> float:
        return min(self.patience_seconds * 2 ** min(tries, 10), _MOST_PATIENCE_SECONDS)

    def _contribution(self, segment: int, now_seconds: float) -> Packet:
        position = segment - self._start
        payload = self._parts[position]
        known = self._waiting.get(segment)
        due = now_seconds + self._patience_after(known.tries if known is not None else 0)
        if known is None:
            self._waiting[segment] = _Waiting(now_seconds, due, len(payload))
        else:
            known.since_seconds, known.due_seconds = now_seconds, due
            self.resent += 1
        self._due_seconds = min(self._due_seconds, due)
        clipped = self._clipped is not None and bool(self._clipped[position])
        return Packet(
            Kind.DATA, self.job, self.epoch, self.number or 0, segment, self._round_end, 0, self._operation,
            False, clipped, payload,
        )  # fmt: skip

    # What comes in

    def receive(self, data: bytes | memoryview, now_seconds: float) -> bool:
        """Take in a datagram from the aggregator; whether it was one for us.

        Raises StalledError if a result is lost for good, RankFailedError if the aggregator does not know us (any more),
        MismatchError if workers sent contributions of different types or lengths.
        """
        packet = decode(data)
        return packet is not None and self.handle(packet, now_seconds)

    def handle(self, packet: Packet, now_seconds: float) -> bool:
        """The same for a packet that has been decoded; its payload is copied if it is kept."""
        if packet.job != self.job:
            return False
        if packet.kind is Kind.RESULT:
            return self._result(packet, now_seconds)
        if packet.kind is Kind.ACK and len(packet.payload):
            return self._acknowledged(packet, now_seconds)
        if packet.kind is Kind.HALT and packet.epoch == self.epoch and self._welcome:
            self.halted = True
            self._heard_seconds = now_seconds
            return True
        return False

    def _result(self, packet: Packet, now_seconds: float) -> bool:
        waiting = self._waiting.get(packet.segment)
        if waiting is None or packet.epoch != self.epoch or packet.worker != self.number:
            return False
        if packet.operation is not self._operation or len(packet.payload) != waiting.length:
            return False
        del self._waiting[packet.segment]
        # Nor is it to be sent again: what it was may be overwritten by its result.
        self._again.pop(packet.segment, None)
        self._note_answer(waiting)
        self._heard_seconds = now_seconds
        self._missing = 0
        position = packet.segment - self._start
        if self._deliver is None:
            self.payloads[position] = bytes(packet.payload)
        else:
            self._deliver(position, packet)
        self.counts[position] = packet.count
        self.partial[position] = packet.partial
        self.overflow |= packet.overflow
        self._received += 1
        self._low = next(iter(self._waiting), self._sent)
        return True

    def _note_answer(self, waiting: _Waiting) -> None:
        """What was sent before this one, and has no answer, may be lost: it has to be looked at when it is due."""
        before = self._answered_seconds
        if waiting.since_seconds > before:
            self._answered_seconds = waiting.since_seconds
            # Those are meant that were sent since then.
            self._due_seconds = min(self._due_seconds, before + self.patience_seconds)

    def _acknowledged(self, packet: Packet, now_seconds: float) -> bool:
        what, status = packet.payload[0], packet.count
        if what == Kind.JOIN:
            return self._joined(packet, status, now_seconds)
        request = self._request
        if what == Kind.LEAVE:
            if self._is_leaving:
                self._request = None
                self._welcome = False
            return True
        if not self._welcome or packet.worker != self.number or packet.epoch < self.epoch:
            return False
        if packet.epoch > self.epoch:
            self._begin_epoch(packet.epoch)
            if request is not None and request.kind is Kind.RESET:
                self._request = None  # ours, or another's that came first
            return True
        if self.halted:
            self._heard_seconds = now_seconds
        if request is not None and (what, packet.round_end) == (request.kind, request.number):
            self._request = None
            self._was_forced = status == Status.DONE
            return True
        if packet.segment not in self._waiting and not (self.halted and what == Kind.HELP):
            return False
        return self._answered(packet, status, now_seconds)

    def _answered(self, packet: Packet, status: int, now_seconds: float) -> bool:
        """An answer to Help, or to data."""
        if status == Status.RESEND and packet.segment in self._waiting:
            self._again[packet.segment] = None
            self._note_answer(self._waiting[packet.segment])
        elif status == Status.WAITING:
            self._missing = packet.round_end
        elif status == Status.GONE:
            raise StalledError(
                f"the result of segment {packet.segment} is gone: the others went on without this worker",
                place=self._place,
                remedy="raise the threshold, or copy the parameters from another worker and join again",
            )
        elif status == Status.UNKNOWN:
            raise RankFailedError(
                "the aggregator does not know this worker: it was removed, or the aggregator was started anew",
                place=self._place, remedy="join again, all workers with the same parameters",
            )  # fmt: skip
        elif status == Status.MISMATCH:
            odd = [worker for worker in range(64) if packet.round_end >> worker & 1]
            who = f"worker {', '.join(map(str, odd))}" if odd else "a worker"
            raise MismatchError(
                f"{who} sent another length or type to segment {packet.segment} than the worker that was first",
                place=self._place, remedy="reduce the same tensors, with the same options, in the same order",
            )  # fmt: skip
        return True

    def _begin_epoch(self, epoch: int) -> None:
        """After a Reset: whatever was going on is over, and the segments are counted from 0 again."""
        self.epoch = epoch
        self.halted = False
        self._parts, self._length, self._received = (), 0, 0
        self.payloads, self.counts, self.partial = [], [], []
        self._start = self._low = self._sent = self.next_segment = 0
        self._waiting.clear()
        self._again.clear()
        self._due_seconds = math.inf

    def _joined(self, packet: Packet, status: int, now_seconds: float) -> bool:
        if self._welcome or self._is_leaving:
            return True  # said before
        if status == Status.REFUSED:
            raise RankFailedError(
                "the aggregator does not take this worker",
                place=self._place,
                remedy="the aggregator has no room for another job, the job has another number of workers, or this "
                "worker has left or was removed",
            )
        if len(packet.payload) != 5:
            return False
        if self.number is None or status == Status.DONE:
            self._heard_seconds = now_seconds
        self.number = packet.worker
        self.epoch = packet.epoch
        if status == Status.DONE:
            self._welcome = True
            self.workers = int.from_bytes(packet.payload[1:5], "big")
            self.next_segment = self._start = self._low = self._sent = packet.segment
            self.window = min(self.window or packet.round_end, packet.round_end)
        return True
