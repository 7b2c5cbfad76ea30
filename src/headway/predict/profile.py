"""Measured operator times: the traced graph, run operator by operator on the machine at hand.

`Profile.measure` interprets the graph: one layer of each kind, forward then backward, with real tensors flowing along
its edges, and times every operator where it stands. So each finds the strides, values and cache contents that it finds
in a real step. What cannot be replayed keeps its roofline, scaled by how far the replayed operators are from theirs.

On a machine whose ranks share it, `concurrent` processes do the same at the same time: caches and memory are crowded
as they will be. Results are kept in the database of measured times (`database.py`), under a source that stands for
hardware, torch version, threads and crowd.
"""

from __future__ import annotations

import bisect
import datetime
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from headway.hardware.cluster import Accelerator
from headway.hardware.host import keep_freed_memory
from headway.predict.database import Database, Measurement, default_database
from headway.predict.operators import (
    computed_dtype,
    operator_bytes,
    operator_key,
    operator_name,
)
from headway.predict.replay import Replay, replayed_positions
from headway.value import Value
from headway.workload.graph import Graph, Operator

__all__ = [
    "CrowdRequest",
    "Profile",
    "default_cache",
]

_REPEATS = 5
# Enough parameters to be out of every cache, few enough to update in a moment.
_UPDATE_ELEMENTS = 2**24
# Tables outlive versions of this module: a change of what is measured, or how, needs a new number.
_VERSION = 4


class Profile(Value):
    """Seconds of operators on one kind of device of this machine.

    `seconds`: key of an operator (see `operator_key`) → samples → seconds. `forward_overhead_seconds` and
    `backward_overhead_seconds` are what autograd and module calls add to each operator of a real step. `unreplayed`
    counts the operators that have no measurement, by name. `host_forward_seconds` and `host_backward_seconds`: what the
    host needs to start an operator of a GPU in a real step; while that is more than the GPU needs, the GPU waits.
    `quiet_share`: time of one process that computes alone, over its time among `concurrent` ones.
    """

    torch_device: str = "cpu"
    threads: int = 0
    concurrent: int = 1
    seconds: dict[str, dict[int, float]] = {}
    view_seconds: float = 0.0
    forward_overhead_seconds: float = 0.0
    backward_overhead_seconds: float = 0.0
    host_forward_seconds: float = 0.0
    host_backward_seconds: float = 0.0
    optimizer_element_seconds: float = 0.0
    optimizer_tensor_seconds: float = 0.0
    unreplayed: dict[str, int] = {}
    quiet_share: float = 1.0

    def is_of(self, accelerator: Accelerator) -> bool:
        """Whether these times hold for devices of this kind."""
        return accelerator.torch_device == self.torch_device

    def operator_seconds(
        self, operator: Operator, samples: int, degree: int, precision: str, roofline_seconds: float
    ) -> float:
        """Seconds of `operator` in a real step, autograd included; between measured sample counts it is interpolated.

        `roofline_seconds` answers for what was not measured.
        """
        overhead = self.backward_overhead_seconds if operator.backward else self.forward_overhead_seconds
        if operator.is_view:
            return self.view_seconds + overhead if self.torch_device == "cpu" else 0.0
        found = self.measured_seconds(operator, samples, degree, precision)
        return (roofline_seconds if found is None else found) + overhead

    def measured_seconds(self, operator: Operator, samples: int, degree: int, precision: str) -> float | None:
        """Seconds of `operator` called by itself, or None if it was not measured."""
        measured = self.seconds.get(operator_key(operator, degree if operator.is_sharded else 1, precision))
        return None if measured is None else _interpolated(operator, measured, samples)

    @classmethod
    def measure(
        cls,
        graph: Graph,
        *,
        samples: Sequence[int],
        degrees: Sequence[int] = (1,),
        precision: str = "float32",
        torch_device: str = "cpu",
        threads: int = 0,
        concurrent: int = 1,
        optimizer: str = "AdamW",
        budget_seconds: float = 10.0,
        fingerprint: str = "",
        device: str = "",
        cache: Path | None = None,
        refresh: bool = False,
    ) -> Profile:
        """Measure the operators of `graph` at each of `samples` and for each tensor-parallel degree of `degrees`.

        `threads`: of torch in one rank (0: as torch chooses). `concurrent`: processes that compute at the same time.
        `budget_seconds` bounds the measuring as a whole, smallest cases first; what is then missing is interpolated.
        `device`: what the database calls the device ("": as the system does). `cache`: the file of the database (None:
        `default_cache()`). Raises FileError if the cache cannot be written.
        """
        context = _context(torch_device, threads, concurrent, fingerprint)
        table = _Table(Database(cache or default_cache()), context, device or _machine(torch_device))
        known = {} if refresh else table.load()
        cases = [(count, degree) for degree in sorted(set(degrees)) for count in sorted(set(samples))]
        missing = [case for case in cases if not _covered(graph, case, precision, known)]
        update_key = f"update {optimizer} {graph.parameter_count} {len(graph.parameters)}"
        if missing or update_key not in known:
            with _threads(threads), _crowd(graph, missing, precision, torch_device, threads, concurrent):
                fresh = _measure_all(graph, missing, precision, torch_device, budget_seconds)
                fresh |= _constants(graph, optimizer, update_key, torch_device)
            with _threads(threads):
                fresh |= _quiet_share(graph, missing, fresh, precision, torch_device, concurrent, budget_seconds / 8)
            table.save(fresh, _facts(graph, degrees, precision))
            for key, values in fresh.items():
                known[key] = known.get(key, {}) | values
        seconds: dict[str, dict[int, float]] = {}
        unreplayed: Counter[str] = Counter()
        for operator in graph.operators:
            for degree in sorted({degree for _, degree in cases}):
                key = operator_key(operator, degree if operator.is_sharded else 1, precision)
                if key in known:
                    seconds[key] = known[key]
            if not operator.is_view and operator_key(operator, 1, precision) not in known:
                unreplayed[operator_name(operator)] += 1
        overheads, update = known[_OVERHEADS], known[update_key]
        return cls(
            torch_device=torch_device,
            threads=threads,
            concurrent=concurrent,
            seconds=seconds,
            view_seconds=overheads[0],
            forward_overhead_seconds=overheads[1],
            backward_overhead_seconds=overheads[2],
            host_forward_seconds=overheads[3 if precision == "float32" else 5],
            host_backward_seconds=overheads[4 if precision == "float32" else 6],
            optimizer_element_seconds=update[0],
            optimizer_tensor_seconds=update[1],
            unreplayed=dict(unreplayed),
            quiet_share=known.get(_QUIET, {}).get(0, 1.0),
        )


_OVERHEADS = "overheads"
_QUIET = "quiet"


def _interpolated(operator: Operator, measured: dict[int, float], samples: int) -> float:
    found = measured.get(samples)
    if found is not None:
        return found
    points = sorted(measured.items())
    if len(points) == 1:
        count, seconds = points[0]
        size, known = operator.flop.at(samples), operator.flop.at(count)
        if not known:
            size, known = operator_bytes(operator, samples), operator_bytes(operator, count)
        return seconds * size / known if known else seconds
    position = min(max(bisect.bisect(points, (samples, 0.0)), 1), len(points) - 1)
    (low, before), (high, after) = points[position - 1], points[position]
    line = before + (after - before) * (samples - low) / (high - low)
    # Noise must not make a larger batch cheaper than the smallest that was measured, nor a small one free.
    return max(line, min(before, after) * min(1.0, samples / low))


def default_cache() -> Path:
    """Where measurements are kept: the file of `database.default_database`."""
    return default_database()


# ---------------------------------------------------------------------------------------------------------- the table


def _machine(torch_device: str) -> str:
    if torch_device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {_processor()} {os.cpu_count()}"


def _context(torch_device: str, threads: int, concurrent: int, fingerprint: str) -> str:
    machine = fingerprint or _machine(torch_device)
    parts = (_VERSION, machine, torch.__version__, torch_device, threads, concurrent)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


class _Table:
    """Measurements of one context in the database, where its name is their source."""

    def __init__(self, database: Database, context: str, device: str) -> None:
        self.database = database
        self.context = context
        self.device = device

    def load(self) -> dict[str, dict[int, float]]:
        return self.database.seconds_by_key(self.context)

    def save(self, measured: dict[str, dict[int, float]], facts: dict[str, _Facts]) -> None:
        today = datetime.date.today().isoformat()
        rows = []
        for key, values in measured.items():
            operation, _, shape = key.partition(" ")
            fact = facts.get(key)  # None: no operator but a constant of the machine
            for samples, seconds in values.items():
                rows.append(
                    Measurement(
                        device=self.device,
                        operation=operation,
                        dtype=fact.dtype if fact else "",
                        shape=shape,
                        size=samples,
                        unit="samples",
                        seconds=seconds,
                        flop=fact.flop(samples) if fact else 0.0,
                        moved_bytes=fact.moved_bytes(samples) if fact else 0.0,
                        source=self.context,
                        date=today,
                    )
                )
        self.database.add(rows)


class _Facts(NamedTuple):
    """What is known of an operator beside its time."""

    operator: Operator
    degree: int
    precision: str

    @property
    def dtype(self) -> str:
        return computed_dtype(self.operator, self.precision)

    def flop(self, samples: int) -> float:
        return self.operator.flop.at(samples) / self.degree

    def moved_bytes(self, samples: int) -> float:
        return operator_bytes(self.operator, samples, self.degree, self.precision)


def _facts(graph: Graph, degrees: Iterable[int], precision: str) -> dict[str, _Facts]:
    found: dict[str, _Facts] = {}
    for degree in sorted(set(degrees)):
        for operator in graph.operators:
            split = degree if operator.is_sharded else 1
            found.setdefault(operator_key(operator, split, precision), _Facts(operator, split, precision))
    return found


# ---------------------------------------------------------------------------------------------------------- measuring


class CrowdRequest(Value):
    """What a further process replays while this one measures."""

    graph: Graph
    samples: int
    degree: int
    precision: str
    threads: int


def _covered(graph: Graph, case: tuple[int, int], precision: str, known: dict[str, dict[int, float]]) -> bool:
    """Whether a case has been measured before: a marker says so, as some operators cannot be replayed."""
    return case[0] in known.get(_marker(graph, case[1], precision), {})


def _marker(graph: Graph, degree: int, precision: str) -> str:
    digest = hashlib.sha256()
    for position in replayed_positions(graph):
        digest.update(operator_key(graph.operators[position], degree, precision).encode())
    return f"graph {digest.hexdigest()[:24]}"


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _crowd(
    graph: Graph, cases: Sequence[tuple[int, int]], precision: str, torch_device: str, threads: int, concurrent: int
) -> Iterator[None]:
    """`concurrent` - 1 further processes that replay the same graph for as long as the block runs."""
    if concurrent <= 1 or not cases or torch_device != "cpu":
        yield
        return
    samples, degree = cases[len(cases) // 2]
    request = msgspec.json.encode(
        CrowdRequest(graph=graph, samples=samples, degree=degree, precision=precision, threads=threads)
    )
    others: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else dict(os.environ)
    try:
        for _ in range(concurrent - 1):
            others.append(
                subprocess.Popen(
                    [sys.executable, "-m", "headway.predict.crowd"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                )
            )
        for other in others:
            assert other.stdin is not None
            other.stdin.write(len(request).to_bytes(8, "little") + request)
            other.stdin.flush()
        for other in others:
            assert other.stdout is not None
            # One byte when it is at work; nothing when it failed: then the crowd is smaller, and stderr says why.
            other.stdout.read(1)
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


def _measure_all(
    graph: Graph, cases: Sequence[tuple[int, int]], precision: str, torch_device: str, budget_seconds: float
) -> dict[str, dict[int, float]]:
    keep_freed_memory()
    measured: dict[str, dict[int, float]] = defaultdict(dict)
    if torch_device == "cuda" and cases:
        # The first calls load libraries and choose kernels, which takes seconds and must not count against the budget.
        Replay(graph, *cases[0], precision, torch_device).run()
    start = time.perf_counter()
    last = 0.0
    for done, (samples, degree) in enumerate(cases):
        spent = time.perf_counter() - start
        # The next case takes about twice as long as the last; what is left out is extrapolated.
        if done and spent + 2 * last > budget_seconds:
            break
        replay = Replay(graph, samples, degree, precision, torch_device)
        replay.run()
        passes: dict[str, list[float]] = defaultdict(list)
        share = (budget_seconds - spent) / (len(cases) - done)
        began = time.perf_counter()
        for repeat in range(_REPEATS):
            for key, seconds in replay.run().items():
                passes[key].append(seconds)
            elapsed = time.perf_counter() - began
            if repeat and elapsed + elapsed / (repeat + 1) > share:
                break
        for key, values in passes.items():
            measured[key][samples] = statistics.median(values)
        measured[_marker(graph, degree, precision)][samples] = 1.0
        last = time.perf_counter() - start - spent
    return dict(measured)


def _quiet_share(
    graph: Graph, cases: Sequence[tuple[int, int]], crowded: dict[str, dict[int, float]], precision: str,
    torch_device: str, concurrent: int, budget_seconds: float,
) -> dict[str, dict[int, float]]:  # fmt: skip
    """Measure one of the cases again, without the crowd."""
    if concurrent <= 1 or not cases or torch_device != "cpu":
        return {}
    samples, degree = cases[0]
    marker = _marker(graph, degree, precision)
    quiet = _measure_all(graph, [(samples, degree)], precision, torch_device, budget_seconds)
    both = [key for key in quiet if key != marker and samples in crowded.get(key, {})]
    alone, among = (sum(times[key][samples] for key in both) for times in (quiet, crowded))
    return {_QUIET: {0: min(1.0, alone / among)}} if among else {}


# ---------------------------------------------------------------------------------------------------------- constants


def _timed(action: Callable[[], Any], device: str, repeats: int = 30) -> float:
    """Median seconds of `action`."""
    values = []
    for repeat in range(repeats + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat >= 3:
            values.append(time.perf_counter() - start)
    return statistics.median(values)


def _constants(graph: Graph, optimizer: str, update_key: str, device: str) -> dict[str, dict[int, float]]:
    return {
        _OVERHEADS: dict(enumerate((*_overheads(device), *_host(device, "float32"), *_host(device, "bfloat16")))),
        update_key: dict(enumerate(_update(graph, optimizer, device))),
    }


def _overheads(device: str) -> tuple[float, float, float]:
    """Seconds of a view, and what autograd and modules add to each operator going forward and backward.

    Measured on a stack of layers so small that their operators cost next to nothing, against the same operators called
    directly. On a GPU the host runs ahead, so nothing is added there.
    """
    depth, width = 16, 8
    weight, bias, x = torch.randn(width, width), torch.randn(width), torch.randn(2, width)
    aten = torch.ops.aten
    with torch.no_grad():
        view = _timed(lambda: [aten.t.default(weight) for _ in range(100)], "cpu") / 100
    if device != "cpu":
        return view, 0.0, 0.0
    stack = torch.nn.Sequential()
    for _ in range(depth):
        stack.extend([torch.nn.Linear(width, width), torch.nn.Tanh()])

    def there() -> torch.Tensor:
        return stack(x)

    def plain_there() -> None:
        y = x
        for _ in range(depth):
            y = aten.tanh.default(aten.addmm.default(bias, y, aten.t.default(weight)))

    def plain_back() -> None:
        gradient = x
        for _ in range(depth):
            gradient = aten.tanh_backward.default(gradient, x)
            aten.view.default(aten.sum.dim_IntList(gradient, [0], True), [width])
            aten.t.default(aten.t.default(aten.mm.default(aten.t.default(gradient), x)))
            gradient = aten.mm.default(gradient, aten.t.default(aten.t.default(weight)))

    forward = _timed(there, device)
    with torch.no_grad():
        bare_forward = _timed(plain_there, device)
        bare_backward = _timed(plain_back, device)

    def both() -> None:
        stack.zero_grad(set_to_none=True)
        there().sum().backward()

    backward = _timed(both, device) - forward
    return view, max(0.0, forward - bare_forward) / (3 * depth), max(0.0, backward - bare_backward) / (10 * depth)


def _host(device: str, precision: str) -> tuple[float, float]:
    """Seconds that the host needs to start an operator of a GPU, forward and backward; 0 where there is no GPU.

    Measured on a stack of layers so small that the GPU waits for the host all the time, through modules, autograd and
    autocast, for each operator that is no view: two forward and four backward in each layer.
    """
    if device == "cpu":
        return 0.0, 0.0
    depth, width = 32, 64
    stack = torch.nn.Sequential()
    for _ in range(depth):
        stack.extend([torch.nn.Linear(width, width), torch.nn.Tanh()])
    stack.to(device)
    x = torch.randn(8, width, device=device)

    def there() -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision != "float32"):
            return stack(x)

    def both() -> None:
        stack.zero_grad(set_to_none=True)
        there().sum().backward()

    forward = _timed(there, device)
    return forward / (2 * depth), max(0.0, _timed(both, device) - forward) / (4 * depth)


def _update(graph: Graph, name: str, device: str) -> tuple[float, float]:
    """Seconds that one optimizer step takes for each element, and for each tensor."""
    kind = getattr(torch.optim, name, None)
    if kind is None:
        return 0.0, 0.0

    def step(shapes: Iterable[tuple[int, ...]], repeats: int) -> float:
        parameters = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        return _timed(kind(parameters, lr=1e-3).step, device, repeats)

    tiny = step([(4,)] * 64, 10) / 64
    shapes: list[tuple[int, ...]] = []
    elements = 0
    for parameter in graph.parameters:
        if parameter.trainable and elements + parameter.elements <= _UPDATE_ELEMENTS:
            shapes.append(parameter.shape)
            elements += parameter.elements
    if not elements:
        shapes, elements = [(_UPDATE_ELEMENTS // 8,)], _UPDATE_ELEMENTS // 8
    whole = step(shapes, 5)
    return max(whole - tiny * len(shapes), 0.05 * whole) / elements, tiny
