"""Carries a schedule out in a real training step, at the granularity of operators.

`measure` watches one ordinary step and makes a `Problem` of it, with the times that it took. Any policy answers it;
`execute` runs a further step under the answer. In that step a program decides what is on the device: results of
forward operators are held by a table, not by autograd, which gets handles through its saved-tensor hooks. Before each
operator of the model, the steps that the schedule puts there are carried out: tensors are dropped, written to a
`Store` or read back, encoded or decoded, and operators run again on what they read the first time, with the same
random numbers. So gradients are the very same bits as without.

What a step does must not change from one to the next: the same operators in the same order. Gradients have to be unset
before each (`zero_grad(set_to_none=True)`). What the user's own code holds on to stays, whatever the schedule says.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from headway.errors import InputError, MismatchError
from headway.memory.swapping.building import kind_of, with_encodings
from headway.memory.swapping.decisions import refuse
from headway.memory.swapping.encodings import Encoded, PoolWindow, decoded, encoded
from headway.memory.swapping.planning import Answer, solve
from headway.memory.swapping.problem import Operation, Path, Problem, Schedule, Step, Tensor
from headway.memory.swapping.watching import Geometry, Watcher, flat, in_backward, shaped
from headway.memory.tiers import Pending, Store
from headway.value import Value

__all__ = ["Executed", "execute", "measure", "settle"]

_SEEDED = torch.Tag.nondeterministic_seeded
_BUFFERS = ("running_mean", "running_var")
_names = itertools.count()


class Executed(Value):
    """What a step under a schedule did. `peak_bytes`: of tensors that operators made, gradients of parameters apart.

    `unplanned`: tensors that were needed before the schedule brought them back, and were brought back at once.
    `accelerator_peak_bytes`: the allocator's own peak above what was there before; 0 on a CPU.
    """

    seconds: float
    peak_bytes: int
    repeated: int = 0
    moved_bytes: int = 0
    encoded_bytes_saved: int = 0
    unplanned: int = 0
    accelerator_peak_bytes: int = 0


# ------------------------------------------------------------------------------------------------------------ measure


def measure(
    step: Callable[[], object],
    *,
    name: str = "step",
    device: torch.device | str = "cpu",
    paths: Iterable[Path] = (),
    memory_bytes_per_second: float = 10e9,
    sparsity: float = 0.5,
) -> Problem:
    """Run `step` (forward, loss, backward) once, and say what it did as a problem.

    Times are measured operator by operator, which on a GPU means that each is waited for. Raises InputError if the
    step has no backward pass.
    """
    recorder = _Recorder(torch.device(device))
    with recorder:
        step()
    if not any(operation.backward for operation in recorder.found):
        raise InputError("the step has no backward pass", place=name, remedy="call loss.backward() in it")
    problem = recorder.problem(name, tuple(paths))
    return with_encodings(problem, memory_bytes_per_second, sparsity=sparsity)


class _Recorder(Watcher):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: list[Operation] = []
        self.made: list[Tensor] = []
        self.unpacked: list[int] = []
        self._began = 0.0
        self._read: list[int] = []

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def before(self, func, args, kwargs, read) -> None:
        self._read = list(dict.fromkeys([*self.unpacked, *read]))
        self.unpacked = []
        self._began = self._clock()

    def after(self, func, made, overwritten) -> None:
        seconds = self._clock() - self._began
        name = func._schema.name.removeprefix("aten::")
        position = self.operators
        backward = in_backward()
        for number, tensor in made:
            size = tensor.untyped_storage().nbytes()
            self.made.append(Tensor(name=f"{position}:{name}:{number}", bytes=float(size), maker=position))
        self.found.append(
            Operation(
                name=f"{position}:{name}",
                seconds=seconds,
                inputs=tuple(self._read),
                outputs=tuple(number for number, _ in made),
                backward=backward,
                overwrites=overwritten if overwritten in self._read else -1,
                repeatable=not backward,
                kind=kind_of(name),
                source=position,
            )
        )

    def pack(self, tensor: torch.Tensor) -> Any:
        return tensor, self.number_of(tensor)

    def unpack(self, packed: Any) -> torch.Tensor:
        tensor, number = packed
        if number >= 0:
            self.unpacked.append(number)
        return tensor

    def problem(self, name: str, paths: tuple[Path, ...]) -> Problem:
        read = {at for operation in self.found for at in operation.inputs}
        tensors = tuple(
            # Gradients of parameters are counted with the model states.
            Tensor(name=tensor.name, bytes=0.0, maker=tensor.maker)
            if at not in read and self.found[tensor.maker].backward
            else tensor
            for at, tensor in enumerate(self.made)
        )
        return Problem(name=name, operations=tuple(self.found), tensors=tensors, paths=paths)


# ------------------------------------------------------------------------------------------------------------ execute


def execute(
    step: Callable[[], object],
    problem: Problem,
    schedule: Schedule,
    *,
    store: Store | None = None,
    device: torch.device | str = "cpu",
) -> Executed:
    """Run `step` on `device` as `schedule` says; `problem` must have been measured on the same step.

    `store`: where tensors go that the schedule offloads, made for the same device. Raises MismatchError if the step
    does other operators than the measured one, InputError if the schedule moves tensors and there is no store, or
    computes operators for the first time in another order.
    """
    executor = _Executor(problem, schedule, store, torch.device(device))
    before = 0
    if executor.accelerator:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    try:
        with executor:
            step()
            executor.finish()
        if executor.accelerator:
            torch.cuda.synchronize()
        return Executed(
            seconds=time.perf_counter() - begin,
            peak_bytes=executor.peak_bytes,
            repeated=executor.repeated,
            moved_bytes=executor.moved_bytes,
            encoded_bytes_saved=executor.encoded_bytes_saved,
            unplanned=executor.unplanned,
            accelerator_peak_bytes=torch.cuda.max_memory_allocated() - before if executor.accelerator else 0,
        )
    finally:
        executor.close()


def settle(
    step: Callable[[], object],
    problem: Problem,
    budget_bytes: float,
    policy: str = "capuchin",
    *,
    store: Store | None = None,
    device: torch.device | str = "cpu",
    rounds: int = 4,
    seed: int = 0,
    seconds: float = 20.0,
) -> tuple[Answer, Executed]:
    """A schedule whose measured peak is within the budget: plan, run a step, and plan for less by what was too much.

    What the model's own code holds on to is nothing that a schedule knows. Raises DoesNotFitError if `rounds` steps
    are not enough, or the policy cannot get that low.
    """
    aim = budget_bytes
    done = None
    for _ in range(rounds):
        answer = solve(problem, aim, policy, seed=seed, seconds=seconds)
        done = execute(step, problem, answer.schedule, store=store, device=device)
        if done.peak_bytes <= budget_bytes:
            return answer, done
        aim -= done.peak_bytes - budget_bytes
    assert done is not None
    raise refuse(problem, f"{policy}, measured,", done.peak_bytes, budget_bytes)


class _Argument:
    """A tensor argument of a recorded operator: a tensor of the step (by number), or one given from outside."""

    __slots__ = ("geometry", "given", "number")

    def __init__(self, number: int, geometry: Geometry | None, given: torch.Tensor | None) -> None:
        self.number = number
        self.geometry = geometry
        self.given = given


class _Call:
    """A recorded operator, to be run again. It holds no tensor of the step alive."""

    __slots__ = ("args", "func", "grad", "kwargs", "random")

    def __init__(self, func: Any, args: Any, kwargs: Any, random: torch.Tensor | None, grad: bool) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.random = random
        self.grad = grad  # some kernels keep a workspace only where gradients are wanted


class _Handle:
    """What autograd keeps in place of a saved tensor."""

    __slots__ = ("geometry", "number")

    def __init__(self, number: int, geometry: Geometry) -> None:
        self.number = number
        self.geometry = geometry


class _Executor(Watcher):
    def __init__(self, problem: Problem, schedule: Schedule, store: Store | None, device: torch.device) -> None:
        super().__init__()
        self.problem = problem
        self.steps = schedule.steps
        self.store = store
        self.uncounted = frozenset(at for at, tensor in enumerate(problem.tensors) if tensor.bytes == 0)
        self.device = device
        self.accelerator = device.type == "cuda"
        self.held: dict[int, torch.UntypedStorage] = {}
        self.codes: dict[int, Encoded] = {}
        self.away: dict[int, tuple[str, int, Encoded | None]] = {}
        self.outgoing: dict[int, tuple[Pending, torch.Tensor]] = {}
        self.incoming: dict[int, tuple[Pending, torch.Tensor]] = {}
        self.calls: dict[int, _Call] = {}
        self.geometry: dict[int, Geometry] = {}
        self.windows: dict[int, PoolWindow] = {}
        self._window: PoolWindow | None = None
        self.repeated = self.moved_bytes = self.encoded_bytes_saved = self.unplanned = 0
        self._at = 0
        self._prefix = f"activation-{next(_names)}"
        self._in_place: dict[int, bool] = {}
        seen: set[int] = set()
        self._repeats: set[int] = set()
        expected = 0
        for step in self.steps:
            if step.action in ("offload", "fetch") and store is None:
                raise InputError("the schedule moves tensors", place=problem.name, remedy="give a Store")
            if step.action.startswith("compute"):
                if step.index in seen:
                    self._repeats.add(step.index)
                elif step.index != expected:
                    raise InputError(
                        f"operation {step.index} comes in another order than in the step",
                        place=problem.name,
                        remedy="use a policy that keeps the order (swapadvisor: reorder=False)",
                    )
                else:
                    self._in_place[step.index] = step.action == "compute_in_place"
                    expected += 1
                seen.add(step.index)

    def close(self) -> None:
        """Let go of everything."""
        for transfers in (self.outgoing, self.incoming):
            for index in list(transfers):
                self._settle(transfers, index)
        if self.store is not None:
            for name, _, _ in self.away.values():
                self.store.remove(name)
        self.away.clear()
        self.held.clear()
        self.calls.clear()
        self.codes.clear()

    def finish(self) -> None:
        """The steps after the last operator."""
        if self.operators != len(self.problem.operations):
            raise MismatchError(
                f"the step ended after operator {self.operators}, and the measured one did "
                f"{len(self.problem.operations)}",
                place=self.problem.name,
            )
        self._advance()

    # ----------------------------------------------------------------------------------- the model's own operators

    def before(self, func, args, kwargs, read) -> None:
        position = self.operators
        name = func._schema.name.removeprefix("aten::")
        operations = self.problem.operations
        if position >= len(operations) or operations[position].name != f"{position}:{name}":
            wanted = operations[position].name if position < len(operations) else "nothing more"
            raise MismatchError(
                f"operator {position} is {name}, and was {wanted} when the step was measured",
                place=self.problem.name,
                remedy="measure a step that does the same: unset gradients before it, and keep shapes and branches",
            )
        self._advance()
        operation = operations[position]
        self._window = _pool_window(args) if name == "max_pool2d_with_indices" else None
        if not operation.backward:
            if position in self._repeats:
                self.calls[position] = self._recorded(func, args, kwargs)
            over = operation.overwrites
            if over >= 0 and over in self.held:
                storage = self.held.pop(over)
                if not self._in_place.get(position, True):
                    # The schedule wants to read what this operator is about to overwrite.
                    self._hold(over, self._copied(storage))

    def after(self, func, made, overwritten) -> None:
        position = self.operators
        operation = self.problem.operations[position]
        if not operation.backward:
            for number, tensor in made:
                self.held[number] = tensor.untyped_storage()
                if self.problem.tensors[number].encoding is not None:
                    self.geometry[number] = Geometry(tensor)
                    if self._window is not None:
                        self.windows[number] = self._window
        self._at += 1

    def pack(self, tensor: torch.Tensor) -> Any:
        number = self.number_of(tensor)
        if number < 0 or tensor.is_conj() or tensor.is_neg() or self.problem.tensors[number].bytes == 0:
            return tensor
        if self.problem.operations[self.problem.tensors[number].maker].backward:
            return tensor
        return _Handle(number, Geometry(tensor))

    def unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Handle):
            return packed
        self._advance()
        self._passing = True
        try:
            with torch.no_grad():
                return shaped(self._present(packed.number), packed.geometry)
        finally:
            self._passing = False

    # -------------------------------------------------------------------------------------------------- the schedule

    def _advance(self) -> None:
        """Everything that the schedule has before the next operator of the model."""
        while self._at < len(self.steps):
            step = self.steps[self._at]
            if step.action.startswith("compute") and step.index == self.operators:
                return
            self._at += 1
            self._passing = True
            try:
                with torch.no_grad():
                    self._carry_out(step)
            finally:
                self._passing = False

    def _carry_out(self, step: Step) -> None:
        index = step.index
        if step.action.startswith("compute"):
            self._repeat(index, in_place=step.action == "compute_in_place")
        elif self.problem.operations[self.problem.tensors[index].maker].backward:
            return  # gradients belong to autograd
        elif step.action == "free":
            self._settle(self.outgoing, index)
            self._settle(self.incoming, index)
            self.held.pop(index, None)
            self.codes.pop(index, None)
        elif step.action == "offload":
            self._offload(index, step.tier)
        elif step.action == "fetch":
            self._fetch(index)
        elif step.action == "encode":
            self._encode(index)
        else:
            self._decode(index)

    def _hold(self, number: int, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        self.held[number] = storage
        self.known(storage, number)
        return storage

    def _present(self, number: int) -> torch.UntypedStorage:
        """The storage of a tensor, brought back at once if the schedule has not."""
        self._settle(self.incoming, number)
        storage = self.held.get(number)
        if storage is not None:
            return storage
        self._passing, passing = True, self._passing
        try:
            with torch.no_grad():
                if number in self.codes:
                    self._decode(number)
                elif number in self.away:
                    self._fetch(number)
                    return self._present(number)
                else:
                    self.unplanned += 1
                    maker = self.problem.tensors[number].maker
                    if maker not in self.calls:
                        raise MismatchError(
                            f"tensor {number} is needed again, and the schedule has let it go for good",
                            place=self.problem.name,
                        )
                    kept = set(self.held)
                    self._repeat(maker, in_place=False)
                    storage = self.held[number]
                    for other in set(self.held) - kept:  # unplanned: nobody would free them
                        del self.held[other]
                    return storage
        finally:
            self._passing = passing
        return self.held[number]

    def _recorded(self, func: Any, args: Any, kwargs: Any) -> _Call:
        def keep(tensor: torch.Tensor) -> _Argument:
            number = self.number_of(tensor)
            if number < 0:
                return _Argument(-1, None, tensor.detach())
            return _Argument(number, Geometry(tensor), None)

        self._passing = True
        try:
            args, kwargs = pytree.tree_map_only(torch.Tensor, keep, (args, kwargs))
        finally:
            self._passing = False
        random = None
        if _SEEDED in func.tags:
            random = torch.cuda.get_rng_state() if self.accelerator else torch.get_rng_state()
        return _Call(func, args, kwargs, random, torch.is_grad_enabled())

    def _repeat(self, position: int, *, in_place: bool) -> None:
        call = self.calls[position]
        operation = self.problem.operations[position]
        over = operation.overwrites

        def give(argument: Any) -> Any:
            if not isinstance(argument, _Argument):
                return argument
            if argument.geometry is None:
                return argument.given
            storage = self._present(argument.number)
            if argument.number == over and not in_place:
                storage = self._copied(storage)
            return shaped(storage, argument.geometry)

        is_argument = lambda leaf: isinstance(leaf, _Argument)  # noqa: E731
        args, kwargs = pytree.tree_map(give, (call.args, call.kwargs), is_leaf=is_argument)
        args = self._without_buffers(call.func, args)
        with (
            torch._C._AutoDispatchBelowAutograd(),  # type: ignore[attr-defined]
            torch.set_grad_enabled(call.grad),
            torch.autocast(self.device.type, enabled=False),
        ):
            result = self._with_random(call, args, kwargs)
        self.repeated += 1
        made = _made(args, kwargs, result, overwrites=over >= 0)
        if over >= 0 and in_place:
            self.held.pop(over, None)
        for number, storage in zip(operation.outputs, made):
            if number not in self.held:
                self._hold(number, storage)

    def _with_random(self, call: _Call, args: Any, kwargs: Any) -> Any:
        """The call with the random numbers that it had the first time."""
        if call.random is None:
            return call.func(*args, **kwargs)
        get, put = torch.get_rng_state, torch.set_rng_state
        if self.accelerator:
            get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
        now = get()
        try:
            put(call.random)
            return call.func(*args, **kwargs)
        finally:
            put(now)

    @staticmethod
    def _without_buffers(func: Any, args: Any) -> Any:
        """Running statistics were updated the first time: a repetition updates copies."""
        arguments = func._schema.arguments
        return tuple(
            value.clone() if position < len(arguments) and arguments[position].name in _BUFFERS and value is not None
            else value
            for position, value in enumerate(args)
        )  # fmt: skip

    @staticmethod
    def _copied(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        return flat(storage).clone().untyped_storage()

    # --------------------------------------------------------------------------------------- transfers and encodings

    def _offload(self, index: int, tier: str) -> None:
        assert self.store is not None
        if index in self.away:
            return
        code = self.codes.get(index)
        bytes_ = flat(code.payload.untyped_storage()) if code is not None else flat(self.held[index])
        name = f"{self._prefix}-{index}"
        if bytes_.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.away[index] = (name, bytes_.numel(), code.without_payload() if code is not None else None)
        self.moved_bytes += bytes_.numel()
        self.outgoing[index] = (self.store.write(name, bytes_, tier), bytes_)  # type: ignore[arg-type]

    def _fetch(self, index: int) -> None:
        assert self.store is not None
        name, size, code = self.away[index]
        self._settle(self.outgoing, index)
        into = torch.empty(size, dtype=torch.uint8, device=self.device)
        storage = into.untyped_storage()
        if code is not None:
            self.codes[index] = code.with_payload(flat(storage))
            self.known(storage, index)
        else:
            self._hold(index, storage)
        del storage
        self.moved_bytes += size
        self.incoming[index] = (self.store.read(name, into), into)

    @staticmethod
    def _settle(transfers: dict[int, tuple[Pending, torch.Tensor]], index: int) -> None:
        """Wait for a transfer, and take the memory from the tensor that the store may go on to hold."""
        found = transfers.pop(index, None)
        if found is not None:
            found[0].wait()
            found[1].set_()  # type: ignore[call-overload]

    def _encode(self, index: int) -> None:
        encoding = self.problem.tensors[index].encoding
        storage = self.held.pop(index, None)
        if encoding is None or storage is None:
            return
        code = encoded(encoding.name, storage, self.geometry[index], self.windows.get(index))
        self.encoded_bytes_saved += storage.nbytes() - code.payload.numel()
        self.known(code.payload.untyped_storage(), index)
        self.codes[index] = code

    def _decode(self, index: int) -> None:
        self._settle(self.incoming, index)
        code = self.codes.pop(index)
        self._hold(index, decoded(code))


def _made(args: Any, kwargs: Any, result: Any, *, overwrites: bool) -> list[torch.UntypedStorage]:
    """The storages that an operator made, in the order in which the watcher numbers them."""
    given = [leaf.untyped_storage() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    made = given[:1] if overwrites else []
    seen = {storage._cdata for storage in given}
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                made.append(storage)
    return made


def _pool_window(args: Any) -> PoolWindow | None:
    kernel = args[1]
    stride = args[2] if len(args) > 2 and args[2] else kernel
    padding = args[3] if len(args) > 3 else (0, 0)
    if not all(len(sizes) == 2 for sizes in (stride, padding)):
        return None
    return PoolWindow(args[0].shape[-1], tuple(stride), tuple(padding))  # type: ignore[arg-type]
