"""A training step as a question of memory, and its answer as a program: both plain values.

The question (`Problem`): operations in order, forward and then backward, with the tensors that each reads and makes.
The answer (`Schedule`): the steps of a program that computes every operation, some of them again, and frees, moves and
encodes tensors in between. Which tensors are on the device follows from the order of the steps alone; how long it
takes follows from three streams (compute, to the tier, from the tier) that wait for each other where they must.

Memory counts activations and gradients of activations. What is there anyway (parameters, their gradients, the model's
inputs) has no bytes here.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from headway.errors import InputError
from headway.plan.plan import Tier
from headway.value import Value

__all__ = [
    "EXPENSIVE_KINDS",
    "Action",
    "Encoding",
    "Operation",
    "Path",
    "Price",
    "Problem",
    "Schedule",
    "Step",
    "Tensor",
]

Action = Literal["compute", "compute_in_place", "free", "offload", "fetch", "encode", "decode"]


EXPENSIVE_KINDS = frozenset({"convolution", "matmul", "attention"})
"""Kinds of operations that take nearly all the time of a step; the others stream through memory."""


class Encoding(Value):
    """A lossless encoding of a tensor: as far as the gradients can tell (Gist, Jain et al., ISCA 2018, section 4).

    `ratio`: encoded bytes over bytes. `seconds`: of encoding, and of decoding, on the compute stream. `name`: "sign"
    (a bit for each element), "window" (a byte for each pooling index), "shape" (nothing) or "sparse" (a bit map and the
    elements that are not zero).
    """

    name: str
    ratio: float
    seconds: float = 0.0


class Tensor(Value):
    """Something that an operation makes, or (`maker` -1) that is there from the beginning and stays, free of charge."""

    name: str
    bytes: float
    maker: int
    encoding: Encoding | None = None


class Operation(Value):
    """One operation: positions of the tensors that it reads and makes.

    `overwrites`: the input whose place the output may take if nothing needs that input any more; -1: none. `repeatable`
    says whether it may be computed again. `kind`: "convolution", "matmul", "activation", "normalization", "pool",
    "dropout", "attention" or "other", which is what some policies go by. `source`: its position among the operators
    that it was made from, or -1.
    """

    name: str
    seconds: float
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    workspace_bytes: float = 0.0
    backward: bool = False
    overwrites: int = -1
    repeatable: bool = True
    kind: str = "other"
    source: int = -1


class Path(Value):
    """The way to a tier and back; `latency_seconds` is paid by every transfer."""

    tier: Tier = "host"
    write_bytes_per_second: float = 12e9
    read_bytes_per_second: float = 12e9
    latency_seconds: float = 10e-6
    capacity_bytes: float = float("inf")


class Problem(Value):
    """A training step: operations in the order in which they are due, tensors, and where tensors can go.

    `streams`: 3 (compute and both directions beside each other), 2 (both directions share one) or 1 (no overlap).
    """

    name: str
    operations: tuple[Operation, ...]
    tensors: tuple[Tensor, ...]
    paths: tuple[Path, ...] = ()
    streams: Literal[1, 2, 3] = 3

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each tensor the operations that read it, ascending."""
        found: list[list[int]] = [[] for _ in self.tensors]
        for position, operation in enumerate(self.operations):
            for tensor in dict.fromkeys(operation.inputs):
                found[tensor].append(position)
        return tuple(map(tuple, found))

    @cached_property
    def forward_stop(self) -> int:
        """Position of the first backward operation."""
        return next((at for at, operation in enumerate(self.operations) if operation.backward), len(self.operations))

    @cached_property
    def saved(self) -> tuple[int, ...]:
        """The tensors with bytes that forward makes and backward reads, in the order in which they are made."""
        stop = self.forward_stop
        found = [
            at
            for at, tensor in enumerate(self.tensors)
            if 0 <= tensor.maker < stop and tensor.bytes > 0 and self.readers[at] and self.readers[at][-1] >= stop
        ]
        return tuple(sorted(found, key=lambda at: self.tensors[at].maker))

    @cached_property
    def compute_seconds(self) -> float:
        """Seconds of all operations, each once: no schedule is faster."""
        return sum(operation.seconds for operation in self.operations)

    @cached_property
    def bytes_needed(self) -> float:
        """No schedule takes less: the largest working set of one operation."""
        return max((self.working_set(at) for at in range(len(self.operations))), default=0.0)

    def working_set(self, position: int) -> float:
        """Bytes that must be on the device while an operation runs: inputs, outputs and workspace."""
        operation = self.operations[position]
        held = sum(self.tensors[at].bytes for at in {*operation.inputs, *operation.outputs})
        if operation.overwrites >= 0:
            held -= self.tensors[operation.overwrites].bytes
        return held + operation.workspace_bytes

    def path(self, tier: str) -> Path:
        """The way to `tier`. Raises InputError if the problem has none."""
        for path in self.paths:
            if path.tier == tier:
                return path
        listed = ", ".join(path.tier for path in self.paths) or "none"
        raise InputError(f"no way to the tier {tier!r}", place=f"{self.name}: paths", remedy=f"ways are: {listed}")

    def validate(self) -> Problem:
        """This problem, or InputError naming the operation: every input is made before it is read, and made once."""
        made = {at for at, tensor in enumerate(self.tensors) if tensor.maker < 0}
        for position, operation in enumerate(self.operations):
            place = f"{self.name}: operation {position} ({operation.name})"
            for at in operation.inputs:
                if at not in made:
                    raise InputError(f"reads tensor {at} before it is made", place=place)
            for at in operation.outputs:
                if at in made or self.tensors[at].maker != position:
                    raise InputError(f"makes tensor {at}, which another operation makes", place=place)
                made.add(at)
            if operation.overwrites >= 0 and operation.overwrites not in operation.inputs:
                raise InputError(f"overwrites tensor {operation.overwrites}, which it does not read", place=place)
        return self


class Step(Value):
    """One step of a schedule.

    - "compute", "compute_in_place": operation `index`; in place, the tensor that it overwrites is gone afterwards.
    - "offload": begin to move tensor `index` (its encoded form if that is what there is) to `tier`; it stays as well.
    - "fetch": make room for tensor `index` and begin to move it back, in the form in which it went.
    - "encode", "decode": the other form of tensor `index`, which takes the place of the one there was.
    - "free": take tensor `index` off the device, in whichever form; waits until a transfer of it has ended.
    """

    action: Action
    index: int
    tier: Tier = "host"


class Schedule(Value):
    """The program that answers a problem: `policy` says who wrote it."""

    steps: tuple[Step, ...]
    policy: str = ""


class Price(Value):
    """What a schedule costs.

    `seconds`: from the first step to the end of the last computation. `repeated_seconds` of it recompute,
    `coding_seconds` encode and decode, and in `waiting_seconds` the compute stream waits for transfers. `peak_bytes`:
    the most that is on the device at once, while step `peak_step` is carried out. `tier_bytes`: the most that is off
    the device at once. `moved_bytes`: both directions together.
    """

    seconds: float
    peak_bytes: float
    repeated_seconds: float = 0.0
    coding_seconds: float = 0.0
    waiting_seconds: float = 0.0
    moved_bytes: float = 0.0
    tier_bytes: float = 0.0
    repeated: int = 0
    peak_step: int = -1
