"""One of several ranks that reduce gradients to their owners, and compare with what each rank can work out alone.

    python owner_ranks.py RANK RANKS FILE

FILE is where the ranks meet. Ends with an AssertionError where something is wrong.
"""

from __future__ import annotations

import random
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from headway.exchange.ending import leave_group
from headway.train.owners import Owners


class Sum(nn.Module):
    """A loss whose gradient by every parameter is known: `factors` of the rank."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes)

    def forward(self, factors: list[torch.Tensor]) -> torch.Tensor:
        return sum(((weight * factor).sum() for weight, factor in zip(self.weights, factors)), torch.zeros(()))


def check(rank: int, ranks: int, seed: int) -> None:
    rng = random.Random(seed)
    shapes = [tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 9))]
    model = Sum(shapes, rng.choice([torch.float32, torch.float64, torch.bfloat16]))
    parameters = list(model.parameters())
    assert dist.group.WORLD is not None
    owners = Owners(dist.group.WORLD, packed_bytes=rng.choice([0, 300, 1 << 20]))
    optimizer = torch.optim.SGD(parameters[: rng.randint(1, len(parameters))], lr=1.0)
    everywhere = [parameter for parameter in parameters if rng.random() < 0.2]
    wrapped = DistributedDataParallel(model, bucket_cap_mb=rng.choice([2e-4, 25.0]), gradient_as_bucket_view=True)  # type: ignore[arg-type]

    def hook(_state, bucket):  # DDP refuses annotations that are text
        return owners.reduce(bucket)

    wrapped.register_comm_hook(None, hook)
    zero = owners.deal(optimizer)
    assert zero is not None
    owners.everywhere(everywhere)
    drawn = [torch.Generator().manual_seed(seed * ranks + each) for each in range(ranks)]
    expected = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for _ in range(3):  # DDP makes its buckets anew after the first
        # Whole numbers, and a power of two of ranks or a multiple of them: sums are exact in any order.
        factors = [[torch.randint(-4, 5, shape, generator=one) * float(ranks) for shape in shapes] for one in drawn]
        wrapped([factor.to(parameters[0].dtype) for factor in factors[rank]]).backward()
        means = [torch.stack([of_rank[at] for of_rank in factors]).mean(0) for at in range(len(shapes))]
        for parameter, mean in zip(parameters, means):
            assert parameter.grad is not None
            if owners.owner_of(parameter) == rank or any(parameter is each for each in everywhere):
                assert torch.equal(parameter.grad.double(), mean.double()), (seed, parameter.shape)
        owners.drop_others(parameters)
        held = [at for at, parameter in enumerate(parameters) if parameter.grad is not None]
        assert held == [at for at, parameter in enumerate(parameters) if owners.owner_of(parameter) == rank]
        zero.step()
        updated = len(optimizer.param_groups[0]["params"])
        for at, mean in enumerate(means):
            if at < updated:
                expected[at] -= mean
            assert torch.equal(parameters[at].detach().double(), expected[at]), (seed, at)
            parameters[at].grad = None
    # Every parameter that the optimizer has is owned once, and the shares are as even as whole tensors allow.
    sizes = [0] * ranks
    for parameter in optimizer.param_groups[0]["params"]:
        sizes[owners.owner_of(parameter)] += parameter.numel()
    assert max(sizes) - min(sizes) <= max(parameter.numel() for parameter in optimizer.param_groups[0]["params"])


def main() -> None:
    rank, ranks = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=ranks)
    for seed in range(25):
        check(rank, ranks, seed)
    leave_group(torch.device("cpu"))


if __name__ == "__main__":
    main()
