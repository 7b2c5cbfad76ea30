"""How ranks agree on what to exchange next, though each gets its tensors ready at its own time and in its own order.

Horovod's coordination (Sergeev and Del Balso 2018; `controller.cc`). A collective works only if all ranks start the
same one. Gradients get ready in an order that differs from rank to rank, so the ranks go through *cycles*. In each,
every rank's `Negotiator` says in a `Message` what it has got ready, the one `Coordinator` (rank 0's) gives one `Answer`
to all, and each negotiator makes of it the same batches in the same order:

- A tensor that was agreed on before has a bit in the vectors that are combined by AND (`collective.fusion`). A step
  that repeats the one before it needs nothing else.
- A tensor that is new, or has changed its shape or dtype, is told in full. The coordinator waits until all ranks of the
  process set have told it, sees whether they fit together, and answers with what to do, or with what does not fit.
- A tensor that some ranks wait for longer than a time-out is a *stall*: the answer names it and the ranks that are
  missing, first as a warning, later as the end of the run.
- A rank that has run out of data *joins*: it takes part with zeros until all have joined.

Nothing here has a clock or a socket: time comes in as `now`, in seconds, and messages are values. So the tests play
thousands of orders and delays, and `exchange.controller` carries the very same code out on real processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Literal

import msgspec

from headway.collective.fusion import CACHE_CAPACITY, THRESHOLD_BYTES, Request, ResponseCache, fuse
from headway.errors import HeadwayError, InputError, RankFailedError, StalledError

__all__ = [
    "Answer",
    "Coordinator",
    "Ending",
    "Message",
    "Negotiator",
    "Operation",
    "Outcome",
    "Response",
    "Stall",
    "Submission",
    "disagreement",
]

Operation = Literal[
    "all_reduce",
    "all_gather",
    "broadcast",
    "all_to_all",
    "reduce_scatter",
    "barrier",
    "join",
    "add_process_set",
    "remove_process_set",
]

_UNEVEN = ("all_gather", "all_to_all")  # whose first dimension may differ from rank to rank
_SETTING = ("add_process_set", "remove_process_set")


class Submission(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A rank has the tensor `name` ready and wants it exchanged.

    `element_bytes` is the size of an element of `dtype`; `device` is "cpu" or "cuda". `reduction` is sum, average, min,
    max, product or adasum, with factors before and after it; `root` is the rank that a broadcast comes from. Tensors
    with the same `group`, of which there are `group_size`, are exchanged together or not at all. Those of a higher
    `priority` go first. `splits` says how many rows go to each rank in all_to_all. For add_process_set, `splits` are
    the ranks. `waited_seconds`: how long ago it got ready.
    """

    name: str
    operation: Operation
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    element_bytes: int = 4
    device: str = "cpu"
    reduction: str = ""
    root: int = -1
    process_set: int = 0
    prescale: float = 1.0
    postscale: float = 1.0
    group: str = ""
    group_size: int = 1
    priority: int = 0
    splits: tuple[int, ...] = ()
    waited_seconds: float = 0.0

    @property
    def key(self) -> str:
        """Names are of one process set: the same name may be in use in another one."""
        return f"{self.process_set}/{self.name}"

    def request(self) -> Request:
        """This for fusion and its cache."""
        agreed = (self.process_set, self.reduction, self.root, self.prescale, self.postscale, self.group)
        # What may differ from rank to rank must still be the same from step to step for a cached answer to hold.
        detail = f"{agreed}{self.group_size}{self.splits or ''}"
        return Request(
            name=self.key,
            shape=self.shape,
            dtype=self.dtype,
            element_bytes=self.element_bytes,
            device=self.device,
            operation="adasum" if self.reduction == "adasum" else self.operation,
            detail=detail,
        )

    @property
    def allows_zeros(self) -> bool:
        """Whether a rank that has joined can take part without a tensor of its own."""
        if self.operation in ("all_reduce", "reduce_scatter"):
            return self.reduction in ("sum", "average")
        return self.operation in ("all_gather", "broadcast", "barrier")


class Response(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The ranks are to exchange this tensor, or to raise `error`.

    `submission` is that of the lowest rank that gave one. `sizes`: for all_gather the rows that each rank of the
    process set has; for all_to_all the rows that each sends to each, by sender. `value`: the new process set's number,
    or for join the rank that joined last. `is_cacheable`: whether it gets a bit.
    """

    submission: Submission
    sizes: tuple[int, ...] = ()
    value: int = 0
    error: str = ""
    is_cacheable: bool = True


class Stall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`ready` ranks have waited `seconds` for the `missing` ones to submit the tensor `name`."""

    name: str
    ready: tuple[int, ...]
    missing: tuple[int, ...]
    seconds: float

    def __str__(self) -> str:
        if not self.missing:
            return f"tensor {self.name!r}: waits for the others of its group since {self.seconds:.0f} s"
        return (
            f"tensor {self.name!r}: {_ranks(self.missing)} did not submit it, "
            f"{_ranks(self.ready)} waited {self.seconds:.0f} s"
        )


class Ending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why nothing can be exchanged any more: every rank raises it."""

    kind: Literal["stalled", "lost"]
    message: str
    remedy: str = ""

    def error(self) -> HeadwayError:
        """The exception that a rank raises: StalledError or RankFailedError."""
        return (StalledError if self.kind == "stalled" else RankFailedError)(self.message, remedy=self.remedy)


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a rank tells the coordinator in a cycle. `vector` is that of `ResponseCache.vector`, little-endian.

    `failure`: an exchange did not succeed on this rank, and why.
    """

    vector: bytes
    submissions: tuple[Submission, ...] = ()
    joined: bool = False
    failure: str = ""


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the coordinator tells every rank in a cycle.

    `vector` is the AND of all; `stopped` are ranks that shut down; `threshold_bytes` and `cycle_seconds`, where they
    are not negative, are to be used from now on.
    """

    vector: bytes
    responses: tuple[Response, ...] = ()
    stalls: tuple[Stall, ...] = ()
    stopped: tuple[int, ...] = ()
    ending: Ending | None = None
    threshold_bytes: float = -1.0
    cycle_seconds: float = -1.0


class Outcome(msgspec.Struct, frozen=True):
    """What a rank has to do now: carry out `batches` in this order, and raise `errors` where their tensors are awaited.

    The tensors of a batch are exchanged as one. A rank that is not of the process set has nothing to do for it; one
    that has joined takes part with zeros.
    """

    batches: tuple[tuple[Response, ...], ...] = ()
    errors: tuple[Response, ...] = ()
    stalls: tuple[Stall, ...] = ()
    stopped: tuple[int, ...] = ()
    ending: Ending | None = None


class _Waiting:
    """A submission that was not answered yet. `position`: its bit when the cache was at `version`."""

    __slots__ = ("position", "request", "since", "submission", "told", "version")

    def __init__(self, submission: Submission, since: float) -> None:
        self.submission, self.request, self.since = submission, submission.request(), since
        self.told = False
        self.version = -1
        self.position: int | None = None


class Negotiator:
    """One rank's side. `submit`, `join` and `stop` at any time; in each cycle first `message`, then `take`.

    `capacity` (tensors) of the cache must be the same on all ranks. `threshold_bytes` bounds a fused batch. A tensor
    that has a bit and waits longer than `stall_seconds` is told in full, so that the coordinator sees who is missing.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        capacity: int = CACHE_CAPACITY,
        threshold_bytes: float = THRESHOLD_BYTES,
        stall_seconds: float = 60.0,
    ) -> None:
        self.rank, self.size = rank, size
        self.threshold_bytes, self.stall_seconds = threshold_bytes, stall_seconds
        self.sets: dict[int, tuple[int, ...]] = {0: tuple(range(size))}
        self.ended: HeadwayError | None = None
        self._cache = ResponseCache(capacity)
        self._answers: dict[str, Response] = {}  # of what is cached
        self._requests: dict[str, Request] = {}  # of what is cached, as this rank made it
        self._waiting: dict[str, _Waiting] = {}
        self._joining = self._joined = self._stopping = False
        self._version = 0  # of the cache
        self._neutral: tuple[tuple[int, bool], list[int], list[int]] = ((-1, False), [], [])

    @property
    def is_idle(self) -> bool:
        """Whether this rank waits for nothing."""
        return not (self._waiting or self._joining or self._stopping)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Names of the tensors that were submitted and not answered."""
        return tuple(waiting.submission.name for waiting in self._waiting.values())

    def submit(self, submissions: Sequence[Submission], now: float) -> None:
        """These tensors are ready, all at once.

        Raises InputError for a name that is still being exchanged or a process set without this rank, and what ended
        the negotiation, if something did.
        """
        if self.ended is not None:
            raise self.ended
        names = set()
        for submission in submissions:
            place = f"{submission.operation} {submission.name!r}"
            if submission.key in self._waiting or submission.key in names:
                raise InputError(
                    "a tensor of this name is still being exchanged",
                    place=place,
                    remedy="synchronize the first one before, or give each its own name",
                )
            if self.rank not in self.sets.get(submission.process_set, ()):
                ranks = self.sets.get(submission.process_set)
                raise InputError(
                    f"rank {self.rank} is not in process set {submission.process_set}, "
                    + ("which does not exist" if ranks is None else f"which has {_ranks(ranks)}"),
                    place=place,
                    remedy="call it only on ranks that are included in the process set",
                )
            names.add(submission.key)
        for submission in submissions:
            self._waiting[submission.key] = _Waiting(submission, now)

    def join(self) -> None:
        """This rank has run out of data: zeros from now on, until all have joined (a `join` response)."""
        if self.ended is not None:
            raise self.ended
        self._joining = True

    def stop(self) -> None:
        """This rank leaves; the next cycle is the last one, for everybody."""
        self._stopping = True

    def message(self, now: float, failure: str = "") -> Message:
        """What this rank has to tell in this cycle."""
        # What was submitted before join() must be through before the rank counts as joined.
        self._joined = self._joining and not self._waiting
        hits, invalid, told = [], [], []
        for waiting in self._waiting.values():
            if waiting.told:
                continue
            if waiting.version != self._version:
                waiting.position, waiting.version = self._cache.position(waiting.request), self._version
            if waiting.position is not None:
                is_late = 0 < self.stall_seconds < now - waiting.since
                (invalid if is_late else hits).append(waiting.position)
                continue
            stale = self._cache.stale(waiting.request)
            if stale is not None:
                invalid.append(stale)
            waiting.told = True
            told.append(msgspec.structs.replace(waiting.submission, waited_seconds=now - waiting.since))
        ready_anyway, impossible = self._without_me()
        vector = self._cache.vector(
            hits + ready_anyway, invalid=invalid + impossible, uncached=bool(told), stopping=self._stopping
        )
        return Message(vector=_pack(vector), submissions=tuple(told), joined=self._joined, failure=failure)

    def take(self, answer: Answer, now: float) -> Outcome:
        """What the coordinator's answer means for this rank. All ranks get the same batches in the same order."""
        del now  # an answer is the same whenever it comes
        if answer.threshold_bytes >= 0:
            self.threshold_bytes = answer.threshold_bytes
        if answer.ending is not None:
            self.ended = answer.ending.error()
            return Outcome(stalls=answer.stalls, ending=answer.ending)
        agreement = self._cache.read(int.from_bytes(answer.vector, "little"))
        ready = self._agreed(agreement.hits)
        self._forget(self._cache.request(position).name for position in agreement.invalid)
        errors = []
        for response in answer.responses:
            if response.error:
                errors.append(response)
                self._waiting.pop(response.submission.key, None)
                continue
            ready.append(response)
            self._settle(response)
        self._keep(answer.responses)
        for response in ready:
            self._waiting.pop(response.submission.key, None)
        if answer.stopped:
            names = f", and {', '.join(map(repr, self.waiting[:3]))} was not exchanged" if self.waiting else ""
            self.ended = RankFailedError(
                f"{_ranks(answer.stopped)} shut down{names}", remedy="let all ranks exchange the same tensors"
            )
        return Outcome(batches=self._fused(ready), errors=tuple(errors), stalls=answer.stalls, stopped=answer.stopped)

    def _without_me(self) -> tuple[list[int], list[int]]:
        """(bits that this rank sets without a tensor, bits that cannot hold while it is joined)."""
        state = (self._version, self._joined)
        if self._neutral[0] != state:
            ready, impossible = [], []
            for key, response in self._answers.items():
                submission = response.submission
                position = self._cache.position(self._requests[key])
                assert position is not None
                if self.rank not in self.sets[submission.process_set]:
                    ready.append(position)
                elif self._joined and submission.operation == "all_reduce" and submission.allows_zeros:
                    # In a smaller set all members may have joined, and only the coordinator could tell.
                    (impossible if submission.process_set else ready).append(position)
                elif self._joined:
                    impossible.append(position)
            self._neutral = (state, ready, impossible)
        return self._neutral[1], self._neutral[2]

    def _agreed(self, hits: Iterable[int]) -> list[Response]:
        """The cached responses that are ready on all ranks, groups only when they are whole."""
        found = []
        for position in hits:
            found.append((position, self._answers[self._cache.request(position).name]))
        members: dict[str, int] = {}
        for _, response in found:
            members[_group(response.submission)] = members.get(_group(response.submission), 0) + 1
        ready = []
        for position, response in found:
            submission = response.submission
            if not submission.group or members[_group(submission)] == submission.group_size:
                self._cache.touch(position)
                ready.append(response)
        return ready

    def _settle(self, response: Response) -> None:
        """Responses that change who takes part."""
        if response.submission.operation == "join":
            self._joining = self._joined = False
        elif response.submission.operation == "add_process_set":
            self.sets[response.value] = response.submission.splits
        elif response.submission.operation == "remove_process_set":
            gone = response.value
            self.sets.pop(gone, None)
            self._forget([key for key, answer in self._answers.items() if answer.submission.process_set == gone])

    def _keep(self, responses: Iterable[Response]) -> None:
        """Give bits to what was agreed on; the same ones on every rank."""
        changed = False
        for response in responses:
            submission = response.submission
            if response.error or not response.is_cacheable or submission.group_size > self._cache.capacity:
                continue
            waiting = self._waiting.get(submission.key)
            # Its own request: in all_gather the first dimension is each rank's own, and may change on one rank alone.
            request = waiting.request if waiting is not None else submission.request()
            if self._cache.put(request) >= 0:
                self._answers[submission.key], self._requests[submission.key] = response, request
                changed = True
        if not changed:
            return
        self._version += 1
        left = [key for key in self._answers if key not in self._cache]  # the least recently used made room
        groups = {_group(self._answers[key].submission) for key in left if self._answers[key].submission.group}
        for key in left:
            del self._answers[key], self._requests[key]
        self._forget([key for key, answer in self._answers.items() if _group(answer.submission) in groups])

    def _forget(self, keys: Iterable[str]) -> None:
        """Take bits away, from whole groups: one half told in full and the other half by bits would never meet."""
        gone = set(keys)
        groups = {_group(self._answers[key].submission) for key in gone if self._answers[key].submission.group}
        gone |= {key for key, answer in self._answers.items() if _group(answer.submission) in groups}
        for key in gone:
            position = self._cache.position(self._requests[key])
            assert position is not None
            self._cache.forget(position)
            del self._answers[key], self._requests[key]
        self._version += bool(gone)

    def _fused(self, ready: list[Response]) -> tuple[tuple[Response, ...], ...]:
        ready.sort(key=lambda response: -response.submission.priority)  # stable: else in the order of arrival
        by_key = {response.submission.key: response for response in ready}
        batches = fuse([response.submission.request() for response in ready], self.threshold_bytes)
        return tuple(tuple(by_key[name] for name in batch.names) for batch in batches)


class _Entry:
    """What ranks have told of one tensor, the first of them at `since`."""

    __slots__ = ("since", "submissions", "warned")

    def __init__(self, since: float) -> None:
        self.submissions: dict[int, Submission] = {}
        self.since = since
        self.warned: float | None = None


class Coordinator:
    """The side that collects: one for all ranks, on rank 0. Call `answer` with every rank's message of a cycle.

    After `stall_seconds` a tensor that some ranks wait for is reported, and again each time as long has passed; after
    `stall_error_seconds` it ends the run. 0 turns either off.
    """

    def __init__(
        self,
        size: int,
        *,
        capacity: int = CACHE_CAPACITY,
        stall_seconds: float = 60.0,
        stall_error_seconds: float = 0.0,
    ) -> None:
        self.size = size
        self.stall_seconds, self.stall_error_seconds = stall_seconds, stall_error_seconds
        self.sets: dict[int, tuple[int, ...]] = {0: tuple(range(size))}
        self._hit_bits = ((1 << capacity) - 1) << 2
        self._table: dict[str, _Entry] = {}  # in the order of arrival
        self._joined: list[int] = []  # in the order of joining
        self._next_set = 1

    def answer(self, messages: Sequence[Message], now: float) -> Answer:
        """The answer for all ranks; `messages[r]` is rank r's."""
        vectors = [int.from_bytes(message.vector, "little") for message in messages]
        vector = reduce(int.__and__, vectors)
        failed = {rank: message.failure for rank, message in enumerate(messages) if message.failure}
        if failed:
            text = "; ".join(f"rank {rank}: {failure}" for rank, failure in failed.items())
            return Answer(vector=_pack(vector), ending=Ending("lost", f"an exchange failed on {text}"))
        for rank, message in enumerate(messages):
            if message.joined and rank not in self._joined:
                self._joined.append(rank)
            for submission in message.submissions:
                entry = self._table.setdefault(submission.key, _Entry(now))
                entry.submissions[rank] = submission
                entry.since = min(entry.since, now - submission.waited_seconds)
        responses = self._ready()
        if len(self._joined) == self.size:
            # All have joined, and nobody waits for anything: bits that are set only mean "I don't mind".
            vector &= ~self._hit_bits
            join = Submission(name="headway.join", operation="join")
            responses.append(Response(submission=join, value=self._joined[-1], is_cacheable=False))
            self._joined = []
        stalls, ending = self._stalls(now)
        stopped = tuple(rank for rank, mine in enumerate(vectors) if not mine & 1)
        return Answer(vector=_pack(vector), responses=tuple(responses), stalls=stalls, stopped=stopped, ending=ending)

    def _ready(self) -> list[Response]:
        """Responses for what all ranks of its process set have told or joined; whole groups at a time."""
        found: dict[str, Response] = {}
        for key, entry in self._table.items():
            first = entry.submissions[min(entry.submissions)]
            ranks = self.sets.get(first.process_set)
            if ranks is None:
                text = f"process set {first.process_set} has been removed"
                found[key] = Response(submission=first, error=f"tensor {first.name!r}: {text}", is_cacheable=False)
            elif all(rank in entry.submissions or rank in self._joined for rank in ranks):
                found[key] = self._response(entry.submissions, ranks)
        responses: list[Response] = []
        for key, response in self._whole_groups(found):
            del self._table[key]
            responses.append(self._apply(response))
        return responses

    def _whole_groups(self, found: Mapping[str, Response]) -> Iterable[tuple[str, Response]]:
        members: dict[str, dict[str, Response]] = {}
        for key, response in found.items():
            if response.submission.group:
                members.setdefault(_group(response.submission), {})[key] = response
        for key, response in found.items():
            submission = response.submission
            if not submission.group:
                yield key, response
                continue
            group = members.pop(_group(submission), None)
            if group is None:
                continue  # given out with its first member
            error = next((member.error for member in group.values() if member.error), "")
            if error:
                for name, member in group.items():
                    text = member.error or f"tensor {member.submission.name!r}: another of its group failed: {error}"
                    yield name, Response(submission=member.submission, error=text, is_cacheable=False)
            elif len(group) == submission.group_size:
                yield from group.items()

    def _response(self, submissions: Mapping[int, Submission], ranks: Sequence[int]) -> Response:
        first = submissions[min(submissions)]
        joined = [rank for rank in ranks if rank not in submissions]
        error = disagreement(submissions)
        if not error and joined and not (first.allows_zeros and first.root not in joined):
            what = f"{first.operation} ({first.reduction})" if first.reduction else first.operation
            error = f"tensor {first.name!r}: {_ranks(joined)} joined, and {what} does not go without a tensor of theirs"
        if error:
            return Response(submission=first, error=error, is_cacheable=False)
        sizes: tuple[int, ...] = ()
        if first.operation == "all_gather":
            sizes = tuple(submissions[rank].shape[0] if rank in submissions else 0 for rank in ranks)
        elif first.operation == "all_to_all":
            sizes = tuple(rows for rank in ranks for rows in submissions[rank].splits)
        return Response(submission=first, sizes=sizes, is_cacheable=not joined and first.operation not in _SETTING)

    def _apply(self, response: Response) -> Response:
        """Responses that change the process sets."""
        submission = response.submission
        if response.error or submission.operation not in _SETTING:
            return response
        if submission.operation == "remove_process_set":
            self.sets.pop(submission.root, None)
            return msgspec.structs.replace(response, value=submission.root)
        number, self._next_set = self._next_set, self._next_set + 1
        self.sets[number] = submission.splits
        return msgspec.structs.replace(response, value=number)

    def _stalls(self, now: float) -> tuple[tuple[Stall, ...], Ending | None]:
        stalls, ending = [], None
        for entry in self._table.values():
            age = now - entry.since
            late = 0 < self.stall_error_seconds <= age
            quiet_since = entry.since if entry.warned is None else entry.warned
            if not late and not 0 < self.stall_seconds <= now - quiet_since:
                continue
            entry.warned = now
            first = entry.submissions[min(entry.submissions)]
            missing = tuple(
                rank
                for rank in self.sets.get(first.process_set, ())
                if rank not in entry.submissions and rank not in self._joined
            )
            stall = Stall(name=first.name, ready=tuple(sorted(entry.submissions)), missing=missing, seconds=age)
            stalls.append(stall)
            if late and ending is None:
                remedy = "look at what that rank does, or raise HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"
                ending = Ending("stalled", str(stall), remedy)
        return tuple(stalls), ending


def disagreement(submissions: Mapping[int, Submission]) -> str:
    """What does not fit together in what the ranks submitted of one tensor; empty if all fits.

    The text names the tensor, the ranks, and what each of them submitted.
    """
    kind = submissions[min(submissions)].operation
    aspects: list[tuple[str, Callable[[Submission], object]]] = [
        ("operation", lambda s: s.operation),
        ("dtype", lambda s: s.dtype),
        ("device", lambda s: s.device),
        ("reduction", lambda s: s.reduction),
        ("root", lambda s: s.root),
        ("number of dimensions", lambda s: len(s.shape)),
        ("shape", (lambda s: ("any", *s.shape[1:])) if kind in _UNEVEN else lambda s: s.shape),
        ("factors", lambda s: (s.prescale, s.postscale)),
        ("group", lambda s: (s.group, s.group_size) if s.group else "none"),
    ]
    if kind != "all_to_all":
        aspects.append(("ranks", lambda s: s.splits))
    for name, aspect in aspects:
        given: dict[object, list[int]] = {}
        for rank in sorted(submissions):
            given.setdefault(aspect(submissions[rank]), []).append(rank)
        if len(given) > 1:
            shape = name == "shape"
            what = "; ".join(
                f"{_ranks(ranks)}: {submissions[ranks[0]].shape if shape else value}" for value, ranks in given.items()
            )
            tensor = submissions[min(submissions)].name
            return f"tensor {tensor!r}: the ranks submitted it with a different {name}: {what}"
    return ""


def _group(submission: Submission) -> str:
    return f"{submission.process_set}/{submission.group}" if submission.group else ""


def _pack(vector: int) -> bytes:
    return vector.to_bytes(math.ceil(vector.bit_length() / 8), "little")


def _ranks(ranks: Iterable[int]) -> str:
    listed = list(ranks)
    text = ", ".join(map(str, listed[:16])) + (f" and {len(listed) - 16} more" if len(listed) > 16 else "")
    return f"rank {text}" if len(listed) == 1 else f"ranks {text}"
