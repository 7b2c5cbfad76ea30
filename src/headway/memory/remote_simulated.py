"""Passive memory nodes in virtual time: verbs cost what a parameter file says, they tear, and clients are killed.

    engine = Engine(seed=1)
    fabric = SimulatedFabric(engine, FabricParameters(), node_bytes=(2**20,))
    client = fabric.client("c0")
    done = client.start(increment(0, 64))            # a process of the engine
    engine.run()

The same processes and the same seed give the same run, kill by kill and word by word.

**Time.** A verb takes its base latency, and its bytes pass the network cards of client and node, each at
`bytes_per_second` in each direction, in the order in which they were posted. Atomic verbs queue in the node's card
besides, which carries out `atomics_per_second`. **Tearing.** The words of a longer access reach memory in up to
`bursts` groups, drawn at random, at random instants of its transfer and of `tearing_seconds` after it.
**Kills.** A killed client posts nothing any more. What is under way, each group of words for itself, still arrives or
is lost, by the toss of a coin. A server's handlers, once begun, run to their end, whoever asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import msgspec
import numpy as np

from headway.errors import InputError
from headway.memory.remote import (
    WORD_BYTES,
    WORD_MASK,
    Background,
    Batch,
    Call,
    Clock,
    CompareAndSwap,
    FetchAndAdd,
    Logic,
    Pause,
    Read,
    Step,
    Verb,
    Write,
    is_round_trip,
    refuse_unaligned,
)
from headway.simulate.engine import Engine, Process, Resource, Timer
from headway.value import Value

__all__ = ["FabricParameters", "Handler", "SimulatedClient", "SimulatedFabric", "SimulatedServer"]

# What a server does with a request of a client: a program that returns the reply.
Handler = Callable[[str, list[Any]], Logic[Any]]


class FabricParameters(Value):
    """What verbs cost. The three latencies and the rate are those that the project starts from; the others, guesses.

    `write_seconds`, `read_seconds`, `atomic_seconds`: of a verb of 8 bytes on idle cards. `bytes_per_second`: of a
    card, each way. `atomics_per_second`: of a node's card. `call_seconds`: request and reply, without what the server
    does; `server_seconds`: its processor time for each request and each verb it posts, on `server_cores` cores.
    `jitter`: a base latency is drawn between itself and (1 + jitter) times itself.
    """

    write_seconds: float = 1.4e-6
    read_seconds: float = 2.0e-6
    atomic_seconds: float = 2.4e-6
    bytes_per_second: float = 12e9
    atomics_per_second: float = 2.5e6
    call_seconds: float = 2.8e-6
    server_seconds: float = 0.3e-6
    server_cores: int = 4
    bursts: int = 4
    tearing_seconds: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        positive = ("write_seconds", "read_seconds", "atomic_seconds", "bytes_per_second", "atomics_per_second")
        for field in (*positive, "server_cores", "bursts"):
            if not getattr(self, field) > 0:
                raise InputError(f"{field} is {getattr(self, field)}", place="fabric", remedy="give a positive number")
        for field in ("call_seconds", "server_seconds", "tearing_seconds", "jitter"):
            if not getattr(self, field) >= 0:
                raise InputError(f"{field} is {getattr(self, field)}", place="fabric", remedy="give 0 or more")


class _Card:
    """A network card: when each direction is free again."""

    __slots__ = ("atomics_free", "bytes_in", "bytes_out", "in_free", "out_free")

    def __init__(self) -> None:
        self.in_free = self.out_free = self.atomics_free = 0.0
        self.bytes_in = self.bytes_out = 0


class _Node:
    """A region, in words, and its card. Nothing here ever runs."""

    __slots__ = ("card", "number", "size", "words")

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        self.words = np.zeros(-(-size // WORD_BYTES), np.uint64)
        self.card = _Card()


class _Answer:
    """Of a verb under way: when it is back, and with what."""

    __slots__ = ("at", "result", "words")

    def __init__(self) -> None:
        self.at = 0.0
        self.result: Any = None
        self.words: np.ndarray | None = None


class SimulatedFabric:
    """Memory nodes, clients and servers, and the network between them.

    `node_bytes`: the region of each memory node. All chance is drawn from streams of the engine.
    """

    def __init__(self, engine: Engine, parameters: FabricParameters, node_bytes: Sequence[int]) -> None:
        self.engine = engine
        self.parameters = parameters
        self.nodes = [_Node(number, size) for number, size in enumerate(node_bytes)]
        self.servers: dict[str, SimulatedServer] = {}
        self.chance = engine.random("fabric")

    def client(self, name: str) -> SimulatedClient:
        """A new client on a machine of its own."""
        return SimulatedClient(self, name)

    def serve(self, name: str, handler: Handler) -> SimulatedServer:
        """Start a server that answers each `Call` to `name` by carrying out `handler(client, request)`."""
        server = self.servers[name] = SimulatedServer(self, name, handler)
        return server

    def words(self, node: int) -> np.ndarray:
        """The memory of `node` as it is at this instant, in words; for tests and for loading."""
        return self.nodes[node].words


class SimulatedClient:
    """A client: posts verbs, and may be killed. Several programs of it may be under way.

    `round_trips`: of its programs so far, without those in the background; `verbs`: verbs posted, all of them.
    `killed_before`: it is killed instead of posting its step of that number (from 1; round trips, all of them).
    """

    def __init__(self, fabric: SimulatedFabric, name: str) -> None:
        self.fabric = fabric
        self.name = name
        self.round_trips = 0
        self.verbs = 0
        self.posted = 0
        self.killed_before: int | None = None
        self.is_alive = True
        self._card = _Card()
        self._before_posting: Callable[[], Generator[Any, Any, None]] | None = None
        self._running: dict[Process, None] = {}
        self._under_way: dict[Timer, None] = {}

    def start(self, logic: Logic[Any], *, is_background: bool = False) -> Process:
        """Carry `logic` out as a process of the engine, whose value is what it returns."""
        process = self.fabric.engine.process(self.carry_out(logic, is_background), name=self.name, daemon=True)
        self._running[process] = None
        process.then(lambda _: self._running.pop(process, None))
        return process

    def kill(self) -> None:
        """End all its programs now. What it has posted arrives or is lost, each group of words by a coin."""
        if not self.is_alive:
            return
        self.is_alive = False
        coin = self.fabric.engine.random("kills")
        for timer in list(self._under_way):
            if timer.is_pending and coin.random() < 0.5:
                timer.cancel()
        for process in list(self._running):
            process.cancel()
        self._running.clear()

    def carry_out(self, logic: Logic[Any], is_background: bool = False) -> Generator[Any, Any, Any]:
        """The process that carries `logic` out; to be yielded from within a process of the engine."""
        engine = self.fabric.engine
        answer: Any = None
        while True:
            try:
                step: Step = logic.send(answer)
            except StopIteration as end:
                return end.value
            answer = None
            if is_round_trip(step):
                self.posted += 1
                if self.killed_before is not None and self.posted >= self.killed_before:
                    engine.call_later(0.0, self.kill)
                    yield engine.event(f"{self.name} is killed")
                self.round_trips += not is_background
                if self._before_posting is not None:
                    yield from self._before_posting()
            if isinstance(step, Read | Write | CompareAndSwap | FetchAndAdd):
                posted = self._post(step)
                yield posted.at - engine.now
                answer = _result(posted, step)
            elif isinstance(step, Batch):
                many = [self._post(verb) for verb in step.verbs]
                yield max((each.at for each in many), default=engine.now) - engine.now
                answer = tuple(_result(each, verb) for each, verb in zip(many, step.verbs, strict=True))
            elif isinstance(step, Call):
                answer = yield from self._call(step)
            elif isinstance(step, Clock):
                answer = engine.now
            elif isinstance(step, Pause):
                yield step.seconds
            elif isinstance(step, Background):
                self.start(step.logic, is_background=True)
            else:
                raise InputError(f"yields {step!r}, which is not a step", place=self.name)

    def _post(self, verb: Verb) -> _Answer:
        """Send a verb off: plan what it does to memory, and when it will be back."""
        fabric, engine, parameters = self.fabric, self.fabric.engine, self.fabric.parameters
        node = fabric.nodes[verb.node]
        answer = _Answer()
        self.verbs += 1
        rate = parameters.bytes_per_second
        if isinstance(verb, Write):
            size = len(verb.data)
            refuse_unaligned(verb.offset, size, node.size, node.number)
            latency = self._latency(parameters.write_seconds)
            arrival = _pass(engine.now, size / rate, self._card, node.card, size) + latency / 2
            words = np.frombuffer(verb.data, np.uint64) if size % WORD_BYTES == 0 else _padded(node, verb)
            first = verb.offset // WORD_BYTES
            last = self._spread(node, arrival - size / rate, arrival, len(words), first, words, None)
            answer.at = last + latency / 2
        elif isinstance(verb, Read):
            refuse_unaligned(verb.offset, verb.size, node.size, node.number)
            latency = self._latency(parameters.read_seconds)
            arrival = engine.now + latency / 2
            count = -(-verb.size // WORD_BYTES)
            answer.words = np.empty(count, np.uint64)
            first = verb.offset // WORD_BYTES
            last = self._spread(node, arrival, arrival + verb.size / rate, count, first, None, answer.words)
            passed = _pass(arrival, verb.size / rate, node.card, self._card, verb.size)
            answer.at = max(last, passed) + latency / 2
        else:
            refuse_unaligned(verb.offset, WORD_BYTES, node.size, node.number)
            latency = self._latency(parameters.atomic_seconds)
            arrival = max(engine.now + latency / 2, node.card.atomics_free)
            node.card.atomics_free = arrival + 1 / parameters.atomics_per_second
            self._at(arrival, _atomic, node, verb, answer)
            answer.at = arrival + latency / 2
        return answer

    def _spread(
        self,
        node: _Node,
        begin: float,
        end: float,
        count: int,
        first: int,
        source: np.ndarray | None,
        target: np.ndarray | None,
    ) -> float:
        """Plan the groups of words of an access, from `begin` to `end` and what tearing adds; when the last is done."""
        parameters, chance = self.fabric.parameters, self.fabric.chance
        bursts = min(parameters.bursts, count)
        if bursts <= 1:
            self._at(end, _copy, node, first, slice(None), count, source, target)
            return end
        begin, end = max(begin, self.fabric.engine.now), end + parameters.tearing_seconds
        order = list(range(count))
        chance.shuffle(order)
        cuts = [0, *sorted(chance.sample(range(1, count), bursts - 1)), count]
        last = end - parameters.tearing_seconds
        for low, high in itertools.pairwise(cuts):
            at = begin + (end - begin) * chance.random()
            last = max(last, at)
            self._at(at, _copy, node, first, np.array(order[low:high]), count, source, target)
        return last

    def _call(self, step: Call) -> Generator[Any, Any, Any]:
        fabric, engine, parameters = self.fabric, self.fabric.engine, self.fabric.parameters
        server = fabric.servers.get(step.server)
        if server is None:
            raise InputError(
                f"calls {step.server!r}, and no server has that name", place=self.name, remedy="serve it first"
            )
        request = msgspec.msgpack.encode(step.request)
        rate = parameters.bytes_per_second
        latency = self._latency(parameters.call_seconds)
        arrival = _pass(engine.now, len(request) / rate, self._card, server.card, len(request)) + latency / 2
        done = engine.event(f"the reply of {step.server}")
        self._at(arrival, server.begin, self.name, msgspec.msgpack.decode(request), done)
        reply = yield done
        size = len(reply)
        back = _pass(engine.now, size / rate, server.card, self._card, size) + latency / 2
        yield back - engine.now
        return msgspec.msgpack.decode(reply)

    def _latency(self, base: float) -> float:
        jitter = self.fabric.parameters.jitter
        return base * (1.0 + jitter * self.fabric.chance.random()) if jitter else base

    def _at(self, at: float, function: Callable[..., None], *arguments: Any) -> None:
        # Kept until it is done, so that a kill can toss its coin.
        box: list[Timer] = []

        def do() -> None:
            self._under_way.pop(box[0], None)
            function(*arguments)

        box.append(self.fabric.engine.call_at(max(at, self.fabric.engine.now), do))
        self._under_way[box[0]] = None


class SimulatedServer:
    """A server: requests share its cores, its verbs go out through a card of its own.

    `requests`: begun so far; `busy_seconds`: processor time, all cores together.
    """

    def __init__(self, fabric: SimulatedFabric, name: str, handler: Handler) -> None:
        self.fabric = fabric
        self.requests = 0
        self.busy_seconds = 0.0
        self.client = SimulatedClient(fabric, name)
        self.card = self.client._card
        self._handler = handler
        self.client._before_posting = self._compute
        self._cores = Resource(fabric.engine, fabric.parameters.server_cores, name=f"a core of {name}")

    def begin(self, client: str, request: list[Any], done: Any) -> None:
        """A request has arrived; `done` gets the encoded reply."""
        self.requests += 1
        self.fabric.engine.process(self._handle(client, request, done), name=self.client.name, daemon=True)

    def load(self, seconds: float) -> float:
        """The part of its cores that was busy in `seconds`."""
        return self.busy_seconds / (seconds * self.fabric.parameters.server_cores)

    @property
    def bytes_moved(self) -> int:
        """Bytes through its card so far, both ways."""
        return self.card.bytes_in + self.card.bytes_out

    def _handle(self, client: str, request: list[Any], done: Any) -> Generator[Any, Any, None]:
        """A process of the engine: the handler, with a core taken for a while before each step that costs one."""
        yield from self._compute()
        reply = yield from self.client.carry_out(self._handler(client, request))
        done.succeed(msgspec.msgpack.encode(reply))

    def _compute(self) -> Generator[Any, Any, None]:
        seconds = self.fabric.parameters.server_seconds
        if seconds:
            self.busy_seconds += seconds
            yield self._cores.acquire()
            yield seconds
            self._cores.release()


def _pass(now: float, seconds: float, out: _Card, into: _Card, size: int) -> float:
    """When bytes that take `seconds` have passed both cards, the second while they leave the first."""
    out.bytes_out += size
    into.bytes_in += size
    left = max(now, out.out_free) + seconds
    out.out_free = left
    came = max(left, into.in_free + seconds)
    into.in_free = came
    return came


def _copy(node: _Node, first: int, which: Any, count: int, source: Any, target: Any) -> None:
    memory = node.words[first : first + count]
    if source is not None:
        memory[which] = source[which]
    else:
        target[which] = memory[which]


def _atomic(node: _Node, verb: CompareAndSwap | FetchAndAdd, answer: _Answer) -> None:
    at = verb.offset // WORD_BYTES
    before = answer.result = int(node.words[at])
    if isinstance(verb, FetchAndAdd):
        node.words[at] = (before + verb.amount) & WORD_MASK
    elif before == verb.expected & WORD_MASK:
        node.words[at] = verb.desired & WORD_MASK


def _padded(node: _Node, verb: Write) -> np.ndarray:
    raise InputError(
        f"a write of {len(verb.data)} bytes", place=f"memory node {node.number}", remedy="write whole words of 8 bytes"
    )


def _result(answer: _Answer, verb: Verb) -> Any:
    return answer.words.tobytes()[: verb.size] if isinstance(verb, Read) and answer.words is not None else answer.result
