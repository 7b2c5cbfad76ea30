"""Where a pipeline may be cut, found from the dataflow of one recorded step.

A cut is possible before a module call where exactly one tensor that depends on parameters crosses from before to after,
and that tensor enters through this call's arguments and is read nowhere else. Tensors that follow from the model's
inputs alone (masks, rotary tables) may cross freely, as every pipeline stage computes them again.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from headway.workload.recording import Call, Recording

__all__ = ["Cuts"]

_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)


class Cuts:
    """The units of a model, which a pipeline stage has as a whole, and the places between them where it may be cut.

    - `units`: positions, among the recorded calls, of those that are units. `places`: in `units`, before which there is
      a cut; never 0, and none that would leave a layer without parameters.
    - `entries`: calls before which the dataflow allows a cut to which of their tensor arguments it is that crosses.
    """

    def __init__(self, model: torch.nn.Module, recording: Recording) -> None:
        self.model = model
        self.recording = recording
        self._tainted = self._taint()
        self.entries = self._entries()
        self.units, active = self._unit_calls(self._expanded(self.entries))
        self.places = self._with_parameters(self.units, self._cuts(self.entries, self.units, active))

    def _taint(self) -> set[int]:
        """Tensors that cannot be had from the model's inputs alone: they depend on parameters, or on chance."""
        recording = self.recording
        tainted = set(recording.parameter_tensors.values())
        for operator in range(recording.loss_stop):
            signature = recording.signatures[operator]
            # Flash attention is marked as random for its dropout; its result depends on its inputs anyway.
            by_chance = signature.is_random and not signature.func.__name__.startswith("_scaled_dot_product")
            if not by_chance and not any(identity in tainted for identity in recording.inputs[operator]):
                continue
            tainted.update(recording.outputs[operator])
            tainted.update(identity for identity, _ in recording.alias_updates.get(operator, ()))
        return tainted

    def _crossings(self) -> tuple[list[int], list[int], dict[int, int]]:
        """For each operator position: how many tainted tensors cross to it from before, the sum of their identities;
        and for each tensor the last position that reads it."""
        recording = self.recording
        stop = recording.loss_stop
        last: dict[int, int] = {}
        for operator in range(stop):
            for identity in recording.inputs[operator]:
                last[identity] = operator
        for identity in recording.model_outputs:
            last[identity] = max(last.get(identity, 0), recording.forward_stop)
        count = [0] * (stop + 2)
        total = [0] * (stop + 2)
        for operator in range(stop):
            changed = (identity for identity, _ in recording.alias_updates.get(operator, ()))
            for identity in {*recording.outputs[operator], *changed}:
                end = last.get(identity, -1)
                if identity in self._tainted and end > operator:
                    count[operator + 1] += 1
                    total[operator + 1] += identity
                    count[end + 1] -= 1
                    total[end + 1] -= identity
        for operator in range(1, stop + 2):
            count[operator] += count[operator - 1]
            total[operator] += total[operator - 1]
        return count, total, last

    def _entries(self) -> dict[int, int]:
        """Calls before which the dataflow allows a cut → the tensor argument that crosses."""
        recording = self.recording
        count, total, last = self._crossings()
        metas = {}
        for operator in range(recording.forward_stop):
            made = recording.signatures[operator].outputs
            metas.update(zip(recording.outputs[operator], made, strict=False))
        entries: dict[int, int] = {}
        for position, call in enumerate(recording.calls):
            if call.start >= recording.forward_stop or count[call.start] != 1 or call.stop < 0:
                continue
            if call.module in recording.recomputed:  # its call does not happen once for each micro-batch
                continue
            crossing = total[call.start]
            if last[crossing] >= call.stop or call.arguments.count(crossing) != 1:
                continue
            meta = metas.get(crossing)
            if meta is None or not recording.metas[meta].dtype.is_floating_point:
                continue
            entries[position] = call.arguments.index(crossing)
        return entries

    # -- units -------------------------------------------------------------------------------------------------------

    def _expanded(self, entries: dict[int, int]) -> set[str]:
        """Modules that are looked into instead of being one unit.

        The root, containers, and modules most of whose parameters sit in a chain of children between which a cut
        is possible. A repeated block (a child of a container with siblings of its own class) stays whole unless it
        holds such a chain of blocks itself.
        """
        modules = dict(self.model.named_modules())
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
        cut_at = {self.recording.calls[position].module for position in entries}
        blocks: set[str] = set()
        for name, module in modules.items():
            if isinstance(module, _CONTAINERS):
                kinds = [type(child) for child in module.children() if any(True for _ in child.children())]
                for child_name, child in module.named_children():
                    composite = any(True for _ in child.children()) and not isinstance(child, _CONTAINERS)
                    if composite and kinds.count(type(child)) > 1:
                        blocks.add(f"{name}.{child_name}" if name else child_name)

        def chain_inside(name: str, module: torch.nn.Module) -> bool:
            prefix = f"{name}." if name else ""
            for inner_name, inner in module.named_modules():
                if not inner_name or not isinstance(inner, _CONTAINERS):
                    continue
                path = prefix + inner_name
                children = dict(inner.named_children())
                if len(children) < 2 or 2 * sizes[path] <= sizes[name]:
                    continue
                if name in blocks and not any(f"{path}.{child}" in blocks for child in children):
                    continue
                if any(f"{path}.{child}" in cut_at for child in list(children)[1:]):
                    return True
            return False

        expanded: set[str] = set()

        def visit(name: str, module: torch.nn.Module) -> None:
            children = list(module.named_children())
            container = isinstance(module, _CONTAINERS)
            if not children or (name and not container and not chain_inside(name, module)):
                return
            expanded.add(name)
            for child_name, child in children:
                visit(f"{name}.{child_name}" if name else child_name, child)

        visit("", self.model)
        return expanded

    def _unit_calls(self, expanded: set[str]) -> tuple[list[int], dict[str, list[int]]]:
        """Calls that are units (positions in the recording), and for each unit module where in that list it is active.

        A unit module called inside another unit counts as active at the outer unit's place.
        """
        calls = self.recording.calls
        units: list[int] = []
        active: dict[str, list[int]] = {}
        inside: dict[int, int] = {}  # call → place of the unit call that it is in
        unit_modules: set[str] = set()
        for position, call in enumerate(calls):
            outer = inside.get(call.parent)
            if outer is not None:
                inside[position] = outer
            elif call.module not in expanded:
                inside[position] = len(units)
                units.append(position)
                unit_modules.add(call.module)
        for position, call in enumerate(calls):
            if position in inside:
                active.setdefault(call.module, []).append(inside[position])
        return units, {module: places for module, places in active.items() if module in unit_modules}

    def _cuts(self, entries: dict[int, int], units: list[int], active: dict[str, list[int]]) -> list[int]:
        """Places in `units` before which the model can be cut, in order; a place 0 is never among them."""
        recording = self.recording
        if recording.loss_parameters:
            return []
        blocked = [False] * (len(units) + 1)
        for places in active.values():
            for place in range(min(places) + 1, max(places) + 1):
                blocked[place] = True
        chosen: list[int] = []
        for place, position in enumerate(units):
            if place and position in entries and not blocked[place]:
                chosen.append(place)
            call = recording.calls[position]
            # Whoever begins after this unit must be able to stand in for it.
            if self.depends(call) and not self.structure(call):
                break
        return chosen

    def depends(self, call: Call) -> bool:
        """Whether what it returns depends on parameters, or on chance."""
        return any(identity in self._tainted for identity in call.results)

    def structure(self, call: Call) -> str:
        """How what it returns is put together, as torch writes it down; empty: it cannot."""
        if call.structure is None:
            return ""
        try:
            return pytree.treespec_dumps(call.structure)
        except (NotImplementedError, TypeError, ValueError):
            return ""  # a type that cannot be written down

    def _with_parameters(self, units: list[int], cuts: list[int]) -> list[int]:
        """The cuts that leave no layer without parameters: such a layer joins the one before (the first, the next)."""
        recording = self.recording
        bounds = [0, *[recording.calls[units[place]].start for place in cuts], recording.forward_stop]
        has = [
            any(recording.parameters_read[operator] for operator in range(bounds[index], bounds[index + 1]))
            for index in range(len(bounds) - 1)
        ]
        kept: list[int] = []
        seen = has[0] if has else True
        for index, place in enumerate(cuts, start=1):
            if has[index] and seen:
                kept.append(place)
            seen = seen or has[index]
        return kept
