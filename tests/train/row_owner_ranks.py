"""One of several ranks that reduce gradients to the rows that each updates, and compare with what it works out alone.

    python row_owner_ranks.py RANK RANKS FILE BACKEND

FILE is where the ranks meet. Ends with an AssertionError where something is wrong.
"""

from __future__ import annotations

import random
import sys

import torch
import torch.distributed as dist
from owner_ranks import Sum
from torch.nn.parallel import DistributedDataParallel

from headway.exchange.ending import leave_group
from headway.train.row_owners import RowOwners


def rows(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What `torch.chunk` gives a rank, as it does in `fully_shard`; nothing where there are fewer chunks than ranks."""
    if not tensor.ndim:
        return tensor
    chunks = tensor.chunk(ranks)
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def check(rank: int, ranks: int, seed: int) -> None:
    rng = random.Random(seed)
    shapes = [tuple(rng.randint(1, 9) for _ in range(rng.randint(0, 3))) for _ in range(rng.randint(1, 9))]
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
    model = Sum(shapes, dtype)
    parameters = list(model.parameters())
    assert dist.group.WORLD is not None
    owners = RowOwners(dist.group.WORLD, piece_bytes=rng.choice([1, 40, 300, 1 << 20]))
    wrapped = DistributedDataParallel(model, bucket_cap_mb=rng.choice([2e-4, 25.0]), gradient_as_bucket_view=True)  # type: ignore[arg-type]

    def hook(_state, bucket):  # DDP refuses annotations that are text
        return owners.reduce(bucket)

    wrapped.register_comm_hook(None, hook)
    drawn = [torch.Generator().manual_seed(seed * ranks + each) for each in range(ranks)]
    for step in range(4):  # DDP makes its buckets anew after the first
        # Whole numbers, multiples of the number of ranks: sums are exact in any order.
        factors = [[torch.randint(-4, 5, shape, generator=one) * float(ranks) for shape in shapes] for one in drawn]
        mine = [factor.to(dtype) for factor in factors[rank]]
        if step < 3:
            wrapped(mine).backward()
        else:  # as for a model that was not traced
            model(mine).backward()
            for parameter in parameters:
                owners.reduce_by_itself(parameter)
        for at, parameter in enumerate(parameters):
            mean = torch.stack([of_rank[at] for of_rank in factors]).mean(0)
            assert parameter.grad is not None
            part = owners.part(parameter.grad)
            expected = rows(mean, rank, ranks)
            assert part.shape == expected.shape, (seed, at)
            assert torch.equal(part.double(), expected.double()), (seed, step, at)
            parameter.grad = None


def main() -> None:
    rank, ranks, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[4]
    torch.set_num_threads(1)
    if backend == "headway":
        from headway.exchange.process_group import register

        register()
    dist.init_process_group(backend, init_method=f"file://{sys.argv[3]}", rank=rank, world_size=ranks)
    for seed in range(12):
        check(rank, ranks, seed)
    leave_group(torch.device("cpu"))


if __name__ == "__main__":
    main()
