"""Operations in groups, so that a search over operations has fewer of them.

A group is a run of consecutive operations, forward or backward, that are computed together. What crosses from one group
to another are its tensors; what lives within a group is its workspace.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from headway.memory.swapping.problem import Action, Operation, Problem, Tensor

__all__ = ["expanded", "grouped"]


def grouped(problem: Problem, most: int) -> tuple[Problem, list[range]]:
    """The problem on at most `most` groups, and the operations of each; tensors keep their positions.

    Borders lie where the bytes saved (in forward) or the seconds (in backward) make about equal parts, moved to where
    few bytes cross.
    """
    stop = problem.forward_stop
    count = len(problem.operations)
    half = max(1, most // 2)
    members = [*_cut(problem, 0, stop, half), *_cut(problem, stop, count, most - half)]
    group_of = {position: at for at, member in enumerate(members) for position in member}
    crossing: set[int] = set()
    for tensor, described in enumerate(problem.tensors):
        readers = problem.readers[tensor]
        if described.maker < 0 or any(group_of[reader] != group_of[described.maker] for reader in readers):
            crossing.add(tensor)
    operations = tuple(_group(problem, member, crossing) for member in members)
    tensors = tuple(
        Tensor(
            name=tensor.name,
            bytes=tensor.bytes if at in crossing else 0.0,
            maker=group_of[tensor.maker] if tensor.maker >= 0 else -1,
        )
        for at, tensor in enumerate(problem.tensors)
    )
    coarse = Problem(
        name=f"{problem.name} in {len(members)} groups",
        operations=operations,
        tensors=tensors,
        paths=problem.paths,
        streams=problem.streams,
    )
    return coarse, members


def _cut(problem: Problem, start: int, stop: int, parts: int) -> list[range]:
    if start >= stop:
        return []
    size = [0.0] * (stop - start)
    change = [0.0] * (stop - start + 1)
    for tensor, described in enumerate(problem.tensors):
        if start <= described.maker < stop:
            if problem.readers[tensor] and problem.readers[tensor][-1] >= stop:
                size[described.maker - start] += described.bytes
            last = max((at for at in problem.readers[tensor] if at < stop), default=described.maker)
            change[described.maker - start] += described.bytes
            change[last - start] -= described.bytes
    if not any(size):
        size = [problem.operations[at].seconds for at in range(start, stop)]
    crossing: list[float] = []
    through = 0.0
    for each in change[:-1]:
        through += each
        crossing.append(through)
    total = sum(size) or 1.0
    reach = max(1, (stop - start) // (2 * parts))
    borders: set[int] = set()
    through = 0.0
    for at, each in enumerate(size):
        through += each
        if len(borders) < parts - 1 and through >= total * (len(borders) + 1) / parts:
            near = range(max(0, at - reach), min(len(size) - 1, at + reach + 1))
            borders.add(min(near, key=lambda place: crossing[place], default=at))
    edges = [start, *(start + border + 1 for border in sorted(borders)), stop]
    return [range(low, high) for low, high in itertools.pairwise(edges) if low < high]


def _group(problem: Problem, member: range, crossing: set[int]) -> Operation:
    inside: set[int] = set()
    inputs: dict[int, None] = {}
    outputs: list[int] = []
    live = most = 0.0
    for at in member:
        operation = problem.operations[at]
        for tensor in operation.inputs:
            if tensor not in inside:
                inputs[tensor] = None
        inside.update(operation.outputs)
        outputs.extend(tensor for tensor in operation.outputs if tensor in crossing)
        hidden = [tensor for tensor in operation.outputs if tensor not in crossing]
        live += sum(problem.tensors[tensor].bytes for tensor in hidden)
        over = operation.overwrites
        spared = problem.tensors[over].bytes if over >= 0 and over in inside and over not in crossing else 0.0
        most = max(most, live - spared + operation.workspace_bytes)
        for tensor in {*operation.inputs, *hidden}:
            within = tensor in inside and tensor not in crossing
            if within and (not problem.readers[tensor] or problem.readers[tensor][-1] == at):
                live -= problem.tensors[tensor].bytes
    first = problem.operations[member[0]]
    return Operation(
        name=first.name,
        seconds=sum(problem.operations[at].seconds for at in member),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        workspace_bytes=max(0.0, most),
        backward=first.backward,
        repeatable=all(problem.operations[at].repeatable for at in member),
    )


def expanded(raw: Sequence[tuple[Action, int, str]], members: Sequence[range]) -> list[tuple[Action, int, str]]:
    """Steps on groups as steps on operations."""
    found: list[tuple[Action, int, str]] = []
    for action, index, tier in raw:
        if action == "compute":
            found.extend((action, at, tier) for at in members[index])
        else:
            found.append((action, index, tier))
    return found
