"""Horovod's interface for PyTorch: `import headway.horovod as hvd` in place of `import horovod.torch as hvd`.

    hvd.init()
    model, optimizer = ...
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

Nothing has to be compiled. docs/horovod.md says what is there, what differs, and which variables are read.
"""

from __future__ import annotations

import torch
import torch.distributed as _dist

from headway.errors import HeadwayError as HorovodInternalError
from headway.exchange.compression import Compression
from headway.horovod import elastic
from headway.horovod.operations import (
    allgather,
    allgather_async,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    alltoall,
    alltoall_async,
    barrier,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    grouped_allgather,
    grouped_allgather_async,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
    join,
    reducescatter,
    reducescatter_async,
    sparse_allreduce_async,
)
from headway.horovod.optimizer import DistributedOptimizer
from headway.horovod.ranks import (
    ProcessSet,
    add_process_set,
    cross_rank,
    cross_size,
    get_process_set_ids_and_ranks,
    global_process_set,
    init,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    rank,
    remove_process_set,
    shutdown,
    size,
    start_timeline,
    stop_timeline,
)
from headway.horovod.state import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from headway.horovod.submission import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    ReduceOp,
    Sum,
    poll,
    synchronize,
)

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "DistributedOptimizer",
    "HorovodInternalError",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "ReduceOp",
    "Sum",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "get_process_set_ids_and_ranks",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "start_timeline",
    "stop_timeline",
    "synchronize",
]


def mpi_built() -> bool:
    """Whether there is MPI: no. Headway reads what mpirun sets, and communicates through torch.distributed."""
    return False


def mpi_enabled() -> bool:
    """Whether MPI is used: no."""
    return False


def mpi_threads_supported() -> bool:
    """Whether MPI may be used by several threads: there is none."""
    return False


def gloo_built() -> bool:
    """Whether torch has gloo."""
    return _dist.is_available() and _dist.is_gloo_available()


def gloo_enabled() -> bool:
    """Whether gloo is used: for control always, and for CPU tensors unless another backend was chosen."""
    return gloo_built()


def nccl_built() -> int:
    """Whether torch has nccl, which then carries CUDA tensors; 0 or 1, as in Horovod."""
    return int(_dist.is_available() and _dist.is_nccl_available())


def cuda_built() -> bool:
    """Whether torch was built for CUDA."""
    return torch.version.cuda is not None


def rocm_built() -> bool:
    """Whether torch was built for ROCm."""
    return torch.version.hip is not None


def ddl_built() -> bool:
    """Whether there is IBM's DDL: no."""
    return False


def ccl_built() -> bool:
    """Whether there is Intel's oneCCL: no."""
    return False
