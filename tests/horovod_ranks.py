"""What ranks do in the tests of `headway.horovod` and its controller: `python horovod_ranks.py RESULTS SCENARIO…`.

Each scenario is a function that runs on every rank and asserts; what it raised, or "", is written for the test to see.
The comparison is plain `torch.distributed` arithmetic on the same inputs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import headway.horovod as hvd
from headway.errors import InputError, MismatchError, RankFailedError, StalledError
from headway.exchange import controller
from headway.exchange.adasum import reference
from headway.exchange.autotune import Setting
from headway.horovod.ranks import context

SIZE = 3
DEADLINE_SECONDS = 90


def run(folder: Path, *worlds: tuple[int, list[str]]) -> dict[str, list[str]]:
    """Run the scenarios of each world (of so many ranks) on real processes, one world after the other.

    For each scenario what it raised by rank, "killed" where it was to die in it. Torch is imported once, and the ranks
    are forked from there: that is most of the time.
    """
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    texts = [f"{size}:{','.join(scenarios)}" for size, scenarios in worlds]
    command = [sys.executable, "-W", "error", __file__, str(folder), *texts]
    with (folder / "output.txt").open("w") as output:
        child = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            child.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # the results tell how far it came
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    results: dict[str, list[str]] = {}
    for size, scenarios in worlds:
        for rank in range(size):
            for scenario in scenarios:
                path = folder / f"{scenario}-{rank}.txt"
                lost = f"did not get there:\n{(folder / 'output.txt').read_text()[-3000:]}"
                results.setdefault(scenario, []).append(path.read_text() if path.exists() else lost)
    return results


def same(got: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(got, expected, **(tolerance or {"rtol": 1e-6, "atol": 1e-6}))


@contextlib.contextmanager
def raises(kind: type[Exception], *texts: str):
    found = ""
    try:
        yield
    except kind as error:
        found = str(error)
    assert found, f"{kind.__name__} was not raised"
    for text in texts:
        assert text in found, f"{text!r} is not in {found}"


def plain(tensor: Any, op: str = "SUM") -> Any:
    """What torch.distributed makes of a tensor over all ranks."""
    result = tensor.detach().clone()
    dist.all_reduce(result, getattr(dist.ReduceOp, op))
    return result


def numbers(*shape: int, seed: int = 0) -> Any:
    """Other numbers on each rank, the same in each run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + hvd.rank()))


def by_rank(*shape: int, seed: int = 0) -> list[Any]:
    """What `numbers` gives on each rank."""
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + rank)) for rank in range(hvd.size())
    ]


# Collectives


def all_reduce_of_every_operation_and_dtype():
    for dtype in (torch.float32, torch.float64, torch.int32, torch.int64, torch.int8, torch.uint8):
        x = (numbers(5, 3).abs() * 4 + 1).to(dtype)
        same(hvd.allreduce(x, op=hvd.Sum), plain(x))
        same(hvd.allreduce(x, op=hvd.Min), plain(x, "MIN"))
        same(hvd.allreduce(x, op=hvd.Max), plain(x, "MAX"))
        same(hvd.allreduce(x, op=hvd.Product), plain(x, "PRODUCT"))
        mean = plain(x) / SIZE
        same(hvd.allreduce(x), mean if x.is_floating_point() else mean.trunc().to(dtype))
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(6).to(dtype) + hvd.rank()
        same(hvd.allreduce(x, op=hvd.Sum), (3 * torch.arange(6) + 3).to(dtype))
    x = numbers(7)
    same(hvd.allreduce(x, average=False), plain(x))
    same(hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0), 1.5 * plain(x))
    same(hvd.allreduce(torch.tensor(2.0)), torch.tensor(2.0))
    same(hvd.allreduce(x, compression=hvd.Compression.fp16), plain(x.half()).float() / SIZE, rtol=1e-3, atol=1e-3)
    same(hvd.allreduce(torch.zeros(0)), torch.zeros(0))
    with raises(InputError, "cannot be reduced"):
        hvd.allreduce(torch.ones(2, dtype=torch.complex64))
    with raises(InputError, "both average and op"):
        hvd.allreduce(x, average=True, op=hvd.Sum)


def tensors_in_another_order_on_each_rank_are_fused_and_matched_by_name():
    shapes = [(3,), (0, 4), (), (2, 5), (1, 1, 7), (100,)]
    for _ in range(3):
        order = list(range(len(shapes)))
        order = order[hvd.rank() :] + order[: hvd.rank()]
        tensors = {i: numbers(*shapes[i], seed=i) for i in order}
        expected = [sum(by_rank(*shape, seed=i)) / SIZE for i, shape in enumerate(shapes)]
        handles = {i: hvd.allreduce_async(tensors[i], name=f"shuffled.{i}") for i in order}
        for i in order:
            same(hvd.synchronize(handles[i]), expected[i])
            assert hvd.poll(handles[i])


def in_place_also_where_memory_is_not_contiguous():
    x = numbers(4, 6)
    expected = plain(x) / SIZE
    assert hvd.allreduce_(x) is x
    same(x, expected)
    y = numbers(4, 6).t()
    expected = plain(y.contiguous())
    hvd.allreduce_(y, op=hvd.Sum)
    same(y, expected)
    assert not y.is_contiguous()
    group = [numbers(3, seed=1), numbers(5, 2, seed=2).t(), numbers(2, seed=3).to(torch.float64)]
    expected = [plain(tensor.contiguous()) for tensor in group]
    hvd.grouped_allreduce_(group, op=hvd.Sum)
    same(group, expected)
    same(hvd.grouped_allreduce([x, x + 1], op=hvd.Max), [plain(x, "MAX"), plain(x + 1, "MAX")])
    z = numbers(3, 4).t()
    root = by_rank(3, 4)[1].t()
    hvd.broadcast_(z, 1)
    same(z, root)


def all_gather_of_different_numbers_of_rows():
    for dtype in (torch.float32, torch.bool, torch.complex64, torch.bfloat16):
        for rows in ([1, 2, 3], [2, 2, 2], [0, 4, 0], [0, 0, 0]):
            parts = [torch.arange(rows[r] * 2).reshape(rows[r], 2).to(dtype) for r in range(SIZE)]
            same(hvd.allgather(parts[hvd.rank()]), torch.cat(parts))
    same(hvd.allgather(torch.tensor(float(hvd.rank()))), torch.arange(3.0))
    same(hvd.grouped_allgather([torch.ones(1), torch.zeros(2)]), [torch.ones(3), torch.zeros(6)])


def broadcast_all_to_all_and_reduce_scatter():
    for dtype in (torch.float32, torch.bool, torch.int16):
        x = (torch.arange(6).reshape(2, 3) + hvd.rank()).to(dtype)
        same(hvd.broadcast(x, 2), (torch.arange(6).reshape(2, 3) + 2).to(dtype))
    splits = [[1, 0, 2], [0, 0, 0], [3, 1, 1]]
    x = torch.arange(5.0 * sum(splits[hvd.rank()])).reshape(-1, 5) + 1000 * hvd.rank()
    got, received = hvd.alltoall(x, splits=splits[hvd.rank()])
    assert received.tolist() == [row[hvd.rank()] for row in splits]
    expected = []
    for sender, row in enumerate(splits):
        whole = torch.arange(5.0 * sum(row)).reshape(-1, 5) + 1000 * sender
        expected.append(whole.split(row)[hvd.rank()])
    same(got, torch.cat(expected))
    same(hvd.alltoall(torch.full((3,), float(hvd.rank()))), torch.arange(3.0))
    with raises(InputError, "do not divide"):
        hvd.alltoall(torch.ones(4))
    for rows in (2, 3, 4, 6):
        x = numbers(rows, 2)
        start = sum(rows // SIZE + (r < rows % SIZE) for r in range(hvd.rank()))
        mine = slice(start, start + rows // SIZE + (hvd.rank() < rows % SIZE))
        same(hvd.reducescatter(x, op=hvd.Sum), plain(x)[mine])
        same(hvd.reducescatter(x), plain(x)[mine] / SIZE)


def gradients_flow_through():
    x, weights = numbers(4).requires_grad_(), by_rank(4, seed=9)
    mine = weights[hvd.rank()]
    for op, scale in ((hvd.Sum, 1.0), (hvd.Average, 1 / SIZE)):
        (gradient,) = torch.autograd.grad((hvd.allreduce(x, op=op) * mine).sum(), x)
        same(gradient, sum(weights) * scale)  # d(sum over ranks of weight · sum of x)/dx
    (gradient,) = torch.autograd.grad((hvd.broadcast(x, 1) * mine).sum(), x)
    same(gradient, sum(weights) if hvd.rank() == 1 else torch.zeros(4))
    rows = numbers(hvd.rank() + 1, 2).requires_grad_()
    weights = by_rank(6, 2, seed=8)
    (gradient,) = torch.autograd.grad((hvd.allgather(rows) * weights[hvd.rank()]).sum(), rows)
    start = sum(range(1, hvd.rank() + 1))
    same(gradient, sum(weights)[start : start + hvd.rank() + 1])
    y = numbers(3, 2).requires_grad_()
    weights = by_rank(3, 2, seed=7)
    (gradient,) = torch.autograd.grad((hvd.alltoall(y) * weights[hvd.rank()]).sum(), y)
    same(gradient, torch.stack([weight[hvd.rank()] for weight in weights]))
    (gradient,) = torch.autograd.grad((hvd.reducescatter(y) * weights[hvd.rank()][:1]).sum(), y)
    same(gradient, torch.cat([weight[:1] for weight in weights]) / SIZE)
    first, second = hvd.grouped_allreduce([x, 2 * x], op=hvd.Sum)
    (gradient,) = torch.autograd.grad((first + second).sum(), x)
    same(gradient, torch.full((4,), 9.0))


def adasum_is_that_of_the_paper():
    x, y = numbers(6, seed=1), numbers(2, 3, seed=2)
    expected = [reference(by_rank(6, seed=1)), reference(by_rank(2, 3, seed=2))]
    same(hvd.allreduce(x, op=hvd.Adasum), expected[0], rtol=1e-5, atol=1e-6)
    same(hvd.grouped_allreduce([x, y], op=hvd.Adasum), expected, rtol=1e-5, atol=1e-6)


def sparse_tensors_are_summed():
    indices = torch.tensor([[0, hvd.rank()], [1, 2]])
    x = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0]), (4, 3), check_invariants=True)
    same(hvd.synchronize(hvd.sparse_allreduce_async(x, op=hvd.Sum)).to_dense(), plain(x.to_dense()))
    same(hvd.synchronize(hvd.sparse_allreduce_async(x)).to_dense(), plain(x.to_dense()) / SIZE)


def process_sets_exchange_among_themselves():
    ends = hvd.add_process_set([0, 2])
    alone = hvd.add_process_set(hvd.ProcessSet([1]))
    assert hvd.get_process_set_ids_and_ranks() == {0: [0, 1, 2], ends.process_set_id: [0, 2], alone.process_set_id: [1]}
    assert (ends.size(), ends.included()) == (2, hvd.rank() != 1)
    x = torch.tensor([float(hvd.rank() + 1)])
    for _ in range(3):
        if ends.included():
            assert ends.rank() == hvd.rank() // 2
            same(hvd.allreduce(x, name="w", process_set=ends), torch.tensor([2.0]))
            same(hvd.allgather(x, process_set=ends), torch.tensor([1.0, 3.0]))
            same(hvd.broadcast(x, 2, process_set=ends), torch.tensor([3.0]))
            same(hvd.reducescatter(torch.ones(2), process_set=ends, op=hvd.Sum), torch.tensor([2.0]))
            hvd.barrier(ends)
        else:
            same(hvd.allreduce(x, name="w", process_set=alone), x)
            with raises(InputError, "rank 1 is not in process set"):
                hvd.allreduce(x, process_set=ends)
        same(hvd.allreduce(x, name="w"), torch.tensor([2.0]))
    with raises(InputError, "not all ranks"):
        hvd.add_process_set([7])
    assert hvd.remove_process_set(ends)
    assert hvd.remove_process_set(alone)
    assert not hvd.remove_process_set(hvd.global_process_set)
    with raises(InputError, "has not been added"):
        hvd.allreduce(x, process_set=ends)


def ranks_with_less_data_join():
    for repeat in range(2):
        steps = hvd.rank() + 1
        for step in range(steps):
            active = SIZE - step
            got = hvd.allreduce(torch.ones(3), name=f"step.{step}", op=hvd.Sum)
            same(got, torch.full((3,), float(active)))
            assert hvd.allgather(torch.ones(1), name=f"gathered.{step}").numel() == active
        time.sleep(0.05 * hvd.rank())
        assert hvd.join() == SIZE - 1, repeat


# What goes wrong


def a_mismatch_is_raised_on_every_rank_and_the_run_goes_on():
    for _ in range(2):
        with raises(MismatchError, "'w'", "different shape", "ranks 0, 2: (3,)", "rank 1: (4,)"):
            hvd.allreduce(torch.ones(4 if hvd.rank() == 1 else 3), name="w")
        with raises(MismatchError, "'w'", "different dtype", "float32", "float64"):
            hvd.allreduce(torch.ones(3, dtype=torch.float64 if hvd.rank() == 0 else torch.float32), name="w")
        with raises(MismatchError, "different root"):
            hvd.broadcast(torch.ones(3), min(hvd.rank(), 1), name="w")
        with raises(MismatchError, "different operation"):
            hvd.barrier() if hvd.rank() == 0 else hvd.allreduce(torch.ones(1), name="barrier.waiting")
        same(hvd.allreduce(torch.ones(3), name="w"), torch.ones(3))
    handle = hvd.allreduce_async(torch.ones(1), name="twice") if hvd.rank() == 0 else None
    if handle is not None:
        with raises(InputError, "still being exchanged"):
            hvd.allreduce(torch.ones(1), name="twice")
    hvd.allreduce(torch.ones(1), name="twice") if handle is None else handle.wait()


def again(**environment: str) -> None:
    """Start anew with other settings."""
    hvd.shutdown()
    assert not hvd.is_initialized()
    with raises(InputError, "hvd.init"):
        hvd.size()
    os.environ.update(environment)
    dist.barrier()
    hvd.init()
    for name in environment:
        del os.environ[name]


class Warned(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def a_stall_is_a_warning_that_names_tensor_and_rank_then_an_error_on_every_rank():
    again(HOROVOD_STALL_CHECK_TIME_SECONDS="0.3", HOROVOD_STALL_SHUTDOWN_TIME_SECONDS="1.5")
    warned = Warned()
    logging.getLogger("headway.exchange").addHandler(warned)
    if hvd.rank() == 1:
        time.sleep(0.6)
    same(hvd.allreduce(torch.ones(1), name="late"), torch.ones(1))
    assert any("tensor 'late': rank 1 did not submit it, ranks 0, 2 waited" in text for text in warned.texts), (
        warned.texts
    )
    handle = hvd.allreduce_async(torch.ones(1), name="never") if hvd.rank() != 1 else None
    if handle is None:
        time.sleep(0.5)  # or on a busy machine its own tensor may be the first that is late
    with raises(StalledError, "tensor 'never': rank 1 did not submit it, ranks 0, 2 waited", "HOROVOD_STALL"):
        handle.wait() if handle is not None else hvd.allreduce(torch.ones(1), name="something else")
    with raises(StalledError, "tensor 'never'"):
        hvd.allreduce(torch.ones(1), name="after")
    logging.getLogger("headway.exchange").removeHandler(warned)
    again()


def a_rank_that_leaves_is_named_by_those_that_wait_for_it():
    handle = hvd.allreduce_async(torch.ones(1), name="forlorn") if hvd.rank() != 2 else None
    dist.barrier()
    if handle is None:
        hvd.shutdown()
    else:
        with raises(RankFailedError, "rank 2 shut down", "'forlorn' was not exchanged"):
            handle.wait()
        with raises(RankFailedError, "rank 2 shut down"):
            hvd.barrier()
    dist.barrier()
    again()


def a_killed_rank_is_named_by_every_survivor():
    killed_in_the_middle(SIZE - 1, "a_killed_rank_is_named_by_every_survivor")


def a_killed_coordinator_is_named_by_every_survivor():
    killed_in_the_middle(0, "a_killed_coordinator_is_named_by_every_survivor")


def killed_in_the_middle(victim: int, scenario: str) -> None:
    big = torch.ones(2_000_000)
    hvd.allreduce(big, name="big")
    started = time.monotonic()
    if hvd.rank() == victim:
        note(scenario, "killed")
        [hvd.allreduce_async(big.clone(), name=f"big.{i}") for i in range(20)][2].wait()
        os.kill(os.getpid(), signal.SIGKILL)
    with raises(RankFailedError, f"rank {victim} died"):
        # The news may come while some are still being submitted.
        handles = [hvd.allreduce_async(big.clone(), name=f"big.{i}") for i in range(20)]
        for handle in handles:
            handle.wait()
        hvd.allreduce(big, name="big")
    print("survived for", time.monotonic() - started)
    with raises(RankFailedError, f"rank {victim} died"):
        hvd.barrier()


def a_silent_rank_is_named_by_every_other():
    again(HEADWAY_EXCHANGE_TIMEOUT_SECONDS="1.5")
    processes = hvd.allgather_object(os.getpid())
    dist.barrier()  # no exchange is under way any more
    started = time.monotonic()
    if hvd.rank() == 1:
        note("a_silent_rank_is_named_by_every_other", "killed")
        os.kill(os.getpid(), signal.SIGSTOP)  # as by a debugger: alive, and its connections too
    try:
        with raises(RankFailedError, "rank 1 has not answered for 1.5 s"):
            hvd.allreduce(torch.ones(1), name="w")
        print("noticed after", time.monotonic() - started)
    finally:
        if hvd.rank() == 0:
            time.sleep(0.5)  # the others must have seen it silent, not dead
            os.kill(processes[1], signal.SIGKILL)


# Timelines and options


def a_timeline_shows_negotiation_and_exchange():
    path = Path(sys.argv[1]) / "timeline.json"
    hvd.start_timeline(str(path), mark_cycles=True)
    for handle in [hvd.allreduce_async(torch.ones(4), name=f"layer{i}/weight") for i in range(3)]:
        handle.wait()
    hvd.allgather(torch.ones(hvd.rank()), name="rows")
    hvd.stop_timeline()
    if hvd.rank() == 0:
        events = json.loads(path.read_text())
        # Horovod's layout: a process for each tensor, activities that begin and end, one within the other.
        processes = {event["args"]["name"] for event in events if event.get("name") == "process_name"}
        assert "layer0/weight" in processes
        names = {event.get("name") for event in events}
        assert {"NEGOTIATE_ALLREDUCE", "ALLREDUCE", "HEADWAY_ALLREDUCE", "NEGOTIATE_ALLGATHER", "ALLGATHER"} <= names
        assert {"HEADWAY_ALLGATHER", "CYCLE_START"} <= names
    else:
        assert not path.exists() or hvd.rank() != 0


def settings_of_rank_0_hold_for_all_and_thresholds_fuse():
    again(HOROVOD_FUSION_THRESHOLD="64", HOROVOD_CACHE_CAPACITY=str(2 + hvd.rank()), HOROVOD_CYCLE_TIME="2.5")
    options = context().controller.options
    assert (options.threshold_bytes, options.cache_capacity, options.cycle_seconds) == (64, 2, 0.0025)
    for _ in range(3):
        handles = [hvd.allreduce_async(torch.full((5,), float(i)), name=f"t{i}") for i in range(6)]
        for i, handle in enumerate(handles):
            same(handle.wait(), torch.full((5,), float(i)))
    again()


class FakeTuner:
    """Wants other settings after two observations."""

    seen: ClassVar[list[float]] = []

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def observe(self, bytes_per_second: float) -> None:
        self.seen.append(bytes_per_second)

    def suggest(self) -> Setting:
        return self.settings["start"] if len(self.seen) < 2 else Setting(threshold_bytes=300, cycle_seconds=0.002)


def the_autotuner_changes_settings_on_all_ranks_while_the_sums_stay_right():
    controller.Autotuner = FakeTuner
    again(HOROVOD_AUTOTUNE="1")
    for step in range(40):
        handles = [hvd.allreduce_async(torch.full((50,), float(i + step)), name=f"t{i}") for i in range(3)]
        for i, handle in enumerate(handles):
            same(handle.wait(), torch.full((50,), float(i + step)))
    running = context().controller
    assert (running._negotiator.threshold_bytes, running._cycle_seconds) == (300, 0.002)
    if hvd.rank() == 0:
        assert len(FakeTuner.seen) >= 2
        assert min(FakeTuner.seen) > 0
    again()


# Models, optimizers, objects


def objects_travel_and_what_could_run_code_does_not():
    thing = {"epoch": 3, "best": [1.5, None, ("a", True)], "weights": torch.arange(3)} if hvd.rank() == 1 else None
    got = hvd.broadcast_object(thing, root_rank=1)
    assert got["epoch"] == 3
    assert got["best"] == [1.5, None, ("a", True)]
    same(got["weights"], torch.arange(3))
    assert hvd.allgather_object({"rank": hvd.rank(), "text": "x" * hvd.rank()})[2] == {"rank": 2, "text": "xx"}
    assert hvd.allgather_object(b"raw")[0] == b"raw"
    for bad in (os.system, Path("x"), lambda: 0):
        with raises(InputError, "a " if hvd.rank() == 0 else "rank 0", "cannot be sent"):
            hvd.broadcast_object(bad, root_rank=0)
        with raises(InputError, "cannot be sent"):
            hvd.allgather_object(bad if hvd.rank() == 1 else 0)
    assert hvd.broadcast_object(hvd.rank()) == 0


def model(seed: int) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def parameters_and_optimizer_state_become_those_of_the_root():
    net = model(hvd.rank())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1 * (hvd.rank() + 1))
    if hvd.rank() == 0:  # only the root has a state yet
        for _ in range(2):
            net(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=net.named_parameters())
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    for tensor in [*net.state_dict().values()]:
        same(tensor, hvd.broadcast(tensor, 0))
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert len(optimizer.state) == 6
    for state in optimizer.state.values():
        assert state["step"] == 2
        same(state["exp_avg"], hvd.broadcast(state["exp_avg"], 0))
    hvd.broadcast_parameters(net.named_parameters(), root_rank=2)
    with raises(InputError, "'epoch' is a int"):
        hvd.broadcast_parameters({"epoch": 3}, 0)


class Net(nn.Module):
    """With a parameter that no rank uses, one that only rank 1 uses, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.never = nn.Parameter(torch.ones(2))
        self.sometimes = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Any, extra: bool) -> Any:
        y = self.second(torch.tanh(self.first(x))) + self.frozen
        return y + self.sometimes if extra else y


def batch_of(rank: int, step: int) -> Any:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)


def train(wrap: Any, steps: int = 4, passes: int = 1, before_step: Any = None) -> Any:
    net = Net()
    optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    optimizer = wrap(optimizer, net)
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(passes):
            inputs, targets = batch_of(hvd.rank(), step * passes + number)
            F.cross_entropy(net(inputs, extra=hvd.rank() == 1), targets).backward()
        if before_step is not None:
            before_step(optimizer, net)
        else:
            optimizer.step()
        scheduler.step()
    return net


def truth(scale: float = 1 / SIZE, steps: int = 4, passes: int = 1, clip: float = 0.0) -> Any:
    """The same in one process, which goes through the batches of all ranks."""
    net = Net()
    optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(SIZE):
            for number in range(passes):
                inputs, targets = batch_of(rank, step * passes + number)
                (F.cross_entropy(net(inputs, extra=rank == 1), targets) * scale).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return net


def alike(one: Any, other: Any, **tolerance: float) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}), msg=lambda m, n=name: f"{n}: {m}"
        )


def wrapped(**settings: Any) -> Any:
    def wrap(optimizer: Any, net: Any) -> Any:
        if "parts" in settings:
            first = [net.first.weight, net.second.bias, net.never]
            return hvd.DistributedOptimizer(optimizer, net.named_parameters(), groups=[first, [net.sometimes]])
        return hvd.DistributedOptimizer(optimizer, net.named_parameters(), **settings)

    return wrap


def training_is_that_of_one_process_with_the_whole_batch():
    expected = truth()
    alike(train(wrapped()), expected)
    alike(train(lambda optimizer, net: hvd.DistributedOptimizer(optimizer)), expected)
    alike(train(wrapped(gradient_predivide_factor=2.0)), expected)
    alike(train(wrapped(num_groups=2)), expected)
    alike(train(wrapped(parts=True)), expected)
    alike(train(wrapped(op=hvd.Sum)), truth(scale=1.0))
    alike(train(wrapped(backward_passes_per_step=2), passes=2), truth(passes=2))
    alike(train(wrapped(compression=hvd.Compression.topk(1.0))), expected)
    alike(train(wrapped(compression=hvd.Compression.fp16)), expected, rtol=5e-2, atol=5e-3)
    net = train(wrapped(compression=hvd.Compression.bf16))
    for parameter in net.parameters():
        same(parameter.detach(), hvd.broadcast(parameter.detach(), 0), rtol=0.0, atol=0.0)


def gradients_can_be_clipped_between_synchronize_and_step():
    def clipped(optimizer: Any, net: Any) -> None:
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        with optimizer.skip_synchronize():
            optimizer.step()

    alike(train(wrapped(), before_step=clipped), truth(clip=0.1))


def the_optimizer_stays_of_its_kind_and_refuses_misuse():
    net = Net()
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(net.parameters(), lr=0.1), net.named_parameters())
    assert isinstance(optimizer, torch.optim.Adam)
    assert type(optimizer).__name__ == "Adam"
    inputs, targets = batch_of(0, 0)
    F.cross_entropy(net(inputs, extra=True), targets).backward()
    with raises(InputError, "being exchanged"):
        optimizer.zero_grad()
    with raises(InputError, "more than backward_passes_per_step (1)"):
        F.cross_entropy(net(inputs, extra=True), targets).backward()
    optimizer.step()
    optimizer.zero_grad()
    for wrong, text in (
        ({"named_parameters": [("a", net.never)]}, "have no name"),
        ({"named_parameters": [("a", p) for p in net.parameters()]}, "given twice"),
        ({"op": hvd.Min}, "of gradients"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "splits an average"),
        ({"groups": [[net.never], [net.never]]}, "in two groups"),
    ):
        with raises(InputError, text):
            hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), **wrong)


def sparse_gradients_are_exchanged():
    for dense in (False, True):
        torch.manual_seed(1)
        table = nn.Embedding(10, 4, sparse=True)
        start = table.weight.detach().clone()
        optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
        optimizer = hvd.DistributedOptimizer(optimizer, table.named_parameters(), sparse_as_dense=dense)
        table(torch.tensor([1, 2 + hvd.rank(), 1])).sum().backward()
        optimizer.step()
        change = torch.zeros(10, 4)
        change[1] = 2.0
        change[2:5] = 1 / SIZE
        same(table.weight.detach(), start - change)


def adasum_combines_the_steps():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    start = [p.detach().clone() for p in layer.parameters()]
    changes: list[list[Any]] = []
    for rank in range(SIZE):
        copy = nn.Linear(4, 3)
        copy.load_state_dict(layer.state_dict())
        local = torch.optim.SGD(copy.parameters(), lr=0.1)
        F.cross_entropy(copy(batch_of(rank, 0)[0]), batch_of(rank, 0)[1]).backward()
        local.step()
        changes.append([p.detach() - s for p, s in zip(copy.parameters(), start, strict=True)])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(optimizer, layer.named_parameters(), op=hvd.Adasum)
    inputs, targets = batch_of(hvd.rank(), 0)
    F.cross_entropy(layer(inputs), targets).backward()
    optimizer.step()
    for i, parameter in enumerate(layer.parameters()):
        expected = start[i] + reference([change[i] for change in changes])
        same(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def all_of_it_works_on_gloo_too():
    again(HEADWAY_EXCHANGE_BACKEND="gloo")
    all_reduce_of_every_operation_and_dtype()
    tensors_in_another_order_on_each_rank_are_fused_and_matched_by_name()
    all_gather_of_different_numbers_of_rows()
    broadcast_all_to_all_and_reduce_scatter()
    process_sets_exchange_among_themselves()
    ranks_with_less_data_join()
    training_is_that_of_one_process_with_the_whole_batch()


def note(scenario: str, outcome: str) -> None:
    """Write what became of a scenario on this rank."""
    (Path(sys.argv[1]) / f"{scenario}-{os.environ['RANK']}.txt").write_text(outcome)


def take_part(rank: int, size: int, scenarios: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    meeting = f"file://{sys.argv[1]}/rendezvous-{scenarios[0]}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    hvd.init()
    assert (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()) == (rank, size, rank, size)
    assert (hvd.cross_rank(), hvd.cross_size(), hvd.is_homogeneous()) == (0, 1, True)
    for scenario in scenarios:
        started = time.monotonic()
        try:
            globals()[scenario]()
            outcome = ""
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shall see it
            outcome = "".join(traceback.format_exception(error))
        print(f"rank {rank}: {scenario}: {time.monotonic() - started:.2f} s\n{outcome}", flush=True)
        note(scenario, outcome)
    hvd.shutdown()


def main() -> None:
    for world in sys.argv[2:]:
        size, _, scenarios = world.partition(":")
        children = []
        for rank in range(int(size)):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    take_part(rank, int(size), scenarios.split(","))
                    code = 0
                except BaseException:  # noqa: BLE001 - a forked child must not go on as its parent
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
