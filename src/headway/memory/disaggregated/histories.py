"""Histories of clients that read and write a few keys in the simulator, and are killed, by seed.

    history = play(Disaster(store="clover", seed=7))
    violation = check(history.operations)

The same disaster gives the same history, call by call; a failure is reported as its disaster, and replayed from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from typing import Any, Literal

from headway.errors import InputError
from headway.memory.disaggregated.central import Central, CentralLayout, Coordinator
from headway.memory.disaggregated.clover import Clover
from headway.memory.disaggregated.clover_layout import CloverLayout
from headway.memory.disaggregated.clover_metadata import MetadataServer
from headway.memory.disaggregated.direct import Direct, DirectLayout
from headway.memory.disaggregated.linearizability import Operation
from headway.memory.remote import Clock, Logic
from headway.memory.remote_simulated import FabricParameters, SimulatedClient, SimulatedFabric
from headway.simulate.engine import Engine
from headway.value import Value

__all__ = ["Disaster", "History", "Stores", "build", "play"]

_MICROSECOND = 1e-6

# Verbs that take between once and four times their time, and tear into as many as 6 pieces within 2 µs.
_ROUGH = FabricParameters(jitter=3.0, bursts=6, tearing_seconds=2 * _MICROSECOND)


class Disaster(Value):
    """What happens: `clients` at a time make `operations` calls on `keys` keys, each killed every `life_seconds` or so.

    A killed client is replaced by a new one that knows nothing. `killed_before`: kill the first client instead of
    posting its round trip of that number (from 1), and nobody else. `off`: which safeguard is switched off.
    """

    store: Literal["direct", "central", "clover"]
    seed: int
    clients: int = 4
    keys: int = 2
    operations: int = 40
    updates: float = 0.5
    value_bytes: int = 64
    life_seconds: float = 150 * _MICROSECOND
    killed_before: int | None = None
    off: Literal["", "crc", "version", "delay"] = ""
    version_bits: int = 1
    spare_buffers: int = 24
    replicas: int = 1
    looks_ahead: bool = True
    recycle_seconds: float = 60 * _MICROSECOND
    fabric: FabricParameters = _ROUGH

    def __post_init__(self) -> None:
        if self.clients < 1 or self.keys < 1 or self.value_bytes < 8:
            raise InputError("needs a client, a key and values of 8 bytes", place="disaster")


class History(Value):
    """What happened: the calls, how many clients were killed, and when it was over."""

    operations: tuple[Operation, ...]
    kills: int
    seconds: float


class Stores:
    """One of the stores on a simulated fabric: makes clients of it. `server`: its coordinator or metadata server."""

    def __init__(self, disaster: Disaster, engine: Engine) -> None:
        self.disaster = disaster
        self.metadata: MetadataServer | None = None
        off, keys, size = disaster.off, disaster.keys, disaster.value_bytes
        nodes = max(1, disaster.replicas)
        guard = 25 * _MICROSECOND
        if disaster.store == "direct":
            direct = DirectLayout(keys=keys, value_bytes=size, nodes=nodes)
            self.fabric = SimulatedFabric(engine, disaster.fabric, [direct.node_bytes] * nodes)
            self._make: Callable[[int, str], Any] = lambda number, _: Direct(
                direct, number, lease_seconds=4 * guard, guard_seconds=guard, checks_crc=off != "crc"
            )
        elif disaster.store == "central":
            central = CentralLayout(keys=keys, value_bytes=size, buffers=keys + disaster.spare_buffers, nodes=nodes)
            self.fabric = SimulatedFabric(engine, disaster.fabric, [central.node_bytes] * nodes)
            self.fabric.serve("coordinator", Coordinator(central).handle)
            self._make = lambda number, name: Central()
        else:
            clover = CloverLayout(
                keys=keys,
                value_bytes=size,
                buffers=keys + disaster.spare_buffers,
                nodes=nodes,
                replicas=disaster.replicas,
                version_bits=disaster.version_bits,
                recycle_seconds=disaster.recycle_seconds,
                lease_seconds=8 * guard,
                guard_seconds=guard,
            )
            self.fabric = SimulatedFabric(engine, disaster.fabric, [clover.node_bytes] * nodes)
            server = MetadataServer(clover, recycle_seconds=0.0 if off == "delay" else None)
            self.metadata = server
            host = self.fabric.serve("metadata", server.handle)
            host.client.start(server.load())
            engine.run()
            host.client.start(server.sweep_for_ever(100 * _MICROSECOND), is_background=True)
            self._make = lambda _, name: Clover(
                clover,
                name,
                batch=4,
                retire_after=1,
                retry_seconds=5 * _MICROSECOND,
                looks_ahead=disaster.looks_ahead,
                checks_crc=off != "crc",
                checks_version=off != "version",
            )

    def store(self, number: int) -> Any:
        """What client `number` (from 1) calls `read(key)` and `write(key, value)` on."""
        return self._make(number, f"c{number}")


def build(disaster: Disaster, engine: Engine) -> Stores:
    """The store of a disaster, loaded, on `engine`."""
    return Stores(disaster, engine)


def play(disaster: Disaster) -> History:
    """Play a disaster to its end. Raises what a client's program raises, with the disaster in a note."""
    engine = Engine(disaster.seed)
    try:
        return _play(disaster, engine)
    except Exception as error:
        error.add_note(f"replay with {disaster!r}")
        raise


def _play(disaster: Disaster, engine: Engine) -> History:
    stores = build(disaster, engine)
    begun: list[dict[str, Any]] = []
    chance = engine.random("calls")
    lives = engine.random("lives")
    kills = 0
    numbers = iter(range(1, 1 << 15))

    def calls(number: int, client: SimulatedClient) -> Logic[None]:
        store = stores.store(number)
        while len(begun) < disaster.operations:
            is_write = chance.random() < disaster.updates
            key = chance.randrange(disaster.keys)
            now = yield Clock()
            value = _value(len(begun) + 1, chance, disaster.value_bytes) if is_write else None
            call: dict[str, Any] = {"client": client.name, "key": key, "begin": now, "value": value}
            call["kind"] = "write" if is_write else "read"
            begun.append(call)
            if value is not None:
                yield from store.write(key, value)
            else:
                call["value"] = yield from store.read(key)
            call["end"] = yield Clock()

    def seat(index: int) -> Generator[Any, Any, None]:
        """A place that is never empty while there are calls to make: when a client dies, another comes."""
        nonlocal kills
        while len(begun) < disaster.operations:
            number = next(numbers)
            client = stores.fabric.client(f"c{number}")
            running = client.start(calls(number, client))
            over = engine.event(f"the end of {client.name}")
            running.then(lambda event, over=over: over.succeed(event))
            if disaster.killed_before is not None:
                client.killed_before = disaster.killed_before if number == 1 else None
            else:
                death = engine.call_later(lives.expovariate(1.0 / disaster.life_seconds), client.kill)
                over.then(lambda _, death=death: death.cancel())
            ended = yield over
            kills += not client.is_alive
            if client.is_alive and ended.failure is not None:
                raise ended.failure

    seats = [engine.process(seat(index), name=f"seat {index}") for index in range(disaster.clients)]
    engine.run(engine.all_of(*seats))
    return History(operations=tuple(Operation(**call) for call in begun), kills=kills, seconds=engine.now)


def _value(number: int, chance: random.Random, size: int) -> bytes:
    """A value that no other write has: its words all say which one it is, so that any mixture shows."""
    words = chance.randint(1, size // 8)
    return number.to_bytes(8, "little") * words
