"""What a training script calls: a handful of lines around an ordinary PyTorch loop.

    session = headway.start()
    model, optimizer = session.prepare(model, optimizer, loss=cross_entropy)
    for batch in session.shard(dataset, batch_size=32, steps=300):
        loss = session.step(batch)
    session.finish()

The environment decides what that does. Under plain `python`: one device, no torch.distributed. Under `torchrun` or
Slurm: data parallel, or the plan that HEADWAY_PLAN names. Under `headway run`: first traced, then trained under a plan.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from headway.errors import FieldError, InputError, PlanError, RunError, TraceError
from headway.exchange.ending import gather_bytes, leave_group
from headway.hardware.host import keep_freed_memory
from headway.plan.plan import Plan
from headway.train import measure
from headway.train.data import StepSampler, batch_size_of, share_of, slice_batch, split_batch
from headway.train.environment import device_of, join, path_in, place_among_ranks, read_plan, replicas_only
from headway.train.events import emit
from headway.train.parallel import Loss, Parallel, parallelise
from headway.train.saving import Saving
from headway.value import write_atomically
from headway.workload.graph import Graph, OptimizerKind, Workload

if TYPE_CHECKING:
    from headway.memory.remote_shared import MemoryNode
    from headway.memory.tiers import Store

__all__ = ["Session", "TraceComplete", "optimizer_kind", "start"]

_MEMORY_STEP = 2  # counted from 0: by then optimizer states exist and DDP has settled its buckets


class TraceComplete(SystemExit):
    """Ends a script that was only to be traced, once it is. Not an Exception: no `except` of the script catches it."""

    def __init__(self) -> None:
        super().__init__(0)


def start(*, precision: str = "float32") -> Session:
    """The session of this process, as the environment has it.

    `precision`: "float32", or "bfloat16" for autocast, with parameters and optimizer in float32; a plan's own
    precision goes before it. Raises PlanError if the plan is for another number of ranks, FieldError for a variable
    that makes no sense.
    """
    if precision not in ("float32", "bfloat16"):
        raise FieldError(f"{precision!r} is no precision", place="headway.start", remedy='"float32" or "bfloat16"')
    return Session(precision)


class Session:
    """One rank's part in a training run. Made by `start`; its methods are called in the order of the module's example.

    `rank` and `world_size` count processes, `device` is where this one computes, `steps_done` counts the steps made so
    far, those before a resume included.
    """

    def __init__(self, precision: str) -> None:
        keep_freed_memory()
        self.precision = precision
        self.is_trace = os.environ.get("HEADWAY_TASK") == "trace"
        if self.is_trace:
            from headway.workload.trace import construct_on_meta

            construct_on_meta()
            self.rank, self.world_size, local_rank = 0, 1, 0
        else:
            self.rank, self.world_size, local_rank = place_among_ranks()
        self.plan, self.workload = (None, None) if self.is_trace else read_plan(self.world_size)
        self.device = device_of(local_rank, self.is_trace)
        if self.world_size > 1 and not dist.is_initialized():
            join(self.rank, self.world_size, self.device, self.plan)
        self.steps: int | None = None
        directory = path_in("HEADWAY_RUN_DIRECTORY")
        self.run_directory = None if self.is_trace else directory
        folder = None if self.run_directory is None else self.run_directory / "checkpoint"
        self._saving = None if self.is_trace else Saving(folder, self.device)
        self.steps_done = 0 if self._saving is None else self._saving.resumed_step
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._scheduler: Any = None
        self._loss: Loss | None = None
        self._clip_norm: float | None = None
        self._parallel: Parallel | None = None
        self._memory_node: MemoryNode | None = None
        self._meter = measure.Meter(self.rank, self.device)
        self._is_sharded = False
        self._global_batch = 0
        self._steps_here = 0
        self._ended_at = 0.0
        self._wall_seconds: list[float] = []
        self._losses: deque[float] = deque(maxlen=10)
        self._expected: tuple[float, str] | None = None
        self._allocated_bytes = 0.0
        self._stop = False
        self._handlers: dict[int, Any] = {}
        if not self.is_trace:
            self._listen_for_stop()
        self._baseline_bytes = measure.resident_bytes()

    @property
    def replicas(self) -> int:
        """Data-parallel replicas: how many parts each global batch is divided into."""
        return self.plan.data if self.plan is not None else self.world_size

    @property
    def replica(self) -> int:
        """Which of the replicas this rank belongs to."""
        return self.plan.coordinates(self.rank)[1] if self.plan is not None else self.rank

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: Loss | None = None,
        clip_norm: float | None = None,
        scheduler: Any = None,
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Divide model and optimizer as the plan says, in place; the same two objects, which now hold this rank's part.

        `loss(output, targets)` gives the mean over the samples of a micro-batch; without it the model returns its loss
        (a scalar, or an output with `.loss`). `clip_norm` bounds the norm of all gradients together. `scheduler` is
        stepped after every update. Raises PlanError for what cannot be divided as planned.
        """
        if self._model is not None:
            raise InputError("prepare was called before", place="session.prepare", remedy="call it once")
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._loss, self._clip_norm = loss, clip_norm
        if not self.is_trace and (self.plan is None or self.workload is not None):
            self._parallelise(self.workload.graph if self.workload is not None else None)
        return model, optimizer

    def shard(
        self,
        dataset: Any,
        batch_size: int | None = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
    ) -> Iterator[Any]:
        """This replica's part of each step's batch, from the step where a checkpoint left off.

        `dataset` has a length and positions (then `batch_size` samples of all replicas together make a step, drawn from
        a permutation for each epoch that follows from `seed` alone), or is any other iterable of global batches (then
        leave `batch_size` out). `steps` in all; by default one epoch. `workers` processes load samples ahead.
        Raises InputError or PlanError where the sizes do not divide.
        """
        self._is_sharded = True
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or batch_size is None:
            return self._shard_batches(dataset, steps)
        self._plan_for(batch_size)
        sampler = StepSampler(
            len(dataset),
            batch_size,
            steps=steps,
            seed=seed,
            shuffle=shuffle,
            replica=self.replica,
            replicas=self.replicas,
            first_step=self.steps_done,
        )
        self.steps = sampler.steps
        if isinstance(dataset, torch.Tensor):
            return (dataset[positions] for positions in sampler)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            # Its own generator: drawing from the global one would change the numbers of a plain run.
            generator=torch.Generator().manual_seed(seed),
        )
        return iter(loader)

    def _shard_batches(self, batches: Iterable[Any], steps: int | None) -> Iterator[Any]:
        if steps is None and hasattr(batches, "__len__"):
            steps = len(batches)  # type: ignore[arg-type]
        self.steps = steps

        def parts() -> Iterator[Any]:
            for number, batch in enumerate(share_of(batches, self.replica, self.replicas)):
                if steps is not None and number >= steps:
                    return
                if number >= self.steps_done:
                    self._plan_for(batch_size_of(batch) * self.replicas)
                    yield batch

        return parts()

    def step(self, batch: Any) -> float:
        """Forward, backward and update over one batch; the mean loss over the global batch, the same on every rank.

        `batch` is (inputs, targets) with `loss`, or the model's inputs alone without: a tensor, a tuple of positional
        or a dict of keyword arguments, samples along dimension 0. It comes from `shard`; a script that never called
        `shard` gives the global batch on every rank. Raises InputError for a batch of another size than planned.
        """
        if self._model is None:
            raise InputError("nothing is prepared", place="session.step", remedy="call session.prepare before")
        if self._loss is not None and not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise InputError(
                f"the batch is a {type(batch).__name__}, not a pair (inputs, targets)",
                place="session.step",
                remedy="give (inputs, targets), or prepare without loss and give the model's inputs",
            )
        if self.is_trace:
            self._trace(batch)
        size = batch_size_of(batch)
        if not self._is_sharded and self.replicas > 1:
            share = self._divide(size, self.replicas)
            batch = slice_batch(batch, self.replica * share, (self.replica + 1) * share, size)
            size = share
        self._plan_for(size * self.replicas)
        if self._parallel is None:
            self._parallelise(self._graph(batch))
        assert self._parallel is not None
        micro_batches = 1 if self.plan is None else self.plan.micro_batches
        pairs = self._pairs(batch, micro_batches)
        begun_at = self.steps_done - self._steps_here
        last = _MEMORY_STEP if self.steps is None else self.steps - begun_at - 1
        watch_memory = self._steps_here == min(_MEMORY_STEP, last)
        with self._memory_log(pairs) if watch_memory else contextlib.nullcontext():
            keep = self._steps_here > 0 and not watch_memory
            with self._meter.step(self.steps_done + 1, keep=keep):
                loss = self._parallel.step(pairs)
                if self._scheduler is not None:
                    self._scheduler.step()
                value, stop = self._agree(loss)
        self._note(value, keep)
        if self._steps_here == _MEMORY_STEP + 1:
            measure.reset_resident_peak()  # the log itself took memory
        if stop:
            self._leave_in_good_order()
        assert self._saving is not None
        self._saving.after_step(self._parallel, self.steps_done, self._scheduler)
        return value

    def checkpoint(self, directory: str | Path | None = None) -> Path | None:
        """Write a checkpoint now, on all ranks at once; by default into the run directory, or nowhere without one.

        Raises CheckpointError.
        """
        if self._saving is None or self._parallel is None:
            return None
        place = None if directory is None else Path(directory)
        return self._saving.save(self._parallel, self.steps_done, self._scheduler, place)

    def expect_loss_below(self, value: float, what: str = "") -> None:
        """Let `finish` check that the mean loss of the last ten steps is below `value`; `what` says what that is."""
        self._expected = (value, what)

    def finish(self) -> None:
        """Write the last checkpoint and what was measured, and leave the other ranks.

        Raises CheckpointError, or RunError if the loss did not fall as `expect_loss_below` demanded.
        """
        if self._saving is None:
            return
        if self._saving.saved_step != self.steps_done:
            self.checkpoint()
        self._report()
        self._close()
        self._check_loss()
        if self.rank == 0:
            emit("done", step=self.steps_done)

    def _check_loss(self) -> None:
        if self._expected is None or not self._losses:
            return
        value, what = self._expected
        mean = statistics.fmean(self._losses)
        if self.rank == 0:
            emit("expectation", loss=mean, below=value, what=what, is_met=mean < value)
        if not mean < value:
            raise RunError(
                f"the loss of the last {len(self._losses)} steps is {mean:.4g} on average, "
                f"and was to fall below {value:.4g}" + (f" ({what})" if what else ""),
                place="session.expect_loss_below",
                remedy="train for more steps, or choose another learning rate",
            )

    # Setting up

    def _plan_for(self, batch_size: int) -> None:
        """Remember the global batch; under a plan it has to be the planned one."""
        if self.plan is not None and self.workload is not None and batch_size != self.plan.global_batch:
            raise PlanError(
                f"the script's global batch is {batch_size}, and the plan is for {self.plan.global_batch}",
                place="session.shard: batch_size",
                remedy="plan again for this batch, or use the planned batch_size",
            )
        if self.plan is not None and batch_size % (self.plan.micro_batch * self.plan.data):
            raise PlanError(
                f"a global batch of {batch_size} does not divide into {self.plan.data} replicas of micro-batches "
                f"of {self.plan.micro_batch}",
                place="session.shard: batch_size",
                remedy=f"use the planned batch_size, {self.plan.global_batch}",
            )
        self._global_batch = batch_size

    def _divide(self, size: int, parts: int) -> int:
        if size % parts:
            raise InputError(
                f"{size} samples do not divide among {parts} replicas",
                place="session.step",
                remedy=f"choose a batch of a multiple of {parts}",
            )
        return size // parts

    def _graph(self, batch: Any) -> Graph:
        """The model, traced here and now."""
        from headway.workload.trace import trace

        assert self._model is not None
        inputs, targets = self._pair(batch)
        return trace(self._model, inputs, name=type(self._model).__name__, loss=self._loss, target=targets)

    def _parallelise(self, graph: Graph | None) -> None:
        assert self._model is not None
        assert self._optimizer is not None
        plan = self.plan or replicas_only(self._model, self.world_size, self.precision)
        store = self._remote_store(plan, graph) if "remote" in plan.tiers else None
        self._parallel = parallelise(
            self._model,
            self._optimizer,
            plan,
            graph,
            rank=self.rank,
            device=self.device,
            loss=self._loss,
            clip_norm=self._clip_norm,
            meter=self._meter,
            store=store,
        )
        if self.world_size > 1:
            # Replicas and stages draw their own dropout masks; ranks that share operators must draw the same.
            pipeline, data, _ = plan.coordinates(self.rank)
            torch.manual_seed(torch.initial_seed() + 1_000_003 * (pipeline * plan.data + data))
        if self._saving is not None:
            self._saving.resume(self._parallel, self._scheduler)
        if self.rank == 0 and self.run_directory is not None:
            _forget_later_metrics(self.run_directory / "metrics.jsonl", self.steps_done)
        emit("ready", rank=self.rank)

    def _remote_store(self, plan: Plan, graph: Graph | None) -> Store | None:
        """The store of a plan that needs remote memory, where no launcher has started a memory node: a rank does.

        None where one has.
        """
        # Imported where used: most plans rest nothing elsewhere, and each rank would pay for it when it starts.
        from headway.train.remote_memory import VARIABLE, attach, join_memory_node
        from headway.train.tier_store import open_store

        if VARIABLE in os.environ:
            return None
        assert graph is not None
        assert self._optimizer is not None
        workload = self.workload or Workload(
            graph=graph, optimizer=optimizer_kind(self._optimizer), global_batch=plan.global_batch
        )
        remote, self._memory_node = join_memory_node(plan, workload, self.rank, self.device)
        return open_store(plan, self.rank, self.device, remote=attach(plan, self.rank, {}, remote))

    def _trace(self, batch: Any) -> None:
        assert self._optimizer is not None
        output = path_in("HEADWAY_TRACE_OUTPUT")
        if output is None:
            raise TraceError("nowhere to write the workload to", place="HEADWAY_TRACE_OUTPUT", remedy="name a file")
        Workload(
            graph=self._graph(batch),
            optimizer=optimizer_kind(self._optimizer),
            global_batch=batch_size_of(batch),
            precision=self.precision,
        ).save(output)
        raise TraceComplete

    # One step

    def _pair(self, batch: Any) -> tuple[Any, Any]:
        return (batch[0], batch[1]) if self._loss is not None else (batch, None)

    def _pairs(self, batch: Any, micro_batches: int) -> list[tuple[Any, Any]]:
        def to_device(leaf: Any) -> Any:
            return leaf.to(self.device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf

        moved = tree_map(to_device, batch) if self.device.type != "cpu" else batch
        return [self._pair(part) for part in split_batch(moved, micro_batches)]

    def _agree(self, loss: torch.Tensor | None) -> tuple[float, bool]:
        """The mean loss over all replicas, and whether a rank was asked to stop: one small all-reduce."""
        assert self._parallel is not None
        plan = self._parallel.plan
        if self.world_size == 1:
            assert loss is not None
            return loss.item(), self._stop
        figures = torch.zeros(2, dtype=torch.float64, device=self.device)
        if loss is not None and plan.coordinates(self.rank)[2] == 0:
            figures[0] = loss.detach() / plan.data
        figures[1] = float(self._stop)
        self._meter.waiting_kind = "bubble" if plan.pipeline > 1 else "communication"
        try:
            dist.all_reduce(figures)
        finally:
            self._meter.waiting_kind = "communication"
        value, stops = figures.tolist()
        return value, stops > 0

    def _note(self, loss: float, keep: bool) -> None:
        """Count the step, and let rank 0 tell of it."""
        self._steps_here += 1
        self._losses.append(loss)
        self.steps_done += 1
        now = time.perf_counter()
        last = self._meter.last
        assert last is not None
        # From the end of one step to the end of the next: loading data counts in what a user waits for.
        seconds = now - self._ended_at if self._ended_at else last.step_seconds
        self._ended_at = now
        if keep:
            self._wall_seconds.append(seconds)
        if self.rank != 0:
            return
        graph = self.workload.graph if self.workload is not None else None
        tokens = graph.tokens_per_sample * self._global_batch if graph is not None else 0
        emit(
            "step",
            step=self.steps_done,
            steps=self.steps,
            loss=loss,
            seconds=seconds,
            samples=self._global_batch,
            tokens=tokens,
        )
        if self.run_directory is not None:
            line = {
                "step": self.steps_done,
                "loss": loss,
                "seconds": seconds,
                "samples_per_second": self._global_batch / seconds,
                "tokens_per_second": tokens / seconds,
                **msgspec.to_builtins(last),
            }
            if self._expected is not None and self._steps_here == 1:
                line["reference_loss"] = {"value": self._expected[0], "label": self._expected[1]}
            self.run_directory.mkdir(parents=True, exist_ok=True)
            with (self.run_directory / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def _memory_log(self, pairs: list[tuple[Any, Any]]) -> Iterator[None]:
        assert self._parallel is not None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            return
        held = self._parallel.held_bytes(pairs)
        found: list[float] = []
        with measure.allocated_peak(found):
            yield
        self._allocated_bytes = held + found[0]

    # The end

    def _listen_for_stop(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        def ask(number: int, _frame: Any) -> None:
            if self._stop:
                # Asked twice: do what the signal does by itself.
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._stop = True

        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, ask)

    def _leave_in_good_order(self) -> None:
        self.checkpoint()
        self._report()
        emit("stopped", rank=self.rank, step=self.steps_done)
        self._close()
        raise SystemExit(130)

    def _close(self) -> None:
        if self._parallel is not None:
            self._parallel.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self.world_size > 1 and dist.is_initialized():
            leave_group(self.device)
        if self._memory_node is not None:
            self._memory_node.close()  # all ranks have let go of it

    def _report(self) -> None:
        """Say what was measured; rank 0 writes down what all ranks did."""
        if self._parallel is None or not self._steps_here:
            return
        resident = max(0.0, measure.resident_peak() - self._baseline_bytes)
        peak = self._allocated_bytes
        if self.device.type == "cuda":
            peak = float(torch.cuda.max_memory_allocated(self.device))
        mine = self._meter.measured(
            peak_bytes=peak, peak_resident_bytes=resident, tier_bytes=self._parallel.tier_bytes()
        )
        emit("measured", rank=self.rank, time=msgspec.to_builtins(mine.time), peak_bytes=peak)
        everyone = [msgspec.json.encode(mine)]
        if self.world_size > 1:
            everyone = gather_bytes(everyone[0], self.device)
        if self.rank != 0 or self.run_directory is None:
            return
        ranks = [msgspec.json.decode(each, type=measure.Measured) for each in everyone]
        # The rank that computes longest bounds the step; the others wait for it.
        bound = max(ranks, key=lambda each: each.time.compute_seconds + each.time.optimizer_seconds)
        seconds = statistics.median(self._wall_seconds) if self._wall_seconds else mine.time.step_seconds
        record = {
            "time": msgspec.to_builtins(bound.time),
            "peak_bytes": [each.peak_bytes for each in ranks],
            "peak_resident_bytes": [each.peak_resident_bytes for each in ranks],
            "tier_bytes": [each.tier_bytes for each in ranks],
            "steps": mine.steps,
            "samples_per_second": self._global_batch / seconds if seconds else 0.0,
            "ranks": [msgspec.to_builtins(each.time) for each in ranks],
        }
        write_atomically(self.run_directory / "measured.json", json.dumps(record, indent=2) + "\n")
        self._meter.timeline("measured", ranks).save_chrome(str(self.run_directory / "timeline.json"))


def optimizer_kind(optimizer: torch.optim.Optimizer) -> OptimizerKind:
    """What the optimizer keeps for each element of a parameter, found by letting it update a small one.

    `traffic_bytes_per_element`: the update reads parameter, gradient and states, and writes parameter and states.
    Raises TraceError if the optimizer cannot be made from its own defaults.
    """
    kind = type(optimizer)
    accepted = inspect.signature(kind.__init__).parameters
    options = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    parameter = nn.Parameter(torch.ones(64, 64))
    parameter.grad = torch.ones(64, 64)
    try:
        trial = kind([parameter], **options)
        trial.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TraceError(
            f"{kind.__name__} cannot update a small matrix: {error}",
            place="session.prepare: optimizer",
            remedy="use an optimizer that its own defaults can make, and whose step() needs no closure",
        ) from error
    elements = parameter.numel()
    states = [value for value in trial.state[parameter].values() if isinstance(value, torch.Tensor)]
    state_bytes = sum(value.numel() * value.element_size() for value in states if value.numel() > 1) / elements
    item = parameter.element_size()
    many = options.get("foreach") or (options.get("foreach") is None and torch.cuda.is_available())
    return OptimizerKind(
        name=kind.__name__,
        state_bytes_per_element=state_bytes,
        traffic_bytes_per_element=3 * item + 2 * state_bytes,
        # The foreach implementations of the adaptive optimizers make a denominator for all parameters at once.
        temporary_bytes_per_element=float(item) if many and state_bytes > item and not options.get("fused") else 0.0,
    )


def _forget_later_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after the checkpoint that training goes on from: they will be made once more."""
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        write_atomically(path, "".join(line + "\n" for line in kept))
