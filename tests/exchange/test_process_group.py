"""torch's own parallelism on backend "headway": the same losses as on gloo, and errors that name who and what.

Three real processes live through the whole file. Two of them pretend to share a machine, the third to be on another, so
that groups of ranks 0 and 1 use shared memory and all others TCP.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

SIZE = 3
PATIENCE_SECONDS = 120.0

# What runs in the processes


def _model(seed: int = 1, width: int = 12) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 6)]
    return nn.Sequential(*layers).double()


def _batches(count: int = 3, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=torch.float64),
            torch.randn(size, 6, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def _share(batch: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return batch.chunk(size)[rank]


def _loss(model: Callable[..., torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (model(inputs) - targets).square().mean()


def _alone() -> list[float]:
    model = _model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for inputs, targets in _batches():
        optimizer.zero_grad()
        loss = _loss(model, inputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, group: Any) -> list[float]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    losses = []
    for inputs, targets in _batches():
        optimizer.zero_grad()
        loss = _loss(model, _share(inputs, rank, size), _share(targets, rank, size))
        loss.backward()
        optimizer.step()
        total = loss.detach() / size
        dist.all_reduce(total, group=group)
        losses.append(total.item())
    return losses


def _each(run: Callable[[Any], Any], ranks: list[int] | None = None) -> dict[str, Any]:
    """`run` on a group of backend headway, and on one of gloo; None on ranks outside."""
    results: dict[str, Any] = {}
    for backend in ("headway", "gloo"):
        group: Any = dist.new_group(ranks, backend=backend, timeout=timedelta(seconds=60))
        if dist.get_rank() in (ranks or range(SIZE)):
            results[backend] = run(group)
    return results


def ddp(rank: int) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    def run(group: Any) -> list[float]:
        model = DistributedDataParallel(_model(), process_group=group, bucket_cap_mb=1)
        return _train(model, torch.optim.Adam(model.parameters(), lr=1e-2), group)

    return [*_each(run).values(), *_each(run, [0, 1]).values()]


def ddp_with_a_hook(rank: int) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.nn.parallel import DistributedDataParallel

    def run(group: Any) -> list[float]:
        model = DistributedDataParallel(_model(), process_group=group)
        model.register_comm_hook(group, default_hooks.allreduce_hook)
        return _train(model, torch.optim.Adam(model.parameters(), lr=1e-2), group)

    return list(_each(run).values())


def zero_redundancy(rank: int) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    def run(group: Any) -> list[float]:
        model = DistributedDataParallel(_model(), process_group=group)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, process_group=group, lr=1e-2)
        return _train(model, optimizer, group)

    return list(_each(run).values())


def fully_sharded(rank: int) -> Any:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    def run(group: Any) -> list[float]:
        mesh = DeviceMesh.from_group(group, "cpu")
        model = _model()
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return _train(model, torch.optim.Adam(model.parameters(), lr=1e-2), group)

    return list(_each(run).values())


def tensor_parallel(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    # The mesh makes its groups itself, on the default group's backend.
    mesh = init_device_mesh("cpu", (SIZE,))
    assert dist.get_backend(mesh.get_group()) == "headway"
    model = _model()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False)
    losses = []
    for inputs, targets in _batches():
        optimizer.zero_grad()
        loss = _loss(model, inputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pipeline(rank: int) -> Any:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    def run(group: Any) -> list[float]:
        parts = [_model()[:2], _model()[2:4], _model()[4:]]
        stage = PipelineStage(parts[rank], rank, SIZE, torch.device("cpu"), group=group)
        schedule = Schedule1F1B(stage, n_microbatches=6, loss_fn=lambda out, goal: (out - goal).square().mean())
        optimizer = torch.optim.Adam(parts[rank].parameters(), lr=1e-2)
        losses = []
        for inputs, targets in _batches():
            optimizer.zero_grad()
            found: list[torch.Tensor] = []
            if rank == 0:
                schedule.step(inputs)
            elif rank == SIZE - 1:
                schedule.step(target=targets, losses=found)
            else:
                schedule.step()
            optimizer.step()
            mean = torch.stack(found).mean().detach() if found else torch.zeros((), dtype=torch.float64)
            dist.all_reduce(mean, group=group)
            losses.append(mean.item())
        return losses

    return list(_each(run).values())


def checkpoint(rank: int) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    box = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(box, src=0)
    mesh = init_device_mesh("cpu", (SIZE,))

    def sharded(seed: int) -> Any:
        model = _model(seed)
        fully_shard(model, mesh=mesh)
        return model

    given, taken = sharded(1), sharded(2)
    dcp.save(get_model_state_dict(given), checkpoint_id=box[0])
    state = get_model_state_dict(taken)
    before = all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(given.parameters(), taken.parameters()))
    dcp.load(state, checkpoint_id=box[0])
    set_model_state_dict(taken, state)
    after = all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(given.parameters(), taken.parameters()))
    return [before, after]


def everything(rank: int) -> Any:
    """Each collective, on every dtype it is for, on headway and on gloo; where they differ."""
    import torch.distributed._functional_collectives as functional

    operations = dist.ReduceOp
    results: dict[str, dict[str, Any]] = {}

    def record(backend: str, what: str, tensors: Any) -> None:
        results.setdefault(what, {})[backend] = [t.tolist() for t in tensors]

    def run(group: Any) -> None:
        backend, me, size = dist.get_backend(group), dist.get_rank(group), dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group)
        generator = torch.Generator().manual_seed(11 + me)

        def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.randint(-4, 5, shape, generator=generator).to(dtype)

        def note(what: str, *tensors: torch.Tensor) -> None:
            record(backend, f"{size} ranks: {what}", tensors)

        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.uint8,
        ):
            for operation in (operations.SUM, operations.MIN, operations.MAX, operations.PRODUCT):
                tensor = draw(37, dtype=dtype).abs() if dtype == torch.uint8 else draw(37, dtype=dtype)
                dist.all_reduce(tensor, op=operation, group=group)
                note(f"all_reduce {dtype} {operation}", tensor.double())
        for operation in (operations.BAND, operations.BOR, operations.BXOR):
            tensor = draw(9, dtype=torch.int64)
            dist.all_reduce(tensor, op=operation, group=group)
            note(f"all_reduce {operation}", tensor)
        tensor = torch.complex(draw(5), draw(5))
        dist.all_reduce(tensor, group=group)
        note("complex", torch.view_as_real(tensor))
        for shape in ((0,), (1,), (2, 3, 4)):
            tensor = draw(*shape)
            dist.all_reduce(tensor, group=group)
            note(f"shape {shape}", tensor)
        tensor = draw(3, 4).t()
        dist.all_reduce(tensor, group=group)
        note("not contiguous", tensor)
        for root in range(size):
            tensor = draw(11)
            dist.broadcast(tensor, ranks[root], group=group)
            note(f"broadcast from {root}", tensor)
            tensor = draw(11)
            dist.reduce(tensor, ranks[root], group=group)
            if me == root:
                note(f"reduce to {root}", tensor)
            places = [torch.zeros(4) for _ in range(size)] if me == root else None
            dist.gather(draw(4, dtype=torch.float32), places, ranks[root], group=group)
            note(f"gather to {root}", *(places or ()))
            parts = [draw(4) for _ in range(size)]
            tensor = torch.zeros(4, dtype=torch.float64)
            dist.scatter(tensor, parts if me == root else None, ranks[root], group=group)
            note(f"scatter from {root}", tensor)
        places = [torch.zeros(2, 3, dtype=torch.bfloat16) for _ in range(size)]
        dist.all_gather(places, draw(2, 3, dtype=torch.bfloat16), group=group)
        note("all_gather", *(place.double() for place in places))
        tensor = torch.zeros(size * 5, dtype=torch.bool)
        dist.all_gather_into_tensor(tensor, draw(5) > 0, group=group)
        note("all_gather_into_tensor", tensor)
        tensor = torch.zeros(5, dtype=torch.float64)
        given = draw(size * 5)
        kept = given.clone()
        dist.reduce_scatter_tensor(tensor, given, group=group)
        assert torch.equal(given, kept), "the input of a reduce-scatter was changed"
        note("reduce_scatter_tensor", tensor)
        dist.reduce_scatter(tensor, [draw(5) for _ in range(size)], group=group)
        note("reduce_scatter", tensor)
        tensor = torch.zeros(size * 2, dtype=torch.float64)
        dist.all_to_all_single(tensor, draw(size * 2), group=group)
        note("all_to_all_single", tensor)
        sent, due = [me + to for to in range(size)], [source + me for source in range(size)]
        tensor = torch.zeros(sum(due), 2, dtype=torch.float64)
        dist.all_to_all_single(tensor, draw(sum(sent), 2), due, sent, group=group)
        note("all_to_all_single, unequal", tensor)
        objects: list[Any] = [None] * size
        dist.all_gather_object(objects, {"rank": me, "text": "x" * (10 + me)}, group=group)
        results.setdefault(f"{size} ranks: objects", {})[backend] = objects
        left, right = (me - 1) % size, (me + 1) % size
        arrived = torch.zeros(6, dtype=torch.float64)
        batch = [
            dist.P2POp(dist.irecv, arrived, group=group, group_peer=left),
            dist.P2POp(dist.isend, draw(6), group=group, group_peer=right),
        ]
        for work in dist.batch_isend_irecv(batch):
            work.wait()
        note("batch_isend_irecv", arrived)
        name = group.group_name
        note("functional all_reduce", functional.wait_tensor(functional.all_reduce(draw(4), "sum", name)))
        note("functional all_gather", functional.wait_tensor(functional.all_gather_tensor(draw(4), 0, name)))
        note(
            "functional reduce_scatter",
            functional.wait_tensor(functional.reduce_scatter_tensor(draw(size * 2), "sum", 0, name)),
        )
        dist.barrier(group=group)

    _each(run)
    _each(run, [0, 1])
    return {what: both for what, both in results.items() if both["headway"] != both["gloo"]}, len(results)


def headway_alone(rank: int) -> Any:
    """What gloo does not do: averages, factors, gathers of unequal sizes, eight-bit floats, receives from anyone."""
    average = torch.tensor([1.0, 2.0]) * (rank + 1)
    dist.all_reduce(average, op=dist.ReduceOp.AVG)
    scaled = torch.full((2,), rank + 1.0)
    half: Any = torch.distributed._make_nccl_premul_sum(0.5)
    dist.all_reduce(scaled, op=half)
    truth = torch.tensor([rank == 1, False])
    dist.all_reduce(truth)
    small = torch.full((2,), rank + 1.0).to(torch.float8_e4m3fn)
    dist.all_reduce(small)
    unequal = [torch.zeros(source + 1) for source in range(SIZE)]
    dist.all_gather(unequal, torch.full((rank + 1,), float(rank)))
    # gloo copies neighbouring elements where a tensor has gaps.
    gaps = (torch.arange(8.0) * (rank + 1))[::2]
    dist.broadcast(gaps, 1)
    output = torch.zeros(rank + 1)
    dist.reduce_scatter(output, [torch.full((target + 1,), float(target)) for target in range(SIZE)])
    heard = []
    if rank == 0:
        for _ in range(SIZE - 1):
            tensor = torch.zeros(1)
            source = dist.recv(tensor)
            heard.append([source, tensor.item()])
    else:
        dist.send(torch.tensor([10.0 * rank]), 0)
    return [
        average.tolist(),
        scaled.tolist(),
        truth.tolist(),
        small.float().tolist(),
        [tensor.tolist() for tensor in unequal],
        gaps.tolist(),
        output.tolist(),
        sorted(heard),
    ]


def tags(rank: int) -> Any:
    """Receives take the frames with their own tag, whatever the order in which they were sent."""
    if rank == 0:
        for tag in (7, 3, 5):
            dist.send(torch.tensor([float(tag)]), 1, tag=tag)
        return None
    found = []
    if rank == 1:
        for tag in (5, 7, 3):
            tensor = torch.zeros(1)
            dist.recv(tensor, 0, tag=tag)
            found.append(tensor.item())
    return found


def asynchronous(rank: int) -> Any:
    """Many operations under way at once, in the order of their submission; futures hold the tensors."""
    tensors = [torch.full((1000 + number,), float(rank + number)) for number in range(20)]
    works: list[Any] = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    doubled = works[0].get_future().then(lambda done: done.value()[0] * 2)
    for work in works:
        work.wait(timedelta(seconds=30))
    right = all(torch.equal(t, torch.full_like(t, 3.0 * number + 3)) for number, t in enumerate(tensors))
    return [right, doubled.wait()[0].item(), all(work.is_success() for work in works)]


def algorithms(rank: int) -> Any:
    """Every algorithm gives the same sums of whole numbers."""
    from headway.exchange.process_group import set_algorithm

    group: Any = dist.new_group(backend="headway")
    results = []
    for name in ("direct", "ring", "tree", "binomial", "halving-doubling", "hierarchical", ""):
        set_algorithm(name, group=group)
        tensor = torch.arange(1001, dtype=torch.int64) * (rank + 1)
        dist.all_reduce(tensor, group=group)
        results.append(torch.equal(tensor, torch.arange(1001) * 6))
    try:
        set_algorithm("rong", group=group)
    except Exception as error:  # noqa: BLE001
        results.append(f"{type(error).__name__}: {error}")
    return results


def _error(run: Callable[[], Any]) -> list[Any]:
    began = time.monotonic()
    try:
        run()
    except Exception as error:  # noqa: BLE001
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["nothing", "", time.monotonic() - began]


def mismatch(rank: int, kind: str, ranks: list[int]) -> Any:
    group: Any = dist.new_group(ranks, backend="headway", timeout=timedelta(seconds=30))
    if rank not in ranks:
        return None
    dist.barrier(group=group)
    last = rank == ranks[-1]
    wide = torch.float64 if kind == "dtype" and last else torch.float32
    length = 101 if kind == "size" and last else 100
    tensor = torch.zeros(length, dtype=wide)

    def run() -> None:
        if kind == "operation" and last:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        elif kind == "root":
            dist.broadcast(tensor, ranks[1] if last else ranks[0], group=group)
        elif kind == "collective" and last:
            dist.broadcast(tensor, ranks[0], group=group)
        else:
            dist.all_reduce(tensor, group=group)

    first = _error(run)
    later = _error(lambda: dist.barrier(group=group))
    dist.destroy_process_group(group)
    return [first, later]


def stall(rank: int, ranks: list[int]) -> Any:
    group: Any = dist.new_group(ranks, backend="headway", timeout=timedelta(seconds=60))
    if rank not in ranks:
        return None
    dist.barrier(group=group)
    group.set_timeout(timedelta(seconds=0.7))
    if rank == ranks[-1]:
        time.sleep(2.5)
        return None
    return _error(lambda: dist.all_reduce(torch.zeros(10), group=group))


def failing_future(rank: int) -> Any:
    """What waits for a future, as DDP does, hears of the failure too."""
    group: Any = dist.new_group(backend="headway", timeout=timedelta(seconds=30))
    work: Any = dist.all_reduce(torch.zeros(5 + rank), group=group, async_op=True)
    found = _error(work.get_future().wait)[:2]
    return [*found, work.is_completed(), work.is_success(), type(work.exception()).__name__]


def lonely_receive(rank: int) -> Any:
    group: Any = dist.new_group(backend="headway", timeout=timedelta(seconds=1))
    return _error(lambda: dist.recv(torch.zeros(1), group=group, group_src=1)) if rank == 0 else None


def wrong_sizes(rank: int) -> Any:
    group: Any = dist.group.WORLD
    found = [
        _error(lambda: dist.all_gather_into_tensor(torch.zeros(4), torch.zeros(3))),
        _error(lambda: dist.reduce_scatter_tensor(torch.zeros(2), torch.zeros(5))),
        _error(lambda: group.all_to_all_single(torch.zeros(4), torch.zeros(4), [1, 1, 1], [2, 1, 1])),
        _error(lambda: group.allreduce([torch.zeros(2).to_sparse()])),
    ]
    tensor = torch.ones(2)
    dist.all_reduce(tensor)  # nothing was submitted, and the group is as good as before
    return [[name for name, _, _ in found], tensor.tolist()]


def killed(rank: int, victim: int) -> Any:
    group: Any = dist.new_group(backend="headway", timeout=timedelta(seconds=60))
    tensor = torch.zeros(1 << 20)
    dist.all_reduce(tensor, group=group)
    if rank == victim:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def run() -> None:
        for _ in range(100000):
            dist.all_reduce(tensor, group=group)

    return _error(run)


def ends(rank: int) -> Any:
    """No thread is left when the groups are destroyed, and a new world can be made with another store."""
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.2)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("headway")]
    dist.init_process_group("headway", init_method=os.environ["SECOND_STORE"], rank=rank, world_size=SIZE)
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    return [left, tensor.tolist()]


def _serve() -> None:
    import headway.exchange.process_group  # noqa: F401  registers the backend

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("headway", timeout=timedelta(seconds=60))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer: Any = ["done", globals()[name](rank, *arguments)]
        except BaseException:  # noqa: BLE001
            answer = ["raised", traceback.format_exc()]
        out.write(json.dumps(answer) + "\n")
        out.flush()
    # Without destroy_process_group: a script that just ends must not hang.


# What runs in the tests


class Crew:
    """Three processes that carry out the functions above."""

    def __init__(self, directory: str) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.codes = [0] * SIZE  # that they must end with
        self._answers: list[queue.Queue[Any]] = []
        self._listeners: list[threading.Thread] = []
        for rank in range(SIZE):
            environment = os.environ | {
                "RANK": str(rank),
                "HEADWAY_MACHINE": "aab"[rank],
                "WORLD_SIZE": str(SIZE),
                "SECOND_STORE": f"file://{directory}/second",
                "OMP_NUM_THREADS": "1",
            }
            code = (
                f"import sys, runpy; sys.argv = [{__file__!r}, '{directory}/first']; "
                f"runpy.run_path({__file__!r}, run_name='__main__')"
            )
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
            self.processes.append(process)
            answers: queue.Queue[Any] = queue.Queue()
            listener = threading.Thread(target=self._listen, args=(process, answers))
            listener.start()
            self._listeners.append(listener)
            self._answers.append(answers)

    @staticmethod
    def _listen(process: subprocess.Popen[str], answers: queue.Queue[Any]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(json.loads(line))
        answers.put(["ended", None])

    def do(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank's `function(rank, *arguments)` returns, or "ended" for a process that has died."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([function.__name__, arguments]) + "\n")
            process.stdin.flush()
        results = []
        for rank, answers in enumerate(self._answers):
            state, result = answers.get(timeout=PATIENCE_SECONDS)
            assert state != "raised", f"rank {rank}: {result}"
            results.append(result if state == "done" else state)
        return results

    def close(self) -> list[int]:
        """End the processes; their exit codes."""
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            return [process.wait(timeout=30) for process in self.processes]
        finally:
            for process, listener in zip(self.processes, self._listeners):
                process.kill()
                process.wait()
                listener.join(10)
                assert process.stdout is not None
                process.stdout.close()


pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("process_group")]


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(str(tmp_path_factory.mktemp("crew")))
    yield crew
    assert crew.close() == crew.codes, "a process did not end by itself"


def _same(losses: list[list[float]], reference: list[float]) -> None:
    for found in losses:
        assert found == pytest.approx(reference, rel=0, abs=1e-9)


@pytest.mark.parametrize("function", [ddp, ddp_with_a_hook, zero_redundancy, fully_sharded, pipeline])
def test_training_gives_the_losses_of_one_process_and_of_gloo(crew: Crew, function: Callable[..., Any]):
    for losses in crew.do(function):
        _same(losses, _alone())


def test_tensor_parallel_training_gives_the_losses_of_one_process(crew: Crew):
    _same(crew.do(tensor_parallel), _alone())


def test_a_sharded_checkpoint_comes_back_as_it_was_saved(crew: Crew):
    assert crew.do(checkpoint) == [[False, True]] * SIZE


def test_every_collective_gives_what_gloo_gives(crew: Crew):
    for differences, count in crew.do(everything):
        assert differences == {}
        assert count > 50


def test_what_gloo_does_not_do(crew: Crew):
    for rank, found in enumerate(crew.do(headway_alone)):
        average, scaled, truth, small, unequal, gaps, output, heard = found
        assert average == [2.0, 4.0]
        assert scaled == [3.0, 3.0]
        assert truth == [True, False]
        assert small == [6.0, 6.0]
        assert unequal == [[0.0], [1.0, 1.0], [2.0, 2.0, 2.0]]
        assert gaps == [0.0, 4.0, 8.0, 12.0]
        assert output == [3.0 * rank] * (rank + 1)
        assert heard == ([[1, 10.0], [2, 20.0]] if rank == 0 else [])


def test_receives_are_matched_by_tag(crew: Crew):
    assert crew.do(tags)[1] == [5.0, 7.0, 3.0]


def test_operations_under_way_at_once_keep_their_order(crew: Crew):
    assert crew.do(asynchronous) == [[True, 6.0, True]] * SIZE


def test_every_algorithm_can_be_chosen_and_an_unknown_one_is_refused(crew: Crew):
    for *right, refusal in crew.do(algorithms):
        assert right == [True] * 7
        assert refusal.startswith("InputError")
        assert "'rong'" in refusal


@pytest.mark.parametrize("ranks", [[0, 1], [0, 1, 2]], ids=["one machine", "two machines"])
@pytest.mark.parametrize("kind", ["dtype", "size", "operation", "root", "collective"])
def test_ranks_that_disagree_all_raise_and_say_what_each_submitted(crew: Crew, kind: str, ranks: list[int]):
    words = {"dtype": "float64", "size": "x 101", "operation": "max", "root": "root", "collective": "broadcast"}
    for rank, found in enumerate(crew.do(mismatch, kind, ranks)):
        if rank not in ranks:
            continue
        (name, text, seconds), (again, _, _) = found
        assert again == "MismatchError"
        if kind == "root" and name == "nothing":
            continue  # a root waits for nobody, and hears of it with the next operation
        assert name == "MismatchError", text
        assert words[kind] in text
        assert f"rank {rank}" in text
        assert seconds < 20  # by itself, not by the time-out


@pytest.mark.parametrize("ranks", [[0, 1], [0, 1, 2]], ids=["one machine", "two machines"])
def test_a_rank_that_does_not_come_is_named(crew: Crew, ranks: list[int]):
    found = crew.do(stall, ranks)
    for rank in ranks[:-1]:
        name, text, _ = found[rank]
        assert name == "StalledError"
        assert f"rank {ranks[-1]}" in text


def test_a_future_of_what_fails_fails_with_the_same_words(crew: Crew):
    for name, text, completed, success, kind in crew.do(failing_future):
        assert name == "RuntimeError"  # what torch makes of every error that passes through its futures
        assert "MismatchError" in text
        assert all(f"rank {rank}: all_reduce #1, float32 x {5 + rank}" in text for rank in range(SIZE))
        assert [completed, success, kind] == [True, False, "MismatchError"]


def test_a_receive_that_nobody_serves_gives_up(crew: Crew):
    name, text, _ = crew.do(lonely_receive)[0]
    assert name == "StalledError"
    assert "rank 1" in text


def test_what_cannot_be_is_refused_before_it_is_submitted(crew: Crew):
    for names, after in crew.do(wrong_sizes):
        assert names == ["InputError"] * 4
        assert after == [3.0, 3.0]


def test_groups_end_without_a_thread_left_and_a_new_world_begins(crew: Crew):
    assert crew.do(ends) == [[[], [3.0] * 3]] * SIZE


def test_survivors_of_a_killed_rank_raise_and_name_it(crew: Crew):
    # The last test of the file: the crew is not whole afterwards.
    crew.codes[1] = -signal.SIGKILL
    found = crew.do(killed, 1)
    assert found[1] == "ended"
    for rank in (0, 2):
        name, text, seconds = found[rank]
        assert name == "RankFailedError", text
        assert "rank 1" in text
        assert seconds < 30  # of a time-out of 60


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    _init: Any = dist.init_process_group

    def _by_file(backend: str, **options: Any) -> None:
        options.setdefault("init_method", f"file://{sys.argv[1]}")
        _init(backend, **({"rank": int(os.environ["RANK"]), "world_size": SIZE} | options))

    dist.init_process_group = _by_file
    _serve()
