"""A `Graph` made of a solved step and the places where it may be cut: layers with their operators, memory and units."""

from __future__ import annotations

import bisect
import hashlib

import torch

from headway.workload.cuts import Cuts
from headway.workload.graph import Affine, Graph, Layer, Operator, Parameter, TensorKind, Unit
from headway.workload.recording import Recording
from headway.workload.solving import SIZES, Solution, affine, short_name

__all__ = ["Builder"]


class Builder:
    """The graph of `model`, from its step as `solution` has it, cut as `cuts` allows."""

    def __init__(self, model: torch.nn.Module, solution: Solution, cuts: Cuts) -> None:
        self.model = model
        self.solution = solution
        self.cuts = cuts
        self.name, self.low, self.high = solution.name, solution.low, solution.high
        self.solved, self.kind = solution.operators, solution.kind
        self.notes = self._notes()

    def graph(self, first_input: torch.Tensor) -> Graph:
        """All of it, without what `find_blocks` adds."""
        low, high = self.low, self.high
        entries, units, cuts = self.cuts.entries, self.cuts.units, self.cuts.places
        starts = [low.calls[units[place]].start for place in cuts]
        layer_of = self._layers_of_operators(starts)
        count = len(starts) + 1
        operators = self._operators(layer_of)
        memory = [_Memory(recording, layer_of, count) for recording in (low, high)]
        forward: list[list[int]] = [[] for _ in range(count)]
        backward: list[list[int]] = [[] for _ in range(count)]
        for position, layer in enumerate(layer_of):
            (forward if position < low.loss_stop else backward)[layer].append(position)
        read = [
            tuple(dict.fromkeys(name for position in positions for name in low.parameters_read[position]))
            for positions in forward
        ]
        parameters = self._parameters(read)
        places = [0, *cuts, len(units)]
        layers: list[Layer] = []
        kinds = self._identity_kinds()
        for index in range(count):
            own = units[places[index] : places[index + 1]]
            entry = low.calls[units[cuts[index - 1]]] if index else None
            crossing = [
                low.calls[units[place]].arguments[entries[units[place]]]
                for place in cuts[max(index - 1, 0) : index + 1]
            ]
            output = kinds[crossing[-1]] if index < count - 1 else self._final_output()
            shapes = [parameters[name] for name in read[index]]
            layers.append(
                Layer(
                    name=self._layer_name(own, read[index]),
                    entry_module=entry.module if entry else "",
                    entry_argument=entries[units[cuts[index - 1]]] if entry else 0,
                    forward=tuple(forward[index]),
                    backward=tuple(backward[index]),
                    parameters=read[index],
                    forward_flop=self._flop(forward[index]),
                    backward_flop=self._flop(backward[index]),
                    saved=affine(memory[0].saved[index], memory[1].saved[index]),
                    saved_sharded=Affine(),
                    output=output,
                    input=kinds[crossing[0]] if index else None,
                    forward_peak_extra=affine(memory[0].forward_extra[index], memory[1].forward_extra[index]),
                    backward_peak_extra=affine(memory[0].backward_extra[index], memory[1].backward_extra[index]),
                    signature=self._signature(forward[index], shapes),
                )
            )
        return Graph(
            name=self.name,
            operators=tuple(operators),
            layers=tuple(layers),
            parameters=tuple(parameters.values()),
            units=tuple(self._units()),
            inputs=tuple(self.kind(a, b) for a, b in zip(low.model_input_metas, high.model_input_metas, strict=True)),
            input_tensors=low.model_inputs,
            output_tensors=low.model_outputs,
            buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in self.model.buffers()),
            tokens_per_sample=(
                first_input.size(1)
                if first_input.dim() == 2 and not first_input.is_floating_point() and first_input.dtype != torch.bool
                else 0
            ),
            loss_saved=affine(memory[0].loss_saved, memory[1].loss_saved),
            notes=tuple(self.notes),
        )

    def _layers_of_operators(self, starts: list[int]) -> list[int]:
        low = self.low
        layers: list[int] = []
        for operator, owner in enumerate(low.owners):
            if operator < low.forward_stop:
                layers.append(bisect.bisect_right(starts, operator))
            elif operator < low.loss_stop or owner < 0 or owner >= operator:
                layers.append(len(starts))
            else:
                layers.append(layers[owner])
        return layers

    def _operators(self, layer_of: list[int]) -> list[Operator]:
        low, high = self.low, self.high
        operators: list[Operator] = []
        for position, solved in enumerate(self.solved):
            outputs = solved.outputs
            output_tensors = low.outputs[position]
            inner = position in low.alias_updates
            written = len(output_tensors) - len(outputs)
            if inner or written > 0:
                # Arguments written in place, and other views of them that are read later, are results too.
                metas = (
                    [solved.inputs[index] for index in low.signatures[position].written][-written:] if written else []
                )
                outputs = (*outputs, *metas)
                pairs = zip(low.alias_updates.get(position, ()), high.alias_updates.get(position, ()), strict=True)
                for (identity, a), (_, b) in pairs:
                    outputs = (*outputs, self.kind(a, b))
                    output_tensors = (*output_tensors, identity)
            operators.append(
                Operator(
                    target=solved.target,
                    module=low.modules[position],
                    layer=layer_of[position],
                    backward=position >= low.loss_stop,
                    inputs=solved.inputs,
                    outputs=outputs,
                    input_tensors=low.inputs[position],
                    output_tensors=output_tensors,
                    arguments=solved.arguments,
                    keywords=solved.keywords,
                    flop=solved.flop,
                    is_view=solved.is_view,
                    reads_parameters=low.parameters_read[position],
                )
            )
        return operators

    def _identity_kinds(self) -> dict[int, TensorKind]:
        found: dict[int, TensorKind] = {}
        for position in range(self.low.forward_stop):
            found.update(zip(self.low.outputs[position], self.solved[position].outputs, strict=False))
        return found

    def _final_output(self) -> TensorKind:
        kinds = self._identity_kinds()
        floating = [kinds[identity] for identity in self.low.model_outputs if identity in kinds]
        if floating:
            return floating[0]
        return self.kind(self.low.model_input_metas[0], self.high.model_input_metas[0])

    def _flop(self, positions: list[int]) -> Affine:
        fixed = sum(self.solved[position].flop.fixed for position in positions)
        return Affine(fixed=fixed, per_sample=sum(self.solved[position].flop.per_sample for position in positions))

    def _parameters(self, read: list[tuple[str, ...]]) -> dict[str, Parameter]:
        first: dict[str, int] = {}
        for layer, names in enumerate(read):
            for name in names:
                first.setdefault(name, layer)
        tensors: dict[int, tuple[str, torch.Tensor, list[str]]] = {}
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            if id(tensor) in tensors:
                tensors[id(tensor)][2].append(name)
            else:
                tensors[id(tensor)] = (name, tensor, [])
        modules = {module: layer for layer, names in enumerate(read) for module in map(_parent, names)}
        made: dict[str, Parameter] = {}
        for name, tensor, aliases in tensors.values():
            made[name] = Parameter(
                name=name,
                shape=tuple(tensor.shape),
                dtype=short_name(tensor.dtype),
                # A parameter that nothing reads stays with its neighbours in the same module.
                layer=first.get(name, modules.get(_parent(name), 0)),
                tensor=self.low.parameter_tensors.get(name, -1),
                trainable=tensor.requires_grad,
                aliases=tuple(aliases),
            )
        return made

    def _layer_name(self, units: list[int], read: tuple[str, ...]) -> str:
        names = list(dict.fromkeys(self.low.calls[position].module for position in units))
        bearing = [name for name in names if any(parameter.startswith(f"{name}.") for parameter in read)]
        names = bearing or names
        if not names:
            return self.name
        return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"

    def _signature(self, positions: list[int], parameters: list[Parameter]) -> str:
        digest = hashlib.sha256()
        numbers: dict[int, int] = {}
        for position in positions:
            if position >= self.low.forward_stop:
                break
            digest.update(self.solved[position].digest)
            edges = [
                numbers.setdefault(identity, len(numbers))
                for identity in (*self.low.inputs[position], *self.low.outputs[position])
            ]
            digest.update(str(edges).encode())
        for parameter in parameters:
            digest.update(f"{parameter.shape} {parameter.dtype} {parameter.trainable}".encode())
        return digest.hexdigest()[:16]

    def _units(self) -> list[Unit]:
        made: list[Unit] = []
        seen: set[str] = set()
        for place, position in enumerate(self.cuts.units):
            call = self.low.calls[position]
            if call.module in seen:
                continue
            seen.add(call.module)
            twin = self.high.calls[position]
            made.append(
                Unit(
                    module=call.module,
                    layer=bisect.bisect_right(self.cuts.places, place),
                    produces=tuple(self.kind(a, b) for a, b in zip(call.result_metas, twin.result_metas, strict=True)),
                    structure=self.cuts.structure(call),
                    depends_on_parameters=self.cuts.depends(call),
                )
            )
        return made

    def _notes(self) -> list[str]:
        notes: list[str] = []
        low = self.low
        # SyncBatchNorm included; InstanceNorm normalises each sample by itself.
        normalising = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
            and (module.training or module.running_mean is None)
        ]
        if normalising:
            notes.append(
                f"BatchNorm in training mode ({normalising[0]} and {len(normalising) - 1} more) couples the samples of "
                "a micro-batch: results depend on how a batch is divided"
            )
        dropping = {"bernoulli", "native_dropout", "bernoulli_", "rrelu_with_noise"}
        random = [
            low.modules[operator]
            for operator in range(low.loss_stop)
            if low.signatures[operator].func.__name__.split(".")[0] in dropping
        ]
        if random:
            notes.append(
                f"dropout is active ({random[0] or 'the model'}): two runs agree only if their random numbers do"
            )
        if any(sum(slope != 0 for slope in kind.per_sample) > 1 for kind in self.solution.kinds.values()):
            notes.append(
                "some tensors grow with the square of the number of samples: sizes and FLOP are exact at "
                f"{SIZES[0]} and {SIZES[1]} samples and extrapolated elsewhere"
            )
        if low.loss_parameters:
            notes.append(
                f"the loss reads parameters ({low.loss_parameters[0]}), so the model cannot be cut into stages"
            )
        return notes


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


class _Memory:
    """What autograd keeps, and what lives besides, layer by layer, in one recording. Everything in bytes.

    `saved` counts a storage with the layer that allocated it. `loss_saved` is what the loss saves besides, and the
    model's output, which whoever computes the loss still holds during the backward pass. An extra is the peak of all
    live storages while the layer runs (parameters, inputs and gradients of parameters excluded) above what layers up
    to it have saved; for the last layer, which includes the loss, also above `loss_saved`.
    """

    def __init__(self, recording: Recording, layer_of: list[int], layers: int) -> None:
        self.saved = [0] * layers
        self.loss_saved = 0
        sizes, origin = recording.storage_bytes, recording.storage_origin
        held = dict.fromkeys(recording.output_storages, recording.forward_stop)
        for storage, operator in {**held, **recording.saved}.items():
            if origin[storage] < 0:
                continue
            if operator >= recording.forward_stop:
                self.loss_saved += sizes[storage]
            else:
                self.saved[layer_of[min(origin[storage], len(layer_of) - 1)]] += sizes[storage]
        through = 0
        kept: list[int] = []
        for amount in self.saved:
            through += amount
            kept.append(through)
        # The output that the loss's caller holds is nothing to layers on a device that never sees it.
        held = {storage for storage in held if recording.saved.get(storage, len(layer_of)) >= recording.forward_stop}
        forward = [0] * layers
        backward = [0] * layers
        live = live_held = 0
        for operator, amount, storage in recording.events:
            if storage in recording.gradients:
                continue
            live += amount
            if storage in held:
                live_held += amount
            if operator >= len(layer_of):
                continue
            layer = layer_of[operator]
            peaks = forward if operator < recording.loss_stop else backward
            peaks[layer] = max(peaks[layer], live if layer == layers - 1 else live - live_held)
        kept[-1] += self.loss_saved
        self.forward_extra = [max(0, peak - above) for peak, above in zip(forward, kept, strict=True)]
        self.backward_extra = [max(0, peak - above) for peak, above in zip(backward, kept, strict=True)]
