"""Checkpoints in remote memory: as quick as a copy, and still there when ranks have died.

The periodic checkpoints of a run go into its passive memory node (`train.remote_memory`), which lives as long as the
launcher. Ranks that are started again go on from there; when the run ends, however, what is newest is written to disk.

    checkpoints = RemoteCheckpoints(region)
    checkpoint.save_in(checkpoints, parallel, step=20)
    checkpoint.load(checkpoints, parallel)          # in other ranks, under any plan

torch's distributed checkpoint says which part of which tensor is whose (`Writer` and `Reader` are its storage), and the
`Store` carries the bytes. Names in the region:

    <step>/<rank>/<number>   a large part of a tensor, or small ones one after the other
    <step>/metadata          torch's metadata, where each part is
    latest                   the step, and the bytes of its metadata: written last, in one piece

So a checkpoint that was not written to its end, by whomever, does not exist, and the one before it still does. That is
removed only after `latest` names the new one: the region needs room for two.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from headway.errors import CheckpointError, FieldError, InputError
from headway.memory.remote_shared import SharedVerbs
from headway.memory.remote_store import RemoteStore
from headway.memory.tiers import Pending, Store
from headway.memory.transfers import SEGMENT_BYTES
from headway.train.remote_memory import VARIABLE, RemoteMemory

__all__ = ["PREFIX", "Reader", "RemoteCheckpoints", "Writer"]

PREFIX = "checkpoints/"
"""What the names of checkpoints begin with in the region that a run's other tensors share."""

_LATEST = "latest"
_BUFFER_BYTES = 4 * SEGMENT_BYTES  # parts of a GPU's tensors pass through these
_SMALL_KEPT = 8  # while reading: one for each of so many ranks
_UNDER_WAY_BYTES = 16 * SEGMENT_BYTES  # of what is on its way: some of it is made only to be written


class RemoteCheckpoints:
    """The checkpoints of one run in `region`: at most the newest, and the one that is being written.

    `device`: where the tensors of this process are. Raises RunError when the memory node is gone.
    """

    def __init__(self, region: RemoteStore, *, device: torch.device | str = "cpu") -> None:
        self._region, self._device = region, torch.device(device)

    @classmethod
    def attach(cls, environment: Mapping[str, str], *, device: torch.device | str = "cpu") -> RemoteCheckpoints:
        """Those in the memory node that the environment names.

        Raises FieldError where it names none: only `headway run` on this machine starts a node that outlives ranks.
        """
        told = environment.get(VARIABLE, "")
        if not told:
            raise FieldError(
                "checkpoints are to go to remote memory, and there is no memory node that outlives the ranks",
                place="HEADWAY_CHECKPOINT_ON",
                remedy="start with headway run --checkpoint-on remote (local engine), or leave checkpoints on disk",
            )
        remote = RemoteMemory.from_json(told, place=VARIABLE)
        verbs = SharedVerbs([remote.node])
        return cls(RemoteStore(verbs, remote.node.region_bytes, prefix=PREFIX, slots=remote.slots), device=device)

    def __str__(self) -> str:
        return "remote memory"

    @property
    def step(self) -> int | None:
        """Of the newest checkpoint that is whole; None if there is none."""
        found = self.latest()
        return None if found is None else found[0]

    def latest(self, store: Store | None = None) -> tuple[int, int] | None:
        """Its step, and the bytes of its metadata, by `store` if one is open."""
        if f"{_LATEST}/0" not in self._region.names():
            return None
        with self.open() if store is None else contextlib.nullcontext(store) as store:
            step, size = self.fetch(store, _LATEST, (2,), torch.int64).tolist()
        return step, size

    def writer(self, step: int) -> Writer:
        """For one `torch.distributed.checkpoint.save`, by all ranks together."""
        return Writer(self, step)

    def reader(self) -> Reader:
        """For any number of `torch.distributed.checkpoint.load` of what is the newest now, until it is closed."""
        return Reader(self)

    def open(self) -> Store:
        """A store on the region whose tensors outlast it."""
        return Store(device=self._device, remote=self._region, persistent=True, buffer_bytes=_BUFFER_BYTES)

    def fetch(self, store: Store, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that some process has written."""
        with contextlib.suppress(InputError):  # taken over before
            store.adopt(name, shape, dtype)
        return store.read(name, into=torch.empty(shape, dtype=dtype)).wait()

    def commit(self, store: Store, step: int, metadata: Metadata) -> None:
        """Make a step whose parts are all there the newest; what was there before is removed after that."""
        packed = torch.frombuffer(bytearray(pickle.dumps(metadata)), dtype=torch.uint8)
        store.write(f"{step}/metadata", packed, "remote").wait()
        store.write(_LATEST, torch.tensor([step, packed.numel()]), "remote").wait()
        self.keep_only(step)

    def keep_only(self, step: int | None) -> None:
        """Remove what belongs to no step but this one: of older ones, and of those that did not come to their end."""
        kept = (_LATEST, str(step))
        for name in self._region.names():
            if name.partition("/")[0] not in kept:
                self._region.remove(name)


class _Stored(NamedTuple):
    """Where an item is: bytes `start` to `stop` of the tensor `name` of `size` bytes."""

    name: str
    size: int
    start: int
    stop: int
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None  # None: bytes that torch knows how to read


class Writer(StorageWriter):
    """torch's storage, to write: each rank its parts, the first one the metadata at the end.

    Not for the step that is the newest already: its parts would be replaced under the eyes of `latest`.
    """

    def __init__(self, checkpoints: RemoteCheckpoints, step: int) -> None:
        self._checkpoints, self._step = checkpoints, step
        self._rank, self._is_first = 0, True

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, rank: int = 0, **kwargs: Any) -> None:
        """Remember who this is."""
        self._rank, self._is_first = rank, is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are; room is made for them, before any rank writes."""
        self._checkpoints.keep_only(self._checkpoints.step)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's parts; done when it returns."""
        with self._checkpoints.open() as store:
            results = _Packing(store, f"{self._step}/{self._rank}").write(plan, planner)
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written."""
        metadata.storage_data = {one.index: one.storage_data for each in results for one in each}
        with self._checkpoints.open() as store:
            self._checkpoints.commit(store, self._step, metadata)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """There are none: the step names a checkpoint."""
        return False


class _Packing:
    """Puts items into tensors of the store: large ones alone, small ones together, so that names stay few."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._number = 0
        self._leaving: deque[tuple[Pending, int]] = deque()
        self._leaving_bytes = 0
        self._small: list[tuple[Any, torch.Tensor, tuple[int, ...], torch.dtype | None]] = []
        self._results: list[WriteResult] = []

    def write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                assert isinstance(data, io.BytesIO)
                content, shape, dtype = torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8), (), None
            else:
                assert isinstance(data, torch.Tensor)
                shape, dtype = tuple(data.shape), data.dtype
                content = data.detach().contiguous().reshape(-1).view(torch.uint8)
            self._add(item.index, content, shape, dtype)
        self._put_small()
        self._wait(0)
        return self._results

    def _add(self, index: Any, content: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        if content.numel() >= SEGMENT_BYTES // 2:
            self._put(content, [(index, 0, content.numel(), shape, dtype)])
            return
        if sum(each.numel() for _, each, _, _ in self._small) + content.numel() > SEGMENT_BYTES:
            self._put_small()
        self._small.append((index, content, shape, dtype))

    def _put_small(self) -> None:
        if not self._small:
            return
        found, at = [], 0
        for index, content, shape, dtype in self._small:
            found.append((index, at, at + content.numel(), shape, dtype))
            at += content.numel()
        together = torch.cat([content.cpu() for _, content, _, _ in self._small])
        self._small = []
        self._put(together, found)

    def _put(self, content: torch.Tensor, items: Iterable[tuple[Any, int, int, tuple[int, ...], Any]]) -> None:
        name, size = f"{self._prefix}/{self._number}", content.numel()
        self._number += 1
        for index, start, stop, shape, dtype in items:
            stored = _Stored(name, size, start, stop, shape, dtype)
            self._results.append(WriteResult(index=index, size_in_bytes=stop - start, storage_data=stored))
        if size:
            self._leaving.append((self._store.write(name, content, "remote"), size))
            self._leaving_bytes += size
            self._wait(_UNDER_WAY_BYTES)

    def _wait(self, left: int) -> None:
        while self._leaving and self._leaving_bytes > left:
            pending, size = self._leaving.popleft()
            pending.wait()
            self._leaving_bytes -= size


class Reader(StorageReader):
    """torch's storage, to read the newest checkpoint, tensor by tensor if need be: a context manager.

    Where all parts are is read once. Raises CheckpointError where there is no checkpoint.
    """

    def __init__(self, checkpoints: RemoteCheckpoints) -> None:
        self._checkpoints = checkpoints
        self._store = checkpoints.open()
        self._metadata: Metadata | None = None
        self._stored: dict[MetadataIndex, _Stored] = {}
        self._small: OrderedDict[str, torch.Tensor] = OrderedDict()  # many tensors' parts, read not long ago

    def __str__(self) -> str:
        return str(self._checkpoints)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        self._store.__exit__(*failure)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: a reader reads the newest."""

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds."""
        if self._metadata is not None:
            return self._metadata
        found = self._checkpoints.latest(self._store)
        if found is None:
            raise CheckpointError(
                "holds no checkpoint", place=str(self._checkpoints), remedy="start from the beginning"
            )
        step, size = found
        packed = self._checkpoints.fetch(self._store, f"{step}/metadata", (size,), torch.uint8)
        # Written by this run's own ranks, into memory that only its processes reach.
        metadata = self._metadata = pickle.loads(packed.numpy().tobytes())
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **kwargs: Any) -> None:
        """Remember where everything is."""
        self._stored = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what is planned, one tensor of the store at a time; done when it returns."""
        together: dict[str, list[Any]] = {}
        for item in plan.items:
            together.setdefault(self._stored[item.storage_index].name, []).append(item)
        for name, items in together.items():
            content = self._content(name, self._stored[items[0].storage_index].size)
            for item in items:
                self._hand_over(item, content, planner)
        return _done(None)

    def _content(self, name: str, size: int) -> torch.Tensor:
        """A tensor of the store; the last few of those that hold many small parts are kept."""
        if name in self._small:
            self._small.move_to_end(name)
            return self._small[name]
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        content = self._checkpoints.fetch(self._store, name, (size,), torch.uint8)
        if size <= SEGMENT_BYTES:
            self._small[name] = content
            if len(self._small) > _SMALL_KEPT:
                self._small.popitem(last=False)
        return content

    def _hand_over(self, item: Any, content: torch.Tensor, planner: LoadPlanner) -> None:
        stored = self._stored[item.storage_index]
        mine = content[stored.start : stored.stop]
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(mine.numpy().tobytes()))
            return
        assert stored.dtype is not None
        if stored.start % stored.dtype.itemsize:  # torch looks at numbers only where they are aligned
            mine = mine.clone()
        whole = mine.view(stored.dtype).view(stored.shape)
        target = planner.resolve_tensor(item).detach()
        target.copy_(narrow_tensor_by_index(whole, item.storage_offsets, item.lengths))
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """There are none: the newest is read."""
        return False


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
