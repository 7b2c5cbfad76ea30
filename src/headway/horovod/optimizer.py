"""`DistributedOptimizer`: the user's optimizer, stepping on gradients that are combined over all ranks.

While backward computes one gradient, those before it are exchanged: a hook on each parameter submits its gradient as
soon as it is accumulated, and `step` waits for all of them (Sergeev and Del Balso 2018). With Adasum the optimizer
steps on each rank's own gradients first, and what is combined are the changes that this made to the parameters (Maleki
et al. 2021, section 4).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from headway.errors import InputError
from headway.exchange.batches import divide
from headway.exchange.compression import Compression
from headway.horovod.operations import sparse_allreduce_async
from headway.horovod.ranks import ProcessSet, context, global_process_set, number_of
from headway.horovod.submission import Adasum, Average, Pending, ReduceOp, Sum, submit

__all__ = ["DistributedOptimizer"]

Parameters = Sequence[torch.nn.Parameter]


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: ReduceOp = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Parameters] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet | None = global_process_set,
) -> Any:
    """`optimizer` with its gradients (or, for Adasum, its steps) combined over the ranks by `op` before they count.

    The result is an optimizer of the same kind with the same state and parameter groups. `named_parameters` give the
    tensors names that are the same on all ranks: `model.named_parameters()`. `compression` makes them smaller for the
    wire. With `backward_passes_per_step` above 1 gradients are accumulated over as many backward passes, and not
    divided by their number. An average may be split by `gradient_predivide_factor` into a division before the sum and
    one after it. `groups`: a number, or lists of parameters; gradients of a group are exchanged together.
    `sparse_as_dense` exchanges sparse gradients as dense ones.

    Raises InputError for arguments that contradict each other or the parameters.
    """
    named = _names(optimizer, named_parameters)
    if op not in (Average, Sum, Adasum):
        raise InputError(f"{op} of gradients", place="DistributedOptimizer", remedy="Average, Sum or Adasum")
    if gradient_predivide_factor != 1.0 and op is not Average:
        raise InputError(
            "gradient_predivide_factor splits an average", place="DistributedOptimizer", remedy="use op=hvd.Average"
        )
    if backward_passes_per_step < 1:
        raise InputError(
            f"backward_passes_per_step is {backward_passes_per_step}", place="DistributedOptimizer", remedy="1 or more"
        )
    base = type(optimizer)
    mixin = _StepsCombined if op is Adasum else _GradientsCombined
    wrapped: Any = object.__new__(type(base.__name__, (mixin, base), {"__doc__": base.__doc__}))
    # The same state and groups. A learning-rate schedule has put its own `step` on the instance; ours has to be found.
    wrapped.__dict__.update({key: value for key, value in optimizer.__dict__.items() if key != "step"})
    wrapped._wrapped = optimizer
    if op is Adasum:
        if compression.is_sparse:
            raise InputError("Adasum needs whole tensors", place="compression", remedy="use none, fp16 or bf16")
        wrapped._prepare_steps(named, compression, process_set)
    else:
        wrapped._prepare_gradients(
            named,
            compression,
            backward_passes_per_step,
            op,
            gradient_predivide_factor,
            _groups(named, groups if groups is not None else num_groups),
            sparse_as_dense,
            process_set,
        )
    return wrapped


def _names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None
) -> dict[torch.nn.Parameter, str]:
    """The name of each parameter of the optimizer, in the order of the model, or of the optimizer without names."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if named_parameters is None:
        return {
            parameter: f"noname.{i}.{j}"
            for i, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
        }
    given = list(named_parameters)
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in given):
        raise InputError(
            "named_parameters are no pairs", place="DistributedOptimizer", remedy="give model.named_parameters()"
        )
    twice = sorted({name for name, _ in given if sum(name == other for other, _ in given) > 1})
    if twice:
        raise InputError(
            f"the names {', '.join(map(repr, twice[:5]))} are given twice",
            place="DistributedOptimizer: named_parameters",
            remedy="give each parameter its own name",
        )
    names = {parameter: name for name, parameter in given}
    missing = sum(parameter not in names for parameter in own)
    if missing:
        raise InputError(
            f"{missing} of the optimizer's {len(own)} parameters have no name",
            place="DistributedOptimizer: named_parameters",
            remedy="give the names of all parameters, or leave named_parameters out",
        )
    mine = set(own)
    return {parameter: name for parameter, name in names.items() if parameter in mine}


def _groups(named: dict[torch.nn.Parameter, str], groups: int | Sequence[Parameters]) -> list[list[torch.nn.Parameter]]:
    """Lists of parameters that are exchanged together; the others go alone."""
    trained = [parameter for parameter in named if parameter.requires_grad]
    if isinstance(groups, int):
        if groups < 0:
            raise InputError(f"{groups} groups", place="DistributedOptimizer: groups", remedy="0 or more")
        length = -(-len(trained) // groups) if groups else 0
        return [trained[at : at + length] for at in range(0, len(trained), length)] if groups else []
    found: list[list[torch.nn.Parameter]] = []
    seen: set[torch.nn.Parameter] = set()
    for group in groups:
        members = list(group)
        if any(parameter not in named or parameter in seen for parameter in members):
            raise InputError(
                "a parameter is in two groups, or not in the optimizer",
                place="DistributedOptimizer: groups",
                remedy="give lists of different parameters",
            )
        seen.update(members)
        found.append([parameter for parameter in members if parameter.requires_grad])
    return found


class _GradientsCombined:
    """Put in front of the user's class: gradients are exchanged as they come, and `step` waits for them."""

    param_groups: list[dict[str, Any]]
    _wrapped: torch.optim.Optimizer

    def _prepare_gradients(
        self,
        named: dict[torch.nn.Parameter, str],
        compression: Any,
        passes: int,
        op: ReduceOp,
        predivide: float,
        groups: list[list[torch.nn.Parameter]],
        sparse_as_dense: bool,
        process_set: ProcessSet | None,
    ) -> None:
        self._names, self._compression, self._passes = named, compression, passes
        self._settings = {"op": op, "prescale": 1 / predivide, "postscale": predivide, "process_set": process_set}
        self._sparse_as_dense = sparse_as_dense
        # What the next forward pass needs first goes first, among what is ready.
        self._priorities = {parameter: -position for position, parameter in enumerate(named)}
        self._group_of = {parameter: number for number, group in enumerate(groups) for parameter in group}
        self._groups = groups
        self._left = {parameter: passes for parameter in named if parameter.requires_grad}
        self._ready: dict[int, set[torch.nn.Parameter]] = {number: set() for number in range(len(groups))}
        self._pending: dict[torch.nn.Parameter, Callable[[], None]] = {}
        self._should_synchronize, self._synchronized = True, False
        ranks = context().controller.sets[number_of(process_set)]
        self._takes_part = context().rank in ranks and len(ranks) > 1
        if self._takes_part:
            for parameter in self._left:
                parameter.register_post_accumulate_grad_hook(self._accumulated)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accumulate gradients over another number of backward passes, from the next step on."""
        self._passes = passes
        self._left = dict.fromkeys(self._left, passes)

    def _accumulated(self, parameter: torch.Tensor) -> None:
        """A gradient is there; if it was the last backward pass of the step, it is exchanged."""
        assert isinstance(parameter, torch.nn.Parameter)
        if self._left[parameter] <= 0 or parameter in self._pending:
            raise InputError(
                f"gradients were computed more than backward_passes_per_step ({self._passes}) times before step()",
                place=f"parameter {self._names[parameter]!r}",
                remedy="set backward_passes_per_step to what the loop does, or call step() or synchronize() before",
            )
        self._left[parameter] -= 1
        if self._left[parameter] == 0:
            self._exchange(parameter)

    def _exchange(self, parameter: torch.nn.Parameter) -> None:
        """Submit a gradient, or note it until its group is complete."""
        if parameter.grad is None:
            # Another rank may have got one. Without any, this parameter has to take part all the same.
            parameter.grad = torch.zeros_like(parameter)
        number = self._group_of.get(parameter)
        if number is None:
            self._submit([parameter], "")
            return
        self._ready[number].add(parameter)
        if len(self._ready[number]) == len(self._groups[number]):
            self._ready[number] = set()
            self._submit(self._groups[number], f"gradient.group.{number}")

    def _submit(self, parameters: Sequence[torch.nn.Parameter], group: str) -> None:
        dense = []
        for parameter in parameters:
            assert parameter.grad is not None
            if parameter.grad.is_sparse and self._sparse_as_dense:
                parameter.grad = parameter.grad.to_dense()
            if parameter.grad.is_sparse or self._compression.is_sparse:
                if group:
                    raise InputError(
                        "sparse gradients cannot be in a group",
                        place=f"parameter {self._names[parameter]!r}",
                        remedy="sparse_as_dense=True, or no groups",
                    )
                self._submit_sparse(parameter)
            else:
                dense.append(parameter)
        if not dense:
            return
        names = [f"gradient.{self._names[parameter]}" for parameter in dense]
        small = [self._compression.compress(parameter.grad, self._names[parameter]) for parameter in dense]
        tensors = [tensor for tensor, _ in small]
        handles = submit(
            "all_reduce",
            tensors,
            names,
            outputs=[tensor.data for tensor in tensors],
            group=group,
            priorities=[self._priorities[parameter] for parameter in dense],
            **self._settings,
        )
        for parameter, handle, (tensor, how) in zip(dense, handles, small, strict=True):
            self._pending[parameter] = self._dense_result(parameter, handle, tensor, how)

    def _dense_result(
        self, parameter: torch.nn.Parameter, handle: Pending, tensor: torch.Tensor, how: Any
    ) -> Callable[[], None]:
        gradient = parameter.grad

        def finish() -> None:
            handle.wait()
            if tensor is not gradient and gradient is not None:
                gradient.data.copy_(self._compression.decompress(tensor, how))

        return finish

    def _submit_sparse(self, parameter: torch.nn.Parameter) -> None:
        name, op, process_set = self._names[parameter], self._settings["op"], self._settings["process_set"]
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            handle = sparse_allreduce_async(gradient, f"gradient.{name}", op, process_set)

            def finish_sparse() -> None:
                parameter.grad = handle.wait()

            self._pending[parameter] = finish_sparse
            return
        values, (positions, shape) = self._compression.compress(gradient, name)
        kinds = [f"gradient.{name}.values", f"gradient.{name}.positions"]
        handles = submit("all_gather", [values, positions], kinds, process_set=process_set)
        size = len(context().controller.sets[number_of(process_set)])

        def finish_top() -> None:
            all_values, all_positions = (handle.wait() for handle in handles)
            # Rank after rank, each with its positions once: the order of additions is the same everywhere.
            whole = torch.zeros_like(gradient)
            pairs = zip(all_values.chunk(size), all_positions.chunk(size), strict=True)
            for part, places in pairs:
                whole += self._compression.decompress(part, (places, shape))
            if op is Average:
                divide(whole, size)
            gradient.data.copy_(whole)

        self._pending[parameter] = finish_top

    def synchronize(self) -> None:
        """Wait until all gradients are combined over the ranks; to clip them, say, before `step`.

        Raises MismatchError, StalledError or RankFailedError if the exchange did not come about.
        """
        if self._takes_part:
            for parameter in self._left:
                if parameter not in self._pending and not self._waits_in_group(parameter):
                    self._exchange(parameter)
            for finish in self._pending.values():
                finish()
        self._pending.clear()
        self._left = dict.fromkeys(self._left, self._passes)
        self._synchronized = True

    def _waits_in_group(self, parameter: torch.nn.Parameter) -> bool:
        number = self._group_of.get(parameter)
        return number is not None and parameter in self._ready[number]

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """`step` inside it does not wait again: for after `synchronize`."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Wait for the gradients, and step. A closure's gradients are combined each time that it is called."""
        closed: Callable[[], Any] | None = closure
        if self._should_synchronize:
            if self._synchronized:
                warnings.warn(
                    "step() combines the gradients again after synchronize(); "
                    "put it into `with optimizer.skip_synchronize():`",
                    stacklevel=2,
                )
            if closure is None:
                self.synchronize()
            else:

                def and_wait() -> Any:
                    loss = closure()
                    self.synchronize()
                    return loss

                closed = and_wait

        self._synchronized = False
        result = super().step(closed)  # type: ignore[misc]
        self._synchronized = False
        _tell_schedule(self._wrapped)
        return result

    def zero_grad(self, *arguments: Any, **keywords: Any) -> None:
        """As the optimizer's own. Raises InputError while gradients are being exchanged."""
        if self._pending:
            raise InputError(
                "gradients are being exchanged",
                place="optimizer.zero_grad",
                remedy="call it after step() or synchronize(), not between backward() and them",
            )
        super().zero_grad(*arguments, **keywords)  # type: ignore[misc]


class _StepsCombined:
    """Put in front of the user's class: each rank steps by itself, and the steps are combined by Adasum."""

    param_groups: list[dict[str, Any]]
    _wrapped: torch.optim.Optimizer

    def _prepare_steps(
        self, named: dict[torch.nn.Parameter, str], compression: Any, process_set: ProcessSet | None
    ) -> None:
        self._names, self._compression, self._process_set = named, compression, process_set
        number_of(process_set)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Nothing to set: steps are combined when they are made."""

    def synchronize(self) -> None:
        """Nothing to wait for before `step`: the gradients are each rank's own."""

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Not possible: what is combined is what `step` does. Raises InputError."""
        raise InputError("Adasum combines the steps themselves", place="skip_synchronize", remedy="call step() alone")
        yield

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on this rank's gradients, and combine what that did to the parameters over the ranks."""
        before = {parameter: parameter.detach().clone() for parameter in self._names if parameter.requires_grad}
        result = super().step(closure)  # type: ignore[misc]
        changes = [parameter.detach() - start for parameter, start in before.items()]
        small = [self._compression.compress(change) for change in changes]
        handles = submit(
            "all_reduce",
            [tensor for tensor, _ in small],
            [f"step.{self._names[parameter]}" for parameter in before],
            op=Adasum,
            process_set=self._process_set,
        )
        for (parameter, start), handle, (_, how) in zip(before.items(), handles, small, strict=True):
            parameter.data.copy_(start + self._compression.decompress(handle.wait(), how))
        _tell_schedule(self._wrapped)
        return result


def _tell_schedule(optimizer: Any) -> None:
    """Tell a learning-rate schedule that was made for the bare optimizer that there was a step."""
    optimizer._opt_called = True
