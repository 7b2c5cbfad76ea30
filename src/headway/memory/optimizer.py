"""The optimizer on the host: one fused pass over gradient, master, moments and parameter, on all cores.

A step with torch converts the gradient to float32, updates, and converts the parameter back, and each of these reads
and writes everything once more. Here the bfloat16 gradient goes in and the bfloat16 parameter comes out of the one pass
that updates the float32 master and the moments (ZeRO-Offload's CPU-Adam, Ren et al., ATC 2021, section 5.1).

With float32 moments the result is bit for bit that of `torch.optim.AdamW`, `Adam` and `SGD` on CPU, one tensor at a
time (`foreach=False`, what CPU tensors get unless asked otherwise). So it is for `fused=True`, but for the last
elements of a tensor that fill no vector register (fewer than 16): torch fuses other multiplications there.

States are plain tensors that the caller hands in, so that they can be resident, or stream through buffers of a `Store`;
any consecutive elements can be updated by themselves, so that a chunk travels while another is updated. Nothing of a
step is kept here.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch

from headway.errors import InputError
from headway.memory.update_kernels import (
    BLOCK_ELEMENTS,
    EXACT_ROOT,
    HAS_ESTIMATES,
    NEWTON_ROOT,
    adam_update,
    decode,
    dynamic_codes,
    encode,
    newton_roots,
    sgd_update,
)
from headway.plan.plan import Moments

__all__ = ["BLOCK_ELEMENTS", "HostOptimizer", "Rule", "StateTensor"]

Rule = Literal["adamw", "adam", "sgd"]
"""How parameters are updated."""

_PIECE_ELEMENTS = 128 << 10  # that a thread takes at a time; whole blocks of 8-bit moments
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
_REFUSED = ("amsgrad", "capturable", "differentiable")


@dataclass(frozen=True)
class StateTensor:
    """A tensor that the optimizer keeps for a parameter: one entry for each `elements` elements of it."""

    name: str
    dtype: torch.dtype
    elements: int = 1

    def count(self, elements: int) -> int:
        """Entries for so many elements."""
        return -(-elements // self.elements)


class _Step(NamedTuple):
    """What an update works on: the arguments of `HostOptimizer.step` as arrays."""

    number: int
    gradient: np.ndarray
    master: np.ndarray
    states: list[np.ndarray]
    out: np.ndarray
    scale: float
    start: int


class HostOptimizer:
    """The update of one group of parameters. Hyperparameters are read from `group` at each step, under torch's names.

    `rule`: "adamw", "adam" (weight decay added to the gradient) or "sgd". `moments`: how they are kept (see
    `update_kernels.py`). `is_fused`: compute the square root as torch's `fused=True` and its CUDA kernels do (the
    processor's own, rounded correctly), not as its default on CPU does, which takes several times as long.
    `threads`: None for as many as torch uses. Safe to use from several threads. Raises InputError for what is not
    supported (amsgrad, tensors as betas, capturable, differentiable).
    """

    def __init__(
        self,
        rule: Rule,
        group: Mapping[str, Any],
        *,
        moments: Moments = "float32",
        is_fused: bool = False,
        threads: int | None = None,
    ) -> None:
        if rule not in ("adamw", "adam", "sgd") or moments not in _DTYPES:
            raise InputError(
                f"no host optimizer is called {rule!r} with moments {moments!r}",
                remedy=f"adamw, adam or sgd, with moments of {', '.join(_DTYPES)}",
            )
        for option in _REFUSED:
            if group.get(option):
                raise InputError(f"{option}=True is not supported on the host", remedy=f"leave {option} out")
        if any(isinstance(beta, torch.Tensor) for beta in group.get("betas", ())):
            raise InputError("betas that are tensors are not supported on the host", remedy="give them as numbers")
        self.rule: Rule = rule
        self.group = group
        self.moments: Moments = moments
        self.moment_names = _moment_names(rule, group)
        self.states = tuple(state for name in self.moment_names for state in _state_tensors(name, moments))
        """What `step` wants as states, in this order."""
        self.threads = threads or torch.get_num_threads()
        # Nothing that torch has is equal to narrower moments, so they take the fast root.
        is_exact = rule != "sgd" and moments == "float32" and not is_fused
        self._root, self._called = _torch_root() if is_exact else (EXACT_ROOT, None)
        self._tables = _tables()
        self._workers: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @classmethod
    def for_torch(
        cls,
        optimizer: torch.optim.Optimizer,
        group: Mapping[str, Any],
        *,
        moments: Moments = "float32",
        threads: int | None = None,
    ) -> Self:
        """The update that `optimizer` makes of `group`, one of its param_groups (kept, so that schedulers reach it).

        Raises InputError where it is not exactly AdamW, Adam or SGD: a subclass may do anything.
        """
        kind = type(optimizer)
        if kind is torch.optim.SGD:
            rule: Rule = "sgd"
        elif kind is torch.optim.AdamW:
            rule = "adamw"
        elif kind is torch.optim.Adam:
            rule = "adamw" if group.get("decoupled_weight_decay") else "adam"
        else:
            raise InputError(
                f"{kind.__name__} cannot be updated on the host", remedy="use torch.optim.AdamW, Adam or SGD"
            )
        # On another device torch itself takes a square root that is rounded correctly, whatever the option says.
        is_elsewhere = any(each.device.type != "cpu" for its in optimizer.param_groups for each in its["params"])
        return cls(rule, group, moments=moments, is_fused=bool(group.get("fused")) or is_elsewhere, threads=threads)

    @property
    def state_bytes_per_element(self) -> float:
        """Bytes of the moments for each element of a parameter (the master's 4 are not among them)."""
        return sum(state.dtype.itemsize / state.elements for state in self.states)

    def new_states(self, elements: int) -> list[torch.Tensor]:
        """States of zeros for so many elements, in host memory."""
        states = [torch.zeros(state.count(elements), dtype=state.dtype) for state in self.states]
        for name, zeros in zip(self.moment_names, [torch.zeros(elements)] * len(self.moment_names), strict=True):
            if self.moments == "int8":  # a code of 0 is not the number 0
                self.write_moment(states, name, zeros)
        return states

    def step(
        self,
        number: int,
        gradient: torch.Tensor,
        master: torch.Tensor,
        states: Sequence[torch.Tensor],
        out: torch.Tensor | None = None,
        *,
        start: int = 0,
        gradient_scale: float = 1.0,
    ) -> None:
        """Step `number` (from 1) of these elements: changes `master` and `states`, and puts the parameter into `out`.

        All are contiguous tensors in host memory. `master`: float32, the parameter itself where it is float32.
        `gradient`, `out`: float32 or bfloat16, as many elements. `states`: as `self.states` lists them. `start`: the
        place of the first element in its parameter, a multiple of 256 (only moments narrower than float32 depend on
        it). `gradient_scale` multiplies gradients before all else (clipping). Lets other threads run. Raises
        InputError where a tensor is not what it should be.
        """
        elements = master.numel()
        self._check(number, gradient, master, states, out, start)
        arrays = [_array(tensor) for tensor in states]
        source, target = _array(gradient), _array(master)
        empty = np.empty(0, np.uint16)  # a type that is compiled for anyway
        written = empty if out is None else _array(out)
        step = _Step(number, source, target, arrays, written, gradient_scale, start)
        update = self._sgd(step) if self.rule == "sgd" else self._adam(step)
        pieces = [(a, min(a + _PIECE_ELEMENTS, elements)) for a in range(0, elements, _PIECE_ELEMENTS)]
        self._on_all_threads(update, pieces)

    def read_moment(self, states: Sequence[torch.Tensor], name: str, into: torch.Tensor) -> None:
        """The moment `name` (one of `moment_names`) in float32, however it is kept."""
        stored, scales = self._moment(states, name)
        if self.moments == "float32":
            into.copy_(stored)
        else:
            decode(_array(stored), _scales(scales), self._tables[name == "exp_avg_sq"], _array(into))

    def write_moment(self, states: Sequence[torch.Tensor], name: str, values: torch.Tensor, *, start: int = 0) -> None:
        """Put the moment `name` down, from float32, as it is kept."""
        stored, scales = self._moment(states, name)
        if self.moments == "float32":
            stored.copy_(values)
        else:
            encode(_array(values), _array(stored), _scales(scales), name != "exp_avg_sq", start, 0)

    def close(self) -> None:
        """Stop the threads. Idempotent; a later step starts them again."""
        with self._lock:
            if self._workers is not None:
                self._workers.shutdown()
                self._workers = None

    # The update

    def _adam(self, step: _Step) -> Callable[[int, int], None]:
        number, gradient, master, states, out, scale, start = step
        group = self.group
        rate, eps, decay = float(group["lr"]), group["eps"], float(group["weight_decay"])
        beta1, beta2 = group["betas"]
        # In double precision and in torch's order, as everything that is computed once for all elements.
        step_size = rate / (1 - beta1 ** float(number))
        correction = (1 - beta2 ** float(number)) ** 0.5
        weight = np.float32(1 - beta1)
        from_gradient = bool(abs(weight) >= np.float32(0.5))  # torch's lerp starts from the nearer end
        is_decoupled = self.rule == "adamw"
        scalars = np.array(
            [
                -scale if group.get("maximize") else scale,
                1 - rate * decay if is_decoupled else decay,
                weight - np.float32(1) if from_gradient else weight,
                from_gradient,
                beta2,
                1 - beta2,
                -step_size,
                correction,
                eps,
            ],
            np.float32,
        )
        none = np.empty(0, np.float32)
        first, first_scales, second, second_scales = (
            states if self.moments == "int8" else (states[0], none, states[1], none)
        )
        root, tables, seed = self._root, self._tables, _seed(number)

        def update(a: int, b: int) -> None:
            part = slice(a, b)
            blocks = slice(a // BLOCK_ELEMENTS, -(-b // BLOCK_ELEMENTS))
            adam_update(
                gradient[part], master[part], first[part], first_scales[blocks], second[part], second_scales[blocks],
                out[part], scalars, is_decoupled, root, tables, start + a, seed,
            )  # fmt: skip

        return update

    def _sgd(self, step: _Step) -> Callable[[int, int], None]:
        number, gradient, master, states, out, scale, start = step
        group = self.group
        momentum = float(group["momentum"])
        scalars = np.array(
            [
                -scale if group.get("maximize") else scale,
                float(group["weight_decay"]),
                momentum,
                1 - group["dampening"],
                -float(group["lr"]),
            ],
            np.float32,
        )
        none = np.empty(0, np.float32)
        has_momentum = bool(self.moment_names)
        buffer = states[0] if has_momentum else none
        scales = states[1] if len(states) > 1 else none
        tables, seed, is_nesterov, is_first = self._tables, _seed(number), bool(group["nesterov"]), number == 1

        def update(a: int, b: int) -> None:
            part = slice(a, b)
            blocks = slice(a // BLOCK_ELEMENTS, -(-b // BLOCK_ELEMENTS))
            sgd_update(
                gradient[part], master[part], buffer[part], scales[blocks], out[part], scalars, has_momentum,
                is_first, is_nesterov, tables, start + a, seed,
            )  # fmt: skip

        return update

    def _on_all_threads(self, update: Callable[[int, int], None], pieces: list[tuple[int, int]]) -> None:
        count = min(self.threads, len(pieces))
        turns = itertools.count()

        def work() -> None:
            with contextlib.nullcontext() if self._called is None else self._called.alone():
                # Pieces are taken in turn: a thread that is held up holds nobody up.
                while (turn := next(turns)) < len(pieces):
                    update(*pieces[turn])

        if count <= 1:
            work()
            return

        with self._lock:
            if self._workers is None:
                self._workers = ThreadPoolExecutor(max(self.threads - 1, 1), "headway-update")
            futures = [self._workers.submit(work) for _ in range(count - 1)]
        work()
        for future in futures:
            future.result()

    def _check(
        self,
        number: int,
        gradient: torch.Tensor,
        master: torch.Tensor,
        states: Sequence[torch.Tensor],
        out: torch.Tensor | None,
        start: int,
    ) -> None:
        elements = master.numel()
        half = (torch.float32, torch.bfloat16)
        wanted = [("gradient", gradient, half, elements), ("master", master, (torch.float32,), elements)]
        if out is not None:
            wanted.append(("out", out, half, elements))
        if len(states) != len(self.states):
            names = ", ".join(state.name for state in self.states) or "none"
            raise InputError(f"{len(states)} states", remedy=f"give these: {names}")
        for kept, tensor in zip(self.states, states, strict=True):
            wanted.append((kept.name, tensor, (kept.dtype,), kept.count(elements)))
        for name, tensor, dtypes, count in wanted:
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise InputError(f"{name} is not a contiguous tensor in host memory", remedy="copy it there")
            if tensor.dtype not in dtypes or tensor.numel() != count:
                raise InputError(
                    f"{name} has {tensor.numel()} elements of {tensor.dtype}",
                    remedy=f"give {count} elements of {' or '.join(map(str, dtypes))}",
                )
        if number < 1 or start < 0 or start % BLOCK_ELEMENTS:
            raise InputError(
                f"step {number} from element {start}",
                remedy=f"steps count from 1, and chunks start at multiples of {BLOCK_ELEMENTS} elements",
            )

    def _moment(self, states: Sequence[torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            at = next(i for i, state in enumerate(self.states) if state.name == name)
        except StopIteration:
            raise InputError(f"no moment is called {name!r}", remedy=f"one of {self.moment_names}") from None
        return states[at], states[at + 1] if self.moments == "int8" else None


def _moment_names(rule: Rule, group: Mapping[str, Any]) -> tuple[str, ...]:
    if rule == "sgd":
        return ("momentum_buffer",) if group["momentum"] else ()
    return ("exp_avg", "exp_avg_sq")


def _state_tensors(name: str, moments: Moments) -> Iterator[StateTensor]:
    yield StateTensor(name, _DTYPES[moments])
    if moments == "int8":
        yield StateTensor(f"{name}_scale", torch.float32, BLOCK_ELEMENTS)


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Codes of 8 bits, with a sign and without."""
    return dynamic_codes(signed=True), dynamic_codes(signed=False)


class _CalledRoot:
    """The square root that torch's CPU kernels call for float32: MKL's vmsSqrt at `address`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.address = ctypes.cast(library.vmsSqrt, ctypes.c_void_p).value or 0
        self._set_threads = library.MKL_Set_Num_Threads_Local

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """MKL works in this thread alone. It would start as many others for 128 numbers as for a million, in each of
        our threads, and then takes hundreds of times as long."""
        before = self._set_threads(1)
        try:
            yield
        finally:
            self._set_threads(before)


@cache
def _torch_root() -> tuple[int, _CalledRoot | None]:
    """Which square root torch's CPU kernels take for float32, as `adam_update` wants it, and what is called for it.

    Each is a function of the significand and of whether the exponent is even: one in 29 of these is compared, and some
    others; the tests compare all. Roots that are made in another way differ in many more. `EXACT_ROOT` also where
    nothing is the same: the nearest that one can get.
    """
    numbers = [np.arange(126 << 23, 128 << 23, 29, dtype=np.uint32)]
    numbers.append(np.random.default_rng(0).integers(0, 0x7F800001, 1 << 18, np.uint32))
    numbers.append(np.arange(0x7F7F0000, 0x7F800001, dtype=np.uint32))
    candidates = {EXACT_ROOT, NEWTON_ROOT} if HAS_ESTIMATES else {EXACT_ROOT}
    for each in (bits.view(np.float32) for bits in numbers):
        wanted = torch.from_numpy(each).sqrt().numpy()
        if EXACT_ROOT in candidates and not np.array_equal(np.sqrt(each), wanted):
            candidates.discard(EXACT_ROOT)
        if NEWTON_ROOT in candidates:
            made = np.empty_like(each)
            newton_roots(each, made)
            if not np.array_equal(made, wanted):
                candidates.discard(NEWTON_ROOT)
        if not candidates:
            break
    if candidates:
        return min(candidates), None
    called = _mkl_root()
    return (EXACT_ROOT, None) if called is None else (called.address, called)


@cache
def _mkl_root() -> _CalledRoot | None:
    """MKL's square root, from the library that torch brings along; None where it has none."""
    try:
        return _CalledRoot(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")))
    except (OSError, AttributeError):
        return None


def _seed(number: int) -> int:
    """For rounding at random in this step."""
    return (number * 0x2545F491 + 0x1B873593) & 0xFFFFFFFF


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A flat array that shares the tensor's memory, bfloat16 as its bits."""
    flat = tensor.detach().reshape(-1)
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


def _scales(scales: torch.Tensor | None) -> np.ndarray:
    return np.empty(0, np.float32) if scales is None else _array(scales)
