"""Problems for the tests: drawn at random, and measured on small real models."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from headway.memory.swapping.problem import Encoding, Operation, Path, Problem, Tensor
from headway.workload.zoo.vision import ResNet


def drawn(seed: int, forward: int, *, paths: bool = True, encodings: bool = False) -> Problem:
    """A step with `forward` forward operations that read one or two tensors each, and a backward one for each."""
    generator = random.Random(seed)
    operations: list[Operation] = []
    tensors: list[Tensor] = [Tensor(name="given", bytes=0.0, maker=-1)]

    def make(name: str, inputs: tuple[int, ...], backward: bool) -> int:
        position = len(operations)
        made = len(tensors)
        encoding = None
        if encodings and generator.random() < 0.5:
            encoding = Encoding(name="sparse", ratio=generator.choice([0.0, 0.125, 0.5]), seconds=0.1)
        tensors.append(Tensor(name=name, bytes=float(generator.randint(1, 4)), maker=position, encoding=encoding))
        operations.append(
            Operation(
                name=name,
                seconds=float(generator.randint(1, 5)),
                inputs=inputs,
                outputs=(made,),
                backward=backward,
                repeatable=not backward,
            )
        )
        return made

    made = [0]
    for at in range(forward):
        count = min(len(made), generator.choice([1, 1, 2]))
        made.append(make(f"f{at}", tuple(sorted({made[-1], *generator.sample(made, count)})), False))
    gradient = -1
    for at in range(forward, 0, -1):
        read = {made[at], *operations[at - 1].inputs} if generator.random() < 0.7 else set(operations[at - 1].inputs)
        if gradient >= 0:
            read.add(gradient)
        gradient = make(f"b{at}", tuple(sorted(read)), True)
    way = (Path(tier="host", write_bytes_per_second=1.0, read_bytes_per_second=2.0, latency_seconds=0.1),)
    return Problem(
        name=f"drawn {seed}", operations=tuple(operations), tensors=tuple(tensors), paths=way if paths else ()
    ).validate()


def least_seconds(problem: Problem, budget_bytes: float) -> float:
    """The least time without transfers, by trying every state: what is on the device, and how far the step is.

    Dijkstra over (set of tensors, operations done for the first time); infinity where nothing fits. One output each.
    """
    operations, tensors = problem.operations, problem.tensors
    count = len(operations)
    start = frozenset[int]()
    best = {(start, 0): 0.0}
    order = itertools.count()
    queue = [(0.0, next(order), start, 0)]

    def size(held: frozenset[int]) -> float:
        return sum(tensors[at].bytes for at in held)

    while queue:
        seconds, _, held, done = heapq.heappop(queue)
        if best[held, done] < seconds:
            continue
        if done == count:
            return seconds

        def offer(cost: float, then: frozenset[int], reached: int) -> None:
            if cost < best.get((then, reached), float("inf")):
                best[then, reached] = cost
                heapq.heappush(queue, (cost, next(order), then, reached))

        for at in held:
            offer(seconds, held - {at}, done)
        for position in range(min(done + 1, count)):
            operation = operations[position]
            output = operation.outputs[0]
            if position < done and (not operation.repeatable or output in held):
                continue
            if any(tensors[at].maker >= 0 and at not in held for at in operation.inputs):
                continue
            then = held | {output}
            if size(then) + operation.workspace_bytes <= budget_bytes:
                offer(seconds + operation.seconds, then, max(done, position + 1))
    return float("inf")


def resnet(device: str = "cpu") -> tuple[nn.Module, Callable[[], object]]:
    torch.manual_seed(0)
    model = ResNet(blocks=(2, 2), bottleneck=False, width=8, classes=10).to(device)
    images = torch.randn(4, 3, 64, 64).to(device)
    labels = torch.randint(0, 10, (4,)).to(device)
    return model, lambda: functional.cross_entropy(model(images), labels).backward()


def transformer(device: str = "cpu") -> tuple[nn.Module, Callable[[], object]]:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True) for _ in range(3)]
    model = nn.Sequential(*layers).to(device)
    tokens = torch.randn(4, 16, 32).to(device)
    return model, lambda: model(tokens).square().mean().backward()


def lstm(device: str = "cpu") -> tuple[nn.Module, Callable[[], object]]:
    torch.manual_seed(0)
    model = nn.LSTM(16, 16, 3, batch_first=True).to(device)
    tokens = torch.randn(4, 8, 16).to(device)
    return model, lambda: model(tokens)[0].square().mean().backward()


MODELS = {"resnet": resnet, "transformer": transformer, "lstm": lstm}
