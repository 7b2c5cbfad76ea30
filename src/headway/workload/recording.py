"""What the recorder writes down of one training step at one batch size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["Call", "OutputPlan", "Recording", "Signature", "TensorMeta", "tensor_leaves"]


@dataclass(frozen=True)
class TensorMeta:
    """What an operator can see of a tensor, values excepted."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    known_value: bool  # a fake tensor that carries its value (a constant made from a Python number)
    plain: bool  # strided, neither lazily conjugated nor lazily negated


@dataclass
class OutputPlan:
    """How to make one output again: `source` is the tensor argument whose storage it shares, or -1."""

    meta: int
    source: int


@dataclass
class Signature:
    """An operator together with the arguments and the metadata of the tensors that it was called on."""

    func: Any
    arguments: tuple[Any, ...]  # templates: tensors are placeholders, floats and bools come with their type
    keywords: tuple[tuple[str, Any], ...]
    inputs: tuple[int, ...]  # positions in Recording.metas
    outputs: tuple[int, ...]
    flop: int
    is_view: bool
    is_random: bool
    written: tuple[int, ...]  # tensor arguments that it changes in place
    plan: tuple[OutputPlan | None, ...] | None  # None: ask FakeTensorMode every time
    container: type | None  # of several outputs: tuple or list


@dataclass
class Call:
    """One call of a module: operators `start` to `stop` (exclusive), tensors in and out."""

    module: str
    parent: int  # position among the calls, or -1
    start: int
    arguments: tuple[int, ...]  # identities of the tensor leaves of (args, kwargs)
    stop: int = -1
    results: tuple[int, ...] = ()
    result_metas: tuple[int, ...] = ()
    structure: Any = None  # TreeSpec of what it returned; None if a leaf is no tensor


@dataclass
class Recording:
    """One training step at one batch size. Operators are parallel lists; `forward_stop` and `loss_stop` divide them."""

    metas: list[TensorMeta] = field(default_factory=list)
    signatures: list[Signature] = field(default_factory=list)
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # of a backward operator: the forward operator it differentiates
    parameters_read: list[tuple[str, ...]] = field(default_factory=list)
    alias_updates: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # operator → (identity, meta)
    calls: list[Call] = field(default_factory=list)
    recomputed: set[str] = field(default_factory=set)  # modules that run again during the backward pass
    forward_stop: int = 0
    loss_stop: int = 0
    model_inputs: tuple[int, ...] = ()
    model_input_metas: tuple[int, ...] = ()
    model_outputs: tuple[int, ...] = ()
    output_storages: set[int] = field(default_factory=set)
    parameter_tensors: dict[str, int] = field(default_factory=dict)
    loss_parameters: tuple[str, ...] = ()
    # Memory: (operator, signed bytes, storage) in order; storages given from outside do not appear.
    events: list[tuple[int, int, int]] = field(default_factory=list)
    storage_bytes: list[int] = field(default_factory=list)
    storage_origin: list[int] = field(default_factory=list)  # operator that allocated it; -1: given from outside
    saved: dict[int, int] = field(default_factory=dict)  # storage → first operator position at which it was saved
    gradients: set[int] = field(default_factory=set)  # storages of the parameters' gradients


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors in `tree`, in the order of torch's pytree; mappings and objects it does not know are looked into."""
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif isinstance(leaf, dict):
            for value in leaf.values():
                found.extend(tensor_leaves(value))
        elif hasattr(leaf, "__dataclass_fields__"):
            for name in leaf.__dataclass_fields__:
                found.extend(tensor_leaves(getattr(leaf, name, None)))
    return found
