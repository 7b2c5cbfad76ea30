"""Memory-centric tiling: a linear layer whose weight does not fit, run as a sequence of tiles.

ZeRO-Infinity (Rajbhandari et al., SC 2021, section 5.1.3) breaks a large operator into smaller ones in sequence: then
only one of them needs its parameters at a time. Here a tile is some rows of the weight, that is some of the layer's
outputs: each output is computed from the same products as before, and nothing is added up across tiles in the forward
pass. In the backward pass the gradient of the input is a sum over tiles, in another order than without them.

Each tile is a module of its own, so that whatever brings parameters to where modules need them brings one tile at a
time: parameters in a tier (`Plan.parameters_on`), or ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from headway.errors import PlanError

__all__ = ["Tile", "TiledLinear", "tile"]


@dataclass(frozen=True)
class Tile:
    """What a tile's parameter is of the untiled one: `rows` rows from `start` on of a tensor of `whole` shape."""

    name: str
    start: int
    rows: int
    whole: tuple[int, ...]


class TiledLinear(nn.Module):
    """`linear` in `count` tiles of its outputs, as even as they divide: the same function, the same gradients.

    Takes the linear layer's parameters over, and nothing of the layer itself is left. Raises PlanError for more tiles
    than outputs.
    """

    def __init__(self, linear: nn.Linear, count: int) -> None:
        super().__init__()
        if not 2 <= count <= linear.out_features:
            raise PlanError(
                f"a layer of {linear.out_features} outputs cannot be run in {count} tiles",
                place="plan: tiles",
                remedy="between 2 and the number of outputs",
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        edges = [round(number * linear.out_features / count) for number in range(count + 1)]
        self.starts = tuple(edges[:-1])
        self.tiles = nn.ModuleList()
        for start, stop in pairwise(edges):
            part = nn.Linear(linear.in_features, stop - start, bias=linear.bias is not None, device="meta")
            part.weight = _rows(linear.weight, start, stop)
            if linear.bias is not None:
                part.bias = _rows(linear.bias, start, stop)
            part.train(linear.training)
            self.tiles.append(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (…, in_features) to (…, out_features)."""
        return torch.cat([part(x) for part in self.tiles], -1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tiles={len(self.tiles)}"


def tile(model: nn.Module, counts: Mapping[str, int]) -> dict[str, Tile]:
    """Run the linear layers of `model` at these paths in so many tiles, in place; the name of each new parameter, and
    what it is of which old one.

    Raises PlanError for a path that is no `nn.Linear`, or whose parameters others use too.
    """
    made: dict[str, Tile] = {}
    for path, count in counts.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = None
        if type(module) is not nn.Linear:
            raise PlanError(
                f"{'no such module' if module is None else f'a {type(module).__name__}'}, and only nn.Linear has tiles",
                place=f"plan: tiles.{path}",
                remedy="name a linear layer of the model",
            )
        users = [name for name, each in model.named_modules() if each is module]
        owned = {id(parameter) for parameter in module.parameters()}
        sharing = [
            name
            for name, each in model.named_modules()
            if each is not module and any(id(p) in owned for p in each.parameters(recurse=False))
        ]
        if sharing:
            raise PlanError(
                f"its weight is that of {sharing[0]} too", place=f"plan: tiles.{path}", remedy="leave it whole"
            )
        tiled = TiledLinear(module, count)
        for name in users or [path]:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, tiled)
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        for number, (start, part) in enumerate(zip(tiled.starts, tiled.tiles)):
            for name, parameter in part.named_parameters():
                whole = f"{path}.{name}"
                made[f"{path}.tiles.{number}.{name}"] = Tile(whole, start, parameter.shape[0], shapes[name])
    return made


def _rows(parameter: torch.Tensor, start: int, stop: int) -> nn.Parameter:
    # A copy: a view would keep all rows in memory as long as one of them is.
    return nn.Parameter(parameter.detach()[start:stop].clone(), requires_grad=parameter.requires_grad)
